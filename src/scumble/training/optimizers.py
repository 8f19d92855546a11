"""Optimizers: how gradients move weights, one registry line each.

Legend: beta1, beta2 decay rates of the running means of gradient and squared gradient; g a parameter's
gradient.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.optim import Optimizer

from scumble.errors import ConfigError, UnknownName
from scumble.registry import Registry
from scumble.settings import Settings
from scumble.training.adamw8bit import AdamW8bit

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups as torch.optim takes them: `{"params": [...], "lr": rate, "name": ...}`."""

OPTIMIZERS: Registry[Callable[[OptimizerSettings, Groups], Optimizer]] = Registry(
    "optimizer",
    {
        "adamw": "scumble.training.optimizers:adamw",
        "adamw8bit": "scumble.training.optimizers:adamw8bit",
        "prodigy": "scumble.training.optimizers:prodigy",
    },
)


class ProdigySettings(Settings):
    """What only Prodigy asks."""

    initial_d: float = Field(default=1e-6, gt=0)
    """First estimate of the distance to the solution. Rarely needs changing."""
    d_coefficient: float = Field(default=1.0, gt=0)
    """Factor on the estimated rate; 0.5 to 2 work. The preferred knob of the method."""
    growth_rate: float | None = Field(default=None, gt=1)
    """The estimate may grow by at most this factor a step; 1.02 gives a soft start. None: by any."""
    bias_correction: bool = False
    """Adam's bias correction."""
    safeguard_warmup: bool = False
    """Keep warm-up out of the estimate of the distance. Turn on together with a warm-up."""


class OptimizerSettings(Settings):
    """How weights are moved."""

    name: str = "adamw"
    """adamw, adamw8bit (keeps 2 bytes for each number that trains, not 8) or prodigy (needs prodigyopt, finds the rate
    itself)."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate at the schedule's top. For prodigy it multiplies the estimated rate: use 1.0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square, each in [0, 1)."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay (Loshchilov & Hutter, 2019)."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update."""
    prodigy: ProdigySettings = ProdigySettings()
    """What only prodigy asks."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            raise ValueError(str(UnknownName("optimizer", name, OPTIMIZERS)))
        return name

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), not {betas}")
        return betas

    @model_validator(mode="after")
    def _prodigy_options_need_prodigy(self) -> OptimizerSettings:
        if self.name != "prodigy" and self.prodigy != ProdigySettings():
            raise ValueError(f'the prodigy options have no effect on {self.name!r}; set name = "prodigy"')
        return self


def build_optimizer(settings: OptimizerSettings, groups: Groups) -> Optimizer:
    """The optimizer over `groups`.

    Raises:
        ConfigError: the optimizer's package is not installed, or a setting can't be right for it.
    """
    return OPTIMIZERS.get(settings.name)(settings, groups)


def adamw(settings: OptimizerSettings, groups: Groups) -> Optimizer:
    """AdamW (Loshchilov & Hutter, 2019), in one fused pass over all tensors."""
    return torch.optim.AdamW(
        [dict(group) for group in groups],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def adamw8bit(settings: OptimizerSettings, groups: Groups) -> Optimizer:
    """AdamW whose running means are kept in 8 bits (Dettmers et al., 2022), on any device."""
    return AdamW8bit(
        [dict(group) for group in groups],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )


def prodigy(settings: OptimizerSettings, groups: Groups) -> Optimizer:
    """Prodigy (Mishchenko & Defazio, 2024), which estimates the learning rate itself, from prodigyopt."""
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ConfigError(
            f"optimizer prodigy needs prodigyopt, which can't be imported ({error}). "
            'Install it (pip install "scumble[prodigy]"), or choose optimizer "adamw".'
        ) from error
    rates = {group.get("name", "all"): group.get("lr", settings.learning_rate) for group in groups}
    low = {name: rate for name, rate in rates.items() if rate < 0.01}
    if low:
        raise ConfigError(
            f"prodigy estimates the learning rate and multiplies it by `learning_rate`, which is {low}: "
            "training would hardly move. Set learning_rate = 1.0 (0.1 to 2 are usual)."
        )
    if len(set(rates.values())) > 1:
        raise ConfigError(f"prodigy needs one learning rate for all parameters, not {rates}.")
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # it prints a line about weight decay, in a progress bar's way
        return Prodigy(
            [dict(group) for group in groups],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            decouple=True,
            use_bias_correction=settings.prodigy.bias_correction,
            safeguard_warmup=settings.prodigy.safeguard_warmup,
            d0=settings.prodigy.initial_d,
            d_coef=settings.prodigy.d_coefficient,
            growth_rate=settings.prodigy.growth_rate or float("inf"),
        )


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer can leave a step out by a flag on the device, without the host reading it
    first."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextlib.contextmanager
def skipping(optimizer: Optimizer, skip: Tensor) -> Iterator[None]:
    """Inside, `optimizer.step()` does nothing where `skip` (0-dim fp32, 0 or 1, on the device) is 1.

    This is the protocol of `torch.amp.GradScaler` for fused optimizers; only for those with
    `skips_on_device`.
    """
    flagged: Any = optimizer
    flagged.found_inf, flagged.grad_scale = skip, None
    try:
        yield
    finally:
        del flagged.found_inf, flagged.grad_scale


def group_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What each parameter group holds beside its parameters and its learning rate (a function of the
    step)."""
    return [
        {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
        for group in optimizer.param_groups
    ]


def optimizer_data(
    optimizer: Optimizer, names: Mapping[Any, str], fresh: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors and as JSON values.

    `names` names its parameters; `fresh` is its `group_values` before the first step. Tensors are called
    `<parameter>|<key>`, e.g. `unet/....down|exp_avg`. Values: {"state": {parameter: {key: number}}, "groups":
    [{key: value}]}, of the groups only what changed since it was built: the rest is settings, which a person
    may change on a resume.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"state": {}, "groups": []}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}|{key}"] = value
            else:
                values["state"].setdefault(names[parameter], {})[key] = value
    for now, before in zip(group_values(optimizer), fresh, strict=True):
        changed = {key: value for key, value in now.items() if before.get(key) != value}
        values["groups"].append({k: v.item() if isinstance(v, Tensor) else v for k, v in changed.items()})
    return tensors, values


def restore_optimizer(
    optimizer: Optimizer,
    names: Mapping[Any, str],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """The inverse of `optimizer_data`, in place, on an optimizer that has not stepped.

    Law: after it, the next `step()` moves the parameters exactly as it would have moved them before the save.
    """
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_name: dict[str, dict[str, Any]] = {name: dict(state) for name, state in values["state"].items()}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("|")
        by_name.setdefault(parameter, {})[key] = tensor
    live = optimizer.state_dict()["param_groups"]
    groups = [{**group, **saved} for group, saved in zip(live, values["groups"], strict=True)]
    state = {n: by_name[names[p]] for n, p in enumerate(order) if names[p] in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
