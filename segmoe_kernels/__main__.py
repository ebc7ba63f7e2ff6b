"""Commands: ``doctor`` says what is installed and checks it, ``advise`` proposes segment sizes."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import torch

import segmoe_kernels
from segmoe_kernels.functional import resolve_backend
from segmoe_kernels.layer import SegMoE
from segmoe_kernels.options import settings
from segmoe_kernels.testing import assert_as_accurate, make_inputs, oracle, route_ids, run_layer

VARIABLES = (
    "SEGMOE_BACKEND",
    "SEGMOE_REPLAY",
    "SEGMOE_ARCH",
    "SEGMOE_TILES",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
)
NAME_WIDTH = 24
# What the package says no to is not a fault of it.
REFUSAL = "segmoe_kernels: "

# Small layers that together pass through every stage.
CHECKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("token scope", {"expert_scope": "token", "top_k": 2, "pooling": "mean"}),
    ("segment scope", {"expert_scope": "segment", "gated": True, "activation": "silu"}),
    ("projected scope", {"expert_scope": "projected", "bias": True}),
    ("float16", {"dtype": torch.float16}),
    ("bfloat16", {"dtype": torch.bfloat16}),
)
# Other kernels, which wider rows take.
MORE_KERNELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rows of 160 columns", {"d_model": 160, "bias": True}),
    ("rows of 288 columns", {"d_model": 288, "bias": True}),
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_row(name: str, value: object) -> None:
    print(f"{name:<{NAME_WIDTH}}{value}")


def _print_environment() -> None:
    _print_row("segmoe_kernels", segmoe_kernels.__version__)
    _print_row("python", platform.python_version())
    _print_row("torch", torch.__version__)
    for package in ("triton", "numpy", "einops"):
        _print_row(package, _version(package))
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        _print_row(f"cuda:{index}", f"{properties.name}, {capability}, {memory}")
    if not count:
        _print_row("GPU", "none that PyTorch can use")
    for name in VARIABLES:
        _print_row(name, os.environ.get(name, "not set"))


def _explain_backend(device: torch.device) -> str:
    """The backend for ``backend="auto"`` on device, and the reason, as one line."""
    x = torch.empty(0, device=device)
    backend = resolve_backend("auto", x)
    if settings().backend != "auto":
        return f"{backend} on {device}: SEGMOE_BACKEND says so"
    if backend == "triton":
        return f"triton on {device}: a GPU, and triton is installed"
    try:
        resolve_backend("triton", x)
    except RuntimeError as error:
        return f"reference on {device}: {str(error).removeprefix(REFUSAL)}"
    return f"reference on {device}: for CPU tensors; backend='triton' would run interpreted"


def _check(options: dict[str, Any], device: torch.device) -> None:
    """Compare forward and all gradients of a small layer with float64."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 32, "num_experts": 4, "segment_size": 3}
    layer = SegMoE(**{**sizes, **options}, device=device)
    dtype = options.get("dtype", torch.float32)
    inputs = make_inputs(3, 10, layer.d_model, dtype=dtype, device=device, masked=0.2)
    ids = route_ids(layer, *inputs)
    actual = run_layer(layer, *inputs)
    eager = run_layer(layer, *inputs, backend="reference", topk_ids=ids)
    assert_as_accurate(actual, eager, oracle(layer, *inputs, topk_ids=ids))


def doctor() -> int:
    """Print versions, devices and the backend, and run a self-check.

    Returns:
        0 if the self-check passes, else 1.
    """
    _print_environment()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        _print_row("backend", _explain_backend(device))
        if importlib.util.find_spec("triton") is not None:
            from segmoe_kernels._triton import tiles

            _print_row("tiles", tiles.describe_source())
    except (RuntimeError, ValueError) as error:
        _print_row("cannot run", error)
        return 1
    failed = False
    kernels = resolve_backend("auto", torch.empty(0, device=device)) == "triton"
    for name, options in (*CHECKS, *(MORE_KERNELS if kernels else ())):
        try:
            _check(options, device)
        except Exception as error:  # whatever goes wrong is the diagnosis
            if isinstance(error, RuntimeError) and str(error).startswith(REFUSAL):
                _print_row(f"check, {name}", f"refused: {str(error).removeprefix(REFUSAL)}")
                continue
            failed = True
            _print_row(f"check, {name}", "FAILED")
            traceback.print_exc()
        else:
            _print_row(f"check, {name}", "ok, forward and gradients against float64")
    return int(failed)


def advise_command(options: argparse.Namespace) -> int:
    """Print which segment size a file's series calls for, and why.

    Returns:
        0, or 2 for a file that can't be used.
    """
    from segmoe_kernels.series import read_table
    from segmoe_kernels.series.advise import advise, plot_advice

    try:
        table = read_table(options.file)
        values = table.values
        advice = advise(
            values,
            patch=options.patch,
            step=options.step,
            max_size=options.max_size,
            progress=sys.stderr.isatty(),
        )
        if options.plot is not None:
            plot_advice(advice, patch=options.patch).savefig(options.plot, dpi=130)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        of_file = {"columns": table.columns, "left_out": table.left_out, "notes": table.notes}
        print(json.dumps({**dataclasses.asdict(advice), **of_file}))
        return 0
    print(f"{len(values)} steps, {values.shape[1]} channels, patches of {options.patch}")
    for sentence in (*table.describe(), *advice.reasons):
        print(f"* {sentence}")
    print(f"segment size: {advice.size}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None takes the process's.

    Returns:
        Exit code: 0, 1 if a check failed, 2 for a file that can't be used. An unknown command
        exits with 2.
    """
    parser = argparse.ArgumentParser(prog="python -m segmoe_kernels")
    version = f"segmoe_kernels {segmoe_kernels.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    text = "print versions, devices and the backend that would run, and check it"
    commands.add_parser("doctor", help=text, description=f"{text.capitalize()}.")
    text = "say whether segments are likely to pay on a series, and propose their size"
    add = commands.add_parser(
        "advise",
        help=text,
        description=f"{text.capitalize()}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ).add_argument
    add("file", help="csv, plain or gzipped: a row for each step, a column for each channel")
    add("--patch", type=int, default=1, help="steps in a patch of the model")
    add("--step", type=int, default=1, help="rows between forecasts, from row 0 on; 1: anywhere")
    add("--max-size", type=int, default=8, help="longest segment to consider, in patches")
    add("--plot", help="file for a picture; needs matplotlib")
    add("--json", action="store_true", help="print all of it as JSON")
    options = parser.parse_args(arguments)
    return doctor() if options.command == "doctor" else advise_command(options)


if __name__ == "__main__":
    sys.exit(main())
