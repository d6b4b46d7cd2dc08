"""The check of a store: every fault is found and named, none stops it, and sound stores have none."""

import fcntl
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import SPEECH_CARD, tiny_text_tokenizer, tiny_utterances

from smoltolk import cli
from smoltolk.data import shard as shard_module
from smoltolk.data import store as store_module
from smoltolk.data import utterance as utterance_module
from smoltolk.data.check import Limits, check_store
from smoltolk.data.corpora import open_source
from smoltolk.data.prepare import prepare
from smoltolk.data.store import MANIFEST, StoreWriter, write_shard, write_store
from smoltolk.data.text import tokenizer_fingerprint
from smoltolk.data.utterance import StoreMetadata, Utterance
from smoltolk.data.work_folder import BLOCKS, QUARANTINE, SETTINGS

TOKENIZER = tiny_text_tokenizer()
TOKENIZERS = {"text_tokenizer_fingerprint": tokenizer_fingerprint(TOKENIZER), "speech_tokenizer": SPEECH_CARD}
ROWS = list(tiny_utterances(TOKENIZER, count=12))
SLOW = Limits(words_per_s=(0, 100), word_s=100, units_per_s=0)  # the random rows are no ordinary speech


def make_store(path, rows=ROWS, **settings):
    write_store(path, rows, **(TOKENIZERS | {"rows_per_shard": 5} | settings))
    return path


def found(path, **settings):
    report = check_store(path, progress=False, **({"limits": SLOW} | settings))
    return {finding.kind: finding for finding in report.findings}


def faults(path, **settings):
    return [kind for kind, finding in found(path, **settings).items() if finding.is_fault]


def change_manifest(path, change):
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def unchecked_store(path, rows, monkeypatch):
    """A store of rows that the writer would refuse."""
    monkeypatch.setattr(store_module, "check_utterance", lambda *_: None)
    with StoreWriter(path, **TOKENIZERS) as writer:
        for row in rows:
            writer.write(row)
    return path


def test_a_sound_store_has_no_findings_and_is_counted(tmp_path):
    report = check_store(
        make_store(tmp_path / "store"),
        speech_fingerprint="speech-0",
        text_tokenizer=TOKENIZER,
        limits=SLOW,
        progress=False,
    )
    assert report.findings == ()
    assert report.is_sound
    assert report.rows == 12
    assert report.splits == {"train": 9, "validation": 3}
    assert report.words == sum(len(row.word_token_counts) for row in ROWS)
    assert report.units == sum(len(row.units) for row in ROWS)
    assert report.units_used == len(np.unique(np.concatenate([row.units for row in ROWS])))
    assert report.hours == pytest.approx(sum(row.seconds for row in ROWS) / 3600)
    words_per_s = [len(row.word_token_counts) / row.seconds for row in ROWS]
    assert report.spreads["words/s"].median == pytest.approx(np.median(words_per_s))
    assert report.spreads["words/s"].low >= min(words_per_s)


def test_nothing_in_the_folder_is_changed_by_a_check(tmp_path):
    path = make_store(tmp_path / "store")
    (path / ".x.1.part").touch()
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    check_store(path, progress=False)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder: give the folder of a store"):
        check_store(tmp_path / "none", progress=False)


@pytest.mark.parametrize(
    ("content", "kind", "example"),
    [
        ("{", "damaged manifest", "Expecting property name"),
        ("[]", "damaged manifest", "not a JSON object"),
        ("\udcff", "damaged manifest", "utf-8"),
        ('{"format_version": 2}', "damaged manifest", "lists no shards"),
        ('{"format_version": 2, "shards": [3]}', "damaged manifest", "3 is no shard"),
        ('{"format_version": 2, "shards": [{"file": "a"}]}', "damaged manifest", "is no shard"),
        ('{"format_version": 3, "shards": []}', "other format version", "version 3, this smoltolk reads 2"),
    ],
)
def test_a_damaged_manifest_is_found(tmp_path, content, kind, example):
    path = make_store(tmp_path / "store")
    (path / MANIFEST).write_bytes(content.encode(errors="surrogateescape"))
    finding = found(path)[kind]
    assert finding.is_fault
    assert example in finding.examples[0]
    assert found(path)["shard that the manifest does not list"].count == 3


def test_a_manifest_that_points_out_of_its_folder_is_not_followed(tmp_path):
    make_store(tmp_path / "other")
    path = make_store(tmp_path / "store")
    change_manifest(path, lambda manifest: manifest["shards"][0].update(file="../other/shard-00000.parquet"))
    assert faults(path) == ["damaged manifest"]


def test_all_faults_of_shards_are_found_at_once(tmp_path):
    path = make_store(tmp_path / "store", rows_per_shard=2)
    shards = sorted(path.glob("*.parquet"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-50])
    data = bytearray(shards[2].read_bytes())
    data[len(data) // 3] ^= 1
    shards[2].write_bytes(data)
    shards[3].write_bytes(b"PAR1" + bytes(shards[3].stat().st_size - 8) + b"PAR1")
    change_manifest(path, lambda manifest: manifest["shards"][4].update(rows=7))
    change_manifest(path, lambda manifest: manifest["shards"].append(manifest["shards"][5]))
    everything = found(path)
    assert everything["missing shard"].examples == ("shard-00000.parquet",)
    assert "bytes, not" in everything["shard of another size"].examples[0]
    assert {example[:19] for example in everything["changed shard"].examples} == {
        "shard-00002.parquet",
        "shard-00003.parquet",
    }
    assert everything["shard of another number of rows"].examples == ("shard-00004.parquet: 2 rows, not 7",)
    assert everything["shard listed twice"].examples == ("shard-00005.parquet",)
    assert any("shard-00001.parquet" in example for example in everything["damaged shard"].examples)
    assert all(everything[kind].is_fault for kind in everything)


def test_a_shard_of_another_store_of_another_version_or_schema_is_found(tmp_path, monkeypatch):
    path = make_store(tmp_path / "store")
    make_store(tmp_path / "other", speech_tokenizer=SPEECH_CARD | {"fingerprint": "speech-1"})
    shutil.copy(tmp_path / "other" / "shard-00002.parquet", path)
    assert "shard of other tokenizers" in faults(path)
    with monkeypatch.context() as patch:
        patch.setattr(utterance_module, "FORMAT_VERSION", 7)
        write_shard(path, 1, ROWS, StoreMetadata(**TOKENIZERS))
    pq.write_table(pa.table({"a": [1]}), path / "shard-00000.parquet")
    examples = found(path)["shard of another kind"].examples
    assert "format version None" in examples[0]
    assert "format version 7, this smoltolk reads version 2" in examples[1]


def test_leftovers_and_a_writer_at_work_are_found(tmp_path):
    path = make_store(tmp_path / "store")
    (path / ".shard-00007.parquet.123.part").touch()
    shutil.copy(path / "shard-00000.parquet", path / "shard-00009.parquet")
    (path / BLOCKS).mkdir()
    everything = found(path)
    assert list(everything) == [
        "shard that the manifest does not list",
        "records of a finished preparation",
        "half-written file of a killed writer",
    ]
    assert not any(finding.is_fault for finding in everything.values())
    with open(path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert faults(path) == ["being written by another process"]


def test_a_preparation_that_is_not_finished_says_how_to_go_on(tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"w{i} w{i + 1}"}) for i in range(7)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    settings = {"speech_tokenizer": None, "text_tokenizer": TOKENIZER, "rows_per_shard": 2, "progress": False}
    path = tmp_path / "store"
    prepare(open_source(str(tmp_path / "m.jsonl")), path, **settings)
    assert faults(path, text_tokenizer=TOKENIZER) == []
    (path / MANIFEST).unlink()
    (path / BLOCKS / "00000").mkdir(parents=True)
    (path / BLOCKS / "00000" / "done.json").touch()
    finding = found(path)["preparation not finished"]
    assert finding.examples == (
        f"1 of {json.loads((path / SETTINGS).read_text())['source_pieces']} pieces of the source are done",
    )
    assert "same `smoltolk prepare` command" in finding.remedy
    shutil.move(path / "shard-00001.parquet", path / BLOCKS / "00000")
    assert check_store(path, progress=False).rows == 7  # what is there is checked all the same
    (path / SETTINGS).write_text("{")
    assert found(path)["preparation not finished"].examples == ("prepare.json is damaged",)
    (path / SETTINGS).unlink()
    assert found(path)["no manifest"].is_fault


def test_rows_in_quarantine_are_told_with_their_reasons(tmp_path):
    path = make_store(tmp_path / "store")
    (path / QUARANTINE).write_text('{"id": "x", "source": "x.wav", "reason": "it is silent"}\n')
    assert found(path)["row in quarantine"].examples == ("x: it is silent",)
    (path / QUARANTINE).write_text("{")
    assert faults(path) == ["damaged quarantine list"]


def test_inconsistent_rows_are_found_each_with_its_reason(tmp_path, monkeypatch):
    rows = [
        replace(ROWS[0], word_ends_s=ROWS[0].word_ends_s[::-1]),
        ROWS[1],
        replace(ROWS[2], units=np.full_like(ROWS[2].units, 20)),
        replace(ROWS[3], seconds=None),
        replace(ROWS[4], id=None),
    ]
    everything = found(unchecked_store(tmp_path / "store", rows, monkeypatch))
    examples = everything["inconsistent row"].examples
    assert everything["inconsistent row"].count == 3
    assert "'u0': word_ends_s runs backwards" in examples[0]
    assert "'u2': units reach from 20 to 20" in examples[1]
    assert "'u3': units, unit_durations given without seconds" in examples[2]
    assert everything["row without an id"].examples == ("shard-00000.parquet",)


def test_derived_columns_must_be_those_of_their_rows(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shard_module, "_word_unit_ends", lambda utterance, _: np.zeros(len(utterance.word_ends_s), int))
        path = make_store(tmp_path / "store")
    finding = found(path)["derived column that differs from its row"]
    assert (finding.is_fault, finding.count) == (True, 12)
    assert finding.examples[0] == "u0: word_unit_ends"


def test_units_that_last_longer_than_their_audio_are_a_fault(tmp_path):
    rows = [
        replace(ROWS[0], seconds=ROWS[0].seconds + 0.5),
        replace(ROWS[1], seconds=ROWS[1].seconds + 0.03),
        *ROWS[2:],
    ]
    finding = found(make_store(tmp_path / "store", rows))["units of another length than the audio"]
    assert finding.is_fault
    assert finding.count == 1
    assert finding.examples[0].startswith("u0: ")


def test_ids_that_occur_twice_are_found_over_shards(tmp_path):
    rows = [*ROWS[:11], replace(ROWS[11], id="u0", split="train"), replace(ROWS[3], id="u1", units=ROWS[4].units[:0])]
    rows[-1] = replace(ROWS[3], id="u1")  # of the split "validation"
    everything = found(make_store(tmp_path / "store", rows))
    twice = everything["id that occurs twice"]
    assert (twice.is_fault, twice.count) == (True, 1)
    assert twice.examples == ("u0 (shard-00000.parquet) = u0 (shard-00002.parquet)",)
    assert everything["id that occurs twice, in two splits"].count == 1
    assert everything["rows of the same units"].examples == ("u3 (shard-00000.parquet) = u1 (shard-00002.parquet)",)
    assert everything["rows of the same words, speaker and length"].count == 1


def test_the_same_text_in_train_and_validation_is_told(tmp_path):
    texts = {"W1 w2!": "train", "w1, w2": "validation", "w1 w3": "train"}
    rows = [
        Utterance(id=text, text=text, text_ids=np.arange(2), word_token_counts=np.array([1, 1]), split=split)
        for text, split in texts.items()
    ]
    everything = found(make_store(tmp_path / "store", rows))
    assert list(everything) == ["rows of the same words, speaker and length, in two splits"]
    assert everything["rows of the same words, speaker and length, in two splits"].count == 1


def test_texts_of_another_tokenizer_are_a_fault_and_other_cuts_into_tokens_a_note(tmp_path):
    rows = [replace(ROWS[0], text_ids=ROWS[0].text_ids[::-1]), *ROWS[1:]]
    rows[1] = replace(ROWS[1], text_ids=np.full_like(ROWS[1].text_ids, 60))  # beyond the vocabulary
    path = make_store(tmp_path / "store", rows, text_tokenizer_fingerprint="text-1")
    everything = found(path, text_tokenizer=TOKENIZER, speech_fingerprint="speech-9")
    assert everything["text ids that are not the text's"].count == 2
    assert TOKENIZERS["text_tokenizer_fingerprint"] in everything["other text tokenizer"].examples[0]
    assert everything["other speech tokenizer"].examples == ("the store is of speech-0, not of speech-9",)
    assert len(faults(path)) == 0


def test_odd_speech_is_told_but_is_no_fault(tmp_path):
    limits = Limits(words_per_s=(20, 30), word_s=0.01, unaligned_s=0.2, empty_words=0.5, units_per_s=200)
    short = ROWS[0].word_ends_s / 10
    late = ROWS[1].word_ends_s.copy()
    late[-1] += 0.04
    rows = [
        replace(ROWS[0], word_ends_s=np.full_like(short, short[-1])),
        replace(ROWS[1], word_ends_s=late),
        replace(ROWS[2], units=np.zeros_like(ROWS[2].units)),
        *ROWS[3:],
    ]
    everything = found(make_store(tmp_path / "store", rows), limits=limits)
    assert everything["few units"].count == 12
    assert everything["few units"].examples[0].startswith("u0: ")
    assert len(everything["few units"].examples) == 5
    assert everything["equal units side by side"].examples == ("u2",)
    assert everything["speech outside of 20 … 30 words/s"].count > 0
    assert "'w" in everything["word longer than 0.01 s"].examples[0]
    assert everything["audio after the last word"].count == 1
    assert everything["last word ends after the audio"].examples == ("u1: 40 ms",)
    assert everything["more than 50 % words without units"].examples[0].startswith("u0: ")
    assert not any(finding.is_fault for finding in everything.values())


def test_missing_splits_and_missing_times_are_told(tmp_path):
    rows = [replace(row, split=None, word_ends_s=None) for row in ROWS]
    everything = found(make_store(tmp_path / "store", rows))
    assert list(everything) == [
        "no rows in the split 'train'",
        "no rows in the split 'validation'",
        "rows without a split",
        "no word times",
    ]
    assert list(found(make_store(tmp_path / "empty", []))) == ["no rows"]


def test_splits_that_training_never_draws_from_are_told(tmp_path):
    rows = [replace(ROWS[0], split="test"), replace(ROWS[1], split="valid"), *ROWS[2:]]
    told = found(make_store(tmp_path / "store", rows))["splits that training never draws from"]
    assert told.examples == ("'valid': 1 rows",)
    assert not told.is_fault


def test_the_command_prints_a_table_or_json_and_ends_with_0_or_1(tmp_path, capsys, tiny_world):
    path = make_store(tmp_path / "store", [replace(row, id=f"[b]{row.id}") for row in ROWS])
    backbone = str(tiny_world / "backbone")
    assert cli.main(["data", "check", str(path), "--text-tokenizer", backbone]) == 0
    printed = capsys.readouterr().out
    assert "12 rows (9 train, 3 validation)" in printed
    assert "[b]u0" in printed
    assert printed.endswith("no faults\n")
    (path / "shard-00001.parquet").unlink()
    assert cli.main(["data", "check", str(path), "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["is_sound"] is False
    assert report["findings"][0]["kind"] == "missing shard"
    assert f"{path} has faults: missing shard" in printed.err
    assert cli.main(["data", "check", str(path), "--speech-tokenizer", "none"]) == 1
    assert "none holds no speech tokenizer" in capsys.readouterr().err


def test_a_shard_of_many_batches_is_read_to_its_end(tmp_path):
    rows = [Utterance(**(asdict(ROWS[0]) | {"id": f"r{i}"})) for i in range(600)]
    report = check_store(make_store(tmp_path / "store", rows, rows_per_shard=600), progress=False, limits=SLOW)
    assert report.rows == 600
    assert next(f for f in report.findings if f.kind == "rows of the same units").count == 599
