"""Charades-STA, test: 3,720 sentences to be found in videos (jiyanggao/TALL, charades_sta_test.txt) → one schema.

    python data/charades_sta/prepare.py --annotations charades_sta_test.txt --media Charades_v1_480/ --out runs/charades

A line is "AB12C 3.0 9.5##a person opens a door."; media: <id>.mp4. Scored by mIoU and R1@0.3/0.5/0.7. Trap: some spans
end after their video. `answer` is cut to the length of the file, `annotated` is what the line says: the score cuts the
prediction too, the official one cuts neither. A row's id is its line, so sentences that come twice stay two rows.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from official import main, need, the_file

from iv3 import video_seconds

OURS = {"option": "", "prompt": (  # lmms-eval's, its spelling too: there is no official one
    "Please find the visual event described by a sentence in the video, determining its starting and ending times. "
    "The format should be: 'The event happens in the start time - end time'. For example, The event 'person turn a "
    "light on' happens in the 24.3 - 30.4 seonds. Now I will give you the textual sentence: {question}. "
    "Please return its start time and end time.")}
AUTHORS = {"fps": 4, "max_frames": 512, "frame_tokens": [256, 256], "max_new": 50}


def convert(made, annotations):
    path = the_file(annotations, "charades_sta_test.txt")
    for i, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\S+) (\d+\.?\d*) (\d+\.?\d*)##(.+)", line.strip())
        need(match, f"{path}:{i}: not 'ID START END##SENTENCE': {line.strip()[:60]!r}")
        key, start, end, text = match[1], float(match[2]), float(match[3]), match[4].strip(" .")
        video, flaw, more = made.find(key), "", {}
        span = sorted((start, end))
        if start >= end:
            flaw, span[1] = f"runs from {start:g} to {end:g} s", max(span[1], span[0] + 0.1)
        if (length := video_seconds(video)) > 0:  # NaN: missing or broken
            more["duration"] = length
            if span[1] > length:
                flaw = flaw or f"{start:g} to {end:g} s of a video of {length:.2f} s"
                span[1] = length if span[0] < length else span[1]  # all of it behind the end: no answer can meet it
        if span != [start, end]:
            more["annotated"] = [start, end]
        made.add(f"{i:05d}", "grounding", video, text, span, f"The event happens in the {span[0]} - {span[1]} seconds.",
                 flaw=flaw, **more)


if __name__ == "__main__":
    main(__doc__, "charades_sta", 3720, OURS, AUTHORS, convert)
