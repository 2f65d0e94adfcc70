"""Engines in a Triton Inference Server."""
