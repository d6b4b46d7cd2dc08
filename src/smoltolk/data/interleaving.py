"""Rows: from utterances to training rows in one id space (paper, section 3).

Everything here is a pure function of its arguments and of a random generator. Each task has a *stream*, an
endless sequence of pieces of ids, and a row is the first `row_tokens` ids of its stream; the cut may fall anywhere.
Labels follow Hugging Face: they equal the inputs (the model shifts), −100 where nothing is predicted.

Every stream starts at a random place of its first utterance, so that the ends of utterances longer than a row
are seen as often as their beginnings, and goes on with whole utterances. An utterance ends with the end token
of the modality it ends in.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from smoltolk.data.policies import Policy, Words
from smoltolk.data.shard import Tokens
from smoltolk.model.configuration_smoltolk import IdSpace

IGNORED_LABEL = -100
PAIR_CONTROL_TOKENS = 4  # bop, eop, switch and the end token


class SpokenWords(NamedTuple):
    """The words `first` to `stop` of an utterance, whose units are a piece."""

    words: Words
    first: int
    stop: int


class Piece(NamedTuple):
    """Consecutive tokens of a stream.

    Args:
        values: text tokens, units, or a single id (n,) uint32.
        offset: what makes ids of the values: the first unit's id for units, else 0.
        is_target: whether they are predicted.
        spoken: the words that the units say, where they are known.
    """

    values: np.ndarray
    offset: int
    is_target: bool
    spoken: SpokenWords | None = None


@dataclass(frozen=True, eq=False)
class Transcript:
    """A row in writing: what its text and its spoken words say, as text tokens, utterances parted by end-of-text.

    Args:
        text_ids: text tokens (num_tokens,) int64; not more than the row has tokens.
        places: which of them has just been said, (row_tokens,) int64: the last token of a spoken word at its last
            unit, the last token of the text at a switch to speech; −1 elsewhere.
        word_ids: the first text token of the word that is being said, at all of its units but the last,
            (row_tokens,) int64; −100 elsewhere.
    """

    text_ids: np.ndarray
    places: np.ndarray
    word_ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Row:
    """One training row.

    Args:
        input_ids: ids (row_tokens,) int64.
        labels: the same ids, −100 where nothing is predicted (row_tokens,) int64.
        transcript: the row in writing, where asked for.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    transcript: Transcript | None = None


def interleaved_stream(
    utterances: Iterator[Tokens],
    rng: np.random.Generator,
    ids: IdSpace,
    policy: Policy,
    *,
    predict_switch: bool = False,
) -> Iterator[Piece]:
    """Endless pieces of interleaved ids: every word once, in the modality that the policy says.

    Starts at a random word. The switch token stands between two modalities and nowhere else, and is predicted only
    where asked for. An utterance ends with the end token of the modality it ends in.

    Args:
        utterances: endless draws of utterances with both halves and the times that align them.
        rng: source of all choices made here.
        ids: the id space.
        policy: which words are text and which are speech.
        predict_switch: whether the switch token is a target.
    """
    switch = _token(ids.switch_id, is_target=predict_switch)
    ends = _token(ids.end_of_text_id), _token(ids.end_of_speech_id)
    carried = policy.begin(rng)
    words = Words.of(next(utterances))
    word = int(rng.integers(words.num_words))
    was_speech = None
    while True:
        runs, carried = policy.runs(rng, words, word, carried)
        for stop, is_speech in runs:
            if is_speech != was_speech:
                if was_speech is not None:
                    yield switch
                was_speech = is_speech
            if is_speech:
                bounds = words.unit_bounds
                units = words.tokens.units[bounds[word] : bounds[stop]]
                yield Piece(units, ids.speech_offset, True, SpokenWords(words, word, stop))
            else:
                bounds = words.text_bounds
                yield Piece(words.tokens.text_ids[bounds[word] : bounds[stop]], 0, True)
            word = stop
        yield ends[was_speech is True]
        words, word = Words.of(next(utterances)), 0


def text_stream(utterances: Iterator[Tokens], rng: np.random.Generator, ids: IdSpace) -> Iterator[Piece]:
    """Endless pieces of text: utterances with end-of-text after each, from a random word of the first one."""
    end = _token(ids.end_of_text_id)
    tokens = next(utterances)
    counts = tokens.word_token_counts
    start = int(counts[: int(rng.integers(len(counts)))].sum())
    while True:
        yield Piece(tokens.text_ids[start:], 0, True)
        yield end
        tokens, start = next(utterances), 0


def speech_stream(
    utterances: Iterator[Tokens], rng: np.random.Generator, ids: IdSpace, *, with_words: bool = False
) -> Iterator[Piece]:
    """Endless pieces of speech: utterances with end-of-speech after each, from a random unit of the first.

    The start is a unit, not a word: speech without text has no words. `with_words` says which words are spoken, where
    that is known.
    """
    end = _token(ids.end_of_speech_id)
    tokens = next(utterances)
    start = int(rng.integers(len(tokens.units)))
    while True:
        if with_words and len(tokens.word_unit_ends):
            yield from _spoken_pieces(Words.of(tokens), start, ids)
        else:
            yield Piece(tokens.units[start:], ids.speech_offset, True)
        yield end
        tokens, start = next(utterances), 0


def _spoken_pieces(words: Words, start: int, ids: IdSpace) -> Iterator[Piece]:
    """The units from `start` on: what is left of a word that is cut, the whole words, and what no word holds."""
    bounds, units = words.unit_bounds, words.tokens.units
    first = bisect_left(bounds, start, hi=words.num_words)
    edges = (start, max(start, bounds[first]), max(start, bounds[-1]), len(units))
    spoken = (None, SpokenWords(words, first, words.num_words), None)
    for (begin, stop), said in zip(pairwise(edges), spoken, strict=True):
        if stop > begin:
            yield Piece(units[begin:stop], ids.speech_offset, True, said)


def pair_stream(
    utterances: Iterator[Tokens], rng: np.random.Generator, ids: IdSpace, row_tokens: int, *, prompt_is_speech: bool
) -> Iterator[Piece]:
    """Endless pairs of a prompt and its other half: transcription (speech, then text) or synthesis (text, speech).

        bop  prompt  eop  switch  target  end token

    Only the target and its end token are predicted; nothing leads from one pair to the next.

    The row's cut may fall into its last pair, but no pair is longer than a row: an utterance that is has its words
    split, in order, into the fewest parts whose pairs fit, one pair for each. A row starts with a random part of its
    first utterance, so every part of every utterance comes first in some row and is seen whole. (A single word that
    is longer than a row is cut.)

    Args:
        utterances: endless draws of utterances with both halves; those longer than a row have word times.
        rng: source of all choices made here.
        ids: the id space.
        row_tokens: length of a row.
        prompt_is_speech: whether the prompt is speech and the target text, or the other way round.
    """
    bop, eop, switch = (_token(token, is_target=False) for token in (ids.bop_id, ids.eop_id, ids.switch_id))
    end = _token(ids.end_id(not prompt_is_speech))
    is_first = True
    while True:
        tokens = next(utterances)
        parts = _parts(tokens, row_tokens - PAIR_CONTROL_TOKENS)
        if is_first:
            parts, is_first = parts[int(rng.integers(len(parts))) :], False
        for text_ids, units in parts:
            text = Piece(text_ids, 0, prompt_is_speech)
            speech = Piece(units, ids.speech_offset, not prompt_is_speech)
            yield bop
            yield speech if prompt_is_speech else text
            yield eop
            yield switch
            yield text if prompt_is_speech else speech
            yield end


def _parts(tokens: Tokens, most_tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both halves of an utterance, cut between words into the fewest parts of at most so many tokens."""
    if len(tokens.text_ids) + len(tokens.units) <= most_tokens or not len(tokens.word_unit_ends):
        return [(tokens.text_ids, tokens.units)]
    words = Words.of(tokens)
    totals = np.add(words.text_bounds, words.unit_bounds)
    parts, word = [], 0
    while word < words.num_words:
        stop = max(word + 1, int(totals.searchsorted(totals[word] + most_tokens, side="right")) - 1)
        text_bounds, unit_bounds = words.text_bounds, words.unit_bounds
        parts.append(
            (
                tokens.text_ids[text_bounds[word] : text_bounds[stop]],
                tokens.units[unit_bounds[word] : unit_bounds[stop]],
            )
        )
        word = stop
    return parts


def _token(token_id: int, *, is_target: bool = True) -> Piece:
    return Piece(np.array([token_id], dtype=np.uint32), 0, is_target)


def cut_row(stream: Iterator[Piece], row_tokens: int, written_for: IdSpace | None = None) -> Row:
    """The first `row_tokens` ids of a stream, with labels of −100 on all but targets.

    Args:
        stream: endless pieces.
        row_tokens: length of the row.
        written_for: the id space, to have the transcript too.
    """
    pieces: list[Piece] = []
    num_tokens = 0
    for piece in stream:
        pieces.append(piece)
        num_tokens += len(piece.values)
        if num_tokens >= row_tokens:  # an utterance is drawn only when its ids are needed
            break
    transcript = None if written_for is None else transcribe(pieces, row_tokens, written_for)
    values, offsets, are_targets, _ = zip(*pieces, strict=True)
    lengths = [len(array) for array in values]
    # Joined as bytes: for many short pieces four times as fast as np.concatenate.
    input_ids = np.frombuffer(b"".join(values), np.uint32).astype(np.int64)
    input_ids += np.repeat(offsets, lengths)
    input_ids = input_ids[:row_tokens]
    if all(are_targets):
        return Row(input_ids, input_ids.copy(), transcript)
    labels = np.where(np.repeat(are_targets, lengths)[:row_tokens], input_ids, IGNORED_LABEL)
    return Row(input_ids, labels, transcript)


def transcribe(pieces: Sequence[Piece], row_tokens: int, ids: IdSpace) -> Transcript:
    """The transcript of the row that begins with these pieces. Units whose words are not known say nothing."""
    texts: list[np.ndarray] = []
    places = np.full(row_tokens, -1)
    word_ids = np.full(row_tokens, IGNORED_LABEL)
    num_read = num_written = 0
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        if piece.spoken is not None:
            words, first, stop = piece.spoken
            unit_bounds = np.array(words.unit_bounds[first : stop + 1]) - words.unit_bounds[first]
            text_bounds = np.array(words.text_bounds[first : stop + 1])
            text = words.tokens.text_ids[text_bounds[0] : text_bounds[-1]]
            text_bounds -= text_bounds[0]
            is_heard = unit_bounds[1:] > unit_bounds[:-1]
            last_units = num_read + unit_bounds[1:][is_heard] - 1
            is_in_row = last_units < row_tokens
            room = word_ids[num_read : num_read + unit_bounds[-1]]
            room[:] = np.repeat(text[text_bounds[:-1]], np.diff(unit_bounds))[: len(room)]
            word_ids[last_units[is_in_row]] = IGNORED_LABEL
            places[last_units[is_in_row]] = num_written + text_bounds[1:][is_heard][is_in_row] - 1
        elif piece.offset:
            text = piece.values[:0]
        elif len(piece.values) == 1 and piece.values[0] in (ids.end_of_speech_id, ids.switch_id):
            is_end = piece.values[0] == ids.end_of_speech_id
            text = np.array([ids.end_of_text_id] if is_end else [], dtype=np.uint32)
            if not is_end and num_read < row_tokens and following is not None and following.offset:
                places[num_read] = num_written - 1
        else:
            text = piece.values
        texts.append(text)
        num_read += len(piece.values)
        num_written += len(text)
    places[places >= row_tokens] = -1  # words without units can make the writing longer than the row
    num_used = int(places.max()) + 1
    return Transcript(np.concatenate(texts)[:num_used].astype(np.int64), places, word_ids)


def interleaved_row(
    utterances: Iterator[Tokens],
    rng: np.random.Generator,
    ids: IdSpace,
    policy: Policy,
    row_tokens: int,
    *,
    predict_switch: bool = False,
    is_written: bool = False,
) -> Row:
    """One interleaved row, with its transcript if it `is_written`; see `interleaved_stream` and `cut_row`."""
    stream = interleaved_stream(utterances, rng, ids, policy, predict_switch=predict_switch)
    return cut_row(stream, row_tokens, ids if is_written else None)


def text_row(utterances: Iterator[Tokens], rng: np.random.Generator, ids: IdSpace, row_tokens: int) -> Row:
    """One row of text; see `text_stream`."""
    return cut_row(text_stream(utterances, rng, ids), row_tokens)


def speech_row(
    utterances: Iterator[Tokens], rng: np.random.Generator, ids: IdSpace, row_tokens: int, *, is_written: bool = False
) -> Row:
    """One row of speech, with its transcript if it `is_written`; see `speech_stream`."""
    stream = speech_stream(utterances, rng, ids, with_words=is_written)
    return cut_row(stream, row_tokens, ids if is_written else None)


def transcription_row(utterances: Iterator[Tokens], rng: np.random.Generator, ids: IdSpace, row_tokens: int) -> Row:
    """One row of pairs of speech and its text; see `pair_stream`."""
    return cut_row(pair_stream(utterances, rng, ids, row_tokens, prompt_is_speech=True), row_tokens)


def synthesis_row(utterances: Iterator[Tokens], rng: np.random.Generator, ids: IdSpace, row_tokens: int) -> Row:
    """One row of pairs of text and its speech; see `pair_stream`."""
    return cut_row(pair_stream(utterances, rng, ids, row_tokens, prompt_is_speech=False), row_tokens)
