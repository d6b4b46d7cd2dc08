"""Repetition metrics against numbers worked out by hand, and against slow ones that follow the definitions."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltolk.evaluation.diversity import auto_bleu, auto_bleu_fairseq, self_bleu, vert

words_of = st.lists(st.sampled_from("abc"), max_size=9)


@pytest.mark.parametrize(
    ("text", "order", "share"),
    [
        ("a b a b", 2, 2 / 3),  # ab ba ab: both ab
        ("a b a b", 1, 1.0),
        ("a a a", 2, 1.0),  # the other occurrence may overlap
        ("a b c", 2, 0.0),
        ("a b a c", 1, 0.5),
        ("a", 2, 0.0),
        ("", 1, 0.0),
    ],
)
def test_auto_bleu_is_the_share_of_ngrams_that_occur_again(text: str, order: int, share: float) -> None:
    assert auto_bleu(text.split(), order) == pytest.approx(share)


def test_fairseqs_auto_bleu_wants_another_occurrence_without_overlap_and_averages_the_orders() -> None:
    assert auto_bleu(["a", "a", "a"]) == 1
    assert auto_bleu_fairseq(["a", "a", "a"]) == 0  # no bigram "a a" beside another
    assert auto_bleu_fairseq(["a", "a", "a"], mean="arithmetic") == 0.5
    assert auto_bleu_fairseq(["a", "a", "a", "a"]) == pytest.approx(sqrt(1 * 2 / 3))  # the first and the last "a a"
    assert auto_bleu_fairseq(["a", "b", "a", "b", "c"]) == pytest.approx(sqrt(4 / 5 * 2 / 4))
    assert auto_bleu_fairseq(["a", "b", "a", "b", "c"], mean="arithmetic") == pytest.approx((4 / 5 + 2 / 4) / 2)
    assert auto_bleu_fairseq(["a"]) == auto_bleu_fairseq([]) == 0


@given(words_of, st.integers(1, 3))
def test_auto_bleu_agrees_with_every_pair_of_places(words: list[str], order: int) -> None:
    ngrams = [words[i : i + order] for i in range(len(words) - order + 1)]

    def share(distance: int) -> float:
        pairs = [
            [ngram == other and abs(i - j) >= distance for j, other in enumerate(ngrams)]
            for i, ngram in enumerate(ngrams)
        ]
        return sum(map(any, pairs)) / max(len(ngrams), 1)

    assert auto_bleu(words, order) == pytest.approx(share(1))
    shares = []
    for short in range(1, order + 1):
        ngrams = [words[i : i + short] for i in range(len(words) - short + 1)]
        shares.append(share(short))
    assert auto_bleu_fairseq(words, order, mean="arithmetic") == pytest.approx(sum(shares) / order)


def test_self_bleu_clips_by_the_reference_that_has_an_ngram_most_often() -> None:
    first, second, third = self_bleu([["a", "a", "b"], ["a", "b"], ["c", "c"]])
    assert first == pytest.approx(sqrt(2 / 3 * 1 / 2))  # a (once), b; ab of aa, ab
    assert second == 1
    assert third == 0
    assert self_bleu([["a", "a", "b"], ["a", "b"], ["c", "c"]], mean="arithmetic")[0] == pytest.approx(
        (2 / 3 + 0.5) / 2
    )
    assert self_bleu([["a"], []], highest_order=1) == [0, 0]
    assert self_bleu([["a", "b"], ["a", "b"]]) == [1, 1]


@given(st.lists(words_of, min_size=2, max_size=5))
def test_self_bleu_agrees_with_the_definition(texts: list[list[str]]) -> None:
    expected = []
    for i in range(len(texts)):
        precisions = []
        for order in (1, 2):
            grams = [[tuple(t[k : k + order]) for k in range(len(t) - order + 1)] for t in texts]
            others = [g for j, g in enumerate(grams) if j != i]
            hits = sum(min(grams[i].count(g), max(o.count(g) for o in others)) for g in set(grams[i]))
            precisions.append(hits / max(len(grams[i]), 1))
        expected.append(sqrt(precisions[0] * precisions[1]))
    assert self_bleu(texts) == pytest.approx(expected)


def test_self_bleu_needs_other_texts() -> None:
    with pytest.raises(ValueError, match=r"texts holds 1: .* give at least two"):
        self_bleu([["a"]])


def test_vert_is_the_geometric_mean_of_both() -> None:
    assert vert(0.25, 0.16) == pytest.approx(0.2)
    assert vert(0.5, 0) == 0
