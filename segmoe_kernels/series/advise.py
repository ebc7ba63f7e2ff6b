"""Which segment sizes a series calls for, from its autocorrelation and its spectrum.

    python -m segmoe_kernels advise data.csv --patch 8 --layers 4

A router sees a segment of P patches and has to tell in which *state* the series is: rising or
falling, calm or rough, this or that form of its cycle. A longer segment says more about a state
that lasts, as noise averages out, and less about one that has changed before the segment ends. Both
are decided by how long patches stay alike, so a size is scored by how much that which is seen of a
segment tells about each of its patches.

States are not observed; four features of a patch stand for them (mean, spread, slope, roughness),
each minus its mean and divided by its deviation. With ``r_k`` the autocorrelation of the features
at a lag of k patches, averaged over features and channels, and ``s_k`` what of it is state
(``s_k = r_k``, and ``s_0 <= 1`` by extending ``r_1, r_2`` to lag 0, the rest being noise), the
summary ``m`` of a segment is the mean of its features and::

    var(m)      = 1/P^2 sum_ij r_|i-j|
    cov(m, i)   = 1/P sum_j s_|i-j|                 with the state of patch i
    score(P)    = 1/P sum_i min(cov(m, i)^2 / var(m), s_0)

the share of a patch's state that m tells; no more than there is, as no correlation is above 1.

This is a model of why segments may help, not of how much. In the studies of ``examples`` the test
error of a model hardly depends on the size between 2 and 6, and the size of the highest score was
within 1 % of the best on fewer data sets than 4, the middle of the official schedules. So the
advice is the size nearest to 4 of those whose score is within 0.05 of the highest: it leaves 4
where the series says so plainly.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segmoe_kernels import validation as check
from segmoe_kernels.series import constant_channels, read_series

__all__ = ["Advice", "Period", "advise", "plot_advice", "read_series"]

Array = npt.NDArray[np.float64]
# Below this share of a patch's state a router sees next to nothing.
LITTLE = 0.05
# Scores closer than this are not told apart by the errors of trained models.
TOLERANCE = 0.05
USUAL = 4
# A feature of channels of deviation 1 that moves less than this does so by rounding errors.
CONSTANT = 1e-6
# Below this share of the power a peak of the spectrum is a harmonic, or chance.
LITTLE_POWER = 0.02


@dataclass(frozen=True)
class Period:
    """A cycle of the series.

    Attributes:
        steps: its length.
        correlation: autocorrelation at that lag, mean over channels.
        power: share of the spectrum's power at that length and its neighbours.
    """

    steps: int
    correlation: float
    power: float


@dataclass(frozen=True)
class Advice:
    """What `advise` says.

    Attributes:
        schedule: a segment size for each layer, in patches.
        best: the size advised, if all layers have the same: of those that score within 0.05 of the
            highest the one nearest to 4.
        scores: score of each size, the first of size 1; 0 to 1.
        periods: cycles, the strongest first.
        memory: patches after which their features' autocorrelation has fallen to 1/e; None: later
            than was looked.
        reasons: sentences.
    """

    schedule: list[int]
    best: int
    scores: list[float]
    periods: list[Period]
    memory: int | None
    reasons: list[str]


def standardise(values: Array) -> Array:
    """Channels of mean 0 and deviation 1, whatever their units; constant ones become 0."""
    scaled = values / np.maximum(np.abs(values).max(0), np.finfo(np.float64).tiny)
    centred = scaled - scaled.mean(0)
    deviation = np.where(constant_channels(values), np.inf, centred.std(0))
    result: Array = centred / deviation
    return result


def autocorrelation(values: Array, max_lag: int) -> Array:
    """Mean over columns of the autocorrelation, (max_lag + 1,); constant columns are left out.

    Columns are of channels of deviation 1, see `standardise`. By the Wiener-Khinchin theorem; the
    estimate that divides by N at every lag.
    """
    centred = values - values.mean(0)
    size = 1 << (2 * len(values) - 1).bit_length()
    power = np.abs(np.fft.rfft(centred, size, axis=0)) ** 2
    found = np.fft.irfft(power, size, axis=0)[: max_lag + 1]
    moving = found[0] > CONSTANT**2 * len(values)
    if not moving.any():
        return np.zeros(max_lag + 1)
    mean: Array = (found[:, moving] / found[0, moving]).mean(1)
    return mean


def spectrum(values: Array, length: int) -> Array:
    """Power at ``k / length``, mean over channels and windows that overlap by half (Welch)."""
    window = np.hanning(length)[:, None]
    starts = range(0, max(1, len(values) - length + 1), max(1, length // 2))
    total = np.zeros(length // 2 + 1)
    for start in starts:
        piece = values[start : start + length]
        piece = (piece - piece.mean(0)) * window[: len(piece)]
        power = np.abs(np.fft.rfft(piece, length, axis=0)) ** 2
        total += (power / np.maximum(power.sum(0), 1e-12)).mean(1)
    result: Array = total / len(starts)
    return result


def find_periods(values: Array, max_lag: int) -> list[Period]:
    """Cycles that both the spectrum and the autocorrelation show, the strongest first; at most 3.

    A cycle is a peak of the spectrum with 2 % of the power and twice as high as what lies a little
    further off. At its length the autocorrelation is above four standard errors of white noise, and
    as much above its lowest value since half that length: a slow decline has no such valley. What
    a stronger cycle's harmonics explain is left out.
    """
    length = 2 * max_lag
    found = autocorrelation(values, max_lag)
    power = spectrum(values, length)
    noise = 4 / np.sqrt(len(values))
    candidates = []
    for k in range(2, len(power) - 1):
        far = [power[j] for j in (k - 4, k - 3, k + 3, k + 4) if 0 < j < len(power)]
        if power[k] < max(power[k - 1], power[k + 1]) or power[k] < 2 * np.mean(far):
            continue
        steps = length / (k + _vertex(*np.log(power[k - 1 : k + 2] + 1e-300)))
        lag = min(round(steps), max_lag)
        near = found[max(1, lag - 1) : lag + 2].max()
        share = float(power[k - 1 : k + 2].sum() / max(power[1:].sum(), 1e-12))
        height = near - found[lag // 2 : lag + 1].min()
        if lag >= 3 and min(near, height) > noise and share > LITTLE_POWER:
            candidates.append(Period(lag, float(near), share))
    kept: list[Period] = []
    for period in sorted(candidates, key=lambda p: -p.power):
        ratios = [other.steps / period.steps for other in kept]
        if not any(ratio > 1.5 and abs(ratio - round(ratio)) < 0.1 for ratio in ratios):
            kept.append(period)
    return sorted(kept, key=lambda p: -p.correlation)[:3]


def _vertex(left: float, middle: float, right: float) -> float:
    """Where the parabola through three neighbours is highest, from the middle one."""
    bend = left - 2 * middle + right
    return float(np.clip(0.5 * (left - right) / bend, -0.5, 0.5)) if bend < 0 else 0.0


def features(values: Array, patch: int) -> Array:
    """(patches, 4 * C): mean, spread, slope and roughness of each patch of each channel."""
    count = len(values) // patch
    pieces = values[: count * patch].reshape(count, patch, -1)
    position = np.arange(patch) - (patch - 1) / 2
    slope = np.einsum("npc,p->nc", pieces, position)
    rough = np.abs(np.diff(pieces, axis=1)).mean(1) if patch > 1 else np.zeros_like(slope)
    return np.concatenate([pieces.mean(1), pieces.std(1), slope, rough], axis=1)


def size_scores(correlation: Array, max_size: int) -> list[float]:
    """Score of the sizes 1 to max_size, by the formula at the head of this file."""
    total = correlation.copy()
    state = correlation.copy()
    # Noise is what lag 0 has beyond the line through lags 1 and 2.
    state[0] = np.clip(2 * correlation[1] - correlation[2], max(correlation[1], 0.0), 1.0)
    scores = []
    for size in range(1, max_size + 1):
        lags = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
        variance = max(total[lags].mean(), 1e-12)
        covariance = state[lags].mean(1)
        # No correlation is above 1, whatever the line left for the state.
        scores.append(float(np.minimum(covariance**2 / variance, state[0]).mean()))
    return scores


def advise(
    values: Array,
    *,
    patch: int = 1,
    num_layers: int = 4,
    look_back: int = 512,
    max_size: int = 8,
) -> Advice:
    """Propose a segment size for each layer.

    Layers get the best size and those of its two neighbours that score no more than 1 % less, the
    longest first, as in the official schedules.

    Args:
        values: (N, C), a series of N steps and C channels.
        patch: steps in a patch of the model; 1 where it has none.
        num_layers: of the model.
        look_back: steps that the model sees; cycles are looked for up to that length.
        max_size: the longest segment to consider, in patches.

    Returns:
        Advice.

    Raises:
        TypeError: for an argument of the wrong type, and values that are not of real numbers.
        ValueError: for a size below 1, a value that is not finite, or a series too short.
    """
    for argument, value in (("num_layers", num_layers), ("max_size", max_size)):
        check.check_integer("advise", argument, value, 1)
    values, reasons = _checked_values("advise", values, patch, look_back, max_size)
    max_lag = min(look_back, len(values) // 3)
    periods = find_periods(values, max_lag)
    last = max(max_size + 1, min(max_lag // patch, 64))
    correlation = autocorrelation(features(values, patch), min(last, len(values) // patch - 1))
    scores = size_scores(correlation, max_size)
    below = np.flatnonzero(correlation < 1 / np.e)
    memory = int(below[0]) if len(below) else None
    close = [size for size, score in enumerate(scores, 1) if score >= max(scores) - TOLERANCE]
    # Of two that are equally near the one with the higher score.
    best = min(close, key=lambda size: (abs(size - USUAL), -scores[size - 1]))
    if max(scores) < LITTLE:
        best, close = 1, [1]
    near = [size for size in (best + 1, best, best - 1) if size in close]
    order = [size for size in near if scores[size - 1] >= 0.99 * scores[best - 1]]
    schedule = [order[layer * len(order) // num_layers] for layer in range(num_layers)]
    reasons += _explain(scores, best, close, periods, memory, patch)
    return Advice(schedule, best, scores, periods, memory, reasons)


def _checked_values(
    function: str, values: Any, patch: int, look_back: int, max_size: int
) -> tuple[Array, list[str]]:
    """Standardised, and what there is to say of constant channels."""
    check.check_integer(function, "patch", patch, 1)
    check.check_integer(function, "look_back", look_back, 8)
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.size == 0:
        got = getattr(values, "shape", type(values).__name__)
        check.fail_value(function, "values", "be an array of shape (N, C)", got)
    # NumPy would drop imaginary parts, and take text and dates for numbers.
    if values.dtype.kind not in "iufb":
        check.fail_type(function, "values", "be of real numbers", f"dtype {values.dtype}")
    numbers: Array = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        check.fail_value(function, "values", "be finite", "NaN or infinity")
    needed = 4 * patch * (max_size + 1)
    if len(numbers) < needed:
        rule = f"have at least {needed} steps: 4 segments of {max_size + 1} patches"
        check.fail_value(function, "values", rule, len(numbers))
    constant = int(constant_channels(numbers).sum())
    note = f"{constant} of {numbers.shape[1]} channels are constant and left out."
    return standardise(numbers), [note] if constant else []


def _explain(
    scores: list[float],
    best: int,
    close: list[int],
    periods: list[Period],
    memory: int | None,
    patch: int,
) -> list[str]:
    """The reasons as sentences."""
    found = []
    if periods:
        cycles = [f"{p.steps} steps (autocorrelation {p.correlation:.2f})" for p in periods]
        found.append(f"Cycles of {', '.join(cycles)}.")
    else:
        found.append("No cycle stands out of the noise.")
    if memory is None:
        found.append("Patches stay alike for as long as was looked.")
    else:
        found.append(f"Patches are alike (above 1/e) for {memory} of them, {memory * patch} steps.")
    if max(scores) < LITTLE:
        found.append(
            f"A segment of any size tells at most {max(scores):.0%} of a patch's state: there is "
            "next to nothing to route by, and a dense FFN will do as well."
        )
        short = [str(period.steps) for period in periods if period.steps < 4 * patch]
        if short:
            found.append(
                f"But a cycle within 4 patches ({', '.join(short)} steps) looks like noise to this "
                "score: compare sizes by training, or take shorter patches."
            )
        return found
    told = f"{scores[best - 1]:.0%} of a patch's state, a patch by itself {scores[0]:.0%}"
    found.append(f"Segments of {best} ({best * patch} steps) tell {told}.")
    if len(close) > 1:
        found.append(
            f"Sizes {', '.join(map(str, close))} are within {100 * TOLERANCE:.0f} points of the "
            f"highest ({max(scores):.0%}), closer than errors of models can tell; {best} is the "
            f"nearest to {USUAL}, the middle of the official schedules."
        )
    for period in periods:
        times = max(period.steps, best * patch) / min(period.steps, best * patch)
        if abs(times - round(times)) < 0.03:
            found.append(f"They keep their phase in the cycle of {period.steps} steps.")
        else:
            found.append(
                f"Their phase drifts through the cycle of {period.steps} steps, which spreads its "
                "phases over the experts."
            )
    return found


def plot_advice(values: Array, advice: Advice, *, patch: int = 1, look_back: int = 512) -> Any:
    """Draw autocorrelation, spectrum and scores.

    Args:
        values: as given to `advise`.
        advice: what it said.
        patch: as given to `advise`.
        look_back: as given to `advise`.

    Returns:
        matplotlib Figure of three axes.

    Raises:
        TypeError: as `advise`.
        ValueError: as `advise`.
        ImportError: without matplotlib.
    """
    check.check_type("plot_advice", "advice", advice, Advice, "be an Advice")
    values, _ = _checked_values("plot_advice", values, patch, look_back, len(advice.scores))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "needs matplotlib: pip install segmoe-kernels[plots]"
        raise ImportError(f"segmoe_kernels.plot_advice {message}") from error
    max_lag = min(look_back, len(values) // 3)
    figure = Figure(figsize=(11, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(autocorrelation(values, max_lag))
    left.set(xlabel="lag, steps", ylabel="autocorrelation")
    power = spectrum(values, 2 * max_lag)[1:]
    middle.loglog(2 * max_lag / np.arange(1, len(power) + 1), power)
    middle.set(xlabel="cycle, steps", ylabel="share of the power")
    for period in advice.periods:
        left.axvline(period.steps, color="0.7", linestyle="--")
        middle.axvline(period.steps, color="0.7", linestyle="--")
    sizes = list(range(1, len(advice.scores) + 1))
    colours = ["tab:orange" if size == advice.best else "tab:blue" for size in sizes]
    right.bar(sizes, advice.scores, color=colours)
    right.set(xlabel=f"segment, patches of {patch}", ylabel="share of a patch's state told")
    return figure
