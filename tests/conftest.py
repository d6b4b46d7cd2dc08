"""Tiny random models and data that the tests, and the benchmarks of long runs, share."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smoltolk import SmolTolkConfig, SmolTolkForCausalLM
from smoltolk.data.store import write_store
from smoltolk.data.text import encode_words, tokenizer_fingerprint
from smoltolk.data.utterance import Utterance

torch.set_num_threads(1)  # for models this tiny, more threads only wait for each other

TEXT_VOCAB, NUM_UNITS = 50, 20
EARLY_FUSION = {
    "num_input_adapter_layers": 0,
    "num_output_adapter_layers": 0,
    "layer_mixing": "last",
    "speech_residual": False,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """What is no folder is not looked for on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


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


def tiny_text_tokenizer():
    """A word-level tokenizer with the vocabulary size of the tiny backbone."""
    words = ["<end>", "<unk>", *(f"w{i}" for i in range(TEXT_VOCAB - 2))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")  # noqa: S106


SPEECH_CARD = {
    "kind": "mel",
    "fingerprint": "speech-0",
    "unit_rate_hz": 100.0,
    "num_units": NUM_UNITS,
    "sample_rate_hz": 22050,
}


def tiny_utterances(tokenizer, count=12, seed=0):
    """Random utterances with both halves, three of four for training."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        text = " ".join(f"w{w}" for w in rng.integers(TEXT_VOCAB - 2, size=rng.integers(6, 12)))
        text_ids, counts = encode_words(tokenizer, text)
        units = rng.integers(NUM_UNITS, size=4 * len(counts))
        units[1:][units[1:] == units[:-1]] = NUM_UNITS - 1
        units = units[np.append(True, units[1:] != units[:-1])]
        durations = rng.integers(1, 6, size=len(units))
        seconds = durations.sum() / SPEECH_CARD["unit_rate_hz"]
        yield Utterance(
            id=f"u{i}",
            text=text,
            text_ids=text_ids,
            units=units,
            unit_durations=durations,
            word_ends_s=np.linspace(0, seconds, len(counts) + 1)[1:].astype(np.float32),
            word_token_counts=counts,
            seconds=seconds,
            speaker=None,
            source=None,
            split="validation" if i % 4 == 3 else "train",
        )


def make_tiny_world(folder):
    """Makes a backbone and a store in a folder, as training needs them."""
    tokenizer = tiny_text_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_lm_config()).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    write_store(
        folder / "store",
        tiny_utterances(tokenizer),
        text_tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        speech_tokenizer=SPEECH_CARD,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    return make_tiny_world(tmp_path_factory.mktemp("tiny-world"))


def tiny_recipe(tiny_world, output, **changes):
    """Settings of a two-stage run of a few steps."""
    store = [{"store": str(tiny_world / "store")}]
    rows = {"rows_per_step": 4, "rows_per_micro_batch": 2, "row_tokens": 32, "warmup_steps": 1}
    settings = {
        "name": "tiny",
        "output": str(output),
        "model": {"backbone": str(tiny_world / "backbone"), "num_input_adapter_layers": 1},
        "data": {
            "interleaved": store,
            "speech": store,
            "text": store,
            "text_words": [2, 4],
            "speech_words": [2, 4],
        },
        "stages": [
            {"train": "speech", "steps": 4, "mixture": {"interleaved": 1}, "learning_rate": 1e-2, **rows},
            {
                "train": "everything",
                "steps": 5,
                "mixture": {"interleaved": 1, "speech": 1, "text": 1},
                "learning_rate": 1e-3,
                "decay_steps": 2,
                **rows,
            },
        ],
        "validation": {"rows": 4, "every_steps": 3},
        "checkpoint": {"every_steps": 2},
        "precision": "fp32",
        "num_threads": 1,
    }
    return settings | changes
