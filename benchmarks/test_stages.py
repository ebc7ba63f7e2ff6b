"""Microbenchmarks of every stage, each in a group with what does the same: see `conftest`."""

import functools
from collections.abc import Callable

import pytest

from benchmarks.cases import DTYPES
from benchmarks.conftest import DEVICE, MODES
from benchmarks.peers import SkippedError
from benchmarks.runner import PASSES
from benchmarks.shapes import find_workloads
from benchmarks.stages import STAGES, Stage, check, make_stage
from benchmarks.work import modelled_us, stage_work

CASES = [
    (stage, provider, passed)
    for stage, providers in STAGES.items()
    for provider in providers
    for passed in (PASSES[:1] if stage == "permute" else PASSES)
]


@functools.lru_cache(maxsize=1)
def admitted(stage: str, provider: str, shape: str, dtype: str) -> Stage:
    """A stage that has passed the gate."""
    made = make_stage(stage, provider, find_workloads(shape)[0], DTYPES[dtype], DEVICE)
    check(made)
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("stage", "provider", "passed"), CASES)
def test_stage(
    timed: Callable[..., None],
    dtype: str,
    shape: str,
    stage: str,
    provider: str,
    passed: str,
    mode: str,
) -> None:
    """One stage, forward or forward + backward."""
    if provider == "compile" and DEVICE.type == "cpu":
        pytest.skip("compilation takes longer than the rest")
    try:
        made = admitted(stage, provider, shape, dtype)
    except SkippedError as error:
        pytest.skip(str(error))
    workload, backward = find_workloads(shape)[0], passed != "forward"
    work = stage_work(workload, stage, backward=backward, itemsize=DTYPES[dtype].itemsize)
    modelled = modelled_us(shape, provider, dtype, stage=stage, backward=backward, mode=mode)
    function = made.call(made.dy() if backward else None)
    timed(function, mode, f"{stage} {passed} {shape} {dtype} {mode}", **work, **modelled)
