"""Holes: drawn by position alone, never empty; and how a Loader shows pictures with holes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scumble.data import holes
from scumble.data.images import cut, open_upright, to_tensor
from scumble.data.loader import Loader, still_batches
from scumble.data.order import Visit
from scumble.data.record import Batch
from scumble.data.settings import DataSettings
from scumble.data.sources import open_dataset
from scumble.data.woven import Woven
from scumble.models import FAMILIES
from scumble.models.unet import UNetBase
from scumble.rng import Streams
from tests.data.fakes import FakeBase, noise


def test_holes_are_a_function_of_the_position() -> None:
    first = [holes.random((32, 48), Streams(7), position) for position in range(200)]
    again = [holes.random((32, 48), Streams(7), position) for position in reversed(range(200))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(hole.shape == (1, 32, 48) and set(hole.unique().tolist()) <= {0.0, 1.0} for hole in first)
    areas = torch.stack([hole.mean() for hole in first])
    assert areas.min() > 0 and 0.15 < (areas == 1).float().mean() < 0.35, "about a quarter hide everything"
    assert len({hole.numpy().tobytes() for hole in first if hole.mean() < 1}) > 120
    assert not torch.equal(first[0], holes.random((32, 48), Streams(8), 0)) or first[0].mean() == 1


class Filling(FakeBase):
    """The fake base, shown holes: one channel for the hole, three for the rest of the picture."""

    shown_channels = 4

    def show(self, pixels: Tensor, hole: Tensor) -> Tensor:
        hidden = (hole >= 0.5).float()
        small = torch.nn.functional.interpolate(hidden, size=tuple(side // 8 for side in hole.shape[2:]))
        return torch.cat([small, self.encode_images(pixels * (1 - hidden), None)], dim=1)


def folder(root: Path, masked: bool = False) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "masks").mkdir(exist_ok=True)
    for index, size in enumerate(((32, 32), (48, 32), (60, 44))):
        noise(*size, seed=index).save(root / f"{index}.png")
        (root / f"{index}.txt").write_text("a thing")
        if masked:
            mask = np.zeros(size, np.uint8)
            mask[: size[0] // 2] = 255
            Image.fromarray(mask).save(root / "masks" / f"{index}.png")
    return root


def opened(base: FakeBase, root: Path, **changes: Any) -> Loader:
    settings = DataSettings(images=root, resolution=32, workers=0, **{"center_crop": False, **changes})
    return Loader(open_dataset(settings), base, settings, batch_size=2, seed=3)


def some(loader: Loader, count: int = 6, first: int = 0) -> list[Batch]:
    return list(islice(loader.start(first), count))


def test_each_visit_shows_its_picture_with_a_hole_of_its_own(tmp_path: Path) -> None:
    base = Filling()
    loader = opened(base, folder(tmp_path / "p"))
    loader.prepare()
    assert loader.needs_image_encoder, "a hole of each visit's own can't be kept"
    seen = set()
    for batch in some(loader):
        assert batch.shown is not None and batch.shown.shape == (2, 4, 4, 4)
        for row, position in enumerate(batch.positions):
            visit = Visit(position=position, entry=int(batch.keys[row][0]))
            geometry = loader.geometry(visit)
            picture = to_tensor(cut(open_upright(loader.dataset.records[visit.entry]), geometry))
            hole = holes.random((32, 32), Streams(3), position)
            assert torch.equal(batch.shown[row], base.show(picture[None], hole[None])[0])
            assert torch.equal(batch.latents[row], base.encode_images(picture[None], None)[0])
            seen.add(hole.numpy().tobytes())
    assert len(seen) > 4


def test_the_order_of_holes_can_be_continued_and_divided(tmp_path: Path) -> None:
    loader = opened(Filling(), folder(tmp_path / "p"))
    whole = some(loader, 6)
    later = some(opened(Filling(), tmp_path / "p"), 2, first=4)
    for one, other in zip(whole[4:], later, strict=True):
        assert one.positions == other.positions and torch.equal(one.shown, other.shown)  # type: ignore[arg-type]
    first, second = (loader.start(0, process=number, processes=2) for number in (0, 1))
    for number, batch in enumerate(batch for pair in zip(first, second, strict=False) for batch in pair):
        if number == 6:
            break
        assert torch.equal(batch.shown, whole[number].shown)  # type: ignore[arg-type]


def test_a_mask_is_the_hole_and_is_kept(tmp_path: Path) -> None:
    base = Filling()
    loader = opened(base, folder(tmp_path / "p", masked=True), masks="masks")
    first = some(loader, 12)
    assert not loader.needs_image_encoder
    encoded = len(base.images)
    again = some(loader, 12)
    assert len(base.images) == encoded, "the second time, everything is found again"
    for one, other in zip(first, again, strict=True):
        assert one.mask is not None and one.shown is not None and torch.equal(one.shown, other.shown)  # type: ignore[arg-type]
        sure = (one.mask == 0) | (one.mask == 1)
        assert torch.equal(one.shown[:, :1][sure], one.mask[sure])


def test_what_is_kept_knows_its_mask(tmp_path: Path) -> None:
    """Another mask of the same picture is another hole, in the same folder of kept latents."""
    root, kept = folder(tmp_path / "p", masked=True), tmp_path / "cache"
    first = some(opened(Filling(), root, masks="masks", cache=kept, center_crop=True), 3)
    for path in (root / "masks").iterdir():
        Image.open(path).point(lambda level: 255 - level).save(path)
    second = some(opened(Filling(), root, masks="masks", cache=kept, center_crop=True), 3)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert not torch.equal(one.shown, other.shown)  # type: ignore[arg-type]


def test_kept_latents_do_not_depend_on_what_is_shown(tmp_path: Path) -> None:
    """One cache serves a text-to-image base and an inpainting base of the same VAE."""
    root, kept = folder(tmp_path / "p"), tmp_path / "cache"
    plain, filling = (FAMILIES.get(name).tiny(0) for name in ("sd1", "sd1-inpainting"))
    assert isinstance(plain, UNetBase) and isinstance(filling, UNetBase)
    filling.vae.load_state_dict(plain.vae.state_dict())
    settings = DataSettings(images=root, resolution=16, workers=0, cache=kept)

    def rows(base: UNetBase) -> list[Batch]:
        loader = Loader(open_dataset(settings), base, settings, batch_size=3, seed=0, text_embeddings=False)
        return some(loader, 2)

    first = rows(plain)
    files = sorted(kept.rglob("*.safetensors"))
    for one, other in zip(first, rows(filling), strict=True):
        assert one.shown is None and other.shown is not None
        assert torch.equal(one.latents, other.latents) and other.shown.shape[1] == 5
    assert sorted(kept.rglob("*.safetensors")) == files, "found, not made again"


def test_held_out_pictures_and_woven_ones_are_shown_too(tmp_path: Path) -> None:
    base, root = Filling(), folder(tmp_path / "p")
    settings = DataSettings(images=root, resolution=32, workers=0)
    still = still_batches(open_dataset(settings), base, settings, batch_size=2)
    again = still_batches(open_dataset(settings), base, settings, batch_size=2)
    assert all(torch.equal(one.shown, other.shown) for one, other in zip(still, again, strict=True))  # type: ignore[arg-type]
    first, second = opened(base, root), opened(base, root, center_crop=True)
    woven = next(iter(Woven(first, second, weight=0.5).start(0)))
    (one,), (two,) = some(first, 1), some(second, 1)
    assert woven.shown is not None and one.shown is not None and two.shown is not None
    assert torch.equal(woven.shown[0::2], one.shown) and torch.equal(woven.shown[1::2], two.shown)


def test_other_bases_are_shown_nothing(tmp_path: Path) -> None:
    assert all(batch.shown is None for batch in some(opened(FakeBase(), folder(tmp_path / "p")), 2))


@pytest.mark.parametrize("family", ["sd1-inpainting", "sdxl-inpainting"])
@pytest.mark.parametrize("method", ["text-to-image", "dreambooth"])
def test_the_loss_sees_what_is_shown(method: str, family: str) -> None:
    """The gradient's loss is that of the formula, with the batch's own hole; the prior sees the same hole."""
    from scumble.training.settings import TrainSettings
    from tests.training.world import LatentBatches, make_plan

    options = {"prior": "prediction", "class_prompt": "a dog"} if method == "dreambooth" else None
    plan, base = make_plan(TrainSettings(batch=2, steps=1), family=family, method=method, options=options)
    batch = next(iter(plan.phases[0].batches.start(0)))
    assert batch.shown is not None and isinstance(plan.phases[0].batches, LatentBatches)
    asked: list[Tensor] = []
    real = base.denoiser.forward

    def spy(sample: Tensor, *rest: Any, **more: Any) -> Any:
        asked.append(sample.detach())
        return real(sample, *rest, **more)

    base.denoiser.forward = spy  # type: ignore[method-assign]
    plan.phases[0].objective(batch)
    assert len(asked) == (1 if method == "text-to-image" else 3)
    assert all(torch.equal(sample[:, 4:], batch.shown) for sample in asked)
