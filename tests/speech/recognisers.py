"""Tiny random recognisers, saved in the real format."""

import json
from pathlib import Path

import torch
from transformers import (
    AddedToken,
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)


def save_ctc(folder: Path) -> None:
    """A wav2vec2 that hears letters."""
    folder.mkdir()
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4} | {c: i for i, c in enumerate("abcdefg", start=5)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
        initializer_range=1.0,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=16_000, do_normalize=True)
    Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)


def save_whisper(folder: Path) -> None:
    """A Whisper of two languages that hears single bytes."""
    tasks = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    names = ["endoftext", "startoftranscript", "en", "de", *tasks, *(f"{0.02 * i:.2f}" for i in range(1501))]
    tokenizer = WhisperTokenizer(vocab={chr(c): i for i, c in enumerate(range(33, 127))}, merges=[])
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])

    def token_id(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    ends = {name: token_id("endoftext") for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    start = {"decoder_start_token_id": token_id("startoftranscript")}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            num_mel_bins=8,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_target_positions=32,
            suppress_tokens=[],
            begin_suppress_tokens=[],
            init_std=0.5,
            **ends,
            **start,
        )
    )
    model.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{name}|>": token_id(name) for name in ("en", "de")},
        task_to_id={name: token_id(name) for name in ("transcribe", "translate")},
        no_timestamps_token_id=token_id("notimestamps"),
        prev_sot_token_id=token_id("startofprev"),
        max_initial_timestamp_index=50,
        max_length=24,
        **ends,
        **start,
    )
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=8)
    WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
