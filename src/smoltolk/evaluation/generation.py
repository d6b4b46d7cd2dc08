"""Continuations of prompts, kept one by one, and what a recogniser and a text LM make of them.

The output folder holds

    settings.json               what continues what, judged by what: a later start must agree with it
    continuations/<name>.json   one continuation, its seed and what was found in it; written last, atomically
    continuations/<name>.wav    its audio
    result.json                 the metrics, when all is done

Each continuation has a seed of its own, made of the seed, the prompt's id and the sample: it does not depend on which
other prompts there are, or on whether the work was stopped in between.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.stats
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoltolk.data.sources import read_manifest
from smoltolk.evaluation.diversity import auto_bleu, auto_bleu_fairseq, self_bleu, vert
from smoltolk.evaluation.results import NUM_BOOTSTRAP, bootstrap
from smoltolk.evaluation.tasks import load_cloze
from smoltolk.generation.pipeline import Continuation, SmolTolkPipeline
from smoltolk.speech.asr import normalised_words, word_error_rate
from smoltolk.speech.audio import write_atomically
from smoltolk.speech.neural import check_device
from smoltolk.speech.resynthesis import total_word_errors
from smoltolk.speech.units import SpeechTokenizer, Units

PROTOCOL = "generation-1"  # numbers of different protocols are not comparable
_SHORTEST_HEARD_S = 0.1  # recognisers fail on less than their receptive field; silence is added


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model continues.

    Args:
        id: what to call it.
        part: text, an audio file, or units.
        reference: the text that the continuation shall have, where there is one, as in synthesis or transcription.
    """

    id: str
    part: str | Path | Units
    reference: str | None = None

    def fingerprint(self) -> str:
        """Hash of the content.

        Raises:
            OSError: the audio file cannot be read.
        """
        if isinstance(self.part, Units):
            content = self.part.units.astype("<i8").tobytes()
        else:
            content = self.part.encode() if isinstance(self.part, str) else self.part.read_bytes()
        return hashlib.sha256(type(self.part).__name__.encode() + content).hexdigest()


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn; kept with the results.

    Args:
        to: what continuations are.
        max_new_tokens: most text tokens or units of a continuation.
        temperature: 0 takes the best token at each step.
        top_k: sample from the best so many only, 0 for all.
        top_p: sample from the smallest set of tokens with this share of probability.
        seed: where the seed of each continuation comes from.
        samples: continuations of each prompt.

    Raises:
        ValueError: a value is out of range.
    """

    to: Literal["text", "speech"]
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        if self.to not in ("text", "speech"):
            raise ValueError(f"to is {self.to!r}: choose 'text' or 'speech'")
        for name in ("max_new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples is {self.samples}, but with temperature 0 all are the same: give samples 1")

    def seed_of(self, prompt_id: str, sample: int) -> int:
        """The seed of one continuation."""
        digest = hashlib.sha256(f"{self.seed}\n{sample}\n{prompt_id}".encode()).digest()
        return int.from_bytes(digest[:4], "little")


def load_prompts(
    path: str | Path, speech_tokenizer: SpeechTokenizer | None = None, *, modality: str | None = None
) -> list[Prompt]:
    """Reads prompts from a manifest, or the prompts of cloze items.

    A JSONL or CSV manifest has the columns `id` and `text` or `audio` (or `prompt_text` or `prompt_audio`, as cloze
    items have), and optionally `reference`, the text that a continuation shall have. Audio paths are relative to the
    manifest. A Parquet file holds cloze items.

    Args:
        path: the file.
        speech_tokenizer: the model's; its fingerprint must be that of stored units.
        modality: "text" or "speech", where prompts have both.

    Raises:
        ValueError: a file that cannot be used or holds no prompts, an id that is missing or there twice, a prompt that
            is empty, or one with both text and speech and no `modality`.
    """
    path = Path(path)
    if modality not in (None, "text", "speech"):
        raise ValueError(f"modality is {modality!r}: choose 'text' or 'speech', or leave it out")
    if not path.is_file():
        raise ValueError(f"prompts {path} is not a file: give a JSONL or CSV manifest, or Parquet of cloze items")
    prompts: list[Prompt] = []
    if path.suffix == ".parquet":
        for item in load_cloze(path, speech_tokenizer):
            units = None
            if item.prompt_units is not None and len(item.prompt_units):
                ids = np.asarray(item.prompt_units, dtype=np.int64)
                units = Units(ids, np.ones_like(ids))  # a prompt's durations play no part
            prompts.append(_prompt(item.id, item.prompt_text, units, None, modality, f"prompts {path}, {item.id}"))
    else:
        for number, row in enumerate(read_manifest(path), start=1):
            where = f"prompts {path}, row {number}"
            if row.get("id") in (None, ""):
                raise ValueError(f"{where}: the column id is missing or empty")
            text, audio = (row.get(name) or row.get(f"prompt_{name}") for name in ("text", "audio"))
            file = path.parent / audio if audio else None
            prompts.append(_prompt(str(row["id"]), text, file, row.get("reference") or None, modality, where))
    if not prompts:
        raise ValueError(f"prompts {path} holds no prompts")
    return prompts


def _prompt(
    id: str, text: str | None, speech: Path | Units | None, reference: str | None, modality: str | None, where: str
) -> Prompt:
    choices: dict[str, str | Path | Units] = {}
    if text and text.strip():
        choices["text"] = text
    if speech is not None:
        choices["speech"] = speech
    if not choices:
        raise ValueError(f"{where}: the prompt is empty: give it text or audio")
    if modality is None:
        if len(choices) > 1:
            raise ValueError(f"{where}: the prompt has text and speech: say which shall be continued")
        (modality,) = choices
    if modality not in choices:
        raise ValueError(f"{where}: the prompt has no {modality}: add it, or ask for the other modality")
    return Prompt(id, choices[modality], reference)


class TextScorer:
    """A causal text LM as a judge of texts.

    Args:
        model: folder or name of the model, with its tokenizer.
        device: where it computes.

    Raises:
        OSError: there is no such model.
    """

    def __init__(self, model: str | Path, *, device: str | torch.device = "cpu") -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModelForCausalLM.from_pretrained(model).eval()
        self._model.to(check_device(device))

    @torch.no_grad()
    def __call__(self, text: str) -> float | str:
        """Mean negative log-likelihood of a text's tokens in nats, or why there is none.

        The tokens are those of the tokenizer with the special tokens it adds; all but the first are scored, which
        has nothing before it. Nothing is cut.
        """
        if not text.strip():
            return "empty"
        ids = self._tokenizer(text, return_tensors="pt")["input_ids"].to(self._model.device)
        if ids.shape[1] < 2:
            return "one token"
        if ids.shape[1] > (getattr(self._model.config, "max_position_embeddings", None) or ids.shape[1]):
            return "too long"
        log_probabilities = self._model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        return -float(log_probabilities.gather(1, ids[0, 1:, None]).double().mean())


def evaluate_generation(
    pipeline: SmolTolkPipeline,
    prompts: Sequence[Prompt],
    output: Path,
    sampling: Sampling,
    *,
    transcriber: Callable[[np.ndarray, int], str] | None = None,
    scorer: Callable[[str], float | str] | None = None,
    keep_audio: bool = True,
    record: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Continues prompts, keeps every continuation, and measures them; goes on where it was stopped.

    Args:
        pipeline: the model with its tokenizers and vocoder.
        prompts: what to continue.
        output: folder of the continuations and of `result.json`.
        sampling: how continuations are drawn.
        transcriber: what is heard in a waveform of a sampling rate, such as `Transcriber`; for speech.
        scorer: mean negative log-likelihood of a text, such as `TextScorer`.
        keep_audio: whether WAV files are written.
        record: what else decides the numbers, such as the model's fingerprint and the names of the judges; a folder
            made with another record is not gone on with.
        progress: called with 1 after each continuation.

    Returns:
        What was written to `result.json`; `docs/evaluation.md` says what each number is.

    Raises:
        ValueError: there are no prompts, or two with one id; what was asked needs a vocoder, a recogniser, or speech;
            the folder holds continuations of other settings or prompts; or a prompt cannot be continued, named by
            its id.
        OSError: an audio file cannot be read, or an output cannot be written.
    """
    _check(pipeline, prompts, sampling, has_transcriber=transcriber is not None, has_scorer=scorer is not None)
    fingerprints = [prompt.fingerprint() for prompt in prompts]  # reads every file before the long work
    settings = {
        "protocol": PROTOCOL,
        "sampling": asdict(sampling),
        "is_transcribed": transcriber is not None,
        "is_scored": scorer is not None,
        "keep_audio": keep_audio,
        **(record or {}),
    }
    folder = output / "continuations"
    folder.mkdir(parents=True, exist_ok=True)
    _agree(output / "settings.json", settings)
    files = []
    for prompt, fingerprint in zip(prompts, fingerprints, strict=True):
        for sample in range(sampling.samples):
            path = folder / f"{hashlib.sha256(prompt.id.encode()).hexdigest()[:20]}-{sample}.json"
            if path.is_file():
                file = json.loads(path.read_bytes())
                if (file["prompt"], file["prompt_fingerprint"]) != (prompt.id, fingerprint):
                    raise ValueError(f"{path} continues another prompt than {prompt.id} is now: give another output")
            else:
                said, seed = _continue(pipeline, prompt, sampling, sample)
                file = {
                    "prompt": prompt.id,
                    "prompt_fingerprint": fingerprint,
                    "prompt_text": prompt.part if isinstance(prompt.part, str) else None,
                    "sample": sample,
                    "seed": seed,
                    **_judge(said, transcriber, scorer),
                }
                if keep_audio and said.audio is not None:
                    said.save(path.with_suffix(".wav"))
                write_atomically(path, _json(file))
            files.append(file | {"reference": prompt.reference})
            if progress is not None:
                progress(1)
    result = {"task": "generation", **settings, "prompts": len(prompts), **measure(files)}
    write_atomically(output / "result.json", _json(result))
    return result


def _check(
    pipeline: SmolTolkPipeline,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    has_transcriber: bool,
    has_scorer: bool,
) -> None:
    if not prompts:
        raise ValueError("prompts is empty: give at least one prompt")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ValueError(f"the prompt {twice!r} is there twice: ids tell continuations apart, make them unique")
    if pipeline.speech_tokenizer is None and (files := [p.id for p in prompts if isinstance(p.part, Path)]):
        raise ValueError(
            f"the prompt {files[0]!r} is audio, but the model has no speech tokenizer: give prompts of text"
        )
    if missing := [str(p.part) for p in prompts if isinstance(p.part, Path) and not p.part.is_file()]:
        raise ValueError(f"{len(missing)} audio files of prompts are missing: {', '.join(missing[:10])}")
    if sampling.to == "text" and has_transcriber:
        raise ValueError("a recogniser is given, but to is 'text': there is nothing to hear, leave it out")
    if has_transcriber and pipeline.vocoder is None:
        raise ValueError("a recogniser is given, but the model was kept without a vocoder: there is no audio to hear")
    if sampling.to == "speech" and has_scorer and not has_transcriber:
        raise ValueError("a text LM is given, but no recogniser: it scores what is heard in speech, give one")


def _agree(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new folder, or refuses to mix others into an old one."""
    if not path.is_file():
        write_atomically(path, _json(settings))
        return
    kept = json.loads(path.read_bytes())
    names = [name for name in {**kept, **settings} if kept.get(name) != settings.get(name)]
    if names:
        changes = "; ".join(f"{name} was {kept.get(name)} and is {settings.get(name)}" for name in names)
        raise ValueError(f"{path.parent} was made with other settings ({changes}): give another output")


def _continue(pipeline: SmolTolkPipeline, prompt: Prompt, sampling: Sampling, sample: int) -> tuple[Continuation, int]:
    seed = sampling.seed_of(prompt.id, sample)
    try:
        said = pipeline(
            prompt.part,
            to=sampling.to,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=seed,
        )
    except ValueError as error:
        raise ValueError(f"prompt {prompt.id}: {error}") from error
    return said, seed


def _judge(
    said: Continuation,
    transcriber: Callable[[np.ndarray, int], str] | None,
    scorer: Callable[[str], float | str] | None,
) -> dict[str, Any]:
    """What is kept of a continuation; "text" is what was heard in speech, None where nobody listened."""
    seconds = None
    text = said.text
    if said.units is not None:
        if said.audio is not None and said.sample_rate_hz is not None:
            seconds = len(said.audio) / said.sample_rate_hz
        if transcriber is not None:
            text = "" if said.audio is None else _hear(transcriber, said.audio, said.sample_rate_hz or 0)
    found: dict[str, Any] = {
        "has_ended": said.has_ended,
        "units": None if said.units is None else said.units.tolist(),
        "seconds": seconds,
        "text": text,
    }
    if scorer is not None and text is not None:
        score = scorer(text)
        found |= {"nll": None, "not_scored": score} if isinstance(score, str) else {"nll": score, "not_scored": None}
    return found


def _hear(transcriber: Callable[[np.ndarray, int], str], audio: np.ndarray, sample_rate_hz: int) -> str:
    missing = int(_SHORTEST_HEARD_S * sample_rate_hz) - len(audio)
    return transcriber(np.pad(audio, (0, max(missing, 0))), sample_rate_hz)


def measure(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of continuations.

    Args:
        files: continuations as `evaluate_generation` keeps them, each with its `reference`.

    Returns:
        What can be written as JSON: a metric is None where nothing can be said.
    """
    prompts = [file["prompt"] for file in files]
    words = [None if file["text"] is None else normalised_words(file["text"]) for file in files]
    is_speech = [file["units"] is not None for file in files]
    is_empty = [
        not file["units"] if is_spoken else not (file["text"] or "").strip()
        for file, is_spoken in zip(files, is_speech, strict=True)
    ]
    found: dict[str, Any] = {
        "continuations": len(files),
        "empty": estimate(is_empty, prompts),
        "never_ending": estimate([not file["has_ended"] for file in files], prompts),
        "units_per_second": _rate([len(f["units"] or []) for f in files], files),
        "words_per_second": None,
        "word_error_rate": None,
        "generative_perplexity": _perplexity(files) if any("nll" in file for file in files) else None,
        "diversity": None,
    }
    if any(some is None for some in words):
        return found
    texts = [some or [] for some in words]
    found["words_per_second"] = _rate([len(some) for some in texts], files)
    errors = [
        asdict(word_error_rate(file["reference"], file["text"])) for file in files if file["reference"] is not None
    ]
    found["word_error_rate"] = total_word_errors(errors)
    found["diversity"] = _diversity(texts, prompts)
    return found


def estimate(values: Sequence[float], groups: Sequence[str]) -> dict[str, Any]:
    """Mean of values, its standard error and 95 % bootstrap interval, both over groups.

    Args:
        values: one for each continuation.
        groups: its prompt; continuations of one prompt depend on each other.

    Returns:
        "n" values, "mean", "standard_error" and "interval"; None where there are too few: no value, or one group.
    """
    n = len(values)
    if n == 0:
        return {"n": 0, "mean": None, "standard_error": None, "interval": None}
    array = np.array(values, dtype=float)
    mean = float(array.mean())
    _, index = np.unique(list(groups), return_inverse=True)
    deviations = np.bincount(index, array - mean)  # of each group
    count = len(deviations)
    if count < 2:
        return {"n": n, "mean": mean, "standard_error": None, "interval": None}
    error = float(np.sqrt(count / (count - 1) * (deviations**2).sum()) / n)
    return {"n": n, "mean": mean, "standard_error": error, "interval": list(bootstrap(array, groups))}


def _rate(counts: Sequence[int], files: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Mean over audible continuations of their counts for each second; None without audio."""
    spoken = [(n / file["seconds"], file["prompt"]) for n, file in zip(counts, files, strict=True) if file["seconds"]]
    return estimate([rate for rate, _ in spoken], [prompt for _, prompt in spoken]) if spoken else None


def _perplexity(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Exp of the mean over files of each file's mean negative log-likelihood."""
    scored = [file for file in files if file["nll"] is not None]
    reasons = [file["not_scored"] for file in files if file["nll"] is None]
    nll = estimate([file["nll"] for file in scored], [file["prompt"] for file in scored])
    return {
        "perplexity": None if nll["mean"] is None else float(np.exp(nll["mean"])),
        # exp is monotone: it takes the ends of one interval to the ends of the other.
        "interval": None if nll["interval"] is None else np.exp(nll["interval"]).tolist(),
        "nll": nll,
        "left_out": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
    }


def _diversity(texts: Sequence[list[str]], prompts: Sequence[str]) -> dict[str, Any]:
    """Repetition in and among the texts that have words; the others are counted."""
    kept = [(words, prompt) for words, prompt in zip(texts, prompts, strict=True) if words]
    words = [some for some, _ in kept]
    groups = [prompt for _, prompt in kept]
    equation = [auto_bleu(some) for some in words]
    fairseq = [auto_bleu_fairseq(some) for some in words]
    found: dict[str, Any] = {
        "without_words": len(texts) - len(kept),
        "auto_bleu_2": estimate(equation, groups),
        "auto_bleu_2_fairseq_geometric": estimate(fairseq, groups),
        "auto_bleu_2_fairseq_arithmetic": estimate([auto_bleu_fairseq(s, mean="arithmetic") for s in words], groups),
        "self_bleu_2_geometric": None,
        "vert": None,
    }
    if len(words) > 1:
        among = self_bleu(words)
        found["self_bleu_2_geometric"] = estimate(among, groups)
        found["vert"] = _vert(among, fairseq, groups)
    return found


def _vert(among: list[float], within: list[float], groups: list[str]) -> dict[str, Any]:
    """VERT of the two means, with the interval of prompts drawn again."""
    _, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, among), np.bincount(index, within), np.bincount(index)
    interval = None
    if len(sums[2]) > 1:
        drawn = scipy.stats.bootstrap(
            sums,
            lambda a, b, n, axis=-1: np.sqrt(a.sum(axis=axis) * b.sum(axis=axis)) / n.sum(axis=axis),
            n_resamples=NUM_BOOTSTRAP,
            paired=True,
            method="percentile",
            rng=0,
        ).confidence_interval
        interval = [float(drawn.low), float(drawn.high)]
    return {"n": len(groups), "value": vert(float(np.mean(among)), float(np.mean(within))), "interval": interval}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
