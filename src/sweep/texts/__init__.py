"""Texts: what models are calibrated on, tuned on and evaluated on."""
