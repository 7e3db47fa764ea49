"""The training recipe of InternVideo3 (§3.3, §4): four stages in one script.

    python train.py                              # the whole recipe on the toy world; a laptop's CPU is enough
    python train.py --quick                      # all of it in five minutes, less of everything
    python train.py --stage sft --phase long     # one stage; it starts from the stage before it in --out
    python train.py --stage rl --init DIR --data F.jsonl --out runs/mine
    python train.py --stage cpt --init Qwen3-VL-2B-Instruct --data F.jsonl --out runs/mine   # Hugging Face's

Reading order: recipe and table of stages → data (rows → packs → batches) → losses → the stages' steps (CPT
and SFT, RL, OPD) → the loop → what stands apart from it (checkpoints, best so far, log, processes, FSDP,
optimizers) → the conversion that CPT begins with → the chain of stages → the whole recipe → the command.

Differs from the paper:
 1. Sizes. The paper trains 8 B parameters on 16 M + 7 M samples; the default here is 2 M on a toy world.
 2. Several questions about one video share its tokens (a tree-shaped attention mask). The loss is the same as
    of separate samples; the video is encoded once. In RL the answers to a question share its tokens too.
 3. The loss is on assistant tokens alone, also in CPT: its captions and texts are answers to a request here.
 4. Muon trains the weight matrices in SFT: it learns the toy's shapes about four times faster than AdamW.
    Not from 100 M parameters on.
 5. SFT long has longer videos and packs than SFT short, but 2 frames a second in both (the paper: 4 in the
    long phase): a second is the toy world's shortest event. `fps` in a row of your own data says otherwise;
    from 100 M parameters on the recipe has the paper's.
 6. GSPO: old log-probabilities are recomputed by the trainer, in the packs that it trains on, so that
    rounding is the same on both sides of the ratio; the output head is fp32. GSPO's clip range, 3e-4, is
    below bf16 noise; the tiny recipe's is ten times as wide, its answers have three to eight tokens.
    Advantages are divided by (std + 1e-4), the std of the group itself.
 7. RL: groups without a spread carry no gradient, neither of the reward nor of the KL; they are left out and
    counted. Beside IoU or correctness a tenth of a point is for an answer that a rule can read.
 8. OPD uses the reverse KL over the full vocabulary at each position of the student's own sample, which is
    the exact expectation of the paper's one-sample form (`--kl-form sampled`). The teacher is a GQA model of
    the same vocabulary, trained longer, not a larger one.
 9. Prompts of RL and OPD are those whose answers a rule can judge (multiple choice, grounding), not captions.
    RL's filter asks four times; OPD keeps, beside the rows where the teacher is better, as many others.
10. Replay: SFT keeps a share of the earlier stages' data, OPD trains on SFT data beside its own samples. A
    tiny model forgets a format within two minutes.
11. With several processes each step is shared by hand: gradients are summed after the backward pass. `--fsdp`
    shards the weights; sequences are not split.
"""
import argparse
import ctypes
import hashlib
import itertools
import json
import math
import os
import re

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # before torch: threads that spin starve other processes

import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
from eval import command, gather, once, rank, world     # gather(x): of all processes; once(f): on the first
from iv3 import (PRESETS, Config, Encoded, MediaError, UserError, before_answers, build_model, check_flags,
                 clip_of, collate, exact_logits, find_model, first_media, framed, generate, load_model,
                 load_rows, need, read_json, run_cli, save_model, write_atomic)
from m2la import FOLDABLE, Blocks, cache_ratio, calibrate, convert_layers, divergence, spec_of


# --------------------------------------------------------------------------------- recipe and table of stages

@dataclass
class Recipe:
    """The settings of one stage. A pack is one video with up to `branches` conversations about it. The
    learning rate warms up over `warmup` of the steps, then follows a cosine to `lr_min`."""
    mix: dict                        # file of the data directory → its share of packs: one number, or a pair
                                     # (at the first step, at the last one)
    steps: int
    lr: float                        # the highest
    lr_min: float = 0.0
    warmup: float = 0.03             # §4
    weight_decay: float = 0.05       # §4
    packs: int = 8                   # packs (videos) per step
    branches: int = 8                # conversations per pack
    tokens: int = 1536               # padded tokens of one forward; larger steps are accumulated
    reduction: str = "mean"          # "mean" over tokens | "square": a sample with m tokens weighs √m, not m
    group: int = 8                   # RL: answers per prompt
    temperature: float = 1.0         # RL, OPD: of the student's samples
    updates: int = 2                 # RL: optimizer steps per rollout
    format: float = 0.1              # RL: reward of an answer that a rule can read, beside IoU or correctness
    clip: tuple = (3e-4, 4e-4)       # RL: GSPO's clip range of the sequence ratio, below and above 1
    kl: float = 0.03                 # RL: weight of the KL to the SFT model
    kl_form: str = "full"            # OPD: "full" vocabulary | "sampled" tokens alone
    muon: float = 0.0                # learning rate of Muon for weight matrices; 0: AdamW for everything
    freeze: tuple = ()               # "vision", "projector": parts that are not trained
    fps: float = None                # frames a second of a video whose row names none; None: 2
    max_frames: int = None           # at most so many frames of a video; None: what the rows say
    max_new: int = 24                # RL, OPD: at most so many tokens of a sampled answer
    pool: int = 2400                 # RL, OPD: prompts that the filter looks at
    replay: dict = field(default_factory=dict)     # OPD: file → packs a step, on average, of SFT data beside


@dataclass
class Stage:
    """One stage of training. A fork adds one in its own file, mine.py, run as `python mine.py --stage dpo`:

        train.STAGES["dpo"] = train.Stage(after="sft_long", recipe=train.Recipe(…), train=train_dpo)
        iv3.STAGE_ORDER.append("dpo")            # --model RUN then means it
        train.run_cli(train.main)

    train_dpo(trainer, data) ends in trainer.fit(step_of); step_of(step) → {"loss", "tokens", …}.
    X_short and X_long are `--stage X` with two phases."""
    after: str                       # it starts from the checkpoint of this stage
    recipe: Recipe                   # for the tiny model
    train: Callable = None           # train(trainer, data) takes all its steps; ours are put in below
    large: dict = field(default_factory=dict)      # changes of the recipe from 100 M parameters on
    converts: bool = False           # a GQA model becomes M²LA before the first step
    on_policy: bool = False          # learns from its own answers: its rows are of tasks with a reward


CURATED = "curated/curated.jsonl"    # questions that the model itself makes, see `curate`

# Shares:   of packs    of tokens (the paper)    of samples (the paper)
#   text        7 %         29 %  (27 %)             32 %  (30 %)
#   image      80 %         19 %  (30 %)             10 %  (55 %)       a toy picture has one row,
#   video      13 %         52 %  (43 %)             58 %  (15 %)       a text or a video eight
CPT_MIX = {"cpt_text.jsonl": 0.07, "cpt_image.jsonl": 0.80, "cpt_video.jsonl": 0.13}

# The numbers of steps are those of half an hour on two cores. With two thirds of them the agent's accuracy
# falls from .81 to .35 where its first look cannot hold the evidence (commit 644a1cf).
STAGES = {
    # 48 packs: four in five are a picture with one row. `large`: the paper's rates and frames.
    "cpt": Stage(
        after="base",
        recipe=Recipe(CPT_MIX, steps=90, lr=3e-4, lr_min=1e-5, packs=48),
        large=dict(lr=2e-5, lr_min=1e-6, max_frames=768),
        converts=True),
    # A tenth of the steps warms up, as in the paper. The agent's rollouts begin here, and `sft_plan`, their
    # first turns alone, from which a tiny model learns to copy a time. CPT's texts and pictures are replayed.
    "sft_short": Stage(
        after="cpt",
        recipe=Recipe({"sft_short.jsonl": 0.7, "sft_agent.jsonl": 0.15, "sft_plan.jsonl": 0.05,
                       "cpt_text.jsonl": 0.05, "cpt_image.jsonl": 0.05},
                      steps=260, lr=1e-3, lr_min=1e-4, muon=0.01, warmup=0.1, branches=12,
                      reduction="square"),
        large=dict(lr=3e-5, lr_min=0.0, muon=0.0, max_frames=512)),
    # The agent's rollouts take longest to learn: the largest share. A long clip has more questions: 20.
    "sft_long": Stage(
        after="sft_short",
        recipe=Recipe({"sft_long.jsonl": 0.25, CURATED: 0.04, "sft_agent.jsonl": 0.42, "sft_plan.jsonl": 0.05,
                       "sft_short.jsonl": 0.2, "cpt_text.jsonl": 0.04},
                      steps=180, lr=1e-3, lr_min=5e-5, muon=0.01, warmup=0.05, branches=20,
                      reduction="square"),
        large=dict(lr=1e-5, lr_min=0.0, muon=0.0, max_frames=2048, fps=4.0)),
    # GSPO's own clip range, a tenth of this, cut a third of these short answers. With half the KL multiple
    # choice fell by 1.7 points. 1e-6: usual, the paper names none.
    "rl": Stage(
        after="sft_long",
        recipe=Recipe({"rl.jsonl": 1.0},
                      steps=64, lr=1e-4, lr_min=2e-5, weight_decay=0.0, pool=4200, clip=(3e-3, 4e-3),
                      kl=0.08),
        large=dict(lr=1e-6, lr_min=0.0, clip=(3e-4, 4e-4), max_new=256),
        on_policy=True),
    # The pool is all of the toy's prompts: few are in the gap. Replayed are the agent's rollouts, which OPD
    # does not sample, and short clips.
    "opd": Stage(
        after="rl",
        recipe=Recipe({"opd.jsonl": 1.0},
                      steps=150, lr=5e-4, lr_min=2e-5, weight_decay=0.0, branches=16, pool=9700,
                      replay={"sft_agent.jsonl": 1, "sft_short.jsonl": 1}),
        large=dict(lr=1e-6, lr_min=0.0, max_new=256),
        on_policy=True),
}
CHAIN = tuple(STAGES)                # the stages of the whole recipe; what a fork adds is run by --stage

# --quick: the whole recipe in five minutes on two cores. Here stands what differs from STAGES.
# CPT has a third of the learning rate: a fifth of the clips is soon known by heart. SFT has half of the time:
# from half as many long packs the agent learns nothing.
QUICK = {
    "cpt": dict(steps=40, packs=24, lr=1e-4, lr_min=3e-6),
    "sft_short": dict(steps=200, packs=4),
    "sft_long": dict(steps=260, packs=4,
                     mix={"sft_long.jsonl": 0.25, CURATED: 0.04, "sft_agent.jsonl": 0.5, "sft_plan.jsonl": 0.05,
                          "sft_short.jsonl": 0.14, "cpt_text.jsonl": 0.02}),
    "rl": dict(steps=16, packs=4, lr=2e-4, pool=400),
    "opd": dict(steps=18, pool=400),
}
QUICK_SCALE = 0.2                    # share of the toy's videos
SMALL = dict(tokens=16_384)          # from 10 M parameters on: preset small has 54 tokens a second of video


# ------------------------------------------------------------------------------- data: rows → packs → batches
#
# Rows about one clip become one sequence, a pack: a tree whose root is what all of them begin with.
#
#     rows                        the pack                       what a token sees (#)     V V Q A q a a
#                                                                                     V    #
#     <video> Q A                           ┌─ Q A               prefix  (branch 0)   V    # #
#     <video> q a a       →       <video> ──┤                    branch 1             Q    # # #
#                                           └─ q a a                                  A    # # # #
#                                                                branch 2             q    # #     #
#                                                                                     a    # #     # #
#                                                                                     a    # #     # # #
#
# Positions continue those of the prefix in every branch, so each conversation reads as if it were alone. In
# RL several answers to one question share its tokens as well: the tree has one level more. `parent` names the
# question's branch.
#
#     <video> ─┬─ Q (branch 1) ─┬─ A  (branch 2, parent 1)
#              │                └─ A' (branch 3, parent 1)
#              └─ q (branch 4) ─┬─ a  (branch 5, parent 4)
#                               └─ a' (branch 6, parent 4)

@dataclass
class Pack:
    """Several conversations about one clip in one sequence of T tokens. A branch attends to the prefix, to
    the question that it answers (its parent) and to itself."""
    ids: torch.Tensor                # (T,)
    positions: torch.Tensor          # (3,T)
    branch: torch.Tensor             # (T,) 0 = prefix, 1, 2, … = branches
    parent: torch.Tensor             # (T,) branch of the question that the token's branch answers; or 0
    sample: torch.Tensor             # (T,) number of the conversation; −1: tokens that several share
    answer: torch.Tensor             # (T,) bool: the loss is of these
    patches: torch.Tensor            # those of the shared clip once, then those of each branch
    grids: torch.Tensor
    advantage: torch.Tensor = None   # RL: (conversations,)

    @property
    def count(self):
        """How many conversations."""
        return int(self.sample.max()) + 1


class Prefix(NamedTuple):
    """How much all conversations of a pack begin with."""
    tokens: int
    patches: int
    grids: int                       # temporal patches


class Part(NamedTuple):
    """A run of tokens of one conversation: the prefix, or a branch."""
    sample: Encoded
    tokens: slice
    parent: int                      # number of the part with its question; 0: it continues the prefix
    conversation: int                # −1: several share it


def make_pack(samples, shared_grids, vision_ids, group=1):
    """Pack conversations: a list of Encoded that begin with the same `shared_grids` temporal patches (0
    without media), each `group` of them answers to one question → Pack."""
    prefix = common_prefix(samples, shared_grids, vision_ids)
    parts = tree_of(samples, prefix, group)

    # A branch has its own pictures after those of the prefix; answers to one question have the same ones.
    patches = [samples[0].patches[:prefix.patches]]
    grids = [samples[0].grids[:prefix.grids]]
    for sample in samples[::group]:
        patches.append(sample.patches[prefix.patches:])
        grids.append(sample.grids[prefix.grids:])

    # What is known of a part is repeated for each of its tokens: (parts,) → (T,).
    ids = [part.sample.ids[part.tokens] for part in parts]
    positions = [part.sample.positions[:, part.tokens] for part in parts]
    answer = [part.sample.answer[part.tokens] for part in parts]
    sizes = torch.tensor(list(map(len, ids)))
    parent = torch.tensor([part.parent for part in parts])
    conversation = torch.tensor([part.conversation for part in parts])
    return Pack(
        ids=torch.cat(ids),
        positions=torch.cat(positions, 1),
        branch=torch.arange(len(parts)).repeat_interleave(sizes),
        parent=parent.repeat_interleave(sizes),
        sample=conversation.repeat_interleave(sizes),
        answer=torch.cat(answer),
        patches=torch.cat(patches),
        grids=torch.cat(grids))


def answer_start(sample):
    """The token before the answer, which the branch needs to predict the answer's first token from."""
    return int(sample.answer.nonzero()[0]) - 1


def common_prefix(samples, shared_grids, vision_ids):
    """How much the conversations share: equal tokens before any answer, of the shared clip's pixels alone."""
    first = samples[0]
    limit = min(map(answer_start, samples))
    equal = torch.ones(limit, dtype=torch.bool)
    for sample in samples:
        equal &= sample.ids[:limit] == first.ids[:limit]
    tokens = int(equal.long().cumprod(0).sum())                              # until the first difference
    patches = int(first.grids[:shared_grids].prod(1).sum())
    if len(samples) == 1:
        return Prefix(tokens, patches, shared_grids)

    # All placeholders are one token: behind the shared clip equal tokens can stand for different pixels.
    vision = torch.isin(first.ids, torch.tensor(vision_ids)).nonzero()[:, 0]
    tokens_per_patch = len(vision) / max(1, len(first.patches))             # 1/merge²
    shared = round(patches * tokens_per_patch)                              # vision tokens of the shared clip
    if shared and tokens <= vision[shared - 1]:    # the conversations differ before its end: share none of it
        patches = shared = shared_grids = 0
    if shared < len(vision):
        tokens = min(tokens, int(vision[shared]))          # stop at the first placeholder of something else
    return Prefix(tokens, patches, shared_grids)


def tree_of(samples, prefix, group):
    """The parts of a pack in order: prefix and branches; with group > 1 each question before its answers."""
    parts = [Part(samples[0], slice(0, prefix.tokens), 0, -1)]
    for i, sample in enumerate(samples):
        if group == 1:
            parts.append(Part(sample, slice(prefix.tokens, None), 0, i))
            continue
        start = answer_start(sample)
        if i % group == 0:
            question = len(parts)
            parts.append(Part(sample, slice(prefix.tokens, start), 0, -1))
        parts.append(Part(sample, slice(start, None), question, i))
    return parts


# Queries that attend together, at least. On the toy's SFT packs 256 would meet 1.5 to 1.8 times as many keys, and all
# that is more is masked.
BLOCK = 64


def collate_packs(packs):
    """Packs → one right-padded batch for iv3's forward. `sample` (B,T): number of the conversation in the
    batch, −1 elsewhere. `mask` (B,1,T,T): token i sees j ≤ i of its prefix, its question, its own branch."""
    # Conversations are numbered through the batch, not from 0 in every pack.
    samples = []
    conversations = 0
    for pack in packs:
        samples.append(torch.where(pack.sample >= 0, pack.sample + conversations, -1))
        conversations += pack.count
    # Padding: branch −1 is nobody's key, parent 0 lets it see the prefix, so that no softmax is over nothing.
    branch = padded([pack.branch for pack in packs], -1)                     # (B,T)
    parent = padded([pack.parent for pack in packs], 0)                      # (B,T)

    # The tree: a key of the prefix, of the query's own branch or of its question, (B,query,key).
    key = branch[:, None, :]
    same = (key == 0) | (key == branch[:, :, None]) | (key == parent[:, :, None])
    T = branch.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    mask = (same & causal)[:, None]

    batch = collate(packs, 0)
    batch["answer"] = padded([pack.answer for pack in packs], False)
    batch["sample"] = padded(samples, -1)
    batch["mask"] = Blocks(mask, attention_blocks(branch, parent))
    if packs[0].advantage is not None:
        batch["advantage"] = torch.cat([pack.advantage for pack in packs])
    return batch


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def attention_blocks(branch, parent):
    """branch, parent (B,T) → [(start, stop, head, low)]: queries start … stop need no other keys than 0 …
    head and low … stop (m2la.Blocks). Most of a tree's mask is empty; so most of it is never computed."""
    T = branch.shape[1]
    head = int((branch == 0).sum(1).max())                 # the longest prefix
    size = max(BLOCK, T // 16)                             # at most 16 blocks: each is a call of its own
    blocks = []
    for start in range(0, head, size):                     # within a prefix: all keys up to the block's end
        blocks.append((start, min(start + size, head), 0, 0))

    # A later block sees the prefix, and what stands from the question of its first query on.
    question = torch.where(parent > 0, parent, branch)     # (B,T)
    for start in range(head, T, size):
        first_key = (question == question[:, start:start + 1]).int().argmax(1)         # (B,) of each pack
        low = max(head, int(first_key.min()))
        blocks.append((start, min(start + size, T), head, low))
    return blocks


def micro_batches(packs, tokens):
    """Split a step's packs, sorted by length, into batches of at most `tokens` padded tokens."""
    batches = []
    for pack in sorted(packs, key=lambda pack: len(pack.ids)):
        if batches and len(pack.ids) * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(pack)
        else:
            batches.append([pack])
    return [collate_packs(batch) for batch in batches]


@dataclass
class Source:
    """One file of the mix."""
    root: Path                       # its media are relative to this folder
    clips: list                      # rows about one clip, a list each
    share: tuple                     # of the packs: at the first step, at the last


class Drawn(NamedTuple):
    """What becomes one pack."""
    rows: list
    root: Path


def by_clip(rows):
    """Rows → lists of rows about the same part of the same video or picture; rows without media by eights."""
    clips = defaultdict(list)
    texts = 0
    for row in rows:
        media = first_media(row)
        if media:
            clips[json.dumps(media)].append(row)
        else:
            clips[texts // 8].append(row)                  # eight: as many as the toy has about a video
            texts += 1
    return list(clips.values())


class Data:
    """Draws packs from the JSONL files of a mix. What step n gets depends only on (seed, stage, n): a resumed
    run continues exactly, several processes can prepare steps. Unreadable videos are skipped and counted."""

    def __init__(self, directory, mix, processor, seed, stage, steps=1, fps=None, max_frames=None):
        self.processor = processor
        self.seed = [seed, *stage.encode()]
        self.steps = steps
        self.skipped = Counter()                           # what is wrong → how often
        token_id = processor.tokenizer.token_id
        self.vision_ids = [token_id("<|image_pad|>"), token_id("<|video_pad|>")]
        self.sources = []
        for name, share in mix.items():
            path = Path(directory) / name                  # --data F.jsonl is an absolute path here
            rows = framed(load_rows(path), fps, max_frames)
            if not isinstance(share, tuple):
                share = (share, share)
            self.sources.append(Source(path.parent, by_clip(rows), share))

    def keep(self, wanted):
        """Leave out the rows that are not wanted(row), and files without others."""
        sources = []
        for source in self.sources:
            clips = []
            for rows in source.clips:
                rows = list(filter(wanted, rows))
                if rows:
                    clips.append(rows)
            if clips:
                sources.append(replace(source, clips=clips))
        self.sources = sources

    def hold_out(self, share=0.05):
        """Take a share of the videos of each file out → [Drawn]: none where a file has one video only."""
        out = []
        for source in self.sources:
            videos = defaultdict(list)                    # a video → all its clips; eight texts stand for one
            for number, rows in enumerate(source.clips):
                media = first_media(rows[0])
                name = media[media["type"]] if media else number
                videos[name].append(rows)
            videos = list(videos.values())
            order = np.random.default_rng(self.seed[0]).permutation(len(videos))
            count = min(math.ceil(share * len(videos)), len(videos) - 1)
            held = []
            for i in order[:count]:
                held += itertools.chain(*videos[i])
            if held:
                out.append(Drawn(held, source.root))
            source.clips = []
            for i in sorted(order[count:]):
                source.clips += videos[i]
        return out

    def step(self, step, packs, branches):
        """Draw `packs` times up to `branches` rows about one clip → [Drawn], this process' part of them."""
        rng = np.random.default_rng([*self.seed, step])
        shares = []
        for source in self.sources:
            first, last = source.share
            shares.append(first + (last - first) * step / self.steps)
        shares = np.array(shares)
        drawn = []
        for number in rng.choice(len(self.sources), packs, p=shares / shares.sum()):
            source = self.sources[number]
            weight = np.sqrt(list(map(len, source.clips)))      # a lone row is not worth a whole pack
            rows = source.clips[rng.choice(len(source.clips), p=weight / weight.sum())]
            # The draw has decided that it is text: any texts of the file can share a pack.
            if not first_media(rows[0]):
                texts = [clip for clip in source.clips if not first_media(clip[0])]
                rows = list(itertools.chain(*texts))
            chosen = rng.permutation(len(rows))[:branches]
            drawn.append(Drawn([rows[i] for i in chosen], source.root))
        return own_part(drawn)

    def encode(self, rows, root, **options):
        """Rows → list of Encoded, or None when their video cannot be read (counted in `skipped`)."""
        try:
            return [self.processor.encode(row["messages"], root, **options) for row in rows]
        except MediaError as e:
            self.skipped[str(e)] += 1
            return None

    def pack(self, rows, samples, root, group=1):
        """The conversations `samples` about the clip of `rows` → Pack."""
        grids = 0
        media = first_media(rows[0])
        if media:
            patches, grid, *_ = self.processor.load(media, root)
            grids = len(patches) // (grid[0] * grid[1])    # temporal patches
        return make_pack(samples, grids, self.vision_ids, group)

    def packs(self, step, recipe):
        """The supervised packs of one step."""
        packs = []
        for rows, root in self.step(step, recipe.packs, recipe.branches):
            samples = self.encode(rows, root)
            if samples:
                packs.append(self.pack(rows, samples, root))
        return packs

    def batches(self, step, recipe):
        """The supervised batches of one step."""
        packs = self.packs(step, recipe)
        need(packs or world() > 1,                         # of several processes, one may have bad luck
             f"no readable video in step {step}: {next(iter(self.skipped), '')}")
        return micro_batches(packs, recipe.tokens)


def own_part(drawn):
    """This process' part of a step. The longest pack goes first, each to who has least to do so far."""
    if world() == 1:
        return drawn

    def cost(pack):                                        # letters, and four for a second of video
        letters = sum(len(str(row["messages"])) for row in pack.rows)
        return letters + 4 * pack.rows[0].get("duration", 0)
    loads = [0] * world()
    own = []
    for pack in sorted(drawn, key=cost, reverse=True):
        least = loads.index(min(loads))
        loads[least] += cost(pack)
        if least == rank():
            own.append(pack)
    return own


class Loader:
    """The batches of step after step; `workers` other processes prepare them while the model trains."""

    def __init__(self, data, recipe, workers):
        self.data = data
        self.recipe = recipe
        self.workers = workers
        self.prepared = None

    def batches(self, step):
        if not self.workers:
            return self.data.batches(step, self.recipe)
        if self.prepared is None:                          # a resumed run does not begin at step 0
            # Without a batch size a worker's collate_fn gets one number, and returns that step's batches.
            self.prepared = iter(torch.utils.data.DataLoader(
                range(step, self.recipe.steps), None, collate_fn=self.prepare, num_workers=self.workers,
                prefetch_factor=4))                     # steps ahead, per process: some take longer to decode
        batches, skipped = next(self.prepared)
        self.data.skipped.update(skipped)
        if isinstance(batches, UserError):
            raise batches
        return batches

    def prepare(self, step):
        """In a worker process: the batches of a step, or what is wrong with it; and what it skipped."""
        self.data.skipped = Counter()
        try:
            return self.data.batches(step, self.recipe), self.data.skipped
        except UserError as e:
            return e, self.data.skipped


# ----------------------------------------------------------------------------------------------------- losses

class Predicted(NamedTuple):
    """What a batch's n answer tokens were predicted from."""
    logits: torch.Tensor             # (n,V), fp32
    token: torch.Tensor              # (n,) the tokens themselves
    sample: torch.Tensor             # (n,) number of their conversation


def answer_forward(model, batch):
    """One packed forward → Predicted."""
    answer = batch["answer"]                                     # (B,T)
    hidden = model(batch["ids"], batch["positions"], batch["patches"], batch["grids"], mask=batch["mask"],
                   wanted=before_answers(answer))                # (n,D)
    return Predicted(
        logits=exact_logits(model, hidden),
        token=batch["ids"][:, 1:][answer[:, 1:]],
        sample=batch["sample"][:, 1:][answer[:, 1:]])


def token_logp(model, batch):
    """→ fp32 log π of each answer token (n,), its conversation (n,)."""
    logits, token, sample = answer_forward(model, batch)
    return logits.log_softmax(-1).gather(-1, token[:, None])[:, 0], sample


def sft_weights(sample, reduction):
    """Weight of each answer token, (n,): "square" gives each of a sample's m tokens 1/√m (§4)."""
    length = torch.bincount(sample)[sample]                      # (n,): m of the token's sample
    if reduction == "mean":
        return torch.ones_like(length, dtype=torch.float)
    return length.float().rsqrt()


def count_of(batch):
    """Conversations in a batch."""
    return int(batch["sample"].max()) + 1


def sequence_mean(values, sample, count):
    """(n,) per token → (count,) mean over each conversation's tokens."""
    total = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, sample, values)
    return total / torch.bincount(sample, minlength=count).clamp_min(1)


def advantages(rewards, group):
    """rewards (n·group,) → A_i = (r_i − mean) / (std + 1e-4) inside each group of answers to one prompt.
    1e-4, as in TRL, matters only where all rewards are nearly equal."""
    r = rewards.view(-1, group)
    centred = r - r.mean(1, keepdim=True)
    return (centred / (r.std(1, correction=0, keepdim=True) + 1e-4)).view(-1)


class GSPO(NamedTuple):
    """The loss of a batch and what is logged of it."""
    loss: torch.Tensor
    kl: torch.Tensor                 # to the SFT model, nats a token
    clipped: torch.Tensor            # share of the sequences whose gradient is cut


def gspo_loss(logp, old, ref, sample, advantage, clip, kl):
    """Group Sequence Policy Optimization with a KL penalty (§3.3), of the log-probabilities (n,) of each
    token under π, π_old and the SFT model; `sample` (n,) and `advantage` (count,) of their conversations;
    clip = (ε_low, ε_high), kl = β.

        s_i = exp( 1/|y_i| Σ_t (log π − log π_old) )                    sequence ratio
        L   = − mean_i min( s_i A_i, clip(s_i, 1 − ε_low, 1 + ε_high) A_i ) + β mean_i mean_t k3
        k3  = e^d − d − 1,  d = log π_ref − log π                       KL estimator, never negative
    """
    count = len(advantage)
    ratio = sequence_mean(logp - old, sample, count).exp()                   # s (count,)
    low, high = clip
    clipped = ratio.clamp(1 - low, 1 + high)               # in the first update s = 1: no effect
    objective = torch.minimum(ratio * advantage, clipped * advantage)        # (count,)

    d = ref - logp
    k3 = sequence_mean(d.exp() - d - 1, sample, count).mean()
    # Outside of the range on the side that A pushes to, the minimum is the clipped term, a constant.
    cut = ((ratio - clipped) * advantage > 0).float().mean()
    return GSPO(-objective.mean() + kl * k3, k3, cut)


def reverse_kl(student, teacher):
    """logits (n,V) of both at the same prefixes → Σ_v π(v) (log π(v) − log π_T(v)), (n,) (§3.3, OPD)."""
    p = student.log_softmax(-1)
    q = teacher.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def sampled_kl(student, teacher, token):
    """The paper's form, of the sampled tokens alone, token (n,) ~ π: log π(y_t) − log π_T(y_t), (n,). Its
    gradient is that times ∇ log π(y_t), on average over y_t the gradient of `reverse_kl` (more noise, no full
    teacher logits). To differentiate the value itself would give ∇ log π(y_t), 0 on average: which tokens are
    sampled moves with π."""
    p = student.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    q = teacher.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    gap = (p - q).detach()
    return gap + gap * (p - p.detach())                          # value: gap; gradient: gap ∇ log π


# ------------------------------------------------------------------------------------------ the stages' steps
#
# The step of a stage is a function of its number → the figures of its line in metrics.jsonl. `trainer`
# (below) holds the model, the recipe and the optimizers: trainer.update(jobs) is one optimizer step,
# trainer.fit(step_of) the whole stage.

class Job(NamedTuple):
    """One forward and backward pass of an update, whose loss is Σ weight · loss_of(batch)."""
    batch: dict
    loss_of: Callable
    weight: float


# ---- CPT and SFT: next token on the answers (§4)

def supervised_step(trainer, loader, step):
    """One step of CPT or SFT (§4): packs → log-probabilities → loss → update."""
    batches = loader.batches(step)
    jobs = supervised_jobs(trainer, batches)
    loss = trainer.update(jobs)
    return {"loss": loss, "tokens": tokens_of(batches)}


def supervised_jobs(trainer, batches):
    """Jobs for `update`: L = Σ_t w_t · (− log π(y_t)) / Σ_t w_t over the answer tokens of all batches of all
    processes, w_t = 1 or 1/√m (`sft_weights`). A batch counts by its part of Σ w: packing and processes do
    not change the loss."""
    reduction = trainer.recipe.reduction

    def loss_of(batch):
        logits, token, sample = answer_forward(trainer.model, batch)
        nats = F.cross_entropy(logits, token, reduction="none")              # (n,)
        weight = sft_weights(sample, reduction)                              # (n,)
        return (nats * weight).sum() / weight.sum()
    weights = []
    for batch in batches:
        sample = batch["sample"][:, 1:][batch["answer"][:, 1:]]
        weights.append(float(sft_weights(sample, reduction).sum()))
    total = sum(gather(sum(weights)))
    need(total, f"{trainer.stage}: no process found a readable video; see what --jobs 1 says")
    return [Job(batch, loss_of, weight / total) for batch, weight in zip(batches, weights)]


def tokens_of(batches):
    """Tokens that a model reads, without padding."""
    return int(sum(batch["valid"].sum() for batch in batches))


def train_supervised(trainer, data):
    """cpt, sft: all steps."""
    loader = Loader(data, trainer.recipe, trainer.args.workers)
    trainer.fit(partial(supervised_step, trainer, loader))


# ---- What RL and OPD share: answers of the model's own

@dataclass
class Group:
    """A prompt and the answers that were sampled for it; GSPO compares them with each other."""
    row: dict
    root: Path
    prompt: Encoded
    answers: list = None             # of iv3.Generation
    advantage: torch.Tensor = None   # RL: (answers,)

    @property
    def lengths(self):
        """Sampled tokens of each answer."""
        return [len(answer.ids) for answer in self.answers]

    @property
    def tokens(self):
        """Tokens of all its conversations as if they were not packed."""
        return len(self.answers) * len(self.prompt.ids) + sum(self.lengths)


def rollout(trainer, data, drawn, samples, number, temperature, model=None):
    """Sample `samples` answers to each question in `drawn`, by the trained model (or by `model`) with the
    random numbers of step `number` → [Group]."""
    groups = []
    for rows, root in drawn:
        questions = [{**row, "messages": row["messages"][:-1]} for row in rows]
        prompts = data.encode(questions, root, generation=True)
        for row, prompt in zip(rows, prompts or ()):
            groups.append(Group(row, root, prompt))
    need(groups, f"{trainer.stage}: no readable video among {len(drawn)}: {next(iter(data.skipped), '')}",
         MediaError)

    prompts = [group.prompt for group in groups]
    stop = trainer.tokenizer.token_id("<|im_end|>")
    with autocast(trainer.args.device):
        answers = generate(model or trainer.model, prompts, stop, trainer.recipe.max_new, temperature,
                           samples, trainer.generator(number))
    for i, group in enumerate(groups):
        group.answers = answers[i * samples:(i + 1) * samples]
    return groups


def complete(prompt, ids):
    """A prompt and the tokens of its answer → one conversation (Encoded), the answer marked."""
    more = (prompt.next_position + torch.arange(len(ids))).expand(3, -1)
    length = len(prompt.ids) + len(ids)
    return Encoded(
        ids=torch.cat([prompt.ids, torch.tensor(ids)]),
        positions=torch.cat([prompt.positions, more], 1),
        patches=prompt.patches,
        grids=prompt.grids,
        answer=torch.arange(length) >= len(prompt.ids))


def answer_packs(data, groups):
    """Groups → packs: neighbours about one clip in one sequence, each question's tokens once."""
    packs = []
    for (_, root), run in itertools.groupby(groups, lambda group: (first_media(group.row), group.root)):
        run = list(run)
        rows = [group.row for group in run]
        samples = []
        for group in run:
            for answer in group.answers:
                samples.append(complete(group.prompt, answer.ids))
        pack = data.pack(rows, samples, root, len(run[0].answers))
        if run[0].advantage is not None:
            pack.advantage = torch.cat([group.advantage for group in run])       # in the conversations' order
        packs.append(pack)
    return packs


# ---- RL: GSPO with rule-based rewards (§3.3)

def rl_step(trainer, data, reference, step):
    """One step of GSPO (§3.3): rollout → rewards → advantages → packs → log-probabilities → updates."""
    recipe = trainer.recipe

    # Rollout: the policy answers each question `group` times. As it is now it is π_old.
    trainer.model.eval()
    drawn = data.step(step, recipe.packs, recipe.branches)
    groups = rollout(trainer, data, drawn, recipe.group, step, recipe.temperature)

    # Rewards by rule, (groups, answers): IoU or correctness, a little more for an answer that can be read.
    rewards = torch.tensor(rewards_of(trainer.tokenizer, groups, recipe.format)).view(-1, recipe.group)

    # Advantages, normalised in each group. Where all answers are equally good there is no gradient: left out.
    advantage = advantages(rewards.view(-1), recipe.group).view_as(rewards)
    spread = rewards.std(1, correction=0)
    live = []
    for i, group in enumerate(groups):
        group.advantage = advantage[i]
        if spread[i] > 1e-6:                               # equal but for rounding
            live.append(group)

    # Packs, dealt out to the updates.
    packs = answer_packs(data, live)
    order = np.random.default_rng([trainer.args.seed, step]).permutation(len(packs))
    updates = []
    for part in np.array_split(order, recipe.updates):
        updates.append(micro_batches([packs[i] for i in part], recipe.tokens))

    # Log-probabilities of each answer token under the SFT model, and under π_old where an update came before:
    # in the first update π is still π_old. All at temperature 1, whatever the samples' was.
    with torch.no_grad(), autocast(trainer.args.device):
        for number, batches in enumerate(updates):
            for batch in batches:
                batch["ref"], _ = token_logp(reference, batch_to(batch, trainer.args.device))
                if number > 0:
                    batch["old"], _ = token_logp(trainer.model, batch_to(batch, trainer.args.device))

    # Loss: clipped sequence ratio and KL, see gspo_loss.
    logged = []

    def loss_of(batch):
        logp, sample = token_logp(trainer.model, batch)
        old = batch.get("old", logp.detach())
        gspo = gspo_loss(logp, old, batch["ref"], sample, batch["advantage"], recipe.clip, recipe.kl)
        logged.append((float(gspo.kl.detach()), float(gspo.clipped)))
        return gspo.loss

    # Updates: every answer counts the same.
    trainer.model.train()
    loss = 0.0
    for batches in updates:
        total = sum(gather(sum(map(count_of, batches))))
        if total:
            jobs = [Job(batch, loss_of, count_of(batch) / total) for batch in batches]
            loss += trainer.update(jobs) / recipe.updates
    kl, clipped = np.mean(logged or [(0.0, 0.0)], 0).tolist()
    return {"loss": loss, "reward": float(rewards.mean()), "spread": float(spread.mean()),
            "zero_spread": 1 - len(live) / len(groups),
            "length": float(np.mean([group.lengths for group in groups])),
            "tokens": sum(group.tokens for group in live), "kl": kl, "clipped": clipped}


def rewards_of(tokenizer, groups, bonus=0.0):
    """The rule-based reward of each answer, all groups in a row; `bonus` more for a well-formed one."""
    rewards = []
    for group in groups:
        for answer in group.answers:
            text = answer.text(tokenizer)
            reward = evaluation.reward(text, group.row)
            if bonus and evaluation.well_formed(text, group.row):
                reward += bonus
            rewards.append(reward)
    return rewards


FILTER_SAMPLES = 4                   # answers to a prompt; right half the time, it shows both in 7 of 8
IOU_RANGE = 0.1, 0.7                 # §4: spans that the SFT model neither misses nor has


@torch.no_grad()
def rl_filter(trainer, data):
    """§4: keep grounding where the mean IoU of the answers is in [0.1, 0.7], multiple choice both right and
    wrong at T = 1. Correctness is judged: a fork's reward (a penalty on length) changes no verdict."""
    def judge(number, drawn):
        temperature = trainer.recipe.temperature
        # From 10⁶ on: other random numbers than those of the stage's steps.
        for group in rollout(trainer, data, drawn, FILTER_SAMPLES, 10 ** 6 + number, temperature):
            scores = correct_of(trainer.tokenizer, group)
            yield group.row["id"], within_reach(group.row, scores)
    verdicts = verdicts_of(trainer, data, judge)
    keep = [row for row, good in verdicts if good]
    note = f"kept {len(keep)} of {len(verdicts)} prompts (IoU in [0.1, 0.7], mixed answers)"
    return {"keep": keep, "looked_at": len(verdicts), "note": note}


def within_reach(row, scores):
    """Whether a prompt can teach the policy something, from the correctness of some of its answers to it."""
    mean = np.mean(scores)
    if row["task"] == "grounding":
        low, high = IOU_RANGE
        return bool(low <= mean <= high)
    return bool(0 < mean < 1)


def correct_of(tokenizer, group):
    """How right each answer is, 0 to 1: what the filters look at."""
    return [evaluation.correct(answer.text(tokenizer), group.row) for answer in group.answers]


def train_rl(trainer, data):
    """rl: the model that it starts from is the KL's reference; then the filter; then all steps."""
    reference = build_model(trainer.model.cfg, trainer.tokenizer).to(trainer.args.device)
    reference.load_state_dict(trainer.model.state_dict())  # fit() may load a later state into the policy
    reference.eval().requires_grad_(False)
    keep_rows(trainer, data, partial(rl_filter, trainer, data))
    trainer.fit(partial(rl_step, trainer, data, reference))


# ---- OPD: the student samples, the teacher judges every token of the sample (§3.3)

def opd_step(trainer, data, teacher, replay, step):
    """One step of on-policy distillation (§3.3): rollout → packs → both models' logits → reverse KL → update.

        L = mean_i 1/|y_i| Σ_t KL( π(· | x_i, y_i,<t) ‖ π_T(· | x_i, y_i,<t) ),   y_i ~ π

    Each sample counts the same, as in the paper's mean_t. A mean over all tokens leaves short answers unheard
    (it cost 4 points of multiple choice): a span has more tokens than a colour, and more nats on each."""
    recipe = trainer.recipe

    # Rollout: one answer y_i of the student to each question x_i.
    trainer.model.eval()
    drawn = data.step(step, recipe.packs, recipe.branches)
    groups = rollout(trainer, data, drawn, 1, step, recipe.temperature)

    # Packs.
    batches = micro_batches(answer_packs(data, groups), recipe.tokens)

    # Loss: both models' logits (n,V) at the same prefixes → divergence of each token (n,) → mean per answer.
    def loss_of(batch):
        student, token, sample = answer_forward(trainer.model, batch)
        with torch.no_grad():
            target = answer_forward(teacher, batch_to(batch, teacher.device)).logits.to(student.device)
        if recipe.kl_form == "full":
            gap = reverse_kl(student, target)
        else:
            gap = sampled_kl(student, target, token)
        return sequence_mean(gap, sample, count_of(batch)).mean()

    # Update: every answer counts the same. SFT data beside keeps what is not sampled from being forgotten.
    trainer.model.train()
    total = sum(gather(sum(map(count_of, batches))))
    jobs = [Job(batch, loss_of, count_of(batch) / total) for batch in batches]
    if replay:
        jobs += replay_jobs(trainer, replay, step)
    return {"loss": trainer.update(jobs), "tokens": tokens_of(batches)}


def replay_jobs(trainer, replay, step):
    """SFT packs of the same step; each weighs as much as a pack of answers."""
    recipe = trainer.recipe
    count = sum(recipe.replay.values())
    jobs = []
    for job in supervised_jobs(trainer, replay.batches(step, replace(recipe, packs=count))):
        jobs.append(job._replace(weight=job.weight * count / recipe.packs))
    return jobs


AHEAD = 0.1                          # the least lead in correctness that counts: IoUs differ a little anyway
GAP_KIND = 0.05                      # mean lead in a kind of question: there the test looks for the gap


@torch.no_grad()
def opd_filter(trainer, data, teacher):
    """§4: keep the rows where the teacher leads by more than AHEAD, and as many others. `kinds`: those of
    question in which the teacher is ahead, where the test looks for the gap."""
    def judge(number, drawn):
        own = rollout(trainer, data, drawn, 1, number, 0.0)                  # greedy
        best = rollout(trainer, data, drawn, 1, number, 0.0, teacher)
        for ours, theirs in zip(own, best):
            ahead = correct_of(trainer.tokenizer, theirs)[0] - correct_of(trainer.tokenizer, ours)[0]
            yield ours.row["id"], evaluation.kind_of(ours.row), ahead
    verdicts = verdicts_of(trainer, data, judge)

    gap = [row for row, _, ahead in verdicts if ahead > AHEAD]
    rest = [row for row, _, ahead in verdicts if ahead <= AHEAD]
    others = np.random.default_rng(trainer.args.seed).permutation(rest)[:len(gap)].tolist()
    leads = defaultdict(list)
    for _, kind, ahead in verdicts:
        leads[kind].append(ahead)
    kinds = sorted(kind for kind, aheads in leads.items() if np.mean(aheads) > GAP_KIND)
    note = f"kept {len(gap)} of {len(verdicts)} prompts where the teacher is better, and {len(others)} others"
    return {"keep": gap + others, "looked_at": len(verdicts), "note": note, "kinds": kinds}


def train_opd(trainer, data):
    """opd: the teacher, of the same vocabulary; then the filter; then all steps."""
    recipe, args = trainer.recipe, trainer.args
    need(recipe.kl_form == "full" or recipe.temperature == 1,
         "--kl-form sampled: is right for samples at temperature 1 alone")
    directory = find_model(args.teacher or args.out / "teacher", "--teacher")
    replay = None
    if recipe.replay:
        replay = Data(args.data_dir, recipe.replay, trainer.processor, args.seed, "replay", 1, recipe.fps,
                      recipe.max_frames)
        replay.skipped = data.skipped                      # counted together
    teacher, processor = load_model(directory, args.teacher_device or args.device)
    same = (processor.tokenizer.tokens == trainer.tokenizer.tokens
            and teacher.cfg.vocab == trainer.model.cfg.vocab)
    need(same, f"--teacher {directory}: its vocabulary differs from the student's; OPD compares by token")
    teacher.requires_grad_(False)
    keep_rows(trainer, data, partial(opd_filter, trainer, data, teacher))
    trainer.fit(partial(opd_step, trainer, data, teacher, replay))


# ---- What the two filters share

def verdicts_of(trainer, data, judge):
    """What judge(number, eight Drawn) yields for the pool, of all processes, sorted: (id of a row, …)."""
    pool = pool_of(data, trainer.recipe.pool, trainer.args.seed)
    chunks = math.ceil(len(pool) / 8)                      # eight: as many as a step's rollout
    verdicts = []
    for number in tqdm(range(rank(), chunks, world()), desc="   filter"):
        with suppress(MediaError):                         # no video of the chunk can be read: no verdict
            verdicts += judge(number, pool[8 * number:8 * number + 8])
    return sorted(sum(gather(verdicts), []))


def pool_of(data, limit, seed):
    """About `limit` rows of a data set, whole clips drawn at random → [Drawn]."""
    clips = []
    for source in data.sources:
        clips += [Drawn(rows, source.root) for rows in source.clips]
    drawn = []
    count = 0
    for i in np.random.default_rng(seed).permutation(len(clips)):
        if count < limit:
            drawn.append(clips[i])
            count += len(clips[i].rows)
    return drawn


def keep_rows(trainer, data, rule):
    """Run a data filter, rule() → {"keep": ids of rows, "looked_at", "note"}, once per stage; a resumed run
    reads what it found in kept.json."""
    def filtered():
        found = rule()
        need(found["looked_at"],
             f"{trainer.stage}: no readable video in its data; {next(iter(data.skipped), '')}")
        need(found["keep"],
             f"{trainer.stage}: the data filter kept none of {found['looked_at']} prompts; the model is too "
             "weak or too strong for this data")
        return found
    path = trainer.directory / "kept.json"
    if not (trainer.directory / "state.pt").is_file():
        once(lambda: path.unlink(missing_ok=True))
    found = stored(path, filtered)
    ids = set(found["keep"])
    count = Counter()
    for source in data.sources:
        for rows in source.clips:
            for row in rows:
                count[row["id"]] += 1
    for row in found["keep"]:
        need(count[row] <= 1,
             f"{trainer.stage}: its data has {count[row]} rows with the id {row!r}; make them differ")
    data.keep(lambda row: row["id"] in ids)
    print(f"{trainer.stage}: {found['note']}")


def stored(path, make):
    """The JSON of `path`; if there is no such file, make() → it. Every process calls it, one writes."""
    if not path.is_file():
        value = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        once(lambda: write_atomic(path, lambda p: p.write_text(json.dumps(value))))
    return read_json(path)


STAGES["cpt"].train = train_supervised
STAGES["sft_short"].train = train_supervised
STAGES["sft_long"].train = train_supervised
STAGES["rl"].train = train_rl
STAGES["opd"].train = train_opd


# --------------------------------------------------------------------------------------------------- the loop

PARTS = {"vision": ("blocks", "patch_embed", "pos_embed"),       # --freeze: names of modules in model.visual
         "projector": ("merger", "deepstack_merger_list")}


class Trainer:
    """The loop of one stage: model, recipe, optimizers and rates. The stage itself is `fit`'s argument.

    A killed run resumes exactly, with as many processes: everything random in step n is seeded by (seed,
    stage, n), and state.pt holds weights, optimizer and the next step. Only a complete stage has a
    config.json in its directory."""

    def __init__(self, model, processor, recipe, stage, args, inherits=None):
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.recipe = recipe
        self.stage = stage
        self.args = args
        self.inherits = inherits                           # the checkpoint that it starts from
        self.inherits_mark = mark_of(inherits)             # now: another process may train that stage again
        self.directory = args.out / stage
        self.metrics = args.out / "metrics.jsonl"
        self.val = val_rows(args, stage, recipe) if args.eval_every else None
        teacher = getattr(args, "teacher", None)
        # A resumed run must have the same.
        self.settings = repr((recipe, args.seed, str(inherits), args.freeze, str(teacher)))

        model.requires_grad_(True)
        for part in {*recipe.freeze, *args.freeze}:
            for name in PARTS[part]:
                getattr(model.visual, name).requires_grad_(False)
        if args.fsdp:
            shard_model(model, args.device)
        model.checkpointing = model.visual.checkpointing = args.checkpointing
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = optimizers(model, recipe)
        self.norm = 0.0                                    # of the step's gradient, before it is clipped
        self.peak = peak_of(args.device)                   # operations a second; 0: they are not counted
        self.flops = 0

    def generator(self, step):
        """Random numbers for sampling in one step."""
        seed = np.random.SeedSequence([self.args.seed, *self.stage.encode(), step]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))

    def lr(self, step):
        """Linear warm-up, then a cosine to lr_min (§4)."""
        recipe = self.recipe
        warmup = max(1, round(recipe.warmup * recipe.steps))
        if step < warmup:
            return recipe.lr * (step + 1) / warmup
        angle = math.pi * (step - warmup) / max(1, recipe.steps - warmup)
        return recipe.lr_min + (recipe.lr - recipe.lr_min) * 0.5 * (1 + math.cos(angle))

    def update(self, jobs):
        """One optimizer step:  loss = Σ weight · loss_of(batch) over the jobs of all processes. → the loss"""
        if self.args.fsdp:
            jobs = even_jobs(self, jobs)
        total = 0.0
        for batch, loss_of, weight in jobs:
            if self.peak:
                self.flops += train_flops(self.model, batch)
            with autocast(self.args.device):
                loss = loss_of(batch_to(batch, self.args.device)) * weight
            if self.args.fsdp:
                (loss * world()).backward()                # FSDP takes the mean over the processes
            else:
                loss.backward()
            total += float(loss.detach())
        if world() > 1 and not self.args.fsdp:
            sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)          # 1: the field's usual limit
        self.norm = float(whole(norm))
        if math.isfinite(self.norm):                       # an overflow costs a step; such a loss the stage
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return sum(gather(total))

    def fit(self, step_of, finish=None):
        """Run step_of(step) → figures ("loss", "tokens" and others) for every step; finish(); save."""
        progress = load_state(self)
        log = Log(self, progress)
        saved = time.monotonic()
        every = self.args.eval_every
        self.model.train()
        for step in log.bar:
            for optimizer in self.optimizers:              # AdamW; Muon in proportion to its own peak
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * self.lr(step) / self.recipe.lr
            self.norm = 0.0
            figures = self.figures_of(step, step_of(step))
            need(math.isfinite(figures["loss"]),
                 f"{self.stage}: the loss is {figures['loss']} at step {step}; lower --lr")
            progress.step = step + 1
            progress.tokens += figures["tokens"]
            if every and (progress.step % every == 0 or progress.step == self.recipe.steps):
                keep_best(self, progress, figures)
            log.write(figures, progress)
            if gather(time.monotonic() - saved)[0] > self.args.save_every:   # process 0's clock decides
                save_state(self, progress)
                saved = time.monotonic()
        seconds = time.monotonic() - log.began
        if finish:
            finish()
        save_stage(self, progress, seconds)
        self.model.eval()

    def figures_of(self, step, own):
        """A line of metrics.jsonl: the means of all processes' figures, the sum of their tokens."""
        line = {"stage": self.stage, "step": step, "lr": self.lr(step)}
        everyones = gather(own)
        for name in own:
            values = [figures[name] for figures in everyones]
            line[name] = sum(values) if name == "tokens" else float(np.mean(values))
        return line | {"grad_norm": self.norm}


def autocast(device):
    """bf16 on a GPU; weights, gradients and optimizer state stay in fp32. fp32 on a CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def batch_to(batch, device):
    return {key: value.to(device) for key, value in batch.items()}


# ------------------------------------------------------------------------------- beside the loop: checkpoints

@dataclass
class Progress:
    """How far a stage is."""
    step: int = 0                    # the next one
    tokens: int = 0
    best: float = -math.inf          # score of the best checkpoint so far


def save_state(trainer, progress):
    """state.pt: all that a killed run needs to go on."""
    state = unsharded({
        "model": trainer.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        **asdict(progress),
        "settings": trainer.settings})
    once(lambda: write_atomic(trainer.directory / "state.pt", lambda p: torch.save(state, p)))


def load_state(trainer):
    """Put a killed run's state back → Progress. Without a state.pt the stage begins anew."""
    trainer.directory.mkdir(parents=True, exist_ok=True)
    file = trainer.directory / "state.pt"
    if not file.is_file():
        once(lambda: forget(trainer.directory))
        return Progress()
    state = torch.load(file, map_location="cpu", weights_only=True)
    need(state["settings"] == trainer.settings,
         f"{file}: was written with other settings; use those or delete {trainer.directory}")
    own = trainer.model.state_dict()
    for name, value in state["model"].items():
        state["model"][name] = shard_of(value, own[name])
    trainer.model.load_state_dict(state["model"])
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"]):
        params = []
        for group in optimizer.param_groups:
            params += group["params"]
        for i, moments in saved["state"].items():          # numbered through all groups
            for name, value in moments.items():
                moments[name] = shard_of(value, params[i])
        optimizer.load_state_dict(saved)
    print(f"{trainer.stage}: resuming at step {state['step']} of {trainer.recipe.steps}")
    return Progress(state["step"], state["tokens"], state["best"])


def save_checkpoint(trainer, directory, record):
    """Weights and how they came about; config.json, the sign of a finished stage, is written last."""
    state = unsharded(trainer.model.state_dict())

    def write():
        directory.mkdir(exist_ok=True)
        write_atomic(directory / "stage.json", lambda p: p.write_text(json.dumps(record, indent=1)))
        save_model(directory, trainer.model, trainer.tokenizer, state=state)
    once(write)


def save_stage(trainer, progress, seconds):
    """The finished stage's checkpoint."""
    record = {
        "stage": trainer.stage,
        "inherits": str(trainer.inherits),
        "after": trainer.inherits_mark,
        "seed": trainer.args.seed,
        "tokens": progress.tokens,
        "seconds": round(seconds, 1),
        "processes": world(),
        "recipe": asdict(trainer.recipe)}
    save_checkpoint(trainer, trainer.directory, record)
    once(lambda: (trainer.directory / "state.pt").unlink(missing_ok=True))


def forget(directory):
    """Before a stage is trained anew: what says that it is finished, and what was measured of it."""
    for name in ("config.json", "scores.json", "agent.json"):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "best", ignore_errors=True)


def mark_of(directory):
    """Tells one training of a stage from another; "" of a checkpoint that we did not train."""
    path = Path(directory or "") / "stage.json"
    if not path.is_file():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------- beside the loop: best so far

def keep_best(trainer, progress, figures):
    """<stage>/best is what scored highest on the held-out rows so far, a checkpoint like the last."""
    name, value = validate(trainer, *trainer.val)
    figures[name] = value
    score = -value if name == "val_loss" else value
    if score > progress.best:
        progress.best = score
        record = {"stage": trainer.stage, "step": figures["step"], name: value}
        save_checkpoint(trainer, trainer.directory / "best", record)


def validate(trainer, rows, root):
    """The loss on held-out rows; in RL and OPD the rule reward of greedy answers to them."""
    model, processor = trainer.model, trainer.processor
    with autocast(trainer.args.device):
        if not STAGES[trainer.stage].on_policy:
            loss, _ = evaluation.held_out_loss(model, processor, rows, root, name="val")
            return "val_loss", loss
        texts = evaluation.answer_rows(model, processor, rows, root, max_new=trainer.recipe.max_new,
                                       name="val")
    rewards = []
    for text, row in zip(texts, rows):
        rewards.append(0.0 if text is None else evaluation.reward(text, row))
    return "val_reward", float(np.mean(rewards))


def val_rows(args, stage, recipe):
    """The held-out rows and the folder of their media → Drawn"""
    path = args.val or args.data_dir / "val.jsonl"
    rows = framed(load_rows(path), recipe.fps, recipe.max_frames)
    if STAGES[stage].on_policy:
        rows = [row for row in rows if row["task"] in evaluation.TASKS]
    need(rows, f"{path}: has no rows of {' or '.join(evaluation.TASKS)}, whose rewards choose {stage}'s "
         "best; give --val FILE")
    return Drawn(rows, path.parent)


# --------------------------------------------------------------------------------------- beside the loop: log

# Dense bf16 peak, operations a second, by what a card's name holds (data sheets); of others no MFU is shown.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
        "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class Log:
    """A line a step in metrics.jsonl, and the bar: figures, tokens a second, share of a GPU's peak (MFU)."""

    def __init__(self, trainer, progress):
        once(lambda: cut_metrics(trainer.metrics, trainer.stage, progress.step))
        first, steps = progress.step, trainer.recipe.steps
        self.bar = tqdm(range(first, steps), f"{trainer.stage:>9}", steps, initial=first, mininterval=1)
        self.trainer = trainer
        self.already = progress.tokens
        self.began = time.monotonic()
        trainer.flops = 0

    def write(self, figures, progress):
        if rank() == 0:
            with open(self.trainer.metrics, "a") as f:
                f.write(json.dumps(figures) + "\n")
        shown = {}
        for name, value in figures.items():
            if isinstance(value, float) and name != "lr":
                shown[name] = f"{value:.3f}"
        seconds = time.monotonic() - self.began
        shown["tok/s"] = f"{(progress.tokens - self.already) / seconds:.0f}"
        if self.trainer.peak:                              # this process' GPU, without sampling
            shown["MFU"] = f"{self.trainer.flops / seconds / self.trainer.peak:.1%}"
        self.bar.set_postfix(shown, refresh=False)


def cut_metrics(file, stage, first):
    """Lines that a killed run wrote after its last checkpoint are written again: drop them."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        if not line.endswith("}"):                         # torn when it was killed
            continue
        figures = json.loads(line)
        if figures["stage"] != stage or figures["step"] < first:
            kept.append(line + "\n")
    write_atomic(file, lambda p: p.write_text("".join(kept)))


def peak_of(device):
    """Operations a second of this GPU; 0 of an unknown one and of a CPU."""
    if device != "cuda":
        return 0
    name = torch.cuda.get_device_name()
    return next((peak for card, peak in PEAK.items() if card in name), 0)


def train_flops(model, batch):
    """Operations of one forward and backward pass, 3 × 2 per multiplication: 6·weights·tokens, and 6·(width
    of a key + of a value) per layer, head and pair (query, key) that the mask lets meet. Recomputed
    activations do not count."""
    cfg, visual, valid = model.cfg, model.visual, batch["valid"]
    patches = len(batch["patches"])

    # Weights: decoder layers per token, the last MLP and the output head per answer token, tower per patch,
    # mergers per token.
    tokens = int(valid.sum())
    answers = int(batch["answer"].sum())
    last_mlp = matrix_weights(model.language_model.layers[-1].mlp)
    out = (matrix_weights(model.language_model.layers) - last_mlp) * tokens
    out += (last_mlp + cfg.vocab * cfg.hidden) * answers
    out += matrix_weights(visual.patch_embed, visual.blocks) * patches
    out += matrix_weights(visual.merger, visual.deepstack_merger_list) * patches // cfg.merge ** 2

    # Attention: in the decoder what the mask lets meet, in the tower each patch with those of its frame.
    pairs = int((batch["mask"].mask[:, 0] & valid[:, :, None]).sum())
    out += (2 * cfg.head_dim + cfg.rope_width) * cfg.heads * cfg.layers * pairs
    frame_pairs = int((batch["grids"].prod(1) ** 2).sum())
    out += 2 * cfg.vision_hidden * cfg.vision_layers * frame_pairs
    return 6 * out


def matrix_weights(*modules):
    total = 0
    for module in modules:
        for p in module.parameters():
            if p.dim() > 1:
                total += p.numel()
    return total


# ------------------------------------------------------------------------- beside the loop: several processes

def sum_gradients(parameters):
    """Add up all processes' gradients. A parameter of which no process has one (a step without pictures)
    keeps none: the optimizer passes it over, as with one process."""
    grads = []
    known = []
    for p in parameters:
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads.append(grad.flatten())
        known.append(float(p.grad is not None))
    flat = torch.cat(grads)                                # one message, not one a tensor
    known = torch.tensor(known).to(flat)
    dist.all_reduce(flat)
    dist.all_reduce(known)
    parts = flat.split(list(map(len, grads)))
    for p, part, holders in zip(parameters, parts, known.tolist()):
        p.grad = part.view_as(p) if holders else None


# FSDP2 (--fsdp): of each decoder layer, and of all the rest together, a process holds its share of the
# weights, gradients and optimizer state; the whole weights are there while the layer computes. fp32, as
# without: autocast casts.

def shard_model(model, device):
    """Spread the model over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device, (world(),))
    for layer in model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor):
    """A tensor that FSDP shards → all of it (every process must call it). Any other value: itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_of(value, like):
    """A whole tensor → this process' shard, if `like` is sharded and of its shape. Other values: itself."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, Replicate
    replicated = DTensor.from_local(value.to(like.device), like.device_mesh, [Replicate()], run_check=False)
    return replicated.redistribute(placements=like.placements)


def unsharded(state):
    """A state_dict → the same with whole tensors; sharded ones on process 0 alone, in its CPU's memory."""
    if isinstance(state, dict):
        return {key: unsharded(value) for key, value in state.items()}
    if isinstance(state, list):
        return [unsharded(value) for value in state]
    tensor = whole(state)
    if tensor is state:
        return state
    return tensor.cpu() if rank() == 0 else None


def even_jobs(trainer, jobs):
    """With FSDP all processes go through the same modules together. So that each has equally many batches,
    some are repeated with weight 0; if any has a picture, a batch without gets a blank one, which stands for
    no token."""
    counts = gather(len(jobs))
    need(min(counts),
         f"{trainer.stage}: a process found no readable video for its share of a step; give more --packs")
    cfg = trainer.model.cfg
    blank = {"patches": torch.zeros(cfg.merge ** 2, 6 * cfg.patch ** 2, dtype=torch.uint8),
             "grids": torch.full((1, 2), cfg.merge)}
    pictures = [len(job.batch["patches"]) for job in jobs]
    if any(gather(any(pictures))):
        jobs = list(jobs)
        for i, job in enumerate(jobs):
            if not pictures[i]:
                jobs[i] = job._replace(batch=job.batch | blank)
    return jobs + [jobs[0]._replace(weight=0.0)] * (max(counts) - len(jobs))


# -------------------------------------------------------------------------------- beside the loop: optimizers

def optimizers(model, recipe):
    """AdamW; with recipe.muon, Muon for the weight matrices inside the blocks (it learns the toy's shapes
    about four times faster) and AdamW for the rest: embeddings, projector, norms, biases."""
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if recipe.muon and takes_muon(name, p):
            matrices.append(p)
        elif p.dim() >= 2:
            tables.append(p)
        else:
            vectors.append(p)
    groups = []
    if tables:
        groups.append({"params": tables, "weight_decay": recipe.weight_decay})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    # β₂ = .98, not .999: a stage of some hundred steps is over before a longer memory has settled
    out = [torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)]
    if matrices:
        out.append(Muon(matrices, recipe.muon, recipe.weight_decay))
    return out


def takes_muon(name, parameter):
    """Weight matrices inside the blocks go to Muon, with one moment each (extras/memory.py asks too)."""
    return parameter.dim() == 2 and ("layers." in name or "blocks." in name)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): Nesterov momentum, each matrix made orthogonal by five Newton-Schulz steps.

        X ← X / ‖X‖,  then five times  X ← a X + (b G + c G²) X,  G = X Xᵀ        all singular values go to
        about 1

    torch.optim.Muon (2.9 on) takes these steps in bf16 alone: on a CPU without bf16 arithmetic, as most
    laptops have, six seconds for the tiny model where fp32 takes 0.1."""

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_of(p, group)

    def step_of(self, p, group):
        average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - group["momentum"])
        x = whole(p.grad.lerp(average, group["momentum"]))                   # FSDP: on every process
        rows, columns = p.shape
        if rows > columns:
            x = orthogonal(x.mT).mT                                          # G of the shorter side
        else:
            x = orthogonal(x)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(shard_of(x, p), alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(x):
    """(m,n), m ≤ n → nearly orthogonal rows. a, b, c are Muon's: they lift small singular values fastest."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)          # b G + c G²
        x = torch.addmm(x, polynomial, x, beta=a)
    return x


# -------------------------------------------------------------------- GQA → M²LA: what CPT begins with (§3.2)

# Video has most of the calibration: the gains of the RoPE part depend on distances, and texts are short.
CALIBRATION_MIX = {"cpt_text.jsonl": 0.1, "cpt_image.jsonl": 0.1, "cpt_video.jsonl": 0.8}
CALIBRATION_STEPS = 4                # of 32 packs: toy 30,000 tokens of text, 1,900 of vision; 10 a rank are needed
CALIBRATION_PACKS = 32
JUDGED = 2 ** 27                     # log-probabilities of the source that are kept to judge by: half a GB
HEAL_PACKS = 2                       # a step and process: each is read by two models


@torch.no_grad()
def convert(model, data, args):
    """GQA → M²LA (§3.2) → cached values, relative to GQA's.

    Sum second moments of each layer's queries, keys and values: all that its new maps are computed from.
    Choose ranks by the damage of cutting one layer and modality at a time; rebuild; heal if the damage of all
    passes `ConvertSpec.tolerance` (healing turns gradients on by itself). The number of a step draws its
    packs: the first ones calibrate, the next one judges, those after it heal."""
    layers = model.language_model.layers
    released = args.attn == "released"
    spec = spec_of(FOLDABLE if released else {}, layers[0].self_attn, args.cache_share)
    recipe = replace(STAGES["cpt"].recipe, packs=args.packs or CALIBRATION_PACKS)

    # Calibration: second moments of keys, values and queries.
    def calibration_batches():
        for step in tqdm(range(CALIBRATION_STEPS), desc="  convert"):
            yield from data.batches(step, recipe)
    calibration = calibrate(model, calibration_batches(), raw=released)

    # Damage: the KL from the source's predictions on other packs, as many as fit into memory.
    def predict(batch):
        return answer_forward(model, batch_to(batch, args.device)).logits.log_softmax(-1)         # (n,V)
    judges = []
    size = 0
    for pack in data.packs(CALIBRATION_STEPS, recipe):
        size += int(pack.answer.sum()) * model.cfg.vocab
        if judges and size > JUDGED:
            break
        judges.append(collate_packs([pack]))
    own_damage = divergence(predict, judges)               # a function: KL of the model as it is when called

    # Conversion, and healing on packs that are drawn only if they are needed.
    def damage():
        return float(np.mean(gather(own_damage())))

    def healing_batches():
        for step in itertools.count(CALIBRATION_STEPS + 1):
            packs = data.packs(step, replace(recipe, packs=HEAL_PACKS * world()))
            if packs:
                yield collate_packs(packs)
    spec = convert_layers(layers, calibration.moments, spec, damage, predict, healing_batches())
    ranks = tuple(map(spec.layer_ranks, range(len(layers))))
    model.cfg = replace(model.cfg, attn=args.attn, rope_width=spec.rope_width, ranks=ranks)
    if released:
        for layer in layers:
            layer.self_attn = layer.self_attn.fold()
    return cache_ratio(spec, calibration.modules, calibration.moments[0].count.tolist())


def convert_stage(model, processor, args, start, data, held, loss_before):
    """GQA → M²LA into --out/convert, held-out loss before and after; a broken conversion stops here."""
    need(held, "--data: has one video (or eight texts) only, none can be held out to measure by; give --val "
         "F.jsonl")
    if not args.data:
        stage_data = data
        data = Data(args.data_dir, CALIBRATION_MIX, processor, args.seed, "convert")
        data.skipped = stage_data.skipped                  # counted together
    ratio = convert(model, data, args)
    loss_after = loss_on(model, processor, held)
    print(f"convert: {ratio:.0%} of the cache, ranks (text, vision) {' '.join(map(str, model.cfg.ranks))}; "
          f"held-out loss {loss_before:.4f} → {loss_after:.4f} nats")
    need(loss_after < loss_before + args.max_damage,
         f"convert: the held-out loss rose by {loss_after - loss_before:.3f} nats, more than --max-damage "
         f"{args.max_damage}; calibrate on more data or raise the ranks")

    def leave():
        directory = args.out / "convert"
        forget(directory)
        save_model(directory, model, processor.tokenizer)
        record = {"cache_ratio": ratio, **converted_as(start, args)}         # last: start_of looks for it
        write_atomic(directory / "stage.json", lambda p: p.write_text(json.dumps(record)))
    once(leave)


def converted_as(start, args):
    """What the conversion of `start` leaves in convert/stage.json beside its figures."""
    written = {}
    for path in sorted(start.iterdir()):
        if path.name in ("config.json", "weights.pt") or path.suffix == ".safetensors":
            written[path.name] = path.stat().st_mtime_ns
    return {"inherits": str(start), "attn": args.attn, "cache_share": args.cache_share, "seed": args.seed,
            "data": [str(path.resolve()) for path in args.data or ()], "max_frames": args.max_frames,
            "packs": args.packs, "written": written}


def held_out(args, data, recipe):
    """[Drawn] that CPT does not see: of --val, of the toy's val.jsonl, or one video in twenty of --data."""
    if args.data and not args.val:
        return data.hold_out()
    return [val_rows(args, "cpt", recipe)]


def loss_on(model, processor, held):
    """Mean nats per answer token."""
    tables = []
    with autocast(model.device.type):
        for rows, root in held:
            tables.append(evaluation.held_out_loss(model, processor, rows, root)[1])
    nats, tokens = np.concatenate(tables).sum(0)
    return float(nats / max(1.0, tokens))


# -------------------------------------------------------------------------------------------- chain of stages

# Flags that stand for a field of the recipe.
OVERRIDES = ("steps", "lr", "muon", "packs", "branches", "tokens", "max_frames", "max_new", "temperature",
             "pool", "group", "updates", "format", "clip", "kl", "kl_form")


def recipe_of(stage, args, parameters):
    """The stage's recipe with the command's flags, for a model of so many parameters."""
    recipe = STAGES[stage].recipe
    if args.quick:
        recipe = replace(recipe, **QUICK.get(stage, {}))
    if parameters > 1e7:
        recipe = replace(recipe, **SMALL)
    if parameters > 1e8:
        recipe = replace(recipe, **STAGES[stage].large)

    changes = {}
    for name in OVERRIDES:
        value = getattr(args, name)
        if value is not None:
            changes[name] = tuple(value) if name == "clip" else value
    if args.lr:
        changes["lr_min"] = recipe.lr_min * args.lr / recipe.lr
    if args.data:
        changes["mix"] = {str(path.resolve()): 1.0 for path in args.data}
        changes["replay"] = {}
    if args.without:
        changes["mix"] = {name: share for name, share in recipe.mix.items() if name not in args.without}
        need(changes["mix"] and set(args.without) <= set(recipe.mix),
             f"--without {' '.join(args.without)}: {stage} has {', '.join(recipe.mix)}, and needs one of "
             "them")
    return replace(recipe, **changes)


def start_of(stage, args):
    """The checkpoint a stage begins with: --init, or the one that the stage before left in --out. CPT does
    not convert again what it has converted."""
    start = find_model(args.init, "--init") if args.init else args.out / STAGES[stage].after
    need((start / "config.json").is_file(),
         f"{args.out}: has no finished '{start.name}' for '{stage}'; run it first or give --init DIR")
    record = args.out / "convert/stage.json"
    if STAGES[stage].converts and record.is_file():
        if converted_as(start, args).items() <= read_json(record).items():
            return record.parent
    return start


def data_of(stage, recipe, processor, args):
    """The stage's own data."""
    data = Data(args.data_dir, recipe.mix, processor, args.seed, stage, recipe.steps, recipe.fps,
                recipe.max_frames)
    if STAGES[stage].on_policy:
        data.keep(lambda row: row["task"] in evaluation.TASKS)                # tasks with a rule
        need(len(data.sources) == len(recipe.mix),
             f"--data: this stage needs rows of the tasks {', '.join(evaluation.TASKS)} in each file")
    return data


def run_stage(name, args):
    """Train one stage and leave its checkpoint in --out/<stage>."""
    need(world() > 1 or not args.fsdp, "--fsdp: needs several processes, by torchrun or --jobs N")
    stage = STAGES[name]
    start = start_of(name, args)
    model, processor = load_model(start, args.device)
    size = sum(p.numel() for p in model.parameters())
    recipe = recipe_of(name, args, size)
    print(f"{name}: starts from {start} ({model.cfg.attn}, {size / 1e6:.2f} M parameters)")
    if CURATED in recipe.mix:
        once(lambda: curate(start, args))
    data = data_of(name, recipe, processor, args)

    # CPT: convert, and measure what that and the training do to rows which neither sees.
    held = held_out(args, data, recipe) if stage.converts else []
    converts = stage.converts and model.cfg.attn == "gqa" and args.attn != "gqa"
    loss_before = None
    if held and (converts or args.data):
        loss_before = loss_on(model, processor, held)
    if converts:
        convert_stage(model, processor, args, start, data, held, loss_before)
        start = args.out / "convert"
    kind = model.cfg.attn
    need(kind == args.attn, f"{start}: its attention is {kind}; run --stage cpt first or give --attn {kind}")

    stage.train(Trainer(model, processor, recipe, name, args, start), data)
    if held and args.data:
        print(f"{name}: held-out loss {loss_before:.4f} → {loss_on(model, processor, held):.4f} nats")
    skipped = sum(gather(data.skipped), Counter())
    if skipped:
        print(f"{name}: skipped {skipped.total()} draws of unreadable videos; first: {next(iter(skipped))}")


def curate(start, args):
    """§4.2.1's long-video data: questions about some long toy videos, from the starting model's captions."""
    if (args.data_dir / CURATED).is_file():
        return
    command("data/curate/prepare.py", args.data_dir / "clips" / "long",
            "--out", (args.data_dir / CURATED).parent, "--model", start, "--seed", args.seed,
            "--limit", 3 if args.quick else 12)            # videos: a minute of captions


# ------------------------------------------------------------------------------------------- the whole recipe

def whole_recipe(args):
    """Every stage in order. Each is evaluated on test items that no stage has seen, and its row is printed at
    once. The tables come last."""
    clock = Clock(args)
    with clock.part("data", begun=args.data_dir.exists()):
        once(lambda: command("data/toy/prepare.py", "--out", args.data_dir, "--seed", args.seed,
                             "--scale", args.scale, "--side", frame_side(args.preset)))
        once(lambda: make_base(args))
        scores = {"base": scores_of("base", args)}
    results = {"quick": args.quick, "base": stage_block(scores["base"]), "changes": {}}
    before = "base"
    for stage in CHAIN:
        with clock.part(stage, begun=(args.out / stage).exists()):
            if not finished(stage, args):
                run_stage(stage, args)
            if stage == "cpt" and args.attn != "gqa":
                add_stage("convert", before, scores, results, args)
                before = "convert"
            add_stage(stage, before, scores, results, args)
        before = stage
    with clock.part("agent", begun=(args.out / "opd/agent.json").exists()):
        scores["teacher"] = scores_of("teacher", args)
        results["teacher"] = stage_block(scores["teacher"])
        add_conclusions(scores, results, args)
    text = json.dumps(results, indent=1)
    once(lambda: write_atomic(args.out / "results.json", lambda p: p.write_text(text)))
    if not args.quick:
        once(lambda: bench_decode(args.out / "decode.json"))
    once(lambda: succeeds("extras/report.py", args.out))   # one that cannot be drawn must not fail the run
    print(f"\n{args.out}/results.json and results.md written; {clock.minutes():.1f} minutes in this run")


def frame_side(preset):
    """Pixels of the toy's square frames: one for each place of the vision tower's position table."""
    cfg = Config.preset(preset)
    side = cfg.pos_side * cfg.patch
    need(32 <= side <= 1024 and side % 32 == 0 and side % (cfg.patch * cfg.merge) == 0,
         f"--preset {preset}: its vision tower is made for frames of {side} pixels (pos_side × patch); the "
         "toy world draws 32, 64, … 1024")
    return side


def make_base(args):
    """The shipped base and teacher as stages of this run; --base scratch trains them (an hour, 2 cores)."""
    if args.base == "scratch":
        command("data/toy/pretrain.py", "--out", args.out, "--seed", args.seed, "--preset", args.preset)
        return
    for name in ("base", "teacher"):
        if not (args.out / name / "config.json").is_file():
            shipped = Path(__file__).parent / "data/toy/weights" / name
            shutil.copytree(shipped, args.out / f"{name}.tmp", dirs_exist_ok=True)
            os.replace(args.out / f"{name}.tmp", args.out / name)


def finished(stage, args):
    """Whether --out has the stage, and not of an earlier training of the stage before it."""
    directory = args.out / stage
    if not (directory / "config.json").is_file():
        return False
    kind = Config.load(directory / "config.json").attn
    need(kind == args.attn, f"{directory}: was trained with --attn {kind}; use that or another --out")
    record = read_json(directory / "stage.json")
    for name in OVERRIDES:
        value = getattr(args, name)
        was = record["recipe"].get(name)
        need(value is None or value == was,
             f"{directory}: was trained with --{name.replace('_', '-')} {was}; use that or another --out")
    before = args.out / STAGES[stage].after
    mark = mark_of(before)
    if Path(record["inherits"]).resolve() == before.resolve() and record.get("after", mark) != mark:
        print(f"{stage}: was trained before {before.name} was trained again; once more")
        return False
    return True


def scores_of(stage, args):
    """Test scores of a finished stage: {short, long, loss, nats: [nats, tokens] of each held-out row}; measured
    once and kept beside its weights."""
    def measure():
        model, processor = load_model(args.out / stage, args.device)
        rows = load_rows(args.data_dir / "val.jsonl")
        loss, table = evaluation.held_out_loss(model, processor, rows, args.data_dir, name=f"{stage} loss")
        clips = evaluation.clips_of(rows)
        scores = {"loss": loss, "loss_n": len(rows), "loss_ci": evaluation.interval(table, clips),
                  "nats": table.tolist()}
        if stage in ("base", "convert", "cpt"):            # before SFT no model knows the test's formats
            return scores
        first = stage == "sft_short"                       # the baselines are of the test alone: once
        for length in ("short", "long"):
            test = args.data_dir / f"test_{length}.jsonl"
            train = args.data_dir / f"sft_{length}.jsonl" if first else None
            # 128 rows: a dozen toy videos at a time, in .6 of the time of 32
            scores[length] = evaluation.evaluate(model, processor, test, train, seed=args.seed, blind=first,
                                                 batch_size=128, model_dir=args.out / stage)
        return scores
    return stored(args.out / stage / "scores.json", measure)


def add_stage(stage, before, scores, results, args):
    """Measure a finished stage and print it beside the baselines and the stage before it."""
    scores[stage] = scores_of(stage, args)
    if stage == "sft_short":                               # the first that can answer the test's questions
        before = "baselines"
        scores[before] = baseline_scores(scores[stage])
        results[before] = {length: scores[stage][length]["baselines"] for length in evaluation.SPLITS}
    results[stage] = stage_block(scores[stage])
    change = {"against": before, **change_of(scores[before], scores[stage], args)}
    results["changes"][stage] = change
    shown = {name: results[name] for name in ("baselines", before, stage) if name in results}
    print(f"\n{evaluation.render_stages({**shown, 'change': change})}")


def stage_block(scores):
    """A stage's scores as results.json has them: one figure, its n and its interval side by side."""
    block = {name: value for name, value in scores.items() if name.startswith("loss")}
    for length in evaluation.SPLITS:
        if length in scores:
            block[length] = evaluation.stage_figures(scores[length])
    return block


def baseline_scores(scores):
    """The strongest trivial strategies' reward of each test item, in the place of a stage's."""
    items = {}
    for length in evaluation.SPLITS:
        items[length] = {"items": {}}
        for task in evaluation.TASKS.values():
            items[length]["items"] |= scores[length]["baselines"].get(f"{task.figures[0].key}_items", {})
    return items


def change_of(before, after, args):
    """What a stage changes, item by item, as a block of results.json: the loss; from SFT on the first figure
    of each task."""
    if "short" not in after:
        rows = load_rows(args.data_dir / "val.jsonl")
        nats, tokens = np.array(after["nats"]).T
        paired = np.stack([nats - np.array(before["nats"])[:, 0], tokens], 1)             # (n,2)
        return {"loss": after["loss"] - before["loss"], "loss_n": len(rows),
                "loss_ci": evaluation.interval(paired, evaluation.clips_of(rows))}
    block = {}
    for length in evaluation.SPLITS:
        block[length] = {}
        rows = load_rows(args.data_dir / f"test_{length}.jsonl")
        for name, task in evaluation.TASKS.items():
            asked = [row for row in rows if row["task"] == name]
            if asked:
                rewards = []
                for scores in (before, after):
                    rewards.append([scores[length]["items"][row["id"]] for row in asked])
                block[length] |= evaluation.change(task.figures[0].key, *rewards, asked, args.seed)
    return block


def add_conclusions(scores, results, args):
    """What is known at the end: the conversion's settings, the gap that OPD closes, the agent."""
    if "convert" in results:
        record = read_json(args.out / "convert" / "stage.json")
        for name in ("cache_ratio", "inherits", "attn", "cache_share"):
            results["convert"][name] = record[name]
    results["opd"] |= gap_closed(scores, args)

    def agent():
        model, processor = load_model(args.out / "opd", args.device)
        rows = load_rows(args.data_dir / "test_agent.jsonl")
        return evaluation.evaluate_agent(model, processor, rows, args.data_dir, seed=args.seed)
    results["agent"] = stored(args.out / "opd" / "agent.json", agent)


def gap_closed(scores, args):
    """The share of the student-teacher gap that OPD closes. Counted are test items of the kinds of question in
    which the *training* pool showed a gap: choosing them on the test would count luck as progress."""
    kinds = read_json(args.out / "opd" / "kept.json")["kinds"]
    clips = []
    pairs = []                                          # what OPD gained and what there was to gain, per item
    for length in ("short", "long"):
        before, after, best = (scores[stage][length]["items"] for stage in ("rl", "opd", "teacher"))
        for row in load_rows(args.data_dir / f"test_{length}.jsonl"):
            if evaluation.kind_of(row) in kinds:
                item = row["id"]
                clips.append(clip_of(row))
                pairs.append((after[item] - before[item], best[item] - before[item]))
    pairs = np.array(pairs).reshape(-1, 2)
    gained = pairs[:, 0].sum()
    gap = pairs[:, 1].sum()
    if gap <= 0:
        return {}
    return {"gap_closed": float(gained / gap), "gap_closed_n": len(pairs),
            "gap_closed_ci": evaluation.interval(pairs, clips),
            "gap": float(pairs[:, 1].mean()), "gap_kinds": kinds}


def bench_decode(file):
    """Decode times for the report, once; a run that cannot measure them is complete without."""
    if file.is_file():
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")   # a token of a tiny model waits longer for a second thread
    if not succeeds("extras/bench_decode.py", "--contexts", "1024,4096,16384", "--json", file):
        print(f"no {file}: the report goes without decode times")


def succeeds(script, *flags):
    """Run another of our files, which has said what is wrong if it fails."""
    try:
        command(script, *flags)
    except SystemExit:
        return False
    return True


# ---- the time that is left

# Seconds of two cores: of a pack in a step, of a prompt in a filter, and of what grows with the toy's scale.
PACK_SECONDS = {"cpt": 0.0071, "sft_short": 0.047, "sft_long": 0.091, "rl": 0.204, "opd": 0.164}
PROMPT_SECONDS = {"rl": 0.006, "opd": 0.0043}
SCALE_SECONDS = {"data": 33, "cpt": 6, "sft_short": 19, "sft_long": 31, "rl": 10, "opd": 11, "agent": 30}
OTHER_SECONDS = {"data": 2, "cpt": 10, "report": 12}


def expected_seconds(args):
    """{part of the recipe: seconds on two cores}; empty where these figures are not known to hold."""
    if args.base == "scratch" or args.device != "cpu":
        return {}
    expected = Counter(OTHER_SECONDS)
    for part, seconds in SCALE_SECONDS.items():
        expected[part] += seconds * args.scale
    for stage in CHAIN:
        recipe = recipe_of(stage, args, 0)
        expected[stage] += PACK_SECONDS[stage] * recipe.packs * recipe.steps
        if stage in PROMPT_SECONDS:
            prompts = min(recipe.pool, STAGES[stage].recipe.pool * args.scale)       # no more are there
            expected[stage] += PROMPT_SECONDS[stage] * prompts
    return expected


class Clock:
    """Says after each part how many minutes are left: the expected ones, times seconds taken by expected
    seconds of the parts done so far. A part that an earlier run began is not timed."""

    def __init__(self, args, now=time.monotonic):
        self.now = now
        self.began = now()
        self.file = args.out / "seconds.json"              # for a resumed run: {part: seconds that it took}
        self.taken = read_json(self.file) if self.file.is_file() else {}
        self.expected = expected_seconds(args)
        last = {"data": "base/scores.json", "agent": "opd/agent.json", "report": "report.html"}
        self.left = []                                     # parts whose last file is not there yet
        for part in self.expected:
            if not (args.out / last.get(part, f"{part}/scores.json")).is_file():
                self.left.append(part)

    @contextmanager
    def part(self, name, begun):
        """`with clock.part(name, begun):` a part of the recipe. begun: an earlier run began it."""
        start = self.now()
        yield
        if not begun and rank() == 0:                      # the others may have found what this one began
            self.taken[name] = round(self.now() - start, 1)
            write_atomic(self.file, lambda p: p.write_text(json.dumps(self.taken)))
        if name in self.left:
            self.left.remove(name)
        print(f"\n{name}: done, {self.minutes():.1f} minutes in this run{self.about()}", flush=True)

    def minutes(self):
        return (self.now() - self.began) / 60

    def about(self):
        """', about 7 more'; "" if nothing is known yet."""
        expected = sum(self.expected.get(part, 0) for part in self.taken)
        if not self.left or not expected:
            return ""
        pace = sum(self.taken.values()) / expected
        minutes = pace * sum(self.expected[part] for part in self.left) / 60
        return f", about {max(1, minutes):.0f} more"


# ------------------------------------------------------------------------------------------------ the command

def parser_of(about):
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to run").add_argument
    stages = dict.fromkeys(re.sub("_(short|long)$", "", name) for name in STAGES)
    add("--stage", choices=list(stages), help="one stage; without it the whole recipe, tiny")
    add("--quick", action="store_true", help="the whole recipe in five minutes: fewer steps, prompts and videos "
        "(default --out runs/quick)")
    add("--phase", choices=["short", "long"], default="short", help="of --stage sft")
    add("--attn", choices=["m2la", "gqa", "released"], default="m2la",
        help="attention; gqa: without conversion; released: the authors' linear layer, which save_hf writes")
    add("--out", type=Path,
        help="run directory: a directory per stage, metrics, results (default runs/PRESET)")
    add("--init", help="start from this checkpoint directory, ours or Hugging Face's, instead of the stage "
        "before in --out")
    add("--teacher", help="opd: teacher's directory (default: --out/teacher)")
    add("--preset", choices=list(PRESETS), default="tiny", help="size of the whole recipe: tiny, small for "
        "one GPU (frames of 224 pixels, 65 M parameters), or another of iv3.PRESETS")
    add("--base", choices=["shipped", "scratch"],
        help="where base and teacher come from (default: shipped, of tiny)")

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", type=Path, metavar="F.jsonl",
        help="train on these files instead of the recipe's mix")
    add("--without", nargs="+", default=(), metavar="F.jsonl", help="leave files out of the recipe's mix")
    add("--max-frames", type=int, help="at most so many frames of a video (default: what the rows say)")
    add("--val", type=Path, metavar="F.jsonl", help="held-out rows, of cpt and of --eval-every (default: "
        "val.jsonl of --data-dir; cpt with --data: one video in twenty of it, which is not trained on)")
    add("--data-dir", type=Path, help="directory of the toy data (default: --out/data)")
    add("--scale", type=float, help="toy data: multiplies the number of videos (default 1; --quick: "
        f"{QUICK_SCALE:g})")

    training_flags(parser)

    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--teacher-device", help="opd: where the teacher is, cpu, cuda or cuda:1 (default: --device)")
    add("--workers", type=int, default=0,
        help="processes that prepare training batches (default 0: in this one)")
    add("--jobs", type=int, help="processes that share each step (default: the CPU's cores, at most 4; with "
        "a GPU 1, there `torchrun --nproc_per_node=N train.py` starts them)")
    add("--fsdp", action="store_true",
        help="cpt, sft: spread weights, gradients, optimizer state over the processes")
    add("--save-every", type=float, default=20, help="seconds between checkpoints of a running stage")
    return parser


def training_flags(parser):
    add = parser.add_argument_group("training; without a flag the recipe decides").add_argument
    add("--steps", type=int, help="steps of the stage")
    add("--lr", type=float, help="peak learning rate")
    add("--muon", type=float, help="learning rate of Muon for weight matrices (0: AdamW for everything)")
    add("--packs", type=int, help="videos per step, of the conversion's calibration too (its default: 32)")
    add("--branches", type=int, help="questions per video")
    add("--tokens", type=int, help="padded tokens of one forward; a larger step is accumulated")
    add("--checkpointing", action="store_true",
        help="recompute activations in the backward pass: less memory")
    add("--freeze", default="", help="parts that are not trained: vision,projector")
    add("--eval-every", type=int, default=0, metavar="N", help="score held-out rows every N steps and at the "
        "end, keep the best in <stage>/best: by loss, in rl and opd by reward (default 0: never)")

    add = parser.add_argument_group("conversion").add_argument
    add("--cache-share", type=float, default=0.5, help="cache bytes that are left of GQA's (default 0.5)")
    add("--max-damage", type=float, default=0.3, help="largest rise of the held-out loss, nats")

    add = parser.add_argument_group("rl, opd; without a flag the recipe decides").add_argument
    add("--max-new", type=int, help="at most so many tokens of a sampled answer (default: 24; from 100 M "
        "parameters on 256)")
    add("--temperature", type=float, help="of the sampled answers")
    add("--pool", type=int, help="prompts that the data filter looks at")
    add("--group", type=int, help="rl: answers per prompt")
    add("--updates", type=int, help="rl: optimizer steps per rollout")
    add("--format", type=float, metavar="BONUS",
        help="rl: reward of an answer that a rule can read, right or wrong")
    add("--clip", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="rl: clip range of the sequence ratio, below and above 1")
    add("--kl", type=float, metavar="WEIGHT", help="rl: of the KL to the model that it starts from")
    add("--kl-form", choices=["full", "sampled"],
        help="opd: reverse KL over the vocabulary (default) or, the paper's form, of sampled tokens")


def check(args):
    """Say what is wrong with the flags, fill in what was left open → the stage; None: the whole recipe."""
    check_flags(args, {0: "muon workers save_every seed eval_every format kl",
                       1: "steps packs branches tokens max_new jobs updates pool",
                       2: "max_frames group"})       # frames come in pairs; one answer has no other beside it
    need(args.lr is None or 0 < args.lr < 1, f"--lr {args.lr}: must be between 0 and 1")
    need(args.temperature is None or args.temperature > 0,
         f"--temperature {args.temperature}: must be above 0")
    if args.clip:
        low, high = args.clip
        need(0 < low < 1 and 0 < high, f"--clip {low} {high}: must be above 0, the first below 1")
    need(0 < args.cache_share < 1, f"--cache-share {args.cache_share}: must be between 0 and 1")
    args.freeze = [part for part in args.freeze.split(",") if part]
    need(set(args.freeze) <= set(PARTS), f"--freeze {','.join(args.freeze)}: parts are {', '.join(PARTS)}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        numbered = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        devices += ["cuda", *numbered]
    for name in ("device", "teacher_device"):
        value = getattr(args, name)
        need(value in (*devices, None),
             f"--{name.replace('_', '-')} {value}: PyTorch sees {', '.join(devices)} here")
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")         # TF32 where autocast leaves fp32

    args.base = args.base or ("shipped" if args.preset == "tiny" else "scratch")
    need(args.base == "scratch" or args.preset == "tiny", "--base shipped: is of --preset tiny")
    need(args.preset == "tiny" or not args.quick, "--quick: is of --preset tiny")
    if args.scale is None:
        args.scale = QUICK_SCALE if args.quick else 1.0
    args.out = args.out or Path("runs") / ("quick" if args.quick else args.preset)
    args.data_dir = args.data_dir or args.out / "data"
    stage = args.stage
    if f"{stage}_{args.phase}" in STAGES:
        stage = f"{stage}_{args.phase}"
    need(not args.without or stage and not args.data,
         "--without: leaves files out of a --stage's own mix, not --data")
    need(args.eval_every or stage and STAGES[stage].converts or not args.val,
         "--val: is for --stage cpt and for --eval-every N")
    return stage


def keep_memory():
    """glibc gives large blocks that are freed back to the system; a step asks for the same again, and pages
    that are new have to be cleared: 5 % of its time."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):            # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 2 ** 25)                      # M_MMAP_THRESHOLD: blocks of their own from 32 MB on
            libc.mallopt(-1, 2 ** 31 - 1)                  # M_TRIM_THRESHOLD: free memory that is kept


def main():
    keep_memory()
    args = parser_of(__doc__).parse_args()
    stage = check(args)
    need(not args.fsdp or stage and not STAGES[stage].on_policy,
         "--fsdp: for --stage cpt or sft; rl and opd sample answers, which needs all weights at each token")
    need(stage or not (args.eval_every or args.init), "--eval-every and --init: need --stage")
    if stage is None:
        frame_side(args.preset)                            # a preset that the toy cannot serve speaks now
    if args.eval_every:
        val_rows(args, stage, STAGES[stage].recipe)     # a mistake in it speaks now, not after the conversion
    need(not (args.fsdp and args.eval_every),
         "--fsdp: without --eval-every; score the finished stage with eval.py")

    jobs = args.jobs or (min(4, os.cpu_count()) if args.device == "cpu" else 1)
    stages = [stage] if stage else CHAIN
    packs = min(recipe_of(name, args, 0).packs for name in stages)
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
