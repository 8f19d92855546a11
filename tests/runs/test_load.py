"""Loading settings: what wins over what, and every mistake told at once with its line and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from scumble.errors import ConfigError
from scumble.runs.load import Given, key_lines, load, override

GOOD = """\
base = "picturebook"
output = "runs/x"   # where it goes

[data]
images = "pictures"

[train]
steps = 5
optimizer = { name = "prodigy", learning_rate = 1.0 }
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def complaint(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(file, overrides)
    return [line.replace(str(file), "run.toml") for line in str(raised.value).splitlines()]


def test_what_comes_later_wins(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    config = load(file, ["train.steps=9", "adapter.rank=8"], given=[Given(("train", "steps"), 7, "--steps")])
    assert (config.train.steps, config.adapter.rank) == (9, 8)
    assert config.train.optimizer.name == "prodigy"
    assert load(file, given=[Given(("train", "steps"), 7, "--steps")]).train.steps == 7
    assert load(file).train.steps == 5


def test_an_override_inside_an_inline_table_keeps_the_rest(tmp_path: Path) -> None:
    config = load(write(tmp_path, GOOD), ["train.optimizer.weight_decay=0.5"])
    assert (config.train.optimizer.name, config.train.optimizer.weight_decay) == ("prodigy", 0.5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.steps=200", 200),
        ("train.steps = 200", 200),
        ("base=runwayml/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
        ("data.random_flip=true", True),
        ("preview.prompts=['a', \"b\"]", ["a", "b"]),
        ("data.caption=a photo of x=y", "a photo of x=y"),
        ("train.ema=null", None),
        ("train.precision=no", "no"),
    ],
)
def test_override_values(text: str, value: object) -> None:
    assert override(text).value == value


@pytest.mark.parametrize("text", ["steps", "=3", "train..steps=3", ".=1"])
def test_what_is_no_override(text: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.name=value"):
        override(text)


def test_an_unknown_setting_is_named_with_its_line_and_a_suggestion(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD.replace("optimizer =", "optimiser ="))
    assert complaint(file) == ['run.toml:9: [train] has no setting "optimiser". Did you mean "optimizer"?']


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """\
bas = "picturebook"
output = "x"
steps = 5
adapter = { rank = 0, targets = "attention" }

[data]
images = "pictures"

[train]
precision = "fp8"
batch = "many"
""",
    )
    lines = complaint(file, "train.optimizer.nam=adamw", "train.ema=3")
    assert sorted(lines) == sorted(
        [
            'run.toml:1: there is no setting "bas". Did you mean "base"?',
            'base is not set: The base model: "picturebook", a Hub id, a folder in diffusers\' layout, '
            "or a .safetensors checkpoint.",
            'run.toml:3: there is no setting "steps". Did you mean "train.steps" or "preview.steps"?',
            "run.toml:4: adapter.rank = 0: must be greater than or equal to 1.",
            "run.toml:10: train.precision = \"fp8\": must be 'no', 'fp16' or 'bf16'.",
            'run.toml:11: train.batch = "many": must be a whole number.',
            'train.optimizer.nam=adamw: [train.optimizer] has no setting "nam". Did you mean "name"?',
            "train.ema=3: train.ema = 3: must be less than 1.",
        ]
    )


@pytest.mark.parametrize("number", ["inf", "nan"])
@pytest.mark.parametrize(
    "name",
    ["train.optimizer.learning_rate", "train.max_grad_norm", "dreambooth.prior_weight", "data.held_out"],
)
def test_no_setting_is_infinite(tmp_path: Path, name: str, number: str) -> None:
    file = write(tmp_path, 'base = "b"\noutput = "x"\nmethod = "dreambooth"\ndata.images = "pictures"\n')
    assert complaint(file, f"{name}={number}") == [
        f"{name}={number}: {name} = {number}: must be a finite number."
    ]


def test_a_value_is_no_section_and_a_section_no_value(tmp_path: Path) -> None:
    file = write(
        tmp_path, GOOD.replace("[train]\nsteps = 5\n", "[other]\n").replace('output = "runs/x"', "train = 3")
    )
    lines = complaint(file, "base.name=x")
    assert "run.toml:2: train = 3: must be a section of settings, e.g. [train]" in lines
    assert 'base.name=x: base is "picturebook" (run.toml:1), not a section, so base.name can\'t be set.' in [
        line.replace(str(file), "run.toml") for line in lines
    ]


def test_a_rule_over_several_settings_speaks_too(tmp_path: Path) -> None:
    (line,) = complaint(write(tmp_path, GOOD), "train.preview_every=5")
    assert "train.preview_every = 5 draws nothing without preview.prompts" in line


def test_a_run_has_one_file_and_folders_go_beside_it(tmp_path: Path) -> None:
    (line,) = complaint(write(tmp_path, GOOD), "save.dialect=peft")
    assert "an adapter in peft is a folder of files" in line and 'also = ["peft"]' in line


def test_names_of_plug_ins_are_checked_with_suggestions(tmp_path: Path) -> None:
    lines = complaint(
        write(tmp_path, GOOD), "trackers=['tensorbord']", "save.dialect=difusers", "method=text-2-image"
    )
    text = "\n".join(lines)
    for wanted in (
        'Did you mean "tensorboard"?',
        'Did you mean "diffusers"?',
        'Did you mean "text-to-image"?',
    ):
        assert wanted in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = = 1", r"run\.toml:1:5: this is not TOML"),
        ('a = "x', r"run\.toml:1.*: this is not TOML"),
        ("[train\nsteps = 3", r"run\.toml:1:7: this is not TOML"),
    ],
)
def test_what_is_no_toml_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scumble config new"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "bad.toml").write_bytes(b'base = "\xff"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "bad.toml")
    (tmp_path / "bom.toml").write_text(GOOD, encoding="utf-8-sig")
    assert load(tmp_path / "bom.toml").base == "picturebook"


def test_lines_are_found_past_strings_comments_and_arrays() -> None:
    text = '''\
a = """
[no]
b = 1
"""  # "
list = [ # ]
  "]", "x = 1",
  { y = 2 },
]
"quoted.key" . inner = 'it''s'

[section.deep] # = 3
c.d = "[x]"
e = 1
'''
    text = text.replace("'it''s'", "'its'")
    assert key_lines(text) == {
        ("a",): 1,
        ("list",): 5,
        ("quoted.key", "inner"): 9,
        ("section", "deep"): 11,
        ("section", "deep", "c", "d"): 12,
        ("section", "deep", "e"): 13,
    }


def test_keywords_take_sections_and_settings_objects() -> None:
    from scumble.data.settings import DataSettings

    config = load(
        base=Path("folder/base"),
        output=Path("x"),
        data=DataSettings(images="pictures"),
        train={"steps": 3},
        train__batch=2,
    )
    assert (config.base, config.train.steps, config.train.batch) == ("folder/base", 3, 2)
    with pytest.raises(ConfigError, match='no setting "rnak"'):
        load(base="b", output="x", data={"images": "p"}, adapter={"rnak": 3})
