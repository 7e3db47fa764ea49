"""The commands of extras/: result tables, reports and pages, the benches, the ablation."""
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import ablation
import bench_conversion
import bench_decode
import bench_live_cache
import bench_steps
import bench_video
import numpy as np
import pytest
import report
import torch
from test_agent import call, clip, final, rollout
from test_eval import grounding, mcq, world, write_rows

import eval as evaluation
import iv3
import mcr_agent
import train
from m2la import ConvertSpec, UserError


def command(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    iv3.run_cli(module.main)


# ---- the result tables ----------------------------------------------------------------------------------------------

def fake_results():
    ci = {f"{k}_{p}": v for k in ("mcq", "miou", "r1_70", "width") for p, v in (("n", 40), ("ci", [0.55, 0.75]))}
    block = {"mcq": 0.65, "miou": 0.6, "r1_70": 1.0, "width": 12.5, **ci}
    group = {"direct": 0.25, "agentic": 0.75, "evidence_hit": 0.5, "direct_n": 8, "forced": 1, "direct_ci": [0.1, 0.5]}
    return {"baselines": {"short": {"mcq": 0.33, "miou": 0.2}, "long": {"mcq": 0.3}}, "base": {"loss": 1.25},
            "convert": {"loss": 1.5, "cache_ratio": 0.5}, "cpt": {"loss": 1.3},
            "opd": {"short": block, "long": block, "gap_closed": 0.4}, "sft_short": {"short": block},
            "agent": {"unseen": group, "seen": group}}


def test_the_table_has_a_row_per_stage_baselines_first_within_100_columns():
    text = report.render(fake_results())
    assert max(map(len, text.splitlines())) <= 100
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in lines[2:5]] == ["baselines", "sft_short", "opd"]
    assert ".65±.10" in lines[4] and "1.00±.10" in lines[4] and "12.50" in lines[4]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "| convert cache_ratio | .50" in text and "| unseen" in text and "opd gap_closed" in text
    changes = [line.split()[1] for line in lines if "+" in line]
    assert changes == ["convert", "cpt", "sft_short", "opd", "agent,", "agent,"]


def test_what_each_step_changes_is_told_in_points_and_over_seeds():
    """By hand: of 0.65 - 0.33 and so on; the first stage on long clips has no baseline for spans."""
    one = report.gains(fake_results())
    assert one["convert"] == {"nats": 0.25} and one["cpt"]["nats"] == pytest.approx(0.05)
    assert one["sft_short"] == pytest.approx({"S mcq": 32, "S mIoU": 40})
    assert one["opd"] == {"S mcq": 0, "S mIoU": 0, "S R1@.7": 0, "% of gap": 40}
    assert one["agent, seen"] == {"L mcq": 50}
    header, rows = report.gains_table([one, {**one, "sft_short": {"S mcq": 34, "S mIoU": 40}}])
    assert rows[2][0] == "sft_short" and rows[2][header.index("S mcq")] == "+33.0 ± 12.7"     # t · √2 / √2
    assert report.gains_table([one]).rows[0][:2] == ["convert", "+0.250"]


def test_the_table_of_a_quick_run_says_what_is_seen(tmp_path):
    """Up and down where the interval leaves out 0; nats of losses, points of all else."""
    def block(key, value, low, high, n=9):
        return {key: value, f"{key}_ci": [low, high], f"{key}_n": n}
    results = fake_results()
    results |= {"quick": True, "changes": {
        "convert": {"against": "base", **block("loss", 0.02, 0.01, 0.03)},
        "cpt": {"against": "convert", **block("loss", -0.02, -0.03, -0.01)},
        "sft_short": {"against": "baselines", "short": block("mcq", 0.5, 0.4, 0.6),
                      "long": block("miou", 0.1, -0.1, 0.3)},
        "rl": {"against": "sft_short", "short": {}, "long": block("miou", -0.1, -0.3, 0.1)}}}
    results["opd"] |= block("gap_closed", 0.4, 0.1, 0.7)
    for group in results["agent"].values():
        group |= block("gain", 0.25, -0.25, 0.75)
    write_rows(tmp_path / "metrics.jsonl", [{"stage": "rl", "step": i, "reward": i / 10} for i in range(9)])
    (tmp_path / "results.json").write_text(json.dumps(results))
    blocks = report.read_results(tmp_path)
    table, = (block for block in blocks if isinstance(block, report.Table) and block.header[-1] == "seen")
    assert table.rows == [
        ["convert", "loss", "+0.020 ± 0.010", "base", 9, "up"],
        ["cpt", "loss", "-0.020 ± 0.010", "convert", 9, "down"],
        ["sft_short", "S mcq", "+50.0 ± 10.0", "baselines", 9, "up"],
        ["sft_short", "L mIoU", "+10.0 ± 20.0", "baselines", 9, "no"],
        ["rl", "L mIoU", "-10.0 ± 20.0", "sft_short", 9, "no"],
        ["rl", "reward of training", "+60.0 ± 0.0", "its first third", 3, "up"],
        ["opd", "gap to the teacher closed", "+40.0 ± 30.0", "rl", 9, "up"],
        ["agent, unseen", "mcq", "+25.0 ± 50.0", "direct answers", 9, "no"],
        ["agent, seen", "mcq", "+25.0 ± 50.0", "direct answers", 9, "no"]]
    text = report.markdown_page(blocks)
    assert report.QUICK_TITLE in text and report.GAINS_TITLE not in text
    assert max(map(len, text.splitlines())) <= 110


# ---- the report -----------------------------------------------------------------------------------------------------

EVIL = "<script>x</script> ![](http://evil/x.png) `|\n\n# not a heading"


@pytest.fixture
def run(world, tmp_path):
    """A finished run as train.py leaves it, small: eight test items, answered half right, one with markup in it."""
    (tmp_path / "data").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "data" / name).write_bytes((world.root / name).read_bytes())
    rows = [mcq("B", kind=f"k{i}") for i in range(5)] + [grounding(i, i + 2.0, "b.mp4", 6.0) for i in (0.0, 1.0, 2.0)]
    texts = ["blue (B)", EVIL, "blue", "red", None, "From 0.0 to 2.0 seconds.", "From 4.0 to 5.0 seconds.", "hm"]
    write_rows(tmp_path / "data" / "test_short.jsonl", rows)
    scores = {"meta": {"data": "elsewhere/data/test_short.jsonl"}, "texts": {r["id"]: t for r, t in zip(rows, texts)},
              "items": {r["id"]: evaluation.reward(t, r) for r, t in zip(rows, texts)}}
    recipe = {"steps": 40, "lr": 0.001, "muon": 0, "packs": 8, "branches": 4, "mix": {"sft_short.jsonl": 1.0}}
    done = {"inherits": "x/cpt", "tokens": 2e6, "seconds": 90, "processes": 2, "recipe": recipe}
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "scores.json").write_text(json.dumps({"short": scores}))
    (tmp_path / "rl" / "stage.json").write_text(json.dumps(done))
    lines = [{"stage": "rl", "step": i, "loss": 0.1, "reward": i / 40, "tokens": 9} for i in range(40)]
    write_rows(tmp_path / "metrics.jsonl", lines)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "rl", "step": 40, "lo')                                                     # torn
    (tmp_path / "results.json").write_text(json.dumps(fake_results()))
    return tmp_path


def bench_file(run):
    """decode.json: 0.1 MB of cache a token of M2LA, 0.2 of GQA, 1 MB of weights, a step takes 10 times its limit."""
    rows = []
    for context in (10, 20):
        row = {"name": "x", "context": context, "gqa_eager_ms": None}
        for kind, mb in (("m2la", 0.1 * context), ("gqa", 0.2 * context)):
            row |= {f"{kind}_cache_mb": mb, f"{kind}_ms": 10 * (mb + 1), f"{kind}_gb_s": 0.1, f"{kind}_of_copy": 0.1}
        rows.append(row)
    env = {"preset": "tiny", "layers": 2, "attention_only": False, "dtype": "torch.float32", "device": "CPU",
           "copy_gb_s": 1.0, "memory_gb": 10.001}
    (run / "decode.json").write_text(json.dumps({"env": env, "rows": rows}))
    (run / "conversion.json").write_text(json.dumps({"env": {"model": "m"}, "rows": [
        {"name": "paper", "loss_change": 2.1494, "seconds": 3.0}, {"name": "default", "loss_change": 0.019}]}))


@pytest.mark.parametrize("drawn", [False, True])
def test_the_report_holds_tables_curves_and_five_answers(drawn, run, monkeypatch, capsys):
    if drawn:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench_file(run)
    command(monkeypatch, report, run)
    text, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    tables = report.render(fake_results())
    assert capsys.readouterr().out == f"{tables}\n\n{run}/report.html and report.md written\n"
    assert (run / "results.md").read_text() == f"{tables}\n" and tables in text
    assert "reward 0.0375 → 0.938" in text and "2.00 M" in text                            # tenths of i/40; tokens
    assert "| 20            | 30       | 50           | does not fit  | 3           | 5 " in text and "2.149" in text
    assert "0.1 M tokens with M²LA, 0.05 M tokens with good GQA" in text                   # 10 GB by 0.1 and 0.2 MB
    assert text.count("### ") == 5 and len(re.findall("→ (right|IoU 1.00)", text)) == 3     # all there are, of 8
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert len(pictures) >= 5 * 6 and all((run / name).stat().st_size for name in pictures)
    assert ("report/training.svg" in pictures and "report/decode.svg" in pictures) == drawn
    assert ("pip install matplotlib" in text) != drawn
    assert len(pictures) == page.count("<img ") == page.count('src="data:image/')
    both = text + page
    assert "<script" not in both and "http://evil" not in page.replace("http&#58;", "") and "# not a" not in page


def test_the_report_shows_a_models_text_as_text_only(run):
    for row in evaluation.stage_samples(run / "rl").values():
        if row["text"] == EVIL:
            blocks = report.item_blocks(0, row)
            text, page = report.markdown_page(blocks), report.page("x", blocks)
            assert "not a heading" in text and "<script" not in page
            assert text.count("![") == len(report.pictures_of(blocks)) == page.count("<img")
            assert len({line.count("|") for line in text.split("\n\n")[1].splitlines()}) == 1
            return
    raise AssertionError("the item is gone")


def test_the_five_items_are_right_and_wrong_in_turn_of_different_kinds():
    """One right item, the others wrong: once no right one is left, the kind decides; then any will do."""
    samples = {f"{kind}{n}": {"id": f"{kind}{n}", "kind": kind, "reward": 0.4} for kind in "ab" for n in range(3)}
    samples["a0"]["reward"] = 0.5
    picked = report.picked_items(samples)
    assert picked[0]["id"] == "a0" and picked[1]["kind"] == "b" and len({row["id"] for row in picked}) == 5
    assert picked == report.picked_items(dict(reversed(samples.items())))                       # whatever their order
    assert [row["id"] for row in report.picked_items({"x": {**samples["b1"], "id": "x"}})] == ["x"]


@pytest.mark.parametrize("file, text", [
    ("decode.json", '{"rows": []}'), ("rl/stage.json", '{"recipe": {}}'), ("metrics.jsonl", "{}"), ("report", "")])
def test_the_tables_are_printed_also_when_the_page_cannot_be_drawn(file, text, run, monkeypatch, capsys):
    (run / file).write_text(text)                                        # "report": where the pictures' folder would be
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, report, run)
    out, error = capsys.readouterr()
    tables = report.render(fake_results())
    assert (stop.value.code, out) == (2, f"{tables}\n\n") and (run / "results.md").read_text() == f"{tables}\n"
    assert error.startswith("error: ") and error.count("\n") == 1 and not (run / "report.html").exists()


def test_results_of_another_kind_are_named(run, monkeypatch, capsys):
    (run / "results.json").write_text('{"agent": {"seen": {}}}')
    with pytest.raises(SystemExit):
        command(monkeypatch, report, run)
    assert "results.json: not written by" in capsys.readouterr().err


def test_a_report_says_what_makes_the_missing_parts(run):
    (run / "results.json").unlink()
    (run / "rl" / "scores.json").unlink()
    text = report.write_report(run) and (run / "report.md").read_text()
    for part in ("train.py --out", "bench_conversion.py --json", "bench_decode.py --contexts", "No predictions"):
        assert part in text
    (run / "decode.json").write_text('{"rows": []}')
    with pytest.raises(UserError, match="decode.json: not written by"):
        report.write_report(run)
    with pytest.raises(UserError, match="no run is there"):
        report.write_report(run / "absent")
    assert not (run / "absent").exists()


def test_two_stages_of_a_recipe_are_compared(run):
    rows = evaluation.compare(run / "rl", run / "rl")["rows"]
    assert [r["name"] for r in rows][:2] == ["grounding", "grounding when"] and sum(r["n"] for r in rows) == 2 * 8


def test_the_page_of_a_trace(clip, tmp_path, monkeypatch, capsys):
    trace, page = tmp_path / "t.jsonl", tmp_path / "t.html"
    records = rollout(clip, [call("view", start=33, end=37), "oops", final()])[0].trace
    trace.write_text("".join(json.dumps(record) + "\n" for record in records))
    command(monkeypatch, report, trace, "--out", page)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 4 and "src=\"http" not in text and "malformed" in text
    picture = ElementTree.fromstring(re.search("<svg.*</svg>", text)[0])
    spans = [(link.get("href"), *(float(link[1].get(k)) for k in ("x", "width"))) for link in picture.iter("a")]
    x = pytest.approx(130 + 780 * 33 / 60, abs=0.1)                      # 33 to 37 seconds of 60, then 33 to 35
    assert spans == [("#step1", x, 52), ("#step3", x, 26)] and '<pre id="step3" class="termination">' in text
    assert f"<style>{report.STYLE}</style>" in text                      # the one of a run's page
    assert [t.text for t in picture.iter("text")][:4] == ["view", "answer", "0:00", "0:05"]
    records, _ = mcr_agent.read_trace(trace)
    records[1] |= {"arguments": {"query": "x"}, "feedback": "6.0 to 12.0 seconds (score 0.75)"}
    found = ElementTree.fromstring(report.timeline(records))
    assert [float(r.get("width")) for r in found.iter("rect")][:2] == [26, 78]             # evidence, candidate
    records[0] |= {"video": "gone.mp4", "duration": 7200.0, "question": "<script>"}
    records[1] |= {"kind": 'x" onclick="y', "action": "<b>"}
    moved = report.page("x", report.trace_blocks(records))
    assert "no frames: gone.mp4" in moved and "<script>" not in moved and ">1:10:00<" in moved
    assert '" onclick="' not in moved and "<b>" not in moved
    trace.write_text(trace.read_text().replace('"end": 37', '"end": "soon"'))
    with pytest.raises(SystemExit):
        command(monkeypatch, report, trace, "--out", page)
    assert "not a trace" in capsys.readouterr().err and page.read_text() == text


# ---- the ablation bench ---------------------------------------------------------------------------------------------

def test_bench_ablation_trains_what_is_not_there_and_tells_differences(world, tmp_path, monkeypatch, capsys):
    """The commands are train.py's own, up to the training itself; a part's scores are told by its directory."""
    trained, scored, runs = [], [], tmp_path / "runs"
    points = {"full": 60, "CPT": 50, "long_context": 58, "long-video_data": 55.5, "RL": 59}

    def leave(stage, args):
        assert args.steps == 5 and args.data_dir == runs / f"seed{args.seed}" / "full" / "data"
        trained.append((args.seed, args.out.name, stage, Path(args.init).name if args.init else None, args.max_frames,
                        tuple(args.without)))
        iv3.save_model(args.out / stage, world.model, world.processor.tokenizer)

    def leave_all(args):
        for stage in iv3.STAGE_ORDER:
            leave(stage, args)
        (args.out / "results.json").write_text(json.dumps(fake_results()))

    def score(model, processor, test, seed, model_dir):
        scored.append(model_dir)
        value = (points[model_dir.parent.name] + seed - (model_dir.name == "rl")) / 100 - ("long" in test.name) / 10
        blocks = {"mcq": ["acc"], "grounding": ["miou", "r1_30", "r1_50", "r1_70", "width"]}
        return {task: {name + part: value for name in names for part in ("", "_n", "_ci")}
                for task, names in blocks.items()}

    def run(line, **_):
        monkeypatch.setattr(sys, "argv", line[1:])
        train.main()
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(train, "run_stage", leave)
    monkeypatch.setattr(train, "whole_recipe", leave_all)
    monkeypatch.setattr(evaluation.subprocess, "run", run)
    monkeypatch.setattr(ablation, "evaluate", score)
    bench = ["--seeds", 2, "--out", runs, "--recipe", "--steps 5 --jobs 1"]
    command(monkeypatch, ablation, *[*bench, "--json", tmp_path / "a.json"])
    rows = {row["name"]: row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert json.loads((tmp_path / "a.json").read_text())["steps"] == [report.gains(fake_results())] * 2
    assert rows["full, opd"]["short_mcq"] == pytest.approx(60.5)
    assert rows["full, opd"]["long_miou"] == pytest.approx(50.5)
    changes = {name: row["long_mcq"] for name, row in rows.items() if name.startswith("- ")}
    assert changes == pytest.approx({"- CPT": -10, "- long context": -2, "- long-video data": -4.5, "- RL": -1,
                                     "- OPD": -1})
    assert rows["full, opd"]["short_mcq_half"] == pytest.approx(12.71 * 0.5)      # of 60 and 61: t · sd / √2
    mine = [run[1:] for run in trained if run[0] == 1 and run[1] != "full"]
    long = ("sft_long.jsonl", "curated/curated.jsonl", "sft_agent.jsonl")
    assert mine == [("CPT", "sft_short", "convert", None, ()), ("CPT", "sft_long", None, None, ()),
                    ("long_context", "sft_long", "sft_short", 48, ()),
                    ("long-video_data", "sft_long", "sft_short", None, long), ("RL", "opd", "sft_long", None, ())]
    assert set(long) < set(train.STAGES["sft_long"].recipe.mix)
    before, first = (len(trained), len(scored)), capsys.readouterr().out
    command(monkeypatch, ablation, *bench)
    assert (len(trained), len(scored)) == before and capsys.readouterr().out == first
    shutil.rmtree(runs / "seed0")                                                 # what was measured is enough
    command(monkeypatch, ablation, *bench)
    assert (len(trained), len(scored)) == before and capsys.readouterr().out == first
    with pytest.raises(SystemExit):
        command(monkeypatch, ablation, *[*bench[:-1], "--steps 6 --jobs 1"])
    assert "has runs with --recipe='--steps 5 --jobs 1'; give another --out" in capsys.readouterr().err


def test_gains_of_runs_on_the_command_line(tmp_path, monkeypatch, capsys):
    """Two runs give a mean; a run that is not there, or has other steps, is named."""
    for name, change in (("a", {}), ("b", {}), ("c", {"agent": {}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({**fake_results(), **change}))
    a, b, c, none = (tmp_path / name for name in "abcd")
    command(monkeypatch, ablation, *["--gains", a, b, "--json", tmp_path / "g.json"])
    out = capsys.readouterr().out
    assert out.startswith("± 95 %, 2 seeds") and "| +32.0 ± 0.0" in out
    assert json.loads((tmp_path / "g.json").read_text()) == [report.gains(fake_results())] * 2
    for runs, problem in (([a, none], "d/results.json is not there"), ([a, c], "c/results.json has other steps")):
        with pytest.raises(SystemExit):
            command(monkeypatch, ablation, *["--gains", *runs])
        assert problem in capsys.readouterr().err


# ---- the conversion bench -------------------------------------------------------------------------------------------

@torch.no_grad()
def test_conversion_bench_rows():
    """The bench's order, equal bytes in all rows, and on a random layer the default ahead of what is published."""
    rows = bench_conversion.conversion_rows()
    assert list(rows)[:2] == ["transmla", "care"] and list(rows)[-2:] == ["paper", "default"]
    assert set(bench_conversion.AT_BOTH) < set(rows)
    bench = bench_conversion.RandomLayer(iv3.Config.preset("tiny"), 0)
    specs = {name: bench_conversion.spec_of(choices, bench.gqa, 0.5) for name, choices in rows.items()}
    assert specs["default"] == bench_conversion.spec_of({**rows["- healing"], "heal": ConvertSpec.heal}, bench.gqa, 0.5)
    assert specs["- measured damage"] == specs["+ greedy by energy"]
    for choices in rows.values():
        for share in (0.3, 0.5):
            spec = bench_conversion.spec_of(choices, bench.gqa, share)
            assert spec.rope_width + sum(spec.ranks) / 2 == int(share * 128)
    error = {name: bench.run(choices, 0.5)["random_out_err"] for name, choices in rows.items()}
    assert error["default"] < 0.8 * min(error[name] for name in ("transmla", "care", "paper")), error
    assert error["default"] < 1.05 * min(error.values()), error


@torch.no_grad()
def test_the_conversion_bench_measures_a_model_and_names_its_sources(world, tmp_path, monkeypatch, capsys):
    """Two rows on a random model: held-out rows on two clips, a cache of the bytes asked for, the model as it was."""
    rows = [mcq("A", clip="a.mp4"), mcq("B", clip="b.mp4"), grounding(1.0, 2.0, "b.mp4", 6.0)]
    for name in (*bench_conversion.CALIBRATION, "val.jsonl"):
        write_rows(world.root / name, rows)
    monkeypatch.setattr(bench_conversion, "conversion_rows", lambda: {"paper": bench_conversion.PAPER, "+ x": {}})
    source = [layer.self_attn for layer in world.model.language_model.layers]
    monkeypatch.setattr(iv3, "open_model", lambda directory: (world.model, world.processor))
    monkeypatch.setattr(bench_conversion, "spec_of", lambda choices, gqa, share: ConvertSpec(
        gqa.head_dim, (4, 4), **{**choices, "heal": 0}))                 # few tokens: 10 for each rank are needed
    command(monkeypatch, bench_conversion, "--data-dir", world.root, "--json", tmp_path / "c.json")
    out, found = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    assert "our re-implementations" in out and "2502.07864" in out and "2603.17946" in out
    assert [row["name"] for row in found["rows"]] == ["paper", "+ x"]
    for row, more in zip(found["rows"], (3, 0)):
        assert {"loss_change", "loss_se", "out_err", "cache_ratio", "seconds"} < row.keys()
        assert len([key for key in row if key.endswith("_30")]) == (5 if more else 0)
        assert row["loss_se"] > 0 and row["out_err"] > 0
    assert sum(found["env"]["held_out_tokens"]) == sum(
        len(world.processor.encode(row["messages"], world.root).ids) for row in rows)
    assert [layer.self_attn for layer in world.model.language_model.layers] == source


# ---- the decode bench -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_eager_baseline_computes_the_same_attention_as_the_layer():
    torch.manual_seed(0)
    gqa, eager = iv3.GQA(64, 4, 2, 16, 1e-6), bench_decode.EagerGQA(64, 4, 2, 16, 1e-6)
    eager.load_state_dict(gqa.state_dict())
    x, vision = torch.randn(1, 7, 64), torch.zeros(1, 7, dtype=torch.bool)
    rope = bench_decode.mrope(torch.arange(7).expand(3, 1, 7), 16, 1e4, (3, 3, 2))
    whole, cache = gqa(x, rope, vision), bench_decode.GrownCache([torch.zeros(2, 1, 2, 0, 16)])
    for t in range(7):
        out = eager(x[:, t:t + 1], [r[:, t:t + 1] for r in rope], vision[:, :1], cache=cache)
        assert torch.allclose(out[:, 0], whole[:, t], atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
@torch.no_grad()
def test_decode_models_share_their_weights_and_a_step_is_repeatable(device):
    """A step, a graph on a GPU, gives the logits that the model gives, also a second time."""
    cfg = iv3.Config(layers=2, deepstack=())
    models = bench_decode.decode_models(cfg, False, device, torch.float32)
    attn = {kind: model.language_model.layers[1].self_attn for kind, model in models.items()}
    assert len({layer.k_proj.weight.data_ptr() for layer in attn.values()}) == 1
    assert [type(layer).__name__ for layer in attn.values()] == ["M2LA", "GQA", "EagerGQA"]
    ids, positions = torch.full((1, 1), 2, device=device), torch.full((3, 1, 1), 40, device=device)
    for kind, model in models.items():
        step, cache = bench_decode.decode_step(model, 40, kind == "gqa_eager")
        cache.truncate(40)
        first = step().clone()
        assert first.shape == (1, 1, cfg.vocab) and first.isfinite().all() and first.any()
        if kind != "gqa_eager":
            assert int(cache.lengths) == 41 and cache.nbytes() == (41 if kind == "gqa" else 20.5) * 2 * 2 * 64 * 4
            for again in (step, lambda model=model, cache=cache: model.logits(model(ids, positions, cache=cache))):
                cache.truncate(40)
                torch.testing.assert_close(again(), first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("more", ["--layers 2", "--attention-only"])
def test_bench_decode_times_the_three_side_by_side(more, tmp_path, monkeypatch, capsys):
    file = tmp_path / "decode.json"
    arguments = f"bench_decode.py --contexts 32,64 {more} --steps 2 --json {file}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    bench_decode.main()
    result = json.loads(file.read_text())
    layers = 1 if more == "--attention-only" else 2
    assert [row["context"] for row in result["rows"]] == [32, 64] and result["env"]["layers"] == layers
    for row in result["rows"]:
        assert row["cache_ratio"] == 0.5 and min(row["m2la_ms"], row["gqa_ms"], row["gqa_eager_ms"]) > 0
        assert row["gqa_cache_mb"] == pytest.approx(row["context"] * layers * 2 * 64 * 4 / 1e6)
        assert row["speedup"] == row["gqa_ms"] / row["m2la_ms"]
        assert row["gqa_of_copy"] == row["gqa_gb_s"] / result["env"]["copy_gb_s"]
    assert "gqa_eager_ms" in capsys.readouterr().out


def test_bench_steps_takes_turns_and_counts_what_is_same():
    """The first step of either warms up; who begins changes."""
    order = []

    def part(who, given):
        def run(step):
            order.append((who, step))
            return given
        return run
    row = bench_steps.row_of("texts", (part("a", ["x", "y", None]), part("b", ["x", "z", None])), 2)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert (row["same"], row["n"]) == (6, 9) and row["ratio"] == row["now_s"] / row["before_s"]
    row = bench_steps.row_of("step", (part("a", {"loss": 1.0}), part("b", {"loss": 2.0})), 1)
    assert (row["loss_before"], row["loss_now"]) == (1.0, 2.0)


def test_bench_decode_times_a_prefill(tmp_path, monkeypatch, capsys):
    """The whole context is read, as one forward over an empty cache."""
    file, lengths, forward = tmp_path / "prefill.json", [], iv3.InternVideo3.forward

    def spy(self, ids, *args, **how):
        assert not any(how["cache"].high)
        lengths.append(ids.shape[1])
        return forward(self, ids, *args, **how)
    monkeypatch.setattr(iv3.InternVideo3, "forward", spy)
    monkeypatch.setattr(sys, "argv", f"bench_decode.py --prefill --contexts 24,40 --steps 2 --json {file}".split())
    bench_decode.main()
    assert lengths == [24] * 6 + [40] * 6                        # two kinds, a warm-up and two timed
    assert all(min(row["m2la_ms"], row["gqa_ms"]) > 0 for row in json.loads(file.read_text())["rows"])
    monkeypatch.setattr(sys, "argv", "bench_decode.py --prefill --batch 2".split())
    with pytest.raises(iv3.UserError, match="--prefill: reads one sequence"):
        bench_decode.main()


@torch.no_grad()
def test_transformers_beside_ours_decodes_the_same_token(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers.models.qwen3_vl", reason="optional: the bench times it where it is installed")
    gqa = bench_decode.decode_models(iv3.Config(layers=2, deepstack=()), False, "cpu", torch.float32)["gqa"]
    theirs = bench_decode.their_decoder(gqa)
    torch.manual_seed(0)
    cache = bench_decode.filled_cache(gqa, 40, False, batch=3)
    their_cache = bench_decode.TheirCache(gqa, cache)
    monkeypatch.setattr(bench_decode, "filled_cache", lambda *_: cache)
    ours, _ = bench_decode.decode_step(gqa, 40, False, 3)
    monkeypatch.setattr(bench_decode, "TheirCache", lambda *_: their_cache)
    step, _ = bench_decode.their_step(gqa, theirs, 40, 3)
    expected = ours()
    for _ in range(2):                                           # also when the token has been taken back
        their_cache.truncate(40)
        torch.testing.assert_close(step(), expected, atol=1e-5, rtol=1e-4)

    monkeypatch.undo()
    file = tmp_path / "decode.json"
    monkeypatch.setattr(sys, "argv", f"bench_decode.py --contexts 32 --layers 1 --batch 2 --steps 1 --transformers "
                                     f"--json {file}".split())
    bench_decode.main()
    result = json.loads(file.read_text())
    row, = result["rows"]
    assert result["env"]["batch"] == 2 and row["m2la_of_transformers"] == row["m2la_ms"] / row["transformers_ms"]
    assert row["gqa_cache_mb"] == pytest.approx(2 * 32 * 2 * 64 * 4 / 1e6)


def test_bench_agent_cache_runs_only_what_is_new(tmp_path, monkeypatch, capsys):
    file, lengths, forward = tmp_path / "cache.json", [], iv3.InternVideo3.forward

    def counted(self, ids, *args, **kwargs):
        lengths.append((self.cfg.attn, ids.shape[1]))
        return forward(self, ids, *args, **kwargs)
    monkeypatch.setattr(iv3.InternVideo3, "forward", counted)
    monkeypatch.setattr(sys, "argv", f"bench_live_cache.py --first 48 --new 32 --steps 2 --json {file}".split())
    bench_live_cache.main()
    rows = json.loads(file.read_text())["rows"]
    for kind in ("m2la", "gqa"):
        assert [n for attn, n in lengths if attn == kind][1::3] == [48, 48, 32, 80, 32, 112]    # live, rebuilt, …
        assert max(row[f"{kind}_difference"] for row in rows) < 1e-3
        last = rows[-1]
        assert last[f"{kind}_live_written_mb"] == pytest.approx(last[f"{kind}_mb"])
        assert last[f"{kind}_rebuilt_written_mb"] == pytest.approx(last[f"{kind}_mb"] * (48 + 80 + 112) / 112)
        assert last[f"{kind}_rebuilt_s"] > rows[0][f"{kind}_rebuilt_s"] > 0
    assert [row["context"] for row in rows] == [48, 80, 112]
    assert rows[-1]["gqa_mb"] == pytest.approx(112 * 4 * 2 * 64 * 4 / 1e6) == pytest.approx(2 * rows[-1]["m2la_mb"])
    assert "m2la_rebuilt_s" in capsys.readouterr().out


def test_the_recipe_has_its_decode_times_measured_once(tmp_path, monkeypatch):
    """By the bench itself, of shorter contexts here."""
    def command(script, *flags):
        flags = ["32,64" if "," in str(flag) else str(flag) for flag in flags]
        monkeypatch.setattr(sys, "argv", [script, *flags, "--steps", "2"])
        bench_decode.main()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(train, "command", command)
    train.bench_decode(tmp_path / "decode.json")
    assert [row["context"] for row in json.loads((tmp_path / "decode.json").read_text())["rows"]] == [32, 64]
    monkeypatch.setattr(train, "command", None)
    train.bench_decode(tmp_path / "decode.json")


def test_bench_decode_leaves_out_what_does_not_fit(tmp_path, monkeypatch, capsys):
    """64 tokens of a tiny layer take 16 kB in M²LA's cache, 33 in GQA's, 131 in the eager one with its copies."""
    free = iter([1.0, 1.0, 40e-6, 20e-6, 7e-6])                  # GB: for the weights, then for each context
    monkeypatch.setattr(bench_decode, "free_memory", lambda device: next(free))
    monkeypatch.setattr(sys, "argv", f"bench_decode.py --contexts 64,64,64,64 --attention-only --steps 1 --json "
                                     f"{tmp_path / 'd.json'}".split())
    bench_decode.main()
    rows, out = json.loads((tmp_path / "d.json").read_text())["rows"], capsys.readouterr().out
    assert [[row[f"{k}_ms"] is not None for k in ("m2la", "gqa", "gqa_eager")] for row in rows] == [
        [True, True, True], [True, True, False], [True, False, False]]
    assert out.count("context 64: no gqa_eager") == 3 and out.count("no m2la") == 1
    monkeypatch.setattr(bench_decode, "free_memory", lambda device: 1e-5)
    with pytest.raises(UserError, match="the weights need .* GB"):
        bench_decode.main()


@pytest.mark.parametrize("module, arguments, word", [
    (bench_decode, "--contexts 16,none", "--contexts"), (bench_decode, "--layers 0", "--layers"),
    (bench_live_cache, "--new 0", "--new"), (bench_decode, "--json nowhere/x.json", "--json"),
    (report, "nowhere", "nowhere"), (report, ". --out x.html", "--out"), (ablation, "--seeds 0", "--seeds")])
def test_a_mistake_is_one_line_and_exit_2(module, arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, module, *arguments.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and word in error


def test_bench_video_reads_films_of_its_own(tmp_path, monkeypatch, capsys):
    file = tmp_path / "v.json"
    arguments = "--minutes 0.05 --height 64 --small-minutes 0.05 --scene-minutes 0.02 --repeats 1 --readers ours"
    command(monkeypatch, bench_video, *arguments.split(), "--folder", tmp_path, "--json", file)
    result = json.loads(file.read_text())
    assert len(result["rows"]) == 11 and "first look at 0.05 min" in capsys.readouterr().out
    for row in result["rows"]:
        assert row["ours_cpu"] >= 0 and row["ours_wall"] > 0 and row["ours_mb"] >= 0
    assert iv3.probe(tmp_path / "64p-0.05min.mp4") == pytest.approx(3)
    bench_video.repeat_part(tmp_path / "64p-3s.mp4", tmp_path / "long.mp4", 3)
    assert iv3.read_video(tmp_path / "long.mp4", fps=10).times.tolist() == pytest.approx(np.arange(90) / 10)
    with pytest.raises(SystemExit):
        command(monkeypatch, bench_video, "--readers", "ours,eyes")
    assert "--readers ours,eyes: takes ours, torchcodec" in capsys.readouterr().err
