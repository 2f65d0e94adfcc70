"""Evaluation of a model by the published protocols: `stpath evaluate`."""
