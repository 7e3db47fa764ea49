"""Scores, intervals, baselines, missing videos, tables and the command of eval.py."""
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import eval as evaluation
import iv3
import mcr_agent
from m2la import UserError

QUESTION = "What colour is the shape at 1 seconds?"
OPTIONS = ["red", "blue", "green", "red star"]
ROOT = Path(evaluation.__file__).parent


def mcq(answer, kind="colour", options=OPTIONS, clip="a.mp4", **more):
    user = [{"type": "video", "video": clip}, {"type": "text", "text": "\nA. red\n" + QUESTION}]
    return {"id": f"{clip}-{kind}", "task": "mcq", "kind": kind, "options": options, "answer": answer,
            "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": f"x ({answer})"}], **more}


def grounding(start, end, clip="a.mp4", duration=20.0, **more):
    user = [{"type": "video", "video": clip}, {"type": "text", "text": "When is the red star shown?"}]
    return {"id": f"{clip}-{start}", "task": "grounding", "kind": "when", "answer": [start, end], "duration": duration,
            "messages": [{"role": "user", "content": user},
                         {"role": "assistant", "content": f"From {start} to {end} seconds."}], **more}


# ---- parsing ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, letter", [
    ("blue (B)", "B"), ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("**B**", "B"), ("(B) blue", "B"),
    ("B. blue", "B"), ("B) blue", "B"),
    ("the answer is B", "B"), ("Answer: (D)", "D"), ("The answer is B because A dog barks.", "B"),
    ("The answer is A. No, the answer is C", "C"), ("Not (A) or (B): the answer is (C)", "C"),
    ("<think>it may be red (A)</think>\nblue (B)", "B"), ("It is blue.", "B"), ("The shape is  BLUE", "B"),
    ("a red star", "D"),                          # "red" inside "red star" is no second choice
    ("mauve (B)", "B"), ("(B) red", None), ("red (B)", None), ("B. red", None), ("the answer is B, red", None),
    ("red or blue", None), ("red (A) blue (B)", None), ("(A) red (B)", None), ("blueish", None),
    ("E", None), ("blue (E)", "B"), ("I do not know", None), ("", None), (None, None), ("<think>B</think>", None),
    # formats.md: what other extractors get wrong ("Based" is no B, "Answer" no A, "A dog" no A)
    ("Based on the video, the answer is C", "C"), ("Answer: D", "D"), ("The correct option is: B.", "B"),
    ("A dog barks.", None), ("An apple", None), ("Best option: (C", "C"), ("B) blue\n", "B"), ("Blue.", "B"),
    ("A or B? I believe it is green", "C"), ("<think>unfinished, the answer is B", "B"), ("</think>", None),
])
def test_parse_letter(text, letter):
    assert evaluation.parse_letter(text, OPTIONS) == letter


def test_an_option_is_known_without_its_full_stop():
    assert [evaluation.parse_letter(text, ["A dog.", "Mr. Cat.", "."]) for text in ("a dog", "Mr. Cat", ".")] == [
        "A", "B", None]


def test_parse_letter_with_equal_options_needs_the_letter():
    assert evaluation.parse_letter("3 (C)", ["3", "1", "3"]) == "C"
    assert evaluation.parse_letter("3", ["1", "13", "3"]) == "C"


@pytest.mark.parametrize("text, span", [
    ("From 12.5 to 15.0 seconds.", (12.5, 15.0)), ("12.5 - 15", (12.5, 15.0)), ("12s–15s", (12, 15)),
    ("From 15.0 to 12.5 seconds.", (12.5, 15.0)), ("1:05 to 1:10.5", (65, 70.5)), ("1:02:03 to 1:02:04", (3723, 3724)),
    ("between 3 and 7 seconds", (3, 7)), ("[3.0, 7]", (3, 7)), ("scene 4: 5 to 6 s, again 8 to 9 s", (5, 6)),
    ("<think>1 to 2</think> From 3.0 to 4.0 seconds.", (3, 4)), ("at 12.5 seconds", None), ("1, 2 and 3", None),
    ("99999999999 to 5", None), ("never", None), ("", None), (None, None),
])
def test_parse_span(text, span):
    assert evaluation.parse_span(text) == span


# ---- scores -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("a, b, value", [
    ((0, 10), (0, 10), 1), ((0, 10), (5, 15), 1 / 3), ((0, 10), (2, 4), 0.2), ((0, 5), (5, 10), 0), ((0, 1), (8, 9), 0),
    ((3, 3), (0, 10), 0), ((3, 3), (3, 3), 0)])
def test_iou_by_hand(a, b, value):
    assert evaluation.iou(a, b) == pytest.approx(value) and evaluation.iou(b, a) == pytest.approx(value)


def test_grounding_reward_cuts_both_spans_to_the_video():
    row = grounding(15.0, 25.0, duration=20.0)                # annotated past the end
    assert evaluation.grounding_iou("From 15.0 to 40.0 seconds.", row) == pytest.approx(1)
    longer = grounding(15.0, 25.0, duration=60.0)
    assert evaluation.grounding_iou("From 15.0 to 40.0 seconds.", longer) == pytest.approx(0.4)
    assert evaluation.grounding_iou("From 30.0 to 40.0 seconds.", row) == 0
    assert evaluation.grounding_iou("no idea", row) == 0


def test_rewards_follow_the_task():
    assert evaluation.reward("blue (B)", mcq("B")) == 1 and evaluation.reward("blue (B)", mcq("A")) == 0
    assert evaluation.reward("From 0.0 to 5.0 seconds.", grounding(0.0, 10.0)) == pytest.approx(0.5)
    reversed_span = "From 9.0 to 4.0 seconds."
    assert evaluation.grounding_iou(reversed_span, grounding(4.0, 9.0)) == 1                  # the score turns it
    assert evaluation.reward(reversed_span, grounding(4.0, 9.0)) == 0                         # RL must not teach it
    wrong, off, turned = ("red (A)", mcq("B")), ("purple", mcq("B")), (reversed_span, grounding(4.0, 9.0))
    assert [evaluation.well_formed(*x) for x in (wrong, off, turned)] == [1, 0, 0]
    assert evaluation.reward("blue (B)", {**mcq("B"), "task": "mcr"}) == 1                    # an agent's question


def test_a_changed_reward_leaves_what_filters_look_at(monkeypatch):
    """A reward put in place of the rule is what samples are worth; whether they are right stays as it was."""
    monkeypatch.setattr(evaluation, "reward", lambda text, row: -len(text))
    assert evaluation.reward("blue (B)", mcq("B")) == -8
    assert [evaluation.correct(text, mcq("B")) for text in ("blue (B)", "red (A)", None)] == [1, 0, 0]
    assert evaluation.correct("From 0.0 to 5.0 seconds.", grounding(0.0, 10.0)) == pytest.approx(0.5)
    assert evaluation.correct("From 9.0 to 4.0 seconds.", grounding(4.0, 9.0)) == 0


def test_width_is_of_forward_spans_inside_the_video():
    texts = ["From 2.0 to 4.0 seconds.", "From 14.0 to 900.0 seconds.", "From 15.0 to 5.0 seconds.", "hm"]
    score = evaluation.score_grounding(texts, [grounding(2.0, 4.0, duration=20.0)] * 4)
    assert (score["width"], score["width_n"], score["reversed"], score["unparsed"]) == (4.0, 2, 1, 1)     # 2 s and 6 s
    assert score["miou"] == pytest.approx(1 / 4)


def test_recall_counts_equality():
    rows = [grounding(0.0, 1.0)] * 3
    texts = ["From 0.0 to 0.3 seconds.", "From 0.1 to 0.4 seconds.", "From 0.0 to 0.7 seconds."]    # IoU .3, .3, .7
    score = evaluation.score_grounding(texts, rows)
    assert score["r1_30"] == 1 and score["r1_50"] == pytest.approx(1 / 3) and score["r1_70"] == pytest.approx(1 / 3)
    assert evaluation.recall([0.5, 0.4999], 0.5).tolist() == [1, 0]


def test_group_scores_keep_missing_and_unparsed_in_the_denominator():
    rows = [mcq("A"), mcq("B"), mcq("C", kind="shape"), mcq("A")]
    score = evaluation.score_mcq(["red (A)", None, "hm", "blue (B)"], rows)
    assert (score["acc"], score["acc_n"], score["missing"], score["unparsed"]) == (0.25, 4, 1, 1)
    assert score["kinds"] == {"colour": {"value": pytest.approx(1 / 3), "n": 3}, "shape": {"value": 0.0, "n": 1}}
    assert score["macro"] == pytest.approx(1 / 6)                                # mean of the kinds, not of the rows
    assert score["letters"] == {"A": 1, "B": 1}
    score = evaluation.score_grounding(["From 2.0 to 6.0 seconds.", None, "hm"], [grounding(2.0, 4.0)] * 3)
    assert score["miou"] == pytest.approx(1 / 6) and (score["missing"], score["unparsed"]) == (1, 1)
    assert (score["width"], score["width_n"], score["true_width"]) == (4.0, 1, 2.0)


# ---- intervals ----------------------------------------------------------------------------------------------------

def test_wilson_by_hand():
    assert evaluation.wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    low, high = evaluation.interval([1] * 10, range(10))
    assert low == pytest.approx(0.7225, abs=1e-4) and high == 1


def test_cluster_bootstrap_is_wider_when_questions_of_a_clip_fail_together():
    values, clips = np.repeat([1, 0, 1, 1, 0, 1, 0, 1, 1, 0], 10), np.repeat(np.arange(10), 10)
    free, clustered = evaluation.interval(values, np.arange(100)), evaluation.interval(values, clips)
    assert clustered[1] - clustered[0] > 2 * (free[1] - free[0])
    assert evaluation.interval(values, clips) == clustered                                   # seeded


def test_interval_covers_the_truth_about_95_times_in_100():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        chance = rng.beta(4, 2, size=40)                                                     # 40 clips, mean 2/3
        values = (rng.random((40, 5)) < chance[:, None]).astype(float).ravel()
        low, high = evaluation.interval(values, np.repeat(np.arange(40), 5), draws=500)
        hits += low <= 2 / 3 <= high
    assert 178 <= hits <= 199


def test_interval_of_a_ratio_weighs_tokens_and_a_perfect_score_keeps_a_width():
    low, high = evaluation.interval(np.array([[10, 10], [90, 30]]), ["a", "b"])
    assert low == pytest.approx(1) and high == pytest.approx(3)
    low, high = evaluation.interval([1] * 6, ["a", "a", "b", "b", "c", "c"])
    assert low == pytest.approx(evaluation.wilson(3, 3)[0]) and high == 1                    # three clips, not six rows
    assert evaluation.interval([], []) is None


# ---- baselines ----------------------------------------------------------------------------------------------------

def test_mcq_baselines_by_hand():
    train = [mcq("B")] * 3 + [mcq("A")]
    result = evaluation.baselines([mcq("B"), mcq("B"), mcq("A"), mcq("D", kind="other")], train)
    assert result["mcq_all"]["chance"] == 0.25
    assert result["mcq_all"]["prior letter"] == 0.5
    # blue was right most often for the kind colour; the kind 'other' was never seen: all four options tie
    assert result["mcq_all"]["prior word"] == pytest.approx((1 + 1 + 0 + 0.25) / 4)
    assert result["mcq_name"] == "prior word" and result["mcq"] == pytest.approx(0.5625) and result["mcq_n"] == 4
    assert result["mcq_kinds"]["other"]["value"] == 0.25 and "miou" not in result


def test_grounding_baselines_are_fitted_on_train_only():
    train = [grounding(5.0, 10.0, duration=20.0), grounding(10.0, 20.0, duration=40.0)]     # always 1/4 to 1/2
    test = [grounding(2.5, 5.0, duration=10.0), grounding(4.0, 6.0, duration=10.0)]
    result = evaluation.baselines(test, train)
    assert result["miou_all"]["whole clip"] == pytest.approx((0.25 + 0.2) / 2)
    assert result["miou_all"]["constant span"] == pytest.approx((1 + 1 / 3.5) / 2)
    assert result["miou_name"] == "constant span" and result["r1_50"] == 0.5
    late = [grounding(2.5, 5.0, duration=10.0), *[grounding(6.0, 10.0, duration=10.0)] * 2]  # test differs from train
    assert evaluation.baselines(late, train)["miou_all"]["constant span"] == pytest.approx(1 / 3)
    assert set(evaluation.baselines(test, [])["miou_all"]) == {"whole clip"}                 # nothing to fit


def test_blind_is_one_more_baseline_and_looks_at_another_clip():
    rows = [mcq("B", clip="a.mp4"), mcq("A", clip="b.mp4"), grounding(1.0, 2.0, clip="c.mp4")]
    swapped = evaluation.blind_rows(rows)
    assert [evaluation.clip_of(r) for r in swapped] == ["b.mp4", "c.mp4", "a.mp4"]
    assert evaluation.clip_of(rows[0]) == "a.mp4"
    result = evaluation.baselines(rows, [], blind=["blue (B)", "red (A)", "From 1.0 to 2.0 seconds."])
    assert (result["mcq_name"], result["mcq"], result["miou_name"], result["miou"]) == ("blind", 1, "blind", 1)
    with pytest.raises(UserError, match="two videos"):
        evaluation.blind_rows(rows[:1])


# ---- running a model ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two small videos, a truncated one, rows about them, and a random tiny model."""
    root = tmp_path_factory.mktemp("world")
    for name in ("a.mp4", "b.mp4"):
        with av.open(str(root / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width = stream.height = 32
            for i in range(24):
                image = np.full((32, 32, 3), 10 * i + (name == "b.mp4"), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
    (root / "broken.mp4").write_bytes((root / "a.mp4").read_bytes()[:100])
    torch.manual_seed(0)
    tokenizer = iv3.Tokenizer([" (A)", "red", "blue", " seconds", "What colour is the shape at "])
    model = iv3.build_model(iv3.Config.preset("tiny", layers=2, deepstack=()), tokenizer).eval()
    model.init_weights()
    iv3.save_model(root / "model", model, tokenizer)
    return SimpleNamespace(root=root, model=model, processor=iv3.Processor(tokenizer, model.cfg))


def agent_test(clip, kind, **more):
    row = mcq("B", kind=kind, clip=clip, frames=8, evidence=[[1, 2]], **more)
    return {**row, "task": "mcr", "id": f"{clip}-{kind}", "unseen": kind in ("brief", "speech", "fact")}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_come_back_in_row_order_and_broken_videos_are_none(world, capsys):
    rows = [*(mcq("A", clip=clip) for clip in ("b.mp4", "broken.mp4", "gone.mp4")), grounding(1.0, 2.0, clip="a.mp4")]
    stats = {}
    texts = evaluation.answer_rows(world.model, world.processor, rows, world.root, batch_size=3, max_new=6, stats=stats)
    alone = [evaluation.answer_rows(world.model, world.processor, [row], world.root, max_new=6)[0] for row in rows]
    assert texts == alone and texts[1:3] == [None, None] and None not in (texts[0], texts[3])
    assert "2 of 4 rows cannot be read" in capsys.readouterr().out
    assert stats["frames_per_sample"] == 12 and stats["tokens_per_sample"] > 12             # 6 s at 2 fps
    score = evaluation.score_mcq(texts[:3], rows[:3])
    assert score["acc_n"] == 3 and score["missing"] == 2


def test_texts_return_to_their_rows_after_sorting_by_length(world, monkeypatch):
    rows = [mcq("A", clip="a.mp4", duration=duration) for duration in (6, 2, 4, 3, 5)]
    for n, row in enumerate(rows):
        row["messages"][0]["content"][1]["text"] = f"row {n}"

    def echo(model, samples, stop, max_new):
        return [iv3.Generation(ids=sample.ids[-60:].tolist()) for sample in samples]

    monkeypatch.setattr(iv3, "generate", echo)
    texts = evaluation.answer_rows(world.model, world.processor, rows, world.root, batch_size=2)
    assert [f"row {n}" in text for n, text in enumerate(texts)] == [True] * 5


def command(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    return iv3.run_cli(evaluation.main)


def records_of(path, *but):
    return [{k: v for k, v in json.loads(line).items() if k not in but} for line in path.read_text().splitlines()]


def test_a_killed_run_resumes_to_the_same_samples_and_scores(world, monkeypatch, capsys):
    """Killed in the fourth of five batches, with a torn line and a second process's part. Of the three batches before,
    one is whole; one lost a line, and one has a row that could not be read and may be there now."""
    rows = [mcq("A", kind=f"k{i}", clip="ab"[i % 2] + ".mp4") for i in range(5)] + [mcq("B", clip="gone.mp4")]
    rows += [{**grounding(1.0, 2.0), "id": "said", "task": "caption"}]
    data = write_rows(world.root / "many.jsonl", rows)
    model = world.root / "mine"
    iv3.save_model(model, world.model, world.processor.tokenizer)
    run = ["--data", data, "--model", model, "--batch", 2, "--max-new", 6, "--blind"]
    command(monkeypatch, [*run, "--out", world.root / "whole"])
    whole, samples = world.root / "whole" / "samples.jsonl", world.root / "killed.jsonl"
    lines = records_of(whole)
    assert len(lines) == 1 + 2 * 6 + 1 and {"frames", "tokens", "ms", "text", "prediction"} <= set(lines[1])
    assert [x["reward"] for x in lines if x.get("text", "") is None] == [0.0] * 3     # what shows gone.mp4
    generate, count = iv3.generate, []

    def killed(*args, **kwargs):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(iv3, "generate", killed)
    with pytest.raises(SystemExit):
        command(monkeypatch, [*run, "--out", samples])
    half = samples.read_text().splitlines(keepends=True)
    samples.write_text("".join(half[:3]) + half[3][:20])
    (world.root / "killed.jsonl.part1").write_text("".join(half[4:]))
    count[:] = [1] * 10
    command(monkeypatch, [*run, "--out", samples, "--resume", "--json", world.root / "killed.json"])
    assert records_of(samples, "ms") == records_of(whole, "ms")
    assert not (world.root / "killed.jsonl.part1").exists() and len(count) == 10 + 5 - 1          # one was done
    scores = [json.loads(p.read_text()) for p in (world.root / "whole/summary.json", world.root / "killed.json")]
    assert scores[0] == scores[1]

    def refused(word, *change):
        before = samples.read_text()
        with pytest.raises(SystemExit):
            command(monkeypatch, [*run, "--out", samples, *change])
        assert word in capsys.readouterr().err and samples.read_text() == before

    refused("--resume")
    refused("made with max_new 6, this run has 5", "--max-new", 5, "--resume")
    refused("made with seed", "--seed", 1, "--resume")
    other = copy.deepcopy(world.model)
    other.language_model.norm.weight.data[0] += 1
    iv3.save_model(model, other, world.processor.tokenizer)
    refused("made with weights_sum", "--resume")
    write_rows(world.root / "many.jsonl", [{**rows[0], "answer": "C"}, *rows[1:]])
    refused("made with rows_hash", "--resume")


def sample(id, reward, kind="colour", clip=None, task="mcq"):
    return {"id": id, "pass": "answers", "task": task, "kind": kind, "clip": clip or id, "reward": reward}


def test_two_runs_compared_by_hand(tmp_path, monkeypatch, capsys):
    """Two clips of two items: B gains on clip a (0 → 1, twice), loses on clip b once. A bootstrap draws the clips
    (a,a), (a,b), (b,a), (b,b): differences 1, 1/4, 1/4, -1/2."""
    a = [sample("1", 0, clip="a"), sample("2", 0, clip="a"), sample("3", 1, clip="b"), sample("4", 1, clip="b")]
    b = [sample("1", 1, clip="a"), sample("2", 1, clip="a"), sample("3", 0, clip="b"), sample("4", 1, clip="b")]
    a += [sample("5", 0.4, "when", task="grounding"), sample("left", 1)]
    b += [sample("5", 0.6, "when", task="grounding"), sample("new", 1), sample("newer", 1)]
    write_rows(tmp_path / "a.jsonl", [{"settings": {}}, *a])
    (tmp_path / "b").mkdir()
    write_rows(tmp_path / "b" / "samples.jsonl", [{"settings": {}}, *b])
    command(monkeypatch, ["--compare", tmp_path / "a.jsonl", tmp_path / "b", "--json", tmp_path / "c.json"])
    result, out = json.loads((tmp_path / "c.json").read_text()), capsys.readouterr().out
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["grounding", "grounding when", "mcq", "mcq colour"]
    assert (rows["mcq"]["a"], rows["mcq"]["b"], rows["mcq"]["difference"], rows["mcq"]["n"]) == (0.5, 0.75, 0.25, 4)
    assert rows["mcq"]["ci"] == [-0.5, 1.0] and (rows["mcq"]["only_a"], rows["mcq"]["only_b"]) == (1, 2)
    assert rows["grounding"]["difference"] == pytest.approx(0.2) and rows["grounding"]["only_b"] == 1
    assert result["not_in_b"] == ["left"] and result["not_in_a"] == ["new", "newer"]
    assert "1 items are not in B and not compared: left" in out and "2 items are not in A" in out and "newer" in out
    same = evaluation.compare(tmp_path / "b", tmp_path / "b")
    assert [[r["difference"], r["ci"], r["only_a"], r["only_b"]] for r in same["rows"]] == [[0, [0, 0], 0, 0]] * 4


def test_a_comparison_of_other_items_is_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"settings": {}}, sample("1", 1)])
    for rows, word in (([sample("1", 1, clip="z")], "other data"), ([sample("2", 1)], "no item is in both"),
                       ([{"id": "1"}], "b.jsonl:2: not a line")):
        write_rows(tmp_path / "b.jsonl", [{"settings": {}}, *rows])
        with pytest.raises(UserError, match=word):
            evaluation.compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_held_out_loss_is_the_mean_over_answer_tokens_only(world):
    rows = [mcq("A", clip="a.mp4"), grounding(1.0, 2.0, clip="b.mp4"), mcq("A", clip="gone.mp4")]
    loss, table = evaluation.held_out_loss(world.model, world.processor, rows, world.root, batch_size=2)
    total, count = 0.0, 0
    for row in rows[:2]:
        sample = world.processor.encode(row["messages"], world.root)
        with torch.no_grad():
            hidden = world.model(**iv3.collate([sample], 0))
            logp = torch.log_softmax(world.model.logits(hidden)[0], -1)
        for t in sample.answer.nonzero()[:, 0].tolist():
            total, count = total - float(logp[t - 1, sample.ids[t]]), count + 1
    assert loss == pytest.approx(total / count, rel=1e-4)
    assert table[:, 1].sum() == count and table[2].tolist() == [0, 0]
    low, high = evaluation.interval(table, [evaluation.clip_of(row) for row in rows])
    assert low <= loss <= high


def test_evaluate_reports_scores_baselines_and_what_they_were_made_with(world):
    caption = {"id": "c", "task": "caption", "messages": mcq("A")["messages"]}
    rows = [mcq("A", clip="a.mp4"), mcq("B", clip="b.mp4"), grounding(1.0, 2.0, clip="a.mp4"), caption]
    data = write_rows(world.root / "all.jsonl", rows)
    result = evaluation.evaluate(world.model, world.processor, data, train_file=data, max_new=4, blind=True)
    assert (result["mcq"]["acc_n"], result["grounding"]["miou_n"], result["loss"]["loss_n"]) == (2, 1, 1)
    assert {"chance", "prior letter", "prior word", "blind"} == set(result["baselines"]["mcq_all"])
    meta = result["meta"]
    assert meta["frames_per_sample"] == 12 and meta["config"]["hidden"] == 128 and meta["seed"] == 0
    other = evaluation.evaluate(world.model, world.processor, write_rows(world.root / "one.jsonl", rows[:1]), max_new=4)
    assert len(meta["prompt_hash"]) == 12 and other["meta"]["prompt_hash"] != meta["prompt_hash"]
    assert {"mcq", "mcq_n", "mcq_ci", "miou", "r1_50_ci", "width"} <= set(evaluation.stage_figures(result))
    assert "counted wrong" in evaluation.render_scores(result)


# ---- a task of one's own ---------------------------------------------------------------------------------------------

def counting(n, clip="a.mp4"):
    row = grounding(1.0, 2.0, clip=clip)
    return {**row, "id": f"count-{clip}-{n}", "task": "counting", "kind": "count", "answer": n}


def counting_task():
    """The answer is a number; one that is off by one is worth 1/2, by two 1/3. Right is what is exact."""
    def parse(text, row):
        found = re.findall(r"\d+", evaluation.final_text(text))
        return int(found[-1]) if found else None

    def reward(text, row):
        n = parse(text, row)
        return 0.0 if n is None else 1 / (1 + abs(n - row["answer"]))

    def score(texts, rows, seed=0):
        values = [reward(text, row) for text, row in zip(texts, rows)]
        unparsed = sum(text is not None and parse(text, row) is None for text, row in zip(texts, rows))
        return {**evaluation.figure("near", values, rows, seed), "kinds": evaluation.by_kind(values, rows),
                "missing": texts.count(None), "unparsed": unparsed}

    def strategies(test, train, root, train_root):
        return {"always 2": np.array([reward("2", row) for row in test])}

    def rules(row):
        yield isinstance(row.get("answer"), int), "field 'answer' must be a number"

    return evaluation.Task(parse=parse, reward=reward, correct=lambda text, row: float(reward(text, row) == 1),
                           score=score, strategies=strategies, rules=rules,
                           figures=(evaluation.Figure("near", "count", "count"),))


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.setattr(evaluation, "TASKS", dict(evaluation.TASKS))
    monkeypatch.setattr(iv3, "TASK_RULES", dict(iv3.TASK_RULES))
    evaluation.add_task("counting", counting_task())


def test_one_entry_makes_a_task(tasks):
    row = counting(3)
    answers = ("3", "I see 4.", "none", None)
    assert [evaluation.reward(text, row) for text in answers] == [1, 0.5, 0, 0]
    assert [evaluation.correct(text, row) for text in answers] == [1, 0, 0, 0]
    assert [evaluation.well_formed(text, row) for text in answers] == [True, True, False, False]
    result = evaluation.baselines([row, counting(2), mcq("B")], [])
    assert result["count"] == pytest.approx(0.75) and result["count_name"] == "always 2" and result["mcq"] == 0.25
    rules = iv3.TASK_RULES["mcq"]
    evaluation.add_task("mcq", evaluation.TASKS["mcq"])                        # it brings no rules: ours stay
    assert iv3.TASK_RULES["mcq"] is rules


def test_a_task_of_ones_own_is_scored_by_the_command(tasks, world, monkeypatch, capsys):
    rows = [counting(3), counting(4, "b.mp4"), counting(9, "gone.mp4"), mcq("A")]
    data = write_rows(world.root / "counting.jsonl", rows)
    monkeypatch.setattr(iv3, "generate", lambda model, samples, stop, max_new: [
        iv3.Generation(ids=world.processor.tokenizer.encode("3 (A)")) for _ in samples])
    run = ["--data", data, "--model", world.root / "model", "--out", world.root / "counted"]
    command(monkeypatch, run)
    result, out = json.loads((world.root / "counted/summary.json").read_text()), capsys.readouterr().out
    assert result["counting"]["near"] == pytest.approx((1 + 0.5 + 0) / 3) and result["counting"]["missing"] == 1
    assert result["baselines"]["count"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 8) / 3)        # 3, 4 and 9 are not 2
    assert sorted(result["items"].values()) == [0, 0.5, 1, 1] and result["mcq"]["acc"] == 1
    assert evaluation.stage_figures(result)["count_n"] == 3
    assert "| near " in out and ".32" in out and "always 2" in out and "counting counted wrong: 0 unparsed, 1" in out
    samples = {line.get("id"): line for line in records_of(world.root / "counted/samples.jsonl")}
    assert samples["count-b.mp4-4"]["prediction"] == 3 and samples["count-b.mp4-4"]["reward"] == 0.5
    write_rows(world.root / "counting.jsonl", [rows[0], counting("three")])
    with pytest.raises(SystemExit):
        command(monkeypatch, run)
    assert "counting.jsonl:2: field 'answer' must be a number" in capsys.readouterr().err


# ---- rows and the agent -------------------------------------------------------------------------------------------

def test_a_limit_is_a_seeded_sample_in_file_order():
    picked = evaluation.pick_rows(list(range(100)), 10, seed=1)
    assert picked == evaluation.pick_rows(list(range(100)), 10, seed=1) == sorted(picked) and len(set(picked)) == 10
    assert picked != list(range(10)) and evaluation.pick_rows([1, 2], 5) == [1, 2]


def test_the_agent_and_the_direct_answer_get_the_same_frames(world, monkeypatch):
    asked, prompts = [], []

    def run_agent(live, video, question, options, budget, facts, without):
        if Path(video).name == "gone.mp4":
            raise iv3.MediaError(f"{video}: no such file")
        asked.append((Path(video).name, question, options, budget.frames, facts))
        answer, evidence = ("blue (B)", [(1.0, 2.5)]) if Path(video).name == "a.mp4" else ("red (A)", [(0.0, 6.0)])
        first = {"text": "red (A)" if answer == "blue (B)" else "blue (B)"}
        first = {"record": "step", "action": "answer", "arguments": first}
        trace = [{"record": "start"}, {**first, "action": "view"}, first]
        return SimpleNamespace(answer=answer, evidence=evidence, budget_exhausted="calls", frames=8, tokens=9,
                               trace=trace)

    def answer_rows(model, processor, rows, *args, **kwargs):
        prompts.extend(rows)
        return ["red (A)", "blue (B)", None, "blue (B)"]

    monkeypatch.setattr(mcr_agent, "run_agent", run_agent)
    monkeypatch.setattr(evaluation, "answer_rows", answer_rows)
    rows = [agent_test("a.mp4", "brief", facts="facts/test"), agent_test("b.mp4", "fact"),
            agent_test("gone.mp4", "speech"), agent_test("a.mp4", "colour", unseen=False)]
    rows[3]["messages"].insert(0, {"role": "system", "content": "You are a video agent."})
    result = evaluation.evaluate_agent(world.model, world.processor, rows, world.root)
    assert asked[0] == ("a.mp4", QUESTION, OPTIONS, 8, world.root / "facts/test")
    assert [evaluation.media_items(row)[0]["max_frames"] for row in prompts] == [8] * 4
    assert [m["role"] for m in prompts[3]["messages"]] == ["user", "assistant"]
    unseen, seen = result["unseen"], result["seen"]
    assert (unseen["direct"], unseen["agentic"], unseen["agentic_n"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 3)
    assert unseen["evidence_hit"] == pytest.approx(1 / 3) and (unseen["forced"], unseen["missing"]) == (2, 1)
    assert unseen["kinds"]["agentic"]["brief"] == {"value": 1.0, "n": 1} and seen["agentic"] == 1
    assert unseen["evidence_overlap"] == pytest.approx(2 / 3) and seen["evidence_overlap"] == 1     # IoU 1/1.5, 1/6
    assert [(g["mended"], g["broken"]) for g in (unseen, seen)] == [(1, 1), (1, 0)]


def test_the_command_ablates_the_agent(world, monkeypatch, capsys):
    data = write_rows(world.root / "agent.jsonl", [agent_test("a.mp4", "brief")])
    left_out = []

    def run_agent(*args, **how):
        left_out.append(list(how["without"]))
        if len(left_out) == 4:
            raise KeyboardInterrupt
        answer = "blue (B)" if not how["without"] else "red (A)"
        return SimpleNamespace(answer=answer, evidence=[], budget_exhausted="", frames=8, tokens=9, trace=[])
    monkeypatch.setattr(mcr_agent, "run_agent", run_agent)
    monkeypatch.setattr(evaluation, "answer_rows", lambda *_, **__: ["red (A)"])
    run, out = ["--data", data, "--model", world.root / "model", "--agent", "--ablate"], world.root / "ablate"
    with pytest.raises(SystemExit):                                    # killed in the pass without verification
        command(monkeypatch, [*run, "--out", out])
    command(monkeypatch, [*run, "--out", out, "--resume"])
    assert left_out == [[], ["memory"], ["routing"], ["verification"], ["verification"], ["zoom"]]
    result, shown = json.loads((out / "summary.json").read_text()), capsys.readouterr().out
    assert list(result["ablations"]) == ["no memory", "no routing", "no verification", "no zoom"]
    assert [block["unseen"]["agentic"] for block in result["ablations"].values()] == [0.0] * 4
    assert shown.count("\n| no ") == 4 and "\n| brief" in shown
    assert (result["agent"]["unseen"]["agentic_n"], result["agent"]["unseen"]["agentic"]) == (1, 1.0)
    sides = [evaluation.compared(f"{out / 'samples.jsonl'}{name}") for name in ("", ":agent no zoom")]
    assert [[x["reward"] for x in side.values()] for side in sides] == [[1.0], [0.0]]


def test_rollouts_abreast_leave_the_records_of_those_alone(world, monkeypatch):
    """Three at a time, killed in the sixth of seven rows, and gone on with: the same samples, in any number abreast."""
    rows = [agent_test("ab"[i % 2] + ".mp4", f"k{i}") for i in range(6)]
    rows.insert(2, agent_test("gone.mp4", "brief"))
    data = write_rows(world.root / "abreast.jsonl", rows)
    run = ["--data", data, "--model", world.root / "model", "--agent", "--max-new", 2]
    run_agent, seconds, stop = mcr_agent.run_agent, [], []
    read_step, steps = mcr_agent.read_step, []
    monkeypatch.setattr(mcr_agent, "read_step", lambda *args: steps.append(len(args[2])) or read_step(*args))

    def budget_of_row(row):
        tokens = 1000 + 100 * rows.index(row)                          # every row has room of its own
        return {"budget": mcr_agent.Budget(calls=1, frames=8, coarse=4, turn=3 + rows.index(row), tokens=tokens)}

    def counted(*args, **how):
        seconds.append(how["budget"].seconds)
        if len(seconds) in stop:
            raise KeyboardInterrupt
        return run_agent(*args, **how)
    monkeypatch.setattr(evaluation, "budget_of_row", budget_of_row)
    monkeypatch.setattr(mcr_agent, "run_agent", counted)
    monkeypatch.setattr(mcr_agent, "FORCED_TOKENS", 6)

    command(monkeypatch, [*run, "--abreast", 1, "--out", world.root / "alone"])
    alone = records_of(world.root / "alone/samples.jsonl", "ms")
    assert len(alone) == 1 + 2 * 7 and seconds == [300] * 7 and steps == []
    assert [x["text"] for x in alone if x.get("first", "") is None] == [None]

    seconds.clear()
    stop.append(6)
    out = ["--abreast", 3, "--out", world.root / "abreast"]
    with pytest.raises(SystemExit):
        command(monkeypatch, [*run, *out])
    assert seconds == [900] * 6                                        # the clock shows what all three take
    done = [x for x in records_of(world.root / "abreast/samples.jsonl") if x.get("first")]
    stop.clear()
    command(monkeypatch, [*run, *out, "--resume"])
    assert max(steps) == 3
    assert 1 < len(done) < 6 and len(seconds) == 6 + 7 - len(done)
    assert records_of(world.root / "abreast/samples.jsonl", "ms") == alone

    seconds.clear()
    monkeypatch.setattr(mcr_agent, "SHARED_TOKENS", 3300)              # the largest has 1600: two at a time
    command(monkeypatch, [*run, "--abreast", 3, "--out", world.root / "two"])
    assert seconds == [600] * 7 and records_of(world.root / "two/samples.jsonl", "ms") == alone


def test_agent_takes_agent_rows(world):
    with pytest.raises(UserError, match="task 'mcq'"):
        evaluation.evaluate_agent(world.model, world.processor, [mcq("A")], world.root)


# ---- the command --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, word", [
    ("", "--data"), ("--data nowhere.jsonl", "nowhere.jsonl"), ("--data x.jsonl --compare a b", "either"),
    ("--data x.jsonl --limit 0", "--limit"), ("--data x.jsonl --agent --abreast 0", "--abreast"),
    ("--data x.jsonl --json nowhere/x.json", "--json"),
    ("--data {root}/mcq.jsonl --agent", "mcr rows"), ("--data x.jsonl --model nowhere", "nowhere"),
    ("--compare nowhere x", "nowhere/samples.jsonl"), ("--data x.jsonl --resume", "--resume"),
    ("--compare a b --out x", "--out")])
def test_a_mistake_is_one_line_and_exit_2(arguments, word, world, monkeypatch, capsys):
    write_rows(world.root / "mcq.jsonl", [mcq("A")])
    model = [] if "--model" in arguments or not arguments else ["--model", str(world.root / "model")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments.format(root=world.root).split(), *model])
    with pytest.raises(SystemExit) as stop:
        iv3.run_cli(evaluation.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and word in error


def test_the_command_scores_a_file(world):
    data = write_rows(world.root / "cli.jsonl", [mcq("A", clip="a.mp4"), grounding(1.0, 2.0, clip="gone.mp4")])
    command = [sys.executable, str(ROOT / "eval.py"), "--data", data, "--model", str(world.root / "model"),
               "--max-new", "4", "--json", str(world.root / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "miou" in done.stdout and "1 missing" in done.stdout
    assert json.loads((world.root / "out.json").read_text())["grounding"]["missing"] == 1
