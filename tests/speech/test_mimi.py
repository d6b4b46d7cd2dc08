import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from tests.speech.models import noise, tiny_hubert, tiny_mimi, tiny_mimi_tokenizer
from transformers import MimiModel
from transformers.models.mimi import modeling_mimi

from smoltolk.speech.kinds import load_speech_tokenizer
from smoltolk.speech.mimi import MimiSettings, MimiTokenizer

RATE_HZ = 24_000

pytestmark = pytest.mark.skipif(
    not hasattr(modeling_mimi, "MimiDecoderModel"), reason="needs the Mimi of transformers 5.21.1"
)


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    return noise(seconds, RATE_HZ, seed)


@pytest.fixture(scope="module")
def tokenizer() -> MimiTokenizer:
    return tiny_mimi_tokenizer()


def codes(model: MimiModel, audio: np.ndarray) -> np.ndarray:
    """First codebook of transformers' own encoder."""
    with torch.no_grad():
        return model.encode(torch.from_numpy(audio)[None, None], num_quantizers=1).audio_codes[0, 0].numpy()


@pytest.mark.parametrize("num_frames", [1, 2, 37, 55])
def test_a_short_file_has_the_first_codebook_of_transformers(tokenizer: MimiTokenizer, num_frames: int) -> None:
    audio = sound(5)[: num_frames * 1920]
    np.testing.assert_array_equal(tokenizer.encode(audio).frames(), codes(tokenizer.model, audio))


@pytest.mark.parametrize("num_samples", [1, 1919, 1921, 50_000])
def test_a_rest_is_filled_up_with_silence_to_a_whole_frame(tokenizer: MimiTokenizer, num_samples: int) -> None:
    audio = sound(3)[:num_samples]
    filled = np.append(audio, np.zeros(-num_samples % 1920, np.float32))
    frames = tokenizer.encode(audio).frames()
    np.testing.assert_array_equal(frames, codes(tokenizer.model, filled))
    assert len(frames) == -(-num_samples // 1920)


def test_the_card_tells_what_others_need(tokenizer: MimiTokenizer) -> None:
    assert tokenizer.card() == {
        "kind": "mimi",
        "fingerprint": tokenizer.fingerprint,
        "unit_rate_hz": 12.5,
        "num_units": 32,
        "sample_rate_hz": RATE_HZ,
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_units_of_a_file_do_not_depend_on_its_batch_or_on_its_neighbours(batch_size: int) -> None:
    tokenizer = tiny_mimi_tokenizer(batch_size=batch_size)
    audios = [sound(seconds, seed) for seed, seconds in enumerate((0.05, 1.0, 4.1, 7.77, 13.0))]
    alone = [tokenizer.encode(audio).frames() for audio in audios]
    for order in ((0, 1, 2, 3, 4), (4, 3), (2, 4, 0)):
        for i, units in zip(order, tokenizer.encode_batch([audios[i] for i in order]), strict=True):
            np.testing.assert_array_equal(units.frames(), alone[i])
    assert len(set(alone[4])) > 4


def test_with_as_much_context_as_the_model_hears_windows_change_nothing() -> None:
    # One layer of attention over 50 latents (2 s); convolutions hear a few frames more.
    model = tiny_mimi(num_hidden_layers=1)
    windows = MimiTokenizer(model, MimiSettings(window_s=2.4, context_s=4.0))
    audio = sound(12)
    np.testing.assert_array_equal(windows.encode(audio).frames(), codes(model, audio[: len(audio) // 1920 * 1920]))


def test_a_saved_tokenizer_comes_back_with_the_whole_model(tokenizer: MimiTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_speech_tokenizer(tmp_path)
    assert loaded.card() == tokenizer.card()
    np.testing.assert_array_equal(loaded.encode(sound(7)).frames(), tokenizer.encode(sound(7)).frames())
    whole = MimiModel.from_pretrained(tmp_path / "model")
    assert torch.equal(whole.decoder.upsample.conv.weight, tokenizer.model.decoder.upsample.conv.weight)


def test_a_tokenizer_can_be_sent_to_a_worker(tokenizer: MimiTokenizer) -> None:
    sent = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    np.testing.assert_array_equal(sent.encode(sound(4)).frames(), tokenizer.encode(sound(4)).frames())


def test_half_precision_gives_nearly_the_same_units_and_the_same_fingerprint(
    tokenizer: MimiTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    half = load_speech_tokenizer(tmp_path, dtype="bfloat16")
    assert half.fingerprint == tokenizer.fingerprint
    assert np.mean(half.encode(sound(9)).frames() == tokenizer.encode(sound(9)).frames()) > 0.85


def test_only_what_makes_units_counts(tokenizer: MimiTokenizer) -> None:
    model = tiny_mimi()
    with torch.no_grad():
        model.decoder.upsample.conv.weight.fill_(1)
        model.quantizer.acoustic_residual_vector_quantizer.layers[0].codebook.embed_sum.fill_(1)
    assert tiny_mimi_tokenizer(model).fingerprint == tokenizer.fingerprint
    with torch.no_grad():
        model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook.embed_sum[0] += 1
    assert tiny_mimi_tokenizer(model).fingerprint != tokenizer.fingerprint
    assert MimiTokenizer(tiny_mimi()).fingerprint != tokenizer.fingerprint  # other windows
    assert tiny_mimi_tokenizer(tiny_mimi(sliding_window=40)).fingerprint != tokenizer.fingerprint


def test_the_callers_model_is_left_alone_whatever_it_is_in() -> None:
    model = tiny_mimi().to(torch.bfloat16).train()
    tokenizer = tiny_mimi_tokenizer(model)
    assert model.training
    assert model.dtype == torch.bfloat16
    assert tokenizer.model.dtype == torch.float32
    assert len(tokenizer.encode(sound(2)).units) > 1


def test_changed_weights_and_settings_are_refused(tokenizer: MimiTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    card = json.loads((tmp_path / "tokenizer.json").read_text())
    card["settings"]["context_s"] = 3.0
    (tmp_path / "tokenizer.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"fingerprint .* changed"):
        MimiTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    weights["downsample.conv.weight"] += 1
    safetensors.numpy.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"fingerprint .* changed"):
        MimiTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "holds no speech tokenizer"),
        ("tokenizer.json", b'{"kind": "mel", "fingerprint": "", "settings": {}}', "'mel' tokenizer, not 'mimi'"),
        ("tokenizer.json", b'{"kind": "mimi", "fingerprint": "", "settings": {"hops": 1}}', "not a whole tokenizer"),
        ("model/config.json", None, "not a whole tokenizer"),
        ("model/model.safetensors", b"damaged", "not a whole tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused(
    tokenizer: MimiTokenizer, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MimiTokenizer.load(tmp_path)


def test_a_model_of_transformers_makes_a_tokenizer_and_another_kind_is_refused(tmp_path: Path) -> None:
    tiny_mimi().save_pretrained(tmp_path / "mimi")
    made = MimiTokenizer.from_pretrained(tmp_path / "mimi")
    assert made.settings == MimiSettings()
    assert made.fingerprint == MimiTokenizer(tiny_mimi()).fingerprint
    tiny_hubert().save_pretrained(tmp_path / "hubert")
    with pytest.raises(ValueError, match="holds a model of type 'hubert': give a Mimi model"):
        MimiTokenizer.from_pretrained(tmp_path / "hubert")


def test_models_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="hears the future"):
        MimiTokenizer(tiny_mimi(use_causal_conv=False))
    with pytest.raises(ValueError, match="has no encoder"):
        MimiTokenizer(tiny_mimi(encoder_config=None))
    with pytest.raises(ValueError, match="window_s is 0"):
        MimiSettings(window_s=0)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.float32), "0 samples, less than one frame"),
        (np.zeros((2, 1920), np.float32), "one channel"),
        (np.full(1920, np.inf, np.float32), "NaN"),
    ],
)
def test_audio_that_cannot_be_encoded_is_refused(tokenizer: MimiTokenizer, audio: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(audio)
