"""The agent: Multimodal Contextual Reasoning (MCR), §3.1 and §3.4 of the paper, over one live cache.

Question Q, observation V, action A, feedback F, context C, reasoning R. For i = 1 … N:

    R_i      ~ f_θ(Q | V_i, A_i, F_i, C_i)              (1) reason     the model writes a turn
    A_{i+1}  ~ ρ(A_i | R_i, F_i, Q)                     (2) act        its tool call, checked against a schema
    F_{i+1}  ~ π(A_{i+1} | R_i, Q)                      (3) feedback   the tool answers; so does a failure
    V_{i+1}  ~ δ(V_i | C_{i+1})                         (4) look       the evidence windows from now on
    C_{i+1}  = C_i ⊕ (R_i, A_{i+1}, F_{i+1})            (5) extend     appends to the live cache

    python mcr_agent.py clip.mp4 "Which word is said at 34 seconds?" --options oak maple river --trace t.jsonl
    python mcr_agent.py clip.mp4 "What happens?" --url http://localhost:8000/v1 --api-model NAME    # any other model
    python mcr_agent.py --replay t.jsonl                # prints the same rollout again, without a model

Differs from the paper, or fills what it leaves open:
  1. R_i and A_{i+1} are one assistant turn of one autoregressive rollout.
  2. ⊕ compresses when `summarize` asks for it or the context passes a share of the budget: the cache is truncated to
     its head, and a belief summary and the newest notes are appended. Memory keeps everything.
  3. Verification re-views only the cited spans, in a separate short context; an answer read from subtitles or documents
     is looked up in that text instead. A contradiction reopens the loop once.
  4. `web_search` ranks a local folder of .txt files, `asr` reads the .srt or .vtt file beside the video or the
     subtitles in it. To search online or to hear, give run_agent the functions `search` and `listen` (see Rollout).
  5. Budgets are hard. A frame counts once, however often it is shown; tokens count every time. Only the forced answer
     runs after a budget is spent, on tokens kept back for it (RESERVE).
"""
import argparse
import base64
import functools
import hashlib
import html
import http.client
import json
import math
import os
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch

from iv3 import (SPECIALS, find_model, need, open_model, probe, read_json, read_video, run_cli, sample_times,
                 sample_token, write_atomic)
from m2la import UserError

SYSTEM = "You are a video agent. Look, listen and search before you answer."
ROUTES = ("global", "speech", "knowledge", "temporal", "fine-grained")          # question types (§3.4)
VERDICTS = ("support", "contradict", "unclear")
PARTS = {"memory": "memory", "routing": "", "verification": "verification", "zoom": "perceptive"}    # part: its tools
FORCED = '<tool_call>\n{"name": "answer", "arguments": {"text": "'                # how a forced answer begins
RESERVE = 192                                        # tokens kept back for the forced answer and its prompt
FPS = 2.0                                            # frames per second of a view that does not say


# ------------------------------------------------------------------------------------------- the model, live
@functools.cache
def first_tokens(tokenizer, word):
    """Ids of the tokens that can begin `word`: its beginnings, and longer pieces ("speech: hear what")."""
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return torch.tensor([i for i, t in enumerate(texts) if t and (t.startswith(word) or word.startswith(t))])


class LiveModel:
    """Our model behind the agent's interface, with one growing context. New messages are queued and prefilled
    together just before the model goes on, so that every token passes through the model exactly once."""

    def __init__(self, model, processor, capacity=8192, temperature=0.0, seed=0):
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.temperature, self.seed, self.random = temperature, seed, torch.Generator().manual_seed(seed)
        self.capacity, self.cache = capacity, model.new_cache(1, capacity)
        self.tokens = self.position = 0              # in the context, queued ones too; next MRoPE position
        self.prefilled = self.side = 0               # read there, not written by the model; spent outside or forgotten
        self.queue, self.turn = [], ([], [])         # turn: ids and log-probabilities of the last reply
        self.nothing = processor.encode([])          # what a text has of patches and grids
        allowed = ("<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<think>", "</think>")
        banned = [self.tokenizer.token_id(s) for s in SPECIALS if s not in allowed]
        banned += range(len(self.tokenizer), model.cfg.vocab)        # rows of the table that stand for no token
        self.banned = torch.tensor(banned, device=model.device)

    def mark(self):
        """This place in the context, for `rewind`."""
        return self.tokens, self.position

    def rewind(self, mark):
        """Forget what came after a mark that the model has read: the cache is truncated. Spent tokens stay spent."""
        self.side += self.tokens - mark[0]
        (self.tokens, self.position), self.queue = mark, []
        self.cache.truncate(self.tokens)

    def append(self, message, room=math.inf):
        """Queue a message; False, and nothing happens, if it takes more than `room` tokens."""
        e = self.processor.encode([message], offset=self.position)
        if len(e.ids) > min(room, self.capacity - self.tokens):
            return False
        self.queue.append((e.ids, e.positions, e.patches, e.grids))
        self.tokens, self.position = self.tokens + len(e.ids), e.next_position
        self.prefilled += len(e.ids)
        return True

    def _write(self, text, ids=None):
        """Queue text, or tokens that the model chose; text advances all three MRoPE axes by 1."""
        new = torch.tensor(self.tokenizer.encode(text) if ids is None else ids, dtype=torch.long)
        positions = torch.arange(self.position, self.position + len(new)).expand(3, -1)
        self.queue.append((new, positions, self.nothing.patches, self.nothing.grids))
        self.tokens, self.position = self.tokens + len(new), self.position + len(new)
        self.prefilled += 0 if ids else len(new)

    def _flush(self):
        """Run the queue in one forward pass → log-probabilities (V,) of the next token, -inf where banned."""
        ids, positions, patches, grids = zip(*self.queue)
        inputs = torch.cat(ids)[None], torch.cat(positions, 1)[:, None], torch.cat(patches), torch.cat(grids)
        self.queue = []
        hidden = self.model(*(x.to(self.model.device) for x in inputs), cache=self.cache)          # (1,T,D)
        logits = self.model.logits(hidden[0, -1]).float()                                           # (V,)
        return torch.log_softmax(logits.index_fill(0, self.banned, -torch.inf), -1)

    @torch.inference_mode()
    def generate(self, max_new, stop=("</tool_call>",), opening="", first="", deadline=math.inf):
        """One assistant turn, closed in the context afterwards → its text, `opening` included. `first`: how the model's
        own first words must begin. Also ends at a `stop` token or at the deadline (time.monotonic)."""
        self._write("<|im_start|>assistant\n" + opening)
        ends = {self.tokenizer.token_id(s) for s in ("<|im_end|>", "<|endoftext|>")}
        stops = {self.tokenizer.token_id(s) for s in stop}
        ids, chances = self.turn = [], []
        while len(ids) < max_new and not (ids and ids[-1] in stops) and time.monotonic() < deadline:
            logp = self._flush()
            token = int(sample_token(logp[None], self.temperature, self.random)[0])
            if first and not ids:
                some = first_tokens(self.tokenizer, first).to(logp.device)
                token = int(some[logp[some].argmax()])
            if token in ends:
                break
            ids.append(token)
            chances.append(float(logp[token]))
            self._write("", [token])                 # runs with whatever comes next
        self._write("<|im_end|>\n")
        return opening + self.tokenizer.decode(ids)

    @torch.inference_mode()
    def score(self, choices, opening="", messages=None, room=math.inf):
        """Log-probability that an assistant turn goes on from `opening` with each choice, told by its first token: in
        this context, which is restored afterwards, or in a separate one that holds only `messages`."""
        if messages is not None:
            return self._beside(messages, 16, room, lambda side: side.score(choices, opening))
        mark, prefilled = self.mark(), self.prefilled
        self._write("<|im_start|>assistant\n" + opening)
        logp = self._flush()
        self.rewind(mark)
        self.prefilled = prefilled
        return [float(logp[first_tokens(self.tokenizer, choice)].logsumexp(0)) for choice in choices]

    def ask(self, messages, max_new, room=math.inf):
        """The model's reply in a separate short context; `likelihood` is about it from then on."""
        return self._beside(messages, max_new + 16, room, lambda side: side.generate(max_new, stop=()))

    def _beside(self, messages, extra, room, use):
        needed = len(self.processor.encode(messages).ids) + extra
        need(needed <= room, f"a separate look needs {needed} tokens, {max(0, room)} are left")
        side = LiveModel(self.model, self.processor, needed)
        for message in messages:
            side.append(message)
        result = use(side)
        self.side, self.turn = self.side + side.tokens + side.side, side.turn
        return result

    def likelihood(self, words):
        """Probability the model gave to `words` where its last turn has them last; 0 if it has not."""
        (ids, logps), decode = self.turn, self.tokenizer.decode
        start, ends = decode(ids).rfind(words), [len(decode(ids[:k])) for k in range(len(ids) + 1)]
        inside = [p for a, b, p in zip(ends, ends[1:], logps) if b > start and a < start + len(words)]
        return math.exp(sum(inside)) if start >= 0 and words else 0.0


# ------------------------------------------------------------------------------ the model, behind the user's URL
class ModelFailed(UserError):
    """The model gave no reply: the rollout ends and says so."""


def within(deadline, function, *arguments, most=60.0):
    """function(*arguments), given up at the deadline or after `most` seconds: a server that hangs, or a function of the
    user, does not hang the rollout. The thread stays behind."""
    reply, seconds = Future(), max(0.0, min(most, deadline - time.monotonic()))

    def work():
        try:
            reply.set_result(function(*arguments))
        except Exception as e:
            reply.set_exception(e)
    threading.Thread(target=work, daemon=True).start()
    wait([reply], seconds)
    need(reply.done(), f"no reply in {seconds:g} seconds", TimeoutError)
    return reply.result()


class NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        """Nowhere: the user named one host; frames and the key go to no other."""


class RemoteModel:
    """A model behind an OpenAI-compatible URL, in LiveModel's place. Tool calls are text of our format; frames travel
    as PNG data URLs behind their times. A request holds the whole context (only the server can keep a prefix), a turn
    cannot be opened for the model, choices are asked for, not scored. Tokens are estimates: 4 letters, 256 an image."""

    def __init__(self, url, name, key="", timeout=60.0, temperature=0.0, seed=0):
        need(re.match("https?://[^/]", url), f"--url {url}: must begin with http:// or https://")
        self.url, self.name, self.key, self.timeout = url.rstrip("/") + "/chat/completions", name, key, timeout
        self.temperature, self.seed, self.capacity, self.messages = temperature, seed, math.inf, []
        self.tokens = self.side = self.prefilled = self.answered = 0

    def convert(self, message):
        """→ a message of the API, its tokens. Tool text is quoted in a user turn, as Qwen's chat template does it."""
        role, content, parts = message["role"], message["content"], []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item["type"] == "text":
                text = item["text"] if role != "tool" else f"<tool_response>\n{item['text']}\n</tool_response>"
                parts.append({"type": "text", "text": text})
                continue
            window = {k: item[k] for k in ("start", "end", "fps", "max_frames", "pairs") if k in item}
            video = read_video(item["video"], **window)
            for t, frame in zip(video.times, video.frames):
                data = base64.b64encode(png(frame, 1024)).decode()
                parts += [{"type": "text", "text": f"<{t:.1f} seconds>"},
                          {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
        tokens = sum(len(p["text"]) // 4 + 1 if p["type"] == "text" else 256 for p in parts)
        return {"role": "user" if role == "tool" else role, "content": parts}, tokens

    def request(self, messages, max_new, deadline=math.inf, **sampling):
        turns = []
        for role, same in groupby(messages, key=lambda m: m["role"]):    # some servers want no two user turns in a row
            parts = [part for m in same for part in m["content"]]
            turns.append({"role": role, "content": parts if role == "user" else parts[0]["text"]})
        body = {"model": self.name, "messages": turns, "max_tokens": max_new, "temperature": 0, **sampling}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)

        def read():
            with urllib.request.build_opener(NoRedirects).open(request, timeout=self.timeout) as reply:
                return reply.read(2 ** 22)
        try:
            text = json.loads(within(deadline, read, most=self.timeout))["choices"][0]["message"]["content"] or ""
            self.answered += 1
            return text[:16 * max_new].partition("</tool_call>")[0]      # a server may ignore max_tokens
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as e:
            raise ModelFailed(f"{self.url}: {type(e).__name__}: {e}"[:300]) from e

    def append(self, message, room=math.inf):
        turn, tokens = self.convert(message)
        if tokens > room:
            return False
        self.messages.append(turn)
        self.tokens, self.prefilled = self.tokens + tokens, self.prefilled + tokens
        return True

    def generate(self, max_new, stop=(), opening="", first="", deadline=math.inf):
        sampling = {"temperature": self.temperature, "seed": self.seed} if self.temperature else {}
        text = self.request(self.messages, max_new, deadline, **sampling)
        turn, tokens = self.convert({"role": "assistant", "content": text or "(nothing)"})
        self.messages.append(turn)
        self.tokens += tokens
        return text

    def ask(self, messages, max_new, room=math.inf):
        turns, tokens = zip(*map(self.convert, messages))
        need(sum(tokens) + max_new <= room, f"a separate look needs {sum(tokens) + max_new} tokens, {room} are left")
        self.side += sum(tokens) + max_new
        return self.request(turns, max_new)

    def score(self, choices, opening="", messages=None, room=math.inf):
        """0 for the choice that the model names, -9 for others. A route it does not name stays open."""
        if messages is None and opening == FORCED:   # the forced turn itself names the option
            return [0.0] * len(choices)
        question, tokens = self.convert({"role": "user", "content": f"Name what fits, one word: {', '.join(choices)}."})
        self.side += 0 if messages else tokens + 16  # `ask` counts its own
        try:
            reply = self.ask(messages, 16, room) if messages else self.request([*self.messages, question], 16)
        except ModelFailed:
            if messages:
                raise
            reply = ""
        named = [c for c in choices if re.search(rf"\b{re.escape(c)}", reply.lower())]
        need(named or not messages, f"the model named none of {', '.join(choices)}")
        return [-9.0 * (len(named) == 1 and c != named[0]) for c in choices]

    def likelihood(self, words):
        return None                                  # the API tells no probabilities

    def mark(self):
        return self.tokens, len(self.messages)

    def rewind(self, mark):
        self.side, self.tokens = self.side + self.tokens - mark[0], mark[0]
        del self.messages[mark[1]:]


# -------------------------------------------------------------------------------------------------------- memory
def words(text):
    return re.findall(r"[^\W_]+", text.lower())


def bm25(query, texts, k1=1.2, b=0.75):
    """Score of each text: Σ_w idf(w) · tf·(k1+1) / (tf + k1·(1 − b + b·length/mean length))."""
    bags = [Counter(words(text)) for text in texts]
    scores, mean = [0.0] * len(bags), sum(bag.total() for bag in bags) / max(1, len(bags)) or 1
    for w in sorted(set(words(query))):
        df = sum(w in bag for bag in bags)
        idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
        for i, bag in enumerate(bags):
            scores[i] += idf * bag[w] * (k1 + 1) / (bag[w] + k1 * (1 - b + b * bag.total() / mean))
    return scores


@dataclass
class Entry:
    level: str                                       # frame | clip | scene | subtitle | narrative | note | belief
    content: str
    start: float
    end: float
    source: str                                      # coarse, captions, subtitles, or the tool that it came from

    def __str__(self):
        return f"{exact(self.start, self.end)} [{self.level}] {self.content}"


class Memory(list):
    """Hierarchical memory (§3.4): each Entry has content and time, so it is found by meaning or by time. By meaning is
    BM25: questions share words with captions and subtitles, it needs no second model, and anyone can see why an entry
    came first. A decoder's own hidden states are trained to predict the next token, not to be near what they mean."""

    def add(self, *fields):
        self.append(Entry(*fields))

    def find(self, query=None, start=0.0, end=math.inf, source=None, most=8):
        """Entries that overlap [start, end), in order of time; with a query only what matches, best first."""
        found = sorted((e for e in self if source in (None, e.source) and e.start < end and e.end > start),
                       key=lambda e: e.start)
        if query is not None:
            scores = bm25(query, [e.content for e in found])
            found = [found[i] for i in sorted(range(len(found)), key=lambda i: -scores[i]) if scores[i] > 0]
        return found[:most]


def frame_times(*window, **how):
    """A window's frames as the budget counts them: the set of their times."""
    return {round(float(t), 3) for t in sample_times(*window, **how)}


def short(x):
    """Seconds as messages have them: 34.0 → "34", 33.25 → "33.25"."""
    return f"{round(x, 2):g}"


def chance(p):
    return "unknown" if p is None else f"{p:.2f}"


def exact(start, end):
    return f"{start:.1f} to {end:.1f}"


def listed(spans):
    return ", ".join(f"{short(a)} to {short(b)}" for a, b in spans)


def sanitise(text, limit=2000):
    """Tool text is data: the template's own tokens in it, whoever wrote them there, lose their brackets."""
    text = re.sub(r"<(\|[^<>|]*\||/?(?:tool_call|tool_response|think))>", r"[\1]", str(text))
    return text if len(text) <= limit else text[:limit] + " …"


# ------------------------------------------------------------------------------ subtitles, documents, scenes
@functools.lru_cache(maxsize=256)
def read_subtitles(video):
    """[(start, end, text)] of the .srt or .vtt file beside the video, else of its subtitle stream; no broken cues."""
    path = next((p for p in (Path(video).with_suffix(s) for s in (".srt", ".vtt")) if p.is_file()), None)
    text = path.read_text("utf-8-sig", errors="replace") + "\n" if path else ""
    cues, stamp = [], r"[^\S\n]*(?:(\d+):)?(\d+):(\d+(?:[.,]\d+)?)[^\S\n]*"
    for *times, said in re.findall(rf"^{stamp}-->{stamp}.*\n((?:[^\S\n]*\S.*\n)*)", text, re.M):
        h, m, s, h2, m2, s2 = (float((x or "0").replace(",", ".")) for x in times)
        cues.append((h * 3600 + m * 60 + s, h2 * 3600 + m2 * 60 + s2, said))
    lines = [(a, b, sanitise(" ".join(re.sub(r"<[^>]*>|{\\[^}]*}", "", said).split()), 300))      # no <i>, {\i1}
             for a, b, said in (cues if path else embedded_subtitles(video)) if a < b]
    return [line for line in lines if line[2]]


def embedded_subtitles(video):
    """[(start, end, text)] of a file's first subtitle stream: mov_text, SubRip, ASS; pictures of text have no text."""
    cues = []
    with suppress(av.FFmpegError), av.open(str(video)) as container:       # a damaged file: what was read until then
        origin = (container.start_time or 0) / av.time_base
        for packet in container.demux(container.streams.subtitles[0]) if container.streams.subtitles else ():
            if packet.size and packet.duration:
                start, seconds = (float(t * packet.time_base) for t in (packet.pts, packet.duration))
                said = b" ".join(getattr(part, "dialogue", b"") for part in packet.decode())
                cues.append((start - origin, start - origin + seconds, said.decode(errors="replace")))
    return cues


@functools.lru_cache(maxsize=16)
def read_documents(folder):
    """[(file name, sentence)] of the .txt files of a folder."""
    need(Path(folder).is_dir(), f"{folder}: no such folder of documents (--facts)")
    return [(path.name, " ".join(part.split())) for path in sorted(Path(folder).glob("*.txt"))
            for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", path.read_text("utf-8", errors="replace"))
            if part.strip()]


def scene_starts(signatures, window, threshold=0.03):
    """Numbers of the frames that begin a scene. signatures (F,S): the sorted pixel values of each frame, so
    that the mean difference of two is the area between their cumulative histograms: colours, not motion.
    Compared are medians of `window` frames before and after: cuts and fades peak, a short flash does not."""
    F = len(signatures)
    change = np.array([0.0] + [np.abs(np.median(signatures[max(0, t - window):t], 0)
                                      - np.median(signatures[t:t + window], 0)).mean() for t in range(1, F)])
    sharp = np.abs(np.diff(signatures, axis=0, prepend=signatures[:1])).mean(1)      # where, in a flat peak
    high = change >= max(threshold, 2 * float(np.median(change)))
    runs = np.split(np.arange(F), np.flatnonzero(np.diff(high.astype(int))) + 1)       # one start in each
    return [int(run[np.argmax((change + 0.1 * sharp)[run])]) for run in runs if high[run[0]]]


def find_scenes(path, start, end, deadline=math.inf, fps=4.0, chunk=30.0):
    """[(start, end)] of the scenes in a window: decodes `chunk` seconds at a time, keeps only signatures."""
    signatures, t, quantiles = [], start, np.linspace(0, 1, 64)
    while t < end and (t == start or time.monotonic() < deadline):
        for frame in read_video(path, t, min(t + chunk, end), fps).frames:
            step = [max(1, side // 64) for side in frame.shape]
            pixels = np.sort(frame[::step[0], ::step[1]].reshape(-1, 3), 0)                       # (pixels,3)
            signatures.append(pixels[(quantiles * (len(pixels) - 1)).astype(int)].reshape(-1) / 255)
        t = min(t + chunk, end)
    cuts = [start, *(start + f / fps for f in scene_starts(np.array(signatures), round(fps))), t]
    return list(zip(cuts, cuts[1:]))


# --------------------------------------------------------- what a video shows: clips → scenes → narrative (§4.2.1)
PROMPT = "Describe {t} seconds."                     # what toy models know best; for larger ones: "Describe the video."


class Scene(NamedTuple):
    start: float
    end: float
    text: str                                        # may be empty: the captioner had nothing to say


def captioner(model, prompt=PROMPT):
    """→ caption(video, start, end) → text, by a model's `ask`; {t} in the prompt: the middle of the clip."""
    def caption(video, start, end):
        if math.ceil(start) < math.floor(end):       # whole seconds: times as in training, and no frame across a cut
            start, end = math.ceil(start), math.floor(end)
        item = {"type": "video", "video": str(video), "start": start, "end": end, "max_frames": 64}
        text = {"type": "text", "text": prompt.replace("{t}", str(int((start + end) / 2)))}
        return model.ask([{"role": "user", "content": [item, text]}], 96)
    return caption


def caption_clips(path, caption, longest=10.0):
    """→ duration, [(start, end, caption)]. Clips: what lies between two cuts, in equal parts of at most `longest` s."""
    duration, clips = probe(path), []
    for start, end in find_scenes(path, 0.0, duration):
        parts = max(1, math.ceil((end - start) / longest - 1e-6))
        for a, b in pairwise(np.linspace(start, end, parts + 1).tolist()):
            clips.append((a, b, " ".join(sanitise(caption(path, a, b), 400).split()).rstrip(".")))
    return duration, clips


def alike(a, b, same):
    """Do two captions show the same? Of the shorter one's words, a share of `same` is in the other."""
    a, b = set(words(a)), set(words(b))
    return len(a & b) >= same * max(1, min(len(a), len(b)))


def merge(clips, same):
    """Neighbouring clips that show the same → one Scene, with the caption that says most."""
    scenes = []
    for start, end, text in clips:
        if scenes and alike(scenes[-1].text, text, same):
            before = scenes.pop()
            start, text = before.start, max(before.text, text, key=lambda t: len(words(t)))
        scenes.append(Scene(start, end, text))
    return scenes


def narrative(scenes):
    return " ".join(f"{exact(s.start, s.end)}: {s.text}." for s in scenes if s.text)


def build_memory(video, folder, caption, model, same=0.85):
    """Memory of a video before any question: clips, scenes, subtitles, narrative. Captions cost much: it is built once
    and kept in `folder` as JSON, under a name made of the file's ends, its subtitles, and `model`, who captions."""
    with open(video, "rb") as file:                  # ends: an hour of video is not read to know it again
        ends = file.read(2 ** 20), file.seek(max(0, Path(video).stat().st_size - 2 ** 20)), file.read()
    spoken = read_subtitles(str(video))
    key = hashlib.sha256(repr((ends, spoken, model, same)).encode()).hexdigest()[:16]
    kept = Path(folder) / f"{Path(video).stem}-{key}.json"
    if not kept.is_file():
        (duration, clips), memory = caption_clips(video, caption), Memory()
        scenes = merge(clips, same)
        for a, b, text in scenes:
            memory.add("scene", text, a, b, "captions")
            parts = [clip for clip in clips if a <= clip[0] < b]
            for start, end, said in parts if len(parts) > 1 else ():
                memory.add("clip", said, start, end, "captions")
        for start, end, said in spoken:
            memory.add("subtitle", said, start, end, "subtitles")
        memory.add("narrative", narrative(scenes), 0.0, duration, "captions")
        kept.parent.mkdir(parents=True, exist_ok=True)
        record = {"video": str(video), "model": model, "entries": [asdict(e) for e in memory]}
        write_atomic(kept, lambda p: p.write_text(json.dumps(record, indent=1, ensure_ascii=False)))
    try:
        return Memory(Entry(**entry) for entry in read_json(kept)["entries"])
    except (TypeError, LookupError) as e:
        raise UserError(f"{kept}: not a memory of this agent ({e}); delete it") from e


# ------------------------------------------------------------------------------------------ actions and tools
class BadCall(ValueError):
    """What is wrong with a tool call; the model reads it as "error: …"."""


call_needs = functools.partial(need, error=BadCall)


class Spent(Exception):
    """A budget ran out; the message is its name."""


@dataclass
class Action:
    name: str                                        # of a tool; "" when the turn could not be understood
    arguments: dict
    note: str = ""                                   # what was wrong, or what was corrected


@dataclass
class Feedback:
    text: str
    media: list = field(default_factory=list)        # video items shown with the text
    window: tuple = ()                               # of a view: what V gains
    final: bool = False                              # the rollout ends here
    compress: bool = False                           # the context shrinks to a summary instead of taking the text


@dataclass
class Budget:
    calls: int = 8                                   # assistant turns, malformed calls too
    frames: int = 48                                 # different frames shown, the coarse pass included
    tokens: int = 8192                               # of the live context and of all separate contexts
    seconds: float = 300.0
    coarse: int = 24                                 # frames of the first look at the whole video
    turn: int = 160                                  # tokens of the longest assistant turn
    compress: float = 1.0                            # share of `tokens` that the live context may fill; 1: all

    def __post_init__(self):
        for name, least in dict(calls=0, frames=2, tokens=1, seconds=0, coarse=2, turn=1, compress=0).items():
            value = getattr(self, name)
            need(value >= least, f"budget --{name} {value}: must be at least {least}")
        need(self.coarse <= self.frames, f"budget --coarse {self.coarse}: more than --frames {self.frames}")


def view(run, start, end, fps=FPS):
    item = run.window(start, end, fps)
    fewer = f" {item['max_frames']} frames only." if "max_frames" in item else ""
    return Feedback(f"{short(start)} to {short(end)} seconds.{fewer}", [item], (start, end))


def video_segmentation(run, start=0.0, end=None):
    scenes = find_scenes(run.video, start, end or run.duration, run.deadline)
    for k, span in enumerate(scenes, 1):
        run.memory.add("scene", f"scene {k}", *span, "video_segmentation")
    return Feedback(f"{len(scenes)} scenes: " + ", ".join(exact(*span) for span in scenes))


def asr(run, start, end):
    heard = run.memory.find(start=start, end=end, source="subtitles", most=40)
    if not run.memory.find(source="subtitles"):
        if not run.listen:
            return Feedback("no speech available: the video has no subtitles")
        heard = [Entry("subtitle", sanitise(said, 300), float(a), float(b), "listen")
                 for a, b, said in within(run.deadline, run.listen, run.video, start, end)[:40]]
    for e in heard:
        run.memory.add("note", e.content, e.start, e.end, "asr")
    lines = "\n".join(f"{exact(e.start, e.end)}: {e.content}" for e in heard)
    return Feedback(lines or f"no speech between {short(start)} and {short(end)} seconds")


def web_search(run, query):
    best = {}                                        # the best text of each document, up to three of them
    if run.search:
        best = {name: f"[{sanitise(name, 200)}] {sanitise(text, 600)}"
                for name, text in within(run.deadline, run.search, query)[:3]}
    else:
        call_needs(run.facts is not None, "there are no documents to search")
        sentences = read_documents(run.facts)
        scores = bm25(query, [f"{Path(name).stem} {text}" for name, text in sentences])
        for score, (name, text) in sorted(zip(scores, sentences), key=lambda found: -found[0]):
            if score > 0.8 * max(scores) and len(best) < 3:
                best.setdefault(name, f"[{name}] {text}")
    for text in best.values():
        run.memory.add("note", text, 0.0, run.duration, "web_search")
    return Feedback("\n".join(best.values()) or f"nothing found for {query}")


def temporal_grounding(run, query, start=None, end=None):
    """The model itself, in a separate context: on the coarse video (the same frames, so no new ones) or on a window.
    The score is the probability that it gave to the span's words."""
    question = query if query.endswith("?") else f"When is the {re.sub('^(the|an?) ', '', query)} shown?"
    item = run.coarse if start is None else run.window(start, end)
    content = [item, {"type": "text", "text": sanitise(question)}]
    reply = run.model.ask([{"role": "user", "content": content}], 32, run.room())
    span = re.search(r"(\d+(?:\.\d+)?)\s*(?:to|and|-|–)\s*(\d+(?:\.\d+)?)", reply)
    start, end = (min(float(x), run.duration) for x in span.groups()) if span else (0, 0)
    if not start < end:
        return Feedback(f"not found: {query}")
    run.memory.add("note", query, start, end, "temporal_grounding")
    return Feedback(f"{exact(start, end)} seconds (score {chance(run.model.likelihood(span[0]))})")


def memory_read(run, query=None, **window):
    call_needs(query is not None or window, "memory_read needs a query, or start and end")
    found = run.memory.find(query, **window)
    return Feedback("\n".join(map(str, found)) or "nothing in memory")


def memory_write(run, text, start, end):
    run.memory.add("note", text, start, end, "memory_write")
    return Feedback("noted")


def summarize(run, compress=False):
    return Feedback(run.belief(), compress=compress)


def verify(run, claim, evidence):
    return Feedback(": ".join(run.second_look(claim, evidence)))


def answer(run, text, evidence):
    """Ends the rollout, unless its verification contradicts: that reopens it once, while a call is left."""
    run.conclude(text, evidence)
    if "verification" not in run.without and evidence:
        run.verdict = run.check_answer(text, evidence)
    again = run.verdict[0] == "contradict" and not run.reopened and run.calls < run.budget.calls
    run.reopened |= again
    return Feedback(": ".join(run.verdict) + (". Look again." if again else ""), final=not again)


@dataclass(frozen=True)
class Tool:
    kind: str                                        # class of action (§3.1)
    run: Callable
    fields: dict                                     # name → number | text | spans | flag; "?": optional
    about: str


WINDOW, MAYBE = {"start": "number", "end": "number"}, {"start": "number?", "end": "number?"}
MOMENT = {"start": "number", "end": "number?"}       # without an end: two seconds
TOOLS = {tool.run.__name__: tool for tool in (
    Tool("perceptive", view, {**MOMENT, "fps": "number?"}, "look at a window closely"),
    Tool("tool", video_segmentation, MAYBE, "find the scenes"),
    Tool("tool", asr, MOMENT, "what is said in a window"),
    Tool("tool", web_search, {"query": "text"}, "search the documents"),
    Tool("tool", temporal_grounding, {"query": "text", **MAYBE}, "find when something is shown"),
    Tool("memory", memory_read, {"query": "text?", **MAYBE}, "recall by meaning or by time"),
    Tool("memory", memory_write, {"text": "text", **WINDOW}, "note something about a window"),
    Tool("memory", summarize, {"compress": "flag?"}, "hypothesis, evidence, what is open; compress: forget the rest"),
    Tool("verification", verify, {"claim": "text", "evidence": "spans"}, "look again: is the claim true?"),
    Tool("termination", answer, {"text": "text", "evidence": "spans"}, "end; cite the windows that show it"))}


def tools_prompt():
    """The tools in the model family's own format, for a model not trained on this agent's rollouts."""
    spans = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
    types = {"number": {"type": "number"}, "text": {"type": "string"}, "spans": spans, "flag": {"type": "boolean"}}
    lines = [json.dumps({"type": "function", "function": {
        "name": name, "description": t.about, "parameters": {"type": "object",
        "properties": {f: types[kind.rstrip("?")] for f, kind in t.fields.items()},
        "required": [f for f, kind in t.fields.items() if "?" not in kind]}}}) for name, t in TOOLS.items()]
    return ("\n\n# Tools\n\nTimes are seconds of the video.\n<tools>\n" + "\n".join(lines) + "\n</tools>\n\n"
            "Think in <think></think>, then make one call:\n"
            '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>')


def check_window(start, end, duration):
    """→ the window inside the video, and a note if it had to be clipped."""
    numbers, limit = (int, float), f"the video ends at {short(duration)} seconds"
    call_needs(all(type(x) in numbers and abs(x) <= 1e9 for x in (start, end)), "start and end must be finite numbers")
    call_needs(start < end, "start must be before end")
    call_needs(start < duration and end > 0, limit)
    inside = (max(0.0, float(start)), min(float(end), duration))
    return inside, "" if inside == (start, end) else f" (clipped: {limit})"


def check_call(call, duration, tools=TOOLS):
    """A call, against the schema of the tools there are → Action; BadCall says what is wrong."""
    fits = type(call) is dict and set(call) == {"name", "arguments"} and type(call["arguments"]) is dict
    call_needs(fits, 'a call is {"name": …, "arguments": {…}}')
    name, arguments, note = call["name"], dict(call["arguments"]), ""
    call_needs(isinstance(name, str) and name in tools, f"no tool {str(name)[:40]!r}: use one of {', '.join(tools)}")
    fields = tools[name].fields
    for f in arguments:
        call_needs(f in fields, f"{name} has no {f[:40]!r}")
    for f, kind in fields.items():
        call_needs(f in arguments or "?" in kind, f"{name} needs {f!r}")
    for f, value in arguments.items():
        if fields[f].startswith("text"):
            fits = isinstance(value, str) and 0 < len(value.strip()) <= 300
            call_needs(fits, f"{f} must be a text of 1 to 300 characters")
        call_needs(fields[f] != "flag?" or type(value) is bool, f"{f} must be true or false")
        if fields[f] == "spans":
            pairs = isinstance(value, list) and all(isinstance(s, list) and len(s) == 2 for s in value)
            call_needs(pairs and 0 < len(value) <= 8, f"{f} must be a list of 1 to 8 windows [start, end]")
            checked = [check_window(*span, duration) for span in value]
            arguments[f], note = [span for span, _ in checked], max(n for _, n in checked)
    if fields.items() >= MOMENT.items() and "end" not in arguments and type(arguments["start"]) in (int, float):
        arguments["end"] = min(arguments["start"] + 2, duration)
    call_needs(("start" in arguments) == ("end" in arguments), f"{name} needs both start and end")
    if "start" in arguments:
        (arguments["start"], arguments["end"]), note = check_window(arguments["start"], arguments["end"], duration)
    fps = arguments.get("fps", FPS)
    call_needs(type(fps) in (int, float) and 0 < fps <= 30, "fps must be a number above 0 and at most 30")
    return Action(name, arguments, note)


def option_of(text, options):
    """Index of the option that a text names: "maple (B)", "B", "B. maple" or "maple"; None if none."""
    text = text.strip().rstrip(".")
    letter = re.search(r"\(([A-Z])\)$", text) or re.match(r"\(?([A-Z])(?:[.):]|$)", text)
    if letter and ord(letter[1]) - 65 < len(options):
        return ord(letter[1]) - 65
    return next((i for i, option in enumerate(options) if option.lower() == text.lower()), None)


def claim_of(question, answer, thought):
    """The statement that a second look checks. The toy's questions about one moment have their own wording,
    with the object that the agent says it saw; any other question is quoted."""
    toy = re.fullmatch(r"(What colour|Which shape|Which way|What) (?:is|does) .*at (\d+) seconds\?", question)
    if not toy:
        return f"{question} {answer}"
    saw = re.match(r"(\w+) (\w+) moving ", thought)
    colour, shape = saw.groups() if saw else ("", "shape")
    thing = {"What colour": f"{answer} {shape}", "Which shape": f"{colour} {answer.removeprefix('a ')}",
             "Which way": f"{colour} {shape} moving {answer}"}.get(toy[1], answer)
    return f"at {toy[2]} seconds there is a {thing.strip()}."


# ------------------------------------------------------------------------------------------------ the rollout
@dataclass
class Result:
    answer: str
    evidence: list                                   # [(start, end)] seconds
    confidence: float | None                         # probability that the model gave to the answer's text, if known
    verdict: str                                     # support | contradict | unclear
    steps: int                                       # assistant turns, the forced one not counted
    frames: int                                      # different frames shown
    tokens: int                                      # of the live context and of all separate contexts
    prefilled: int                                   # tokens prefilled into the live context, each once
    budget_exhausted: str                            # "", what ran out (calls, frames, tokens, seconds), or "model"
    route: dict                                      # question type → probability
    trace: list                                      # the records that a trace file holds


class Rollout:
    """One rollout: its state (Q, V, C, memory, what is spent) and the five steps."""

    def __init__(self, model, video, question, options=None, budget=None, facts=None, route=None, without=(),
                 system=SYSTEM, memory=(), listen=None, search=None, trace=lambda record: None,
                 media=None):
        """listen(video, start, end) → [(start, end, text)]: a speech model, where there are no subtitles.
        search(query) → [(source, text)], best first, instead of the folder `facts`. without: of PARTS, to see what each
        is good for. media: settings of all that is looked at, such as frame_tokens."""
        for name in without:
            need(name in PARTS, f"part {name!r}: leave out one of {', '.join(PARTS)}")
        need(route in (None, *ROUTES), f"route {route!r}: use one of {', '.join(ROUTES)}")
        self.model = self.C = model                  # C_i (Eq. 5) is what the model's live cache holds
        self.video, self.facts = str(Path(video).resolve()), facts and str(facts)
        self.item = {"type": "video", "video": self.video, **(media or {})}
        if facts:
            read_documents(self.facts)               # a wrong folder is the user's mistake, not the model's
        self.options = [sanitise(option) for option in options or []]
        self.question = sanitise(question)
        self.budget, self.given_route, self.without, self.trace = budget or Budget(), route, without, trace
        self.tools = {k: tool for k, tool in TOOLS.items() if tool.kind not in [PARTS[name] for name in without]}
        self.deadline, self.duration = time.monotonic() + self.budget.seconds, probe(self.video)
        self.listen, self.search = listen, search
        self.memory, self.V = Memory(() if "memory" in without else memory), [(0.0, self.duration)]
        self.answer, self.evidence, self.confidence = "not found", [], 0.0
        self.verdict, self.reopened = ("unclear", "not verified"), False
        self.calls, self.records, self.thought, self.recalled, self.shrunk = 0, [], "", "", {}
        self.last = self.source = ""                 # last tool; last one that gave evidence
        self.begin(system)

    def begin(self, system):
        """C_1: the system prompt; then Q with V_1, the coarse look at the whole video. Memory starts; one that knows
        the video already tells what it has for Q: the narrative, what is about the times in Q, what matches Q."""
        known, frames = list(self.memory), self.budget.coarse // 2 * 2
        self.coarse = {**self.item, "max_frames": frames, "pairs": True}
        self.seen = frame_times(0.0, self.duration, FPS, frames, pairs=True)
        for t in sorted(self.seen):
            self.memory.add("frame", f"frame at {short(t)} seconds", t, t + 1 / FPS, "coarse")
        for a, b, text in () if known else read_subtitles(self.video):
            self.memory.add("subtitle", text, a, b, "subtitles")
        text = "".join(f"\n{chr(65 + i)}. {option}" for i, option in enumerate(self.options))
        text = f"{text}\n{self.question}" if text else self.question
        for role, content in ("system", system), ("user", [self.coarse, {"type": "text", "text": text}]):
            fits = self.C.append({"role": role, "content": content}, self.room())
            need(fits, f"--tokens {self.budget.tokens} is too little for the first look, --coarse {self.budget.coarse} "
                 "frames: raise it, or look at fewer (24 frames of 720p are 10,500 tokens of Qwen3-VL)")
        if known:
            times = [float(t) for t in re.findall(r"(\d+(?:\.\d+)?) seconds", self.question)]
            found = [*(e for e in known if e.level == "narrative" or any(e.start <= t < e.end for t in times)),
                     *Memory(known).find(" ".join([self.question, *self.options]))]
            self.recalled = sanitise("\n".join(dict.fromkeys(sanitise(e, 800) for e in found[:12])))
            self.tell(self.recalled)
        self.head, share = self.C.mark(), self.budget.compress
        need(self.C.tokens < share * self.budget.tokens,
             f"--compress {share:g}: the first look alone takes {self.C.tokens} of {self.budget.tokens} tokens")

    def room(self):
        """Tokens that may still be used; those of the forced answer are kept back."""
        used = self.model.tokens + self.model.side
        return min(self.budget.tokens - used, self.model.capacity - self.model.tokens) - RESERVE

    def window(self, start, end, fps=FPS):
        """The item that shows [start, end), clipped to the frames that are left."""
        item = {**self.item, "start": start, "end": end, "fps": fps}
        times, left = frame_times(start, end, fps), self.budget.frames - len(self.seen)
        if len(times - self.seen) > left:
            need(left >= 2, "frames", Spent)
            item.update(max_frames=left // 2 * 2, pairs=True)
            times = frame_times(start, end, fps, item["max_frames"], pairs=True)
        self.seen |= times
        return item

    def spent(self):
        """The budget that has run out, or ""."""
        return ("calls" if self.calls >= self.budget.calls else "tokens" if self.room() < 1
                else "seconds" if time.monotonic() >= self.deadline else "")

    def route(self):
        """Question routing (§3.4): how likely each question type is as the model's own first word. A soft prior: the
        likeliest, or the given one, opens the first thought and forbids nothing."""
        if "routing" in self.without:
            return {}
        if self.given_route:
            return {self.given_route: 1.0}
        scores = torch.tensor(self.model.score(ROUTES, opening="<think>"))
        return dict(zip(ROUTES, torch.softmax(scores, 0).tolist()))

    def reason(self, **how):
        """Eq. 1: R_i ~ f_θ(Q | V_i, A_i, F_i, C_i), the model's next turn in the live context."""
        R = self.C.generate(min(self.budget.turn, self.room()), deadline=self.deadline, **how)
        self.calls += 1
        self.thought = re.sub(r"</?think>", "", R.split("<tool_call>")[0]).strip()
        if self.last == "view":                      # what a window showed is noted as it is put into words
            self.memory.add("note", sanitise(self.thought, 300), *self.V[-1], "view")
        return R

    def act(self, R):
        """Eq. 2: A_{i+1} ~ ρ(A_i | R_i, F_i, Q), the call in R_i. Without one, R_i may answer Q itself."""
        call = re.search(r"<tool_call>(.*?)(?:</tool_call>|$)", R, re.S)
        try:
            A = (check_call(json.loads(call[1]), self.duration, self.tools) if call else
                 Action("answer", {"text": R.rpartition("</think>")[2].strip(), "evidence": []}))
            call_needs(call or 0 < len(A.arguments["text"]) <= 300, "no <tool_call> in this turn")
            if A.name == "answer" and self.options:
                named = option_of(A.arguments["text"], self.options)
                call_needs(named is not None, f"answer with one of the options, like {self.options[0]}")
            return A
        except (ValueError, RecursionError) as e:    # not JSON, or BadCall
            return Action("", {}, f"error: {'' if isinstance(e, BadCall) else 'the call is not JSON: '}{e}")

    def feedback(self, A):
        """Eq. 3: F_{i+1} ~ π(A_{i+1} | R_i, Q), what a tool or the environment answers."""
        self.last = ""
        if not A.name:
            return Feedback(sanitise(A.note, 400))
        try:
            F = TOOLS[A.name].run(self, **A.arguments)
        except Spent:
            raise
        except Exception as e:                       # a tool that fails is feedback: the rollout goes on
            return Feedback(f"error: {sanitise(e, 400)}")
        F.text, self.last = sanitise(F.text) + A.note, A.name
        self.source = A.name if A.name in ("view", "asr", "web_search") else self.source
        return F

    def extend(self, F):
        """Eq. 5: C_{i+1} = C_i ⊕ (R_i, A_{i+1}, F_{i+1}). R and A are there: the model wrote them. → F."""
        if F.compress or not F.final and self.C.tokens > self.budget.compress * self.budget.tokens:
            self.compress(F.text if F.compress else self.belief())
        try:
            content = [*F.media, {"type": "text", "text": F.text}] if F.media else F.text
            if not (F.final or F.compress):
                self.tell(content)
            return F
        except UserError as e:                       # the window cannot be decoded
            return self.extend(Feedback(f"error: {sanitise(e, 400)}"))

    def tell(self, content):
        need(self.C.append({"role": "tool", "content": content}, self.room()), "tokens", Spent)

    def belief(self):
        """The compact belief summary of §3.4: hypothesis, evidence, candidate times, what is open."""
        candidates = listed((e.start, e.end) for e in self.memory if e.source == "temporal_grounding")
        text = (f"hypothesis: {self.thought or 'none'}; seen: {listed(self.V[1:]) or 'only the coarse frames'}; "
                f"candidates: {candidates or 'none'}; open: {self.verdict[1]}")
        self.memory.add("belief", text, 0.0, self.duration, "summarize")
        return text

    def compress(self, belief):
        """⊕ with summary: the live cache keeps its head (system, Q, V_1); the belief and the newest notes follow it."""
        began, before, notes = time.monotonic(), self.C.tokens, [e for e in self.memory if e.level == "note"][-16:]
        text = sanitise("\n".join([belief, *(f"{exact(e.start, e.end)}: {e.content}" for e in notes)]))
        self.C.rewind(self.head)
        self.tell(text)
        self.shrunk = dict(began=began, step=self.calls, before=before, after=self.C.tokens, text=text)

    def look(self, F):
        """Eq. 4: V_{i+1} ~ δ(V_i | C_{i+1}): a perceptive action adds an evidence window, others keep V_i."""
        return [*self.V, F.window] if F.window else self.V

    def run(self):
        began, exhausted, F = time.monotonic(), self.spent(), Feedback("")
        prior = {} if exhausted else self.route()
        how = {"opening": "<think>", "first": max(prior, key=prior.get)} if prior else {}
        self.record("start", began, video=self.video, duration=self.duration, question=self.question,
                    options=self.options, route=prior, budget=asdict(self.budget), frames=len(self.seen),
                    recalled=self.recalled, temperature=getattr(self.model, "temperature", None),
                    seed=getattr(self.model, "seed", None))
        while not exhausted and not F.final:
            began, frames = time.monotonic(), len(self.seen)
            try:
                R = self.reason(**how)                                                               # Eq. 1
                A = self.act(R)                                                                      # Eq. 2
                F = self.feedback(A)                                                                 # Eq. 3
                F = self.extend(F)                                                                   # Eq. 5
                self.V = self.look(F)                                                                # Eq. 4
                exhausted = "" if F.final else self.spent()
            except Spent as e:
                F, exhausted = Feedback(f"error: no {e} left"), str(e)
            except ModelFailed as e:
                A, F, exhausted = Action("", {}), self.failed(e), "model"
            self.step(A, F, began, len(self.seen) - frames)
            how = {}
        if exhausted not in ("", "model"):
            self.force()
        result = Result(self.answer, self.evidence, self.confidence, self.verdict[0], self.calls, len(self.seen),
                        self.model.tokens + self.model.side, self.model.prefilled, exhausted, prior, self.records)
        self.record("end", **{k: v for k, v in vars(result).items() if k not in ("route", "trace")})
        return result

    def failed(self, error):
        self.thought = ""
        return Feedback(f"error: {sanitise(error, 400)}")

    def conclude(self, text, evidence):
        self.answer, self.evidence, self.verdict = text, evidence, ("unclear", "not verified")
        self.confidence = self.model.likelihood(json.dumps(text, ensure_ascii=False)[1:-1])

    def force(self):
        """A budget is spent: "Answer now.", once; with options it starts as the likeliest of them does. If it answers
        nothing, the answer stays as it was."""
        began, self.thought = time.monotonic(), "Answer now."
        self.C.append({"role": "user", "content": self.thought})
        try:
            first = self.options[np.argmax(self.model.score(self.options, opening=FORCED))] if self.options else ""
            R = self.C.generate(64, opening=FORCED, first=first)
        except ModelFailed as e:
            self.step(Action("", {}), self.failed(e), began, 0)
            return
        A, text = self.act(R), re.search(r'"text": "([^"\n]+)"', R)
        if A.name != "answer" and text:              # damaged after its text: the text still answers
            A = self.act(text[1])
        if A.name == "answer":
            self.conclude(**A.arguments)
        self.step(A, Feedback(A.note or self.answer), began, 0)

    def check_answer(self, text, evidence):
        """(verdict, reason): is the answer supported by what it cites (§3.4)? What was read is looked up in the cited
        text, where another option contradicts; what was seen is seen again."""
        index = option_of(text, self.options)
        answer = re.sub(r"\s*\([A-Z]\)$", "", text) if index is None else self.options[index]
        if self.source not in ("asr", "web_search"):
            return self.second_look(claim_of(self.question, answer, self.thought), evidence)
        cited = [f" {' '.join(words(e.content))} " for a, b in evidence
                 for e in self.memory.find(start=a, end=b, source=self.source, most=99)]
        said = [o for o in (answer, *self.options) if any(f" {' '.join(words(o))} " in c for c in cited)]
        verdict = "unclear" if not said else "support" if said[0] == answer else "contradict"
        return verdict, f"{self.source}: {said[0] if said else 'nothing of it'} at {listed(evidence)} seconds"

    def second_look(self, claim, evidence):
        """(verdict, reason): the model judges a claim from the cited spans alone, in a separate context."""
        text = f"Claim: {sanitise(claim, 400)}\nAnswer support, contradict or unclear."
        try:
            content = [*(self.window(a, b) for a, b in evidence), {"type": "text", "text": text}]
            scores = self.model.score(VERDICTS, messages=[{"role": "user", "content": content}], room=self.room())
        except (Spent, UserError) as e:
            return "unclear", f"no second look at {listed(evidence)} seconds ({e})"
        p, best = torch.softmax(torch.tensor(scores), 0).max(0)
        return VERDICTS[best], f"second look at {listed(evidence)} seconds ({p:.2f})"

    def step(self, A, F, began, frames):
        self.record("step", began, step=self.calls, reason=self.thought, action=A.name or "malformed",
                    kind=TOOLS[A.name].kind if A.name else "malformed", arguments=A.arguments, frames=frames,
                    feedback=F.text, tokens=self.model.tokens + self.model.side)
        if self.shrunk:                              # during this step; told after it
            self.record("compress", **self.shrunk)
            self.shrunk = {}

    def record(self, record, began=None, **values):
        ms = {} if began is None else {"ms": round(1000 * (time.monotonic() - began), 1)}
        self.records.append({"record": record, **values, **ms})
        self.trace(self.records[-1])


def run_agent(model, video, question, options=None, **settings):
    """One rollout → Result. settings: those of Rollout."""
    return Rollout(model, video, question, options, **settings).run()


# --------------------------------------------------------------------------------------- trace, page, command
def describe(r):
    """The text of a trace record: printed live, and again in a replay."""
    if r["record"] == "start":
        options = "".join(f"\n  {chr(65 + i)}. {option}" for i, option in enumerate(r["options"]))
        route = ", ".join(f"{k} {p:.2f}" for k, p in sorted(r["route"].items(), key=lambda item: -item[1]))
        video = f"video {r['duration']:.1f} s, {r['frames']} coarse frames"
        recalled = f"\nfrom memory: {r['recalled']}" if r.get("recalled") else ""
        return f"{r['question']}{options}\n{video}{recalled}\nroute: {route}"
    if r["record"] == "step":
        call = " ".join([r["action"], *(f"{k}={json.dumps(v)}" for k, v in r["arguments"].items())])
        cost = f"{r['frames']} frames, {r['tokens']} tokens so far, {r['ms']:.0f} ms"
        return f"[{r['step']}] {r['reason']}\n{call}\n→ {r['feedback']}\n{cost}".replace("\n", "\n    ")
    if r["record"] == "compress":
        return f"    context: {r['before']} → {r['after']} tokens, in its place: {r['text']}".replace("\n", "\n    ")
    lost = r["budget_exhausted"] and f" (budget exhausted: {r['budget_exhausted']})"
    lost = " (the model failed)" if r["budget_exhausted"] == "model" else lost
    return (f"answer: {r['answer']}{lost}\nevidence: {listed(r['evidence']) or 'none'} seconds\n"
            f"verdict: {r['verdict']}, confidence {chance(r['confidence'])}\ncost: {r['steps']} calls, "
            f"{r['frames']} frames, {r['tokens']} tokens, {r['prefilled']} of them prefilled")


def read_trace(path):
    try:
        records = [json.loads(line) for line in Path(path).read_text().split("\n") if line]
        timeline(records)                            # what the page needs is there too
        return records, "\n".join(map(describe, records))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a trace of this agent ({e})") from e


def png(frame, side=256):
    """(H,W,3) uint8 → PNG bytes; every n-th pixel when it is larger than `side`."""
    frame = np.ascontiguousarray(frame[::max(1, frame.shape[0] // side), ::max(1, frame.shape[1] // side)])
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *frame.shape[:2], "rgb24", Fraction(1)
    return b"".join(map(bytes, encoder.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))))


COLOURS = {"view": "#27c", "asr": "#d80", "verify": "#939", "answer": "#292"}        # others: grey


def timeline(records):
    """Inline SVG: the spans that each kind of action was about, numbered by step; the final evidence behind them."""
    duration, lanes = float(records[0]["duration"]), {}
    for r in (r for r in records if r["record"] == "step"):
        given, found = r["arguments"], re.match(r"([\d.]+) to ([\d.]+) seconds \(score", r["feedback"])
        spans = [found.groups()] if found else [(given["start"], given["end"])] if "end" in given else []
        for a, b in given.get("evidence") or spans:
            lanes.setdefault(r["action"], []).append((float(a), float(b), r["step"]))
    bottom, px, parts = 24 * len(lanes) + 6, lambda t: 130 + 780 * t / duration, []
    for a, b in records[-1].get("evidence", []):
        parts.append(f'<rect x="{px(a):.1f}" width="{max(3, px(b) - px(a)):.1f}" height="{bottom}" fill="#cec"/>')
    for row, (action, spans) in enumerate(lanes.items()):
        parts.append(f'<text x="120" y="{24 * row + 19}" text-anchor="end">{html.escape(action)}</text>')
        for a, b, step in spans:                     # an hour on 780 pixels: what is too narrow is shown 3 wide
            parts.append(f'<a href="#step{int(step)}"><title>[{int(step)}] {exact(a, b)} seconds</title>'
                         f'<rect x="{px(a):.1f}" y="{24 * row + 8}" width="{max(3, px(b) - px(a)):.1f}" height="14" '
                         f'fill="{COLOURS.get(action, "#888")}" fill-opacity=".7"/></a>')
    step = next(s for s in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 1e9) if duration / s <= 12)
    for t in np.arange(0, duration + 1e-6, step).tolist():
        minutes, seconds = divmod(int(t), 60)
        at = f"{minutes // 60}:{minutes % 60:02d}" if duration >= 3600 else f"{minutes}"
        parts.append(f'<path d="M{px(t):.1f} {bottom}v5" stroke="#333"/><text x="{px(t):.1f}" y="{bottom + 18}" '
                     f'text-anchor="middle">{at}:{seconds:02d}</text>')
    return (f'<svg viewBox="0 0 940 {bottom + 24}" font-size="12" font-family="sans-serif">{"".join(parts)}'
            f'<path d="M130 {bottom}h780" stroke="#333"/></svg>')


def page(records):
    """One self-contained HTML page: question, answer, timeline, up to eight frames of each evidence span, the steps."""
    style = ("body{font:15px sans-serif;max-width:64em;margin:2em auto;padding:0 1em}pre{white-space:pre-wrap;"
             "overflow-wrap:anywhere;border-left:4px solid #bbb;padding:.3em 1em}.perceptive{border-color:#27c}"
             ".malformed{border-color:#c33}.termination,.end{border-color:#292}"
             "img{height:128px;image-rendering:pixelated;margin:2px}"
             "figure{display:inline-block;margin:0;font-size:12px;text-align:center}")
    steps = [f"<pre id=step{r.get('step', 0)} class={html.escape(str(r.get('kind', r['record'])))}>"
             f"{html.escape(describe(r))}</pre>" for r in records]
    parts = [steps[0], steps[-1], timeline(records)]
    for a, b in records[-1].get("evidence", []):
        parts.append(f"<h3>{listed([(a, b)])} seconds</h3>")
        try:
            video = read_video(records[0]["video"], a, b, FPS, 8)
        except UserError as e:                       # a replay, and the video is elsewhere
            parts.append(f"<p>no frames: {html.escape(str(e))}</p>")
            continue
        for frame, t in zip(video.frames, video.times):
            data = base64.b64encode(png(frame)).decode()
            parts.append(f'<figure><img src="data:image/png;base64,{data}"><br>{t:.1f} s</figure>')
    return (f"<!doctype html><meta charset=utf-8><title>MCR</title><style>{style}</style>"
            + "\n".join([*parts, "<h3>steps</h3>", *steps[1:-1]]))


def main():
    parser = argparse.ArgumentParser(description="Answer a question about a video, with evidence.")
    parser.add_argument("video", nargs="?")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--options", nargs="+", metavar="TEXT", help="options of a multiple-choice question")
    parser.add_argument("--model", help="a stage's directory or a run; default: the newest run")
    parser.add_argument("--url", help="an OpenAI-compatible server (http://host/v1) in place of --model: frames and "
                        "questions are sent there, with the key in the variable MCR_API_KEY if it is set")
    parser.add_argument("--api-model", metavar="NAME", help="model's name at --url")
    parser.add_argument("--facts", metavar="DIR", help="folder of .txt documents for web_search")
    parser.add_argument("--memory", metavar="DIR", help="caption the video first, once: its memory is kept in DIR")
    parser.add_argument("--prompt", default=PROMPT, help="asked of each clip for --memory (default: %(default)s)")
    parser.add_argument("--route", choices=ROUTES, help="question type, instead of the model's choice")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=(), help="parts of the agent to leave out")
    parser.add_argument("--tools-prompt", action="store_true", help="describe the tools in the system prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the assistant's turns (default 0: greedy)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples at a temperature above 0")
    group = parser.add_argument_group("budget, all hard")
    abouts = ("assistant turns", "different frames shown", "tokens of all contexts", "wall clock",
              "frames of the first look", "tokens of the longest turn", "share of --tokens that the live context may "
              "fill before it shrinks to a summary; 1: never")
    for (name, value), about in zip(asdict(Budget()).items(), abouts, strict=True):
        group.add_argument(f"--{name}", type=type(value), default=value, help=f"{about} (default {value:g})")
    group = parser.add_argument_group("output")
    group.add_argument("--trace", metavar="F", help="write one JSON line per step")
    group.add_argument("--html", metavar="F", help="write one self-contained page with the evidence frames")
    group.add_argument("--replay", metavar="F", help="print a trace again; needs no model")
    args = parser.parse_args()
    for path in filter(None, (args.trace, args.html)):
        need(Path(path).absolute().parent.is_dir(), f"{path}: no such folder to write it to")
        need(not Path(path).is_dir(), f"{path}: is a folder; name a file in it")
    need(args.api_model or not args.url, "--url: give the model's name there, --api-model NAME")
    need(not args.options or len({*args.options}) == len(args.options) > 1, "--options: two or more, all different")
    need(args.temperature >= 0 and args.seed >= 0, "--temperature and --seed must be at least 0")
    need(args.replay or args.question is not None, 'give VIDEO and "question", or --replay TRACE')
    if args.replay:
        records, text = read_trace(args.replay)
        print(text)
    else:
        budget = Budget(**{name: getattr(args, name) for name in asdict(Budget())})
        sampling = {"temperature": args.temperature, "seed": args.seed}
        if args.url:
            live, asked = (RemoteModel(args.url, args.api_model, os.environ.get("MCR_API_KEY", ""), **sampling)
                           for _ in range(2))        # captions are not the rollout's tokens
        else:
            directory = find_model(args.model)
            loaded = open_model(directory)
            live, asked = LiveModel(*loaded, budget.tokens, **sampling), LiveModel(*loaded, 1)
        system, memory = SYSTEM + tools_prompt() * (args.tools_prompt or bool(args.url)), ()
        if args.memory:
            probe(args.video)                        # what is wrong with the file is said before it is captioned
            by = [args.url, args.api_model] if args.url else [str(directory.resolve()), max(
                f.stat().st_mtime_ns for f in directory.iterdir())]
            memory = build_memory(args.video, args.memory, captioner(asked, args.prompt), [*by, args.prompt])
        with open(args.trace or os.devnull, "w", buffering=1) as file:           # a killed run leaves its steps
            def trace(record):
                print(describe(record), flush=True)
                print(json.dumps(record, ensure_ascii=False), file=file)
            records = run_agent(live, args.video, args.question, args.options, budget=budget, facts=args.facts,
                                route=args.route, without=args.without, system=system, memory=memory,
                                trace=trace).trace
    if args.html:
        Path(args.html).write_text(page(records))
    need(args.replay or not args.url or live.answered, f"--url {args.url}: answered no request; see the steps above")


if __name__ == "__main__":
    run_cli(main)
