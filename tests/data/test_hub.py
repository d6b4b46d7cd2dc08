"""Hugging Face datasets: local ones of each kind, with audio and text, and what is refused."""

import io
import pickle

import datasets
import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict, Features, Value
from tests.data.conftest import RATE_HZ, contents, quarantine, sound

from smoltolk.data.corpora import open_source
from smoltolk.data.hub import HubSource
from smoltolk.data.prepare import prepare
from smoltolk.data.store import Store


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def flac(seed):
    file = io.BytesIO()
    soundfile.write(file, sound(seed), RATE_HZ, format="FLAC")
    return file.getvalue()


def spoken(count=6):
    """A dataset as the hub's audio datasets are: bytes and names of files, text, and more."""
    timed = [
        [{"word": "One,", "start_time": 0.0, "end_time": 0.2}, {"word": "two.", "start_time": 0.2, "end_time": 0.4}]
    ]
    rows = {
        "audio": [{"bytes": flac(number), "path": f"{number}.flac"} for number in range(count)],
        "text": ["One, two."] * (count - 1) + ["one of another number of words"],
        "aligned_text": timed * count,
        "speaker": list(range(count)),
        "split_sentence": [False] * count,
    }
    dataset = Dataset.from_dict({name: values for name, values in rows.items() if name != "audio"})
    raw = Dataset.from_dict(
        {"audio": rows["audio"]}, Features({"audio": {"bytes": Value("binary"), "path": Value("string")}})
    )
    return datasets.concatenate_datasets([raw, dataset], axis=1).cast_column("audio", Audio(decode=False))


def rows_of(source, rows_per_piece=2):
    source.scan(rows_per_piece)
    return [list(piece.rows()) for piece in source.pieces(rows_per_piece)]


def test_parquet_files_are_read_by_row_groups(tmp_path):
    spoken().cast_column("audio", Audio()).to_parquet(tmp_path / "train-00000.parquet", batch_size=2)
    source = HubSource(str(tmp_path))
    scan = source.scan(3)
    assert (scan.num_rows, scan.num_pieces) == (6, 3)
    pieces = [
        list(pickle.loads(pickle.dumps(piece)).rows())  # noqa: S301
        for piece in source.pieces(3)
    ]
    assert [len(rows) for rows in pieces] == [2, 2, 2]
    first = pieces[0][0]
    assert (first.id, first.source, first.text, first.speaker) == ("train-00000-000000", "0.flac", "One, two.", "0")
    assert first.audio == flac(0)


@pytest.mark.parametrize(
    "names",
    [
        {"train-00000-of-00001": "train", "test-00000-of-00001": "test", "dev": "validation"},
        {"train/0000": "train", "test/0000": "test", "validation/part/0000": "validation"},
        {"my_train_2": "train", "clean/test.other/0": "test", "valid-0": "validation", "latest-contest": "train"},
        {"data/train/0": "train", "train/test-0": "test", "train/val": "validation", "other": "train"},
    ],
)
def test_parquet_files_are_of_the_split_their_names_tell(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": [name]}).to_parquet(tmp_path / f"{name}.parquet")
    for split in ("train", "validation", "test"):
        expected = sorted(name for name, told in names.items() if told == split)
        sources = [open_source(f"hf:{tmp_path}::{split}")]
        sources += [open_source(f"hf:{tmp_path}"), open_source(f"text:{tmp_path}")] if split == "train" else []
        for source in sources:
            assert sorted(row.text for rows in rows_of(source) for row in rows) == expected
            assert source.scan(2).num_rows == len(expected)


def test_names_of_splits_in_a_column_become_those_of_a_store_or_end_the_work(tmp_path):
    Dataset.from_dict({"text": ["a", "b", "c"], "split": ["train", "valid", None]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"train-00000-000001: split is 'valid', which training never draws from"):
        rows_of(HubSource(str(tmp_path)))
    source = open_source(f"hf:{tmp_path}", splits={"valid": "validation"})
    assert [row.split for rows in rows_of(source, 3) for row in rows] == ["train", "validation", None]
    without = open_source(f"text:{tmp_path}", splits={"valid": "validation"})
    with pytest.raises(ValueError, match="has no column split to read, so splits have no effect: leave out --split"):
        without.scan(3)


def test_a_split_that_is_not_there_is_refused(tmp_path):
    Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "plain" / "0000.parquet")
    Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "test.parquet")
    Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    for name, splits in (("plain", "train"), ("test.parquet", "test, train"), ("saved", "train")):
        assert open_source(f"hf:{tmp_path / name}").scan(1).num_rows == 1
        with pytest.raises(ValueError, match=f"its files are of the split {splits}, not 'validation'"):
            open_source(f"hf:{tmp_path / name}::validation").scan(1)
    (tmp_path / "plain" / "0000.parquet").rename(tmp_path / "plain" / "test-0000.parquet")
    with pytest.raises(ValueError, match="its files are of the split test, not 'train'"):
        open_source(f"text:{tmp_path / 'plain'}").scan(1)
    assert open_source(f"hf:{tmp_path / 'test.parquet'}::test").scan(1).num_rows == 1


def test_spoken_tinystories_brings_the_times_of_its_words(tmp_path, tokenizers):
    spoken().to_parquet(tmp_path / "data-00000-of-00001.parquet", batch_size=2)
    summary = prepare(f"spoken-tinystories:{tmp_path}", tmp_path / "out", **tokenizers)
    assert (summary.utterances, summary.unaligned, summary.quarantined) == (6, 0, 0)
    store = Store(tmp_path / "out")
    assert {store[row].text for row in range(6)} == {"One, two."}
    assert store[5].word_ends_s == pytest.approx([0.2, 0.4])
    assert store[5].units.tolist() == tokenizers["speech_tokenizer"].encode(sound(5)).units.tolist()


def test_what_was_saved_to_disk_is_read_by_ranges(tmp_path):
    DatasetDict({"train": spoken(5), "test": spoken(3)}).save_to_disk(tmp_path / "both")
    spoken(5).save_to_disk(tmp_path / "one")
    for source in (HubSource(str(tmp_path / "both")), HubSource(str(tmp_path / "one"))):
        pieces = rows_of(source)
        assert [len(rows) for rows in pieces] == [2, 2, 1]
        assert [row.source for rows in pieces for row in rows] == [f"{number}.flac" for number in range(5)]
    assert sum(map(len, rows_of(HubSource(str(tmp_path / "both"), split="test")))) == 3


def test_a_text_dataset_needs_no_audio(tmp_path, tokenizers):
    Dataset.from_dict({"text": [f"one two {number}" for number in range(5)], "url": ["…"] * 5}).to_parquet(
        tmp_path / "fineweb.parquet"
    )
    settings = tokenizers | {"speech_tokenizer": None}
    prepare(f"fineweb-edu:{tmp_path}", tmp_path / "out", **settings)
    prepare(f"text:{tmp_path / 'fineweb.parquet'}", tmp_path / "same", **settings)
    assert [Store(tmp_path / "out")[row].text for row in range(5)] == [f"one two {number}" for number in range(5)]
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "same").keys()


def test_bad_rows_of_a_dataset_are_quarantined(tmp_path, tokenizers):
    rows = {
        "audio": [b"", flac(1), flac(2), None, flac(3)],
        "text": ["one", None, "two", "three", "four"],
        "word_ends_s": [[0.1], None, [0.3], None, [0.1, 0.2]],
    }
    Dataset.from_dict(rows).to_parquet(tmp_path / "in.parquet")
    prepare(f"hf:{tmp_path / 'in.parquet'}", tmp_path / "out", **tokenizers)
    store = Store(tmp_path / "out")
    assert [(store[row].has_text, store[row].has_speech, store[row].is_aligned) for row in range(3)] == [
        (False, True, False),
        (True, True, True),
        (True, False, False),
    ]
    reasons = [entry["reason"] for entry in quarantine(tmp_path / "out")]
    assert reasons[0] == "train-00000-000000 is empty: leave it out or copy it again"
    assert "word_ends_s has 2 entries for 1 words" in reasons[1]


def test_a_dataset_with_audio_on_disk_names_its_files(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.float32(sound(1)), RATE_HZ)
    Dataset.from_dict({"audio": [str(tmp_path / "a.wav")], "id": [17]}).to_parquet(tmp_path / "in.parquet")
    (row,) = rows_of(HubSource(str(tmp_path / "in.parquet")))[0]
    assert (row.audio, row.source) == (str(tmp_path / "a.wav"), "17")


def test_columns_that_are_not_there_are_said_with_those_that_are(tmp_path):
    Dataset.from_dict({"sentence": ["one"], "clip": [3]}).to_parquet(tmp_path / "in.parquet")
    name = f"hf:{tmp_path / 'in.parquet'}"
    with pytest.raises(ValueError, match="neither a column audio nor text, but sentence, clip: say with --columns"):
        open_source(name).scan(1)
    with pytest.raises(ValueError, match="no column 'words', but sentence, clip"):
        open_source(name, columns={"text": "words"}).scan(1)
    with pytest.raises(ValueError, match="columns names 'txt'"):
        open_source(name, columns={"txt": "sentence"})
    (row,) = rows_of(open_source(name, columns={"text": "sentence"}))[0]
    assert row.text == "one"
    (row,) = rows_of(open_source(name, columns={"text": "clip"}))[0]
    assert row.error == "text is 3: give a string"


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_a_folder_of_files_without_known_columns_is_refused_with_what_is_read(tmp_path, suffix):
    (tmp_path / f"stories.{suffix}").write_text("text\none\n")
    with pytest.raises(ValueError, match=r"Parquet and JSON files and what .* are read; give .txt and .csv files one"):
        open_source(f"text:{tmp_path}").scan(1)
    (tmp_path / f"stories.{suffix}").unlink()
    (tmp_path / "stories.jsonl").write_text('{"text": "one"}\n')
    (row,) = rows_of(open_source(f"text:{tmp_path}"))[0]
    assert row.text == "one"


def test_a_name_that_cannot_be_opened_is_said(tmp_path):
    with pytest.raises(ValueError, match="hf:nobody/nothing cannot be opened"):
        open_source("hf:nobody/nothing@main:config:test").scan(1)
