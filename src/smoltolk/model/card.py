"""The model card of an exported model, and the words and numbers in it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .configuration_smoltolk import SmolTolkConfig
from .modeling_smoltolk import SmolTolkForCausalLM

PARTS = {
    "lm": "text backbone",
    "control_embeddings": "control embeddings",
    "unit_embeddings": "unit embeddings",
    "input_adapter": "input adapter",
    "layer_selector": "layer selector",
    "output_adapter": "output adapter",
    "output_norm": "output norm",
    "unit_head": "unit head",
}
NOT_SETTINGS = ("lm_config", "speech_tokenizer", "text_tokenizer_fingerprint", "tie_word_embeddings")
PROMPT = "Once upon a time"


def describe(config: SmolTolkConfig) -> str:
    """The variant in words."""
    num_in, num_out = config.num_input_adapter_layers, config.num_output_adapter_layers
    selector = "a linear selector" if config.selector_hidden_size is None else "a selector with a hidden layer"
    source = {
        "static": "the static average",
        "last": "the last level",
        "levels": "all levels",
    }.get(str(config.selector_input), f"layer index {config.selector_input}")
    levels = {
        "last": "the last level",
        "static": "a static average of all levels",
        "selected": f"levels selected per position by {selector} that looks at {source}",
    }[config.layer_mixing]
    return ", ".join(
        [
            f"late fusion ({num_in} input adapter layer{'s' * (num_in > 1)})" if num_in else "early fusion",
            f"speech from {levels}",
            f"{num_out} output adapter layer{'s' * (num_out > 1)}" if num_out else "no output adapter",
            "raw residual" if config.speech_residual else "no residual",
            f"unit head {'tied' if config.tie_speech_embeddings else 'untied'}",
        ]
    )


def parameter_counts(model: SmolTolkForCausalLM) -> dict[str, int]:
    """Number of parameters of each part that has some; tied ones count where they come first."""
    counts = {PARTS[name]: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return {name: count for name, count in counts.items() if count}


def public_name(name: str) -> str:
    """A name on the hub as it is; of a path only its last part, since folders of one's own are nobody's business."""
    is_on_hub = name.count("/") <= 1 and "\\" not in name and not name.startswith((".", "/", "~"))
    return name if is_on_hub else Path(name).name


def model_card(
    model: SmolTolkForCausalLM,
    name: str,
    *,
    has_tokenizer: bool,
    has_vocoder: bool,
    record: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
) -> str:
    """Writes the card of a model, in Markdown.

    Args:
        model: the model.
        name: name of the folder it is in.
        has_tokenizer: whether the text tokenizer is in the folder.
        has_vocoder: whether a vocoder is in the folder.
        record: what training kept beside the model, if it did.
        results: results of `smoltolk evaluate`.
        license: licence of the weights, if it is to be stated.
    """
    config: SmolTolkConfig = model.config  # type: ignore[assignment]
    facts = {"library_name": "transformers", "tags": ["smoltolk", "text-speech", "speech-language-model"]}
    if license is not None:
        facts["license"] = license
    sections = {
        "Use": _usage(name, has_tokenizer, has_vocoder),
        "Model": _model(model),
        "Ids": _ids(model),
        "Speech tokenizer": _speech_tokenizer(config.speech_tokenizer),
        "Training": _training(record),
        "Evaluation": _evaluation(results),
        "Licence": [license or "None is stated."],
    }
    lines = ["---", yaml.safe_dump(facts, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    lines += [
        "A text-speech language model after SmolTolk ([arXiv 2503.06211](https://arxiv.org/abs/2503.06211)): "
        f"{describe(config)}."
    ]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return "\n".join(lines) + "\n"


def _usage(name: str, has_tokenizer: bool, has_vocoder: bool) -> Iterator[str]:
    name = json.dumps(name, ensure_ascii=False)  # in quotes
    yield "With transformers alone, a text prompt that speech is to follow:"
    yield from ("", "```python", "import torch")
    yield f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}"
    yield ""
    yield f"model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True)"
    yield "ids = model.ids"
    if has_tokenizer:
        yield f"tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)"
        yield f'text = tokenizer("{PROMPT}", add_special_tokens=False)["input_ids"]'
    else:
        yield "text = [ids.end_of_text_id]  # ids of the backbone's tokenizer"
    yield from (
        "prompt = torch.tensor([[*text, ids.switch_id]])",
        "output = model.generate(",
        "    prompt,",
        "    do_sample=False,",
        "    max_new_tokens=20,",
        "    eos_token_id=ids.end_of_speech_id,",
        "    pad_token_id=ids.end_of_text_id,",
        "    suppress_tokens=[*range(ids.speech_offset), *range(ids.end_of_speech_id + 1, ids.vocab_size)],",
        ")",
        "units = output[0, prompt.shape[1] :] - ids.speech_offset",
        "```",
    )
    if has_tokenizer:
        yield from ("", "With smoltolk, which also hears and speaks:", "", "```python")
        yield from ("from smoltolk import SmolTolkPipeline", "")
        yield f"pipeline = SmolTolkPipeline.from_pretrained({name})"
        yield f'print(pipeline("{PROMPT}", to="text").text)'
        if has_vocoder:
            yield f'pipeline("{PROMPT}", to="speech").save("speech.wav")'
        yield "```"


def _model(model: SmolTolkForCausalLM) -> Iterator[str]:
    config: SmolTolkConfig = model.config  # type: ignore[assignment]
    counts = parameter_counts(model)
    rows = [(part, f"{count:,}") for part, count in (counts | {"all": sum(counts.values())}).items()]
    yield from _table(("part", "parameters"), rows)
    yield ""
    lm = config.lm_config
    settings = {
        "backbone": f"{lm.model_type}, {lm.num_hidden_layers} layers of width {lm.hidden_size}",
        "max_position_embeddings": config.max_position_embeddings,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    settings |= {s: getattr(config, s) for s in SmolTolkConfig.__annotations__ if s not in NOT_SETTINGS}
    yield from _table(("setting", "value"), [(key, value) for key, value in settings.items() if value is not None])


def _ids(model: SmolTolkForCausalLM) -> Iterator[str]:
    ids = model.ids
    rows: list[tuple[Any, Any]] = [
        (f"0 … {ids.text_vocab_size - 1}", f"text; {ids.end_of_text_id} ends it"),
        (f"{ids.bop_id}, {ids.eop_id}", "begin and end of a prompt"),
        (ids.switch_id, "switch between text and speech, in both directions"),
        (f"{ids.speech_offset} … {ids.end_of_speech_id - 1}", f"units 0 … {ids.num_units - 1}"),
        (ids.end_of_speech_id, "end of speech"),
    ]
    if ids.num_reserved_speech_tokens:
        rows.append((f"{ids.end_of_speech_id + 1} … {ids.vocab_size - 1}", "reserved, never generated"))
    yield from _table(("ids", "meaning"), rows)


def _speech_tokenizer(card: Mapping[str, Any] | None) -> Iterator[str]:
    if card is None:
        yield "Unknown: none was kept with the model."
    else:
        yield from _table(("speech tokenizer", "value"), list(card.items()))


def _training(record: Mapping[str, Any] | None) -> Iterator[str]:
    if record is None:
        yield "No record of the training was kept with this model."
        return
    recipe = record["recipe"]
    steps = sum(stage["steps"] for stage in recipe["stages"])
    yield (
        f"Recipe `{recipe['name']}` on the backbone `{public_name(recipe['model']['backbone'])}`, "
        f"seed {recipe['seed']}, {recipe['precision']}: {steps:,} steps, {record['tokens']:,} tokens, "
        f"{record['flops']:.3g} FLOPs, {record['seconds'] / 3600:.2f} hours; {record['skipped_steps']} steps skipped."
    )
    yield ""
    stages = []
    losses = record.get("validation_losses") or [{}] * len(recipe["stages"])
    for number, (stage, loss) in enumerate(zip(recipe["stages"], losses, strict=False), start=1):
        text_rate = stage["text_learning_rate"] or stage["learning_rate"]
        rates = f"{stage['learning_rate']:g}" + (f", text {text_rate:g}" if stage["train"] == "everything" else "")
        mixture = ", ".join(f"{task} {share:g}" for task, share in stage["mixture"].items() if share)
        rows = f"{stage['rows_per_step']} × {stage['row_tokens']}"
        measured = ", ".join(f"{task} {value:.4f}" for task, value in loss.items() if value is not None)
        stages.append((number, stage["train"], stage["steps"], rows, mixture, rates, measured or "not recorded"))
    columns = ("stage", "trained", "steps", "rows × tokens", "mixture", "peak rate", "validation loss at its end")
    yield from _table(columns, stages)
    yield ""
    data = recipe["data"]
    stores = []
    for task, shares in data.items():
        if isinstance(shares, list) and shares:
            weights = (share["weight"] for share in shares)  # numbers, or "size"
            named = zip((public_name(share["store"]) for share in shares), weights, strict=True)
            stores.append(
                (task, ", ".join(f"{name} ({w if isinstance(w, str) else format(w, 'g')})" for name, w in named))
            )
    yield from _table(("task", "stores (weight)"), stores)
    yield ""
    policy = dict(data["policy"])
    kind = policy.pop("kind")
    settings = ", ".join(
        f"{name} {' to '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in policy.items()
    )
    yield f"Interleaving: {kind}" + (f" ({settings})." if settings else ".")


def _evaluation(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not results:
        yield "No results were given."
        return
    rows = []
    for result in results:
        for pair, kinds in result["accuracy"].items():
            for kind, a in kinds.items():
                interval = f"{100 * a['low']:.1f} … {100 * a['high']:.1f}"
                accuracy = f"{100 * a['accuracy']:.1f}"
                items = public_name(result["items"])
                rows.append((result["task"], items, result["protocol"], pair, kind, a["n"], accuracy, interval))
    columns = ("task", "items", "protocol", "pair", "kind", "n", "accuracy %", "95 % interval")
    yield from _table(columns, rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    for row in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"
