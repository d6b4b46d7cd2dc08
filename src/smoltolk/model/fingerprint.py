"""The identity of a trained model."""

import hashlib
from pathlib import Path


def checkpoint_fingerprint(folder: Path) -> str:
    """Hash of a model folder's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
