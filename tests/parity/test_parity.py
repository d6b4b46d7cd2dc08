"""The numbers of the authors' own code, reproduced. README.md beside this file says how they came to be."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig

import smoltolk
from smoltolk.model.losses import mean_entropy

GOLDEN = Path(__file__).parent
BATCHES = ("inter_textfirst", "inter_mixed", "speech", "text")


def golden_model(variant):
    """`full` is read from a checkpoint file of the authors, `baseline` from a dict."""
    args = json.loads((GOLDEN / variant / "model_args.json").read_text())
    source = GOLDEN / "ckpt/ckpt_full.pt"
    if variant == "baseline":
        weights = load_file(GOLDEN / "baseline/weights.safetensors")
        source = {"model": weights, "model_args": args["model_args"]}
    return smoltolk.import_checkpoint(source, LlamaConfig(**args["llama_config"]))


def our_ids(ids, is_speech, offset):
    return torch.where(is_speech, ids + offset, ids)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", ["full", "baseline"])
def test_logits_layer_weights_and_losses_are_the_authors(variant, batch):
    model = golden_model(variant)
    offset = model.ids.speech_offset
    b, golden = (
        load_file(GOLDEN / f"batches/{batch}.safetensors"),
        load_file(GOLDEN / f"{variant}/{batch}.safetensors"),
    )
    inputs = our_ids(b["inputs"][:, 0], b["audio_input_masks"], offset)
    targets = our_ids(b["targets"][:, 0], b["audio_preds_masks"], offset)
    with torch.no_grad():
        output = model(inputs)
    if "speech_logits" in golden:
        ours = output.logits[b["audio_preds_masks"]][:, offset:]
        torch.testing.assert_close(ours, golden["speech_logits"], atol=2e-4, rtol=0)
    if "text_logits" in golden:
        ours = output.logits[b["txt_preds_masks"]][:, :offset]
        torch.testing.assert_close(ours, golden["text_logits"], atol=2e-4, rtol=0)
    if "selector_weights" in golden:
        torch.testing.assert_close(output.layer_weights, golden["selector_weights"], atol=2e-4, rtol=0)
        static = model.layer_selector.static_logits.detach()
        torch.testing.assert_close(static.softmax(0), golden["static_layer_weights"].flatten(), atol=1e-6, rtol=0)

    # Their targets are the row moved by one: add the last one, so that our shift finds them all.
    ids = torch.cat([inputs, targets[:, -1:]], 1)
    is_target = golden["speech_loss_mask"] | b["txt_preds_masks"]
    labels = F.pad(targets.masked_fill(~is_target, -100), (1, 0), value=-100)
    with torch.no_grad():
        ours = model(ids, labels=labels)
    if "loss.coarse" in golden and golden["speech_loss_mask"].any():
        torch.testing.assert_close(ours.speech_loss, golden["loss.coarse"], atol=1e-5, rtol=0)
    if b["txt_preds_masks"].any():
        torch.testing.assert_close(ours.text_loss, golden["loss.txt"], atol=1e-5, rtol=0)
    expected = golden["loss.lm"]
    if golden["loss.selwa_entropy"]:  # without speech labels there is none
        entropy = mean_entropy(output.layer_weights, torch.ones_like(inputs))
        torch.testing.assert_close(entropy, golden["loss.selwa_entropy"], atol=1e-5, rtol=0)
        total = golden["loss.lm"] - 0.01 * golden["loss.selwa_entropy"]
        torch.testing.assert_close(total, golden["loss.total"], atol=1e-5, rtol=0)
        # Ours averages the entropy over the added position too.
        expected = expected - 0.01 * mean_entropy(ours.layer_weights, torch.ones_like(ids))
    torch.testing.assert_close(ours.loss, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("variant", ["full", "baseline"])
def test_greedy_continuations_are_the_authors(variant, use_cache):
    model = golden_model(variant)
    offset = model.ids.speech_offset
    for name, case in json.loads((GOLDEN / variant / "generation.json").read_text()).items():
        is_speech = torch.tensor([case["prompt_is_speech"]], dtype=torch.bool)
        ids = our_ids(torch.tensor([case["prompt"]]), is_speech, offset)
        block = slice(offset, None) if case["modality"] == "speech" else slice(0, model.ids.text_vocab_size)
        cache, step, tokens = None, ids, []
        for _ in range(20):
            with torch.no_grad():
                output = model(step, past_key_values=cache, use_cache=use_cache)
            token = output.logits[:, -1:, block].argmax(-1)
            tokens.append(token.item())
            new = token + block.start
            ids, cache = torch.cat([ids, new], 1), output.past_key_values
            step = new if use_cache else ids
        assert tokens == case["tokens"], name
