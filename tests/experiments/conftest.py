"""A tiny ablation of two seeds, each with its own backbone, and its runs in this very process."""

import numpy as np
import pytest
import torch
import yaml
from rich.progress import Progress
from tests.conftest import NUM_UNITS, SPEECH_CARD, TEXT_VOCAB, tiny_lm_config, tiny_recipe, tiny_text_tokenizer
from transformers import LlamaForCausalLM

from smoltolk.evaluation.tasks import ClozeItem, save_cloze
from smoltolk.experiments import schedule
from smoltolk.experiments.ablation import load_ablation
from smoltolk.experiments.lanes import Ended
from smoltolk.experiments.schedule import run_ablation


def tiny_items(count=6, seed=0):
    rng = np.random.default_rng(seed)

    def text():
        return " ".join(f"w{w}" for w in rng.integers(TEXT_VOCAB - 2, size=rng.integers(2, 6)))

    def units():
        return rng.integers(NUM_UNITS, size=rng.integers(3, 9))

    return [
        ClozeItem(
            f"i{i}", ("topic", "story")[i % 2], f"c{i // 2}", *(text() for _ in range(3)), *(units() for _ in "abc")
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_seeds(tiny_world, tmp_path_factory):
    """A folder with a backbone, a store and cloze items for each of two seeds."""
    folder = tmp_path_factory.mktemp("tiny-seeds")
    for seed in range(2):
        place = folder / f"seed-{seed}"
        torch.manual_seed(seed)
        LlamaForCausalLM(tiny_lm_config()).save_pretrained(place / "backbone")
        tiny_text_tokenizer().save_pretrained(place / "backbone")
        (place / "store").symlink_to(tiny_world / "store")
        for number, name in enumerate(("development", "fresh")):
            save_cloze(place / f"{name}.parquet", tiny_items(seed=10 * seed + number), SPEECH_CARD["fingerprint"])
    return folder


def tiny_ablation(tiny_seeds, **changes):
    """Settings of an ablation of two variants with two rates each."""
    recipe = tiny_recipe(tiny_seeds / "seed-{seed}", "unused")
    recipe["model"] |= {"num_output_adapter_layers": 1, "selector_entropy_weight": 0.01}
    ablation = {
        "seeds": [0, 1],
        "development": str(tiny_seeds / "seed-{seed}" / "development.parquet"),
        "fresh": str(tiny_seeds / "seed-{seed}" / "fresh.parquet"),
        "learning_rates": [1e-3, 3e-3, 1e-2],
        "variants": ["smoltolk", "early-fusion"],
        "more": {"smoltolk": {"learning_rates": [1e-3, 1e-2]}, "early-fusion": {"learning_rates": [3e-3, 3e-2]}},
    }
    return recipe | {"ablation": ablation | changes}


def write(settings, folder):
    folder.mkdir(exist_ok=True)
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


class HereAndNow:
    """Lanes that do their work in this process, when they are started."""

    def __init__(self, bar: Progress):
        self.bar = bar
        self.ended = []

    def start(self, name, lane, log, environment=None):
        lane.function(*lane.arguments, progress=lambda done: None)
        self.ended.append(Ended(name, 0.0, False, log, self.bar.add_task(name)))

    def wait(self):
        return self.ended.pop(0)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def here_and_now(monkeypatch):
    monkeypatch.setattr(schedule, "Lanes", HereAndNow)


@pytest.fixture(scope="session")
def finished(tiny_seeds, tmp_path_factory):
    """A whole ablation with both budgets: the ablation and its folder."""
    folder = tmp_path_factory.mktemp("ablation")
    ablation = load_ablation(write(tiny_ablation(tiny_seeds), folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "Lanes", HereAndNow)
        run_ablation(ablation, folder / "runs")
    return ablation, folder / "runs"
