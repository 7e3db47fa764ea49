"""InternVideo3's model: a Qwen3-VL backbone whose attention is GQA (the source) or M²LA (§3.2).

Reading order: configuration → vision tower → decoder → video in → tokenizer and chat template → one sample in the
JSONL schema → generation → checkpoints. The architecture is Qwen3-VL's, weight names included; only `self_attn` of a
decoder layer changes when the model is converted (m2la.py).

    python iv3.py runs/tiny/data/clips/test/long_0000.mp4 "What colour is the shape at 12 seconds?"
    python iv3.py --estimate qwen3-vl-8b --memory 141

Shapes: B batch, T tokens, D hidden, V vocabulary, F frames, n temporal patches (two frames each), h×w patches of one.
"""
import argparse
import importlib
import json
import math
import os
import pickle
import re
import sys
import time
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import chain, compress, groupby, pairwise
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from einops import rearrange

from m2la import GQA, M2LA, KVCache, LatentCache, Released, UserError, mrope, rotate

VISION_CHUNK = 2 ** 15                           # patches that go through the vision tower at once
PREFILL = 4096                                   # tokens that go through the layers at once, where there is a cache


class MediaError(UserError):
    """A video or image that cannot be read; data loaders skip it and count it."""


def need(holds, problem, error=UserError):
    """For mistakes that the program did not make: a problem that names the file, flag or field and what to do."""
    if not holds:
        raise error(problem)


def optional(module):
    """Import a module of a package that only Hugging Face checkpoints need."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"a Hugging Face checkpoint needs {module.split('.')[0]}, which is not installed: "
                        "pip install safetensors tokenizers") from e


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from e


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """Sizes of the model. Field groups: decoder, vision tower, attention kind, video input."""
    vocab: int = 1024
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384
    theta: float = 1e4
    mrope_sections: tuple = (6, 5, 5)        # frequencies of the t, h, w axes; sum = head_dim / 2
    eps: float = 1e-6
    tied: bool = True                        # output head = input embedding
    vision_hidden: int = 128
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 256
    patch: int = 16
    merge: int = 2                           # merge×merge patches become one vision token
    pos_side: int = 2                        # side of the learned position table, interpolated to any grid
    deepstack: tuple = (0,)                  # vision blocks whose features are added after LM layers 0, 1, …
    attn: str = "gqa"                        # "gqa" | "m2la" | "released": M²LA in the authors' linear form
    rope_width: int = 0                      # M²LA: P, width of the shared RoPE key
    ranks: tuple = ()                        # M²LA: per layer (R_text, R_vision)
    min_volume: int = 1024                   # video size limits before encoding, frames × height × width
    max_volume: int = 25_165_824
    min_pixels: int = 1024                   # image size limits, height × width
    max_pixels: int = 16_777_216

    def __post_init__(self):
        for name in ("mrope_sections", "deepstack", "ranks"):            # JSON has lists; tuples compare and hash
            setattr(self, name, tuple(tuple(v) if isinstance(v, list) else v for v in getattr(self, name)))
        need(self.attn in ("gqa", "m2la", "released"), f"config attn={self.attn!r}: use 'gqa', 'm2la' or 'released'")
        need(sum(self.mrope_sections) == self.head_dim // 2,
             f"config mrope_sections={self.mrope_sections}: must sum to head_dim/2 = {self.head_dim // 2}")
        need(self.heads % self.kv_heads == 0,
             f"config heads={self.heads}: must be a multiple of kv_heads={self.kv_heads}")
        need(len(self.deepstack) <= self.layers and all(0 <= i < self.vision_layers for i in self.deepstack),
             f"config deepstack={self.deepstack}: at most {self.layers} numbers of vision blocks, "
             f"0 to {self.vision_layers - 1}")
        need(self.attn == "gqa" or (len(self.ranks) == self.layers and self.rope_width >= 2),
             f"config attn={self.attn!r}: needs rope_width and {self.layers} pairs of ranks, one per layer; "
             f"has {self.rope_width} and {len(self.ranks)}")

    @classmethod
    def preset(cls, name, **changes):
        need(name in PRESETS, f"preset {name!r} does not exist: use one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def load(cls, path):
        """A config.json of ours or of Hugging Face."""
        values = read_json(path)
        if "text_config" in values:
            return cls.from_hf(Path(path).parent)
        need("model_type" not in values, f"{path}: model_type {values.get('model_type')!r}: neither Qwen3-VL nor "
             "InternVideo3")
        unknown = values.keys() - {f.name for f in fields(cls)}
        need(not unknown, f"{path}: unknown field {', '.join(map(repr, unknown))}")
        return cls(**values)

    @classmethod
    def from_hf(cls, directory):
        """Of a Hugging Face checkpoint: Qwen3-VL (of transformers 4.57 or later) or InternVideo3 as released (§3.2)."""
        path, values = Path(directory) / "config.json", {"min_volume": 4096, "min_pixels": 65_536}
        config = read_json(path)
        for part, names in HF_NAMES.items():
            have = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **config.get(part, {})}
            have |= have.get("rope_scaling") or have.get("rope_parameters") or {}        # transformers 4 | 5
            for key, value in HF_FIXED[part].items():
                need(have.get(key, value) == value, f"{path}: {part}.{key} is {have.get(key)!r}: must be {value!r}")
            for ours, theirs in names.items():
                need(theirs in have, f"{path}: {part}.{theirs} is missing")
                values[ours] = have[theirs]
        values["pos_side"], text = math.isqrt(values["pos_side"]), config["text_config"]
        if ranks := text.get("kv_lora_rank"):                                # of all layers, or a list
            for key in MLA_WIDTHS:
                need(text.get(key) == values["head_dim"],
                     f"{path}: text_config.{key} is {text.get(key)}: must be head_dim, {values['head_dim']}")
            ranks = ranks if isinstance(ranks, list) else [ranks] * values["layers"]
            values |= {"attn": "released", "rope_width": values["head_dim"], "ranks": [[rank, rank] for rank in ranks]}
        for kind, file in (("pixels", "preprocessor_config.json"), ("volume", "video_preprocessor_config.json")):
            if (path.parent / file).is_file() and (size := read_json(path.parent / file).get("size")):
                values |= {f"min_{kind}": size["shortest_edge"], f"max_{kind}": size["longest_edge"]}
        return cls(**values)

    def to_hf(self, tokenizer):
        """What a Hugging Face config.json says of this model."""
        parts = {part: {theirs: getattr(self, ours) for ours, theirs in names.items()} | HF_FIXED[part]
                 for part, names in HF_NAMES.items()}
        text, vision = parts.values()
        text["rope_scaling"] = {k: text.pop(k) for k in ("rope_type", "mrope_interleaved", "mrope_section")}
        text |= {"model_type": "qwen3_vl_text", "max_position_embeddings": 262_144}
        if self.attn == "released":
            ranks = [rank for rank, _ in self.ranks]
            text |= {"kv_lora_rank": ranks[0] if len(set(ranks)) == 1 else ranks, "q_lora_rank": None,
                     **dict.fromkeys(MLA_WIDTHS, self.head_dim)}
        vision |= {"model_type": "qwen3_vl", "num_position_embeddings": self.pos_side ** 2,
                   "out_hidden_size": self.hidden}
        ids = {f"{name}_token_id": tokenizer.token_id(f"<|{token}|>") for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start",) * 2, ("vision_end",) * 2)}
        return {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", **parts, **ids,
                "tie_word_embeddings": self.tied}


# Our fields in Hugging Face's config.json, and what it may not say otherwise.
HF_NAMES = {
    "text_config": dict(
        vocab="vocab_size", hidden="hidden_size", layers="num_hidden_layers", heads="num_attention_heads",
        kv_heads="num_key_value_heads", head_dim="head_dim", mlp="intermediate_size", theta="rope_theta",
        mrope_sections="mrope_section", eps="rms_norm_eps", tied="tie_word_embeddings"),
    "vision_config": dict(
        vision_hidden="hidden_size", vision_layers="depth", vision_heads="num_heads", vision_mlp="intermediate_size",
        patch="patch_size", merge="spatial_merge_size", pos_side="num_position_embeddings",
        deepstack="deepstack_visual_indexes")}
HF_FIXED = {"text_config": {"hidden_act": "silu", "rope_type": "default", "mrope_interleaved": True},
            "vision_config": {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "temporal_patch_size": 2}}
MLA_WIDTHS = "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"            # beside kv_lora_rank, where it is released
_QWEN = dict(vocab=151_936, head_dim=128, kv_heads=8, theta=5e6, mrope_sections=(24, 20, 20), patch=16, pos_side=48,
             min_volume=4096, min_pixels=65_536)
_VIT_L = dict(vision_hidden=1024, vision_layers=24, vision_heads=16, vision_mlp=4096, deepstack=(5, 11, 17))
PRESETS = {
    "tiny": {},
    "small": dict(vocab=8192, hidden=512, layers=12, heads=8, kv_heads=4, head_dim=64, mlp=1536, theta=1e6,
                  mrope_sections=(12, 10, 10), vision_hidden=384, vision_layers=8, vision_heads=6, vision_mlp=1536,
                  pos_side=14, deepstack=(1, 3, 5)),
    "qwen3-vl-2b": dict(_QWEN, hidden=2048, layers=28, heads=16, mlp=6144, **_VIT_L),
    "qwen3-vl-4b": dict(_QWEN, hidden=2560, layers=36, heads=32, mlp=9728, **_VIT_L),
    "qwen3-vl-8b": dict(_QWEN, hidden=4096, layers=36, heads=32, mlp=12288, tied=False, vision_hidden=1152,
                        vision_layers=27, vision_heads=16, vision_mlp=4304, deepstack=(8, 16, 24)),
}


def run_block(block, recompute, *args, **kwargs):
    """block(...); `recompute` keeps none of its activations for the backward pass, which computes them again."""
    if not recompute:
        return block(*args, **kwargs)
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


# ----------------------------------------------------------------------------------------------------- vision tower
def block_order(grid, merge):
    """Patches in the order of the tower: blocks of merge×merge, row-major inside a block. (h, w, C) → (h·w, C)"""
    return rearrange(grid, "(H a) (W b) c -> (H W a b) c", a=merge, b=merge)


class VisionBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D, wide = cfg.vision_hidden, cfg.vision_mlp
        self.heads = cfg.vision_heads
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"linear_fc1": nn.Linear(D, wide), "linear_fc2": nn.Linear(wide, D)})

    def forward(self, x, cos, sin):
        """x (n, h·w, D): attention stays inside one temporal patch. cos, sin (h·w, Dh/2)."""
        q, k, v = rearrange(self.attn["qkv"](self.norm1(x)), "n s (c H d) -> c n H s d", c=3, H=self.heads)
        o = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.attn["proj"](rearrange(o, "n H s d -> n s (H d)"))
        hidden = F.gelu(self.mlp["linear_fc1"](self.norm2(x)), approximate="tanh")
        return x + self.mlp["linear_fc2"](hidden)


class Merger(nn.Module):
    """merge×merge neighbouring patches → one token of the language model. `post`: DeepStack norms after the view."""

    def __init__(self, cfg, post=False):
        super().__init__()
        self.width, self.post = cfg.vision_hidden * cfg.merge ** 2, post
        self.norm = nn.LayerNorm(self.width if post else cfg.vision_hidden, eps=1e-6)
        self.linear_fc1, self.linear_fc2 = nn.Linear(self.width, self.width), nn.Linear(self.width, cfg.hidden)

    def forward(self, x):                                                          # (n, h·w, Dv) → (n·h·w/4, D)
        x = self.norm(x.reshape(-1, self.width)) if self.post else self.norm(x).reshape(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionTower(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * 2 * cfg.patch ** 2, cfg.vision_hidden)})
        self.pos_embed = nn.Embedding(cfg.pos_side ** 2, cfg.vision_hidden)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.vision_layers))
        self.merger = Merger(cfg)
        self.deepstack_merger_list = nn.ModuleList(Merger(cfg, post=True) for _ in cfg.deepstack)
        self.checkpointing = False

    def position_embedding(self, h, w):
        """The learned pos_side×pos_side table, interpolated to h×w, in the tower's order. → (h·w, Dv)"""
        table = rearrange(self.pos_embed.weight, "(r c) d -> 1 d r c", r=self.cfg.pos_side)
        grid = F.interpolate(table, (h, w), mode="bilinear", align_corners=True)[0]                 # (Dv, h, w)
        return block_order(grid.permute(1, 2, 0), self.cfg.merge)

    def rotary(self, h, w, device):
        """2-D RoPE: half of the frequencies turn with the row, half with the column. → cos, sin (h·w, Dh/2)"""
        half = self.cfg.vision_hidden // self.cfg.vision_heads // 2                                 # Dh/2
        inverse = 1e4 ** -(torch.arange(0, half, 2, device=device).float() / half)                  # (Dh/4,)
        rows_columns = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device))
        order = block_order(rows_columns.view(h, w, 2), self.cfg.merge)                             # (h·w, 2)
        angles = (order[:, :, None] * inverse).flatten(1)                                           # (h·w, Dh/2)
        return angles.cos(), angles.sin()

    def encode_grid(self, patches, n, h, w):
        """n temporal patches of one size: (n·h·w, 3·2·p·p) → tokens (n·h·w/4, D), one more per DeepStack tap."""
        pixels = (patches.float() / 127.5 - 1).to(self.pos_embed.weight.dtype)
        x = self.patch_embed["proj"](pixels).view(n, h * w, -1) + self.position_embedding(h, w)
        cos, sin = self.rotary(h, w, x.device)
        deep = []
        for i, block in enumerate(self.blocks):
            x = run_block(block, self.checkpointing and self.training, x, cos, sin)
            if i in self.cfg.deepstack:
                deep.append(self.deepstack_merger_list[self.cfg.deepstack.index(i)](x))
        return [self.merger(x), *deep]

    def forward(self, patches, grids):
        """patches (Np, 3·2·p·p) uint8 pixels, grids (n, 2) = (h, w) of each temporal patch.
        → list of (tokens, D): the merged tokens, then one tensor per DeepStack tap."""
        runs = []                                        # neighbours of one size: a batch, or several of bounded memory
        for (h, w), run in groupby(grids.tolist()):
            n, most = len(list(run)), max(1, VISION_CHUNK // (h * w))
            runs += [(min(most, n - k), h, w) for k in range(0, n, most)]
        parts = patches.split([n * h * w for n, h, w in runs])
        outs = [self.encode_grid(part, *run) for part, run in zip(parts, runs)]
        return [torch.cat(tokens) for tokens in zip(*outs)]


# ---------------------------------------------------------------------------------------------------------- decoder
class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden, cfg.mlp, bias=False)
        self.up_proj = nn.Linear(cfg.hidden, cfg.mlp, bias=False)
        self.down_proj = nn.Linear(cfg.mlp, cfg.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, cfg, index):
        super().__init__()
        sizes = cfg.hidden, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.eps
        if cfg.attn == "released":
            self.self_attn = Released(cfg.hidden, cfg.heads, cfg.head_dim, cfg.rope_width, cfg.ranks[index][0])
        else:
            self.self_attn = GQA(*sizes) if cfg.attn == "gqa" else M2LA(*sizes, cfg.rope_width, cfg.ranks[index])
        self.mlp = MLP(cfg)
        self.input_layernorm = nn.RMSNorm(cfg.hidden, cfg.eps)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden, cfg.eps)

    def forward(self, x, **attention):
        x = x + self.self_attn(self.input_layernorm(x), **attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class InternVideo3(nn.Module):
    """Vision tower + decoder. `vision_ids`: the ids of the image and video placeholder tokens."""

    def __init__(self, cfg, vision_ids):
        super().__init__()
        self.cfg, self.vision_ids = cfg, tuple(vision_ids)
        self.visual = VisionTower(cfg)
        self.language_model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(cfg.vocab, cfg.hidden),
            "layers": nn.ModuleList(DecoderLayer(cfg, i) for i in range(cfg.layers)),
            "norm": nn.RMSNorm(cfg.hidden, cfg.eps)})
        if not cfg.tied:
            self.lm_head = nn.Linear(cfg.hidden, cfg.vocab, bias=False)
        self.checkpointing = False                                           # recompute activations in backward

    @property
    def device(self):
        return self.language_model.norm.weight.device

    def init_weights(self, generator=None):
        """Random weights for pretraining. Vision tokens start with about the RMS of text embeddings: with the usual
        tenfold larger ViT output, what attention writes into a vision token (its timestamp) is lost in the sum."""
        for name, p in self.named_parameters():
            if p.dim() == 1:                                                 # norms' weights and all biases
                nn.init.constant_(p, 1.0 if re.search(r"norm[12]?\.weight$", name) else 0.0)
                continue
            std = 0.15 if "embed_tokens" in name or "pos_embed" in name else 0.8 * p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.cfg.layers)
            if "merger" in name and name.endswith("linear_fc2.weight"):
                std *= 0.5
            nn.init.normal_(p, std=std, generator=generator)

    def new_cache(self, batch, capacity, vision_capacity=None):
        """An empty cache for `batch` sequences of at most `capacity` tokens. An M²LA cache keeps text and vision rows
        apart; `vision_capacity`, when known, spares the room that `capacity` would reserve for each of them."""
        cfg, kind, dtype = self.cfg, self.device.type, self.language_model.norm.weight.dtype
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):        # not of "meta"
            dtype = torch.get_autocast_dtype(kind)
        like = dict(dtype=dtype, device=self.device)
        if cfg.attn == "gqa":
            return KVCache(cfg.layers, batch, capacity, cfg.kv_heads, cfg.head_dim, **like)
        capacities = (capacity, capacity if vision_capacity is None else vision_capacity)
        return LatentCache(cfg.ranks, cfg.rope_width, batch, capacities, **like)

    def forward(self, ids, positions, patches=None, grids=None, mask=None, cache=None, valid=None):
        """ids (B,T), positions (3,B,T), patches (Np, 3·2·p·p) uint8 of all videos in reading order, grids (n,2).
        mask as in m2la.attend, None = causal; with a cache, valid (B,T) marks tokens that are no padding.
        → hidden (B,T,D) after the last norm; see `logits`."""
        cfg, lm = self.cfg, self.language_model
        vision = torch.stack([ids == i for i in self.vision_ids]).any(0)                                # (B,T)
        x, deep = lm.embed_tokens(ids), []
        if patches is not None and len(patches):
            tokens, *deep = self.visual(patches, grids)
            x = x.masked_scatter(vision[..., None], tokens.to(x.dtype))
            deep = [torch.zeros_like(x).masked_scatter(vision[..., None], d.to(x.dtype)) for d in deep]
        rope = mrope(positions, cfg.head_dim, cfg.theta, cfg.mrope_sections)
        if cache is None:
            return self.run_layers(x, deep, rope=rope, vision=vision, mask=mask)
        outs = []
        for start in range(0, max(1, ids.shape[1]), PREFILL):            # chunks: a long prompt needs no more memory
            part = slice(start, start + PREFILL)
            cache.begin(vision[:, part], None if valid is None else valid[:, part])
            outs.append(self.run_layers(x[:, part], [d[:, part] for d in deep], rope=tuple(r[:, part] for r in rope),
                                        vision=vision[:, part], cache=cache))
            cache.commit()
        return torch.cat(outs, 1)

    def run_layers(self, x, deep, **attention):
        """The decoder on embedded tokens; deep: what is added after the first layers, each (B,T,D)."""
        for i, layer in enumerate(self.language_model.layers):
            x = run_block(layer, self.checkpointing and self.training, x, layer=i, **attention)
            if i < len(deep):
                x = x + deep[i]
        return self.language_model.norm(x)

    def logits(self, hidden):                                                          # (…, D) → (…, V)
        head = self.language_model.embed_tokens if self.cfg.tied else self.lm_head
        return F.linear(hidden, head.weight)


# --------------------------------------------------------------------------------------------------------- video in
@dataclass
class Video:
    frames: np.ndarray                       # (F, H, W, 3) uint8
    times: np.ndarray                        # (F,) seconds, the real presentation time of each frame


def probe(path):
    """Duration of a video file in seconds, from its header."""
    with _open(path) as (container, stream, origin):
        if stream.duration:
            return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin
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


@contextmanager
def _open(path):
    """`with _open(path) as (container, video_stream, origin)`; every failure names the file. origin: where the file's
    clock starts, in seconds; players (and subtitles) call this moment 0."""
    need(Path(path).is_file(), f"{path}: no such file", MediaError)
    container = None
    try:
        with av.open(str(path)) as container:
            need(container.streams.video, f"{path}: has no video stream", MediaError)
            yield container, container.streams.video[0], (container.start_time or 0) / av.time_base
    except av.FFmpegError as e:
        raise MediaError(f"{path}: {'broken video data' if container else 'not a readable video'} ({e})") from e


def sample_times(start, end, fps, max_frames=None, pairs=False):
    """Times to look at in [start, end): every 1/fps seconds; if that is more than max_frames, spread evenly. `pairs`:
    spread pairs 1/fps apart instead, so that a temporal patch (two frames) never holds two unrelated moments."""
    count = max(1, math.ceil((end - start) * fps - 1e-6))
    if max_frames is None or count <= max_frames:
        return start + np.arange(count) / fps
    if pairs:
        n = max(1, max_frames // 2)
        centre = start + (np.arange(n) + 0.5) * (end - start) / n
        first = np.floor((centre - 0.5 / fps) * fps + 1e-6) / fps
        return np.stack([first, first + 1 / fps], 1).reshape(-1)
    return np.linspace(start, end - 1 / fps, max_frames)


def _decode(path, start):
    """Yield (time, frame) from the key frame before `start`, or from the beginning: a seek may land behind `start`
    where a format has no index (MPEG-TS)."""
    for seek in (True, False) if start > 0 else (False,):
        with _open(path) as (container, stream, origin):
            stream.thread_type = "AUTO" if stream.width * stream.height > 256 * 256 else "NONE"
            if seek:
                container.seek(int((start + origin) / stream.time_base), stream=stream, backward=True)
            for i, frame in enumerate(container.decode(stream)):
                if seek and i == 0 and frame.time - origin > start + 1e-3:
                    break
                yield frame.time - origin, frame
            else:
                return


def read_video(path, start=None, end=None, fps=2.0, max_frames=None, pairs=False, deadline=None):
    """The frames on screen at `sample_times` of [start, end) seconds, with their real times; keeps no others.
    Raises MediaError (missing, broken, cut off, empty window, slower than `deadline` seconds, by default a minute and
    the length of the window: an hour of film takes minutes)."""
    duration = probe(path)
    start, end = max(0.0, start or 0.0), duration if end is None else min(end, duration)
    window = f"{start:g}–{end:g} s"
    need(fps > 0 and end > start,
         f"{path}: nothing to read in {window} at {fps:g} fps (the video has {duration:.1f} s)", MediaError)
    wanted = sample_times(start, end, fps, max_frames, pairs)
    deadline = 60 + end - start if deadline is None else deadline
    pixels, times, reformatter, limit = [], [], VideoReformatter(), time.monotonic() + deadline
    for (now, frame), (until, _) in pairwise(chain(_decode(path, start), [(math.inf, None)])):
        need(time.monotonic() <= limit,
             f"{path}: decoding took more than {deadline:g} s; read a shorter window or raise deadline", MediaError)
        if until == math.inf:                                                # the last frame stays on the screen
            last = now + float((frame.duration or 0) * frame.time_base)
            need(wanted[-1] <= last + 1 + 0.05 * duration,
                 f"{path}: the pictures end at {last:.1f} s of {duration:.1f} s; is the file cut off?", MediaError)
        if n := int((wanted[len(times):] + 1e-3 < until).sum()):             # wanted before the next frame comes
            pixels += [_rgb(frame, reformatter)] * n
            times += [now] * n
        if len(times) == len(wanted):
            break
    need(times, f"{path}: no frame could be decoded in {window}", MediaError)
    return Video(np.stack(pixels), np.array(times, np.float64))


def _rgb(frame, reformatter):
    """One decoded frame → (H, W, 3) uint8, upright (phones store a rotation beside the pixels). The frames of a video
    share a reformatter: setting one up takes longer than using it."""
    turns = round(frame.rotation / 90) % 4                               # PyAV: degrees counter-clockwise
    return np.ascontiguousarray(np.rot90(reformatter.reformat(frame, format="rgb24").to_ndarray(), turns))


def read_image(path):
    with _open(path) as (container, stream, _):
        for frame in container.decode(stream):
            return _rgb(frame, VideoReformatter())
    raise MediaError(f"{path}: no picture in it")


def target_size(n, height, width, factor, min_volume, max_volume):
    """Qwen3-VL's size rule for n frames: sides are multiples of `factor`, n·h·w stays within the limits."""
    need(max(height, width) <= 200 * min(height, width), f"aspect ratio of {width}×{height} is above 200", MediaError)
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    frames = max(2, round(n / 2) * 2)
    if frames * h * w > max_volume:
        beta = math.sqrt(n * height * width / max_volume)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif frames * h * w < min_volume:
        beta = math.sqrt(min_volume / (n * height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def patchify(frames, cfg, image=False, frame_tokens=()):
    """frames (F, H, W, 3) uint8 → patches (n·h·w, 3·2·p·p) uint8 in the tower's order, grid (h, w) of each of n.
    A video's volume is limited as a whole (the config), or each temporal patch is by `frame_tokens`, [least, most],
    however long the video is. An image has limits of its own; it is seen as two equal frames, hence the 2."""
    factor, n = cfg.patch * cfg.merge, 2
    if image:
        limits = 2 * cfg.min_pixels, 2 * cfg.max_pixels
    elif frame_tokens:
        limits = (2 * factor ** 2 * tokens for tokens in frame_tokens)
    else:
        n, limits = len(frames), (cfg.min_volume, cfg.max_volume)
    size = target_size(n, *frames.shape[1:3], factor, *limits)
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])                       # a temporal patch needs two frames
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)                         # (F,3,H,W)
    if size != tuple(x.shape[2:]):
        x = F.interpolate(x, size, mode="bicubic", antialias=True)           # bytes throughout, as Pillow does it
    x = rearrange(x, "(n t) c (H a p) (W b q) -> (n H W a b) (c t p q)", t=2, a=cfg.merge, b=cfg.merge,
                  p=cfg.patch, q=cfg.patch)
    return x, (size[0] // cfg.patch, size[1] // cfg.patch)


# ------------------------------------------------------------------------------------- tokenizer and chat template
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>",
            "</think>")


class Tokenizer:
    """Special tokens, 256 bytes, and a list of pieces; greedy longest match. `decode(encode(text)) == text`."""

    def __init__(self, pieces):
        self.pieces = sorted(set(pieces) - set(SPECIALS))
        self.tokens = [*map(str.encode, SPECIALS), *(bytes([b]) for b in range(256)), *map(str.encode, self.pieces)]
        self.ids = {token: i for i, token in reversed(list(enumerate(self.tokens)))}     # a one-byte piece is the byte
        self.split = re.compile(f"({'|'.join(map(re.escape, SPECIALS))})")
        self.longest = re.compile(b"|".join(map(re.escape, sorted(self.tokens, key=len, reverse=True))))
        self.ids_of = lru_cache(2 ** 16)(lambda data: [self.ids[token] for token in self.longest.findall(data)])

    def __len__(self):
        return len(self.tokens)

    def token_id(self, token):
        return self.ids[token.encode()]

    def encode(self, text):
        parts = [part.encode(errors="replace") for part in self.split.split(text)]   # a lone surrogate is no text: "?"
        return [i for part in parts for i in self.ids_of(part)]

    def decode(self, ids):
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")

    def save(self, directory):
        (Path(directory) / "vocab.json").write_text(json.dumps(self.pieces, ensure_ascii=False))

    @classmethod
    def load(cls, directory):
        """The tokenizer of a checkpoint: ours, or an HFTokenizer where there is a tokenizer.json."""
        path = Path(directory) / "vocab.json"
        if (path.parent / "tokenizer.json").is_file():                       # its vocab.json is another thing
            return HFTokenizer(path.parent / "tokenizer.json")
        need(path.is_file(), f"{path}: no tokenizer in this directory")
        return cls(read_json(path))


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json. BESIDE it lie files that transformers and vLLM want; we only pass them on."""
    BESIDE = ("chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json",
              "tokenizer_config.json", "video_preprocessor_config.json")

    def __init__(self, path):
        tokenizers = optional("tokenizers")
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:                                               # what it raises is a plain Exception
            raise UserError(f"{path}: not a tokenizer ({e})") from e
        self.tokens = [self.inner.id_to_token(i) for i in range(self.inner.get_vocab_size())]
        self.token_id = self.inner.token_to_id
        self.beside = {f.name: f.read_bytes() for f in map(path.with_name, self.BESIDE) if f.is_file()}
        for special in SPECIALS:
            need(self.token_id(special) is not None, f"{path}: has no token {special}")

    def encode(self, text):
        return self.inner.encode(text.encode(errors="replace").decode(), add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def save(self, directory):
        self.inner.save(str(Path(directory) / "tokenizer.json"))
        for name, data in self.beside.items():
            (Path(directory) / name).write_bytes(data)


@dataclass
class Encoded:
    """One conversation as the model reads it."""
    ids: torch.Tensor                        # (T,) long
    positions: torch.Tensor                  # (3, T) long: t, h, w of MRoPE
    patches: torch.Tensor                    # (Np, 3·2·p·p) uint8
    grids: torch.Tensor                      # (n, 2) long: (h, w) of each temporal patch
    answer: torch.Tensor                     # (T,) bool: tokens the assistant writes (loss falls here)
    frames: int = 0                          # video frames looked at

    @property
    def next_position(self):
        return int(self.positions.max()) + 1 if len(self.ids) else 0


class Processor:
    """Chat messages → Encoded. To continue a conversation, encode its new messages with `offset` = the next position:
    the template is concatenative, except that tool messages in a row share a turn. Decoded videos are kept, up to
    `cache_bytes` of pixels."""

    def __init__(self, tokenizer, cfg, cache_bytes=2 ** 30):
        self.tokenizer, self.cfg = tokenizer, cfg
        self.cache, self.cached, self.cache_bytes = {}, 0, cache_bytes

    def load(self, item, root):
        """One media item of a message → (patches, grid, the timestamp of each temporal patch, frames)."""
        kind = item["type"]
        for holds, problem in item_rules(item):                               # no setting is ignored silently
            need(holds, f"{item[kind]}: {problem}")
        options = {k: item[k] for k in SETTINGS if k in item}
        tokens = tuple(options.pop("frame_tokens", ()))
        key = (str(Path(root) / item[kind]), tokens, *sorted(options.items()))
        if key in self.cache:
            return self.cache[key]
        if kind == "image":
            value = *patchify(read_image(key[0])[None], self.cfg, image=True), [""], 1
        else:
            video = read_video(key[0], **options)
            times = np.pad(video.times, (0, len(video.times) % 2), "edge").reshape(-1, 2).mean(1)
            stamps = [f"<{t:.1f} seconds>" for t in times]
            value = *patchify(video.frames, self.cfg, frame_tokens=tokens), stamps, len(video.times)
        self.cache[key] = value
        self.cached += value[0].numel()
        while self.cached > self.cache_bytes and len(self.cache) > 1:         # the oldest goes
            self.cached -= self.cache.pop(next(iter(self.cache)))[0].numel()
        return value

    def encode(self, messages, root=".", generation=False, offset=0):
        """messages of a row (see `row_rules`), media relative to `root`; `generation` opens an assistant turn."""
        texts, patches, grids, frames = [], [], [], 0                         # texts: (text, the assistant writes it)
        roles = [None, *(message["role"] for message in messages), None]
        for message, before, after in zip(messages, roles, roles[2:]):
            role, content = message["role"], message["content"]
            if role == "assistant":
                texts += [("<|im_start|>assistant\n", False), (content + "<|im_end|>", True), ("\n", False)]
                continue
            text, end = f"<|im_start|>{role}\n", "<|im_end|>\n"
            if role == "tool":                                                # tools in a row answer in one user turn
                text = "\n<tool_response>\n" if before == "tool" else "<|im_start|>user\n<tool_response>\n"
                end = "\n</tool_response>" + ("" if after == "tool" else end)
            for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if item["type"] == "text":
                    text += item["text"]
                    continue
                pixels, (h, w), stamps, shown = self.load(item, root)
                pads = f"<|{item['type']}_pad|>" * (h * w // self.cfg.merge ** 2)
                text += "".join(f"{stamp}<|vision_start|>{pads}<|vision_end|>" for stamp in stamps)
                grids += [(h, w)] * len(stamps)
                patches, frames = [*patches, pixels], frames + shown
            texts.append((text + end, False))
        if generation:
            texts.append(("<|im_start|>assistant\n", False))
        parts = [(self.tokenizer.encode(text), answer) for text, answer in texts]
        ids = [i for part, _ in parts for i in part]
        answer = [own for part, own in parts for _ in part]
        if len(patches) != 1:                                                 # one video is not copied
            patches = [torch.cat([torch.zeros(0, 3 * 2 * self.cfg.patch ** 2, dtype=torch.uint8), *patches])]
        return Encoded(torch.tensor(ids, dtype=torch.long), self.positions(ids, grids, offset), patches[0],
                       torch.tensor(grids, dtype=torch.long).view(-1, 2),
                       torch.tensor(answer, dtype=torch.bool), frames)

    def positions(self, ids, grids, offset):
        """MRoPE: text advances t, h, w by 1; in a grid t stays, h and w count; then on from the largest. → (3,T)"""
        pads = [self.tokenizer.token_id(pad) for pad in ("<|image_pad|>", "<|video_pad|>")]
        need(sum(map(ids.count, pads)) * self.cfg.merge ** 2 == sum(h * w for h, w in grids),
             "a text holds <|image_pad|> or <|video_pad|>, which stand for pixels: remove them")
        sides = [(h // self.cfg.merge, w // self.cfg.merge) for h, w in grids]
        cells = [(r, c, max(h, w) * ((r, c) == (h - 1, w - 1))) for h, w in sides for r in range(h) for c in range(w)]
        inside = np.tile((0, 0, 1), (len(ids), 1))                            # row, column, step to the next token
        inside[np.isin(ids, pads)] = np.array(cells, dtype=int).reshape(-1, 3)
        at = offset + inside[:, 2].cumsum() - inside[:, 2]
        return torch.from_numpy(np.stack([at, at + inside[:, 0], at + inside[:, 1]]))


# ----------------------------------------------------------------------------------------- data: one schema (JSONL)
TASKS = ("text", "caption", "mcq", "grounding", "mcr")


def load_rows(path):
    """Read a JSONL data file; UserError names the file, line and field of the first row that does not fit."""
    path = Path(path)
    need(path.is_file(), f"{path}: no such data file")
    rows, text = [], path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):                     # splitlines() would split at U+2028 too
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise UserError(f"{path}:{number}: not JSON ({e})") from e
        for holds, problem in row_rules(rows[-1]):
            need(holds, f"{path}:{number}: {problem}")
    need(rows, f"{path}: holds no rows")
    return rows


SETTINGS = {"start": 0, "end": 0, "fps": 1e-3, "max_frames": 1, "pairs": None, "frame_tokens": None}     # least values


def item_rules(item):
    """What a media item may say besides its type and file, as (a rule holds, the problem if not)."""
    unknown = item.keys() - {"type", item["type"], *(SETTINGS if item["type"] == "video" else ())}
    yield not unknown, f"cannot apply {', '.join(map(repr, sorted(unknown)))} to the {item['type']}: leave it out"
    for name, least in SETTINGS.items():
        value = item.get(name, least)
        if name == "frame_tokens" and name in item:
            pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, int) for v in value)
            yield (pair and 1 <= value[0] <= value[1],
                   f"'frame_tokens' of the video is {value!r}: must be [least, most] tokens of two frames")
        elif least is not None:
            number = isinstance(value, int if name == "max_frames" else (int, float))
            yield (number and least <= value < math.inf or value is None and name in ("start", "end"),
                   f"'{name}' of the video is {value!r}: must be a number from {least} on")


def row_rules(row):
    """The schema: (a rule holds, the problem if not), one by one; a rule may rely on those before it. What scores use
    besides: `kind`; `groups`, {name: label or list of labels}; `duration` of the video and `evidence` spans in seconds;
    and what data/official.py writes: `question` without options, `official` rule, `annotated` span, `preset`."""
    yield isinstance(row, dict), "a row must be an object"
    for name, kind in (("id", str), ("task", str), ("messages", list)):
        yield isinstance(row.get(name), kind), f"field '{name}' must be a {kind.__name__}"
    for name in ("groups", "preset"):
        yield isinstance(row.get(name, {}), dict), f"field '{name}' must be an object"
    yield isinstance(row.get("duration", 0), (int, float)), "field 'duration' must be a number of seconds"
    yield row["task"] in TASKS, f"field 'task' is {row['task']!r}: use one of {', '.join(TASKS)}"
    for i, message in enumerate(row["messages"]):
        where, roles = f"field 'messages[{i}]':", ("system", "user", "assistant", "tool")
        role, content = (message.get(k) if isinstance(message, dict) else None for k in ("role", "content"))
        yield role in roles, f"{where} needs a role of system, user, assistant or tool"
        yield role != "assistant" or isinstance(content, str), f"{where} an assistant's content must be a string"
        for item in [] if isinstance(content, str) else content if isinstance(content, list) else [None]:
            kind = item.get("type") if isinstance(item, dict) else None
            yield (kind in ("text", "image", "video") and isinstance(item.get(kind), str),
                   f"{where} content must be a string or a list of text, image and video items")
            yield from ((holds, f"{where} {problem}") for holds, problem in item_rules(item))
    yield row["messages"] and role == "assistant", "field 'messages' must end with the assistant's answer"
    answer, options = row.get("answer"), row.get("options")
    if row["task"] == "mcq":
        texts = isinstance(options, list) and all(isinstance(option, str) for option in options)
        yield texts and 2 <= len(options) <= 26, "field 'options' must be a list of 2 to 26 texts"
        letter = isinstance(answer, str) and len(answer) == 1 and 0 <= ord(answer) - 65 < len(options)
        yield (letter or answer == "",
               f"field 'answer' is {answer!r}: must be the letter of an option, or empty if none is right")
    if row["task"] == "grounding":
        pair = isinstance(answer, list) and len(answer) == 2 and all(isinstance(x, (int, float)) for x in answer)
        yield (pair and 0 <= answer[0] < answer[1] < math.inf,
               f"field 'answer' is {answer!r}: must be [start, end] in seconds")


# ------------------------------------------------------------------------------------------------------- generation
def collate(samples, pad, device="cpu"):
    """Right-padded batch of Encoded → keyword arguments of InternVideo3.forward, `valid` (B,T) among them."""
    padded = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    batch = dict(ids=padded([s.ids for s in samples], padding_value=pad),
                 positions=padded([s.positions.T for s in samples]).permute(2, 0, 1),               # (3,B,T)
                 valid=padded([torch.ones_like(s.ids, dtype=torch.bool) for s in samples]),
                 patches=torch.cat([s.patches for s in samples]), grids=torch.cat([s.grids for s in samples]))
    return {k: v.to(device) for k, v in batch.items()}


@dataclass
class Generation:
    ids: list = field(default_factory=list)            # new tokens, the stop token included when it was reached
    logprobs: list = field(default_factory=list)       # log π(token) under the sampling temperature

    def text(self, tokenizer):
        """What was written, without the end of the turn."""
        end = tokenizer.token_id("<|im_end|>")
        return tokenizer.decode([i for i in self.ids if i != end])


def sample_token(logits, temperature, generator=None):
    """logits (B,V) → tokens (B,), their log-probabilities (B,), in fp32. Temperature 0 is greedy (log-probs at 1)."""
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    scores = logp
    if temperature:                            # Gumbel-max, its noise drawn on the CPU: the same on any device
        noise = torch.rand(logp.shape, generator=generator).clamp_min(1e-20).to(logp.device)
        scores = logp - torch.log(-torch.log(noise))
    token = scores.argmax(-1)
    return token, logp.gather(-1, token[:, None])[:, 0]


def group_prompts(batch, vision_ids):
    """Neighbouring prompts about the same media → [(prompts, number of tokens they all begin with)]. The last token of
    a prompt is never shared: it has to be computed to predict from it."""
    groups = []
    for sample in batch:
        vision, shared = torch.isin(sample.ids, torch.tensor(vision_ids)).nonzero(), len(sample.ids) - 1
        if groups and len(vision):
            prompts, n = groups[-1][0], min(groups[-1][1], shared)
            n = int((prompts[0].ids[:n] == sample.ids[:n]).cumprod(0).sum())         # tokens they both begin with
            if vision[-1] < n and torch.equal(prompts[0].patches, sample.patches):
                groups[-1] = (prompts + [sample], n)
                continue
        groups.append(([sample], shared))
    return groups


@torch.no_grad()
def prefill(model, batch, room, samples=1):
    """Fill a new cache with prompts (each `samples` times), every shared video once; leave `room` for more tokens.
    → cache, hidden (B·samples, D) of each prompt's last token"""
    groups = group_prompts(batch, model.vision_ids)
    heads = [Encoded(g[0].ids[:n], g[0].positions[:, :n], g[0].patches, g[0].grids, g[0].answer[:n]) for g, n in groups]
    tails = [Encoded(s.ids[n:], s.positions[:, n:], s.patches[:0], s.grids[:0], s.answer[n:])
             for g, n in groups for s in g]
    vision = max(int(s.grids.prod(1).sum()) // model.cfg.merge ** 2 for s in batch)
    cache = model.new_cache(len(groups), max(len(s.ids) for s in batch) + room, vision)
    model(**collate(heads, 0, model.device), cache=cache)
    if len(groups) < len(batch):
        cache = cache.expand(torch.tensor([len(g) for g, _ in groups], device=model.device))
    inputs = collate(tails, 0, model.device)
    hidden = model(**inputs, cache=cache)                                                        # (B,T,D)
    last = hidden[torch.arange(len(batch), device=model.device), inputs["valid"].sum(1) - 1]
    return (cache, last) if samples == 1 else (cache.expand(samples), last.repeat_interleave(samples, 0))


@torch.no_grad()
def generate(model, batch, stop, max_new, temperature=0.0, samples=1, generator=None):
    """Continue each Encoded of `batch` (ending in an open assistant turn) until the token `stop` or max_new tokens,
    `samples` times each. Prompts about one video should be neighbours. → Generation list, batch-major."""
    was_training, _ = model.training, model.eval()
    cache, last = prefill(model, batch, max_new, samples)
    position = torch.tensor([s.next_position for s in batch for _ in range(samples)], device=model.device)
    outs = [Generation() for _ in range(len(position))]
    running = outs
    for step in range(max_new):
        logits = model.logits(last)                                                              # (B,V)
        logits[:, list(model.vision_ids)] = -torch.inf                 # a placeholder stands for pixels: not to write
        token, logp = sample_token(logits, temperature, generator)
        for out, t, lp in zip(running, token.tolist(), logp.tolist()):
            if out.ids[-1:] != [stop]:                     # what has ended is not listened to any more
                out.ids.append(t)
                out.logprobs.append(lp)
        going = [out.ids[-1] != stop for out in running]
        if not any(going) or step == max_new - 1:
            break
        if sum(going) <= len(running) // 2:                # most have ended: go on with the others alone
            running, keep = list(compress(running, going)), torch.tensor(going, device=model.device)
            cache, position, token = cache.expand(keep.long()), position[keep], token[keep]
        last = model(token[:, None], (position + step).expand(3, -1)[..., None], cache=cache)[:, 0]
    model.train(was_training)
    return outs


# ------------------------------------------------------------------------------------------------------ checkpoints
STAGES = ("base", "convert", "cpt", "sft_short", "sft_long", "rl", "opd")          # order of the recipe


def write_atomic(path, write):
    """write(temporary path), then rename: a killed process leaves the old file or the new one, never half of one."""
    temporary = Path(f"{path}.tmp")
    write(temporary)
    os.replace(temporary, path)


def save_model(directory, model, tokenizer, state=None):
    """config.json, vocab.json and weights.pt, in the model's dtype (the shipped weights are those of model.half()).
    `state`: the whole state_dict of a model that is spread over processes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    state = {k: v.cpu() for k, v in (state or model.state_dict()).items()}
    write_atomic(directory / "weights.pt", lambda p: torch.save(state, p))
    write_atomic(directory / "config.json", lambda p: p.write_text(json.dumps(asdict(model.cfg), indent=1)))


def build_model(cfg, tokenizer):
    return InternVideo3(cfg, [tokenizer.token_id("<|image_pad|>"), tokenizer.token_id("<|video_pad|>")])


def load_model(directory, device="cpu", dtype=torch.float32):
    """→ (model, processor) of a checkpoint directory, ours or Hugging Face's. The weights replace those of an empty
    model file by file, so that no more than one file is in memory beside the model."""
    config = Path(directory) / "config.json"
    need(config.is_file(), f"{directory}: no model here (config.json is missing)")
    cfg, tokenizer = Config.load(config), Tokenizer.load(directory)
    with torch.device("meta"):                                               # shapes without memory
        model = build_model(cfg, tokenizer)
    lacking = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for path, state in read_weights(Path(directory)):
        for name, tensor in state.items():
            have, want = tuple(tensor.shape), lacking.pop(name, "absent")
            need(have == want, f"{path}: tensor {name} is {have}, the config needs {want}")
            state[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
        model.load_state_dict(state, strict=False, assign=True)
    for name, want in lacking.items():
        raise UserError(f"{path.parent}: tensor {name} is absent, the config needs {want}")
    return model.eval(), Processor(tokenizer, cfg)


def open_model(directory):
    """load_model to answer with: in bf16 on a GPU, if there is one."""
    return load_model(directory, "cuda", torch.bfloat16) if torch.cuda.is_available() else load_model(directory)


PATCH_EMBED = "visual.patch_embed.proj.weight"   # Hugging Face: Conv3d (D, 3, 2, p, p); ours: Linear (D, 3·2·p·p)


def read_weights(directory):
    """Yield (file, {name: tensor}): of our weights.pt, or of each safetensors file of a Hugging Face checkpoint, whose
    names are ours behind "model."."""
    path, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not path.is_file() and not index.is_file():
        path = directory / "weights.pt"
        need(path.is_file(), f"{directory}: has no weights, neither weights.pt nor *.safetensors")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
            raise UserError(f"{path}: cannot be read ({str(e).partition('.')[0] or 'it is empty'})") from e
        yield path, state
        return
    safetensors = optional("safetensors")
    for name in [path.name] if path.is_file() else sorted(set(read_json(index)["weight_map"].values())):
        path = directory / name
        try:
            with safetensors.safe_open(path, "pt") as file:
                state = {key.removeprefix("model."): file.get_tensor(key) for key in file.keys()}
        except (OSError, safetensors.SafetensorError) as e:
            raise UserError(f"{path}: cannot be read ({e})") from e
        yield path, {k: v.flatten(1) if k == PATCH_EMBED else v for k, v in state.items()}


def save_hf(directory, model, tokenizer):
    """Write a Hugging Face checkpoint as transformers, vLLM or the authors' code read it: model.safetensors,
    config.json, the tokenizer with the files beside it. The authors' code itself is a file of theirs to copy."""
    directory, cfg = Path(directory), model.cfg
    need(cfg.attn != "m2la", f"{directory}: Hugging Face's layouts have no room for this attention; fold() it first")
    need(isinstance(tokenizer, HFTokenizer), f"{directory}: needs a tokenizer.json, the model has our vocab.json")
    save_file = optional("safetensors.torch").save_file
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    embed = state[PATCH_EMBED] = state[PATCH_EMBED].view(-1, 3, 2, cfg.patch, cfg.patch)
    state = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in state.items()}
    write_atomic(directory / "model.safetensors", lambda p: save_file(state, p, {"format": "pt"}))
    tokenizer.save(directory)
    config = cfg.to_hf(tokenizer) | {"dtype": str(embed.dtype).removeprefix("torch.")}
    write_atomic(directory / "config.json", lambda p: p.write_text(json.dumps(config, indent=1)))


def find_model(argument=None, flag="--model"):
    """A stage's directory, a run (→ its last finished stage), or None (→ the newest run under runs/, which it says)."""
    newest_first = sorted(Path("runs").glob("*"), key=lambda path: -path.stat().st_mtime)
    for run in [Path(argument)] if argument else newest_first:
        for directory in (run, *(run / stage for stage in reversed(STAGES))):
            if (directory / "config.json").is_file():
                if not argument and len(newest_first) > 1:
                    print(f"model: {directory}", file=sys.stderr)
                return directory
    raise UserError(f"{argument or 'runs/'}: no model found; train one with `python train.py` or give {flag} DIR, of a "
                    "run, a stage or a downloaded checkpoint")


def estimate(name, memory, **training):
    """Yield lines: a preset or a model's directory, with GQA and with M²LA (its own, or as published: rows half as wide
    as GQA's), on `memory` GB (10⁹ bytes). To answer, in bf16: parameters, cache bytes of a token, and the tokens whose
    cache fits beside the weights; where text and vision have different ranks, the wider. To train: `training_bytes`."""
    need(name in PRESETS or Path(name).is_dir(), f"{name}: neither a preset ({', '.join(PRESETS)}) nor a directory")
    cfg = Config.preset(name) if name in PRESETS else Config.load(find_model(name) / "config.json")
    half = cfg.kv_heads * cfg.head_dim
    P = min(cfg.head_dim, half // 2)
    published = replace(cfg, attn="m2la", rope_width=P, ranks=((half - P,) * 2,) * cfg.layers)
    kinds = replace(cfg, attn="gqa"), published if cfg.attn == "gqa" else cfg
    with torch.device("meta"):                                               # shapes without memory
        models = [InternVideo3(kind, (0, 1)).to(torch.bfloat16) for kind in kinds]
    if training:
        settings = ", ".join(f"{k} {v}" for k, v in training.items() if v)
        yield f"{name}, a training step in fp32 under bf16 autocast; GB, of {memory:g}; {settings}"
        columns = *training_bytes(models[0], **training), "total", "longest seq"
        yield f"{'attention':<10}{''.join(f'{column:>13}' for column in columns)}"
        for model in models:
            parts = partial(training_bytes, model, **training)
            longest = bisect_right(range(2 ** 24), memory * 1e9, key=lambda T: sum(parts(seq=T).values())) - 1
            gigabytes = (f"{size / 1e9:>13.2f}" for size in (*parts().values(), sum(parts().values())))
            yield f"{model.cfg.attn:<10}{''.join(gigabytes)}{max(0, longest):>13,}"
        return
    yield f"{name} in bf16, {memory:g} GB for weights and the cache of one sequence; activations come on top"
    yield f"{'attention':<10}{'parameters':>16}{'weights, GB':>14}{'cache bytes a token':>21}{'largest context':>17}"
    for model in models:
        weights = sum(p.nbytes for p in model.parameters())
        segments = zip(*model.new_cache(1, 0).rows)                          # each layer holds its spare row alone
        token = max(sum(row.nbytes for row in segment) for segment in segments)         # of the wider modality
        context = max(0, int((memory * 1e9 - weights) // token))
        yield f"{model.cfg.attn:<10}{weights // 2:>16,}{weights / 1e9:>14.2f}{token:>21,}{context:>17,}"


def takes_muon(name, parameter):
    """Weight matrices inside the blocks: what train.py gives to Muon, with one moment each."""
    return parameter.dim() == 2 and ("layers." in name or "blocks." in name)


def training_bytes(model, seq, packs=1, checkpointing=False, freeze=(), muon=False):
    """{part: bytes} of a step of train.py on one GPU, `packs` sequences of `seq` tokens in one forward."""
    parts = {"vision": "visual.(blocks|patch_embed|pos_embed)", "projector": "visual.(merger|deepstack)"}
    trained = {n: p for n, p in model.named_parameters() if not any(re.match(parts[part], n) for part in freeze)}
    count, every = (sum(p.numel() for p in parameters) for parameters in (trained.values(), model.parameters()))
    matrices = sum(p.numel() for n, p in trained.items() if muon and takes_muon(n, p))
    saved, working = activation_bytes(model.cfg, seq, packs, checkpointing=checkpointing, freeze=freeze)
    return {"weights": 4 * every, "bf16 copies": 2 * every, "gradients": 4 * count,
            "optimizer": 8 * (count - matrices) + 4 * matrices, "activations": saved, "working": working}


def activation_bytes(cfg, T, packs=1, keys=2.0, seen=0.53, answers=256, vision=1.0, checkpointing=False, freeze=(),
                     mixed=True):
    """Bytes that autograd keeps of a training forward, and the most that is computed beside them at once. `packs`
    sequences of T tokens, a share `vision` of them pixels. The blocks of the mask hold keys·T keys (2: the prompt's own
    and copies for its answers), a query meets seen·T. mixed: bf16 autocast; then each linear layer has a copy of
    its input in 2 bytes. A test holds it against what autograd keeps of a tiny model: within 5 %."""
    e, copies = (2, 5) if mixed else (4, 2)              # bytes of a product's operand; copies of two norms' outputs
    D, C = cfg.hidden, cfg.vision_hidden * cfg.merge ** 2
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    width, latent, repeat = q, 0, cfg.heads // cfg.kv_heads
    if cfg.attn != "gqa":
        width += cfg.heads * cfg.rope_width
        latent = q + 2 * kv + cfg.rope_width + sum(map(sum, cfg.ranks)) // cfg.layers
    layer = 4 * (4 * D + 2 * q + 2 * kv)                 # norms keep their input and its normal form, in fp32
    layer += e * (copies * D + latent + 2 * width * (1 + keys / repeat) + q + 4 * cfg.mlp)    # q, out; k, v
    layer += e * repeat * seen * T                       # the mask, as the kernel adds it to the scores
    block = 8 * C + e * (9 * C + 2 * cfg.vision_mlp * cfg.merge ** 2)                    # the tower, per vision token
    kept, kept_block = (4 * D, 4 * C) if checkpointing else (layer, block)
    tower = cfg.vision_layers * kept_block + e * 6 * (cfg.patch * cfg.merge) ** 2        # and the pixels
    mergers = (1 + len(cfg.deepstack)) * C * (4 + e * 3)
    pixels = tower * ("vision" not in freeze) + mergers * (not {"vision", "projector"} <= set(freeze))
    saved = packs * (T * (cfg.layers * kept + 8 * D + vision * pixels) + answers * (4 * cfg.vocab + e * D))
    one = max(T * max(layer, block) * checkpointing, answers * cfg.vocab * (8 + e))      # computed anew; or logits
    return round(saved), round(packs * (one + T * T))                                    # T·T: the mask of bools


def run_cli(main):
    """Call main(); a mistake of the user becomes one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, KeyboardInterrupt) as e:
        line = f"error: {e}" if isinstance(e, UserError) else "interrupted; run the same command again to go on"
        if os.environ.get("RANK", "0") != "0":               # of several processes the first speaks, if it still can
            time.sleep(2)
        print(line, file=sys.stderr)
        raise SystemExit(2 if isinstance(e, UserError) else 130) from None


def main():
    parser = argparse.ArgumentParser(description="Ask the model about a video.")
    add = parser.add_argument
    add("video", nargs="?")
    add("question", nargs="?")
    add("--model", help="a stage's directory or a run; default: the newest run")
    add("--start", type=float, default=0.0, help="look from this second")
    add("--end", type=float, help="look up to this second")
    add("--fps", type=float, default=2.0, help="frames per second (default 2)")
    add("--max-frames", type=int, default=768, help="at most so many frames (default 768)")
    add("--max-new", type=int, default=128, help="at most so many answer tokens (default 128)")
    add("--estimate", metavar="PRESET", help="parameters, cache and largest context of a preset or a model's directory")
    add("--memory", type=float, default=80, help="GB of memory for --estimate (default 80)")
    add = parser.add_argument_group("--estimate of a training step (train.py, one GPU)").add_argument
    add("--train", action="store_true", help="weights, gradients, optimizer, activations, and the longest sequence")
    add("--seq", type=int, default=8192, help="tokens of a pack, nearly all of them pixels (default 8192)")
    add("--packs", type=int, default=1, help="packs in one forward (default 1)")
    add("--checkpointing", action="store_true", help="keep each layer's input alone, compute the rest again")
    add("--freeze", default="", help="parts that are not trained: vision,projector")
    add("--muon", action="store_true", help="Muon for weight matrices: one moment, not AdamW's two")
    args = parser.parse_args()
    need(min(args.fps, args.max_frames, args.max_new, args.memory, args.seq, args.packs) > 0,
         "--fps, --max-frames, --max-new, --memory, --seq and --packs must be positive")
    freeze = tuple(part for part in args.freeze.split(",") if part)
    need(set(freeze) <= {"vision", "projector"}, f"--freeze {args.freeze}: parts are vision, projector")
    if args.estimate:
        training = {k: getattr(args, k) for k in ("seq", "packs", "checkpointing", "muon")} | {"freeze": freeze}
        print(*estimate(args.estimate, args.memory, **training if args.train else {}), sep="\n")
        return
    need(args.question is None or args.question.strip(), "the question is empty")
    if args.question is None:
        parser.error("the following arguments are required: video, question")
    model, processor = open_model(find_model(args.model))
    video = {"type": "video", "video": str(Path(args.video).resolve()), "start": args.start, "end": args.end,
             "fps": args.fps, "max_frames": args.max_frames}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": args.question}]}]
    sample, stop = processor.encode(messages, generation=True), processor.tokenizer.token_id("<|im_end|>")
    print(generate(model, [sample], stop, args.max_new)[0].text(processor.tokenizer))


if __name__ == "__main__":
    run_cli(main)
