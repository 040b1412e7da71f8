"""Formats: how a matrix is held and multiplied."""
