"""What fits: parameters, cache bytes, the largest context of a model; with --train, a training step's memory.

    python extras/memory.py qwen3-vl-8b --memory 141
    python extras/memory.py qwen3-vl-2b --train --memory 80 --checkpointing

GB are 10⁹ bytes. Shape letters as in iv3.py.
"""
import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from iv3 import PRESETS, Config, InternVideo3, check_flags, find_model, need, run_cli
from train import takes_muon

# Longer sequences than this many tokens are not looked for.
LONGEST = 2 ** 24


# ------------------------------------------------------------------------------------------------- two tables
def estimate(name, memory, **training):
    """Yield the lines of a table: a preset or a model's directory, with GQA and with M²LA, on `memory` GB.

    To answer, in bf16: parameters, cache bytes of a token, and the tokens whose cache fits beside the
    weights. To train (`training`, for training_bytes): a step's memory, the longest sequence that fits."""
    need(name in PRESETS or Path(name).is_dir(),
         f"{name}: neither a preset ({', '.join(PRESETS)}) nor a directory")
    if name in PRESETS:
        cfg = Config.preset(name)
    else:
        cfg = Config.load(find_model(name) / "config.json")
    with torch.device("meta"):                                               # shapes without memory
        models = [InternVideo3(kind, (0, 1)).to(torch.bfloat16) for kind in both_kinds(cfg)]
    if training:
        yield from training_table(name, memory, models, training)
    else:
        yield from answering_table(name, memory, models)


def both_kinds(cfg):
    """The config with GQA and with M²LA: its own, or as published, with rows half as wide as GQA's."""
    gqa = replace(cfg, attn="gqa")
    if cfg.attn != "gqa":
        return gqa, cfg
    row = cfg.kv_heads * cfg.head_dim                    # half of k and v
    rope_width = min(cfg.head_dim, row // 2)
    rank = row - rope_width
    return gqa, replace(cfg, attn="m2la", rope_width=rope_width, ranks=((rank, rank),) * cfg.layers)


def answering_table(name, memory, models):
    yield f"{name} in bf16, {memory:g} GB for weights and the cache of one sequence; activations come on top"
    yield (f"{'attention':<10}{'parameters':>16}{'weights, GB':>14}"
           f"{'cache bytes a token':>21}{'largest context':>17}")
    for model in models:
        weights = sum(p.nbytes for p in model.parameters())
        parameters = weights // 2                        # bf16
        token = token_bytes(model)
        context = max(0, int((memory * 1e9 - weights) // token))
        yield f"{model.cfg.attn:<10}{parameters:>16,}{weights / 1e9:>14.2f}{token:>21,}{context:>17,}"


def token_bytes(model):
    """Cache bytes of a token in all layers; where text and vision have different ranks, of the wider."""
    cache = model.new_cache(1, 0)                        # each layer and segment holds its spare row alone
    segments = zip(*cache.rows)
    return max(sum(row.nbytes for row in segment) for segment in segments)


def training_table(name, memory, models, training):
    settings = ", ".join(f"{key} {value}" for key, value in training.items() if value)
    yield f"{name}, a training step in fp32 under bf16 autocast; GB, of {memory:g}; {settings}"
    columns = [*training_bytes(models[0], **training), "total", "longest seq"]
    yield f"{'attention':<10}" + "".join(f"{column:>13}" for column in columns)
    for model in models:
        sizes = list(training_bytes(model, **training).values())
        sizes.append(sum(sizes))
        gigabytes = "".join(f"{size / 1e9:>13.2f}" for size in sizes)
        longest = longest_sequence(model, memory * 1e9, training)
        yield f"{model.cfg.attn:<10}{gigabytes}{longest:>13,}"


def longest_sequence(model, limit, training):
    """The longest sequence with which a step takes at most `limit` bytes, by bisection; 0 if none does."""
    fits = 0
    too_long = LONGEST
    while too_long - fits > 1:
        seq = (fits + too_long) // 2
        parts = training_bytes(model, **{**training, "seq": seq})
        if sum(parts.values()) <= limit:
            fits = seq
        else:
            too_long = seq
    return fits


# -------------------------------------------------------------------------------------------- a training step
FROZEN = {"vision": r"visual\.(blocks|patch_embed|pos_embed)", "projector": r"visual\.(merger|deepstack)"}


def training_bytes(model, seq, packs=1, checkpointing=False, freeze=(), muon=False):
    """{part: bytes} of a step of train.py on one GPU, `packs` sequences of `seq` tokens in one forward."""
    every = 0                                            # parameters
    trained = 0
    by_muon = 0
    for name, p in model.named_parameters():
        every += p.numel()
        if any(re.match(FROZEN[part], name) for part in freeze):
            continue
        trained += p.numel()
        if muon and takes_muon(name, p):
            by_muon += p.numel()
    saved, working = activation_bytes(model.cfg, seq, packs, checkpointing=checkpointing, freeze=freeze)
    return {
        "weights": 4 * every,                            # fp32
        "bf16 copies": 2 * every,                        # autocast's, for as long as the step
        "gradients": 4 * trained,                        # fp32
        "optimizer": 8 * (trained - by_muon) + 4 * by_muon,       # AdamW has two moments, Muon one
        "activations": saved,
        "working": working,
    }


FP32 = 4             # bytes of a value


def activation_bytes(cfg, T, packs=1, keys=2.0, seen=0.53, answers=256, vision=1.0, checkpointing=False,
                     freeze=(), mixed=True):
    """Bytes that autograd keeps of a training forward, and the most that is computed beside them at once.

    `packs` sequences of T tokens, a share `vision` of them pixels, with `answers` answer tokens each. The
    blocks of the mask hold keys·T keys (2: the prompt's own and copies for its answers), a query meets seen·T
    of them. mixed: bf16 autocast. A test holds it against what autograd keeps of a tiny model: within 5 %."""
    operand = 2 if mixed else FP32                       # bytes of a value that goes into a product
    layer = decoder_layer_bytes(cfg, T, keys, seen, operand, mixed)
    block = vision_block_bytes(cfg, operand)
    kept_layer = layer
    kept_block = block
    if checkpointing:                                    # the input of each alone
        kept_layer = FP32 * cfg.hidden
        kept_block = FP32 * cfg.vision_hidden * cfg.merge ** 2

    pixels = 0                                           # of a vision token; nothing of what is frozen
    if "vision" not in freeze:
        patches = 3 * 2 * (cfg.patch * cfg.merge) ** 2   # values of its merge² patches
        pixels += cfg.vision_layers * kept_block + operand * patches
    if not {"vision", "projector"} <= set(freeze):
        pixels += (1 + len(cfg.deepstack)) * merger_bytes(cfg, operand)

    token = cfg.layers * kept_layer + vision * pixels
    # Log-probabilities, the input of the head, and of the last norm its input and its normal form.
    answer = FP32 * cfg.vocab + (operand + 2 * FP32) * cfg.hidden
    saved = packs * (T * token + answers * answer)
    if not checkpointing:                                # the last MLP sees answers alone
        saved -= packs * (T - answers) * mlp_bytes(cfg, operand, mixed)

    # At once: the logits, their gradient and what the head gave, or one layer computed anew; and the mask of
    # bools, T·T.
    working = answers * cfg.vocab * (2 * FP32 + operand)
    if checkpointing:
        working = max(T * max(layer, block), working)
    return round(saved), round(packs * (working + T * T))


def decoder_layer_bytes(cfg, T, keys, seen, operand, mixed):
    """What a decoder layer keeps of one token; see `activation_bytes`."""
    D = cfg.hidden
    q = cfg.heads * cfg.head_dim                         # values of all query heads
    kv = cfg.kv_heads * cfg.head_dim                     # of all keys, and of all values
    share = cfg.heads // cfg.kv_heads                    # query heads of a KV head

    # Norms keep their input and its normal form, in fp32: one before attention, q_norm and k_norm.
    norms = FP32 * 2 * (D + q + kv)
    # The first's output goes into three linear layers. Autocast makes a copy for each of them; in fp32 they
    # share it.
    copies = 3 if mixed else 1
    inputs = copies * D
    # M²LA: the inputs of query map, encoder and decoders.
    width = q
    if cfg.attn != "gqa":
        width += cfg.heads * cfg.rope_width
        ranks = sum(map(sum, cfg.ranks)) // cfg.layers   # of text and vision together, mean of the layers
        inputs += q + 2 * kv + cfg.rope_width + ranks    # and the shared RoPE key
    # Attention keeps q and its output, and the keys and values that the mask's blocks hold; o_proj its input.
    attention = 2 * width * (1 + keys / share) + q
    # The mask, as the kernel adds it to the scores: for each query head of a KV head, over the keys it meets.
    mask = operand * share * seen * T
    return norms + operand * (inputs + attention) + mask + mlp_bytes(cfg, operand, mixed)


def mlp_bytes(cfg, operand, mixed):
    """What an MLP and the norm before it keep of one token."""
    copies = 2 if mixed else 1                           # of the norm's output: for gate and up
    # Gate, silu(gate), up, and their product.
    return FP32 * 2 * cfg.hidden + operand * (copies * cfg.hidden + 4 * cfg.mlp)


def vision_block_bytes(cfg, operand):
    """What a block of the tower keeps of one vision token, which is merge² patches."""
    C = cfg.vision_hidden * cfg.merge ** 2
    norms = FP32 * 2 * C                                 # the inputs of two norms
    # norm1's output (1); q, k, v (3); q and k rotated (2); the output, as it is and heads side by side (2)
    attention = 8 * C
    # norm2's output; before and after GELU
    mlp = C + 2 * cfg.vision_mlp * cfg.merge ** 2
    return norms + operand * (attention + mlp)


def merger_bytes(cfg, operand):
    """What a merger keeps of one vision token."""
    C = cfg.vision_hidden * cfg.merge ** 2
    return C * (FP32 + operand * 3)                      # the norm's input; its output, before and after GELU


# ---------------------------------------------------------------------------------------------------- command
def main():
    parser = argparse.ArgumentParser(
        description="Parameters, cache and largest context; memory of a training step.")
    add = parser.add_argument
    add("model", metavar="PRESET|DIR", help="a preset or a model's directory")
    add("--memory", type=float, default=80, help="GB of memory (default 80)")
    add = parser.add_argument_group("a training step (train.py, one GPU)").add_argument
    add("--train", action="store_true",
        help="weights, gradients, optimizer, activations, and the longest sequence")
    add("--seq", type=int, default=8192, help="tokens of a pack, nearly all of them pixels (default 8192)")
    add("--packs", type=int, default=1, help="packs in one forward (default 1)")
    add("--checkpointing", action="store_true", help="keep each layer's input alone, compute the rest again")
    add("--freeze", default="", help="parts that are not trained: vision,projector")
    add("--muon", action="store_true", help="Muon for weight matrices: one moment, not AdamW's two")
    args = parser.parse_args()
    need(args.memory > 0, f"--memory {args.memory:g}: must be positive")
    check_flags(args, {1: "seq packs"})
    freeze = tuple(part for part in args.freeze.split(",") if part)
    need(set(freeze) <= FROZEN.keys(), f"--freeze {args.freeze}: parts are vision, projector")

    training = {}
    if args.train:
        training = {"seq": args.seq, "packs": args.packs, "checkpointing": args.checkpointing,
                    "muon": args.muon, "freeze": freeze}
    for line in estimate(args.model, args.memory, **training):
        print(line)


if __name__ == "__main__":
    run_cli(main)
