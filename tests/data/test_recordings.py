from pathlib import Path

import numpy as np
import pytest
from tests.speech.conftest import syllables

from smoltolk.data.recordings import find_recordings, fit_mel_vocoder
from smoltolk.speech.audio import save_wav
from smoltolk.speech.mel import MelTokenizer
from smoltolk.speech.mel_vocoder import MelVocoder
from smoltolk.speech.resynthesis import Recording

RATE_HZ = 16_000


@pytest.fixture(scope="module")
def tokenizer() -> MelTokenizer:
    return MelTokenizer.fit([syllables(seed) for seed in range(3)], num_units=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three recordings of two seconds and more, the first with its text."""
    (tmp_path / "voice" / "part").mkdir(parents=True)
    for i, name in enumerate(("a.wav", "b.wav", "part/c.wav")):
        save_wav(tmp_path / "voice" / name, syllables(i)[: (i + 2) * RATE_HZ], RATE_HZ)
    (tmp_path / "voice" / "a.txt").write_text("one two")
    (tmp_path / "voice" / "notes.txt").write_text("of no recording")
    return tmp_path / "voice"


def test_recordings_are_found_in_files_folders_and_manifests(folder: Path, tmp_path: Path) -> None:
    found = [
        Recording(folder / "a.wav", "a.wav", "one two"),
        Recording(folder / "b.wav", "b.wav"),
        Recording(folder / "part/c.wav", "part/c.wav"),
    ]
    assert find_recordings([folder]) == found
    assert find_recordings([folder / "a.wav", folder / "part"]) == [
        found[0],
        Recording(folder / "part/c.wav", "c.wav"),
    ]
    (tmp_path / "m.csv").write_text(f"audio,text\nvoice/part/c.wav,three\n{folder / 'b.wav'},\n")
    assert find_recordings([tmp_path / "m.csv"]) == [
        Recording(folder / "part/c.wav", "voice/part/c.wav", "three"),
        Recording(folder / "b.wav", "b.wav"),
    ]
    (tmp_path / "m.jsonl").write_text('{"audio": "../other/d.wav"}\n')
    assert find_recordings([tmp_path / "m.jsonl"])[0].name == "d.wav"


def test_a_manifest_without_audio_and_text_that_is_not_utf_8_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav"}\n{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, row 2: audio is None"):
        find_recordings([tmp_path / "m.jsonl"])
    (folder / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        find_recordings([folder])


def test_a_vocoder_is_fitted_on_all_audio_within_the_bound(folder: Path, tokenizer: MelTokenizer) -> None:
    encoded: list[float] = []
    done: list[int] = []
    fitted = fit_mel_vocoder(
        find_recordings([folder]), tokenizer, steps=2, encoding=encoded.append, progress=done.append
    )
    assert (fitted.num_files, fitted.seconds, fitted.failed) == (3, 9.0, ())
    assert sorted(encoded) == [2.0, 3.0, 4.0]
    assert done == [1, 1]
    audios = [syllables(i)[: (i + 2) * RATE_HZ] for i in np.random.default_rng(0).permutation(3)]
    audios = [np.round(audio * 32767).astype(np.float32) / 32768 for audio in audios]  # as 16-bit WAV
    expected = MelVocoder.fit(((tokenizer.encode(audio), audio) for audio in audios), tokenizer, steps=2)
    units = np.array([3, 1, 5])
    np.testing.assert_allclose(fitted.vocoder.decode(units), expected.decode(units), atol=1e-2)


def test_the_bound_cuts_the_last_recording_and_the_seed_draws_which_are_used(
    folder: Path, tokenizer: MelTokenizer
) -> None:
    recordings = find_recordings([folder])
    used = [fit_mel_vocoder(recordings, tokenizer, max_seconds=3.5, steps=1, seed=seed) for seed in range(4)]
    assert all(3.0 <= fitted.seconds <= 3.5 for fitted in used)
    assert {fitted.num_files for fitted in used} == {1, 2}


def test_recordings_that_cannot_be_used_are_listed(folder: Path, tokenizer: MelTokenizer) -> None:
    (folder / "b.wav").write_bytes(b"no audio")
    fitted = fit_mel_vocoder(find_recordings([folder]), tokenizer, steps=1)
    assert (fitted.num_files, fitted.seconds) == (2, 6.0)
    ((path, reason),) = fitted.failed
    assert path == folder / "b.wav"
    assert "cannot be decoded" in reason
    with pytest.raises(ValueError, match=r"no recording can be used \(the first: .*b\.wav"):
        fit_mel_vocoder(find_recordings([folder / "b.wav"]), tokenizer, steps=1)
    with pytest.raises(ValueError, match=r"no recording can be used \(there are none\)"):
        fit_mel_vocoder([], tokenizer, steps=1)


@pytest.mark.parametrize("setting", [{"steps": 0}, {"max_seconds": 0.5}])
def test_settings_out_of_range_are_refused(tokenizer: MelTokenizer, setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        fit_mel_vocoder([], tokenizer, **setting)
