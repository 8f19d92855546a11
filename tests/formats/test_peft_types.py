"""peft's LoHa, LoKr, IA3 and OFT against peft itself: its folders compute here what they do there, and ours there."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import Adapter, AdapterState
from scumble.errors import CannotRepresent, FormatError
from scumble.formats import CODECS, read, write
from scumble.formats.container import PEFT_CONFIG
from tests.formats.adapters_of import SHAPES, of_family
from tests.formats.test_peft import UNET, Attention

peft = pytest.importorskip("peft")

LINEAR = ["to_q", "to_out.0", "to_k", "to_v", "ff.net.0.proj", "proj_in"]
EVERY = [*LINEAR, "conv1"]
CASES: dict[str, Callable[[], Any]] = {
    "loha": lambda: peft.LoHaConfig(
        r=4, alpha=3, target_modules=EVERY, rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 5}
    ),
    "loha cores": lambda: peft.LoHaConfig(r=4, alpha=3, target_modules=EVERY, use_effective_conv2d=True),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=EVERY),
    "lokr cores": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=EVERY, use_effective_conv2d=True),
    "lokr both": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=EVERY, decompose_both=True, decompose_factor=8
    ),
    "lokr whole": lambda: peft.LoKrConfig(r=900, alpha=300, target_modules=EVERY),
    "ia3": lambda: peft.IA3Config(target_modules=EVERY, feedforward_modules=["to_out.0", "conv1"]),
    "oft series": lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, use_cayley_neumann=True),
    "oft exact": lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=4, use_cayley_neumann=False),
    "oft by number": lambda: peft.OFTConfig(target_modules=LINEAR, r=4, oft_block_size=0),
    "oft shared": lambda: peft.OFTConfig(target_modules=LINEAR, oft_block_size=8, block_share=True),
}
LIMITED = peft.OFTConfig(target_modules=LINEAR, oft_block_size=8, coft=True, eps=0.02)


def input_for(path: str) -> Tensor:
    _, inside, *kernel = SHAPES[path]
    shape = (2, inside, 7, 7) if kernel else (2, 3, inside)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, paths: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {path: model.get_submodule(path.removeprefix("unet."))(input_for(path)) for path in paths}


def written_by_peft(config: Any, folder: Path, scale: float = 0.2) -> tuple[list[str], dict[str, Tensor]]:
    """Saves an adapter with values as if trained; the layers that it changes, and what they compute then."""
    wrapped = peft.get_peft_model(Attention(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in wrapped.parameters() if p.requires_grad):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    wrapped.eval().save_pretrained(str(folder))
    paths = [path for path in UNET if path.endswith(tuple(config.target_modules))]
    return paths, outputs(wrapped.get_base_model(), paths)


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_computes_the_same_here_and_written_again_there(case: str, tmp_path: Path) -> None:
    # large blocks turn far, where float32 rounds by more than is asked for here
    scale = 0.02 if case == "oft by number" else 0.2
    paths, theirs = written_by_peft(CASES[case](), tmp_path / "theirs", scale)
    unet = Attention().requires_grad_(False)
    base = outputs(unet, paths)
    found = read(tmp_path / "theirs", SHAPES)
    assert found.dialect == "peft" and not found.unused and set(found.state.layers) == set(paths)
    with Adapter.load({"unet": unet}, found.state):
        ours = outputs(unet, paths)
    for path in paths:
        assert (theirs[path] - base[path]).abs().max() > 1e-3
        torch.testing.assert_close(ours[path], theirs[path], rtol=1e-5, atol=1e-5)
    write(found.state, tmp_path / "ours", "peft")
    assert read(tmp_path / "ours", SHAPES).state.equal(found.state)
    assert read(tmp_path / "ours").state.equal(found.state)  # without a base
    again = peft.PeftModel.from_pretrained(Attention(), str(tmp_path / "ours")).eval()
    there = outputs(again.get_base_model(), paths)
    for path in paths:
        torch.testing.assert_close(there[path], theirs[path], rtol=1e-6, atol=1e-6)


def test_constrained_turns_are_limited_as_peft_limits_them(tmp_path: Path) -> None:
    paths, theirs = written_by_peft(copy.deepcopy(LIMITED), tmp_path)
    unet = Attention().requires_grad_(False)
    free = read(tmp_path, SHAPES).state
    with Adapter.load({"unet": unet}, free):
        ours = outputs(unet, paths)
    for path in paths:
        torch.testing.assert_close(ours[path], theirs[path], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_cayley_neumann_terms": 3}, "a series of 3 terms"),
        ({"peft_type": "BOFT"}, "of the type BOFT; read are LORA, LOHA"),
        ({"modules_to_save": ["conv_in"], "bias": "all"}, None),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    fields: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    written_by_peft(CASES["oft series"](), tmp_path)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text()) | fields
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    if said is None:  # what it says is not in the file
        assert read(tmp_path, SHAPES).state.layers
        return
    with pytest.raises(FormatError, match=said):
        read(tmp_path, SHAPES)


def test_turns_of_overlapping_patches_are_refused(tmp_path: Path) -> None:
    written_by_peft(peft.OFTConfig(target_modules=["conv1"], oft_block_size=8), tmp_path)
    with pytest.raises(FormatError, match=r"OFT on the convolution 'unet\..*conv1'"):
        read(tmp_path, SHAPES)


def test_whole_biases_of_the_base_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["to_q"], bias="all")
    written_by_peft(config, tmp_path)
    with pytest.raises(FormatError, match=r"bias 'all'.*not changes to them"):
        read(tmp_path, SHAPES)


def test_a_bias_that_is_scaled_with_the_factors_is_read_and_written(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=EVERY, lora_bias=True)
    paths, theirs = written_by_peft(config, tmp_path / "theirs")
    unet = Attention().requires_grad_(False)
    found = read(tmp_path / "theirs", SHAPES)
    with Adapter.load({"unet": unet}, found.state):
        ours = outputs(unet, paths)
    write(found.state, tmp_path / "ours", "peft")
    again = peft.PeftModel.from_pretrained(Attention(), str(tmp_path / "ours")).eval()
    there = outputs(again.get_base_model(), paths)
    for path in paths:
        torch.testing.assert_close(ours[path], theirs[path], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(there[path], theirs[path], rtol=1e-6, atol=1e-6)
    for dialect in ("peft", "diffusers"):
        file = CODECS.get(dialect)().encode(found.state)
        assert CODECS.get(dialect)().decode(file, SHAPES).state.equal(found.state)
    with pytest.raises(CannotRepresent, match="Write it as diffusers or peft"):
        write(found.state, tmp_path / "x.safetensors", "lycoris")


@pytest.mark.parametrize("family", ["oft", "boft", "ia3"])
def test_other_turns_and_factors_are_not_pefts(family: str, tmp_path: Path) -> None:
    from scumble.adapters import FAMILIES

    state = AdapterState(of_family(FAMILIES.get(family).settings(), UNET).layers)
    with pytest.raises(CannotRepresent, match="lycoris"):
        write(state, tmp_path, "peft")
