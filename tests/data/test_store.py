"""The store: round trip, and every way in which one can be broken."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from smoltolk.data import shard as shard_module
from smoltolk.data.store import MANIFEST, Store, StoreWriter, lock, write_store
from smoltolk.data.utterance import FORMAT_VERSION, Utterance

CARD = {
    "kind": "fake",
    "fingerprint": "speech-1",
    "unit_rate_hz": 100.0,
    "num_units": 20,
    "sample_rate_hz": 16000,
}
TOKENIZERS = {"text_tokenizer_fingerprint": "text-1", "speech_tokenizer": CARD}


def aligned(number=0, **changes):
    fields = {
        "id": f"utterance-{number}",
        "text": "three little words",
        "text_ids": np.array([3, 4, 5 + number, 6]),
        "units": np.array([1, 2, 1, 19]),
        "unit_durations": np.array([10, 20, 30, 65_535]),
        "word_ends_s": np.array([0.1, 0.3, 0.6]),
        "word_token_counts": np.array([1, 2, 1]),
        "seconds": 655.95,
        "speaker": "ann",
        "source": "a.wav",
        "split": "train",
    }
    return Utterance(**(fields | changes))


SPEECH_ONLY = aligned(
    1,
    id="speech",
    text=None,
    text_ids=None,
    word_token_counts=None,
    word_ends_s=None,
    speaker=None,
    split="validation",
)
TEXT_ONLY = aligned(2, id="text", units=None, unit_durations=None, seconds=None, word_ends_s=None, source=None)


def assert_same(found, expected):
    for field in dataclasses.fields(Utterance):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, np.ndarray):
            np.testing.assert_array_equal(a, b.astype(a.dtype))
        else:
            assert a == b, field.name


def make_store(path, count=5, **settings):
    return write_store(path, [aligned(i) for i in range(count)], **(TOKENIZERS | {"rows_per_shard": 2} | settings))


def test_utterances_come_back_as_they_were_written(tmp_path):
    written = [aligned(0), SPEECH_ONLY, TEXT_ONLY, aligned(3)]
    store = write_store(tmp_path / "store", written, **TOKENIZERS, rows_per_shard=3)
    assert len(store) == 4
    for row in (3, 1, 0, 2):
        assert_same(store[row], written[row])
    assert store[0].units.dtype == np.uint16
    assert store[0].text_ids.dtype == np.uint32
    assert not store[0].units.flags.writeable
    assert store.metadata.speech_tokenizer == CARD
    assert store.unit_rate_hz == 100.0
    assert store.max_text_id == 8
    store.verify()


def test_random_access_crosses_shards_and_row_groups_with_a_cache_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "ROWS_PER_GROUP", 3)
    make_store(tmp_path / "store", 25, rows_per_shard=10)
    store = Store(tmp_path / "store", cache_bytes=1)
    for row in np.random.default_rng(0).permutation(25):
        assert store[row].id == f"utterance-{row}"
    assert len(store._cache) == 1
    for row in (-1, 25):
        with pytest.raises(IndexError, match="25 rows"):
            store[row]


def test_rows_are_found_by_split_and_by_half(tmp_path):
    unsplit = aligned(4, split=None)
    store = write_store(tmp_path / "s", [aligned(), SPEECH_ONLY, TEXT_ONLY, unsplit], **TOKENIZERS, rows_per_shard=2)
    assert store.ids_of_split("train").tolist() == [0, 2]
    assert store.ids_of_split("train", has_speech=True).tolist() == [0]
    assert store.ids_of_split("validation").tolist() == [1]
    assert store.ids_of_split("validation", has_text=True).tolist() == []


def test_shards_are_parquet_that_others_can_read(tmp_path):
    make_store(tmp_path / "store")
    table = pq.read_table(tmp_path / "store" / "shard-00000.parquet")
    assert table.column_names[:4] == ["id", "text", "text_ids", "units"]
    assert table.schema.metadata[b"smoltolk.speech_tokenizer_fingerprint"] == b'"speech-1"'
    assert table.schema.metadata[b"smoltolk.unit_rate_hz"] == b"100.0"


def test_a_store_without_utterances_is_a_store(tmp_path):
    store = write_store(tmp_path / "store", [], **TOKENIZERS)
    assert len(store) == 0
    assert store.ids_of_split("train").tolist() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": np.array([1, 2, 1, 20])}, "reach from 1 to 20, outside of 0 … 19"),
        ({"units": np.array([1, -2, 1, 2])}, "reach from -2"),
        ({"units": np.array([1.0, 2.0, 1.0, 3.0])}, "units has dtype float64"),
        ({"units": np.array([[1, 2, 1, 3]])}, "units has shape"),
        ({"units": np.array([], dtype=int), "unit_durations": np.array([], dtype=int)}, "units is empty"),
        ({"unit_durations": np.array([1, 2, 3])}, "4 entries and unit_durations 3"),
        ({"unit_durations": np.array([1, 2, 3, 65_536])}, "65536 frames, outside of 1 … 65535"),
        ({"word_ends_s": np.array([0.1, 0.2])}, "2 entries for 3 words"),
        ({"word_ends_s": np.array([0.1, 0.3, 0.2])}, "runs backwards at word 2"),
        ({"word_ends_s": np.array([0.1, 0.3, 656.1])}, "past the 655.950 s of audio"),
        ({"word_ends_s": np.array([0.1, np.nan, 0.3])}, "non-finite"),
        ({"word_token_counts": np.array([1, 1, 1])}, "add up to 3, but text_ids has 4"),
        ({"word_token_counts": np.array([2, 2])}, "2 entries for 3 words"),
        ({"word_token_counts": np.array([0, 3, 1])}, "from 0 to 3"),
        ({"text": " "}, "no words"),
        ({"text": None}, "given without text"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"text": None, "text_ids": None, "word_token_counts": None}, "without both text and speech"),
    ],
)
def test_an_inconsistent_utterance_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"utterance 'utterance-0'") as error:
        write_store(tmp_path / "store", [aligned(0, **changes)], **TOKENIZERS)
    assert message in str(error.value)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]


def test_an_utterance_without_halves_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither text nor speech"):
        write_store(tmp_path / "store", [Utterance(id="nothing")], **TOKENIZERS)


def test_a_word_may_end_a_little_after_the_audio(tmp_path):
    make_store(tmp_path / "a")
    write_store(tmp_path / "b", [aligned(0, word_ends_s=np.array([0.1, 0.2, 655.99]))], **TOKENIZERS)


def test_a_half_without_its_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no speech_tokenizer"):
        write_store(tmp_path / "a", [SPEECH_ONLY], text_tokenizer_fingerprint="t", speech_tokenizer=None)
    with pytest.raises(ValueError, match="no text_tokenizer_fingerprint"):
        write_store(tmp_path / "b", [TEXT_ONLY], text_tokenizer_fingerprint=None, speech_tokenizer=CARD)
    with pytest.raises(ValueError, match="lacks num_units, unit_rate_hz"):
        write_store(tmp_path / "c", [], text_tokenizer_fingerprint=None, speech_tokenizer={"fingerprint": "f"})


def test_an_error_in_the_middle_leaves_no_store(tmp_path):
    def broken():
        yield from [aligned(i) for i in range(5)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "store", broken(), **TOKENIZERS, rows_per_shard=2)
    with pytest.raises(ValueError, match="is not a store"):
        Store(tmp_path / "store")
    assert not list((tmp_path / "store").glob("*.parquet"))
    make_store(tmp_path / "store")


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a store"):
        Store(tmp_path)


def test_a_missing_shard_is_refused_with_its_path(tmp_path):
    make_store(tmp_path / "store")
    (tmp_path / "store" / "shard-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.parquet is missing"):
        Store(tmp_path / "store")


def test_a_truncated_shard_is_refused_with_its_path(tmp_path):
    make_store(tmp_path / "store")
    shard = tmp_path / "store" / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shard-00001\.parquet has \d+ bytes instead of"):
        Store(tmp_path / "store")


def test_a_shard_with_a_broken_footer_is_refused(tmp_path):
    make_store(tmp_path / "store")
    shard = tmp_path / "store" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-4] + b"oops")
    with pytest.raises(ValueError, match=r"shard-00000\.parquet is damaged"):
        Store(tmp_path / "store")


def test_verify_finds_a_changed_byte(tmp_path):
    store = make_store(tmp_path / "store")
    shard = tmp_path / "store" / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001\.parquet has the hash"):
        store.verify()


def change_manifest(path, change):
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_another_number_of_rows_than_the_manifest_says_is_refused(tmp_path):
    make_store(tmp_path / "store")
    change_manifest(tmp_path / "store", lambda manifest: manifest["shards"][2].update(rows=7))
    with pytest.raises(ValueError, match=r"shard-00002\.parquet has 1 rows instead of 7"):
        Store(tmp_path / "store")


def test_another_version_is_refused(tmp_path):
    make_store(tmp_path / "store")
    change_manifest(tmp_path / "store", lambda manifest: manifest.update(format_version=1))
    with pytest.raises(ValueError, match="format version 1, this smoltolk reads version 2"):
        Store(tmp_path / "store")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe\xff", "can't decode"),
        (b"[]", "holds no object"),
        (b'{"format_version": VERSION}', "shards cannot be read: 'shards'"),
        (b'{"format_version": VERSION, "shards": 3}', "shards cannot be read"),
        (b'{"format_version": VERSION, "shards": [7]}', "shards cannot be read"),
        (b'{"format_version": VERSION, "shards": [{"file": "a"}]}', "shards cannot be read"),
        (b'{"format_version": VERSION, "shards": []}', "names no shards"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, content, fault):
    make_store(tmp_path / "store")
    (tmp_path / "store" / MANIFEST).write_bytes(content.replace(b"VERSION", str(FORMAT_VERSION).encode()))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged \(.*{fault}.*\): prepare the store again"):
        Store(tmp_path / "store")


def replace_shard(path, table):
    pq.write_table(table, path / "shard-00000.parquet")
    size = (path / "shard-00000.parquet").stat().st_size
    change_manifest(path, lambda manifest: manifest["shards"][0].update(bytes=size))


def test_units_out_of_range_are_found_when_a_store_is_opened(tmp_path):
    path = tmp_path / "store"
    make_store(path)
    table = pq.read_table(path / "shard-00000.parquet")
    small = json.dumps(CARD | {"num_units": 10})
    replace_shard(path, table.replace_schema_metadata(table.schema.metadata | {b"smoltolk.speech_tokenizer": small}))
    with pytest.raises(ValueError, match="holds unit 19, but its speech tokenizer has 10 units"):
        Store(path)


def test_a_shard_of_another_store_is_refused(tmp_path):
    make_store(tmp_path / "a")
    make_store(tmp_path / "b", text_tokenizer_fingerprint="text-2")
    file = "shard-00001.parquet"
    size = (tmp_path / "b" / file).replace(tmp_path / "a" / file).stat().st_size
    change_manifest(tmp_path / "a", lambda manifest: manifest["shards"][1].update(bytes=size))
    with pytest.raises(ValueError, match="other tokenizers than the first shard"):
        Store(tmp_path / "a")


def test_a_shard_with_other_columns_is_refused(tmp_path):
    make_store(tmp_path / "a")
    replace_shard(tmp_path / "a", pq.read_table(tmp_path / "a" / "shard-00000.parquet").drop_columns(["speaker"]))
    with pytest.raises(ValueError, match="other columns"):
        Store(tmp_path / "a")


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path):
    store = make_store(tmp_path / "store")
    store.require(speech_fingerprint="speech-1", text_fingerprint="text-1")
    with pytest.raises(ValueError, match="speech tokenizer speech-1, speech-2 is needed: prepare the store with that"):
        store.require(speech_fingerprint="speech-2")
    with pytest.raises(ValueError, match="text tokenizer text-1, text-2 is needed: prepare the store with that"):
        store.require(text_fingerprint="text-2")


def test_a_second_writer_is_refused(tmp_path):
    with StoreWriter(tmp_path / "store", **TOKENIZERS) as writer:
        writer.write(aligned())
        with pytest.raises(ValueError, match="being written by another process"):
            make_store(tmp_path / "store")
    assert len(Store(tmp_path / "store")) == 1
    with pytest.raises(ValueError, match="holds a store already"):
        make_store(tmp_path / "store")


def test_a_killed_writer_leaves_no_lock_and_no_leftovers(tmp_path):
    if (child := os.fork()) == 0:
        with lock(tmp_path):
            (tmp_path / ".shard-00000.parquet.1.part").touch()
            (tmp_path / "shard-00009.parquet").touch()
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / "shard-00009.parquet").exists()
    make_store(tmp_path)
    with lock(tmp_path):
        names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", MANIFEST, "shard-00000.parquet", "shard-00001.parquet", "shard-00002.parquet"]


def test_only_what_writers_leave_is_swept(tmp_path):
    theirs = [tmp_path / "deep" / ".film.mkv.part", tmp_path / "blocks" / "00001" / "deep" / ".film.mkv.part"]
    ours = [tmp_path / ".manifest.json.1.part", tmp_path / "blocks" / ".moving.json.1.part"]
    ours.append(tmp_path / "blocks" / "00001" / ".00000.json.1.part")
    for path in theirs + ours:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / ".tokenizer.1.part").mkdir()  # a folder that another command is writing
    with lock(tmp_path):
        assert [path.exists() for path in theirs + ours] == [True, True, False, False, False]
    assert (tmp_path / ".tokenizer.1.part").is_dir()


@pytest.mark.parametrize("name", ["shard-00000.parquet", "thesis.tex"])
def test_files_of_others_are_neither_removed_nor_joined(tmp_path, name):
    (tmp_path / name).write_text("theirs")
    for _ in range(2):  # being refused leaves nothing that would let the next one in
        with pytest.raises(ValueError, match=f"files that are not of a store, such as {name}: choose another folder"):
            make_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "theirs"


def test_a_full_disk_leaves_nothing_half_written_and_names_the_path(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))  # a shard is larger
    try:
        with pytest.raises(OSError, match="File too large") as error:
            make_store(tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "store" / "shard-00000.parquet")
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]


def test_a_forked_process_that_outlives_its_parent_does_not_hold_its_lock(tmp_path):
    with contextlib.ExitStack() as parent:
        parent.enter_context(lock(tmp_path))
        context = multiprocessing.get_context("fork")
        runs, sender = context.Pipe(duplex=False)
        child = context.Process(target=lambda: (sender.send(True), time.sleep(60)))
        child.start()
        runs.recv()
        with pytest.raises(ValueError, match="is being written by another process"), lock(tmp_path):
            pass
    try:
        with lock(tmp_path):  # the parent has let go; had the child the file too, it would hold on
            assert child.is_alive()
    finally:
        child.kill()
        child.join()
