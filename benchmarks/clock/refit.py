"""The machine's constants from measured kernels: what the model would need to have said so.

A launch is modelled as the largest of its time on an SM, in HBM and in L2. Fitted are a factor for
each of the three, and what every launch takes besides, by least squares of logarithms. No launch is
simulated anew, so latencies are taken to move with the clock.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.clock.machine import H200, Machine

__all__ = ["refit"]

# Factors are looked for between a third and three, launches between 0 and 4 us.
_FACTORS = np.geomspace(1 / 3, 3, 121)
_LAUNCH_US = np.linspace(0, 4, 21)


def refit(
    kernels: Iterable[dict[str, Any]], machine: Machine = H200
) -> tuple[Machine, dict[str, float]]:
    """Fit the constants to measured kernels.

    Args:
        kernels: rows of `measured.compare`; those without both times are passed over.
        machine: that was modelled.

    Returns:
        The machine with other ``clock_hz, hbm_rate, l2_rate, l2_swizzled_rate, start``, and
        ``kernels`` (how many), ``error_before`` and ``error_after``: by how much times are off, as
        a share: the root mean square in logarithms.

    Raises:
        ValueError: where no kernel has both times.
    """
    rows = [row for row in kernels if "measured_over_modelled" in row and row["kernel"] != "aten"]
    if not rows:
        raise ValueError("refit: expected kernels that are modelled and measured, got none.")
    times = np.array([launch for row in rows for launch in row["parts"]])
    counts = [len(row["parts"]) for row in rows]
    starts = np.cumsum([0, *counts[:-1]])
    logs = np.log([row["measured_us"] for row in rows])

    def error(scale: list[float], launch_us: float) -> float:
        found = np.add.reduceat((times * scale).max(1) + launch_us, starts)
        return float(np.sqrt(np.square(np.log(found) - logs).mean()))

    def best_scale(scale: list[float], launch_us: float) -> list[float]:
        for _ in range(8):
            before = scale
            for part in range(3):
                tried = [[*scale[:part], f, *scale[part + 1 :]] for f in _FACTORS]
                scale = min([scale, *tried], key=lambda s: error(s, launch_us))
            if scale == before:
                break
        return scale

    fits, scale = [], [1.0, 1.0, 1.0]
    for us in _LAUNCH_US:
        scale = best_scale(scale, us)
        fits.append((scale, float(us)))
    scale, launch_us = min(fits, key=lambda fit: error(*fit))
    before, after = error([1.0, 1.0, 1.0], 0.0), error(scale, launch_us)
    sm, hbm, l2 = scale
    clock_hz = machine.clock_hz / sm
    fitted = dataclasses.replace(
        machine,
        clock_hz=clock_hz,
        hbm_rate=machine.hbm_rate / hbm,
        l2_rate=machine.l2_rate / l2,
        l2_swizzled_rate=machine.l2_swizzled_rate / l2,
        start=machine.start + launch_us * 1e-6 * clock_hz,
    )
    errors = {"error_before": math.expm1(before), "error_after": math.expm1(after)}
    return fitted, {"kernels": len(rows), **errors}
