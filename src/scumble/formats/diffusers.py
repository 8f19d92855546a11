"""The format of today's diffusers and peft: `unet.<layer>.lora_A.weight` (r, in), `.lora_B.weight` (out, r).

Alpha is not in the tensors but in the header entry `lora_adapter_metadata`: the keyword arguments of peft's
`LoraConfig` per component, as `{"unet.r": 4, "unet.lora_alpha": 8, ...}`. Its patterns are regular
expressions on the end of a layer's name. Read as well, because one file may mix them: `.lora.down.weight` and
`.lora_linear_layer.down.weight` (diffusers 0.19 to 0.22), and an `.alpha` tensor beside a pair (ComfyUI,
OneTrainer).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from scumble.adapters.state import AdapterState, LayerPath
from scumble.errors import FormatError
from scumble.formats.codec import cannot_represent
from scumble.formats.container import TensorFile
from scumble.formats.keymap import ROOTS, LayerNames, classic, split_root
from scumble.formats.metadata import (
    LAYERS,
    LayerFacts,
    compact,
    is_count,
    is_number,
    layer_facts,
    majority,
    parse_table,
    to_header,
)
from scumble.formats.pairs import Decoded, Factor, assemble, check_lora, refuse_unsupported

ENTRY = "lora_adapter_metadata"

_PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}
_FOREIGN = re.compile(
    r"(base_model\.model|diffusion_model|text_encoders|input_blocks|middle_block|output_blocks)\.|(lora|lycoris|oft)_"
)


class Diffusers:
    """What `StableDiffusionPipeline.save_lora_weights` and `UNet2DConditionModel.save_lora_adapter` write."""

    name = "diffusers"

    def matches(self, file: TensorFile) -> bool:
        """Whether any tensor is called so."""
        return any(_split(name)[1] in ("down", "up") and not _FOREIGN.match(name) for name in file.tensors)

    def decode(self, file: TensorFile, layers: Collection[LayerPath] | None) -> Decoded:
        """See `Codec.decode`. Alpha from our header entry, else peft's, else tensors, else the rank."""
        refuse_unsupported(file.tensors)
        factors = [Factor(name, *split) for name in file.tensors if (split := _split(name))[1]]
        pairs = {factor.layer for factor in factors if factor.part != "alpha"}
        factors = [factor for factor in factors if factor.layer in pairs]
        return assemble(file, factors, LayerNames(layers), partial(_scales, file))

    def obstacle(self, state: AdapterState) -> str | None:
        """See `Codec.obstacle`."""
        if state.tokens:
            return "it has no place for learned tokens"
        foreign = sorted({layer.family for layer in state.layers.values()} - {"lora"})
        return f"it holds lora, not {', '.join(foreign)}" if foreign else None

    def encode(self, state: AdapterState) -> TensorFile:
        """See `Codec.encode`."""
        if self.obstacle(state) is not None:
            raise cannot_represent(self, state)
        tensors = {}
        for path, layer in state.layers.items():
            check_lora(path, layer)
            tensors[classic(path) + ".lora_A.weight"] = layer.tensors["down"]
            tensors[classic(path) + ".lora_B.weight"] = layer.tensors["up"]
        header = to_header(state.metadata, {classic(path): layer for path, layer in state.layers.items()})
        facts = {path: LayerFacts.of(layer) for path, layer in state.layers.items()}
        header[ENTRY] = compact(_lora_configs(facts))
        return TensorFile(tensors, header)


def _split(name: str) -> tuple[str, str]:
    """(layer, part) of a tensor's name; part is empty when the name is of no known kind."""
    for suffix, part in _PARTS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), part
    return (name.removesuffix(".alpha"), "alpha") if name.endswith(".alpha") else (name, "")


def _scales(file: TensorFile, ranks: Mapping[str, int]) -> tuple[Mapping[str, LayerFacts], tuple[str, ...]]:
    """Rank and alpha per layer, from all places that speak of them; they must agree."""
    ours = layer_facts(file.metadata, ranks)
    peft: dict[str, LayerFacts] = {}
    if ENTRY in file.metadata:
        peft = _read_lora_configs(parse_table(file.metadata[ENTRY], ENTRY), ranks)
    facts, absent = {}, 0
    for name, rank in ranks.items():
        said = {LAYERS: ours[name]} if ours is not None else {}
        if name in peft:
            said[ENTRY] = peft[name]
        if name + ".alpha" in file.tensors:
            said["the alpha tensor"] = LayerFacts(rank, _alpha(file, name + ".alpha"))
        for source, fact in said.items():
            if fact.rank != rank:
                raise FormatError(
                    f"{file.label} contradicts itself: {source} gives {name!r} rank {fact.rank}, its tensors "
                    f"have rank {rank}. Not applied."
                )
        scales = [fact.scale for fact in said.values()]
        if any(not math.isclose(scale, scales[0], rel_tol=1e-5, abs_tol=1e-12) for scale in scales):
            listed = ", ".join(f"{source}: alpha {fact.alpha:g}" for source, fact in said.items())
            raise FormatError(
                f"{file.label} contradicts itself about the scale of {name!r} ({listed}). Not applied."
            )
        absent += not said
        facts[name] = next(iter(said.values())) if said else LayerFacts(rank, float(rank))
    if absent == len(ranks):
        return facts, ("alpha absent: using alpha = rank",)
    some = f"alpha absent on {absent} of {len(ranks)} layers: using alpha = rank there"
    return facts, (some,) if absent else ()


def _alpha(file: TensorFile, name: str) -> float:
    tensor = file.tensors[name]
    if tensor.numel() != 1:
        raise FormatError(f"Tensor {name!r} should be one number, its shape is {tuple(tensor.shape)}.")
    alpha = float(tensor)
    if not math.isfinite(alpha):
        raise FormatError(f"Tensor {name!r} is {alpha}. Not applied.")
    return alpha


def _read_lora_configs(table: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, LayerFacts]:
    """Layer spelling -> facts, for the components that `table` speaks of."""
    facts = {}
    bare = not any(key.startswith(tuple(f"{root}." for root in ROOTS)) for key in table)
    readers: dict[str, _LoraConfig | None] = {}
    for name in ranks:
        root, rest = split_root(name)
        if root not in readers:
            # a component that was saved alone has no prefix on its tensors, and none on its fields
            prefix = "" if bare else f"{root}."
            fields = {
                key.removeprefix(prefix): value for key, value in table.items() if key.startswith(prefix)
            }
            readers[root] = _LoraConfig(fields, root) if fields else None
        reader = readers[root]
        if reader is not None:
            facts[name] = reader.facts(rest)
    return facts


class _LoraConfig:
    """peft's LoraConfig, as far as it decides rank and scale."""

    def __init__(self, fields: Mapping[str, Any], root: str) -> None:
        self.rank, self.alpha = fields.get("r"), fields.get("lora_alpha")
        self.stabilized = fields.get("use_rslora", False)
        if not is_count(self.rank) or not is_number(self.alpha) or not isinstance(self.stabilized, bool):
            raise FormatError(
                f"The header entry {ENTRY!r} is malformed for {root}: r {self.rank!r}, "
                f"lora_alpha {self.alpha!r}, use_rslora {self.stabilized!r}."
            )
        if fields.get("use_dora"):
            raise FormatError(
                f"unsupported: use_dora in the header entry {ENTRY!r} of {root}. Nothing was used."
            )
        self.ranks = _Patterns(fields.get("rank_pattern"), "rank_pattern", is_count)
        self.alphas = _Patterns(fields.get("alpha_pattern"), "alpha_pattern", is_number)

    def facts(self, name: str) -> LayerFacts:
        rank, alpha = self.ranks.get(name, self.rank), self.alphas.get(name, self.alpha)
        return LayerFacts(rank, float(alpha), self.stabilized)


class _Patterns:
    """A table of patterns on the end of a layer's name; the first that matches counts, as in peft.

    Files come from strangers, and a regular expression can be written to run for years: plain names are
    looked up, expressions may repeat little, and have `SECONDS` together.
    """

    SECONDS = 2.0
    EXPRESSIONS = 256

    def __init__(self, table: Any, field: str, valid: Callable[[object], bool]) -> None:
        table = {} if table is None else table
        if not isinstance(table, dict) or not all(valid(value) for value in table.values()):
            raise FormatError(f"The header entry {ENTRY!r} has a malformed {field}.")
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
                raise FormatError(
                    f"The header entry {ENTRY!r} has more than {self.EXPRESSIONS} expressions in {field}."
                )

    def get(self, name: str, default: Any) -> Any:
        parts = name.split(".")
        endings = ["^" + name, *(".".join(parts[start:]) for start in range(len(parts)))]
        hits = [self.plain[ending] for ending in endings if ending in self.plain]
        start = time.perf_counter()
        for position, expression, value in self.expressions:
            if expression.match(name):
                hits.append((position, value))
            if self.spent + time.perf_counter() - start > self.SECONDS:
                raise FormatError(
                    f"The expressions in the header entry {ENTRY!r} take too long. Not applied."
                )
        self.spent += time.perf_counter() - start
        return min(hits, key=lambda hit: hit[0])[1] if hits else default


def _expression(pattern: str, field: str) -> re.Pattern[str]:
    repeats = len(re.findall(r"[*+{?]", pattern))
    if len(pattern) > 1000 or repeats > 2 or re.search(r"\)[*+{?]|\\[1-9]", pattern):
        raise FormatError(
            f"The header entry {ENTRY!r} has an expression in {field} that is refused: {pattern[:80]!r}."
        )
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise FormatError(
            f"The header entry {ENTRY!r} has an invalid expression in {field}: {error}."
        ) from error


def _lora_configs(facts: Mapping[LayerPath, LayerFacts]) -> dict[str, Any]:
    """The fields of `LoraConfig`, per component, by which diffusers gives every layer its own scale."""
    table: dict[str, Any] = {}
    for root in sorted({path.partition(".")[0] for path in facts}):
        mine = {p.partition(".")[2]: fact for p, fact in facts.items() if p.partition(".")[0] == root}
        stabilized = majority(fact.rank_stabilized for fact in mine.values())
        rank = majority(fact.rank for fact in mine.values())
        alphas = {name: _alpha_for(fact, stabilized) for name, fact in mine.items()}
        alpha = majority(alphas.values())
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(_ending(name) for name in mine),
            "rank_pattern": {_anchored(name): fact.rank for name, fact in mine.items() if fact.rank != rank},
            "alpha_pattern": {_anchored(name): value for name, value in alphas.items() if value != alpha},
            "use_rslora": stabilized,
            "use_dora": False,
        }
        table |= {f"{root}.{field}": value for field, value in config.items()}
    return table


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
