"""Units of long audio that comes in blocks: the same as in one piece, in constant memory."""

import tracemalloc
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.speech.conftest import syllables
from tests.speech.models import noise, tiny_hubert_tokenizer, tiny_mimi_tokenizer

from smoltolk.speech import mel as mel_module
from smoltolk.speech.mel import LogMel, MelTokenizer
from smoltolk.speech.neural import WindowGrid
from smoltolk.speech.units import SpeechTokenizer

GRIDS = [WindowGrid(10, 25, 8, 3, 2), WindowGrid(10, 10, 5, 12, 0), WindowGrid(3, 3, 2, 0, 1)]


def tokenizer_of_kind(kind: str) -> SpeechTokenizer:
    if kind == "mel":
        return MelTokenizer.fit([syllables(0)], num_units=12)
    batch_size = 1 + kind.endswith("batches")
    return (tiny_hubert_tokenizer if kind.startswith("hubert") else tiny_mimi_tokenizer)(batch_size=batch_size)


KINDS = ("mel", "hubert", "hubert in batches", "mimi")
TOKENIZERS = {kind: tokenizer_of_kind(kind) for kind in KINDS}
AUDIO = syllables(7, count=90)  # 14 s at 16 kHz


def pieces(audio: np.ndarray, borders: Iterable[int]) -> list[np.ndarray]:
    return np.split(audio, sorted(borders))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(
    num_samples=st.integers(2000, len(AUDIO)),
    borders=st.lists(st.integers(0, len(AUDIO)), max_size=12),
)
def test_units_do_not_depend_on_the_borders_of_the_blocks(kind: str, num_samples: int, borders: list[int]) -> None:
    tokenizer, audio = TOKENIZERS[kind], AUDIO[:num_samples]
    streamed = tokenizer.encode_stream(iter(pieces(audio, (min(b, num_samples) for b in borders))))
    whole = tokenizer.encode(audio)
    np.testing.assert_array_equal(streamed.units, whole.units)
    np.testing.assert_array_equal(streamed.durations, whole.durations)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_few_samples_are_enough(kind: str) -> None:
    audio = AUDIO[:30_000]
    streamed = TOKENIZERS[kind].encode_stream(audio[i : i + 7] for i in range(0, len(audio), 7))
    np.testing.assert_array_equal(streamed.frames(), TOKENIZERS[kind].encode(audio).frames())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_cannot_be_encoded_is_refused(kind: str) -> None:
    for blocks, message in (
        ([], "less than one frame"),
        ([AUDIO[:0]], "less than one frame"),
        ([AUDIO[:4000], AUDIO[None, :4000]], "one channel"),
        ([AUDIO[:4000], np.full(10, np.nan, np.float32)], "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            TOKENIZERS[kind].encode_stream(blocks)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_frames=st.integers(1, 200),
    borders=st.lists(st.integers(1, 200), max_size=8),
    switch_penalty=st.sampled_from([0.01, 0.3, 1.2, 30.0]),
    is_coarse=st.booleans(),
)
def test_a_path_settled_piece_by_piece_is_the_cheapest_path_of_all(
    seed: int, num_frames: int, borders: list[int], switch_penalty: float, is_coarse: bool
) -> None:
    distances = np.random.default_rng(seed).random((num_frames, 5), np.float32)
    if is_coarse:  # many ties
        distances = np.round(4 * distances) / 4
    costs, path = None, []
    held = mel_module._Steps.none(5)
    for piece in np.split(distances, sorted({b for b in borders if b < num_frames})):
        steps, costs = mel_module._advance(piece[:, None], costs, switch_penalty)
        settled, held = held.followed_by(steps).settle()
        path.append(settled)
    path.append(held.path_to(costs.argmin(axis=1))[:, 0])
    np.testing.assert_array_equal(np.concatenate(path), mel_module._viterbi([distances], switch_penalty)[0])


def test_paths_that_never_agree_are_held_and_none_is_lost() -> None:
    distances = np.zeros((300, 2), np.float32)  # all paths cost the same
    distances[-1, 0] = 1
    costs, held, num_settled = None, mel_module._Steps.none(2), 0
    for piece in np.split(distances, 3):
        steps, costs = mel_module._advance(piece[:, None], costs, 1.2)
        settled, held = held.followed_by(steps).settle()
        num_settled += len(settled)
    assert num_settled == 0
    assert held.path_to(costs.argmin(axis=1))[:, 0].tolist() == [1] * 300


@pytest.mark.parametrize("block_frames", [1, 7, 50])
def test_log_mel_frames_of_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, block_frames: int) -> None:
    monkeypatch.setattr(mel_module, "_BLOCK_FRAMES", block_frames)
    log_mel = LogMel(sample_rate_hz=16_000, hop_samples=160, window_samples=1488, num_bands=20, power_floor=1e-3)
    for num_samples in (160, 1487, 160 * 50, 16_111):
        whole = log_mel(AUDIO[:num_samples])
        frames = list(log_mel.blocks(AUDIO[i : min(i + 333, num_samples)] for i in range(0, num_samples, 333)))
        assert [len(f) for f in frames[:-1]] == [block_frames] * (len(frames) - 1)
        np.testing.assert_array_equal(np.concatenate(frames), whole)
        assert len(whole) == num_samples // 160


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_give_every_frame_once_and_hold_its_context(grid: WindowGrid) -> None:
    for num_samples in range(grid.frame_samples, 400):
        audio = np.arange(num_samples, dtype=np.float32)
        num_frames = (num_samples - grid.frame_samples) // grid.hop_samples + 1
        given_frames = []
        windows = list(grid.cut([audio]))
        for window in windows:
            given_frames += range(window.first_frame, window.first_frame + window.num_frames)
            assert window.context_frames == min(window.first_frame, grid.left_context_frames)
            start = (window.first_frame - window.context_frames) * grid.hop_samples
            np.testing.assert_array_equal(window.samples, audio[start : start + len(window.samples)])
            end = window.first_frame + window.num_frames + grid.right_context_frames
            assert start + len(window.samples) >= (min(end, num_frames) - 1) * grid.hop_samples + grid.frame_samples
        assert given_frames == list(range(num_frames))
        assert all(window.num_frames == grid.core_frames for window in windows[:-1])
        assert len(windows) == 1 or grid.core_frames // 2 <= windows[-1].num_frames < 1.5 * grid.core_frames + 1
        inner = [w for w in windows[:-1] if w.context_frames == grid.left_context_frames]
        assert all(len(window.samples) == grid.full_window_samples for window in inner)


@settings(max_examples=50, deadline=None)
@given(grid=st.sampled_from(GRIDS), borders=st.lists(st.integers(0, 700), max_size=20))
def test_windows_do_not_depend_on_the_borders_of_the_blocks(grid: WindowGrid, borders: list[int]) -> None:
    audio = np.arange(700, dtype=np.float32)
    for one, other in zip(grid.cut([audio]), grid.cut(pieces(audio, borders)), strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)
        assert (one.first_frame, one.context_frames) == (other.first_frame, other.context_frames)


def blocks_of_noise(seconds: int) -> Iterator[np.ndarray]:
    for seed in range(seconds):
        yield noise(1, seed=seed)


@pytest.mark.parametrize("kind", ["mel", "hubert", "hubert in batches", "mimi"])
def test_memory_does_not_grow_with_the_audio(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mel_module, "_BLOCK_FRAMES", 512)  # as many as a window of the others, about
    tokenizer = TOKENIZERS[kind]

    def peak_bytes(seconds: int) -> int:
        tracemalloc.start()
        units = tokenizer.encode_stream(blocks_of_noise(seconds))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        result_bytes = units.units.nbytes + units.durations.nbytes
        assert abs(units.durations.sum() - seconds * 16_000 / tokenizer.sample_rate_hz * tokenizer.unit_rate_hz) < 3
        return peak - 3 * result_bytes

    tokenizer.encode(noise(1))  # imports and caches
    short, long = peak_bytes(30), peak_bytes(90)
    assert long < 1.1 * short
    assert long < 90 * 16_000 * 4 / 2  # less than half the audio
