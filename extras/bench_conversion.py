"""What each idea of the conversion saves (§3.2): the tiny base converted again and again, at equal bytes.

    python extras/bench_conversion.py                                   # minutes, most of them healing
    python extras/bench_conversion.py --preset qwen3-vl-8b --json F.json

The authors published neither their conversion nor a figure of a model between conversion and training. So
the rows tell what each choice of ConvertSpec costs *before any training*, at half of GQA's cache (as the
released layer) and, some of them, at 30 %:

    transmla       the choices of TransMLA, https://arxiv.org/abs/2502.07864
    care           the choices of CARE, https://arxiv.org/abs/2603.17946
    + an idea      from `transmla` on one idea more at a time, in the order of §3.2
    - an idea      our default without one of them
    … + healing    these two with the few steps against the source that our default may take
    paper          as §3.2 describes: Global-Norm-Linear, one rotation, adapters, uniform ranks
    default        what train.py uses

`transmla` and `care` are our re-implementations of those methods' choices inside this conversion, not their
code: TransMLA without FreqFold (it loses with interleaved MRoPE), with a constant in place of QK-norm, which
it does not handle; CARE with the exact norm, because its code has none.

Measured: `loss_change` in nats per answer token on held-out rows, ± `loss_se` over clips; `out_err`, the
relative error of the attention outputs on the source's own inputs; with --preset, the same error of one
random layer of that size.
"""
import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from tqdm import tqdm

import iv3
from eval import command, encoded_batches, held_out_loss, pick_rows, table, write_json
from iv3 import answer_logits, clip_of, need
from m2la import (GQA, Calibration, ConvertSpec, cache_ratio, calibrate, convert_layers, divergence, mrope,
                  spec_of)

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------ the ways to convert

# TransMLA's choices, where each idea has its plain form; {} would be our default, which ConvertSpec states.
PLAIN = dict(qk_norm="const", rope_basis="real", slots="uniform", gain=False, metric="balance",
             modality="shared", budget="uniform", heal=0)

# CARE: principal components of the layer's outputs, ranks where the energy is.
CARE = {**PLAIN, "qk_norm": "exact", "metric": "identity", "budget": "energy"}

# §3.2 as written: a linear norm, one real rotation, one latent with an adapter per modality.
PAPER = {**PLAIN, "qk_norm": "affine", "modality": "adapters"}

# What an idea changes in the plain form, in the order of §3.2 …
ADDED = {
    "exact norms": dict(qk_norm="exact"),
    "unitary basis": dict(rope_basis="unitary"),
    "gains": dict(gain=True),
    "slots by harm": dict(slots="realloc"),
    "query-aware": dict(metric="qa"),
    "a basis per modality": dict(modality="segments"),
    "greedy by energy": dict(budget="energy")}

# … and what the default has in its place when it is left out.
LEFT_OUT = {
    "exact norms": dict(qk_norm="affine"),
    "unitary basis": dict(rope_basis="real"),
    "gains": dict(gain=False),
    "slots by harm": dict(slots="uniform"),
    "query-aware": dict(metric="balance"),
    "a basis per modality": dict(modality="shared"),
    "greedy ranks": dict(budget="uniform"),
    "measured damage": dict(budget="energy"),
    "healing": dict(heal=0)}

HALF = 0.5                               # share of GQA's cache, as the released layer has it
LESS = 0.3                               # … at which the ways differ more; for some of them alone
AT_BOTH = ("transmla", "care", "- healing", "transmla + healing", "care + healing", "paper", "default")


def conversion_rows():
    """{name: choices of ConvertSpec}; what is not named is the default."""
    rows = {"transmla": PLAIN, "care": CARE}
    choices = PLAIN
    for idea, change in ADDED.items():
        choices = {**choices, **change}
        rows[f"+ {idea}"] = choices
    for idea, change in LEFT_OUT.items():
        rows[f"- {idea}"] = {"heal": 0, **change}                 # healing would hide what is missing
    rows["transmla + healing"] = {**PLAIN, "heal": ConvertSpec.heal}
    rows["care + healing"] = {**CARE, "heal": ConvertSpec.heal}
    rows["paper"] = PAPER
    rows["default"] = {}
    return rows


def relative_error(out, target):
    return float((out - target).norm() / target.norm())


# ------------------------------------------------------------------------------- on a trained model

# Rows of each file that calibration reads: as many tokens of text and of vision as the ranks ask for (10 R of
# each).
CALIBRATION = {"cpt_text.jsonl": 80, "cpt_image.jsonl": 120, "cpt_video.jsonl": 600}
BATCH = 16                               # rows that pass through the model together
PROBES = 10                              # every tenth batch of the calibration tells the damage


class Call(NamedTuple):
    """What an attention layer of the source met in a batch, and what it gave."""
    args: tuple
    kwargs: dict
    out: torch.Tensor                    # (B,T,D)


def attention_calls(model, batch):
    """One Call per layer."""
    calls = []

    def keep(module, args, kwargs, out):
        calls.append(Call(args, kwargs, out))
    hooks = []
    for layer in model.language_model.layers:
        hooks.append(layer.self_attn.register_forward_hook(keep, with_kwargs=True))
    model(**batch)
    for hook in hooks:
        hook.remove()
    return calls


class ConversionBench:
    """Converts one model again and again, from one calibration, and measures on held-out rows."""

    @torch.no_grad()
    def __init__(self, model, processor, root, seed):
        self.model = model.eval()
        self.processor = processor
        self.root = root
        self.layers = model.language_model.layers
        self.source = [layer.self_attn for layer in self.layers]

        # Calibration, once for all ways: moments of the inputs, and what the source predicts there.
        rows = []
        for name, count in CALIBRATION.items():
            rows += pick_rows(iv3.load_rows(root / name), count, seed)
        self.batches = self.encoded(rows, "calibration")
        self.moments = calibrate(model, map(self.collated, self.batches), raw=True).moments
        self.damage = divergence(self.predict, self.batches[::PROBES])

        # The held-out rows: the source's loss, their tokens, and what its layers met in one batch of them.
        self.rows = iv3.load_rows(root / "val.jsonl")
        self.clips = np.unique([clip_of(row) for row in self.rows], return_inverse=True)[1]
        self.base = held_out_loss(model, processor, self.rows, root)[1]        # (n,2): nats, answer tokens
        held = list(itertools.chain(*self.encoded(self.rows, "held-out")))
        vision_ids = torch.tensor(model.vision_ids)
        vision = sum(int(torch.isin(sample.ids, vision_ids).sum()) for sample in held)
        self.tokens = (sum(len(sample.ids) for sample in held) - vision, vision)
        batch = self.collated(held[:BATCH])
        self.valid = batch["valid"]
        self.calls = attention_calls(model, batch)

    def encoded(self, rows, name):
        """[[Encoded, …] of a batch, …], sorted by length."""
        batches = encoded_batches(self.processor, rows, self.root, BATCH, False, name)
        return [list(samples) for _, samples in batches]

    def collated(self, samples):
        return iv3.collate(samples, 0, self.model.device)

    def predict(self, samples):
        """log-probabilities (n,V) at all answer tokens of a batch, by the model as it is now."""
        hidden = self.model(**self.collated(samples))             # (B,T,D)
        answer = torch.nn.utils.rnn.pad_sequence([sample.answer for sample in samples], batch_first=True)
        return torch.log_softmax(answer_logits(self.model, hidden, answer.to(hidden.device)), -1)

    def loss_change(self):
        """(mean, standard error) in nats per answer token over the source's."""
        now = held_out_loss(self.model, self.processor, self.rows, self.root)[1]
        change = now[:, 0] - self.base[:, 0]                      # (n,) nats of a row
        tokens = self.base[:, 1]
        mean = change.sum() / tokens.sum()
        # Rows on one clip go wrong together: the residuals are summed per clip before they are squared.
        residuals = np.bincount(self.clips, change - mean * tokens)
        error = np.sqrt((residuals ** 2).sum()) / tokens.sum()
        return float(mean), float(error)

    def output_error(self):
        """Relative error of the attention outputs on the source's own inputs, mean over layers."""
        errors = []
        for layer, call in zip(self.layers, self.calls):
            out = layer.self_attn(*call.args, **call.kwargs)
            errors.append(relative_error(out[self.valid], call.out[self.valid]))
        return float(np.mean(errors))

    @torch.no_grad()
    def run(self, choices, share):
        """Convert to `share` of the cache, measure, and put the source's layers back."""
        start = time.perf_counter()
        order = np.random.default_rng(0).permutation(len(self.batches))        # they are sorted by length
        healing = itertools.cycle(self.batches[i] for i in order)
        spec = spec_of(choices, self.source[0], share)
        spec = convert_layers(self.layers, self.moments, spec, self.damage, self.predict, healing)
        seconds = time.perf_counter() - start
        mean, error = self.loss_change()
        row = {"loss_change": mean, "loss_se": error, "out_err": self.output_error(),
               "cache_ratio": cache_ratio(spec, self.source, self.tokens), "seconds": seconds}
        for layer, source in zip(self.layers, self.source):
            layer.self_attn = source
        return row


# ------------------------------------------------------------------------ on a layer of a real size

class RandomLayer:
    """One layer of a preset's shape, random, on text and vision tokens with statistics of their own."""

    @torch.no_grad()
    def __init__(self, cfg, seed):
        torch.manual_seed(seed)
        self.cfg = cfg
        D = cfg.hidden
        self.gqa = GQA(D, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.eps)
        # A modality's tokens lie near a subspace of D/4 dimensions, whose variances fall as 1/n: real ones do
        # too.
        falling = (torch.arange(D // 4) + 1.0)[:, None] ** -0.5
        self.mix = torch.randn(2, D // 4, D) * falling / 4
        T = min(1024, 16 * cfg.head_dim)                          # tokens of a sample
        wanted = 2 * 10 * (cfg.kv_heads - 1) * cfg.head_dim       # 10 R of each modality
        with Calibration([self.gqa], raw=True) as calibration:
            for _ in tqdm(range(wanted // T + 1), desc="random layer", disable=None, leave=False):
                self.gqa(*self.sample(T))
        self.moments = calibration.moments
        self.held = self.sample(T)
        self.target = self.gqa(*self.held)

    def sample(self, T):
        """x (1,T,D), rope, vision (1,T): 64 words, 64 patches of a frame (8 x 8), and so on."""
        t = torch.arange(T)
        vision = t // 64 % 2 == 1
        # MRoPE positions: a word has t on all axes; a patch its frame's first t, plus its row and column.
        frame = t // 64 * 64
        patch = torch.stack([frame, t // 8 % 8 + frame, t % 8 + frame])
        positions = torch.where(vision, patch, t)[:, None]        # (3,1,T)
        rope = mrope(positions, self.cfg.head_dim, self.cfg.theta, self.cfg.mrope_sections)
        inner = torch.randn(T, self.mix.shape[1])
        x = torch.where(vision[:, None], inner @ self.mix[1], inner @ self.mix[0])
        x = x + 0.1 * torch.randn(T, self.cfg.hidden)
        return x[None], rope, vision[None]

    @torch.no_grad()
    def run(self, choices, share):
        start = time.perf_counter()
        layer = torch.nn.Module()
        layer.self_attn = self.gqa
        convert_layers([layer], self.moments, spec_of(choices, self.gqa, share))
        seconds = time.perf_counter() - start
        error = relative_error(layer.self_attn(*self.held), self.target)
        return {"random_out_err": error, "random_seconds": seconds}


# ---------------------------------------------------------------------------------------- the bench

FIGURES = ["loss_change", "loss_se", "out_err", "cache_ratio", "seconds", "loss_change_30", "loss_se_30",
           "cache_ratio_30", "seconds_30"]
OF_RANDOM = ["random_out_err", "random_seconds"]


def measured_rows(bench, random):
    """A row for each way to convert. random: a RandomLayer or None."""
    rows = []
    for name, choices in tqdm(conversion_rows().items(), disable=None, leave=False):
        row = {"name": name, **bench.run(choices, HALF)}
        if random:
            row |= random.run(choices, HALF)
        if name in AT_BOTH:
            for figure, value in bench.run(choices, LESS).items():
                row[f"{figure}_30"] = value
        rows.append(row)
    return rows


def print_rows(rows, figures, base_loss):
    lines = []
    for row in rows:
        values = [f"{row[figure]:.4f}" if figure in row else "" for figure in figures]
        lines.append([row["name"], *values])
    print(f"loss_change: nats per answer token over the source's {base_loss:.4f}, at half of the cache (_30: "
          "30 %); + one idea more at a time, - the default without one\n"
          "transmla, care: our re-implementations of the choices of TransMLA (arXiv 2502.07864) and CARE "
          "(arXiv 2603.17946), not their code\n")
    print(table(["name", *figures], lines))


def bench_conversion(args):
    root = Path(args.data_dir)
    if not (root / "val.jsonl").is_file():
        command("data/toy/prepare.py", "--out", root, "--seed", args.seed)
    model, processor = iv3.open_model(args.model or ROOT / "data/toy/weights/base")
    attention = model.cfg.attn
    need(attention == "gqa", f"--model {args.model}: its attention is {attention} already; give a GQA model")
    bench = ConversionBench(model, processor, root, args.seed)
    random = None
    figures = FIGURES
    if args.preset != "tiny":                                     # of the tiny shape there is a trained model
        random = RandomLayer(iv3.Config.preset(args.preset), args.seed)
        figures = FIGURES + OF_RANDOM
    rows = measured_rows(bench, random)
    nats, tokens = bench.base.sum(0)
    print_rows(rows, figures, nats / tokens)
    env = {"torch": torch.__version__, "threads": torch.get_num_threads(), "seed": args.seed,
           "model": str(args.model or "shipped base"), "random_layer": args.preset if random else None,
           "base_loss": nats / tokens, "held_out_tokens": bench.tokens,
           "calibration_tokens": bench.moments[0].count.tolist()}
    return {"env": env, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description="The damage of each way to convert a GQA model.")
    add = parser.add_argument
    add("--model", help="a GQA model's directory (default: the shipped tiny base)")
    add("--preset", choices=list(iv3.PRESETS), default="tiny",
        help="also a random layer of these sizes (default: none)")
    add("--data-dir", metavar="DIR", default="runs/tiny/data", help="the toy data; written if it is absent")
    add("--seed", type=int, default=0)
    add("--json", metavar="F", help="also write the result to this file")
    args = parser.parse_args()
    write_json(args.json, lambda: bench_conversion(args))


if __name__ == "__main__":
    iv3.run_cli(main)
