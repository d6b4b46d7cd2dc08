"""The scorer against log-likelihoods from whole logits, and protocols against sequences written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.conftest import NUM_UNITS, TEXT_VOCAB, tiny_lm_config, tiny_model
from transformers import MistralConfig

from smoltolk.evaluation import scoring
from smoltolk.evaluation.protocols import (
    AUTHORS,
    AUTHORS_CROSS_MODAL,
    CONTINUATION,
    PROTOCOLS,
    SALMON,
    SLAMKIT,
    ZRC,
    Candidate,
    Protocol,
    find_protocol,
    lay_out,
)
from smoltolk.evaluation.scoring import ScoringSettings, score_candidates, score_with_greedy
from smoltolk.generation.sampling import continue_ids

PLAIN = ScoringSettings(batch_size=1, shares_prompts=False)


@pytest.fixture
def model():
    return tiny_model(predict_switch=True)


def candidates(ids, *, prompts=3, seed=0, lowest=16, highest=40):
    """Two endings in either modality for prompts in either modality."""
    rng = np.random.default_rng(seed)

    def draw(is_speech, count):
        return (
            rng.integers(NUM_UNITS, size=count) + ids.speech_offset if is_speech else rng.integers(1, TEXT_VOCAB, count)
        )

    found = []
    for i in range(prompts):
        prompt = draw(i % 2 == 0, rng.integers(lowest, highest))
        found += [Candidate(prompt, draw(ends % 2 == 0, rng.integers(2, 12))) for ends in range(4)]
    return found


def choices(model, layout):
    """Log-probabilities of the ids that may stand where one is scored, and that one, from all positions' logits."""
    ids = model.ids
    with torch.no_grad():
        logits = model(torch.from_numpy(layout.ids[None])).logits[0]
    column = torch.arange(logits.shape[1])
    for t in np.flatnonzero(layout.is_scored):
        before, target = layout.ids[t - 1], layout.ids[t]
        of_speech = target >= ids.speech_offset or (target == ids.switch_id and before >= ids.speech_offset)
        block = column >= ids.speech_offset if of_speech else column < TEXT_VOCAB
        # The switch is one more choice of the head whose modality it would end.
        can_switch = before >= ids.speech_offset if of_speech else before < TEXT_VOCAB
        block[ids.switch_id] = bool(model.config.predict_switch and can_switch)
        yield logits[t - 1].masked_fill(~block, float("-inf")).log_softmax(0), target


def log_likelihoods(model, layout):
    """Log-probability of each scored id over its own block."""
    return np.array([found[target].item() for found, target in choices(model, layout)])


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_scores_are_the_log_likelihoods_of_what_the_protocol_scores(model, protocol):
    some = candidates(model.ids, prompts=2)
    scores = score_candidates(model, some, protocol)
    for candidate, score in zip(some, scores, strict=True):
        found = log_likelihoods(model, lay_out(candidate, protocol, model.ids))
        assert score == pytest.approx(found.mean() if protocol.length_norm == "mean" else found.sum(), abs=2e-4)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_shared_prompts_and_batches_change_no_score(model, protocol):
    some = candidates(model.ids, prompts=4, lowest=10)  # some are too short to be shared
    protocol = replace(protocol, length_norm="mean")
    plain = score_candidates(model, some, protocol, PLAIN)
    for settings in (ScoringSettings(), ScoringSettings(batch_size=3), ScoringSettings(max_batch_tokens=100)):
        np.testing.assert_allclose(score_candidates(model, some, protocol, settings), plain, atol=1e-5)


@pytest.mark.parametrize("protocol", [SALMON, ZRC], ids=lambda protocol: protocol.name)
def test_sums_are_equal_too(model, protocol):
    some = candidates(model.ids)
    plain = score_candidates(model, some, protocol, PLAIN)
    np.testing.assert_allclose(score_candidates(model, some, protocol), plain, rtol=1e-6, atol=1e-5)


def test_a_prompt_is_read_once_whatever_follows(model, monkeypatch):
    some = candidates(model.ids, prompts=2)
    tokens = []
    monkeypatch.setattr(model, "forward", counted(model.forward, tokens))
    score_candidates(model, some, CONTINUATION)
    prompts = max(len(candidate.prompt) for candidate in some)
    assert tokens[0] == (2, prompts)
    assert tokens[1][0] == len(some)
    assert tokens[1][1] < 16  # the prompt's last token, the switch and the ending
    assert len(tokens) == 2


def counted(forward, shapes):
    def count(input_ids, *arguments, **settings):
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids, *arguments, **settings)

    return count


def test_batches_keep_to_their_sizes(model, monkeypatch):
    some = candidates(model.ids, prompts=5)
    for settings in (
        ScoringSettings(batch_size=4),
        ScoringSettings(max_batch_tokens=120, shares_prompts=False),
    ):
        shapes = []
        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", counted(model.forward, shapes))
            done = []
            score_candidates(model, some, AUTHORS, settings, done.append)
        assert sum(done) == len(some)
        assert all(rows <= settings.batch_size for rows, _ in shapes)
        assert all(rows * length <= settings.max_batch_tokens for rows, length in shapes)


def test_endings_of_unlike_length_are_not_padded_to_each_other(model, monkeypatch):
    prompt, rng = np.arange(1, 21), np.random.default_rng(0)
    some = [Candidate(prompt, rng.integers(1, TEXT_VOCAB, count)) for count in (3, 5, 60, 70)]
    plain = score_candidates(model, some, AUTHORS, PLAIN)
    shapes = []
    monkeypatch.setattr(model, "forward", counted(model.forward, shapes))
    np.testing.assert_allclose(score_candidates(model, some, AUTHORS), plain, atol=1e-5)
    assert shapes == [(1, 21), (2, 6), (2, 71)]


def test_a_backbone_with_a_window_has_the_same_scores():
    config = {key: value for key, value in tiny_lm_config().to_dict().items() if key != "model_type"}
    model = tiny_model(lm_config=MistralConfig(**config | {"sliding_window": 24}))
    some = [*candidates(model.ids, lowest=16, highest=17), *candidates(model.ids, lowest=30, seed=1)]
    plain = score_candidates(model, some, CONTINUATION, PLAIN)
    np.testing.assert_allclose(score_candidates(model, some, CONTINUATION), plain, atol=1e-5)


def test_like_sequences_have_the_very_same_score(model):
    some = candidates(model.ids, prompts=4, lowest=4)
    scores = score_candidates(model, [*some, *some[::-1]], CONTINUATION, ScoringSettings(batch_size=3))
    assert scores[: len(some)].tolist() == scores[len(some) :][::-1].tolist()


def test_scoring_leaves_the_model_in_the_mode_it_was_in(model):
    model.train()
    score_candidates(model, candidates(model.ids, prompts=1), CONTINUATION)
    assert model.training


def test_autocast_is_off_unless_asked_for_and_is_named(model):
    some = candidates(model.ids)
    exact = score_candidates(model, some, CONTINUATION)
    rounded = score_candidates(model, some, CONTINUATION, ScoringSettings(autocast=True))
    assert 1e-4 < np.abs(exact - rounded).max() < 0.5
    assert ScoringSettings().precision(model) == "float32"
    assert ScoringSettings(autocast=True).precision(model) == "float32, autocast to bfloat16"


TEXT, SPEECH = "text", "speech"


@pytest.mark.parametrize(
    ("protocol", "sides", "expected"),
    [
        (CONTINUATION, (TEXT, SPEECH), "t t | ~ u* u*"),
        (CONTINUATION, (TEXT, TEXT), "t t | t* t*"),
        (AUTHORS_CROSS_MODAL, (SPEECH, TEXT), "u u | ~ t* t*"),
        (AUTHORS, (None, SPEECH), "e | u* u*"),
        (AUTHORS, (SPEECH, SPEECH), "e u* u* | u* u*"),
        (AUTHORS, (None, TEXT), "o | t* t*"),
        (SLAMKIT, (SPEECH, SPEECH), "e u* u* | u* u* e*"),
        (SLAMKIT, (SPEECH, TEXT), "e u* u* | ~* t* t*"),
        (SLAMKIT, (TEXT, SPEECH), "o t* t* | ~* u* u* e*"),
        (ZRC, (None, SPEECH), "e | u* u* e*"),
        (ZRC, (None, TEXT), "o | t* t* o*"),
        (SALMON, (None, SPEECH), "| u u*"),
        (SALMON, (TEXT, SPEECH), "t t* | ~ u* u*"),
    ],
)
def test_protocols_lay_out_sequences_as_they_say(protocol, sides, expected):
    ids = tiny_model().ids
    ids_of = {TEXT: np.array([7, 8]), SPEECH: np.array([1, 2]) + ids.speech_offset, None: np.zeros(0, dtype=np.int64)}
    layout = lay_out(Candidate(*(ids_of[side] for side in sides)), protocol, ids)
    names = {ids.end_of_speech_id: "e", ids.end_of_text_id: "o", ids.switch_id: "~"}
    tokens = []
    for place, (token, is_scored) in enumerate(zip(layout.ids, layout.is_scored, strict=True)):
        name = names.get(int(token), "u" if token >= ids.speech_offset else "t")
        tokens += (["|"] if place == layout.num_shared else []) + [name + "*" * bool(is_scored)]
    assert " ".join(tokens) == expected


def test_ties_of_the_authors_count_in_likelihood_tasks_and_not_in_storycloze():
    assert AUTHORS.for_task(is_cloze=True).tie_credit == 0
    assert AUTHORS.for_task(is_cloze=False).tie_credit == 0.5
    for protocol in (CONTINUATION, SLAMKIT, SALMON, ZRC):
        assert protocol.for_task(is_cloze=True).tie_credit == protocol.for_task(is_cloze=False).tie_credit == 0.5
    assert AUTHORS_CROSS_MODAL.for_task(is_cloze=True).tie_credit == 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"span": "all"}, "span is 'all': choose one of continuation, sequence, sequence-but-first"),
        ({"start": "bos"}, "start is 'bos'"),
        ({"end": "yes"}, "end is 'yes'"),
        ({"length_norm": "max"}, "length_norm is 'max'"),
        ({"tie_credit": 2.0}, "tie_credit is 2.0: give a number from 0 to 1"),
        ({"cloze_tie_credit": -1.0}, "cloze_tie_credit is -1.0"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens is -1"),
        ({"span": "sequence"}, "nothing predicts a first token without a start"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**{"name": "mine", "span": "continuation"} | knobs)


def test_what_cannot_be_scored_is_refused(model):
    nothing, one = np.zeros(0, dtype=np.int64), np.array([5])
    with pytest.raises(ValueError, match="the continuation is empty"):
        score_candidates(model, [Candidate(one, nothing)], CONTINUATION)
    with pytest.raises(ValueError, match="nothing comes before the first token, which the protocol continuation-mean"):
        score_candidates(model, [Candidate(nothing, one)], CONTINUATION)
    with pytest.raises(ValueError, match="the sequence has 1 token, of which salmon scores none"):
        score_candidates(model, [Candidate(nothing, one)], SALMON)
    with pytest.raises(ValueError, match="slamkit scores the switch, which this model does not predict"):
        score_candidates(tiny_model(), candidates(model.ids, prompts=1), SLAMKIT)
    with pytest.raises(ValueError, match="protocol is 'best': choose one of continuation-mean, authors"):
        find_protocol("best")
    with pytest.raises(ValueError, match="batch_size is 0"):
        ScoringSettings(batch_size=0)


def test_prompts_shorter_than_the_cost_of_a_cache_are_read_again(model, monkeypatch):
    shapes = []
    monkeypatch.setattr(model, "forward", counted(model.forward, shapes))
    short = scoring.SHORTEST_SHARED - 1
    some = candidates(model.ids, prompts=2, lowest=short, highest=short + 1)
    score_candidates(model, some, CONTINUATION)
    assert [rows for rows, _ in shapes] == [len(some)]


def test_a_sequence_is_greedy_where_every_scored_token_is_the_best_of_its_modality():
    model = tiny_model()
    found = []
    for candidate in candidates(model.ids, prompts=2, lowest=12):
        begun = lay_out(candidate, CONTINUATION, model.ids).ids[: -len(candidate.continuation)]
        (best,) = continue_ids(model, torch.tensor(begun)[None], max_new_tokens=5, min_new_tokens=2, temperature=0)
        endings = (best, [*best[:-1], *candidate.continuation[:1]], [*candidate.continuation[:1], *best])
        found += [Candidate(candidate.prompt, np.array(ids)) for ids in endings]
    layouts = [lay_out(candidate, CONTINUATION, model.ids) for candidate in found]
    expected = [all(p.argmax() == target for p, target in choices(model, layout)) for layout in layouts]
    assert 3 < sum(expected) < len(expected) - 3
    for settings in (PLAIN, ScoringSettings()):
        scores, is_greedy = score_with_greedy(model, found, CONTINUATION, settings)
        assert is_greedy.tolist() == expected
        np.testing.assert_array_equal(scores, score_candidates(model, found, CONTINUATION, settings))
