"""The course of an ablation: what is chosen, what is left to run, and running it side by side."""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from smoltolk.data.dataset import TASKS
from smoltolk.data.store import Store, lock
from smoltolk.evaluation.tasks import PAIRS, load_cloze
from smoltolk.experiments.ablation import Ablation, CurveSettings, Variant, setting_name
from smoltolk.experiments.lanes import Lane, Lanes
from smoltolk.experiments.runs import Run, run_name, score, train
from smoltolk.speech.audio import write_atomically
from smoltolk.speech.kinds import load_speech_tokenizer
from smoltolk.terminal import progress_bar

DEVELOPMENT, FRESH = "development", "fresh"
SPEECH_PAIRS = tuple(pair for pair in PAIRS if "S" in pair)
SAME_FLOPS = 0.02  # a run whose FLOPs are so near to the base's is one of equal FLOPs
GUARD_FILE = "agreed.json"
HINT = "stopped, and runs have saved; run the same command to go on"


@dataclass(frozen=True)
class Choice:
    """What a variant's sweep came to.

    Args:
        runs: the runs of the sweep.
        scores: the mean accuracy of each on development items, None where it diverged.
        losses: the mean validation loss of each, None where it diverged or has none.
        chosen: the run that is kept, None where all diverged.
    """

    runs: list[Run]
    scores: list[float | None]
    losses: list[float | None]
    chosen: Run | None

    def __str__(self) -> str:
        if self.chosen is None:
            return "diverged at every setting"
        found = ", ".join(
            f"{setting_name(run.setting)} {'diverged' if score is None else f'{100 * score:.2f} %'}"
            for run, score in zip(self.runs, self.scores, strict=True)
        )
        return f"chose {setting_name(self.chosen.setting)} on development items ({found})"

    @property
    def edge(self) -> str | None:
        """Which end of the rates the chosen one lies at, if any."""
        rates = sorted({run.rate for run in self.runs})
        if self.chosen is None or self.chosen.rate not in (rates[0], rates[-1]):
            return None
        if len(rates) == 1:
            return "only rate tried"
        return "lowest rate tried" if self.chosen.rate == rates[0] else "highest rate tried"


@dataclass(frozen=True)
class Budgeted:
    """The runs of a variant under a budget.

    Args:
        runs: one for each seed.
        are_those_of_tokens: whether they are those at equal tokens.
        problem: why there can be none.
    """

    runs: list[Run]
    are_those_of_tokens: bool = False
    problem: str | None = None


class Course:
    """Where an ablation stands, read from its folder.

    Args:
        ablation: the ablation.
        output: its folder.
    """

    def __init__(self, ablation: Ablation, output: Path) -> None:
        self.ablation = ablation
        self.output = output

    def sweep(self, variant: Variant) -> list[Run]:
        """The runs that a variant's settings are chosen among, on the first seed."""
        return [self._run(variant, "tokens", setting, self.ablation.first_seed) for setting in variant.sweep]

    def choice(self, variant: Variant) -> Choice | None:
        """What the sweep came to: the best mean accuracy on development items over the pairs that contain speech.

        Ties go to the lower validation loss. None while the sweep goes on.
        """
        runs = self.sweep(variant)
        if not all(run.is_done(DEVELOPMENT) for run in runs):
            return None
        return choose(runs)

    def budgeted(self, variant: Variant, budget: str) -> Budgeted | None:
        """A variant's runs under a budget; None while it is not known what they are."""
        choice = self.choice(variant)
        if choice is None:
            return None
        if choice.chosen is None:
            return Budgeted([], problem="diverged at every setting")
        setting, seeds = choice.chosen.setting, self.ablation.settings.seeds
        at_equal_tokens = [self._run(variant, "tokens", setting, seed) for seed in seeds]
        if budget == "tokens":
            return Budgeted(at_equal_tokens)
        base = self.choice(self.ablation.base)
        if base is None:
            return None
        if base.chosen is None:
            return Budgeted([], problem="the base variant diverged at every setting")
        target, own = sum(base.chosen.stage_flops()), choice.chosen.stage_flops()
        if abs(sum(own) / target - 1) <= SAME_FLOPS:
            return Budgeted(at_equal_tokens, are_those_of_tokens=True)
        steps = equal_flops_steps(target, own, choice.chosen.recipe.stages[-1].steps)
        if steps < 1:
            return Budgeted([], problem="the first stages alone take more FLOPs than the base variant")
        return Budgeted([self._run(variant, "flops", setting, seed, steps) for seed in seeds])

    def tasks(self) -> Iterator[tuple[str, Run, Lane]]:
        """What can be done now: name, run and work, the most urgent first."""
        settings, variants = self.ablation.settings, self.ablation.variants
        for variant in variants:
            for run in self.sweep(variant):
                if not run.is_done(DEVELOPMENT):
                    items = self.ablation.development(run.seed)
                    work = (run.recipe, DEVELOPMENT, items, *self._curve(run))
                    yield run.name, run, Lane(train, work, run.recipe.num_steps)
        places = [(variant, budget) for budget in settings.budgets for variant in variants]
        known = [budgeted for place in places if (budgeted := self.budgeted(*place)) is not None]
        runs = [run for budgeted in known if not budgeted.are_those_of_tokens for run in budgeted.runs]
        for run in runs:
            if not run.is_done(None):
                yield run.name, run, Lane(train, (run.recipe, None, None, *self._curve(run)), run.recipe.num_steps)
        for run in runs:
            if run.is_trained and run.is_done(None) and run.accuracy(FRESH) is None:
                items = self.ablation.fresh(run.seed)
                num_sequences = 2 * len(PAIRS) * count_items(items)
                yield f"{run.name}/{FRESH}", run, Lane(score, (run.recipe, FRESH, items), num_sequences)

    def count(self) -> tuple[int, int]:
        """Trained runs, and all that there are to be as far as is known."""
        settings = self.ablation.settings
        done = total = 0
        for variant in self.ablation.variants:
            sweep = self.sweep(variant)
            runs = {run.name: run for run in sweep}
            for budget in settings.budgets:
                budgeted = self.budgeted(variant, budget)
                if budgeted is None:
                    total += len(settings.seeds) - (budget == "tokens")
                else:
                    runs |= {run.name: run for run in budgeted.runs}
            total += len(runs)
            done += sum(run.is_done(None) for run in runs.values())
        return done, total

    def _curve(self, run: Run) -> tuple[CurveSettings | None, Path]:
        return self.ablation.settings.curve, self.ablation.fresh(run.seed)

    def _run(self, variant: Variant, budget: str, setting: Any, seed: int, steps: int | None = None) -> Run:
        folder = self.output / run_name(variant.name, budget, setting, seed, steps)
        return Run(variant.name, budget, setting, seed, self.ablation.recipe_of(variant, setting, seed, folder, steps))


def choose(runs: list[Run]) -> Choice:
    """The best of the runs of a sweep on development items."""
    scores, losses = [], []
    for run in runs:
        accuracy = None if run.has_diverged else run.accuracy(DEVELOPMENT)
        scores.append(None if accuracy is None else speech_accuracy(accuracy))
        losses.append(None if accuracy is None else validation_loss(run.training()))
    order = [
        (round(-found, 9), float("inf") if loss is None else loss, i)
        for i, (found, loss) in enumerate(zip(scores, losses, strict=True))
        if found is not None
    ]
    return Choice(runs, scores, losses, runs[min(order)[-1]] if order else None)


def speech_accuracy(accuracy: dict[str, dict[str, dict[str, float]]]) -> float:
    """Mean accuracy over the modality pairs that contain speech, of the mean over kinds."""
    pairs = [kinds for pair, kinds in accuracy.items() if pair in SPEECH_PAIRS]
    means = [sum(kind["accuracy"] for kind in kinds.values()) / len(kinds) for kinds in pairs]
    return sum(means) / len(means)


def validation_loss(training: dict[str, Any]) -> float | None:
    """Mean over tasks of the validation loss at the end of a run."""
    losses = list(training["validation_losses"][-1].values()) if training["validation_losses"] else []
    return sum(losses) / len(losses) if losses and None not in losses else None


def equal_flops_steps(target: int, stage_flops: list[int], last_steps: int) -> int:
    """Steps of the last stage with which a run takes as many FLOPs as another.

    Args:
        target: FLOPs of the other run.
        stage_flops: FLOPs of each stage of the run.
        last_steps: its steps in the last stage.
    """
    *before, last = stage_flops
    return round((target - sum(before)) * last_steps / last)


def count_items(path: Path) -> int:
    """Number of items in a Parquet file; of others, whose audio would have to be read, 0."""
    return len(load_cloze(path)) if path.suffix == ".parquet" else 0


def run_ablation(ablation: Ablation, output: Path, *, jobs: int = 1) -> None:
    """Runs what is left of an ablation, several runs side by side; nothing that is done is done again.

    Args:
        ablation: the ablation.
        output: its folder.
        jobs: how many runs at a time; they are spread over the GPUs, if there are any.

    Raises:
        ValueError: the folder holds another ablation, or a file or store is missing.
        ChildProcessError: runs failed; names them and their logs. What does not depend on them was run.
        KeyboardInterrupt: Ctrl-C; runs have saved.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: give 1 or more")
    with lock(output):
        agree(ablation, output)
        check_data(ablation)
        try:
            with _terminated_like_ctrl_c():
                _run_tasks(Course(ablation, output), jobs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(HINT) from None


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Takes SIGTERM as Ctrl-C, so that runs can save."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say who hears signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_tasks(course: Course, jobs: int) -> None:
    failed: dict[str, Path] = {}
    slots: dict[str, int] = {}
    chosen = {variant.name for variant in course.ablation.variants if course.choice(variant) is not None}
    gpus = visible_gpus()
    with progress_bar(MofNCompleteColumn(), TimeElapsedColumn()) as bar, Lanes(bar) as lanes:
        whole = bar.add_task("runs trained")
        while True:
            done, total = course.count()
            bar.update(whole, completed=done, total=total)
            for name, run, lane in course.tasks():
                if len(slots) == jobs:
                    break
                if name in slots or name in failed:
                    continue
                slots[name] = min(set(range(jobs)) - set(slots.values()))
                environment = {"CUDA_VISIBLE_DEVICES": gpus[slots[name] % len(gpus)]} if gpus else {}
                lanes.start(name, lane, run.folder / "log.txt", environment)
            if not slots:
                break
            ended = lanes.wait()
            del slots[ended.name]
            bar.remove_task(ended.bar_task)
            if ended.has_failed:
                failed[ended.name] = ended.log
            said = f"failed, see {ended.log}" if ended.has_failed else f"{ended.seconds:.0f} s"
            bar.console.print(f"{ended.name}: {said}", soft_wrap=True)
            for variant in course.ablation.variants:
                if variant.name not in chosen and (choice := course.choice(variant)) is not None:
                    chosen.add(variant.name)
                    bar.console.print(f"{variant.name}: {choice}", soft_wrap=True)
    if failed:
        named = "\n".join(f"  {name}: see {log}" for name, log in failed.items())
        raise ChildProcessError(f"{len(failed)} runs failed; run the same command to try them again\n{named}")


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def agree(ablation: Ablation, output: Path, *, is_running: bool = True) -> None:
    """Refuses another ablation than the folder holds; variants, seeds and values to try may be added.

    Args:
        ablation: the ablation.
        output: its folder.
        is_running: whether it is about to be run, and not only looked at.

    Raises:
        ValueError: it is another one, or items are missing or cannot be used; says what differs.
    """
    now, path = _decisive(ablation), output / GUARD_FILE
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in ("base", "first_seed", "validation"):
            if before[name] != now[name]:
                _refuse(output, f"{name} was {before[name]!r} and is {now[name]!r}")
        for name, found in before["items"].items():
            if now["items"].get(name, found) != found:
                _refuse(output, f"the items {name} have changed")
        if missing := sorted(set(before["seeds"]) - set(now["seeds"])):
            _refuse(output, f"seeds no longer hold {', '.join(map(str, missing))}")
        for variant in ablation.variants:
            if variant.name in before["variants"]:
                _agree_on_variant(ablation, variant, before["variants"][variant.name], output)
        now["variants"] = before["variants"] | now["variants"]
    elif not is_running:
        raise ValueError(f"{output} holds no ablation: run one, or give its folder")
    if is_running:
        write_atomically(path, json.dumps(now, indent=2).encode())


def _agree_on_variant(ablation: Ablation, variant: Variant, before: dict[str, Any], output: Path) -> None:
    tried = [setting_name(setting) for setting in variant.sweep]
    old = Variant(variant.name, before["settings"], before["sweep"], variant.explicit)
    for setting in old.sweep:
        if setting_name(setting) not in tried:
            _refuse(output, f"variant {variant.name} no longer tries {setting_name(setting)}")
        for seed in ablation.settings.seeds:
            recipes = [ablation.recipe_of(some, setting, seed, "") for some in (old, variant)]
            if recipes[0].fingerprint != recipes[1].fingerprint:
                _refuse(output, f"variant {variant.name} has another recipe")


def _refuse(output: Path, difference: str) -> None:
    raise ValueError(
        f"{output} holds another ablation: {difference}; variants, seeds, rates and values of a sweep may be "
        "added, all else needs another --output"
    )


def _decisive(ablation: Ablation) -> dict[str, Any]:
    """What may not change while an ablation goes on."""
    seeds = ablation.settings.seeds
    items = {f"development of seed {seeds[0]}": ablation.development(seeds[0])}
    items |= {f"fresh of seed {seed}": ablation.fresh(seed) for seed in seeds}
    for name, path in items.items():
        if not path.is_file():
            raise ValueError(f"items {path} ({name}) is not a file: give a Parquet, JSONL or CSV file of cloze items")
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in items.items()}
    for seed in seeds:
        if hashes[f"fresh of seed {seed}"] == hashes[f"development of seed {seeds[0]}"]:
            raise ValueError(f"items {ablation.fresh(seed)} are those that settings are chosen on: give fresh ones")
    return {
        "base": ablation.settings.base,
        "first_seed": seeds[0],
        "seeds": seeds,
        "validation": ablation.recipe.get("validation"),
        "items": hashes,
        "variants": {v.name: {"settings": v.settings, "sweep": v.sweep} for v in ablation.variants},
    }


def check_data(ablation: Ablation) -> None:
    """Opens stores and items of every seed, before hours are spent on the first.

    Raises:
        ValueError: one cannot be read, or items do not fit the speech tokenizer or have no speech.
    """
    for seed in ablation.settings.seeds:
        recipes = [ablation.recipe_of(variant, {}, seed, "") for variant in ablation.variants]
        for store in sorted({share.store for r in recipes for task in TASKS for share in r.data.stores(task)}):
            Store(store)
        tokenizer = recipes[0].speech_tokenizer and load_speech_tokenizer(recipes[0].speech_tokenizer)
        development = [ablation.development(seed)] if seed == ablation.first_seed else []
        for path in [*development, ablation.fresh(seed)]:
            if path.suffix != ".parquet":  # audio would have to be read
                continue
            items = load_cloze(path, tokenizer or None)
            if not any(all(item.has(pair) for item in items) for pair in SPEECH_PAIRS):
                raise ValueError(f"items {path} have no modality pair with speech: settings are chosen on those")
