"""Microbenchmarks of the whole layer beside its peers: see `conftest`; interleaved in `layer`."""

import functools
from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import DTYPES, PARTS, make_case
from benchmarks.conftest import DEVICE, MODES
from benchmarks.gate import Gate
from benchmarks.layer import calls
from benchmarks.peers import PROVIDERS, Provider, SkippedError
from benchmarks.runner import PASSES
from benchmarks.shapes import find_workloads
from benchmarks.work import layer_work, modelled_us
from segmoe_kernels.testing import Inputs


@functools.lru_cache(maxsize=1)
def admitted(part: str, provider: str, shape: str, dtype: str) -> tuple[Provider, Inputs]:
    """A provider that has passed the gate; ``segmoe`` runs the kernels, wherever it is."""
    (workload,) = find_workloads(shape)
    layer, inputs = make_case(
        workload, part=part, routing="uniform", dtype=DTYPES[dtype], device=DEVICE
    )
    layer.backend = "triton"
    made = PROVIDERS[provider](layer, DEVICE)
    Gate(layer, inputs).check(made)
    return made, inputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("passed", PASSES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("part", PARTS)
def test_layer(
    timed: Callable[..., None],
    dtype: str,
    shape: str,
    part: str,
    provider: str,
    passed: str,
    mode: str,
) -> None:
    """The routed part or the whole layer, forward or forward + backward."""
    if "compile" in provider and DEVICE.type == "cpu":
        pytest.skip("compilation takes longer than the rest")
    try:
        made, inputs = admitted(part, provider, shape, dtype)
    except SkippedError as error:
        pytest.skip(str(error))
    if mode == "graph" and made.waits:
        pytest.skip(made.waits)
    (workload,), backward = find_workloads(shape), passed != "forward"
    work = layer_work(workload, part, backward=backward, itemsize=DTYPES[dtype].itemsize)
    modelled = {}
    if part == "routed":
        modelled = modelled_us(shape, provider, dtype, backward=backward, mode=mode)
    group = f"layer {part} {passed} {shape} {dtype} {mode}"
    timed(calls(made, inputs, passed), mode, group, **work, **modelled)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
