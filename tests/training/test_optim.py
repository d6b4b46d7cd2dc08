"""The account of operations."""

import pytest
import torch
from tests.conftest import EARLY_FUSION, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from smoltolk.training.config import LoraSettings
from smoltolk.training.lora import add_lora, is_lora, lora_size
from smoltolk.training.optim import training_flops

ATTENTION = "scaled_dot_product"
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # which PyTorch does not count


@pytest.mark.parametrize(
    "settings",
    [
        {},
        EARLY_FUSION,
        {"layer_mixing": "static"},
        {"selector_hidden_size": 5},
        {"selector_input": "levels", "selector_level_size": 3, "selector_level_hidden_size": 7},
    ],
)
@pytest.mark.parametrize("trained", ["everything", "speech", "lora", "speech, with LoRA"])
def test_the_account_is_what_the_matrix_products_of_a_step_come_to(settings, trained):
    model = tiny_model(**settings).train()
    if "lora" in trained.lower():
        add_lora(model, LoraSettings(rank=5))
    for name, parameter in model.text_parameters():
        parameter.requires_grad = trained == "everything" or (trained == "lora" and is_lora(name))
    ids, config = model.ids, model.config
    text, speech = torch.arange(1, 8).repeat(2, 1), torch.arange(5).repeat(2, 1) + ids.speech_offset
    input_ids = torch.cat([text, speech], 1)  # (2, 12); the first speech id is predicted by the unit head
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        model(input_ids, labels=input_ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in counts.items() if ATTENTION not in str(operator))

    found = training_flops(
        config,
        num_tokens=input_ids.numel(),
        num_speech_tokens=speech.numel(),
        num_text_labels=2 * 6,
        num_speech_labels=2 * 5,
        row_tokens=12,
        is_backbone_trained=trained == "everything",
        lora_size=lora_size(model),
        is_lora_trained=trained == "lora",
    )
    lm = config.lm_config
    layers = lm.num_hidden_layers + config.num_output_adapter_layers
    attention = 3 * layers * input_ids.numel() * 2 * 12 * lm.hidden_size
    mixes = {"last": 0, "static": 1, "selected": 2 if config.selector_input == "static" else 1}[config.layer_mixing]
    elementwise = 6 * input_ids.numel() * mixes * lm.num_hidden_layers * lm.hidden_size  # no matrix products
    assert found - attention - elementwise == products
