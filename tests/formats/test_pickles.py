"""Pickled files: tensors come out, programs do not run, and small files stay small."""

from __future__ import annotations

import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.errors import FormatError
from scumble.formats import detect, read
from scumble.formats.container import is_pickle, load
from scumble.formats.pickles import load_pickle
from tests.formats.adapters_of import BLOCK, SHAPES, layer

Q = f"{BLOCK}.attn1.to_q"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.canary}",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "a.pt", "a.ckpt"])
def test_a_pickled_lora_is_read(name: str, legacy: bool, tmp_path: Path) -> None:
    """As `save_attn_procs` of early 2023 wrote it: the UNet alone, without a prefix."""
    parent = f"{BLOCK[5:]}.attn1.processor"
    tensors = {f"{parent}.to_q_lora.{part}.weight": layer(Q).tensors[part] for part in ("down", "up")}
    torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert detect(tmp_path) == "attention-processors"
    found = read(tmp_path, SHAPES)
    assert set(found.state.layers) == {Q} and found.path == tmp_path / name
    assert torch.equal(found.state.layers[Q].tensors["up"], layer(Q).tensors["up"])


def test_a_safetensors_file_under_a_pickles_name_is_read(tmp_path: Path) -> None:
    from scumble.formats import TensorFile
    from scumble.formats.container import save

    save(TensorFile({"a": torch.ones(2)}), tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pt")
    assert torch.equal(load(tmp_path / "a.pt").tensors["a"], torch.ones(2))


def test_tables_lists_texts_and_numbers(tmp_path: Path) -> None:
    table = {
        "string_to_param": {"*": torch.nn.Parameter(torch.ones(2, 3))},
        "string_to_token": {"*": 265},
        "name": "fox",
        "step": None,
        "list": [torch.zeros(1), torch.ones(1)],
    }
    torch.save(table, tmp_path / "a.pt")
    tensors, texts = load_pickle(tmp_path / "a.pt")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "string_to_param.*": (2, 3),
        "list[0]": (1,),
        "list[1]": (1,),
    }
    assert not tensors["string_to_param.*"].requires_grad
    assert texts == {"string_to_token.*": "265", "name": "fox", "step": "null"}
    torch.save([torch.zeros(1), torch.ones(1)], tmp_path / "b.pt")
    assert list(load_pickle(tmp_path / "b.pt")[0]) == ["[0]", "[1]"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", ["bare", "torch", "legacy"])
def test_a_program_is_not_run(wrap: str, protocol: int, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    if wrap == "bare":
        path.write_bytes(pickle.dumps(Payload(canary), protocol))
    else:
        torch.save(
            {"w": Payload(canary)},
            path,
            pickle_protocol=max(2, protocol),
            _use_new_zipfile_serialization=wrap == "torch",
        )
    start = time.process_time()
    with pytest.raises(FormatError) as caught:
        read(path, SHAPES)
    assert time.process_time() - start < 1 and len(str(caught.value)) < 500
    assert not canary.exists()


def test_a_view_of_a_large_storage_takes_its_own_size_and_an_expanded_one_is_no_bomb(tmp_path: Path) -> None:
    table = torch.zeros(1000, 768)
    torch.save({"<s1>": table[7]}, tmp_path / "view.bin")
    tensor = load(tmp_path / "view.bin").tensors["<s1>"]
    assert tensor.shape == (768,) and tensor.untyped_storage().nbytes() == 768 * 4
    torch.save({"a": torch.ones(1).expand(4, 4)}, tmp_path / "small.pt")
    assert load(tmp_path / "small.pt").tensors["a"].sum() == 16
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "bomb.pt")
    with pytest.raises(FormatError, match="its tensors claim many times that"):
        load(tmp_path / "bomb.pt")


def test_a_zip_that_unfolds_to_more_than_it_is_is_not_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(5 * 2**20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 2**17
    with pytest.raises(FormatError, match=r"would unfold to 2.* bytes. It was not opened"):
        load(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02}q\x00.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80\x02" + b"(" * 10**6,
        b"<html>",
        b"version https://git-lfs",
    ],
)
def test_damage_is_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        read(path, SHAPES)


def test_a_long_description_of_few_tensors_is_not_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "b" * 10**6: 1}, tmp_path / "a.pt")
    start = time.process_time()
    with pytest.raises(FormatError, match=r"describes 1 tensors in 1\d+ bytes"):
        load(tmp_path / "a.pt")
    assert time.process_time() - start < 1


def test_a_truncated_file_is_one_error(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    for length in range(1, len(content), 97):
        (tmp_path / "a.pt").write_bytes(content[:length])
        with pytest.raises(FormatError):
            load(tmp_path / "a.pt")


def test_what_is_no_tensor_in_it_is_refused_by_its_kind(tmp_path: Path) -> None:
    for number, value in enumerate(
        [{1, 2}, torch.ones(2).to_sparse(), torch.empty(0), {(1, 2): torch.ones(1)}]
    ):
        torch.save({"w": value, "a": torch.ones(1)}, tmp_path / f"{number}.pt")
        with pytest.raises(FormatError, match=r"no tensor|sparse|empty|called by a tuple|more than tensors"):
            load(tmp_path / f"{number}.pt")
    nested: Any = torch.ones(1)
    for _ in range(12):
        nested = {"a": nested}
    torch.save(nested, tmp_path / "deep.pt")
    with pytest.raises(FormatError, match="more than 8 deep"):
        load(tmp_path / "deep.pt")


def test_a_safetensors_header_is_no_pickle() -> None:
    assert not is_pickle((640).to_bytes(8, "little")) and not is_pickle((19280).to_bytes(8, "little"))
    assert is_pickle(b"PK\x03\x04....") and is_pickle(pickle.dumps({}, 4)[:8])


def test_weights_under_the_word_state_dict_are_found(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a.b": torch.ones(2)}, "epoch": 3}, tmp_path / "a.ckpt")
    assert load_pickle(tmp_path / "a.ckpt")[0].keys() == {"a.b"}
    assert load_pickle(tmp_path / "a.ckpt")[1] == {"epoch": "3"}
