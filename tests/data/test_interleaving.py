"""Interleaving: every unit and word once and in order, a switch at each change, and the right labels."""

from itertools import count

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from smoltolk.data.interleaving import (
    SpanPolicy,
    cut_row,
    interleave,
    interleaved_stream,
    speech_row,
    text_row,
    text_stream,
    word_tokens,
    word_units,
)
from smoltolk.data.utterance import Utterance
from smoltolk.model.configuration_smoltolk import IdSpace

IDS = IdSpace(text_vocab_size=1_000, num_units=500, end_of_text_id=999)
RATE_HZ = 100.0


def utterance(counts, durations, ends_s, first=0):
    """An utterance whose tokens and units are numbered from `first`, so that each can be told apart."""
    return Utterance(
        id=f"from-{first}",
        text=" ".join("word" for _ in counts),
        text_ids=np.arange(first, first + sum(counts), dtype=np.uint32),
        units=np.arange(first, first + len(durations), dtype=np.uint16),
        unit_durations=np.array(durations, dtype=np.uint16),
        word_ends_s=np.array(ends_s, dtype=np.float32),
        word_token_counts=np.array(counts, dtype=np.uint8),
        seconds=sum(durations) / RATE_HZ,
        split="train",
    )


@st.composite
def utterances(draw):
    """A few utterances; words without units and units after the last word occur."""
    result = []
    for number in range(draw(st.integers(1, 4))):
        counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=12))
        durations = draw(st.lists(st.integers(1, 9), min_size=1, max_size=30))
        ends = st.integers(0, sum(durations) + 4)
        ends_s = sorted(draw(st.lists(ends, min_size=len(counts), max_size=len(counts))))
        result.append(utterance(counts, durations, np.array(ends_s) / RATE_HZ, first=100 * number))
    return result


@st.composite
def policies(draw):
    bounds = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted).map(tuple)
    return SpanPolicy(text_words=draw(bounds), speech_words=draw(bounds))


def endless(items):
    """The items over and over, and the list of those drawn so far."""
    drawn = []

    def draws():
        for number in count():
            drawn.append(items[number % len(items)])
            yield drawn[-1]

    return draws(), drawn


def test_a_word_has_the_units_that_start_after_the_last_word_and_up_to_its_end():
    #                          starts at 0, 10, 30, 60, 100 ms → frames 0, 1, 3, 6, 10
    spoken = utterance([1, 1, 1, 1], [1, 2, 3, 4, 1], [0.005, 0.03, 0.031, 0.07])
    assert word_units(spoken, RATE_HZ).tolist() == [0, 1, 3, 3, 5]


@given(utterances())
def test_every_unit_belongs_to_exactly_one_word(items):
    for item in items:
        bounds = word_units(item, RATE_HZ)
        assert bounds[0] == 0
        assert bounds[-1] == len(item.units)
        assert len(bounds) == len(item.word_ends_s) + 1
        assert (np.diff(bounds) >= 0).all()
        starts = (np.cumsum(item.unit_durations.astype(int)) - item.unit_durations) / RATE_HZ
        starts = starts.astype(np.float32)
        for word in range(len(bounds) - 2):
            assert (starts[bounds[word] : bounds[word + 1]] <= item.word_ends_s[word]).all()
            assert (starts[bounds[word + 1] :] > item.word_ends_s[word]).all()


@settings(max_examples=100, deadline=None)
@given(utterances(), policies(), st.integers(0, 2**32))
def test_every_word_appears_once_in_one_modality_and_switches_stand_at_changes_only(items, policy, seed):
    draws, drawn = endless(items)
    stream = interleaved_stream(draws, np.random.default_rng(seed), IDS, policy, RATE_HZ)
    uncut = np.concatenate([next(stream) for _ in range(80)])

    # A switch stands at each change of modality and nowhere else.
    is_switch = uncut == IDS.switch_id
    is_speech = uncut >= IDS.speech_offset
    assert not is_switch[0]
    assert not (is_switch[1:] & is_switch[:-1]).any()
    for position in range(1, len(uncut) - 1):
        if is_switch[position]:
            assert is_speech[position - 1] != is_speech[position + 1]
        elif not is_switch[position - 1]:
            assert is_speech[position - 1] == is_speech[position]

    # Read the stream back: word after word, in text or in units, an end token after each utterance.
    ids = uncut[~is_switch].tolist()
    words = [
        [
            (item.text_ids[t0:t1].tolist(), (item.units[u0:u1].astype(int) + IDS.speech_offset).tolist())
            for t0, t1, u0, u1 in zip(
                word_tokens(item)[:-1], word_tokens(item)[1:], bounds[:-1], bounds[1:], strict=True
            )
        ]
        for item in drawn
        for bounds in [word_units(item, RATE_HZ)]
    ]
    assert any(reads_back(ids, words[0][start:], words[1:]) for start in range(len(words[0])))


def reads_back(ids, first_words, other_utterances):
    """Whether ids are the words in order, each once in text or in units, with one end token per utterance.

    Words without units may stand for nothing, so all readings are followed: a set of positions reached.
    """
    reached = {0}
    for words in [first_words, *other_utterances]:
        for text, units in words:
            following = set()
            for position in reached:
                rest = ids[position:]
                for written in (text, units):
                    if rest[: len(written)] == written[: len(rest)]:
                        following.add(min(position + len(written), len(ids)))
            reached = following
        reached = {
            min(position + 1, len(ids))
            for position in reached
            if position == len(ids) or ids[position] in (IDS.end_of_text_id, IDS.end_of_speech_id)
        }
    return len(ids) in reached


@settings(max_examples=60, deadline=None)
@given(utterances(), policies(), st.integers(0, 2**32), st.integers(2, 150), st.booleans())
def test_labels_equal_inputs_except_on_switches(items, policy, seed, row_tokens, predict_switch):
    row = interleave(
        endless(items)[0],
        np.random.default_rng(seed),
        IDS,
        policy,
        row_tokens,
        RATE_HZ,
        predict_switch=predict_switch,
    )
    assert row.input_ids.shape == row.labels.shape == (row_tokens,)
    assert row.input_ids.dtype == row.labels.dtype == np.int64
    is_switch = row.input_ids == IDS.switch_id
    assert (row.labels[~is_switch] == row.input_ids[~is_switch]).all()
    assert (row.labels[is_switch] == (IDS.switch_id if predict_switch else -100)).all()


@settings(max_examples=40, deadline=None)
@given(utterances(), policies(), st.integers(0, 2**32))
def test_end_tokens_stand_once_after_each_utterance_in_its_last_words_modality(items, policy, seed):
    draws, drawn = endless(items)
    stream = interleaved_stream(draws, np.random.default_rng(seed), IDS, policy, RATE_HZ)
    uncut = np.concatenate([next(stream) for _ in range(60)])
    is_end = (uncut == IDS.end_of_text_id) | (uncut == IDS.end_of_speech_id)
    assert is_end.sum() in (len(drawn) - 1, len(drawn))
    for position in np.flatnonzero(is_end)[1:]:
        is_speech = uncut[position] == IDS.end_of_speech_id
        before = uncut[position - 1]
        if before in (IDS.end_of_text_id, IDS.end_of_speech_id):  # an utterance of words without units
            assert is_speech
        elif before != IDS.switch_id:
            assert (before >= IDS.speech_offset) == is_speech


def test_a_speech_run_without_units_is_extended_until_it_has_one():
    # Units start at 0.5 s only in word 2: words 0 and 1 are silent ("the" often is).
    silent_start = utterance([1] * 4, [50, 10, 10], [0.0, 0.0, 0.55, 0.7])
    silent_start = Utterance(
        **{**vars(silent_start), "units": silent_start.units[1:], "unit_durations": np.array([50, 20])}
    )
    policy = SpanPolicy(text_words=(1, 1), speech_words=(1, 1))
    for seed in range(50):
        stream = interleaved_stream(endless([silent_start])[0], np.random.default_rng(seed), IDS, policy, RATE_HZ)
        uncut = np.concatenate([next(stream) for _ in range(60)])
        assert not ((uncut[1:] == IDS.switch_id) & (uncut[:-1] == IDS.switch_id)).any()
        assert uncut[0] != IDS.switch_id


@pytest.mark.parametrize("is_speech", [False, True])
def test_runs_are_as_long_as_the_policy_says(is_speech):
    long = utterance([1] * 400, [10] * 400, np.arange(400) * 0.1 + 0.05, first=0)
    policy = SpanPolicy(text_words=(4, 12), speech_words=(3, 8))
    row = interleave(endless([long])[0], np.random.default_rng(3), IDS, policy, 4_000, RATE_HZ)
    runs = np.split(row.input_ids, np.flatnonzero(row.input_ids == IDS.switch_id))[1:-1]
    lengths = {
        int((~np.isin(run[1:], (IDS.end_of_text_id, IDS.end_of_speech_id))).sum())
        for run in runs
        if (run[1] >= IDS.speech_offset) == is_speech
    }
    assert lengths == set(range(3, 9) if is_speech else range(4, 13))


def test_text_rows_are_documents_with_end_of_text_from_a_random_word_on():
    items = [
        utterance([2, 1, 3], [5], [0.1, 0.2, 0.3], first=0),
        utterance([1, 1], [5], [0.1, 0.2], first=100),
    ]
    firsts = set()
    for seed in range(30):
        row = text_row(endless(items)[0], np.random.default_rng(seed), IDS, 20)
        firsts.add(int(row.input_ids[0]))
        end = int(np.flatnonzero(row.input_ids == IDS.end_of_text_id)[0])
        assert row.input_ids[end : end + 5].tolist() == [999, 100, 101, 999, 0]
        assert (row.labels == row.input_ids).all()
    assert firsts == {0, 2, 3}


def test_speech_rows_are_utterances_with_end_of_speech_from_a_random_unit_on():
    items = [utterance([1], [5, 5, 5], [0.1], first=0), utterance([1], [5, 5], [0.1], first=100)]
    firsts = set()
    for seed in range(30):
        row = speech_row(endless(items)[0], np.random.default_rng(seed), IDS, 20)
        units = row.input_ids - IDS.speech_offset
        firsts.add(int(units[0]))
        end = int(np.flatnonzero(row.input_ids == IDS.end_of_speech_id)[0])
        assert units[end : end + 5].tolist() == [500, 100, 101, 500, 0]
        assert (row.labels == row.input_ids).all()
    assert firsts == {0, 1, 2}


def test_a_row_draws_no_more_utterances_than_it_holds():
    draws, drawn = endless([utterance([1] * 10, [5] * 10, np.arange(10) / 20)])
    cut_row(text_stream(draws, np.random.default_rng(1), IDS), 5, IDS)
    assert len(drawn) <= 2


def test_rows_need_the_halves_they_are_made_of():
    speech_only = Utterance(id="spoken", units=np.array([1]), unit_durations=np.array([1]), seconds=1.0)
    with pytest.raises(ValueError, match="utterance 'spoken' has no word_token_counts"):
        text_row(endless([speech_only])[0], np.random.default_rng(0), IDS, 8)


@pytest.mark.parametrize("bounds", [(0, 3), (4, 3)])
def test_a_span_policy_with_impossible_bounds_is_refused(bounds):
    with pytest.raises(ValueError, match="speech_words is"):
        SpanPolicy(speech_words=bounds)
