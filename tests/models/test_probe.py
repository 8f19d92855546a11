"""The probe: a trained base is told from one whose scheduler says something else, and an untrained one is let be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scumble.errors import DataError, ModelError
from scumble.models import FAMILIES, describe_base, load_base
from scumble.models.family import BaseModel
from scumble.models.prediction import Velocity
from scumble.models.probe import Verdict, check_prediction, probe
from scumble.runs.build import build
from scumble.runs.load import load

OTHER = {"epsilon": "v_prediction", "v_prediction": "epsilon"}


def answering(base: BaseModel, kind: str, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """The base with a denoiser that is trained, roughly, to predict `kind`."""
    told: dict[str, Any] = {}
    plain = base.prediction.noisy

    def noisy(x0: torch.Tensor, n: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told.update(x0=x0, n=n, t=t)
        return plain(x0, n, t)

    def denoise(latents: torch.Tensor, *_: Any) -> torch.Tensor:
        x0, n, t = told["x0"], told["n"], told["t"]
        exact = {
            "epsilon": n,
            "sample": x0,
            "flow": n - x0,
            "v_prediction": Velocity.target(base.prediction, x0, n, t),  # type: ignore[arg-type]
        }[kind]
        rough = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
        return exact + 0.3 * exact.std() * rough

    monkeypatch.setattr(base.prediction, "noisy", noisy)
    monkeypatch.setattr(base, "denoise", denoise)
    return base


@pytest.mark.parametrize(
    ("family", "own", "kind"),
    [
        (family, own, kind)
        for family, own, kinds in (
            ("sd1", "epsilon", ("epsilon", "v_prediction", "sample")),
            ("sd2", "v_prediction", ("epsilon", "v_prediction", "sample")),
            ("sdxl", "epsilon", ("epsilon", "v_prediction", "sample")),
            ("sd3", "flow", ("flow", "epsilon", "sample")),
            ("flux", "flow", ("flow", "epsilon", "sample")),
        )
        for kind in kinds
    ],
)
def test_the_kind_is_found_and_another_one_refused(
    family: str, own: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = answering(FAMILIES.get(family).tiny(), kind, monkeypatch)
    verdict = probe(base)
    assert verdict.found == kind and verdict.contradicts == (kind != own)
    if kind == own:
        check_prediction(base)
        return
    with pytest.raises(ModelError, match=f"taken to predict {own}, and its weights predict {kind}") as caught:
        check_prediction(base)
    assert f"from {kind}" in str(caught.value) and "\n" not in str(caught.value)
    advised = OTHER.get(own) == kind
    assert (f'prediction = "{kind}"' in str(caught.value)) == advised


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_untrained_base_is_near_nothing(family: str) -> None:
    base = FAMILIES.get(family).tiny()
    verdict = probe(base)
    assert verdict.found == "" and min(verdict.errors.values()) > 0.7
    check_prediction(base)


def test_the_embedded_base_predicts_what_it_says_and_is_refused_when_told_otherwise() -> None:
    base = load_base("picturebook", device="cpu")
    check_prediction(base)
    own = base.prediction.name
    wrong = load_base("picturebook", device="cpu", prediction=OTHER[own])
    with pytest.raises(ModelError, match=f"taken to predict {OTHER[own]}, and its weights predict {own}"):
        check_prediction(wrong)


def test_a_run_is_refused_before_a_picture_is_read(tmp_path: Path) -> None:
    told = {"base": "picturebook", "data": {"images": str(tmp_path / "none")}, "output": tmp_path / "run"}
    own = describe_base("picturebook").prediction
    with pytest.raises(ModelError, match=f"taken to predict {OTHER[own]}, and its weights predict {own}"):
        build(load(**told, prediction=OTHER[own]), device=torch.device("cpu"))
    with pytest.raises(DataError, match="none"):
        build(load(**told), device=torch.device("cpu"))


def test_a_near_tie_is_no_contradiction() -> None:
    assert not Verdict("epsilon", {"epsilon": 0.45, "v_prediction": 0.4}).contradicts
    assert not Verdict("epsilon", {"epsilon": 1.1, "v_prediction": 0.6}).contradicts
    assert Verdict("epsilon", {"epsilon": 1.1, "v_prediction": 0.2}).contradicts
