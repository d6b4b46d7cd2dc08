"""Transcripts: what a row says, in writing, and where in the row it has been said."""

from itertools import cycle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.test_interleaving import IDS, RATE_HZ, utterance, utterances

from smoltolk.data.dataset import BatchSource, TaskMixture
from smoltolk.data.interleaving import interleaved_row, speech_row, text_row
from smoltolk.data.policies import SpanPolicy
from smoltolk.data.shard import tokens_of
from smoltolk.data.store import Store


def endless(spoken):
    return cycle([tokens_of(u, RATE_HZ) for u in spoken])


def units(*numbers):
    return [IDS.speech_offset + number for number in numbers]


def test_the_last_unit_of_each_spoken_word_points_at_its_last_text_token():
    # words: text 0 1 | 2 | 3; units 0 1 2 | none | 3 4
    said = utterance(counts=[2, 1, 1], durations=[1] * 5, ends_s=[0.025, 0.025, 0.05])
    row = speech_row(endless([said]), np.random.default_rng(1), IDS, 40, is_written=True)
    start = row.input_ids.tolist().index(IDS.end_of_speech_id) + 1  # after the first utterance, which may be cut
    whole = slice(start, start + 6)
    assert row.input_ids[whole].tolist() == [*units(0, 1, 2, 3, 4), IDS.end_of_speech_id]
    text = row.transcript.text_ids
    assert [int(text[place]) if place >= 0 else None for place in row.transcript.places[whole]] == [
        *(None, None, 1),  # the first word has two text tokens
        *(None, 3),  # the one between has no units, but is written
        None,
    ]
    assert row.transcript.word_ids[whole].tolist() == [0, 0, -100, 3, -100, -100]
    first = text.tolist().index(IDS.end_of_text_id) + 1
    assert text[first : first + 5].tolist() == [0, 1, 2, 3, IDS.end_of_text_id]


def test_a_switch_to_speech_points_at_the_text_before_it_and_one_to_text_at_nothing():
    said = utterance(counts=[1] * 6, durations=[1] * 12, ends_s=np.arange(2, 13, 2) / 100)
    policy = SpanPolicy(text_words=(2, 2), speech_words=(2, 2))
    seen = set()
    for seed in range(20):
        row = interleaved_row(endless([said]), np.random.default_rng(seed), IDS, policy, 40, is_written=True)
        for place in np.flatnonzero(row.input_ids == IDS.switch_id)[:-1]:
            before, after = row.input_ids[place - 1], row.input_ids[place + 1]
            written = row.transcript.places[place]
            assert (written >= 0) == (after >= IDS.speech_offset)
            if written >= 0:
                assert row.transcript.text_ids[written] == before
                seen.add(int(before))
    assert len(seen) > 1


@given(said=utterances(), seed=st.integers(0, 1000), is_interleaved=st.booleans(), row_tokens=st.integers(2, 80))
@settings(max_examples=150, deadline=None)
def test_a_transcript_is_the_rows_words_in_order(said, seed, is_interleaved, row_tokens):
    """Utterances number their tokens from a hundred each, so the words of a unit can be looked up."""
    rng, policy = np.random.default_rng(seed), SpanPolicy((1, 4), (1, 4))
    if not any(len(u.units) for u in said):
        return
    if is_interleaved:
        row = interleaved_row(endless(said), rng, IDS, policy, row_tokens, is_written=True)
    else:
        row = speech_row(endless(said), rng, IDS, row_tokens, is_written=True)
    plain_rng = np.random.default_rng(seed)
    if is_interleaved:
        plain = interleaved_row(endless(said), plain_rng, IDS, policy, row_tokens)
    else:
        plain = speech_row(endless(said), plain_rng, IDS, row_tokens)
    assert plain.transcript is None
    assert np.array_equal(plain.input_ids, row.input_ids)
    assert np.array_equal(plain.labels, row.labels)

    transcript = row.transcript
    said_places = transcript.places[transcript.places >= 0]
    assert (np.diff(said_places) >= 0).all()
    assert len(transcript.text_ids) == (said_places.max() + 1 if len(said_places) else 0)
    assert len(transcript.text_ids) <= row_tokens
    by_number = {number // 100: tokens_of(u, RATE_HZ) for number, u in zip(range(0, 400, 100), said, strict=False)}
    is_speech = row.input_ids >= IDS.speech_offset
    for place in np.flatnonzero((transcript.places >= 0) & is_speech):
        unit = int(row.input_ids[place] - IDS.speech_offset)
        tokens = by_number[unit // 100]
        ends = tokens.word_unit_ends
        word = int(np.searchsorted(ends, unit % 100 + 1))
        assert ends[word] == unit % 100 + 1  # it is a word's last unit
        last_token = unit // 100 * 100 + int(tokens.word_token_counts[: word + 1].sum()) - 1
        assert transcript.text_ids[transcript.places[place]] == last_token
        assert transcript.word_ids[place] == -100
    for place in np.flatnonzero(transcript.word_ids >= 0):
        unit = int(row.input_ids[place] - IDS.speech_offset)
        tokens = by_number[unit // 100]
        word = int(np.searchsorted(tokens.word_unit_ends, unit % 100, side="right"))
        first_token = unit // 100 * 100 + int(tokens.word_token_counts[:word].sum())
        assert transcript.word_ids[place] == first_token


def test_a_row_of_text_has_no_transcript():
    said = utterance(counts=[1, 1], durations=[1, 1], ends_s=[0.01, 0.02])
    assert text_row(endless([said]), np.random.default_rng(0), IDS, 8).transcript is None


def test_a_batch_with_transcripts_has_the_same_rows(tiny_world):
    store = Store(tiny_world / "store")
    ids = type(IDS)(text_vocab_size=64, num_units=store.num_units, end_of_text_id=0)
    stores = {task: [(store, 1.0)] for task in ("interleaved", "speech", "text")}
    plain, written = (
        BatchSource(stores, mixture=TaskMixture(), ids=ids, row_tokens=24, with_transcripts=w) for w in (False, True)
    )
    ours, theirs = plain.batch(0, 3, rows=12), written.batch(0, 3, rows=12)
    assert ours.input_ids.equal(theirs.input_ids)
    assert ours.transcripts is None
    is_text, is_speech = (np.array([task == t for task in theirs.tasks]) for t in ("text", "speech"))
    assert set(theirs.tasks) == {"interleaved", "speech", "text"}
    assert (theirs.transcripts.lengths.numpy()[is_text] == 0).all()
    assert (theirs.transcripts.lengths.numpy()[is_speech] > 0).all()
    part = theirs.select(slice(3, 7))
    assert part.transcripts.places.equal(theirs.transcripts.places[3:7])
    assert theirs.transcripts.text_ids.shape[1] == pytest.approx(max(1, int(theirs.transcripts.lengths.max())))
