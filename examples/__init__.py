"""Examples: short scripts, a forecaster, and what was studied with it."""
