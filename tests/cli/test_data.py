"""`smoltolk prepare`: what it takes, prints and refuses."""

import pytest
import soundfile
from tests.conftest import tiny_text_tokenizer
from tests.data.conftest import RATE_HZ, sound, write_manifest

from smoltolk import cli
from smoltolk.data.store import Store
from smoltolk.speech.mel import MelTokenizer


@pytest.fixture
def command(tmp_path):
    """A small manifest, tokenizers in folders, and the command that prepares them."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / "in" / f"{number}.wav", sound(number), RATE_HZ)
    rows = [{"path": f"{number}.wav", "words": "w1 w2"} for number in range(4)]
    source = write_manifest(tmp_path / "in", rows)
    MelTokenizer.fit([sound(seed) for seed in range(4)], num_units=8).save(tmp_path / "speech")
    tiny_text_tokenizer().save_pretrained(tmp_path / "text")
    return [
        *("prepare", str(source), str(tmp_path / "out"), "--columns", "audio=path", "text=words"),
        *("--speech-tokenizer", str(tmp_path / "speech"), "--text-tokenizer", str(tmp_path / "text")),
    ]


def test_it_prints_a_summary_and_draws_it(command, tmp_path, capsys):
    assert cli.main([*command, "--rows-per-shard", "2", "--batch-seconds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "3 utterances (3 train), 0.0 min, 6 words" in printed
    assert "3 of them have no word times" in printed
    assert "1 rows (25.00%) could not be used" in printed
    assert "  1 × it cannot be read (No such file or directory)" in printed
    assert (tmp_path / "out" / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert [shard.rows for shard in Store(tmp_path / "out").shards] == [2, 1]


def test_rows_whose_reasons_are_not_shown_are_counted(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.data, "NUM_REASONS", 0)
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "quarantine.jsonl:\n  and 1 rows for other reasons" in printed


def test_the_names_of_splits_are_mapped(tmp_path, capsys):
    tiny_text_tokenizer().save_pretrained(tmp_path / "text")
    rows = [{"text": "w1", "id": name, "split": name} for name in ("train", "valid")]
    command = ["prepare", str(write_manifest(tmp_path, rows)), str(tmp_path / "out")]
    command += ["--text-tokenizer", str(tmp_path / "text")]
    assert cli.main(command) == 1
    assert "split is 'valid', which training never draws from" in capsys.readouterr().err
    assert cli.main([*command, "--split", "valid=train", "valid=test"]) == 1
    assert "--split names one of their splits twice: valid=train valid=test" in capsys.readouterr().err
    assert cli.main([*command, "--split", "valid=validation"]) == 0
    assert "2 utterances (1 train, 1 validation)" in capsys.readouterr().out


def test_a_part_says_that_others_are_missing(command, tmp_path, capsys):
    command += ["--rows-per-shard", "2"]
    assert cli.main([*command, "--part", "2/2"]) == 0
    assert "part 2/2 is done, other parts are not" in capsys.readouterr().out
    assert cli.main([*command, "--part", "1/2"]) == 0
    assert "3 utterances" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-confidence", "0.5"], "belong to an aligner"),
        (["--part", "3/2"], "part is 3/2: count parts from 1"),
        (["--gpus-per-worker", "1"], "with the engine ray only"),
        (["--batch-seconds", "0"], "batch_s is 0.0"),
        (["--join", "nowhere"], "nowhere holds no part of a preparation"),
        (["--columns", "text=none"], "has no column 'none'"),
    ],
)
def test_bad_options_are_said_in_one_line(command, options, message, capsys):
    assert cli.main([*command, *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("option", "value"), [("--part", "a/b"), ("--columns", "text"), ("--engine", "spark")])
def test_options_of_wrong_form_are_refused(command, option, value, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command, option, value])
    assert option in capsys.readouterr().err


def test_an_aligner_is_made_as_the_options_say(command, monkeypatch):
    made = []

    def make_aligner(kind, model=None, min_confidence=None, device=None):
        made.append((kind, model, min_confidence, device))
        raise ImportError("pip install 'smoltolk[align]'")

    monkeypatch.setattr("smoltolk.speech.kinds.make_aligner", make_aligner)
    assert cli.main([*command, "--aligner", "ctc", "--aligner-model", "m", "--min-confidence", "0.5"]) == 1
    assert made == [("ctc", "m", 0.5, "cpu")]
