r"""Import of data in the layout of the SmolTolk authors' research code, as a store.

What is known of the layout is taken from their published reader and writers (`dataset.py` in
github.com/Anon-SmolTolk/SmolTolk; `dataset.py`, `scripts/dump_hubert_codes.py` and `scripts/dump_mimi_codes.py`
in github.com/vozlms/smoltolk_base):

    DATASET/SPEECH_TOKENS/     e.g. ls960/mhubert25hzl11
        meta.pkl               a pickled dict of vocab_size, eos, pad, frame_rate, n_q
        SPLIT.bin              units of all utterances one after another, each with the end token `eos` behind it
        SPLIT.len              number of units of each utterance, its end token counted
        SPLIT.dur              frames of each unit, the end token's too; missing where equal units are not merged
    DATASET/TEXT_TOKENS/       e.g. libriheavy/smollm
        meta.pkl               a pickled dict of vocab_size and eos
        SPLIT.bin, SPLIT.len   the same for text tokens
        SPLIT.wrds_tms         when each word ends, in seconds from the start of its utterance; also one for each
                               end token, which counts as a word
        SPLIT.wrds_tms_len     number of tokens of each word

Utterance n of the speech is utterance n of the text. Units are 0 … eos − 1, and vocab_size is eos + 2 (end and
padding). Their reader takes .bin as uint16 (uint32 for more than 65,536 tokens), .len as uint64 or else uint16,
.dur as uint8, .wrds_tms as float32 and .wrds_tms_len as uint64; their HuBERT writer writes .bin and .len as
int16, .dur as int8, their Mimi writer .len as int64. So widths are found here by trial: those are taken with
which the lengths add up to the tokens and every utterance that is looked at ends with its end token.

Assumed, since no program that writes the text side is published: that it is what their reader takes it for.
All of it is checked: lengths and word lengths add up, words end where utterances do, each end token is a word of
its own. Durations were written in 8 bits: a unit of more than 255 frames has lost a multiple of 256. Where that
leaves 0, or word times beyond the audio, the row is put in quarantine; elsewhere it cannot be seen.

Not imported, since a store has no place for it: more than one codebook (n_q above 1). Derived files
(.wrd_smps, .wrd_lens, .wrd_bnds, .short_idxs, .long_bnds) hold nothing new and are not read.
"""

import contextlib
import json
import math
import os
import pickletools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from smoltolk.data.store import ROWS_PER_SHARD, StoreWriter
from smoltolk.data.text import decode_tokens, encode_words, tokenizer_fingerprint
from smoltolk.data.utterance import Utterance
from smoltolk.data.work_folder import QUARANTINE
from smoltolk.speech.units import Units
from smoltolk.terminal import progress_bar

SPLITS = {"train": "train", "large": "train", "val": "validation", "dev-clean": "validation", "dev-other": "validation"}
"""What the authors train and validate on, by the names of their files."""

SPEECH_META = ("vocab_size", "eos", "pad", "frame_rate", "n_q")
TEXT_META = ("vocab_size", "eos")

_META_BYTES = 1 << 16
_WIDTHS = {
    "bin": ("uint16", "uint32"),
    "len": ("uint64", "uint16", "uint32"),
    "dur": ("uint8", "uint16", "uint32", "uint64"),
    "wrds_tms": ("float32", "float64"),
    "wrds_tms_len": ("uint64", "uint16", "uint32"),
}
_NUM_LOOKED_AT = 1000  # utterances whose end is looked at to find the widths; later all are
_LATE_FRAMES = 2  # a tokenizer drops up to so much audio at the end: how far a word may end after the units


@dataclass(frozen=True)
class ImportSummary:
    """What an import made.

    Args:
        utterances: number of utterances in the store.
        splits: number of utterances in each split.
        quarantined: number of utterances in `quarantine.jsonl`.
        unaligned: utterances with text and speech whose word times are missing or not numbers.
        widths: the type of the numbers in each file, as it was found.
    """

    utterances: int
    splits: dict[str, int]
    quarantined: int
    unaligned: int
    widths: dict[str, str]


def import_authors(
    source: str | Path,
    output: str | Path,
    *,
    speech_tokens: str | None = None,
    text_tokens: str | None = None,
    speech_tokenizer: dict[str, Any] | None = None,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
    splits: Mapping[str, str] | None = None,
    speech_meta: Mapping[str, float] | None = None,
    text_meta: Mapping[str, float] | None = None,
    dtypes: Mapping[str, str] | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    progress: bool = True,
) -> ImportSummary:
    """Make a store from data in the authors' layout; see the module for what that is.

    The files are mapped into memory and read once, so that memory stays flat. What is there is kept as it is:
    units, durations, text tokens and word times. An utterance that a store cannot hold goes to `quarantine.jsonl`
    with the reason. The store appears when all is read; a stopped import leaves none and is started again.

    Args:
        source: the folder of a dataset.
        output: folder of the new store.
        speech_tokens: name of the folder of units, such as "mhubert25hzl11"; None for text alone.
        text_tokens: name of the folder of text tokens, such as "smollm"; None for speech alone.
        speech_tokenizer: card of the tokenizer that made the units.
        text_tokenizer: the fast tokenizer that made the text tokens; it gives the texts back.
        splits: which files to read, and the split each becomes, such as {"large": "train"}; by default every
            file that `SPLITS` names.
        speech_meta: the numbers of `SPEECH_META`, in place of those in meta.pkl.
        text_meta: the numbers of `TEXT_META`, in place of those in meta.pkl.
        dtypes: the type of the numbers in a file where it cannot be found, such as {"speech.len": "uint16"}.
        rows_per_shard: utterances in a shard.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a file is missing or not as it must be, widths are ambiguous, meta.pkl holds more than
            numbers, a tokenizer is not that of the data, or no utterance can be used.
        OSError: the store cannot be written.
    """
    source, output = Path(source), Path(output)
    types = _checked_dtypes(dtypes or {})
    if speech_tokens is None and text_tokens is None:
        raise ValueError("speech_tokens and text_tokens are both missing: name a folder of units or of text tokens")
    speech = text = None
    if speech_tokens is not None:
        speech = _SpeechFolder(source / speech_tokens, speech_tokenizer, speech_meta)
    if text_tokens is not None:
        text = _TextFolder(source / text_tokens, text_tokenizer, text_meta)
    files = [
        (stem, split, [side.open(stem, types) for side in (speech, text) if side and side.has(stem)])
        for stem, split in _splits(source, [side for side in (speech, text) if side], splits).items()
    ]
    for stem, _, sides in files:
        if len({len(side.lengths) for side in sides}) > 1:
            raise ValueError(
                f"{stem} has {' and '.join(str(len(side.lengths)) for side in sides)} utterances of speech and of "
                "text: give files that belong together, or import each alone"
            )
    late_s = 0.0 if speech is None else _LATE_FRAMES / speech.frame_rate_hz
    counts: Counter[str] = Counter()
    quarantined = unaligned = 0
    aside = output / f".{QUARANTINE}.{os.getpid()}.part"
    with (
        progress_bar(disable=not progress) as bar,
        StoreWriter(
            output,
            text_tokenizer_fingerprint=None if text is None else tokenizer_fingerprint(text.tokenizer),
            speech_tokenizer=None if speech is None else speech_tokenizer,
            rows_per_shard=rows_per_shard,
        ) as writer,
        contextlib.ExitStack() as on_exit,
    ):
        on_exit.callback(aside.unlink, missing_ok=True)
        quarantine = on_exit.enter_context(open(aside, "w", encoding="utf-8"))
        task = bar.add_task("import", total=sum(len(sides[0].lengths) for _, _, sides in files))
        for stem, split, sides in files:
            for number, halves in enumerate(_together(sides, late_s)):
                utterance_id = f"{source.name}/{stem}/{number}"
                try:
                    if isinstance(halves, str):
                        raise ValueError(halves)
                    utterance = Utterance(id=utterance_id, split=split, **halves)
                    writer.write(utterance)
                except ValueError as error:
                    quarantined += 1
                    entry = {"id": utterance_id, "source": f"{stem}.bin", "reason": str(error)}
                    quarantine.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    if quarantined == _NUM_LOOKED_AT and not counts:  # so are the others
                        raise ValueError(f"none of {quarantined} utterances can be used: {error}") from None
                else:
                    counts[split] += 1
                    unaligned += utterance.has_text and utterance.has_speech and not utterance.is_aligned
                bar.advance(task)
        if not counts:
            raise ValueError(f"none of {quarantined} utterances can be used: {entry['reason']}")
        quarantine.flush()
        os.replace(aside, output / QUARANTINE)
    return ImportSummary(
        utterances=counts.total(),
        splits=dict(sorted(counts.items())),
        quarantined=quarantined,
        unaligned=unaligned,
        widths={file: width for _, _, sides in files for side in sides for file, width in side.widths.items()},
    )


def read_meta(path: str | Path) -> dict[str, float]:
    """The numbers in a meta.pkl, without unpickling it: a pickle can run any program.

    Its instructions are walked through one by one; only those that put numbers into one dict are known.

    Raises:
        ValueError: the file is missing, or holds anything but a dict of names and numbers.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _META_BYTES:
            raise ValueError(f"{path} has more than {_META_BYTES} bytes: five numbers take less; give them as options")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give its numbers as options") from None
    stack: list[Any] = []
    marks: list[int] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "FRAME" | "MEMOIZE" | "BINPUT" | "LONG_BINPUT" | "PUT" | "STOP":
                    pass  # they change nothing on the stack
                case "EMPTY_DICT":
                    stack.append({})
                case "MARK":
                    marks.append(len(stack))
                case "DICT":
                    stack.append(_as_dict(_since(marks, stack)))
                case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "FLOAT" | "BINFLOAT":
                    stack.append(argument)
                case "UNICODE" | "SHORT_BINUNICODE" | "BINUNICODE":
                    stack.append(argument)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    stack[-1] |= _as_dict([key, value])
                case "SETITEMS":
                    items = _as_dict(_since(marks, stack))
                    stack[-1] |= items
                case _:
                    raise ValueError(f"it has the instruction {opcode.name}")
        if len(stack) != 1 or not isinstance(stack[0], dict):
            raise ValueError("it is not a dict")
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path} holds more than a dict of names and numbers ({error}) and is not read, since a pickle can run "
            "any program: give its numbers as options"
        ) from None
    return stack[0]


def read_samples(folder: str | Path, stem: str) -> tuple[list[np.ndarray], int]:
    """Samples of a folder of tokens, whatever they are tokens of; see the module for the files.

    The width of the numbers is the one with which lengths add up and all samples end with the same token.

    Args:
        folder: the folder.
        stem: name of the files, such as "test".

    Returns:
        The tokens of each sample without its end token, int64 (num_tokens,), and the end token.

    Raises:
        ValueError: a file is missing, lengths do not add up, or samples do not end with the same token.
    """
    tokens = _Tokens("any", Path(folder), stem, None, 0, {})
    return [tokens.tokens[start:end].astype(np.int64) for start, end in tokens.ranges()], tokens.eos


def _since(marks: list[int], stack: list[Any]) -> list[Any]:
    """Take everything since the last mark from the stack."""
    mark = marks.pop()
    items = stack[mark:]
    del stack[mark:]
    return items


def _as_dict(items: list[Any]) -> dict[str, float]:
    names, values = items[::2], items[1::2]
    if len(names) != len(values) or not all(isinstance(name, str) for name in names):
        raise ValueError("its keys are not names")
    if not all(type(value) in (int, float) for value in values):
        raise ValueError("its values are not numbers")
    return dict(zip(names, values, strict=True))


def _meta(folder: Path, given: Mapping[str, float] | None, names: tuple[str, ...], option: str) -> dict[str, float]:
    """The wanted numbers, by name."""
    meta = read_meta(folder / "meta.pkl") if given is None else given
    missing = [name for name in names if name not in meta]
    if missing:
        where = folder / "meta.pkl" if given is None else option
        raise ValueError(f"{where} lacks {', '.join(missing)}: give all of {', '.join(names)} as {option}")
    for name in names:
        value = meta[name]
        if not (float(value).is_integer() or name == "frame_rate") or not 0 <= value < math.inf:
            raise ValueError(f"{option}: {name} is {value}: give a whole number, 0 or more")
    return {name: meta[name] if name == "frame_rate" else int(meta[name]) for name in names}


def _checked_dtypes(dtypes: Mapping[str, str]) -> dict[str, str]:
    known = [f"speech.{name}" for name in ("bin", "len", "dur")]
    known += [f"text.{name}" for name in ("bin", "len", "wrds_tms", "wrds_tms_len")]
    for name, dtype in dtypes.items():
        if name not in known:
            raise ValueError(f"dtypes names {name!r}: files are {', '.join(known)}")
        kind = "float" if name == "text.wrds_tms" else "uint"
        if not re.fullmatch(r"float(32|64)" if kind == "float" else r"uint(8|16|32|64)", dtype):
            raise ValueError(f"dtypes gives {name} the type {dtype!r}: give a type such as {kind}32")
    return dict(dtypes)


def _splits(
    source: Path, sides: "list[_SpeechFolder | _TextFolder]", chosen: Mapping[str, str] | None
) -> dict[str, str]:
    """Files to read, by stem, and the split of each."""
    folders = [side.folder for side in sides]
    stems = sorted({path.name.removesuffix(".bin") for folder in folders for path in folder.glob("*.bin")})
    if not stems:
        raise ValueError(f"{' and '.join(map(str, folders))} hold no .bin files: give the folder of a dataset")
    if chosen is None:
        # "train_0_8" is part 0 of 8 of the file "train"
        names = {stem: re.sub(r"_\d+_\d+$", "", stem) for stem in stems}
        if unknown := [stem for stem in stems if names[stem] not in SPLITS]:
            raise ValueError(f"{source} has {unknown[0]}.bin: say which split it is, such as {unknown[0]}=train")
        return {stem: SPLITS[names[stem]] for stem in stems}
    if missing := [stem for stem in chosen if stem not in stems]:
        raise ValueError(f"{source} has no {missing[0]}.bin: there are {', '.join(stems)}")
    return dict(chosen)


class _SpeechFolder:
    """A folder of units; checks that the card is that of their tokenizer."""

    def __init__(self, folder: Path, card: dict[str, Any] | None, given: Mapping[str, float] | None) -> None:
        if card is None:
            raise ValueError(
                f"{folder} needs the card of its speech tokenizer: give speech_tokenizer (--speech-tokenizer-card)"
            )
        meta = _meta(folder, given, SPEECH_META, "speech_meta")
        self.folder, self.eos, self.frame_rate_hz = folder, int(meta["eos"]), meta["frame_rate"]
        if meta["n_q"] != 1:
            raise ValueError(f"{folder} has n_q {meta['n_q']}: a store holds units of one codebook")
        if (meta["vocab_size"], meta["pad"]) != (self.eos + 2, self.eos + 1):
            raise ValueError(
                f"{folder} has vocab_size {meta['vocab_size']}, eos {self.eos} and pad {meta['pad']}: expected the "
                "units, then eos, then pad"
            )
        for name, found in (("num_units", self.eos), ("unit_rate_hz", self.frame_rate_hz)):
            if card.get(name) != found:
                raise ValueError(
                    f"speech_tokenizer has {name} {card.get(name)}, the data in {folder} {found}: give the card of "
                    "the tokenizer that made them"
                )

    def has(self, stem: str) -> bool:
        """Whether there are units of a split."""
        return (self.folder / f"{stem}.bin").exists()

    def open(self, stem: str, types: Mapping[str, str]) -> "_Speech":
        """The units of a split."""
        return _Speech(self, stem, types)


class _TextFolder:
    """A folder of text tokens; checks that the tokenizer is theirs."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase | None, given: Mapping[str, float] | None
    ) -> None:
        if tokenizer is None:
            raise ValueError(f"{folder} needs its text tokenizer, to give the texts back: give text_tokenizer")
        meta = _meta(folder, given, TEXT_META, "text_meta")
        self.folder, self.tokenizer = folder, tokenizer
        self.eos, self.vocab_size = int(meta["eos"]), int(meta["vocab_size"])
        if tokenizer.eos_token_id != self.eos or len(tokenizer) > self.vocab_size:
            raise ValueError(
                f"text_tokenizer has {len(tokenizer)} tokens and the end token {tokenizer.eos_token_id}, the data in "
                f"{folder} {self.vocab_size} and {self.eos}: give the tokenizer that made them"
            )

    def has(self, stem: str) -> bool:
        """Whether there is text of a split."""
        return (self.folder / f"{stem}.bin").exists()

    def open(self, stem: str, types: Mapping[str, str]) -> "_Text":
        """The text of a split."""
        return _Text(self, stem, types)


class _Tokens:
    """Tokens of all utterances of a split, mapped into memory, with the width of their numbers found."""

    def __init__(
        self, kind: str, folder: Path, stem: str, eos: int | None, vocab_size: int, types: Mapping[str, str]
    ) -> None:
        self._kind, self._folder, self._stem, self._types = kind, folder, stem, types
        self.widths: dict[str, str] = {}
        fits = []
        for tokens, lengths in product(self._maps("bin"), self._maps("len")):
            if np.iinfo(tokens.dtype).max >= vocab_size - 1 and _add_up(lengths, len(tokens)):
                ends = np.cumsum(lengths[:_NUM_LOOKED_AT], dtype=np.int64)
                if (tokens[ends - 1] == (tokens[ends[0] - 1] if eos is None else eos)).all():
                    fits.append((tokens, lengths))
        which = "all the same" if eos is None else eos
        self.tokens, self.lengths = self._only(fits, ("bin", "len"), f"lengths that add up and end tokens {which}")
        self.eos = int(self.tokens[int(self.lengths[0]) - 1])

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._stem}.{name}"

    def _maps(self, name: str) -> list[np.ndarray]:
        """The content of a file in every width that its size allows."""
        path = self._path(name)
        try:
            num_bytes = path.stat().st_size
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): copy the whole dataset") from None
        if num_bytes == 0:
            raise ValueError(f"{path} is empty: copy it again, or leave the file out")
        given = self._types.get(f"{self._kind}.{name}")
        widths = [np.dtype(width) for width in (_WIDTHS[name] if given is None else (given,))]
        return [np.memmap(path, dtype=w, mode="r") for w in widths if num_bytes % w.itemsize == 0]

    def _only(
        self, fits: Sequence[tuple[np.ndarray, ...]], names: tuple[str, ...], what: str
    ) -> tuple[np.ndarray, ...]:
        """The one way to read the files; refuses none and several."""
        if len(fits) != 1:
            files = ", ".join(f"{self._path(name)} ({self._path(name).stat().st_size} bytes)" for name in names)
            found = "no width gives" if not fits else f"{len(fits)} widths give"
            option = " ".join(f"{self._kind}.{name}=…" for name in names)
            raise ValueError(f"{files}: {found} {what}; copy the files again, or give their types ({option})")
        for name, numbers in zip(names, fits[0], strict=True):
            self.widths[str(self._path(name))] = numbers.dtype.name
        return fits[0]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Where each utterance begins and where its end token stands."""
        start = 0
        for number, length in enumerate(self.lengths):
            end = start + int(length)
            if self.tokens[end - 1] != self.eos:
                raise ValueError(
                    f"{self._path('bin')}: utterance {number} ends with {self.tokens[end - 1]} instead of the end "
                    f"token {self.eos}: the files do not belong together; copy them again"
                )
            yield start, end - 1
            start = end


class _Speech(_Tokens):
    """Units of a split."""

    def __init__(self, folder: _SpeechFolder, stem: str, types: Mapping[str, str]) -> None:
        super().__init__("speech", folder.folder, stem, folder.eos, folder.eos + 2, types)
        self._frame_rate_hz = folder.frame_rate_hz
        self._durations: np.ndarray | None = None
        if self._path("dur").exists():
            fits = [durations for durations in self._maps("dur") if len(durations) == len(self.tokens)]
            (self._durations,) = self._only([*zip(fits)], ("dur",), f"a duration for each of {len(self.tokens)} units")

    def halves(self) -> Iterator[dict[str, Any] | str]:
        """The speech half of each utterance, or why it cannot be used."""
        for start, end in self.ranges():
            tokens = self.tokens[start:end].astype(np.int64)
            try:
                if self._durations is None:  # a token for each frame
                    units = Units.from_frames(tokens)
                else:
                    units = Units(tokens, self._durations[start:end].astype(np.int64))
            except ValueError as error:
                yield str(error)
                continue
            seconds = float(units.durations.sum()) / self._frame_rate_hz
            yield {"units": units.units, "unit_durations": units.durations, "seconds": seconds}


class _Text(_Tokens):
    """Text of a split, with word times where they are."""

    def __init__(self, folder: _TextFolder, stem: str, types: Mapping[str, str]) -> None:
        super().__init__("text", folder.folder, stem, folder.eos, folder.vocab_size, types)
        self._tokenizer = folder.tokenizer
        self._times: np.ndarray | None = None
        if self._path("wrds_tms").exists():
            pairs = product(self._maps("wrds_tms"), self._maps("wrds_tms_len"))
            fits = [pair for pair in pairs if len(pair[0]) == len(pair[1]) and _add_up(pair[1], len(self.tokens))]
            what = f"as many times as words, of {len(self.tokens)} tokens together"
            self._times, self._word_lengths = self._only(fits, ("wrds_tms", "wrds_tms_len"), what)

    def halves(self) -> Iterator[dict[str, Any] | str]:
        """The text half of each utterance, with "word_ends_s" where known, or why it cannot be used."""
        word = 0
        for start, end in self.ranges():
            ids = self.tokens[start:end].astype(np.int64)
            if self._times is None:
                yield self._without_times(ids)
                continue
            first = word
            while start <= end:
                start += int(self._word_lengths[word])
                word += 1
            if start != end + 1 or self._word_lengths[word - 1] != 1:
                raise ValueError(
                    f"{self._path('wrds_tms_len')}: word {word - 1} does not hold the end token of its utterance "
                    "alone: the file does not belong to this text; copy it again"
                )
            ends_s = self._times[first : word - 1].astype(np.float64)
            yield self._with_times(ids, self._word_lengths[first : word - 1].astype(np.int64), ends_s)

    def _without_times(self, ids: np.ndarray) -> dict[str, Any] | str:
        (text,) = decode_tokens(self._tokenizer, [ids])
        try:
            again, counts = encode_words(self._tokenizer, text)
        except ValueError as error:
            return str(error)
        if not np.array_equal(again, ids):
            return f"its tokens are not those of their text {text[:80]!r}: which word they belong to is not known"
        return {"text": text, "text_ids": ids, "word_token_counts": counts}

    def _with_times(self, ids: np.ndarray, counts: np.ndarray, ends_s: np.ndarray) -> dict[str, Any] | str:
        pieces = np.split(ids, np.cumsum(counts)[:-1]) if len(counts) else []
        text, *words = decode_tokens(self._tokenizer, [ids, *pieces])
        words = [word.strip() for word in words]
        if odd := [word for word in words if len(word.split()) != 1]:
            return f"its word {odd[0]!r} is not one word, so that word times cannot be kept"
        halves = {
            "text": text if text.split() == words else " ".join(words),
            "text_ids": ids,
            "word_token_counts": counts,
        }
        return halves if np.isnan(ends_s).any() else halves | {"word_ends_s": ends_s}


def _add_up(lengths: np.ndarray, total: int) -> bool:
    """Whether all lengths are from 1 to the total, and add up to it."""
    if lengths.min() < 1 or lengths.max() > total:
        return False
    # In floats too: the sum of wrong numbers may overflow, and then be anything.
    return bool(lengths.sum(dtype=np.uint64) == total and np.isclose(lengths.sum(dtype=np.float64), total))


def _together(sides: "list[_Speech | _Text]", late_s: float) -> Iterator[dict[str, Any] | str]:
    """Both halves of each utterance, or why it cannot be used."""
    for halves in zip(*(side.halves() for side in sides), strict=True):
        fields: dict[str, Any] = {}
        for half in halves:
            if isinstance(half, str):
                yield half
                break
            fields |= half
        else:
            ends_s = fields.get("word_ends_s")
            if "units" not in fields:
                fields.pop("word_ends_s", None)
            elif ends_s is not None and len(ends_s) and 0 < ends_s[-1] - fields["seconds"] <= late_s:
                fields["seconds"] = float(ends_s[-1])  # the audio was too short for another frame
            yield fields
