"""A model class for EleutherAI's lm-evaluation-harness, on top of the one scorer.

github.com/EleutherAI/lm-evaluation-harness, whose tasks and metrics are taken as they are.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import smoltolk
from smoltolk.evaluation.protocols import Candidate, Protocol
from smoltolk.evaluation.scoring import ScoringSettings, score_with_greedy
from smoltolk.generation.sampling import continue_ids
from smoltolk.model.fingerprint import checkpoint_fingerprint
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.terminal import progress_bar

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        "text tasks need EleutherAI's lm_eval, which is not installed: pip install 'smoltolk[harness]'"
    ) from error

# The harness wants sums, and normalises them itself where a task says so.
TEXT = Protocol("lm-eval", span="continuation", length_norm="sum")
DEFAULT_MAX_GEN_TOKS = 256  # the harness's own
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts


def load_for_text(folder: str | Path) -> tuple[SmolTolkForCausalLM, PreTrainedTokenizerBase]:
    """Loads a SmolTolk model, or puts a plain text LM into one without speech parts, in float32; and its tokenizer.

    Both go through the same code, so that a model before and after training differs in its weights alone.

    Raises:
        ValueError: the folder holds no model, or a text LM that SmolTolk cannot be built on.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: give the folder of a SmolTolk model or of a text LM")
    if json.loads(path.read_text(encoding="utf-8")).get("model_type") == "smoltolk":
        model = SmolTolkForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        model = SmolTolkForCausalLM.from_backbone(
            str(folder), num_units=1, num_input_adapter_layers=0, num_output_adapter_layers=0, layer_mixing="last"
        )
    return model, AutoTokenizer.from_pretrained(folder)


@register_model("smoltolk")
class SmolTolkLM(TemplateLM):
    """A SmolTolk model, or a plain text LM, as the harness sees it: text alone.

    Texts are tokenized, and long contexts cut, as the harness's own class `hf` does, but for one token: the scorer
    reads the last token too, so that `max_length` is one less than the model's positions.

    Args:
        pretrained: folder of a SmolTolk model or of a text LM.
        device: where it computes; without a GPU the CPU, with a warning, since the harness asks for "cuda:0" by itself.
        batch_size: sequences in one forward; "auto" for `max_batch_size`.
        max_batch_size: sequences in one forward with batch_size "auto".
        max_batch_tokens: tokens in one forward, padding included.
        autocast: whether to compute in bfloat16 where PyTorch's autocast does.
        max_length: most tokens that are read before the last one that is scored; None for what the model can.

    Raises:
        ValueError: no such model, or a size that is out of range.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        device: str | None = "cpu",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_batch_tokens: int = ScoringSettings.max_batch_tokens,
        autocast: bool = False,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size == "auto":
            batch_size = max_batch_size or ScoringSettings.batch_size
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size is {batch_size!r}: give a number, or 'auto'")
        self.settings = ScoringSettings(
            batch_size=int(batch_size), max_batch_tokens=max_batch_tokens, autocast=autocast
        )
        self.folder = Path(pretrained)
        self.model, self.tokenizer = load_for_text(pretrained)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            warnings.warn(f"device is {device!r}, but torch sees no GPU: computing on the CPU", stacklevel=2)
            device = "cpu"
        self.model.to(device or "cpu")  # type: ignore[arg-type]
        self._device = self.model.device
        longest = self.model.config.max_position_embeddings - 1
        if max_length is not None and not 1 <= max_length <= longest:
            raise ValueError(f"max_length is {max_length}: give 1 to {longest}, which this model can read")
        self.max_length = max_length or longest
        self.num_truncated = 0  # contexts that lost their beginning

    @property
    def eot_token_id(self) -> int:
        """Id of the end of a text."""
        return self.model.ids.end_of_text_id

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without a context: the tokenizer's start, or else its end."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; by default with the special tokens that its tokenizer adds, unless they are there."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results about the model."""
        return {
            "smoltolk_version": smoltolk.__version__,
            "checkpoint": checkpoint_fingerprint(self.folder),
            "precision": self.settings.precision(self.model),
            "max_length": self.max_length,
            "num_truncated": self.num_truncated,
        }

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy decoding gives them; requests are texts and ids."""
        candidates = []
        before = self.num_truncated
        for _texts, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, and 1 to {self.max_length} can be scored: leave "
                    f"the document out; it begins with {self.tokenizer.decode(continuation[:20])!r}"
                )
            room = self.max_length + 1 - len(continuation)
            self.num_truncated += len(context) > room
            candidates.append(Candidate(np.array(context[-room:], np.int64), np.array(continuation, np.int64)))
        self._warn_of_cuts(before, len(requests))
        answers: list[tuple[float, bool]] = []
        size = self.settings.chunk_items
        with progress_bar(transient=True, disable=disable_tqdm) as bar:
            task = bar.add_task("sequences scored", total=len(candidates))
            for start in range(0, len(candidates), size):
                scores, is_greedy = score_with_greedy(
                    self.model,
                    candidates[start : start + size],
                    TEXT,
                    self.settings,
                    lambda count: bar.advance(task, count),
                )
                for score, greedy in zip(scores.tolist(), is_greedy.tolist(), strict=True):
                    if (texts := requests[len(answers)][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, (score, greedy))
                    answers.append((score, greedy))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of `max_length` that do not overlap."""
        windows, counts = [], []
        for request in requests:
            (text,) = request.args
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(part)) for part in parts]
            windows += found
            counts.append(len(found))
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)]
        totals, place = [], 0
        for request, count in zip(requests, counts, strict=True):
            totals.append(float(sum(scores[place : place + count])))
            place += count
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts until a stop string, the end of the text, or the largest number of tokens.

        What is sampled comes from torch's generator, which the harness seeds.

        Raises:
            ValueError: an option of generation that is not known, or no room for a context.
        """
        before = self.num_truncated
        prompts = [self._prompt(*request.args) for request in requests]
        self._warn_of_cuts(before, len(requests))
        answers = [""] * len(requests)
        order = sorted(range(len(prompts)), key=lambda i: (repr(prompts[i].how), len(prompts[i].ids)))
        with progress_bar(transient=True, disable=disable_tqdm) as bar:
            task = bar.add_task("texts continued", total=len(prompts))
            for how, members in groupby(order, key=lambda i: prompts[i].how):
                for batch in _batches(list(members), self.settings.batch_size):
                    for i, text in zip(batch, self._continue([prompts[i].ids for i in batch], how), strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.advance(task, len(batch))
        return answers

    def _prompt(self, context: str, settings: Mapping[str, Any]) -> "_Prompt":
        how = _How.parse(settings)
        room = self.max_length - how.max_gen_toks
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {how.max_gen_toks}, and a model that reads {self.max_length} tokens has no room for "
                "a context then: give less (--gen_kwargs max_gen_toks=…)"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.num_truncated += len(ids) > room
        return _Prompt(ids[-room:], how)

    def _continue(self, prompts: Sequence[Sequence[int]], how: "_How") -> list[str]:
        length = max(map(len, prompts))
        input_ids = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, length - len(ids) :], mask[row, length - len(ids) :] = torch.tensor(ids), 1

        def has_stopped(seen: Tensor, *_: Any, **__: Any) -> Tensor:
            texts = self.tokenizer.batch_decode(seen[:, length:])  # a stop may be a special token
            return torch.tensor([how.cut(text) != text for text in texts], device=seen.device)

        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.autocast):
            continuations = continue_ids(
                self.model,
                input_ids.to(self._device),
                mask.to(self._device),
                max_new_tokens=how.max_gen_toks,
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                seed=None,
                stopping=[has_stopped] if how.until else [],
            )
        return [how.cut(str(self.tokenizer.decode(ids, skip_special_tokens=True))) for ids in continuations]

    def _warn_of_cuts(self, before: int, total: int) -> None:
        if cut := self.num_truncated - before:
            warnings.warn(f"{cut} of {total} contexts were too long and lost their beginning", stacklevel=3)


@dataclass(frozen=True)
class _How:
    """How texts are continued, from the harness's options of generation."""

    until: tuple[str, ...]
    max_gen_toks: int
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "_How":
        known = {"until", "do_sample", "temperature", "top_k", "top_p", *_LIMITS}
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"the option of generation {unknown[0]} is {settings[unknown[0]]!r}, which is not known here: give "
                f"some of {', '.join(sorted(known))}"
            )
        until = settings.get("until") or []
        temperature = float(settings.get("temperature") or 0)
        samples = settings.get("do_sample")
        if samples is False:
            temperature = 0.0
        elif samples and "temperature" not in settings:
            temperature = 1.0
        return cls(
            until=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            max_gen_toks=int(next((settings[name] for name in _LIMITS if name in settings), DEFAULT_MAX_GEN_TOKS)),
            temperature=temperature,
            top_k=int(settings.get("top_k") or 0),
            top_p=float(settings.get("top_p", 1.0)),
        )

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min((place for stop in self.until if (place := text.find(stop)) >= 0), default=len(text))]


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    how: _How


def _batches(members: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (members[start : start + size] for start in range(0, len(members), size))


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Runs the harness's own command line, which knows `--model smoltolk` then.

    The harness (0.4.13) has a fixed list of models and looks for no plug-ins, so that its command `lm_eval` alone
    never learns of ours.
    """
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
