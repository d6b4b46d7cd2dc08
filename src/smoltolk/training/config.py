"""Recipes: strict, typed configuration of a training run, read from YAML."""

import difflib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from smoltolk.data.dataset import TaskMixture
from smoltolk.data.interleaving import SpanPolicy

PositiveInt = Annotated[int, Field(gt=0)]
NotNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]


class Strict(BaseModel):
    """Refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    """A store and its share in a task."""

    store: str
    weight: PositiveFloat = 1.0


class DataSettings(Strict):
    """Where rows come from.

    Args:
        interleaved: stores for rows of alternating text and speech.
        speech: stores for rows of speech alone.
        text: stores for rows of text alone.
        text_words: fewest and most words of a text run (paper: 10 to 31).
        speech_words: fewest and most words of a speech run (paper: 5 to 16).
    """

    interleaved: list[StoreShare] = []
    speech: list[StoreShare] = []
    text: list[StoreShare] = []
    text_words: tuple[int, int] = (10, 31)
    speech_words: tuple[int, int] = (5, 16)

    @property
    def policy(self) -> SpanPolicy:
        """The interleaving policy."""
        return SpanPolicy(text_words=self.text_words, speech_words=self.speech_words)


class Mixture(Strict):
    """Share of each task in the rows of a stage."""

    interleaved: NotNegativeFloat = 0.0
    speech: NotNegativeFloat = 0.0
    text: NotNegativeFloat = 0.0

    @property
    def tasks(self) -> TaskMixture:
        """The mixture as the data side takes it."""
        return TaskMixture(interleaved=self.interleaved, speech=self.speech, text=self.text)


class StageSettings(Strict):
    """One stage of training; it starts with a fresh optimizer.

    Args:
        train: "speech" trains the speech parts with the text LM frozen, "everything" trains all.
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
    """

    train: Literal["speech", "everything"]
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
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: PositiveFloat = 1.0


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
        max_skipped_steps: stop when more steps than this had a loss or gradient that is not finite.
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
    max_skipped_steps: NotNegativeInt = 20

    @field_validator("stages")
    @classmethod
    def _stages_add_up(cls, stages: list[StageSettings]) -> list[StageSettings]:
        for number, stage in enumerate(stages, start=1):
            if stage.rows_per_step % stage.rows_per_micro_batch:
                raise ValueError(
                    f"stage {number}: rows_per_step {stage.rows_per_step} is not a multiple of "
                    f"rows_per_micro_batch {stage.rows_per_micro_batch}"
                )
            if stage.warmup_steps + stage.decay_steps > stage.steps:
                raise ValueError(
                    f"stage {number}: warmup_steps {stage.warmup_steps} and decay_steps {stage.decay_steps} "
                    f"do not fit into its {stage.steps} steps"
                )
        return stages

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what is learnt; a run is resumed only under the same."""
        decisive = self.model_dump_json(
            exclude={
                "name",
                "output",
                "device",
                "num_threads",
                "compile",
                "gradient_checkpointing",
                "checkpoint",
                "validation",
                "speech_tokenizer",
                "vocoder",
            }
        )
        return hashlib.sha256(decisive.encode()).hexdigest()

    def stage_at(self, step: int) -> tuple[int, int]:
        """Index of the stage that a step of the run belongs to, and the step within it."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index, step
            step -= stage.steps
        raise ValueError(f"step {step} lies beyond the last stage")

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
            nearest known ones are named) or a value is out of range.
    """
    return make_recipe(_read_settings(Path(path), ()), source=str(path))


def _read_settings(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """Settings of a recipe file, with those of the recipe that it extends."""
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
    return merged(_read_settings(path.parent / base, (*extending, path.resolve())), settings)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with some changed: sections key by key, all else as a whole."""
    result = dict(base)
    for key, value in changes.items():
        known = result.get(key)
        result[key] = merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


def make_recipe(settings: dict[str, Any], source: str = "the recipe") -> Recipe:
    """Checks settings; errors name the key, its value and the remedy."""
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        problems = "\n".join(f"  {problem}" for problem in _problems(error))
        raise ValueError(f"{source} cannot be used:\n{problems}") from error


def _problems(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = list(_settings_at(problem["loc"][:-1]))
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=3) or known
            yield f"{key}: unknown key; did you mean {' or '.join(near)}?"
        elif problem["type"] == "missing":
            yield f"{key}: missing"
        else:
            yield f"{key}: {problem['input']!r} is refused: {problem['msg']}"


def _settings_at(location: tuple[int | str, ...]) -> Iterator[str]:
    """Names of the settings at a place in a recipe."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next((a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")), annotation)
    yield from model.model_fields
