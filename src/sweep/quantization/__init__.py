"""Quantisation: to which values weights are rounded, by which rule, and of which matrices."""
