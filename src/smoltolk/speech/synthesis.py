"""Text to speech with exact word times, by espeak-ng (extra `demo`)."""

import ctypes
import signal
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

try:
    import espeakng_loader
except ImportError as error:  # espeak-ng is GPL-3, so it comes only with the extra
    raise ImportError(
        "speech synthesis needs espeakng-loader, which is not installed: pip install 'smoltolk[demo]'"
    ) from error

# Constants of espeak-ng's speak_lib.h.
_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS = 0x1
_INITIALIZE_DONT_EXIT = 0x8000  # without it, a bad data path ends the whole Python process
_SYNTH_CHARS_UTF8 = 0x1
_SYNTH_END_PAUSE = 0x1000
_POSITION_CHARACTER = 1
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_EVENT_LIST_TERMINATED = 0
_EVENT_WORD = 1
_EVENT_PHONEME = 7
_MAX_DATA_PATH_BYTES = 130  # the engine keeps its paths in buffers of 160 bytes

_RANDOM_SEED = 1
_MIN_RATE_WPM, _MAX_RATE_WPM = 80, 450
_MIN_PITCH, _MAX_PITCH = 0, 99

_PAUSE_MARKS = ",.;:!?"
_SENTENCE_MARKS = ".!?"
_NO_BREAK_SPACE = "\u00a0"


@dataclass(frozen=True)
class SpokenText:
    """A text, its audio and its word times.

    Args:
        audio: waveform in −1 … 1, float32 (samples,).
        sample_rate_hz: sampling rate of `audio`.
        words: the words of the text, as `text.split()` gives them.
        word_ends_s: where each word ends, float32 (num_words,), never decreasing.
    """

    audio: np.ndarray
    sample_rate_hz: int
    words: list[str]
    word_ends_s: np.ndarray


class EspeakSynthesizer:
    """One voice of espeak-ng.

    The engine is global to the process and not thread-safe: all synthesizers of a process take turns. For
    more speed use several processes. Speaking a text again in the same process may differ by some 20
    samples, because the engine carries state from call to call; a fresh process (started by `spawn`, not
    `fork`) that makes the same calls gives the same audio to the last bit.

    Args:
        voice: language, with an optional variant, such as `en-us`, `en-us+f2` or `en-gb+m3`.
        rate_wpm: speed in words per minute, 80 to 450.
        pitch: base pitch, 0 to 99.

    Raises:
        ValueError: the language or variant is unknown (the engine itself would say nothing about an unknown
            variant), or a number is out of range.
    """

    def __init__(self, voice: str = "en-us", rate_wpm: int = 220, pitch: int = 50) -> None:
        if not _MIN_RATE_WPM <= rate_wpm <= _MAX_RATE_WPM:
            raise ValueError(f"rate_wpm is {rate_wpm}: choose {_MIN_RATE_WPM} to {_MAX_RATE_WPM} words a minute")
        if not _MIN_PITCH <= pitch <= _MAX_PITCH:
            raise ValueError(f"pitch is {pitch}: choose a pitch from {_MIN_PITCH} to {_MAX_PITCH}")
        _check_voice(voice)
        self.voice, self.rate_wpm, self.pitch = voice, rate_wpm, pitch

    def speak(self, text: str) -> SpokenText:
        """Speak a text.

        A word ends where the next one starts, so a pause belongs to the word before it; the last word ends
        with its last phoneme, before the closing pause.

        Args:
            text: words separated by white space. Commas, full stops and the like after a word make pauses;
                other punctuation around a word is not spoken.

        Raises:
            ValueError: the text has no words, a word has digits or no letters, or the engine does not give
                exactly one start time per word.
        """
        words = text.split()
        spoken, word_starts = _spoken_form(words)
        audio, events, sample_rate_hz = self._synthesize(spoken, text)

        # An event that starts inside a word (at a hyphen, say) is not a word of ours.
        event_samples = {e.text_position: e.sample for e in reversed(events) if e.type == _EVENT_WORD}
        missing = [word for word, start in zip(words, word_starts, strict=True) if start not in event_samples]
        if missing:
            raise ValueError(
                f"espeak-ng gave no time for {len(missing)} of the words of {text[:80]!r}, first for "
                f"{missing[0]!r}: make the sentences shorter, or write these words differently"
            )
        starts = np.array([event_samples[start] for start in word_starts])
        ends = np.append(starts[1:], _end_of_last_phoneme(events, len(audio)))
        if np.any(ends <= starts) or ends[-1] > len(audio):
            raise ValueError(
                f"espeak-ng gave word times that run backwards for {text[:80]!r}: write the text differently"
            )
        return SpokenText(
            audio=audio.astype(np.float32) / 32768,
            sample_rate_hz=sample_rate_hz,
            words=words,
            word_ends_s=(ends / sample_rate_hz).astype(np.float32),
        )

    def speak_freely(self, text: str) -> tuple[np.ndarray, int]:
        """Speak any text as the engine reads it, numbers and signs too; there are no word times.

        Args:
            text: the text.

        Returns:
            Waveform in −1 … 1, float32 (samples,), and its sampling rate in Hz.

        Raises:
            ValueError: the engine gives no audio.
        """
        audio, _, sample_rate_hz = self._synthesize(text, text)
        return audio.astype(np.float32) / 32768, sample_rate_hz

    def _synthesize(self, spoken: str, text: str) -> tuple[np.ndarray, "list[_Event]", int]:
        """The int16 audio (samples,) of what the engine is given for a text, its events, and the sampling rate."""
        with _ENGINE_LOCK, _interrupts_deferred():
            engine = _the_engine()
            engine.configure(self.voice, self.rate_wpm, self.pitch)
            audio, events = engine.synthesize(spoken)
        if not len(audio):
            raise ValueError(f"voice {self.voice!r} gave no audio for {text[:80]!r}: choose another voice")
        return audio, events, engine.sample_rate_hz


def _spoken_form(words: list[str]) -> tuple[str, list[int]]:
    """The text as the engine gets it, and where each word starts in it (1-based, in characters)."""
    if not words:
        raise ValueError("text has no words: give at least one")
    pieces: list[str] = []
    starts: list[int] = []
    position = 1
    opens_sentence = False
    for word in words:
        if any(c.isnumeric() and not c.isalpha() for c in word):
            raise ValueError(f"the word {word!r} has digits: spell numbers out ('7' as 'seven')")
        letters = [i for i, c in enumerate(word) if unicodedata.category(c)[0] in "LM"]  # letters and accents
        if not letters:
            raise ValueError(f"the word {word!r} has no letters to speak: remove it from the text")
        core = word[letters[0] : letters[-1] + 1]
        if opens_sentence:  # before a small letter the engine reads a full stop as the word "dot"
            core = core[0].upper() + core[1:]
        mark = next((c for c in word[letters[-1] + 1 :] if c in _PAUSE_MARKS), "")
        # Ordinary spaces let the engine merge function words ("of the") into one event; no-break spaces
        # do not, but they swallow the pause after a punctuation mark.
        piece = core + mark + (" " if mark else _NO_BREAK_SPACE)
        pieces.append(piece)
        starts.append(position)
        position += len(piece)
        opens_sentence = bool(mark) and mark in _SENTENCE_MARKS
    return "".join(pieces).rstrip(), starts


def _end_of_last_phoneme(events: "list[_Event]", num_samples: int) -> int:
    """Sample at which the closing pause starts; the end of the audio if there is none."""
    end = num_samples
    for event in reversed(events):
        if event.type == _EVENT_PHONEME:
            if not event.phoneme.startswith(b"_"):  # `_`, `_:` and the like are pauses
                break
            end = event.sample
    return end


def _check_voice(voice: str) -> None:
    data = Path(espeakng_loader.get_data_path())
    language, plus, variant = voice.partition("+")
    languages = {path.name.lower() for path in (data / "lang").rglob("*") if path.is_file()}
    if language.lower() not in languages:
        raise ValueError(f"voice {voice!r} has an unknown language: choose one of {', '.join(sorted(languages))}")
    variants = {path.name for path in (data / "voices" / "!v").iterdir()}
    if plus and variant not in variants:
        raise ValueError(f"voice {voice!r} has an unknown variant: choose one of {', '.join(sorted(variants))}")


class _CEventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_char * 8)]


class _CEvent(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # in milliseconds; `sample` is exact
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _CEventId),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_CEvent))


@dataclass(frozen=True)
class _Event:
    type: int
    text_position: int
    sample: int
    phoneme: bytes


class _Engine:
    """The espeak-ng library of this process; every call needs `_ENGINE_LOCK`."""

    def __init__(self) -> None:
        data = Path(espeakng_loader.get_data_path())
        if not (data / "phontab").is_file():
            raise RuntimeError(f"{data} holds no phontab: reinstall with pip install 'smoltolk[demo]'")
        if len(str(data).encode()) > _MAX_DATA_PATH_BYTES:
            raise RuntimeError(
                f"{data} is too long a path for espeak-ng ({_MAX_DATA_PATH_BYTES} bytes at most): "
                "install smoltolk in a virtual environment nearer to the root"
            )
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate_hz: int = self._library.espeak_Initialize(
            _OUTPUT_SYNCHRONOUS, 0, str(data).encode(), _INITIALIZE_PHONEME_EVENTS | _INITIALIZE_DONT_EXIT
        )
        if self.sample_rate_hz <= 0:
            raise RuntimeError(f"espeak-ng does not start with the data in {data}: reinstall espeakng-loader")
        # Some voices are breathy at random, and the engine starts that generator from the clock.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(_RANDOM_SEED))
        self._chunks: list[np.ndarray] = []
        self._events: list[_Event] = []
        self._configured: tuple[str, int, int] | None = None
        self._callback = _CALLBACK(self._receive)  # the library calls it later: keep it alive
        self._library.espeak_SetSynthCallback(self._callback)

    def configure(self, voice: str, rate_wpm: int, pitch: int) -> None:
        if self._configured == (voice, rate_wpm, pitch):
            return
        self._configured = None
        # Setting a voice resets the rate and the pitch, so it comes first.
        if (
            self._library.espeak_SetVoiceByName(voice.encode())
            or self._library.espeak_SetParameter(_PARAMETER_RATE, rate_wpm, 0)
            or self._library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        ):
            raise ValueError(
                f"espeak-ng refuses voice {voice!r} at {rate_wpm} words/min, pitch {pitch}: choose another"
            )
        self._configured = (voice, rate_wpm, pitch)

    def synthesize(self, text: str) -> tuple[np.ndarray, list[_Event]]:
        """Speak `text`; returns int16 (samples,) and the events in order."""
        self._chunks, self._events = [], []
        data = text.encode() + b"\0"
        status = self._library.espeak_Synth(
            data,
            ctypes.c_size_t(len(data)),
            ctypes.c_uint(0),
            _POSITION_CHARACTER,
            ctypes.c_uint(0),
            ctypes.c_uint(_SYNTH_CHARS_UTF8 | _SYNTH_END_PAUSE),
            None,
            None,
        )
        if status:
            raise RuntimeError(f"espeak-ng failed with status {status} on {text[:80]!r}")
        return np.concatenate([np.empty(0, np.int16), *self._chunks]), self._events

    def _receive(self, samples, num_samples, events) -> int:  # type: ignore[no-untyped-def]
        if samples and num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        index = 0
        while (event := events[index]).type != _EVENT_LIST_TERMINATED:
            phoneme = bytes(event.id.string) if event.type == _EVENT_PHONEME else b""
            self._events.append(_Event(event.type, event.text_position, event.sample, phoneme))
            index += 1
        return 0  # go on


_ENGINE_LOCK = threading.Lock()
_ENGINE: _Engine | None = None


def _the_engine() -> _Engine:
    global _ENGINE
    if _ENGINE is None:
        _ENGINE = _Engine()
    return _ENGINE


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Hold a Ctrl-C back until the engine is done: raised inside its callback it would be lost."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield  # Python runs signal handlers in the main thread only
        return
    received: list[int] = []

    def remember(signal_number: int, frame: FrameType | None) -> None:
        received.append(signal_number)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        signal.raise_signal(signal.SIGINT)
