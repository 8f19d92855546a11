"""The benchmark on real photographs runs from end to end, in toy sizes and on pictures made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.thorough
def test_it_runs_and_its_files_load(tmp_path: Path) -> None:
    (tmp_path / "photos" / "blue_box").mkdir(parents=True)
    for number in range(2):
        picture = Image.radial_gradient("L").resize((300 + number, 280)).convert("RGB")
        picture.save(tmp_path / "photos" / "blue_box" / f"0{number}.jpg")
    command = [sys.executable, str(ROOT / "benchmarks/real_photos.py"), str(tmp_path / "photos"), "--tiny"]
    command += ["--subjects", "blue_box", "--precision", "no", "--output", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    runs = {row["arm"]: row for row in found["runs"]}
    assert set(runs) == {"dreambooth-prediction", "dreambooth-images", "pivotal"}
    assert found["what"]["base"] == "tiny" and found["machine"]["torch"]
    for row in runs.values():
        assert row["pictures"] == 2 and row["peak GB"] > 0.05 and row["seconds a step"] > 0
        assert row["loaded by diffusers"].keys() == row["files"].keys()
        assert row["largest difference in a fresh base"] < 1e-5
    assert [runs[arm]["class pictures"] for arm in ("dreambooth-prediction", "dreambooth-images")] == [0, 2]
    assert "learned_embeds.safetensors" in runs["pivotal"]["files"] and len(runs["pivotal"]["files"]) == 2
