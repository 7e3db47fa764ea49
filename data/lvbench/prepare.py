"""LVBench: 1,549 questions about 103 videos of about an hour (zai-org/LVBench, video_info.meta.jsonl) → one schema.

    python data/lvbench/prepare.py --annotations video_info.meta.jsonl --media videos/ --out runs/lvbench

Media: <key>.mp4, or as the official download script leaves them: numbered, beside a .json with the address. Scored by
question_type, of which a question may have several, and by the video's type. Traps: the options are part of the
question; uids may be numbers. time_reference becomes `evidence`, the spans that `eval.py --agent` holds against what
the agent cites.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from official import LETTERS, fields, load, main, the_file

OURS = {"prompt": "{question}\n{options}\nAnswer the question with the option letter.",  # lmms-eval's: no official one
        "option": "({}) {}"}
AUTHORS = {"fps": 4, "max_frames": 1024, "frame_tokens": [256, 256], "max_new": 16}


def split(question):
    """"Which?\\n(A) 1\\n(B) 2" → ("Which?", ["1", "2"]); no options if the letters are not A, B, … in order."""
    text, *rest = re.split(r"\n\s*\(([A-Z])\)", question)
    options = [option.strip() for option in rest[1::2]]
    return (text.strip(), options) if "".join(rest[::2]) == LETTERS[:len(options)] else (question, [])


def spans(reference):
    """"00:15-00:19" or "1:02:03-1:02:10", also several → [[15, 19]]; [] if it names no time. A single moment is one
    second long."""
    times = r"(\d+(?::\d+){1,2})(?:\s*[-–~]\s*(\d+(?::\d+){1,2}))?"
    found = [[sum(60 ** i * int(part) for i, part in enumerate(reversed(t.split(":")))) for t in pair if t]
             for pair in re.findall(times, reference or "")]
    return [[span[0], max(span[-1], span[0] + 1)] for span in found]


def name_by_address(made):
    """A numbered video is found by its key too, which the .json beside it has in its `url`."""
    for path in [path for paths in made.files.values() for path in paths if path.with_suffix(".json").is_file()]:
        if match := re.search(r"[?&]v=([\w-]+)", str(load(path.with_suffix(".json"), dict).get("url"))):
            made.files[match[1]].append(path)


def convert(made, annotations):
    name_by_address(made)
    path = the_file(annotations, "*.meta.jsonl")
    for i, entry in enumerate(load(path)):
        key, questions, kind = fields(entry, f"{path}: line {i + 1}", key=str, qa=list, type=str)
        minutes = entry.get("video_info", {}).get("duration_minutes")
        for qa in questions:
            where = f"{path}: line {i + 1}, uid {qa.get('uid')}"
            uid, text, answer, types = fields(qa, where, uid=(str, int), question=str, answer=str, question_type=list)
            question, options = split(text)
            flaw = "" if len(options) > 1 else "no options found in the question"
            more = {"duration": 60.0 * minutes} if minutes else {}
            if evidence := spans(qa.get("time_reference")):
                more["evidence"] = evidence
            made.mcq(str(uid), made.find(key), question, options if not flaw else [""] * 4, answer.strip(), flaw=flaw,
                     groups={"question_type": types, "type": kind}, **more)


if __name__ == "__main__":
    main(__doc__, "lvbench", 1549, OURS, AUTHORS, convert)
