"""data/toy/prepare.py: the same seed gives the same world, and what the rows say is what the pixels show."""
import functools
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "data" / "toy" / "prepare.py"
spec = importlib.util.spec_from_file_location("toy_prepare", SCRIPT)
toy = sys.modules["toy_prepare"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
SIZES = dict(scale=0.02, pretrain=5)  # and one wide clip
SPECIAL = re.compile(r"<\|[a-z_]+\|>|</?(?:tool_call|tool_response|think)>")
NAMED = re.compile(r"(\w+) (\w+) moving (\w+) on (\w+)(?: with a (\w+) flash)?")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    toy.prepare(out, seed=0, jobs=2, **SIZES)
    return out


@pytest.fixture(scope="module")
def rows(world):
    return {f.stem: [json.loads(line) for line in f.open()] for f in sorted(world.glob("*.jsonl"))}


def every(rows):
    return [row for part in rows.values() for row in part]


@functools.cache
def frames(path):
    """-> times (F,), pixels (F, 32, 32, 3)"""
    with av.open(str(path)) as file:
        found = [(float(f.time), f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]
    return np.array([t for t, _ in found]), np.stack([f for _, f in found]).astype(int)


def question(row):
    content = next(m for m in row["messages"] if m["role"] == "user")["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def texts(row):
    for message in row["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        yield from (part["text"] for part in parts if part["type"] == "text")


def nearest(pixels, palette):
    """The name of the colour that most pixels of (N, 3) are close to; far ones have no vote."""
    far = np.abs(pixels[:, None] - np.array(list(palette.values()))).max(-1)
    votes = Counter(np.where(far.min(1) < 45, far.argmin(1), -1).tolist())
    votes.pop(-1, None)
    return list(palette)[votes.most_common(1)[0][0]] if votes else None


def sprite(frame, background):
    """Mask of the inner pixels that are neither background nor the border, where a flash would be."""
    mask = np.abs(frame - np.array(toy.BACKGROUNDS[background])).max(-1) > 45
    mask[:3], mask[-3:], mask[:, :3], mask[:, -3:] = False, False, False, False
    return mask


def border(frame):
    edge = np.ones((32, 32), bool)
    edge[2:-2, 2:-2] = False
    return frame[edge]


def captions(rows):
    """(path, [(start, end, colour, shape, direction, background, flash)]) from captions of whole clips."""
    for row in every(rows):
        if row["kind"] == "caption" and "start" not in row["messages"][0]["content"][0]:
            found = re.findall(r"([\d.]+) to ([\d.]+): ([^.]+)\.", row["answer"])
            yield row["clip"], [(float(a), float(b), *NAMED.fullmatch(what).groups()) for a, b, what in found]


# ---- determinism, splits, folder ----
def files(out):
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


def test_same_seed_same_bytes_whatever_jobs(world, tmp_path):
    toy.prepare(tmp_path / "same", seed=0, jobs=1, **SIZES)
    assert files(world) == files(tmp_path / "same")
    toy.prepare(tmp_path / "other", seed=1, jobs=2, scale=0.01)
    a, b = files(world), files(tmp_path / "other")
    assert all(a[name] != b[name] for name in ("clips/test/00000.mp4", "test_short.jsonl"))


def test_splits_share_no_clip_and_facts_are_not_to_be_remembered(world, rows):
    owner = {}
    for name, part in rows.items():
        for row in part:
            if "clip" in row:
                same = {"glimpses": "pretrain", "near": "pretrain", "test_short": "test", "test_long": "test",
                        "test_agent": "test", "opd": "rl", "sft_agent": "sft_long"}
                group = same.get(name, name)
                assert owner.setdefault(row["clip"], group) == group
    drawn = [f.read_bytes() for f in world.rglob("*.mp4")]
    assert len(set(drawn)) == len(drawn) == len(owner)
    facts = {f.name: f.read_text() for f in world.glob("facts/*.txt")}
    fact = r"The red circle eats \w+\. The red circle lives in a \w+\.\n"
    assert len(facts) == 48 and re.fullmatch(fact, facts["red_circle.txt"])
    rng = np.random.default_rng(3)
    clip, eats = toy.script(rng, "clip.mp4", "long"), {}
    for i in range(10):                                  # in training each rollout has its own: nothing to remember
        for row in toy.Asker(rng, clip, i, None).agent(["fact"]):
            for eater, food in re.findall(r"\] The (\w+ \w+) eats (\w+)\.", " ".join(texts(row))):
                assert row["options"]["ABCD".index(row["answer"])] == food
                eats.setdefault(eater, set()).add(food)
    assert len(eats) > 1 and sum(map(len, eats.values())) > 2 * len(eats)


def test_finished_folder_is_left_alone_and_other_settings_are_refused(world, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in world.rglob("*")}
    assert toy.prepare(world, seed=0, jobs=2, **SIZES) == json.loads((world / "done.json").read_text())
    assert before == {f: f.stat().st_mtime_ns for f in world.rglob("*")}

    def command(*flags):
        return subprocess.run([sys.executable, SCRIPT, *map(str, flags)], capture_output=True, text=True)

    refused = command("--out", world, "--seed", 5)
    assert refused.returncode == 2 and re.fullmatch(r"error: .* delete the folder\n", refused.stderr)
    assert command("--out", tmp_path / "new", "--scale", -1).returncode == 2
    assert not (tmp_path / "new").exists()


def test_larger_frames_show_the_same_scenes():
    """--side 64: averaged over 2×2 pixels, a clip is the clip of side 32, but for noise and the shape's edge."""
    clip = toy.script(np.random.default_rng(5), "x.mp4", "short")
    small, large = (toy.draw_clip(np.random.default_rng(6), clip, side) for side in (32, 64))
    assert large.shape == (len(small), 64, 64, 3) and clip.flashes
    averaged = large.reshape(len(small), 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(averaged - small).mean() < 0.5 < np.abs(np.roll(averaged, 1, 1) - small).mean()
    with pytest.raises(toy.SettingsError, match="--side 48"):
        toy.prepare("unused", side=48)


def test_interrupted_run_goes_on(world, tmp_path, monkeypatch):
    sizes = dict(seed=0, scale=0.005, pretrain=0, jobs=1)
    toy.prepare(tmp_path / "whole", **sizes)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the clips, before the rows
        patch.setattr(toy, "pieces", stop)
        with pytest.raises(KeyboardInterrupt):
            toy.prepare(tmp_path / "cut", **sizes)
    assert not (tmp_path / "cut/done.json").exists()
    (tmp_path / "cut/clips/test/00001.mp4").unlink()
    kept = (tmp_path / "cut/clips/test/00000.mp4").stat().st_mtime_ns
    with pytest.raises(toy.SettingsError, match="other settings"):
        toy.prepare(tmp_path / "cut", **sizes | {"seed": 1})
    toy.prepare(tmp_path / "cut", **sizes)
    assert (tmp_path / "cut/clips/test/00000.mp4").stat().st_mtime_ns == kept
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


# ---- rows ----
def test_schema(world, rows):
    assert set(rows) == {"pretrain", "glimpses", "near", "wide", "cpt_text", "cpt_image", "cpt_video", "sft_short",
                         "sft_long", "sft_agent", "sft_plan", "rl", "opd", "val", "test_short", "test_long",
                         "test_agent"}
    all_rows = every(rows)
    assert len({r["id"] for r in all_rows}) == len(all_rows)
    for row in all_rows:
        assert row["task"] in ("text", "caption", "mcq", "grounding", "mcr") and row["kind"]
        assert row["messages"][-1]["role"] == "assistant" and isinstance(row["messages"][-1]["content"], str)
        for message in row["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                assert part["type"] == "text" or (world / part[part["type"]]).is_file()
        if row["task"] == "mcq":
            reply = row["options"]["ABCD".index(row["answer"])]
            said = row["messages"][-1]["content"]
            if row["kind"] == "direction":
                moves, said = said.rsplit(" moving ", 1)
                assert tuple(moves.split(" ")) in toy.PAIRS
            assert said == reply and len(set(row["options"])) == 4
            assert question(row).split("\n")[1:-1] == [*map("{}. {}".format, "ABCD", row["options"])]
        if row["task"] == "grounding":
            assert 0 <= row["answer"][0] < row["answer"][1] <= row["duration"]
    in_clips = [r for r in rows["pretrain"] if "clip" in r]
    windows = {(r["clip"], json.dumps(r["messages"][0]["content"][0])) for r in in_clips}
    assert len(windows) == SIZES["pretrain"]  # all rows of a clip share one window
    late = [r["messages"][0]["content"][0] for r in rows["wide"]]
    assert len({v["start"] for v in late}) == 3 and all(12 <= v["end"] - v["start"] <= 24 for v in late)


def test_letters_are_balanced_and_options_come_from_the_clip(rows):
    each = {}  # every kind by itself, over the scripts of more clips than the fixture draws
    for i in range(48):
        rng = np.random.default_rng([9, i])
        ask = toy.Asker(rng, toy.script(rng, "clip.mp4", "long"), i, toy.draw_facts(rng))
        for row in [row for part in toy.rows_of("long", ask, i) for row in part if "options" in row]:
            each.setdefault(row["kind"], Counter())[row["answer"]] += 1
    assert len(each) == 9
    for letters in each.values():
        assert len(letters) == 4 and max(letters.values()) <= 1.15 * min(letters.values()), each
    for path, scenes in captions(rows):
        in_clip = {"colour": {s[2] for s in scenes}, "shape": {f"a {s[3]}" for s in scenes}}
        for row in every(rows):
            if row.get("clip") == path and row["task"] == "mcq" and row["kind"] in in_clip:
                known = in_clip[row["kind"]]
                assert len(known & set(row["options"])) == min(4, len(known))


def test_every_text_is_in_the_vocabulary(world, rows):
    pieces = set(json.loads((world / "vocab.json").read_text()))
    assert pieces == set(toy.pieces())
    pieces.add("a")  # of "a ring": the tokenizer has every byte
    longest = max(map(len, pieces))

    def tokens(text):
        found = []
        for part in SPECIAL.split(text):
            while part:
                piece = next((part[:n] for n in range(longest, 0, -1) if part[:n] in pieces), None)
                assert piece, part[:20]
                found.append(piece)
                part = part[len(piece):]
        return found

    for row in every(rows):
        for text in texts(row):
            if not text.startswith(("error: ", "contradict: ")):  # the environment's words, read as bytes
                tokens(text)
    asked = [len(tokens(question(r))) for r in every(rows) if r["task"] == "mcq"]
    assert sum(asked) / len(asked) < 40
    assert len(tokens("<12.2 seconds>")) == 2 and len(tokens("<|im_start|>user\n")) == 1


# ---- what the pixels show ----
def test_captions_agree_with_the_pixels(world, rows):
    checked = wrong = 0
    for path, scenes in captions(rows):
        times, pixels = frames(world / path)
        assert np.allclose(times, np.arange(len(times)) / 4) and len(times) == 4 * scenes[-1][1]
        for start, end, colour, _, direction, background, flash in scenes:
            shown = pixels[int(start * 4):int(end * 4)]
            votes = Counter(nearest(f[sprite(f, background)], toy.COLOURS) for f in shown)
            flashed = [f for f in shown if nearest(border(f), toy.FLASHES) == flash] if flash else []
            checked += 1
            wrong += votes.most_common(1)[0][0] != colour
            assert len(flashed) in ((4, 5, 6) if flash else (0,)), (path, start, flash, len(flashed))
            # the sprite's motion: the shift that best maps a frame on the frame half a second later
            if not flash:
                axis, sign = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}[direction]
                a, b = shown[1], shown[3]
                move = {(d, s): min(np.abs(np.roll(a, s * n, d) - b).sum() for n in (5, 6, 7))
                        for d in (0, 1) for s in (-1, 1)}
                assert min(move, key=move.get) == (axis, sign)
    assert checked > 20 and wrong == 0


def test_shapes_can_be_told_apart_after_the_codec(world, rows):
    """Templates of each shape, in all sizes and places, are laid over the sprite: the best is the right."""
    y, x = np.mgrid[:32, :32] - 15.5
    places = [(s, r, dx, dy) for s in toy.SHAPES for r in (7, 7.5, 8, 8.5, 9)
              for dx in np.arange(-3, 4) / 2 for dy in np.arange(-6, 7) / 2]
    templates = np.array([toy.cover(s, x - dx, y - dy, r, 1).ravel() > 0.5 for s, r, dx, dy in places], int)
    right = total = 0
    for path, scenes in captions(rows):
        _, pixels = frames(world / path)
        for start, end, colour, shape, _, background, flash in scenes if len(scenes) < 20 else ():
            if flash:  # the border may hide a part
                continue
            frame = pixels[int((start + end) * 2)]
            two = toy.COLOURS[colour], toy.BACKGROUNDS[background]
            far = [np.abs(frame - np.array(c)).sum(-1) for c in two]
            mask = far[0] < far[1]
            turn = np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)  # the sprite's middle on the torus
            middle = [np.angle((mask.sum(1 - a) * turn).sum()) * 16 / np.pi % 32 for a in (0, 1)]
            mask = np.roll(mask, [round(16 - m) for m in middle], (0, 1)).reshape(-1)
            both = templates @ mask
            best = places[np.argmax(both / (templates.sum(1) + mask.sum() - both))][0]
            right, total = right + (best == shape), total + 1
    assert total > 20 and right >= 0.95 * total, (right, total)


def test_scenes_are_cut_where_grounding_says(world, rows):
    for row in [r for r in every(rows) if r["task"] == "grounding"][::7]:
        colour = re.match(r"When is the (\w+) ", question(row))[1]
        times, pixels = frames(world / row["clip"])
        steps = np.abs(np.diff(pixels, axis=0)).mean((1, 2, 3))  # at a cut the whole background changes
        cuts = times[1:][steps > 25]
        for cut in row["answer"]:
            assert cut in (0, row["duration"]) or cut in cuts
        at = int(row["answer"][0] * 4) + 2
        assert (np.abs(pixels[at] - np.array(toy.COLOURS[colour])).max(-1) < 45).sum() > 10


def test_plans_copy_the_time_of_their_question(rows):
    """A row is what a rollout begins with; all kinds are there, with times up to two minutes."""
    kinds, times = Counter(), []
    for row in rows["sft_plan"]:
        system, user, turn = (m["content"] for m in row["messages"])
        t, = {int(x) for x in re.findall(r"\d+", user.splitlines()[-1])[:1]}
        thought, called = turn.removeprefix("<think>").removesuffix("\n</tool_call>").split("</think>\n<tool_call>\n")
        called = json.loads(called)
        assert called == {"name": "asr" if "said" in user else "view", "arguments": {"start": t}}
        assert re.findall(r"\d+", thought) == [str(t)] and user.startswith("\nA. ")
        first = next(m["content"] for r in rows["sft_agent"] if r["kind"] != "verify"
                     for m in r["messages"] if m["role"] == "assistant" and m["content"].startswith(turn.split(":")[0]))
        assert re.sub(r"\d+", "0", first) == re.sub(r"\d+", "0", turn) and system == toy.TEXT["system"]
        kinds[thought.split(" ")[0]] += 1
        times.append(t)
    assert set(kinds) == {"fine-grained:", "speech:", "knowledge:", "temporal:"} and max(times) > 90


def test_agent_evidence(world, rows):
    """The coarse pass has no frame of `brief` and `fact` and one of the seen kinds; the rollout finds it."""
    srt, setbacks = {}, Counter()
    agent = [(n, r) for n in ("sft_short", "sft_agent", "test_agent") for r in rows[n] if r["task"] == "mcr"]
    for name, row in agent:
        if row["kind"] == "verify":
            video = row["messages"][0]["content"][0]
            if flash := re.search(r"between (\d+) and (\d+) seconds\? (\w+)", question(row)):
                _, pixels = frames(world / row["clip"])
                shown = range(max(video["start"], int(flash[1])), min(video["end"], int(flash[2])))
                seen = {nearest(border(pixels[t * 4 + 1]), toy.FLASHES) for t in shown} - {None}
                assert row["answer"] == ("unclear" if not seen else "support" if flash[3] in seen else "contradict")
            else:
                t = int(re.search(r"at (\d+) seconds", question(row))[1])
                assert (video["start"] <= t < video["end"]) == (row["answer"] != "unclear")
            continue
        video = next(m for m in row["messages"] if m["role"] == "user")["content"][0]
        assert video["max_frames"] == 24 and video["pairs"]
        (start, end), = row["evidence"]
        coarse = {t + d for t in toy.pair_times(row["duration"], 24) for d in (0, 0.5)}
        assert len(coarse) == 24 and max(coarse) < row["duration"]
        right = row["options"]["ABCD".index(row["answer"])]
        times, pixels = frames(world / row["clip"])
        if row["kind"] == "brief":
            assert not any(start <= t < end for t in coarse)
            assert nearest(border(pixels[start * 4 + 1]), toy.FLASHES) == right
            a, b = map(int, re.search(r"between (\d+) and (\d+)", question(row)).groups())
            assert a <= start and end <= b and b - a == 6
        elif row["kind"] == "speech":
            text = srt.setdefault(row["clip"], (world / row["clip"]).with_suffix(".srt").read_text())
            span = " --> ".join(f"00:{t // 60:02d}:{t % 60:02d},000" for t in (start, end))
            assert f"{span}\nthe word is {right}\n" in text
        elif row["kind"] == "fact":
            table = [f.read_text() for f in (world / row["facts"]).iterdir()] if name == "test_agent" else texts(row)
            assert any(f" eats {right}." in text for text in table)
            # no coarse frame within the scene: neither cut around the evidence has a coarse frame inside
            steps = np.abs(np.diff(pixels, axis=0)).mean((1, 2, 3))
            cuts = [0, *times[1:][steps > 25], row["duration"]]
            scene = max(c for c in cuts if c <= start), min(c for c in cuts if c >= end)
            flash = any(nearest(border(f), toy.FLASHES) for f in pixels[int(scene[0] * 4):int(scene[1] * 4)])
            assert flash or not any(scene[0] <= t < scene[1] for t in coarse)
        else:
            assert start in coarse or start + 0.5 in coarse
        assert row["unseen"] == (row["kind"] in ("brief", "speech", "fact"))
        said = "".join(m["content"] for m in row["messages"] if m["role"] == "assistant")
        calls = [json.loads(c) for c in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", said)]
        if name == "test_agent":
            assert row["frames"] == 48 and not calls
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        else:
            assert calls[-1]["name"] == "answer"
            assert calls[-1]["arguments"]["text"] == right
            (cited_start, cited_end), = calls[-1]["arguments"]["evidence"]             # holds the true evidence
            assert cited_start <= start and cited_end >= end
            tools, replies = [c["name"] for c in calls], [m["content"] for m in row["messages"] if m["role"] == "tool"]
            plain = {"speech": ["asr"], "fact": ["view", "web_search"]}
            if row["kind"] == "brief":                                                 # two seconds a look
                plain["brief"] = ["view"] * ((start - a) // 2 + 1)
            plain = [*plain.get(row["kind"], ["view"]), "answer"]
            failed, doubted = ([str(r)[:n] for r in replies].count(s) for s, n in (("error: ", 7), ("contradict", 10)))
            assert tools == plain[:1] * failed + plain * (1 + doubted) and failed + doubted < 2
            setbacks.update(failed=failed, doubted=doubted, all=1)
            if row["kind"] != "speech":
                looked = [c["arguments"]["start"] for c in calls if c["name"] == "view"][-1]
                assert looked <= start and end <= looked + 2
    assert all(0 < setbacks[s] < setbacks["all"] / 2 for s in ("failed", "doubted"))
    kinds = Counter(r["unseen"] for r in rows["test_agent"])
    assert kinds[True] == kinds[False] and set(srt)


def test_text_rows_hold_their_answer(rows):
    kinds = Counter()
    for row in rows["cpt_text"]:
        *told, asked = row["messages"][0]["content"].split("\n")
        kinds[row["kind"]] += 1
        if row["kind"] == "said":
            time = re.search(r"at (\d+) ", asked)[1]
            assert sum(f"{time}.0 to " in x and x.endswith(f" {row['answer']}") for x in told) == 1
        else:
            thing = re.search(r"the (\w+ \w+)", asked)[1]
            assert re.search(rf"The {thing} (eats|lives in a) {row['answer']}\.", told[0])
    assert set(kinds) == {"eats", "lives", "said"}


def test_srt_lines_parse(world):
    found = sorted(world.glob("clips/*/long_*.srt"))
    assert found and len(found) == len(list(world.glob("clips/*/long_*.mp4")))
    for path in found:
        blocks = path.read_text().strip().split("\n\n")
        line = r"\d+\n00:(\d\d):(\d\d),000 --> 00:(\d\d):(\d\d),000\nthe word is (\w+)"
        spans = [re.fullmatch(line, b) for b in blocks]
        assert 4 <= len(spans) <= 8 and all(spans) and len({m[5] for m in spans}) == len(spans)
        times = [(int(m[1]) * 60 + int(m[2]), int(m[3]) * 60 + int(m[4])) for m in spans]
        assert all(b - a == 2 for a, b in times)
        assert all(times[i][1] <= times[i + 1][0] for i in range(len(times) - 1))


def test_stills_are_readable(world, rows):
    for row in [r for r in every(rows) if r["kind"] == "image"]:
        colour, _, background = re.fullmatch(r"(\w+) (\w+) on (\w+)", row["answer"]).groups()
        with av.open(str(world / row["messages"][0]["content"][0]["image"])) as file:
            pixels = next(file.decode(video=0)).to_ndarray(format="rgb24").astype(int)
        assert nearest(pixels[sprite(pixels, background)], toy.COLOURS) == colour


def test_shipped_models_read_the_world():
    """The shipped base and teacher have exactly the vocabulary that the world's texts are made of."""
    for name in ("base", "teacher"):
        shipped = json.loads((SCRIPT.parent / "weights" / name / "vocab.json").read_text())
        assert sorted(shipped) == sorted(toy.pieces())
