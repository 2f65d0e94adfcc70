"""Tile encoders as engines: timm's vision transformer -> folded graph -> proof -> folder."""
