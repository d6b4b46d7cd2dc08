import os
import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans, MiniBatchKMeans

from smoltolk.speech.clustering import FrameSample, fit_kmeans, read_kmeans

FRAMES = np.random.default_rng(0).random((200, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def kmeans() -> KMeans:
    return KMeans(5, n_init=1, random_state=0).fit(FRAMES)


@pytest.mark.parametrize("kind", [KMeans, MiniBatchKMeans])
@pytest.mark.parametrize("random_state", [None, 3, np.random.RandomState(0)])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_kmeans_of_scikit_learn_is_read_as_joblib_and_as_pickle_write_it(
    tmp_path: Path, kind: type[KMeans], random_state: Any, protocol: int
) -> None:
    fitted = kind(5, n_init=1, random_state=random_state).fit(FRAMES)
    joblib.dump(fitted, tmp_path / "by-joblib.bin", protocol=protocol)
    (tmp_path / "by-pickle.bin").write_bytes(pickle.dumps(fitted, protocol=protocol))
    for path in tmp_path.iterdir():
        centroids = read_kmeans(path)
        assert centroids.dtype == np.float32
        np.testing.assert_array_equal(centroids, fitted.cluster_centers_.astype(np.float32))


def test_arrays_are_read_from_all_kinds_of_files(tmp_path: Path, kmeans: KMeans) -> None:
    centroids = kmeans.cluster_centers_
    np.save(tmp_path / "a.npy", centroids)
    np.save(tmp_path / "b.npy", np.asfortranarray(centroids.astype(np.float64)))
    joblib.dump(centroids, tmp_path / "c.joblib")
    joblib.dump(np.asfortranarray(centroids), tmp_path / "d.joblib")
    safetensors.numpy.save_file({"anything": centroids}, tmp_path / "e.safetensors")
    safetensors.numpy.save_file({"centroids": centroids, "x": FRAMES}, tmp_path / "f.safetensors")
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_kmeans(path), centroids.astype(np.float32))


class Touch:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["file", "attribute", "array of objects"])
@pytest.mark.parametrize("write", [joblib.dump, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_no_code_in_a_file_is_run(tmp_path: Path, place: str, write: Any, kmeans: KMeans) -> None:
    harm = Touch(tmp_path / "harm")
    if place == "file":
        content: Any = harm
    elif place == "attribute":
        content = KMeans(5, n_init=1).fit(FRAMES)
        content.also = harm
    else:
        content = KMeans(5, n_init=1).fit(FRAMES)
        content.cluster_centers_ = np.array([harm, 1.0], dtype=object)
    write(content, tmp_path / "kmeans.bin")
    with pytest.raises(ValueError, match=r"kmeans\.bin cannot be used \(it (asks for posix\.system|holds an array of)"):
        read_kmeans(tmp_path / "kmeans.bin")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FRAMES[0], r"float32 \(6,\): give centroids"),
        (FRAMES.astype(np.int64), r"int64 \(200, 6\): give centroids"),
        (FRAMES[:1], "fewer than 2 centroids"),
        (FRAMES * np.nan, "not finite"),
        ({"centroids": 1}, "holds dict: give centroids"),
        (KMeans(3), "holds _Attributes: give centroids"),
    ],
)
def test_files_without_centroids_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    joblib.dump(content, tmp_path / "kmeans.bin")
    with pytest.raises(ValueError, match=message):
        read_kmeans(tmp_path / "kmeans.bin")


def test_files_that_cannot_be_read_are_refused_with_their_paths(tmp_path: Path, kmeans: KMeans) -> None:
    joblib.dump(kmeans, tmp_path / "packed.bin", compress=3)
    (tmp_path / "empty.bin").touch()
    (tmp_path / "text.npy").write_text("0.1 0.2")
    (tmp_path / "text.safetensors").write_text("0.1 0.2")
    np.save(tmp_path / "objects.npy", np.array([None, 1], dtype=object), allow_pickle=True)
    safetensors.numpy.save_file({"a": FRAMES, "b": FRAMES}, tmp_path / "two.safetensors")
    for name in ("packed.bin", "empty.bin", "text.npy", "text.safetensors", "objects.npy", "two.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} cannot be used .*give a \.npy"):
            read_kmeans(tmp_path / name)
    for name in ("missing.npy", "missing.bin", "missing.safetensors"):
        with pytest.raises(ValueError, match=f"{name} cannot be read .*correct the path"):
            read_kmeans(tmp_path / name)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(cut=st.integers(0, 1200), place=st.integers(0, 1200), byte=st.integers(0, 255))
def test_a_damaged_file_is_refused_or_gives_centroids(
    tmp_path_factory: pytest.TempPathFactory, cut: int, place: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "kmeans.bin"
    joblib.dump(KMeans(5, n_init=1, random_state=0).fit(FRAMES[:20]), path)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    path.write_bytes(bytes(data[: max(1, len(data) - cut)]) if cut % 2 else bytes(data))
    try:
        centroids = read_kmeans(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert centroids.ndim == 2


def test_kmeans_finds_the_clusters_there_are_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(1)
    centres = np.eye(4) * 10
    frames = np.repeat(centres, 50, axis=0) + 0.1 * rng.standard_normal((200, 4))
    found = fit_kmeans(frames.astype(np.float32), 4, seed=0)
    np.testing.assert_allclose(found[np.argsort(-found @ [4, 3, 2, 1])], centres, atol=0.1)
    np.testing.assert_array_equal(fit_kmeans(frames.astype(np.float32), 4, seed=0), found)


def test_fewer_different_frames_than_units_are_refused() -> None:
    with pytest.raises(ValueError, match="num_units is 3, but the audio has only 2 different frames"):
        fit_kmeans(np.repeat(np.eye(2, dtype=np.float32), 9, axis=0), 3, seed=0)
    with pytest.raises(ValueError, match="num_units is 1: choose at least 2"):
        fit_kmeans(FRAMES, 1, seed=0)


@pytest.mark.parametrize("block", [1, 7, 500])
def test_a_sample_of_frames_does_not_show_in_which_blocks_they_came(block):
    frames = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    samples = []
    for size in (block, len(frames)):
        sample = FrameSample(300, np.random.default_rng(1))
        for start in range(0, len(frames), size):
            sample.add(frames[start : start + size])
        samples.append(sample.frames())
    np.testing.assert_array_equal(*samples)
    assert samples[0].shape == (300, 3)
