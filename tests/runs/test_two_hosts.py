"""Two hosts: two network namespaces with a cable between them, each with a name, processes and folders of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_processes import ROOT, environment, made, once, same, settings
from tests.runs.worlds import write_world

ADDRESSES = ("10.77.7.1", "10.77.7.2")
NAMES = tuple(f"scumble-{os.getpid()}-{number}" for number in (0, 1))
CABLE = tuple(f"sc{os.getpid() % 100000}-{number}" for number in (0, 1))

pytestmark = [pytest.mark.slow, pytest.mark.thorough]


def sh(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Two namespaces, joined by a pair of virtual network cards."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("ip (iproute2) or unshare (util-linux) is not installed")
    try:
        for name in NAMES:
            sh("ip", "netns", "add", name)
        sh("ip", "link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1])
        for name, card, address in zip(NAMES, CABLE, ADDRESSES, strict=True):
            sh("ip", "link", "set", card, "netns", name)
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", card)
            sh("ip", "-n", name, "link", "set", card, "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")
        sh("ip", "netns", "exec", NAMES[0], "unshare", "--uts", "--pid", "--fork", "true")
    except OSError as error:
        remove()
        pytest.skip(f"network namespaces are not permitted here: {error}")
    try:
        yield
    finally:
        remove()


def remove() -> None:
    for name in NAMES:
        with suppress(OSError):
            sh("ip", "netns", "del", name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def started(folder: Path, told: dict[str, Any], *words: str) -> list[subprocess.Popen[str]]:
    """counting.py in one process on each host, as a person starts it on both."""
    folder.mkdir(exist_ok=True)
    return [
        subprocess.Popen(
            [
                *(
                    "ip",
                    "netns",
                    "exec",
                    name,
                    "unshare",
                    "--uts",
                    "--pid",
                    "--fork",
                    "--kill-child",
                    "sh",
                    "-c",
                ),
                *(f'hostname {name}; exec "$@"', "sh", sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1"),
                *(f"--master-addr={ADDRESSES[0]}", "--master-port=29577"),
                *(str(ROOT / "tests/runs/counting.py"), str(folder), json.dumps(told), *words),
            ],
            env=environment(GLOO_SOCKET_IFNAME=CABLE[number]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, name in enumerate(NAMES)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each host printed."""
    try:
        return [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # and with unshare, all that it started


def run(folder: Path, told: dict[str, Any], *words: str) -> list[dict[str, list[str]]]:
    processes = started(folder, told, *words)
    printed = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(
        text[-3000:] for text in printed
    )
    return [json.loads((folder / f"counts-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.usefixtures("hosts")
def test_with_folders_of_their_own_and_with_a_shared_one_they_train_the_same(
    world: Path, tmp_path: Path
) -> None:
    apart, shared = tmp_path / "apart", tmp_path / "shared"
    once(run(apart, settings(world), "apart"))
    assert not (apart / "run-1").exists()
    counts = run(shared, settings(world, cache="shared"))
    once(counts)
    same(apart / "run-0", shared / "run")
    # on with the checkpoint that lies on the first host alone
    shutil.rmtree(apart / "run-0/checkpoint-000004")
    (apart / "run-0/pytorch_lora_weights.safetensors").unlink()
    assert not made(run(apart, settings(world), "apart", "resume"), "pictures")
    same(apart / "run-0", shared / "run")


@pytest.mark.usefixtures("hosts")
def test_a_pulled_cable_ends_both_and_each_names_the_other(world: Path, tmp_path: Path) -> None:
    told = settings(world)
    told["train"] |= {
        "steps": 5000,
        "process_timeout": 8,
        "preview_every": 0,
        "held_out_every": 0,
        "log_every": 1,
    }
    told["preview"] = {}
    processes = started(tmp_path, told, "apart")
    events = tmp_path / "run-0/events.jsonl"
    until = time.monotonic() + 300
    while not (events.exists() and events.read_text().count("StepDone") > 4):
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.5)
    sh("ip", "-n", NAMES[1], "link", "set", CABLE[1], "down")
    pulled = time.monotonic()
    try:
        printed = ended(processes)
    finally:
        sh("ip", "-n", NAMES[1], "link", "set", CABLE[1], "up")
    assert time.monotonic() - pulled < 90
    assert "has given no sign of life for 8 s" in printed[0] and f"on {NAMES[1]}" in printed[0], printed[0]
    assert "process 0 (" in printed[1] and "can't be reached" in printed[1], printed[1]
    assert list((tmp_path / "run-0").glob("checkpoint-*"))
