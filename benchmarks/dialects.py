"""Which adapter file of which tool is read, written and understood by whom: dialect x family, with numbers.

    python benchmarks/dialects.py      # under two minutes; writes benchmarks/results/dialects.json, docs/dialects.md

On a tiny UNet with the layer names of SD 1. Wherever a peer writes files (diffusers' `save_lora_weights`, peft's
`save_pretrained`, lycoris-lora's `save_weights`), its own live modules are asked for the UNet's output, and scumble
reads the file into an unmodified diffusers pipeline: "their file" is the largest difference of the two. "Our file" is
the same for a file that scumble wrote and the peer loads. Rows and columns come from the registries: a new dialect or
family is in the table without a line here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor, nn

from scumble import load_adapter, unload_adapters
from scumble.adapters import FAMILIES, Adapter
from scumble.adapters.state import AdapterState, TokenState
from scumble.errors import ScumbleError
from scumble.formats import CODECS, TensorFile, detect, read, write
from scumble.formats.container import load, save
from scumble.formats.flat_names import spell
from scumble.inference.attach import roots_of
from scumble.models.tiny import tiny_pipeline

HERE = Path(__file__).parent
TOKENS = "learned tokens"
"""The one row of what is no family of layers."""
WORD = "<fox>"
PROMPT = f"a {WORD} on a hill"
RANK = 2
ACTS = 1e-3
"""A difference above this is no rounding: an adapter that acts, or two that act differently."""
ENDS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class Cell:
    """What one dialect does with one family."""

    reads: str = "no file of it is known"
    """"yes", or why not."""
    writes: str = ""
    round_trip: float | None = None
    """Largest difference of a number after writing and reading; None where nothing is written."""
    their_file: dict[str, float] = field(default_factory=dict)
    """Who wrote a file -> largest difference of the UNet's outputs, theirs and ours."""
    our_file: dict[str, float | str] = field(default_factory=dict)
    """Who loads our file -> that difference, or why it doesn't."""


@dataclass(frozen=True)
class Peer:
    """Another tool, unmodified."""

    name: str
    dialects: tuple[str, ...]
    """Whose files it is asked to load."""
    families: tuple[str, ...]
    """What it writes."""
    write: Callable[[str, Any, Path], Tensor]
    """(family, a fresh pipeline, folder) -> its own output; a file is in the folder then."""
    load: Callable[[Path, Any], None]
    """Put the file at a path into a fresh pipeline."""


def pipeline() -> Any:
    """The toy base of SD 1, always the same."""
    return tiny_pipeline("sd1")


@torch.no_grad()
def output(pipe: Any) -> Tensor:
    """The UNet's answer to fixed noise and one prompt."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    ids = pipe.tokenizer([PROMPT, "b"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = pipe.text_encoder(ids)[0]
    return pipe.unet(latents, torch.tensor([10, 700]), states).sample  # type: ignore[no-any-return]


@torch.no_grad()
def disturb(parameters: Iterator[nn.Parameter] | list[nn.Parameter], seed: int = 1) -> None:
    """As if trained: every number moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def trained(pipe: Any, family: str, targets: str | list[str] = "attention", **options: Any) -> AdapterState:
    """A state of that family on the pipeline's UNet; the pipeline is left as it was."""
    if family == TOKENS:
        width = pipe.text_encoder.config.hidden_size
        rows = torch.randn(1, width, generator=torch.Generator().manual_seed(3))
        return AdapterState({}, {WORD: TokenState({"text_encoder": rows})})
    settings = FAMILIES.get(family).settings(rank=RANK, **options)
    with Adapter.inject({"unet": pipe.unet}, targets, settings) as adapter:
        disturb(adapter.parameters())
        return adapter.state()


def ours(path: Path) -> Tensor:
    """The output of a fresh pipeline with scumble's own loader."""
    pipe = pipeline()
    load_adapter(pipe, path, quiet=True)
    found = output(pipe)
    unload_adapters(pipe)
    return found


def diffusers_writes(family: str, pipe: Any, folder: Path) -> Tensor:
    """A LoRA or DoRA through peft inside diffusers, saved by its own writer."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=RANK, lora_alpha=3, target_modules=ENDS, use_dora=family == "dora")
    pipe.unet.add_adapter(config)
    disturb([p for name, p in pipe.unet.named_parameters() if "lora_" in name])
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    said = pipe.unet.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=said)
    return output(pipe)


def diffusers_loads(path: Path, pipe: Any) -> None:
    """By the call that its users make; a text's embedding by the other one."""
    if detect(path) == "embedding":
        pipe.load_textual_inversion(str(path))
    else:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)


def peft_writes(family: str, pipe: Any, folder: Path) -> Tensor:
    """A whole UNet under peft, saved as peft saves."""
    import peft

    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=ENDS),
        "dora": lambda: peft.LoraConfig(r=RANK, lora_alpha=3, target_modules=ENDS, use_dora=True),
        "loha": lambda: peft.LoHaConfig(r=RANK, alpha=3, target_modules=ENDS),
        "lokr": lambda: peft.LoKrConfig(r=RANK, alpha=3, target_modules=ENDS),
        "ia3": lambda: peft.IA3Config(target_modules=ENDS, feedforward_modules=[]),
    }
    model = peft.get_peft_model(pipe.unet, configs[family]())
    disturb([p for name, p in model.named_parameters() if "lora_" in name or "hada" in name or "lokr" in name
             or "ia3" in name])  # fmt: skip
    model.save_pretrained(str(folder))
    return output(pipe)


def peft_loads(path: Path, pipe: Any) -> None:
    """`PeftModel.from_pretrained` on the UNet."""
    import peft

    peft.PeftModel.from_pretrained(pipe.unet, str(path if path.is_dir() else path.parent))


@contextlib.contextmanager
def lycoris_for_unets() -> Iterator[Any]:
    """LyCORIS's wrapper, calling layers as its kohya plug-in does."""
    from lycoris import LycorisNetwork

    before = LycorisNetwork.LORA_PREFIX
    LycorisNetwork.LORA_PREFIX = "lora_unet"
    LycorisNetwork.apply_preset({"target_module": ["Attention"]})
    try:
        yield LycorisNetwork
    finally:
        LycorisNetwork.LORA_PREFIX = before


def lycoris_writes(family: str, pipe: Any, folder: Path) -> Tensor:
    """LyCORIS's own network around the UNet."""
    import lycoris

    algo = {"lora": "locon", "dora": "locon", "oft": "diag-oft"}.get(family, family)
    with lycoris_for_unets():
        extra = {"dora_wd": True} if family == "dora" else {}
        network = lycoris.create_lycoris(pipe.unet, 1.0, linear_dim=RANK, linear_alpha=3, algo=algo, **extra)
        network.apply_to()
        disturb(list(network.parameters()))  # the network holds its modules from now on
        folder.mkdir(parents=True)
        network.save_weights(str(folder / "lycoris.safetensors"), torch.float32, {})
    network.eval()
    return output(pipe)


def lycoris_loads(path: Path, pipe: Any) -> None:
    """`create_lycoris_from_weights`, and merged on the fly."""
    import lycoris

    with lycoris_for_unets():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), pipe.unet)
    if not network.loras:
        raise ValueError("it found no layer of the UNet in the file")
    network.apply_to()
    network.eval()


PEERS = (
    Peer(
        "diffusers",
        ("diffusers", "attention-processors", "kohya", "comfyui", "embedding"),
        ("lora", "dora"),
        diffusers_writes,
        diffusers_loads,
    ),
    Peer("peft", ("peft",), ("lora", "dora", "loha", "lokr", "ia3"), peft_writes, peft_loads),
    Peer(
        "lycoris-lora",
        ("kohya", "lycoris"),
        ("lora", "dora", "loha", "lokr", "glora", "full", "ia3", "oft", "boft"),
        lycoris_writes,
        lycoris_loads,
    ),
)


def comfyui_by_hand(family: str, folder: Path) -> Path:
    """As OneTrainer calls the layers for ComfyUI: kohya's or LyCORIS's file with dots in the names."""
    state = trained(pipeline(), family)
    file = load(write(state, folder / "flat.safetensors", "kohya" if family == "lora" else "lycoris"))
    dotted = {spell(path, False): "lora_" + path for path in state.layers}
    tensors = {
        f"{dotted[flat]}.{ending}": tensor
        for flat, ending, tensor in ((*name.split(".", 1), tensor) for name, tensor in file.tensors.items())
    }
    save(TensorFile(tensors), folder / "comfyui.safetensors")
    (folder / "flat.safetensors").unlink()
    return folder / "comfyui.safetensors"


def cloneofsimo_by_hand(family: str, folder: Path) -> Path:
    """Numbered as that tool's walk met the layers: attention and the gate of each feed-forward block."""
    pipe = pipeline()
    state = trained(pipe, family, ["attention", "*.ff.net.0.proj"])
    met = [
        f"unet.{path}.{inner}"
        for path, ancestor in pipe.unet.named_modules()
        if type(ancestor).__name__ in ("Attention", "GEGLU")
        for inner, module in ancestor.named_modules()
        if isinstance(module, nn.Linear)
    ]
    tensors = {
        f"unet:{number}:{part}": state.layers[path].tensors[part]
        for number, path in enumerate(met)
        for part in ("up", "down")
    }
    header = {f"unet:{number}:rank": str(RANK) for number in range(len(met))}
    folder.mkdir(parents=True, exist_ok=True)
    save(TensorFile(tensors, header | {"unet": json.dumps(["Attention", "GEGLU"])}), folder / "a.safetensors")
    return folder / "a.safetensors"


BY_HAND: Mapping[str, tuple[tuple[str, ...], Callable[[str, Path], Path]]] = {
    "comfyui": (("lora", "dora", "loha", "lokr", "full"), comfyui_by_hand),
    "cloneofsimo": (("lora",), cloneofsimo_by_hand),
}
"""Dialects that are read only and whose tools can't be asked here -> (families, maker of a file by their rules)."""


def difference(one: Tensor, other: Tensor) -> float:
    """The largest one, of outputs about 1 in size."""
    return float((one - other).abs().max())


def error_of(found: AdapterState, state: AdapterState) -> float:
    """The largest difference of any number; infinity where what comes back is another thing."""
    if found.layers.keys() != state.layers.keys() or found.tokens.keys() != state.tokens.keys():
        return float("inf")
    pairs = [(found.layers[p].tensors, state.layers[p].tensors) for p in state.layers]
    pairs += [(found.tokens[n].vectors, state.tokens[n].vectors) for n in state.tokens]
    if any(mine.keys() != theirs.keys() for mine, theirs in pairs):
        return float("inf")
    scales = [abs(found.layers[p].scale - state.layers[p].scale) for p in state.layers]
    return max([*scales, *(difference(mine[n], theirs[n]) for mine, theirs in pairs for n in theirs)])


def said(error: Exception) -> str:
    """One line of an error, short."""
    line = " ".join(str(error).split())
    return (line if isinstance(error, ScumbleError) else f"{type(error).__name__}: {line}")[:160]


def of_ours(dialect: str, family: str, folder: Path, cell: Cell) -> None:
    """Write the family in this dialect, read it back, and let the peers load it."""
    codec = CODECS.get(dialect)()
    pipe = pipeline()
    plain = output(pipe)
    scaled = family not in (TOKENS, "full", "ia3")
    state = trained(pipe, family, **({"alpha": 3.0} if scaled else {}))
    why = codec.obstacle(state)
    if why is not None and scaled:
        # a dialect without alphas holds what needs none
        without = trained(pipe, family)
        if codec.obstacle(without) is None:
            state, why = without, None
            cell.writes = "yes, where alpha = rank"
    if why is not None:
        cell.writes = f"refused: {why}"
        return
    cell.writes = cell.writes or "yes"
    path = write(state, folder / "ours.safetensors", dialect)
    layers = {p: tuple(layer.weight.shape) for p, layer in layers_of_pipe(pipe).items()}
    cell.round_trip = error_of(read(path, layers).state, state)
    cell.reads = "yes"
    mine = ours(path)
    assert difference(mine, plain) > ACTS, f"{dialect} {family}: it must act, or nothing is shown"
    for peer in PEERS:
        if dialect in peer.dialects:
            cell.our_file[peer.name] = loaded_by(peer, path, mine)


def loaded_by(peer: Peer, path: Path, mine: Tensor) -> float | str:
    """The difference to our output, or why the peer does not load it."""
    pipe = pipeline()
    try:
        peer.load(path, pipe)
        apart = difference(output(pipe), mine)
        return apart if apart < ACTS else f"takes it and acts otherwise, by {apart:.1e}"
    except Exception as error:  # whatever a stranger raises is the answer
        return f"refused: {said(error)}"


def layers_of_pipe(pipe: Any) -> dict[str, Any]:
    """The layers that files may speak of."""
    from scumble.adapters import layers_of

    return dict(layers_of(roots_of(pipe)))


def of_theirs(peer: Peer, family: str, folder: Path, table: dict[tuple[str, str], Cell]) -> None:
    """Let a peer write the family, and read it."""
    pipe = pipeline()
    plain = output(pipe)
    live = peer.write(family, pipe, folder)
    assert difference(live, plain) > ACTS, f"{peer.name} {family}: it must act, or nothing is shown"
    cell = table.setdefault((detect(folder), family), Cell())
    try:
        found = {layer.family for layer in read(folder).state.layers.values()}
        assert found == {family}, f"{peer.name} was asked for {family} and wrote {found}"
        cell.their_file[peer.name] = difference(ours(folder), live)
        cell.reads = "yes"
    except ScumbleError as error:
        cell.reads = f"refused: {said(error)}"


def by_hand(dialect: str, family: str, folder: Path, cell: Cell) -> None:
    """A file by a dialect's rules, against the adapter itself."""
    maker = BY_HAND[dialect][1]
    path = maker(family, folder)
    pipe = pipeline()
    targets = ["attention", "*.ff.net.0.proj"] if dialect == "cloneofsimo" else "attention"
    with Adapter.load({"unet": pipe.unet}, trained(pipe, family, targets)):
        live = output(pipe)
    mine = ours(path)
    cell.their_file["its rules"] = difference(mine, live)
    cell.reads = "yes"
    for peer in PEERS:
        if dialect in peer.dialects:
            cell.our_file[peer.name] = loaded_by(peer, path, mine)


def measure(
    dialects: list[str], families: list[str], told: Callable[[str, str, Cell], None] = lambda *_: None
) -> dict[tuple[str, str], Cell]:
    """(dialect, family) -> cell, in the registries' order."""
    table = {(dialect, family): Cell() for family in families for dialect in dialects}
    with tempfile.TemporaryDirectory(prefix="scumble-dialects-") as name:
        root = Path(name)
        for peer in PEERS:
            for family in peer.families:
                if family in families:
                    found: dict[tuple[str, str], Cell] = {}
                    try:
                        of_theirs(peer, family, root / peer.name / family, found)
                    except ScumbleError as error:  # a dialect that is refused by name
                        key = (peer.dialects[0], family)
                        found[key] = Cell(reads=f"refused: {said(error)}")
                    for key, cell in found.items():
                        if key in table:
                            table[key].their_file |= cell.their_file
                            table[key].reads = cell.reads
        for (dialect, family), cell in table.items():
            folder = root / "ours" / dialect / family.replace(" ", "-")
            folder.mkdir(parents=True)
            of_ours(dialect, family, folder, cell)
            if dialect in BY_HAND and family in BY_HAND[dialect][0]:
                by_hand(dialect, family, folder / "by-hand", cell)
            told(dialect, family, cell)
    return table


def markdown(table: Mapping[tuple[str, str], Cell]) -> str:
    """The table for docs/dialects.md."""
    lines = [
        "# Dialects and families, measured",
        "",
        "Written by `python benchmarks/dialects.py`. Differences are the largest of the output (about 1 in size), "
        'on a tiny UNet with SD 1\'s layer names: "their file" is one that the peer named wrote, its own live output '
        'against scumble\'s with the file; "our file" is one that scumble wrote, loaded by the unmodified peer. 0 is '
        "bit for bit. \"Its rules\" is a file made after the dialect's description, since its tool can't be asked. "
        "Where a strong adapter drives a network into saturation, float32 tells less: a LoHa that moves the toy "
        "SDXL's output by 0.9 differs from LyCORIS's own modules by 2e-5 there, and each of the two is 7e-5 away from "
        "the exact output; in float64 they agree to 2e-14 (`tests/inference/test_attach_families.py` compares in "
        "float64).",
        "",
        "| dialect | family | reads | writes | round trip | their file | our file in |",
        "|---|---|---|---|---|---|---|",
    ]
    for (dialect, family), cell in table.items():
        theirs = ", ".join(f"{name} {number:.1e}" for name, number in cell.their_file.items())
        mine = ", ".join(
            f"{name} {number:.1e}" if isinstance(number, float) else f"{name} {number}"
            for name, number in cell.our_file.items()
        )
        trip = "" if cell.round_trip is None else f"{cell.round_trip:.1e}" if cell.round_trip else "0"
        cells = (dialect, family, cell.reads, cell.writes, trip, theirs, mine)
        lines.append("| " + " | ".join(text.replace("|", "\\|") or "-" for text in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dialect", action="append", choices=list(CODECS), help="only this one; repeatable")
    parser.add_argument("--family", action="append", choices=[*FAMILIES, TOKENS], help="only this one")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "dialects.json")
    parser.add_argument("--table", type=Path, default=HERE.parent / "docs" / "dialects.md")
    options = parser.parse_args()
    quiet()
    table = measure(
        options.dialect or list(CODECS),
        options.family or [*FAMILIES, TOKENS],
        lambda dialect, family, cell: print(f"{dialect:22}{family:16}{asdict(cell)}", flush=True),
    )
    cells = [
        {"dialect": dialect, "family": family, **asdict(cell)} for (dialect, family), cell in table.items()
    ]
    options.json.parent.mkdir(exist_ok=True, parents=True)
    options.json.write_text(json.dumps({"cells": cells, "machine": machine()}, indent=1) + "\n")
    options.table.write_text(markdown(table))


def quiet() -> None:
    """What peers remark on their own files is no figure."""
    import diffusers
    import transformers

    warnings.simplefilter("ignore")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


if __name__ == "__main__":
    main()
