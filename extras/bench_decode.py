"""Time of a new token after a full cache: M²LA, a good GQA and the paper's eager GQA (§3.2, §6).

    python extras/bench_decode.py --preset tiny --contexts 1024,4096 --json F.json
    python extras/bench_decode.py --preset qwen3-vl-8b --attention-only --contexts 32768
    OMP_NUM_THREADS=1 python extras/bench_decode.py --preset small --contexts 2048,8192 --transformers
    OMP_NUM_THREADS=1 python extras/bench_decode.py --preset small --contexts 2048,8192,32768 --transformers --prefill

Decoding one token reads every weight and every cached value once, so on a GPU its time is a matter of bytes:
M²LA's cache has half of GQA's. The paper (§6, one H200, bf16, batch 1, 16K tokens decoded, no acceleration
for either model): 39.96 against 21.74 tokens/s at 32K (1.84 times), 4.12 times at 128K, 4.77 at 256K, 5.01 at
384K; from 512K on its GQA is out of memory, M²LA gives 8.52 tokens/s there and runs to 768K.

Three kinds are timed side by side. `gqa_eager` is the paper's baseline: the cache is copied to grow, keys and
values are expanded to all heads, the scores are written out. `gqa` is what a good implementation does. Each
time stands beside its limit: the bytes of a step at the rate at which this device copies memory (`of_copy`:
the share reached). --transformers times a fourth beside them: Hugging Face's Qwen3-VL with the same weights,
its DynamicCache and its fused attention. --prefill times reading the whole context instead, as text, into an
empty cache: iv3 reads it in chunks, of which each meets its own tokens and then all earlier ones.

Differs from the paper:
  1. The cache is filled with random values instead of a prefill: a step's time does not depend on them.
  2. A time is the median of --steps tokens at one length, not the mean over 16K tokens.
  3. On a GPU the two good kinds replay a CUDA graph: launching kernels would take longer than most of them.
  4. On one thread of a CPU a time is CPU time, which other processes disturb least.
"""
import argparse
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from tqdm import tqdm

import iv3
from eval import table, write_json
from iv3 import need
from m2la import GQA, mrope, rotate

KINDS = ("m2la", "gqa", "gqa_eager")
WARM_UP = 3                              # steps before the timed ones: the first wait for memory and kernels

# --------------------------------------------------------------------- GQA as others decode it: the paper


class GrownCache(list):
    """Per layer a pair k, v (B,G,N,Dh), copied to grow by a token: nothing to prepare, nothing to undo."""

    begin = commit = truncate = lambda *_: None
    pad = unpad = lambda _, x: x                                  # there is no padding


class EagerGQA(GQA):
    """GQA that computes a token's scores one after another, as written in a paper."""

    def forward(self, x, rope, vision, mask=None, cache=None, layer=0):
        """x (B,1,D), rope (cos, sin) each (B,1,Dh/2) → (B,1,D)."""
        q, k, v = self.project(x)                                 # (B,1,H,Dh), (B,1,G,Dh) twice
        cos, sin = (angles[:, :, None] for angles in rope)        # (B,1,1,Dh/2): the same for all heads
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        # The new token joins the cache: all of it is copied.
        held_k, held_v = cache[layer]
        k = torch.cat([held_k, k.transpose(1, 2)], 2)             # (B,G,N+1,Dh)
        v = torch.cat([held_v, v.transpose(1, 2)], 2)
        cache[layer] = [k, v]
        # Each KV head is copied for the H/G query heads that share it.
        sharing = self.heads // self.kv_heads
        k = k.repeat_interleave(sharing, 1)                       # (B,H,N+1,Dh)
        v = v.repeat_interleave(sharing, 1)
        # Attention with all scores in memory.
        scores = q.transpose(1, 2) @ k.mT * self.scale            # (B,H,1,N+1)
        out = torch.softmax(scores.float(), -1).to(x.dtype) @ v   # (B,H,1,Dh)
        return self.o_proj(out.transpose(1, 2).flatten(2))


# --------------------------------------------------------------------------------------- transformers

def their_decoder(gqa):
    """transformers' decoder with the sizes and the weights of our GQA model."""
    try:
        from transformers.models.qwen3_vl import configuration_qwen3_vl, modeling_qwen3_vl
    except ImportError as error:
        raise iv3.UserError(f"--transformers: {error} (pip install transformers==4.57.3)") from None
    cfg = gqa.cfg
    config = configuration_qwen3_vl.Qwen3VLTextConfig(
        vocab_size=cfg.vocab, hidden_size=cfg.hidden, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, intermediate_size=cfg.mlp, rms_norm_eps=cfg.eps,
        rope_theta=cfg.theta, rope_scaling={"rope_type": "default", "mrope_interleaved": True,
                                            "mrope_section": list(cfg.mrope_sections)})
    config._attn_implementation = "sdpa"                          # its default in from_pretrained
    model = modeling_qwen3_vl.Qwen3VLTextModel(config)
    model.load_state_dict(gqa.language_model.state_dict(), assign=True)
    return model.eval()


class TheirCache:
    """A DynamicCache that holds what a cache of ours holds."""

    def __init__(self, gqa, cache):
        from transformers import DynamicCache
        self.cache = DynamicCache()
        for i, layer in enumerate(gqa.language_model.layers):
            rows, = cache.view(i)
            k, v = layer.self_attn.keys_and_values(rows)          # (B,G,N,Dh) each
            self.cache.update(k.contiguous(), v.contiguous(), i)

    def truncate(self, length):
        self.cache.crop(length)


# -------------------------------------------------------------------------------- models and memory

def free_memory(device):
    """GB that can still be taken."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / 1e9
    pages = "SC_PHYS_PAGES"
    if "SC_AVPHYS_PAGES" in os.sysconf_names:                     # macOS only tells what there is in all
        pages = "SC_AVPHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 1e9


def whole_memory(device):
    """GB of the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1] / 1e9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def model_of(kind, cfg, attention_only, dtype):
    """A model of the kind without its vision tower or, with `attention_only`, with nothing but attention."""
    if kind == "m2la":
        # A row of half of GQA's 2·G·Dh values, as the released layer has it: R latent values and Dh of the
        # RoPE key.
        latent = (cfg.kv_heads - 1) * cfg.head_dim
        cfg = replace(cfg, attn="m2la", rope_width=cfg.head_dim, ranks=((latent, latent),) * cfg.layers)
    model = iv3.InternVideo3(cfg, (0, 1)).to(dtype)
    model.visual = None
    for layer in model.language_model.layers:
        if attention_only:
            layer.mlp = None
        if kind == "gqa_eager":
            layer.self_attn.__class__ = EagerGQA
    if attention_only:
        model.lm_head = None
        model.language_model.embed_tokens = None
    return model


def decode_models(cfg, attention_only, device, dtype):
    """{kind: a model} with random weights. GQA's weights are among M²LA's, so they are held once."""
    models = {}
    with torch.device("meta"):                                    # shapes without memory
        for kind in KINDS:
            models[kind] = model_of(kind, cfg, attention_only, dtype)
    latent = models["m2la"]
    needed = sum(p.nbytes for p in latent.parameters()) / 1e9
    free = free_memory(device)
    need(needed <= free, f"the weights need {needed:.1f} GB, {free:.1f} are free: use fewer --layers or "
                         "--attention-only")
    for p in latent.to_empty(device=device).parameters():
        p.normal_(std=0.02)
    for layer in latent.language_model.layers:
        slots = torch.arange(cfg.head_dim // 2)                   # one RoPE slot per frequency
        layer.self_attn.slots.copy_(slots)
    for model in models.values():
        model.load_state_dict(latent.state_dict(), strict=False, assign=True)
    return models


# ------------------------------------------------------------------------------------ one new token

def vision_of(start, stop):
    """Which of the bench's tokens are vision (1,T): 15 of 16, as in a long video."""
    return torch.arange(start, stop)[None] % 16 != 0


def filled_cache(model, context, eager, batch=1):
    """A cache of `context` random tokens in each sequence, with room for one more."""
    cfg = model.cfg
    layers = model.language_model.layers
    if eager:
        like = dict(device=model.device, dtype=model.language_model.norm.weight.dtype)
        shape = (2, batch, cfg.kv_heads, context, cfg.head_dim)   # k and v
        return GrownCache(torch.randn(shape, **like) for _ in layers)
    vision = vision_of(0, context).to(model.device)
    seen = int(vision.sum())
    vision = vision.expand(batch, -1)
    capacity = context + 1
    if cfg.attn == "m2la":
        capacity -= seen                                          # text rows: vision has a segment of its own
    cache = model.new_cache(batch, capacity, seen + 1)
    for segments in cache.rows:
        for rows in segments:
            rows.normal_()
    cache.begin(vision)                                           # counts the rows as `context` tokens
    cache.commit()
    return cache


def decode_step(model, context, eager, batch=1):
    """→ a function that computes the token after `context` cached ones, and the cache. A step leaves its
    token in the cache; cache.truncate(context) takes it back."""
    cfg = model.cfg
    lm = model.language_model
    device = model.device
    ids = torch.full((batch, 1), 2, device=device)                # any text token
    positions = torch.full((3, batch, 1), context, device=device)
    x = torch.randn(batch, 1, cfg.hidden, device=device, dtype=lm.norm.weight.dtype)
    rope = mrope(positions, cfg.head_dim, cfg.theta, cfg.mrope_sections)
    vision = ids < 2
    cache = filled_cache(model, context, eager, batch)

    def step():
        if lm.embed_tokens is not None:
            return model.logits(model(ids, positions, cache=cache))
        cache.begin(vision)                                       # attention alone
        return lm.layers[0].self_attn(x, rope, vision, cache=cache)

    if eager or device.type == "cpu":
        return step, cache
    for _ in range(2):                                            # compiles kernels: a graph can only record
        step()
        cache.truncate(context)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay():
        graph.replay()
        return out
    return replay, cache


def their_step(gqa, theirs, context, batch=1):
    """As decode_step, of transformers' decoder."""
    cache = TheirCache(gqa, filled_cache(gqa, context, False, batch))
    ids = torch.full((batch, 1), 2, device=gqa.device)
    positions = torch.full((3, batch, 1), context, device=gqa.device)

    def step():
        out = theirs(input_ids=ids, position_ids=positions, past_key_values=cache.cache, use_cache=True,
                     cache_position=positions[0, 0])
        return gqa.logits(out.last_hidden_state)
    return step, cache


def step_clock():
    """The clock of a step: CPU time where one thread does all of it."""
    if torch.cuda.is_available() or torch.get_num_threads() > 1:
        return time.perf_counter
    return time.process_time


def timed(run, device, clock=time.perf_counter):
    """ms that run() takes, the GPU's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (clock() - start) * 1e3


# ------------------------------------------------------------------------- the figures of a context

def cache_needs(cfg, context, bytes_of_value, batch=1):
    """{kind: GB of its cache}"""
    layer = 2 * cfg.kv_heads * cfg.head_dim * context * batch * bytes_of_value / 1e9
    copies = 1 + cfg.heads / cfg.kv_heads                         # of one layer: grown, then for all heads
    return {"m2la": layer * cfg.layers / 2,
            "gqa": layer * cfg.layers,
            "gqa_eager": layer * (cfg.layers + copies),
            "transformers": layer * (cfg.layers + 1)}             # a layer is copied to grow


def take_turns(models, kinds, context, steps, device, batch):
    """{kind: [ms of each timed step]}. The kinds take turns, so that a busy machine slows them all."""
    clock = step_clock()
    runs = {}
    for kind in kinds:
        if kind == "transformers":
            runs[kind] = their_step(models["gqa"], models[kind], context, batch)
        else:
            runs[kind] = decode_step(models[kind], context, kind == "gqa_eager", batch)
    times = {kind: [] for kind in kinds}
    for _ in range(WARM_UP + steps):
        for kind, (step, cache) in runs.items():
            cache.truncate(context)                               # the same token again
            times[kind].append(timed(step, device, clock))
    return {kind: ms[WARM_UP:] for kind, ms in times.items()}


def measured_times(models, gb, context, steps, device, batch):
    """{kind: ms of a token}. A kind that does not fit alone is left out, with a line that says so; those that
    do not fit together are timed one after the other."""
    free = 0.95 * free_memory(device)                             # the rest is for activations
    fit = []
    for kind in models:
        if gb[kind] <= free:
            fit.append(kind)
        else:
            print(f"context {context}: no {kind}: its cache needs {gb[kind]:.1f} GB, {free:.1f} are free")
    groups = [[kind] for kind in fit]
    if sum(gb[kind] for kind in fit) <= free:
        groups = [fit]
    times = {}
    for group in groups:
        times |= take_turns(models, group, context, steps, device, batch)
    return {kind: float(np.median(ms)) for kind, ms in times.items()}


def prefill_row(models, context, steps, device):
    """The figures of reading `context` tokens of text into an empty cache; the kinds take turns."""
    clock = step_clock()
    cfg = models["gqa"].cfg
    ids = torch.randint(2, cfg.vocab, (1, context), device=models["gqa"].device)
    positions = torch.arange(context, device=ids.device).expand(3, 1, -1)

    def ours(kind):
        model = models[kind]
        model(ids, positions, cache=model.new_cache(1, context, 0))

    runs = {kind: partial(ours, kind) for kind in ("m2la", "gqa")}
    if "transformers" in models:
        runs["transformers"] = lambda: models["transformers"](input_ids=ids, use_cache=True)
    times = {kind: [] for kind in runs}
    for _ in range(1 + steps):                                    # the first warms up
        for kind, run in runs.items():
            times[kind].append(timed(run, device, clock))
    ms = {kind: float(np.median(values[1:])) for kind, values in times.items()}
    row = {"context": context} | {f"{kind}_ms": value for kind, value in ms.items()}
    if "transformers" in ms:
        row |= {f"{kind}_of_transformers": ms[kind] / ms["transformers"] for kind in ("m2la", "gqa")}
    return row


def rates(kind, model, ms, gb, copied, batch):
    """What a step's time means: tokens a second, and GB/s read, of the `copied` GB/s of this device."""
    lm = model.language_model
    weights = sum(p.nbytes for p in model.parameters())
    if not model.cfg.tied and lm.embed_tokens is not None:
        weights -= lm.embed_tokens.weight.nbytes                  # a step reads one row of it
    read = (weights / 1e9 + gb) / ms * 1e3
    return {f"{kind}_tokens_s": batch * 1e3 / ms, f"{kind}_cache_mb": gb * 1e3, f"{kind}_gb_s": read,
            f"{kind}_of_copy": read / copied}


def decode_row(models, context, steps, device, copied, batch):
    """A context's figures; None where a kind did not fit. `copied`: GB/s of a copy, the limit of any step."""
    bytes_of_value = models["gqa"].language_model.norm.weight.element_size()
    gb = cache_needs(models["gqa"].cfg, context, bytes_of_value, batch)
    times = measured_times(models, gb, context, steps, device, batch)
    row = {"context": context}
    for kind in models:
        row[f"{kind}_ms"] = times.get(kind)
    for kind in ("m2la", "gqa"):
        if kind in times:
            row |= rates(kind, models[kind], times[kind], gb[kind], copied, batch)
    for name, kind in (("speedup", "gqa"), ("speedup_over_eager", "gqa_eager")):
        row[name] = None
        if kind in times and "m2la" in times:
            row[name] = times[kind] / times["m2la"]
    if "transformers" in times:
        for kind in ("m2la", "gqa"):
            if kind in times:
                row[f"{kind}_of_transformers"] = times[kind] / times["transformers"]
    row["cache_ratio"] = gb["m2la"] / gb["gqa"]
    return row


# ---------------------------------------------------------------------------------------- the bench

def machine():
    """The device that is timed, and the precision that a model has there."""
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    return "cpu", torch.float32


def copy_speed(device):
    """GB/s, read and written, of copying a tensor that no cache of the processor holds."""
    size = 2 ** 30 if device == "cuda" else 2 ** 28
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    ms = np.median([timed(lambda: target.copy_(source), device) for _ in range(10)])
    return 2 * size / 1e6 / float(ms)


def positive_numbers(text):
    """--contexts: '1024,4096' → [1024, 4096]."""
    numbers = []
    for part in text.split(","):
        need(part.strip().isdecimal() and int(part) > 0,
             f"--contexts {text}: takes positive numbers such as 1024,4096")
        numbers.append(int(part))
    return numbers


def print_rows(rows):
    """One column per context, one line per figure."""
    figures = []
    for row in rows:
        figures += [key for key in row if key not in ("name", "context", *figures)]
    lines = []
    for figure in figures:
        line = [figure]
        for row in rows:
            value = row.get(figure)
            line.append("" if value is None else f"{value:.4g}")
        lines.append(line)
    print(table(["", *(str(row["context"]) for row in rows)], lines))


@torch.no_grad()
def bench_decode(args):
    contexts = positive_numbers(args.contexts)
    device, dtype = machine()
    torch.manual_seed(args.seed)
    cfg = iv3.Config.preset(args.preset)
    layers = args.layers or cfg.layers
    if args.attention_only:
        layers = 1
    cfg = replace(cfg, layers=layers, deepstack=())               # no tower: nothing to add to a layer
    models = decode_models(cfg, args.attention_only, device, dtype)
    if args.transformers:
        need(not args.attention_only, "--transformers times a whole decoder: leave --attention-only out")
        models["transformers"] = their_decoder(models["gqa"])
    copied = copy_speed(device)
    memory = whole_memory(device)
    rows = []
    for context in tqdm(contexts, disable=None, leave=False):
        if args.prefill:
            row = prefill_row(models, context, args.steps, device)
        else:
            row = decode_row(models, context, args.steps, device, copied, args.batch)
        if row["m2la_ms"] or row["gqa_ms"]:
            rows.append({"name": f"{args.preset} {context}", **row})
    print_rows(rows)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    env = {"device": name, "torch": torch.__version__, "dtype": str(dtype), "preset": args.preset, "batch": args.batch,
           "layers": layers, "attention_only": args.attention_only, "steps": args.steps, "seed": args.seed,
           "copy_gb_s": copied, "memory_gb": memory,
           "measures": "median of " + ("a prefill, random weights" if args.prefill else
                                       "a new token, random weights and cache")}
    return {"env": env, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description="Time a new token on the latent cache and on GQA's.")
    add = parser.add_argument
    add("--preset", choices=list(iv3.PRESETS), default="tiny", help="sizes (default tiny)")
    add("--contexts", default="1024,4096", help="cached tokens, comma-separated (default 1024,4096)")
    add("--layers", type=int, help="layers of the decoder (default: the preset's)")
    add("--attention-only", action="store_true", help="time one attention layer, not the whole decoder")
    add("--batch", type=int, default=1, help="sequences that decode a token each (default 1)")
    add("--transformers", action="store_true", help="also time Hugging Face's decoder, which must be installed")
    add("--prefill", action="store_true", help="time reading the context, not the token after it")
    add("--steps", type=int, default=20, help="timed tokens per kind (default 20)")
    add("--seed", type=int, default=0)
    add("--json", metavar="F", help="also write the result to this file")
    args = parser.parse_args()
    iv3.check_flags(args, {1: "layers steps batch"})
    need(not args.prefill or args.batch == 1 and not args.attention_only,
         "--prefill: reads one sequence with the whole decoder; leave --batch and --attention-only out")
    write_json(args.json, lambda: bench_decode(args))


if __name__ == "__main__":
    iv3.run_cli(main)
