"""Scores, baselines and benches: every number this project prints is made here (§4, §5).

A score is a small pure function of (text, row), because RL uses the same functions as its rule-based rewards (§3.3:
IoU for grounding, correctness for multiple choice). Three habits make a number mean something:
  1. Denominators are fixed: a video that cannot be read (`missing`) and a text that holds no answer (`unparsed`)
     count as wrong; they never leave the set.
  2. Beside every score stands the strongest trivial baseline on the same items: chance, the train file's prior, the
     whole clip, the best constant span, the model itself looking at another clip (`--blind`).
  3. Every score has n and a 95 % interval that resamples clips, not questions: questions on one clip fail together.

    python eval.py --data F.jsonl [--model DIR] [--train TRAIN.jsonl] [--blind]       # scores of one data file
    python eval.py --data MCR.jsonl --agent [--ablate] [--jobs 2]                     # agent against a direct answer
    python eval.py --data F.jsonl --out DIR [--resume]                                # and a record of every sample
    python eval.py --compare A B                        # those of two runs, paired: two DIRs, or two stages of a recipe
    python eval.py --gains runs/seed0 runs/seed1        # what each step of a recipe changes, mean of its runs
    python eval.py --report runs/tiny                   # one page about a recipe: curves, tables, five answers
    python eval.py --bench decode --preset tiny --contexts 1024,4096 --json F.json    # time of a new token
    python eval.py --bench agent-cache --first 1024 --new 256 --steps 16              # a rollout's live cache
    python eval.py --bench conversion [--preset qwen3-vl-8b]                          # what each idea of §3.2 saves
    python eval.py --bench ablation --seeds 3           # the recipe without one part at a time; hours
"""
import argparse
import atexit
import base64
import functools
import hashlib
import html
import io
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
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from string import ascii_uppercase as LETTERS

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import iv3
import mcr_agent
from iv3 import need
from m2la import GQA, Calibration, ConvertSpec, UserError, convert_layers, mrope, rotate

UNSEEN = ("brief", "speech", "fact")         # mcr kinds whose evidence a coarse pass over the clip cannot hold


# ------------------------------------------------------------------------------------------------------- one answer

def final_text(text):
    """What follows the thinking. None (a missing video) reads as an empty answer."""
    return (text or "").rpartition("</think>")[2].strip()


def parse_letter(text, options):
    """The letter a text chooses, by the letter or by the option's text, or None. A letter and an option that contradict
    each other are no answer."""
    text, one = final_text(text), f"([{LETTERS[:len(options)]}])"
    if whole := re.fullmatch(rf"\W*{one}\W*", text, re.I):                                  # B   (b)   B.
        return whole[1].upper()
    several = len(set(re.findall(rf"\({one}\)", text))) > 1
    words, low = [" ".join(o.lower().split()).rstrip(".") for o in options], " ".join(text.lower().split())
    found = [w for w in words if w and re.search(rf"(?<!\w){re.escape(w)}(?!\w)", low)]
    found = [w for w in found if not any(w != v and w in v for v in found)]                 # "star" inside "red star"
    named = LETTERS[words.index(found[0])] if len(found) == 1 == words.count(found[0]) else None
    edge = re.match(rf"\(?{one}[.):]", text) or re.search(rf"\({one}\)$", text)             # (B) red  B. red  red (B)
    cues = re.findall(rf"(?i:answer|option|choice)(?i:\s+is)?\W*{one}\b", text)             # the answer is B
    if several and not cues:
        return None
    letter = cues[-1] if cues else edge[1] if edge else named
    return letter if named in (None, letter) else None


def first_capital(text):
    """Video-MME: the first capital A-D anywhere. In the script's list of phrases to delete two commas are missing, so
    "Best answer: C" is a B there, and here."""
    for phrase in ("The best answer is", "The correct answer is", "The answer is", "The answer"):
        text = text.replace(phrase, "")
    return (re.findall("[ABCD]", text) or [""])[0]


def before_bracket(text):
    """MLVU: the character before the first ")", or all of the text, is exactly the letter."""
    before, bracket, _ = text.partition(")")
    return before[-1:] if bracket else text


def polished(text):
    """LVBench: what is before the first ")", then after "(", then its first character."""
    return text.strip().split(")")[0].strip().split("(", 2)[:2][-1].strip()[:1]


# How the official scripts find the letter in an answer, and which answers (text or None, letter) they count at all.
OFFICIAL = {"videomme": (first_capital, lambda text, letter: letter), "mlvu": (before_bracket, lambda *_: True),
            "lvbench": (polished, lambda text, letter: text is not None)}


TIME = r"(?<![\d.:])(\d{1,6}(?::\d{1,2}){0,2}(?:\.\d+)?)(?![\d:])"                          # 12.5   1:05   1:02:03
RANGE = re.compile(rf"{TIME}\s*(?:s|secs?|seconds?)?\s*(?:to|until|[-–—~])\s*{TIME}", re.I)


def parse_span(text, turn=True):
    """(start, end) in seconds: the first range, else the only two times in the text. `turn`: a reversed span too."""
    text = final_text(text)
    first = RANGE.search(text)
    times = first.groups() if first else re.findall(TIME, text)
    if len(times) != 2:
        return None
    seconds = [sum(float(part) * 60 ** i for i, part in enumerate(reversed(t.split(":")))) for t in times]
    return tuple(sorted(seconds) if turn else seconds)


def iou(a, b):
    """∩ / (last end - first start), clamped: disjoint spans are wrong, not worse than wrong."""
    union = max(a[1], b[1]) - min(a[0], b[0])
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) / union if union > 0 else 0.0


def mcq_reward(text, row):
    return float(parse_letter(text, row["options"]) == row["answer"])


def grounding_reward(text, row, turn=True):
    """IoU. A row may carry its video's `duration`: both spans are cut to it, as some sets annotate past the end."""
    end, span = row.get("duration", math.inf), parse_span(text, turn)
    return iou(*[(min(s[0], end), min(s[1], end)) for s in (span, row["answer"])]) if span else 0.0


def reward(text, row):
    """The rule-based reward of one sampled answer (§3.3). Nothing for a reversed span, which the scores turn, as the
    official ones do: it is wide, so it would often earn a little."""
    return grounding_reward(text, row, turn=False) if row["task"] == "grounding" else mcq_reward(text, row)


def well_formed(text, row):
    """Whether a rule can read the answer, right or wrong: a span that runs forward, or one of the options."""
    if row["task"] == "grounding":
        span = parse_span(text, turn=False)
        return span is not None and span[0] < span[1]
    return parse_letter(text, row["options"]) is not None


# ------------------------------------------------------------------------------- many answers: means and intervals

def wilson(hits, n, z=1.96):
    """Wilson's interval of a share: sensible at 0 and 1, where a bootstrap collapses to a point."""
    p, zz = hits / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + zz / n / 4)
    return [max(0.0, (p + zz / 2 - half) / (1 + zz)), min(1.0, (p + zz / 2 + half) / (1 + zz))]


def interval(values, clusters, seed=0, draws=2000):
    """95 % interval of a mean (values (n,)) or of a ratio of sums (values (n,2): numerator, denominator). Clusters, one
    name per value, are resampled whole."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        return None
    _, index = np.unique(clusters, return_inverse=True)
    count = int(index.max()) + 1
    if values.ndim == 1 and values[0] in (0, 1) and (values == values[0]).all():
        return wilson(values[0] * count, count)                              # all alike: the evidence is n clips
    sums = np.zeros((count, 2))
    np.add.at(sums, index, values if values.ndim == 2 else np.stack([values, np.ones(len(values))], 1))
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    top, bottom = (weights @ sums).T                                         # (draws,) each
    return np.quantile(top[bottom > 0] / bottom[bottom > 0], (0.025, 0.975)).tolist() if bottom.any() else None


def figure(name, values, rows, seed=0):
    """{name, name_n, name_ci}: the layout of results.json, a plain number with its n and interval beside it."""
    return {name: float(np.mean(values)) if len(values) else None, f"{name}_n": len(values),
            f"{name}_ci": interval(values, [clip_of(row) for row in rows], seed)}


def by_kind(values, rows):
    kinds = defaultdict(list)
    for value, row in zip(values, rows):
        kinds[row.get("kind", row["task"])].append(float(value))
    return {kind: {"value": float(np.mean(v)), "n": len(v)} for kind, v in sorted(kinds.items())}


def by_group(values, rows):
    """{name: {label: {value, n}}} of the rows' `groups`: {name: label, or labels, each of which counts the row}."""
    groups = defaultdict(lambda: defaultdict(list))
    for value, row in zip(values, rows):
        for name, labels in row.get("groups", {}).items():
            for label in labels if isinstance(labels, list) else [labels]:
                groups[name][label].append(float(value))
    return {name: {label: {"value": float(np.mean(v)), "n": len(v)} for label, v in sorted(labels.items())}
            for name, labels in groups.items()}


def macro(kinds):
    return float(np.mean([k["value"] for k in kinds.values()])) if kinds else None


def recall(values, threshold):
    """R1@t: IoU >= t, safe at equality (3/10 computed from two spans can miss 0.3 by one rounding step)."""
    return (np.asarray(values) >= threshold - 1e-9).astype(float)


def media_items(row):
    return [item for m in row["messages"] if isinstance(m["content"], list)
            for item in m["content"] if item["type"] != "text"]


def clip_of(row):
    """The video or image a row is about, its cluster; a row without media is its own."""
    return next((item[item["type"]] for item in media_items(row)), row["id"])


def official_mcq(texts, rows):
    """{acc, acc_n, macro, kinds, groups} as the benchmark's own script gives them for the same answers (of a thinking
    model: what follows the thinking). Empty if the rows are of no benchmark, or of one that has no script for texts."""
    names = {row.get("official") for row in rows}
    if len(names) > 1 or not names <= OFFICIAL.keys():
        return {}
    extract, counts = OFFICIAL[names.pop()]
    picked = [(extract(final_text(text)), text, row) for text, row in zip(texts, rows)]
    picked = [(letter, row) for letter, text, row in picked if counts(text, letter)]
    values, rows = [float(letter == row["answer"] != "") for letter, row in picked], [row for _, row in picked]
    kinds = by_kind(values, rows)
    return {"official": {"acc": float(np.mean(values)) if values else None, "acc_n": len(values), "macro": macro(kinds),
                         "kinds": kinds, "groups": by_group(values, rows)}}


def score_mcq(texts, rows, seed=0):
    """Accuracy, its mean over kinds (`macro`, MLVU's M-Avg) and in each group, how often each letter was chosen, and
    beside them what the benchmark's own script would say (`official`)."""
    picked = [parse_letter(text, row["options"]) for text, row in zip(texts, rows)]
    values = [float(letter == row["answer"]) for letter, row in zip(picked, rows)]
    kinds = by_kind(values, rows)
    weight = np.array([1 / kinds[row.get("kind", row["task"])]["n"] for row in rows])       # every kind weighs the same
    return {**figure("acc", values, rows, seed), "macro": macro(kinds), "kinds": kinds,
            "macro_ci": interval(np.stack([weight * values, weight], 1), [clip_of(row) for row in rows], seed),
            "groups": by_group(values, rows), **official_mcq(texts, rows),
            "letters": dict(sorted(Counter(filter(None, picked)).items())),
            "missing": texts.count(None), "unparsed": picked.count(None) - texts.count(None)}


def score_grounding(texts, rows, seed=0):
    """mIoU and R1@0.3/0.5/0.7. Widths tell whether a gain is hedging: the predicted one is of the spans that run
    forward, inside the video; a reversed one (`reversed`) is an error, not a wide guess. `official`: Charades-STA's
    own, with the spans as `annotated` and as predicted, cut to no video."""
    spans = [parse_span(text, turn=False) for text in texts]
    values = [grounding_reward(text, row) for text, row in zip(texts, rows)]
    result = figure("miou", values, rows, seed)
    for percent in (30, 50, 70):
        result |= figure(f"r1_{percent}", recall(values, percent / 100), rows, seed)
    forward = [(span, row) for span, row in zip(spans, rows) if span and span[0] <= span[1]]
    widths = [min(end, row.get("duration", math.inf)) - start for (start, end), row in forward]
    result |= figure("width", np.maximum(widths, 0), [row for _, row in forward], seed)
    if all("official" in row for row in rows):
        raw = [iou(span, row.get("annotated", row["answer"])) if span else 0.0
               for span, row in zip(map(parse_span, texts), rows)]
        result["official"] = {"miou": float(np.mean(raw)), "miou_n": len(raw)}
        result["official"] |= {f"r1_{p}": float(recall(raw, p / 100).mean()) for p in (30, 50, 70)}
    return {**result, "true_width": float(np.mean([row["answer"][1] - row["answer"][0] for row in rows])),
            "kinds": by_kind(values, rows), "missing": texts.count(None),
            "unparsed": spans.count(None) - texts.count(None),
            "reversed": len(spans) - spans.count(None) - len(forward)}


# ------------------------------------------------------------------------------------------------ trivial baselines

def window(item, row, root):
    """(start, end) in seconds of what a video item of the row shows."""
    end = item.get("end") or row.get("duration")
    return item.get("start") or 0.0, end or iv3.video_seconds(Path(root) / item["video"])


def constant_spans(spans, rows, root):
    """IoU (C,n) of constant answers with the truth. A span (f, g, w) runs from fraction f to fraction g of the clip,
    w seconds wider: (0, 1, 0) is the whole clip, (.5, .5, w) a centred span of w seconds."""
    lo, hi = np.array([window(media_items(row)[0], row, root) for row in rows]).T            # (n,)
    f, g, w = (column[:, None] for column in np.array(spans, dtype=float).T)                 # (C,1)
    start = np.clip(lo + f * (hi - lo) - w / 2, lo, hi)
    end = np.clip(lo + g * (hi - lo) + w / 2, lo, hi)
    a, b = np.array([row["answer"] for row in rows]).T
    union = np.maximum(end, b) - np.minimum(start, a)
    return np.nan_to_num(np.maximum(0, np.minimum(end, b) - np.maximum(start, a)) / union)   # NaN: unreadable


def grounding_strategies(test, train, root, train_root):
    grid = np.linspace(0, 1, 41)
    families = {"constant span": [(f, g, 0) for f in grid for g in grid if f < g],
                "centred width": [(0.5, 0.5, w) for w in np.linspace(0.5, 60, 120)]}
    values = {"whole clip": constant_spans([(0, 1, 0)], test, root)[0]}
    for name, spans in families.items() if train else ():
        best = constant_spans(spans, train, train_root).mean(1).argmax()                     # fitted on train only
        values[name] = constant_spans([spans[best]], test, root)[0]
    return values


def mcq_strategies(test, train):
    values = {"chance": np.array([1 / len(row["options"]) for row in test])}
    if not train:
        return values
    usual = Counter(row["answer"] for row in train).most_common(1)[0][0]
    right, offered = Counter(), Counter()          # per (kind, word): what a reader learns without looking
    for row in train:
        for letter, word in zip(LETTERS, row["options"]):
            offered[row.get("kind"), word] += 1
            right[row.get("kind"), word] += letter == row["answer"]
    by_word = []
    for row in test:
        keys = [(row.get("kind"), word) for word in row["options"]]
        rates = [(right[k] + 0.25) / (offered[k] + 1) for k in keys]
        tied = [letter for letter, rate in zip(LETTERS, rates) if rate == max(rates)]
        by_word.append((row["answer"] in tied) / len(tied))                                  # a fair draw on ties
    return {**values, "prior letter": np.array([float(row["answer"] == usual) for row in test]),
            "prior word": np.array(by_word)}


def baselines(test_rows, train_rows, root=".", train_root=None, blind=None, seed=0):
    """The strongest trivial strategy on exactly the test items, as figures `mcq`, `miou`, `r1_50`, with `*_name`, all
    of them in `*_all`, and the strongest per kind in `*_kinds`. `blind`: the model's texts for blind_rows(test)."""
    result = {}
    for task, name in (("mcq", "mcq"), ("grounding", "miou")):
        keep = [i for i, row in enumerate(test_rows) if row["task"] == task]
        test, train = [test_rows[i] for i in keep], [row for row in train_rows if row["task"] == task]
        if not test:
            continue
        values = (mcq_strategies(test, train) if task == "mcq"
                  else grounding_strategies(test, train, root, train_root or root))
        if blind is not None:
            values["blind"] = np.array([reward(blind[i], test_rows[i]) for i in keep])
        best = max(values, key=lambda strategy: values[strategy].mean())
        kinds = {strategy: by_kind(v, test) for strategy, v in values.items()}
        top = {kind: max(kinds, key=lambda s: kinds[s][kind]["value"]) for kind in kinds[best]}
        result |= {**figure(name, values[best], test, seed), f"{name}_name": best,
                   f"{name}_all": {s: float(v.mean()) for s, v in values.items()},
                   f"{name}_kinds": {kind: {"name": s, **kinds[s][kind]} for kind, s in top.items()}}
        if task == "grounding":
            for percent in (50, 70):
                result |= figure(f"r1_{percent}", recall(values[best], percent / 100), test, seed)
    return result


def blind_rows(rows):
    """The same questions, each with the next clip's video: what the model knows without looking."""
    clips = sorted({clip_of(row) for row in rows})
    need(len(clips) > 1, "--blind needs rows about at least two videos: raise --limit or leave --blind out")
    other = dict(zip(clips, clips[1:] + clips[:1]))
    return [edit_videos(row, lambda item: {**item, "video": other.get(item["video"], item["video"])}) for row in rows]


def edit_videos(row, change):
    """A copy of the row with change(item) in place of each video item."""
    def content(c):
        return c if isinstance(c, str) else [change(i) if i["type"] == "video" else i for i in c]
    return {**row, "messages": [{**m, "content": content(m["content"])} for m in row["messages"]]}


# ---------------------------------------------------------------------------------------------- several processes

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """[value of process 0, of process 1, …], on every process."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def once(action):
    """Run action() on process 0 while the others wait: for whatever writes files."""
    if rank() == 0:
        action()
    gather(None)


def command(script, *flags):
    """Run another of our files, with its own processes; if it fails, so does this command."""
    alone = {k: v for k, v in os.environ.items() if k != "RANK"}
    line = [sys.executable, str(Path(__file__).parent / script), *map(str, flags)]
    if code := subprocess.run(line, env=alone).returncode:
        sys.exit(code if code > 0 else f"error: {script} was killed by signal {-code}")      # else it has said why


def join_processes(jobs, device="cpu"):
    """Join the processes that torchrun started. Without torchrun, start jobs - 1 copies of this command, one thread
    each: at the tiny size a second thread gains nothing. Each process works on its share of a batch."""
    started = "RANK" in os.environ
    if not started and jobs == 1:
        return
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())     # or Python's own end may abort
    if not started:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(jobs), "RANK": "0"}
        for other in range(1, jobs):
            env = {**os.environ, "RANK": str(other), "TQDM_DISABLE": "1"}
            atexit.register(subprocess.Popen([sys.executable, *sys.argv], env=env).kill)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    if rank():
        sys.stdout = open(os.devnull, "w")


# ------------------------------------------------------------------------------------------------ running the model

def about_frames(row, root):
    """About how many frames a row will show, from headers only: rows of one length share a batch."""
    spans = [(item, *window(item, row, root)) for item in media_items(row) if item["type"] == "video"]
    return sum(min(np.nan_to_num(end - start) * item.get("fps", 2.0), item.get("max_frames", math.inf))
               for item, start, end in spans)


def encoded_batches(processor, rows, root, batch_size, generation, name, missing, known=()):
    """Yield (row numbers, Encoded list) of this process's batches. A prompt for generation leaves out the final answer.
    An unreadable video is noted in `missing` and skipped: one bad file must not stop a run of hours. A batch whose ids
    are all `known` is left out; the others stay as they were, as a row's neighbours may change its last digits."""
    order = sorted(range(len(rows)), key=lambda i: (about_frames(rows[i], root), clip_of(rows[i])))
    with tqdm(total=len(rows), desc=name, disable=None, leave=False) as bar:
        for first in range(batch_size * rank(), len(rows), batch_size * world()):
            batch, numbers = [], order[first:first + batch_size]
            for i in numbers if any(rows[i]["id"] not in known for i in numbers) else ():
                messages = rows[i]["messages"][:-1] if generation else rows[i]["messages"]
                try:
                    batch.append((i, processor.encode(messages, root, generation)))
                except iv3.MediaError as e:
                    missing.append(f"{rows[i]['id']}: {e}")
            if batch:
                yield zip(*batch)
            bar.update(min(batch_size * world(), len(rows) - first))
    missing[:] = sum(gather(missing), [])
    if missing:
        print(f"{name}: {len(missing)} of {len(rows)} rows cannot be read, counted as missing; first {missing[0]}")


def answer_rows(model, processor, rows, root=".", batch_size=32, max_new=None, stats=None, name="answers", log=None):
    """One text per row, None where the video cannot be read. `max_new`: by default that of the rows' preset, else 48.
    `stats`, a dict, receives what the number was made from: max_new, each row's frames and prompt tokens (`samples`,
    by id) and their means. `log`, a SampleLog, keeps every sample; what it has is not done again."""
    known, own, missing = log.known(name) if log else {}, {}, []
    max_new = max_new or max((row.get("preset", {}).get("max_new", 48) for row in rows), default=48)
    stop = processor.tokenizer.token_id("<|im_end|>")
    for numbers, samples in encoded_batches(processor, rows, root, batch_size, True, name, missing, known):
        start = time.perf_counter()
        outs = iv3.generate(model, samples, stop, max_new)
        ms = (time.perf_counter() - start) * 1e3 / len(samples)
        done = {i: {"text": out.text(processor.tokenizer), "frames": sample.frames, "tokens": len(sample.ids), "ms": ms}
                for i, out, sample in zip(numbers, outs, samples)}
        own |= done
        if log:
            log.add(name, [(rows[i], result) for i, result in done.items()])
    results = [known.get(row["id"]) for row in rows]
    for i, result in sum((list(part.items()) for part in gather(own)), []):
        results[i] = result
    if log and rank() == 0:
        log.add(name, [(row, {"text": None}) for row, result in zip(rows, results) if result is None])
    made = {row["id"]: {key: result[key] for key in ("frames", "tokens")} for row, result in zip(rows, results)
            if result}
    if stats is not None and made:
        stats |= {f"{key}_per_sample": float(np.mean([seen[key] for seen in made.values()]))
                  for key in ("frames", "tokens")} | {"samples": made, "max_new": max_new}
    return [result and result["text"] for result in results]


@torch.no_grad()
def held_out_loss(model, processor, rows, root=".", batch_size=16, name="loss", log=None):
    """Mean nats per answer token, and (n,2) [nats, answer tokens] per row for `interval`; unreadable rows weigh 0."""
    table, was_training, known = np.zeros((len(rows), 2)), model.training, log.known(name) if log else {}
    model.eval()
    for numbers, samples in encoded_batches(processor, rows, root, batch_size, False, name, [], known):
        hidden = model(**iv3.collate(samples, 0, model.device))                              # (B,T,D)
        for b, (i, sample) in enumerate(zip(numbers, samples)):
            at = sample.answer.nonzero()[:, 0]                     # token t is predicted from position t-1
            logp = torch.log_softmax(model.logits(hidden[b, at - 1]).float(), -1).cpu()      # (answer tokens, V)
            table[i] = -float(logp.gather(1, sample.ids[at][:, None]).sum()), len(at)
        if log:
            log.add(name, [(rows[i], {"nats": table[i, 0], "answer_tokens": table[i, 1]}) for i in numbers])
    model.train(was_training)
    table = sum(gather(table))
    for i, row in enumerate(rows):
        if not table[i].any() and row["id"] in known:
            table[i] = [known[row["id"]][key] for key in ("nats", "answer_tokens")]
    return float(table[:, 0].sum() / max(1.0, table[:, 1].sum())), table


def describe(model, rows, stats, seed, model_dir=None):
    """What a result was made with; without it a number cannot be compared. Equal hashes mean equal prompts and
    settings of the same videos, wherever these lie. `preset`: what prepare.py wrote into the rows."""
    rows = [edit_videos(row, lambda item: {**item, "video": Path(item["video"]).name}) for row in rows]
    prompts = json.dumps([[(m["role"], m["content"]) for m in row["messages"][:-1]] for row in rows], sort_keys=True)
    presets = sorted({json.dumps(row["preset"], sort_keys=True) for row in rows if "preset" in row})
    return {"model": str(model_dir or "in memory"), "config": asdict(model.cfg), "seed": seed, **stats,
            "preset": json.loads(f"[{','.join(presets)}]" if len(presets) != 1 else presets[0]),
            "prompt_hash": hashlib.sha256(prompts.encode()).hexdigest()[:12]}


def pick_rows(rows, limit, seed=0):
    """A seeded sample in file order: the first `limit` rows would be about a few clips only."""
    if not limit or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng(seed).choice(len(rows), limit, replace=False))]


def evaluate(model, processor, data_file, train_file=None, limit=None, batch_size=32, max_new=None, blind=False,
             seed=0, model_dir=None, log=None):
    """Scores of a data file: {mcq, grounding, loss (of all other tasks), baselines, items (the reward of each asked
    row), texts, meta}, each if it has rows."""
    rows, root = pick_rows(iv3.load_rows(data_file), limit, seed), Path(data_file).parent
    asked = [row for row in rows if row["task"] in ("mcq", "grounding")]
    other = [row for row in rows if row["task"] not in ("mcq", "grounding")]
    result, stats = {}, {}
    if asked:
        texts = answer_rows(model, processor, asked, root, batch_size, max_new, stats=stats, log=log)
        for task, score in (("mcq", score_mcq), ("grounding", score_grounding)):
            part = [i for i, row in enumerate(asked) if row["task"] == task]
            if part:
                result[task] = score([texts[i] for i in part], [asked[i] for i in part], seed)
        result["items"] = {row["id"]: reward(text, row) for text, row in zip(texts, asked)}
        result["texts"] = {row["id"]: text for text, row in zip(texts, asked)}
        elsewhere = answer_rows(model, processor, blind_rows(asked), root, batch_size, max_new,
                                name="blind", log=log) if blind else None
        train = (iv3.load_rows(train_file), Path(train_file).parent) if train_file else ([], None)
        result["baselines"] = baselines(asked, train[0], root, train[1], elsewhere, seed)
    if other:
        loss, table = held_out_loss(model, processor, other, root, batch_size, log=log)
        result["loss"] = {"loss": loss, "loss_n": len(other), "loss_ci": interval(table, [clip_of(r) for r in other])}
    return {**result, "meta": {"data": str(data_file), **describe(model, rows, stats, seed, model_dir)}}


def stage_figures(scores):
    """evaluate()'s scores as one flat block of results.json: mcq, miou, r1_30 … width, each with its _n and _ci."""
    names = [("mcq", "acc", "mcq")] + [("grounding", k, k) for k in ("miou", "r1_30", "r1_50", "r1_70", "width")]
    return {key + part: scores[task][name + part] for task, name, key in names if task in scores
            for part in ("", "_n", "_ci")}


# ------------------------------------------------------------------------------------- a record of every sample

def sample_files(path):
    """A per-sample file (of a directory: samples.jsonl) and the parts that other processes write beside it."""
    path = Path(path) if Path(path).suffix == ".jsonl" else Path(path) / "samples.jsonl"
    return [path, *sorted(path.parent.glob(path.name + ".part*"))]


def read_samples(path):
    """(settings, {(pass, id): record}) of a per-sample file and its parts. A torn last line of a killed process is
    passed over: its batch is computed again."""
    files, settings, records = sample_files(path), None, {}
    need(files[0].is_file(), f"{files[0]}: no such file; `python eval.py --data F.jsonl --out {path}` writes one")
    for file in files:
        for number, line in enumerate(file.read_text(errors="replace").split("\n")[:-1], 1):
            try:
                record = json.loads(line)
                if number == 1 and file == files[0]:
                    settings = record["settings"]
                else:
                    records[record["pass"], record["id"]] = record
            except (ValueError, LookupError, TypeError) as e:
                raise UserError(f"{file}:{number}: not a line of a per-sample file of eval.py ({e!r})") from e
    need(settings is not None, f"{path}: is empty; delete it")
    return settings, records


class SampleLog:
    """`--out`: settings in the first line, then a record of each (pass, row), written as batches finish. Process 0
    appends to the file, process r to its own FILE.part<r>, so that no line is torn by another; finish() makes one file
    of them. A killed run goes on with the batches that are not there."""

    def __init__(self, out, settings, resume=False):
        self.settings, self.records, self.path = settings, {}, sample_files(out)[0]
        if self.path.exists():
            need(resume, f"{self.path}: is there already; go on with --resume, or give another --out")
            old, self.records = read_samples(self.path)
            for key, value in settings.items():
                need(old.get(key) == value, f"{self.path}: was made with {key} {old.get(key)}, this run has {value}; "
                                            "use the same or give another --out")
        gather(None)                                                                     # all have read
        once(lambda: self._write(self.records))
        self.own = self.path.with_name(f"{self.path.name}.part{rank()}") if rank() else self.path

    def _write(self, records):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"settings": self.settings}, *(records[key] for key in sorted(records))]
        iv3.write_atomic(self.path, lambda p: p.write_text("".join(json.dumps(line) + "\n" for line in lines)))
        for part in sample_files(self.path)[1:]:
            part.unlink()

    def known(self, name):
        """{id: record} of a pass. What could not be read then is tried again."""
        return {id: record for (made, id), record in self.records.items()
                if made == name and record.get("text", "") is not None}

    def add(self, name, results):
        """Append [(row, {text | nats, …})], whole lines in one write."""
        lines = []
        for row, result in results:
            if "text" in result:
                text, spans = result["text"], row["task"] == "grounding"
                read = parse_span(text, turn=False) if spans else parse_letter(text, row["options"])
                result = {"text": text, "prediction": read, "reward": reward(text, row), **result}
            record = {"id": row["id"], "pass": name, "task": row["task"], "kind": row.get("kind", row["task"])}
            lines.append(json.dumps({**record, "clip": clip_of(row), **result}) + "\n")
        with open(self.own, "a") as file:
            file.write("".join(lines))

    def finish(self):
        gather(None)                                                                     # all have written
        once(lambda: self._write(read_samples(self.path)[1]))


def stage_samples(directory):
    """{id: row with kind, clip, root, text, reward} of the test items of a recipe's stage, from its scores.json."""
    scores, samples = iv3.read_json(Path(directory) / "scores.json"), {}
    for part in (scores[length] for length in ("short", "long") if length in scores):
        data = Path(part["meta"]["data"])
        data = data if data.is_file() else Path(directory).parent / "data" / data.name   # a run that was moved
        for row in iv3.load_rows(data):
            if (id := row["id"]) in part["items"]:
                samples[id] = {"kind": row["task"], **row, "clip": clip_of(row), "root": data.parent,
                               "text": part["texts"][id], "reward": part["items"][id]}
    return samples


def compared(path):
    """{id: {task, kind, clip, reward}}: one side of --compare. FILE:direct is an agent run's direct answers,
    FILE:agent no memory those of --ablate."""
    path, name = re.fullmatch(r"(.*?)(?::(answers|blind|direct|agent(?: no \w+)?))?", str(path)).groups()
    if (Path(path) / "scores.json").is_file():
        return stage_samples(path)
    records = read_samples(path)[1]
    name = name or ("agent" if any(key[0] == "agent" for key in records) else "answers")
    return {id: record for (made, id), record in records.items() if made == name}


def compare(path_a, path_b, seed=0):
    """Paired bootstrap of two runs over clips: {rows: [{name, a, b, difference (b - a), ci, n, only_a, only_b}] per
    task and kind, not_in_a, not_in_b: ids}. Right is a reward of 0.5 or more: for grounding, an IoU of 0.5."""
    a, b = compared(path_a), compared(path_b)
    both, rows, groups = [id for id in a if id in b], [], defaultdict(list)
    need(both, f"--compare: no item is in both {path_a} and {path_b}")
    for id in both:
        same = [(x["task"], x["kind"], x["clip"]) for x in (a[id], b[id])]
        need(same[0] == same[1], f"--compare: item {id} is {same[0]} in {path_a}, {same[1]} in {path_b}: other data")
        for name in dict.fromkeys((a[id]["task"], " ".join(dict.fromkeys(same[0][:2])))):
            groups[name].append(id)
    for name in sorted(groups):
        x, y = (np.array([side[id]["reward"] for id in groups[name]]) for side in (a, b))
        right_a, right_b = recall(x, 0.5), recall(y, 0.5)
        pairs = np.stack([y - x, np.ones(len(x))], 1)                       # a ratio: Wilson's is for shares alone
        rows.append({"name": name, "a": float(x.mean()), "b": float(y.mean()), "difference": float((y - x).mean()),
                     "ci": interval(pairs, [a[id]["clip"] for id in groups[name]], seed), "n": len(x),
                     "only_a": int((right_a > right_b).sum()), "only_b": int((right_b > right_a).sum())})
    return {"a": str(path_a), "b": str(path_b), "rows": rows, "not_in_a": [id for id in b if id not in a],
            "not_in_b": [id for id in a if id not in b]}


def render_compare(result):
    header = ["", "A", "B", "B - A", "95 % interval", "n", "only A right", "only B right"]
    lines = [[r["name"], number(r["a"]), number(r["b"]), f"{r['difference']:+.3f}",
              "{:+.3f} to {:+.3f}".format(*r["ci"]), r["n"], r["only_a"], r["only_b"]] for r in result["rows"]]
    text = (f"A: {result['a']}\nB: {result['b']}\nmean rewards; 95 % interval of the difference, clips resampled; "
            f"right: a reward of 0.5 or more\n\n{table(header, lines)}")
    for side in "ab":
        if absent := result[f"not_in_{side}"]:
            more = ", …" if len(absent) > 10 else ""
            text += f"\n{len(absent)} items are not in {side.upper()} and not compared: {', '.join(absent[:10])}{more}"
    return text


# ------------------------------------------------------------------------------------------- the agent (§3.1, §3.4)

def agent_row(model, processor, row, root, facts, without=()):
    """One rollout → {text (None: missing), first, hit, overlap, forced, frames, tokens}. first: the answer that
    verification sent back, or the same. Of the cited spans one has an IoU >= 0.3 with the truth (hit), > 0 (overlap);
    None if the row names no evidence. A benchmark's row gives the agent its preset's number and size of frames, and the
    tokens they take; prompts and frame rate are the agent's own."""
    facts = facts or (Path(root) / row["facts"] if "facts" in row else None)
    budget, item, more = mcr_agent.Budget(), media_items(row)[0], {}
    frames = row.get("frames") or item["max_frames"]
    budget = replace(budget, frames=frames, coarse=min(budget.coarse, frames))
    if "frame_tokens" in item:                                   # a stamp and two marks are about 16 tokens more
        more = {"media": {"frame_tokens": item["frame_tokens"]}}
        budget = replace(budget, tokens=budget.tokens + frames // 2 * (item["frame_tokens"][1] + 16))
    live = mcr_agent.LiveModel(model, processor, budget.tokens)
    text = next(i["text"] for i in user_turn(row)["content"] if i["type"] == "text")
    question = row.get("question") or text.rpartition("\n")[2]
    try:
        out = mcr_agent.run_agent(live, Path(root) / clip_of(row), question, row["options"], budget=budget,
                                  facts=facts, without=without, **more)
    except iv3.MediaError:
        hit = 0.0 if row.get("evidence") else None
        return {"text": None, "first": None, "hit": hit, "overlap": hit, "forced": 0, "frames": 0, "tokens": 0}
    best = max((iou(cited, true) for cited in out.evidence for true in row.get("evidence", [])), default=0.0)
    answers = [r["arguments"]["text"] for r in out.trace if r["record"] == "step" and r["action"] == "answer"]
    hit, overlap = (float(best >= 0.3), float(best > 0)) if row.get("evidence") else (None, None)
    return {"text": out.answer, "first": (answers or [out.answer])[0], "hit": hit, "overlap": overlap,
            "forced": bool(out.budget_exhausted), "frames": out.frames, "tokens": out.tokens}


def user_turn(row):
    return next(m for m in row["messages"] if m["role"] == "user")


def direct_row(row):
    """The question asked directly, with the agent's whole frame budget spread over the clip. A benchmark's row says
    itself how it is asked."""
    if row["task"] == "mcq":
        return row
    item = {"type": "video", "video": clip_of(row), "max_frames": row["frames"], "pairs": True}
    return edit_videos({**row, "messages": [user_turn(row), row["messages"][-1]]}, lambda _: item)


def direct_answers(model, processor, rows, root, batch_size=32, max_new=None, log=None):
    """The model's own texts for rows that an agent can be measured on."""
    for row in rows:
        official = row["task"] == "mcq" and "preset" in row
        absent = [k for k in ("kind", "options", "answer", "frames", "evidence") if k not in row]
        wrong = f"has no field '{absent[0]}'" if row["task"] == "mcr" and absent else f"is of task '{row['task']}'"
        need(official or row["task"] == "mcr" and not absent, f"row {row['id']} {wrong}: --agent takes mcr rows that "
             "name their frames and evidence, and a benchmark's rows")
    return answer_rows(model, processor, list(map(direct_row, rows)), root, batch_size, max_new, name="direct", log=log)


def evaluate_agent(model, processor, rows, root=".", facts=None, seed=0, log=None, without=(), direct=None):
    """{unseen, seen, official: {direct, agentic, evidence_hit, evidence_overlap (figures), kinds, groups, mended,
    broken, forced, frames, missing}}: the MCR agent, `without` some of its parts, against the same model answering
    directly (with the texts `direct`), on the same rows with the same number of frames. mended, broken: what
    verification made right, wrong. `official`: a benchmark's rows; evidence figures are over those that name some."""
    direct = direct or direct_answers(model, processor, rows, root, log=log)
    name = " no ".join(["agent", *without])
    own, known, outs = [], log.known(name) if log else {}, [None] * len(rows)
    for row in tqdm(rows[rank()::world()], desc=name, disable=None, leave=False):
        start = time.perf_counter()
        own.append(known.get(row["id"]) or agent_row(model, processor, row, root, facts, without))
        if log and row["id"] not in known:
            log.add(name, [(row, {**own[-1], "ms": (time.perf_counter() - start) * 1e3})])
    for part, done in enumerate(gather(own)):
        outs[part::world()] = done
    result = {}
    groups = ["official" if row["task"] == "mcq" else "unseen" if row.get("unseen", row["kind"] in UNSEEN) else "seen"
              for row in rows]
    for group in ("unseen", "seen", "official"):
        part = [i for i, name in enumerate(groups) if name == group]
        if part:
            mine, ran = [rows[i] for i in part], [outs[i] for i in part]
            agentic = [mcq_reward(out["text"], row) for out, row in zip(ran, mine)]
            change = Counter(b - mcq_reward(out["first"], row) for out, row, b in zip(ran, mine, agentic))
            cited = [i for i in part if outs[i]["hit"] is not None]
            shown = [rows[i] for i in cited]
            values = {"direct": ([mcq_reward(direct[i], rows[i]) for i in part], mine), "agentic": (agentic, mine),
                      "evidence_hit": ([outs[i]["hit"] for i in cited], shown),
                      "evidence_overlap": ([outs[i]["overlap"] for i in cited], shown)}
            result[group] = {"kinds": {name: by_kind(*v) for name, v in values.items()},
                             "groups": {name: by_group(*v) for name, v in values.items()},
                             "forced": sum(out["forced"] for out in ran), "mended": change[1.0], "broken": change[-1.0],
                             "missing": sum(out["text"] is None for out in ran),
                             "frames": float(np.mean([out["frames"] for out in ran]))}
            for name, v in values.items():
                result[group] |= figure(name, *v, seed)
    return result


# ------------------------------------------------------------------------------------------------ tables and results

TASKS = {"mcq": "mcq", "miou": "mIoU", "r1_70": "R1@.7"}                             # figures of a stage, their titles
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31]                              # Student's t of 2, 3, … seeds
GAINS = "what each step changes: points, against the stage before it; nats, against the base"


def mean_half(values):
    """Mean over seeds and half of its 95 % interval; None for a single seed."""
    if len(values) == 1:
        return float(values[0]), None
    return float(np.mean(values)), float(T95[min(len(values), 9) - 2] * np.std(values, ddof=1) / len(values) ** 0.5)


def with_half(mean, half, form):
    return f"{mean:{form}}" + (f" ± {half:{form.strip('+')}}" if half is not None else "")


def number(value):
    return re.sub(r"(?<!\d)0\.", ".", f"{value:.2f}")


def cell(block, key):
    """'.85±.03': a figure and half its interval; empty if it was not measured."""
    if block.get(key) is None:
        return ""
    ci = block.get(f"{key}_ci")
    return number(block[key]) + (f"±{number((ci[1] - ci[0]) / 2)}" if ci else "")


def table(header, rows):
    """Markdown that is aligned enough to be read in a terminal."""
    widths = [max(len(str(line[i])) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(str(c).ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def scored_stages(results):
    """The stages with scores on the test's clips, in the recipe's order, the trivial baselines first."""
    return [s for s in ("baselines", *iv3.STAGES) if {"short", "long"} & results.get(s, {}).keys()]


def gains(results):
    """What each step of the recipe changes, {step: {figure: change}}: a stage against the one before it (the first
    against the strongest trivial baselines), the agent against direct answers; the loss against that of the base."""
    rows = {stage: {"nats": results[stage]["loss"] - results["base"]["loss"]}
            for stage in ("convert", "cpt") if stage in results}
    for before, stage in itertools.pairwise(scored_stages(results)):
        blocks = [(split, results[before].get(split, {}), results[stage].get(split, {})) for split in ("short", "long")]
        rows[stage] = {f"{split[0].upper()} {name}": 100 * (new[key] - old[key]) for split, old, new in blocks
                       for key, name in TASKS.items() if key in old and key in new}
    if "gap_closed" in results.get("opd", {}):
        rows["opd"]["% of gap"] = 100 * results["opd"]["gap_closed"]
    return rows | {f"agent, {group}": {"L mcq": 100 * (block["agentic"] - block["direct"])}
                   for group, block in results.get("agent", {}).items()}


def gains_table(runs):
    """gains() of one run, or the mean of several ± half its 95 % interval -> header, rows."""
    columns = list(dict.fromkeys(key for row in runs[0].values() for key in row))

    def shown(name, key):
        return with_half(*mean_half([run[name][key] for run in runs]), "+.3f" if key == "nats" else "+.1f")
    return ["step", *columns], [[name, *(shown(name, key) if key in row else "" for key in columns)]
                                for name, row in runs[0].items()]


def gains_text(runs):
    seeds = f"± 95 %, {len(runs)} seeds, Student's t; " if len(runs) > 1 else ""
    return f"{seeds}{GAINS}\n\n{table(*gains_table(runs))}"


def gains_of(runs):
    """gains() of finished runs, and their mean printed."""
    files = [Path(run) / "results.json" for run in runs]
    for file in files:
        need(file.is_file(), f"--gains: {file} is not there; `python train.py --out {file.parent}` makes it")
    steps = [gains(iv3.read_json(file)) for file in files]
    for file, step in zip(files, steps):
        need(step.keys() == steps[0].keys(), f"--gains: {file} has other steps than {files[0]}")
    print(gains_text(steps))
    return steps


def render(results):
    """The final tables of a recipe as markdown: one row per stage, the strongest trivial baselines first."""
    keys, splits = {**TASKS, "width": "width"}, ("short", "long")
    rows = [[stage, *(cell(results[stage].get(split, {}), k) for split in splits for k in keys)]
            for stage in scored_stages(results)]
    header = ["stage", *(f"{split[0].upper()} {name}" for split in splits for name in keys.values())]
    single = [("base", "loss"), ("convert", "loss"), ("convert", "cache_ratio"), ("cpt", "loss"), ("opd", "gap_closed")]
    agent = [[group, *(cell(block, k) for k in ("direct", "agentic", "evidence_hit", "evidence_overlap")),
              *(block.get(k, "") for k in ("mended", "broken", "forced", "direct_n"))]
             for group, block in results.get("agent", {}).items()]
    parts = [("S: clips of 12-24 s, L: of 60-120 s; ± half the 95 % interval; width in seconds", header, rows),
             ("losses in nats per answer token", ["figure", "value"],
              [[f"{s} {k}", cell(results[s], k)] for s, k in single if k in results.get(s, {})]),
             (GAINS, *gains_table([gains(results)])),
             ("agent against a direct answer at the same number of frames; forced: the budget ran out; it cites\n"
              "the evidence (IoU from .3 on) or just touches it; verification mended, broke so many answers",
              ["evidence", "direct", "agentic", "cites it", "touches", "mended", "broke", "forced", "n"], agent)]
    return "\n\n".join(f"{title}\n\n{table(header, lines)}" for title, header, lines in parts if lines)


def render_agents(agents):
    """{"full", "no memory", …: evaluate_agent's result} as markdown: by kind, then one row per agent."""
    kinds, names = agents["full"].values(), ("direct", "agentic", "evidence_hit", "evidence_overlap")
    by = [[kind, *(number(k[kind]["value"]) if kind in k else "" for k in map(block["kinds"].get, names)), one["n"]]
          for block in kinds for kind, one in block["kinds"]["direct"].items()]
    parts = [[name, *(x for block in agent.values() for x in (cell(block, "agentic"), cell(block, "evidence_hit"),
                                                            block["forced"], number(block["frames"])))]
             for name, agent in agents.items()]
    what = ("agentic", "cites it", "forced", "frames")
    header = ["agent", *(f"{group} {x}" for group in agents["full"] for x in what)]
    return table(["kind", "direct", "agentic", "cites it", "touches", "n"], by) + (
        "\n\n" + table(header, parts) if len(agents) > 1 else "")


def write_results(results, out):
    """results.json and results.md in `out`, each whole or not at all."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    iv3.write_atomic(out / "results.json", lambda p: p.write_text(json.dumps(results, indent=1)))
    iv3.write_atomic(out / "results.md", lambda p: p.write_text(render(results) + "\n"))


def render_scores(scores):
    """One data file's scores, each beside the strongest trivial baseline on the same items."""
    best, rows, lost = scores.get("baselines", {}), [], []
    names = {"mcq": ["acc"], "grounding": ["miou", "r1_30", "r1_50", "r1_70", "width"], "loss": ["loss"]}
    for task in [t for t in names if t in scores]:
        block, main = scores[task], {"mcq": "mcq", "grounding": "miou"}.get(task)
        for name in names[task]:
            key = "mcq" if name == "acc" else name
            trivial = f"{cell(best, key)} {best.get(key + '_name', '')}"
            rows.append([name, cell(block, name), block[name + "_n"], trivial])
        for kind, own in block.get("kinds", {}).items():
            trivial = best[f"{main}_kinds"][kind]
            rows.append([f"  {kind}", number(own["value"]), own["n"], f"{number(trivial['value'])} {trivial['name']}"])
        if len(block.get("kinds", {})) > 1 and task == "mcq":
            rows.append(["mean of the kinds", cell(block, "macro"), len(block["kinds"]), ""])
        for name, labels in block.get("groups", {}).items():
            rows += [[f"  {name}: {label}", number(own["value"]), own["n"], ""] for label, own in labels.items()]
        for name, value in block.get("official", {}).items():
            if isinstance(value, float) and (name != "macro" or len(block["kinds"]) > 1):
                n = block["official"][names[task][0] + "_n"]
                rows.append([f"by the official rule: {name}", number(value), n, ""])
        if main:
            lost.append(f"{task} counted wrong: {block['unparsed']} unparsed, {block['missing']} missing")
    return "\n".join([table(["score", "value", "n", "strongest baseline"], rows), *lost])


# ---------------------------------------------------------------------------------------------- decode bench (§3.2)

class GrownCache(list):
    """The paper's GQA baseline: per layer a pair k, v (1,G,N,Dh), copied to grow by a token."""
    begin = commit = truncate = lambda *_: None


class EagerGQA(GQA):
    """… and its attention: the G heads of k, v are expanded to H, the scores are written out."""

    def forward(self, x, rope, vision, mask=None, cache=None, layer=0):                      # x (1,1,D) → (1,1,D)
        q, k, v = self.project(x)                                                            # (1,1,H or G,Dh)
        q, k = (rotate(t, *(r[:, :, None] for r in rope)) for t in (q, k))
        cache[layer] = [torch.cat([old, t.transpose(1, 2)], 2) for old, t in zip(cache[layer], (k, v))]
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in cache[layer])   # (1,H,N+1,Dh)
        scores = q.transpose(1, 2) @ k.mT * self.scale
        out = torch.softmax(scores.float(), -1).to(x.dtype) @ v                              # (1,H,1,Dh)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def decode_models(cfg, attention_only, device, dtype):
    """{"m2la", "gqa" (grouped heads, preallocated cache), "gqa_eager": a model} without its vision tower or, with
    `attention_only`, with nothing but attention. Weights are random; GQA's are among M²LA's, so they are held once."""
    P, R, models = cfg.head_dim, (cfg.kv_heads - 1) * cfg.head_dim, {}           # a row: half of GQA's, as released
    with torch.device("meta"):                                                   # shapes without memory
        for kind in ("m2la", "gqa", "gqa_eager"):
            latent = dict(attn="m2la", rope_width=P, ranks=((R, R),) * cfg.layers) if kind == "m2la" else {}
            models[kind] = model = iv3.InternVideo3(replace(cfg, **latent), (0, 1)).to(dtype)
            model.visual = None
            for layer in model.language_model.layers:
                layer.mlp = None if attention_only else layer.mlp
                layer.self_attn.__class__ = EagerGQA if kind == "gqa_eager" else type(layer.self_attn)
            if attention_only:
                model.lm_head = model.language_model.embed_tokens = None
    gb, free = sum(p.nbytes for p in models["m2la"].parameters()) / 1e9, free_memory(device)
    need(gb <= free, f"the weights need {gb:.1f} GB, {free:.1f} are free: use fewer --layers or --attention-only")
    for p in models["m2la"].to_empty(device=device).parameters():
        p.normal_(std=0.02)
    for layer in models["m2la"].language_model.layers:
        layer.self_attn.slots.copy_(torch.arange(P // 2) % (cfg.head_dim // 2))
    for model in models.values():
        model.load_state_dict(models["m2la"].state_dict(), strict=False, assign=True)
    return models


def decode_step(model, context, eager):
    """→ a function that computes the token after `context` random cached ones, 15 of 16 of them vision; the cache. On a
    GPU it replays a CUDA graph, except for the eager kind: launching kernels would take longer than most of them."""
    cfg, lm, device = model.cfg, model.language_model, model.device
    like = dict(device=device, dtype=lm.norm.weight.dtype)
    ids, positions = torch.full((1, 1), 2, device=device), torch.full((3, 1, 1), context, device=device)
    x, rope = torch.randn(1, 1, cfg.hidden, **like), mrope(positions, cfg.head_dim, cfg.theta, cfg.mrope_sections)
    if eager:
        cache = GrownCache(torch.randn(2, 1, cfg.kv_heads, context, cfg.head_dim, **like) for _ in lm.layers)
    else:
        vision = vision_of(0, context).to(device)
        n = int(vision.sum())
        cache = model.new_cache(1, context + 1 - n * (cfg.attn == "m2la"), n + 1)
        for rows in sum(cache.rows, []):
            rows.normal_()
        cache.begin(vision)
        cache.commit()

    def step():
        if lm.embed_tokens is not None:
            return model.logits(model(ids, positions, cache=cache))
        cache.begin(ids < 2)
        return lm.layers[0].self_attn(x, rope, ids < 2, cache=cache)

    if eager or device.type == "cpu":
        return step, cache
    for _ in range(2):                                                           # compiles; a graph can only record
        step()
        cache.truncate(context)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return lambda: (graph.replay(), out)[1], cache


def free_memory(device):                                                         # GB
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / 1e9
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 1e9


def timed(run, device, clock=time.perf_counter):
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = clock()
    run()
    wait()
    return (clock() - start) * 1e3                                               # ms


def decode_row(models, context, steps, device, copied):
    """A context's figures. Kinds that fit into memory together take turns, so that a busy machine slows them all; one
    that does not fit alone is left out, with a line that says so. `copied`: GB/s of a copy, the limit of any step."""
    cfg, size = models["gqa"].cfg, models["gqa"].language_model.norm.weight.element_size()
    kv = 2 * cfg.kv_heads * cfg.head_dim * context * size / 1e9                  # GB in a layer
    gb = {"m2la": kv * cfg.layers / 2, "gqa": kv * cfg.layers,
          "gqa_eager": kv * (cfg.layers + 1 + cfg.heads / cfg.kv_heads)}         # and the copies of one layer
    free, times = 0.95 * free_memory(device), {}
    fit = [kind for kind in gb if gb[kind] <= free]
    for kind in gb:
        if kind not in fit:
            print(f"context {context}: no {kind}: its cache needs {gb[kind]:.1f} GB, {free:.1f} are free")
    for group in [fit] if sum(gb[kind] for kind in fit) <= free else [[kind] for kind in fit]:
        runs = {kind: decode_step(models[kind], context, kind == "gqa_eager") for kind in group}
        for _ in range(steps + 3):                                               # three to warm up
            for kind, (step, cache) in runs.items():
                cache.truncate(context)                                          # the same token again
                times.setdefault(kind, []).append(timed(step, device))
        runs = step = cache = None                                               # frees their memory
    row = {"context": context} | {f"{k}_ms": float(np.median(times[k][3:])) if k in times else None for k in gb}
    for kind in (kind for kind in ("m2la", "gqa") if kind in times):
        lm, ms = models[kind].language_model, row[f"{kind}_ms"]
        unread = 0 if cfg.tied or lm.embed_tokens is None else lm.embed_tokens.weight.nbytes
        rate = ((sum(p.nbytes for p in models[kind].parameters()) - unread) / 1e9 + gb[kind]) / ms * 1e3
        row |= {f"{kind}_tokens_s": 1e3 / ms, f"{kind}_cache_mb": gb[kind] * 1e3, f"{kind}_gb_s": rate,
                f"{kind}_of_copy": rate / copied}
    for name, kind in (("speedup", "gqa"), ("speedup_over_eager", "gqa_eager")):
        row[name] = row[f"{kind}_ms"] / row["m2la_ms"] if kind in times and "m2la" in times else None
    return row | {"cache_ratio": gb["m2la"] / gb["gqa"]}


@torch.no_grad()
def bench_decode(args):
    contexts = [int(c) if c.strip().isdigit() else 0 for c in args.contexts.split(",")]
    need(min(contexts) > 0, f"--contexts {args.contexts}: takes positive numbers such as 1024,4096")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(args.seed)
    cfg = iv3.Config.preset(args.preset)
    layers = 1 if args.attention_only else args.layers or cfg.layers
    models = decode_models(replace(cfg, layers=layers, deepstack=()), args.attention_only, device, dtype)
    source, target = torch.ones(2, 2 ** 30 if device == "cuda" else 2 ** 28, dtype=torch.uint8, device=device)
    ms = np.median([timed(lambda: target.copy_(source), device) for _ in range(10)])
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = (torch.cuda.mem_get_info()[1] if device == "cuda" else pages) / 1e9
    copied, source, target, rows = 2 * len(source) / 1e6 / float(ms), None, None, []     # GB/s, read and written
    for context in tqdm(contexts, disable=None, leave=False):
        row = decode_row(models, context, args.steps, device, copied)
        rows += [{"name": f"{args.preset} {context}", **row}] if row["m2la_ms"] or row["gqa_ms"] else []
    keys = dict.fromkeys(key for row in rows for key in row if key not in ("name", "context"))
    print(table(["", *(f"{row['context']}" for row in rows)],
                [[key, *("" if row.get(key) is None else f"{row[key]:.4g}" for row in rows)] for key in keys]))
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"env": {"device": name, "torch": torch.__version__, "dtype": str(dtype), "preset": args.preset, "batch": 1,
                    "layers": layers, "attention_only": args.attention_only, "steps": args.steps, "seed": args.seed,
                    "copy_gb_s": copied, "memory_gb": memory,
                    "measures": "median of a new token, random weights and cache"}, "rows": rows}


# --------------------------------------------------------------------------------------- the agent's live cache (§3.4)

def vision_of(start, stop):
    """Which of the bench's tokens are vision (1,T): 15 of 16, as in a long video."""
    return torch.arange(start, stop)[None] % 16 != 0


def prefilled(model, cache, start, stop):
    """Tokens start … stop of a made-up rollout through the decoder → logits (V,) of the next one."""
    cfg = model.cfg
    ids = torch.arange(start, stop)[None] * 7919 % (cfg.vocab - 2) + 2                       # (1,T)
    ids = torch.where(vision_of(start, stop), 1, ids).to(model.device)
    positions = torch.arange(start, stop, device=model.device).expand(3, 1, -1)
    return model.logits(model(ids, positions, cache=cache)[0, -1])


def agent_cache_rows(models, first, new, steps, device):
    """A row for each step of a rollout whose context starts with `first` tokens and grows by `new` a step. Summed over
    steps: seconds and MB written of the live cache, which prefills what is new, and of a context rebuilt at each step.
    `difference`: of the two caches' rows, at most. A time is the best of three; on a CPU it is the process's own, which
    other work on the machine hardly changes."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    rows, live, sums, end = [], {}, Counter(), first + new * steps
    seen = int(vision_of(0, end).sum())
    for kind, model in models.items():
        live[kind] = model.new_cache(1, end - seen if kind == "m2la" else end, seen)
        prefilled(model, model.new_cache(1, 64), 0, 64)                                      # warms up
    for step in range(steps + 1):
        start, stop = (first + new * (step - 1) if step else 0), first + new * step
        row = {"step": step, "context": stop}
        for kind, model in models.items():
            rebuilt = model.new_cache(1, stop)
            for way, cache, begin in (("live", live[kind], start), ("rebuilt", rebuilt, 0)):
                times, run = [], functools.partial(prefilled, model, cache, begin, stop)
                for _ in range(3):
                    cache.truncate(begin)
                    times.append(timed(run, device, clock) / 1e3)
                sums[kind, way, "s"] += min(times)
                sums[kind, way, "written_mb"] += cache.nbytes() / stop * (stop - begin) / 1e6
            pairs = [(a, b) for i in range(model.cfg.layers) for a, b in zip(live[kind].view(i), rebuilt.view(i))]
            row |= {f"{kind}_mb": rebuilt.nbytes() / 1e6,
                    f"{kind}_difference": max(float((a - b).abs().max()) for a, b in pairs)}
        rows.append(row | {"_".join(key): value for key, value in sums.items()})
    return rows


@torch.no_grad()
def bench_agent_cache(args):
    need(not args.attention_only, "--attention-only belongs to --bench decode")
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(args.seed)
    cfg = iv3.Config.preset(args.preset)
    cfg = replace(cfg, layers=args.layers or cfg.layers, deepstack=())
    models = {kind: model for kind, model in decode_models(cfg, False, device, dtype).items() if kind != "gqa_eager"}
    rows = agent_cache_rows(models, args.first, args.new, args.steps, device)
    keys = ["step", "context", *(f"{kind}_{what}" for what in ("live_s", "rebuilt_s", "mb", "live_written_mb",
                                                               "rebuilt_written_mb") for kind in models)]
    print(table(keys, [[f"{row[key]:.4g}" for key in keys] for row in rows]))
    return {"env": {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(), "seed": args.seed,
                    "dtype": str(dtype), "preset": args.preset, "layers": cfg.layers, "first": args.first,
                    "new": args.new, "measures": "prefill by the decoder, summed over steps; random weights"},
            "rows": [{"name": f"step {row['step']}", **row} for row in rows]}


# ------------------------------------------------------------------------------------------ conversion bench (§3.2)

PUBLISHED = dict(qk_norm="const", rope_basis="real", slots="uniform", gain=False, metric="balance", modality="shared",
                 budget="uniform", heal=0)
IDEAS = {"exact norms": dict(qk_norm="exact"), "unitary basis": dict(rope_basis="unitary"), "gains": dict(gain=True),
         "slots by harm": dict(slots="realloc"), "query-aware": dict(metric="qa"),
         "a basis per modality": dict(modality="segments"), "greedy by energy": dict(budget="energy")}
DEFAULT = {name: getattr(ConvertSpec, name) for name in PUBLISHED}
WITHOUT = {"exact norms": dict(qk_norm="affine"), "unitary basis": dict(rope_basis="real"), "gains": dict(gain=False),
           "slots by harm": dict(slots="uniform"), "query-aware": dict(metric="balance"),
           "a basis per modality": dict(modality="shared"), "greedy ranks": dict(budget="uniform"),
           "measured damage": dict(budget="energy"), "healing": dict(heal=0)}
HEALED = "transmla + healing", "care + healing"
CALIBRATION = {"cpt_text.jsonl": 80, "cpt_image.jsonl": 120, "cpt_video.jsonl": 600}        # rows of each file


def conversion_rows():
    """{name: choices}: the neighbours, one idea more at a time, the default with one idea less, paper, default."""
    rows, choices = {"transmla": PUBLISHED}, dict(PUBLISHED)
    rows["care"] = {**PUBLISHED, "qk_norm": "exact", "metric": "identity", "budget": "energy"}
    for name, change in IDEAS.items():
        rows[f"+ {name}"] = choices = {**choices, **change}
    rows |= {f"- {name}": {**DEFAULT, "heal": 0, **change} for name, change in WITHOUT.items()}
    rows |= {name: {**rows[name.split()[0]], "heal": ConvertSpec.heal} for name in HEALED}
    return {**rows, "paper": {**PUBLISHED, "qk_norm": "affine", "modality": "adapters"}, "default": DEFAULT}


def spec_of(choices, gqa, share):
    """A ConvertSpec that leaves `share` of the GQA cache. Below a half, half as many slots where they may be chosen."""
    row = 2 * gqa.kv_heads * gqa.head_dim
    P = gqa.head_dim if share >= 0.5 or choices["slots"] == "uniform" else gqa.head_dim // 2
    R = int(share * row) - P
    need(R >= 1, f"--cache-share {share}: no latent is left beside the {P} values of the RoPE key; above "
                 f"{P / row:.2f} there is")
    return ConvertSpec(P, (R, R), step=min(16, row // 16), **choices)


def answer_logp(model, samples):
    """log-probabilities (n,V) at all answer tokens of a batch of Encoded."""
    hidden = model(**iv3.collate(samples, 0, model.device))
    at = [(b, int(t) - 1) for b, sample in enumerate(samples) for t in sample.answer.nonzero()]
    return torch.log_softmax(model.logits(hidden[tuple(zip(*at))]).float(), -1)


def cache_ratio(spec, layers, tokens):
    """Cached values of so many (text, vision) tokens, relative to those of the GQA layers."""
    used = sum(n * (rank + spec.rope_width) for i in range(len(layers)) for n, rank in zip(tokens, spec.layer_ranks(i)))
    return used / (sum(tokens) * sum(2 * layer.kv_heads * layer.head_dim for layer in layers))


def divergence(predict, batches):
    """predict(batch) → log-probabilities (n,V) → a function: mean KL (nats per row) of what is predicted then from what
    is predicted now."""
    before = [predict(batch) for batch in batches]

    def damage():
        pairs = zip(before, map(predict, batches))
        kl = [(old.exp() * (old - new)).sum(-1) for old, new in pairs]
        return float(torch.cat(kl).mean())
    return damage


class ConversionBench:
    """Converts one model again and again, from one calibration, and measures on held-out rows."""

    @torch.no_grad()
    def __init__(self, model, processor, root, seed):
        self.model, self.processor, self.root = model.eval(), processor, root
        self.layers = model.language_model.layers
        self.gqa = [layer.self_attn for layer in self.layers]
        rows = [row for name, n in CALIBRATION.items() for row in pick_rows(iv3.load_rows(root / name), n, seed)]
        batches = [list(s) for _, s in encoded_batches(processor, rows, root, 16, False, "calibration", [])]
        with Calibration(self.gqa, raw=True) as calibration:
            for samples in batches:
                batch = iv3.collate(samples, 0, model.device)
                calibration.valid = batch["valid"]
                model(**batch)
        self.predict = functools.partial(answer_logp, model)
        self.moments, self.damage, self.batches = calibration.moments, divergence(self.predict, batches[::10]), batches
        self.rows = iv3.load_rows(root / "val.jsonl")
        self.clips = np.unique([clip_of(row) for row in self.rows], return_inverse=True)[1]
        self.base = held_out_loss(model, processor, self.rows, root)[1]          # (n,2) nats, tokens
        held = [s for _, batch in encoded_batches(processor, self.rows, root, 16, False, "held-out", []) for s in batch]
        vision = sum(torch.isin(s.ids, torch.tensor(model.vision_ids)).sum() for s in held)
        self.tokens = sum(len(s.ids) for s in held) - int(vision), int(vision)
        self.calls, batch = [], iv3.collate(held[:16], 0, model.device)          # what the layers see of one batch
        hooks = [gqa.register_forward_hook(lambda m, args, kwargs, out: self.calls.append((args, kwargs, out)),
                                           with_kwargs=True) for gqa in self.gqa]
        model(**batch)
        self.valid = batch["valid"]
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def run(self, choices, share):
        gqa, start = self.gqa[0], time.perf_counter()
        spec = spec_of(choices, gqa, share)
        order = np.random.default_rng(0).permutation(len(self.batches))               # they are sorted by length
        spec = convert_layers(self.layers, self.moments, spec, self.damage, self.predict,
                              itertools.cycle(self.batches[i] for i in order))
        seconds = time.perf_counter() - start
        table = held_out_loss(self.model, self.processor, self.rows, self.root)[1]
        change, tokens = (table - self.base)[:, 0], self.base[:, 1]
        mean = change.sum() / tokens.sum()
        se = np.sqrt((np.bincount(self.clips, change - mean * tokens) ** 2).sum()) / tokens.sum()    # over clips
        error = np.mean([relative_error(layer.self_attn(*args, **kwargs)[self.valid], out[self.valid])
                         for layer, (args, kwargs, out) in zip(self.layers, self.calls)])
        for layer, source in zip(self.layers, self.gqa):
            layer.self_attn = source
        return {"loss_change": float(mean), "loss_se": float(se), "out_err": float(error),
                "cache_ratio": cache_ratio(spec, self.gqa, self.tokens), "seconds": seconds}


def relative_error(out, target):
    return float((out - target).norm() / target.norm())


class RandomLayer:
    """One layer of a preset's shape with random weights, on tokens whose text and vision have other statistics."""

    @torch.no_grad()
    def __init__(self, cfg, seed):
        torch.manual_seed(seed)
        self.cfg, D = cfg, cfg.hidden
        self.gqa = GQA(D, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.eps)
        self.mix = torch.randn(2, D // 4, D) * (torch.arange(D // 4) + 1.0)[:, None] ** -0.5 / 4
        T = min(1024, 16 * cfg.head_dim)
        samples = 2 * 10 * (cfg.kv_heads - 1) * cfg.head_dim // T + 1            # 10 R tokens of each modality
        with Calibration([self.gqa], raw=True) as calibration:
            for _ in tqdm(range(samples), desc="random layer", disable=None, leave=False):
                self.gqa(*self.sample(T))
        self.moments, self.held = calibration.moments, self.sample(T)
        self.target = self.gqa(*self.held)

    def sample(self, T):
        """x (1,T,D), rope, vision: 64 words, 64 patches of a frame (8 x 8), and so on."""
        t = torch.arange(T)
        vision = t // 64 % 2 == 1
        positions = torch.stack([t, t // 8 % 8 + t // 64 * 64, t % 8 + t // 64 * 64])
        positions = torch.where(vision, torch.cat([t[None] // 64 * 64, positions[1:]]), t)[:, None]
        x = torch.randn(T, self.mix.shape[1])
        x = torch.where(vision[:, None], x @ self.mix[1], x @ self.mix[0]) + 0.1 * torch.randn(T, self.cfg.hidden)
        rope = mrope(positions, self.cfg.head_dim, self.cfg.theta, self.cfg.mrope_sections)
        return x[None], rope, vision[None]

    @torch.no_grad()
    def run(self, choices, share):
        start, layer = time.perf_counter(), torch.nn.Module()
        layer.self_attn = self.gqa
        convert_layers([layer], self.moments, spec_of(choices, self.gqa, share))
        seconds = time.perf_counter() - start
        return {"random_out_err": relative_error(layer.self_attn(*self.held), self.target), "random_seconds": seconds}


def bench_conversion(args):
    root = Path(args.data_dir)
    if not (root / "val.jsonl").is_file():
        command("data/toy/prepare.py", "--out", root, "--seed", args.seed)
    model, processor = iv3.open_model(args.model or Path(__file__).parent / "data/toy/weights/base")
    need(model.cfg.attn == "gqa", f"--model {args.model}: its attention is {model.cfg.attn} already; give a GQA model")
    bench = ConversionBench(model, processor, root, args.seed)
    random = RandomLayer(iv3.Config.preset(args.preset), args.seed) if args.preset != "tiny" else None
    rows, total = [], bench.base.sum(0)
    header = ["loss_change", "loss_se", "out_err", "cache_ratio", "seconds", "loss_change_30", "loss_se_30",
              "cache_ratio_30", "seconds_30"] + ["random_out_err", "random_seconds"] * bool(random)
    for name, choices in tqdm(conversion_rows().items(), disable=None, leave=False):
        row = {"name": name, **bench.run(choices, 0.5)} | (random.run(choices, 0.5) if random else {})
        if name in ("transmla", "care", "- healing", *HEALED, "paper", "default"):
            row |= {f"{key}_30": value for key, value in bench.run(choices, 0.3).items()}
        rows.append(row)
    lines = [[row["name"], *(f"{row[key]:.4f}" if key in row else "" for key in header)] for row in rows]
    print(f"loss_change: nats per answer token over the source's {total[0] / total[1]:.4f}, at half of the cache (_30: "
          f"30 %); + one idea more at a time, - the default without one\n\n{table(['name', *header], lines)}")
    return {"env": {"torch": torch.__version__, "threads": torch.get_num_threads(), "seed": args.seed,
                    "model": str(args.model or "shipped base"), "random_layer": args.preset if random else None,
                    "base_loss": total[0] / total[1], "held_out_tokens": bench.tokens,
                    "calibration_tokens": bench.moments[0].count.tolist()}, "rows": rows}


# ------------------------------------------------------------------------------------------ ablation bench (paper: §6)

LONG_DATA = "sft_long.jsonl curated/curated.jsonl sft_agent.jsonl"                   # all that is about long clips
# Left out → the stage after which it is measured, and the runs of train.py that lead there from the full recipe
ABLATIONS = {
    "- CPT": ("sft_long", ["--stage sft --phase short --init {full}/convert", "--stage sft --phase long"]),
    "- long context": ("sft_long", ["--stage sft --phase long --init {full}/sft_short --max-frames 48"]),
    "- long-video data": ("sft_long", ["--stage sft --phase long --init {full}/sft_short --without " + LONG_DATA]),
    "- RL": ("opd", ["--stage opd --init {full}/sft_long --teacher {full}/teacher"]),
    "- OPD": ("opd", [])}                                                            # the full recipe after RL
PAPER = {"- CPT": -2.1, "- long context": -1.4, "- long-video data": -2.0}           # points, mean of four long sets
FIGURES = [f"{length} {task}" for task in ("mcq", "miou") for length in ("long", "short")]


def ablation_scores(out, seed, more):
    """Of one seed: gains() of the full recipe and {name: {figure: points}}: the full recipe where a part is measured,
    and the difference without the part. Kept in seedN.json; what is trained and scored is not done again."""
    full, figures, kept = out / f"seed{seed}" / "full", {}, out / f"seed{seed}.json"
    if kept.is_file():
        return iv3.read_json(kept)

    def train(directory, *flags):
        command("train.py", *flags, "--out", directory, "--seed", seed, *more)

    def points(directory):
        file = directory / "scores.json"
        if not file.is_file():
            model, processor = iv3.load_model(directory, "cuda" if torch.cuda.is_available() else "cpu")
            tests = {length: full / "data" / f"test_{length}.jsonl" for length in ("short", "long")}
            scores = {length: evaluate(model, processor, test, seed=seed, model_dir=directory)
                      for length, test in tests.items()}
            iv3.write_atomic(file, lambda p: p.write_text(json.dumps(scores)))
        blocks = {length: stage_figures(iv3.read_json(file)[length]) for length in ("short", "long")}
        return {name: 100 * blocks[name.split()[0]][name.split()[1]] for name in FIGURES}
    if not (full / "results.json").is_file():
        train(full)
    for name, (stage, runs) in ABLATIONS.items():
        whole = figures[f"full, {stage}"] = points(full / stage)
        directory = full.with_name(name[2:].replace(" ", "_"))
        for flags in runs:
            done = f"{stage if flags is runs[-1] else 'sft_short'}/config.json"
            if not (directory / done).is_file():
                train(directory, *(flag.format(full=full) for flag in flags.split()), "--data-dir", full / "data")
        without = points(directory / stage if runs else full / "rl")
        figures[name] = {key: without[key] - whole[key] for key in FIGURES}
    found = gains(iv3.read_json(full / "results.json")), figures
    iv3.write_atomic(kept, lambda p: p.write_text(json.dumps(found, indent=1)))
    return found


def bench_ablation(args):
    """Each part of the recipe left out, over seeds: each with data, questions and a test of its own."""
    out, rows, lines = Path(args.out or "runs/ablation"), [], []
    made = out / "recipe.txt"
    if made.is_file():
        need(made.read_text() == args.recipe, f"{out}: has runs with --recipe={made.read_text()!r}; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    made.write_text(args.recipe)
    steps, runs = zip(*(ablation_scores(out, seed, args.recipe.split()) for seed in range(args.seeds)))
    for name in runs[0]:
        row, line = {"name": name, "paper": PAPER.get(name)}, [name]
        for key in FIGURES:
            mean, half = mean_half([run[name][key] for run in runs])
            row |= {key.replace(" ", "_"): mean, key.replace(" ", "_") + "_half": half}
            line.append(with_half(mean, half, ".1f" if name.startswith("full") else "+.1f"))
        rows.append(row)
        lines.append([*line, f"{PAPER[name]:+.1f}" if name in PAPER else ""])
    print(f"{gains_text(steps)}\n\npoints; what is left out: the difference to the full recipe\n\n"
          + table(["", *FIGURES, "the paper, long"], lines))
    env = {"torch": torch.__version__, "seeds": args.seeds, "recipe": args.recipe}
    return {"env": env, "rows": rows, "steps": steps}


# --------------------------------------------------------------------------------------------------------- the report

COLOURS = {"m2la": "tab:blue", "gqa": "tab:orange", "gqa_eager": "tab:gray"}
NAMES = {"m2la": "M²LA", "gqa": "good GQA", "gqa_eager": "eager GQA"}
STYLE = """body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}table{border-collapse:
collapse;margin:.5em 0}th,td{border:1px solid #ddd;padding:.2em .6em;text-align:left;vertical-align:top}th{background:
#f4f4f4}td img{height:96px;image-rendering:pixelated;display:block}p img{max-width:100%}code{background:#f4f4f4}"""


def plain(text):
    """A text of a model or a file, for both pages: what could be markup becomes an entity."""
    return re.sub(r"[^\w\s.,:;?()+/=%±→×…'-]", lambda m: f"&#{ord(m[0])};", " ".join(str(text).split()))


def read_metrics(run):
    """metrics.jsonl → {stage: {figure: array over steps}}"""
    lines, stages = Path(run) / "metrics.jsonl", defaultdict(lambda: defaultdict(list))
    for line in lines.read_text().splitlines() if lines.is_file() else ():
        for key, value in json.loads(line).items() if line.endswith("}") else ():             # the last may be torn
            if key != "stage":
                stages[json.loads(line)["stage"]][key].append(value)
    return {stage: {key: np.array(values) for key, values in figures.items()} for stage, figures in stages.items()}


def recipe_rows(run, metrics):
    """One line per trained stage, from its stage.json and the first and last tenth of its metrics."""
    for stage in dict.fromkeys([*metrics, *iv3.STAGES]):
        record = Path(run) / stage / "stage.json"
        done = iv3.read_json(record) if record.is_file() else {}
        if "recipe" in done:
            r, moved = done["recipe"], []
            for key in ("loss", "reward"):
                if len(values := metrics.get(stage, {}).get(key, ())):
                    tenth = max(1, len(values) // 10)
                    moved.append(f"{key} {values[:tenth].mean():.3g} → {values[-tenth:].mean():.3g}")
            rate = f"{r['lr']:g}" + (f", Muon {r['muon']:g}" if r["muon"] else "")
            mix = ", ".join(f"{Path(file).stem} {share:g}" for file, share in r["mix"].items())
            yield [stage, Path(done["inherits"]).name, r["steps"], rate, f"{r['packs']} × {r['branches']}",
                   f"{done['tokens'] / 1e6:.2f} M", f"{done['seconds'] / 60:.1f}", done["processes"],
                   ", ".join(moved), mix]


def drawn(panels, columns, draw, size=(3.6, 2.6)):
    """An SVG with draw(axes, panel) for each panel; None without matplotlib: the tables stand alone then."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = math.ceil(len(panels) / columns)
    with rc_context({"svg.hashsalt": "report", "font.size": 9}):
        figure = Figure((size[0] * columns, size[1] * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, panel in zip(axes, panels):
            ax.grid(alpha=0.3)
            draw(ax, panel)
        for ax in axes[len(panels):]:
            ax.remove()
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def draw_stage(ax, panel):
    """A stage's loss, in RL its reward (a policy gradient's loss says nothing); bold: a running mean."""
    stage, figures = panel
    key = "reward" if "reward" in figures else "loss"
    values, steps = figures[key], figures["step"]
    width = max(1, len(values) // 20)
    ax.plot(steps, values, alpha=0.3, lw=0.8, color="tab:blue")
    ax.plot(steps[width // 2:][:len(values) - width + 1], np.convolve(values, np.ones(width) / width, "valid"), lw=1.6,
            color="tab:blue")
    ax.set(title=f"{stage}: {'reverse KL' if stage == 'opd' else key}", xlabel="step")
    if key == "loss" and values.min() > 0:
        ax.set_yscale("log")


def cache_limits(bench):
    """{kind: (MB of cache a token, tokens that fit)}: the device's memory less the weights; None if not known."""
    memory, limits = bench["env"].get("memory_gb"), {}
    for kind in ("m2la", "gqa"):
        for row in [row for row in bench["rows"] if row.get(f"{kind}_cache_mb")][:1]:
            cache = row[f"{kind}_cache_mb"]
            weights = row[f"{kind}_gb_s"] * row[f"{kind}_ms"] - cache                               # MB, read in a step
            limits[kind] = cache / row["context"], memory and (memory * 1e3 - weights) * row["context"] / cache
    return limits


def draw_time(ax, bench):
    for kind, name in NAMES.items():
        rows = [row for row in bench["rows"] if row.get(f"{kind}_ms")]
        contexts = [row["context"] for row in rows]
        ax.plot(contexts, [row[f"{kind}_ms"] for row in rows], "o-", color=COLOURS[kind], label=name)
        if kind != "gqa_eager":
            limit = [row[f"{kind}_ms"] * row[f"{kind}_of_copy"] for row in rows]
            ax.plot(contexts, limit, ":", color=COLOURS[kind], label=f"{name}: the limit")
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", xlabel="cached tokens", title="ms a new token")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def draw_bytes(ax, bench):
    for kind, (per_token, most) in cache_limits(bench).items():
        last = max(row["context"] for row in bench["rows"] if row.get(f"{kind}_ms"))
        contexts = [row["context"] for row in bench["rows"] if row["context"] <= last]
        ax.plot(contexts, [c * per_token for c in contexts], "o-", color=COLOURS[kind], label=NAMES[kind])
        if most and most > last:
            ax.plot([last, most], [last * per_token, most * per_token], ":", color=COLOURS[kind])
            ax.axhline(most * per_token, color="tab:red", lw=0.8, label="memory" if kind == "m2la" else None)
    ax.set(xscale="log", yscale="log", xlabel="cached tokens", title="MB of KV cache")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def decode_part(bench, images):
    env, rows, limits = bench["env"], [], cache_limits(bench)
    for row in bench["rows"]:
        limit = [row[f"{k}_ms"] * row[f"{k}_of_copy"] if row.get(f"{k}_ms") else None for k in ("m2la", "gqa")]
        values = [*(row.get(f"{k}_ms") for k in NAMES), *limit, *(row.get(f"{k}_cache_mb") for k in ("m2la", "gqa"))]
        rows.append([row["context"], *("does not fit" if v is None else f"{v:.3g}" for v in values)])
    header = ["cached tokens", *(f"{name}, ms" for name in NAMES.values()), "M²LA, limit", "GQA, limit", "M²LA, MB",
              "GQA, MB"]
    made = [env["preset"], f"{env['layers']} layers", *["attention alone"] * env["attention_only"],
            env["dtype"].removeprefix("torch."), env["device"]]
    yield (f"Time of a new token and bytes of the cache: {plain(', '.join(made))}. Limit, in ms: all bytes that a step "
           f"must read, at the {env['copy_gb_s']:.3g} GB/s of a copy on this device.")
    fits = [f"{most / 1e6:.3g} M tokens with {NAMES[kind]}" for kind, (_, most) in limits.items() if most]
    if fits:
        yield f"Its {env['memory_gb']:.0f} GB, less the weights, hold the cache of {', '.join(fits)}."
    yield table(header, rows)
    if svg := drawn([draw_time, draw_bytes], 2, lambda ax, draw: draw(ax, bench), (5.4, 2.8)):
        images["decode.svg"] = svg
        yield "![decode](report/decode.svg)"


def conversion_part(bench, images):
    keys = [key for key in dict.fromkeys(key for row in bench["rows"] for key in row) if "seconds" not in key]
    lines = [[row.get(key, "") for key in keys] for row in bench["rows"]]
    yield (f"What each way to convert costs, without training, on {plain(bench['env']['model'])}: + one idea more at a "
           "time, - the default with one less; loss change in nats per answer token over the source.")
    yield table([key.replace("_", " ") for key in keys],
                [[plain(f"{v:.3f}" if isinstance(v, float) else v) for v in line] for line in lines])


def picked_items(samples):
    """A seeded choice of five right and wrong answers in turn, each of another kind where there is one."""
    ids, picked = list(np.random.default_rng(0).permutation(sorted(samples))), []
    for n in range(min(5, len(ids))):
        kinds = {samples[id]["kind"] for id in picked}
        picked.append(min((id for id in ids if id not in picked), key=lambda id: (
            (samples[id]["reward"] >= 0.5) != (n % 2 == 0), samples[id]["kind"] in kinds)))
    return [samples[id] for id in picked]


def item_part(number, row, images):
    """A test item: six frames spread over its clip, and those that the question, truth and prediction name."""
    text, options = user_turn(row)["content"], row.get("options", [])
    question = next(i["text"] for i in text if i["type"] == "text").split("\n")[-1]
    spans = {"true": row["answer"], "predicted": parse_span(row["text"])} if row["task"] == "grounding" else {}
    start, end = window(media_items(row)[0], row, row["root"])
    asked = [float(t) + later for t in re.findall(r"(\d+(?:\.\d+)?) second", question) for later in (0, 0.5)]
    moments = [*asked, *((a + b) / 2 for a, b in filter(None, spans.values()))]
    spread, heads, cells = np.linspace(start, end, 7)[:-1] + (end - start) / 12, [], []
    for n, t in enumerate(sorted({*np.round(spread, 1).tolist(), *(t for t in moments if start <= t < end)})):
        frame = iv3.read_video(Path(row["root"]) / clip_of(row), t, None, 2.0, 1).frames[0]
        scale = max(1, 96 // frame.shape[0])
        images[f"item{number}_{n}.png"] = mcr_agent.png(frame.repeat(scale, 0).repeat(scale, 1))
        inside = [name for name, span in spans.items() if span and span[0] <= t <= span[1]] + ["asked"] * (t in asked)
        heads.append(f"{t:.1f} s {', '.join(inside)}")
        cells.append(f"![{t:.1f} s](report/item{number}_{n}.png)")
    truth = ("From {:.1f} to {:.1f} seconds.".format(*row["answer"]) if spans else
             f"{options[LETTERS.index(row['answer'])]} ({row['answer']})")
    verdict = f"IoU {row['reward']:.2f}" if spans else "right" if row["reward"] else "wrong"
    facts = {"options": "; ".join(map("{}. {}".format, LETTERS, options)), "truth": truth,
             "prediction": f"{'(the video could not be read)' if row['text'] is None else row['text']} → {verdict}"}
    yield f"### {number + 1}. {plain(question)}"
    yield table(["item", plain(f"{row['id']}, {row['kind']}")], [[k, plain(v)] for k, v in facts.items() if v])
    yield table(heads, [cells])


def report_parts(run, images):
    """The report as markdown blocks; the pictures that it names go into `images`."""
    metrics = read_metrics(run)
    rows = list(recipe_rows(run, metrics))
    need(rows or metrics, f"--report {run}: no run is there (no metrics.jsonl); `python train.py --out {run}` is one")
    yield f"# {plain(run.resolve().name)}"
    yield f"Made by `python eval.py --report {plain(run)}` from the files of the run; no model was asked."
    yield "## Results"
    if (run / "results.json").is_file():
        yield html.escape(render(iv3.read_json(run / "results.json")), quote=False)
    else:
        yield f"No results.json: `python train.py --out {plain(run)}` (the whole recipe) writes it at its end."
    yield "## Training"
    yield table(["stage", "starts from", "steps", "lr", "videos × questions", "tokens", "minutes",
                 "processes", "first → last tenth", "data and weights"], [list(map(plain, row)) for row in rows])
    if metrics and (svg := drawn(list(metrics.items()), 3, draw_stage)):
        images["training.svg"] = svg
        yield "![training curves](report/training.svg)"
    elif metrics:
        yield "Training curves and decode curves are drawn where matplotlib is installed: `pip install matplotlib`."
    for title, name, part, flags in (("Conversion", "conversion", conversion_part, ""),
                                     ("Decoding", "decode", decode_part, " --contexts 1024,4096,16384")):
        yield f"## {title}"
        file = run / f"{name}.json"
        if file.is_file():
            try:
                yield from part(iv3.read_json(file), images)
            except (LookupError, TypeError) as e:
                raise UserError(f"{file}: not written by `python eval.py --bench {name}` ({e!r}); delete it") from e
        else:
            yield f"No {name}.json: `python eval.py --bench {name}{flags} --json {plain(file)}` writes it."
    yield "## Five test items"
    stages = [stage for stage in reversed(iv3.STAGES) if (run / stage / "scores.json").is_file()]
    samples = stage_samples(run / stages[0]) if stages else {}
    if not samples:
        yield "No predictions are stored: the recipe keeps them in the scores.json of each stage from SFT short on."
        return
    right = sum(row["reward"] >= 0.5 for row in samples.values())
    yield (f"Right and wrong answers of `{stages[0]}` in turn, a seeded choice: {right} of {len(samples)} are right, "
           "with a reward of 1 or an IoU of 0.5 or more.")
    for number, row in enumerate(picked_items(samples)):
        try:
            yield from item_part(number, row, images)
        except iv3.MediaError as e:
            yield plain(e)


def html_page(markdown, images):
    """Our own report as one self-contained page: headings, tables, paragraphs, pictures and `code` of its markdown."""
    def picture(m):
        kind = "svg+xml" if m[2].endswith("svg") else "png"
        data = base64.b64encode(images[Path(m[2]).name]).decode()
        return f'<img alt="{m[1]}" src="data:image/{kind};base64,{data}">'
    text, parts = re.sub(r"!\[([^]]*)\]\(([^)]+)\)", picture, markdown), []
    for block in re.sub("`([^`]+)`", r"<code>\1</code>", text).split("\n\n"):
        if block.startswith("#"):
            level = len(block) - len(block.lstrip("#"))
            parts.append(f"<h{level}>{block.lstrip('# ')}</h{level}>")
        elif block.startswith("|"):
            head, _, *lines = block.splitlines()
            for start, tag, line in ("<table><tr>", "th", head), *(("<tr>", "td", line) for line in lines):
                parts.append(start + "".join(f"<{tag}>{cell.strip()}</{tag}>" for cell in line[1:-1].split("|")))
            parts.append("</table>")
        else:
            parts.append(f"<p>{block}</p>")
    title = re.sub("<[^>]+>", "", parts[0])
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n" + "\n".join(parts)


def write_report(run):
    """RUN/report.md with its pictures in RUN/report/, and the same as one page, RUN/report.html → its path."""
    run, images = Path(run), {}
    text = "\n\n".join(report_parts(run, images)) + "\n"
    (run / "report").mkdir(exist_ok=True)
    for old in [*(run / "report").glob("*.svg"), *(run / "report").glob("item*.png")]:
        old.unlink()
    for name, data in images.items():
        (run / "report" / name).write_bytes(data)
    iv3.write_atomic(run / "report.md", lambda p: p.write_text(text))
    iv3.write_atomic(run / "report.html", lambda p: p.write_text(html_page(text.strip(), images)))
    return run / "report.html"


def report_line(run):
    """Write a run's report → the line to print. A page that cannot be drawn must not fail the run that it is about."""
    try:
        return f"{write_report(run)} and report.md written"
    except Exception as e:
        return f"no report ({type(e).__name__}: {e}); `python eval.py --report {run}` tries again"


# ------------------------------------------------------------------------------------------------------------ command

def run_data(args):
    directory, rows = iv3.find_model(args.model), pick_rows(iv3.load_rows(args.data), args.limit, args.seed)
    model, processor = iv3.open_model(directory)
    log = args.out and SampleLog(args.out, settings_of(args, rows, model, directory), args.resume)
    if args.agent:
        root = Path(args.data).parent
        direct = direct_answers(model, processor, rows, root, args.batch, args.max_new, log)
        run = functools.partial(evaluate_agent, model, processor, rows, root, args.facts, args.seed, direct=direct)
        result = {"agent": run(log=log), "ablations": {}}
        for part in mcr_agent.PARTS if args.ablate else ():
            result["ablations"][f"no {part}"] = run(log=log, without=[part])
        print(render({"agent": result["agent"]}))
        print(f"\n{render_agents({'full': result['agent'], **result['ablations']})}")
        result["meta"] = {"data": args.data, **describe(model, rows, {}, args.seed, directory)}
    else:
        result = evaluate(model, processor, args.data, args.train, args.limit, args.batch, args.max_new, args.blind,
                          args.seed, directory, log)
        print(render_scores(result))
    if log:
        log.finish()
        print(f"{log.path}: a record of every sample")
    return result


def settings_of(args, rows, model, directory):
    """What a sample's record depends on; equal hashes mean equal rows, and equal weights in the same precision."""
    need(len({row["id"] for row in rows}) == len(rows), f"--out: two rows of {args.data} have the same id")
    bits = sum(int(p.detach().flatten().view(torch.int16).sum(dtype=torch.int64)) for p in model.parameters())
    content = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]
    return {"data": args.data, "rows_hash": content, "model": str(directory), "weights_sum": bits,
            **{key: getattr(args, key) for key in ("agent", "facts", "limit", "batch", "max_new", "seed")}}


BENCHES = {"decode": bench_decode, "agent-cache": bench_agent_cache, "conversion": bench_conversion,
           "ablation": bench_ablation}


def main():
    parser = argparse.ArgumentParser(description="Score a model on a data file, or time its attention.")
    add = parser.add_argument_group("scores").add_argument
    add("--data", metavar="F.jsonl", help="rows to score (media paths are relative to the file)")
    add("--model", help="a stage's directory or a run; default: the newest run")
    add("--train", metavar="F.jsonl", help="where the prior and constant-span baselines are fitted")
    add("--blind", action="store_true", help="one more baseline: the model looks at another clip")
    add("--agent", action="store_true", help="run the MCR agent on mcr rows, beside direct answers")
    add("--ablate", action="store_true", help="with --agent: also without each of its parts in turn")
    add("--facts", metavar="DIR", help="the agent's search corpus (default: the one each row names)")
    add("--jobs", type=int, default=1, help="processes that share the rows (default 1)")
    add("--limit", type=int, help="score a seeded sample of so many rows")
    add("--batch", type=int, default=32, help="prompts decoded together (default 32)")
    add("--max-new", type=int, help="at most so many answer tokens (default: the rows' preset's, else 48)")
    add("--out", metavar="DIR|F", help="keep every sample: F.jsonl, or DIR/samples.jsonl and DIR/summary.json")
    add("--resume", action="store_true", help="go on with a run into --out that was killed")
    add = parser.add_argument_group("what was measured before").add_argument
    add("--compare", nargs=2, metavar=("A", "B"), help="two --out of the same data, or two stages of a recipe: their "
        "paired difference; FILE:direct is an agent run's direct answers, FILE:'agent no memory' a part of --ablate")
    add("--gains", nargs="+", metavar="RUN", help="what each step of a recipe changes, as mean of its runs ± 95 %%")
    add("--report", metavar="RUN", help="write RUN/report.md and report.html about a recipe; needs no model")
    add = parser.add_argument_group("bench").add_argument
    add("--bench", choices=list(BENCHES), help="decode: time per new token of M2LA, a good GQA and the paper's eager "
        "GQA; agent-cache: a rollout's live cache against rebuilding its context at each step; conversion: the damage "
        "of each way to convert --model (default: the tiny base); ablation: the recipe without one part at a time, "
        "trained by train.py in --out, which keeps what is done (default: runs/ablation)")
    add("--preset", choices=list(iv3.PRESETS), default="tiny", help="decode: sizes (default tiny); "
        "conversion: also a random layer of these sizes (default: none)")
    add("--data-dir", metavar="DIR", default="runs/tiny/data", help="conversion: the toy data; written if it is absent")
    add("--contexts", default="1024,4096", help="cached tokens, comma-separated (default 1024,4096)")
    add("--first", type=int, default=1024, help="agent-cache: tokens of the first look (default 1024)")
    add("--new", type=int, default=256, help="agent-cache: tokens that a step adds (default 256)")
    add("--layers", type=int, help="layers of the decoder (default: the preset's)")
    add("--attention-only", action="store_true", help="decode: time one attention layer, not the whole decoder")
    add("--steps", type=int, default=20, help="decode: timed tokens per kind; agent-cache: steps of the "
        "rollout (default 20)")
    add("--seeds", type=int, default=3, help="ablation: how many seeds, 0, 1, …, not --seed (default 3)")
    add("--recipe", default="", metavar="FLAGS", help="ablation: flags for every run of train.py, as one argument: "
        "--recipe='--steps 2000' is a longer form, for a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="F", help="also write the result to this file")
    args = parser.parse_args()
    given = [name for name in ("data", "bench", "compare", "gains", "report") if getattr(args, name)]
    need(len(given) == 1,
         f"give either --data F.jsonl or --bench {'|'.join(BENCHES)} or --compare A B or --gains RUN or "
         "--report RUN")
    need(not (args.resume and not args.out), "--resume: give the --out DIR to go on with")
    need(not args.out or args.data or args.bench == "ablation",
         "--out: goes with --data or --bench ablation; other benches write --json F")
    for name in ("jobs", "limit", "batch", "max_new", "layers", "steps", "first", "new", "seeds"):
        value = getattr(args, name)
        need(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: must be at least 1")
    need(not args.json or Path(args.json).resolve().parent.is_dir(), f"--json {args.json}: there is no such directory")
    need(not args.json or not Path(args.json).is_dir(), f"--json {args.json}: is a directory; name a file in it")
    need(not args.out or Path(args.out).suffix == ".jsonl" or not Path(args.out).is_file(),
         f"--out {args.out}: is a file; name a directory or an F.jsonl")
    need(args.agent or not args.ablate, "--ablate: goes with --agent")
    need(args.data or args.jobs == 1, "--jobs shares the rows of --data; a bench runs in one process")
    if args.report:
        return print(f"{write_report(args.report)} and report.md written")
    if args.compare:
        result = compare(*args.compare, args.seed)
        print(render_compare(result))
    elif args.gains:
        result = gains_of(args.gains)
    else:
        join_processes(args.jobs, "cuda" if torch.cuda.is_available() else "cpu")
        result = BENCHES.get(args.bench, run_data)(args)
    if args.data and args.out and not args.json and Path(args.out).suffix != ".jsonl":
        args.json = Path(args.out) / "summary.json"
    if args.json and rank() == 0:
        iv3.write_atomic(args.json, lambda p: p.write_text(json.dumps(result, indent=1)))


if __name__ == "__main__":
    iv3.run_cli(main)
