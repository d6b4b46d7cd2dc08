"""The commands for vocoders and resynthesis, from files to files."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tests.speech.conftest import RATE_HZ, syllables
from tests.speech.models import noise, tiny_mimi_tokenizer
from tests.speech.recognisers import save_ctc
from tests.speech.test_hifigan import Files
from tests.speech.test_mimi_vocoder import tiny_mimi
from transformers.models.mimi import modeling_mimi

from smoltolk import cli
from smoltolk.speech.audio import save_wav
from smoltolk.speech.hifigan import UnitHifiGan
from smoltolk.speech.kinds import load_vocoder
from smoltolk.speech.mel import MelSettings, MelTokenizer


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder "in" of recordings, the tokenizer and a recogniser."""
    folder = tmp_path_factory.mktemp("voice")
    (folder / "in").mkdir()
    audios = [syllables(seed)[: 3 * RATE_HZ] for seed in range(3)]
    for i, audio in enumerate(audios):
        save_wav(folder / "in" / f"{i}.wav", audio, RATE_HZ)
    (folder / "in" / "0.txt").write_text("a b c")
    MelTokenizer.fit(audios, num_units=12).save(folder / "tokenizer")
    save_ctc(folder / "asr")
    return folder


@pytest.fixture(scope="module")
def fitted(voice: Path) -> Path:
    command = ["vocoder", "fit", str(voice / "in"), "--tokenizer", str(voice / "tokenizer"), "--steps", "2"]
    assert cli.main([*command, "--output", str(voice / "vocoder")]) == 0
    return voice / "vocoder"


def resynthesize(voice: Path, source: Path, output: Path, *options: str) -> int:
    folders = ["--tokenizer", str(voice / "tokenizer"), "--vocoder", str(voice / "vocoder")]
    return cli.main(["resynthesize", str(source), str(output), *folders, *options])


def test_a_vocoder_is_fitted_and_what_was_left_out_is_said(
    voice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio")
    command = ["vocoder", "fit", str(voice / "in"), str(broken), "--tokenizer", str(voice / "tokenizer")]
    command += ["--steps", "1", "--max-minutes", "0.1", "--output", str(tmp_path / "vocoder")]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "trained on 0.1 minutes in 2 files" in printed.out
    assert ("1 left out" in printed.out) == (f"left out {broken}" in printed.err)
    assert load_vocoder(tmp_path / "vocoder").kind == "mel"
    assert cli.main(command) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_stopping_the_fit_leaves_nothing(
    voice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smoltolk.speech.mel_vocoder._UnitDecoder.train_on", stop)
    command = ["vocoder", "fit", str(voice / "in"), "--tokenizer", str(voice / "tokenizer")]
    assert cli.main([*command, "--output", str(tmp_path / "vocoder")]) == 130
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_published_vocoder_is_imported(voice: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = Files(tmp_path, multispkr=True, model_in_dim=16)
    command = ["vocoder", "import", "--config", str(files.config_file), "--checkpoint", str(files.checkpoint_file)]
    command += ["--tokenizer", str(voice / "tokenizer"), "--output", str(tmp_path / "vocoder")]
    assert cli.main(command) == 1
    assert "speaker is None: multispkr is on, choose one of 0 to 2" in capsys.readouterr().err
    assert not (tmp_path / "vocoder").exists()
    assert cli.main([*command, "--speaker", "1"]) == 0
    assert "12 units to audio at 2000 Hz, predicts durations" in capsys.readouterr().out
    assert isinstance(load_vocoder(tmp_path / "vocoder", MelTokenizer.load(voice / "tokenizer")), UnitHifiGan)


def test_the_decoder_of_mimi_becomes_a_vocoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = MelTokenizer.fit([syllables(0)], num_units=16, settings=MelSettings(hop_samples=1280))
    tokenizer.save(tmp_path / "tokenizer")
    tiny_mimi().save_pretrained(tmp_path / "tokenizer" / "model")
    command = ["vocoder", "mimi", "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "vocoder")]
    assert cli.main(command) == 0
    assert "16 units to audio at 1200 Hz" in capsys.readouterr().out
    assert load_vocoder(tmp_path / "vocoder", tokenizer).kind == "mimi"


def test_a_file_is_resynthesised_and_its_errors_are_printed(
    voice: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("d e f g")
    source, output = voice / "in" / "0.wav", tmp_path / "out.wav"
    capsys.readouterr()
    assert resynthesize(voice, source, output, "--asr", str(voice / "asr")) == 0
    results = json.loads(capsys.readouterr().out)
    assert soundfile.info(output).frames == 3 * RATE_HZ
    assert results["files"][0]["text"] == "a b c"  # the one beside it
    assert results["word_error_rate"]["original"]["num_words"] == 3
    assert results["asr"] == str(voice / "asr")
    assert resynthesize(voice, source, output, "--asr", str(voice / "asr"), "--text", str(tmp_path / "text.txt")) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["files"][0]["text"] == "d e f g"
    assert resynthesize(voice, source, output, "--predict-durations") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["with_durations"] is False
    assert "word_error_rate" not in results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.wav", "text.txt"]


def test_a_folder_is_resynthesised_with_a_record(
    voice: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert resynthesize(voice, voice / "in", tmp_path / "out", "--asr", str(voice / "asr")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["files"], printed["failed"]) == (3, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.wav", "1.wav", "2.wav", "resynthesis.json"]
    record = json.loads((tmp_path / "out" / "resynthesis.json").read_bytes())
    assert [file["text"] for file in record["files"]] == ["a b c", None, None]
    assert record["word_error_rate"] == printed["word_error_rate"]
    rates = [file["resynthesised"] for file in record["files"]]
    assert printed["word_error_rate"]["resynthesised"]["num_words"] == np.sum([rate["num_words"] for rate in rates])


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out.mp3", [], "output is out.mp3: give the name of a .wav file"),
        ("out.wav", ["--language", "en"], "language is 'en', but there is no recogniser"),
        ("out.wav", ["--text", "none.txt"], "none.txt"),
        ("out.wav", ["--vocoder", "none"], "none is not a whole vocoder"),
    ],
)
def test_what_cannot_be_resynthesised_is_said(
    voice: Path,
    fitted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resynthesize(voice, voice / "in" / "0.wav", Path(output), *options) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_written_into_itself_and_has_no_single_text(
    voice: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resynthesize(voice, voice / "in", voice / "in" / "out") == 1
    assert "give a folder outside of it" in capsys.readouterr().err
    assert resynthesize(voice, voice / "in", tmp_path / "out", "--text", "a.txt") == 1
    assert "text is a.txt: it is for a single recording" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(modeling_mimi, "MimiDecoderModel"), reason="needs the Mimi of transformers 5.21.1")
def test_mimi_hears_and_speaks_from_the_command_line(tmp_path, capsys):
    tiny_mimi_tokenizer().save(tmp_path / "mimi")
    assert cli.main(["vocoder", "mimi", "--tokenizer", str(tmp_path / "mimi"), "--output", str(tmp_path / "v")]) == 0
    save_wav(tmp_path / "in.wav", noise(1.0, 24_000, 0), 24_000)
    folders = ["--tokenizer", str(tmp_path / "mimi"), "--vocoder", str(tmp_path / "v")]
    assert cli.main(["resynthesize", str(tmp_path / "in.wav"), str(tmp_path / "out.wav"), *folders]) == 0
    heard = soundfile.info(tmp_path / "out.wav")
    assert (heard.samplerate, round(heard.duration, 1)) == (24_000, 1.0)
