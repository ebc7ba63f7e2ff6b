"""Wrong calls of `SegMoE.step` and of what uses it: (call, exception, words that bars part)."""

from functools import partial
from types import SimpleNamespace

from bad_calls import META, caller, draw
from torch import nn

from segmoe_kernels import SegMoE
from segmoe_kernels.layer.decoding import Stepwise
from segmoe_kernels.models.cached import enable_cache


def causal(**changes):
    options = {"segment_size": 3, "causal": True, "shared_expert": None}
    return SegMoE(4, 6, 3, **{**options, **changes})


def with_fewer_experts():
    """As `shard_experts` leaves a rank."""
    layer = causal()
    layer.num_experts = 4
    return layer


class Decoder(nn.Module):
    """What tells a decoder of transformers."""

    def __init__(self, layer):
        super().__init__()
        self.ff, self.config = layer, SimpleNamespace(use_cache=False)

    def get_input_embeddings(self):
        """Tell."""

    def forward(self, input_ids, attention_mask=None, cache=None, use_cache=None):  # noqa: ARG002
        """Run the FFN twice."""
        return self.ff(self.ff(input_ids))


class Cache:
    """A cache of some tokens."""

    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        """Of its tokens."""
        return self.length


def enabled():
    decoder = Decoder(causal()).eval()
    enable_cache(decoder)
    return decoder


X = draw(2, 5, 4)
LAYER = causal()
STATE = LAYER.step(X)[1]
step = caller(Stepwise.step, self=LAYER, x=X, state=STATE, padding_mask=None, skip_padding=False)
enable = caller(enable_cache, model=Decoder(causal()))
T, V = TypeError, ValueError

ROWS = [
    (step(x=[1.0]), T, "SegMoE.step | torch.Tensor | list"),
    (step(x=draw(2, 5, 3)), V, "(..., T, d_model=4) | (2, 5, 3)"),
    (step(padding_mask=draw(2, 5)), T, "torch.bool | float32"),
    (step(skip_padding=1), T, "True or False | 1 (int)"),
    (step(state=tuple(STATE)), T, "a StepState or None | tuple"),
    (step(state=STATE._replace(place=2)), T, "state.place | torch.Tensor | int"),
    (step(state=STATE._replace(steps=draw(2, 4, 4))), V, "state.steps | (2, 3, 4) | (2, 4, 4)"),
    (step(state=LAYER.step(draw(1, 5, 4))[1]), V, "state.steps | (2, 3, 4) | (1, 3, 4)"),
    (step(state=STATE._replace(real=draw(2, 3))), T, "state.real | torch.bool | float32"),
    (step(state=STATE._replace(topk_ids=STATE.topk_ids.to(META))), V, "state.topk_ids | on cpu"),
    (partial(SegMoE(4, 6, 3).step, X), V, "SegMoE.step | causal | depends on later steps | False"),
    (partial(causal(aux_loss_weight=0.1).step, X), V, "aux_loss_weight | of whole sequences | 0.1"),
    (partial(with_fewer_experts().step, X), V, "layer | all of its experts | (3, 6, 4)"),
    (enable(model="model"), T, "torch.nn.Module | str"),
    (enable(model=nn.Linear(2, 2)), V, "a SegMoE that mixes steps | Linear"),
    (enable(model=Decoder(causal(causal=False))), V, "causal layers | causal=False"),
    (enable(model=nn.Sequential(causal())), V, "decoder of Hugging Face | Sequential"),
    (lambda: enabled()(X, draw(2, 1, 5, 5), use_cache=False), V,
     "Decoder | attention_mask | (B, T) | (2, 1, 5, 5)"),
    (lambda: enabled()(X, cache=Cache(4)), V, "Decoder | cache | 4 tokens, of which 0 were seen"),
    (lambda: enabled()(X, cache=Cache(0)), V, "model | each SegMoE once | a second call"),
]  # fmt: skip
