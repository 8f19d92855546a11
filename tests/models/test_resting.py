"""Resting: what isn't computed with holds no memory, comes back with its bits when it is asked, and stays where
something trains in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scumble.adapters import Adapter
from scumble.adapters.lora import LoraSettings
from scumble.data.cache import image_encoder_fingerprint, text_encoder_fingerprint
from scumble.errors import ModelError
from scumble.inference.request import Request
from scumble.inference.session import Session
from scumble.models import tiny
from scumble.models.family import BaseModel
from scumble.models.loading import load_base
from scumble.models.resting import Rest


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> BaseModel:
    return load_base(folder, dtype=dtype, device="cpu")


def held(module: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(
        {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}.values()
    )


def pixels() -> Tensor:
    return torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_asleep_it_holds_nothing_and_asked_it_answers_as_before(
    folders: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    base = loaded(folders[family], dtype)
    encoders = [name for name in base.roots if name.startswith("text_encoder")]
    parts = base.modules()
    latents, text = base.encode_images(pixels(), None), base.encode_prompts(["a fox"])
    facts = {
        name: [(p.shape, p.dtype, p.device) for p in parts[name].parameters()] for name in (*encoders, "vae")
    }
    keys = image_encoder_fingerprint(base), text_encoder_fingerprint(base)
    assert base.rest(pictures=True, text=True) == ("vae", *encoders)
    for name, before in facts.items():
        assert held(parts[name]) < 2000
        assert [(p.shape, p.dtype, p.device) for p in parts[name].parameters()] == before
    assert held(base.denoiser) > 2000
    assert torch.equal(base.encode_images(pixels(), None), latents)
    assert held(parts["vae"]) > 2000 > held(parts["text_encoder"]), "each comes when it is asked"
    assert torch.equal(base.encode_prompts(["a fox"]).tokens, text.tokens)
    base.release()
    assert all(held(parts[name]) < 2000 for name in facts)
    assert torch.equal(base.decode_latents(latents), base.decode_latents(latents))
    base.release()
    assert (image_encoder_fingerprint(base), text_encoder_fingerprint(base)) == keys
    base.rest(pictures=True, text=True)
    base.discard()
    assert all(held(part) == 0 for part in parts.values())


def test_pictures_drawn_by_the_pipeline_find_everything_awake(folders: dict[str, Path]) -> None:
    request = Request(prompt="a fox", steps=2)
    with Session(loaded(folders["sd1"])) as session:
        plain = session.generate(request)[0].image.tobytes()
        session.base.rest(pictures=True, text=True)
        assert session.generate(request)[0].image.tobytes() == plain


def test_what_trains_stays_and_what_was_not_told_to_rest(folders: dict[str, Path]) -> None:
    base = loaded(folders["sd1"])
    adapter = Adapter.inject(base.roots, ["text_encoder.attention"], LoraSettings(rank=2))
    assert base.rest(pictures=False, text=True) == ()
    adapter.eject()
    assert base.rest(pictures=False, text=True) == ("text_encoder",)
    base.release()
    assert held(base.modules()["vae"]) > 2000
    never = loaded(folders["sd1"])
    never.release()
    assert held(never.roots["text_encoder"]) > 2000


def test_files_that_changed_meanwhile_are_refused(tmp_path: Path) -> None:
    folder = tiny.save("sd1", tmp_path / "base")
    base = loaded(folder)
    base.rest(pictures=True, text=False)
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="vae can't be loaded"):
        base.encode_images(pixels(), None)
    other = nn.Linear(2, 3).requires_grad_(False)
    rest = Rest("vae", other, lambda: nn.Linear(2, 4))
    assert rest.rest()
    with pytest.raises(ModelError, match="its files have changed since"):
        other(torch.zeros(1, 2))
    assert rest.resting


def test_away_from_the_cpu_the_host_keeps_the_weights() -> None:
    module = nn.Linear(2, 3, device="meta").requires_grad_(False)  # any device that is not the CPU
    rest = Rest("text_encoder", module, None)
    kept = nn.Linear(2, 3).requires_grad_(False)
    on_cpu = Rest("text_encoder", kept, None)
    assert not on_cpu.rest() and not on_cpu.resting, "from where should it come back?"
    with pytest.raises(NotImplementedError, match="meta"):  # which has nothing to keep: but it is asked for
        rest.rest()
