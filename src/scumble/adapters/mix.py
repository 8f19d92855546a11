"""Mixing: several adapters become one, layer by layer, by a method with a name.

Legend: D_i the change of adapter i to one weight, s_i its strength there.

    concat   sum of s_i D_i, exactly: ranks are laid side by side and add up
    svd      the same sum, cut to a rank: nothing of that rank is nearer
    linear   the factors themselves are added, rank stays: (sum of q_i up_i) @ (sum of q_i down_i), q_i^2 = |s_i|.
             Cheap, and not the sum of the changes: the products of up_i with down_j are in it too
    ties     keep the largest entries of each s_i D_i, elect a sign for every entry, average those that agree
             (Yadav et al., 2023, arXiv:2306.01708)
    dare     drop entries of each D_i by chance, enlarge the rest, add (Yu et al., 2023, arXiv:2311.03099)

The last two work on full matrices, one layer at a time, and their result has no small rank: as a LoRA it is
cut to one, and `Mixed.kept` says what that cost. Merged into a base it needs no cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from scumble.adapters.factors import (
    Factors,
    Keep,
    Singular,
    Weights,
    change_of,
    decompose,
    factors_of,
    refuse_other_than_weights,
    shape_of,
    told_shape,
)
from scumble.adapters.lora import Lora
from scumble.adapters.resize import Resized, resize
from scumble.adapters.state import AdapterState, LayerPath, LayerState, Metadata, TokenState
from scumble.adapters.targets import per_layer
from scumble.errors import AdapterError, ConfigError, UnknownName, WrongBase
from scumble.rng import Streams
from scumble.settings import Settings

CANCELLED = 1e-6
"""A sum below this share of its parts is their rounding: the parts took each other away."""


@dataclass(frozen=True)
class Part:
    """One adapter of a mix."""

    state: AdapterState
    strength: float = 1.0
    """Its factor; negative takes it away."""
    blocks: Mapping[str, float] = field(default_factory=dict)
    """Other strengths for some layers: pattern -> strength, e.g. {"unet.up_blocks.*": 0.3}. The first that fits
    wins."""
    name: str = "an adapter"
    """What messages call it."""

    def __post_init__(self) -> None:
        """
        Raises:
            AdapterError: a strength is not finite.
        """
        for strength in (self.strength, *self.blocks.values()):
            if not math.isfinite(strength):
                raise AdapterError(f"A strength must be finite; that of {self.name} is {strength}.")

    def strengths(self) -> dict[LayerPath, float]:
        """Its strength at each of its layers.

        Raises:
            NoLayerMatches: a pattern in `blocks` fits none of them.
        """
        return per_layer(self.blocks, self.strength, list(self.state.layers), f"The strengths of {self.name}")


class MixSettings(Settings):
    """How adapters are mixed."""

    method: str = "concat"
    """concat, svd, linear, ties or dare."""
    rank: int | None = Field(default=None, ge=1)
    """The result's rank. Empty: concat and linear are not cut, the others get the largest rank among the parts."""
    density: float = Field(default=0.5, gt=0, le=1)
    """Share of entries that ties and dare keep."""
    seed: int = Field(default=0, ge=0)
    """Which entries dare drops."""


@dataclass(frozen=True)
class Share:
    """What one adapter adds to one layer."""

    path: LayerPath
    layer: LayerState
    strength: float
    number: int
    """The adapter's place in the mix."""
    weights: Weights | None

    @cached_property
    def factors(self) -> Factors:
        """strength * change, as a thin product."""
        found = factors_of(self.path, self.layer, self.weights)
        return Factors(self.strength * found.left, found.right)

    @cached_property
    def dense(self) -> Tensor:
        """strength * change, (out, in) fp32 or fp64."""
        return self.strength * change_of(self.path, self.layer, self.weights).flatten(1)


@dataclass(frozen=True)
class Method:
    """A way to mix."""

    combine: Callable[[Sequence[Share], MixSettings], Factors | Tensor]
    """The shares of one layer -> the change that is wanted, thin or full (out, in)."""
    cut: bool
    """Whether the result is cut to the largest rank among the parts when no rank is asked for."""


@dataclass(frozen=True)
class Mixed:
    """Several adapters as one."""

    state: AdapterState
    kept: Mapping[LayerPath, float]
    """Layer -> share of the wanted change's squared Frobenius norm that is in the state, in [0, 1]."""
    vanished: tuple[LayerPath, ...]
    """Layers at which the parts cancel: they are not in the state."""


def mix(parts: Sequence[Part], settings: MixSettings | None = None, weights: Weights | None = None) -> Mixed:
    """One LoRA that does what `parts` do together.

    Law: by "concat", the change of the result is the sum of strength * change, to fp32 rounding. Layers that only
    some adapters have are taken from those; ranks, alphas and families may differ.

    Args:
        parts: at least one.
        weights: the base's weights, for families whose change depends on them.

    Raises:
        WrongBase: the adapters are for different bases.
        AdapterError: the parts cancel everywhere; a learned token is in two of them; "linear" with different
            ranks; or a family needs `weights`.
        NoLayerMatches: a pattern of per-block strengths fits nothing.
    """
    settings = settings or MixSettings()
    method = method_named(settings.method)
    layers: dict[LayerPath, LayerState] = {}
    kept: dict[LayerPath, float] = {}
    vanished = []
    for path, found in shares_of(parts, weights).items():
        shares = _one_layer(found)
        wanted = method.combine(shares, settings)
        if _cancelled(wanted, shares):
            vanished.append(path)
            continue
        rank = settings.rank or (max(share.factors.rank for share in shares) if method.cut else None)
        shape = shape_of(path, shares[0].layer, weights)
        layers[path], kept[path] = _as_lora(wanted, rank, shape)
    tokens = _tokens(parts)
    if not layers:
        raise AdapterError(
            f"Nothing is left: {_named(parts)} cancel in all {len(vanished)} layers."
            if vanished
            else f"Nothing to mix: {_named(parts)} have no layer at a strength other than 0."
        )
    return Mixed(AdapterState(layers, tokens, _metadata(parts)), kept, tuple(vanished))


def subtract(
    minuend: Part, subtrahend: Part, keep: Keep | None = None, weights: Weights | None = None
) -> tuple[Mixed, Resized]:
    """What `minuend` does and `subtrahend` does not: the difference of their changes, cut as `keep` says.

    `keep` None cuts nothing that can be told from rounding. Learned tokens are those of `minuend`.

    Raises:
        AdapterError: nothing is left. Else as `mix`.
    """
    negative = Part(
        replace(subtrahend.state, tokens={}),
        -subtrahend.strength,
        {pattern: -strength for pattern, strength in subtrahend.blocks.items()},
        subtrahend.name,
    )
    mixed = mix((minuend, negative), MixSettings(method="concat"), weights)
    # a limit that no rank reaches: `resize` still drops directions that are rounding
    limit = keep or Keep(energy=1 - 1e-12)
    return mixed, resize(mixed.state, limit, weights)


def shares_of(parts: Sequence[Part], weights: Weights | None = None) -> dict[LayerPath, list[Share]]:
    """What each layer gets from whom; adapters of strength 0 there are left out.

    Raises:
        WrongBase: two adapters change weights of different shapes, or name different families of bases.
        ConfigError: there are no parts.
    """
    if not parts:
        raise ConfigError("There is no adapter to mix. Name at least one.")
    families = {p.state.metadata.base_family: p.name for p in parts if p.state.metadata.base_family}
    if len(families) > 1:
        raise WrongBase(
            "These adapters are for different bases: "
            + ", ".join(f"{name} for {family}" for family, name in families.items())
            + ". Their changes can't be added."
        )
    shares: dict[LayerPath, list[Share]] = {}
    shapes: dict[LayerPath, tuple[tuple[int, ...], str]] = {}
    for number, part in enumerate(parts):
        for path, strength in part.strengths().items():
            layer = part.state.layers[path]
            refuse_other_than_weights(path, layer)
            mine = told_shape(path, layer)
            if mine is not None:
                shape, first = shapes.setdefault(path, (mine, part.name))
                if mine[:2] != shape[:2]:
                    raise WrongBase(
                        f"These adapters are for different bases: {path!r} is {shape} in {first} and {mine} in "
                        f"{part.name}. Their changes can't be added."
                    )
            if strength != 0.0:
                shares.setdefault(path, []).append(Share(path, layer, strength, number, weights))
    return shares


def combined_change(shares: Sequence[Share], settings: MixSettings) -> Tensor:
    """The wanted change of one layer as a full matrix (out, in): for merging into a base, without a cut
    unless a rank is asked for."""
    wanted = method_named(settings.method).combine(_one_layer(shares), settings)
    if settings.rank is not None:
        singular = _singular(wanted)
        k = settings.rank
        return (singular.left[:, :k] * singular.values[:k]) @ singular.right[:k]
    return wanted.dense() if isinstance(wanted, Factors) else wanted


def method_named(name: str) -> Method:
    """A way to mix, by its name.

    Raises:
        UnknownName: there is none called so.
    """
    if name not in METHODS:
        raise UnknownName("way to mix", name, METHODS)
    return METHODS[name]


def _one_layer(shares: Sequence[Share]) -> list[Share]:
    """Copies: the wide factors that they keep go when the layer is done, so that memory stays that of one layer."""
    return [replace(share) for share in shares]


def _concat(shares: Sequence[Share], settings: MixSettings) -> Factors:
    factors = [share.factors for share in shares]
    return Factors(torch.cat([f.left for f in factors], 1), torch.cat([f.right for f in factors]))


def _linear(shares: Sequence[Share], settings: MixSettings) -> Factors:
    factors = [(share, factors_of(share.path, share.layer, share.weights)) for share in shares]
    ranks = {found.rank for _, found in factors}
    if len(ranks) > 1:
        raise AdapterError(
            f"linear adds factors, which needs equal ranks; {shares[0].path!r} has {sorted(ranks)}. "
            "Use concat (exact) or svd."
        )
    left, right = torch.zeros(()), torch.zeros(())
    for share, found in factors:
        # alpha / rank is part of a change's size: divided over both factors, like the strength
        scale = share.layer.scale
        whole = share.strength * scale
        root = abs(whole) ** 0.5
        left = left + root * (found.left / scale if scale else found.left)
        right = right + root * found.right * (1 if whole >= 0 else -1)
    return Factors(left, right)


def _ties(shares: Sequence[Share], settings: MixSettings) -> Tensor:
    trimmed = torch.stack([_largest(share.dense, settings.density) for share in shares])
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == elected
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(change: Tensor, density: float) -> Tensor:
    """Its largest entries by size, that share of them; the rest zero. Trimmed per weight, not over all layers."""
    count = int(density * change.numel())
    flat = torch.zeros(change.numel(), dtype=change.dtype)
    places = change.abs().flatten().topk(count).indices
    flat[places] = change.flatten()[places]
    return flat.view_as(change)


def _dare(shares: Sequence[Share], settings: MixSettings) -> Tensor:
    total = torch.zeros(())
    for share in shares:
        # by the layer's name and the adapter's place: the same entries whatever the order of the layers
        rng = Streams(settings.seed).generator(f"dare/{share.path}", share.number)
        mask = torch.rand(share.dense.shape, generator=rng) < settings.density
        total = total + share.dense * mask / settings.density
    return total


METHODS: Mapping[str, Method] = {
    "concat": Method(_concat, cut=False),
    "svd": Method(_concat, cut=True),
    "linear": Method(_linear, cut=False),
    "ties": Method(_ties, cut=True),
    "dare": Method(_dare, cut=True),
}


def _as_lora(wanted: Factors | Tensor, rank: int | None, shape: Sequence[int]) -> tuple[LayerState, float]:
    """(the layer, share of the wanted change's energy in it)."""
    if isinstance(wanted, Factors) and (rank is None or wanted.rank <= rank):
        return Lora.layer(wanted.left.float(), wanted.right.float(), shape), 1.0
    singular = _singular(wanted)
    rank = min(rank or len(singular.values), len(singular.values))
    return singular.layer(rank, shape), singular.energy(rank)


def _singular(wanted: Factors | Tensor) -> Singular:
    return wanted.singular() if isinstance(wanted, Factors) else decompose(wanted)


def _cancelled(wanted: Factors | Tensor, shares: Sequence[Share]) -> bool:
    size = wanted.norm() if isinstance(wanted, Factors) else float(wanted.norm())
    return bool(size <= CANCELLED * sum(share.factors.norm() for share in shares))


def _named(parts: Sequence[Part]) -> str:
    return ", ".join(f"{part.name} ({part.strength:g})" for part in parts)


def _tokens(parts: Sequence[Part]) -> dict[str, TokenState]:
    """Every adapter's learned tokens; two that share a name must be the same."""
    tokens: dict[str, tuple[TokenState, str]] = {}
    for part in parts:
        for name, token in part.state.tokens.items():
            mine, owner = tokens.setdefault(name, (token, part.name))
            same = mine.vectors.keys() == token.vectors.keys() and all(
                torch.equal(vector, token.vectors[encoder]) for encoder, vector in mine.vectors.items()
            )
            if not same:
                raise AdapterError(
                    f"{owner} and {part.name} both learned a token {name!r}, with different vectors. A file can "
                    "hold one: rename it in one of them."
                )
    return {name: token for name, (token, _) in tokens.items()}


def _metadata(parts: Sequence[Part]) -> Metadata:
    """What the adapters say of their base, where they agree or only one speaks."""

    def common(name: str) -> str:
        said = {text for part in parts if (text := getattr(part.state.metadata, name))}
        return said.pop() if len(said) == 1 else ""

    return Metadata(
        base_name=common("base_name"),
        base_fingerprint=common("base_fingerprint"),
        base_family=common("base_family"),
        prediction_type=common("prediction_type"),
    )
