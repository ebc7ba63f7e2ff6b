"""Memory of the layer beside its peers: what is kept for the backward, and the peak.

    python -m benchmarks.memory [--shapes headline] [--parts routed,whole]

* ``saved_mib``: tensors that the forward hands to autograd, each storage once, without x and the
  parameters, which live anyway; counted by hooks, on any device;
* ``saved_bytes_per_step``: the same for each of the ``B * T`` steps;
* on a GPU also ``retained_mib``, what is allocated after the forward beyond its output and what was
  there before, and ``peak_forward_mib`` and ``peak_mib``, the most that the forward without
  gradients, and forward and backward, add to what was there before.
"""

import sys
from typing import Any

import torch

from benchmarks.cases import PARTS, release_memory
from benchmarks.layer import admit, describe
from benchmarks.peers import PROVIDERS, Provider
from benchmarks.runner import Configuration, Emit, Options, Suite, run_suite
from segmoe_kernels.testing import Inputs

__all__ = ["SUITE", "saved_bytes"]

MIB = 2**20


def saved_bytes(provider: Provider, inputs: Inputs) -> int:
    """Bytes that one forward saves for its backward, without x and the parameters."""
    x = inputs.x.detach().requires_grad_()
    alive = {t.untyped_storage().data_ptr() for t in (x, *provider.module.parameters())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            # The storage is kept, so that its address is not given to another tensor.
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = provider.call(x)
    size = sum(storage.nbytes() for storage in saved.values())
    del y
    return size


def _on_gpu(provider: Provider, inputs: Inputs) -> dict[str, float]:
    """Allocator's figures of one forward without gradients, and one with and its backward."""
    device = inputs.x.device
    x = inputs.x.detach().requires_grad_()
    wanted = (x, *provider.module.parameters())

    def before() -> int:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)

    def peak_mib(base: int) -> float:
        return (torch.cuda.max_memory_allocated(device) - base) / MIB

    base = before()
    with torch.no_grad():
        y = provider.call(inputs.x)
    found = {"peak_forward_mib": peak_mib(base)}
    del y
    base = before()
    y = provider.call(x)
    size = y.numel() * y.element_size()
    found["retained_mib"] = (torch.cuda.memory_allocated(device) - base - size) / MIB
    gradients = torch.autograd.grad(y, wanted, inputs.dy, allow_unused=True)
    found["peak_mib"] = peak_mib(base)
    del gradients
    return found


def measure(configuration: Configuration, options: Options, emit: Emit) -> None:
    """Measure one configuration."""
    device = torch.device(configuration.device)
    admitted, inputs, _ = admit(configuration, options, emit)
    for provider, verdict in admitted:
        identity = {"provider": provider.name, "pass": "forward+backward", "mode": "eager"}
        try:
            size = saved_bytes(provider, inputs)
            row: dict[str, Any] = {
                "saved_mib": size / MIB,
                "saved_bytes_per_step": size / (inputs.x.shape[0] * inputs.x.shape[1]),
                "x_mib": inputs.x.numel() * inputs.x.element_size() / MIB,
                "error_over_limit": verdict.error_over_limit,
            }
            if device.type == "cuda":
                row |= _on_gpu(provider, inputs)
        except Exception as error:  # a peer may break in any way
            row = {"failed": describe(error)}
        emit({**identity, **row})
        release_memory(device)


def line(row: dict[str, Any]) -> str:
    """Format the numbers of a row."""
    text = f"saved {row['saved_mib']:>10.2f} MiB ({row['saved_bytes_per_step']:.1f} bytes a step)"
    if "peak_mib" in row:
        text += f"  retained {row['retained_mib']:.2f}  peak {row['peak_forward_mib']:.2f} forward"
        text += f", {row['peak_mib']:.2f} MiB with backward"
    return text


SUITE = Suite(
    name="memory",
    parts=PARTS,
    default_parts=PARTS,
    providers=tuple(PROVIDERS),
    passes=("forward+backward",),
    modes=("eager",),
    measure=measure,
    line=line,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    return run_suite(SUITE, __doc__.splitlines()[0], arguments)


if __name__ == "__main__":
    sys.exit(main())
