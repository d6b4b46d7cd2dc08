"""Draws the pictures of rows in docs/data.md, from rows as training draws them: `python docs/images/make_rows.py`."""

from collections.abc import Iterator
from itertools import cycle, groupby, repeat
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from smoltolk.data.interleaving import Row, interleaved_row, speech_row, synthesis_row, text_row, transcription_row
from smoltolk.data.policies import CoinPolicy, PoissonPolicy, SentencePolicy, SpanPolicy
from smoltolk.data.shard import Tokens
from smoltolk.model.configuration_smoltolk import IdSpace

STORY = "The sun went down. A fox came out of the wood and looked around. Nothing moved. It ran across the road."
WORDS = STORY.split()
UNITS_OF_WORD = [1, 3, 3, 4, 1, 4, 3, 2, 1, 1, 3, 2, 4, 5, 4, 4, 1, 3, 4, 1, 4]
# A text token for each word, and so many units: the id tells the word.
IDS = IdSpace(text_vocab_size=len(WORDS) + 1, num_units=len(WORDS), end_of_text_id=len(WORDS))


def utterance(first: int, last: int) -> Tokens:
    """Some words of the story as an utterance."""
    words, num_units = np.arange(first, last + 1, dtype=np.uint32), UNITS_OF_WORD[first : last + 1]
    return Tokens(
        text_ids=words,
        word_token_counts=np.ones_like(words),
        units=np.repeat(words, num_units),
        word_unit_ends=np.cumsum(num_units, dtype=np.uint32),
        text=" ".join(WORDS[first : last + 1]).encode(),
    )


TEXT, SPEECH, CONTROL, LOSS = "#cfe2f3", "#f6b26b", "#e3e3e3", "#444444"
CONTROL_NAMES = {
    IDS.bop_id: "bop",
    IDS.eop_id: "eop",
    IDS.switch_id: "⇄",
    IDS.end_of_text_id: "end",
    IDS.end_of_speech_id: "end",
}
WIDTH = 52.0  # of a picture, in letters


class Box(NamedTuple):
    """What is drawn for a token, or for the units of a word.

    Args:
        width: its width, in letters.
        num_tokens: how many tokens it stands for.
        color: its colour.
        text: what stands in it.
        is_target: whether it is predicted.
    """

    width: float
    num_tokens: int
    color: str
    text: str
    is_target: bool


def rows() -> dict[str, Row]:
    """The row in each picture."""
    length = 120
    story = utterance(0, len(WORDS) - 1)
    sentences = [utterance(0, 3), utterance(14, 15), utterance(16, 20)]

    def interleaved(policy: SpanPolicy | PoissonPolicy | CoinPolicy | SentencePolicy, seed: int) -> Row:
        return interleaved_row(repeat(story), np.random.default_rng(seed), IDS, policy, length)

    return {
        # The paper's runs are longer than a picture.
        "alternate": interleaved(SpanPolicy(text_words=(4, 7), speech_words=(2, 4)), 0),
        "poisson": interleaved(PoissonPolicy(mean_words=3.0, share=0.3), 0),
        "coin": interleaved(CoinPolicy(speech_share=0.5), 4),
        "sentence": interleaved(SentencePolicy(), 0),
        "speech": speech_row(repeat(story), np.random.default_rng(0), IDS, length),
        "text": text_row(repeat(story), np.random.default_rng(0), IDS, length),
        "transcription": transcription_row(cycle(sentences), np.random.default_rng(0), IDS, length),
        "synthesis": synthesis_row(cycle(sentences), np.random.default_rng(0), IDS, length),
    }


def boxes(row: Row) -> Iterator[Box]:
    """The tokens of a row that fit into a picture."""
    used = 0.0
    tokens = zip(row.input_ids.tolist(), (row.labels >= 0).tolist(), strict=True)
    for (token, is_target), same in groupby(tokens):
        is_speech = token >= IDS.speech_offset
        is_control = IDS.text_vocab_size <= token < IDS.speech_offset
        name = CONTROL_NAMES.get(token) or WORDS[token - IDS.speech_offset if is_speech else token]
        color = CONTROL if is_control else SPEECH if is_speech else TEXT
        box = Box(0.72 * len(name) + 0.7, len(list(same)), color, name, is_target)
        if used + box.width > WIDTH:
            return
        used += box.width
        yield box


def draw(row: Row, path: Path) -> None:
    """A row as a strip of boxes, spoken words striped into units; the line below says where there is a loss."""
    figure = Figure(figsize=(9, 0.52))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1, WIDTH + 0.1), ylim=(-0.75, 1.05))
    axes.axis("off")
    at = 0.0
    for is_target, run in groupby(boxes(row), key=lambda box: box.is_target):
        begins_at = at
        for box in run:
            axes.add_patch(Rectangle((at, 0), box.width, 1, facecolor=box.color, edgecolor="none"))
            for line in range(box.num_tokens):  # between tokens, wider between words
                left = at + line * box.width / box.num_tokens
                axes.plot([left, left], [0, 1], color="white", linewidth=0.6 if line else 1.6)
            style = "italic" if box.color == SPEECH else "normal"
            axes.text(at + box.width / 2, 0.46, box.text, ha="center", va="center", fontsize=8.5, style=style)
            at += box.width
        if is_target:
            axes.add_patch(Rectangle((begins_at, -0.42), at - begins_at, 0.16, facecolor=LOSS, edgecolor="none"))
    # Words stay text in the picture; no date, no random names: the same row gives the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rows", "font.family": "sans-serif"}):
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def main() -> None:
    """Draws all pictures beside this script."""
    for name, row in rows().items():
        draw(row, Path(__file__).with_name(f"row-{name}.svg"))


if __name__ == "__main__":
    main()
