"""Needs: what a base is made of, and what it takes in memory to draw and to train, told without one of its weights.

Every component is built on torch's meta device, where tensors have shapes and no numbers: parameters are counted, and
one training step is played through to count what it keeps for the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scumble.adapters import Adapter, LoraSettings
from scumble.errors import ModelError
from scumble.models import FAMILIES
from scumble.models.codes import CODES, NONE
from scumble.models.configs import DENOISERS, BaseFacts, Configs, weighty
from scumble.models.dtypes import Dtypes, own_dtypes
from scumble.models.family import BaseModel, Components, Deferred, Frame
from scumble.models.quantized import layers_held

RANK = 16
"""Of the LoRA on the denoiser's attention that training is counted for."""

TRAINED_BYTES = 4 * 4
"""Of a trained number: itself, its gradient, and AdamW's two means, in fp32."""


BLOCKS = 16
"""What is recomputed at a time with gradient checkpointing is taken to be this part of the whole; denoisers have 16
blocks and more."""


@dataclass(frozen=True)
class Part:
    """A component with weights."""

    name: str
    """"transformer" """
    kind: str
    """Its class in diffusers or transformers."""
    parameters: int
    size: int
    """Bytes of its weights and of the tables that it keeps beside them."""
    late: bool = False
    """Loaded when a prompt is first read, and let go of once all that it says is cached."""
    held: Mapping[str, int] = field(default_factory=dict)
    """Code -> bytes where its blocks are held in few bits; empty of what is never held so."""


@dataclass(frozen=True)
class Needs:
    """What a base takes in memory, in bytes."""

    parts: tuple[Part, ...]
    """The denoiser first."""
    dtypes: Dtypes
    """What the weights are counted in."""
    trained: int = 0
    """Numbers that a LoRA of rank `RANK` on the denoiser's attention has."""
    kept: Mapping[bool, int] = field(default_factory=dict)
    """With gradient checkpointing or without -> what one training step keeps of one picture of the base's own size for
    the backward pass. Empty where that can't be told."""

    @property
    def weights(self) -> int:
        """Of all parts together."""
        return sum(part.size for part in self.parts)

    @property
    def resident(self) -> int:
        """Of the parts that are there while the denoiser trains on cached texts."""
        return sum(part.size for part in self.parts if not part.late)

    def drawing(self) -> int:
        """At least: the weights of all parts."""
        return self.weights

    def training(self, *, checkpointing: bool, quantization: str = NONE) -> int | None:
        """At least, for one picture at a time: what is more of reading the prompts, with all parts, and a step without
        those that are let go of then; None where that can't be told."""
        kept = self.kept.get(checkpointing)
        if kept is None:
            return None
        # recomputed in the backward pass, block by block: of `BLOCKS` one at a time
        again = self.kept[False] // BLOCKS if checkpointing else 0
        less = sum(part.size - part.held.get(quantization, part.size) for part in self.parts)
        return max(self.weights, self.resident + TRAINED_BYTES * self.trained + kept + again) - less


def needs_of(
    configs: Configs,
    facts: BaseFacts,
    dtype: torch.dtype = torch.bfloat16,
    tokenizers: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str | torch.dtype] | None = None,
) -> Needs:
    """The needs of a base that `facts` finds nothing wrong with.

    `tokenizers` as its folder has them; without them what training keeps can't be told. `dtype` and `dtypes` as for
    `load_base`.

    Raises:
        ModelError: a component is of a class that isn't installed, or its config can't be built; or `dtypes` names
            one that the base has not.
        UnknownName: `dtypes` names a dtype that there is not.
    """
    kept = Dtypes(dtype, own_dtypes(dtypes, facts.components, facts.name))
    modules = {name: skeleton(name, configs.parts[name], configs.name) for name in weighty(configs)}
    order = sorted(modules, key=lambda name: (name not in DENOISERS, name))
    parts = tuple(
        Part(
            name,
            type(modules[name]).__name__,
            sum(p.numel() for p in modules[name].parameters()),
            size_in(modules[name], kept.of(name)),
            name in facts.deferred,
            _held(modules[name], kept.of(name)) if name in DENOISERS else {},
        )
        for name in order
    )
    found = Needs(parts, kept)
    if not tokenizers:
        return found
    base = on_meta(configs, facts, modules, tokenizers, kept)
    return replace(found, trained=_trained(base), kept={on: kept_by(base, on) for on in (False, True)})


def size_in(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module whose floating-point numbers are kept in `dtype`: parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors)


def _held(module: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Code -> bytes of the module where its blocks are held in it."""
    counts = [layer.weight.numel() for layer in layers_held(module).values()]
    if not counts:
        return {}
    rest = size_in(module, dtype) - sum(counts) * dtype.itemsize
    return {name: rest + sum(map(code.size, counts)) for name, code in CODES.items()}


def skeleton(name: str, config: Mapping[str, Any], base: str) -> nn.Module:
    """The module of a config, on the meta device."""
    import diffusers
    import transformers

    kind = str(config["_class_name"])
    cls: Any = getattr(diffusers, kind, None) or getattr(transformers, kind, None)
    if cls is None:
        raise ModelError(
            f"{base} has a component of class {kind!r}, which is not installed. Upgrade diffusers."
        )
    entries = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            module: nn.Module = (
                cls.from_config(dict(config))
                if issubclass(cls, diffusers.ModelMixin)
                else cls(cls.config_class.from_dict(entries))
            )
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{base}: {name}/config.json describes no {kind}: {error}") from error
    return module


def on_meta(
    configs: Configs,
    facts: BaseFacts,
    modules: Mapping[str, nn.Module],
    tokenizers: Mapping[str, Any],
    dtypes: Dtypes,
) -> BaseModel:
    """The base of these modules, on the meta device. Components that it would load later it loads later here too."""
    import diffusers

    scheduler = dict(configs.parts["scheduler"])
    own = getattr(diffusers, str(scheduler["_class_name"])).from_config(scheduler)
    for name, module in modules.items():
        nn.Module.to(module, dtypes.of(name))
    later = {
        name: Deferred(functools.partial(lambda module: (module, ()), modules[name]), ())
        for name in facts.deferred
        if name in modules
    }
    parts = Components(
        configs.name,
        {name: module for name, module in modules.items() if name not in later},
        tokenizers,
        own,
        fingerprint="0" * 64,  # there is nothing to take it of
        options=configs.options,
        deferred=later,
        dtypes=dtypes.own,
    )
    return FAMILIES.get(facts.family).load(parts, dtype=dtypes.common, device=torch.device("meta"))


def _trained(base: BaseModel) -> int:
    with Adapter.inject(base.roots, "attention", LoraSettings(rank=RANK)) as adapter:
        return adapter.parameter_count


def kept_by(base: BaseModel, checkpointing: bool) -> int:
    """Bytes that autograd keeps in one training step on one picture: each storage once, and no weight. Attention is
    counted as GPUs compute it, without the matrix of all pairs."""
    set_attention = getattr(base, "set_attention", lambda kind: None)
    set_attention("sdpa")
    weights = {_storage(p) for root in base.roots.values() for p in root.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor)  # held, so that no other is given its place
        return tensor

    side = base.resolution // base.latent_factor
    latents = torch.zeros(1, base.latent_channels, side, side, device=base.device)
    t = base.prediction.from_uniform(torch.full((1,), 0.5)).to(base.device)
    frame = Frame.plain(1, base.resolution, base.resolution)
    with torch.no_grad():
        said = base.encode_prompts(["a picture"])
    with Adapter.inject(base.roots, "attention", LoraSettings(rank=RANK)):
        base.train_memory(checkpointing=checkpointing)
        with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            base.denoise(latents, t, said, frame)
        base.train_memory(checkpointing=False)
        return sum(
            tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights
        )


class FusedAttention(TorchFunctionMode):
    """Attention that keeps what flash attention keeps (Dao et al., 2022), and computes nothing."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        told = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **told)
        names = ("query", "key", "value")
        found = [args[n] if n < len(args) else told[name] for n, name in enumerate(names)]
        return _Fused.apply(*found)  # type: ignore[no-untyped-call]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        sums = query.new_zeros(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
