"""Preparation: what goes in, what is quarantined, and that a killed run goes on to the same store."""

import errno
import io
import json
import os
import shutil

import numpy as np
import pytest
import soundfile
from tests.data.conftest import RATE_HZ, contents, mixed_manifest, quarantine, sound, spoken_row, write_manifest

from smoltolk.data import store as store_module
from smoltolk.data.prepare import prepare
from smoltolk.data.sources import RowSource, SourceRow, audio_files, read_manifest
from smoltolk.data.store import Store
from smoltolk.speech.mel import MelTokenizer


def test_rows_of_all_kinds_become_a_store_and_bad_ones_are_quarantined(tmp_path, tokenizers):
    source = mixed_manifest(tmp_path / "in")
    summary = prepare(source, tmp_path / "out", **tokenizers, rows_per_shard=3)
    store = Store(tmp_path / "out")
    store.verify()
    assert len(store) == summary.utterances == 8
    assert [shard.rows for shard in store.shards] == [3, 2, 2, 1]
    assert [store[row].id for row in range(8)] == [
        *("0.wav", "1.wav", "text-only", "3.wav", "4.wav", "6.wav", "8.wav", "9.wav")
    ]
    first, text_only, speech_only = store[0], store[2], store[4]
    assert first.text_ids.tolist() == [1, 2]
    encoded = tokenizers["speech_tokenizer"].encode(soundfile.read(tmp_path / "in" / "0.wav", dtype="float32")[0])
    assert first.units.tolist() == encoded.units.tolist()
    assert first.unit_durations.tolist() == encoded.durations.tolist()
    assert first.seconds == 0.5
    assert first.word_ends_s == pytest.approx([0.2, 0.45])
    assert not text_only.has_speech
    assert text_only.source == "manifest.jsonl:3"
    assert not speech_only.has_text
    assert (speech_only.speaker, speech_only.split) == ("ann", "test")
    bad = quarantine(tmp_path / "out")
    assert [(entry["id"], entry["source"]) for entry in bad] == [("missing.wav",) * 2, ("7.wav",) * 2]
    assert "missing.wav cannot be read" in bad[0]["reason"]
    assert "runs backwards" in bad[1]["reason"]
    assert summary.quarantined == 2
    assert summary.words == 14
    assert summary.hours == pytest.approx(7 * 0.5 / 3600)
    assert summary.units_per_s == pytest.approx(summary.units / 3.5)
    assert summary.splits["train"] >= 6


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"audio": "0.wav", "text": " ", "word_ends_s": []}, "no words"),
        ({"audio": "0.wav", "text": "one", "word_ends_s": [9.0]}, "past the 0.500 s of audio"),
        ({"audio": "0.wav", "text": "one two", "word_ends_s": [0.1]}, "1 entries for 2 words"),
        ({"text": "one", "word_ends_s": [0.1]}, "without both text and speech"),
        ({"speaker": "ann"}, "neither text nor speech"),
        ({"audio": "broken.wav"}, "broken.wav"),
        ({"audio": "silent.wav"}, "silent.wav"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_reason(tmp_path, tokenizers, row, reason):
    spoken_row(tmp_path / "in", 0)
    (tmp_path / "in" / "broken.wav").write_bytes(b"RIFF no audio")
    soundfile.write(tmp_path / "in" / "silent.wav", np.zeros(RATE_HZ), RATE_HZ)
    source = write_manifest(tmp_path / "in", [row, {"text": "one"}])
    prepare(source, tmp_path / "out", **tokenizers)
    assert reason in quarantine(tmp_path / "out")[0]["reason"]
    assert Store(tmp_path / "out")[0].text == "one"


def test_a_csv_manifest_gives_the_store_of_the_jsonl_one(tmp_path, tokenizers):
    spoken_row(tmp_path / "in", 0)
    spoken_row(tmp_path / "in", 1)
    (tmp_path / "in" / "manifest.csv").write_text(
        'audio,text,word_ends_s,id\n0.wav,one two,"[0.2, 0.45]",a\n1.wav,,,b\n,"three, four",,c\n'
    )
    prepare(tmp_path / "in" / "manifest.csv", tmp_path / "out", **tokenizers)
    store = Store(tmp_path / "out")
    assert [store[row].id for row in range(3)] == ["a", "b", "c"]
    assert store[0].word_ends_s == pytest.approx([0.2, 0.45])
    assert store[1].text is None
    assert store[2].units is None
    assert quarantine(tmp_path / "out") == []


def test_a_folder_is_read_with_the_texts_beside_its_audio(tmp_path, tokenizers):
    spoken_row(tmp_path / "in", 0)
    (tmp_path / "in" / "part").mkdir()
    soundfile.write(tmp_path / "in" / "part" / "1.flac", sound(1), RATE_HZ)
    (tmp_path / "in" / "part" / "1.txt").write_text("one two")
    (tmp_path / "in" / "2.txt").write_text("one two")
    (tmp_path / "in" / "3.txt").write_bytes(b"\xff\xfe")
    prepare(tmp_path / "in", tmp_path / "out", **tokenizers)
    store = Store(tmp_path / "out")
    assert [(store[row].id, store[row].has_text, store[row].has_speech) for row in range(3)] == [
        ("0.wav", False, True),
        ("2.txt", True, False),
        ("part/1.flac", True, True),
    ]
    assert [entry["id"] for entry in quarantine(tmp_path / "out")] == ["3.txt"]
    assert "UTF-8" in quarantine(tmp_path / "out")[0]["reason"]


def test_validation_rows_are_drawn_by_their_share_from_the_id_alone(tmp_path, tokenizers):
    rows = [{"id": f"row-{number}", "text": "one"} for number in range(400)]
    a, b = tmp_path / "out-a", tmp_path / "out-b"
    prepare(write_manifest(tmp_path / "a", rows), a, **tokenizers, validation_share=0.3)
    prepare(write_manifest(tmp_path / "b", rows[::-2]), b, **tokenizers, validation_share=0.3)
    a, b = Store(a), Store(b)
    assert len(a.ids_of_split("train")) == pytest.approx(280, abs=30)
    split_of = {a[row].id: a[row].split for row in range(400)}
    assert all(split_of[b[row].id] == b[row].split for row in range(200))


def test_audio_files_are_found_in_folders_and_in_order(tmp_path):
    for name in ("b.WAV", "a.flac", "notes.txt", "part/c.mp3"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = audio_files([tmp_path / "z.raw", tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["z.raw", "a.flac", "b.WAV", "part/c.mp3"]


def test_manifests_of_other_columns_are_read_for_others(tmp_path):
    (tmp_path / "items.csv").write_text("id,prompt_text\na,once upon\nb,\n")
    rows = list(read_manifest(tmp_path / "items.csv"))
    assert rows == [{"id": "a", "prompt_text": "once upon"}, {"id": "b", "prompt_text": None}]


def test_ctrl_c_at_any_write_leaves_work_that_goes_on(tmp_path, tokenizers, monkeypatch):
    source = mixed_manifest(tmp_path / "in")
    whole = prepare(source, tmp_path / "whole", **tokenizers, rows_per_shard=4)
    replace, interrupted = os.replace, []

    def interrupt_once_per_file(aside, path):
        if path not in interrupted:
            interrupted.append(path)
            raise KeyboardInterrupt
        replace(aside, path)

    monkeypatch.setattr(os, "replace", interrupt_once_per_file)
    summary = None
    while summary is None:
        try:
            summary = prepare(source, tmp_path / "out", **tokenizers, rows_per_shard=4)
        except KeyboardInterrupt:
            assert not list((tmp_path / "out").rglob("*.part"))
    # settings; a shard, a record and an end for each of 3 pieces; quarantine, summary, begin of moving; 3 moves;
    # manifest
    assert len(interrupted) == 1 + 9 + 3 + 3 + 1
    assert summary == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_finished_preparation_is_not_done_again(tmp_path, tokenizers, monkeypatch):
    source = mixed_manifest(tmp_path / "in")
    summary = prepare(source, tmp_path / "out", **tokenizers)
    monkeypatch.setattr("smoltolk.data.prepare.Preparer.prepare", None)
    assert prepare(source, tmp_path / "out", **tokenizers) == summary


def test_going_on_with_other_settings_is_refused_with_both_values(tmp_path, tokenizers):
    source = mixed_manifest(tmp_path / "in")
    prepare(source, tmp_path / "out", **tokenizers)
    with pytest.raises(ValueError, match="rows_per_shard was 1, is 7"):
        prepare(source, tmp_path / "out", **tokenizers, rows_per_shard=7)
    other = tokenizers | {"speech_tokenizer": MelTokenizer.fit([sound(1), sound(2)], num_units=8)}
    with pytest.raises(ValueError, match="speech_tokenizer was"):
        prepare(source, tmp_path / "out", **other)
    with open(source, "a") as file:
        file.write(json.dumps({"text": "one"}) + "\n")
    with pytest.raises(ValueError, match="source_rows was 10, is 11; source_sha256 was"):
        prepare(source, tmp_path / "out", **tokenizers)


def test_audio_that_changes_between_two_starts_is_refused_with_its_name(tmp_path, tokenizers):
    source, half = mixed_manifest(tmp_path / "in"), {"part": (1, 2), "rows_per_shard": 3}
    prepare(source, tmp_path / "out", **tokenizers, **half)  # rows 0 to 2 and 6 to 8
    prepare(source, tmp_path / "out", **tokenizers, **half)
    recording, folder = tmp_path / "in" / "1.wav", tmp_path / "out" / "blocks" / "00000"
    os.utime(tmp_path / "in" / "4.wav")  # of the other part, which has not begun
    for change in (lambda: os.utime(recording), lambda: soundfile.write(recording, sound(1)[:-800], RATE_HZ)):
        change()
        with pytest.raises(ValueError, match=rf"1.wav has changed since .*bytes of .* UTC.*delete {folder}: the rows"):
            prepare(source, tmp_path / "out", **tokenizers, **half)
    os.utime(tmp_path / "in" / "8.wav")
    with pytest.raises(ValueError, match=r"1.wav and 1 other files have changed .*/00000, .*/00002: the rows"):
        prepare(source, tmp_path / "out", **tokenizers, **half)
    for number in (0, 2):
        shutil.rmtree(tmp_path / "out" / "blocks" / f"{number:05d}")
    assert prepare(source, tmp_path / "out", **tokenizers, rows_per_shard=3).utterances == 8
    prepare(source, tmp_path / "new", **tokenizers, rows_per_shard=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_audio_that_comes_is_refused_and_audio_that_goes_is_none_of_the_next_starts_business(tmp_path, tokenizers):
    source = mixed_manifest(tmp_path / "in")
    prepare(source, tmp_path / "out", **tokenizers, part=(2, 2), rows_per_shard=3)  # rows 3 to 5 and 9
    (tmp_path / "in" / "3.wav").unlink()
    prepare(source, tmp_path / "out", **tokenizers, part=(2, 2), rows_per_shard=3)
    soundfile.write(tmp_path / "in" / "missing.wav", sound(1), RATE_HZ)
    with pytest.raises(ValueError, match=r"missing.wav has changed since .*was not there, is \d+ bytes of"):
        prepare(source, tmp_path / "out", **tokenizers, part=(2, 2), rows_per_shard=3)
    # On the machine that joins, files have times of their own.
    assert prepare(source, tmp_path / "whole", **tokenizers, join=[tmp_path / "out"], rows_per_shard=3).utterances == 8


def test_a_change_of_an_archive_is_noticed_and_bytes_have_no_file(tmp_path, tokenizers):
    recordings = [wav(number) for number in range(4)]
    archive = tmp_path / "audio.tar"
    archive.write_bytes(b"".join(recordings))
    starts = [sum(map(len, recordings[:number])) for number in range(4)]
    rows = [
        SourceRow(str(number), str(number), "audio.tar", byte_range=(start, len(recordings[number])))
        for number, start in enumerate(starts)
    ]
    rows.append(SourceRow("bytes", "bytes", recordings[0]))
    source = RowSource("made", lambda: rows, tmp_path)
    settings = {**tokenizers, "rows_per_shard": 2, "part": (1, 2)}
    prepare(source, tmp_path / "out", **settings)  # rows 0, 1 and the bytes
    record = json.loads((tmp_path / "out" / "blocks" / "00002" / "00000.json").read_bytes())
    assert (record["shard"]["rows"], record["files"]) == (1, {})
    prepare(source, tmp_path / "out", **settings)
    os.utime(archive)
    with pytest.raises(ValueError, match=r"audio.tar has changed since .*delete .*/00000: the rows"):
        prepare(source, tmp_path / "out", **settings)


def wav(seed):
    file = io.BytesIO()
    soundfile.write(file, sound(seed), RATE_HZ, format="WAV")
    return file.getvalue()


def test_a_full_disk_names_the_path_and_leaves_work_that_goes_on(tmp_path, tokenizers, monkeypatch):
    source = mixed_manifest(tmp_path / "in")
    prepare(source, tmp_path / "whole", **tokenizers, rows_per_shard=4)
    replace = os.replace

    def full(aside, path):
        if path.parent.name == "00001":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(aside, path)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device; finished blocks are kept.*00001/shard-0") as error:
        prepare(source, tmp_path / "out", **tokenizers, rows_per_shard=4)
    assert (tmp_path / "out" / "blocks" / "00000" / "done.json").exists()
    assert error.value.errno == errno.ENOSPC
    assert not list((tmp_path / "out").rglob("*.part"))
    monkeypatch.undo()
    prepare(source, tmp_path / "out", **tokenizers, rows_per_shard=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", '{"text": "one"}\n{"text": ', "m.jsonl:2 is not JSON"),
        ("m.jsonl", "[1]\n", "m.jsonl:1 is not a JSON object"),
        ("m.jsonl", '{"txt": "one"}\n', "unknown column 'txt': columns are id, audio, text"),
        ("m.jsonl", '{"text": 3}\n', "text is 3: give a string"),
        ("m.jsonl", '{"text": "a", "word_ends_s": "[1"}\n', "word_ends_s is '[1'"),
        (
            "m.jsonl",
            '{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n',
            "'x' twice (m.jsonl:1 and m.jsonl:2)",
        ),
        ("m.jsonl", "\n", "has no rows"),
        ("m.csv", "text\none,two\n", "m.csv:2 has more cells than the header"),
        ("m.csv", 'text,word_ends_s\none,"[0.1"\n', "word_ends_s is '[0.1'"),
        ("m.txt", "", "of no known kind"),
        ("m.jsonl", None, "does not exist"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_with_its_line(tmp_path, tokenizers, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r".") as error:
        prepare(tmp_path / name, tmp_path / "out", **tokenizers)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_manifest_in_another_encoding_is_refused(tmp_path, tokenizers):
    (tmp_path / "m.csv").write_bytes("text\nnaïve\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        prepare(tmp_path / "m.csv", tmp_path / "out", **tokenizers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"validation_share": 1.5}, "validation_share is 1.5"),
        ({"speech_tokenizer": None}, "0.wav has audio, but speech_tokenizer is None"),
        ({"text_tokenizer": None}, "0.wav has text, but text_tokenizer is None"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, tokenizers, changes, message):
    source = mixed_manifest(tmp_path / "in")
    with pytest.raises(ValueError, match=r".") as error:
        prepare(source, tmp_path / "out", **(tokenizers | changes))
    assert message in str(error.value)


def test_a_second_preparation_at_the_same_time_is_refused(tmp_path, tokenizers):
    source = mixed_manifest(tmp_path / "in")
    with (
        store_module.lock(tmp_path / "out"),
        pytest.raises(ValueError, match="being written by another process"),
    ):
        prepare(source, tmp_path / "out", **tokenizers)


def test_text_and_audio_without_word_times_are_kept_but_never_interleaved(tmp_path, tokenizers):
    spoken_row(tmp_path / "in", 0)
    source = write_manifest(tmp_path / "in", [spoken_row(tmp_path / "in", 1), {"audio": "0.wav", "text": "one two"}])
    summary = prepare(source, tmp_path / "out", **tokenizers)
    assert (summary.utterances, summary.unaligned, summary.quarantined) == (2, 1, 0)
    store = Store(tmp_path / "out")
    assert [len(store.ids_of_split("train", **{half: True})) for half in ("has_text", "has_speech")] == [2, 2]
    assert store.ids_of_split("train", is_aligned=True).tolist() == [0]
    assert [store[i].is_aligned for i in range(2)] == [True, False]
