import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from smoltolk.speech.audio import load_audio, save_wav
from smoltolk.speech.mel import MelTokenizer
from smoltolk.speech.mel_vocoder import MelVocoder
from smoltolk.speech.resynthesis import Recording, resynthesize, resynthesize_files

RATE_HZ = 16_000


@pytest.fixture(scope="module")
def vocoder(tokenizer: MelTokenizer, audios: list[np.ndarray]) -> MelVocoder:
    return MelVocoder.fit(zip(tokenizer.encode_batch(audios), audios, strict=True), tokenizer, steps=3)


@pytest.fixture
def recordings(audios: list[np.ndarray], tmp_path: Path) -> list[Recording]:
    (tmp_path / "in").mkdir()
    for i in range(3):
        save_wav(tmp_path / "in" / f"{i}.wav", audios[i], RATE_HZ)
    return [Recording(tmp_path / "in" / f"{i}.wav", f"{i}.wav") for i in range(3)]


def test_the_units_of_audio_are_spoken_with_their_durations_or_with_predicted_ones(
    tokenizer: MelTokenizer, vocoder: MelVocoder, audios: list[np.ndarray]
) -> None:
    units, again = resynthesize(audios[0], tokenizer, vocoder)
    np.testing.assert_array_equal(units.frames(), tokenizer.encode(audios[0]).frames())
    np.testing.assert_array_equal(again, vocoder.decode(units.units, units.durations))
    _, predicted = resynthesize(audios[0], tokenizer, vocoder, with_durations=False)
    np.testing.assert_array_equal(predicted, vocoder.decode(units.units))


def test_files_are_written_and_described(
    recordings: list[Recording], tokenizer: MelTokenizer, vocoder: MelVocoder, audios: list[np.ndarray], tmp_path: Path
) -> None:
    done: list[int] = []
    results = resynthesize_files(recordings, tmp_path / "out", tokenizer, vocoder, progress=done.append)
    assert done == [1, 1, 1]
    assert [Path(file["output"]).name for file in results["files"]] == ["0.wav", "1.wav", "2.wav"]
    assert results["seconds"] == pytest.approx(sum(len(audio) for audio in audios[:3]) / RATE_HZ)
    assert results["units"] == sum(len(tokenizer.encode(audio).units) for audio in audios[:3])
    assert results["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert (results["vocoder"], results["with_durations"], results["failed"]) == ("mel", True, [])
    assert "word_error_rate" not in results
    assert json.loads(json.dumps(results)) == results
    written = load_audio(tmp_path / "out" / "1.wav", sample_rate_hz=RATE_HZ)
    original = load_audio(recordings[1].audio, sample_rate_hz=RATE_HZ)
    _, again = resynthesize(original, tokenizer, vocoder)
    np.testing.assert_allclose(written, again, atol=1e-4)


def test_words_are_compared_with_the_text_or_else_with_what_is_heard_in_the_original(
    recordings: list[Recording], tokenizer: MelTokenizer, vocoder: MelVocoder, tmp_path: Path
) -> None:
    heard = iter(["one two three", "one two four", "five", "five six", "seven eight", "seven"])
    recordings = [
        Recording(recordings[0].audio, "0.wav", text="One, two, three."),
        Recording(recordings[1].audio, "1.wav"),
        Recording(recordings[2].audio, "2.wav", text="seven, eight nine"),
    ]
    results = resynthesize_files(
        recordings, tmp_path / "out", tokenizer, vocoder, transcriber=lambda audio, rate_hz: next(heard)
    )
    first, second, third = results["files"]
    assert first["original"] == {"substitutions": 0, "deletions": 0, "insertions": 0, "num_words": 3}
    assert first["resynthesised"] == {"substitutions": 1, "deletions": 0, "insertions": 0, "num_words": 3}
    assert (second["original"], second["heard_in_original"]) == (None, "five")
    assert second["resynthesised"] == {"substitutions": 0, "deletions": 0, "insertions": 1, "num_words": 1}
    assert third["resynthesised"] == {"substitutions": 0, "deletions": 2, "insertions": 0, "num_words": 3}
    rates = results["word_error_rate"]
    assert rates["original"]["rate"] == pytest.approx(1 / 6)
    assert rates["resynthesised"]["rate"] == pytest.approx(4 / 7)
    low, high = rates["resynthesised"]["interval"]
    assert 1 / 3 <= low < 4 / 7 < high <= 1  # the rates of the first and the second file
    assert json.loads(json.dumps(results)) == results


def test_one_file_has_a_rate_without_an_interval_and_none_without_words(
    recordings: list[Recording], tokenizer: MelTokenizer, vocoder: MelVocoder, tmp_path: Path
) -> None:
    said = resynthesize_files(
        recordings[:1], tmp_path / "out", tokenizer, vocoder, transcriber=lambda audio, rate_hz: "a b"
    )["word_error_rate"]
    assert said["original"] is None
    assert said["resynthesised"] == {
        "substitutions": 0,
        "deletions": 0,
        "insertions": 0,
        "num_words": 2,
        "rate": 0.0,
        "interval": None,
    }
    unheard = resynthesize_files(
        recordings[:1], tmp_path / "out", tokenizer, vocoder, transcriber=lambda audio, rate_hz: ""
    )
    assert unheard["word_error_rate"]["resynthesised"] is None


def test_the_recogniser_hears_each_waveform_at_its_rate(
    recordings: list[Recording], tokenizer: MelTokenizer, vocoder: MelVocoder, audios: list[np.ndarray], tmp_path: Path
) -> None:
    lengths: list[tuple[int, int]] = []

    def transcribe(audio: np.ndarray, rate_hz: int) -> str:
        lengths.append((len(audio), rate_hz))
        return "a"

    resynthesize_files(recordings[:1], tmp_path / "out", tokenizer, vocoder, transcriber=transcribe)
    assert lengths == [(len(audios[0]), RATE_HZ), (len(audios[0]) // 160 * 160, RATE_HZ)]


def test_files_that_cannot_be_used_are_listed_and_change_no_other(
    recordings: list[Recording], tokenizer: MelTokenizer, vocoder: MelVocoder, tmp_path: Path
) -> None:
    silent = tmp_path / "in" / "silent.wav"
    soundfile.write(silent, np.zeros(RATE_HZ), RATE_HZ)
    broken = [Recording(silent, "silent.wav"), Recording(tmp_path / "none.wav", "none.wav")]
    results = resynthesize_files([*broken, *recordings], tmp_path / "out", tokenizer, vocoder)
    assert len(results["files"]) == 3
    assert [(Path(fault["audio"]).name, "is silent" in fault["reason"]) for fault in results["failed"]] == [
        ("silent.wav", True),
        ("none.wav", False),
    ]
    assert not (tmp_path / "out" / "silent.wav").exists()
    with pytest.raises(ValueError, match=r"no recording can be used; the first: .*silent"):
        resynthesize_files(broken, tmp_path / "out", tokenizer, vocoder)


def test_no_file_is_lost(
    recordings: list[Recording], tokenizer: MelTokenizer, vocoder: MelVocoder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="recordings is empty"):
        resynthesize_files([], tmp_path / "out", tokenizer, vocoder)
    with pytest.raises(ValueError, match="would be written over"):
        resynthesize_files(recordings, tmp_path / "in", tokenizer, vocoder)
    twice = [recordings[0], Recording(recordings[1].audio, "0.flac")]
    with pytest.raises(ValueError, match=r"0\.wav and \S*1\.wav would both become"):
        resynthesize_files(twice, tmp_path / "out", tokenizer, vocoder)
    assert not (tmp_path / "out").exists()


def test_the_vocoder_of_another_tokenizer_is_refused(
    recordings: list[Recording], audios: list[np.ndarray], vocoder: MelVocoder, tmp_path: Path
) -> None:
    other = MelTokenizer.fit(audios, num_units=12, seed=9)
    with pytest.raises(ValueError, match="give the vocoder of this tokenizer"):
        resynthesize(audios[0], other, vocoder)
    with pytest.raises(ValueError, match="give the vocoder of this tokenizer"):
        resynthesize_files(recordings, tmp_path / "out", other, vocoder)
