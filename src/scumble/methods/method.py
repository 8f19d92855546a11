"""Method: data + trainables + loss, put together as a Plan. The loop calls nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from scumble.registry import Registry
from scumble.rng import Streams
from scumble.training.settings import TrainSettings

if TYPE_CHECKING:
    from scumble.adapters.delta import DeltaSettings
    from scumble.data.record import Batch, Batches
    from scumble.models.family import BaseModel
    from scumble.training.plan import Plan


@dataclass(frozen=True)
class Ingredients:
    """What every method is given, already built: a method decides what trains on what."""

    base: BaseModel
    """The frozen base that adapters go into."""
    fresh: Callable[[], BaseModel]
    """Loads the same base again, untouched: the finished file is proven on it."""
    adapter: DeltaSettings
    """Family, rank, alpha, ..."""
    targets: str | Sequence[str]
    """Which layers (see `adapters.targets`)."""
    batches: Batches
    """What is trained on."""
    train: TrainSettings
    streams: Streams = Streams(0)  # noqa: RUF009 - a frozen value
    within: Sequence[str] | None = None
    """The roots that bare presets look in; None is the denoiser alone."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Root -> a learning rate of its own."""
    held_out: Sequence[Batch] = ()
    """Pictures kept out of training, each once."""
    settings: str = ""
    """The whole run configuration as JSON, for the file's header."""


class Method(Protocol):
    """A way to train: one file in `methods/`, one line in the registry.

    Law: `plan(...)` changes the base only by the adapter that it injects, and moves no weight.
    """

    name: str

    def plan(self, ingredients: Ingredients) -> Plan:
        """Inject what trains, and say what to do with it.

        Raises:
            NoLayerMatches: a target matches no layer.
        """


METHODS: Registry[Method] = Registry(
    "method", {"text-to-image": "scumble.methods.text_to_image:text_to_image"}
)
"""Methods by name."""
