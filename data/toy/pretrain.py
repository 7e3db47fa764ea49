"""Pretrains the tiny base, our stand-in for Qwen3-VL-8B, and the teacher of on-policy distillation.

    python data/toy/pretrain.py --out runs/pre            # about an hour on 2 cores → base/ and teacher/
    python train.py --base scratch                        # the same into its own --out, then the whole recipe
    python data/toy/pretrain.py --out DIR --preset small  # 224-pixel frames, 65 M parameters, for a GPU

Nothing here is in the paper, which starts from a released model; the architecture and the training loop are
those of iv3.py and train.py. Four stages, because 2 M parameters find no look-up by themselves when
everything is new at once:
 1. vision: every vision token learns the words of its second (what SigLIP pretraining is to Qwen3-VL);
 2. near: captions and look-ups, from windows of 3-8 s to 12-24 s, after `start_lookups` has laid the circuit
 (tiny);
 3. base: the same with times up to two minutes;
 4. teacher: the base, trained on both SFT mixes for longer than the student will be, and still with GQA
 attention.
"""
import argparse
import json
import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

from eval import command, gather, join_processes
from iv3 import PRESETS, Config, Processor, Tokenizer, build_model, load_model, run_cli
from train import SMALL, Data, Job, Recipe, Trainer, frame_side, train_supervised

FROZEN = dict(muon=0.02, branches=16, freeze=("vision",))        # what `vision` has learned stays
RECIPES = {
    "vision": Recipe({"glimpses.jsonl": 1.0}, steps=5000, lr=2e-3, muon=0.02, packs=8, branches=1),
    "near": Recipe({"near.jsonl": (1.0, 0.0), "pretrain.jsonl": (0.0, 1.0), "cpt_text.jsonl": 0.05},
                   steps=1200, lr=1e-3, lr_min=5e-5, **FROZEN),
    "base": Recipe({"wide.jsonl": 0.75, "pretrain.jsonl": 0.2, "cpt_text.jsonl": 0.05},
                   steps=400, lr=1e-3, lr_min=1e-4, **FROZEN),
    "teacher": Recipe({"cpt_text.jsonl": 0.05, "sft_short.jsonl": 0.35, "sft_long.jsonl": 0.6},
                      steps=1500, lr=1e-3, lr_min=5e-5, reduction="square", **{**FROZEN, "muon": 0.01}),
}


# ---------------------------------------------------------------------------------------------- fresh weights

def initial_weights(args, data_dir):
    """A fresh GQA model for `vision`, and its processor."""
    tokenizer = Tokenizer(json.loads((data_dir / "vocab.json").read_text()))
    cfg = Config.preset(args.preset, vocab=len(tokenizer), wording="toy")
    model = build_model(cfg, tokenizer)
    generator = torch.Generator().manual_seed(args.seed)
    model.init_weights(generator)

    # "<12" of a timestamp starts close to "12" of a question: .9² + .44² = 1 keeps the size.
    table = model.language_model.embed_tokens.weight.data                    # (V,D)
    core = {}
    for i, token in enumerate(tokenizer.tokens):
        word = token.decode(errors="replace").strip(" <>().,:\n\"")
        if word and word in core:
            table[i] = 0.9 * table[core[word]] + 0.44 * table[i]
        core.setdefault(word, i)

    # One direction that all embeddings share, see start_lookups. DeepStack adds nothing at first.
    table += 0.2 * torch.randn(cfg.hidden, generator=generator).sign() - table.mean(0)
    for merger in model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.data.zero_()
    return model.to(args.device), Processor(tokenizer, cfg)


# --------------------------------------------------------------------------------------- 1. vision: alignment

def vision_step(trainer, data, step):
    """Every vision token x learns to name the words w of its second, under the decoder's own (fixed)
    embeddings E:
        L = − mean_w log softmax(30 · E x)_w"""
    model = trainer.model
    merge = model.cfg.merge ** 2                           # patches of a vision token
    patches, grids, words = [], [], []
    for rows, root in data.step(step, trainer.recipe.packs, 1):
        samples = data.encode(rows, root)
        if not samples:
            continue
        lines = rows[0]["messages"][-1]["content"].split("\n")               # of a second of video each
        for line, (h, w) in zip(lines, samples[0].grids.tolist()):
            named = sorted(set(trainer.tokenizer.encode(line))) if line != "-" else []
            words += [named] * (h * w // merge)
        patches.append(samples[0].patches)
        grids.append(samples[0].grids)
    rows = [torch.tensor(named, dtype=torch.long) for named in words]
    target = torch.nn.utils.rnn.pad_sequence(rows, True, -1)                 # (n, most words), −1: none

    def loss_of(batch):
        x = model.visual(batch["patches"], batch["grids"])[0]                # (n,D)
        table = model.language_model.embed_tokens.weight.detach()            # E (V,D)
        logp = F.log_softmax(30 * (x @ table.T).float(), -1)                 # (n,V)
        named = batch["target"] >= 0
        return -(logp.gather(1, batch["target"].clamp_min(0)) * named).sum()
    batch = {"patches": torch.cat(patches), "grids": torch.cat(grids), "target": target}
    named = sum(gather(int((target >= 0).sum())))
    return {"loss": trainer.update([Job(batch, loss_of, 1 / named)]), "tokens": len(words)}


def train_vision(trainer, data):
    """The stage `vision`; at its end the tiny model gets the circuit for look-ups."""
    trainer.peak = 0                                       # no MFU: that of a packed batch cannot be counted here

    def finish():
        if trainer.args.preset == "tiny":
            start_lookups(trainer.model.cpu(), trainer.args.seed)
    trainer.fit(partial(vision_step, trainer, data), finish)


# ------------------------------------------------------------------------- between 1 and 2: a look-up circuit

@torch.no_grad()
def start_lookups(model, seed):
    """After alignment, initialise the first two layers so that look-ups ("what is at 12 seconds?", "when is
    the red circle?") are learned in minutes on a CPU; all else stays random. With W = [own; before; asked]
    orthonormal: - all embeddings share one direction, by which a head can attend to position alone. Vision
    tokens get it here:
      alignment cannot teach it, since it adds the same to the logits of all words;
    - layer 0, head 0 looks 3 tokens back, from a vision token to its timestamp, and notes it in the subspace
    `before`;
      heads 1 and 2 look 6 and 5 back, from "assistant" to what was asked ("red", " circle"), and note it in
      `asked`;
    - layer 1 looks at vision tokens only: head 0 matches what was asked with their timestamps and copies
    their words,
      head 2 matches it with their words and copies their timestamps."""
    lm = model.language_model
    last = model.visual.merger.linear_fc2
    Dh = model.cfg.head_dim
    generator = torch.Generator().manual_seed(seed)

    # The direction that all embeddings share, in vision tokens as well.
    shared = lm.embed_tokens.weight.mean(0)                                  # (D,)
    unit = shared / shared.norm()
    last.weight -= torch.outer(unit, unit @ last.weight)
    last.bias += shared - unit * (unit @ last.bias)

    # Three subspaces and one more direction, orthogonal to it: (Dh,D), sight (1,D).
    random = torch.cat([unit[:, None], torch.randn(len(unit), 3 * Dh + 1, generator=generator)], 1)
    own, before, asked, sight = torch.linalg.qr(random)[0][:, 1:].T.split([Dh, Dh, Dh, 1])
    last.bias += 2 * sight[0]                              # vision tokens can be told from words
    for layer in lm.layers:
        layer.self_attn.q_norm.weight.fill_(1.6)           # sharper attention
        layer.self_attn.k_norm.weight.fill_(1.6)

    def part(layer, name, head):
        """Rows of one head in q, k or v; columns in o."""
        weight = getattr(lm.layers[layer].self_attn, name + "_proj").weight
        of_head = slice(head * Dh, (head + 1) * Dh)
        return weight[:, of_head] if name == "o" else weight[of_head]

    def turned(steps):
        """A constant vector in the fastest frequencies, `steps` ahead."""
        out = torch.zeros(Dh, len(unit))
        for l, strength in enumerate((10, 7.5, 5, 5, 5, 5)):
            angle = steps * model.cfg.theta ** (-2 * l / Dh)
            out[l] = strength * math.cos(angle) * unit / len(unit) ** 0.5
            out[Dh // 2 + l] = strength * math.sin(angle) * unit / len(unit) ** 0.5
        return out

    # Layer 0: each head looks some steps back and notes what is there.
    for head, kv, steps, note in ((0, 0, 3, before), (1, 0, 6, asked), (2, 1, 5, asked)):
        ahead = (3, 5)[kv]                                 # a key turned ahead meets the query of so many steps later
        part(0, "q", head).copy_(turned(ahead - steps))
        part(0, "k", kv).copy_(turned(ahead) + 0.05 * torch.randn(Dh, len(unit), generator=generator))
        part(0, "v", kv).copy_(own)
        part(0, "o", head).copy_(1.5 * note.T)

    # Layer 1: two heads match by content and copy what stands beside it.
    slow = (torch.arange(Dh) % (Dh // 2) >= 6)[:, None]    # frequencies that hardly turn over a clip
    for head, kv, query, key, value in ((0, 0, own + asked, before, own), (2, 1, asked, own, before)):
        part(1, "q", head).copy_(query * slow)
        part(1, "k", kv).copy_(key * slow)
        part(1, "q", head)[12:16] = 0.8 * unit             # always matches the keys of vision tokens
        part(1, "k", kv)[12:16] = 0.5 * sight
        part(1, "v", kv).copy_(value)
        part(1, "o", head).copy_(own.T)


# ---------------------------------------------------------------------------------------------------- command

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="run directory; its data goes to OUT/pretraining")
    add("--seed", type=int, default=0)
    add("--preset", choices=list(PRESETS), default="tiny", help="size of the model and of the frames")
    add("--scale", type=float, default=3.0, help="multiplies the number of the teacher's videos")
    add("--clips", type=int, default=2000, help="videos to pretrain on")
    add("--steps", type=int, help="steps of every stage (default: the recipes')")
    add("--jobs", type=int, help="processes that share each step (default: the cores, at most 4)")
    args = parser.parse_args()
    data_dir = args.out / "pretraining"
    command("data/toy/prepare.py", "--out", data_dir, "--seed", args.seed, "--scale", args.scale,
            "--pretrain", args.clips, "--side", frame_side(args.preset))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = device
    args.checkpointing = args.preset != "tiny"             # of train.py's flags, what Trainer asks for
    vars(args).update(freeze=[], workers=0, save_every=20, eval_every=0, fsdp=False)
    join_processes(args.jobs or (min(4, os.cpu_count()) if device == "cpu" else 1), device)

    previous = None
    for stage, recipe in RECIPES.items():
        if args.preset != "tiny":
            recipe = replace(recipe, **SMALL)
        recipe = replace(recipe, steps=args.steps or recipe.steps)
        if not (args.out / stage / "config.json").is_file():
            if previous is None:
                model, processor = initial_weights(args, data_dir)
            else:
                model, processor = load_model(previous, device)
            data = Data(data_dir, recipe.mix, processor, args.seed, stage, recipe.steps)
            trainer = Trainer(model, processor, recipe, stage, args, previous)
            train_stage = train_supervised if previous else train_vision
            train_stage(trainer, data)
        previous = args.out / stage


if __name__ == "__main__":
    run_cli(main)
