"""Streams: equal names give equal numbers, in any process and in any order."""

from __future__ import annotations

import subprocess
import sys

import torch

from scumble.rng import Streams


def test_equal_names_give_equal_numbers_in_another_process() -> None:
    code = "from scumble.rng import Streams; print(Streams(7).number('noise', 3, 1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == Streams(7).number("noise", 3, 1)


def test_every_part_of_the_name_counts() -> None:
    names = [(7, "noise", 3), (8, "noise", 3), (7, "crop", 3), (7, "noise", 4), (7, "noise", 3, 0)]
    numbers = {Streams(seed).number(purpose, *position) for seed, purpose, *position in names}
    assert len(numbers) == len(names)


def test_rows_do_not_depend_on_their_batch() -> None:
    streams = Streams(0)
    whole = streams.normal("noise", range(8), (4, 2, 2))
    halves = torch.cat(
        [streams.normal("noise", range(4), (4, 2, 2)), streams.normal("noise", range(4, 8), (4, 2, 2))]
    )
    assert torch.equal(whole, halves)
    assert torch.equal(streams.uniform("t", [5]), streams.uniform("t", [4, 5, 6])[1:2])


def test_the_global_generators_are_not_touched() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Streams(0).normal("noise", range(3), (2,))
    assert torch.equal(torch.rand(3), expected)


def test_numbers_are_distributed_as_they_should_be() -> None:
    normal = Streams(3).normal("noise", range(400), (25,))
    uniform = Streams(3).uniform("t", range(4000))
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
