"""From prompts of text and audio to text or speech."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from smoltolk.generation.sampling import continue_ids
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.speech.audio import load_audio, save_wav
from smoltolk.speech.units import SpeechTokenizer, load_speech_tokenizer
from smoltolk.speech.vocoder import MelVocoder

PromptPart = str | Path | np.ndarray


@dataclass(frozen=True, eq=False)
class Continuation:
    """What a model said.

    Args:
        text: the text, when text was asked for.
        units: the units (num_units,), when speech was asked for.
        audio: the units as audio (samples,) float32, when there is a vocoder.
        sample_rate_hz: rate of the audio.
    """

    text: str | None = None
    units: np.ndarray | None = None
    audio: np.ndarray | None = None
    sample_rate_hz: int | None = None

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
        vocoder: MelVocoder | None = None,
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
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "SmolTolkPipeline":
        """Loads the folder that training made: model, tokenizers, vocoder.

        Raises:
            ValueError: the folder does not exist, or holds no such model.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json: give the folder of a trained model")
        speech, vocoder = folder / "speech_tokenizer", folder / "vocoder"
        model = SmolTolkForCausalLM.from_pretrained(folder)
        model.to(device)  # type: ignore[arg-type]
        speech_tokenizer = load_speech_tokenizer(speech) if speech.is_dir() else None
        return cls(
            model,
            AutoTokenizer.from_pretrained(folder),
            speech_tokenizer,
            MelVocoder.load(vocoder, speech_tokenizer) if vocoder.is_dir() else None,
        )

    def __call__(
        self,
        prompt: PromptPart | Sequence[PromptPart],
        *,
        to: str,
        max_new_tokens: int = 256,
        **sampling: Any,
    ) -> Continuation:
        """Continues a prompt.

        Args:
            prompt: parts in order: text (str), an audio file (Path), or audio at the speech tokenizer's rate
                (samples,) float32.
            to: "text" or "speech".
            max_new_tokens: longest continuation, in text tokens or units.
            sampling: `min_new_tokens`, `temperature`, `top_k`, `top_p`, `seed`, `use_cache` of `continue_ids`.

        Raises:
            ValueError: an empty prompt, an unknown modality, or a prompt too long for the model.
            AudioError: an audio file that cannot be used.
        """
        ids = self.prompt_ids(prompt, to=to)
        room = self.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and leaves no room in the model's "
                f"{self.model.config.max_position_embeddings} positions: shorten it"
            )
        row = torch.tensor([ids], device=self.model.device)
        new = continue_ids(self.model, row, max_new_tokens=min(room, max_new_tokens), **sampling)[0]
        if to == "text":
            return Continuation(text=str(self.text_tokenizer.decode(new, skip_special_tokens=True)))
        units = np.array(new, dtype=np.int64) - self.model.ids.speech_offset
        if self.vocoder is None or not len(units):
            return Continuation(units=units)
        audio = self.vocoder.decode(units)
        return Continuation(units=units, audio=audio, sample_rate_hz=self.vocoder.sample_rate_hz)

    def prompt_ids(self, prompt: PromptPart | Sequence[PromptPart], *, to: str) -> list[int]:
        """Ids of a prompt, with a switch at each change of modality, the last one into `to`."""
        if to not in ("text", "speech"):
            raise ValueError(f"to is {to!r}: choose 'text' or 'speech'")
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
        return ids if was_speech == (to == "speech") else [*ids, self.model.ids.switch_id]

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.text_tokenizer(text, add_special_tokens=False)["input_ids"]

    def speech_ids(self, audio: Path | np.ndarray) -> list[int]:
        """Ids of an audio file, or of audio at the tokenizer's rate."""
        if self.speech_tokenizer is None:
            raise ValueError("the prompt holds audio, but the model was kept without a speech tokenizer: give one")
        rate = self.speech_tokenizer.sample_rate_hz
        waveform = load_audio(audio, sample_rate_hz=rate, source_rate_hz=rate)
        return (self.speech_tokenizer.encode(waveform).units + self.model.ids.speech_offset).tolist()
