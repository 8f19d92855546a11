"""Afford: what a run may recompute, or be told otherwise, so that it fits its memory: the cheapest first.

Blocks are chosen as a knapsack is packed (Dantzig, 1957, solved by dynamic programming): of all sets that free enough,
the one whose recomputation takes the fewest operations. What a set really frees is then played, and more is asked for
where it was not enough, because a block that is recomputed comes back whole for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scumble.data.check import DataReport
from scumble.errors import ConfigError, PrecisionError
from scumble.methods.prior import PriorSettings
from scumble.models.ledger import Inside
from scumble.models.precision import check_precision, dtype_named, find_device
from scumble.runs.config import RunConfig, section
from scumble.runs.forecast import Forecast, Forecaster, budget_of, said
from scumble.runs.rehearsal import NotPlayable

FINE = 512
"""Parts into which what has to be freed is cut: sizes are told that finely."""
TRIES = 6
"""Sets that are played before all blocks are taken."""
WHOLE = "train.gradient_checkpointing=true"
WAYS = 3
"""Settings that are proposed."""


@dataclass(frozen=True)
class Way:
    """Other settings of a run, with which it fits."""

    settings: tuple[str, ...]
    """As they are given on a command line: "train.batch=1"."""
    forecast: Forecast
    cost: float
    """Operations of a step over those of the run as it was asked for."""
    remark: str
    """What it costs beside that, or how it works."""

    def said(self, before: Forecast) -> str:
        """In a line; `before`: the run as it was asked for."""
        now = self.forecast.peak.total
        saved = before.peak.total - now
        return (
            f"{' '.join(self.settings)}: {said(now)}, {said(saved)} less, for {self.cost:.2f} times the "
            f"computation; {self.remark}"
        )


def cheapest(blocks: Mapping[str, Inside], need: int) -> tuple[str, ...]:
    """The paths of the blocks that together keep at least `need` bytes and are recomputed with the fewest operations;
    all where that is not enough. Exact to `need` / `FINE`."""
    if need <= 0:
        return ()
    unit = max(1, need // FINE)
    goal = -(-need // unit)
    best: list[tuple[float, tuple[str, ...]] | None] = [(0.0, ()), *[None] * goal]
    for path, inside in blocks.items():
        worth = inside.kept // unit
        if not worth:
            continue
        for reached in range(goal, -1, -1):
            known = best[reached]
            if known is None:
                continue
            then = min(goal, reached + worth)
            cost = known[0] + inside.flops
            found = best[then]
            if then != reached and (found is None or cost < found[0]):
                best[then] = (cost, (*known[1], path))
    chosen = best[goal]
    return tuple(blocks) if chosen is None else tuple(path for path in blocks if path in set(chosen[1]))


def settle(forecaster: Forecaster, config: RunConfig | None = None) -> Forecast:
    """The forecast with the cheapest set of blocks whose recomputation lets training fit its budget: none where it fits
    without, all where nothing less does or nothing does.

    Raises:
        ConfigError: there is no budget.
        NotPlayable: the run can't be played without numbers.
    """
    config = config or forecaster.config
    plain = forecaster.forecast(config, False)
    if plain.budget is None:
        raise ConfigError(
            'train.gradient_checkpointing = "auto" fits a run into its memory, and on a CPU nobody says how much that '
            "is. Set train.memory_budget (GiB), or gradient_checkpointing to true or false."
        )
    over = _over(plain)
    if over <= 0:
        return plain
    play = forecaster.rehearsal(config)
    found = [play.step_by_blocks(phase) for phase in play.plan.phases]
    _, blocks = max(found, key=lambda each: each[0].peak)
    need = over
    for _ in range(TRIES if blocks else 0):
        chosen = cheapest(blocks, need)
        forecast = forecaster.forecast(config, chosen)
        more = _over(forecast)
        if more <= 0:
            return forecast
        if len(chosen) == len(blocks):
            break
        need += max(more, over // 50)
    return forecaster.forecast(config, True)


def predicted(config: RunConfig, report: DataReport | None) -> tuple[Forecaster, Forecast]:
    """What the run takes, with "auto" settled; and who forecasts it otherwise.

    Raises:
        NotPlayable: it can't be played without numbers.
        ConfigError: it can't, and "auto" asks for it; or there is no budget to settle it by.
    """
    auto = config.train.gradient_checkpointing == "auto"
    try:
        forecaster = Forecaster(config, report)
        return forecaster, settle(forecaster) if auto else forecaster.forecast()
    except NotPlayable as why:
        if not auto:
            raise
        raise ConfigError(
            f'train.gradient_checkpointing = "auto" can\'t be settled: {why} Say true, false or which blocks.'
        ) from why


def within_memory(
    config: RunConfig, report: DataReport | None, say: Callable[[str], None]
) -> bool | tuple[str, ...]:
    """What the run recomputes, once it is known to fit its memory; where nobody limits that, what it is told.

    `report`: of its data. `say` is told where nothing can be predicted.

    Raises:
        ConfigError: the run is predicted not to fit; or "auto" can't be settled.
    """
    asked = config.train.gradient_checkpointing
    if budget_of(config, find_device(config.device)) is None and asked != "auto":
        return asked  # type: ignore[return-value]
    try:
        forecaster, found = predicted(config, report)
        refuse(forecaster, found)
    except NotPlayable as why:
        say(f"note: it can't be told whether this run fits its memory. {why}")
        return asked  # type: ignore[return-value]
    if asked == "auto":
        say(f"gradient checkpointing: {said_of(found.recomputed)}; predicted {found}")
    return found.recomputed if asked == "auto" else asked  # type: ignore[return-value]


def _over(forecast: Forecast) -> int:
    """Bytes by which training exceeds the budget."""
    assert forecast.budget is not None
    return max(moment.total for moment in forecast.training) - forecast.budget


def ways(forecaster: Forecaster, asked: Forecast) -> list[Way]:
    """The cheapest other settings that fit, at most `WAYS`: single ones, and where these are too few, with
    recomputation besides."""
    found: list[Way] = []
    single, fitting = list(_changes(forecaster.config, asked)), set[str]()
    for change in single:
        way = None if change.kind in fitting else _tried(forecaster, asked, [change])
        if way is not None:
            found.append(way)
            fitting.add(change.kind)
    for beside in (change for change in single if change.settings == (WHOLE,)):
        for change in single:
            if len(found) < WAYS and change.kind not in fitting | {beside.kind}:
                way = _tried(forecaster, asked, [change, beside])
                found += [] if way is None else [way]
    return sorted(found, key=lambda way: way.cost)[:WAYS]


def refuse(forecaster: Forecaster, asked: Forecast) -> None:
    """Refuse a run that is predicted not to fit.

    Raises:
        ConfigError: it doesn't; the text says when it takes most and for what, and the cheapest settings that would
            fit.
    """
    if asked.fits:
        return
    assert asked.budget is not None
    config = forecaster.config
    where = "train.memory_budget" if config.train.memory_budget is not None else f"free on {asked.device}"
    found = ways(forecaster, asked)
    listed = "\n".join(f"  {way.said(asked)}" for way in found)
    advice = (
        f"What would fit, cheapest first:\n{listed}"
        if found
        else "Nothing that a run can be told would make it fit: take smaller pictures, a smaller base, or more memory."
    )
    raise ConfigError(
        f"This run is predicted to take {said(asked.peak.total)} in {asked.peak.name} ({asked.peak.largest}), and may "
        f"take {said(asked.budget)} ({where}). {advice}"
    )


def said_of(recomputed: bool | tuple[str, ...]) -> str:
    """What is recomputed, in words."""
    if isinstance(recomputed, bool):
        return "all blocks are recomputed" if recomputed else "nothing is recomputed"
    return f"{len(recomputed)} block{'s are' if len(recomputed) > 1 else ' is'} recomputed"


@dataclass(frozen=True)
class _Change:
    """One thing that a run may be told otherwise."""

    kind: str
    """Changes of one kind exclude each other."""
    settings: tuple[str, ...]
    config: Any
    """RunConfig -> RunConfig."""
    remark: str


def _tried(forecaster: Forecaster, asked: Forecast, changes: list[_Change]) -> Way | None:
    """The way of these changes; None where it doesn't fit."""
    config, settings, remarks = forecaster.config, list[str](), list[str]()
    for change in changes:
        config = change.config(config)
        settings += change.settings
        remarks.append(change.remark)
    auto = config.train.gradient_checkpointing == "auto"
    if not auto and not forecaster.trains_within_budget(config):
        return None
    forecast = settle(forecaster, config) if auto else forecaster.forecast(config)
    if not forecast.fits:
        return None
    if isinstance(forecast.recomputed, tuple) and forecast.recomputed:
        total = len(forecaster.rehearsal(config).base.recomputable)
        remarks.append(f"recomputes {len(forecast.recomputed)} of {total} blocks")
    elif auto and forecast.recomputed is True:
        return None  # that is the setting `true`, which is proposed by itself
    return Way(tuple(settings), forecast, forecast.flops / max(1, asked.flops), ", ".join(remarks))


def _changes(config: RunConfig, asked: Forecast) -> Iterator[_Change]:
    """All that may be proposed, what costs least first."""
    train = config.train
    options = config.options
    if isinstance(options, PriorSettings) and options.prior == "images" and options.class_batch > 1:
        name = section(config.method)
        yield _Change(
            "class",
            (f"{name}.class_batch=1",),
            lambda c: _with_options(c, class_batch=1),
            "draws one at a time",
        )
    for batch in _batches(train.batch, asked):
        parts = train.accumulate * train.batch // batch
        yield _Change(
            "batch",
            (f"train.batch={batch}", f"train.accumulate={parts}"),
            _telling(batch=batch, accumulate=parts),
            "the same pictures a step, fewer at a time",
        )
    if train.precision == "no" and _computes(config, "bf16"):
        yield _Change(
            "precision",
            ("train.precision=bf16",),
            _telling(precision="bf16"),
            "weights and activations in half",
        )
    if train.quantization == "none":
        for code, remark in {
            "int8": "the base's weights in a byte",
            "nf4": "in half a byte, coarser",
        }.items():
            yield _Change(
                "weights",
                (f"train.quantization={code}",),
                _telling(quantization=code),
                f"{remark}, read anew",
            )
    if train.gradient_checkpointing not in (True, "auto"):
        for word, value in {"auto": "auto", "true": True}.items():
            yield _Change(
                "recomputed",
                (f"train.gradient_checkpointing={word}",),
                _telling(gradient_checkpointing=value),
                "the same gradients",
            )


def _batches(batch: int, asked: Forecast) -> list[int]:
    """The largest smaller batch that should fit, by what one picture of this one takes, and the next smaller one; else
    one picture."""
    assert asked.budget is not None
    most = max(asked.training, key=lambda moment: moment.total)
    growing = sum(share.size for share in most.shares if share.name in ("activations", "workspace"))
    room = asked.budget - (most.total - growing)
    smaller = [size for size in range(batch - 1, 0, -1) if batch % size == 0]
    fitting = [size for size in smaller if growing * size / batch <= room]
    return fitting[:2] or smaller[-1:]


def _telling(**changes: Any) -> Any:
    return lambda config: config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _with_options(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={section(config.method): config.options.model_copy(update=changes)})


def _computes(config: RunConfig, precision: str) -> bool:
    try:
        check_precision(dtype_named(precision), find_device(config.device))
    except PrecisionError:
        return False
    return True
