"""How sure a number is: over utterances for one model, over seeds for several.

Utterances are left out in groups (the delete-a-group jackknife). A bootstrap would draw utterances twice, and a
repeated point is its own nearest neighbour and its own best match: intrinsic dimension, retrieval, CKA and subspaces
would all change by the repetition alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_GROUPS = 20


@dataclass(frozen=True, eq=False)
class Curve:
    """A quantity at several levels, and what it is without each group of utterances.

    Args:
        value: (levels,); NaN where it is not defined.
        left_out: the same without each group (groups, levels).
        chance: what a model that knows nothing reaches (levels,), None where there is no such thing.
    """

    value: np.ndarray
    left_out: np.ndarray
    chance: np.ndarray | None = None

    @property
    def standard_error(self) -> np.ndarray:
        """Jackknife standard error (levels,)."""
        num_groups = len(self.left_out)
        spread = self.left_out - self.left_out.mean(0)
        return np.sqrt((num_groups - 1) / num_groups * (spread**2).sum(0))


def stacked(curves: Sequence[Curve]) -> Curve:
    """Curves of one level each as one curve."""
    chance = [curve.chance for curve in curves if curve.chance is not None]
    return Curve(
        np.concatenate([curve.value for curve in curves]),
        np.concatenate([curve.left_out for curve in curves], axis=1),
        np.concatenate(chance) if chance else None,
    )


def groups_of(num_utterances: int) -> np.ndarray:
    """The group of each utterance (num_utterances,): neighbours, which may be alike, share one."""
    return np.arange(num_utterances) * NUM_GROUPS // num_utterances


def mean_of(values: np.ndarray, groups: np.ndarray, chance: float | None = None) -> Curve:
    """The mean of what was measured item by item.

    Args:
        values: (levels, items).
        groups: group of each item's utterance (items,).
        chance: what a model that knows nothing reaches.
    """
    sums = np.stack([np.bincount(groups, row, NUM_GROUPS) for row in values.astype(np.float64)], axis=1)
    counts = np.bincount(groups, minlength=NUM_GROUPS)[:, None]
    return Curve(
        sums.sum(0) / counts.sum(),
        (sums.sum(0) - sums) / (counts.sum() - counts),
        None if chance is None else np.full(len(values), chance),
    )


def jackknife(statistic: Callable[[np.ndarray], float], groups: np.ndarray, chance: float | None = None) -> Curve:
    """A statistic of whole sets of items, at one level.

    Args:
        statistic: takes which items to use, a mask (items,).
        groups: group of each item's utterance (items,).
        chance: what a model that knows nothing reaches.
    """
    left_out = [statistic(groups != group) for group in range(NUM_GROUPS)]
    return Curve(
        np.array([statistic(np.ones(len(groups), dtype=bool))]),
        np.array(left_out)[:, None],
        None if chance is None else np.array([chance]),
    )


@dataclass(frozen=True, eq=False)
class Mean:
    """A quantity at several levels with its error bar.

    Args:
        value: (levels,).
        standard_error: over seeds where there are several, else over utterances (levels,).
        num_seeds: how many seeds were averaged.
    """

    value: np.ndarray
    standard_error: np.ndarray
    num_seeds: int


def over_seeds(curves: Sequence[Curve]) -> Mean:
    """Mean and standard error over seeds; with one seed, its own error bar over utterances."""
    if len(curves) == 1:
        return Mean(curves[0].value, curves[0].standard_error, 1)
    values = np.stack([curve.value for curve in curves])
    return Mean(values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values)), len(values))


def paired_difference(curves: Sequence[Curve], baseline: Sequence[Curve]) -> Mean:
    """Mean difference of two variants, seed by seed; with one seed each, utterance group by utterance group.

    Args:
        curves: one of each seed.
        baseline: those of the same seeds, measured on the same utterances.
    """
    return over_seeds(
        [Curve(a.value - b.value, a.left_out - b.left_out) for a, b in zip(curves, baseline, strict=True)]
    )
