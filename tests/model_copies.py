"""Layers of forecasting models after their sources, for machines without their packages.

Each has the children, names and formula of its source, and takes and gives (B, T, D). Attention is
the same plain one in all of them.
"""

import torch
import torch.nn.functional as F
from torch import nn

D, HIDDEN = 16, 24


class Attention(nn.Module):
    """``(y, weights)``, as everyone's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, q, k, v, **_):
        """Attend without a mask."""
        return self.inner(q, k, v)


class Chronos2FeedForward(nn.Module):
    """chronos-forecasting, chronos/chronos2/layers.py: ``MLP`` inside ``FeedForward``."""

    class MLP(nn.Module):
        """wi, act, dropout, wo."""

        def __init__(self):
            super().__init__()
            self.wi = nn.Linear(D, HIDDEN, bias=False)
            self.wo = nn.Linear(HIDDEN, D, bias=False)
            self.dropout, self.act = nn.Dropout(0.1), nn.ReLU()

        def forward(self, hidden_states):
            """One argument."""
            return self.wo(self.dropout(self.act(self.wi(hidden_states))))

    def __init__(self):
        super().__init__()
        self.mlp, self.layer_norm = self.MLP(), nn.LayerNorm(D)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        """With its residual."""
        return x + self.dropout(self.mlp(self.layer_norm(x)))


def sequential():
    """neuralforecast, models/patchtst.py: ``ff`` of ``TSTEncoderLayer``."""
    return nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, D))


class TimesFMLayer(nn.Module):
    """timesfm, torch/transformer.py and timesfm3/torch/transformer.py: ``Transformer``."""

    def __init__(self):
        super().__init__()
        for name in ("pre_attn_ln", "post_attn_ln", "pre_ff_ln", "post_ff_ln"):
            setattr(self, name, nn.RMSNorm(D))
        self.attn = Attention()
        self.ff0, self.ff1 = nn.Linear(D, HIDDEN, bias=False), nn.Linear(HIDDEN, D, bias=False)
        self.activation = nn.SiLU()

    def forward(self, input_embeddings, patch_mask, decode_cache=None):
        """Two outputs."""
        x = self.pre_attn_ln(input_embeddings)
        x = self.post_attn_ln(self.attn(x, x, x, mask=patch_mask)[0]) + input_embeddings
        hidden = self.activation(self.ff0(self.pre_ff_ln(x)))
        return self.post_ff_ln(self.ff1(hidden)) + x, decode_cache


class FeedForward(nn.Module):
    """uni2ts, module/ffn.py."""

    def __init__(self, activation=F.silu):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, HIDDEN, bias=False), nn.Linear(HIDDEN, D, bias=False)
        self.dropout1, self.dropout2 = nn.Dropout(0.1), nn.Dropout(0.1)
        self.activation = activation

    def forward(self, x, centroid=None):  # noqa: ARG002
        """``centroid`` is for mixtures."""
        return self.dropout2(self.fc2(self.dropout1(self._in_proj(x))))

    def _in_proj(self, x):
        return self.activation(self.fc1(x))


class GatedLinearUnitFeedForward(FeedForward):
    """uni2ts, module/ffn.py."""

    def __init__(self):
        super().__init__()
        self.fc_gate = nn.Linear(D, HIDDEN, bias=False)

    def _in_proj(self, x):
        return self.activation(self.fc_gate(x)) * self.fc1(x)


class MoEFeedForward(nn.Module):
    """uni2ts, module/ffn.py: routed by the distance to centroids."""

    def __init__(self, num_experts=4):
        super().__init__()
        self.experts = nn.ModuleList(GatedLinearUnitFeedForward() for _ in range(num_experts))

    def forward(self, x, centroid=None):
        """Two experts a token."""
        distances = torch.cdist(x, centroid.to(x).expand(len(x), -1, -1))
        weights, ids = distances.topk(2)
        y = torch.stack([expert(x) for expert in self.experts], -2)
        chosen = y.gather(-2, ids[..., None].expand(*ids.shape, D))
        return (weights.softmax(-1)[..., None] * chosen).sum(-2)


class MoiraiLayer(nn.Module):
    """uni2ts, module/transformer.py: ``TransformerEncoderLayer`` before its norms."""

    def __init__(self, ffn):
        super().__init__()
        self.self_attn, self.ffn = Attention(), ffn
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.register_buffer("centroid", torch.randn(4, D).double())

    def forward(self, x):
        """Pre-norm."""
        h = self.norm1(x)
        x = x + self.self_attn(h, h, h)[0]
        return x + self.ffn(self.norm2(x), centroid=self.centroid)


def convolve(layer, y):
    """The FFN of Time-Series-Library's layers."""
    y = layer.dropout(layer.activation(layer.conv1(y.transpose(-1, 1))))
    return layer.dropout(layer.conv2(y).transpose(-1, 1))


class TSLibLayer(nn.Module):
    """What Time-Series-Library's layers have in common."""

    def __init__(self, *attentions, bias=True):
        super().__init__()
        for name in attentions:
            setattr(self, name, Attention())
        self.conv1 = nn.Conv1d(D, HIDDEN, 1, bias=bias)
        self.conv2 = nn.Conv1d(HIDDEN, D, 1, bias=bias)
        self.dropout, self.activation = nn.Dropout(0.1), F.gelu
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D) for _ in range(3))


class DecoderLayer(TSLibLayer):
    """Time-Series-Library, layers/Transformer_EncDec.py."""

    def __init__(self):
        super().__init__("self_attention", "cross_attention")

    def forward(self, x, cross, x_mask=None, cross_mask=None, tau=None, delta=None):
        """Two attentions."""
        x = x + self.dropout(self.self_attention(x, x, x, attn_mask=x_mask, tau=tau)[0])
        x = self.norm1(x)
        attended = self.cross_attention(x, cross, cross, attn_mask=cross_mask, delta=delta)[0]
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + convolve(self, x))


class Decomposition(nn.Module):
    """Time-Series-Library, layers/Autoformer_EncDec.py: ``series_decomp``."""

    def __init__(self):
        super().__init__()
        self.moving_avg = nn.AvgPool1d(3, stride=1, padding=1)

    def forward(self, x):
        """``(rest, mean)``."""
        mean = self.moving_avg(x.mT).mT
        return x - mean, mean


class AutoformerEncoderLayer(TSLibLayer):
    """Time-Series-Library, layers/Autoformer_EncDec.py, also FEDformer's: ``EncoderLayer``."""

    def __init__(self):
        super().__init__("attention", bias=False)
        self.decomp1, self.decomp2 = Decomposition(), Decomposition()

    def forward(self, x, attn_mask=None):
        """Decompose twice."""
        attended, weights = self.attention(x, x, x, attn_mask=attn_mask)
        x, _ = self.decomp1(x + self.dropout(attended))
        return self.decomp2(x + convolve(self, x))[0], weights


class TimeXerLayer(TSLibLayer):
    """Time-Series-Library, models/TimeXer.py: ``EncoderLayer``; the last row is a global token."""

    def __init__(self):
        super().__init__("self_attention", "cross_attention")

    def forward(self, x, cross, x_mask=None, cross_mask=None, tau=None, delta=None):  # noqa: ARG002
        """The global token attends to the series beside."""
        batch, _, width = cross.shape
        x = self.norm1(x + self.dropout(self.self_attention(x, x, x, attn_mask=x_mask)[0]))
        last = x[:, -1, :].unsqueeze(1)
        glb = torch.reshape(last, (batch, -1, width))
        attended = self.dropout(self.cross_attention(glb, cross, cross, attn_mask=cross_mask)[0])
        glb = self.norm2(last + attended.reshape(-1, width).unsqueeze(1))
        x = torch.cat([x[:, :-1, :], glb], dim=1)
        return self.norm3(x + convolve(self, x))


class PositionwiseFeedForward(nn.Module):
    """Time-Series-Library, layers/Pyraformer_EncDec.py."""

    def __init__(self):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.layer_norm, self.dropout = nn.LayerNorm(D), nn.Dropout(0.1)

    def forward(self, x):
        """With residual and norm."""
        y = self.dropout(F.gelu(self.w_1(x)))
        return self.layer_norm(x + self.dropout(self.w_2(y)))


class MultiPatchFeedForward(nn.Module):
    """Time-Series-Library, models/MultiPatchFormer.py: ``FeedForward``."""

    def __init__(self):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.activation = nn.GELU()

    def forward(self, x):
        """One argument."""
        return self.linear_2(self.activation(self.linear_1(x)))


class MultiPatchFormer(nn.Module):
    """Time-Series-Library, models/MultiPatchFormer.py: one encoder over time, one over variates."""

    def __init__(self):
        super().__init__()
        self.encoder_list = nn.ModuleList([MultiPatchFeedForward()])
        self.encoder_list_ch = nn.ModuleList([MultiPatchFeedForward()])

    def forward(self, x):
        """(B, T, D), whose other dimension stands for variates."""
        return self.encoder_list_ch[0](self.encoder_list[0](x))


class TwoStageAttentionLayer(nn.Module):
    """Time-Series-Library, layers/SelfAttention_Family.py: Crossformer's, without attention."""

    def __init__(self):
        super().__init__()
        self.MLP1, self.MLP2 = (
            nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D)) for _ in range(2)
        )

    def forward(self, x):
        """(B, T, D)."""
        x = x + self.MLP1(x)
        return x + self.MLP2(x.transpose(0, 1)).transpose(0, 1)


class DataEmbedding_inverted(nn.Linear):
    """Time-Series-Library, layers/Embed.py: variates become rows."""


class ITransformer(nn.Module):
    """Time-Series-Library, models/iTransformer.py."""

    def __init__(self):
        super().__init__()
        self.enc_embedding = DataEmbedding_inverted(11, D)
        self.encoder = AutoformerEncoderLayer()

    def forward(self, x):
        """(B, T, C) to (B, C, D)."""
        return self.encoder(self.enc_embedding(x.mT))[0]


class Called(nn.Module):
    """A layer in a model; ``calls`` gives what it is called with."""

    def __init__(self, layer, calls=lambda x: (x,)):
        super().__init__()
        self.layer, self.calls = layer, calls

    def forward(self, x):
        """Call it."""
        return self.layer(*self.calls(x))
