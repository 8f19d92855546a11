"""Imports point down, every module is reachable, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "scumble"

#: room -> rooms that it may import. What is not listed here is forbidden.
BELOW_ALL = {"collector", "errors", "lazy", "registry", "rng", "settings", "tensor_files"}
MAY_IMPORT: dict[str, set[str]] = {
    **{room: {"errors"} for room in BELOW_ALL},
    "adapters": set(),
    "models": {"adapters"},
    "formats": {"adapters"},
    "data": {"adapters", "models"},
    "inference": {"adapters", "models", "formats"},
    "training": {"adapters", "models", "formats", "data"},
    "methods": {"adapters", "models", "formats", "data", "training"},
    "picturebook": {"models"},
    "runs": {"adapters", "models", "formats", "data", "inference", "training", "methods", "picturebook"},
    "evaluation": {
        "adapters",
        "models",
        "formats",
        "data",
        "inference",
        "training",
        "methods",
        "picturebook",
        "runs",
    },
    "cli": {
        "adapters",
        "models",
        "formats",
        "data",
        "inference",
        "training",
        "methods",
        "picturebook",
        "runs",
        "evaluation",
    },
}
#: single modules that may do what their room may not
EXCEPTIONS: dict[str, set[str]] = {
    "training/preview.py": {"inference"},  # pictures are drawn through the public inference path
    "models/loading.py": {"picturebook"},  # "picturebook" is a source like a Hub id
}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Every scumble module that a file imports, anywhere in it, as dotted names without `scumble.`"""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] == "scumble"
        ):
            inside = (node.module or "").split(".")[1:]
            names |= {".".join(inside)} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".", 1)[1] for a in node.names if a.name.startswith("scumble.")}
    return names


@pytest.mark.parametrize("file", modules(), ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_down(file: Path) -> None:
    relative = file.relative_to(SOURCE)
    room = relative.parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    allowed = MAY_IMPORT[room] | BELOW_ALL | {room} | EXCEPTIONS.get(str(relative), set())
    forbidden = {
        name for name in imported(file) if name and name.split(".")[0] not in allowed | {"__version__"}
    }
    assert not forbidden, f"{relative} imports {sorted(forbidden)}; {room} may import {sorted(allowed)}"


def test_every_room_is_in_the_table() -> None:
    rooms = {f.relative_to(SOURCE).parts[0].removesuffix(".py") for f in modules()} - {"__init__", "__main__"}
    assert rooms == set(MAY_IMPORT)


def test_every_module_is_reachable() -> None:
    """A module that nothing imports and no registry names is dead."""
    text = {file: file.read_text() for file in modules()}
    for file in modules():
        relative = file.relative_to(SOURCE).with_suffix("")
        if relative.name in ("__init__", "__main__"):
            continue
        dotted = "scumble." + ".".join(relative.parts)
        parent, name = dotted.rsplit(".", 1)
        mentioned = any(
            dotted in body or (f"from {parent} import" in body and name in body)
            for other, body in text.items()
            if other != file
        )
        assert mentioned, f"nothing mentions {dotted}"


def test_no_base_and_no_method_is_known_by_its_name() -> None:
    """What differs between them is said by the interface, or is a row in a table: a new one needs no `if`."""
    from scumble.methods.method import METHODS
    from scumble.models import FAMILIES

    names, found = {*FAMILIES, *METHODS}, []
    for file in modules():
        for node in ast.walk(ast.parse(file.read_text())):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            sides += [node.value] if isinstance(node, ast.MatchValue) else []
            for constant in (part for side in sides for part in (side, *getattr(side, "elts", ()))):
                if isinstance(constant, ast.Constant) and constant.value in names:
                    found.append(f"{file.relative_to(SOURCE)}:{constant.lineno} {constant.value!r}")
    assert not found, "compares the name of a base family or a method: " + ", ".join(found)


def test_no_two_modules_import_each_other_at_the_top() -> None:
    edges: dict[str, set[str]] = {}
    for file in modules():
        relative = file.relative_to(SOURCE).with_suffix("")
        name = ".".join(relative.parts).removesuffix(".__init__")
        top = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ImportFrom)]
        edges[name] = {
            (n.module or "")[len("scumble.") :] for n in top if (n.module or "").startswith("scumble.")
        }
    pairs = {
        tuple(sorted((a, b))) for a, targets in edges.items() for b in targets if a in edges.get(b, set())
    }
    assert not pairs


@pytest.mark.parametrize("command", ["import scumble", "from scumble.cli.main import main; main(['--help'])"])
def test_torch_is_not_imported_for_help(command: str) -> None:
    code = (
        "import sys\n"
        f"try:\n    {command}\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_files_say_what_they_are() -> None:
    """The first line of each module is a sentence that says its one idea."""
    for file in modules():
        documentation = ast.get_docstring(ast.parse(file.read_text()))
        if file.name == "__init__.py" and not file.read_text().strip():
            continue
        assert documentation and len(documentation.splitlines()[0]) > 15, f"{file} has no docstring"
