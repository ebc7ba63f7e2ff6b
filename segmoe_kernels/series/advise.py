"""Whether segments are likely to pay on a series, and of which size: a probe in closed form.

    python -m segmoe_kernels advise data.csv --patch 8 --step 24

Experts pay where the map that forecasts depends on what a segment looks like. The probe asks just
that, and trains nothing. Windows are cut into segments of P patches, and these put into 4 clusters
by k-means, each window less its mean and divided by its deviation. A linear forecast then has a map
that all windows share, and for each cluster one more, which works on that cluster's segments; ridge
regression holds the latter small. What these save of the shared map's error on later windows is the
gain of size P; for P = 1 it is what experts of single patches can gain.

Windows are of 32 patches of 8 steps or more, of 256 steps with shorter ones, and of a quarter of a
short series; 70 % of the rows fit the maps, the rest scores. The strength of the ridge is chosen by
other windows than those it is scored on, and standard errors are those of 20 stretches of time.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segmoe_kernels import validation as check
from segmoe_kernels.series import constant_channels, read_series

__all__ = ["Advice", "advise", "plot_advice", "read_series"]

Array = npt.NDArray[Any]
# A gain below this isn't seen in trained models, nor is one of less than two standard errors.
LITTLE, ERRORS = 0.02, 2.0
CLUSTERS, RESTARTS, ROUNDS = 4, 5, 20
TRAIN, WINDOWS, STRETCHES, LEAST = 0.7, 6000, 20, 10
# Steps of a window, and principal components that a longer patch is reduced to for the clusters.
STEPS, WIDTH = 256, 8
# Of the mean square of the columns.
RIDGES = (1e-3, 3e-2, 1.0)
# A forecast with less error than this share of what there is to forecast is a perfect one.
PERFECT = 1e-4


@dataclass(frozen=True)
class Advice:
    """What `advise` says.

    Attributes:
        size: segment size in patches for all layers; 1 where segments are unlikely to pay.
        gains: share of a linear map's squared error that each size saves, the first of size 1.
        errors: their standard errors.
        reasons: sentences.
    """

    size: int
    gains: list[float]
    errors: list[float]
    reasons: list[str]


def advise(
    values: Array,
    *,
    patch: int = 1,
    step: int = 1,
    max_size: int = 8,
    progress: bool = False,
) -> Advice:
    """Say whether segments are likely to pay, and propose the smallest size that does.

    That is the smallest one whose error is within a standard error of the least. Takes seconds for
    patches of 8.

    Args:
        values: (N, C), a series of N steps and C channels.
        patch: steps in a patch of the model; 1 where it has none.
        step: forecasts are issued at rows 0, step, 2 * step and so on; 1: anywhere. Segments begin
            where a window does, so a fixed phase in a cycle decides what they hold.
        max_size: the longest segment to consider, in patches; as much is forecast.
        progress: write to stderr how far it is.

    Returns:
        Advice.

    Raises:
        TypeError: for an argument of the wrong type, and values that are not of real numbers.
        ValueError: for a size below 1, a value that is not finite, or a series too short.
    """
    numbers = {"patch": patch, "step": step, "max_size": max_size}
    for argument, value in numbers.items():
        check.check_integer("advise", argument, value, 1)
    check.check_flag("advise", "progress", progress)
    series = _checked_values(values, patch, step, max_size)
    constant = values.shape[1] - series.shape[1]
    reasons = [f"{constant} of {values.shape[1]} channels are constant and left out."]
    reasons = reasons if constant else []
    if not series.shape[1]:
        return Advice(1, [0.0] * max_size, [0.0] * max_size, reasons)
    probe = _Probe(series, patch, step, max_size)
    losses = []
    for size in range(1, max_size + 1):
        losses.append(probe.loss(size))
        if progress:
            end = "\n" if size == max_size else ""
            sys.stderr.write(f"\rsegment size {size} of {max_size}{end}")
    usual = max(float(probe.linear.mean()), PERFECT * probe.power)
    saved = (probe.linear - np.array(losses)) / usual
    gains, errors = saved.mean(1), _standard_error(saved)
    best = int(gains.argmax())
    behind = saved[best] - saved
    size = 1 + int(np.flatnonzero(behind.mean(1) <= _standard_error(behind))[0])
    pays = gains[best] >= max(LITTLE, ERRORS * errors[best])
    reasons += _explain(gains, errors, size, pays, probe.linear.mean() / probe.power)
    return Advice(size if pays else 1, gains.tolist(), errors.tolist(), reasons)


def _checked_values(values: Any, patch: int, step: int, max_size: int) -> Array:
    """Channels that aren't constant, of mean 0 and deviation 1, whatever their units."""
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.size == 0:
        got = getattr(values, "shape", type(values).__name__)
        check.fail_value("advise", "values", "be an array of shape (N, C)", got)
    # NumPy would drop imaginary parts, and take text and dates for numbers.
    if values.dtype.kind not in "iufb":
        check.fail_type("advise", "values", "be of real numbers", f"dtype {values.dtype}")
    numbers: Array = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        check.fail_value("advise", "values", "be finite", "NaN or infinity")
    # A window of an eighth of the rows is to be forecast, and some have to be scored.
    needed = max(8 * max_size * patch, round((LEAST * step + max_size * patch) / (1 - TRAIN)))
    if len(numbers) < needed:
        rule = f"have at least {needed} steps at patch={patch}, step={step}, max_size={max_size}"
        check.fail_value("advise", "values", rule, len(numbers))
    numbers = numbers[:, ~constant_channels(numbers)]
    scaled = numbers / np.abs(numbers).max(0)
    result: Array = ((scaled - scaled.mean(0)) / scaled.std(0)).astype(np.float32)
    return result


def _standard_error(stretches: Array) -> Array:
    """Of the means over stretches of time, (..., stretches) to (...)."""
    result: Array = stretches.std(-1, ddof=1) / np.sqrt(stretches.shape[-1])
    return result


class _Probe:
    """Windows of a series, and the error of maps that depend on the clusters of their segments.

    Attributes:
        linear: (stretches,) mean squared error of the shared map alone.
        power: mean square of what is to be forecast.
    """

    def __init__(self, series: Array, patch: int, step: int, max_size: int) -> None:
        self.generator = np.random.default_rng(0)
        self.patch, horizon = patch, max_size * patch
        count = max(max_size, STEPS // min(patch, WIDTH))
        look_back = patch * min(count, len(series) // 4 // patch)
        border = int(TRAIN * len(series))
        places = np.arange(0, len(series) - look_back - horizon + 1, step)
        ends = places + look_back
        fit = self._draw(series, places[ends + horizon <= border], look_back, horizon)
        later = self._draw(series, places[ends >= border], look_back, horizon, WINDOWS // 2)
        (self.past, self.spread, self.ahead), (self.late, self.late_spread, self.truth) = fit, later
        self.stretch = np.arange(len(self.late)) * min(STRETCHES, len(self.late)) // len(self.late)
        self.power = float((self.truth**2).mean())
        pieces = self.past.reshape(-1, patch)
        self.basis = np.linalg.eigh(pieces.T @ pieces)[1][:, -WIDTH:]
        shared = np.hstack([self.past, self.spread])
        ridges = np.outer(RIDGES, np.ones(shared.shape[1]))
        errors = self._fit(shared, np.hstack([self.late, self.late_spread]), ridges)
        self.linear = self._score(errors)
        self.usual = ridges[errors.mean(1).argmin()]

    def _draw(
        self, series: Array, places: Array, look_back: int, horizon: int, most: int = WINDOWS
    ) -> tuple[Array, Array, Array]:
        """Windows less their means, in the order of time; their deviations; what comes next."""
        number = len(places) * series.shape[1]
        chosen = np.sort(self.generator.permutation(number)[:most])
        places, channels = places[chosen // series.shape[1]], chosen % series.shape[1]
        rows = places[:, None] + np.arange(look_back + horizon)
        windows = series[rows, channels[:, None]]
        windows -= windows[:, :look_back].mean(1, keepdims=True)
        past, ahead = windows[:, :look_back], windows[:, look_back:]
        return past, past.std(1, keepdims=True), ahead

    def _fit(self, columns: Array, late: Array, ridges: Array) -> Array:
        """Squared error of each late window, (R, windows), with each of the (R, columns) ridges."""
        gram = (columns.T @ columns).astype(np.float64)
        moment = (columns.T @ self.ahead).astype(np.float64)
        ridges = ridges * len(columns) * float((self.past**2).mean())
        maps = (np.linalg.solve(gram + np.diag(ridge), moment) for ridge in ridges)
        return np.array([((late @ found - self.truth) ** 2).mean(1) for found in maps])

    def _score(self, errors: Array) -> Array:
        """Error of each stretch of time, with the ridge that is best on every other one."""
        odd = self.stretch % 2 == 1
        chosen = np.empty(len(odd))
        for part in (odd, ~odd):
            chosen[part] = errors[errors[:, ~part].mean(1).argmin()][part]
        result: Array = np.bincount(self.stretch, chosen) / np.bincount(self.stretch)
        return result

    def loss(self, size: int) -> Array:
        """(stretches,) error where segments of a size have the maps of their clusters."""
        segments, late = (
            _segments(past, spread, size * self.patch)
            for past, spread in ((self.past, self.spread), (self.late, self.late_spread))
        )
        flat = segments.reshape(-1, segments.shape[-1])
        sample = flat[self.generator.permutation(len(flat))[:WINDOWS]]
        centres = _cluster(sample, self.generator)
        columns = self._columns(self.past, self.spread, segments, centres, size)
        later = self._columns(self.late, self.late_spread, late, centres, size)
        ridges = np.outer(RIDGES, np.ones(columns.shape[1]))
        ridges[:, : len(self.usual)] = self.usual
        return self._score(self._fit(columns, later, ridges))

    def _columns(
        self, past: Array, spread: Array, segments: Array, centres: Array, size: int
    ) -> Array:
        """Shared columns, then those of each cluster: patches and a 1, of its segments alone."""
        pieces = past.reshape(len(past), -1, self.patch) @ self.basis
        nearest = _nearest(segments, centres)
        columns = [past, spread]
        for cluster in range(len(centres)):
            here = nearest == cluster
            mine = np.repeat(here, size, axis=1)[:, : pieces.shape[1], None]
            columns += [(pieces * mine).reshape(len(past), -1), here * spread]
        return np.hstack(columns)


def _segments(past: Array, spread: Array, steps: int) -> Array:
    """(windows, segments, steps) of windows divided by their deviations; the last is filled up."""
    still = np.finfo(np.float32).eps
    scaled = past / np.where(spread > still, spread, np.inf)
    return np.pad(scaled, ((0, 0), (0, -past.shape[1] % steps))).reshape(len(past), -1, steps)


def _nearest(points: Array, centres: Array) -> Array:
    """Number of the nearest centre, (..., D) and (K, D) to (...)."""
    result: Array = ((centres**2).sum(1) - 2 * points @ centres.T).argmin(-1)
    return result


def _cluster(points: Array, generator: np.random.Generator) -> Array:
    """Centres by k-means, (N, D) to (K, D), the best of several starts at points far apart."""
    found: list[tuple[float, Array]] = []
    for _ in range(RESTARTS):
        centres = points[generator.integers(len(points), size=1)]
        while len(centres) < CLUSTERS:
            far = ((points - centres[_nearest(points, centres)]) ** 2).sum(1)
            chances = far / far.sum() if far.sum() else None
            centres = np.vstack([centres, points[generator.choice(len(points), p=chances)]])
        for _ in range(ROUNDS):
            nearest = _nearest(points, centres)
            sizes = np.bincount(nearest, minlength=CLUSTERS)[:, None]
            sums = (nearest == np.arange(CLUSTERS)[:, None]).astype(points.dtype) @ points
            centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
        far = ((points - centres[_nearest(points, centres)]) ** 2).sum()
        found.append((float(far), centres))
    return min(found, key=lambda pair: pair[0])[1]


def _explain(gains: Array, errors: Array, size: int, pays: bool, left: float) -> list[str]:
    """The reasons as sentences."""
    best = int(gains.argmax())
    pairs = zip(gains, errors, strict=True)
    shown = [f"{gain:.1%} (standard error {error:.1%})" for gain, error in pairs]
    found = [
        f"A linear map leaves {left:.0%} of what is to be forecast; maps that depend on the "
        f"clusters of segments of {best + 1} save {shown[best]} of that, the most of all sizes."
    ]
    if not pays:
        return [
            *found,
            f"That is below {LITTLE:.0%}, or two standard errors: segments are unlikely to pay. "
            "Score a linear map and a dense FFN first.",
        ]
    if size == 1:
        told = f"Single patches save {shown[0]}, no less within a standard error: try token-wise"
        return [*found, f"{told} experts, segments of 1."]
    if size <= best:
        found.append(f"Size {size} saves {shown[size - 1]}, no less within a standard error.")
    return [*found, f"Single patches save {shown[0]}."]


def plot_advice(advice: Advice, *, patch: int = 1) -> Any:
    """Draw what each size gains, with standard errors.

    Args:
        advice: what `advise` said.
        patch: as given to it.

    Returns:
        matplotlib Figure of one axis.

    Raises:
        TypeError: for what is no Advice.
        ImportError: without matplotlib.
    """
    check.check_type("plot_advice", "advice", advice, Advice, "be an Advice")
    check.check_integer("plot_advice", "patch", patch, 1)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "needs matplotlib: pip install segmoe-kernels[plots]"
        raise ImportError(f"segmoe_kernels.plot_advice {message}") from error
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    sizes = range(1, len(advice.gains) + 1)
    colours = ["tab:orange" if size == advice.size else "tab:blue" for size in sizes]
    heights, errors = ([100 * value for value in part] for part in (advice.gains, advice.errors))
    axis.bar(sizes, heights, yerr=errors, color=colours)
    axis.axhline(100 * LITTLE, color="0.6", linestyle="--")
    axis.set(xlabel=f"segment, patches of {patch}", ylabel="% of a linear map's error saved")
    return figure
