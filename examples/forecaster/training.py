"""Training with early stopping on validation, and checkpoints that resume exactly."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.forecaster.data import Score, Series, Windows
from examples.forecaster.model import (
    Forecaster,
    ForecasterConfig,
    active_flops_per_token,
    count_parameters,
)
from examples.forecaster.planted_series import PATCH

CHECKPOINT_VERSION = 2


class DivergedError(RuntimeError):
    """No epoch had a finite validation error."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        epochs: at most; the learning-rate schedule spans them.
        patience: stop after this many epochs without a better validation MSE.
        batch_size: windows (each with all its channels) per step.
        learning_rate: highest, after warm-up; cosine down to a hundredth.
        weight_decay: of AdamW, on matrices only.
        loss: "mse", "mae" or "huber".
        clip: largest norm of the gradient.
        train_fraction: share of the train windows seen in an epoch, drawn anew each time;
            neighbours differ in one step only, so a quarter is enough between two validations.
        val_stride: validate on every val_stride-th window.
        test_stride: score on every test_stride-th window; published scores take all.
        seed: of initialisation, order and dropout.
        device: "cpu" or "cuda".
    """

    epochs: int = 8
    patience: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    loss: str = "huber"
    clip: float = 1.0
    train_fraction: float = 0.25
    val_stride: int = 1
    test_stride: int = 1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size", "val_stride", "test_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction must be in (0, 1], got {self.train_fraction}")


def planted_settings(block: int, seed: int, device: str) -> tuple[ForecasterConfig, TrainOptions]:
    """Model and training for a planted series: two blocks are forecast from eight."""
    steps = block * PATCH
    config = ForecasterConfig(
        look_back=8 * steps,
        horizon=2 * steps,
        num_layers=2,
        segment_sizes=(block, block),
        instance_norm="mean",
        dropout=0.0,
        head_dropout=0.0,
    )
    options = TrainOptions(
        epochs=12,
        patience=12,
        batch_size=128,
        learning_rate=3e-3,
        loss="mse",
        train_fraction=1.0,
        seed=seed,
        device=device,
    )
    return config, options


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mse": nn.MSELoss,
    "mae": nn.L1Loss,
    "huber": nn.HuberLoss,
}


@torch.no_grad()
def evaluate(model: nn.Module, windows: Windows, device: str, batch_size: int = 64) -> Score:
    """Score a model on every window, in eval mode; the mode is restored."""
    was_training = model.training
    model.eval()
    score = Score()
    for start in range(0, len(windows), batch_size):
        past, truth = windows.batch(slice(start, start + batch_size))
        score.add(model(past.to(device)), truth.to(device))
    model.train(was_training)
    return score


@torch.no_grad()
def roll_out(model: nn.Module, past: Tensor, horizon: int) -> Tensor:
    """Forecast further than the model does: its forecasts become its past.

    Args:
        model: (W, C, L) to (W, C, H), in eval mode.
        past: (W, C, L).
        horizon: steps to forecast; the last call's surplus is cut off.

    Returns:
        (W, C, horizon).

    Source: ``TSFT.forecast`` in evortigosa/segmoe_forecast: a window of constant length.
    """
    length, parts, done = past.shape[-1], [], 0
    while done < horizon:
        parts.append(model(past))
        done += parts[-1].shape[-1]
        past = torch.cat([past, parts[-1]], dim=-1)[..., -length:]
    return torch.cat(parts, dim=-1)[..., :horizon]


@torch.no_grad()
def evaluate_horizons(
    model: nn.Module,
    splits: dict[int, Windows],
    device: str,
    batch_size: int = 64,
) -> dict[int, Score]:
    """Score a model on every window of several horizons, rolled out once for each start.

    Args:
        model: its forecasts are rolled out to the longest horizon that a start has.
        splits: windows of one split by horizon; the n-th windows of all start at the same row.
        device: "cpu" or "cuda".
        batch_size: windows.

    Returns:
        Score by horizon, each of all its windows.
    """
    was_training = model.training
    model.eval()
    scores = {horizon: Score() for horizon in splits}
    first = 0
    # Longer horizons have fewer windows: those that end before the split does.
    for horizon in sorted(splits, reverse=True):
        windows = splits[horizon]
        for start in range(first, len(windows), batch_size):
            stop = min(start + batch_size, len(windows))
            past, truth = windows.batch(slice(start, stop))
            forecast = roll_out(model, past.to(device), horizon)
            for shorter in (h for h in splits if h <= horizon):
                scores[shorter].add(forecast[..., :shorter], truth[..., :shorter].to(device))
        first = max(first, len(windows))
    model.train(was_training)
    return scores


class Trainer:
    """Trains one model; all of its state can be saved and restored.

    Args:
        model: to train, already on its device; a `Forecaster`, or what has its
            ``forward_with_loss``.
        train: windows of the train split.
        val: windows of the validation split; they alone decide when to stop and what to keep.
        options: see `TrainOptions`.
        checkpoint: file written after every epoch, or None.
        identity: what must agree between a checkpoint and the run that resumes it.
        after_step: called after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Windows,
        val: Windows,
        options: TrainOptions,
        checkpoint: Path | None = None,
        identity: dict[str, Any] | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        self.after_step = after_step
        self.model, self.train_windows, self.val_windows = model, train, val
        self.options, self.checkpoint = options, checkpoint
        self.identity = {"options": dataclasses.asdict(options), **(identity or {})}
        self.loss = LOSSES[options.loss]()
        self.optimizer = make_optimizer(model, options)
        used = max(1, round(len(train) * options.train_fraction))
        self.windows_per_epoch = used
        self.steps_per_epoch = math.ceil(used / options.batch_size)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, warmup_cosine(options.epochs * self.steps_per_epoch)
        )
        self.order = torch.Generator().manual_seed(options.seed)
        self.history: list[dict[str, float]] = []
        self.best_epoch = -1
        self.best_state: dict[str, Tensor] = {}

    def fit(self, progress: bool = True) -> None:
        """Train to the end (or on from where a restored checkpoint stood) and keep the best.

        Raises:
            DivergedError: if no epoch had a finite validation MSE.
        """
        for epoch in range(len(self.history), self.options.epochs):
            if self._out_of_patience():
                break
            self.history.append({"epoch": epoch, **self._epoch(epoch, progress)})
            if self.history[-1]["val_mse"] < self.best_val_mse:
                self.best_epoch = epoch
                self.best_state = copy.deepcopy(self.model.state_dict())
            if self.checkpoint is not None:
                self.save(self.checkpoint)
        if self.best_epoch < 0:
            raise DivergedError(
                f"training diverged: validation MSE was {self.history[-1]['val_mse']} after "
                f"{len(self.history)} epochs; try a lower learning_rate"
            )
        self.model.load_state_dict(self.best_state)

    @property
    def best_val_mse(self) -> float:
        """Lowest validation MSE so far."""
        return self.history[self.best_epoch]["val_mse"] if self.best_epoch >= 0 else math.inf

    @property
    def step_ms(self) -> float:
        """Median over the epochs of the mean time of a step, in ms."""
        times = sorted(epoch["train_s"] for epoch in self.history)
        return 1000 * times[len(times) // 2] / self.steps_per_epoch

    def _out_of_patience(self) -> bool:
        return bool(self.history) and (
            len(self.history) - 1 - self.best_epoch >= self.options.patience
        )

    def _epoch(self, epoch: int, progress: bool) -> dict[str, float]:
        order = torch.randperm(len(self.train_windows), generator=self.order)
        batches = order[: self.windows_per_epoch].split(self.options.batch_size)
        begin = time.perf_counter()
        total = torch.zeros((), device=self.options.device)
        self.model.train()
        # None: no bar where it would fill a log file, which gets a line an epoch.
        hidden = None if progress else True
        bar = tqdm(batches, desc=f"epoch {epoch + 1}", disable=hidden, leave=False)
        for ids in bar:
            total += self._step(ids) * len(ids)
            if self.after_step is not None:
                self.after_step()
        train_s = time.perf_counter() - begin
        val = evaluate(self.model, self.val_windows, self.options.device)
        result = {
            "train_loss": float(total) / self.windows_per_epoch,
            "val_mse": val.mse,
            "val_mae": val.mae,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_s": train_s,
            "epoch_s": time.perf_counter() - begin,
        }
        if progress:
            tqdm.write(
                f"epoch {epoch + 1:3d}  train loss {result['train_loss']:.4f}  "
                f"val MSE {val.mse:.4f}  val MAE {val.mae:.4f}  {result['epoch_s']:.1f} s"
            )
        return result

    def _step(self, ids: Tensor) -> Tensor:
        past, truth = self.train_windows.batch(ids)
        past, truth = past.to(self.options.device), truth.to(self.options.device)
        self.optimizer.zero_grad(set_to_none=True)
        forecast, balancing = self.model.forward_with_loss(past)
        loss = self.loss(forecast, truth)
        (loss + balancing).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write everything that the rest of the run depends on; the old file lives until then."""
        state = {
            "version": CHECKPOINT_VERSION,
            "identity": self.identity,
            "model": self.model.state_dict(),
            "best_state": self.best_state,
            "best_epoch": self.best_epoch,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
            "order": self.order.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                torch.save(state, stream)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def restore(self, path: Path) -> None:
        """Continue as if the run that wrote the checkpoint had not stopped.

        Args:
            path: written by `save`.

        Raises:
            ValueError: if the checkpoint is of another run, or no whole one.
        """
        try:
            state = dict(torch.load(path, map_location=self.options.device, weights_only=True))
            version, identity = state["version"], state["identity"]
        except Exception as error:  # torch.load raises whatever the bytes lead it to
            kind = type(error).__name__
            rule = "must be a whole one of this program (delete it to start anew)"
            raise ValueError(f"checkpoint {path} {rule}, got a {kind} on loading it") from error
        if version != CHECKPOINT_VERSION or identity != self.identity:
            rule = f"must come from a run with {self.identity}, version {CHECKPOINT_VERSION}"
            raise ValueError(f"checkpoint {path} {rule}, got {identity}, version {version}")
        self.model.load_state_dict(state["model"])
        self.best_state, self.best_epoch = state["best_state"], state["best_epoch"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = state["history"]
        self.order.set_state(state["order"].cpu())
        torch.set_rng_state(state["torch_rng"].cpu())
        if torch.cuda.is_available() and state["cuda_rng"]:
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (norms, biases) alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim >= 2],
            "weight_decay": options.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))


def warmup_cosine(num_steps: int, warmup: float = 0.1) -> Callable[[int], float]:
    """Factor on the learning rate: linear over a tenth of the steps, then cosine to 1 %."""
    first = max(1, round(num_steps * warmup))

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / first
        done = (step - first) / max(1, num_steps - first)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return factor


def make_windows(
    series: Series,
    config: ForecasterConfig,
    dtype: torch.dtype,
    strides: tuple[int, int, int] = (1, 1, 1),
) -> dict[str, Windows]:
    """Windows of the three splits."""
    return {
        split: Windows(series, split, config.look_back, config.horizon, dtype, stride)
        for split, stride in zip(("train", "val", "test"), strides, strict=True)
    }


def train_one(
    series: Series,
    config: ForecasterConfig,
    options: TrainOptions,
    out: Path,
    *,
    horizons: Sequence[int] = (),
    resume: bool = False,
    quiet: bool = False,
) -> tuple[Forecaster, dict[str, Any]]:
    """Train one model and score it once on the test windows.

    Args:
        series: scaled.
        config: of the model.
        options: of the training.
        out: folder of the checkpoint.
        horizons: score the test windows of these, too, by rolling the forecast out.
        resume: go on from the checkpoint if there is one.
        quiet: show no progress.

    Returns:
        The model of the best validation epoch, and its record for the result file.
    """
    strides = (1, options.val_stride, options.test_stride)
    windows = make_windows(series, config, torch.float32, strides)
    torch.manual_seed(options.seed)
    model = Forecaster(config).to(options.device)
    checkpoint = out / "checkpoint.pt"
    identity = {"data": series.name, "config": dataclasses.asdict(config)}
    trainer = Trainer(model, windows["train"], windows["val"], options, checkpoint, identity)
    if resume and checkpoint.is_file():
        trainer.restore(checkpoint)
        print(f"{config.ffn}: going on after epoch {len(trainer.history)}")
    trainer.fit(progress=not quiet)
    scores = score_horizons(model, series, {config.horizon, *horizons}, options)
    test = scores[config.horizon]
    best = trainer.history[trainer.best_epoch]
    record = {
        "model": config.ffn,
        "parameters": count_parameters(model),
        "active_flops_per_token": active_flops_per_token(config),
        "step_ms": trainer.step_ms,
        "val_mse": best["val_mse"],
        "test_mse": test["mse"],
        "test_mae": test["mae"],
        "seconds": sum(epoch["epoch_s"] for epoch in trainer.history),
        "best_epoch": trainer.best_epoch,
        "train_windows": len(windows["train"]),
        "validation": {
            "mse": best["val_mse"],
            "mae": best["val_mae"],
            "windows": len(windows["val"]),
        },
        "test": test,
        "horizons": {str(horizon): scores[horizon] for horizon in horizons},
        "config": dataclasses.asdict(config),
        "options": dataclasses.asdict(options),
        "history": trainer.history,
    }
    return model, record


def score_horizons(
    model: Forecaster, series: Series, horizons: Iterable[int], options: TrainOptions
) -> dict[int, dict[str, float]]:
    """Test scores by horizon, each of all of its windows; every window is rolled out once."""
    look_back, stride = model.config.look_back, options.test_stride
    splits = {h: Windows(series, "test", look_back, h, stride=stride) for h in horizons}
    scores = evaluate_horizons(model, splits, options.device)
    return {
        horizon: {
            "mse": score.mse,
            "mae": score.mae,
            "windows": len(splits[horizon]),
            "values": score.count,
        }
        for horizon, score in scores.items()
    }
