"""STFlow, the second model: neighbours and frames of a slide, and samples of its expression, tile by tile."""
