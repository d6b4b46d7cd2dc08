"""The documentation shows what is drawn today, and lists the settings there are."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from smoltolk.training.config import (
    CheckpointSettings,
    DataSettings,
    Recipe,
    StageSettings,
    ValidationSettings,
    load_recipe,
)

pytest.importorskip("matplotlib")
IMAGES = Path("docs/images")


@pytest.fixture(scope="module")
def make_rows():
    spec = importlib.util.spec_from_file_location("make_rows", IMAGES / "make_rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written_in(picture):
    tree = ElementTree.parse(picture)  # noqa: S314 - our own file
    return [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_pictures_of_rows_are_those_of_today_and_all_are_shown(make_rows):
    rows = make_rows.rows()
    shown = Path("docs/data.md").read_text()
    for name, row in rows.items():
        assert written_in(IMAGES / f"row-{name}.svg") == [box.text for box in make_rows.boxes(row)], (
            f"row-{name}.svg is out of date: run python docs/images/make_rows.py"
        )
        assert f"(images/row-{name}.svg)" in shown
    assert {path.name for path in IMAGES.glob("row-*.svg")} == {f"row-{name}.svg" for name in rows}


def test_a_picture_is_drawn_the_same_each_time(make_rows, tmp_path):
    row = make_rows.rows()["alternate"]
    for name in ("a", "b"):
        make_rows.draw(row, tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


TRAINING = Path("docs/training.md").read_text()
SECTIONS = {
    "": Recipe,
    "data.": DataSettings,
    "stages.": StageSettings,
    "validation.": ValidationSettings,
    "checkpoint.": CheckpointSettings,
}


def shown(field):
    """A setting's default as the table has it."""
    if field.is_required():
        return "–"
    default = getattr(field.get_default(call_default_factory=True), "model_dump", lambda: field.default)()
    if isinstance(default, dict):
        return {"kind": default["kind"]}
    return "none" if default is None else list(default) if isinstance(default, tuple) else default


def test_every_setting_of_a_recipe_is_listed_with_its_default():
    table = TRAINING[TRAINING.index("## A recipe") : TRAINING.index("## What training does")]
    listed = {}
    for names, defaults in re.findall(r"^\| (`.+?`) \| (.+?) \| ", table, flags=re.MULTILINE):
        names, values = re.findall(r"`([a-z_.]+)`", names), yaml.safe_load(f"[{defaults.replace('`', '')}]")
        assert len(values) in (1, len(names))
        listed |= dict(zip(names, values * len(names), strict=False))
    assert listed == {
        prefix + name: shown(field)
        for prefix, section in SECTIONS.items()
        for name, field in section.model_fields.items()
        if name not in ("validation", "checkpoint")
    }


def test_the_recipes_of_the_documentation_load(tmp_path):
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", TRAINING, flags=re.DOTALL) if "\noutput:" in block]
    for name, block in zip(("mine", "twin"), blocks, strict=True):
        (tmp_path / f"{name}.yaml").write_text(block)
        assert load_recipe(tmp_path / f"{name}.yaml").stages[0].steps == 1000
