"""The speech tokenizer that needs no downloaded model.

Log-mel frames, k-means, and a Viterbi path that pays for every change of unit. Its units describe the sound of
the voice it was fitted on. They are not semantic units: they change with the speaker.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import librosa
import numpy as np
import safetensors
import safetensors.numpy
import torch

from smoltolk.speech.audio import write_atomically
from smoltolk.speech.clustering import FIT_FRAMES, FrameSample, check_num_units, fit_kmeans
from smoltolk.speech.units import (
    CARD_FILE,
    SpeechTokenizer,
    Units,
    check_block,
    fingerprint,
    read_card,
    refuse_mismatch,
)

_WEIGHTS_FILE = "kmeans.safetensors"
_BLOCK_FRAMES = 4096  # frames per Fourier transform and matrix product, so that long audio needs little memory
_BATCH_FRAMES = 1 << 16  # padded frames per Viterbi batch


class LogMel:
    """Log-mel frames of a waveform; frame i is centred on samples i·hop to (i+1)·hop.

    Args:
        sample_rate_hz: sampling rate of the audio.
        hop_samples: samples from one frame to the next.
        window_samples: length of the Hann window, and of the Fourier transform.
        num_bands: mel bands.
        power_floor: lowest mel power.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        hop_samples: int,
        window_samples: int,
        num_bands: int,
        power_floor: float,
    ) -> None:
        self.hop_samples, self.window_samples, self.power_floor = hop_samples, window_samples, power_floor
        self.filters = librosa.filters.mel(sr=sample_rate_hz, n_fft=window_samples, n_mels=num_bands)
        self._window = torch.hann_window(window_samples)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """Natural logarithm of mel powers, float32 (num_frames, num_bands), of float32 (samples,).

        Raises:
            ValueError: the waveform is shorter than one hop, not finite or of the wrong shape.
        """
        return np.concatenate(list(self.blocks([audio])))

    def blocks(self, audio_blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The frames of a waveform that comes in blocks of any lengths, without holding it.

        Args:
            audio_blocks: float32 (samples,) each.

        Yields:
            Natural logarithm of mel powers, float32 (num_frames, num_bands), always of the same number of frames
            but for the last: matrix products of another height may round differently.

        Raises:
            ValueError: the waveform is shorter than one hop, or a block is not finite or of the wrong shape.
        """
        hop, window = self.hop_samples, self.window_samples
        before = (window - hop) // 2
        num_samples = num_frames = 0  # of the waveform; given so far
        held = [np.zeros(before, np.float32)]  # from the first sample of the next frame on
        num_held = before
        for block in audio_blocks:
            held.append(check_block(block))
            num_held += len(block)
            num_samples += len(block)
            while num_held >= (_BLOCK_FRAMES - 1) * hop + window:
                samples = held[0] if len(held) == 1 else np.concatenate(held)
                yield self._frames(samples, _BLOCK_FRAMES)
                num_frames += _BLOCK_FRAMES
                held = [samples[_BLOCK_FRAMES * hop :]]
                num_held = len(held[0])
        if num_samples < hop:
            raise ValueError(
                f"audio has {num_samples} samples, less than one frame of {hop}: leave out audio this short"
            )
        samples = np.concatenate([*held, np.zeros(window, np.float32)])
        for first in range(0, num_samples // hop - num_frames, _BLOCK_FRAMES):
            count = min(_BLOCK_FRAMES, num_samples // hop - num_frames - first)
            yield self._frames(samples[first * hop :], count)

    def _frames(self, samples: np.ndarray, num_frames: int) -> np.ndarray:
        """The first frames (num_frames, num_bands) of samples (samples,)."""
        spectrum = torch.stft(
            torch.from_numpy(samples[: (num_frames - 1) * self.hop_samples + self.window_samples]),
            n_fft=self.window_samples,
            hop_length=self.hop_samples,
            window=self._window,
            center=False,
            return_complex=True,
        )  # (bins, num_frames)
        mel = torch.from_numpy(self.filters) @ spectrum.abs().square()  # (num_bands, num_frames)
        return mel.clamp_min(self.power_floor).log().T.contiguous().numpy()


@dataclass(frozen=True)
class MelSettings:
    """How `MelTokenizer` hears.

    A hop of 10 ms lets a unit start anywhere in a word; with hops of 20 to 40 ms the same word gets other
    units whenever the frames fall differently on it. The window of 93 ms smooths over single periods of the
    voice.

    Args:
        sample_rate_hz: sampling rate of the audio.
        hop_samples: samples from one frame to the next.
        window_samples: length of the Hann window, and of the Fourier transform.
        num_bands: mel bands.
        power_floor: mel power below which all is silence. Lower floors spend units on inaudible differences.
        switch_penalty: what a change of unit costs, in mean squared distances per dimension of the normalised
            features. Higher values give fewer and longer units.
    """

    sample_rate_hz: int = 16_000
    hop_samples: int = 160
    window_samples: int = 1488
    num_bands: int = 40
    power_floor: float = 1e-3
    switch_penalty: float = 1.2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}: give a value above 0")

    def log_mel(self) -> LogMel:
        """The features."""
        return LogMel(
            sample_rate_hz=self.sample_rate_hz,
            hop_samples=self.hop_samples,
            window_samples=self.window_samples,
            num_bands=self.num_bands,
            power_floor=self.power_floor,
        )


class MelTokenizer(SpeechTokenizer):
    """Log-mel bands, k-means and Viterbi.

    Args:
        centroids: k-means centroids of normalised frames, float32 (num_units, num_bands).
        band_means: mean of each log-mel band over the fitted corpus, float32 (num_bands,).
        band_stds: standard deviation of each band, float32 (num_bands,).
        settings: how it hears.
    """

    kind = "mel"
    sample_rate_hz = MelSettings.sample_rate_hz  # by default

    def __init__(
        self,
        centroids: np.ndarray,
        band_means: np.ndarray,
        band_stds: np.ndarray,
        settings: MelSettings = MelSettings(),
    ) -> None:
        self.settings = settings
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.band_means = np.ascontiguousarray(band_means, dtype=np.float32)
        self.band_stds = np.ascontiguousarray(band_stds, dtype=np.float32)
        self.sample_rate_hz = settings.sample_rate_hz
        self.unit_rate_hz = settings.sample_rate_hz / settings.hop_samples
        self.num_units = len(centroids)
        self.fingerprint = fingerprint(self.kind, asdict(settings), self._weights())
        self._extract = settings.log_mel()

    @classmethod
    def fit(
        cls,
        audios: Iterable[np.ndarray | Iterable[np.ndarray]],
        *,
        num_units: int = 64,
        seed: int = 0,
        settings: MelSettings = MelSettings(),
    ) -> Self:
        """Learn band statistics and centroids.

        Ten minutes of speech are enough for 64 units. Fit on one voice if the units are for one voice: the
        statistics are those of the corpus.

        Args:
            audios: waveforms, float32 (samples,) each, or iterables over the blocks of each; read once, one at a
                time.
            num_units: number of centroids.
            seed: decides which frames k-means sees and where it starts.
            settings: how the tokenizer hears.

        Raises:
            ValueError: `num_units` is below 2, or the audio has fewer different frames than that.
        """
        check_num_units(num_units)
        extract = settings.log_mel()
        sample = FrameSample(FIT_FRAMES, np.random.default_rng(seed))
        sums = np.zeros((2, settings.num_bands))  # of the bands and of their squares
        for audio in audios:
            for frames in extract.blocks([audio] if isinstance(audio, np.ndarray) else audio):
                sample.add(frames)
                sums += np.stack(
                    [frames.sum(axis=0, dtype=np.float64), np.square(frames, dtype=np.float64).sum(axis=0)]
                )
        means, squares = sums / max(1, sample.num_seen)
        stds = np.sqrt(np.maximum(squares - means**2, 0))
        stds = np.where(stds < 1e-3, 1, stds)  # a band that is always silent says nothing
        return cls(fit_kmeans((sample.frames() - means) / stds, num_units, seed), means, stds, settings)

    def encode_batch(self, audios: Sequence[np.ndarray]) -> list[Units]:
        """Units of each waveform; faster than one by one, with the same result.

        Args:
            audios: waveforms at `sample_rate_hz`, float32 (samples,) each.

        Returns:
            Units of each waveform. Frame i covers samples i·hop to (i+1)·hop; a rest shorter than a hop is
            left out.

        Raises:
            ValueError: a waveform is shorter than one frame, not finite or of the wrong shape.
        """
        distances = [np.concatenate(list(self._distances([audio]))) for audio in audios]
        encoded: list[Units | None] = [None] * len(audios)
        for group in _groups_of_similar_length([len(d) for d in distances]):
            paths = _viterbi([distances[i] for i in group], self.settings.switch_penalty)
            for i, path in zip(group, paths, strict=True):
                encoded[i] = Units.from_frames(path)
        return [units for units in encoded if units is not None]

    def encode_stream(self, blocks: Iterable[np.ndarray]) -> Units:
        """Units of one waveform that comes in blocks; see `SpeechTokenizer.encode_stream`.

        Frames are held until all paths that may still win agree on their units. In speech and in noise that is so
        after some frames.
        """
        costs: np.ndarray | None = None
        held = _Steps.none(self.num_units)
        path: list[np.ndarray] = []
        for distances in self._distances(blocks):
            steps, costs = _advance(distances[:, None], costs, self.settings.switch_penalty)
            settled, held = held.followed_by(steps).settle()
            path.append(settled)
        assert costs is not None
        path.append(held.path_to(costs.argmin(axis=1))[:, 0])
        return Units.from_frames(np.concatenate(path))

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` and `kmeans.safetensors` to a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        card = {**self.card(), "settings": asdict(self.settings)}
        write_atomically(folder / _WEIGHTS_FILE, safetensors.numpy.save(self._weights()))
        write_atomically(folder / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a folder written by `save`.

        Raises:
            ValueError: a file is missing or damaged, or the weights do not have the fingerprint of the card.
        """
        folder = Path(path)
        card = read_card(folder)
        if card["kind"] != cls.kind:
            raise ValueError(f"{folder} holds a {card['kind']!r} tokenizer, not {cls.kind!r}")
        try:
            weights = safetensors.numpy.load_file(folder / _WEIGHTS_FILE)
            tokenizer = cls(
                weights["centroids"],
                weights["band_means"],
                weights["band_stds"],
                MelSettings(**card["settings"]),
            )
        except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} is not a whole tokenizer ({error}): fit or copy it again") from error
        refuse_mismatch(folder, tokenizer.fingerprint, card)
        return tokenizer

    def _weights(self) -> dict[str, np.ndarray]:
        return {"band_means": self.band_means, "band_stds": self.band_stds, "centroids": self.centroids}

    def _distances(self, audio_blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Mean squared distance per dimension to each centroid (num_frames, num_units), some frames at a time."""
        # One utterance at a time, in blocks of fixed height: products of another height may round differently.
        for log_mel in self._extract.blocks(audio_blocks):
            frames = (log_mel - self.band_means) / self.band_stds
            squares = np.square(frames).sum(axis=1)[:, None] + np.square(self.centroids).sum(axis=1)
            yield (squares - 2 * frames @ self.centroids.T) / self.settings.num_bands


@dataclass(frozen=True)
class _Steps:
    """How the best paths to each unit go on from frame to frame.

    Args:
        stays: whether the best path to a unit was on it a frame before (num_frames, num_utterances, num_units).
        cheapest: the unit it was on if not (num_frames, num_utterances).
    """

    stays: np.ndarray
    cheapest: np.ndarray

    @classmethod
    def none(cls, num_units: int) -> Self:
        return cls(np.empty((0, 1, num_units), bool), np.empty((0, 1), np.int64))

    def followed_by(self, others: Self) -> Self:
        return type(self)(np.concatenate([self.stays, others.stays]), np.concatenate([self.cheapest, others.cheapest]))

    def path_to(self, last: np.ndarray) -> np.ndarray:
        """The units (num_frames, num_utterances) of the best paths that end on units (num_utterances,)."""
        path = np.empty(self.cheapest.shape, np.int64)
        rows = np.arange(len(last))
        unit = last
        for t in range(len(path) - 1, -1, -1):
            path[t] = unit
            unit = np.where(self.stays[t, rows, unit], unit, self.cheapest[t])
        return path

    def settle(self) -> tuple[np.ndarray, Self]:
        """The units (num_settled,) of the first frames, on which all paths agree, and the steps after them.

        For a single utterance.
        """
        units = np.arange(self.stays.shape[2])
        for t in range(len(self.stays) - 1, 0, -1):
            units = np.where(self.stays[t, 0, units], units, self.cheapest[t, 0])
            if (units == units[0]).all():  # at frame t − 1
                settled = type(self)(self.stays[:t], self.cheapest[:t]).path_to(units[:1])
                return settled[:, 0], type(self)(self.stays[t:], self.cheapest[t:])
        return np.empty(0, np.int64), self


def _advance(distances: np.ndarray, costs: np.ndarray | None, switch_penalty: float) -> tuple[_Steps, np.ndarray]:
    """Lead the cheapest paths on: they cost their distances plus `switch_penalty` for each change of unit.

    All changes cost the same, so a unit is best entered from itself or from the cheapest unit of all: each
    step takes time linear in the number of units.

    Args:
        distances: float32 (num_frames, num_utterances, num_units), of the frames to come.
        costs: of the cheapest path to each unit until now, above the cheapest of the frame before
            (num_utterances, num_units); None at the start.
        switch_penalty: cost of a change.

    Returns:
        The steps of these frames, and the costs at the last of them.
    """
    num_frames, num_utterances, num_units = distances.shape
    if costs is None:
        costs = np.zeros((num_utterances, num_units), np.float32)
    stays = np.empty((num_frames, num_utterances, num_units), bool)
    cheapest = np.empty((num_frames, num_utterances), np.int64)
    rows = np.arange(num_utterances)
    for t in range(num_frames):
        cheapest[t] = costs.argmin(axis=1)
        costs = costs - costs[rows, cheapest[t]][:, None]
        np.less_equal(costs, switch_penalty, out=stays[t])
        np.minimum(costs, switch_penalty, out=costs)
        costs += distances[t]
    return _Steps(stays, cheapest), costs


def _viterbi(distances: list[np.ndarray], switch_penalty: float) -> list[np.ndarray]:
    """The cheapest path through each matrix: its distances plus `switch_penalty` for each change of unit.

    Args:
        distances: float32 (num_frames, num_units) each.
        switch_penalty: cost of a change.

    Returns:
        The unit of every frame, int64 (num_frames,) each.
    """
    # Padding costs nothing and so never changes the path before it.
    padded = np.zeros((max(map(len, distances)), len(distances), distances[0].shape[1]), np.float32)
    for i, d in enumerate(distances):
        padded[: len(d), i] = d
    steps, costs = _advance(padded, None, switch_penalty)
    paths = steps.path_to(costs.argmin(axis=1))
    return [paths[: len(d), i] for i, d in enumerate(distances)]


def _groups_of_similar_length(lengths: list[int]) -> list[list[int]]:
    """Indices in groups of at most `_BATCH_FRAMES` padded frames (or of one), shortest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or (len(groups[-1]) + 1) * lengths[i] > _BATCH_FRAMES:
            groups.append([])
        groups[-1].append(i)
    return groups
