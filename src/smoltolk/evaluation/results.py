"""Results with their number of items, error bars, protocol and checkpoint."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltolk.model.fingerprint import checkpoint_fingerprint as checkpoint_fingerprint
from smoltolk.speech.audio import write_atomically

NUM_BOOTSTRAP = 2000


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers.

    Args:
        n: number of items.
        accuracy: share of right answers, 0 to 1.
        standard_error: binomial standard error.
        low: lower end of the 95 % bootstrap interval over couples.
        high: upper end of it.
        num_ties: items whose two scores were equal.
    """

    n: int
    accuracy: float
    standard_error: float
    low: float
    high: float
    num_ties: int


@dataclass(frozen=True, eq=False)
class PairResult:
    """Scores of every item in one modality pair.

    Args:
        pair: the modality pair, prompt → ending.
        ids: ids of the items.
        kinds: kind of each item.
        couples: couple of each item.
        true_scores: score of each true ending (num_items,).
        false_scores: score of each false ending (num_items,).
        tie_credit: what a tie counts.
    """

    pair: str
    ids: list[str]
    kinds: list[str]
    couples: list[str]
    true_scores: np.ndarray
    false_scores: np.ndarray
    tie_credit: float

    @property
    def credit(self) -> np.ndarray:
        """1 for a right answer, 0 for a wrong one, the tie credit for equal scores, (num_items,)."""
        right = (self.true_scores > self.false_scores).astype(float)
        return np.where(self.true_scores == self.false_scores, self.tie_credit, right)

    def accuracy(self, kind: str | None = None) -> Accuracy:
        """Accuracy over the items of one kind, or all."""
        chosen = np.array([kind is None or k == kind for k in self.kinds])
        credit = self.credit[chosen]
        mean = float(credit.mean())
        low, high = bootstrap(credit, [c for c, is_in in zip(self.couples, chosen, strict=True) if is_in])
        return Accuracy(
            n=len(credit),
            accuracy=mean,
            standard_error=float(np.sqrt(mean * (1 - mean) / len(credit))),
            low=low,
            high=high,
            num_ties=int((self.true_scores == self.false_scores)[chosen].sum()),
        )


@dataclass(frozen=True, eq=False)
class ClozeResult:
    """Result of a cloze task in some modality pairs."""

    protocol: str
    pairs: list[PairResult]

    def summary(self) -> dict[str, dict[str, Accuracy]]:
        """Accuracy by pair, then by kind."""
        return {
            result.pair: {kind: result.accuracy(kind) for kind in sorted(set(result.kinds))} for result in self.pairs
        }

    def save(self, folder: Path, *, items: str, checkpoint: str) -> Path:
        """Writes `result.json` and `items.parquet` (scores of every item), atomically.

        Args:
            folder: where to.
            items: path of the items, for the record.
            checkpoint: identity of the model, see `checkpoint_fingerprint`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        columns: dict[str, list[Any]] = {
            name: [] for name in ("pair", "id", "kind", "couple", "true_score", "false_score", "credit")
        }
        for result in self.pairs:
            columns["pair"] += [result.pair] * len(result.ids)
            columns["id"] += result.ids
            columns["kind"] += result.kinds
            columns["couple"] += result.couples
            columns["true_score"] += result.true_scores.tolist()
            columns["false_score"] += result.false_scores.tolist()
            columns["credit"] += result.credit.tolist()
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_atomically(folder / "items.parquet", sink.getvalue().to_pybytes())
        record = {
            "task": "cloze",
            "protocol": self.protocol,
            "items": items,
            "checkpoint": checkpoint,
            "accuracy": {
                pair: {kind: vars(accuracy) for kind, accuracy in kinds.items()}
                for pair, kinds in self.summary().items()
            },
        }
        path = folder / "result.json"
        write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False).encode())
        return path


def read_result(path: Path, checkpoint: str) -> dict[str, Any]:
    """Reads the `result.json` of a model.

    Args:
        path: the file.
        checkpoint: identity of the model, see `checkpoint_fingerprint`.

    Raises:
        ValueError: not such a file, or the result of another model.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: give the result.json that `smoltolk evaluate` wrote") from error
    if not isinstance(record, dict) or record.get("checkpoint") != checkpoint:
        raise ValueError(f"{path} is no result of this model (checkpoint {checkpoint[:12]}…): evaluate it again")
    return record


def bootstrap(values: np.ndarray, groups: Iterable[str], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, resampling whole groups.

    Args:
        values: (num_items,).
        groups: group of each item; items of one group stay together.
        seed: seed of the resampling.
    """
    _, index = np.unique(list(groups), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(sums), size=(NUM_BOOTSTRAP, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
