"""Benchmarks as they lie on disk: each layout becomes a task of pairs, or a list of all that is wrong with it."""
