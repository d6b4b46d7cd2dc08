"""Readers of the named corpora, and `open_source`, which finds the reader for what the command line names.

Each reader lists the rows of a corpus as its owners distribute it. Texts stay as they are written there, except for
marks that are no words. Splits named dev become "validation".
"""

import csv
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from smoltolk.data.alignments import cut_words
from smoltolk.data.hub import HubSource
from smoltolk.data.sources import (
    RowSource,
    Source,
    SourceRow,
    folder_source,
    json_lines,
    manifest_source,
    open_text,
    path_inside,
    walk,
)
from smoltolk.speech.alignment import AlignmentError, align_words

MAX_SEGMENT_S = 60.0  # Libri-Light's files are chapters: they are cut at pauses into parts of at most this

# hub name, configuration, and what each of our columns is called there
HUB_CORPORA: dict[str, tuple[str, str | None, Mapping[str, str]]] = {
    "fineweb-edu": ("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup", {"text": "text"}),
    "cosmopedia-v2": ("HuggingFaceTB/smollm-corpus", "cosmopedia-v2", {"text": "text"}),
    "finemath": ("HuggingFaceTB/finemath", "finemath-4plus", {"text": "text"}),
    # Of Python-Edu the hub has only the ids of the files: this reads a copy of it with the column "text", which
    # the dataset's card says how to make.
    "python-edu": ("", None, {"text": "text"}),
    "spoken-tinystories": ("slprl/sTinyStories", None, {"audio": "audio", "text": "text", "words": "aligned_text"}),
    "peoples-speech-hub": ("MLCommons/peoples_speech", "clean", {"audio": "audio", "text": "text", "id": "id"}),
}


def open_source(
    name: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    audio_folder: str | Path | None = None,
    splits: Mapping[str, str] | None = None,
) -> Source:
    """The source that a name stands for.

    - a path: a folder of audio and .txt files, or a .jsonl or .csv manifest (also gzipped);
    - `librispeech:PATH`, `libri-light:PATH`, `libriheavy:CUTS`, `peoples-speech:PATH`, `tedlium:PATH`,
      `voxpopuli:PATH`: a corpus on this machine;
    - `text:PATH`: text alone, from a .txt file (a row for each line), a .jsonl file, or Parquet files;
    - `hf:NAME[@REVISION][:CONFIG[:SPLIT]]`: a dataset of the Hugging Face hub or its local copy, streamed;
    - `fineweb-edu`, `cosmopedia-v2`, `finemath`, `spoken-tinystories`, `peoples-speech-hub`: corpora of the hub; with
      `:PATH`, also `python-edu:PATH`, their local copy.

    Args:
        name: as above.
        columns: names of our columns in a manifest or dataset; see `manifest_source` and `HubSource`.
        audio_folder: folder with the audio of a manifest or of Libriheavy, by default the one the file is in.
        splits: what the splits that a manifest or dataset names become; see `mapped_split`.

    Raises:
        ValueError: the name stands for nothing, or does not go with `columns`, `audio_folder` or `splits`.
    """
    kind, separator, rest = str(name).partition(":")
    folder = None if audio_folder is None else Path(audio_folder)
    if kind in ("hf", "text", *HUB_CORPORA) and (separator or kind in HUB_CORPORA):
        if folder is not None:
            raise ValueError(f"{name} has no audio files of its own: leave out --audio-folder")
        return _text_source(Path(rest), columns, splits) if kind == "text" else _hub_source(kind, rest, columns, splits)
    if separator and kind in CORPORA:
        if columns is not None:
            raise ValueError(f"{kind} has columns of its own: leave out --columns")
        if splits is not None:
            raise ValueError(f"{kind} has splits of its own: leave out --split")
        if folder is not None and kind != "libriheavy":
            raise ValueError(f"the audio of {kind} is in its folder: leave out --audio-folder")
        return CORPORA[kind](Path(rest)) if folder is None else libriheavy(Path(rest), folder)
    path = Path(name)
    if path.is_dir():
        if columns is not None or folder is not None:
            raise ValueError(f"{name} is a folder of audio: leave out --columns and --audio-folder")
        if splits is not None:
            raise ValueError(f"{name} is a folder of audio, which names no splits: leave out --split")
        return folder_source(path)
    if separator and not path.exists():
        known = ", ".join(f"{kind}:" for kind in (*CORPORA, "text", "hf", *HUB_CORPORA))
        raise ValueError(f"source {name} is neither a file nor a known corpus: known are {known}")
    return manifest_source(path, columns=columns, audio_folder=folder, splits=splits)


def _hub_source(kind: str, rest: str, columns: Mapping[str, str] | None, splits: Mapping[str, str] | None) -> HubSource:
    if kind == "hf":
        if Path(rest).exists():
            return HubSource(rest, columns=columns, splits=splits)
        address, _, tail = rest.partition(":")
        config, _, split = tail.partition(":")
        address, _, revision = address.partition("@")
        return HubSource(
            address, config or None, split or "train", revision=revision or None, columns=columns, splits=splits
        )
    address, config_name, known = HUB_CORPORA[kind]
    if rest:
        return HubSource(rest, columns=columns or known, splits=splits)
    if not address:
        raise ValueError(f"{kind} is not whole on the hub: make the copy its card describes, and give {kind}:PATH")
    return HubSource(address, config_name, columns=columns or known, splits=splits)


def _text_source(path: Path, columns: Mapping[str, str] | None, splits: Mapping[str, str] | None) -> Source:
    columns = columns or {"text": "text"}
    name = path.name.removesuffix(".gz")
    if path.is_dir() or name.endswith(".parquet"):
        return HubSource(str(path), columns=columns, splits=splits)
    if name.endswith((".jsonl", ".csv")):
        return manifest_source(path, columns=columns, splits=splits)
    if not name.endswith(".txt") or not path.is_file():
        raise ValueError(f"source text:{path} is of no known kind: give .txt, .jsonl, .csv, or Parquet files")
    if splits is not None:
        raise ValueError(f"{path} is plain text, which names no splits: leave out --split")

    def read() -> Iterator[SourceRow]:
        try:
            with open_text(path) as file:
                for line, text in enumerate(file, start=1):
                    if text.strip():
                        yield SourceRow(
                            id=f"{path.name}:{line}", source=f"{path.name}:{line}", text=text.rstrip("\r\n")
                        )
        except UnicodeDecodeError as error:
            raise ValueError(f"source {path} is not UTF-8 ({error}): save it as UTF-8") from None

    return RowSource(str(path), read)


def librispeech(root: Path) -> RowSource:
    """LibriSpeech: `SUBSET/SPEAKER/CHAPTER/` with .flac files and one `*.trans.txt` of lines `ID WORDS`.

    Split: "train", "validation" or "test", by the subset's name. Recordings without a line are speech alone.
    """

    def read() -> Iterator[SourceRow]:
        for folder, names in walk(root):
            texts: dict[str, str] = {}
            for name in names:
                if name.endswith(".trans.txt"):
                    for line in _lines(folder / name):
                        utterance, _, text = line.partition(" ")
                        texts[utterance] = text
            recordings = {name.removesuffix(".flac") for name in names if name.endswith(".flac")}
            for utterance in sorted(recordings | texts.keys()):
                path = (folder / f"{utterance}.flac").relative_to(root)
                yield SourceRow(
                    id=utterance,
                    source=path.as_posix(),
                    audio=path.as_posix(),
                    text=texts.get(utterance),
                    speaker=utterance.partition("-")[0],
                    split=_split_of(folder.absolute().parent.parent.name),
                )

    return RowSource(f"librispeech:{root}", read, root)


def libri_light(root: Path) -> RowSource:
    """Libri-Light: .flac files of chapters, each with a .json of its "speaker" and "voice_activity".

    Speech alone. A chapter is cut at pauses into parts of at most a minute, from the start of the first stretch of
    voice in a part to the end of the last; without voice activity it stays whole.
    """

    def read() -> Iterator[SourceRow]:
        for folder, names in walk(root):
            for name in names:
                if not name.endswith(".flac"):
                    continue
                audio = (folder / name).relative_to(root).as_posix()
                chapter = audio.removesuffix(".flac")
                about = f"{name.removesuffix('.flac')}.json"
                if about not in names:
                    yield SourceRow(id=chapter, source=audio, audio=audio)
                    continue
                try:
                    content = json.loads((folder / about).read_bytes())
                    speaker = content.get("speaker")
                    parts = _parts([(float(start), float(end)) for start, end in content.get("voice_activity") or []])
                except (ValueError, TypeError, AttributeError) as error:
                    reason = f"{about} is damaged ({error}): copy it again"
                    yield SourceRow(id=chapter, source=audio, audio=audio, error=reason)
                    continue
                speaker = None if speaker is None else str(speaker)
                if not parts:
                    yield SourceRow(id=chapter, source=audio, audio=audio, speaker=speaker)
                for number, (start_s, end_s) in enumerate(parts):
                    name_of_part = f"{chapter}_{number:04d}"
                    yield SourceRow(name_of_part, audio, audio, start_s=start_s, end_s=end_s, speaker=speaker)

    return RowSource(f"libri-light:{root}", read, root)


def _parts(voiced: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Neighbouring stretches of voice joined to parts of at most `MAX_SEGMENT_S`; a longer stretch is divided."""
    parts: list[tuple[float, float]] = []
    for start, end in voiced:
        if parts and end - parts[-1][0] <= MAX_SEGMENT_S:
            parts[-1] = (parts[-1][0], end)
            continue
        count = max(1, -int(-(end - start) // MAX_SEGMENT_S))
        length = (end - start) / count
        parts += [(start + i * length, start + (i + 1) * length) for i in range(count)]
    return parts


def libriheavy(cuts: Path, audio_folder: Path | None = None) -> RowSource:
    """Libriheavy: cuts (`libriheavy_cuts_*.jsonl.gz`) of Libri-Light's recordings, with the words of the books.

    The text is the first of a cut's `texts`, with case and punctuation, or the supervision's own text in the
    manifests made from them. The second one of `texts` is what a recogniser heard.

    Args:
        cuts: the file of cuts.
        audio_folder: Libri-Light, the folder with `small`, `medium` and `large`; by default the one of the cuts.
    """
    folder = audio_folder or cuts.parent
    subset = cuts.name.partition("_cuts_")[2].split(".")[0]

    def read() -> Iterator[SourceRow]:
        if not cuts.is_file():
            raise ValueError(f"source libriheavy:{cuts} is not a file: give libriheavy_cuts_….jsonl.gz")
        for line, cut in json_lines(cuts):
            where = f"{cuts.name}:{line}"
            try:
                supervision = cut["supervisions"][0]
                texts = (supervision.get("custom") or {}).get("texts")
                text = texts[0] if texts else supervision["text"]
                # The manifests begin every path so.
                audio = cut["recording"]["sources"][0]["source"].removeprefix("download/librilight/")
                start_s = float(cut["start"])
                row = SourceRow(
                    id=cut["id"],
                    source=cut["id"],
                    audio=audio,
                    start_s=start_s,
                    end_s=start_s + float(cut["duration"]),
                    text=text,
                    speaker=supervision.get("speaker"),
                    split=_split_of(subset) if subset.startswith(("dev", "test")) else None,
                )
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"{where} is no cut of Libriheavy ({error!r}): give its cuts") from None
            yield _with_cut_words(row._replace(audio=path_inside(folder, audio, where)), cut, where)

    return RowSource(f"libriheavy:{cuts}", read, folder)


def _with_cut_words(row: SourceRow, cut: dict[str, Any], where: str) -> SourceRow:
    """A row with the word times that its cut may hold; as published, Libriheavy has none."""
    try:
        words = cut_words(cut, where)
        return row if words is None else row._replace(word_ends_s=tuple(align_words(words, row.text).tolist()))
    except AlignmentError as error:
        return row._replace(error=str(error))


def peoples_speech(root: Path) -> RowSource:
    """People's Speech: for each `SUBSET.json` the recordings in `SUBSET/*.tar`.

    A line of the JSON file is a document, whose `training_data` lists names and labels of its parts. All labels of
    a subset are held in memory. Members of the archives without a label are speech alone; labels without a member
    go to the quarantine.
    """

    def read() -> Iterator[SourceRow]:
        manifests = sorted(root.glob("*.json"))
        if not manifests:
            raise ValueError(f"source peoples-speech:{root} has no .json file: give the folder with SUBSET.json")
        for manifest in manifests:
            texts: dict[str, str] = {}
            for line, document in json_lines(manifest):
                try:
                    data = document["training_data"]
                    texts |= zip((_tidy(name) for name in data["name"]), data["label"], strict=True)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise ValueError(f"{manifest.name}:{line} is no document of People's Speech ({error!r})") from None
            for archive in sorted((root / manifest.stem).glob("*.tar")):
                path = archive.relative_to(root).as_posix()
                for member in _members(archive):
                    name = _tidy(member.name)
                    yield SourceRow(
                        id=f"{manifest.stem}/{name}",
                        source=f"{path}/{name}",
                        audio=path,
                        byte_range=(member.offset_data, member.size),
                        text=texts.pop(name, None),
                    )
            for name in texts:
                where = f"{manifest.stem}/{name}"
                yield SourceRow(id=where, source=where, error=f"{name} is in no archive of {manifest.stem}/")

    return RowSource(f"peoples-speech:{root}", read, root)


def _members(archive: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a tar archive.

    Raises:
        ValueError: it is no tar archive, or not whole.
    """
    try:
        with open(archive, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member
            # `tarfile` takes damage between members for the end, which is a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end")
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is no whole tar archive ({error}): copy it again") from None


def tedlium(root: Path) -> RowSource:
    """TED-LIUM 3: talks `sph/TALK.sph` and their segments `stm/TALK.stm`, in `legacy/train`, `dev` and `test`.

    Gaps between segments, which the transcripts mark to be ignored, are left out. Segments with words that the
    transcripts do not know (`<unk>`) are speech alone. Apostrophes that stand apart are joined ("it 's").

    Args:
        root: the release, its `legacy` folder, or any folder with `stm` and `sph` below it.
    """
    root = root / "legacy" if (root / "legacy").is_dir() else root

    def read() -> Iterator[SourceRow]:
        for folder, names in walk(root):
            if folder.name != "stm":
                continue
            subset = folder.absolute().parent.name
            split = _split_of(subset) if subset in ("train", "dev", "test") else None
            for name in names:
                if name.endswith(".stm"):
                    for number, line in enumerate(_lines(folder / name), start=1):
                        yield from _stm_row(line, folder.parent.relative_to(root), f"{name}:{number}", split)

    return RowSource(f"tedlium:{root}", read, root)


def _stm_row(line: str, folder: Path, where: str, split: str | None) -> Iterator[SourceRow]:
    """The row of a line `TALK CHANNEL SPEAKER START END LABEL WORDS`, none for comments and ignored segments."""
    if line.startswith(";;"):
        return
    fields = line.split(maxsplit=6)
    text = fields[6] if len(fields) == 7 else ""
    if text.strip().lower() == "ignore_time_segment_in_scoring":
        return
    try:
        talk, _, speaker, start, end, _ = fields[:6]
        start_s, end_s = float(start), float(end)
    except ValueError:
        raise ValueError(
            f"{where} is no line of an STM file: give TALK CHANNEL SPEAKER START END LABEL WORDS"
        ) from None
    is_known = "<unk>" not in text
    text = re.sub(r"<[^>]*>|\{[^}]*\}|\(\d\)", "", text)  # silence, noise, number of a pronunciation
    text = " ".join(text.split()).replace(" '", "'")
    audio = (folder / "sph" / f"{talk}.sph").as_posix()
    yield SourceRow(
        id=f"{talk}-{round(start_s * 1000):08d}-{round(end_s * 1000):08d}",
        source=where,
        audio=audio,
        start_s=start_s,
        end_s=end_s,
        text=text if text and is_known else None,
        speaker=speaker,
        split=split,
    )


def voxpopuli(root: Path) -> RowSource:
    """VoxPopuli: transcribed segments by `asr_*.tsv`, with `YEAR/ID.ogg` beside; or unlabelled .ogg files.

    The text is `raw_text`, with case and punctuation, or `normalized_text` where that is empty. A folder without
    any `asr_*.tsv` is unlabelled: each .ogg file is a row of speech alone.
    """

    def read() -> Iterator[SourceRow]:
        tables = sorted(folder / name for folder, names in walk(root) for name in names if _is_voxpopuli_table(name))
        for table in tables:
            yield from _voxpopuli_table(root, table)
        for folder, names in walk(root) if not tables else ():
            for name in names:
                if name.endswith(".ogg"):
                    audio = (folder / name).relative_to(root).as_posix()
                    yield SourceRow(id=audio.removesuffix(".ogg"), source=audio, audio=audio)

    return RowSource(f"voxpopuli:{root}", read, root)


def _is_voxpopuli_table(name: str) -> bool:
    return name.startswith("asr_") and name.endswith(".tsv")


def _voxpopuli_table(root: Path, table: Path) -> Iterator[SourceRow]:
    with open_text(table) as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if missing := {"id", "raw_text", "normalized_text", "split"} - set(reader.fieldnames or ()):
            raise ValueError(f"{table} has no column {min(missing)}: give the tables of VoxPopuli's get_asr_data")
        for cells in reader:
            name = cells["id"]
            where = f"{table.name}:{reader.line_num}"
            audio = (table.parent / name[:4] / f"{name}.ogg").relative_to(root).as_posix()
            yield SourceRow(
                id=name,
                source=where,
                audio=path_inside(root, audio, where),
                text=cells["raw_text"] or cells["normalized_text"] or None,
                speaker=cells.get("speaker_id") or None,
                split=_split_of(cells["split"] or "train"),
            )


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file that are not empty, without their ends."""
    try:
        with open_text(path) as file:
            for line in file:
                if line.strip():
                    yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): copy it again") from None


def _split_of(name: str) -> str:
    """The split that a corpus means by the name of a subset."""
    for start, split in (("dev", "validation"), ("test", "test")):
        if name.startswith(start):
            return split
    return "train"


def _tidy(name: Any) -> str:
    return str(name).removeprefix("./")


CORPORA: dict[str, Callable[[Path], RowSource]] = {
    "librispeech": librispeech,
    "libri-light": libri_light,
    "libriheavy": libriheavy,
    "peoples-speech": peoples_speech,
    "tedlium": tedlium,
    "voxpopuli": voxpopuli,
}
