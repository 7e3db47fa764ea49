"""Attention of InternVideo3 (§3.2): the source GQA, the latent M²LA it is converted to, and the caches.

Shape letters: B batch, T new tokens, N cached tokens, D hidden, H query heads, G KV heads, Dh head dim,
R latent rank, P width of the shared RoPE key, W = R + P one cache row, S = P/2 complex RoPE slots.
A cached token costs, per layer (8B): GQA 2*G*Dh = 2048 values, M²LA R + P = 896 + 128 = 1024.

Differs from the paper: (1) QK-norm stays exact instead of becoming a linear map (§3.2.3): the latent need not
be linear in x. (2) The adapters of a modality (§3.2.1) are a whole decoder: an affine adapter in front of a
shared decoder gains nothing on an optimal latent.

    pytest tests/test_m2la.py             where there is no GPU, the kernel runs in Triton's interpreter
    python eval.py --bench decode         time of a new token on the latent cache and on GQA's, and their bytes
    python eval.py --bench conversion     what each idea of the conversion saves, against published ones
"""
import copy
import warnings
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                      # CPU-only installs: the PyTorch reference below does the same
    triton = None

MODALITIES = "text", "vision"           # segment 0 and 1 of a latent cache
DECODE = 8            # up to this many new tokens, attention runs on the latent rows themselves ("absorbed")


class UserError(ValueError):
    """A mistake of the user: one line that names the file, flag or field and says what to do."""


# ---------------------------------------------------------------------------------------------- RoPE

def mrope(positions, head_dim, theta, sections):
    """Interleaved MRoPE of Qwen3-VL: positions (3,B,T) of t/h/w -> cos, sin (B,T,Dh/2), fp32.
    Frequency l turns with the position of one axis: h for l = 1,4,7,... and w for l = 2,5,8,..., each up to
    3*its section, t for all others. Text has equal positions on all axes: there it is ordinary RoPE."""
    l = torch.arange(head_dim // 2, device=positions.device)
    frequency = theta ** (-2.0 * l.float() / head_dim)
    axis = sum(a * ((l % 3 == a) & (l < 3 * sections[a])) for a in (1, 2))
    angle = positions[axis].permute(1, 2, 0).float() * frequency                 # (B,T,Dh/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Halves (re, im) of x times exp(i*angle); x (…,2S), cos and sin broadcastable to (…,S)."""
    re, im = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([re * cos - im * sin, im * cos + re * sin], dim=-1)


# -------------------------------------------------------------------------------------------- caches

class Cache:
    """Preallocated rows for all layers, in segments; tokens of a segment are appended in order.

    What a query token sees of a segment is thus a prefix: one integer per segment and token, its `limits`,
    says causality, ragged batches and empty segments at once. Counts live on the device; the host only keeps
    bounds on them, so that decoding never waits for the GPU. A spare row behind each segment takes what does
    not belong there (padding, tokens of other segments) and is never read."""

    def __init__(self, widths, batch, capacities, dtype=torch.float32, device="cpu"):
        """widths: per layer, one row width per segment; capacities: rows per sequence of each segment."""
        self.capacity = tuple(capacities)
        self.rows = [[torch.zeros(batch, n + 1, width, dtype=dtype, device=device)    # [layer][m] (B,N+1,W_m)
                      for n, width in zip(self.capacity, layer)] for layer in widths]
        M = len(self.capacity)
        self.counts = torch.zeros(M, batch, dtype=torch.long, device=device)             # rows in use
        self.spare = torch.tensor(self.capacity, device=device)[:, None, None]    # (M,1,1) index of spare row
        self.kinds = torch.zeros(batch, sum(self.capacity) + 1, dtype=torch.long, device=device)  # segments
        self.low, self.high = [0] * M, [0] * M                                         # low <= counts <= high

    @property
    def lengths(self):
        return self.counts.sum(0)                                                        # (B,) tokens held

    def begin(self, vision, valid=None):
        """Once before the layers: where do the new tokens go? vision, valid (B,T) bool; None = all valid."""
        T, M = vision.shape[1], len(self.capacity)
        ask = T > DECODE or not vision.is_cuda          # may the device be asked? It stalls decoding on a GPU
        if valid is not None and ask and valid.all():
            valid = None
        real = torch.ones_like(vision) if valid is None else valid
        kind = vision.long().clamp_max(M - 1)                                            # its segment
        own = (kind == torch.arange(M, device=vision.device)[:, None, None]) & real      # (M,B,T)
        self.limits = self.counts[:, :, None] + own.cumsum(2)                           # rows each token sees
        self.slots = torch.where(own, self.limits - 1, self.spare).minimum(self.spare)   # where its row goes
        self.fresh, self.mask = not any(self.high), None     # nothing cached: plain attention, None = causal
        if self.fresh and valid is not None:              # a padding token sees itself: no softmax of nothing
            eye = torch.eye(T, dtype=torch.bool, device=vision.device)
            self.mask = (torch.ones_like(eye).tril() & valid[:, None, None, :]) | eye
        self._bound(T, ask, even=valid is None and M == 1)
        self.kinds.scatter_(1, torch.where(real, self.lengths[:, None] + real.cumsum(1) - 1, sum(self.capacity)), kind)

    def _bound(self, T, ask, even):
        """Keep low <= counts <= high; ask the device only where that is cheap or high passes the capacity."""
        low, high = [n + T * even for n in self.low], [n + T for n in self.high]
        if ask or any(n > c for n, c in zip(high, self.capacity)):
            last = self.limits[:, :, -1]
            low, high = last.amin(1).tolist(), last.amax(1).tolist()
        for name, n, c in zip(("text ", "vision ") if len(high) > 1 else ("",), high, self.capacity):
            if n > c:
                raise UserError(f"cache capacity: {n} {name}tokens per sequence do not fit into {c}; raise it")
        self.low, self.high = low, high

    def append(self, layer, rows):
        """Write the new tokens' rows, (B,T,W_m) for each segment."""
        batch = torch.arange(self.counts.shape[1], device=self.counts.device)[:, None]
        for held, slots, new in zip(self.rows[layer], self.slots, rows):
            held[batch, slots] = new.to(held.dtype)

    def view(self, layer):
        """Per segment, the rows that may be in use: (B,N_m,W_m)."""
        return [rows[:, :n] for rows, n in zip(self.rows[layer], self.high)]

    def visible(self, start, stop):
        """Mask (B,1,t,N) of query tokens start..stop over the segments' rows side by side."""
        return torch.cat([torch.arange(n, device=limit.device) < limit[:, None, start:stop, None]
                          for n, limit in zip(self.high, self.limits)], dim=-1)

    def commit(self):
        """Once after the layers: the new tokens are in the cache (in place: a CUDA graph can replay it)."""
        self.counts.copy_(self.limits[:, :, -1])

    def truncate(self, lengths):
        """Forget all but the first `lengths` tokens, an int or (B,), of each sequence (the agent's undo)."""
        keep = torch.as_tensor(lengths, device=self.counts.device).minimum(self.lengths)
        kept = torch.arange(self.kinds.shape[1], device=keep.device) < keep[:, None]
        for m in range(len(self.capacity)):
            self.counts[m] = (kept & (self.kinds == m)).sum(1)
        self.low, self.high = self.counts.amin(1).tolist(), self.counts.amax(1).tolist()

    def expand(self, times):
        """A new cache with each sequence repeated `times`, an int or (B,): group sampling; 0 drops a sequence."""
        new = copy.copy(self)
        new.rows = [[rows.repeat_interleave(times, 0) for rows in layer] for layer in self.rows]
        new.counts = self.counts.repeat_interleave(times, 1)
        new.kinds = self.kinds.repeat_interleave(times, 0)
        return new

    def nbytes(self):
        """Bytes of the rows in use, over all layers and sequences."""
        used = self.counts.sum(1).tolist()
        return sum(n * rows.shape[2] * rows.element_size() for layer in self.rows for n, rows in zip(used, layer))


class KVCache(Cache):
    """GQA: one segment, a row is [k of all KV heads | v of all KV heads], 2*G*Dh values."""

    def __init__(self, layers, batch, capacity, kv_heads, head_dim, dtype=torch.float32, device="cpu"):
        super().__init__([(2 * kv_heads * head_dim,)] * layers, batch, (capacity,), dtype, device)


class LatentCache(Cache):
    """M²LA: segment 0 holds text, 1 vision; a row is [latent R_m | shared RoPE key P].
    ranks: (R_text, R_vision) of each layer; capacities: (text, vision) tokens per sequence."""

    def __init__(self, ranks, rope_width, batch, capacities, dtype=torch.float32, device="cpu"):
        widths = [tuple(r + rope_width for r in layer) for layer in ranks]
        super().__init__(widths, batch, capacities, dtype, device)


# ------------------------------------------------------------------------------------- shared attention

BLOCK_SCORES = 2 ** 28        # query blocks of a long cached prefill: at most so many scores per KV head


@dataclass
class Blocks:
    """A sparse mask (B,1,T,T): the queries start..stop of a block see no other keys than 0..head and low..stop.
    For packed conversations, which see what they begin with and themselves."""
    mask: torch.Tensor
    blocks: list                                     # (start, stop, head, low)

    def to(self, device, **how):
        return Blocks(self.mask.to(device, **how), self.blocks)


def attend(q, k, v, mask, scale):
    """q (B,H,T,E), k (B,G,T,E), v (B,G,T,Dv), mask (B,1,T,T) bool, Blocks or None = causal -> (B,T,H*Dv)."""
    v, Dv = widened(v, q), v.shape[-1]
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1])
    elif isinstance(mask, Blocks):
        outs = []
        for start, stop, head, low in mask.blocks:
            own = [(x.narrow(dim, low, stop - low), x.narrow(dim, 0, head), dim)
                   for x, dim in ((k, 2), (v, 2), (mask.mask[:, :, start:stop], 3))]
            seen = [torch.cat([first, part], dim) if head else part for part, first, dim in own]    # without: no copy
            outs.append(attend_grouped(q[:, :, start:stop], *seen, scale))
        out = torch.cat(outs, 2)
    else:
        out = attend_grouped(q, k, v, mask, scale)
    return out[..., :Dv].transpose(1, 2).flatten(2)


def widened(v, q):
    """v as wide as q, by zeros: the fused kernels want one width."""
    return F.pad(v, (0, q.shape[-1] - v.shape[-1])) if v.shape[-1] < q.shape[-1] else v      # a pad by 0 is a copy


def attend_grouped(q, k, v, mask, scale):
    """q (B,H,T,E), k and v (B,G,N,E), mask (B,1,T,N) bool, None = all seen -> (B,H,T,E). The queries of a KV head stand
    side by side: with a mask no fused kernel shares KV heads, and k and v would be copied."""
    B, H, T, E = q.shape
    G, mask = k.shape[1], mask if mask is None else mask.repeat(1, 1, H // k.shape[1], 1)
    return F.scaled_dot_product_attention(q.reshape(B, G, -1, E), k, v, attn_mask=mask, scale=scale).view(B, H, T, E)


def attend_cached(q, k, v, cache, scale):
    """New tokens q (B,H,T,E) against all cached k, v (B,G,N,·), in query blocks of bounded memory -> (B,T,H*Dv)."""
    B, H, T, E = q.shape
    v, Dv, outs = widened(v, q), v.shape[-1], []
    block = max(1, BLOCK_SCORES // (k.shape[2] * B * (H // k.shape[1])))
    for start in range(0, T, block):
        all_seen = T == 1 and cache.low == cache.high
        mask = None if all_seen else cache.visible(start, start + block)
        outs.append(attend_grouped(q[:, :, start:start + block], k, v, mask, scale))
    return torch.cat(outs, 2)[..., :Dv].transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """What GQA and M2LA share: Qwen3's projections, with an RMSNorm on each q and k head before RoPE."""

    def __init__(self, hidden, heads, kv_heads, head_dim, eps=1e-6):
        super().__init__()
        self.hidden, self.heads, self.kv_heads, self.head_dim = hidden, heads, kv_heads, head_dim
        self.eps, self.scale = eps, head_dim ** -0.5
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps)
        self.k_norm = nn.RMSNorm(head_dim, eps)

    def project(self, x):
        """x (B,T,D) -> q (B,T,H,Dh), k and v (B,T,G,Dh); q and k normalised but not yet rotated."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim))
        return q, k, self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)


class GQA(Attention):
    """Qwen3's attention: H query heads share G KV heads. What we convert from, and the fair baseline."""

    def forward(self, x, rope, vision, mask=None, cache=None, layer=0):
        """x (B,T,D), rope (cos, sin) each (B,T,Dh/2), vision (B,T) bool, mask as in `attend`
        -> (B,T,D). With a cache, causality comes from the cache's order and `mask` is ignored."""
        q, k, v = self.project(x)
        cos, sin = (r[:, :, None] for r in rope)                                         # (B,T,1,Dh/2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache.append(layer, [torch.cat([k, v], 2).flatten(2)])
            if not cache.fresh:
                rows = cache.view(layer)[0].unflatten(2, (2, self.kv_heads, self.head_dim))
                k, v = rows.permute(2, 0, 3, 1, 4)                                       # (B,G,N,Dh)
                return self.o_proj(attend_cached(q.transpose(1, 2), k, v, cache, self.scale))
            mask = cache.mask
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                 # (B,heads,T,Dh)
        return self.o_proj(attend(q, k, v, mask, self.scale))


# --------------------------------------------------------------------------- attention over latent rows

def merge_shares(lses):
    """Softmax over all keys from softmax over disjoint sets of them, exactly: a set's output counts with the softmax of
    the sets' log-sum-exps. lses (…,S), -inf for an empty set; all empty: any finite shares, their outputs are 0."""
    return lses.clamp_min(torch.finfo(lses.dtype).min).softmax(-1)


if triton is not None:
    @triton.jit
    def _attend_kernel(Q, ROWS, LIMITS, OUT, LSE,      # (B,M,W) (B,N,W) (B,T) -> (B,M,splits,R) (B,M,splits)
                       M, H, T, scale, batch_stride, R: tl.constexpr, W: tl.constexpr, PARTS: tl.constexpr,
                       E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
        """One program: BLOCK_M of a sequence's M = T*H query rows against one split of its cached rows: without splits
        the H queries of a new token would leave most of a GPU idle.

        Softmax block by block: with `best` the largest score s so far, it holds total = Σ exp(s - best) and
        out = Σ exp(s - best) value, and shrinks both by exp(best - new) whenever a block raises best to new.

        A row is the key and, in its first R columns, the value, so it is loaded once and used twice. Tiles hold
        their W columns in PARTS parts of E: different warps get different parts. With one part, every warp would
        read all queries from shared memory for each block of rows, and that would take longer than the rows."""
        split, splits, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
        m, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        w = tl.arange(0, PARTS)[:, None, None] * E + tl.arange(0, E)[None, None, :]      # columns (PARTS,1,E)
        q = tl.load(Q + (batch * M + m[None, :, None]) * W + w, (m < M)[None, :, None] & (w < W), 0.0)
        limit = tl.load(LIMITS + batch * T + m // H, m < M, 0)                           # rows each query sees
        longest = tl.max(limit, 0)
        share = tl.cdiv(tl.cdiv(longest, splits), BLOCK_N) * BLOCK_N
        start, stop = split * share, tl.minimum((split + 1) * share, longest)
        rows = ROWS + batch * batch_stride + start.to(tl.int64) * W                      # > 2^31 at 2M tokens
        best = tl.full([BLOCK_M], -1e30, tl.float32)                                     # not -inf: no inf - inf
        total = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([PARTS, BLOCK_M, E], tl.float32)
        for first in range(start, stop, BLOCK_N):
            token = first + n
            held = (token < stop)[None, :, None] & (w < W)                               # junk may be NaN
            row = tl.load(rows + n[None, :, None] * W + w, held, 0.0)                    # (PARTS,N,E)
            s = tl.dot(q, tl.permute(row, 0, 2, 1), input_precision=PRECISION)           # (PARTS,M,N)
            s = tl.where(token[None, :] < limit[:, None], tl.sum(s, 0) * scale, float("-inf"))
            new = tl.maximum(best, tl.max(s, 1))
            p, shrink = tl.exp(s - new[:, None]), tl.exp(best - new)
            best, total = new, total * shrink + tl.sum(p, 1)
            p = tl.broadcast_to(p.to(row.dtype)[None], PARTS, BLOCK_M, BLOCK_N)
            out = out * shrink[None, :, None] + tl.dot(p, row, input_precision=PRECISION)
            rows += BLOCK_N * W
        some, place = tl.where(total > 0, total, 1.0), (batch * M + m) * splits + split
        out = out / some[None, :, None]
        tl.store(OUT + place[None, :, None] * R + w, out, (m < M)[None, :, None] & (w < R))
        tl.store(LSE + place, tl.where(total > 0, best + tl.log(some), float("-inf")), m < M)


def kernel_launch(M, W, dtype):
    """How the kernel is compiled. In 2 bytes: 64 KB of rows on their way while 64 KB are computed, and no register
    spilled on an H100 or H200 (a test compiles it; Triton before 3.9 needs smaller tiles). In 4: so that it fits."""
    parts, block_m = (4, 32) if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else (8, 16)
    wide = max(triton.next_power_of_2(W), 16 * parts)
    if wide > 1024:
        raise UserError(f"latent rows of {W} values: the Triton kernel holds at most 1024; use smaller ranks "
                        "or backend='torch'")
    how = dict(PARTS=parts, E=wide // parts, num_warps=8)
    if dtype == torch.float32:
        return dict(how, BLOCK_M=16, BLOCK_N=16, num_stages=2, PRECISION="ieee")
    block_m, block_n = 16 if M <= 16 else block_m, 32 if wide > 512 else 64
    return dict(how, BLOCK_M=block_m, BLOCK_N=block_n, num_stages=3, PRECISION="tf32")


def _attend_triton(q, rows, limits, rank, scale, splits=None):
    B, T, H, W = q.shape
    M, how = T * H, kernel_launch(T * H, W, q.dtype if q.is_cuda else torch.bfloat16)
    assert rows.stride()[1:] == (W, 1), "the rows of a sequence must lie one after the other"
    if not q.is_cuda:                                       # the interpreter computes bf16 wrongly
        q, rows = q.float(), rows.float()
    blocks = triton.cdiv(M, how["BLOCK_M"])
    if splits is None:                                  # fill the GPU once; depends on no length: CUDA graphs
        cores = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
        splits = max(1, min(cores // (B * blocks), triton.cdiv(rows.shape[1], 256)))
    out = torch.empty(B, M, splits, rank, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, M, splits, dtype=torch.float32, device=q.device)
    _attend_kernel[(blocks, splits, B)](q.contiguous(), rows, limits.int().contiguous(), out, lse, M, H, T, scale,
                                        rows.stride(0), R=rank, W=W, **how)
    return out.view(B, T, H, splits, rank), lse.view(B, T, H, splits)


def _attend_torch(q, rows, limits, rank, scale):
    n = max(1, int(limits.max()))
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, rows = q.to(dtype) * scale, rows[:, :n].to(dtype)
    s = torch.bmm(q.flatten(1, 2), rows.mT).unflatten(1, q.shape[1:3])                   # (B,T,H,n)
    if int(limits.min()) < n:
        s.masked_fill_((torch.arange(n, device=q.device) >= limits[:, :, None])[:, :, None], float("-inf"))
    top = s.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)            # nothing seen: all 0
    total = s.sub_(top).exp_().sum(-1, keepdim=True)                                     # s: now Σ's terms
    out = torch.bmm(s.flatten(1, 2), rows[..., :rank]).unflatten(1, q.shape[1:3])
    return (out / total.clamp_min(torch.finfo(dtype).tiny))[..., None, :], top + total.log()


def latent_attend(q, rows, limits, rank, scale, backend=None):
    """q (B,T,H,W) against rows (B,N,W), of which query (b,t) sees the first limits[b,t]; the first `rank` columns of
    a row are its value. The kernel cuts the rows into S sets, the reference into one -> out (B,T,H,S,R), what attention
    over each gives, lse (B,T,H,S), the log-sum-exp of its scores: for `merge_shares`. fp32, or fp64 of fp64.
    backend: "triton" (a GPU, or TRITON_INTERPRET=1 set before this file is imported), "torch" (the reference,
    on any device) or None: Triton on a GPU, else PyTorch."""
    backend = backend or ("triton" if q.is_cuda and triton is not None else "torch")
    with torch.autocast(q.device.type, enabled=False):                   # both choose the precision of their sums
        return (_attend_triton if backend == "triton" else _attend_torch)(q.to(rows.dtype), rows, limits, rank, scale)


# ---------------------------------------------------------------------------------------------- M²LA

class M2LA(Attention):
    """The source projections, plus an encoder in front of the cache and a decoder behind it (§3.2).

        k = k_norm(k_proj x), v = v_proj x       exact QK-norm
        row = encode([k; v]) = [c_m | k_rope]    c_m: latent of the token's modality m; k_rope: RoPE key of
                                                 all heads, its slot s turning with frequency slots[s]
        [k_nope; v] = decode_m(c_m)              rebuilt for each KV head, never cached
        [q_nope | q_rope] = q_h query_h          score = scale * (q_nope·k_nope + RoPE(q_rope)·RoPE(k_rope))

    All maps are trainable; `from_gqa` computes them so that the layer starts near its source."""

    def __init__(self, hidden, heads, kv_heads, head_dim, eps, rope_width, ranks):
        super().__init__(hidden, heads, kv_heads, head_dim, eps)
        self.rope_width, self.ranks = rope_width, tuple(ranks)
        width = 2 * kv_heads * head_dim
        self.query = nn.Parameter(torch.randn(heads, head_dim, head_dim + rope_width) * head_dim ** -0.5)
        self.encode = nn.Linear(width, sum(ranks) + rope_width)              # -> [c_text | c_vision | k_rope]
        self.decode = nn.ModuleList(nn.Linear(rank, width) for rank in ranks)              # text, vision
        self.register_buffer("slots", torch.arange(rope_width // 2) % (head_dim // 2))     # frequencies

    def maps(self, x):
        """x (B,T,D) -> q_nope (B,H,T,Dh), q_rope (B,H,T,P), latents (B,T,R_m), k_rope (B,T,P); not yet rotated."""
        q, k, v = self.project(x)
        q = torch.einsum("bthd,hde->bhte", q, self.query)                                # (B,H,T,Dh+P)
        rows = self.encode(torch.cat([k, v], 2).flatten(2))
        *latents, k_rope = rows.split([*self.ranks, self.rope_width], -1)
        return *q.split([self.head_dim, self.rope_width], -1), latents, k_rope

    def decoders(self):
        """Per modality, weight (2*G*Dh,R) and bias (2*G*Dh,): latent -> [k_nope | v] of all KV heads."""
        return [(decode.weight, decode.bias) for decode in self.decode]

    def forward(self, x, rope, vision, mask=None, cache=None, layer=0):
        """As GQA.forward."""
        q_nope, q_rope, latents, k_rope = self.maps(x)
        cos, sin = (r[..., self.slots] for r in rope)                                    # (B,T,S)
        q_rope, k_rope = rotate(q_rope, cos[:, None], sin[:, None]), rotate(k_rope, cos, sin)
        if cache is not None:
            cache.append(layer, [torch.cat([c, k_rope], -1) for c in latents])
            if not cache.fresh:
                attend_rows = self.attend_absorbed if x.shape[1] <= DECODE else self.attend_rebuilt
                return self.o_proj(attend_rows(q_nope, q_rope, cache, layer))
            mask = cache.mask
        text, sight = (F.linear(c, *decoder) for c, decoder in zip(latents, self.decoders()))
        kv = torch.where(vision[..., None], sight, text).unflatten(2, (2, self.kv_heads, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4)                                                 # (B,G,T,Dh)
        k = torch.cat([k, k_rope[:, None].expand(-1, self.kv_heads, -1, -1)], -1)
        return self.o_proj(attend(torch.cat([q_nope, q_rope], -1), k, v, mask, self.scale))

    def attend_rebuilt(self, q_nope, q_rope, cache, layer):
        """Many new tokens: rebuild k, v from the cached rows, by each segment's decoder. One KV head at a time: of all
        heads they would be four times as large as the layer's rows."""
        decoders = [[t.unflatten(0, (2, self.kv_heads, -1)) for t in decoder] for decoder in self.decoders()]
        outs = []
        for g, q in enumerate(torch.cat([q_nope, q_rope], -1).chunk(self.kv_heads, 1)):  # (B,H/G,T,Dh+P)
            parts = []
            for (weight, bias), rank, rows in zip(decoders, self.ranks, cache.view(layer)):
                k, v = F.linear(rows[..., :rank], weight[:, g].flatten(0, 1), bias[:, g].flatten()).chunk(2, -1)
                parts.append((torch.cat([k, rows[..., rank:]], -1), v))                  # (B,N_m,Dh+P), (B,N_m,Dh)
            k, v = (torch.cat(part, 1)[:, None] for part in zip(*parts))                 # (B,1,N,·)
            outs.append(attend_cached(q, k, v, cache, self.scale))
        return torch.cat(outs, -1)

    def attend_absorbed(self, q_nope, q_rope, cache, layer):
        """Few new tokens: as k_nope = U c + b, q_nope·k_nope = (Uᵀ q_nope)·c + q_nope·b: queries meet the rows
        themselves. So v = U' c + b' is applied to the attended latent. A segment's b enters its log-sum-exps."""
        q_nope, q_rope = q_nope.transpose(1, 2), q_rope.transpose(1, 2)                  # (B,T,H,·)
        q = q_nope.unflatten(2, (self.kv_heads, -1))                                     # (B,T,G,H/G,Dh)
        parts, merged = [], 0
        for m, ((weight, bias), rank) in enumerate(zip(self.decoders(), self.ranks)):
            up_k, up_v = weight.view(2, self.kv_heads, self.head_dim, rank)              # (G,Dh,R)
            bias_k, bias_v = bias.view(2, self.kv_heads, 1, self.head_dim)               # (G,1,Dh)
            q_latent = torch.einsum("btgid,gdr->btgir", q, up_k).flatten(2, 3)           # (B,T,H,R)
            out, lse = latent_attend(torch.cat([q_latent, q_rope], -1), cache.rows[layer][m], cache.limits[m], rank,
                                     self.scale)                                         # (B,T,H,S,R), (B,T,H,S)
            parts.append((out, lse + self.scale * (q * bias_k).sum(-1).flatten(2)[..., None], up_v, bias_v))
        shares = merge_shares(torch.cat([lse for _, lse, _, _ in parts], -1)).split([p[1].shape[3] for p in parts], -1)
        for share, (out, _, up_v, bias_v) in zip(shares, parts):
            latent = (share[..., None, :] @ out).to(q.dtype).view(*q.shape[:4], -1)              # (B,T,G,H/G,R)
            share = share.sum(-1).to(q.dtype).view(*q.shape[:4], 1)
            merged = merged + torch.einsum("btgir,gdr->btgid", latent, up_v) + share * bias_v
        return merged.flatten(2)

    @classmethod
    @torch.no_grad()
    def from_gqa(cls, gqa, moments, spec, layer=0):
        """The M²LA layer nearest to `gqa` on the calibration data (§3.2.1), without training: `rope_split` gives the
        shared RoPE key and the queries, `content_pca` the latent of the rest and how to read it."""
        if not moments.count.sum():
            raise UserError("calibration saw no tokens: run forwards inside `with Calibration(…)` first")
        ranks, width = spec.layer_ranks(layer), 2 * gqa.kv_heads * gqa.head_dim
        if max(ranks) > width or spec.rope_width > width // 2:
            raise UserError(f"ConvertSpec ranks={ranks}, rope_width={spec.rope_width}: this layer allows at "
                            f"most {width} (2*G*Dh) and {width // 2} (G*Dh)")
        warn_of_hazards(moments, spec, layer)
        if spec.qk_norm != "exact":
            gqa, moments = linear_norms(gqa, moments, spec.qk_norm)
        new = cls(gqa.hidden, gqa.heads, gqa.kv_heads, gqa.head_dim, gqa.eps, spec.rope_width, ranks)
        for name, module in gqa.named_children():
            setattr(new, name, copy.deepcopy(module))
        new.to(gqa.k_proj.weight)                       # maps are computed in fp64 and cast once, when copied
        split = encode_rope, _, query, new.slots = rope_split(gqa, moments, spec)
        new.query.copy_(query)
        weights, biases = [], []
        for m, rank in enumerate(ranks):
            value, down, down_bias, up, up_bias = content_pca(gqa, moments, spec, split, m, rank)
            held = int((value > 1e-9 * value[0]).sum())
            if rank > held:
                warnings.warn(f"layer {layer}: rank {rank} for {MODALITIES[m]}, but the calibrated content has only "
                              f"{held} directions: lower the rank, or calibrate on more varied data", stacklevel=2)
            weights.append(down)
            biases.append(down_bias)
            new.decode[m].weight.copy_(up)
            new.decode[m].bias.copy_(up_bias)
        new.encode.weight.copy_(torch.cat([*weights, F.pad(encode_rope, (0, width // 2))]))
        new.encode.bias.copy_(F.pad(torch.cat(biases), (0, spec.rope_width)))
        return new

    @torch.no_grad()
    def fold(self):
        """This layer as the authors released theirs (`Released`), all maps multiplied out: the same output."""
        H, G, Dh, P, R = self.heads, self.kv_heads, self.head_dim, self.rope_width, self.ranks[0]
        one = torch.equal(self.decode[0].weight, self.decode[-1].weight) and not any(d.bias.any() for d in self.decode)
        if not (one and isinstance(self.k_norm, nn.Identity) and self.slots.tolist() == list(range(Dh // 2))):
            raise UserError(f"fold: this layer does not fit into the released layout; convert with rope_width={Dh}, "
                            "slots='uniform', modality='shared', heal=0 and qk_norm='affine' or 'const'")
        new = Released(self.hidden, H, Dh, P, R).to(self.o_proj.weight)
        x = torch.eye(self.hidden + 1)[None, :, 1:].to(self.o_proj.weight).double()      # 0, e_1, …, e_D: every map is
        q_nope, q_rope, (c, _), k_rope = copy.deepcopy(self).double().maps(x)            # affine, f(x) = W x + b
        pairs = torch.arange(P).view(2, -1).T.flatten()                                  # halves -> re, im, re, im, …
        q = torch.cat([q_nope, q_rope[..., pairs]], -1) * ((Dh + P) / Dh) ** 0.5         # it scales by (Dh+P)^-½
        rows = torch.cat([c, k_rope[..., pairs]], -1)
        for linear, y in ((new.q_proj, q[0].transpose(0, 1).flatten(1)), (new.kv_a_proj_with_mqa, rows[0])):
            linear.weight.copy_((y[1:] - y[0]).mT)                                       # y (1+D,·)
            linear.bias.copy_(y[0])
        up = self.decode[0].weight.view(2, G, Dh, R).repeat_interleave(H // G, 1)        # (2,H,Dh,R)
        new.kv_b_proj.weight.copy_(up.transpose(0, 1).flatten(0, 2))
        new.o_proj.weight.copy_(self.o_proj.weight)
        return new


class Released(M2LA):
    """The released layer (its names and shapes), M²LA with linear maps only: both modalities share rank and decoder,
    every query head has a decoder of its own, and RoPE pairs lie side by side: re, im, re, im, …"""

    def __init__(self, hidden, heads, head_dim, rope_width, rank):
        nn.Module.__init__(self)
        self.hidden, self.heads, self.kv_heads, self.head_dim = hidden, heads, heads, head_dim
        self.rope_width, self.ranks, self.scale = rope_width, (rank, rank), (head_dim + rope_width) ** -0.5
        self.q_proj = nn.Linear(hidden, heads * (head_dim + rope_width))                 # per head [nope | rope]
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + rope_width)                   # [c | k_rope]
        self.kv_b_proj = nn.Linear(rank, heads * 2 * head_dim, bias=False)               # per head [k_nope | v]
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.slots = slice(None)                                                         # every frequency, once

    def maps(self, x):
        halves = [*range(0, self.rope_width, 2), *range(1, self.rope_width, 2)]
        q = self.q_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)                # (B,H,T,Dh+P)
        c, k_rope = self.kv_a_proj_with_mqa(x).split([self.ranks[0], self.rope_width], -1)
        return q[..., :self.head_dim], q[..., self.head_dim:][..., halves], [c, c], k_rope[..., halves]

    def decoders(self):
        weight = self.kv_b_proj.weight.unflatten(0, (self.heads, 2, -1)).transpose(0, 1).flatten(0, 2)
        return [(weight, torch.zeros_like(weight[:, 0]))] * 2


# --------------------------------------------------------------------------- calibration and conversion

@dataclass
class ConvertSpec:
    """What a GQA layer becomes. Defaults are the best measured choices; the others are there to compare."""
    rope_width: int                      # P, even; 2 values per complex slot
    ranks: tuple                         # (R_text, R_vision), or one such pair per layer
    qk_norm: Literal["exact", "affine", "const"] = "exact"       # not exact: Global-Norm-Linear (§3.2.3)
    rope_basis: Literal["unitary", "real"] = "unitary"           # matrices across heads at one frequency
    slots: Literal["realloc", "uniform"] = "realloc"             # uniform: as many for each frequency
    gain: Literal[True, False] = True            # content channels get the mean turn that RoPE would have given them
    metric: Literal["qa", "balance", "identity"] = "qa"          # queries and W_o | K against V | plain PCA
    modality: Literal["segments", "adapters", "shared"] = "segments"     # the last two: one basis for both
    budget: Literal["measured", "energy", "uniform"] = "measured"        # who gets the ranks: `greedy_ranks`
    step: int = 16                       # … in multiples of this
    heal: int = 100                      # steps of `heal`, taken if the converted model is damaged by more than …
    tolerance: float = 0.05              # … nats per answer token
    length: int = 0                      # tokens the model is meant for; 0: do not compare calibration with it

    def __post_init__(self):
        for f in fields(self):
            if (allowed := get_args(f.type)) and getattr(self, f.name) not in allowed:
                raise UserError(f"ConvertSpec {f.name}={getattr(self, f.name)!r}: use one of {allowed}")
        if not isinstance(self.rope_width, int) or self.rope_width < 2 or self.rope_width % 2:
            raise UserError(f"ConvertSpec rope_width={self.rope_width!r}: use an even number from 2 on")
        if not isinstance(self.heal, int) or self.heal < 0:
            raise UserError(f"ConvertSpec heal={self.heal!r}: use a number of steps, 0 for none")
        try:
            ranks = torch.tensor(self.ranks)
            assert ranks.dtype == torch.long and ranks.dim() in (1, 2) and ranks.shape[-1] == 2 and ranks.min() > 0
        except (AssertionError, TypeError, ValueError):
            raise UserError(f"ConvertSpec ranks={self.ranks!r}: use (text, vision), two positive numbers, or a list of "
                            "such pairs, one per layer") from None
        self.ranks = tuple(tuple(r) if isinstance(r, list) else r for r in ranks.tolist())

    def layer_ranks(self, layer):
        if isinstance(self.ranks[0], int):
            return self.ranks
        if layer >= len(self.ranks):
            raise UserError(f"ConvertSpec ranks: {len(self.ranks)} pairs given, but layer {layer} is to be "
                            "converted: give one pair per layer")
        return self.ranks[layer]


class Moments:
    """What calibration keeps of one layer: sums, in fp64, of one size whatever the number of tokens. z = [k; v] before
    RoPE; with `raw`, which linear norms are fitted to, [k; v; k before its norm; 1]."""
    def __init__(self, gqa, raw=False):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=gqa.k_proj.weight.device)
        heads, head_dim, width = gqa.heads, gqa.head_dim, 2 * gqa.kv_heads * gqa.head_dim
        width += raw * (width // 2 + 1)
        self.count, self.first, self.second = zeros(2), zeros(2, width), zeros(2, width, width)  # by modality
        self.query = zeros(heads, head_dim, head_dim)                    # sum of q qᵀ, before RoPE
        self.turn, self.energy = zeros(2, heads, head_dim // 2), zeros(heads, head_dim // 2)    # add_turns
        self.seen = zeros(2)                                             # tokens n that a query sees: sums of n, n²
        if raw:
            self.raw_query = zeros(heads, 2 * head_dim + 1, 2 * head_dim + 1)    # of [q; q before its norm; 1]

    def statistics(self, modality=None):
        """Mean (Z,) and centred covariance (Z,Z) of z; None = both modalities."""
        pick = slice(None) if modality is None else slice(modality, modality + 1)
        mean, second = (t[pick].sum(0) / self.count[pick].sum() for t in (self.first, self.second))
        return mean, second - mean[:, None] * mean


class Calibration:
    """with Calibration([layer.self_attn, …]) as calibration: ordinary forwards -> .moments, one per layer.
    Use samples as long as the model will meet (gains and slots depend on distances) and at least 10*R tokens
    of each modality. For padded batches set calibration.valid, (B,T) bool, before each forward. raw=True also keeps
    what ConvertSpec.qk_norm other than "exact" needs."""

    def __init__(self, modules, raw=False):
        self.modules, self.valid, self.raw = list(modules), None, raw
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
        if cache is not None:
            raise UserError("calibration needs forwards without a cache: it looks at whole samples")
        q, k, v = gqa.project(x)
        mask = mask.mask if isinstance(mask, Blocks) else mask
        valid = torch.ones_like(vision) if self.valid is None else self.valid
        z = torch.cat([k, v], 2).flatten(2)
        if self.raw:
            raw_q, one = gqa.q_proj(x).view_as(q), torch.ones_like(q[..., :1])
            z = torch.cat([z, gqa.k_proj(x), one[:, :, 0]], 2)
            rows = torch.cat([q, raw_q, one], 3)[valid].double()
            moments.raw_query += torch.einsum("nhd,nhe->hde", rows, rows)
        for m in range(2):
            rows = z[valid & (vision == bool(m))].double()
            moments.count[m] += len(rows)
            moments.first[m] += rows.sum(0)
            moments.second[m] += rows.mT @ rows
        rows = q[valid].double()
        moments.query += torch.einsum("nhd,nhe->hde", rows, rows)
        self.add_turns(moments, gqa, q, k, rope, mask, valid)

    def add_turns(self, moments, gqa, q, k, rope, mask, valid):
        """By how much RoPE turns a pair of tokens, on average:
            α_{h,l} = Σ w |q_l|² |k_l|² e^{iθ_l Δ} / Σ w |q_l|² |k_l|²,   Δ = p_key - p_query,
        w = ½ attention weight + ½ uniform over what the query sees."""
        B, T, H, _ = q.shape
        cos, sin = (r.float()[:, :, None] for r in rope)                                 # (B,T,1,L), L = Dh/2
        q_turned, k_turned = (rotate(t.float(), cos, sin) for t in (q, k))
        q_power, k_power = (t.float().unflatten(-1, (2, -1)).square().sum(-2) for t in (q, k))  # (B,T,H|G,L)
        q_power = q_power * valid[:, :, None, None]
        keys = torch.stack([k_power * cos, k_power * sin, k_power], 3)                   # (B,T,G,3,L)
        keys = keys.flatten(3).transpose(1, 2).repeat_interleave(H // k.shape[2], 1)     # (B,H,T,3L)
        k_turned = k_turned.transpose(1, 2).repeat_interleave(H // k.shape[2], 1)        # (B,H,T,Dh)
        causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        for start in range(0, T, 512):                                                   # bounded memory
            part = slice(start, start + 512)
            seen = causal[part] if mask is None else mask[:, :, part]                    # (…,t,T)
            score = q_turned[:, part].transpose(1, 2) @ k_turned.mT * gqa.scale          # (B,H,t,T)
            count = seen.sum(-1, keepdim=True)
            weight = score.masked_fill(~seen, -1e9).softmax(-1)
            weight = (weight + seen / count.clamp_min(1)) / 2
            n = count.expand(B, 1, -1, 1)[:, 0, :, 0][valid[:, part]].double()
            moments.seen += torch.stack([n.sum(), n.square().sum()])
            mean = (weight @ keys).transpose(1, 2).unflatten(-1, (3, -1)) * q_power[:, part, :, None]
            re, im, energy = mean.double().unbind(3)                                     # (B,t,H,L)
            c, s = cos[:, part].double(), sin[:, part].double()                          # times e^{-iθ p_query}
            moments.turn += torch.stack([re * c + im * s, im * c - re * s]).sum((1, 2))
            moments.energy += energy.sum((0, 1))


def complex_map(weight, columns, width):
    """Complex weights (S,G), slot s taking frequency columns[s] of every head -> the real matrix (2S,width)
    that does the same to vectors in halves: slots as [re | im], each of the G heads as [re | im]."""
    z = F.one_hot(columns, width // (2 * weight.shape[1]))[:, None] * weight[:, :, None]    # (S,G,L)
    return torch.stack([torch.stack([z.real, -z.imag], 2), torch.stack([z.imag, z.real], 2)]).reshape(-1, width)


def rope_split(gqa, moments, spec):
    """The shared RoPE key (§3.2.1): encode (P,GDh), decode (GDh,P), query maps (H,Dh,Dh+P), slots (S,).

    A key's frequency l is one complex number κ_g per head; RoPE turns all heads by the same phase, so *any*
    complex matrix across heads commutes with it. The eigenvectors u of E[wκ (wκ)ᴴ] give the best one:
        k_rope[s] = Σ_g conj(u_g) w_g κ_g,   κ_g ≈ (u_g / w_g) k_rope[s],   q_rope[s] = q conj(u_g / w_g)
    The rest, k_nope = k - decode encode k, is content, whose queries take only RoPE's mean turn α: q_nope =
    conj(α) q. w_g² = Σ_{h∈g} E|q|² (1 - |α|²) is the harm of leaving (g,l) there, so the S slots of largest
    eigenvalue are kept, of whatever frequency. α: Calibration.add_turns. Published methods (slots="uniform") keep
    as many for each frequency and look at the keys' energy alone (w = 1)."""
    G, L, S = gqa.kv_heads, gqa.head_dim // 2, spec.rope_width // 2
    tokens, K = moments.count.sum(), gqa.kv_heads * gqa.head_dim
    alpha = torch.complex(*moments.turn) / moments.energy.clamp_min(1e-30)                   # (H,L)
    q_power = moments.query.diagonal(dim1=1, dim2=2).unflatten(1, (2, L)).sum(1) / tokens    # (H,L)
    harm = q_power * (1 - alpha.abs().square()).clamp_min(1e-4)
    w = harm.unflatten(0, (G, -1)).sum(1).clamp_min(1e-12).sqrt().mT                         # (L,G)
    if spec.slots == "uniform":
        w = torch.ones_like(w)
    k = (moments.second.sum(0)[:K, :K] / tokens).view(G, 2, L, G, 2, L)
    k = k.diagonal(dim1=2, dim2=5).permute(4, 0, 2, 1, 3)                                    # (L,G,G,2,2)
    C = torch.complex(k[..., 0, 0] + k[..., 1, 1], k[..., 1, 0] - k[..., 0, 1])              # E[κ κᴴ] (L,G,G)
    if spec.rope_basis == "real":
        C = C.real.to(C.dtype)
    value, vector = torch.linalg.eigh(w[:, :, None] * C * w[:, None])                        # ascending
    if spec.slots == "realloc":                          # the S largest of all
        slot = value.flatten().topk(S).indices.sort().values
    elif spec.rope_width % gqa.head_dim:
        raise UserError(f"ConvertSpec slots='uniform': rope_width={spec.rope_width} must be a multiple of "
                        f"the head dim {gqa.head_dim}; or use slots='realloc'")
    else:                                                # the largest of each frequency
        slot = torch.arange(L * G, device=w.device).view(L, G)[:, -(S // L):].flatten()
    l, u = slot // G, vector[slot // G, :, slot % G]                                         # (S,), (S,G)
    encode, decode = u.conj() * w[l], u / w[l]
    size = torch.linalg.vector_norm(encode, dim=1, keepdim=True)                     # slots as large as a key
    encode, decode = complex_map(encode / size, l, K), complex_map((decode * size).conj(), l, K).mT
    if not spec.gain:
        alpha = torch.ones_like(alpha)
    re, im = torch.diag_embed(alpha.real), torch.diag_embed(alpha.imag)                      # (H,L,L)
    turn = torch.cat([torch.cat([re, -im], 2), torch.cat([im, re], 2)], 1)                   # (H,Dh,Dh)
    q_rope = decode.view(G, 2 * L, -1).repeat_interleave(gqa.heads // G, 0)                  # (H,Dh,P)
    return encode, decode, torch.cat([turn, q_rope], 2), l


def error_metric(gqa, moments, turn, cov, kind):
    """What an error e of x = [k_nope; v] costs, as a form (2G,Dh,Dh) on each KV head's key and value. "qa": in a key
    Σ_h E[(q_nope·e)²], in a value Σ_h |W_o e|², each relative to its total, which also balances keys against values."""
    G, Dh, tokens = gqa.kv_heads, gqa.head_dim, moments.count.sum()
    eye = torch.eye(Dh).to(cov)
    form = eye.expand(2, G, Dh, Dh)
    if kind == "identity":
        return form.flatten(0, 1)
    if kind == "qa":
        w_o = gqa.o_proj.weight.double().unflatten(1, (gqa.heads, Dh))                       # (D,H,Dh)
        form = torch.stack([turn.mT @ (moments.query / tokens) @ turn, torch.einsum("ohd,ohe->hde", w_o, w_o)])
        form = form.unflatten(1, (G, -1)).sum(2)                                             # (2,G,Dh,Dh)
        form = form + 1e-8 * trace(form) / (G * Dh) * eye                                    # invertible
    own = cov.view(2 * G, Dh, 2 * G, Dh).diagonal(dim1=0, dim2=2).permute(2, 0, 1).view(2, G, Dh, Dh)
    form = form / ((form * own).sum((1, 2, 3), keepdim=True) + 1e-6 * trace(form))
    return (form * (2 * G * Dh / trace(form).sum())).flatten(0, 1)         # so that the latent is about as large as x


def trace(form):                                                                             # (2,G,Dh,Dh) -> (2,1,1,1)
    return form.diagonal(dim1=2, dim2=3).sum((1, 2))[:, None, None, None]


def content_pca(gqa, moments, spec, split, modality, rank=None):
    """The latent of the content x = [k_nope; v] = nope z: joint PCA that minimises E|A (x - x')|², where A² =
    `error_metric` says what the layer makes of an error:
        A Cov(x) A = E Λ Eᵀ,   c = E_Rᵀ A (x - mean),   x' = A⁻¹ E_R c + mean
    Both are linear in z. "segments": each modality has its own mean and basis, if 10*R tokens of it were seen.
    "shared": one basis, around 0, so that no bias is needed; "adapters": then each modality corrects the latent by
    an affine map before it is decoded, c' = B c + b, by least squares. (With exact norms B = 1: the PCA was best.)
    -> eigenvalues Λ, descending; encoder weight (R,2GDh), bias (R,); decoder weight (2GDh,R), bias (2GDh,)."""
    encode_rope, decode_rope, query, _ = split
    K, width = gqa.kv_heads * gqa.head_dim, moments.first.shape[1]
    rope = F.pad(decode_rope @ encode_rope, (0, width - K, 0, K))                # (2K,Z): what the RoPE key holds
    nope = torch.eye(2 * K, width).to(rope) - rope
    own = moments.count[modality] >= 10 * (rank or 1)
    mean, cov = moments.statistics(modality if spec.modality == "segments" and own else None)
    mean, cov = nope @ mean, nope @ cov @ nope.mT
    if spec.modality != "segments":
        mean, cov = torch.zeros_like(mean), cov + mean[:, None] * mean
    value, vector = torch.linalg.eigh(error_metric(gqa, moments, query[..., :gqa.head_dim], cov, spec.metric))
    root = value.sqrt()[:, None]                                                         # (2G,1,Dh)
    A, inverse = (torch.block_diag(*half @ vector.mT) for half in (vector * root, vector / root))
    value, vector = torch.linalg.eigh(A @ cov @ A)                                       # ascending
    basis = vector.flip(1)[:, :rank]                                                     # (2GDh,R)
    to_latent = basis.mT @ A                                                             # x -> c
    down, bias, up = to_latent @ nope, -to_latent @ mean, inverse @ basis
    if spec.modality == "adapters" and own:
        target = nope.clone()
        if spec.qk_norm != "exact":                          # what is missing of the exact key; see linear_norms
            target[:K] += (torch.eye(K, width).roll(2 * K, 1) - torch.eye(K, width)).to(rope)
        mean, cov = moments.statistics(modality)
        B = to_latent @ target @ cov @ down.mT @ torch.linalg.pinv(down @ cov @ down.mT, hermitian=True)
        mean, up = up @ (to_latent @ target - B @ down) @ mean, up @ B
    return value.flip(0), down[:, :2 * K], bias, up, mean


def linear_norms(gqa, moments, kind):
    """Global-Norm-Linear (§3.2.3): RMSNorm of a head ≈ a linear map of its input u, by least squares over the
    calibration: "const" γ u / μ with one number μ a head, "affine" any matrix and bias a head.
    -> the layer with that in q_proj and k_proj, and what calibration would have seen of it, z = [k; v; exact k; 1]
    (adapters can make good a part of what the substitute lost)."""
    if not hasattr(moments, "raw_query"):
        raise UserError(f"ConvertSpec qk_norm={kind!r}: is fitted to raw moments, from Calibration(…, raw=True)")
    d, K = gqa.head_dim, gqa.kv_heads * gqa.head_dim
    gqa, new = copy.deepcopy(gqa), copy.copy(moments)

    def substitute(name, y):
        """y (heads,2Dh+1,2Dh+1), second moments of [norm(u); u; 1] -> the map [W | b] (heads,Dh,Dh+1)"""
        gamma, old = getattr(gqa, f"{name}_norm").weight.double(), getattr(gqa, f"{name}_proj").weight
        if kind == "affine":
            maps = y[:, :d, d:] @ torch.linalg.pinv(y[:, d:, d:], hermitian=True)
        else:
            cross, power = (part.diagonal(dim1=1, dim2=2) for part in (y[:, :d, d:-1], y[:, d:-1, d:-1]))
            mu = (gamma.square() * power).sum(1) / (gamma * cross).sum(1)
            maps = F.pad(torch.diag_embed(gamma / mu[:, None]), (0, 1))
        linear = nn.Linear(gqa.hidden, len(old)).to(old)
        linear.weight.copy_((maps[..., :d] @ old.double().unflatten(0, (-1, d))).flatten(0, 1))
        linear.bias.copy_(maps[..., d].flatten())
        setattr(gqa, f"{name}_proj", linear)
        setattr(gqa, f"{name}_norm", nn.Identity())
        return maps

    maps = substitute("q", moments.raw_query)
    new.query = maps @ moments.raw_query[:, d:, d:] @ maps.mT
    head = torch.arange(K, device=maps.device).view(-1, d)
    own = torch.cat([head, head + 2 * K, torch.full_like(head[:, :1], 3 * K)], 1)        # a head's [k; u; 1] in z
    maps = substitute("k", moments.second.sum(0)[own[:, :, None], own[:, None]])
    one = torch.eye(3 * K + 1).to(maps)
    k = F.pad(torch.cat([torch.block_diag(*maps[..., :d]), maps[..., d].reshape(-1, 1)], 1), (2 * K, 0))
    T = torch.cat([k, one[K:2 * K], one[:K], one[3 * K:]])                               # [k; v; u; 1] -> new z
    new.first, new.second = moments.first @ T.mT, T @ moments.second @ T.mT
    return gqa, new


def warn_of_hazards(moments, spec, layer):
    """What makes a conversion worse than it needs to be: one warning each, with the number and the remedy."""
    found, (n, squares) = [], moments.seen.tolist()
    for name, count, rank in zip(MODALITIES, moments.count.tolist(), spec.layer_ranks(layer)):
        if spec.modality != "shared" and count < 10 * rank:
            found.append(f"{count:.0f} {name} tokens of calibration for rank {rank}, at least {10 * rank} are needed: "
                         f"what both modalities share is used instead; calibrate on more {name} to get its own")
    if (longest := 1.5 * squares / n) < spec.length / 4:                     # samples of L tokens: Σn² / Σn = 2/3 L
        found.append(f"calibration samples of about {longest:.0f} tokens for a model of {spec.length}: gains and slots "
                     "depend on distances, slow frequencies get no slots; calibrate on longer samples")
    stats = [moments.statistics(m) for m in range(2) if moments.count[m] >= 100]
    spread = [float(cov.trace() / (cov.trace() + mean.square().sum())) for mean, cov in stats]
    if len(spread) == 2 and spread[1] < spread[0] / 2:
        found.append(f"vision tokens differ by {spread[1]:.0%} of their energy, text tokens by {spread[0]:.0%}, as "
                     "with an untrained vision path; train the path before converting")
    for text in found:
        warnings.warn(f"layer {layer}: {text}", stacklevel=3)


@torch.no_grad()
def greedy_ranks(layers, moments, spec, damage=None):
    """Ranks by layer and modality (§3.2.2), multiples of spec.step, at no more bytes per calibration token than
    spec.ranks: the block of eigenvalues comes first that saves most harm per byte. An eigenvalue's harm is its share
    of the layer's energy; or, with `damage`, a function that compares the model on some calibration batches with what
    it was (KL in nats), it is measured: the damage of cutting only this layer and modality, per eigenvalue cut."""
    count = sum(m.count for m in moments)
    parts = [(0,), (1,)] if spec.modality == "segments" else [(0, 1)]                    # who shares a basis
    share = [float(count[list(part)].sum() / count.sum()) for part in parts]             # of the tokens
    blocks, ranks, left = [], [], 0.0
    for i, (layer, m) in enumerate(zip(layers, moments)):
        gqa, mean_ranks = layer.self_attn, spec.layer_ranks(i)
        linear = (gqa, m) if spec.qk_norm == "exact" else linear_norms(gqa, m, spec.qk_norm)
        split = rope_split(*linear, spec)
        spectra = [content_pca(*linear, spec, split, part[0])[0].clamp_min(0) for part in parts]     # (2GDh,) each
        energy = sum(s * float(spectrum.sum()) for s, spectrum in zip(share, spectra))
        ranks.append([min(spec.step, r) for r in mean_ranks])
        for part, s, spectrum in zip(parts, share, spectra):
            width, harm = len(spectrum), s / energy
            if damage:
                cut = tuple(r if p in part else width for p, r in enumerate(mean_ranks))
                with warnings.catch_warnings(action="ignore"):                   # the other modality keeps all
                    layer.self_attn = M2LA.from_gqa(gqa, m, replace(spec, ranks=cut))
                harm = damage() / float(spectrum[cut[part[0]]:].sum())
                layer.self_attn = gqa
            left += s * (mean_ranks[part[0]] - ranks[i][part[0]])
            blocks += [(harm * float(spectrum[r:r + spec.step].sum()) / s, i, part, s)
                       for r in range(spec.step, width, spec.step)]
    for _, i, part, s in sorted(blocks, reverse=True):
        if s * spec.step <= left + 1e-9:
            left -= s * spec.step
            for p in part:
                ranks[i][p] += spec.step
    return tuple(map(tuple, ranks))


def heal(layers, sources, predict, batches, steps, lr=2e-3):
    """Distils the model that has `sources`, its GQA, into itself with the M²LA it has now. Only what conversion made is
    trained, query, encode and decode, by Adam with a learning rate that falls to 0, on one batch a step:
        KL = mean over answer tokens of Σ_v p(v) (log p(v) - log p'(v)),   p of the source, p' of the converted model
    predict(batch) -> log-probabilities (n,V). Both are one model but for the attention: no second one is held."""
    made = [layer.self_attn for layer in layers]
    maps = [p for m in made for name, p in m.named_parameters() if name.startswith(("query", "encode", "decode"))]
    adam = torch.optim.Adam(maps, lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1, (step + 1) / 5) * (1 - step / steps))

    def install(modules):
        for layer, module in zip(layers, modules):
            layer.self_attn = module
    for _, batch in zip(range(steps), batches):
        install(sources)
        with torch.no_grad():
            target = predict(batch)
        install(made)
        with torch.enable_grad():
            kl = (target.exp() * (target - predict(batch))).sum(-1).mean()
            grads = torch.autograd.grad(kl, maps)                    # of these alone: the rest stays as it is
        for p, p.grad in zip(maps, grads):
            if dist.is_initialized():                                # every process has batches of its own
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        adam.step()
        schedule.step()
    adam.zero_grad()


@torch.no_grad()
def convert_layers(layers, moments, spec, damage=None, predict=None, batches=()):
    """Puts M²LA in place of the GQA in each layer.self_attn -> spec with the ranks that each layer got.
    damage() -> nats by which the model, as it is when called, differs from its source; predict, batches: see `heal`."""
    sources = [layer.self_attn for layer in layers]
    if spec.budget != "uniform":
        spec = replace(spec, ranks=greedy_ranks(layers, moments, spec, damage if spec.budget == "measured" else None))
    for i, (layer, m) in enumerate(zip(layers, moments)):
        layer.self_attn = M2LA.from_gqa(layer.self_attn, m, spec, i)
    if predict and spec.heal and damage() > spec.tolerance:
        heal(layers, sources, predict, batches, spec.heal)
    return spec
