"""What the layer computes, once more, as loops over sequences, segments, steps and experts.

Written from the layer's definition alone: no line of the package is used but its parameters. Slow
and differentiable, in whatever dtype the parameters have.
"""

import math

import torch

ACTIVATIONS = {
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: (
        0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    ),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "relu": lambda z: z * (z > 0),
}


def affine(weight, bias, v):
    out = weight @ v
    return out if bias is None else out + bias


def ffn(v, p, name, activation, expert=None):
    """One FFN on one vector; ``name`` is its prefix in the parameter table."""

    def linear(which, z):
        if expert is None:
            weight, bias = p[f"{name}.{which}.weight"], p.get(f"{name}.{which}.bias")
        else:
            weight = p[f"{name}.{which}"][expert]
            bias = p.get(f"{name}.{which}_bias")
            bias = None if bias is None else bias[expert]
        return affine(weight, bias, z)

    act = ACTIVATIONS[activation]
    gated = f"{name}.gate_proj" in p or f"{name}.gate_proj.weight" in p
    hidden = (
        act(linear("gate_proj", v)) * linear("up_proj", v) if gated else act(linear("up_proj", v))
    )
    return linear("down_proj", hidden)


def pool(steps, real, pooling):
    """Summary of one segment: P steps (0 where not real) and P flags."""
    if pooling == "concat":
        return torch.cat(steps)
    chosen = [step for step, flag in zip(steps, real, strict=True) if flag]
    if not chosen:
        return torch.zeros_like(steps[0])
    if pooling == "mean":
        return sum(chosen) / len(chosen)
    if pooling == "max":
        return torch.stack(chosen).max(0).values
    return chosen[0] if pooling == "first" else chosen[-1]


def choose(probs, top_k, renormalize):
    """Weights and experts: the largest first, the lower expert among equals."""
    values = probs.tolist()
    ids = sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]
    weights = [probs[e] for e in ids]
    if renormalize or (renormalize is None and top_k > 1):
        total = sum(weights)
        weights = [w / (total if total > 1e-6 else 1e-6) for w in weights]
    return weights, ids


def brute_force(layer, x, mask=None):
    """Run the layer's definition in eval mode.

    Args:
        layer: SegMoE; its parameters and options are read.
        x: (B, T, D).
        mask: (B, T) bool or None.

    Returns:
        ``(y, routing)``; routing is a dict with the fields of Routing.
    """
    p = dict(layer.named_parameters())
    batch, length, d_model = x.shape
    size = layer.segment_size
    zero = torch.zeros(d_model, dtype=x.dtype)
    y = [[zero] * length for _ in range(batch)]
    logits, probs, weights, ids = [], [], [], []
    counts = [0] * layer.num_experts
    for b in range(batch):
        summaries = [p.get("router.start")]
        for j in range(-(-length // size)):
            places = range(j * size, (j + 1) * size)
            real = [t < length and (mask is None or bool(mask[b, t])) for t in places]
            steps = [x[b, t] if flag else zero for t, flag in zip(places, real, strict=True)]
            if layer.num_experts == 0:
                outputs = [ffn(step, p, "shared_expert", layer.activation) for step in steps]
            else:
                if layer.expert_scope == "projected":
                    steps = [affine(p["in_proj.weight"], p.get("in_proj.bias"), torch.cat(steps))]
                summaries.append(pool(steps, real, layer.pooling))
                seen = summaries[-2] if layer.causal else summaries[-1]
                row = route_segment(layer, p, seen, any(real))
                for all_rows, value in zip((logits, probs, weights, ids), row, strict=True):
                    all_rows.append(value)
                for e in row[3]:
                    counts[e] += int(any(real))
                outputs = run_segment(layer, p, steps, row[2], row[3])
                if layer.expert_scope == "projected":
                    wide = affine(p["out_proj.weight"], p.get("out_proj.bias"), outputs[0])
                    outputs = list(wide.split(d_model))
                if not any(real):
                    ids[-1] = [-1] * layer.top_k
            for t, flag, out in zip(places, real, outputs, strict=True):
                if flag:
                    y[b][t] = out
    rows = [torch.stack(row) for row in y if row]
    out = torch.stack(rows) if rows else x.new_zeros(batch, length, d_model)
    if layer.num_experts == 0:
        nothing = x.new_zeros(batch * -(-length // size), 0)
        names = ("router_logits", "router_probs", "topk_weights")
        routing = dict.fromkeys(names, nothing)
        return out, {**routing, "topk_ids": nothing.int(), "expert_counts": nothing.sum(0).int()}
    routing = {
        "router_logits": stack(logits, (0, layer.num_experts), x.dtype),
        "router_probs": stack(probs, (0, layer.num_experts), x.dtype),
        "topk_weights": stack([torch.stack(w) for w in weights], (0, layer.top_k), x.dtype),
        "topk_ids": torch.tensor(ids, dtype=torch.int32).reshape(-1, layer.top_k),
        "expert_counts": torch.tensor(counts, dtype=torch.int32),
    }
    return out, routing


def stack(rows, empty, dtype):
    return torch.stack(rows) if rows else torch.zeros(empty, dtype=dtype)


def route_segment(layer, p, seen, routed):
    """``(logits, probs, weights, ids)`` of one segment; zeros where it has no real step."""
    nothing = torch.zeros(layer.num_experts, dtype=seen.dtype)
    if not routed:
        return nothing, nothing, [nothing[0]] * layer.top_k, list(range(layer.top_k))
    logits = torch.stack([p["router.weight"][e] @ seen for e in range(layer.num_experts)])
    powers = torch.exp((logits - logits.max()) / layer.router_temperature)
    probs = powers / powers.sum()
    return logits, probs, *choose(probs, layer.top_k, layer.renormalize)


def run_segment(layer, p, steps, weights, ids):
    """Outputs of a segment's steps: its experts and the shared one."""
    act = layer.activation
    if layer.expert_scope == "segment":
        wide = torch.cat(steps)
        total = sum(w * ffn(wide, p, "experts", act, e) for w, e in zip(weights, ids, strict=True))
        outputs = list(total.split(len(steps[0])))
    else:
        outputs = [
            sum(w * ffn(step, p, "experts", act, e) for w, e in zip(weights, ids, strict=True))
            for step in steps
        ]
    if layer.shared_expert_scope is None:
        return outputs
    if layer.shared_expert_scope == "token":
        shared = [gated_shared(step, p, act) for step in steps]
    else:
        shared = gated_shared(torch.cat(steps), p, act).split(len(steps[0]))
    return [out + other for out, other in zip(outputs, shared, strict=True)]


def gated_shared(v, p, activation):
    gate = 1 / (1 + torch.exp(-(p["shared_gate.weight"][0] @ v)))
    return gate * ffn(v, p, "shared_expert", activation)
