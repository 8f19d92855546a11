"""Preview: pictures from the saved file, and a live model that never notices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from scumble.adapters import Adapter, LoraSettings
from scumble.errors import FormatError
from scumble.formats import write
from scumble.inference.png import read_settings
from scumble.inference.request import AdapterUse, Request
from scumble.inference.session import Session
from scumble.models import BaseModel
from scumble.training.preview import Previewer, difference, previewer, resting
from tests.inference.makers import fill, tiny

REQUESTS = (
    Request(prompt="a fox", steps=3, seed=4, count=2),
    Request(prompt="a house", steps=3, negative="rain", guidance=4.0),
)


def pixels(path: Path) -> numpy.ndarray:
    return numpy.asarray(Image.open(path)).astype(float)


def psnr(first: numpy.ndarray, second: numpy.ndarray) -> float:
    error = ((first - second) ** 2).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def training(base: BaseModel, seed: int = 1, name: str = "default") -> Adapter:
    """An adapter under training: dropout on, checkpointing on, gradients there."""
    adapter = fill(
        Adapter.inject(base.roots, "attention", LoraSettings(rank=2, dropout=0.3), name=name), seed
    )
    base.train_memory(checkpointing=True)
    base.denoiser.train()
    adapter.train()
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    return adapter


@contextmanager
def unchanged(base: BaseModel, adapter: Adapter) -> Iterator[None]:
    """Everything that training has is the same after the block, bit for bit."""
    modules = [module for root in base.roots.values() for module in root.modules()]

    def look() -> dict[str, object]:
        return {
            "modules": [id(module) for root in base.roots.values() for module in root.modules()],
            "modes": [module.training for module in modules],
            "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in modules],
            "flags": [p.requires_grad for module in modules for p in module.parameters(recurse=False)],
            "dtypes": [p.dtype for module in modules for p in module.parameters(recurse=False)],
            "strength": adapter.strength,
            "strengths": [dict(m.strengths) for m in modules if hasattr(m, "strengths")],
            "rng": torch.get_rng_state().tolist(),
            "grad": torch.is_grad_enabled(),
        }

    weights = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    frozen = {name: p.detach().clone() for name, p in base.denoiser.named_parameters()}
    before = look()
    yield
    assert look() == before
    for name, parameter in adapter.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is not None
        assert bool((parameter.grad == 1).all())
    for name, parameter in base.denoiser.named_parameters():
        assert torch.equal(parameter, frozen[name])


def test_panels_are_what_a_fresh_session_draws_from_the_file(tmp_path: Path) -> None:
    base = tiny()
    adapter = training(base)
    file = write(adapter.state(), tmp_path / "x.safetensors")
    fill(adapter, 9)  # training goes on: the live weights are not those of the file
    torch.manual_seed(0)
    with unchanged(base, adapter):
        panels = Previewer(base, REQUESTS, tmp_path / "previews")(file, 500)
    assert [(panel.prompt, panel.seed) for panel in panels] == [("a fox", 4), ("a fox", 5), ("a house", 0)]
    assert [panel.adapter.name for panel in panels] == ["000500-01.png", "000500-02.png", "000500-03.png"]
    fresh = Session(tiny())
    for panel in panels:
        asked = read_settings(panel.adapter)
        assert asked.adapters == (AdapterUse(path=file),)
        alone = fresh.generate(asked)[0]
        assert psnr(pixels(panel.adapter), numpy.asarray(alone.image).astype(float)) >= 50
        bare = fresh.generate(read_settings(panel.base))[0]
        assert psnr(pixels(panel.base), numpy.asarray(bare.image).astype(float)) >= 50
        assert panel.difference == pytest.approx(numpy.abs(pixels(panel.base) - pixels(panel.adapter)).mean())
        assert panel.difference > 0.5


def test_base_pictures_are_drawn_once_and_steps_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny()
    adapter = training(base)
    draw = previewer(base, REQUESTS[:1], tmp_path)
    asked: list[Request] = []
    generate = Session.generate

    def counting(self: Session, request: Request, progress: object = None) -> object:
        asked.append(request)
        return generate(self, request)

    monkeypatch.setattr(Session, "generate", counting)
    files = []
    for step, seed in ((10, 1), (20, 2)):
        files.append(write(fill(adapter, seed).state(), tmp_path / f"{step}.safetensors"))
        panels = draw(files[-1], step)
    assert [bool(request.adapters) for request in asked] == [False, True, True]
    assert panels[0].base == tmp_path / "base-01.png"
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        "base-01.png",
        "base-02.png",
        "000010-01.png",
        "000010-02.png",
        "000020-01.png",
        "000020-02.png",
    }
    assert not (pixels(tmp_path / "000010-01.png") == pixels(tmp_path / "000020-01.png")).all()


def test_an_adapter_without_effect_gives_panels_without_difference(tmp_path: Path) -> None:
    base = tiny()
    fresh = Adapter.inject(base.roots, "attention", LoraSettings(rank=2))
    file = write(fresh.state(), tmp_path / "x.safetensors")
    draw = Previewer(base, REQUESTS, tmp_path)
    panels = draw(file, 0)
    assert [panel.difference for panel in panels] == [0.0, 0.0, 0.0]
    assert all((pixels(panel.base) == pixels(panel.adapter)).all() for panel in panels)
    assert "no numerical effect" in draw.notes[0]


def test_a_file_that_can_not_be_used_leaves_the_model_in_training(tmp_path: Path) -> None:
    base = tiny()
    adapter = training(base)
    (tmp_path / "x.safetensors").write_bytes(b"half a fi")
    with unchanged(base, adapter), pytest.raises(FormatError):
        Previewer(base, REQUESTS, tmp_path)(tmp_path / "x.safetensors", 10)


def test_notes_tell_of_prompts_cut_short(tmp_path: Path) -> None:
    base = tiny()
    file = write(training(base).state(), tmp_path / "x.safetensors")
    draw = Previewer(base, [Request(prompt="word " * 80, steps=1)], tmp_path)
    draw(file, 1)
    assert len(draw.notes) == 1
    assert "are not read" in draw.notes[0]


def test_resting_is_bit_identical_and_undone(tmp_path: Path) -> None:
    base = tiny()
    bare = Session(base).generate(REQUESTS[1])[0].image
    one, two = training(base), training(base, 2, "second")
    two.strength = 0.25
    with unchanged(base, one), resting(base.roots):
        assert difference(Session(base).generate(REQUESTS[1])[0].image, bare) == 0.0
    assert (one.strength, two.strength) == (1.0, 0.25)
    assert difference(Session(base).generate(REQUESTS[1])[0].image, bare) > 0
