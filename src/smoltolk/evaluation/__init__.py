"""Evaluation: one scorer, StoryCloze-type tasks in all modality pairs, results with error bars."""
