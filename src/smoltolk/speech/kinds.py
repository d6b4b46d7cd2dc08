"""Tokenizers, vocoders and aligners of any kind, by their folder or name.

Each kind is imported when it is asked for: it needs libraries that the others do not.
"""

import warnings
from pathlib import Path

import torch

from smoltolk.speech.alignment import Aligner
from smoltolk.speech.neural import check_device
from smoltolk.speech.units import SpeechTokenizer, read_card
from smoltolk.speech.vocoder import Vocoder, read_vocoder_card


def load_speech_tokenizer(
    path: str | Path, *, device: str = "cpu", dtype: str = "float32", batch_size: int = 1
) -> SpeechTokenizer:
    """Read a tokenizer of any kind from the folder that its `save` wrote.

    Args:
        path: the folder.
        device: where its network runs.
        dtype: "float32", "bfloat16" or "float16", what the network computes in.
        batch_size: full windows of long audio that the network computes at once; see
            `smoltolk.speech.neural.NeuralTokenizer`.

    Raises:
        ValueError: the folder holds no tokenizer, one of unknown kind, or a damaged one; or a setting is unfit.
    """
    match kind := read_card(Path(path))["kind"]:
        case "mel":
            from smoltolk.speech.mel import MelTokenizer

            if (device, dtype, batch_size) != ("cpu", "float32", 1):
                warnings.warn(
                    f"{path} holds a 'mel' tokenizer, which has no network: device, dtype and batch_size have no "
                    "effect",
                    stacklevel=2,
                )
            return MelTokenizer.load(path)
        case "hubert":
            from smoltolk.speech.hubert import HubertTokenizer

            return HubertTokenizer.load(path, device=device, dtype=dtype, batch_size=batch_size)
        case "mimi":
            from smoltolk.speech.mimi import MimiTokenizer

            return MimiTokenizer.load(path, device=device, dtype=dtype, batch_size=batch_size)
        case _:
            raise ValueError(f"{path} holds a tokenizer of kind {kind!r}; this version knows mel, hubert, mimi")


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
    vocoder: Vocoder
    match kind := read_vocoder_card(Path(path))["kind"]:
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


def make_aligner(
    kind: str, model: str | None = None, min_confidence: float | None = None, device: str = "cpu"
) -> Aligner:
    """An aligner by its kind.

    Args:
        kind: "pocketsphinx" or "ctc".
        model: for "ctc", the name or folder of a CTC model.
        min_confidence: utterances with less are refused.
        device: where the model of "ctc" runs; pocketsphinx runs on the CPU.

    Raises:
        ValueError: the kind is unknown, the model is missing, unfit or not wanted, or the device is not there.
        ImportError: pocketsphinx is not installed.
    """
    match kind:
        case "pocketsphinx":
            from smoltolk.speech.pocketsphinx_aligner import PocketsphinxAligner

            if model is not None:
                raise ValueError(f"model is {model!r}, but pocketsphinx has its own: leave the model out")
            return PocketsphinxAligner(min_confidence)
        case "ctc":
            from smoltolk.speech.ctc_aligner import CtcAligner

            if model is None:
                raise ValueError("model is missing: ctc needs the name or folder of a CTC model")
            return CtcAligner(model, min_confidence, device)
        case _:
            raise ValueError(f"aligner is {kind!r}: choose pocketsphinx or ctc")
