"""Forced alignment of English by pocketsphinx (extra `align`)."""

import hashlib
import re
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from smoltolk.speech.alignment import (
    APOSTROPHES,
    Aligner,
    Alignment,
    AlignmentError,
    is_punctuation,
    merge_parts,
    without_accents,
)
from smoltolk.speech.pronunciation import RULES_SHA256, pronounce


class PocketsphinxAligner(Aligner):
    """The English model of pocketsphinx, which comes with its wheel (extra `align`).

    The audio is brought to −20 dBFS and white noise of −50 dBFS is added: without noise, digital silence and the
    clean vowels of synthetic speech fall out of the search. Words that the dictionary lacks are looked up in
    parts (at hyphens, without a possessive 's) and else pronounced by spelling rules. Digits and spoken signs
    are refused: nobody knows how they were read.

    The confidence is the mean log-likelihood per frame of the aligned phones, relative to the best of all
    phones, in the worst 0.4 s of the audio: 0 were perfect, −7 is usual. Speech that the text leaves out
    counts as badly as words that are not said.

    Args:
        min_confidence: utterances with less are refused; None for no limit.

    Raises:
        ImportError: pocketsphinx is not installed.
    """

    kind = "pocketsphinx"
    sample_rate_hz = 16_000

    _LEVEL_DBFS = -20.0
    _NOISE_DBFS = -50.0
    _FRAME_S = 0.01
    _WORST_FRAMES = 40
    # Wider than the decoder's own (1e-48), which lose one in ten reverberant recordings. `bestpath` would put a
    # lattice search behind the alignment that drops words; `compallsen` makes scores relative to all phones.
    _SEARCH: ClassVar[dict[str, Any]] = {
        **{"lm": None, "bestpath": False, "compallsen": True},
        **{"beam": 1e-80, "pbeam": 1e-80, "wbeam": 1e-60},
    }
    _SCORE_SCALE = 1024  # the decoder keeps log-likelihoods in units of 2**10

    def __init__(self, min_confidence: float | None = None) -> None:
        super().__init__(min_confidence)
        self._decoder: Any = None
        _import_pocketsphinx()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoder": None}

    def settings(self) -> dict[str, Any]:
        """All that the times depend on, besides audio and text."""
        return {
            "kind": self.kind,
            "version": version("pocketsphinx"),
            "level_dbfs": self._LEVEL_DBFS,
            "noise_dbfs": self._NOISE_DBFS,
            "search": self._SEARCH,
            "pronunciation_sha256": RULES_SHA256,
            "min_confidence": self.min_confidence,
        }

    def _align(self, audio: np.ndarray, words: list[str]) -> Alignment:
        if self._decoder is None:
            self._decoder = _import_pocketsphinx().Decoder(loglevel="FATAL", **self._SEARCH)
        spoken = [self._entries(word) for word in words]
        entries = [entry for parts in spoken for entry in parts]
        if not entries:
            raise AlignmentError(f"text {' '.join(words)[:80]!r} has no words that are spoken: correct the text")
        segments = self._search(audio, entries)
        found = [segment.word.partition("(")[0] for segment in segments if not _is_silence(segment)]
        if found != entries:
            raise AlignmentError("pocketsphinx found no way through the audio: the text is perhaps not what is said")
        is_word = np.array([not _is_silence(segment) for segment in segments])
        starts = np.array([segment.start_frame for segment in segments])
        ends = np.array([segment.end_frame + 1 for segment in segments])
        scores = np.log(np.maximum([segment.ascore for segment in segments], np.finfo(float).tiny))
        starts_s, ends_s = merge_parts(
            starts[is_word] * self._FRAME_S, ends[is_word] * self._FRAME_S, [len(parts) for parts in spoken]
        )
        return Alignment(starts_s, ends_s, self._confidence(scores, ends - starts))

    def _search(self, audio: np.ndarray, entries: list[str]) -> list[Any]:
        """Segments of the best path: words, and silences in angle brackets."""
        level = np.sqrt(np.square(audio, dtype=np.float64).mean())
        if level == 0:
            raise AlignmentError("the audio is silent: leave it out or record it again")
        # The seed is the audio's own, so that the times do not depend on what was aligned before.
        seed = int.from_bytes(hashlib.sha256(audio.tobytes()).digest()[:8])
        noise = np.random.default_rng(seed).normal(0, 10 ** (self._NOISE_DBFS / 20), len(audio))
        audio = audio * (10 ** (self._LEVEL_DBFS / 20) / level) + noise
        samples = (np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes()
        self._decoder.reinit_feat()  # else its noise reduction goes on from the utterance before
        self._decoder.set_align_text(" ".join(entries))
        self._decoder.start_utt()
        try:
            self._decoder.process_raw(samples, full_utt=True)
        finally:
            self._decoder.end_utt()
        segments = self._decoder.seg()
        return [] if segments is None else [s for s in segments if s.word not in ("<s>", "</s>")]

    def _confidence(self, scores: np.ndarray, num_frames: np.ndarray) -> float:
        """Mean score per frame in the worst stretch; scores count evenly over the frames of their segment."""
        frame_scores = np.repeat(scores * self._SCORE_SCALE / num_frames, num_frames)
        sums = np.append(0, np.cumsum(frame_scores))
        width = min(self._WORST_FRAMES, len(frame_scores))
        return float((sums[width:] - sums[:-width]).min() / width)

    def _entries(self, word: str) -> list[str]:
        """Entries of the dictionary for a word of the text; none for one that is not spoken."""
        plain = without_accents(word.translate(APOSTROPHES)).lower()
        core = _strip_punctuation(plain)
        if not core:
            return []
        # With its full stops, an abbreviation is another word: "u.s." is no "us". So with apostrophes: "'em".
        ending = core + "." if "." in core else core
        for form in (plain, _strip_punctuation(plain, keep="'"), ending, core):
            if re.fullmatch("[a-z'.-]+", form) and self._decoder.lookup_word(form) is not None:
                return [form]
        parts = "".join(c if c == "'" or not is_punctuation(c) else " " for c in core).split()
        return [self._entry(part, word) for part in parts if part.strip("'")]

    def _entry(self, part: str, word: str) -> str:
        """A part of a word that the dictionary knows, or gets to know."""
        if self._decoder.lookup_word(part) is not None:
            return part
        if any(not "a" <= c <= "z" and c != "'" for c in part):
            raise AlignmentError(
                f"the word {word!r} has signs that are no letters of English: write it as it is spoken ('7' as 'seven')"
            )
        stem = part.removesuffix("'s")
        known = self._decoder.lookup_word(stem) if stem != part else None
        phones = pronounce(part) if known is None else f"{known} {_possessive(known)}"
        self._decoder.add_word(part, phones, update=False)
        return part


def _is_silence(segment: Any) -> bool:
    """Whether a segment is a silence or a noise, which the dictionary writes in brackets."""
    return segment.word.startswith(("<", "["))


def _possessive(phones: str) -> str:
    """Phones of a possessive 's after those of a word."""
    last = phones.split()[-1]
    if last in ("S", "Z", "SH", "ZH", "CH", "JH"):
        return "IH Z"
    return "S" if last in ("P", "T", "K", "F", "TH") else "Z"


def _import_pocketsphinx() -> Any:
    try:
        import pocketsphinx
    except ImportError as error:
        raise ImportError(
            "this aligner needs pocketsphinx, which is not installed: pip install 'smoltolk[align]'"
        ) from error
    return pocketsphinx


def _strip_punctuation(word: str, keep: str = "") -> str:
    """A word without the punctuation around it, but for the characters to keep."""
    kept = [i for i, c in enumerate(word) if not is_punctuation(c) or c in keep]
    return word[kept[0] : kept[-1] + 1] if kept else ""
