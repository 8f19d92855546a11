from __future__ import annotations

import json
from pathlib import Path

import pytest

from scumble.data.sources import Dataset, look, open_dataset
from scumble.errors import DataError
from tests.data.fakes import folder, noise, settings


def pictures(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(16, 16, seed).save(root / name)
    return root


def lines(path: Path, *rows: object) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def shown(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {record.key: record.captions for record in dataset.records}


# -- folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["file_name", "image", "picture"])
def test_metadata_jsonl_by_any_image_column(tmp_path: Path, column: str) -> None:
    pictures(tmp_path, "a.png", "sub/b.png")
    lines(
        tmp_path / "metadata.jsonl",
        {column: "a.png", "text": " a fox "},
        {column: "sub/b.png", "text": "a hen", "weight": 2},
    )
    dataset = open_dataset(settings(tmp_path, image_column="image" if column == "file_name" else column))
    assert shown(dataset) == {"a.png": ("a fox",), "sub/b.png": ("a hen",)}
    assert dataset.records[1].extra == {"weight": 2} and "metadata.jsonl" in dataset.source
    with dataset.records[1].open() as picture:
        assert picture.size == (16, 16)
    assert dataset.records[0].read is not None
    assert dataset.records[0].read() == (tmp_path / "a.png").read_bytes()


def test_metadata_csv_with_commas_and_new_lines(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    text = 'file_name,prompt\na.png,"red, small\nfox"\nb.png,hen\n'
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    dataset = open_dataset(settings(tmp_path, caption_column="prompt"))
    assert shown(dataset) == {"a.png": ("red, small\nfox",), "b.png": ("hen",)}


def test_nested_metadata_is_relative_to_its_own_folder(tmp_path: Path) -> None:
    pictures(tmp_path, "one/a.png", "two/a.png")
    for name in ("one", "two"):
        lines(tmp_path / name / "metadata.jsonl", {"file_name": "a.png", "text": name})
    assert shown(open_dataset(settings(tmp_path))) == {"one/a.png": ("one",), "two/a.png": ("two",)}


def test_list_valued_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": ["a fox", "a red animal"]})
    assert open_dataset(settings(tmp_path)).records[0].captions == ("a fox", "a red animal")


def test_a_missing_caption_column_lists_the_columns_there_are(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "caption": "a fox", "source": "web"})
    with pytest.raises(DataError) as caught:
        open_dataset(settings(tmp_path))
    assert "no column 'text' for captions. It has: file_name, caption, source." in str(caught.value)
    assert 'Set caption_column = "caption"' in str(caught.value)


def test_a_missing_image_column_lists_the_columns_there_are(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    lines(tmp_path / "metadata.jsonl", {"photo": "a.png", "text": "a fox"})
    with pytest.raises(DataError, match=r"no column 'image', and no 'file_name'.* It has: photo, text"):
        open_dataset(settings(tmp_path))


def test_all_wrong_rows_are_told_at_once(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "d.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "ok"}\n'
        '{"file_name": "gone.png", "text": "x"}\n'
        "{oops\n"
        '{"file_name": "b.png", "text": null}\n'
        '{"file_name": "d.png", "text": 7}\n'
        '{"text": "nameless"}\n'
        "[1]\n"
    )
    with pytest.raises(DataError) as caught:
        open_dataset(settings(tmp_path))
    for words in (
        "6 problems",
        "gone.png: there is no such file; metadata.jsonl:2 names it",
        "metadata.jsonl:3: is not JSON",
        "b.png: has no caption",
        "d.png: has a caption that is neither text nor a list of texts: 7",
        "metadata.jsonl:6: names no picture",
        "metadata.jsonl:7: is not a JSON object",
    ):
        assert words in str(caught.value)
    dataset = look(settings(tmp_path))
    assert list(shown(dataset)) == ["a.png"] and len(dataset.problems) == 6


def test_a_ragged_csv_is_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one,two\nb.png,ok\n")
    with pytest.raises(DataError, match=r"metadata.csv:2: has another number of cells"):
        open_dataset(settings(tmp_path))


def test_pictures_without_a_row_are_told_not_dropped_in_silence(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "./a.png", "text": "a fox"})
    (problem,) = open_dataset(settings(tmp_path)).problems
    assert not problem.error
    assert str(problem) == "b.png: and 1 more pictures are not named in metadata.jsonl, and left out."


@pytest.mark.parametrize(
    ("data", "caption", "told"),
    [
        ("ein Füchslein".encode(), "ein Füchslein", None),
        (b"\xef\xbb\xbf" + "ein Füchslein\r\n".encode(), "ein Füchslein", None),
        ("ein Füchslein".encode("utf-16"), "ein Füchslein", "utf-16"),
        ("ein Füchslein".encode("utf-16-be"), "ein Füchslein", "utf-16-be"),
        ("ein Füchslein\u2019s".encode("cp1252"), "ein Füchslein\u2019s", "cp1252"),
    ],
)
def test_text_files_in_any_encoding(tmp_path: Path, data: bytes, caption: str, told: str | None) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    dataset = open_dataset(settings(tmp_path))
    assert dataset.records[0].captions == (caption,)
    if told is None:
        assert not dataset.problems
    else:
        assert f"is read as {told}: {caption[:9]!r}"[:-1] in str(dataset.problems[0])


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes(b"caf\x81\xff")
    (tmp_path / "b.txt").write_text("ok")
    with pytest.raises(DataError, match=r"a.txt: is no text: byte 0x81 at 3 is neither UTF-8 nor cp1252"):
        open_dataset(settings(tmp_path))


def test_captions_in_other_endings_and_nested_folders(tmp_path: Path) -> None:
    pictures(tmp_path, "a.JPG", "deep/er/b.webp", "c.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep/er/b.caption").write_text("two")
    (tmp_path / "c.png.txt").write_text("three")
    pictures(tmp_path / ".hidden", "d.png")
    assert shown(open_dataset(settings(tmp_path))) == {
        "a.JPG": ("one",),
        "c.png": ("three",),
        "deep/er/b.webp": ("two",),
    }


def test_a_picture_without_a_text_file_is_named(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "3.txt").unlink()
    with pytest.raises(DataError, match=r"3.png: has no caption. Write one into 3.txt"):
        open_dataset(settings(tmp_path))


def test_no_captions_at_all_says_where_it_looked(tmp_path: Path) -> None:
    pictures(tmp_path, *[f"{index:02}.png" for index in range(24)])
    with pytest.raises(DataError) as caught:
        open_dataset(settings(tmp_path))
    assert "found 24 images, 0 captions" in str(caught.value)
    for words in ("00.txt", "metadata.jsonl", "metadata.csv", '{"file_name": "00.png", "text":', "caption ="):
        assert words in str(caught.value)


def test_no_pictures_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_text("")
    with pytest.raises(DataError, match=r"No pictures in .* found 1 \.docx"):
        open_dataset(settings(tmp_path))
    with pytest.raises(DataError, match=r"There is no folder './nowhere'"):
        open_dataset(settings("./nowhere"))


def test_kohya_folders_repeat_and_name(tmp_path: Path) -> None:
    pictures(tmp_path, "10_red fox/a.png", "10_red fox/b.png", "3_hen/c.png")
    (tmp_path / "10_red fox/b.txt").write_text("a fox in the snow")
    dataset = open_dataset(settings(tmp_path, repeats=2))
    assert [(record.key, record.captions[0], record.repeats) for record in dataset.records] == [
        ("10_red fox/a.png", "red fox", 20),
        ("10_red fox/b.png", "a fox in the snow", 20),
        ("3_hen/c.png", "hen", 6),
    ]
    assert "10 x 'red fox'; 3 x 'hen'" in dataset.problems[0].text
    inner = open_dataset(settings(tmp_path / "3_hen"))
    assert (inner.records[0].captions, inner.records[0].repeats) == (("hen",), 3)


def test_one_prompt_for_all_says_which_captions_it_hides(tmp_path: Path) -> None:
    folder(tmp_path)
    dataset = open_dataset(settings(tmp_path, caption="a photo of sks"))
    assert {record.captions for record in dataset.records} == {("a photo of sks",)}
    assert "and 5 more are not read" in dataset.problems[0].text


def test_a_folder_of_splits_trains_on_the_one(tmp_path: Path) -> None:
    folder(tmp_path / "train")
    folder(tmp_path / "test", sizes=((8, 8),) * 2)
    dataset = open_dataset(settings(tmp_path))
    assert len(dataset) == 6 and "2 pictures beside it are not" in dataset.problems[0].text
    assert len(open_dataset(settings(tmp_path, split="test"))) == 2


def test_linked_folders_are_entered_once(tmp_path: Path) -> None:
    folder(tmp_path / "data" / "real")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    assert len(open_dataset(settings(tmp_path / "data"))) == 6


def test_max_samples_are_chosen_by_seed(tmp_path: Path) -> None:
    root = folder(tmp_path, sizes=((8, 8),) * 20)
    few = settings(root, max_samples=5)
    chosen = [record.key for record in open_dataset(few, seed=1).records]
    assert len(chosen) == 5 and chosen == [record.key for record in open_dataset(few, seed=1).records]
    assert len({tuple(r.key for r in open_dataset(few, seed=s).records) for s in range(6)}) > 3
    assert len(open_dataset(settings(root, max_samples=99))) == 20


# -- Hugging Face datasets -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]  # datasets.Dataset
    datasets = pytest.importorskip("datasets")
    root = pictures(tmp_path_factory.mktemp("table"), "a.png", "b.png", "c.png")
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "weight": datasets.Value("int64")}
    )
    rows = {
        "image": [str(root / f"{name}.png") for name in "abc"],
        "text": ["a fox", "a hen", "a cow"],
        "weight": [1, 2, 3],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def same(dataset: Dataset) -> None:
    assert [record.captions for record in dataset.records] == [("a fox",), ("a hen",), ("a cow",)]
    assert [record.key for record in dataset.records] == ["row 0", "row 1", "row 2"]
    assert dataset.records[2].extra["weight"] == 3 and "image" not in dataset.records[2].extra
    for seed, record in enumerate(dataset.records):
        with record.open() as picture:
            assert picture.tobytes() == noise(16, 16, seed).tobytes()
        assert record.read is not None and record.read()[:4] == b"\x89PNG"


def test_a_saved_dataset(tmp_path: Path, table) -> None:  # type: ignore[no-untyped-def]
    table.save_to_disk(str(tmp_path / "saved"))
    same(open_dataset(settings(tmp_path / "saved")))


def test_a_saved_dataset_of_splits(tmp_path: Path, table) -> None:  # type: ignore[no-untyped-def]
    import datasets

    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "saved"))
    same(open_dataset(settings(tmp_path / "saved")))
    assert len(open_dataset(settings(tmp_path / "saved", split="test"))) == 1
    with pytest.raises(DataError, match=r"has no split 'dev'. It has: train, test"):
        open_dataset(settings(tmp_path / "saved", split="dev"))


def test_parquet_files_of_the_split(
    tmp_path: Path,
    table,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    embedded = table.map(lambda row: row)  # a parquet file holds the bytes, not the paths
    (tmp_path / "hub/data").mkdir(parents=True)
    embedded.to_parquet(str(tmp_path / "hub/data/train-00000-of-00001.parquet"))
    embedded.select([0]).to_parquet(str(tmp_path / "hub/data/test-00000-of-00001.parquet"))
    same(open_dataset(settings(tmp_path / "hub")))
    same(open_dataset(settings(tmp_path / "hub/data/train-00000-of-00001.parquet")))


def test_columns_of_a_table_are_listed(tmp_path: Path, table) -> None:  # type: ignore[no-untyped-def]
    table.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"no column 'caption' for captions. It has: image, text, weight"):
        open_dataset(settings(tmp_path / "saved", caption_column="caption"))
    with pytest.raises(DataError, match=r"no column 'picture'.*Set image_column = \"image\""):
        open_dataset(settings(tmp_path / "saved", image_column="picture"))
    with pytest.raises(DataError, match=r"Column 'weight' of .* holds .*, not pictures"):
        open_dataset(settings(tmp_path / "saved", image_column="weight"))


def test_a_row_without_caption_is_named(tmp_path: Path, table) -> None:  # type: ignore[no-untyped-def]
    holes = table.map(lambda row, index: {"text": None if index == 1 else row["text"]}, with_indices=True)
    holes.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="row 1: has no caption"):
        open_dataset(settings(tmp_path / "saved"))
    assert len(open_dataset(settings(tmp_path / "saved", caption="one for all"))) == 3


def test_an_id_that_is_nowhere_names_both_places(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"'nobody/nothing' can't be loaded: Couldn't reach.*no folder of this name"
    ):
        open_dataset(settings("nobody/nothing"))


def test_a_hub_id_goes_to_the_hub_with_its_configuration(
    monkeypatch: pytest.MonkeyPatch,
    table,  # type: ignore[no-untyped-def]
) -> None:
    import datasets

    asked: list[object] = []

    def hub(*args: object, **options: object) -> object:
        asked.extend([args, options])
        return table

    monkeypatch.setattr(datasets, "load_dataset", hub)
    same(open_dataset(settings("lambda/animals", dataset_config="small", split="train[:3]")))
    assert asked == [("lambda/animals", "small"), {"split": "train[:3]"}]
