"""Activations and dropout as device functions: accuracy, NaN, random numbers, instructions.

Run as a script, without the interpreter, the file compiles its kernels for sm_90 and prints what
they take, as JSON.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import run_python

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402  after the check

from segmoe_kernels._triton.activations import activate, activate_with_grad, dropout_scale  # noqa: E402
from segmoe_kernels._triton.launch import accumulator, exact  # noqa: E402

# The interpreter computes NaN and infinities with numpy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMOOTH = ["gelu", "gelu_tanh", "silu"]
ACTIVATIONS = [*SMOOTH, "relu"]
BLOCK = 8192


@triton.jit
def _activate_kernel(
    x_ptr, value_ptr, n, ACTIVATION: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = activate(tl.load(x_ptr + offs, mask=offs < n), ACTIVATION, FAST)
    tl.store(value_ptr + offs, value, mask=offs < n)


@triton.jit
def _grad_kernel(
    x_ptr,
    value_ptr,
    slope_ptr,
    n,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, slope = activate_with_grad(tl.load(x_ptr + offs, mask=offs < n), ACTIVATION, FAST)
    tl.store(value_ptr + offs, value, mask=offs < n)
    tl.store(slope_ptr + offs, slope, mask=offs < n)


@triton.jit
def _dropout_kernel(
    scale_ptr,  # (row blocks * BLOCK_M, width)
    seed_ptr,
    first_row,
    first_col,
    width,
    p,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr)
    if ALIGNED:
        scale = dropout_scale(seed, first_row + rows, cols, width, p, ACC, first)
    else:
        scale = dropout_scale(seed, first_row + rows, first_col + cols, width, p, ACC)
    mask = (cols < width)[None, :]
    tl.store(scale_ptr + rows[:, None] * width + cols[None, :], scale, mask=mask)


def run_activate(x, activation, *, fast):
    value, slope, twin = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    grid = (triton.cdiv(len(x), BLOCK),)
    _activate_kernel[grid](x, value, len(x), ACTIVATION=activation, FAST=fast, BLOCK=BLOCK)
    _grad_kernel[grid](x, twin, slope, len(x), ACTIVATION=activation, FAST=fast, BLOCK=BLOCK)
    return value, twin, slope


def run_dropout(device, p, rows=64, width=128, tile=(64, 64), **options):
    seed = torch.tensor([options.pop("seed", 1)], device=device)
    dtype = options.pop("dtype", torch.float32)
    scale = torch.empty(rows, width, dtype=dtype, device=device)
    first_row, first_col = options.pop("first_row", 0), options.pop("first_col", 0)
    grid = (rows // tile[0], triton.cdiv(width, tile[1]))
    aligned = options.pop("aligned", True)
    assert not options
    _dropout_kernel[grid](
        scale, seed, first_row, first_col, width, exact(p, dtype), ACC=accumulator(dtype),
        ALIGNED=aligned, BLOCK_M=tile[0], BLOCK_N=tile[1],
    )  # fmt: skip
    return scale.cpu()


def truth(x, activation):
    """Value and derivative in float64, with the precision of the tails kept."""
    x = x.double()
    if activation == "relu":
        return x.clamp_min(0), (x > 0).double()
    if activation == "gelu":
        cdf = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    inner, slope = x, torch.ones_like(x)
    if activation != "silu":
        assert activation == "gelu_tanh"
        factor = 2 * math.sqrt(2 / math.pi)
        inner, slope = factor * (x + 0.044715 * x**3), factor * (1 + 0.134145 * x * x)
    gate = torch.sigmoid(inner)
    return x * gate, gate + x * gate * torch.sigmoid(-inner) * slope


def grid_of(device, dtype=torch.float32):
    """Dense where the functions bend; then to values whose squares overflow float32."""
    dense = torch.linspace(-14, 14, 5 * BLOCK, dtype=torch.float64)
    large = torch.logspace(-30, 18, 500, dtype=torch.float64)
    return torch.cat([dense, large, -large]).to(device, dtype)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_accurate(activation, fast, device):
    x = grid_of(device)
    value, twin, slope = run_activate(x, activation, fast=fast)
    expected, expected_slope = truth(x, activation)
    # An error in the input's last digit weighs with |x|.
    weight = x.double().abs().clamp_min(1)
    assert ((value - expected).abs() / weight).max() <= 1e-6
    assert ((twin - expected).abs() / weight).max() <= 1e-6
    # The tanh form multiplies the error of ``1 - gate`` by some 30, in either form.
    limit = 2.5e-6 if activation == "gelu_tanh" else 1e-6
    assert (slope - expected_slope).abs().max() <= limit


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_in_float64(activation, device):
    x = grid_of(device, torch.float64)
    value, twin, slope = run_activate(x, activation, fast=False)
    expected, expected_slope = truth(x, activation)
    for actual, wanted in ((value, expected), (twin, expected), (slope, expected_slope)):
        # erf's own error in the interpreter's numpy is of this size; times |x|.
        assert ((actual - wanted).abs() / x.abs().clamp_min(1)).max() <= 1e-14


@pytest.mark.parametrize("fast", [False, True])
def test_relu_has_the_slope_of_pytorch_at_zero(fast, device):
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0], device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.relu(x).sum(), x)
    _, _, slope = run_activate(x.detach(), "relu", fast=fast)
    assert torch.equal(slope, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", SMOOTH)
def test_rounded_fast_activation_is_as_good_as_the_exact_one(activation, dtype, device):
    x = grid_of(device)[: 5 * BLOCK]
    wanted = truth(x, activation)
    errors = []
    for fast in (True, False):
        value, _, slope = run_activate(x, activation, fast=fast)
        pairs = zip((value, slope), wanted, strict=True)
        errors.append([(a.to(dtype).double() - b).square().mean().sqrt() for a, b in pairs])
    for fast_error, exact_error in zip(*errors, strict=True):
        assert fast_error <= 1.01 * exact_error


def test_fast_gelu_keeps_its_lower_tail(device):
    x = torch.linspace(-9, -2, BLOCK, device=device)
    value, _, _ = run_activate(x, "gelu", fast=True)
    expected, _ = truth(x, "gelu")
    assert (value / expected - 1).abs().max() <= 2e-4


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fast_activation_treats_nan_and_infinity_as_the_exact_one(activation, device):
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38, 1e20, -1e20]
    x = torch.tensor(special, device=device)
    fast, exact = (run_activate(x, activation, fast=fast) for fast in (True, False))
    assert fast[0][0].isnan()
    for actual, expected in zip(fast, exact, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_keeps_nan_where_a_maximum_drops_it(activation, fast, monkeypatch):
    """As hardware does; the interpreter's own maximum and minimum keep a NaN."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        monkeypatch.setattr(
            InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f)
        )
    results = run_activate(torch.full((4,), math.nan), activation, fast=fast)
    # Where it has a corner, PyTorch gives a slope of 0 or NaN there, by version.
    assert all(result.isnan().all() for result in results[: 3 if activation in SMOOTH else 2])


@pytest.mark.parametrize("tile", [(16, 16), (64, 32), (32, 128)])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("width", [128, 72])
def test_dropout_does_not_depend_on_the_tile(tile, aligned, width, device):
    expected = run_dropout(device, 0.3, width=width, tile=(64, 64))
    actual = run_dropout(device, 0.3, width=width, tile=tile, aligned=aligned)
    assert torch.equal(actual, expected)


def test_dropout_of_columns_that_start_anywhere(device):
    expected = run_dropout(device, 0.3)
    shifted = run_dropout(device, 0.3, aligned=False, first_col=5)
    assert torch.equal(shifted[:, :-5], expected[:, 5:])


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_has_its_rate_and_scale(p, device):
    scale = run_dropout(device, p, rows=2048, width=256, tile=(1024, 256))
    kept = scale[scale != 0]
    assert (kept == torch.tensor(1.0) / (1 - torch.tensor(p))).all()
    n = scale.numel()
    assert abs(1 - len(kept) / n - p) <= 4 * math.sqrt(p * (1 - p) / n) + 2**-16


def test_dropout_scale_of_float64_has_all_its_bits(device):
    scale = run_dropout(device, 0.3, dtype=torch.float64)
    assert (scale[scale != 0] == 1 / (1 - torch.tensor(0.3, dtype=torch.float64))).all()


def test_dropout_of_less_than_half_a_step_drops_nothing(device):
    # One step, 2**-16, would drop 16 of these.
    assert (run_dropout(device, 2**-18, rows=4096, width=256, tile=(2048, 256)) != 0).all()


def test_dropout_elements_are_independent(device):
    n = 4096
    dropped = (run_dropout(device, 0.5, rows=n, width=64, tile=(2048, 64)) == 0).double() - 0.5
    # Columns in all pairs, those of one call of the generator too; then neighbouring rows.
    columns = (dropped.T @ dropped) * (4 / n) - torch.eye(64)
    assert columns.abs().max() <= 5.5 / math.sqrt(n)
    rows = (dropped[1:] * dropped[:-1]).mean() * 4
    assert rows.abs() <= 5 / math.sqrt(dropped.numel())


def test_dropout_differs_between_rows_columns_seeds_and_widths(device):
    scale = run_dropout(device, 0.5, rows=256, width=256)
    assert len(scale.unique(dim=0)) == len(scale.T.unique(dim=0)) == 256
    others = [
        run_dropout(device, 0.5, rows=256, width=256, seed=2),
        run_dropout(device, 0.5, rows=256, width=256, seed=1 + 2**32),
        run_dropout(device, 0.5, rows=256, width=256, first_row=256),
        run_dropout(device, 0.5, rows=256, width=256, first_row=2**32),
        run_dropout(device, 0.5, rows=256, width=512)[:, :256],
    ]
    for other in others:
        assert 0.48 <= (other == scale).float().mean() <= 0.52


@triton.jit
def _value_kernel(x_ptr, y_ptr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float32)
    tl.store(y_ptr + offs, activate(x, ACTIVATION, True).to(tl.bfloat16))


@triton.jit
def _both_kernel(x_ptr, y_ptr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, slope = activate_with_grad(tl.load(x_ptr + offs).to(tl.float32), ACTIVATION, True)
    tl.store(y_ptr + offs, value.to(tl.bfloat16))
    tl.store(y_ptr + 1000000 + offs, slope.to(tl.bfloat16))


@triton.jit
def _two_dots_kernel(x_ptr, y_ptr, seed_ptr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout where the layer has it: on an accumulator that is the next dot's operand."""
    M: tl.constexpr = BLOCK // 64
    rows = tl.program_id(0) * M + tl.arange(0, M)
    cols = tl.arange(0, 64)
    x = tl.load(x_ptr + rows[:, None] * 64 + cols[None, :])
    w = tl.load(x_ptr + 1000000 + cols[:, None] * 64 + cols[None, :])
    hidden = tl.dot(x, w)
    if DROPOUT:
        first = tl.program_id(1) * 64
        hidden *= dropout_scale(tl.load(seed_ptr), rows, first + cols, 512, 0.2, tl.float32, first)
    y = tl.dot(hidden.to(tl.bfloat16), w)
    tl.store(y_ptr + rows[:, None] * 64 + cols[None, :], y.to(tl.bfloat16))


def nvidia_tool(name):
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def measure(kernel, **constants):
    """Return SASS instructions an element on sm_90, and bytes of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict.fromkeys(kernel.arg_names, "*bf16") | dict.fromkeys(constants, "constexpr")
    if "seed_ptr" in signature:
        signature["seed_ptr"] = "*i64"
    divisible = {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}
    source = ASTSource(kernel, signature, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [nvidia_tool("nvdisasm"), "-c", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)
    threads = 32 * 4
    return len(lines) / (constants["BLOCK"] / threads), compiled.metadata.shared


def measure_all():
    counts = {}
    for activation in SMOOTH:
        for name, kernel in (("value", _value_kernel), ("both", _both_kernel)):
            found, _ = measure(kernel, ACTIVATION=activation, BLOCK=4096)
            counts[f"{activation} {name}"] = found
    plain, plain_shared = measure(_two_dots_kernel, DROPOUT=False, BLOCK=BLOCK)
    dropped, dropped_shared = measure(_two_dots_kernel, DROPOUT=True, BLOCK=BLOCK)
    counts["dropout"] = dropped - plain
    counts["dropout shared"] = dropped_shared - plain_shared
    return counts


@pytest.mark.skipif(
    not all(nvidia_tool(name).exists() for name in ("ptxas", "nvdisasm")),
    reason="this build of triton has no ptxas and nvdisasm",
)
def test_instructions_per_element():
    # A process of its own: triton has chosen the interpreter in this one.
    counts = json.loads(run_python(__file__).stdout)
    # Loading, storing and converting are counted too. With erf, `/` and tl.rand they are 35 and 45,
    # 15 and 19, and 57.
    assert counts["gelu value"] <= 17
    assert counts["gelu both"] <= 20
    assert counts["gelu_tanh value"] <= 11
    assert counts["gelu_tanh both"] <= 17
    assert counts["silu value"] <= 10
    assert counts["silu both"] <= 13
    assert counts["dropout"] <= 12
    assert counts["dropout shared"] == 0


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_all()))
