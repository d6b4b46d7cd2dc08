"""The miniature, end to end: data, training, evaluation, analysis, report.

Every step keeps what it made under the demo's folder, so a second run is quick and a killed run goes on.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
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
from smoltolk.demo.data import FRESH_SEED, DataSettings, Miniature, Steps, make_data
from smoltolk.demo.data import QUICK as QUICK_DATA
from smoltolk.demo.data import SMALL as SMALL_DATA
from smoltolk.demo.speech import speak
from smoltolk.evaluation.tasks import PAIRS, evaluate_cloze, load_cloze
from smoltolk.experiments.lanes import Lane, run_lanes
from smoltolk.generation.pipeline import SmolTolkPipeline
from smoltolk.model.fingerprint import checkpoint_fingerprint
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.speech.audio import save_wav, write_atomically
from smoltolk.speech.neural import check_device
from smoltolk.terminal import print_table
from smoltolk.training.config import load_recipe, make_recipe
from smoltolk.training.trainer import Trainer

EARLY_FUSION: dict[str, Any] = {
    "num_input_adapter_layers": 0,
    "num_output_adapter_layers": 0,
    "layer_mixing": "last",
    "speech_residual": False,
}
SMOLTOLK: dict[str, Any] = {"selector_entropy_weight": 0.01}
MODELS = {"smoltolk": SMOLTOLK, "smoltolk-distilled": SMOLTOLK, "early-fusion": EARLY_FUSION}
# Each model's own rate for stage 2, taken over from a prototype with another world and a constant rate: not swept here.
STAGE_2_RATES = {"smoltolk": 1.5e-3, "smoltolk-distilled": 1.5e-3, "early-fusion": 3e-3}
DISTILLATION = {"smoltolk-distilled": {"hidden_states": 3.0}}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the miniature.

    Args:
        data: the data of a seed.
        stage_steps: steps of stage 1 and of stage 2.
        rows_per_step: rows in a step of the speech training.
        row_tokens: length of a row.
        validation_rows: rows of the validation set of each task.
        num_continued: prompts that are continued in all four directions.
        rate_share: factor of all learning rates, for wider backbones.
    """

    data: DataSettings = field(default_factory=DataSettings)
    stage_steps: tuple[int, int] = (300, 1900)
    rows_per_step: int = 8
    row_tokens: int = 128
    validation_rows: int = 64
    num_continued: int = 4
    rate_share: float = 1.0

    @property
    def device(self) -> str:
        """Where the models are trained: where their text LM was."""
        return self.data.backbone.device

    def resized(self, hidden_size: int, num_layers: int, device: str) -> "DemoSettings":
        """The same with a text LM of another size, on a device.

        Raises:
            ValueError: there is no text LM of this size, or no such device.
        """
        check_device(device)
        before = self.data.backbone
        backbone = replace(before.resized(hidden_size, num_layers), device=device)
        return replace(
            self,
            data=replace(self.data, backbone=backbone),
            rate_share=before.hidden_size / hidden_size,
        )


QUICK = DemoSettings(data=QUICK_DATA, stage_steps=(6, 6), rows_per_step=4, validation_rows=4, num_continued=1)
SMALL = DemoSettings(data=SMALL_DATA, stage_steps=(150, 500))  # many runs of it can be compared in an hour or two


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
    settings, console = _start(output, seeds, QUICK if quick else DemoSettings())
    results = [_run_seed(output / f"seed-{seed}", seed, settings, console) for seed in range(seeds)]
    path = report.write_report(output, results, asdict(settings))
    print_table(report.results_table(results))
    return path


def _start(output: Path, seeds: int, settings: DemoSettings) -> tuple[DemoSettings, Console]:
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: give 1 or more")
    output.mkdir(parents=True, exist_ok=True)
    _agree_on_settings(output, settings)
    return settings, Console(markup=False, emoji=False)


def _agree_on_settings(output: Path, settings: DemoSettings) -> None:
    path = output / "settings.json"
    now = json.dumps(asdict(settings), sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != now:
        raise ValueError(f"{output} holds a demo of other settings: give another --output, or remove the folder")
    write_atomically(path, now.encode())


def _run_seed(folder: Path, seed: int, settings: DemoSettings, console: Console) -> dict[str, Any]:
    """All steps of one seed; returns what the report needs."""
    console.print(f"seed {seed} in {folder}", style="bold")
    folder.mkdir(parents=True, exist_ok=True)
    steps, miniature = Steps(folder, console), Miniature(folder, seed, settings.data)

    def train_and_evaluate() -> dict[str, Any]:
        lanes = {}
        for name in MODELS:
            recipe = folder / f"{name}.yaml"
            write_atomically(recipe, _recipe(name, miniature, settings).encode())
            lanes[name] = Lane(_model_lane, (recipe, miniature, name), sum(settings.stage_steps))
        return {"lanes": run_lanes(lanes, folder / "logs")}

    make_data(miniature, steps)
    steps.run("training", "train and evaluate the models", train_and_evaluate)
    steps.run("text-alone", "evaluate the text backbone alone", lambda: _evaluate_backbone(miniature))
    steps.run("analysis", "analyse the layer weights", lambda: _analyse(miniature))
    steps.run("prompts", "continue prompts in all four directions", lambda: _continue_prompts(miniature, settings))
    return report.collect(folder, seed, steps.records, list(MODELS), settings.data.backbone)


def make_ablation_data(
    output: Path,
    *,
    seeds: int = 1,
    quick: bool = False,
    width: int | None = None,
    layers: int | None = None,
    device: str = "cpu",
) -> Path:
    """Makes the data of a small world for each seed, and beside it `ablation.yaml`, for `smoltolk ablate`.

    Args:
        output: folder of the demo.
        seeds: how many seeds.
        quick: a smoke run, too small to learn anything.
        width: that of the text LM, by default the miniature's; all learning rates are in inverse proportion to it.
        layers: those of the text LM, by default the miniature's.
        device: where the text LM and the models are trained.

    Returns:
        Path of `ablation.yaml`.

    Raises:
        ValueError: the folder holds a demo of other settings, or there is no text LM of this size or no such device.
        ImportError: the extra `demo` is not installed.
    """
    settings = QUICK if quick else SMALL
    backbone = settings.data.backbone
    if (width, layers, device) != (None, None, "cpu"):
        width = backbone.hidden_size if width is None else width
        settings = settings.resized(width, backbone.num_layers if layers is None else layers, device)
    settings, console = _start(output, seeds, settings)
    for seed in range(seeds):
        folder = output / f"seed-{seed}"
        console.print(f"seed {seed} in {folder}", style="bold")
        folder.mkdir(parents=True, exist_ok=True)
        make_data(Miniature(folder, seed, settings.data), Steps(folder, console))
    path = output / "ablation.yaml"
    write_atomically(path, _ablation(output, seeds, settings).encode())
    return path


def _ablation(output: Path, seeds: int, settings: DemoSettings) -> str:
    """The recipe of an ablation over the seeds' folders, as YAML."""
    miniature = Miniature(output / "seed-{seed}", 0, settings.data)
    recipe, every_steps = _settings("smoltolk", miniature, settings), settings.stage_steps[0]
    weights = {"stages.*.distillation.hidden_states": [1.0, 3.0, 10.0]}

    def rates(*some: float) -> list[float]:
        return [settings.rate_share * rate for rate in some]

    faster: dict[str, Any] = {"learning_rates": rates(1.5e-3, 3e-3, 6e-3)}  # early fusion takes higher rates
    recipe |= {
        "name": "miniature",
        "validation": {"rows": settings.validation_rows, "every_steps": every_steps},
        "checkpoint": {"every_steps": every_steps, "keep_last": 1},
        "ablation": {
            "seeds": list(range(seeds)),
            "development": str(miniature.development_items),
            "fresh": str(miniature.fresh_items),
            "learning_rates": rates(7.5e-4, 1.5e-3, 3e-3),
            "more": {
                "early-fusion": faster,
                "adapter-layers-0": faster,
                "distilled": {"like": "smoltolk", "learning_rates": rates(1.5e-3, 3e-3), "sweep": weights},
                "early-fusion-distilled": {
                    "like": "early-fusion",
                    "learning_rates": rates(3e-3, 6e-3),
                    "sweep": weights,
                },
            },
            "curve": {"every_steps": max(1, sum(settings.stage_steps) // 6), "reach": [0.65, 0.75, 0.85]},
        },
    }
    del recipe["seed"], recipe["output"]  # every run has its own
    return yaml.safe_dump(recipe, sort_keys=False)


def _recipe(name: str, miniature: Miniature, settings: DemoSettings) -> str:
    """The recipe of one of the models, as YAML."""
    recipe = _settings(name, miniature, settings)
    make_recipe(recipe)
    return yaml.safe_dump(recipe, sort_keys=False)


def _settings(name: str, miniature: Miniature, settings: DemoSettings) -> dict[str, Any]:
    """The recipe of one of the models: one data order, each model its own rate in stage 2."""
    store = [{"store": str(miniature.speech_store)}]
    rows = {
        "rows_per_step": settings.rows_per_step,
        "rows_per_micro_batch": settings.rows_per_step,
        "row_tokens": settings.row_tokens,
    }
    first, second = settings.stage_steps
    distillation = {"distillation": DISTILLATION[name]} if name in DISTILLATION else {}
    return {
        "name": f"miniature {name}",
        "seed": miniature.seed,
        "output": str(miniature.folder / name),
        "model": {"backbone": str(miniature.backbone), **MODELS[name]},
        "data": {
            "interleaved": store,
            "speech": store,
            "text": [{"store": str(miniature.text_store)}],
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
                "learning_rate": settings.rate_share * 3e-3,
                "warmup_steps": min(20, first // 3),
                "decay_steps": first // 3,
                **distillation,
            },
            {
                "train": "everything",
                "steps": second,
                **rows,
                "mixture": {"interleaved": 1, "speech": 1, "text": 1},
                "learning_rate": settings.rate_share * STAGE_2_RATES[name],
                "warmup_steps": min(10, second // 3),
                "decay_steps": second // 2,
                **distillation,
            },
        ],
        "validation": {
            "rows": settings.validation_rows,
            "every_steps": max(1, sum(settings.stage_steps) // 10),
        },
        "checkpoint": {"every_steps": max(1, sum(settings.stage_steps) // 10)},
        "speech_tokenizer": str(miniature.speech_tokenizer),
        "vocoder": str(miniature.vocoder),
        "device": settings.device,
        # At this size plain attention is the fastest on a CPU.
        **({"attn_implementation": "eager", "num_threads": 1} if settings.device == "cpu" else {}),
    }


def _model_lane(recipe: Path, miniature: Miniature, name: str, progress: Callable[[int], None]) -> None:
    """Trains one model, and evaluates it."""
    done = 0

    def on_step(metrics: dict[str, Any]) -> None:
        nonlocal done
        progress(metrics["step"] - done)
        done = metrics["step"]

    model = Trainer(load_recipe(recipe), progress=False, on_step=on_step).run()
    started = time.perf_counter()
    pipeline = SmolTolkPipeline.from_pretrained(model)
    items, output = miniature.fresh_items, miniature.folder / f"{name}-cloze"
    result = evaluate_cloze(pipeline.model, load_cloze(items, pipeline.speech_tokenizer), pipeline.text_ids)
    result.save(output, items=str(items), checkpoint=checkpoint_fingerprint(model))
    write_atomically(output / "seconds.json", json.dumps(time.perf_counter() - started).encode())


def _evaluate_backbone(miniature: Miniature) -> dict[str, Any]:
    """The text backbone alone: any untrained SmolTolk around it gives its text scores."""
    pipeline = SmolTolkPipeline(
        SmolTolkForCausalLM.from_backbone(str(miniature.backbone), num_units=1, **EARLY_FUSION),
        AutoTokenizer.from_pretrained(miniature.backbone),
    )
    items, output = miniature.fresh_items, miniature.folder / "text-alone-cloze"
    result = evaluate_cloze(pipeline.model, load_cloze(items), pipeline.text_ids, pairs=["T→T"])
    result.save(output, items=str(items), checkpoint=checkpoint_fingerprint(miniature.backbone))
    return {}


def _analyse(miniature: Miniature) -> dict[str, Any]:
    """Mean layer weights of SmolTolk over held-out interleaved rows."""
    folder = miniature.folder
    model = SmolTolkForCausalLM.from_pretrained(folder / "smoltolk" / "model")
    source = BatchSource(
        {"interleaved": [(Store(miniature.speech_store), 1.0)]},
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


def _continue_prompts(miniature: Miniature, settings: DemoSettings) -> dict[str, Any]:
    """Fresh story beginnings, spoken and written, continued by SmolTolk in speech and in text."""
    pipeline = SmolTolkPipeline.from_pretrained(miniature.folder / "smoltolk" / "model")
    items = miniature.cloze_items(FRESH_SEED, settings.data.cloze_couples)[: 2 * settings.num_continued : 2]
    sounds = miniature.folder / "sounds"
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
