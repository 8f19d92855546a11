"""What several processes cost a step: bytes and time of the gradients' all-reduce, beside step and formula.

    python benchmarks/distributed.py                      # 2 and 4 processes of this machine, gloo
    python benchmarks/distributed.py --links 100mbit 1gbit  # and two network namespaces with such a cable (root)

Each process trains rank 4 on the attention layers of the embedded base's UNet under DistributedDataParallel; steps with
and without the exchange of gradients take turns, and what is compared are ratios within a turn. Bytes are counted where
DDP hands them to the network. A vector as long as SD 1.5's gradients at rank 4 is reduced alone, too. On one machine
the processes share its cores, so that their seconds say little of a network; over a cable of known speed the formula is
checked. Writes benchmarks/results/distributed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import machine

RESULTS = Path(__file__).parent / "results"
SD15_RANK_4 = 797_184
"""Numbers in a LoRA of rank 4 on the attention layers of SD 1.5's UNet."""
WARM_UP = 3
ADDRESSES = ("10.77.8.1", "10.77.8.2")


def ring_seconds(size: int, processes: int, bytes_a_second: float) -> float:
    """Time on the wire of a ring all-reduce of `size` bytes, latency left out: each process sends 2 (n - 1) / n of them
    (Patarasuk & Yuan, 2009)."""
    return 2 * (processes - 1) / processes * size / bytes_a_second


def main() -> None:
    options = parsed()
    if options.child:
        child(options)
        return
    rows = [on_this_machine(number, options) for number in options.processes]
    links = [over(link, options) for link in options.links]
    result = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "turns": options.turns,
        "on this machine": rows,
        "over a cable": links,
    }
    path = RESULTS / "distributed.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--links", nargs="*", default=[], help="rates as tc writes them: 100mbit, 1gbit")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--child", type=Path, help="(the processes themselves) where the first writes")
    parser.add_argument(
        "--bare", action="store_true", help="(the processes themselves) no step, the vector alone"
    )
    return parser.parse_args()


def on_this_machine(processes: int, options: argparse.Namespace) -> dict[str, Any]:
    return launched(["--standalone", f"--nproc-per-node={processes}"], options, [], {})[0]


def over(link: str, options: argparse.Namespace) -> dict[str, Any]:
    """Two namespaces whose cable has this rate; needs to be root."""
    names, cards = ("scumble-bench-0", "scumble-bench-1"), ("scbench0", "scbench1")
    try:
        for name in names:
            sh("ip", "netns", "add", name)
        sh("ip", "link", "add", cards[0], "type", "veth", "peer", "name", cards[1])
        for name, card, address in zip(names, cards, ADDRESSES, strict=True):
            sh("ip", "link", "set", card, "netns", name)
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", card)
            sh("ip", "-n", name, "link", "set", card, "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")
            shaped = ("dev", card, "root", "tbf", "rate", link, "burst", "256kb", "latency", "400ms")
            sh("tc", "-n", name, "qdisc", "add", *shaped)
        started = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={ADDRESSES[0]}", "--master-port=29578"]
        found = launched(started, options, ["--bare"], dict(zip(names, cards, strict=True)))[0]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
    rate = {"m": 1e6, "g": 1e9}[link[-4]] * float(link[:-4]) / 8
    formula = 1e3 * ring_seconds(found["vector_bytes"], 2, rate)
    return {"link": link, **found, "formula_ms": formula, "over_formula": found["vector_ms"] / formula}


def launched(
    launch: list[str], options: argparse.Namespace, more: list[str], hosts: dict[str, str]
) -> list[dict[str, Any]]:
    """What the first process of each launch wrote; `hosts`: namespace -> its network card."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        own = [f"--batch={options.batch}", f"--turns={options.turns}", "--child", str(path), *more]
        running = []
        for number, (name, card) in enumerate(hosts.items() or [("", "")]):
            there = ["ip", "netns", "exec", name] if name else []
            rank = [f"--node-rank={number}"] if name else []
            command = [*there, sys.executable, "-m", "torch.distributed.run", *launch, *rank, __file__, *own]
            extra = {"GLOO_SOCKET_IFNAME": card} if card else {}
            running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **extra}))
        if any([process.wait() for process in running]):
            raise SystemExit(f"{' '.join(launch)}: a process failed")
        return [json.loads(path.read_text())]


def sh(*command: str) -> None:
    subprocess.run(command, check=True)


# -- in each process -----------------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from scumble.training.numerics import make_accelerator

    accelerator = make_accelerator("no", torch.device("cpu"))
    found: dict[str, Any] = {"processes": accelerator.num_processes}
    vector = torch.zeros(SD15_RANK_4)
    alone = timed(lambda: dist.all_reduce(vector), options.turns)
    found |= {"vector_bytes": vector.nbytes, "vector_ms": 1e3 * statistics.median(alone)}
    if not options.bare:
        found |= trained(accelerator, options)
    if accelerator.is_main_process:
        options.child.write_text(json.dumps(found))


def trained(accelerator: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Steps with and without the exchange, in turns."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    import scumble.picturebook as picturebook
    from scumble.adapters import Adapter, LoraSettings
    from scumble.data.record import Batch
    from scumble.models.family import Frame
    from scumble.models.loading import load_base
    from scumble.rng import Streams
    from scumble.training.objective import DenoisingObjective

    base = load_base(picturebook.path(), dtype=torch.float32, device=torch.device("cpu"))
    adapter = Adapter.inject(base.roots, "attention", LoraSettings(rank=4))
    side, count = base.resolution // base.latent_factor, options.batch
    batch = Batch(
        latents=Streams(0).normal("latents", range(count), (base.latent_channels, side, side)),
        conditioning=base.encode_prompts(["a red fox"] * count),
        captions=("a red fox",) * count,
        frame=Frame.plain(count, base.resolution, base.resolution),
        weight=torch.ones(count),
        keys=("",) * count,
        positions=tuple(range(count)),
    )
    model = accelerator.prepare(DenoisingObjective(base, Streams(0)))
    sent: list[int] = []

    def counted(bucket: Any) -> Any:
        sent.append(bucket.buffer().nbytes)
        return bucket

    # without annotations: DDP takes only its own types there, and not as text
    model.register_comm_hook(None, lambda state, bucket: allreduce_hook(state, counted(bucket)))

    def step() -> None:
        model(batch).sum().backward()

    def quiet() -> None:
        with model.no_sync():
            step()

    for _ in range(WARM_UP):
        step()
    sent.clear()
    ratios, without = [], []
    for _ in range(options.turns):
        accelerator.wait_for_everyone()
        (first,) = timed(quiet, 1)
        accelerator.wait_for_everyone()
        (second,) = timed(step, 1)
        without.append(first)
        ratios.append(second / first)
    ratios.sort()
    return {
        "trained_numbers": sum(p.numel() for p in adapter.parameters()),
        "exchanged_bytes": sum(sent) // options.turns,
        "exchanges": len(sent) // options.turns,
        "step_ms": 1e3 * statistics.median(without),
        "exchanging_over_step": statistics.median(ratios),
        "from": ratios[len(ratios) // 10],
        "to": ratios[-1 - len(ratios) // 10],
    }


def timed(action: Callable[[], Any], times: int) -> list[float]:
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        action()
        found.append(time.perf_counter() - begun)
    return found


if __name__ == "__main__":
    main()
