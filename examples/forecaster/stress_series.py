"""Generated series that are hard for segments: each breaks one thing that routing them relies on.

Every generator gives (N, C) values, the same for the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

ROWS, CHANNELS, NOISE = 8000, 2, 0.15


def _forms(phase: FloatArray) -> FloatArray:
    """(3, N): sine, square and sawtooth of a phase that counts cycles."""
    part = phase % 1.0
    return np.stack([np.sin(2 * np.pi * part), np.where(part < 0.5, 1.0, -1.0), 2 * part - 1])


def _regimes(durations: Callable[[np.random.Generator], int], seed: int) -> FloatArray:
    """Cycles of 24 steps whose form changes at the end of each duration."""
    generator = np.random.default_rng(seed)
    form = np.empty(0, dtype=np.int64)
    while len(form) < ROWS:
        form = np.append(form, np.full(durations(generator), generator.integers(0, 3)))
    form = form[:ROWS]
    time = np.arange(ROWS) / 24
    channels = []
    for _ in range(CHANNELS):
        forms = _forms(time + generator.uniform())
        values = np.take_along_axis(forms, form[None], axis=0)[0]
        channels.append(values + NOISE * generator.standard_normal(ROWS))
    return np.stack(channels, axis=1)


def regimes_long(seed: int = 0) -> FloatArray:
    """The easy case, to compare with: forms last 320 steps, many segments each."""
    return _regimes(lambda _: 320, seed)


def regimes_short(seed: int = 0) -> FloatArray:
    """Forms last 12 to 40 steps: a segment of 5 patches of 8 nearly always has more than one."""
    return _regimes(lambda generator: int(generator.integers(12, 41)), seed)


def _wave(period: float, seed: int) -> FloatArray:
    """Cycles, each of one of three forms, which its first steps show."""
    generator = np.random.default_rng(seed)
    time = np.arange(ROWS) / period
    cycles = generator.integers(0, 3, size=math.ceil(time[-1]) + 2)
    channels = []
    for _ in range(CHANNELS):
        forms = _forms(time)
        values = np.take_along_axis(forms, cycles[time.astype(np.int64)][None], axis=0)[0]
        channels.append(values + NOISE * generator.standard_normal(ROWS))
    return np.stack(channels, axis=1)


def phase_locked(seed: int = 0) -> FloatArray:
    """Cycles of exactly 40 steps: segments of 5 patches of 8 begin at the same phase for ever."""
    return _wave(40.0, seed)


def phase_drift(seed: int = 0) -> FloatArray:
    """Cycles of 37.3 steps: no segment begins at the phase of the one before."""
    return _wave(37.3, seed)


def spikes(seed: int = 0) -> FloatArray:
    """Noise, and now and then a spike that dies away over 30 steps: one step says it all."""
    generator = np.random.default_rng(seed)
    channels = []
    for _ in range(CHANNELS):
        values = np.zeros(ROWS)
        size = 0.0
        for step in range(ROWS):
            size *= math.exp(-1 / 10)
            if generator.uniform() < 1 / 120:
                size = float(generator.choice([-6.0, 6.0]))
            values[step] = size
        channels.append(values + 0.5 * generator.standard_normal(ROWS))
    return np.stack(channels, axis=1)


def white_noise(seed: int = 0) -> FloatArray:
    """Nothing to learn: whatever a router does is chance."""
    return np.random.default_rng(seed).standard_normal((ROWS, CHANNELS))


STRESS: dict[str, Callable[[], FloatArray]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        regimes_long,
        regimes_short,
        phase_locked,
        phase_drift,
        spikes,
        white_noise,
    )
}
