import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from smoltolk.speech.kinds import load_vocoder
from smoltolk.speech.mel import MelSettings, MelTokenizer
from smoltolk.speech.mel_vocoder import MelVocoder, _mels_per_frame
from smoltolk.speech.units import Units


@pytest.fixture(scope="module")
def pairs(tokenizer: MelTokenizer, audios: list[np.ndarray]) -> list[tuple[Units, np.ndarray]]:
    return list(zip(tokenizer.encode_batch(audios), audios, strict=True))


@pytest.fixture(scope="module")
def vocoder(tokenizer: MelTokenizer, pairs: list[tuple[Units, np.ndarray]]) -> MelVocoder:
    return MelVocoder.fit(pairs, tokenizer, steps=40)


def test_decoded_audio_has_the_length_of_its_units_and_encodes_to_them_again(
    vocoder: MelVocoder, tokenizer: MelTokenizer, pairs: list[tuple[Units, np.ndarray]]
) -> None:
    units, _ = pairs[2]
    audio = vocoder.decode(units.units, units.durations)
    assert audio.dtype == np.float32
    assert len(audio) == 160 * units.durations.sum()
    assert np.abs(audio).max() <= 1
    assert np.mean(tokenizer.encode(audio).frames() == units.frames()) > 0.7


def test_durations_are_predicted_near_the_true_ones(vocoder: MelVocoder, pairs: list[tuple[Units, np.ndarray]]) -> None:
    units, _ = pairs[3]
    predicted = vocoder.predict_durations(units.units)
    assert predicted.min() >= 1
    assert 0.6 < predicted.sum() / units.durations.sum() < 1.4
    assert len(vocoder.decode(units.units)) == 160 * predicted.sum()


def test_decoding_twice_gives_the_same_audio(vocoder: MelVocoder) -> None:
    units = np.array([1, 5, 2, 2, 0])
    np.testing.assert_array_equal(vocoder.decode(units), vocoder.decode(units))


@pytest.mark.parametrize("chunk_units", [1, 7, 24, 1000])
def test_a_stream_says_the_same_in_chunks(
    vocoder: MelVocoder, pairs: list[tuple[Units, np.ndarray]], tokenizer: MelTokenizer, chunk_units: int
) -> None:
    units = np.concatenate([pair.units for pair, _ in pairs[: 1 if chunk_units == 1 else 3]])
    units = units[np.append(True, units[1:] != units[:-1])]
    heard: list[int] = []

    def come() -> Iterator[int]:
        for unit in units:
            heard.append(int(unit))
            yield int(unit)

    pieces, spoken = [], []
    for some, piece in vocoder.decode_stream(come(), chunk_units=chunk_units):
        if not pieces and chunk_units < 24 < len(units):
            assert len(heard) < len(units)  # the first piece comes before the last unit
        pieces.append(piece)
        spoken += some.tolist()
    assert heard == spoken == units.tolist()
    whole = vocoder.decode(units)
    streamed = np.concatenate(pieces)
    assert streamed.dtype == np.float32
    assert len(streamed) == len(whole)
    agreement = np.mean(tokenizer.encode(streamed).frames() == tokenizer.encode(whole).frames())
    assert agreement > (0.6 if chunk_units == 1 else 0.75)
    steps = np.abs(np.diff(streamed))
    assert steps.max() < 1.5 * np.abs(np.diff(whole)).max()  # no clicks at the seams


def test_a_stream_without_units_says_nothing_and_a_chunk_has_units(vocoder: MelVocoder) -> None:
    assert list(vocoder.decode_stream([])) == []
    with pytest.raises(ValueError, match="chunk_units is 0"):
        next(vocoder.decode_stream([1], chunk_units=0))


def test_a_single_unit_of_one_frame_is_decoded(vocoder: MelVocoder) -> None:
    assert vocoder.decode(np.array([3]), np.array([1])).shape == (160,)


def test_training_twice_gives_the_same_vocoder_and_reports_every_step(
    tokenizer: MelTokenizer, pairs: list[tuple[Units, np.ndarray]]
) -> None:
    done: list[int] = []
    units = pairs[0][0].units
    first = MelVocoder.fit(pairs[:2], tokenizer, steps=3, progress=done.append)
    second = MelVocoder.fit(iter(pairs[:2]), tokenizer, steps=3)
    assert done == [1, 1, 1]
    np.testing.assert_array_equal(first.decode(units), second.decode(units))


def test_a_saved_vocoder_comes_back(vocoder: MelVocoder, tokenizer: MelTokenizer, tmp_path: Path) -> None:
    vocoder.save(tmp_path / "vocoder")
    loaded = load_vocoder(tmp_path / "vocoder", tokenizer)
    units = np.array([4, 1, 7])
    np.testing.assert_array_equal(loaded.decode(units), vocoder.decode(units))
    assert loaded.tokenizer_fingerprint == tokenizer.fingerprint
    assert sorted(p.name for p in (tmp_path / "vocoder").iterdir()) == ["vocoder.json", "vocoder.safetensors"]


def test_a_vocoder_of_another_tokenizer_is_refused(
    vocoder: MelVocoder, audios: list[np.ndarray], tmp_path: Path
) -> None:
    vocoder.save(tmp_path)
    with pytest.raises(ValueError, match="train a vocoder for this tokenizer"):
        load_vocoder(tmp_path, MelTokenizer.fit(audios, num_units=12, seed=9))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocoder.json", None),
        ("vocoder.json", b"{"),
        ("vocoder.json", b"{}"),
        ("vocoder.safetensors", None),
        ("vocoder.safetensors", b"damaged"),
    ],
)
def test_a_damaged_folder_is_refused(vocoder: MelVocoder, tmp_path: Path, file: str, content: bytes | None) -> None:
    vocoder.save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"not a whole vocoder|not the card of a vocoder"):
        MelVocoder.load(tmp_path)


@pytest.mark.parametrize(
    ("units", "durations", "message"),
    [
        ([], None, "units is empty"),
        ([0, 12], None, "knows 0 to 11"),
        ([-1, 3], None, "knows 0 to 11"),
        ([1, 2], [1], "durations"),
        ([1, 2], [1, 0], "durations"),
    ],
)
def test_units_that_cannot_be_decoded_are_refused(
    vocoder: MelVocoder, units: list[int], durations: list[int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        vocoder.decode(np.array(units, dtype=np.int64), None if durations is None else np.array(durations))


def test_training_on_nothing_or_on_units_of_other_audio_is_refused(
    tokenizer: MelTokenizer, pairs: list[tuple[Units, np.ndarray]]
) -> None:
    with pytest.raises(ValueError, match="pairs is empty"):
        MelVocoder.fit([], tokenizer)
    with pytest.raises(ValueError, match="encode this audio again"):
        MelVocoder.fit([(pairs[0][0], pairs[1][1])], tokenizer)


@pytest.mark.parametrize(
    ("hop_samples", "sample_rate_hz", "mels_per_frame"),
    [(160, 16_000, 1), (80, 16_000, 1), (320, 16_000, 2), (640, 16_000, 4), (1920, 24_000, 8), (221, 22_050, 1)],
)
def test_log_mel_frames_last_about_10_ms_and_fill_the_tokenizers_frames(
    hop_samples: int, sample_rate_hz: int, mels_per_frame: int
) -> None:
    assert _mels_per_frame(hop_samples, sample_rate_hz) == mels_per_frame


def test_units_of_40_ms_are_decoded_as_well(audios: list[np.ndarray], tmp_path: Path) -> None:
    tokenizer = MelTokenizer.fit(audios, num_units=12, settings=MelSettings(hop_samples=640, switch_penalty=0.1))
    vocoder = MelVocoder.fit(zip(tokenizer.encode_batch(audios), audios, strict=True), tokenizer, steps=20)
    units = tokenizer.encode(audios[3])
    audio = vocoder.decode(units.units, units.durations)
    assert len(audio) == 640 * units.durations.sum()
    assert np.mean(tokenizer.encode(audio).frames() == units.frames()) > 0.6
    predicted = vocoder.predict_durations(units.units)
    assert 0.5 < predicted.sum() / units.durations.sum() < 1.5
    streamed = np.concatenate([piece for _, piece in vocoder.decode_stream(units.units)])
    assert len(streamed) == 640 * predicted.sum()
    vocoder.save(tmp_path)
    np.testing.assert_array_equal(load_vocoder(tmp_path, tokenizer).decode(units.units), vocoder.decode(units.units))


@pytest.mark.parametrize("more_samples", [-150, 0, 300])
def test_a_tokenizer_may_fill_up_its_last_frame_or_leave_one_out(
    tokenizer: MelTokenizer, pairs: list[tuple[Units, np.ndarray]], more_samples: int
) -> None:
    units, audio = pairs[0]
    num_samples = 160 * units.durations.sum() + more_samples
    audio = np.pad(audio, (0, 320))[:num_samples]
    assert len(MelVocoder.fit([(units, audio)], tokenizer, steps=1).decode(units.units, units.durations))
    for wrong in (np.pad(audio, (0, 320 - more_samples)), audio[: num_samples - more_samples - 160]):
        with pytest.raises(ValueError, match="encode this audio again"):
            MelVocoder.fit([(units, wrong)], tokenizer, steps=1)


def test_a_card_without_log_mel_frames_has_one_in_a_frame(vocoder: MelVocoder, tmp_path: Path) -> None:
    vocoder.save(tmp_path)
    card = json.loads((tmp_path / "vocoder.json").read_bytes())
    assert card.pop("mels_per_frame") == 1
    (tmp_path / "vocoder.json").write_text(json.dumps(card))
    units = np.array([4, 1, 7])
    np.testing.assert_array_equal(MelVocoder.load(tmp_path).decode(units), vocoder.decode(units))


def test_a_vocoder_of_unknown_kind_is_refused(vocoder: MelVocoder, tmp_path: Path) -> None:
    vocoder.save(tmp_path)
    (tmp_path / "vocoder.json").write_text(json.dumps({"kind": "tin can"}))
    with pytest.raises(ValueError, match="kind 'tin can'; this version knows mel, hifigan and mimi"):
        load_vocoder(tmp_path)
