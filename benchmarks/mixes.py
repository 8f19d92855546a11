"""Does `check-mix` tell beforehand which of two adapters damages the other? Pairs of styles and creatures, judged.

    python benchmarks/mixes.py --runs runs/woodcut runs/neon runs/zorbik ...   # judges these
    python benchmarks/mixes.py --train runs                                    # trains all of them into runs/ first
    python benchmarks/mixes.py --runs ... --scores benchmarks/results/mixes.json   # predicts anew, draws nothing

A run's folder is called like what it teaches: one of the picturebook's styles or creatures. Every adapter draws
held-out prompts of its own alone, and again beside each of the others, from the same seeds. The damage that B does to
A is the share of what A was taught that is lost: of its pictures in its style, or with its creature's name (oracle and
identity network). What it was not taught (subject and colour, background) is reported and not counted: averaged in, a
background that always stays would hide a creature that is gone.

What `check-mix` says before anything is drawn is compared with it by Spearman's rank correlation: over all pairs with
the damage in both directions together, and over all directions, also within each kind of direction (a style hurt by a
style, ...), where the kind alone can't be what predicts. Pairs share their adapters, so p is the share of exchanges of
the adapters' names that agree as well, not of orders of the pairs; "p within" exchanges styles with styles and
creatures with creatures only. "side" is how often, of the pairs that are hurt unequally (by
more than 0.05), it names the right one. Writes `benchmarks/results/mixes.json` and `docs/mixes.png`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from machine import machine
from PIL import Image

from scumble import Request, Session, train
from scumble.formats.container import read_header
from scumble.formats.metadata import from_header
from scumble.inference.drawing import grid
from scumble.inference.request import AdapterUse
from scumble.models.family import BaseModel
from scumble.models.loading import load_base
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
TURNS = 5040
"""Exchanges of the adapters' names that a rank correlation is compared with, at most: all of them for seven."""
UNEQUAL = 0.05
"""A pair whose damages differ by more has a side that is hurt more."""


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
        """Shares in [0, 1]: first what it was taught, then what should stay."""
        if self.name in STYLE_NAMES:
            seen = oracle.judge(pictures, scenes, self.name)
            return {"style": seen.style, "subject and colour": seen.subject_and_color}
        sightings = identity.read(pictures)
        right = [seen.background == scene.background for seen, scene in zip(sightings, scenes, strict=True)]
        return {
            "name": statistics.fmean(seen.name == self.name for seen in sightings),
            "background": statistics.fmean(right),
        }


def lost(alone: dict[str, float], together: dict[str, float]) -> float:
    """The share of what was taught that is lost; 0 where nothing was there."""
    taught = next(iter(alone))
    return 1 - together[taught] / alone[taught] if alone[taught] else 0.0


@dataclass(frozen=True)
class Pair:
    """Two adapters: what check-mix says, and what drawing shows."""

    names: tuple[str, str]
    predicted: dict[str, float]
    """Column of check-mix, over all layers -> number; "size" is the norm of both changes together."""
    directed: dict[str, tuple[float, float]]
    """"share of the other", "size of the other", ... -> number for what happens to each of the two."""
    alone: tuple[dict[str, float], dict[str, float]]
    """Scores of each without the other."""
    together: tuple[dict[str, float], dict[str, float]]
    damage: float
    """Mean of `damages`."""
    damages: tuple[float, float]
    """What each loses by the other: 0 nothing, 1 all that it was taught."""
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


@dataclass(frozen=True)
class Drawn:
    """What drawing showed of a pair."""

    alone: tuple[dict[str, float], dict[str, float]]
    together: tuple[dict[str, float], dict[str, float]]
    moved: float


def judge(
    one: Taught, other: Taught, drawn: dict[tuple[str, str], list[Image.Image]], scenes: Sequence[Scene]
) -> Drawn:
    """What the two lose by each other."""
    alone, together, moved = [], [], []
    for a, b in ((one, other), (other, one)):
        bare, mixed = drawn[a.name, a.name], drawn[a.name, b.name]
        alone.append(a.scores(bare, scenes))
        together.append(a.scores(mixed, scenes))
        pixels = (np.stack([np.asarray(p, float) for p in some]) for some in (bare, mixed))
        moved.append(float(np.sqrt(np.square(np.subtract(*pixels)).mean())))
    return Drawn((alone[0], alone[1]), (together[0], together[1]), statistics.fmean(moved))


def judged_before(report: dict[str, Any], adapters: Sequence[Taught]) -> dict[tuple[str, str], Drawn]:
    """Pair of names, in both orders -> what an earlier report of this benchmark found by drawing.

    Raises:
        SystemExit: a pair is not in it.
    """
    found: dict[tuple[str, str], Drawn] = {}
    for pair in report["pairs"]:
        (one, other), (a, b), (c, d) = pair["names"], pair["alone"], pair["together"]
        found[one, other] = Drawn((a, b), (c, d), pair["moved"])
        found[other, one] = Drawn((b, a), (d, c), pair["moved"])
    for mine, theirs in itertools.combinations(adapters, 2):
        if (mine.name, theirs.name) not in found:
            raise SystemExit(
                f"The scores know no pair of {mine.name} and {theirs.name}. Draw them without --scores."
            )
    return found


def pair_of(one: Taught, other: Taught, seen: Drawn) -> Pair:
    """Predict, and put what was measured beside it."""
    told = check(one.file, other.file)
    if told.norms is None or told.shares is None:
        raise SystemExit(f"How large {one.file} and {other.file} are can't be told: {told.verdict}")
    values = dict(told.whole.values)
    values["reads above chance"] = values["reads"] - values["reads by chance"]
    values["writes above chance"] = values["writes"] - values["writes by chance"]
    values["size"] = math.hypot(*told.norms)
    directed = {"share of the other": told.shares, "size of the other": told.norms[::-1]}
    # what the table says is the same for both
    directed |= {name: (values[name], values[name]) for name in ("reads", "writes", "agreement", "conflict")}
    losses = [lost(before, after) for before, after in zip(seen.alone, seen.together, strict=True)]
    return Pair(
        (one.name, other.name),
        {name: round(value, 4) for name, value in values.items()},
        {name: (round(x, 4), round(y, 4)) for name, (x, y) in directed.items()},
        seen.alone,
        seen.together,
        statistics.fmean(losses),
        (losses[0], losses[1]),
        seen.moved,
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


Table: TypeAlias = dict[tuple[str, str], float]
"""(who is hurt, by whom) -> number; of both together, the same for both orders."""


def agreement(predicted: Table, measured: Table, places: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Rank correlation over `places`, and two shares of the exchanges of the adapters' names whose correlation is at
    least as far from 0: "p" of all exchanges, "p within" of those that leave styles styles and creatures creatures,
    which the kind alone can't pass."""
    names = sorted({name for place in measured for name in place})
    xs, ys = _ranked(predicted), _ranked(measured)
    a = np.asarray([ys[place] for place in places])
    told = {"spearman": 0.0, "p": 1.0, "p within": 1.0}
    if a.std() == 0 or np.std([xs[place] for place in places]) == 0:
        return told
    told["spearman"] = float(np.corrcoef(a, [xs[place] for place in places])[0, 1])
    for share, kinds in (
        ("p", [names]),
        ("p within", [[n for n in names if _kind(n) == kind] for kind in ("style", "creature")]),
    ):
        hits = turns = 0
        for called in _exchanges(kinds):
            b = np.asarray([xs[called[one], called[other]] for one, other in places])
            same = b.std() > 0 and abs(np.corrcoef(a, b)[0, 1]) >= abs(told["spearman"]) - 1e-9
            hits, turns = hits + bool(same), turns + 1
        told[share] = hits / turns
    return {"spearman": round(told["spearman"], 3)} | {s: round(told[s], 4) for s in ("p", "p within")}


def _ranked(table: Table) -> Table:
    return dict(zip(table, ranks(list(table.values())), strict=True))


def _exchanges(groups: Sequence[Sequence[str]]) -> Iterator[dict[str, str]]:
    """Name -> another name of its group: every way where there are at most `TURNS`, else so many random ones."""
    flat = [name for group in groups for name in group]
    if math.prod(math.factorial(len(group)) for group in groups) <= TURNS:
        for orders in itertools.product(*(itertools.permutations(group) for group in groups)):
            yield dict(zip(flat, (name for order in orders for name in order), strict=True))
        return
    rng = random.Random(0)
    yield dict(zip(flat, flat, strict=True))
    for _ in range(TURNS - 1):
        mixed = [name for group in groups for name in rng.sample(group, len(group))]
        yield dict(zip(flat, mixed, strict=True))


def correlations(pairs: Sequence[Pair]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure ("damage", "moved") -> column of check-mix -> {"spearman", "p", "p within"}, both directions together."""
    places = [pair.names for pair in pairs]
    measures = {"damage": [pair.damage for pair in pairs], "moved": [pair.moved for pair in pairs]}
    return {
        measure: {
            column: agreement(
                _each_way(pairs, [(pair.predicted[column],) * 2 for pair in pairs]),
                _each_way(pairs, [(value, value) for value in values]),
                places,
            )
            for column in pairs[0].predicted
        }
        for measure, values in measures.items()
    }


def directions(pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Column -> how it agrees with the damage of each direction: over all, within each kind, and by side."""
    measured = _each_way(pairs, [pair.damages for pair in pairs])
    kinds: dict[str, list[tuple[str, str]]] = {}
    for hurt, by in measured:
        kinds.setdefault(f"{_kind(hurt)} by {_kind(by)}", []).append((hurt, by))
    found: dict[str, dict[str, Any]] = {}
    for column in pairs[0].directed:
        told = _each_way(pairs, [pair.directed[column] for pair in pairs])
        unequal = [
            pair
            for pair in pairs
            if abs(pair.damages[0] - pair.damages[1]) > UNEQUAL and len(set(pair.directed[column])) == 2
        ]
        right = sum(
            (pair.directed[column][0] > pair.directed[column][1]) == (pair.damages[0] > pair.damages[1])
            for pair in unequal
        )
        found[column] = {
            **agreement(told, measured, list(measured)),
            "within": {
                kind: round(spearman([told[p] for p in places], [measured[p] for p in places]), 3)
                for kind, places in kinds.items()
            },
            "side": [right, len(unequal)],
        }
    return found


def within_kinds(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Column -> kind of pair -> rank correlation with the damage in both directions together."""
    kinds: dict[str, list[Pair]] = {}
    for pair in pairs:
        kinds.setdefault(" and ".join(sorted(map(_kind, pair.names))), []).append(pair)
    return {
        column: {
            kind: round(spearman([p.predicted[column] for p in some], [p.damage for p in some]), 3)
            for kind, some in kinds.items()
        }
        for column in pairs[0].predicted
    }


def _kind(name: str) -> str:
    return "style" if name in STYLE_NAMES else "creature"


def _each_way(pairs: Sequence[Pair], values: Sequence[tuple[float, float]]) -> Table:
    found: Table = {}
    for pair, (first, second) in zip(pairs, values, strict=True):
        (one, other) = pair.names
        found[one, other], found[other, one] = first, second
    return found


def shown(pairs: Sequence[Pair]) -> tuple[Pair, Pair]:
    """The pair that hurts most, and the one that hurts most unequally."""
    most = max(pairs, key=lambda pair: pair.damage)
    return most, max(pairs, key=lambda pair: abs(pair.damages[0] - pair.damages[1]))


def sheet(pairs: Sequence[Pair], drawn: dict[tuple[str, str], list[Image.Image]]) -> Image.Image:
    """The pair that hurts most and the one that hurts most unequally: each adapter alone, and beside the other."""
    rows, labels = [], []
    for pair in shown(pairs):
        a, b = pair.names
        for number, (one, other) in enumerate(((a, b), (b, a))):
            said = f"share {pair.directed['share of the other'][number]:.2f}, {pair.damages[number]:.0%} lost"
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
    parser.add_argument("--scores", type=Path, help="an earlier report: what it drew is not drawn again")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "mixes.json")
    parser.add_argument("--sheet", type=Path, default=HERE.parent / "docs" / "mixes.png")
    options = parser.parse_args()
    folders = options.runs
    if folders is None:
        changes = {} if options.training_steps is None else {"train__steps": options.training_steps}
        folders = train_all(options.names, options.train, **changes)
    adapters, scenes = find(folders), held_out_scenes(options.prompts)
    if options.scores is not None:
        before = json.loads(options.scores.read_text())
        prompts, steps, alone = before["prompts"], before["steps"], before["alone"]
        seen = judged_before(before, adapters)
        drawn = None
    else:
        prompts, steps = options.prompts, options.steps
        drawn = draw(adapters, scenes, steps)
        alone = {one.name: one.scores(drawn[one.name, one.name], scenes) for one in adapters}
        seen = {
            (one.name, other.name): judge(one, other, drawn, scenes)
            for one, other in itertools.combinations(adapters, 2)
        }
    base = load_base("picturebook")
    pairs = []
    for one, other in itertools.combinations(adapters, 2):
        pairs.append(pair_of(one, other, seen[one.name, other.name]))
    found, directed = correlations(pairs), directions(pairs)
    report = {
        "prompts": prompts,
        "steps": steps,
        "trained on": {one.name: _trained_on(one, base) for one in adapters},
        "alone": alone,
        "spearman": found,
        "spearman within kinds": within_kinds(pairs),
        "directed": directed,
        "pairs": [asdict(pair) for pair in sorted(pairs, key=lambda pair: -pair.damage)],
        "machine": machine(),
    }
    options.json.parent.mkdir(exist_ok=True, parents=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    if drawn is not None:
        options.sheet.parent.mkdir(exist_ok=True, parents=True)
        sheet(pairs, drawn).save(options.sheet)
    for pair in sorted(pairs, key=lambda pair: -pair.damage):
        print(
            f"{' x '.join(pair.names):24} share {pair.directed['share of the other'][0]:.2f}  "
            f"damages {pair.damages[0]:+.2f} {pair.damages[1]:+.2f}  conflict {pair.predicted['conflict']:.3f}"
        )
    for measure, columns in found.items():
        for column, told in columns.items():
            print(
                f"{measure:8} {column:22} spearman {told['spearman']:+.2f}  p {told['p']:.4f}  within kinds "
                f"{told['p within']:.4f}"
            )
    for column, way in directed.items():
        kinds = ", ".join(f"{kind} {value:+.2f}" for kind, value in way["within"].items())
        print(
            f"directed {column:22} spearman {way['spearman']:+.2f}  p {way['p']:.4f}  within kinds "
            f"{way['p within']:.4f}  side "
            f"{way['side'][0]} of {way['side'][1]}  ({kinds})"
        )


def _trained_on(taught: Taught, base: BaseModel) -> str:
    """Whether an adapter was trained on this very base, as its file says."""
    said = from_header(read_header(taught.file).metadata).base_fingerprint
    return "this base" if said == base.fingerprint() else f"other weights ({said[:12]})"


if __name__ == "__main__":
    main()
