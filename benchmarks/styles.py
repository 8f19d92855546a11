"""Does a LoRA learn a style and keep the content? All styles, 60 held-out prompts each, judged by the oracle.

    python benchmarks/styles.py                      # every style; about six minutes each on two cores
    python benchmarks/styles.py woodcut --prompts 20

Trains with the demo's settings, draws base and LoRA from the same seeds, checks that strength 0 is the base bit for
bit, and writes `benchmarks/results/styles.json` and `docs/styles.png`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from machine import machine

from scumble import Request, Session
from scumble.inference.drawing import grid
from scumble.inference.request import AdapterUse
from scumble.picturebook import oracle
from scumble.picturebook.dataset import STYLE_NAMES
from scumble.runs.demo import SETTINGS, draw_all, held_out_scenes, prompt, teach
from scumble.training.sinks.report import read_record

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("styles", nargs="*", default=list(STYLE_NAMES))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--out", type=Path, default=None, help="keep the runs here, one folder a style")
    parser.add_argument(
        "--reuse", action="store_true", help="judge the finished runs in --out; train the others"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "styles.json")
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "docs" / "styles.png")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="scumble-styles-"))
    asked = held_out_scenes(arguments.prompts)
    results: dict[str, object] = {}
    rows, labels = [], []
    # the base's own content score: the same prompts without a style's name
    with Session("picturebook", batch_size=20) as session:
        plain = oracle.judge(draw_all(session, asked, "plain"), asked)
    for style in arguments.styles:
        adapter, seconds = finished(out / style / "run") if arguments.reuse else (None, 0.0)
        if adapter is None:
            result = teach(style, out / style, overwrite=True)
            adapter, seconds = result.adapter, result.seconds
        with Session("picturebook", batch_size=20) as session:
            base = draw_all(session, asked, style)
            alone = session.generate(Request(prompt=prompt(asked[0], style)))[0].image
        with Session("picturebook", [adapter], batch_size=20) as session:
            taught = draw_all(session, asked, style)
            off = Request(prompt=prompt(asked[0], style), adapters=(AdapterUse(path=adapter, strength=0.0),))
            silent = np.array_equal(np.asarray(session.generate(off)[0].image), np.asarray(alone))
        before, after = oracle.judge(base, asked, style), oracle.judge(taught, asked, style)
        results[style] = {
            "base": asdict(before),
            "lora": asdict(after),
            "base on plain prompts": asdict(plain),
            "strength 0 is the base, bit for bit": bool(silent),
            "training seconds": round(seconds, 1),
            "file bytes": adapter.stat().st_size,
        }
        content = f"{plain.subject_and_color:.0%} (base) -> {after.subject_and_color:.0%}"
        print(
            f"{style:10s} style {before.style:.0%} -> {after.style:.0%}, subject and colour {content}",
            flush=True,
        )
        print(f"{'':10s} strength 0 equal: {silent}, {seconds:.0f} s of training", flush=True)
        rows += [base[:10], taught[:10]]
        labels += [f"base, asked for {style} style", f"LoRA, {style}"]
        arguments.sheet.parent.mkdir(exist_ok=True)
        grid(rows, labels=labels, scale=2).save(arguments.sheet)
        arguments.json.parent.mkdir(exist_ok=True)
        report = {"prompts": arguments.prompts, "settings": SETTINGS, "styles": results, "machine": machine()}
        arguments.json.write_text(json.dumps(report, indent=1))


def finished(run: Path) -> tuple[Path | None, float]:
    """The adapter of a run that has ended, and its seconds of training; None where it has not."""
    adapter, report = run / "pytorch_lora_weights.safetensors", run / "report.html"
    if not adapter.exists() or not report.exists():
        return None, 0.0
    return adapter, sum(read_record(report).seconds)


if __name__ == "__main__":
    main()
