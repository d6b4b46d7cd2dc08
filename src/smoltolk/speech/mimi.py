"""The units of Mimi: the first codebook of Kyutai's codec, 12.5 Hz, which was trained to follow a speech model.

    waveform ── windows ── MimiModel's encoder ── nearest entry of the semantic codebook ── merge ── units

Mimi's decoder speaks them: `smoltolk.speech.mimi_vocoder`.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import torch
from torch import Tensor
from transformers import AutoModel, MimiModel
from transformers.models.mimi import modeling_mimi

from smoltolk.speech.neural import MODEL_FOLDER, NeuralTokenizer, Window, WindowGrid, placed
from smoltolk.speech.units import fingerprint, read_card, refuse_mismatch

# What decides the units besides the weights; other settings of transformers come and go with its versions.
_ARCHITECTURE = (
    "upsampling_ratios",
    "kernel_size",
    "last_kernel_size",
    "residual_kernel_size",
    "dilation_growth_rate",
    "num_residual_layers",
    "pad_mode",
    "use_conv_shortcut",
    "frame_rate",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "norm_eps",
    "sliding_window",
)


@dataclass(frozen=True)
class MimiSettings:
    """How `MimiTokenizer` hears.

    Mimi hears the past only, through attention over the last 10 s in each of its layers. A window begins early by
    `context_s`, so that each of its frames attends to as many frames as in the whole file.

    Args:
        window_s: what a window gives. Files of less than one and a half windows are heard as a whole.
        context_s: what a window hears before that.
    """

    window_s: float = 40.0
    context_s: float = 10.0

    def __post_init__(self) -> None:
        if self.window_s <= 0:
            raise ValueError(f"window_s is {self.window_s}: give a value above 0")


class MimiTokenizer(NeuralTokenizer):
    """The first codebook of a Mimi model.

    Args:
        model: `MimiModel` of transformers, with its encoder; a copy is kept, decoder and all.
        settings: how it hears.
        device: where the encoder runs.
        dtype: "float32", "bfloat16" or "float16", what the encoder computes in.
        batch_size: full windows computed at once; see `NeuralTokenizer`.

    Raises:
        ValueError: the model has no encoder or hears the future, or a setting is unfit.
    """

    kind = "mimi"

    def __init__(
        self,
        model: MimiModel,
        settings: MimiSettings = MimiSettings(),
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 1,
    ) -> None:
        config: Any = model.config
        if model.encoder is None:
            raise ValueError("the Mimi model has no encoder: give a whole one")
        if not config.use_causal_conv:
            raise ValueError("the Mimi model hears the future (use_causal_conv is false): give a causal one")
        self.sample_rate_hz = config.sampling_rate
        hop_samples = config.frame_size
        frames_per_s = config.sampling_rate / hop_samples
        grid = WindowGrid(
            hop_samples=hop_samples,
            frame_samples=hop_samples,
            core_frames=round(settings.window_s * frames_per_s),
            left_context_frames=round(settings.context_s * frames_per_s),
            right_context_frames=0,
        )
        kept: Any = copy.deepcopy(model)
        kept.to("cpu", torch.float32).eval().requires_grad_(False)
        for part in kept.quantizer.modules():
            if hasattr(part, "_embed"):  # codebook entries that were worked out before, perhaps elsewhere
                part._embed = None
        super().__init__(kept, settings, grid, device=device, dtype=dtype, batch_size=batch_size)
        self.num_units = config.codebook_size
        quantizer = self._semantic_quantizer()
        weights = {f"encoder.{name}": weight for name, weight in kept.encoder.state_dict().items()}
        weights |= {
            f"quantizer.{name}": weight
            for name, weight in quantizer.state_dict().items()
            if name.startswith(("input_proj.", "layers.0."))
        }
        architecture = {name: getattr(config, name) for name in _ARCHITECTURE}
        architecture |= {name: config.rope_parameters[name] for name in ("rope_type", "rope_theta")}
        self.fingerprint = fingerprint(
            self.kind,
            asdict(settings) | architecture,
            {name: weight.numpy() for name, weight in weights.items()},
        )
        self._place()

    def _semantic_quantizer(self) -> Any:
        model: Any = self.model
        return model.quantizer.semantic_residual_vector_quantizer

    def _place(self) -> None:
        self._encoder = placed(self.model.encoder, self.device, self.dtype)
        self._quantizer = placed(self._semantic_quantizer(), self.device, torch.float32)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "kyutai/mimi",
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 1,
    ) -> Self:
        """Make a tokenizer of a Mimi model.

        Args:
            name_or_path: name on the Hugging Face hub, or folder.
            revision: of a model on the hub.
            device: where the encoder runs.
            dtype: what it computes in.
            batch_size: full windows computed at once.

        Raises:
            ValueError: it is no Mimi model, or a setting is unfit.
            OSError: there is no such model.
        """
        model = _load_model(name_or_path, revision=revision)
        return cls(model, device=device, dtype=dtype, batch_size=batch_size)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 1,
    ) -> Self:
        """Read a folder written by `save`.

        Raises:
            ValueError: a file is missing or damaged, the weights do not have the fingerprint of the card, or a
                setting of the run is unfit.
        """
        folder = Path(path)
        card = read_card(folder)
        if card["kind"] != cls.kind:
            raise ValueError(f"{folder} holds a {card['kind']!r} tokenizer, not {cls.kind!r}")
        try:
            settings = MimiSettings(**card["settings"])
            model = _load_model(folder / MODEL_FOLDER, local_files_only=True)
        except (OSError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} is not a whole tokenizer ({error}): import or copy it again") from error
        tokenizer = cls(model, settings, device=device, dtype=dtype, batch_size=batch_size)
        refuse_mismatch(folder, tokenizer.fingerprint, card)
        return tokenizer

    def _windows(self, blocks: Iterable[np.ndarray]) -> Iterator[Window]:
        return self._grid.cut(self._in_whole_frames(blocks))

    def _in_whole_frames(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The blocks, and silence up to a whole frame, as in Kyutai's own code."""
        num_samples = 0
        for block in blocks:
            num_samples += len(block)
            yield block
        yield np.zeros(-num_samples % self._grid.hop_samples, np.float32)

    def _frame_units(self, waveforms: Tensor) -> Tensor:
        latents = self._encoder(waveforms[:, None].to(self.dtype)).latents  # (batch, dim, frames)
        return self._quantizer.encode(latents.float(), num_quantizers=1)[0]

    def _save_weights(self, folder: Path) -> None:
        """Everything is in the model."""


def require_mimi() -> None:
    """Refuses versions of transformers whose Mimi is not made of an encoder and a decoder.

    Raises:
        ImportError: transformers is too old.
    """
    if not hasattr(modeling_mimi, "MimiDecoderModel"):
        raise ImportError("Mimi needs transformers 5.21.1 or newer: pip install -U transformers")


def _load_model(name_or_path: str | Path, **options: Any) -> MimiModel:
    require_mimi()
    model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, **options)
    if not isinstance(model, MimiModel):
        raise ValueError(f"{name_or_path} holds a model of type {model.config.model_type!r}: give a Mimi model")
    return model
