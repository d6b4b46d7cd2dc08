"""StoryCloze-type tasks: which of two endings follows a prompt, in all four modality pairs."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltolk.data.sources import read_manifest
from smoltolk.evaluation.results import ClozeResult, PairResult
from smoltolk.evaluation.scoring import CONTINUATION, Candidate, Protocol, score_candidates
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

    def has(self, pair: str) -> bool:
        """Whether the item has what the pair needs."""
        prompt, ending = (("units" if side == "S" else "text") for side in pair.split("→"))
        needed = [f"prompt_{prompt}", f"true_{ending}", f"false_{ending}"]
        return all(getattr(self, name) is not None for name in needed)


_SCHEMA = pa.schema(
    [
        pa.field(field.name, pa.list_(pa.uint16()) if field.name.endswith("_units") else pa.string())
        for field in fields(ClozeItem)
    ]
)


def save_cloze(path: Path, items: Iterable[ClozeItem], speech_fingerprint: str | None) -> None:
    """Writes items as Parquet, with the fingerprint of the tokenizer that made the units; atomic."""
    schema = _SCHEMA.with_metadata({"smoltolk.speech_tokenizer_fingerprint": json.dumps(speech_fingerprint)})
    table = pa.Table.from_pylist([asdict(item) for item in items], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def load_cloze(path: str | Path, speech_tokenizer: SpeechTokenizer | None = None) -> list[ClozeItem]:
    """Reads items from Parquet (units inside) or from a JSONL or CSV manifest (audio files beside it).

    A manifest has the columns `id`, `prompt_text`, `true_text`, `false_text`, `prompt_audio`, `true_audio`,
    `false_audio`, and optionally `kind` and `couple`; the text or the audio half may be left out. Audio paths
    are relative to the manifest.

    Args:
        path: the file.
        speech_tokenizer: what makes units of audio; its fingerprint must be that of stored units.

    Raises:
        ValueError: a file that cannot be used, a column that is missing, or units of another tokenizer.
        AudioError: an audio file that cannot be used; nothing is left out in silence.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"items {path} is not a file: give a Parquet, JSONL or CSV file of cloze items")
    items = (
        _from_parquet(path, speech_tokenizer) if path.suffix == ".parquet" else _from_manifest(path, speech_tokenizer)
    )
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


def _from_manifest(path: Path, speech_tokenizer: SpeechTokenizer | None) -> list[ClozeItem]:
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
        items.append(ClozeItem(**item))
    return items


def make_candidate(
    item: ClozeItem, pair: str, ending: str, ids: IdSpace, encode_text: Callable[[str], list[int]]
) -> Candidate:
    """Prompt and one ending ("true" or "false") as ids, with one switch where the modality changes."""

    def part_ids(name: str, side: str) -> np.ndarray:
        if side == "S":
            return np.asarray(getattr(item, f"{name}_units"), dtype=np.int64) + ids.speech_offset
        return np.array(encode_text(getattr(item, f"{name}_text")), dtype=np.int64)

    prompt_side, ending_side = pair.split("→")
    pieces = [part_ids("prompt", prompt_side)]
    if prompt_side != ending_side:
        pieces.append(np.array([ids.switch_id]))
    start = sum(len(piece) for piece in pieces)
    continuation = part_ids(ending, ending_side)
    if not len(pieces[0]) or not len(continuation):
        raise ValueError(f"item {item.id}: its prompt or {ending} ending is empty in {pair}")
    return Candidate(np.concatenate([*pieces, continuation]), start)


def evaluate_cloze(
    model: SmolTolkForCausalLM,
    items: Sequence[ClozeItem],
    encode_text: Callable[[str], list[int]],
    *,
    pairs: Sequence[str] | None = None,
    protocol: Protocol = CONTINUATION,
    batch_size: int = 48,
    progress: Callable[[int], None] | None = None,
) -> ClozeResult:
    """Scores both endings of every item in every pair.

    Args:
        model: the model.
        items: the items.
        encode_text: text → ids, without special tokens.
        pairs: modality pairs; by default those that every item has.
        protocol: which tokens count, and how.
        batch_size: sequences in one forward.
        progress: called with the number of sequences scored since the last call.

    Raises:
        ValueError: an item lacks what a pair needs, or is longer than the model's positions.
    """
    if pairs is None:
        pairs = [pair for pair in PAIRS if all(item.has(pair) for item in items)]
        if not pairs:
            raise ValueError("no modality pair is complete in all items: name the pairs to evaluate")
    results = []
    for pair in pairs:
        if pair not in PAIRS:
            raise ValueError(f"pair is {pair!r}: choose from {', '.join(PAIRS)}")
        if lacking := [item.id for item in items if not item.has(pair)]:
            raise ValueError(f"{len(lacking)} items lack text or units for {pair}: {', '.join(lacking[:10])}")
        candidates = [
            make_candidate(item, pair, ending, model.ids, encode_text) for item in items for ending in ("true", "false")
        ]
        for i, candidate in enumerate(candidates):
            if len(candidate.ids) > model.config.max_position_embeddings:
                raise ValueError(
                    f"item {items[i // 2].id} has {len(candidate.ids)} tokens in {pair}, more than the model's "
                    f"{model.config.max_position_embeddings} positions: nothing is cut, leave it out"
                )
        scores = score_candidates(model, candidates, protocol, batch_size=batch_size, progress=progress)
        results.append(
            PairResult(
                pair=pair,
                ids=[item.id for item in items],
                kinds=[item.kind for item in items],
                couples=[item.couple for item in items],
                true_scores=scores[0::2],
                false_scores=scores[1::2],
                tie_credit=protocol.tie_credit,
            )
        )
    return ClozeResult(protocol=protocol.name, pairs=results)
