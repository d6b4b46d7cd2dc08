"""All analyses of one model, and of several side by side."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import TaskProgressColumn, TimeRemainingColumn

from smoltolk.analysis.abstraction import NUM_FOLDS, dimension_curve, probe_curve
from smoltolk.analysis.layer_weights import layer_weights
from smoltolk.analysis.logit_lens import logit_lens
from smoltolk.analysis.pieces import Piece, WordEnds, draw_pieces, most_frequent, word_ends
from smoltolk.analysis.shared_space import cka_between_levels, cka_curve, overlap_curve, retrieval_curve
from smoltolk.analysis.states import States, read_states
from smoltolk.analysis.uncertainty import NUM_GROUPS, Curve, Mean, mean_of, over_seeds, paired_difference, stacked
from smoltolk.data.dataset import BatchSource, TaskMixture
from smoltolk.data.policies import SpanPolicy
from smoltolk.data.store import MANIFEST, Store
from smoltolk.model.export import load_model
from smoltolk.model.fingerprint import checkpoint_fingerprint
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.speech.audio import write_atomically
from smoltolk.speech.neural import check_device
from smoltolk.terminal import progress_bar

VERSION = 1  # of what is computed: kept results of another one are computed again
MODALITIES = {"speech": True, "text": False}


@dataclass(frozen=True)
class AnalysisSettings:
    """What decides the numbers, beside model and store.

    Args:
        utterances: how many are drawn.
        words_per_piece: cut them into pieces of so many words; None for whole utterances.
        max_words: most words at whose ends states are kept; memory grows with it.
        dimensions: of the subspaces that are compared.
        probe_words: how many different words the probe tells apart, the most frequent ones.
        rows: interleaved rows for the layer selector, a multiple of 20.
        row_tokens: their length; at most what the backbone has positions for.
        text_words: fewest and most words of a text run in them.
        speech_words: fewest and most words of a speech run in them.
        split: which utterances.
        seed: what is drawn.

    Raises:
        ValueError: a setting is out of range.
    """

    utterances: int = 200
    words_per_piece: int | None = None
    max_words: int = 2000
    dimensions: int = 10
    probe_words: int = 50
    rows: int = 80
    row_tokens: int = 256
    text_words: tuple[int, int] = (10, 31)
    speech_words: tuple[int, int] = (5, 16)
    split: str = "validation"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.utterances < NUM_GROUPS:
            raise ValueError(f"utterances is {self.utterances}: give {NUM_GROUPS} or more, which error bars need")
        if self.words_per_piece is not None and self.words_per_piece < 1:
            raise ValueError(f"words_per_piece is {self.words_per_piece}: give 1 or more, or none for whole utterances")
        if self.max_words < 100:
            raise ValueError(f"max_words is {self.max_words}: give 100 or more")
        if not 1 <= self.dimensions <= (most := self.utterances * (NUM_GROUPS - 1) // NUM_GROUPS - 1):
            raise ValueError(
                f"dimensions is {self.dimensions}: give 1 to {most} with {self.utterances} utterances, or more of them"
            )
        if self.probe_words < 2:
            raise ValueError(f"probe_words is {self.probe_words}: give 2 or more words to tell apart")
        if self.rows < NUM_GROUPS or self.rows % NUM_GROUPS:
            raise ValueError(f"rows is {self.rows}: give a multiple of {NUM_GROUPS}, which error bars need")
        if self.row_tokens < 2:
            raise ValueError(f"row_tokens is {self.row_tokens}: give 2 or more")
        SpanPolicy(self.text_words, self.speech_words)


@dataclass(frozen=True)
class Subject:
    """A model to analyse.

    Args:
        name: what to call it; several models of one name are seeds of one variant.
        folder: the model.
        store: the utterances.
    """

    name: str
    folder: Path
    store: Path

    @classmethod
    def parse(cls, given: str, store: Path | None) -> "Subject":
        """Reads `FOLDER`, `NAME=FOLDER`, and either with `@STORE` behind it.

        A folder that is there may have = and @ in its own name. Without a name the model is called by its folder, or
        the folder above one that is called "model".

        Args:
            given: the model as given.
            store: the utterances where none are given.

        Raises:
            ValueError: there is no such model, or no store is given.
        """
        name, folder = "", given
        if not Path(given).is_dir() and "=" in given and "/" not in given.partition("=")[0]:
            name, _, folder = given.partition("=")
        if not Path(folder).is_dir() and "@" in folder:
            folder, _, behind = folder.rpartition("@")
            store = Path(behind)
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{given!r}: {folder} holds no model (no config.json); give FOLDER, NAME=FOLDER or NAME=FOLDER@STORE"
            )
        if store is None:
            raise ValueError(f"{given!r} names no store: give --store for all models, or FOLDER@STORE for this one")
        absolute = path.resolve()
        return cls(name or (absolute.parent if absolute.name == "model" else absolute).name, path, store)


@dataclass(frozen=True, eq=False)
class ModelAnalysis:
    """What was found in one model.

    Args:
        curves: quantities at every level, by name; those of the layer selector from h¹ on, all others from h⁰ on.
        maps: pictures without error bars, by name: `cka_between_levels` (levels of speech, levels of text),
            `selector_by_unit` (num_units + 1, layers), `selector_after_switch` (distances, layers).
        counts: how many utterances, pieces and words they are over.
    """

    curves: dict[str, Curve]
    maps: dict[str, np.ndarray]
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As what JSON can hold; what is not a number is null."""
        return {
            "counts": self.counts,
            "curves": {
                name: {
                    "value": as_lists(curve.value),
                    "standard_error": as_lists(curve.standard_error),
                    "chance": None if curve.chance is None else as_lists(curve.chance),
                    "left_out": as_lists(curve.left_out),
                }
                for name, curve in self.curves.items()
            },
            "maps": {name: as_lists(values) for name, values in self.maps.items()},
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "ModelAnalysis":
        """The inverse of `to_json`."""
        return cls(
            {
                name: Curve(
                    np.array(curve["value"], dtype=float),
                    np.array(curve["left_out"], dtype=float),
                    None if curve["chance"] is None else np.array(curve["chance"], dtype=float),
                )
                for name, curve in found["curves"].items()
            },
            {name: np.array(values, dtype=float) for name, values in found["maps"].items()},
            found["counts"],
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """Variants side by side; the first one is what others are compared with.

    Args:
        settings: what decided the numbers.
        subjects: the models of each variant, one of each seed.
        found: what was found in them, in the same order.
    """

    settings: AnalysisSettings
    subjects: dict[str, list[Subject]]
    found: dict[str, list[ModelAnalysis]]

    def mean(self, variant: str, quantity: str) -> Mean:
        """A quantity of a variant: over seeds where there are several."""
        return over_seeds([analysis.curves[quantity] for analysis in self.found[variant]])

    def difference(self, variant: str, quantity: str) -> Mean | None:
        """What a variant has more than the first one, paired; None where seeds or levels do not correspond."""
        first = next(iter(self.found))
        stores = [[subject.store.resolve() for subject in self.subjects[name]] for name in (variant, first)]
        ours, theirs = ([analysis.curves[quantity] for analysis in self.found[name]] for name in (variant, first))
        if variant == first or stores[0] != stores[1] or ours[0].value.shape != theirs[0].value.shape:
            return None
        return paired_difference(ours, theirs)

    def to_json(self) -> dict[str, Any]:
        """Everything, also what the means were taken of."""
        quantities = {name: list(found[0].curves) for name, found in self.found.items()}
        differences = {
            name: {quantity: self.difference(name, quantity) for quantity in quantities[name]} for name in self.found
        }
        return {
            "version": VERSION,
            "settings": asdict(self.settings),
            "means": {
                name: {quantity: mean_json(self.mean(name, quantity)) for quantity in quantities[name]}
                for name in self.found
            },
            "differences": {
                name: {quantity: mean_json(difference) for quantity, difference in found.items() if difference}
                for name, found in differences.items()
            },
            "models": {
                name: [
                    {"folder": str(subject.folder), "store": str(subject.store)} | analysis.to_json()
                    for subject, analysis in zip(self.subjects[name], found, strict=True)
                ]
                for name, found in self.found.items()
            },
        }


def as_lists(values: np.ndarray) -> list[Any]:
    """An array as nested lists with None for what is not a number."""
    return np.where(np.isfinite(values), values.astype(object), np.array(None)).tolist()


def mean_json(mean: Mean) -> dict[str, Any]:
    """A mean as what JSON can hold."""
    return {
        "value": as_lists(mean.value),
        "standard_error": as_lists(mean.standard_error),
        "num_seeds": mean.num_seeds,
    }


def compare(
    subjects: Sequence[Subject],
    settings: AnalysisSettings,
    kept: Path,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    progress: bool = True,
) -> Comparison:
    """Analyses models, or takes what is kept of them.

    Args:
        subjects: the models; those of one name are seeds of one variant.
        settings: what decides the numbers.
        kept: folder of the results of single models, by what they depend on.
        device: where models run.
        batch_size: pieces in one forward.
        progress: whether to show a bar.

    Raises:
        ValueError: a model is given twice, seeds of one variant have different numbers of levels, or a model and its
            store do not fit together.
        OSError: a result cannot be written.
    """
    folders = [subject.folder.resolve() for subject in subjects]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"{folder} is given twice: give each model once")
    kept.mkdir(parents=True, exist_ok=True)
    by_name: dict[str, list[Subject]] = {}
    found: dict[str, list[ModelAnalysis]] = {}
    with progress_bar(TaskProgressColumn(), TimeRemainingColumn(), disable=not progress) as bar:
        for subject in subjects:
            path = kept / f"{key_of(subject, settings)}.json"
            if path.is_file():
                analysis = ModelAnalysis.from_json(json.loads(path.read_bytes()))
            else:
                report = _report(bar, subject, settings) if progress else None
                analysis = analyze_model(subject, settings, device=device, batch_size=batch_size, progress=report)
                write_atomically(path, json.dumps(analysis.to_json(), allow_nan=False).encode())
            by_name.setdefault(subject.name, []).append(subject)
            found.setdefault(subject.name, []).append(analysis)
            levels = [len(one.curves["cka"].value) for one in found[subject.name]]
            if len(set(levels)) > 1:
                raise ValueError(
                    f"the models of the name {subject.name!r} have {' and '.join(map(str, sorted(set(levels))))} "
                    f"levels and are no seeds of one variant: give them different names"
                )
    return Comparison(settings, by_name, found)


def _report(bar: Any, subject: Subject, settings: AnalysisSettings) -> Callable[[str, float], None]:
    task = bar.add_task(subject.name, total=1.0)

    def report(what: str, share: float) -> None:
        bar.update(task, advance=share, description=f"{subject.name}: {what}")

    return report


def key_of(subject: Subject, settings: AnalysisSettings) -> str:
    """What a result depends on, in short: weights, store, settings.

    Raises:
        ValueError: there is no such store.
    """
    manifest = subject.store / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{subject.store} is not a store (no {MANIFEST}): give the output folder of `prepare`")
    parts = {
        "version": VERSION,
        "checkpoint": checkpoint_fingerprint(subject.folder),
        "store": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "settings": asdict(settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def analyze_model(
    subject: Subject,
    settings: AnalysisSettings,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    progress: Callable[[str, float], None] | None = None,
) -> ModelAnalysis:
    """All analyses of one model.

    Args:
        subject: model and utterances.
        settings: what decides the numbers.
        device: where the model runs; all else runs on the CPU.
        batch_size: pieces in one forward.
        progress: called with what has been done and its share of the work.

    Raises:
        ValueError: the store is of other tokenizers than the model, has too few utterances with text, speech and
            word times, or the model's states are not finite.
    """
    say = progress or (lambda what, share: None)
    model = load_model(Path(subject.folder))
    model.to(check_device(device)).eval()  # type: ignore[arg-type]  # transformers' `to` is wrapped
    store = Store(subject.store)
    check_fits(model, store, subject)
    pieces = draw_pieces(
        store,
        settings.utterances,
        words_per_piece=settings.words_per_piece,
        split=settings.split,
        seed=settings.seed,
    )
    if settings.dimensions >= model.config.hidden_size:
        raise ValueError(
            f"dimensions is {settings.dimensions}, but the levels of {subject.folder} have {model.config.hidden_size}: "
            f"give fewer"
        )
    words = word_ends(pieces, settings.max_words, seed=settings.seed)
    states: dict[str, States] = {}
    try:
        for modality, is_speech in MODALITIES.items():
            states[modality] = read_states(
                model,
                pieces,
                words,
                is_speech=is_speech,
                batch_size=batch_size,
                progress=lambda done: say("reading", 0.15 * done / len(pieces)),
            )
    except ValueError as error:
        raise ValueError(f"{subject.name} ({subject.folder}): {error}") from error
    curves, maps = _selector(model, store, settings)
    say("layer selector", 0.1)
    curves |= _shared_space(states, pieces, settings)
    maps["cka_between_levels"] = cka_between_levels(states["speech"].pooled, states["text"].pooled)
    say("shared space", 0.2)
    curves |= _abstraction(states, pieces, words, settings)
    say("abstraction", 0.3)
    curves |= _lens(model, states, words)
    say("done", 0.1)
    counts = {"utterances": settings.utterances, "pieces": len(pieces), "words": len(words.piece)}
    counts["words_in_new_contexts"] = int(words.is_new.sum())
    return ModelAnalysis(curves, maps, counts)


def check_fits(model: SmolTolkForCausalLM, store: Store, subject: Subject) -> None:
    """Refuses a store of other tokenizers than the model's.

    Raises:
        ValueError: a fingerprint, or the number of units, differs.
    """
    card = model.config.speech_tokenizer or {}
    try:
        store.require(
            speech_fingerprint=card.get("fingerprint"), text_fingerprint=model.config.text_tokenizer_fingerprint
        )
    except ValueError as error:
        raise ValueError(f"{subject.name} ({subject.folder}) and its store do not fit together: {error}") from error
    if store.num_units not in (None, model.ids.num_units) or store.max_text_id >= model.ids.text_vocab_size:
        raise ValueError(
            f"{subject.name} ({subject.folder}) knows {model.ids.num_units} units and {model.ids.text_vocab_size} text "
            f"tokens, but {store.path} has {store.num_units} units and text tokens up to {store.max_text_id}: give the "
            f"store that this model can read, as FOLDER@STORE"
        )


def _selector(
    model: SmolTolkForCausalLM, store: Store, settings: AnalysisSettings
) -> tuple[dict[str, Curve], dict[str, np.ndarray]]:
    source = BatchSource(
        {"interleaved": [(store, 1.0)]},
        mixture=TaskMixture(interleaved=1, speech=0, text=0),
        ids=model.ids,
        row_tokens=min(settings.row_tokens, model.config.max_position_embeddings),
        policy=SpanPolicy(settings.text_words, settings.speech_words),
        split=settings.split,
    )
    rows = settings.rows // NUM_GROUPS
    batches = [source.batch(settings.seed, step, rows=rows).input_ids for step in range(NUM_GROUPS)]
    weights = layer_weights(model, batches)
    counts = weights.batch_positions[:, None]
    left_out = (weights.by_batch.sum(0) - weights.by_batch) / (counts.sum() - counts)
    chance = np.full(len(weights.speech), 1 / len(weights.speech))
    return (
        {"selector": Curve(weights.speech, left_out, chance)},
        {"selector_by_unit": weights.by_unit, "selector_after_switch": weights.after_switch},
    )


def _shared_space(states: dict[str, States], pieces: Sequence[Piece], settings: AnalysisSettings) -> dict[str, Curve]:
    speech, text = states["speech"].pooled, states["text"].pooled
    groups = np.array([piece.group for piece in pieces])
    said = np.unique([" ".join(map(str, piece.text_ids)) for piece in pieces], return_inverse=True)[1]
    levels = list(zip(speech, text, strict=True))
    return {
        "cka": stacked([cka_curve(a, b, groups, settings.seed) for a, b in levels]),
        "subspace_overlap": stacked([overlap_curve(a, b, groups, settings.dimensions) for a, b in levels]),
        "speech_to_text": stacked([retrieval_curve(a, b, said, groups) for a, b in levels]),
        "text_to_speech": stacked([retrieval_curve(b, a, said, groups) for a, b in levels]),
    }


def _abstraction(
    states: dict[str, States], pieces: Sequence[Piece], words: WordEnds, settings: AnalysisSettings
) -> dict[str, Curve]:
    utterances = np.array([piece.utterance for piece in pieces])[words.piece]
    known = most_frequent(words.label.tolist(), settings.probe_words, fewest=NUM_FOLDS)
    is_known = np.isin(words.label, known)
    if len(known) < 2 or len(np.unique(utterances[is_known])) < NUM_FOLDS:
        raise ValueError(
            f"utterances is {settings.utterances}, in which {len(known)} different words are said {NUM_FOLDS} times "
            f"or more: the probe needs two; give more utterances"
        )
    curves = {}
    for modality in MODALITIES:
        levels = states[modality].at_words
        curves[f"dimension_{modality}"] = stacked(
            [dimension_curve(level[words.is_new], words.group[words.is_new]) for level in levels]
        )
        curves[f"word_probe_{modality}"] = stacked(
            [
                probe_curve(level[is_known], words.label[is_known], utterances[is_known], words.group[is_known])
                for level in levels
            ]
        )
    return curves


def _lens(model: SmolTolkForCausalLM, states: dict[str, States], words: WordEnds) -> dict[str, Curve]:
    curves = {}
    for modality in MODALITIES:
        for target, tokens in (("said", words.said), ("next", words.following)):
            there = tokens >= 0
            wanted, groups = tokens[there], words.group[there]
            lens = logit_lens(model, states[modality].at_words[:, there], wanted)
            chance = float(np.unique(wanted, return_counts=True)[1].max() / len(wanted))
            curves[f"lens_{target}_{modality}"] = mean_of(lens.best == wanted, groups, chance)
            curves[f"lens_{target}_log_probability_{modality}"] = mean_of(lens.log_probability, groups)
    return curves
