"""Cross-modal StoryCloze as tokens, in the layout of the SmolTolk authors.

What is known of it is taken from their reader, `scripts/cross-modal_eval.py` in github.com/Anon-SmolTolk/SmolTolk:

    DATASET/cross-modal_manifest.csv        pair_id, type ("prompt" or "continuation"), correctness ("correct" or
                                            "incorrect" for continuations)
    DATASET/SPEECH_TOKENS/test.{bin,len}    e.g. scloze_multimodal/mhubert25hzl11; see `smoltolk.data.authors`
    DATASET/TEXT_TOKENS/test.{bin,len}      e.g. scloze_multimodal/smollm

Row i of the manifest is sample i in both folders. Each sample ends with the end token of its folder, which is not
scored. Their reader takes the first prompt and continuations of a pair_id and leaves out what is not complete; here
each pair_id must have one prompt and one continuation of either kind.

The files do not say which folder is of speech, or which tokenizers made them. It is found by the end tokens: units
are 0 … K − 1 and K ends a sample, text ends with the end-of-text token of the model.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoltolk.data.authors import read_meta, read_samples
from smoltolk.evaluation.benchmarks.benchmark import Fault, needs
from smoltolk.evaluation.pairs import PairTask
from smoltolk.evaluation.protocols import AUTHORS_CROSS_MODAL, Protocol
from smoltolk.evaluation.results import TaskResult
from smoltolk.evaluation.tasks import PAIRS, PARTS, ClozeItem, cloze_task
from smoltolk.generation.pipeline import SmolTolkPipeline

MANIFEST = "cross-modal_manifest.csv"
STEM = "test"
_COLUMNS = ("pair_id", "type", "correctness")
_NAMES = {"prompt": "prompt", "true": "correct continuation", "false": "incorrect continuation"}
_KINDS = {("continuation", "correct"): "true", ("continuation", "incorrect"): "false"}


@dataclass(frozen=True, eq=False)
class TokenFolder:
    """Samples of one kind of tokens.

    Args:
        path: the folder.
        samples: tokens of each row of the manifest, without end tokens, int64 (num_tokens,) each.
        end_token: what all samples ended with.
    """

    path: Path
    samples: Sequence[np.ndarray]
    end_token: int

    @property
    def largest(self) -> int:
        """The largest token but for the end."""
        return max(int(sample.max(initial=-1)) for sample in self.samples)


@dataclass(frozen=True)
class TokenClozeBenchmark:
    """Prompts with two endings as tokens, in modality pairs.

    Args:
        name: what to call it in results.
        folder: where it lies.
        rows: row of each part ("prompt", "true", "false") in the manifest, by pair_id.
        tokens: the folders of tokens.
        protocol: how it is usually scored.
    """

    name: str
    folder: Path
    rows: Mapping[str, Mapping[str, int]]
    tokens: tuple[TokenFolder, ...]
    protocol: Protocol = AUTHORS_CROSS_MODAL

    split = None
    submission = None

    def num_sequences(self, pairs: Sequence[str] | None = None) -> int:
        """How many sequences are scored in so many modality pairs."""
        return 2 * len(self.rows) * len(PAIRS if pairs is None else pairs)

    def sizes(self) -> dict[str, int]:
        """Number of items, which are all of one kind."""
        return {"cloze": len(self.rows)}

    def audio_files(self) -> list[Path]:
        """No files: the audio is tokens already."""
        return []

    def task(
        self,
        pipeline: SmolTolkPipeline,
        *,
        protocol: Protocol,
        pairs: Sequence[str] | None = None,
        tokenized: Callable[[int], None] | None = None,
    ) -> PairTask:
        """The task for a model, which must have the units and the text tokens of the files.

        Args:
            pipeline: the model with its text tokenizer; its speech tokenizer is not needed.
            protocol: how it will be scored.
            pairs: modality pairs; by default all four.
            tokenized: not called, there is no audio.

        Raises:
            ValueError: the tokens are not those of the model.
        """
        pairs = PAIRS if pairs is None else pairs
        ids = pipeline.model.ids
        is_needed = {side: any(needs(part, side, pairs) for part in PARTS) for side in ("speech", "text")}
        speech = self._find("units", ids.num_units, ids.num_units) if is_needed["speech"] else None
        text = self._find("text tokens", ids.text_vocab_size, ids.end_of_text_id) if is_needed["text"] else None
        if speech and speech is text:
            raise ValueError(
                f"{speech.path} ends its samples with {speech.end_token}, which ends units and text of the model: "
                "what it holds cannot be told"
            )
        items = []
        for name, rows in self.rows.items():
            units = {f"{part}_units": speech.samples[rows[part]] for part in PARTS} if speech else {}
            text_ids = {part: text.samples[rows[part]] for part in PARTS} if text else {}
            texts = {f"{part}_text": str(pipeline.text_tokenizer.decode(some)) for part, some in text_ids.items()}
            items.append(ClozeItem(name, "cloze", name, **texts, **units, text_ids=text_ids))  # type: ignore[arg-type]
        task = cloze_task(pipeline.model, items, pipeline.text_ids, pairs=pairs, protocol=protocol)
        return PairTask(self.name, task.items, task.averages, is_cloze=True)

    def _find(self, what: str, count: int, end_token: int) -> TokenFolder:
        """The one folder whose tokens are 0 … count − 1 and whose samples end with a token."""
        fitting = [found for found in self.tokens if found.end_token == end_token and found.largest < count]
        if len(fitting) != 1:
            there = ", ".join(
                f"{found.path.name} with tokens up to {found.largest} and {found.end_token} at the end"
                for found in self.tokens
            )
            number = "no folder" if not fitting else f"{len(fitting)} folders"
            raise ValueError(
                f"{self.folder} has {number} with {what} of the model, which has {count} and ends them with "
                f"{end_token}; there is {there}: keep the tokens of the model's tokenizers there and no others"
            )
        return fitting[0]

    def write_submission(self, folder: Path, result: TaskResult) -> Path | None:
        """Writes nothing: the Zero Resource Challenge has no such benchmark."""
        return None


def is_token_cloze(folder: Path) -> bool:
    """Whether a folder has the authors' manifest."""
    return (folder / MANIFEST).is_file()


def read_token_cloze(folder: Path, report: Callable[[Fault], None]) -> TokenClozeBenchmark:
    """Reads the manifest and every folder of tokens.

    Args:
        folder: the data set.
        report: called with each fault.
    """
    rows, num_rows = _read_rows(folder / MANIFEST, report)
    tokens = []
    for here in sorted(path for path in folder.iterdir() if (path / f"{STEM}.bin").is_file()):
        found = _read_tokens(here, num_rows, report)
        if found is not None:
            tokens.append(found)
    if not tokens:
        report(Fault(str(folder), f"has no folder of tokens that can be used, with {STEM}.bin and {STEM}.len"))
    return TokenClozeBenchmark("cross-modal-storycloze", folder, rows, tuple(tokens))


def _read_rows(path: Path, report: Callable[[Fault], None]) -> tuple[dict[str, dict[str, int]], int]:
    """Rows of the parts of each complete item, and the number of all rows."""
    lines: list[tuple[int, dict[str, str]]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            if missing := [column for column in _COLUMNS if column not in columns]:
                report(Fault(str(path), f"lacks the columns {', '.join(missing)}; it has {', '.join(columns)}"))
                return {}, 0
            lines = [(reader.line_num, cells) for cells in reader]
    except UnicodeDecodeError as error:
        report(Fault(str(path), f"is not UTF-8 (byte {error.start}): convert it"))
    except csv.Error as error:
        report(Fault(str(path), f"is not CSV ({error}): correct it"))
    found: dict[str, dict[str, list[int]]] = {}
    line_of = [line for line, _ in lines]
    for row, (line, cells) in enumerate(lines):
        name, kind, correctness = (str(cells[column] or "").strip() for column in _COLUMNS)
        part = "prompt" if kind == "prompt" else _KINDS.get((kind, correctness))
        if not name or part is None:
            what = f"pair_id is {name!r}, type {kind!r}, correctness {correctness!r}"
            report(Fault(f"{path}:{line}", f"{what}: give an id, and a prompt or a correct or incorrect continuation"))
            continue
        found.setdefault(name, {part: [] for part in PARTS})[part].append(row)
    whole = {}
    for name, parts in found.items():
        for part, rows in parts.items():
            if len(rows) != 1:
                where = f"lines {', '.join(str(line_of[row]) for row in rows)}" if rows else "none"
                report(Fault(str(path), f"pair_id {name} needs one {_NAMES[part]}, and has {len(rows)} ({where})"))
        if all(len(rows) == 1 for rows in parts.values()):
            whole[name] = {part: rows[0] for part, rows in parts.items()}
    if not lines:
        report(Fault(str(path), "holds no rows"))
    return whole, len(lines)


def _read_tokens(folder: Path, num_rows: int, report: Callable[[Fault], None]) -> TokenFolder | None:
    try:
        samples, end_token = read_samples(folder, STEM)
        meta = read_meta(folder / "meta.pkl") if (folder / "meta.pkl").is_file() else {}
    except ValueError as error:
        report(Fault(str(folder), str(error)))
        return None
    if meta.get("n_q", 1) != 1:
        report(Fault(str(folder), f"has n_q {meta['n_q']}: models have units of one codebook"))
    if meta.get("eos", end_token) != end_token:
        report(Fault(str(folder), f"meta.pkl says eos {meta['eos']}, but samples end with {end_token}"))
    if len(samples) != num_rows:
        what = f"has {len(samples)} samples, but the manifest {num_rows} rows: they do not belong together"
        report(Fault(str(folder), what))
        return None
    for row, sample in enumerate(samples):
        if not len(sample):
            report(Fault(str(folder), f"sample {row} is empty but for its end token"))
        elif (sample == end_token).any():
            report(Fault(str(folder), f"sample {row} has the end token {end_token} inside"))
    return TokenFolder(folder, samples, end_token)
