"""The README cannot drift from the code: its forks run, its commands parse, its flags exist."""
import argparse
import re
import runpy
import shlex
import sys
from types import SimpleNamespace

import pytest
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
    for table in (iv3.PRESETS, mcr_agent.TOOLS):
        for name in table:
            monkeypatch.setitem(table, name, table[name])
    presets, tools, reward = dict(iv3.PRESETS), dict(mcr_agent.TOOLS), evaluation.reward

    def run(number):
        names = {"__name__": "fork"}
        exec(compile(FORKS[number], f"README fork {number}", "exec"), names)
        return names
    yield run
    evaluation.reward = reward
    for table, kept in ((iv3.PRESETS, presets), (mcr_agent.TOOLS, tools)):
        table.clear()
        table.update(kept)


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


def test_another_reward_is_what_rl_sees(fork):
    row = {"task": "grounding", "answer": [2, 4]}
    text, wordy = "From 2 to 4 seconds.", f"{'Well, ' * 10}from 2 to 4 seconds."
    before = evaluation.reward(wordy, row)
    fork(1)
    assert train.evaluation.reward(text, row) == 1
    assert train.evaluation.reward(wordy, row) == pytest.approx(before - 0.01 * (len(wordy) - 40))


def test_another_tool_is_called(fork, tmp_path):
    write_video(tmp_path / "clip.mp4", [200] * 8, fps=2)
    fork(3)
    call = mcr_agent.check_call({"name": "brightness", "arguments": {"start": 1, "end": 90}}, 4.0)
    assert call.arguments == {"start": 1, "end": 4} and "brightness" in mcr_agent.tools_prompt()
    run = SimpleNamespace(video=str(tmp_path / "clip.mp4"), last="", source="")
    text = mcr_agent.Rollout.feedback(run, call).text
    assert abs(int(re.match(r"brightness (\d+) of 255", text)[1]) - 200) < 4 and "(clipped" in text


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


def test_flags_in_the_text_exist(parse):
    assert len(COMMANDS) > 20 and {file for file, _ in COMMANDS} == {*FILES} - {"data/toy/pretrain.py"}
    flags = {"--nproc_per_node", "--index-url"}
    for file in FILES:
        arguments = {"data/toy/prepare.py": "--out x", "data/toy/pretrain.py": "--out x", "data/curate/prepare.py":
                     "x --out x"}.get(file, "--annotations x --media x --out x" if file.startswith("data/") else "")
        flags |= parse(file, arguments.split())._option_string_actions.keys()
    named = {flag for code in INLINE for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", code)}
    assert named and sorted(named - flags) == []
