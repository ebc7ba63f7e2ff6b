"""What the microbenchmarks share: `pytest benchmarks --benchmark-only`, needs pytest-benchmark.

``--shapes`` (see `shapes`), ``--dtype``, ``--rounds``; ``-k`` chooses. ``--benchmark-save NAME``,
then ``--benchmark-compare`` after a change; ``--benchmark-disable`` runs each once, as a
test. Nothing is timed that the `gate` refuses. On a GPU a round waits for the device, behind a
flush of its L2 cache, and mode "graph" replays a CUDA graph. On a CPU the reference and its peers
run; with TRITON_INTERPRET=1 the kernels do too, in time that means nothing.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import runner
from benchmarks.cases import DTYPES
from benchmarks.common import environment
from benchmarks.timing import WARMUP_CALLS, Clock, capture

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
MODES = runner.MODES if DEVICE.type == "cuda" else runner.MODES[:1]
# On a GPU, shapes of which the modelled time is known.
SHAPES = {
    "cuda": "64-4-1-5-1e5,64-4-1-5-1e6,128-8-2-5-1e5,256-8-1-5-1e5",
    "cpu": "official-small-p5",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what is measured, and how often."""
    on_gpu = DEVICE.type == "cuda"
    group = parser.getgroup("segmoe_kernels")
    add = group.addoption
    add("--shapes", default=SHAPES[DEVICE.type], help="as in benchmarks/shapes.py")
    add("--dtype", default="bfloat16" if on_gpu else "float32", choices=tuple(DTYPES))
    add("--rounds", type=int, default=50 if on_gpu else 10, help="timed calls of each")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each shape."""
    metafunc.parametrize("shape", metafunc.config.getoption("--shapes").split(","))


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:  # noqa: ARG001
    """Keep what a measurement depends on in the saved file."""
    machine_info["environment"] = environment()


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> str:
    """Name of the dtype of parameters and inputs."""
    name: str = request.config.getoption("--dtype")
    return name


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Time a function: ``timed(function, mode, group, **extra_info)``."""
    clock = Clock(DEVICE)

    def flush() -> None:
        clock.flush()
        clock.wait()

    def run(function: Callable[[], Any], mode: str, group: str, **extra_info: float) -> None:
        if mode == "graph":
            try:
                function = capture(function)[0]
            except RuntimeError as error:  # it waits for the host
                if request.node.callspec.params["provider"] == "segmoe":
                    raise
                pytest.skip(f"can't be captured: {error}")

        def call() -> None:
            function()
            clock.wait()

        benchmark.group = group
        benchmark.extra_info.update(extra_info)
        rounds = request.config.getoption("--rounds")
        benchmark.pedantic(call, setup=flush, rounds=rounds, warmup_rounds=WARMUP_CALLS)

    return run
