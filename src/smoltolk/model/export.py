"""Export: a folder that any transformers loads, with the model's code and its card."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from .card import model_card, public_name
from .configuration_smoltolk import SmolTolkConfig
from .modeling_smoltolk import SmolTolkForCausalLM

RECORD_FILE = "training.json"
COMPANIONS = ("speech_tokenizer", "vocoder")
AUTO_CLASSES = {"AutoConfig": SmolTolkConfig, "AutoModelForCausalLM": SmolTolkForCausalLM}
CODE = (
    "configuration_smoltolk.py",
    "fission.py",
    "fusion.py",
    "losses.py",
    "modeling_smoltolk.py",
)  # import nothing else of smoltolk


def export_model(
    source: str | Path,
    destination: str | Path,
    *,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
) -> Path:
    """Makes a folder to share from a trained or imported model.

    It holds the weights (safetensors), the files of the model's code, so that
    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where smoltolk is not installed,
    the tokenizers and the vocoder if the source has them, and a model card. Of paths of the training recipe only
    the last part is kept.

    Args:
        source: folder of a model.
        destination: folder to make; it must not exist, or be empty.
        results: results of `smoltolk evaluate` on the source, for the card.
        license: licence of the weights, for the card; none is stated by default.

    Returns:
        The folder.

    Raises:
        ValueError: the source is not a whole SmolTolk model, or the destination holds something.
    """
    source, destination = Path(source), Path(destination)
    with new_folder(destination) as folder:
        model = load_model(source)
        has_tokenizer = (source / "tokenizer_config.json").is_file()
        config: SmolTolkConfig = model.config  # type: ignore[assignment]
        config.auto_map = {
            auto: f"{part.__module__.split('.')[-1]}.{part.__name__}" for auto, part in AUTO_CLASSES.items()
        }
        config.lm_config._name_or_path = public_name(config.lm_config._name_or_path)
        model.save_pretrained(folder)
        for file in CODE:
            shutil.copy(Path(__file__).with_name(file), folder)
        if has_tokenizer:
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        for name in COMPANIONS:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
        card = model_card(
            model,
            destination.resolve().name,
            has_tokenizer=has_tokenizer,
            has_vocoder=(source / "vocoder").is_dir(),
            record=_training_record(source),
            results=results,
            license=license,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return destination


def local_folder(name_or_path: str | Path) -> Path:
    """The folder of a model: the given one, or where a model of this name on the Hugging Face Hub is downloaded to.

    Raises:
        ValueError: there is neither.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(name_or_path)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name_or_path} is no folder, and no model of this name can be downloaded "
            f"({str(error).strip().splitlines()[0]}): correct the path or the name"
        ) from error


def load_model(folder: Path) -> SmolTolkForCausalLM:
    """Loads a saved model, and refuses one that is not whole.

    Raises:
        ValueError: the folder holds no SmolTolk model, or one that lacks weights.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no config.json that can be read: give the folder of a trained model"
        ) from error
    kind = settings.get("model_type")
    if kind != SmolTolkConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r}: give one of type {SmolTolkConfig.model_type!r}")
    loaded: Any = SmolTolkForCausalLM.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    model, found = loaded
    if faults := {name: sorted(keys) for name, keys in found.items() if keys}:
        raise ValueError(f"the weights in {folder} are not those of its config.json: {faults}")
    return model


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when the block ends, and is removed when it fails.

    Raises:
        ValueError: there is something at the path already.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder: give another, or remove it")
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _training_record(source: Path) -> dict[str, Any] | None:
    path = source / RECORD_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: remove it to export the model without a record") from error
