"""From prompts of text and audio to text or speech."""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from smoltolk.generation.sampling import continue_ids
from smoltolk.model.export import load_model, local_folder
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.speech.audio import load_audio, save_wav
from smoltolk.speech.kinds import load_speech_tokenizer, load_vocoder
from smoltolk.speech.neural import NeuralTokenizer, check_device
from smoltolk.speech.units import SpeechTokenizer, Units
from smoltolk.speech.vocoder import Vocoder

PromptPart = str | Path | np.ndarray | Units
_LONGEST_WORD = 30  # characters; what is longer is a script without spaces


@dataclass(frozen=True, eq=False)
class Continuation:
    """What a model said.

    Args:
        text: the text, None when there is none.
        units: the units (num_units,), None when there are none.
        audio: the units as audio (samples,) float32, when there is a vocoder.
        sample_rate_hz: rate of the audio.
        parts: the runs of text and of speech in their order, where the model changed the modality itself.
        has_ended: whether the model ended it, and not the largest number of tokens; None where it is not known, in a
            piece of a stream or one of `parts`.
    """

    text: str | None = None
    units: np.ndarray | None = None
    audio: np.ndarray | None = None
    sample_rate_hz: int | None = None
    parts: "tuple[Continuation, ...]" = ()
    has_ended: bool | None = None

    def save(self, path: str | Path) -> None:
        """Writes the audio as a WAV file.

        Raises:
            ValueError: there is no audio.
        """
        if self.audio is None or self.sample_rate_hz is None:
            raise ValueError(f"there is no audio to write to {path}: ask for speech, with a vocoder")
        save_wav(path, self.audio, self.sample_rate_hz)


class SmolTolkPipeline:
    """A model with its tokenizers and vocoder.

    Args:
        model: the model.
        text_tokenizer: tokenizer of the text backbone.
        speech_tokenizer: what made the model's units; needed for audio prompts.
        vocoder: what turns units into audio; needed for audio out.

    Raises:
        ValueError: the speech tokenizer or vocoder is not the one the model was trained with.
    """

    def __init__(
        self,
        model: SmolTolkForCausalLM,
        text_tokenizer: PreTrainedTokenizerBase,
        speech_tokenizer: SpeechTokenizer | None = None,
        vocoder: Vocoder | None = None,
    ) -> None:
        self.model = model.eval()
        self.text_tokenizer = text_tokenizer
        self.speech_tokenizer = speech_tokenizer
        self.vocoder = vocoder
        card = model.config.speech_tokenizer
        if card and speech_tokenizer and card["fingerprint"] != speech_tokenizer.fingerprint:
            raise ValueError(
                f"the speech tokenizer's fingerprint is {speech_tokenizer.fingerprint}, but the model knows the "
                f"units of {card['fingerprint']}: load the tokenizer that was kept with the model"
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str = "cpu",
        *,
        speech_tokenizer: str | Path | None = None,
        vocoder: str | Path | None = None,
    ) -> "SmolTolkPipeline":
        """Loads the folder that training made: model, tokenizers, vocoder.

        Args:
            name_or_path: the folder, or the name of a model on the Hugging Face Hub, which is downloaded once.
            device: where the model, the network of the speech tokenizer and that of the vocoder compute; "auto" takes
                the GPU if there is one.
            speech_tokenizer: folder of the speech tokenizer; by default the one that was kept with the model.
            vocoder: folder of the vocoder; by default the one that was kept with the model.

        Raises:
            ValueError: there is no such folder or model, it is none of this kind or lacks weights, tokenizer or
                vocoder belong to another, or PyTorch cannot use the device.
        """
        place = check_device(device)
        folder = local_folder(name_or_path)
        model = load_model(folder)
        model.to(place)  # type: ignore[arg-type]

        def companion(name: str, given: str | Path | None) -> str | Path | None:
            return given if given is not None or not (folder / name).is_dir() else folder / name

        speech_tokenizer = companion("speech_tokenizer", speech_tokenizer)
        tokenizer = None if speech_tokenizer is None else load_speech_tokenizer(speech_tokenizer)
        if isinstance(tokenizer, NeuralTokenizer):
            tokenizer.to(str(place))
        vocoder = companion("vocoder", vocoder)
        return cls(
            model,
            AutoTokenizer.from_pretrained(folder),
            tokenizer,
            None if vocoder is None else load_vocoder(vocoder, tokenizer, device=place),
        )

    def __call__(
        self,
        prompt: PromptPart | Sequence[PromptPart],
        *,
        to: str | None,
        max_new_tokens: int = 256,
        **sampling: Any,
    ) -> Continuation:
        """Continues a prompt.

        Args:
            prompt: parts in order: text (str), an audio file (Path), audio at the speech tokenizer's rate
                (samples,) float32, or what the tokenizer made of it (Units).
            to: "text" or "speech"; None lets a model decide that predicts the switch.
            max_new_tokens: longest continuation, in text tokens and units.
            sampling: `min_new_tokens`, `temperature`, `top_k`, `top_p`, `seed`, `use_cache`, `lengths` of
                `continue_ids`.

        Raises:
            ValueError: an empty prompt, an unknown modality, or a prompt too long for the model.
            AudioError: an audio file that cannot be used.
        """
        ids = self.prompt_ids(prompt, to=to)
        row = torch.tensor([ids], device=self.model.device)
        most = min(self._room(ids), max_new_tokens)
        sampling |= {"max_new_tokens": most, "can_switch": to is None}
        (new,) = continue_ids(self.model, row, **sampling)
        has_ended = len(new) < most
        if to is None:
            switch = self.model.ids.switch_id
            runs = [list(run) for is_switch, run in groupby(new, lambda token: token == switch) if not is_switch]
            joined = self._join([self._continuation(run, run[0] >= self.model.ids.speech_offset) for run in runs])
            return replace(joined, has_ended=has_ended)
        return replace(self._continuation(new, to == "speech"), has_ended=has_ended)

    def stream(
        self,
        prompt: PromptPart | Sequence[PromptPart],
        *,
        to: str,
        max_new_tokens: int = 256,
        chunk_units: int = 24,
        **sampling: Any,
    ) -> Iterator[Continuation]:
        """Continues a prompt, giving each piece while the next ones are still being generated.

        Args:
            prompt: as in a call.
            to: "text" or "speech".
            max_new_tokens: longest continuation, in text tokens or units.
            chunk_units: units in a piece of speech.
            sampling: as in a call.

        Yields:
            Pieces: some text each, or some units with their audio. Text and units add up to what a call gives. To
            stop early, close the generator.

        Raises:
            ValueError: as a call, and where `to` is None: a stream has one modality.
        """
        if to is None:
            raise ValueError("to is None: a stream has one modality, choose 'text' or 'speech'")
        ids = self.prompt_ids(prompt, to=to)
        row = torch.tensor([ids], device=self.model.device)
        sampling |= {"max_new_tokens": min(self._room(ids), max_new_tokens)}
        tokens = _generate_in_background(self.model, row, sampling)
        try:
            yield from self._stream_text(tokens) if to == "text" else self._stream_speech(tokens, chunk_units)
        finally:
            tokens.close()

    def _stream_text(self, tokens: Iterator[int]) -> Iterator[Continuation]:
        seen: list[int] = []
        said = 0  # characters given so far
        for token in chain(tokens, [None]):
            if token is not None:
                seen.append(token)
            text = str(self.text_tokenizer.decode(seen, skip_special_tokens=True))
            # The next token may still change the last word; scripts without spaces wait for whole characters only.
            end = len(text) if token is None else text.rfind(" ") + 1
            if end <= said and len(text) - said > _LONGEST_WORD and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                end = len(text)
            if end > said:
                yield Continuation(text=text[said:end])
                said = end

    def _stream_speech(self, tokens: Iterator[int], chunk_units: int) -> Iterator[Continuation]:
        units = (token - self.model.ids.speech_offset for token in tokens)
        if self.vocoder is None:
            for unit in units:
                yield Continuation(units=np.array([unit], dtype=np.int64))
            return
        for some, audio in self.vocoder.decode_stream(units, chunk_units=chunk_units):
            yield Continuation(units=some, audio=audio, sample_rate_hz=self.vocoder.sample_rate_hz)

    def _room(self, ids: list[int]) -> int:
        room = self.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and leaves no room in the model's "
                f"{self.model.config.max_position_embeddings} positions: shorten it"
            )
        return room

    def _continuation(self, new: list[int], is_speech: bool) -> Continuation:
        if not is_speech:
            return Continuation(text=str(self.text_tokenizer.decode(new, skip_special_tokens=True)))
        units = np.array(new, dtype=np.int64) - self.model.ids.speech_offset
        if self.vocoder is None or not len(units):
            return Continuation(units=units)
        audio = self.vocoder.decode(units)
        return Continuation(units=units, audio=audio, sample_rate_hz=self.vocoder.sample_rate_hz)

    def _join(self, parts: list[Continuation]) -> Continuation:
        texts = [part.text for part in parts if part.text is not None]
        units = [part.units for part in parts if part.units is not None]
        audios = [part.audio for part in parts if part.audio is not None]
        return Continuation(
            text=" ".join(texts) if texts else None,
            units=np.concatenate(units) if units else None,
            audio=np.concatenate(audios) if audios else None,
            sample_rate_hz=self.vocoder.sample_rate_hz if audios and self.vocoder else None,
            parts=tuple(parts),
        )

    def prompt_ids(self, prompt: PromptPart | Sequence[PromptPart], *, to: str | None) -> list[int]:
        """Ids of a prompt, with a switch at each change of modality, the last one into `to` unless that is None."""
        if to not in ("text", "speech", None):
            raise ValueError(f"to is {to!r}: choose 'text' or 'speech', or None to let the model decide")
        parts = [prompt] if isinstance(prompt, PromptPart) else list(prompt)
        ids: list[int] = []
        was_speech = None
        for part in parts:
            is_speech = not isinstance(part, str)
            if was_speech is not None and is_speech != was_speech:
                ids.append(self.model.ids.switch_id)
            new = self.text_ids(part) if isinstance(part, str) else self.speech_ids(part)
            if not new:
                raise ValueError(f"the prompt's part {part!r} is empty: leave it out, or give it some words")
            ids += new
            was_speech = is_speech
        if was_speech is None:
            raise ValueError("the prompt is empty: give some text or audio to continue")
        return ids if to is None or was_speech == (to == "speech") else [*ids, self.model.ids.switch_id]

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.text_tokenizer(text, add_special_tokens=False)["input_ids"]

    def speech_ids(self, audio: Path | np.ndarray | Units) -> list[int]:
        """Ids of an audio file, of audio at the tokenizer's rate, or of units."""
        if isinstance(audio, Units):
            return (audio.units + self.model.ids.speech_offset).tolist()
        if self.speech_tokenizer is None:
            raise ValueError("the prompt holds audio, but the model was kept without a speech tokenizer: give one")
        rate = self.speech_tokenizer.sample_rate_hz
        waveform = load_audio(audio, sample_rate_hz=rate, source_rate_hz=rate)
        return (self.speech_tokenizer.encode(waveform).units + self.model.ids.speech_offset).tolist()


class _TokenQueue(BaseStreamer):
    """Hands on the ids of one row, but for its prompt, to another thread."""

    def __init__(self) -> None:
        self.items: queue.Queue[int | BaseException | None] = queue.Queue()
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        """Takes what `generate` gives: the prompt, then the new id of each row."""
        if self.is_prompt:
            self.is_prompt = False
            return
        for token in value.flatten().tolist():
            self.items.put(token)

    def end(self) -> None:
        """The thread itself says when it is done."""


def _generate_in_background(
    model: SmolTolkForCausalLM, row: Tensor, sampling: dict[str, Any]
) -> Generator[int, None, None]:
    """New ids of one row as they come, without the end token; what fails there is raised here."""
    tokens, is_closed = _TokenQueue(), threading.Event()

    def run() -> None:
        try:
            continue_ids(model, row, streamer=tokens, stopping=[lambda *_, **__: is_closed.is_set()], **sampling)
            tokens.items.put(None)
        except BaseException as error:
            tokens.items.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (item := tokens.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item not in (model.ids.end_of_text_id, model.ids.end_of_speech_id):
                yield item
    finally:
        is_closed.set()
        thread.join()
