"""HTML pages that need nothing else: pictures travel within them, with the numbers underneath."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from smoltolk.speech.audio import check_output, write_atomically

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e0b", "#7a52a3", "#5f6b6d", "#a0522d", "#008b8b")
NEEDED = "the page needs matplotlib and Jinja, which are not installed: pip install 'smoltolk[demo]'"


@dataclass(frozen=True)
class PageTable:
    """Numbers as they are printed.

    Args:
        columns: their names.
        rows: cells of each row.
        caption: what they are.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page, from top to bottom.

    Args:
        title: its heading, empty for none.
        picture: what `data_uri` gave, None for none.
        tables: the numbers.
        text: a paragraph, empty for none.
    """

    title: str = ""
    picture: str | None = None
    tables: Sequence[PageTable] = ()
    text: str = ""


def save_page(output: Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes a page; atomic.

    Raises:
        ImportError: Jinja is not installed.
        OSError: the page cannot be written.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(NEEDED) from error
    environment = Environment(loader=PackageLoader("smoltolk", ""), autoescape=True, undefined=StrictUndefined)
    write_atomically(output, environment.get_template("page.html").render(title=title, sections=sections).encode())
    return output


def path_of_numbers(output: Path) -> Path:
    """The JSON file beside a page, which has its name.

    Raises:
        ValueError: the page itself would be that file.
    """
    path = output.with_suffix(".json")
    if path == output:
        raise ValueError(
            f"output is {output}, which is where the numbers go: give a page a name such as {output.stem}.html"
        )
    return path


def check_page(output: Path) -> None:
    """Says before long work that a page, or the numbers beside it, could not be written.

    Raises:
        ValueError: as `check_output` and `path_of_numbers` do.
    """
    check_output(output)
    path_of_numbers(output)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(NEEDED) from error
    return Figure(figsize=(width, height), layout="constrained")


def colours() -> Iterator[str]:
    """Colours of lines, again and again."""
    return cycle(COLOURS)


def data_uri(figure: Any) -> str:
    """A matplotlib figure as the address of a picture that lies in the page itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
