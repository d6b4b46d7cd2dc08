"""Every supported family of backbones, on tiny random configurations."""

import pytest
import torch
from tests.conftest import TEXT_VOCAB, mixed_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from smoltolk import SmolTolkForCausalLM
from smoltolk.model.modeling_smoltolk import SUPPORTED_BACKBONES

SIZES = {
    "vocab_size": TEXT_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8}
FAMILIES = {
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0, **WINDOW}),
    "gemma3_text": ("gemma3_text", {"head_dim": 8, **WINDOW}),
    "gemma3_text, mixed": (
        "gemma3_text",
        {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOW},
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", WINDOW),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOW),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", WINDOW),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, **WINDOW}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "smollm3": ("smollm3", {}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def family_config(family, **settings):
    model_type, own = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(SIZES | own | settings))
    if "window" in family and hasattr(config, "layer_types") and config.layer_types:
        assert "sliding_attention" in config.layer_types
    return config


def family_model(family, attention="eager", **settings):
    model = tiny_model(lm_config=family_config(family), **settings)
    if attention == "sdpa" and not model.lm._supports_sdpa:
        pytest.skip(f"{family} has no SDPA")
    model.set_attn_implementation(attention)
    return model


def test_every_supported_family_is_tested():
    assert {model_type for model_type, _ in FAMILIES.values()} == set(SUPPORTED_BACKBONES)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_logits_are_the_bare_models(family, attention):
    model = family_model(family, attention)
    ids = torch.randint(0, TEXT_VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :TEXT_VOCAB], model.lm(ids).logits, atol=1e-5, rtol=0)


@every_family
def test_the_text_loss_is_the_bare_models(family):
    model = family_model(family)
    ids = torch.randint(0, TEXT_VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    ours, bare = model(ids, labels=ids).loss, model.lm(ids, labels=ids).loss
    torch.testing.assert_close(ours, bare, atol=1e-5, rtol=0)
    weight = model.lm.get_input_embeddings().weight
    (ours,), (bare,) = torch.autograd.grad(ours, weight), torch.autograd.grad(bare, weight)
    torch.testing.assert_close(ours, bare, atol=1e-5, rtol=1e-4)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_decoding_equals_the_full_forward(family, attention):
    model = family_model(family, attention)
    ids = mixed_ids(ids=model.ids, batch=3)
    with torch.no_grad():
        full = model(ids).logits
        cache, logits = None, []
        for chunk in ids.split([11, 5, *[1] * 24], dim=1):
            step = model(chunk, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), full, atol=1e-4, rtol=1e-4)


@every_family
def test_saving_and_loading_gives_the_same_model(family, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path)
    loaded = SmolTolkForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    old, new = model.config.lm_config.to_dict(), loaded.config.lm_config.to_dict()
    assert new | {"dtype": None} == old | {"dtype": None}
    ids = mixed_ids(ids=model.ids)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@every_family
def test_a_pretrained_model_gets_adapters_of_its_own_layer_with_its_own_beginning(family, tmp_path):
    lm = AutoModelForCausalLM.from_config(family_config(family))
    lm.save_pretrained(tmp_path)
    model = SmolTolkForCausalLM.from_backbone(str(tmp_path), num_units=20)
    fresh = dict(model.lm.base_model.layers[0].named_parameters())
    for adapter in (model.input_adapter, model.output_adapter):
        for layer in adapter.layers:
            assert type(layer) is type(model.lm.base_model.layers[0])
            for name, parameter in layer.named_parameters():
                if parameter.ndim == 1:  # norms and biases begin as the family's do
                    assert torch.equal(parameter, fresh[name]), name
                else:
                    assert 0.1 < parameter.std() < 0.3, name


@every_family
def test_a_later_token_changes_nothing_and_gradients_reach_every_parameter(family):
    model = family_model(family)
    ids = mixed_ids(ids=model.ids)
    other = ids.clone()
    other[:, 20:] = mixed_ids(seed=1, ids=model.ids)[:, 20:]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :20], model(other).logits[:, :20])
    model.train()(ids, labels=ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_long_text_does_not_stretch_the_rotary_positions_of_short_speech():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.5]}
    config = AutoConfig.for_model("phi3", **SIZES, original_max_position_embeddings=16, rope_scaling=rope)
    model = tiny_model(lm_config=config)
    ids = torch.tensor(
        [[*range(1, 41), model.ids.switch_id, *range(model.ids.speech_offset, model.ids.speech_offset + 9)]]
    )
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=True).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
