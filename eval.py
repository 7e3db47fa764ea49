"""Tasks and scores: how an answer is read, what it is worth, and what a model reaches on a data file (§5).

A score is a small pure function of (text, row), because RL uses the same functions as its rule-based rewards
(§3.3: IoU for grounding, correctness for multiple choice). Three habits make a number mean something:
  1. Denominators are fixed: a video that cannot be read (`missing`) and a text that holds no answer
     (`unparsed`) count as wrong; they never leave the set.
  2. Beside every score stands the strongest trivial baseline on the same items: chance, the train file's
     prior, the whole clip, the best constant span, the model itself looking at another clip (`--blind`).
  3. Every score has n and a 95 % interval that resamples clips, not questions: questions on one clip fail
     together.

Differs from the paper:
  1. It scores with each benchmark's own script. Here parse_letter and parse_span read all answers; what the
     benchmark's script says of the same answers stands beside it as `official` (data/official.py).
  2. Its evaluation scripts use no tools. Here the agent (§3.4) answers beside the same model asked directly,
     with the same number of frames.
  3. It prints no baselines and no intervals.

Reading order: one answer → a task → many answers → scores → trivial baselines → several processes → running
the model → the agent → a record of every sample, and the comparison of two → tables → the command.

    python eval.py --data F.jsonl [--model DIR] [--train TRAIN.jsonl] [--blind]   # scores of one data file
    python eval.py --data MCR.jsonl --agent [--ablate] [--jobs 2]                 # agent beside direct answer
    python eval.py --data F.jsonl --out DIR [--resume]                            # keeps every sample
    python eval.py --compare A B          # those of two runs, paired: two DIRs, or two stages of a recipe
"""
import argparse
import atexit
import functools
import hashlib
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import iv3
import mcr_agent
from iv3 import clip_of, edit_videos, media_items, need, user_turn
from m2la import UserError

# -------------------------------------------------------------------------------- one answer: multiple choice

def final_text(text):
    """What follows the thinking. None (a missing video) reads as an empty answer."""
    return (text or "").rpartition("</think>")[2].strip()


def one_line(text):
    """In small letters, with single spaces."""
    return " ".join(text.lower().split())


def named_option(text, options):
    """The letter of the one option whose text stands in `text`, or None."""
    options = [one_line(option).rstrip(".") for option in options]
    text = one_line(text)

    # As whole words: "blueish" is no "blue"
    found = [o for o in options if o and re.search(rf"(?<!\w){re.escape(o)}(?!\w)", text)]
    if not found:
        return None

    # "a red star" is no choice of "star", if "red star" is an option too
    longest = max(found, key=len)

    # Another option is there as well, or there are two of that text: no choice
    if options.count(longest) != 1 or not all(o in longest for o in found):
        return None
    return LETTERS[options.index(longest)]


def parse_letter(text, options):
    """The letter a text chooses, by the letter or by the option's text, or None.

    A letter and an option that contradict each other are no answer."""
    text = final_text(text)
    letter = f"([{LETTERS[:len(options)]}])"

    # "B", "(b)", "**B**": nothing but the letter
    whole = re.fullmatch(rf"\W*{letter}\W*", text, re.I)
    if whole:
        return whole[1].upper()

    # "Answer: B", "the correct option is B": a cue, the last of them
    cues = re.findall(rf"(?i:answer|option|choice)(?i:\s+is)?\W*{letter}\b", text)
    # "(B) red", "B. red", or at the end "red (B)"
    edge = re.match(rf"\(?{letter}[.):]", text) or re.search(rf"\({letter}\)$", text)
    # "It is blue."
    named = named_option(text, options)

    # "red (A) blue (B)": several letters in brackets, and no cue which of them
    several = set(re.findall(rf"\({letter}\)", text))
    if len(several) > 1 and not cues:
        return None
    if cues:
        chosen = cues[-1]
    elif edge:
        chosen = edge[1]
    else:
        return named

    # "B. red", where red is A
    if named is not None and named != chosen:
        return None
    return chosen


def mcq_reward(text, row):
    """1 if the letter is right, else 0. A row whose answer is "" has no right option."""
    return float(parse_letter(text, row["options"]) == row["answer"])


# -------------------------------------------------------------------------------------- one answer: grounding

# "12.5", "1:05", "1:02:03"; and two of them: "12.5 to 15", "12s–15s"
TIME = r"(?<![\d.:])(\d{1,6}(?::\d{1,2}){0,2}(?:\.\d+)?)(?![\d:])"
RANGE = re.compile(rf"{TIME}\s*(?:s|secs?|seconds?)?\s*(?:to|until|[-–—~])\s*{TIME}", re.I)


def seconds_of(stamp):
    """'1:02:03' → 3723.0"""
    total = 0
    parts = reversed(stamp.split(":"))               # seconds, minutes, hours
    for power, part in enumerate(parts):
        total += float(part) * 60 ** power
    return total


def parse_span(text, turn=True):
    """(start, end) in seconds: the first range, else the only two times in the text.

    `turn`: a reversed span is turned. None if there is no span."""
    text = final_text(text)
    first = RANGE.search(text)
    if first:
        stamps = first.groups()                                              # "12.5 to 15 seconds"
    else:
        stamps = re.findall(TIME, text)                                      # "between 12.5 and 15"
    if len(stamps) != 2:
        return None
    span = [seconds_of(stamp) for stamp in stamps]
    if turn:
        span = sorted(span)
    return tuple(span)


def iou(a, b):
    """∩ / (last end - first start), clamped: disjoint spans are wrong, not worse than wrong."""
    overlap = min(a[1], b[1]) - max(a[0], b[0])
    union = max(a[1], b[1]) - min(a[0], b[0])
    if union <= 0:
        return 0.0
    return max(0.0, overlap) / union


def cut(span, end):
    """The span, no longer than the video."""
    return min(span[0], end), min(span[1], end)


def grounding_iou(text, row, turn=True):
    """The IoU of a text's span with the true one, 0 if there is none.

    A row may carry its video's `duration`: both spans are cut to it, as some sets annotate past the end."""
    span = parse_span(text, turn)
    if span is None:
        return 0.0
    end = row.get("duration", math.inf)
    return iou(cut(span, end), cut(row["answer"], end))


def grounding_reward(text, row):
    """IoU, but nothing for a reversed span.

    The scores turn it, as the official ones do. It is wide, so in RL it would often earn a little."""
    return grounding_iou(text, row, turn=False)


def runs_forward(text, row):
    span = parse_span(text, turn=False)
    return span is not None and span[0] < span[1]


# ----------------------------------------------------------------------------------------------------- a task

class Figure(NamedTuple):
    """A number of a task."""
    name: str                        # in its own task's score: "acc"
    key: str                         # in the baselines and results.json, beside other tasks: "mcq"
    title: str = ""                  # of its column in the recipe's tables; empty: it has none


@dataclass
class Task:
    """All that a task is; add_task() takes one.

    text: what the model wrote, None where the video cannot be read. row: as iv3.load_rows gives it; its
    `answer` is the right letter of mcq ("" if none is right), [start, end] in seconds of grounding."""
    parse: Callable                  # (text, row) → what was predicted, None if nothing can be read
    reward: Callable                 # (text, row) → what RL maximises (§3.3), 0 to 1
    score: Callable                  # (texts, rows, seed) → {figure() of each, kinds, missing, unparsed}
    strategies: Callable             # (test, train, root, train_root) → {trivial strategy: rewards (n,)}
    figures: tuple                   # of Figure; the first is what trivial strategies are judged by
    recalls: tuple = ()              # R1@… in percent, which the strongest trivial strategy has too
    correct: Callable = None         # (text, row) → what data filters look at, 0 to 1; default: `reward`
    well_formed: Callable = None     # (text, row) → whether it can be read; default: whether `parse` can
    rules: Callable = None           # row → (holds, problem), …: the schema of its rows (iv3.row_rules)

    def __post_init__(self):
        if self.correct is None:
            self.correct = self.reward
        if self.well_formed is None:
            self.well_formed = lambda text, row: self.parse(text, row) is not None


TASKS = {}                           # "mcq" and "grounding" enter below, after their scores


def add_task(name, task):
    """One more task: its rows are read, asked, scored, and trained on by RL and OPD.

    One that takes the place of ours keeps the schema of its rows, unless it brings `rules`."""
    TASKS[name] = task
    iv3.TASK_RULES[name] = task.rules or iv3.TASK_RULES.get(name, iv3.no_rules)


def task_of(row):
    """The row's entry of TASKS. An agent's question (mcr) is multiple choice."""
    if row["task"] == "mcr":
        return TASKS["mcq"]
    return TASKS[row["task"]]


def reward(text, row):
    """The rule-based reward of one sampled answer (§3.3).

    A fork may set `eval.reward = mine`: RL, `items`, --blind and --compare follow it; the scores, the agent's
    table and `correct` ask the Task, and do not."""
    return task_of(row).reward(text, row)


def correct(text, row):
    """Correctness or IoU, 0 to 1: what the data filters of RL and OPD look at (§4).

    A Task whose reward is more than rightness (a penalty on length) brings a `correct` of its own."""
    return task_of(row).correct(text, row)


def well_formed(text, row):
    """Whether a rule can read the answer, right or wrong: one of the options, or a span that runs forward."""
    return task_of(row).well_formed(text, row)


# -------------------------------------------------------------------------- many answers: means and intervals

def kind_of(row):
    """What per-category scores count it under."""
    return row.get("kind", row["task"])


def clips_of(rows):
    """The clusters of interval(): the video of each row."""
    return [clip_of(row) for row in rows]


def numbers_of(rows, task):
    """The places of a task's rows in a list of rows."""
    return [i for i, row in enumerate(rows) if row["task"] == task]


def pick(values, keys):
    return [values[key] for key in keys]


def column(records, key):
    return [record[key] for record in records]


def wilson(hits, n, z=1.96):
    """Wilson's interval of a share: sensible at 0 and 1, where a bootstrap collapses to a point."""
    p = hits / n
    zz = z * z / n                                   # z = 1.96 standard deviations hold 95 %
    centre = p + zz / 2
    half = z * math.sqrt(p * (1 - p) / n + zz / n / 4)
    return [max(0.0, (centre - half) / (1 + zz)), min(1.0, (centre + half) / (1 + zz))]


def interval(values, clusters, seed=0, draws=2000):
    """95 % interval of a mean, or of a ratio of sums, by a bootstrap over clusters.

    values: (n,), or (n,2): numerator, denominator. clusters: (n,) names; a cluster is drawn whole or not at
    all. None if there are no values, or all denominators are 0."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        return None
    _, cluster = np.unique(clusters, return_inverse=True)       # (n,) numbers from 0 to C-1
    C = int(cluster.max()) + 1

    # All right or all wrong: every draw would be the same. The evidence is C clips
    if values.ndim == 1 and values[0] in (0, 1) and (values == values[0]).all():
        return wilson(values[0] * C, C)

    # A mean is a ratio too: Σ value / Σ 1. (n,2), summed over each cluster: (C,2)
    if values.ndim == 1:
        values = np.stack([values, np.ones(len(values))], 1)
    sums = np.zeros((C, 2))
    np.add.at(sums, cluster, values)

    # A draw takes C clusters with replacement: how often each, (draws,C) → both sums of each draw, (draws,)
    times = np.random.default_rng(seed).multinomial(C, np.full(C, 1 / C), size=draws)
    numerator, denominator = (times @ sums).T
    usable = denominator > 0
    if not denominator.any():
        return None
    return np.quantile(numerator[usable] / denominator[usable], (0.025, 0.975)).tolist()


def figure(name, values, rows, seed=0):
    """{name, name_n, name_ci}: as results.json has them, a plain number with its n and interval beside it."""
    mean = float(np.mean(values)) if len(values) else None
    return {name: mean, f"{name}_n": len(values), f"{name}_ci": interval(values, clips_of(rows), seed)}


def means(values_of):
    """{label: values} → {label: {value, n}}, in the order of the labels."""
    found = {}
    for label, values in sorted(values_of.items()):
        found[label] = {"value": float(np.mean(values)), "n": len(values)}
    return found


def by_kind(values, rows):
    """{kind: {value, n}}"""
    kinds = defaultdict(list)
    for value, row in zip(values, rows):
        kinds[kind_of(row)].append(float(value))
    return means(kinds)


def by_group(values, rows):
    """{name: {label: {value, n}}} of the rows' `groups`.

    These are {name: label}, or {name: labels}, each of which counts the row."""
    groups = defaultdict(lambda: defaultdict(list))
    for value, row in zip(values, rows):
        for name, labels in row.get("groups", {}).items():
            if not isinstance(labels, list):
                labels = [labels]                    # most rows have one label
            for label in labels:
                groups[name][label].append(float(value))
    return {name: means(labels) for name, labels in groups.items()}


def macro(kinds):
    """The mean of the kinds' means, each of the same weight (MLVU's M-Avg)."""
    values = column(kinds.values(), "value")
    return float(np.mean(values)) if values else None


def recall(values, threshold):
    """R1@t: IoU >= t, safe at equality (3/10 computed from two spans can miss 0.3 by one rounding step)."""
    return (np.asarray(values) >= threshold - 1e-9).astype(float)


# The t of grounding, in percent: those that Charades-STA is scored by
RECALLS = (30, 50, 70)


# ----------------------------------------------------------------------------------------------------- scores

def official_mcq(texts, rows):
    """What the benchmark's own script says of the same answers.

    → {official: {acc, acc_n, macro, kinds, groups}}

    Of a thinking model it gets what follows the thinking. Empty if the rows are of no benchmark, or of one
    that has no script for texts."""
    # Rows of two benchmarks have no common rule; None: rows of one's own
    names = {row.get("official") for row in rows}
    if len(names) > 1 or names == {None}:
        return {}
    script = iv3.load_file("data/official.py").SCRIPTS.get(names.pop())
    if script is None:
        return {}

    # Some scripts leave rows out of the denominator, such as answers in which they find no letter
    values = []
    counted = []
    for text, row in zip(texts, rows):
        letter = script.letter(final_text(text))
        if script.counts(text, letter):
            right = letter == row["answer"] and row["answer"] != ""       # "": no option is right
            values.append(float(right))
            counted.append(row)
    kinds = by_kind(values, counted)
    accuracy = float(np.mean(values)) if values else None
    return {"official": {"acc": accuracy, "acc_n": len(values), "macro": macro(kinds), "kinds": kinds,
                         "groups": by_group(values, counted)}}


def score_mcq(texts, rows, seed=0):
    """Accuracy, over all rows (`acc`), over kinds (`macro`, MLVU's M-Avg), and in each kind and group.

    Beside it: how often each letter was chosen, and what the benchmark's own script says (`official`)."""
    letters = [parse_letter(text, row["options"]) for text, row in zip(texts, rows)]
    values = list(map(mcq_reward, texts, rows))
    kinds = by_kind(values, rows)

    # The macro mean as a ratio: a row weighs 1/n of its kind, so that every kind weighs the same
    weight = np.array([1 / kinds[kind_of(row)]["n"] for row in rows])        # (n,)
    ratio = np.stack([weight * values, weight], 1)                           # (n,2)

    chosen = Counter(filter(None, letters))
    return {**figure("acc", values, rows, seed),
            "macro": macro(kinds),
            "kinds": kinds,
            "macro_ci": interval(ratio, clips_of(rows), seed),
            "groups": by_group(values, rows),
            **official_mcq(texts, rows),
            "letters": dict(sorted(chosen.items())),
            "missing": texts.count(None),
            "unparsed": letters.count(None) - texts.count(None)}


def official_grounding(texts, rows):
    """Charades-STA's own figures: {official: {miou, miou_n, r1_30 …}}; empty if a row is of no benchmark.

    Spans as `annotated` and as predicted, a reversed one turned, cut to no video."""
    if not all("official" in row for row in rows):
        return {}
    values = []
    for text, row in zip(texts, rows):
        span = parse_span(text)
        true = row.get("annotated", row["answer"])              # `answer` is cut to the video
        values.append(iou(span, true) if span else 0.0)
    block = {"miou": float(np.mean(values)), "miou_n": len(values)}
    for percent in RECALLS:
        block[f"r1_{percent}"] = float(recall(values, percent / 100).mean())
    return {"official": block}


def score_grounding(texts, rows, seed=0):
    """mIoU and R1@0.3/0.5/0.7, and the mean width of what was predicted.

    Widths tell whether a gain is hedging. They are of the spans that run forward, inside the video; a
    reversed one (`reversed`) is an error, not a wide guess."""
    values = list(map(grounding_iou, texts, rows))
    result = figure("miou", values, rows, seed)
    for percent in RECALLS:
        result |= figure(f"r1_{percent}", recall(values, percent / 100), rows, seed)

    spans = [parse_span(text, turn=False) for text in texts]
    widths = []
    forward = []
    for span, row in zip(spans, rows):
        if span and span[0] <= span[1]:
            end = min(span[1], row.get("duration", math.inf))
            widths.append(end - span[0])
            forward.append(row)
    result |= figure("width", np.maximum(widths, 0), forward, seed)

    true_widths = [row["answer"][1] - row["answer"][0] for row in rows]
    return {**result,
            **official_grounding(texts, rows),
            "true_width": float(np.mean(true_widths)),
            "kinds": by_kind(values, rows),
            "missing": texts.count(None),
            "unparsed": spans.count(None) - texts.count(None),
            "reversed": len(spans) - spans.count(None) - len(forward)}


# ------------------------------------------------------------------------------------------ trivial baselines

def mcq_strategies(test, train, root=None, train_root=None):
    """What earns something without a look: chance, and the letter or the words that were right in `train`."""
    values = {"chance": np.array([1 / len(row["options"]) for row in test])}
    if not train:
        return values
    usual = Counter(column(train, "answer")).most_common(1)[0][0]
    values["prior letter"] = np.array([float(row["answer"] == usual) for row in test])
    values["prior word"] = prior_word(test, train)
    return values


def prior_word(test, train):
    """Always the option that was right most often in `train`, among questions of its kind. → (n,)"""
    right = Counter()
    offered = Counter()
    for row in train:
        for letter, word in zip(LETTERS, row["options"]):
            offered[row.get("kind"), word] += 1
            if letter == row["answer"]:
                right[row.get("kind"), word] += 1

    values = []
    for row in test:
        rates = {}
        for letter, word in zip(LETTERS, row["options"]):
            key = (row.get("kind"), word)
            rates[letter] = (right[key] + 0.25) / (offered[key] + 1)         # a word never seen: 1 in 4
        # A fair draw, if several options have the highest rate
        best = max(rates.values())
        tied = list(rates.values()).count(best)
        values.append(1 / tied if rates.get(row["answer"]) == best else 0.0)
    return np.array(values)


def window(item, row, root):
    """(start, end) in seconds of what a video item of the row shows."""
    start = item.get("start") or 0.0
    end = item.get("end") or row.get("duration")
    return start, end or iv3.video_seconds(Path(root) / item["video"])


def constant_spans(spans, rows, root):
    """IoU (C,n) of C constant answers with the truth of n rows.

    An answer (f, g, w) runs from fraction f to fraction g of the clip, w seconds wider: (0, 1, 0) is the
    whole clip, (.5, .5, w) a centred span of w seconds."""
    # What each row shows, and the true span: (n,) each
    clip_start, clip_end = np.array([window(media_items(row)[0], row, root) for row in rows]).T
    true_start, true_end = np.array(column(rows, "answer")).T

    # The answers, inside the clip: (C,1) with (n,) → (C,n)
    f, g, wider = np.array(spans, dtype=float).T[:, :, None]
    length = clip_end - clip_start
    start = np.clip(clip_start + f * length - wider / 2, clip_start, clip_end)
    end = np.clip(clip_start + g * length + wider / 2, clip_start, clip_end)

    # iou() of all pairs; a clip that cannot be read is NaN, and its answers are wrong
    overlap = np.minimum(end, true_end) - np.maximum(start, true_start)
    union = np.maximum(end, true_end) - np.minimum(start, true_start)
    return np.nan_to_num(np.maximum(0, overlap) / union)


def grounding_strategies(test, train, root, train_root):
    """The whole clip; and of two families of constant spans the member that is best on `train`."""
    values = {"whole clip": constant_spans([(0, 1, 0)], test, root)[0]}
    if not train:
        return values
    fractions = np.linspace(0, 1, 41)                           # steps of 2.5 % of the clip
    widths = np.linspace(0.5, 60, 120)                          # half seconds up to a minute
    families = {"constant span": [(f, g, 0) for f, g in itertools.combinations(fractions, 2)],
                "centred width": [(0.5, 0.5, width) for width in widths]}
    for name, spans in families.items():
        on_train = constant_spans(spans, train, train_root).mean(1)          # (C,)
        best = spans[on_train.argmax()]
        values[name] = constant_spans([best], test, root)[0]
    return values


def strongest(task, values, rows, seed):
    """{strategy: values (n,)} → the figures of the best one, as `baselines` has them."""
    mean_of = {}
    kinds = {}
    for strategy, own in values.items():
        mean_of[strategy] = float(own.mean())
        kinds[strategy] = by_kind(own, rows)
    best = max(mean_of, key=mean_of.get)

    # In each kind another one may be the best
    best_of_kind = {}
    for kind in kinds[best]:
        top = max(kinds, key=lambda strategy: kinds[strategy][kind]["value"])
        best_of_kind[kind] = {"name": top, **kinds[top][kind]}

    key = task.figures[0].key
    result = figure(key, values[best], rows, seed)
    result |= {f"{key}_name": best, f"{key}_all": mean_of, f"{key}_kinds": best_of_kind,
               f"{key}_items": dict(zip(column(rows, "id"), values[best].tolist()))}
    for percent in task.recalls:
        result |= figure(f"r1_{percent}", recall(values[best], percent / 100), rows, seed)
    return result


def baselines(test_rows, train_rows, root=".", train_root=None, blind=None, seed=0):
    """The strongest trivial strategy on exactly the test items, of each task that has rows.

    Figures `mcq`, `miou`, `r1_50` …, each strategy's mean in `*_all`, the best one's name in `*_name`, and
    the best per kind in `*_kinds`, the best one's reward of each row in `*_items`. `blind`: the model's texts
    for blind_rows(test_rows), one more strategy."""
    result = {}
    for name, task in TASKS.items():
        numbers = numbers_of(test_rows, name)
        if not numbers:
            continue
        test = pick(test_rows, numbers)
        train = pick(train_rows, numbers_of(train_rows, name))
        values = task.strategies(test, train, root, train_root or root)      # {strategy: (n,)}
        if blind is not None:
            texts = pick(blind, numbers)
            values["blind"] = np.array(list(map(reward, texts, test)))
        result |= strongest(task, values, test, seed)
    return result


def blind_rows(rows):
    """The same questions, each with the next clip's video: what the model knows without looking."""
    clips = sorted(set(clips_of(rows)))
    need(len(clips) > 1, "--blind needs rows about at least two videos: raise --limit or leave --blind out")
    following = dict(zip(clips, clips[1:] + clips[:1]))         # after the last comes the first

    def change(item):
        return {**item, "video": following.get(item["video"], item["video"])}
    return [edit_videos(row, change) for row in rows]


# The two tasks whose answers a rule can judge. The schema of their rows is in iv3.py, a fork's in its Task
TASKS["mcq"] = Task(
    parse=lambda text, row: parse_letter(text, row["options"]),
    reward=mcq_reward,
    score=score_mcq,
    strategies=mcq_strategies,
    figures=(Figure("acc", "mcq", "mcq"),))

TASKS["grounding"] = Task(
    parse=lambda text, row: parse_span(text, turn=False),
    reward=grounding_reward,
    well_formed=runs_forward,
    score=score_grounding,
    strategies=grounding_strategies,
    figures=(Figure("miou", "miou", "mIoU"), Figure("r1_30", "r1_30"), Figure("r1_50", "r1_50"),
             Figure("r1_70", "r1_70", "R1@.7"), Figure("width", "width")),
    recalls=RECALLS[1:])                             # results.json has no baseline of R1@0.3


# ------------------------------------------------------------------------------------------ several processes

def rank():
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """[value of process 0, of process 1, …], on every process."""
    values = [value] * world()                       # alone: [value]
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def once(action):
    """Run action() on process 0 while the others wait: for whatever writes files."""
    if rank() == 0:
        action()
    gather(None)                                     # nobody goes on before all are here


def command(script, *flags):
    """Run another of our files, with its own processes; if it fails, so does this command."""
    alone = dict(os.environ)
    alone.pop("RANK", None)                                     # it is no part of our group
    path = Path(__file__).parent / script
    code = subprocess.run([sys.executable, str(path), *map(str, flags)], env=alone).returncode
    if code > 0:
        sys.exit(code)                                                       # it has said why
    if code < 0:
        sys.exit(f"error: {script} was killed by signal {-code}")


def start_copies(jobs):
    """Start jobs - 1 copies of this command, which end with it; say how they all meet, as torchrun would."""
    # A port that is free now
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(jobs), "RANK": "0"}

    # This process is 0; the others show no bar
    for other in range(1, jobs):
        env = {**os.environ, "RANK": str(other), "TQDM_DISABLE": "1"}
        process = subprocess.Popen([sys.executable, *sys.argv], env=env)
        atexit.register(process.kill)


def join_processes(jobs, device="cpu"):
    """Join the processes that torchrun started; without torchrun, start jobs - 1 copies of this command.

    Each process works on its share of a batch, on a CPU with one thread: at the tiny size a second gains
    nothing."""
    started = "RANK" in os.environ
    if not started and jobs == 1:
        return
    # An open group may make Python's own end abort
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if not started:
        start_copies(jobs)

    # A GPU each, and NCCL for what lies on it; gather() sends Python objects over gloo
    backend = "gloo"
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(1)
    # A day: while process 0 prepares or reports, the others wait
    dist.init_process_group(backend, timeout=timedelta(days=1))
    if rank():
        sys.stdout = open(os.devnull, "w")                                   # process 0 speaks for all


# ------------------------------------------------------------------------------------------ running the model
#
# `name`: the pass, one run over the rows (answers, blind, loss, direct, agent …). `log`: a SampleLog (below),
# or None; `known`: {id: record} that a killed run left in it.

def pick_rows(rows, limit, seed=0):
    """A seeded sample in file order: the first `limit` rows would be about a few clips only."""
    if not limit or limit >= len(rows):
        return rows
    numbers = np.random.default_rng(seed).choice(len(rows), limit, replace=False)
    return pick(rows, sorted(numbers))


def about_frames(row, root):
    """About how many frames a row will show, from headers only: rows of one length share a batch."""
    total = 0
    for item in media_items(row):
        if item["type"] == "video":
            start, end = window(item, row, root)
            fps = item.get("fps", 2.0)                                   # iv3's default
            frames = np.nan_to_num(end - start) * fps
            total += min(frames, item.get("max_frames", math.inf))
    return total


def encoded_batches(processor, rows, root, batch_size, generation, name, known=()):
    """Yield (row numbers, Encoded list) of this process's batches.

    generation: a prompt leaves out the final answer. An unreadable video is skipped, and said at the end: one
    bad file must not stop a run of hours. A batch whose ids are all `known` is left out; the others stay
    as they were, as a row's neighbours may change its last digits."""
    # By length; of one length, rows about one clip are neighbours, which share its prefill
    order = sorted(range(len(rows)), key=lambda i: clip_of(rows[i]))
    order = sorted(order, key=lambda i: about_frames(rows[i], root))
    missing = []
    with tqdm(total=len(rows), desc=name, disable=None, leave=False) as bar:
        for first in range(batch_size * rank(), len(rows), batch_size * world()):
            numbers = order[first:first + batch_size]
            if all(rows[i]["id"] in known for i in numbers):
                numbers = []

            readable = []
            samples = []
            for i in numbers:
                messages = rows[i]["messages"]
                asked = messages[:-1] if generation else messages
                try:
                    samples.append(processor.encode(asked, root, generation))
                    readable.append(i)
                except iv3.MediaError as e:
                    missing.append(f"{rows[i]['id']}: {e}")
            if samples:
                yield readable, samples
            bar.update(min(batch_size * world(), len(rows) - first))
    # All processes know now what none could read
    missing = sum(gather(missing), [])
    if missing:
        print(f"{name}: {len(missing)} of {len(rows)} rows cannot be read, counted as missing; "
              f"first {missing[0]}")


def answer_rows(model, processor, rows, root=".", batch_size=32, max_new=None, stats=None, name="answers",
                log=None):
    """One text per row, None where the video cannot be read.

    max_new: by default that of the rows' preset, else 48. `stats`, a dict, receives what the number was made
    from: max_new, each row's frames and prompt tokens (`samples`, by id) and their means. `log`, a SampleLog,
    keeps every sample; what it has is not done again."""
    if not max_new:
        max_new = max((row.get("preset", {}).get("max_new", 48) for row in rows), default=48)
    known = log.known(name) if log else {}                                   # {id: record}
    stop = processor.tokenizer.token_id("<|im_end|>")

    own = {}                                         # row number → record, of this process
    for numbers, samples in encoded_batches(processor, rows, root, batch_size, True, name, known):
        start = time.perf_counter()
        outs = iv3.generate(model, samples, stop, max_new)                   # greedy
        ms = (time.perf_counter() - start) * 1e3 / len(samples)
        for i, out, sample in zip(numbers, outs, samples):
            text = out.text(processor.tokenizer)
            own[i] = {"text": text, "frames": sample.frames, "tokens": len(sample.ids), "ms": ms}
        if log:
            log.add(name, zip(pick(rows, numbers), pick(own, numbers)))

    # All processes' records, and the log's, in the order of the rows; None: the video cannot be read
    records = [known.get(row["id"]) for row in rows]
    for part in gather(own):
        for i, record in part.items():
            records[i] = record
    seen = {}
    for row, record in zip(rows, records):
        if record:
            seen[row["id"]] = {"frames": record["frames"], "tokens": record["tokens"]}
        elif log and rank() == 0:
            log.add(name, [(row, {"text": None})])
    if seen and stats is not None:
        for key in ("frames", "tokens"):
            stats[f"{key}_per_sample"] = float(np.mean(column(seen.values(), key)))
        stats |= {"samples": seen, "max_new": max_new}
    return [record and record["text"] for record in records]


@torch.no_grad()
def held_out_loss(model, processor, rows, root=".", batch_size=16, name="loss", log=None):
    """Mean nats per answer token; and per row, for `interval`, (n,2) [nats, answer tokens].

    Rows whose video cannot be read weigh 0."""
    known = log.known(name) if log else {}                                   # {id: record}
    was_training = model.training                    # a stage measures it between its steps
    model.eval()
    nats_tokens = np.zeros((len(rows), 2))
    for numbers, samples in encoded_batches(processor, rows, root, batch_size, False, name, known):
        measured = []
        hidden = model(**iv3.collate(samples, 0, model.device))              # (B,T,D), T the longest's
        for b, (i, sample) in enumerate(zip(numbers, samples)):
            # -Σ log p of the n answer tokens
            logits = iv3.answer_logits(model, hidden[b], sample.answer)      # (n,V)
            logp = torch.log_softmax(logits, -1).cpu()
            target = sample.ids[sample.answer]                               # (n,)
            nats_tokens[i, 0] = -float(logp.gather(1, target[:, None]).sum())
            nats_tokens[i, 1] = len(target)
            measured.append((rows[i], {"nats": nats_tokens[i, 0], "answer_tokens": nats_tokens[i, 1]}))
        if log:
            log.add(name, measured)
    model.train(was_training)

    # Each process has filled its own rows, the log has those of a killed run
    nats_tokens = sum(gather(nats_tokens))
    for i, row in enumerate(rows):
        if not nats_tokens[i].any() and row["id"] in known:
            nats_tokens[i] = pick(known[row["id"]], ("nats", "answer_tokens"))
    nats = nats_tokens[:, 0].sum()
    tokens = nats_tokens[:, 1].sum()
    return float(nats / max(1.0, tokens)), nats_tokens


def made_with(model, rows, stats, seed, model_dir=None):
    """What a result was made with; without it a number cannot be compared.

    Equal hashes mean equal prompts and settings of the same videos, wherever these lie. `preset`: what a
    prepare.py wrote into the rows."""
    prompts = []
    preset_texts = set()
    for row in rows:
        row = edit_videos(row, lambda item: {**item, "video": Path(item["video"]).name})
        prompts.append([(message["role"], message["content"]) for message in row["messages"][:-1]])
        if "preset" in row:
            preset_texts.add(json.dumps(row["preset"], sort_keys=True))
    text = json.dumps(prompts, sort_keys=True)

    # Mostly there is one or none
    presets = list(map(json.loads, sorted(preset_texts)))
    preset = presets[0] if len(presets) == 1 else presets
    return {"model": str(model_dir or "in memory"), "config": asdict(model.cfg), "seed": seed, **stats,
            "preset": preset, "prompt_hash": hashlib.sha256(text.encode()).hexdigest()[:12]}


def evaluate(model, processor, data_file, train_file=None, limit=None, batch_size=32, max_new=None,
             blind=False, seed=0, model_dir=None, log=None):
    """Scores of a data file: {mcq, grounding, …, items, texts, baselines, loss, meta}.

    mcq, grounding, …: one of each task that has rows. items, texts: reward and text of each asked row, by id.
    loss: of the rows of all other tasks."""
    rows = pick_rows(iv3.load_rows(data_file), limit, seed)
    root = Path(data_file).parent

    # A rule can judge the answers of the tasks in TASKS: they are asked. Of the others the loss is measured
    asked = [row for row in rows if row["task"] in TASKS]
    other = [row for row in rows if row["task"] not in TASKS]
    result = {}
    stats = {}                                       # what answer_rows notes of the prompts
    if asked:
        texts = answer_rows(model, processor, asked, root, batch_size, max_new, stats=stats, log=log)
        for name, task in TASKS.items():
            numbers = numbers_of(asked, name)
            if numbers:
                result[name] = task.score(pick(texts, numbers), pick(asked, numbers), seed)
        ids = column(asked, "id")
        result["items"] = dict(zip(ids, map(reward, texts, asked)))
        result["texts"] = dict(zip(ids, texts))

        blind_texts = None
        if blind:
            blind_texts = answer_rows(model, processor, blind_rows(asked), root, batch_size, max_new,
                                      name="blind", log=log)
        train_rows = iv3.load_rows(train_file) if train_file else []
        train_root = Path(train_file).parent if train_file else None
        result["baselines"] = baselines(asked, train_rows, root, train_root, blind_texts, seed)
    if other:
        loss, nats_tokens = held_out_loss(model, processor, other, root, batch_size, log=log)
        ci = interval(nats_tokens, clips_of(other))
        result["loss"] = {"loss": loss, "loss_n": len(other), "loss_ci": ci}
    result["meta"] = {"data": str(data_file), **made_with(model, rows, stats, seed, model_dir)}
    return result


def stage_figures(scores):
    """evaluate()'s scores as a flat block of results.json: mcq, miou, r1_30 …, each with its _n and _ci."""
    flat = {}
    for name, task in TASKS.items():
        if name not in scores:
            continue
        for one in task.figures:
            for part in ("", "_n", "_ci"):
                flat[one.key + part] = scores[name][one.name + part]
    return flat


# ------------------------------------------------------------------------------------- the agent (§3.1, §3.4)
#
# --agent takes mcr rows (ours), and mcq rows with a preset: here mcq means a benchmark's.

# Rollouts at a time (mcr_agent.run_abreast); more save little
ABREAST = 16

def direct_row(row):
    """The question asked directly, with the agent's whole frame budget spread over the clip.

    A benchmark's row says itself how it is asked."""
    if row["task"] == "mcq":
        return row
    # The user's turn alone: without the agent's system prompt, and the rollout that row may hold
    plain = {**row, "messages": [user_turn(row), row["messages"][-1]]}
    item = {"type": "video", "video": clip_of(row), "max_frames": row["frames"], "pairs": True}
    return edit_videos(plain, lambda _: item)


def direct_answers(model, processor, rows, root, batch_size=32, max_new=None, log=None):
    """The model's own texts for rows that an agent can be measured on."""
    for row in rows:
        if row["task"] == "mcq" and "preset" in row:                     # a benchmark's
            continue
        wrong = f"is of task '{row['task']}'"
        if row["task"] == "mcr":
            absent = [key for key in ("kind", "options", "answer", "frames", "evidence") if key not in row]
            if not absent:
                continue
            wrong = f"has no field '{absent[0]}'"
        raise UserError(f"row {row['id']} {wrong}: --agent takes mcr rows that name their frames and "
                        "evidence, and a benchmark's rows")
    asked = list(map(direct_row, rows))
    return answer_rows(model, processor, asked, root, batch_size, max_new, name="direct", log=log)


def budget_of_row(row):
    """Keyword arguments of run_agent: the frames that the row is asked with, and the tokens they take.

    A benchmark's preset names their size too. Prompts and frame rate are the agent's own."""
    item = media_items(row)[0]
    frames = row.get("frames") or item["max_frames"]
    budget = mcr_agent.Budget()
    budget = replace(budget, frames=frames, coarse=min(budget.coarse, frames))
    if "frame_tokens" not in item:
        return {"budget": budget}
    # [least, most] tokens of two frames; their stamp and two marks are about 16 more
    least_most = item["frame_tokens"]
    tokens = frames // 2 * (least_most[1] + 16)
    budget = replace(budget, tokens=budget.tokens + tokens)
    return {"budget": budget, "media": {"frame_tokens": least_most}}


def question_of(row):
    """The question without its options, which the agent is told apart."""
    if row.get("question"):
        return row["question"]
    text = next(item["text"] for item in user_turn(row)["content"] if item["type"] == "text")
    return text.rpartition("\n")[2]


def evidence_scores(cited, row):
    """Whether a cited span has an IoU of .3 or more with a true one, and whether one touches it, as 0 or 1.

    None, None if the row names no evidence."""
    if not row.get("evidence"):
        return None, None
    best = 0.0
    for span in cited:
        for true in row["evidence"]:
            best = max(best, iou(span, true))
    return float(best >= 0.3), float(best > 0)       # .3: the lowest threshold of grounding's R1


def agent_row(model, processor, row, root, facts, without=(), lane=None, abreast=1):
    """One rollout → {text (None: missing), first, hit, overlap, forced, frames, tokens}.

    first: the answer that verification sent back, or the same. hit, overlap: evidence_scores(). lane: the one
    of mcr_agent.run_abreast that it runs in."""
    # What its web_search looks through: the folder that was given, or the row's own
    if not facts and "facts" in row:
        facts = Path(root) / row["facts"]
    settings = budget_of_row(row)
    budget = settings["budget"]
    # Seconds are the wall clock's: abreast they pass for all, and no rollout is to be forced by the others' work
    settings["budget"] = replace(budget, seconds=budget.seconds * abreast)
    live = mcr_agent.LiveModel(model, processor, budget.tokens, lane=lane, cache=lane and lane.cache)
    try:
        out = mcr_agent.run_agent(live, Path(root) / clip_of(row), question_of(row), row["options"],
                                  facts=facts or None, without=without, **settings)
    except iv3.MediaError:
        hit, overlap = evidence_scores([], row)
        return {"text": None, "first": None, "hit": hit, "overlap": overlap, "forced": 0, "frames": 0,
                "tokens": 0}

    # The first answer of the trace, before verification could reopen the loop
    hit, overlap = evidence_scores(out.evidence, row)
    first = out.answer
    for record in out.trace:
        if record["record"] == "step" and record["action"] == "answer":
            first = record["arguments"]["text"]
            break
    return {"text": out.answer, "first": first, "hit": hit, "overlap": overlap,
            "forced": bool(out.budget_exhausted), "frames": out.frames, "tokens": out.tokens}


def agent_answers(model, processor, rows, root, facts, without=(), log=None, abreast=ABREAST):
    """agent_row() of every row, so many at a time. Each process takes every world()-th."""
    name = " no ".join(["agent", *without])
    known = log.known(name) if log else {}                                   # {id: record}
    outs = {}                                        # row number → record, of this process
    numbers = []                                     # of the rows that a resumed run has still to do
    for i in range(rank(), len(rows), world()):
        if rows[i]["id"] in known:
            outs[i] = known[rows[i]["id"]]
        else:
            numbers.append(i)

    # As many as there are rows for, and memory
    capacity = max((budget_of_row(rows[i])["budget"].tokens for i in numbers), default=1)
    abreast = max(1, min(abreast, len(numbers), mcr_agent.SHARED_TOKENS // capacity))

    def answer(i, lane):
        start = time.perf_counter()
        outs[i] = agent_row(model, processor, rows[i], root, facts, without, lane, abreast)
        if log:
            ms = (time.perf_counter() - start) * 1e3 / abreast
            log.add(name, [(rows[i], {**outs[i], "ms": ms})])
    progress = tqdm(numbers, desc=name, disable=None, leave=False)
    mcr_agent.run_abreast(model, progress, answer, abreast, capacity)

    # All processes' records, in the order of the rows
    for part in gather(outs):
        outs |= part
    return [outs[i] for i in range(len(rows))]


def group_of(row):
    """A benchmark's rows; or ours, by whether the agent's coarse first look can hold their evidence."""
    if row["task"] == "mcq":
        return "official"
    if row.get("unseen"):
        return "unseen"
    return "seen"


AGENT_FIGURES = ("direct", "agentic", "evidence_hit", "evidence_overlap")


def score_group(rows, direct, outs, seed=0):
    """One group of evaluate_agent: texts answered directly, and what the agent gave, for the same rows."""
    measured = {name: [] for name in AGENT_FIGURES}
    cited_rows = []                                  # evidence is scored where the row names some
    changes = []                                     # what verification did to the reward: -1, 0, 1
    for row, text, out in zip(rows, direct, outs):
        measured["direct"].append(mcq_reward(text, row))
        measured["agentic"].append(mcq_reward(out["text"], row))
        changes.append(measured["agentic"][-1] - mcq_reward(out["first"], row))
        if out["hit"] is not None:
            measured["evidence_hit"].append(out["hit"])
            measured["evidence_overlap"].append(out["overlap"])
            cited_rows.append(row)

    result = {"kinds": {}, "groups": {},
              "forced": sum(column(outs, "forced")),
              "mended": changes.count(1.0),
              "broken": changes.count(-1.0),
              "missing": column(outs, "text").count(None),
              "frames": float(np.mean(column(outs, "frames")))}
    for name, values in measured.items():
        own = cited_rows if name.startswith("evidence") else rows
        result["kinds"][name] = by_kind(values, own)
        result["groups"][name] = by_group(values, own)
        result |= figure(name, values, own, seed)
    return result | change("gain", measured["direct"], measured["agentic"], rows, seed)


def evaluate_agent(model, processor, rows, root=".", facts=None, seed=0, log=None, without=(), direct=None,
                   abreast=ABREAST):
    """The MCR agent against the same model asked directly, on the same rows with the same number of frames.

    → {unseen, seen, official (a benchmark's rows): {direct, agentic, evidence_hit, evidence_overlap
    (figures), gain (agentic - direct), kinds, groups, mended, broken, forced, frames, missing}}. mended,
    broken: answers that verification made right, wrong. Evidence figures are over the rows that name some.
    without: parts of the agent to leave out; direct: the texts of direct_answers(), if they are there."""
    direct = direct or direct_answers(model, processor, rows, root, log=log)
    outs = agent_answers(model, processor, rows, root, facts, without, log, abreast)
    result = {}
    for group in ("unseen", "seen", "official"):
        numbers = [i for i, row in enumerate(rows) if group_of(row) == group]
        if numbers:
            result[group] = score_group(pick(rows, numbers), pick(direct, numbers), pick(outs, numbers), seed)
    return result


# ----------------------------------------------------------------------------------- a record of every sample

def sample_files(path):
    """A per-sample file (of a directory: samples.jsonl), and the parts of other processes beside it."""
    path = Path(path)
    path = path if path.suffix == ".jsonl" else path / "samples.jsonl"
    return [path, *sorted(path.parent.glob(path.name + ".part*"))]


def read_samples(path):
    """(settings, {(pass, id): record}) of a per-sample file and its parts.

    A torn last line of a killed process is passed over: its batch is computed again."""
    files = sample_files(path)
    need(files[0].is_file(),
         f"{files[0]}: no such file; `python eval.py --data F.jsonl --out {path}` writes one")
    settings = None
    records = {}
    for file in files:
        whole_lines = file.read_text(errors="replace").split("\n")[:-1]
        for line_number, line in enumerate(whole_lines, 1):
            try:
                record = json.loads(line)
                # The first line of all holds the settings
                if line_number == 1 and file == files[0]:
                    settings = record["settings"]
                else:
                    records[record["pass"], record["id"]] = record
            except (ValueError, LookupError, TypeError) as e:
                raise UserError(
                    f"{file}:{line_number}: not a line of a per-sample file of eval.py ({e!r})") from e
    need(settings is not None, f"{path}: is empty; delete it")
    return settings, records


class SampleLog:
    """`--out`: settings in the first line, then a record of each (pass, row), written as batches finish.

    A pass is one run over the rows: answers, blind, loss, direct, agent, agent no memory, … Process 0 appends
    to the file, process r to its own FILE.part<r>, so that no line is torn by another; finish() makes one
    file of them. A killed run goes on with the batches that are not there."""

    def __init__(self, out, settings, resume=False):
        self.settings = settings
        self.records = {}
        self.path = sample_files(out)[0]
        if self.path.exists():
            need(resume, f"{self.path}: is there already; go on with --resume, or give another --out")
            old, self.records = read_samples(self.path)

            # It goes on only as it was begun
            for key, value in settings.items():
                need(old.get(key) == value, f"{self.path}: was made with {key} {old.get(key)}, "
                     f"this run has {value}; use the same or give another --out")
        # When all have read it, process 0 writes it anew
        gather(None)
        once(lambda: self._write(self.records))
        part = self.path.with_name(f"{self.path.name}.part{rank()}")
        self.own = part if rank() else self.path

    def _write(self, records):
        """The whole file, its records sorted, and no parts beside it."""
        lines = [{"settings": self.settings}, *pick(records, sorted(records))]
        text = "\n".join(map(json.dumps, lines)) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        iv3.write_atomic(self.path, lambda p: p.write_text(text))
        for part in sample_files(self.path)[1:]:
            part.unlink()

    def known(self, name):
        """{id: record} of a pass. What could not be read then is tried again."""
        found = {}
        for (of_pass, id), record in self.records.items():
            # A record of a loss has no text, one of an unreadable video None
            if of_pass == name and record.get("text", "") is not None:
                found[id] = record
        return found

    def add(self, name, results):
        """Append [(row, {text | nats, …})], whole lines in one write."""
        lines = []
        for row, result in results:
            record = {"id": row["id"], "pass": name, "task": row["task"], "kind": kind_of(row),
                      "clip": clip_of(row)}
            if "text" in result:
                text = result["text"]
                record["text"] = text
                record["prediction"] = task_of(row).parse(text, row)
                record["reward"] = reward(text, row)
            lines.append(json.dumps({**record, **result}) + "\n")
        with open(self.own, "a") as file:
            file.write("".join(lines))

    def finish(self):
        gather(None)                                 # all have written
        once(lambda: self._write(read_samples(self.path)[1]))


# ----------------------------------------------------------------------------------------- comparing two runs

def stage_samples(directory):
    """The test items of a recipe's stage, from its scores.json.

    → {id: the row, with kind, clip, root, text, reward}"""
    scores = iv3.read_json(Path(directory) / "scores.json")
    samples = {}
    for length in ("short", "long"):
        if length not in scores:
            continue
        part = scores[length]
        data = Path(part["meta"]["data"])
        if not data.is_file():                                               # the run was moved
            data = Path(directory).parent / "data" / data.name
        for row in iv3.load_rows(data):
            id = row["id"]
            if id in part["items"]:
                samples[id] = {"kind": row["task"], **row, "clip": clip_of(row), "root": data.parent,
                               "text": part["texts"][id], "reward": part["items"][id]}
    return samples


def compared(path):
    """One side of --compare: {id: {task, kind, clip, reward}}.

    FILE:direct is an agent run's direct answers, FILE:agent no memory those of --ablate."""
    path, name = re.fullmatch(r"(.*?)(?::(answers|blind|direct|agent(?: no \w+)?))?", str(path)).groups()
    if (Path(path) / "scores.json").is_file():
        return stage_samples(path)
    passes = defaultdict(dict)
    for (of_pass, id), record in read_samples(path)[1].items():
        passes[of_pass][id] = record
    # Without a pass: the agent's, if there is one
    if name is None:
        name = "agent" if "agent" in passes else "answers"
    return passes[name]


def paired_items(a, b, path_a, path_b):
    """{task, or task and kind: ids that are in both}; UserError if an item is another one in b."""
    groups = defaultdict(list)
    for id in a:
        if id not in b:
            continue
        here = tuple(pick(a[id], ("task", "kind", "clip")))
        there = tuple(pick(b[id], ("task", "kind", "clip")))
        need(here == there, f"--compare: item {id} is {here} in {path_a}, {there} in {path_b}: other data")
        task, kind, _ = here
        groups[task].append(id)
        if kind != task:                             # a row without a kind counts under its task alone
            groups[f"{task} {kind}"].append(id)
    need(groups, f"--compare: no item is in both {path_a} and {path_b}")
    return groups


def paired_difference(a, b, clips, seed):
    """Rewards (n,) of the same items in two runs → means, difference, its interval, who alone is right."""
    difference = b - a
    # As a ratio of sums, (n,2): differences that are all 0 or all 1 would be taken for a share (wilson())
    ratio = np.stack([difference, np.ones(len(a))], 1)
    right_a = recall(a, 0.5)
    right_b = recall(b, 0.5)
    return {"a": float(a.mean()), "b": float(b.mean()), "difference": float(difference.mean()),
            "ci": interval(ratio, clips, seed), "n": len(a),
            "only_a": int((right_a > right_b).sum()), "only_b": int((right_b > right_a).sum())}


def change(name, before, after, rows, seed=0):
    """figure() of after - before, two rewards (n,) of each row."""
    paired = paired_difference(np.array(before), np.array(after), clips_of(rows), seed)
    return {name: paired["difference"], f"{name}_n": paired["n"], f"{name}_ci": paired["ci"]}


def compare(path_a, path_b, seed=0):
    """Paired bootstrap of two runs over clips, per task and per kind.

    → {rows: [{name, a, b, difference (b - a), ci, n, only_a, only_b}], not_in_a, not_in_b: ids}. Right is a
    reward of 0.5 or more: for grounding, an IoU of 0.5."""
    a = compared(path_a)
    b = compared(path_b)
    rows = []
    for name, ids in sorted(paired_items(a, b, path_a, path_b).items()):
        rewards_a = np.array(column(pick(a, ids), "reward"))
        rewards_b = np.array(column(pick(b, ids), "reward"))
        clips = column(pick(a, ids), "clip")
        rows.append({"name": name, **paired_difference(rewards_a, rewards_b, clips, seed)})
    return {"a": str(path_a), "b": str(path_b), "rows": rows,
            "not_in_a": [id for id in b if id not in a],
            "not_in_b": [id for id in a if id not in b]}


# ----------------------------------------------------------------------------------------------------- tables

def number(value, digits=2):
    """'.85'"""
    return re.sub(r"(?<!\d)0\.", ".", f"{value:.{digits}f}")


def cell(block, key, digits=2):
    """'.85±.03': a figure and half its interval; empty if it was not measured."""
    if block.get(key) is None:
        return ""
    text = number(block[key], digits)
    ci = block.get(f"{key}_ci")
    if ci:
        text += f"±{number((ci[1] - ci[0]) / 2, digits)}"
    return text


def table(header, rows):
    """Markdown that is aligned enough to be read in a terminal."""
    columns = []
    for values in zip(header, *rows):
        texts = list(map(str, values))
        width = max(map(len, texts))
        texts.insert(1, "-" * width)                 # below the header
        columns.append([text.ljust(width) for text in texts])
    lines = [f"| {' | '.join(line)} |" for line in zip(*columns)]
    return "\n".join(lines)


SPLITS = {"short": "S", "long": "L"}                 # clips of the recipe's test, their letters in tables


def render_stages(blocks):
    """{stage, or what changed: its block of results.json} → markdown, a column for each titled figure."""
    if "short" not in blocks[next(reversed(blocks))]:                        # before SFT
        return table(["stage", "loss"], [[name, cell(block, "loss", 3)] for name, block in blocks.items()])
    header = ["stage"]
    lines = [[name] for name in blocks]
    for split, letter in SPLITS.items():
        for task in TASKS.values():
            for one in task.figures:
                if one.title:
                    header.append(f"{letter} {one.title}")
                    for line, block in zip(lines, blocks.values()):
                        line.append(cell(block.get(split, {}), one.key))
    return table(header, lines)


def score_lines(task, block, best):
    """One task's lines of render_scores: [score, value, n, strongest baseline]."""
    kinds = block["kinds"]
    lines = []
    for one in task.figures:
        trivial = f"{cell(best, one.key)} {best.get(one.key + '_name', '')}"
        lines.append([one.name, cell(block, one.name), block[one.name + "_n"], trivial])
    for kind, own in kinds.items():
        top = best[f"{task.figures[0].key}_kinds"][kind]
        trivial = f"{number(top['value'])} {top['name']}"
        lines.append([f"  {kind}", number(own["value"]), own["n"], trivial])
    if "macro" in block and len(kinds) > 1:
        lines.append(["mean of the kinds", cell(block, "macro"), len(kinds), ""])

    # Groups have no baseline
    for name, labels in block.get("groups", {}).items():
        for label, own in labels.items():
            lines.append([f"  {name}: {label}", number(own["value"]), own["n"], ""])

    # What the benchmark's own script would say
    official = block.get("official", {})
    for name, value in official.items():
        if name == "macro" and len(kinds) == 1:
            continue
        if isinstance(value, float):
            n = official[task.figures[0].name + "_n"]
            lines.append([f"by the official rule: {name}", number(value), n, ""])
    return lines


def render_scores(scores):
    """One data file's scores, each beside the strongest trivial baseline on the same items."""
    lines = []
    lost = []
    for name, task in TASKS.items():
        if name in scores:
            block = scores[name]
            lines += score_lines(task, block, scores.get("baselines", {}))
            lost.append(f"{name} counted wrong: {block['unparsed']} unparsed, {block['missing']} missing")
    if "loss" in scores:
        lines.append(["loss", cell(scores["loss"], "loss"), scores["loss"]["loss_n"], ""])
    return "\n".join([table(["score", "value", "n", "strongest baseline"], lines), *lost])


AGENT_TITLE = """\
agent against a direct answer at the same number of frames; forced: the budget ran out; it cites
the evidence (IoU from .3 on) or just touches it; verification mended, broke so many answers"""


def agent_lines(agent):
    """evaluate_agent's result → header, one line per group."""
    lines = []
    for group, block in agent.items():
        line = [group]
        for key in AGENT_FIGURES:
            line.append(cell(block, key))
        for key in ("mended", "broken", "forced", "direct_n"):
            line.append(block.get(key, ""))
        lines.append(line)
    header = ["evidence", "direct", "agentic", "cites it", "touches", "mended", "broke", "forced", "n"]
    return header, lines


def render_agent(agent):
    """evaluate_agent's result as markdown, with what its columns mean."""
    return f"{AGENT_TITLE}\n\n{table(*agent_lines(agent))}"


def render_agents(agents):
    """{"full", "no memory", …: evaluate_agent's result} as markdown: by kind, then one row per agent."""
    kind_lines = []
    for block in agents["full"].values():
        for kind, direct in block["kinds"]["direct"].items():
            line = [kind]
            for name in AGENT_FIGURES:
                measured = block["kinds"][name]
                line.append(number(measured[kind]["value"]) if kind in measured else "")
            kind_lines.append([*line, direct["n"]])
    text = table(["kind", "direct", "agentic", "cites it", "touches", "n"], kind_lines)
    if len(agents) == 1:
        return text

    header = ["agent"]
    for group in agents["full"]:
        header += [f"{group} agentic", f"{group} cites it", f"{group} forced", f"{group} frames"]
    lines = []
    for name, agent in agents.items():
        line = [name]
        for block in agent.values():
            line += [cell(block, "agentic"), cell(block, "evidence_hit")]
            line += [block["forced"], number(block["frames"])]
        lines.append(line)
    return f"{text}\n\n{table(header, lines)}"


def render_compare(result):
    header = ["", "A", "B", "B - A", "95 % interval", "n", "only A right", "only B right"]
    lines = []
    for row in result["rows"]:
        low, high = row["ci"]
        lines.append([row["name"], number(row["a"]), number(row["b"]), f"{row['difference']:+.3f}",
                      f"{low:+.3f} to {high:+.3f}", row["n"], row["only_a"], row["only_b"]])
    text = (f"A: {result['a']}\nB: {result['b']}\nmean rewards; 95 % interval of the difference, clips "
            f"resampled; right: a reward of 0.5 or more\n\n{table(header, lines)}")
    for side in ("a", "b"):
        absent = result[f"not_in_{side}"]
        if absent:
            named = ", ".join(absent[:10])
            if len(absent) > 10:
                named += ", …"
            text += f"\n{len(absent)} items are not in {side.upper()} and not compared: {named}"
    return text


# ---------------------------------------------------------------------------------------------------- command

def settings_of(args, rows, model, directory):
    """What a sample's record depends on.

    Equal hashes mean equal rows, equal sums equal weights in the same precision."""
    need(len(set(column(rows, "id"))) == len(rows), f"--out: two rows of {args.data} have the same id")
    content = json.dumps(rows, sort_keys=True)

    # The bits of all weights as whole numbers of two bytes: the sum is exact in any order, on CPU and GPU
    weights_sum = 0
    for weight in model.parameters():
        bits = weight.detach().flatten().view(torch.int16)
        weights_sum += int(bits.sum(dtype=torch.int64))
    settings = {"data": args.data, "rows_hash": hashlib.sha256(content.encode()).hexdigest()[:12],
                "model": str(directory), "weights_sum": weights_sum}
    for key in ("agent", "facts", "limit", "batch", "max_new", "seed"):
        settings[key] = getattr(args, key)
    return settings


def run_agents(args, model, processor, rows, directory, log):
    """--agent, and with --ablate without each of its parts."""
    root = Path(args.data).parent
    # The direct answers are the same beside every agent
    direct = direct_answers(model, processor, rows, root, args.batch, args.max_new, log)
    run = functools.partial(evaluate_agent, model, processor, rows, root, args.facts, args.seed, log,
                            direct=direct, abreast=args.abreast)
    agent = run()
    ablations = {}
    if args.ablate:
        for part in mcr_agent.PARTS:
            ablations[f"no {part}"] = run(without=[part])
    print(render_agent(agent))
    print(f"\n{render_agents({'full': agent, **ablations})}")
    meta = {"data": args.data, **made_with(model, rows, {}, args.seed, directory)}
    return {"agent": agent, "ablations": ablations, "meta": meta}


def run_data(args):
    """--data: scores, or with --agent the agent's."""
    directory = iv3.find_model(args.model)
    rows = pick_rows(iv3.load_rows(args.data), args.limit, args.seed)
    model, processor = iv3.open_model(directory)
    log = None
    if args.out:
        log = SampleLog(args.out, settings_of(args, rows, model, directory), args.resume)
    if args.agent:
        result = run_agents(args, model, processor, rows, directory, log)
    else:
        result = evaluate(model, processor, args.data, args.train, args.limit, args.batch, args.max_new,
                          args.blind, args.seed, directory, log)
        print(render_scores(result))
    if log:
        log.finish()
        print(f"{log.path}: a record of every sample")
    return result


def write_json(path, make):
    """make() → its result, also written to `path` if there is one: what is wrong with it is said before."""
    if path:
        need(Path(path).resolve().parent.is_dir(), f"--json {path}: there is no such directory")
        need(not Path(path).is_dir(), f"--json {path}: is a directory; name a file in it")
    result = make()
    if path and rank() == 0:
        iv3.write_atomic(path, lambda p: p.write_text(json.dumps(result, indent=1)))
    return result


def parser_of():
    parser = argparse.ArgumentParser(description="Score a model on a data file, or compare two runs.")
    add = parser.add_argument_group("scores").add_argument
    add("--data", metavar="F.jsonl", help="rows to score (media paths are relative to the file)")
    add("--model", help="a stage's directory or a run; default: the newest run")
    add("--train", metavar="F.jsonl", help="where the prior and constant-span baselines are fitted")
    add("--blind", action="store_true", help="one more baseline: the model looks at another clip")
    add("--agent", action="store_true", help="run the MCR agent on mcr rows, beside direct answers")
    add("--ablate", action="store_true", help="with --agent: also without each of its parts in turn")
    add("--facts", metavar="DIR", help="the agent's search corpus (default: the one each row names)")
    add("--abreast", type=int, default=ABREAST, metavar="N",
        help=f"with --agent: rollouts at a time in a process (default {ABREAST}; 1 needs the least memory)")
    add("--jobs", type=int, default=1, help="processes that share the rows (default 1)")
    add("--limit", type=int, help="score a seeded sample of so many rows")
    add("--batch", type=int, default=32, help="prompts decoded together (default 32)")
    add("--max-new", type=int, help="at most so many answer tokens (default: the rows' preset's, else 48)")
    add("--out", metavar="DIR|F",
        help="keep every sample: F.jsonl, or DIR/samples.jsonl and DIR/summary.json")
    add("--resume", action="store_true", help="go on with a run into --out that was killed")
    add = parser.add_argument_group("what was measured before").add_argument
    add("--compare", nargs=2, metavar=("A", "B"),
        help="two --out of the same data, or two stages of a recipe: their paired difference; FILE:direct is "
        "an agent run's direct answers, FILE:'agent no memory' a part of --ablate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="F", help="also write the result to this file")
    return parser


def check(args):
    """What does not go together is said before anything is loaded."""
    need(bool(args.data) != bool(args.compare), "give either --data F.jsonl or --compare A B")
    need(not (args.resume and not args.out), "--resume: give the --out DIR to go on with")
    need(not args.out or args.data, "--out: goes with --data")
    iv3.check_flags(args, {1: "jobs limit batch abreast max_new"})
    need(not args.out or Path(args.out).suffix == ".jsonl" or not Path(args.out).is_file(),
         f"--out {args.out}: is a file; name a directory or an F.jsonl")
    need(args.agent or not args.ablate, "--ablate: goes with --agent")
    need(args.data or args.jobs == 1, "--jobs shares the rows of --data")


def main():
    args = parser_of().parse_args()
    check(args)

    def result():
        if args.compare:
            found = compare(*args.compare, args.seed)
            print(render_compare(found))
            return found
        join_processes(args.jobs, "cuda" if torch.cuda.is_available() else "cpu")
        return run_data(args)

    # A directory of --out gets the summary too, unless --json names another file for it
    file = args.json
    if args.out and not file and Path(args.out).suffix != ".jsonl":
        Path(args.out).mkdir(parents=True, exist_ok=True)
        file = Path(args.out) / "summary.json"
    write_json(file, result)


if __name__ == "__main__":
    iv3.run_cli(main)
