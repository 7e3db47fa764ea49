"""What official benchmarks do: annotations in, rows of the one schema (iv3.py) out; how their scripts read an answer.

    python data/NAME/prepare.py --annotations FILE_OR_DIR --media DIR --out DIR [--preset default|quick|authors]

NAME: videomme, mlvu, egoschema, lvbench or charades_sta. DIR gets NAME.jsonl; missing.txt, the media files that are not
there; and flawed.txt, the rows whose annotation is wrong. Both kinds of rows are kept, so that the denominator is the
benchmark's: `eval.py` counts the first as `missing`, a row with no right option as wrong. A preset is all that a score
depends on besides the model: written into each row, copied by `eval.py` into its results.

A prepare.py imports this file as `official`; eval.py loads it when its rows name a benchmark, for SCRIPTS alone.
"""
import argparse
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import NamedTuple

ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:                             # eval.py loads this file too, and then it is there
    sys.path.insert(0, ROOT)

from iv3 import SETTINGS, UserError, need, row_rules, run_cli, write_atomic

SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov"}
PRESETS = {  # frame_tokens: [least, most] of two frames. Without it the checkpoint limits the video as a whole
    "default": {"fps": 2, "max_frames": 768, "max_new": 64},  # Qwen3-VL's own
    "quick": {"fps": 1, "max_frames": 64, "frame_tokens": [16, 64], "max_new": 64}}  # 2K tokens a video
LETTER_LINE = "\nAnswer with the option's letter from the given choices directly."


# ---- how the official scripts read an answer ------------------------------------------------------------------------

def first_capital(text):
    """Video-MME: the first capital A-D anywhere. In the script's list of phrases to delete two commas are missing, so
    "Best answer: C" is a B there, and here."""
    for phrase in ("The best answer is", "The correct answer is", "The answer is", "The answer"):
        text = text.replace(phrase, "")
    capital = re.search("[ABCD]", text)
    if capital is None:
        return ""
    return capital[0]


def before_bracket(text):
    """MLVU: the character before the first ")", or all of the text, is exactly the letter."""
    before, bracket, _ = text.partition(")")
    if not bracket:
        return text
    return before[-1:]


def polished(text):
    """LVBench: what is before the first ")", then after "(", then its first character."""
    text = text.strip().split(")")[0].strip()
    parts = text.split("(")
    if len(parts) > 1:
        text = parts[1]
    return text.strip()[:1]


class Script(NamedTuple):
    letter: Callable                                 # text → the letter it chooses
    counts: Callable                                 # (text or None, that letter) → whether the answer counts at all


# EgoSchema's server takes letters, no texts. Charades-STA's rule is about spans: eval.py has it
SCRIPTS = {
    "videomme": Script(first_capital, lambda text, letter: letter != ""),
    "mlvu": Script(before_bracket, lambda text, letter: True),
    "lvbench": Script(polished, lambda text, letter: text is not None)}


# ---- annotations in, rows out ---------------------------------------------------------------------------------------

def unique(pairs):
    """A JSON object without the trap that the last of two equal keys wins."""
    keys = Counter(key for key, _ in pairs)
    if twice := [key for key, n in keys.items() if n > 1]:
        raise ValueError(f"the key {twice[0]!r} comes twice in an object")
    return dict(pairs)


def load(path, kind=list):
    """What an annotation file holds: a list of objects (JSON, JSONL, or parquet with pyarrow), or one (`kind` dict)."""
    need(path.is_file(), f"{path}: no such annotation file")
    where = path
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import read_table
            data = read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            data = []
            for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
                where = f"{path}:{number}"
                data += [json.loads(line, object_pairs_hook=unique)] if line.strip() else []
        else:
            data = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=unique)
    except ImportError as e:
        raise UserError(f"{path}: parquet needs pyarrow: pip install pyarrow, or give the same rows as .json") from e
    except (ValueError, OSError) as e:  # pyarrow's errors are among them
        raise UserError(f"{where}: cannot be read ({e})") from e
    need(isinstance(data, kind) and (kind is dict or all(isinstance(entry, dict) for entry in data)),
         f"{path}: must hold {'an object' if kind is dict else 'a list of objects'}")
    return data


def the_file(path, pattern):
    """`path`, or the one file in the folder `path` that fits."""
    found = sorted(path.rglob(pattern)) if path.is_dir() else [path]
    need(len(found) == 1, f"{path}: has {len(found)} files {pattern}; give one of them")
    return found[0]


def fields(entry, where, **kinds):
    """The named values of an annotation; UserError if one is absent or of another type."""
    for name, kind in kinds.items():
        value = entry.get(name)
        need(isinstance(value, kind), f"{where}: field '{name}' is {str(value)[:60]!r}: is this the official file?")
        yield value


class Rows:
    """The rows of one benchmark as they are made. `media` is searched once, subfolders included."""

    def __init__(self, name, media, out, preset):
        need(media.is_dir(), f"--media {media}: no such folder")
        self.name, self.media, self.out, self.preset = name, media, out, preset
        self.files, self.rows, self.ids, self.missing, self.flawed = defaultdict(list), [], Counter(), Counter(), []
        for path in sorted(media.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                self.files[path.stem].append(path)

    def find(self, video, folders=()):
        """The media file of that name, with any suffix; only in a folder of `folders`, if given. Where there is none:
        the path it should have."""
        name = video if Path(video).suffix.lower() in SUFFIXES else f"{video}.mp4"
        found = [p for p in self.files[Path(name).stem] if not folders or p.parent.name in folders]
        need(len(found) < 2, f"--media {self.media}: {name} is there more than once: {', '.join(map(str, found))}")
        return found[0] if found else self.media.joinpath(*folders[:1], name)

    def add(self, id, task, video, question, answer, reply, flaw="", **more):
        """One row. `video`: what find() gave; `question`: without options, which are `more`."""
        self.ids[id] += 1
        if self.ids[id] > 1:
            id, flaw = f"{id}#{self.ids[id]}", flaw or f"the id {id} comes more than once"
        if not video.is_file():
            self.missing[str(video)] += 1
        options = "\n".join(self.preset["option"].format(letter, option)
                            for letter, option in zip(LETTERS, more.get("options", ())))
        settings = {k: v for k, v in self.preset.items() if k in SETTINGS}
        item = {"type": "video", "video": Path(os.path.relpath(video, self.out)).as_posix(), **settings}
        text = self.preset["prompt"].format(question=question, options=options)
        content = [item, {"type": "text", "text": more.pop("before", "") + text}]
        row = {"id": f"{self.name}-{id}", "task": task, "answer": answer, "question": question, **more,
               "official": self.name, "preset": self.preset,
               "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]}
        if flaw:
            row["flaw"] = flaw
            self.flawed.append(f"{row['id']}: {flaw}")
        for holds, problem in row_rules(row):
            need(holds, f"{row['id']}: {problem}")
        self.rows.append(row)

    def mcq(self, id, video, question, options, answer, **more):
        self.add(id, "mcq", video, question, answer, answer, options=options, **more)


def prepare(name, count, ours, authors, convert, annotations, media, out, preset="default", **more):
    """Writes NAME.jsonl, missing.txt and flawed.txt to `out`; returns what main() prints."""
    presets = {p: {"name": p, **values, **ours, **values} for p, values in {**PRESETS, "authors": authors}.items()}
    need(preset in presets, f"--preset {preset}: use one of {', '.join(presets)}")
    need(annotations.exists(), f"--annotations {annotations}: no such file or folder")
    made = Rows(name, media, out, presets[preset])
    convert(made, annotations, **more)
    need(made.rows, f"{annotations}: no rows in it")
    out.mkdir(parents=True, exist_ok=True)
    lists = {f"{name}.jsonl": map(json.dumps, made.rows), "flawed.txt": made.flawed,
             "missing.txt": [f"{path}: {n} rows" for path, n in sorted(made.missing.items())]}
    for file, lines in lists.items():
        text = "".join(line + "\n" for line in lines)
        write_atomic(out / file, lambda p, text=text: p.write_text(text, encoding="utf-8"))
    return (f"{out / name}.jsonl: {len(made.rows)} rows (the benchmark has {count}), preset {preset}; "
            f"{sum(made.missing.values())} rows of {len(made.missing)} missing videos, listed in missing.txt; "
            f"{len(made.flawed)} flawed, in flawed.txt")


def main(doc, name, count, ours, authors, convert, **flags):
    """The command of a prepare.py. `flags`: {name: help} of further folders that convert() takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="the official file, or the folder it is in")
    parser.add_argument("--media", type=Path, required=True, help="folder of the videos; subfolders are searched")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {name}.jsonl, missing.txt, flawed.txt")
    parser.add_argument("--preset", default="default", help=f"{', '.join(PRESETS)} or authors (default: default)")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", type=Path, metavar="DIR", help=text)
    run_cli(lambda: print(prepare(name, count, ours, authors, convert, **vars(parser.parse_args()))))
