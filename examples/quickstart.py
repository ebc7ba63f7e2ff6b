"""The layer in ten lines, on a CPU: in place of an FFN, segments of time steps choose experts."""

import torch

from segmoe_kernels import SegMoE

layer = SegMoE(64, 128, num_experts=4, segment_size=5, aux_loss_weight=0.02)
x = torch.randn(8, 64, 64)  # 8 sequences of 64 steps, 64 wide
y = layer(x)  # the same shape, a tensor and nothing else
y.square().mean().backward()  # carries the gradient of the load-balancing loss, too
_, routing = layer.forward_with_routing(x)
print(f"{tuple(x.shape)} -> {tuple(y.shape)}, load-balancing loss {layer.aux_loss:.4f}")
print(f"first segments go to experts {routing.topk_ids[:13, 0].tolist()}")
print(f"segments per expert: {routing.expert_counts.tolist()}")
