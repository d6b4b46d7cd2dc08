"""Import of the authors' layout: a round trip in every width, and everything that must not be guessed."""

import json
import os
import pickle
import pickletools
import resource

import numpy as np
import pytest
from tests.conftest import SPEECH_CARD, TEXT_VOCAB, tiny_text_tokenizer

from smoltolk import cli
from smoltolk.data.authors import import_authors, read_meta, read_samples
from smoltolk.data.check import Limits, check_store
from smoltolk.data.store import MANIFEST, Store
from smoltolk.data.text import encode_words, tokenizer_fingerprint
from smoltolk.data.work_folder import QUARANTINE

TOKENIZER = tiny_text_tokenizer()
EOS = SPEECH_CARD["num_units"]
CARD = SPEECH_CARD | {"kind": "hubert", "unit_rate_hz": 25}
SPEECH_META = {"vocab_size": EOS + 2, "eos": EOS, "pad": EOS + 1, "n_q": 1, "frame_rate": 25}
TEXT_META = {"vocab_size": TEXT_VOCAB, "eos": 0}
ARGUMENTS = {"speech_tokens": "mhubert25hzl11", "text_tokens": "smollm", "speech_tokenizer": CARD}
ARGUMENTS |= {"text_tokenizer": TOKENIZER, "progress": False}


class Talk:
    """An utterance as the authors' programs see it."""

    def __init__(self, seed, num_words=5):
        rng = np.random.default_rng(seed)
        self.text = " ".join(f"w{w}" for w in rng.integers(TEXT_VOCAB - 2, size=num_words))
        self.text_ids, self.counts = encode_words(TOKENIZER, self.text)
        self.units = np.arange(4 * num_words) * 7 % EOS
        self.durations = rng.integers(1, 9, size=len(self.units))
        self.seconds = self.durations.sum() / 25
        self.ends_s = np.linspace(0, self.seconds, num_words + 1)[1:].astype(np.float32)


def write_dataset(
    folder,
    talks,
    split="train",
    *,
    bin_type="int16",
    len_type="uint64",
    dur_type="int8",
    text_len_type="uint64",
    merged=True,
):
    """Write utterances as the authors' programs do: end tokens behind each, also in lengths, durations and times."""
    speech, text = folder / "mhubert25hzl11", folder / "smollm"
    speech.mkdir(parents=True, exist_ok=True)
    text.mkdir(exist_ok=True)

    def write(path, arrays, dtype):
        path.write_bytes(np.concatenate(arrays).astype(dtype).tobytes())

    units = [talk.units if merged else np.repeat(talk.units, talk.durations) for talk in talks]
    write(speech / f"{split}.bin", [np.append(u, EOS) for u in units], bin_type)
    write(speech / f"{split}.len", [[len(u) + 1] for u in units], len_type)
    if merged:
        write(speech / f"{split}.dur", [np.append(talk.durations, 1) for talk in talks], dur_type)
    write(text / f"{split}.bin", [np.append(talk.text_ids, 0) for talk in talks], bin_type)
    write(text / f"{split}.len", [[len(talk.text_ids) + 1] for talk in talks], text_len_type)
    write(text / f"{split}.wrds_tms", [np.append(talk.ends_s, talk.seconds) for talk in talks], "float32")
    write(text / f"{split}.wrds_tms_len", [np.append(talk.counts, 1) for talk in talks], "uint64")
    (speech / "meta.pkl").write_bytes(pickle.dumps(SPEECH_META))
    (text / "meta.pkl").write_bytes(pickle.dumps(TEXT_META))
    return folder


def talks(count=6):
    return [Talk(seed, num_words=3 + seed % 4) for seed in range(count)]


def assert_same(row, talk):
    assert row.text == talk.text
    np.testing.assert_array_equal(row.text_ids, talk.text_ids)
    np.testing.assert_array_equal(row.word_token_counts, talk.counts)
    np.testing.assert_array_equal(row.units, talk.units)
    np.testing.assert_array_equal(row.unit_durations, talk.durations)
    np.testing.assert_array_equal(row.word_ends_s, talk.ends_s)
    assert row.seconds == pytest.approx(talk.seconds)


@pytest.mark.parametrize(
    "widths",
    [
        {},
        {"len_type": "int16", "text_len_type": "int16"},  # their HuBERT writer's
        {"len_type": "uint16"},  # "ls960.val" as their reader meets it
        {"bin_type": "uint32", "dur_type": "int64", "len_type": "int32"},
        {"merged": False},
    ],
)
def test_utterances_come_back_whatever_the_width_of_their_numbers(tmp_path, widths):
    source = write_dataset(tmp_path / "libriheavy", talks(), **widths)
    write_dataset(source, talks(3), "val", **widths)
    summary = import_authors(source, tmp_path / "store", **ARGUMENTS, rows_per_shard=4)
    assert summary.utterances == 9
    assert summary.splits == {"train": 6, "validation": 3}
    assert (summary.quarantined, summary.unaligned) == (0, 0)
    found = summary.widths[str(source / "mhubert25hzl11" / "train.len")]
    assert np.dtype(found).itemsize == np.dtype(widths.get("len_type", "uint64")).itemsize
    store = Store(tmp_path / "store")
    assert [store[row].id for row in (0, 5, 6)] == ["libriheavy/train/0", "libriheavy/train/5", "libriheavy/val/0"]
    assert store[6].split == "validation"
    for row, talk in enumerate([*talks(), *talks(3)]):
        assert_same(store[row], talk)
    store.require(speech_fingerprint=CARD["fingerprint"], text_fingerprint=tokenizer_fingerprint(TOKENIZER))
    report = check_store(
        tmp_path / "store",
        text_tokenizer=TOKENIZER,
        limits=Limits(words_per_s=(0, 100)),
        progress=False,
    )
    assert report.is_sound
    assert (tmp_path / "store" / QUARANTINE).read_text() == ""


def test_speech_alone_and_text_alone_can_be_imported(tmp_path):
    source = write_dataset(tmp_path / "d", talks())
    import_authors(source, tmp_path / "s", speech_tokens="mhubert25hzl11", speech_tokenizer=CARD, progress=False)
    assert not Store(tmp_path / "s")[0].has_text
    settings = {"text_tokens": "smollm", "text_tokenizer": TOKENIZER, "progress": False}
    import_authors(source, tmp_path / "t", **settings)
    assert not Store(tmp_path / "t")[0].has_speech
    assert not Store(tmp_path / "t")[0].is_aligned
    for name in ("wrds_tms", "wrds_tms_len"):  # as in a corpus of text
        (source / "smollm" / f"train.{name}").unlink()
    import_authors(source, tmp_path / "u", **settings)
    for row, talk in enumerate(talks()):
        np.testing.assert_array_equal(Store(tmp_path / "u")[row].word_token_counts, talk.counts)


def test_without_word_times_or_with_times_that_are_not_numbers_rows_are_kept_but_not_aligned(tmp_path):
    some = talks()
    some[2].ends_s[1] = np.nan
    source = write_dataset(tmp_path / "d", some)
    summary = import_authors(source, tmp_path / "store", **ARGUMENTS)
    assert summary.unaligned == 1
    assert not Store(tmp_path / "store")[2].is_aligned
    (source / "smollm" / "train.wrds_tms").unlink()
    assert import_authors(source, tmp_path / "again", **ARGUMENTS).unaligned == 6


def test_a_word_may_end_a_little_after_the_units_but_not_much(tmp_path):
    some = talks()
    some[0].ends_s[-1] += 0.07  # less than two frames of 40 ms
    some[1].ends_s[-1] += 2.0  # as when a duration lost 256 frames
    summary = import_authors(write_dataset(tmp_path / "d", some), tmp_path / "store", **ARGUMENTS)
    assert summary.quarantined == 1
    store = Store(tmp_path / "store")
    assert store[0].seconds == pytest.approx(some[0].seconds + 0.07)
    entry = json.loads((tmp_path / "store" / QUARANTINE).read_text())
    assert entry["id"] == "d/train/1"
    assert "past the" in entry["reason"]


def test_what_a_store_cannot_hold_goes_to_quarantine_and_moves_nothing(tmp_path):
    some = talks(8)
    some[1].durations[2] = 256  # written in 8 bits: 0
    some[2].units[3] = some[2].units[2]
    some[3].units[3] = EOS + 1
    some[4].units, some[4].durations = some[4].units[:0], some[4].durations[:0]
    some[5].text_ids, some[5].counts, some[5].ends_s = (
        array[:0] for array in (some[5].text_ids, some[5].counts, some[5].ends_s)
    )
    some[6].counts = np.append(some[6].counts[:-2], 2)  # two words in one
    some[6].ends_s = some[6].ends_s[1:]
    summary = import_authors(write_dataset(tmp_path / "d", some), tmp_path / "store", **ARGUMENTS)
    lines = (tmp_path / "store" / QUARANTINE).read_text().splitlines()
    reasons = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
    assert summary.quarantined == len(reasons) == 6
    for number, reason in {
        1: "durations has values below 1",
        2: "units has equal neighbours",
        3: "units reach from 0 to 21",
        4: "units is empty",
        5: "has no words",
        6: "is not one word",
    }.items():
        assert reason in reasons[f"d/train/{number}"]
    store = Store(tmp_path / "store")
    assert_same(store[0], some[0])
    assert_same(store[1], some[7])


def test_the_store_is_the_same_when_the_import_is_repeated_and_absent_when_it_fails(tmp_path, monkeypatch):
    source = write_dataset(tmp_path / "d", talks())
    import_authors(source, tmp_path / "a", **ARGUMENTS)
    data = bytearray((source / "smollm" / "train.bin").read_bytes())
    with pytest.raises(ValueError, match="holds a store already"):
        import_authors(source, tmp_path / "a", **ARGUMENTS)
    monkeypatch.setattr("smoltolk.data.authors._NUM_LOOKED_AT", 2)
    data[-2:] = b"\1\0"  # the last end token
    (source / "smollm" / "train.bin").write_bytes(data)
    with pytest.raises(ValueError, match="utterance 5 ends with 1 instead of the end token 0"):
        import_authors(source, tmp_path / "b", **ARGUMENTS)
    assert os.listdir(tmp_path / "b") == [".lock"]
    write_dataset(source, talks())
    import_authors(source, tmp_path / "b", **ARGUMENTS)
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


def cut(path, num_bytes=2):
    path.write_bytes(path.read_bytes()[:-num_bytes])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: cut(d / "mhubert25hzl11/train.bin"), r"train\.bin .*no width gives lengths that add up"),
        (lambda d: cut(d / "mhubert25hzl11/train.len", 8), "no width gives lengths that add up"),
        (lambda d: cut(d / "mhubert25hzl11/train.dur", 1), "no width gives a duration for each of"),
        (lambda d: cut(d / "smollm/train.wrds_tms", 4), "no width gives as many times as words"),
        (lambda d: cut(d / "smollm/train.wrds_tms_len", 8), "no width gives as many times as words"),
        (lambda d: (d / "smollm/train.wrds_tms_len").unlink(), r"wrds_tms_len cannot be read"),
        (lambda d: (d / "smollm/train.len").unlink(), r"train\.len cannot be read \(No such file"),
        (lambda d: (d / "smollm/train.bin").write_bytes(b""), r"train\.bin is empty"),
        (lambda d: (d / "smollm/train.bin").rename(d / "smollm/other.bin"), r"other\.bin: say which split"),
        (lambda d: write_dataset(d, talks(3), "large") and (d / "smollm/large.bin").rename(d / "smollm/x"), "x"),
    ],
)
def test_files_that_do_not_add_up_are_refused(tmp_path, damage, message):
    source = write_dataset(tmp_path / "d", talks())
    damage(source)
    if message == "x":  # a file of one side alone is that side alone
        assert import_authors(source, tmp_path / "store", **ARGUMENTS).utterances == 9
        return
    with pytest.raises(ValueError, match=message):
        import_authors(source, tmp_path / "store", **ARGUMENTS)
    assert not (tmp_path / "store" / MANIFEST).exists()


def test_both_sides_must_have_the_same_utterances(tmp_path):
    source = write_dataset(tmp_path / "d", talks())
    write_dataset(tmp_path / "e", talks(5))
    for name in ("bin", "len", "wrds_tms", "wrds_tms_len"):
        (tmp_path / "e/smollm" / f"train.{name}").rename(source / "smollm" / f"train.{name}")
    with pytest.raises(ValueError, match="train has 6 and 5 utterances"):
        import_authors(source, tmp_path / "store", **ARGUMENTS)


def test_words_must_end_where_utterances_end(tmp_path):
    some = talks()
    source = write_dataset(tmp_path / "d", some)
    lengths = np.concatenate([np.append(talk.counts, 1) for talk in some]).astype(np.uint64)
    total = len(lengths)
    lengths[2:5] = [1, 2, 0]
    lengths = np.append(lengths[lengths > 0], []).astype(np.uint64)
    (source / "smollm/train.wrds_tms_len").write_bytes(lengths.tobytes())
    (source / "smollm/train.wrds_tms").write_bytes(np.ones(total - 1, np.float32).tobytes())
    with pytest.raises(ValueError, match="does not hold the end token of its utterance alone"):
        import_authors(source, tmp_path / "store", **ARGUMENTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speech_tokens": None, "text_tokens": None}, "both missing"),
        ({"speech_tokenizer": None}, "needs the card of its speech tokenizer"),
        ({"text_tokenizer": None}, "needs its text tokenizer"),
        ({"speech_tokenizer": CARD | {"num_units": 500}}, "num_units 500, the data in .* 20"),
        ({"speech_tokenizer": CARD | {"unit_rate_hz": 50}}, "unit_rate_hz 50, the data in .* 25"),
        ({"speech_meta": SPEECH_META | {"n_q": 8}}, "n_q 8: a store holds units of one codebook"),
        ({"speech_meta": SPEECH_META | {"pad": 0}}, "expected the units, then eos, then pad"),
        ({"speech_meta": {"eos": 20}}, "speech_meta lacks vocab_size, pad, frame_rate, n_q"),
        ({"speech_meta": SPEECH_META | {"eos": 20.5}}, r"eos is 20\.5: give a whole number"),
        ({"speech_meta": SPEECH_META | {"frame_rate": float("nan")}}, "frame_rate is nan"),
        ({"text_meta": TEXT_META | {"eos": 3}}, "the end token 0, the data in .* 50 and 3"),
        ({"text_meta": TEXT_META | {"vocab_size": 9}}, "has 50 tokens .* the data in .* 9 and 0"),
        ({"splits": {"test": "test"}}, r"has no test\.bin: there are train"),
        ({"dtypes": {"speech.wav": "uint16"}}, "dtypes names 'speech.wav'"),
        ({"dtypes": {"speech.len": "int16"}}, "the type 'int16': give a type such as uint32"),
        ({"dtypes": {"text.wrds_tms": "uint16"}}, "such as float32"),
        ({"dtypes": {"speech.len": "uint16"}}, "no width gives lengths that add up"),
        ({"speech_tokens": "none"}, "meta.pkl cannot be read"),
    ],
)
def test_settings_that_are_not_those_of_the_data_are_refused(tmp_path, changes, message):
    source = write_dataset(tmp_path / "d", talks())
    with pytest.raises(ValueError, match=message):
        import_authors(source, tmp_path / "store", **(ARGUMENTS | changes))
    assert not (tmp_path / "store").exists()


def test_files_are_chosen_and_named_by_split_and_parts_are_known(tmp_path):
    source = write_dataset(tmp_path / "d", talks(), "train_0_2")
    write_dataset(source, talks(2), "train_1_2")
    write_dataset(source, talks(3), "test")
    with pytest.raises(ValueError, match=r"has test\.bin: say which split it is, such as test=train"):
        import_authors(source, tmp_path / "store", **ARGUMENTS)
    assert import_authors(source, tmp_path / "a", **ARGUMENTS, splits={"test": "test"}).splits == {"test": 3}
    for path in source.rglob("test.*"):
        path.unlink()
    assert import_authors(source, tmp_path / "b", **ARGUMENTS).splits == {"train": 8}
    for path in source.rglob("*.bin"):
        path.unlink()
    with pytest.raises(ValueError, match=r"hold no \.bin files"):
        import_authors(source, tmp_path / "c", **ARGUMENTS)


def test_an_import_of_which_nothing_can_be_used_fails(tmp_path):
    some = talks()
    for talk in some:
        talk.ends_s = talk.ends_s[::-1]
    with pytest.raises(ValueError, match=r"none of 6 utterances can be used: .* runs backwards"):
        import_authors(write_dataset(tmp_path / "d", some), tmp_path / "store", **ARGUMENTS)
    assert os.listdir(tmp_path / "store") == [".lock"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numbers_are_read_from_a_pickle_of_any_protocol(tmp_path, protocol):
    meta = SPEECH_META | {"frame_rate": 12.5, "big": 10**9, "negative": -3}
    for data in (pickle.dumps(meta, protocol), pickletools.optimize(pickle.dumps(meta, protocol))):
        (tmp_path / "meta.pkl").write_bytes(data)
        assert read_meta(tmp_path / "meta.pkl") == meta
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"eos": 1}, protocol))
    assert read_meta(tmp_path / "meta.pkl") == {"eos": 1}


class Exploit:
    """A pickle of this ends the program when it is loaded."""

    def __reduce__(self):
        return (os._exit, (7,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Exploit(), "instruction (GLOBAL|STACK_GLOBAL|SHORT_BINSTRING|REDUCE)"),
        ({"eos": Exploit()}, "holds more than"),
        ({"eos": np.int64(3)}, "holds more than"),
        ({"eos": "3"}, "values are not numbers"),
        ({"eos": True}, "holds more than"),
        ({3: 3}, "keys are not names"),
        ([1, 2], "holds more than"),
        ({"eos": {"a": 1}}, "values are not numbers"),
        (7, "not a dict"),
    ],
)
def test_a_pickle_of_anything_else_is_refused_and_never_run(tmp_path, content, protocol, message):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match=message) as raised:
        read_meta(tmp_path / "meta.pkl")
    assert "give its numbers as options" in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"}", b"u.", b"}(K\1.", b"}K\1K\2s.", b"not a pickle", b"}" * 70_000])
def test_a_damaged_pickle_is_refused(tmp_path, data):
    (tmp_path / "meta.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=r"meta\.pkl"):
        read_meta(tmp_path / "meta.pkl")


def test_memory_does_not_grow_with_the_files(tmp_path):
    some = [Talk(seed, num_words=200) for seed in range(8)]
    source = write_dataset(tmp_path / "d", some * 100)
    arguments = ARGUMENTS | {"text_tokens": None, "rows_per_shard": 64}
    import_authors(write_dataset(tmp_path / "e", some), tmp_path / "warm", **arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import_authors(source, tmp_path / "store", **arguments)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_the_command_imports_with_a_card_or_numbers_of_its_own(tmp_path, capsys, tiny_world):
    source = write_dataset(tmp_path / "d", talks())
    (source / "mhubert25hzl11" / "meta.pkl").write_bytes(pickle.dumps(Exploit()))
    (tmp_path / "card.json").write_text(json.dumps(CARD))
    command = ["data", "import-authors", str(source), str(tmp_path / "store")]
    command += ["--speech-tokens", "mhubert25hzl11", "--speech-tokenizer-card", str(tmp_path / "card.json")]
    command += ["--text-tokens", "smollm", "--text-tokenizer", str(tiny_world / "backbone")]
    assert cli.main(command) == 1
    assert "a pickle can run any program: give its numbers as options" in capsys.readouterr().err
    command += ["--speech-meta", *(f"{name}={value}" for name, value in SPEECH_META.items())]
    assert cli.main([*command, "--split", "train"]) == 1
    assert "'train' is not of the form NAME=VALUE" in capsys.readouterr().err
    assert cli.main([*command, "--split", "train=train", "--dtype", "speech.len=uint64"]) == 0
    printed = capsys.readouterr().out
    assert "6 utterances (6 train)" in printed
    assert "train.len: uint64" in printed
    assert len(Store(tmp_path / "store")) == 6
    (tmp_path / "card.json").write_text("[]")
    command[3] = str(tmp_path / "other")
    assert cli.main(command) == 1
    assert "card.json is not the card of a speech tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("len_type", ["uint16", "uint32", "int64"])
def test_samples_are_read_without_knowing_their_tokenizer(tmp_path, len_type):
    some = talks(5)
    folder = write_dataset(tmp_path, some, "test", len_type=len_type)
    samples, end = read_samples(folder / "mhubert25hzl11", "test")
    assert end == EOS
    for sample, talk in zip(samples, some, strict=True):
        np.testing.assert_array_equal(sample, talk.units)
    path = folder / "mhubert25hzl11" / "test.bin"
    tokens = np.fromfile(path, dtype="int16")
    tokens[-1] = 3
    tokens.tofile(path)
    with pytest.raises(ValueError, match="no width gives lengths that add up and end tokens all the same"):
        read_samples(folder / "mhubert25hzl11", "test")
