"""The table of methods: what is written down of its rows is what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def row(subject: str, method: str, seed: int, learned: float, obeys: float, drift: float) -> dict[str, Any]:
    others = dict.fromkeys(("kept", "overall", "copies", "seconds", "kilobytes"), 1.0)
    given = {"subject": subject, "method": method, "seed": seed}
    return {**given, "learned": learned, "obeys": obeys, "drift": drift, **others}


@pytest.fixture
def methods(benchmark_named: Callable[[str], Any]) -> Any:
    return benchmark_named("methods")


RECIPE = "pivotal, unet"
ROWS = [
    row("zorbik", RECIPE, 0, 0.5, 0.9, 40),
    row("zorbik", RECIPE, 1, 0.7, 0.9, 40),
    row("zorbik", "dreambooth, unet", 0, 0.65, 0.8, 41),
    row("zorbik", "dreambooth, unet", 1, 0.65, 0.8, 41),
    row("zorbik", "textual-inversion", 0, 0.1, 0.95, 0),
    row("zorbik", "textual-inversion", 1, 0.1, 0.95, 0),
]


def test_who_beats_the_recipe_is_told_by_means_over_seeds(methods: Any) -> None:
    (line,) = methods.beaten_by(ROWS, RECIPE).splitlines()[2:]
    assert line == "| zorbik | dreambooth, unet by 0.05 | textual-inversion by 0.05 | none |"


def test_the_recipe_is_compared_row_by_row(methods: Any) -> None:
    """A level that all rows of one creature share is in both, and gone from the difference."""
    rows = [
        row(subject, method, seed, base + learned + 0.1 * seed, 0.9, 40 + drift)
        for subject, base in (("zorbik", 0.0), ("plimmo", 0.3))
        for seed in (0, 1)
        for method, learned, drift in ((RECIPE, 0.25, 0), ("dreambooth, unet", 0.05, 3))
    ]
    (line,) = methods.beside(rows, RECIPE).splitlines()[2:]
    assert line == ("| dreambooth, unet | +0.20 (+0.20 to +0.20) | +0.00 (+0.00 to +0.00) | -3 (-3 to -3) |")
    assert methods.beside(rows[:4], RECIPE) == "", "one creature tells nothing of others"


def test_methods_without_rows_have_no_column(methods: Any) -> None:
    head, _, line = methods.by_subject(ROWS).splitlines()
    assert head == "| learned / obeys / drift | textual-inversion | dreambooth, unet | pivotal, unet |"
    assert line == "| zorbik | 0.10 / 0.95 / 0 | 0.65 / 0.80 / 41 | 0.60 / 0.90 / 40 |"


def test_the_documentation_has_the_tables_of_the_rows(methods: Any) -> None:
    """Made by `python benchmarks/methods.py --docs` with the arguments of the whole table."""
    asked = {"steps": 320, "pictures": 24, "unrelated": 10, "denoising_steps": 15}
    rows = methods.rows_in(methods.HERE / "results" / "methods.json", asked)
    assert len({(each["subject"], each["method"], each["seed"]) for each in rows}) == len(rows) > 60
    tables = methods.document(rows)
    assert tables in methods.DOCS.read_text()
    assert tables == (methods.HERE / "results" / "methods.md").read_text()


def test_every_method_has_settings_that_are_taken(methods: Any) -> None:
    from scumble.runs.config import RunConfig
    from scumble.runs.load import argument, assemble

    for method in methods.METHODS:
        settings = methods.settings_of(method, "plimmo", 20)
        given = {**settings, "data": {"images": "pictures"}, "output": "runs/x"}
        config = assemble(RunConfig, [argument(name, value) for name, value in given.items()])
        assert config.train.steps == 20 and config.method == settings["method"]
