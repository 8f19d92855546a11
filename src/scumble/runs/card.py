"""The model card of a run: what was trained on what, how well it went, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scumble.training.events import HeldOut, Panel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".parquet", ".arrow")


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from. What is not known (yet) is left out of the card, never made up."""

    name: str
    """The repository's or the run's name."""
    base: str
    """The base as the run named it: Hub id, path or "picturebook"."""
    dataset: str = ""
    """The dataset as the run named it."""
    pictures: int | None = None
    prompt: str = ""
    """The one caption of all pictures, where there is one."""
    method: str = "text-to-image"
    panels: Sequence[Panel] = ()
    """The last previews, base beside adapter."""
    held_out: HeldOut | None = None
    """The held-out loss of the weights that were kept."""
    steps: int | None = None
    seconds: float | None = None
    loss: float | None = None
    """Mean training loss of the last tenth of the steps."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """The plan's facts."""
    settings: str = ""
    """The resolved settings as TOML."""
    file: str = "pytorch_lora_weights.safetensors"
    folder: Path | None = None
    """The run folder: picture paths are written relative to it."""


def hub_id(name: str) -> bool:
    """Whether `name` reads as a Hub repository rather than a path or an alias. The Hub refuses a card whose
    `base_model` or `datasets` is anything else."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_FILES) and not Path(name).exists()


def write_card(facts: CardFacts) -> str:
    """The text of README.md: YAML front matter that the Hub accepts, then the page."""
    return "\n".join([*_front_matter(facts), "", *_page(facts)]).rstrip() + "\n"


def _front_matter(facts: CardFacts) -> Iterator[str]:
    yield "---"
    if hub_id(facts.base):
        yield f"base_model: {_yaml(facts.base)}"
    if hub_id(facts.dataset):
        yield "datasets:"
        yield f"- {_yaml(facts.dataset)}"
    yield "library_name: diffusers"
    yield "pipeline_tag: text-to-image"
    yield "tags:"
    for tag in (
        "lora",
        "text-to-image",
        "diffusers",
        "stable-diffusion",
        "stable-diffusion-diffusers",
        "scumble",
    ):
        yield f"- {tag}"
    if facts.prompt:
        yield f"instance_prompt: {_yaml(facts.prompt)}"
    if facts.panels:
        yield "widget:"
        for panel in facts.panels:
            yield f"- text: {_yaml(panel.prompt)}"
            yield "  output:"
            yield f"    url: {_yaml(_relative(panel.adapter, facts.folder))}"
    yield "---"


def _page(facts: CardFacts) -> Iterator[str]:
    yield f"# {facts.name}"
    yield ""
    trained = f" It was trained on {_dataset(facts)}." if facts.dataset or facts.pictures else ""
    yield f"A LoRA for {_link(facts.base)}.{trained}"
    if facts.prompt:
        yield f"Its pictures were captioned `{facts.prompt}`."
    if facts.panels:
        yield ""
        yield "## Pictures"
        yield ""
        yield "Drawn from the saved file; both pictures of a row start from the same noise."
        yield ""
        yield "| prompt | seed | base | with this LoRA |"
        yield "|---|---|---|---|"
        for panel in facts.panels:
            base, adapter = (_relative(path, facts.folder) for path in (panel.base, panel.adapter))
            prompt = panel.prompt.replace("|", "\\|").replace("\n", " ")
            yield f"| {prompt} | {panel.seed} | ![base]({base}) | ![with this LoRA]({adapter}) |"
    results = list(_results(facts))
    if results:
        yield ""
        yield "## Measured"
        yield ""
        yield "| | |"
        yield "|---|---|"
        yield from results
    yield ""
    yield "## Use"
    yield ""
    yield "```python"
    yield from _snippet(facts)
    yield "```"
    if facts.settings:
        yield ""
        yield "## Settings"
        yield ""
        yield "```toml"
        yield facts.settings.strip()
        yield "```"


def _results(facts: CardFacts) -> Iterator[str]:
    if facts.steps is not None:
        yield f"| optimizer steps | {facts.steps} |"
    if facts.seconds is not None:
        yield f"| training time | {_duration(facts.seconds)} |"
    if facts.loss is not None:
        yield f"| training loss, mean of the last tenth | {facts.loss:.4f} |"
    if facts.held_out is not None:
        seen = facts.held_out
        verdict = seen.adapter - seen.base
        yield f"| held-out loss with this LoRA, at step {seen.step} | {seen.adapter:.4f} |"
        yield f"| held-out loss of the base, same noise | {seen.base:.4f} |"
        yield f"| difference, with its 95 % interval | {verdict:+.4f} ± {seen.interval:.4f} |"
    for name, value in facts.facts.items():
        yield f"| {name.replace('_', ' ')} | {value} |"


def _snippet(facts: CardFacts) -> Iterator[str]:
    prompt = facts.panels[0].prompt if facts.panels else facts.prompt or "..."
    yield "from diffusers import DiffusionPipeline"
    if facts.base == "picturebook":
        yield "import scumble.picturebook"
        yield ""
        yield "pipeline = DiffusionPipeline.from_pretrained(scumble.picturebook.path())"
    else:
        yield ""
        load = "StableDiffusionPipeline.from_single_file" if facts.base.endswith(".safetensors") else None
        if load:
            yield "from diffusers import StableDiffusionPipeline"
            yield ""
        yield f"pipeline = {load or 'DiffusionPipeline.from_pretrained'}({json.dumps(facts.base)})"
    target = json.dumps(
        facts.name if "/" in facts.name else (str(facts.folder) if facts.folder else facts.name)
    )
    yield f"pipeline.load_lora_weights({target}, weight_name={json.dumps(facts.file)})"
    yield f"picture = pipeline({json.dumps(prompt, ensure_ascii=False)}).images[0]"


def _dataset(facts: CardFacts) -> str:
    count = f"{facts.pictures} pictures" if facts.pictures else ""
    name = _link(facts.dataset, "datasets/") if facts.dataset else ""
    return f"{count} of {name}" if count and name else count or name


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if hub_id(name) else f"`{name}`"


def _relative(path: Path, folder: Path | None) -> str:
    path = Path(path)
    if (
        folder is not None
        and path.is_absolute() == Path(folder).is_absolute()
        and path.is_relative_to(folder)
    ):
        path = path.relative_to(folder)
    elif folder is not None and path.resolve().is_relative_to(Path(folder).resolve()):
        path = path.resolve().relative_to(Path(folder).resolve())
    return path.as_posix()


def _yaml(text: str) -> str:
    """A YAML scalar: JSON's quoted form, which YAML reads alike."""
    return json.dumps(text, ensure_ascii=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else (f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s")
    )
