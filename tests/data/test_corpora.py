"""Readers of corpora, each on a tiny copy of the real layout."""

import gzip
import io
import json
import tarfile

import pytest
import soundfile
from tests.data.conftest import RATE_HZ, quarantine, sound

from smoltolk.data.corpora import libri_light, libriheavy, librispeech, open_source, peoples_speech, tedlium, voxpopuli
from smoltolk.data.prepare import prepare
from smoltolk.data.store import Store


def rows_of(source):
    return [row for piece in source.pieces(100) for row in piece.rows()]


def write_sound(path, seed=0, seconds=0.5, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(seed, seconds), RATE_HZ, **options)


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_librispeech(tmp_path, tokenizers):
    chapter = tmp_path / "LibriSpeech" / "train-clean-100" / "19" / "198"
    for number in range(3):
        write_sound(chapter / f"19-198-000{number}.flac", number)
    write_lines(chapter / "19-198.trans.txt", "19-198-0000 ONE TWO", "19-198-0001 THREE", "19-198-0007 FOUR")
    write_sound(tmp_path / "LibriSpeech" / "dev-other" / "7" / "1" / "7-1-0000.flac")
    write_lines(tmp_path / "LibriSpeech" / "dev-other" / "7" / "1" / "7-1.trans.txt", "7-1-0000 ONE")
    write_lines(tmp_path / "LibriSpeech" / "SPEAKERS.TXT", "19 | F")
    for root in (tmp_path / "LibriSpeech", tmp_path / "LibriSpeech" / "train-clean-100"):
        rows = {row.id: row for row in rows_of(librispeech(root))}
        assert rows["19-198-0000"].text == "ONE TWO"
        assert rows["19-198-0000"].speaker == "19"
        assert rows["19-198-0000"].split == "train"
        assert rows["19-198-0002"].text is None
    source = open_source(f"librispeech:{tmp_path / 'LibriSpeech'}")
    assert [row.split for row in rows_of(source)] == ["validation", "train", "train", "train", "train"]
    prepare(source, tmp_path / "out", **tokenizers)
    store = Store(tmp_path / "out")
    assert [store[row].id for row in range(4)] == ["7-1-0000", "19-198-0000", "19-198-0001", "19-198-0002"]
    (bad,) = quarantine(tmp_path / "out")
    assert bad["id"] == "19-198-0007"
    assert bad["reason"].startswith("train-clean-100/19/198/19-198-0007.flac cannot be read")


def test_a_corpus_is_read_from_inside_its_folders(tmp_path, monkeypatch):
    write_sound(tmp_path / "LibriSpeech" / "dev-other" / "7" / "1" / "7-1-0000.flac")
    for inside in (".", "dev-other", "dev-other/7", "dev-other/7/1"):
        monkeypatch.chdir(tmp_path / "LibriSpeech" / inside)
        (row,) = rows_of(open_source("librispeech:."))
        assert (row.id, row.split) == ("7-1-0000", "validation")
    write_lines(tmp_path / "tedlium" / "test" / "stm" / "talk.stm", "talk 1 ann 0.0 1.0 <o> one")
    monkeypatch.chdir(tmp_path / "tedlium" / "test")
    (row,) = rows_of(open_source("tedlium:."))
    assert (row.audio, row.split) == ("sph/talk.sph", "test")


def test_libri_light_is_cut_at_pauses(tmp_path, tokenizers):
    book = tmp_path / "small" / "100" / "sea_fairies_0812_librivox_64kb_mp3"
    write_sound(book / "01.flac", 1, 3.0)
    voice = [[0.1, 0.6], [0.7, 1.0], [1.9, 2.5]]
    about = {"speaker": "100", "book_meta": {"title": "Sea Fairies"}, "snr": 10.3, "voice_activity": voice}
    write_lines(book / "01.json", json.dumps(about))
    write_sound(book / "02.flac", 2)
    write_sound(book / "03.flac", 3)
    write_lines(book / "03.json", "{")
    rows = rows_of(libri_light(tmp_path))
    name = "small/100/sea_fairies_0812_librivox_64kb_mp3"
    assert [(row.id, row.start_s, row.end_s, row.speaker, row.text) for row in rows] == [
        (f"{name}/01_0000", 0.1, 2.5, "100", None),
        (f"{name}/02", None, None, None, None),
        (f"{name}/03", None, None, None, None),
    ]
    assert "03.json is damaged" in rows[2].error
    summary = prepare(f"libri-light:{tmp_path}", tmp_path / "out", **tokenizers | {"text_tokenizer": None})
    assert (summary.utterances, summary.quarantined) == (2, 1)
    assert Store(tmp_path / "out")[0].seconds == pytest.approx(2.4)


def test_parts_of_a_chapter_last_at_most_a_minute(tmp_path):
    (tmp_path / "01.flac").touch()
    voice = [[1, 30], [31, 60.5], [61.5, 70], [80, 230], [231, 232]]
    write_lines(tmp_path / "01.json", json.dumps({"speaker": 4, "voice_activity": voice}))
    parts = [(row.start_s, row.end_s) for row in rows_of(libri_light(tmp_path))]
    assert parts == [(1, 60.5), (61.5, 70), (80, 130), (130, 180), (180, 232)]
    assert rows_of(libri_light(tmp_path))[0].speaker == "4"


def cut(name, start, **changes):
    recording = "small/100/sea_fairies/01_baum"
    supervision = {
        "id": name,
        "start": 0,
        "duration": 0.5,
        "speaker": "100",
        "custom": {"texts": ['"One," two.', "ONE TWO"], "pre_texts": ["", ""], "begin_byte": 1, "end_byte": 9},
    }
    return {
        "id": name,
        "start": start,
        "duration": 0.5,
        "channel": 0,
        "supervisions": [supervision | changes],
        "recording": {
            "id": recording,
            "sources": [{"type": "file", "channels": [0], "source": f"download/librilight/{recording}.flac"}],
            "sampling_rate": RATE_HZ,
        },
        "type": "MonoCut",
    }


def test_libriheavy(tmp_path, tokenizers):
    write_sound(tmp_path / "librilight" / "small" / "100" / "sea_fairies" / "01_baum.flac", 1, 2.0)
    cuts = [cut("a_0", 0.25), cut("a_1", 1.0, custom=None, text="ONE TWO")]
    for subset in ("small", "dev"):
        write_lines(tmp_path / f"libriheavy_cuts_{subset}.jsonl.gz", *map(json.dumps, cuts))
    source = libriheavy(tmp_path / "libriheavy_cuts_small.jsonl.gz", tmp_path / "librilight")
    rows = rows_of(source)
    assert [(row.id, row.start_s, row.end_s, row.text, row.speaker, row.split) for row in rows] == [
        ("a_0", 0.25, 0.75, '"One," two.', "100", None),
        ("a_1", 1.0, 1.5, "ONE TWO", "100", None),
    ]
    assert rows_of(libriheavy(tmp_path / "libriheavy_cuts_dev.jsonl.gz"))[0].split == "validation"
    same = open_source(f"libriheavy:{tmp_path}/libriheavy_cuts_small.jsonl.gz", audio_folder=tmp_path / "librilight")
    summary = prepare(same, tmp_path / "out", **tokenizers)
    assert (summary.utterances, summary.seconds, summary.unaligned) == (2, 1.0, 2)


def test_a_line_that_is_no_cut_is_refused(tmp_path):
    write_lines(tmp_path / "libriheavy_cuts_small.jsonl", json.dumps(cut("a", 0)), '{"id": "b"}')
    with pytest.raises(ValueError, match=r"libriheavy_cuts_small.jsonl:2 is no cut of Libriheavy \(KeyError"):
        libriheavy(tmp_path / "libriheavy_cuts_small.jsonl").scan(10)


def test_peoples_speech_is_read_inside_its_archives(tmp_path, tokenizers):
    names = ["doc_a/part_1.flac", "doc_a/part_2.flac", "doc_b/part_1.flac"]
    (tmp_path / "clean").mkdir()
    for number, members in enumerate((names[:2], names[2:])):
        with tarfile.open(tmp_path / "clean" / f"clean_00000{number}.tar", "w") as tar:
            for name in members:
                file = io.BytesIO()
                soundfile.write(file, sound(len(name) + number), RATE_HZ, format="FLAC")
                about = tarfile.TarInfo(f"./{name}")
                about.size = len(file.getvalue())
                file.seek(0)
                tar.addfile(about, file)
    documents = [
        {"identifier": "doc_a", "training_data": {"name": [names[0], "doc_a/lost.flac"], "label": ["one", "two"]}},
        {"identifier": "doc_b", "training_data": {"name": [names[2]], "label": ["three four"], "duration_ms": [500]}},
    ]
    write_lines(tmp_path / "clean.json", *map(json.dumps, documents))
    rows = rows_of(peoples_speech(tmp_path))
    assert [(row.id, row.text) for row in rows] == [
        ("clean/doc_a/part_1.flac", "one"),
        ("clean/doc_a/part_2.flac", None),
        ("clean/doc_b/part_1.flac", "three four"),
        ("clean/doc_a/lost.flac", None),
    ]
    summary = prepare(f"peoples-speech:{tmp_path}", tmp_path / "out", **tokenizers)
    assert (summary.utterances, summary.seconds) == (3, 1.5)
    assert quarantine(tmp_path / "out")[0]["reason"] == "doc_a/lost.flac is in no archive of clean/"
    encode = tokenizers["speech_tokenizer"].encode
    assert Store(tmp_path / "out")[2].units.tolist() == encode(sound(len(names[2]) + 1)).units.tolist()


def test_an_archive_that_is_not_whole_is_refused(tmp_path):
    archive = tmp_path / "clean" / "clean_000000.tar"
    archive.parent.mkdir()
    write_lines(tmp_path / "clean.json", json.dumps({"training_data": {"name": [], "label": []}}))
    with tarfile.open(archive, "w") as tar:
        for name in ("a.flac", "b.flac"):
            about = tarfile.TarInfo(name)
            about.size = 1000
            tar.addfile(about, io.BytesIO(bytes(1000)))
    whole = archive.read_bytes()
    assert [row.id for row in rows_of(peoples_speech(tmp_path))] == ["clean/a.flac", "clean/b.flac"]
    member = 512 + 1024  # header and data of each
    ends = (0, 100, 700, member, member + 100, member + 700, 2 * member, 2 * member + 100)
    for content in (*(whole[:end] for end in ends), b"garbage" * 1000, whole[:member] + b"garbage" * 1000):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"clean_000000.tar is no whole tar archive \(.+\): copy it again"):
            peoples_speech(tmp_path).scan(1)


def test_tedlium(tmp_path, tokenizers):
    train = tmp_path / "TEDLIUM_release-3" / "legacy" / "train"
    write_sound(train / "sph" / "AlGore_2009.sph", 1, 2.0, format="NIST", subtype="PCM_16")
    write_lines(
        train / "stm" / "AlGore_2009.stm",
        ";; a comment",
        "AlGore_2009 1 AlGore_2009 0.10 0.60 <o,f0,male> it 's one {NOISE} two(2) <sil> three",
        "AlGore_2009 1 inter_segment_gap 0.60 0.80 <o,f0,> ignore_time_segment_in_scoring",
        "AlGore_2009 1 AlGore_2009 0.80 1.50 <o,f0,male> one <unk> two",
        "AlGore_2009 1 AlGore_2009 1.50 9.50 <o,f0,male> too late",
    )
    rows = rows_of(tedlium(tmp_path / "TEDLIUM_release-3"))
    assert [(row.id, row.text) for row in rows] == [
        ("AlGore_2009-00000100-00000600", "it's one two three"),
        ("AlGore_2009-00000800-00001500", None),
        ("AlGore_2009-00001500-00009500", "too late"),
    ]
    assert {row.split for row in rows} == {"train"}
    summary = prepare(f"tedlium:{tmp_path / 'TEDLIUM_release-3'}", tmp_path / "out", **tokenizers)
    assert (summary.utterances, summary.quarantined) == (2, 1)
    assert summary.seconds == pytest.approx(1.2)
    write_lines(train / "stm" / "Bad.stm", "AlGore_2009 1 one two")
    with pytest.raises(ValueError, match=r"Bad.stm:1 is no line of an STM file"):
        rows_of(tedlium(tmp_path / "TEDLIUM_release-3"))


def test_voxpopuli_transcribed(tmp_path, tokenizers):
    root = tmp_path / "transcribed_data" / "en"
    names = ["20180313-0900-PLENARY-15-en_20180313-21:09:14_2", "20180313-0900-PLENARY-15-en_20180313-21:09:14_3"]
    for number, name in enumerate(names):
        write_sound(root / "2018" / f"{name}.ogg", number, 1.0)
    header = "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender"
    lines = [f'{names[0]}\tOne, "two.\tone two\t96849\tdev\tmale', f"{names[1]}\t\tthree\t96849\tdev\tmale"]
    write_lines(root / "asr_dev.tsv", header, *lines)
    rows = rows_of(voxpopuli(root))
    assert [(row.id, row.text, row.speaker, row.split) for row in rows] == [
        (names[0], 'One, "two.', "96849", "validation"),
        (names[1], "three", "96849", "validation"),
    ]
    assert prepare(f"voxpopuli:{tmp_path}", tmp_path / "out", **tokenizers).utterances == 2
    write_lines(root / "asr_test.tsv", "id\ttext")
    with pytest.raises(ValueError, match=r"asr_test.tsv has no column normalized_text"):
        rows_of(voxpopuli(root))


def test_voxpopuli_unlabelled(tmp_path):
    for name in ("20090112-0900-PLENARY-6_en_0", "20090112-0900-PLENARY-6_en_1"):
        write_sound(tmp_path / "en" / "2009" / f"{name}.ogg")
    rows = rows_of(voxpopuli(tmp_path))
    assert [(row.id, row.text) for row in rows] == [
        ("en/2009/20090112-0900-PLENARY-6_en_0", None),
        ("en/2009/20090112-0900-PLENARY-6_en_1", None),
    ]


def test_local_texts_are_rows_by_line(tmp_path, tokenizers):
    write_lines(tmp_path / "stories.txt", "one two", "", "three")
    write_lines(tmp_path / "stories.jsonl.gz", json.dumps({"text": "four", "url": "…", "score": 3}))
    rows = rows_of(open_source(f"text:{tmp_path / 'stories.txt'}"))
    assert [(row.id, row.text) for row in rows] == [("stories.txt:1", "one two"), ("stories.txt:3", "three")]
    settings = tokenizers | {"speech_tokenizer": None}
    prepare(f"text:{tmp_path / 'stories.jsonl.gz'}", tmp_path / "out", **settings)
    assert Store(tmp_path / "out")[0].text == "four"
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8"):
        rows_of(open_source(f"text:{tmp_path / 'latin.txt'}"))
