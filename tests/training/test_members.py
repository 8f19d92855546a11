"""What members know of each other, and how an end is said."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from scumble.errors import ConfigError, DataError, ProcessLost, to_be_printed
from scumble.training.members import End, Member

ME = Member.here(0)
posix = pytest.mark.skipif(os.name == "nt", reason="there signal 0 is a real one")


def other(pid: int) -> Member:
    return replace(ME, rank=1, pid=pid)


@posix
def test_a_neighbour_that_ended_is_gone_also_before_its_launcher_looked() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not other(child.pid).gone(ME) and not ME.gone(ME)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie from here on
    assert other(child.pid).gone(ME)
    child.communicate()
    assert other(child.pid).gone(ME)
    elsewhere = replace(other(child.pid), node="another machine")
    assert not elsewhere.gone(ME), "a pid means nothing there"


def test_an_end_is_said_of_one_and_of_several() -> None:
    one, two = replace(ME, rank=1, pid=11, host="a"), replace(ME, rank=3, pid=33, host="b")
    assert End.of([one], "is gone: killed").text == "process 1 (pid 11 on a) is gone: killed"
    both = End.of([one, two], "has given no sign")
    assert both.text == "process 1 (pid 11 on a) and process 3 (pid 33 on b) have given no sign"
    assert End.of([one, two], "can't be reached").text.endswith("(pid 33 on b) can't be reached")
    assert both.ranks == (1, 3) and not both.itself
    assert End.read(both.written().encode()) == both


def test_of_several_on_a_machine_the_first_says_what_is_wrong_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong, found, lost = ConfigError("steps"), DataError("fox.png"), ProcessLost("process 1")
    assert all(map(to_be_printed, (wrong, found, lost)))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [to_be_printed(error) for error in (wrong, found, lost)] == [False, True, True]
    wrong.silent, found.silent = False, True
    assert to_be_printed(wrong) and not to_be_printed(found), "what was found out decides"
