"""The miniature's data: for each seed its own stories, speech, codebook, stores, cloze items and text backbone.

Every step keeps what it made, so a second run is quick and a killed run goes on.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from smoltolk.demo.backbone import BackboneSettings, pretrain_backbone
from smoltolk.demo.speech import (
    fit_tokenizer,
    fit_vocoder,
    speak_units,
    spoken_cloze,
    write_speech_store,
    write_text_store,
)
from smoltolk.demo.world import CLOZE_KINDS, ClozeItem, World, build_text_tokenizer
from smoltolk.evaluation.tasks import save_cloze
from smoltolk.experiments.lanes import Lane, lane_bars, run_lanes
from smoltolk.speech.audio import write_atomically
from smoltolk.speech.mel import MelTokenizer

DEVELOPMENT_SEED = 1  # of the cloze items that settings are chosen on
FRESH_SEED = 8  # of those that reports are about; 2 to 7 were seen while choosing settings
WORKERS = 2


@dataclass(frozen=True)
class DataSettings:
    """Sizes of a seed's data.

    Args:
        world_share: share of the world's words and facts that there are.
        num_spoken: stories that are spoken.
        num_written: stories that only the text backbone and the text rows see.
        num_units: speech units.
        tokenizer_texts: stories that the tokenizer is fitted on.
        vocoder_texts: stories that the vocoder is fitted on.
        vocoder_steps: its training steps.
        backbone: size and training of the text backbone.
        cloze_couples: couples of fresh cloze items of each kind.
        development_couples: couples of cloze items of each kind to choose settings on.
    """

    world_share: float = 1.0
    num_spoken: int = 6000
    num_written: int = 60000
    num_units: int = 64
    tokenizer_texts: int = 200
    vocoder_texts: int = 80
    vocoder_steps: int = 600
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    cloze_couples: int = 150
    development_couples: int = 150


SMALL = DataSettings(
    world_share=0.5,
    num_spoken=2500,
    num_written=20000,
    tokenizer_texts=150,
    backbone=BackboneSettings(steps=600),
    cloze_couples=100,
    development_couples=50,
)
QUICK = DataSettings(
    num_spoken=48,
    num_written=200,
    num_units=16,
    tokenizer_texts=8,
    vocoder_texts=4,
    vocoder_steps=10,
    backbone=BackboneSettings(hidden_size=32, num_layers=2, num_heads=2, steps=20, rows_per_step=8),
    cloze_couples=4,
    development_couples=4,
)


class Steps:
    """Runs named steps once: a step's record is kept when it is done, and found by the next run.

    Args:
        folder: folder of one seed.
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
            self.console.print(f"{title}: done before", style="dim")
            return self.records[name]
        self.console.print(title, style="bold")
        started = time.perf_counter()
        record = function() or {}
        record = {"title": title, "seconds": time.perf_counter() - started, **record}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record).encode())
        self.records[name] = record
        return record


@dataclass(frozen=True)
class Miniature:
    """The world of one seed, and where its data lies.

    Args:
        folder: folder of the seed.
        seed: decides stories, codebook and backbone.
        settings: sizes.
    """

    folder: Path
    seed: int
    settings: DataSettings

    @property
    def speech_tokenizer(self) -> Path:
        """Folder of the mel tokenizer."""
        return self.folder / "speech-tokenizer"

    @property
    def vocoder(self) -> Path:
        """Folder of the vocoder."""
        return self.folder / "vocoder"

    @property
    def speech_store(self) -> Path:
        """The spoken stories, aligned with their text."""
        return self.folder / "speech-store"

    @property
    def text_store(self) -> Path:
        """The stories that are only written."""
        return self.folder / "text-store"

    @property
    def backbone(self) -> Path:
        """Folder of the text LM with its tokenizer."""
        return self.folder / "backbone"

    @property
    def development_items(self) -> Path:
        """Cloze items to choose settings on."""
        return self.folder / "development.parquet"

    @property
    def fresh_items(self) -> Path:
        """Cloze items for what is reported."""
        return self.folder / "cloze.parquet"

    @cached_property
    def world(self) -> World:
        """The seed's world."""
        return World(self.seed, share=self.settings.world_share)

    @cached_property
    def spoken(self) -> list[str]:
        """Texts of the stories that are spoken."""
        return [story.text for story in self.world.stories(1, self.settings.num_spoken)]

    @cached_property
    def written(self) -> list[str]:
        """Texts of the stories that are only written."""
        return [story.text for story in self.world.stories(2, self.settings.num_written)]

    def cloze_items(self, items_seed: int, couples: int) -> list[ClozeItem]:
        """A set of so many couples of each kind; none of its true stories is among the stories."""
        avoid = {*self.spoken, *self.written}
        kinds = (self.world.cloze_items(items_seed, kind, couples, avoid) for kind in CLOZE_KINDS)
        return [item for items in kinds for item in items]


def make_data(miniature: Miniature, steps: Steps) -> None:
    """Makes all data of a seed that is not there yet.

    Raises:
        ImportError: the extra `demo` is not installed.
    """
    steps.run("tokenizer", "fit the speech tokenizer", lambda: _make_tokenizer(miniature))
    steps.run("speech", "speak the stories and make units", lambda: _make_stores(miniature))
    steps.run("cloze", "speak the cloze items", lambda: _make_items(miniature))
    steps.run("backbone", "pretrain the text backbone, fit the vocoder", lambda: _make_backbone_and_vocoder(miniature))


def _make_tokenizer(miniature: Miniature) -> dict[str, Any]:
    settings = miniature.settings
    texts = miniature.spoken[: settings.tokenizer_texts]
    tokenizer = fit_tokenizer(texts, settings.num_units, miniature.seed, miniature.speech_tokenizer)
    return {"fingerprint": tokenizer.fingerprint}


def _make_stores(miniature: Miniature) -> dict[str, Any]:
    spoken, written = miniature.spoken, miniature.written
    for store in (miniature.speech_store, miniature.text_store):
        shutil.rmtree(store, ignore_errors=True)
    tokenizer, text_tokenizer = MelTokenizer.load(miniature.speech_tokenizer), _text_tokenizer(miniature)
    with lane_bars() as bar:
        task = bar.add_task("stories spoken", total=len(spoken))
        made = speak_units(spoken, miniature.speech_tokenizer, WORKERS, lambda done: bar.advance(task, done))
    num_validation = max(1, len(spoken) // 20)
    write_speech_store(miniature.speech_store, spoken, made, text_tokenizer, tokenizer, num_validation)
    write_text_store(miniature.text_store, written, text_tokenizer, max(1, len(written) // 100))
    seconds, units = sum(s.seconds for s in made), sum(len(s.units.units) for s in made)
    words = sum(len(text.split()) for text in spoken)
    return {"hours": seconds / 3600, "units_per_s": units / seconds, "units_per_word": units / words}


def _make_items(miniature: Miniature) -> dict[str, Any]:
    tokenizer, settings = MelTokenizer.load(miniature.speech_tokenizer), miniature.settings
    sets = {
        miniature.development_items: miniature.cloze_items(DEVELOPMENT_SEED, settings.development_couples),
        miniature.fresh_items: miniature.cloze_items(FRESH_SEED, settings.cloze_couples),
    }
    for path, items in sets.items():
        save_cloze(path, spoken_cloze(items, miniature.speech_tokenizer, WORKERS), tokenizer.fingerprint)
    return {"items": [len(items) for items in sets.values()]}


def _make_backbone_and_vocoder(miniature: Miniature) -> dict[str, Any]:
    settings = miniature.settings
    lanes = {
        "text backbone": Lane(_backbone_lane, (miniature,), settings.backbone.steps),
        "vocoder": Lane(_vocoder_lane, (miniature,), settings.vocoder_steps),
    }
    return {"lanes": run_lanes(lanes, miniature.folder / "logs")}


def _text_tokenizer(miniature: Miniature) -> PreTrainedTokenizerBase:
    return build_text_tokenizer(miniature.world.vocabulary())


def _backbone_lane(miniature: Miniature, progress: Callable[[int], None]) -> None:
    settings, tokenizer = miniature.settings.backbone, _text_tokenizer(miniature)
    history = pretrain_backbone(miniature.text_store, tokenizer, miniature.backbone, settings, miniature.seed, progress)
    write_atomically(miniature.folder / "backbone-losses.json", json.dumps(history).encode())


def _vocoder_lane(miniature: Miniature, progress: Callable[[int], None]) -> None:
    settings = miniature.settings
    texts, tokenizer = miniature.spoken[: settings.vocoder_texts], MelTokenizer.load(miniature.speech_tokenizer)
    fit_vocoder(texts, tokenizer, settings.vocoder_steps, miniature.seed, miniature.vocoder, progress)
