"""The documentation's pictures show what is drawn today."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

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
