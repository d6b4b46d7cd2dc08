"""Error bars with known answers."""

import numpy as np
import pytest

from smoltolk.analysis.uncertainty import (
    NUM_GROUPS,
    Curve,
    groups_of,
    jackknife,
    mean_of,
    over_seeds,
    paired_difference,
)

VALUES = np.random.default_rng(0).normal(size=NUM_GROUPS)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    groups = groups_of(NUM_GROUPS)
    expected = VALUES.std(ddof=1) / np.sqrt(NUM_GROUPS)
    for curve in (
        jackknife(lambda kept: VALUES[kept].mean(), groups, chance=0.5),
        mean_of(VALUES[None], groups, chance=0.5),
    ):
        np.testing.assert_allclose(curve.value, [VALUES.mean()])
        np.testing.assert_allclose(curve.standard_error, [expected])
        assert curve.chance.tolist() == [0.5]


def test_groups_are_neighbours_of_like_number():
    groups = groups_of(50)
    assert (np.diff(groups) >= 0).all()
    assert set(np.bincount(groups)) == {2, 3}


def test_several_seeds_are_averaged_and_their_spread_is_the_error_bar():
    curves = [Curve(np.array([value]), np.zeros((NUM_GROUPS, 1))) for value in (1.0, 2.0, 6.0)]
    mean = over_seeds(curves)
    assert (mean.value.tolist(), mean.num_seeds) == ([3.0], 3)
    assert mean.standard_error[0] == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    shifted = [Curve(curve.value + 0.5, curve.left_out) for curve in curves]
    difference = paired_difference(shifted, curves)
    assert (difference.value[0], difference.standard_error[0]) == (0.5, 0)


def test_with_one_seed_the_difference_is_paired_by_utterances():
    groups = groups_of(NUM_GROUPS)
    one, other = mean_of(VALUES[None], groups), mean_of(VALUES[None] + 1, groups)
    difference = paired_difference([other], [one])
    assert difference.value[0] == pytest.approx(1)
    assert difference.standard_error[0] == pytest.approx(0, abs=1e-12)
    assert one.standard_error[0] > 0.1
