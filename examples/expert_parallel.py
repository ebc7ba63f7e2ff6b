"""Experts spread over processes, trained together.

    torchrun --nproc-per-node 2 examples/expert_parallel.py --steps 20

GPUs with NCCL where there are enough, else CPUs with gloo. Every rank draws its own sequences of
one synthetic signal; the router, the shared expert and the head are averaged by
`DistributedDataParallel`, the experts live on one rank each. Prints the loss, and how many
segments each rank's experts got.
"""

import argparse
import gc
import math
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the group is: its default arguments keep the group there is
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segmoe_kernels import SegMoE, collect_routings, load_balancing_loss, shard_experts
from segmoe_kernels.parallel import expert_parameter_names

LOOK_BACK, HORIZON, D_MODEL = 96, 24, 32


class Forecaster(nn.Module):
    """A linear map of each step, two layers of segment-wise experts, a linear head."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.embed = nn.Linear(1, D_MODEL)
        layers = (SegMoE(D_MODEL, 64, num_experts, top_k=2, segment_size=size) for size in (4, 8))
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(D_MODEL) for _ in self.layers)
        self.head = nn.Linear(LOOK_BACK * D_MODEL, HORIZON)

    def forward(self, series: Tensor) -> Tensor:
        """(B, LOOK_BACK) to (B, HORIZON)."""
        x = self.embed(series[..., None])
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        out: Tensor = self.head(x.flatten(1))
        return out


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of a daily and a weekly wave with noise, cut into past and future."""
    start = torch.randint(10_000, (batch, 1), generator=generator)
    time = start + torch.arange(LOOK_BACK + HORIZON)
    clean = torch.sin(2 * math.pi * time / 24) * (1 + 0.5 * torch.sin(2 * math.pi * time / 168))
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
    return noisy[:, :LOOK_BACK], noisy[:, LOOK_BACK:]


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train, and print from the first rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Forecaster(options.num_experts).to(device)
    for i, layer in enumerate(model.layers):
        model.layers[i] = shard_experts(layer, average_gradients=True)
    names = expert_parameter_names(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1 + rank)
    for step in range(1, options.steps + 1):
        past, future = (part.to(device) for part in draw(options.batch_size, generator))
        with collect_routings(model) as routings:
            loss = F.mse_loss(wrapped(past), future)
        optimizer.zero_grad()
        (loss + 0.02 * load_balancing_loss(routings)).backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and (step == 1 or step % 5 == 0 or step == options.steps):
            print(f"step {step:4}  loss {mean.item() / world:.4f}", flush=True)

    with torch.no_grad():
        x = model.embed(draw(options.batch_size, generator)[0].to(device)[..., None])
        counts = model.layers[0].forward_with_routing(x)[1].expert_counts
    dist.all_reduce(counts)
    blocks = [torch.zeros((), dtype=torch.long, device=device) for _ in range(world)]
    own = torch.tensor(model.layers[0].experts.num_experts, device=device)
    dist.all_gather(blocks, own)
    if rank == 0:
        loads = counts.split([int(block) for block in blocks])
        text = ", ".join(f"rank {r}: {part.tolist()}" for r, part in enumerate(loads))
        print(f"segments by expert in the first layer: {text}", flush=True)


def main() -> None:
    """Start the processes' group, train, end it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of each rank")
    parser.add_argument("--num-experts", type=int, default=8)
    options = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(
        os.environ.get("LOCAL_WORLD_SIZE", "1")
    )
    dist.init_process_group("nccl" if on_gpus else "gloo")
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_world_size()))
    train(options, device)
    # A group ends with its last reference, and a module with hooks is a cycle. Its threads must
    # not outlive the interpreter, which their last work's tensors need.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
