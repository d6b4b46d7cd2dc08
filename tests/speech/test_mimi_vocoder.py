from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MimiConfig, MimiModel
from transformers.models.mimi import modeling_mimi

from smoltolk.speech.kinds import load_vocoder
from smoltolk.speech.mel import MelSettings, MelTokenizer
from smoltolk.speech.mimi_vocoder import MimiVocoder

HOP_SAMPLES = 96

pytestmark = pytest.mark.skipif(
    not hasattr(modeling_mimi, "MimiDecoderModel"), reason="needs the Mimi of transformers 5.21.1"
)


def tiny_mimi(**changes: Any) -> MimiModel:
    """A Mimi of the real shape at 1200 Hz, whose transformer sees no further than five frames."""
    settings: dict[str, Any] = {
        "sampling_rate": 1200,
        "hidden_size": 32,
        "num_filters": 4,
        "upsampling_ratios": [4, 3, 2, 2],
        "codebook_size": 16,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 3,
        "upsample_groups": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "sliding_window": 10,
        "layer_scale_initial_scale": 1.0,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**(settings | changes))).eval()
    with torch.no_grad():
        model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook.embed_sum.normal_()
        for parameter in model.decoder.decoder_seanet.parameters():
            parameter *= 0.5  # so that the waveform stays within −1 … 1
    return model


@pytest.fixture(scope="module")
def model() -> MimiModel:
    return tiny_mimi()


@pytest.fixture(scope="module")
def vocoder(model: MimiModel) -> MimiVocoder:
    return MimiVocoder(model, "tokenizer-0")


def some_units(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(16, size=count)


def test_the_waveform_is_that_of_mimi(vocoder: MimiVocoder, model: MimiModel) -> None:
    units, durations = some_units(30), np.arange(30) % 3 + 1
    frames = np.repeat(units, durations)
    with torch.inference_mode():
        expected = model.decode(torch.from_numpy(frames)[None, None]).audio_values[0, 0].numpy()
    audio = vocoder.decode(units, durations)
    np.testing.assert_allclose(audio, expected, atol=1e-6)
    assert 0.1 < np.abs(expected).max() <= 1
    assert audio.dtype == np.float32
    assert len(audio) == HOP_SAMPLES * len(frames)
    np.testing.assert_array_equal(vocoder.decode(frames), audio)  # by default, a frame each
    assert (vocoder.num_units, vocoder.sample_rate_hz, vocoder.tokenizer_fingerprint) == (16, 1200, "tokenizer-0")


def test_the_units_decide_the_waveform(vocoder: MimiVocoder) -> None:
    units = some_units(30)
    changed = units.copy()
    changed[20] = (changed[20] + 1) % 16
    difference = np.abs(vocoder.decode(units) - vocoder.decode(changed))
    assert difference[: 20 * HOP_SAMPLES].max() < 1e-6
    assert difference[20 * HOP_SAMPLES :].max() > 1e-3


@pytest.mark.parametrize("chunk_units", [1, 7, 24, 1000])
def test_a_stream_says_the_same_and_waits_for_nothing(vocoder: MimiVocoder, chunk_units: int) -> None:
    units = some_units(60)  # longer than the transformer's window
    heard: list[int] = []

    def come() -> Iterator[int]:
        for unit in units:
            heard.append(int(unit))
            yield int(unit)

    pieces, spoken = [], []
    for some, piece in vocoder.decode_stream(come(), chunk_units=chunk_units):
        spoken += some.tolist()
        assert len(heard) == len(spoken)
        assert len(piece) == HOP_SAMPLES * len(some)
        pieces.append(piece)
    assert heard == spoken == units.tolist()
    np.testing.assert_allclose(np.concatenate(pieces), vocoder.decode(units), atol=2e-6)


def test_long_speech_is_decoded_in_blocks_without_seams(vocoder: MimiVocoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = vocoder.decode(some_units(60))
    monkeypatch.setattr("smoltolk.speech.mimi_vocoder._BLOCK_FRAMES", 9)
    np.testing.assert_allclose(vocoder.decode(some_units(60)), whole, atol=2e-6)


def test_a_model_in_a_folder_becomes_a_vocoder_that_is_saved_without_its_encoder(
    model: MimiModel, vocoder: MimiVocoder, audios: list[np.ndarray], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    settings = MelSettings(hop_samples=1280)  # 12.5 Hz
    tokenizer = MelTokenizer.fit(audios, num_units=16, settings=settings)
    made = MimiVocoder.from_pretrained(tmp_path / "model", tokenizer)
    made.save(tmp_path / "vocoder")
    loaded = load_vocoder(tmp_path / "vocoder", tokenizer)
    assert isinstance(loaded, MimiVocoder)
    assert loaded.tokenizer_fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.decode(some_units(9)), vocoder.decode(some_units(9)))
    weights = "model/model.safetensors"
    assert (tmp_path / "vocoder" / weights).stat().st_size < 0.6 * (tmp_path / weights).stat().st_size

    other = MelTokenizer.fit(audios, num_units=12, settings=settings)
    with pytest.raises(ValueError, match=r"16 units at 12.5 Hz, but the tokenizer has 12 at 12.5 Hz"):
        MimiVocoder.from_pretrained(tmp_path / "model", other)


@pytest.mark.parametrize("file", ["vocoder.json", "model/config.json", "model/model.safetensors"])
def test_a_damaged_folder_is_refused(vocoder: MimiVocoder, tmp_path: Path, file: str) -> None:
    vocoder.save(tmp_path)
    (tmp_path / file).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a whole vocoder"):
        load_vocoder(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match="not a whole vocoder"):
        load_vocoder(tmp_path)


def test_a_folder_that_lacks_weights_is_refused(vocoder: MimiVocoder, model: MimiModel, tmp_path: Path) -> None:
    vocoder.save(tmp_path)
    weights = {k: v for k, v in model.state_dict().items() if "decoder_seanet.layers.0" not in k}
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks decoder\S*decoder_seanet.layers.0"):
        load_vocoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"decoder_config": None}, "no decoder"), ({"use_causal_conv": False}, "use_causal_conv False")],
)
def test_models_that_cannot_stream_are_refused(changes: dict[str, Any], message: str) -> None:
    config = tiny_mimi().config.to_dict() | changes
    with pytest.raises(ValueError, match=message):
        MimiVocoder(MimiModel(MimiConfig(**config)), "tokenizer-0")


def test_units_that_cannot_be_decoded_are_refused(vocoder: MimiVocoder) -> None:
    for units, message in (([], "units is empty"), ([3, 16], "knows 0 to 15")):
        with pytest.raises(ValueError, match=message):
            vocoder.decode(np.array(units, dtype=np.int64))
    with pytest.raises(ValueError, match="durations"):
        vocoder.decode(some_units(3), np.array([1, 0, 1]))
    with pytest.raises(ValueError, match="knows 0 to 15"):
        list(vocoder.decode_stream([3, 16]))
    with pytest.raises(ValueError, match="chunk_units is 0"):
        next(vocoder.decode_stream([1], chunk_units=0))
    assert list(vocoder.decode_stream([])) == []
