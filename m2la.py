"""Attention of InternVideo3 (§3.2): the source's GQA, the latent M²LA, and how one becomes the other.

GQA caches a key and a value of every KV head. M²LA caches one row per token, a latent beside a small RoPE key
that all heads share, and finds the heads' keys and values in it. No token is dropped. A conversion computes
M²LA's maps from a GQA layer and from what passes through it on calibration data.

Sections in reading order: words · RoPE · attention with a mask · GQA · the cache · attention over
latent rows (reference, Triton kernel, merge) · M²LA · the released layer · calibration · the conversion's
choices · RoPE part · content part · linear norms · one layer · ranks · healing · the whole model.

Shape letters: B batch, T new tokens, N cached tokens, D hidden, H query heads, G KV heads, Dh head dim,
R latent rank (R_text or R_vision), P width of the shared RoPE key, W = R + P one cache row, L = Dh/2 RoPE
frequencies, S = P/2 complex slots of the RoPE key, V vocabulary; J disjoint sets of cached rows, M = T*H query
rows of a sequence, t tokens of a block of queries, Z calibrated values of a token. Query head h uses the KV
head g = h // (H/G).
A cached token costs, per layer (8B): GQA 2*G*Dh = 2048 values, M²LA R + P = 896 + 128 = 1024.

Differs from the paper, or decides what it leaves open:
 (1) QK-norm stays exact instead of becoming a linear map (§3.2.3): the latent need not be linear in the
     layer's input, only in the normalised keys. The linear substitute is there to compare: `linear_norms`.
 (2) The adapters of a modality (§3.2.1) are a whole encoder and decoder of its own: an affine adapter in
     front of a shared decoder gains nothing on an optimal latent. It is there to compare: `modality_adapter`.
 (3) Text and vision rows stand in two segments of the cache, so that their ranks may differ (§3.2.2). They
     are attended separately and merged by log-sum-exp, which is exact.
 (4) The RoPE key (§3.2.1) is aggregated by complex matrices across heads, of which a rotation is a special
     case, and keeps the S slots that matter most, of whatever frequency; the released layer has each
     frequency once. What is left out of it is content, whose queries take RoPE's mean over the
     distances that calibration saw.
 (5) The factorisation (§3.2.1) weighs an error by what queries and W_o make of it, not by its size.
 (6) The budgets (§3.2.2) are greedy, by the damage to the model's answers when a layer and modality is cut.
 (7) A converted model that is damaged too much is healed, distilled from its source, before CPT.
 (8) There is a decoder per KV head, scores are scaled by Dh^-½, RoPE is on halves. The released layer has a
     decoder per query head, (Dh+P)^-½ and neighbouring pairs: `M2LA.fold` translates.

    pytest tests/test_m2la.py             where there is no GPU, the kernel runs in Triton's interpreter
    python extras/bench_decode.py         time of a new token on the latent cache and on GQA's, bytes
    python extras/bench_conversion.py     what each idea of the conversion saves, against published ones
"""
import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial, reduce
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                      # CPU-only installs: the PyTorch reference below does the same
    triton = None


# --------------------------------------------------------------------------------------------- words

MODALITIES = "text", "vision"            # 0 and 1: numbers of a latent cache's segments, a layer's ranks

# With up to so many new tokens, M²LA attends to the latent rows themselves ("absorbed"), and a GPU is never
# waited for. With more, it pays to rebuild all keys and values once and share them among the new tokens.
DECODE = 8


class UserError(ValueError):
    """A mistake of the user: one line that names the file, flag or field and says what to do."""


def need(holds, problem, error=UserError):
    """For mistakes that are not the program's: a line that names the file, flag or field and what to do."""
    if not holds:
        raise error(problem)


# ---------------------------------------------------------------------------------------------- RoPE

@lru_cache
def frequencies(head_dim, theta, sections, device):
    """The L frequencies of RoPE, and the axis of positions that each turns with: 0 is t, 1 is h, 2 is w."""
    l = torch.arange(head_dim // 2, device=device)
    axis = torch.zeros_like(l)
    for a in (1, 2):
        own = (l % 3 == a) & (l < 3 * sections[a])
        axis = axis.masked_fill(own, a)
    return theta ** (-2.0 * l.float() / head_dim), axis


def mrope(positions, head_dim, theta, sections):
    """Interleaved MRoPE of Qwen3-VL: positions (3,B,T) of t/h/w -> cos, sin (B,T,L), fp32.
    Frequency l turns with the position of one axis: h for l = 1,4,7,... and w for l = 2,5,8,..., each up to
    3*its section, t for all others. Text has equal positions on all axes: there it is ordinary RoPE."""
    frequency, axis = frequencies(head_dim, theta, tuple(sections), positions.device)
    angle = positions[axis].permute(1, 2, 0).float() * frequency                 # (B,T,L)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns x by RoPE: its halves (re, im) times exp(i*angle). x (…,2L), cos, sin broadcastable to (…,L)."""
    re, im = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([re * cos - im * sin, im * cos + re * sin], dim=-1)


# ----------------------------------------------------------------------------- attention with a mask

@dataclass
class Blocks:
    """A sparse mask: the queries start..stop of a block see no other keys than 0..head and low..stop.

    For packed conversations, which see what all of them begin with (0..head) and themselves. `mask` (B,1,T,T)
    says which of those keys each query sees; the rest of it is not looked at."""
    mask: torch.Tensor
    blocks: list                                     # of (start, stop, head, low)

    def to(self, device, **how):
        return Blocks(self.mask.to(device, **how), self.blocks)

    @cached_property
    def bias(self):
        """What is added to the scores of each block, (B,1,t,n): 0 where a query sees a key, else next to -inf
        (-inf itself makes NaN of a query that sees nothing). Made once a batch, for all layers."""
        out = []
        for start, stop, head, low in self.blocks:
            seen = joined(self.mask[:, :, start:stop], head, low, stop, dim=3)
            out.append((seen.float() - 1) * 1e30)
        return out


def joined(x, head, low, stop, dim):
    """0..head and low..stop of one dimension side by side. Where there is no head, no copy is made."""
    own = x.narrow(dim, low, stop - low)
    if not head:
        return own
    return torch.cat([x.narrow(dim, 0, head), own], dim)


def attend(q, k, v, mask, scale):
    """Attention among T tokens: q (B,H,T,E), k (B,G,T,E), v (B,G,T,Dv) -> (B,T,H*Dv).
    mask: (B,1,T,T) bool, True = seen; or Blocks; or None = causal."""
    Dv = v.shape[-1]
    if mask is None and q.device.type == "cpu" and 0 < q.shape[2] <= SHORT:
        mask = causal_blocks(q.shape[2])
    if mask is None:
        share_heads = q.shape[1] > k.shape[1]
        v = widened(v, q)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=share_heads)
    elif isinstance(mask, Blocks):
        out = attend_blocks(q, k, v, mask, scale)
    else:
        out = attend_grouped(q, k, widened(v, q), mask, scale)
    return out[..., :Dv].transpose(1, 2).flatten(2)


def attend_blocks(q, k, v, mask, scale):
    """As `attend_grouped`, with a sparse mask: each block of queries meets only the keys that it may see."""
    if q.device.type == "cpu" and q.shape[2] <= KEPT:
        return BlockAttention.apply(q, k, v, mask, scale)
    v = widened(v, q)
    outs = []
    for start, stop, head, low in mask.blocks:
        keys = joined(k, head, low, stop, dim=2)
        values = joined(v, head, low, stop, dim=2)
        seen = joined(mask.mask[:, :, start:stop], head, low, stop, dim=3)
        outs.append(attend_grouped(q[:, :, start:stop], keys, values, seen, scale))
    return torch.cat(outs, 2)


# On a CPU the attention weights of so many tokens are kept for the backward pass; those of more would not fit.
KEPT = 4096


class BlockAttention(torch.autograd.Function):
    """`attend_blocks` by plain products, for CPUs: there the fused kernel takes twice as long in both passes,
    and autograd as long again for the blocks' slices and paddings.

        P = softmax(scale Q Kᵀ + bias),  O = P V                       of each block
        dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - Σ dO ∘ O),  dQ = scale dS K,  dK = scale dSᵀ Q

    B*G stand in front, r = H/G query heads share a KV head: a block's queries are (B*G, r*t, E)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, q, k, v, mask, scale):
        B, H, T, E = q.shape
        G = k.shape[1]
        q = q.reshape(B * G, H // G, T, E) * scale
        k = k.reshape(B * G, T, E)
        v = v.reshape(B * G, T, -1)

        out = q.new_empty(B * G, H // G, T, v.shape[2])
        kept = []
        for (start, stop, head, low), bias in zip(mask.blocks, mask.bias):
            keys = joined(k, head, low, stop, dim=1)                             # (B*G,n,E)
            values = joined(v, head, low, stop, dim=1)
            scores = q[:, :, start:stop].flatten(1, 2) @ keys.mT                 # (B*G,r*t,n)
            scores.view(B, -1, stop - start, bias.shape[3]).add_(bias)           # (B,H,t,n)
            weights = torch.softmax(scores, -1, out=scores)
            out[:, :, start:stop] = (weights @ values).unflatten(1, (H // G, -1))
            kept.append(weights)

        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.blocks = mask.blocks
        ctx.scale = scale
        return out.view(B, H, T, -1)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        q, k, v, out, *kept = ctx.saved_tensors                                  # q with the scale in it
        B, H, T, _ = grad.shape
        r = q.shape[1]
        grad = grad.reshape(out.shape)
        mean = (grad * out).sum(-1, keepdim=True)                                # Σ dO ∘ O, (B*G,r,T,1)

        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for (start, stop, head, low), weights in zip(ctx.blocks, kept):
            keys = joined(k, head, low, stop, dim=1)
            values = joined(v, head, low, stop, dim=1)
            queries = q[:, :, start:stop].flatten(1, 2)                          # (B*G,r*t,E)
            dout = grad[:, :, start:stop].flatten(1, 2)
            dscores = (dout @ values.mT).sub_(mean[:, :, start:stop].flatten(1, 2)).mul_(weights)
            dq[:, :, start:stop] = (dscores @ keys).unflatten(1, (r, -1))
            # Keys before `head` are added to by every block, the others by those that see them.
            dk[:, low:stop].baddbmm_(dscores[..., head:].mT, queries)
            dv[:, low:stop].baddbmm_(weights[..., head:].mT, dout)
            if head:
                dk[:, :head].baddbmm_(dscores[..., :head].mT, queries)
                dv[:, :head].baddbmm_(weights[..., :head].mT, dout)

        dq = dq.mul_(ctx.scale).view(B, H, T, -1)
        return dq, dk.view(B, -1, *k.shape[1:]), dv.view(B, -1, *v.shape[1:]), None, None


# Up to so many tokens plain products in blocks of queries, .7 of its time, come before the fused kernel on a CPU.
SHORT = 768


@lru_cache(4)                                                                    # all layers ask for the same
def causal_blocks(T):
    """The causal mask as Blocks of 64 queries."""
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    return Blocks(mask, [(start, min(start + 64, T), 0, 0) for start in range(0, T, 64)])


def attend_grouped(q, k, v, mask, scale):
    """q (B,H,T,E), k and v (B,G,N,E), mask (B,1,T,N) bool or None = all seen -> (B,H,T,E).
    The queries of a KV head stand one after the other, as if it had T*H/G tokens: with a mask no fused kernel
    shares KV heads, and k and v would be copied for every query head."""
    B, H, T, E = q.shape
    G = k.shape[1]
    if mask is not None:
        mask = mask.repeat(1, 1, H // G, 1)                                      # (B,1,T*H/G,N)
    q = q.reshape(B, G, -1, E)                                                   # (B,G,T*H/G,E)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.view(B, H, T, E)


def widened(v, q):
    """v with zeros up to the width of q: the fused kernels want one width."""
    missing = q.shape[-1] - v.shape[-1]
    if missing <= 0:
        return v                                                                 # a pad by 0 would be a copy
    return F.pad(v, (0, missing))


# ----------------------------------------------------------------------- GQA, the source of conversion

class Attention(nn.Module):
    """What GQA and M²LA share: Qwen3's projections, with an RMSNorm on each q and k head before RoPE."""

    def __init__(self, hidden, heads, kv_heads, head_dim, eps=1e-6):
        super().__init__()
        self.hidden = hidden
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.eps = eps
        self.scale = head_dim ** -0.5
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps)
        self.k_norm = nn.RMSNorm(head_dim, eps)

    def project(self, x):
        """x (B,T,D) -> q (B,T,H,Dh), k and v (B,T,G,Dh); q and k normalised (§3.2.3) but not yet rotated."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim))
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        return q, k, v


# A cache in its simplest case: one sequence, nothing but text. Row n of a layer is [k | v] of the n-th token.
# New tokens are written behind the `count` that are held; new token t sees those, new ones before it, itself:
#
#     limit = count + 1 + arange(T)                    what each new token sees: rows[:limit[t]]
#     attention of query t to rows[:limit[t]]          each layer: view, visible
#     count = limit[-1]                                after the layers: commit
#
# So causality is one number per token, and no mask is kept. The next section does this for a batch of
# sequences of different lengths and for two kinds of tokens; GQA uses it as the lines above say.
#
# Many new tokens (a prefill behind a long cache) would need a mask of T x N, which fused kernels dislike. Then
# the keys are taken as two sets: the new tokens' own, which is plain causal attention, and what was held
# before, which all of them see. Softmax over both is exact by the sets' log-sum-exps.

class Share(NamedTuple):
    """Attention over one of several disjoint sets of keys."""
    out: torch.Tensor                    # (B,H,T,Dv) its own softmax's output
    lse: torch.Tensor                    # (B,H,T) log-sum-exp of its scores


# Where no kernel gives the log-sum-exps, so many scores are in memory at a time: 1 GB in fp32.
BLOCK_SCORES = 2 ** 28


def attend_set(q, k, v, scale, seen=None, causal=False):
    """q (B,H,T,E) against a set of keys k, v (B,G,N,·) -> Share. seen (B,1,1 or T,N) bool; None: all, or causal."""
    Dv = v.shape[-1]
    v = widened(v, q)
    q = q.to(k.dtype)                                                            # that of the cache's rows
    shape = q.shape[:3]
    groups = q.shape[1] // k.shape[1]
    if causal:
        k = k.repeat_interleave(groups, 1)                                       # (B,H,N,E)
        v = v.repeat_interleave(groups, 1)
    elif seen is not None and seen.shape[2] > 1:
        seen = seen.repeat(1, 1, groups, 1)                                      # (B,1,T*H/G,N)
    # As in `attend_grouped`, the queries of a KV head stand one after the other.
    q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])                        # (B,G,T*H/G,E)

    bias = None
    if seen is not None:
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))
    if q.device.type == "cpu":
        # No public function gives the log-sum-exp; this is what F.scaled_dot_product_attention calls here.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    else:
        out, lse = attend_plainly(q, k, v, scale, bias, causal)
    if seen is not None:
        lse = lse.masked_fill(~seen.any(-1), float("-inf"))                      # the kernel says 0
    return Share(out[..., :Dv].reshape(*shape, Dv), lse.reshape(shape))


def attend_new(q, k, v, cache, scale):
    """New tokens q (B,H,T,E), k, v (B,G,T,·) among themselves, where nothing was cached -> (B,T,H*Dv)."""
    q, k, v = (cache.pad(x, 2) for x in (q, k, v))
    return cache.unpad(attend(q, k, v, cache.mask, scale))


def new_share(q, k, v, cache, scale):
    """The same as one set of several -> Share."""
    q, k, v = (cache.pad(x, 2) for x in (q, k, v))
    out, lse = attend_set(q, k, v, scale, cache.mask, causal=cache.mask is None)
    return Share(cache.unpad(out, 2), cache.unpad(lse, 2))


def attend_plainly(q, k, v, scale, bias, causal):
    """The same in plain PyTorch, in blocks of queries: q (B,G,T,E), k, v (B,G,N,E) -> out (B,G,T,E), lse (B,G,T)."""
    B, G, T, _ = q.shape
    N = k.shape[2]
    outs = []
    lses = []
    block = max(1, BLOCK_SCORES // (B * G * N))
    for start in range(0, T, block):
        queries = slice(start, start + block)
        s = q[:, :, queries] @ k.mT * scale                                      # (B,G,t,N)
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        if causal:
            token = torch.arange(T, device=q.device)
            s = s.masked_fill(token > token[queries, None], float("-inf"))
        if bias is not None:
            s = s + (bias if bias.shape[2] == 1 else bias[:, :, queries])
        lse = s.logsumexp(-1)
        p = torch.exp(s - lse.clamp_min(torch.finfo(s.dtype).min)[..., None])
        outs.append(p.to(v.dtype) @ v)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def merge_shares(lses):
    """What each of J sets of keys has of the softmax over all of them: the softmax of their log-sum-exps.
    Exact. lses (…,J), -inf for an empty set; all empty: any finite shares, their outputs are 0."""
    lowest = torch.finfo(lses.dtype).min
    return lses.clamp_min(lowest).softmax(-1)


def merged(sets):
    """Attention over all keys of some sets, as softmax over all of them would have it: list of Share -> (B,T,H*Dv)."""
    shares = merge_shares(torch.stack([part.lse for part in sets], -1))          # (B,H,T,J)
    out = 0
    for j, part in enumerate(sets):
        out = out + shares[..., j, None].to(part.out.dtype) * part.out
    return out.transpose(1, 2).flatten(2)


class GQA(Attention):
    """Qwen3's attention: H query heads share G KV heads. What we convert from, and the fair baseline."""

    def forward(self, x, rope, vision, mask=None, cache=None, layer=0):
        """x (B,T,D), rope (cos, sin) each (B,T,L), vision (B,T) bool, mask as in `attend` -> (B,T,D).
        With a cache, causality comes from the cache's order and `mask` is ignored."""
        q, k, v = self.project(x)

        # All heads turn by the same angles.
        cos, sin = (r[:, :, None] for r in rope)                                 # (B,T,1,L)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)

        if cache is not None:
            cache.append(layer, 0, torch.cat([k, v], 2).flatten(2))              # (B,T,2*G*Dh)
        q = q.transpose(1, 2)                                                    # (B,H,T,Dh)
        k = k.transpose(1, 2)                                                    # (B,G,T,Dh)
        v = v.transpose(1, 2)
        if cache is None:
            out = attend(q, k, v, mask, self.scale)
        elif cache.fresh:                                                        # nothing was cached before
            out = attend_new(q, k, v, cache, self.scale)
        else:
            out = self.attend_cached(q, k, v, cache, layer)
        return self.o_proj(out)

    def attend_cached(self, q, k, v, cache, layer):
        """New tokens q (B,H,T,Dh), k, v (B,G,T,Dh) against themselves and all that was cached -> (B,T,H*Dh)."""
        if cache.few:
            # They find themselves among the rows, (B,N,2*G*Dh).
            rows, = cache.view(layer)
            k, v = self.keys_and_values(rows)
            seen = cache.visible()
            if not cache.earlier:
                out = attend_grouped(cache.pad(q, 2), k, v, seen, self.scale)
                return cache.unpad(out.transpose(1, 2).flatten(2))
            own = attend_set(cache.pad(q, 2), k, v, self.scale, seen)
            sets = [Share(cache.unpad(own.out, 2), cache.unpad(own.lse, 2))]
        else:
            sets = [new_share(q, k, v, cache, self.scale)]
        for held in cache.earlier:
            rows, = held.view(layer)
            sets.append(held.attend(q, *self.keys_and_values(rows), self.scale))
        return merged(sets)

    def keys_and_values(self, rows):
        """Cached rows (B,N,2*G*Dh) -> k, v (B,G,N,Dh) each."""
        rows = rows.unflatten(2, (2, self.kv_heads, self.head_dim))
        return rows.permute(2, 0, 3, 1, 4)


# ----------------------------------------------------------------------------------------- the cache

# One sequence of M²LA's cache, 4 rows a segment. It holds "what is [v][v][v] here"; [v] and "?" come:
#
#     row             0        1        2        3       spare
#     text rows     what  |   is   |  here  |  "?"   | (of [v]) |     counts 3 -> 4
#     vision rows   [v]   |  [v]   |  [v]   |  [v]   | (of "?") |     counts 3 -> 4
#
#                     sees of text   sees of vision     its text row goes to   its vision row goes to
#     new token [v]        3               4                   spare                    3
#     new token "?"        4               4                   3                        spare
#                     `limits`, one number per segment         `places`, one per segment
#
# Tokens of a segment stand in order, so that what a query sees of it is always its first rows. One number per
# segment and token says causality, ragged batches and empty segments at once.

class Held:
    """Rows that a forward finds in a cache: those of the cache itself, or of one that it branched from.

    Each of that cache's B' sequences is seen by the tokens of some branches, which see all its rows. Their queries
    are brought together, so that the rows are met once: (tokens,…) -> (B',most,…), where `most` is the largest
    number of tokens that see one sequence; fewer leave zeros."""

    def __init__(self, cache, owner):
        """owner (tokens,): the sequence whose rows each new token sees, ascending."""
        self.cache = cache
        self.high = list(cache.high)
        self.counts = cache.counts.clone()                                       # (segments,B')
        self.seen = None                                                         # (B',1,1,N), None: all rows
        if cache.low != cache.high:
            rows = [torch.arange(n, device=owner.device) < count[:, None]
                    for n, count in zip(self.high, self.counts)]
            self.seen = torch.cat(rows, 1)[:, None, None]

        tokens = owner.bincount(minlength=len(self.counts[0]))                   # (B',)
        self.most = int(tokens.max())
        self.slot = None                                                         # of each token; None: in order
        if int(tokens.min()) < self.most:
            first = tokens.cumsum(0) - tokens
            number = torch.arange(len(owner), device=owner.device) - first[owner]
            self.slot = owner * self.most + number

    def view(self, layer):
        """For each segment its rows (B',N,width)."""
        return [rows[:, :n] for rows, n in zip(self.cache.rows[layer], self.high)]

    def gather(self, x):
        """x (B,T,…) or (1,N,…) -> (B',most,…): what sees one sequence, side by side."""
        x = x.flatten(0, 1)
        if self.slot is not None:
            room = x.new_zeros(len(self.counts[0]) * self.most, *x.shape[1:])
            x = room.index_copy_(0, self.slot, x)
        return x.unflatten(0, (-1, self.most))

    def spread(self, x, shape):
        """The reverse: x (B',most,…) -> (B,T,…) or (1,N,…), as `shape` begins."""
        x = x.flatten(0, 1)
        if self.slot is not None:
            x = x[self.slot]
        return x.unflatten(0, shape[:2])

    def attend(self, q, k, v, scale):
        """q (B,H,T,E), the new tokens' queries, against k, v (B',G,N,·) of this cache -> Share."""
        q = q.transpose(1, 2)                                                    # (B,T,H,E)
        queries = self.gather(q).transpose(1, 2)                                 # (B',H,most,E)
        share = attend_set(queries, k, v, scale, self.seen)
        out, lse = (self.spread(x.transpose(1, 2), q.shape).transpose(1, 2) for x in share)
        return Share(out, lse)


class RowSet(NamedTuple):
    """Rows of one segment that new tokens see, in the cache itself or in one that it branched from."""
    rows: torch.Tensor                   # (B',N,width)
    limits: torch.Tensor                 # (B',T' or 1) how many of them a token sees, …
    high: int                            # … none more than so many,
    all_seen: bool                       # … or all of them so many
    gather: Callable                     # (B,T,…) by new token -> (B',T',…) by sequence of rows and token
    spread: Callable                     # the reverse


class Cache:
    """Preallocated rows for all layers, in segments; the tokens of a segment are appended in order.

    A forward calls `begin` once, `append` and `view` in each layer, `commit` once. Counts live on the device;
    the host only keeps bounds on them, low <= counts <= high, so that decoding never waits for the GPU. A
    spare row behind each segment takes what does not belong there (padding, other tokens); it is not read.

    What is done token by token is done without padding: between `begin` and `commit`, the tokens of a batch that
    has some stand in one sequence, (B,T,…) -> (1,N,…) by `unpad`, and only attention has them apart, by `pad`.

    A cache can branch: its branches see its rows, which are not copied, and append to rows of their own. All
    that is said of a branch (lengths, capacity, bytes) is about its own tokens."""

    def __init__(self, widths, batch, capacities, dtype=torch.float32, device="cpu"):
        """widths: per layer, one row width per segment; capacities: rows per sequence of each segment."""
        self.capacity = tuple(capacities)
        segments = len(self.capacity)

        # rows[layer][segment]: (B,capacity+1,width), the last row of a sequence is the spare one.
        self.rows = []
        for layer_widths in widths:
            self.rows.append([torch.zeros(batch, n + 1, width, dtype=dtype, device=device)
                              for n, width in zip(self.capacity, layer_widths)])

        # Rows in use, and the host's bounds on them.
        self.counts = torch.zeros(segments, batch, dtype=torch.long, device=device)
        self.low = [0] * segments
        self.high = [0] * segments
        # What it branched from, the nearest first: (a cache, the sequence of it that each sequence here continues).
        self.ancestors = []
        # Index of the spare row, (segments,1,1).
        self.spare = torch.tensor(self.capacity, device=device)[:, None, None]
        # The segment of each held token in the order they came (for `truncate`), and a place for what is not.
        self.order = torch.zeros(batch, sum(self.capacity) + 1, dtype=torch.long, device=device)

    @property
    def lengths(self):
        """Tokens held by each sequence, (B,)."""
        return self.counts.sum(0)

    def begin(self, vision, valid=None):
        """Once before the layers: where do the new tokens go, and what do they see?
        vision, valid (B,T) bool; None = all valid. UserError if they do not fit."""
        T = vision.shape[1]
        segments = len(self.capacity)
        # To ask the device for values stalls decoding on a GPU. Where it is cheap, we ask.
        ask = T > DECODE or not vision.is_cuda
        if valid is not None and ask and valid.all():
            valid = None
        real = torch.ones_like(vision) if valid is None else valid

        # Limits: how many rows of each segment a new token sees. Those held, and of the new ones that belong
        # there, all up to itself. (segments,B,T)
        segment = vision.long().clamp_max(segments - 1)                          # (B,T)
        number = torch.arange(segments, device=vision.device)[:, None, None]
        own = (segment == number) & real                                         # (segments,B,T)
        self.limits = self.counts[:, :, None] + own.cumsum(2)

        # Places: the row that a token is written to. In its own segment the last that it sees, elsewhere the
        # spare one; so too if a replayed CUDA graph runs past the capacity. (segments,B,T)
        self.places = torch.where(own, self.limits - 1, self.spare).minimum(self.spare)
        # Segments that some token belongs to. Decoding text writes no vision rows.
        self.growing = range(segments)
        if ask and segments > 1:
            self.growing = own.flatten(1).any(1).nonzero().flatten().tolist()
        self.batch = torch.arange(len(vision), device=vision.device)[:, None].expand_as(vision)      # (B,T)

        # Tokens that are no padding, as numbers b*T + t, (N,); None: all, or nobody asks.
        self.shape = vision.shape
        self.tokens = None
        if valid is not None and ask:
            self.tokens = valid.flatten().nonzero()[:, 0]
            self.places = self.places.flatten(1)[:, None, self.tokens]                   # (segments,1,N)
            self.batch = self.batch.flatten()[None, self.tokens]                             # (1,N)

        # Many new tokens attend to themselves and to what was there before; few find themselves among the
        # cache's own rows. With nothing cached all attend to themselves alone.
        self.few = T <= DECODE
        self.fresh = not any(self.high) and not self.ancestors
        batch = self.batch.flatten()
        self.earlier = [Held(cache, owner[batch]) for cache, owner in self.ancestors]
        if not self.few and any(self.high):
            self.earlier.append(Held(self, batch))

        # Mask of the new tokens, None = causal. Padding behind the others is seen by none of them; elsewhere by
        # nobody but itself: a softmax over nothing would be NaN. (B,1,T,T)
        self.mask = None
        alone = self.fresh or not self.few                                       # do they meet as a set of their own?
        if valid is not None and alone and (valid[:, 1:] > valid[:, :-1]).any():
            itself = torch.eye(T, dtype=torch.bool, device=vision.device)
            causal = torch.ones_like(itself).tril()
            self.mask = (causal & valid[:, None, None, :]) | itself

        # Bookkeeping: the bounds, and the order in which the tokens came. Padding goes to the last place.
        self._bound(T, ask, all_grow=valid is None and segments == 1)
        position = self.lengths[:, None] + real.cumsum(1) - 1                    # (B,T)
        position = torch.where(real, position, sum(self.capacity))
        self.order.scatter_(1, position, segment)

    def _bound(self, T, ask, all_grow):
        """Keeps low <= counts <= high. Asks the device where it is cheap or high passes the capacity."""
        low = [n + T for n in self.low] if all_grow else self.low
        high = [n + T for n in self.high]
        may_overflow = any(n > capacity for n, capacity in zip(high, self.capacity))
        if ask or may_overflow:
            last = self.limits[:, :, -1]                                         # (segments,B)
            low = last.amin(1).tolist()
            high = last.amax(1).tolist()

        for i, capacity in enumerate(self.capacity):
            name = MODALITIES[i] + " " if len(self.capacity) > 1 else ""
            need(high[i] <= capacity,
                 f"cache capacity: {high[i]} {name}tokens per sequence do not fit into {capacity}; raise it")
        self.low = low
        self.high = high

    def unpad(self, x, dim=1):
        """x (B,T,…) -> (1,N,…), the tokens that are no padding; x itself if it has none. dim: where T stands."""
        if self.tokens is None:
            return x
        x = x.transpose(1, dim).flatten(0, 1)
        return x[None, self.tokens].transpose(1, dim)

    def pad(self, x, dim=1):
        """The reverse: x (1,N,…) -> (B,T,…), with zeros at the padding."""
        if self.tokens is None:
            return x
        x = x[0].movedim(dim - 1, 0)                                             # (N,…)
        padded = x.new_zeros(self.shape.numel(), *x.shape[1:])
        padded.index_copy_(0, self.tokens, x)
        return padded.unflatten(0, self.shape).transpose(1, dim)

    def append(self, layer, segment, rows):
        """Write the new tokens' rows for a segment, (B,T,width) or (1,N,width), of all tokens: `places` sorts them.
        For those of `growing`; no token belongs to the others."""
        held = self.rows[layer][segment]
        held[self.batch, self.places[segment]] = rows.to(held.dtype)

    def view(self, layer):
        """The rows that may be in use: for each segment (B,N,width)."""
        return [rows[:, :n] for rows, n in zip(self.rows[layer], self.high)]

    def sets(self, layer, segment):
        """The sets of a segment's rows that few new tokens see: the cache's own, and those it branched from."""
        found = []
        shape = self.shape if self.tokens is None else (1, len(self.tokens))
        if self.high[segment]:
            all_seen = self.limits.shape[2] == 1 and self.low[segment] == self.high[segment]
            found.append(RowSet(self.rows[layer][segment], self.limits[segment], self.high[segment], all_seen,
                                self.pad, self.unpad))
        for held in self.earlier:
            if held.high[segment]:
                limits = held.counts[segment][:, None]
                found.append(RowSet(held.cache.rows[layer][segment], limits, held.high[segment], held.seen is None,
                                    held.gather, partial(held.spread, shape=shape)))
        return found

    def visible(self):
        """Mask (B,1,T,N) of the new tokens over the segments' rows side by side; None: they see all."""
        if self.limits.shape[2] == 1 and self.low == self.high:
            return None
        masks = [torch.arange(n, device=limit.device) < limit[:, None, :, None]
                 for n, limit in zip(self.high, self.limits)]
        return torch.cat(masks, dim=-1)

    def commit(self):
        """Once after the layers: the new tokens are in the cache (in place: a CUDA graph can replay it)."""
        self.counts.copy_(self.limits[:, :, -1])

    def truncate(self, lengths):
        """Forget all but the first `lengths` tokens, an int or (B,), of each sequence (the agent's undo)."""
        keep = torch.as_tensor(lengths, device=self.counts.device).minimum(self.lengths)
        kept = torch.arange(self.order.shape[1], device=keep.device) < keep[:, None]
        for i in range(len(self.capacity)):
            self.counts[i] = (kept & (self.order == i)).sum(1)
        self.recount()

    def recount(self):
        """The host's bounds, from the device: exact, and right again when another view has written."""
        self.low = self.counts.amin(1).tolist()
        self.high = self.counts.amax(1).tolist()

    def part(self, b):
        """Sequence b as a cache of its own. It is a view: what one of them writes, the other has after
        `recount`."""
        one = copy.copy(self)
        one.rows = []
        for layer_rows in self.rows:
            one.rows.append([rows[b:b + 1] for rows in layer_rows])
        one.counts = self.counts[:, b:b + 1]
        one.order = self.order[b:b + 1]
        one.recount()
        return one

    def expand(self, times):
        """A new cache with a copy of each sequence's own rows `times`, an int or (B,); 0 drops the sequence."""
        new = copy.copy(self)
        new.ancestors = [(cache, owner.repeat_interleave(times)) for cache, owner in self.ancestors]
        new.rows = []
        for layer_rows in self.rows:
            new.rows.append([rows.repeat_interleave(times, 0) for rows in layer_rows])
        new.counts = self.counts.repeat_interleave(times, 1)
        new.order = self.order.repeat_interleave(times, 0)
        return new

    def branch(self, times, room):
        """A new cache of `times` branches, an int or (B,), of each sequence, with room for so many tokens of text
        in each: questions about one video, samples of one prompt. This cache must not grow any more."""
        widths = [[rows.shape[2] for rows in layer_rows] for layer_rows in self.rows]
        like = self.rows[0][0]
        itself = torch.arange(len(like), device=like.device).repeat_interleave(times)
        capacities = [room] + [0] * (len(self.capacity) - 1)
        new = Cache(widths, len(itself), capacities, like.dtype, like.device)
        new.ancestors = [(self, itself)]
        for cache, owner in self.ancestors:
            new.ancestors.append((cache, owner.repeat_interleave(times)))
        return new

    def nbytes(self):
        """Bytes of the rows in use, over all layers and sequences."""
        used = self.counts.sum(1).tolist()
        total = 0
        for layer_rows in self.rows:
            for n, rows in zip(used, layer_rows):
                total += n * rows.shape[2] * rows.element_size()
        return total


class KVCache(Cache):
    """GQA: one segment for all tokens; a row is [k of all KV heads | v of all KV heads], 2*G*Dh values."""

    def __init__(self, layers, batch, capacity, kv_heads, head_dim, dtype=torch.float32, device="cpu"):
        row = 2 * kv_heads * head_dim
        super().__init__([(row,)] * layers, batch, (capacity,), dtype, device)


class LatentCache(Cache):
    """M²LA (§3.2): segment 0 holds text, 1 vision; a row is [latent R | shared RoPE key P], R by layer and modality.
    ranks: (R_text, R_vision) of each layer; capacities: (text, vision) tokens per sequence."""

    def __init__(self, ranks, rope_width, batch, capacities, dtype=torch.float32, device="cpu"):
        widths = [(text + rope_width, vision + rope_width) for text, vision in ranks]
        super().__init__(widths, batch, capacities, dtype, device)


# --------------------------------------------------------------------------- attention over latent rows

# When few tokens are new, their queries meet the cached rows themselves (`M2LA.attend_absorbed` says how): W
# columns are the key of all heads, and the first R of them are also the value. The reference comes first.

class Absorbed(NamedTuple):
    """The new tokens' queries as they meet cached rows of one modality."""
    q: torch.Tensor                      # (B,T,H,W)
    bias: torch.Tensor                   # (B,T,H) added to all scores of the modality, before they are scaled
    rank: int                            # the first so many columns of a row are its value
    sets: list                           # of RowSet, disjoint


class Attended(NamedTuple):
    """What the modalities have of the softmax over all rows."""
    latents: list                        # for each Σ p c, (B,T,H,R)
    shares: torch.Tensor                 # for each Σ p, (B,T,H,modalities)


def _attend_torch(parts, scale):
    """`latent_attend` in plain PyTorch: one softmax over the scores of all sets."""
    scores = []
    for part in parts:
        for found in part.sets:
            s = latent_scores(found.gather(part.q), found.gather(part.bias), found, scale)
            scores.append(found.spread(s))                                       # (B,T,H,n)
    p = torch.cat(scores, -1).softmax(-1)
    p = iter(p.split([s.shape[-1] for s in scores], -1))

    latents = []
    shares = []
    for part in parts:
        outs = []
        sums = []
        for found in part.sets:
            own = next(p)
            rows = found.rows[:, :found.high, :part.rank].to(own.dtype)
            met = found.gather(own)                                              # (B',T',H,n)
            out = torch.bmm(met.flatten(1, 2), rows)                             # (B',T'*H,R)
            outs.append(found.spread(out.view(*met.shape[:3], part.rank)))
            sums.append(own.sum(-1))
        latents.append(reduce(torch.add, outs))
        shares.append(reduce(torch.add, sums))
    return Attended(latents, torch.stack(shares, -1))


def latent_scores(q, bias, found, scale):
    """scale * (q·row + bias) of q (B',T',H,W), bias (B',T',H) and a RowSet -> (B',T',H,n), in fp32 or fp64."""
    dtype = torch.promote_types(found.rows.dtype, torch.float32)
    rows = found.rows[:, :found.high].to(dtype)                                  # no query sees more
    shape = q.shape[:3]
    q = q.flatten(1, 2).to(dtype)                                                # (B',M,W)
    bias = bias.flatten(1)[:, None].to(dtype)                                    # (B',1,M)
    # The rows come first: from memory, with few queries, this takes 0.6 of q @ rowsᵀ's time on a CPU.
    s = torch.baddbmm(bias, rows, q.mT, beta=scale, alpha=scale)                 # (B',n,M)
    s = s.mT.view(*shape, found.high)
    if not found.all_seen:
        unseen = torch.arange(found.high, device=q.device) >= found.limits[:, :, None]   # (B',T' or 1,n)
        # Added, which is ten times as fast as filled in; not -inf: padding may see nothing at all.
        s.add_(unseen[:, :, None].to(dtype), alpha=-1e30)
    return s


# The kernel's work on one sequence. A program takes BLOCK_M of the M = T*H query rows and one split of the
# cached rows: without splits the H queries of a new token would leave most of a GPU idle. It walks down its
# split BLOCK_N rows at a time; each block of rows is loaded once and used twice, as keys and as values.
#
#     queries (M,W)                         cached rows (N,W)
#     +------+------+------+------+         +------+------+------+------+
#     |      |      |      |      |         |      |      |      |      |  split 0: another program
#     +------+------+------+------+         +======+======+======+======+
#     |////////// BLOCK_M ////////|  meet   |////////// BLOCK_N ////////|  split 1: this program,
#     +------+------+------+------+         +------+------+------+------+           block after block
#     |      |      |      |      |         |      |      |      |      |
#     +------+------+------+------+         +======+======+======+======+
#       E      E      E      E              |      |      |      |      |  split 2: another program
#       PARTS parts of E columns            +------+------+------+------+
#                                           <- the first R: value ->
#                                           <- all W: key ------------->
#
# A tile is held as (PARTS, BLOCK, E): different warps get different parts. With one part, every warp would
# read all queries from shared memory for each block of rows, and that would take longer than loading the
# rows. The scores of the parts are summed. What is behind W, the split or M is masked.

if triton is not None:
    @triton.jit
    def _attend_kernel(
        Q,                          # (B,M,W) queries, contiguous
        ROWS,                       # (B,N,W) cached rows; those of a sequence are contiguous
        LIMITS,                     # (B,T) int32: rows that each new token sees
        OUT,                        # (B,M,splits,R) fp32, written: attention over the split
        LSE,                        # (B,M,splits) fp32, written: log-sum-exp of its scores
        M,                          # T*H query rows of a sequence
        H,                          # query heads: row m is of token m // H
        T,                          # new tokens
        scale,                      # of the scores
        batch_stride,               # values between two sequences of ROWS
        R: tl.constexpr,            # columns of a value
        W: tl.constexpr,            # columns of a key
        PARTS: tl.constexpr,        # parts of a row …
        E: tl.constexpr,            # … of so many columns: PARTS * E >= W
        BLOCK_M: tl.constexpr,      # query rows of a program
        BLOCK_N: tl.constexpr,      # cached rows at a time
        PRECISION: tl.constexpr,    # of fp32 products: "tf32", or "ieee" for exact ones
    ):
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        batch = tl.program_id(2).to(tl.int64)                    # addresses pass 2^31 at 2M tokens
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        # Columns of a tile, (PARTS,1,E).
        w = tl.arange(0, PARTS)[:, None, None] * E + tl.arange(0, E)[None, None, :]

        # The queries, (PARTS,BLOCK_M,E), and how many rows each of them sees, (BLOCK_M,).
        q = tl.load(Q + (batch * M + m[None, :, None]) * W + w, (m < M)[None, :, None] & (w < W), 0.0)
        limit = tl.load(LIMITS + batch * T + m // H, m < M, 0)

        # The split: an equal share, in whole blocks, of the rows that any of these queries sees.
        longest = tl.max(limit, 0)
        length = tl.cdiv(tl.cdiv(longest, splits), BLOCK_N) * BLOCK_N
        start = split * length
        stop = tl.minimum((split + 1) * length, longest)
        rows = ROWS + batch * batch_stride + start.to(tl.int64) * W

        # Softmax block by block, exact at every step: over the rows so far,
        #     best = max s,   total = Σ exp(s - best),   out = Σ exp(s - best) value
        best = tl.full([BLOCK_M], -1e30, tl.float32)             # not -inf: no inf - inf
        total = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([PARTS, BLOCK_M, E], tl.float32)
        for first in range(start, stop, BLOCK_N):
            # The next rows, (PARTS,BLOCK_N,E). What lies behind them may be NaN and is not loaded.
            token = first + n
            held = (token < stop)[None, :, None] & (w < W)
            row = tl.load(rows + n[None, :, None] * W + w, held, 0.0)

            # s = scale * q·row, the parts' products summed; -inf behind a limit. (BLOCK_M,BLOCK_N)
            products = tl.dot(q, tl.permute(row, 0, 2, 1), input_precision=PRECISION)
            seen = token[None, :] < limit[:, None]
            s = tl.where(seen, tl.sum(products, 0) * scale, float("-inf"))

            # new = max(best, max s)
            new = tl.maximum(best, tl.max(s, 1))
            # p = exp(s - new)
            p = tl.exp(s - new[:, None])
            # What was summed relative to best is now relative to new: times exp(best - new).
            shrink = tl.exp(best - new)
            best = new
            # total = total * shrink + Σ p
            total = total * shrink + tl.sum(p, 1)
            # out = out * shrink + Σ p value, for each part of the columns with the same p
            p = tl.broadcast_to(p.to(row.dtype)[None], PARTS, BLOCK_M, BLOCK_N)
            out = out * shrink[None, :, None] + tl.dot(p, row, input_precision=PRECISION)
            rows += BLOCK_N * W

        # out / total and log Σ exp(s) = best + log(total); where a query sees nothing, 0 and -inf.
        some = tl.where(total > 0, total, 1.0)
        place = (batch * M + m) * splits + split
        out = out / some[None, :, None]
        tl.store(OUT + place[None, :, None] * R + w, out, (m < M)[None, :, None] & (w < R))
        tl.store(LSE + place, tl.where(total > 0, best + tl.log(some), float("-inf")), m < M)


def kernel_launch(M, W, dtype):
    """How the kernel is compiled for M query rows of W columns: its constants, warps and stages.

    In 2 bytes: 64 KB of rows on their way while 64 KB are computed, and no register spilled on an H100 or
    H200 (a test compiles it; Triton before 3.9 needs smaller tiles). In 4 bytes: so that it fits."""
    parts = 8
    block_m = 16
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version >= (3, 9):
        parts = 4
        block_m = 32

    # Tiles are powers of two, and a dot wants 16 columns a part.
    wide = max(triton.next_power_of_2(W), 16 * parts)
    need(wide <= 1024,
         f"latent rows of {W} values: the Triton kernel holds at most 1024; use smaller ranks "
         "or backend='torch'")
    how = dict(PARTS=parts, E=wide // parts, num_warps=8)
    if dtype == torch.float32:
        return dict(how, BLOCK_M=16, BLOCK_N=16, num_stages=2, PRECISION="ieee")

    if M <= 16:
        block_m = 16
    block_n = 32 if wide > 512 else 64
    return dict(how, BLOCK_M=block_m, BLOCK_N=block_n, num_stages=3, PRECISION="tf32")


def _attend_triton(q, rows, limits, rank, scale, splits=None):
    """`latent_attend` by the kernel; splits: J, by default so many that they fill the GPU once."""
    B, T, H, W = q.shape
    M = T * H
    assert rows.stride()[1:] == (W, 1), "the rows of a sequence must lie one after the other"
    if q.is_cuda:
        how = kernel_launch(M, W, q.dtype)
        cores = torch.cuda.get_device_properties(q.device).multi_processor_count
    else:
        # The interpreter computes bf16 wrongly, so it gets fp32, but tiles as a GPU would have them for bf16.
        how = kernel_launch(M, W, torch.bfloat16)
        cores = 2
        q = q.float()
        rows = rows.float()

    # Splits depend on no length but the capacity: a CUDA graph can replay them. Each has 256 rows or more.
    blocks = triton.cdiv(M, how["BLOCK_M"])
    if splits is None:
        splits = min(cores // (B * blocks), triton.cdiv(rows.shape[1], 256))
        splits = max(1, splits)

    out = torch.empty(B, M, splits, rank, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, M, splits, dtype=torch.float32, device=q.device)
    grid = (blocks, splits, B)
    _attend_kernel[grid](q.contiguous(), rows, limits.int().contiguous(), out, lse, M, H, T, scale,
                         rows.stride(0), R=rank, W=W, **how)
    return out.view(B, T, H, splits, rank), lse.view(B, T, H, splits)


def _attend_by_kernel(parts, scale):
    """`latent_attend` by the kernel: each set on its own, then all are merged."""
    outs = []
    lses = []
    for part in parts:
        part_outs = []
        part_lses = []
        for found in part.sets:
            q = found.gather(part.q).to(found.rows.dtype)
            limits = found.limits.expand(q.shape[:2])
            out, lse = _attend_triton(q, found.rows, limits, part.rank, scale)
            part_outs.append(found.spread(out))
            part_lses.append(found.spread(lse))
        outs.append(torch.cat(part_outs, 3))                                     # (B,T,H,J,R)
        lses.append(torch.cat(part_lses, 3) + scale * part.bias[..., None])      # (B,T,H,J)

    shares = merge_shares(torch.cat(lses, -1))
    shares = shares.split([lse.shape[-1] for lse in lses], -1)
    latents = [(share[..., None, :] @ out).squeeze(-2) for share, out in zip(shares, outs)]
    return Attended(latents, torch.stack([share.sum(-1) for share in shares], -1))


def latent_attend(parts, scale, backend=None):
    """Attention over latent rows (§3.2): over all sets of all `parts`, Absorbed of each modality, as one -> Attended,
    in fp32, or fp64 of fp64.
    backend: "triton" (a GPU, or TRITON_INTERPRET=1 set before this file is imported), "torch" (the reference,
    on any device) or None: Triton on a GPU, else PyTorch."""
    q = parts[0].q
    if backend is None:
        backend = "triton" if q.is_cuda and triton is not None else "torch"
    run = _attend_by_kernel if backend == "triton" else _attend_torch
    if not torch.is_autocast_enabled(q.device.type):
        return run(parts, scale)
    with torch.autocast(q.device.type, enabled=False):               # both choose the precision of their sums
        return run(parts, scale)


def to_heads(x, heads):
    """x (B,T,H,E) -> (heads,B*T*H/heads,E): side by side, what belongs to each of so many (KV) heads."""
    B, T, H, E = x.shape
    x = x.reshape(B * T, heads, H // heads, E)
    return x.transpose(0, 1).reshape(heads, B * T * H // heads, E)


def from_heads(x, shape):
    """The reverse: x (heads,B*T*H/heads,E) -> (B,T,H,E), shape (B,T,H)."""
    B, T, H = shape
    heads, _, E = x.shape
    return x.reshape(heads, B * T, H // heads, E).transpose(0, 1).reshape(B, T, H, E)


# ---------------------------------------------------------------------------------------------- M²LA

class Latents(NamedTuple):
    """What M²LA makes of its input, not yet rotated."""
    q_nope: torch.Tensor                 # (B,H,T,Dh) content part of the queries
    q_rope: torch.Tensor                 # (B,H,T,P) RoPE part of the queries
    latents: list                        # (B,T,R) for each modality, made of every token
    k_rope: torch.Tensor                 # (B,T,P) the RoPE key that all heads share


class M2LA(Attention):
    """The source projections, plus an encoder in front of the cache and a decoder behind it (§3.2).

        k = k_norm(k_proj x), v = v_proj x       exact QK-norm
        row = encode([k; v]) = [c_m | k_rope]    c_m: latent of the token's modality m; k_rope: RoPE key of
                                                 all heads, its slot s turning with frequency slots[s]
        [k_nope; v] = decode_m(c_m)              rebuilt for each KV head, never cached
        [q_nope | q_rope] = q_h query_h          score = scale * (q_nope·k_nope + RoPE(q_rope)·RoPE(k_rope))

    All maps are trainable; `convert_layer` computes them so that the layer starts near its source."""

    def __init__(self, hidden, heads, kv_heads, head_dim, eps, rope_width, ranks):
        super().__init__(hidden, heads, kv_heads, head_dim, eps)
        self.rope_width = rope_width
        self.ranks = tuple(ranks)
        width = 2 * kv_heads * head_dim
        self.query = nn.Parameter(torch.empty(heads, head_dim, head_dim + rope_width))
        nn.init.normal_(self.query, std=head_dim ** -0.5)
        self.encode = nn.Linear(width, sum(ranks) + rope_width)          # -> [c_text | c_vision | k_rope]
        self.decode = nn.ModuleList(nn.Linear(rank, width) for rank in ranks)        # text, vision
        slots = [slot % (head_dim // 2) for slot in range(rope_width // 2)]
        self.register_buffer("slots", torch.tensor(slots))               # the frequency of each slot, (S,)

    def maps(self, x):
        """x (B,T,D) -> Latents."""
        q, k, v = self.project(x)
        q_maps = torch.bmm(to_heads(q, self.heads), self.query)                  # (H,B*T,Dh+P)
        q = from_heads(q_maps, q.shape[:3]).transpose(1, 2)                      # (B,H,T,Dh+P)
        q_nope, q_rope = q.split([self.head_dim, self.rope_width], -1)
        rows = self.encode(torch.cat([k, v], 2).flatten(2))                      # (B,T,R+R+P)
        *latents, k_rope = rows.split([*self.ranks, self.rope_width], -1)
        return Latents(q_nope, q_rope, latents, k_rope)

    def decoders(self):
        """Per modality, weight (2*G*Dh,R) and bias (2*G*Dh,): latent -> [k_nope | v] of all KV heads."""
        return [(decode.weight, decode.bias) for decode in self.decode]

    def forward(self, x, rope, vision, mask=None, cache=None, layer=0):
        """As GQA.forward."""
        q_nope, q_rope, latents, k_rope = self.maps(x)

        # RoPE: slot s turns with frequency slots[s], in the queries of all heads and in the one key.
        cos, sin = (r[..., self.slots] for r in rope)                            # (B,T,S)
        q_rope = rotate(q_rope, cos[:, None], sin[:, None])
        k_rope = rotate(k_rope, cos, sin)

        if cache is not None:
            # A row for either segment; the cache keeps that of the token's modality.
            for segment in cache.growing:
                cache.append(layer, segment, torch.cat([latents[segment], k_rope], -1))
            if cache.few and not cache.fresh:
                return self.o_proj(self.attend_absorbed(q_nope, q_rope, cache, layer))

        # Keys and values of the new tokens, each by the decoder of its modality.
        text, sight = (F.linear(c, *decoder) for c, decoder in zip(latents, self.decoders()))
        kv = torch.where(vision[..., None], sight, text)                         # (B,T,2*G*Dh)
        kv = kv.unflatten(2, (2, self.kv_heads, self.head_dim))
        k_nope, v = kv.permute(2, 0, 3, 1, 4)                                    # (B,G,T,Dh) each

        # Each KV head has its own content key and the RoPE key of all.
        k_rope = k_rope[:, None].expand(-1, self.kv_heads, -1, -1)               # (B,G,T,P)
        k = torch.cat([k_nope, k_rope], -1)                                      # (B,G,T,Dh+P)
        q = torch.cat([q_nope, q_rope], -1)                                      # (B,H,T,Dh+P)
        if cache is None:
            out = attend(q, k, v, mask, self.scale)
        elif cache.fresh:
            out = attend_new(q, k, v, cache, self.scale)
        else:
            out = self.attend_rebuilt(q, k, v, cache, layer)
        return self.o_proj(out)

    def attend_rebuilt(self, q, k, v, cache, layer):
        """Many new tokens, q (B,H,T,Dh+P), k, v (B,G,T,·), against themselves and all that was cached, whose keys
        and values are rebuilt -> (B,T,H*Dh). One KV head at a time: of all heads they would be four times as large
        as the layer's rows."""
        outs = []
        for g, queries in enumerate(q.chunk(self.kv_heads, 1)):                  # (B,H/G,T,Dh+P)
            own = slice(g, g + 1)
            sets = [new_share(queries, k[:, own], v[:, own], cache, self.scale)]
            for held in cache.earlier:
                sets.append(held.attend(queries, *self.rebuilt(held, layer, g), self.scale))
            outs.append(merged(sets))
        return torch.cat(outs, -1)

    def rebuilt(self, held, layer, g):
        """Keys (B',1,N,Dh+P) and values (B',1,N,Dh) of KV head g from cached rows, the segments side by side."""
        keys = []
        values = []
        for (weight, bias), rank, rows in zip(self.decoders(), self.ranks, held.view(layer)):
            # One segment's rows (B',N,R+P), by its decoder: weight (2*Dh,R), bias (2*Dh,) of this head.
            weight = weight.unflatten(0, (2, self.kv_heads, -1))[:, g].flatten(0, 1)
            bias = bias.unflatten(0, (2, self.kv_heads, -1))[:, g].flatten()
            k_nope, v = F.linear(rows[..., :rank], weight, bias).chunk(2, -1)
            keys.append(torch.cat([k_nope, rows[..., rank:]], -1))
            values.append(v)
        return torch.cat(keys, 1)[:, None], torch.cat(values, 1)[:, None]

    def attend_absorbed(self, q_nope, q_rope, cache, layer):
        """Few new tokens: queries meet the cached rows themselves -> (B,T,H*Dh).

        As k_nope = U c + b, q_nope·k_nope = (Uᵀ q_nope)·c + q_nope·b: the decoder is absorbed into the query.
        And as v = U' c + b', U' is applied once, to the attended latent. q_nope·b is in all scores of a modality."""
        q_nope = to_heads(q_nope.transpose(1, 2), self.kv_heads)                 # (G,B*T*H/G,Dh)
        q_rope = q_rope.transpose(1, 2)                                          # (B,T,H,P)
        shape = q_rope.shape[:3]

        # The modalities that have rows, and their decoders by KV head.
        sets = []
        ups = []                                                                 # (2,G,Dh,R) each
        biases = []
        for segment, (weight, bias) in enumerate(self.decoders()):
            found = cache.sets(layer, segment)
            if found:
                sets.append(found)
                ups.append(weight.view(2, self.kv_heads, self.head_dim, -1))
                biases.append(bias.view(2, self.kv_heads, self.head_dim))
        bias_k, bias_v = torch.stack(biases, -1)                                 # (G,Dh,modalities) each

        # Uᵀ q_nope beside q_rope meets [c | k_rope].
        bias_scores = from_heads(torch.bmm(q_nope, bias_k), shape).unbind(-1)    # (B,T,H) each
        parts = []
        for (up_k, _), bias_score, found in zip(ups, bias_scores, sets):
            q_latent = from_heads(torch.bmm(q_nope, up_k), shape)                # (B,T,H,R)
            q_row = torch.cat([q_latent, q_rope], -1)                            # (B,T,H,W)
            parts.append(Absorbed(q_row, bias_score, up_k.shape[2], found))

        # v = (Σ p) b' + U' (Σ p c), each summed over modalities.
        latents, shares = latent_attend(parts, self.scale)
        shares = to_heads(shares.to(bias_v.dtype), self.kv_heads)                # (G,B*T*H/G,modalities)
        values = torch.bmm(bias_v, shares.mT)                                    # (G,Dh,B*T*H/G)
        for latent, (_, up_v) in zip(latents, ups):
            latent = to_heads(latent.to(up_v.dtype), self.kv_heads)              # (G,B*T*H/G,R)
            # Here too the larger matrix comes first.
            values = torch.baddbmm(values, up_v, latent.mT)
        return from_heads(values.mT, shape).flatten(2)

    def fold(self):
        """This layer in the form of the released one (§3.2): `Released.of`."""
        return Released.of(self)


# ------------------------------------------------------------------------ the released layer and fold

# --attn released: choices of ConvertSpec (below) that `fold` multiplies out to the authors' layer. Its norms
# are linear, it has every frequency once and one decoder and rank for all; healing would break that.
FOLDABLE = dict(qk_norm="affine", slots="uniform", modality="shared", budget="uniform", heal=0)


class Released(M2LA):
    """The released layer, §3.2 (its names and shapes), M²LA with linear maps only: both modalities share rank and
    decoder, every query head has a decoder of its own, and RoPE pairs lie side by side: re, im, re, im, …"""

    def __init__(self, hidden, heads, head_dim, rope_width, rank):
        nn.Module.__init__(self)
        self.hidden = hidden
        self.heads = heads
        self.kv_heads = heads
        self.head_dim = head_dim
        self.rope_width = rope_width
        self.ranks = (rank, rank)
        self.scale = (head_dim + rope_width) ** -0.5
        self.q_proj = nn.Linear(hidden, heads * (head_dim + rope_width))         # per head [nope | rope]
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + rope_width)           # [c | k_rope]
        self.kv_b_proj = nn.Linear(rank, heads * 2 * head_dim, bias=False)       # per head [k_nope | v]
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.slots = slice(None)                                                 # every frequency, once

    def maps(self, x):
        q = self.q_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)        # (B,H,T,Dh+P)
        row = self.kv_a_proj_with_mqa(x)
        c, k_rope = row.split([self.ranks[0], self.rope_width], -1)
        # re, im, re, im, … -> all re, then all im, as `rotate` wants them.
        halves = [*range(0, self.rope_width, 2), *range(1, self.rope_width, 2)]
        q_rope = q[..., self.head_dim:][..., halves]
        return Latents(q[..., :self.head_dim], q_rope, [c, c], k_rope[..., halves])

    def decoders(self):
        # Rows of kv_b_proj are [k_nope | v] of one head after the other; ours all k_nope, then all v.
        weight = self.kv_b_proj.weight.unflatten(0, (self.heads, 2, -1)).transpose(0, 1).flatten(0, 2)
        bias = torch.zeros_like(weight[:, 0])
        return [(weight, bias)] * 2

    @staticmethod
    @torch.no_grad()
    def of(layer):
        """An M2LA layer in this form, all maps multiplied out: same output. UserError if that cannot be."""
        H, G, Dh, P = layer.heads, layer.kv_heads, layer.head_dim, layer.rope_width
        text, vision = layer.decode
        shared = torch.equal(text.weight, vision.weight) and not text.bias.any() and not vision.bias.any()
        linear = isinstance(layer.k_norm, nn.Identity)
        once = layer.slots.tolist() == list(range(Dh // 2))
        need(shared and linear and once,
             f"fold: this layer does not fit into the released layout; convert with rope_width={Dh}, "
             "slots='uniform', modality='shared', heal=0 and qk_norm='affine' or 'const'")
        new = Released(layer.hidden, H, Dh, P, layer.ranks[0]).to(layer.o_proj.weight)

        # With linear norms every map is affine in x, f(x) = W x + b, known by those of 0, e_1, …, e_D.
        x = torch.eye(layer.hidden + 1)[None, :, 1:].to(layer.o_proj.weight).double()        # (1,1+D,D)
        q_nope, q_rope, (c, _), k_rope = copy.deepcopy(layer).double().maps(x)

        # Halves -> re, im, re, im, …; and the released layer scales its scores by (Dh+P)^-½, ours by Dh^-½.
        pairs = torch.arange(P).view(2, -1).T.flatten()
        q = torch.cat([q_nope, q_rope[..., pairs]], -1) * ((Dh + P) / Dh) ** 0.5     # (1,H,1+D,Dh+P)
        rows = torch.cat([c, k_rope[..., pairs]], -1)                            # (1,1+D,R+P)
        set_affine(new.q_proj, q[0].transpose(0, 1).flatten(1))
        set_affine(new.kv_a_proj_with_mqa, rows[0])

        # One decoder per query head: that of its KV head. (2*G*Dh,R) -> (H,2,Dh,R)
        up = text.weight.view(2, G, Dh, -1).repeat_interleave(H // G, 1)
        new.kv_b_proj.weight.copy_(up.transpose(0, 1).flatten(0, 2))
        new.o_proj.weight.copy_(layer.o_proj.weight)
        return new


def set_affine(linear, outputs):
    """Sets a Linear to the affine map of these outputs (1+D,·) at 0, e_1, …, e_D: b, then W e_d + b."""
    bias = outputs[0]
    linear.weight.copy_((outputs[1:] - bias).mT)
    linear.bias.copy_(bias)


# -------------------------------------------------------------------------------------- calibration

class Moments:
    """What calibration keeps of one layer: sums, in fp64, of one size whatever the number of tokens.
    z (Z,) is [k; v] of all KV heads before RoPE; with `raw`, which linear norms are fitted to, [k; v; u; 1],
    u the keys before their norm."""

    def __init__(self, gqa, raw=False):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=gqa.k_proj.weight.device)
        H, L = gqa.heads, gqa.head_dim // 2
        key_width = gqa.kv_heads * gqa.head_dim
        width = 3 * key_width + 1 if raw else 2 * key_width                      # Z
        self.count = zeros(2)                                # by modality: tokens,
        self.first = zeros(2, width)                         # Σ z
        self.second = zeros(2, width, width)                 # and Σ z zᵀ
        self.query = zeros(H, gqa.head_dim, gqa.head_dim)    # Σ q qᵀ of each query head, before RoPE
        self.turn = zeros(2, H, L)                           # how far RoPE turns pairs of tokens, re and im:
        self.energy = zeros(H, L)                            # … `Calibration.add_turns`
        self.seen = zeros(2)                                 # Σ n and Σ n² of the tokens n that a query sees
        if raw:                                              # Σ y yᵀ of y = [q; q before its norm; 1]
            self.raw_query = zeros(H, 2 * gqa.head_dim + 1, 2 * gqa.head_dim + 1)

    def statistics(self, modality=None):
        """Mean (Z,) and centred covariance (Z,Z) of z; None = both modalities."""
        pick = slice(None) if modality is None else slice(modality, modality + 1)
        count = self.count[pick].sum()
        mean = self.first[pick].sum(0) / count
        second = self.second[pick].sum(0) / count
        return mean, second - mean[:, None] * mean


class Calibration:
    """with Calibration([layer.self_attn, …]) as calibration: ordinary forwards -> .moments, one per layer.
    Use samples as long as the model will meet (mean turns and slots depend on distances) and at least 10*R tokens
    of each modality. For padded batches set calibration.valid, (B,T) bool, before each forward. raw=True also
    keeps what ConvertSpec.qk_norm other than "exact" needs."""

    def __init__(self, modules, raw=False):
        self.modules = list(modules)
        self.valid = None
        self.raw = raw
        self.moments = [Moments(module, raw) for module in self.modules]

    def __enter__(self):
        def hook(module, args, kwargs):
            self.add(self.moments[self.modules.index(module)], module, *args, **kwargs)
        self.hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in self.modules]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def add(self, moments, gqa, x, rope, vision, mask=None, cache=None, layer=0):
        """The arguments of one GQA.forward into the layer's moments."""
        need(cache is None, "calibration needs forwards without a cache: it looks at whole samples")
        if isinstance(mask, Blocks):
            mask = mask.mask
        valid = torch.ones_like(vision) if self.valid is None else self.valid

        q, k, v = gqa.project(x)
        z = torch.cat([k, v], 2).flatten(2)                                      # (B,T,2*G*Dh)
        if self.raw:
            u = gqa.k_proj(x)                                                    # (B,T,G*Dh)
            one = torch.ones_like(q[..., :1])                                    # (B,T,H,1)
            z = torch.cat([z, u, one[:, :, 0]], 2)
            y = torch.cat([q, gqa.q_proj(x).view_as(q), one], 3)
            y = y[valid].double()                                                # (n,H,2Dh+1)
            moments.raw_query += torch.einsum("nhd,nhe->hde", y, y)

        for modality in range(2):
            own = valid & (vision == bool(modality))
            rows = z[own].double()                                               # (n,Z)
            moments.count[modality] += len(rows)
            moments.first[modality] += rows.sum(0)
            moments.second[modality] += rows.mT @ rows

        rows = q[valid].double()                                                 # (n,H,Dh)
        moments.query += torch.einsum("nhd,nhe->hde", rows, rows)
        self.add_turns(moments, gqa, q, k, rope, mask, valid)

    def add_turns(self, moments, gqa, q, k, rope, mask, valid):
        """By how much RoPE turns a pair of tokens, on average:
            α_{h,l} = Σ w |q_l|² |k_l|² e^{iθ_l Δ} / Σ w |q_l|² |k_l|²,   Δ = p_key - p_query,
        w = ½ attention weight + ½ uniform over what the query sees. `turn`, `energy`: the two sums."""
        B, T, H, _ = q.shape
        sharing = H // k.shape[2]
        cos, sin = (r.float()[:, :, None] for r in rope)                         # (B,T,1,L)
        if mask is None:
            mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device).tril()

        # For the attention weights.
        q_turned = rotate(q.float(), cos, sin)                                   # (B,T,H,Dh)
        k_turned = rotate(k.float(), cos, sin).transpose(1, 2)
        k_turned = k_turned.repeat_interleave(sharing, 1)                        # (B,H,T,Dh)

        # |q_l|², 0 for padding, and |k_l|².
        q_power = frequency_power(q) * valid[:, :, None, None]                   # (B,T,H,L)
        k_power = frequency_power(k)                                             # (B,T,G,L)

        # What is summed over the keys: re and im of |k_l|² e^{iθ_l p_key}, and |k_l|² itself. Side by side,
        # so that one product sums all three and reads the large weights (B,H,t,T) once.
        keys = torch.stack([k_power * cos, k_power * sin, k_power], 3)           # (B,T,G,3,L)
        keys = keys.flatten(3).transpose(1, 2)
        keys = keys.repeat_interleave(sharing, 1)                                # (B,H,T,3L)

        for start in range(0, T, 512):      # query blocks: bounded memory
            part = slice(start, start + 512)
            seen = mask[:, :, part]                                              # (B,1,t,T)
            count = seen.sum(-1, keepdim=True)                                   # (B,1,t,1)

            # w = ½ attention weight + ½ uniform, (B,H,t,T).
            score = q_turned[:, part].transpose(1, 2) @ k_turned.mT * gqa.scale
            weight = score.masked_fill(~seen, -1e9).softmax(-1)
            weight = (weight + seen / count.clamp_min(1)) / 2

            # Tokens that a query sees.
            n = count.expand(B, 1, -1, 1)[:, 0, :, 0]                            # (B,t)
            n = n[valid[:, part]].double()
            moments.seen += torch.stack([n.sum(), n.square().sum()])

            # Sums over keys, times |q_l|².
            sums = (weight @ keys).transpose(1, 2).unflatten(-1, (3, -1))        # (B,t,H,3,L)
            sums = sums * q_power[:, part, :, None]
            re, im, energy = sums.double().unbind(3)                             # (B,t,H,L)

            # (re + i im) e^{-iθ_l p_query}
            c = cos[:, part].double()
            s = sin[:, part].double()
            turn = torch.stack([re * c + im * s, im * c - re * s])               # (2,B,t,H,L)
            moments.turn += turn.sum((1, 2))
            moments.energy += energy.sum((0, 1))


def frequency_power(x):
    """|x_l|² of each RoPE frequency, re² + im²: (…,2L) -> (…,L), fp32."""
    return x.float().unflatten(-1, (2, -1)).square().sum(-2)


@torch.no_grad()
def calibrate(model, batches, raw=False):
    """Runs the model (iv3.InternVideo3, with GQA layers) over calibration batches -> Calibration.

    batches: dicts as iv3.collate or train.collate_packs make them, on any device: ids, positions, patches,
    grids, valid, and mask where samples are packed. Processes have their own; all get the sums."""
    layers = model.language_model.layers
    with Calibration([layer.self_attn for layer in layers], raw) as calibration:
        for batch in batches:
            batch = {name: value.to(model.device) for name, value in batch.items()}
            calibration.valid = batch["valid"]
            model(batch["ids"], batch["positions"], batch["patches"], batch["grids"], mask=batch.get("mask"))

    if dist.is_initialized():
        for moments in calibration.moments:
            for total in vars(moments).values():
                dist.all_reduce(total)
    return calibration


# ------------------------------------------------------------------------- conversion: what to choose

@dataclass
class ConvertSpec:
    """What a GQA layer becomes. Defaults are the best measured choices; the others are there to compare."""
    rope_width: int                      # P, even; 2 values per complex slot
    ranks: tuple                         # (R_text, R_vision), or one such pair per layer
    qk_norm: Literal["exact", "affine", "const"] = "exact"       # not exact: Global-Norm-Linear (§3.2.3)
    rope_basis: Literal["unitary", "real"] = "unitary"           # matrices across heads at one frequency
    slots: Literal["realloc", "uniform"] = "realloc"             # uniform: as many for each frequency
    gain: Literal[True, False] = True    # content queries times conj(α), RoPE's mean (add_turns)
    metric: Literal["qa", "balance", "identity"] = "qa"          # queries and W_o | K against V | plain PCA
    modality: Literal["segments", "adapters", "shared"] = "segments"     # the last two: one basis for both
    budget: Literal["measured", "energy", "uniform"] = "measured"        # who gets the ranks: `greedy_ranks`
    step: int = 16                       # … in multiples of this
    heal: int = 100                      # steps of `heal`, if the converted model is damaged by more than …
    tolerance: float = 0.05              # … nats per answer token
    length: int = 0                      # tokens the model is meant for; 0: not compared with calibration

    def __post_init__(self):
        for f in fields(self):
            allowed = get_args(f.type)                                           # of the Literal ones
            value = getattr(self, f.name)
            need(not allowed or value in allowed, f"ConvertSpec {f.name}={value!r}: use one of {allowed}")
        P = self.rope_width
        need(isinstance(P, int) and P >= 2 and P % 2 == 0,
             f"ConvertSpec rope_width={P!r}: use an even number from 2 on")
        need(isinstance(self.heal, int) and self.heal >= 0,
             f"ConvertSpec heal={self.heal!r}: use a number of steps, 0 for none")
        self.ranks = checked_ranks(self.ranks)

    def layer_ranks(self, layer):
        """(R_text, R_vision) of one layer."""
        if isinstance(self.ranks[0], int):
            return self.ranks
        need(layer < len(self.ranks),
             f"ConvertSpec ranks: {len(self.ranks)} pairs given, but layer {layer} is to be converted: "
             "give one pair per layer")
        return self.ranks[layer]


def checked_ranks(given):
    """ConvertSpec.ranks as tuples of ints: one pair, or a pair per layer (or lists, as in JSON)."""
    try:
        ranks = torch.tensor(given)
        pairs = ranks.dtype == torch.long and ranks.dim() in (1, 2) and ranks.shape[-1] == 2
        good = pairs and ranks.min() > 0
    except (TypeError, ValueError):                          # not numbers, or lists of different length
        good = False
    need(good, f"ConvertSpec ranks={given!r}: use (text, vision), two positive numbers, or a list of "
               "such pairs, one per layer")
    return tuple(ranks.tolist()) if ranks.dim() == 1 else tuple(map(tuple, ranks.tolist()))


# ---------------------------------------------------------------- conversion: the RoPE part (§3.2.1)

class RopeSplit(NamedTuple):
    """What `rope_split` finds: the shared RoPE key, and how queries meet it and the rest."""
    encode: torch.Tensor                 # (P,G*Dh) keys of all heads -> shared RoPE key
    decode: torch.Tensor                 # (G*Dh,P) and back: what of the keys it holds
    query: torch.Tensor                  # (H,Dh,Dh+P) q of a head -> [q_nope | q_rope]
    slots: torch.Tensor                  # (S,) the frequency that each slot turns with


def rope_split(gqa, moments, spec):
    """The shared RoPE key (§3.2.1) -> RopeSplit.

    A key's frequency l is one complex number κ_g per KV head, and RoPE multiplies all of them by the same
    e^{iθp}. So M (e^{iθp} κ) = e^{iθp} (M κ) for *any* complex matrix M across heads: keys may be mixed before
    they are rotated. The best M has the eigenvectors u of E[wκ (wκ)ᴴ] as rows, one a slot s of frequency l:
        k_rope[s] = Σ_g conj(u_sg) w_g κ_g,   κ_g ≈ Σ_s (u_sg / w_g) k_rope[s],   q_rope[s] = q conj(u_sg / w_g)
    What is left, k_nope = k - decode encode k, is content. Its score Re(conj(q) κ e^{iθΔ}) is replaced by its
    mean over the distances of calibration, e^{iθΔ} -> α (`add_turns`): its query is multiplied by the gain
    (`ConvertSpec.gain`), q_nope = conj(α) q. That errs by
    E|e^{iθΔ} - α|² = 1 - |α|², so w_g² = Σ_{h∈g} E|q|² (1 - |α|²) is the harm of leaving (g,l) there, and the
    S slots of largest eigenvalue are kept, of whatever frequency. Published methods (slots="uniform") keep as
    many for each frequency and look at the keys' energy alone (w = 1)."""
    key_width = gqa.kv_heads * gqa.head_dim
    alpha = torch.complex(*moments.turn) / moments.energy.clamp_min(1e-30)       # (H,L)
    w = harm_of_content(gqa, moments, alpha)                                     # (L,G)
    if spec.slots == "uniform":
        w = torch.ones_like(w)

    # Eigenvectors of E[wκ (wκ)ᴴ] at each frequency: value (L,G), ascending, vector (L,G,G).
    C = key_covariance(gqa, moments)                                             # (L,G,G)
    if spec.rope_basis == "real":                            # as published: the best rotation, without phases
        C = C.real.to(C.dtype)
    value, vector = torch.linalg.eigh(w[:, :, None] * C * w[:, None])

    # Each slot's frequency l (S,), eigenvector u (S,G) and weights w (S,G).
    slot = chosen_slots(value, gqa.head_dim, spec)
    l = slot // gqa.kv_heads
    u = vector[l, :, slot % gqa.kv_heads]
    w = w[l]

    # As complex weights (S,G): a slot's encoder has length 1, its decoder the inverse factor. The product is
    # the same, and cached slots are about as large as keys. Then as real matrices: the transpose of
    # complex_map(z) is the map of conj(z) the other way, so conj and .mT together leave the decoder.
    encode = u.conj() * w
    decode = u / w
    size = torch.linalg.vector_norm(encode, dim=1, keepdim=True)
    encode = complex_map(encode / size, l, key_width)                            # (P,G*Dh)
    decode = complex_map((decode * size).conj(), l, key_width).mT                # (G*Dh,P)

    # conj(α) q = (a re + b im) + i (a im - b re), of α = a + ib and q = re + i im, as a matrix (H,Dh,Dh) that rows
    # [re | im] are multiplied by. With gain=False α is 1 here; the slots were chosen with it.
    if not spec.gain:
        alpha = torch.ones_like(alpha)
    a = torch.diag_embed(alpha.real)                                             # (H,L,L)
    b = torch.diag_embed(alpha.imag)
    from_re = torch.cat([a, -b], 2)                                              # (H,L,Dh)
    from_im = torch.cat([b, a], 2)
    mean_rope = torch.cat([from_re, from_im], 1)

    # q_rope by (H,Dh,P): q·(decode k_rope) = (decodeᵀ q)·k_rope, with the decoder of the query's KV head.
    q_rope = decode.view(gqa.kv_heads, gqa.head_dim, -1)
    q_rope = q_rope.repeat_interleave(gqa.heads // gqa.kv_heads, 0)
    return RopeSplit(encode, decode, torch.cat([mean_rope, q_rope], 2), l)


def harm_of_content(gqa, moments, alpha):
    """w (L,G), w² the harm of an error of |κ|² = 1 when a KV head's frequency is treated as content:
    w_g² = Σ_{h∈g} E|q|² (1 - |α|²). Floors keep all of it invertible."""
    tokens = moments.count.sum()
    power = moments.query.diagonal(dim1=1, dim2=2)                               # (H,Dh) Σ q², [re | im]
    power = power.unflatten(1, (2, -1)).sum(1) / tokens                          # (H,L) E|q|²
    harm = power * (1 - alpha.abs().square()).clamp_min(1e-4)
    harm = harm.unflatten(0, (gqa.kv_heads, -1)).sum(1)                          # (G,L)
    return harm.clamp_min(1e-12).sqrt().mT


def key_covariance(gqa, moments):
    """E[κ κᴴ] (L,G,G) across KV heads at each frequency, of the keys κ = re + i im."""
    G, L = gqa.kv_heads, gqa.head_dim // 2
    key_width = G * gqa.head_dim
    keys = moments.second.sum(0)[:key_width, :key_width] / moments.count.sum()
    keys = keys.view(G, 2, L, G, 2, L)
    # Only pairs of one frequency: (G,2,G,2,L), then four real blocks (L,G,G), E[re re'] and so on.
    keys = keys.diagonal(dim1=2, dim2=5).permute(4, 0, 2, 1, 3)                  # (L,G,G,2,2)
    re_re = keys[..., 0, 0]
    re_im = keys[..., 0, 1]
    im_re = keys[..., 1, 0]
    im_im = keys[..., 1, 1]
    # (re + i im)(re' - i im') = re re' + im im' + i (im re' - re im')
    return torch.complex(re_re + im_im, im_re - re_im)


def chosen_slots(value, head_dim, spec):
    """value (L,G) ascending for each frequency -> the S slots that are kept: l * G + j for eigenvector j."""
    S = spec.rope_width // 2
    if spec.slots == "realloc":
        return value.flatten().topk(S).indices.sort().values                     # the S largest of all
    need(spec.rope_width % head_dim == 0,
         f"ConvertSpec slots='uniform': rope_width={spec.rope_width} must be a multiple of "
         f"the head dim {head_dim}; or use slots='realloc'")
    L, G = value.shape
    slot = torch.arange(L * G, device=value.device).view(L, G)
    return slot[:, -(S // L):].flatten()                     # the largest of each frequency


def complex_map(weight, columns, width):
    """Complex weights (S,G), slot s taking frequency columns[s] of every head -> the real matrix (2S,width)
    that does the same to vectors in halves: slots as [re | im], each of the G heads as [re | im]."""
    S, G = weight.shape
    L = width // (2 * G)
    z = F.one_hot(columns, L)[:, None] * weight[:, :, None]                      # (S,G,L)
    # (a + ib)(re + i im): slot's half, S, head, head's half, L.
    matrix = z.real.new_empty(2, S, G, 2, L)
    matrix[0, :, :, 0] = z.real                                                  # re <- re
    matrix[0, :, :, 1] = -z.imag                                                 # re <- im
    matrix[1, :, :, 0] = z.imag                                                  # im <- re
    matrix[1, :, :, 1] = z.real                                                  # im <- im
    return matrix.reshape(2 * S, width)


# ------------------------------------------------------------- conversion: the content part (§3.2.1)

class ContentMap(NamedTuple):
    """What `content_pca` finds for one modality: [k; v] -> latent -> [k_nope; v]."""
    eigenvalues: torch.Tensor            # Λ, (2*G*Dh,), descending: the cost of leaving each direction out
    down: torch.Tensor                   # (R,2*G*Dh) encoder …
    down_bias: torch.Tensor              # … (R,)
    up: torch.Tensor                     # (2*G*Dh,R) decoder …
    up_bias: torch.Tensor                # … (2*G*Dh,)


def content_pca(gqa, moments, spec, split, modality, rank=None):
    """The latent of the content x = [k_nope; v] (§3.2.1) -> ContentMap; rank None = all of it.

    Joint PCA that minimises E|A (x - x')|², where A² = `error_metric` says what the layer makes of an error:
        A Cov(x) A = U Λ Uᵀ,   c = U_Rᵀ A (x - mean),   x' = A⁻¹ U_R c + mean
    x is linear in what calibration kept, z (`Moments`): x = nope z. (In this section x is the content, not the
    layer's input.) "segments": each modality has its own mean and basis, if 10*R tokens of it were seen, else
    those of both together. "shared": one basis, around 0: no bias; "adapters": that, then `modality_adapter`."""
    key_width = gqa.kv_heads * gqa.head_dim
    width = moments.first.shape[1]                                               # Z

    # x = nope z: what the RoPE key holds, decode encode k, is left out of the keys. (2*G*Dh,Z)
    rope = F.pad(split.decode @ split.encode, (0, width - key_width, 0, key_width))
    nope = torch.eye(2 * key_width, width).to(rope) - rope

    # Mean and covariance of x: of the modality, or of both, then around 0.
    enough = moments.count[modality] >= 10 * (rank or 1)
    own = modality if spec.modality == "segments" and enough else None
    mean, cov = moments.statistics(own)
    mean, cov = nope @ mean, nope @ cov @ nope.mT
    if spec.modality != "segments":
        cov = cov + mean[:, None] * mean
        mean = torch.zeros_like(mean)

    # A and its inverse, a block for the key and the value of each KV head. (2*G*Dh,2*G*Dh)
    form = error_metric(gqa, moments, split.query[..., :gqa.head_dim], cov, spec.metric)
    value, vector = torch.linalg.eigh(form)                                      # (2G,Dh), (2G,Dh,Dh)
    root = value.sqrt()[:, None]                                                 # (2G,1,Dh)
    A = torch.block_diag(*((vector * root) @ vector.mT))
    inverse = torch.block_diag(*((vector / root) @ vector.mT))

    # PCA of A x; eigh is ascending, the last R eigenvectors are U_R.
    value, vector = torch.linalg.eigh(A @ cov @ A)
    basis = vector.flip(1)[:, :rank]                                             # (2*G*Dh,R)
    to_latent = basis.mT @ A                                                     # x - mean -> c
    down = to_latent @ nope                                                      # z -> c
    down_bias = -to_latent @ mean
    up = inverse @ basis
    if spec.modality == "adapters" and enough:
        # Linear norms (below) leave the source's keys in z = [k; v; exact k; 1]: the decoder then aims at exact k
        # less what the RoPE key holds of k, and so makes good what the linear norm lost.
        target = nope.clone()
        if spec.qk_norm != "exact":
            eye = torch.eye(key_width).to(rope)
            target[:key_width, 2 * key_width:3 * key_width] += eye               # + exact k
            target[:key_width, :key_width] -= eye                                # - k
        up, mean = modality_adapter(moments.statistics(modality), to_latent @ target, down, up)
    return ContentMap(value.flip(0), down[:, :2 * key_width], down_bias, up, mean)


def error_metric(gqa, moments, mean_rope, cov, metric):
    """What an error e of x = [k_nope; v] costs, as a form (2G,Dh,Dh) on each KV head's key and value. "qa":
    in a key Σ_h E[(q_nope·e)²], in a value Σ_h |W_o e|², each relative to its total, which also balances keys
    against values. mean_rope (H,Dh,Dh): q -> q_nope; cov (2*G*Dh,2*G*Dh) of x."""
    G, Dh = gqa.kv_heads, gqa.head_dim
    eye = torch.eye(Dh).to(cov)
    form = eye.expand(2, G, Dh, Dh)
    if metric == "identity":
        return form.flatten(0, 1)

    if metric == "qa":
        # By query head, (H,Dh,Dh): E[q_nope q_nopeᵀ] and W_oᵀ W_o. A KV head sums over its own.
        of_keys = mean_rope.mT @ (moments.query / moments.count.sum()) @ mean_rope
        w_o = gqa.o_proj.weight.double().unflatten(1, (gqa.heads, Dh))           # (D,H,Dh)
        of_values = torch.einsum("ohd,ohe->hde", w_o, w_o)
        form = torch.stack([of_keys, of_values]).unflatten(1, (G, -1)).sum(2)    # (2,G,Dh,Dh)
        # Invertible, also where no query looks.
        form = form + 1e-8 * trace(form) / (G * Dh) * eye

    # Relative to the cost of leaving all keys, all values out: tr(form cov) of a head's own block of cov.
    # (The last term: a layer whose keys or values are all 0.)
    blocks = cov.view(2 * G, Dh, 2 * G, Dh).diagonal(dim1=0, dim2=2)             # (Dh,Dh,2G)
    blocks = blocks.permute(2, 0, 1).view(2, G, Dh, Dh)
    total = (form * blocks).sum((1, 2, 3), keepdim=True)
    form = form / (total + 1e-6 * trace(form))
    # So that the latent is about as large as x: a mean eigenvalue of 1.
    return (form * (2 * G * Dh / trace(form).sum())).flatten(0, 1)


def trace(form):
    """Of all KV heads together, keys and values apart: (2,G,Dh,Dh) -> (2,1,1,1)."""
    return form.diagonal(dim1=2, dim2=3).sum((1, 2))[:, None, None, None]


def modality_adapter(statistics, wanted, down, up):
    """An affine map of a modality's latents before the shared decoder (§3.2.1), c' = B c + b, least squares:
        B = E[t cᵀ] E[c cᵀ]⁻¹ of centred t, c,   b = E[t] - B E[c],   t = wanted z, c = down z
    wanted, down (R,Z): z -> the latent to be decoded, and the one that is cached; up (2*G*Dh,R): the decoder
    -> the decoder's weight and bias with it, up B and up b. With exact norms wanted = down, so B = 1 and
    b = 0: the adapter does nothing. It helps where the wanted latent is not the cached one: linear norms."""
    mean, cov = statistics
    B = wanted @ cov @ down.mT @ torch.linalg.pinv(down @ cov @ down.mT, hermitian=True)
    return up @ B, up @ (wanted - B @ down) @ mean


# ------------------------------------------------------------- conversion: linear norms (§3.2.3)

def linear_norms(gqa, moments, norm):
    """Global-Norm-Linear (§3.2.3): RMSNorm of a head ≈ a linear map of its input u, by least squares over the
    calibration: "const" γ u / μ with one number μ a head, "affine" any matrix and bias a head.
    -> the layer with that in q_proj and k_proj, and what calibration would have seen of it,
    z = [k; v; exact k; 1] (adapters can make good a part of what the substitute lost)."""
    need(hasattr(moments, "raw_query"),
         f"ConvertSpec qk_norm={norm!r}: is fitted to raw moments, from Calibration(…, raw=True)")
    Dh = gqa.head_dim
    width = gqa.kv_heads * Dh
    gqa = copy.deepcopy(gqa)
    new = copy.copy(moments)

    # Queries: q' = map [u; 1], and so E[q' q'ᵀ].
    maps = fitted_norm(gqa.q_norm, moments.raw_query, norm)
    substitute(gqa, "q", maps)
    new.query = maps @ moments.raw_query[:, Dh:, Dh:] @ maps.mT

    # Keys: where they and their parts stand in the raw z = [k; v; u; 1].
    K = slice(0, width)
    V = slice(width, 2 * width)
    U = slice(2 * width, 3 * width)
    ONE = slice(3 * width, 3 * width + 1)
    index = torch.arange(3 * width + 1, device=maps.device)
    # Of one head, [k; u; 1]: (G,2Dh+1).
    own = torch.cat([index[K].view(-1, Dh), index[U].view(-1, Dh), index[ONE].expand(gqa.kv_heads, 1)], 1)
    raw_key = moments.second.sum(0)[own[:, :, None], own[:, None]]               # (G,2Dh+1,2Dh+1)
    maps = fitted_norm(gqa.k_norm, raw_key, norm)
    substitute(gqa, "k", maps)

    # The new z = change z: k' = map [u; 1], v, exact k, 1.
    eye = torch.eye(width).to(maps)
    change = torch.zeros(3 * width + 1, 3 * width + 1).to(maps)
    change[K, U] = torch.block_diag(*maps[..., :Dh])
    change[K, ONE] = maps[..., Dh].reshape(-1, 1)
    change[V, V] = eye
    change[U, K] = eye
    change[ONE, ONE] = 1
    new.first = moments.first @ change.mT
    new.second = change @ moments.second @ change.mT
    return gqa, new


def fitted_norm(rms_norm, y, norm):
    """y (heads,2Dh+1,2Dh+1), second moments of [norm(u); u; 1] -> maps [W | b] (heads,Dh,Dh+1) of [u; 1]."""
    Dh = (y.shape[1] - 1) // 2
    if norm == "affine":
        # E[norm(u) [u;1]ᵀ] E[[u;1] [u;1]ᵀ]⁻¹
        return y[:, :Dh, Dh:] @ torch.linalg.pinv(y[:, Dh:, Dh:], hermitian=True)
    # γ u / μ: 1/μ = Σ γ E[norm(u) u] / Σ γ² E[u²], over the channels of a head.
    gamma = rms_norm.weight.double()
    cross = y[:, :Dh, Dh:-1].diagonal(dim1=1, dim2=2)                            # (heads,Dh)
    power = y[:, Dh:-1, Dh:-1].diagonal(dim1=1, dim2=2)
    mu = (gamma.square() * power).sum(1) / (gamma * cross).sum(1)                # (heads,)
    return F.pad(torch.diag_embed(gamma / mu[:, None]), (0, 1))


def substitute(gqa, name, maps):
    """Puts the linear maps in place of a norm ("q" or "k"): into the projection before it."""
    old = getattr(gqa, f"{name}_proj").weight                                    # (heads*Dh,D)
    Dh = gqa.head_dim
    linear = nn.Linear(gqa.hidden, len(old)).to(old)
    weight = maps[..., :Dh] @ old.double().unflatten(0, (-1, Dh))                # (heads,Dh,D)
    linear.weight.copy_(weight.flatten(0, 1))
    linear.bias.copy_(maps[..., Dh].flatten())
    setattr(gqa, f"{name}_proj", linear)
    setattr(gqa, f"{name}_norm", nn.Identity())


# ------------------------------------------------------------------------- conversion: one layer

@torch.no_grad()
def convert_layer(gqa, moments, spec, layer=0):
    """The M²LA layer nearest to `gqa` on the calibration data (§3.2.1), without training: `rope_split` gives
    the shared RoPE key and the queries, `content_pca` the latent of the rest and how to read it.
    layer: its number, for spec.ranks and warnings. UserError if spec does not fit or nothing was seen."""
    need(moments.count.sum() > 0,
         "calibration saw no tokens: run forwards inside `with Calibration(…)` first")
    ranks = spec.layer_ranks(layer)
    width = 2 * gqa.kv_heads * gqa.head_dim
    need(max(ranks) <= width and spec.rope_width <= width // 2,
         f"ConvertSpec ranks={ranks}, rope_width={spec.rope_width}: this layer allows at "
         f"most {width} (2*G*Dh) and {width // 2} (G*Dh)")
    warn_of_hazards(moments, spec, layer)
    if spec.qk_norm != "exact":
        gqa, moments = linear_norms(gqa, moments, spec.qk_norm)

    # The source's projections and norms stay as they are.
    new = M2LA(gqa.hidden, gqa.heads, gqa.kv_heads, gqa.head_dim, gqa.eps, spec.rope_width, ranks)
    for name, module in gqa.named_children():
        setattr(new, name, copy.deepcopy(module))
    new.to(gqa.k_proj.weight)                        # maps are computed in fp64 and cast once, when copied

    split = rope_split(gqa, moments, spec)
    new.slots = split.slots
    new.query.copy_(split.query)

    # A latent and a decoder for each modality.
    weights = []
    biases = []
    for modality, rank in enumerate(ranks):
        content = content_pca(gqa, moments, spec, split, modality, rank)
        held = int((content.eigenvalues > 1e-9 * content.eigenvalues[0]).sum())          # not rounding noise
        if rank > held:
            warnings.warn(f"layer {layer}: rank {rank} for {MODALITIES[modality]}, but the calibrated "
                          f"content has only {held} directions: lower the rank, or calibrate on more "
                          "varied data", stacklevel=2)
        weights.append(content.down)
        biases.append(content.down_bias)
        new.decode[modality].weight.copy_(content.up)
        new.decode[modality].bias.copy_(content.up_bias)

    # encode: [k; v] -> [c_text | c_vision | k_rope]; the RoPE key is of the keys alone and has no bias.
    weights.append(F.pad(split.encode, (0, width // 2)))
    new.encode.weight.copy_(torch.cat(weights))
    new.encode.bias.copy_(F.pad(torch.cat(biases), (0, spec.rope_width)))
    return new


def warn_of_hazards(moments, spec, layer):
    """What makes a conversion worse than it needs to be: one warning each, with the number and the remedy."""
    found = []

    # Too few tokens of a modality: fewer than 10*R, and `content_pca` falls back.
    for name, count, rank in zip(MODALITIES, moments.count.tolist(), spec.layer_ranks(layer)):
        if spec.modality != "shared" and count < 10 * rank:
            found.append(f"{count:.0f} {name} tokens of calibration for rank {rank}, at least {10 * rank} "
                         "are needed: what both modalities share is used instead; "
                         f"calibrate on more {name} to get its own")

    # Too short samples. A causal query sees n tokens, 1..length in turn: Σn² / Σn = 2/3 length.
    n, squares = moments.seen.tolist()
    longest = 1.5 * squares / n
    if longest < spec.length / 4:
        found.append(f"calibration samples of about {longest:.0f} tokens for a model of {spec.length}: gains "
                     "and slots depend on distances, slow frequencies get no slots; "
                     "calibrate on longer samples")

    # Vision tokens that are all alike: their variance, as a part of their energy, against that of text.
    spread = []
    for modality in range(2):
        if moments.count[modality] >= 100:                                       # fewer say little
            mean, cov = moments.statistics(modality)
            spread.append(float(cov.trace() / (cov.trace() + mean.square().sum())))
    if len(spread) == 2 and spread[1] < spread[0] / 2:
        found.append(f"vision tokens differ by {spread[1]:.0%} of their energy, text tokens by "
                     f"{spread[0]:.0%}, as with an untrained vision path; train the path before converting")

    for text in found:
        warnings.warn(f"layer {layer}: {text}", stacklevel=3)


# ----------------------------------------------------------------- conversion: the budgets (§3.2.2)

class Part(NamedTuple):
    """Modalities that share a basis, and so a rank."""
    modalities: tuple                    # (0,), (1,) or (0, 1)
    tokens: float                        # their fraction of the calibration tokens: the cost of a rank


class RankBlock(NamedTuple):
    """`step` more eigenvalues for a part of a layer. Sorted by field: most saved first; the layer only decides
    between equals, the same on every process."""
    saved: float                         # harm that they take away, per byte
    layer: int
    part: Part


@torch.no_grad()
def greedy_ranks(layers, moments, spec, damage=None):
    """Ranks by layer and modality (§3.2.2), multiples of spec.step, at no more bytes per calibration token
    than spec.ranks: the block of eigenvalues comes first that saves most harm per byte (`rank_blocks`).
    -> ((R_text, R_vision) of each layer)."""
    count = sum(m.count for m in moments)
    shared = [(0,), (1,)] if spec.modality == "segments" else [(0, 1)]
    parts = [Part(own, float(count[list(own)].sum() / count.sum())) for own in shared]

    # Every layer and part begins with one block; `left`: values per calibration token still to be given.
    ranks = []
    blocks = []
    left = 0.0
    for i, layer in enumerate(layers):
        given = spec.layer_ranks(i)                          # their values are this layer's share of the budget
        blocks += rank_blocks(layer, i, moments[i], spec, parts, damage)
        ranks.append([min(spec.step, rank) for rank in given])
        for part in parts:
            first = part.modalities[0]
            left += part.tokens * (given[first] - ranks[i][first])

    # Spend it. Eigenvalues fall, so the blocks of a part come in their order. One that costs too much is passed
    # over: one of the other modality may still fit.
    for block in sorted(blocks, reverse=True):
        cost = block.part.tokens * spec.step
        if cost <= left + 1e-9:                                                  # not lost to rounding
            left -= cost
            for modality in block.part.modalities:
                ranks[block.layer][modality] += spec.step
    return tuple(map(tuple, ranks))


def rank_blocks(layer, index, moments, spec, parts, damage):
    """The blocks that a layer's ranks could grow by, and what each would save.

    `price`: harm per calibration token of cutting a unit of a part's eigenvalues. Its fraction of the tokens / the
    layer's energy; or, with `damage` (a function: KL in nats between the model now and its source), measured."""
    source = layer.self_attn
    statistics = moments
    if spec.qk_norm != "exact":
        source, statistics = linear_norms(source, moments, spec.qk_norm)
    split = rope_split(source, statistics, spec)

    # Each part's eigenvalues (2*G*Dh,), and the layer's energy per token.
    spectra = []
    energy = 0.0
    for part in parts:
        content = content_pca(source, statistics, spec, split, part.modalities[0])
        spectrum = content.eigenvalues.clamp_min(0)
        spectra.append(spectrum)
        energy += part.tokens * float(spectrum.sum())

    blocks = []
    for part, spectrum in zip(parts, spectra):
        price = part.tokens / energy
        if damage:
            price = measured_price(layer, index, moments, spec, part, spectrum, damage)
        for rank in range(spec.step, len(spectrum), spec.step):
            mass = float(spectrum[rank:rank + spec.step].sum())
            blocks.append(RankBlock(price * mass / part.tokens, index, part))
    return blocks


def measured_price(layer, index, moments, spec, part, spectrum, damage):
    """Nats of damage per unit of eigenvalue that is cut, measured: only this layer is converted, and only this part
    of it cut, to spec's rank. The RoPE split's own damage is in it, the same at every rank."""
    gqa = layer.self_attn
    cut = [len(spectrum), len(spectrum)]                     # the other modality keeps all
    for modality in part.modalities:
        cut[modality] = spec.layer_ranks(index)[modality]
    with warnings.catch_warnings(action="ignore"):           # of a rank above what the content holds
        layer.self_attn = convert_layer(gqa, moments, replace(spec, ranks=tuple(cut)))
    price = damage() / float(spectrum[cut[part.modalities[0]]:].sum())
    layer.self_attn = gqa
    return price


# --------------------------------------------------------- conversion: healing, and the whole model

def heal(layers, sources, predict, batches, steps, lr=2e-3):
    """Distils the model that has `sources`, its GQA, into itself with the M²LA it has now: on a batch a step,
        KL = mean over answer tokens of Σ_v p(v) (log p(v) - log p'(v)),   p before, p' after conversion
    Only what conversion made is trained, query, encode and decode, by Adam with a rate that falls to 0.
    predict(batch) -> log-probabilities (n,V). Both are one model but for the attention: no second is held."""
    made = [layer.self_attn for layer in layers]
    maps = []
    for module in made:
        for name, parameter in module.named_parameters():
            if name.startswith(("query", "encode", "decode")):
                maps.append(parameter)

    def rate(step):                                          # 5 steps of warm-up, then linearly to 0
        return min(1, (step + 1) / 5) * (1 - step / steps)
    adam = torch.optim.Adam(maps, lr, betas=(0.9, 0.99))     # .99: few steps
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)

    for batch in itertools.islice(batches, steps):
        # p, by the source's attention.
        install(layers, sources)
        with torch.no_grad():
            target = predict(batch)

        # KL to p', by the converted one, and its gradient for the maps alone: the rest stays as it is.
        install(layers, made)
        with torch.enable_grad():
            kl = (target.exp() * (target - predict(batch))).sum(-1).mean()
            grads = torch.autograd.grad(kl, maps)

        for parameter, grad in zip(maps, grads):
            if dist.is_initialized():                        # every process has batches of its own
                dist.all_reduce(grad)
                grad /= dist.get_world_size()
            parameter.grad = grad
        adam.step()
        schedule.step()
    adam.zero_grad()


def install(layers, modules):
    """Gives each layer its attention."""
    for layer, module in zip(layers, modules):
        layer.self_attn = module


@torch.no_grad()
def convert_layers(layers, moments, spec, damage=None, predict=None, batches=()):
    """Puts M²LA in place of the GQA in each layer.self_attn -> spec with the ranks that each layer got.
    damage() -> nats by which the model, as it is when called, differs from its source (see `divergence`);
    predict, batches: see `heal`."""
    sources = [layer.self_attn for layer in layers]

    if spec.budget != "uniform":
        measure = damage if spec.budget == "measured" else None
        spec = replace(spec, ranks=greedy_ranks(layers, moments, spec, measure))
    for i, layer in enumerate(layers):
        layer.self_attn = convert_layer(sources[i], moments[i], spec, i)
    if predict and spec.heal and damage() > spec.tolerance:
        heal(layers, sources, predict, batches, spec.heal)
    return spec


def divergence(predict, batches):
    """predict(batch) → log-probabilities (n,V) → a function: mean KL (nats per row) of what is predicted then
    from what is predicted now."""
    before = [predict(batch) for batch in batches]

    def damage():
        kl = []
        for old, batch in zip(before, batches):
            new = predict(batch)
            kl.append((old.exp() * (old - new)).sum(-1))
        return float(torch.cat(kl).mean())
    return damage


def spec_of(choices, gqa, share):
    """A ConvertSpec that leaves `share` of the GQA cache. Below a half, half the slots if they are free."""
    row = 2 * gqa.kv_heads * gqa.head_dim
    P = gqa.head_dim
    if share < 0.5 and choices.get("slots") != "uniform":
        P = gqa.head_dim // 2
    R = int(share * row) - P
    need(R >= 1, f"--cache-share {share}: no latent is left beside the {P} values of the RoPE key; above "
                 f"{P / row:.2f} there is")
    return ConvertSpec(P, (R, R), step=min(16, row // 16), **choices)


def cache_ratio(spec, layers, tokens):
    """Cached values of so many (text, vision) tokens, relative to those of the GQA layers."""
    used = 0
    source = 0
    for i, layer in enumerate(layers):
        for n, rank in zip(tokens, spec.layer_ranks(i)):
            used += n * (rank + spec.rope_width)
        source += 2 * layer.kv_heads * layer.head_dim
    return used / (sum(tokens) * source)
