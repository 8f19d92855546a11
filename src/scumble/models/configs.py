"""Configs: what a base says of itself before a weight is read.

A base is a folder in diffusers' layout (`model_index.json`, one folder a component) or something from which
the same configs can be told. Only JSON and the headers of .safetensors files are read here: no torch, no
network, no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scumble.errors import FormatError, ModelError
from scumble.tensor_files.header import Header, read

STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers call their weight files."""

DENOISERS = ("unet", "transformer")
"""What a base's denoiser is called."""

WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")
"""Components without weights, by the beginning of their name."""

OTHER_ARCHITECTURES = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionUpscale": "the Stable Diffusion x4 upscaler",
    "StableDiffusionLatentUpscale": "the Stable Diffusion latent upscaler",
    "StableUnCLIP": "Stable unCLIP",
    "StableCascade": "Stable Cascade",
    "Flux2": "Flux 2",
    "Chroma": "Chroma",
    "Flux": "Flux",
    "PixArt": "PixArt",
    "Sana": "Sana",
    "QwenImage": "Qwen-Image",
    "AuraFlow": "AuraFlow",
    "Kandinsky": "Kandinsky",
    "Kolors": "Kolors",
    "Lumina": "Lumina",
    "HunyuanDiT": "Hunyuan-DiT",
    "Wan": "Wan",
}
"""Beginnings of diffusers' pipeline class names -> what people call the model, for refusals by name."""


@dataclass(frozen=True)
class Configs:
    """The configs of a base's components."""

    name: str
    """What the user asked for: Hub id, path or "picturebook"."""
    pipeline: str
    """diffusers' class name, e.g. "StableDiffusionPipeline"; empty when nothing says it."""
    parts: Mapping[str, Mapping[str, Any]]
    """Component -> its config, e.g. "unet" -> {"cross_attention_dim": 768, ...}. Tokenizers have an entry
    too."""
    missing: tuple[str, ...] = ()
    """What has to be there and is not, each as a phrase with the next step."""
    notes: tuple[str, ...] = ()
    """What was assumed, each as a sentence."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Component -> number of parameters, where the weights are on this machine."""
    weights_dtype: str = ""
    """How the denoiser's weights are stored: "F32", "F16", "BF16"; empty when they are not on this
    machine."""
    probe: bool = False
    """Nothing names the prediction type: the weights have to be asked (see `loading.probe_prediction`)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the pipeline is told beside its components, e.g. {"force_zeros_for_empty_prompt": True}."""
    lacking: Mapping[str, str] = field(default_factory=dict)
    """Component that a single file does not hold -> a phrase for `missing`; empty where the base can do without."""
    elsewhere: Mapping[str, Path] = field(default_factory=dict)
    """Component of a single file -> the base's folder that it is taken from."""


@dataclass(frozen=True)
class BaseFacts:
    """What can be told of a base from its config files alone."""

    name: str
    """What the user asked for: Hub id, path or "picturebook"."""
    family: str
    """"sd1", "sd2", ...; empty when no family of this release recognises it (then `problems` says what it
    is)."""
    title: str
    """What people call it: "Stable Diffusion 1"."""
    prediction: str
    """"epsilon", "v_prediction" or "flow"; empty when only the weights can tell."""
    cross_attention_dim: int | None = None
    """Width of the text embeddings that the denoiser takes (768: SD 1.x, 1024: SD 2.x, 2048: SDXL)."""
    resolution: int | None = None
    """Default side of a picture, in pixels."""
    size_multiple: int | None = None
    """Height and width in pixels must be multiples of this."""
    latent_factor: int | None = None
    """Pixels per latent along one side."""
    latent_channels: int | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Component -> number of parameters, where the weights are on this machine."""
    weights_dtype: str = ""
    """How the denoiser's weights are stored: "F32", "F16", "BF16"; empty when they are not on this
    machine."""
    adapters: str = ""
    """The family whose adapters it takes, where that is not its own name."""
    deferred: tuple[str, ...] = ()
    """Components that are loaded when they are first needed: never, where all that they say is cached."""
    readers: tuple[str, ...] = ()
    """The tokenizers by which captions are counted and words taught, e.g. ("tokenizer", "tokenizer_2"); empty for all
    that the base has."""
    guided: bool = False
    """Whether its denoiser is told a guidance scale (Flux.1 dev)."""
    components: tuple[str, ...] = ()
    """Those with weights, by name: what can have a dtype of its own."""
    problems: tuple[str, ...] = ()
    """Why it can't be loaded, each as a sentence with the next step; empty when it can."""
    notes: tuple[str, ...] = ()
    """What was assumed, each as a sentence."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}). Download the base again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, not an object. Download the base again.")
    return value


@contextmanager
def of_a_base() -> Iterator[None]:
    """What is wrong with a file is wrong with a base here: a FormatError becomes a ModelError of the same words."""
    try:
        yield
    except FormatError as error:
        raise ModelError(str(error)) from error


def read_header(path: Path) -> Header:
    """The header of one of a base's .safetensors files.

    Raises:
        ModelError: the file is not a whole .safetensors file (an interrupted download, a web page, a git-lfs
        pointer).
    """
    with of_a_base():
        return read(path)


def read_folder(
    folder: Path,
    name: str,
    variant: str | None = None,
    *,
    weights: bool = True,
    only: Collection[str] | None = None,
) -> Configs:
    """The configs of a folder in diffusers' layout.

    `weights` False leaves the weight files out of what may be missing (they are not downloaded yet). `only`: no other
    components are looked at.

    Raises:
        ModelError: the folder is not a base (says what it is instead, where that can be told).
    """
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise ModelError(f"{name} is not a base model: it has no model_index.json. {_what_folder(folder)}")
    index = read_json(index_path)
    parts: dict[str, Mapping[str, Any]] = {}
    missing: list[str] = []
    parameters: dict[str, int] = {}
    weights_dtype = ""
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or entry[:1] == [None] or is_ignored(part):
            continue
        if only is not None and part not in only:
            continue
        directory = folder / part
        config_path = directory / _config_name(part)
        if not config_path.is_file():
            if not (part.startswith("tokenizer") and _has_vocabulary(directory)):
                missing.append(f"{part}/{config_path.name}")
            parts[part] = {"_class_name": entry[-1]}
            continue
        parts[part] = {"_class_name": entry[-1], **read_json(config_path)}
        if part.startswith("tokenizer") and not _has_vocabulary(directory):
            missing.append(f"{part}/vocab.json and merges.txt (or tokenizer.json)")
        if part.startswith(WEIGHTLESS) or not weights:
            continue
        files, lack = weight_files(directory, variant)
        missing.extend(lack)
        headers = [read_header(path) for path in files]
        if headers:
            parameters[part] = sum(header.parameters for header in headers)
            if part in DENOISERS:
                weights_dtype = headers[0].dtype
    pipeline = index.get("_class_name", "")
    pipeline = pipeline[-1] if isinstance(pipeline, list) else str(pipeline)
    options = {
        key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)
    }
    return Configs(name, pipeline, parts, tuple(missing), (), parameters, weights_dtype, options=options)


def weighty(configs: Configs) -> tuple[str, ...]:
    """Its components that have weights, by name."""
    return tuple(part for part in configs.parts if not part.startswith(WEIGHTLESS))


def is_ignored(part: str) -> bool:
    """Components of a folder that training and drawing leave alone."""
    return part in ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")


def _config_name(part: str) -> str:
    if part.startswith("scheduler"):
        return "scheduler_config.json"
    return "tokenizer_config.json" if part.startswith("tokenizer") else "config.json"


def _has_vocabulary(directory: Path) -> bool:
    return (directory / "tokenizer.json").is_file() or all(
        (directory / file).is_file() for file in ("vocab.json", "merges.txt")
    )


def _what_folder(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    adapters = [n for n in names if n in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")]
    if adapters:
        return f"It holds an adapter ({adapters[0]}): name its base here, and the adapter where adapters go."
    if "config.json" in names:
        part = read_json(folder / "config.json").get("_class_name") or "one component"
        return f"It is one component of a base ({part}): name the folder above it."
    checkpoints = [n for n in names if n.endswith(".safetensors")]
    if checkpoints:
        return f"If {checkpoints[0]} is a whole checkpoint, name that file itself."
    return (
        f"It holds {', '.join(names[:5]) or 'nothing'}. Name a folder that diffusers' save_pretrained wrote."
    )


def weight_files(directory: Path, variant: str | None) -> tuple[list[Path], list[str]]:
    """(the .safetensors files of a component, phrases for what is missing), one of them empty.

    `variant` is the middle word of the file names: "fp16" for `diffusion_pytorch_model.fp16.safetensors`.
    """
    middle = f".{variant}" if variant else ""
    for stem in STEMS:
        whole = directory / f"{stem}{middle}.safetensors"
        if whole.is_file():
            return [whole], []
        index = directory / f"{stem}.safetensors.index{middle}.json"
        if index.is_file():
            files = [directory / f for f in sorted(set(read_json(index).get("weight_map", {}).values()))]
            lack = [f"{directory.name}/{path.name}" for path in files if not path.is_file()]
            return ([], lack) if lack or not files else (files, [])
    return [], [f"{directory.name}: {_why_no_weights(directory, variant)}"]


def _why_no_weights(directory: Path, variant: str | None) -> str:
    wanted = f"a .safetensors file of variant {variant!r}" if variant else "a .safetensors file"
    here = sorted(path.name for path in directory.iterdir())
    others = sorted(
        {n[len(stem) + 1 : -len(".safetensors")] for n in here for stem in STEMS if _is_variant(n, stem)}
        - {variant}
    )
    if others:
        return f"{wanted} (there is variant {', '.join(map(repr, others))}: set variant to it)"
    if any(n in here for n in (f"{stem}.safetensors" for stem in STEMS)):
        return f"{wanted} (there is one without a variant: leave variant out)"
    if any(n.endswith((".bin", ".ckpt", ".pt")) for n in here):
        pickle = "there is only a pickle, which is never opened here: it could run code; convert it first"
        return f"{wanted} ({pickle})"
    return wanted


def _is_variant(name: str, stem: str) -> bool:
    return name.startswith(f"{stem}.") and name.endswith(".safetensors") and name != f"{stem}.safetensors"


def architecture(configs: Configs) -> str:
    """What people call a base that no family recognises: by its pipeline class, else by its denoiser's
    class."""
    for beginning, title in OTHER_ARCHITECTURES.items():
        if configs.pipeline.startswith(beginning):
            return title
    unet = configs.parts.get("unet", {})
    denoiser = configs.parts.get("transformer") or unet or configs.parts.get("prior") or {}
    return (
        f"a {configs.pipeline or 'model'} with a {denoiser.get('_class_name', 'denoiser of no known class')}"
    )


def listed(names: Sequence[str]) -> str:
    """`"sd1, sd2"`."""
    return ", ".join(names)
