"""Alignment: when each word of a transcript is spoken.

An aligner takes audio and its text; `align_words` takes the timed words that another program has written. Both
give one time for each word of `text.split()`, or say why they cannot.
"""

import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from smoltolk.speech.pronunciation import pronounce

_APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ´`", "'"))
_SPOKEN_MARKS = frozenset("&%@#")  # Unicode calls them punctuation, but who reads them aloud says a word


class AlignmentError(ValueError):
    """Audio and text that cannot be aligned; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """When the words of a text are spoken.

    Args:
        word_starts_s: where each word starts, float32 (num_words,), in seconds.
        word_ends_s: where each word ends, float32 (num_words,), never decreasing and within the audio. A pause
            after a word belongs to no word.
        confidence: how well audio and text fit, higher for better; each aligner says what it is.
    """

    word_starts_s: np.ndarray
    word_ends_s: np.ndarray
    confidence: float | None = None


@dataclass(frozen=True)
class TimedWord:
    """A word, or a few, as another program has timed them.

    Args:
        text: what is said.
        start_s: where it starts.
        end_s: where it ends.
    """

    text: str
    start_s: float
    end_s: float


class Aligner(ABC):
    """Finds when the words of a transcript are spoken.

    Aligners are pickled without their models, which each process loads when it aligns its first utterance.

    Attributes:
        kind: name of the kind of aligner in files and messages.
        sample_rate_hz: sampling rate of the audio that `align` takes.
        min_confidence: utterances with less are refused; None for no limit.
    """

    kind: ClassVar[str]
    sample_rate_hz: int

    def __init__(self, min_confidence: float | None = None) -> None:
        if min_confidence is not None and not np.isfinite(min_confidence):
            raise ValueError(f"min_confidence is {min_confidence}: give a number, or none for no limit")
        self.min_confidence = min_confidence

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that the times depend on, besides audio and text."""

    @abstractmethod
    def _align(self, audio: np.ndarray, words: list[str]) -> Alignment:
        """Align checked audio (samples,) and at least one word; ends may pass the audio's by a frame."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()

    def align(self, audio: np.ndarray, text: str) -> Alignment:
        """Align a text to its audio; the same audio and text always give the same times.

        Args:
            audio: float32 (samples,) at `sample_rate_hz`.
            text: its words, separated by white space.

        Returns:
            The times of the words of `text.split()`. A word of punctuation alone has no length and stands at the
            end of the word before it.

        Raises:
            AlignmentError: the text cannot be aligned to the audio, or only with less than `min_confidence`.
        """
        if audio.ndim != 1 or not len(audio) or not np.isfinite(audio).all():
            raise AlignmentError(f"audio {audio.shape} is empty, not finite or of the wrong shape: give (samples,)")
        words = text.split()
        if not words:
            raise AlignmentError(f"text {text!r} has no words: give a text with at least one word")
        alignment = self._align(audio, words)
        seconds = len(audio) / self.sample_rate_hz
        ends_s = np.minimum(np.maximum.accumulate(alignment.word_ends_s), seconds).astype(np.float32)
        starts_s = np.minimum(alignment.word_starts_s, ends_s).astype(np.float32)
        confidence = alignment.confidence
        if self.min_confidence is not None and confidence is not None and confidence < self.min_confidence:
            raise AlignmentError(
                f"confidence {confidence:.2f} is below {self.min_confidence:g}: the text is perhaps not what is said"
            )
        return Alignment(starts_s, ends_s, confidence)


def make_aligner(kind: str, model: str | None = None, min_confidence: float | None = None) -> Aligner:
    """An aligner by its kind.

    Args:
        kind: "pocketsphinx" or "ctc".
        model: for "ctc", the name or folder of a CTC model.
        min_confidence: utterances with less are refused.

    Raises:
        ValueError: the kind is unknown, or the model is missing, unfit or not wanted.
        ImportError: pocketsphinx is not installed.
    """
    if kind == PocketsphinxAligner.kind:
        if model is not None:
            raise ValueError(f"model is {model!r}, but pocketsphinx has its own: leave the model out")
        return PocketsphinxAligner(min_confidence)
    if kind == CtcAligner.kind:
        if model is None:
            raise ValueError("model is missing: ctc needs the name or folder of a CTC model")
        return CtcAligner(model, min_confidence)
    raise ValueError(f"aligner is {kind!r}: choose pocketsphinx or ctc")


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
        starts_s, ends_s = _merge_parts(
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
        plain = _without_accents(word.translate(_APOSTROPHES)).lower()
        core = _strip_punctuation(plain)
        if not core:
            return []
        # With its full stops, an abbreviation is another word: "u.s." is no "us". So with apostrophes: "'em".
        ending = core + "." if "." in core else core
        for form in (plain, _strip_punctuation(plain, keep="'"), ending, core):
            if re.fullmatch("[a-z'.-]+", form) and self._decoder.lookup_word(form) is not None:
                return [form]
        parts = "".join(c if c == "'" or not _is_punctuation(c) else " " for c in core).split()
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


def _merge_parts(starts_s: np.ndarray, ends_s: np.ndarray, num_parts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Times of words from those of their parts; a word without parts stands at the end of the one before it."""
    lasts = np.cumsum(num_parts)
    all_ends_s = np.append(0.0, ends_s)
    has_parts = np.array(num_parts) > 0
    word_ends_s = all_ends_s[lasts]
    word_starts_s = np.where(has_parts, np.append(starts_s, 0.0)[lasts - num_parts], word_ends_s)
    return word_starts_s, word_ends_s


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] == "P" and character not in _SPOKEN_MARKS


def _strip_punctuation(word: str, keep: str = "") -> str:
    """A word without the punctuation around it, but for the characters to keep."""
    kept = [i for i, c in enumerate(word) if not _is_punctuation(c) or c in keep]
    return word[kept[0] : kept[-1] + 1] if kept else ""


def _without_accents(text: str) -> str:
    """Letters without their accents: "café" as "cafe"."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


class CtcAligner(Aligner):
    """Forced alignment by a CTC model of transformers (Wav2Vec2, HuBERT, WavLM, … with a head for characters).

    The words' characters, with the model's word delimiter between words, are aligned on the best path through
    the CTC lattice: exact, over the whole utterance. Letters are written in the case of the vocabulary and lose
    accents that it lacks; punctuation that it lacks is left out. What else it lacks, digits for instance, becomes
    a wildcard, one for each run of such characters, which takes the best token of each of its frames.

    A model's head is sure of a character for a frame or two in the middle of its sound, and says nothing (blank)
    around it: words end a little early, and start a little late.

    The confidence is the log-probability of the best path per frame, wildcards left out: 0 at best.

    Long audio goes through the model in windows of 30 s with 2 s of context on either side; the lattice keeps
    two bits for each frame and state.

    Args:
        model: name or folder of the model with its tokenizer and feature extractor.
        min_confidence: utterances with less are refused; None for no limit.

    Raises:
        ValueError: the model is no CTC model on waveforms, or its vocabulary has no letters.
        OSError: the model is not there.
    """

    kind = "ctc"

    _WINDOW_S = 30.0
    _CONTEXT_S = 2.0
    _MAX_LATTICE_BYTES = 2**31

    def __init__(self, model: str, min_confidence: float | None = None) -> None:
        super().__init__(min_confidence)
        from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer

        self.model = str(model)
        config = AutoConfig.from_pretrained(self.model)
        extractor = AutoFeatureExtractor.from_pretrained(self.model)
        if extractor.model_input_names[0] != "input_values" or not hasattr(config, "conv_stride"):
            raise ValueError(
                f"model {self.model} does not take waveforms: give a Wav2Vec2, HuBERT or WavLM with a CTC head"
            )
        self.sample_rate_hz = int(extractor.sampling_rate)
        self._is_normalized = bool(extractor.do_normalize)
        self._stride, self._receptive_field = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            self._receptive_field += (kernel - 1) * self._stride
            self._stride *= stride
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        special = {*tokenizer.all_special_tokens, "<s>", "</s>", "<pad>", "<unk>"}
        delimiter = getattr(tokenizer, "word_delimiter_token", None) or "|"
        vocabulary = tokenizer.get_vocab()
        self._blank = int(config.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        self._delimiter = vocabulary.get(delimiter)
        self._tokens = {t: i for t, i in vocabulary.items() if len(t) == 1 and t != delimiter and t not in special}
        letters = [token for token in self._tokens if token.isalpha()]
        if not letters:
            raise ValueError(
                f"the vocabulary of model {self.model} has no letters: give a model that writes characters"
            )
        self._has_upper = any(letter.isupper() for letter in letters)
        self._has_lower = any(letter.islower() for letter in letters)
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}

    def settings(self) -> dict[str, Any]:
        """All that the times depend on, besides audio and text; loads the model to hash its weights."""
        sha256 = hashlib.sha256()
        for name, weights in sorted(self._loaded_model().state_dict().items()):
            sha256.update(name.encode())
            sha256.update(weights.contiguous().cpu().numpy().tobytes())
        return {
            "kind": self.kind,
            "weights_sha256": sha256.hexdigest(),
            "tokens": dict(sorted(self._tokens.items())),
            "blank": self._blank,
            "delimiter": self._delimiter,
            "is_normalized": self._is_normalized,
            "window_s": self._WINDOW_S,
            "context_s": self._CONTEXT_S,
            "min_confidence": self.min_confidence,
        }

    def log_probabilities(self, audio: np.ndarray) -> np.ndarray:
        """Log-probability of each token in each frame, float32 (frames, vocab), of a waveform (samples,)."""
        import torch

        model = self._loaded_model()
        if self._is_normalized:  # over the whole utterance, as the feature extractor does it
            audio = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)
        num_frames = (len(audio) - self._receptive_field) // self._stride + 1
        if num_frames < 1:
            raise AlignmentError(f"the audio of {len(audio)} samples is shorter than one frame of the model")
        window = int(self._WINDOW_S * self.sample_rate_hz / self._stride)  # all in frames
        context = int(self._CONTEXT_S * self.sample_rate_hz / self._stride)
        pieces = []
        for first in range(0, num_frames, window):
            last = min(first + window, num_frames)
            begin, end = max(0, first - context), min(last + context, num_frames)
            stop = len(audio) if end == num_frames else (end - 1) * self._stride + self._receptive_field
            samples = audio[begin * self._stride : stop]
            inputs = torch.from_numpy(samples.astype(np.float32))[None].to(model.device)
            with torch.inference_mode():
                logits = model(inputs).logits[0, first - begin : last - begin]
            pieces.append(logits.float().log_softmax(-1).cpu().numpy())
        return np.concatenate(pieces)

    def _loaded_model(self) -> Any:
        if self._model is None:
            import torch
            from transformers import AutoModelForCTC

            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._model = AutoModelForCTC.from_pretrained(self.model, dtype=torch.float32).eval().to(device)
        return self._model

    def _align(self, audio: np.ndarray, words: list[str]) -> Alignment:
        tokens, word_of_token = self._tokenize(words)
        emissions = self.log_probabilities(audio)
        needed = (2 * len(tokens) + 1) * len(emissions) // 4
        if needed > self._MAX_LATTICE_BYTES:
            raise AlignmentError(
                f"{len(emissions)} frames and {len(tokens)} characters need a lattice of {needed >> 20} MiB: "
                "cut the recording into shorter utterances"
            )
        firsts, lasts, confidence = ctc_forced_alignment(emissions, tokens, blank=self._blank)
        offset = (self._receptive_field - self._stride) / 2  # a frame hears this much on either side of its stride
        edges_s = (np.arange(len(emissions) + 1) * self._stride + offset) / self.sample_rate_hz
        is_word = word_of_token >= 0
        num_parts = np.bincount(word_of_token[is_word], minlength=len(words))
        starts_s, ends_s = _merge_parts(edges_s[firsts][is_word], edges_s[lasts + 1][is_word], num_parts.tolist())
        return Alignment(starts_s, ends_s, confidence)

    def _tokenize(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (num_tokens,) of a text, WILDCARD among them, and the word of each, −1 for delimiters."""
        tokens: list[int] = []
        word_of_token: list[int] = []
        for number, word in enumerate(words):
            for part in self._parts(word):
                if tokens and self._delimiter is not None:
                    tokens.append(self._delimiter)
                    word_of_token.append(-1)
                tokens += part
                word_of_token += [number] * len(part)
        if not any(token not in (WILDCARD, self._delimiter) for token in tokens):
            raise AlignmentError(
                f"text {' '.join(words)[:80]!r} has no letters of the model's vocabulary: use a model of its language"
            )
        return np.array(tokens), np.array(word_of_token)

    def _parts(self, word: str) -> Iterator[list[int]]:
        """Tokens of a word; of each part, where punctuation that the vocabulary lacks divides it."""
        part: list[int] = []
        for character in word.translate(_APOSTROPHES):
            found = list(self._ids(character))
            if found:
                part += found[1:] if part and part[-1] == found[0] == WILDCARD else found
            elif unicodedata.category(character) == "Pd" and part:
                yield part
                part = []
        if part:
            yield part

    def _ids(self, character: str) -> Iterator[int]:
        """Tokens of a character; none for punctuation that the vocabulary lacks."""
        if self._has_upper != self._has_lower:
            character = character.upper() if self._has_upper else character.lower()
        for c in character:  # "ß" is "SS" in capitals
            if c in self._tokens:
                yield self._tokens[c]
            elif (plain := _without_accents(c)) and all(p in self._tokens for p in plain):
                yield from (self._tokens[p] for p in plain)
            elif not _is_punctuation(c) and not unicodedata.combining(c):
                yield WILDCARD


WILDCARD = -1


def ctc_forced_alignment(
    log_probabilities: np.ndarray, tokens: np.ndarray, *, blank: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """The best path of a token sequence through the CTC lattice (Graves et al. 2006), by Viterbi.

    A token lasts one frame or more; blanks may stand anywhere, and must stand between equal neighbours.

    Args:
        log_probabilities: (frames, vocab).
        tokens: what is said, int (num_tokens,), without blanks; `WILDCARD` takes in each frame the best token.
        blank: id of the blank.

    Returns:
        First and last frame of each token, int64 (num_tokens,), and the path's mean log-probability per frame,
        without the frames of wildcards.

    Raises:
        AlignmentError: the audio has fewer frames than the tokens need, or no path is possible.
    """
    num_frames = len(log_probabilities)
    num_needed = len(tokens) + int(np.sum((tokens[1:] == tokens[:-1]) & (tokens[1:] != WILDCARD)))
    if num_frames < num_needed:
        raise AlignmentError(
            f"the text needs {num_needed} frames, but the audio has {num_frames}: it is perhaps not what is said"
        )
    states = np.full(2 * len(tokens) + 1, blank)  # blank, token, blank, token, …, blank
    states[1::2] = tokens
    is_wild = states == WILDCARD
    columns = np.where(is_wild, blank, states)
    may_skip = np.zeros(len(states), dtype=bool)  # from a token over the blank to the next one
    may_skip[3::2] = (tokens[1:] != tokens[:-1]) | (tokens[1:] == WILDCARD)

    def emission(frame: np.ndarray) -> np.ndarray:
        scores = frame[columns].astype(np.float64)
        scores[is_wild] = frame.max()
        return scores

    scores = np.full(len(states), -np.inf)
    scores[:2] = emission(log_probabilities[0])[:2]
    steps = np.empty((num_frames, (len(states) + 7) // 8), dtype=np.uint8)  # bit: came from one state before
    skips = np.empty_like(steps)  # bit: came from two states before
    from_one, from_two = np.full((2, len(states)), -np.inf)
    for t in range(1, num_frames):
        from_one[1:] = scores[:-1]
        from_two[2:] = np.where(may_skip[2:], scores[:-2], -np.inf)
        is_step = from_one > scores
        best = np.where(is_step, from_one, scores)
        is_skip = from_two > best
        steps[t], skips[t] = np.packbits(is_step & ~is_skip), np.packbits(is_skip)
        scores = np.where(is_skip, from_two, best) + emission(log_probabilities[t])

    state = len(states) - 1
    if scores[state - 1] >= scores[state]:
        state -= 1
    if scores[state] == -np.inf:
        raise AlignmentError("no path through the audio has any probability: the text is perhaps not what is said")
    path = np.empty(num_frames, dtype=np.int64)
    for t in range(num_frames - 1, -1, -1):
        path[t] = state
        if t:
            byte, bit = state >> 3, 7 - (state & 7)
            state -= int(steps[t, byte] >> bit & 1) + 2 * int(skips[t, byte] >> bit & 1)
    token_states = np.arange(len(tokens)) * 2 + 1
    firsts = path.searchsorted(token_states, side="left")
    lasts = path.searchsorted(token_states, side="right") - 1
    counts = ~is_wild[path]
    path_scores = log_probabilities[np.arange(num_frames), columns[path]][counts]
    return firsts, lasts, float(path_scores.mean(dtype=np.float64)) if counts.any() else 0.0


def joined_text(words: Sequence[TimedWord]) -> str:
    """The text that timed words make."""
    return " ".join(" ".join(word.text for word in words).split())


def align_words(words: Sequence[TimedWord], text: str | None = None) -> np.ndarray:
    """When each word of a text ends, from timed words of another program.

    Letters and digits must be the same in the same order; case, punctuation and where words are divided need not
    ("cannot" for "can not", "well-known" for "well known"). A word that ends inside a timed one gets its share
    of that one's time by its number of characters; a word of punctuation alone ends with the word before it.

    Args:
        words: in time.
        text: its words, separated by white space; the joined timed words by default.

    Returns:
        Ends in seconds of the words of `text.split()`, float32 (num_words,).

    Raises:
        AlignmentError: the texts differ; names the first word that does, and the timed word in its place.
    """
    text_words = (joined_text(words) if text is None else text).split()
    if not text_words:
        raise AlignmentError("the text has no words: give a text with at least one word")
    timed = [(word, characters) for word in words if (characters := _characters(word.text))]
    stream = "".join(characters for _, characters in timed)
    bounds = np.cumsum([0, *(len(characters) for _, characters in timed)])
    ends_s = np.zeros(len(text_words), dtype=np.float32)
    position, end_s = 0, 0.0
    for number, text_word in enumerate(text_words):
        characters = _characters(text_word)
        if characters:
            index = int(bounds.searchsorted(position, side="right")) - 1
            if not stream.startswith(characters, position):
                found = repr(timed[index][0].text) if index < len(timed) else "the end"
                raise AlignmentError(
                    f"word {text_word!r} (number {number}) of the text differs from {found} of the timed words: "
                    "give the text that was aligned"
                )
            position += len(characters)
            index = int(bounds.searchsorted(position)) - 1
            word, word_characters = timed[index]
            share = (position - bounds[index]) / len(word_characters)
            end_s = word.end_s if share == 1 else word.start_s + share * (word.end_s - word.start_s)
        ends_s[number] = end_s
    if position < len(stream):
        index = int(bounds.searchsorted(position, side="right")) - 1
        raise AlignmentError(
            f"the text ends after {text_words[-1]!r}, but {timed[index][0].text!r} of the timed words follows: "
            "give the text that was aligned"
        )
    return ends_s


def _characters(word: str) -> str:
    """Letters, accents and digits of a word without case: what has to be the same in two texts."""
    folded = unicodedata.normalize("NFKC", word).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")
