"""Interleaving: every unit and word once and in order, a switch at each change, and the right labels."""

from itertools import count, islice

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from smoltolk.data.interleaving import (
    cut_row,
    interleaved_row,
    interleaved_stream,
    pair_stream,
    speech_row,
    synthesis_row,
    text_row,
    text_stream,
    transcription_row,
)
from smoltolk.data.policies import CoinPolicy, PoissonPolicy, SentencePolicy, SpanPolicy, Words
from smoltolk.data.shard import tokens_of
from smoltolk.data.utterance import Utterance, word_units
from smoltolk.model.configuration_smoltolk import IdSpace

IDS = IdSpace(text_vocab_size=1_000, num_units=500, end_of_text_id=999)
RATE_HZ = 100.0


def utterance(counts, durations, ends_s, first=0, words=None):
    """An utterance whose tokens and units are numbered from `first`, so that each can be told apart."""
    return Utterance(
        id=f"from-{first}",
        text=" ".join(words or ["word"] * len(counts)),
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
        written = st.sampled_from(["word", "comma,", "end.", "end?”", "3.5"])
        words = draw(st.lists(written, min_size=len(counts), max_size=len(counts)))
        result.append(utterance(counts, durations, np.array(ends_s) / RATE_HZ, first=100 * number, words=words))
    return result


BOUNDS = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted).map(tuple)
SHARES = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])


def policies():
    return st.one_of(
        st.builds(SpanPolicy, text_words=BOUNDS, speech_words=BOUNDS),
        st.builds(
            PoissonPolicy,
            mean_words=st.sampled_from([0.5, 2.0, 10.0]),
            share=SHARES,
            spans=st.sampled_from(["speech", "text"]),
        ),
        st.builds(CoinPolicy, speech_share=SHARES),
        st.builds(SentencePolicy, speech_share=st.one_of(st.none(), SHARES)),
    )


def endless(items):
    """The tokens of the items over and over, and the list of the items drawn so far."""
    drawn = []

    def draws():
        for number in count():
            drawn.append(items[number % len(items)])
            yield tokens_of(drawn[-1], RATE_HZ)

    return draws(), drawn


def taken(stream, num_pieces):
    """Ids of the first pieces of a stream."""
    return np.concatenate([piece.values.astype(np.int64) + piece.offset for piece in islice(stream, num_pieces)])


def word_tokens(item):
    return np.concatenate([[0], np.cumsum(item.word_token_counts, dtype=int)])


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
    uncut = taken(interleaved_stream(draws, np.random.default_rng(seed), IDS, policy), 80)

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
    row = interleaved_row(
        endless(items)[0], np.random.default_rng(seed), IDS, policy, row_tokens, predict_switch=predict_switch
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
    uncut = taken(interleaved_stream(draws, np.random.default_rng(seed), IDS, policy), 60)
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
        uncut = taken(interleaved_stream(endless([silent_start])[0], np.random.default_rng(seed), IDS, policy), 60)
        assert not ((uncut[1:] == IDS.switch_id) & (uncut[:-1] == IDS.switch_id)).any()
        assert uncut[0] != IDS.switch_id


@pytest.mark.parametrize("is_speech", [False, True])
def test_runs_are_as_long_as_the_policy_says(is_speech):
    long = utterance([1] * 400, [10] * 400, np.arange(400) * 0.1 + 0.05, first=0)
    policy = SpanPolicy(text_words=(4, 12), speech_words=(3, 8))
    row = interleaved_row(endless([long])[0], np.random.default_rng(3), IDS, policy, 4_000)
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
    cut_row(text_stream(draws, np.random.default_rng(1), IDS), 5)
    assert len(drawn) <= 2


@pytest.mark.parametrize("bounds", [(0, 3), (4, 3)])
def test_a_span_policy_with_impossible_bounds_is_refused(bounds):
    with pytest.raises(ValueError, match="speech_words is"):
        SpanPolicy(speech_words=bounds)


def plain_alternation(items, rng, ids, policy):
    """The paper's policy as one would write it first: what `SpanPolicy` must draw, number for number."""

    def piece(item, start, stop, is_speech):
        bounds = word_units(item, RATE_HZ) if is_speech else word_tokens(item)
        values = (item.units if is_speech else item.text_ids)[bounds[start] : bounds[stop]]
        return values.astype(np.int64) + (ids.speech_offset if is_speech else 0)

    is_speech = bool(rng.integers(2))
    item = next(items)
    word = int(rng.integers(len(item.word_token_counts)))
    while True:
        words_left = policy.draw(rng, is_speech)
        is_empty = True
        while words_left > 0 or is_empty:
            stop = min(word + max(words_left, 1), len(item.word_token_counts))
            words_left -= stop - word
            found = piece(item, word, stop, is_speech)
            is_empty &= len(found) == 0
            yield from found
            word = stop
            if word == len(item.word_token_counts):
                is_empty = False
                yield ids.end_id(is_speech)
                item, word = next(items), 0
        yield ids.switch_id
        is_speech = not is_speech


@settings(max_examples=100, deadline=None)
@given(utterances(), st.builds(SpanPolicy, text_words=BOUNDS, speech_words=BOUNDS), st.integers(0, 2**32))
def test_alternation_draws_what_its_plain_form_draws(items, policy, seed):
    row = interleaved_row(endless(items)[0], np.random.default_rng(seed), IDS, policy, 200)
    plain = plain_alternation((items[n % len(items)] for n in count()), np.random.default_rng(seed), IDS, policy)
    assert row.input_ids.tolist() == list(islice(plain, 200))


def spoken_words(num_words, words=None, silent=()):
    """Words of one token and one unit each, but for silent ones, which have no unit."""
    has_unit = np.array([word not in silent for word in range(num_words)])
    ends_s = np.cumsum(has_unit) * 0.1 - 0.05
    return Words.of(tokens_of(utterance([1] * num_words, [10] * int(has_unit.sum()), ends_s, words=words), RATE_HZ))


def modalities(policy, words, seed=0, start=0):
    """Whether each word from `start` on is speech, from a policy's runs."""
    rng = np.random.default_rng(seed)
    runs, _ = policy.runs(rng, words, start, policy.begin(rng))
    stops = [start, *(stop for stop, _ in runs)]
    assert stops[-1] == words.num_words
    return np.repeat([is_speech for _, is_speech in runs], np.diff(stops))


def lengths_of_runs(is_speech, wanted):
    """Lengths of the maximal runs of one modality."""
    edges = np.flatnonzero(np.diff([False, *(is_speech == wanted), False]))
    return np.diff(edges)[::2]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (PoissonPolicy(), 0.3),
        (PoissonPolicy(share=0.3, spans="text"), 0.7),
        (PoissonPolicy(mean_words=2, share=0.8), 0.8),
        (CoinPolicy(0.2), 0.2),
        (SentencePolicy(0.3), 0.3),
        (SentencePolicy(), 0.5),
        (SpanPolicy((10, 31), (5, 16)), 10.5 / (10.5 + 20.5)),
    ],
)
def test_the_share_of_speech_is_met(policy, expected):
    words = [spoken_words(n, ["end." if word % 5 == 4 else "word" for word in range(n)]) for n in (7, 31, 60)]
    rng, carried, spoken, total = np.random.default_rng(0), None, 0, 0
    carried = policy.begin(rng)
    for number in range(3_000):
        drawn = words[number % 3]
        runs, carried = policy.runs(rng, drawn, 0, carried)
        begins_at = 0
        for stop, is_speech in runs:
            spoken += (stop - begins_at) * is_speech
            begins_at = stop
        total += drawn.num_words
    assert spoken / total == pytest.approx(expected, abs=0.02)


def test_poisson_spans_have_their_lengths_stand_apart_and_fall_everywhere():
    policy, words = PoissonPolicy(mean_words=6, share=0.4), spoken_words(500)
    drawn = [modalities(policy, words, seed) for seed in range(200)]
    assert {int(is_speech.sum()) for is_speech in drawn} == {200}
    lengths = np.concatenate([lengths_of_runs(is_speech, True) for is_speech in drawn])
    assert lengths.mean() == pytest.approx(6, abs=0.15)  # a little less: the last span is cut
    assert lengths.var() == pytest.approx(6, abs=0.6)
    # Every place is as likely; only at the ends fewer spans reach a word.
    inside = np.mean(drawn, axis=0)[10:-10]
    assert inside.min() > 0.25
    assert inside.max() < 0.55


def test_poisson_spans_that_find_no_place_join_the_last_one():
    policy = PoissonPolicy(mean_words=0.01, share=0.9)  # all spans have one word, and there are 9 for 2 places
    for seed in range(20):
        assert modalities(policy, spoken_words(10), seed).sum() == 9
        assert modalities(PoissonPolicy(share=1), spoken_words(10), seed).all()
        assert not modalities(PoissonPolicy(share=0), spoken_words(10), seed).any()


def test_coins_are_independent_from_word_to_word():
    is_speech = modalities(CoinPolicy(0.5), spoken_words(20_000))
    assert np.mean(is_speech[1:] == is_speech[:-1]) == pytest.approx(0.5, abs=0.02)


SENTENCES = ["One", "two.", "Three!", "“Four,", "five?”", "(Six…)", "3.5", "e.g.", "seven:", "eight"]
SENTENCE_NUMBERS = [0, 0, 1, 2, 2, 3, 4, 4, 5, 5]  # "e.g." ends one


@pytest.mark.parametrize("share", [None, 0.5])
def test_sentences_are_of_one_modality(share):
    words = spoken_words(len(SENTENCES), SENTENCES)
    drawn = [modalities(SentencePolicy(share), words, seed) for seed in range(300)]
    by_sentence = {tuple(is_speech[SENTENCE_NUMBERS.index(n)] for n in range(6)) for is_speech in drawn}
    for is_speech in drawn:
        for number in range(6):
            assert len({bool(s) for s, n in zip(is_speech, SENTENCE_NUMBERS, strict=True) if n == number}) == 1
    if share is None:
        assert by_sentence == {(False, True) * 3, (True, False) * 3}
    else:
        assert len(by_sentence) > 55  # of 64


def test_sentences_alternate_from_one_utterance_to_the_next_and_from_a_start_within_one():
    policy, words = SentencePolicy(), spoken_words(3, ["a", "b.", "c"])
    rng = np.random.default_rng(0)
    first, carried = policy.runs(rng, words, 1, False)
    assert (first, carried) == ([(2, False), (3, True)], False)
    unpunctuated = spoken_words(3)
    assert policy.runs(rng, unpunctuated, 0, False) == ([(3, False)], True)
    assert policy.runs(rng, unpunctuated, 0, True) == ([(3, True)], False)


def test_a_speech_run_without_units_stays_text():
    words = spoken_words(4, ["a.", "b.", "c.", "d."], silent={1, 2})
    for policy in (CoinPolicy(0.5), SentencePolicy(0.5), PoissonPolicy(mean_words=1, share=0.5)):
        found = {tuple(modalities(policy, words, seed).tolist()) for seed in range(200)}
        assert (True, True, True, True) in found or isinstance(policy, PoissonPolicy)
        assert (True, True, False, False) in found  # a silent word beside one with units
        assert not any(one and not zero and not (two and three) for zero, one, two, three in found)
        assert not any(two and not three and not (zero and one) for zero, one, two, three in found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PoissonPolicy(mean_words=0), "mean_words is 0"),
        (lambda: PoissonPolicy(share=1.5), r"share is 1\.5: give a share from 0 to 1"),
        (lambda: PoissonPolicy(spans="both"), "spans is 'both': choose speech or text"),
        (lambda: CoinPolicy(-0.1), r"speech_share is -0\.1"),
        (lambda: SentencePolicy(2), "speech_share is 2"),
    ],
)
def test_impossible_settings_of_policies_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TASK_ROWS = {"transcription": transcription_row, "synthesis": synthesis_row}


def expected_pair(text, units, task):
    """Ids and labels of a pair, as documented."""
    text, units = list(text), [int(unit) + IDS.speech_offset for unit in units]
    prompt, target = (units, text) if task == "transcription" else (text, units)
    target = [*target, IDS.end_of_text_id if task == "transcription" else IDS.end_of_speech_id]
    ids = [IDS.bop_id, *prompt, IDS.eop_id, IDS.switch_id, *target]
    return ids, [-100] * (len(prompt) + 3) + target


@settings(max_examples=60, deadline=None)
@given(utterances(), st.sampled_from(sorted(TASK_ROWS)), st.integers(0, 2**32), st.integers(80, 300))
def test_pairs_have_a_prompt_without_labels_and_a_target_with_them(items, task, seed, row_tokens):
    row = TASK_ROWS[task](endless(items)[0], np.random.default_rng(seed), IDS, row_tokens)
    pairs = [expected_pair(item.text_ids, item.units, task) for item in items]
    ids = [token for n in range(row_tokens) for token in pairs[n % len(pairs)][0]][:row_tokens]
    labels = [token for n in range(row_tokens) for token in pairs[n % len(pairs)][1]][:row_tokens]
    assert row.input_ids.tolist() == ids
    assert row.labels.tolist() == labels


@pytest.mark.parametrize("task", sorted(TASK_ROWS))
def test_an_utterance_longer_than_a_row_becomes_pairs_that_fit_each_seen_whole_in_some_row(task):
    long = utterance([2] * 50, [10] * 150, (np.arange(50) + 1) * 0.3 - 0.05, first=0)
    row_tokens, tokens_of_word = 34, 5  # so six words fit: 4 + 6 · 5
    stream = pair_stream(
        endless([long])[0], np.random.default_rng(0), IDS, row_tokens, prompt_is_speech=task == "transcription"
    )
    assert max(len(np.concatenate([p.values for p in islice(stream, 6)])) for _ in range(20)) == row_tokens
    whole = set()
    for seed in range(200):
        row = TASK_ROWS[task](endless([long])[0], np.random.default_rng(seed), IDS, row_tokens)
        targets = row.labels[row.labels >= 0]
        first = next(token for token in targets if token not in (IDS.end_of_text_id, IDS.end_of_speech_id))
        is_text = task == "transcription"
        word = first // 2 if is_text else (first - IDS.speech_offset) // 3
        stop = min(word + (row_tokens - 4) // tokens_of_word, 50)
        pair, _ = expected_pair(long.text_ids[2 * word : 2 * stop], long.units[3 * word : 3 * stop], task)
        assert row.input_ids.tolist()[: len(pair)] == pair
        whole |= set(range(word, stop))
    assert whole == set(range(50))
