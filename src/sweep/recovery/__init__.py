"""Recovery: what mends a pruned model, with what was removed kept away."""
