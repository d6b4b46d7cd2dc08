"""Models that change the modality by themselves, bounds of runs, and prompts that make no sense."""

import pytest
import torch
from tests.conftest import TEXT_VOCAB, mixed_ids, tiny_model
from tests.generation.test_generation import left_padded, prompt_that_ends_in

from smoltolk.generation.sampling import RunLengths, check_prompt, continue_ids

INFINITY = float("inf")


@pytest.fixture
def switching():
    return tiny_model(predict_switch=True)


def runs(tokens, ids):
    """Lengths of the runs of a continuation."""
    found, length = [], 0
    for token in [*tokens, None]:
        if token is None or token == ids.switch_id:
            found.append(length)
            length = 0
        else:
            length += 1
    return found


def test_the_switch_is_scored_by_the_head_of_the_modality_it_ends(switching):
    ids = mixed_ids(ids=switching.ids)
    with torch.no_grad():
        output = switching(ids, labels=ids, return_logits=True, return_token_losses=True)
    offset, switch = switching.ids.speech_offset, switching.ids.switch_id
    assert torch.isneginf(output.logits[..., [switching.ids.bop_id, switching.ids.eop_id]]).all()
    assert torch.equal(torch.isneginf(output.logits[..., switch]), ids == switch)
    checked = 0
    for row, losses, logits in zip(ids.tolist(), output.token_losses, output.logits, strict=True):
        for t in range(len(row) - 1):
            source, label = row[t], row[t + 1]
            is_speech = label >= offset or (label == switch and source >= offset)
            block = slice(offset, None) if is_speech else slice(0, TEXT_VOCAB)
            scores = torch.cat([logits[t, block], logits[t, [switch]]])
            index = len(scores) - 1 if label == switch else label - (offset if is_speech else 0)
            if (label >= offset) != (source >= offset) and switch not in (source, label):
                continue
            assert losses[t + 1].item() == pytest.approx(-scores.log_softmax(0)[index].item(), abs=1e-4)
            checked += label == switch
    assert checked > 5


def test_predicting_the_switch_teaches_all_parameters_the_same_with_and_without_logits(switching):
    ids = mixed_ids(ids=switching.ids)
    found = []
    for return_logits in (False, True):
        switching.zero_grad()
        output = switching.train()(ids, labels=ids, return_logits=return_logits)
        output.loss.backward()
        found.append([p.grad.clone() for p in switching.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    # The gradient of the switch's embedding as a head, by finite differences.
    weight, step = switching.control_embeddings.weight, 1e-2
    direction = weight.grad[2] / weight.grad[2].norm()
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            weight[2] += sign * step * direction
            losses.append(switching(ids, labels=ids).loss.item())
            weight[2] -= sign * step * direction
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(weight.grad[2].norm().item(), rel=0.05)


def test_without_the_setting_the_switch_is_neither_predicted_nor_generated(model):
    ids = mixed_ids(ids=model.ids)
    assert not model(ids, labels=ids, return_token_losses=True).token_losses[ids == model.ids.switch_id].any()
    with pytest.raises(ValueError, match="does not predict the switch: train with predict_switch"):
        continue_ids(model, ids[:, :1], max_new_tokens=2, can_switch=True)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_model_switches_by_itself_within_the_bounds_of_its_runs(switching, use_cache):
    ids = switching.ids
    rows = [prompt_that_ends_in(end, ids, seed) for seed, end in enumerate(("text", "speech", "switch"))]
    lengths = RunLengths(text=(2, 4), speech=(3, 5))
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "seed": 1, "lengths": lengths, "can_switch": True}
    found = continue_ids(switching, *left_padded(rows), **settings, use_cache=use_cache)
    assert found == continue_ids(switching, *left_padded(rows), **settings)
    for row, new in zip(rows, found, strict=True):
        check_prompt([*row, *new], ids)
        is_speech = row[-1] >= ids.speech_offset if row[-1] != ids.switch_id else row[-2] < ids.speech_offset
        for length in runs(new, ids)[:-1]:
            low, high = (3, 5) if is_speech else (2, 4)
            assert low <= length <= high
            is_speech = not is_speech
        assert len(runs(new, ids)) > 5


def test_bounds_end_a_run_where_the_model_may_not_switch(model):
    prompts = [prompt_that_ends_in(end, model.ids) for end in ("text", "speech")]
    settings = {"max_new_tokens": 30, "lengths": RunLengths(text=(4, 4), speech=(0, 7))}
    text, speech = (continue_ids(model, torch.tensor([p]), **settings)[0] for p in prompts)
    assert len(text) == 4
    assert len(speech) <= 7


def test_a_run_that_may_not_end_and_must_is_refused(model):
    with pytest.raises(ValueError, match="min_new_tokens is 9, but lengths ends a run after 4"):
        continue_ids(model, torch.tensor([[5]]), max_new_tokens=9, min_new_tokens=9, lengths=RunLengths(text=(0, 4)))


@pytest.mark.parametrize("bounds", [(-1, 3), (4, 3), (0, 0)])
def test_bounds_that_cannot_be_are_refused(bounds):
    with pytest.raises(ValueError, match=r"speech is .*: give 0 <= fewest <= most"):
        RunLengths(speech=bounds)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        (["t", "switch", "switch"], "second switch at token 2"),
        (["t", "u"], "goes from text to speech at token 1 without a switch: put the switch id between them"),
        (["u", "t"], "goes from speech to text at token 1 without"),
        (["u", "switch", "u"], "goes from speech to speech at token 2 with a switch"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(model, prompt, message):
    ids = model.ids
    tokens = [{"t": 5, "u": ids.speech_offset, "switch": ids.switch_id}[name] for name in prompt]
    with pytest.raises(ValueError, match=message):
        continue_ids(model, torch.tensor([tokens], dtype=torch.long), max_new_tokens=3)


def test_padding_on_the_right_is_refused(model):
    ids = torch.tensor([[5, 6, 0]])
    with pytest.raises(ValueError, match="pad prompts on the left"):
        continue_ids(model, ids, torch.tensor([[1, 1, 0]]), max_new_tokens=3)


def test_what_a_prompt_is_padded_with_changes_nothing(model):
    switch, unit = model.ids.switch_id, model.ids.speech_offset + 2
    alone = continue_ids(model, torch.tensor([[switch]]), max_new_tokens=4, temperature=0)
    padded = continue_ids(
        model, torch.tensor([[unit, switch]]), torch.tensor([[0, 1]]), max_new_tokens=4, temperature=0
    )
    assert padded == alone


def test_a_switch_alone_leads_to_speech(model):
    (new,) = continue_ids(model, torch.tensor([[model.ids.switch_id]]), max_new_tokens=3, min_new_tokens=3)
    assert all(token >= model.ids.speech_offset for token in new)


def test_prompts_between_bop_and_eop_are_answered_in_the_other_modality(model):
    ids = model.ids
    text, units = [5, 6], [ids.speech_offset, ids.speech_offset + 1]
    for first, second in ((text, units), (units, text)):
        question = [ids.bop_id, *first, ids.eop_id, ids.switch_id]
        example = [*question, *second, ids.end_id(second is units)]  # pairs follow one another without a switch
        for prompt in (question, [*example, *question]):
            (new,) = continue_ids(model, torch.tensor([prompt]), max_new_tokens=3, min_new_tokens=3)
            assert [token >= ids.speech_offset for token in new] == [second is units] * 3
