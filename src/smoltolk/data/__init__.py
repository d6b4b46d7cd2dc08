"""Data: the store of utterances, its preparation, interleaving, and batches."""
