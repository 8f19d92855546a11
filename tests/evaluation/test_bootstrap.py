"""Intervals: deterministic, wide where prompts differ, as often right as they say."""

from __future__ import annotations

import numpy as np
import pytest

from scumble.evaluation.bootstrap import Estimate, estimate, estimate_pairs


def test_equal_arguments_give_equal_intervals_and_another_seed_others() -> None:
    values = np.random.default_rng(0).random((6, 3))
    assert estimate(values) == estimate(values)
    assert estimate(values) != estimate(values, seed=1)
    assert estimate(values).value == pytest.approx(values.mean())


def test_a_constant_has_no_width() -> None:
    assert estimate(np.full((4, 2), 0.25)) == Estimate(0.25, 0.25, 0.25)


def test_seeds_of_one_prompt_do_not_count_as_prompts() -> None:
    """Eight copies of one answer a prompt tell no more than one."""
    prompts = np.random.default_rng(1).random((10, 1))
    alone, copied = estimate(prompts), estimate(np.repeat(prompts, 8, axis=1))
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.15)
    independent = estimate(np.random.default_rng(2).random((80, 1)))
    assert independent.high - independent.low < 0.6 * (copied.high - copied.low)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random, held = np.random.default_rng(3), 0
    for trial in range(100):
        values = 0.5 + random.normal(size=(20, 1)) * 0.2 + random.normal(size=(1, 6)) * 0.05
        found = estimate(values + random.normal(size=(20, 6)) * 0.1, resamples=200, seed=trial)
        held += found.low <= 0.5 <= found.high
    assert held >= 85


def test_any_statistic_of_several_numbers_a_picture() -> None:
    values = np.stack([np.full((5, 2), 3.0), np.full((5, 2), 4.0)], axis=-1)
    ratio = estimate(values, lambda v: float(v[..., 0].mean() / v[..., 1].mean()))
    assert ratio == Estimate(0.75, 0.75, 0.75)


def test_pairs_never_compare_a_picture_with_itself() -> None:
    distances = 7.0 * (1 - np.eye(4))
    assert estimate_pairs(distances, resamples=200) == Estimate(7.0, 7.0, 7.0)


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts x seeds"):
        estimate(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="at least two"):
        estimate_pairs(np.zeros((1, 1)))
