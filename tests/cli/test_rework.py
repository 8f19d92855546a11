"""`scumble merge`, `resize`, `extract`, `subtract`, `check-mix`, `convert`: from files to files, and what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from scumble.adapters import AdapterState
from scumble.adapters.factors import change_of
from scumble.adapters.state import LayerState, TokenState
from scumble.cli.main import COMMANDS, app
from scumble.cli.merge import parse_blocks
from scumble.errors import AdapterError, ConfigError, FormatError, ScumbleError, UnknownName, UnusedTensors
from scumble.formats import read, write
from scumble.formats.container import load, save
from scumble.formats.inspection import block_of
from scumble.runs.rework import RECORD
from tests.formats.adapters_of import ATTENTION, SHAPES, adapter, layer


def run(command: str, *arguments: object) -> str:
    """What the command prints; its errors are raised."""
    given = [command, *(str(argument) for argument in arguments)]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "220"})
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters of different rank."""
    one = adapter(ATTENTION, rank=4)
    two = AdapterState({path: layer(path, rank=2, seed=100 + n) for n, path in enumerate(ATTENTION)})
    return write(one, tmp_path / "one.safetensors"), write(
        two, tmp_path / "two.safetensors", dtype=torch.float16
    )


def difference(file: Path, expected: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of a layer's change."""
    state = read(file).state
    assert state.layers.keys() == expected.keys()
    return max(
        float((change_of(p, state.layers[p]) - wanted).norm() / wanted.norm())
        for p, wanted in expected.items()
    )


def changes(file: Path) -> dict[str, torch.Tensor]:
    """Full changes by layer."""
    return {path: change_of(path, one) for path, one in read(file).state.layers.items()}


def test_merge_makes_one_of_two(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "mix.safetensors"
    said = run("merge", f"{files[0]}:0.5", files[1], "--out", out, "--block", "2:unet.mid_block.*=-1")
    assert "rank 6" in said and "nothing was cut off" in said and str(out) in said
    one, two = changes(files[0]), changes(files[1])
    factor = {path: -1.0 if "mid_block" in path else 1.0 for path in two}
    assert difference(out, {path: 0.5 * one[path] + factor[path] * two[path] for path in one}) < 1e-5
    record = json.loads(read(out).state.metadata.extra[RECORD])
    assert record[0]["method"] == "concat" and record[0]["of"][1]["blocks"] == {"unet.mid_block.*": -1.0}
    said = run(
        "merge",
        *files,
        "--out",
        tmp_path / "svd.safetensors",
        "--method",
        "svd",
        "--rank",
        3,
        "--dtype",
        "bf16",
    )
    assert "rank 3" in said and "at least" in said
    tensors = next(iter(read(tmp_path / "svd.safetensors").state.layers.values())).tensors
    assert tensors["up"].dtype == torch.bfloat16


def test_nothing_is_overwritten_without_a_word(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    for command, arguments in {
        "merge": files,
        "subtract": files,
        "resize": (files[0], "--rank", 1),
        "convert": (files[0], "--to", "attention-processors"),
    }.items():
        with pytest.raises(FormatError, match="--overwrite"):
            run(command, *arguments, "--out", out)
        assert out.read_bytes() == b"precious"
        run(command, *arguments, "--out", out, "--overwrite")
        assert read(out).state.layers
        out.write_bytes(b"precious")
    with pytest.raises(FormatError, match="or choose another --picture"):
        run("check-mix", *files, "--picture", out)
    with pytest.raises(FormatError, match="is what is being read"):
        run("resize", files[0], "--rank", 1, "--out", files[0], "--overwrite")


def test_resize_says_what_it_kept(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    said = run("resize", files[0], "--rank", 2, "--out", out)
    assert "rank 4-4 -> 2-2" in said and "%" in said
    assert {one.rank for one in read(out).state.layers.values()} == {2}
    with pytest.raises(ConfigError, match="Say how much"):
        run("resize", files[0], "--out", tmp_path / "x.safetensors")


def test_subtract_takes_out_what_merge_put_in(files: tuple[Path, Path], tmp_path: Path) -> None:
    run("merge", *files, "--out", tmp_path / "mix.safetensors")
    run("subtract", tmp_path / "mix.safetensors", files[1], "--out", tmp_path / "back.safetensors")
    assert difference(tmp_path / "back.safetensors", changes(files[0])) < 1e-4
    assert len(json.loads(read(tmp_path / "back.safetensors").state.metadata.extra[RECORD])) == 2
    with pytest.raises(AdapterError, match="Nothing is left"):
        run("subtract", files[0], files[0], "--out", tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_convert_keeps_every_bit(files: tuple[Path, Path], tmp_path: Path) -> None:
    plain = write(adapter(ATTENTION), tmp_path / "plain.safetensors")
    said = run("convert", plain, "--to", "attention-processors")
    there = tmp_path / "plain-attention-processors.safetensors"
    assert there.is_file() and "diffusers -> attention-processors" in said and str(there) in said
    run("convert", there, "--to", "diffusers", "--out", tmp_path / "back.safetensors")
    assert read(tmp_path / "back.safetensors").state.equal(read(plain).state)
    run("convert", plain, "--to", "diffusers", "--dtype", "fp16", "--out", tmp_path / "half.safetensors")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.7 * plain.stat().st_size
    with pytest.raises(UnknownName, match=r"difusers.*Did you mean"):
        run("convert", plain, "--to", "difusers")
    file = load(plain)
    strange = {"a.strange": torch.ones(1), "b.strange": torch.ones(1)}
    odd = tmp_path / "odd.safetensors"
    save(replace(file, tensors={**file.tensors, **strange}), odd)
    with pytest.raises(UnusedTensors, match=r"^2 of \d+ tensors matched no known kind\..* Not applied\.$"):
        run("convert", odd, "--to", "diffusers")
    with pytest.raises(UnknownName, match="dtype 'fp12'"):
        run("convert", plain, "--to", "diffusers", "--dtype", "fp12", "--out", tmp_path / "no.safetensors")


def test_check_mix_shows_a_table_and_a_picture(files: tuple[Path, Path], tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    said = run("check-mix", *files, "--picture", picture)
    blocks = {block_of(path) for path in ATTENTION}
    assert all(block in said for block in blocks) and "conflict" in said and "everything" in said
    with Image.open(picture) as image:
        assert image.mode == "RGB" and image.height > 18 * len(blocks)
        quiet = image.copy()
    alike = run("check-mix", files[0], files[0], "--layers", "--picture", tmp_path / "same.png")
    rows = [line.split() for line in alike.splitlines() if line.strip().startswith("unet.")]
    assert len(rows) == sum(path.startswith("unet") for path in ATTENTION)
    assert all(row[2] == row[4] == row[6] == "1.00" and abs(float(row[7])) == 0.0 for row in rows)
    with Image.open(tmp_path / "same.png") as image:
        deep = sum(count for count, color in image.getcolors(1 << 20) or [] if color == (178, 24, 43))
    assert deep > 0 and not any(color == (178, 24, 43) for _, color in quiet.getcolors(1 << 20) or [])


def test_check_mix_says_which_will_damage_the_other(tmp_path: Path) -> None:
    from scumble.runs.check_mix import check

    one = adapter(ATTENTION, rank=4)

    def times(factor: float) -> Path:
        layers = {path: replace(part, alpha=factor * part.alpha) for path, part in one.layers.items()}
        return write(AdapterState(layers), tmp_path / f"times{factor:g}.safetensors")

    plain, twice, nearly = times(1), times(2), times(1.1)
    there, back = check(plain, twice), check(twice, plain)
    assert there.shares == pytest.approx((2 / 3, 1 / 3)) and back.shares == pytest.approx((1 / 3, 2 / 3))
    assert there.norms is not None
    total = sum(float(change_of(path, part).square().sum()) for path, part in one.layers.items()) ** 0.5
    assert there.norms == pytest.approx((total, 2 * total), rel=1e-5)
    for found in (there, back):
        assert "Expect times2.safetensors to damage times1.safetensors more" in found.verdict
        assert "2.0 times as large" in found.verdict
    assert check(plain, plain).shares == (0.5, 0.5) and "no side is told" in check(plain, plain).verdict
    assert "no side is told" in check(plain, nearly).verdict
    assert there.verdict in run("check-mix", plain, twice)
    assert "name it with --base" in replace(there, norms=None).verdict
    assert replace(there, norms=None).shares is None


def test_merge_into_a_base_and_extract_from_it(tmp_path: Path) -> None:
    from scumble.models import tiny
    from scumble.runs.base_files import open_base

    base = Path(tiny.save("sd1", tmp_path / "base"))
    shapes = {p: s for p, s in open_base(base).shapes.items() if ".attn1.to_" in p}
    rng = torch.Generator().manual_seed(0)
    layers = {
        path: type(layer(ATTENTION[0]))(
            "lora",
            2,
            2.0,
            {
                "down": 0.1 * torch.randn(2, shape[1], generator=rng),
                "up": 0.1 * torch.randn(shape[0], 2, generator=rng),
            },
        )
        for path, shape in shapes.items()
    }
    file = write(AdapterState(layers), tmp_path / "a.safetensors")
    said = run("merge", file, "--into", base, "--out", tmp_path / "merged")
    assert f"{len(layers)} layers of {base} changed" in said
    said = run("extract", tmp_path / "merged", base, "--rank", 2, "--out", tmp_path / "back.safetensors")
    assert f"{len(layers)} layers differ" in said
    assert difference(tmp_path / "back.safetensors", changes(file)) < 1e-3
    with pytest.raises(ConfigError, match="--dtype, --save-as and --base"):
        run("merge", file, "--into", base, "--out", tmp_path / "x", "--dtype", "fp16")
    text = run("inspect", file, "--against", base)
    assert "effect at strength 1: the denoiser's outputs move by" in text and "by 0.00% (rms" in text


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["3:a=1"], "adapter 3; 2 are given"),
        (["0:a=1"], "number 1"),
        (["a"], "PATTERN=STRENGTH"),
        (["a=x"], "not"),
    ],
)
def test_a_malformed_block_is_said(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_blocks(texts, 2)
    assert parse_blocks(["1:unet.*=0.5", "*.to_q=-1e-1"], 2) == [
        {"unet.*": 0.5, "*.to_q": -0.1},
        {"*.to_q": -0.1},
    ]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for command, arguments in {
        "merge": ("no.safetensors", "--out", tmp_path / "o.safetensors"),
        "resize": ("no.safetensors", "--rank", 1, "--out", tmp_path / "o.safetensors"),
        "check-mix": ("no.safetensors", "no.safetensors"),
        "convert": ("no.safetensors", "--to", "diffusers"),
        "extract": ("nowhere/at/all", "picturebook", "--out", tmp_path / "o.safetensors"),
    }.items():
        assert command in COMMANDS
        with pytest.raises(ScumbleError, match=r"no adapter|no file or folder"):
            run(command, *arguments)
    assert set(SHAPES) >= set(ATTENTION) and not list(tmp_path.iterdir())


def test_what_a_terminal_would_obey_in_a_file_is_shown_and_not_sent(tmp_path: Path) -> None:
    name = "\x1b[31m[bold]\x07"
    tensors = {"down": torch.ones(1, 3), "up": torch.ones(3, 1)}
    tokens = {f"<{name}>": TokenState({"text_encoder": torch.ones(1, 32)})}
    path = write(
        AdapterState({f"unet.{name}": LayerState("lora", 1, 1.0, tensors)}, tokens),
        tmp_path / "a.safetensors",
    )
    for said in (
        run("check-mix", path, path),
        run("check-mix", path, path, "--layers"),
        run("convert", path, "--to", "diffusers"),
    ):
        assert "\\x1b[31m[bold]\\x07" in said and "\x1b" not in said and "\x07" not in said
