"""MLVU, the seven multiple-choice tasks of the dev set: 2,175 questions (JUNJIE99/MLVU, data/*.json) → one schema.

    python data/mlvu/prepare.py --annotations MLVU/data --media MLVU/video --out runs/mlvu

Annotations: the folder of the JSON files, or one of them. Media: <task>/<video>, tasks as "1_plotQA" or "plotQA": two
tasks may have a video of one name. Scored by M-Avg, the unweighted mean of the seven accuracies (`macro`). The two
generative tasks (8, 9) need a judge: left out.

Trap: in eight rows the answer's text is not exactly one of the options. They are kept, listed, and have the official
answer, the last option with that text; where none has it, no option is right. The group `annotation` tells them apart.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from official import LETTERS, fields, load, main, need

ASK = "Question: {question}\nOptions:\n{options}\nOnly give the best option."
OURS = {"option": "({}) {}",  # the official prompt, without the beginning of the reply that it gives, "Best option:("
        "prompt": "Carefully watch this video and pay attention to every detail. Based on your observations, select "
                  f"the best option that accurately addresses the question.\n{ASK}"}
AUTHORS = {"fps": 4, "max_frames": 2048, "frame_tokens": [256, 256], "max_new": 16,
           "prompt": "\n{question}\n{options}\nOnly give the best option.\n\nBest option: ("}  # lmms-eval's
TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")


def convert(made, annotations):
    paths = sorted(annotations.glob("*.json")) if annotations.is_dir() else [annotations]
    files = {re.sub(r"^\d+_", "", path.stem): path for path in paths}
    absent = [task for task in TASKS if task not in files]
    need(not (absent if annotations.is_dir() else len(absent) == len(TASKS)),
         f"{annotations}: no file for {', '.join(absent)}")
    for number, task in enumerate(TASKS, 1):
        for i, entry in enumerate(load(files[task]) if task in files else ()):
            where = f"{files[task]}: entry {i}"
            video, text, options, answer, seconds = fields(entry, where, video=str, question=str, candidates=list,
                                                           answer=str, duration=(int, float))
            right = [letter for letter, option in zip(LETTERS, options) if option == answer]
            flaw = "" if len(right) == 1 else f"{len(right)} of the options {options} are the answer {answer!r}"
            made.mcq(f"{task}-{i:03d}", made.find(video, (f"{number}_{task}", task)), text, options,
                     right[-1] if right else "", flaw=flaw, kind=task, duration=float(seconds),
                     groups={"annotation": "flawed" if flaw else "sound"})


if __name__ == "__main__":
    main(__doc__, "mlvu", 2175, OURS, AUTHORS, convert)
