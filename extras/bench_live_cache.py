"""The agent's live cache against a context rebuilt at each step (§3.4): seconds, megabytes, equal rows.

    python extras/bench_live_cache.py --first 1024 --new 256 --steps 16 --json F.json

A rollout's context only grows: C_{i+1} = C_i ⊕ (R_i, A_{i+1}, F_{i+1}) (Eq. 5). The paper keeps one KV cache
for the whole rollout (§3.4; it gives no figures), so a step prefills what is new. An agent around a chat
interface sends the whole conversation at each step and prefills all of it again. Both ways are run here, on
M²LA and on GQA, and the rows of the two caches are compared: keeping the cache changes the time alone.

Of n steps the live cache prefills n new parts, the rebuilt one about n²/2, whatever the attention; that
M²LA's cache is half of GQA's comes on top. Tokens are made up and weights random; only the decoder runs.
"""
import argparse
import functools
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bench_decode import decode_models, machine, timed, vision_of

import iv3
from eval import table, write_json

TRIES = 3                    # a time is the best of so many: other work on the machine can only slow one down


def prefilled(model, cache, start, stop):
    """Tokens start … stop of a made-up rollout through the decoder → logits (V,) of the next one."""
    cfg = model.cfg
    ids = torch.arange(start, stop)[None] * 7919 % (cfg.vocab - 2) + 2       # (1,T): some text, from id 2
    ids = torch.where(vision_of(start, stop), 1, ids).to(model.device)       # 1: a vision token
    positions = torch.arange(start, stop, device=model.device).expand(3, 1, -1)
    hidden = model(ids, positions, cache=cache)                              # (1,T,D)
    return model.logits(hidden[0, -1])


def best_seconds(model, cache, start, stop, device):
    """Prefill start … stop behind what the cache holds, several times. On a CPU a time is the process's own,
    which other work on the machine hardly changes."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    run = functools.partial(prefilled, model, cache, start, stop)
    times = []
    for _ in range(TRIES):
        cache.truncate(start)
        times.append(timed(run, device, clock) / 1e3)
    return min(times)


def largest_difference(cache, other):
    """Of two caches' rows, over all layers and segments."""
    most = 0.0
    for layer in range(len(cache.rows)):
        for rows, same in zip(cache.view(layer), other.view(layer)):
            most = max(most, float((rows - same).abs().max()))
    return most


def live_cache(model, end):
    """An empty cache for all `end` tokens of the rollout."""
    seen = int(vision_of(0, end).sum())
    text = end
    if model.cfg.attn == "m2la":
        text -= seen                                              # vision has a segment of its own
    return model.new_cache(1, text, seen)


def live_cache_rows(models, first, new, steps, device):
    """A row for each step of a rollout whose context starts with `first` tokens and grows by `new` a step.
    Summed over steps: seconds and MB written of the live cache, which prefills what is new, and of a context
    rebuilt at each step. `difference`: of the two caches' rows, at most."""
    live = {}
    for kind, model in models.items():
        live[kind] = live_cache(model, first + new * steps)
        prefilled(model, model.new_cache(1, 64), 0, 64)           # warms up
    rows = []
    sums = Counter()
    for step in range(steps + 1):
        stop = first + new * step
        start = stop - new
        if step == 0:
            start = 0                                             # the first look is new as a whole
        row = {"step": step, "context": stop}
        for kind, model in models.items():
            rebuilt = model.new_cache(1, stop)
            for way, cache, begin in (("live", live[kind], start), ("rebuilt", rebuilt, 0)):
                sums[f"{kind}_{way}_s"] += best_seconds(model, cache, begin, stop, device)
                written = cache.nbytes() / stop * (stop - begin)  # bytes; all tokens take as many
                sums[f"{kind}_{way}_written_mb"] += written / 1e6
            row[f"{kind}_mb"] = rebuilt.nbytes() / 1e6
            row[f"{kind}_difference"] = largest_difference(live[kind], rebuilt)
        rows.append(row | sums)
    return rows


@torch.no_grad()
def bench_live_cache(args):
    device, dtype = machine()
    torch.manual_seed(args.seed)
    cfg = iv3.Config.preset(args.preset)
    cfg = replace(cfg, layers=args.layers or cfg.layers, deepstack=())
    models = decode_models(cfg, False, device, dtype)
    del models["gqa_eager"]                                       # its cache is GQA's
    rows = live_cache_rows(models, args.first, args.new, args.steps, device)
    keys = ["step", "context"]
    for figure in ("live_s", "rebuilt_s", "mb", "live_written_mb", "rebuilt_written_mb"):
        keys += [f"{kind}_{figure}" for kind in models]
    print(table(keys, [[f"{row[key]:.4g}" for key in keys] for row in rows]))
    env = {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(),
           "seed": args.seed, "dtype": str(dtype), "preset": args.preset, "layers": cfg.layers,
           "first": args.first, "new": args.new,
           "measures": "prefill by the decoder, summed over steps; random weights"}
    return {"env": env, "rows": [{"name": f"step {row['step']}", **row} for row in rows]}


def main():
    parser = argparse.ArgumentParser(
        description="Time a rollout's live cache against rebuilding its context.")
    add = parser.add_argument
    add("--preset", choices=list(iv3.PRESETS), default="tiny", help="sizes (default tiny)")
    add("--first", type=int, default=1024, help="tokens of the first look (default 1024)")
    add("--new", type=int, default=256, help="tokens that a step adds (default 256)")
    add("--layers", type=int, help="layers of the decoder (default: the preset's)")
    add("--steps", type=int, default=20, help="steps of the rollout (default 20)")
    add("--seed", type=int, default=0)
    add("--json", metavar="F", help="also write the result to this file")
    args = parser.parse_args()
    iv3.check_flags(args, {1: "layers steps first new"})
    write_json(args.json, lambda: bench_live_cache(args))


if __name__ == "__main__":
    iv3.run_cli(main)
