"""peft's LoraConfig, as files carry it: rank and scale of every layer by patterns on the ends of their names.

Read and written without peft. In diffusers' files it is a header entry, in peft's own a file beside the weights.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scumble.adapters.names import BIAS, INPUTS, OUTPUTS, UP_BIAS
from scumble.adapters.state import AdapterState, LayerPath, LayerState
from scumble.errors import FormatError
from scumble.formats.metadata import LayerFacts, is_count, is_number, majority
from scumble.formats.pairs import check_lora

if TYPE_CHECKING:
    from torch import Tensor


class LoraConfig:
    """peft's LoraConfig, as far as it decides rank and scale.

    Raises:
        FormatError: a field is malformed; later, a layer's name takes the patterns too long.
    """

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        """`fields` are its keyword arguments, `source` is where they were found, for messages."""
        self.rank, self.alpha = fields.get("r"), fields.get("lora_alpha")
        self.stabilized = fields.get("use_rslora", False)
        if not is_count(self.rank) or not is_number(self.alpha) or not isinstance(self.stabilized, bool):
            raise FormatError(
                f"{source} is malformed: r {self.rank!r}, "
                f"lora_alpha {self.alpha!r}, use_rslora {self.stabilized!r}."
            )
        self.ranks = Patterns(fields.get("rank_pattern"), f"rank_pattern of {source}", is_count)
        self.alphas = Patterns(fields.get("alpha_pattern"), f"alpha_pattern of {source}", is_number)

    def facts(self, name: str) -> LayerFacts:
        """Rank and scale of the layer called `name`, without component."""
        rank, alpha = self.ranks.get(name, self.rank), self.alphas.get(name, self.alpha)
        return LayerFacts(rank, float(alpha), self.stabilized)


class Patterns:
    """A table of patterns on the end of a layer's name; the first that matches counts, as in peft.

    Files come from strangers, and a regular expression can be written to run for years: plain names are
    looked up, expressions may repeat little, and have `SECONDS` together.
    """

    SECONDS = 2.0
    EXPRESSIONS = 256

    def __init__(self, table: Any, field: str, valid: Callable[[object], bool]) -> None:
        table = {} if table is None else table
        if not isinstance(table, dict) or not all(valid(value) for value in table.values()):
            raise FormatError(f"A malformed {field}.")
        self.plain: dict[str, tuple[int, Any]] = {}
        self.expressions: list[tuple[int, re.Pattern[str], Any]] = []
        self.spent = 0.0
        for position, (pattern, value) in enumerate(table.items()):
            plain = pattern.replace("\\.", ".")
            if re.fullmatch(r"\^?[\w.-]+", plain):
                self.plain.setdefault(plain, (position, value))
                continue
            self.expressions.append((position, _expression(pattern, field), value))
            if len(self.expressions) > self.EXPRESSIONS:
                raise FormatError(f"There are more than {self.EXPRESSIONS} expressions in the {field}.")

    def get(self, name: str, default: Any) -> Any:
        """The value of the first pattern that fits `name`, else `default`."""
        if not self.plain and not self.expressions:
            return default
        parts = name.split(".")
        endings = ["^" + name, *(".".join(parts[start:]) for start in range(len(parts)))]
        hits = [self.plain[ending] for ending in endings if ending in self.plain]
        start = time.perf_counter()
        for position, expression, value in self.expressions:
            if expression.match(name):
                hits.append((position, value))
            if self.spent + time.perf_counter() - start > self.SECONDS:
                raise FormatError(
                    "The expressions in rank_pattern and alpha_pattern take too long. Not applied."
                )
        self.spent += time.perf_counter() - start
        return min(hits, key=lambda hit: hit[0])[1] if hits else default


def _expression(pattern: str, field: str) -> re.Pattern[str]:
    repeats = len(re.findall(r"[*+{?]", pattern))
    if len(pattern) > 1000 or repeats > 2 or re.search(r"\)[*+{?]|\\[1-9]", pattern):
        raise FormatError(f"There is an expression in the {field} that is refused: {pattern[:80]!r}.")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise FormatError(f"There is an invalid expression in the {field}: {error}.") from error


def pair_obstacle(state: AdapterState) -> str | None:
    """Why a dialect of peft's LoRA can't hold `state`, or None: it knows LoRA and DoRA, one in a component."""
    families: dict[str, set[str]] = {}
    for path, layer in state.layers.items():
        families.setdefault(path.partition(".")[0], set()).add(layer.family)
        if BIAS in layer.tensors:
            return f"it has no place for the change to the bias of {path!r}"
        if UP_BIAS in layer.tensors and layer.family != "lora":
            return f"it holds no bias beside {layer.family}, as that of {path!r}"
        if INPUTS in layer.tensors:
            return f"it holds magnitudes of outputs, not of inputs as that of {path!r}"
    foreign = sorted({name for names in families.values() for name in names} - {"lora", "dora"})
    if foreign:
        return f"it holds lora and dora, not {', '.join(foreign)}"
    mixed = next((root for root, names in families.items() if len(names) > 1), None)
    return f"it holds lora or dora in one component, and {mixed} has both" if mixed else None


def pair_tensors(path: LayerPath, layer: LayerState) -> dict[str, Tensor]:
    """A layer's tensors by the endings of their names.

    Raises:
        FormatError: its tensors contradict its rank.
    """
    pair = {name: layer.tensors[name] for name in ("down", "up") if name in layer.tensors}
    check_lora(path, replace(layer, tensors=pair))
    tensors = {"lora_A.weight": pair["down"], "lora_B.weight": pair["up"]}
    if UP_BIAS in layer.tensors:
        tensors["lora_B.bias"] = layer.tensors[UP_BIAS]
    if OUTPUTS in layer.tensors:
        flat = layer.tensors[OUTPUTS]
        shape = (-1,) if pair["down"].ndim == 2 else (1, -1, *(1 for _ in pair["down"].shape[2:]))
        tensors["lora_magnitude_vector"] = flat.reshape(shape)
    return tensors


def refuse_lost_magnitudes(state: AdapterState, roots: Collection[str], source: str) -> None:
    """Refuse a file whose configuration says DoRA of components whose magnitudes it lacks.

    Raises:
        FormatError: names a layer.
    """
    lost = [p for p, layer in state.layers.items() if layer.family == "lora" and p.partition(".")[0] in roots]
    if lost:
        raise FormatError(
            f"{source} says use_dora, but {lost[0]!r} has no lora_magnitude_vector. The file lost its magnitudes, "
            "and without them it draws otherwise. Not applied."
        )


def lora_configs(
    facts: Mapping[LayerPath, LayerFacts],
    dora: Collection[LayerPath] = (),
    biased: Collection[LayerPath] = (),
) -> dict[str, dict[str, Any]]:
    """The fields of `LoraConfig`, per component, by which peft and diffusers give every layer its own scale.

    `dora`: the layers with a magnitude; `biased`: those with a bias that is scaled with the factors.
    """
    table: dict[str, dict[str, Any]] = {}
    for root in sorted({path.partition(".")[0] for path in facts}):
        mine = {p.partition(".")[2]: fact for p, fact in facts.items() if p.partition(".")[0] == root}
        stabilized = majority(fact.rank_stabilized for fact in mine.values())
        table[root] = {
            **pattern_fields(mine, stabilized),
            "use_dora": any(path.partition(".")[0] == root for path in dora),
        }
        if any(path.partition(".")[0] == root for path in biased):  # older peft does not know the word
            table[root]["lora_bias"] = True
    return table


def pattern_fields(facts: Mapping[str, LayerFacts], stabilized: bool) -> dict[str, Any]:
    """The fields by which each of these layers (without component) gets its own rank and scale: the commonest, and
    patterns for the others. `stabilized`: whether scales are alpha / sqrt(r)."""
    rank = majority(fact.rank for fact in facts.values())
    alphas = {name: _alpha_for(fact, stabilized) for name, fact in facts.items()}
    alpha = majority(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": target_modules(facts),
        "rank_pattern": {_anchored(name): fact.rank for name, fact in facts.items() if fact.rank != rank},
        "alpha_pattern": {_anchored(name): value for name, value in alphas.items() if value != alpha},
        "use_rslora": stabilized,
    }


def target_modules(names: Iterable[str]) -> list[str]:
    """Layers (without component) as peft looks for them."""
    return sorted(_ending(name) for name in names)


def _alpha_for(fact: LayerFacts, stabilized: bool) -> float | int:
    """The alpha that gives this layer its scale when the whole component is, or is not, rank-stabilized."""
    alpha = fact.alpha
    if fact.rank_stabilized != stabilized:
        alpha = fact.scale * (math.sqrt(fact.rank) if stabilized else fact.rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def _ending(name: str) -> str:
    """A layer's name without CLIP's `text_model.`, which the reader's transformers may or may not have."""
    return name.removeprefix("text_model.")


def _anchored(name: str) -> str:
    """A pattern for this layer alone. A CLIP layer may have `text_model.` before it, so it has no anchor."""
    ending = _ending(name)
    return ending if ending.startswith("encoder.layers.") else "^" + ending
