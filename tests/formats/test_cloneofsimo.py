"""The dialect of numbers: layers in the order in which that tool met them, in both orders in circulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scumble.errors import CannotRepresent, FormatError, UnusedTensors, WrongBase
from scumble.formats import TensorFile, detect, read, write
from scumble.formats.container import save
from scumble.formats.flat_names import expand
from scumble.formats.tables.modules import CLIP_TEXT, SD_UNET
from scumble.models.tiny import tiny_pipeline
from tests.formats.adapters_of import ATTENTION, SHAPES, adapter

TARGETS = ("CrossAttention", "Attention", "GEGLU")


def met(
    root: nn.Module, name: str, targets: tuple[str, ...], kinds: tuple[type, ...] = (nn.Linear,)
) -> list[str]:
    """The layers as the tool meets them: every layer below a module of these classes, in the model's own order."""
    found = []
    for path, ancestor in root.named_modules():
        if type(ancestor).__name__ in targets:
            found += [
                f"{name}.{path}.{inner}"
                for inner, module in ancestor.named_modules()
                if isinstance(module, kinds)
            ]
    return found


def old(order: list[str]) -> list[str]:
    """The same layers as diffusers up to 0.14 had them: in each transformer block the feed-forward before attn2."""
    found: list[str] = []
    for path in order:
        if ".ff." in path:
            place = next(
                n for n, other in enumerate(found) if other.startswith(path.partition(".ff.")[0] + ".attn2")
            )
            found.insert(place, path)
        else:
            found.append(path)
    return found


@pytest.fixture(scope="module")
def base() -> Any:
    pipeline = tiny_pipeline("sd1")
    from scumble.adapters import layers_of

    roots = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    shapes = {path: tuple(layer.weight.shape) for path, layer in layers_of(roots).items()}
    return roots, shapes


def numbered(
    order: list[str], shapes: dict[str, tuple[int, ...]], rank: int = 2, seed: int = 0
) -> list[torch.Tensor]:
    """[up0, down0, up1, down1, ...]"""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for path in order:
        out, *inner = shapes[path]
        found.append(torch.randn(out, rank, *(1 for _ in inner[1:]), generator=generator))
        found.append(torch.randn(rank, *inner, generator=generator))
    return found


def safe(
    lists: dict[str, list[torch.Tensor]], targets: tuple[str, ...] = TARGETS, **tokens: torch.Tensor
) -> TensorFile:
    tensors, header = {}, {}
    for root, values in lists.items():
        header[root] = json.dumps(list(targets) if root == "unet" else ["CLIPAttention"])
        for place, tensor in enumerate(values):
            tensors[f"{root}:{place // 2}:{'down' if place % 2 else 'up'}"] = tensor
            header[f"{root}:{place // 2}:rank"] = str(min(tensor.shape[:2]))
    for name, row in tokens.items():
        tensors[f"<{name}>"], header[f"<{name}>"] = row, "<embed>"
    return TensorFile(tensors, header)


def check(found: Any, order: list[str], values: list[torch.Tensor]) -> None:
    for number, path in enumerate(order):
        layer = found.state.layers[path]
        assert torch.equal(layer.tensors["up"], values[2 * number]), path
        assert torch.equal(layer.tensors["down"], values[2 * number + 1]) and layer.scale == 1.0


@pytest.mark.parametrize("turn", [list, old])
def test_numbers_find_their_layers_in_both_orders(turn: Any, base: Any, tmp_path: Path) -> None:
    roots, shapes = base
    unet, text = (
        turn(met(roots["unet"], "unet", TARGETS)),
        met(roots["text_encoder"], "text_encoder", ("CLIPAttention",)),
    )
    lists = {"unet": numbered(unet, shapes), "text_encoder": numbered(text, shapes, seed=1)}
    save(safe(lists, s1=torch.ones(32), s2=torch.zeros(32)), tmp_path / "a.safetensors")
    assert detect(tmp_path) == "cloneofsimo"
    found = read(tmp_path, shapes)
    check(found, unet, lists["unet"])
    check(found, text, lists["text_encoder"])
    assert not found.unused and set(found.state.layers) == {*unet, *text}
    assert torch.equal(found.state.tokens["<s1>"].vectors["text_encoder"], torch.ones(1, 32))
    assert found.report.endswith("0 unused tensors (with 2 tokens: <s1>, <s2>)")


def test_resnets_count_where_the_file_says_so(base: Any, tmp_path: Path) -> None:
    roots, shapes = base
    targets = ("ResnetBlock2D", *TARGETS)
    order = met(roots["unet"], "unet", targets, (nn.Linear, nn.Conv2d))
    values = numbered(order, shapes)
    save(safe({"unet": values}, targets), tmp_path / "a.safetensors")
    check(read(tmp_path, shapes), order, values)


def test_lists_in_pickles_with_their_neighbours(base: Any, tmp_path: Path) -> None:
    roots, shapes = base
    unet, text = (
        met(roots["unet"], "unet", TARGETS),
        met(roots["text_encoder"], "text_encoder", ("CLIPAttention",)),
    )
    values, words = numbered(unet, shapes), numbered(text, shapes, seed=1)
    torch.save([nn.Parameter(tensor.half()) for tensor in values], tmp_path / "lora.pt")
    assert set(read(tmp_path / "lora.pt", shapes).state.layers) == set(unet)
    torch.save(words, tmp_path / "lora.text_encoder.pt")
    torch.save({"<s1>": torch.ones(32)}, tmp_path / "lora.ti.pt")
    for given in (tmp_path / "lora.pt", tmp_path):
        found = read(given, shapes)
        check(found, unet, [tensor.half() for tensor in values])
        check(found, text, words)
        assert set(found.state.tokens) == {"<s1>"} and len(found.files) == 3 and not found.unused
    alone = read(tmp_path / "lora.text_encoder.pt", shapes)
    assert set(alone.state.layers) == set(text)


def test_without_a_base_it_is_sd_1_and_its_order_is_told_by_the_feed_forward(tmp_path: Path) -> None:
    """Shapes of the real UNet; ranks of 1 keep it small."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    shapes = {f"unet.{name}": tuple(unet.get_submodule(name).weight.shape) for name in expand(SD_UNET)}
    order = met(unet, "unet", TARGETS)
    for turn in (list, old):
        values = numbered(turn(order), shapes, rank=1)
        save(safe({"unet": values}), tmp_path / "a.safetensors")
        check(read(tmp_path), turn(order), values)
        check(read(tmp_path, shapes), turn(order), values)
    assert len(order) == 144 and len(list(expand(CLIP_TEXT[:1]))) == 32 * 6


def test_what_fits_no_order_or_has_gaps_is_refused(base: Any, tmp_path: Path) -> None:
    roots, shapes = base
    order = met(roots["unet"], "unet", TARGETS)
    values = numbered(order, shapes)
    path = tmp_path / "a.safetensors"
    save(safe({"unet": values[:-2]}), path)
    with pytest.raises(
        WrongBase, match=rf"changes {len(order) - 1} layers of the unet.*this base has {len(order)}"
    ):
        read(path, shapes)
    save(safe({"unet": [*values[2:], *values[:2]]}), path)
    with pytest.raises(WrongBase, match="neither order in use fits"):
        read(path, shapes)
    whole = safe({"unet": values})
    save(TensorFile({n: t for n, t in whole.tensors.items() if n != "unet:3:down"}, whole.metadata), path)
    with pytest.raises(FormatError, match="the down factor of unet layer 3 is missing"):
        read(path, shapes)
    save(TensorFile(whole.tensors, {**whole.metadata, "unet:0:rank": "8"}), path)
    with pytest.raises(FormatError, match="contradicts itself: rank 8"):
        read(path, shapes)
    save(TensorFile({**whole.tensors, "x.y": torch.ones(2)}, whole.metadata), path)
    with pytest.raises(UnusedTensors, match=r"1 of .* tensors matched no known kind"):
        read(path, shapes)


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CannotRepresent, match=r"read and not written.*Write it as .*diffusers"):
        write(adapter(ATTENTION), tmp_path, "cloneofsimo")
    assert not list(tmp_path.iterdir()) and SHAPES
