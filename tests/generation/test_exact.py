"""Every way of decoding gives what the uncached forward gives."""

import pytest
import torch
from tests.conftest import mixed_ids, tiny_lm_config, tiny_model
from tests.generation.test_generation import left_padded, prompt_that_ends_in
from tests.model.test_backbones import family_model
from transformers import CompileConfig, DynamicCache, LogitsProcessorList

from smoltolk.generation.sampling import ModalityLogitsProcessor

BACKBONES = ("llama", "gemma3_text, mixed", "gpt_neox", "granite", "mistral, window", "olmo3", "qwen2, window")
every_backbone = pytest.mark.parametrize("family", BACKBONES)
NEW = 12


def prompts(model, padded=True):
    """Three rows that end in text, in speech and in a switch, padded on the left with speech; with their mask."""
    ends = ("text", "speech", "switch")
    rows = [prompt_that_ends_in(end, model.ids, seed, (20, 13, 17)[seed]) for seed, end in enumerate(ends)]
    rows[2][0] = model.ids.speech_offset + 4  # padding of speech before a row that begins with speech
    if not padded:
        return [torch.tensor([row]) for row in rows]
    ids, mask = left_padded(rows)
    return ids.masked_fill(mask == 0, model.ids.speech_offset + 1), mask


def generate(model, ids, mask=None, **settings):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        **{
            "max_new_tokens": NEW,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
            "logits_processor": LogitsProcessorList([ModalityLogitsProcessor(model.ids)]),
            **settings,
        },
    )


def uncached(model, ids, **settings):
    """Each row alone, with a full forward at every step."""
    return torch.cat([generate(model, row, use_cache=False, **settings)[:, row.shape[1] :] for row in ids])


@every_backbone
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_greedy_decoding_of_a_padded_batch_equals_each_row_alone_without_a_cache(family, settings):
    model = family_model(family)
    ids, mask = prompts(model)
    with torch.no_grad():
        found = generate(model, ids, mask, disable_compile=True, **settings)[:, ids.shape[1] :]
    assert found.tolist() == uncached(model, prompts(model, padded=False)).tolist()
    assert (found[1] >= model.ids.speech_offset).all()
    assert (found[0] < model.ids.text_vocab_size).all()


@pytest.mark.parametrize("family", ["llama", "gemma3_text, mixed"])
def test_a_step_with_a_static_cache_compiles_as_one_graph_and_gives_the_same(family):
    model = family_model(family)
    ids, mask = prompts(model)
    config = CompileConfig(backend="eager", fullgraph=True, mode="default")
    config._compile_all_devices = True  # by default only accelerators compile
    compiled = generate(model, ids, mask, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, generate(model, ids, mask))


@every_backbone
def test_a_prompt_read_in_chunks_gives_the_same(family):
    model = family_model(family)
    ids, mask = prompts(model)
    assert torch.equal(generate(model, ids, mask, prefill_chunk_size=4), generate(model, ids, mask))


@every_backbone
def test_sampling_and_several_sequences_do_not_depend_on_the_cache(family):
    model = family_model(family)
    ids, mask = prompts(model)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        sampling = {"do_sample": True, "temperature": 5.0, "num_return_sequences": 3}
        found.append(generate(model, ids, mask, use_cache=use_cache, **sampling))
    assert torch.equal(*found)
    assert len(found[0]) == 9
    assert len({tuple(row) for row in found[0].tolist()}) == 9


@every_backbone
def test_beams_do_not_depend_on_the_cache(family):
    model = family_model(family)
    ids, mask = prompts(model)
    settings = {"num_beams": 3, "num_return_sequences": 2}
    cached = generate(model, ids, mask, **settings)
    assert torch.equal(cached, generate(model, ids, mask, use_cache=False, **settings))
    assert not torch.equal(cached[::2], generate(model, ids, mask))  # beams that differ from greedy


def test_beams_are_compared_by_probabilities_over_the_rows_own_block():
    model = tiny_model()
    ids, mask = prompts(model)
    found = generate(model, ids, mask, num_beams=3, output_scores=True, return_dict_in_generate=True)
    for row, score, prompt in zip(found.sequences, found.sequences_scores, prompts(model, padded=False), strict=True):
        new = row[ids.shape[1] :]
        whole = torch.cat([prompt[0], new])
        is_speech = bool(new[0] >= model.ids.speech_offset)
        block = slice(model.ids.speech_offset, None) if is_speech else slice(0, model.ids.text_vocab_size)
        with torch.no_grad():
            steps = model(whole[None]).logits[0, len(prompt[0]) - 1 : -1, block].log_softmax(-1)
        own = steps.gather(1, (new - (model.ids.speech_offset if is_speech else 0))[:, None]).mean()
        assert score.item() == pytest.approx(own.item(), abs=1e-4)


@every_backbone
def test_prompt_lookup_gives_the_greedy_answer(family):
    model = family_model(family)
    for row in prompts(model, padded=False):
        row = torch.cat([row[:, -9:], row, row], 1)  # something to look up; modalities may meet without a switch
        expected = generate(model, row, use_cache=False)
        assert torch.equal(generate(model, row, prompt_lookup_num_tokens=3), expected)


@every_backbone
def test_a_returned_cache_goes_on_in_the_next_turn(family):
    model = family_model(family)
    (ids, *_) = prompts(model, padded=False)
    first = generate(model, ids, return_dict_in_generate=True)
    turn = torch.tensor([[model.ids.switch_id, model.ids.speech_offset + 5, model.ids.speech_offset + 2]])
    ids = torch.cat([first.sequences, turn], 1)
    second = generate(model, ids, past_key_values=first.past_key_values)
    assert torch.equal(second, generate(model, ids, use_cache=False))


def test_decoding_across_switches_equals_the_full_forward():
    model = tiny_model()
    ids = mixed_ids(ids=model.ids, batch=2, seq=60)
    cache = DynamicCache()  # one that knows nothing of the model
    with torch.no_grad():
        full = model(ids).logits
        steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(60)]
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapters", [(0, 0), (0, 1), (1, 0)])
def test_a_static_cache_serves_models_without_an_adapter_too(adapters):
    model = tiny_model(num_input_adapter_layers=adapters[0], num_output_adapter_layers=adapters[1])
    ids, mask = prompts(model)
    static = generate(model, ids, mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generate(model, ids, mask))


def test_a_cache_of_another_model_is_refused():
    small, large = tiny_model(), tiny_model(lm_config=tiny_lm_config(num_hidden_layers=5))
    ids = mixed_ids(ids=small.ids)
    cache = small(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values has 8 layers and comes from another model"):
        large(ids[:, :1], past_key_values=cache)
    bare = small.lm(ids.clamp(max=9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values has 3 layers and comes from another model"):
        small(ids[:, :1], past_key_values=bare)


def test_continuous_batching_is_refused(model):
    with pytest.raises(NotImplementedError, match="use generate with rows padded on the left"):
        model.generate_batch([[1, 2, 3]])


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"max_new_tokens": 1}])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 1, 1, 0], "ends in 0: pad prompts on the left"),
        ([1, 0, 1, 1], "a hole in row 1"),
        ([0, 0, 0, 0], "ends in 0: pad prompts on the left"),
    ],
)
def test_prompts_are_checked_whatever_the_cache(model, settings, mask, message):
    ids = torch.tensor([[5, 6, 7, 8]] * 2)
    with pytest.raises(ValueError, match=message):
        generate(model, ids, torch.tensor([[1] * 4, mask]), **settings)


def test_an_empty_prompt_is_refused(model):
    nothing = torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(nothing)
    with pytest.raises(ValueError, match="input_ids are empty"):
        model(nothing)


def test_generation_ends_at_the_end_of_either_modality_by_itself(model):
    ends = [model.ids.end_of_text_id, model.ids.end_of_speech_id]
    assert model.generation_config.eos_token_id == ends
    prompt = torch.tensor([prompt_that_ends_in("speech", model.ids)])
    rows = []
    for seed in range(40):
        torch.manual_seed(seed)
        rows.append(model.generate(prompt, do_sample=True, temperature=5.0, max_new_tokens=60, pad_token_id=0)[0])
    assert any(row[-1] == model.ids.end_of_speech_id for row in rows)
    for row in rows:
        assert not torch.isin(row[len(prompt[0]) : -1], torch.tensor(ends)).any()
