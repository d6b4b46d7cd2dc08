"""Speech: the audio loader, speech tokenizers, vocoders and the synthesiser of the demo."""
