"""The work on rows: batches, alignment, and what a failure of either changes."""

import io
import time
from dataclasses import dataclass

import numpy as np
import pytest
import soundfile
from tests.data.conftest import RATE_HZ, contents, mixed_manifest, quarantine, sound, spoken_row, write_manifest

from smoltolk.data.blocks import Preparer, blocks_of
from smoltolk.data.prepare import prepare
from smoltolk.data.sources import SourceRow
from smoltolk.data.store import Store
from smoltolk.data.utterance import StoreMetadata
from smoltolk.speech.audio import stream_audio
from smoltolk.speech.mel import MelTokenizer


@dataclass(frozen=True)
class FakeAlignment:
    word_ends_s: list[float]
    confidence: float | None


@dataclass(frozen=True)
class FakeAligner:
    """Spaces the words evenly; cannot find "four"."""

    sample_rate_hz: int = RATE_HZ
    fingerprint: str = "even"

    def align(self, audio, text):
        if "four" in text:
            raise ValueError("the words cannot be found in the audio: leave it out")
        assert audio.dtype == np.float32
        ends = np.linspace(0, len(audio) / self.sample_rate_hz, len(text.split()) + 1)[1:]
        return FakeAlignment(ends.tolist(), 0.75)


class RecordingTokenizer(MelTokenizer):
    """Notes how long the batches are, in samples."""

    def encode_batch(self, audios):
        self.batches.append([len(audio) for audio in audios])
        if self.refuses in map(len, audios):
            raise ValueError("one is bad")
        return super().encode_batch(audios)


@pytest.fixture
def recording_tokenizer(speech_tokenizer):
    like = speech_tokenizer
    tokenizer = RecordingTokenizer(like.centroids, like.band_means, like.band_stds, like.settings)
    tokenizer.batches, tokenizer.refuses = [], None
    return tokenizer


@pytest.mark.parametrize("batch_s", [0.1, 1.2, 1000.0])
def test_batches_change_nothing(tmp_path, tokenizers, batch_s):
    source = mixed_manifest(tmp_path / "in")
    prepare(source, tmp_path / "one", **tokenizers)
    prepare(source, tmp_path / "other", **tokenizers, batch_s=batch_s)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_audio_is_encoded_in_batches_of_a_length_and_a_bad_one_alone(recording_tokenizer):
    metadata = StoreMetadata(None, recording_tokenizer.card())
    preparer = Preparer(metadata, None, None, recording_tokenizer, batch_s=1.2)
    lengths = [0.5, 0.5, 0.4, 0.7, 0.6]
    rows = [SourceRow(id=f"{length}-{n}", source="s", audio=wav(sound(n, length))) for n, length in enumerate(lengths)]
    assert len(preparer.prepare(rows).utterances) == 5
    assert recording_tokenizer.batches == [[8000, 8000, 6400], [11200, 9600]]
    recording_tokenizer.batches.clear()
    recording_tokenizer.refuses = 8000
    block = preparer.prepare(rows)
    assert [utterance.id for utterance in block.utterances] == ["0.4-2", "0.7-3", "0.6-4"]
    assert block.quarantined == [{"id": f"0.5-{n}", "source": "s", "reason": "one is bad"} for n in range(2)]
    assert recording_tokenizer.batches == [[8000, 8000, 6400], [8000], [8000], [6400], [11200, 9600]]


def wav(audio):
    file = io.BytesIO()
    soundfile.write(file, audio, RATE_HZ, format="WAV")
    return file.getvalue()


def test_long_recordings_are_read_in_blocks_and_give_the_same_store(tmp_path, tokenizers, monkeypatch):
    source = mixed_manifest(tmp_path / "in")
    (tmp_path / "in" / "1.wav").write_bytes(wav(sound(1))[:-100])
    prepare(source, tmp_path / "at-once", **tokenizers)
    monkeypatch.setattr("smoltolk.data.blocks._LONG_S", 0.2)
    monkeypatch.setattr("smoltolk.data.blocks._LONG_BYTES", 0)
    streamed = []

    def noted_stream(path, **settings):
        streamed.append(path)
        return stream_audio(path, **settings)

    monkeypatch.setattr("smoltolk.data.blocks.stream_audio", noted_stream)
    prepare(source, tmp_path / "in-blocks", **tokenizers)
    assert len(streamed) >= 7
    assert contents(tmp_path / "at-once") == contents(tmp_path / "in-blocks")


def test_an_aligner_finds_the_times_that_are_missing(tmp_path, tokenizers):
    rows = [spoken_row(tmp_path / "in", number) for number in range(4)]
    rows[1] |= {"word_ends_s": None}
    rows[2] |= {"word_ends_s": None, "text": "three four"}
    rows[3] |= {"word_ends_s": None, "text": None}
    source = write_manifest(tmp_path / "in", rows)
    summary = prepare(source, tmp_path / "out", **tokenizers, aligner=FakeAligner())
    store = Store(tmp_path / "out")
    assert [store[row].id for row in range(3)] == ["0.wav", "1.wav", "3.wav"]
    assert store[0].word_ends_s == pytest.approx([0.2, 0.45])
    assert store[1].word_ends_s == pytest.approx([0.25, 0.5])
    (bad,) = quarantine(tmp_path / "out")
    assert bad == {"id": "2.wav", "source": "2.wav", "reason": "the words cannot be found in the audio: leave it out"}
    assert summary.unaligned == 0
    assert summary.reasons == {"the words cannot be found in the audio": 1}
    assert sum(summary.histograms["confidence of the alignment"]) == 1
    assert summary.histograms["confidence of the alignment"][15] == 1


def test_an_aligner_may_want_another_sampling_rate(tmp_path, tokenizers):
    source = write_manifest(tmp_path / "in", [spoken_row(tmp_path / "in", 0, word_ends_s=None)])
    prepare(source, tmp_path / "out", **tokenizers, aligner=FakeAligner(sample_rate_hz=8000))
    assert Store(tmp_path / "out")[0].word_ends_s == pytest.approx([0.25, 0.5])


def test_going_on_with_another_aligner_is_refused(tmp_path, tokenizers):
    source = mixed_manifest(tmp_path / "in")
    prepare(source, tmp_path / "out", **tokenizers)
    with pytest.raises(ValueError, match="aligner_fingerprint was None, is 'even'"):
        prepare(source, tmp_path / "out", **tokenizers, aligner=FakeAligner())


def test_rows_are_divided_lazily():
    taken = []

    def rows():
        for number in range(7):
            taken.append(number)
            yield number

    blocks = blocks_of(rows(), 3)
    assert list(next(blocks)) == [0, 1, 2]
    assert taken == [0, 1, 2]
    assert [list(block) for block in blocks] == [[3, 4, 5], [6]]
    assert list(blocks_of([], 3)) == []
    assert [list(block) for block in blocks_of([1, 2], 1)] == [[1], [2]]


def test_a_hundred_thousand_words_take_a_moment(tmp_path, tokenizers):
    source = write_manifest(tmp_path, [{"text": "one two three four " * 25_000}])
    begun = time.process_time()
    summary = prepare(source, tmp_path / "out", **tokenizers)
    assert summary.words == 100_000
    assert time.process_time() - begun < 10
