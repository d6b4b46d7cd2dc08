"""Accuracy while a run goes on: how many tokens and seconds it takes to reach a share of right answers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoltolk.evaluation.tasks import PAIRS, ClozeItem, evaluate_cloze, load_cloze
from smoltolk.experiments.ablation import CurveSettings
from smoltolk.generation.pipeline import SmolTolkPipeline
from smoltolk.speech.audio import write_atomically
from smoltolk.training.trainer import METRICS_FILE, Trainer, read_metrics

CURVE_FILE = "curve.jsonl"
CURVE_PAIRS = tuple(pair for pair in PAIRS if "S" in pair)


class Curve:
    """Scores a run's model every so many steps on some cloze items, into `curve.jsonl` in its folder.

    Args:
        trainer: the run.
        settings: how often, and how many items.
        items: file of cloze items.
    """

    def __init__(self, trainer: Trainer, settings: CurveSettings, items: Path) -> None:
        self.trainer, self.settings = trainer, settings
        self.path = trainer.output / CURVE_FILE
        self.pipeline = SmolTolkPipeline(trainer.model, trainer.tokenizer)
        self.items = spread(load_cloze(items), settings.couples)

    def on_step(self, metrics: dict[str, Any]) -> None:
        """Scores the model after this step, if it is time to; leaves out a step that was scored before a restart."""
        step = metrics["step"]
        if step % self.settings.every_steps and step != self.trainer.recipe.num_steps:
            return
        known = read_metrics(self.path) if self.path.exists() else []
        if any(line["step"] == step for line in known):
            return
        result = evaluate_cloze(self.trainer.model, self.items, self.pipeline.text_ids, pairs=CURVE_PAIRS)
        accuracy = {pair: result.accuracy(pair=pair).accuracy for pair in CURVE_PAIRS}
        seconds = sum(line["seconds"] for line in read_metrics(self.trainer.output / METRICS_FILE))
        line = {"step": step, "tokens": metrics["tokens"], "seconds": seconds, "accuracy": accuracy}
        write_atomically(self.path, "".join(json.dumps(point) + "\n" for point in (*known, line)).encode())


def spread(items: Sequence[ClozeItem], couples: int) -> list[ClozeItem]:
    """The items of so many couples, spread evenly over the file."""
    names = list(dict.fromkeys(item.couple for item in items))
    chosen = {names[i * len(names) // couples] for i in range(couples)} if couples < len(names) else set(names)
    return [item for item in items if item.couple in chosen]


def reached(curve: Sequence[dict[str, Any]], pair: str, share: float) -> dict[str, float] | None:
    """Tokens and seconds of the first point of a curve with at least this share of right answers, None for none."""
    for line in curve:
        if line["accuracy"][pair] >= share:
            return {"tokens": line["tokens"], "seconds": line["seconds"]}
    return None
