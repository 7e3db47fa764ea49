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

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from iv3 import MediaError, find_model, need, open_model, read_json, run_cli, write_atomic
from mcr_agent import PROMPT, LiveModel, alike, caption_clips, captioner, merge, narrative, words

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".ts"}
FAMILIES = {  # share of the rows (§4.2.1), kinds
    "perception": (0.354, ["what"]), "spatial-temporal": (0.334, ["when", "first"]),
    "event": (0.181, ["after", "before"]), "holistic": (0.131, ["count", "longest", "story"])}
ASK = dict(
    what="What is shown at {t} seconds?", when="When is this shown: {text}?", first="Which of these is shown first?",
    after="What is shown right after this: {text}?", before="What is shown right before this: {text}?",
    count='How many scenes can be described with "{word}"?', longest="Which of these is shown for the longest time?",
    story="Describe the video.", span="From {a:.1f} to {b:.1f} seconds.")
EDGE = 0.5  # seconds that a cut may be off: no question asks about a moment that is closer to one
EMPTY = set("and are for from has his her its not one that the their them then there they this was with".split())


# ---- captions (clips, scenes and the narrative: as the agent's memory has them) ------------------------------------
def model_captioner(directory, prompt):
    """caption(video, start, end) → text, by our model. The weights are loaded for the first caption that is needed."""
    loaded = cache(lambda: captioner(LiveModel(*open_model(directory), capacity=1), prompt))
    return lambda video, start, end: loaded()(video, start, end)


def caption_video(path, kept, caption, longest, made_of):
    """Writes `kept`: duration and clips [start, end, caption]."""
    duration, clips = caption_clips(path, caption, longest)
    kept.parent.mkdir(parents=True, exist_ok=True)
    record = {"made_of": made_of, "duration": duration, "clips": clips}
    write_atomic(kept, lambda p: p.write_text(json.dumps(record, indent=1)))


# ---- questions -----------------------------------------------------------------------------------------------------
def candidates(scenes, rng, same):
    """Yield (kind, question, answer, what may be wrong options): all questions that the captions can answer. An answer
    is a text to choose or, without options, a span or a text to write."""
    told = [s for s in scenes if words(s.text)]
    once = [s for s in told if sum(alike(s.text, o.text, same) for o in told) == 1]  # a caption that names one scene
    for s in told:
        for t in rng.permutation(np.arange(math.ceil(s.start + EDGE), s.end - EDGE + 1e-6, dtype=int))[:1]:
            yield "what", ASK["what"].format(t=t), s.text, [o.text for o in told]
    for i, s in enumerate(once):
        yield "when", ASK["when"].format(text=s.text), [round(s.start, 2), round(s.end, 2)], None
        yield "first", ASK["first"], s.text, [o.text for o in once[i + 1:]]
        yield "longest", ASK["longest"], s.text, [o.text for o in once if o.end - o.start + 2 * EDGE <= s.end - s.start]
    for a, b in pairwise(scenes):
        for kind, here, there in (("after", a, b), ("before", b, a)):
            if here in once and there in told:
                yield kind, ASK[kind].format(text=here.text), there.text, [o.text for o in told if o is not here]
    counts = Counter(word for s in told for word in set(words(s.text)) if len(word) > 2 and word not in EMPTY)
    for word, n in sorted(counts.items()):
        if n <= len(told) / 2:  # what most captions have in common describes nothing
            low = n - int(rng.integers(min(3, n) + 1))  # the answer's rank among the options is random
            yield "count", ASK["count"].format(word=word), str(n), [str(low + i) for i in range(4)]
    if len(told) > 1:
        yield "story", ASK["story"], narrative(scenes), None


def make_row(video, kind, question, answer, pool, rng, same):
    """One row of iv3.load_rows, or None if the video has no wrong option. As in the toy world, options stand before the
    question, and the reply is the option's text."""
    task, extra, reply = "caption", {"answer": answer}, answer
    if isinstance(answer, list):
        task, reply = "grounding", ASK["span"].format(a=answer[0], b=answer[1])
    elif pool is not None:
        options = [answer]
        for i in rng.permutation(len(pool)):
            if len(options) < 4 and not any(alike(pool[i], option, same) for option in options):
                options.append(pool[i])
        if len(options) < 2:
            return None
        options = [options[i] for i in rng.permutation(len(options))]
        question = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options)) + "\n" + question
        task, extra = "mcq", {"answer": "ABCD"[options.index(answer)], "options": options}
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    return {"task": task, "kind": kind, "messages": messages, **extra}


def ask(video, scenes, rng, questions, same):
    """Yield the rows of one video: of each family its share of `questions`, kinds in turn, or as many as there are."""
    found, made = list(candidates(scenes, rng, same)), defaultdict(list)
    for i in rng.permutation(len(found)):
        if row := make_row(video, *found[i], rng, same):
            made[row["kind"]].append(row)
    for family, (share, kinds) in FAMILIES.items():
        turns = filter(None, chain(*zip_longest(*(made[kind] for kind in rng.permutation(kinds)))))
        yield from ({**row, "family": family} for row in islice(turns, round(share * questions)))


# ---- a folder ------------------------------------------------------------------------------------------------------
def curate(folder, out, caption, settings, seed=0, questions=16, longest=10.0, same=0.85, limit=None):
    """Writes curated.jsonl to `out`. caption(video, start, end) → text; `settings` (JSON) names what captions depend on
    besides: an `out` with captions of others is refused."""
    need(questions >= 4 and longest >= 1 and 0 < same <= 1 and seed >= 0 and (limit is None or limit >= 1),
         "--questions must be at least 4, --longest and --limit 1, --seed 0; --same above 0 and at most 1")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())[:limit]
    need(paths, f"{folder}: no such folder, or no videos in it ({' '.join(sorted(SUFFIXES))})")
    rows, stories, skipped, total = [], {}, 0, Counter()
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
        record = read_json(kept)
        need(record["made_of"] == made_of, f"{kept}: captions of another file or with other settings "
             f"({record['made_of']}, now {made_of}): delete it or choose another --out")
        scenes = merge(record["clips"], same)
        stories[name] = {"scenes": scenes, "narrative": narrative(scenes)}
        video = Path(os.path.relpath(path, out)).as_posix()  # as every media path: relative to the JSONL
        found = list(ask(video, scenes, np.random.default_rng([seed, *name.encode()]), questions, same))
        rows += [{"id": f"curated-{name}-{i:02d}", **row, "clip": video, "duration": record["duration"]}
                 for i, row in enumerate(found)]
        counts = {"scenes": len(scenes), "captions": sum(bool(text) for *_, text in record["clips"]),
                  **{family: sum(row["family"] == family for row in found) for family in FAMILIES}}
        total.update(counts)
        print(f"{name}: " + ", ".join(f"{what} {n}" for what, n in counts.items()), flush=True)
    need(rows, f"{folder}: no questions from its {len(paths)} videos ({skipped} skipped)")
    write_atomic(out / "narratives.json", lambda p: p.write_text(json.dumps(stories, indent=1)))
    write_atomic(out / "curated.jsonl", lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    print(f"{out}/curated.jsonl: {len(rows)} rows of {len(stories)} videos, {skipped} skipped; "
          + ", ".join(f"{what} {n}" for what, n in total.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="VIDEOS", help="folder of videos, subfolders included")
    parser.add_argument("--out", type=Path, required=True, help="folder for captions/ and curated.jsonl")
    parser.add_argument("--model", help="the captioner: a stage's directory or a run; default: the newest run")
    parser.add_argument("--prompt", default=PROMPT, help="asked of each clip, {t}: its middle (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=16, help="rows of a video, about (default 16)")
    parser.add_argument("--longest", type=float, default=10.0, help="seconds of the longest clip (default 10)")
    parser.add_argument("--same", type=float, default=0.85, help="common words, 0-1, of captions that say the same")
    parser.add_argument("--limit", type=int, help="the first so many videos (default: all)")
    args = vars(parser.parse_args())
    model, prompt = find_model(args.pop("model")), args.pop("prompt")
    curate(**args, caption=model_captioner(model, prompt), settings={"model": str(model), "prompt": prompt})


if __name__ == "__main__":
    run_cli(main)
