"""Text tasks before and after training: what a model has kept of the text LM that it was made from."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import smoltolk
from smoltolk.evaluation.comparison import paired_test
from smoltolk.evaluation.results import NUM_BOOTSTRAP, first_difference
from smoltolk.evaluation.scoring import ScoringSettings
from smoltolk.model.fingerprint import checkpoint_fingerprint
from smoltolk.speech.audio import check_output, write_atomically

JSON_FILE, MARKDOWN_FILE = "text-tasks.json", "text-tasks.md"
PARTS_FOLDER = "tasks"
UNKNOWN = "–"
# Arguments of `load_dataset` that say how, not what; `load_dataset_builder` does not take them.
_LOADING = frozenset({
    "keep_in_memory", "num_proc", "save_infos", "split", "streaming", "trust_remote_code", "verification_mode",
})  # fmt: skip
# How a metric comes from the ratio of two sums over documents, and the slope of that, for its standard error.
AGGREGATES: dict[str, tuple[Callable[[Any], Any], Callable[[float], float]]] = {
    "mean": (lambda ratio: ratio, lambda ratio: 1.0),
    "perplexity": (lambda ratio: np.exp(-ratio), lambda ratio: math.exp(-ratio)),
    "bits": (lambda ratio: -ratio / math.log(2), lambda ratio: 1 / math.log(2)),
}


@dataclass(frozen=True)
class TextTaskSettings:
    """What is evaluated, and how.

    Args:
        tasks: names of tasks or groups of the harness.
        include_path: folder of tasks of one's own, in YAML.
        num_fewshot: examples in each prompt, None for what the task says.
        limit: documents of each task, None for all.
        scoring: sizes of batches and precision.

    Raises:
        ValueError: there is no task, one comes twice, or a number is out of range.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    scoring: ScoringSettings = field(default_factory=ScoringSettings)

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks is {list(self.tasks)}: give at least one, and each once")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot is {self.num_fewshot}: give 0 or more")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}: give 1 or more documents")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ValueError(f"include_path is {self.include_path}, which is no folder: give one with tasks in YAML")

    def record(self) -> dict[str, Any]:
        """What decides the numbers but for the model and the task's name."""
        return {
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "autocast": self.scoring.autocast,
            "own_tasks_fingerprint": _fingerprint_of_tasks(self.include_path),
            "lm_eval_version": version("lm_eval"),
            "smoltolk_version": smoltolk.__version__,
        }


@dataclass(frozen=True)
class Change:
    """A metric before and after.

    Args:
        task: name of the task, or of a group of them.
        metric: name of the metric.
        filter: name of the harness's filter of answers, "none" where there is none.
        higher_is_better: None where the task does not say.
        model: the model after training.
        num_documents: number of documents.
        before: the metric of the first model.
        before_error: its standard error, None where it is not known.
        after: the metric of this model.
        after_error: its standard error.
        difference: after minus before.
        low: lower end of the difference's 95 % bootstrap interval over documents.
        high: upper end of it.
        p_value: two-sided, of no difference, see `paired_test`.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    model: str
    num_documents: int
    before: float
    before_error: float | None
    after: float
    after_error: float | None
    difference: float
    low: float | None
    high: float | None
    p_value: float | None


@dataclass(frozen=True, eq=False)
class Documents:
    """A metric as a function of Σ values / Σ weights over documents.

    Args:
        values: (num_documents,).
        weights: (num_documents,).
        aggregate: which function, one of `AGGREGATES`.
    """

    values: np.ndarray
    weights: np.ndarray
    aggregate: str

    @classmethod
    def find(cls, entries: Sequence[Any], reported: float) -> "Documents | None":
        """The reading of the harness's entries that gives the number it reported; None where there is none."""
        try:
            columns = np.array(entries, dtype=float)
        except (TypeError, ValueError):  # such as texts, of metrics of a whole corpus
            return None
        if columns.ndim == 1 and len(columns):
            columns = np.stack([columns, np.ones(len(columns))], 1)
        if columns.ndim != 2 or columns.shape[1] != 2 or not (columns[:, 1] > 0).all():
            return None
        values, weights = columns.T
        ratio = values.sum() / weights.sum()
        for name, (function, _) in AGGREGATES.items():
            if np.isclose(function(ratio), reported, rtol=1e-9, atol=1e-12):
                return cls(values, weights, name)
        return None

    def standard_error(self) -> float | None:
        """Standard error by the delta method, which for a mean is the usual one; None for a single document."""
        n = len(self.values)
        if n < 2:
            return None
        ratio = self.values.sum() / self.weights.sum()
        residuals = self.values - ratio * self.weights
        error = math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(self.weights.sum())
        return error * AGGREGATES[self.aggregate][1](float(ratio))


def evaluate_text_tasks(
    models: Sequence[Path],
    settings: TextTaskSettings,
    output: Path,
    *,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> list[Change]:
    """Runs tasks of the harness on models, and compares all others with the first one.

    Every task of every model is kept when it is done, so that a call that was stopped goes on.

    Args:
        models: folders of SmolTolk models or of plain text LMs, that before training first.
        settings: what is evaluated.
        output: folder of the report and of what is kept.
        device: where the models compute.
        progress: called with what is done next, in words.

    Returns:
        Every metric of every model but the first; the same is in the report, as JSON and as Markdown.

    Raises:
        ImportError: the harness is not installed.
        ValueError: there is nothing to compare, a model or a task is not there, or what is kept is of other settings or
            of data that has changed since.
        OSError: a task's data cannot be read.
    """
    if len(models) < 2 or len(set(models)) < len(models):
        raise ValueError(
            f"models is {', '.join(map(str, models))}: give that before training, at least one after it, and each once"
        )
    check_output(output, is_folder=True)
    from smoltolk.evaluation.harness import SmolTolkLM  # says which extra is missing

    identities = [_identity(folder) for folder in models]
    manager = None
    data = _Data()
    parts: list[list[dict[str, Any]]] = []
    for folder, checkpoint in zip(models, identities, strict=True):
        lm = None
        parts.append([])
        for task in settings.tasks:
            path = output / PARTS_FOLDER / checkpoint[:16] / f"{re.sub(r'[^A-Za-z0-9._-]', '_', task)}.json"
            record = {"task": task, "checkpoint": checkpoint, **settings.record()}
            if path.is_file():
                parts[-1].append(_read(path, record, data))
                continue
            if progress is not None:
                progress(f"{task} with {folder}")
            manager = manager or _task_manager(settings)
            lm = lm or SmolTolkLM(
                folder,
                device=device,
                batch_size=settings.scoring.batch_size,
                max_batch_tokens=settings.scoring.max_batch_tokens,
                autocast=settings.scoring.autocast,
            )
            part = json.dumps({"settings": record, **_run(lm, task, manager, settings, data)}, default=_plain)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, part.encode())
            parts[-1].append(json.loads(part))
    changes = [
        change
        for before, *others in zip(*parts, strict=True)  # of one task
        for folder, after in zip(models[1:], others, strict=True)
        for change in _changes(before, after, str(folder))
    ]
    of_models = list(zip(models, identities, parts, strict=True))
    _write_report(output, settings, of_models, changes)
    return changes


def _write_report(
    output: Path,
    settings: TextTaskSettings,
    of_models: Sequence[tuple[Path, str, Sequence[Mapping[str, Any]]]],
    changes: Sequence[Change],
) -> None:
    """Writes both files; of each model its folder, its fingerprint and its parts."""
    report = {
        **settings.record(),
        "tasks": {
            name: {key: task[key] for key in ("version", "num_fewshot", "documents_fingerprint")}
            for part in of_models[0][2]
            for name, task in part["tasks"].items()
        },
        "models": [
            {
                "model": str(folder),
                "checkpoint": checkpoint,
                "precision": parts[0]["precision"],
                "num_truncated": {part["settings"]["task"]: part["num_truncated"] for part in parts},
            }
            for folder, checkpoint, parts in of_models
        ],
        "changes": [asdict(change) for change in changes],
    }
    write_atomically(output / JSON_FILE, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    write_atomically(output / MARKDOWN_FILE, _markdown(report, changes).encode())


def _identity(folder: Path) -> str:
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no config.json with safetensors, by which models are told apart: give the folder of a "
            "SmolTolk model or of a text LM"
        )
    return checkpoint_fingerprint(folder)


def _fingerprint_of_tasks(folder: Path | None) -> str | None:
    """Hash of the tasks of one's own, without their data."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _task_manager(settings: TextTaskSettings) -> Any:
    """The index of tasks; the harness's own, some 14,000, take up to a minute, and are left out where they can be."""
    from lm_eval.tasks import TaskManager

    if settings.include_path is not None:
        own = TaskManager(include_path=str(settings.include_path), include_defaults=False)
        if set(settings.tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=settings.include_path and str(settings.include_path))
    if missing := sorted(set(settings.tasks) - set(manager.all_tasks)):
        raise ValueError(
            f"the task {missing[0]} is not among the harness's {len(manager.all_tasks):,}: see `smoltolk lm-eval ls "
            "tasks`, or give the folder of its YAML file by --include-path"
        )
    return manager


class _Data:
    """What the data of tasks is, looked at once for each."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}

    def identity(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """SHA-256 of every local file, or the revision on the hub, of what the arguments of `load_dataset` name."""
        key = json.dumps(source, sort_keys=True, default=str)
        if key not in self._found:
            self._found[key] = _identity_of_data(source)
        return self._found[key]


def _identity_of_data(source: Mapping[str, Any]) -> dict[str, Any]:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(**source)
    if builder.repo_id is not None:
        return {"revision": builder.hash}
    found: dict[str, Any] = {}
    for split, files in (builder.config.data_files or {}).items():
        for number, (file, about) in enumerate(zip(files, files.origin_metadata, strict=True)):
            path = Path(file)
            is_local = path.is_file()
            name = f"{split} {number}: {path.name if is_local else file}"  # a folder may be elsewhere the next time
            found[name] = _sha256(path) if is_local else "".join(map(str, about))
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(lm: Any, task: str, manager: Any, settings: TextTaskSettings, data: _Data) -> dict[str, Any]:
    """One task or group: what its report needs, and the entry of every document."""
    from lm_eval import simple_evaluate

    cut = lm.num_truncated
    found = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        bootstrap_iters=0,  # errors are made here, of the documents
        log_samples=True,
    )
    return {
        "precision": settings.scoring.precision(lm.model),
        "num_truncated": lm.num_truncated - cut,
        "data": {
            name: {"source": source, "identity": data.identity(source)}
            for name, config in found["configs"].items()
            if (source := _source(config)) is not None
        },
        "tasks": {
            name: _task(name, results, found)
            for name, results in {**found["results"], **found.get("groups", {})}.items()
        },
    }


def _source(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of `load_dataset` for a task; None where a function of its own makes its data."""
    if config.get("custom_dataset") or config.get("dataset_path") is None:
        return None
    settings = {name: value for name, value in (config.get("dataset_kwargs") or {}).items() if name not in _LOADING}
    return {"path": config["dataset_path"], "name": config.get("dataset_name"), **settings}


def _task(name: str, results: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    samples = [
        sample
        for leaf in _leaves(name, found["group_subtasks"])
        for sample in sorted(found["samples"].get(leaf, []), key=lambda sample: sample["doc_id"])
    ]
    hashes = [[sample[key] for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash")] for sample in samples]
    metrics = {}
    for key, value in results.items():
        metric, comma, chosen_filter = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        metrics[key] = {
            "value": value,
            "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
            "entries": [s[metric] for s in samples if s["filter"] == chosen_filter and metric in s],
        }
    return {
        "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name),
        "documents_fingerprint": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
        "metrics": metrics,
    }


def _leaves(name: str, parts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The tasks of a group, or the task itself."""
    if not parts.get(name):
        yield name
    for part in parts.get(name, ()):
        yield from _leaves(part, parts)


def _plain(value: Any) -> Any:
    """What tasks put into their entries, for JSON: numbers of NumPy as such, all else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _read(path: Path, record: Mapping[str, Any], data: _Data) -> dict[str, Any]:
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: remove it, and its task is evaluated again") from error
    if found := first_difference(part.get("settings", {}), record):
        raise ValueError(
            f"{path} was made with {found[0]} {found[1]!r}, not {found[2]!r}: give another --output, or remove it"
        )
    if "data" not in part:
        raise ValueError(f"{path} does not say of what data it was made: remove it, and its task is evaluated again")
    for task, read in part["data"].items():
        if found := first_difference(read["identity"], data.identity(read["source"])):
            raise ValueError(
                f"{path} was made of other data of {task} ({found[0]} was {found[1]}, is {found[2]}): give another "
                f"--output, or remove {path.parent.parent} to evaluate all models again"
            )
    return part


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], model: str) -> Iterator[Change]:
    for task, theirs in before["tasks"].items():
        ours = after["tasks"][task]
        if ours["documents_fingerprint"] != theirs["documents_fingerprint"]:
            raise ValueError(
                f"the models read different documents of {task}, or different prompts: its data changed in between, "
                "give another --output and evaluate all models again"
            )
        for key, metric in theirs["metrics"].items():
            yield _change(task, key, metric, ours["metrics"][key], model)


def _change(task: str, key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], model: str) -> Change:
    name, _, chosen_filter = key.partition(",")
    before, after = (Documents.find(found["entries"], found["value"]) for found in (theirs, ours))
    low = high = p_value = None
    if before is not None and after is not None and before.aggregate == after.aggregate:
        low, high = _interval(before, after)
        if len(before.values) > 1 and np.array_equal(before.weights, after.weights):
            p_value = paired_test(after.values - before.values)[0]
    return Change(
        task=task,
        metric=name,
        filter=chosen_filter,
        higher_is_better=theirs["higher_is_better"],
        model=model,
        num_documents=len(theirs["entries"]),
        before=theirs["value"],
        before_error=None if before is None else before.standard_error(),
        after=ours["value"],
        after_error=None if after is None else after.standard_error(),
        difference=ours["value"] - theirs["value"],
        low=low,
        high=high,
        p_value=p_value,
    )


def _interval(before: Documents, after: Documents) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of the difference: the same documents are drawn for both."""
    if len(before.values) < 2:
        return None, None
    function = AGGREGATES[before.aggregate][0]

    def difference(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        values, weights, more_values, more_weights = (column.sum(axis=axis) for column in columns)
        return function(more_values / more_weights) - function(values / weights)

    columns = (before.values, before.weights, after.values, after.weights)
    found = stats.bootstrap(
        columns,
        difference,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=NUM_BOOTSTRAP,
        batch=max(1, 2**20 // len(before.values)),
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)


def cells(change: Change) -> tuple[str, ...]:
    """Task, metric, number of documents, both values with their errors, difference, interval, p-value, as printed."""

    def value(number: float, error: float | None) -> str:
        return f"{number:.4g}" if error is None else f"{number:.4g} ± {error:.2g}"

    arrow = {True: " ↑", False: " ↓", None: ""}[change.higher_is_better]
    metric = change.metric if change.filter == "none" else f"{change.metric} ({change.filter})"
    interval = UNKNOWN
    if change.low is not None and change.high is not None:
        interval = f"{change.low:+.4g} … {change.high:+.4g}"
    return (
        change.task,
        metric + arrow,
        str(change.num_documents),
        value(change.before, change.before_error),
        value(change.after, change.after_error),
        f"{change.difference:+.4g}",
        interval,
        UNKNOWN if change.p_value is None else f"{change.p_value:.2g}",
    )


COLUMNS = ("task", "metric", "documents", "before", "after", "difference", "95 % interval", "p")


def _markdown(report: Mapping[str, Any], changes: Sequence[Change]) -> str:
    first, *others = report["models"]
    lines = ["# Text tasks before and after", "", f"Before: {_describe(first)}"]
    for model in others:
        lines += ["", f"## {model['model']}", "", f"After: {_describe(model)}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(cells(change))} |" for change in changes if change.model == model["model"]]
    fewshot = "as the tasks say" if report["num_fewshot"] is None else report["num_fewshot"]
    limit = "all" if report["limit"] is None else f"the first {report['limit']}"
    lines += [
        "",
        f"Examples in a prompt: {fewshot}; documents: {limit}. ± is one standard error; intervals are over documents, "
        "drawn for both models together. ↑ higher is better, ↓ lower is better.",
        "",
        f"smoltolk {report['smoltolk_version']}, lm_eval {report['lm_eval_version']}",
    ]
    return "\n".join(lines) + "\n"


def _describe(model: Mapping[str, Any]) -> str:
    cut = sum(model["num_truncated"].values())
    cuts = f", {cut} contexts lost their beginning" if cut else ""
    return f"`{model['model']}` ({model['precision']}; checkpoint `{model['checkpoint'][:16]}`{cuts})"
