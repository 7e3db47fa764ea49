"""m2la.py: RoPE, GQA, the latent kernel, caches, calibration, conversion: each against an independent computation."""
import copy
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import iv3
import m2la
from iv3 import Config
from m2la import (GQA, M2LA, Absorbed, Calibration, ConvertSpec, KVCache, LatentCache, RowSet, UserError, latent_attend,
                  merge_shares, mrope)

HIDDEN, HEADS, KV, DH, THETA, SECTIONS = 64, 4, 2, 16, 1e4, (4, 2, 2)


def version(package):
    return tuple(map(int, package.__version__.split(".")[:2]))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=cuda)]
kernel = pytest.mark.skipif(m2la.triton is None, reason="needs triton (its interpreter is enough)")
if m2la.triton and os.environ.get("TRITON_INTERPRET") and version(m2la.triton) < (3, 7) and version(np) >= (2, 4):
    kernel = pytest.mark.skip(reason="the interpreter of Triton before 3.7 takes no loop bounds from numpy 2.4")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                  # many tiny operations: more threads only wait
    yield
    torch.set_num_threads(threads)


def close(a, b, tolerance):
    """Relative error of a against b, over the whole tensor."""
    error = (a.double() - b.double()).norm() / b.double().norm()
    assert error < tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"


def sample(B=2, T=24, dtype=torch.float64, device="cpu", hidden=HIDDEN):
    """x, rope, vision: runs of text and of vision tokens with different statistics and true 3-D positions."""
    vision = (torch.arange(T) // 5 % 2 == 1).expand(B, T) ^ (torch.arange(B)[:, None] % 2 == 1)
    mix = torch.randn(2, hidden // 3, hidden, dtype=torch.float64)
    x = torch.where(vision[..., None], *(torch.randn(B, T, hidden // 3, dtype=torch.float64) @ m for m in mix))
    x = x + 0.3 * torch.randn_like(x)
    positions = torch.arange(T).expand(3, B, T).clone()
    positions[1:] += torch.randint(0, 8, (2, B, T)) * vision
    rope = mrope(positions, DH, THETA, SECTIONS)
    return x.to(device, dtype), tuple(r.to(device) for r in rope), vision.to(device)


def layer(kind, dtype=torch.float64, device="cpu"):
    module = GQA(HIDDEN, HEADS, KV, DH) if kind == "gqa" else M2LA(HIDDEN, HEADS, KV, DH, 1e-6, 12, (10, 23))
    with torch.no_grad():                                     # weights that are not close to trivial
        for name, p in module.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 2)
            elif "bias" in name:
                p.normal_()
    return module.to(device, dtype)


def new_cache(kind, batch, capacity=40, dtype=torch.float64, device="cpu"):
    if kind == "gqa":
        return KVCache(1, batch, capacity, KV, DH, dtype, device)
    return LatentCache([(10, 23)], 12, batch, (capacity, capacity), dtype, device)


# ------------------------------------------------------------------------------------------ RoPE and GQA

def test_mrope_is_interleaved():
    positions = torch.randint(0, 1000, (3, 2, 5))
    cos, sin = mrope(positions, 128, 5e6, (24, 20, 20))
    assert cos.shape == (2, 5, 64) and cos.dtype == torch.float32
    axes = ["t"] * 64
    axes[1:60:3], axes[2:60:3] = "h" * 20, "w" * 20
    for l, axis in enumerate(axes):
        angle = positions["thw".index(axis)].double() * 5e6 ** (-2 * l / 128)
        torch.testing.assert_close(cos[..., l].double(), angle.cos(), atol=1e-4, rtol=0)
        torch.testing.assert_close(sin[..., l].double(), angle.sin(), atol=1e-4, rtol=0)


def naive_gqa(module, x, rope, mask):
    """One head and one token at a time, RoPE as complex multiplication."""
    B, T, _ = x.shape
    phase = torch.complex(*rope).to(torch.complex128)                                    # (B,T,Dh/2)

    def heads(projection, norm=None):
        y = projection(x).view(B, T, -1, DH)
        if norm is None:
            return y
        y = y / (y.square().mean(-1, keepdim=True) + module.eps).sqrt() * norm.weight
        z = torch.complex(y[..., :DH // 2], y[..., DH // 2:]) * phase[:, :, None]
        return torch.cat([z.real, z.imag], -1)
    q, k, v = heads(module.q_proj, module.q_norm), heads(module.k_proj, module.k_norm), heads(module.v_proj)
    out = torch.zeros(B, T, HEADS, DH, dtype=x.dtype)
    for b in range(B):
        for t in range(T):
            for h in range(HEADS):
                g = h // (HEADS // KV)
                score = (k[b, :, g] @ q[b, t, h]) / math.sqrt(DH)
                out[b, t, h] = score.masked_fill(~mask[b, 0, t], float("-inf")).softmax(0) @ v[b, :, g]
    return module.o_proj(out.flatten(2))


@torch.no_grad()
def test_gqa_equals_naive_attention():
    module = layer("gqa")
    x, rope, vision = sample(T=11)
    causal = torch.ones(2, 1, 11, 11, dtype=torch.bool).tril()
    close(module(x, rope, vision), naive_gqa(module, x, rope, causal), 1e-12)
    blocks = (torch.arange(11) < 6)[:, None] == (torch.arange(11) < 6)                   # two packed samples
    close(module(x, rope, vision, causal & blocks), naive_gqa(module, x, rope, causal & blocks), 1e-12)


# ------------------------------------------------------------------------------------------------ kernel

CASES = {                       # B, T, H, R, P, longest, splits
    "full width": (1, 1, 32, 896, 128, 130, None),
    "several splits at full width": (1, 1, 8, 896, 128, 200, 3),
    "odd rank": (3, 1, 4, 17, 80, 150, 2),
    "tiny": (4, 1, 4, 48, 32, 100, None),
    "more splits than tokens": (2, 1, 8, 80, 16, 40, 5),
    "causal tokens": (3, 4, 8, 48, 16, 90, 2),
}


def merged(out, lse):
    """Attention over all rows, from that over sets of them."""
    return (merge_shares(lse)[..., None, :] @ out).squeeze(-2), lse.logsumexp(-1)


def over_rows(q, rows, limits, rank, scale, dtype=torch.float64):
    """Attention over latent rows, written out -> out (B,T,H,R), lse (B,T,H)."""
    rows = rows.to(dtype)
    s = scale * torch.einsum("bthw,bnw->bthn", q.to(dtype), rows)
    unseen = torch.arange(rows.shape[1], device=rows.device) >= limits[:, :, None]
    s = s.masked_fill(unseen[:, :, None], -math.inf)
    p = s.softmax(-1).nan_to_num()                                                       # where nothing is seen, 0
    return torch.einsum("bthn,bnr->bthr", p, rows[..., :rank]), s.logsumexp(-1)


@kernel
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_fp64(case, device, dtype=torch.float32, tolerance=1e-5):
    B, T, H, R, P, longest, splits = CASES[case]
    q = torch.randn(B, T, H, R + P).to(device, dtype)
    rows = torch.randn(B, longest + 30, R + P).to(device, dtype)
    lengths = torch.randint(T, longest + 1, (B,))
    lengths[0] = longest
    if B > 2:
        lengths[1], lengths[2] = 0, 1                                                    # empty and very short
    limits = (lengths[:, None] - T + 1 + torch.arange(T)).clamp_min(0).to(device)
    scale = (R + P) ** -0.5
    expected, expected_lse = over_rows(q, rows, limits, R, scale)
    for b in range(B):
        rows[b, lengths[b]:] = float("nan")                                              # junk must not be read
    out, lse = merged(*m2la._attend_triton(q, rows, limits, R, scale, splits))
    assert out.shape == (B, T, H, R) and out.dtype == lse.dtype == torch.float32
    close(out, expected, tolerance)
    empty = limits == 0
    assert (out[empty] == 0).all() and (lse[empty] == float("-inf")).all()
    close(lse[~empty], expected_lse[~empty], tolerance)


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_kernel_in_two_bytes(case, dtype):
    test_kernel_equals_fp64(case, "cuda", dtype, 5e-3)


@kernel
@pytest.mark.parametrize("device", DEVICES)
def test_kernel_addresses_beyond_int32(device):
    """Sequences that lie 2^30 values apart (the storage is never touched in between), and, on a GPU, 2^31 in one."""
    lengths, stride = torch.tensor([33, 40, 64]), 2 ** 30
    rows = torch.empty(2 * stride + 64 * 64, device=device).as_strided((3, 64, 64), (stride, 64, 1))
    q, small = torch.randn(3, 1, 4, 64, device=device), torch.randn(3, 64, 64, device=device)
    rows.copy_(small)
    out, _ = merged(*m2la._attend_triton(q, rows, lengths[:, None].to(device), 48, 0.1, splits=2))
    close(out, over_rows(q, small, lengths[:, None].to(device), 48, 0.1)[0], 1e-5)
    if device == "cuda":
        N = 2 ** 21 + 100
        rows = torch.randn(1, N, 1024, device=device, dtype=torch.bfloat16)
        q, limits = torch.randn(1, 1, 32, 1024, device=device, dtype=torch.bfloat16), torch.tensor([[N]], device=device)
        close(merged(*m2la._attend_triton(q, rows, limits, 896, 0.03))[0],
              over_rows(q, rows, limits, 896, 0.03, torch.float32)[0], 5e-3)


COMPILE = """                  # in a process of its own: where TRITON_INTERPRET is set, the kernel is none to compile
import json, re, subprocess, sys, tempfile, torch, triton, m2la
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
assert tool.exists(), f"no {tool}"
for heads, tokens, R, P, kind in json.loads(sys.argv[1]):
    how = m2la.kernel_launch(heads * tokens, R + P, {"bf16": torch.bfloat16, "fp32": torch.float32}[kind])
    options = {name: how.pop(name) for name in ("num_warps", "num_stages")}
    names = m2la._attend_kernel.arg_names
    constants = dict(how, R=R, W=R + P) | ({"T": 1} if tokens == 1 else {})             # Triton's own: ints that are 1
    types = [f"*{kind}"] * 2 + ["*i32", "*fp32", "*fp32", "i32", "i32", "i32", "fp32", "i64"]
    signature = {n: "constexpr" if n in constants else types[i] for i, n in enumerate(names)}
    aligned = [i for i, n in enumerate(names) if signature[n][0] in "*i" and n != "T"]  # multiples of 16, as launched
    source = ASTSource(m2la._attend_kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    print(json.dumps([int(re.search(r"STACK:(\\d+)", usage)[1]), binary.metadata.shared, binary.asm["ptx"]]))
"""


@kernel
def test_kernel_compiles_for_an_h100_without_spills(tmp_path):
    """As launched: no stack (nothing spilled), shared memory within the 227 KB of sm_90, rows loaded ahead. The 8B
    shape with one and with several new tokens, half its rank, and the fp32 of tests, which is slow but must fit."""
    shapes = [(32, 1, 896, 128, "bf16"), (32, 4, 896, 128, "bf16"), (32, 1, 384, 128, "bf16"),
              (32, 1, 896, 128, "fp32")]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE, json.dumps(shapes)], capture_output=True, text=True, env=env,
                          cwd=Path(m2la.__file__).parent)
    if re.search(r"ImportError|ModuleNotFoundError|no /\S+cuobjdump|no attribute 'hash'", done.stderr):
        pytest.skip(f"this Triton cannot compile without a GPU: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    for shape, line in zip(shapes, done.stdout.splitlines(), strict=True):
        stack, shared, ptx = json.loads(line)
        assert shared <= 232448, (shape, shared)
        assert shape[-1] == "fp32" or (stack == 0 and "cp.async" in ptx), (shape, stack)


def row_set(rows, limits):
    """A set of rows that belong to the sequences themselves."""
    high = int(limits.max())
    return RowSet(rows, limits, high, bool((limits == high).all()), lambda x: x, lambda x: x)


@pytest.mark.parametrize("device, backend", [("cpu", "torch"), pytest.param("cpu", "triton", marks=kernel),
                                             pytest.param("cuda", "triton", marks=[cuda, kernel])])
def test_latent_attend_is_one_softmax_over_all_sets(device, backend):
    """Three sets of rows of two modalities, of different width, one partly seen, one empty for a sequence."""
    scale, ranks = 0.2, (30, 17)
    q = [torch.randn(2, 3, 4, rank + 10, device=device) for rank in ranks]
    bias = [torch.randn(2, 3, 4, device=device) for _ in ranks]
    rows = [torch.randn(2, n, rank + 10, device=device) for n, rank in ((50, 30), (20, 30), (35, 17))]
    limits = torch.tensor([[[10, 11, 12], [48, 49, 50]], [[0] * 3, [20] * 3], [[35] * 3] * 2], device=device)
    sets = [row_set(*of) for of in zip(rows, limits)]
    parts = [Absorbed(q[0], bias[0], 30, sets[:2]), Absorbed(q[1], bias[1], 17, sets[2:])]
    latents, attended_shares = latent_attend(parts, scale, backend)

    modality = [0, 0, 1]
    sums = [over_rows(q[m], rows[i], limits[i], ranks[m], scale) for i, m in enumerate(modality)]
    lse = torch.stack([lse + scale * bias[m] for m, (_, lse) in zip(modality, sums)], -1)
    shares = lse.softmax(-1)                                                             # of each set, (2,3,4,3)
    outs = [share[..., None] * out for share, (out, _) in zip(shares.unbind(-1), sums)]
    close(latents[0], outs[0] + outs[1], 1e-5)
    close(latents[1], outs[2], 1e-5)
    close(attended_shares, torch.stack([shares[..., :2].sum(-1), shares[..., 2]], -1), 1e-5)


def test_latent_attend_default_is_by_device():
    q, rows, limits = torch.randn(1, 1, 2, 8), torch.randn(1, 5, 8), torch.tensor([[5]])
    parts = [Absorbed(q, torch.zeros(1, 1, 2), 4, [row_set(rows, limits)])]
    assert torch.equal(latent_attend(parts, 1.0).latents[0], latent_attend(parts, 1.0, "torch").latents[0])


@kernel
def test_kernel_refuses_rows_that_do_not_fit():
    with pytest.raises(UserError, match="1024"):
        m2la._attend_triton(torch.randn(1, 1, 1, 1100), torch.randn(1, 2, 1100), torch.tensor([[2]]), 1000, 1.0)


def test_merge_of_unequal_and_empty_sets():
    score, value = torch.randn(3, 40).double(), torch.randn(3, 40, 5).double()
    parts = [slice(0, 7), slice(7, 40), slice(40, 40)]
    outs = torch.stack([score[:, p].softmax(-1)[:, None] @ value[:, p] for p in parts], -2)[:, 0]
    lses = torch.stack([score[:, p].logsumexp(-1) if p.start < 40 else torch.full((3,), -math.inf).double()
                        for p in parts], -1)
    out, lse = merged(outs, lses)
    close(out, (score.softmax(-1)[:, None] @ value)[:, 0], 1e-12)
    close(lse, score.logsumexp(-1), 1e-12)
    assert merge_shares(torch.full((2,), -math.inf)).isfinite().all()                    # of outputs that are 0


# ------------------------------------------------------------------------------------------------ caches

def feed(module, cache, x, rope, vision, start, stop, valid=None):
    part = slice(start, stop)
    out = forward(module, cache, x[:, part], [r[:, part] for r in rope], vision[:, part], valid)
    cache.commit()
    return out


def forward(module, cache, x, rope, vision, valid=None):
    """One forward of a layer with its cache, as the model makes it: without padding between begin and pad."""
    cache.begin(vision, valid)
    x, cos, sin, vision = (cache.unpad(part) for part in (x, *rope, vision))
    return cache.pad(module(x, (cos, sin), vision, cache=cache))


KINDS = ["gqa", "m2la"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, backend", [("gqa", "torch"), ("m2la", "torch"),
                                           pytest.param("m2la", "triton", marks=kernel)])
@torch.no_grad()
def test_cached_equals_full(kind, backend, device, monkeypatch):
    """A prefill, single tokens, few tokens, a long chunk: the same as one forward over everything."""
    if backend == "triton":
        monkeypatch.setattr(m2la, "latent_attend", lambda *args: latent_attend(*args, "triton"))
    dtype = torch.float32 if "triton" in backend or device == "cuda" else torch.float64
    module, cache = layer(kind, dtype, device), new_cache(kind, 2, dtype=dtype, device=device)
    x, rope, vision = sample(T=35, dtype=dtype, device=device)
    vision[0, :9] = False                                     # single tokens meet an empty segment first
    full = module(x, rope, vision)
    steps = [0, 7, 8, 9, 12, 24, 25, 33, 35]
    outs = [feed(module, cache, x, rope, vision, *part) for part in zip(steps, steps[1:])]
    close(torch.cat(outs, 1), full, 1e-12 if dtype == torch.float64 else 1e-4)
    assert cache.lengths.tolist() == [35, 35]


@pytest.mark.parametrize("device, dtype, tolerance", [
    ("cpu", torch.float64, 1e-12), ("cpu", torch.float32, 1e-5), ("cpu", torch.float16, 5e-3),
    *[pytest.param("cuda", dtype, tolerance, marks=cuda)
      for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2))]])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefill_in_chunks(kind, device, dtype, tolerance, monkeypatch):
    """As one fp64 forward; both modalities, chunks that begin and end in either, attention in small query blocks, and
    in a second sequence padding, which fills its last chunk."""
    module, (x, rope, vision) = layer(kind), sample(T=75)
    full = module(x, rope, vision)
    module, cache, x = module.to(device, dtype), new_cache(kind, 2, 75, dtype, device), x.to(device, dtype)
    rope, vision, valid = [r.to(device) for r in rope], vision.to(device), torch.arange(75) < torch.tensor([[75], [50]])
    monkeypatch.setattr(m2la, "BLOCK_SCORES", 1500)
    outs = [feed(module, cache, x, rope, vision, start, start + 19, valid[:, start:start + 19].to(device))
            for start in range(0, 75, 19)]
    close(torch.cat(outs, 1).cpu()[valid], full[valid], tolerance)
    assert cache.lengths.tolist() == [75, 50]


class Largest(TorchDispatchMode):
    """The bytes of the largest new tensor that any operation made."""
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.seen = max(self.seen, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefill_takes_little_memory(kind, monkeypatch):
    """A chunk behind 800 tokens makes nothing larger than the keys of one KV head."""
    module, (x, rope, vision) = layer(kind), sample(B=1, T=840)
    cache = new_cache(kind, 1, 840)
    feed(module, cache, x, rope, vision, 0, 800)
    monkeypatch.setattr(m2la, "BLOCK_SCORES", 2000)
    with Largest() as largest:
        feed(module, cache, x, rope, vision, 800, 840)
    assert 0 < largest.seen <= 8 * 840 * (DH + 12)


@pytest.mark.parametrize("attn", ["gqa", "m2la", "released"])
@torch.no_grad()
def test_a_model_prefills_in_chunks(attn, monkeypatch):
    """A batch of two videos with text and padding, DeepStack included: chunks of 16 as one forward without a cache."""
    torch.manual_seed(0)
    kind = dict(rope_width=32, ranks=((24, 24),) * 2) if attn != "gqa" else {}
    model = iv3.InternVideo3(Config(layers=2, attn=attn, **kind), (1, 2)).eval()
    ids = torch.randint(3, 1000, (2, 70))
    ids[0, 5:29], ids[1, 30:42] = 1, 2                                                   # 24 and 12 vision tokens
    valid = torch.arange(70) < torch.tensor([[70], [50]])
    batch = dict(ids=ids, positions=torch.arange(70).expand(3, 2, 70), grids=torch.tensor([[4, 4]] * 9),
                 patches=torch.randint(0, 256, (144, 3 * 2 * 16 * 16), dtype=torch.uint8))
    one = model(**batch)
    monkeypatch.setattr(iv3, "PREFILL", 16)
    cache = model.new_cache(2, 70)
    close(model(**batch, cache=cache, valid=valid)[valid], one[valid], 1e-5)
    assert cache.lengths.tolist() == [70, 50]


@pytest.mark.parametrize("prefill", [16, 6])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ragged_batch(kind, side, prefill):
    """Sequences of different length, padded on either side, one of them empty at first: as each would be alone."""
    module, (x, rope, vision) = layer(kind), sample(B=3, T=40)
    lengths, T = torch.tensor([prefill, prefill - 5, 0]), prefill
    shift = torch.zeros_like(lengths) if side == "right" else T - lengths
    index = torch.arange(T) - shift[:, None]
    valid = (index >= 0) & (index < lengths[:, None])
    index = index.clamp(0, 39)
    pick = [torch.take_along_dim(t, index[..., None], 1) for t in (x, *rope)]
    cache = new_cache(kind, 3)
    first = forward(module, cache, pick[0], pick[1:], vision.gather(1, index), valid)
    cache.commit()
    assert torch.equal(cache.lengths, lengths)
    for length in (1, 12):                                                               # decode, then a long chunk
        index = cache.lengths[:, None] + torch.arange(length)
        pick = [torch.take_along_dim(t, index[..., None], 1) for t in (x, *rope)]
        going = torch.tensor([True, True, length > 1])[:, None].expand(3, length)        # the empty one still waits
        before = cache.lengths.clone()
        out = forward(module, cache, pick[0], pick[1:], vision.gather(1, index), going)
        cache.commit()
        for b in range(3):
            end = int(cache.lengths[b])
            assert end == before[b] + length * going[b, 0]
            alone = module(x[b:b + 1, :end], tuple(r[b:b + 1, :end] for r in rope), vision[b:b + 1, :end])
            if going[b, 0]:
                close(out[b], alone[0, before[b]:end], 1e-12)
            if length == 1 and b < 2:
                close(first[b, valid[b]], alone[0, :lengths[b]], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_truncate_then_continue(kind):
    module, (x, rope, vision) = layer(kind), sample(T=30)
    full = module(x, rope, vision)
    cache = new_cache(kind, 2)
    feed(module, cache, x, rope, vision, 0, 14)
    feed(module, cache, -x, rope, ~vision, 14, 25)                                       # a wrong turn
    used = cache.nbytes()
    cache.truncate(14)
    assert cache.lengths.tolist() == [14, 14] and cache.nbytes() < used
    close(feed(module, cache, x, rope, vision, 14, 17), full[:, 14:17], 1e-12)
    cache.truncate(torch.tensor([10, 17]))                                               # each its own length
    assert cache.lengths.tolist() == [10, 17]
    part = [torch.stack([t[0, 10:12], t[1, 17:19]]) for t in (x, *rope, vision)]
    cache.begin(part[3])
    out = module(part[0], part[1:3], part[3], cache=cache)
    close(out, torch.stack([full[0, 10:12], full[1, 17:19]]), 1e-12)
    cache.truncate(0)
    close(feed(module, cache, x, rope, vision, 0, 9), full[:, :9], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_expand_gives_independent_copies(kind):
    module, (x, rope, vision) = layer(kind), sample(T=20)
    full = module(x, rope, vision)
    cache = new_cache(kind, 2)
    feed(module, cache, x, rope, vision, 0, 15)
    many = cache.expand(3)
    three = [t.repeat_interleave(3, 0) for t in (x, *rope, vision)]
    out = feed(module, many, three[0], three[1:3], three[3], 15, 18)
    close(out, full[:, 15:18].repeat_interleave(3, 0), 1e-12)
    assert cache.lengths.tolist() == [15, 15] and many.lengths.tolist() == [18] * 6
    close(feed(module, cache, x, rope, vision, 15, 20), full[:, 15:20], 1e-12)


@pytest.mark.parametrize("plainly", [False, True])                                       # True: as on a GPU
@pytest.mark.parametrize("rows, causal", [(0, True), (0, False), (1, False), (11, False)])
def test_sets_of_keys_merge_into_one_softmax(rows, causal, plainly, monkeypatch):
    """A set of which each query or sequence sees a part, or nothing, beside one that all see: softmax over both."""
    monkeypatch.setattr(m2la, "BLOCK_SCORES", 100)                                       # blocks of queries
    if plainly:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        monkeypatch.setattr(torch.ops.aten, fused.__name__.split(".")[-1],
                            lambda q, k, v, _, causal, attn_mask, scale:
                            m2la.attend_plainly(q, k, v, scale, attn_mask, causal))
    q, k, v = (torch.randn(3, heads, n, 8, dtype=torch.float64) for heads, n in ((4, 11), (2, 18), (2, 18)))
    v = v[..., :5]
    seen = torch.ones(3, 1, 11, 18, dtype=torch.bool)
    if causal:
        seen[..., :11] = torch.ones(11, 11).tril()
    part = None
    if rows:
        seen[..., :11] = torch.rand(3, 1, rows, 11) < 0.5
        seen[2, ..., :11] = False                                                        # a sequence that sees none
        part = seen[:, :, :rows, :11]
    sets = [m2la.attend_set(q, k[:, :, :11], v[:, :, :11], 0.3, part, causal),
            m2la.attend_set(q, k[:, :, 11:], v[:, :, 11:], 0.3)]
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    close(m2la.merged(sets), expected.transpose(1, 2).flatten(2), 1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tail", [3, 12])                                                # met one by one, as a set
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_branches_see_what_they_branched_from(kind, tail, device):
    """Two videos of different lengths, three questions about one and one about the other, two samples of each: every
    path through the tree is one plain sequence. Nothing is copied, and a branch holds its own tokens alone."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    module = layer(kind, dtype, device)
    x, rope, vision = sample(B=8, T=60, dtype=dtype, device=device)
    owner = torch.tensor([0, 0, 0, 1], device=device)                                    # the video of each question
    lengths = torch.tensor([20, 14], device=device)
    vision[:, 20:] = False

    # The prompts: 20 tokens of the video's sequence, of which the second has 14; then a tail of its own.
    root = new_cache(kind, 2, dtype=dtype, device=device)
    valid = torch.arange(20, device=device) < lengths[:, None]
    forward(module, root, x[:2, :20], [r[:2, :20] for r in rope], vision[:2, :20], valid)
    root.commit()
    before = [rows.clone() for rows in root.rows[0]]
    questions = root.branch(torch.tensor([3, 1], device=device), 40)
    part = slice(20, 20 + tail)
    asked_of = torch.tensor([tail, tail - 1, tail, tail - 2], device=device)
    short = torch.arange(tail, device=device) < asked_of[:, None]
    own = [t[:4, part] for t in (x, *rope, vision)]
    asked = forward(module, questions, own[0], own[1:3], own[3], short)
    questions.commit()
    samples = questions.branch(2, 40)
    late = [t[:, 50:52] for t in (x, *rope, vision)]
    out = forward(module, samples, late[0], late[1:3], late[3])
    samples.commit()
    samples = samples.expand(torch.tensor([1, 0, 1, 1, 0, 2, 1, 1], device=device))      # two end, one is doubled
    kept = torch.tensor([0, 2, 3, 5, 5, 6, 7])
    last = [t[kept, 52:53] for t in (x, *rope, vision)]
    end = forward(module, samples, last[0], last[1:3], last[3])

    for number, i in enumerate(kept.tolist()):
        q = i // 2
        video = int(owner[q])
        path = []
        for t in (x, *rope, vision):
            path.append(torch.cat([t[video, :lengths[video]], t[q, part][short[q]], t[i, 50:53]])[None])
        alone = module(path[0], tuple(path[1:3]), path[3])[0]
        own = int(short[q].sum())
        tolerance = 1e-12 if device == "cpu" else 1e-4
        close(asked[q][short[q]], alone[-3 - own:-3], tolerance)
        close(out[i], alone[-3:-1], tolerance)
        close(end[number, 0], alone[-1], tolerance)
    assert root.lengths.tolist() == [20, 14] and questions.lengths.tolist() == short.sum(1).tolist()
    assert samples.lengths.tolist() == [2] * 7
    assert all(map(torch.equal, before, root.rows[0]))


@torch.no_grad()
def test_the_cache_of_the_picture():
    """The two-segment cache that is drawn above `Cache`: limits, places and what of it is seen."""
    cache = LatentCache([(3, 2)], 2, 1, (4, 4))
    cache.begin(torch.tensor([[False, False, True, True, True, False]]))                 # what is [v] [v] [v] here
    cache.commit()
    assert cache.counts[:, 0].tolist() == [3, 3]
    cache.begin(torch.tensor([[True, False]]))                                           # [v] ?
    assert cache.limits[:, 0].tolist() == [[3, 4], [4, 4]]
    assert cache.places[:, 0].tolist() == [[4, 3], [3, 4]]                               # 4: the spare row
    assert cache.visible()[0, 0].int().tolist() == [[1, 1, 1, 0, 1, 1, 1, 1], [1] * 8]
    assert not cache.fresh and cache.mask is None and cache.growing == [0, 1]
    cache.append(0, 0, torch.full((1, 2, 5), 7.0))
    cache.append(0, 1, torch.full((1, 2, 4), 9.0))
    assert [rows[0, 3].unique().tolist() for rows in cache.rows[0]] == [[7], [9]]
    cache.commit()
    cache.truncate(7)                                                                    # only "?" is forgotten
    assert cache.counts[:, 0].tolist() == [3, 4]
    cache.begin(torch.tensor([[True, False]]), torch.tensor([[False, True]]))            # padding and "?"
    assert cache.growing == [0]


@torch.no_grad()
def test_cache_bytes_and_overflow():
    x, rope, vision = sample(B=2, T=12)
    cache = new_cache("m2la", 2, capacity=8, dtype=torch.float32)
    feed(layer("m2la"), cache, x, rope, vision, 0, 12)
    text = int((~vision).sum())
    assert cache.nbytes() == 4 * (text * (10 + 12) + (24 - text) * (23 + 12))
    sight = torch.ones(2, 9, dtype=torch.bool)
    with pytest.raises(UserError, match="capacity"):
        cache.begin(sight)
    assert cache.lengths.tolist() == [12, 12]                                            # nothing has changed
    cache.begin(sight[:, :1])


# -------------------------------------------------------------------------------- calibration, conversion

def converted(spec, gqa=None, T=200, B=8, layer_index=0):
    gqa = gqa or layer("gqa")
    x, rope, vision = sample(B, T)
    with torch.no_grad(), Calibration([gqa], raw=True) as calibration:
        target = gqa(x, rope, vision)
    module = m2la.convert_layer(gqa, calibration.moments[0], spec, layer_index)
    with torch.no_grad():
        out = module(x, rope, vision)
    return module, float((out - target).norm() / target.norm()), (gqa, x, rope, vision, target)


FULL = 2 * KV * DH                                                                       # values of a GQA row


@pytest.mark.parametrize("slots", ["uniform", "realloc"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_all_slots_and_full_rank_equal_gqa(slots, dtype, tolerance):
    module, error, (gqa, x, rope, vision, target) = converted(ConvertSpec(KV * DH, (FULL, FULL), slots=slots))
    assert error < tolerance
    out = module.to(dtype)(x.to(dtype), rope, vision)
    close(out, target, tolerance)
    cache = LatentCache([(FULL, FULL)], KV * DH, 8, (200, 200), dtype)
    with torch.no_grad():                                                                # absorbed decode as well
        parts = [feed(module, cache, x.to(dtype), rope, vision, a, b) for a, b in ((0, 190), (190, 191), (191, 196))]
    close(torch.cat(parts, 1), target[:, :196], tolerance)


def test_half_the_bytes_beats_weight_svd():
    """Same cache row (32 of 64 values): ours against the best rank-32 factors of the stacked key and value weights."""
    _, ours, (gqa, x, rope, vision, target) = converted(ConvertSpec(16, (16, 16)))
    with torch.no_grad():
        u, s, v = torch.linalg.svd(torch.cat([gqa.k_proj.weight, gqa.v_proj.weight]), full_matrices=False)
        weight = (u[:, :32] * s[:32]) @ v[:32]
        gqa.k_proj.weight.copy_(weight[:KV * DH])
        gqa.v_proj.weight.copy_(weight[KV * DH:])
        naive = float((gqa(x, rope, vision) - target).norm() / target.norm())
    assert ours < 0.7 * naive, f"ours {ours:.3f}, weight SVD {naive:.3f}"


def test_each_idea_of_the_default_helps():
    base = dict(rope_width=16, ranks=(20, 20))
    gqa = layer("gqa")

    def error(**change):
        torch.manual_seed(1)                                                             # the same data for all
        return converted(ConvertSpec(**base, **change), gqa)[1]
    best = error()
    for worse in (dict(slots="uniform"), dict(gain=False), dict(metric="balance"), dict(metric="identity"),
                  dict(modality="shared"), dict(rope_basis="real"), dict(qk_norm="affine"), dict(qk_norm="const")):
        assert best < error(**worse), worse
    assert error(qk_norm="affine") < error(qk_norm="const")


def test_values_that_w_o_ignores_cost_nothing():
    gqa, spec = layer("gqa"), dict(rope_width=KV * DH, ranks=(KV * DH // 2,) * 2)        # keys are exact: all slots
    with torch.no_grad():
        gqa.o_proj.weight[:, ::2] = 0                                                    # half of the value channels
    assert converted(ConvertSpec(**spec), gqa)[1] < 1e-3
    assert converted(ConvertSpec(**spec, metric="balance"), gqa)[1] > 0.05


@pytest.mark.parametrize("kind", ["const", "affine"])
@torch.no_grad()
def test_linear_norms_are_a_least_squares_fit(kind):
    """Head by head against lstsq; and the moments are those that calibrating on the substitute itself gives."""
    gqa, (x, rope, vision) = layer("gqa"), sample(4, 60)
    with Calibration([gqa], raw=True) as calibration:
        gqa(x, rope, vision)
    linear, moments = m2la.linear_norms(gqa, calibration.moments[0], kind)
    with Calibration([linear]) as again:
        linear(x, rope, vision)
    for name in ("count", "first", "second", "query"):
        width = slice(None) if name in ("count", "query") else slice(FULL)
        expected = getattr(again.moments[0], name)
        close(getattr(moments, name)[..., width][:, width] if name == "second" else getattr(moments, name)[..., width],
              expected, 1e-9)
    for raw, exact, fitted in zip((gqa.q_proj(x), gqa.k_proj(x)), gqa.project(x), linear.project(x)):
        for h in range(exact.shape[2]):
            u, y = raw.unflatten(2, (-1, DH))[:, :, h].flatten(0, 1), exact[:, :, h].flatten(0, 1)
            if kind == "affine":
                u = torch.cat([u, torch.ones_like(u[:, :1])], 1)
                best = u @ torch.linalg.lstsq(u, y).solution
            else:
                gamma = (gqa.q_norm if raw.shape[-1] == HEADS * DH else gqa.k_norm).weight
                u = (u * gamma).reshape(-1, 1)
                best = (u @ torch.linalg.lstsq(u, y.reshape(-1, 1)).solution).view_as(y)
            close(fitted[:, :, h].flatten(0, 1), best, 1e-9)


def test_adapters_help_linear_norms_only():
    """On an exact latent the best adapter is none; after linear norms it brings back a part of what they lost."""
    gqa, base = layer("gqa"), dict(rope_width=16, ranks=(20, 20))

    def out(**change):
        torch.manual_seed(1)
        return converted(ConvertSpec(**base, **change), gqa)
    (shared, _, (_, x, rope, vision, _)), (adapted, *_) = out(modality="shared"), out(modality="adapters")
    close(adapted(x, rope, vision), shared(x, rope, vision), 1e-6)
    for kind in ("const", "affine"):
        assert out(modality="adapters", qk_norm=kind)[1] < out(modality="shared", qk_norm=kind)[1]


def released_forward(state, x, rope, head_dim, rank):
    """The released layer from its description (paper §3.2): pairs side by side, one head at a time."""
    phase = torch.complex(*rope).to(torch.complex128)                                    # (B,T,Dh/2)
    w = {name: value.double() for name, value in state.items()}

    def turned(pairs):                                                                   # (B,T,P) -> complex (B,T,P/2)
        return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous()) * phase
    row = x @ w["kv_a_proj_with_mqa.weight"].mT + w["kv_a_proj_with_mqa.bias"]
    c, k_rope = row[..., :rank], turned(row[..., rank:])
    q = (x @ w["q_proj.weight"].mT + w["q_proj.bias"]).unflatten(2, (HEADS, -1))
    kv = (c @ w["kv_b_proj.weight"].mT).unflatten(2, (HEADS, -1))
    outs = []
    for h in range(HEADS):
        score = q[:, :, h, :head_dim] @ kv[:, :, h, :head_dim].mT
        score = score + (turned(q[:, :, h, head_dim:]) @ k_rope.conj().mT).real
        score = score * (q.shape[-1]) ** -0.5 + torch.full(score.shape[1:], -math.inf, dtype=torch.float64).triu(1)
        outs.append(score.softmax(-1) @ kv[:, :, h, head_dim:])
    return torch.cat(outs, -1) @ w["o_proj.weight"].mT


@pytest.mark.parametrize("kind", ["const", "affine"])
@torch.no_grad()
def test_fold_equals_the_linear_layer(kind):
    spec = ConvertSpec(DH, (24, 24), qk_norm=kind, modality="shared", slots="uniform")
    module, _, (_, x, rope, vision, _) = converted(spec, T=40)
    folded, expected = module.fold(), module(x, rope, vision)
    shapes = {name: tuple(value.shape) for name, value in folded.state_dict().items()}
    assert shapes == {"q_proj.weight": (HEADS * 2 * DH, HIDDEN), "q_proj.bias": (HEADS * 2 * DH,),
                      "kv_a_proj_with_mqa.weight": (24 + DH, HIDDEN), "kv_a_proj_with_mqa.bias": (24 + DH,),
                      "kv_b_proj.weight": (HEADS * 2 * DH, 24), "o_proj.weight": (HIDDEN, HEADS * DH)}
    close(folded(x, rope, vision), expected, 1e-9)
    close(released_forward(folded.state_dict(), x, rope, DH, 24), expected, 1e-6)        # fp32 angles
    cache = LatentCache([(24, 24)], DH, 8, (40, 40), torch.float64)
    parts = [feed(folded, cache, x, rope, vision, a, b) for a, b in ((0, 20), (20, 22), (22, 40))]
    close(torch.cat(parts, 1), expected, 1e-9)


@pytest.mark.parametrize("change,word", [
    (dict(qk_norm="exact"), "qk_norm=.affine."), (dict(modality="adapters"), "modality='shared'"),
    (dict(slots="realloc"), "slots='uniform'"), (dict(rope_width=2 * DH), "rope_width=16")])
def test_fold_says_what_does_not_fit(change, word):
    spec = dict(rope_width=DH, ranks=(12, 12), qk_norm="affine", modality="shared", slots="uniform")
    with pytest.raises(UserError, match=word):
        converted(ConvertSpec(**{**spec, **change}), T=40)[0].fold()


def two_layers(T=100):
    """Decoder layers that hold GQA, the second with keys of fewer directions, and their moments."""
    layers = [torch.nn.Module(), torch.nn.Module()]
    for part in layers:
        part.self_attn = layer("gqa")
    with torch.no_grad():
        layers[1].self_attn.k_proj.weight[4:] *= 1e-3
        layers[1].self_attn.v_proj.weight[8:] *= 1e-2
    x, rope, vision = sample(4, T)
    with torch.no_grad(), Calibration([part.self_attn for part in layers]) as calibration:
        for part in layers:
            part.self_attn(x, rope, vision)
    return layers, calibration.moments


@pytest.mark.parametrize("modality", ["segments", "shared"])
def test_greedy_ranks_are_the_best_of_all(modality):
    """No other allocation of the same budget keeps more of the layers' energy: all are tried."""
    layers, moments = two_layers()
    spec = ConvertSpec(16, (24, 24), step=8, modality=modality)
    ranks = m2la.greedy_ranks(layers, moments, spec)
    kept = []                                                                            # per layer and modality
    for part, m in zip(layers, moments):
        split = m2la.rope_split(part.self_attn, m, spec)
        spectra = [m2la.content_pca(part.self_attn, m, spec, split, i)[0] for i in range(2)]
        kept.append([torch.cat([torch.zeros(1), s.cumsum(0)]) / sum(s.sum() for s in spectra) for s in spectra])
    pairs = [(a, b) for a in range(8, 57, 8) for b in range(8, 57, 8) if modality == "segments" or a == b]
    best = max(sum(float(kept[i][p][pair[p]]) for i, pair in enumerate(both) for p in range(2))
               for both in itertools.product(pairs, pairs) if sum(map(sum, both)) <= 4 * 24)
    assert sum(map(sum, ranks)) == 4 * 24 and ranks != ((24, 24), (24, 24))
    assert sum(float(kept[i][p][pair[p]]) for i, pair in enumerate(ranks) for p in range(2)) > best - 1e-9


def test_measured_damage_decides_the_ranks():
    layers, moments = two_layers()
    gqa = [part.self_attn for part in layers]

    def damage():                                                                        # the model needs layer 1, text
        second = layers[1].self_attn
        return 1.0 if isinstance(second, M2LA) and second.ranks[0] < FULL else 1e-3
    spec = m2la.convert_layers(layers, moments, ConvertSpec(16, (16, 16), step=8), damage)
    assert spec.ranks[1][0] >= 32 and sum(map(sum, spec.ranks)) == 64
    assert [part.self_attn.ranks for part in layers] == list(spec.ranks)
    for part, source in zip(layers, gqa):
        part.self_attn = source
    assert m2la.convert_layers(layers, moments, ConvertSpec(16, (16, 16), budget="uniform")).ranks == (16, 16)


def test_healing_where_the_damage_asks_for_it():
    """It brings the model nearer to its source on samples it has not seen, and trains nothing but the new maps."""
    layers, moments = two_layers()
    gqa, head = [part.self_attn for part in layers], torch.randn(HIDDEN, 2).double() @ torch.randn(2, 20).double() / 4
    state = copy.deepcopy([m.state_dict() for m in gqa])
    x, (cos, sin), vision = sample(12, 30)
    unseen, *seen = zip(x.split(2), zip(cos.split(2), sin.split(2)), vision.split(2))

    def predict(batch):
        x, rope, vision = batch
        for part in layers:
            x = x + part.self_attn(x, rope, vision)
        return (x @ head).flatten(0, 1).log_softmax(-1)
    with torch.no_grad():
        target = predict(unseen)

    @torch.no_grad()
    def damage():
        return float((target.exp() * (target - predict(unseen))).sum(-1).mean())

    poor = dict(budget="uniform", metric="identity", gain=False, slots="uniform", rope_basis="real")

    def convert(**spec):
        for part, source in zip(layers, gqa):
            part.self_attn = source
        m2la.convert_layers(layers, moments, ConvertSpec(16, (8, 8), **poor, **spec), damage, predict,
                            itertools.cycle(seen))
        return damage()
    before = convert(heal=0)
    assert convert(tolerance=before + 1e-9) == before > 0.02
    assert convert(tolerance=before - 1e-9) < 0.9 * before
    for part, source, old in zip(layers, gqa, state):
        for name, value in part.self_attn.state_dict().items():
            assert name not in old or torch.equal(value, old[name]), name
        assert all(torch.equal(value, old[name]) for name, value in source.state_dict().items())


@torch.no_grad()
def test_hazards_are_named_with_their_number():
    def messages(spec, change=None, T=200):
        gqa, (x, rope, vision) = layer("gqa"), sample(4, T)
        if change:
            x = change(x, vision)
        with Calibration([gqa]) as calibration:
            gqa(x, rope, vision)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            m2la.convert_layer(gqa, calibration.moments[0], spec, 5)
        return [str(w.message) for w in caught]
    assert messages(ConvertSpec(16, (8, 8), length=800)) == []
    short, = messages(ConvertSpec(16, (8, 8), length=4096))
    assert short.startswith("layer 5: calibration samples of about 20") and "4096" in short and "longer" in short
    same = torch.randn(HIDDEN).double()                                                  # all vision tokens alike
    blind, = messages(ConvertSpec(16, (8, 8)), lambda x, vision: torch.where(vision[..., None], same + 0.1 * x, x))
    assert "vision tokens differ by" in blind and "train the path" in blind
    narrow = torch.randn(5, HIDDEN).double()
    held = messages(ConvertSpec(16, (40, 40)), lambda x, vision: x[..., :5] @ narrow)
    assert any("rank 40 for text, but" in m and "more varied data" in m for m in held)


def test_linear_norms_need_raw_moments():
    gqa, (x, rope, vision) = layer("gqa"), sample()
    with torch.no_grad(), Calibration([gqa]) as calibration:
        gqa(x, rope, vision)
    with pytest.raises(UserError, match="raw=True"):
        m2la.convert_layer(gqa, calibration.moments[0], ConvertSpec(16, (2, 2), qk_norm="const"))


def test_unitary_basis_joins_heads_that_differ_by_a_phase():
    """Two KV heads with keys κ and iκ: one complex slot per frequency holds both; no real matrix can."""
    gqa = layer("gqa")
    with torch.no_grad():
        re, im = gqa.k_proj.weight[:DH].chunk(2)
        gqa.k_proj.weight[DH:] = torch.cat([-im, re])
        gqa.k_norm.weight.fill_(1)
    spec = dict(rope_width=DH, ranks=(FULL, FULL), slots="uniform", modality="shared")
    assert converted(ConvertSpec(**spec), gqa)[1] < 1e-6
    assert converted(ConvertSpec(**spec, rope_basis="real"), gqa)[1] > 0.1


def test_cost_goes_down_with_rank_and_by_modality():
    errors = [converted(ConvertSpec(16, (r, r)))[1] for r in (4, 16, 40)]
    assert errors[0] > errors[1] > errors[2]
    module, _, _ = converted(ConvertSpec(16, [(8, 24), (24, 8)]), layer_index=1)
    assert module.ranks == (24, 8) and [d.in_features for d in module.decode] == [24, 8]


def test_padding_does_not_count():
    gqa, (x, rope, vision) = layer("gqa"), sample(2, 30)
    valid = torch.arange(30) < torch.tensor([30, 13])[:, None]
    with torch.no_grad(), Calibration([gqa]) as padded:
        padded.valid = valid
        gqa(x, rope, vision)
    with torch.no_grad(), Calibration([gqa]) as alone:
        for b, n in enumerate((30, 13)):
            gqa(x[b:b + 1, :n], tuple(r[b:b + 1, :n] for r in rope), vision[b:b + 1, :n])
    for name, value in vars(alone.moments[0]).items():
        torch.testing.assert_close(getattr(padded.moments[0], name), value, atol=1e-4, rtol=1e-4, msg=name)
    assert alone.moments[0].count.sum() == 43
    gqa(x, rope, vision)                                                                 # the hook is gone
    assert alone.moments[0].count.sum() == 43


@pytest.mark.parametrize("B,H,G", [(1, 4, 2), (2, 3, 3)])
def test_block_attention_is_attention_with_the_whole_mask(B, H, G):
    """Output and gradients in fp64, against a softmax over all keys; a query that sees nothing is no NaN."""
    torch.manual_seed(0)
    T = 20
    blocks = [(0, 8, 0, 0), (8, 14, 8, 8), (14, 20, 5, 11)]
    looked_at = torch.zeros(T, T, dtype=torch.bool)
    for start, stop, head, low in blocks:
        looked_at[start:stop, :head] = looked_at[start:stop, low:stop] = True
    mask = torch.rand(B, 1, T, T) < 0.5
    mask = mask & looked_at & torch.ones(T, T, dtype=torch.bool).tril() | torch.eye(T, dtype=torch.bool)
    q, k, v = (torch.randn(B, n, T, width, dtype=torch.float64, requires_grad=True)
               for n, width in ((H, 6), (G, 6), (G, 4)))

    scores = (q @ k.repeat_interleave(H // G, 1).mT * 0.3).masked_fill(~mask, -torch.inf)
    want = (scores.softmax(-1) @ v.repeat_interleave(H // G, 1)).transpose(1, 2).flatten(2)
    got = m2la.attend(q, k, v, m2la.Blocks(mask, blocks), 0.3)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for ours, theirs in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, want))):
        torch.testing.assert_close(ours, theirs)

    mask[0, :, 3] = False
    assert m2la.attend(q, k, v, m2la.Blocks(mask, blocks), 0.3).isfinite().all()


def test_block_attention_by_the_fused_kernel_and_under_autocast(monkeypatch):
    """What a GPU or a long sequence runs gives the same; bf16 inputs under autocast, gradients in their type."""
    torch.manual_seed(0)
    mask = m2la.Blocks(torch.ones(2, 1, 16, 16, dtype=torch.bool).tril(), [(0, 6, 0, 0), (6, 16, 6, 6)])
    q, k, v = (torch.randn(2, n, 16, width, requires_grad=True) for n, width in ((4, 8), (2, 8), (2, 4)))
    own = m2la.attend(q, k, v, mask, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        rough = m2la.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, 0.3)
    rough.sum().backward()
    assert q.grad.dtype == torch.float32 and 0 < (rough - own).abs().max() < 0.05
    monkeypatch.setattr(m2la, "KEPT", 0)
    torch.testing.assert_close(m2la.attend(q, k, v, mask, 0.3), own)


def calibration_batch(valid=None, mask=None):
    """Two sequences of 30 tokens with a video each, as iv3.collate or train.collate_packs would hand them over."""
    ids = torch.randint(3, 1000, (2, 30))
    ids[:, 5:17] = 1                                                                     # vision: 2 patches x 6
    batch = dict(ids=ids, positions=torch.arange(30).expand(3, 2, 30), grids=torch.tensor([[4, 4]] * 6),
                 patches=torch.randint(0, 256, (96, 3 * 2 * 16 * 16), dtype=torch.uint8), valid=valid)
    return batch if mask is None else {**batch, "mask": mask, "answer": torch.ones(2, 30, dtype=torch.bool)}


@pytest.mark.parametrize("raw", [False, True])
@torch.no_grad()
def test_calibrate_is_the_loop_over_batches(raw, monkeypatch):
    """Padding does not count, packed conversations do not see each other, and processes add up what they saw."""
    torch.manual_seed(0)
    model = iv3.InternVideo3(Config(layers=2), (1, 2)).eval()
    valid = torch.arange(30) < torch.tensor([[30], [21]])
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    packed = causal & ((torch.arange(30) < 20)[:, None] == (torch.arange(30) < 20))
    blocks = m2la.Blocks(packed.expand(2, 1, 30, 30), [(0, 20, 0, 0), (20, 30, 0, 20)])
    batches = [calibration_batch(valid), calibration_batch(torch.ones_like(valid), blocks)]
    calibration = m2la.calibrate(model, iter(batches), raw)

    with Calibration([layer.self_attn for layer in model.language_model.layers], raw) as expected:
        for batch in batches:
            expected.valid = batch["valid"]
            model(*[batch[name] for name in ("ids", "positions", "patches", "grids")], mask=batch.get("mask"))
    assert len(calibration.moments) == 2 and calibration.modules == expected.modules
    for got, want in zip(calibration.moments, expected.moments):
        assert vars(got).keys() == vars(want).keys() and hasattr(got, "raw_query") == raw
        assert all(torch.equal(value, getattr(want, name)) for name, value in vars(got).items())
        assert got.count.tolist() == [51 + 60 - 2 * 24, 48]
        seen = sum(range(1, 31)) + sum(range(1, 22)) + 2 * (sum(range(1, 21)) + sum(range(1, 11)))
        assert got.seen[0] == seen

    two = SimpleNamespace(is_initialized=lambda: True, all_reduce=lambda t: t.mul_(2))
    monkeypatch.setattr(m2la, "dist", two)                                               # another process saw the same
    for got, want in zip(m2la.calibrate(model, batches, raw).moments, expected.moments):
        assert all(torch.equal(value, 2 * getattr(want, name)) for name, value in vars(got).items())


def test_too_little_calibration_falls_back_to_a_shared_basis():
    with pytest.warns(UserWarning, match=r"layer 3: \d+ vision tokens.*at least 160.*calibrate on more vision"):
        module, _, _ = converted(ConvertSpec(16, (2, 16)), T=15, layer_index=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared, _, _ = converted(ConvertSpec(16, (2, 16), modality="shared"), T=15)
        converted(ConvertSpec(16, (2, 2)), T=15)
    assert module.decode[1].weight.shape == shared.decode[1].weight.shape


def test_conversion_without_calibration_is_refused():
    gqa = layer("gqa")
    with pytest.raises(UserError, match="calibration saw no tokens"):
        m2la.convert_layer(gqa, Calibration([gqa]).moments[0], ConvertSpec(16, (8, 8)))
    x, rope, vision = sample()
    cache = new_cache("gqa", 2)
    cache.begin(vision)
    with Calibration([gqa]), pytest.raises(UserError, match="without a cache"):
        gqa(x, rope, vision, cache=cache)


@pytest.mark.parametrize("field,value", [
    ("rope_width", 7), ("rope_width", 0), ("rope_width", "32"), ("ranks", (8,)), ("ranks", (8, 0)), ("ranks", 8),
    ("ranks", []), ("ranks", [(8, 8), (8,)]), ("ranks", (8, 8.5)), ("rope_basis", "complex"), ("slots", "greedy"),
    ("gain", "yes"), ("metric", "fisher"), ("modality", "audio"), ("qk_norm", "none"), ("heal", -1),
    ("budget", "best")])
def test_bad_spec_names_the_field(field, value):
    with pytest.raises(UserError, match=f"ConvertSpec {field}"):
        ConvertSpec(**{"rope_width": 16, "ranks": (8, 8), field: value})


@pytest.mark.parametrize("spec,word", [
    (dict(rope_width=24, ranks=(8, 8), slots="uniform"), "multiple of the head dim 16"),
    (dict(rope_width=16, ranks=(8, 65)), "at most 64"), (dict(rope_width=64, ranks=(8, 8)), "32"),
    (dict(rope_width=16, ranks=[(8, 8)]), "1 pairs given, but layer 2")])
def test_spec_that_does_not_fit_the_layer(spec, word):
    with pytest.raises(UserError, match=word):
        converted(ConvertSpec(**spec), T=20, layer_index=2)


def test_trains():
    """Every map gets a finite gradient, and a few steps bring a converted layer nearer to its source."""
    module, _, (gqa, x, rope, vision, target) = converted(ConvertSpec(16, (12, 12)), T=30)
    mask = torch.ones(8, 1, 30, 30, dtype=torch.bool).tril()
    losses = []
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(F.mse_loss(module(x, rope, vision, mask), target))
        losses[-1].backward()
        for name, p in module.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


def test_state_round_trip():
    module, _, (_, x, rope, vision, _) = converted(ConvertSpec(16, (12, 20)), T=60)
    fresh = M2LA(HIDDEN, HEADS, KV, DH, 1e-6, 16, (12, 20)).double()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x, rope, vision), module(x, rope, vision))
