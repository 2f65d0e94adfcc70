"""Slide images: read where they lie, cut into tiles of tissue, and encoded into features."""
