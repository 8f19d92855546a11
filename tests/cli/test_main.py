"""The command line: help that costs nothing, one message for an error, the commands of the table."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scumble.cli.main import COMMANDS, load_command, main
from scumble.errors import ConfigError

HEAVY = ("torch", "diffusers", "transformers", "datasets", "accelerate", "numpy", "PIL", "huggingface_hub")

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.mark.parametrize(
    "code",
    [
        "import scumble; scumble.__version__; dir(scumble)",
        "from scumble.cli.main import main; main(['--help'])",
        "from scumble.cli.main import main; main(['train', '--help'])",
        "from scumble.cli.main import main; main(['config', '--help'])",
        "from scumble.cli.main import main; main(['--version'])",
    ],
)
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    program = f"""
import sys
try:
    {code}
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    """Half a second of processor time, so that a busy machine does not decide."""
    program = (
        "import time, resource, sys\n"
        "from scumble.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, file=sys.stderr)"
    )
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert float(done.stderr.split()[-1]) < 0.5, (
        f"{done.stderr} s of processor, {time.perf_counter() - begun:.1f} s"
    )


def test_help_lists_every_command_with_the_first_line_of_its_own_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(["--help"], capsys)
    assert code == 0
    for name, (_, line) in COMMANDS.items():
        assert f" {name} " in out and line in out
        assert (load_command(name).help or "").strip().splitlines()[0] == line, name


def test_a_mistyped_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["trian"], capsys)
    assert code == 2 and "Did you mean 'train'?" in err


def test_an_error_is_one_message_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(["config", "check", "/no/such/[red]file.toml"], capsys)
    assert (code, out) == (ConfigError.exit_code, "")
    assert err == (
        "error: There is no settings file /no/such/[red]file.toml. "
        "Write one with: scumble config new > /no/such/[red]file.toml\n"
    )


@pytest.mark.parametrize(
    "arguments", [["--debug", "config", "check", "/no"], ["config", "check", "/no", "--debug"]]
)
def test_debug_shows_where_an_error_comes_from(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        main(arguments)


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from scumble.runs import load

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(load, "load", broken)
    with pytest.raises(ZeroDivisionError):
        main(["config", "check", "x"])


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    import scumble

    assert run(["--version"], capsys)[:2] == (0, f"scumble {scumble.__version__}\n")


def test_an_error_shows_what_a_terminal_would_obey_and_does_not_send_it() -> None:
    assert str(ConfigError("one: \x1b[31m\nanother: \x9b")) == "one: \\x1b[31m\nanother: \\x9b"
