"""Evaluation: one scorer with named protocols, tasks of pairs, results with error bars, comparisons."""
