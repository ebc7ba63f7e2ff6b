"""One stage, forward and backward, on the Triton backend, on plain PyTorch and in float64.

A stage under test is a function of named tensors that returns named tensors::

    def stage(x, weight, *, backend):
        return {"y": grouped_gemm(x, weight, offsets, backend=backend)}

    check_accuracy(stage, {"x": x, "weight": weight})
"""

import contextlib

import torch

from segmoe_kernels.testing import assert_as_accurate, forced_routing

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw(*shape, dtype=torch.float64, device="cpu"):
    """Unit-variance numbers, rounded to dtype."""
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


def run_stage(stage, tensors, *, backend="triton", upstream=None, wanted=None, dtype=None):
    """Run a stage forward and backward.

    Args:
        stage: see the module's docstring.
        tensors: by name; each floating one is a leaf.
        backend: "triton" or "reference".
        upstream: gradients of the outputs by name, filled in where one is missing.
        wanted: names of the leaves that require a gradient; None for all.
        dtype: None keeps the tensors'.

    Returns:
        Outputs and gradients ("d" + name) by name.
    """
    upstream = {} if upstream is None else upstream
    leaves = {}
    for name, tensor in tensors.items():
        leaf = tensor.detach() if dtype is None else tensor.detach().to(dtype)
        leaves[name] = leaf.requires_grad_(wanted is None or name in wanted)
    outputs = stage(**leaves, backend=backend)
    reached = {name: out for name, out in outputs.items() if out.requires_grad}
    for name, out in reached.items():
        if name not in upstream:
            upstream[name] = draw(*out.shape, dtype=out.dtype, device=out.device)
    if reached:
        gradients = [upstream[name].to(out.dtype) for name, out in reached.items()]
        torch.autograd.backward(list(reached.values()), gradients)
    results = {name: out.detach() for name, out in outputs.items()}
    results.update({f"d{n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None})
    return results


def check_exactness(stage, tensors, *, rtol=1e-11, wanted=None):
    """Require outputs and gradients of float64 tensors to equal the reference's."""
    options = {"upstream": {}, "wanted": wanted}
    actual = run_stage(stage, tensors, **options)
    check_same(actual, run_stage(stage, tensors, backend="reference", **options), rounded=rtol)
    return actual


def check_accuracy(stage, tensors, *, ids=None):
    """Require outputs and gradients to be as accurate as plain PyTorch's in the same dtype.

    Args:
        stage: see the module's docstring.
        tensors: by name.
        ids: name of an output that holds routing choices: the reference is made to take the same,
            since rounding can turn a near tie.
    """
    upstream = {}
    actual = run_stage(stage, tensors, upstream=upstream)
    choices = None if ids is None else actual[ids]
    with contextlib.nullcontext() if ids is None else forced_routing(choices):
        eager = run_stage(stage, tensors, backend="reference", upstream=upstream)
        exact = run_stage(
            stage, tensors, backend="reference", upstream=upstream, dtype=torch.float64
        )
    floats = [
        {name: value for name, value in results.items() if value.is_floating_point()}
        for results in (actual, eager, exact)
    ]
    assert_as_accurate(*floats)
    return actual


def check_wanted_gradients(stage, tensors, subsets):
    """Require each subset of gradients to be what the full set holds, bit for bit, and no more."""
    upstream = {}
    full = run_stage(stage, tensors, upstream=upstream)
    outputs = full.keys() - {f"d{name}" for name in tensors}
    for wanted in subsets:
        some = run_stage(stage, tensors, upstream=upstream, wanted=wanted)
        assert some.keys() == outputs | {f"d{name}" for name in wanted}, wanted
        for name, value in some.items():
            assert torch.equal(value, full[name]), (wanted, name)


def check_same(actual, expected, *, rounded=0.0):
    """Require two results of `run_stage` to be equal bit for bit, or but for roundings."""
    assert actual.keys() == expected.keys()
    options = {"rtol": rounded, "atol": rounded, "equal_nan": True}
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, **options, msg=lambda text, n=name: f"{n}: {text}"
        )


def strided_views(tensor):
    """Equal numbers under other strides, the elements between them NaN.

    Yields:
        Views with rows further apart, with the first two dimensions swapped in memory, and with a
        last dimension that is not contiguous; of a vector one with gaps.
    """
    if tensor.ndim == 1:
        gaps = torch.full((len(tensor), 2), torch.nan, dtype=tensor.dtype, device=tensor.device)
        gaps[:, 0] = tensor
        yield gaps[:, 0]
        return
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype).to(
        tensor.device
    )
    wide[..., 1:-2] = tensor
    yield wide[..., 1:-2]
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
