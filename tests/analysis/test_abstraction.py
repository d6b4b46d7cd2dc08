"""Intrinsic dimension of shapes whose dimension is known, and the probe."""

import numpy as np
import pytest

from smoltolk.analysis.abstraction import dimension_curve, intrinsic_dimension, probe_curve, probed
from smoltolk.analysis.uncertainty import groups_of

RNG = np.random.default_rng(0)


def embedded(points, dim=30):
    """In more dimensions, turned and shifted."""
    turned = points @ np.linalg.qr(RNG.normal(size=(dim, dim)))[0][: points.shape[1]]
    return turned + RNG.normal(size=dim)


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_the_dimension_of_a_plane_is_its_own_however_many_it_lies_in(dimension):
    assert intrinsic_dimension(embedded(RNG.uniform(size=(1500, dimension)))) == pytest.approx(dimension, rel=0.1)


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_dimension_of_a_hypersphere_is_that_of_its_surface(dimension):
    points = RNG.normal(size=(1500, dimension + 1))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    assert intrinsic_dimension(embedded(points)) == pytest.approx(dimension, rel=0.1)


def test_repeated_points_count_once_and_a_few_points_have_no_dimension():
    points = RNG.uniform(size=(300, 2))
    repeated = np.concatenate([points, points + 1e-9])
    assert intrinsic_dimension(repeated) == pytest.approx(intrinsic_dimension(points), rel=1e-6)
    assert np.isnan(intrinsic_dimension(np.repeat(points[:19], 5, axis=0)))
    assert np.isnan(intrinsic_dimension(np.zeros((50, 3))))


def test_the_error_bar_covers_the_dimension():
    curve = dimension_curve(embedded(RNG.uniform(size=(1000, 3))), groups_of(1000))
    assert 0.01 < curve.standard_error[0] < 0.3
    assert abs(curve.value[0] - 3) < 4 * curve.standard_error[0]
    few = dimension_curve(RNG.uniform(size=(10, 3)), np.arange(10))
    assert np.isnan(few.value).all()


def test_the_probe_reads_words_that_are_there_and_no_others():
    labels = np.tile(["a", "b", "c", "c"], 50)
    utterances = np.repeat(np.arange(20), 10)
    noise = RNG.normal(size=(200, 6))
    spread = (labels[:, None] == np.array(["a", "b", "c"])) @ RNG.normal(size=(3, 6))
    assert probed(5 * spread + 0.1 * noise, labels, utterances).tolist() == [1] * 200
    curve = probe_curve(noise, labels, utterances, utterances)
    assert curve.chance[0] == 0.5
    assert curve.value[0] < 0.6


def test_the_probe_learns_from_other_utterances_only():
    utterances = np.repeat(np.arange(20), 10)
    labels = np.where(utterances % 2, "odd", "even")
    which = np.eye(20)[utterances] * 10  # tells the utterance, hence the label within it
    assert probed(which, labels, utterances).mean() < 0.6
