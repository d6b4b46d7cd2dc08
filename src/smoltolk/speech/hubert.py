"""The paper's kind of speech tokenizer: a layer of a HuBERT-like model, and k-means.

    waveform ── windows ── convolutions, transformer layers 1 … layer ── nearest centroid ── merge ── units

The model is any of transformers that has HuBERT's shape: HuBERT, wav2vec 2.0 and WavLM.
"""

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.feature_extraction_utils import FeatureExtractionMixin

from smoltolk.speech.audio import write_atomically
from smoltolk.speech.clustering import (
    FIT_FRAMES,
    FrameSample,
    check_centroids,
    check_num_units,
    fit_kmeans,
    read_kmeans,
)
from smoltolk.speech.neural import (
    MODEL_FOLDER,
    NeuralTokenizer,
    WindowGrid,
    check_device,
    check_dtype,
    exact,
    placed,
)
from smoltolk.speech.units import fingerprint, read_card, refuse_mismatch

_KMEANS_FILE = "kmeans.safetensors"
_MODEL_TYPES = ("hubert", "wav2vec2", "wavlm")
# What decides the features besides the weights; other settings of transformers come and go with its versions.
_ARCHITECTURE = (
    "model_type",
    "num_attention_heads",
    "hidden_act",
    "feat_extract_norm",
    "feat_extract_activation",
    "feat_proj_layer_norm",
    "conv_stride",
    "conv_kernel",
    "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
    "conv_pos_batch_norm",
    "do_stable_layer_norm",
    "layer_norm_eps",
    "num_buckets",  # WavLM
    "max_bucket_distance",  # WavLM
)
_UNUSED_WEIGHTS = ("masked_spec_embed", "adapter.")  # for training; after the last layer

# The tokenizer of TWIST and of the paper: mHuBERT at 25 Hz, layer 11, 500 units. The model is a conversion for
# transformers; its k-means is the one of textlesslib (name, address and hash in textless/checkpoint_manager.py),
# which reads fairseq's layer 11 and does not normalise the waveform.
_MHUBERT_25HZ = "slprl/mhubert-base-25hz"
_MHUBERT_25HZ_REVISION = "a319086e1d343190047d02b7f81133fb310c1b90"
_MHUBERT_25HZ_KMEANS = (
    "https://dl.fbaipublicfiles.com/textless_nlp/twist/speech_tokenizer/"
    "mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin"
)
_MHUBERT_25HZ_KMEANS_SHA256 = "03cc04a9c24fec4285e73e709c485756d8f116aa8e724eac555de6a7cf8d28ad"


@dataclass(frozen=True)
class HubertSettings:
    """How `HubertTokenizer` hears.

    Args:
        layer: transformer layer whose output is used, counted from 1: `hidden_states[layer]` of transformers, layer
            `layer` of fairseq and textlesslib. The final normalisation of pre-norm models is not applied.
        is_normalized: whether each window is brought to mean 0 and variance 1 before it is heard, as the model's
            `preprocessor_config.json` says in `do_normalize`. For a file of one window that is the usual
            normalisation of the file.
        window_s: what a window gives. Files of less than one and a half windows are heard as a whole.
        context_s: what a window hears beyond that on both sides.
        sample_rate_hz: sampling rate of the audio.
    """

    layer: int
    is_normalized: bool
    window_s: float = 20.0
    context_s: float = 1.0
    sample_rate_hz: int = 16_000

    def __post_init__(self) -> None:
        for name in ("layer", "window_s", "sample_rate_hz"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a value above 0")


class HubertTokenizer(NeuralTokenizer):
    """A layer of a HuBERT-like model and k-means.

    Args:
        model: HuBERT, wav2vec 2.0 or WavLM of transformers; a copy is kept, without the layers that are not needed.
        centroids: k-means centroids of the layer's output, float32 (num_units, dim).
        settings: how it hears.
        device: where the model runs.
        dtype: "float32", "bfloat16" or "float16", what it computes in.
        batch_size: full windows computed at once; see `NeuralTokenizer`.

    Raises:
        ValueError: the model is of another kind or has no such layer, the centroids do not fit it, or a setting of
            the run is unfit.
    """

    kind = "hubert"

    def __init__(
        self,
        model: PreTrainedModel,
        centroids: np.ndarray,
        settings: HubertSettings,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 1,
    ) -> None:
        self.sample_rate_hz = settings.sample_rate_hz
        self._features = _Features(model, settings, check_device(device), check_dtype(dtype))
        model = self._features.model
        super().__init__(model, settings, self._features.grid, device=device, dtype=dtype, batch_size=batch_size)
        self.centroids = check_centroids(centroids, "centroids")
        if self.centroids.shape[1] != model.config.hidden_size:
            raise ValueError(
                f"centroids have {self.centroids.shape[1]} dimensions, but the model {model.config.hidden_size}: use "
                "the k-means of this model and layer"
            )
        self.num_units = len(self.centroids)
        architecture = {name: getattr(model.config, name, None) for name in _ARCHITECTURE}
        weights = {
            name: weight.numpy() for name, weight in model.state_dict().items() if not name.startswith(_UNUSED_WEIGHTS)
        }
        self.fingerprint = fingerprint(
            self.kind, asdict(settings) | architecture, weights | {"centroids": self.centroids}
        )
        self._place()

    def _place(self) -> None:
        self._features.to(self.device, self.dtype)
        self._points = torch.from_numpy(self.centroids).to(self.device)
        self._squares = self._points.square().sum(dim=1)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        layer: int,
        kmeans: str | Path,
        is_normalized: bool | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 1,
    ) -> Self:
        """Make a tokenizer of a model of transformers and a k-means file.

        Args:
            name_or_path: name on the Hugging Face hub, or folder.
            layer: see `HubertSettings`.
            kmeans: joblib, .npy or .safetensors file; see `smoltolk.speech.clustering.read_kmeans`.
            is_normalized: see `HubertSettings`; by default what the model's `preprocessor_config.json` says.
            revision: of a model on the hub.
            device: where the model runs.
            dtype: what it computes in.
            batch_size: full windows computed at once.

        Raises:
            ValueError: the k-means cannot be read or does not fit, the model is unfit, or does not say whether it
                wants normalised audio.
            OSError: there is no such model.
        """
        centroids = read_kmeans(kmeans)
        model, settings = load_hubert(name_or_path, layer=layer, is_normalized=is_normalized, revision=revision)
        return cls(model, centroids, settings, device=device, dtype=dtype, batch_size=batch_size)

    @classmethod
    def mhubert_25hz(
        cls,
        kmeans: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        batch_size: int = 1,
    ) -> Self:
        """The paper's tokenizer: mHuBERT base at 25 Hz, layer 11, 500 units; downloads what is not here yet.

        Args:
            kmeans: textlesslib's k-means file, where it is here already.
            device: where the model runs.
            dtype: what it computes in.
            batch_size: full windows computed at once.

        Raises:
            ValueError: the k-means file is not the published one.
            OSError: the download fails.
        """
        path = _download_kmeans() if kmeans is None else Path(kmeans)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != _MHUBERT_25HZ_KMEANS_SHA256:
            raise ValueError(
                f"{path} has sha256 {found}, but the published k-means {_MHUBERT_25HZ_KMEANS_SHA256}: download it "
                f"again from {_MHUBERT_25HZ_KMEANS}, or use from_pretrained for another one"
            )
        return cls.from_pretrained(
            _MHUBERT_25HZ,
            layer=11,
            kmeans=path,
            is_normalized=False,
            revision=_MHUBERT_25HZ_REVISION,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )

    @classmethod
    def fit(
        cls,
        audios: Iterable[np.ndarray | Iterable[np.ndarray]],
        model: PreTrainedModel,
        settings: HubertSettings,
        *,
        num_units: int = 500,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
    ) -> Self:
        """Learn centroids on a user's own audio.

        Args:
            audios: waveforms, float32 (samples,) each, or iterables over the blocks of each; read once, one at a
                time.
            model: HuBERT, wav2vec 2.0 or WavLM of transformers.
            settings: how the tokenizer hears.
            num_units: number of centroids.
            seed: decides which frames k-means sees and where it starts.
            device: where the model runs.
            dtype: what it computes in.

        Raises:
            ValueError: `num_units` is below 2, or the audio has fewer different frames than that.
        """
        check_num_units(num_units)
        features = _Features(model, settings, check_device(device), check_dtype(dtype))
        sample = FrameSample(FIT_FRAMES, np.random.default_rng(seed))
        for audio in audios:
            for window in features.grid.cut([audio] if isinstance(audio, np.ndarray) else audio):
                with torch.inference_mode(), exact(features.device):
                    waveform = torch.from_numpy(window.samples.copy()).to(features.device)
                    frames = features(waveform[None])[0].cpu().numpy()
                sample.add(frames[window.context_frames :][: window.num_frames])
        centroids = fit_kmeans(sample.frames(), num_units, seed)
        return cls(features.model, centroids, settings, device=device, dtype=dtype)

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
            settings = HubertSettings(**card["settings"])
            centroids = safetensors.numpy.load_file(folder / _KMEANS_FILE)["centroids"]
            model = AutoModel.from_pretrained(folder / MODEL_FOLDER, dtype=torch.float32, local_files_only=True)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} is not a whole tokenizer ({error}): fit, import or copy it again") from error
        tokenizer = cls(model, centroids, settings, device=device, dtype=dtype, batch_size=batch_size)
        refuse_mismatch(folder, tokenizer.fingerprint, card)
        return tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        # Weight norm, which the model has, cannot be pickled but by its state.
        model = (type(self.model), self.model.config, self.model.state_dict())
        return _unpickle, (type(self), model, self.centroids, self.settings, self.device, self.dtype, self.batch_size)

    def _frame_units(self, waveforms: Tensor) -> Tensor:
        frames = self._features(waveforms)  # (batch, frames, dim)
        return (self._squares - 2 * frames @ self._points.T).argmin(dim=-1)

    def _save_weights(self, folder: Path) -> None:
        write_atomically(folder / _KMEANS_FILE, safetensors.numpy.save({"centroids": self.centroids}))


def load_hubert(
    name_or_path: str | Path, *, layer: int, is_normalized: bool | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, HubertSettings]:
    """A model of transformers, and how to hear with it.

    Args:
        name_or_path: name on the Hugging Face hub, or folder.
        layer: see `HubertSettings`.
        is_normalized: see `HubertSettings`; by default what the model's `preprocessor_config.json` says.
        revision: of a model on the hub.

    Raises:
        ValueError: the model does not say whether it wants normalised audio.
        OSError: there is no such model.
    """
    model = AutoModel.from_pretrained(name_or_path, revision=revision, dtype=torch.float32)
    try:
        said, _ = FeatureExtractionMixin.get_feature_extractor_dict(str(name_or_path), revision=revision)
    except OSError:
        said = {}
    if is_normalized is None:
        if "do_normalize" not in said:
            raise ValueError(
                f"{name_or_path} has no preprocessor_config.json with do_normalize: give is_normalized "
                "(--normalize or --no-normalize), as the model was trained"
            )
        is_normalized = bool(said["do_normalize"])
    return model, HubertSettings(layer, is_normalized, sample_rate_hz=said.get("sampling_rate", 16_000))


class _Features:
    """Output of one layer.

    Attributes:
        model: the part of the model that is needed; in float32, on the CPU.
        grid: where audio is cut.
        device: where the model runs.
    """

    def __init__(
        self, model: PreTrainedModel, settings: HubertSettings, device: torch.device, dtype: torch.dtype
    ) -> None:
        config = model.config
        if config.model_type not in _MODEL_TYPES:
            raise ValueError(
                f"the model is of type {config.model_type!r}, which is not HuBERT-like: give one of "
                f"{', '.join(_MODEL_TYPES)}"
            )
        if settings.layer > config.num_hidden_layers:
            raise ValueError(
                f"layer is {settings.layer}, but the model has {config.num_hidden_layers} layers: choose one of them"
            )
        self._is_normalized = settings.is_normalized
        kept: Any = copy.deepcopy(model)
        kept.to("cpu", torch.float32).eval().requires_grad_(False)
        del kept.encoder.layers[settings.layer :]
        kept.config.num_hidden_layers = settings.layer
        self.model = kept
        self.grid = _grid(config, settings)
        self.to(device, dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Compute there from now on."""
        self.device, self._dtype = device, dtype
        self._network = placed(self.model, device, dtype)

    def __call__(self, waveforms: Tensor) -> Tensor:
        """Frames, float32 (batch, frames, dim), of waveforms of one length, float32 (batch, samples)."""
        if self._is_normalized:  # as transformers' Wav2Vec2FeatureExtractor does
            waveforms = waveforms - waveforms.mean(dim=1, keepdim=True)
            waveforms = waveforms / (waveforms.var(dim=1, correction=0, keepdim=True) + 1e-7).sqrt()
        # A hook, since transformers' hidden_states end with another tensor in some versions of pre-norm models.
        outputs: list[Any] = []
        hook = self._network.encoder.layers[-1].register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            self._network(waveforms.to(self._dtype))
        finally:
            hook.remove()
        output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]  # WavLM's layers give more
        return output.float()


def _grid(config: PreTrainedConfig, settings: HubertSettings) -> WindowGrid:
    hop_samples, frame_samples = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        frame_samples += (kernel - 1) * hop_samples
        hop_samples *= stride
    frames_per_s = settings.sample_rate_hz / hop_samples
    context_frames = round(settings.context_s * frames_per_s)
    return WindowGrid(
        hop_samples, frame_samples, round(settings.window_s * frames_per_s), context_frames, context_frames
    )


def _unpickle(
    cls: type[HubertTokenizer],
    model: tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, Tensor]],
    centroids: np.ndarray,
    settings: HubertSettings,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> HubertTokenizer:
    model_class, config, weights = model
    with torch.random.fork_rng(devices=[]):  # it begins with random weights
        network = model_class(config)
    network.load_state_dict(weights)
    return cls(network, centroids, settings, device=device, dtype=dtype, batch_size=batch_size)


def _download_kmeans() -> Path:
    path = Path(torch.hub.get_dir()) / "smoltolk" / _MHUBERT_25HZ_KMEANS.rpartition("/")[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                _MHUBERT_25HZ_KMEANS, str(path), hash_prefix=_MHUBERT_25HZ_KMEANS_SHA256, progress=False
            )
        except RuntimeError as error:  # another hash
            raise OSError(f"{_MHUBERT_25HZ_KMEANS} came in damaged ({error}): start again") from error
    return path
