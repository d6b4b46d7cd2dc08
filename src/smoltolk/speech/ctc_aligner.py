"""Forced alignment by a CTC model of transformers, in the languages it writes."""

import hashlib
import unicodedata
from collections.abc import Iterator
from typing import Any

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

WILDCARD = -1


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
        device: where the model runs. It does not enter the fingerprint.

    Raises:
        ValueError: the device is not there, the model is no CTC model on waveforms, or its vocabulary has no letters.
        OSError: the model is not there.
    """

    kind = "ctc"

    _WINDOW_S = 30.0
    _CONTEXT_S = 2.0
    _MAX_LATTICE_BYTES = 2**31

    def __init__(self, model: str, min_confidence: float | None = None, device: str = "cpu") -> None:
        super().__init__(min_confidence)
        from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer

        from smoltolk.speech.neural import check_device

        self.device = str(check_device(device))
        self.model = str(model)
        config = AutoConfig.from_pretrained(self.model)
        extractor = AutoFeatureExtractor.from_pretrained(self.model)
        if extractor.model_input_names[0] != "input_values" or not hasattr(config, "conv_stride"):
            raise ValueError(
                f"model {self.model} does not take waveforms: give a Wav2Vec2, HuBERT or WavLM with a CTC head"
            )
        if getattr(config, "add_adapter", False):
            raise ValueError(f"model {self.model} has an adapter that changes its frame rate: give one without")
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
        """All that the times depend on, besides audio and text; loads the model to hash its weights, on the CPU."""
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

        model = self._loaded_model().to(self.device)
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
            inputs = torch.from_numpy(samples.astype(np.float32))[None].to(self.device)
            with torch.inference_mode():
                logits = model(inputs).logits[0, first - begin : last - begin]
            pieces.append(logits.float().log_softmax(-1).cpu().numpy())
        return np.concatenate(pieces)

    def _loaded_model(self) -> Any:
        """The model: on the CPU, until audio goes through it."""
        if self._model is None:
            import torch
            from transformers import AutoModelForCTC

            self._model = AutoModelForCTC.from_pretrained(self.model, dtype=torch.float32).eval()
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
        starts_s, ends_s = merge_parts(edges_s[firsts][is_word], edges_s[lasts + 1][is_word], num_parts.tolist())
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
        for character in word.translate(APOSTROPHES):
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
            elif (plain := without_accents(c)) and all(p in self._tokens for p in plain):
                yield from (self._tokens[p] for p in plain)
            elif not is_punctuation(c) and not unicodedata.combining(c):
                yield WILDCARD


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
