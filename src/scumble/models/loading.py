"""Loading: a Hub id, a diffusers folder or a single checkpoint -> a BaseModel of the family it belongs to.

Nobody is asked for the architecture: it is found in the configs. A path on this machine never touches the
network, and nothing here opens a pickle. What a single checkpoint doesn't hold can come from the rest of another base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scumble.collector import started
from scumble.errors import ModelError, did_you_mean
from scumble.models import FAMILIES, hub
from scumble.models.codes import NONE, code_named
from scumble.models.configs import (
    DENOISERS,
    OTHER_ARCHITECTURES,
    WEIGHTLESS,
    BaseFacts,
    Configs,
    architecture,
    read_folder,
    read_header,
    weight_files,
    weighty,
)
from scumble.models.dtypes import Dtypes, check_kept, own_dtypes
from scumble.models.family import BaseModel, Components, Deferred, Frame, fingerprint
from scumble.models.file_layout import FileLayout, layout_of, phrases, unread
from scumble.models.file_weights import prepare_part
from scumble.models.hub import PICTUREBOOK
from scumble.models.marks import Mark
from scumble.models.offload import park, refuse_offload
from scumble.models.precision import PRECISIONS, check_precision, find_device
from scumble.models.prediction import Flow
from scumble.models.quantized import quantize, said_of
from scumble.models.single_file import default_side, read_checkpoint, write_configs
from scumble.models.streaming import stream
from scumble.rng import Streams
from scumble.tensor_files.dtypes import dtype_of

CACHED_TOKENIZERS: tuple[tuple[str, str], ...] = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-2", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
)
"""(Hub id, folder) where the vocabulary that SD 1, SD 2 and SDXL share may lie in the local Hub cache already."""

CACHED_T5_TOKENIZERS: tuple[tuple[str, str], ...] = (
    ("black-forest-labs/FLUX.1-dev", "tokenizer_2/"),
    ("black-forest-labs/FLUX.1-schnell", "tokenizer_2/"),
    ("stabilityai/stable-diffusion-3-medium-diffusers", "tokenizer_3/"),
    ("stabilityai/stable-diffusion-3.5-medium", "tokenizer_3/"),
    ("stabilityai/stable-diffusion-3.5-large", "tokenizer_3/"),
)
"""The same for T5's."""


def describe_base(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    rest: str | Path | None = None,
) -> BaseFacts:
    """The facts of a base, from config files and headers alone: no weights, and no network for what is on
    this machine.

    A base that can't be loaded is described too: `facts.problems` says why. `source` and the rest: as
    `load_base`.

    Raises:
        ModelError: there is no such base, or the path holds something else.
    """
    return _describe(_find(source, revision, variant, rest).configs)


@dataclass(frozen=True)
class Look:
    """A base looked at without loading any of it."""

    configs: Configs
    facts: BaseFacts
    folder: Path | None
    """Where its configs lie; None for a single checkpoint."""
    tokenizers: Mapping[str, Any]
    """All that it has, by component; none for a single checkpoint without the rest of another base."""


def look_at(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    rest: str | Path | None = None,
) -> Look:
    """What is there of a base: configs, facts and vocabularies, no weights. `source` and the rest: as `load_base`.

    Raises:
        ModelError: there is no such base, or the path holds something else.
    """
    found = _find(source, revision, variant, rest)
    parts, facts = found.configs.parts, _describe(found.configs)
    names = tuple(part for part in parts if part.startswith("tokenizer"))
    words = () if facts.problems else _vocabularies(found, names)
    return Look(found.configs, facts, found.folder, dict(zip(names, words, strict=False)))


def load_tokenizers(
    source: str | Path, *, revision: str | None = None, rest: str | Path | None = None
) -> tuple[Any, ...]:
    """The tokenizers by which a base's captions are counted and its words taught, without its weights; none for a
    single checkpoint, which holds no vocabulary, without the rest of another base.

    Raises:
        ModelError: there is no such base, or a vocabulary can't be read.
    """
    found = _find(source, revision, None, rest)
    parts, facts = found.configs.parts, _describe(found.configs)
    names = facts.readers or tuple(part for part in parts if part.startswith("tokenizer"))
    return _vocabularies(found, tuple(part for part in names if part in parts))


def _vocabularies(found: _Found, names: Sequence[str]) -> tuple[Any, ...]:
    """These tokenizers; none where the folder of one is not known."""
    parts = found.configs.parts
    folders = {part: found.configs.elsewhere.get(part, found.folder) for part in names}
    with _quiet():
        read = [
            _read_tokenizer(folder / part, found.configs.name, str(parts[part]["_class_name"]))
            for part, folder in folders.items()
            if folder is not None
        ]
    return tuple(read) if len(read) == len(names) else ()


def load_base(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    prediction: str | None = None,
    rest: str | Path | None = None,
    dtypes: Mapping[str, str | torch.dtype] | None = None,
    quantization: str = NONE,
    offload: str = NONE,
) -> BaseModel:
    """A frozen base, ready to train on and to draw with.

    Args:
        source: "picturebook" (the base inside this package), a Hub id "owner/name", a folder in diffusers'
            layout, or a single .safetensors checkpoint. "./owner/name" is a folder called like a Hub id.
        dtype: of every component: fp32 (None), fp16 or bf16. fp16 on a CPU is for storing, not for
            computing; a VAE is fp32 then.
        device: None takes the first GPU that torch sees, else the CPU.
        revision: branch, tag or commit of a Hub id.
        variant: the middle word of the weight files, e.g. "fp16".
        tokenizer: a folder with the CLIP vocabulary, for a single checkpoint (which holds none).
        prediction: "epsilon" or "v_prediction", for a base whose scheduler says it wrong. None believes the
            scheduler.
        rest: a folder in diffusers' layout, or a Hub id, from which a single checkpoint takes the components that it
            doesn't hold: text encoders, VAE, tokenizers. None is the folder that the checkpoint lies in, where that
            is such a base. `revision` and `variant` are of it then.
        dtypes: component -> a dtype of its own, e.g. {"vae": torch.float32, "text_encoder": "bf16"}. It is kept in
            that and computes in it, whatever the others have.
        quantization: what the weights in the denoiser's blocks are held in: "int8", "fp8" (about 1 byte each), "nf4"
            (half a byte), or "none". They are read in the denoiser's dtype. The base is the same base, with the same
            fingerprint, and answers a little differently; adapters train on it and act on it as on any.
        offload: "blocks" keeps the denoiser's blocks in host memory, and sends each to the GPU when it computes;
            "none" has all of it there.

    Raises:
        ModelError: there is no such base, its parts don't belong together, or it is of a family that this
            release doesn't train; one message, with the next step. Or `dtypes` names a component that it has not.
        UnknownName: `dtypes` names a dtype that there is not, or there is no such quantization or offload.
        PrecisionError: the GPU can't compute in `dtype`, or one of `dtypes`; raised before anything is loaded.
    """
    where = find_device(device)
    dtype = torch.float32 if dtype is None else dtype
    if where.type != "cpu" or dtype not in PRECISIONS.values():
        check_precision(dtype, where)
    refuse_offload(offload, where)
    found = _find(source, revision, variant, rest)
    facts = _describe(found.configs)
    if facts.problems:
        raise ModelError("\n".join(facts.problems))
    code_named(quantization)
    kept = Dtypes(dtype, own_dtypes(dtypes, facts.components, facts.name), quantization)
    for each in kept.own.values():
        if where.type != "cpu":
            check_precision(each, where)
    computes, where = where, where if offload == NONE else torch.device("cpu")
    parts = found.load(kept, tokenizer)
    parts = dataclasses.replace(parts, notes=(*facts.notes, *parts.notes), dtypes=kept.own)
    family = FAMILIES.get(facts.family)
    if (
        prediction is not None
        and prediction != facts.prediction
        and Flow.name in (prediction, facts.prediction)
    ):
        raise ModelError(
            f"{found.configs.name} predicts {facts.prediction or 'noise on a fixed schedule'}, so prediction = "
            f"{prediction!r} contradicts it: its noise levels are others. Leave prediction out."
        )
    if prediction is not None and prediction != facts.prediction:
        said = facts.prediction or "nothing"
        parts = _predicting(
            parts, prediction, f"Taken to predict {prediction}, as asked; its configs say {said}."
        )
    elif found.configs.probe:
        storing_only = torch.float16 in kept.used and where.type == "cpu"
        probed = (
            family.load(dataclasses.replace(parts, dtypes={}), dtype=torch.float32, device=where)
            if storing_only
            else family.load(parts, dtype=dtype, device=where)
        )
        parts = _predicting(parts, *probe_prediction(probed))
    if found.configs.probe:  # a checkpoint says its size as little as its prediction
        unet: Any = parts.modules["unet"]
        unet.register_to_config(sample_size=default_side(unet.config, parts.scheduler.config.prediction_type))
    base = family.load(parts, dtype=dtype, device=where)
    if quantization != NONE:
        base.quantization = quantization
        base.notes = (*base.notes, said_of(base.denoiser))
    if kept.own:
        check_kept(base.modules(), kept.own, base.name)
    if offload != NONE:
        park(base, computes)
    return base


def _predicting(parts: Components, kind: str, note: str) -> Components:
    scheduler = type(parts.scheduler).from_config(parts.scheduler.config, prediction_type=kind)
    return dataclasses.replace(parts, scheduler=scheduler, notes=(*parts.notes, note))


def probe_prediction(base: BaseModel) -> tuple[str, str]:
    """("epsilon" or "v_prediction", how it was told): asks the weights, for checkpoints that don't say it.

    At the highest noise level the latents are the noise itself, so a denoiser of epsilon answers with what it
    was given (correlation near 1), and one of velocity with minus the picture that it imagines (near 0).
    """
    side = 32 // 2 ** max(0, len(base.denoiser.config["block_out_channels"]) - 4)  # type: ignore[index]
    noise = Streams(0).normal("probe", [0], (base.latent_channels, side, side))
    last = base.prediction.from_uniform(torch.ones(1))
    with torch.no_grad():
        answer = base.denoise(noise, last, base.encode_prompts([""]), Frame.plain(1, side, side))
    both = torch.stack([noise.flatten(), answer.cpu().flatten()])
    correlation = float(torch.corrcoef(both)[0, 1])
    kind = "epsilon" if correlation > 0.5 else "v_prediction"
    return kind, (
        "The checkpoint does not say what it predicts. Given pure noise, its answer correlates "
        f"{correlation:.2f} with that noise: {kind}."
    )


def _describe(configs: Configs) -> BaseFacts:
    claimed = [name for name, family in FAMILIES.working() if family.recognises(configs)]
    if len(claimed) > 1:
        raise ModelError(
            f"{configs.name} is claimed by {len(claimed)} families: {', '.join(claimed)}. "
            "A plug-in's `recognises` is too wide: uninstall it, or tell its author."
        )
    if claimed:
        return dataclasses.replace(FAMILIES.get(claimed[0]).describe(configs), components=weighty(configs))
    title = architecture(configs)
    refusal = f"{configs.name} is {title}; this release trains {', '.join(FAMILIES.names())}."
    if not configs.parts and any(family.title.startswith(title) for _, family in FAMILIES.working()):
        refusal = (
            f"{configs.name} is {title} as a single file; this release reads that as a folder. Make one with "
            f"diffusers: {configs.pipeline}.from_single_file(...).save_pretrained(FOLDER), and name the folder."
        )
    return BaseFacts(configs.name, "", title, "", problems=(refusal,), weights_dtype=configs.weights_dtype)


@dataclass(frozen=True)
class _Found:
    """A base that is there: what its configs say, and how its weights are had."""

    configs: Configs
    load: Callable[[Dtypes, str | Path | None], Components]
    """(dtypes, tokenizer folder) -> its parts"""
    folder: Path | None = None
    """Where its configs and vocabularies lie; None for a single checkpoint."""


def _find(
    source: str | Path, revision: str | None, variant: str | None, rest: str | Path | None = None
) -> _Found:
    text = str(source)
    path = Path(text).expanduser()
    if rest is not None and (text == PICTUREBOOK or not path.is_file()):
        _no_effect(text, "it is no single file, and has all of its own", rest=str(rest))
    if text == PICTUREBOOK:
        from scumble import picturebook

        _no_effect(text, "it is inside this package", revision=revision, variant=variant)
        return _found_folder(Path(picturebook.path()), text, None)
    if path.is_dir():
        _no_effect(text, "it is a folder on this machine", revision=revision)
        return _found_folder(path, text, variant)
    if path.is_file():
        return _found_file(path, text, revision, variant, rest)
    if isinstance(source, Path) or _looks_local(text):
        raise ModelError(_no_such_path(path, text))
    if not hub.is_hub_id(text):
        raise ModelError(
            f"There is no base {text!r}.{did_you_mean(text, [PICTUREBOOK])} A base is {PICTUREBOOK!r}, a "
            f"Hub id "
            '("owner/name"), a folder in diffusers\' layout, or a .safetensors checkpoint.'
        )
    configs_at = hub.download_configs(text, revision)
    configs = read_folder(configs_at, text, variant, weights=False)

    def load(dtypes: Dtypes, words: str | Path | None) -> Components:
        folder = hub.download_weights(text, revision, variant, configs)
        found = _found_folder(folder, text, variant)
        facts = _describe(found.configs)
        if facts.problems:  # the repository has no .safetensors of this variant, or the cache is not complete
            raise ModelError("\n".join(facts.problems))
        return found.load(dtypes, words)

    return _Found(configs, load, configs_at)


def _found_folder(folder: Path, name: str, variant: str | None) -> _Found:
    configs = read_folder(folder, name, variant)
    return _Found(
        configs, lambda dtypes, words: _load_folder(folder, configs, dtypes, variant, words), folder
    )


def _found_file(
    path: Path, name: str, revision: str | None, variant: str | None, rest: str | Path | None
) -> _Found:
    own = read_checkpoint(path, name)
    lender = _find_rest(path, own, revision, variant, rest) if own.parts else None
    if lender is None:
        _no_effect(name, "it is a file on this machine", revision=revision, variant=variant)
    configs = own if lender is None else _completed(own, lender)
    return _Found(configs, lambda dtypes, words: _load_file(path, own, configs, dtypes, words, lender))


@dataclass(frozen=True)
class _Rest:
    """Another base, as far as a single file takes components from it."""

    configs: Configs
    """Of those components alone."""
    folder: Path
    """Where their configs and vocabularies lie."""
    fetch: Callable[[], Path]
    """The folder with their weights."""
    variant: str | None


def _find_rest(
    path: Path, own: Configs, revision: str | None, variant: str | None, rest: str | Path | None
) -> _Rest | None:
    """The base that `rest` names; else the one in whose folder the file lies, if that is of its kind."""
    wanted = {*own.lacking, *(part for part in own.parts if part.startswith("tokenizer"))}
    beside = rest is None
    text = str(path.parent if rest is None else rest)
    folder = Path(text).expanduser()
    if beside and not (folder / "model_index.json").is_file():
        return None
    if text == PICTUREBOOK:
        from scumble import picturebook

        folder = Path(picturebook.path())
    if folder.is_dir():
        if not beside:
            _no_effect(text, "it is a folder on this machine", revision=revision)
        configs, fetch = read_folder(folder, text, variant, only=wanted), lambda: folder
    elif hub.is_hub_id(text) and not isinstance(rest, Path) and not _looks_local(text):
        folder = hub.download_configs(text, revision)
        configs = read_folder(folder, text, variant, weights=False, only=wanted)
        fetch = functools.partial(hub.download_weights, text, revision, variant, configs)
    else:
        raise ModelError(
            f"rest = {text!r} is no folder here and no Hub id. It is a base in diffusers' layout, from which "
            f"{own.name} takes what it does not hold."
        )
    if _lineage(configs.pipeline) != _lineage(own.pipeline):
        if beside:
            return None
        raise ModelError(
            f"{own.name} belongs to a {own.pipeline}, and rest = {text!r} is a {configs.pipeline}: their parts don't "
            "belong together. Name a base of the same kind as rest."
        )
    return _Rest(configs, folder, fetch, variant)


def _lineage(pipeline: str) -> str:
    """The kind of base that a pipeline's class is for; those of SD 1 and SD 2 have one."""
    return next((begin for begin in OTHER_ARCHITECTURES if pipeline.startswith(begin)), "")


def _completed(own: Configs, rest: _Rest) -> Configs:
    """The configs of a single file together with those of what it takes from another base."""
    taken = rest.configs.parts
    lacking = {part: phrase for part, phrase in own.lacking.items() if part not in taken}
    note = f"Not in the file, and taken from {rest.configs.name}: {', '.join(sorted(taken))}."
    return dataclasses.replace(
        own,
        parts={**own.parts, **taken},
        missing=(*phrases(lacking), *rest.configs.missing),
        notes=(*own.notes, note) if taken else own.notes,
        parameters={**own.parameters, **rest.configs.parameters},
        lacking=lacking,
        elsewhere=dict.fromkeys(taken, rest.folder),
    )


def _no_effect(name: str, because: str, **given: str | None) -> None:
    for option, value in given.items():
        if value is not None:
            raise ModelError(f"{option} {value!r} has no effect on {name}: {because}. Leave {option} out.")


def _looks_local(text: str) -> bool:
    parent = Path(text).parent
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith((".safetensors", ".ckpt", ".pt", ".bin"))
        or (parent != Path(".") and parent.is_dir())
    )


def _no_such_path(path: Path, text: str) -> str:
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    missing = path.relative_to(parent).parts[0] if parent != Path(".") else path.parts[0]
    here = sorted(entry.name for entry in parent.iterdir())
    told = f"There is no file or folder {text}: {parent.resolve()} has no {missing!r}."
    told += did_you_mean(missing, here)
    if hub.is_hub_id(text) and parent != Path(".") and not path.suffix:
        return f"{told} If a Hub id is meant: the folder {parent} here hides it; run this in another folder."
    return told


def _load_folder(
    folder: Path, configs: Configs, dtypes: Dtypes, variant: str | None, words: str | Path | None
) -> Components:
    if words is not None:
        _no_effect(configs.name, "it has its own", tokenizer=str(words))
    tokenizers: dict[str, Any] = {}
    scheduler: Any = None
    for part, config in configs.parts.items():
        kind = str(config["_class_name"])
        if part.startswith("tokenizer"):
            tokenizers[part] = _read_tokenizer(folder / part, configs.name, kind)
            continue
        cls = _class(kind, configs.name)  # of every component, before the first weight is read
        if part.startswith("scheduler"):
            scheduler = cls.from_config(dict(config))
    started()
    loaded = _load_parts(weighty(configs), folder, configs, dtypes, variant, configs.name)
    return _components(configs, loaded, tokenizers, scheduler)


@dataclass
class _Loaded:
    """Components with weights, as far as they are there."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    deferred: dict[str, Deferred] = field(default_factory=dict)
    """Those that are loaded when they are first needed."""
    notes: list[str] = field(default_factory=list)
    mark: str = ""
    """See `_mark`."""
    again: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    """See `Components.again`."""


def _load_parts(
    parts: Sequence[str], folder: Path, configs: Configs, dtypes: Dtypes, variant: str | None, base: str
) -> _Loaded:
    """These components of a folder in diffusers' layout, which is called `base`."""
    loaded = _Loaded()
    later = _describe(configs).deferred
    with _quiet():
        for part in parts:
            cls = _class(str(configs.parts[part]["_class_name"]), base)
            files, _ = weight_files(folder / part, variant)
            if part in later:
                load = functools.partial(_load_later, cls, folder / part, dtypes.of(part), variant, base)
                loaded.deferred[part] = Deferred(load, (folder / part / "config.json", *files))
                continue
            slim = dtypes.of(part) == torch.bfloat16 or dtypes.quantization != NONE
            if part in DENOISERS and slim and (streamed := _streamed(part, files, configs, dtypes, base)):
                loaded.modules[part], loaded.mark = streamed
                continue
            load_again = functools.partial(
                _load_later, cls, folder / part, _load_dtype(part, dtypes.of(part), files), variant, base
            )
            loaded.modules[part], unused = load_again()
            loaded.again[part] = functools.partial(_alone, load_again)
            loaded.notes.extend(unused)
            if part in DENOISERS:
                loaded.mark = _mark(loaded.modules[part], dtypes.of(part), dtypes.quantization)
    return loaded


def _streamed(
    part: str, files: Sequence[Path], configs: Configs, dtypes: Dtypes, base: str
) -> tuple[nn.Module, str] | None:
    """A denoiser and its fingerprint, without a second copy of it on the way; None where that can't be."""
    import diffusers

    config = configs.parts[part]
    cls = _class(str(config["_class_name"]), base)
    if not issubclass(cls, diffusers.ModelMixin):
        return None
    return stream(cls, config, files, dtype=dtypes.of(part), quantization=dtypes.quantization, base=base)


def _components(
    configs: Configs, loaded: _Loaded, tokenizers: Mapping[str, Any], scheduler: Any
) -> Components:
    return Components(
        configs.name,
        loaded.modules,
        tokenizers,
        scheduler,
        loaded.mark,
        tuple(loaded.notes),
        options=configs.options,
        deferred=loaded.deferred,
        again=loaded.again,
    )


def _load_later(
    cls: Any, folder: Path, dtype: torch.dtype, variant: str | None, base: str
) -> tuple[nn.Module, list[str]]:
    with _quiet():
        return _load_part(cls, folder, dtype, variant, base)


def _alone(load: Callable[[], tuple[nn.Module, list[str]]]) -> nn.Module:
    module, _ = load()
    return module


def _load_dtype(part: str, dtype: torch.dtype, files: Sequence[Path]) -> torch.dtype:
    """What a component is read in, before it is rounded to `dtype`."""
    if part.startswith("vae"):  # it computes in fp32 on a CPU, so that it is not rounded to fp16 first
        return torch.float32 if dtype == torch.float16 else dtype
    if part in DENOISERS and dtype == torch.bfloat16:  # which is rounded after the fingerprint is taken
        stored = {entry.code for file in files for entry in read_header(file).entries.values()}
        return dtype_of(*stored) if len(stored) == 1 and stored <= NARROW else torch.float32
    return dtype


def _mark(denoiser: nn.Module, dtype: torch.dtype, quantization: str) -> str:
    """The fingerprint, where `dtype` or the quantization keeps less of a weight than the fp16 that it is made of.
    Rounds to them."""
    if dtype != torch.bfloat16 and quantization == NONE:
        return ""
    mark = fingerprint(denoiser.state_dict())
    quantize(denoiser, quantization, dtype)
    nn.Module.to(denoiser, dtype)
    return mark


def _class(name: str, base: str) -> Any:
    import diffusers
    import transformers

    found = getattr(diffusers, name, None) or getattr(transformers, name, None)
    if found is None:
        raise ModelError(
            f"{base} has a component of class {name!r}, which diffusers {diffusers.__version__} and "
            f"transformers {transformers.__version__} don't have. Upgrade them, or check model_index.json."
        )
    return found


def _load_part(
    cls: Any, folder: Path, dtype: torch.dtype, variant: str | None, base: str
) -> tuple[nn.Module, list[str]]:
    import diffusers

    typed = {"torch_dtype" if issubclass(cls, diffusers.ModelMixin) else "dtype": dtype}
    try:
        model, report = cls.from_pretrained(
            str(folder),
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **typed,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{base}: {folder.name} can't be loaded as {cls.__name__}: {error}") from error
    for lack in ("missing_keys", "mismatched_keys"):
        if report.get(lack):
            some = sorted(map(str, report[lack]))
            raise ModelError(
                f"{base}: {len(some)} tensors of {folder.name} are {lack.removesuffix('_keys')} in its "
                f"file, e.g. {some[0]}. Config and weights don't belong together; download the base again."
            )
    unused = sorted(map(str, report.get("unexpected_keys") or ()))
    told = (
        [f"{len(unused)} tensors in the file of {folder.name} have no place in it, e.g. {unused[0]}."]
        if unused
        else []
    )
    return model, told


def _read_tokenizer(folder: Path, base: str, kind: str = "CLIPTokenizer") -> Any:
    try:
        return _class(kind, base).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"The tokenizer of {base} can't be read from {folder}: {error}") from error


def _load_file(
    path: Path,
    own: Configs,
    configs: Configs,
    dtypes: Dtypes,
    words: str | Path | None,
    rest: _Rest | None,
) -> Components:
    """`own` are the configs of the file alone."""
    tokenizers: dict[str, Any] = {}
    for part in (part for part in configs.parts if part.startswith("tokenizer")):
        kind = str(configs.parts[part]["_class_name"])
        if part in configs.elsewhere and (words is None or kind != CLIP_WORDS):
            tokenizers[part] = _read_tokenizer(configs.elsewhere[part] / part, configs.name, kind)
            continue
        tokenizers[part] = _find_tokenizer(path, configs, words, part)
        padding = own.parts.get(part, {}).get("pad_token")
        if padding is not None:
            tokenizers[part].pad_token = padding
    scheduler_config = dict(configs.parts["scheduler"])
    scheduler = _class(scheduler_config["_class_name"], configs.name).from_config(scheduler_config)
    started()
    loaded = _load_rest(configs, rest, dtypes)
    shapes = read_header(path).shapes
    layout = layout_of(shapes)
    if layout is None:
        loaded.modules |= _load_by_pipeline(path, configs, scheduler, tokenizers, loaded.modules)
    else:
        later = _describe(configs).deferred
        marks = layout.marks(shapes, configs.name)
        loaded.notes += unread(shapes, marks)
        loads = _prepared(layout, path, configs, marks, dtypes)
        for part, load in loads.items():
            if part in later:
                loaded.deferred[part] = Deferred(functools.partial(_loaded_later, load), (path,))
            else:
                loaded.modules[part], loaded.again[part] = load(), load
    # weights come as they are stored, and are rounded to their dtype after the fingerprint is taken
    loaded.mark = next(
        _mark(loaded.modules[part], dtypes.of(part), dtypes.quantization)
        for part in DENOISERS
        if part in loaded.modules
    )
    return _components(configs, loaded, tokenizers, scheduler)


def _loaded_later(load: Callable[[], nn.Module]) -> tuple[nn.Module, Sequence[str]]:
    with _quiet():
        return load(), ()


def _load_rest(configs: Configs, rest: _Rest | None, dtypes: Dtypes) -> _Loaded:
    """The components that come from another base."""
    lent = [part for part in configs.elsewhere if not part.startswith(WEIGHTLESS)]
    if rest is None or not lent:
        return _Loaded()
    folder = rest.fetch()
    whole = read_folder(folder, rest.configs.name, rest.variant, only=lent)
    if whole.missing:  # the repository has no .safetensors of this variant, or the cache is not complete
        raise ModelError(f"{rest.configs.name} is not complete. Missing: {'; '.join(whole.missing)}.")
    return _load_parts(lent, folder, configs, dtypes, rest.variant, rest.configs.name)


def _prepared(
    layout: FileLayout,
    path: Path,
    configs: Configs,
    marks: Mapping[str, Mapping[str, Mark]],
    dtypes: Dtypes,
) -> dict[str, Callable[[], nn.Module]]:
    """Component that a file holds -> what loads it. Every one is checked before the first is loaded."""
    found = {}
    for part in layout.parts:
        if part.name not in marks:
            continue
        config, dtype = configs.parts[part.name], dtypes.of(part.name)
        wanted: torch.dtype | None = torch.float32 if part.name.startswith("vae") else dtype
        if part is layout.parts[0] and dtype == torch.bfloat16:  # the fingerprint is of what is stored
            wanted = None
        found[part.name] = prepare_part(
            _class(part.kind, configs.name),
            config,
            path,
            marks[part.name],
            part.fixed(config),
            dtype=wanted,
            base=configs.name,
        )
    return found


def _load_by_pipeline(
    path: Path,
    configs: Configs,
    scheduler: Any,
    tokenizers: Mapping[str, Any],
    others: Mapping[str, nn.Module],
) -> dict[str, nn.Module]:
    """The components of a file in CompVis' names, by diffusers' own loader; `others` it does not hold."""
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    pipeline_class = getattr(diffusers, configs.pipeline)
    unwanted = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    taken = inspect.signature(pipeline_class.__init__).parameters
    with tempfile.TemporaryDirectory() as folder, _quiet():
        write_configs(configs, Path(folder))
        try:
            pipeline = pipeline_class.from_single_file(
                str(path),
                config=folder,
                scheduler=scheduler,
                local_files_only=True,
                **tokenizers,
                **others,
                **{name: value for name, value in unwanted.items() if name in taken},
            )
        except NotImplementedError as error:  # torch, of a tensor that was never filled
            raise ModelError(
                f"{configs.name} lacks tensors of its UNet, VAE or text encoder: it is not a whole "
                f"checkpoint. Download it again."
            ) from error
        except (OSError, RuntimeError, ValueError, KeyError, SingleFileComponentError) as error:
            raise ModelError(
                f"{configs.name} can't be loaded by diffusers' single-file loader: {error}"
            ) from error
    modules: dict[str, nn.Module] = {part: getattr(pipeline, part) for part in weighty(configs)}
    lack = [f"{part}.{n}" for part, m in modules.items() for n, p in m.named_parameters() if p.is_meta]
    if lack:
        raise ModelError(
            f"{configs.name} lacks {len(lack)} tensors, e.g. {lack[0]}. The file is not a whole checkpoint; "
            f"download it again."
        )
    return modules


NARROW = {"F16", "BF16"}
"""Dtypes, as files spell them, that are not widened on their way in."""

CLIP_WORDS = "CLIPTokenizer"
"""The class of the tokenizers that `tokenizer` of `load_base` names the vocabulary of."""


def _find_tokenizer(path: Path, configs: Configs, words: str | Path | None, part: str) -> Any:
    """The vocabulary of a checkpoint's `part`: CLIP's where one is given, else one beside the file, or one in the local
    Hub cache."""
    kind = str(configs.parts[part]["_class_name"])
    is_clip = kind == CLIP_WORDS
    if words is not None and is_clip:
        folder = Path(words).expanduser()
        if not folder.is_dir():
            raise ModelError(f"There is no tokenizer folder {folder}.")
        return _read_tokenizer(folder, configs.name)
    beside = path.parent / ("tokenizer" if is_clip else part)
    if beside.is_dir():
        return _read_tokenizer(beside, configs.name, kind)
    files = ("vocab.json", "merges.txt") if is_clip else ("tokenizer.json", "tokenizer_config.json")
    for repo, prefix in CACHED_TOKENIZERS if is_clip else CACHED_T5_TOKENIZERS:
        found = [hub.cached_file(repo, f"{prefix}{file}") for file in files]
        if found[0] is not None and all(found):
            return _read_tokenizer(found[0].parent, configs.name, kind)
    if is_clip:
        raise ModelError(
            f"{configs.name} is a single checkpoint: it holds no tokenizer, and none is on this machine. Put "
            f"the files vocab.json and merges.txt of CLIP into {beside}, or pass tokenizer=FOLDER, or run once, "
            "with a network, `hf download openai/clip-vit-large-patch14 vocab.json merges.txt "
            "tokenizer_config.json special_tokens_map.json` (1.5 MB)."
        )
    repo, prefix = CACHED_T5_TOKENIZERS[0]
    raise ModelError(
        f"{configs.name} is a single checkpoint: it holds no vocabulary of T5, and none is on this machine. Put the "
        f"files tokenizer.json and tokenizer_config.json of T5 into {beside}, or name a base in diffusers' layout that "
        f"has them as rest, or run once, with a network, `hf download {repo} {prefix}tokenizer.json "
        f"{prefix}tokenizer_config.json` (2.4 MB)."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' progress bars off, and as they were afterwards."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    switches = [
        library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()
    ]
    for library in switches:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in switches:
            library.enable_progress_bar()
