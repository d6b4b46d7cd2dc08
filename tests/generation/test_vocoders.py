"""Vocoders of every kind in the folder of a model: streaming, export."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import tiny_lm_config, tiny_text_tokenizer
from tests.speech.conftest import syllables
from tests.speech.test_hifigan import Files
from tests.speech.test_mimi_vocoder import tiny_mimi

from smoltolk import SmolTolkConfig, SmolTolkForCausalLM, SmolTolkPipeline, export_model
from smoltolk.speech.mel import MelTokenizer
from smoltolk.speech.mimi_vocoder import MimiVocoder


@pytest.fixture(params=["hifigan", "mimi"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with its tokenizers and a vocoder."""
    folder = tmp_path / "model"
    tokenizer = MelTokenizer.fit([syllables(0)], num_units=12)
    torch.manual_seed(0)
    config = SmolTolkConfig(lm_config=tiny_lm_config(), num_units=12, speech_tokenizer=tokenizer.card())
    SmolTolkForCausalLM(config).save_pretrained(folder)
    tiny_text_tokenizer().save_pretrained(folder)
    tokenizer.save(folder / "speech_tokenizer")
    if request.param == "hifigan":
        vocoder = Files(tmp_path).imported(tokenizer)
    else:
        vocoder = MimiVocoder(tiny_mimi(), tokenizer.fingerprint)
    vocoder.save(folder / "vocoder")
    return folder


def test_a_stream_of_speech_adds_up_to_what_a_call_gives_also_after_export(folder: Path, tmp_path: Path) -> None:
    pipeline = SmolTolkPipeline.from_pretrained(folder)
    settings = {"to": "speech", "seed": 3, "max_new_tokens": 40, "min_new_tokens": 40}
    whole = pipeline("w1", **settings)
    pieces = list(pipeline.stream("w1", chunk_units=9, **settings))
    assert len(pieces) > 2
    assert {piece.sample_rate_hz for piece in pieces} == {whole.sample_rate_hz} == {pipeline.vocoder.sample_rate_hz}
    assert np.array_equal(np.concatenate([piece.units for piece in pieces]), whole.units)
    np.testing.assert_allclose(np.concatenate([piece.audio for piece in pieces]), whole.audio, atol=1e-5)

    export_model(folder, tmp_path / "shared")
    again = SmolTolkPipeline.from_pretrained(tmp_path / "shared")("w1", **settings)
    np.testing.assert_array_equal(again.audio, whole.audio)
    assert ".wav" in (tmp_path / "shared" / "README.md").read_text()
