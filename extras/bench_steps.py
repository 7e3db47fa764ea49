"""What the parts of the recipe cost: this code beside another checkout of it (§4).

    git worktree add ../before 526e1c1
    OMP_NUM_THREADS=1 python extras/bench_steps.py runs/tiny --against ../before

Both do the same steps of a finished run, in turns. Times are CPU seconds of one process, on one thread. *same*:
how many of the sampled answers, texts and rollouts are equal; a training step shows its loss instead.
"""
import argparse
import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm import tqdm

import iv3
from eval import table, write_json
from iv3 import need

MODULES = ("m2la", "iv3", "mcr_agent", "eval", "train")
STARTS = {"cpt": "convert", "sft_short": "cpt", "sft_long": "sft_short", "rl": "sft_long", "opd": "rl"}


def code_of(folder):
    """The five modules of a checkout, beside those of another."""
    for name in MODULES:                                          # else import gives those of the other
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(folder))


# ------------------------------------------------- the parts: each a function of the step's number

def stage_of(code, run, name):
    """→ trainer and data of a stage at its beginning."""
    stage, _, phase = name.partition("_")
    flags = ["--stage", stage, "--out", str(run), "--jobs", "1"]
    if phase:
        flags += ["--phase", phase]
    args = code.train.parser_of("").parse_args(flags)
    code.train.check(args)
    model, processor = code.iv3.load_model(run / STARTS[name])
    recipe = code.train.recipe_of(name, args, 0)
    data = code.train.data_of(name, recipe, processor, args)
    return code.train.Trainer(model, processor, recipe, name, args, run / STARTS[name]), data


def supervised(code, run, name):
    trainer, data = stage_of(code, run, name)
    loader = code.train.Loader(data, trainer.recipe, 0)
    return lambda step: code.train.supervised_step(trainer, loader, step)


def rl(code, run):
    trainer, data = stage_of(code, run, "rl")
    reference, _ = code.iv3.load_model(run / "sft_long")
    return lambda step: code.train.rl_step(trainer, data, reference, step)


def opd(code, run):
    trainer, data = stage_of(code, run, "opd")
    teacher, processor = code.iv3.load_model(run / "teacher")
    replay = code.train.Data(run / "data", trainer.recipe.replay, processor, 0, "replay")
    return lambda step: code.train.opd_step(trainer, data, teacher, replay, step)


def answers(code, run, name, samples, temperature, model=None):
    """What a step of RL or OPD, or their filters, sample."""
    trainer, data = stage_of(code, run, name)
    if model:
        model, _ = code.iv3.load_model(run / model)

    def sample(step):
        drawn = data.step(step, trainer.recipe.packs, trainer.recipe.branches)
        groups = code.train.rollout(trainer, data, drawn, samples, step, temperature, model)
        return [answer.ids for group in groups for answer in group.answers]
    return sample


def tested(code, run, file, count, answer):
    """`count` rows of a test at a time, by the run's last model."""
    model, processor = code.iv3.load_model(run / "opd")
    rows = code.iv3.load_rows(run / "data" / file)

    def test(step):
        return answer(model, processor, rows[count * step:count * (step + 1)], run / "data")
    return test


def parts_of(code, run):
    """{name of a part: step → what it gives}"""
    parts = {f"{name}: step": supervised(code, run, name) for name in ("cpt", "sft_short", "sft_long")}
    parts["rl: step"] = rl(code, run)
    parts["opd: step"] = opd(code, run)
    parts["rl: 8 answers to 64 prompts"] = answers(code, run, "rl", 8, 1.0)
    parts["rl filter: 4 answers"] = answers(code, run, "rl", code.train.FILTER_SAMPLES, 1.0)
    parts["opd: 1 answer to 128 prompts"] = answers(code, run, "opd", 1, 1.0)
    parts["opd filter: student"] = answers(code, run, "opd", 1, 0.0)
    parts["opd filter: teacher"] = answers(code, run, "opd", 1, 0.0, "teacher")
    parts["test: 64 long rows"] = tested(code, run, "test_long.jsonl", 64, code.eval.answer_rows)

    def rollouts(model, processor, rows, root):
        return [out["text"] for out in code.eval.agent_answers(model, processor, rows, root, None)]
    parts["agent: 32 rows"] = tested(code, run, "test_agent.jsonl", 32, rollouts)
    return parts


# ------------------------------------------------------------------------------------------ the bench

def row_of(name, both, steps):
    """One part's figures. both: the part by the other code and by ours; they take turns at being first."""
    seconds = [0.0, 0.0]
    same = total = 0
    losses = []
    for step in range(steps + 1):
        given = [None, None]
        for i in ((0, 1), (1, 0))[step % 2]:
            start = time.process_time()
            given[i] = both[i](step)
            if step > 0:                                          # the first warms up
                seconds[i] += time.process_time() - start
        if isinstance(given[0], dict):                            # a training step's figures
            losses = [figures["loss"] for figures in given]       # shown are those of the last
            continue
        total += len(given[0])
        same += sum(map(lambda a, b: a == b, *given))
    before, now = (value / steps for value in seconds)
    row = {"name": name, "before_s": before, "now_s": now, "ratio": now / before}
    if losses:
        return row | {"loss_before": losses[0], "loss_now": losses[1]}
    return row | {"same": same, "n": total}


def bench_steps(args):
    run = Path(args.run).resolve()
    need((run / "opd/config.json").is_file(), f"{run}: no finished run of the recipe")
    need((Path(args.against) / "train.py").is_file(), f"--against {args.against}: no checkout of this code")
    folders = [Path(args.against).resolve(), Path(__file__).parents[1]]
    other, ours = (parts_of(code_of(folder), run) for folder in folders)
    rows = []
    for name in tqdm(ours, disable=None, leave=False):
        rows.append(row_of(name, (other[name], ours[name]), args.steps))
    lines = []
    for row in rows:
        if "n" in row:
            same = f"{row['same']} of {row['n']}"
        else:
            same = f"{row['loss_before']:.4f} → {row['loss_now']:.4f}"
        lines.append([row["name"], f"{row['before_s']:.2f}", f"{row['now_s']:.2f}", f"{row['ratio']:.2f}", same])
    print(table(["part", "before, s", "now, s", "ratio", "same"], lines))
    return {"steps": args.steps, "against": str(args.against), "rows": rows}


def main():
    parser = argparse.ArgumentParser(description="Time the recipe's parts beside another checkout's.")
    add = parser.add_argument
    add("run", help="a finished run of `python train.py`")
    add("--against", required=True, metavar="DIR", help="another checkout of this code")
    add("--steps", type=int, default=4, help="timed steps of each part (default 4)")
    add("--json", metavar="F", help="also write the result to this file")
    args = parser.parse_args()
    iv3.check_flags(args, {1: "steps"})
    write_json(args.json, lambda: bench_steps(args))


if __name__ == "__main__":
    iv3.run_cli(main)
