"""Series, splits and windows for the forecasting example, and the two rows every model must face.

Shape letters here: ``N`` rows of a series, ``C`` channels, ``W`` windows, ``L`` look-back,
``H`` horizon.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from examples.forecaster.planted_series import CODES, PATCH, planted
from examples.forecaster.sources import DATASETS, check_shape, find_or_download, read_values
from examples.forecaster.stress_series import STRESS
from segmoe_kernels.series import constant_channels

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MULTISCALE_PERIODS = (24, 96, 384)
MULTISCALE_REGIME = 160
PLANTED = {f"planted-{block}": block for block in CODES}


@dataclasses.dataclass(frozen=True)
class Splits:
    """Half-open row ranges of train, validation and test, before windows reach back.

    For ``ETTh1``: train (0, 8640), val (8640, 11520), test (11520, 14400).
    """

    train: tuple[int, int]
    val: tuple[int, int]
    test: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Series:
    """A scaled series with its splits.

    Attributes:
        name: as given to ``--data``.
        values: (N, C) float64, scaled by the mean and deviation of the train rows.
        splits: row ranges.
        mean: (C,) of the train rows.
        std: (C,) of the train rows (ddof 0; 1 where a channel is constant).
        step: windows begin at multiples of as many rows: forecasts are issued at one phase.
        law: (N, C) what the law that made the series forecasts, scaled; None where none is known.
    """

    name: str
    values: FloatArray
    splits: Splits
    mean: FloatArray
    std: FloatArray
    step: int = 1
    law: FloatArray | None = None


def make_splits(name: str, num_rows: int) -> Splits:
    """Choose the splits that published results use.

    Args:
        name: data set; the ETT names have fixed months, all others 70 / 10 / 20 %.
        num_rows: N.

    Returns:
        Splits.

    Raises:
        ValueError: if an ETT series is too short for its months.

    Source: Informer's and Autoformer's data loaders.
    """
    if name in {"ETTh1", "ETTh2", "ETTm1", "ETTm2"}:
        month = 30 * 24 * (4 if name.startswith("ETTm") else 1)
        train, val, test = 12 * month, 16 * month, 20 * month
        if num_rows < test:
            raise ValueError(f"{name} must have at least {test} rows, got {num_rows}")
    else:
        train, test = int(num_rows * 0.7), num_rows
        val = num_rows - int(num_rows * 0.2)
    return Splits((0, train), (train, val), (val, test))


def make_series(name: str, values: FloatArray) -> Series:
    """Scale by the train rows only.

    Args:
        name: data set.
        values: (N, C) raw values.

    Returns:
        Series.
    """
    splits = make_splits(name, len(values))
    train = values[slice(*splits.train)]
    constant = constant_channels(train)
    if constant.any():
        numbers = ", ".join(str(channel + 1) for channel in np.flatnonzero(constant))
        print(
            f"{name}: constant in the train rows, so not divided by a deviation: channel {numbers}",
            file=sys.stderr,
        )
    mean, std = train.mean(axis=0), np.where(constant, 1.0, train.std(axis=0))
    return Series(name, (values - mean) / std, splits, mean, std)


def multiscale_regimes(num_rows: int = 12000, seed: int = 0) -> IntArray:
    """Form of the shortest cycle of `multiscale` at each step, the same for all channels.

    Args:
        num_rows: N, as given to `multiscale`.
        seed: likewise.

    Returns:
        (N,): 0 sine, 1 square, 2 sawtooth.
    """
    return _draw_regimes(np.random.default_rng(seed), num_rows)


def _draw_regimes(generator: np.random.Generator, num_rows: int) -> IntArray:
    regimes = generator.integers(0, 3, size=math.ceil(num_rows / MULTISCALE_REGIME))
    return np.repeat(regimes, MULTISCALE_REGIME)[:num_rows]


def multiscale(num_rows: int = 12000, num_channels: int = 3, seed: int = 0) -> FloatArray:
    """Generate a series with known scales: three periods, and regimes that last 160 steps.

    The periods are 24, 96 and 384 steps. In each regime the shortest cycle takes one of three
    forms (sine, square, sawtooth), so what a stretch of 20 patches looks like is decided by the
    regime it lies in: something that a segment shows and a single patch hides.

    Args:
        num_rows: N.
        num_channels: C; they share the regimes and differ in phase and amplitude.
        seed: of the generator.

    Returns:
        (N, C) float64.
    """
    generator = np.random.default_rng(seed)
    time = np.arange(num_rows, dtype=np.float64)
    regime = _draw_regimes(generator, num_rows)
    channels = []
    for _ in range(num_channels):
        phases = generator.uniform(0, 1, size=3)
        amplitudes = np.array([1.0, 0.7, 0.5]) * generator.uniform(0.8, 1.2, size=3)
        short, middle, long = (
            (time / period + phase) % 1.0
            for period, phase in zip(MULTISCALE_PERIODS, phases, strict=True)
        )
        forms = np.stack(
            [np.sin(2 * np.pi * short), np.where(short < 0.5, 1.0, -1.0), 2.0 * short - 1.0]
        )
        channel = (
            amplitudes[0] * np.take_along_axis(forms, regime[None], axis=0)[0]
            + amplitudes[1] * np.sin(2 * np.pi * middle)
            + amplitudes[2] * np.sin(2 * np.pi * long)
        )
        channels.append(channel + 0.15 * generator.standard_normal(num_rows))
    return np.stack(channels, axis=1)


def make_planted(block: int, seed: int) -> Series:
    """Scale a planted series; its splits and windows begin where a block does."""
    values, law = planted(block, seed=seed)
    name, step = f"planted-{block}", block * PATCH
    series = make_series(name, values)
    train, val = (rows // step * step for rows in (series.splits.train[1], series.splits.val[1]))
    splits = Splits((0, train), (train, val), (val, len(values)))
    scaled = (law - series.mean) / series.std
    return dataclasses.replace(series, splits=splits, step=step, law=scaled)


def load_series(name: str, data_dir: Path | None = None, seed: int = 0) -> Series:
    """Load, generate or fetch a series and scale it.

    Args:
        name: a key of `DATASETS` or of `STRESS`, "multiscale", "planted-2" to "planted-5", or the
            path of a csv file.
        data_dir: where to look first.
        seed: of a planted series.

    Returns:
        Series.

    Raises:
        DataUnavailableError: if the file is nowhere and cannot be downloaded.
        ValueError: for an unknown name, a file without numbers, or one that is not the published
            one by its shape.
    """
    if name == "multiscale":
        return make_series(name, multiscale())
    if name in STRESS:
        return make_series(name, STRESS[name]())
    if name in PLANTED:
        return make_planted(PLANTED[name], seed)
    if name in DATASETS:
        values = read_values(find_or_download(name, data_dir))
        check_shape(name, values)
        return make_series(name, values)
    path = Path(name)
    if not path.is_file():
        known = ", ".join([*DATASETS, "multiscale", *STRESS, *PLANTED])
        raise ValueError(f"--data must be one of {known}, or a csv file, got {name!r}")
    return make_series(path.name, read_values(path))


class Windows:
    """All windows of one split, as a view of the series.

    Args:
        series: scaled.
        split: "train", "val" or "test"; val and test windows reach ``look_back`` rows back.
        look_back: L.
        horizon: H.
        dtype: of the tensors.
        stride: take every stride-th of the windows that begin at the series' phase; published
            scores take all.

    Raises:
        ValueError: if the split is too short for one window.
    """

    def __init__(
        self,
        series: Series,
        split: str,
        look_back: int,
        horizon: int,
        dtype: torch.dtype = torch.float32,
        stride: int = 1,
    ) -> None:
        start, stop = getattr(series.splits, split)
        rows = series.values[start if split == "train" else max(0, start - look_back) : stop]
        if len(rows) < look_back + horizon:
            raise ValueError(
                f"the {split} split of {series.name} must have at least look_back + horizon = "
                f"{look_back + horizon} rows, got {len(rows)}"
            )
        self.look_back, self.horizon = look_back, horizon
        # (W, C, L + H), overlapping: nothing is copied until a batch is taken.
        step = stride * series.step
        self._view = torch.from_numpy(rows).to(dtype).unfold(0, look_back + horizon, step)

    def __len__(self) -> int:
        return self._view.shape[0]

    def batch(self, ids: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Take windows.

        Args:
            ids: window numbers.

        Returns:
            look-back (W, C, L) and truth (W, C, H).
        """
        rows = self._view[ids]
        return rows[..., : self.look_back], rows[..., self.look_back :]


@dataclasses.dataclass
class Score:
    """Sums over every forecast value; the means are exact whatever the batch size was."""

    squared: float = 0.0
    absolute: float = 0.0
    count: int = 0

    def add(self, forecast: Tensor, truth: Tensor) -> None:
        """Add a batch; both (W, C, H)."""
        error = (forecast - truth).double()
        self.squared += float(error.square().sum())
        self.absolute += float(error.abs().sum())
        self.count += error.numel()

    @property
    def mse(self) -> float:
        """Mean squared error on scaled values."""
        return self.squared / self.count

    @property
    def mae(self) -> float:
        """Mean absolute error on scaled values."""
        return self.absolute / self.count


def score_repeat(windows: Windows, batch_size: int = 256) -> Score:
    """Score the forecast that repeats the last value, on every window."""
    score = Score()
    for start in range(0, len(windows), batch_size):
        past, truth = windows.batch(slice(start, start + batch_size))
        score.add(past[..., -1:], truth)
    return score


def fit_linear(train: Windows, batch_size: int = 512) -> Tensor:
    """Fit NLinear in closed form: one map for all channels, by float64 normal equations.

    Each window is taken relative to its last value; the map has a bias.

    Args:
        train: windows of the train split, float64.
        batch_size: windows accumulated at once.

    Returns:
        (L + 1, H) float64; the last row is the bias.
    """
    width = train.look_back + 1
    gram = torch.zeros(width, width, dtype=torch.float64)
    moment = torch.zeros(width, train.horizon, dtype=torch.float64)
    for start in range(0, len(train), batch_size):
        past, truth = train.batch(slice(start, start + batch_size))
        features, last = _linear_features(past)
        gram += features.T @ features
        moment += features.T @ (truth - last).reshape(-1, train.horizon).double()
    # The last step relative to itself is 0 in every window, so gram is singular by design.
    return torch.linalg.lstsq(gram, moment, driver="gelsd").solution


def score_linear(weight: Tensor, windows: Windows, batch_size: int = 512) -> Score:
    """Score the closed-form map of `fit_linear` on every window.

    A map for fewer steps than the windows have is rolled out: its forecasts are its next past.
    """
    score = Score()
    for start in range(0, len(windows), batch_size):
        past, truth = windows.batch(slice(start, start + batch_size))
        seen = past.double()
        while seen.shape[-1] < past.shape[-1] + truth.shape[-1]:
            features, last = _linear_features(seen[..., -past.shape[-1] :])
            ahead = (features @ weight).reshape(*truth.shape[:-1], -1) + last
            seen = torch.cat([seen, ahead], dim=-1)
        score.add(seen[..., past.shape[-1] :][..., : truth.shape[-1]], truth)
    return score


def _linear_features(past: Tensor) -> tuple[Tensor, Tensor]:
    """Rows relative to their last value with a 1 appended, (W * C, L + 1), and that value."""
    last = past[..., -1:].double()
    rows = (past.double() - last).reshape(-1, past.shape[-1])
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1), last
