"""The training recipe of InternVideo3 (§3.3, §4): four stages in one script.

    python train.py                                   # the whole recipe on the toy world, tiny, a laptop CPU is enough
    python train.py --stage sft --phase long          # one stage; it starts from the stage before it in --out
    python train.py --stage rl --init DIR --data F.jsonl --out runs/mine

Reading order: recipe → data (rows → packs → batches) → losses → the loop and its checkpoints → the stages
(supervised, conversion, GSPO, on-policy distillation) → the chain of stages.

Where this differs from the paper, and why:
 1. Sizes. The paper trains 8 B parameters on 16 M + 7 M samples; the default here is 2 M parameters on a toy world.
 2. Several questions about one video share its tokens (a tree-shaped attention mask). The loss is the same as of
    separate samples; the video is encoded once. In RL the sampled answers to a question share its tokens too.
 3. GSPO: old log-probabilities are recomputed in fp32 by the trainer (GSPO's clip range 3e-4 is far below bf16 noise;
    the tiny recipe's is ten times as wide, its answers have three to eight tokens); advantages are divided by
    (std + 1e-4) as in TRL; zero-spread groups carry no gradient and are counted.
 4. OPD uses the reverse KL over the full vocabulary at each position of the student's own sample, which is the exact
    expectation of the paper's one-sample form; the teacher is a longer-trained GQA model of the same vocabulary.
 5. Replay: SFT keeps a share of the earlier stages' data, OPD trains on SFT data beside its own samples. A tiny model
    forgets a format within two minutes.
 6. With several processes each step is shared by hand: gradients are summed after the backward pass.
"""
import argparse
import itertools
import json
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")            # before torch: threads that spin starve other processes

import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
from eval import gather, once, rank, world
from iv3 import (Encoded, MediaError, UserError, build_model, find_model, generate, load_model, load_rows, run_cli,
                 save_model, write_atomic)
from m2la import Blocks, Calibration, ConvertSpec, convert_layers

TOY = Path(__file__).parent / "data" / "toy"


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
    clip: tuple = (3e-4, 4e-4)               # RL: GSPO's clip range of the sequence ratio, below and above 1
    kl: float = 0.03                         # RL: weight of the KL to the SFT model
    muon: float = 0.0                        # learning rate of Muon for weight matrices; 0: AdamW for everything
    freeze: tuple = ()                       # "vision", "projector": parts that are not trained
    pool: int = 2400                         # RL, OPD: prompts that the filter looks at
    replay: dict = field(default_factory=dict)    # OPD: file → packs a step of SFT data, trained beside: keeps the rest


# The paper's shares of CPT tokens are text 27 %, image-text 30 %, video-caption 43 %. Here as shares of packs: an image
# pack has about 25 tokens, a text or a video pack of 8 samples about 280.
CPT_MIX = {"cpt_text.jsonl": 0.07, "cpt_image.jsonl": 0.80, "cpt_video.jsonl": 0.13}
CALIBRATION_MIX = {"cpt_text.jsonl": 0.1, "cpt_image.jsonl": 0.1, "cpt_video.jsonl": 0.8}     # distances matter
TINY = {
    "cpt": Recipe(CPT_MIX, steps=90, lr=3e-4, lr_min=1e-5, packs=48),
    "sft_short": Recipe({"sft_short.jsonl": 0.7, "sft_agent.jsonl": 0.15, "cpt_text.jsonl": 0.1,
                         "cpt_image.jsonl": 0.05}, steps=360, lr=1e-3, lr_min=1e-4, muon=0.01, warmup=0.1, branches=12,
                        reduction="square"),
    "sft_long": Recipe({"sft_long.jsonl": 0.25, "sft_agent.jsonl": 0.45, "sft_short.jsonl": 0.25,
                        "cpt_text.jsonl": 0.05}, steps=180, lr=1e-3, lr_min=5e-5, muon=0.01, warmup=0.05, branches=20,
                       reduction="square"),
    "rl": Recipe({"rl.jsonl": 1.0}, steps=75, lr=1e-4, lr_min=2e-5, clip=(3e-3, 4e-3), kl=0.04, weight_decay=0.0,
                 packs=12, pool=5100),
    "opd": Recipe({"opd.jsonl": 1.0}, steps=210, lr=4e-4, lr_min=2e-5, weight_decay=0.0, branches=12, pool=4400,
                  replay={"sft_agent.jsonl": 1, "sft_short.jsonl": 1}),
}
PREVIOUS = {"cpt": "base", "sft_short": "cpt", "sft_long": "sft_short", "rl": "sft_long", "opd": "rl"}
# Half of the GQA cache: 2·kv_heads·head_dim = 128 values per token and layer → 32 shared RoPE + on average 32 latent.
CONVERT = ConvertSpec(rope_width=32, ranks=(32, 32), step=8)


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
    prefix = min(ends)                                     # the longest common prefix; the token before an answer
    for s in samples[1:]:                                  # stays in its branch, which has to predict from it
        n = min(prefix, len(s.ids))
        differ = (first[:n] != s.ids[:n]).nonzero()
        prefix = int(differ[0]) if len(differ) else n
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
    B, T, count = len(packs), max(len(p.ids) for p in packs), 0
    ids, positions = torch.zeros(B, T, dtype=torch.long), torch.zeros(3, B, T, dtype=torch.long)
    answer, parent = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.long)
    branch, sample = torch.full((B, T), -1), torch.full((B, T), -1)
    for b, p in enumerate(packs):
        n = len(p.ids)
        ids[b, :n], positions[:, b, :n], answer[b, :n] = p.ids, p.positions, p.answer
        branch[b, :n], parent[b, :n] = p.branch, p.parent
        sample[b, :n] = torch.where(p.sample >= 0, p.sample + count, -1)
        count += p.count
    key = branch[:, None, :]
    same = (key == 0) | (key == branch[:, :, None]) | (key == parent[:, :, None])
    mask = (same & torch.ones(T, T, dtype=torch.bool).tril())[:, None]
    head = int((branch == 0).sum(1).max())
    blocks = [(0, head, 0, 0)] if head else []
    root, size = torch.where(parent > 0, parent, branch), max(BLOCK, T // 16)
    for start in range(head, T, size):                     # the branches at its start begin at `low` or later
        low = int((root == root[:, start:start + 1]).int().argmax(1).min())
        blocks.append((start, min(start + size, T), head, max(low, head)))
    batch = {"ids": ids, "positions": positions, "answer": answer, "sample": sample, "valid": branch >= 0,
             "mask": Blocks(mask, blocks),
             "patches": torch.cat([p.patches for p in packs]), "grids": torch.cat([p.grids for p in packs])}
    if packs[0].advantage is not None:
        batch["advantage"] = torch.cat([p.advantage for p in packs])
    return batch


def micro_batches(packs, tokens):
    """Split a step's packs, sorted by length, into batches of at most `tokens` padded tokens."""
    batches, current = [], []
    if not packs:
        return batches
    for p in sorted(packs, key=lambda p: len(p.ids)):
        if current and len(p.ids) * (len(current) + 1) > tokens:
            batches.append(collate_packs(current))
            current = []
        current.append(p)
    return batches + [collate_packs(current)]


class Data:
    """Draws packs from the JSONL files of a mix. What step n gets depends only on (seed, stage, n): a resumed run
    continues exactly, and steps can be prepared by several processes. Unreadable videos are skipped and counted."""

    def __init__(self, directory, mix, processor, vision_ids, seed, stage, steps=1):
        self.processor, self.vision_ids, self.seed, self.skipped = processor, vision_ids, [seed, *stage.encode()], {}
        self.groups, self.shares = [], []
        for name, share in mix.items():
            path = Path(name) if Path(name).is_file() else Path(directory) / name
            groups = defaultdict(list)
            for row in load_rows(path):
                media = first_media(row)
                groups[json.dumps(media) if media else len(groups) // 8].append(row)     # text alone: any 8 together
            self.groups.append((path.parent, list(groups.values())))
            self.shares.append(share if isinstance(share, tuple) else (share, share))
        self.steps = steps

    def only(self, tasks):
        for i, (root, groups) in enumerate(self.groups):
            groups = [[row for row in rows if row["task"] in tasks] for rows in groups]
            self.groups[i] = root, [rows for rows in groups if rows]
        if not all(groups for _, groups in self.groups):
            raise UserError(f"--data: this stage needs rows of the tasks {', '.join(tasks)} in each file")

    def step(self, step, packs, branches):
        """→ list of (rows, root): `packs` groups of up to `branches` rows about one video, this process's share."""
        rng, out = np.random.default_rng([*self.seed, step]), []
        shares = np.array([a + (b - a) * step / self.steps for a, b in self.shares])
        for f in rng.choice(len(self.groups), packs, p=shares / shares.sum()):
            root, groups = self.groups[f]
            weight = np.sqrt([len(rows) for rows in groups])                  # a lone row is not worth a whole pack
            rows = groups[rng.choice(len(groups), p=weight / weight.sum())]
            out.append(([rows[i] for i in rng.permutation(len(rows))[:branches]], root))
        return out[rank()::world()]

    def encode(self, rows, root, **options):
        """Rows → list of Encoded, or None when their video cannot be read (counted in `skipped`)."""
        try:
            return [self.processor.encode(row["messages"], root, **options) for row in rows]
        except MediaError as e:
            self.skipped[str(e)] = self.skipped.get(str(e), 0) + 1
            return None

    def pack(self, rows, samples, root, group=1):
        media = first_media(rows[0])
        shared = 0
        if media:
            patches, grid, *_ = self.processor.load(media, root)
            shared = len(patches) // (grid[0] * grid[1])
        return make_pack(samples, shared, self.vision_ids, group)

    def batches(self, step, recipe):
        """The supervised batches of one step."""
        drawn = [(rows, self.encode(rows, root), root) for rows, root in self.step(step, recipe.packs, recipe.branches)]
        packs = [self.pack(rows, samples, root) for rows, samples, root in drawn if samples]
        if not packs and world() == 1:                                # of several processes, one may have bad luck
            raise UserError(f"no readable video in step {step}: {next(iter(self.skipped))}")
        return micro_batches(packs, recipe.tokens)


def first_media(row):
    """The first image or video item of a row, or None."""
    items = (item for m in row["messages"] if not isinstance(m["content"], str) for item in m["content"])
    return next((item for item in items if item["type"] != "text"), None)


class Loader(torch.utils.data.Dataset):
    """Step → its batches, so that PyTorch's DataLoader can prepare steps in worker processes (`--workers`)."""

    def __init__(self, data, recipe, first):
        self.data, self.recipe, self.first = data, recipe, first

    def __len__(self):
        return self.recipe.steps - self.first

    def __getitem__(self, i):
        torch.set_num_threads(1)
        return self.data.batches(self.first + i, self.recipe)


# ----------------------------------------------------------------------------------------------------------- losses

def answer_logits(model, batch):
    """One packed forward → logits (n,V) that predict the n answer tokens, these tokens (n,), their conversation (n,)"""
    hidden = model(batch["ids"], batch["positions"], batch["patches"], batch["grids"], mask=batch["mask"])     # (B,T,D)
    target = batch["answer"][:, 1:]
    return model.logits(hidden[:, :-1][target]).float(), batch["ids"][:, 1:][target], batch["sample"][:, 1:][target]


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


# ----------------------------------------------------------------------------------------------------------- the loop

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): Nesterov momentum, each matrix made orthogonal by five Newton-Schulz steps.

        X ← X / ‖X‖,  then five times  X ← a X + (b G + c G²) X,  G = X Xᵀ        all singular values go to about 1

    torch.optim.Muon (2.9 on) takes these steps in bf16 alone: on a CPU without bf16 arithmetic, that is most laptops, six
    seconds for the tiny model where fp32 takes 0.1."""

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(average, group["momentum"])
                tall = p.shape[0] / p.shape[1]
                x = x.mT if tall > 1 else x                                  # G of the shorter side
                x = x / x.norm().clamp_min(1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(x.mT if tall > 1 else x, alpha=group["lr"] * max(1, tall) ** 0.5)


def optimizers(model, recipe):
    """AdamW; with recipe.muon, Muon for the weight matrices inside the blocks (it learns the toy's shapes about four
    times faster) and AdamW for the rest: embeddings, projector, norms, biases."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if recipe.muon and p.dim() == 2 and ("layers." in n or "blocks." in n)]
    rest = [p for _, p in named if not any(p is q for q in matrices)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": recipe.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    out = [torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=(0.9, 0.98), fused=True)]
    if matrices:
        out.append(Muon(matrices, recipe.muon, recipe.weight_decay))
    return out


class Trainer:
    """Optimizer, schedule, checkpoints and logging of one stage; the stage itself is `fit`'s argument.

    A killed run resumes exactly: everything random in step n is seeded by (seed, stage, n), and state.pt holds weights,
    optimizer and the next step. A stage's directory gets its config.json only when the stage is complete."""

    def __init__(self, model, processor, recipe, stage, args, inherits=None):
        self.model, self.recipe, self.stage, self.args, self.inherits = model, recipe, stage, args, inherits
        self.tokenizer = processor.tokenizer
        self.settings = repr((recipe, args.seed, str(inherits)))           # a resumed run must have the same
        self.directory, self.metrics = args.out / stage, args.out / "metrics.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)
        model.requires_grad_(True)
        parts = {"vision": (model.visual.blocks, model.visual.patch_embed, model.visual.pos_embed),
                 "projector": (model.visual.merger, model.visual.deepstack_merger_list)}
        for part in {*recipe.freeze, *args.freeze}:
            for module in parts[part]:
                module.requires_grad_(False)
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
        for batch, loss_of, weight in jobs:
            with self.autocast():
                loss = loss_of(self.to_device(batch)) * weight
            loss.backward()
            total += float(loss.detach())
        if world() > 1:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
            flat = torch.cat([g.flatten() for g in grads])
            dist.all_reduce(flat)
            for p, part in zip(self.parameters, flat.split([g.numel() for g in grads])):
                p.grad = part.view_as(p)
            total = sum(gather(total))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if torch.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return total

    def supervised(self, batches):
        """Jobs for `update`: answer cross-entropy, each token weighted by the recipe's reduction (§4). A batch counts
        by its share of the weights of all processes: packing and processes do not change the loss."""
        reduction = self.recipe.reduction

        def loss_of(batch):
            logits, token, sample = answer_logits(self.model, batch)
            weight = sft_weights(sample, reduction)
            return (F.cross_entropy(logits, token, reduction="none") * weight).sum() / weight.sum()
        totals = [float(sft_weights(b["sample"][:, 1:][b["answer"][:, 1:]], reduction).sum()) for b in batches]
        whole = sum(gather(sum(totals)))
        if not whole:
            raise UserError(f"{self.stage}: no process found a readable video; see what --jobs 1 says")
        return [(batch, loss_of, total / whole) for batch, total in zip(batches, totals)]

    def fit(self, step_of, finish=lambda: None):
        """Run step_of(step) → dict of figures ("loss" and "tokens" among them) for every step; finish(); save."""
        state_file, first, seen = self.directory / "state.pt", 0, 0
        if state_file.is_file():
            state = torch.load(state_file, map_location=self.args.device, weights_only=True)
            if state["settings"] != self.settings:
                raise UserError(f"{state_file}: was written with other settings; use those or delete {self.directory}")
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            first, seen = state["step"], state["tokens"]
            print(f"{self.stage}: resuming at step {first} of {self.recipe.steps}")
        once(lambda: self._cut_metrics(first))
        steps = self.recipe.steps
        bar = tqdm(range(first, steps), f"{self.stage:>9}", steps, initial=first, mininterval=1)
        saved, began = time.monotonic(), time.monotonic()
        self.model.train()
        for step in bar:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * self.lr(step) / self.recipe.lr
            shares = gather(step_of(step))
            figures = {k: float(np.mean([share[k] for share in shares])) for k in shares[0]}
            figures["tokens"] = sum(share["tokens"] for share in shares)
            seen += figures["tokens"]
            figures = {"stage": self.stage, "step": step, "lr": self.lr(step), **figures}
            if not math.isfinite(figures["loss"]):
                raise UserError(f"{self.stage}: the loss is {figures['loss']} at step {step}; lower --lr")
            if rank() == 0:
                with open(self.metrics, "a") as f:
                    f.write(json.dumps(figures) + "\n")
            shown = {k: f"{v:.3f}" for k, v in figures.items() if isinstance(v, float) and k != "lr"}
            bar.set_postfix(shown, refresh=False)
            if rank() == 0 and time.monotonic() - saved > self.args.save_every:
                self._save_state(step + 1, seen)
                saved = time.monotonic()
        seconds = time.monotonic() - began
        finish()
        done = {"stage": self.stage, "inherits": str(self.inherits), "seed": self.args.seed, "tokens": seen,
                "seconds": round(seconds, 1), "processes": world(), "recipe": asdict(self.recipe)}

        def leave():
            save_model(self.directory, self.model, self.tokenizer)
            (self.directory / "stage.json").write_text(json.dumps(done, indent=1))
            state_file.unlink(missing_ok=True)
        once(leave)
        self.model.eval()

    def _save_state(self, step, tokens):
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                 "step": step, "tokens": tokens, "settings": self.settings}
        write_atomic(self.directory / "state.pt", lambda p: torch.save(state, p))

    def _cut_metrics(self, first):
        """Lines that a killed run wrote after its last checkpoint are written again: drop them."""
        if self.metrics.is_file():
            lines = [line for line in self.metrics.read_text().splitlines() if line.endswith("}")]      # none torn
            lines = [line for line in lines if (x := json.loads(line))["stage"] != self.stage or x["step"] < first]
            write_atomic(self.metrics, lambda p: p.write_text("".join(line + "\n" for line in lines)))


# ------------------------------------------------------------------------------------------------------- the stages

def train_supervised(trainer, data):
    """cpt, sft: next token on the answers."""
    loader = None
    if trainer.args.workers:
        state = trainer.directory / "state.pt"
        first = torch.load(state, weights_only=True)["step"] if state.is_file() else 0
        loader = iter(torch.utils.data.DataLoader(Loader(data, trainer.recipe, first), batch_size=None,
                                                  num_workers=trainer.args.workers, prefetch_factor=4))

    def step_of(step):
        batches = next(loader) if loader else data.batches(step, trainer.recipe)
        loss = trainer.update(trainer.supervised(batches))
        return {"loss": loss, "tokens": int(sum(b["valid"].sum() for b in batches))}
    trainer.fit(step_of)


@torch.no_grad()
def convert(model, data, args, recipe, spec=CONVERT, steps=4):
    """GQA → M²LA (§3.2): stream moments over `steps` training steps, give each layer and modality its rank by the
    damage that cutting it does to some more samples, rebuild the attention; heal it on others if that is not enough
    (`ConvertSpec.tolerance`). → cached values, relative to GQA's"""
    layers = model.language_model.layers
    with Calibration([layer.self_attn for layer in layers]) as calibration:
        for step in tqdm(range(steps), desc="  convert"):
            for batch in data.batches(step, replace(recipe, packs=32)):
                batch = {k: v.to(args.device) for k, v in batch.items()}
                calibration.valid = batch["valid"]
                model(batch["ids"], batch["positions"], batch["patches"], batch["grids"], mask=batch["mask"])
    for moments in calibration.moments if world() > 1 else ():           # sums: every process saw a share of the data
        for tensor in vars(moments).values():
            dist.all_reduce(tensor)
    samples = [samples for rows, root in data.step(steps, 32, 8) if (samples := data.encode(rows, root))]
    own_damage = evaluation.divergence(model, samples)

    def batches():                                                       # drawn only if they are needed
        for step in itertools.count(steps + 1):
            if batch := sum((data.encode(*drawn) or [] for drawn in data.step(step, 2 * world(), 8)), []):
                yield batch
    spec = convert_layers(layers, calibration.moments, spec, lambda: float(np.mean(gather(own_damage()))),
                          lambda batch: evaluation.answer_logp(model, batch), batches())
    ranks = tuple(spec.layer_ranks(i) for i in range(len(layers)))
    model.cfg = replace(model.cfg, attn="m2la", rope_width=spec.rope_width, ranks=ranks)
    return evaluation.cache_ratio(spec, calibration.modules, calibration.moments[0].count.tolist())


def complete(prompt, ids):
    """A prompt and the answer that was sampled for it → one conversation, the answer marked."""
    more = (prompt.next_position + torch.arange(len(ids))).expand(3, -1)
    return Encoded(torch.cat([prompt.ids, torch.tensor(ids)]), torch.cat([prompt.positions, more], 1), prompt.patches,
                   prompt.grids, torch.arange(len(prompt.ids) + len(ids)) >= len(prompt.ids))


def rollout(trainer, data, drawn, samples, generator, temperature, model=None):
    """Sample answers of the trained model (or of `model`). → rows, prompts, generations (row-major), roots"""
    rows, prompts, roots = [], [], []
    for group, root in drawn:
        encoded = data.encode([{**row, "messages": row["messages"][:-1]} for row in group], root, generation=True)
        if encoded:
            rows, prompts, roots = rows + group, prompts + encoded, roots + [root] * len(group)
    stop = trainer.tokenizer.token_id("<|im_end|>")
    if not rows:
        raise UserError(f"{trainer.stage}: no readable video among {len(drawn)}: {next(iter(data.skipped))}")
    with trainer.autocast():
        outs = generate(model or trainer.model, prompts, stop, 24, temperature, samples, generator)
    return rows, prompts, outs, roots


def packs_of(data, rows, samples, roots, per_row):
    """Pack completed conversations of neighbouring rows that share their video."""
    packs, start = [], 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (first_media(rows[end]), roots[end]) != (first_media(rows[start]), roots[start]):
            packs.append(data.pack(rows[start:end], samples[start * per_row:end * per_row], roots[start], per_row))
            start = end
    return packs


@torch.no_grad()
def judged(data, trainer, judge):
    """judge(number, packs) → a list, for all packs of the pool, shared by the processes; the lists joined."""
    chunks = list(enumerate(chunked(pool_of(data, trainer.recipe.pool, trainer.args.seed), 8)))[rank()::world()]
    own = [verdict for number, chunk in tqdm(chunks, desc="   filter") for verdict in judge(number, chunk)]
    return sorted(sum(gather(own), []))


def keep_rows(trainer, data, rule):
    """Run a data filter once per stage and remember which rows it keeps (a resumed run reads the list)."""
    path = trainer.directory / "kept.json"
    if not (path.is_file() and (trainer.directory / "state.pt").is_file()):
        kept = rule()
        if not kept["keep"]:
            raise UserError(f"{trainer.stage}: the data filter kept none of {kept['looked_at']} prompts; the model is "
                            "too weak or too strong for this data")
        once(lambda: write_atomic(path, lambda p: p.write_text(json.dumps(kept))))
    kept = json.loads(path.read_text())
    ids = set(kept["keep"])
    for i, (root, groups) in enumerate(data.groups):
        groups = [[row for row in rows if row["id"] in ids] for rows in groups]
        data.groups[i] = root, [rows for rows in groups if rows]
    print(f"{trainer.stage}: {kept['note']}")


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
            rows, _, outs, _ = rollout(trainer, data, chunk, 4, trainer.generator(10 ** 6 + number), r.temperature)
            for k, row in enumerate(rows):
                reward = np.mean([evaluation.reward(o.text(trainer.tokenizer), row) for o in outs[4 * k:4 * k + 4]])
                low, high = (0.1, 0.7) if row["task"] == "grounding" else (0.01, 0.99)
                yield row["id"], bool(low <= reward <= high)
        verdicts = judged(data, trainer, judge)
        keep = [row for row, good in verdicts if good]
        note = f"kept {len(keep)} of {len(verdicts)} prompts (IoU in [0.1, 0.7], mixed answers)"
        return {"keep": keep, "looked_at": len(verdicts), "note": note}
    keep_rows(trainer, data, rule)

    def step_of(step):
        trainer.model.eval()
        drawn, generator = data.step(step, r.packs, r.branches), trainer.generator(step)
        rows, prompts, outs, roots = rollout(trainer, data, drawn, G, generator, r.temperature)
        rewards = torch.tensor([evaluation.reward(o.text(trainer.tokenizer), rows[i // G]) for i, o in enumerate(outs)])
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
        logs = [(0.0, 0.0)]
        trainer.model.train()

        def loss_of(batch):
            logp, sample = token_logp(trainer.model, batch)
            old = batch.get("old", logp.detach())
            loss, k3, share = gspo_loss(logp, old, batch["ref"], sample, batch["advantage"], r.clip, r.kl)
            logs.append((float(k3.detach()), float(share)))
            return loss
        for batches in minis:
            whole = sum(gather(sum(len(b["advantage"]) for b in batches)))
            if whole:
                jobs = [(batch, loss_of, len(batch["advantage"]) / whole) for batch in batches]
                figures["loss"] += trainer.update(jobs) / r.updates
        figures["kl"], figures["clipped"] = np.mean(logs, 0).tolist()
        return figures
    trainer.fit(step_of)


def token_logp(model, batch):
    """→ fp32 log π of each answer token (n,), its conversation (n,)."""
    logits, token, sample = answer_logits(model, batch)
    return logits.log_softmax(-1).gather(-1, token[:, None])[:, 0], sample


def train_opd(trainer, data, teacher_dir, replay=None):
    """On-policy distillation: the student samples, the teacher judges every token of the sample by reverse KL:

        L = mean_i 1/|y_i| Σ_t KL( π(· | x_i, y_i,<t) ‖ π_T(· | x_i, y_i,<t) ),   y_i ~ π

    Each sample counts the same, as in the paper's mean_t. A mean over all tokens would leave short answers unheard: a
    span has more tokens than the name of a colour, and more nats on each (it cost 4 points of multiple choice)."""
    r = trainer.recipe
    teacher, processor = load_model(teacher_dir, trainer.args.device)
    if processor.tokenizer.tokens != trainer.tokenizer.tokens:
        raise UserError(f"--teacher {teacher_dir}: its vocabulary differs from the student's; OPD compares by token")
    teacher.requires_grad_(False)

    def rule():
        """§4: rows that the teacher gets right, or clearly better, and the student does not; and half as many others.
        Notes too in which kinds of question the teacher is ahead: that is where the test looks for the gap."""
        def judge(number, chunk):
            rewards = []
            for model in (trainer.model, teacher):
                rows, _, outs, _ = rollout(trainer, data, chunk, 1, None, 0.0, model)
                rewards.append([evaluation.reward(o.text(trainer.tokenizer), row) for o, row in zip(outs, rows)])
            for row, student, best in zip(rows, *rewards):
                yield row["id"], row.get("kind", row["task"]), best - student
        verdicts, kinds = judged(data, trainer, judge), defaultdict(list)
        for _, kind, ahead in verdicts:
            kinds[kind].append(ahead)
        gap, rest = ([row for row, _, ahead in verdicts if (ahead > 0.1) == wanted] for wanted in (True, False))
        others = np.random.default_rng(trainer.args.seed).permutation(rest)[:len(gap) // 2].tolist()
        note = f"kept {len(gap)} of {len(verdicts)} prompts where the teacher is better, and {len(others)} others"
        return {"keep": gap + others, "looked_at": len(verdicts), "note": note,
                "kinds": sorted(kind for kind, ahead in kinds.items() if np.mean(ahead) > 0.05)}
    keep_rows(trainer, data, rule)

    def step_of(step):
        trainer.model.eval()
        drawn, generator = data.step(step, r.packs, r.branches), trainer.generator(step)
        rows, prompts, outs, roots = rollout(trainer, data, drawn, 1, generator, r.temperature)
        packs = packs_of(data, rows, [complete(p, o.ids) for p, o in zip(prompts, outs)], roots, 1)
        batches = micro_batches(packs, r.tokens)
        trainer.model.train()

        def loss_of(batch):
            with torch.no_grad():
                target = answer_logits(teacher, batch)[0]
            logits, _, sample = answer_logits(trainer.model, batch)
            return sequence_mean(reverse_kl(logits, target), sample, count_of(batch)).mean()
        whole = sum(gather(sum(map(count_of, batches))))
        jobs = [(batch, loss_of, count_of(batch) / whole) for batch in batches]
        if replay:
            count = sum(r.replay.values())
            old = trainer.supervised(replay.batches(step, replace(r, packs=count)))
            jobs += [(batch, loss, share * count / r.packs) for batch, loss, share in old]
        return {"loss": trainer.update(jobs), "tokens": int(sum(b["valid"].sum() for b in batches))}
    trainer.fit(step_of)


def chunked(items, size):
    return [items[i:i + size] for i in range(0, len(items), size)]


# ------------------------------------------------------------------------------------------------- chain and command

def recipe_of(stage, args):
    """The stage's recipe with the command's overrides."""
    recipe = TINY[stage]
    flags = ("steps", "lr", "muon", "packs", "branches", "tokens")
    changes = {k: getattr(args, k) for k in flags if getattr(args, k) is not None}
    if args.data:
        changes |= {"mix": {str(path): 1.0 for path in args.data}, "replay": {}}
    return replace(recipe, **changes)


def start_of(stage, args):
    """The checkpoint a stage begins with: --init, or the one that the stage before left in --out."""
    if args.init:
        return find_model(args.init)
    previous = PREVIOUS[stage]
    if stage == "cpt" and args.attn == "m2la" and (args.out / "convert" / "config.json").is_file():
        previous = "convert"
    if not (args.out / previous / "config.json").is_file():
        raise UserError(f"{args.out}: has no finished '{previous}' for '{stage}'; run it first or give --init DIR")
    return args.out / previous


def run_stage(stage, args):
    """Train one stage and leave its checkpoint in --out/<stage>."""
    recipe = recipe_of(stage, args)
    if recipe.packs < world():
        raise UserError(f"--packs {recipe.packs}: fewer videos a step than the {world()} processes; lower --jobs")
    start = start_of(stage, args)
    model, processor = load_model(start, args.device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{stage}: starts from {start} ({model.cfg.attn}, {size:.2f} M parameters)")

    if stage == "cpt" and args.attn == "m2la" and model.cfg.attn == "gqa":
        convert_stage(model, processor, args)
    elif model.cfg.attn != args.attn:
        kind = model.cfg.attn
        raise UserError(f"{start}: its attention is {kind}; run --stage cpt first or give --attn {kind}")
    trainer = Trainer(model, processor, recipe, stage, args, start)
    stage_data = Data(args.data_dir, recipe.mix, processor, model.vision_ids, args.seed, stage, recipe.steps)
    if stage in ("rl", "opd"):                           # their rewards are rules for these two tasks
        stage_data.only(("mcq", "grounding"))
    if stage == "rl":
        train_rl(trainer, stage_data)
    elif stage == "opd":
        teacher = find_model(args.teacher or args.out / "teacher")
        replay = recipe.replay and Data(args.data_dir, recipe.replay, processor, model.vision_ids, args.seed, "replay")
        train_opd(trainer, stage_data, teacher, replay)
    else:
        train_supervised(trainer, stage_data)
    if stage_data.skipped:
        count, first = sum(stage_data.skipped.values()), next(iter(stage_data.skipped))
        print(f"{stage}: skipped {count} draws of unreadable videos; first: {first}")
    return model, processor


def convert_stage(model, processor, args):
    """GQA → M²LA into --out/convert, with the held-out loss before and after; a broken conversion stops here."""
    data = Data(args.data_dir, CALIBRATION_MIX, processor, model.vision_ids, args.seed, "convert")
    rows = load_rows(args.data_dir / "val.jsonl")

    def held_out():
        return evaluation.held_out_loss(model, processor, rows, args.data_dir)[0]
    before = held_out()
    ratio = convert(model, data, args, TINY["cpt"])
    after = held_out()
    print(f"convert: {ratio:.0%} of the cache, ranks (text, vision) {' '.join(map(str, model.cfg.ranks))}; "
          f"held-out loss {before:.4f} → {after:.4f} nats")
    if not after < before + args.max_damage:
        raise UserError(f"convert: the held-out loss rose by {after - before:.3f} nats, more than --max-damage "
                        f"{args.max_damage}; calibrate on more data or raise the ranks")

    def leave():
        save_model(args.out / "convert", model, processor.tokenizer)
        (args.out / "convert" / "stage.json").write_text(json.dumps({"cache_ratio": ratio}))
    once(leave)


def toy(script, out, args, *flags):
    """Run data/toy/prepare.py (real .mp4 files and JSONL) or pretrain.py (the tiny base and the teacher)."""
    command = [sys.executable, TOY / script, "--out", out, "--seed", args.seed, *flags]
    alone = {k: v for k, v in os.environ.items() if k != "RANK"}         # it starts processes of its own
    if code := subprocess.run(list(map(str, command)), env=alone).returncode:
        sys.exit(code)                                                   # it has said why


def copy_shipped(out):
    """The shipped base and teacher as stages of this run; --base scratch trains them instead (an hour on 2 cores)."""
    for name in ("base", "teacher"):
        if not (out / name / "config.json").is_file():
            shutil.copytree(TOY / "weights" / name, out / f"{name}.tmp", dirs_exist_ok=True)
            os.replace(out / f"{name}.tmp", out / name)


def scores_of(stage, args):
    """Test scores of a finished stage: {short, long, loss}; measured once and kept beside its weights."""
    path = args.out / stage / "scores.json"
    if not path.is_file():
        model, processor = load_model(args.out / stage, args.device)
        rows = load_rows(args.data_dir / "val.jsonl")
        loss, table = evaluation.held_out_loss(model, processor, rows, args.data_dir, name=f"{stage} loss")
        clips = [evaluation.clip_of(r) for r in rows]
        scores = {"loss": loss, "loss_n": len(rows), "loss_ci": evaluation.interval(table, clips)}
        if stage not in ("base", "convert", "cpt"):
            for length in ("short", "long"):
                test, train = (args.data_dir / f"{name}_{length}.jsonl" for name in ("test", "sft"))
                scores[length] = evaluation.evaluate(model, processor, test, train, seed=args.seed,
                                                     blind=stage == "sft_short", model_dir=args.out / stage)
        once(lambda: write_atomic(path, lambda p: p.write_text(json.dumps(scores))))
    return json.loads(path.read_text())


def whole_recipe(args):
    """Every stage in order, each evaluated on test items that no stage has seen; ends with the table."""
    began = time.monotonic()
    once(lambda: toy("prepare.py", args.data_dir, args, "--scale", args.scale))
    once(lambda: copy_shipped(args.out) if args.base == "shipped" else toy("pretrain.py", args.out, args))
    scores = {"base": scores_of("base", args)}
    for stage in ("cpt", "sft_short", "sft_long", "rl", "opd"):
        if not (args.out / stage / "config.json").is_file():
            run_stage(stage, args)
        if stage == "cpt":
            scores["convert"] = scores_of("convert", args)
        scores[stage] = scores_of(stage, args)
    scores["teacher"] = scores_of("teacher", args)
    agent_file = args.out / "opd" / "agent.json"
    if not agent_file.is_file():
        rows = load_rows(args.data_dir / "test_agent.jsonl")
        agent = evaluation.evaluate_agent(*load_model(args.out / "opd"), rows, args.data_dir, seed=args.seed)
        once(lambda: write_atomic(agent_file, lambda p: p.write_text(json.dumps(agent))))
    results = assemble(scores, json.loads((args.out / "opd" / "kept.json").read_text())["kinds"], args)
    results["agent"] = json.loads(agent_file.read_text())
    once(lambda: evaluation.write_results(results, args.out))
    evaluation.print_table(results)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{args.out}/results.json and results.md written; {minutes:.1f} minutes in this run")


def assemble(scores, gap_kinds, args):
    """The stages' scores as results.json has them (one figure, its n and its interval side by side)."""
    lengths = ("short", "long")
    results = {"baselines": {length: scores["sft_short"][length]["baselines"] for length in lengths}}
    for stage, score in scores.items():
        results[stage] = {k: v for k, v in score.items() if k.startswith("loss")}
        results[stage] |= {length: evaluation.stage_figures(score[length]) for length in lengths if length in score}
    results["convert"] |= json.loads((args.out / "convert" / "stage.json").read_text())
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
    add("--attn", choices=["m2la", "gqa"], default="m2la", help="attention; gqa: without conversion")
    add("--out", type=Path, default=Path("runs/tiny"), help="run directory: a directory per stage, metrics, results")
    add("--init", help="start from this checkpoint directory instead of the stage before in --out")
    add("--teacher", help="opd: teacher's directory (default: --out/teacher)")
    add("--base", choices=["shipped", "scratch"], default="shipped", help="where base and teacher come from")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", type=Path, metavar="F.jsonl", help="train on these files instead of the recipe's mix")
    add("--data-dir", type=Path, help="directory of the toy data (default: --out/data)")
    add("--scale", type=float, default=1.0, help="toy data: multiplies the number of videos")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, help="steps of the stage (default: the recipe's)")
    add("--lr", type=float, help="peak learning rate")
    add("--muon", type=float, help="learning rate of Muon for weight matrices (0: AdamW for everything)")
    add("--packs", type=int, help="videos per step")
    add("--branches", type=int, help="questions per video")
    add("--tokens", type=int, help="padded tokens of one forward; a larger step is accumulated")
    add("--freeze", default="", help="parts that are not trained: vision,projector")
    add("--max-damage", type=float, default=0.3, help="conversion: largest rise of the held-out loss, nats")
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--workers", type=int, default=0, help="processes that prepare training batches (default 0: in this one)")
    add("--jobs", type=int, help="processes that share each step (default: the CPU's cores, at most 4; with a GPU 1, "
                                 "there `torchrun --nproc_per_node=N train.py` starts them)")
    add("--save-every", type=float, default=20, help="seconds between checkpoints of a running stage")
    args = parser.parse_args()
    for name in ("steps", "muon", "packs", "branches", "tokens", "jobs", "workers", "save_every", "seed"):
        least = 0 if name in ("muon", "workers", "save_every", "seed") else 1
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.lr is not None and not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr}: must be between 0 and 1")
    args.freeze = [part for part in args.freeze.split(",") if part]
    if set(args.freeze) - {"vision", "projector"}:
        raise UserError(f"--freeze {','.join(args.freeze)}: parts are vision, projector")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    args.data_dir = args.data_dir or args.out / "data"
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    evaluation.join_processes(args.jobs or (min(4, os.cpu_count()) if args.device == "cpu" else 1), args.device)
    if args.stage is None:
        whole_recipe(args)
    else:
        run_stage(f"sft_{args.phase}" if args.stage == "sft" else args.stage, args)


if __name__ == "__main__":
    run_cli(main)
