"""Readers of word times: the layouts they know, and a reason for every bad time."""

import gzip
import json
import sys

import pytest

from smoltolk.data.alignments import read_alignment, read_ctm, read_cuts, read_json, read_textgrid
from smoltolk.speech.alignment import AlignmentError, TimedWord, align_words

WORDS = [TimedWord("The", 0.1, 0.3), TimedWord("cat", 0.3, 0.7), TimedWord("sat.", 0.9, 1.25)]


def ours(words=WORDS):
    return [{"text": word.text, "start_s": word.start_s, "end_s": word.end_s} for word in words]


def write_json(folder, content):
    path = folder / "words.json"
    path.write_text(json.dumps(content))
    return path


def long_textgrid(entries, end_s=1.5, tier="words"):
    """A TextGrid in Praat's long format, with a tier of phones before the words."""

    def tier_lines(number, name, intervals):
        yield f'    item [{number}]:\n        class = "IntervalTier"\n        name = "{name}"\n'
        yield f"        xmin = 0\n        xmax = {end_s}\n        intervals: size = {len(intervals)}\n"
        for i, (text, start, end) in enumerate(intervals, start=1):
            yield f"        intervals [{i}]:\n            xmin = {start}\n            xmax = {end}\n"
            yield f'            text = "{text}"\n'

    return "".join(
        [
            'File type = "ooTextFile"\nObject class = "TextGrid"\n\n',
            f"xmin = 0\nxmax = {end_s}\ntiers? <exists>\nsize = 2\nitem []:\n",
            *tier_lines(1, "phones", [("DH", 0, end_s)]),
            *tier_lines(2, tier, entries),
        ]
    )


def short_textgrid(entries, end_s=1.5):
    intervals = "".join(f'{start}\n{end}\n"{text}"\n' for text, start, end in entries)
    return (
        f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n{end_s}\n<exists>\n1\n'
        f'"IntervalTier"\n"words"\n0\n{end_s}\n{len(entries)}\n{intervals}'
    )


INTERVALS = [("", 0, 0.1), ("The", 0.1, 0.3), ("cat", 0.3, 0.7), ("sp", 0.7, 0.9), ("sat.", 0.9, 1.25), ("", 1.25, 1.5)]


def cut(cut_id="a_0", items=None, *, start=15.44, in_custom=False):
    """A cut as Libriheavy has them, with word times."""
    items = [[w.text, w.start_s, w.end_s - w.start_s, 0.9] for w in WORDS] if items is None else items
    alignment = {"alignment": {"word": items}}
    custom = {"texts": ["The cat sat.", "THE CAT SAT"], "begin_byte": 0, "end_byte": 12}
    supervision = {"id": cut_id, "recording_id": "a", "start": 0, "duration": 1.5, "channel": 0, "speaker": "100"}
    supervision |= {"custom": custom | alignment} if in_custom else {"custom": custom} | alignment
    return {
        "id": cut_id,
        "start": start,
        "duration": 1.5,
        "channel": 0,
        "supervisions": [supervision],
        "recording": {"id": "a", "sources": [{"type": "file", "channels": [0], "source": "a.flac"}], "duration": 99.0},
        "type": "MonoCut",
    }


def write_cuts(folder, cuts, name="cuts.jsonl"):
    data = "".join(json.dumps(cut) + "\n" for cut in cuts).encode()
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def same(words, expected=WORDS):
    assert [word.text for word in words] == [word.text for word in expected]
    assert [word.start_s for word in words] == pytest.approx([word.start_s for word in expected])
    assert [word.end_s for word in words] == pytest.approx([word.end_s for word in expected])
    return True


# What is read


def test_our_json_is_read_and_put_to_its_text(tmp_path):
    words = read_alignment(write_json(tmp_path, ours()))
    assert words == WORDS
    assert align_words(words, "the cat sat") == pytest.approx([0.3, 0.7, 1.25])


@pytest.mark.parametrize(
    "whisper",
    [
        {  # openai-whisper
            "text": " The cat sat.",
            "segments": [
                {"id": 0, "start": 0.0, "words": [{"word": " The", "start": 0.1, "end": 0.3, "probability": 0.9}]},
                {
                    "id": 1,
                    "words": [
                        {"word": " cat", "start": 0.3, "end": 0.7, "probability": 0.8},
                        {"word": " sat.", "start": 0.9, "end": 1.25, "probability": 1.0},
                    ],
                },
            ],
            "language": "en",
        },
        {  # WhisperX
            "segments": [{"start": 0.1, "end": 1.25, "text": " The cat sat."}],
            "word_segments": [
                {"word": "The", "start": 0.1, "end": 0.3, "score": 0.9},
                {"word": "cat", "start": 0.3, "end": 0.7, "score": 0.8},
                {"word": "sat.", "start": 0.9, "end": 1.25, "score": 0.7},
            ],
        },
        {  # transformers
            "text": " The cat sat.",
            "chunks": [
                {"text": " The", "timestamp": [0.1, 0.3]},
                {"text": " cat", "timestamp": [0.3, 0.7]},
                {"text": " sat.", "timestamp": [0.9, 1.25]},
            ],
        },
    ],
)
def test_whispers_json_is_read(tmp_path, whisper):
    assert same(read_alignment(write_json(tmp_path, whisper)))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom"])
@pytest.mark.parametrize("layout", [long_textgrid, short_textgrid])
def test_textgrids_are_read_long_and_short_in_all_encodings(tmp_path, layout, encoding):
    path = tmp_path / "a.TextGrid"
    text = layout([(text.replace("cat", "çat"), start, end) for text, start, end in INTERVALS])
    path.write_bytes(b"\xfe\xff" + text.encode("utf-16-be") if encoding == "utf-16-be-bom" else text.encode(encoding))
    assert same(read_alignment(path), [WORDS[0], TimedWord("çat", 0.3, 0.7), WORDS[2]])


def test_the_tier_of_a_textgrid_is_found_or_named(tmp_path):
    path = tmp_path / "a.TextGrid"
    path.write_text(long_textgrid(INTERVALS, tier="ann - words"))
    assert same(read_textgrid(path))
    assert [word.text for word in read_textgrid(path, tier="phones")] == ["DH"]
    with pytest.raises(AlignmentError, match="no tier 'word': its tiers are phones, ann - words"):
        read_textgrid(path, tier="word")
    path.write_text(long_textgrid(INTERVALS, tier="orthography"))
    with pytest.raises(AlignmentError, match="0 tiers of words: name one of its tiers, phones, orthography"):
        read_textgrid(path)


def test_a_tier_of_points_is_refused(tmp_path):
    path = tmp_path / "a.TextGrid"
    path.write_text(
        'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n1\n<exists>\n1\n'
        '"TextTier"\n"words"\n0\n1\n1\n0.5\n"the"\n'
    )
    with pytest.raises(AlignmentError, match="holds points"):
        read_textgrid(path)


def test_without_praatio_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "praatio.utilities", None)
    with pytest.raises(ImportError, match=r"pip install 'smoltolk\[align\]'"):
        read_textgrid(tmp_path / "a.TextGrid")


def test_ctm_holds_many_recordings(tmp_path):
    path = tmp_path / "all.ctm"
    path.write_text(
        ";; a comment\na 1 0.1 0.2 The 0.98\na 1 0.3 0.4 cat\na 1 0.70 0.2 <eps>\n\n"
        "b A 0.0 0.5 Yes 1.0\na 1 0.9 0.35 sat. 0.5\n"
    )
    recordings = read_alignment(path)
    assert list(recordings) == ["a", "b"]
    assert same(recordings["a"])
    assert recordings["b"] == [TimedWord("Yes", 0.0, 0.5)]


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
@pytest.mark.parametrize("in_custom", [False, True])
def test_cuts_are_read_with_times_of_the_cut(tmp_path, name, in_custom):
    cuts = read_alignment(write_cuts(tmp_path, [cut(in_custom=in_custom), cut("b_1", [["Yes", 0.0, 0.5]])], name))
    assert same(cuts["a_0"])
    assert cuts["b_1"] == [TimedWord("Yes", 0.0, 0.5)]


def test_times_of_the_recording_in_a_cut_are_refused(tmp_path):
    items = [[w.text, 15.44 + w.start_s, w.end_s - w.start_s] for w in WORDS]
    with pytest.raises(AlignmentError, match=r"cut 'a_0': word 'The' .* past the 1.500 s of audio"):
        read_cuts(write_cuts(tmp_path, [cut(items=items)]))


def test_items_as_objects_and_supervisions_out_of_order_are_read(tmp_path):
    both = cut(items=[{"symbol": "cat", "start": 0.3, "duration": 0.4}])
    both["supervisions"][0]["start"] = 0.3
    both["supervisions"].append({"start": 0.1, "alignment": {"word": [["The", 0.1, 0.2, None]]}})
    assert same(read_cuts(write_cuts(tmp_path, [both]))["a_0"], WORDS[:2])


def test_bad_utterances_of_a_file_are_handed_over_and_the_others_read(tmp_path):
    as_published = cut("c_2")
    del as_published["supervisions"][0]["alignment"]
    path = write_cuts(tmp_path, [cut(), cut("b_1", [["Yes", 0.5, -0.2]]), as_published])
    errors = {}
    cuts = read_alignment(path, on_error=lambda cut_id, error: errors.update({cut_id: str(error)}))
    assert list(cuts) == ["a_0"]
    assert "cut 'b_1': word 'Yes' (number 0) runs backwards" in errors["b_1"]
    assert "cut 'c_2' has no word times: align it" in errors["c_2"]
    with pytest.raises(AlignmentError, match="'b_1'"):
        read_cuts(path)


# What is refused

BAD_TIMES = [
    ("missing", (None, 0.7), "word 'cat' (number 1) has no start"),
    ("missing", (0.3, None), "word 'cat' (number 1) has no end"),
    ("not a number", ("soon", 0.7), "has no start ('soon' to 0.7)"),
    ("NaN", (0.3, float("nan")), "lasts from 0.3 to nan s"),
    ("infinite", (0.3, float("inf")), "lasts from 0.3 to inf s"),
    ("negative", (-0.3, 0.7), "lasts from -0.3 to 0.7 s"),
    ("backwards", (0.7, 0.3), "runs backwards, from 0.700 to 0.300 s"),
    ("overlapping", (0.2, 0.7), "overlaps 'The', which ends at 0.300 s"),
    ("out of order", (0.05, 0.7), "starts at 0.050 s, before the word before it (0.100 s)"),
    ("beyond the end", (0.3, 1.56), "ends at 1.560 s, past the 1.500 s of audio"),
]


@pytest.mark.parametrize(("kind", "times", "reason"), BAD_TIMES)
def test_a_bad_time_names_the_file_and_the_word(tmp_path, kind, times, reason):
    content = ours()
    content[1] |= dict(zip(("start_s", "end_s"), times, strict=True))
    path = write_json(tmp_path, content)
    with pytest.raises(AlignmentError) as error:
        read_alignment(path, seconds=1.5)
    assert str(error.value).startswith(f"{path}: word 'cat' (number 1)")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("intervals", "reason"),
    [
        ([("The", 0.1, 0.3), ("cat", 0.3, 1.9)], "word 'cat' (number 1) ends at 1.900 s, past the 1.500 s"),
        ([("The", 0.1, 0.5), ("cat", 0.3, 0.9)], "word 'cat' (number 1) starts at 0.300 s and overlaps 'The'"),
        ([("", 0.0, 1.5)], "has no words"),
    ],
)
def test_bad_textgrids_name_the_word(tmp_path, intervals, reason):
    path = tmp_path / "a.TextGrid"
    path.write_text(long_textgrid(intervals))
    with pytest.raises(AlignmentError) as error:
        read_textgrid(path)
    assert str(path) in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a 1 0.5 0.2", "all.ctm:2 has 4 columns"),
        ("a 2 0.5 0.2 cat", "has the channels '1' and '2'"),
        ("a 1 0.5 -0.2 cat", "recording 'a': word 'cat' (number 1) runs backwards"),
        ("a 1 x 0.2 cat", "word 'cat' (number 1) has no start"),
        ("a 1 0.15 0.2 cat", "overlaps 'The'"),
        ("a 1 nan 0.2 cat", "lasts from nan to nan s"),
    ],
)
def test_bad_lines_of_ctm_are_named(tmp_path, line, reason):
    path = tmp_path / "all.ctm"
    path.write_text(f"a 1 0.1 0.2 The\n{line}\n")
    with pytest.raises(AlignmentError) as error:
        read_ctm(path)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"segments": [{"words": [{"word": "2014."}]}]}, "word '2014.' (number 0) has no start"),
        ({"chunks": [{"text": " The", "timestamp": [0.1, None]}]}, "word 'The' (number 0) has no end"),
        ({"chunks": [{"text": " The cat", "timestamp": [0.1, 0.7]}]}, 'return_timestamps="word"'),
        ({"segments": [{"text": " The cat", "start": 0.1, "end": 0.7}]}, "word_timestamps=True"),
        ([], "has no words"),
        (["The"], "holds 'The' for a word"),
        ([{"start_s": 0.1, "end_s": 0.2}], "word number 0 is None: give its text"),
        (7, "holds a int"),
    ],
)
def test_json_without_usable_words_says_why(tmp_path, content, reason):
    path = write_json(tmp_path, content)
    with pytest.raises(AlignmentError) as error:
        read_json(path)
    assert str(path) in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "of no known kind"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"\xff", "neither UTF-8 nor UTF-16"),
        ("a.TextGrid", b"words", "is no TextGrid"),
        ("a.jsonl", b'{"id": "a"}\n', "a.jsonl:1 is no cut"),
        ("a.jsonl", b"nothing\n", "a.jsonl:1 is no cut"),
        ("a.jsonl.gz", b"\x1f\x8bnothing", "cannot be read"),
        ("missing.ctm", None, "cannot be read"),
    ],
)
def test_damaged_and_unknown_files_are_named(tmp_path, name, data, reason):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(AlignmentError) as error:
        read_alignment(tmp_path / name)
    assert name in str(error.value)
    assert reason in str(error.value)


def test_a_cut_may_not_come_twice(tmp_path):
    with pytest.raises(AlignmentError, match=r"cuts.jsonl:2 has the cut 'a_0' again"):
        read_cuts(write_cuts(tmp_path, [cut(), cut()]))


def test_rounding_may_let_words_overlap_by_less_than_a_millisecond(tmp_path):
    words = [TimedWord("a", 0.1, 0.30004), TimedWord("b", 0.3, 0.30002), TimedWord("c", 0.3, 0.4)]
    assert align_words(read_json(write_json(tmp_path, ours(words)))) == pytest.approx([0.30004, 0.30004, 0.4])
