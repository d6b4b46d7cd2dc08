"""How much texts repeat themselves and one another: auto-BLEU, self-BLEU and VERT.

Lakhotia et al. 2021, "On Generative Spoken Language Modeling from Raw Audio" (arXiv 2102.01192), judge generated
speech by these, over the words that a recogniser hears. Two definitions of auto-BLEU are in use under that one name;
here each is a function of its own. All are shares from 0 to 1; papers often give them times 100.
"""

from collections import Counter
from collections.abc import Sequence
from math import prod, sqrt
from typing import Literal


def auto_bleu(words: Sequence[str], order: int = 2) -> float:
    """Share of a text's n-grams that occur once more in it: the equation of Lakhotia et al. 2021.

    One order alone, and the other occurrence may overlap: in "a a a" both bigrams are repeated. slamkit
    (slamkit/utils/calculation_utils.py), too, computes this, with bigrams. A text without n-grams has 0.

    Args:
        words: the words of a text.
        order: words in an n-gram.
    """
    counts = Counter(_ngrams(words, order))
    return sum(count for count in counts.values() if count > 1) / max(counts.total(), 1)


def auto_bleu_fairseq(
    words: Sequence[str], highest_order: int = 2, mean: Literal["geometric", "arithmetic"] = "geometric"
) -> float:
    """Auto-BLEU as the authors' code in fairseq computes it, "Auto-BLEU2-geometric" by default.

    It differs from their equation in two ways: an n-gram is repeated only where it occurs again without overlap, and
    the shares of all orders up to the highest are averaged (fairseq, examples/textless_nlp/gslm/metrics/asr_metrics/
    self_auto_bleu.py). A text of fewer than two words has 0.

    Args:
        words: the words of a text.
        highest_order: words in the longest n-grams.
        mean: how the orders are averaged.
    """
    shares = []
    for order in range(1, highest_order + 1):
        ngrams = list(_ngrams(words, order))
        first: dict[tuple[str, ...], int] = {}
        last: dict[tuple[str, ...], int] = {}
        for place, ngram in enumerate(ngrams):
            first.setdefault(ngram, place)
            last[ngram] = place
        # The occurrences farthest away are the first and the last: some other is clear of this one if one of them is.
        repeated = sum(max(last[ngram] - i, i - first[ngram]) >= order for i, ngram in enumerate(ngrams))
        shares.append(repeated / max(len(ngrams), 1))
    return _mean(shares, mean)


def self_bleu(
    texts: Sequence[Sequence[str]], highest_order: int = 2, mean: Literal["geometric", "arithmetic"] = "geometric"
) -> list[float]:
    """BLEU of each text with all others as its references.

    As in fairseq's self_auto_bleu.py: BLEU's clipped precision (Papineni et al. 2002: an n-gram counts as often as it
    occurs in that reference which has it most often), no brevity penalty, no smoothing, and the mean over the orders
    up to the highest, "Self-BLEU2-geometric" by default. Without a match in one order the geometric mean is 0.

    Args:
        texts: the words of each text.
        highest_order: words in the longest n-grams.
        mean: how the orders are averaged.

    Raises:
        ValueError: there are fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"texts holds {len(texts)}: self-BLEU compares a text with others, give at least two")
    shares: list[list[float]] = [[] for _ in texts]
    for order in range(1, highest_order + 1):
        all_counts = [Counter(_ngrams(words, order)) for words in texts]
        # The two texts that have an n-gram most often say how often any but one has it, in linear time.
        most: dict[tuple[str, ...], tuple[int, int]] = {}  # count and text
        second: dict[tuple[str, ...], int] = {}
        for i, counts in enumerate(all_counts):
            for ngram, count in counts.items():
                if count > most.get(ngram, (0, -1))[0]:
                    second[ngram] = most.get(ngram, (0, -1))[0]
                    most[ngram] = count, i
                else:
                    second[ngram] = max(count, second[ngram])
        for i, counts in enumerate(all_counts):
            matches = sum(
                min(count, second[ngram] if most[ngram][1] == i else most[ngram][0]) for ngram, count in counts.items()
            )
            shares[i].append(matches / max(counts.total(), 1))
    return [_mean(share, mean) for share in shares]


def vert(self_bleu: float, auto_bleu: float) -> float:
    """VERT, the geometric mean of self-BLEU and auto-BLEU of a set of texts (Lakhotia et al. 2021); lower is more
    diverse.
    """
    return sqrt(self_bleu * auto_bleu)


def _ngrams(words: Sequence[str], order: int) -> "zip[tuple[str, ...]]":
    return zip(*(words[start:] for start in range(order)), strict=False)


def _mean(shares: Sequence[float], mean: Literal["geometric", "arithmetic"]) -> float:
    return prod(shares) ** (1 / len(shares)) if mean == "geometric" else sum(shares) / len(shares)
