"""The offline demonstration: a miniature world, spoken, learnt and measured on a small CPU."""
