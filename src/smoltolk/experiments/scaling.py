"""Loss and accuracy of several runs against compute, by kind of model."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from smoltolk.evaluation.generation import PROTOCOL as GENERATION
from smoltolk.evaluation.results import RESULT_FILE, first_difference, load_result
from smoltolk.experiments.scaling_laws import Fit, Interval, Law, Line, check_enough, fit_law, fit_line, quantiles
from smoltolk.model.card import describe
from smoltolk.model.configuration_smoltolk import SmolTolkConfig
from smoltolk.model.fingerprint import checkpoint_fingerprint, num_parameters
from smoltolk.training.config import Recipe, load_recipe
from smoltolk.training.report import read_run
from smoltolk.training.trainer import MODEL_FOLDER

QUANTITIES = ("floor", "alpha", "beta", "loss_exponent", "size_exponent", "tokens_exponent")  # of a law

Number = tuple[str, str, str]  # folder of the result in the run's, group, name


@dataclass(frozen=True, eq=False)
class ScalingRun:
    """What a run came to.

    Args:
        folder: its folder.
        size: number of parameters of its model.
        tokens: tokens it was trained on.
        flops: FLOPs of its training.
        losses: its last validation losses, by name.
        accuracies: shares of right answers of the results in its folder.
        alike: what runs that are put side by side have in common: recipes' validation, vocabulary, tasks, protocols.
        odd: what may differ between them and may matter, as between seeds: tokenizer, validation's stores, items.
    """

    folder: Path
    size: int
    tokens: int
    flops: int
    losses: dict[str, float]
    accuracies: dict[Number, float]
    alike: dict[str, Any]
    odd: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one kind of model, and what they say together.

    Args:
        name: what to call them.
        runs: the runs.
    """

    name: str
    runs: list[ScalingRun]

    @property
    def flops(self) -> np.ndarray:
        """FLOPs of each run, (num_runs,)."""
        return np.array([run.flops for run in self.runs], dtype=float)

    def law(self, loss: str, *, seed: int = 0) -> Fit:
        """The law of one of the losses.

        Args:
            loss: its name.
            seed: seed of the draws; laws that are compared need draws of their own.

        Raises:
            ValueError: there are too few runs for it.
        """
        sizes, tokens, losses = (
            np.array(values, dtype=float)
            for values in zip(*((run.size, run.tokens, run.losses[loss]) for run in self.runs), strict=True)
        )
        try:
            return fit_law(sizes, tokens, self.flops, losses, seed=seed)
        except ValueError as error:
            raise ValueError(f"{self.name}, loss {loss}: {error}") from error

    def line(self, number: Number) -> Line:
        """The line of one of the accuracies.

        Raises:
            ValueError: there are too few runs for it.
        """
        try:
            return fit_line(self.flops, np.array([run.accuracies[number] for run in self.runs]))
        except ValueError as error:
            raise ValueError(f"{self.name}, accuracy {' · '.join(number)}: {error}") from error


@dataclass(frozen=True)
class Contest:
    """Two kinds of model at the same compute.

    Args:
        flops: the compute: the most that both were trained with.
        ours: loss of the first kind there.
        theirs: loss of the other.
        ratio: what the other needs, times that compute, for the first one's loss.
        our_tokens: tokens that the first kind's best size has there, by its law.
        their_tokens: those of the other.
    """

    flops: float
    ours: Interval
    theirs: Interval
    ratio: Interval
    our_tokens: float
    their_tokens: float


@dataclass(frozen=True, eq=False)
class Scaling:
    """Kinds of models side by side.

    Args:
        groups: the kinds; the first is what the others are held against.
        notes: what differs between the runs and may matter, in words.
    """

    groups: list[Group]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def losses(self) -> list[str]:
        """Names of the losses that all runs have."""
        return _shared([run.losses for group in self.groups for run in group.runs])

    @cached_property
    def numbers(self) -> list[Number]:
        """Accuracies that all runs have."""
        return _shared([run.accuracies for group in self.groups for run in group.runs])

    @cached_property
    def shortage(self) -> str | None:
        """Why there are no laws: the kind of model that has too few runs for one."""
        for group in self.groups:
            sizes, tokens = (np.array([getattr(run, name) for run in group.runs]) for name in ("size", "tokens"))
            try:
                check_enough(sizes, tokens)
            except ValueError as error:
                return f"{group.name} has {error}"
        return None

    @cached_property
    def laws(self) -> dict[str, dict[str, Fit]]:
        """The law of each loss and each kind; none where a kind has too few runs."""
        if self.shortage:
            return {}
        return {
            loss: {group.name: group.law(loss, seed=seed) for seed, group in enumerate(self.groups)}
            for loss in self.losses
        }

    @cached_property
    def lines(self) -> dict[Number, dict[str, Line]]:
        """The line of each accuracy and each kind."""
        return {number: {group.name: group.line(number) for group in self.groups} for number in self.numbers}

    @cached_property
    def rivals(self) -> list[Group]:
        """The kinds but for the first whose measured compute overlaps with the first one's."""
        first = self.groups[0].flops
        return [
            group
            for group in self.groups[1:]
            if max(first.min(), group.flops.min()) <= min(first.max(), group.flops.max())
        ]

    def contest(self, loss: str, name: str) -> Contest:
        """How one of the rivals does against the first kind at the most compute that both were trained with."""
        first, other = self.laws[loss][self.groups[0].name], self.laws[loss][name]
        flops = min(max(group.flops) for group in self.groups if group.name in (self.groups[0].name, name))

        def ratio(ours: Law, theirs: Law) -> float:
            return theirs.compute_for(float(ours.at(np.array(flops)))) / flops

        def loss_there(law: Law) -> float:
            return float(law.at(np.array(flops)))

        drawn = [ratio(ours, theirs) for ours, theirs in zip(first.draws, other.draws, strict=True)]
        return Contest(
            flops,
            first.interval(loss_there),
            other.interval(loss_there),
            Interval(ratio(first.law, other.law), *quantiles(drawn)),
            float(first.law.best_tokens(np.array(flops))),
            float(other.law.best_tokens(np.array(flops))),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything that was found; infinite numbers become "inf"."""
        found: dict[str, Any] = {
            "groups": {group.name: [_run_to_json(run) for run in group.runs] for group in self.groups},
            "notes": self.notes,
            "losses": {
                loss: {name: _fit_to_json(fit) for name, fit in fits.items()} for loss, fits in self.laws.items()
            },
            "contests": {
                loss: {group.name: asdict(self.contest(loss, group.name)) for group in self.rivals}
                for loss in self.laws
            },
            "accuracies": [
                {
                    "result": number[0],
                    "group": number[1],
                    "name": number[2],
                    "lines": {
                        name: asdict(line) | {"slope": asdict(line.slope_interval)} for name, line in lines.items()
                    },
                }
                for number, lines in self.lines.items()
            ],
        }
        return {key: _finite(value) for key, value in found.items()}


def compare_scaling(runs: Sequence[str]) -> Scaling:
    """Reads runs and puts them side by side.

    Args:
        runs: folders of finished runs, each with the results in it; NAME=FOLDER says which kind of model one is, else
            its architecture does. A folder may have = in its own name.

    Raises:
        ValueError: a folder holds no finished run, a run is given twice, or runs cannot be put side by side; names the
            run and what differs.
    """
    groups: dict[str, list[ScalingRun]] = {}
    for given in runs:
        name, folder = _parse(given)
        run, kind = read_scaling_run(Path(folder))
        for other in (other for others in groups.values() for other in others):
            if other.folder.resolve() == run.folder.resolve():
                raise ValueError(f"run {folder} is given twice: give each once")
        groups.setdefault(name or kind, []).append(run)
    scaling = Scaling([Group(name, members) for name, members in groups.items()], [])
    scaling.notes.extend(_differences([run for members in groups.values() for run in members]))
    scaling.notes.extend(
        f"{scaling.groups[0].name} and {group.name} share no range of compute: they are not held against each other"
        for group in scaling.groups[1:]
        if group not in scaling.rivals
    )
    if not scaling.losses and not scaling.numbers:
        raise ValueError("no loss and no accuracy is in all runs: set validation in their recipes, or evaluate them")
    if scaling.losses and scaling.shortage:
        if not scaling.numbers:
            raise ValueError(scaling.shortage)
        scaling.notes.append(f"no laws of losses: {scaling.shortage}")
    return scaling


def _parse(given: str) -> tuple[str, str]:
    """The name, empty for none, and the folder."""
    name, equals, folder = given.partition("=")
    return (name, folder) if equals and "/" not in name and not Path(given).is_dir() else ("", given)


def read_scaling_run(folder: Path) -> tuple[ScalingRun, str]:
    """Reads a run, and says what kind of model it trained.

    Raises:
        ValueError: the folder holds no finished run, or a result of another model.
    """
    model = folder / MODEL_FOLDER
    if not (folder / "recipe.yaml").is_file() or not (model / "config.json").is_file():
        raise ValueError(f"{folder} holds no finished run (recipe.yaml and model/): train it to its end first")
    recipe, last = load_recipe(folder / "recipe.yaml"), read_run(folder)[-1]
    config = SmolTolkConfig.from_pretrained(model)
    if last["step"] != recipe.num_steps:
        raise ValueError(f"{folder} has done {last['step']} of {recipe.num_steps} steps: train it to its end first")
    losses = {
        key.removeprefix("validation_").removesuffix("_loss"): float(value)
        for key, value in last.items()
        if key.startswith("validation_") and key.endswith("_loss") and value is not None
    }
    checkpoint = checkpoint_fingerprint(model)
    accuracies: dict[Number, float] = {}
    alike: dict[str, Any] = {
        "text vocabulary": config.ids.text_vocab_size,
        "units": config.num_units,
        "predict_switch": config.predict_switch,
        "validation": {
            "rows": recipe.validation.rows,
            "row_tokens": recipe.stages[-1].row_tokens,
            "policy": recipe.data.policy.model_dump(mode="json"),
        },
    }
    odd: dict[str, Any] = {
        "speech tokenizer": config.speech_tokenizer,
        "stores": {task: [share.store for share in recipe.data.stores(task)] for task in losses},
    }
    for path in sorted(folder.rglob(RESULT_FILE)):
        if _is_of_generation(path):
            continue
        result = load_result(path.parent)
        if result.record["checkpoint"] != checkpoint:
            raise ValueError(f"{path} is a result of another model than {model}: evaluate it again")
        place = path.parent.relative_to(folder).as_posix()
        alike[place] = {key: result.record.get(key) for key in ("task", "split", "knobs", "truncates_prompts")}
        odd |= {f"{place}: {key}": result.record.get(key) for key in ("precision", "items_fingerprint")}
        for group, names in result.record["accuracy"].items():
            accuracies |= {(place, group, name): float(found["accuracy"]) for name, found in names.items()}
    size, tokens, flops = num_parameters(model), int(last["tokens"]), int(last["flops"])
    return ScalingRun(folder, size, tokens, flops, losses, accuracies, alike, odd), kind_of(config, recipe)


def _is_of_generation(path: Path) -> bool:
    """Whether a result has no accuracy to it, that of `smoltolk evaluate-generation`."""
    try:
        return bool(json.loads(path.read_bytes())["protocol"] == GENERATION)
    except (ValueError, TypeError, KeyError):  # not even a result: said where it is read
        return False


def kind_of(config: SmolTolkConfig, recipe: Recipe) -> str:
    """The kind of a model: its architecture but for sizes, and what was peculiar in its training."""
    has_input, has_output = config.num_input_adapter_layers > 0, config.num_output_adapter_layers > 0
    if has_input and has_output and config.layer_mixing == "selected" and config.speech_residual:
        words = ["SmolTolk"]
    elif not has_input and not has_output and config.layer_mixing == "last" and not config.speech_residual:
        words = ["early fusion"]
    else:
        words = [describe(config)]
    if any(stage.distillation for stage in recipe.stages):
        words.append("distilled")
    trained = [stage.train for stage in recipe.stages]
    if trained != ["speech", "everything"]:
        words.append(" then ".join(trained))
    return ", ".join(words)


def _differences(runs: list[ScalingRun]) -> list[str]:
    """What differs between runs, in words.

    Raises:
        ValueError: what differs makes their numbers unlike.
    """
    first, notes = runs[0], []
    for run in runs[1:]:
        shared = {key: run.alike[key] for key in first.alike if key in run.alike}
        if found := first_difference({key: first.alike[key] for key in shared}, shared):
            raise ValueError(
                f"runs {first.folder} and {run.folder} are not alike: {found[0]} is {found[1]!r} in one and "
                f"{found[2]!r} in the other; their numbers cannot be put side by side"
            )
    for key in dict.fromkeys(key for run in runs for key in run.odd):
        having = [run for run in runs if key in run.odd]
        if others := [run for run in having if run.odd[key] != having[0].odd[key]]:
            notes.append(f"{key} differs between runs, such as {having[0].folder} and {others[0].folder}")
    numbers: dict[str, list[dict[Any, float]]] = {
        "loss": [run.losses for run in runs],
        "accuracy": [run.accuracies for run in runs],
    }
    for what, of_runs in numbers.items():
        everywhere = set(_shared(of_runs))
        missing = [key for key in dict.fromkeys(key for found in of_runs for key in found) if key not in everywhere]
        for key in missing:
            lacking = [str(run.folder) for run, found in zip(runs, of_runs, strict=True) if key not in found]
            name = key if isinstance(key, str) else " · ".join(key)
            notes.append(f"left out: {what} {name}, which {len(lacking)} of the runs lack, such as {lacking[0]}")
    return notes


def _shared(found: Sequence[dict[Any, float]]) -> list[Any]:
    """Keys that all have, in the order of the first."""
    return [key for key in found[0] if all(key in other for other in found)]


def _run_to_json(run: ScalingRun) -> dict[str, Any]:
    accuracies = {" · ".join(number): accuracy for number, accuracy in run.accuracies.items()}
    return {
        "folder": str(run.folder),
        "size": run.size,
        "tokens": run.tokens,
        "flops": run.flops,
        "losses": run.losses,
        "accuracies": accuracies,
    }


def _fit_to_json(fit: Fit) -> dict[str, Any]:
    return {
        "law": asdict(fit.law),
        "errors": fit.errors.tolist(),
        "intervals": {name: asdict(fit.interval(attrgetter(name))) for name in QUANTITIES},
    }


def _finite(value: Any) -> Any:
    """JSON has no infinite numbers."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
