"""What one kind gains over another on the same seeds, and what chance explains of it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Record = Mapping[str, Any]
POWER, LEVEL = 0.8, 0.05


class Difference(NamedTuple):
    """Per cent of MSE by which a kind is over another, from the ratio on each seed.

    Attributes:
        mean: over the seeds.
        low, high: interval of 95 %, by Student's t; infinite for a single seed.
        detectable: least difference that as many seeds of this spread show in 80 % of studies.
        error: standard error of the mean.
        seeds: that both kinds have.
    """

    mean: float
    low: float
    high: float
    detectable: float
    error: float
    seeds: int

    @property
    def verdict(self) -> str:
        """Whether the interval says better, worse or neither."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "neither"

    def __str__(self) -> str:
        if self.seeds == 1:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def horizons_of(run: Record) -> list[int]:
    """Horizons that a run is scored at, by its columns; runs of other data may have others."""
    found = {
        key: re.fullmatch(r"mse_(\d+)", key) for key, value in run.items() if value is not None
    }
    return [int(match[1]) for match in found.values() if match]


def mean_mse(run: Record, horizon: int | None) -> float:
    """MSE at a horizon; at None the mean over all of them."""
    horizons = horizons_of(run) if horizon is None else [horizon]
    return statistics.mean(run[f"mse_{h}"] for h in horizons)


def difference(
    records: Iterable[Record], data: str, one: str, other: str, horizon: int | None = None
) -> Difference | None:
    """Compare two variants on a data set, seed by seed.

    Args:
        records: runs of a study.
        data: data set.
        one: variant.
        other: variant that it is compared with.
        horizon: None takes the mean over all.

    Returns:
        The difference, or None if there is no seed that both have.
    """
    found: dict[str, dict[int, float]] = {one: {}, other: {}}
    for run in records:
        scored = horizon is None or horizon in horizons_of(run)
        if run["data"] == data and run["variant"] in found and scored:
            found[run["variant"]][run["seed"]] = mean_mse(run, horizon)
    seeds = found[one].keys() & found[other].keys()
    if not seeds:
        return None
    over = [100 * (found[one][seed] / found[other][seed] - 1) for seed in sorted(seeds)]
    mean, free = statistics.mean(over), len(over) - 1
    if free == 0:
        return Difference(mean, -math.inf, math.inf, math.inf, math.nan, 1)
    error = statistics.stdev(over) / math.sqrt(len(over))
    reach, power = stats.t.ppf([1 - LEVEL / 2, POWER], free)
    low, high = mean - reach * error, mean + reach * error
    return Difference(mean, low, high, float(reach + power) * error, error, len(over))


def comparisons(
    records: Iterable[Record], one: str, other: str, *, means: bool = False
) -> dict[tuple[str, int | None], Difference]:
    """`difference` on every data set and horizon that has more than one seed of both.

    Args:
        records: runs of a study.
        one: variant.
        other: variant that it is compared with.
        means: the mean over horizons instead of each.
    """
    records = list(records)
    places: dict[tuple[str, int | None], None] = {}
    for run in records:
        places |= dict.fromkeys((run["data"], h) for h in ([None] if means else horizons_of(run)))
    found = {(data, h): difference(records, data, one, other, h) for data, h in places}
    return {place: value for place, value in found.items() if value and value.seeds > 1}


def count_verdicts(found: Iterable[Difference]) -> dict[str, int]:
    """How many say better, worse and neither."""
    verdicts = [value.verdict for value in found]
    return {name: verdicts.count(name) for name in ("better", "worse", "neither")}


def detectable(found: Iterable[Difference]) -> str:
    """The range of what could have been seen, as text."""
    values = np.array([value.detectable for value in found])
    return (
        f"{values.min():.1f} to {values.max():.1f} %, half of them {np.median(values):.1f} or less"
    )
