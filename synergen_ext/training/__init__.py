"""Training: recipes, data, stages, the loop, checkpoints."""
