"""The agent: Multimodal Contextual Reasoning (MCR), §3.1 and §3.4 of the paper, over one live cache.

Question Q, observation V, action A, feedback F, context C, reasoning R. For i = 1 … N:

    R_i      ~ f_θ(Q | V_i, A_i, F_i, C_i)              (1) reason     the model writes a turn
    A_{i+1}  ~ ρ(A_i | R_i, F_i, Q)                     (2) act        its tool call, checked against a schema
    F_{i+1}  ~ π(A_{i+1} | R_i, Q)                      (3) feedback   the tool answers; so does a failure
    V_{i+1}  ~ δ(V_i | C_{i+1})                         (4) look       the evidence windows from now on
    C_{i+1}  = C_i ⊕ (R_i, A_{i+1}, F_{i+1})            (5) extend     appends to the live cache

    python mcr_agent.py clip.mp4 "Which word is said at 34 seconds?" --options oak maple river --trace t.jsonl
    python mcr_agent.py --replay t.jsonl                # prints the same rollout again, without a model
    python extras/report.py t.jsonl --out t.html        # the rollout as a page, with its evidence frames
    python extras/remote_agent.py clip.mp4 "What happens?" --url http://localhost:8000/v1 --api-model NAME

In reading order: the live context, memory and what fills it, tools, verification, the tools' schema, budgets,
the rollout, its trace, the command.

Differs from the paper, or fills what it leaves open:
  1. R_i and A_{i+1} are one assistant turn of one autoregressive rollout. (5) runs before (4): δ reads
     C_{i+1}.
  2. ⊕ compresses when `summarize` asks for it or the context passes a share of the budget: the cache is
     truncated to its head, and a belief summary and the newest notes are appended. Memory keeps everything.
  3. δ is told by the action: a view adds its window to V, nothing is dropped from V, nothing else is added.
  4. Routing is a soft prior and nothing else: how likely each question type is, by the model's first word.
     The likeliest opens the first thought; it forbids no tool, and is not asked for again.
  5. Memory is found by meaning with BM25, or with a function of yours (see Memory). It holds no OCR.
  6. Verification re-views only the cited spans, in a separate short context; an answer read from subtitles or
     documents is looked up in that text instead. A contradiction reopens the loop once, and never again.
  7. The claim that verification checks is the question and the answer, quoted, unless the model was trained
     on the wording of a data set (data/NAME/wording.py).
  8. `web_search` ranks a local folder of .txt files, `asr` reads the .srt or .vtt file beside the video or
     the subtitles in it. To search online or to hear, give run_agent the functions `search` and `listen` (see
     Rollout). `temporal_grounding` is the model itself, asked in a separate context.
  9. Budgets are hard. A frame counts once, however often it is shown; tokens count every time. Only the
     forced answer runs after a budget is spent, on tokens kept back for it (RESERVE).
"""
import argparse
import functools
import hashlib
import json
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

from iv3 import (SPECIALS, find_model, load_file, need, open_model, probe, read_json, read_video, run_cli,
                 sample_times, sample_token, upright, watch, write_atomic)
from m2la import Cache, UserError

# ------------------------------------------------------------------------------ the live context, C_i (Eq. 5)
# What the agent needs of a model, ours or another (extras/remote_agent.py): one context that grows.
#   append(message, room)       → False, and nothing happens, if the message takes more tokens than `room`
#   generate(max_new, …)        → the text of one assistant turn
#   score(choices, …)           → how likely the turn would go on with each, as log-probabilities
#   ask(messages, max_new, …)   → a reply in a separate short context
#   likelihood(text)            → how likely the last reply had this text, or None
#   mark(), rewind(mark)        the context as it was. `capacity`, `tokens`, `side`, `prefilled`: in LiveModel

# Special tokens that an assistant's turn may hold; any other would open a turn or stand for pixels.
OWN_SPECIALS = ("<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
AROUND = 16                                  # tokens that open and close a turn, kept free beside a reply


class ModelFailed(UserError):
    """The model wrote no turn: the rollout ends and says so. Inside a tool it is an error like any other."""


class Turn(NamedTuple):
    """What the model wrote last."""
    ids: list                                # tokens
    logps: list                              # log-probability that it gave to each


@functools.cache
def token_texts(tokenizer):
    """The text of every token, made once: Qwen's vocabulary has 150,000."""
    return [tokenizer.decode([token]) for token in range(len(tokenizer))]


@functools.cache
def first_tokens(tokenizer, word):
    """Ids of the tokens that can begin `word`: its beginnings, and longer pieces ("speech: hear what")."""
    found = []
    for token, text in enumerate(token_texts(tokenizer)):
        if text and (text.startswith(word) or word.startswith(text)):
            found.append(token)
    return torch.tensor(found)


class Pass(NamedTuple):
    """New tokens of a context, which the model is to read."""
    ids: torch.Tensor                        # (1,T)
    positions: torch.Tensor                  # (3,1,T)
    patches: torch.Tensor                    # (Np,3·2·p·p)
    grids: torch.Tensor                      # (n,2)
    cache: Cache                             # has all earlier tokens, and these afterwards


def read_alone(model, new):
    """→ logits (V,) of the token that comes next."""
    inputs = [x.to(model.device) for x in (new.ids, new.positions, new.patches, new.grids)]
    hidden = model(*inputs, cache=new.cache)                        # (1,T,D)
    return model.logits(hidden[0, -1]).float()


class LiveModel:
    """Our model behind the agent's interface, with one growing context. New messages are queued and prefilled
    together just before the model goes on, so that every token passes through the model exactly once."""

    def __init__(self, model, processor, capacity=8192, temperature=0.0, seed=0, lane=None, cache=None):
        """lane: one of several rollouts abreast, see Lane; `cache` is then its part of what they share."""
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.wording = model.cfg.wording     # data set whose wording it was trained on, or ""
        self.temperature = temperature
        self.seed = seed
        self.random = torch.Generator().manual_seed(seed)
        self.capacity = capacity
        self.lane = lane
        self.cache = cache or model.new_cache(1, capacity)
        self.tokens = 0                      # in the context, queued ones too
        self.position = 0                    # the next one on MRoPE's axes
        self.prefilled = 0                   # read into the context, not written by the model
        self.side = 0                        # spent outside this context, or forgotten
        self.queue = []                      # Encoded parts that the model has not read yet
        self.turn = Turn([], [])
        self.nothing = processor.encode([])  # what a text has of patches and grids
        # Never written: the other special tokens, and rows of the vocabulary's table that stand for no token.
        banned = [self.tokenizer.token_id(special) for special in SPECIALS if special not in OWN_SPECIALS]
        banned += range(len(self.tokenizer), model.cfg.vocab)
        self.banned = torch.tensor(banned, device=model.device)

    def append(self, message, room=math.inf):
        """Queue a message; False, and nothing happens, if it takes more than `room` tokens."""
        encoded = self.processor.encode([message], offset=self.position)
        length = len(encoded.ids)
        if length > min(room, self.capacity - self.tokens):
            return False
        self.queue.append(encoded)
        self.tokens += length
        self.position = encoded.next_position
        self.prefilled += length
        return True

    def _queue(self, ids):
        """Queue tokens of text: each advances all three MRoPE axes by 1."""
        positions = torch.arange(self.position, self.position + len(ids)).expand(3, -1)  # (3,T)
        part = replace(self.nothing, ids=torch.tensor(ids, dtype=torch.long), positions=positions)
        self.queue.append(part)
        self.tokens += len(ids)
        self.position += len(ids)

    def _write(self, text):
        """Queue text that the model did not write."""
        ids = self.tokenizer.encode(text)
        self._queue(ids)
        self.prefilled += len(ids)

    def _flush(self):
        """Run the queue in one forward pass → log-probabilities (V,) of the next token, -inf where banned."""
        new = Pass(
            ids=torch.cat([part.ids for part in self.queue])[None],
            positions=torch.cat([part.positions for part in self.queue], 1)[:, None],
            patches=torch.cat([part.patches for part in self.queue]),
            grids=torch.cat([part.grids for part in self.queue]),
            cache=self.cache)
        self.queue = []
        if self.lane:
            logits = self.lane.read(new)                            # (V,)
        else:
            logits = read_alone(self.model, new)
        allowed = logits.index_fill(0, self.banned, -torch.inf)
        return torch.log_softmax(allowed, -1)

    @torch.inference_mode()
    def generate(self, max_new, stop=("</tool_call>",), opening="", first="", deadline=math.inf):
        """One assistant turn, closed in the context afterwards → its text, `opening` included. `first`: the
        turn's first token is the likeliest of those that can begin this text; what follows is free. Also ends
        at a `stop` token or at the deadline (time.monotonic)."""
        ends = {self.tokenizer.token_id(special) for special in ("<|im_end|>", "<|endoftext|>")}
        stops = {self.tokenizer.token_id(special) for special in stop}
        self._write("<|im_start|>assistant\n" + opening)
        self.turn = Turn([], [])
        while len(self.turn.ids) < max_new and time.monotonic() < deadline:
            logp = self._flush()                                    # (V,)
            token = int(sample_token(logp[None], self.temperature, self.random)[0])
            if first and not self.turn.ids:
                beginnings = first_tokens(self.tokenizer, first).to(logp.device)
                token = int(beginnings[logp[beginnings].argmax()])
            if token in ends:
                break
            self.turn.ids.append(token)
            self.turn.logps.append(float(logp[token]))
            self._queue([token])             # runs with whatever comes next
            if token in stops:
                break
        self._write("<|im_end|>\n")
        return opening + self.tokenizer.decode(self.turn.ids)

    def mark(self):
        """This place in the context, for `rewind`."""
        return self.tokens, self.position

    def rewind(self, mark):
        """Forget what came after a mark that the model has read: the cache is truncated. Spent tokens stay
        spent."""
        tokens, position = mark
        self.side += self.tokens - tokens
        self.tokens = tokens
        self.position = position
        self.queue = []
        self.cache.truncate(self.tokens)

    @torch.inference_mode()
    def score(self, choices, opening="", messages=None, room=math.inf):
        """Log-probability that an assistant turn goes on from `opening` with each choice, told by its first
        token: in this context, which is restored afterwards, or in a separate one that holds only
        `messages`."""
        if messages is not None:
            apart = self._beside(messages, AROUND, room)
            scores = apart.score(choices, opening)
            self.side += apart.tokens + apart.side           # its context, and what it spent beside that
            return scores
        # What was queued before is read now and stays. The opening is taken back: `rewind` counts it as spent
        # (`side`), and it is not of the context (`prefilled`).
        mark = self.mark()
        prefilled = self.prefilled
        self._write("<|im_start|>assistant\n" + opening)
        logp = self._flush()                                        # (V,)
        self.rewind(mark)
        self.prefilled = prefilled
        scores = []
        for choice in choices:               # the probabilities of all its first tokens, summed
            beginnings = first_tokens(self.tokenizer, choice)
            scores.append(float(logp[beginnings].logsumexp(0)))
        return scores

    def ask(self, messages, max_new, room=math.inf):
        """The model's reply in a separate short context; `likelihood` is about it from then on."""
        apart = self._beside(messages, max_new + AROUND, room)
        reply = apart.generate(max_new, stop=())
        self.side += apart.tokens + apart.side
        self.turn = apart.turn
        return reply

    def _beside(self, messages, more, room):
        """A separate context that holds `messages`, with place for `more` tokens."""
        needed = len(self.processor.encode(messages).ids) + more
        need(needed <= room, f"a separate look needs {needed} tokens, {max(0, room)} are left")
        apart = LiveModel(self.model, self.processor, needed, lane=self.lane)
        for message in messages:
            apart.append(message)
        return apart

    def likelihood(self, text):
        """Probability that the model gave to the last occurrence of `text` in its last turn; 0 without one."""
        decode = self.tokenizer.decode
        start = decode(self.turn.ids).rfind(text)
        if start < 0 or not text:
            return 0.0
        end = start + len(text)
        inside = []                          # log-probabilities of the tokens that write some of it
        token_start = 0
        for k, logp in enumerate(self.turn.logps, 1):
            token_end = len(decode(self.turn.ids[:k]))
            if token_end > start and token_start < end:
                inside.append(logp)
            token_start = token_end
        return math.exp(sum(inside))


# ------------------------------------------------------------------------------------ several rollouts abreast
# For evaluation; a reader of §3.1 can skip it. The model writes the next token of sixteen contexts in less than
# twice the time of one. A rollout stays the plain loop that it is, in a thread of its own: where it needs the
# model it waits. When all wait, their next tokens are one forward pass.

# Tokens of all contexts together, sixteen of 8192: 15 GB of a 2B model in bf16. With M²LA too: a row is half as
# large, but either segment has room for all of a context's tokens.
SHARED_TOKENS = 2 ** 17


class Lane(threading.Thread):
    """Rollouts one after the other, beside those of other lanes.

    Its thread is a coroutine: it runs while `resume` waits for it, and waits otherwise. No two run at a time:
    nothing needs a lock, and all comes in the same order every time."""

    def __init__(self, items, work, number, shared):
        super().__init__(daemon=True)        # an interrupted process does not wait for it
        self.items = items                   # an iterator from which all lanes take
        self.work = work                     # work(item, lane): a rollout, by a LiveModel with this lane
        self.number = number                 # its row of the shared cache
        self.cache = shared.part(number)     # that row as a cache of one context
        self.asks = SimpleQueue()            # Passes that it waits for; at its end None, or an error
        self.replies = SimpleQueue()         # to each its logits (V,), or an error for the rollout

    def run(self):
        end = None
        try:
            for item in self.items:
                self.cache.truncate(0)
                self.work(item, self)
        except BaseException as error:
            end = error
        self.asks.put(end)

    def read(self, new):
        """Wait until a Pass has been read → logits (V,). Called by the rollout, in its thread."""
        self.asks.put(new)
        reply = self.replies.get()
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def resume(self, reply):
        """Go on with the reply (None: begin) → the Pass that it waits for next, or None at its end."""
        if reply is None:
            self.start()
        else:
            self.replies.put(reply)
        asked = self.asks.get()
        if isinstance(asked, BaseException):
            raise asked
        return asked


def run_abreast(model, items, work, abreast, capacity):
    """work(item, lane) for every item, `abreast` at a time, in contexts of `capacity` tokens. An error that work
    raises ends them all."""
    items = iter(items)
    if abreast == 1:
        for item in items:
            work(item, None)
        return
    shared = model.new_cache(abreast, capacity)
    lanes = [Lane(items, work, number, shared) for number in range(abreast)]
    try:
        replies = dict.fromkeys(lanes)       # None: nothing was asked yet
        while replies:
            passes = {}                      # Lane → Pass, of those that have not ended
            for lane, reply in replies.items():
                new = lane.resume(reply)
                if new is not None:
                    passes[lane] = new
            replies = read_together(model, shared, passes)
    finally:
        # After an error some still wait: a SystemExit ends a thread without a word.
        for lane in lanes:
            lane.replies.put(SystemExit())


@torch.inference_mode()
def read_together(model, shared, passes):
    """{Lane: Pass} → {Lane: logits (V,), or an error}: those of one token together, all others one by one."""
    step = {}                                # Lane → Pass of one token, in the lane's own context
    for lane, new in passes.items():
        if new.cache is lane.cache and new.ids.shape[1] == 1:
            step[lane] = new
    replies = {}
    if len(step) > 1:
        replies = read_step(model, shared, step)
    for lane, new in passes.items():
        if lane not in replies:
            new.cache.recount()              # steps have written to it
            try:
                replies[lane] = read_alone(model, new)
            except Exception as error:
                replies[lane] = error
    return replies


def read_step(model, shared, step):
    """One token for each of some lanes {Lane: Pass} → {Lane: logits (V,)}. The others' rows are padding."""
    B = len(shared.lengths)
    ids = torch.zeros(B, 1, dtype=torch.long)
    positions = torch.zeros(3, B, 1, dtype=torch.long)
    valid = torch.zeros(B, 1, dtype=torch.bool)
    for lane, new in step.items():
        ids[lane.number] = new.ids[0]
        positions[:, lane.number] = new.positions[:, 0]
        valid[lane.number] = True
    ids, positions, valid = (x.to(model.device) for x in (ids, positions, valid))
    shared.recount()                         # the lanes have written to it
    hidden = model(ids, positions, cache=shared, valid=valid)       # (B,1,D)
    logits = model.logits(hidden[:, 0]).float()                     # (B,V)
    return {lane: logits[lane.number] for lane in step}


# -------------------------------------------------------------------------------- times and texts in messages
def short(seconds):
    """Seconds as messages have them: 34.0 → "34", 33.25 → "33.25"."""
    return f"{round(seconds, 2):g}"


def exact(start, end):
    return f"{start:.1f} to {end:.1f}"


def listed(spans):
    return ", ".join(f"{short(start)} to {short(end)}" for start, end in spans)


def window_of(item):
    """What iv3.read_video takes of a video item; the rest, such as frame_tokens, is the processor's."""
    return {name: item[name] for name in ("start", "end", "fps", "max_frames", "pairs") if name in item}


def chance(p):
    return "unknown" if p is None else f"{p:.2f}"  # None: a model that tells no probabilities


def sanitise(text, limit=2000):
    """Tool text is data: the template's own tokens in it, whoever wrote them there, lose their brackets. The
    limit keeps a document or a server from filling the context."""
    text = re.sub(r"<(\|[^<>|]*\||/?(?:tool_call|tool_response|think))>", r"[\1]", str(text))
    return text if len(text) <= limit else text[:limit] + " …"


# ---------------------------------------------------------------------------------------------- memory (§3.4)
def words(text):
    return re.findall(r"[^\W_]+", text.lower())


def bm25(query, texts, k1=1.2, b=0.75):
    """Score of each text: Σ_w idf(w) · tf·(k1+1) / (tf + k1·(1 − b + b·length/mean length)). k1: how soon a
    repeated word counts no more, b: how much a long text pays for its length (both as Lucene has them)."""
    bags = [Counter(words(text)) for text in texts]
    mean_length = sum(bag.total() for bag in bags) / max(1, len(bags)) or 1
    scores = [0.0] * len(bags)
    for word in sorted(set(words(query))):
        # A word that few texts have says most.
        holders = len([bag for bag in bags if word in bag])
        idf = math.log(1 + (len(bags) - holders + 0.5) / (holders + 0.5))
        for i, bag in enumerate(bags):
            tf = bag[word]
            length = 1 - b + b * bag.total() / mean_length
            scores[i] += idf * tf * (k1 + 1) / (tf + k1 * length)
    return scores


@dataclass
class Entry:
    level: str                               # frame | clip | scene | subtitle | narrative | note | belief
    content: str
    start: float                             # seconds
    end: float
    source: str                              # coarse, captions, subtitles, or the tool that it came from

    def __str__(self):
        return f"{exact(self.start, self.end)} [{self.level}] {self.content}"


class Memory(list):
    """Hierarchical memory (§3.4): each Entry has content and time, so it is found by meaning or by time.

    By meaning is BM25: questions share words with captions and subtitles, it needs no second model, and
    anyone can see why an entry came first. (A decoder's own hidden states are trained to predict the next
    token, not to be near what they mean.) `search(query, texts)` → a score for each text replaces it, by
    embeddings for example; what scores above `cutoff` is found, best first."""

    def __init__(self, entries=(), search=bm25, cutoff=0.0):
        super().__init__(entries)
        self.search = search
        self.cutoff = cutoff                 # 0: BM25 of a text that shares no word

    def add(self, level, content, start, end, source):
        self.append(Entry(level, content, start, end, source))

    def find(self, query=None, start=0.0, end=math.inf, source=None, most=8):
        """Entries that overlap [start, end), in order of time; with a query only what matches, best first.
        `most`: what a turn can read at a glance."""
        found = []
        for entry in sorted(self, key=lambda entry: entry.start):
            if source in (None, entry.source) and entry.start < end and entry.end > start:
                found.append(entry)
        if query is None:
            return found[:most]
        scores = self.search(query, [entry.content for entry in found])
        best_first = sorted(range(len(found)), key=lambda i: -scores[i])
        return [found[i] for i in best_first if scores[i] > self.cutoff][:most]


# ---------------------------------------------------------------------------- memory: what is said in a video
class Segment(NamedTuple):
    """A stretch of a video and what is said or shown in it: a subtitle, a captioned clip, a captioned
    scene."""
    start: float                             # seconds
    end: float
    text: str                                # may be empty: the captioner had nothing to say


STAMP = r"[^\S\n]*(?:(\d+):)?(\d+):(\d+(?:[.,]\d+)?)[^\S\n]*"       # hours, if there are; minutes; seconds
CUE = re.compile(rf"^{STAMP}-->{STAMP}.*\n((?:[^\S\n]*\S.*\n)*)", re.M)  # and the lines up to an empty one


def to_seconds(hours, minutes, seconds):
    return float(hours or 0) * 3600 + float(minutes) * 60 + float(seconds.replace(",", "."))


def cues_of(text):
    """The segments of an .srt or .vtt file's text; what has no whole time line is passed over."""
    cues = []
    for *times, said in CUE.findall(text):
        cues.append(Segment(to_seconds(*times[:3]), to_seconds(*times[3:]), said))
    return cues


def embedded_subtitles(video):
    """The segments of a file's first subtitle stream: mov_text, SubRip, ASS; pictures of text have no
    text."""
    cues = []
    # Of a damaged file: what was read until then.
    with suppress(av.FFmpegError), av.open(str(video)) as container:
        if not container.streams.subtitles:
            return cues
        origin = (container.start_time or 0) / av.time_base
        for packet in container.demux(container.streams.subtitles[0]):
            if packet.size and packet.duration:
                start = float(packet.pts * packet.time_base) - origin
                seconds = float(packet.duration * packet.time_base)
                said = b" ".join(getattr(part, "dialogue", b"") for part in packet.decode())
                cues.append(Segment(start, start + seconds, said.decode(errors="replace")))
    return cues


@functools.lru_cache(maxsize=256)
def read_subtitles(video):
    """[(start, end, text)] of the .srt or .vtt file beside the video, else of its subtitle stream; no broken
    cues."""
    for suffix in (".srt", ".vtt"):
        path = Path(video).with_suffix(suffix)
        if path.is_file():
            cues = cues_of(path.read_text("utf-8-sig", errors="replace") + "\n")
            break
    else:
        cues = embedded_subtitles(video)
    lines = []
    for start, end, said in cues:
        plain = re.sub(r"<[^>]*>|{\\[^}]*}", "", said)              # no <i>, no {\i1}
        text = sanitise(" ".join(plain.split()), 300)
        if start < end and text:
            lines.append(Segment(start, end, text))
    return lines


# --------------------------------------------------------------------------------- memory: where scenes begin
SCENE_FPS = 4.0                              # a cut is found to a quarter of a second
CUT = 0.03                                   # of the pixels' range: grain and drifting light stay below it


def few_pixels(frame, reformatter):
    """A decoded frame → (h,w,3) uint8, every so many rows and columns of `upright`. About 64 × 64 pixels are
    enough for 64 quantiles."""
    def values(plane):
        return np.frombuffer(plane, np.uint8).reshape(plane.height, -1)

    rows = max(1, frame.height // 64)
    columns = max(1, frame.width // 64)
    even = frame.height % 2 == 0 and frame.width % 2 == 0
    if frame.format.name != "yuv420p" or frame.rotation or not even:
        pixels = upright(frame, reformatter)
        return pixels[::max(1, pixels.shape[0] // 64), ::max(1, pixels.shape[1] // 64)]

    # In yuv420p two by two pixels share a colour, u and v. A wanted pixel becomes the first of four in a small
    # frame, and that is converted: the same values to the bit, in a quarter of the time.
    y, u, v = (values(plane) for plane in frame.planes)
    y = y[:, :frame.width][::rows, ::columns]                               # (h,w)
    h, w = y.shape
    row = np.arange(h) * rows // 2                                          # (h,) of u and v
    column = np.arange(w) * columns // 2                                    # (w,)
    small = av.VideoFrame(2 * w, 2 * h, "yuv420p")
    small.colorspace = frame.colorspace
    small.color_range = frame.color_range
    small_y, small_u, small_v = (values(plane) for plane in small.planes)
    small_y[::2, :2 * w:2] = y
    small_u[:, :w] = u[row][:, column]
    small_v[:, :w] = v[row][:, column]
    return reformatter.reformat(small, format="rgb24").to_ndarray()[::2, ::2]


def signature(pixels):
    """pixels (h,w,3) uint8 → (192,): 64 quantiles of each colour's values, 0-1. Two frames differ by the area
    between their cumulative histograms: by their colours, whatever moves."""
    colours = np.ascontiguousarray(pixels.reshape(-1, 3).T)                 # (3,h·w)
    colours = np.sort(colours, 1, kind="stable")                            # of bytes: a radix sort
    quantiles = (np.linspace(0, 1, 64) * (colours.shape[1] - 1)).astype(int)
    return colours[:, quantiles].T.reshape(-1) / 255


def scene_starts(signatures, window, threshold=CUT):
    """signatures (F,S) → numbers of the frames that begin a scene. Compared are the medians of `window` frames
    before and after: at a cut or a fade they differ, at a flash shorter than half the window they do not."""
    F = len(signatures)
    # The median of the `window` frames from each one on.                                           (F,S)
    medians = [np.median(signatures[t:t + window], 0) for t in range(F)]
    # How much the picture changes at each frame.                                                   (F,)
    change = np.zeros(F)
    for t in range(1, F):
        if t < window:
            before = np.median(signatures[:t], 0)                           # (S,)
        else:
            before = medians[t - window]
        change[t] = np.abs(before - medians[t]).mean()
    # A cut makes a flat peak as wide as the window: inside it, the sharpest step between neighbours.  (F,)
    sharp = np.abs(np.diff(signatures, axis=0, prepend=signatures[:1])).mean(1)
    # High: above the threshold, and twice what is usual in this video (a camera that never rests).    (F,)
    high = change >= max(threshold, 2 * float(np.median(change)))
    # Each run of high frames holds one start.
    borders = np.flatnonzero(np.diff(high.astype(int))) + 1
    starts = []
    for run in np.split(np.arange(F), borders):
        if high[run[0]]:
            best = np.argmax((change + 0.1 * sharp)[run])  # 0.1: decides among nearly equal changes only
            starts.append(int(run[best]))
    return starts


def find_scenes(path, start, end, deadline=math.inf, fps=SCENE_FPS):
    """[(start, end)] of the scenes in a window, up to the deadline: keeps signatures, no frames."""
    signatures = []
    reformatter = VideoReformatter()
    last = None                              # a frame may be on the screen at several of the times
    seen = end                               # seconds up to which it has looked
    looks = watch(path, start, end, fps, deadline=math.inf)
    for shown in tqdm(looks, "scenes", math.ceil((end - start) * fps), leave=False, disable=None):
        if shown is not last:
            colours = signature(few_pixels(shown.frame, reformatter))
        last = shown
        signatures.append(colours)
        if time.monotonic() >= deadline:
            seen = min(end, start + len(signatures) / fps)
            break
    cuts = [start + frame / fps for frame in scene_starts(np.array(signatures), round(fps))]
    return list(pairwise([start, *cuts, seen]))


# ---------------------------------------------------------------------------------------------------- wording
# A model trained on the rollouts of one data set knows that set's words. They stand in data/NAME/wording.py,
# for a model whose config.json says "wording": NAME; any other is asked in plain words.

def wording_of(name):
    """The module data/NAME/wording.py, or None without a name."""
    return load_file(f"data/{name}/wording.py") if name else None


def caption_prompt(name):
    """What a model of this wording is asked of a clip."""
    wording = wording_of(name)
    return wording.CAPTION if wording else "Describe the video."


def claim_of(name, question, answer, thought):
    """The statement that a second look checks: in the model's wording, or else the question and the answer,
    quoted."""
    wording = wording_of(name)
    claim = wording.claim(question, answer, thought) if wording else None
    return claim or f"{question} {answer}"


# -------------------------------------------- memory: what a video shows, clips → scenes → narrative (§4.2.1)
def captioner(model, prompt):
    """→ caption(video, start, end) → text, by a model's `ask`; {t} in the prompt: the middle of the clip."""
    def caption(video, start, end):
        # Inwards to whole seconds, if the clip holds two: as in training, and no frame from across a cut.
        if math.ceil(start) < math.floor(end):
            start = math.ceil(start)
            end = math.floor(end)
        item = {"type": "video", "video": str(video), "start": start, "end": end, "max_frames": 64}
        text = prompt.replace("{t}", str(int((start + end) / 2)))
        content = [item, {"type": "text", "text": text}]
        return model.ask([{"role": "user", "content": content}], 96)
    return caption


def caption_clips(path, caption, longest=10.0):
    """→ duration, the captioned clips (Segments). Clips: what lies between two cuts, in equal parts of at
    most `longest` seconds, so that a long scene is not told by its first look alone."""
    duration = probe(path)
    clips = []
    for start, end in find_scenes(path, 0.0, duration):
        parts = max(1, math.ceil((end - start) / longest - 1e-6))
        for a, b in pairwise(np.linspace(start, end, parts + 1).tolist()):
            text = " ".join(sanitise(caption(path, a, b), 400).split())
            clips.append(Segment(a, b, text.rstrip(".")))
    return duration, clips


def alike(a, b, same):
    """Do two captions show the same? Of the shorter one's words, a share of `same` is in the other."""
    a = set(words(a))
    b = set(words(b))
    shorter = max(1, min(len(a), len(b)))
    return len(a & b) >= same * shorter


def merge(clips, same):
    """Neighbouring clips that show the same → one scene, with the caption that says most."""
    scenes = []
    for start, end, text in clips:
        if not scenes or not alike(scenes[-1].text, text, same):
            scenes.append(Segment(start, end, text))
            continue
        before = scenes[-1]
        if len(words(before.text)) >= len(words(text)):
            text = before.text
        scenes[-1] = Segment(before.start, end, text)
    return scenes


def narrative(scenes):
    """The scenes in order, with their times, as one text."""
    return " ".join(f"{exact(scene.start, scene.end)}: {scene.text}." for scene in scenes if scene.text)


def describe_video(video, caption, same):
    """A Memory of all levels but notes: scenes, their clips, subtitles, the narrative."""
    memory = Memory()
    duration, clips = caption_clips(video, caption)
    scenes = merge(clips, same)
    for scene in scenes:
        memory.add("scene", scene.text, scene.start, scene.end, "captions")
        parts = [clip for clip in clips if scene.start <= clip.start < scene.end]
        if len(parts) > 1:                   # a scene of one clip has said it already
            for clip in parts:
                memory.add("clip", clip.text, clip.start, clip.end, "captions")
    for line in read_subtitles(str(video)):
        memory.add("subtitle", line.text, line.start, line.end, "subtitles")
    memory.add("narrative", narrative(scenes), 0.0, duration, "captions")
    return memory


def file_ends(path, size=2 ** 20):
    """The first and the last MB of a file: an hour of video is not read to know it again."""
    with open(path, "rb") as file:
        first = file.read(size)
        at = file.seek(max(0, Path(path).stat().st_size - size))
        last = file.read()
    return first, at, last


def build_memory(video, folder, caption, model, same=0.85):
    """Memory of a video before any question (§3.4, §4.2.1): scenes, clips, subtitles, narrative.

    Captions cost much: it is built once and kept in `folder` as JSON, under a name made of the file's ends, its
    subtitles, and `model`, who captions. `same`: the share of common words from which two captions show one
    scene."""
    spoken = [tuple(line) for line in read_subtitles(str(video))]
    made_of = repr((file_ends(video), spoken, model, same))
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    kept = Path(folder) / f"{Path(video).stem}-{key}.json"
    if not kept.is_file():
        memory = describe_video(video, caption, same)
        record = {"video": str(video), "model": model, "entries": [asdict(entry) for entry in memory]}
        text = json.dumps(record, indent=1, ensure_ascii=False)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, lambda path: path.write_text(text))
    try:
        return Memory(Entry(**entry) for entry in read_json(kept)["entries"])
    except (TypeError, LookupError) as error:
        raise UserError(f"{kept}: not a memory of this agent ({error}); delete it") from error


# --------------------------------------------------------------------------------------------- actions (§3.1)
FPS = 2.0                                    # frames per second of a view that does not say: as in training


class BadCall(ValueError):
    """What is wrong with a tool call; the model reads it as "error: …"."""


call_needs = functools.partial(need, error=BadCall)


class Spent(Exception):
    """A budget ran out; the message is its name. It passes through feedback() and ends the rollout. Only
    second_look() catches it: a look that cannot be paid for leaves the verdict unclear."""


@dataclass
class Action:
    name: str                                # of a tool; "" when the turn could not be understood
    arguments: dict
    note: str = ""                           # what was wrong, or what was corrected


@dataclass
class Feedback:
    text: str
    media: list = field(default_factory=list)  # video items shown with the text
    window: tuple = ()                       # of a view: what V gains
    final: bool = False                      # the rollout ends here
    compress: bool = False                   # the context shrinks to a summary instead of taking the text


@dataclass(frozen=True)
class Tool:
    kind: str                                # class of action (§3.1)
    run: Callable                            # run(rollout, **arguments) → Feedback
    fields: dict                             # name → number | text | spans | flag; "?": optional
    about: str
    evidence: str = ""                       # what an answer after it rests on: seen | read | "": nothing new
    # seen: verification looks at the cited windows again. read: it looks the answer up in what the tool noted
    # about those windows in memory, with its own name as source.


# ----------------------------------------------------------------------------------------- the tools: looking
# A tool is a function of the rollout (`run`: a Rollout, a class below) and of the call's arguments. It has
# the video, its duration, the memory, and what charges the budgets: run.window() gives a video item to show,
# run.decode() the frames themselves, run.room() the tokens that are left. What a tool raises becomes
# feedback.

def view(run, start, end, fps=FPS):
    item = run.window(start, end, fps)
    text = f"{short(start)} to {short(end)} seconds."
    if "max_frames" in item:                 # the budget had no more left
        text += f" {item['max_frames']} frames only."
    return Feedback(text, [item], (start, end))


def video_segmentation(run, start=0.0, end=None):
    scenes = find_scenes(run.video, start, end or run.duration, run.deadline)
    for k, (scene_start, scene_end) in enumerate(scenes, 1):
        run.memory.add("scene", f"scene {k}", scene_start, scene_end, "video_segmentation")
    return Feedback(f"{len(scenes)} scenes: " + ", ".join(exact(*span) for span in scenes))


def temporal_grounding(run, query, start=None, end=None):
    """The model itself, in a separate context: on the coarse video (the same frames, so no new ones) or on a
    window. The score is the probability that it gave to the span's words."""
    thing = re.sub("^(the|an?) ", "", query)
    question = query if query.endswith("?") else f"When is the {thing} shown?"
    item = run.coarse if start is None else run.window(start, end)
    content = [item, {"type": "text", "text": sanitise(question)}]
    reply = run.model.ask([{"role": "user", "content": content}], 32, run.room())
    span = re.search(r"(\d+(?:\.\d+)?)\s*(?:to|and|-|–)\s*(\d+(?:\.\d+)?)", reply)
    start, end = [min(float(seconds), run.duration) for seconds in span.groups()] if span else (0, 0)
    if start >= end:
        return Feedback(f"not found: {query}")
    run.memory.add("note", query, start, end, "temporal_grounding")
    return Feedback(f"{exact(start, end)} seconds (score {chance(run.model.likelihood(span[0]))})")


# ------------------------------------------------------------------------- the tools: listening and searching
NEAR_BEST = 0.8                              # of the best score: weaker texts share the question's form alone
MOST_FOUND = 3                               # documents that one search shows


def within(deadline, function, *arguments, most=60.0):
    """function(*arguments), given up at the deadline or after `most` seconds: a server that hangs, or a
    function of the user, does not hang the rollout. The thread stays behind."""
    reply = Future()
    seconds = max(0.0, min(most, deadline - time.monotonic()))

    def work():
        try:
            reply.set_result(function(*arguments))
        except Exception as error:
            reply.set_exception(error)
    threading.Thread(target=work, daemon=True).start()
    wait([reply], seconds)
    need(reply.done(), f"no reply in {seconds:g} seconds", TimeoutError)
    return reply.result()


def asr(run, start, end):
    if run.memory.find(source="subtitles"):
        heard = run.memory.find(start=start, end=end, source="subtitles", most=40)
    elif run.listen:
        heard = []
        for a, b, said in within(run.deadline, run.listen, run.video, start, end)[:40]:
            heard.append(Entry("subtitle", sanitise(said, 300), float(a), float(b), "listen"))
    else:
        return Feedback("no speech available: the video has no subtitles")
    lines = []
    for entry in heard:
        run.memory.add("note", entry.content, entry.start, entry.end, "asr")
        lines.append(f"{exact(entry.start, entry.end)}: {entry.content}")
    return Feedback("\n".join(lines) or f"no speech between {short(start)} and {short(end)} seconds")


@functools.lru_cache(maxsize=16)
def read_documents(folder):
    """[(file name, sentence)] of the .txt files of a folder."""
    need(Path(folder).is_dir(), f"{folder}: no such folder of documents (--facts)")
    sentences = []
    for path in sorted(Path(folder).glob("*.txt")):
        text = path.read_text("utf-8", errors="replace")
        for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
            if sentence.strip():
                sentences.append((path.name, " ".join(sentence.split())))
    return sentences


def search_documents(folder, query):
    """{file name: "[file name] sentence"}: the best sentence of each of the best documents."""
    sentences = read_documents(folder)
    scores = bm25(query, [f"{Path(name).stem} {text}" for name, text in sentences])
    enough = NEAR_BEST * max(scores, default=0.0)
    best = {}
    for i in sorted(range(len(sentences)), key=lambda i: -scores[i]):
        name, text = sentences[i]
        if scores[i] > enough and len(best) < MOST_FOUND:
            best.setdefault(name, f"[{name}] {text}")
    return best


def web_search(run, query):
    if run.search:
        best = {}
        for name, text in within(run.deadline, run.search, query)[:MOST_FOUND]:
            best[name] = f"[{sanitise(name, 200)}] {sanitise(text, 600)}"
    else:
        call_needs(run.facts is not None, "there are no documents to search")
        best = search_documents(run.facts, query)
    for text in best.values():
        run.memory.add("note", text, 0.0, run.duration, "web_search")
    return Feedback("\n".join(best.values()) or f"nothing found for {query}")


# ------------------------------------------------------------------------------------------ the tools: memory
def memory_read(run, query=None, **window):
    call_needs(query is not None or window, "memory_read needs a query, or start and end")
    found = run.memory.find(query, **window)
    return Feedback("\n".join(map(str, found)) or "nothing in memory")


def memory_write(run, text, start, end):
    run.memory.add("note", text, start, end, "memory_write")
    return Feedback("noted")


def summarize(run, compress=False):
    return Feedback(run.belief(), compress=compress)


# ---------------------------------------------------------------------------------------- verification (§3.4)
VERDICTS = ("support", "contradict", "unclear")


class Judgement(NamedTuple):
    verdict: str                             # one of VERDICTS
    reason: str


NOT_VERIFIED = Judgement("unclear", "not verified")


def option_of(text, options):
    """Index of the option that a text names: "maple (B)", "B", "B. maple" or "maple"; None if none. Stricter than
    eval.parse_letter, which scores the same text: where this is unsure, the model is asked again."""
    text = text.strip().rstrip(".")
    letter = re.search(r"\(([A-Z])\)$", text) or re.match(r"\(?([A-Z])(?:[.):]|$)", text)
    if letter:
        index = ord(letter[1]) - ord("A")
        if index < len(options):
            return index
    for index, option in enumerate(options):
        if option.lower() == text.lower():
            return index
    return None


def second_look(run, claim, evidence):
    """The model judges a claim from the cited spans alone, in a separate context → Judgement."""
    where = f"second look at {listed(evidence)} seconds"
    text = f"Claim: {sanitise(claim, 400)}\nAnswer support, contradict or unclear."
    try:
        content = [run.window(start, end) for start, end in evidence]
        content.append({"type": "text", "text": text})
        scores = run.model.score(VERDICTS, messages=[{"role": "user", "content": content}], room=run.room())
    except (Spent, UserError) as error:
        return Judgement("unclear", f"no {where} ({error})")
    probabilities = torch.softmax(torch.tensor(scores), 0)          # (verdicts,)
    p, best = probabilities.max(0)
    return Judgement(VERDICTS[best], f"{where} ({p:.2f})")


def look_up(run, answer, evidence):
    """What was read is looked up in the text that the cited spans hold, as the last tool left it in memory →
    Judgement. The answer in it supports, even beside other options; another option alone contradicts; none of
    them is unclear."""
    def plain(text):
        return f" {' '.join(words(text))} "  # whole words match, whatever stands between them

    cited = []
    for start, end in evidence:
        for entry in run.memory.find(start=start, end=end, source=run.source, most=99):
            cited.append(plain(entry.content))
    said = []                                # the answer comes first: if it was said at all, it is said[0]
    for option in (answer, *run.options):
        if any(plain(option) in text for text in cited):
            said.append(option)
    if not said:
        return Judgement("unclear", f"{run.source}: nothing of it at {listed(evidence)} seconds")
    verdict = "support" if said[0] == answer else "contradict"
    return Judgement(verdict, f"{run.source}: {said[0]} at {listed(evidence)} seconds")


def check_answer(run, text, evidence):
    """Is the answer supported by what it cites (§3.4)? What was read is looked up in the cited text, what was
    seen is seen again → Judgement. Which of the two: by the last tool that gave evidence (`source`), whatever
    the span was cited for."""
    index = option_of(text, run.options)
    answer = re.sub(r"\s*\([A-Z]\)$", "", text) if index is None else run.options[index]
    if run.source and TOOLS[run.source].evidence == "read":
        return look_up(run, answer, evidence)
    # The user's model may be any object with LiveModel's methods: it need not know of wordings.
    claim = claim_of(getattr(run.model, "wording", ""), run.question, answer, run.thought)
    return second_look(run, claim, evidence)


def verify(run, claim, evidence):
    judgement = second_look(run, claim, evidence)
    return Feedback(f"{judgement.verdict}: {judgement.reason}")


def answer(run, text, evidence):
    """Ends the rollout, unless its verification contradicts: that reopens it once, while a call is left."""
    run.conclude(text, evidence)
    if "verification" not in run.without and evidence:
        run.judgement = check_answer(run, text, evidence)
    said = f"{run.judgement.verdict}: {run.judgement.reason}"
    if run.judgement.verdict == "contradict" and not run.reopened and run.calls < run.budget.calls:
        run.reopened = True
        return Feedback(said + ". Look again.")
    return Feedback(said, final=True)


# ------------------------------------------------------------------------------------------ the tools' schema
WINDOW = {"start": "number", "end": "number"}
MAYBE = {"start": "number?", "end": "number?"}
MOMENT = {"start": "number", "end": "number?"}  # without an end: two seconds
TOOL_LIST = (
    Tool("perceptive", view, {**MOMENT, "fps": "number?"}, "look at a window closely", evidence="seen"),
    Tool("tool", video_segmentation, MAYBE, "find the scenes"),
    Tool("tool", asr, MOMENT, "what is said in a window", evidence="read"),
    Tool("tool", web_search, {"query": "text"}, "search the documents", evidence="read"),
    Tool("tool", temporal_grounding, {"query": "text", **MAYBE}, "find when something is shown"),
    Tool("memory", memory_read, {"query": "text?", **MAYBE}, "recall by meaning or by time"),
    Tool("memory", memory_write, {"text": "text", **WINDOW}, "note something about a window"),
    Tool("memory", summarize, {"compress": "flag?"},
         "hypothesis, evidence, what is open; compress: forget the rest"),
    Tool("verification", verify, {"claim": "text", "evidence": "spans"}, "look again: is the claim true?"),
    Tool("termination", answer, {"text": "text", "evidence": "spans"}, "end; cite the windows that show it"))
TOOLS = {tool.run.__name__: tool for tool in TOOL_LIST}

JSON_TYPES = {"number": {"type": "number"}, "text": {"type": "string"}, "flag": {"type": "boolean"},
              "spans": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}}
SYSTEM = "You are a video agent. Look, listen and search before you answer."  # as in the toy world's rollouts


def tools_prompt():
    """The tools in the model family's own format, for a model not trained on this agent's rollouts."""
    lines = []
    for name, tool in TOOLS.items():
        types = {argument: JSON_TYPES[kind.rstrip("?")] for argument, kind in tool.fields.items()}
        required = [argument for argument, kind in tool.fields.items() if "?" not in kind]
        parameters = {"type": "object", "properties": types, "required": required}
        function = {"name": name, "description": tool.about, "parameters": parameters}
        lines.append(json.dumps({"type": "function", "function": function}))
    return ("\n\n# Tools\n\nTimes are seconds of the video.\n<tools>\n" + "\n".join(lines) + "\n</tools>\n\n"
            "Think in <think></think>, then make one call:\n"
            '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>')


def is_number(value):
    """A finite number that may be a time; JSON's true is none, and 10 ** 400 would overflow."""
    return type(value) in (int, float) and abs(value) <= 1e9


def check_window(start, end, duration):
    """→ the window inside the video, and a note if it had to be clipped."""
    limit = f"the video ends at {short(duration)} seconds"
    call_needs(is_number(start) and is_number(end), "start and end must be finite numbers")
    call_needs(start < end, "start must be before end")
    call_needs(start < duration and end > 0, limit)
    inside = (max(0.0, float(start)), min(float(end), duration))
    note = "" if inside == (start, end) else f" (clipped: {limit})"
    return inside, note


def check_text(name, value):
    fits = isinstance(value, str) and 0 < len(value.strip()) <= 300  # a query or a note, not an essay
    call_needs(fits, f"{name} must be a text of 1 to 300 characters")


def check_flag(name, value):
    call_needs(type(value) is bool, f"{name} must be true or false")


def check_number(name, value):
    if name == "fps":                        # 30: what cameras take
        call_needs(is_number(value) and 0 < value <= 30, "fps must be a number above 0 and at most 30")
    elif name not in ("start", "end"):       # which are checked as a window
        call_needs(is_number(value), f"{name} must be a finite number")


def check_spans(name, value, duration):
    """→ the windows inside the video, and a note if one had to be clipped."""
    pairs = isinstance(value, list) and all(isinstance(span, list) and len(span) == 2 for span in value)
    call_needs(pairs and 0 < len(value) <= 8, f"{name} must be a list of 1 to 8 windows [start, end]")
    inside = []
    note = ""
    for start, end in value:
        span, clipped = check_window(start, end, duration)
        inside.append(span)
        note = clipped or note
    return inside, note


def check_form(call, tools):
    """Is it a call of one of the tools, with the arguments that the tool has and needs?"""
    fits = type(call) is dict and set(call) == {"name", "arguments"} and type(call["arguments"]) is dict
    call_needs(fits, 'a call is {"name": …, "arguments": {…}}')
    name = call["name"]
    known = isinstance(name, str) and name in tools
    call_needs(known, f"no tool {str(name)[:40]!r}: use one of {', '.join(tools)}")
    fields = tools[name].fields
    for argument in call["arguments"]:
        call_needs(argument in fields, f"{name} has no {argument[:40]!r}")
    for argument, kind in fields.items():
        call_needs(argument in call["arguments"] or "?" in kind, f"{name} needs {argument!r}")


def check_call(call, duration, tools=TOOLS):
    """A call, against the schema of the tools there are → Action; BadCall says what is wrong."""
    check_form(call, tools)
    name = call["name"]
    arguments = dict(call["arguments"])
    fields = tools[name].fields
    note = ""
    # Each argument by its kind.
    for argument, value in arguments.items():
        kind = fields[argument].rstrip("?")
        if kind == "text":
            check_text(argument, value)
        elif kind == "flag":
            check_flag(argument, value)
        elif kind == "spans":
            arguments[argument], note = check_spans(argument, value, duration)
    # A moment is two seconds.
    start = arguments.get("start")
    is_moment = MOMENT.items() <= fields.items() and "end" not in arguments
    if is_moment and type(start) in (int, float):
        arguments["end"] = min(start + 2, duration)
    # Start and end together, as a window inside the video.
    call_needs(("start" in arguments) == ("end" in arguments), f"{name} needs both start and end")
    if "start" in arguments:
        inside, note = check_window(start, arguments["end"], duration)
        arguments["start"], arguments["end"] = inside
    # Other numbers.
    for argument, value in arguments.items():
        if fields[argument].startswith("number"):
            check_number(argument, value)
    return Action(name, arguments, note)


# ---------------------------------------------------------------------------------------------------- budgets
FORCED = '<tool_call>\n{"name": "answer", "arguments": {"text": "'  # how a forced answer begins
FORCED_TOKENS = 64                           # of the forced answer: a text, a window or two
RESERVE = 192                                # kept back for it: its prompt, opening, options' scores, itself


@dataclass
class Budget:
    calls: int = 8                           # assistant turns, malformed calls too
    frames: int = 48                         # different frames shown, the coarse pass included
    tokens: int = 8192                       # of the live context and of all separate contexts
    seconds: float = 300.0
    coarse: int = 24                         # frames of the first look at the whole video
    turn: int = 160                          # tokens of the longest assistant turn
    compress: float = 1.0                    # share of `tokens` that the live context may fill; 1: all

    def __post_init__(self):
        # Frames come in pairs: a temporal patch is two.
        least = dict(calls=0, frames=2, tokens=1, seconds=0, coarse=2, turn=1, compress=0)
        for name, smallest in least.items():
            value = getattr(self, name)
            need(value >= smallest, f"budget --{name} {value}: must be at least {smallest}")
        need(self.coarse <= self.frames, f"budget --coarse {self.coarse}: more than --frames {self.frames}")


# `pairs`: frames spread in twos, 1/fps apart, so that a temporal patch never holds two unrelated moments.

def frame_times(*window, **how):
    """A window's frames as the budget counts them: the set of their times."""
    return {round(float(t), 3) for t in sample_times(*window, **how)}


def clip_to_frames(start, end, fps, seen, left):
    """A window's frames, when at most `left` may be shown that are not in `seen` → their times, and the
    settings of a video item that keep to them; Spent if not one pair is left."""
    times = frame_times(start, end, fps)
    if len(times - seen) <= left:
        return times, {}
    need(left >= 2, "frames", Spent)
    settings = {"max_frames": left // 2 * 2, "pairs": True}         # a temporal patch is two frames
    return frame_times(start, end, fps, **settings), settings


# ------------------------------------------------------------------------------------------------ the rollout
ROUTES = ("global", "speech", "knowledge", "temporal", "fine-grained")  # question types (§3.4)
# What `without` leaves out, to see what it is good for: the part, and the class of tools that goes with it.
PARTS = {"memory": "memory", "routing": "", "verification": "verification", "zoom": "perceptive"}
BELIEF_NOTES = 16                            # newest notes that a compressed context keeps
RECALLED = 12                                # entries of a built memory that are told with the question


@dataclass
class Result:
    answer: str
    evidence: list                           # [(start, end)] seconds
    confidence: float | None                 # probability that the model gave to the answer's text, if known
    verdict: str                             # support | contradict | unclear
    steps: int                               # assistant turns, the forced one not counted
    frames: int                              # different frames shown
    tokens: int                              # of the live context and of all separate contexts
    prefilled: int                           # tokens prefilled into the live context, each once
    budget_exhausted: str                    # "", what ran out (calls, frames, tokens, seconds), or "model"
    route: dict                              # question type → probability
    trace: list                              # the records that a trace file holds


class Rollout:
    """One rollout: its state (Q, V, C, memory, what is spent), the five steps and the loop over them."""

    def __init__(self, model, video, question, options=None, budget=None, facts=None, route=None, without=(),
                 system=SYSTEM, memory=(), listen=None, search=None, trace=lambda record: None,
                 media=None):
        """listen(video, start, end) → [(start, end, text)]: a speech model, where there are no subtitles.
        search(query) → [(source, text)], best first, instead of the folder `facts`. memory: what is known of
        the video before (build_memory); a Memory keeps its own search and cutoff, Memory(search=…) is an
        empty one with yours. without: of PARTS, to see what each is good for. media: settings of all that is
        looked at, such as frame_tokens."""
        for name in without:
            need(name in PARTS, f"part {name!r}: leave out one of {', '.join(PARTS)}")
        need(route in (None, *ROUTES), f"route {route!r}: use one of {', '.join(ROUTES)}")
        # Q, and the video that it is about.
        self.video = str(Path(video).resolve())
        self.item = {"type": "video", "video": self.video, **(media or {})}
        self.question = sanitise(question)
        self.options = [sanitise(option) for option in options or []]
        # How it may be answered.
        self.given_route = route
        self.without = without
        left_out = [PARTS[name] for name in without]
        self.tools = {name: tool for name, tool in TOOLS.items() if tool.kind not in left_out}
        self.facts = facts and str(facts)
        if facts:
            read_documents(self.facts)       # a wrong folder is the user's mistake, not the model's
        self.listen = listen
        self.search = search
        # What it may cost, and what it has cost.
        self.budget = budget or Budget()
        self.deadline = time.monotonic() + self.budget.seconds
        self.calls = 0
        self.seen = set()                    # times of the different frames shown
        self.duration = probe(self.video)
        # The state. C_i is what the model's live cache holds: the same object, under Eq. 5's name.
        self.model = model
        self.C = model
        self.V = [(0.0, self.duration)]      # evidence windows; the first is the coarse look
        if not isinstance(memory, Memory):
            memory = Memory(memory)
        self.memory = Memory(memory, memory.search, memory.cutoff)  # a copy: notes are this rollout's own
        if "memory" in without:
            self.memory.clear()
        self.thought = ""                    # of the last turn
        self.shown = ()                      # window that the last feedback showed
        self.source = ""                     # last tool that gave evidence
        # The answer so far.
        self.answer = "not found"
        self.evidence = []
        self.confidence = 0.0
        self.judgement = NOT_VERIFIED
        self.reopened = False                # by a contradiction, once
        # The trace.
        self.trace = trace
        self.records = []
        self.shrunk = {}                     # a compression during this step
        self.begin(system)

    # ---- C_1: the system prompt; Q with V_1; what memory knows

    def begin(self, system):
        knows = len(self.memory) > 0
        # Before the coarse look adds its frames: they would be found by time and crowd out what is known.
        self.recalled = self.recall() if knows else ""
        self.look_coarsely()
        if not knows:
            for line in read_subtitles(self.video):
                self.memory.add("subtitle", line.text, line.start, line.end, "subtitles")
        self.pose(system)
        if knows:
            fits = self.C.append({"role": "tool", "content": self.recalled}, self.room())
            need(fits, f"--tokens {self.budget.tokens} is too little for what memory knows of the question: raise it")
        self.head = self.C.mark()            # what a compression keeps
        share = self.budget.compress
        most = self.budget.tokens
        need(self.C.tokens < share * most,
             f"--compress {share:g}: the first look alone takes {self.C.tokens} of {most} tokens")

    def recall(self):
        """What a memory that knows the video has for Q: the narrative, what is about the times in Q, what
        matches Q."""
        times = [float(t) for t in re.findall(r"(\d+(?:\.\d+)?) seconds", self.question)]
        found = []
        for entry in self.memory:
            if entry.level == "narrative" or any(entry.start <= t < entry.end for t in times):
                found.append(entry)
        found += self.memory.find(" ".join([self.question, *self.options]))
        lines = [sanitise(entry, 800) for entry in found[:RECALLED]]
        return sanitise("\n".join(dict.fromkeys(lines)))            # each line once

    def look_coarsely(self):
        """V_1: frames spread over the whole video, in pairs. Memory has them as entries."""
        frames = self.budget.coarse // 2 * 2
        self.coarse = {**self.item, "max_frames": frames, "pairs": True}
        self.seen = frame_times(0.0, self.duration, FPS, frames, pairs=True)
        for t in sorted(self.seen):
            self.memory.add("frame", f"frame at {short(t)} seconds", t, t + 1 / FPS, "coarse")

    def pose(self, system):
        """The system prompt, then the coarse look with the options and the question."""
        lines = [f"\n{chr(ord('A') + i)}. {option}" for i, option in enumerate(self.options)]
        text = self.question
        if lines:
            text = "".join(lines) + "\n" + self.question
        content = [self.coarse, {"type": "text", "text": text}]
        for message in ({"role": "system", "content": system}, {"role": "user", "content": content}):
            need(self.C.append(message, self.room()),
                 f"--tokens {self.budget.tokens} is too little for the first look, "
                 f"--coarse {self.budget.coarse} frames: raise it, or look at fewer "
                 "(24 frames of 720p are 10,500 tokens of Qwen3-VL)")

    def route(self):
        """Question routing (§3.4): how likely each question type is as the model's own first word. A soft
        prior: the likeliest, or the given one, opens the first thought and forbids nothing."""
        if "routing" in self.without:
            return {}
        if self.given_route:
            return {self.given_route: 1.0}
        scores = torch.tensor(self.model.score(ROUTES, opening="<think>"))
        return dict(zip(ROUTES, torch.softmax(scores, 0).tolist()))

    # ---- the loop

    def run(self):
        """Eq. 1-5 until R_N answers Q, a terminating action is taken, or a budget is spent → Result."""
        began = time.monotonic()
        exhausted = self.exhausted()
        prior = {} if exhausted else self.route()
        how = {}
        if prior:                            # the route opens the first turn, no later one
            how = {"opening": "<think>", "first": max(prior, key=prior.get)}
        self.record_start(prior, began)
        F = Feedback("")
        while not exhausted and not F.final:
            began = time.monotonic()
            frames = len(self.seen)
            try:
                R = self.reason(**how)                              # Eq. 1
                A = self.act(R)                                     # Eq. 2
                F = self.feedback(A)                                # Eq. 3
                F = self.extend(F)                                  # Eq. 5
                self.V = self.look(F)                               # Eq. 4
                if not F.final:
                    exhausted = self.exhausted()
            except Spent as budget:
                F = Feedback(f"error: no {budget} left")
                exhausted = str(budget)
            except ModelFailed as error:
                A = Action("", {})
                F = self.failed(error)
                exhausted = "model"
            self.record_step(A, F, began, len(self.seen) - frames)
            how = {}
        if exhausted and exhausted != "model":
            self.force()
        return self.result(exhausted, prior)

    def reason(self, **how):
        """Eq. 1 (§3.1): R_i ~ f_θ(Q | V_i, A_i, F_i, C_i), the model's next turn in the live context."""
        R = self.C.generate(min(self.budget.turn, self.room()), deadline=self.deadline, **how)
        self.calls += 1
        self.thought = re.sub(r"</?think>", "", R.split("<tool_call>")[0]).strip()
        if self.shown:                       # what a window showed is noted as it is put into words
            self.memory.add("note", sanitise(self.thought, 300), *self.shown, "view")
        return R

    def act(self, R):
        """Eq. 2 (§3.1): A_{i+1} ~ ρ(A_i | R_i, F_i, Q), the call in R_i. Without one, R_i may answer Q itself."""
        try:
            A = self.read_call(R)
            if A.name == "answer" and self.options:
                named = option_of(A.arguments["text"], self.options)
                call_needs(named is not None, f"answer with one of the options, like {self.options[0]}")
            return A
        except BadCall as problem:
            return Action("", {}, f"error: {problem}")
        except (ValueError, RecursionError) as problem:
            return Action("", {}, f"error: the call is not JSON: {problem}")

    def read_call(self, R):
        call = re.search(r"<tool_call>(.*?)(?:</tool_call>|$)", R, re.S)
        if call:
            return check_call(json.loads(call[1]), self.duration, self.tools)
        text = R.rpartition("</think>")[2].strip()
        call_needs(0 < len(text) <= 300, "no <tool_call> in this turn")
        return Action("answer", {"text": text, "evidence": []})

    def feedback(self, A):
        """Eq. 3 (§3.1): F_{i+1} ~ π(A_{i+1} | R_i, Q), what a tool or the environment answers."""
        if not A.name:
            return Feedback(sanitise(A.note, 400))
        tool = TOOLS[A.name]
        try:
            F = tool.run(self, **A.arguments)
        except Spent:
            raise
        except Exception as error:           # a tool that fails is feedback: the rollout goes on
            return Feedback(f"error: {sanitise(error, 400)}")
        F.text = sanitise(F.text) + A.note
        if tool.evidence:
            self.source = A.name
        return F

    def look(self, F):
        """Eq. 4 (§3.1): V_{i+1} ~ δ(V_i | C_{i+1}): a perceptive action adds an evidence window, others keep V_i."""
        self.shown = F.window
        return [*self.V, F.window] if F.window else self.V

    def extend(self, F):
        """Eq. 5 (§3.1): C_{i+1} = C_i ⊕ (R_i, A_{i+1}, F_{i+1}). R and A are there: the model wrote them. → F, or
        the error that took its place."""
        if F.compress:
            self.compress(F.text)            # the summary is the feedback
            return F
        if F.final:
            return F
        if self.C.tokens > self.budget.compress * self.budget.tokens:
            self.compress(self.belief())
        try:
            self.tell([*F.media, {"type": "text", "text": F.text}] if F.media else F.text)
            return F
        except UserError as error:           # the window cannot be decoded
            return self.extend(Feedback(f"error: {sanitise(error, 400)}"))

    def tell(self, content):
        need(self.C.append({"role": "tool", "content": content}, self.room()), "tokens", Spent)

    # ---- ⊕ with summary (§3.1), the belief of §3.4

    def belief(self):
        """The compact belief summary of §3.4: hypothesis, evidence, candidate times, what is open."""
        grounded = [entry for entry in self.memory if entry.source == "temporal_grounding"]
        candidates = listed((entry.start, entry.end) for entry in grounded)
        seen = listed(self.V[1:])
        text = (f"hypothesis: {self.thought or 'none'}; seen: {seen or 'only the coarse frames'}; "
                f"candidates: {candidates or 'none'}; open: {self.judgement.reason}")
        self.memory.add("belief", text, 0.0, self.duration, "summarize")
        return text

    def compress(self, belief):
        """The live cache keeps its head (system, Q, V_1); the belief and the newest notes follow it."""
        began = time.monotonic()
        before = self.C.tokens
        lines = [belief]
        notes = [entry for entry in self.memory if entry.level == "note"]
        for entry in notes[-BELIEF_NOTES:]:
            lines.append(f"{exact(entry.start, entry.end)}: {entry.content}")
        text = sanitise("\n".join(lines))
        self.C.rewind(self.head)
        self.tell(text)
        self.shrunk = dict(began=began, step=self.calls, before=before, after=self.C.tokens, text=text)

    # ---- what is left of the budgets

    def room(self):
        """Tokens that may still be used; those of the forced answer are kept back."""
        used = self.model.tokens + self.model.side
        left = self.budget.tokens - used
        return min(left, self.model.capacity - self.model.tokens) - RESERVE

    def exhausted(self):
        """The budget that has run out, or ""."""
        if self.calls >= self.budget.calls:
            return "calls"
        if self.room() < 1:
            return "tokens"
        if time.monotonic() >= self.deadline:
            return "seconds"
        return ""

    def window(self, start, end, fps=FPS):
        """The item that shows [start, end), clipped to the frames that are left and charged for; Spent if
        none are."""
        left = self.budget.frames - len(self.seen)
        times, settings = clip_to_frames(start, end, fps, self.seen, left)
        self.seen |= times
        return {**self.item, "start": start, "end": end, "fps": fps, **settings}

    def decode(self, start, end, fps=FPS):
        """The frames of [start, end) themselves, for a tool that looks with other eyes than the model's:
        iv3.Video, frames (F,H,W,3) uint8 and times (F,). Clipped and charged for like those of `window`."""
        return read_video(self.video, **window_of(self.window(start, end, fps)))

    # ---- the answer

    def conclude(self, text, evidence):
        self.answer = text
        self.evidence = evidence
        self.judgement = NOT_VERIFIED
        as_written = json.dumps(text, ensure_ascii=False)[1:-1]     # between the quotes of the call
        self.confidence = self.model.likelihood(as_written)

    def force(self):
        """A budget is spent: "Answer now.", once; with options it starts as the likeliest of them does. It is
        not verified. If it answers nothing, the answer stays as it was."""
        began = time.monotonic()
        self.thought = "Answer now."
        self.C.append({"role": "user", "content": self.thought})
        first = ""
        try:
            if self.options:
                scores = self.model.score(self.options, opening=FORCED)
                first = self.options[np.argmax(scores)]
            R = self.C.generate(FORCED_TOKENS, opening=FORCED, first=first)
        except ModelFailed as error:
            self.record_step(Action("", {}), self.failed(error), began, 0)
            return
        A = self.act(R)
        text = re.search(r'"text": "([^"\n]+)"', R)
        if A.name != "answer" and text:      # a damaged call: its text alone still answers
            A = self.act(text[1])
        if A.name == "answer":
            self.conclude(**A.arguments)
        self.record_step(A, Feedback(A.note or self.answer), began, 0)

    def failed(self, error):
        self.thought = ""
        return Feedback(f"error: {sanitise(error, 400)}")

    def result(self, exhausted, prior):
        tokens = self.model.tokens + self.model.side
        result = Result(self.answer, self.evidence, self.confidence, self.judgement.verdict, self.calls,
                        len(self.seen), tokens, self.model.prefilled, exhausted, prior, self.records)
        told = {name: value for name, value in vars(result).items() if name not in ("route", "trace")}
        self.record("end", **told)
        return result

    # ---- the trace: one record at the start, for each step, for each compression, and at the end

    def record(self, record, began=None, **values):
        values = {"record": record, **values}
        if began is not None:
            values["ms"] = round(1000 * (time.monotonic() - began), 1)
        self.records.append(values)
        self.trace(values)

    def record_start(self, prior, began):
        self.record("start", began, video=self.video, duration=self.duration, question=self.question,
                    options=self.options, route=prior, budget=asdict(self.budget), frames=len(self.seen),
                    recalled=self.recalled, temperature=getattr(self.model, "temperature", None),
                    seed=getattr(self.model, "seed", None))

    def record_step(self, A, F, began, frames):
        kind = TOOLS[A.name].kind if A.name else "malformed"
        tokens = self.model.tokens + self.model.side
        self.record("step", began, step=self.calls, reason=self.thought, action=A.name or "malformed",
                    kind=kind, arguments=A.arguments, frames=frames, feedback=F.text, tokens=tokens)
        if self.shrunk:                      # during this step; told after it
            self.record("compress", **self.shrunk)
            self.shrunk = {}


def run_agent(model, video, question, options=None, **settings):
    """One rollout → Result. settings: those of Rollout."""
    return Rollout(model, video, question, options, **settings).run()


# -------------------------------------------------------------------------------------------------- the trace
def describe_start(r):
    lines = [r["question"]]
    for i, option in enumerate(r["options"]):
        lines.append(f"  {chr(ord('A') + i)}. {option}")
    lines.append(f"video {r['duration']:.1f} s, {r['frames']} coarse frames")
    if r.get("recalled"):
        lines.append(f"from memory: {r['recalled']}")
    likeliest_first = sorted(r["route"].items(), key=lambda item: -item[1])
    lines.append("route: " + ", ".join(f"{name} {p:.2f}" for name, p in likeliest_first))
    return "\n".join(lines)


def describe_step(r):
    arguments = [f"{name}={json.dumps(value)}" for name, value in r["arguments"].items()]
    call = " ".join([r["action"], *arguments])
    cost = f"{r['frames']} frames, {r['tokens']} tokens so far, {r['ms']:.0f} ms"
    return f"[{r['step']}] {r['reason']}\n{call}\n→ {r['feedback']}\n{cost}".replace("\n", "\n    ")


def describe_compress(r):
    text = f"    context: {r['before']} → {r['after']} tokens, in its place: {r['text']}"
    return text.replace("\n", "\n    ")


def describe_end(r):
    lost = ""
    if r["budget_exhausted"] == "model":
        lost = " (the model failed)"
    elif r["budget_exhausted"]:
        lost = f" (budget exhausted: {r['budget_exhausted']})"
    return (f"answer: {r['answer']}{lost}\nevidence: {listed(r['evidence']) or 'none'} seconds\n"
            f"verdict: {r['verdict']}, confidence {chance(r['confidence'])}\ncost: {r['steps']} calls, "
            f"{r['frames']} frames, {r['tokens']} tokens, {r['prefilled']} of them prefilled")


RECORDS = {"start": describe_start, "step": describe_step, "compress": describe_compress, "end": describe_end}


def describe_record(r):
    """The text of a trace record: printed live, and again in a replay."""
    return RECORDS[r["record"]](r)


def read_trace(path):
    """→ the records of a trace file, and their text."""
    try:
        lines = Path(path).read_text().split("\n")
        records = [json.loads(line) for line in lines if line]
        return records, "\n".join(map(describe_record, records))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a trace of this agent ({error})") from error


# ------------------------------------------------------------------------------------------------ the command
def parser_of(about):
    """The flags of a rollout, whatever model it is of."""
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("video", nargs="?")
    add("question", nargs="?")
    add("--options", nargs="+", metavar="TEXT", help="options of a multiple-choice question")
    add("--facts", metavar="DIR", help="folder of .txt documents for web_search")
    add("--memory", metavar="DIR", help="caption the video first, once: its memory is kept in DIR")
    add("--prompt", help="asked of each clip for --memory (default: as the model was trained)")
    add("--route", choices=ROUTES, help="question type, instead of the model's choice")
    add("--without", nargs="+", choices=PARTS, default=(), help="parts of the agent to leave out")
    add("--tools-prompt", action="store_true", help="describe the tools in the system prompt")
    add("--temperature", type=float, default=0.0, help="of the assistant's turns (default 0: greedy)")
    add("--seed", type=int, default=0, help="of the samples at a temperature above 0")
    group = parser.add_argument_group("budget, all hard")
    helps = dict(
        calls="assistant turns", frames="different frames shown", tokens="tokens of all contexts",
        seconds="wall clock", coarse="frames of the first look", turn="tokens of the longest turn",
        compress="share of --tokens that the live context may fill before it shrinks to a summary; 1: never")
    for name, value in asdict(Budget()).items():
        text = f"{helps[name]} (default {value:g})"
        group.add_argument(f"--{name}", type=type(value), default=value, help=text)
    group = parser.add_argument_group("output")
    group.add_argument("--trace", metavar="F", help="write one JSON line per step")
    return parser


def check_args(args):
    if args.trace:
        need(Path(args.trace).absolute().parent.is_dir(), f"{args.trace}: no such folder to write it to")
        need(not Path(args.trace).is_dir(), f"{args.trace}: is a folder; name a file in it")
    if args.options:
        different = len(set(args.options)) == len(args.options)
        need(different and len(args.options) > 1, "--options: two or more, all different")
    need(args.temperature >= 0 and args.seed >= 0, "--temperature and --seed must be at least 0")


def budget_of(args):
    return Budget(**{name: getattr(args, name) for name in asdict(Budget())})


def ask_about(args, live, asked, by, describe_tools=False):
    """A rollout as the flags say it, by the model `live`; `asked`, named by `by`, captions the video for
    --memory."""
    system = SYSTEM
    if args.tools_prompt or describe_tools:
        system += tools_prompt()
    memory = ()
    if args.memory:
        probe(args.video)                    # what is wrong with the file is said before it is captioned
        prompt = args.prompt or caption_prompt(getattr(asked, "wording", ""))
        memory = build_memory(args.video, args.memory, captioner(asked, prompt), [*by, prompt])
    with open(args.trace or os.devnull, "w", buffering=1) as file:  # a killed run leaves its steps
        def trace(record):
            print(describe_record(record), flush=True)
            print(json.dumps(record, ensure_ascii=False), file=file)
        run_agent(live, args.video, args.question, args.options, budget=budget_of(args), facts=args.facts,
                  route=args.route, without=args.without, system=system, memory=memory, trace=trace)


def main():
    parser = parser_of("Answer a question about a video, with evidence.")
    parser.add_argument("--model", help="a stage's directory or a run; default: the newest run")
    parser.add_argument("--replay", metavar="F", help="print a trace again; needs no model")
    args = parser.parse_args()
    check_args(args)
    need(args.replay or args.question is not None, 'give VIDEO and "question", or --replay TRACE')
    if args.replay:
        _, text = read_trace(args.replay)
        print(text)
        return
    budget = budget_of(args)                 # checked before the weights are read
    directory = find_model(args.model)
    loaded = open_model(directory)
    live = LiveModel(*loaded, budget.tokens, args.temperature, args.seed)
    asked = LiveModel(*loaded, 1)            # captions are not the rollout's tokens
    newest = max(file.stat().st_mtime_ns for file in directory.iterdir())  # other weights, another memory
    ask_about(args, live, asked, [str(directory.resolve()), newest])


if __name__ == "__main__":
    run_cli(main)
