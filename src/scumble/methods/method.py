"""Method: data + trainables + loss, put together as a Plan. The loop calls nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from scumble.errors import ConfigError
from scumble.registry import Registry
from scumble.rng import Streams
from scumble.settings import Settings
from scumble.training.settings import TrainSettings

if TYPE_CHECKING:
    from scumble.adapters.delta import DeltaSettings
    from scumble.data.problems import Problem
    from scumble.data.record import Batch, Batches
    from scumble.data.settings import DataSettings
    from scumble.models.family import BaseModel
    from scumble.models.text import Words
    from scumble.training.plan import Plan


class NoSettings(Settings):
    """A method that needs to be told nothing."""


class OpenBatches(Protocol):
    """Opens another dataset beside the one that is trained on, encoded by the same base: class pictures, say."""

    def __call__(self, data: DataSettings, *, batch_size: int, text_embeddings: bool) -> Batches:
        """`text_embeddings`: whether batches carry the text's embeddings; else the objective encodes captions.

        Raises:
            DataError: the pictures or captions can't be trained on.
        """


class DrawPictures(Protocol):
    """Has the bare base draw pictures before training, and keeps them: class pictures, say."""

    def __call__(
        self,
        prompt: str,
        count: int,
        *,
        folder: Path | None = None,
        seed: int = 0,
        steps: int = 25,
        guidance: float | None = None,
        side: int | None = None,
        batch: int = 4,
    ) -> Path:
        """A folder with at least `count` pictures: `folder` with what is missing there drawn into it, or one of the
        run's own. Pictures drawn before for the same base, prompt and settings are found again.

        `side` in pixels and `guidance`: None is the base's own; `batch` pictures are drawn at once.
        """


@dataclass(frozen=True)
class Ingredients:
    """What every method is given, already built: a method decides what trains on what."""

    base: BaseModel
    """The frozen base that adapters go into."""
    fresh: Callable[[], BaseModel]
    """Loads the same base again, untouched: the finished file is proven on it. At the end of a run, which calls it
    last, `base` may have no weights afterwards."""
    adapter: DeltaSettings
    """Family, rank, alpha, ..."""
    targets: str | Sequence[str]
    """Which layers (see `adapters.targets`)."""
    batches: Batches | None
    """What is trained on; None for a method that needs no pictures."""
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
    options: Settings = NoSettings()  # noqa: RUF009 - a frozen value
    """The method's own section of the settings."""
    data: DataSettings | None = None
    """How `batches` was opened."""
    captions: Callable[[], Sequence[str]] = tuple
    """Lists all that `batches` may say; nothing where that is not bounded, or not known."""
    open_batches: OpenBatches | None = None
    """Opens further datasets."""
    draw: DrawPictures | None = None
    """Draws pictures; None where a plan is only looked at, and nothing may be drawn."""

    @property
    def pictures(self) -> Batches:
        """`batches`, for a method that needs pictures.

        Raises:
            ConfigError: there are none.
        """
        if self.batches is None:
            raise ConfigError("This method trains on pictures, and the run names none. Set data.images.")
        return self.batches


@runtime_checkable
class ShapesData(Protocol):
    """Settings of a method that change how the dataset is read: an instance prompt is every picture's caption."""

    def shaped(self, data: DataSettings) -> DataSettings:
        """`data`, with what these settings say of it.

        Raises:
            ConfigError: they contradict each other.
        """


@runtime_checkable
class Checks(Protocol):
    """A method that can tell what is wrong with its settings before a model is loaded."""

    def check(
        self, options: Settings, data: DataSettings | None, words: Sequence[Words]
    ) -> Sequence[Problem]:
        """What is wrong with `options`, beside what they say themselves. `words`: the base's tokenizers; none where
        they are not there by themselves.

        Raises:
            DataError: a folder that `options` name can't be used at all.
        """


class Method(Protocol):
    """A way to train: one file in `methods/`, one line in the registry.

    Law: `plan(...)` changes the base only by the adapter that it injects, and moves no weight.
    """

    name: str
    settings: type[Settings]
    """What it can be told: the section of a run's settings that bears its name, with underscores."""
    needs_pictures: bool
    """Whether a run must say which pictures it trains on."""
    trains_text: bool
    """Whether the text's embeddings change while it trains, whatever the targets are: they are not cached then."""
    # A method may have `trains_layers = False`: [adapter] has no effect then; `takes_objective = False`: it has a loss
    # and noise levels of its own, and [train.objective] has no effect; and `file_name: str`, what its result is called
    # in a run's folder, where that is not what diffusers calls a LoRA.

    def plan(self, ingredients: Ingredients) -> Plan:
        """Inject what trains, and say what to do with it.

        Raises:
            NoLayerMatches: a target matches no layer.
        """


METHODS: Registry[Method] = Registry(
    "method",
    {
        "dreambooth": "scumble.methods.dreambooth:dreambooth",
        "pivotal": "scumble.methods.pivotal:pivotal",
        "slider": "scumble.methods.slider:slider",
        "text-to-image": "scumble.methods.text_to_image:text_to_image",
        "textual-inversion": "scumble.methods.textual_inversion:textual_inversion",
    },
)
"""Methods by name."""
