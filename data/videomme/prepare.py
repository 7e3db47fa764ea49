"""Video-MME: 2,700 questions about 900 videos, the official test (lmms-lab/Video-MME on Hugging Face) → one schema.

    python data/videomme/prepare.py --annotations test-00000-of-00001.parquet --media videos/ --out runs/videomme

Annotations: the parquet (needs pyarrow), or its rows as JSON or JSONL, also with each video's rows nested in
`questions`, as the official result files have them. Media: <videoID>.mp4. Scored by duration, domain, sub_category and
task_type. Traps: options already carry their letters; `videoID` (YouTube's) names the file, not `video_id`.

--subtitles DIR asks with subtitles: those on screen at the frames that are looked at, as the official README wants it.
(The agent's `asr` reads an .srt beside the video instead.) A sixth of the videos has none.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from official import LETTER_LINE, LETTERS, fields, load, main, need, the_file

ASK = ("Select the best answer to the following multiple-choice question based on the video{}. Respond with only the "
       "letter (A, B, C, or D) of the correct option.\n{{question}}\n{{options}}\n{}")
OURS = {"prompt": ASK.format("", "The best answer is:"), "option": "{}. {}"}  # the official README's
AUTHORS = {"fps": 4, "max_frames": 1024, "frame_tokens": [256, 256], "max_new": 16,
           "prompt": ASK.format(" and the subtitles", LETTER_LINE)}  # lmms-eval's speaks of subtitles, given or not
GROUPS = ("duration", "domain", "sub_category", "task_type")


def bare(options, where):
    """"A. One." → "One.", if every option has its letter."""
    marked = [option[:2] == f"{letter}." for letter, option in zip(LETTERS, options)]
    need(all(marked) or not any(marked), f"{where}: only some options begin with their letter: {options}")
    return [option[2:].strip() if all(marked) else option for option in options]


def shown_text(made, video, subtitles):
    """The subtitles of a video at the frames that the preset samples."""
    from iv3 import sample_times, video_seconds
    from mcr_agent import read_subtitles
    if not (seconds := video_seconds(video)) > 0:  # the row will count as missing
        return ""
    times = sample_times(0, seconds, made.preset["fps"], made.preset["max_frames"])
    lines = [text for start, end, text in read_subtitles(subtitles) if any((times >= start) & (times < end))]
    return "This video's subtitles are listed below:\n" + "\n".join(lines) + "\n" if lines else ""


def convert(made, annotations, subtitles=None):
    path, texts = the_file(annotations, "*.parquet"), {}
    need(subtitles is None or subtitles.is_dir(), f"--subtitles {subtitles}: no such folder")
    files = {srt.stem: srt for srt in sorted(subtitles.rglob("*.srt"))} if subtitles else {}
    need(files or not subtitles, f"--subtitles {subtitles}: no .srt files in it")
    for i, entry in enumerate(load(path)):
        for question in entry.get("questions", [{}]):
            row, where = {**entry, **question}, f"{path}: entry {i}"
            key, id, text, options, answer = fields(row, where, videoID=str, question_id=str, question=str,
                                                    options=list, answer=str)
            where = f"{path}: question {id}"
            video, groups = made.find(key), dict(zip(GROUPS, fields(row, where, **dict.fromkeys(GROUPS, str))))
            if key in files and key not in texts:
                texts[key] = shown_text(made, video, files[key])
            made.mcq(id, video, text, bare(options, where), answer.strip(), groups=groups, before=texts.get(key, ""))


if __name__ == "__main__":
    main(__doc__, "videomme", 2700, OURS, AUTHORS, convert, subtitles="folder of .srt files: ask with subtitles")
