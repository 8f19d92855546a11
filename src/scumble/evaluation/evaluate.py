"""evaluate: draw base and adapter from the same seeds, measure, recommend a checkpoint, write numbers and a page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scumble.errors import ConfigError, DataError, FormatError, ModelError
from scumble.evaluation.asks import Ask, class_ask, subject_asks, unrelated_asks
from scumble.evaluation.concept import Concept, class_of, find_phrase, square, without
from scumble.evaluation.measure import CLASS, SUBJECT, UNRELATED, Group, measure
from scumble.evaluation.result import (
    NUMBERS,
    PAGE,
    Candidate,
    Evaluation,
    EvaluationSettings,
    Judged,
    as_json,
    summary,
)
from scumble.runs.folder import EVALUATED, SETTINGS, RunFolder

if TYPE_CHECKING:
    from PIL import Image

    from scumble.evaluation.eyes import Eye
    from scumble.inference.session import Session
    from scumble.runs.config import RunConfig

PICTURES = "pictures"
CLIP, DINO = "openai/clip-vit-large-patch14", "facebook/dinov2-base"
"""The models that are used where they lie in the local cache and no others are named."""
LARGEST = 512
"""Side in pixels that training pictures are reduced to."""
CLASS_SHARE = 3
"""A third as many pictures of the class as of the subject, at least four."""

Told = Callable[[int, int, str], None]
"""(pictures drawn, pictures in all, what is drawn)."""


def evaluate(
    source: str | Path,
    *,
    settings: EvaluationSettings | None = None,
    checkpoints: bool = False,
    subject: str | None = None,
    class_phrase: str | None = None,
    images: str | Path | None = None,
    base: str | None = None,
    rest: str | None = None,
    clip: str | None = None,
    dino: str | None = None,
    output: Path | None = None,
    device: str | None = None,
    dtype: str = "no",
    dtypes: Mapping[str, str] | None = None,
    eye: Eye | None = None,
    progress: Told | None = None,
) -> Evaluation:
    """Evaluate an adapter: what it learned, obeys, broke and copied.

    Args:
        source: a run's folder, one of its checkpoints, an adapter's file, or a folder that holds one.
        settings: how much is drawn.
        checkpoints: every checkpoint of the run beside its finished adapter, and recommend one.
        subject: what prompts call the concept; None takes the run's own word for it, or finds what all captions share.
        class_phrase: its class in words ("dog"); None takes the subject's last word, "" leaves the class out.
        images: the training pictures' folder; None asks the run's settings, which the file also carries.
        base: the base; None asks the run's settings or the file.
        rest: where a base that is a single file gets what it does not hold (see `load_base`); None asks the settings.
        clip, dino: models that judge real bases: folders or Hub ids in the local cache.
        output: where to write; None is `evaluation/` in the run, or beside the file.
        device, dtype, dtypes: of the base, as for Session.
        eye: who judges; None finds the picturebook's own judges, or CLIP and DINO.
        progress: told after every picture.

    Raises:
        ConfigError, FormatError, ModelError, DataError: something is missing or does not fit; told before anything
            is drawn.
    """
    from scumble.inference.find_base import find_base
    from scumble.inference.session import Session
    from scumble.models.loading import load_base
    from scumble.models.precision import dtype_named, find_device

    settings = settings or EvaluationSettings()
    candidates = find_candidates(Path(source), checkpoints)
    config = config_of(Path(source), candidates[-1].file)
    own = config is not None and base is None
    base = base or (config.base if config else find_base(candidates[-1].file))
    embedded = is_embedded(base)
    notes: list[str] = []
    alone = run_of(Path(source), candidates[-1].file) is None
    concept = find_concept(config, candidates[-1].file, subject, class_phrase, images, alone)
    eye = eye or find_eye(embedded, clip, dino, device, notes)
    if not concept.pictures:
        notes.append(
            "There are no training pictures to compare with: learned and copied are not measured. Name them with "
            "--images."
        )
    folder = claim(output or _beside(Path(source)))
    groups = asks_of(concept, settings, embedded)
    each = sum(len(asks) * len(seeds) for asks, seeds in groups.values())
    tell = _Counter(progress, each * (1 + len(candidates)))
    judged: list[Judged] = []
    loaded = load_base(
        base,
        dtype=dtype_named(dtype),
        device=find_device(device),
        revision=config.revision if config and own else None,
        variant=config.variant if config and own else None,
        prediction=config.prediction if config and own else None,
        rest=rest or (config.rest if config and own else None),
        dtypes=dtypes,
    )
    with Session(loaded) as session:
        notes += session.base.notes
        before, base_pictures = _draw(session, groups, None, settings, folder, "base", tell)
        for candidate in candidates:
            name = f"{candidate.step:06d}" if candidate.step is not None else "adapter"
            after, files = _draw(session, groups, candidate, settings, folder, name, tell)
            scores = measure(before, after, concept, eye, resamples=settings.resamples, seed=settings.seed)
            judged.append(Judged(candidate, scores, files))
            session.unload(candidate.file)
    training = {
        number: Path(PICTURES) / f"training-{number:03d}.png"
        for number in sorted({number for one in judged for number, _ in one.scores.nearest})
    }
    for number, path in training.items():
        concept.pictures[number].save(folder / path)
    found = Evaluation(
        folder=folder,
        base=base,
        concept=concept,
        eye=eye.name if eye else "",
        judged=judged,
        recommended=recommend(judged),
        asks={name: list(asks) for name, (asks, _) in groups.items()},
        seeds={name: list(seeds) for name, (_, seeds) in groups.items()},
        base_pictures=base_pictures,
        training=training,
        settings=settings,
        notes=tuple(dict.fromkeys(notes)),
    )
    run = Path(source) if Path(source).is_dir() and (Path(source) / SETTINGS).is_file() else None
    write(found, RunFolder(run) if run else None)
    return found


def find_candidates(source: Path, checkpoints: bool) -> list[Candidate]:
    """The adapter files that `source` means, the finished one last.

    Raises:
        ConfigError: checkpoints are asked for where there are none.
        FormatError: there is no adapter.
    """
    from scumble.inference.find_base import locate
    from scumble.training.state import ADAPTER

    saved = RunFolder(source).layout.checkpoints(source) if source.is_dir() else []
    steps = [
        Candidate(path / ADAPTER, f"step {step:,}", step)
        for step, path in saved
        if (path / ADAPTER).is_file()
    ]
    if checkpoints and not steps:
        raise ConfigError(
            f"{source} holds no checkpoints. --checkpoints needs the folder of a run that kept some "
            "(train.checkpoint_every); without it the finished adapter alone is evaluated."
        )
    if (source / ADAPTER).is_file():
        return [Candidate(source / ADAPTER, source.name)]
    try:
        finished = Candidate(locate(source), source.stem if source.is_file() else "finished")
    except FormatError as error:
        if not steps:
            raise FormatError(f"{error} Name a run's folder or an adapter's file.") from error
        return steps if checkpoints else steps[-1:]
    if not checkpoints:
        return [finished]
    if _same_file(finished.file, steps[-1].file):
        return steps  # the last checkpoint is the finished adapter
    return [*steps, finished]


def _same_file(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def config_of(source: Path, file: Path) -> RunConfig | None:
    """The settings of the run: of its folder, else those that the adapter's file carries; None where neither does.

    Raises:
        ConfigError: run.toml is there and can't be read.
    """
    from scumble.runs.load import load
    from scumble.runs.reproduce import settings_of

    folder = run_of(source, file)
    if folder is not None:
        return load(folder / SETTINGS)
    try:
        return settings_of(file)
    except (ConfigError, FormatError):  # none, or another version's: what they say can be given by hand
        return None


def run_of(source: Path, file: Path) -> Path | None:
    """The folder of the run that the file lies in; None where it lies by itself."""
    folders = (source, file.parent, file.parent.parent)
    return next((folder for folder in folders if (folder / SETTINGS).is_file()), None)


def find_concept(
    config: RunConfig | None,
    file: Path,
    subject: str | None,
    class_phrase: str | None,
    images: str | Path | None,
    alone: bool = False,
) -> Concept:
    """What was taught, by the run's settings and what is said instead. Of a file that lies `alone` the pictures may
    be on another machine: it is then judged without.

    Raises:
        ConfigError: it isn't known what the subject is called.
        DataError: the training pictures are not where they were.
    """
    from scumble.adapters.names import one_word
    from scumble.data.images import normalise
    from scumble.data.settings import DataSettings
    from scumble.data.sources import open_dataset
    from scumble.formats import read
    from scumble.methods.prior import PriorSettings
    from scumble.methods.words import WordSettings

    data = config.pictures if config else None
    if images is not None:
        data = data.model_copy(update={"images": str(images)}) if data else DataSettings(images=str(images))
    try:
        records = open_dataset(data, seed=config.train.seed if config else 0).records if data else ()
    except DataError:
        if images is not None or not alone:
            raise
        records = ()
    pictures = tuple(_reduced(square(normalise(record.open()))) for record in records)
    held = read(file).state.tokens
    words = [one_word(name) for name in held]
    options = config.options if config else None
    called = options.subject if isinstance(options, PriorSettings) else None
    phrase = (subject or called or "").strip()
    if not phrase and not records and not words:
        raise ConfigError(
            f"{file} was trained without pictures, doesn't say on which, or they are not here: say what its subject is "
            'called (--subject "a fox"), and where its training pictures are (--images FOLDER) if there are some.'
        )
    if not phrase and records:
        taught = options.placeholders if isinstance(options, WordSettings) else ()
        elsewhere = [word for word in taught if word not in held]
        captions = [without(caption, elsewhere) for record in records for caption in record.captions]
        phrase = find_phrase(captions, words)
    phrase = phrase or " ".join(words)
    named = class_of(phrase) if class_phrase is None else class_phrase.strip()
    return Concept(phrase, pictures, tuple(record.key for record in records), named)


def _reduced(picture: Image.Image) -> Image.Image:
    """No larger than judges look at, so that many photos fit into memory."""
    picture.thumbnail((LARGEST, LARGEST))
    return picture


def find_eye(
    embedded: bool, clip: str | None, dino: str | None, device: str | None, notes: list[str]
) -> Eye | None:
    """Who judges: the picturebook's own judges for its base; else CLIP and DINO where they are on this machine.

    Raises:
        ModelError: a model that was named is not there.
    """
    from scumble.evaluation.eyes import ModelEye, PicturebookEye
    from scumble.models.precision import find_device

    if embedded and not (clip or dino):
        return PicturebookEye()
    if not (clip or dino):
        clip, dino = (name if _cached(name) else None for name in (CLIP, DINO))
    if not (clip or dino):
        notes.append(
            "Nobody can say how like the subject the pictures are: no CLIP and no DINO is on this machine. Name "
            f"some with --clip and --dino, or fetch the usual ones: hf download {CLIP}; hf download {DINO}. Drift, "
            "diversity and copies are measured in pixels."
        )
        return None
    return ModelEye(clip, dino, device=find_device(device))


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def is_embedded(base: str) -> bool:
    """Whether this is the base inside the package."""
    import scumble.picturebook

    if base == "picturebook":
        return True
    try:
        return Path(base).resolve() == scumble.picturebook.path().resolve()
    except ModelError:
        return False


def asks_of(
    concept: Concept, settings: EvaluationSettings, embedded: bool
) -> dict[str, tuple[list[Ask], list[int]]]:
    """Group -> (prompts, seeds)."""
    seeds = min(settings.seeds, settings.pictures)
    scenes = max(1, settings.pictures // seeds)
    groups = {
        SUBJECT: (
            subject_asks(concept, scenes, embedded=embedded, seed=settings.seed),
            [settings.seed + number for number in range(seeds)],
        )
    }
    bare = class_ask(concept)
    if bare is not None:
        count = max(4, settings.pictures // CLASS_SHARE)
        groups[CLASS] = ([bare], [settings.seed + number for number in range(count)])
    if settings.unrelated:
        groups[UNRELATED] = (
            unrelated_asks(settings.unrelated, embedded=embedded, seed=settings.seed),
            [settings.seed],
        )
    return groups


def recommend(judged: Sequence[Judged]) -> Judged | None:
    """The candidate with the highest overall score, the earlier of two; None for one candidate or without scores."""
    known = [one for one in judged if one.scores.overall is not None]
    if len(judged) < 2 or not known:
        return None
    return max(known, key=lambda one: one.scores.overall or 0.0)


def claim(folder: Path) -> Path:
    """An empty folder to write to; an earlier evaluation there is replaced.

    Raises:
        ConfigError: it holds something else.
    """
    if folder.is_file():
        raise ConfigError(f"--output {folder} is a file. Name a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        others = [path.name for path in folder.iterdir() if path.name not in (NUMBERS, PAGE, PICTURES)]
        if others:
            raise ConfigError(
                f"{folder} holds other files ({', '.join(sorted(others)[:4])}). Write to a new folder with --output."
            )
        shutil.rmtree(folder)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    return folder


def _beside(source: Path) -> Path:
    from scumble.training.state import ADAPTER

    if (source / ADAPTER).is_file():  # a checkpoint holds what a run goes on from, and nothing else
        return source.parent / EVALUATED
    return source / EVALUATED if source.is_dir() else source.with_name(f"{source.stem}-{EVALUATED}")


def _draw(
    session: Session,
    groups: dict[str, tuple[list[Ask], list[int]]],
    candidate: Candidate | None,
    settings: EvaluationSettings,
    folder: Path,
    name: str,
    tell: _Counter,
) -> tuple[dict[str, Group], dict[str, list[Path]]]:
    from scumble.inference.request import AdapterUse, Request

    uses = (AdapterUse(path=candidate.file),) if candidate else ()
    wanted = [
        (group, Request(
            prompt=ask.prompt, seed=seed, steps=settings.steps, guidance=settings.guidance, adapters=uses
        ))
        for group, (asks, seeds) in groups.items()
        for ask in asks
        for seed in seeds
    ]  # fmt: skip
    pictures: dict[str, list[Image.Image]] = {group: [] for group in groups}
    files: dict[str, list[Path]] = {group: [] for group in groups}
    for first in range(0, len(wanted), session.batch_size):
        batch = wanted[first : first + session.batch_size]
        drawings = session.generate([request for _, request in batch])
        for (group, _), drawing in zip(batch, drawings, strict=True):
            path = Path(PICTURES) / f"{name}-{group}-{len(files[group]):03d}.png"
            drawing.save(folder / path)
            pictures[group].append(drawing.image)
            files[group].append(path)
            tell.one(f"{candidate.label if candidate else 'base'}: {group}")
    drawn = {group: Group(asks, seeds, pictures[group]) for group, (asks, seeds) in groups.items()}
    return drawn, files


class _Counter:
    """Counts drawn pictures for a progress bar."""

    def __init__(self, told: Told | None, total: int) -> None:
        self._told, self._total, self._done = told, total, 0

    def one(self, what: str) -> None:
        self._done += 1
        if self._told is not None:
            self._told(self._done, self._total, what)


def write(found: Evaluation, run: RunFolder | None) -> None:
    """The numbers as JSON, the page, and in a run's own folder what its model card says of it."""
    from scumble.evaluation.page import render

    found.numbers.write_text(_json(as_json(found)), encoding="utf-8")
    found.page.write_text(render(found), encoding="utf-8")
    if run is not None:
        run.evaluation.write_text(_json(summary(found)), encoding="utf-8")


def _json(values: object) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
