"""Units to audio: the unit HiFi-GAN in which the vocoders of TWIST, GSLM and speech-to-speech translation come.

    units ─ embedding ─┬─ duration of each unit
                       └─ repeated to frames, beside the vector of a speaker ─ HiFi-GAN ─ waveform

Polyak et al. 2021 (arXiv 2104.00355), with the duration predictor of Lee et al. 2022 (arXiv 2107.05604). The format
of the checkpoints is that of `CodeGenerator` in fairseq (fairseq/models/text_to_speech/codehifigan.py) and textlesslib
(textless/vocoders/hifigan/generator.py); the vocoder of mHuBERT 25 Hz is published in it.
"""

import json
import math
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from smoltolk.speech.audio import write_atomically
from smoltolk.speech.units import SpeechTokenizer
from smoltolk.speech.vocoder import CARD_FILE, Vocoder, read_vocoder_card

_WEIGHTS_FILE = "vocoder.safetensors"
_EDGE_KERNEL = 7  # of the first and the last convolution of every HiFi-GAN
_DURATION_KERNEL = 3
_DURATION_CONTEXT_UNITS = 2  # on both sides: two convolutions of kernel 3
_BLOCK_FRAMES = 500  # decoded at once, so that memory stays flat; the context makes a few percent more work
_FEATURES_WE_LACK = {
    "f0": "pitch as an input",
    "f0_quant_num_bin": "pitch as an input",
    "embedder_params": "speaker embeddings from another network",
}


@dataclass(frozen=True)
class UnitHifiGanSettings:
    """Sizes of a unit HiFi-GAN.

    Args:
        num_embeddings: units in the embedding.
        embedding_dim: dimension of a unit's embedding.
        condition_dim: dimension of the vector that every frame gets besides: that of the chosen speaker and style.
        duration_dim: hidden dimension of the duration predictor, None without one.
        upsample_rates: factors from frames to samples.
        upsample_kernel_sizes: kernels of the transposed convolutions.
        upsample_initial_channel: channels before the first of them; each halves them.
        resblock_kernel_sizes: kernels of the residual blocks after each of them.
        resblock_dilation_sizes: dilations in each residual block.
    """

    num_embeddings: int
    embedding_dim: int
    condition_dim: int
    duration_dim: int | None
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    upsample_initial_channel: int
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.upsample_kernel_sizes) != len(self.upsample_rates):
            raise ValueError(
                f"upsample_kernel_sizes has {len(self.upsample_kernel_sizes)} entries: give one for each of the "
                f"{len(self.upsample_rates)} upsample_rates"
            )
        for kernel, rate in zip(self.upsample_kernel_sizes, self.upsample_rates, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ValueError(
                    f"upsample_kernel_sizes has {kernel} for the upsample_rates {rate}: a frame would not become a "
                    "whole number of samples; they must differ by an even number"
                )
        if len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes):
            raise ValueError(
                f"resblock_dilation_sizes has {len(self.resblock_dilation_sizes)} entries: give one for each of the "
                f"{len(self.resblock_kernel_sizes)} resblock_kernel_sizes"
            )
        if even := [kernel for kernel in self.resblock_kernel_sizes if kernel % 2 == 0]:
            raise ValueError(f"resblock_kernel_sizes has {even[0]}: kernels must be odd")

    @property
    def hop_samples(self) -> int:
        """Samples of one frame."""
        return math.prod(self.upsample_rates)

    @property
    def context_frames(self) -> int:
        """How far the waveform of a frame depends on frames to each side of it."""
        reach = _EDGE_KERNEL // 2  # in samples, then at the rate before each transposed convolution
        block_reach = max(
            sum((kernel // 2) * (dilation + 1) for dilation in dilations)
            for kernel, dilations in zip(self.resblock_kernel_sizes, self.resblock_dilation_sizes, strict=True)
        )
        for kernel, rate in zip(reversed(self.upsample_kernel_sizes), reversed(self.upsample_rates), strict=True):
            padding = (kernel - rate) // 2
            reach = math.ceil((reach + block_reach + kernel - 1 - padding) / rate)
        return reach + _EDGE_KERNEL // 2


class UnitHifiGan(Vocoder):
    """A unit HiFi-GAN with one voice; made by `import_unit_hifigan` or `load`.

    Args:
        settings: sizes.
        tokenizer_fingerprint: fingerprint of the tokenizer whose units it decodes.
        num_units: number of different units.
        sample_rate_hz: sampling rate of the audio it makes.
    """

    kind = "hifigan"

    def __init__(
        self, settings: UnitHifiGanSettings, *, tokenizer_fingerprint: str, num_units: int, sample_rate_hz: int
    ) -> None:
        self.settings = settings
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.num_units = num_units
        self.sample_rate_hz = sample_rate_hz
        self._network = _UnitHifiGanNetwork(settings).eval()

    def to(self, device: str | torch.device) -> Self:
        """Compute on this device from now on."""
        self._network.to(device)
        return self

    @torch.inference_mode()
    def predict_durations(self, units: np.ndarray) -> np.ndarray:
        """Predicted duration of each unit (num_units_in_utterance,) in frames; 1 without a duration predictor."""
        units = np.asarray(units)
        ones = np.ones(len(units), np.int64)
        self.check(units, ones)
        return ones if self.settings.duration_dim is None else self._network.durations(self._ids(units)).cpu().numpy()

    def decode(self, units: np.ndarray, durations: np.ndarray | None = None) -> np.ndarray:
        """Speak units; the same units give the same audio.

        Args:
            units: unit ids (num_units_in_utterance,).
            durations: frames of each unit, at least 1; predicted from the units by default, and one frame each
                where there is no duration predictor.

        Returns:
            Waveform at `sample_rate_hz`, float32 (samples,) in −1 … 1; one hop of samples for each frame.

        Raises:
            ValueError: there are no units, one is out of range, or the durations do not fit them.
        """
        units = np.asarray(units)
        durations = self.predict_durations(units) if durations is None else np.asarray(durations)
        self.check(units, durations)
        frames = np.repeat(units, durations)
        blocks = range(0, len(frames), _BLOCK_FRAMES)
        return np.concatenate([self._decode_frames(frames, i, min(i + _BLOCK_FRAMES, len(frames))) for i in blocks])

    def decode_stream(self, units: Iterable[int], *, chunk_units: int = 24) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Speak units while they come, in chunks; together they are what `decode` gives, but for rounding.

        A chunk is given once all frames are known on which it depends: `settings.context_frames` after its end.

        Args:
            units: unit ids, in time.
            chunk_units: units in a chunk, less for a shorter delay, at more work for each.

        Yields:
            Some of the units (num_units_in_piece,), and their piece of the waveform, float32 (samples,).
        """
        if chunk_units < 1:
            raise ValueError(f"chunk_units is {chunk_units}: give 1 or more")
        seen: list[int] = []
        durations: list[int] = []  # those that no further unit can change
        begin = 0  # first unit not spoken yet
        for unit in units:
            seen.append(int(unit))
            if len(durations) <= len(seen) - 1 - _DURATION_CONTEXT_UNITS:
                durations.append(self._duration_in_context(seen, len(durations)))
            end = begin + chunk_units
            if sum(durations[end:]) >= self.settings.context_frames:
                yield self._decode_chunk(seen, durations, begin, end)
                begin = end
        while len(durations) < len(seen):
            durations.append(self._duration_in_context(seen, len(durations)))
        while begin < len(seen):
            end = min(begin + chunk_units, len(seen))
            yield self._decode_chunk(seen, durations, begin, end)
            begin = end

    def save(self, path: str | Path) -> None:
        """Write `vocoder.json` and `vocoder.safetensors` to a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.cpu().contiguous() for name, weight in self._network.state_dict().items()}
        card = {
            "kind": self.kind,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "num_units": self.num_units,
            "sample_rate_hz": self.sample_rate_hz,
            "settings": asdict(self.settings),
        }
        write_atomically(folder / _WEIGHTS_FILE, safetensors.torch.save(weights))
        write_atomically(folder / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())

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
            vocoder = cls(UnitHifiGanSettings(**_tuples(card.pop("settings"))), **card)
            vocoder._network.load_state_dict(safetensors.torch.load_file(folder / _WEIGHTS_FILE))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} is not a whole vocoder ({error}): import or copy it again") from error
        return vocoder

    def _ids(self, units: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(units, dtype=np.int64)).to(self._network.condition.device)

    def _duration_in_context(self, seen: list[int], index: int) -> int:
        """Predicted duration of one unit, of which all neighbours that matter have been seen."""
        first = max(0, index - _DURATION_CONTEXT_UNITS)
        around = np.array(seen[first : index + _DURATION_CONTEXT_UNITS + 1])
        return int(self.predict_durations(around)[index - first])

    def _decode_chunk(
        self, seen: list[int], durations: list[int], begin: int, end: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Units `begin` to `end`, and their audio."""
        # Each unit has a frame at least, so as many units as frames are context enough.
        first = max(0, begin - self.settings.context_frames)
        last = min(end + self.settings.context_frames, len(durations))
        units, lengths = np.array(seen[first:last]), np.array(durations[first:last])
        self.check(units, lengths)
        places = np.append(0, lengths.cumsum())
        frames = np.repeat(units, lengths)
        audio = self._decode_frames(frames, int(places[begin - first]), int(places[end - first]))
        return np.array(seen[begin:end], dtype=np.int64), audio

    @torch.inference_mode()
    def _decode_frames(self, frames: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Waveform of frames `begin` to `end` among the units of all frames (num_frames,)."""
        first = max(0, begin - self.settings.context_frames)
        around = self._ids(frames[first : end + self.settings.context_frames])
        hop_samples = self.settings.hop_samples
        audio = self._network(around)[(begin - first) * hop_samples : (end - first) * hop_samples]
        return audio.float().cpu().numpy().copy()


def import_unit_hifigan(
    config: str | Path,
    checkpoint: str | Path,
    tokenizer: SpeechTokenizer,
    *,
    speaker: int | None = None,
    style: int | None = None,
) -> UnitHifiGan:
    """Make a vocoder from a published unit HiFi-GAN.

    Args:
        config: its `config.json`.
        checkpoint: its weights, `{"generator": state_dict}` with or without weight normalisation.
        tokenizer: whose units it was trained on.
        speaker: which voice of a checkpoint with several.
        style: which style of a checkpoint with several.

    Raises:
        ValueError: a file cannot be read, the configuration asks for what this library cannot do, weights and
            configuration do not fit each other, or they do not fit the tokenizer; names the keys.
    """
    options = _read_config(Path(config))
    weights = _read_generator(Path(checkpoint))
    condition, chosen = [], {"spkr": ("multispkr", "speaker", speaker), "style": ("multistyle", "style", style)}
    for name, (key, argument, index) in chosen.items():
        if vector := _chosen_embedding(options, weights, name, key, argument, index):
            condition.append(vector[0])
    settings = _settings(options, config, condition_dim=sum(len(vector) for vector in condition))

    if settings.num_embeddings < tokenizer.num_units:
        raise ValueError(
            f"{config}: num_embeddings is {settings.num_embeddings}, but the tokenizer has {tokenizer.num_units} "
            "units: give the tokenizer that the vocoder was trained with"
        )
    sample_rate_hz = _integer(options, "sampling_rate", config, default=16_000)
    frame_rate_hz = sample_rate_hz / settings.hop_samples
    if not math.isclose(frame_rate_hz, tokenizer.unit_rate_hz, rel_tol=1e-3):
        raise ValueError(
            f"{config}: upsample_rates {list(settings.upsample_rates)} at sampling_rate {sample_rate_hz} make "
            f"{frame_rate_hz:g} frames per second, but the tokenizer {tokenizer.unit_rate_hz:g}: give the tokenizer "
            "that the vocoder was trained with"
        )
    vocoder = UnitHifiGan(
        settings,
        tokenizer_fingerprint=tokenizer.fingerprint,
        num_units=tokenizer.num_units,
        sample_rate_hz=sample_rate_hz,
    )
    renamed = {_our_name(name): weight for name, weight in _without_weight_norm(weights).items()}
    renamed["condition"] = torch.cat(condition) if condition else torch.zeros(0)
    _load_weights(vocoder._network, renamed, checkpoint)
    return vocoder


class _UnitHifiGanNetwork(nn.Module):
    """Units of frames to samples, and units to durations."""

    def __init__(self, settings: UnitHifiGanSettings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(settings.num_embeddings, settings.embedding_dim)
        self.condition: Tensor
        self.register_buffer("condition", torch.zeros(settings.condition_dim))
        self.duration_predictor = (
            None if settings.duration_dim is None else _DurationPredictor(settings.embedding_dim, settings.duration_dim)
        )
        self.generator = SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=settings.embedding_dim + settings.condition_dim,
                upsample_initial_channel=settings.upsample_initial_channel,
                upsample_rates=settings.upsample_rates,
                upsample_kernel_sizes=settings.upsample_kernel_sizes,
                resblock_kernel_sizes=settings.resblock_kernel_sizes,
                resblock_dilation_sizes=settings.resblock_dilation_sizes,
                normalize_before=False,
            )
        )
        del self.generator.mean, self.generator.scale  # of mel spectrograms

    def forward(self, frames: Tensor) -> Tensor:
        """Waveform (samples,) of the units of all frames (num_frames,)."""
        condition = self.condition.expand(len(frames), -1)
        return self.generator(torch.cat([self.embedding(frames), condition], dim=1))

    def durations(self, units: Tensor) -> Tensor:
        """Frames of each unit, int64 (num_units_in_utterance,), at least 1."""
        assert self.duration_predictor is not None
        # As trained: log(1 + frames).
        log_durations = self.duration_predictor(self.embedding(units))
        return (log_durations.exp() - 1).round().long().clamp_min(1)


class _DurationPredictor(nn.Module):
    """The variance predictor of FastSpeech 2 (arXiv 2006.04558, section 2.3), without its dropout."""

    def __init__(self, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(dim, hidden_dim, _DURATION_KERNEL, padding="same") for dim in (embedding_dim, hidden_dim)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_dim) for _ in self.convolutions)
        self.projection = nn.Linear(hidden_dim, 1)

    def forward(self, embedded: Tensor) -> Tensor:
        """Logarithms (num_units_in_utterance,) of embedded units (num_units_in_utterance, embedding_dim)."""
        hidden = embedded
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = norm(F.relu(convolution(hidden.T)).T)
        return self.projection(hidden).squeeze(-1)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"config {path} cannot be read ({error}): give the vocoder's config.json") from error
    if not isinstance(options, dict):
        raise ValueError(f"config {path} is not a JSON object: give the vocoder's config.json")
    return options


def _read_generator(path: Path) -> dict[str, Tensor]:
    """The state dict of the generator, none of whose tensors needs code to be loaded."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error}): download it again") from error
    generator = content.get("generator") if isinstance(content, dict) else None
    if not isinstance(generator, dict) or not all(isinstance(weight, Tensor) for weight in generator.values()):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"checkpoint {path} holds no weights under the key 'generator' (it holds {found[:200]}): give the "
            "generator's checkpoint, named g_00500000 or generator.pt"
        )
    return generator


def _settings(options: dict[str, Any], path: str | Path, condition_dim: int) -> UnitHifiGanSettings:
    for key, what in _FEATURES_WE_LACK.items():
        if options.get(key):
            raise ValueError(f"{path}: {key} is {options[key]!r}: vocoders with {what} are not supported")
    if str(options.get("resblock", "1")) != "1":
        raise ValueError(f"{path}: resblock is {options['resblock']!r}: only residual blocks of type '1' are supported")
    embedding_dim = _integer(options, "embedding_dim", path)
    input_dim = _integer(options, "model_in_dim", path, default=embedding_dim + condition_dim)
    if input_dim != embedding_dim + condition_dim:
        raise ValueError(
            f"{path}: model_in_dim is {input_dim}, but embedding_dim and the vectors of speaker and style add up to "
            f"{embedding_dim + condition_dim}: vocoders with further inputs are not supported"
        )
    duration_dim = None
    if durations := options.get("dur_predictor_params"):
        name = f"{path}: dur_predictor_params"
        duration_dim = _integer(durations, "var_pred_hidden_dim", name)
        if (encoder_dim := _integer(durations, "encoder_embed_dim", name)) != embedding_dim:
            raise ValueError(f"{name}: encoder_embed_dim is {encoder_dim}, but embedding_dim {embedding_dim}")
        if (kernel := _integer(durations, "var_pred_kernel_size", name)) != _DURATION_KERNEL:
            raise ValueError(f"{name}: var_pred_kernel_size is {kernel}: only {_DURATION_KERNEL} is supported")
    try:
        return UnitHifiGanSettings(
            num_embeddings=_integer(options, "num_embeddings", path),
            embedding_dim=embedding_dim,
            condition_dim=condition_dim,
            duration_dim=duration_dim,
            upsample_initial_channel=_integer(options, "upsample_initial_channel", path),
            **_tuples(
                {
                    key: options[key]
                    for key in (
                        "upsample_rates",
                        "upsample_kernel_sizes",
                        "resblock_kernel_sizes",
                        "resblock_dilation_sizes",
                    )
                }
            ),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: give the config.json that belongs to the checkpoint") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _integer(options: dict[str, Any], key: str, where: str | Path, default: int | None = None) -> int:
    value = options.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {key} is {value!r}: give the config.json that belongs to the checkpoint")
    return value


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with JSON's lists as tuples."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {name: frozen(value) for name, value in settings.items()}


def _chosen_embedding(
    options: dict[str, Any], weights: dict[str, Tensor], name: str, key: str, argument: str, index: int | None
) -> tuple[Tensor] | None:
    """Takes an embedding of speakers or styles out of the weights; gives the chosen row, None where there is none."""
    if not options.get(key):
        if index is not None:
            raise ValueError(f"{argument} is {index}, but {key} is off: the vocoder has one {argument}, leave it out")
        return None
    if options.get("embedder_params"):
        return None  # refused with the other settings
    table = weights.pop(f"{name}.weight", None)
    if table is None:
        raise ValueError(f"{key} is on, but the checkpoint holds no {name}.weight: give the config.json that fits it")
    if index is None or not 0 <= index < len(table):
        raise ValueError(f"{argument} is {index}: {key} is on, choose one of 0 to {len(table) - 1}")
    return (table[index],)


def _without_weight_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each pair of `weight_g` and `weight_v` as the weight it stands for: g·v/|v|, one norm per first index."""
    plain = {}
    for name, weight in weights.items():
        if name.endswith(".weight_g"):
            if name[:-1] + "v" not in weights:
                raise ValueError(f"the checkpoint has {name} without {name[:-1]}v: download it again")
        elif name.endswith(".weight_v"):
            if name[:-1] + "g" not in weights:
                raise ValueError(f"the checkpoint has {name} without {name[:-1]}g: download it again")
            norms = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
            plain[name.removesuffix("_v")] = weights[name[:-1] + "g"] * weight / norms
        else:
            plain[name] = weight
    return plain


def _our_name(name: str) -> str:
    """Our name of a weight of `CodeGenerator`."""
    first, _, rest = name.partition(".")
    if first == "dict":
        return f"embedding.{rest}"
    if first == "dur_predictor":
        layer, _, rest = rest.partition(".")
        ours = {"conv1": "convolutions.0", "conv2": "convolutions.1", "ln1": "norms.0", "ln2": "norms.1"}
        return f"duration_predictor.{ours.get(layer, 'projection')}.{rest.removeprefix('0.')}"
    return f"generator.{'upsampler' if first == 'ups' else first}.{rest}"


def _load_weights(network: nn.Module, weights: dict[str, Tensor], checkpoint: str | Path) -> None:
    expected = network.state_dict()
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{checkpoint} lacks {', '.join(missing[:5])}: give the config.json that belongs to it")
    if unexpected := [name for name in weights if name not in expected]:
        raise ValueError(
            f"{checkpoint} also holds {', '.join(unexpected[:5])}: give the config.json that belongs to it"
        )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{checkpoint}: {name} has shape {tuple(weight.shape)}, but the configuration asks for "
                f"{tuple(expected[name].shape)}: give the config.json that belongs to it"
            )
    network.load_state_dict(weights)
