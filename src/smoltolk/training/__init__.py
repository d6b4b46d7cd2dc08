"""Two-stage training of SmolTolk, of early fusion and of every ablation, from one recipe."""
