"""Faults that an outsider found in preparation, and that must not come back."""

import os

import numpy as np
import pytest
import soundfile
from tests.data.conftest import RATE_HZ, contents, quarantine, sound, spoken_row, write_manifest

from smoltolk import cli
from smoltolk.data.prepare import prepare
from smoltolk.data.store import Store
from smoltolk.speech.audio import AudioError, load_audio, load_part


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, sound(1, 3.0), RATE_HZ)
    return path


def test_a_part_is_what_a_whole_recording_has_there(recording):
    whole = load_audio(recording, sample_rate_hz=RATE_HZ)
    for source in (recording, recording.read_bytes()):
        part = load_part(source, sample_rate_hz=RATE_HZ, start_s=0.5, end_s=1.25)
        np.testing.assert_array_equal(part, whole[8000:20000])
        np.testing.assert_array_equal(load_part(source, sample_rate_hz=RATE_HZ), whole)
    with pytest.raises(AudioError, match=r"has no part from 2\.000 to 3\.500 s, it lasts 3\.000 s"):
        load_part(recording, sample_rate_hz=RATE_HZ, start_s=2, end_s=3.5)


def test_parts_of_a_truncated_recording_are_refused_wherever_they_are(recording):
    data = recording.read_bytes()
    recording.write_bytes(data[: len(data) // 2])
    for source in (recording, recording.read_bytes()):
        with pytest.raises(AudioError, match=r"is truncated \(\d+ bytes are missing\)"):
            load_part(source, sample_rate_hz=RATE_HZ, start_s=0.1, end_s=0.6)
    recording.write_bytes(data)  # copied again: looked at again
    load_part(recording, sample_rate_hz=RATE_HZ, start_s=0.1, end_s=0.6)


def test_a_folder_with_other_files_is_no_output(tmp_path, tokenizers):
    source = write_manifest(tmp_path / "in", [spoken_row(tmp_path / "in", 0)])
    mine = tmp_path / "out" / "blocks" / "my.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for output in (tmp_path / "out", tmp_path / "in"):
        with pytest.raises(ValueError, match="which is not ours: choose an empty folder"):
            prepare(source, output, **tokenizers)
    assert mine.read_text() == "mine"


def test_going_on_in_another_precision_is_refused(tmp_path, tokenizers):
    source = write_manifest(tmp_path / "in", [spoken_row(tmp_path / "in", 0)])
    prepare(source, tmp_path / "out", **tokenizers)
    with pytest.raises(ValueError, match="dtype was 'float32', is 'bfloat16'"):
        prepare(source, tmp_path / "out", dtype="bfloat16", **tokenizers)


def test_a_file_name_that_is_no_unicode_is_quarantined_alone(tmp_path, tokenizers):
    folder = tmp_path / "in"
    spoken_row(folder, 0)
    os.rename(os.fsencode(folder / "0.wav"), os.fsencode(folder) + b"/caf\xe9.wav")
    spoken_row(folder, 1)
    summary = prepare(folder, tmp_path / "out", **tokenizers)
    assert (summary.utterances, summary.quarantined) == (1, 1)
    assert "caf" in quarantine(tmp_path / "out")[0]["id"]


def test_few_recordings_are_shared_by_several_parts_and_empty_parts_are_joined(tmp_path, tokenizers):
    rows = [spoken_row(tmp_path / "in", number) for number in range(5)]
    source = write_manifest(tmp_path / "in", rows)
    prepare(source, tmp_path / "whole", **tokenizers)
    parts = [tmp_path / f"part{number}" for number in range(1, 9)]
    for number, part in enumerate(parts, start=1):
        assert prepare(source, part, part=(number, 8), **tokenizers) is None
    prepare(source, tmp_path / "joined", join=parts, **tokenizers)
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="is a whole store already: use it as it is"):
        prepare(source, tmp_path / "again", join=[tmp_path / "whole"], **tokenizers)


def test_the_command_says_when_a_store_was_finished_before_and_refuses_a_column_twice(tmp_path, tokenizers, capsys):
    source = write_manifest(tmp_path / "in", [spoken_row(tmp_path / "in", 0)])
    tokenizers["speech_tokenizer"].save(tmp_path / "speech")
    tokenizers["text_tokenizer"].save_pretrained(tmp_path / "text")
    command = ["prepare", str(source), str(tmp_path / "out"), "--speech-tokenizer", str(tmp_path / "speech")]
    command += ["--text-tokenizer", str(tmp_path / "text")]
    assert cli.main(command) == 0
    assert "finished before" not in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "was finished before, and rows in quarantine stay there" in capsys.readouterr().out
    assert cli.main([*command, "--columns", "text=text", "text=audio"]) == 1
    assert "names one of our columns twice" in capsys.readouterr().err
    assert len(Store(tmp_path / "out")) == 1
