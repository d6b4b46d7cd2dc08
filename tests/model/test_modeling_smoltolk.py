"""What the architecture promises."""

import pytest
import torch
from tests.conftest import EARLY_FUSION, NUM_UNITS, TEXT_VOCAB, mixed_ids, tiny_lm_config, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, T5Config

from smoltolk import SmolTolkConfig, SmolTolkForCausalLM
from smoltolk.model.configuration_smoltolk import IdSpace

ABLATIONS = {
    "smoltolk": {},
    "early fusion": EARLY_FUSION,
    "no input adapter": {"num_input_adapter_layers": 0},
    "no output adapter": {"num_output_adapter_layers": 0},
    "last level": {"layer_mixing": "last"},
    "static mix": {"layer_mixing": "static"},
    "selector on the last level": {"selector_input": "last"},
    "selector on layer 1": {"selector_input": 1},
    "selector with a hidden layer": {"selector_hidden_size": 16},
    "selector on all levels": {"selector_input": "levels", "selector_level_size": 8, "selector_level_hidden_size": 16},
    "no residual": {"speech_residual": False},
    "untied units": {"tie_speech_embeddings": False},
    "output norm": {"output_adapter_norm": True},
    "entropy": {"selector_entropy_weight": 0.01},
}
every_ablation = pytest.mark.parametrize("settings", ABLATIONS.values(), ids=ABLATIONS.keys())


@every_ablation
def test_text_logits_are_the_bare_backbones(settings):
    model = tiny_model(**settings)
    ids = torch.randint(0, TEXT_VOCAB, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :TEXT_VOCAB], model.lm(ids).logits, atol=1e-5, rtol=0)


@every_ablation
@pytest.mark.parametrize("kind", ["mixed", "text", "speech"])
def test_gradients_reach_every_parameter_whatever_the_batch_holds(settings, kind):
    model = tiny_model(**settings).train()
    ids = mixed_ids(ids=model.ids)
    if kind == "text":
        ids = ids.clamp(max=TEXT_VOCAB - 1)
    if kind == "speech":
        ids = ids.clamp(min=model.ids.speech_offset)
    model(ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    if kind == "mixed":
        assert [name for name, p in model.named_parameters() if not p.grad.abs().sum()] == []


@every_ablation
def test_later_tokens_change_nothing_before_them(settings):
    model = tiny_model(**settings)
    ids = mixed_ids(ids=model.ids)
    other = ids.clone()
    other[:, 20:] = mixed_ids(seed=1, ids=model.ids)[:, 20:]
    with torch.no_grad():
        a, b = model(ids), model(other)
    torch.testing.assert_close(a.logits[:, :20], b.logits[:, :20])
    torch.testing.assert_close(a.layer_weights[:, :20], b.layer_weights[:, :20])
    assert not torch.allclose(a.logits[:, 20:], b.logits[:, 20:])


def test_a_segment_ignores_text_and_every_other_segment(model):
    switch, unit = model.ids.switch_id, model.ids.speech_offset
    segment = [unit + i for i in (3, 1, 4, 1, 5)]
    first = torch.tensor([[7, 8, switch, *segment, switch, 9]])
    second = torch.tensor([[unit + 2, switch, 1, switch, *segment]])
    with torch.no_grad():
        a = model(first, output_hidden_states=True).hidden_states[0][0, 3:8]
        b = model(second, output_hidden_states=True).hidden_states[0][0, 4:9]
        raw = model._embed(first)[0, 3:8]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a, raw)


def test_text_and_control_embeddings_bypass_the_input_adapter(model):
    ids = mixed_ids(ids=model.ids)
    with torch.no_grad():
        fused = model(ids, output_hidden_states=True).hidden_states[0]
        embeds = model._embed(ids)
    not_speech = ids < model.ids.speech_offset
    assert torch.equal(fused[not_speech], embeds[not_speech])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_padding_or_neighbours(side, attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    ids = mixed_ids(ids=model.ids, batch=1, seq=25)
    pad = torch.full((1, 9), model.ids.speech_offset + 1)  # speech ids: only the mask tells they are padding
    row = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = torch.ones_like(row)
    real = slice(9, None) if side == "left" else slice(0, 25)
    mask[0, :9] = 0 if side == "left" else 1
    if side == "right":
        mask[0, 25:] = 0
    batch = torch.cat([row, mixed_ids(seed=5, ids=model.ids, batch=1, seq=34)])
    mask = torch.cat([mask, torch.ones_like(mask)])
    with torch.no_grad():
        alone, padded = model(ids), model(batch, attention_mask=mask)
    torch.testing.assert_close(padded.logits[:1, real], alone.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.layer_weights[:1, real], alone.layer_weights, atol=1e-5, rtol=1e-4)


@every_ablation
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_decoding_equals_the_full_forward_in_chunks_and_steps(settings, attention):
    model = tiny_model(**settings)
    model.set_attn_implementation(attention)
    ids = mixed_ids(ids=model.ids, batch=3)
    with torch.no_grad():
        full = model(ids)
        cache, logits, weights = None, [], []
        for chunk in ids.split([11, 5, *[1] * 24], dim=1):
            step = model(chunk, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            logits.append(step.logits)
            weights.append(step.layer_weights)
    torch.testing.assert_close(torch.cat(logits, 1), full.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(weights, 1), full.layer_weights, atol=1e-5, rtol=1e-4)


def test_cached_decoding_of_left_padded_rows_equals_each_row_alone(model):
    rows = [mixed_ids(seed=s, ids=model.ids, batch=1, seq=n) for s, n in enumerate((30, 22, 13))]
    ids = torch.zeros(3, 30, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 30 - row.shape[1] :], mask[i, 30 - row.shape[1] :] = row[0], 1
    with torch.no_grad():
        step = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
        logits = [step.logits]
        for t in range(20, 30):
            step = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=step.past_key_values)
            logits.append(step.logits)
        logits = torch.cat(logits, 1)
        for i, row in enumerate(rows):
            alone = model(row).logits[0]
            torch.testing.assert_close(logits[i, 30 - row.shape[1] :], alone, atol=1e-4, rtol=1e-4)


def test_the_loss_is_cross_entropy_over_the_labels_own_block(model):
    ids = mixed_ids(ids=model.ids)
    with torch.no_grad():
        output = model(ids, labels=ids, return_logits=True)
    sums, counts = {"text": 0.0, "speech": 0.0}, {"text": 0, "speech": 0}
    for row, logits in zip(ids.tolist(), output.logits, strict=True):
        for label, score in zip(row[1:], logits, strict=False):
            if label >= model.ids.speech_offset:
                modality, block, index = (
                    "speech",
                    score[model.ids.speech_offset :],
                    label - model.ids.speech_offset,
                )
            elif label < TEXT_VOCAB:
                modality, block, index = "text", score[:TEXT_VOCAB], label
            else:
                continue  # the switch is never predicted
            sums[modality] -= block.log_softmax(0)[index].item()
            counts[modality] += 1
    assert output.text_loss.item() == pytest.approx(sums["text"] / counts["text"], abs=1e-5)
    assert output.speech_loss.item() == pytest.approx(sums["speech"] / counts["speech"], abs=1e-5)
    assert output.loss.item() == pytest.approx(sum(sums.values()) / sum(counts.values()), abs=1e-5)
    assert torch.isneginf(output.logits[..., TEXT_VOCAB : model.ids.speech_offset]).all()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_micro_batches_add_up_to_the_loss_of_the_whole(weight):
    model = tiny_model(selector_entropy_weight=weight)
    ids = mixed_ids(ids=model.ids, batch=4)
    labels = ids.clone()
    labels[0, 5:] = -100  # unequal numbers of labels
    num_labels = int(((labels[:, 1:] >= 0) & (labels[:, 1:] != model.ids.switch_id)).sum())
    with torch.no_grad():
        whole = model(ids, labels=labels)
        parts = [
            model(i, labels=y, num_items_in_batch=num_labels).loss
            for i, y in zip(ids.split(1), labels.split(1), strict=True)
        ]
        expected = whole.loss
        if weight:  # the entropy is a mean over positions, weighted by each part's share of labels
            plain = tiny_model()
            plain.load_state_dict(model.state_dict())
            expected = plain(ids, labels=labels).loss
            for i, y in zip(ids.split(1), labels.split(1), strict=True):
                num_text, num_units = model.count_labels(i, y)
                w = model(i).layer_weights
                entropy = -(w * w.log()).sum(-1).mean() * (num_units > 0)
                expected -= weight * (num_text + num_units) / num_labels * entropy
        torch.testing.assert_close(sum(parts), expected)


def test_saving_and_loading_gives_the_same_model(tmp_path):
    model = tiny_model(tie_speech_embeddings=False, selector_input=1)
    model.save_pretrained(tmp_path)
    ids = mixed_ids(ids=model.ids)
    for loaded in (
        SmolTolkForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert loaded.config.ids == model.config.ids
        assert loaded.config.selector_input == 1
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_a_pretrained_backbone_keeps_its_weights(tmp_path):
    backbone = AutoModelForCausalLM.from_config(tiny_lm_config(tie_word_embeddings=False))
    backbone.save_pretrained(tmp_path)
    model = SmolTolkForCausalLM.from_backbone(str(tmp_path), num_units=NUM_UNITS).eval()
    ids = torch.randint(0, TEXT_VOCAB, (2, 12))
    with torch.no_grad():
        assert torch.equal(model.lm(ids).logits, backbone.eval()(ids).logits)


def test_each_parameter_belongs_to_speech_or_to_text(model):
    speech = {name for name, _ in model.speech_parameters()}
    text = {name for name, _ in model.text_parameters()}
    assert speech | text == {name for name, _ in model.named_parameters()}
    assert not speech & text
    assert "control_embeddings.weight" in speech


@pytest.mark.parametrize("config", [GPT2Config(), T5Config()], ids=["gpt2", "t5"])
def test_a_backbone_that_is_not_llama_like_is_refused(config):
    with pytest.raises(ValueError, match=rf"{config.model_type}.*decoder-only.*llama"):
        SmolTolkForCausalLM(SmolTolkConfig(lm_config=config))


@pytest.mark.parametrize("bad", [-1, TEXT_VOCAB + 3 + NUM_UNITS + 1])
def test_ids_out_of_range_are_refused(model, bad):
    with pytest.raises(ValueError, match=r"input_ids hold .* id space"):
        model(torch.tensor([[1, 2, bad]]))


def test_a_sequence_longer_than_the_backbones_positions_is_refused(model):
    with pytest.raises(ValueError, match=r"257 tokens, more than .*max_position_embeddings of 256"):
        model(torch.zeros(1, 257, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"num_units": 0}, "num_units is 0"),
        ({"num_input_adapter_layers": -1}, "num_input_adapter_layers is -1"),
        ({"layer_mixing": "first"}, "layer_mixing is 'first'"),
        ({"selector_input": 3}, "selector_input is 3"),
        ({"selector_input": "first"}, "selector_input is 'first'"),
        ({"selector_hidden_size": 0}, "selector_hidden_size is 0"),
        ({"selector_hidden_size": 8, "layer_mixing": "last"}, "selector_hidden_size is 8 and layer_mixing is 'last'"),
        ({"selector_input": "levels"}, "selector_input is 'levels' and selector_level_size is None"),
        ({"selector_level_size": 4}, "selector_input is 'static' and selector_level_size is 4"),
        ({"selector_level_hidden_size": 4}, "selector_level_hidden_size is 4 without"),
        ({"layer_mixing": "last", "selector_entropy_weight": 0.1}, "selector_entropy_weight is 0.1"),
        ({"selector_entropy_weight": -0.1}, "selector_entropy_weight is -0.1"),
        (
            {"layer_mixing": "static", "selector_input": "last"},
            "selector_input is 'last', but layer_mixing is 'static'",
        ),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, field):
    with pytest.raises(ValueError, match=field):
        SmolTolkConfig(lm_config=tiny_lm_config(), **settings)


def test_an_end_of_text_outside_of_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="end_of_text_id is 10"):
        IdSpace(text_vocab_size=10, num_units=5, end_of_text_id=10)


def test_a_backbone_without_an_end_of_text_is_refused():
    with pytest.raises(ValueError, match="lm_config has no eos_token_id"):
        SmolTolkConfig(lm_config=tiny_lm_config(eos_token_id=None))
