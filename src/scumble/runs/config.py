"""RunConfig: everything a run is told, composed of the settings that live beside their components."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, create_model, field_validator, model_validator

from scumble.data.settings import DataSettings
from scumble.errors import UnknownName
from scumble.methods.method import METHODS, NoSettings, ShapesData
from scumble.runs.adapter import AdapterSettings, default_adapter
from scumble.runs.hub import HubSettings
from scumble.settings import Settings
from scumble.training.settings import TrainSettings


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
    guidance: float | None = Field(None, ge=0)
    """Classifier-free guidance scale; 1 or less turns it off. Unset: the base's own, usually 7.5."""


class SaveSettings(Settings):
    """How the trained adapter is written."""

    dialect: str | None = None
    """Names of the tensors in the file. Unset: those of diffusers, or where it has none for the adapter's family,
    those of kohya's tools. `scumble inspect` reads all dialects."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Numbers in the final file. fp16 and bf16 halve it; checkpoints are always fp32."""
    also: tuple[str, ...] = ()
    """Other dialects that the adapter is written in as well, each into a file of its own that bears the dialect's name,
    e.g. "kohya": pytorch_lora_weights_kohya.safetensors."""

    @field_validator("dialect", "also")
    @classmethod
    def _known(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        from scumble.formats.codec import CODECS, written

        for name in (value,) if isinstance(value, str) else value or ():
            if name not in written():
                raise ValueError(str(UnknownName("dialect", name, written())))
        if isinstance(value, str) and getattr(CODECS.get(value), "file_name", None) is not None:
            raise ValueError(
                f"an adapter in {value} is a folder of files, and a run's own is one file, which previews, drawing and "
                f'uploads read. Write it besides: also = ["{value}"]'
            )
        return value


def _dtype(value: object) -> str:
    """A component's dtype, as people call it: "fp32" for "float32" and torch.float32."""
    from scumble.models.dtypes import dtype_spelled, short

    try:
        return short(dtype_spelled(cast(str, value)))
    except UnknownName as error:
        raise ValueError(str(error)) from error


class _Common(Settings):
    """What every run is told, whatever its method."""

    base: str
    """The base model: "picturebook", a Hub id, a folder in diffusers' layout, or a .safetensors
    checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of a Hub base."""
    variant: str | None = None
    """Variant of the base's weight files, e.g. fp16."""
    rest: str | None = None
    """Another base, a folder in diffusers' layout or a Hub id, from which a .safetensors checkpoint takes the
    components that it does not hold: text encoders, VAE, tokenizers. Unset: the folder that it lies in, if that is such
    a base."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts. Unset: what its scheduler's configuration says. Set it only for a base that
    says wrong."""
    dtypes: dict[str, Annotated[str, BeforeValidator(_dtype)]] = Field(default_factory=dict)
    """A dtype for some of the base's components alone: component -> "fp32", "fp16" or "bf16", e.g. { vae = "fp32",
    text_encoder = "bf16" }. It is kept in that and computes in it; all others follow train.precision."""
    method: str = "text-to-image"
    """How it is taught. A method's own settings stand in the section of its name, e.g. [textual_inversion]."""
    output: Path
    """Folder of the run: settings, log, checkpoints, adapter, model card, report, previews."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps. Unset: the best there is."""
    trackers: tuple[str, ...] = ()
    """More places for the log: tensorboard, wandb. The console, events.jsonl and report.html are always
    kept."""
    adapter: AdapterSettings = default_adapter()
    """What is trained: the adapter's family and size, and the layers it changes."""
    data: DataSettings | None = None
    """Which pictures and words are trained on, and how they are shown."""
    train: TrainSettings = TrainSettings()
    """How long, how much at once, how precisely."""
    preview: PreviewSettings = PreviewSettings()
    """Pictures drawn on the way and at the end."""
    save: SaveSettings = SaveSettings()
    """How the trained adapter is written."""
    hub: HubSettings = HubSettings()
    """Where the trained adapter is published."""

    @field_validator("base", "rest", mode="before")
    @classmethod
    def _path_to_text(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
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

    @property
    def options(self) -> Settings:
        """The method's own settings."""
        return getattr(self, section(self.method), None) or NoSettings()

    @property
    def pictures(self) -> DataSettings | None:
        """`data`, with what the method's own settings say of it.

        Raises:
            ConfigError: they contradict each other.
        """
        if self.data is not None and isinstance(options := self.options, ShapesData):
            return options.shaped(self.data)
        return self.data

    @model_validator(mode="before")
    @classmethod
    def _own_section_only(cls, given: Any) -> Any:
        """The method's section is there, if only with its defaults; another method's would do nothing."""
        if not isinstance(given, dict) or (method := given.get("method", "text-to-image")) not in METHODS:
            return given
        for name in METHODS:
            if name != method and given.get(section(name)) is not None:
                raise ValueError(
                    f'[{section(name)}] are the settings of method = "{name}", but this run\'s method is '
                    f'"{method}": they would have no effect. Change the method, or remove the section.'
                )
        if section(method) in cls.model_fields and given.get(section(method)) is None:
            return {**given, section(method): {}}
        return given

    @model_validator(mode="after")
    def _pictures_where_they_are_needed(self) -> _Common:
        needs = METHODS.get(self.method).needs_pictures
        if needs and self.data is None:
            raise ValueError("data is not set: name the pictures, e.g. data.images=pictures/")
        if not needs and self.data is not None:
            raise ValueError(
                f'method = "{self.method}" learns without pictures: [data] would have no effect.'
            )
        return self

    @model_validator(mode="after")
    def _no_adapter_where_no_layer_trains(self) -> _Common:
        if not getattr(METHODS.get(self.method), "trains_layers", True) and self.adapter != default_adapter():
            raise ValueError(
                f'method = "{self.method}" trains no layer: [adapter] would have no effect. Remove it.'
            )
        return self

    @model_validator(mode="after")
    def _no_objective_where_the_method_has_its_own(self) -> _Common:
        if not getattr(METHODS.get(self.method), "takes_objective", True):
            changed = list(_changed(self.train.objective, "train.objective"))
            if changed:
                raise ValueError(
                    f'method = "{self.method}" has a loss and noise levels of its own: {", ".join(changed)} would have '
                    "no effect. Remove it."
                )
        return self

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> _Common:
        if self.train.preview_every and not self.preview.prompts:
            raise ValueError(
                f"train.preview_every = {self.train.preview_every} draws nothing without preview.prompts. "
                'Give at least one prompt, e.g. preview.prompts=["a red fox"].'
            )
        if self.train.held_out_every and not (self.data and self.data.held_out):
            raise ValueError(
                f"train.held_out_every = {self.train.held_out_every} measures nothing: no picture is held out. "
                "Set data.held_out to a fraction or a count, e.g. data.held_out=0.1."
            )
        if not self.hub.push and (self.hub.id is not None or self.hub.private is not None):
            raise ValueError("hub.id and hub.private have no effect without hub.push = true.")
        return self


def _changed(settings: Settings, place: str) -> Iterator[str]:
    """The settings that are not at their default, each as "place.name = value"."""
    for name, field in type(settings).model_fields.items():
        item = getattr(settings, name)
        if isinstance(item, Settings):
            yield from _changed(item, f"{place}.{name}")
        elif item != field.get_default(call_default_factory=True):
            yield f"{place}.{name} = {json.dumps(item)}"


def section(method: str) -> str:
    """The section of a method's own settings."""
    return method.replace("-", "_")


def _sections() -> dict[str, Any]:
    """A field for each method that can be told something."""
    found: dict[str, Any] = {}
    for name in METHODS:
        settings = METHODS.get(name).settings
        if settings is not NoSettings:
            about = (settings.__doc__ or "").strip().splitlines()[0]
            found[section(name)] = (settings | None, Field(None, description=f'method = "{name}". {about}'))
    return found


if TYPE_CHECKING:

    class RunConfig(_Common):
        """A whole run."""

else:
    RunConfig = create_model(
        "RunConfig",
        __base__=_Common,
        __module__=__name__,
        __doc__="A whole run.",
        __cls_kwargs__={"use_attribute_docstrings": False},  # it has no source to search for them
        **_sections(),
    )


def is_tight(config: RunConfig, recomputed: bool | tuple[str, ...] | str | None = None) -> bool:
    """Whether the run is told to save memory: what is freed is given back at once, and nothing is kept twice."""
    blocks = config.train.gradient_checkpointing if recomputed is None else recomputed
    return bool(blocks) or config.train.memory_budget is not None
