"""Measurements. Without a GPU: `traffic` (bytes, launches, FLOPs), `codegen`, `reference_cpu`.

Beside other implementations (`peers`), on a GPU or a CPU: `layer`, `stages`, `memory`, `profiles`;
`ceilings` of the device and `tune` for the tile table. `gpu` runs all of them in steps, `report`
makes tables and plots of what they wrote. Predictions and outcomes are recorded in NOTES.md.
"""
