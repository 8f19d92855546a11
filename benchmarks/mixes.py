"""Does `check-mix` tell beforehand which of two adapters damages the other? Pairs of styles and creatures, judged.

    python benchmarks/mixes.py --runs runs/woodcut runs/neon runs/zorbik ...   # judges these
    python benchmarks/mixes.py --train runs                                    # trains all of them into runs/ first

A run's folder is called like what it teaches: one of the picturebook's styles or creatures. Every adapter draws
held-out prompts of its own alone, and again beside each of the others, from the same seeds. The damage that B does to
A is what A loses: styles the share of pictures in the style and the share with the right subject and colour, creatures
the share with the right name and on the right background (oracle and identity network). Over all pairs, the damage in
both directions together is compared with the columns of `check-mix`, known before anything was drawn, by Spearman's
rank correlation; p is the share of random orders that agree as well. Writes `benchmarks/results/mixes.json` and
`docs/mixes.png`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from PIL import Image

from scumble import Request, Session, train
from scumble.inference.drawing import grid
from scumble.inference.request import AdapterUse
from scumble.picturebook import identity, oracle
from scumble.picturebook.creatures import creature_caption
from scumble.picturebook.dataset import CREATURE_NAMES, STYLE_NAMES, write_dataset
from scumble.picturebook.scenes import Scene
from scumble.runs.check_mix import check
from scumble.runs.demo import SETTINGS, held_out_scenes, prompt, teach

HERE = Path(__file__).parent
WEIGHTS = "pytorch_lora_weights.safetensors"
SHOWN = 8
"""Pictures in a row of the sheet."""
TURNS = 10_000
"""Random orders that a rank correlation is compared with."""


@dataclass(frozen=True)
class Taught:
    """An adapter and what it teaches."""

    name: str
    file: Path

    def prompt(self, scene: Scene) -> str:
        """What its own picture of a scene is asked for by."""
        if self.name in STYLE_NAMES:
            return prompt(scene, self.name)
        thing = scene.things[0]
        return creature_caption(self.name, scene.background, thing.position, thing.size)

    def scores(self, pictures: Sequence[Image.Image], scenes: Sequence[Scene]) -> dict[str, float]:
        """What of its teaching is in these pictures: shares in [0, 1]."""
        if self.name in STYLE_NAMES:
            seen = oracle.judge(pictures, scenes, self.name)
            return {"style": seen.style, "subject and colour": seen.subject_and_color}
        sightings = identity.read(pictures)
        right = [seen.background == scene.background for seen, scene in zip(sightings, scenes, strict=True)]
        return {
            "name": statistics.fmean(seen.name == self.name for seen in sightings),
            "background": statistics.fmean(right),
        }


@dataclass(frozen=True)
class Pair:
    """Two adapters: what check-mix says, and what drawing shows."""

    names: tuple[str, str]
    predicted: dict[str, float]
    """Column of check-mix, over all layers -> number."""
    alone: tuple[float, float]
    """Mean score of each without the other."""
    together: tuple[float, float]
    damage: float
    """Mean loss of the two, in shares: 0 none, 1 everything."""
    moved: float
    """Rms change of the pixels when the other is added, mean of the two, of 255."""


def find(folders: Sequence[Path]) -> list[Taught]:
    """The adapters in these folders, told by the folders' names.

    Raises:
        SystemExit: a folder has no adapter, or a name that is neither a style nor a creature.
    """
    found = []
    for folder in folders:
        file = next((path for path in (folder / WEIGHTS, folder / "run" / WEIGHTS) if path.is_file()), None)
        words = [part for part in reversed(folder.resolve().parts) if part in (*STYLE_NAMES, *CREATURE_NAMES)]
        if file is None or not words:
            raise SystemExit(
                f"{folder} is no run that is called like a style or a creature ({', '.join(STYLE_NAMES)}; "
                f"{', '.join(CREATURE_NAMES)})."
            )
        found.append(Taught(words[0], file))
    if len({one.name for one in found}) != len(found) or len(found) < 3:
        raise SystemExit(
            f"Name at least three runs, each of another concept; these are {[t.name for t in found]}."
        )
    return found


def train_all(names: Sequence[str], folder: Path, **changes: Any) -> list[Path]:
    """One run a name, by the demo's settings; what is there is kept."""
    for name in names:
        if (folder / name / "run" / WEIGHTS).is_file():
            continue
        print(f"training {name}", flush=True)
        if name in STYLE_NAMES:
            teach(name, folder / name, overwrite=True, **changes)
            continue
        write_dataset(name, folder / name / "pictures")
        settings = SETTINGS | {"data": {"images": str(folder / name / "pictures")}}
        train(**settings, output=folder / name / "run", overwrite=True, quiet=True, **changes)
    return [folder / name for name in names]


def draw(
    adapters: Sequence[Taught], scenes: Sequence[Scene], steps: int
) -> dict[tuple[str, str], list[Image.Image]]:
    """(A, B) -> pictures of A's prompts with both; (A, A) with A alone. Seeds by a scene's place in the list."""
    wanted = [(one, other) for one in adapters for other in adapters]
    drawn: dict[tuple[str, str], list[Image.Image]] = {}
    with Session("picturebook", [one.file for one in adapters]) as session:
        for one, other in wanted:
            files = [one.file] if one is other else [one.file, other.file]
            uses = tuple(AdapterUse(path=file) for file in files)
            requests = [
                Request(prompt=one.prompt(scene), seed=seed, steps=steps, adapters=uses)
                for seed, scene in enumerate(scenes)
            ]
            drawn[one.name, other.name] = [drawing.image for drawing in session.generate(requests)]
            print(f"drew {one.name} {'alone' if one is other else 'with ' + other.name}", flush=True)
    return drawn


def pair_of(
    one: Taught, other: Taught, drawn: dict[tuple[str, str], list[Image.Image]], scenes: Sequence[Scene]
) -> Pair:
    """Predict and measure."""
    alone, together, moved = [], [], []
    for a, b in ((one, other), (other, one)):
        bare, mixed = drawn[a.name, a.name], drawn[a.name, b.name]
        alone.append(statistics.fmean(a.scores(bare, scenes).values()))
        together.append(statistics.fmean(a.scores(mixed, scenes).values()))
        pixels = (np.stack([np.asarray(p, float) for p in some]) for some in (bare, mixed))
        moved.append(float(np.sqrt(np.square(np.subtract(*pixels)).mean())))
    values = dict(check(one.file, other.file).whole.values)
    values["reads above chance"] = values["reads"] - values["reads by chance"]
    values["writes above chance"] = values["writes"] - values["writes by chance"]
    loss = statistics.fmean(before - after for before, after in zip(alone, together, strict=True))
    return Pair(
        (one.name, other.name),
        {name: round(value, 4) for name, value in values.items()},
        (alone[0], alone[1]),
        (together[0], together[1]),
        loss,
        statistics.fmean(moved),
    )


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    order = sorted(values)
    first = {value: order.index(value) for value in order}
    return [first[value] + (order.count(value) + 1) / 2 for value in values]


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Rank correlation in [-1, 1]; 0 where one of the two does not vary."""
    a, b = np.asarray(ranks(xs)), np.asarray(ranks(ys))
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def p_value(xs: Sequence[float], ys: Sequence[float], seed: int = 0) -> float:
    """Share of random orders whose rank correlation is at least as far from 0."""
    rng, seen, turned = random.Random(seed), abs(spearman(xs, ys)), list(ys)
    hits = 0
    for _ in range(TURNS):
        rng.shuffle(turned)
        hits += abs(spearman(xs, turned)) >= seen - 1e-12
    return (hits + 1) / (TURNS + 1)


def correlations(pairs: Sequence[Pair]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure ("damage", "moved") -> column of check-mix -> {"spearman", "p"}."""
    measures: dict[str, Callable[[Pair], float]] = {"damage": lambda p: p.damage, "moved": lambda p: p.moved}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for measure, of in measures.items():
        ys = [of(pair) for pair in pairs]
        found[measure] = {}
        for column in pairs[0].predicted:
            xs = [pair.predicted[column] for pair in pairs]
            found[measure][column] = {"spearman": round(spearman(xs, ys), 3), "p": round(p_value(xs, ys), 4)}
    return found


def sheet(pairs: Sequence[Pair], drawn: dict[tuple[str, str], list[Image.Image]]) -> Image.Image:
    """The pair that hurts most and the one that hurts least: each adapter alone, and beside the other."""
    ordered = sorted(pairs, key=lambda pair: -pair.damage)
    rows, labels = [], []
    for pair in (ordered[0], ordered[-1]):
        a, b = pair.names
        said = f"conflict {pair.predicted['conflict']:.2f}, damage {pair.damage:.0%}"
        for one, other in ((a, b), (b, a)):
            rows += [drawn[one, one][:SHOWN], drawn[one, other][:SHOWN]]
            labels += [f"{one}, alone", f"{one}, with {other}: {said}"]
    return grid(rows, labels=labels, scale=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", type=Path, nargs="+", help="folders of finished runs")
    source.add_argument("--train", type=Path, help="train into this folder; finished runs there are kept")
    parser.add_argument(
        "--names", nargs="+", default=[*STYLE_NAMES, *CREATURE_NAMES[:3]], help="with --train"
    )
    parser.add_argument("--training-steps", type=int, help="with --train; default the demo's")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "mixes.json")
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "docs" / "mixes.png")
    options = parser.parse_args()
    folders = options.runs
    if folders is None:
        changes = {} if options.training_steps is None else {"train__steps": options.training_steps}
        folders = train_all(options.names, options.train, **changes)
    adapters, scenes = find(folders), held_out_scenes(options.prompts)
    drawn = draw(adapters, scenes, options.steps)
    pairs = [pair_of(one, other, drawn, scenes) for one, other in itertools.combinations(adapters, 2)]
    alone = {one.name: one.scores(drawn[one.name, one.name], scenes) for one in adapters}
    found = correlations(pairs)
    report = {
        "prompts": options.prompts,
        "steps": options.steps,
        "alone": alone,
        "spearman": found,
        "pairs": [asdict(pair) for pair in sorted(pairs, key=lambda pair: -pair.damage)],
        "machine": machine(),
    }
    options.json.parent.mkdir(exist_ok=True, parents=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    options.sheet.parent.mkdir(exist_ok=True, parents=True)
    sheet(pairs, drawn).save(options.sheet)
    for pair in sorted(pairs, key=lambda pair: -pair.damage):
        print(
            f"{' x '.join(pair.names):24} conflict {pair.predicted['conflict']:.3f}  damage {pair.damage:+.3f}"
        )
    for measure, columns in found.items():
        for column, told in columns.items():
            print(f"{measure:8} {column:22} spearman {told['spearman']:+.2f}  p {told['p']:.3f}")


if __name__ == "__main__":
    main()
