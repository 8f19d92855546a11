"""Schedulers: any of diffusers' samplers by its class name, fitted to the base's own noise schedule."""

from __future__ import annotations

import inspect
from typing import Any

from scumble.errors import ModelError, UnknownName
from scumble.inference.request import Request

SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "prediction_type")
"""What a base's noise schedule is made of, in its scheduler's config; flow matching has none of these."""

DEFAULT: str = Request.model_fields["scheduler"].default


def scheduler_names() -> tuple[str, ...]:
    """Every scheduler that this diffusers has, sorted."""
    from diffusers import schedulers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    found = []
    for name in dir(schedulers):
        if name.endswith("Scheduler") and not name.startswith("Flax"):
            value = getattr(schedulers, name)
            # A scheduler whose libraries are missing is there as a dummy, which is no SchedulerMixin.
            if isinstance(value, type) and issubclass(value, SchedulerMixin):
                found.append(name)
    return tuple(sorted(found))


def build_scheduler(name: str, own: Any) -> Any:
    """A fresh scheduler called `name`, from the config of the base's `own` scheduler.

    The default is DPM-Solver++ (Lu et al., 2022); a base for which that isn't made (flow matching) keeps its
    own.

    Raises:
        UnknownName: diffusers has no scheduler of that name; near names are suggested.
        ModelError: it can't be built from this base's config.
    """
    from diffusers import schedulers

    known = scheduler_names()
    if name not in known:
        raise UnknownName("scheduler", name, known)
    kind = getattr(schedulers, name)
    if name == DEFAULT and not suits(kind, own):
        kind = type(own)
    # diffusers only logs what a class can't take, and draws by another noise schedule: mush.
    taken = inspect.signature(kind.__init__).parameters
    lost = [key for key in SCHEDULE if key in own.config and key not in taken]
    if lost:
        raise ModelError(
            unsuitable(name, own, f"it has no {' and no '.join(lost)}, by which this base was trained")
        )
    options = {"algorithm_type": "dpmsolver++"} if kind.__name__ == DEFAULT else {}
    try:
        return kind.from_config(own.config, **options)
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise ModelError(unsuitable(name, own, error)) from error


def suits(kind: type, own: Any) -> bool:
    """Whether diffusers lists schedulers of this class as interchangeable with the base's own."""
    return kind is type(own) or kind in own.compatibles


def unsuitable(name: str, own: Any, error: Exception | str) -> str:
    """The message for a scheduler that can't draw with this base."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    others = sorted({type(own).__name__, *(kind.__name__ for kind in own.compatibles)})
    return f"{name} can't draw with this base ({reason}). Made for it: {', '.join(others)}."
