"""The commands as a user runs them: help, mistakes (one line, exit code 2, nothing left behind), a first small run."""
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import iv3

ROOT = Path(__file__).parents[1]
FILES = ["iv3.py", "mcr_agent.py", "eval.py", "train.py", "data/toy/prepare.py", "data/toy/pretrain.py",
         "data/curate/prepare.py", *(f"data/{name}/prepare.py" for name in (
             "videomme", "mlvu", "egoschema", "lvbench", "charades_sta")), *(f"extras/{name}.py" for name in (
             "report", "memory", "show_samples", "remote_agent", "bench_decode", "bench_live_cache",
             "bench_conversion", "ablation"))]
TRAIN = ["--data-dir", "data", "--packs", "2", "--branches", "2", "--jobs", "1"]
PRETRAINED = ("vision", "near", "base", "teacher")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}

# Importing torch takes seconds: one process does it, and each command is a fork of that.
SERVER = """
import atexit, json, os, runpy, sys, traceback
sys.path.insert(0, sys.argv[1])
import train
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(job["cwd"])
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job[name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
        sys.argv, code = job["argv"], 0
        sys.path.insert(0, os.path.dirname(sys.argv[0]))         # as Python itself does with a script
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command(cwd, "iv3.py", "--help") → exit code, stdout, stderr; kill: SIGKILL after seconds"""
    logs = tmp_path_factory.mktemp("logs")
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env=ENV)

    def call(cwd, file, *arguments, kill=None):
        job = {"cwd": str(cwd), "argv": [str(ROOT / file), *map(str, arguments)], "stdout": str(logs / "out"),
               "stderr": str(logs / "err")}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        if kill is not None and not select.select([server.stdout], [], [], kill)[0]:
            os.kill(pid, signal.SIGKILL)
        code = int(server.stdout.readline())
        return code, (logs / "out").read_text(), (logs / "err").read_text()
    yield call
    server.stdin.close()
    assert server.wait() == 0


@pytest.fixture(scope="module")
def world(command, tmp_path_factory):
    """A folder with the smallest toy data and a base pretrained for two steps a stage."""
    cwd = tmp_path_factory.mktemp("cli")
    code, out, err = command(cwd, "data/toy/prepare.py", "--out", "data", "--scale", 0.02, "--jobs", 1)
    assert code == 0 and "sft_short.jsonl" in out, err
    code, _, err = command(cwd, "data/toy/pretrain.py", "--out", "runs/tiny", "--scale", 0.02, "--clips", 2, "--steps",
                           2, "--jobs", 1)
    assert code == 0, err
    shutil.copytree(cwd / "runs" / "tiny" / "base", cwd / "wide")           # weights of another size than its config
    config = json.loads((cwd / "wide" / "config.json").read_text())
    (cwd / "wide" / "config.json").write_text(json.dumps({**config, "mlp": 400}))
    (cwd / "broken.mp4").write_bytes(b"no video")
    (cwd / "empty").mkdir()
    rows = (cwd / "data" / "test_short.jsonl").read_text().splitlines()
    (cwd / "bad.jsonl").write_text(rows[0] + "\n" + json.dumps({**json.loads(rows[1]), "task": "quiz"}) + "\n")
    return cwd


def files(folder):
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("file", FILES)
def test_help(file, command, tmp_path):
    code, out, err = command(tmp_path, file, "--help")
    assert code == 0 and err == "" and out.startswith(f"usage: {Path(file).name}") and "--" in out
    assert not list(tmp_path.iterdir())


VIDEO = "data/clips/test/00000.mp4"
MISTAKES = [
    (["iv3.py", "nowhere.mp4", "What?"], "nowhere.mp4: no such file"),
    (["iv3.py", "broken.mp4", "What?"], "broken.mp4: not a readable video"),
    (["iv3.py", VIDEO, "What?", "--start", "500"], "00000.mp4: nothing to read in 500"),
    (["iv3.py", VIDEO, "What?", "--fps", "0"], "--fps"),
    (["iv3.py", VIDEO, "What?", "--model", "absent"], "absent: no model found"),
    (["iv3.py", VIDEO, "What is <|video_pad|>?"], "<|video_pad|>"),
    (["iv3.py", VIDEO, " "], "the question is empty"),
    (["iv3.py", VIDEO, "What?", "--model", "wide"], "wide/weights.pt: tensor language_model.layers.0.mlp"),
    (["extras/memory.py", "huge"], "huge: neither a preset (tiny, "),
    (["extras/memory.py", "tiny", "--memory", "0"], "--memory"),
    (["data/mlvu/prepare.py", "--annotations", "no", "--media", ".", "--out", "o"], "--annotations no: no such file"),
    (["mcr_agent.py"], "give VIDEO"),
    (["mcr_agent.py", "nowhere.mp4", "What?"], "nowhere.mp4"),
    (["mcr_agent.py", VIDEO, "What?", "--calls", "-1"], "--calls -1"),
    (["mcr_agent.py", VIDEO, "What?", "--trace", "absent/t.jsonl"], "absent/t.jsonl: no such folder"),
    (["mcr_agent.py", VIDEO, "What?", "--trace", "data"], "data: is a folder"),
    (["mcr_agent.py", VIDEO, "What?", "--options", "a", "a"], "--options: two or more"),
    (["extras/remote_agent.py", VIDEO, "What?", "--url", "ftp://x", "--api-model", "x"], "--url ftp://x"),
    (["mcr_agent.py", "--replay", "bad.mp4"], "bad.mp4: not a trace"),
    (["eval.py"], "--data F.jsonl"),
    (["eval.py", "--data", "absent.jsonl"], "absent.jsonl: no such data file"),
    (["eval.py", "--data", "bad.jsonl"], "bad.jsonl:2: field 'task' is 'quiz'"),
    (["eval.py", "--data", "data/test_short.jsonl", "--limit", "0"], "--limit 0"),
    (["eval.py", "--compare", "a", "b", "--jobs", "2"], "--jobs"),
    (["train.py", "--stage", "cpt", *TRAIN, "--jobs", "3"], "--packs 2"),
    (["eval.py", "--data", "data/test_short.jsonl", "--json", "absent/r.json"], "--json absent/r.json"),
    (["eval.py", "--data", "data/test_short.jsonl", "--json", "data"], "--json data: is a directory"),
    (["eval.py", "--data", "data/test_short.jsonl", "--out", "broken.mp4"], "--out broken.mp4: is a file"),
    (["eval.py", "--data", "data/test_agent.jsonl", "--ablate"], "--ablate: goes with --agent"),
    (["train.py", "--init", "runs/tiny/base"], "--eval-every and --init: need --stage"),
    (["train.py", "--stage", "opd", "--attn", "gqa", "--init", "runs/tiny/base", "--teacher", "no", *TRAIN],
     "no: no model found; train one with `python train.py` or give --teacher DIR"),
    (["train.py", "--stage", "cpt", "--out", "empty/a", "--jobs", "1"], "empty/a: has no finished 'base'"),
    (["train.py", "--stage", "rl", *TRAIN], "runs/tiny: has no finished 'sft_long'"),
    (["train.py", "--stage", "sft", "--init", "runs/tiny/base", *TRAIN], "runs/tiny/base: its attention is gqa"),
    (["train.py", "--stage", "cpt", "--init", "absent", *TRAIN], "absent: no model found"),
    (["train.py", "--stage", "cpt", "--attn", "gqa", "--data", "bad.jsonl", *TRAIN], "bad.jsonl:2: field 'task'"),
    (["train.py", "--steps", "0"], "--steps 0"), (["train.py", "--lr", "5"], "--lr 5"),
    (["extras/show_samples.py", "2"], "give --stage"),
    (["train.py", "--freeze", "all"], "--freeze all"),
    (["train.py", "--teacher-device", "cuda:99"], "--teacher-device cuda:99"),
    (["train.py", "--val", "bad.jsonl"], "--val: is for --stage cpt and for --eval-every"),
    (["train.py", "--stage", "cpt", "--eval-every", "1", *TRAIN, "--data-dir", "empty"], "empty/val.jsonl: no such"),
    (["train.py", "--without", "sft_long.jsonl"], "--without: leaves files out of a --stage"),
    (["train.py", "--max-frames", "1"], "--max-frames 1: must be at least 2"),
    (["train.py", "--stage", "rl", "--fsdp"], "--fsdp: for --stage cpt or sft"),
    (["train.py", "--stage", "cpt", "--fsdp", *TRAIN], "--fsdp: needs several processes"),
    (["data/toy/prepare.py", "--out", "empty/d", "--scale", "0"], "--scale 0"),
    (["data/toy/prepare.py", "--out", "data", "--seed", "1"], "data/done.json"),
    (["data/toy/pretrain.py", "--out", "empty/e", "--clips", "-1"], "--pretrain -1"),
    *([] if torch.cuda.is_available() else [(["train.py", "--device", "cuda"], "--device cuda")])]


@pytest.mark.parametrize("arguments, named", MISTAKES, ids=[f"{a[0]}: {n}" for a, n in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, named, command, world):
    before = files(world)
    code, _, err = command(world, *arguments)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err, err
    assert files(world) == before


def test_a_run_is_asked_for_when_there_is_none(command, world):
    code, _, err = command(world / "empty", "iv3.py", "../" + VIDEO, "What?")
    assert code == 2 and err.startswith("error: runs/: no model found; train one with `python train.py` or give --")


@pytest.mark.parametrize("arguments, named", [
    (["train.py", "--stage", "pretrain"], "--stage"), (["train.py", "--steps", "many"], "--steps"),
    (["eval.py", "--nothing"], "--nothing"), (["iv3.py", "v.mp4"], "question")])
def test_flags_that_do_not_exist_are_named(arguments, named, command, tmp_path):
    code, _, err = command(tmp_path, *arguments)
    last = err.splitlines()[-1]
    assert code == 2 and "error: " in last and named in last and not list(tmp_path.iterdir())


def test_a_stage_leaves_a_checkpoint_its_record_and_metrics(world):
    for stage in PRETRAINED:
        names = {p.name for p in (world / "runs" / "tiny" / stage).iterdir()}
        assert names == {"config.json", "stage.json", "vocab.json", "weights.pt"}
    record = json.loads((world / "runs" / "tiny" / "base" / "stage.json").read_text())
    assert record["inherits"] == "runs/tiny/near" and record["recipe"]["steps"] == 2 and record["tokens"] > 0
    lines = [json.loads(line) for line in (world / "runs" / "tiny" / "metrics.jsonl").open()]
    assert [(x["stage"], x["step"]) for x in lines] == [(s, i) for s in PRETRAINED for i in range(2)]


def test_asking_about_a_video(command, world):
    code, out, err = command(world, "iv3.py", VIDEO, "What is shown at 3 seconds?", "--max-new", 5, "--max-frames", 8)
    assert code == 0 and err == "" and out.endswith("\n")


def test_estimating_a_model(command, world):
    code, out, err = command(world, "extras/memory.py", "runs/tiny/base", "--memory", 1)
    assert code == 0 and err == "" and [line.split()[0] for line in out.splitlines()[2:]] == ["gqa", "m2la"]


def test_the_agent_writes_a_trace_that_can_be_replayed(command, world):
    code, out, err = command(world, "mcr_agent.py", VIDEO, "What is shown at 3 seconds?", "--calls", 2, "--turn", 12,
                             "--options", "red circle", "blue star", "--trace", "t.jsonl")
    assert code == 0 and err == "", err
    records = [json.loads(line) for line in (world / "t.jsonl").open()]
    assert len(records) > 1
    again = command(world, "mcr_agent.py", "--replay", "t.jsonl")
    assert again == (0, out, "")
    assert command(world, "extras/report.py", "t.jsonl") == (0, "t.html written\n", "")
    assert (world / "t.html").read_text().lstrip().lower().startswith("<!doctype html")


def test_scoring_a_file(command, world):
    code, out, err = command(world, "eval.py", "--data", "data/test_short.jsonl", "--limit", 4, "--max-new", 4,
                             "--json", "scores.json")
    assert code == 0 and out, err
    assert json.loads((world / "scores.json").read_text())


def show_sample(command, world, *flags):
    before = files(world)
    code, out, err = command(world, "extras/show_samples.py", *flags, "--attn", "gqa", "--init", "runs/tiny/base",
                             "--data-dir", "data")
    assert code == 0 and err == "" and files(world) == before, err
    return out


def test_the_loss_mask_of_own_rows_can_be_seen(command, world):
    """All that an assistant writes, in any turn, its end of turn included, and nothing else; no escape codes run."""
    video = {"type": "video", "video": VIDEO, "start": 0, "end": 4, "fps": 1}
    turns = [("user", [video, {"type": "text", "text": "Look."}]), ("assistant", "<think>\nred</think>\ncall"),
             ("tool", "square"), ("assistant", "a square\x1b[31m")]
    row = {"id": "mine", "task": "mcr", "messages": [{"role": role, "content": content} for role, content in turns]}
    (world / "mine.jsonl").write_text(json.dumps(row) + "\n")
    out = show_sample(command, world, 1, "--stage", "sft", "--data", "mine.jsonl")
    (world / "mine.jsonl").unlink()
    body = re.sub("^│  ", "", out.partition("in the loss\n")[2], flags=re.M)
    marked = re.findall(r"\[\[(.*)\]\]$", body, flags=re.M)
    assert marked == ["<think>", "red</think>", "call<|im_end|>", r"a square\x1b[31m<|im_end|>"]
    assert body.count("<1 vision>") == 2 and "\x1b" not in out and "mine: weight " in out
    tokenizer = iv3.Tokenizer.load(world / "runs" / "tiny" / "base")
    count = len(tokenizer.encode("<think>\nred</think>\ncall<|im_end|>a square\x1b[31m<|im_end|>"))
    assert f"{count} in the loss\n" in out and f"weight {count ** -0.5:.3f} a token" in out


def test_the_samples_of_rl_are_a_tree_with_rewards(command, world):
    out = show_sample(command, world, 2, "--stage", "rl", "--branches", 2)
    assert out.count("\n===") == 2 and out.count("\n├─ shared") >= 3
    assert len(re.findall(r"\n│  ├─ \d+\. rl-.*, reward \d.\d\d, advantage [+-]", out)) == 8 * out.count("\n├─ shared")


def test_two_processes_do_what_one_does(command, world):
    """Training, also started by torchrun: the same losses. Scores of a file, direct and of the agent: the same."""
    losses, scores = {}, {}
    stage = ("--stage", "cpt", "--attn", "gqa", "--init", "runs/tiny/base", "--data-dir", "data", "--steps", "2",
             "--packs", "4", "--branches", "3", "--out")

    def losses_of(out):
        lines = [json.loads(line) for line in (world / out / "metrics.jsonl").open()]
        return [[x["loss"] for x in lines], [x["tokens"] for x in lines]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, str(ROOT / "train.py"), *stage, "byrun"], cwd=world, env=ENV, check=True)
    for jobs in (1, 2):
        code, _, err = command(world, "train.py", *stage, f"by{jobs}", "--jobs", jobs)
        assert code == 0, err
        losses[jobs] = losses_of(f"by{jobs}")
        scores[jobs] = []
        for file, *flags in (("test_short", "--batch", 2), ("test_agent", "--agent")):
            code, _, err = command(world, "eval.py", "--data", f"data/{file}.jsonl", "--limit", 4, "--max-new", 4,
                                   *flags, "--model", "runs/tiny/base", "--jobs", jobs, "--json", "by.json", "--out",
                                   f"{file}{jobs}.jsonl")
            assert code == 0, err
            samples = [json.loads(line) for line in (world / f"{file}{jobs}.jsonl").open()]
            scores[jobs].append([json.loads((world / "by.json").read_text()), [{**x, "ms": 0} for x in samples]])
    assert losses[1][0] == pytest.approx(losses[2][0], rel=1e-4) and losses[1][1] == losses[2][1]
    assert losses_of("byrun") == losses[2]
    assert scores[1] == scores[2]


def test_ctrl_c_says_how_to_go_on_and_the_next_run_does(world):
    """A process of its own, started from another folder as a user would."""
    arguments = [sys.executable, str(ROOT / "train.py"), "--stage", "cpt", "--attn", "gqa", "--init", "runs/tiny/base",
                 "--steps", "20", "--save-every", "0", "--data-dir", "data", "--out", "stopped", "--packs", "2",
                 "--jobs", "2"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)   # a background job would ignore it
    process = subprocess.Popen(arguments, cwd=world, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heard)
    metrics, limit = world / "stopped" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2) and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert not (world / "stopped" / "cpt" / "config.json").exists()
    again = subprocess.run(arguments, cwd=world, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0 and "resuming at step" in again.stdout
    assert [json.loads(x)["step"] for x in metrics.open()] == list(range(20))


@pytest.mark.parametrize("stage", ["sft", "rl"])          # all four, in one process: test_train.py
def test_kill_9_at_any_moment_changes_no_bit(stage, command, world, tmp_path):
    """At a random one of those that an unbroken run has; what the next run leaves is equal to what that one left."""
    shipped = ROOT / "data" / "toy" / "weights"
    arguments = ["train.py", "--stage", stage, "--data-dir", world / "data", "--steps", 3, "--packs", 2, "--jobs", 1,
                 "--branches", 2, "--save-every", 0, "--attn", "gqa", "--teacher", shipped / "teacher", "--init",
                 shipped / ("teacher" if stage == "rl" else "base"), "--kl-form", "sampled", "--teacher-device",
                 "cpu", "--out"]

    def weights_and_metrics(out):
        return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.name in ("weights.pt", "metrics.jsonl")}
    began = time.monotonic()
    code, _, err = command(tmp_path, *arguments, "whole")
    seconds = time.monotonic() - began
    assert code == 0, err
    moment = random.uniform(0.2, 0.95) * seconds
    killed, *_ = command(tmp_path, *arguments, "killed", kill=moment)
    code, _, err = command(tmp_path, *arguments, "killed")
    assert code == 0 and killed in (-signal.SIGKILL, 0), err                 # 0: it was faster this time
    whole, again = (weights_and_metrics(tmp_path / out) for out in ("whole", "killed"))
    assert len(whole) == 2 and whole == again, f"killed after {moment:.2f} of {seconds:.2f} s"
    assert not list(tmp_path.rglob("state.pt"))


def test_the_whole_recipe_from_one_command(command, world):
    """Data, conversion, four stages, agent and table, at the smallest scale; a second call only prints the table."""
    arguments = ("train.py", "--quick", "--out", "whole", "--scale", 0.02, "--steps", 2, "--packs", 2, "--jobs", 2)
    code, out, err = command(world, *arguments)
    assert code == 0, err
    results = json.loads((world / "whole" / "results.json").read_text())
    stages = ("sft_short", "sft_long", "rl", "opd")
    for stage in stages:
        for length in ("short", "long"):
            for name in ("mcq", "miou", "r1_50", "width"):
                assert {name, f"{name}_n", f"{name}_ci"} <= set(results[stage][length])
    for length in ("short", "long"):
        assert 0 < results["baselines"][length]["miou"] < results["baselines"][length]["mcq"] < 1
    assert 0.45 < results["convert"]["cache_ratio"] <= 0.5 and results["base"]["loss"] < results["convert"]["loss"] < 2
    for evidence in ("unseen", "seen"):
        assert {"direct", "agentic", "gain", "gain_n", "gain_ci"} <= set(results["agent"][evidence])
    assert results["quick"] and list(results["changes"]) == ["convert", "cpt", *stages]
    parts = ["data", "cpt", *stages, "agent"]
    assert re.findall(r"^(\w+): done, [\d.]+ minutes in this run, about \d+ more$", out, re.M) == parts
    for before, after in itertools.pairwise(parts[2:-1]):      # its row and what changed, before the next stage begins
        row = rf"\n{before}: done.*\n{after}: starts from .*\n\| {after} .*\n\| change .*\n{after}: done"
        assert re.search(row, out, re.S)
    assert "whole/report.html and report.md written\n" in out and "minutes in this run" in out.splitlines()[-1]
    asked = {json.loads(line)["clip"] for line in (world / "whole" / "data" / "curated" / "curated.jsonl").open()}
    assert asked and all(re.fullmatch(r"\.\./clips/long/long_\d+\.mp4", clip) for clip in asked)
    assert (world / "whole" / "report.html").read_text().count("data:image/png") >= 5 * 6
    weights = (world / "whole" / "opd" / "weights.pt").read_bytes()
    code, again, err = command(world, *arguments)
    table, same = (text.partition("\nS: ")[2].partition("whole/results.json")[0] for text in (out, again))
    assert code == 0 and "| opd " in table and "--quick" in table and same == table
    assert "more\n" not in again                             # nothing was left to wait for
    assert (world / "whole" / "opd" / "weights.pt").read_bytes() == weights
