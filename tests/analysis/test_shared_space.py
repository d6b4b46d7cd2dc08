"""CKA, subspaces and retrieval where the answer is known."""

import numpy as np
import pytest

from smoltolk.analysis.shared_space import (
    chance_cka,
    cka_between_levels,
    cka_curve,
    linear_cka,
    overlap_curve,
    retrieval_curve,
    retrieved,
    subspace_overlap,
)
from smoltolk.analysis.uncertainty import groups_of

RNG = np.random.default_rng(0)
STATES = RNG.normal(size=(60, 8))
ROTATION = np.linalg.qr(RNG.normal(size=(8, 8)))[0]


def test_cka_sees_no_rotation_scale_or_offset():
    assert linear_cka(STATES, 3 * STATES @ ROTATION + 5) == pytest.approx(1)


def test_cka_of_uncorrelated_states_is_0_and_of_half_the_dimensions_is_known():
    white = np.linalg.qr(STATES - STATES.mean(0))[0]  # orthonormal columns with mean 0
    assert linear_cka(white[:, :4], white[:, 4:]) == pytest.approx(0, abs=1e-12)
    # ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) = 4 / (√4 √8)
    assert linear_cka(white[:, :4], white) == pytest.approx(4 / np.sqrt(32))


def test_cka_between_levels_has_the_curve_on_its_diagonal_and_chance_is_below():
    speech, text = np.stack([STATES, STATES**2]), np.stack([STATES @ ROTATION, STATES])
    between = cka_between_levels(speech, text)
    np.testing.assert_allclose(between[0], 1)
    curve = cka_curve(speech[1], text[1], groups_of(60))
    assert between[1, 1] == pytest.approx(curve.value[0])
    assert curve.chance[0] == chance_cka(speech[1], text[1]) < 0.5
    assert 0 < curve.standard_error[0] < 0.2


def test_subspaces_overlap_in_the_directions_they_share():
    axes = np.eye(8) * np.arange(8, 0, -1)  # principal components are the axes, in order
    points = np.concatenate([axes, -axes])
    assert subspace_overlap(points, points[:, ::-1], 4) == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(points, points * 3 + 1, 4) == pytest.approx(1)
    assert subspace_overlap(points, np.roll(points, 1, axis=1), 4) == pytest.approx(3 / 4)


def test_random_subspaces_overlap_by_chance():
    overlaps = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        overlaps.append(subspace_overlap(rng.normal(size=(40, 30)), rng.normal(size=(40, 30)), 6))
    curve = overlap_curve(RNG.normal(size=(40, 30)), RNG.normal(size=(40, 30)), groups_of(40), 6)
    assert np.mean(overlaps) == pytest.approx(curve.chance[0], abs=0.03)
    assert curve.chance[0] == 6 / 30


def test_retrieval_finds_the_same_words_whatever_offset_the_modalities_have():
    texts = np.arange(60)
    assert retrieved(STATES + 7, 2 * STATES - 3, texts).tolist() == [1] * 60
    curve = retrieval_curve(STATES, STATES[::-1], texts, groups_of(60))
    assert curve.value[0] == 0
    assert curve.chance[0] == pytest.approx(1 / 60)


def test_items_that_say_the_same_are_equally_right_and_ties_are_shared():
    gallery = np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    assert retrieved(gallery, gallery, np.array([0, 0, 1, 1])).tolist() == [1] * 4
    assert retrieved(gallery, gallery, np.arange(4)).tolist() == [0.5] * 4
    assert retrieved(np.zeros((4, 2)), gallery, np.arange(4)).tolist() == [0.25] * 4  # nothing is known
