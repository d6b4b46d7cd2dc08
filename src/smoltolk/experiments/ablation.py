"""Ablations: a recipe with the section `ablation`, its variants, and the recipe of each of their runs."""

import copy
import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from smoltolk.training.config import (
    ABLATION,
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    Recipe,
    StageSettings,
    Strict,
    checked,
    make_recipe,
    read_settings,
)

PLAIN = "smoltolk"  # the variant that is the recipe itself
RATE = "stages.-1.learning_rate"
DEFAULT_WARMUP: int = StageSettings.model_fields["warmup_steps"].default
FEWEST_RATES = 3  # with fewer the best can only lie at an edge

Settings = dict[str, Any]
Value = bool | int | float | str | None

# What only a layer selector has, and what stands there without one.
SELECTOR: Settings = {
    "selector_entropy_weight": 0.0,
    "selector_input": "static",
    "selector_hidden_size": None,
    "selector_level_size": None,
    "selector_level_hidden_size": None,
}


class VariantSettings(Strict):
    """A variant of one's own; or, under the name of one of the paper's, what that one has of its own.

    Args:
        like: the variant that it starts from, with that one's sweep and rates.
        changes: settings of the recipe that it changes. Sections are merged key by key; a key may be dotted, with a
            stage by its number from 0, `-1` for the last and `*` for all: `stages.*.clip_norm`.
        sweep: values of more settings, by dotted key, that are tried with every learning rate.
        learning_rates: rates to try in place of those of all variants.
    """

    like: str | None = None
    changes: Settings = Field(default_factory=dict)
    sweep: dict[str, Annotated[list[Value], Field(min_length=1)]] = Field(default_factory=dict)
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)] | None = None

    @field_validator("learning_rates")
    @classmethod
    def _rates_differ(cls, rates: list[float] | None) -> list[float] | None:
        return rates and _unique(rates)

    @field_validator("sweep")
    @classmethod
    def _is_no_sweep_of_rates(cls, sweep: dict[str, list[Value]]) -> dict[str, list[Value]]:
        if RATE in sweep:
            raise ValueError(f"{RATE} is what learning_rates are: give them there")
        return {key: _unique(values) for key, values in sweep.items()}


class CurveSettings(Strict):
    """How accuracy is followed while runs go on, on some of the fresh items; nothing is chosen by it.

    Args:
        every_steps: steps between points.
        couples: couples of items that are scored, spread over the file.
        reach: shares of right answers; the table says how many tokens and seconds it takes to reach them.
    """

    every_steps: PositiveInt
    couples: PositiveInt = 50
    reach: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = Field(default=[0.75])


class AblationSettings(Strict):
    """What to compare, and how.

    In every text of the recipe and of the items' paths, `{seed}` stands for the seed.

    Args:
        seeds: the recipe's seeds; settings are chosen on the first.
        development: cloze items that each variant's settings are chosen on.
        fresh: cloze items of the table; only the chosen runs are scored on them, when nothing is left to train.
        learning_rates: peak rates of the last stage that every variant tries.
        variants: the paper's variants to run, in order; by default all that are not the recipe itself under another
            name. Own variants that it does not name come after them.
        more: variants of one's own, by name.
        budgets: "tokens" gives every variant the recipe's steps, "flops" the training FLOPs of the base variant.
        base: the variant that the others are compared with.
        curve: how accuracy is followed while runs go on, None for not at all.
    """

    seeds: list[NotNegativeInt] = Field(default=[0, 1, 2], min_length=1)
    development: str
    fresh: str
    learning_rates: list[PositiveFloat]
    variants: Annotated[list[str], Field(min_length=1)] | None = None
    more: dict[str, VariantSettings] = Field(default_factory=dict)
    budgets: list[Literal["tokens", "flops"]] = Field(default=["tokens", "flops"])
    base: str = PLAIN
    curve: CurveSettings | None = None

    @field_validator("seeds", "variants", "budgets")
    @classmethod
    def _differ(cls, values: list[Any] | None) -> list[Any] | None:
        return values and _unique(values)

    @field_validator("learning_rates")
    @classmethod
    def _are_enough(cls, rates: list[float]) -> list[float]:
        if len(_unique(rates)) < FEWEST_RATES:
            raise ValueError(f"give {FEWEST_RATES} rates or more: the best of fewer always lies at an edge")
        return rates

    @field_validator("budgets")
    @classmethod
    def _begin_with_tokens(cls, budgets: list[str]) -> list[str]:
        if "tokens" not in budgets:
            raise ValueError("add tokens: rates are chosen at equal tokens")
        return sorted(budgets, reverse=True)

    @field_validator("more")
    @classmethod
    def _can_be_folders(cls, more: dict[str, VariantSettings]) -> dict[str, VariantSettings]:
        for name in more:
            if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
                raise ValueError(f"{name!r} is to be the name of a folder: take letters, digits, '-', '+', '_' and '.'")
        return more

    @model_validator(mode="after")
    def _items_differ(self) -> "AblationSettings":
        if self.development == self.fresh:
            raise ValueError(
                f"development and fresh are both {self.fresh}: what settings were chosen on is not fresh; give other "
                "items"
            )
        return self


class AblationSection(Strict):
    """The section as it stands in a recipe."""

    ablation: AblationSettings


@dataclass(frozen=True)
class Variant:
    """A variant of a recipe.

    Args:
        name: what to call it.
        settings: the settings of its recipe, with `{seed}` for the seed.
        sweep: what it tries: values by dotted key, the learning rate first.
        explicit: keys that it was given by name.
    """

    name: str
    settings: Settings
    sweep: list[dict[str, Value]]
    explicit: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ablation:
    """An ablation: its settings, its recipe, its variants.

    Args:
        source: the file.
        settings: the section `ablation`.
        recipe: the settings of the recipe without that section.
        variants: the variants, in order.
    """

    source: str
    settings: AblationSettings
    recipe: Settings
    variants: list[Variant] = field(default_factory=list)

    @property
    def first_seed(self) -> int:
        """The seed that settings are chosen on."""
        return self.settings.seeds[0]

    @property
    def base(self) -> Variant:
        """The variant that others are compared with."""
        return next(variant for variant in self.variants if variant.name == self.settings.base)

    def recipe_of(
        self, variant: Variant, setting: Mapping[str, Value], seed: int, output: str | Path, steps: int | None = None
    ) -> Recipe:
        """The recipe of a run.

        Args:
            variant: the variant.
            setting: what of its sweep it runs with.
            seed: the seed.
            output: folder of the run.
            steps: steps of the last stage, for another number than the variant's.

        Raises:
            ValueError: the settings are no recipe.
        """
        source = f"{self.source}, variant {variant.name}"
        settings = change(variant.settings, dict(setting), source)
        settings = without_selector(settings, variant.explicit | set(setting), source)
        settings |= {"seed": seed, "output": str(output), "name": f"{settings.get('name', '')} {variant.name}".strip()}
        if steps is not None:
            settings = with_last_steps(settings, steps)
        return make_recipe(fill_in(settings, seed), source=source)

    def development(self, seed: int) -> Path:
        """The items that settings are chosen on."""
        return Path(fill_in(self.settings.development, seed))

    def fresh(self, seed: int) -> Path:
        """The items of the table."""
        return Path(fill_in(self.settings.fresh, seed))


def load_ablation(path: str | Path) -> Ablation:
    """Reads a recipe with the section `ablation`, and checks the recipe of every run of its sweeps.

    Raises:
        ValueError: a file is missing or not YAML, a key is unknown or missing, a value is out of range, or a variant
            is unknown, starts from itself or changes nothing; names the key, its value and the remedy.
    """
    recipe = _apart(read_settings(Path(path)))
    if ABLATION not in recipe:
        raise ValueError(f"recipe {path} has no section {ABLATION}: add one, or run it with smoltolk train")
    settings = checked(AblationSection, {ABLATION: recipe.pop(ABLATION)}, str(path)).ablation
    ablation = Ablation(str(path), settings, recipe)
    plain = Variant(PLAIN, recipe, [])
    fingerprint = ablation.recipe_of(plain, {}, ablation.first_seed, "").fingerprint
    maker = _VariantMaker(ablation)
    names = settings.variants or [PLAIN, *(name for name in PAPER if name != PLAIN)]
    for name in [*names, *(name for name in settings.more if name not in names)]:
        if settings.variants is None and name in PAPER and maker.is_impossible(name):
            continue
        variant = maker.make(name)
        recipes = [ablation.recipe_of(variant, setting, ablation.first_seed, "") for setting in variant.sweep]
        is_same = ablation.recipe_of(variant, {}, ablation.first_seed, "").fingerprint == fingerprint
        if is_same and name != PLAIN and name not in settings.more:
            if settings.variants is None:
                continue
            raise ValueError(f"{path}: variant {name} changes nothing in this recipe: leave it out of variants")
        if len({setting_name(setting) for setting in variant.sweep}) < len(recipes):
            raise ValueError(f"{path}: variant {name} sweeps values that look alike as folders: make them differ more")
        ablation.variants.append(variant)
    found = [variant.name for variant in ablation.variants]
    if settings.base not in found:
        raise ValueError(f"{path}: base is {settings.base!r}: choose one of the variants, {', '.join(found)}")
    return ablation


class _VariantMaker:
    """Makes variants by name."""

    def __init__(self, ablation: Ablation) -> None:
        self.source, self.recipe = ablation.source, ablation.recipe
        self.settings = ablation.settings

    def make(self, name: str, on_the_way: tuple[str, ...] = ()) -> Variant:
        own = self.settings.more.get(name)
        if name in on_the_way:
            raise ValueError(f"{self.source}: variant {name} is like itself, by way of {', '.join(on_the_way)}")
        if name in PAPER:
            if own and own.like is not None:
                raise ValueError(f"{self.source}: {name} is one of the paper's variants: leave out its like")
            settings = PAPER[name](copy.deepcopy(self.recipe), f"{self.source}, variant {name}")
            start = Variant(name, settings, self._sweep({}, self.settings.learning_rates))
        elif own:
            start = self.make(own.like or PLAIN, (*on_the_way, name))
        else:
            known = [*PAPER, *self.settings.more]
            near = difflib.get_close_matches(name, known, n=3) or known
            raise ValueError(f"{self.source}: variant {name} is unknown; did you mean {' or '.join(near)}?")
        if own is None:
            return start
        values = {key: list(dict.fromkeys(s[key] for s in start.sweep)) for key in start.sweep[0]}
        rates = own.learning_rates or values.pop(RATE)
        values.pop(RATE, None)
        return Variant(
            name,
            change(start.settings, own.changes, f"{self.source}, variant {name}"),
            self._sweep(values | own.sweep, rates),
            start.explicit | set(_dotted(own.changes)),
        )

    def is_impossible(self, name: str) -> bool:
        """Whether one of the paper's variants means nothing for this recipe."""
        return name == "one-stage" and not _has_frozen_stage(self.recipe) and name not in self.settings.more

    @staticmethod
    def _sweep(values: Mapping[str, list[Value]], rates: list[Any]) -> list[dict[str, Value]]:
        grid = {RATE: sorted(rates), **values}
        return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]


# ---- the paper's variants


def _model(**changes: Value) -> Callable[[Settings, str], Settings]:
    """A variant that is another architecture."""

    def make(recipe: Settings, source: str) -> Settings:
        return change(recipe, {"model": changes}, source)

    return make


def _one_stage(recipe: Settings, source: str) -> Settings:
    """The tokens of the first stage, which trains the speech parts alone, are given to the last one."""
    if not _has_frozen_stage(recipe):
        raise ValueError(
            f"{source}: the recipe has no first stage that trains speech alone before another: leave it out"
        )
    first, *_, last = recipe["stages"]
    tokens, tokens_per_step = (stage["rows_per_step"] * stage["row_tokens"] for stage in (first, last))
    steps = last["steps"] + round(first["steps"] * tokens / tokens_per_step)
    return with_last_steps(recipe | {"stages": recipe["stages"][1:]}, steps)


def _has_frozen_stage(recipe: Settings) -> bool:
    stages: list[Settings] = recipe["stages"]
    return len(stages) > 1 and stages[0]["train"] == "speech"


# The paper's ablation table; adapter-layers-N has N layers in both adapters.
PAPER: dict[str, Callable[[Settings, str], Settings]] = {
    PLAIN: _model(),
    "early-fusion": _model(
        num_input_adapter_layers=0, num_output_adapter_layers=0, layer_mixing="last", speech_residual=False
    ),
    "no-input-adapter": _model(num_input_adapter_layers=0),
    "no-output-adapter": _model(num_output_adapter_layers=0),
    "last-layer": _model(layer_mixing="last"),
    "static-weights": _model(layer_mixing="static"),
    "no-residual": _model(speech_residual=False),
    "one-stage": _one_stage,
    **{f"adapter-layers-{n}": _model(num_input_adapter_layers=n, num_output_adapter_layers=n) for n in (0, 1, 2, 4)},
}


# ---- changing settings


def change(settings: Settings, changes: Settings, source: str) -> Settings:
    """Settings with some changed; see `VariantSettings` for the keys.

    Raises:
        ValueError: a key leads nowhere.
    """
    result = copy.deepcopy(settings)
    for key, value in changes.items():
        _put(result, str(key).split("."), value, f"{source}: {key}")
    return result


def _put(node: Any, path: list[str], value: Any, where: str) -> None:
    first, *rest = path
    if isinstance(node, list):
        is_number = re.fullmatch(r"-?\d+", first) and -len(node) <= int(first) < len(node)
        if first != "*" and not is_number:
            raise ValueError(f"{where}: {first!r} is none of {len(node)}: give a number from 0, -1 for the last, or *")
        places: list[Any] = list(range(len(node))) if first == "*" else [int(first)]
    elif isinstance(node, dict):
        places = [first]
    else:
        raise ValueError(f"{where}: there are no settings before {first!r}: check the key")
    for place in places:
        if rest:
            if isinstance(node, dict) and node.get(place) is None:
                node[place] = {}
            _put(node[place], rest, value, where)
        elif isinstance(value, dict) and isinstance(
            node.get(place) if isinstance(node, dict) else node[place], dict | list
        ):
            for key, part in value.items():
                _put(node[place], str(key).split("."), part, f"{where}.{key}")
        else:
            node[place] = copy.deepcopy(value)


def _apart(value: Any) -> Any:
    """The value without parts that are one object, as YAML's aliases are: to change one is not to change the other."""
    if isinstance(value, list):
        return [_apart(part) for part in value]
    return {key: _apart(part) for key, part in value.items()} if isinstance(value, dict) else value


def _dotted(changes: Settings, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all that is changed."""
    for key, value in changes.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def without_selector(settings: Settings, explicit: frozenset[str] | set[str], source: str) -> Settings:
    """Settings that leave out what only a layer selector has, where there is none.

    Args:
        settings: settings of a recipe.
        explicit: dotted keys that were given by name: leaving them out in silence would mislead.
        source: what to call the settings.

    Raises:
        ValueError: such a key was given by name.
    """
    model = settings.get("model")
    if not isinstance(model, dict) or model.get("layer_mixing", "selected") == "selected":
        return settings
    for key, neutral in SELECTOR.items():
        if f"model.{key}" in explicit and model[key] != neutral:
            raise ValueError(
                f"{source}: model.{key} is {model[key]!r}, but with layer_mixing {model['layer_mixing']!r} there is no "
                "selector: leave it out"
            )
    return settings | {"model": {key: value for key, value in model.items() if key not in SELECTOR}}


def with_last_steps(settings: Settings, steps: int) -> Settings:
    """Settings with another number of steps in the last stage, and its decay in proportion."""
    *stages, last = settings["stages"]
    decay = round(last.get("decay_steps", 0) * steps / last["steps"])
    warmup = min(last.get("warmup_steps", DEFAULT_WARMUP), steps)
    changes = {"steps": steps, "warmup_steps": warmup, "decay_steps": min(decay, steps - warmup)}
    return settings | {"stages": [*stages, last | changes]}


def fill_in(value: Any, seed: int) -> Any:
    """The value with the seed in place of every `{seed}` in its texts."""
    if isinstance(value, str):
        return value.replace("{seed}", str(seed))
    if isinstance(value, list):
        return [fill_in(part, seed) for part in value]
    if isinstance(value, dict):
        return {key: fill_in(part, seed) for key, part in value.items()}
    return value


def setting_name(setting: Mapping[str, Value]) -> str:
    """A name for the folder of a setting: `rate=0.0015`, and what else is swept."""
    return ",".join(f"{_shown(key)}={_shown(value)}" for key, value in setting.items())


def _shown(value: Value) -> str:
    if value == RATE:
        return "rate"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]", "_", text.replace("*", "all"))


def _unique(values: list[Any]) -> list[Any]:
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"{twice[0]} stands there twice: leave it out once")
    return values
