"""Targets: which layers an adapter changes, said in patterns and presets; every one must match something.

A pattern is a layer path in which `*` as a whole part stands for one or more parts, and `*`, `?` and `[12]`
inside a part stand for characters of that part. It matches whole parts, from the root's name to the layer's:

    *.attn?.to_q                    to_q of attn1 and attn2, anywhere in the denoiser
    unet.mid_block.*                everything in the middle block
    text_encoder.*.q_proj           the text encoder's query projections
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from scumble.adapters.layers import is_unread, layers_of
from scumble.adapters.operate import Layer
from scumble.adapters.state import LayerPath
from scumble.errors import AdapterError, NoLayerMatches

T = TypeVar("T")


@dataclass(frozen=True)
class Targets:
    """Layers of one root: those that a pattern matches, below the root's name."""

    patterns: tuple[str, ...]
    kind: type[nn.Module] | None = None
    """Only layers of this class; None for all."""

    def match(self, root: str, layers: Mapping[LayerPath, Layer]) -> list[LayerPath]:
        """The paths of `root` that match, in the order of `layers`."""
        patterns = [f"{root}.{pattern}" for pattern in self.patterns]
        return [
            path
            for path, layer in layers.items()
            if (self.kind is None or isinstance(layer, self.kind)) and any(matches(p, path) for p in patterns)
        ]


_ATTENTION = (
    *(f"*.attn*.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),  # diffusers' denoisers
    # the text's side of joint attention: SD 3, Flux
    *(f"*.attn*.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"*.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),  # CLIP text encoders
    *(f"*.SelfAttention.{name}" for name in "qkvo"),  # T5 text encoders
)
_MLP = (
    *("*.ff.net.0.proj", "*.ff.net.2"),
    *("*.ff_context.net.0.proj", "*.ff_context.net.2"),
    # Flux's single blocks: attention and feed-forward side by side, and one layer out of both
    *("single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out"),
    *("*.mlp.fc1", "*.mlp.fc2"),
    *("*.DenseReluDense.wi", "*.DenseReluDense.wi_?", "*.DenseReluDense.wo"),
)

PRESETS: Mapping[str, tuple[Targets, ...]] = {
    "attention": (Targets(_ATTENTION),),
    "mlp": (Targets(_MLP),),
    "attention+mlp": (Targets(_ATTENTION), Targets(_MLP)),
    "all-linear": (Targets(("*",), nn.Linear),),
    "conv": (Targets(("*",), nn.Conv2d),),
    "attention+conv": (Targets(_ATTENTION), Targets(("*",), nn.Conv2d)),
}
"""Names for the usual choices. "attention" is to_q, to_k, to_v and to_out.0 of self- and cross-attention in a
denoiser, and the four projections of each attention layer in a text encoder; "mlp" the two linear layers of
each feed-forward block; "all-linear" and "conv" every layer of that class. Where text and picture attend to each
other (SD 3, Flux) both sides are meant: add_q_proj, add_k_proj, add_v_proj, to_add_out and ff_context are the text's;
attn2 of SD 3.5 medium is the picture's alone, and meant too. Layers that nothing reads (the last one of SDXL's first
text encoder, the text's queries in the last block of SD 3) are meant by none."""


@dataclass(frozen=True)
class Matched:
    """What targets found."""

    layers: Mapping[LayerPath, Layer]
    """Path -> layer (without wrapper), in the model's own order."""
    counts: Mapping[str, int]
    """Each target as it was written -> how many layers it matched. A layer may count for several."""


def resolve(
    roots: Mapping[str, nn.Module], targets: str | Sequence[str], *, within: Sequence[str] | None = None
) -> Matched:
    """The layers that `targets` mean in this model.

    Args:
        roots: name -> module; the denoiser comes first.
        targets: one or several, each one of
            - a preset: "attention", "attention+mlp", "all-linear", "conv", ... (see PRESETS);
            - a preset of one root: "text_encoder.attention";
            - a pattern: "*.attn?.to_q". Its first part chooses the roots; where that part is `*`, and for a
              bare preset, the roots are those of `within`.
            Layers that nothing reads (see `layers.mark_unread`) are not looked at.
        within: names of roots, by default the first one only: text encoders are changed when asked for.

    Raises:
        NoLayerMatches: a target matched no layer; the text suggests one that does.
        AdapterError: `within` names a root that is not there, or `targets` is empty.
    """
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    within = tuple(roots)[:1] if within is None else tuple(within)
    for name in within:
        if name not in roots:
            raise AdapterError(f"This model has no part {name!r}; it has {', '.join(roots)}.")
    if not wanted or not within:
        raise AdapterError(
            f"No targets: an adapter needs at least one preset ({', '.join(PRESETS)}) or pattern, "
            "and at least one part of the model to look in."
        )
    layers = {path: layer for path, layer in layers_of(roots).items() if not is_unread(layer)}
    found: set[LayerPath] = set()
    counts: dict[str, int] = {}
    for target in wanted:
        paths = _match(target, layers, tuple(roots), within)
        if not paths:
            raise NoLayerMatches(_nothing(target, layers, tuple(roots), within))
        counts[target] = len(set(paths))
        found.update(paths)
    return Matched({path: layer for path, layer in layers.items() if path in found}, counts)


def named(targets: str | Sequence[str], roots: Sequence[str]) -> list[str]:
    """Those of `roots` that a target names: "text_encoder" by "text_encoder.attention"."""
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    firsts = [target.partition(".")[0] for target in wanted]
    return [root for root in roots if any(_chosen(first, (root,), ()) for first in firsts)]


def per_layer(
    patterns: Mapping[str, T], default: T, paths: Sequence[LayerPath], setting: str
) -> dict[LayerPath, T]:
    """One value per layer: that of the first pattern that fits it, else `default`.

    Args:
        patterns: pattern -> value; matched against whole paths, all roots.
        default: for layers that no pattern fits.
        paths: the adapter's layers.
        setting: the setting's name, for the error.

    Raises:
        NoLayerMatches: a pattern fits none of `paths`.
    """
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            raise NoLayerMatches(
                f"{setting} has a pattern that fits none of the adapter's {len(paths)} layers: {pattern!r}. "
                + _suggest(
                    pattern, paths, "It must be written for the whole path, e.g. " + repr(paths[0]) + "."
                )
            )
    return {path: next((v for p, v in patterns.items() if matches(p, path)), default) for path in paths}


def matches(pattern: str, path: LayerPath) -> bool:
    """Whether `pattern` fits the whole of `path` (see the top of this file)."""
    return _compiled(pattern).fullmatch(path) is not None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(r"\.".join(_part(part) for part in pattern.split(".")))


def _part(part: str) -> str:
    if part == "*":
        return r"[^.]+(?:\.[^.]+)*"
    pieces = re.split(r"(\*|\?|\[[^\]]+\])", part)
    signs = {"*": "[^.]*", "?": "[^.]"}
    return "".join(
        signs.get(piece)
        or (f"[{re.escape(piece[1:-1]).replace(chr(92) + '-', '-')}]" if i % 2 else re.escape(piece))
        for i, piece in enumerate(pieces)
    )


def _match(
    target: str, layers: Mapping[LayerPath, Layer], roots: Sequence[str], within: Sequence[str]
) -> list[LayerPath]:
    first, _, rest = target.partition(".")
    if target in PRESETS:
        return [path for root in within for choice in PRESETS[target] for path in choice.match(root, layers)]
    chosen = _chosen(first, roots, within)
    if rest in PRESETS and target not in layers:
        return [path for root in chosen for choice in PRESETS[rest] for path in choice.match(root, layers)]
    return [path for path in layers if path.partition(".")[0] in chosen and matches(target, path)]


def _chosen(first: str, roots: Sequence[str], within: Sequence[str]) -> Sequence[str]:
    """The roots that a target's first part means."""
    return within if first == "*" or first in PRESETS else [root for root in roots if matches(first, root)]


def _nothing(
    target: str, layers: Mapping[LayerPath, Layer], roots: Sequence[str], within: Sequence[str]
) -> str:
    """The text of NoLayerMatches: what was said, what would match."""
    first, _, rest = target.partition(".")
    chosen = _chosen(first, roots, within)
    where = " or ".join(chosen or within)
    preset = target if target in PRESETS else rest
    if preset in PRESETS and not chosen:
        return f"This model has no part {first!r}; it has {', '.join(roots)}."
    if preset in PRESETS:
        here = [name for name in PRESETS if _match(name, layers, roots, chosen)]
        return (
            f"No layer of {where} matches the preset {preset!r}. "
            f"Presets that match there: {', '.join(here) or 'none'}."
        )
    paths = list(layers)
    if not paths:
        names = ", ".join(roots)
        return f"No layer of {where} matches {target!r}: there is no linear or convolution layer in {names}."
    near = difflib.get_close_matches(target, PRESETS, n=1, cutoff=0.6) if "." not in target else []
    if near:
        return f"No layer of {where} matches {target!r}, and it is no preset. Did you mean {near[0]!r}?"
    inside = [path for path in paths if path.partition(".")[0] in (chosen or within)]
    # The pattern may be right, and for another part of the model, that nobody asked to change.
    elsewhere = [
        f"{root}.*.{rest.removeprefix('*.')}" for root in roots if first == "*" and root not in within
    ]
    hints = [_matches_some(pattern, paths) for pattern in elsewhere]
    hints += [
        _suggest(target, inside, ""),
        _suggest(target, paths, ""),
        f"a layer is called e.g. {paths[0]!r}.",
    ]
    hint = next(hint for hint in hints if hint)
    return f"No layer of {where} matches {target!r}. Patterns match whole parts of a path; {hint}"


def _suggest(pattern: str, paths: Sequence[LayerPath], otherwise: str) -> str:
    """`"*.attn?.to_q" matches 32 layers.`: the nearest pattern that fits some of `paths`, or `otherwise`."""
    vocabulary = sorted({part for path in paths for part in path.split(".")})
    repaired = ".".join(_nearest(part, vocabulary) for part in pattern.split("."))
    roots = sorted({path.partition(".")[0] for path in paths})
    first, _, rest = repaired.partition(".")
    tail = rest if rest and (first == "*" or first in roots) else repaired
    candidates = (repaired, f"*.{repaired}", f"*.{repaired}.*", *(f"{root}.*.{tail}" for root in roots))
    return next(
        (
            said
            for candidate in candidates
            if candidate != pattern and (said := _matches_some(candidate, paths))
        ),
        otherwise,
    )


def _matches_some(pattern: str, paths: Sequence[LayerPath]) -> str:
    count = sum(matches(pattern, path) for path in paths)
    return f'"{pattern}" matches {count} layer{"s" if count > 1 else ""}.' if count else ""


def _nearest(part: str, vocabulary: Iterable[str]) -> str:
    """`part` if some part fits it, else with a wildcard added (attn -> attn?), else the nearest part."""
    known = list(vocabulary)
    for candidate in (part, f"{part}?", f"{part}*", f"*{part}"):
        if candidate == "*" or any(matches(candidate, word) for word in known):
            return candidate
    near = difflib.get_close_matches(part, known, n=1, cutoff=0.6)
    return near[0] if near else part
