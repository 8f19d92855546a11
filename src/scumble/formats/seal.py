"""Seal: the hashes that a file carries of its own content, and an ed25519 signature over them.

`write` seals every file: the header entry `scumble.seal` holds sha256 of the tensors and of the other header
entries, with peft's configuration beside the file. Both are functions of the content alone, so equal adapters
stay equal bytes, and a file without the entry reads as before. `scumble.signature` says who vouches for the
seal. Neither belongs to the adapter: a file that is read and written again gets a new seal and no signature.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scumble.errors import ConfigError, FormatError
from scumble.formats.container import PICKLES, TensorFile, files_of, find, load, read_header, save, to_bytes
from scumble.formats.metadata import SEAL, SIGNATURE, compact, parse_table
from scumble.formats.stored import bytes_of, dtype_name

_SIGNED = b"scumble adapter signature 1\n"
"""Stands before what is signed, so that no signature made for another purpose fits."""
_KIND = b"ssh-ed25519"


@dataclass(frozen=True)
class Verdict:
    """Whether a file is what was written. None where it can't be told."""

    path: Path
    tensors_sha256: str
    """Of the tensors' names, dtypes, shapes and bytes: the same in two files with equal weights."""
    tensors: bool | None
    """Whether the tensors are those that were sealed."""
    metadata: bool | None
    """Whether the header entries are those that were sealed."""
    layout: bool | None
    """Whether the file is byte for byte as our writer puts this content."""
    signer: str = ""
    """The public key in OpenSSH's form, "ssh-ed25519 AAAA..."; empty for a file without signature."""
    signature: bool | None = None
    """Whether the signature is that key's, over this seal."""
    note: str = ""
    """Why something could not be told."""

    @property
    def sealed(self) -> bool:
        """Whether the file carries a seal at all."""
        return self.tensors is not None

    @property
    def intact(self) -> bool:
        """Sealed, and nothing in it has changed."""
        return self.sealed and all((self.tensors, self.metadata, self.layout)) and self.signature is not False


def sealed(file: TensorFile) -> TensorFile:
    """`file` with a fresh seal, and without a signature, which an older content may have had."""
    kept = {name: text for name, text in file.metadata.items() if name not in (SEAL, SIGNATURE)}
    return replace(file, metadata={**kept, SEAL: compact(_hashes(file))})


def check(path: str | Path) -> Verdict:
    """Read the file at `path` whole and compare it with its seal; check its signature where there is one.

    Raises:
        FormatError: it is no sound safetensors file, which a changed byte in its header may cause; or it is a
            pickle, or an adapter in several files.
    """
    where = _one_file(path)
    file = load(where, stored=True)
    now = _hashes(file)
    if SEAL not in file.metadata:
        return Verdict(where, now["tensors"], None, None, None, note="It carries no seal.")
    said = _table(file.metadata[SEAL])
    verdict = Verdict(
        where,
        now["tensors"],
        said.get("tensors") == now["tensors"],
        said.get("metadata") == now["metadata"],
        # hashes say nothing of spaces and order in the header
        where.read_bytes() == to_bytes(file),
    )
    if SIGNATURE not in file.metadata:
        return verdict
    signature = _table(file.metadata[SIGNATURE])
    try:
        raw = base64.b64decode(str(signature.get("key", "")), validate=True)
        proof = base64.b64decode(str(signature.get("signature", "")), validate=True)
    except binascii.Error:
        return replace(verdict, signature=False, note="Its signature is malformed.")
    verdict = replace(verdict, signer=_openssh(raw))
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        return replace(verdict, note="Its signature was not checked. To do so: pip install 'scumble[sign]'")
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(proof, _SIGNED + file.metadata[SEAL].encode())
    except (InvalidSignature, ValueError):
        return replace(verdict, signature=False)
    return replace(verdict, signature=True)


def sign(path: str | Path, key: Path) -> str:
    """Seal and sign the file at `path` in place, in one atomic step; the signer's public key in OpenSSH's form.

    `key`: an ed25519 private key without passphrase, as `ssh-keygen -t ed25519` or openssl (PEM) write it.

    Raises:
        ConfigError: the package cryptography is missing, or `key` is no such key.
        FormatError: the file is damaged, or its content is not what its seal says: it is not signed then.
    """
    private = _private_key(key)
    where = _one_file(path)
    file = load(where, stored=True)
    if SEAL in file.metadata and _table(file.metadata[SEAL]) != _hashes(file):
        raise FormatError(
            f"{where.name} is not what was written: its content differs from its seal (scumble verify "
            f"{where}). It was not signed. Fetch or write the file again."
        )
    fresh = sealed(file)
    raw = private.public_key().public_bytes_raw()
    proof = private.sign(_SIGNED + fresh.metadata[SEAL].encode())
    entry = {
        "key": base64.b64encode(raw).decode("ascii"),
        "signature": base64.b64encode(proof).decode("ascii"),
    }
    save(replace(fresh, metadata={**fresh.metadata, SIGNATURE: compact(entry)}), where)
    return _openssh(raw)


def public_key(given: str) -> str:
    """The public key that `given` means, in OpenSSH's form: "ssh-ed25519 AAAA..." itself, or the file of a public
    or a private key.

    Raises:
        ConfigError: it is none, or the package cryptography is missing.
    """
    content = given.encode()
    if not given.startswith("ssh-"):
        content = _content(Path(given).expanduser())
        if b"PRIVATE KEY" in content:
            return _openssh(_private_key(Path(given).expanduser()).public_key().public_bytes_raw())
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    read: Any = serialization.load_pem_public_key
    if content.startswith(b"ssh-"):
        read = serialization.load_ssh_public_key
    try:
        found = read(content.strip())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{given[:80]} is no public key that can be read ({error}).") from error
    if not isinstance(found, Ed25519PublicKey):
        raise ConfigError(f"{given[:80]} is not an ed25519 key. {_MAKE.format(key='KEY')}")
    return _openssh(found.public_bytes_raw())


def signed(files: Iterable[Path]) -> bool:
    """Whether any of these files carries a signature, valid or not."""
    return any(SIGNATURE in read_header(file).metadata for file in files)


def _one_file(path: str | Path) -> Path:
    where = find(path)
    files = list(files_of(where).values())
    if len(files) > 1:
        raise FormatError(
            f"{where} is an adapter in {len(files)} files, each with a seal of its own. Name one of them: "
            f"{', '.join(map(str, files))}"
        )
    if where.suffix.lower() in PICKLES:
        raise FormatError(
            f"{where.name} is a pickle, which has no place for a seal. Write it as .safetensors first: scumble "
            f"convert {where} --to diffusers"
        )
    return where


_MAKE = "Make one with: ssh-keygen -t ed25519 -N '' -f {key}"


def _private_key(key: Path) -> Any:
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Path(key).expanduser()
    content = _content(key)
    openssh = b"OPENSSH PRIVATE KEY" in content
    read = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        found = read(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        locked = "encrypted" in str(error) or "password" in str(error).lower()
        why = "it has a passphrase; give a key without one" if locked else str(error)
        raise ConfigError(f"{key} can't sign: {why}. {_MAKE.format(key='KEY')}") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise ConfigError(f"{key} is not an ed25519 key. {_MAKE.format(key='KEY')}")
    return found


def _content(key: Path) -> bytes:
    try:
        return key.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The key {key} can't be read: {error.strerror or error}. {_MAKE.format(key=key)}"
        ) from error


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(
            "Signatures need the package cryptography: pip install 'scumble[sign]'. `scumble verify` without "
            "--key works without it."
        ) from None


def _openssh(raw: bytes) -> str:
    """A raw public key as OpenSSH writes it (RFC 4253, 6.6: each part after its length)."""
    blob = b"".join(len(part).to_bytes(4, "big") + part for part in (_KIND, raw))
    return f"{_KIND.decode()} {base64.b64encode(blob).decode('ascii')}"


def _hashes(file: TensorFile) -> dict[str, str]:
    """sha256 hex of the tensors, and of all header entries but seal and signature."""
    digest = hashlib.sha256()
    for name in sorted(file.tensors):
        tensor = file.tensors[name]
        digest.update(f"{len(name)} {name} {dtype_name(tensor)} {list(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    entries = {name: text for name, text in file.metadata.items() if name not in (SEAL, SIGNATURE)}
    entries |= {f"file {name}": text for name, text in file.beside.items()}  # peft's rank and alpha
    return {
        "tensors": digest.hexdigest(),
        "metadata": hashlib.sha256(compact(entries).encode()).hexdigest(),
    }


def _table(text: str) -> dict[str, Any]:
    """A JSON table; an empty one where a changed byte broke it, which then fits nothing."""
    try:
        return parse_table(text, SEAL)
    except FormatError:
        return {}
