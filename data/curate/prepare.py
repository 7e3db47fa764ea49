"""Questions about any folder of videos, made from captions of their scenes: the paper's long-video data (§4.2.1).

    python data/curate/prepare.py VIDEOS --out DIR                    # captions by the newest run's last stage
    python train.py --stage sft --phase long --data DIR/curated.jsonl --out runs/mine

Content-aware scene cuts → a caption of each clip → neighbours that show the same become one scene → a narrative, the
scenes in order with their times → questions in the paper's four families, at its shares. Rules ask, not a language
model: they compare and count the words of captions, whatever the wording, so that any captioner will do; an answer is
as right as the captions are. DIR gets captions/ (a file for each video), narratives.json and curated.jsonl, the rows.

A video's captions are kept as soon as it has all of them: a killed run goes on with the next video. The rows depend on
captions and --seed alone. A video that cannot be read is skipped and named.
"""
import argparse
import json
import math
import os
import sys
from collections import Counter, defaultdict
from functools import cache
from itertools import chain, islice, pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from iv3 import Config, MediaError, find_model, need, open_model, read_json, run_cli, write_atomic
from mcr_agent import LiveModel, alike, caption_clips, caption_prompt, captioner, merge, narrative, words

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".ts"}
FAMILIES = {  # share of the rows (§4.2.1), kinds
    "perception": (0.354, ["what"]),
    "spatial-temporal": (0.334, ["when", "first"]),
    "event": (0.181, ["after", "before"]),
    "holistic": (0.131, ["count", "longest", "story"])}
ASK = dict(
    what="What is shown at {t} seconds?",
    when="When is this shown: {text}?",
    first="Which of these is shown first?",
    after="What is shown right after this: {text}?",
    before="What is shown right before this: {text}?",
    count='How many scenes can be described with "{word}"?',
    longest="Which of these is shown for the longest time?",
    story="Describe the video.",
    span="From {a:.1f} to {b:.1f} seconds.")
EDGE = 0.5  # seconds that a cut may be off: no question asks about a moment that is closer to one
EMPTY = set("and are for from has his her its not one that the their them then there they this was with".split())


# ---- captions (clips, scenes and the narrative: as the agent's memory has them) ---------------------------
def model_captioner(directory, prompt):
    """caption(video, start, end) → text, by our model. The weights are loaded for the first caption that is needed."""
    @cache
    def loaded():
        return captioner(LiveModel(*open_model(directory), capacity=1), prompt)
    return lambda video, start, end: loaded()(video, start, end)


def caption_video(path, kept, caption, longest, made_of):
    """Writes `kept`: duration and clips [start, end, caption]."""
    duration, clips = caption_clips(path, caption, longest)
    text = json.dumps({"made_of": made_of, "duration": duration, "clips": clips}, indent=1)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, lambda temporary: temporary.write_text(text))


# ---- questions -------------------------------------------------------------------------------------------
class Question(NamedTuple):
    kind: str  # of FAMILIES
    text: str
    answer: object  # a text to choose or, without options, a span or a text to write
    others: list | None  # texts that may be wrong options; None: nothing is chosen


def texts_of(scenes):
    return [scene.text for scene in scenes]


def candidates(scenes, rng, same):
    """Yield all Questions that the captions can answer."""
    told = [scene for scene in scenes if words(scene.text)]
    once = []  # a caption that names one scene
    for scene in told:
        like_it = [other for other in told if alike(scene.text, other.text, same)]
        if len(like_it) == 1:
            once.append(scene)
    yield from about_moments(told, rng)
    yield from about_scenes(once)
    yield from about_neighbours(scenes, told, once)
    yield from about_numbers(told, rng)
    if len(told) > 1:
        yield Question("story", ASK["story"], narrative(scenes), None)


def about_moments(told, rng):
    """What is shown at a whole second, one of each scene, away from its cuts."""
    for scene in told:
        first = math.ceil(scene.start + EDGE)
        seconds = np.arange(first, scene.end - EDGE + 1e-6, dtype=int)
        for t in rng.permutation(seconds)[:1]:  # none in a scene that is too short
            yield Question("what", ASK["what"].format(t=t), scene.text, texts_of(told))


def about_scenes(once):
    """When a scene is shown; which comes first; which lasts longest, by more than cuts may be off."""
    for i, scene in enumerate(once):
        span = [round(scene.start, 2), round(scene.end, 2)]
        yield Question("when", ASK["when"].format(text=scene.text), span, None)
        yield Question("first", ASK["first"], scene.text, texts_of(once[i + 1:]))
        shorter = [other for other in once if other.end - other.start + 2 * EDGE <= scene.end - scene.start]
        yield Question("longest", ASK["longest"], scene.text, texts_of(shorter))


def about_neighbours(scenes, told, once):
    """What is shown right after and right before."""
    for a, b in pairwise(scenes):
        for kind, here, there in (("after", a, b), ("before", b, a)):
            if here in once and there in told:
                others = [scene for scene in told if scene is not here]
                yield Question(kind, ASK[kind].format(text=here.text), there.text, texts_of(others))


def about_numbers(told, rng):
    """How many scenes a word describes."""
    counts = Counter()
    for scene in told:
        counts.update(word for word in set(words(scene.text)) if len(word) > 2 and word not in EMPTY)
    for word, n in sorted(counts.items()):
        if n <= len(told) / 2:  # what most captions have in common describes nothing
            low = n - int(rng.integers(min(3, n) + 1))  # the answer's rank among the options is random
            numbers = [str(low + i) for i in range(4)]
            yield Question("count", ASK["count"].format(word=word), str(n), numbers)


def draw_options(asked, rng, same):
    """Up to four options in random order, of which no two say the same: the answer is one."""
    options = [asked.answer]
    for i in rng.permutation(len(asked.others)):
        other = asked.others[i]
        if len(options) < 4 and not any(alike(other, option, same) for option in options):
            options.append(other)
    if len(options) < 2:
        return options
    return [options[i] for i in rng.permutation(len(options))]


def make_row(video, asked, rng, same):
    """One row of iv3.load_rows, or None if the video has no wrong option. As in the toy world, options stand before
    the question, and the reply is the option's text."""
    task = "caption"
    text = asked.text
    reply = asked.answer
    extra = {"answer": asked.answer}
    if asked.kind == "when":
        task = "grounding"
        start, end = asked.answer
        reply = ASK["span"].format(a=start, b=end)
    elif asked.others is not None:
        options = draw_options(asked, rng, same)
        if len(options) < 2:
            return None
        task = "mcq"
        lines = [f"\n{letter}. {option}" for letter, option in zip("ABCD", options)]
        text = "".join(lines) + "\n" + asked.text
        extra = {"answer": "ABCD"[options.index(asked.answer)], "options": options}
    content = [{"type": "video", "video": video}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    return {"task": task, "kind": asked.kind, "messages": messages, **extra}


def ask(video, scenes, rng, questions, same):
    """Yield the rows of one video (§4.2.1): of each family its share of `questions`, kinds in turn, or
    as many as there are."""
    found = list(candidates(scenes, rng, same))
    made = defaultdict(list)
    for i in rng.permutation(len(found)):
        row = make_row(video, found[i], rng, same)
        if row:
            made[row["kind"]].append(row)
    for family, (share, kinds) in FAMILIES.items():
        rows = [made[kind] for kind in rng.permutation(kinds)]
        in_turn = filter(None, chain(*zip_longest(*rows)))
        for row in islice(in_turn, round(share * questions)):
            yield {**row, "family": family}


# ---- a folder --------------------------------------------------------------------------------------------
def find_videos(folder, limit):
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    need(paths, f"{folder}: no such folder, or no videos in it ({' '.join(sorted(SUFFIXES))})")
    return sorted(paths)[:limit]


def read_captions(kept, made_of):
    record = read_json(kept)
    need(record["made_of"] == made_of, f"{kept}: captions of another file or with other settings "
         f"({record['made_of']}, now {made_of}): delete it or choose another --out")
    return record


def counts_of(record, scenes, rows):
    """What is printed of one video."""
    captions = [text for *_, text in record["clips"] if text]
    counts = {"scenes": len(scenes), "captions": len(captions)}
    for family in FAMILIES:
        counts[family] = len([row for row in rows if row["family"] == family])
    return counts


def in_words(counts):
    return ", ".join(f"{what} {n}" for what, n in counts.items())


def curate(folder, out, caption, settings, seed=0, questions=16, longest=10.0, same=0.85, limit=None):
    """Writes curated.jsonl to `out`. caption(video, start, end) → text; `settings` (JSON) names what captions depend
    on besides: an `out` with captions of others is refused."""
    need(questions >= 4 and longest >= 1 and 0 < same <= 1 and seed >= 0 and (limit is None or limit >= 1),
         "--questions must be at least 4, --longest and --limit 1, --seed 0; --same above 0 and at most 1")
    paths = find_videos(folder, limit)
    rows = []
    stories = {}
    skipped = 0
    total = Counter()
    for path in paths:
        name = path.relative_to(folder).as_posix()
        kept = out / "captions" / f"{name}.json"
        made_of = {**settings, "longest": longest, "bytes": path.stat().st_size}
        try:
            if not kept.exists():
                caption_video(path.resolve(), kept, caption, longest, made_of)
        except MediaError as error:
            skipped += 1
            print(f"{name}: skipped, {error}", flush=True)
            continue
        record = read_captions(kept, made_of)
        scenes = merge(record["clips"], same)
        stories[name] = {"scenes": scenes, "narrative": narrative(scenes)}
        video = Path(os.path.relpath(path, out)).as_posix()  # as every media path: relative to the JSONL
        rng = np.random.default_rng([seed, *name.encode()])  # of this video, whatever the others are
        found = list(ask(video, scenes, rng, questions, same))
        for i, row in enumerate(found):
            rows.append({"id": f"curated-{name}-{i:02d}", **row, "clip": video, "duration": record["duration"]})
        counts = counts_of(record, scenes, found)
        total.update(counts)
        print(f"{name}: {in_words(counts)}", flush=True)
    need(rows, f"{folder}: no questions from its {len(paths)} videos ({skipped} skipped)")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(out / "narratives.json", lambda temporary: temporary.write_text(json.dumps(stories, indent=1)))
    write_atomic(out / "curated.jsonl", lambda temporary: temporary.write_text(lines))
    print(f"{out}/curated.jsonl: {len(rows)} rows of {len(stories)} videos, {skipped} skipped; {in_words(total)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="VIDEOS", help="folder of videos, subfolders included")
    parser.add_argument("--out", type=Path, required=True, help="folder for captions/ and curated.jsonl")
    parser.add_argument("--model", help="the captioner: a stage's directory or a run; default: the newest run")
    parser.add_argument("--prompt", help="asked of each clip, {t}: its middle (default: as the model was trained)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=16, help="rows of a video, about (default 16)")
    parser.add_argument("--longest", type=float, default=10.0, help="seconds of the longest clip (default 10)")
    parser.add_argument("--same", type=float, default=0.85, help="common words, 0-1, of captions that say the same")
    parser.add_argument("--limit", type=int, help="the first so many videos (default: all)")
    args = vars(parser.parse_args())
    model = find_model(args.pop("model"))
    prompt = args.pop("prompt") or caption_prompt(Config.load(model / "config.json").wording)
    curate(**args, caption=model_captioner(model, prompt), settings={"model": str(model), "prompt": prompt})


if __name__ == "__main__":
    run_cli(main)
