"""Seal: a changed byte is found, equal adapters stay equal bytes, and a signature is its key's alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.adapters.state import AdapterState, Metadata
from scumble.errors import ConfigError, FormatError
from scumble.formats import read, write
from scumble.formats.container import TensorFile, load, save, to_bytes
from scumble.formats.metadata import SEAL, SIGNATURE
from scumble.formats.seal import check, public_key, sealed, sign
from tests.formats.adapters_of import adapter

SAID = Metadata(base_name="picturebook", settings='{"rank": 4}', extra={"title": "füchse"})


def small() -> AdapterState:
    full = adapter()
    path = next(iter(full.layers))
    return AdapterState({path: full.layers[path]}, metadata=SAID)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(small(), tmp_path / "fox.safetensors")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    folder = tmp_path_factory.mktemp("keys")
    forms = {"key": serialization.PrivateFormat.OpenSSH, "key.pem": serialization.PrivateFormat.PKCS8}
    for name, form in forms.items():
        content = private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        (folder / name).write_bytes(content)
    public = private.public_key()
    (folder / "key.pub").write_bytes(
        public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        + b" me@here\n"
    )
    (folder / "public.pem").write_bytes(
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return folder / "key"


def test_what_was_written_is_intact(file: Path) -> None:
    found = check(file)
    assert found.intact and found.sealed and (found.signer, found.signature) == ("", None)
    assert check(file.parent).tensors_sha256 == found.tensors_sha256


def test_equal_adapters_are_equal_bytes_and_the_seal_is_no_part_of_them(file: Path, tmp_path: Path) -> None:
    assert write(small(), tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    state = read(file).state
    assert state.metadata == SAID, "neither seal nor signature are the adapter's"
    assert write(state, tmp_path / "copy.safetensors").read_bytes() == file.read_bytes()


def test_equal_weights_have_one_hash_whatever_else_is_said(file: Path, tmp_path: Path) -> None:
    other = write(AdapterState(small().layers), tmp_path / "other.safetensors")
    assert check(other).tensors_sha256 == check(file).tensors_sha256
    assert other.read_bytes() != file.read_bytes()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(small(), tmp_path_factory.mktemp("written") / "fox.safetensors").read_bytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_changed_byte_is_found(
    data: st.DataObject, written: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content, file = bytearray(written), tmp_path_factory.getbasetemp() / "changed.safetensors"
    header = 8 + int.from_bytes(written[:8], "little")
    ends = (0, header - 1) if data.draw(st.booleans()) else (header, len(content) - 1)
    place = data.draw(st.integers(*ends))
    content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        found = check(file)
    except FormatError:
        return
    assert not found.intact, f"byte {place}"


def test_what_was_changed_is_named(file: Path) -> None:
    whole = load(file)
    name = next(iter(whole.tensors))
    moved = {**whole.tensors, name: whole.tensors[name] + 1}
    save(TensorFile(moved, whole.metadata), file)
    found = check(file)
    assert (found.tensors, found.metadata, found.layout, found.intact) == (False, True, True, False)
    save(TensorFile(whole.tensors, {**whole.metadata, "scumble.base_name": "other"}), file)
    found = check(file)
    assert (found.tensors, found.metadata, found.intact) == (True, False, False)
    content = to_bytes(whole)
    file.write_bytes(_respaced(content))
    found = check(file)
    assert (found.tensors, found.metadata, found.layout, found.intact) == (True, True, False, False)


def _respaced(content: bytes) -> bytes:
    """The same header with one space more between its entries."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip(b" ").replace(b":{", b": {", 1)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def test_a_file_without_a_seal_reads_and_says_nothing_of_itself(tmp_path: Path) -> None:
    tensors = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(3, 2)}
    save(TensorFile(tensors, {"format": "pt"}), tmp_path / "old.safetensors")
    found = check(tmp_path / "old.safetensors")
    assert not found.sealed and not found.intact and (found.tensors, found.metadata) == (None, None)
    assert read(tmp_path / "old.safetensors").state.layers


def test_a_signature_is_checked_and_leaves_the_adapter_as_it_is(file: Path, key: Path) -> None:
    before = read(file).state
    signer = sign(file, key)
    assert signer == public_key(str(key.with_name("key.pub"))) and signer.startswith("ssh-ed25519 AAAA")
    found = check(file)
    assert found.intact and found.signature is True and found.signer == signer
    after = read(file).state
    assert after.equal(before) and after.metadata == before.metadata
    once = file.read_bytes()
    sign(file, key.with_name("key.pem"))
    assert file.read_bytes() == once, "the same key signs the same content alike, in whatever form it is kept"


@pytest.mark.parametrize("name", ["key", "key.pem", "key.pub", "public.pem"])
def test_a_public_key_is_read_from_every_form(key: Path, name: str) -> None:
    found = public_key(str(key.with_name(name)))
    assert found == " ".join(key.with_name("key.pub").read_text().split()[:2])
    assert public_key(found) == found


def test_a_changed_file_breaks_its_signature_and_is_not_signed_again(file: Path, key: Path) -> None:
    sign(file, key)
    whole = load(file)
    changed = {**whole.metadata, "scumble.base_name": "other"}
    save(TensorFile(whole.tensors, changed), file)
    assert not check(file).intact
    with pytest.raises(FormatError, match="not what was written"):
        sign(file, key)
    # a forged seal over the changed content fits the content, and not the signature
    forged = sealed(TensorFile(whole.tensors, changed))
    save(TensorFile(whole.tensors, {**forged.metadata, SIGNATURE: whole.metadata[SIGNATURE]}), file)
    found = check(file)
    assert (found.tensors, found.metadata, found.signature, found.intact) == (True, True, False, False)
    save(TensorFile(whole.tensors, {**forged.metadata, SIGNATURE: '{"key": "*", "signature": ""}'}), file)
    assert check(file).signature is False and not check(file).intact


def test_a_seal_that_is_no_table_fits_nothing(file: Path) -> None:
    whole = load(file)
    save(TensorFile(whole.tensors, {**whole.metadata, SEAL: "["}), file)
    assert check(file).sealed and not check(file).intact


def test_what_can_not_sign_is_told(file: Path, key: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    with pytest.raises(ConfigError, match=r"can't be read.*ssh-keygen -t ed25519"):
        sign(file, tmp_path / "none")
    (tmp_path / "junk").write_text("no key")
    with pytest.raises(ConfigError, match="can't sign"):
        sign(file, tmp_path / "junk")
    with pytest.raises(ConfigError, match="no public key"):
        public_key(str(tmp_path / "junk"))
    locked = load_pem_private_key(key.with_name("key.pem").read_bytes(), None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    (tmp_path / "locked").write_bytes(locked)
    with pytest.raises(ConfigError, match="passphrase"):
        sign(file, tmp_path / "locked")


def test_without_the_package_hashes_are_checked_and_the_rest_is_told(
    file: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    signer = sign(file, key)
    for name in list(sys.modules):
        if name.partition(".")[0] == "cryptography":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    found = check(file)
    assert found.intact and found.signature is None and found.signer == signer
    assert "pip install 'scumble[sign]'" in found.note
    with pytest.raises(ConfigError, match=r"pip install 'scumble\[sign\]'"):
        sign(file, key)


def test_a_pickle_and_an_adapter_in_parts_have_no_seal(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    with pytest.raises(FormatError, match=r"pickle.*scumble convert"):
        check(tmp_path / "x.bin")
