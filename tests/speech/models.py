"""Tiny random models in the real formats."""

import numpy as np
import torch
from transformers import HubertConfig, HubertModel, MimiConfig, MimiModel, PreTrainedConfig, PreTrainedModel

from smoltolk.speech.hubert import HubertSettings, HubertTokenizer
from smoltolk.speech.mimi import MimiSettings, MimiTokenizer

HUBERT_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (16, 16, 16, 16),
    "conv_stride": (5, 4, 4, 4),
    "conv_kernel": (10, 8, 8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "initializer_range": 0.2,
}


def noise(seconds: float, rate_hz: int = 16_000, seed: int = 0) -> np.ndarray:
    """Noise whose loudness changes, float32 (samples,)."""
    rng = np.random.default_rng(seed)
    num_samples = int(seconds * rate_hz)
    loudness = np.repeat(rng.uniform(0, 0.3, num_samples // 1000 + 1), 1000)[:num_samples]
    return (loudness * rng.standard_normal(num_samples)).astype(np.float32)


def tiny_hubert(
    model_class: type[PreTrainedModel] = HubertModel,
    config_class: type[PreTrainedConfig] = HubertConfig,
    seed: int = 0,
    **settings: object,
) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config_class(**(HUBERT_SIZES | settings))).eval()


def tiny_hubert_tokenizer(model: PreTrainedModel | None = None, *, batch_size: int = 1, **settings: object):
    """20 units from frames of noise; windows of 1 s and 0.2 s of context on both sides, 50 Hz."""
    model = model or tiny_hubert()
    chosen = HubertSettings(**({"layer": 2, "is_normalized": False, "window_s": 1.0, "context_s": 0.2} | settings))
    with torch.no_grad():
        hidden = model(torch.from_numpy(noise(2))[None], output_hidden_states=True).hidden_states[chosen.layer][0]
    return HubertTokenizer(model, hidden[::5][:20].numpy(), chosen, batch_size=batch_size)


def tiny_mimi(seed: int = 0, **settings: object) -> MimiModel:
    sizes = {
        "hidden_size": 16,
        "num_filters": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "codebook_size": 32,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 3,
        "upsample_groups": 16,
        "sliding_window": 50,
        "layer_scale_initial_scale": 0.5,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MimiModel(MimiConfig(**(sizes | settings))).eval()
        for name, codebook in model.named_buffers():
            if name.endswith("embed_sum"):
                codebook.normal_()
    return model


def tiny_mimi_tokenizer(model: MimiModel | None = None, *, batch_size: int = 1) -> MimiTokenizer:
    """32 units at 12.5 Hz; windows of 3.2 s and 2 s of context before them."""
    return MimiTokenizer(model or tiny_mimi(), MimiSettings(window_s=3.2, context_s=2.0), batch_size=batch_size)
