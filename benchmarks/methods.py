"""Which method teaches a subject best? Subjects x methods x seeds at equal optimizer steps, measured by `evaluate`.

    python benchmarks/methods.py                                         # one small row of each method
    python benchmarks/methods.py --subjects 5 --seeds 3 --steps 320      # the whole table; hours on a CPU
    ... --shard 0/2 & ... --shard 1/2      # with OMP_NUM_THREADS=1: two processes fill one table on two cores

Every subject is taught from its five pictures on the embedded base. All methods are told the same: the pictures, and
captions that say what each shows and call the subject "zorbik creature"; where a word is learned, it is "zorbik", and
where the class is kept by prediction, "cat" stands in the subject's place. All
adapters have one form, one optimizer and one way to choose noise levels (`ADAPTER`, `TRAIN`), found on some of the
subjects; the class whose look is to be kept is "cat", where words also begin. Seconds are those of one core's work, so
that two processes beside each other measure as one alone. Each row is written to `benchmarks/results/methods.json` as
soon as it is measured, and a row that is there is not done
again; the tables go to `benchmarks/results/methods.md`, and with `--docs` into `docs/methods.md`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from scumble import train
from scumble.evaluation.bootstrap import estimate
from scumble.evaluation.evaluate import evaluate
from scumble.evaluation.result import EvaluationSettings
from scumble.picturebook.creatures import CREATURES
from scumble.picturebook.dataset import write_dataset

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "methods.md"
BEGIN, END = "<!-- benchmarks/methods.py -->", "<!-- until here -->"
SUBJECTS = ("zorbik", "plimmo", "vumbra", "tobbun", "kettrix")
METHODS = (
    "textual-inversion",
    "dreambooth, unet",
    "dreambooth, + text encoder",
    "dreambooth, + prior images",
    "dreambooth, + prior prediction",
    "pivotal",
    "pivotal, joint",
    "pivotal, unet",
    "pivotal, unet, joint",
    "pivotal, unet, + prior prediction",
)
ADAPTER = {"rank": 16, "dropout": 0.2, "targets": "attention+conv"}
TRAIN = {  # at 3e-3 adapters learn less, at 12e-3 the base breaks (docs/methods.md)
    "batch": 4,
    "checkpoint_every": 0,
    "optimizer": {"learning_rate": 6e-3},
    "objective": {"timesteps": {"distribution": "logit-normal", "mean": 0.2, "spread": 0.8}},
}
WORD_RATE, PIVOT_RATE = 2e-2, 3e-3
"""Of words. Alone they learn nothing in so few steps at the pivot's rate; at their own they grow to twice the length of
the base's words, and guidance then burns the colours of whatever is tuned around them."""
DROPPED = 0.1
"""Of captions, where the class is kept and a word learned: held to the base everywhere but at the word, the empty
prompt stays where it was, and guidance, which draws away from it, burns the colours."""
RECIPES = ("pivotal, unet", "pivotal, unet, + prior prediction")
"""What the others are compared with: what `examples/pivotal.toml` does, and the same with what it says of a class."""
_ROUNDING = 1e-9
CLASS = "cat"
"""What the base knows that comes nearest to an invented creature; it has never heard of creatures."""
COLUMNS = {
    "learned": "learned",
    "obeys": "obeys",
    "kept": "kept",
    "overall": "overall",
    "drift": "drift (levels)",
    "copies": "copies",
    "seconds": "seconds of one core",
    "kilobytes": "file (kB)",
}


def settings_of(method: str, subject: str, steps: int) -> dict[str, Any]:
    """The run's settings beside data, output and seed."""
    word = {"placeholders": subject, "initial": CLASS, "vectors": 4, "learns": "captions"}
    text_encoder = {"train_text_encoder": True, "text_encoder_learning_rate": 2e-4}
    images = {"prior": "images", "class_prompt": f"a {CLASS}", "class_count": 24}
    prediction = {
        "prior": "prediction",
        "class_prompt": CLASS,
        "subject": f"{subject} {CREATURES[subject].noun}",
    }
    pivot = {
        **word,
        "inversion_steps": steps // 5,
        "inversion_optimizer": {"learning_rate": PIVOT_RATE, "weight_decay": 0.0},
    }
    own: dict[str, dict[str, Any]] = {
        "textual-inversion": {
            "method": "textual-inversion",
            "textual_inversion": word,
            "train": {"optimizer": {"learning_rate": WORD_RATE, "weight_decay": 0.0}},
        },
        "dreambooth, unet": {"method": "dreambooth"},
        "dreambooth, + text encoder": {
            "method": "dreambooth",
            "dreambooth": text_encoder,
        },
        "dreambooth, + prior images": {"method": "dreambooth", "dreambooth": images},
        "dreambooth, + prior prediction": {"method": "dreambooth", "dreambooth": prediction},
        "pivotal": {"method": "pivotal", "pivotal": {**pivot, **text_encoder}},
        "pivotal, joint": {"method": "pivotal", "pivotal": {**pivot, **text_encoder, "joint": True}},
        "pivotal, unet": {"method": "pivotal", "pivotal": pivot},
        "pivotal, unet, joint": {"method": "pivotal", "pivotal": {**pivot, "joint": True}},
        "pivotal, unet, + prior prediction": {
            "method": "pivotal",
            "pivotal": {**pivot, **prediction},
            "data": {"caption_dropout": DROPPED},
        },
    }
    chosen = own[method]
    common = {
        "steps": steps,
        **TRAIN,
        "schedule": {"name": "cosine", "warmup_steps": min(20, steps // 10)},
    }
    found = {"base": "picturebook", **chosen, "train": common | chosen.get("train", {})}
    if chosen["method"] != "textual-inversion":
        found["adapter"] = ADAPTER
    return found


def row_of(method: str, subject: str, seed: int, arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Teach, evaluate, and give the numbers."""
    folder = out / f"{subject}-{method.replace(', ', '-').replace('+ ', '').replace(' ', '-')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    write_dataset(subject, folder / "pictures")
    settings = settings_of(method, subject, arguments.steps)
    begun = time.process_time()
    data = {"images": str(folder / "pictures"), **settings.pop("data", {})}
    result = train(
        **settings,
        data=data,
        output=folder / "run",
        train__seed=seed,
        quiet=True,
    )
    seconds = time.process_time() - begun
    assert result.adapter is not None
    found = evaluate(
        folder / "run",
        settings=EvaluationSettings(
            pictures=arguments.pictures,
            seeds=1,  # a scene more says more than a seed more: most seeds draw much the same
            unrelated=arguments.unrelated,
            steps=arguments.denoising_steps,
        ),
        subject=f"{subject} {CREATURES[subject].noun}",
    )
    scores = found.judged[-1].scores
    named = {measured.name: measured for measured in scores.measures}
    return {
        "subject": subject,
        "method": method,
        "seed": seed,
        "learned": scores.learned,
        "obeys": scores.obeys,
        "kept": scores.kept,
        "overall": scores.overall,
        "drift": named["drift"].adapter.value,
        "copies": named["copies"].adapter.value,
        "seconds": seconds,
        "kilobytes": result.adapter.stat().st_size / 1000,
        "measures": {
            f"{measured.section}: {measured.name}": measured.adapter.as_json() for measured in scores.measures
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line a method: means over subjects and seeds, with 95 % intervals over both where there are several."""
    lines = [
        "| method | rows | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        if mine:
            lines.append(
                f"| {method} | {len(mine)} | " + " | ".join(_cell(mine, key) for key in COLUMNS) + " |"
            )
    return "\n".join(lines) + "\n"


def by_subject(rows: list[dict[str, Any]]) -> str:
    """One line a subject: learned / obeys / drift of each method, means over its seeds."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines = ["| learned / obeys / drift | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    means = _means(rows)
    for subject in SUBJECTS:
        if any(row["subject"] == subject for row in rows):
            cells = [_three(means.get((subject, method))) for method in methods]
            lines.append(f"| {subject} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def beaten_by(rows: list[dict[str, Any]], recipe: str) -> str:
    """One line a subject: which other methods do better than `recipe` in what, by means over seeds. A method that
    leaves the base as it is can't drift, and is not compared in that."""
    lines = [f"| than {recipe} | learned more | obeyed more | drifted less |", "|---|---|---|---|"]
    means = _means(rows)
    for subject in SUBJECTS:
        own = means.get((subject, recipe))
        if own is None:
            continue
        cells = []
        for place, sign in enumerate((1, 1, -1)):
            better = {
                method: sign * (theirs[place] - own[place])
                for (about, method), theirs in means.items()
                if about == subject and method != recipe and (sign > 0 or theirs[2] > 0)
            }
            shown = "by {:.2f}" if sign > 0 else "by {:.0f}"
            cells.append(
                ", ".join(
                    f"{method} {shown.format(gain)}" for method, gain in better.items() if gain > _ROUNDING
                )
            )
        lines.append(f"| {subject} | " + " | ".join(cell or "none" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def beside(rows: list[dict[str, Any]], recipe: str) -> str:
    """One line a method: how much more than it `recipe` does, row by row, with 95 % intervals over creatures and seeds.
    Seeds count of which both have a row of every creature."""
    lines = [f"| {recipe}, more than | learned | obeys | drift |", "|---|---|---|---|"]
    placed = {(row["method"], row["subject"], row["seed"]): row for row in rows}
    subjects = [name for name in SUBJECTS if any(row["subject"] == name for row in rows)]
    for method in METHODS:
        seeds = [
            seed
            for seed in sorted({row["seed"] for row in rows})
            if all((one, name, seed) in placed for one in (recipe, method) for name in subjects)
        ]
        if method == recipe or len(subjects) < 2 or len(seeds) < 2:
            continue
        cells = [
            _spread(
                [[placed[recipe, s, n][key] - placed[method, s, n][key] for n in seeds] for s in subjects],
                form,
            )
            for key, form in (("learned", "+.2f"), ("obeys", "+.2f"), ("drift", "+.0f"))
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def document(rows: list[dict[str, Any]]) -> str:
    """All tables, as they stand in `docs/methods.md` and beside the JSON."""
    known = [recipe for recipe in RECIPES if any(row["method"] == recipe for row in rows)]
    compared = [each for recipe in known for each in (beside(rows, recipe), beaten_by(rows, recipe)) if each]
    return "\n".join([table(rows), by_subject(rows), *compared])


def _means(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(subject, method) -> learned, obeys, drift."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["subject"], row["method"]), []).append(row)
    return {
        cell: (
            float(np.mean([row["learned"] for row in mine])),
            float(np.mean([row["obeys"] for row in mine])),
            float(np.mean([row["drift"] for row in mine])),
        )
        for cell, mine in found.items()
    }


def _three(means: tuple[float, float, float] | None) -> str:
    return "" if means is None else "{:.2f} / {:.2f} / {:.0f}".format(*means)


def _cell(rows: list[Mapping[str, Any]], key: str) -> str:
    subjects = sorted({row["subject"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    values = {(row["subject"], row["seed"]): row[key] for row in rows}
    form = ".2f" if key in ("learned", "obeys", "kept", "overall", "copies") else ".0f"
    if len(values) < len(subjects) * len(seeds) or len(values) == 1:
        return format(float(np.mean(list(values.values()))), form)
    return _spread([[values[subject, seed] for seed in seeds] for subject in subjects], form)


def _spread(values: list[list[float]], form: str) -> str:
    """The mean of subjects x seeds, and its 95 % interval over both."""
    found = estimate(np.array(values))
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", type=int, default=1, choices=range(1, len(SUBJECTS) + 1))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of every method")
    parser.add_argument("--pictures", type=int, default=24, help="pictures of the subject that are judged")
    parser.add_argument(
        "--unrelated", type=int, default=10, help="unrelated prompts; the product's own is 50"
    )
    parser.add_argument("--denoising-steps", type=int, default=15)
    parser.add_argument("--shard", default="0/1", help="K/N: every N-th row, from the K-th, in this process")
    parser.add_argument("--out", type=Path, default=None, help="keep runs and pages here")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/methods.md, too")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "methods.json")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="scumble-methods-"))
    asked = {name: getattr(arguments, name) for name in ("steps", "pictures", "unrelated", "denoising_steps")}
    share, shares = (int(part) for part in arguments.shard.split("/"))
    wanted = [
        (subject, method, seed)
        for seed in range(arguments.seeds)
        for subject in SUBJECTS[: arguments.subjects]
        for method in arguments.methods
    ]
    done = {(row["subject"], row["method"], row["seed"]) for row in rows_in(arguments.json, asked)}
    for subject, method, seed in wanted[share::shares]:
        if (subject, method, seed) in done:
            continue
        row = row_of(method, subject, seed, arguments, out)
        add(row, arguments.json, asked)
        said = ", ".join(f"{key} {row[key]:.2f}" for key in COLUMNS if row[key] is not None)
        print(f"{subject}, {method}, seed {seed}: {said}", flush=True)
    rows = rows_in(arguments.json, asked)
    print(document(rows))
    if arguments.docs:
        write_docs(document(rows))


def write_docs(tables: str) -> None:
    """Put the tables between their marks in the documentation."""
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCS.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{after}")


def rows_in(file: Path, asked: Mapping[str, int]) -> list[dict[str, Any]]:
    """The rows measured so far; none where they were measured with other numbers."""
    if not file.exists():
        return []
    before = json.loads(file.read_text())
    if before["asked"] != asked:
        print(f"{file} was made with {before['asked']}; it is begun anew.", flush=True)
        return []
    return list(before["rows"])


def add(row: dict[str, Any], file: Path, asked: Mapping[str, int]) -> None:
    """Write a row beside those that are there; another process may be doing the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        rows = [*rows_in(file, asked), row]
        rows.sort(key=lambda r: (r["seed"], SUBJECTS.index(r["subject"]), METHODS.index(r["method"])))
        file.write_text(json.dumps({"asked": asked, "machine": machine(), "rows": rows}, indent=1) + "\n")
        file.with_suffix(".md").write_text(document(rows))
    finally:
        os.close(folder)


if __name__ == "__main__":
    main()
