"""Proofs: what does not train is found and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scumble.errors import NothingTrained, TrainingError
from scumble.training.proofs import GradientWatch, check_changed, check_dtypes, digest, digests


def two() -> dict[str, nn.Parameter]:
    return {"a.down": nn.Parameter(torch.ones(2)), "a.up": nn.Parameter(torch.zeros(2))}


def test_a_missing_gradient_is_found_at_the_first_step() -> None:
    parameters = two()
    parameters["a.up"].grad = torch.ones(2)
    with pytest.raises(NothingTrained, match=r"step 1: 1 trainable tensor \(a\.down\) got no gradient"):
        GradientWatch(parameters).see(1, moved=False)


def test_zeros_are_forgiven_until_the_weights_have_moved() -> None:
    parameters = two()
    watch = GradientWatch(parameters)
    parameters["a.up"].grad, parameters["a.down"].grad = torch.ones(2), torch.zeros(2)
    watch.see(1, moved=False)
    assert not watch.satisfied
    with pytest.raises(NothingTrained, match=r"a\.down\) is exactly zero"):
        watch.see(2, moved=True)
    parameters["a.down"].grad = torch.ones(2)
    watch.see(2, moved=True)
    assert watch.satisfied


def test_what_never_changed_is_named() -> None:
    parameters = two()
    before = digests(parameters)
    with torch.no_grad():
        parameters["a.up"] += 1
    with pytest.raises(NothingTrained, match=r"a\.down"):
        check_changed(before, parameters)
    with torch.no_grad():
        parameters["a.down"] += 1
    check_changed(before, parameters)


def test_a_cast_parameter_is_named_with_the_moment() -> None:
    parameters = two()
    parameters["a.up"].data = parameters["a.up"].data.half()
    with pytest.raises(TrainingError, match=r"after the preview: a\.up is torch\.float16"):
        check_dtypes(parameters, "after the preview")


def test_a_frozen_parameter_is_named() -> None:
    parameters = two()
    parameters["a.up"].requires_grad_(False)
    with pytest.raises(TrainingError, match=r"a\.up is torch\.float32, requires_grad=False"):
        check_dtypes(parameters, "after the preview")


def test_a_digest_sees_one_bit() -> None:
    tensor = torch.zeros(3)
    other = tensor.clone()
    other[1] = -0.0
    assert torch.equal(tensor, other) and digest(tensor) != digest(other)
