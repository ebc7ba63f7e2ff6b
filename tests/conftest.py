"""Device, backend and memory for all tests.

Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is
imported for the first time; hence the order of this file. Everywhere, memory that PyTorch hands
out is full of NaN (integers: the largest value), so a result that nobody wrote is seen.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch

# Benchmarks and examples are no part of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETER = HAS_TRITON and not GPU
if INTERPRETER:
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # cuBLAS is deterministic only with a workspace of fixed size; read at its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def forget_settings(environ):
    """Take the package's variables away; the folder with real data stays under another name."""
    environ.setdefault("REAL_DATA", environ.get("SEGMOE_DATA", ""))  # for pytest-xdist's workers
    for name in [name for name in environ if name.startswith("SEGMOE_")]:
        del environ[name]


forget_settings(os.environ)
# The tensors are tiny: handing them to a second thread costs more than the work.
torch.set_num_threads(1)

import pytest  # noqa: E402  after the environment is set

import segmoe_kernels  # noqa: E402

if INTERPRETER:
    import interp_bf16
    import interp_releases

    interp_releases.install()
    interp_bf16.install()


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "interpreter: needs Triton's interpreter (program order); skipped on a GPU"
    )


def pytest_collection_modifyitems(items):
    missing = {"gpu": not GPU, "interpreter": not INTERPRETER}
    reasons = {"gpu": "needs a GPU", "interpreter": "needs Triton's interpreter"}
    for item in items:
        for marker, absent in missing.items():
            if absent and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reasons[marker]))


@pytest.fixture
def monkeypatch(monkeypatch):
    """Pytest's own, whose changes of the environment the package sees at once."""

    def and_reload(function):
        def call(*args, **kwargs):
            function(*args, **kwargs)
            segmoe_kernels.reload_settings()

        return call

    for name in ("setenv", "delenv", "undo"):
        setattr(monkeypatch, name, and_reload(getattr(monkeypatch, name)))
    yield monkeypatch
    monkeypatch.undo()


@pytest.fixture
def device():
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def real_data():
    """The folder that SEGMOE_DATA named when the tests were started; else the test is skipped."""
    folder = os.environ["REAL_DATA"]
    if not folder:
        pytest.skip("needs SEGMOE_DATA")
    return Path(folder)


@pytest.fixture
def program_order():
    """The context manager `grid_order.program_order`; tests that ask for it are marked."""
    from grid_order import program_order

    return program_order


@pytest.fixture
def rows_alike(monkeypatch):
    """Products of the interpreter in which every row is summed in one order, wherever it is.

    BLAS may sum the last rows of a block in another order than the first; tensor cores don't.
    """
    import numpy as np

    def matmul(a, b, dtype=None):
        return np.einsum("...mk,...kn->...mn", a.astype(dtype), b.astype(dtype))

    if INTERPRETER:
        monkeypatch.setattr(np, "matmul", matmul)


@pytest.fixture(autouse=True)
def _poisoned():
    """Fill what ``torch.empty`` returns with NaN; refuse operators that aren't deterministic."""
    enabled = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def _seeded():
    """Start every test from the same random numbers."""
    torch.manual_seed(0)
