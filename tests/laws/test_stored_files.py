"""Law of stored tensors: a file that is read as it lies says, and is written as, what it does through torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from scumble.adapters.state import AdapterState, LayerState, TokenState
from scumble.errors import ScumbleError
from scumble.formats import CODECS, TensorFile, read, write
from scumble.formats.codec import Read
from scumble.formats.container import save
from tests.formats.adapters_of import ATTENTION, BLOCK, CLIP, adapter, layer
from tests.laws.test_codecs import states
from tests.laws.test_family_files import cases

Q, K = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k"
FLUX = "transformer.transformer_blocks.0.attn"


def names(path: str, prefix: str = "lora_unet_") -> str:
    """A flat name."""
    return prefix + path.partition(".")[2].replace(".", "_")


def foreign() -> dict[str, dict[str, torch.Tensor]]:
    """Files that no writer of ours makes."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    pair = {f"{names(Q)}.lora_down.weight": some(4, 32), f"{names(Q)}.lora_up.weight": some(32, 4)}
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    alphas = {
        f"alpha {dtype}": pair | {f"{names(Q)}.alpha": torch.tensor(2.0).to(dtype)}
        for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64)
    }
    old = f"{BLOCK.removeprefix('unet.')}.attn1.processor.to_q_lora"
    return {
        **alphas,
        "alpha (1,)": pair | {f"{names(Q)}.alpha": torch.tensor([2.0])},
        "no alpha": pair,
        "fp8": {name: tensor.to(torch.float8_e4m3fn) for name, tensor in pair.items()},
        "tucker": {
            f"{conv}.lora_down.weight": some(2, 32, 1, 1),
            f"{conv}.lora_mid.weight": some(2, 2, 3, 3).double(),
            f"{conv}.lora_up.weight": some(16, 2, 1, 1),
        },
        "ia3": {f"{names(Q)}.weight": some(32), f"{names(Q)}.on_input": torch.tensor(False)},
        "bias": pair | {f"{names(Q)}.diff_b": some(32)},
        "processors": {f"{old}.down.weight": some(4, 32), f"{old}.up.weight": some(32, 4)},
        "bundle": pair | {"bundle_emb.<fox>.clip_l": some(2, 768)},
        "comfyui": {
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight": some(4, 32),
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_B.weight": some(32, 4),
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.alpha": torch.tensor(2.0),
        },
        "flux": {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": some(6, 16),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": some(48, 6),
            "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(3.0),
        },
        "two words": {"clip_l": some(2, 768), "clip_g": some(2, 1280)},
        "infinite": pair | {f"{names(Q)}.alpha": torch.tensor(torch.inf)},
        "not a number": {**pair, f"{names(Q)}.lora_up.weight": torch.full((32, 4), torch.nan).half()},
        "integers": {name: tensor.to(torch.int8) for name, tensor in pair.items()},
        "half": {f"{names(Q)}.lora_down.weight": some(4, 32)},
        "unequal": {**pair, f"{names(Q)}.lora_up.weight": some(32, 5)},
        "glora": {f"{names(Q)}.{part}.weight": some(4, 32) for part in ("a1", "a2", "b1", "b2")},
    }


def outcome(path: Path, stored: bool, folder: Path) -> Any:
    """All that comes of a file: what is read, what each dialect makes of it, or the error."""
    try:
        found = read(path, stored=stored)
    except ScumbleError as error:
        return type(error), str(error)
    written: dict[str, Any] = {}
    for name in CODECS:
        target = folder / str(stored) / name
        try:
            write(found.state, target, name)
        except ScumbleError as error:
            written[name] = type(error), str(error)
        else:
            files = sorted(file for file in target.rglob("*") if file.is_file())
            written[name] = [(file.relative_to(target), file.read_bytes()) for file in files]
    return found, written


def agree(path: Path, folder: Path) -> Read | None:
    """What was read, the same in both ways; None for an error."""
    plain, stored = outcome(path, False, folder), outcome(path, True, folder)
    if not isinstance(plain[0], Read):
        assert plain == stored
        return None
    (mine, files), (theirs, others) = plain, stored
    assert mine.state.equal(theirs.state) and mine.state.metadata == theirs.state.metadata
    for said in ("dialect", "used", "unused", "notes", "report", "files"):
        assert getattr(mine, said) == getattr(theirs, said)
    assert files == others
    return mine


@pytest.mark.parametrize("case", foreign())
def test_files_of_other_tools(case: str, tmp_path: Path) -> None:
    save(TensorFile(foreign()[case]), tmp_path / "a.safetensors")
    found = agree(tmp_path / "a.safetensors", tmp_path)
    wrong = ("infinite", "not a number", "integers", "half", "unequal", "glora")
    assert (found is None) == (case in wrong)


@pytest.mark.parametrize("options", list(cases()))
def test_every_family_in_every_dialect(options: Any, tmp_path: Path) -> None:
    from tests.formats.adapters_of import of_family

    state = of_family(options)
    for name in CODECS:
        if CODECS.get(name)().obstacle(state) is None:
            path = write(state, tmp_path / f"{name}-file", name, torch.bfloat16)
            assert agree(path, tmp_path / name) is not None


@settings(max_examples=25, deadline=None)
@given(state=states() | states(plain=True))
def test_any_adapter(tmp_path_factory: pytest.TempPathFactory, state: AdapterState) -> None:
    folder = tmp_path_factory.mktemp("any")
    assert agree(write(state, folder / "a.safetensors"), folder) is not None


def test_tokens_and_transformers(tmp_path: Path) -> None:
    token = TokenState({"text_encoder": torch.randn(3, 24)})
    parts = {name: torch.randn(4, 16) if name == "down" else torch.randn(16, 4) for name in ("down", "up")}
    fused = {f"{FLUX}.{part}": LayerState("lora", 4, 2.0, parts) for part in ("to_q", "to_k", "to_v")}
    cases = {
        "beside": AdapterState(adapter(ATTENTION).layers, {"<fox>": token}),
        "alone": AdapterState({}, {"<fox>": token}),
        "transformer": AdapterState(fused),
        "one": AdapterState({f"{CLIP}.q_proj": layer(f"{CLIP}.q_proj"), K: layer(K)}),
    }
    for case, state in cases.items():
        for name in CODECS:
            if CODECS.get(name)().obstacle(state) is None:
                path = write(state, tmp_path / case / f"{name}-file", name)
                assert agree(path, tmp_path / case / name) is not None
