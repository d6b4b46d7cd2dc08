"""Shards: what is read in place is what Parquet readers decode."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from smoltolk.data import shard as shard_module
from smoltolk.data.shard import ENDS, SHARD_SCHEMA, tokens_of
from smoltolk.data.store import Store, write_store
from smoltolk.data.utterance import LIST_TYPES, SCHEMA, Utterance, word_units

CARD = {"fingerprint": "speech-1", "unit_rate_hz": 25.0, "num_units": 500}
TOKENIZERS = {"text_tokenizer_fingerprint": "text-1", "speech_tokenizer": CARD}


def random_utterance(number, rng):
    """Text, speech, both, or both with times; long ones and ones beyond ASCII among them."""
    kind = ("text", "speech", "unaligned", "aligned")[rng.integers(4)]
    num_words, fields = int(rng.integers(1, 60)), {}
    if kind != "speech":
        counts = rng.integers(1, 200, num_words)
        fields |= {"text": " ".join(["wörd…"] * num_words), "text_ids": rng.integers(0, 2**32, counts.sum())}
        fields["word_token_counts"] = counts
    if kind != "text":
        durations = rng.integers(1, 2**16, int(rng.integers(1, 300)))
        fields |= {"units": rng.integers(0, 500, len(durations)), "unit_durations": durations}
        fields["seconds"] = float(durations.sum()) / 25
    if kind == "aligned":
        fields["word_ends_s"] = np.sort(rng.uniform(0, fields["seconds"], num_words))
    split = ("train", "validation", None)[rng.integers(3)]
    return Utterance(id=f"u{number}", split=split, speaker=f"s{number % 3}", **fields)


@pytest.fixture
def utterances():
    rng = np.random.default_rng(0)
    return [random_utterance(number, rng) for number in range(150)]


def as_list(values):
    return None if values is None else np.asarray(values).tolist()


@pytest.mark.parametrize("rows_per_group", [7, 2048])
def test_values_read_in_place_are_those_that_were_written_and_that_arrow_decodes(
    tmp_path, monkeypatch, utterances, rows_per_group
):
    monkeypatch.setattr(shard_module, "ROWS_PER_GROUP", rows_per_group)
    store = write_store(tmp_path / "store", utterances, **TOKENIZERS, rows_per_shard=40)
    decoded = [row for path in sorted(store.path.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for row in np.random.default_rng(1).permutation(len(utterances)):
        written, found = utterances[row], store[int(row)]
        for name in SCHEMA.names:
            value = getattr(found, name)
            if name in LIST_TYPES:
                expected = getattr(written, name)
                expected = None if expected is None else expected.astype(LIST_TYPES[name])
                assert as_list(value) == as_list(expected) == as_list(decoded[row][name]), name
            else:
                assert value == getattr(written, name) == decoded[row][name], name
        for values, expected in zip(store.tokens(int(row), reads_text=True), tokens_of(written, 25.0), strict=True):
            assert bytes(values) == bytes(expected)
    store.verify()


def test_derived_columns_say_where_words_and_rows_end(tmp_path, utterances):
    store = write_store(tmp_path / "store", utterances, **TOKENIZERS)
    table = pq.read_table(tmp_path / "store" / "shard-00000.parquet")
    assert table.schema.names == SHARD_SCHEMA.names
    for number, utterance in enumerate(utterances):
        expected = word_units(utterance, 25.0)[1:].tolist() if utterance.is_aligned else None
        assert table["word_unit_ends"][number].as_py() == expected
    for name, end_name in ENDS.items():
        size = (lambda text: 4 + len(text.encode())) if name == "text" else len
        lengths = [0 if value is None else size(value) for value in table[name].to_pylist()]
        assert table[end_name].to_pylist() == np.cumsum(lengths).tolist()
        assert store.lengths(name).tolist() == lengths


def test_rows_of_a_split_are_those_of_its_name_and_halves(tmp_path, utterances):
    store = write_store(tmp_path / "store", utterances, **TOKENIZERS, rows_per_shard=40)
    for split in ("train", "validation", "test"):
        for half in ({}, {"has_text": True}, {"has_speech": True}, {"is_aligned": True}):
            expected = [
                number
                for number, utterance in enumerate(utterances)
                if utterance.split == split and all(getattr(utterance, name) for name in half)
            ]
            assert store.ids_of_split(split, **half).tolist() == expected


def test_the_same_utterances_give_the_same_bytes(tmp_path, utterances):
    for name in ("a", "b"):
        write_store(tmp_path / name, utterances, **TOKENIZERS)
    shards = [(tmp_path / name / "shard-00000.parquet").read_bytes() for name in ("a", "b")]
    assert shards[0] == shards[1]


def test_thousands_of_shards_need_no_file_descriptors(tmp_path, utterances):
    before = len(os.listdir("/proc/self/fd"))
    store = write_store(tmp_path / "store", utterances, **TOKENIZERS, rows_per_shard=3)
    store.tokens(77)
    assert len(store.shards) == 50
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_that_something_else_wrote_is_refused(tmp_path, utterances):
    store = write_store(tmp_path / "store", utterances, **TOKENIZERS)
    path = tmp_path / "store" / "shard-00000.parquet"
    for settings in ({"compression": "zstd", "use_dictionary": False}, {"compression": "none"}):
        pq.write_table(pq.read_table(path), path, **settings)
        manifest = (store.path / "manifest.json").read_text()
        manifest = manifest.replace(f'"bytes": {store.shards[0].bytes}', f'"bytes": {path.stat().st_size}')
        (tmp_path / "store" / "manifest.json").write_text(manifest)
        with pytest.raises(ValueError, match=r"written by something else \(column text_ids is compressed or encoded"):
            Store(tmp_path / "store")
        path.unlink()
        (tmp_path / "store" / "manifest.json").unlink()
        store = write_store(tmp_path / "store", utterances, **TOKENIZERS)


def test_utterances_too_long_for_one_page_are_refused(tmp_path, monkeypatch, utterances):
    monkeypatch.setattr(shard_module, "MAX_PAGE_BYTES", 10_000)
    with pytest.raises(ValueError, match="more than 10000 bytes in one column: cut such long utterances"):
        write_store(tmp_path / "store", utterances, **TOKENIZERS)


def test_verify_finds_derived_values_that_do_not_fit(tmp_path, monkeypatch, utterances):
    derive = shard_module._word_unit_ends
    monkeypatch.setattr(
        shard_module, "_word_unit_ends", lambda *given: None if derive(*given) is None else derive(*given) * 0
    )
    store = write_store(tmp_path / "store", utterances, **TOKENIZERS)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="word_unit_ends differs from what"):
        store.verify()
