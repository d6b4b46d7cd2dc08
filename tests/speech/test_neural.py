"""What neural tokenizers share."""

import numpy as np
import pytest
from tests.speech.models import noise, tiny_hubert_tokenizer, tiny_mimi_tokenizer
from transformers.models.mimi import modeling_mimi

from smoltolk.speech.kinds import load_speech_tokenizer
from smoltolk.speech.mel import MelTokenizer

MAKERS = [tiny_hubert_tokenizer]
if hasattr(modeling_mimi, "MimiDecoderModel"):
    MAKERS.append(tiny_mimi_tokenizer)


@pytest.mark.parametrize("make", MAKERS)
def test_a_tokenizer_computes_in_another_precision_and_back(make):
    tokenizer = make()
    audio = noise(1.0, tokenizer.sample_rate_hz, 0)
    expected, fingerprint = tokenizer.encode(audio).frames(), tokenizer.fingerprint
    assert tokenizer.to("cpu", "bfloat16") is tokenizer
    assert str(tokenizer.dtype) == "torch.bfloat16"
    assert len(tokenizer.encode(audio).frames()) == len(expected)
    np.testing.assert_array_equal(tokenizer.to("cpu").encode(audio).frames(), expected)
    assert tokenizer.fingerprint == fingerprint
    with pytest.raises(ValueError, match="device is 'nowhere'"):
        tokenizer.to("nowhere")


def test_a_model_folder_is_replaced_only_where_it_is_a_tokenizers(tmp_path):
    tokenizer = tiny_hubert_tokenizer()
    (tmp_path / "project" / "model").mkdir(parents=True)
    (tmp_path / "project" / "model" / "weights").write_text("mine")
    for card in (None, '{"version": "1.0"}'):  # the second is what the tokenizers library writes under this name
        if card is not None:
            (tmp_path / "project" / "tokenizer.json").write_text(card)
        with pytest.raises(ValueError, match="project/model is there, and not part of a speech tokenizer: choose"):
            tokenizer.save(tmp_path / "project")
    assert (tmp_path / "project" / "model" / "weights").read_text() == "mine"
    assert (tmp_path / "project" / "tokenizer.json").read_text() == '{"version": "1.0"}'

    tokenizer.save(tmp_path / "tokenizer")
    tokenizer.save(tmp_path / "tokenizer")
    assert load_speech_tokenizer(tmp_path / "tokenizer").fingerprint == tokenizer.fingerprint


def test_a_tokenizer_without_a_network_says_that_a_device_has_no_effect():
    tokenizer = MelTokenizer.fit([noise(1.0, 16_000, seed) for seed in range(2)], num_units=3)
    with pytest.warns(UserWarning, match="'mel' tokenizer has no network: device cuda and dtype float32 have no"):
        assert tokenizer.to("cuda") is tokenizer
