"""The miniature, end to end: world, speech, units, backbone, training, evaluation, analysis, report.

Every step keeps what it made under the demo's folder, so a second run is quick and a killed run goes on.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from transformers import AutoTokenizer

from smoltolk.analysis.layer_weights import layer_weights
from smoltolk.data.dataset import BatchSource, TaskMixture
from smoltolk.data.store import Store
from smoltolk.demo import report
from smoltolk.demo.backbone import BackboneSettings, pretrain_backbone
from smoltolk.demo.lanes import Lane, progress_bar, run_lanes
from smoltolk.demo.speech import (
    fit_tokenizer,
    fit_vocoder,
    speak,
    speak_units,
    spoken_cloze,
    write_speech_store,
    write_text_store,
)
from smoltolk.demo.world import CLOZE_KINDS, World, build_text_tokenizer
from smoltolk.evaluation.results import checkpoint_fingerprint
from smoltolk.evaluation.tasks import PAIRS, evaluate_cloze, load_cloze, save_cloze
from smoltolk.generation.pipeline import SmolTolkPipeline
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.speech.audio import save_wav, write_atomically
from smoltolk.speech.mel import MelTokenizer
from smoltolk.training.config import load_recipe, make_recipe
from smoltolk.training.trainer import Trainer

EARLY_FUSION: dict[str, Any] = {
    "num_input_adapter_layers": 0,
    "num_output_adapter_layers": 0,
    "layer_mixing": "last",
    "speech_residual": False,
}
MODELS: dict[str, dict[str, Any]] = {"smoltolk": {"selector_entropy_weight": 0.01}, "early-fusion": EARLY_FUSION}
# Each model's own rate for stage 2, taken over from a prototype with another world and a constant rate: not swept here.
STAGE_2_RATES = {"smoltolk": 1.5e-3, "early-fusion": 3e-3}
FRESH_SEED = 7  # of the cloze items that the report is about; 1 to 6 were seen while choosing settings
WORKERS = 2


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the miniature.

    Args:
        num_spoken: stories that are spoken.
        num_written: stories that only the text backbone and the text rows see.
        num_units: speech units.
        tokenizer_texts: stories that the tokenizer is fitted on.
        vocoder_texts: stories that the vocoder is fitted on.
        vocoder_steps: its training steps.
        backbone: size and training of the text backbone.
        stage_steps: steps of stage 1 and of stage 2.
        rows_per_step: rows in a step of the speech training.
        row_tokens: length of a row.
        validation_rows: rows of the validation set of each task.
        cloze_couples: couples of cloze items of each kind.
        num_continued: prompts that are continued in all four directions.
    """

    num_spoken: int = 6000
    num_written: int = 60000
    num_units: int = 64
    tokenizer_texts: int = 200
    vocoder_texts: int = 80
    vocoder_steps: int = 600
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    stage_steps: tuple[int, int] = (300, 2300)
    rows_per_step: int = 8
    row_tokens: int = 128
    validation_rows: int = 64
    cloze_couples: int = 150
    num_continued: int = 4


QUICK = DemoSettings(
    num_spoken=48,
    num_written=200,
    num_units=16,
    tokenizer_texts=8,
    vocoder_texts=4,
    vocoder_steps=10,
    backbone=BackboneSettings(hidden_size=32, num_layers=2, num_heads=2, steps=20, rows_per_step=8),
    stage_steps=(6, 6),
    rows_per_step=4,
    row_tokens=128,
    validation_rows=4,
    cloze_couples=4,
    num_continued=1,
)


class Steps:
    """Runs named steps once: a step's record is kept when it is done, and found by the next run.

    Args:
        folder: folder of one seed of the demo.
        console: where to say what happens.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder = folder
        self.console = console
        self.records: dict[str, dict[str, Any]] = {}

    def run(self, name: str, title: str, function: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Runs `function` unless it was done before; returns what it returned, with its seconds."""
        path = self.folder / "steps" / f"{name}.json"
        if path.exists():
            self.records[name] = json.loads(path.read_text(encoding="utf-8"))
            self.console.print(f"[dim]{title}: done before[/dim]")
            return self.records[name]
        self.console.print(f"[bold]{title}[/bold]")
        started = time.perf_counter()
        record = function() or {}
        record = {"title": title, "seconds": time.perf_counter() - started, **record}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record).encode())
        self.records[name] = record
        return record


def run_demo(output: Path, *, seeds: int = 1, quick: bool = False) -> Path:
    """Runs the miniature and returns the path of its report.

    Args:
        output: folder of the demo.
        seeds: how many times to repeat all of it, each with its own stories, codebook, backbone and models.
        quick: a smoke run, too small to learn anything.

    Raises:
        ValueError: the folder holds a demo of other settings.
        ImportError: the extra `demo` is not installed.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: give 1 or more")
    settings = QUICK if quick else DemoSettings()
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    _agree_on_settings(output, settings)
    results = [_run_seed(output / f"seed-{seed}", seed, settings, console) for seed in range(seeds)]
    path = report.write_report(output, results, asdict(settings))
    console.print(report.results_table(results))
    return path


def _agree_on_settings(output: Path, settings: DemoSettings) -> None:
    path = output / "settings.json"
    now = json.dumps(asdict(settings), sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != now:
        raise ValueError(f"{output} holds a demo of other settings: give another --output, or remove the folder")
    write_atomically(path, now.encode())


def _run_seed(folder: Path, seed: int, settings: DemoSettings, console: Console) -> dict[str, Any]:
    """All steps of one seed; returns what the report needs."""
    console.print(f"[bold]seed {seed}[/bold] in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(folder, console)
    world = World(seed)
    spoken = [story.text for story in world.stories(1, settings.num_spoken)]
    written = [story.text for story in world.stories(2, settings.num_written)]
    text_tokenizer = build_text_tokenizer(world.vocabulary())
    paths = {name: folder / name for name in ("speech-tokenizer", "speech-store", "text-store", "backbone")}

    def make_tokenizer() -> dict[str, Any]:
        tokenizer = fit_tokenizer(
            spoken[: settings.tokenizer_texts], settings.num_units, seed, paths["speech-tokenizer"]
        )
        return {"fingerprint": tokenizer.fingerprint}

    def make_stores() -> dict[str, Any]:
        for name in ("speech-store", "text-store"):
            shutil.rmtree(paths[name], ignore_errors=True)
        tokenizer = MelTokenizer.load(paths["speech-tokenizer"])
        with progress_bar() as bar:
            task = bar.add_task("stories spoken", total=len(spoken))
            made = speak_units(spoken, paths["speech-tokenizer"], WORKERS, lambda done: bar.advance(task, done))
        num_validation = max(1, len(spoken) // 20)
        write_speech_store(paths["speech-store"], spoken, made, text_tokenizer, tokenizer, num_validation)
        write_text_store(paths["text-store"], written, text_tokenizer, max(1, len(written) // 100))
        seconds, units = sum(s.seconds for s in made), sum(len(s.units.units) for s in made)
        words = sum(len(text.split()) for text in spoken)
        return {"hours": seconds / 3600, "units_per_s": units / seconds, "units_per_word": units / words}

    def make_cloze() -> dict[str, Any]:
        avoid = {*spoken, *written}
        items = [
            item for kind in CLOZE_KINDS for item in world.cloze_items(FRESH_SEED, kind, settings.cloze_couples, avoid)
        ]
        tokenizer = MelTokenizer.load(paths["speech-tokenizer"])
        save_cloze(
            folder / "cloze.parquet",
            spoken_cloze(items, paths["speech-tokenizer"], WORKERS),
            tokenizer.fingerprint,
        )
        return {"items": len(items)}

    def make_backbone_and_vocoder() -> dict[str, Any]:
        lanes = {
            "text backbone": Lane(
                _backbone_lane,
                (paths, folder / "backbone-losses.json", settings, seed),
                settings.backbone.steps,
            ),
            "vocoder": Lane(
                _vocoder_lane,
                (
                    paths["speech-tokenizer"],
                    folder / "vocoder",
                    spoken[: settings.vocoder_texts],
                    settings,
                    seed,
                ),
                settings.vocoder_steps,
            ),
        }
        text_tokenizer.save_pretrained(folder / "text-tokenizer")
        return {"lanes": run_lanes(lanes, folder / "logs")}

    def train_and_evaluate() -> dict[str, Any]:
        lanes = {}
        for name in MODELS:
            recipe = folder / f"{name}.yaml"
            write_atomically(recipe, _recipe(name, folder, paths, settings, seed).encode())
            lanes[name] = Lane(_model_lane, (recipe, folder, name), sum(settings.stage_steps))
        return {"lanes": run_lanes(lanes, folder / "logs")}

    steps.run("tokenizer", "fit the speech tokenizer", make_tokenizer)
    steps.run("speech", "speak the stories and make units", make_stores)
    steps.run("cloze", "speak the cloze items", make_cloze)
    steps.run("backbone", "pretrain the text backbone, fit the vocoder", make_backbone_and_vocoder)
    steps.run("training", "train and evaluate SmolTolk and early fusion", train_and_evaluate)
    steps.run("text-alone", "evaluate the text backbone alone", lambda: _evaluate_backbone(folder, paths))
    steps.run("analysis", "analyse the layer weights", lambda: _analyse(folder, paths))
    steps.run(
        "prompts",
        "continue prompts in all four directions",
        lambda: _continue_prompts(folder, world, settings, {*spoken, *written}),
    )
    return report.collect(folder, seed, steps.records, list(MODELS), settings.backbone)


def _recipe(name: str, folder: Path, paths: dict[str, Path], settings: DemoSettings, seed: int) -> str:
    """The recipe of one of the models, as YAML: one data order, each model its own rate in stage 2."""
    store = [{"store": str(paths["speech-store"])}]
    rows = {
        "rows_per_step": settings.rows_per_step,
        "rows_per_micro_batch": settings.rows_per_step,
        "row_tokens": settings.row_tokens,
    }
    first, second = settings.stage_steps
    recipe = {
        "name": f"miniature {name}",
        "seed": seed,
        "output": str(folder / name),
        "model": {"backbone": str(paths["backbone"]), **MODELS[name]},
        "data": {
            "interleaved": store,
            "speech": store,
            "text": [{"store": str(paths["text-store"])}],
            # The paper's spans would give a story one switch.
            "text_words": [4, 16],
            "speech_words": [3, 16],
        },
        "stages": [
            {
                "train": "speech",
                "steps": first,
                **rows,
                "mixture": {"interleaved": 1},
                "learning_rate": 3e-3,
                "warmup_steps": min(20, first // 3),
                "decay_steps": first // 3,
            },
            {
                "train": "everything",
                "steps": second,
                **rows,
                "mixture": {"interleaved": 1, "speech": 1, "text": 1},
                "learning_rate": STAGE_2_RATES[name],
                "warmup_steps": min(10, second // 3),
                "decay_steps": second // 2,
            },
        ],
        "validation": {
            "rows": settings.validation_rows,
            "every_steps": max(1, sum(settings.stage_steps) // 10),
        },
        "checkpoint": {"every_steps": max(1, sum(settings.stage_steps) // 10)},
        "speech_tokenizer": str(paths["speech-tokenizer"]),
        "vocoder": str(folder / "vocoder"),
        "attn_implementation": "eager",
        "num_threads": 1,
        "device": "cpu",
    }
    make_recipe(recipe)
    return yaml.safe_dump(recipe, sort_keys=False)


def _backbone_lane(
    paths: dict[str, Path], losses: Path, settings: DemoSettings, seed: int, progress: Callable[[int], None]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(losses.parent / "text-tokenizer")
    history = pretrain_backbone(paths["text-store"], tokenizer, paths["backbone"], settings.backbone, seed, progress)
    write_atomically(losses, json.dumps(history).encode())


def _vocoder_lane(
    tokenizer: Path,
    output: Path,
    texts: list[str],
    settings: DemoSettings,
    seed: int,
    progress: Callable[[int], None],
) -> None:
    fit_vocoder(texts, MelTokenizer.load(tokenizer), settings.vocoder_steps, seed, output, progress)


def _model_lane(recipe: Path, folder: Path, name: str, progress: Callable[[int], None]) -> None:
    """Trains one model, and evaluates it."""
    done = 0

    def on_step(metrics: dict[str, Any]) -> None:
        nonlocal done
        progress(metrics["step"] - done)
        done = metrics["step"]

    model = Trainer(load_recipe(recipe), progress=False, on_step=on_step).run()
    started = time.perf_counter()
    pipeline = SmolTolkPipeline.from_pretrained(model)
    items = folder / "cloze.parquet"
    result = evaluate_cloze(pipeline.model, load_cloze(items, pipeline.speech_tokenizer), pipeline.text_ids)
    result.save(folder / f"{name}-cloze", items=str(items), checkpoint=checkpoint_fingerprint(model))
    write_atomically(folder / f"{name}-cloze" / "seconds.json", json.dumps(time.perf_counter() - started).encode())


def _evaluate_backbone(folder: Path, paths: dict[str, Path]) -> dict[str, Any]:
    """The text backbone alone: any untrained SmolTolk around it gives its text scores."""
    pipeline = SmolTolkPipeline(
        SmolTolkForCausalLM.from_backbone(str(paths["backbone"]), num_units=1, **EARLY_FUSION),
        AutoTokenizer.from_pretrained(paths["backbone"]),
    )
    items = folder / "cloze.parquet"
    result = evaluate_cloze(pipeline.model, load_cloze(items), pipeline.text_ids, pairs=["T→T"])
    result.save(folder / "text-alone-cloze", items=str(items), checkpoint=checkpoint_fingerprint(paths["backbone"]))
    return {}


def _analyse(folder: Path, paths: dict[str, Path]) -> dict[str, Any]:
    """Mean layer weights of SmolTolk over held-out interleaved rows."""
    model = SmolTolkForCausalLM.from_pretrained(folder / "smoltolk" / "model")
    source = BatchSource(
        {"interleaved": [(Store(paths["speech-store"]), 1.0)]},
        mixture=TaskMixture(interleaved=1, speech=0, text=0),
        ids=model.ids,
        row_tokens=128,
        policy=load_recipe(folder / "smoltolk.yaml").data.policy.make(),
        split="validation",
    )
    weights = layer_weights(model, [source.batch(0, step, rows=16).input_ids for step in range(8)])
    return {
        "speech": weights.speech.tolist(),
        "by_unit": np.nan_to_num(weights.by_unit, nan=-1).tolist(),  # −1: the unit did not occur
        "after_switch": np.nan_to_num(weights.after_switch, nan=-1).tolist(),
        "num_positions": weights.num_positions,
    }


def _continue_prompts(folder: Path, world: World, settings: DemoSettings, avoid: set[str]) -> dict[str, Any]:
    """Fresh story beginnings, spoken and written, continued by SmolTolk in speech and in text."""
    pipeline = SmolTolkPipeline.from_pretrained(folder / "smoltolk" / "model")
    items = world.cloze_items(FRESH_SEED, "story", settings.cloze_couples, avoid)[: 2 * settings.num_continued : 2]
    sounds = folder / "sounds"
    sounds.mkdir(exist_ok=True)
    tokenizer, vocoder = pipeline.speech_tokenizer, pipeline.vocoder
    assert tokenizer is not None
    assert vocoder is not None
    rate = tokenizer.sample_rate_hz
    prompts = []
    for i, item in enumerate(items):
        (prompt, _), (ending, _) = speak([item.context, item.true_ending], rate)
        files = {"prompt": f"{i}-prompt.wav", "true": f"{i}-true.wav"}
        save_wav(sounds / files["prompt"], prompt, rate)
        save_wav(sounds / files["true"], ending, rate)
        units = tokenizer.encode(ending)
        files["resynthesised"] = f"{i}-resynthesised.wav"
        save_wav(sounds / files["resynthesised"], vocoder.decode(units.units), rate)
        texts = {}
        for pair in PAIRS:
            source, target = pair.split("→")
            part = sounds / files["prompt"] if source == "S" else item.context
            to = "speech" if target == "S" else "text"
            said = pipeline(part, to=to, max_new_tokens=64 if target == "S" else 16, min_new_tokens=4, temperature=0)
            if said.text is not None:
                texts[pair] = said.text
            elif said.audio is not None:
                files[pair] = f"{i}-{source}-{target}.wav"
                said.save(sounds / files[pair])
        prompts.append({"context": item.context, "true": item.true_ending, "texts": texts, "sounds": files})
    return {"prompts": prompts}
