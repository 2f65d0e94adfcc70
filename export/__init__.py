"""PyTorch checkpoint -> engine directory, and the proof that the engine gives the reference's numbers."""
