"""The recipe of train.py without one part at a time, over seeds (§6); and what a recipe's steps change.

    python extras/ablation.py --seeds 3                       # hours; keeps what is done in runs/ablation
    python extras/ablation.py --gains runs/seed0 runs/seed1   # of runs that are there: mean ± 95 %

The paper (§6, mean of four long-video sets): full 66.8; without CPT 64.7; without long context 65.4; without
long-video data 64.8. Here each seed has data and a test of its own; a part is left out by starting the stages
behind it from an earlier checkpoint of the same full recipe, so that all else is equal, and the change is
told in points at the stage where the part's effect is whole. A killed bench goes on where it was: what is
trained and scored is not done again.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from report import gains, gains_text, mean_half, with_half

import iv3
from eval import command, evaluate, stage_figures, table, write_json
from iv3 import need

# --------------------------------------------------------------------------------- what is left out


class Run(NamedTuple):
    stage: str                # that it leaves behind
    flags: str                # of train.py; {full}: the full recipe's directory


class Without(NamedTuple):
    """A part left out: the runs that lead there from the full recipe, and where both are measured."""
    measured: str             # stage
    runs: list
    paper: float | None = None                     # points, mean of four long-video sets


SHORT = "--stage sft --phase short"
LONG = "--stage sft --phase long"
LONG_DATA = "sft_long.jsonl curated/curated.jsonl sft_agent.jsonl"             # all that is about long clips

ABLATIONS = {
    "- CPT": Without("sft_long", paper=-2.1, runs=[
        Run("sft_short", SHORT + " --init {full}/convert"),
        Run("sft_long", LONG)]),
    "- long context": Without("sft_long", paper=-1.4, runs=[
        Run("sft_long", LONG + " --init {full}/sft_short --max-frames 48")]),
    "- long-video data": Without("sft_long", paper=-2.0, runs=[
        Run("sft_long", LONG + " --init {full}/sft_short --without " + LONG_DATA)]),
    "- RL": Without("opd", runs=[
        Run("opd", "--stage opd --init {full}/sft_long --teacher {full}/teacher")]),
    "- OPD": Without("opd", runs=[])}              # no run: the full recipe after RL

LENGTHS = ("short", "long")
FIGURES = ["long mcq", "short mcq", "long miou", "short miou"]

# ----------------------------------------------------------------------------------------- one seed


def stage_points(directory, full, seed):
    """{figure: points} of a stage on the full recipe's test, measured once; train.py leaves its own there."""
    file = directory / "scores.json"
    if not file.is_file():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, processor = iv3.load_model(directory, device)
        scores = {}
        for length in LENGTHS:
            test = full / "data" / f"test_{length}.jsonl"
            scores[length] = evaluate(model, processor, test, seed=seed, model_dir=directory)
        iv3.write_atomic(file, lambda p: p.write_text(json.dumps(scores)))
    scores = iv3.read_json(file)
    points = {}
    for name in FIGURES:
        length, figure = name.split()
        points[name] = 100 * stage_figures(scores[length])[figure]
    return points


def train(directory, seed, more, *flags):
    command("train.py", *flags, "--out", directory, "--seed", seed, *more)


def left_out(name, part, full, seed, more):
    """Train what is not there yet of a recipe without the part → the directory of the stage to measure."""
    if not part.runs:
        return full / "rl"
    directory = full.with_name(name.removeprefix("- ").replace(" ", "_"))
    for run in part.runs:
        if not (directory / run.stage / "config.json").is_file():
            flags = [flag.format(full=full) for flag in run.flags.split()]
            train(directory, seed, more, *flags, "--data-dir", full / "data")
    return directory / part.measured


def seed_figures(out, seed, more):
    """Of one seed: gains() of the full recipe and {name: {figure: points}}: the full recipe where a part is
    measured, and the difference without the part. Kept in seedN.json.
    more: flags for every run of train.py."""
    kept = out / f"seed{seed}.json"
    if kept.is_file():
        return iv3.read_json(kept)
    full = out / f"seed{seed}" / "full"
    if not (full / "results.json").is_file():
        train(full, seed, more)
    figures = {}
    for name, part in ABLATIONS.items():
        whole = stage_points(full / part.measured, full, seed)
        figures[f"full, {part.measured}"] = whole
        without = stage_points(left_out(name, part, full, seed, more), full, seed)
        figures[name] = {figure: without[figure] - whole[figure] for figure in FIGURES}
    found = [gains(iv3.read_json(full / "results.json")), figures]
    iv3.write_atomic(kept, lambda p: p.write_text(json.dumps(found, indent=1)))
    return found


# ---------------------------------------------------------------------------------------- all seeds

def same_recipe(out, recipe):
    """Runs of another recipe must not be mixed with these."""
    made = out / "recipe.txt"
    if made.is_file():
        before = made.read_text()
        need(before == recipe, f"{out}: has runs with --recipe={before!r}; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    made.write_text(recipe)


def bench_ablation(args):
    """Each part of the recipe left out, over seeds."""
    out = Path(args.out or "runs/ablation")
    same_recipe(out, args.recipe)
    steps = []                                                    # of each seed
    figures = []
    for seed in range(args.seeds):
        changes, points = seed_figures(out, seed, args.recipe.split())
        steps.append(changes)
        figures.append(points)
    rows = []
    lines = []
    for name in figures[0]:
        paper = ABLATIONS[name].paper if name in ABLATIONS else None
        row = {"name": name, "paper": paper}
        line = [name]
        form = ".1f" if name.startswith("full") else "+.1f"
        for figure in FIGURES:
            mean, half = mean_half([points[name][figure] for points in figures])
            key = figure.replace(" ", "_")
            row[key] = mean
            row[f"{key}_half"] = half
            line.append(with_half(mean, half, form))
        line.append("" if paper is None else f"{paper:+.1f}")
        rows.append(row)
        lines.append(line)
    print(f"{gains_text(steps)}\n\npoints; what is left out: the difference to the full recipe\n\n"
          + table(["", *FIGURES, "the paper, long"], lines))
    env = {"torch": torch.__version__, "seeds": args.seeds, "recipe": args.recipe}
    return {"env": env, "rows": rows, "steps": steps}


def gains_of(runs):
    """gains() of finished runs, and their mean printed."""
    files = [Path(run) / "results.json" for run in runs]
    for file in files:
        need(file.is_file(), f"--gains: {file} is not there; `python train.py --out {file.parent}` makes it")
    steps = [gains(iv3.read_json(file)) for file in files]
    for file, changes in zip(files, steps):
        need(changes.keys() == steps[0].keys(), f"--gains: {file} has other steps than {files[0]}")
    print(gains_text(steps))
    return steps


def main():
    parser = argparse.ArgumentParser(
        description="The recipe without one part at a time, trained by train.py.")
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="how many seeds, 0, 1, … (default 3)")
    add("--out", metavar="DIR", help="keeps what is done (default: runs/ablation)")
    add("--recipe", default="", metavar="FLAGS", help="flags for every run of train.py, as one argument: "
        "--recipe='--steps 2000' is a longer form, for a GPU")
    add("--gains", nargs="+", metavar="RUN",
        help="what each step of a recipe changes, as mean of its runs ± 95 %%")
    add("--json", metavar="F", help="also write the result to this file")
    args = parser.parse_args()
    iv3.check_flags(args, {1: "seeds"})
    write_json(args.json, lambda: gains_of(args.gains) if args.gains else bench_ablation(args))


if __name__ == "__main__":
    iv3.run_cli(main)
