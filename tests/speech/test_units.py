import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from smoltolk.speech import mel as mel_module
from smoltolk.speech.kinds import load_speech_tokenizer
from smoltolk.speech.mel import MelSettings, MelTokenizer
from smoltolk.speech.units import Units


def test_units_are_merged_and_their_durations_add_up_to_the_frames(
    tokenizer: MelTokenizer, audios: list[np.ndarray]
) -> None:
    for audio in audios:
        encoded = tokenizer.encode(audio)
        assert encoded.units.dtype == encoded.durations.dtype == np.int64
        assert encoded.durations.sum() == len(audio) // 160
        assert np.all(encoded.units[1:] != encoded.units[:-1])
        assert encoded.units.min() >= 0
        assert encoded.units.max() < tokenizer.num_units
        assert len(encoded.units) > 5


def test_units_of_a_waveform_do_not_depend_on_its_batch(tokenizer: MelTokenizer, audios: list[np.ndarray]) -> None:
    for audio, in_batch in zip(audios, tokenizer.encode_batch(audios), strict=True):
        alone = tokenizer.encode(audio)
        np.testing.assert_array_equal(alone.units, in_batch.units)
        np.testing.assert_array_equal(alone.durations, in_batch.durations)


def test_long_audio_has_the_units_it_has_in_small_blocks(
    tokenizer: MelTokenizer, audios: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = np.concatenate(audios)
    whole = tokenizer.encode(audio).frames()
    monkeypatch.setattr(mel_module, "_BLOCK_FRAMES", 100)
    np.testing.assert_array_equal(tokenizer.encode(audio).frames(), whole)


def test_an_empty_batch_has_no_units(tokenizer: MelTokenizer) -> None:
    assert tokenizer.encode_batch([]) == []


def test_the_same_sound_later_has_the_same_units(tokenizer: MelTokenizer, audios: list[np.ndarray]) -> None:
    audio = audios[0]
    later = np.concatenate([np.zeros(4000, np.float32), audio])
    np.testing.assert_array_equal(tokenizer.encode(later).frames()[25 + 5 :], tokenizer.encode(audio).frames()[5:])


def test_a_higher_penalty_gives_fewer_units(tokenizer: MelTokenizer, audios: list[np.ndarray]) -> None:
    def count(penalty: float) -> int:
        settings = replace(tokenizer.settings, switch_penalty=penalty)
        other = MelTokenizer(tokenizer.centroids, tokenizer.band_means, tokenizer.band_stds, settings)
        return sum(len(u.units) for u in other.encode_batch(audios))

    assert count(1e-6) > count(1.2) > count(50)


def test_viterbi_finds_the_cheapest_of_all_paths() -> None:
    rng = np.random.default_rng(0)
    matrices = [rng.random((num_frames, 3), np.float32) for num_frames in (1, 2, 4, 6, 6)]
    for matrix, path in zip(matrices, mel_module._viterbi(matrices, 0.4), strict=True):
        costs = {}
        for candidate in itertools.product(range(3), repeat=len(matrix)):
            changes = sum(a != b for a, b in itertools.pairwise(candidate))
            costs[candidate] = sum(matrix[t, u] for t, u in enumerate(candidate)) + 0.4 * changes
        assert tuple(path) == min(costs, key=costs.__getitem__)


def test_fitting_twice_gives_the_same_tokenizer_and_another_seed_another(
    tokenizer: MelTokenizer, audios: list[np.ndarray]
) -> None:
    assert MelTokenizer.fit(iter(audios), num_units=12).fingerprint == tokenizer.fingerprint
    assert MelTokenizer.fit(audios, num_units=12, seed=1).fingerprint != tokenizer.fingerprint


def test_fitting_on_more_frames_than_kmeans_sees_uses_a_sample(
    audios: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mel_module, "FIT_FRAMES", 500)
    few = MelTokenizer.fit(audios, num_units=4)
    monkeypatch.undo()
    np.testing.assert_array_equal(few.band_means, MelTokenizer.fit(audios, num_units=4).band_means)


def test_a_saved_tokenizer_comes_back(tokenizer: MelTokenizer, audios: list[np.ndarray], tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_speech_tokenizer(tmp_path / "tokenizer")
    assert loaded.card() == tokenizer.card()
    np.testing.assert_array_equal(loaded.encode(audios[1]).units, tokenizer.encode(audios[1]).units)
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == ["kmeans.safetensors", "tokenizer.json"]


def test_the_card_tells_what_others_need(tokenizer: MelTokenizer) -> None:
    assert tokenizer.card() == {
        "kind": "mel",
        "fingerprint": tokenizer.fingerprint,
        "unit_rate_hz": 100.0,
        "num_units": 12,
        "sample_rate_hz": 16_000,
    }


def test_changed_weights_are_refused(tokenizer: MelTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "kmeans.safetensors"
    weights = safetensors.numpy.load_file(file)
    weights["centroids"][0, 0] += 1
    safetensors.numpy.save_file(weights, file)
    with pytest.raises(ValueError, match=r"fingerprint .* changed"):
        MelTokenizer.load(tmp_path)


def test_changed_settings_are_refused(tokenizer: MelTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    card = json.loads(file.read_text())
    card["settings"]["switch_penalty"] = 2.0
    file.write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"fingerprint .* changed"):
        MelTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "holds no speech tokenizer"),
        ("tokenizer.json", b"{", "is damaged"),
        ("tokenizer.json", b"[]", "not the card"),
        ("tokenizer.json", b'{"kind": "tone", "fingerprint": "", "settings": {}}', "kind 'tone'"),
        ("tokenizer.json", b'{"kind": "mel", "fingerprint": "", "settings": {"hops": 1}}', "not a whole tokenizer"),
        ("tokenizer.json", b'{"kind": "mel", "fingerprint": "", "settings": {"num_bands": "x"}}', "not a whole"),
        ("kmeans.safetensors", None, "not a whole tokenizer"),
        ("kmeans.safetensors", b"damaged", "not a whole tokenizer"),
    ],
)
def test_a_damaged_folder_is_refused(
    tokenizer: MelTokenizer, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_speech_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(159, np.float32), "less than one frame"),
        (np.zeros(0, np.float32), "less than one frame"),
        (np.zeros((2, 1600), np.float32), "one channel"),
        (np.full(1600, np.nan, np.float32), "NaN"),
    ],
)
def test_audio_that_cannot_be_encoded_is_refused(tokenizer: MelTokenizer, audio: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(audio)


def test_one_frame_is_enough_to_encode(tokenizer: MelTokenizer) -> None:
    assert tokenizer.encode(np.zeros(160, np.float32)).durations.tolist() == [1]


@pytest.mark.parametrize("num_units", [0, 1, 10_000])
def test_a_number_of_units_that_the_audio_does_not_give_is_refused(num_units: int, audios: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match=f"num_units is {num_units}"):
        MelTokenizer.fit(audios[:1], num_units=num_units)


def test_fitting_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_units"):
        MelTokenizer.fit([])


def test_a_setting_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="switch_penalty is 0"):
        MelSettings(switch_penalty=0)


def test_frames_are_merged_to_units_and_back() -> None:
    frames = np.array([3, 3, 1, 1, 1, 3])
    merged = Units.from_frames(frames)
    assert merged.units.tolist() == [3, 1, 3]
    assert merged.durations.tolist() == [2, 3, 1]
    np.testing.assert_array_equal(merged.frames(), frames)
    assert len(Units.from_frames(frames[:0]).units) == 0


@pytest.mark.parametrize(
    ("units", "durations", "message"),
    [([1, 1], [1, 1], "equal neighbours"), ([1, 2], [1], "same length"), ([1, 2], [1, 0], "below 1")],
)
def test_units_that_are_not_merged_are_refused(units: list[int], durations: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Units(np.array(units), np.array(durations))
