"""Pruning: what is scored, what is chosen, and what is then done to the model."""
