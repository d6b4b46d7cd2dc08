"""The folder of a preparation: what is done, what is missing, and how it becomes a store.

While the work goes on, the output folder holds

    prepare.json                      what is prepared with what: a later start must agree with it
    blocks/00012/shard-00000.parquet  the first block of piece 12
    blocks/00012/00000.json           its record: hash, counts, what was quarantined, the files that were read
    blocks/00012/done.json            written last: how many blocks the piece has

Every file is written aside and renamed, so each is whole or not there, and none depends on who wrote it or when. When
all pieces are done, the blocks are numbered through and moved to their places, the records put together, and the
store's manifest written last.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from smoltolk.data import store
from smoltolk.data.blocks import Block, file_state
from smoltolk.data.store import MANIFEST, Shard, write_manifest, write_shard
from smoltolk.data.summary import SUMMARY, PrepareSummary, count_block, summarize
from smoltolk.data.utterance import StoreMetadata
from smoltolk.speech.audio import write_atomically

SETTINGS = "prepare.json"
QUARANTINE = "quarantine.jsonl"
BLOCKS = "blocks"
_DONE = "done.json"
_MOVING = "moving.json"  # all is done, and blocks are on their way to their places


@dataclass(frozen=True)
class WorkFolder:
    """An output folder.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def is_store(self) -> bool:
        """Whether the work is finished."""
        return (self.path / MANIFEST).exists()

    @contextlib.contextmanager
    def lock(self, part: int, parts: int) -> Iterator[None]:
        """Hold the folder for one writer, or for one of several that do different parts.

        Raises:
            ValueError: another writer holds it, or the same part of it.
        """
        if parts == 1:
            with store.lock(self.path):
                yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a") as whole, open(self.path / f".lock-{part}-of-{parts}", "a") as own:
            try:
                fcntl.flock(whole, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{self.path} is being written by another process, as a whole or as part {part}/{parts}: "
                    f"wait for it to end, or choose another folder"
                ) from None
            yield

    def agree_on(self, settings: dict[str, Any]) -> None:
        """Write down the settings of a new preparation.

        Raises:
            ValueError: it was begun with other settings, or the folder holds a store of other origin.
        """
        path = self.path / SETTINGS
        if not path.exists():
            if self.is_store:
                raise ValueError(f"output {self.path} holds a store already: delete it, or choose another folder")
            others = sorted(file.name for file in self.path.iterdir() if not file.name.startswith(".lock"))
            if others:
                raise ValueError(f"output {self.path} holds {others[0]!r}, which is not ours: choose an empty folder")
            _write_json(path, settings)
        else:
            _refuse_others(json.loads(path.read_bytes()), settings, f"output {self.path}")

    def take_over(self, folder: Path) -> None:
        """Copy the finished pieces of a part that another machine has done.

        Raises:
            ValueError: the folder holds no part of this preparation.
        """
        if WorkFolder(folder).is_store:
            raise ValueError(f"{folder} is a whole store already: use it as it is")
        if not (folder / SETTINGS).exists():
            raise ValueError(f"{folder} holds no part of a preparation: give the output folder of a --part")
        settings = json.loads((self.path / SETTINGS).read_bytes())
        _refuse_others(json.loads((folder / SETTINGS).read_bytes()), settings, f"part {folder}")
        for done in sorted((folder / BLOCKS).glob(f"*/{_DONE}")):
            number = int(done.parent.name)
            if WorkFolder(folder).is_done(number) and not self.is_done(number):
                target = self._piece(number)
                target.mkdir(parents=True, exist_ok=True)
                for file in sorted(done.parent.iterdir(), key=lambda file: file.name == _DONE):  # done.json last
                    if file.suffix == ".json" and file.name != _DONE:  # their files are another machine's
                        _write_json(target / file.name, json.loads(file.read_bytes()) | {"files": {}})
                    elif not file.name.startswith("."):
                        write_atomically(target / file.name, file.read_bytes())

    def refuse_changed_files(self, numbers: Iterable[int], audio_folder: Path | None) -> None:
        """Look whether the files of what is finished are still the ones that were read.

        A look at each costs some microseconds. Files that are gone are no fault: what was made of them is kept.

        Args:
            numbers: the pieces to look at.
            audio_folder: where relative paths start.

        Raises:
            ValueError: files have changed, or have come, since their rows were prepared; names one.
        """
        if (self.path / BLOCKS / _MOVING).exists():
            return  # all is done
        changed: dict[str, tuple[Any, Any]] = {}
        folders: dict[str, None] = {}
        for number in numbers:
            for record in sorted(self._piece(number).glob("[0-9]*.json")):
                for name, was in json.loads(record.read_bytes()).get("files", {}).items():
                    now = file_state((audio_folder or Path()) / name)
                    if now is not None and (was is None or tuple(was) != now):
                        changed[name] = was, now
                        folders[str(record.parent)] = None
        if changed:
            name, (was, now) = next(iter(changed.items()))
            others = f" and {len(changed) - 1} other files have" if len(changed) > 1 else " has"
            raise ValueError(
                f"{name}{others} changed since rows were made of it (it was {_described(was)}, is {_described(now)}): "
                f"put back what was there, or delete {', '.join(folders)}: the rows of such a folder are prepared again"
            )

    def is_done(self, number: int) -> bool:
        """Whether all blocks of a piece are there."""
        done = self._piece(number) / _DONE
        if (self.path / BLOCKS / _MOVING).exists():
            return True
        return done.exists() and all(
            self.rows_done(number, block) is not None for block in range(json.loads(done.read_bytes())["blocks"])
        )

    def rows_done(self, number: int, block: int) -> int | None:
        """Number of rows of a block of a piece that is there, else None."""
        try:
            record = json.loads(self._record(number, block).read_bytes())
            shard = Shard(**record["shard"])
            is_whole = (self._piece(number) / shard.file).stat().st_size == shard.bytes
        except FileNotFoundError:
            return None
        return shard.rows + len(record["quarantined"]) if is_whole else None

    def write_block(self, number: int, block: int, content: Block, metadata: StoreMetadata) -> None:
        """Write a block of a piece: its shard, then its record."""
        folder = self._piece(number)
        folder.mkdir(parents=True, exist_ok=True)
        shard = write_shard(folder, block, content.utterances, metadata)
        counts = count_block(content.utterances, content.confidences)
        about = {"quarantined": content.quarantined, "files": content.files}
        _write_json(self._record(number, block), {"shard": asdict(shard), **counts, **about})

    def finish_piece(self, number: int, num_blocks: int) -> None:
        """Note that a piece has so many blocks, all of which are there."""
        self._piece(number).mkdir(parents=True, exist_ok=True)
        _write_json(self._piece(number) / _DONE, {"blocks": num_blocks})

    def finish(self, num_pieces: int) -> PrepareSummary:
        """Put all blocks together to a store.

        Raises:
            ValueError: there are no rows, or a block has been lost.
        """
        blocks = [
            (number, block)
            for number in range(num_pieces)
            for block in range(json.loads((self._piece(number) / _DONE).read_bytes())["blocks"])
        ]
        if not blocks:
            raise ValueError(f"the source of {self.path} has no rows: give a source with audio or text")
        records = [json.loads(self._record(*block).read_bytes()) for block in blocks]
        summary = summarize(records)
        quarantined = (entry for record in records for entry in record["quarantined"])
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in quarantined)
        write_atomically(self.path / QUARANTINE, lines.encode("utf-8", "backslashreplace"))
        _write_json(self.path / SUMMARY, summary.to_json())
        _write_json(self.path / BLOCKS / _MOVING, {})
        shards = [
            self._move(number, Shard(**record["shard"]), place)
            for place, ((number, _), record) in enumerate(zip(blocks, records, strict=True))
        ]
        for leftover in self.path.glob(".lock-*"):  # of parts
            leftover.unlink()
        write_manifest(self.path, shards)
        self.tidy()
        return summary

    def tidy(self) -> None:
        """Remove what only the work needed."""
        shutil.rmtree(self.path / BLOCKS, ignore_errors=True)

    def _move(self, number: int, shard: Shard, place: int) -> Shard:
        """Move a shard to its place in the store, if it is not there yet."""
        moved = replace(shard, file=f"shard-{place:05d}.parquet")
        target = self.path / moved.file
        with contextlib.suppress(FileNotFoundError):  # moved before a kill
            os.replace(self._piece(number) / shard.file, target)
        if not target.exists() or target.stat().st_size != shard.bytes:
            raise ValueError(f"{target} is missing or changed: delete {self.path} and prepare again")
        return moved

    def _piece(self, number: int) -> Path:
        return self.path / BLOCKS / f"{number:05d}"

    def _record(self, number: int, block: int) -> Path:
        return self._piece(number) / f"{block:05d}.json"


def _refuse_others(begun: dict[str, Any], settings: dict[str, Any], name: str) -> None:
    differing = [key for key, value in json.loads(json.dumps(settings)).items() if begun.get(key) != value]
    if differing:
        changes = "; ".join(f"{key} was {begun.get(key)!r}, is {settings[key]!r}" for key in differing)
        raise ValueError(
            f"{name} was begun with other settings ({changes}): use the same ones, delete it, or choose another folder"
        )


def _described(state: Sequence[int] | None) -> str:
    if state is None:
        return "not there"
    return f"{state[0]} bytes of {datetime.fromtimestamp(state[1] / 1e9, UTC):%Y-%m-%d %H:%M:%S.%f} UTC"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(
        path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    )
