"""data/curate/prepare.py: questions from captions alone are right about the world that was captioned."""
import importlib.util
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from iv3 import UserError, load_rows, run_cli

ROOT = Path(__file__).parents[1]


def load(name):
    own = f"{name}_prepare_of_curate"                 # test_toy has a module of the same file, by another name
    spec = importlib.util.spec_from_file_location(own, ROOT / "data" / name / "prepare.py")
    module = sys.modules[own] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy, curate = load("toy"), load("curate")
CLIPS = {"a.mp4": "short", "b.mp4": "long", "deep/c.mp4": "short"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of videos and, by file name, what happens in them."""
    folder, clips = tmp_path_factory.mktemp("world"), {}
    (folder / "deep").mkdir()
    for i, (name, length) in enumerate(CLIPS.items()):
        rng = np.random.default_rng([7, i])
        clips[name] = clip = toy.script(rng, name, length)
        cuts = [s.start for s in clip.scenes]  # find_scenes may take the edge of a flash beside a cut for the cut
        clip.flashes = {t: c for t, c in clip.flashes.items() if min(abs(t + 0.5 - cut) for cut in cuts) > 1.5}
        toy.write_clip(folder, clips[name], rng, 32)
    return folder, clips


class Script:
    """The captioner of the tests: what the script has in the middle of a clip. Dies before `die` is captioned."""

    def __init__(self, world, die=None):
        (self.folder, self.clips), self.die, self.seen = world, die, []

    def __call__(self, video, start, end):
        name = video.relative_to(self.folder.resolve()).as_posix()
        if name == self.die:
            raise KeyboardInterrupt
        self.seen.append(name)
        return toy.tell("scene", **asdict(self.clips[name].scene((start + end) / 2)))


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    curate.curate(world[0], out, Script(world), {"by": "script"})
    return out, load_rows(out / "curated.jsonl")


def files(out):
    return {f.relative_to(out).as_posix(): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


def name_of(row):
    return re.fullmatch(r"curated-(.+)-\d+", row["id"])[1]


def question(row):
    return row["messages"][0]["content"][1]["text"].rpartition("\n")[2]


def test_a_limit_keeps_to_the_first_videos(world, tmp_path):
    script = Script(world)
    curate.curate(world[0], tmp_path, script, {}, limit=1)
    assert {row["clip"] for row in load_rows(tmp_path / "curated.jsonl")} == {os.path.relpath(
        world[0] / min(script.clips), tmp_path)} and set(script.seen) == {min(script.clips)}


def test_rows_fit_the_schema_and_find_their_video(world, made):
    out, rows = made
    assert len({row["id"] for row in rows}) == len(rows) and {name_of(row) for row in rows} == set(CLIPS)
    for row in rows:
        video = row["messages"][0]["content"][0]["video"]
        assert video == row["clip"] and (out / video).samefile(world[0] / name_of(row))
        assert row["duration"] == world[1][name_of(row)].duration
        if row["task"] == "mcq":
            assert row["messages"][1]["content"] == row["options"]["ABCD".index(row["answer"])]
            assert len(set(row["options"])) == len(row["options"])
    families = [row["family"] for row in rows if name_of(row) == "b.mp4"]
    assert [families.count(family) for family in curate.FAMILIES] == [6, 5, 3, 2]      # of 16, the paper's shares
    assert {row["kind"] for row in rows} == {kind for _, kinds in curate.FAMILIES.values() for kind in kinds}


def right(row, scenes):
    """Is the row's answer what the script's scenes say? Looks at nothing but the question, the answer, the options."""
    told = [toy.tell("scene", **asdict(s)) for s in scenes]
    asked, reply = question(row), row["messages"][1]["content"]
    named = [i for i, text in enumerate(told) if text in asked]
    if row["kind"] == "what":
        t = int(re.search(r"at (\d+) seconds", asked)[1])
        return next(text for s, text in zip(scenes, told) if s.start <= t < s.end) == reply
    if row["kind"] == "when":
        s = scenes[named[0]]
        span = [float(x) for x in re.findall(r"[\d.]+\d", reply)]
        return all(abs(x - y) <= 0.5 for x, y in zip([*row["answer"], *span], [s.start, s.end] * 2))
    if row["kind"] in ("after", "before"):
        return told[named[0] + (1 if row["kind"] == "after" else -1)] == reply
    if row["kind"] == "first":
        return min(row["options"], key=told.index) == reply
    if row["kind"] == "longest":
        length = {text: s.end - s.start for s, text in zip(scenes, told)}
        return sum(length[option] >= length[reply] for option in row["options"]) == 1
    if row["kind"] == "count":
        word = re.search('"(.+)"', asked)[1]
        return str(sum(word in text.split() for text in told)) == reply
    parts = re.findall(r"([\d.]+) to ([\d.]+): (.+?)\.(?= |$)", reply)
    return [text for *_, text in parts] == told and all(
        abs(float(a) - s.start) <= 0.5 and abs(float(b) - s.end) <= 0.5 for (a, b, _), s in zip(parts, scenes))


def test_every_answer_is_right_by_the_script(world, tmp_path):
    """All questions that there are to ask, not only the share that is drawn."""
    curate.curate(world[0], tmp_path, Script(world), {}, questions=1000)
    rows = load_rows(tmp_path / "curated.jsonl")
    assert len(rows) > 150
    wrong = [row for row in rows if not right(row, world[1][name_of(row)].scenes)]
    assert not wrong, f"{len(wrong)} of {len(rows)}: {wrong[0]}"
    for row in rows:                                      # wrong options are of the video
        if row["task"] == "mcq" and row["kind"] != "count":
            assert set(row["options"]) <= {toy.tell("scene", **asdict(s)) for s in world[1][name_of(row)].scenes}


def test_scenes_begin_and_end_at_the_true_cuts(world, made):
    stories = json.loads((made[0] / "narratives.json").read_text())
    for name, clip in world[1].items():
        found = stories[name]["scenes"]
        assert len(found) == len(clip.scenes)
        for (start, end, _), scene in zip(found, clip.scenes):
            assert abs(start - scene.start) <= 0.5 and abs(end - scene.end) <= 0.5


def test_a_killed_run_goes_on_and_the_seed_decides(world, made, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        curate.curate(world[0], tmp_path, Script(world, die="b.mp4"), {"by": "script"})
    assert list(files(tmp_path)) == ["captions/a.mp4.json"]
    second = Script(world)
    curate.curate(world[0], tmp_path, second, {"by": "script"})
    assert set(second.seen) == {"b.mp4", "deep/c.mp4"}                  # a.mp4 is not captioned again
    assert files(tmp_path) == files(made[0])
    third = Script(world)
    curate.curate(world[0], tmp_path, third, {"by": "script"}, seed=1)
    assert not third.seen and load_rows(tmp_path / "curated.jsonl") != made[1]
    with pytest.raises(UserError, match="a.mp4.json: captions of another"):
        curate.curate(world[0], tmp_path, third, {"by": "another"})


def test_what_cannot_be_read_is_skipped_and_named(world, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((world[0] / "a.mp4").read_bytes())
    (folder / "broken.mp4").write_bytes(b"no video" * 99)
    (folder / "notes.txt").write_text("not a video")
    curate.curate(folder, tmp_path / "out", Script((folder, world[1])), {})
    said = capsys.readouterr().out
    assert "broken.mp4: skipped, " in said and "of 1 videos, 1 skipped" in said and "notes" not in said
    assert {name_of(row) for row in load_rows(tmp_path / "out" / "curated.jsonl")} == {"a.mp4"}


@pytest.mark.parametrize("videos, problem", [([], "no such folder, or no videos"), (["broken.mp4"], "no questions")])
def test_a_folder_without_videos_is_one_line(videos, problem, tmp_path, capsys, monkeypatch):
    for name in videos:
        (tmp_path / name).write_bytes(b"no video")
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path), "--out", str(tmp_path / "out"), "--model",
                                      str(ROOT / "data" / "toy" / "weights" / "base")])
    with pytest.raises(SystemExit) as stop:
        run_cli(curate.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith(f"error: {tmp_path}: {problem}")
    assert not (tmp_path / "out").exists()


def test_clips_of_a_long_scene_become_one_again(world, made, tmp_path):
    script = Script(world)
    curate.curate(world[0], tmp_path, script, {}, longest=1.5)
    assert len(script.seen) > sum(clip.duration for clip in world[1].values()) / 1.5
    assert files(tmp_path)["narratives.json"] == files(made[0])["narratives.json"]


def test_any_wording_and_repeated_or_missing_captions():
    texts = ["A man walks a dog.", "Rain falls on an empty street", "", "a man WALKS a dog",
             "Two boats leave a harbour", "Two boats leave a harbour with a red flag", "a cook cuts onions"]
    clips = [[5.0 * i, 5.0 * i + 5, text] for i, text in enumerate(texts)]
    scenes = curate.merge(clips, 0.85)
    assert [s.text for s in scenes] == [*texts[:4], *texts[5:]] and (scenes[4].start, scenes[4].end) == (20, 30)
    rows = list(curate.ask("v.mp4", scenes, np.random.default_rng(0), 1000, 0.85))
    asked = {kind: [(question(row), row["messages"][1]["content"]) for row in rows if row["kind"] == kind]
             for kinds in curate.FAMILIES.values() for kind in kinds[1]}
    # what is shown twice names no moment, and nothing is known of what stands beside silence
    assert asked["when"] and not any("man" in text.lower() for text, _ in asked["when"] + asked["after"])
    assert all("Rain" not in text for text, _ in asked["after"])
    assert ('How many scenes can be described with "man"?', "2") in asked["count"]
    for row in rows:
        options = row.get("options", [])
        assert "" not in options and sum("dog" in option.lower() for option in options) <= 1
        assert '"with"' not in question(row)


def test_the_shipped_model_captions(world):
    caption = curate.model_captioner(ROOT / "data" / "toy" / "weights" / "base", curate.caption_prompt("toy"))
    clip = world[1]["a.mp4"]
    told = [(caption(world[0] / "a.mp4", s.start, s.end), toy.tell("scene", **asdict(s))) for s in clip.scenes[:5]]
    assert np.mean([said.startswith(true) for said, true in told]) > 0.7, told
