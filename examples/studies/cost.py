"""What a model costs in the official configurations: memory for backward, time, FLOPs.

    python -m examples.studies.cost
    TRITON_INTERPRET=1 python -m examples.studies.cost --backend triton --only memory

Compares dense FFNs, token-wise and segment-wise experts, and the loop over experts of the official
code, in the same model on the same batch. On a CPU memory is what autograd keeps after forward,
each storage once, without parameters; on a GPU also the allocator's peak. ``--backend triton``
measures the kernels: on a GPU, or in Triton's interpreter for memory alone. Writes
``examples/results/cost*``.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.official_loop import OfficialLoop
from examples.forecaster.model import (
    Forecaster,
    ForecasterConfig,
    active_flops_per_token,
    count_parameters,
)
from examples.forecaster.report import versions, write_csv

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Source: model/Config.py and scripts of evortigosa/segmoe_forecast; tiny has no published schedule
# and takes small's.
CONFIGS = {
    "tiny": {"d_model": 64, "d_ff": 128, "num_experts": 4, "segment_sizes": (3, 5, 5, 5)},
    "small": {"d_model": 128, "d_ff": 256, "num_experts": 4, "segment_sizes": (3, 5, 5, 5)},
    "base": {
        "d_model": 256,
        "d_ff": 512,
        "num_experts": 8,
        "num_heads": 8,
        "num_layers": 6,
        "segment_sizes": (5, 5, 4, 4, 3, 3),
    },
}
KINDS = {
    "dense": {"ffn": "dense"},
    "token-wise": {"ffn": "token", "shared_expert": "token"},
    "segment-wise, shared token-wide": {"shared_expert": "token"},
    "segment-wise": {},
    "official loop": {},
}


def build(name: str, kind: str, backend: str) -> Forecaster:
    """A model of a configuration with one kind of FFN."""
    given: dict[str, Any] = {"horizon": 32, "num_heads": 4, "shared_expert": "segment"}
    given |= CONFIGS[name] | KINDS[kind]
    config = ForecasterConfig(dropout=0.0, head_dropout=0.0, **given)
    torch.manual_seed(0)
    model = Forecaster(config)
    for block in model.blocks:
        block.ffn.backend = backend
        if kind == "official loop":
            block.ffn = OfficialLoop(block.ffn)
    return model


def kept(modules: Sequence[nn.Module], call: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that a forward pass keeps for backward, and its result."""
    alive = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            found[storage.data_ptr()] = storage  # kept, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    return sum(storage.nbytes() for storage in found.values()), y


def memory(model: Forecaster, past: Tensor) -> dict[str, float]:
    """MiB for backward: of the whole model, and of its FFN layers alone, their input included."""
    whole, _ = kept([model], lambda: model(past))
    layers = 0
    steps = past.shape[0] * past.shape[1], model.config.num_patches, model.config.d_model
    x = torch.randn(steps, device=past.device)
    for block in model.blocks:
        ours = x.clone().requires_grad_()
        layers += kept([block.ffn], lambda block=block, ours=ours: block.ffn(ours))[0]
    patches = past.shape[0] * past.shape[1] * model.config.num_patches
    return {
        "model_mib": whole / 2**20,
        "ffn_mib": layers / 2**20,
        "ffn_bytes_per_patch_and_layer": layers / patches / len(model.blocks),
    }


def timed(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Median milliseconds of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def times(model: Forecaster, past: Tensor, repeats: int, device: str) -> dict[str, float]:
    """Training step without an optimizer's, and inference."""

    def step() -> None:
        model.zero_grad()
        model(past).square().mean().backward()

    def infer() -> None:
        with torch.no_grad():
            model(past)

    found: dict[str, float] = {}
    model.train()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    found["train_ms"] = timed(step, repeats, device)
    if device == "cuda":
        found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    model.eval()
    found["infer_ms"] = timed(infer, repeats, device)
    return found


def shared_share(config: ForecasterConfig) -> float:
    """Share of the shared expert in the FLOPs of the whole model."""
    if config.ffn == "dense" or config.shared_expert is None:
        return 0.0
    without = dataclasses.replace(config, shared_expert=None)
    return 1 - active_flops_per_token(without) / active_flops_per_token(config)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each configuration and kind."""
    for name in options.configs:
        for kind in KINDS:
            model = build(name, kind, options.backend).to(options.device)
            past = torch.randn(options.windows, options.channels, model.config.look_back)
            past = past.to(options.device)
            row: dict[str, Any] = {"config": name, "kind": kind, "backend": options.backend}
            row["parameters"] = count_parameters(model)
            row["mflop_per_patch"] = active_flops_per_token(model.config) / 1e6
            row["shared_share"] = shared_share(model.config)
            if options.only != "time":
                row |= memory(model, past)
            if options.only != "memory":
                row |= times(model, past, options.repeats, options.device)
            print(
                "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()
                )
            )
            yield row


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """FLOPs with the shared expert's part, and bytes for backward."""
    configs = list(dict.fromkeys(row["config"] for row in rows))
    figure = Figure(figsize=(9, 1 + 1.7 * len(configs)), layout="constrained")
    axes = figure.subplots(len(configs), 2, squeeze=False)
    for (left, right), name in zip(axes, configs, strict=True):
        here = [row for row in rows if row["config"] == name]
        places = np.arange(len(here))
        flops = np.array([row["mflop_per_patch"] for row in here])
        part = flops * np.array([row["shared_share"] for row in here])
        left.barh(places, flops - part, color="#33658a", label="all else")
        left.barh(places, part, left=flops - part, color="#f6ae2d", label="shared expert")
        left.set_yticks(places, [row["kind"] for row in here], fontsize=8)
        left.set_title(f"{name}: MFLOP a patch, forward", fontsize=9)
        kept_bytes = [row.get("ffn_bytes_per_patch_and_layer", 0.0) for row in here]
        right.barh(places, kept_bytes, color="#5b8e7d")
        right.set_yticks(places, [""] * len(here))
        right.set_title("bytes for backward, a patch and FFN layer", fontsize=9)
        for axis in (left, right):
            axis.invert_yaxis()
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--configs", nargs="+", choices=tuple(CONFIGS), default=tuple(CONFIGS))
    add("--windows", type=int, default=2, help="of a batch; the official runs have 14 to 256")
    add("--channels", type=int, default=7)
    add("--backend", choices=("auto", "reference", "triton"), default="auto")
    add("--only", choices=("memory", "time"), help="measure one of them")
    add("--repeats", type=int, default=5)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--results", type=Path, default=RESULTS, help="folder for results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    given = ("windows", "channels", "device", "threads")
    settings = {name: getattr(options, name) for name in given} | versions()
    rows = [row | settings for row in measure(options)]
    name = "cost" if options.backend == "auto" else f"cost_{options.backend}"
    name += "" if options.device == "cpu" else f"_{options.device}"
    write_csv(options.results / f"{name}.csv", rows)
    plot(rows, options.results / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
