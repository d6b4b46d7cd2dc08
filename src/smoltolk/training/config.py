"""Recipes: strict, typed configuration of a training run, read from YAML."""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from smoltolk.data.dataset import TASKS, TaskMixture
from smoltolk.data.policies import CoinPolicy, PoissonPolicy, Policy, SentencePolicy, SpanPolicy

PositiveInt = Annotated[int, Field(gt=0)]
NotNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
ABLATION = "ablation"  # the section that makes a recipe one of an ablation, see smoltolk.experiments


class Strict(BaseModel):
    """Refuses unknown keys, and numbers that are infinite or none."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Checked = TypeVar("Checked", bound=Strict)


class ModelSettings(Strict):
    """Architecture: the settings of `SmolTolkConfig` that are not learnt from backbone and data.

    Args:
        backbone: the pretrained text LM, a folder or a hub name.
    """

    backbone: str
    num_input_adapter_layers: NotNegativeInt = 2
    num_output_adapter_layers: NotNegativeInt = 2
    layer_mixing: Literal["last", "static", "selected"] = "selected"
    selector_input: str | int = "static"
    selector_hidden_size: PositiveInt | None = None
    selector_level_size: PositiveInt | None = None
    selector_level_hidden_size: PositiveInt | None = None
    speech_residual: bool = True
    tie_speech_embeddings: bool = True
    output_adapter_norm: bool = False
    selector_entropy_weight: NotNegativeFloat = 0.0
    initializer_range: PositiveFloat | None = None
    predict_switch: bool = False
    rope_theta: PositiveFloat | None = None
    max_position_embeddings: PositiveInt | None = None


class StoreShare(Strict):
    """A store and its share in a task: a number beside those of the other stores, or "size" for its utterances."""

    store: str
    weight: PositiveFloat | Literal["size"] = 1.0


class PolicySettings(Strict):
    """An interleaving policy: which one, and its own settings."""

    makes: ClassVar[Callable[..., Policy]]

    def make(self) -> Policy:
        """The policy as the data side takes it."""
        return type(self).makes(**self.model_dump(exclude={"kind"}))

    @model_validator(mode="after")
    def _is_possible(self) -> "PolicySettings":
        self.make()  # its own checks are part of the recipe's
        return self


class AlternateSettings(PolicySettings):
    """Runs of text and speech in turn, see `SpanPolicy`."""

    makes = SpanPolicy
    kind: Literal["alternate"] = "alternate"
    text_words: tuple[int, int] = (10, 31)
    speech_words: tuple[int, int] = (5, 16)


class PoissonSettings(PolicySettings):
    """Spans of Poisson length up to a share of the words, see `PoissonPolicy`."""

    makes = PoissonPolicy
    kind: Literal["poisson"]
    mean_words: float = 10.0
    share: float = 0.3
    spans: Literal["speech", "text"] = "speech"


class CoinSettings(PolicySettings):
    """A coin for every word, see `CoinPolicy`."""

    makes = CoinPolicy
    kind: Literal["coin"]
    speech_share: float = 0.5


class SentenceSettings(PolicySettings):
    """Changes at the ends of sentences, in turn or by a coin for each, see `SentencePolicy`."""

    makes = SentencePolicy
    kind: Literal["sentence"]
    speech_share: float | None = None


class DataSettings(Strict):
    """Where rows come from.

    Args:
        interleaved: stores for rows of alternating text and speech.
        speech: stores for rows of speech alone.
        text: stores for rows of text alone.
        transcription: stores for rows of pairs, speech and then its text.
        synthesis: stores for rows of pairs, text and then its speech.
        policy: which words of interleaved rows are text and which are speech. `text_words` and `speech_words` may
            also stand here without it: they are those of the policy `alternate`.
    """

    interleaved: list[StoreShare] = []
    speech: list[StoreShare] = []
    text: list[StoreShare] = []
    transcription: list[StoreShare] = []
    synthesis: list[StoreShare] = []
    policy: Annotated[
        AlternateSettings | PoissonSettings | CoinSettings | SentenceSettings, Field(discriminator="kind")
    ] = AlternateSettings()

    @model_validator(mode="before")
    @classmethod
    def _put_words_into_policy(cls, settings: Any) -> Any:
        words = {"text_words", "speech_words"} & set(settings) if isinstance(settings, dict) else set()
        if not words:
            return settings
        if "policy" in settings:
            raise ValueError(
                f"{' and '.join(sorted(words))} stand beside policy: put them into the policy, or leave them"
            )
        rest = {key: value for key, value in settings.items() if key not in words}
        return rest | {"policy": {"kind": "alternate", **{key: settings[key] for key in words}}}

    def stores(self, task: str) -> list[StoreShare]:
        """The stores of a task."""
        shares: list[StoreShare] = getattr(self, task)
        return shares


class Mixture(Strict):
    """Share of each task in the rows of a stage."""

    interleaved: NotNegativeFloat = 0.0
    speech: NotNegativeFloat = 0.0
    text: NotNegativeFloat = 0.0
    transcription: NotNegativeFloat = 0.0
    synthesis: NotNegativeFloat = 0.0

    @model_validator(mode="after")
    def _has_a_task(self) -> "Mixture":
        TaskMixture(**self.model_dump())  # its own checks are part of the recipe's
        return self

    @property
    def tasks(self) -> TaskMixture:
        """The mixture as the data side takes it."""
        return TaskMixture(**{task: getattr(self, task) for task in TASKS})


class LoraSettings(Strict):
    """Small matrices that learn in the place of the text LM's weights, see `smoltolk.training.lora`.

    Args:
        rank: rows of A and columns of B.
        alpha: their product counts alpha / rank times.
        dropout: share of A's inputs that are dropped in training.
        target_modules: names of linear layers within a decoder layer, such as q_proj; None for all of them.
    """

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: BelowOne = 0.0
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None


class DistillationSettings(Strict):
    """Weights of the terms by which the untouched text LM teaches at the words that are spoken; 0 for none.

    Args:
        hidden_states: 1 − cosine of hidden states, mean over all layers, at word ends.
        next_token: KL divergence of the next text token at word ends.
        switch: the same at switches to speech.
        word: cross-entropy of the word being said, at its units but the last.
    """

    hidden_states: NotNegativeFloat = 0.0
    next_token: NotNegativeFloat = 0.0
    switch: NotNegativeFloat = 0.0
    word: NotNegativeFloat = 0.0

    @model_validator(mode="after")
    def _teaches(self) -> "DistillationSettings":
        if not any(self.weights.values()):
            raise ValueError(f"all weights are 0: give {', '.join(self.weights)} a weight, or leave distillation out")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class StageSettings(Strict):
    """One stage of training; it starts with a fresh optimizer.

    Args:
        train: "speech" trains the speech parts with the text LM frozen, "lora" trains LoRA matrices of the text LM
            too, "everything" trains all.
        lora: the LoRA matrices, with `train: lora`.
        steps: optimizer steps.
        rows_per_step: rows in a step.
        rows_per_micro_batch: rows in one forward; several make a step.
        row_tokens: length of a row.
        mixture: share of each task.
        learning_rate: peak rate of the speech parts.
        text_learning_rate: peak rate of the text LM; by default the same.
        warmup_steps: steps of linear rise.
        decay_steps: steps of linear fall to 0 at the end of the stage.
        weight_decay: AdamW weight decay, on matrices only (not on embeddings, norms and biases).
        betas: AdamW betas.
        clip_norm: largest norm of the gradient.
        distillation: what a frozen copy of the text LM teaches, None for nothing.
    """

    train: Literal["speech", "lora", "everything"]
    lora: Annotated[LoraSettings | None, Field(exclude_if=lambda lora: lora is None)] = None
    steps: PositiveInt
    rows_per_step: PositiveInt
    rows_per_micro_batch: PositiveInt
    row_tokens: Annotated[int, Field(ge=2)]
    mixture: Mixture
    learning_rate: PositiveFloat
    text_learning_rate: PositiveFloat | None = None
    warmup_steps: NotNegativeInt = 100
    decay_steps: NotNegativeInt = 0
    weight_decay: NotNegativeFloat = 0.1
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    clip_norm: PositiveFloat = 1.0
    distillation: DistillationSettings | None = None

    @model_validator(mode="after")
    def _has_words_to_teach(self) -> "StageSettings":
        if self.distillation is not None and not self.mixture.interleaved and not self.mixture.speech:
            raise ValueError("distillation needs rows of interleaved or speech: give them a share, or leave it out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete_lora(cls, settings: Any) -> Any:
        is_lora = isinstance(settings, dict) and settings.get("train") == "lora"
        return settings | {"lora": settings.get("lora") or {}} if is_lora else settings


class ValidationSettings(Strict):
    """The fixed validation set, drawn once from the stores' validation split.

    Args:
        rows: rows per task, 0 for no validation.
        every_steps: steps between validations; one more comes at the end of each stage.
    """

    rows: NotNegativeInt = 64
    every_steps: PositiveInt = 500


class CheckpointSettings(Strict):
    """When to save and how much to keep."""

    every_steps: PositiveInt = 500
    keep_last: PositiveInt = 2


class Recipe(Strict):
    """A training run.

    Args:
        name: what to call the model.
        seed: decides the new parameters and the data order; nothing else is random.
        output: folder of the run. Relative paths in a recipe are relative to where the command is run.
        model: the architecture.
        data: stores and interleaving.
        stages: the stages, in order.
        validation: the fixed validation set.
        checkpoint: when to save.
        speech_tokenizer: folder of the speech tokenizer, kept with the trained model.
        vocoder: folder of the vocoder, kept with the trained model.
        attn_implementation: attention kernel, as transformers names them.
        compile: whether to compile decoder layers (`torch.compile`): slow to start, then faster.
        gradient_checkpointing: whether to compute layers again in the backward pass, for less memory.
        precision: "bf16" computes in bfloat16 with float32 master weights, "fp32" in float32.
        device: where to train; "auto" takes the accelerator if there is one.
        num_threads: CPU threads of this process, None for torch's own choice.
        loader_workers: processes that draw batches ahead, 0 to draw them in between; None takes 4 beside an
            accelerator and 0 on a CPU. They change no batch.
        max_skipped_steps: stop when more steps than this had a loss or gradient that is not finite.
        watch: where metrics are written besides `metrics.jsonl`: "tensorboard", "wandb" (W&B), or both.
        peak_tflops: TFLOP/s of one device at best, for the MFU; None for what is known of the GPU.
    """

    name: str
    seed: NotNegativeInt = 0
    output: str
    model: ModelSettings
    data: DataSettings
    stages: Annotated[list[StageSettings], Field(min_length=1)]
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    speech_tokenizer: str | None = None
    vocoder: str | None = None
    attn_implementation: str = "sdpa"
    compile: bool = False
    gradient_checkpointing: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"
    num_threads: PositiveInt | None = None
    loader_workers: NotNegativeInt | None = None
    max_skipped_steps: NotNegativeInt = 20
    watch: list[Literal["tensorboard", "wandb"]] = []
    peak_tflops: PositiveFloat | None = None

    @field_validator("stages")
    @classmethod
    def _stages_add_up(cls, stages: list[StageSettings]) -> list[StageSettings]:
        for number, stage in enumerate(stages, start=1):
            if stage.rows_per_step % stage.rows_per_micro_batch:
                raise ValueError(
                    f"stage {number}: rows_per_step {stage.rows_per_step} is not a multiple of "
                    f"rows_per_micro_batch {stage.rows_per_micro_batch}: change one of them"
                )
            if stage.warmup_steps + stage.decay_steps > stage.steps:
                raise ValueError(
                    f"stage {number}: warmup_steps {stage.warmup_steps} and decay_steps {stage.decay_steps} "
                    f"do not fit into its {stage.steps} steps: lower them (warmup_steps is 100 unless given), or "
                    "give it more steps"
                )
            if stage.train != "lora" and stage.lora is not None:
                raise ValueError(f"stage {number}: lora is given, but train is {stage.train}: set train to lora")
        by_lora = [stage.lora for stage in stages if stage.train == "lora"]
        if by_lora and any(stage.train == "everything" for stage in stages):
            raise ValueError("one stage trains lora and another everything: choose one of them")
        if any(settings != by_lora[0] for settings in by_lora):
            raise ValueError("stages have different lora settings, but a run has one set of matrices: make them equal")
        return stages

    @model_validator(mode="after")
    def _has_stores_for_its_tasks(self) -> "Recipe":
        for number, stage in enumerate(self.stages, start=1):
            for task in TASKS:
                if getattr(stage.mixture, task) and not self.data.stores(task):
                    raise ValueError(
                        f"stage {number}: mixture has {task}, but data.{task} names no store: give it one, such as "
                        "[{store: FOLDER}], or leave it out of the mixture"
                    )
        return self

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what is learnt; a run is resumed only under the same."""
        return hashlib.sha256(self._decisive_json().encode()).hexdigest()

    @property
    def decisive(self) -> dict[str, Any]:
        """All that decides what is learnt, as JSON has it."""
        settings: dict[str, Any] = json.loads(self._decisive_json())
        return settings

    def _decisive_json(self) -> str:
        # Left out by its default: without it, runs begun before would have another fingerprint.
        patience = type(self).model_fields["max_skipped_steps"].default
        return self.model_copy(update={"max_skipped_steps": patience}).model_dump_json(
            exclude={
                "name",
                "output",
                "device",
                "num_threads",
                "loader_workers",
                "compile",
                "gradient_checkpointing",
                "checkpoint",
                "validation",
                "speech_tokenizer",
                "vocoder",
                "watch",
                "peak_tflops",
            }
        )

    def stage_at(self, step: int) -> tuple[int, int]:
        """Index of the stage that a step of the run belongs to, and the step within it."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise ValueError(f"step {step} lies beyond the last stage")

    @property
    def lora(self) -> LoraSettings | None:
        """LoRA matrices of the run, None if no stage trains any."""
        return next((stage.lora for stage in self.stages if stage.train == "lora"), None)

    def uses_lora(self, index: int) -> bool:
        """Whether LoRA matrices have begun to learn by a stage."""
        return any(stage.train == "lora" for stage in self.stages[: index + 1])

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def load_recipe(path: str | Path) -> Recipe:
    """Reads a YAML recipe.

    A recipe that `extends` another, a path relative to its own, changes some of its settings: sections are merged
    key by key, all else is replaced.

    Raises:
        ValueError: a file is missing or not YAML, recipes extend each other in a circle, a key is unknown (the
            nearest known ones are named) or a value is out of range; or it is a recipe of an ablation.
    """
    settings = read_settings(Path(path))
    if ABLATION in settings:
        raise ValueError(f"recipe {path} has a section {ABLATION}: run it with smoltolk ablate")
    return make_recipe(settings, source=str(path))


def read_settings(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Settings of a recipe file, with those of the recipe that it extends; not checked yet.

    Args:
        path: the file.
        extending: the files on the way to this one.

    Raises:
        ValueError: a file is missing or not YAML, or recipes extend each other in a circle.
    """
    if path.resolve() in extending:
        raise ValueError(f"recipe {path} extends itself, by way of {len(extending)} files: remove one extends")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path} holds no settings: see the recipes folder for an example")
    base = settings.pop("extends", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise ValueError(f"recipe {path}: extends is {base!r}: give the path of one recipe")
    return merged(read_settings(path.parent / base, (*extending, path.resolve())), settings)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with some changed: sections key by key, all else as a whole."""
    result = dict(base)
    for key, value in changes.items():
        known = result.get(key)
        result[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


def make_recipe(settings: dict[str, Any], source: str = "the recipe") -> Recipe:
    """Checks settings; errors name the key, its value and the remedy."""
    return checked(Recipe, settings, source)


def checked(model: type[Checked], settings: dict[str, Any], source: str) -> Checked:
    """Settings as a strict model.

    Raises:
        ValueError: a key is unknown or missing, or a value is out of range; names source, keys, values and remedies.
    """
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        problems = "\n".join(f"  {problem}" for problem in _problems(error, model))
        raise ValueError(f"{source} cannot be used:\n{problems}") from error


def _problems(error: ValidationError, model: type[Strict]) -> Iterator[str]:
    for problem in error.errors():
        location = problem["loc"]
        # Pydantic names the kind of a policy after it; a recipe has no such level.
        key = ".".join(str(part) for before, part in zip(("", *location), location, strict=False) if before != "policy")
        if problem["type"] == "extra_forbidden":
            known = list(_settings_at(model, location[:-1]))
            near = difflib.get_close_matches(str(location[-1]), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
            yield f"{key}: unknown key; {hint}"
        elif problem["type"] == "missing":
            yield f"{key}: missing"
        elif problem["type"] == "union_tag_not_found":
            yield f"{key}.kind: missing"
        elif problem["type"] == "model_type":
            yield f"{key}: {problem['input']!r} is refused: it is a section, give its keys"
        elif problem["type"] == "value_error":  # ours; about a whole section they name the values at fault themselves
            place = ": ".join(filter(None, (key, "" if _has_sections(problem["input"]) else f"{problem['input']!r}")))
            yield f"{place}: {problem['ctx']['error']}" if place else str(problem["ctx"]["error"])
        else:
            yield f"{key}: {problem['input']!r} is refused: {problem['msg']}"


def _has_sections(settings: Any) -> bool:
    return isinstance(settings, dict) or (isinstance(settings, list) and any(map(_has_sections, settings)))


def _settings_at(model: type[Strict], location: tuple[int | str, ...]) -> Iterator[str]:
    """Names of the settings at a place in a file."""
    models: list[Any] = [model]
    for part in location:
        if part in models[0].model_fields:
            annotation = models[0].model_fields[part].annotation
            models = [a for a in get_args(annotation) if hasattr(a, "model_fields")] or [annotation]
        elif isinstance(part, str) and "kind" in models[0].model_fields:  # the kind of a policy
            models = [model for model in models if part in get_args(model.model_fields["kind"].annotation)]
    yield from models[0].model_fields


def changed_settings(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """What differs between two recipes as JSON has them: dotted name, old and new value of each setting."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(key, before.get(key), now.get(key)) for key in before | now]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(str(i), old, new) for i, (old, new) in enumerate(zip(before, now, strict=True))]
    else:
        if before != now:
            yield f"{place} was {before!r}, is {now!r}"
        return
    for key, old, new in pairs:
        yield from changed_settings(old, new, f"{place}.{key}" if place else key)
