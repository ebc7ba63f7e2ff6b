"""Measurements: `traffic` and `reference_cpu` need no GPU; results are recorded in NOTES.md."""
