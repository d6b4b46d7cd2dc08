"""Generation: continuing text and speech prompts in text or speech."""
