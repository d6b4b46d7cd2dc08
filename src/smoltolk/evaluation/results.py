"""Results with their number of items, error bars, protocol and checkpoint."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import smoltolk
from smoltolk.evaluation.protocols import Protocol
from smoltolk.speech.audio import write_atomically

NUM_BOOTSTRAP = 2000
RESULT_FILE = "result.json"
ITEMS_FILE = "items.parquet"
CHUNKS_FOLDER = "chunks"
RESERVED_COLUMNS = frozenset({"id", "couple", "positive_score", "negative_score", "credit"})


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers.

    Args:
        n: number of items, or of the groups that are averaged first.
        accuracy: share of right answers, 0 to 1.
        standard_error: binomial standard error.
        low: lower end of the 95 % bootstrap interval over couples.
        high: upper end of it.
        num_ties: items whose two scores were equal.
        num_items: number of items.
    """

    n: int
    accuracy: float
    standard_error: float
    low: float
    high: float
    num_ties: int
    num_items: int


@dataclass(frozen=True)
class Average:
    """A number to report: which items, and how they become one.

    Args:
        group: what it belongs to, such as a modality pair.
        name: what to call it in there.
        where: the labels that its items have, all items when empty.
        over: columns to average within first, the outermost one first: `("id",)` averages the voices of an id, then
            the ids; `("type", "id")` the voices of an id, the ids of a type, then the types. Empty for the plain mean.
        anchor: column of `anchors.json` that the number belongs in, None for none.
    """

    group: str
    name: str
    where: Mapping[str, str] = field(default_factory=dict)
    over: tuple[str, ...] = ()
    anchor: str | None = None

    def chosen(self, table: pa.Table) -> np.ndarray:
        """Which items it is about, (num_items,) bool.

        Raises:
            ValueError: a column that is not there, or no item at all.
        """
        if missing := sorted({*self.where, *self.over} - set(table.column_names)):
            raise ValueError(f"the average {self.group} {self.name} needs {missing[0]}, which items do not have")
        chosen = np.ones(len(table), dtype=bool)
        for column, value in self.where.items():
            chosen &= table[column].to_numpy() == value
        if not chosen.any():
            raise ValueError(f"the average {self.group} {self.name} has no items: {dict(self.where)}")
        return chosen

    def weights(self, table: pa.Table) -> tuple[np.ndarray, int]:
        """What each item of a table counts, (num_items,), and the number of innermost groups.

        Means of means are means with such weights; those of the plain mean are 1.
        """
        weights = np.ones(len(table))
        outer = np.zeros(len(table), dtype=np.int64)  # the group of each item so far
        num_groups = len(table)
        for column in self.over:
            inner = outer * (len(table) + 1) + np.unique(table[column].to_numpy(), return_inverse=True)[1]
            inner = np.unique(inner, return_inverse=True)[1]
            parts = np.unique(np.stack([outer, inner]), axis=1)[0]  # outer group of each inner one
            weights /= np.bincount(parts)[outer]
            outer, num_groups = inner, len(parts)
        if self.over:
            weights /= np.bincount(outer)[outer]
        return weights, num_groups


@dataclass(frozen=True, eq=False)
class TaskResult:
    """Scores of every item of a task, and what they came to.

    Args:
        task: name of the task.
        split: part of the benchmark, None where it has none.
        protocol: the protocol, with the tie credit that was given.
        precision: what the model computed in.
        truncates_prompts: whether prompts could lose their beginning.
        num_truncated: items whose prompts did.
        items_fingerprint: identity of the items, whatever their tokens.
        tokens_fingerprint: identity of their tokens.
        averages: the numbers to report.
        table: labels, id, couple, positive_score and negative_score of every item.
    """

    task: str
    split: str | None
    protocol: Protocol
    precision: str
    truncates_prompts: bool
    num_truncated: int
    items_fingerprint: str
    tokens_fingerprint: str
    averages: tuple[Average, ...]
    table: pa.Table

    @property
    def credit(self) -> np.ndarray:
        """1 for a right answer, 0 for a wrong one, the tie credit for equal scores, (num_items,)."""
        return credits_of(self.table, self.protocol.tie_credit)

    def accuracy(self, average: Average | None = None, /, **where: str) -> Accuracy:
        """What an average comes to, or the plain mean of the items with some labels."""
        average = average or Average("all", "items", where)
        chosen = average.chosen(self.table)
        table, credit = self.table.filter(pa.array(chosen)), self.credit[chosen]
        weights, n = average.weights(table)
        mean = float(weights @ credit / weights.sum())
        low, high = bootstrap(credit, table["couple"].to_pylist(), weights=weights)
        is_tie = table["positive_score"].to_numpy() == table["negative_score"].to_numpy()
        return Accuracy(
            n=n,
            accuracy=mean,
            standard_error=float(np.sqrt(max(0.0, mean * (1 - mean)) / n)),
            low=low,
            high=high,
            num_ties=int(is_tie.sum()),
            num_items=len(table),
        )

    def summary(self) -> dict[str, dict[str, Accuracy]]:
        """Accuracy by group, then by name."""
        found: dict[str, dict[str, Accuracy]] = {}
        for average in self.averages:
            found.setdefault(average.group, {})[average.name] = self.accuracy(average)
        return found

    def save(self, folder: Path, *, items: str, checkpoint: str) -> Path:
        """Writes `result.json` and `items.parquet` (scores of every item), each atomically.

        Args:
            folder: where to.
            items: path of the items, for the record.
            checkpoint: identity of the model, see `checkpoint_fingerprint`.

        Raises:
            ValueError: the folder holds another result.
        """
        record = {
            "task": self.task,
            "split": self.split,
            "protocol": self.protocol.name,
            "knobs": self.protocol.knobs(),
            "precision": self.precision,
            "truncates_prompts": self.truncates_prompts,
            "num_truncated": self.num_truncated,
            "items": items,
            "num_items": len(self.table),
            "items_fingerprint": self.items_fingerprint,
            "tokens_fingerprint": self.tokens_fingerprint,
            "checkpoint": checkpoint,
            "smoltolk_version": smoltolk.__version__,
            "averages": [asdict(average) for average in self.averages],
            "accuracy": {
                group: {name: asdict(accuracy) for name, accuracy in names.items()}
                for group, names in self.summary().items()
            },
        }
        path = folder / RESULT_FILE
        if path.exists():
            check_same(path, record)
        folder.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(self.table.append_column("credit", pa.array(self.credit)), sink)
        write_atomically(folder / ITEMS_FILE, sink.getvalue().to_pybytes())
        write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False).encode())
        shutil.rmtree(folder / CHUNKS_FOLDER, ignore_errors=True)
        return path


def credits_of(table: pa.Table, tie_credit: float) -> np.ndarray:
    """1 for a right answer, 0 for a wrong one, the tie credit for equal scores, (num_items,)."""
    positive, negative = table["positive_score"].to_numpy(), table["negative_score"].to_numpy()
    return np.where(positive == negative, tie_credit, (positive > negative).astype(float))


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs, in what it is within too: its name and both values."""
    for key in {**ours, **theirs}:
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if found := first_difference(a, b):
                return found
        elif a != b:
            return key, a, b
    return None


def check_same(path: Path, record: Mapping[str, Any]) -> None:
    """Refuses to write over the result of something else, as far as the new one is known.

    Raises:
        ValueError: the file holds another result.
    """
    keys = ("task", "split", "knobs", "precision", "truncates_prompts", "checkpoint", "protocol", "items_fingerprint")
    known = _read_json(path)
    about = [{key: found.get(key) for key in keys if key in record} for found in (known, record)]
    if found := first_difference(*about):
        raise ValueError(
            f"{path} holds the result with {found[0]} {found[1]!r}, not {found[2]!r}: give another --output, or "
            "remove it"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: give the result.json that `smoltolk evaluate` wrote") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is no result of `smoltolk evaluate`: it holds no table of keys")
    return record


def read_result(path: Path, checkpoint: str) -> dict[str, Any]:
    """Reads the `result.json` of a model.

    Args:
        path: the file, or its folder.
        checkpoint: identity of the model, see `checkpoint_fingerprint`.

    Raises:
        ValueError: not such a file, or the result of another model.
    """
    record = _read_json(path / RESULT_FILE if path.is_dir() else path)
    if record.get("checkpoint") != checkpoint:
        raise ValueError(f"{path} is no result of this model (checkpoint {checkpoint[:12]}…): evaluate it again")
    return record


@dataclass(frozen=True, eq=False)
class StoredResult:
    """A result as it lies on disk.

    Args:
        folder: where it lies.
        record: what `result.json` says.
        table: scores of every item.
        averages: the numbers that were reported.
    """

    folder: Path
    record: dict[str, Any]
    table: pa.Table
    averages: tuple[Average, ...]


def load_result(folder: Path) -> StoredResult:
    """Reads a folder that `smoltolk evaluate` wrote.

    Raises:
        ValueError: a file is missing or cannot be read, or both do not belong together.
    """
    record = _read_json(folder / RESULT_FILE)
    needed = ("task", "protocol", "knobs", "precision", "averages", "accuracy", "items_fingerprint", "checkpoint")
    if missing := [key for key in needed if key not in record]:
        raise ValueError(f"{folder / RESULT_FILE} lacks {missing[0]}: evaluate the model again")
    path = folder / ITEMS_FILE
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read: evaluate the model again") from error
    if missing := sorted(RESERVED_COLUMNS - set(table.column_names)):
        raise ValueError(f"{path} lacks the column {missing[0]}: evaluate the model again")
    if len(table) != record.get("num_items"):
        raise ValueError(
            f"{path} holds {len(table)} items, but result.json says {record.get('num_items')}: they do not belong "
            "together, evaluate the model again"
        )
    averages = tuple(Average(**{**average, "over": tuple(average["over"])}) for average in record["averages"])
    return StoredResult(folder, record, table, averages)


def bootstrap(
    values: np.ndarray, groups: Iterable[str], seed: int = 0, weights: np.ndarray | None = None
) -> tuple[float, float]:
    """95 % interval of the mean, resampling whole groups.

    Args:
        values: (num_items,).
        groups: group of each item; items of one group stay together.
        seed: seed of the resampling.
        weights: what each item counts, (num_items,); all the same when None.
    """
    _, index = np.unique(list(groups), return_inverse=True)
    weights = np.ones(len(values)) if weights is None else weights
    sums, counts = np.bincount(index, weights * values), np.bincount(index, weights)
    generator = np.random.default_rng(seed)
    means = []
    at_a_time = max(1, 2**20 // len(sums))  # draws; large sets need no large tables
    for start in range(0, NUM_BOOTSTRAP, at_a_time):
        draws = generator.integers(len(sums), size=(min(at_a_time, NUM_BOOTSTRAP - start), len(sums)))
        means.append(sums[draws].sum(1) / counts[draws].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def cells(accuracy: Accuracy | Mapping[str, Any]) -> Sequence[str]:
    """Number of items, accuracy and error bars as the command line prints them."""
    a = accuracy if isinstance(accuracy, Mapping) else asdict(accuracy)
    interval = f"{100 * a['low']:.1f} … {100 * a['high']:.1f}"
    return str(a["n"]), f"{100 * a['accuracy']:.1f}", f"{100 * a['standard_error']:.1f}", interval, str(a["num_ties"])
