"""Our Qwen3-VL is transformers' Qwen3-VL: checkpoints written by its `save_pretrained` with random weights, read by
`iv3.load_model`, must give the same prompt text, position ids and logits; and what we write, it reads.

Written for transformers 4.57.3, the version the authors pin; run with 5.23.0 too. In 5.x
- the config keeps rope_theta and rope_scaling together, as rope_parameters (`load_config` of extras/hf.py reads both);
- the model wants `mm_token_type_ids` (0 text, 1 image, 2 video) beside the ids to find positions and cannot do without;
- the processor replaces only <|video_pad|>, so the template's <|vision_start|>…<|vision_end|> stays around all patches
  of a video. 4.57.3, which the checkpoints were trained with, replaces it too, and so do we.
Neither imports its pixel preprocessing without torchvision: sizes and pixels are compared with its source alone, with
Pillow's rule written out in the place of torchvision's resize; everywhere else patches are ours on both sides."""
import __future__

import ast
import importlib.util
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jinja2
import numpy as np
import pytest
import torch
from test_iv3 import noise, user, video, write_image, write_video

import iv3
from iv3 import Config, UserError
from mcr_agent import Budget, LiveModel, run_agent

WHY = "optional: compares with Hugging Face's Qwen3-VL (pip install transformers==4.57.3)"
transformers = pytest.importorskip("transformers", minversion="4.57", reason=WHY)
import safetensors.torch
import tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.video_utils import VideoMetadata

LIMITS = ("min_volume", "max_volume", "min_pixels", "max_pixels")
V5 = int(transformers.__version__.split(".")[0]) >= 5
CLOSE = dict(atol=1e-4, rtol=1e-4)

# What the template of the Qwen3-VL checkpoints does with messages without a tool schema.
TEMPLATE = """{%- for m in messages %}{%- if m.role != 'tool' %}{{- '<|im_start|>' + m.role + '\n' }}
{%- else %}{{- '' if not loop.first and loop.previtem.role == 'tool' else '<|im_start|>user' }}
{{- '\n<tool_response>\n' }}{%- endif %}
{%- if m.content is string %}{{- m.content }}{%- else %}{%- for c in m.content %}
{%- if c.type == 'text' %}{{- c.text }}{%- else %}{{- '<|vision_start|><|' + c.type + '_pad|><|vision_end|>' }}
{%- endif %}{%- endfor %}{%- endif %}{%- if m.role == 'tool' %}{{- '\n</tool_response>' }}{%- endif %}
{%- if m.role != 'tool' or loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# Per media file: what transformers' preprocessor would have kept of it at 2 frames a second: (indices, file's fps).
KEPT = {"wide.mp4": (range(6), 2), "square.mp4": (range(4), 2), "odd.mp4": (range(3), 2),
        "ramp.mp4": (range(0, 40, 2), 4)}
CONVERSATIONS = {
    "text": [user("What colour is the shape?"), {"role": "assistant", "content": "red circle"}],
    "image": [user({"type": "image", "image": "picture.png"}, "What colour?")],
    "video": [{"role": "system", "content": "Look closely."}, user(video("wide.mp4"), "What is it?\n\nSay.")],
    "odd": [user(video("odd.mp4"), "How many?"), {"role": "assistant", "content": "3"}],
    "several": [user(video("wide.mp4"), " and ", {"type": "image", "image": "picture.png"}, video("square.mp4")),
                {"role": "assistant", "content": "<think>look</think>red"},
                {"role": "tool", "content": [video("ramp.mp4"), {"type": "text", "text": "all of it"}]},
                {"role": "assistant", "content": "blau, größer 日本"}],
    "tools in a row": [user("When?"), {"role": "assistant", "content": "<think>both</think>"},
                       *({"role": "tool", "content": c} for c in ("34 to 36", [video("odd.mp4")], "oak")), user("So?"),
                       {"role": "assistant", "content": "oak"}, {"role": "tool", "content": "last"}]}


class Done:
    """Stands for the image and the video processor: is handed the result."""
    merge_size = temporal_patch_size = 2

    def __call__(self, images=None, videos=None, **_):
        return dict(images or videos)


def theirs_of(directory):
    """transformers' model and processor of a checkpoint directory."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(directory, attn_implementation="eager", dtype="float32")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), pad_token="<|endoftext|>")
    with mock.patch.object(ProcessorMixin, "__init__", lambda *_, **__: None):        # it asks for torchvision
        processor = Qwen3VLProcessor(None, tokenizer)
    processor.tokenizer, processor.image_processor, processor.video_processor = tokenizer, Done(), Done()
    return model.eval(), processor


def random_checkpoint(directory, tied):
    """Written by transformers; every weight random, norms and biases too: a term that is left out shows."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(
            r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator([str(CONVERSATIONS)] * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=list(iv3.SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    text = dict(vocab_size=340, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                head_dim=16, intermediate_size=64, rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=tied,
                rope_scaling={"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]})
    vision = dict(depth=3, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=48,
                  num_position_embeddings=9, deepstack_visual_indexes=[0, 2], patch_size=16, spatial_merge_size=2)
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<|{token}|>") for name, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids))
    for name, p in model.named_parameters():
        std = 0.3 if p.dim() == 1 or "embed" in name else 0.8 * p[0].numel() ** -0.5
        p.data = std * torch.randn(p.shape) + (p.dim() == 1 and "norm" in name and name.endswith("weight"))
    model.save_pretrained(directory, max_shard_size="200MB" if tied else "100KB")
    tokenizer.save(str(directory / "tokenizer.json"))
    for kind, low in (("", 2048), ("video_", 1024)):
        (directory / f"{kind}preprocessor_config.json").write_text(json.dumps(
            {"size": {"shortest_edge": low, "longest_edge": 10 ** 7}}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("one") / "model", tied=True)


@pytest.fixture(scope="module", params=[True, False], ids=["tied-one-file", "untied-shards"])
def world(request, tmp_path_factory):
    """One checkpoint, read by us and by transformers, and a folder of media."""
    folder = tmp_path_factory.mktemp("parity")
    write_video(folder / "wide.mp4", noise(6, 64, 128), fps=2)
    write_video(folder / "square.mp4", noise(4, 64, 64, 1), fps=2)
    write_video(folder / "odd.mp4", noise(3, 96, 64, 3), fps=2)
    write_video(folder / "ramp.mp4", [10 + 5 * i for i in range(40)])
    write_image(folder / "picture.png", noise(1, 96, 64, 2)[0])
    directory = random_checkpoint(folder / "model", tied=request.param)
    ours, processor = iv3.load_model(directory)
    theirs, their_processor = theirs_of(directory)
    return SimpleNamespace(folder=folder, directory=directory, ours=ours, processor=processor, theirs=theirs,
                           their_processor=their_processor)


def their_inputs(world, conversations, generation=False):
    """What transformers makes of conversations: → prompt texts, model inputs (left-padded as for its generation)."""
    texts = [jinja2.Template(TEMPLATE).render(messages=messages, add_generation_prompt=generation)
             for messages in conversations]
    results = {"images": {}, "videos": {}}
    for item in [c for messages in conversations for m in messages if isinstance(m["content"], list)
                 for c in m["content"] if c["type"] != "text"]:
        patches, (h, w), *_ = world.processor.load(item, world.folder)
        result, suffix = (results["images"], "") if item["type"] == "image" else (results["videos"], "_videos")
        grid = torch.tensor([[len(patches) // (h * w), h, w]])
        for name, value in ((f"pixel_values{suffix}", patches / 127.5 - 1), (f"{item['type']}_grid_thw", grid)):
            result[name] = torch.cat([result[name], value]) if name in result else value
        if item["type"] == "video":
            indices, fps = KEPT[item["video"]]
            result.setdefault("video_metadata", []).append(
                VideoMetadata(total_num_frames=len(indices), fps=fps, frames_indices=list(indices)))
    if V5:
        return their_inputs_v5(world, texts, **results)
    inputs = world.their_processor(text=texts, **{k: v or None for k, v in results.items()}, padding=True,
                                   padding_side="left", return_tensors="pt")
    ids = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    return world.their_processor.tokenizer.batch_decode(ids), inputs


def their_inputs_v5(world, texts, images, videos):
    """transformers 5, by its methods; the outer pair that it leaves around a video taken off."""
    hf, number = world.their_processor, {"image": itertools.count(), "video": itertools.count()}

    def replace(match):
        i = next(number[kind := match[2]])
        if kind == "image":
            return match[1] + hf.replace_image_token(images, i) + match[3]
        return hf.replace_video_token(videos, i)
    texts = [re.sub(r"(<\|vision_start\|>)<\|(image|video)_pad\|>(<\|vision_end\|>)", replace, t) for t in texts]
    inputs = hf.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    ids = inputs["input_ids"]
    kinds = (ids == hf.image_token_id) + 2 * (ids == hf.video_token_id)
    pixels = {k: v for k, v in {**images, **videos}.items() if k != "video_metadata"}
    return texts, {"input_ids": ids, "attention_mask": inputs["attention_mask"], "mm_token_type_ids": kinds, **pixels}


def their_positions(world, inputs):
    names = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids")
    return world.theirs.model.get_rope_index(**{n: inputs[n] for n in names if n in inputs})[0]


@pytest.mark.parametrize("name", CONVERSATIONS)
@torch.no_grad()
def test_prompt_positions_and_logits(name, world):
    sample = world.processor.encode(CONVERSATIONS[name], world.folder)
    texts, inputs = their_inputs(world, [CONVERSATIONS[name]])
    assert world.processor.tokenizer.decode(sample.ids.tolist()) == texts[0]
    assert torch.equal(sample.ids, inputs["input_ids"][0])
    assert torch.equal(sample.positions, their_positions(world, inputs)[:, 0])
    hidden = world.ours(sample.ids[None], sample.positions[:, None], sample.patches, sample.grids)
    torch.testing.assert_close(world.ours.logits(hidden), world.theirs(**inputs).logits, **CLOSE)


@torch.no_grad()
def test_a_padded_batch_decoded_with_a_cache(world):
    """Their generation pads on the left, ours on the right: equal positions, logits at every step, and tokens."""
    conversations = [CONVERSATIONS[name][:1] for name in ("text", "several", "image", "odd")]
    _, inputs = their_inputs(world, conversations, generation=True)
    batch = [world.processor.encode(messages, world.folder, generation=True) for messages in conversations]
    positions, valid = their_positions(world, inputs), inputs["attention_mask"].bool()
    assert len(set(valid.sum(1).tolist())) == 4
    for i, sample in enumerate(batch):
        assert torch.equal(sample.positions, positions[:, i, valid[i]])
    theirs = world.theirs.generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, suppress_tokens=list(world.ours.vision_ids),
        return_dict_in_generate=True, output_logits=True)
    tokens = theirs.sequences[:, valid.shape[1]:]
    cache, last = iv3.prefill(world.ours, batch, room=8)
    position = torch.tensor([s.next_position for s in batch])
    for step, expected in enumerate(theirs.logits):
        torch.testing.assert_close(world.ours.logits(last), expected, **CLOSE)
        last = world.ours(tokens[:, step:step + 1], (position + step).expand(3, -1)[..., None], cache=cache)[:, 0]
    assert [out.ids for out in iv3.generate(world.ours, batch, -1, 8)] == tokens.tolist()


@pytest.mark.skipif(not V5, reason="about transformers 5")
def test_transformers_5_keeps_a_pair_around_a_video(directory):
    """A change to know about: its own replacement, of the pad alone, is not the prompt of the checkpoints."""
    metadata = VideoMetadata(total_num_frames=4, fps=2, frames_indices=[0, 1, 2, 3])
    block = theirs_of(directory)[1].replace_video_token(
        {"video_grid_thw": torch.tensor([[2, 2, 2]]), "video_metadata": [metadata]}, 0)
    assert block == "".join(f"<{t} seconds><|vision_start|><|video_pad|><|vision_end|>" for t in ("0.2", "1.2"))


def source_of(name, file, **scope):
    """A function or method of a module of transformers that cannot be imported without torchvision."""
    folder = Path(importlib.util.find_spec("transformers.models").submodule_search_locations[0])
    node = next(n for n in ast.walk(ast.parse((folder / file).read_text())) if getattr(n, "name", None) == name)
    node.decorator_list = []
    code = compile(ast.Module([node], []), name, "exec", flags=__future__.annotations.compiler_flag)
    exec(code, scope)
    return scope[name]


VIDEO_FILE = "qwen3_vl/video_processing_qwen3_vl.py"
IMAGE_FILE = "qwen2_vl/image_processing_qwen2_vl_fast.py"
IMAGE_SIZES = "qwen2_vl/image_processing_qwen2_vl.py"


def test_sizes_are_theirs():
    smart_resize, rng = source_of("smart_resize", VIDEO_FILE, math=math), random.Random(0)
    for _ in range(2000):
        n, h, w = rng.randint(2, 40), rng.randint(32, 900), rng.randint(32, 900)
        limits = rng.choice([(4096, 25_165_824), (10 ** 6, 2 * 10 ** 6)])
        assert iv3.target_size(n, h, w, 32, *limits) == smart_resize(n, h, w, 2, 32, *limits), (n, h, w)


def test_sizes_with_frame_tokens_are_those_of_qwens_utilities():
    """Theirs (qwen_vl_utils, which the authors' evaluation uses) is the rule for an image, for each frame alone."""
    smart_resize, rng = source_of("smart_resize", IMAGE_SIZES, math=math), random.Random(0)
    for _ in range(60):
        n, h, w = rng.randint(1, 7), rng.randint(32, 400), rng.randint(32, 400)
        least, most = rng.choice([(1, 16), (16, 64), (64, 64), (4, 128)])
        frames = np.zeros((n, h, w, 3), np.uint8)
        _, (rows, columns) = iv3.patchify(frames, Config(max_volume=2048), frame_tokens=(least, most))
        assert (16 * rows, 16 * columns) == smart_resize(h, w, 32, 1024 * least, 1024 * most), (h, w, least, most)


def pillow_resize(image, size, **_):
    """Bicubic with antialiasing on bytes (…,H,W), as Pillow documents it: first along the width, then along the height,
    and bytes again after each, which cuts what overshoots. Keys' kernel (a = -1/2), wider where the picture shrinks."""
    x = image
    for old, new in ((x.shape[-1], size.width), (x.shape[-2], size.height)):
        centre = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new
        d = ((torch.arange(old) + 0.5) - centre[:, None]).abs() / max(1, old / new)                 # (new, old)
        weight = torch.where(d < 1, 1.5 * d ** 3 - 2.5 * d ** 2 + 1,
                             torch.where(d < 2, -0.5 * d ** 3 + 2.5 * d ** 2 - 4 * d + 2, 0))
        x = (x.double() @ (weight / weight.sum(1, keepdim=True)).T).round().clamp(0, 255).mT        # turned twice
    return x.byte()


def their_pixels(frames, cfg, image):
    """What transformers' preprocessor makes of frames (F,H,W,3) → (pixel values, grid (t, h, w))."""
    utils = [transformers.image_utils, transformers.image_transforms, transformers.video_utils]
    scope = {k: v for module in utils for k, v in vars(module).items()} | {
        "torch": torch, "BatchFeature": transformers.BatchFeature, "PILImageResampling": SimpleNamespace(BICUBIC=3)}
    file, limits = (IMAGE_FILE, "pixels") if image else (VIDEO_FILE, "volume")
    scope["smart_resize"] = source_of("smart_resize", IMAGE_SIZES if image else VIDEO_FILE, math=math)
    processor = SimpleNamespace(
        resize=pillow_resize, rescale_and_normalize=lambda x, _, factor, __, mean, std: (x * factor - mean) / std)
    size = transformers.image_utils.SizeDict(shortest_edge=getattr(cfg, f"min_{limits}"),
                                             longest_edge=getattr(cfg, f"max_{limits}"))
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)
    out = source_of("_preprocess", file, **scope)(
        processor, [x[0] if image else x], do_resize=True, size=size, interpolation=None,
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=0.5, image_std=0.5, patch_size=16,
        temporal_patch_size=2, merge_size=2, disable_grouping=False, return_tensors="pt")
    return [out[key] for key in sorted(out, key=lambda key: "grid" in key)]


@pytest.mark.skipif(V5, reason="transformers 5 divides these methods otherwise")
@pytest.mark.parametrize("shape, image", [
    ((4, 64, 96), False), ((5, 123, 201), False), ((3, 240, 432), False), ((2, 33, 40), False), ((1, 96, 64), True),
    ((1, 123, 201), True), ((1, 500, 300), True)])
def test_pixels_are_theirs(shape, image):
    """Noise, as it is, smaller and larger. Nothing is resized in the first: equal but for the rounding of x/127.5 - 1.
    Elsewhere within two levels of 255 and mostly equal: torch resizes bytes with 16-bit weights, here they are exact.
    (Its resize is torchvision's: with torchvision 0.28, transformers 4.57.3 gave all our values to 6e-8.)"""
    cfg = Config.preset("qwen3-vl-8b")
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    patches, grid = iv3.patchify(frames, cfg, image)
    expected, expected_grid = their_pixels(frames, cfg, image)
    assert expected_grid.tolist() == [[(shape[0] + 1) // 2, *grid]]
    off = (patches / 127.5 - 1 - expected).abs() * 127.5
    resized = (16 * grid[0], 16 * grid[1]) != shape[1:]
    assert off.max() < (2.01 if resized else 1e-4) and (off > 0.5).float().mean() < 0.02


# ---------------------------------------------------------------------------------------------------------- checkpoints

def damaged(directory, copy, change):
    """A copy of a one-file checkpoint with other tensors."""
    shutil.copytree(directory, copy, dirs_exist_ok=True)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    safetensors.torch.save_file(change(tensors), copy / "model.safetensors", {"format": "pt"})
    return copy


def test_the_settings_of_a_checkpoint(world):
    cfg = world.ours.cfg
    assert cfg == Config(
        vocab=340, hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=64, theta=1e4, mrope_sections=(4, 2, 2),
        tied=cfg.tied, vision_hidden=32, vision_layers=3, vision_heads=2, vision_mlp=48, pos_side=3, deepstack=(0, 2),
        min_volume=1024, max_volume=10 ** 7, min_pixels=2048, max_pixels=10 ** 7)
    assert cfg.tied == (not (world.directory / "model.safetensors.index.json").is_file())


@torch.no_grad()
def test_what_we_write_transformers_reads(world, tmp_path):
    """Bit by bit; read back by us too, and found as --model finds it."""
    sample = world.processor.encode(CONVERSATIONS["several"], world.folder)
    _, inputs = their_inputs(world, [CONVERSATIONS["several"]])
    expected = world.theirs(**inputs).logits
    iv3.hugging_face().save_hf(tmp_path / "hf", world.ours, world.processor.tokenizer)
    theirs, _ = theirs_of(tmp_path / "hf")
    torch.testing.assert_close(theirs(**inputs).logits, expected, atol=0, rtol=0)
    assert iv3.find_model(tmp_path / "hf") == tmp_path / "hf"
    ours, processor = iv3.load_model(iv3.find_model(tmp_path / "hf"))
    hidden = ours(sample.ids[None], sample.positions[:, None], sample.patches, sample.grids)
    torch.testing.assert_close(ours.logits(hidden), expected, **CLOSE)
    assert ours.cfg == world.ours.cfg and processor.tokenizer.tokens[:13] == list(iv3.SPECIALS)


def test_what_we_do_not_read_is_passed_on(world, tmp_path):
    """By training in our format too: the chat template and settings that transformers and vLLM look for."""
    iv3.save_model(tmp_path / "trained", world.ours, world.processor.tokenizer)
    iv3.hugging_face().save_hf(tmp_path / "hf", world.ours, iv3.load_model(tmp_path / "trained")[1].tokenizer)
    names = ["chat_template.jinja", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json",
             "video_preprocessor_config.json"]
    assert all((tmp_path / "hf" / name).read_bytes() == (world.directory / name).read_bytes() for name in names)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    sample = world.processor.encode(CONVERSATIONS["text"])
    assert tokenizer.apply_chat_template(CONVERSATIONS["text"], return_dict=False) == sample.ids.tolist()


@torch.no_grad()
def test_our_own_checkpoints_keep_a_hugging_face_tokenizer(world, tmp_path):
    """Training starts from a Hugging Face directory and saves in our format."""
    iv3.save_model(tmp_path, world.ours, world.processor.tokenizer)
    ours, processor = iv3.load_model(tmp_path)
    assert ours.cfg == world.ours.cfg and processor.tokenizer.tokens == world.processor.tokenizer.tokens
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), world.ours.state_dict().values()))


def test_the_command_reads_a_hugging_face_checkpoint(world, directory, tmp_path):
    """`python iv3.py`, where iv3 is also __main__; a mistake in its files is one line."""
    ask = [sys.executable, iv3.__file__, str(world.folder / "odd.mp4"), "What?", "--max-new", "2", "--model"]
    done = subprocess.run([*ask, str(directory)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    done = subprocess.run([*ask, str(tmp_path / "copy")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_agent_runs_on_a_hugging_face_checkpoint(world):
    """Random weights, but the first word is the route's: its tokens are found in the tokenizer.json."""
    budget = Budget(calls=2, tokens=4000, turn=20)
    live = LiveModel(world.ours, world.processor, budget.tokens)
    result = run_agent(live, world.folder / "ramp.mp4", "Which?", ["one", "two"], budget=budget)
    likeliest = max(result.route, key=result.route.get)
    assert result.trace[1]["reason"][0] == likeliest[0] and (result.steps, result.budget_exhausted) == (2, "calls")


def test_damaged_checkpoints_are_named(directory, tmp_path):
    name = "language_model.layers.1.self_attn.k_proj.weight"
    for change, named in (
            (lambda t: t | {f"model.{name}": torch.zeros(8, 48)}, rf"{name} is \(8, 48\), the config needs \(32, 48\)"),
            (lambda t: {k: v for k, v in t.items() if name not in k}, f"{name} is absent, the config needs"),
            (lambda t: t | {"model.extra": torch.zeros(3)}, r"extra is \(3,\), the config needs absent")):
        with pytest.raises(UserError, match=named):
            iv3.load_model(damaged(directory, tmp_path / "copy", change))
    path = tmp_path / "copy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        iv3.load_model(tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
        iv3.load_model(tmp_path / "copy")


def test_a_missing_shard_is_named(tmp_path):
    random_checkpoint(tmp_path, tied=False)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match="model-00002-of-.*cannot be read"):
        iv3.load_model(tmp_path)


@pytest.mark.parametrize("part, key, value, named", [
    ("text_config", "hidden_size", None, "text_config.hidden_size is missing"),
    ("text_config", "hidden_act", "gelu", "text_config.hidden_act is 'gelu'"),
    ("text_config", "rope_scaling", {"rope_type": "yarn", "factor": 4}, "text_config.rope_type is 'yarn'"),
    ("vision_config", "temporal_patch_size", 4, "vision_config.temporal_patch_size is 4")])
def test_a_config_of_another_architecture_is_named(part, key, value, named, directory, tmp_path):
    config = json.loads((directory / "config.json").read_text())
    config[part] |= {key: value}
    if value is None:
        del config[part][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: {named}"):
        Config.load(tmp_path / "config.json")


class Ids:
    """Stands for a tokenizer whose ids nobody looks at."""
    token_id = staticmethod(len)


@pytest.mark.parametrize("name", ["qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b"])
def test_full_size_layouts(name, tmp_path):
    """The config we write, read by both: the names and shapes of transformers' model, and the preset again."""
    cfg = Config.preset(name)
    (tmp_path / "config.json").write_text(json.dumps(iv3.hugging_face().config_for(cfg, Ids)))
    assert Config.load(tmp_path / "config.json") == cfg
    with torch.device("meta"):
        ours = iv3.InternVideo3(cfg, (1, 2)).state_dict()
        theirs = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(tmp_path)).state_dict()
    if cfg.tied:
        del theirs["lm_head.weight"]
    shapes = {k.removeprefix("model."): v.shape if v.dim() < 5 else v.flatten(1).shape for k, v in theirs.items()}
    assert {k: v.shape for k, v in ours.items()} == shapes


# ------------------------------------------------------------------------------------- the released InternVideo3 layout

class AuthorsAttention(torch.nn.Module):
    """The released layer (paper §3.2; the authors' SFT code) written out plainly, in the place of transformers' one."""

    def __init__(self, hidden, heads, width, rank):
        super().__init__()
        self.heads, self.width, self.rank = heads, width, rank
        self.q_proj = torch.nn.Linear(hidden, heads * 2 * width)
        self.kv_a_proj_with_mqa = torch.nn.Linear(hidden, rank + width)
        self.kv_b_proj = torch.nn.Linear(rank, heads * 2 * width, bias=False)
        self.o_proj = torch.nn.Linear(heads * width, hidden, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **_):
        B, T, _ = hidden_states.shape
        cos, sin = (x[:, None] for x in position_embeddings)                                 # (B,1,T,width)
        q_nope, q_rope = self.q_proj(hidden_states).view(B, T, self.heads, -1).transpose(1, 2).split(self.width, -1)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.rank, self.width], -1)
        k_nope, v = self.kv_b_proj(latent).view(B, T, self.heads, -1).transpose(1, 2).split(self.width, -1)

        def turn(x):                                                         # pairs x0,y0,x1,y1,… → halves, then rotate
            x = torch.cat([x[..., ::2], x[..., 1::2]], -1)
            return x * cos + torch.cat([-x[..., self.width // 2:], x[..., :self.width // 2]], -1) * sin
        k = torch.cat([k_nope, turn(k_rope[:, None]).expand_as(k_nope)], -1)
        score = torch.cat([q_nope, turn(q_rope)], -1) @ k.mT * (2 * self.width) ** -0.5
        score = score.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        return self.o_proj((score.softmax(-1) @ v).transpose(1, 2).flatten(2)), None


MLA = dict(kv_lora_rank=24, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)


@pytest.mark.parametrize("ranks", [24, [24, 16, 20]], ids=["one-rank", "a-rank-per-layer"])
@torch.no_grad()
def test_the_released_layout(ranks, tmp_path):
    """Logits of one forward and of prefill and decode; what we write holds the same tensors under the same names."""
    random_checkpoint(tmp_path, tied=False)
    theirs, _ = theirs_of(tmp_path)
    shutil.rmtree(tmp_path)
    for layer, rank in zip(theirs.model.language_model.layers, ranks if isinstance(ranks, list) else [ranks] * 3):
        layer.self_attn = AuthorsAttention(48, 4, 16, rank)
    theirs.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["text_config"] |= MLA | {"kv_lora_rank": ranks}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    random_checkpoint(tmp_path / "gqa", tied=False)
    shutil.copy(tmp_path / "gqa" / "tokenizer.json", tmp_path / "hf")
    ours, processor = iv3.load_model(tmp_path / "hf")
    write_video(tmp_path / "square.mp4", noise(4, 64, 64, 1), fps=2)
    sample = processor.encode([user(video("square.mp4"), "What colour?")], tmp_path)
    pixels = {"pixel_values_videos": sample.patches / 127.5 - 1, "video_grid_thw": torch.tensor([[2, 4, 4]])}
    expected = theirs(input_ids=sample.ids[None], position_ids=sample.positions[:, None], use_cache=False, **pixels,
                      **({"mm_token_type_ids": 2 * (sample.ids == ours.vision_ids[1])[None]} if V5 else {})).logits
    inputs = (sample.ids[None], sample.positions[:, None])
    torch.testing.assert_close(ours.logits(ours(*inputs, sample.patches, sample.grids)), expected, **CLOSE)
    cache, start = ours.new_cache(1, 40), len(sample.ids) - 2
    ours(inputs[0][:, :start], inputs[1][..., :start], sample.patches, sample.grids, cache=cache)
    last = [ours(inputs[0][:, i:i + 1], inputs[1][..., i:i + 1], cache=cache) for i in (start, start + 1)]
    torch.testing.assert_close(ours.logits(torch.cat(last, 1)), expected[:, start:], **CLOSE)
    iv3.hugging_face().save_hf(tmp_path / "ours", ours, processor.tokenizer)
    files = [safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("hf", "ours")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    limits = {name: getattr(ours.cfg, name) for name in LIMITS}
    assert replace(Config.load(tmp_path / "ours" / "config.json"), **limits) == ours.cfg
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["text_config"]["kv_lora_rank"] == ranks
    for wrong, named in (([24, 16, 20, 20], "3 pairs of ranks, one per layer; has 16 and 4"),
                         ([24, 24, 12], r"layers.\d.self_attn.kv_.*is \(.*, the config needs \(")):
        config["text_config"] |= {"kv_lora_rank": wrong}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=named):
            iv3.load_model(tmp_path / "hf")


def test_the_config_of_the_released_8b(directory, tmp_path):
    """Names and shapes of paper §3.2, and a row of 896 + 128 values; a width that the layer does not have is named."""
    config = iv3.hugging_face().config_for(Config.preset("qwen3-vl-8b"), Ids)
    config["text_config"] |= MLA | dict(kv_lora_rank=896, qk_nope_head_dim=128, qk_rope_head_dim=128, v_head_dim=128)
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = Config.load(tmp_path / "config.json")
    assert (cfg.attn, cfg.rope_width, cfg.ranks) == ("released", 128, ((896, 896),) * 36)
    with torch.device("meta"):
        state = iv3.InternVideo3(replace(cfg, layers=3, ranks=cfg.ranks[:3]), (1, 2)).state_dict()
    prefix = "language_model.layers.2.self_attn."
    assert {k.removeprefix(prefix): tuple(v.shape) for k, v in state.items() if prefix in k} == {
        "q_proj.weight": (8192, 4096), "q_proj.bias": (8192,), "kv_a_proj_with_mqa.weight": (1024, 4096),
        "kv_a_proj_with_mqa.bias": (1024,), "kv_b_proj.weight": (8192, 896), "o_proj.weight": (4096, 4096)}
    config["text_config"]["v_head_dim"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="text_config.v_head_dim is 64: must be head_dim, 128"):
        Config.load(tmp_path / "config.json")


@pytest.mark.parametrize("package", ["tokenizers", "safetensors"])
def test_an_absent_package_is_named(package, directory, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}, .* pip install safetensors tokenizers"):
        iv3.load_model(directory)
