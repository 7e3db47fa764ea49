"""InternVideo3's model: a Qwen3-VL backbone whose attention is GQA (the source) or M²LA (§3.2).

Reading order: configuration → vision tower → decoder → video in → tokenizer and chat template → one row of
data → generation → checkpoints → command. The architecture is Qwen3-VL's, weight names included. Only
`self_attn` of a decoder layer changes when the model is converted; m2la.py holds both kinds, and MRoPE.

    python iv3.py runs/tiny/data/clips/test/long_0000.mp4 "What colour is the shape at 12 seconds?"
    python iv3.py talk.mp4 "What is on the slide?" --start 60 --end 90 --model DIR      ours or Hugging Face's

Shapes: B batch, T tokens, D hidden, Dv hidden of the vision tower, Dh head dim, V vocabulary, F frames, n
temporal patches (two frames each), h×w patches of one, Np patches of all videos, p side of a patch in pixels.

Differs from the paper:
 1. The paper starts from Qwen3-VL-8B. The recipe starts from a tiny model of the same architecture, which it
    trains itself; presets have the published sizes, and published checkpoints load (extras/hf.py).
 2. Frames are chosen by their real presentation time, the frame on screen every 1/fps seconds, so that a
    video of a variable rate has right timestamps. Where that is more than `max_frames`, `pairs` keeps the
    two frames of a temporal patch 1/fps apart; the paper does not say how it spreads frames.
 3. The authors' training code prefixes each video with "Video N: "; we follow Qwen3-VL's template.

Differs from transformers (4.57.3, which the authors pin; tests/test_parity.py shows that the rest is equal):
 4. Frames as in 2. transformers takes evenly spread indices and divides them by an average rate, and takes
    four at least of a short clip.
 5. `frame_tokens` of a video limits each temporal patch by itself, as Qwen's own utilities do it.
 6. Patches stay bytes until the vision tower, which normalises them; its convolution is a linear layer.
 7. A batch is padded on the right, not on the left. Placeholders of pixels are refused in texts and
    never written.
 8. Sampling knows a temperature alone, no top-k and no top-p; its noise is drawn on the CPU.
 9. Without a tokenizer.json there is a tokenizer of our own: bytes and a list of pieces, the same specials.
10. Random weights make vision tokens about as large as text embeddings, see `initial_std`.
"""
import argparse
import importlib.util
import json
import math
import os
import pickle
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import compress, groupby, islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from einops import rearrange

from m2la import GQA, M2LA, KVCache, LatentCache, Released, UserError, mrope, need, rotate

# Patches that go through the vision tower at once: what bounds its memory on a long video.
VISION_CHUNK = 2 ** 15
# Tokens that go through the layers at once where there is a cache: what bounds the memory of a long prompt.
PREFILL = 4096


class MediaError(UserError):
    """A video or image that cannot be read; data loaders skip it and count it."""


def load_file(name):
    """A file of this project outside the five, such as "extras/hf.py", as a module, loaded when needed."""
    module_name = name.removesuffix(".py").replace("/", "_")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, Path(__file__).parent / name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]


def hugging_face():
    """extras/hf.py: configs, tokenizers and safetensors in Hugging Face's layouts."""
    return load_file("extras/hf.py")


def read_json(path):
    """What a JSON file holds; UserError names a file that is no JSON."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from e


# ---------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """Sizes of the model: decoder, vision tower, attention, video in. The defaults are the preset `tiny`."""
    # decoder (Qwen3)
    vocab: int = 1024
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384
    theta: float = 1e4                       # base of RoPE's frequencies
    mrope_sections: tuple = (6, 5, 5)        # frequencies of the t, h, w axes; sum = head_dim / 2
    eps: float = 1e-6                        # of RMSNorm
    tied: bool = True                        # output head = input embedding

    # vision tower
    vision_hidden: int = 128
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 256
    patch: int = 16                          # side of a patch in pixels
    merge: int = 2                           # merge×merge patches become one vision token
    pos_side: int = 2                        # side of the learned position table, interpolated to any grid
    deepstack: tuple = (0,)                  # vision blocks whose features are added after LM layers 0, 1, …

    # attention of the decoder
    attn: str = "gqa"                        # "gqa" | "m2la" | "released": M²LA in the authors' linear form
    rope_width: int = 0                      # M²LA: P, width of the shared RoPE key
    ranks: tuple = ()                        # M²LA: per layer (R_text, R_vision)

    # size limits of what is encoded
    min_volume: int = 1024                   # a video, frames × height × width
    max_volume: int = 25_165_824
    min_pixels: int = 1024                   # an image, height × width
    max_pixels: int = 16_777_216

    # data/NAME/wording.py: how a data set words what the agent asks
    wording: str = ""

    def __post_init__(self):
        # JSON has lists; tuples compare and hash.
        self.mrope_sections = tuple(self.mrope_sections)
        self.deepstack = tuple(self.deepstack)
        self.ranks = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in self.ranks)
        self.check()

    def check(self):
        """UserError names the first field that does not fit the others."""
        if self.wording:
            file = Path(__file__).parent / "data" / self.wording / "wording.py"
            need(re.fullmatch(r"\w+", self.wording) and file.is_file(),
                 f"config wording={self.wording!r}: there is no such file in data/")

        need(self.attn in ("gqa", "m2la", "released"),
             f"config attn={self.attn!r}: use 'gqa', 'm2la' or 'released'")
        need(sum(self.mrope_sections) == self.head_dim // 2,
             f"config mrope_sections={self.mrope_sections}: must sum to head_dim/2 = {self.head_dim // 2}")
        need(self.heads % self.kv_heads == 0,
             f"config heads={self.heads}: must be a multiple of kv_heads={self.kv_heads}")

        blocks_exist = all(0 <= block < self.vision_layers for block in self.deepstack)
        need(len(self.deepstack) <= self.layers and blocks_exist,
             f"config deepstack={self.deepstack}: at most {self.layers} numbers of vision blocks, "
             f"0 to {self.vision_layers - 1}")

        if self.attn != "gqa":
            need(len(self.ranks) == self.layers and self.rope_width >= 2,
                 f"config attn={self.attn!r}: needs rope_width and {self.layers} pairs of ranks, "
                 f"one per layer; has {self.rope_width} and {len(self.ranks)}")

    @classmethod
    def preset(cls, name, **changes):
        """The sizes of PRESETS[name], with some of them changed."""
        need(name in PRESETS, f"preset {name!r} does not exist: use one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def load(cls, path):
        """A config.json of ours or of Hugging Face."""
        values = read_json(path)
        if "text_config" in values:
            return hugging_face().load_config(cls, Path(path).parent)
        need("model_type" not in values,
             f"{path}: model_type {values.get('model_type')!r}: neither Qwen3-VL nor InternVideo3")
        unknown = values.keys() - {f.name for f in fields(cls)}
        need(not unknown, f"{path}: unknown field {', '.join(map(repr, unknown))}")
        return cls(**values)


# What the published Qwen3-VL checkpoints have in common, and the tower of the two smaller ones.
_QWEN = dict(vocab=151_936, head_dim=128, kv_heads=8, theta=5e6, mrope_sections=(24, 20, 20), patch=16,
             pos_side=48, min_volume=4096, min_pixels=65_536)
_VIT_L = dict(vision_hidden=1024, vision_layers=24, vision_heads=16, vision_mlp=4096, deepstack=(5, 11, 17))

# A fork's backbone is one more entry.
PRESETS = {
    "tiny": {},
    "small": dict(
        vocab=8192, hidden=512, layers=12, heads=8, kv_heads=4, head_dim=64, mlp=1536, theta=1e6,
        mrope_sections=(12, 10, 10), vision_hidden=384, vision_layers=8, vision_heads=6, vision_mlp=1536,
        pos_side=14, deepstack=(1, 3, 5)),
    "qwen3-vl-2b": dict(_QWEN, hidden=2048, layers=28, heads=16, mlp=6144, **_VIT_L),
    "qwen3-vl-4b": dict(_QWEN, hidden=2560, layers=36, heads=32, mlp=9728, **_VIT_L),
    "qwen3-vl-8b": dict(
        _QWEN, hidden=4096, layers=36, heads=32, mlp=12288, tied=False,
        vision_hidden=1152, vision_layers=27, vision_heads=16, vision_mlp=4304, deepstack=(8, 16, 24)),
}


# ----------------------------------------------------------------------------------------------- vision tower
def run_block(block, recompute, *args, **kwargs):
    """block(...); with `recompute` its activations are not kept, the backward pass computes them again."""
    if not recompute:
        return block(*args, **kwargs)
    # There is no dropout, so there is no state of a random generator to keep.
    settings = dict(use_reentrant=False, preserve_rng_state=False)
    return torch.utils.checkpoint.checkpoint(block, *args, **settings, **kwargs)


def block_order(grid, merge):
    """Patches in the tower's order: blocks of merge×merge, row-major inside a block. (h, w, C) → (h·w, C)

    The patches of a block lie side by side, so that merging them into one token is a view."""
    return rearrange(grid, "(H a) (W b) c -> (H W a b) c", a=merge, b=merge)


class VisionBlock(nn.Module):
    """A pre-norm transformer block; attention stays inside one temporal patch."""

    def __init__(self, cfg):
        super().__init__()
        Dv = cfg.vision_hidden
        self.heads = cfg.vision_heads
        self.norm1 = nn.LayerNorm(Dv, eps=1e-6)
        self.norm2 = nn.LayerNorm(Dv, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(Dv, 3 * Dv), "proj": nn.Linear(Dv, Dv)})
        self.mlp = nn.ModuleDict({"linear_fc1": nn.Linear(Dv, cfg.vision_mlp),
                                  "linear_fc2": nn.Linear(cfg.vision_mlp, Dv)})

    def forward(self, x, cos, sin):
        """x (n, h·w, Dv), a batch of temporal patches; cos, sin (h·w, Dh/2)."""
        # Each patch attends to all of its temporal patch, without a mask: n is the batch, s = h·w a sequence.
        qkv = self.attn["qkv"](self.norm1(x))                               # (n, h·w, 3·Dv)
        q, k, v = rearrange(qkv, "n s (c H d) -> c n H s d", c=3, H=self.heads)
        q = rotate(q, cos, sin)                                             # (n, H, h·w, Dh)
        k = rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v)                       # (n, H, h·w, Dh)
        x = x + self.attn["proj"](rearrange(out, "n H s d -> n s (H d)"))

        hidden = self.mlp["linear_fc1"](self.norm2(x))
        hidden = F.gelu(hidden, approximate="tanh")
        return x + self.mlp["linear_fc2"](hidden)


class Merger(nn.Module):
    """merge×merge neighbouring patches → one token of the language model, by an MLP."""

    def __init__(self, cfg, norm_block=False):
        """norm_block: normalise a block of patches as one vector (DeepStack's mergers), not each patch."""
        super().__init__()
        self.width = cfg.vision_hidden * cfg.merge ** 2
        self.norm_block = norm_block
        self.norm = nn.LayerNorm(self.width if norm_block else cfg.vision_hidden, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, cfg.hidden)

    def forward(self, x):
        """(n, h·w, Dv) → (n·h·w/merge², D)"""
        # The patches of a block lie side by side: a view makes one vector of them.
        if self.norm_block:
            blocks = self.norm(x.reshape(-1, self.width))
        else:
            blocks = self.norm(x).reshape(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(blocks)))


class Run(NamedTuple):
    """Neighbouring temporal patches of one size, which go through the tower as a batch."""
    n: int
    h: int
    w: int


class VisionTower(nn.Module):
    """Pixels → tokens of the language model: embed patches, add positions, blocks, merge 2×2."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * 2 * cfg.patch ** 2, cfg.vision_hidden)})
        self.pos_embed = nn.Embedding(cfg.pos_side ** 2, cfg.vision_hidden)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.vision_layers))
        self.merger = Merger(cfg)
        self.deepstack_merger_list = nn.ModuleList(Merger(cfg, norm_block=True) for _ in cfg.deepstack)
        self.checkpointing = False                       # recompute activations in the backward pass

    def position_embedding(self, h, w):
        """The learned pos_side×pos_side table, interpolated to h×w, in the tower's order. → (h·w, Dv)"""
        table = rearrange(self.pos_embed.weight, "(r c) d -> 1 d r c", r=self.cfg.pos_side)
        # align_corners: the corners of the table are the corners of any grid. → (1, Dv, h, w)
        grid = F.interpolate(table, (h, w), mode="bilinear", align_corners=True)
        return block_order(grid[0].permute(1, 2, 0), self.cfg.merge)

    def rotary(self, h, w, device):
        """2-D RoPE: half of the frequencies turn by row, half by column. → cos, sin (h·w, Dh/2)"""
        half = self.cfg.vision_hidden // self.cfg.vision_heads // 2         # Dh/2
        # Dh/4 frequencies, from 1 down to nearly 1e-4 radians a patch
        exponent = torch.arange(0, half, 2, device=device).float() / half
        frequency = 1e4 ** -exponent                                        # (Dh/4,)

        # (row, column) of each patch, in the tower's order
        rows = torch.arange(h, device=device)
        columns = torch.arange(w, device=device)
        places = torch.cartesian_prod(rows, columns).view(h, w, 2)
        places = block_order(places, self.cfg.merge)                        # (h·w, 2)

        # [row · every frequency | column · every frequency]
        angles = (places[:, :, None] * frequency).flatten(1)                # (h·w, Dh/2)
        return angles.cos(), angles.sin()

    def encode_grid(self, patches, n, h, w):
        """n temporal patches of one size, (n·h·w, 3·2·p·p) uint8.
        → list: the merged tokens (n·h·w/merge², D), then as many features of each DeepStack tap."""
        # Bytes 0..255 → -1..1, as Qwen3-VL's preprocessor normalises them.
        pixels = (patches.float() / 127.5 - 1).to(self.pos_embed.weight.dtype)
        x = self.patch_embed["proj"](pixels).view(n, h * w, -1)             # (n, h·w, Dv)
        x = x + self.position_embedding(h, w)            # the same for every temporal patch
        cos, sin = self.rotary(h, w, x.device)

        deep = []
        recompute = self.checkpointing and self.training
        for i, block in enumerate(self.blocks):
            x = run_block(block, recompute, x, cos, sin)
            # DeepStack: the features of some earlier blocks too, each by a merger of its own.
            if i in self.cfg.deepstack:
                merger = self.deepstack_merger_list[self.cfg.deepstack.index(i)]
                deep.append(merger(x))
        return [self.merger(x), *deep]

    def forward(self, patches, grids):
        """patches (Np, 3·2·p·p) uint8 pixels, grids (n, 2) = (h, w) of each temporal patch.
        → list of (tokens, D): the merged tokens, then one tensor per DeepStack tap."""
        # Neighbours of one size are a batch, or several of bounded memory: attention stays inside a temporal
        # patch, so it is all the same.
        runs = []
        for (h, w), same_size in groupby(grids.tolist()):
            left = len(list(same_size))
            most = max(1, VISION_CHUNK // (h * w))
            while left > 0:
                n = min(most, left)
                runs.append(Run(n, h, w))
                left -= n

        parts = patches.split([run.n * run.h * run.w for run in runs])      # patches of each run
        outs = [self.encode_grid(part, *run) for part, run in zip(parts, runs)]
        # Per run [tokens, tap, tap, …] → per tensor of this list all runs.
        return [torch.cat(same_kind) for same_kind in zip(*outs)]


# ---------------------------------------------------------------------------------------------------- decoder
class MLP(nn.Module):
    """Qwen3's gated MLP: down(silu(gate x) · up x)."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden, cfg.mlp, bias=False)
        self.up_proj = nn.Linear(cfg.hidden, cfg.mlp, bias=False)
        self.down_proj = nn.Linear(cfg.mlp, cfg.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def attention_of(cfg, layer):
    """The attention of one decoder layer: what the conversion exchanges (§3.2)."""
    sizes = cfg.hidden, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.eps
    if cfg.attn == "gqa":
        return GQA(*sizes)
    if cfg.attn == "m2la":
        return M2LA(*sizes, cfg.rope_width, cfg.ranks[layer])
    rank, _ = cfg.ranks[layer]                           # the released layer has one rank for text and vision
    return Released(cfg.hidden, cfg.heads, cfg.head_dim, cfg.rope_width, rank)


class DecoderLayer(nn.Module):
    """A pre-norm transformer block of the language model."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.self_attn = attention_of(cfg, layer)
        self.mlp = MLP(cfg)
        self.input_layernorm = nn.RMSNorm(cfg.hidden, cfg.eps)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden, cfg.eps)

    def forward(self, x, wanted=None, **attention):
        """x (B,T,D); wanted (B,T) bool: go on with these n tokens alone, (n,D); `attention`: the further
        arguments of GQA.forward."""
        x = x + self.self_attn(self.input_layernorm(x), **attention)
        if wanted is not None:
            x = x[wanted]
        return x + self.mlp(self.post_attention_layernorm(x))


class InternVideo3(nn.Module):
    """Vision tower + decoder. `vision_ids`: the ids of the image and video placeholder tokens."""

    def __init__(self, cfg, vision_ids):
        super().__init__()
        self.cfg = cfg
        self.vision_ids = tuple(vision_ids)
        self.visual = VisionTower(cfg)
        self.language_model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(cfg.vocab, cfg.hidden),
            "layers": nn.ModuleList(DecoderLayer(cfg, layer) for layer in range(cfg.layers)),
            "norm": nn.RMSNorm(cfg.hidden, cfg.eps)})
        if not cfg.tied:
            self.lm_head = nn.Linear(cfg.hidden, cfg.vocab, bias=False)
        self.checkpointing = False                       # recompute activations in the backward pass

    @property
    def device(self):
        return self.language_model.norm.weight.device

    def init_weights(self, generator=None):
        """Random weights for pretraining: norms 1, biases 0, matrices normal with `initial_std`."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=self.initial_std(name, p), generator=generator)
            elif re.search(r"norm[12]?\.weight$", name):
                nn.init.constant_(p, 1.0)
            else:
                nn.init.constant_(p, 0.0)

    def initial_std(self, name, p):
        """Standard deviation of a weight matrix at the start of pretraining.

        Vision tokens start with about the RMS of text embeddings: with the usual tenfold larger ViT output,
        what attention writes into a vision token (its timestamp) is lost in the sum."""
        if "embed_tokens" in name or "pos_embed" in name:
            std = 0.15
        else:
            # an output about as large as the input
            std = 0.8 * p.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            # 2·layers outputs add up in the residual stream (GPT-2)
            std /= math.sqrt(2 * self.cfg.layers)
        if "merger" in name and name.endswith("linear_fc2.weight"):
            # the vision tokens themselves
            std *= 0.5
        return std

    def new_cache(self, batch, capacity, vision_capacity=None):
        """An empty cache for `batch` sequences of at most `capacity` tokens.

        An M²LA cache keeps text and vision rows apart; `vision_capacity`, when known, spares the room that
        `capacity` would reserve for each of them."""
        cfg = self.cfg
        device = self.device
        dtype = self.language_model.norm.weight.dtype
        # Under autocast keys and values come in its type ("meta" has no autocast).
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)

        like = {"dtype": dtype, "device": device}
        if cfg.attn == "gqa":
            return KVCache(cfg.layers, batch, capacity, cfg.kv_heads, cfg.head_dim, **like)
        if vision_capacity is None:
            vision_capacity = capacity
        return LatentCache(cfg.ranks, cfg.rope_width, batch, (capacity, vision_capacity), **like)

    def forward(self, ids, positions, patches=None, grids=None, mask=None, cache=None, valid=None,
                wanted=None):
        """Tokens and pixels → hidden (B,T,D) after the last norm; see `logits`. Without a cache, of the n
        tokens in `wanted` (B,T) bool alone, (n,D).

        ids (B,T), positions (3,B,T), patches (Np, 3·2·p·p) uint8 of all videos in reading order, grids (n,2).
        mask as in m2la.attend, None = causal; with a cache, valid (B,T) marks tokens that are no padding."""
        # Which tokens stand for pixels? The tower's output takes their place; M²LA caches them apart.
        vision = torch.stack([ids == i for i in self.vision_ids]).any(0)    # (B,T)
        x, deep = self.embed(ids, vision, patches, grids)
        # MRoPE: cos, sin (B,T,Dh/2) of positions t, h, w, the same for all layers. Processor.positions says
        # where a token is, m2la.mrope which frequencies turn with which axis.
        rope = mrope(positions, self.cfg.head_dim, self.cfg.theta, self.cfg.mrope_sections)
        if cache is None:
            return self.run_layers(x, deep, wanted, rope=rope, vision=vision, mask=mask)
        return self.run_cached(x, deep, rope, vision, cache, valid)

    def embed(self, ids, vision, patches, grids):
        """All tokens, those of pixels by the vision tower. → x (B,T,D), list of (B,T,D) for DeepStack"""
        x = self.language_model.embed_tokens(ids)
        if patches is None or not len(patches):
            return x, []
        tokens, *taps = self.visual(patches, grids)                         # each (vision tokens, D)
        # Placeholders are replaced in reading order, the order of the patches.
        at = vision[..., None]                                              # (B,T,1)
        x = x.masked_scatter(at, tokens.to(x.dtype))
        # DeepStack's features stand at the same places, with zeros between them.
        deep = [torch.zeros_like(x).masked_scatter(at, tap.to(x.dtype)) for tap in taps]
        return x, deep

    def run_layers(self, x, deep, wanted=None, **attention):
        """The decoder on embedded tokens. → hidden (B,T,D) after the last norm, or (n,D) of those `wanted`:
        behind the last attention no token needs the others.

        DeepStack: deep[i] (B,T,D), the features of the i-th tapped vision block at the vision tokens and 0 at
        text, is added after decoder layer i. So fine detail reaches the first layers past the tower's last
        block, and the sequence gets no longer."""
        recompute = self.checkpointing and self.training
        last = len(self.language_model.layers) - 1
        chosen = None                                    # before the last layer all tokens
        for i, layer in enumerate(self.language_model.layers):
            if i == last and wanted is not None:
                chosen = wanted
                deep = [features[chosen] for features in deep]
            x = run_block(layer, recompute, x, chosen, layer=i, **attention)
            if i < len(deep):
                x = x + deep[i]
        return self.language_model.norm(x)

    def run_cached(self, x, deep, rope, vision, cache, valid):
        """run_layers in chunks of PREFILL tokens, each of which sees what the cache holds and joins it."""
        outs = []
        for start in range(0, max(1, x.shape[1]), PREFILL):
            part = slice(start, start + PREFILL)
            part_vision = vision[:, part]
            part_valid = None if valid is None else valid[:, part]
            # The cache finds a place for each new token.
            cache.begin(part_vision, part_valid)
            # The layers write the rows there. Padding takes no part in them.
            part_rope = tuple(cache.unpad(r[:, part]) for r in rope)        # cos, sin (B,t,Dh/2)
            part_deep = [cache.unpad(d[:, part]) for d in deep]
            out = self.run_layers(cache.unpad(x[:, part]), part_deep, rope=part_rope,
                                  vision=cache.unpad(part_vision), cache=cache)
            outs.append(cache.pad(out))
            # Now the rows count as held.
            cache.commit()
        return torch.cat(outs, 1)

    def logits(self, hidden):
        """hidden (…, D) → (…, V)"""
        head = self.language_model.embed_tokens if self.cfg.tied else self.lm_head
        return F.linear(hidden, head.weight)


# --------------------------------------------------------------------------------------------------- video in
# sample_times says when to look, decode_frames gives all frames as they come, pick_frames those on the screen at
# the times, read_video their pixels, patchify patches. Not to decode most of a file is an addition, at the end.

# Times are rounded to the clock of their file; two that are less than this apart are one, in seconds.
TICK = 1e-3
# A picture of at most so many pixels is decoded by one thread: more take longer to start than they save.
SMALL = 256 * 256


@dataclass
class Video:
    """Frames that were looked at, and when each is shown."""
    frames: np.ndarray                       # (F, H, W, 3) uint8
    times: np.ndarray                        # (F,) seconds, the real presentation time of each frame


class Opened(NamedTuple):
    """A media file that is open."""
    container: av.container.InputContainer
    stream: av.video.stream.VideoStream      # its first video stream
    origin: float                            # where its clock starts, in seconds; players call this moment 0

    def seconds(self, ticks):
        """A time of the stream → seconds from the start of the file, to the bit as PyAV has frame.time."""
        base = self.stream.time_base
        return ticks * base.numerator / base.denominator - self.origin


class Shown(NamedTuple):
    """A decoded frame and the time it is on the screen, in seconds from the start of the file."""
    frame: av.VideoFrame
    since: float
    until: float                             # when the next frame comes; infinity for the last one


@contextmanager
def open_media(path):
    """`with open_media(path) as opened`; what fails inside becomes a MediaError with the file's name."""
    need(Path(path).is_file(), f"{path}: no such file", MediaError)
    trouble = "not a readable video"
    try:
        with av.open(str(path)) as container:
            trouble = "broken video data"
            need(container.streams.video, f"{path}: has no video stream", MediaError)
            origin = (container.start_time or 0) / av.time_base
            yield Opened(container, container.streams.video[0], origin)
    except av.FFmpegError as e:
        raise MediaError(f"{path}: {trouble} ({e})") from e


def probe(path):
    """Duration of a video file in seconds, from its header."""
    with open_media(path) as (container, stream, origin):
        if stream.duration:
            end = (stream.start_time or 0) + stream.duration                # in ticks of the stream
            return float(end * stream.time_base) - origin
        need(container.duration,
             f"{path}: the file does not say how long it is; remux it (ffmpeg -i … -c copy)", MediaError)
        return container.duration / av.time_base


@lru_cache(None)
def video_seconds(path):
    """`probe`; NaN if the file cannot be read: its row counts as wrong further on, so no error here."""
    try:
        return probe(path)
    except MediaError:
        return math.nan


def sample_times(start, end, fps, max_frames=None, pairs=False):
    """Seconds to look at in [start, end): every 1/fps; if that is too many, max_frames spread evenly.

    `pairs`: spread pairs that are 1/fps apart instead, so that a temporal patch (two frames) never holds two
    unrelated moments:

        evenly     |   |   |   |   |   |   |   |
        pairs      ||      ||      ||      ||                                  → (F,) float64
    """
    # 1e-6: 3.0000001 s at 1 fps are three frames, not four
    count = max(1, math.ceil((end - start) * fps - 1e-6))
    if max_frames is None or count <= max_frames:
        return start + np.arange(count) / fps
    if not pairs:
        return np.linspace(start, end - 1 / fps, max_frames)

    # n parts of equal length; the pair around the centre of each, its first time a whole number of 1/fps
    n = max(1, max_frames // 2)
    centre = start + (np.arange(n) + 0.5) * (end - start) / n
    first = np.floor((centre - 0.5 / fps) * fps + 1e-6) / fps
    return np.stack([first, first + 1 / fps], 1).reshape(-1)


def decode_frames(path, start, wanted=None):
    """Yield (time, frame) from the key frame before `start` seconds on, or from the beginning of the file: all
    frames, or with `wanted` times those of `decode_sparsely`.

    A seek may land behind `start` where a format has no index (MPEG-TS): then the file is read as a whole."""
    attempts = [True, False] if start > 0 else [False]
    for seek in attempts:
        with open_media(path) as opened:
            stream = opened.stream
            small = stream.width * stream.height <= SMALL
            stream.thread_type = "NONE" if small else "AUTO"
            # A program stream (.mpg) has no time for most frames: they are counted from its beginning.
            seek = seek and opened.container.format.name != "mpeg"
            if seek:
                ticks = int((start + opened.origin) / stream.time_base)
                opened.container.seek(ticks, stream=stream, backward=True)
            if wanted is None:
                frames = ((frame.time - opened.origin, frame) for frame in opened.container.decode(stream))
            else:
                frames = decode_sparsely(opened, wanted, gap=seek)
            for now, frame in frames:
                if seek and now > start + TICK:
                    break                                # behind: the next attempt
                seek = False                             # it landed well
                yield now, frame
            else:
                return


def shown_frames(path, start, wanted=None):
    """Yield Shown for every frame of `decode_frames`: its end is known when the next one is decoded."""
    frame = None
    since = None                                         # when `frame` came on the screen
    for until, following in decode_frames(path, start, wanted):
        if frame is not None:
            yield Shown(frame, since, until)
        frame = following
        since = until
    if frame is not None:
        yield Shown(frame, since, math.inf)


def pick_frames(path, frames, wanted, limit):
    """Of `shown_frames`, those on the screen at the wanted times: yield one Shown for each time.

    Raises MediaError where the file is cut off, and at the `limit` (time.monotonic)."""
    count = 0                                            # wanted times whose frame is found
    for shown in frames:
        need(time.monotonic() <= limit,
             f"{path}: decoding takes too long; read a shorter window or raise deadline", MediaError)
        if shown.until == math.inf:
            # The last frame stays on the screen, a second and a twentieth of the film at most: where more is
            # wanted, the file has lost its end.
            frame = shown.frame
            duration = probe(path)
            last = shown.since + float((frame.duration or 0) * frame.time_base)
            need(wanted[-1] <= last + 1 + 0.05 * duration,
                 f"{path}: the pictures end at {last:.1f} s of {duration:.1f} s; is the file cut off?",
                 MediaError)
        # Every time that is wanted before the next frame comes sees this frame.
        while count < len(wanted) and wanted[count] + TICK < shown.until:
            yield shown
            count += 1
        if count == len(wanted):
            return
    need(count > 0, f"{path}: no frame could be decoded", MediaError)


def watch(path, start=None, end=None, fps=2.0, max_frames=None, pairs=False, deadline=None):
    """Yield the Shown on the screen at each of the `sample_times` of [start, end) seconds; see `read_video`."""
    duration = probe(path)
    start = max(0.0, start or 0.0)
    end = duration if end is None else min(end, duration)
    need(fps > 0 and end > start,
         f"{path}: nothing to read in {start:g}–{end:g} s at {fps:g} fps (the video has {duration:.1f} s)",
         MediaError)
    wanted = sample_times(start, end, fps, max_frames, pairs)               # (F,) ascending
    if deadline is None:
        deadline = 60 + end - start
    limit = time.monotonic() + deadline

    count = 0
    try:
        for shown in pick_frames(path, shown_frames(path, wanted[0], wanted), wanted, limit):
            yield shown
            count += 1
    except MediaError:
        # The plain way, which also says what is wrong with a file.
        everything = pick_frames(path, shown_frames(path, start), wanted, limit)
        yield from islice(everything, count, None)       # after those that are out


def read_video(path, start=None, end=None, fps=2.0, max_frames=None, pairs=False, deadline=None):
    """The frames on screen at `sample_times` of [start, end) seconds, with their real times; keeps no others.

    Raises MediaError (missing, broken, cut off, empty window, slower than `deadline` seconds, by default a
    minute and the length of the window). Where frames are wanted seldom, most of the file is not decoded, and
    damage there goes unnoticed."""
    pixels = []                                          # (H, W, 3), one per wanted time
    times = []                                           # when each came on the screen
    reformatter = VideoReformatter()
    last = None                                          # one frame may be on the screen at several times
    for shown in watch(path, start, end, fps, max_frames, pairs, deadline):
        if shown is not last:
            picture = upright(shown.frame, reformatter)
        last = shown
        pixels.append(picture)
        times.append(shown.since)
    return Video(np.stack(pixels), np.array(times, np.float64))


def upright(frame, reformatter):
    """One decoded frame → (H, W, 3) uint8, upright (phones store a rotation beside the pixels).

    The frames of a video share a reformatter: setting one up takes longer than using it."""
    small = frame.width * frame.height <= SMALL
    threads = 1 if small else None                       # None: as many as there are cores
    pixels = reformatter.reformat(frame, format="rgb24", threads=threads).to_ndarray()
    turns = round(frame.rotation / 90) % 4                                  # PyAV: degrees counter-clockwise
    return np.ascontiguousarray(np.rot90(pixels, turns))


def read_image(path):
    """The first picture of a file. → (H, W, 3) uint8"""
    with open_media(path) as opened:
        for frame in opened.container.decode(opened.stream):
            return upright(frame, VideoReformatter())
    raise MediaError(f"{path}: no picture in it")


def target_size(n, height, width, factor, min_volume, max_volume):
    """Qwen3-VL's size rule for n frames: sides multiples of `factor`, n·h·w within the limits. → h, w"""
    need(max(height, width) <= 200 * min(height, width),
         f"aspect ratio of {width}×{height} is above 200", MediaError)
    # to the nearest multiples
    h = max(factor, round(height / factor) * factor)
    w = max(factor, round(width / factor) * factor)
    frames = max(2, round(n / 2) * 2)                                       # whole temporal patches
    if frames * h * w > max_volume:
        # too large: both sides shrink by β, rounded down
        beta = math.sqrt(n * height * width / max_volume)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif frames * h * w < min_volume:
        # too small: both sides grow by β, rounded up
        beta = math.sqrt(min_volume / (n * height * width))
        h = math.ceil(height * beta / factor) * factor
        w = math.ceil(width * beta / factor) * factor
    return h, w


def patchify(frames, cfg, image=False, frame_tokens=()):
    """frames (F, H, W, 3) uint8 → patches (n·h·w, 3·2·p·p) uint8 in the tower's order, grid (h, w).

    A video's volume is limited as a whole (the config), or each temporal patch is by `frame_tokens`, [least,
    most], however long the video is. An image has limits of its own; it is seen as two equal frames, hence
    the 2."""
    factor = cfg.patch * cfg.merge                                          # side of a token in pixels
    height, width = frames.shape[1:3]
    if image:
        size = target_size(2, height, width, factor, 2 * cfg.min_pixels, 2 * cfg.max_pixels)
    elif frame_tokens:
        least, most = frame_tokens
        volume = 2 * factor ** 2                                            # of one token: two frames
        size = target_size(2, height, width, factor, volume * least, volume * most)
    else:
        size = target_size(len(frames), height, width, factor, cfg.min_volume, cfg.max_volume)

    if len(frames) % 2 == 1:
        # A temporal patch needs two frames.
        frames = np.concatenate([frames, frames[-1:]])
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)                        # (F,3,H,W)
    if size != (height, width):
        # Bytes throughout, as Pillow does it.
        x = F.interpolate(x, size, mode="bicubic", antialias=True)

    # t: frame of a temporal patch; (H a) and (W b): rows and columns of patches, in blocks of merge×merge as
    # `block_order` has them; p and q: pixel of a patch.
    patches = rearrange(x, "(n t) c (H a p) (W b q) -> (n H W a b) (c t p q)",
                        t=2, a=cfg.merge, b=cfg.merge, p=cfg.patch, q=cfg.patch)
    return patches, (size[0] // cfg.patch, size[1] // cfg.patch)


# ---- the same frames, with most of a file not decoded
#
# A file holds packets: compressed frames, in the order they are sent. A decoder needs earlier ones for most.
#
#     key frame    a frame that needs no other: decoding can begin here
#     group        the packets from a key frame to the next
#     open group   its first frames on the screen, sent after the key frame, need the group before too
#     B-frame      a frame that is sent after one that is shown later; often no other needs it
#
# Left out are groups that are over before the next wanted time, and B-frames (H.264) on the screen at none.

# Packets held at once while the next key frame is looked for; a minute of them in most files.
MOST_HELD = 1000


class Group(NamedTuple):
    """A group's packets, or MOST_HELD of a longer one."""
    packets: list
    until: float                             # when the next key frame is shown, in seconds; infinity: not known


def packet_groups(opened):
    """Yield the Groups of a file. MediaError where its packets do not say when each frame is shown."""
    packets = []
    latest = -math.inf                                   # of the times so far
    for packet in opened.container.demux(opened.stream):
        if packet.size == 0:                             # the end: the decoder gives out what it still holds
            packets.append(packet)
            break
        need(packet.pts is not None, "a frame without a time", MediaError)
        if packet.is_keyframe:
            need(packet.pts > latest, "a key frame that is shown before frames sent earlier", MediaError)
            if packets:
                yield Group(packets, opened.seconds(packet.pts))
            packets = []
        elif len(packets) == MOST_HELD:
            yield Group(packets, math.inf)
            packets = []
        packets.append(packet)
        latest = max(latest, packet.pts)
    yield Group(packets, math.inf)


def idle_b_frames(group, wanted, opened):
    """The pts of a group's B-frames that are on the screen at no wanted time. None of them where frames come
    unevenly: one may be lost, and what a decoder shows then depends on all that it has seen."""
    pts = [packet.pts for packet in group.packets if packet.size > 0]
    order = np.sort(pts)
    steps = np.diff(order)
    if len(steps) == 0 or steps.max() > 1.5 * steps.min():
        return set()
    # The frame at a wanted time is the last that has come by then.                                   (F,)
    last = np.searchsorted(opened.seconds(order), wanted + TICK, "right") - 1
    seen = set(order[np.maximum(last, 0)].tolist())
    # The latest time of all sent so far: a B-frame is shown before it.
    sent = np.maximum.accumulate(pts)
    return {ticks for ticks, latest in zip(pts, sent) if ticks < latest} - seen


def decode_group(group, context, idle):
    """Yield the frames that come out while a group goes into the decoder. It may leave out those with a pts in
    `idle`."""
    for packet in group.packets:
        # NONREF: the decoder leaves out this frame, unless others need it.
        context.skip_frame = "NONREF" if packet.pts in idle else "DEFAULT"
        yield from packet.decode()


def decode_sparsely(opened, wanted, gap):
    """Yield (time, frame) of what is on the screen at the wanted times, and of some others, in order.

    The frames are those that decoding everything gives; MediaError where this is not sure. `gap`: packets
    before the first were left out."""
    context = opened.stream.codec_context
    upcoming = 0                                         # the first wanted time whose frame may still come
    latest = -math.inf                                   # when the frame before was shown
    key = None                                           # pts of the key frame that has to come out first
    progressive = False                                  # known from the first frame on
    for group in packet_groups(opened):
        if gap and not group.packets[0].is_keyframe:
            continue
        if group.until <= wanted[upcoming]:
            gap = True
            continue
        if gap:
            # The decoder forgets what came before the gap.
            context.flush_buffers()
            key = group.packets[0].pts
            gap = False
        idle = ()
        if context.name == "h264" and progressive:       # of fields, two packets may be one frame
            idle = idle_b_frames(group, wanted, opened)
        for frame in decode_group(group, context, idle):
            if key is not None:
                if frame.pts < key:
                    continue                             # an open group: this one needs what was left out
                need(frame.pts == key and frame.key_frame, "no picture at a key frame", MediaError)
                key = None
            now = opened.seconds(frame.pts)
            need(now > latest and not frame.is_corrupt, "damaged, or not in order", MediaError)
            latest = now
            progressive = not frame.interlaced_frame
            yield now, frame
            # The frames before this one were on the screen at all earlier times.
            upcoming = min(int(np.searchsorted(wanted + TICK, now)), len(wanted) - 1)
            if group.until <= wanted[upcoming]:
                gap = True                               # the rest of the group is not looked at
                break
    need(key is None, "no picture at a key frame", MediaError)


# -------------------------------------------------------------------------------- tokenizer and chat template
# Tokens that are never split; of Qwen3-VL's, those that its chat template and its thinking use.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>",
            "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
            "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


class Tokenizer:
    """Special tokens, 256 bytes, and a list of pieces; greedy longest match. decode(encode(text)) == text."""

    def __init__(self, pieces):
        self.pieces = sorted(set(pieces) - set(SPECIALS))
        self.tokens = [special.encode() for special in SPECIALS]            # id → bytes
        self.tokens += [bytes([byte]) for byte in range(256)]
        self.tokens += [piece.encode() for piece in self.pieces]
        self.ids = {}                                                       # bytes → id
        for i, token in enumerate(self.tokens):
            self.ids.setdefault(token, i)                                   # a piece of one byte is that byte

        specials = "|".join(map(re.escape, SPECIALS))
        self.split_specials = re.compile(f"({specials})")
        # A regular expression tries its alternatives in order: the longest first.
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.longest_match = re.compile(b"|".join(map(re.escape, longest_first)))
        self.ids_of = lru_cache(2 ** 16)(self.match)                        # words come again and again

    def __len__(self):
        return len(self.tokens)

    def token_id(self, token):
        """The id of one token, such as "<|im_end|>"."""
        return self.ids[token.encode()]

    def match(self, data):
        """bytes → ids, by greedy longest match."""
        return [self.ids[token] for token in self.longest_match.findall(data)]

    def encode(self, text):
        """text → list of ids. Specials stay whole; half a surrogate pair is no text and becomes "?"."""
        ids = []
        for part in self.split_specials.split(text):
            ids += self.ids_of(part.encode(errors="replace"))
        return ids

    def decode(self, ids):
        """ids → text; bytes that are no UTF-8 become "�"."""
        data = b"".join(self.tokens[i] for i in ids)
        return data.decode(errors="replace")

    def save(self, directory):
        (Path(directory) / "vocab.json").write_text(json.dumps(self.pieces, ensure_ascii=False))

    @classmethod
    def load(cls, directory):
        """The tokenizer of a checkpoint: ours, or an HFTokenizer where there is a tokenizer.json."""
        theirs = Path(directory) / "tokenizer.json"
        if theirs.is_file():                             # then a vocab.json beside it is not one of ours
            return hugging_face().HFTokenizer(theirs)
        path = Path(directory) / "vocab.json"
        need(path.is_file(), f"{path}: no tokenizer in this directory")
        return cls(read_json(path))


@dataclass
class Encoded:
    """One conversation as the model reads it."""
    ids: torch.Tensor                        # (T,) long
    positions: torch.Tensor                  # (3, T) long: t, h, w of MRoPE
    patches: torch.Tensor                    # (Np, 3·2·p·p) uint8
    grids: torch.Tensor                      # (n, 2) long: (h, w) of each temporal patch
    answer: torch.Tensor                     # (T,) bool: tokens the assistant writes (loss falls here)
    frames: int = 0                          # frames looked at; a picture is one

    @property
    def next_position(self):
        """The position of a text token that would come next, the same on all three axes."""
        return int(self.positions.max()) + 1 if len(self.ids) else 0

    def split(self, n):
        """The first n tokens with all the pixels, and the tokens after them without any."""
        head = Encoded(self.ids[:n], self.positions[:, :n], self.patches, self.grids, self.answer[:n])
        tail = Encoded(self.ids[n:], self.positions[:, n:], self.patches[:0], self.grids[:0], self.answer[n:])
        return head, tail


class Media(NamedTuple):
    """A video or image as the model sees it."""
    patches: torch.Tensor                    # (n·h·w, 3·2·p·p) uint8, n = 1 for an image
    grid: tuple                              # (h, w) of each of its n temporal patches
    stamps: list                             # n texts, the timestamp in front of each: "<12.5 seconds>"
    frames: int                              # frames that were looked at


class Span(NamedTuple):
    """A part of a conversation's text, tokenized by itself."""
    text: str
    written: bool                            # by the assistant


class Processor:
    """Chat messages → Encoded.

    To continue a conversation, encode its new messages with `offset` = the next position: the template is
    concatenative, except that tool messages in a row share a turn. Decoded videos are kept, up to
    `cache_bytes` of pixels."""

    def __init__(self, tokenizer, cfg, cache_bytes=2 ** 30):
        self.tokenizer = tokenizer
        self.cfg = cfg
        self.cache = {}                      # file and settings → Media, the oldest first
        self.cached = 0                      # bytes of pixels in it
        self.cache_bytes = cache_bytes

    def load(self, item, root):
        """One media item of a message (see `item_rules`), its file relative to `root`. → Media"""
        kind = item["type"]
        for holds, problem in item_rules(item):                             # no setting is ignored silently
            need(holds, f"{item[kind]}: {problem}")
        path = str(Path(root) / item[kind])

        settings = {name: item[name] for name in SETTINGS if name in item}
        frame_tokens = tuple(settings.pop("frame_tokens", ()))
        key = (path, frame_tokens, *sorted(settings.items()))
        if key not in self.cache:
            if kind == "image":
                media = self.load_image(path)
            else:
                media = self.load_video(path, frame_tokens, settings)
            self.keep(key, media)
        return self.cache[key]

    def load_image(self, path):
        patches, grid = patchify(read_image(path)[None], self.cfg, image=True)
        return Media(patches, grid, [""], 1)                                # an image has no time

    def load_video(self, path, frame_tokens, settings):
        video = read_video(path, **settings)
        patches, grid = patchify(video.frames, self.cfg, frame_tokens=frame_tokens)
        # A temporal patch is stamped with the mean time of its two frames; an odd last frame is seen twice.
        count = len(video.times)
        pairs = np.pad(video.times, (0, count % 2), "edge").reshape(-1, 2)  # (n, 2)
        stamps = [f"<{seconds:.1f} seconds>" for seconds in pairs.mean(1)]
        return Media(patches, grid, stamps, count)

    def keep(self, key, media):
        """Put it into the cache; while that is too large, the oldest entry goes."""
        self.cache[key] = media
        self.cached += media.patches.numel()
        while self.cached > self.cache_bytes and len(self.cache) > 1:
            oldest = next(iter(self.cache))
            self.cached -= self.cache.pop(oldest).patches.numel()

    def encode(self, messages, root=".", generation=False, offset=0):
        """Messages of a row (see `row_rules`), media relative to `root`; `generation` opens a last turn."""
        spans, media = self.render(messages, root)
        if generation:
            spans.append(Span("<|im_start|>assistant\n", False))

        ids = []
        answer = []                                      # of each token: does the assistant write it?
        for span in spans:
            part = self.tokenizer.encode(span.text)
            ids += part
            answer += [span.written] * len(part)

        grids = []                                       # of every temporal patch, in reading order
        for seen in media:
            grids += [seen.grid] * len(seen.stamps)
        return Encoded(
            ids=torch.tensor(ids, dtype=torch.long),
            positions=self.positions(ids, grids, offset),
            patches=self.join_patches(media),
            grids=torch.tensor(grids, dtype=torch.long).view(-1, 2),
            answer=torch.tensor(answer, dtype=torch.bool),
            frames=sum(seen.frames for seen in media))

    def render(self, messages, root):
        """The chat template. → list of Span, list of the Media in them

            <|im_start|>user
            <0.2 seconds><|vision_start|><|video_pad|>…<|vision_end|>What colour?<|im_end|>
            <|im_start|>assistant
            red<|im_end|>                                ← written by the assistant, the end of the turn too
        """
        spans = []
        media = []
        roles = [message["role"] for message in messages]
        for i, message in enumerate(messages):
            if roles[i] == "assistant":
                spans.append(Span("<|im_start|>assistant\n", False))
                spans.append(Span(message["content"] + "<|im_end|>", True))
                spans.append(Span("\n", False))
                continue
            text = self.render_content(message["content"], root, media)
            if roles[i] == "tool":
                first = i == 0 or roles[i - 1] != "tool"
                last = i + 1 == len(roles) or roles[i + 1] != "tool"
                text = self.render_tool(text, first, last)
            else:
                text = f"<|im_start|>{roles[i]}\n{text}<|im_end|>\n"
            spans.append(Span(text, False))
        return spans, media

    def render_tool(self, text, first, last):
        """A tool's answer in a user turn; of tools in a row, which share one, it may be first or last."""
        text = f"\n<tool_response>\n{text}\n</tool_response>"
        if first:
            text = "<|im_start|>user" + text
        if last:
            text += "<|im_end|>\n"
        return text

    def render_content(self, content, root, media):
        """The text of one message; `media` gets what is shown in it.

        Each temporal patch is <time> and as many placeholders as it has vision tokens, h·w/merge²."""
        if isinstance(content, str):
            return content
        text = ""
        for item in content:
            if item["type"] == "text":
                text += item["text"]
                continue
            seen = self.load(item, root)
            media.append(seen)
            h, w = seen.grid
            pads = f"<|{item['type']}_pad|>" * (h * w // self.cfg.merge ** 2)
            for stamp in seen.stamps:
                text += f"{stamp}<|vision_start|>{pads}<|vision_end|>"
        return text

    def join_patches(self, media):
        """The patches of all media, one after the other. → (Np, 3·2·p·p) uint8"""
        if len(media) == 1:
            return media[0].patches                      # one video is not copied
        nothing = torch.zeros(0, 3 * 2 * self.cfg.patch ** 2, dtype=torch.uint8)
        return torch.cat([nothing, *(seen.patches for seen in media)])

    def positions(self, ids, grids, offset):
        """MRoPE positions: t, h, w of every token, counted from `offset`. → (3,T) long

        Text advances all axes by 1. In a grid t stays, h counts its rows and w its columns, of merged
        patches; then text goes on from the largest. "text, a grid of 2×2, text" from 0 on:

            token    a   b  [00  01  10  11]  c   d
            t        0   1   2   2   2   2    4   5          one moment
            h        0   1   2   2   3   3    4   5          2 + row
            w        0   1   2   3   2   3    4   5          2 + column
        """
        pads = [self.tokenizer.token_id("<|image_pad|>"), self.tokenizer.token_id("<|video_pad|>")]
        patches = sum(h * w for h, w in grids)
        need(sum(map(ids.count, pads)) * self.cfg.merge ** 2 == patches,
             "a text holds <|image_pad|> or <|video_pad|>, which stand for pixels: remove them")

        points = []                                      # (t, h, w) of each token
        at = offset                                      # where the next text token or grid stands
        sizes = iter(grids)
        while len(points) < len(ids):
            if ids[len(points)] not in pads:
                points.append((at, at, at))
                at += 1
                continue
            h, w = next(sizes)                           # a placeholder: here its whole grid begins
            rows = h // self.cfg.merge
            columns = w // self.cfg.merge
            for row in range(rows):
                for column in range(columns):
                    points.append((at, at + row, at + column))
            at += max(rows, columns)
        return torch.tensor(points, dtype=torch.long).view(-1, 3).T.contiguous()


# -------------------------------------------------------------------------------- one row of data: the schema
def load_rows(path):
    """Read a JSONL data file; UserError names the file, line and field of the first row that does not fit."""
    path = Path(path)
    need(path.is_file(), f"{path}: no such data file")
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(), which splits at U+2028 too
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}:{number}: not JSON ({e})") from e
        for holds, problem in row_rules(row):
            need(holds, f"{path}:{number}: {problem}")
        rows.append(row)
    need(rows, f"{path}: holds no rows")
    return rows


def row_rules(row):
    """Is a row right? Yields (a rule holds, the problem if not); a rule relies on those before it.

        field       what it is                                                               needed
        id          text that names the row                                                  always
        task        an entry of TASK_RULES, which may ask for further fields                 always
        messages    list of {"role", "content"}; the last one is the assistant's answer      always
        options     list of 2 to 26 texts                                                    mcq
        answer      letter of the right option, "" if none is; grounding: [start, end] s     mcq, grounding
        kind        text, for scores per kind                                                no
        groups      {name: label or list of labels}, for scores per group                    no
        duration    seconds of the video                                                     no
        evidence    spans [start, end] in seconds                                            no
        question, official, annotated, preset: what data/official.py writes                  no

    role: system, user, assistant or tool. content: a string, or (not of an assistant) a list of items
    {"type": "text", "text": …}, {"type": "image", "image": FILE}, {"type": "video", "video": FILE,
    …settings}; files are relative to the data file, the settings are those of SETTINGS."""
    yield isinstance(row, dict), "a row must be an object"
    for name, kind in (("id", str), ("task", str), ("messages", list)):
        yield isinstance(row.get(name), kind), f"field '{name}' must be a {kind.__name__}"
    for name in ("groups", "preset"):
        yield isinstance(row.get(name, {}), dict), f"field '{name}' must be an object"
    yield isinstance(row.get("duration", 0), (int, float)), "field 'duration' must be a number of seconds"
    yield row["task"] in TASK_RULES, f"field 'task' is {row['task']!r}: use one of {', '.join(TASK_RULES)}"
    messages = row["messages"]
    for i, message in enumerate(messages):
        for holds, problem in message_rules(message):
            yield holds, f"field 'messages[{i}]': {problem}"
    answered = len(messages) > 0 and messages[-1]["role"] == "assistant"
    yield answered, "field 'messages' must end with the assistant's answer"
    yield from TASK_RULES[row["task"]](row)


def message_rules(message):
    """Rules of one message, as (a rule holds, the problem if not)."""
    role = content = None
    if isinstance(message, dict):
        role = message.get("role")
        content = message.get("content")
    yield role in ("system", "user", "assistant", "tool"), "needs a role of system, user, assistant or tool"
    if isinstance(content, str):
        return
    yield role != "assistant", "an assistant's content must be a string"
    if not isinstance(content, list):
        content = [None]                                 # whatever it is, it is no item
    for item in content:
        kind = None
        if isinstance(item, dict):
            kind = item.get("type")
        known = kind in ("text", "image", "video") and isinstance(item.get(kind), str)
        yield known, "content must be a string or a list of text, image and video items"
        yield from item_rules(item)


# What a video item may set besides its file: the smallest value of each, or None where it is no number.
SETTINGS = {
    "start": 0,                              # seconds
    "end": 0,
    "fps": 1e-3,                             # frames per second
    "max_frames": 1,                         # at most so many
    "pairs": None,                           # true: in pairs 1/fps apart, see sample_times
    "frame_tokens": None,                    # [least, most] tokens of two frames, see patchify
}


def item_rules(item):
    """Rules of one item of a content, as (a rule holds, the problem if not)."""
    allowed = {"type", item["type"]}
    if item["type"] == "video":
        allowed |= SETTINGS.keys()
    unknown = sorted(item.keys() - allowed)
    yield not unknown, f"cannot apply {', '.join(map(repr, unknown))} to the {item['type']}: leave it out"

    for name, least in SETTINGS.items():
        if name not in item:
            continue
        value = item[name]
        if name == "frame_tokens":
            yield (is_token_range(value),
                   f"'frame_tokens' of the video is {value!r}: must be [least, most] tokens of two frames")
        elif least is not None:
            yield (is_setting(name, value, least),
                   f"'{name}' of the video is {value!r}: must be a number from {least} on")


def is_token_range(value):
    """Is it [least, most], whole numbers from 1 on?"""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    least, most = value
    return isinstance(least, int) and isinstance(most, int) and 1 <= least <= most


def is_setting(name, value, least):
    """Is it a finite number from `least` on? A window may be open: null as its start or end."""
    if value is None:
        return name in ("start", "end")
    if name == "max_frames":
        return isinstance(value, int) and least <= value
    return isinstance(value, (int, float)) and least <= value < math.inf


def no_rules(row):
    """A task that asks for nothing besides messages."""
    return ()


def mcq_rules(row):
    """Multiple choice: options, and the letter of the right one."""
    options = row.get("options")
    texts = isinstance(options, list) and all(isinstance(option, str) for option in options)
    yield texts and 2 <= len(options) <= 26, "field 'options' must be a list of 2 to 26 texts"
    answer = row.get("answer")
    letter = isinstance(answer, str) and len(answer) == 1 and 0 <= ord(answer) - ord("A") < len(options)
    yield (letter or answer == "",
           f"field 'answer' is {answer!r}: must be the letter of an option, or empty if none is right")


def grounding_rules(row):
    """Temporal grounding: when it happens."""
    answer = row.get("answer")
    pair = isinstance(answer, list) and len(answer) == 2 and all(isinstance(x, (int, float)) for x in answer)
    yield (pair and 0 <= answer[0] < answer[1] < math.inf,
           f"field 'answer' is {answer!r}: must be [start, end] in seconds")


# Every task, with the rules of what its rows hold besides messages. A fork's task is one more entry: a
# function of a row that yields (a rule holds, the problem if not).
TASK_RULES = {
    "text": no_rules,                        # language alone, no media
    "caption": no_rules,
    "mcq": mcq_rules,
    "grounding": grounding_rules,
    "mcr": no_rules,                         # an agent's rollout (§3.1)
}


def media_items(row):
    """The image and video items of a row, in reading order."""
    items = []
    for message in row["messages"]:
        if isinstance(message["content"], list):
            items += [item for item in message["content"] if item["type"] != "text"]
    return items


def first_media(row):
    """The first image or video item of a row, or None."""
    items = media_items(row)
    return items[0] if items else None


def clip_of(row):
    """The file of the video or image that a row is about, its cluster; a row without media is its own."""
    item = first_media(row)
    return row["id"] if item is None else item[item["type"]]


def user_turn(row):
    """The first message of a user."""
    for message in row["messages"]:
        if message["role"] == "user":
            return message
    raise UserError(f"row {row['id']!r}: has no message of a user")


def edit_videos(row, change):
    """A copy of the row with change(item) in place of each video item."""
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [change(item) if item["type"] == "video" else item for item in content]
        messages.append({**message, "content": content})
    return {**row, "messages": messages}


def framed(rows, fps=None, max_frames=None):
    """The rows, their videos with `fps` where they name none, at most `max_frames` frames, in pairs."""
    if not fps and not max_frames:
        return rows

    def change(item):
        if fps:
            item = {"fps": fps, **item}
        if max_frames and item.get("max_frames", math.inf) > max_frames:
            item = {**item, "max_frames": max_frames, "pairs": True}
        return item
    return [edit_videos(row, change) for row in rows]


# ------------------------------------------------------------------------------------------------- generation
def collate(samples, pad, device="cpu"):
    """Right-padded batch of Encoded → keyword arguments of InternVideo3.forward, `valid` (B,T) among them."""
    def padded(rows, value=0):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    positions = padded([s.positions.T for s in samples])                    # (B,T,3)
    valid = padded([torch.ones_like(s.ids, dtype=torch.bool) for s in samples])
    batch = {
        "ids": padded([s.ids for s in samples], pad),                       # (B,T)
        "positions": positions.permute(2, 0, 1),                            # (3,B,T)
        "valid": valid,                                                     # (B,T)
        "patches": torch.cat([s.patches for s in samples]),                 # of all samples, in reading order
        "grids": torch.cat([s.grids for s in samples]),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def before_answers(answer):
    """Where the answer tokens are predicted: token t predicts t+1. answer (…,T) bool → the same shape."""
    return F.pad(answer[..., 1:], (0, 1))


def answer_logits(model, hidden, answer):
    """The logits that predict the answer tokens: of token t from the hidden state at t-1. → (n, V) fp32

    hidden (T,D) with answer (T,) bool, or (B,T,D) with (B,T); the n answer tokens in reading order. hidden
    may be longer, by padding."""
    target = before_answers(answer)
    return exact_logits(model, hidden[..., :target.shape[-1], :][target])


def exact_logits(model, hidden):
    """hidden (…, D) → (…, V) fp32. The head runs in the type of its weights, without autocast: a bf16 logit
    of 16 is off by up to 0.06, and ratios in GSPO differ by 1e-3."""
    weight = model.language_model.embed_tokens.weight
    with torch.autocast(hidden.device.type, enabled=False):
        return model.logits(hidden.to(weight.dtype)).float()


@dataclass
class Generation:
    """What was sampled after one prompt."""
    ids: list = field(default_factory=list)            # new tokens, with the stop token if it was reached
    logprobs: list = field(default_factory=list)       # log π(token) under the sampling temperature

    def text(self, tokenizer):
        """What was written, without the end of the turn."""
        end = tokenizer.token_id("<|im_end|>")
        return tokenizer.decode([i for i in self.ids if i != end])


def sample_token(logits, temperature, generator=None):
    """logits (B,V) → tokens (B,), their log-probs (B,) in fp32. Temperature 0: greedy, log-probs at 1."""
    logits = logits.float()                              # probabilities in bf16 would be steps of 1/256
    if not temperature:
        logp = torch.log_softmax(logits, -1)                                # (B,V)
        token = logp.argmax(-1)
    else:
        logp = torch.log_softmax(logits / temperature, -1)
        # Gumbel-max: the argmax of logp + Gumbel noise is a sample. Drawn on the CPU, the noise of a seed is
        # the same on any device. 1e-20 keeps its logarithm finite.
        uniform = torch.rand(logp.shape, generator=generator).clamp_min(1e-20).to(logp.device)
        token = (logp - torch.log(-torch.log(uniform))).argmax(-1)
    return token, logp.gather(-1, token[:, None])[:, 0]


class SharedPrompts(NamedTuple):
    """Neighbouring prompts about the same media, or one alone."""
    prompts: list                            # of Encoded
    shared: int                              # how many tokens they all begin with, those of all media among them


def group_prompts(batch, vision_ids):
    """Prompts of a batch → list of SharedPrompts, whose shared tokens are computed once.

        prompt 1   [system │ video │ What?        ]        prompts 1 and 2: shared = the tokens of [system │ video]
        prompt 2   [system │ video │ What colour? ]
        prompt 3   [system │ other video │ What?  ]        prompt 3 alone

    The last token of a prompt is never shared: it has to be computed to predict from it."""
    groups = []
    for prompt in batch:
        if groups:
            shared = shared_prefix(groups[-1], prompt, vision_ids)
            if shared > 0:
                groups[-1] = SharedPrompts(groups[-1].prompts + [prompt], shared)
                continue
        groups.append(SharedPrompts([prompt], len(prompt.ids) - 1))
    return groups


def shared_prefix(group, prompt, vision_ids):
    """How many tokens `prompt` and all prompts of a group begin with; 0 unless those hold all media of both."""
    first = group.prompts[0]
    vision = torch.isin(prompt.ids, torch.tensor(vision_ids)).nonzero()     # places of its pixels
    if len(vision) == 0:
        return 0                                         # without media there is little to save
    most = min(group.shared, len(prompt.ids) - 1)
    equal = first.ids[:most] == prompt.ids[:most]
    shared = int(equal.cumprod(0).sum())                 # cumprod: 1 up to the first difference
    if vision[-1] >= shared or not torch.equal(first.patches, prompt.patches):
        return 0
    return shared


@torch.no_grad()
def prefill(model, batch, room, samples=1):
    """Fill a new cache with prompts: what a group shares once, the rest of each prompt once, then a branch for
    each of its `samples`, with room for `room` more tokens. → cache, hidden (B·samples, D) of the last tokens

        heads, one a group    [system │ video]                    into a cache
        tails, one a prompt   └─ [What?]  └─ [What colour?]       into its branches
        samples                  └─ └─       └─ └─                branches of these, still empty
    """
    groups = group_prompts(batch, model.vision_ids)
    heads = []                                           # what a group's prompts begin with, and its media
    tails = []                                           # the rest of each prompt, at least its last token
    for group in groups:
        heads.append(group.prompts[0].split(group.shared)[0])
        tails += [prompt.split(group.shared)[1] for prompt in group.prompts]

    # Room for the longest head; of it, for the vision tokens of the one that has most.
    longest = max(len(head.ids) for head in heads)
    patches = max(int(head.grids.prod(1).sum()) for head in heads)
    cache = model.new_cache(len(groups), longest, patches // model.cfg.merge ** 2)
    model(**collate(heads, 0, model.device), cache=cache)

    sizes = [len(group.prompts) for group in groups]
    longest = max(len(tail.ids) for tail in tails)
    cache = cache.branch(torch.tensor(sizes, device=model.device), longest + room)
    inputs = collate(tails, 0, model.device)
    hidden = model(**inputs, cache=cache)                                   # (B,T,D)
    # The last token that is no padding, of each prompt.
    prompts = torch.arange(len(batch), device=model.device)
    last = hidden[prompts, inputs["valid"].sum(1) - 1]                      # (B,D)
    if samples > 1:
        cache = cache.branch(samples, room)
        last = last.repeat_interleave(samples, 0)
    return cache, last


@torch.no_grad()
def generate(model, batch, stop, max_new, temperature=0.0, samples=1, generator=None):
    """Continue each Encoded of `batch`, `samples` times each, until the token `stop` or max_new tokens.

    They end in an open assistant turn; those about one video should be neighbours.
    → list of Generation, all samples of the first prompt first"""
    was_training = model.training
    model.eval()
    cache, last = prefill(model, batch, max_new, samples)
    starts = [prompt.next_position for prompt in batch for _ in range(samples)]
    position = torch.tensor(starts, device=model.device)                    # (B,) of the next token
    outs = [Generation() for _ in starts]

    running = outs                                       # those that have a row in the cache, in its order
    for step in range(max_new):
        logits = model.logits(last)                                         # (B,V)
        logits[:, list(model.vision_ids)] = -torch.inf   # a placeholder stands for pixels: not to write
        token, logp = sample_token(logits, temperature, generator)          # (B,), (B,)
        for out, i, log_probability in zip(running, token.tolist(), logp.tolist()):
            if out.ids[-1:] != [stop]:                   # one that has ended takes no more tokens
                out.ids.append(i)
                out.logprobs.append(log_probability)

        going = [out.ids[-1] != stop for out in running]
        if not any(going) or step == max_new - 1:
            break
        if sum(going) <= len(running) // 2:
            # Most have ended: go on with the others alone.
            running = list(compress(running, going))
            keep = torch.tensor(going, device=model.device)
            cache = cache.expand(keep.long())
            position = position[keep]
            token = token[keep]

        # Text advances t, h and w together.
        positions = (position + step).expand(3, -1)[..., None]              # (3,B,1)
        last = model(token[:, None], positions, cache=cache)[:, 0]          # (B,D)
    model.train(was_training)
    return outs


# ------------------------------------------------------------------------------------------------ checkpoints
# A run has a directory per stage, in the order of the recipe: the last that is there is the run's model. A
# fork's stage is appended.
STAGE_ORDER = ["base", "convert", "cpt", "sft_short", "sft_long", "rl", "opd"]


def write_atomic(path, write):
    """write(temporary path), then rename: a killed process leaves the old file or the new one whole."""
    temporary = Path(f"{path}.tmp")
    write(temporary)
    os.replace(temporary, path)


def save_model(directory, model, tokenizer, state=None):
    """Write config.json, vocab.json and weights.pt, in the model's dtype (what is shipped is model.half()'s).
    `state`: the whole state_dict of a model that is spread over processes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    state = state or model.state_dict()
    weights = {name: tensor.cpu() for name, tensor in state.items()}
    config = json.dumps(asdict(model.cfg), indent=1)
    write_atomic(directory / "weights.pt", lambda path: torch.save(weights, path))
    # last, for a directory with a config.json is a finished model
    write_atomic(directory / "config.json", lambda path: path.write_text(config))


def build_model(cfg, tokenizer):
    """A model that knows the tokenizer's placeholders of pixels."""
    return InternVideo3(cfg, [tokenizer.token_id("<|image_pad|>"), tokenizer.token_id("<|video_pad|>")])


class NoInit(torch.overrides.TorchFunctionMode):
    """`with NoInit():` modules are built without random numbers: weights of a file replace them, and drawing
    them for tensors without memory imports PyTorch's compiler, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]                      # as it is
        return function(*args, **kwargs)


def load_model(directory, device="cpu", dtype=torch.float32):
    """→ (model, processor) of a checkpoint directory, ours or Hugging Face's.

    The weights replace those of an empty model file by file, so that no more than one file is in memory
    beside the model. UserError names the file and the tensor that does not fit."""
    config = Path(directory) / "config.json"
    need(config.is_file(), f"{directory}: no model here (config.json is missing)")
    directory = config.parent
    cfg = Config.load(config)
    tokenizer = Tokenizer.load(directory)
    with torch.device("meta"), NoInit():                                    # shapes without memory
        model = build_model(cfg, tokenizer)

    # What is still to come, with the shapes that the config asks for.
    lacking = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path, state in read_weights(directory):
        for name, tensor in state.items():
            have = tuple(tensor.shape)
            want = lacking.pop(name, "absent")
            need(have == want, f"{path}: tensor {name} is {have}, the config needs {want}")
            wanted_dtype = dtype if tensor.is_floating_point() else None    # indices keep theirs
            state[name] = tensor.to(device, wanted_dtype)
        # assign: these tensors become the parameters, there is nothing to copy into
        model.load_state_dict(state, strict=False, assign=True)
    for name, want in lacking.items():
        raise UserError(f"{directory}: tensor {name} is absent, the config needs {want}")
    return model.eval(), Processor(tokenizer, cfg)


def open_model(directory):
    """load_model to answer with: in bf16 on a GPU, if there is one."""
    if torch.cuda.is_available():
        return load_model(directory, "cuda", torch.bfloat16)
    return load_model(directory)


def read_weights(directory):
    """Yield (file, {name: tensor}): our weights.pt, or each safetensors file of a Hugging Face checkpoint."""
    if any(directory.glob("model.safetensors*")):
        yield from hugging_face().read_safetensors(directory)
        return
    path = directory / "weights.pt"
    need(path.is_file(), f"{directory}: has no weights, neither weights.pt nor *.safetensors")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        first_sentence = str(e).partition(".")[0]
        raise UserError(f"{path}: cannot be read ({first_sentence or 'it is empty'})") from e
    yield path, state


def find_model(argument=None, flag="--model"):
    """A stage's directory; of a run its last finished stage; of None that of the newest run under runs/."""
    if argument:
        runs = [Path(argument)]
    else:
        runs = sorted(Path("runs").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for run in runs:
        candidates = [run] + [run / stage for stage in reversed(STAGE_ORDER)]
        for directory in candidates:
            if (directory / "config.json").is_file():
                if not argument and len(runs) > 1:       # say what was chosen
                    print(f"model: {directory}", file=sys.stderr)
                return directory
    raise UserError(f"{argument or 'runs/'}: no model found; train one with `python train.py` or give "
                    f"{flag} DIR, of a run, a stage or a downloaded checkpoint")


# ---------------------------------------------------------------------------------------------------- command
def check_flags(args, at_least):
    """at_least: {smallest value: "names of flags"}; a flag that was not given is None."""
    for least, names in at_least.items():
        for name in names.split():
            value = getattr(args, name)
            flag = "--" + name.replace("_", "-")
            need(value is None or value >= least, f"{flag} {value}: must be at least {least}")


def run_cli(main):
    """Call main(); a mistake of the user becomes one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, KeyboardInterrupt) as e:
        if isinstance(e, UserError):
            line = f"error: {e}"
            code = 2
        else:
            line = "interrupted; run the same command again to go on"
            code = 130                                   # what a shell reports of a program ended by Ctrl-C
        # Of several processes the first speaks, if it still can.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)
        print(line, file=sys.stderr)
        raise SystemExit(code) from None


def main():
    parser = argparse.ArgumentParser(description="Ask the model about a video.")
    add = parser.add_argument
    add("video")
    add("question")
    add("--model", help="a stage's directory or a run; default: the newest run")
    add("--start", type=float, default=0.0, help="look from this second")
    add("--end", type=float, help="look up to this second")
    add("--fps", type=float, default=2.0, help="frames per second (default 2)")
    add("--max-frames", type=int, default=768, help="at most so many frames (default 768)")
    add("--max-new", type=int, default=128, help="at most so many answer tokens (default 128)")
    args = parser.parse_args()
    need(min(args.fps, args.max_frames, args.max_new) > 0,
         "--fps, --max-frames and --max-new must be positive")
    need(args.question.strip(), "the question is empty")

    model, processor = open_model(find_model(args.model))
    tokenizer = processor.tokenizer
    video = {"type": "video", "video": str(Path(args.video).resolve()), "start": args.start, "end": args.end,
             "fps": args.fps, "max_frames": args.max_frames}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": args.question}]}]
    prompt = processor.encode(messages, generation=True)
    answer = generate(model, [prompt], tokenizer.token_id("<|im_end|>"), args.max_new)[0]
    print(answer.text(tokenizer))


if __name__ == "__main__":
    # Not this copy, which is called __main__: extras/hf.py imports the module iv3, with its own Tokenizer.
    import iv3
    iv3.run_cli(iv3.main)
