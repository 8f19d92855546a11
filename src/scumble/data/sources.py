"""Sources: where pictures and captions come from, found by looking, as one list of records.

Folders (metadata.jsonl or .csv, a text file beside each picture, kohya's `10_name` folders, or one prompt for
all) and Hugging Face datasets (saved, parquet, or from the Hub). Nothing here opens a picture.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from scumble.data import masks
from scumble.data.problems import Problem, raise_all
from scumble.data.record import Record
from scumble.data.settings import DataSettings
from scumble.data.text import decode
from scumble.errors import DataError, did_you_mean
from scumble.rng import Streams

PICTURES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        *(".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga"),
    )
)
"""Endings taken for pictures. Some can't be read everywhere; then the file is refused by name, not passed
over."""
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_KOHYA = re.compile(r"(\d{1,3})_(.+)")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Dataset:
    """The records of a dataset in a fixed order, and what was odd about them."""

    records: tuple[Record, ...]
    source: str
    """What was found, for people: "24 pictures with metadata.jsonl in dog/"."""
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def only(self, indices: Iterable[int]) -> Dataset:
        """The records at `indices`, in this order."""
        return replace(self, records=tuple(self.records[index] for index in indices))


def open_dataset(settings: DataSettings, *, seed: int = 0) -> Dataset:
    """The records that `settings` describe. Opens no picture.

    Raises:
        DataError: nothing is there, no captions are, or some records are wrong; all of these are listed.
    """
    dataset = look(settings, seed=seed)
    raise_all(dataset.problems, settings.images)
    return dataset


def look(settings: DataSettings, *, seed: int = 0) -> Dataset:
    """Like `open_dataset`, with wrong records left out and told in `problems`.

    Raises:
        DataError: there is no dataset to speak of: no folder, no pictures, no captions at all, no such
            column.
    """
    path = Path(settings.images).expanduser()
    if path.is_dir():
        dataset = _saved(path, settings) or _folder(path, settings)
    elif path.is_file():
        if path.suffix.lower() not in _TABLES:
            raise DataError(
                f"{path} is a file. Give the folder it is in, a .parquet or .arrow file, "
                "or the id of a dataset."
            )
        dataset = _tables([path], settings)
    elif _HUB_ID.fullmatch(settings.images):
        dataset = _hub(settings)
    else:
        raise DataError(f"There is no folder {settings.images!r} (looked in {Path.cwd()}).")
    records = tuple(replace(record, repeats=record.repeats * settings.repeats) for record in dataset.records)
    dataset = replace(dataset, records=records)
    if settings.max_samples is not None and settings.max_samples < len(dataset):
        chosen = Streams(seed).python("data.max samples").sample(range(len(dataset)), settings.max_samples)
        dataset = dataset.only(sorted(chosen))
    if settings.masks is None:
        return dataset
    records, problems = masks.attach(dataset.records, settings)
    return replace(dataset, records=records, problems=(*dataset.problems, *problems))


def pictures_in(folder: Path) -> list[Path]:
    """Every picture below `folder`, sorted; none where there is no such folder."""
    return [path for path in _walk(folder) if path.suffix.lower() in PICTURES]


# -- folders -------------------------------------------------------------------------------------------------


def _walk(root: Path) -> list[Path]:
    """All files below `root`, sorted; hidden files and folders are not entered, linked folders are, once."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _record(
    path: Path, key: str, captions: tuple[str, ...], extra: Mapping[str, Any] | None = None
) -> Record:
    return Record(key, lambda: Image.open(path), captions, path, extra or {}, read=path.read_bytes)


def _folder(root: Path, settings: DataSettings) -> Dataset:
    apart = masks.folder(settings)
    files = [path for path in _walk(root) if apart is None or apart not in path.parents]
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    sheets = [path for path in files if path.name in METADATA]
    tables = [path for path in files if path.suffix.lower() in _TABLES]
    if tables and not pictures:
        return _tables(tables, settings)
    if not pictures and not sheets:
        kinds = Counter(path.suffix.lower() or "no ending" for path in files)
        inside = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"
        raise DataError(f"No pictures in {root}. Looked for {' '.join(sorted(PICTURES))}; found {inside}.")
    own_split = root / settings.split
    if own_split.is_dir() and not any(path.parent == root for path in (*pictures, *sheets)):
        inner = _folder(own_split, settings)
        outside = sum(own_split not in path.parents for path in pictures)
        note = Problem(
            "split",
            f"{settings.split}/",
            f"is trained on; {outside} pictures beside it are not.",
            error=False,
        )
        return replace(inner, problems=(*inner.problems, note) if outside else inner.problems)
    dataset = _captioned(root, pictures, sheets, settings)
    return replace(dataset, problems=(*dataset.problems, *masks.unasked(root, pictures, settings)))


def _captioned(
    root: Path, pictures: Sequence[Path], sheets: Sequence[Path], settings: DataSettings
) -> Dataset:
    if settings.caption is not None:
        return _one_caption(root, pictures, sheets, settings)
    if sheets:
        return _sheets(root, pictures, sheets, settings)
    return _text_files(root, pictures, settings)


def _key(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _one_caption(
    root: Path, pictures: Sequence[Path], sheets: Sequence[Path], settings: DataSettings
) -> Dataset:
    assert settings.caption is not None
    repeats = _kohya(root, pictures)
    records = tuple(
        replace(_record(path, _key(root, path), (settings.caption,)), repeats=repeats.get(path, (1, ""))[0])
        for path in pictures
    )
    if not records:
        raise DataError(f"No pictures in {root}, only {sheets[0].name}.")
    unused = [_key(root, path) for path in sheets]
    unused += [_key(root, beside) for path in pictures if (beside := _beside(path)) is not None]
    problems = []
    if unused:
        several = f"and {len(unused) - 1} more are" if len(unused) > 1 else "is"
        text = f"{several} not read: caption {settings.caption!r} is for all pictures."
        problems.append(Problem("unused captions", unused[0], text, error=False))
    return Dataset(records, f"{len(records)} pictures with one prompt for all in {root}", tuple(problems))


def _beside(picture: Path) -> Path | None:
    """The text file of a picture: a.txt, a.caption or a.jpg.txt beside a.jpg."""
    for ending in CAPTIONS:
        for path in (picture.with_suffix(ending), picture.with_name(picture.name + ending)):
            if path.is_file():
                return path
    return None


def _kohya(root: Path, pictures: Sequence[Path]) -> dict[Path, tuple[int, str]]:
    """Picture -> (repeats, words of the folder's name), when every picture lies in a folder named like
    `10_red fox`."""
    found = {}
    for path in pictures:
        parts = path.relative_to(root).parts
        match = _KOHYA.fullmatch(parts[0] if len(parts) > 1 else root.absolute().name)
        if match is None or int(match[1]) == 0:
            return {}
        found[path] = (int(match[1]), match[2].strip())
    return found


def _text_files(root: Path, pictures: Sequence[Path], settings: DataSettings) -> Dataset:
    folders = _kohya(root, pictures)
    records: list[Record] = []
    problems: list[Problem] = []
    read = 0
    for path in pictures:
        key, text_file = _key(root, path), _beside(path)
        repeats, words = folders.get(path, (1, ""))
        if text_file is None:
            if not words:
                problems.append(
                    Problem(
                        "no caption", key, f"has no caption. Write one into {path.with_suffix('.txt').name}."
                    )
                )
                continue
            caption = words
        else:
            read += 1
            try:
                caption, encoding = decode(text_file.read_bytes())
            except DataError as error:
                problems.append(Problem("encoding", _key(root, text_file), str(error)))
                continue
            caption = caption.strip()
            if not encoding.startswith("utf-8"):
                text = f"is read as {encoding}: {caption[:60]!r}. If that is wrong, save it as UTF-8."
                problems.append(Problem("encoding", _key(root, text_file), text, error=False))
        records.append(replace(_record(path, key, (caption,)), repeats=repeats))
    if not read and not folders:
        first = pictures[0]
        raise DataError(
            f"found {len(pictures)} images, 0 captions in {root}. Looked for: "
            f"{_key(root, first.with_suffix('.txt'))} (a text file beside each picture), metadata.jsonl, "
            "metadata.csv, folders named like 10_fox. Put captions like this, a line of metadata.jsonl each: "
            f'{{"file_name": "{_key(root, first)}", "{settings.caption_column}": "a red fox in the snow"}}. '
            'Or give one prompt for all: caption = "..."'
        )
    if folders:
        named = sorted({f"{repeats} x {words!r}" for repeats, words in folders.values()})
        said = "; ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
        text = f"folder names are read as repeats and caption: {said}."
        problems.append(Problem("folder names", str(root), text, error=False))
    kind = "repeats and captions in folder names" if folders and not read else "text files"
    return Dataset(tuple(records), f"{len(pictures)} pictures with {kind} in {root}", tuple(problems))


def _rows(sheet: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """(place, row) of a metadata file; a DataError in place of a row that can't be read."""
    try:
        text, _ = decode(sheet.read_bytes())
    except DataError as error:
        yield sheet.name, error
        return
    if sheet.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            place = f"{sheet.name}:{reader.line_num}"
            if None in row or None in row.values():
                yield (
                    place,
                    DataError(
                        f"has another number of cells than the header: {', '.join(reader.fieldnames or ())}"
                    ),
                )
            else:
                yield place, dict(row)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield f"{sheet.name}:{number}", DataError(f"is not JSON: {error.msg} at column {error.colno}.")
            continue
        if isinstance(row, dict):
            yield f"{sheet.name}:{number}", row
        else:
            yield f"{sheet.name}:{number}", DataError("is not a JSON object {...}.")


def _sheets(root: Path, pictures: Sequence[Path], sheets: Sequence[Path], settings: DataSettings) -> Dataset:
    records: list[Record] = []
    problems: list[Problem] = []
    named: set[Path] = set()
    for sheet in sheets:
        folder = sheet.parent
        inside = "" if folder == root else _key(root, folder) + "/"
        rows = list(_rows(sheet))
        columns = list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))
        image_column = _image_column(columns, settings, sheet) if columns else ""
        if columns:
            _require_captions(columns, settings, str(sheet), {image_column})
        for place, row in rows:
            place = inside + place
            if isinstance(row, DataError):
                problems.append(Problem("metadata", place, str(row)))
                continue
            name = row.get(image_column)
            if not isinstance(name, str) or not name.strip():
                problems.append(
                    Problem("metadata", place, f"names no picture in {image_column!r}: {name!r}.")
                )
                continue
            path = folder / name
            if not path.is_file():
                problems.append(
                    Problem("missing", inside + name, f"there is no such file; {place} names it.")
                )
                continue
            named.add(Path(os.path.normpath(path)))
            captions = _captions(row.get(settings.caption_column))
            if isinstance(captions, str):
                problems.append(Problem("no caption", inside + name, f"{captions} ({place})"))
                continue
            extra = {k: v for k, v in row.items() if k not in (image_column, settings.caption_column)}
            records.append(_record(path, inside + name, captions, extra))
    left = [path for path in pictures if Path(os.path.normpath(path)) not in named]
    if left:
        several = f"and {len(left) - 1} more pictures are" if len(left) > 1 else "is"
        text = f"{several} not named in {', '.join(sorted({s.name for s in sheets}))}, and left out."
        problems.append(Problem("not named", _key(root, left[0]), text, error=False))
    names = ", ".join(sorted({sheet.name for sheet in sheets}))
    return Dataset(tuple(records), f"{len(records)} pictures with {names} in {root}", tuple(problems))


def _image_column(columns: Sequence[str], settings: DataSettings, sheet: Path) -> str:
    if settings.image_column in columns:
        return settings.image_column
    if "file_name" in columns:
        return "file_name"
    raise DataError(
        f"{sheet} has no column {settings.image_column!r}, and no 'file_name', that names the picture. "
        f"It has: {', '.join(columns)}."
    )


def _require_captions(
    columns: Sequence[str], settings: DataSettings, source: str, not_these: set[str]
) -> None:
    if settings.caption is not None or settings.caption_column in columns:
        return
    others = [column for column in columns if column not in not_these]
    likely = [
        column
        for column in others
        if column.lower() in ("caption", "captions", "prompt", "text", "description")
    ]
    hint = (
        f' Set caption_column = "{likely[0]}".' if likely else did_you_mean(settings.caption_column, others)
    )
    raise DataError(
        f"{source} has no column {settings.caption_column!r} for captions. "
        f"It has: {', '.join(columns)}.{hint} "
        'For one prompt for all pictures, set caption = "...".'
    )


def _captions(value: Any) -> tuple[str, ...] | str:
    """The captions in a cell, or the reason why there are none."""
    if isinstance(value, str):
        return (value.strip(),)
    if value is None:
        return 'has no caption. Write one; "" trains the picture without words.'
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return tuple(item.strip() for item in value)
    return f"has a caption that is neither text nor a list of texts: {value!r:.60}."


# -- Hugging Face datasets -----------------------------------------------------------------------------------


def _saved(root: Path, settings: DataSettings) -> Dataset | None:
    """A folder written by `save_to_disk`, or with metadata.parquet; None when it is neither."""
    import_needed = (root / "dataset_dict.json").is_file() or (
        (root / "state.json").is_file() and (root / "dataset_info.json").is_file()
    )
    if import_needed:
        import datasets

        loaded = datasets.load_from_disk(str(root))
        return _table(_split(loaded, settings, str(root)), settings, str(root))
    if (root / "metadata.parquet").is_file():
        return _load(settings, str(root), "imagefolder", data_dir=str(root), split=settings.split)
    return None


def _split(loaded: Any, settings: DataSettings, source: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if settings.split not in loaded:
        raise DataError(f"{source} has no split {settings.split!r}. It has: {', '.join(loaded)}.")
    return loaded[settings.split]


def _tables(files: Sequence[Path], settings: DataSettings) -> Dataset:
    """Parquet or arrow files. Those named like the split, as on the Hub (`train-00000-of-00004.parquet`), go
    first."""
    of_split = [path for path in files if re.split(r"[-_.]", path.name)[0] == settings.split]
    chosen = of_split or list(files)
    kinds = {_TABLES[path.suffix.lower()] for path in chosen}
    if len(kinds) > 1:
        raise DataError(f"{files[0].parent} holds both parquet and arrow files. Move one kind elsewhere.")
    source = str(chosen[0]) if len(chosen) == 1 else f"{chosen[0].parent} ({len(chosen)} files)"
    return _load(
        settings, source, kinds.pop(), data_files={"train": [str(path) for path in chosen]}, split="train"
    )


def _hub(settings: DataSettings) -> Dataset:
    return _load(settings, settings.images, settings.images, settings.dataset_config, split=settings.split)


def _load(settings: DataSettings, source: str, *args: Any, **options: Any) -> Dataset:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        loaded = datasets.load_dataset(*args, **options)
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        OSError,  # ConnectionError and FileNotFoundError are
        ValueError,
    ) as error:
        where = (
            "" if args[0] != settings.images else f" There is no folder of this name in {Path.cwd()} either."
        )
        raise DataError(f"The dataset {source!r} can't be loaded: {error}{where}") from error
    return _table(loaded, settings, source)


class _Row(Mapping[str, Any]):
    """The columns of one row beside picture and captions, read when asked for."""

    def __init__(self, table: Any, index: int) -> None:
        self._table, self._index = table, index

    def __getitem__(self, name: str) -> Any:
        if name not in self._table.column_names:
            raise KeyError(name)
        return self._table[self._index][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.column_names)

    def __len__(self) -> int:
        return len(self._table.column_names)


def _table(table: Any, settings: DataSettings, source: str) -> Dataset:
    import datasets

    columns = list(table.column_names)
    image_column = settings.image_column
    if image_column not in columns:
        pictured = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        hint = f' Set image_column = "{pictured[0]}".' if pictured else did_you_mean(image_column, columns)
        raise DataError(
            f"{source} has no column {image_column!r} for pictures. It has: {', '.join(columns)}.{hint}"
        )
    _require_captions(columns, settings, source, {image_column})
    feature = table.features[image_column]
    if isinstance(feature, datasets.Image):
        pictures = table.select_columns([image_column]).cast_column(
            image_column, datasets.Image(decode=False)
        )
    elif getattr(feature, "dtype", None) == "string":
        pictures = table.select_columns([image_column])
    else:
        raise DataError(f"Column {image_column!r} of {source} holds {feature}, not pictures or file names.")
    other = table.select_columns(
        [name for name in columns if name not in (image_column, settings.caption_column)]
    )
    cells = (
        [settings.caption] * len(table) if settings.caption is not None else table[settings.caption_column]
    )
    records: list[Record] = []
    problems: list[Problem] = []
    for index, cell in enumerate(cells):
        key = f"row {index}"
        captions = _captions(cell)
        if isinstance(captions, str):
            problems.append(Problem("no caption", key, captions))
            continue
        records.append(_row_record(pictures, index, image_column, key, captions, _Row(other, index)))
    if not records and not problems:
        raise DataError(f"{source} is empty.")
    return Dataset(tuple(records), f"{len(table)} pictures of the dataset {source}", tuple(problems))


def _row_record(
    pictures: Any, index: int, column: str, key: str, captions: tuple[str, ...], extra: Mapping[str, Any]
) -> Record:
    def read() -> bytes:
        cell = pictures[index][column]
        if isinstance(cell, dict) and cell.get("bytes"):
            return bytes(cell["bytes"])
        path = cell.get("path") if isinstance(cell, dict) else cell
        if not path:
            raise FileNotFoundError(f"{key} holds no picture")
        return Path(path).read_bytes()

    return Record(key, lambda: Image.open(io.BytesIO(read())), captions, None, extra, read=read)
