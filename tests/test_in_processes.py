"""The layer in processes, threads and streams, for long, and in training that a signal ends."""

import contextlib
import functools
import gc
import importlib
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETER
from layers import D, assert_same_bits, both_backends, make_layer, needs_triton, place, train_once
from programs import ROOT, run_python
from test_in_programs import differentiate, make

from segmoe_kernels import SegMoE
from segmoe_kernels.testing import make_inputs

WORKER = Path(__file__).with_name("in_programs_worker.py")


def run_worker(*arguments):
    """Start the worker script in a process of its own, one thread, no CUDA."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **hidden},
        cwd=ROOT,
        start_new_session=True,
    )


def finish(process, seconds=240):
    """Wait for a worker and all that it started; return its exit status and output."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, out, err


CHILD_BACKENDS = ("reference", "triton") if INTERPRETER else ("reference",)


@pytest.fixture(scope="module")
def digests():
    """What each kind of child computes."""
    status, out, err = finish(run_worker("processes", *CHILD_BACKENDS))
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize("backend", CHILD_BACKENDS)
@pytest.mark.parametrize(("child", "count"), [("fork", 1), ("spawn", 1), ("loader", 2)])
def test_child_process_gives_the_bits_of_its_parent(child, count, backend, digests):
    assert digests[backend][child] == digests[backend]["parent"] * count


def in_threads(layer, batches, repeats):
    """Each thread trains on a batch of its own, all at the same time; results by batch."""
    start = threading.Barrier(len(batches))

    def work(batch):
        start.wait()
        return [differentiate(layer, *batch) for _ in range(repeats)]

    with ThreadPoolExecutor(len(batches)) as pool:
        return list(pool.map(work, batches))


def make_batches(device, d_model=16):
    """Batches of four sizes, one masked: what threads or streams shared would not fit."""
    return [
        make_inputs(2 + i, 40 + 9 * i, d_model, seed=i, masked=0.2 * (i == 3), device=device)
        for i in range(4)
    ]


THREADED = {"token": {}, "segment": {"expert_scope": "segment"}, "gated": {"gated": True}}


def make_threaded(name, backend, device):
    return SegMoE(
        16, 24, 4, top_k=2, segment_size=5, aux_loss_weight=0.1, backend=backend, device=device,
        **THREADED[name],
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", THREADED)
def test_four_threads_equal_one(name, backend):
    """The interpreter keeps its state in module globals: kernels need real launches."""
    layer = make_threaded(name, backend, place(backend))
    batches = make_batches(place(backend))
    expected = [differentiate(layer, *batch) for batch in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads alternate within a call, not only between calls
    try:
        found = in_threads(layer, batches, repeats=12)
    finally:
        sys.setswitchinterval(interval)
    for results, reference in zip(found, expected, strict=True):
        for result in results:
            assert_same_bits(result, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("name", THREADED)
def test_four_streams_equal_one(name):
    layer = make_threaded(name, "triton", "cuda")
    batches = make_batches("cuda")
    expected = [differentiate(layer, *batch) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    found = []
    for _ in range(25):
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(differentiate(layer, *batch))
    torch.cuda.synchronize()
    for result, reference in zip(found, itertools.cycle(expected)):
        assert_same_bits(result, reference)


@pytest.mark.gpu
@needs_triton
def test_kernels_run_on_the_current_stream():
    """What a busy stream has yet to write is waited for; nothing runs on the default stream."""
    layer = make_threaded("token", "triton", "cuda")
    batch = make_batches("cuda")[0]
    expected = differentiate(layer, *batch)
    late = torch.zeros_like(batch.x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(batch.x)
        found = differentiate(layer, late, batch.dy)
    stream.synchronize()
    assert_same_bits(found, expected)


class Guard:
    """Stands in for the device guard and knows how deep it is entered."""

    def __init__(self):
        self.depth, self.devices = 0, set()

    @contextlib.contextmanager
    def enter(self, x):  # noqa: D102
        self.devices.add(x.device)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


@pytest.mark.interpreter
def test_kernels_are_launched_and_tiles_chosen_under_the_guard(monkeypatch):
    """Triton launches on the current GPU and tiles are those of the current GPU's kind."""
    from triton.runtime import interpreter

    from segmoe_kernels import stages  # noqa: F401  all operators are there
    from segmoe_kernels._triton import launch, tile_table

    guard, seen = Guard(), {"launch": [], "tile": []}
    monkeypatch.setattr(launch, "device_guard", guard.enter)
    execute, architecture = interpreter.GridExecutor.__call__, tile_table.architecture

    def spying_execute(self, *args, **kwargs):
        seen["launch"].append((self.fn.__name__, guard.depth))
        return execute(self, *args, **kwargs)

    def spying_architecture():
        seen["tile"].append(("architecture", guard.depth))
        return architecture()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", spying_execute)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("segmoe_kernels."):
            for key, value in list(vars(module).items()):
                if value is architecture:
                    monkeypatch.setattr(module, key, spying_architecture)
    for name in ("default", "segment", "projected"):
        layer, (x, dy, _) = make(name, "triton", aux_loss_weight=0.1)
        train_once(layer, x, dy)
    assert len(seen["launch"]) > 5
    assert seen["tile"]
    outside = {what for calls in seen.values() for what, depth in calls if depth == 0}
    assert not outside
    assert guard.devices == {torch.device("cpu")}


@needs_triton
def test_guard_makes_the_tensors_gpu_current(monkeypatch):
    from segmoe_kernels._triton.launch import device_guard

    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: entered.append(x) or "guard")
    on_gpu = types.SimpleNamespace(is_cuda=True)
    assert device_guard(on_gpu) == "guard"
    assert entered == [on_gpu]
    with device_guard(torch.zeros(1)):
        assert len(entered) == 1


UNTOUCHED = """
import sys, torch
def refuse(name):
    def call(*args, **kwargs):
        raise AssertionError(f"torch.cuda.{name} was called")
    return call
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init",
             "get_device_capability", "get_device_properties", "current_stream"):
    setattr(torch.cuda, name, refuse(name))
import importlib, pkgutil, segmoe_kernels
for module in pkgutil.walk_packages(segmoe_kernels.__path__, "segmoe_kernels."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert "segmoe_kernels.stages.route" in sys.modules
"""


@needs_triton
def test_importing_every_module_asks_cuda_nothing():
    """A program may fork, or choose its GPU, after it has imported us."""
    run_python("-c", UNTOUCHED, without=())


# --- A long life -------------------------------------------------------------------------------


def module_state():
    """The size of every container and cache that the package keeps in its modules."""
    sizes = {}
    modules = {name: m for name, m in sys.modules.items() if name.startswith("segmoe_kernels.")}
    for module_name, module in modules.items():
        for key, value in vars(module).items():
            if key.startswith("__"):
                continue
            if isinstance(value, list | dict | set | bytearray):
                sizes[module_name, key] = len(value)
            elif isinstance(value, functools._lru_cache_wrapper):
                sizes[module_name, key] = value.cache_info().currsize
            elif isinstance(value, torch.Tensor):
                sizes[module_name, key] = value._version
            for name, held in vars(value).items() if inspect.isclass(value) else ():
                if isinstance(held, list | dict | set) and not name.startswith("__"):
                    sizes[module_name, key, name] = len(held)
    return sizes


@both_backends
def test_modules_keep_nothing_of_the_shapes_they_have_seen(backend):
    def work(length):
        layer, _ = make("default", backend, aux_loss_weight=0.1)
        train_once(layer, *make_inputs(1, length, D, device=place(backend))[:2])
        layer, _ = make("segment", backend)
        train_once(layer, *make_inputs(2, length, D, device=place(backend))[:2])

    work(3)
    before = module_state()
    assert any(key[1] == "_WARNED" for key in before)
    # Lengths that no other test has shown to this process.
    for length in (31, 47) if backend == "reference" else (32, 48):
        work(length)
    assert module_state() == before


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_training_steps_keep_no_memory():
    """Counts are taken without the collector's help: no step leaves a cycle for it either."""
    layer = make_layer(d_model=32, d_ff=32, top_k=2, shared_expert=None, aux_loss_weight=0.1)
    x = torch.randn(4, 64, 32, requires_grad=True)  # 32 KiB: a tensor kept by each step shows
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def steps(count):
        for _ in range(count):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            x.grad = None

    count = 1000
    steps(100)
    gc.collect()
    gc.disable()
    try:
        objects, resident = len(gc.get_objects()), resident_bytes()
        steps(count)
        more_objects = len(gc.get_objects()) - objects
        more_bytes = resident_bytes() - resident
    finally:
        gc.enable()
    assert more_objects < count / 4
    assert more_bytes < count * x.nbytes / 4


@pytest.mark.interpreter
def test_training_steps_on_the_kernels_keep_no_object():
    """The interpreter itself makes cycles: counts are taken behind the collector."""
    layer = make_layer(d_model=4, num_experts=2, segment_size=2, shared_expert=None,
                       aux_loss_weight=0.1, backend="triton")  # fmt: skip
    x = torch.randn(1, 4, 4, requires_grad=True)

    def steps(count):
        for _ in range(count):
            layer.zero_grad()
            x.grad = None
            layer(x).sum().backward()
        gc.collect()
        alive = gc.get_objects()
        return len(alive), sum(issubclass(type(one), torch.Tensor) for one in alive)

    objects, tensors = steps(3)
    count = 12
    more_objects, more_tensors = steps(count)
    assert more_tensors <= tensors
    assert more_objects - objects < count / 2


# --- Interruption and resumption ---------------------------------------------------------------

TINY = [
    *("--data", "multiscale", "--look-back", "64", "--horizon", "8", "--d-model", "8"),
    *("--d-ff", "8", "--num-layers", "1", "--segment-sizes", "3", "--epochs", "3"),
    *("--train-fraction", "0.01", "--batch-size", "16", "--threads", "1", "--quiet", "--no-plots"),
]


@pytest.fixture(scope="module")
def example():
    return importlib.import_module("examples.train_forecaster")


def outcome(out):
    """All that a finished run found, but for times."""
    (run,) = json.loads((out / "result.json").read_text())["runs"]
    timeless = [
        {key: value for key, value in epoch.items() if not key.endswith("_s")}
        for epoch in run["history"]
    ]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    return (timeless, run["validation"], run["test"], run["best_epoch"]), state


@pytest.fixture(scope="module")
def uninterrupted(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert example.main([*TINY, "--out", str(out)]) == 0
    return outcome(out)


def interrupt(stop, number, out):
    """Start the example, send it a signal where it stops; exit status and what it said."""
    flag = out / "stopped"
    process = run_worker("train", stop, flag, *TINY, "--out", out)
    deadline = time.monotonic() + 120
    while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is None:
        os.kill(process.pid, number)
    status, _, err = finish(process, 60)
    assert flag.exists(), err
    return status, err


@pytest.mark.parametrize(
    ("stop", "number"),
    [("step", signal.SIGKILL), ("step", signal.SIGINT), ("save", signal.SIGKILL)],
    ids=["killed_in_an_epoch", "ctrl_c_in_an_epoch", "killed_while_writing"],
)
def test_training_goes_on_after_a_signal_as_if_there_had_been_none(
    stop, number, example, uninterrupted, tmp_path, capsys
):
    status, said = interrupt(stop, number, tmp_path)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 130
        assert re.search(r"interrupted; the same command with --resume goes on\n\Z", said)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)  # whole, of the first epoch
    assert len(state["history"]) == 1
    assert not (tmp_path / "result.json").exists()
    assert example.main([*TINY, "--out", str(tmp_path), "--resume"]) == 0
    assert "going on after epoch 1" in capsys.readouterr().out
    found, expected = outcome(tmp_path), uninterrupted
    assert found[0] == expected[0]
    for part in ("model", "best_state"):
        assert_same_bits(found[1][part], expected[1][part])
    assert torch.equal(found[1]["torch_rng"], expected[1]["torch_rng"])
    leftover = [path.name for path in tmp_path.glob(".checkpoint.pt.*")]
    # A killed process can't tidy up; one that was asked to end does.
    assert len(leftover) == (stop == "save")
