"""Speech tokenizers: audio to discrete units with durations.

`smoltolk.speech.mel` has the one that needs no downloaded model, `smoltolk.speech.hubert` and
`smoltolk.speech.mimi` those on a neural network.
"""

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

CARD_FILE = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class Units:
    """Deduplicated speech units of one utterance.

    Args:
        units: unit ids, int64 (num_units_in_utterance,); neighbours differ.
        durations: frames of each unit, int64 (num_units_in_utterance,), at least 1.
    """

    units: np.ndarray
    durations: np.ndarray

    def __post_init__(self) -> None:
        if self.units.ndim != 1 or self.units.shape != self.durations.shape:
            raise ValueError(
                f"units {self.units.shape} and durations {self.durations.shape} must be one-dimensional and "
                "of the same length"
            )
        if np.any(self.units[1:] == self.units[:-1]):
            raise ValueError("units has equal neighbours: merge them and add up their durations")
        if np.any(self.durations < 1):
            raise ValueError("durations has values below 1: every unit lasts at least one frame")

    @classmethod
    def from_frames(cls, frame_units: np.ndarray) -> Self:
        """Merge equal neighbours among the units of all frames (num_frames,)."""
        starts = np.flatnonzero(np.append(True, frame_units[1:] != frame_units[:-1]))[: len(frame_units)]
        durations = np.diff(np.append(starts, len(frame_units)))
        return cls(frame_units[starts].astype(np.int64), durations.astype(np.int64))

    def frames(self) -> np.ndarray:
        """The unit of every frame (num_frames,)."""
        return np.repeat(self.units, self.durations)


class SpeechTokenizer(ABC):
    """Turns audio into units.

    Attributes:
        kind: name of the kind of tokenizer in files and messages.
        sample_rate_hz: sampling rate of the audio that `encode` takes.
        unit_rate_hz: frames per second, before equal neighbours are merged.
        num_units: number of different units.
        fingerprint: hash of weights and settings. It travels with data and models, because units of one
            tokenizer mean nothing to another.
    """

    kind: ClassVar[str]
    sample_rate_hz: int
    unit_rate_hz: float
    num_units: int
    fingerprint: str

    @abstractmethod
    def encode_batch(self, audios: Sequence[np.ndarray]) -> list[Units]:
        """Units of each waveform, float32 (samples,); they do not depend on the other waveforms.

        Raises:
            ValueError: a waveform is shorter than one frame, not finite or of the wrong shape.
        """

    @abstractmethod
    def encode_stream(self, blocks: Iterable[np.ndarray]) -> Units:
        """Units of one waveform of any length that comes in blocks, in memory that does not grow with it.

        Args:
            blocks: float32 (samples,) each, of any lengths; `smoltolk.speech.audio.stream_audio` gives those of a
                file.

        Returns:
            The same units as `encode` gives for the blocks put together, wherever their borders are.

        Raises:
            ValueError: the waveform is shorter than one frame, or a block is not finite or of the wrong shape.
        """

    def to(self, device: str, dtype: str = "float32") -> Self:
        """Compute elsewhere, or in another precision, from now on; gives itself back.

        Raises:
            ValueError: PyTorch cannot use the device.
        """
        if (device, dtype) != ("cpu", "float32"):
            warnings.warn(
                f"a {self.kind!r} tokenizer has no network: device {device} and dtype {dtype} have no effect",
                stacklevel=2,
            )
        return self

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a folder that `load_speech_tokenizer` reads."""

    def encode(self, audio: np.ndarray) -> Units:
        """Units of one waveform, float32 (samples,); see `encode_batch`."""
        return self.encode_batch([audio])[0]

    def card(self) -> dict[str, Any]:
        """What data and models remember of their tokenizer."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "unit_rate_hz": self.unit_rate_hz,
            "num_units": self.num_units,
            "sample_rate_hz": self.sample_rate_hz,
        }


def read_card(folder: Path) -> dict[str, Any]:
    """The card in a tokenizer's folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = folder / CARD_FILE
    try:
        card = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(
            f"{folder} holds no speech tokenizer ({error.strerror}: {CARD_FILE}): give the folder that save wrote"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): fit or copy the tokenizer again") from error
    if not isinstance(card, dict) or not {"kind", "fingerprint", "settings"} <= card.keys():
        raise ValueError(f"{file} is not the card of a speech tokenizer: fit or copy the tokenizer again")
    return card


def fingerprint(kind: str, settings: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> str:
    """Hash of what decides the units of a tokenizer; weights count in float32."""
    digest = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{weight.shape}".encode())
        digest.update(weight.astype("<f4").tobytes())
    return digest.hexdigest()


def refuse_mismatch(folder: Path, found: str, card: Mapping[str, Any]) -> None:
    """Raise if the weights and settings in a tokenizer's folder do not have the fingerprint of its card."""
    if found != card["fingerprint"]:
        raise ValueError(
            f"{folder}: weights and settings have fingerprint {found}, but {CARD_FILE} says {card['fingerprint']}: "
            "one of the files was changed; fit or copy the tokenizer again"
        )


def check_block(block: np.ndarray) -> np.ndarray:
    """A piece of a waveform, float32 (samples,).

    Raises:
        ValueError: it has another shape, or NaN or infinite samples.
    """
    if block.ndim != 1:
        raise ValueError(f"audio has shape {block.shape}: give one channel, (samples,)")
    if not np.isfinite(block).all():
        raise ValueError("audio has NaN or infinite samples: repair it or leave it out")
    return np.ascontiguousarray(block, dtype=np.float32)
