"""Measurements. Without a GPU: `traffic` (bytes, launches, FLOPs), `codegen`, `clock` (modelled).

Microbenchmarks of the `stages` and of the layer: `pytest benchmarks --benchmark-only`. Interleaved
with other implementations (`peers`), on a GPU or a CPU: `layer`, with `memory` and `profiles` as
columns; `ceilings` of the device and `tune` for the tile table. `gpu` runs all of them in steps,
`report` makes tables and plots of what they wrote. Predictions and outcomes are recorded in
NOTES.md.
"""

import os

# Before anything imports triton.
if os.environ.get("GPU_REHEARSAL"):
    from benchmarks.host import rehearsal

    rehearsal.install()
