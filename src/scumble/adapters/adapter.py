"""Adapter: one named adapter in one model; inject it, use it, eject it without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from scumble.adapters.adapted import Adapted, check_strength
from scumble.adapters.biased import delta_of
from scumble.adapters.delta import Delta, DeltaSettings, wide
from scumble.adapters.dial import Dial
from scumble.adapters.families import FAMILIES
from scumble.adapters.layers import Place, places
from scumble.adapters.lora import LoraSettings
from scumble.adapters.memory import packed, runs
from scumble.adapters.operate import Layer
from scumble.adapters.state import AdapterState, LayerPath, LayerState, Metadata, not_finite
from scumble.adapters.targets import Matched, per_layer, resolve
from scumble.adapters.tokens import TokenRows, Vocabulary
from scumble.errors import AdapterError, NotFinite
from scumble.rng import Streams

_DEFAULT_SETTINGS = LoraSettings()
_STEP = 16
"""Numbers of fp32 in 64 bytes: parameters begin at multiples, as torch's own do."""


class Adapter:
    """One named adapter in one model.

        adapter = Adapter.inject({"unet": unet}, "attention", LoraSettings(rank=8))
        optimizer = torch.optim.AdamW(adapter.parameters())
        ...
        adapter.strength = 0.5
        adapter.eject()

    Several adapters may be in one model, ejected in any order. The base's own parameters are not touched, not
    even their `requires_grad`: freeze the base before training.

    Laws: after `eject` the model holds the very same module objects and gives bit-identical outputs; at
    strength 0 the outputs are bit-identical to the base's; `Adapter.load(model, adapter.state())` acts like
    `adapter`; an error in `inject`, `load`, `attach` or `load_state` leaves the model as it was.

    Used as a context manager, it is ejected at the end.
    """

    name: str
    deltas: Mapping[LayerPath, Delta]
    """The change to each layer, in the model's own order. Read only."""
    matched: Matched | None
    """What each target found; None for a loaded adapter."""
    tokens: TokenRows | None
    """The words that it brings with it; they are in the model while it acts at all (strength other than 0)."""

    def __init__(
        self,
        name: str,
        roots: Mapping[str, nn.Module],
        deltas: Mapping[LayerPath, Delta],
        *,
        strength: float | Tensor = 1.0,
        matched: Matched | None = None,
        tokens: TokenRows | None = None,
    ) -> None:
        """An adapter made of `deltas` and `tokens`, not yet attached. Most callers want `inject` or `load`."""
        if not name:
            raise AdapterError("An adapter needs a name that is not empty.")
        self.name = name
        self.deltas = dict(deltas)
        self.matched = matched
        self.tokens = tokens
        self._roots = dict(roots)
        self._strength = check_strength(strength)
        self._dial = Dial(self._strength)
        """What the layers read: the strength, or 0 while disabled."""
        self._places: dict[LayerPath, Place] | None = None

    @classmethod
    def inject(
        cls,
        roots: Mapping[str, nn.Module],
        targets: str | Sequence[str],
        settings: DeltaSettings = _DEFAULT_SETTINGS,
        *,
        name: str = "default",
        streams: Streams = Streams(0),  # noqa: B008 - a frozen value
        strength: float | Tensor = 1.0,
        within: Sequence[str] | None = None,
    ) -> Self:
        """A new, trainable adapter on the layers that `targets` mean.

        Its first values depend on the seed and on the layer's position in the model, not on the targets nor
        on torch's global generator; the model's outputs do not change yet.

        Args:
            roots: name -> module, e.g. `{"unet": unet, "text_encoder": text_encoder}`; denoiser first.
            targets: presets and patterns (see `targets.resolve`).
            settings: the family's settings, e.g. LoraSettings(rank=8).
            name: must be new in this model.
            streams: the source of the first values.
            strength: a number, or (B,), one per sample.
            within: the roots that bare presets and `*.` patterns look in; by default the first.

        Raises:
            NoLayerMatches: a target, or a pattern of the settings, matches no layer.
            AdapterError: the model already has an adapter of that name.
        """
        matched = resolve(roots, targets, within=within)
        paths = list(matched.layers)
        ranks = per_layer(settings.rank_pattern, settings.rank, paths, "rank_pattern")
        alphas = per_layer(settings.alpha_pattern, settings.alpha, paths, "alpha_pattern")
        family = FAMILIES.get(settings.family)
        order = {path: position for position, path in enumerate(places(roots))}
        deltas = {}
        for path, layer in matched.layers.items():
            alpha, generator = alphas[path], streams.generator("adapter", order[path])
            alpha = float(ranks[path]) if alpha is None else alpha
            deltas[path] = family.fresh(layer, settings, rank=ranks[path], alpha=alpha, generator=generator)
        return cls(name, roots, deltas, strength=strength, matched=matched).attach()

    @classmethod
    def load(
        cls,
        roots: Mapping[str, nn.Module],
        state: AdapterState,
        *,
        name: str = "default",
        strength: float | Tensor = 1.0,
        trainable: bool = False,
        vocabularies: Mapping[str, Vocabulary] | None = None,
        there: Mapping[LayerPath, Place] | None = None,
        fresh: bool = False,
    ) -> Self:
        """The adapter that `state` describes, in this model. Its tensors are copied, to fp32 at least.

        Args:
            roots: name -> module. Every layer of `state` must be there.
            state: the adapter as data.
            name: must be new in this model.
            strength: a number, or (B,), one per sample.
            trainable: False sets requires_grad False and eval mode (no dropout).
            vocabularies: text encoder's name -> its words, where the state's learned tokens come in.
            there: what `places(roots, norms=True)` gives, where the caller has just asked.
            fresh: the state comes from `formats.read` and goes nowhere else. Its numbers are known to be finite, and
                those that are fp32 already are taken, not copied.

        Raises:
            AdapterError: a layer is not there, its tensors don't fit, the name is taken, or the state holds
                learned tokens and there are no vocabularies, or a word is in one already.
            NotFinite: a tensor holds NaN or infinity.
            UnknownName: a layer's family is not known.
        """
        if state.tokens and vocabularies is None:
            raise AdapterError(
                f"This adapter also holds {len(state.tokens)} learned tokens "
                f"({', '.join(state.tokens)}), which can't be put into layers. Pass the model's vocabularies, "
                "or a state without tokens to use the layers alone."
            )
        if not state.layers and not state.tokens:
            raise AdapterError("This adapter changes no layer: its state is empty.")
        there = places(roots, norms=True) if there is None else there
        missing = [path for path in state.layers if path not in there]
        if missing:
            raise AdapterError(
                f"{len(missing)} of the adapter's {len(state.layers)} layers are not in this model, "
                f"e.g. {missing[0]!r}. The model's parts are {', '.join(roots)}; "
                "the adapter may be for another base."
            )
        if not fresh:
            _check_finite(state)
        deltas: dict[LayerPath, Delta] = {}
        mine = _widened(state.layers, take=fresh)
        for path in (path for path in there if path in mine):
            with naming(path):
                deltas[path] = delta_of(there[path].layer, mine[path], copy=False)
            _set_trainable(deltas[path], trainable)
        tokens = None
        if state.tokens and vocabularies is not None:
            tokens = TokenRows(name, roots, vocabularies, state.tokens, trainable=trainable)
        return cls(name, roots, deltas, strength=strength, tokens=tokens)._attach(there)

    # Being in the model

    @property
    def attached(self) -> bool:
        """Whether the adapter is in the model now."""
        return self._places is not None

    def attach(self) -> Self:
        """Put an ejected adapter back: same parameters, same strength. Costs no copy.

        Raises:
            AdapterError: it is already in the model, another adapter there has its name, or a layer is gone.
        """
        if self.attached:
            raise AdapterError(f"Adapter {self.name!r} is already in the model.")
        return self._attach(places(self._roots, norms=True))

    def _attach(self, there: Mapping[LayerPath, Place]) -> Self:
        for path, place in there.items():
            if isinstance(place.holder, Adapted) and self.name in place.holder:
                raise AdapterError(
                    f"This model already has an adapter {self.name!r} (at {path!r}). "
                    "Eject it first, or choose another name."
                )
        gone = [path for path in self.deltas if path not in there]
        if gone:
            raise AdapterError(
                f"The model has no layer {gone[0]!r} any more, so {self.name!r} can't be attached."
            )
        here = {path: there[path] for path in self.deltas}
        try:
            for path, place in here.items():
                holder = place.holder
                if not isinstance(holder, Adapted):
                    holder = Adapted(place.layer)
                    place.hang(holder)
                holder.add(self.name, self.deltas[path], self._dial)
            self._dial.value = self._strength
            if self.tokens is not None and self._dial.acts and not self.tokens.attached:
                self.tokens.attach()
        except BaseException:
            for place in here.values():
                _detach(self.name, place)
            raise
        self._places = here
        return self

    def eject(self) -> None:
        """Take the adapter out of the model, which is then as it was; `attach` puts it back.

        Raises:
            AdapterError: it is not in the model, or somebody replaced a layer in the meantime.
        """
        here = self._here("eject")
        for path, place in here.items():
            holder = place.holder
            if not isinstance(holder, Adapted) or self.name not in holder:
                raise AdapterError(
                    f"{path!r} was replaced by a {type(holder).__name__} after {self.name!r} was injected, "
                    "so it can't be ejected exactly. Undo that replacement first."
                )
        if self.tokens is not None and self.tokens.attached:
            self.tokens.eject()
        for place in here.values():
            _detach(self.name, place)
        self._places = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.attached:
            self.eject()

    # Strength

    @property
    def strength(self) -> float | Tensor:
        """How much of the change is applied: a number (1 is as trained), or (B,), one per sample. Setting it is one
        assignment, whatever the number of layers; no weight is copied."""
        return self._strength

    @strength.setter
    def strength(self, strength: float | Tensor) -> None:
        checked = check_strength(strength)
        self._apply_strength(checked)
        self._strength = checked

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this adapter, bit-identical, for the length of a `with` block."""
        self._apply_strength(0.0)
        try:
            yield
        finally:
            self._apply_strength(self._strength)

    @property
    def turn(self) -> int:
        """Its place in the order in which adapters are added up; 0 unless set. See `Dial.turn`."""
        return self._dial.turn

    @turn.setter
    def turn(self, turn: int) -> None:
        self._dial.turn = turn

    def _apply_strength(self, strength: float | Tensor) -> None:
        before, self._dial.value = self._dial.value, strength
        if self.tokens is not None and self.attached and self.tokens.attached != self._dial.acts:
            try:
                if self._dial.acts:
                    self.tokens.attach()
                else:
                    self.tokens.eject()
            except BaseException:
                self._dial.value = before
                raise

    # Values

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("<layer path>.<tensor name>", parameter), in the model's own order; e.g. "unet....to_q.down"; then
        ("tokens.<text encoder>.<placeholder>", rows)."""
        for path, delta in self.deltas.items():
            for name, parameter in delta.named_parameters():
                yield f"{path}.{name}", parameter
        if self.tokens is not None:
            for name, parameter in self.tokens.named_parameters():
                yield f"tokens.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, in the order of `named_parameters`."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def parameter_count(self) -> int:
        """How many numbers the adapter holds."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train(self, mode: bool = True) -> Self:
        """Switch the adapter's dropout on or off; the base's modules keep their mode."""
        for delta in self.deltas.values():
            delta.train(mode)
        return self

    def state(self, metadata: Metadata = Metadata()) -> AdapterState:  # noqa: B008 - a frozen value
        """The adapter as plain data: copies on the CPU. The strength is not part of it."""
        tokens = {} if self.tokens is None else self.tokens.state()
        live = {path: delta.live_state() for path, delta in self.deltas.items()}
        return AdapterState(_holding(live, packed(_tensors(live))), tokens, metadata)

    def load_state(self, state: AdapterState) -> None:
        """Take the values of `state` in place, so that optimizers keep their parameters. For resuming.

        Raises:
            AdapterError: the state has other layers, families, ranks, alphas or shapes; nothing is changed
                then.
            NotFinite: a tensor holds NaN or infinity.
        """
        mine, theirs = set(self.deltas), set(state.layers)
        words = set() if self.tokens is None else set(self.tokens.vectors)
        if mine != theirs or words != set(state.tokens):
            example = next(iter(sorted(mine ^ theirs) or sorted(words ^ set(state.tokens))))
            raise AdapterError(
                f"This state belongs to another adapter: {len(theirs - mine)} of its layers are not here, "
                f"{len(mine - theirs)} of those here are not in it, it holds {len(state.tokens)} tokens; "
                f"e.g. {example!r}."
            )
        pairs = []
        for path, delta in self.deltas.items():
            with naming(path):
                pairs += delta.pairs(state.layers[path])
        _check_finite(state)
        if self.tokens is not None:
            self.tokens.load_state(state.tokens)
        with torch.no_grad():
            # as one call: hundreds would take longer than what they copy
            torch._foreach_copy_([into for into, _ in pairs], [value for _, value in pairs])

    @torch.no_grad()
    def idle_layers(self) -> list[LayerPath]:
        """The layers whose change is exactly zero: all of them before training, none after."""
        layers = places(self._roots, norms=True)
        return [path for path, delta in self.deltas.items() if not _changes(delta, layers[path].layer)]

    def touches(self, layers: Iterable[nn.Module]) -> bool:
        """Whether the adapter is attached to one of these very layers."""
        mine = {id(place.layer) for place in (self._places or {}).values()}
        return any(id(layer) in mine for layer in layers)

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.deltas)

    def __repr__(self) -> str:
        families = ", ".join(sorted({delta.family for delta in self.deltas.values()}))
        return (
            f"<Adapter {self.name!r}: {families or 'tokens only'}, {len(self)} layers, "
            f"{self.parameter_count:,} parameters, "
            f"{'attached' if self.attached else 'not attached'}>"
        )

    def _here(self, verb: str) -> dict[LayerPath, Place]:
        if self._places is None:
            raise AdapterError(f"Adapter {self.name!r} is not in the model, so there is nothing to {verb}.")
        return self._places


def _changes(delta: Delta, layer: Layer) -> bool:
    """Whether anything of the change is not zero."""
    bias = delta.bias_delta(layer.bias)
    return bool(delta.weight_delta(layer.weight).any()) or (bias is not None and bool(bias.any()))


def _detach(name: str, place: Place) -> None:
    """Take the delta called `name` off a layer, and the wrapper with it when it was the last."""
    holder = place.holder
    if isinstance(holder, Adapted):
        if name in holder:
            holder.remove(name)
        if not holder.dials:
            place.hang(place.layer)


def _set_trainable(delta: Delta, trainable: bool) -> None:
    """`delta.requires_grad_(trainable).train(trainable)`, which would take a good part of a load's time."""
    for module in delta.modules():
        module.__dict__["training"] = trainable
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad = trainable


@contextmanager
def naming(path: LayerPath) -> Iterator[None]:
    """Put the layer's path before the text of an AdapterError."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(f"{path}: {error}") from error


def _widened(layers: Mapping[LayerPath, LayerState], take: bool) -> dict[LayerPath, LayerState]:
    """The same layers in fp32 at least and in memory of their own, each tensor at a multiple of 64 bytes; `take`: those
    that are so already stay where they are."""
    tensors = [tensor.detach() for tensor in _tensors(layers)]
    for flat, members in runs(tensors, _STEP):
        begin, dtype = tensors[members[0]].data_ptr(), wide(flat.dtype)
        if take and flat.dtype == dtype and flat.data_ptr() == begin and begin % 64 == 0:
            continue
        mine = torch.empty(flat.shape, dtype=dtype, device="cpu").copy_(flat)
        pieces = mine.split([tensors[index].numel() for index in members])
        for index, piece in zip(members, pieces, strict=True):
            tensors[index] = piece.view(tensors[index].shape)
    return _holding(layers, tensors)


def _tensors(layers: Mapping[LayerPath, LayerState]) -> list[Tensor]:
    return [tensor for layer in layers.values() for tensor in layer.tensors.values()]


def _holding(
    layers: Mapping[LayerPath, LayerState], tensors: Iterable[Tensor]
) -> dict[LayerPath, LayerState]:
    """The same layers with these tensors in the places of their own, which `_tensors` lists."""
    made = iter(tensors)
    return {
        path: LayerState(
            layer.family,
            layer.rank,
            layer.alpha,
            {name: next(made) for name in layer.tensors},
            layer.rank_stabilized,
        )
        for path, layer in layers.items()
    }


def _check_finite(state: AdapterState) -> None:
    bad = not_finite(
        {
            f"{path}.{name}": tensor
            for path, layer in state.layers.items()
            for name, tensor in layer.tensors.items()
        }
    )
    if bad:
        raise NotFinite(
            f"{len(bad)} tensors hold NaN or infinity, first {bad[0]!r}. The model was not changed. "
            "The adapter is broken: take an earlier checkpoint, or train again with a lower learning rate."
        )
