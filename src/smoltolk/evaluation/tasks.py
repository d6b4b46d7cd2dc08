"""StoryCloze-type tasks: which of two endings follows a prompt, in all four modality pairs."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltolk.data.sources import read_manifest
from smoltolk.evaluation.pairs import PairItem, PairTask, score_task
from smoltolk.evaluation.protocols import CONTINUATION, Candidate, Protocol
from smoltolk.evaluation.results import Average, TaskResult
from smoltolk.evaluation.scoring import ScoringSettings
from smoltolk.model.configuration_smoltolk import IdSpace
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.speech.audio import load_audio, write_atomically
from smoltolk.speech.units import SpeechTokenizer

PAIRS = ("S→S", "T→T", "T→S", "S→T")  # prompt → ending
PARTS = ("prompt", "true", "false")


@dataclass(frozen=True, eq=False)
class ClozeItem:
    """A prompt with its true and a false ending, each in text and in units.

    Args:
        id: what to call the item.
        kind: items of one kind are reported together.
        couple: items of one couple mirror each other and are resampled together; the id when there is none.
        prompt_text: the prompt as text, None when there is none.
        true_text: the true ending as text.
        false_text: the false ending as text.
        prompt_units: the prompt as units (num_units,), None when there are none.
        true_units: the true ending as units.
        false_units: the false ending as units.
        text_ids: ids of the model's text tokenizer by part ("prompt", "true", "false"), which are then scored in the
            place of the texts.
    """

    id: str
    kind: str
    couple: str
    prompt_text: str | None = None
    true_text: str | None = None
    false_text: str | None = None
    prompt_units: np.ndarray | None = None
    true_units: np.ndarray | None = None
    false_units: np.ndarray | None = None
    text_ids: Mapping[str, np.ndarray] = field(default_factory=dict)

    def has(self, pair: str) -> bool:
        """Whether the item has what the pair needs."""
        prompt, ending = pair.split("→")
        return all(self._has_part(part, ending if part != "prompt" else prompt) for part in PARTS)

    def _has_part(self, part: str, side: str) -> bool:
        if side == "S":
            return getattr(self, f"{part}_units") is not None
        return part in self.text_ids or getattr(self, f"{part}_text") is not None

    def ids_of_text(self, part: str, encode_text: Callable[[str], list[int]]) -> np.ndarray:
        """Ids of a part ("prompt", "true", "false") as text, (num_tokens,) int64."""
        found = self.text_ids[part] if part in self.text_ids else encode_text(getattr(self, f"{part}_text") or "")
        return np.asarray(found, dtype=np.int64)


_SCHEMA = pa.schema(
    [
        pa.field(column.name, pa.list_(pa.uint16()) if column.name.endswith("_units") else pa.string())
        for column in fields(ClozeItem)
        if column.name != "text_ids"
    ]
)


def save_cloze(path: Path, items: Iterable[ClozeItem], speech_fingerprint: str | None) -> None:
    """Writes items as Parquet, with the fingerprint of the tokenizer that made the units; atomic.

    Raises:
        ValueError: an item has ids of text, which the file has no place for.
    """
    items = list(items)
    if odd := [item.id for item in items if item.text_ids]:
        raise ValueError(f"item {odd[0]} has text_ids, which {path} has no place for: give its texts")
    schema = _SCHEMA.with_metadata({"smoltolk.speech_tokenizer_fingerprint": json.dumps(speech_fingerprint)})
    table = pa.Table.from_pylist([asdict(item) for item in items], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def load_cloze(
    path: str | Path,
    speech_tokenizer: SpeechTokenizer | None = None,
    *,
    tokenized: Callable[[int], None] | None = None,
) -> list[ClozeItem]:
    """Reads items from Parquet (units inside) or from a JSONL or CSV manifest (audio files beside it).

    A manifest has the columns `id`, `prompt_text`, `true_text`, `false_text`, `prompt_audio`, `true_audio`,
    `false_audio`, and optionally `kind` and `couple`; the text or the audio half may be left out. Audio paths
    are relative to the manifest.

    Args:
        path: the file.
        speech_tokenizer: what makes units of audio; its fingerprint must be that of stored units.
        tokenized: called with the number of audio files that were tokenized since the last call.

    Raises:
        ValueError: a file that cannot be used, a column that is missing, or units of another tokenizer.
        AudioError: an audio file that cannot be used; nothing is left out in silence.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"items {path} is not a file: give a Parquet, JSONL or CSV file of cloze items")
    if path.suffix == ".parquet":
        items = _from_parquet(path, speech_tokenizer)
    else:
        items = _from_manifest(path, speech_tokenizer, tokenized)
    if not items:
        raise ValueError(f"items {path} holds no items")
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"items {path} holds an id twice: ids tell results apart, make them unique")
    return items


def _from_parquet(path: Path, speech_tokenizer: SpeechTokenizer | None) -> list[ClozeItem]:
    table = pq.read_table(path)
    if missing := set(_SCHEMA.names) - set(table.column_names):
        raise ValueError(f"items {path} lacks the columns {', '.join(sorted(missing))}")
    made_by = json.loads((table.schema.metadata or {}).get(b"smoltolk.speech_tokenizer_fingerprint", b"null"))
    if made_by and speech_tokenizer and made_by != speech_tokenizer.fingerprint:
        raise ValueError(
            f"items {path} hold units of the tokenizer {made_by}, but the model's is "
            f"{speech_tokenizer.fingerprint}: make the items again from their audio"
        )
    return [ClozeItem(**row) for row in table.select(_SCHEMA.names).to_pylist()]


def _from_manifest(
    path: Path, speech_tokenizer: SpeechTokenizer | None, tokenized: Callable[[int], None] | None
) -> list[ClozeItem]:
    items = []
    for number, row in enumerate(read_manifest(path), start=1):
        if not row.get("id"):
            raise ValueError(f"items {path}, row {number}: the column id is missing or empty")
        item = {"id": row["id"], "kind": row.get("kind") or "cloze", "couple": row.get("couple") or row["id"]}
        for part in PARTS:
            item[f"{part}_text"] = row.get(f"{part}_text") or None
            if audio := row.get(f"{part}_audio"):
                if speech_tokenizer is None:
                    raise ValueError(f"items {path} name audio, but the model has no speech tokenizer")
                waveform = load_audio(path.parent / audio, sample_rate_hz=speech_tokenizer.sample_rate_hz)
                item[f"{part}_units"] = speech_tokenizer.encode(waveform).units
                if tokenized is not None:
                    tokenized(1)
        items.append(ClozeItem(**item))
    return items


def make_candidate(
    item: ClozeItem, pair: str, ending: str, ids: IdSpace, encode_text: Callable[[str], list[int]]
) -> Candidate:
    """Prompt and one ending ("true" or "false") as ids.

    Raises:
        ValueError: the prompt or the ending is empty.
    """

    def part_ids(name: str, side: str) -> np.ndarray:
        if side == "S":
            return np.asarray(getattr(item, f"{name}_units"), dtype=np.int64) + ids.speech_offset
        return item.ids_of_text(name, encode_text)

    prompt_side, ending_side = pair.split("→")
    prompt, continuation = part_ids("prompt", prompt_side), part_ids(ending, ending_side)
    if not len(prompt) or not len(continuation):
        raise ValueError(f"item {item.id}: its prompt or {ending} ending is empty in {pair}")
    return Candidate(prompt, continuation)


def cloze_task(
    model: SmolTolkForCausalLM,
    items: Sequence[ClozeItem],
    encode_text: Callable[[str], list[int]],
    *,
    pairs: Sequence[str] | None = None,
    protocol: Protocol = CONTINUATION,
) -> PairTask:
    """Cloze items in modality pairs as a task; the pairs of an item come after each other and share its prompts.

    Args:
        model: whose ids to make.
        items: the items.
        encode_text: text → ids, without special tokens.
        pairs: modality pairs; by default those that every item has.
        protocol: what stands before speech prompts in S→T.

    Raises:
        ValueError: an item lacks what a pair needs.
    """
    if pairs is None:
        pairs = [pair for pair in PAIRS if all(item.has(pair) for item in items)]
        if not pairs:
            raise ValueError("no modality pair is complete in all items: name the pairs to evaluate")
    for pair in pairs:
        if pair not in PAIRS:
            raise ValueError(f"pair is {pair!r}: choose from {', '.join(PAIRS)}")
        if lacking := [item.id for item in items if not item.has(pair)]:
            raise ValueError(f"{len(lacking)} items lack text or units for {pair}: {', '.join(lacking[:10])}")

    def make() -> Iterator[PairItem]:
        for number, item in enumerate(items):
            for pair in pairs:
                both = [make_candidate(item, pair, ending, model.ids, encode_text) for ending in ("true", "false")]
                if pair == "S→T" and protocol.num_prefix_tokens:
                    prefix = _prefix(items, number, protocol, model.ids, encode_text)
                    both = [Candidate(np.concatenate([prefix, c.prompt]), c.continuation) for c in both]
                labels = {"pair": pair, "kind": item.kind}
                yield PairItem(item.id, both[0], both[1], labels, item.couple, _content(item))

    kinds = sorted({item.kind for item in items})
    averages = [Average(pair, kind, {"pair": pair, "kind": kind}) for pair in pairs for kind in kinds]
    return PairTask("cloze", make(), averages, is_cloze=True)


def _prefix(
    items: Sequence[ClozeItem],
    number: int,
    protocol: Protocol,
    ids: IdSpace,
    encode_text: Callable[[str], list[int]],
) -> np.ndarray:
    """The last text tokens, end token included, of an ending of another item; a function of seed and number."""
    if len(items) < 2:
        raise ValueError("num_prefix_tokens takes the text of other items, and there is only one")
    generator = np.random.default_rng([protocol.prefix_seed, number])
    other = items[(number + 1 + int(generator.integers(len(items) - 1))) % len(items)]
    ending = other.ids_of_text(("true", "false")[int(generator.integers(2))], encode_text)
    return np.append(ending, ids.end_of_text_id)[-protocol.num_prefix_tokens :]


def _content(item: ClozeItem) -> str:
    """What the item is whatever its tokens: its texts, or its units where there are none."""
    texts = [item.prompt_text, item.true_text, item.false_text]
    if all(text is not None for text in texts):
        return json.dumps(texts)
    units = [getattr(item, f"{part}_units") for part in PARTS]
    return json.dumps([texts, [None if found is None else np.asarray(found).tolist() for found in units]])


def evaluate_cloze(
    model: SmolTolkForCausalLM,
    items: Sequence[ClozeItem],
    encode_text: Callable[[str], list[int]],
    *,
    pairs: Sequence[str] | None = None,
    protocol: Protocol = CONTINUATION,
    settings: ScoringSettings | None = None,
    folder: Path | None = None,
    checkpoint: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Scores both endings of every item in every pair.

    Args:
        model: the model.
        items: the items.
        encode_text: text → ids, without special tokens.
        pairs: modality pairs; by default those that every item has.
        protocol: which tokens count, and how.
        settings: sizes of batches, precision, what becomes of long prompts.
        folder: where chunks of scores are kept, see `score_task`.
        checkpoint: identity of the model, needed with a folder.
        progress: called with the number of sequences scored since the last call.

    Raises:
        ValueError: an item lacks what a pair needs, or is longer than the model's positions.
    """
    task = cloze_task(model, items, encode_text, pairs=pairs, protocol=protocol)
    return score_task(
        model, task, protocol=protocol, settings=settings, folder=folder, checkpoint=checkpoint, progress=progress
    )
