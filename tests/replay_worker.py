"""Launches of layers on `benchmarks.host`'s stub: those that are played back beside ordinary ones.

Run by test_host.py in a process of its own; it prints one line of JSON. With "--all" also in dtypes
whose kernels take a minute to compile.
"""

import gc
import itertools
import json
import sys
import threading
import weakref
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import tune
from benchmarks.host import stub

stub.install()

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from segmoe_kernels import SegMoE, functional, options  # noqa: E402
from segmoe_kernels._triton import kernels, tape  # noqa: E402
from segmoe_kernels._triton import tiles as tile_table  # noqa: E402

SIZES = {"d_model": 16, "d_ff": 32, "num_experts": 4, "segment_size": 5}
# Options of layers, and of their calls: masked, expanded upstream gradient, a leaf with other
# strides, frozen parameters by their names.
CASES = {
    "plain": ({"shared_expert": None}, {}),
    "whole sum": ({"shared_expert": None}, {"expanded": True}),
    "shared": ({}, {"masked": True}),
    "extras": (
        {"gated": True, "bias": True, "dropout": 0.1, "router_dropout": 0.1, "top_k": 2},
        {"masked": True, "expanded": True},
    ),
    "causal": ({"causal": True, "shared_expert": None, "pooling": "mean", "top_k": 2}, {}),
    "segment": ({"expert_scope": "segment", "gated": True, "shared_expert": None}, {}),
    "losses": ({"aux_loss_weight": 0.1, "z_loss_weight": 0.1, "shared_expert": None}, {}),
    "strided": ({"shared_expert": None}, {"strided": True}),
    "frozen": ({}, {"frozen": "experts"}),
    "weights alone": ({}, {"leaf": False}),
}
# With "--all", for they take long to compile.
MORE = {
    "masked": ({"shared_expert": None}, {"masked": True}),
    "two": ({"top_k": 2}, {"expanded": True}),
    "causal, shared": ({"causal": True, "shared_expert": "token", "pooling": "mean"}, {}),
    "projected": ({"expert_scope": "projected", "bias": True}, {"masked": True}),
    "token-wise": ({"segment_size": 1, "shared_expert": None, "top_k": 2}, {}),
    "wide": ({"d_model": 272, "gated": True, "shared_expert": None}, {}),
    "products": ({"d_model": 160, "bias": True}, {"frozen": "router"}),
}
# Of some then also in other dtypes; 13 steps end in a segment that is not full.
DTYPES = {"plain": (torch.float32, torch.float64), "extras": (torch.float32,)}
LENGTHS = {"plain": (10,), "shared": (10,)}
LAUNCHES, KEPT = [], []


def watch():
    """Keep what reaches Triton's launcher in LAUNCHES."""
    own = CudaLauncher.__call__

    def call(self, *given):
        # Behind the metadata come three hooks.
        LAUNCHES.append([given[:3], given[3], given[4], given[5], given[9:]])
        return own(self, *given)

    CudaLauncher.__call__ = call


class Nothing(TorchDispatchMode):
    """Hears all operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


def tapes():
    found = [t for known in tape.TAPES for t in known.values()]
    return [t for t in found if isinstance(t, tape.Tape)]


def make(options, calls, dtype, length):
    layer = SegMoE(**SIZES | options, backend="triton", dtype=dtype)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith(calls.get("frozen", "-")))
    x = torch.randn(2, layer.d_model, length, dtype=dtype).mT
    x = x if calls.get("strided") else x.contiguous()
    mask = torch.rand(2, length) < 0.7 if calls.get("masked") else None
    return layer, x.requires_grad_(calls.get("leaf", True)), mask, torch.randn_like(x)


def run(layer, x, mask, dy, *, expanded=False, **_):
    """One forward and backward. Returns (launches, results, what they are given)."""
    LAUNCHES.clear()
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    y = layer(x, mask)
    up = dy[:1, :1, :1].expand_as(y) if expanded else dy
    grads = torch.autograd.grad(y, wanted, up, allow_unused=True)
    with torch.no_grad():
        alone = layer(x, mask)
    given = [t for t in (x, mask, dy, *layer.parameters()) if t is not None]
    return list(LAUNCHES), [y, *grads, alone], given


def leaves(value):
    """Arguments that a kernel gets, one behind the other."""
    if isinstance(value, tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return [] if value is None else [value]


def assert_alike(ordinary, played, given):
    """The same kernels, grids and numbers, the same inputs; room of its own for all else."""
    inputs = {t.untyped_storage().data_ptr() for t in given}
    assert len(ordinary) == len(played)
    places, ends = {}, {}
    for (*one, args), (*other, pointers) in zip(ordinary, played, strict=True):
        assert one == other
        # Behind the others are constants, which the launcher skips.
        pairs = [
            pair
            for value, pointer in zip(args, pointers, strict=True)
            if pointer is not None or any(isinstance(leaf, Tensor) for leaf in leaves((value,)))
            for pair in zip(leaves((value,)), leaves((pointer,)), strict=True)
        ]
        for value, pointer in pairs:
            if not isinstance(value, Tensor):
                assert type(value) is type(pointer)
                assert value == pointer
                continue
            assert type(pointer) is int
            storage, size = value.untyped_storage(), value.numel() * value.itemsize
            if storage.data_ptr() in inputs:
                assert pointer == value.data_ptr()
            elif size:
                assert pointer % 16 == value.data_ptr() % 16
                start = pointer - (value.data_ptr() - storage.data_ptr())
                assert places.setdefault(storage.data_ptr(), start) == start
                ends[start] = start + storage.nbytes()
    for (_, end), (start, _) in itertools.pairwise(sorted(ends.items())):
        assert end <= start


def described(results):
    return [None if t is None else (t.shape, t.stride(), t.dtype, t.requires_grad) for t in results]


def keep(played):
    """Let nothing that a tape allocates be freed, so that each address has one owner."""

    def keeping(step):
        def run_step(held, values, stream):
            step(held, values, stream)
            KEPT.append(list(held))

        return run_step

    played.steps = [keeping(step) for step in played.steps]


def compare():
    """A call with everything played back launches what an ordinary one does."""
    count = 0
    own_empty = torch.empty_strided

    def empty(*args, **kwargs):
        KEPT.append(own_empty(*args, **kwargs))
        return KEPT[-1]

    everything = "--all" in sys.argv
    cases = CASES | MORE if everything else CASES
    runs = [
        (name, dtype, length)
        for name in cases
        for dtype in (torch.bfloat16, *(DTYPES.get(name, ()) if everything else ()))
        for length in (13, *LENGTHS.get(name, ()))
    ]
    for name, dtype, length in runs:
        options, calls = cases[name]
        made = make(options, calls, dtype, length)
        ordinary, results, given = run(*made, **calls)
        recorded, *_ = run(*made, **calls)
        assert [launch[:-1] for launch in ordinary] == [launch[:-1] for launch in recorded]
        found = tapes()
        assert found, name
        for played in found:
            keep(played)
        forbidden = mock.patch.object(kernels.Kernel, "run", side_effect=AssertionError(name))
        with forbidden, mock.patch.object(torch, "empty_strided", empty):
            played, others, _ = run(*made, **calls)
        assert_alike(ordinary, played, given)
        assert described(results) == described(others)
        KEPT.clear()
        assert all(False not in known.values() for known in tape.TAPES), name
        tape.forget()
        count += len(played)
    return count


def is_played(made):
    """Whether a third call and those after it go past `Kernel.run`."""
    for _ in range(2):
        run(*made)
    with mock.patch.object(kernels.Kernel, "run", side_effect=RuntimeError):
        try:
            run(*made)
        except RuntimeError:
            return False
    return True


def compiled_kernels():
    modules = [m for name, m in sys.modules.items() if name.startswith("segmoe_kernels")]
    found = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, kernels.Kernel)}
    return sum(len(cache[0]) for k in found.values() for cache in k.device_caches.values())


def lengths():
    """Lengths that change: nothing is compiled anew, nothing grows."""
    layer = SegMoE(**SIZES, shared_expert=None, backend="triton", dtype=torch.bfloat16)

    def step(length):
        x = torch.randn(2, length, 16, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()

    for length in (*range(1, 36), 16 * 5 * 7):
        step(length)
    compiled = compiled_kernels()
    for length in range(1, 1 + tape._MOST_TAPES):
        step(length)
    with torch.no_grad():
        for length in range(1, 2001):
            layer(torch.randn(2, length, 16, dtype=torch.bfloat16))
    assert compiled_kernels() == compiled
    sizes = [len(known) for known in tape.TAPES]
    assert max(sizes) > 100, sizes
    assert max(sizes) <= tape._MOST_TAPES, sizes
    with mock.patch.object(tape, "_MOST_TAPES", 4):
        for length in [*range(1, 20)] * 2:
            step(length)
        assert all(len(known) <= 4 for known in tape.TAPES)


def fallbacks():
    """Whoever listens or watches has the ordinary way, and so have pointers less aligned."""
    made = layer, x, mask, dy = make({"shared_expert": None}, {}, torch.bfloat16, 10)
    assert is_played(made)
    number = len(run(*made)[0])
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    run(*made)
    knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == number, (len(seen), number)
    own = JITFunction.run
    with mock.patch.object(JITFunction, "run", lambda *a, **k: seen.append(a) or own(*a, **k)):
        run(*made)
    assert len(seen) == 2 * number
    for listener in (Nothing(), torch.profiler.profile()):
        with listener:
            assert not is_played(made)
    with mock.patch.object(options, "_NOW", options.settings()._replace(replay=False)):
        assert not is_played(made)
    assert is_played(made)
    less = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x.detach()).requires_grad_()
    assert not is_played((layer, less, mask, dy))
    # Two gradients that are one tensor aren't taken for one later.
    assert is_played(made)
    gradient = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(gradient[0].sum(), x)


def autocast():
    """Products of a backward inside autocast are those that were written down outside."""
    layer, x, mask, dy = made = make({}, {}, torch.bfloat16, 10)
    wanted = [x, *layer.parameters()]
    assert is_played(made)
    for played in tapes():
        keep(played)
    y = layer(x, mask)
    KEPT.clear()
    with torch.autocast("cpu", torch.float16):
        grads = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    dtypes = {t.dtype for held in KEPT for t in held if isinstance(t, Tensor)}
    assert torch.bfloat16 in dtypes
    assert torch.float16 not in dtypes
    assert {d.dtype for d in grads if d is not None} == {torch.bfloat16}
    KEPT.clear()
    tape.forget()


def tiles():
    """A search's tiles are launched, though others were written down."""
    x = make({}, {}, torch.bfloat16, 10)
    assert is_played(x)
    name = "expert_ffn_fwd_tile"
    chosen = getattr(tile_table, name)

    def other(*args, **kwargs):
        return chosen(*args, **kwargs)._replace(num_warps=2)

    def launched():
        return [launch[:-1] for launch in run(*x)[0]]

    before = launched()
    with tune.overridden(name, other):
        assert launched() != before
    assert launched() == before


def nothing_is_kept():
    """Tapes hold on to no tensor of the calls that they were recorded from."""
    made = layer, x, mask, dy = make({}, {}, torch.bfloat16, 10)
    assert is_played(made)
    kept = [weakref.ref(tensor) for tensor in (x, dy, *layer.parameters())]
    LAUNCHES.clear()
    del made, layer, x, mask, dy
    gc.collect()
    assert tapes()
    assert not any(reference() is not None for reference in kept)


def operators():
    """Those that compiled code calls, and the stages alone, are played back as well."""
    x, weight = torch.randn(2, 10, 16), torch.randn(4, 80)
    options = {"segment_size": 5, "top_k": 1, "backend": "triton"}
    arguments = (x, weight, None, None, None, 5, 1, "concat", 1.0, 0.0, False)
    for call in (
        lambda: functional.route(x, weight, **options),
        lambda: torch.ops.segmoe_kernels.route_fwd(*arguments),
    ):
        tape.forget()
        for _ in range(2):
            call()
        with mock.patch.object(kernels.Kernel, "run", side_effect=AssertionError):
            call()


def streams_and_threads():
    """All launches go to the current stream, as under a CUDA graph's capture, in any thread."""
    made = make({}, {}, torch.bfloat16, 10)
    assert is_played(made)
    with mock.patch.object(driver.active, "get_current_stream", return_value=77):
        launches, *_ = run(*made)
    assert {launch[1] for launch in launches} == {77}
    expected, found = described(run(*made)[1]), []

    def work():
        for _ in range(20):
            found.append(described(run(*made)[1]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 80


if __name__ == "__main__":
    watch()
    COUNT = compare()
    gc.collect()
    lengths()
    fallbacks()
    autocast()
    tiles()
    operators()
    nothing_is_kept()
    streams_and_threads()
    sys.stdout.write(json.dumps({"launches": COUNT}))
