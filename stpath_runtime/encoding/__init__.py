"""Tiles of spots through the stages of an engine: features to embeddings, embeddings to expression."""
