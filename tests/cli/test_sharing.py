"""`scumble sign`, `verify` and `reproduce` on the command line: what is printed, and the exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble.cli.main import main
from scumble.formats.container import TensorFile, load, save
from tests.inference.makers import adapter_file


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return adapter_file(tmp_path / "fox.safetensors")


def make_key(path: Path, number: int) -> Path:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path.write_bytes(
        Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


def test_a_file_is_verified_with_and_without_a_signature(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = make_key(tmp_path / "mine.pem", 1), make_key(tmp_path / "other.pem", 2)
    code, out, _ = run(capsys, "verify", file)
    assert code == 0 and "signature none" in out and "This is what was written." in out
    code, out, _ = run(capsys, "verify", file, "--key", mine)
    assert code == 1 and "NOT signed by the key" in out
    code, out, err = run(capsys, "sign", file, "--key", mine)
    assert code == 0 and "Signed by ssh-ed25519 " in out and "scumble verify" in err
    signer = out.removeprefix("Signed by ").strip()
    for key in (mine, signer):
        code, out, _ = run(capsys, "verify", file, "--key", key)
        assert code == 0 and f"good, by {signer}" in out and "signed by the key that was given" in out
    code, out, _ = run(capsys, "verify", file, "--key", other)
    assert code == 1 and "NOT signed by the key" in out and "Not trusted." in out
    code, out, err = run(capsys, "convert", file, "--to", "kohya")
    assert code == 0 and "The signature of fox.safetensors speaks of that file alone" in err
    code, out, err = run(capsys, "convert", out.strip(), "--to", "diffusers")
    assert code == 0 and "signature" not in err


def test_a_changed_file_and_one_without_a_seal_fail(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, _ = run(capsys, "verify", file)
    assert code == 1 and "tensors   CHANGED" in out and "metadata  as written" in out
    save(TensorFile(load(file).tensors, {"format": "pt"}), file)
    code, out, _ = run(capsys, "verify", file)
    assert code == 1 and "no seal" in out and "nothing can be said" in out
    code, _, err = run(capsys, "reproduce", file)
    assert code == 2 and "does not say how it was made" in err
    code, _, err = run(capsys, "sign", file, "--key", file.with_name("none"))
    assert code == 2 and "ssh-keygen" in err
