"""Whether speech and text share a space: linear CKA, subspace overlap, retrieval across modalities."""

import numpy as np
from scipy.linalg import subspace_angles

from smoltolk.analysis.uncertainty import Curve, jackknife, mean_of

NUM_SHUFFLES = 20


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of states of the same items (Kornblith et al. 2019, equation 4).

    1 for spaces that differ by rotation, scale and offset. With fewer items than dimensions unrelated states are far
    from 0: see `chance_cka`.

    Args:
        first: (items, dim).
        second: (items, another dim).
    """
    return _alignment(_centred_gram(first), _centred_gram(second))


def chance_cka(first: np.ndarray, second: np.ndarray, seed: int = 0) -> float:
    """Linear CKA of the same states when it is not known which belong together: the mean over shuffles."""
    rng = np.random.default_rng(seed)
    a, b = _centred_gram(first), _centred_gram(second)
    orders = (rng.permutation(len(b)) for _ in range(NUM_SHUFFLES))
    return float(np.mean([_alignment(a, b[np.ix_(order, order)]) for order in orders]))


def cka_between_levels(speech: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Linear CKA of every level of speech with every level of text: (levels, items, dim) twice → (levels, levels)."""
    speech_grams, text_grams = ([_centred_gram(level) for level in levels] for levels in (speech, text))
    return np.array([[_alignment(a, b) for b in text_grams] for a in speech_grams])


def cka_curve(speech: np.ndarray, text: np.ndarray, groups: np.ndarray, seed: int = 0) -> Curve:
    """Linear CKA at one level, with its error bar and chance: (items, dim) twice."""
    a, b = _centred_gram(speech), _centred_gram(text)

    def without(kept: np.ndarray) -> float:
        chosen = np.ix_(kept, kept)
        return _alignment(_centred(a[chosen]), _centred(b[chosen]))

    return jackknife(without, groups, chance_cka(speech, text, seed))


def _centred_gram(states: np.ndarray) -> np.ndarray:
    centred = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    return centred @ centred.T


def _centred(gram: np.ndarray) -> np.ndarray:
    return gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()


def _alignment(first: np.ndarray, second: np.ndarray) -> float:
    sizes = np.linalg.norm(first) * np.linalg.norm(second)
    return float((first * second).sum() / sizes) if sizes else float("nan")


def subspace_overlap(first: np.ndarray, second: np.ndarray, dimensions: int) -> float:
    """Mean squared cosine of the principal angles between the first principal components of two sets of states.

    1 for the same subspace, 0 for orthogonal ones; random subspaces of k dimensions in d have k / d on average.

    Args:
        first: (items, dim).
        second: (other items, dim).
        dimensions: how many principal components.
    """
    angles = subspace_angles(_principal(first, dimensions), _principal(second, dimensions))
    return float((np.cos(angles) ** 2).mean())


def overlap_curve(speech: np.ndarray, text: np.ndarray, groups: np.ndarray, dimensions: int) -> Curve:
    """Subspace overlap at one level, with its error bar and chance: (items, dim) twice."""
    return jackknife(
        lambda kept: subspace_overlap(speech[kept], text[kept], dimensions), groups, dimensions / speech.shape[1]
    )


def _principal(states: np.ndarray, dimensions: int) -> np.ndarray:
    """Principal components of most variance, orthonormal (dim, dimensions)."""
    centred = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    return np.linalg.svd(centred, full_matrices=False)[2][:dimensions].T


def retrieved(queries: np.ndarray, gallery: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Whether the nearest of the gallery says the same as the query, by cosine after centring both.

    Args:
        queries: (items, dim).
        gallery: the same items in the other modality (items, dim).
        texts: what each item says (items,); items that say the same are equally right.

    Returns:
        1 where it does, else 0; among several that are equally near, the share that does (items,).
    """
    similarity = _directions(queries) @ _directions(gallery).T
    is_nearest = similarity >= similarity.max(1, keepdims=True) - 1e-9
    is_right = texts[:, None] == texts
    return (is_nearest & is_right).sum(1) / is_nearest.sum(1)


def retrieval_curve(queries: np.ndarray, gallery: np.ndarray, texts: np.ndarray, groups: np.ndarray) -> Curve:
    """Accuracy of retrieval at one level, with its error bar over queries and chance."""
    chance = float((texts[:, None] == texts).mean())
    return mean_of(retrieved(queries, gallery, texts)[None], groups, chance)


def _directions(states: np.ndarray) -> np.ndarray:
    centred = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(length > 0, length, 1)
