"""Units to audio: the decoder of Mimi, from its first codebook alone.

Mimi (Défossez et al. 2024, arXiv 2410.00037) holds what is said in its first codebook and how it sounds in the others.
Without those the words can be understood, but the voice is no one's.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import torch
from torch import Tensor
from transformers import DynamicCache, MimiConfig, MimiModel
from transformers.models.mimi import modeling_mimi

from smoltolk.speech.audio import write_atomically
from smoltolk.speech.units import SpeechTokenizer
from smoltolk.speech.vocoder import CARD_FILE, Vocoder, read_vocoder_card

_MODEL_FOLDER = "model"
_BLOCK_FRAMES = 250  # 20 s decoded at once, so that memory stays flat


class MimiVocoder(Vocoder):
    """Mimi's decoder; it predicts no durations, so that units without them last one frame each.

    Args:
        model: a Mimi; its encoder is not used and may be missing.
        tokenizer_fingerprint: fingerprint of the tokenizer whose units it decodes.

    Raises:
        ValueError: the model has no decoder, or it is not causal.
    """

    kind = "mimi"

    def __init__(self, model: MimiModel, tokenizer_fingerprint: str) -> None:
        config: MimiConfig = model.config
        if model.decoder is None:
            raise ValueError("model has no decoder (decoder_config is None): give a whole Mimi")
        if not config.use_causal_conv or config.trim_right_ratio != 1.0:
            raise ValueError(
                f"model has use_causal_conv {config.use_causal_conv} and trim_right_ratio {config.trim_right_ratio}: "
                "only causal models, True and 1.0, are supported"
            )
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.num_units = config.codebook_size
        self.sample_rate_hz = config.sampling_rate
        self._model = model.eval()

    @classmethod
    def from_pretrained(cls, model: str | Path, tokenizer: SpeechTokenizer) -> Self:
        """Load the decoder of a Mimi.

        Args:
            model: folder or name of a Mimi, such as the folder "model" of a mimi tokenizer.
            tokenizer: whose units it shall decode.

        Raises:
            ValueError: the model does not decode such units.
            OSError: there is no such model.
        """
        vocoder = cls(_load_decoder(model), tokenizer.fingerprint)
        frame_rate_hz = vocoder._model.config.frame_rate
        if vocoder.num_units != tokenizer.num_units or not math.isclose(frame_rate_hz, tokenizer.unit_rate_hz):
            raise ValueError(
                f"model {model} decodes {vocoder.num_units} units at {frame_rate_hz:g} Hz, but the tokenizer has "
                f"{tokenizer.num_units} at {tokenizer.unit_rate_hz:g} Hz: give the tokenizer's own model"
            )
        return vocoder

    def to(self, device: str | torch.device) -> Self:
        """Compute on this device from now on."""
        self._model.to(device)
        return self

    def decode(self, units: np.ndarray, durations: np.ndarray | None = None) -> np.ndarray:
        """Speak units; the same units give the same audio.

        Args:
            units: unit ids (num_units_in_utterance,).
            durations: frames of each unit, at least 1; one each by default.

        Returns:
            Waveform at `sample_rate_hz`, float32 (samples,) in −1 … 1; one hop of samples for each frame.

        Raises:
            ValueError: there are no units, one is out of range, or the durations do not fit them.
        """
        units = np.asarray(units)
        durations = np.ones(len(units), np.int64) if durations is None else np.asarray(durations)
        self.check(units, durations)
        frames = np.repeat(units, durations)
        decoding = _Decoding(self._model)
        return np.concatenate([decoding(frames[i : i + _BLOCK_FRAMES]) for i in range(0, len(frames), _BLOCK_FRAMES)])

    def decode_stream(self, units: Iterable[int], *, chunk_units: int = 24) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Speak units while they come, in chunks; together they are what `decode` gives, but for rounding.

        A chunk is given as soon as its last unit is there: nothing depends on what comes after it.

        Args:
            units: unit ids, in time.
            chunk_units: units in a chunk, less for a shorter delay.

        Yields:
            Some of the units (num_units_in_piece,), and their piece of the waveform, float32 (samples,).
        """
        if chunk_units < 1:
            raise ValueError(f"chunk_units is {chunk_units}: give 1 or more")
        decoding = _Decoding(self._model)
        waiting: list[int] = []
        for unit in units:
            waiting.append(int(unit))
            if len(waiting) == chunk_units:
                yield self._decode_chunk(decoding, waiting)
                waiting = []
        if waiting:
            yield self._decode_chunk(decoding, waiting)

    def save(self, path: str | Path) -> None:
        """Write the model and `vocoder.json` to a folder; the card comes last, so that with it the rest is there."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD_FILE).unlink(missing_ok=True)
        self._model.save_pretrained(folder / _MODEL_FOLDER)
        card = {"kind": self.kind, "tokenizer_fingerprint": self.tokenizer_fingerprint}
        write_atomically(folder / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a folder written by `save`.

        Raises:
            ValueError: a file is missing or damaged, or the folder holds another kind of vocoder.
        """
        folder = Path(path)
        card = read_vocoder_card(folder)
        if card["kind"] != cls.kind:
            raise ValueError(f"{folder} holds no {cls.kind!r} vocoder: load it with load_vocoder")
        try:
            return cls(_load_decoder(folder / _MODEL_FOLDER), card["tokenizer_fingerprint"])
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} is not a whole vocoder ({error}): make or copy it again") from error

    def _decode_chunk(self, decoding: "_Decoding", units: list[int]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(units, dtype=np.int64)
        self.check(ids, np.ones(len(ids), np.int64))
        return ids, decoding(ids)


class _Decoding:
    """A waveform that grows with the frames it is called with.

    The transformer keeps its keys and values. The convolutions see again as many frames as they reach back.
    """

    def __init__(self, model: MimiModel) -> None:
        assert model.decoder is not None
        self._model = model
        self._cache = DynamicCache(config=model.decoder.config)
        self._latents: Tensor | None = None  # the last one (1, hidden_size, 1): the upsampling reaches back one frame
        self._hidden: Tensor | None = None  # the last ones that the convolutions see (1, hidden_size, context)

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Waveform (samples,) of further frames (num_frames,)."""
        decoder, config = self._model.decoder, self._model.config
        assert decoder is not None
        codes = torch.from_numpy(np.asarray(frames, dtype=np.int64)).to(self._model.device)
        latents = self._model.quantizer.decode(codes[None, None])  # (1, hidden_size, num_frames)
        before = latents[..., :0] if self._latents is None else self._latents
        upsampled = decoder.upsample(torch.cat([before, latents], dim=2))
        upsampled = upsampled[..., config.latent_stride * before.shape[2] :]
        self._latents = latents[..., -1:]

        hidden = decoder.decoder_transformer(
            upsampled.transpose(1, 2), past_key_values=self._cache, use_cache=True
        ).last_hidden_state.transpose(1, 2)
        before = hidden[..., :0] if self._hidden is None else self._hidden
        seen = torch.cat([before, hidden], dim=2)
        self._hidden = seen[..., -_convolution_context(config) :]

        assert config.upsampling_ratios is not None
        samples_per_hidden = math.prod(config.upsampling_ratios)
        audio = decoder.decoder_seanet(seen)[0, 0, samples_per_hidden * before.shape[2] :]
        return audio.float().clamp(-1, 1).cpu().numpy().copy()


def _convolution_context(config: MimiConfig) -> int:
    """How many hidden states back the decoder's causal convolutions see."""
    assert config.upsampling_ratios is not None
    reach = config.last_kernel_size - 1  # in samples, then at the rate before each transposed convolution
    for ratio in reversed(config.upsampling_ratios):
        reach += sum(
            (config.residual_kernel_size - 1) * config.dilation_growth_rate**layer
            for layer in range(config.num_residual_layers)
        )
        reach = math.ceil((reach + 2 * ratio - 1) / ratio)  # their kernels are two strides long
    return reach + config.kernel_size - 1


def _load_decoder(model: str | Path) -> MimiModel:
    """A Mimi without its encoder, which is half of its size.

    Raises:
        ImportError: transformers is too old to load one without the other.
        ValueError: weights of the decoder are missing or damaged.
        OSError: there is no such model.
    """
    if not hasattr(modeling_mimi, "MimiDecoderModel"):
        raise ImportError("Mimi as a vocoder needs transformers 5.21.1 or newer: pip install -U transformers")
    load: Any = MimiModel.from_pretrained  # which does not say that it gives a pair
    try:
        loaded, found = load(model, encoder_config=None, dtype=torch.float32, output_loading_info=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"model {model} is damaged, or has the weights of another ({error})") from error
    if found["missing_keys"]:
        raise ValueError(f"model {model} lacks {', '.join(sorted(found['missing_keys'])[:5])}: download it again")
    return loaded
