"""Launches of layers on `benchmarks.host`'s stub, prepared ones beside Triton's own.

Run by test_host.py in a process of its own; it prints one line of JSON.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.host import stub

stub.install()
os.environ["SEGMOE_REPLAY"] = "0"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from segmoe_kernels import SegMoE  # noqa: E402
from segmoe_kernels._triton.prepared import Kernel  # noqa: E402

OPTIONS = {
    "plain": {"shared_expert": None},
    "shared": {"shared_expert": "segment"},
    "extras": {"gated": True, "bias": True, "dropout": 0.1, "router_dropout": 0.1, "top_k": 2},
    "causal": {"causal": True, "shared_expert": "token", "pooling": "mean"},
    "wide": {"d_model": 272, "shared_expert": None},
}


def described(value):
    if isinstance(value, Tensor):
        aligned = value.data_ptr() % 16 == 0
        return str(value.dtype), tuple(value.shape), value.stride(), aligned
    return tuple(map(described, value)) if isinstance(value, tuple) else value


LAUNCHES = []


def watch():
    """Keep what reaches Triton's C launcher, and through which compiled kernel, in LAUNCHES."""
    # Launchers take the function with them when they are made, hence before any.
    utils = driver.active.utils
    own_launch, own_run = utils.launch, Kernel.run

    def launch(*given):
        LAUNCHES.append([given[:3], given[7], bytes(given[-2]), given[-1]])
        return own_launch(*given)

    def run(kernel, *args, **kwargs):
        compiled = own_run(kernel, *args, **kwargs)
        *rest, values = LAUNCHES.pop()
        # Behind these are constants, which the launcher skips.
        arguments = described(values[: kernel.num_arguments])
        LAUNCHES.append([compiled.hash, *rest, arguments])
        return compiled

    utils.launch, Kernel.run = launch, run


def kernels():
    from segmoe_kernels import stages  # noqa: F401

    modules = [m for name, m in sys.modules.items() if name.startswith("segmoe_kernels")]
    found = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, Kernel)}
    return list(found.values())


def step(layer, x, mask):
    x = x.detach().requires_grad_()
    layer(x, mask).sum().backward()


def launches_of(layer, x, mask):
    LAUNCHES.clear()
    step(layer, x, mask)
    return list(LAUNCHES)


def compare():
    """Every launch of the first call, of a prepared one, and with nothing prepared, is the same."""
    count = 0
    for (name, options), masked in itertools.product(OPTIONS.items(), (False, True)):
        sizes = {"d_model": 16, "d_ff": 32, "num_experts": 4, "segment_size": 5}
        layer = SegMoE(**sizes | options, backend="triton")
        shape = (2, 13, layer.d_model)
        # With an offset of one element pointers are aligned less.
        offset = int(masked)
        x = torch.randn(offset + 2 * 13 * layer.d_model)[offset:].view(shape)
        mask = torch.rand(shape[:2]) < 0.7 if masked else None
        first = launches_of(layer, x, mask)
        second = launches_of(layer, x, mask)
        with mock.patch.object(Kernel, "_key", return_value=None):
            own = launches_of(layer, x, mask)
        assert first == second == own, (name, masked)
        assert len(own) > 5
        count += len(own)
    return count


def compiled_kernels():
    return sum(len(cache[0]) for k in kernels() for cache in k.device_caches.values())


def lengths():
    """Lengths that change: nothing is compiled anew, nothing grows."""
    layer = SegMoE(16, 32, 4, segment_size=5, backend="triton")
    for length in (*range(1, 36), 16 * 5 * 7):
        step(layer, torch.randn(2, length, 16), None)
    compiled, prepared = compiled_kernels(), [len(k.prepared) for k in kernels()]
    assert sum(prepared) > 10
    for length in range(1, 2000, 13):
        step(layer, torch.randn(2, length, 16), None)
    assert compiled_kernels() == compiled
    grown = [len(k.prepared) for k in kernels()]
    assert grown == prepared, (prepared, grown)


def fallbacks():
    """Whoever watches Triton's own path sees every launch."""
    from triton import knobs

    layer, x = SegMoE(16, 32, 4, segment_size=5, backend="triton"), torch.randn(2, 10, 16)
    number = len(launches_of(layer, x, None))
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    step(layer, x, None)
    knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == number, (len(seen), number)
    run = JITFunction.run
    with mock.patch.object(JITFunction, "run", lambda *a, **k: seen.append(a) or run(*a, **k)):
        step(layer, x, None)
    assert len(seen) == 2 * number
    step(layer, x, None)
    assert len(seen) == 2 * number


if __name__ == "__main__":
    watch()
    COUNT = compare()
    lengths()
    fallbacks()
    sys.stdout.write(json.dumps({"launches": COUNT}))
