"""A run whose components have dtypes of their own: from TOML to the proven file, and what is refused before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import scumble
from scumble.cli.main import main
from scumble.errors import ConfigError, ModelError, PrecisionError, ResumeError
from scumble.formats import read
from scumble.inference.png import read_record
from scumble.inference.session import Session
from scumble.models import load_base
from scumble.runs.build import build, check_data
from scumble.runs.load import load
from scumble.runs.reproduce import settings_of
from scumble.runs.toml import dump
from tests.runs.worlds import write_world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures and a tiny Flux, whose T5 is loaded late."""
    return write_world(tmp_path_factory.mktemp("world"), 4, family="flux")


def write(world: Path, file: Path, *lines: str) -> Path:
    file.write_text(
        "\n".join(
            [
                f'base = "{world / "base"}"',
                f'output = "{file.with_suffix("")}"',
                'method = "dreambooth"',
                *lines,
                "[data]",
                f'images = "{world / "pictures"}"',
                "resolution = 16",
                "[dreambooth]",
                "train_text_encoder = true",
                "[train]",
                "steps = 2",
                "batch = 2",
                "checkpoint_every = 1",
                "optimizer.learning_rate = 0.01",
            ]
        )
    )
    return file


MIX = (
    "[dtypes]",
    'transformer = "bf16"',
    'text_encoder = "float32"',
    'vae = "fp32"',
    'text_encoder_2 = "bfloat16"',
)


def test_a_run_trains_is_proven_resumes_and_says_its_dtypes(world: Path, tmp_path: Path) -> None:
    result = scumble.train(write(world, tmp_path / "mixed.toml", *MIX), quiet=True)
    assert (result.reason, result.step) == ("complete", 2) and result.adapter is not None
    exact = scumble.train(write(world, tmp_path / "exact.toml"), quiet=True)

    def losses(folder: Path) -> list[float]:
        lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["event"] == "StepDone"]

    assert losses(result.folder) == pytest.approx(losses(exact.folder), rel=0.02)
    assert losses(result.folder) != losses(exact.folder)
    layers = read(result.adapter).state.layers.values()
    assert {tensor.dtype for layer in layers for tensor in layer.tensors.values()} == {torch.float32}
    said = settings_of(result.adapter).dtypes
    assert said == {"transformer": "bf16", "text_encoder": "fp32", "vae": "fp32", "text_encoder_2": "bf16"}
    again = tmp_path / "again.toml"
    again.write_text(dump(settings_of(result.adapter)))
    assert load(again).dtypes == said
    with pytest.raises(ResumeError, match="dtypes"):
        scumble.train(
            result.folder / "run.toml", "dtypes.vae=bf16", "train.steps=3", resume="latest", quiet=True
        )


def test_what_is_built_has_them(world: Path, tmp_path: Path) -> None:
    config = load(write(world, tmp_path / "run.toml", *MIX), ["dtypes.vae=bf16", "dtypes.text_encoder=bf16"])
    built = build(config, device=CPU)
    base: Any = built.base
    kept = {name: next(module.parameters()).dtype for name, module in base.modules().items()}
    assert kept == dict.fromkeys(["transformer", "vae", "text_encoder"], torch.bfloat16)
    assert next(base.t5.parameters()).dtype == torch.bfloat16
    assert built.plan.facts["dtypes"] == "transformer bf16, text_encoder bf16, vae bf16, text_encoder_2 bf16"
    plain = write(world, tmp_path / "plain.toml")
    assert "dtypes" not in build(load(plain), device=CPU).plan.facts
    assert load(plain, dtypes={"vae": torch.bfloat16}).dtypes == {"vae": "bf16"}  # from Python


def test_what_cannot_be_is_refused_before_pictures_are_read(world: Path, tmp_path: Path) -> None:
    def settings(*overrides: str) -> Any:
        return load(write(world, tmp_path / "run.toml"), overrides)

    with pytest.raises(ConfigError, match=r"dtypes\.vae = .*no dtype 'int4'.*Known: bf16, fp16, fp32"):
        settings("dtypes.vae=int4")
    with pytest.raises(ConfigError, match="must be a section of settings"):
        settings("dtypes=bf16")
    with pytest.raises(ModelError, match=r"'unet'.*It has text_encoder, text_encoder_2, transformer, vae\."):
        check_data(settings("dtypes.unet=bf16"))
    with pytest.raises(PrecisionError, match="fp16 needs a GPU"):
        check_data(settings("dtypes.vae=fp16"))


def test_fp16_without_loss_scaling_is_refused_where_gradients_pass(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scumble.runs.build.check_precision", lambda dtype, device: None)  # as on a GPU
    monkeypatch.setattr("scumble.models.latent_base.check_precision", lambda dtype, device: None)
    path = write(world, tmp_path / "run.toml")
    with pytest.raises(ConfigError, match=r"dtypes\.transformer = \"fp16\": gradients.*choose bf16"):
        check_data(load(path, ["dtypes.transformer=fp16"]))
    with pytest.raises(ConfigError, match=r"dtypes\.text_encoder = \"fp16\": gradients"):
        build(load(path, ["dtypes.text_encoder=fp16"]), device=CPU)
    alone = ["dreambooth.train_text_encoder=false", "dtypes.text_encoder=fp16"]
    assert build(load(path, alone), device=CPU).plan  # nothing passes through it


def test_drawing_takes_them_and_says_so(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(world / "base")
    command = ["generate", "a fox", "--base", base, "--size", "16x16", "--steps", "1", "--device", "cpu",
               "--scheduler", "FlowMatchEulerDiscreteScheduler", "--out", str(tmp_path / "fox.png")]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main([*command, "--dtypes", "transformer=bf16", "--dtypes", "vae=float32"])
    assert not stop.value.code, capsys.readouterr()
    said = read_record(tmp_path / "fox.png")["drawn"]
    assert said["dtype"] == "bfloat16"
    assert said["dtypes"] | {"transformer": "bfloat16", "vae": "float32"} == said["dtypes"]
    for wrong, why in ((["vae:fp32"], "is not COMPONENT=DTYPE"), (["vae=fp32", "vae=bf16"], "names vae twice"),
                       (["unet=bf16"], "It has text_encoder")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main([*command, *(word for text in wrong for word in ("--dtypes", text))])
        assert stop.value.code and why in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ModelError, match="device and rest are for a base that is loaded here"):
        Session(load_base(base, device="cpu"), dtypes={"vae": "fp32"})
