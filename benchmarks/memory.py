"""Memory of a layer's provider: what is kept for the backward, and the peak; columns of `layer`.

* ``saved_mib``: tensors that the forward hands to autograd, each storage once, without x and the
  parameters, which live anyway; counted by hooks, on any device;
* ``saved_bytes_per_step``: the same for each of the ``B * T`` steps;
* on a GPU also ``retained_mib``, what is allocated after the forward beyond its output and what was
  there before, and ``peak_forward_mib`` and ``peak_mib``, the most that the forward without
  gradients, and forward and backward, add to what was there before.
"""

import torch

from benchmarks.common import on_gpu
from benchmarks.peers import Provider
from segmoe_kernels.testing import Inputs

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


def memory_columns(provider: Provider, inputs: Inputs) -> dict[str, float]:
    """Measure what the module's docstring lists."""
    size = saved_bytes(provider, inputs)
    found = {
        "saved_mib": size / MIB,
        "saved_bytes_per_step": size / (inputs.x.shape[0] * inputs.x.shape[1]),
    }
    return found | (_on_gpu(provider, inputs) if on_gpu(inputs.x.device) else {})
