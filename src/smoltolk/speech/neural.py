"""What the tokenizers with a neural network share: windows on a fixed grid, devices, folders.

The units of a file are a function of the file, of the tokenizer, and of device, precision and number of threads
alone. Its batch, its neighbours and the borders of the blocks it comes in have no say, for two reasons. It is cut
into windows on a grid that depends on its length only. And every window is computed in a tensor whose shape
depends on the length of the window only: matrix products of another shape may round differently, and a unit is
an argmin, which any rounding can flip. That leaves no room for padding short files to the longest one of a batch.
"""

import copy
import json
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from smoltolk.speech.audio import write_atomically
from smoltolk.speech.units import CARD_FILE, SpeechTokenizer, Units, check_block, read_card

MODEL_FOLDER = "model"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Window:
    """A piece of audio that goes through a network at once.

    Args:
        samples: float32 (samples,).
        first_frame: the first of the frames that are taken from this window, counted in the file.
        context_frames: frames before it that the window holds for the sake of the others.
        num_frames: how many frames are taken.
    """

    samples: np.ndarray
    first_frame: int
    context_frames: int
    num_frames: int


@dataclass(frozen=True)
class WindowGrid:
    """Where audio is cut.

    Window w gives the frames from w · `core_frames` on, and hears some more on both sides. The last window also
    takes a rest of less than half a core, so that no window is tiny; a file of less than one and a half cores is
    one window, and is heard as a whole.

    Args:
        hop_samples: samples from one frame to the next.
        frame_samples: samples that the first frame is made of; each further frame takes a hop more.
        core_frames: frames that a window gives.
        left_context_frames: frames heard before the core.
        right_context_frames: frames heard after it, at most half a core.
    """

    hop_samples: int
    frame_samples: int
    core_frames: int
    left_context_frames: int
    right_context_frames: int

    def __post_init__(self) -> None:
        if self.core_frames < 2:
            raise ValueError(f"core_frames is {self.core_frames}: make the window longer, 2 frames at least")
        if self.left_context_frames < 0 or not 0 <= self.right_context_frames <= self.core_frames // 2:
            raise ValueError(
                f"the context is {self.left_context_frames} and {self.right_context_frames} frames: give 0 to half a "
                f"window ({self.core_frames // 2})"
            )

    @property
    def full_window_samples(self) -> int:
        """Samples of a window with all its context."""
        return self._samples(self.left_context_frames + self.core_frames + self.right_context_frames)

    def cut(self, blocks: Iterable[np.ndarray]) -> Iterator[Window]:
        """Cut a waveform that comes in blocks of any length; holds two windows and a block at most.

        Args:
            blocks: float32 (samples,) each.

        Raises:
            ValueError: the waveform is shorter than one frame, or a block is not finite or of the wrong shape.
        """
        held: list[np.ndarray] = []
        num_held = 0  # samples, from those of frame `start` on
        start = core = 0
        # So many frames must be there for the window at `core` not to be the last one.
        enough_frames = self.core_frames + self.core_frames // 2
        for block in blocks:
            held.append(check_block(block))
            num_held += len(block)
            while num_held >= self._samples(core + enough_frames - start):
                samples = held[0] if len(held) == 1 else np.concatenate(held)
                end = core + self.core_frames + self.right_context_frames
                yield Window(samples[: self._samples(end - start)], core, core - start, self.core_frames)
                core += self.core_frames
                next_start = max(0, core - self.left_context_frames)
                held = [samples[(next_start - start) * self.hop_samples :]]
                num_held, start = len(held[0]), next_start
        num_frames = start + (num_held - self.frame_samples) // self.hop_samples + 1
        if num_held < self.frame_samples:
            raise ValueError(
                f"audio has {num_held} samples, less than one frame of {self.frame_samples}: leave out audio this short"
            )
        # The rest after the last frame stays: some models normalise over all that they hear.
        yield Window(np.concatenate(held), core, core - start, num_frames - core)

    def _samples(self, num_frames: int) -> int:
        return (num_frames - 1) * self.hop_samples + self.frame_samples


class NeuralTokenizer(SpeechTokenizer):
    """A tokenizer that sends windows through a network.

    Device, precision and batch size are settings of the run. They do not enter the fingerprint: they decide how
    exactly the units are computed, not what they mean.

    Args:
        model: what `save` writes; in float32, on the CPU.
        settings: dataclass of what else decides the units.
        grid: where audio is cut.
        device: where the network runs.
        dtype: "float32", "bfloat16" or "float16", what the network computes in; distances to centroids are
            always float32.
        batch_size: full windows that are computed at once, exactly so many each time: missing ones are filled up
            with silence, so that the shape stays the same. Other windows are computed alone. On the CPU it is no
            faster. On a GPU it can be, for long audio; the units are then the same in any batch as long as the
            kernels compute all rows alike, as those of the CPU do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Any,
        grid: WindowGrid,
        *,
        device: str | torch.device,
        dtype: str | torch.dtype,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give 1 or more")
        self.model, self.settings, self.batch_size = model, settings, batch_size
        self.device, self.dtype = check_device(device), check_dtype(dtype)
        self.unit_rate_hz = self.sample_rate_hz / grid.hop_samples
        self._grid = grid

    def to(self, device: str, dtype: str = "float32") -> Self:
        """Compute elsewhere, or in another precision, from now on; see `SpeechTokenizer.to`."""
        self.device, self.dtype = check_device(device), check_dtype(dtype)
        self._place()
        return self

    @abstractmethod
    def _place(self) -> None:
        """Put what is computed with on the device."""

    @abstractmethod
    def _frame_units(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Units of all frames, int64 (batch, frames), of windows of one length, float32 (batch, samples)."""

    @abstractmethod
    def _save_weights(self, folder: Path) -> None:
        """Write what is not in the model."""

    def encode_batch(self, audios: Sequence[np.ndarray]) -> list[Units]:
        """Units of each waveform; see `SpeechTokenizer.encode_batch`."""
        return self._encode([[audio] for audio in audios])

    def encode_stream(self, blocks: Iterable[np.ndarray]) -> Units:
        """Units of one waveform that comes in blocks; see `SpeechTokenizer.encode_stream`."""
        return self._encode([blocks])[0]

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, `kmeans.safetensors` where there is one, and the model in `model/`.

        The card comes last: a folder without it was not finished.

        Raises:
            ValueError: the folder has a `model/` that is not part of a tokenizer.
        """
        folder = Path(path)
        if (folder / MODEL_FOLDER).exists():
            try:
                read_card(folder)
            except ValueError as error:
                raise ValueError(
                    f"{folder / MODEL_FOLDER} is there, and not part of a speech tokenizer: choose another folder, or "
                    "remove it"
                ) from error
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / MODEL_FOLDER, ignore_errors=True)
        self.model.save_pretrained(folder / MODEL_FOLDER)
        self._save_weights(folder)
        card = {**self.card(), "settings": asdict(self.settings)}
        write_atomically(folder / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())

    def _windows(self, blocks: Iterable[np.ndarray]) -> Iterator[Window]:
        """The windows of a waveform."""
        return self._grid.cut(blocks)

    def _encode(self, streams: Sequence[Iterable[np.ndarray]]) -> list[Units]:
        found: list[dict[int, np.ndarray]] = [{} for _ in streams]  # for each stream, units by their first frame
        waiting: list[tuple[int, Window]] = []

        def compute(group: list[tuple[int, Window]], num_rows: int) -> None:
            waveforms = np.zeros((num_rows, len(group[0][1].samples)), np.float32)
            for row, (_, window) in zip(waveforms, group, strict=False):
                row[:] = window.samples
            with torch.inference_mode(), exact(self.device):
                units = self._frame_units(torch.from_numpy(waveforms).to(self.device)).cpu().numpy()
            for row, (number, window) in zip(units, group, strict=False):
                first = window.context_frames
                found[number][window.first_frame] = row[first : first + window.num_frames]

        for number, blocks in enumerate(streams):
            for window in self._windows(blocks):
                if len(window.samples) != self._grid.full_window_samples or self.batch_size == 1:
                    compute([(number, window)], 1)
                    continue
                waiting.append((number, window))
                if len(waiting) == self.batch_size:
                    compute(waiting, self.batch_size)
                    waiting = []
        if waiting:
            compute(waiting, self.batch_size)
        return [Units.from_frames(np.concatenate([units[first] for first in sorted(units)])) for units in found]


def placed(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A module for computing on a device in a precision: itself if it is so already, else a copy."""
    if device.type == "cpu" and dtype == torch.float32:
        return module
    module = copy.deepcopy(module)
    for part in module.modules():
        if parametrize.is_parametrized(part, "weight"):  # weight norm: its norms are taken before they are rounded
            # Copies share the class that holds the parametrised weight, and removing it there would break the others.
            shared = type(part)
            part.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
            parametrize.remove_parametrizations(part, "weight")
    return module.to(device=device, dtype=dtype)


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """Keeps cuDNN from timing its algorithms, of which another may win each time, and from rounding to TF32."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def check_device(device: str | torch.device) -> torch.device:
    """A device that is there; for "auto" the GPU if there is one, else the CPU.

    Raises:
        ValueError: it is unknown or not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device is {str(device)!r}, which PyTorch cannot use here ({reason}): give cpu") from error
    return found


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A precision to compute in.

    Raises:
        ValueError: it is none that tokenizers compute in.
    """
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise ValueError(f"dtype is {str(dtype)!r}: choose one of {', '.join(_DTYPES)}")
    return found
