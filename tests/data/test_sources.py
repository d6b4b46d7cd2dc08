"""Sources: what a manifest or folder gives row by row, and what is refused."""

import gzip
import json

import numpy as np
import pytest
import soundfile
from tests.data.conftest import RATE_HZ, quarantine, sound, spoken_row, write_manifest

from smoltolk.data.corpora import open_source
from smoltolk.data.prepare import prepare
from smoltolk.data.sources import AUDIO_SUFFIXES, RowSource, SourceRow, audio_files, folder_source, manifest_source
from smoltolk.data.store import Store


def rows_of(source, rows_per_piece=100):
    return [row for piece in source.pieces(rows_per_piece) for row in piece.rows()]


def test_pieces_hold_all_rows_in_order_and_the_scan_counts_them(tmp_path):
    path = write_manifest(tmp_path, [{"text": "one", "id": str(number)} for number in range(7)])
    source = manifest_source(path)
    scan = source.scan(3)
    assert (scan.num_rows, scan.num_pieces) == (7, 3)
    assert [len(list(piece.rows())) for piece in source.pieces(3)] == [3, 3, 1]
    assert [row.id for row in rows_of(source, 3)] == list("0123456")


@pytest.mark.parametrize("change", ["text", "order"])
def test_the_fingerprint_changes_with_the_rows(tmp_path, change):
    rows = [{"text": "one", "id": "a"}, {"text": "two", "id": "b"}]
    before = manifest_source(write_manifest(tmp_path, rows)).scan(10).fingerprint
    assert manifest_source(write_manifest(tmp_path, rows)).scan(10).fingerprint == before
    rows = rows[::-1] if change == "order" else [rows[0], {"text": "three", "id": "b"}]
    assert manifest_source(write_manifest(tmp_path, rows)).scan(10).fingerprint != before


def test_ids_of_equal_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr("smoltolk.data.sources.hash", lambda name: 7, raising=False)
    rows = [SourceRow(id=name, source=name, text="one") for name in "abc"]
    assert RowSource("letters", lambda: rows).scan(2).num_rows == 3
    with pytest.raises(ValueError, match=r"letters has the id 'b' twice \(b and b\)"):
        RowSource("letters", lambda: [*rows, rows[1]]).scan(2)


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    lines = ["audio,text,id", 'a.wav,"one, two",x', ",three,y"]
    rows = [{"audio": "a.wav", "text": "one, two", "id": "x"}, {"text": "three", "id": "y"}]
    written = {
        "plain.csv": "\n".join(lines).encode(),
        "windows.csv": b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n",
        "plain.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "windows.jsonl": b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode() + b"\r\n",
        "packed.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode()),
    }
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    read = {name: [(r.id, r.audio, r.text) for r in rows_of(manifest_source(tmp_path / name))] for name in written}
    assert all(found == [("x", "a.wav", "one, two"), ("y", None, "three")] for found in read.values())


@pytest.mark.parametrize("audio", ["../secret.wav", "part/../../secret.wav", "/etc/secret.wav"])
def test_audio_outside_of_the_manifests_folder_is_refused(tmp_path, audio):
    path = write_manifest(tmp_path / "in", [{"audio": audio}])
    with pytest.raises(ValueError, match=r"manifest.jsonl:1: audio is .*secret.wav', outside of the folder"):
        manifest_source(path).scan(1)


def test_audio_is_found_by_relative_and_absolute_paths_in_its_folder(tmp_path):
    audio = tmp_path / "recordings"
    rows = [{"audio": "a.wav"}, {"audio": "part/../b.wav"}, {"audio": str(audio / "c.wav")}, {"audio": "d..wav"}]
    path = write_manifest(tmp_path / "in", rows)
    with pytest.raises(ValueError, match="give the folder with all audio as --audio-folder"):
        manifest_source(path).scan(1)
    source = manifest_source(path, audio_folder=audio)
    assert source.audio_folder == audio
    assert [row.audio for row in rows_of(source)] == ["a.wav", "b.wav", "c.wav", "d..wav"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"audio": 3}, "audio is 3: give a string"),
        ({"audio": ["a.wav"]}, "audio is ['a.wav']: give a string"),
        ({"text": "a", "speaker": 7}, "speaker is 7: give a string"),
        ({"text": "a", "id": "\ud800"}, "id is '\\ud800', which is no Unicode text"),
        ({"text": "a", "word_ends_s": {"a": 1}}, "word_ends_s is {'a': 1}: give a JSON list of seconds"),
        ({"text": "a", "word_ends_s": [True]}, "word_ends_s is [True]: give a JSON list"),
        ({"text": "a", "word_ends_s": 1.5}, "word_ends_s is 1.5: give a JSON list of seconds"),
        ({"audio": "a.wav", "start_s": "soon"}, "start_s is 'soon': give seconds"),
        ({"audio": "a.wav", "end_s": [1]}, "end_s is [1.0]: give seconds"),
        ({"text": "a", "start_s": 1}, "start_s is 1.0 without audio"),
        ({"id": "a"}, "has neither audio nor text in any row"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_with_its_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=r".") as error:
        manifest_source(write_manifest(tmp_path, [row])).scan(1)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("audio,text,text\na,b,c\n", "has the column 'text' twice"),
        ('text\n"one\n', "is not CSV"),
        ("speaker\nann\n", "neither audio nor text in any row"),
    ],
)
def test_a_csv_file_of_wrong_form_is_refused(tmp_path, content, message):
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        manifest_source(tmp_path / "m.csv").scan(1)


def test_a_broken_gzip_file_is_refused(tmp_path):
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n')[:-9])
    with pytest.raises(ValueError, match=r"m.jsonl.gz is broken"):
        manifest_source(tmp_path / "m.jsonl.gz").scan(1)


def test_a_split_that_training_never_draws_from_is_refused_unless_it_is_said_what_becomes_of_it(tmp_path):
    names = ["train", "validation", "test", "dev-clean", None, "", "probe"]
    path = write_manifest(tmp_path, [{"text": "a", "id": str(i), "split": name} for i, name in enumerate(names)])
    message = r"m\w*.jsonl:4: split is 'dev-clean', which training never draws from; .*--split dev-clean=validation"
    with pytest.raises(ValueError, match=message):
        manifest_source(path).scan(1)
    splits = {"dev-clean": "validation", "probe": "probe", "train": "test"}
    rows = rows_of(manifest_source(path, splits=splits))
    assert [row.split for row in rows] == ["test", "validation", "test", "validation", None, None, "probe"]
    with pytest.raises(ValueError, match="splits makes 'a' 'valid': choose train, validation, test, or 'a' to keep it"):
        manifest_source(path, splits={"a": "valid"}).scan(1)


def test_named_columns_are_read_and_no_others(tmp_path):
    rows = [{"sentence": "one", "path": "a.wav", "client": 3}]
    path = write_manifest(tmp_path, rows)
    with pytest.raises(ValueError, match=r"unknown column 'sentence'.*say with --columns"):
        manifest_source(path).scan(1)
    (row,) = rows_of(manifest_source(path, columns={"text": "sentence", "audio": "path"}))
    assert (row.text, row.audio) == ("one", "a.wav")
    with pytest.raises(ValueError, match="has no column 'words': it has sentence, path, client"):
        manifest_source(path, columns={"text": "words"}).scan(1)
    with pytest.raises(ValueError, match="columns names 'txt': columns are id"):
        manifest_source(path, columns={"txt": "sentence"}).scan(1)


def test_one_column_of_a_manifest_can_be_two_of_ours(tmp_path):
    path = write_manifest(tmp_path, [{"path": "a.wav", "sentence": "one"}])
    (row,) = rows_of(manifest_source(path, columns={"audio": "path", "id": "path", "text": "sentence"}))
    assert (row.audio, row.id, row.text) == ("a.wav", "a.wav", "one")


def test_parts_of_a_recording_are_utterances(tmp_path, tokenizers):
    folder = tmp_path / "in"
    folder.mkdir()
    audio = np.concatenate([sound(1, 1.0), sound(2, 1.0)])
    soundfile.write(folder / "long.flac", audio, RATE_HZ)
    soundfile.write(folder / "cut.flac", audio[RATE_HZ // 2 : 3 * RATE_HZ // 2], RATE_HZ)
    rows = [
        {"audio": "long.flac", "start_s": 0.5, "end_s": 1.5, "text": "one", "word_ends_s": [0.9]},
        {"audio": "long.flac", "start_s": 1.5},
        {"audio": "long.flac", "end_s": 2.05},
        {"audio": "long.flac", "start_s": 1.0, "end_s": 3.0},
        {"audio": "long.flac", "start_s": 1.0, "end_s": 0.5},
        {"audio": "none.flac", "start_s": 1.0},
        {"audio": "manifest.jsonl", "start_s": 1.0},
        {"audio": "cut.flac", "id": "cut"},
    ]
    prepare(write_manifest(folder, rows), tmp_path / "out", **tokenizers)
    store = Store(tmp_path / "out")
    found = {store[row].id: store[row] for row in range(len(store))}
    assert {name: u.seconds for name, u in found.items()} == {
        "manifest.jsonl:1": 1.0,
        "manifest.jsonl:2": 0.5,
        "manifest.jsonl:3": 2.0,  # corpora round their times
        "cut": 1.0,
    }
    assert found["manifest.jsonl:1"].units.tolist() == found["cut"].units.tolist()
    reasons = [entry["reason"] for entry in quarantine(tmp_path / "out")]
    assert reasons == [
        "long.flac has no part from 1.000 to 3.000 s, it lasts 2.000 s: correct the times",
        "long.flac has no part from 1.000 to 0.500 s, it lasts 2.000 s: correct the times",
        "none.flac cannot be read (No such file or directory): correct the path",
        "manifest.jsonl cannot be decoded (Format not recognised.): it is broken or no audio; copy it again or "
        "convert it to WAV",
    ]


def test_a_folders_transcripts_lose_byte_order_marks_and_last_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone two\r\n")
    (row,) = rows_of(folder_source(tmp_path))
    assert row.text == "one two"


def test_recordings_of_all_kinds_are_rows_and_those_without_a_decoder_are_quarantined(tmp_path, tokenizers):
    names = [f"{number:02d}{suffix}" for number, suffix in enumerate(sorted(AUDIO_SUFFIXES))] + ["Memo.M4A"]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(b"no audio of any kind")
        (tmp_path / "in" / f"{name.partition('.')[0]}.txt").write_text(f"words of {name}")
    soundfile.write(tmp_path / "in" / "z.caf", sound(1), RATE_HZ)
    assert {".m4a", ".opus", ".aac", ".webm", ".wma", ".mp4", ".amr", ".m4b", ".caf", ".au", ".w64", ".oga"} <= {
        *AUDIO_SUFFIXES
    }
    rows = rows_of(folder_source(tmp_path / "in"))
    assert {row.audio: row.text for row in rows} == {name: f"words of {name}" for name in names} | {"z.caf": None}
    prepare(tmp_path / "in", tmp_path / "out", **tokenizers)
    assert [utterance.id for utterance in Store(tmp_path / "out")] == ["z.caf"]
    entries = quarantine(tmp_path / "out")
    assert sorted(entry["id"] for entry in entries) == sorted(names)
    assert all(entry["id"] in entry["reason"] for entry in entries)


def test_linked_folders_are_followed_and_cycles_end(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b").mkdir(parents=True)
    for path in ("elsewhere/1.wav", "elsewhere/deep/2.wav", "in/b/3.wav"):
        (tmp_path / path).touch()
    (tmp_path / "in" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "b" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere")
    names = ["a/1.wav", "a/deep/2.wav", "b/3.wav"]
    assert [row.audio for row in rows_of(folder_source(tmp_path / "in"))] == names
    assert audio_files([tmp_path / "in"]) == [tmp_path / "in" / name for name in names]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("librispech:/data", {}, "neither a file nor a known corpus: known are librispeech:"),
        ("none.jsonl", {}, "does not exist"),
        ("librispeech:/none", {}, "/none is not a folder"),
        ("libriheavy:/none.jsonl.gz", {}, "is not a file"),
        ("librispeech:/data", {"columns": {"text": "a"}}, "leave out --columns"),
        ("librispeech:/data", {"audio_folder": "a"}, "leave out --audio-folder"),
        ("fineweb-edu", {"audio_folder": "a"}, "leave out --audio-folder"),
        ("python-edu", {}, "is not whole on the hub"),
        ("text:/none.doc", {}, "of no known kind"),
        (".", {"columns": {"text": "a"}}, "leave out --columns"),
    ],
)
def test_a_source_that_is_not_there_is_said(name, options, message):
    with pytest.raises(ValueError, match=r".") as error:
        open_source(name, **options).scan(1)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "tokens", "reason"),
    [
        ("", None, "no words"),
        (" \n ", None, "no words"),
        ("один два 三 أربعة नमस्ते", 5, None),
        ("one 😀 👩‍👩‍👧 two", None, None),
        ("12 345 6.7", None, None),
        ("one\ttwo\nthree\r\nfour", 4, None),
        ("one\x00two", None, "text has the character '\\x00' at 3"),
        ("one \x1b[0m", None, "text has the character '\\x1b' at 4"),
        ("one \udc80", None, "text has the character '\\udc80' at 4"),
        ("one " + "a." * 150, None, "has 300 tokens: every word needs 1 to 255"),
        ("a" * 100_000, 1, None),
        ("one two three four " * 25_000, 100_000, None),
    ],
)
def test_unusual_texts_are_kept_or_quarantined_with_their_reason(tmp_path, tokenizers, text, tokens, reason):
    source = write_manifest(tmp_path, [{"text": text, "id": "row"}, {"text": "one", "id": "good"}])
    prepare(source, tmp_path / "out", **tokenizers)
    store = Store(tmp_path / "out")
    if reason is None:
        assert store[0].text == text
        assert tokens is None or len(store[0].text_ids) == tokens
        assert len(store[0].word_token_counts) == len(text.split())
    else:
        assert reason in quarantine(tmp_path / "out")[0]["reason"]
    assert store[len(store) - 1].id == "good"


def test_a_row_of_a_folder_can_be_silent_while_others_in_its_batch_are_not(tmp_path, tokenizers):
    for number in range(4):
        spoken_row(tmp_path / "in", number)
    soundfile.write(tmp_path / "in" / "1.wav", np.zeros(RATE_HZ), RATE_HZ)
    (tmp_path / "in" / "2.wav").write_bytes(b"RIFF")
    prepare(tmp_path / "in", tmp_path / "out", **tokenizers)
    assert [Store(tmp_path / "out")[row].id for row in range(2)] == ["0.wav", "3.wav"]
    reasons = [entry["reason"] for entry in quarantine(tmp_path / "out")]
    assert reasons[0].startswith("1.wav is silent")
    assert reasons[1].startswith("2.wav cannot be decoded")
