"""Delta: a trainable change to one frozen layer, seen in two ways that must agree.

Legend: W the base's weight, x the layer's input, y = base(x) its output, r the rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from scumble.adapters.blank import set_up
from scumble.adapters.memory import packed
from scumble.adapters.operate import Layer, compute_dtype, device_of, operate
from scumble.adapters.state import LayerState, scale_of
from scumble.errors import AdapterError
from scumble.settings import Settings


class DeltaSettings(Settings):
    """What every family of adapters can be told."""

    family: str
    """The adapter family: a name in the registry."""
    rank: int = Field(default=4, ge=1)
    """Size of the change: more learns more, and makes a larger file. 4 to 32 are usual."""
    alpha: float | None = Field(default=None, gt=0)
    """The change is multiplied by alpha / rank. Empty: alpha is each layer's rank, the factor 1."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Another rank for some layers: pattern -> rank, e.g. { "*.attn2.*" = 8 }. The first that fits wins."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Another alpha for some layers: pattern -> alpha. The first that fits wins."""


class Delta(nn.Module, ABC):
    """A trainable change to one frozen layer, seen in two ways that must agree.

    `weight_delta` is the change to W: for merging, for files, for algebra between adapters.
    `output_delta` is the change to y = base(x): for training and for mixing adapters.

    Law: `output_delta(x, base(x), base) == operate(base, x, weight_delta(W))`, in eval mode (dropout off).

    A family writes `shapes`, `reset` and `weight_delta`; with these it trains, merges, mixes and saves.
    `output_delta` and `forward` are there to be written faster.

    Parameters are never stored below fp32, whatever the base's dtype: in fp16 small updates would round away,
    and gradient scaling refuses them. They are cast to the compute dtype (autocast's when it is on, else the
    input's) when used. `module.to(torch.float16)` on the model moves them and leaves their dtype.
    """

    family: ClassVar[str]
    """The family's name in the registry and in files."""
    settings: ClassVar[type[DeltaSettings]]
    """The family's settings section."""
    rank: int
    alpha: float
    rank_stabilized: bool
    scale: float
    """What the change is multiplied by: alpha / r, or alpha / sqrt(r) when rank-stabilized."""
    gain: Tensor | None = None
    """`scale` once more, 0-dim fp32, for compiled code (see `compiling.py`). None: nobody asked."""
    rank_sides: ClassVar[Mapping[str, int]] = {}
    """Parameter -> its dimension that is the rank, where code compiled for one rank may serve another."""
    reads_output: ClassVar[bool] = True
    """Whether `output_delta` looks at y."""

    def __init__(
        self, tensors: Mapping[str, Tensor], *, rank: int, alpha: float, rank_stabilized: bool = False
    ) -> None:
        """`tensors` become the parameters, copied to fp32 (or kept when they are already fp32 or fp64)."""
        set_up(self)
        alpha = float(alpha)
        scale = scale_of(rank, alpha, rank_stabilized)
        # past torch's own __setattr__ and its questions, hundreds of which take a good part of a load's time
        self.__dict__.update(rank=rank, alpha=alpha, rank_stabilized=rank_stabilized, scale=scale)
        for name, tensor in tensors.items():
            kept = wide(tensor.dtype)
            self._parameters[name] = nn.Parameter(tensor if tensor.dtype == kept else tensor.to(kept))

    # What a family writes

    @classmethod
    @abstractmethod
    def shapes(cls, base: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter, for this layer at this rank, by the default settings."""

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Fill the parameters with their values before training, at which `weight_delta` is zero."""

    @abstractmethod
    def weight_delta(self, weight: Tensor) -> Tensor:
        """The change to W: fp32 (or fp64), the shape of `weight`, scale included, strength not."""

    # What a family may write when its tensors have several forms

    @classmethod
    def fresh_shapes(cls, base: Layer, rank: int, settings: DeltaSettings) -> dict[str, tuple[int, ...]]:
        """As `shapes`, by these settings."""
        return cls.shapes(base, rank)

    @classmethod
    def expected_shapes(cls, base: Layer, state: LayerState) -> dict[str, tuple[int, ...]]:
        """As `shapes`, in the form that the state's tensors have: what they must be to fit this layer."""
        return cls.shapes(base, state.rank)

    def start(self, base: Layer, generator: torch.Generator) -> None:
        """As `reset`, where the first values depend on the layer's own."""
        self.reset(generator)

    def constants(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What the family computes from W and its parameters and holds constant in the backward pass. Every
        use goes through this method."""
        return ()

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        """The change to the layer's bias, (out,), which `output_delta` then has in it; None where there is none."""
        return None

    # What a family may write faster

    def output_delta(self, x: Tensor, y: Tensor, base: Layer) -> Tensor:
        """The change to y = base(x), in y's shape; strength not included."""
        return operate(base, x, self.weight_delta(base.weight).to(compute_dtype(x)))

    def forward(self, x: Tensor, base: Layer, strength: float | Tensor = 1.0) -> Tensor:
        """The changed layer: base(x) + strength * output_delta.

        Args:
            x: the layer's input.
            base: the layer.
            strength: a number, or one per sample as a tensor (B, 1, ..., 1) with as many dimensions as `x`.
        """
        y = base(x)
        return y + (strength * self.output_delta(x, y, base)).to(y.dtype)

    def add_to(self, total: Tensor, x: Tensor, y: Tensor, base: Layer, strength: float | Tensor) -> None:
        """total += strength * output_delta, in place and without gradients.

        Args:
            total: as y; y itself where nobody needs it afterwards.
            strength: as for `forward`.
        """
        total.add_((strength * self.output_delta(x, y, base)).to(total.dtype))

    def add_change(self, total: Tensor, weight: Tensor, strength: float) -> None:
        """total += strength * weight_delta(weight), in place.

        Args:
            total: fp32 (or fp64), the shape of `weight`.
            weight: the base's, in its own dtype.
        """
        total.add_(self.weight_delta(weight.to(total.dtype)), alpha=strength)

    def largest(self) -> float:
        """A number that none of `weight_delta` exceeds, whatever the weight; infinity where the family can't say."""
        return math.inf

    @classmethod
    def thin(cls, state: LayerState) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
        """The change as a product of thin matrices, (out, r) and (r, in * k * k), scale included, and the shape
        of the weight that it fits: where it is one whatever the base's weight is. None for other families."""
        return None

    # What every family has

    @classmethod
    def fresh(
        cls, base: Layer, settings: DeltaSettings, *, rank: int, alpha: float, generator: torch.Generator
    ) -> Self:
        """An untrained delta for `base`, on its device, with requires_grad True."""
        shapes = cls.fresh_shapes(base, rank, settings)
        tensors = {name: torch.empty(shape, device="cpu") for name, shape in shapes.items()}
        delta = cls(tensors, rank=rank, alpha=alpha, **cls.options(settings))
        with torch.no_grad():
            delta.start(base, generator)
        return delta.to(device_of(base))

    @classmethod
    def from_state(cls, base: Layer, state: LayerState, *, copy: bool = True) -> Self:
        """The delta that `state` describes, on the device of `base`. The tensors are copied; without `copy`, those
        that are fp32 or fp64 and on that device are taken as they are.

        Raises:
            AdapterError: the tensors are not those of this family, or don't fit the layer.
        """
        cls.check_fits(base, state)
        device = device_of(base)
        tensors = {
            name: tensor.to(device, wide(tensor.dtype), copy=copy) for name, tensor in state.tensors.items()
        }
        return cls(tensors, rank=state.rank, alpha=state.alpha, rank_stabilized=state.rank_stabilized)

    def state(self) -> LayerState:
        """This change as plain data: a copy on the CPU, in the parameters' dtype; `from_state` inverts it."""
        live = self.live_state()
        return replace(live, tensors=dict(zip(live.tensors, packed([*live.tensors.values()]), strict=True)))

    def live_state(self) -> LayerState:
        """As `state`, of the parameters themselves: who trains changes it."""
        tensors = {name: value.detach() for name, value in self._parameters.items() if value is not None}
        return LayerState(self.family, self.rank, self.alpha, tensors, self.rank_stabilized)

    def pairs(self, state: LayerState) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, its value in `state`) of each, so that an optimizer's parameters can take other values in place.

        Raises:
            AdapterError: family, rank, alpha or shapes differ.
        """
        mine: tuple[Any, ...] = (self.family, self.rank, self.alpha, self.rank_stabilized)
        theirs = (state.family, state.rank, state.alpha, state.rank_stabilized)
        if mine != theirs:
            words = ("family", "rank", "alpha", "rank_stabilized")
            said = (f"{w} {a} here, {b} there" for w, a, b in zip(words, mine, theirs, strict=True) if a != b)
            raise AdapterError(f"This state belongs to another adapter: {'; '.join(said)}.")
        return paired(self._parameters, state.tensors)

    @classmethod
    def options(cls, settings: DeltaSettings) -> dict[str, Any]:
        """The settings that this family's constructor takes, besides rank and alpha."""
        return {}

    @classmethod
    def check_fits(cls, base: Layer, state: LayerState) -> None:
        """
        Raises:
            AdapterError: the tensors of `state` are not those of this family, or don't fit the layer.
        """
        expected = cls.expected_shapes(base, state)
        given = {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}
        if expected != given:
            raise AdapterError(
                f"The {cls.family} tensors {_shapes(given)} don't fit a layer that takes "
                f"{_shapes(expected)} at rank {state.rank}. The adapter was made for another base model."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `pipeline.to(torch.float16)` reaches every parameter of the model: it may move these, never round.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrower = moved.is_floating_point() and moved.dtype.itemsize < torch.float32.itemsize
            return tensor.to(moved.device) if narrower else moved

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rank={self.rank}, alpha={self.alpha:g}" + (
            ", rank_stabilized" if self.rank_stabilized else ""
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameters whose file has `dtype`: fp32, or fp64."""
    return dtype if dtype == torch.float64 else torch.float32


def paired(
    parameters: Mapping[str, nn.Parameter | None], values: Mapping[str, Tensor]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Those of one name together.

    Raises:
        AdapterError: names or shapes differ.
    """
    mine = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    same = mine.keys() == values.keys()
    if not same or any(parameter.shape != values[name].shape for name, parameter in mine.items()):
        here, there = (
            {name: tuple(tensor.shape) for name, tensor in some.items()} for some in (mine, values)
        )
        raise AdapterError(
            f"This state belongs to another adapter: tensors {_shapes(here)} here, {_shapes(there)} there."
        )
    return [(parameter, values[name]) for name, parameter in mine.items()]


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return (
        ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items())) or "none"
    )
