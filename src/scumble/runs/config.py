"""RunConfig: everything a run is told, composed of the settings that live beside their components."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from scumble.adapters.lora import LoraSettings
from scumble.data.settings import DataSettings
from scumble.errors import UnknownName
from scumble.runs.hub import HubSettings
from scumble.settings import Settings
from scumble.training.settings import TrainSettings


class AdapterSettings(LoraSettings):
    """What is trained: the adapter's family and size, and the layers it changes."""

    targets: str | tuple[str, ...] = "attention"
    """Layers to adapt: attention, attention+mlp, all-linear, conv, attention+conv, or patterns such as
    "*.attn2.to_k"."""


class PreviewSettings(Settings):
    """The pictures drawn during and after training, from the saved adapter, the base's beside them."""

    prompts: tuple[str, ...] = ()
    """What to draw. Empty: no previews."""
    negative: str = ""
    """What the pictures should not show."""
    count: int = Field(1, ge=1)
    """Pictures of each prompt, each from its own seed."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the first picture of each prompt."""
    steps: int = Field(25, ge=1)
    """Denoising steps a picture."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale; 1 or less turns it off."""


class SaveSettings(Settings):
    """How the trained adapter is written."""

    dialect: str = "diffusers"
    """Names of the tensors in the file. `scumble inspect` reads all dialects."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Numbers in the final file. fp16 and bf16 halve it; checkpoints are always fp32."""

    @field_validator("dialect")
    @classmethod
    def _known(cls, value: str) -> str:
        from scumble.formats import CODECS

        if value not in CODECS:
            raise ValueError(str(UnknownName("dialect", value, CODECS.names())))
        return value


class RunConfig(Settings):
    """A whole run."""

    base: str
    """The base model: "picturebook", a Hub id, a folder in diffusers' layout, or a .safetensors
    checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of a Hub base."""
    variant: str | None = None
    """Variant of the base's weight files, e.g. fp16."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts. Unset: what its scheduler's configuration says. Set it only for a base that
    says wrong."""
    method: str = "text-to-image"
    """How it is taught."""
    output: Path
    """Folder of the run: settings, log, checkpoints, adapter, model card, report, previews."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps. Unset: the best there is."""
    trackers: tuple[str, ...] = ()
    """More places for the log: tensorboard, wandb. The console, events.jsonl and report.html are always
    kept."""
    adapter: AdapterSettings = AdapterSettings()
    """What is trained: the adapter's family and size, and the layers it changes."""
    data: DataSettings
    """Which pictures and words are trained on, and how they are shown."""
    train: TrainSettings = TrainSettings()
    """How long, how much at once, how precisely."""
    preview: PreviewSettings = PreviewSettings()
    """Pictures drawn on the way and at the end."""
    save: SaveSettings = SaveSettings()
    """How the trained adapter is written."""
    hub: HubSettings = HubSettings()
    """Where the trained adapter is published."""

    @field_validator("base", mode="before")
    @classmethod
    def _path_to_text(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        from scumble.methods.method import METHODS

        if value not in METHODS:
            raise ValueError(str(UnknownName("method", value, METHODS.names())))
        return value

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from scumble.training.sinks import SINKS

        for name in value:
            if name not in SINKS:
                raise ValueError(str(UnknownName("tracker", name, SINKS.names())))
        return value

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> RunConfig:
        if self.train.preview_every and not self.preview.prompts:
            raise ValueError(
                f"train.preview_every = {self.train.preview_every} draws nothing without preview.prompts. "
                'Give at least one prompt, e.g. preview.prompts=["a red fox"].'
            )
        if self.train.held_out_every and not self.data.held_out:
            raise ValueError(
                f"train.held_out_every = {self.train.held_out_every} measures nothing: no picture is held out. "
                "Set data.held_out to a fraction or a count, e.g. data.held_out=0.1."
            )
        if not self.hub.push and (self.hub.id is not None or self.hub.private is not None):
            raise ValueError("hub.id and hub.private have no effect without hub.push = true.")
        return self
