from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scumble.data.cache import Cache, image_encoder_fingerprint, key, text_encoder_fingerprint
from scumble.errors import DataError
from tests.data.fakes import FakeBase

TENSORS = {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "b": torch.tensor([True, False])}


def equal(found: dict[str, torch.Tensor] | None) -> bool:
    assert found is not None
    return found.keys() == TENSORS.keys() and all(
        torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype
        for name in TENSORS
    )


def test_memory_and_disk_give_the_same_bits(tmp_path: Path) -> None:
    name = key("one")
    warm = Cache(tmp_path)
    warm.put(name, TENSORS, about="test")
    assert equal(warm.get(name)) and equal(Cache(tmp_path).get(name))
    assert name in warm and key("two") not in warm and Cache().get(name) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


def test_what_is_put_is_kept_when_the_caller_changes_it() -> None:
    cache, tensor = Cache(), torch.zeros(2)
    cache.put("k", {"a": tensor}, about="test")
    tensor.add_(1)
    found = cache.get("k")
    assert found is not None and found["a"].tolist() == [0, 0]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "no checksum"])
def test_a_damaged_file_is_a_miss_and_told(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    name = key("one")
    cache = Cache(tmp_path)
    cache.put(name, TENSORS, about="test")
    path = cache.path(name)
    data = bytearray(path.read_bytes())
    if damage == "no checksum":
        save_file(TENSORS, path)
    else:
        data[-1] ^= 1
        path.write_bytes({"cut": bytes(data[:-3]), "flip": bytes(data), "empty": b""}[damage])
    cold = Cache(tmp_path)
    assert cold.get(name) is None
    assert str(path) in cold.notes[0] and "is damaged" in cold.notes[0]
    cold.put(name, TENSORS, about="test")
    assert equal(Cache(tmp_path).get(name))


def test_a_killed_writer_leaves_no_file_that_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).put(key("one"), TENSORS, about="test")
    assert Cache(tmp_path).get(key("one")) is None


def test_a_folder_that_cant_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache folder .*file can't be written"):
        Cache(tmp_path / "file").put(key("one"), TENSORS, about="test")


def test_memory_has_a_bound_in_front_of_a_folder(tmp_path: Path) -> None:
    cache = Cache(tmp_path, memory=1000)
    for number in range(8):
        cache.put(key(number), {"a": torch.full((100,), float(number))}, about="test")
    assert len(cache._memory) == 2 and cache._used == 800
    for number in range(8):
        found = cache.get(key(number))
        assert found is not None and found["a"][0] == number
    assert len(cache._memory) == 2
    kept = Cache(None, memory=1000)
    for number in range(8):
        kept.put(key(number), {"a": torch.zeros(100)}, about="test")
    assert all(key(number) in kept for number in range(8))


def test_keys_tell_parts_apart() -> None:
    names = [key("a", "b"), key("ab"), key("a", "b", ""), key("b", "a"), key(["a", "b"])]
    assert len(set(names)) == len(names)
    assert all(len(name) == 64 for name in names)


def test_encoder_fingerprints_follow_weights_dtype_and_configuration() -> None:
    base = FakeBase()
    images, texts = image_encoder_fingerprint(base), text_encoder_fingerprint(base)
    assert (images, texts) == (image_encoder_fingerprint(FakeBase()), text_encoder_fingerprint(FakeBase()))
    with torch.no_grad():
        base.vae.weight[0, 0] += 1e-6
    assert image_encoder_fingerprint(base) != images and text_encoder_fingerprint(base) == texts
    half = FakeBase()
    half.text_encoder.to(torch.bfloat16)
    assert text_encoder_fingerprint(half) != texts and image_encoder_fingerprint(half) == images
    scaled = FakeBase()
    scaled.vae.config = {"scaling_factor": 0.5, "_name_or_path": "here"}  # type: ignore[assignment]
    other = image_encoder_fingerprint(scaled)
    scaled.vae.config = {"scaling_factor": 0.5, "_name_or_path": "there"}  # type: ignore[assignment]
    assert image_encoder_fingerprint(scaled) == other != images
