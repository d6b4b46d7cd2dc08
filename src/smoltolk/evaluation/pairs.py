"""Tasks of pairs: is the right sequence likelier than the wrong one. Scored lazily, in chunks that can be resumed."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltolk.evaluation.protocols import CONTINUATION, Candidate, Protocol, lay_out
from smoltolk.evaluation.results import (
    CHUNKS_FOLDER,
    RESERVED_COLUMNS,
    RESULT_FILE,
    Average,
    TaskResult,
    check_same,
    first_difference,
)
from smoltolk.evaluation.scoring import ScoringSettings, score_candidates
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.speech.audio import write_atomically

_KEY = b"smoltolk.items"


@dataclass(frozen=True, eq=False)
class PairItem:
    """Two sequences, the first of which should be the likelier one.

    Args:
        id: what to call the item; with the labels it names it in the whole set.
        positive: the right sequence.
        negative: the wrong one.
        labels: what averages choose and group items by, such as voice or type; the same names in all items.
        couple: items of one couple are resampled together; the id when empty.
        content: what makes the item itself whatever its tokens, such as its texts; the tokens when empty.
    """

    id: str
    positive: Candidate
    negative: Candidate
    labels: Mapping[str, str] = field(default_factory=dict)
    couple: str = ""
    content: str = ""


@dataclass(frozen=True, eq=False)
class PairTask:
    """A set of pairs and what is said about it.

    Args:
        name: what to call it in results.
        items: the items; gone over once, so that a generator will do, which makes them as they are needed.
        averages: the numbers to report.
        split: part of the benchmark, None where it has none.
        is_cloze: whether ties count as in StoryCloze, where a protocol tells them apart.
    """

    name: str
    items: Iterable[PairItem]
    averages: Sequence[Average]
    split: str | None = None
    is_cloze: bool = False


def score_task(
    model: SmolTolkForCausalLM,
    task: PairTask,
    *,
    protocol: Protocol = CONTINUATION,
    settings: ScoringSettings | None = None,
    folder: Path | None = None,
    checkpoint: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Scores both sequences of every item.

    Items are made and scored a chunk at a time: of those done only ids, labels and scores stay in memory.

    Args:
        model: the model.
        task: the items.
        protocol: which tokens count, and how.
        settings: sizes of batches, precision, what becomes of long prompts.
        folder: where chunks of scores are kept, so that a call that was stopped goes on; None for nowhere. It is the
            folder to save the result to, which removes them.
        checkpoint: identity of the model, see `checkpoint_fingerprint`; needed with a folder.
        progress: called with the number of sequences scored since the last call.

    Raises:
        ValueError: there are no items, one cannot be scored, or the folder holds other scores.
    """
    settings = settings or ScoringSettings()
    protocol = protocol.for_task(is_cloze=task.is_cloze)
    precision = settings.precision(model)
    identity = {
        "task": task.name,
        "split": task.split,
        "protocol": protocol.name,
        "knobs": protocol.knobs(),
        "precision": precision,
        "truncates_prompts": settings.truncates_prompts,
        "chunk_items": settings.chunk_items,
        "batch_size": settings.batch_size,  # batches of other sizes round otherwise: chunks of both do not mix
        "max_batch_tokens": settings.max_batch_tokens,
        "checkpoint": checkpoint,
    }
    chunks = None if folder is None else _open_chunks(folder, identity)
    items_digest, tokens_digest = hashlib.sha256(), hashlib.sha256()
    tables: list[pa.Table] = []
    num_truncated = 0
    for number, chunk in enumerate(_chunked(task.items, settings.chunk_items)):
        fitted = [_fit(item, model, protocol, settings) for item in chunk]
        num_truncated += sum(before is not after for before, after in zip(chunk, fitted, strict=True))
        key = hashlib.sha256()
        for item in fitted:
            tokens = _digest_tokens(item)
            about = _digest(item.id, item.couple, json.dumps(dict(item.labels)), item.content or tokens.hex())
            items_digest.update(about)
            tokens_digest.update(tokens)
            key.update(about + tokens)
        path = None if chunks is None else chunks / f"{number:06d}.parquet"
        if path is not None and path.exists():
            tables.append(_read_chunk(path, key.hexdigest()))
            if progress is not None:
                progress(2 * len(chunk))
            continue
        candidates = [candidate for item in fitted for candidate in (item.positive, item.negative)]
        scores = score_candidates(model, candidates, protocol, settings, progress)
        table = _table(fitted, scores)
        if path is not None:
            _write_chunk(path, table, key.hexdigest())
        tables.append(table)
    if not tables:
        raise ValueError(f"the task {task.name} holds no items")
    return TaskResult(
        task=task.name,
        split=task.split,
        protocol=protocol,
        precision=precision,
        truncates_prompts=settings.truncates_prompts,
        num_truncated=num_truncated,
        items_fingerprint=items_digest.hexdigest(),
        tokens_fingerprint=tokens_digest.hexdigest(),
        averages=tuple(task.averages),
        table=pa.concat_tables(tables),
    )


def _chunked(items: Iterable[PairItem], size: int) -> Iterator[list[PairItem]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _fit(item: PairItem, model: SmolTolkForCausalLM, protocol: Protocol, settings: ScoringSettings) -> PairItem:
    """The item as it can be scored: with ids that the model has, and no longer than its positions."""
    if clash := sorted(set(item.labels) & RESERVED_COLUMNS):
        raise ValueError(f"item {item.id} has the label {clash[0]}, which is a column of results: name it otherwise")
    ids = model.ids
    for candidate in (item.positive, item.negative):
        both = np.concatenate([candidate.prompt, candidate.continuation])
        if len(both) and not 0 <= both.min() <= both.max() < ids.end_of_speech_id:
            raise ValueError(
                f"item {_name(item)} has the ids {both.min()} … {both.max()}, but the model's text tokens and "
                f"{ids.num_units} units are 0 … {ids.end_of_speech_id - 1}: it was made with another tokenizer, or the "
                "model does not know this modality"
            )
    longest = model.config.max_position_embeddings
    try:
        lengths = [len(lay_out(candidate, protocol, ids).ids) for candidate in (item.positive, item.negative)]
    except ValueError as error:
        raise ValueError(f"item {_name(item)}: {error}") from error
    too_many = max(lengths) - longest
    if too_many <= 0:
        return item
    shortest_prompt = min(len(item.positive.prompt), len(item.negative.prompt))
    if not settings.truncates_prompts:
        raise ValueError(
            f"item {_name(item)} has {max(lengths)} tokens, more than the model's {longest} positions: nothing is "
            "cut; leave the item out, or cut prompts by truncates_prompts (--truncate-prompts)"
        )
    if too_many >= shortest_prompt:
        raise ValueError(
            f"item {_name(item)} has {max(lengths)} tokens, more than the model's {longest} positions, and a prompt of "
            f"{shortest_prompt} to cut from: leave the item out"
        )
    positive, negative = (Candidate(c.prompt[too_many:], c.continuation) for c in (item.positive, item.negative))
    return replace(item, positive=positive, negative=negative)


def _name(item: PairItem) -> str:
    labels = ", ".join(item.labels.values())
    return f"{item.id} ({labels})" if labels else item.id


def _digest(*parts: str) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _digest_tokens(item: PairItem) -> bytes:
    digest = hashlib.sha256()
    for candidate in (item.positive, item.negative):
        for part in (candidate.prompt, candidate.continuation):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    return digest.digest()


def _table(items: Sequence[PairItem], scores: np.ndarray) -> pa.Table:
    names = list(items[0].labels)
    if odd := [item.id for item in items if list(item.labels) != names]:
        raise ValueError(f"item {odd[0]} has other labels than item {items[0].id}: give all items the same names")
    columns: dict[str, Any] = {name: [item.labels[name] for item in items] for name in names}
    columns |= {"id": [item.id for item in items], "couple": [item.couple or item.id for item in items]}
    return pa.table(columns | {"positive_score": scores[0::2], "negative_score": scores[1::2]})


def _open_chunks(folder: Path, identity: dict[str, Any]) -> Path:
    """The folder of chunks, which holds those of these very scores or none."""
    if identity["checkpoint"] is None:
        raise ValueError("checkpoint is None: scores that are kept need the identity of their model")
    if (folder / RESULT_FILE).exists():
        check_same(folder / RESULT_FILE, identity)
    chunks = folder / CHUNKS_FOLDER
    path = chunks / "settings.json"
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: remove {chunks}") from error
        if found := first_difference(known, json.loads(json.dumps(identity))):
            raise ValueError(
                f"{chunks} holds scores with {found[0]} {found[1]!r}, not {found[2]!r}: give another --output, or "
                "remove that folder"
            )
    else:
        chunks.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(identity, indent=2, ensure_ascii=False).encode())
    return chunks


def _write_chunk(path: Path, table: pa.Table, key: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_KEY: key}), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def _read_chunk(path: Path, key: str) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read: remove it, and its items are scored again") from error
    if (table.schema.metadata or {}).get(_KEY) != key.encode():
        raise ValueError(f"{path} holds scores of other items: give another --output, or remove {path.parent}")
    return table.replace_schema_metadata(None)
