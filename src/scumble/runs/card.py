"""The model card of a run: what was trained on what, how well it went, and how to load it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
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
    rest: str = ""
    """The base from which a single file took what it does not hold."""
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
    subfolder: str = ""
    """Where in the folder `file` lies: a checkpoint, when the run was interrupted."""
    planned: int | None = None
    """The steps that were planned, when the run was interrupted before them."""
    license: str = ""
    """The author's choice, as the Hub spells it."""
    evaluation: Mapping[str, object] = field(default_factory=dict)
    """What `scumble evaluate` measured: names to numbers, to numbers with an interval, or to more of these."""
    scale: float = 1.0
    """alpha / rank, where the file says it in its header only, which ComfyUI does not read."""
    words: Sequence[str] = ()
    """New words that it brings."""
    word_encoders: int = 1
    """Text encoders that read each of them: diffusers' own loader takes one at a time."""
    word_files: Sequence[str] = ()
    """Files beside it that hold one new word each, for diffusers."""
    changes_layers: bool = True
    """Whether it is a LoRA; else it is new words and nothing more."""
    diffusers_reads: bool = True
    """Whether diffusers' own loader reads its families from this file."""


def hub_id(name: str) -> bool:
    """Whether `name` reads as a Hub repository rather than a path or an alias. The Hub refuses a card whose
    `base_model` or `datasets` is anything else."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_FILES) and not Path(name).exists()


def write_card(facts: CardFacts) -> str:
    """The text of README.md: YAML front matter that the Hub accepts, then the page, and a last line by which
    `unedited` knows it."""
    text = "\n".join([*_front_matter(facts), "", *_page(facts)]).rstrip() + "\n\n"
    return f"{text}{_MARK} {_digest(text)} -->\n"


def unedited(card: str) -> bool:
    """Whether `write_card` wrote this text and nobody changed it since: then it may be written anew."""
    card = card.replace("\r\n", "\n")
    text, mark, rest = card.rpartition(_MARK)
    return bool(mark) and rest.strip() == f"{_digest(text)} -->"


_MARK = "<!-- Written by scumble, and anew at each push for as long as nobody edits it:"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _front_matter(facts: CardFacts) -> Iterator[str]:
    yield "---"
    if hub_id(facts.base):
        yield f"base_model: {_yaml(facts.base)}"
        yield "base_model_relation: adapter"
    if hub_id(facts.dataset):
        yield "datasets:"
        yield f"- {_yaml(facts.dataset)}"
    if facts.license:
        yield f"license: {_yaml(facts.license)}"
    yield "library_name: diffusers"
    yield "pipeline_tag: text-to-image"
    yield "tags:"
    for tag in (
        *(("lora",) if facts.changes_layers else ()),
        *(("textual_inversion",) if facts.words else ()),
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
    yield f"{_kind(facts)} for {_link(facts.base)}.{trained}"
    if facts.prompt:
        yield f"Its pictures were captioned `{facts.prompt}`."
    if facts.planned is not None:
        yield ""
        yield f"The run was interrupted after {facts.steps} of {facts.planned} steps; this is its last checkpoint."
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
    yield "With diffusers:"
    yield ""
    yield "```python"
    yield from _snippet(facts)
    yield "```"
    yield ""
    yield from _elsewhere(facts)
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
        interval = float(seen.interval)  # infinite for a single picture, which the record keeps as a text
        span = f"± {interval:.4f}" if math.isfinite(interval) else "(one picture: no interval)"
        yield f"| difference, with its 95 % interval | {verdict:+.4f} {span} |"
    for name, value in facts.facts.items():
        yield f"| {name.replace('_', ' ')} | {value} |"
    yield from _measures("", facts.evaluation)


def _measures(above: str, measures: Mapping[str, object]) -> Iterator[str]:
    """Rows for numbers, also for those that stand as `value` or `mean` beside an interval; what is no number is
    left to the page that `scumble evaluate` writes."""
    for name, value in measures.items():
        title = f"{above}{name}".replace("_", " ").replace("|", "\\|")
        if isinstance(value, Mapping):
            middle = next((value[key] for key in ("value", "mean") if _number(value.get(key))), None)
            if middle is None:
                yield from _measures(f"{title}: ", value)
                continue
            low, high = (value.get(key) for key in ("low", "high"))
            span = f" (95 % interval {low:.4g} to {high:.4g})" if _number(low) and _number(high) else ""
            yield f"| {title} | {middle:.4g}{span} |"
        elif _number(value):
            yield f"| {title} | {value:.4g} |"


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _on_disk(facts: CardFacts) -> str:
    """The adapter's file as Python: downloaded from the Hub, or where it lies."""
    inside = "/".join(part for part in (facts.subfolder, facts.file) if part)
    if "/" in facts.name:
        return f"hf_hub_download({json.dumps(facts.name)}, {json.dumps(inside)})"
    return json.dumps(str(facts.folder / inside) if facts.folder else inside)


def _snippet(facts: CardFacts) -> Iterator[str]:
    several = bool(facts.words) and facts.word_encoders > 1
    single_file = facts.base.endswith(".safetensors")
    attaches = several or (facts.changes_layers and not facts.diffusers_reads)
    if attaches or single_file:
        yield "import scumble"
    if attaches and "/" in facts.name:
        yield "from huggingface_hub import hf_hub_download"
    if not single_file:
        yield "from diffusers import DiffusionPipeline"
    if facts.base == "picturebook":
        yield "import scumble.picturebook"
        yield ""
        yield "pipeline = DiffusionPipeline.from_pretrained(scumble.picturebook.path())"
    else:
        yield ""
        base, rest = json.dumps(facts.base), f", rest={json.dumps(facts.rest)}" if facts.rest else ""
        if single_file:  # of whatever family: which pipeline it makes is told by its tensors
            yield f"pipeline = scumble.load_base({base}{rest}).pipeline()"
        else:
            yield f"pipeline = DiffusionPipeline.from_pretrained({base})"
    target = json.dumps(
        facts.name if "/" in facts.name else (str(facts.folder) if facts.folder else facts.name)
    )
    inside = f", subfolder={json.dumps(facts.subfolder)}" if facts.subfolder else ""
    if several:
        yield f"scumble.load_adapter(pipeline, {_on_disk(facts)})  # its words, in {facts.word_encoders} text encoders"
    elif facts.changes_layers and facts.diffusers_reads:
        yield f"pipeline.load_lora_weights({target}{inside}, weight_name={json.dumps(facts.file)})"
    elif facts.changes_layers:
        yield f"scumble.load_adapter(pipeline, {_on_disk(facts)})  # diffusers' own loader does not read this kind"
    words = facts.word_files or ([facts.file] if facts.words and not facts.changes_layers else ())
    for name in () if several else words:
        yield f"pipeline.load_textual_inversion({target}{inside}, weight_name={json.dumps(name)})"
    yield f"picture = pipeline({json.dumps(_prompt(facts), ensure_ascii=False)}).images[0]"


def _elsewhere(facts: CardFacts) -> Iterator[str]:
    published = "/" in facts.name and not facts.subfolder
    inside = "/".join(part for part in (facts.subfolder, facts.file) if part)
    strength = "1" if facts.scale == 1 else f"{facts.scale:.4g}"
    why = "" if facts.scale == 1 else " (alpha / rank, which ComfyUI does not read from this file)"
    if facts.changes_layers:
        yield (
            f"With ComfyUI: put `{inside}` into `ComfyUI/models/loras/` under a name of your choice, and load it "
            f"with the node *Load LoRA*, strength {strength}{why}."
        )
        yield ""
    for name in facts.word_files or ([inside] if facts.words and not facts.changes_layers else ()):
        yield (
            f"With ComfyUI: put `{name}` into `ComfyUI/models/embeddings/` as NAME.safetensors, and write "
            "`embedding:NAME` in the prompt where the new word stands."
        )
        yield ""
    yield "With scumble, which finds the base by itself:"
    yield ""
    yield "```sh"
    where = facts.name if published else str(facts.folder / inside) if facts.folder else inside
    yield f"scumble generate --adapter {shlex.quote(where)} {shlex.quote(_prompt(facts))}"
    yield "```"


def _kind(facts: CardFacts) -> str:
    words = ", ".join(f"`{word}`" for word in facts.words)
    plural = "s" * (len(facts.words) > 1)
    if not facts.changes_layers:
        return f"The new word{plural} {words}"
    return f"A LoRA with the new word{plural} {words}" if words else "A LoRA"


def _prompt(facts: CardFacts) -> str:
    return facts.panels[0].prompt if facts.panels else facts.prompt or "..."


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
