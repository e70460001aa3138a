"""The block of the next open_clip in small: a stand-in, since PyPI has no 4.x yet.

open_clip 3 builds its plain block on `nn.MultiheadAttention`. On its main branch the block has an
attention of its own: the same parameter names, `scaled_dot_product_attention` inside, no
`batch_first`, and one tensor instead of a tuple. Nothing else is different here.
"""

from contextlib import contextmanager
from unittest import mock

import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F

RELEASED = open_clip.transformer.ResidualAttentionBlock


class NextAttention(nn.Module):
    "Self- and cross-attention on (b, n, d), by the parameter names of `nn.MultiheadAttention`"

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * self.head_dim**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, query, key=None, value=None, attn_mask=None):
        (batch, tokens, width), key = query.shape, query if key is None else key
        inputs = query, key, key if value is None else value
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        heads = [
            F.linear(x, weight, bias).view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        ]
        if attn_mask is not None and attn_mask.ndim == 3:  # repeated for each head
            attn_mask = attn_mask.view(batch, self.num_heads, tokens, -1)
        out = F.scaled_dot_product_attention(*heads, attn_mask=attn_mask)
        # the width of what came in: a module that lost heads must not be run by this
        return self.out_proj(out.transpose(1, 2).reshape(batch, tokens, width))


class NextBlock(RELEASED):
    "The plain block of the next open_clip"

    def __init__(self, d_model, n_head, *args, batch_first=True, **options):
        super().__init__(d_model, n_head, *args, batch_first=batch_first, **options)
        self.attn = NextAttention(d_model, n_head)

    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        return self.attn(q_x, k_x, v_x, attn_mask=mask)


@contextmanager
def next_open_clip():
    "Inside, open_clip makes models of the next one's blocks"
    with mock.patch.object(open_clip.transformer, 'ResidualAttentionBlock', NextBlock):
        yield
