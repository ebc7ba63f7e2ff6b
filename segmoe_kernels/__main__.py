"""Commands: ``doctor`` says what is installed and checks it, ``advise`` proposes segment sizes."""

import argparse
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
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
# The oldest release of what the package needs, and of what it works with where that is installed.
OLDEST = {
    "torch": "2.9",
    "numpy": "1.26",
    "einops": "0.8",
    "triton": "3.5",
    "transformers": "5",
    "peft": "0.18",
}
NEEDED = ("torch", "numpy", "einops")
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


def _print_row(name: str, value: object) -> None:
    print(f"{name:<{NAME_WIDTH}}{value}")


def _print_versions() -> dict[str, str]:
    """Print what is installed; returns what is missing or too old, and what would do."""
    _print_row("segmoe_kernels", segmoe_kernels.__version__)
    _print_row("python", platform.python_version())
    missing = {}
    for package, oldest in OLDEST.items():
        try:
            found = version = importlib.metadata.version(package)
            if version[0].isdigit() and _numbers(version) < _numbers(oldest):
                found = f"{version}: too old, {oldest} is the oldest that works"
        except importlib.metadata.PackageNotFoundError:
            version, found = "", "not installed"
        if found != version:
            missing[package] = f"{package} >= {oldest}"
        _print_row(package, found)
    return missing


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def _driver_version() -> int:
    """The newest CUDA that the driver knows, as 1000 * major + 10 * minor; 0 without a driver."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return 0
    return number.value


def _print_devices() -> None:
    """Print GPUs, the driver, and which of our settings are set."""
    count, runtime = torch.cuda.device_count(), torch.version.cuda
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        _print_row(f"cuda:{index}", f"{properties.name}, {capability}, {memory}")
    if runtime is not None:
        number = _driver_version()
        driver = f"up to CUDA {number // 1000}.{number % 1000 // 10}" if number else "none"
        _print_row("CUDA driver", f"{driver}; PyTorch is built with CUDA {runtime}")
    if not count:
        for_cpus = runtime is None and torch.version.hip is None
        rest = ": it is built for CPUs alone" if for_cpus else ""
        _print_row("GPU", f"none that PyTorch can use{rest}")
    for name in VARIABLES:
        if name in os.environ:
            _print_row(name, os.environ[name])


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


def _run_checks(device: torch.device, kernels: bool) -> list[str]:
    """Run and print the self-check; returns the names of what failed."""
    failed = []
    for name, options in (*CHECKS, *(MORE_KERNELS if kernels else ())):
        try:
            _check(options, device)
        except Exception as error:  # whatever goes wrong is the diagnosis
            if isinstance(error, RuntimeError) and str(error).startswith(REFUSAL):
                _print_row(f"check, {name}", f"refused: {str(error).removeprefix(REFUSAL)}")
                continue
            failed.append(name)
            _print_row(f"check, {name}", "FAILED")
            traceback.print_exc()
        else:
            _print_row(f"check, {name}", "ok, forward and gradients against float64")
    return failed


def doctor() -> int:
    """Print versions, devices, settings and the backend, run a self-check, and say in one line.

    Returns:
        0 if all is ready, else 1.
    """
    missing = _print_versions()
    _print_devices()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    try:
        _print_row("backend", _explain_backend(device))
        kernels = resolve_backend("auto", torch.empty(0, device=device)) == "triton"
        if kernels or "triton" not in missing:
            from segmoe_kernels._triton import tiles

            _print_row("tiles", tiles.describe_source())
    except (RuntimeError, ValueError) as error:
        print(f"not ready: {error}")
        return 1
    needed = (*NEEDED, "triton") if kernels else NEEDED
    wrong = [missing[package] for package in needed if package in missing]
    wrong += [f"check of {name} failed" for name in _run_checks(device, kernels)]
    if wrong:
        print(f"not ready: {', '.join(wrong)}")
        return 1
    rest = f"; kernels need {missing['triton']}" if place != "CPU" and "triton" in missing else ""
    print(f"ready: {'kernels' if kernels else 'reference'} on {place}{rest}")
    return 0


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
