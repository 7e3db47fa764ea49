"""The README cannot drift from the code: its forks run, its commands parse, its flags exist, its map is true."""
import argparse
import importlib
import inspect
import json
import re
import runpy
import shlex
import sys

import pytest
from test_agent import ScriptedModel, call, final
from test_cli import FILES, ROOT
from test_iv3 import write_video

import eval as evaluation
import iv3
import mcr_agent
import train

README = (ROOT / "README.md").read_text()
FORKS = re.findall(r"```python\n(.*?)```", README.partition("## Fork it")[2].partition("\n## ")[0], re.S)
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
INLINE = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.S))]


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """fork(number) → the names that a code block of the section defines, run as an imported file in a new folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    tables = (iv3.PRESETS, iv3.TASK_RULES, mcr_agent.TOOLS, evaluation.TASKS, train.STAGES)
    kept = [dict(table) for table in tables]
    reward = evaluation.reward

    def run(number):
        names = {"__name__": "fork"}
        exec(compile(FORKS[number], f"README fork {number}", "exec"), names)
        return names
    yield run
    evaluation.reward = reward
    for table, before in zip(tables, kept):
        table.clear()
        table.update(before)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments), "--jobs", "1"])
    train.main()


def table_of(folder):
    """Three videos and a table about them."""
    for k in range(3):
        write_video(folder / f"{k}.mp4", [40 + 60 * k] * 8, fps=2)
    lines = [f"{k}.mp4,How bright is it?,{right},dark,bright,grey\n" for k, right in enumerate(("dim", "so", "lit"))]
    (folder / "table.csv").write_text("".join(lines))


def test_another_backbone_trains_on_a_data_set_of_ones_own(fork, tmp_path, monkeypatch, capsys):
    fork(0)
    table_of(tmp_path)
    rows = fork(2)["prepare"]("table.csv", "mine.jsonl")
    assert [(row["answer"], row["options"][ord(row["answer"]) - 65]) for row in rows] == [
        ("C", "dim"), ("D", "so"), ("D", "lit")]
    command(monkeypatch, "--stage", "cpt", "--attn", "gqa", "--data", "mine.jsonl", "--out", "runs/mine", "--steps", 1,
            "--packs", 2)
    assert "cpt: held-out loss" in capsys.readouterr().out
    cfg = iv3.load_model("runs/mine/cpt")[0].cfg
    assert (cfg.hidden, cfg.layers, cfg.kv_heads, cfg.vision_layers) == (192, 6, 3, 3)


def test_a_broken_row_of_ones_own_is_named(fork, tmp_path):
    table_of(tmp_path)
    (tmp_path / "table.csv").write_text("0.mp4,How bright?,dim\n")
    with pytest.raises(iv3.UserError, match="mine.jsonl:1: field 'options'"):
        fork(2)["prepare"]("table.csv", "mine.jsonl")


def test_another_reward_is_what_rl_sees_and_no_filter(fork):
    row = {"task": "grounding", "answer": [2, 4]}
    text, wordy = "From 2 to 4 seconds.", f"{'Well, ' * 10}from 2 to 4 seconds."
    before = evaluation.reward(wordy, row)
    fork(1)
    assert train.evaluation.reward(text, row) == 1
    assert train.evaluation.reward(wordy, row) == pytest.approx(before - 0.01 * (len(wordy) - 40))
    assert train.evaluation.correct(wordy, row) == before


def test_another_tool_is_called_charged_and_evidence(fork, tmp_path):
    write_video(tmp_path / "clip.mp4", [200] * 16, fps=2)
    fork(3)
    assert "brightness" in mcr_agent.tools_prompt()
    model = ScriptedModel([call("brightness", start=2, end=90), final("bright", [[2, 4]])], ["support"])
    result = mcr_agent.run_agent(model, tmp_path / "clip.mp4", "Is it bright?", budget=mcr_agent.Budget(coarse=2))
    told = result.trace[1]["feedback"]
    assert abs(int(re.match(r"brightness (\d+) of 255", told)[1]) - 200) < 4 and "(clipped" in told
    assert result.trace[1]["frames"] == 10 and result.verdict == "support"     # 2 to 8 seconds; two were seen


def test_another_stage_trains(fork, tmp_path, monkeypatch):
    """It learns from right answers alone: here all are, and the loss is of one answer of each group."""
    table_of(tmp_path)
    fork(2)["prepare"]("table.csv", "mine.jsonl")
    fork(0)
    fork(4)
    monkeypatch.setattr(evaluation, "correct", lambda text, row: 1.0)
    command(monkeypatch, "--stage", "rft", "--attn", "gqa", "--init", "runs/mine/base", "--data", "mine.jsonl",
            "--out", "runs/mine", "--steps", 2, "--packs", 2, "--group", 2)
    record = json.loads((tmp_path / "runs/mine/rft/stage.json").read_text())
    assert record["stage"] == "rft" and record["tokens"] > 0 and record["recipe"]["group"] == 2


def test_another_benchmark_is_scored(fork, tmp_path):
    fork(5)
    row = {"id": "1", "task": "counting", "answer": 3, "messages": [{"role": "assistant", "content": "3"}]}
    (tmp_path / "counting.jsonl").write_text(json.dumps(row) + "\n")
    assert iv3.load_rows(tmp_path / "counting.jsonl") == [row]
    task = evaluation.TASKS["counting"]
    assert [evaluation.reward(text, row) for text in ("3", "I see 4", "none", None)] == [1, 0.5, 0, 0]
    score = task.score(["2", None], [row, row], 0)
    assert (score["near"], score["missing"], score["unparsed"]) == (0.25, 1, 1)
    assert evaluation.baselines([row], [])["count"] == 0.5


# ---- the map of the paper -------------------------------------------------------------------------------------------

MAP = README.partition("## Where the paper is in the code")[2].partition("\n## ")[0]
PLACES = []                                              # (what must be said there, file, name)
for paper, code in re.findall(r"^\| (.*§.*?) \| (.*) \|$", MAP, re.M):
    for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?: \(\d\))?(?:, )?)+)", code):
        for name, equation in re.findall(r"`([\w.]+)`(?: \((\d)\))?", names):
            PLACES += [(section, file, name) for section in re.findall(r"§\d(?:\.\d+)*", paper)]
            PLACES += [(f"Eq. {equation}", file, name)] if equation else []


@pytest.mark.parametrize("said, file, name", PLACES)
def test_the_map_is_true(said, file, name):
    """Each § and equation of the map stands in the text of the function or class that it names."""
    place = iv3.load_file(file) if "/" in file else importlib.import_module(file.removesuffix(".py"))
    for part in name.split("."):
        place = getattr(place, part)
    assert said in inspect.getsource(place)


def test_the_map_has_every_equation_and_part_of_the_method():
    said = {place[0] for place in PLACES}
    assert {f"Eq. {i}" for i in range(1, 6)} | {"§3.1", "§3.2.1", "§3.2.2", "§3.2.3", "§3.3", "§3.4", "§4.2.1"} <= said


class Parsed(Exception):
    """Holds the parser of a command that has understood its arguments."""


@pytest.fixture(scope="module")
def parse():
    """parse(file, arguments) → the command's parser; SystemExit if it refuses them."""
    original = argparse.ArgumentParser.parse_args

    def stop(parser, *arguments):
        original(parser, *arguments)
        raise Parsed(parser)

    def call(file, arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [file, *arguments])
            with pytest.raises(Parsed) as parsed:
                runpy.run_path(str(ROOT / file), run_name="__main__")
        return parsed.value.args[0]
    return call


COMMANDS = {match for line in [*BLOCKS.splitlines(), *INLINE] if "…" not in line
            for match in re.findall(r"python (\S+\.py)([^|&\n]*)", line.partition(" #")[0]) if match[0] in FILES}


@pytest.mark.parametrize("file, arguments", sorted(COMMANDS), ids=lambda x: x.strip() or "nothing")
def test_a_command_parses(file, arguments, parse):
    parse(file, shlex.split(arguments))


NEEDED = {"data/toy/prepare.py": "--out x", "data/toy/pretrain.py": "--out x", "data/curate/prepare.py": "x --out x",
          "iv3.py": "v q", "extras/report.py": "x", "extras/memory.py": "tiny", "extras/show_samples.py": "1",
          "extras/remote_agent.py": "--url x --api-model x"}     # else a command says only what it lacks


def test_flags_in_the_text_exist(parse):
    assert len(COMMANDS) > 18 and {file for file, _ in COMMANDS} <= {*FILES}
    flags = {"--nproc_per_node", "--index-url"}
    for file in FILES:
        arguments = NEEDED.get(file, "--annotations x --media x --out x" if file.startswith("data/") else "")
        flags |= parse(file, arguments.split())._option_string_actions.keys()
    named = {flag for code in INLINE for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", code)}
    assert named and sorted(named - flags) == []
