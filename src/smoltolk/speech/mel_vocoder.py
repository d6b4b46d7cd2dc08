"""Units to audio: a small convolutional decoder from units to log-mel frames, then Griffin-Lim.

    units ─ embedding of (previous, this, next) ─┬─ duration of each unit
                                                 └─ repeated to frames ─ convolutions ─ log-mel ─ Griffin-Lim

It speaks with the voice it was trained on.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import librosa
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoltolk.speech.audio import write_atomically
from smoltolk.speech.mel import LogMel
from smoltolk.speech.units import SpeechTokenizer, Units
from smoltolk.speech.vocoder import CARD_FILE, Vocoder, read_vocoder_card

_WEIGHTS_FILE = "vocoder.safetensors"
_WIDTH = 192
_NUM_LAYERS = 3
_KERNEL_FRAMES = 5
_NUM_BANDS = 80
_MEL_HOP_S = 0.01  # about; tokenizers with longer frames get several log-mel frames for each of theirs
_WINDOW_S = 0.05  # two or more periods of any voice, so that its harmonics can be told apart
_POWER_FLOOR = 1e-4
_GRIFFIN_LIM_ITERATIONS = 32
_CONTEXT_UNITS = 6  # on both sides of a chunk of a stream: more than the convolutions see
_FADE_S = 0.01
_CROPS = 16  # per training step
_CROP_FRAMES = 192
_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class _Card:
    """What a saved vocoder says of itself.

    Args:
        tokenizer_fingerprint: fingerprint of the tokenizer.
        num_units: number of different units.
        sample_rate_hz: sampling rate of the audio.
        hop_samples: samples of one frame of the tokenizer.
        mels_per_frame: log-mel frames in one frame of the tokenizer.
    """

    tokenizer_fingerprint: str
    num_units: int
    sample_rate_hz: int
    hop_samples: int
    mels_per_frame: int = 1


class MelVocoder(Vocoder):
    """Decoder of the units of one tokenizer in one voice; made by `fit` or `load`."""

    kind = "mel"

    def __init__(self, card: _Card) -> None:
        self._card = card
        self.tokenizer_fingerprint = card.tokenizer_fingerprint
        self.num_units = card.num_units
        self.sample_rate_hz = card.sample_rate_hz
        self._decoder = _UnitDecoder(card.num_units)
        self._log_mel = LogMel(
            sample_rate_hz=card.sample_rate_hz,
            hop_samples=card.hop_samples // card.mels_per_frame,
            window_samples=round(_WINDOW_S * card.sample_rate_hz),
            num_bands=_NUM_BANDS,
            power_floor=_POWER_FLOOR,
        )

    @classmethod
    def fit(
        cls,
        pairs: Iterable[tuple[Units, np.ndarray]],
        tokenizer: SpeechTokenizer,
        *,
        steps: int = 300,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Self:
        """Train on units and the audio they come from; ten minutes of one voice are enough.

        Args:
            pairs: units and waveform, float32 (samples,), of each utterance.
            tokenizer: what made the units.
            steps: training steps.
            seed: decides the initial weights and the order of training.
            progress: called with 1 after each step.

        Raises:
            ValueError: there are no pairs, a unit is out of range, or units and audio differ in length.
        """
        rate_hz = tokenizer.sample_rate_hz
        hop_samples = round(rate_hz / tokenizer.unit_rate_hz)
        vocoder = cls(
            _Card(
                tokenizer.fingerprint,
                tokenizer.num_units,
                rate_hz,
                hop_samples,
                _mels_per_frame(hop_samples, rate_hz),
            )
        )
        inputs, mels = [], []
        for units, audio in pairs:
            inputs.append(vocoder._unit_inputs(units.units, units.durations))
            mels.append(torch.from_numpy(vocoder._mel_of_units(audio, units)))
        if not mels:
            raise ValueError("pairs is empty: give units and audio of at least one utterance")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vocoder._decoder = _UnitDecoder(tokenizer.num_units)
            vocoder._decoder.train_on(inputs, mels, steps, progress)
        return vocoder

    @torch.inference_mode()
    def predict_durations(self, units: np.ndarray) -> np.ndarray:
        """Typical duration of each unit (num_units_in_utterance,) in frames, given its neighbours."""
        ids = self._unit_inputs(units, np.ones(len(units), np.int64)).contexts
        mel_frames = self._decoder.log_durations(ids).exp()
        return (mel_frames / self._card.mels_per_frame).round().clamp_min(1).to(torch.int64).numpy()

    @torch.inference_mode()
    def decode(self, units: np.ndarray, durations: np.ndarray | None = None) -> np.ndarray:
        """Speak units; the same units give the same audio.

        Args:
            units: unit ids (num_units_in_utterance,).
            durations: frames of each unit, at least 1; predicted from the units by default.

        Returns:
            Waveform at `sample_rate_hz`, float32 (samples,) in −1 … 1; one hop of samples for each frame.

        Raises:
            ValueError: there are no units, one is out of range, or the durations do not fit them.
        """
        if durations is None:
            durations = self.predict_durations(units)
        mel = self._decoder(self._unit_inputs(units, durations)).numpy()  # (num_frames, num_bands)
        # Least squares, cut off at zero: mel bands overlap, so that some powers would come out negative.
        power = np.maximum(np.linalg.pinv(self._log_mel.filters) @ np.exp(mel.T), 0)
        hop_samples = self._log_mel.hop_samples
        margin = math.ceil(self._log_mel.window_samples / hop_samples / 2)  # frames of silence on both sides
        audio = librosa.griffinlim(
            np.pad(np.sqrt(power), ((0, 0), (margin, margin))),
            n_iter=_GRIFFIN_LIM_ITERATIONS,
            hop_length=hop_samples,
            n_fft=self._log_mel.window_samples,
            random_state=0,
        )
        # Griffin-Lim centres its first frame on sample 0; our frames are centred on their hops.
        start = margin * hop_samples - hop_samples // 2
        audio = audio[start : start + len(mel) * hop_samples]
        return (audio / max(1.0, np.abs(audio).max())).astype(np.float32)

    def decode_stream(self, units: Iterable[int], *, chunk_units: int = 24) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Speak units while they come, in chunks.

        A chunk is decoded together with its neighbours and faded into the one before, so that it sounds as if
        decoded in one piece, as many samples long in all. It is given once a few units after it are known.

        Args:
            units: unit ids, in time.
            chunk_units: units in a chunk, more for fewer seams, less for a shorter delay.

        Yields:
            Some of the units (num_units_in_piece,), and their piece of the waveform, float32 (samples,).
        """
        if chunk_units < 1:
            raise ValueError(f"chunk_units is {chunk_units}: give 1 or more")
        seen: list[int] = []
        begin, tail = 0, np.zeros(0, np.float32)  # first unit not spoken yet; what the last chunk says after its end
        for unit in units:
            seen.append(int(unit))
            if len(seen) == begin + chunk_units + _CONTEXT_UNITS:
                end = begin + chunk_units
                piece, tail = self._decode_chunk(seen, begin, end, tail)
                yield np.array(seen[begin:end], dtype=np.int64), piece
                begin = end
        if begin < len(seen):
            piece, _ = self._decode_chunk(seen, begin, len(seen), tail)
            yield np.array(seen[begin:], dtype=np.int64), piece

    def _decode_chunk(self, seen: list[int], begin: int, end: int, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The audio of units `begin` to `end`, faded in over the tail of the chunk before; and its own tail."""
        first = max(0, begin - _CONTEXT_UNITS)
        around = np.array(seen[first:], dtype=np.int64)
        durations = self.predict_durations(around)
        places = np.append(0, durations.cumsum()) * self._card.hop_samples  # of each unit's first sample
        audio = self.decode(around, durations)
        start, stop = places[begin - first], places[end - first]
        piece = audio[start:stop].copy()
        length = min(len(tail), len(piece))
        fade = np.linspace(0, 1, length, dtype=np.float32)
        piece[:length] = fade * piece[:length] + (1 - fade) * tail[:length]
        return piece, audio[stop : stop + round(_FADE_S * self.sample_rate_hz)]

    def save(self, path: str | Path) -> None:
        """Write `vocoder.json` and `vocoder.safetensors` to a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _WEIGHTS_FILE, safetensors.torch.save(self._decoder.state_dict()))
        card = json.dumps({"kind": self.kind, **asdict(self._card)}, indent=2) + "\n"
        write_atomically(folder / CARD_FILE, card.encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a folder written by `save`.

        Raises:
            ValueError: a file is missing or damaged, or the folder holds another kind of vocoder.
        """
        folder = Path(path)
        card = read_vocoder_card(folder)
        if card.pop("kind") != cls.kind:
            raise ValueError(f"{folder} holds no {cls.kind!r} vocoder: load it with load_vocoder")
        try:
            vocoder = cls(_Card(**card))
            vocoder._decoder.load_state_dict(safetensors.torch.load_file(folder / _WEIGHTS_FILE))
        except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} is not a whole vocoder ({error}): train or copy it again") from error
        return vocoder

    def _mel_of_units(self, audio: np.ndarray, units: Units) -> np.ndarray:
        """Log-mel frames (num_mel_frames, num_bands) of the audio that the units come from."""
        hop_samples, num_frames = self._card.hop_samples, int(units.durations.sum())
        rest_samples = len(audio) - num_frames * hop_samples
        # Some tokenizers fill up the last frame, some leave out a last one that is not whole with all its context.
        if not -hop_samples < rest_samples < 2 * hop_samples:
            raise ValueError(
                f"units last {num_frames} frames, but the audio {len(audio) / hop_samples:.1f}: encode this audio again"
            )
        mel = self._log_mel(np.pad(audio, (0, max(0, -rest_samples))))
        return mel[: num_frames * self._card.mels_per_frame]

    def _unit_inputs(self, units: np.ndarray, durations: np.ndarray) -> "_UnitInputs":
        self.check(units, durations)
        return _UnitInputs.build(units, durations * self._card.mels_per_frame, outside=self.num_units)


def _mels_per_frame(hop_samples: int, sample_rate_hz: int) -> int:
    """How many log-mel frames of about 10 ms, a whole number of samples each, fill one frame of the tokenizer."""
    wanted = hop_samples / (_MEL_HOP_S * sample_rate_hz)
    return min(
        (count for count in range(1, hop_samples + 1) if hop_samples % count == 0),
        key=lambda count: abs(math.log(count / wanted)),
    )


@dataclass(frozen=True)
class _UnitInputs:
    """An utterance as the decoder sees it.

    Args:
        contexts: previous, this and next unit, int64 (num_units_in_utterance, 3).
        log_durations: logarithm of the log-mel frames of each unit (num_units_in_utterance,).
        unit_of_frame: index of the unit of each log-mel frame, int64 (num_frames,).
        places: where a frame is in its unit (num_frames, 3): logarithms of the frames since its start and
            until its end, and of its duration.
    """

    contexts: Tensor
    log_durations: Tensor
    unit_of_frame: Tensor
    places: Tensor

    @classmethod
    def build(cls, units: np.ndarray, durations: np.ndarray, outside: int) -> Self:
        ids = F.pad(torch.from_numpy(np.asarray(units, dtype=np.int64)), (1, 1), value=outside)
        lengths = torch.from_numpy(np.asarray(durations, dtype=np.int64))
        unit_of_frame = torch.arange(len(lengths)).repeat_interleave(lengths)
        since_start = torch.arange(len(unit_of_frame)) - (lengths.cumsum(0) - lengths)[unit_of_frame]
        frame_lengths = lengths[unit_of_frame]
        places = torch.stack([since_start + 1, frame_lengths - since_start, frame_lengths], dim=1)
        return cls(
            contexts=torch.stack([ids[:-2], ids[1:-1], ids[2:]], dim=1),
            log_durations=lengths.float().log(),
            unit_of_frame=unit_of_frame,
            places=places.float().log(),
        )


class _UnitDecoder(nn.Module):
    """Units to log-mel frames and durations."""

    def __init__(self, num_units: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_units + 1, _WIDTH)  # the last one is outside of the utterance
        self.context = nn.Linear(3 * _WIDTH, _WIDTH)
        self.duration = nn.Linear(_WIDTH, 1)
        self.place = nn.Linear(3, _WIDTH)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(_WIDTH, _WIDTH, _KERNEL_FRAMES, padding="same") for _ in range(_NUM_LAYERS)
        )
        self.mel = nn.Linear(_WIDTH, _NUM_BANDS)
        self.register_buffer("band_means", torch.zeros(_NUM_BANDS))
        self.register_buffer("band_stds", torch.ones(_NUM_BANDS))

    def log_durations(self, contexts: Tensor) -> Tensor:
        """Expected logarithm of the duration (…,) of units in context (…, 3)."""
        return self.duration(F.gelu(self._in_context(contexts))).squeeze(-1)

    def forward(self, inputs: _UnitInputs) -> Tensor:
        """Log-mel frames (num_frames, num_bands)."""
        contexts = inputs.contexts[inputs.unit_of_frame]
        return self._normalised(contexts[None], inputs.places[None])[0] * self.band_stds + self.band_means

    def train_on(
        self,
        inputs: list[_UnitInputs],
        mels: list[Tensor],
        steps: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        """Train on random crops, which may run across the ends of utterances."""
        contexts = torch.cat([i.contexts[i.unit_of_frame] for i in inputs])  # (num_frames, 3)
        places = torch.cat([i.places for i in inputs])
        unit_contexts = torch.cat([i.contexts for i in inputs])  # (num_units, 3)
        log_durations = torch.cat([i.log_durations for i in inputs])
        mel = torch.cat(mels)
        self.band_means, self.band_stds = mel.mean(dim=0), mel.std(dim=0).clamp_min(1e-3)
        mel = (mel - self.band_means) / self.band_stds

        crop_frames = min(_CROP_FRAMES, len(mel))
        optimizer = torch.optim.AdamW(self.parameters(), lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
        for _ in range(steps):
            firsts = torch.randint(len(mel) - crop_frames + 1, (_CROPS, 1))
            crops = firsts + torch.arange(crop_frames)  # (crops, crop_frames)
            some = torch.randint(len(log_durations), (_CROPS * crop_frames // 4,))
            mel_loss = (self._normalised(contexts[crops], places[crops]) - mel[crops]).abs().mean()
            duration_loss = (self.log_durations(unit_contexts[some]) - log_durations[some]).square().mean()
            optimizer.zero_grad()
            (mel_loss + duration_loss).backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(1)

    def _in_context(self, contexts: Tensor) -> Tensor:
        return self.context(self.embedding(contexts).flatten(-2))  # (…, width)

    def _normalised(self, contexts: Tensor, places: Tensor) -> Tensor:
        """Normalised log-mel (batch, num_frames, num_bands) of contexts and places (batch, num_frames, 3)."""
        hidden = (self._in_context(contexts) + self.place(places)).transpose(1, 2)  # (batch, width, num_frames)
        for convolution in self.convolutions:
            hidden = hidden + F.gelu(convolution(hidden))
        return self.mel(hidden.transpose(1, 2))
