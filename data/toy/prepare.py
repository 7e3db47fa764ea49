"""A toy world that a tiny model learns in minutes: real mp4s, speech, facts, questions, agent rollouts.

Stands in for the paper's training data (§4): text, image and video captions for CPT, multiple choice and grounding for
SFT and RL, long clips with hidden evidence for the agent (§3.1). A clip is a row of scenes of 2-6 s; in each, one
coloured shape moves over a background, and no (colour, shape) pair comes twice. Beyond that: flashes of one second at
the frame's border, words "said" in an .srt beside each long clip, and a folder of texts on what each object eats and
where it lives. Wrong options are things of the same clip, so that trivial guesses score low.

    python data/toy/prepare.py --out DIR                       # half a minute: all files of the default run
    python data/toy/prepare.py --out DIR --pretrain 2000       # and clips for pretraining the tiny base model
    python data/toy/prepare.py --out DIR --side 224            # frames of 224×224 pixels, for train.py --preset small

Every clip comes from default_rng([seed, split, index]): one seed, the same bytes, whatever --jobs is. A finished data
set leaves done.json; an interrupted one goes on where it stopped.
"""
import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

VERSION = 6  # raise it when the same settings give other data: older folders are then refused, not mixed

# ---- the world -------------------------------------------------------------------------------------------
COLOURS = {"red": (222, 32, 32), "green": (28, 150, 48), "blue": (40, 72, 228), "yellow": (240, 224, 40),
           "purple": (130, 40, 172), "orange": (242, 128, 16), "cyan": (36, 212, 224), "pink": (255, 120, 190)}
SHAPES = {s: s + "s" for s in ("circle", "square", "triangle", "ring", "diamond")} | {"cross": "crosses"}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = {"grey": (125, 125, 125), "sand": (205, 182, 140), "slate": (66, 80, 100), "mint": (185, 220, 200)}
FLASHES = {"white": (255, 255, 255), "black": (0, 0, 0), "lime": (160, 255, 0), "magenta": (255, 0, 220),
           "navy": (0, 0, 140), "maroon": (120, 0, 30)}
WORDS = ("maple river candle window garden silver bridge thunder pencil island mirror rocket basket winter "
         "lantern pepper velvet anchor planet marble dragon needle saddle violin").split()
FOODS = "moss fern honey bread corn rice kelp nuts plums figs clover grass bark seeds salt beans".split()
PLACES = "cave tower barn pond nest tent well mill boat shed cabin grove".split()
PAIRS = [(c, s) for c in COLOURS for s in SHAPES]
FPS, SIZE, BORDER = 4, 32, 3  # frames a second in the file; sides of a frame and of a flash, in pixels at --side 32
COARSE, DIRECT = 24, 48  # frames that the agent sees first; frames of its whole budget, for direct answering
MCQ = ["colour", "shape", "direction", "what", "order", "count"]
UNSEEN = ["brief", "speech", "fact"]  # kinds whose evidence the coarse pass does not show
SEEN = ["colour", "shape", "direction", "what"]  # asked at a time that the coarse pass does show

TEXT = dict(
    colour="What colour is the shape at {t} seconds?", shape="Which shape is shown at {t} seconds?",
    direction="Which way does the shape move at {t} seconds?", what="What is shown at {t} seconds?",
    order="Which of these appears first?", count="How many scenes show a {shape}?",
    brief="Which colour flashes between {a} and {b} seconds?", speech="Which word is said at {t} seconds?",
    fact="What does the shape at {t} seconds eat?", grounding="When is the {object} shown?",
    span="From {a} to {b} seconds.", caption="Describe the video.", glimpses="Describe every second.",
    part="{a} to {b}: {scene}.", lookup="Describe {t} seconds.", find="Find the {object}.", found="{a} to {b}",
    tally="Count the {shapes}.", first="Which is earlier, {x} or {y}?", image="Describe the image.",
    still="{colour} {shape} on {background}", scene="{colour} {shape} moving {direction} on {background}",
    flash=" with a {flash} flash", claim_what="at {t} seconds there is a {object}.", claim_brief="{question} {flash}",
    claim_direction="at {t} seconds there is a {object} moving {direction}.",
    verify="Claim: {claim}\nAnswer support, contradict or unclear.", eats="The {object} eats {food}.",
    lives="The {object} lives in a {place}.", ask_eats="What does the {object} eat?",
    ask_lives="Where does the {object} live?", said="{a} to {b}: the word is {word}",
    silence="no speech between {a} and {b} seconds", error="error: ", view="{a} to {b} seconds.",
    hit="[{colour}_{shape}.txt] {fact}", query="{object} eats",
    system="You are a video agent. Look, listen and search before you answer.",
    think_brief="fine-grained: a flash is brief, look from {a} seconds.",
    saw_brief="{scene} with a {flash} flash at {t} seconds.", think_speech="speech: hear what is said at {t} seconds.",
    saw_speech="the word is {word}.", think_fact="knowledge: look at {t} seconds, then search.",
    then_fact="knowledge: the shape is a {object}.", saw_fact="the {object} eats {food}.",
    think_seen="temporal: check {t} seconds.", saw_seen="{scene}.")
ERRORS = ["error: start must be before end", "error: start and end must be finite numbers",
          "error: the video ends at 90 seconds", "error: the call is not JSON: Expecting value: line 2 column 1"]


def tell(kind, **fields):
    return TEXT[kind].format(**{k: f"{v:.1f}" if isinstance(v, float) else v for k, v in fields.items()})


@dataclass
class Scene:
    start: float
    end: float
    colour: str
    shape: str
    direction: str
    background: str

    @property
    def object(self):
        return f"{self.colour} {self.shape}"


@dataclass
class Clip:
    path: str  # relative to the data set
    duration: int
    scenes: list
    flashes: dict = field(default_factory=dict)  # second -> colour; a flash lasts that one second
    words: dict = field(default_factory=dict)  # second -> word; a word lasts two seconds

    def scene(self, t):
        return next(s for s in self.scenes if s.start <= t < s.end)

    def seconds(self, start=0, end=None):
        """Integer times T whose frames T and T+0.5, one temporal patch at 2 fps, lie in one scene."""
        return [t for t in range(start, end or self.duration) if self.scene(t) is self.scene(t + 0.5)]

    def phrase(self, start, end):
        """The scene at `start`, with the flash that falls into [start, end)."""
        text = tell("scene", **asdict(self.scene(start)))
        seen = [c for t, c in self.flashes.items() if start < t + 1 and t < end]
        return text + "".join(tell("flash", flash=colour) for colour in seen)

    def unseen_seconds(self):
        """Times in scenes of which the coarse pass has no frame at all."""
        hidden = [s for s in self.scenes if not shows(self.duration, COARSE, s.start, s.end)]
        return [t for t in self.seconds(1) if self.scene(t) in hidden]

    def seen_seconds(self):
        """Times in a coarse pair whose two frames show one scene."""
        pairs = [t for t in pair_times(self.duration, COARSE) if self.scene(t) is self.scene(t + 0.5)]
        return [t for t in self.seconds(1) if t in pairs or t - 0.5 in pairs]


def pair_times(duration, max_frames):
    """First frame of each pair of the `pairs` sampling, iv3.read_video's rule: the second is 0.5 s later."""
    n = max_frames // 2
    return [math.floor(((i + 0.5) * duration / n - 0.25) * 2) / 2 for i in range(n)]


def shows(duration, max_frames, start, end):
    """Does that sampling have a frame in [start, end)?"""
    return any(start <= t + d < end for t in pair_times(duration, max_frames) for d in (0, 0.5))


def pick(rng, items, n=None):
    """One item, or a list of n different ones."""
    items = list(items)
    order = rng.permutation(len(items))
    return items[order[0]] if n is None else [items[i] for i in order[:n]]


def script(rng, path, length):
    """Draws what happens in a clip: short (12-24 s), long (60-120 s), or for pretraining 40 s, "wide" 120 s."""
    low, high = (3, 6) if length == "long" else (2, 4)
    while True:
        duration = int({"short": rng.integers(12, 25), "long": rng.integers(60, 121), "pretrain": 40,
                        "wide": 120}[length])
        cuts = [0.0]
        while (left := duration - cuts[-1]) > high:  # what a scene leaves is enough for one more
            cuts.append(cuts[-1] + int(rng.integers(low * 2, int(min(high, left - low) * 2) + 1)) / 2)
        if len(cuts) > len(PAIRS):  # no pair may come twice
            continue
        # some shapes are common in a clip, some rare: otherwise every count would be 1 or 2
        weights = np.tile(rng.dirichlet([0.7] * len(SHAPES)) + 0.02, len(COLOURS))
        pairs = rng.choice(len(PAIRS), len(cuts), replace=False, p=weights / weights.sum())
        clip, ground = Clip(path, duration, []), None
        for start, end, pair in zip(cuts, [*cuts[1:], float(duration)], pairs):
            ground = pick(rng, [b for b in BACKGROUNDS if b != ground])  # a cut can always be seen
            clip.scenes.append(Scene(start, end, *PAIRS[pair], pick(rng, DIRECTIONS), ground))
        many = rng.integers(*{"short": (1, 3), "long": (3, 6), "pretrain": (2, 5), "wide": (4, 7)}[length])
        for i, colour in enumerate(pick(rng, FLASHES, many)):
            taken = [clip.scene(u) for u in clip.flashes]
            free = [t for t in clip.seconds() if clip.scene(t) not in taken]
            if length == "long":  # far apart: a window of 10 s holds one; the coarse pass misses two
                free = [t for t in free if all(abs(t - u) >= 10 for u in clip.flashes)
                        and (i > 1 or not shows(duration, COARSE, t, t + 1))]
            clip.flashes |= {pick(rng, free): colour} if free else {}
        for word in pick(rng, WORDS, rng.integers(4, 9)) if length == "long" else ():
            free = [t for t in range(2, duration - 3) if all(abs(t - u) >= 5 for u in clip.words)]
            clip.words |= {pick(rng, free): word} if free else {}
        clip.flashes, clip.words = dict(sorted(clip.flashes.items())), dict(sorted(clip.words.items()))
        if len(clip.scenes) >= 5 and (length != "long" or (  # enough for every question, or it is drawn again
                len(clip.flashes) >= 3 and len(clip.words) >= 4 and len(clip.unseen_seconds()) >= 2
                and len(clip.seen_seconds()) >= 2)):
            return clip


def draw_facts(rng):
    return {f"{c} {s}": {"food": pick(rng, FOODS), "place": pick(rng, PLACES)} for c, s in PAIRS}


# ---- drawing and writing media ---------------------------------------------------------------------------
def cover(shape, x, y, r, scale):
    """How much of each pixel the shape covers, 0..1, from the distance to its edge; (0, 0) is its centre. `scale`:
    pixels a unit of length."""
    x, down, y = np.abs(x), y, np.abs(y)
    edge = {"circle": lambda: np.hypot(x, y) - r, "ring": lambda: np.abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r,
            "square": lambda: np.maximum(x, y) - 0.86 * r, "diamond": lambda: (x + y - 1.15 * r) / 2 ** 0.5,
            "triangle": lambda: np.maximum(down - 0.85 * r, (1.85 * x - down - r) / 2.1),
            "cross": lambda: np.minimum(np.maximum(x - 0.3 * r, y - r), np.maximum(y - 0.3 * r, x - r))}[shape]()
    return np.clip(0.5 - scale * edge, 0, 1)


def draw_scene(rng, scene, frames, side):
    """(frames, side, side, 3). Size, speed, place, tint and texture vary; what leaves comes back opposite."""
    r, speed = rng.uniform(8, 10), rng.uniform(9, 15)  # of 32 units, the frame's side; units a second
    ys, xs = ((axis + 0.5) * (SIZE / side) for axis in np.ogrid[:side, :side])  # (side, 1), (1, side)
    step = np.array(DIRECTIONS[scene.direction]) * speed / FPS
    across = rng.uniform(r + 1, SIZE - r - 1)
    centre = np.where(step != 0, rng.uniform(0, SIZE, 2), across) + np.arange(frames)[:, None] * step
    x, y = ((g - centre[:, i, None, None] + SIZE / 2) % SIZE - SIZE / 2 for i, g in enumerate((xs, ys)))
    wave = np.sin(rng.uniform(-0.5, 0.5) * xs + rng.uniform(-0.5, 0.5) * ys)[..., None]
    ground = np.array(BACKGROUNDS[scene.background]) + 5 * wave + rng.normal(0, 3, 3)
    mask = cover(scene.shape, x, y, r, side / SIZE)[..., None]
    picture = ground * (1 - mask)
    picture += (np.array(COLOURS[scene.colour]) + rng.normal(0, 4, 3)) * mask
    return picture


def draw_clip(rng, clip, side):
    frames = np.concatenate([draw_scene(rng, s, round((s.end - s.start) * FPS), side) for s in clip.scenes])
    width = BORDER * side // SIZE
    border = np.pad(np.zeros([side - 2 * width] * 2, bool), width, constant_values=True)
    for t, colour in clip.flashes.items():
        frames[t * FPS:(t + 1) * FPS, border] = FLASHES[colour]
    return frames


def write_text(path, text):
    """Under another name first: a file that is there is whole."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def write_media(path, rng, frames, container, codec, pix_fmt, options):
    noisy = rng.normal(0, 2.5, frames.shape)
    noisy += frames
    frames = np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)
    reformatter = VideoReformatter()
    with av.open(f"{path}.tmp", "w", format=container) as out:
        stream = out.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        for frame in frames:
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            # stream.encode would do it too, with threads that take longer to start than to work
            out.mux(stream.encode(reformatter.reformat(frame, format=pix_fmt, threads=1)))
        out.mux(stream.encode())
    os.replace(f"{path}.tmp", path)


def write_clip(out, clip, rng, side):
    lines = []
    for i, (t, word) in enumerate(clip.words.items(), 1):
        start, end = (f"00:{x // 60:02d}:{x % 60:02d},000" for x in (t, t + 2))
        lines.append(f"{i}\n{start} --> {end}\nthe word is {word}\n")
    if lines:
        write_text((out / clip.path).with_suffix(".srt"), "\n".join(lines))
    # a key frame every 2 s: seeking stays cheap; mbtree at this frame size gives other bytes now and then
    options = {"preset": "veryfast", "crf": "20", "g": str(2 * FPS), "x264-params": "mbtree=0"}
    write_media(out / clip.path, rng, draw_clip(rng, clip, side), "mp4", "libx264", "yuv420p", options)


# ---- questions -------------------------------------------------------------------------------------------
def make(task, kind, media, text, reply, answer=None, **more):
    """A row: one question about one video or image (or about the text alone) and its answer."""
    content = [media, {"type": "text", "text": text}] if media else text
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    return {"task": task, "kind": kind, "messages": messages, "answer": answer or reply, **more}


def call(think, tool, **arguments):
    """An agent's turn: what it thinks, and the call that it makes."""
    text = "<tool_call>\n" + json.dumps({"name": tool, "arguments": arguments}) + "\n</tool_call>"
    return {"role": "assistant", "content": f"<think>{think}</think>\n{text}"}


class Asker:
    """Makes rows about one clip. The right option goes round A B C D within each kind, over all clips."""

    def __init__(self, rng, clip, index, facts):
        self.rng, self.clip, self.index, self.facts, self.asked = rng, clip, index, facts, Counter()

    def video(self, **how):
        return {"type": "video", "video": self.clip.path, **how}

    def question(self, kind, t, a=None):
        """-> text with the options, the right one, {answer, options}. Its text, not its letter, is the reply: 2 M
        parameters do not learn which letter stands before it, and what cannot be learned is noise. Wrong options
        are of the clip, and of the world only where the clip has too few."""
        rng, clip, fill, shape = self.rng, self.clip, (), None
        here = clip.scene(t)
        # index // 4: kinds go round as well, and in step with them a kind would keep to some of the letters
        place = (self.index + self.index // 4 + self.asked[kind] + (MCQ + UNSEEN).index(kind)) % 4
        self.asked[kind] += 1
        if kind == "order":
            wrong = [s.object for s in sorted(pick(rng, clip.scenes, 4), key=lambda s: s.start)]
            right = wrong[0]
        elif kind == "count":
            shown = {s: sum(x.shape == s for x in clip.scenes) for s in SHAPES}
            rank = min(rng.integers(4), max(shown.values()))  # the answer's rank among the options is uniform
            shape = pick(rng, [s for s in SHAPES if shown[s] >= rank])
            right, wrong = str(shown[shape]), [str(shown[shape] - rank + i) for i in range(4)]
        elif kind == "brief":
            right, wrong, fill = clip.flashes[t], clip.flashes.values(), FLASHES
        elif kind == "speech":
            right, wrong, fill = clip.words.get(t) or clip.words[t - 1], clip.words.values(), WORDS
        elif kind == "fact":
            facts = self.facts or draw_facts(rng)  # new in every rollout: to be read, there is nothing to remember
            right, wrong, fill = facts[here.object]["food"], [facts[s.object]["food"] for s in clip.scenes], FOODS
        else:
            name = "object" if kind == "what" else kind
            right, wrong = getattr(here, name), [getattr(s, name) for s in clip.scenes]
            fill = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "what": ()}[kind]
            if kind == "shape":  # "a ring": then the piece is " ring", as in every caption, and not the rare "ring"
                right, wrong, fill = f"a {right}", [f"a {w}" for w in wrong], [f"a {f}" for f in fill]
        options = pick(rng, sorted(set(wrong) - {right}), 3)
        options += pick(rng, [f for f in fill if f not in [right, *options]], 3 - len(options))
        options.insert(place, right)
        # options first: what is asked then stands right before the answer, where a small model looks for it
        text = "".join(map("\n{}. {}".format, "ABCD", options))
        text += "\n" + tell(kind, t=t, a=a, b=(a or 0) + 6, shape=shape)
        return text, right, {"answer": "ABCD"[place], "options": options}

    def reply(self, kind, t, right):
        """The right option; a direction behind what moves, as in captions, where the base has learned to say it."""
        return f"{self.clip.scene(t).object} moving {right}" if kind == "direction" else right

    def mcq(self, kinds):
        for kind, t in zip(kinds, 2 * pick(self.rng, self.clip.seconds(), len(kinds))):
            text, right, more = self.question(kind, t)
            yield make("mcq", kind, self.video(), text, self.reply(kind, t, right), **more)

    def grounding(self, n):
        for s in pick(self.rng, self.clip.scenes, n):
            yield make("grounding", "grounding", self.video(), tell("grounding", object=s.object),
                       tell("span", a=s.start, b=s.end), [s.start, s.end])

    def dense(self, caption, lookup, find, first, tally, window=None):
        """The base model's formats: captions and short look-ups, over the clip or over a window of it."""
        rng, clip, (start, end) = self.rng, self.clip, window or (0, self.clip.duration)
        video = self.video(start=start, end=end) if window else self.video()
        parts = [replace(s, start=max(s.start, float(start)), end=min(s.end, float(end)))  # cut at the window
                 for s in clip.scenes if s.start < end and s.end > start]
        if caption:
            yield make("caption", "caption", video, TEXT["caption"], " ".join(
                tell("part", a=s.start, b=s.end, scene=clip.phrase(s.start, s.end)) for s in parts))
        for t in pick(rng, clip.seconds(start, end), lookup):
            yield make("caption", "lookup", video, tell("lookup", t=t), clip.phrase(t, t + 1))
        whole = [s for s in parts if s.end - s.start >= 1]
        for s in pick(rng, whole, find):
            yield make("caption", "find", video, tell("find", object=s.object), tell("found", a=s.start, b=s.end))
        for _ in range(first):
            x, y = pick(rng, whole, 2)
            yield make("caption", "first", video, tell("first", x=x.object, y=y.object),
                       min(x, y, key=lambda s: s.start).object)
        shown = {s: sum(p.shape == s for p in parts) for s in SHAPES}
        for _ in range(tally):
            count = pick(rng, sorted(set(shown.values())))
            shape = pick(rng, [s for s in SHAPES if shown[s] == count])
            yield make("caption", "tally", video, tell("tally", shapes=SHAPES[shape]), str(count))

    def glimpses(self):
        """A line for every second, that is for every vision token at 2 fps: what the vision tower learns words from."""
        clean = set(self.clip.seconds())
        lines = [self.clip.phrase(t, t + 1) if t in clean else "-" for t in range(self.clip.duration)]
        return make("caption", "glimpses", self.video(), TEXT["glimpses"], "\n".join(lines))

    def verify(self, n):
        """Claims about a moment, judged from a window that shows it (support, contradict) or does not (unclear). Worded
        as the agent words them when it looks at its evidence again."""
        rng, clip = self.rng, self.clip
        for i in range(self.index * n, self.index * n + n):
            verdict, kind = ("support", "contradict", "unclear")[i % 3], ("what", "direction", "brief")[i // 3 % 3]
            t, width = pick(rng, list(clip.flashes) if kind == "brief" else clip.seconds()), int(rng.integers(1, 9))
            scene, wrong = clip.scene(t), verdict == "contradict"
            if kind == "brief":
                a = self.near(t)
                flash = pick(rng, [f for f in FLASHES if (f != clip.flashes[t]) == wrong])
                claim = tell("claim_brief", question=tell("brief", a=a, b=a + 6), flash=flash)
            elif kind == "direction":
                direction = pick(rng, [d for d in DIRECTIONS if (d != scene.direction) == wrong])
                claim = tell("claim_direction", t=t, object=scene.object, direction=direction)
            else:
                named = pick(rng, [s.object for s in clip.scenes if (s.object != scene.object) == wrong])
                claim = tell("claim_what", t=t, object=named)
            inside = verdict != "unclear"
            a = pick(rng, [a for a in range(clip.duration - width + 1) if (a <= t < a + width) == inside])
            yield make("mcr", "verify", self.video(start=a, end=a + width), tell("verify", claim=claim), verdict)

    def open(self, kinds):
        """Questions without options, answered by the word: nothing can be guessed, so looking is learned sooner."""
        for kind, t in zip(kinds, 2 * pick(self.rng, self.clip.seconds(), len(kinds))):
            text, right, _ = self.question(kind, t)
            yield make("caption", "open", self.video(), text.rpartition("\n")[2], self.reply(kind, t, right))

    def agent(self, kinds, exam=False):
        """Agent questions. For training: the oracle's rollout of each and, beside it, the question asked
        directly. For a test: the question alone, with the budget of frames (the coarse pass included)."""
        clip, rng = self.clip, self.rng
        times = {kind: clip.seen_seconds() for kind in SEEN} | {"fact": clip.unseen_seconds()}
        times["brief"] = [t for t in clip.flashes if not shows(clip.duration, COARSE, t, t + 1)]
        times["speech"] = [t + int(rng.integers(2)) for t in clip.words]
        times = {kind: pick(rng, ts, len(ts)) for kind, ts in times.items()}
        for kind in kinds:
            t, a = times[kind].pop(), None
            start, end, found = clip.scene(t).start, clip.scene(t).end, [t, t + 1]
            if kind == "brief":
                a, start, end = self.near(t), t, t + 1
            elif kind == "speech":
                found = [t, t + 2] if t in clip.words else [t - 1, t + 1]
            text, reply, more = self.question(kind, t, a)
            more |= {"evidence": [found], "unseen": kind in UNSEEN,
                     "direct_seen": kind != "speech" and shows(clip.duration, DIRECT, start, end)}
            coarse = self.video(max_frames=COARSE, pairs=True)
            if exam:
                yield make("mcr", kind, coarse, text, reply, frames=DIRECT, facts="facts", **more)
                continue
            row = make("mcr", kind, coarse, text, reply, **more)
            turns = self.setback(self.oracle(kind, t if a is None else a, reply, found))
            row["messages"] = [{"role": "system", "content": TEXT["system"]}, row["messages"][0], *turns]
            yield row
            yield make("mcq", kind, self.video(max_frames=DIRECT, pairs=True), text, self.reply(kind, t, reply), **more)

    def oracle(self, kind, t, reply, found):
        """What a good agent does: choose a route, get the evidence in one or two calls, answer, cite it."""
        scene, word = self.clip.scene(t), reply.split()[0]

        def look(think, t):  # a moment, two seconds, is named by its start alone
            end = min(t + 2, self.clip.duration)
            seen = [self.video(start=t, end=end, fps=2), {"type": "text", "text": tell("view", a=t, b=end)}]
            return [call(think, "view", start=t), {"role": "tool", "content": seen}], [t, end]

        if kind == "brief":  # from the window's start on, until the flash is seen
            think, turns, at, found = tell("think_brief", a=t), [], found[0], [t, t]
            while found[1] <= at:
                more, found = look(think, found[1])
                turns += more
                seen = tell("scene", **asdict(self.clip.scene(found[0])))
                think = tell("saw_seen", scene=seen) + " " + tell("think_brief", a=found[1])
            saw = tell("saw_brief", scene=seen, flash=word, t=at)
        elif kind == "speech":
            heard = tell("said", a=float(found[0]), b=float(found[1]), word=word)
            turns = [call(tell("think_speech", t=t), "asr", start=t), {"role": "tool", "content": heard}]
            saw = tell("saw_speech", word=word)
        elif kind == "fact":
            names = {"object": scene.object, "food": word, "colour": scene.colour, "shape": scene.shape}
            turns, found = look(tell("think_fact", t=t), t)
            turns += [call(tell("then_fact", **names), "web_search", query=tell("query", **names)),
                      {"role": "tool", "content": tell("hit", fact=tell("eats", **names), **names)}]
            saw = tell("saw_fact", **names)
        else:
            turns, found = look(tell("think_seen", t=t), t)
            saw = tell("saw_seen", scene=tell("scene", **asdict(scene)))
        return [*turns, call(saw, "answer", text=reply, evidence=[found])]

    def near(self, t):
        """The start of a window of six seconds that holds second t."""
        return max(0, min(t - int(self.rng.integers(6)), self.clip.duration - 6))

    def setback(self, turns):
        """Two rollouts in five meet what the environment may answer: an error, after which the call is made again, or a
        verification that contradicts, after which the evidence is looked at again."""
        case, (a, b) = self.rng.integers(5), json.loads(turns[-1]["content"].split("\n")[2])["arguments"]["evidence"][0]
        error = {"role": "tool", "content": pick(self.rng, ERRORS)}
        doubt = {"role": "tool", "content": f"contradict: second look at {a} to {b} seconds (0.41). Look again."}
        return {0: [turns[0], error, *turns], 1: [*turns, doubt, *turns]}.get(int(case), turns)


def text_row(rng):
    """Reading: facts or subtitles in the prompt, then a question about one. Facts are new each time."""
    kind, n = pick(rng, ["eats", "lives", "said"]), int(rng.integers(2, 6))
    if kind == "said":
        times, words, i = sorted(pick(rng, range(0, 120, 5), n)), pick(rng, WORDS, n), rng.integers(n)
        lines = [tell("said", a=float(t), b=t + 2.0, word=w) for t, w in zip(times, words)]
        return make("text", kind, None, "\n".join([*lines, tell("speech", t=times[i])]), words[i])
    facts = draw_facts(rng)
    names = pick(rng, facts, n)
    asked = pick(rng, names)
    told = " ".join(tell(kind, object=o, **facts[o]) for o in names)
    return make("text", kind, None, told + "\n" + tell("ask_" + kind, object=asked),
                facts[asked]["food" if kind == "eats" else "place"])


def plan_row(rng):
    """Reading: an agent's first turn alone, without a video. The time that it has to copy from the question into its
    thought and its call is what the tiny model learns last of all, or not at all, where rollouts alone teach it."""
    kind, t = pick(rng, [*UNSEEN, *SEEN]), int(rng.integers(2, 118))
    words = {"colour": COLOURS, "shape": [f"a {s}" for s in SHAPES], "direction": DIRECTIONS, "brief": FLASHES,
             "speech": WORDS, "fact": FOODS, "what": [f"{c} {s}" for c, s in PAIRS]}[kind]
    text = "".join(map("\n{}. {}".format, "ABCD", pick(rng, words, 4))) + "\n" + tell(kind, t=t, a=t, b=t + 6)
    turn = call(tell(f"think_{kind if kind in UNSEEN else 'seen'}", t=t, a=t), "asr" if kind == "speech" else "view",
                start=t)
    row = make("text", "plan", None, text, turn["content"])
    return {**row, "messages": [{"role": "system", "content": TEXT["system"]}, *row["messages"]]}


def image_row(rng, out, path, side):
    scene = Scene(0, 1, *pick(rng, PAIRS), pick(rng, DIRECTIONS), pick(rng, BACKGROUNDS))
    write_media(out / path, rng, draw_scene(rng, scene, 1, side), "image2pipe", "png", "rgb24", {})
    image = {"type": "image", "image": path}
    return make("caption", "image", image, TEXT["image"], tell("still", **asdict(scene)))


def tool_arguments():
    """{tool: names of its arguments}, in the order of the agent's schema. Flags are not in it: none is set here."""
    from mcr_agent import TOOLS  # needs torch, which nothing else here does
    return {name: [argument for argument, kind in tool.fields.items() if not kind.startswith("flag")]
            for name, tool in TOOLS.items()}


def pieces():
    """Strings for a greedy longest-match tokenizer (bytes catch the rest). What stands between the blanks of
    TEXT is one piece, spaces included: so a word or a number is the same piece in a question, an option, a
    tool call and an answer, and copying it is copying one token. Special tokens (<think>) are not in it."""
    found = {part for text in TEXT.values() for part in re.split(r"\{\w+\}", text)}
    tools = tool_arguments()
    words = {*COLOURS, *SHAPES, *SHAPES.values(), *DIRECTIONS, *BACKGROUNDS, *FLASHES, *WORDS, *FOODS,
             *PLACES, *tools, "global", *(w for part in found for w in re.findall(r"[A-Za-z]+", part))}
    found |= words | {" " + w for w in words}
    found |= {form.format(i) for i in range(181) for form in ("{}", "<{}")}
    found |= {f".{i}{end}" for i in range(10) for end in ("", " seconds>")}
    found |= {form.format(x) for x in "ABCD" for form in ("{}", "\n{}. ", " ({})")}
    found |= {"system\n", "user\n", "assistant\n", "\n", " ", ".", ". ", ", ", ": ", "?", '"', "[", "]", "-",
              '"}}\n', "}}\n", "]]}}\n", '\n{"name": "', '", "arguments": {',
              '\n{"name": "summarize", "arguments": {}}\n'}
    for tool, names in tools.items():
        after = {"evidence": "[[", "start": "", "end": "", "fps": ""}  # the others are strings
        opened = [f'"{name}": ' + after.get(name, '"') for name in names]
        found |= {start + name for name in opened for start in (", ", '", ')}
        found |= {f'\n{{"name": "{tool}", "arguments": {{{name}' for name in opened[:1]}
    return sorted(found - {""})


# ---- splits ----------------------------------------------------------------------------------------------
SPLITS = {  # name: folder of the clips, length, clips at --scale 1, files of the rows
    "pretrain": ("pretrain", "pretrain", 0, ["pretrain", "glimpses", "near"]), "wide": ("wide", "wide", 0, ["wide"]),
    "cpt": ("cpt", "short", 200, ["cpt_video"]), "sft": ("sft", "short", 600, ["sft_short"]),
    "long": ("long", "long", 280, ["sft_long", "sft_agent"]), "rl": ("rl", "short", 100, ["rl", "opd"]),
    "rl_long": ("rl", "long", 360, ["rl", "opd"]), "val": ("val", "short", 40, ["val"]),
    "test": ("test", "short", 100, ["test_short"]), "test_long": ("test", "long", 60, ["test_long", "test_agent"])}
TEXTS, IMAGES, PLANS = 600, 1100, 1600  # rows of cpt_text, cpt_image and sft_plan


def rows_of(split, ask, i):
    """-> one list of rows for each file of the split. Kinds go round, from clip to clip as well."""
    def kinds(names, n):
        return [names[(i * n + k) % len(names)] for k in range(n)]

    if split in ("pretrain", "wide"):  # all rows of a window can be packed behind one video
        def window(low, high, *counts):
            width = int(ask.rng.integers(low, high))
            start = int(ask.rng.integers(ask.clip.duration - width + 1))
            return ask.dense(*counts, (start, start + width))
        if split == "wide":  # times up to two minutes
            return [[row for _ in range(3) for row in window(12, 25, 1, 10, 8, 3, 3)]]
        # look-ups are learned first where there is little to look through
        return [[*window(12, 25, 1, 10, 8, 3, 3)], [ask.glimpses()], [*window(3, 9, 1, 10, 3, 0, 1)]]
    if split in ("cpt", "val"):
        return [ask.dense(1, 4, 3, 1, 1)]
    if split == "sft":  # new formats, and the base's own so that they are not forgotten
        return [[*ask.mcq(kinds(MCQ, 10)), *ask.grounding(4), *ask.open(kinds(SEEN, 8)), *ask.dense(1, 3, 3, 1, 1)]]
    if split in ("rl", "rl_long"):  # where the model guesses, rewards are luck, and noise to learn from: only OPD asks
        seen, spans = list(ask.mcq(SEEN)), list(ask.grounding(16 if split == "rl_long" else 4))
        return [seen + spans[:8], [*seen, *spans, *ask.mcq(["order", "order", "order", "count"])]]
    if split == "test":
        return [[*ask.mcq(kinds(MCQ, 6)), *ask.grounding(5)]]
    if split == "test_long":
        agent = ask.agent(kinds(UNSEEN, 5) + kinds(SEEN, 5), exam=True)
        return [[*ask.mcq(kinds(MCQ, 12)), *ask.grounding(10)], agent]
    return [[*ask.mcq(kinds(MCQ, 10)), *ask.grounding(6), *ask.open(SEEN), *ask.dense(1, 6, 6, 0, 0)],
            [*ask.agent([*UNSEEN, "fact", *kinds(SEEN, 3)]), *ask.verify(1)]]  # a fact takes two tools; a claim, a pack


def make_clip(job):
    """One clip: its media on disk, its rows returned. The drawing has a generator of its own, so that what an
    interrupted run has written (`resume`) need not be drawn again."""
    out, seed, split, i, facts, side, resume = job
    folder, length, _, files = SPLITS[split]
    key = [seed, list(SPLITS).index(split), i]
    rng = np.random.default_rng(key)
    clip = script(rng, f"clips/{folder}/{'long_' if length == 'long' else ''}{i:05d}.mp4", length)
    if not (resume and (out / clip.path).exists()):
        write_clip(out, clip, np.random.default_rng([*key, 1]), side)
    known = {"clip": clip.path, "duration": clip.duration}
    return [[{"id": f"{name}-{Path(clip.path).stem}-{n:02d}", **row, **known} for n, row in enumerate(rows)]
            for name, rows in zip(files, rows_of(split, Asker(rng, clip, i, facts), i))]


class SettingsError(ValueError):
    """A mistake of the user's: one line that says what to do."""


def prepare(out, seed=0, scale=1.0, pretrain=0, side=SIZE, jobs=1):
    """Writes the whole data set to the folder `out`; does nothing if it is there with the same settings."""
    out = Path(out)
    for flag, good in ((f"--seed {seed}", seed >= 0), (f"--scale {scale}", 0 < scale <= 100),
                       (f"--pretrain {pretrain}", pretrain >= 0), (f"--jobs {jobs}", jobs >= 1),
                       (f"--side {side}", 32 <= side <= 1024 and side % 32 == 0)):
        if not good:
            raise SettingsError(f"{flag}: out of range (--scale: above 0, at most 100; --side: 32, 64, … 1024)")
    clips = {s: max(2, round(n * scale)) for s, (_, _, n, _) in SPLITS.items()}
    clips |= {"pretrain": pretrain, "wide": math.ceil(pretrain / 5)}
    settings = {"version": VERSION, "seed": seed, "scale": scale, "pretrain": pretrain, "side": side, "clips": clips}
    done, started = out / "done.json", out / "started.json"
    for mark in (done, started):
        if mark.exists() and json.loads(mark.read_text())["settings"] != settings:
            raise SettingsError(f"{mark} has other settings: choose another --out or delete the folder")
    if done.exists():
        return json.loads(done.read_text())
    resume = started.exists()
    for folder in ("images", "facts", *(f"clips/{SPLITS[s][0]}" for s, n in clips.items() if n)):
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_text(started, json.dumps({"settings": settings}))
    facts = draw_facts(np.random.default_rng([seed, 102]))
    for o, fact in facts.items():
        write_text(out / "facts" / f"{o.replace(' ', '_')}.txt",
                   f"{tell('eats', object=o, **fact)} {tell('lives', object=o, **fact)}\n")

    files = {name: [] for s, n in clips.items() if n for name in SPLITS[s][3]}
    work = [(out, seed, s, i, facts if s == "test_long" else None, side, resume)
            for s, n in clips.items() for i in range(n)]
    with Pool(jobs) as pool:  # the order of the results is that of `work`, whatever the number of jobs
        made = tqdm(pool.imap(make_clip, work, chunksize=4), "toy clips", len(work), disable=None)
        for (_, _, split, *_), parts in zip(work, made):
            for name, rows in zip(SPLITS[split][3], parts):
                files[name] += rows
    makers = (("cpt_text", TEXTS, lambda rng, i: text_row(rng)),
              ("cpt_image", IMAGES, lambda rng, i: image_row(rng, out, f"images/{i:05d}.png", side)),
              ("sft_plan", PLANS, lambda rng, i: plan_row(rng)))
    for k, (name, count, make_row) in enumerate(makers):
        files[name] = [{"id": f"{name}-{i:05d}", **make_row(np.random.default_rng([seed, 100 + k, i]), i)}
                       for i in range(round(count * scale))]
    for name, rows in files.items():
        write_text(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(out / "vocab.json", json.dumps(pieces(), indent=0))
    report = {"settings": settings, "rows": {name: len(rows) for name, rows in files.items()}}
    write_text(done, json.dumps(report, indent=1))  # last: whoever sees done.json sees everything
    started.unlink()
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every count but --pretrain's")
    parser.add_argument("--pretrain", type=int, default=0,
                        help="clips of 40 s for pretraining a base, and a fifth as many of two minutes")
    parser.add_argument("--side", type=int, default=SIZE, help="pixels of a frame, square: 32 (default), 64, … 1024")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; no effect on the data")
    args = parser.parse_args()
    try:
        report = prepare(**vars(args))
    except (SettingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: " + ", ".join(f"{name}.jsonl {n}" for name, n in report["rows"].items()))


if __name__ == "__main__":
    main()
