"""The text LMs that the shipped recipes name: configurations as published on the Hugging Face hub, and a tiny one."""

from functools import partial

from transformers import LlamaConfig, Qwen3Config

SMOLLM = partial(LlamaConfig, vocab_size=49152, tie_word_embeddings=True)
SIZES = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "360M": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "1.7B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
CONFIGS = {
    f"HuggingFaceTB/{family}-{size}": partial(SMOLLM, max_position_embeddings=positions, **settings)
    for family, positions in (("SmolLM", 2048), ("SmolLM2", 8192))
    for size, settings in SIZES.items()
} | {
    "Qwen/Qwen3-0.6B-Base": partial(
        Qwen3Config,
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        eos_token_id=151643,
    ),
    "backbone": partial(  # of the miniature's size
        LlamaConfig,
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
}
