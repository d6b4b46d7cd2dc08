"""`smoltolk tokenizer fit | import | encode`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.speech.conftest import syllables
from tests.speech.models import noise, tiny_hubert, tiny_hubert_tokenizer, tiny_mimi
from transformers import Wav2Vec2FeatureExtractor

from smoltolk import cli
from smoltolk.speech.audio import load_audio, save_wav
from smoltolk.speech.hubert import HubertTokenizer
from smoltolk.speech.kinds import load_speech_tokenizer
from smoltolk.speech.mel import MelTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings, a HuBERT with a k-means, and a Mimi."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "audio").mkdir()
    for seed in range(2):
        save_wav(folder / "audio" / f"{seed}.wav", syllables(seed), 16_000)
    tiny_hubert().save_pretrained(folder / "hubert")
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder / "hubert")
    np.save(folder / "kmeans.npy", tiny_hubert_tokenizer().centroids)
    tiny_mimi().save_pretrained(folder / "mimi")
    return folder


def run(*arguments: object) -> int:
    return cli.main(["tokenizer", *map(str, arguments)])


def test_a_mel_tokenizer_is_fitted_as_by_its_function(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", folder / "audio", "--output", tmp_path / "mel", "--num-units", 8, "--seed", 3) == 0
    audios = [load_audio(path, sample_rate_hz=16_000) for path in sorted((folder / "audio").iterdir())]
    expected = MelTokenizer.fit(audios, num_units=8, seed=3).fingerprint
    assert load_speech_tokenizer(tmp_path / "mel").fingerprint == expected
    assert capsys.readouterr().out == f"{tmp_path / 'mel'}: 8 units at 100 Hz, fingerprint {expected}\n"


def test_a_hubert_tokenizer_is_fitted_and_encodes_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--kind", "hubert", "--model", folder / "hubert", "--layer", 2)
    assert run("fit", folder / "audio", "--output", tmp_path / "fitted", *model, "--num-units", 8) == 0
    tokenizer = load_speech_tokenizer(tmp_path / "fitted")
    assert isinstance(tokenizer, HubertTokenizer)
    assert (tokenizer.num_units, tokenizer.settings.layer) == (8, 2)
    capsys.readouterr()
    assert run("encode", tmp_path / "fitted", folder / "audio") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["audio"] for line in lines] == [str(folder / "audio" / f"{seed}.wav") for seed in range(2)]
    for line in lines:
        expected = tokenizer.encode(load_audio(line["audio"], sample_rate_hz=16_000))
        assert (line["units"], line["durations"]) == (expected.units.tolist(), expected.durations.tolist())


def test_models_that_are_there_are_imported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--kind", "hubert", "--model", folder / "hubert", "--layer", 2, "--kmeans", folder / "kmeans.npy")
    assert run("import", "--output", tmp_path / "hubert", *model) == 0
    assert "20 units at 50 Hz" in capsys.readouterr().out
    tokenizer = load_speech_tokenizer(tmp_path / "hubert")
    audio = noise(1.2)
    np.testing.assert_array_equal(tokenizer.encode(audio).frames(), tiny_hubert_tokenizer().encode(audio).frames())

    assert run("import", "--output", tmp_path / "mimi", "--kind", "mimi", "--model", folder / "mimi") == 0
    assert "32 units at 12.5 Hz" in capsys.readouterr().out
    assert load_speech_tokenizer(tmp_path / "mimi").kind == "mimi"


def test_what_is_in_a_folder_is_never_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    shutil.copytree(folder / "hubert", project / "model")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    hubert = ("--kind", "hubert", "--model", project / "model", "--layer", 2)
    for command in (
        ("fit", folder / "audio", *hubert, "--num-units", 8),
        ("fit", folder / "audio", "--num-units", 8),
        ("import", *hubert, "--kmeans", folder / "kmeans.npy"),
    ):
        assert run(*command, "--output", project) == 1
        assert f"{project} exists and is not an empty folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [project]


@pytest.mark.parametrize("kind", ["mel", "hubert"])
def test_files_that_cannot_be_used_are_left_out_and_named(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "audio", tmp_path / "audio")
    (tmp_path / "audio" / "broken.wav").write_bytes(b"no audio")
    save_wav(tmp_path / "audio" / "click.wav", noise(0.005), 16_000)
    model = ("--kind", "hubert", "--model", folder / "hubert", "--layer", 2) if kind == "hubert" else ()
    for name, audio in (("all", folder / "audio"), ("some", tmp_path / "audio")):
        assert run("fit", audio, *model, "--num-units", 8, "--output", tmp_path / name) == 0
    expected = load_speech_tokenizer(tmp_path / "all").fingerprint
    assert load_speech_tokenizer(tmp_path / "some").fingerprint == expected
    fit_errors = capsys.readouterr().err
    assert run("encode", tmp_path / "some", tmp_path / "audio") == 0
    printed = capsys.readouterr()
    assert [Path(json.loads(line)["audio"]).name for line in printed.out.splitlines()] == ["0.wav", "1.wav"]
    for errors in (fit_errors, printed.err):
        assert f"left out {tmp_path / 'audio' / 'broken.wav'}: " in errors
        assert f"left out {tmp_path / 'audio' / 'click.wav'}: " in errors
        assert "2 of 4 files left out as unusable\n" in errors

    (tmp_path / "empty").mkdir()
    for audio, reason in ((tmp_path / "audio" / "broken.wav", "the first: "), (tmp_path / "empty", "there are none")):
        assert run("fit", audio, *model, "--num-units", 8, "--output", tmp_path / "none") == 1
        assert f"no recording can be used ({reason}" in capsys.readouterr().err
        assert run("encode", tmp_path / "some", audio) == 1
        assert "no audio file can be used" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_preset_is_imported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubertTokenizer, "mhubert_25hz", lambda kmeans: tiny_hubert_tokenizer())
    assert run("import", "--output", tmp_path / "preset", "--preset", "mhubert-25hz") == 0
    assert load_speech_tokenizer(tmp_path / "preset").fingerprint == tiny_hubert_tokenizer().fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import"], "nothing to import: give --kind, or --preset mhubert-25hz"),
        (["import", "--kind", "hubert"], "--kind hubert needs --model"),
        (["import", "--kind", "hubert", "--model", "m", "--layer", 1], "--kind hubert needs --kmeans"),
        (["import", "--kind", "mimi"], "--kind mimi needs --model"),
        (["import", "--kind", "mimi", "--model", "m", "--layer", 1], "--layer has no effect with --kind mimi"),
        (["import", "--preset", "mhubert-25hz", "--layer", 1], "--layer has no effect with --preset mhubert-25hz"),
        (["import", "--kind", "hubert", "--model", "m", "--layer", 1, "--kmeans", "none.npy"], "none.npy cannot be"),
        (["fit", "audio", "--layer", 1], "--layer has no effect with --kind mel"),
        (["fit", "audio", "--no-normalize"], "--normalize has no effect with --kind mel"),
        (["fit", "audio", "--device", "cuda"], "--device and --dtype are for --kind hubert"),
        (["fit", "audio", "--kind", "hubert", "--model", "m"], "--kind hubert needs --layer"),
        (["fit", "audio", "--num-units", 0], "num_units is 0"),
        (["fit", "none.wav"], "none.wav cannot be read"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(
    arguments: list, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_setting_without_effect_on_a_mel_tokenizer_warns(tokenizer: MelTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    with pytest.warns(UserWarning, match="has no network: device, dtype and batch_size have no effect"):
        assert load_speech_tokenizer(tmp_path, dtype="bfloat16").fingerprint == tokenizer.fingerprint
