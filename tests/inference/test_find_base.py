"""Finding: the base that an adapter was made for, from the file, its card, or the Hub."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from scumble.errors import FormatError, HubError, ModelError
from scumble.inference.find_base import card_bases, find_base, locate
from tests.inference.makers import adapter_file
from tests.runs.hub_server import TOKEN, Hub, running


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An adapter that does not say its base."""
    return adapter_file(tmp_path_factory.mktemp("silent") / "x.safetensors").read_bytes()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def write(folder: Path, silent: bytes, card: str | None = None, name: str = "x.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(silent)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder / name


def test_our_metadata_comes_first(no_network: None, tmp_path: Path) -> None:
    path = adapter_file(tmp_path / "x.safetensors", base_name="picturebook")
    (tmp_path / "README.md").write_text("---\nbase_model: somebody/else\n---\n")
    assert find_base(path) == "picturebook"
    assert find_base(tmp_path) == "picturebook"


@pytest.mark.parametrize(
    "matter",
    [
        "base_model: owner/name",
        "license: mit\nbase_model:\n- owner/name\ntags:\n- lora",
        '\ufeffbase_model: "owner/name"',
    ],
)
def test_else_the_card_beside_the_file(no_network: None, tmp_path: Path, silent: bytes, matter: str) -> None:
    mark = "\ufeff" if matter.startswith("\ufeff") else ""
    text = matter.removeprefix("\ufeff")
    path = write(tmp_path, silent, f"{mark}---\n{text}\n---\n# A fox\n")
    assert find_base(path) == "owner/name"


@pytest.mark.parametrize(
    "card", [None, "# no front matter", "---\nlicense: mit\n---\n", "---\nnever closed: yes\n", ""]
)
def test_a_silent_adapter_says_how_to_name_a_base(tmp_path: Path, silent: bytes, card: str | None) -> None:
    path = write(tmp_path, silent, card)
    with pytest.raises(
        ModelError, match=r"does not say which base.*diffusers.*--base.*Session\(base=\.\.\.\)"
    ):
        find_base(path)


def test_a_silent_adapter_says_what_its_shapes_betray(tmp_path: Path) -> None:
    from scumble.formats import write as write_adapter
    from tests.formats.adapters_of import ATTENTION, adapter

    file = write_adapter(adapter(ATTENTION), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"By its shapes it is for SD 1\.x\. Name the base with --base"):
        find_base(file)


def test_several_bases_are_listed_and_bad_yaml_is_named(tmp_path: Path, silent: bytes) -> None:
    path = write(tmp_path, silent, "---\nbase_model: [a/one, b/two]\n---\n")
    with pytest.raises(ModelError, match="names 2 bases: a/one, b/two"):
        find_base(path)
    path = write(tmp_path, silent, "---\nbase_model: [a/one\n---\n")
    with pytest.raises(ModelError, match="not valid YAML"):
        find_base(path)
    assert (
        card_bases(write(tmp_path / "y", silent, "---\nbase_model: {a: b}\n---\n").with_name("README.md"))
        == ()
    )


def test_what_is_not_there(no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gone.safetensors", "a/b/c", str(tmp_path / "gone")):
        with pytest.raises(FormatError, match="There is no adapter"):
            locate(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FormatError, match="There is no adapter 'runs/fox'"):
        locate("runs/fox")


def test_on_the_hub_the_repositorys_card_tells(hub: Hub, silent: bytes) -> None:
    card = b"---\nbase_model: owner/base\n---\n"
    hub.repos["painter/fox"] = {
        "pytorch_lora_weights.safetensors": silent,
        "README.md": card,
        "other.safetensors": b"x",
    }
    assert find_base("painter/fox") == "owner/base"
    assert locate(Path("painter/fox")).read_bytes() == silent


def test_on_the_hub_the_only_weights_file_is_taken(hub: Hub, silent: bytes) -> None:
    hub.repos["painter/fox"] = {"fox.safetensors": silent}
    assert locate("painter/fox").name == "fox.safetensors"
    with pytest.raises(ModelError, match=r"README\.md on the Hub has no base_model"):
        find_base("painter/fox")
    hub.repos["painter/words"] = {"fox.safetensors": silent, "learned_embeds.safetensors": b"x"}
    assert locate("painter/words").name == "fox.safetensors", "the words lie beside the LoRA"
    hub.repos["painter/many"] = {"a.safetensors": silent, "b.safetensors": silent}
    with pytest.raises(FormatError, match=r"holds 2 \.safetensors files \(a\.safetensors, b\.safetensors\)"):
        locate("painter/many")


def test_on_the_hub_a_missing_repository_is_told(hub: Hub) -> None:
    with pytest.raises(HubError, match="painter/gone"):
        locate("painter/gone")
