"""The training recipe of InternVideo3 (§3.3, §4): four stages in one script.

    python train.py                                   # the whole recipe on the toy world, tiny, a laptop CPU is enough
    python train.py --stage sft --phase long          # one stage; it starts from the stage before it in --out
    python train.py --stage rl --init DIR --data F.jsonl --out runs/mine
    python train.py --stage cpt --init Qwen3-VL-2B-Instruct --data F.jsonl --out runs/mine     # Hugging Face's

Reading order: recipe → data (rows → packs → batches) → losses → the loop and its checkpoints → the stages
(supervised, conversion, GSPO, on-policy distillation) → the chain of stages.

Where this differs from the paper, and why:
 1. Sizes. The paper trains 8 B parameters on 16 M + 7 M samples; the default here is 2 M parameters on a toy world.
 2. Several questions about one video share its tokens (a tree-shaped attention mask). The loss is the same as of
    separate samples; the video is encoded once. In RL the sampled answers to a question share its tokens too.
 3. GSPO: old log-probabilities are recomputed in fp32 by the trainer (GSPO's clip range 3e-4 is far below bf16 noise;
    the tiny recipe's is ten times as wide, its answers have three to eight tokens); advantages are divided by
    (std + 1e-4) as in TRL; zero-spread groups carry no gradient and are counted. Beside IoU or correctness a tenth of
    a point is for an answer that a rule can read. The KL too is of the groups with a spread alone.
 4. OPD uses the reverse KL over the full vocabulary at each position of the student's own sample, which is the exact
    expectation of the paper's one-sample form (`--kl sampled`); the teacher is a longer-trained GQA model of the same
    vocabulary. Its prompts are those whose answers a rule can judge (multiple choice, grounding), not captions.
 5. Replay: SFT keeps a share of the earlier stages' data, OPD trains on SFT data beside its own samples. A tiny model
    forgets a format within two minutes.
 6. SFT long has longer videos and packs than SFT short, but 2 frames a second in both (the paper: 4 in the long phase):
    a second is the toy world's shortest event. `fps` in a row of your own data says otherwise; LARGE has the paper's.
 7. With several processes each step is shared by hand: gradients are summed after the backward pass. `--fsdp` shards.
"""
import argparse
import hashlib
import itertools
import json
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")            # before torch: threads that spin starve other processes

import shutil
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
from eval import command, gather, once, rank, world
from iv3 import (Config, Encoded, MediaError, Processor, Tokenizer, UserError, build_model, collate, find_model,
                 generate, load_model, load_rows, need, read_json, run_cli, save_model, takes_muon, write_atomic)
from m2la import Blocks, Calibration, convert_layers

CURATED = "curated/curated.jsonl"            # questions that the model itself makes, see `curate`


# ----------------------------------------------------------------------------------------------------------- recipe

@dataclass
class Recipe:
    """One stage. `mix`: file of the data directory → share of packs, or (share at the first step, at the last one). A
    pack is one video with up to `branches` conversations about it. The learning rate warms up over `warmup` of the
    steps, then follows a cosine to lr_min."""
    mix: dict
    steps: int
    lr: float
    lr_min: float = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.05
    packs: int = 8                           # packs (videos) per step
    branches: int = 8                        # conversations per pack
    tokens: int = 1536                       # padded tokens of one forward; larger steps are accumulated
    reduction: str = "mean"                  # "mean" over tokens | "square": a sample with m tokens weighs √m, not m
    group: int = 8                           # RL: samples per prompt
    temperature: float = 1.0                 # RL, OPD: of the student's samples
    updates: int = 2                         # RL: optimizer steps per rollout
    format: float = 0.1                      # RL: reward of an answer that a rule can read, beside IoU or correctness
    clip: tuple = (3e-4, 4e-4)               # RL: GSPO's clip range of the sequence ratio, below and above 1
    kl: float = 0.03                         # RL: weight of the KL to the SFT model
    kl_form: str = "full"                    # OPD: "full" vocabulary | "sampled" tokens alone
    muon: float = 0.0                        # learning rate of Muon for weight matrices; 0: AdamW for everything
    freeze: tuple = ()                       # "vision", "projector": parts that are not trained
    fps: float = None                        # frames a second of a video whose row names none; None: 2
    max_frames: int = None                   # at most so many frames of a video; None: what the rows say
    max_new: int = 24                        # RL, OPD: at most so many tokens of a sampled answer
    pool: int = 2400                         # RL, OPD: prompts that the filter looks at
    replay: dict = field(default_factory=dict)    # OPD: file → packs a step of SFT data, trained beside: keeps the rest


# Shares of packs: of tokens these are text 29 %, image-text 19 %, video-caption 52 %, of samples 32, 10 and 58 % (the
# paper: 27, 30, 43 % and 30, 55, 15 %; a toy picture has one row, a text or a video eight).
CPT_MIX = {"cpt_text.jsonl": 0.07, "cpt_image.jsonl": 0.80, "cpt_video.jsonl": 0.13}
CALIBRATION_MIX = {"cpt_text.jsonl": 0.1, "cpt_image.jsonl": 0.1, "cpt_video.jsonl": 0.8}     # distances matter
TINY = {
    "cpt": Recipe(CPT_MIX, steps=90, lr=3e-4, lr_min=1e-5, packs=48),
    "sft_short": Recipe({"sft_short.jsonl": 0.7, "sft_agent.jsonl": 0.15, "sft_plan.jsonl": 0.05,
                         "cpt_text.jsonl": 0.05, "cpt_image.jsonl": 0.05}, steps=260, lr=1e-3, lr_min=1e-4, muon=0.01,
                        warmup=0.1, branches=12, reduction="square"),
    "sft_long": Recipe({"sft_long.jsonl": 0.25, CURATED: 0.04, "sft_agent.jsonl": 0.42, "sft_plan.jsonl": 0.05,
                        "sft_short.jsonl": 0.2, "cpt_text.jsonl": 0.04}, steps=180, lr=1e-3, lr_min=5e-5, muon=0.01,
                       warmup=0.05, branches=20, reduction="square"),
    "rl": Recipe({"rl.jsonl": 1.0}, steps=64, lr=1e-4, lr_min=2e-5, clip=(3e-3, 4e-3), kl=0.08, weight_decay=0.0,
                 pool=4200),
    "opd": Recipe({"opd.jsonl": 1.0}, steps=150, lr=5e-4, lr_min=2e-5, weight_decay=0.0, branches=16, pool=9700,
                  replay={"sft_agent.jsonl": 1, "sft_short.jsonl": 1}),
}
SIDES = {"tiny": 32, "small": 224}           # presets of the whole recipe: sides of their frames, pixels
SMALL = dict(tokens=16_384)                  # changes for 10 to 100 M parameters: small has 54 tokens a second
# The paper's rates and frames (§4; it names none for RL and OPD), for a model of more than 100 M parameters.
LARGE = {"cpt": dict(lr=2e-5, lr_min=1e-6, max_frames=768),
         "sft_short": dict(lr=3e-5, lr_min=0.0, muon=0.0, max_frames=512),
         "sft_long": dict(lr=1e-5, lr_min=0.0, muon=0.0, max_frames=2048, fps=4.0),
         "rl": dict(lr=1e-6, lr_min=0.0, clip=(3e-4, 4e-4), max_new=256), "opd": dict(lr=1e-6, lr_min=0.0, max_new=256)}
PREVIOUS = {"cpt": "base", "sft_short": "cpt", "sft_long": "sft_short", "rl": "sft_long", "opd": "rl"}
# --attn released: choices of §3.2 that `M2LA.fold` multiplies out to the authors' layer, with one rank for all.
FOLDABLE = dict(qk_norm="affine", slots="uniform", modality="shared", budget="uniform", heal=0)


# ------------------------------------------------------------------------------------- data: rows → packs → batches

@dataclass
class Pack:
    """Several conversations that begin with the same tokens (one video): the shared prefix once, then the branches; in
    RL, the answers to one question share its tokens too. A branch continues the positions of its parent and attends to
    the prefix, its parent and itself: a tree in one sequence."""
    ids: torch.Tensor                        # (T,)
    positions: torch.Tensor                  # (3,T)
    branch: torch.Tensor                     # (T,) 0 = prefix, 1, 2, … = branches
    parent: torch.Tensor                     # (T,) branch of the question that the token's branch answers; or 0
    sample: torch.Tensor                     # (T,) number of the conversation; −1: tokens that several share
    answer: torch.Tensor                     # (T,) bool
    patches: torch.Tensor
    grids: torch.Tensor
    advantage: torch.Tensor = None           # RL: (conversations,)

    @property
    def count(self):
        return int(self.sample.max()) + 1


def make_pack(samples, shared_grids, vision_ids, group=1):
    """samples: Encoded that begin with the same `shared_grids` temporal patches (0 without media), each `group` of them
    answers to one question → Pack."""
    first, ends = samples[0].ids, [int(s.answer.nonzero()[0]) - 1 for s in samples]
    # The longest common prefix; the token before an answer stays in its branch, which has to predict from it.
    same = torch.stack([s.ids[:min(ends)] == first[:min(ends)] for s in samples]).all(0)
    prefix = int(same.long().cumprod(0).sum())
    shared = int(samples[0].grids[:shared_grids].prod(1).sum())                           # patches
    if len(samples) > 1:                                   # equal tokens beyond the shared video can hide other pixels
        tokens = torch.isin(first, torch.tensor(vision_ids)).nonzero()[:, 0]
        per_patch = len(tokens) / max(1, len(samples[0].patches))
        count = round(shared * per_patch)                  # vision tokens of the shared video
        if count and prefix <= tokens[count - 1]:          # the conversations differ before its end: share none of it
            shared = shared_grids = count = 0
        prefix = min([prefix, *tokens[count:count + 1].tolist()])
    parts = [(samples[0], slice(0, prefix), 0, -1)]                         # sample, tokens, parent, conversation
    for i, (s, end) in enumerate(zip(samples, ends)):
        if group > 1 and i % group == 0:
            parts.append((s, slice(prefix, end), 0, -1))
            question = len(parts) - 1
        parts.append((s, slice(end if group > 1 else prefix, None), question if group > 1 else 0, i))
    sizes = torch.tensor([len(s.ids[part]) for s, part, *_ in parts])
    parent, sample = (torch.tensor(x).repeat_interleave(sizes) for x in list(zip(*parts))[2:])
    return Pack(ids=torch.cat([s.ids[part] for s, part, *_ in parts]),
                positions=torch.cat([s.positions[:, part] for s, part, *_ in parts], 1),
                branch=torch.arange(len(parts)).repeat_interleave(sizes), parent=parent, sample=sample,
                answer=torch.cat([s.answer[part] for s, part, *_ in parts]),
                patches=torch.cat([samples[0].patches[:shared]] + [s.patches[shared:] for s in samples[::group]]),
                grids=torch.cat([samples[0].grids[:shared_grids]] + [s.grids[shared_grids:] for s in samples[::group]]))


BLOCK = 64                                   # queries that attend together, at least; see m2la.Blocks


def collate_packs(packs):
    """Packs → one right-padded batch. `sample` (B,T): number of the conversation in the whole batch, −1 elsewhere.
    `mask` (B,1,T,T): token i sees j ≤ i of its prefix, its question and its own branch."""
    def padded(rows, value):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    firsts = itertools.accumulate((p.count for p in packs), initial=0)             # a pack's first conversation
    sample = padded([torch.where(p.sample >= 0, p.sample + first, -1) for p, first in zip(packs, firsts)], -1)
    branch, parent = padded([p.branch for p in packs], -1), padded([p.parent for p in packs], 0)
    T, key = branch.shape[1], branch[:, None, :]
    same = (key == 0) | (key == branch[:, :, None]) | (key == parent[:, :, None])
    mask = (same & torch.ones(T, T, dtype=torch.bool).tril())[:, None]
    head = int((branch == 0).sum(1).max())
    root, size = torch.where(parent > 0, parent, branch), max(BLOCK, T // 16)
    blocks = [(start, min(start + size, head), 0, 0) for start in range(0, head, size)]     # see nothing behind them
    for start in range(head, T, size):                     # the branches at its start begin at `low` or later
        low = int((root == root[:, start:start + 1]).int().argmax(1).min())
        blocks.append((start, min(start + size, T), head, max(low, head)))
    batch = {**collate(packs, 0), "answer": padded([p.answer for p in packs], False), "sample": sample,
             "mask": Blocks(mask, blocks)}
    if packs[0].advantage is not None:
        batch["advantage"] = torch.cat([p.advantage for p in packs])
    return batch


def micro_batches(packs, tokens):
    """Split a step's packs, sorted by length, into batches of at most `tokens` padded tokens."""
    batches = []
    for p in sorted(packs, key=lambda p: len(p.ids)):
        if batches and len(p.ids) * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(p)
        else:
            batches.append([p])
    return [collate_packs(batch) for batch in batches]


class Data:
    """Draws packs from the JSONL files of a mix. What step n gets depends only on (seed, stage, n): a resumed run
    continues exactly, and steps can be prepared by several processes. Unreadable videos are skipped and counted."""

    def __init__(self, directory, mix, processor, seed, stage, steps=1, fps=None, max_frames=None):
        self.processor, self.seed, self.steps, self.skipped = processor, [seed, *stage.encode()], steps, Counter()
        self.vision_ids = [processor.tokenizer.token_id(f"<|{kind}_pad|>") for kind in ("image", "video")]
        self.groups, self.shares = [], []
        for name, share in mix.items():
            path = Path(directory) / name                                     # --data F.jsonl is an absolute path here
            groups, texts = defaultdict(list), 0
            for row in framed(load_rows(path), fps, max_frames):
                media = first_media(row)
                groups[json.dumps(media) if media else texts // 8].append(row)           # text alone counts by eights
                texts += not media
            self.groups.append((path.parent, list(groups.values())))
            self.shares.append(share if isinstance(share, tuple) else (share, share))

    def keep(self, wanted):
        """Leave out the rows that are not wanted(row), and files without others."""
        files, self.groups, self.shares = list(zip(self.groups, self.shares)), [], []
        for (root, groups), share in files:
            groups = [[row for row in rows if wanted(row)] for rows in groups]
            if groups := [rows for rows in groups if rows]:
                self.groups.append((root, groups))
                self.shares.append(share)

    def hold_out(self, share=0.05):
        """Take a share of the videos of each file out → [(rows, root)]: none where a file has one video only."""
        out = []
        for i, (root, groups) in enumerate(self.groups):
            videos = defaultdict(list)                       # a video, with all that is asked of its parts; eight texts
            for k, rows in enumerate(groups):
                media = first_media(rows[0])
                videos[media[media["type"]] if media else k].append(rows)
            videos = list(videos.values())
            order = np.random.default_rng(self.seed[0]).permutation(len(videos))
            count = min(math.ceil(share * len(videos)), len(videos) - 1)
            out.append(([row for k in order[:count] for rows in videos[k] for row in rows], root))
            self.groups[i] = root, [rows for k in sorted(order[count:]) for rows in videos[k]]
        return [(rows, root) for rows, root in out if rows]

    def step(self, step, packs, branches):
        """→ list of (rows, root): `packs` groups of up to `branches` rows about one video, this process's share."""
        rng, out = np.random.default_rng([*self.seed, step]), []
        shares = np.array([a + (b - a) * step / self.steps for a, b in self.shares])
        for f in rng.choice(len(self.groups), packs, p=shares / shares.sum()):
            root, groups = self.groups[f]
            weight = np.sqrt([len(rows) for rows in groups])                  # a lone row is not worth a whole pack
            rows = groups[rng.choice(len(groups), p=weight / weight.sum())]
            if not first_media(rows[0]):                                      # any texts can share a pack
                rows = [row for rows in groups if not first_media(rows[0]) for row in rows]
            out.append(([rows[i] for i in rng.permutation(len(rows))[:branches]], root))
        return self.share(out)

    @staticmethod
    def share(drawn):
        """This process's part of a step: of several, the longest pack first, each to who has least to do so far."""
        if world() == 1:
            return drawn
        costs = [sum(len(str(row["messages"])) for row in rows) + 4 * rows[0].get("duration", 0) for rows, _ in drawn]
        loads, parts = [0] * world(), [[] for _ in range(world())]
        for cost, pack in sorted(zip(costs, drawn), key=lambda pair: -pair[0]):
            least = loads.index(min(loads))
            loads[least] += cost
            parts[least].append(pack)
        return parts[rank()]

    def encode(self, rows, root, **options):
        """Rows → list of Encoded, or None when their video cannot be read (counted in `skipped`)."""
        try:
            return [self.processor.encode(row["messages"], root, **options) for row in rows]
        except MediaError as e:
            self.skipped[str(e)] += 1
            return None

    def pack(self, rows, samples, root, group=1):
        shared = 0
        if media := first_media(rows[0]):
            patches, grid, *_ = self.processor.load(media, root)
            shared = len(patches) // (grid[0] * grid[1])
        return make_pack(samples, shared, self.vision_ids, group)

    def packs(self, step, recipe):
        """The supervised packs of one step."""
        drawn = [(rows, self.encode(rows, root), root) for rows, root in self.step(step, recipe.packs, recipe.branches)]
        return [self.pack(rows, samples, root) for rows, samples, root in drawn if samples]

    def batches(self, step, recipe):
        packs = self.packs(step, recipe)
        need(packs or world() > 1,                                    # of several processes, one may have bad luck
             f"no readable video in step {step}: {next(iter(self.skipped), '')}")
        return micro_batches(packs, recipe.tokens)

    def prepared(self, step, recipe):
        """In a worker process: the batches of a step, or what is wrong with it, and what it skipped."""
        self.skipped = Counter()
        try:
            return self.batches(step, recipe), self.skipped
        except UserError as e:
            return e, self.skipped


def framed(rows, fps=None, max_frames=None):
    """The rows, their videos with `fps` where they name none and at most `max_frames` frames, in pairs 1/fps apart."""
    def change(item):
        item = {"fps": fps, **item} if fps else item
        few = not max_frames or item.get("max_frames", math.inf) <= max_frames
        return item if few else {**item, "max_frames": max_frames, "pairs": True}
    return [evaluation.edit_videos(row, change) for row in rows] if fps or max_frames else rows


def first_media(row):
    """The first image or video item of a row, or None."""
    return next(iter(evaluation.media_items(row)), None)


# ----------------------------------------------------------------------------------------------------------- losses

def answer_logits(model, batch):
    """One packed forward → logits (n,V) that predict the n answer tokens, these tokens (n,), their conversation (n,)"""
    hidden = model(batch["ids"], batch["positions"], batch["patches"], batch["grids"], mask=batch["mask"])     # (B,T,D)
    target = batch["answer"][:, 1:]
    with torch.autocast(hidden.device.type, enabled=False):      # a bf16 logit of 16 is off by up to 0.06; ratios in
        logits = model.logits(hidden[:, :-1][target].float())    # GSPO differ by 1e-3
    return logits, batch["ids"][:, 1:][target], batch["sample"][:, 1:][target]


def sft_weights(sample, reduction):
    """Weight of each answer token, (n,): "square" gives a sample with m answer tokens the weight 1/√m each (§4)."""
    length = torch.bincount(sample)[sample]
    return torch.ones_like(length, dtype=torch.float) if reduction == "mean" else length.float().rsqrt()


def count_of(batch):
    """Conversations in a batch."""
    return int(batch["sample"].max()) + 1


def sequence_mean(values, sample, count):
    """(n,) per token → (count,) mean over each conversation's tokens."""
    total = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, sample, values)
    return total / torch.bincount(sample, minlength=count).clamp_min(1)


def advantages(rewards, group):
    """rewards (n·group,) → A_i = (r_i − mean) / (std + 1e-4) inside each group of answers to one prompt."""
    r = rewards.view(-1, group)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, correction=0, keepdim=True) + 1e-4)).view(-1)


def gspo_loss(logp, old, ref, sample, advantage, clip, kl):
    """Group Sequence Policy Optimization with a KL penalty, per token log-probabilities (n,), advantage (count,).

        s_i = exp( 1/|y_i| Σ_t (log π − log π_old) )                    sequence ratio
        L   = − mean_i min( s_i A_i, clip(s_i, 1 − ε_low, 1 + ε_high) A_i ) + β mean_i mean_t k3
        k3  = e^d − d − 1,  d = log π_ref − log π                       KL estimator, never negative
    """
    count = len(advantage)
    ratio = sequence_mean(logp - old, sample, count).exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    d = ref - logp
    k3 = sequence_mean(d.exp() - d - 1, sample, count)
    share = ((ratio - clipped) * advantage > 0).float().mean()              # sequences whose gradient is cut
    return -torch.minimum(ratio * advantage, clipped * advantage).mean() + kl * k3.mean(), k3.mean(), share


def reverse_kl(student, teacher):
    """logits (n,V) of both at the same prefixes → Σ_v π(v) (log π(v) − log π_T(v)), (n,)."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def sampled_kl(student, teacher, token):
    """The paper's form, of the sampled tokens alone, token (n,) ~ π: log π(y_t) − log π_T(y_t), (n,). Its gradient is
    that times ∇ log π(y_t), on average over y_t the gradient of `reverse_kl` (more noise, no full teacher logits). To
    differentiate the value itself would give ∇ log π(y_t), 0 on average: which tokens are sampled moves with π."""
    p, q = (x.log_softmax(-1).gather(-1, token[:, None])[:, 0] for x in (student, teacher))
    gap = (p - q).detach()
    return gap + gap * (p - p.detach())


# ----------------------------------------------------------------------------------------------------------- the loop

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): Nesterov momentum, each matrix made orthogonal by five Newton-Schulz steps.

        X ← X / ‖X‖,  then five times  X ← a X + (b G + c G²) X,  G = X Xᵀ        all singular values go to about 1

    torch.optim.Muon (2.9 on) takes these steps in bf16 alone: on a CPU without bf16 arithmetic, as most laptops
    have, six seconds for the tiny model where fp32 takes 0.1."""

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = whole(p.grad.lerp(average, group["momentum"]))           # FSDP: on every process
                tall = p.shape[0] / p.shape[1]
                x = x.mT if tall > 1 else x                                  # G of the shorter side
                x = x / x.norm().clamp_min(1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(share_of(x.mT if tall > 1 else x, p), alpha=group["lr"] * max(1, tall) ** 0.5)


def optimizers(model, recipe):
    """AdamW; with recipe.muon, Muon for the weight matrices inside the blocks (it learns the toy's shapes about four
    times faster) and AdamW for the rest: embeddings, projector, norms, biases."""
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (matrices if recipe.muon and takes_muon(name, p) else tables if p.dim() >= 2 else vectors).append(p)
    groups = [{"params": tables, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    out = [torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=(0.9, 0.98), fused=True)]
    if matrices:
        out.append(Muon(matrices, recipe.muon, recipe.weight_decay))
    return out


# Dense bf16 peak of a card, operations a second, by what its name holds; of others no MFU is shown.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
        "L40S": 362e12, "RTX 4090": 165e12}


def train_flops(model, batch):
    """Operations of one forward and backward pass, 3 × 2 per multiplication: 6·weights·tokens, and 6·(width of a key +
    of a value) per layer, head and pair (query, key) that the mask lets meet. Recomputed activations do not count."""
    cfg, visual, grids = model.cfg, model.visual, batch["grids"]
    patches, valid = len(batch["patches"]), batch["valid"]

    def matrices(*modules):
        return sum(p.numel() for module in modules for p in module.parameters() if p.dim() > 1)
    out = matrices(model.language_model.layers) * int(valid.sum()) + cfg.vocab * cfg.hidden * int(batch["answer"].sum())
    out += matrices(visual.patch_embed, visual.blocks) * patches
    out += matrices(visual.merger, visual.deepstack_merger_list) * patches // cfg.merge ** 2
    pairs = int((batch["mask"].mask[:, 0] & valid[:, :, None]).sum())
    out += (2 * cfg.head_dim + cfg.rope_width) * cfg.heads * cfg.layers * pairs
    out += 2 * cfg.vision_hidden * cfg.vision_layers * int((grids.prod(1) ** 2).sum())
    return 6 * out


def shard(model, device):
    """FSDP2: of each decoder layer, and of all the rest together, a process holds its share of the weights, gradients
    and optimizer state; the whole weights are there while the layer computes. fp32, as without: autocast casts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device, (world(),))
    for module in (*model.language_model.layers, model):
        fully_shard(module, mesh=mesh)


def whole(tensor):
    """A tensor that FSDP shards → all of it (a collective: every process calls it). Any other value: itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_of(value, like):
    """A whole tensor → this process' share of it, if `like` is sharded and of its shape. Any other value: itself."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, Replicate
    replicated = DTensor.from_local(value.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return replicated.redistribute(placements=like.placements)


def unsharded(state):
    """A state_dict → the same with whole tensors, of sharded ones on process 0 alone, and in its CPU's memory."""
    if isinstance(state, dict):
        return {k: unsharded(v) for k, v in state.items()}
    if isinstance(state, list):
        return [unsharded(v) for v in state]
    tensor = whole(state)
    return state if tensor is state else tensor.cpu() if rank() == 0 else None


class Trainer:
    """Optimizer, schedule, checkpoints and logging of one stage; the stage itself is `fit`'s argument.

    A killed run resumes exactly: everything random in step n is seeded by (seed, stage, n), and state.pt holds weights,
    optimizer and the next step. A stage's directory gets its config.json only when the stage is complete."""

    def __init__(self, model, processor, recipe, stage, args, inherits=None):
        self.model, self.recipe, self.stage, self.args, self.inherits = model, recipe, stage, args, inherits
        self.after = mark_of(inherits)
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.val = val_rows(args, stage, recipe) if args.eval_every else None
        teacher = getattr(args, "teacher", None)                                # a resumed run must have the same
        self.settings = repr((recipe, args.seed, str(inherits), args.freeze, str(teacher)))
        self.directory, self.metrics = args.out / stage, args.out / "metrics.jsonl"
        model.requires_grad_(True)
        parts = {"vision": (model.visual.blocks, model.visual.patch_embed, model.visual.pos_embed),
                 "projector": (model.visual.merger, model.visual.deepstack_merger_list)}
        for part in {*recipe.freeze, *args.freeze}:
            for module in parts[part]:
                module.requires_grad_(False)
        if args.fsdp:
            shard(model, args.device)
        model.checkpointing = model.visual.checkpointing = args.checkpointing
        name = torch.cuda.get_device_name() if args.device == "cuda" else ""
        self.peak, self.flops = next((peak for card, peak in PEAK.items() if card in name), 0), 0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = optimizers(model, recipe)

    def generator(self, step):
        """Random numbers for sampling in one step."""
        seed = np.random.SeedSequence([self.args.seed, *self.stage.encode(), step]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))

    def lr(self, step):
        r, warmup = self.recipe, max(1, round(self.recipe.warmup * self.recipe.steps))
        if step < warmup:
            return r.lr * (step + 1) / warmup
        return r.lr_min + (r.lr - r.lr_min) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, r.steps - warmup)))

    def to_device(self, batch):
        return {k: v.to(self.args.device, non_blocking=True) for k, v in batch.items()}

    def autocast(self):
        return torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.device == "cuda")

    def update(self, jobs):
        """One optimizer step over the accumulated jobs (batch, loss_of, weight) of all processes:
        loss = Σ weight·loss_of(batch)."""
        total = 0.0
        if self.args.fsdp:
            jobs = self.even(jobs)
        for batch, loss_of, weight in jobs:
            self.flops += train_flops(self.model, batch) if self.peak else 0
            with self.autocast():
                loss = loss_of(self.to_device(batch)) * weight
            (loss * world() if self.args.fsdp else loss).backward()          # FSDP takes the mean over the processes
            total += float(loss.detach())
        if world() > 1 and not self.args.fsdp:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            some = torch.tensor([float(p.grad is not None) for p in self.parameters])
            flat = torch.cat([*(g.flatten() for g in grads), some.to(grads[0])])
            dist.all_reduce(flat)
            *parts, some = flat.split([*(g.numel() for g in grads), len(grads)])
            for p, part, known in zip(self.parameters, parts, some.tolist()):
                p.grad = part.view_as(p) if known else None          # no process has one: the optimizer passes it over
        total = sum(gather(total))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.norm = float(whole(norm))
        if math.isfinite(self.norm):
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return total

    def even(self, jobs):
        """With FSDP all processes go through the same modules together. So that each has equally many batches, some are
        repeated with weight 0; if any has a picture, a batch without gets a blank one, which stands for no token."""
        counts, cfg = gather(len(jobs)), self.model.cfg
        need(min(counts), f"{self.stage}: a process found no readable video for its share of a step; give more --packs")
        blank = {"patches": torch.zeros(cfg.merge ** 2, 6 * cfg.patch ** 2, dtype=torch.uint8),
                 "grids": torch.full((1, 2), cfg.merge)}
        if any(gather(any(len(batch["patches"]) for batch, *_ in jobs))):
            jobs = [(batch if len(batch["patches"]) else batch | blank, *rest) for batch, *rest in jobs]
        return jobs + [(*jobs[0][:2], 0.0)] * (max(counts) - len(jobs))

    def supervised(self, batches):
        """Jobs for `update`: answer cross-entropy, each token weighted by the recipe's reduction (§4). A batch counts
        by its share of the weights of all processes: packing and processes do not change the loss."""
        reduction = self.recipe.reduction

        def loss_of(batch):
            logits, token, sample = answer_logits(self.model, batch)
            weight = sft_weights(sample, reduction)
            return (F.cross_entropy(logits, token, reduction="none") * weight).sum() / weight.sum()
        totals = [float(sft_weights(b["sample"][:, 1:][b["answer"][:, 1:]], reduction).sum()) for b in batches]
        total = sum(gather(sum(totals)))
        need(total, f"{self.stage}: no process found a readable video; see what --jobs 1 says")
        return [(batch, loss_of, own / total) for batch, own in zip(batches, totals)]

    def held_out(self, rows, root):
        """What chooses the best checkpoint: the loss on held-out rows; in RL and OPD the rule reward of greedy answers.
        → name, value, score (greater is better)"""
        with self.autocast():
            if self.stage not in ("rl", "opd"):
                loss = evaluation.held_out_loss(self.model, self.processor, rows, root, name="val")[0]
                return "val_loss", loss, -loss
            texts = evaluation.answer_rows(self.model, self.processor, rows, root, max_new=self.recipe.max_new,
                                            name="val")
        reward = float(np.mean([text is not None and evaluation.reward(text, row) for text, row in zip(texts, rows)]))
        return "val_reward", reward, reward

    def fit(self, step_of, finish=lambda: None):
        """Run step_of(step) → dict of figures ("loss" and "tokens" among them) for every step; finish(); save. With
        --eval-every, <stage>/best is what scored highest on the held-out rows so far, a checkpoint like the last."""
        state_file, first, seen, best = self.directory / "state.pt", 0, 0, -math.inf
        every, steps = self.args.eval_every, self.recipe.steps
        self.directory.mkdir(parents=True, exist_ok=True)
        if state_file.is_file():
            state = torch.load(state_file, map_location="cpu", weights_only=True)
            need(state["settings"] == self.settings,
                 f"{state_file}: was written with other settings; use those or delete {self.directory}")
            own = self.model.state_dict()
            self.model.load_state_dict({k: share_of(v, own[k]) for k, v in state["model"].items()})
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                params = [p for group in optimizer.param_groups for p in group["params"]]
                for i, held in saved["state"].items():
                    saved["state"][i] = {k: share_of(v, params[i]) for k, v in held.items()}
                optimizer.load_state_dict(saved)
            first, seen, best = state["step"], state["tokens"], state["best"]
            print(f"{self.stage}: resuming at step {first} of {steps}")
        else:
            once(lambda: forget(self.directory))
        once(lambda: self._cut_metrics(first))
        bar = tqdm(range(first, steps), f"{self.stage:>9}", steps, initial=first, mininterval=1)
        saved, began, already, self.flops = time.monotonic(), time.monotonic(), seen, 0
        self.model.train()
        for step in bar:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * self.lr(step) / self.recipe.lr
            self.norm = 0.0                                                  # of the gradient, before it is clipped
            shares = gather(step_of(step))
            figures = {k: float(np.mean([share[k] for share in shares])) for k in shares[0]}
            figures["tokens"] = sum(share["tokens"] for share in shares)
            seen += figures["tokens"]
            figures = {"stage": self.stage, "step": step, "lr": self.lr(step), **figures, "grad_norm": self.norm}
            need(math.isfinite(figures["loss"]),
                 f"{self.stage}: the loss is {figures['loss']} at step {step}; lower --lr")
            if every and ((step + 1) % every == 0 or step + 1 == steps):
                name, figures[name], score = self.held_out(*self.val)
                if score > best:
                    best = score
                    self._save_model(self.directory / "best", {"stage": self.stage, "step": step, name: figures[name]})
            if rank() == 0:
                with open(self.metrics, "a") as f:
                    f.write(json.dumps(figures) + "\n")
            shown = {k: f"{v:.3f}" for k, v in figures.items() if isinstance(v, float) and k != "lr"}
            passed = time.monotonic() - began
            shown["tok/s"] = f"{(seen - already) / passed:.0f}"
            if self.peak:                                                    # this process' GPU, without sampling
                shown["MFU"] = f"{self.flops / passed / self.peak:.1%}"
            bar.set_postfix(shown, refresh=False)
            if gather(time.monotonic() - saved)[0] > self.args.save_every:
                self._save_state(step + 1, seen, best)
                saved = time.monotonic()
        seconds = time.monotonic() - began
        finish()
        done = {"stage": self.stage, "inherits": str(self.inherits), "after": self.after, "seed": self.args.seed,
                "tokens": seen, "seconds": round(seconds, 1), "processes": world(), "recipe": asdict(self.recipe)}
        self._save_model(self.directory, done)
        once(lambda: state_file.unlink(missing_ok=True))
        self.model.eval()

    def _save_model(self, directory, record):
        state = unsharded(self.model.state_dict())

        def leave():                                     # config.json, the sign of a finished stage, comes last
            directory.mkdir(exist_ok=True)
            write_atomic(directory / "stage.json", lambda p: p.write_text(json.dumps(record, indent=1)))
            save_model(directory, self.model, self.tokenizer, state=state)
        once(leave)

    def _save_state(self, step, tokens, best):
        state = unsharded({"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                       "step": step, "tokens": tokens, "best": best, "settings": self.settings})
        once(lambda: write_atomic(self.directory / "state.pt", lambda p: torch.save(state, p)))

    def _cut_metrics(self, first):
        """Lines that a killed run wrote after its last checkpoint are written again: drop them."""
        if self.metrics.is_file():
            lines = [line for line in self.metrics.read_text().splitlines() if line.endswith("}")]      # none torn
            lines = [line for line in lines if (x := json.loads(line))["stage"] != self.stage or x["step"] < first]
            write_atomic(self.metrics, lambda p: p.write_text("".join(line + "\n" for line in lines)))


def forget(directory):
    """Before a stage is trained anew: what says that it is finished, and what was measured of it."""
    for name in ("config.json", "scores.json", "agent.json"):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "best", ignore_errors=True)


def mark_of(directory):
    """Tells one training of a stage from another; "" of a checkpoint that we did not train."""
    path = Path(directory or "") / "stage.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def val_rows(args, stage, recipe):
    """The held-out rows and the folder of their media."""
    path = args.val or args.data_dir / "val.jsonl"
    rows = [row for row in framed(load_rows(path), recipe.fps, recipe.max_frames)
            if stage not in ("rl", "opd") or row["task"] in ("mcq", "grounding")]
    need(rows, f"{path}: has no rows of mcq or grounding, whose rewards choose {stage}'s best; give --val FILE")
    return rows, path.parent


# ------------------------------------------------------------------------------------------------------- the stages

def train_supervised(trainer, data):
    """cpt, sft: next token on the answers."""
    loader = None

    def step_of(step):
        nonlocal loader
        if trainer.args.workers and not loader:              # its processes turn numbers of steps into batches
            loader = iter(torch.utils.data.DataLoader(
                range(step, trainer.recipe.steps), None, collate_fn=partial(data.prepared, recipe=trainer.recipe),
                num_workers=trainer.args.workers, prefetch_factor=4))
        if loader:
            batches, skipped = next(loader)
            data.skipped.update(skipped)
            if isinstance(batches, UserError):
                raise batches
        else:
            batches = data.batches(step, trainer.recipe)
        loss = trainer.update(trainer.supervised(batches))
        return {"loss": loss, "tokens": int(sum(b["valid"].sum() for b in batches))}
    trainer.fit(step_of)


@torch.no_grad()
def convert(model, data, args, steps=4):
    """GQA → M²LA (§3.2): stream moments over `steps` training steps, give each layer and modality its rank by the
    damage that cutting it does to some more samples, rebuild the attention; heal it on others if that is not enough
    (`ConvertSpec.tolerance`). → cached values, relative to GQA's"""
    layers, released = model.language_model.layers, args.attn == "released"
    choices = {**evaluation.DEFAULT, **(FOLDABLE if released else {})}
    spec = evaluation.spec_of(choices, layers[0].self_attn, args.cache_share)
    recipe = replace(TINY["cpt"], packs=32)

    def predict(batch):
        return answer_logits(model, {k: v.to(args.device) for k, v in batch.items()})[0].log_softmax(-1)
    with Calibration([layer.self_attn for layer in layers], raw=released) as calibration:
        for step in tqdm(range(steps), desc="  convert"):
            for batch in data.batches(step, recipe):
                batch = {k: v.to(args.device) for k, v in batch.items()}
                calibration.valid = batch["valid"]
                model(batch["ids"], batch["positions"], batch["patches"], batch["grids"], mask=batch["mask"])
    for moments in calibration.moments if world() > 1 else ():           # sums: every process saw a share of the data
        for tensor in vars(moments).values():
            dist.all_reduce(tensor)
    judges = [collate_packs([pack]) for pack in data.packs(steps, recipe)]
    sizes = np.cumsum([int(batch["answer"].sum()) for batch in judges]) * model.cfg.vocab
    judges = judges[:max(1, int((sizes <= 2 ** 27).sum()))]                # half a GB of log-probabilities is kept
    own_damage = evaluation.divergence(predict, judges)

    def batches():                                                       # drawn only if they are needed
        for step in itertools.count(steps + 1):
            if packs := data.packs(step, replace(recipe, packs=2 * world())):
                yield collate_packs(packs)
    spec = convert_layers(layers, calibration.moments, spec, lambda: float(np.mean(gather(own_damage()))), predict,
                          batches())
    ranks = tuple(spec.layer_ranks(i) for i in range(len(layers)))
    model.cfg = replace(model.cfg, attn=args.attn, rope_width=spec.rope_width, ranks=ranks)
    for layer in layers if released else ():
        layer.self_attn = layer.self_attn.fold()
    return evaluation.cache_ratio(spec, calibration.modules, calibration.moments[0].count.tolist())


def complete(prompt, ids):
    """A prompt and the answer that was sampled for it → one conversation, the answer marked."""
    more = (prompt.next_position + torch.arange(len(ids))).expand(3, -1)
    return Encoded(torch.cat([prompt.ids, torch.tensor(ids)]), torch.cat([prompt.positions, more], 1), prompt.patches,
                   prompt.grids, torch.arange(len(prompt.ids) + len(ids)) >= len(prompt.ids))


def rollout(trainer, data, drawn, samples, number, temperature=None, model=None):
    """Sample answers of the trained model (or of `model`) with the random numbers of step `number`, by default at the
    recipe's temperature. → rows, prompts, generations (row-major), roots"""
    rows, prompts, roots = [], [], []
    for group, root in drawn:
        encoded = data.encode([{**row, "messages": row["messages"][:-1]} for row in group], root, generation=True)
        if encoded:
            rows, prompts, roots = rows + group, prompts + encoded, roots + [root] * len(group)
    need(rows, f"{trainer.stage}: no readable video among {len(drawn)}: {next(iter(data.skipped), '')}", MediaError)
    stop = trainer.tokenizer.token_id("<|im_end|>")
    temperature = trainer.recipe.temperature if temperature is None else temperature
    with trainer.autocast():
        outs = generate(model or trainer.model, prompts, stop, trainer.recipe.max_new, temperature, samples,
                        trainer.generator(number))
    return rows, prompts, outs, roots


def rewards_of(tokenizer, rows, outs, bonus=0.0):
    """The rule-based reward of each sampled answer (equally many to each row); `bonus` more for a well-formed one."""
    group, scored = len(outs) // len(rows), []
    for i, out in enumerate(outs):
        text, row = out.text(tokenizer), rows[i // group]
        scored.append(evaluation.reward(text, row) + (bonus * evaluation.well_formed(text, row) if bonus else 0.0))
    return scored


def packs_of(data, rows, samples, roots, per_row):
    """Pack completed conversations of neighbouring rows that share their video."""
    packs = []
    for (_, root), run in itertools.groupby(range(len(rows)), lambda i: (first_media(rows[i]), roots[i])):
        at = list(run)
        own = samples[at[0] * per_row:(at[-1] + 1) * per_row]
        packs.append(data.pack([rows[i] for i in at], own, root, per_row))
    return packs


@torch.no_grad()
def judged(data, trainer, judge):
    """judge(number, eight packs) → a list, over all packs of the pool, shared by the processes; the lists joined.
    Packs without any readable video have no verdicts."""
    pool = pool_of(data, trainer.recipe.pool, trainer.args.seed)
    chunks = [(i // 8, pool[i:i + 8]) for i in range(0, len(pool), 8)][rank()::world()]
    own = []
    for number, chunk in tqdm(chunks, desc="   filter"):
        with suppress(MediaError):
            own += judge(number, chunk)
    return sorted(sum(gather(own), []))


def keep_rows(trainer, data, rule):
    """Run a data filter once per stage and remember which rows it keeps (a resumed run reads the list)."""
    def filtered():
        found = rule()
        need(found["looked_at"], f"{trainer.stage}: no readable video in its data; {next(iter(data.skipped), '')}")
        need(found["keep"], f"{trainer.stage}: the data filter kept none of {found['looked_at']} prompts; the model is "
             "too weak or too strong for this data")
        return found
    path = trainer.directory / "kept.json"
    if not (trainer.directory / "state.pt").is_file():
        once(lambda: path.unlink(missing_ok=True))
    found = stored(path, filtered)
    ids = set(found["keep"])
    count = Counter(row["id"] for _, groups in data.groups for rows in groups for row in rows)
    twice = next((i for i in found["keep"] if count[i] > 1), None)
    need(twice is None, f"{trainer.stage}: its data has {count[twice]} rows with the id {twice!r}; make them differ")
    data.keep(lambda row: row["id"] in ids)
    print(f"{trainer.stage}: {found['note']}")


def stored(path, make):
    """The JSON of `path`; if there is no such file, make() → it. Every process calls it, one writes."""
    if not path.is_file():
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        once(lambda: write_atomic(path, lambda p: p.write_text(json.dumps(value))))
    return read_json(path)


def pool_of(data, limit, seed):
    """About `limit` rows of a data set, whole videos drawn at random, as groups by video."""
    videos = [(rows, root) for root, groups in data.groups for rows in groups]
    drawn, count = [], 0
    for i in np.random.default_rng(seed).permutation(len(videos)):
        if count < limit:
            drawn.append(videos[i])
            count += len(videos[i][0])
    return drawn


def train_rl(trainer, data):
    """Rule-based RL with GSPO: sample a group per prompt, reward by rule, normalise in the group, clipped update."""
    r, G = trainer.recipe, trainer.recipe.group
    reference = build_model(trainer.model.cfg, trainer.tokenizer).to(trainer.args.device)
    reference.load_state_dict(trainer.model.state_dict())            # the SFT model; fit() may load a later state
    reference.eval().requires_grad_(False)

    def rule():
        """§4: grounding where the policy's IoU is in [0.1, 0.7], multiple choice both right and wrong at T = 1."""
        def judge(number, chunk):
            rows, _, outs, _ = rollout(trainer, data, chunk, 4, 10 ** 6 + number)
            rewards = rewards_of(trainer.tokenizer, rows, outs)
            for k, row in enumerate(rows):
                reward = np.mean(rewards[4 * k:4 * k + 4])
                low, high = (0.1, 0.7) if row["task"] == "grounding" else (0.01, 0.99)
                yield row["id"], bool(low <= reward <= high)
        verdicts = judged(data, trainer, judge)
        keep = [row for row, good in verdicts if good]
        note = f"kept {len(keep)} of {len(verdicts)} prompts (IoU in [0.1, 0.7], mixed answers)"
        return {"keep": keep, "looked_at": len(verdicts), "note": note}
    keep_rows(trainer, data, rule)

    def step_of(step):
        trainer.model.eval()
        rows, prompts, outs, roots = rollout(trainer, data, data.step(step, r.packs, r.branches), G, step)
        rewards = torch.tensor(rewards_of(trainer.tokenizer, rows, outs, r.format))
        spread = rewards.view(-1, G).std(1, correction=0)
        live = [i for i in range(len(rows)) if spread[i] > 1e-6]             # zero-spread groups have no gradient
        samples = [complete(prompts[i], outs[i * G + g].ids) for i in live for g in range(G)]
        figures = {"loss": 0.0, "reward": float(rewards.mean()), "spread": float(spread.mean()),
                   "zero_spread": 1 - len(live) / len(rows), "length": float(np.mean([len(o.ids) for o in outs])),
                   "tokens": sum(len(s.ids) for s in samples)}
        packs = packs_of(data, [rows[i] for i in live], samples, [roots[i] for i in live], G)
        for pack, own in zip(packs, advantages(rewards, G).view(-1, G)[live].view(-1).split([p.count for p in packs])):
            pack.advantage = own
        order = np.random.default_rng([trainer.args.seed, step]).permutation(len(packs))
        minis = [micro_batches([packs[i] for i in part], r.tokens) for part in np.array_split(order, r.updates)]
        with torch.no_grad(), trainer.autocast():
            for batch in sum(minis, []):
                batch["ref"] = token_logp(reference, trainer.to_device(batch))[0]
            for batch in sum(minis[1:], []):                                 # in the first half, π is still π_old
                batch["old"] = token_logp(trainer.model, trainer.to_device(batch))[0]
        logs = []
        trainer.model.train()

        def loss_of(batch):
            logp, sample = token_logp(trainer.model, batch)
            old = batch.get("old", logp.detach())
            loss, k3, share = gspo_loss(logp, old, batch["ref"], sample, batch["advantage"], r.clip, r.kl)
            logs.append((float(k3.detach()), float(share)))
            return loss
        for batches in minis:
            total = sum(gather(sum(len(b["advantage"]) for b in batches)))
            if total:
                jobs = [(batch, loss_of, len(batch["advantage"]) / total) for batch in batches]
                figures["loss"] += trainer.update(jobs) / r.updates
        figures["kl"], figures["clipped"] = np.mean(logs or [(0.0, 0.0)], 0).tolist()
        return figures
    trainer.fit(step_of)


def token_logp(model, batch):
    """→ fp32 log π of each answer token (n,), its conversation (n,)."""
    logits, token, sample = answer_logits(model, batch)
    return logits.log_softmax(-1).gather(-1, token[:, None])[:, 0], sample


def train_opd(trainer, data, teacher_dir, replay=None, teacher_device=None):
    """On-policy distillation: the student samples, the teacher judges every token of the sample by reverse KL:

        L = mean_i 1/|y_i| Σ_t KL( π(· | x_i, y_i,<t) ‖ π_T(· | x_i, y_i,<t) ),   y_i ~ π

    Each sample counts the same, as in the paper's mean_t. A mean over all tokens would leave short answers unheard: a
    span has more tokens than the name of a colour, and more nats on each (it cost 4 points of multiple choice)."""
    r = trainer.recipe
    need(r.kl_form == "full" or r.temperature == 1, "--kl sampled: is right for samples at temperature 1 alone")
    teacher, processor = load_model(teacher_dir, teacher_device or trainer.args.device)
    need((processor.tokenizer.tokens, teacher.cfg.vocab) == (trainer.tokenizer.tokens, trainer.model.cfg.vocab),
         f"--teacher {teacher_dir}: its vocabulary differs from the student's; OPD compares by token")
    teacher.requires_grad_(False)

    def rule():
        """§4: rows that the teacher gets right, or clearly better, and the student does not; and as many others.
        Notes too in which kinds of question the teacher is ahead: that is where the test looks for the gap."""
        def judge(number, chunk):
            rewards = []
            for model in (trainer.model, teacher):
                rows, _, outs, _ = rollout(trainer, data, chunk, 1, number, 0.0, model)
                rewards.append(rewards_of(trainer.tokenizer, rows, outs))
            for row, student, best in zip(rows, *rewards):
                yield row["id"], row.get("kind", row["task"]), best - student
        verdicts, kinds = judged(data, trainer, judge), defaultdict(list)
        for _, kind, ahead in verdicts:
            kinds[kind].append(ahead)
        gap, rest = ([row for row, _, ahead in verdicts if (ahead > 0.1) == wanted] for wanted in (True, False))
        others = np.random.default_rng(trainer.args.seed).permutation(rest)[:len(gap)].tolist()
        note = f"kept {len(gap)} of {len(verdicts)} prompts where the teacher is better, and {len(others)} others"
        return {"keep": gap + others, "looked_at": len(verdicts), "note": note,
                "kinds": sorted(kind for kind, ahead in kinds.items() if np.mean(ahead) > 0.05)}
    keep_rows(trainer, data, rule)

    def step_of(step):
        trainer.model.eval()
        rows, prompts, outs, roots = rollout(trainer, data, data.step(step, r.packs, r.branches), 1, step)
        packs = packs_of(data, rows, [complete(p, o.ids) for p, o in zip(prompts, outs)], roots, 1)
        batches = micro_batches(packs, r.tokens)
        trainer.model.train()

        def loss_of(batch):
            logits, token, sample = answer_logits(trainer.model, batch)
            with torch.no_grad():
                there = {k: v.to(teacher.device) for k, v in batch.items()}
                target = answer_logits(teacher, there)[0].to(logits.device)
            gap = reverse_kl(logits, target) if r.kl_form == "full" else sampled_kl(logits, target, token)
            return sequence_mean(gap, sample, count_of(batch)).mean()
        total = sum(gather(sum(map(count_of, batches))))
        jobs = [(batch, loss_of, count_of(batch) / total) for batch in batches]
        if replay:
            count = sum(r.replay.values())
            old = trainer.supervised(replay.batches(step, replace(r, packs=count)))
            jobs += [(batch, loss, share * count / r.packs) for batch, loss, share in old]
        return {"loss": trainer.update(jobs), "tokens": int(sum(b["valid"].sum() for b in batches))}
    trainer.fit(step_of)


# ------------------------------------------------------------------------------------------------- chain and command

OVERRIDES = ("steps", "lr", "muon", "packs", "branches", "tokens", "max_frames", "max_new")        # flags


def recipe_of(stage, args, parameters):
    """The stage's recipe with the command's overrides, for a model of so many parameters."""
    recipe = TINY[stage]
    changes = {**(SMALL if parameters > 1e7 else {}), **(LARGE[stage] if parameters > 1e8 else {})}
    recipe = replace(recipe, **changes)
    changes = {k: getattr(args, k) for k in OVERRIDES if getattr(args, k) is not None}
    if args.lr:
        changes["lr_min"] = recipe.lr_min * args.lr / recipe.lr
    if args.kl:
        changes["kl_form"] = args.kl
    if args.data:
        changes |= {"mix": {str(path.resolve()): 1.0 for path in args.data}, "replay": {}}
    if args.without:
        changes["mix"] = {name: share for name, share in recipe.mix.items() if name not in args.without}
        need(changes["mix"] and set(args.without) <= set(recipe.mix),
             f"--without {' '.join(args.without)}: {stage} has {', '.join(recipe.mix)}, and needs one of them")
    return replace(recipe, **changes)


def converted_as(start, args):
    """What the conversion of `start` leaves in convert/stage.json beside its figures."""
    return {"inherits": str(start), "attn": args.attn, "cache_share": args.cache_share, "seed": args.seed,
            "data": [str(path.resolve()) for path in args.data or ()], "max_frames": args.max_frames,
            "written": {p.name: p.stat().st_mtime_ns for p in sorted(start.iterdir())
                        if p.name in ("config.json", "weights.pt") or p.suffix == ".safetensors"}}


def start_of(stage, args):
    """The checkpoint a stage begins with: --init, or the one that the stage before left in --out. CPT does not convert
    again what it has converted."""
    start = find_model(args.init, "--init") if args.init else args.out / PREVIOUS[stage]
    record = args.out / "convert/stage.json"
    need((start / "config.json").is_file(),
         f"{args.out}: has no finished '{start.name}' for '{stage}'; run it first or give --init DIR")
    if stage == "cpt" and record.is_file() and converted_as(start, args).items() <= read_json(record).items():
        return record.parent
    return start


def data_of(stage, recipe, processor, args):
    """The stage's own data."""
    data = Data(args.data_dir, recipe.mix, processor, args.seed, stage, recipe.steps, recipe.fps,
                recipe.max_frames)
    if stage in ("rl", "opd"):                           # their rewards are rules for these two tasks
        data.keep(lambda row: row["task"] in ("mcq", "grounding"))
        need(len(data.groups) == len(recipe.mix),
             "--data: this stage needs rows of the tasks mcq, grounding in each file")
    return data


COLOURS = {"vision": "\033[36m{}\033[0m", "prompt": "\033[2m{}\033[0m", "loss": "\033[1;32m{}\033[0m"}
BRACKETS = {"vision": "{}", "prompt": "{}", "loss": "[[{}]]"}


def show_samples(stage, args):
    """--show-sample N: the first N packs of the stage, token by token as the model reads them, the tokens of the loss
    marked. RL and OPD learn from their own answers: here those that the start samples for the data before its filter.
    Writes no file; for supervised stages the weights are not even read."""
    start, on_policy = start_of(stage, args), stage in ("rl", "opd")
    if on_policy:
        model, processor = load_model(start, args.device)
    else:
        processor = Processor(Tokenizer.load(start), Config.load(start / "config.json"))
        with torch.device("meta"):
            model = build_model(processor.cfg, processor.tokenizer)
    args.fsdp, recipe = False, recipe_of(stage, args, sum(p.numel() for p in model.parameters()))
    if not (args.data_dir / CURATED).is_file():          # the stage makes it when it is run
        recipe = replace(recipe, mix={name: share for name, share in recipe.mix.items() if name != CURATED})
    trainer = Trainer(model, processor, recipe, stage, args, start)
    data, left = data_of(stage, recipe, processor, args), args.show_sample
    if stage == "cpt":
        held_out(args, data, recipe)                         # is no part of it
    group = recipe.group if stage == "rl" else 1
    marks = COLOURS if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else BRACKETS
    print(f"{stage}: {marks['loss'].format('in the loss')} {marks['prompt'].format('prompt')} "
          f"{marks['vision'].format('<n vision>')}")
    for step in range(recipe.steps):
        for rows, root in data.step(step, recipe.packs, recipe.branches):
            samples = data.encode(rows, root)
            if not samples:
                continue
            if on_policy:
                rows, prompts, outs, _ = rollout(trainer, data, [(rows, root)], group, step)
                samples = [complete(prompts[i // group], out.ids) for i, out in enumerate(outs)]
            pack, media = data.pack(rows, samples, root, group), first_media(rows[0])
            length = torch.bincount(pack.sample[pack.answer])
            power = 1 if on_policy else {"mean": 0, "square": 0.5}[recipe.reduction]
            notes = [f"weight {m ** -power:.3f} a token" for m in length.tolist()]
            if stage == "rl":
                rewards = torch.tensor(rewards_of(processor.tokenizer, rows, outs, recipe.format))
                notes = [f"{note}, reward {r:.2f}, advantage {a:+.2f}"
                         for note, r, a in zip(notes, rewards, advantages(rewards, group))]
            name = plain(media[media["type"]]) if media else "text alone"
            print(f"\n=== {name}: {len(samples)} conversations, {len(pack.ids)} tokens "
                  f"({sum(len(s.ids) for s in samples)} if not packed), {int(pack.answer.sum())} in the loss")
            print_pack(pack, processor.tokenizer, model.vision_ids, marks,
                       [f"{plain(rows[i // group]['id'])}: {note}" for i, note in enumerate(notes)])
            left -= 1
            if not left:
                return
    raise UserError(f"{stage}: only {args.show_sample - left} readable samples; {next(iter(data.skipped), '')}")


def plain(text):
    """Text of a data file, or of a model, for a terminal: nothing in it commands the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_pack(pack, tokenizer, vision_ids, marks, notes):
    """One pack as the tree that it is: what is shared, then each branch, indented under what it continues."""
    kinds = np.where(pack.answer, "loss", np.where(torch.isin(pack.ids, torch.tensor(vision_ids)), "vision", "prompt"))
    for branch in pack.branch.unique().tolist():
        at = (pack.branch == branch).nonzero()[:, 0].tolist()
        conversation, depth = int(pack.sample[at[0]]), (branch > 0) + int(pack.parent[at[0]] > 0)
        what = "shared" if conversation < 0 else f"{conversation + 1}. {notes[conversation]}"
        bar, text = "│  " * depth, ""
        print(f"{bar[3:]}{'├─ ' * (depth > 0)}{what}; {len(at)} tokens, {int(pack.answer[at].sum())} in the loss")
        for kind, run in itertools.groupby(at, kinds.__getitem__):
            ids = pack.ids[list(run)].tolist()
            words = f"<{len(ids)} vision>" if kind == "vision" else plain(tokenizer.decode(ids))
            text += "\n".join(marks[kind].format(line) if line else "" for line in words.split("\n"))
        print(*(bar + line for line in text.split("\n")), sep="\n")


def run_stage(stage, args):
    """Train one stage and leave its checkpoint in --out/<stage>."""
    need(world() > 1 or not args.fsdp, "--fsdp: needs several processes, by torchrun or --jobs N")
    start = start_of(stage, args)
    model, processor = load_model(start, args.device)
    size = sum(p.numel() for p in model.parameters())
    recipe = recipe_of(stage, args, size)
    print(f"{stage}: starts from {start} ({model.cfg.attn}, {size / 1e6:.2f} M parameters)")

    if CURATED in recipe.mix:
        once(lambda: curate(start, args))
    stage_data = data_of(stage, recipe, processor, args)
    held = held_out(args, stage_data, recipe) if stage == "cpt" else []
    converts = stage == "cpt" and model.cfg.attn == "gqa" != args.attn
    before = loss_on(model, processor, held) if held and (converts or args.data) else None
    if converts:
        convert_stage(model, processor, args, start, stage_data, held, before)
        start = args.out / "convert"
    kind = model.cfg.attn
    need(kind == args.attn, f"{start}: its attention is {kind}; run --stage cpt first or give --attn {kind}")
    trainer = Trainer(model, processor, recipe, stage, args, start)
    if stage == "rl":
        train_rl(trainer, stage_data)
    elif stage == "opd":
        teacher = find_model(args.teacher or args.out / "teacher", "--teacher")
        replay = recipe.replay and Data(args.data_dir, recipe.replay, processor, args.seed, "replay", 1, recipe.fps,
                                        recipe.max_frames)
        if replay:
            replay.skipped = stage_data.skipped              # counted together
        train_opd(trainer, stage_data, teacher, replay, args.teacher_device)
    else:
        train_supervised(trainer, stage_data)
    if held and args.data:
        print(f"{stage}: held-out loss {before:.4f} → {loss_on(model, processor, held):.4f} nats")
    if skipped := sum(gather(stage_data.skipped), Counter()):
        print(f"{stage}: skipped {skipped.total()} draws of unreadable videos; first: {next(iter(skipped))}")


def held_out(args, data, recipe):
    """[(rows, root)] that CPT does not see: of --val, of the toy's val.jsonl, or one video in twenty of --data."""
    if args.data and not args.val:
        return data.hold_out()
    return [val_rows(args, "cpt", recipe)]


def loss_on(model, processor, held):
    device = model.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        tables = [evaluation.held_out_loss(model, processor, rows, root)[1] for rows, root in held]
    nats, tokens = np.concatenate(tables).sum(0)
    return float(nats / max(1.0, tokens))


def convert_stage(model, processor, args, start, data, held, before):
    """GQA → M²LA into --out/convert, with the held-out loss before and after; a broken conversion stops here."""
    need(held, "--data: has one video (or eight texts) only, none can be held out to measure by; give --val F.jsonl")
    if not args.data:
        stage_data, data = data, Data(args.data_dir, CALIBRATION_MIX, processor, args.seed, "convert")
        data.skipped = stage_data.skipped                    # counted together
    ratio = convert(model, data, args)
    after = loss_on(model, processor, held)
    print(f"convert: {ratio:.0%} of the cache, ranks (text, vision) {' '.join(map(str, model.cfg.ranks))}; "
          f"held-out loss {before:.4f} → {after:.4f} nats")
    need(after < before + args.max_damage, f"convert: the held-out loss rose by {after - before:.3f} nats, more than "
         f"--max-damage {args.max_damage}; calibrate on more data or raise the ranks")

    def leave():
        forget(args.out / "convert")
        save_model(args.out / "convert", model, processor.tokenizer)
        record = {"cache_ratio": ratio, **converted_as(start, args)}         # last: start_of looks for it
        write_atomic(args.out / "convert" / "stage.json", lambda p: p.write_text(json.dumps(record)))
    once(leave)


def curate(start, args):
    """The long-video data of §4.2.1: questions about some long toy videos, from captions by the model that starts."""
    if not (args.data_dir / CURATED).is_file():
        command("data/curate/prepare.py", args.data_dir / "clips" / "long", "--out", (args.data_dir / CURATED).parent,
                "--model", start, "--seed", args.seed, "--limit", 12)


def bench_decode(args):
    """Decode times for the report, once; a run that cannot measure them is complete without."""
    file = args.out / "decode.json"
    if not file.is_file():
        os.environ.setdefault("OMP_NUM_THREADS", "1")        # a token of a tiny model waits longer for a second thread
        try:
            command("eval.py", "--bench", "decode", "--contexts", "1024,4096,16384", "--json", file)
        except SystemExit:
            print(f"no {file}: the report goes without decode times")


def copy_shipped(out):
    """The shipped base and teacher as stages of this run; --base scratch trains them instead (an hour on 2 cores)."""
    for name in ("base", "teacher"):
        if not (out / name / "config.json").is_file():
            shutil.copytree(Path(__file__).parent / "data/toy/weights" / name, out / f"{name}.tmp", dirs_exist_ok=True)
            os.replace(out / f"{name}.tmp", out / name)


def scores_of(stage, args):
    """Test scores of a finished stage: {short, long, loss}; measured once and kept beside its weights."""
    def measure():
        model, processor = load_model(args.out / stage, args.device)
        rows = load_rows(args.data_dir / "val.jsonl")
        loss, table = evaluation.held_out_loss(model, processor, rows, args.data_dir, name=f"{stage} loss")
        clips = [evaluation.clip_of(r) for r in rows]
        scores = {"loss": loss, "loss_n": len(rows), "loss_ci": evaluation.interval(table, clips)}
        if stage not in ("base", "convert", "cpt"):
            for length in ("short", "long"):
                test, train = (args.data_dir / f"{name}_{length}.jsonl" for name in ("test", "sft"))
                first = stage == "sft_short"                                 # the baselines are of the test alone
                scores[length] = evaluation.evaluate(model, processor, test, train if first else None, seed=args.seed,
                                                     blind=first, model_dir=args.out / stage)
        return scores
    return stored(args.out / stage / "scores.json", measure)


def finished(stage, args):
    """Whether --out has the stage, and not of an earlier training of the stage before it."""
    directory, before = args.out / stage, args.out / PREVIOUS[stage]
    if not (directory / "config.json").is_file():
        return False
    record, mark = read_json(directory / "stage.json"), mark_of(before)
    kind = Config.load(directory / "config.json").attn
    need(kind == args.attn, f"{directory}: was trained with --attn {kind}; use that or another --out")
    for name in OVERRIDES:
        value, was = getattr(args, name), record["recipe"].get(name)
        need(value is None or value == was,
             f"{directory}: was trained with --{name.replace('_', '-')} {was}; use that or another --out")
    if Path(record["inherits"]).resolve() == before.resolve() and record.get("after", mark) != mark:
        print(f"{stage}: was trained before {before.name} was trained again; once more")
        return False
    return True


def whole_recipe(args):
    """Every stage in order, each evaluated on test items that no stage has seen; ends with the table."""
    began = time.monotonic()
    once(lambda: command("data/toy/prepare.py", "--out", args.data_dir, "--seed", args.seed, "--scale", args.scale,
                         "--side", SIDES[args.preset]))
    once(lambda: copy_shipped(args.out) if args.base == "shipped" else
         command("data/toy/pretrain.py", "--out", args.out, "--seed", args.seed, "--preset", args.preset))
    scores = {"base": scores_of("base", args)}
    for stage in ("cpt", "sft_short", "sft_long", "rl", "opd"):
        if not finished(stage, args):
            run_stage(stage, args)
        if stage == "cpt" and args.attn != "gqa":
            scores["convert"] = scores_of("convert", args)
        scores[stage] = scores_of(stage, args)
    scores["teacher"] = scores_of("teacher", args)
    agent = stored(args.out / "opd" / "agent.json", lambda: evaluation.evaluate_agent(
        *load_model(args.out / "opd", args.device), load_rows(args.data_dir / "test_agent.jsonl"), args.data_dir,
        seed=args.seed))
    results = {**assemble(scores, read_json(args.out / "opd" / "kept.json")["kinds"], args), "agent": agent}
    once(lambda: evaluation.write_results(results, args.out))
    once(lambda: bench_decode(args))
    print(evaluation.render(results))
    minutes = (time.monotonic() - began) / 60
    print(f"\n{args.out}/results.json and results.md written; {minutes:.1f} minutes in this run")
    once(lambda: print(evaluation.report_line(args.out)))


def assemble(scores, gap_kinds, args):
    """The stages' scores as results.json has them (one figure, its n and its interval side by side)."""
    lengths = ("short", "long")
    results = {"baselines": {length: scores["sft_short"][length]["baselines"] for length in lengths}}
    for stage, score in scores.items():
        results[stage] = {k: v for k, v in score.items() if k.startswith("loss")}
        results[stage] |= {length: evaluation.stage_figures(score[length]) for length in lengths if length in score}
    if "convert" in results:
        record = read_json(args.out / "convert" / "stage.json")
        results["convert"] |= {k: record[k] for k in ("cache_ratio", "inherits", "attn", "cache_share")}
    # The share of the student-teacher gap that OPD closes: on the test items of those kinds of question in which the
    # *training* pool showed a gap (choosing them on the test would count luck as progress).
    rows = [(length, row) for length in lengths for row in load_rows(args.data_dir / f"test_{length}.jsonl")
            if row.get("kind", row["task"]) in gap_kinds]
    before, after, best = (np.array([scores[stage][length]["items"][row["id"]] for length, row in rows])
                           for stage in ("rl", "opd", "teacher"))
    if len(rows) and (best - before).sum() > 0:
        pairs = np.stack([after - before, best - before], 1)
        results["opd"] |= {"gap_closed": float(pairs[:, 0].sum() / pairs[:, 1].sum()), "gap_closed_n": len(rows),
                           "gap_closed_ci": evaluation.interval(pairs, [evaluation.clip_of(row) for _, row in rows]),
                           "gap": float(pairs[:, 1].mean()), "gap_kinds": gap_kinds}
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to run").add_argument
    add("--stage", choices=["cpt", "sft", "rl", "opd"], help="one stage; without it the whole recipe, tiny")
    add("--phase", choices=["short", "long"], default="short", help="of --stage sft")
    add("--attn", choices=["m2la", "gqa", "released"], default="m2la",
        help="attention; gqa: without conversion; released: the authors' linear layer, which save_hf can write")
    add("--out", type=Path, help="run directory: a directory per stage, metrics, results (default runs/PRESET)")
    add("--init", help="start from this checkpoint directory, ours or Hugging Face's, instead of the stage before in "
                       "--out")
    add("--teacher", help="opd: teacher's directory (default: --out/teacher)")
    add("--show-sample", type=int, metavar="N", help="print N packed samples of the stage, the loss mask marked; exit")
    add("--preset", choices=list(SIDES), default="tiny", help="size of the whole recipe: tiny, or small for one GPU "
        "(frames of 224 pixels, 65 M parameters)")
    add("--base", choices=["shipped", "scratch"], help="where base and teacher come from (default: shipped, of tiny)")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", type=Path, metavar="F.jsonl", help="train on these files instead of the recipe's mix")
    add("--without", nargs="+", default=(), metavar="F.jsonl", help="leave files out of the recipe's mix")
    add("--max-frames", type=int, help="at most so many frames of a video (default: what the rows say)")
    add("--max-new", type=int, help="rl, opd: at most so many tokens of a sampled answer (default: 24; from 100 M "
        "parameters on 256)")
    add("--val", type=Path, metavar="F.jsonl", help="held-out rows, of cpt and of --eval-every (default: val.jsonl of "
        "--data-dir; cpt with --data: one video in twenty of it, which is not trained on)")
    add("--data-dir", type=Path, help="directory of the toy data (default: --out/data)")
    add("--scale", type=float, default=1.0, help="toy data: multiplies the number of videos")
    add = parser.add_argument_group("training").add_argument
    add("--eval-every", type=int, default=0, metavar="N", help="score held-out rows every N steps and at the end, keep "
        "the best in <stage>/best: by loss, in rl and opd by reward (default 0: never)")
    add("--steps", type=int, help="steps of the stage (default: the recipe's)")
    add("--lr", type=float, help="peak learning rate")
    add("--muon", type=float, help="learning rate of Muon for weight matrices (0: AdamW for everything)")
    add("--packs", type=int, help="videos per step")
    add("--branches", type=int, help="questions per video")
    add("--tokens", type=int, help="padded tokens of one forward; a larger step is accumulated")
    add("--kl", choices=["full", "sampled"], help="opd: reverse KL over the vocabulary (default) or, the paper's form, "
        "of sampled tokens")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--freeze", default="", help="parts that are not trained: vision,projector")
    add("--cache-share", type=float, default=0.5, help="conversion: cache bytes that are left of GQA's (default 0.5)")
    add("--max-damage", type=float, default=0.3, help="conversion: largest rise of the held-out loss, nats")
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--teacher-device", help="opd: where the teacher is, cpu, cuda or cuda:1 (default: --device)")
    add("--workers", type=int, default=0, help="processes that prepare training batches (default 0: in this one)")
    add("--jobs", type=int, help="processes that share each step (default: the CPU's cores, at most 4; with a GPU 1, "
                                 "there `torchrun --nproc_per_node=N train.py` starts them)")
    add("--fsdp", action="store_true", help="cpt, sft: spread weights, gradients, optimizer state over the processes")
    add("--save-every", type=float, default=20, help="seconds between checkpoints of a running stage")
    args = parser.parse_args()
    at_least = {0: "muon workers save_every seed eval_every", 2: "max_frames",            # frames come in pairs
                1: "steps packs branches tokens max_new jobs show_sample"}
    for least, names in at_least.items():
        for name in names.split():
            value = getattr(args, name)
            need(value is None or value >= least, f"--{name.replace('_', '-')} {value}: must be at least {least}")
    need(args.lr is None or 0 < args.lr < 1, f"--lr {args.lr}: must be between 0 and 1")
    need(0 < args.cache_share < 1, f"--cache-share {args.cache_share}: must be between 0 and 1")
    args.freeze = [part for part in args.freeze.split(",") if part]
    need(set(args.freeze) <= {"vision", "projector"}, f"--freeze {','.join(args.freeze)}: parts are vision, projector")
    devices = ["cpu", *["cuda"][:torch.cuda.device_count()], *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for name in ("device", "teacher_device"):
        need(getattr(args, name) in (*devices, None), f"--{name.replace('_', '-')} {getattr(args, name)}: PyTorch sees "
             f"{', '.join(devices)} here")
    args.base = args.base or ("shipped" if args.preset == "tiny" else "scratch")
    need(args.base == "scratch" or args.preset == "tiny", "--base shipped: is of --preset tiny")
    args.out = args.out or Path("runs") / args.preset
    args.data_dir = args.data_dir or args.out / "data"
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    stage = f"sft_{args.phase}" if args.stage == "sft" else args.stage
    need(not args.without or stage and not args.data, "--without: leaves files out of a --stage's own mix, not --data")
    need(args.eval_every or stage == "cpt" or not args.val, "--val: is for --stage cpt and for --eval-every N")
    if args.show_sample:
        need(stage, "--show-sample: needs --stage")
        return show_samples(stage, args)
    need(not args.fsdp or stage in ("cpt", "sft_short", "sft_long"), "--fsdp: for --stage cpt or sft; rl and opd "
         "sample answers, which needs all weights at each token")
    need(stage or not (args.eval_every or args.init), "--eval-every and --init: need --stage")
    if args.eval_every:
        val_rows(args, stage, TINY[stage])           # a mistake in it speaks now, not after the conversion
    need(not (args.fsdp and args.eval_every), "--fsdp: without --eval-every; score the finished stage with eval.py")
    jobs = args.jobs or (min(4, os.cpu_count()) if args.device == "cpu" else 1)
    packs = args.packs or min(TINY[name].packs for name in ([stage] if stage else TINY))
    count = int(os.environ.get("WORLD_SIZE", jobs))
    need(packs >= count, f"--packs {packs}: fewer videos a step than the {count} processes; lower --jobs")
    args.out.mkdir(parents=True, exist_ok=True)
    evaluation.join_processes(jobs, args.device)
    if stage is None:
        whole_recipe(args)
    else:
        run_stage(stage, args)


if __name__ == "__main__":
    run_cli(main)
