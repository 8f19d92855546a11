"""The garbage collector is out of the way, and comes back."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from scumble.collector import no_collection, start_up, started


def test_the_collector_is_as_it_was_whatever_happens() -> None:
    assert gc.isenabled()
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()  # an inner one must not switch it on for the outer
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), no_collection():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_a_process_that_is_also_somebody_elses_is_left_alone() -> None:
    frozen = gc.get_freeze_count()
    with start_up(alone=False):
        assert gc.isenabled()
        started()
        assert gc.get_freeze_count() == frozen
    assert gc.isenabled()


@pytest.mark.parametrize("told", [True, False])
def test_a_start_ends_when_it_is_told_and_at_the_latest_with_its_block(told: bool) -> None:
    frozen = gc.get_freeze_count()
    try:
        with start_up():
            assert not gc.isenabled()
            if told:
                started()
                assert gc.isenabled() and gc.get_freeze_count() > frozen
                gc.disable()  # what somebody does later is theirs
                started()
                assert not gc.isenabled()
                gc.enable()
        assert gc.isenabled()
    finally:
        gc.unfreeze()
    started()
    assert gc.get_freeze_count() == 0, "nothing is frozen outside of a start"


@pytest.mark.parametrize(("command", "off"), [("generate", True), ("inspect", False)])
def test_only_commands_that_load_a_base_start_so(command: str, off: bool) -> None:
    script = """
import gc, sys, typer
import scumble.cli.main as cli
seen = typer.Typer()
cli.load_command = lambda name: typer.main.get_command(seen)
@seen.command()
def one(): print("collects", gc.isenabled())
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script, command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"collects {not off}"


def test_a_loaded_base_ends_the_start() -> None:
    script = """
import gc
from scumble.collector import start_up
with start_up():
    from scumble import load_base
    base = load_base("picturebook")
    print("collects", gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "collects True True"
