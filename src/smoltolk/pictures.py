"""What the pages with pictures share: colours, and pictures that travel within a page."""

import base64
import io
from collections.abc import Iterator
from itertools import cycle
from typing import Any

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e0b", "#7a52a3", "#5f6b6d", "#a0522d", "#008b8b")


def colours() -> Iterator[str]:
    """Colours of lines, again and again."""
    return cycle(COLOURS)


def data_uri(figure: Any) -> str:
    """A matplotlib figure as the address of a picture that lies in the page itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
