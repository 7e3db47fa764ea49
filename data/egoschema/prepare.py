"""EgoSchema, the subset with public answers: 500 of 5,031 questions (egoschema/EgoSchema) → one schema.

    python data/egoschema/prepare.py --annotations EgoSchema/ --media videos/ --out runs/egoschema

Annotations: the folder with questions.json and subset_answers.json. Media: <q_uid>.mp4, three minutes each. The answers
to the other 4,531 questions are on a server only: those rows are not written. Traps: keys with a space ("option 0"),
answers that count from 0, and an early revision of questions.json that has no questions.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from official import LETTER_LINE, LETTERS, fields, load, main, need

OURS = {"prompt": "{question}\n{options}" + LETTER_LINE, "option": "{}. {}"}  # lmms-eval's: there is no official one
AUTHORS = {"fps": 4, "max_frames": 2048, "frame_tokens": [64, 128], "max_new": 16}


def convert(made, annotations):
    folder = annotations if annotations.is_dir() else annotations.parent
    path, answers = folder / "questions.json", load(folder / "subset_answers.json", dict)
    questions, left = load(path), dict(answers)
    for i, entry in enumerate(questions):
        need("question" in entry, f"{path}: entry {i} has no 'question': an early revision; download the file again")
        uid, text, *options = fields(entry, f"{path}: entry {i}", q_uid=str, question=str,
                                     **{f"option {n}": str for n in range(5)})
        if uid in answers:
            number = answers[uid]
            need(isinstance(number, int) and 0 <= number < 5,
                 f"{folder / 'subset_answers.json'}: {uid} is {number!r}: must be 0 to 4")
            made.mcq(uid, made.find(uid), text, options, LETTERS[number], duration=180.0)
            left.pop(uid, None)
    need(not left, f"{path}: lacks {len(left)} questions of subset_answers.json, such as {next(iter(left), '')}")


if __name__ == "__main__":
    main(__doc__, "egoschema", 500, OURS, AUTHORS, convert)
