"""K-means for speech tokenizers: frames to learn it from, and the files others keep it in."""

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler
from sklearn.cluster import KMeans

FIT_FRAMES = 100_000  # k-means sees at most so many frames, chosen at random


class FrameSample:
    """A uniform sample of the frames of a stream of unknown length.

    Every frame draws a key, and those with the lowest keys stay.

    Args:
        num_frames: most frames to keep.
        rng: draws the keys.
    """

    def __init__(self, num_frames: int, rng: np.random.Generator) -> None:
        self.num_seen = 0
        self._num_frames, self._rng = num_frames, rng
        self._kept: list[np.ndarray] = []
        self._keys = np.empty(0)
        self._highest_key = 1.0  # that a further frame may have

    def add(self, frames: np.ndarray) -> None:
        """Take in frames (num_frames, dim)."""
        self.num_seen += len(frames)
        keys = self._rng.random(len(frames))
        is_low = keys <= self._highest_key
        self._kept.append(frames[is_low].astype(np.float32))
        self._keys = np.append(self._keys, keys[is_low])
        if len(self._keys) > 1.25 * self._num_frames:  # not each time: it copies everything
            self._drop_high_keys()

    def frames(self) -> np.ndarray:
        """The sample, float32 (num_frames, dim)."""
        if len(self._keys) > self._num_frames:
            self._drop_high_keys()
        return np.concatenate(self._kept) if self._kept else np.empty((0, 1), np.float32)

    def _drop_high_keys(self) -> None:
        # In the order of the stream: it does not show in which blocks the frames came.
        lowest = np.sort(np.argpartition(self._keys, self._num_frames)[: self._num_frames])
        self._kept, self._keys = [np.concatenate(self._kept)[lowest]], self._keys[lowest]
        self._highest_key = self._keys.max()


def fit_kmeans(frames: np.ndarray, num_units: int, seed: int) -> np.ndarray:
    """Centroids (num_units, dim) of frames (num_frames, dim).

    Raises:
        ValueError: `num_units` is below 2, or there are fewer different frames than that.
    """
    check_num_units(num_units)
    num_different = len({hash(frame.tobytes()) for frame in frames})
    if num_different < num_units:
        raise ValueError(
            f"num_units is {num_units}, but the audio has only {num_different} different frames: give more audio or "
            "choose fewer units"
        )
    # In float64, so that the order in which threads add up does not reach the rounded centroids.
    kmeans = KMeans(num_units, n_init=1, max_iter=50, random_state=seed).fit(frames.astype(np.float64, copy=False))
    return kmeans.cluster_centers_


def check_num_units(num_units: int) -> None:
    """Raise for a number of units that tell nothing apart."""
    if num_units < 2:
        raise ValueError(f"num_units is {num_units}: choose at least 2")


def read_kmeans(path: str | Path) -> np.ndarray:
    """Centroids, float32 (num_units, dim), of k-means that others have trained.

    Args:
        path: a .npy file; a .safetensors file with one matrix, or with one named "centroids"; or what joblib or
            pickle made of a scikit-learn KMeans or MiniBatchKMeans, or of an array. Of a pickle nothing is run:
            arrays are read, objects of scikit-learn are kept as bare attributes, and all else is refused.

    Raises:
        ValueError: the file cannot be read, holds no centroids, or asks for code to be run.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            centroids = np.load(path, allow_pickle=False)
        elif path.suffix == ".safetensors":
            matrices = safetensors.numpy.load_file(path)
            centroids = matrices["centroids"] if "centroids" in matrices else _only(matrices, path)
        else:
            with open(path, "rb") as file:
                content = _Unpickler(file).load()
            centroids = getattr(content, "cluster_centers_", content)
    except OSError as error:
        raise ValueError(f"k-means file {path} cannot be read ({error.strerror or error}): correct the path") from error
    except (
        pickle.UnpicklingError,
        safetensors.SafetensorError,
        EOFError,
        struct.error,
        AttributeError,
        IndexError,
        KeyError,
        MemoryError,
        OverflowError,
        TypeError,
        ValueError,
    ) as error:  # what damaged bytes make of an unpickler
        raise ValueError(
            f"k-means file {path} cannot be used ({error}): give a .npy or .safetensors file of the centroids, or a "
            "scikit-learn KMeans that joblib has written uncompressed"
        ) from error
    return check_centroids(centroids, str(path))


def check_centroids(centroids: Any, name: str) -> np.ndarray:
    """Centroids as float32 (num_units, dim).

    Raises:
        ValueError: they are no finite matrix of at least 2 rows.
    """
    if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or not np.issubdtype(centroids.dtype, np.floating):
        found = (
            f"{centroids.dtype} {centroids.shape}" if isinstance(centroids, np.ndarray) else type(centroids).__name__
        )
        raise ValueError(f"{name} holds {found}: give centroids, floats (num_units, dim)")
    if len(centroids) < 2 or not np.isfinite(centroids).all():
        raise ValueError(f"{name} has fewer than 2 centroids, or values that are not finite: train k-means again")
    return np.ascontiguousarray(centroids, dtype=np.float32)


def _only(matrices: dict[str, np.ndarray], path: Path) -> np.ndarray:
    if len(matrices) != 1:
        raise ValueError(f"it has {len(matrices)} tensors, none of them named centroids")
    return next(iter(matrices.values()))


class _Attributes:
    """An object of another library, reduced to its attributes."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _PlainArray(NumpyArrayWrapper):
    """Where joblib keeps an array in its file; arrays of objects are pickles again, and are refused."""

    def read_array(self, unpickler: Any, *arguments: Any) -> np.ndarray:
        if self.dtype.hasobject:
            raise pickle.UnpicklingError("it holds an array of objects")
        return super().read_array(unpickler, *arguments)


class _Unpickler(NumpyUnpickler):
    """Reads what joblib and pickle write, but looks up no name outside of this list."""

    def __init__(self, file: Any) -> None:
        super().__init__("", file, ensure_native_byte_order=True)

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module.partition(".")[0] == "sklearn" or module.startswith("numpy.random"):
            return _Attributes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as old pickles keep them."""
    return text.encode("latin1")


# What pickles of numbers and arrays call; numpy's own functions, as its pickles name them.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): _PlainArray,
    ("_codecs", "encode"): _latin1,
}
