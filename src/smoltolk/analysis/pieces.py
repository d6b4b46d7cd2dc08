"""What a model is looked at with: the same words in speech and in text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smoltolk.analysis.uncertainty import NUM_GROUPS, groups_of
from smoltolk.data.policies import Words
from smoltolk.data.store import Store


@dataclass(frozen=True, eq=False)
class Piece:
    """Some consecutive words of an utterance, spoken and written.

    Args:
        utterance: id of the utterance.
        group: which group of utterances it belongs to, see `groups_of`.
        words: the written words.
        text_ids: their text tokens (num_tokens,).
        text_ends: where the tokens of each word end among them (num_words,).
        units: their speech units (num_units,).
        unit_ends: where the units of each word end among them (num_words,).
    """

    utterance: str
    group: int
    words: list[str]
    text_ids: np.ndarray
    text_ends: np.ndarray
    units: np.ndarray
    unit_ends: np.ndarray


def draw_pieces(
    store: Store, num_utterances: int, *, words_per_piece: int | None = None, split: str = "validation", seed: int = 0
) -> list[Piece]:
    """Draws utterances of a split, and cuts them into pieces where asked for.

    Args:
        store: utterances with text, speech and word times.
        num_utterances: how many of them.
        words_per_piece: cut every so many words, but for the last cut where fewer words would be left, and where a
            piece would have no units; None for whole utterances.
        split: "validation", "train", …
        seed: which utterances.

    Raises:
        ValueError: the split has too few utterances with both halves and word times, or a setting is out of range.
    """
    if num_utterances < NUM_GROUPS:
        raise ValueError(f"utterances is {num_utterances}: give {NUM_GROUPS} or more, which error bars need")
    if words_per_piece is not None and words_per_piece < 1:
        raise ValueError(f"words_per_piece is {words_per_piece}: give 1 or more, or none for whole utterances")
    rows = store.ids_of_split(split, is_aligned=True)
    if len(rows) < num_utterances:
        in_split, with_text = len(store.ids_of_split(split)), len(store.ids_of_split(split, has_text=True))
        remedy = f"give --utterances {len(rows)}" if len(rows) >= NUM_GROUPS else "give another store"
        raise ValueError(
            f"{store.path} has {len(rows)} utterances with text, speech and word times in the split {split!r} (of "
            f"{in_split}, {with_text} of them with text), {num_utterances} are asked for: {remedy}, or prepare it "
            f"with texts and an aligner"
        )
    drawn = np.sort(np.random.default_rng(seed).choice(rows, num_utterances, replace=False))
    pieces = []
    for row, group in zip(drawn.tolist(), groups_of(num_utterances).tolist(), strict=True):
        words = Words.of(store.tokens(row, reads_text=True))
        pieces += _cut(words, words_per_piece or words.num_words, store[row].id, group)
    return pieces


def _cut(words: Words, words_per_piece: int, utterance: str, group: int) -> list[Piece]:
    written = bytes(words.tokens.text).decode().split()
    cuts = [0]
    for cut in range(words_per_piece, words.num_words - words_per_piece + 1, words_per_piece):
        if words.unit_bounds[cut] > words.unit_bounds[cuts[-1]]:
            cuts.append(cut)
    if len(cuts) > 1 and words.unit_bounds[cuts[-1]] == words.unit_bounds[-1]:
        cuts.pop()
    pieces = []
    for start, stop in zip(cuts, [*cuts[1:], words.num_words], strict=True):
        (text_start, *text_ends), (unit_start, *unit_ends) = (
            bounds[start : stop + 1] for bounds in (words.text_bounds, words.unit_bounds)
        )
        pieces.append(
            Piece(
                utterance,
                group,
                written[start:stop],
                words.tokens.text_ids[text_start : text_ends[-1]].astype(np.int64),
                np.array(text_ends) - text_start,
                words.tokens.units[unit_start : unit_ends[-1]].astype(np.int64),
                np.array(unit_ends) - unit_start,
            )
        )
    return pieces


@dataclass(frozen=True, eq=False)
class WordEnds:
    """Words that have been said in full, in some pieces: what is known at each of these places, all (num_words,).

    Args:
        piece: which piece.
        word: which word of it.
        group: the piece's group.
        label: the word, in lower case and without punctuation around it.
        said: its first text token.
        following: the first text token of the next word, −1 after the last one.
        is_new: whether nothing before it began with the very same words.
    """

    piece: np.ndarray
    word: np.ndarray
    group: np.ndarray
    label: np.ndarray
    said: np.ndarray
    following: np.ndarray
    is_new: np.ndarray

    def select(self, chosen: np.ndarray) -> "WordEnds":
        """Some of the words, by a mask or by numbers."""
        return WordEnds(**{name: values[chosen] for name, values in vars(self).items()})


def word_ends(pieces: Sequence[Piece], max_words: int, *, seed: int = 0) -> WordEnds:
    """The ends of all words that have units, or a random choice of them, in order."""
    rows, seen = [], set()
    for i, piece in enumerate(pieces):
        begins = [0, *piece.text_ends.tolist()[:-1]]
        lengths = np.diff(piece.unit_ends, prepend=0)
        for w, (begin, end) in enumerate(zip(begins, piece.text_ends.tolist(), strict=True)):
            if not lengths[w]:
                continue
            read = piece.text_ids[:end].tobytes()
            following = int(piece.text_ids[end]) if w + 1 < len(begins) else -1
            label = plain(piece.words[w])
            rows.append((i, w, piece.group, label, int(piece.text_ids[begin]), following, read not in seen))
            seen.add(read)
    found = WordEnds(*(np.array(column) for column in zip(*rows, strict=True)))
    if len(rows) <= max_words:
        return found
    return found.select(np.sort(np.random.default_rng(seed).choice(len(rows), max_words, replace=False)))


def plain(word: str) -> str:
    """A word in lower case, without punctuation around it; punctuation alone stays as it is."""
    inside = [i for i, character in enumerate(word) if character.isalnum()]
    return word[inside[0] : inside[-1] + 1].casefold() if inside else word


def most_frequent(labels: Sequence[str], num_words: int, *, fewest: int) -> list[str]:
    """The words that occur most often, at least `fewest` times each; ties in alphabetical order."""
    counts = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))
    return [word for word, count in counts[:num_words] if count >= fewest]
