"""Vocoders: units to audio.

`smoltolk.speech.mel_vocoder` has the one that is trained in minutes, `smoltolk.speech.hifigan` the published unit
HiFi-GAN, `smoltolk.speech.mimi_vocoder` the decoder of the Mimi codec.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from smoltolk.speech.neural import check_device
from smoltolk.speech.units import SpeechTokenizer

CARD_FILE = "vocoder.json"


class Vocoder(ABC):
    """Speaks the units of one tokenizer.

    Attributes:
        kind: name of the kind of vocoder in files and messages.
        tokenizer_fingerprint: fingerprint of the tokenizer whose units it decodes.
        num_units: number of different units.
        sample_rate_hz: sampling rate of the audio it makes.
    """

    kind: ClassVar[str]
    tokenizer_fingerprint: str
    num_units: int
    sample_rate_hz: int

    @abstractmethod
    def decode(self, units: np.ndarray, durations: np.ndarray | None = None) -> np.ndarray:
        """Speak units; the same units give the same audio.

        Args:
            units: unit ids (num_units_in_utterance,).
            durations: frames of each unit, at least 1; predicted from the units by default, and one frame each
                where the vocoder does not predict them.

        Returns:
            Waveform at `sample_rate_hz`, float32 (samples,) in −1 … 1; one hop of samples for each frame.

        Raises:
            ValueError: there are no units, one is out of range, or the durations do not fit them.
        """

    @abstractmethod
    def decode_stream(self, units: Iterable[int], *, chunk_units: int = 24) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Speak units while they come, in chunks.

        Args:
            units: unit ids, in time.
            chunk_units: units in a chunk, more for fewer seams, less for a shorter delay.

        Yields:
            Some of the units (num_units_in_piece,), and their piece of the waveform, float32 (samples,).
        """

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the vocoder to a folder that `load_vocoder` reads."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> Self:
        """Read a folder written by `save`.

        Raises:
            ValueError: a file is missing or damaged, or the folder holds another kind of vocoder.
        """

    def to(self, device: str | torch.device) -> Self:
        """Compute on this device from now on; a vocoder that knows the CPU alone stays there."""
        return self

    def check(self, units: np.ndarray, durations: np.ndarray) -> None:
        """Refuse what no vocoder can decode.

        Raises:
            ValueError: there are no units, one is out of range, or the durations do not fit them.
        """
        if len(units) == 0:
            raise ValueError("units is empty: give at least one unit")
        if units.min() < 0 or units.max() >= self.num_units:
            raise ValueError(
                f"units run from {units.min()} to {units.max()}: this vocoder knows 0 to {self.num_units - 1}"
            )
        if durations.shape != units.shape or durations.min() < 1:
            raise ValueError(f"durations must be one number of frames, at least 1, for each of the {len(units)} units")


def load_vocoder(
    path: str | Path, tokenizer: SpeechTokenizer | None = None, *, device: str | torch.device = "cpu"
) -> Vocoder:
    """Read a vocoder of any kind from the folder that its `save` wrote.

    Args:
        path: the folder.
        tokenizer: whose units it shall decode, to check that it can.
        device: where it shall compute, if it can.

    Raises:
        ValueError: the folder holds no vocoder, one of unknown kind or a damaged one, or it belongs to another
            tokenizer.
    """
    kind = read_vocoder_card(Path(path))["kind"]
    # Imported here: their files build on this one, and each kind needs libraries that the others do not.
    vocoder: Vocoder
    match kind:
        case "mel":
            from smoltolk.speech.mel_vocoder import MelVocoder

            vocoder = MelVocoder.load(path)
        case "hifigan":
            from smoltolk.speech.hifigan import UnitHifiGan

            vocoder = UnitHifiGan.load(path)
        case "mimi":
            from smoltolk.speech.mimi_vocoder import MimiVocoder

            vocoder = MimiVocoder.load(path)
        case _:
            raise ValueError(f"{path} holds a vocoder of kind {kind!r}; this version knows mel, hifigan and mimi")
    if tokenizer is not None and tokenizer.fingerprint != vocoder.tokenizer_fingerprint:
        raise ValueError(
            f"{path} decodes units of tokenizer {vocoder.tokenizer_fingerprint}, not of "
            f"{tokenizer.fingerprint}: train a vocoder for this tokenizer"
        )
    return vocoder.to(check_device(device))


def read_vocoder_card(folder: Path) -> dict[str, Any]:
    """The card in a vocoder's folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        card = json.loads((folder / CARD_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a whole vocoder ({error}): train or copy it again") from error
    if not isinstance(card, dict) or "kind" not in card:
        raise ValueError(f"{folder / CARD_FILE} is not the card of a vocoder: train or copy it again")
    return card
