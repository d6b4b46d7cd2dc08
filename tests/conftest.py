"""Tiny random models that the tests share."""

import pytest
import torch
from transformers import LlamaConfig

from smoltolk import SmolTolkConfig, SmolTolkForCausalLM

torch.set_num_threads(1)  # for models this tiny, more threads only wait for each other

TEXT_VOCAB, NUM_UNITS = 50, 20
EARLY_FUSION = {
    "num_input_adapter_layers": 0,
    "num_output_adapter_layers": 0,
    "layer_mixing": "last",
    "speech_residual": False,
}


def tiny_lm_config(**settings):
    defaults = {
        "vocab_size": TEXT_VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**(defaults | settings))


def tiny_model(seed=0, lm_config=None, **settings):
    torch.manual_seed(seed)
    config = SmolTolkConfig(lm_config=lm_config or tiny_lm_config(), num_units=NUM_UNITS, **settings)
    return SmolTolkForCausalLM(config).eval()


def mixed_ids(seed=0, batch=2, seq=40, ids=None):
    """Random rows of text and speech runs with a switch at each change of modality."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for _ in range(batch):
        row, is_speech = [], bool(draw(0, 2))
        while len(row) < seq:
            low, high = (ids.speech_offset, ids.vocab_size) if is_speech else (0, ids.text_vocab_size)
            row += [draw(low, high) for _ in range(draw(2, 9))] + [ids.switch_id]
            is_speech = not is_speech
        rows.append(row[:seq])
    return torch.tensor(rows)


@pytest.fixture
def model():
    return tiny_model()
