"""Masks: cut as their pictures are, known by content, and refused by name."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scumble.data import masks
from scumble.data.check import check
from scumble.data.loader import Loader, still_batches
from scumble.data.record import Batch, Record
from scumble.data.settings import DataSettings
from scumble.data.sources import open_dataset
from scumble.errors import DataError
from scumble.training.objective import ObjectiveSettings, compared
from tests.data.fakes import FakeBase, noise

SIZES = ((32, 32), (48, 32), (32, 64), (60, 44))


def pictures(root: Path, masks: str = "masks") -> Path:
    """Pictures whose red is their own mask, in folder `masks` of the pictures or, for "alpha", as transparency."""
    root.mkdir(parents=True, exist_ok=True)
    for index, (height, width) in enumerate(SIZES):
        grey = noise(height, width, index).convert("L")
        picture = Image.merge("RGB", (grey, *noise(height, width, 50 + index).split()[1:]))
        if masks == "alpha":
            picture.putalpha(grey)
        else:
            (root / masks).mkdir(exist_ok=True)
            grey.save(root / masks / f"{index}.png")
        picture.save(root / f"{index}.png")
        (root / f"{index}.txt").write_text("a thing")
    return root


def opened(root: Path, masks: str | None = "masks", cache: Path | None = None, **changes: Any) -> Loader:
    settings = DataSettings(
        images=root, masks=masks, resolution=32, interpolation="bilinear", workers=0, cache=cache, **changes
    )
    return Loader(open_dataset(settings), FakeBase(), settings, batch_size=2, seed=3)


def shown(loader: Loader, count: int = 12) -> list[Batch]:
    return list(islice(loader.start(0), count))


FORMS: dict[str, dict[str, Any]] = {
    "in the middle": {},
    "random crops": {"center_crop": False},
    "crops at each visit": {"center_crop": False, "crop_variants": 0},
    "mirrored": {"center_crop": False, "random_flip": True},
    "buckets": {"buckets": True, "random_flip": True},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_is_cut_as_its_picture_is(tmp_path: Path, form: str) -> None:
    """The picture's red is the mask, and the fake base's latents are the means of 8x8 pixels in [-1, 1]."""
    for batch in shown(opened(pictures(tmp_path / "p"), **FORMS[form])):
        assert batch.mask is not None and batch.mask.shape == (len(batch), 1, *batch.latents.shape[2:])
        torch.testing.assert_close(2 * batch.mask - 1, batch.latents[:, :1], atol=1e-5, rtol=0)


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    folder, alpha = opened(pictures(tmp_path / "f")), opened(pictures(tmp_path / "a", "alpha"), "alpha")
    for one, other in zip(shown(folder), shown(alpha), strict=True):
        assert one.keys == other.keys and one.mask is not None and other.mask is not None
        assert torch.equal(one.mask, other.mask)


def test_transparency_turns_with_the_picture(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 32), "red")
    picture.paste((0, 0, 0, 0), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees: what is left lies on top
    picture.save(tmp_path / "0.png", exif=exif)
    (tmp_path / "0.txt").write_text("a thing")
    (batch,) = shown(opened(tmp_path, "alpha", buckets=True), 1)
    assert batch.mask is not None
    high = batch.mask.shape[2]
    assert not batch.mask[:, :, : high // 2 - 1].any() and batch.mask[:, :, high // 2 + 1 :].all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_mask_painted_on_nothing_is_black_there(tmp_path: Path, mode: str) -> None:
    mask = Image.new("RGBA", (16, 16))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 16))
    mask.convert(mode).save(tmp_path / "0.png")
    found = np.asarray(masks.opened(Record("0.png", lambda: Image.open(tmp_path / "0.png"), ("",))))
    assert (found[:, :8] == 255).all() and not found[:, 8:].any()


def test_where_the_mask_is_black_the_gradient_is_exactly_zero(tmp_path: Path) -> None:
    from scumble.models import FAMILIES

    root = pictures(tmp_path)
    for index, (height, width) in enumerate(SIZES):
        mask = Image.new("L", (width, height))
        mask.paste(255, (0, 0, width // 2, height))
        mask.save(root / "masks" / f"{index}.png")
    prediction = FAMILIES.get("sd1").tiny().prediction
    for batch in shown(opened(root, random_flip=True), 4):
        assert batch.mask is not None
        answer = torch.randn(batch.latents.shape, requires_grad=True)
        losses = compared(
            answer, batch.latents, batch.mask, prediction, torch.tensor([5, 9]), ObjectiveSettings()
        )
        losses.sum().backward()
        assert answer.grad is not None
        counts = batch.mask.expand_as(answer)
        assert not answer.grad[counts == 0].any() and answer.grad[counts > 0].all()
        errors = (answer - batch.latents).square()
        for row in range(len(batch)):
            assert (counts[row] == 0).any() and (counts[row] == 1).any()
            mean = (errors[row] * counts[row]).sum() / counts[row].sum()  # over what counts, and only that
            torch.testing.assert_close(losses[row], mean)


def test_masks_are_known_by_content(tmp_path: Path) -> None:
    root, cache = pictures(tmp_path / "p"), tmp_path / "cache"
    first = opened(root, cache=cache)
    before = shown(first)
    latents = len(list(cache.rglob("*.safetensors")))
    Image.new("L", SIZES[0][::-1], 77).save(root / "masks" / "0.png")
    second = opened(root, cache=cache)
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint != opened(root, "masks", cache, random_flip=True).fingerprint
    for one, other in zip(before, shown(second), strict=True):
        assert torch.equal(one.latents, other.latents) and one.mask is not None and other.mask is not None
        for row, key in enumerate(one.keys):
            grey = torch.full_like(one.mask[row], 77 / 255)
            torch.testing.assert_close(other.mask[row], grey if key == "0.png" else one.mask[row])
    assert len(list(cache.rglob("*.safetensors"))) == latents + 1, "one new mask, and nothing else"
    again = opened(root, cache=cache)
    assert all(
        torch.equal(a.mask, b.mask)
        for a, b in zip(shown(again), shown(second), strict=True)
        if a.mask is not None and b.mask is not None
    )


def test_masks_are_not_trained_on(tmp_path: Path) -> None:
    loader = opened(pictures(tmp_path))
    assert [record.key for record in loader.dataset.records] == ["0.png", "1.png", "2.png", "3.png"]
    apart = pictures(tmp_path / "p", "elsewhere")
    (apart / "elsewhere").rename(tmp_path / "far")
    assert opened(apart, str(tmp_path / "far")).fingerprint == loader.fingerprint


def test_without_masks_nothing_changes(tmp_path: Path) -> None:
    root = pictures(tmp_path / "p")
    (root / "masks").rename(tmp_path / "masks")
    batches = shown(opened(root, None))
    assert all(batch.mask is None for batch in batches)
    assert "masks" not in DataSettings(images=root).model_dump(exclude_unset=True)


def test_what_is_wrong_is_said_of_all_pictures_at_once(tmp_path: Path) -> None:
    root = pictures(tmp_path / "p")
    (root / "masks" / "0.png").unlink()
    Image.new("L", (9, 7), 255).save(root / "masks" / "1.png")
    Image.new("L", SIZES[2][::-1]).save(root / "masks" / "2.png")
    (root / "masks" / "stray.png").write_bytes((root / "masks" / "3.png").read_bytes())
    settings = DataSettings(images=root, masks="masks", workers=0)
    report = check(settings, resolution=32)
    said = {problem.key: problem.text for problem in report.errors}
    assert "there is no" in said["0.png"] and "masks/0.png" in said["0.png"]
    assert "9x7 pixels and the picture 32x48" in said["1.png"]
    assert "black everywhere" in said["2.png"]
    assert any("belongs to no picture" in problem.text for problem in report.warnings)
    with pytest.raises(DataError, match=r"0\.png"):
        open_dataset(settings)
    (root / "masks" / "0.png").write_bytes((root / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"2 problems.*\n.*1\.png.*9x7(.*\n)+.*2\.png.*black"):
        opened(root)


def test_a_mask_is_judged_by_what_the_crop_leaves(tmp_path: Path) -> None:
    for name, white in (("cut away", (0, 0, 8, 16)), ("kept", (16, 0, 17, 16))):
        noise(16, 48).save(tmp_path / f"{name}.png")
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask = Image.new("L", (48, 16))
        mask.paste(255, white)
        mask.save(tmp_path / "masks" / f"{name}.png")
    settings = DataSettings(images=tmp_path, caption="a thing", masks="masks", workers=0)
    (problem,) = check(settings, resolution=16).errors
    assert problem.key == "cut away.png" and "black in all of the 16x16 that the crop leaves" in problem.text
    for other in ({"center_crop": False}, {"buckets": True}):
        assert not check(settings.model_copy(update=other), resolution=16).errors


def test_masks_that_nobody_asked_for_are_a_warning(tmp_path: Path) -> None:
    settings = DataSettings(images=pictures(tmp_path), caption="a thing", workers=0)
    (tmp_path / "masks" / "3.png").rename(tmp_path / "masks" / "stray.png")
    report = check(settings, resolution=32)
    (problem,) = [problem for problem in report.warnings if problem.kind == "masks not set"]
    assert problem.key == "masks/" and problem.text.startswith("3 of its 4 pictures are named as")
    assert 'set masks = "masks"' in problem.text
    for file in (tmp_path / "masks").iterdir():
        file.rename(file.with_stem(f"disguise {file.stem}"))
    assert not any(problem.kind == "masks not set" for problem in check(settings, resolution=32).problems)


def test_transparency_that_nobody_asked_for_is_a_warning(tmp_path: Path) -> None:
    settings = DataSettings(images=pictures(tmp_path, "alpha"), workers=0)
    noise(32, 32, 9).save(tmp_path / "0.png")
    noise(32, 32, 8).convert("RGBA").save(tmp_path / "3.png")
    (problem,) = [one for one in check(settings, resolution=32).problems if one.kind == "transparent"]
    assert not problem.error and str(problem).startswith("1.png: and 1 more pictures have transparent parts")
    assert 'masks = "alpha"' in problem.text
    noise(32, 32, 9).convert("RGBA").save(tmp_path / "0.png")
    told = check(settings.model_copy(update={"masks": "alpha"}), resolution=32).problems
    assert not any(one.error or one.kind == "transparent" for one in told)


def test_a_picture_without_transparency_is_named(tmp_path: Path) -> None:
    root = pictures(tmp_path, "alpha")
    noise(32, 32).save(root / "2.png")
    with pytest.raises(DataError, match=r"2\.png: .*no transparency"):
        opened(root, "alpha")


def test_a_missing_folder_of_masks_is_refused(tmp_path: Path) -> None:
    root = pictures(tmp_path)
    with pytest.raises(DataError, match=r"no folder of masks 'mask'.*alpha"):
        open_dataset(DataSettings(images=root, masks="mask"))


def test_held_out_pictures_may_have_masks(tmp_path: Path) -> None:
    settings = DataSettings(images=pictures(tmp_path), masks="masks", resolution=32, workers=0)
    batches = still_batches(open_dataset(settings), FakeBase(), settings, batch_size=2)
    assert sum(map(len, batches)) == 4 and all(batch.mask is not None for batch in batches)


def test_numbers_are_means_of_what_a_latent_covers() -> None:
    from scumble.data.images import center
    from scumble.data.masks import weights

    grey = np.zeros((16, 16), np.uint8)
    grey[:8, :4] = 255
    found = weights(Image.fromarray(grey), center((16, 16), (16, 16)), 8)
    assert found.tolist() == [[[0.5, 0.0], [0.0, 0.0]]]
