"""What the files of a trained model say: its identity, its size."""

import hashlib
import math
from pathlib import Path

from safetensors import safe_open


def checkpoint_fingerprint(folder: Path) -> str:
    """Hash of a model folder's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def num_parameters(folder: Path) -> int:
    """Number of weights in a model folder's safetensors files; tied ones are there once."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total
