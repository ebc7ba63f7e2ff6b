"""Experts in place of the FFNs of two models that know nothing of this package.

    python examples/swap_into_transformer.py --steps 100
    python examples/swap_into_transformer.py --upcycle

Hugging Face's PatchTST and a forecaster around PyTorch's `nn.TransformerEncoder` train on a real
series as they are, then with `SegMoE` layers that `replace_ffn` puts where their FFNs were: the
same initial weights elsewhere, the same batches. Prints error, parameters, FLOPs and time of a
step, before and after. With ``--upcycle`` the trained dense models are swapped instead: their
experts start as copies of the FFNs, with a little noise to part them, so training goes on from
nearly the same error.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it has no parent folder
from examples.forecaster.data import Series, Windows, load_series
from examples.forecaster.sources import DataUnavailableError
from examples.forecaster.training import evaluate
from segmoe_kernels import SegMoE, replace_ffn

LOOK_BACK, HORIZON, PATCH = 256, 96, 8
D_MODEL, D_FF, HEADS, LAYERS = 64, 128, 4, 2


class HuggingFaceForecaster(nn.Module):
    """PatchTST of the transformers package; only the order of dimensions is changed."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        from transformers import PatchTSTConfig, PatchTSTForPrediction

        config = PatchTSTConfig(
            num_input_channels=num_channels,
            context_length=LOOK_BACK,
            prediction_length=HORIZON,
            patch_length=PATCH,
            patch_stride=PATCH,
            d_model=D_MODEL,
            ffn_dim=D_FF,
            num_attention_heads=HEADS,
            num_hidden_layers=LAYERS,
            pooling_type=None,  # the head sees every patch, as in the paper
        )
        self.model = PatchTSTForPrediction(config)

    def forward(self, past: Tensor) -> Tensor:
        """(W, C, LOOK_BACK) to (W, C, HORIZON)."""
        forecast: Tensor = self.model(past_values=past.mT).prediction_outputs
        return forecast.mT


class EncoderForecaster(nn.Module):
    """Patches of each channel through an `nn.TransformerEncoder`, and a linear head."""

    def __init__(self, num_channels: int) -> None:
        del num_channels  # each is a sequence of its own
        super().__init__()
        steps = LOOK_BACK // PATCH
        self.embed = nn.Linear(PATCH, D_MODEL)
        self.position = nn.Parameter(0.02 * torch.randn(steps, D_MODEL))
        layer = nn.TransformerEncoderLayer(
            D_MODEL, HEADS, D_FF, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(D_MODEL)
        self.head = nn.Linear(steps * D_MODEL, HORIZON)

    def forward(self, past: Tensor) -> Tensor:
        """(W, C, LOOK_BACK) to (W, C, HORIZON)."""
        mean = past.mean(-1, keepdim=True)
        std = past.std(-1, keepdim=True, correction=0) + 1e-5
        patches = ((past - mean) / std).unflatten(-1, (-1, PATCH)).flatten(0, 1)
        x = self.norm(self.encoder(self.embed(patches) + self.position))
        forecast: Tensor = self.head(x.flatten(1)).view(*past.shape[:2], HORIZON)
        return forecast * std + mean


class Row(NamedTuple):
    """One line of the table."""

    model: str
    parameters: int
    before: float  # MSE on the validation split
    after: float
    step_flops: float
    step_seconds: float


def batches(windows: Windows, steps: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw random windows; the same for every model."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(len(windows), (batch_size,), generator=generator)
        yield windows.batch(ids)


def train(
    name: str, model: nn.Module, series: Series, options: argparse.Namespace, device: str
) -> Row:
    """Train some steps; error before and after on every validation window."""
    learn, judge = (Windows(series, split, LOOK_BACK, HORIZON) for split in ("train", "val"))
    model.to(device).train()
    before = evaluate(model, judge, device).mse
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

    def step(past: Tensor, truth: Tensor) -> None:
        optimizer.zero_grad()
        F.mse_loss(model(past.to(device)), truth.to(device)).backward()
        optimizer.step()

    torch.manual_seed(2)  # dropout
    seconds = []
    for past, truth in batches(learn, options.steps, options.batch_size):
        start = time.perf_counter()
        step(past, truth)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    after = evaluate(model, judge, device).mse
    # One more step for the count, of a copy, as it would change the model.
    trial = copy.deepcopy(model)
    with FlopCounterMode(display=False) as counter:
        F.mse_loss(trial(past.to(device)), truth.to(device)).backward()
    flops = counter.get_total_flops()
    return Row(name, parameters, before, after, flops, statistics.median(seconds))


def swap(model: nn.Module, example: Tensor, options: argparse.Namespace) -> nn.Module:
    """The model with experts; a copy, as `replace_ffn` works in place."""
    model = copy.deepcopy(model)
    torch.manual_seed(3)
    names = replace_ffn(
        model,
        segment_sizes=options.segment_sizes,
        num_experts=options.num_experts,
        top_k=options.top_k,
        aux_loss_weight=0.02,
        copy_weights=options.upcycle,
        noise=0.01 if options.upcycle else 0.0,
        shared_expert=None if options.upcycle else options.shared_expert,
        example_inputs=(example.to(next(model.parameters()).device),),
    )
    sizes = [layer.segment_size for layer in model.modules() if isinstance(layer, SegMoE)]
    print(f"  swapped {', '.join(f'{n} (P={p})' for n, p in zip(names, sizes, strict=True))}")
    return model


def compare(
    name: str, build: Callable[[int], nn.Module], series: Series, options: argparse.Namespace
) -> list[Row]:
    """Train one model as it is and with experts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{name} on {device}, {options.steps} steps of {options.batch_size} windows", flush=True)
    torch.manual_seed(0)
    dense = build(series.values.shape[1])
    past, _ = Windows(series, "train", LOOK_BACK, HORIZON).batch(slice(0, 4))
    if options.upcycle:
        rows = [train(f"{name}, dense", dense, series, options, device)]
        return [*rows, train("  upcycled", swap(dense, past, options), series, options, device)]
    experts = swap(dense, past, options)
    rows = [train(f"{name}, dense", dense, series, options, device)]
    return [*rows, train("  with experts", experts, series, options, device)]


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    print(
        f"\n{'':32}{'parameters':>11}{'MSE before':>12}{'MSE after':>11}"
        f"{'GFLOP/step':>12}{'ms/step':>9}"
    )
    for row in rows:
        print(
            f"{row.model:32}{row.parameters:>11,}{row.before:>12.4f}{row.after:>11.4f}"
            f"{row.step_flops / 1e9:>12.2f}{1e3 * row.step_seconds:>9.1f}"
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="ETTh1", help="data set, csv file or 'multiscale'")
    add("--data-dir", type=Path, help="folder with the csv files, plain or gzipped")
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=32, help="windows of all channels")
    add("--learning-rate", type=float, default=1e-3)
    add("--num-experts", type=int, default=4)
    add("--top-k", type=int, default=1)
    add("--segment-sizes", default="4", help="patches in a segment, such as 5,4 for two layers")
    add("--shared-expert", choices=("segment", "token"), help="an expert for every segment as well")
    add("--upcycle", action="store_true", help="experts start as copies of the trained FFNs")
    options = parser.parse_args(argv)
    for name in ("steps", "batch_size", "num_experts", "top_k"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def run(options: argparse.Namespace) -> list[Row]:
    """Rows of both models, or of the one whose package is there."""
    series = load_series(options.data, options.data_dir)
    rows: list[Row] = []
    if importlib.util.find_spec("transformers") is None:
        print("PatchTST is left out: it needs the transformers package, pip install transformers")
    else:
        rows += compare("Hugging Face PatchTST", HuggingFaceForecaster, series, options)
    return rows + compare("nn.TransformerEncoder", EncoderForecaster, series, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare both models and print one table."""
    options = parse(argv)
    try:
        show(run(options))
    except (DataUnavailableError, ValueError) as error:  # also sizes that replace_ffn refuses
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
