"""How abstract a level is: its intrinsic dimension, and how well a linear probe reads the word from it."""

import numpy as np
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from smoltolk.analysis.uncertainty import Curve, jackknife, mean_of

DISCARDED = 0.1  # share of the points with the largest ratios that TwoNN leaves out
FEWEST_POINTS = 20
DECIMALS = 5  # points that agree in so many, of their largest value, are equal: the rest depends on the batch
NUM_FOLDS = 5
PENALTIES = np.logspace(-1, 5, 7)  # of the probe's ridge regression, chosen by leave-one-out on the training folds


def intrinsic_dimension(points: np.ndarray) -> float:
    """Intrinsic dimension by TwoNN (Facco et al. 2017), from how much farther the second neighbour is than the first.

    NaN for fewer than `FEWEST_POINTS` different points.

    Args:
        points: (points, dim); equal ones count once.
    """
    ratios, kept = neighbour_ratios(points)
    return dimension_of_ratios(ratios) if len(kept) >= FEWEST_POINTS else float("nan")


def neighbour_ratios(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of the second neighbour over that of the first, at each different point, and which points these are."""
    scale = np.abs(points).max() or 1.0
    kept = np.sort(np.unique(np.round(points / scale, DECIMALS), axis=0, return_index=True)[1])
    if len(kept) < FEWEST_POINTS:
        return np.ones(len(kept)), kept
    distances = NearestNeighbors(n_neighbors=2).fit(points[kept].astype(np.float64)).kneighbors()[0]
    return distances[:, 1] / distances[:, 0], kept


def dimension_of_ratios(ratios: np.ndarray) -> float:
    """The dimension d for which the ratios μ follow F(μ) = 1 − μ^−d: a line through 0 of −log(1 − F) by log μ.

    The largest ratios, a tenth, are left out as in the paper: they hold the outliers.
    """
    log_ratios = np.sort(np.log(ratios))
    num_points = len(log_ratios)
    shown = log_ratios[: int(num_points * (1 - DISCARDED))]
    empirical = -np.log1p(-np.arange(1, len(shown) + 1) / num_points)
    return float(shown @ empirical / (shown @ shown)) if shown.any() else float("nan")


def dimension_curve(points: np.ndarray, groups: np.ndarray) -> Curve:
    """Intrinsic dimension at one level, with its error bar; neighbours are always sought among all points."""
    ratios, kept = neighbour_ratios(points)
    if len(kept) < FEWEST_POINTS:
        ratios = np.full(len(kept), np.nan)
    return jackknife(lambda chosen: dimension_of_ratios(ratios[chosen]), groups[kept])


def probed(states: np.ndarray, labels: np.ndarray, utterances: np.ndarray) -> np.ndarray:
    """Whether a linear probe reads the right word from each state, learned from other utterances' states.

    The probe is a ridge classifier on standardised states; every fifth of the utterances is held out once.

    Args:
        states: (items, dim).
        labels: the words (items,).
        utterances: which utterance each item belongs to (items,).

    Returns:
        1 for right, 0 for wrong (items,).
    """
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
    read = cross_val_predict(probe, states.astype(np.float64), labels, groups=utterances, cv=GroupKFold(NUM_FOLDS))
    return (read == labels).astype(float)


def probe_curve(states: np.ndarray, labels: np.ndarray, utterances: np.ndarray, groups: np.ndarray) -> Curve:
    """Accuracy of the probe at one level, with its error bar; chance is the share of the most frequent word."""
    chance = np.unique(labels, return_counts=True)[1].max() / len(labels)
    return mean_of(probed(states, labels, utterances)[None], groups, float(chance))
