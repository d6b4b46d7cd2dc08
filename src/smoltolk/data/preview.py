"""Preview of training rows: one HTML page that shows and plays what a model would be trained on.

Rows are drawn by `BatchSource`, as in training. To know where each id of a row comes from, they are drawn a second
time, with the same random choices, from stores whose tokens are numbers of places instead: no choice depends on what
the tokens are.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from transformers import PreTrainedTokenizerBase

from smoltolk.data.dataset import TASKS, BatchSource, TaskMixture
from smoltolk.data.interleaving import IGNORED_LABEL
from smoltolk.data.policies import Policy
from smoltolk.data.shard import Tokens
from smoltolk.data.store import Store
from smoltolk.data.text import decode_tokens, tokenizer_fingerprint
from smoltolk.data.utterance import Utterance
from smoltolk.model.configuration_smoltolk import IdSpace
from smoltolk.speech.audio import AudioError, check_output, load_audio, write_atomically
from smoltolk.speech.vocoder import Vocoder

MAX_AUDIO_BYTES = 24_000_000
_RECORDING_RATE_HZ = 16_000
_LENGTH_TOLERANCE_S = 0.1  # how far a recording may differ in length from its utterance
_PLACES = 1 << 31  # numbers of places start here, above all ids


@dataclass(frozen=True)
class PreviewToken:
    """One position of a row.

    Args:
        label: what is shown.
        title: what is told of it beside that.
        is_target: whether it is predicted.
    """

    label: str
    title: str
    is_target: bool


@dataclass(frozen=True)
class PreviewWord:
    """Consecutive tokens of one word; `text` stands above the units of a spoken word, where it is known."""

    tokens: list[PreviewToken]
    text: str | None = None


@dataclass(frozen=True)
class PreviewSpan:
    """Consecutive tokens of one modality of one utterance, or a control token.

    Args:
        kind: "text", "speech" or "control".
        words: the tokens by word.
        utterance_id: the utterance, None for a control token.
        sound: data URI of its audio.
        note: what the sound is, or why there is none.
    """

    kind: str
    words: list[PreviewWord]
    utterance_id: str | None = None
    sound: str | None = None
    note: str = ""


@dataclass(frozen=True)
class PreviewRow:
    """One training row.

    Args:
        task: what it was drawn for.
        spans: its content.
        num_tokens: positions by kind: "text", "speech", "control".
        num_targets: positions with a loss, by modality: "text", "speech", "control" for a predicted switch.
        utterance_ids: the utterances in it, in order.
    """

    task: str
    spans: list[PreviewSpan]
    num_tokens: dict[str, int]
    num_targets: dict[str, int]
    utterance_ids: list[str]

    @property
    def speech_share(self) -> float:
        """Share of speech among the tokens of both modalities."""
        return self.num_tokens["speech"] / max(1, self.num_tokens["text"] + self.num_tokens["speech"])


def preview(
    store: Store,
    output: str | Path,
    *,
    rows: int = 20,
    seed: int = 0,
    row_tokens: int = 256,
    mixture: TaskMixture | None = None,
    policy: Policy | None = None,
    predict_switch: bool = False,
    split: str = "train",
    text_tokenizer: PreTrainedTokenizerBase | None = None,
    vocoder: Vocoder | None = None,
    audio_folder: str | Path | None = None,
    max_audio_bytes: int = MAX_AUDIO_BYTES,
) -> list[PreviewRow]:
    """Draw rows as training would, and write them as one HTML page that needs nothing else.

    Args:
        store: the store.
        output: the page.
        rows: number of rows: those of step 0.
        seed: seed of training.
        row_tokens: length of a row.
        mixture: share of each task; by default the same for interleaved, speech and text rows. Tasks that the store
            has no utterances for are left out.
        policy: which words of interleaved rows are text and which are speech; by default the paper's.
        predict_switch: whether the switch token is a target.
        split: the split to draw from.
        text_tokenizer: the store's; without it a text token is shown by its word, and its id.
        vocoder: what speaks the units of a span.
        audio_folder: where the recordings are that the store names, which are played where there is no vocoder.
        max_audio_bytes: sound that the page takes at most; later spans are silent, and say why.

    Raises:
        ValueError: a setting is out of range, nothing can be drawn, the page cannot be written where it is to be, or
            tokenizer or vocoder are not the store's.
        ImportError: the extra `demo` is not installed.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}: give 1 or more")
    output = Path(output)
    check_output(output)
    if text_tokenizer is not None:
        store.require(text_fingerprint=tokenizer_fingerprint(text_tokenizer))
    if vocoder is not None:
        store.require(speech_fingerprint=vocoder.tokenizer_fingerprint)
    sounds = _Sounds(store, vocoder, None if audio_folder is None else Path(audio_folder), max_audio_bytes)
    mixture = _possible(store, split, mixture or TaskMixture(interleaved=1.0, speech=1.0, text=1.0))
    # Names of control tokens are all that is shown of the id space: it needs to be no model's.
    ids = IdSpace(store.max_text_id + 2, store.num_units or 1, end_of_text_id=store.max_text_id + 1)
    settings: dict[str, Any] = {"mixture": mixture, "ids": ids, "row_tokens": row_tokens, "policy": policy}
    settings |= {"predict_switch": predict_switch, "split": split}
    places = _Places(store)
    source = BatchSource({task: [(store, 1.0)] for task in TASKS}, **settings)
    source_of_places = BatchSource({task: [(places, 1.0)] for task in TASKS}, **settings)
    drawn = []
    for row in range(rows):
        places.clear()
        batch = source.batch(seed, 0, rows=range(row, row + 1))
        where = source_of_places.batch(seed, 0, rows=range(row, row + 1)).input_ids[0].numpy()
        items = _positions(batch.input_ids[0].numpy(), batch.labels[0].numpy(), where, places, ids)
        drawn.append(_row(batch.tasks[0], items, store, text_tokenizer, sounds))
    _write(output, store, drawn, {"seed": seed, "split": split, "row_tokens": row_tokens, "policy": policy})
    return drawn


def _possible(store: Store, split: str, mixture: TaskMixture) -> TaskMixture:
    """The mixture without the tasks that the split has no utterances for."""
    weights = {}
    for task, weight in zip(TASKS, mixture.weights, strict=True):
        needs = {"has_text": task != "speech", "has_speech": task != "text", "is_aligned": task == "interleaved"}
        weights[task] = weight if len(store.ids_of_split(split, **needs)) else 0.0
    if not any(weights.values()):
        wanted = [task for task, weight in zip(TASKS, mixture.weights, strict=True) if weight]
        raise ValueError(
            f"{store.path} has no utterance for {' or '.join(wanted)} rows in the split {split!r}: choose another "
            "split or mixture"
        )
    return TaskMixture(**weights)


class _Drawn(NamedTuple):
    """An utterance in a row: its row in the store, and the places of its tokens in both modalities."""

    row: int
    first_token: int
    first_unit: int
    end: int


class _Places(Store):
    """A store whose tokens are the numbers of their places in what was drawn."""

    def __init__(self, store: Store) -> None:
        self.__dict__.update(store.__dict__)
        self.clear()

    def clear(self) -> None:
        """Number from the start again."""
        self.drawn: list[_Drawn] = []

    def tokens(self, row: int, *, reads_text: bool = False) -> Tokens:
        """The tokens of a row, as places."""
        tokens = super().tokens(row, reads_text=reads_text)
        first_token = self.drawn[-1].end if self.drawn else _PLACES
        first_unit = first_token + len(tokens.text_ids)
        end = first_unit + len(tokens.units)
        self.drawn.append(_Drawn(row, first_token, first_unit, end))
        return tokens._replace(
            text_ids=np.arange(first_token, first_unit, dtype=np.uint32),
            units=np.arange(first_unit, end, dtype=np.uint32),
        )


class _Position(NamedTuple):
    """One position of a row: its id, whether it has a loss, and where it comes from (None for control tokens)."""

    token_id: int
    is_target: bool
    control: str | None
    draw: int = -1
    row: int = -1
    is_speech: bool = False
    number: int = -1  # among the text tokens or the units of the utterance


def _positions(
    input_ids: np.ndarray, labels: np.ndarray, where: np.ndarray, places: _Places, ids: IdSpace
) -> list[_Position]:
    names = {
        ids.bop_id: "begin of prompt",
        ids.eop_id: "end of prompt",
        ids.switch_id: "switch",
        ids.end_of_text_id: "end of text",
        ids.end_of_speech_id: "end of speech",
    }
    found = []
    draw = 0
    for position, (token_id, label, place) in enumerate(zip(input_ids, labels, where, strict=True)):
        # The model predicts each id from those before it: there is no loss on the first.
        is_target = position > 0 and label != IGNORED_LABEL
        if place == token_id:  # what the stream puts between utterances and runs
            found.append(_Position(int(token_id), is_target, names[int(token_id)]))
            continue
        is_speech = token_id >= ids.speech_offset
        place = int(place) - (ids.speech_offset if is_speech else 0)
        while place >= places.drawn[draw].end:
            draw += 1
        drawn = places.drawn[draw]
        number = place - (drawn.first_unit if is_speech else drawn.first_token)
        unit_or_id = int(token_id) - (ids.speech_offset if is_speech else 0)
        found.append(_Position(unit_or_id, is_target, None, draw, drawn.row, is_speech, number))
    return found


def _row(
    task: str,
    positions: list[_Position],
    store: Store,
    tokenizer: PreTrainedTokenizerBase | None,
    sounds: "_Sounds",
) -> PreviewRow:
    spans: list[PreviewSpan] = []
    run: list[_Position] = []
    num_tokens, num_targets = Counter[str](text=0, speech=0, control=0), Counter[str](text=0, speech=0, control=0)
    utterance_ids: dict[int, str] = {}
    for position in [*positions, None]:
        if run and (position is None or position.control or _source(position) != _source(run[-1])):
            utterance = store[run[0].row]
            utterance_ids[run[0].draw] = utterance.id
            spans.append(
                _speech_span(run, utterance, store, sounds)
                if run[0].is_speech
                else _text_span(run, utterance, tokenizer)
            )
            run = []
        if position is None:
            break
        if position.control:
            token = PreviewToken(position.control, f"id {position.token_id}", position.is_target)
            spans.append(PreviewSpan("control", [PreviewWord([token])]))
        else:
            run.append(position)
        kind = "control" if position.control else "speech" if position.is_speech else "text"
        num_tokens[kind] += 1
        loss = {"end of text": "text", "end of speech": "speech"}.get(position.control or "", kind)
        num_targets[loss] += position.is_target
    return PreviewRow(task, spans, dict(num_tokens), dict(num_targets), list(utterance_ids.values()))


def _source(position: _Position) -> tuple[int, bool]:
    return position.draw, position.is_speech


def _text_span(run: list[_Position], utterance: Utterance, tokenizer: PreTrainedTokenizerBase | None) -> PreviewSpan:
    ends = np.cumsum(utterance.array("word_token_counts"), dtype=np.int64)
    texts = (utterance.text or "").split()
    words: list[PreviewWord] = []
    last = -1
    for position in run:
        word = int(ends.searchsorted(position.number, side="right"))
        if tokenizer is not None:
            label = decode_tokens(tokenizer, [np.array([position.token_id])])[0].strip() or "␣"
        else:
            label = texts[word] if word != last else "·"
        title = f"word {word} “{texts[word]}”, text token {position.token_id}"
        if word != last:
            words.append(PreviewWord([]))
            last = word
        words[-1].tokens.append(PreviewToken(label, title, position.is_target))
    return PreviewSpan("text", words, utterance.id)


def _speech_span(run: list[_Position], utterance: Utterance, store: Store, sounds: "_Sounds") -> PreviewSpan:
    texts = (utterance.text or "").split()
    ends = store.tokens(run[0].row).word_unit_ends
    durations = utterance.array("unit_durations")
    rate_hz = store.unit_rate_hz or 1.0
    words: list[PreviewWord] = []
    last = -1
    for position in run:
        word = int(ends.searchsorted(position.number, side="right")) if len(ends) else 0
        milliseconds = 1000 * int(durations[position.number]) / rate_hz
        if word != last:
            words.append(PreviewWord([], texts[word] if len(ends) else None))
            last = word
        title = f"unit {position.token_id}, {milliseconds:.0f} ms"
        words[-1].tokens.append(PreviewToken(str(position.token_id), title, position.is_target))
    sound, note = sounds.of(utterance, run[0].number, run[-1].number + 1)
    return PreviewSpan("speech", words, utterance.id, sound, note)


@dataclass
class _Sounds:
    """Sounds of spans as data URIs, up to a number of bytes."""

    store: Store
    vocoder: Vocoder | None
    audio_folder: Path | None
    max_bytes: int
    num_bytes: int = field(default=0, init=False)

    def of(self, utterance: Utterance, start: int, stop: int) -> tuple[str | None, str]:
        """Sound of the units from `start` to `stop`, and what it is, or why there is none."""
        if self.num_bytes >= self.max_bytes:
            return None, f"no sound: the page has {self.num_bytes / 1e6:.0f} MB of it already"
        durations = utterance.array("unit_durations").astype(np.int64)
        bounds = np.concatenate([[0], np.cumsum(durations)])
        try:
            if self.vocoder is not None:
                units = utterance.array("units")[start:stop].astype(np.int64)
                audio, rate_hz = self.vocoder.decode(units, durations[start:stop]), self.vocoder.sample_rate_hz
                note = "units, spoken by the vocoder"
            elif self.audio_folder is not None:
                audio, rate_hz = self._recording(utterance), _RECORDING_RATE_HZ
                first, end = (
                    int(frame * rate_hz / (self.store.unit_rate_hz or 1.0)) for frame in bounds[[start, stop]]
                )
                audio, note = audio[first:end], f"{utterance.source}, {first / rate_hz:.2f} … {end / rate_hz:.2f} s"
            else:
                return None, ""
        except ValueError as error:
            return None, f"no sound: {error}"
        if not len(audio):
            return None, "no sound: the recording ends before"
        sound = _data_uri(audio, rate_hz)
        self.num_bytes += len(sound)
        return sound, note

    def _recording(self, utterance: Utterance) -> np.ndarray:
        """The recording of a whole utterance."""
        if utterance.source is None:
            raise AudioError("the store does not name its recording")
        folder = (self.audio_folder or Path()).resolve()
        path = (folder / utterance.source).resolve()
        if not path.is_relative_to(folder):  # a store may come from anyone; a page goes to anyone
            raise AudioError(f"{utterance.source} lies outside of the audio folder")
        audio = _load(path)
        seconds = len(audio) / _RECORDING_RATE_HZ
        if abs(seconds - (utterance.seconds or 0.0)) > _LENGTH_TOLERANCE_S:
            raise AudioError(
                f"{utterance.source} lasts {seconds:.2f} s and the utterance {utterance.seconds:.2f} s; the store does "
                "not say which part of it"
            )
        return audio


@lru_cache(maxsize=4)
def _load(path: Path) -> np.ndarray:
    return load_audio(path, sample_rate_hz=_RECORDING_RATE_HZ)


def _data_uri(audio: np.ndarray, rate_hz: int) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio, -1, 1), rate_hz, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write(output: Path, store: Store, rows: Sequence[PreviewRow], settings: Mapping[str, Any]) -> None:
    """Write the page. Texts are anyone's: the template escapes them, and the page may run no scripts."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the preview needs jinja2: pip install 'smoltolk[demo]'") from error
    totals = {
        name: {kind: sum(getattr(row, name)[kind] for row in rows) for kind in ("text", "speech", "control")}
        for name in ("num_tokens", "num_targets")
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = (Path(__file__).parent / "preview.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        store=str(store.path),
        num_utterances=len(store),
        metadata=store.metadata,
        rows=rows,
        totals=totals,
        tasks=Counter(row.task for row in rows),
        settings=settings,
    )
    write_atomically(output, page.encode("utf-8", "xmlcharrefreplace"))
