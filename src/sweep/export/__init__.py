"""What sweep has made, taken out into other programs: `python -m sweep.export`."""
