"""Hugging Face's layouts: configs, tokenizers, safetensors of Qwen3-VL and InternVideo3 as released (§3.2).

iv3.py loads this file when it meets such a directory; nothing else needs it, nor safetensors and tokenizers.
To write one, for transformers, vLLM or the authors' code:

    import iv3
    model, processor = iv3.load_model("DIR")
    iv3.hugging_face().save_hf("OUT", model, processor.tokenizer)
"""
import importlib
import json
import math
from pathlib import Path

from iv3 import SPECIALS, Tokenizer, UserError, need, read_json, write_atomic


def optional(module):
    """Import a module of a package that only Hugging Face checkpoints need."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = module.split(".")[0]
        raise UserError(f"a Hugging Face checkpoint needs {package}, which is not installed: "
                        "pip install safetensors tokenizers") from e


# ---------------------------------------------------------------------------------------------------- configs
# Our fields → theirs, by the part of their config.json in which they stand.
HF_NAMES = {
    "text_config": {
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "mlp": "intermediate_size",
        "theta": "rope_theta",
        "mrope_sections": "mrope_section",               # inside "rope_scaling", see ROPE_KEYS
        "eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
    },
    "vision_config": {
        "vision_hidden": "hidden_size",
        "vision_layers": "depth",
        "vision_heads": "num_heads",
        "vision_mlp": "intermediate_size",
        "patch": "patch_size",
        "merge": "spatial_merge_size",
        "pos_side": "num_position_embeddings",           # theirs is the whole table, our side squared
        "deepstack": "deepstack_visual_indexes",
    },
}

# What our code has built in: a config may leave it out, but not say otherwise.
HF_FIXED = {
    "text_config": {"hidden_act": "silu", "rope_type": "default", "mrope_interleaved": True},
    "vision_config": {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "temporal_patch_size": 2},
}

# What they keep together: "rope_scaling" in transformers 4, "rope_parameters" (with rope_theta) in 5.
ROPE_KEYS = "rope_type", "mrope_interleaved", "mrope_section"

# The released InternVideo3 has "kv_lora_rank", its latent's rank, and these widths, which are all head_dim.
MLA_WIDTHS = "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"

# Size limits of images and videos stand in files of their own.
SIZE_FILES = {"pixels": "preprocessor_config.json", "volume": "video_preprocessor_config.json"}


def load_config(cls, directory):
    """An iv3.Config (`cls`) of a checkpoint: Qwen3-VL (transformers 4.57 on) or released InternVideo3."""
    path = Path(directory) / "config.json"
    config = read_json(path)
    values = {"min_volume": 4096, "min_pixels": 65_536}  # Qwen3-VL's, where no file says otherwise
    for part, names in HF_NAMES.items():
        theirs = settings_of(config, part)
        for key, value in HF_FIXED[part].items():
            need(theirs.get(key, value) == value,
                 f"{path}: {part}.{key} is {theirs.get(key)!r}: must be {value!r}")
        for name, key in names.items():
            need(key in theirs, f"{path}: {part}.{key} is missing")
            values[name] = theirs[key]
    values["pos_side"] = math.isqrt(values["pos_side"])
    values |= released_attention(config["text_config"], values, path)
    for kind, file in SIZE_FILES.items():
        values |= size_limits(path.parent / file, kind)
    return cls(**values)


def settings_of(config, part):
    """One part of their config.json, flat: where RoPE's settings and tie_word_embeddings stand varies."""
    theirs = {"tie_word_embeddings": config.get("tie_word_embeddings", False)}
    theirs |= config.get(part, {})
    theirs |= theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    return theirs


def released_attention(text, values, path):
    """Our fields of the released M²LA layer, none if the config is of GQA."""
    ranks = text.get("kv_lora_rank")                     # one of all layers, or a list
    if not ranks:
        return {}
    head_dim = values["head_dim"]
    for key in MLA_WIDTHS:
        need(text.get(key) == head_dim,
             f"{path}: text_config.{key} is {text.get(key)}: must be head_dim, {head_dim}")
    if not isinstance(ranks, list):
        ranks = [ranks] * values["layers"]
    pairs = [[rank, rank] for rank in ranks]             # text and vision share a rank
    return {"attn": "released", "rope_width": head_dim, "ranks": pairs}


def size_limits(file, kind):
    """Our fields min_<kind> and max_<kind>, of a preprocessor's file if there is one that has them."""
    if not file.is_file():
        return {}
    size = read_json(file).get("size")
    if not size:
        return {}
    return {f"min_{kind}": size["shortest_edge"], f"max_{kind}": size["longest_edge"]}


def config_for(cfg, tokenizer):
    """What a Hugging Face config.json says of this model."""
    parts = {}
    for part, names in HF_NAMES.items():
        parts[part] = {key: getattr(cfg, name) for name, key in names.items()}
        parts[part] |= HF_FIXED[part]

    text = parts["text_config"]
    text["rope_scaling"] = {key: text.pop(key) for key in ROPE_KEYS}
    text |= {"model_type": "qwen3_vl_text", "max_position_embeddings": 262_144}  # Qwen3-VL's context
    if cfg.attn == "released":
        ranks = [rank for rank, _ in cfg.ranks]
        if len(set(ranks)) == 1:
            ranks = ranks[0]
        text |= {"kv_lora_rank": ranks, "q_lora_rank": None}
        text |= dict.fromkeys(MLA_WIDTHS, cfg.head_dim)

    vision = parts["vision_config"]
    vision["model_type"] = "qwen3_vl"
    vision["num_position_embeddings"] = cfg.pos_side ** 2
    vision["out_hidden_size"] = cfg.hidden

    config = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", **parts}
    config["image_token_id"] = tokenizer.token_id("<|image_pad|>")
    config["video_token_id"] = tokenizer.token_id("<|video_pad|>")
    config["vision_start_token_id"] = tokenizer.token_id("<|vision_start|>")
    config["vision_end_token_id"] = tokenizer.token_id("<|vision_end|>")
    config["tie_word_embeddings"] = cfg.tied
    return config


# -------------------------------------------------------------------------------------------------- tokenizer
class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer.json. BESIDE it lie files that transformers and vLLM want: we pass them on."""
    BESIDE = ("chat_template.jinja", "chat_template.json", "generation_config.json",
              "preprocessor_config.json", "tokenizer_config.json", "video_preprocessor_config.json")

    def __init__(self, path):
        tokenizers = optional("tokenizers")
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:                           # what it raises is a plain Exception
            raise UserError(f"{path}: not a tokenizer ({e})") from e
        self.tokens = [self.inner.id_to_token(i) for i in range(self.inner.get_vocab_size())]
        self.token_id = self.inner.token_to_id
        self.beside = {}                                 # name → bytes
        for name in self.BESIDE:
            file = path.with_name(name)
            if file.is_file():
                self.beside[name] = file.read_bytes()
        for special in SPECIALS:
            need(self.token_id(special) is not None, f"{path}: has no token {special}")

    def encode(self, text):
        text = text.encode(errors="replace").decode()    # half a surrogate pair is no text: "?"
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode(list(ids), skip_special_tokens=False)

    def save(self, directory):
        directory = Path(directory)
        self.inner.save(str(directory / "tokenizer.json"))
        for name, data in self.beside.items():
            (directory / name).write_bytes(data)


# ---------------------------------------------------------------------------------------------------- weights
# Their names are ours behind "model.", but for lm_head's. One shape differs: their patch embedding is a
# convolution, (Dv, 3, 2, p, p); ours is a linear layer, (Dv, 3·2·p·p).
PREFIX = "model."
PATCH_EMBED = "visual.patch_embed.proj.weight"


def read_safetensors(directory):
    """Yield (file, {name: tensor}) of each safetensors file of a checkpoint, in our names and shapes."""
    safetensors = optional("safetensors")
    names = ["model.safetensors"]
    if not (directory / names[0]).is_file():             # several files, and an index of what is in which
        index = read_json(directory / "model.safetensors.index.json")
        names = sorted(set(index["weight_map"].values()))
    for name in names:
        path = directory / name
        try:
            with safetensors.safe_open(path, "pt") as file:
                state = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}
        except (OSError, safetensors.SafetensorError) as e:
            raise UserError(f"{path}: cannot be read ({e})") from e
        if PATCH_EMBED in state:
            state[PATCH_EMBED] = state[PATCH_EMBED].flatten(1)
        yield path, state


def save_hf(directory, model, tokenizer):
    """Write a Hugging Face checkpoint as transformers, vLLM or the authors' code read it.

    model.safetensors, config.json, the tokenizer with the files beside it. The authors' code itself is a file
    of theirs to copy."""
    directory = Path(directory)
    cfg = model.cfg
    need(cfg.attn != "m2la",
         f"{directory}: Hugging Face's layouts have no room for this attention; fold() it first")
    need(isinstance(tokenizer, HFTokenizer),
         f"{directory}: needs a tokenizer.json, the model has our vocab.json")
    save_file = optional("safetensors.torch").save_file
    directory.mkdir(parents=True, exist_ok=True)

    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.cpu().contiguous()
        if name == PATCH_EMBED:
            tensor = tensor.view(-1, 3, 2, cfg.patch, cfg.patch)
        if not name.startswith("lm_head"):
            name = PREFIX + name
        state[name] = tensor
    write_atomic(directory / "model.safetensors", lambda path: save_file(state, path, {"format": "pt"}))

    tokenizer.save(directory)
    config = config_for(cfg, tokenizer)
    config["dtype"] = str(state[PREFIX + PATCH_EMBED].dtype).removeprefix("torch.")
    text = json.dumps(config, indent=1)
    write_atomic(directory / "config.json", lambda path: path.write_text(text))
