"""The runs of an ablation: their folders, the work of each in a process of its own, and what it left behind."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smoltolk.evaluation.tasks import evaluate_cloze, load_cloze
from smoltolk.experiments.ablation import RATE, CurveSettings, Value, setting_name
from smoltolk.experiments.curve import CURVE_FILE, Curve
from smoltolk.generation.pipeline import SmolTolkPipeline
from smoltolk.model.fingerprint import checkpoint_fingerprint
from smoltolk.speech.audio import write_atomically
from smoltolk.training.config import Recipe, make_recipe
from smoltolk.training.distributed import join_ranks
from smoltolk.training.trainer import METRICS_FILE, MODEL_FOLDER, Trainer, read_metrics

CHECKPOINTS_FOLDER = "checkpoints"
DIVERGED_FILE = "diverged.json"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Run:
    """A training run of an ablation.

    Args:
        variant: name of its variant.
        budget: "tokens" or "flops".
        setting: what of the variant's sweep it runs with.
        seed: its seed.
        recipe: its recipe, with its folder as output.
    """

    variant: str
    budget: str
    setting: Mapping[str, Value]
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Its folder."""
        return Path(self.recipe.output)

    @property
    def name(self) -> str:
        """What to call it: its folder's path below the ablation's."""
        return run_name(self.variant, self.budget, self.setting, self.seed)

    @property
    def rate(self) -> float:
        """Peak rate of its last stage."""
        return float(self.setting[RATE])  # type: ignore[arg-type]

    @property
    def has_diverged(self) -> bool:
        """Whether it stopped for losses that were not finite."""
        return (self.folder / DIVERGED_FILE).exists()

    @property
    def is_trained(self) -> bool:
        """Whether its model is there."""
        return (self.folder / MODEL_FOLDER / "training.json").exists()

    def is_done(self, scores: str | None) -> bool:
        """Whether nothing is left to do.

        Args:
            scores: name of the scores that it needs, if any.
        """
        has_scores = scores is None or (self.folder / scores / RESULT_FILE).exists()
        has_ended = self.is_trained and has_scores and not (self.folder / CHECKPOINTS_FOLDER).exists()
        return self.has_diverged or has_ended

    def training(self) -> dict[str, Any]:
        """What its training left: tokens, flops, seconds, validation losses; only of a run that is trained.

        Raises:
            ValueError: the folder holds a run of another recipe.
        """
        path = self.folder / MODEL_FOLDER / "training.json"
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if make_recipe(record["recipe"]).fingerprint != self.recipe.fingerprint:
            raise ValueError(
                f"{self.folder} holds a run of another recipe: give another --output, or remove the folder"
            )
        return record

    def accuracy(self, scores: str) -> dict[str, dict[str, dict[str, float]]] | None:
        """Its accuracy by pair and kind, None where it was not scored."""
        path = self.folder / scores / RESULT_FILE
        if not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        accuracy: dict[str, dict[str, dict[str, float]]] = record["accuracy"]
        return accuracy

    def curve(self) -> list[dict[str, Any]]:
        """Its accuracy while it went on, see `Curve`; empty where that was not followed."""
        path = self.folder / CURVE_FILE
        return sorted(read_metrics(path), key=lambda line: line["step"]) if path.exists() else []

    def stage_flops(self) -> list[int]:
        """Training FLOPs of each stage."""
        ends = {line["stage"]: line["flops"] for line in read_metrics(self.folder / METRICS_FILE)}
        totals = [0, *ends.values()]
        return [after - before for before, after in itertools.pairwise(totals)]


def run_name(variant: str, budget: str, setting: Mapping[str, Value], seed: int, steps: int | None = None) -> str:
    """Path of a run's folder below the ablation's."""
    place = setting_name(setting) if steps is None else f"{setting_name(setting)},steps={steps}"
    return f"{variant}/{budget}/{place}/seed-{seed}"


def train(
    recipe: Recipe,
    scores: str | None,
    items: Path | None,
    curve: CurveSettings | None,
    curve_items: Path,
    progress: Callable[[int], None],
) -> None:
    """Trains a run, from its last checkpoint if there is one, and scores it; its checkpoints are removed then.

    Args:
        recipe: the run.
        scores: what to call the scores, None for none.
        items: the cloze items to score it on.
        curve: how its accuracy is followed while it is trained, None for not at all.
        curve_items: the cloze items for that.
        progress: called with the number of steps done since the last call.
    """
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    followed: Curve | None = None

    def on_step(metrics: dict[str, Any]) -> None:
        nonlocal done
        if followed is not None:
            followed.on_step(metrics)
        progress(metrics["step"] - done)
        done = metrics["step"]

    if not (folder / MODEL_FOLDER / "training.json").exists():
        settings = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        write_atomically(folder / "recipe.yaml", settings.encode())
        try:
            trainer = Trainer(recipe, progress=False, on_step=on_step)
            if curve is not None:
                followed = Curve(trainer, curve, curve_items)
            trainer.run()
        except FloatingPointError as error:  # a rate that is too high is a finding, not a fault
            write_atomically(folder / DIVERGED_FILE, json.dumps({"message": str(error)}).encode())
            return
    progress(recipe.num_steps - done)
    if scores is not None and items is not None:
        score(recipe, scores, items, lambda _: None)
    shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)


def score(recipe: Recipe, scores: str, items: Path, progress: Callable[[int], None]) -> None:
    """Scores a trained run on cloze items, unless that was done.

    Args:
        recipe: the run.
        scores: folder of the scores below the run's.
        items: the cloze items.
        progress: called with the number of sequences scored since the last call.
    """
    folder = Path(recipe.output)
    if (folder / scores / RESULT_FILE).exists():
        return
    model = folder / MODEL_FOLDER
    pipeline = SmolTolkPipeline.from_pretrained(model, device=str(join_ranks(recipe.device).device))
    found = load_cloze(items, pipeline.speech_tokenizer)
    result = evaluate_cloze(pipeline.model, found, pipeline.text_ids, progress=progress)
    result.save(folder / scores, items=str(items), checkpoint=checkpoint_fingerprint(model))
