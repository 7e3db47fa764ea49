"""Pages about what was run: a recipe's report with its result tables, and a rollout's trace (§3.4).

    python extras/report.py runs/tiny              # the tables; RUN/results.md, report.md, report.html
    python extras/report.py t.jsonl --out t.html   # a trace of mcr_agent.py --trace

No model is asked: everything comes from the files of a run, or from the trace and its video. What the paper
reports of the same things (§6): agentic 75.8 against direct 73.1 on Video-MME; decoding 1.84 times as fast as
eager GQA at 32K tokens and 5.01 times at 384K, with half of the cache; without CPT 2.1 points less.

Both pages are lists of blocks (heading, paragraph, table, picture, …), which come first below, with the one
writer of HTML. Then a run's report in its order: results, training, benches, five test items. A rollout's
page comes last.
"""
import argparse
import base64
import functools
import html
import io
import itertools
import json
import math
import re
import sys
from fractions import Fraction
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np

import iv3
from eval import (AGENT_TITLE, SPLITS, agent_lines, cell, paired_difference, parse_span, stage_samples, table,
                  window)
from iv3 import clip_of, media_items, need, user_turn
from m2la import UserError
from mcr_agent import FPS, describe_record, exact, listed, read_trace

# ----------------------------------------------------------------------------- the blocks of a page

# The texts of Heading, Paragraph and Table are our own words, with `code` between backticks; what a model, a
# file or a trace says enters them through plain(). A Step's text is the exception: it is shown as it is, so
# its writer escapes it.


class Heading(NamedTuple):
    level: int
    text: str


class Paragraph(NamedTuple):
    text: str


class Table(NamedTuple):
    header: list
    rows: list


class Picture(NamedTuple):
    name: str               # its file in RUN/report/
    alt: str
    data: bytes             # a PNG or an SVG


class Frames(NamedTuple):
    """Frames of a video in their order, each with a caption."""
    captions: list
    pictures: list


class Step(NamedTuple):
    """A record of a trace, preformatted; the timeline links to its number (None: nothing links to it)."""
    number: int | None
    kind: str               # class of action, which gives it its colour
    text: str


class Drawing(NamedTuple):
    """An SVG as part of the page: its links work, as those of a picture would not."""
    svg: str


def plain(text):
    """A text of a model or a file, in one line, for both forms: what could be markup becomes an entity."""
    one_line = " ".join(str(text).split())
    return re.sub(r"[^\w\s.,:;?()+/=%±→×…'-]", lambda sign: f"&#{ord(sign[0])};", one_line)


def pictures_of(blocks):
    pictures = []
    for block in blocks:
        if isinstance(block, Picture):
            pictures.append(block)
        if isinstance(block, Frames):
            pictures += block.pictures
    return pictures


# ---- as markdown: only the blocks that a run's report is made of

def markdown(block):
    match block:
        case Heading(level, text):
            return "#" * level + " " + text
        case Paragraph(text):
            return text
        case Table(header, rows):
            return table(header, rows)
        case Picture(name, alt, _):
            return f"![{alt}](report/{name})"
        case Frames(captions, pictures):
            return table(captions, [[markdown(picture) for picture in pictures]])
    raise TypeError(f"no markdown for a {type(block).__name__}")


def markdown_page(blocks):
    return "\n\n".join(markdown(block) for block in blocks)


# ---- as HTML: one self-contained page, pictures included

STYLE = """
body {font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222}
table {border-collapse: collapse; margin: .5em 0}
th, td {border: 1px solid #ddd; padding: .2em .6em; text-align: left; vertical-align: top}
th, code {background: #f4f4f4}
p img {max-width: 100%}
figure {display: inline-block; margin: 2px; font-size: 12px; text-align: center}
figure img {height: 128px; image-rendering: pixelated}
pre {white-space: pre-wrap; overflow-wrap: anywhere; border-left: 4px solid #bbb; padding: .3em 1em}
pre.perceptive {border-color: #27c}
pre.malformed {border-color: #c33}
pre.termination, pre.end {border-color: #292}
"""


def marked(text):
    """`code` of our own words, as HTML."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", str(text))


def image(picture):
    kind = "svg+xml" if picture.name.endswith(".svg") else "png"
    data = base64.b64encode(picture.data).decode()
    return f'<img alt="{picture.alt}" src="data:image/{kind};base64,{data}">'


def table_html(header, rows):
    lines = ["<table>"]
    heads = "".join(f"<th>{marked(head)}</th>" for head in header)
    lines.append(f"<tr>{heads}</tr>")
    for row in rows:
        cells = "".join(f"<td>{marked(text)}</td>" for text in row)
        lines.append(f"<tr>{cells}</tr>")
    lines.append("</table>")
    return "\n".join(lines)


def frames_html(captions, pictures):
    figures = []
    for caption, picture in zip(captions, pictures):
        figures.append(f"<figure>{image(picture)}<br>{caption}</figure>")
    return "\n".join(figures)


def step_html(step):
    target = "" if step.number is None else f' id="step{step.number}"'
    kind = html.escape(step.kind)
    return f'<pre{target} class="{kind}">{html.escape(step.text)}</pre>'


def html_of(block):
    match block:
        case Heading(level, text):
            return f"<h{level}>{marked(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{marked(text)}</p>"
        case Table(header, rows):
            return table_html(header, rows)
        case Picture():
            return f"<p>{image(block)}</p>"
        case Frames(captions, pictures):
            return frames_html(captions, pictures)
        case Step():
            return step_html(block)
        case Drawing(svg):
            return svg
    raise TypeError(f"no HTML for a {type(block).__name__}")


def page(title, blocks):
    """Blocks → the text of one HTML file that needs no other file."""
    body = "\n".join(html_of(block) for block in blocks)
    head = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html>{head}\n{body}\n"


# ---- pictures

def png(frame, side=256):
    """(H,W,3) uint8 → PNG bytes; every n-th pixel when it is larger than `side`."""
    down = max(1, frame.shape[0] // side)
    across = max(1, frame.shape[1] // side)
    frame = np.ascontiguousarray(frame[::down, ::across])
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = frame.shape[:2]
    encoder.pix_fmt = "rgb24"
    encoder.time_base = Fraction(1)          # a PNG has no time, but the encoder wants one
    packets = encoder.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
    return b"".join(bytes(packet) for packet in packets)


def drawn(panels, columns, size):
    """An SVG of panels, functions that draw on the axes they are given; `size`: inches of one panel. None
    without matplotlib: the tables stand alone then."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = math.ceil(len(panels) / columns)
    width, height = size
    fixed = {"svg.hashsalt": "report", "font.size": 9}            # the same run gives the same file
    with rc_context(fixed):
        figure = Figure((width * columns, height * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, draw in zip(axes, panels):
            ax.grid(alpha=0.3)
            draw(ax)
        for ax in axes[len(panels):]:
            ax.remove()
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


# ------------------------------------------------------------------------- a recipe's result tables

TASKS = {"mcq": "mcq", "miou": "mIoU", "r1_70": "R1@.7"}          # figures of a stage, their titles
SINGLE = [("base", "loss"), ("convert", "loss"), ("convert", "cache_ratio"), ("cpt", "loss"),
          ("opd", "gap_closed")]                                  # figures that one stage has

STAGES_TITLE = "S: clips of 12-24 s, L: of 60-120 s; ± half the 95 % interval; width in seconds"
SINGLE_TITLE = "losses in nats per answer token"
GAINS_TITLE = "what each step changes: points, against the stage before it; nats, against the base"
# Student's t, 97.5 %, of 2, 3, … seeds. From 9 seeds on it is that of 9: a little too wide, never too narrow.
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31]


def scored_stages(results):
    """The stages with scores on the test's clips, in the recipe's order, the trivial baselines first."""
    stages = []
    for stage in ("baselines", *iv3.STAGE_ORDER):
        block = results.get(stage, {})
        if "short" in block or "long" in block:
            stages.append(stage)
    return stages


def stage_table(results):
    titles = {**TASKS, "width": "width"}
    header = ["stage"]
    for letter in SPLITS.values():
        header += [f"{letter} {title}" for title in titles.values()]
    rows = []
    for stage in scored_stages(results):
        row = [stage]
        for split in SPLITS:
            block = results[stage].get(split, {})
            row += [cell(block, figure) for figure in titles]
        rows.append(row)
    return Table(header, rows)


def single_table(results):
    rows = []
    for stage, figure in SINGLE:
        block = results.get(stage, {})
        if figure in block:
            rows.append([f"{stage} {figure}", cell(block, figure)])
    return Table(["figure", "value"], rows)


def agent_table(results):
    """The agent with unseen and seen kinds of evidence, beside the same model's direct answers."""
    header, lines = agent_lines(results.get("agent", {}))
    return Table(header, [[plain(value) for value in line] for line in lines])


# ---- what each step changes

def score_gains(before, after):
    """{"S mcq": points, …}: every figure that both stages have."""
    points = {}
    for split, letter in SPLITS.items():
        old = before.get(split, {})
        new = after.get(split, {})
        for figure, title in TASKS.items():
            if figure in old and figure in new:
                points[f"{letter} {title}"] = 100 * (new[figure] - old[figure])
    return points


def gains(results):
    """What each step of the recipe changes, {step: {figure: change}}: a stage against the one before it (the
    first against the strongest trivial baselines), the agent against direct answers; the loss against that of
    the base."""
    steps = {}
    for stage in ("convert", "cpt"):
        if stage in results:
            steps[stage] = {"nats": results[stage]["loss"] - results["base"]["loss"]}
    for before, stage in itertools.pairwise(scored_stages(results)):
        steps[stage] = score_gains(results[before], results[stage])
    if "gap_closed" in results.get("opd", {}):
        steps["opd"]["% of gap"] = 100 * results["opd"]["gap_closed"]
    for group, block in results.get("agent", {}).items():
        steps[f"agent, {group}"] = {"L mcq": 100 * (block["agentic"] - block["direct"])}
    return steps


def mean_half(values):
    """Mean over seeds and half of its 95 % interval; None for a single seed."""
    count = len(values)
    if count == 1:
        return float(values[0]), None
    t = T95[min(count, 9) - 2]
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / count ** 0.5)


def with_half(mean, half, form):
    """'+1.5 ± 0.3'; only the mean has the sign that `form` asks for."""
    if half is None:
        return f"{mean:{form}}"
    return f"{mean:{form}} ± {half:{form.strip('+')}}"


def gains_table(runs):
    """gains() of one run, or the mean of several ± half its 95 % interval."""
    columns = []
    for changes in runs[0].values():
        columns += [figure for figure in changes if figure not in columns]
    rows = []
    for step, changes in runs[0].items():
        row = [plain(step)]
        for figure in columns:
            if figure not in changes:
                row.append("")
                continue
            mean, half = mean_half([run[step][figure] for run in runs])
            row.append(with_half(mean, half, "+.3f" if figure == "nats" else "+.1f"))
        rows.append(row)
    return Table(["step", *columns], rows)


def gains_text(runs):
    title = GAINS_TITLE
    if len(runs) > 1:
        title = f"± 95 %, {len(runs)} seeds, Student's t; {title}"
    return f"{title}\n\n{markdown(gains_table(runs))}"


# ---- what a run of `python train.py --quick` shows

QUICK_TITLE = """\
`python train.py --quick`: what each step changes on the same n items (of training: n steps), points or
nats ± half the 95 % interval; seen: up or down, where that leaves out 0. So few steps and clips cannot
show what RL and OPD bring on clips that they have not seen (a few points, less than these intervals),
how good the agent gets, or which of two settings is better: the whole recipe is for that"""


def sign(step, figure, block, key, against):
    """A line of quick_table: a change with its interval, losses in nats and all else in points."""
    change = block[key]
    low, high = block[f"{key}_ci"]
    half = (high - low) / 2
    if "loss" in figure:
        changed = with_half(change, half, "+.3f")
    else:
        changed = with_half(100 * change, 100 * half, "+.1f")
    seen = "no"
    if low > 0:
        seen = "up"
    if high < 0:
        seen = "down"
    return [plain(step), figure, changed, against, block[f"{key}_n"], seen]


def training_sign(stage, figure, metrics):
    """The last third of a stage's steps against the first."""
    values = metrics[stage][figure]
    third = max(1, len(values) // 3)
    found = paired_difference(values[:third], values[-third:], range(third), 0)
    block = {figure: found["difference"], f"{figure}_ci": found["ci"], f"{figure}_n": third}
    return sign(stage, f"{figure} of training", block, figure, "its first third")


def quick_table(results, metrics):
    rows = []
    for stage, block in results["changes"].items():
        if "loss" in block:
            rows.append(sign(stage, "loss", block, "loss", block["against"]))
        for split, letter in SPLITS.items():
            for figure, title in TASKS.items():
                if figure in block.get(split, {}):
                    rows.append(sign(stage, f"{letter} {title}", block[split], figure, block["against"]))
        if stage == "rl" and stage in metrics:
            rows.append(training_sign(stage, "reward", metrics))
        if stage == "opd" and stage in metrics:
            rows.append(training_sign(stage, "loss", metrics))
    if "gap_closed" in results["opd"]:
        rows.append(sign("opd", "gap to the teacher closed", results["opd"], "gap_closed", "rl"))
    for group, block in results["agent"].items():
        rows.append(sign(f"agent, {group}", "mcq", block, "gain", "direct answers"))
    return Table(["step", "figure", "change", "against", "n", "seen"], rows)


def results_blocks(results, run=None):
    """results.json → its tables, one row per stage, the strongest trivial baselines first."""
    parts = {STAGES_TITLE: stage_table(results),
             SINGLE_TITLE: single_table(results),
             GAINS_TITLE: gains_table([gains(results)]),
             AGENT_TITLE: agent_table(results)}
    if results.get("quick"):                                      # its changes come with intervals, and last
        del parts[GAINS_TITLE]
        parts[QUICK_TITLE] = quick_table(results, read_metrics(run))
    blocks = []
    for title, part in parts.items():
        if part.rows:                                             # a run without the agent has no such table
            blocks += [Paragraph(title), part]
    return blocks


def render(results):
    """results.json → what is printed at a recipe's end, as markdown."""
    return markdown_page(results_blocks(results))


def read_results(run):
    """The blocks of RUN/results.json, or None if the run has not come to its end."""
    file = run / "results.json"
    if not file.is_file():
        return None
    try:
        return results_blocks(iv3.read_json(file), run)
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{file}: not written by `python train.py` ({e!r})") from e


# ----------------------------------------------------------------------------- the report: training

def read_metrics(run):
    """metrics.jsonl → {stage: {figure: array over steps}}"""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return {}
    stages = {}
    for line in file.read_text().splitlines():
        if not line.endswith("}"):                                # the last line of a killed run may be torn
            continue
        record = json.loads(line)
        figures = stages.setdefault(record.pop("stage"), {})
        for figure, value in record.items():
            figures.setdefault(figure, []).append(value)
    for figures in stages.values():
        for figure, values in figures.items():
            figures[figure] = np.array(values)
    return stages


def training_row(stage, done, figures):
    """A trained stage in one line. done: its stage.json; figures: its metrics."""
    recipe = done["recipe"]
    rate = f"{recipe['lr']:g}"
    if recipe["muon"]:
        rate += f", Muon {recipe['muon']:g}"
    mix = [f"{Path(file).stem} {weight:g}" for file, weight in recipe["mix"].items()]
    moved = []
    for figure in ("loss", "reward"):
        values = figures.get(figure, ())
        if len(values):
            tenth = max(1, len(values) // 10)                     # single steps are too noisy to compare
            first = values[:tenth].mean()
            last = values[-tenth:].mean()
            moved.append(f"{figure} {first:.3g} → {last:.3g}")
    row = [stage, Path(done["inherits"]).name, recipe["steps"], rate,
           f"{recipe['packs']} × {recipe['branches']}", f"{done['tokens'] / 1e6:.2f} M",
           f"{done['seconds'] / 60:.1f}", done["processes"], ", ".join(moved), ", ".join(mix)]
    return [plain(value) for value in row]


def training_table(run, metrics):
    header = ["stage", "starts from", "steps", "lr", "videos × questions", "tokens", "minutes", "processes",
              "first → last tenth", "data and weights"]
    rows = []
    for stage in dict.fromkeys([*metrics, *iv3.STAGE_ORDER]):
        file = run / stage / "stage.json"
        done = iv3.read_json(file) if file.is_file() else {}
        if "recipe" in done:                                      # a conversion was not trained
            rows.append(training_row(stage, done, metrics.get(stage, {})))
    return Table(header, rows)


def draw_stage(stage, figures, ax):
    """A stage's loss, in RL its reward (a policy gradient's loss says nothing); bold: a running mean."""
    figure = "reward" if "reward" in figures else "loss"
    values = figures[figure]
    steps = figures["step"]
    width = max(1, len(values) // 20)
    running = np.convolve(values, np.ones(width) / width, "valid")
    middles = steps[width // 2:][:len(running)]
    ax.plot(steps, values, alpha=0.3, lw=0.8, color="tab:blue")
    ax.plot(middles, running, lw=1.6, color="tab:blue")
    title = "reverse KL" if stage == "opd" else figure
    ax.set(title=f"{stage}: {title}", xlabel="step")
    if figure == "loss" and values.min() > 0:
        ax.set_yscale("log")


def training_blocks(rows, metrics):
    blocks = [rows]
    if not metrics:
        return blocks
    panels = [functools.partial(draw_stage, stage, figures) for stage, figures in metrics.items()]
    svg = drawn(panels, columns=3, size=(3.6, 2.6))
    if svg is None:
        blocks.append(Paragraph("Training curves and decode curves are drawn where matplotlib is installed: "
                                "`pip install matplotlib`."))
    else:
        blocks.append(Picture("training.svg", "training curves", svg))
    return blocks


# --------------------------------------------------------------- the report: what the benches wrote

def conversion_blocks(bench):
    """conversion.json of bench_conversion.py → one row per way to convert."""
    keys = []
    for row in bench["rows"]:
        keys += [key for key in row if key not in keys and "seconds" not in key]
    rows = []
    for row in bench["rows"]:
        line = []
        for key in keys:
            value = row.get(key, "")
            line.append(plain(f"{value:.3f}" if isinstance(value, float) else value))
        rows.append(line)
    model = plain(bench["env"]["model"])
    about = (f"What each way to convert costs, without training, on {model}: + one idea more at a time, - "
             "the default with one less; loss change in nats per answer token over the source.")
    return [Paragraph(about), Table([plain(key.replace("_", " ")) for key in keys], rows)]


COLOURS = {"m2la": "tab:blue", "gqa": "tab:orange", "gqa_eager": "tab:gray"}
NAMES = {"m2la": "M²LA", "gqa": "good GQA", "gqa_eager": "eager GQA"}
CACHED = ("m2la", "gqa")                      # the eager GQA's cache is no other than the good one's


class CacheSize(NamedTuple):
    mb_per_token: float
    most: float | None        # tokens that fit beside the weights; None: the memory is not known


def cache_sizes(bench):
    """{kind: CacheSize}, from the first context at which the kind was timed."""
    memory = bench["env"].get("memory_gb")
    sizes = {}
    for kind in CACHED:
        rows = [row for row in bench["rows"] if row.get(f"{kind}_cache_mb")]
        if not rows:
            continue
        row = rows[0]
        cache = row[f"{kind}_cache_mb"]
        read = row[f"{kind}_gb_s"] * row[f"{kind}_ms"]            # MB, read in a step: cache and weights
        weights = read - cache
        most = None
        if memory:
            most = (memory * 1e3 - weights) * row["context"] / cache
        sizes[kind] = CacheSize(cache / row["context"], most)
    return sizes


def limit_ms(row, kind):
    """ms that reading a step's bytes takes as fast as a copy does; None if the kind was not timed."""
    if not row.get(f"{kind}_ms"):
        return None
    return row[f"{kind}_ms"] * row[f"{kind}_of_copy"]


def draw_time(bench, ax):
    for kind, name in NAMES.items():
        rows = [row for row in bench["rows"] if row.get(f"{kind}_ms")]
        contexts = [row["context"] for row in rows]
        times = [row[f"{kind}_ms"] for row in rows]
        ax.plot(contexts, times, "o-", color=COLOURS[kind], label=name)
        if kind in CACHED:
            limits = [limit_ms(row, kind) for row in rows]
            ax.plot(contexts, limits, ":", color=COLOURS[kind], label=f"{name}: the limit")
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", xlabel="cached tokens", title="ms a new token")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def draw_bytes(bench, ax):
    """The cache as far as it was timed, from there dotted to where the memory is full."""
    for kind, size in cache_sizes(bench).items():
        last = max(row["context"] for row in bench["rows"] if row.get(f"{kind}_ms"))
        contexts = [row["context"] for row in bench["rows"] if row["context"] <= last]
        held = [context * size.mb_per_token for context in contexts]
        ax.plot(contexts, held, "o-", color=COLOURS[kind], label=NAMES[kind])
        if size.most and size.most > last:
            ends = [last, size.most]
            ax.plot(ends, [end * size.mb_per_token for end in ends], ":", color=COLOURS[kind])
            label = "memory" if kind == "m2la" else None          # once in the legend
            ax.axhline(size.most * size.mb_per_token, color="tab:red", lw=0.8, label=label)
    ax.set(xscale="log", yscale="log", xlabel="cached tokens", title="MB of KV cache")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def decode_table(bench):
    header = ["cached tokens", *(f"{name}, ms" for name in NAMES.values()), "M²LA, limit", "GQA, limit",
              "M²LA, MB", "GQA, MB"]
    rows = []
    for row in bench["rows"]:
        values = [row.get(f"{kind}_ms") for kind in NAMES]
        values += [limit_ms(row, kind) for kind in CACHED]
        values += [row.get(f"{kind}_cache_mb") for kind in CACHED]
        line = [row["context"]]
        for value in values:
            line.append("does not fit" if value is None else f"{value:.3g}")
        rows.append(line)
    return Table(header, rows)


def decode_blocks(bench):
    """decode.json of bench_decode.py → what was timed, its limits, the curves."""
    env = bench["env"]
    setting = [env["preset"], f"{env['layers']} layers"]
    if env["attention_only"]:
        setting.append("attention alone")
    setting += [env["dtype"].removeprefix("torch."), env["device"]]
    blocks = [Paragraph(
        f"Time of a new token and bytes of the cache: {plain(', '.join(setting))}. Limit, in ms: all bytes "
        f"that a step must read, at the {env['copy_gb_s']:.3g} GB/s of a copy on this device.")]
    fits = []
    for kind, size in cache_sizes(bench).items():
        if size.most:
            fits.append(f"{size.most / 1e6:.3g} M tokens with {NAMES[kind]}")
    if fits:
        memory = f"{env['memory_gb']:.0f} GB"
        blocks.append(Paragraph(f"Its {memory}, less the weights, hold the cache of {', '.join(fits)}."))
    blocks.append(decode_table(bench))
    panels = [functools.partial(draw_time, bench), functools.partial(draw_bytes, bench)]
    svg = drawn(panels, columns=2, size=(5.4, 2.8))
    if svg is not None:
        blocks.append(Picture("decode.svg", "decode", svg))
    return blocks


def bench_blocks(run, name, make, flags=""):
    """The part of RUN/NAME.json, or the command that writes the file."""
    file = run / f"{name}.json"
    script = f"python extras/bench_{name}.py"
    if not file.is_file():
        return [Paragraph(f"No {name}.json: `{script}{flags} --json {plain(file)}` writes it.")]
    try:
        return make(iv3.read_json(file))
    except (LookupError, TypeError) as e:
        raise UserError(f"{file}: not written by `{script}` ({e!r}); delete it") from e


# ---------------------------------------------------------------------- the report: five test items

def is_right(row):
    return row["reward"] >= 0.5              # 1 of a letter; an IoU of a span


def picked_items(samples, count=5):
    """A seeded choice of right and wrong answers in turn, each of another kind where there is one."""
    left = list(np.random.default_rng(0).permutation(sorted(samples)))
    picked = []
    while left and len(picked) < count:
        wanted = len(picked) % 2 == 0                             # right, wrong, right, …
        kinds = {row["kind"] for row in picked}
        # Of those left, the first that meets both criteria; else the first one, else any.
        fitting = [id for id in left if is_right(samples[id]) == wanted] or left
        fresh = [id for id in fitting if samples[id]["kind"] not in kinds] or fitting
        picked.append(samples[fresh[0]])
        left.remove(fresh[0])
    return picked


def item_spans(row):
    """{"true": (start, end), "predicted": the same or None} in seconds, of a grounding item."""
    if row["task"] != "grounding":
        return {}
    return {"true": row["answer"], "predicted": parse_span(row["text"])}


def item_frames(number, row, question, spans):
    """Six frames spread over the clip, and those that question, truth and prediction are about."""
    start, end = window(media_items(row)[0], row, row["root"])
    spread = np.linspace(start, end, 7)[:-1] + (end - start) / 12            # the middles of six equal parts
    asked = []
    for seconds in re.findall(r"(\d+(?:\.\d+)?) second", question):
        asked += [float(seconds), float(seconds) + 0.5]
    moments = list(asked)
    for span in spans.values():
        if span:
            moments.append((span[0] + span[1]) / 2)
    inside = [t for t in moments if start <= t < end]
    captions = []
    pictures = []
    for n, t in enumerate(sorted({*np.round(spread, 1).tolist(), *inside})):
        frame = iv3.read_video(Path(row["root"]) / clip_of(row), t, None, 2.0, 1).frames[0]
        scale = max(1, 96 // frame.shape[0])                      # toy frames are small
        frame = frame.repeat(scale, 0).repeat(scale, 1)
        names = [name for name, span in spans.items() if span and span[0] <= t <= span[1]]
        if t in asked:
            names.append("asked")
        captions.append(f"{t:.1f} s {', '.join(names)}")
        pictures.append(Picture(f"item{number}_{n}.png", f"{t:.1f} s", png(frame)))
    return Frames(captions, pictures)


def item_facts(row, spans):
    """[[what, text], …] of an item: options, truth and what the model said."""
    options = row.get("options", [])
    if spans:
        truth = "From {:.1f} to {:.1f} seconds.".format(*row["answer"])
        verdict = f"IoU {row['reward']:.2f}"
    else:
        truth = f"{options[LETTERS.index(row['answer'])]} ({row['answer']})"
        verdict = "right" if row["reward"] else "wrong"
    text = row["text"]
    if text is None:
        text = "(the video could not be read)"
    facts = []
    if options:
        lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
        facts.append(["options", plain("; ".join(lettered))])
    facts.append(["truth", plain(truth)])
    facts.append(["prediction", plain(f"{text} → {verdict}")])
    return facts


def item_blocks(number, row):
    """A test item: its question, what is true, what was said, its frames. MediaError: no video."""
    texts = [item["text"] for item in user_turn(row)["content"] if item["type"] == "text"]
    question = texts[0].split("\n")[-1]
    spans = item_spans(row)
    frames = item_frames(number, row, question, spans)
    facts = item_facts(row, spans)
    return [Heading(3, f"{number + 1}. {plain(question)}"),
            Table(["item", plain(f"{row['id']}, {row['kind']}")], facts), frames]


def items_blocks(run):
    """Five items of the last stage whose answers were kept."""
    stages = [stage for stage in reversed(iv3.STAGE_ORDER) if (run / stage / "scores.json").is_file()]
    samples = stage_samples(run / stages[0]) if stages else {}
    if not samples:
        return [Paragraph("No predictions are stored: the recipe keeps them in the scores.json of each stage "
                          "from SFT short on.")]
    right = [row for row in samples.values() if is_right(row)]
    blocks = [Paragraph(f"Right and wrong answers of `{stages[0]}` in turn, a seeded choice: {len(right)} of "
                        f"{len(samples)} are right, with a reward of 1 or an IoU of 0.5 or more.")]
    for number, row in enumerate(picked_items(samples)):
        try:
            blocks += item_blocks(number, row)
        except iv3.MediaError as e:
            blocks.append(Paragraph(plain(e)))
    return blocks


# -------------------------------------------------------------------------------- the report itself

def run_blocks(run):
    """All of a run's report."""
    metrics = read_metrics(run)
    trained = training_table(run, metrics)
    need(trained.rows or metrics,
         f"{run}: no run is there (no metrics.jsonl); `python train.py --out {run}` is one")
    results = read_results(run)
    if results is None:
        results = [Paragraph(f"No results.json: `python train.py --out {plain(run)}` (the whole recipe) "
                             "writes it at its end.")]
    command = f"python extras/report.py {plain(run)}"
    return [
        Heading(1, plain(run.resolve().name)),
        Paragraph(f"Made by `{command}` from the files of the run; no model was asked."),
        Heading(2, "Results"), *results,
        Heading(2, "Training"), *training_blocks(trained, metrics),
        Heading(2, "Conversion"), *bench_blocks(run, "conversion", conversion_blocks),
        Heading(2, "Decoding"), *bench_blocks(run, "decode", decode_blocks, " --contexts 1024,4096,16384"),
        Heading(2, "Five test items"), *items_blocks(run)]


def write_report(run):
    """RUN/report.md, its pictures in RUN/report/, and the same as one page, RUN/report.html → its path."""
    run = Path(run)
    blocks = run_blocks(run)
    text = markdown_page(blocks) + "\n"
    whole = page(blocks[0].text, blocks)
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    for old in [*folder.glob("*.svg"), *folder.glob("item*.png")]:
        old.unlink()
    for picture in pictures_of(blocks):
        (folder / picture.name).write_bytes(picture.data)
    iv3.write_atomic(run / "report.md", lambda p: p.write_text(text))
    iv3.write_atomic(run / "report.html", lambda p: p.write_text(whole))
    return run / "report.html"


def report_run(run):
    """Print the tables and write results.md; then the report: if it fails, the results are there."""
    results = read_results(run)
    if results is not None:
        text = markdown_page(results)
        iv3.write_atomic(run / "results.md", lambda p: p.write_text(text + "\n"))
        print(f"{text}\n", flush=True)
    try:
        written = write_report(run)
    except UserError:
        raise
    except (OSError, LookupError, TypeError, ValueError) as e:    # a full disk; a file of another kind
        raise UserError(f"{run}: no report ({type(e).__name__}: {e})") from e
    print(f"{written} and report.md written")


# --------------------------------------------------------------------------------- a rollout's page

ACTIONS = {"view": "#27c", "asr": "#d80", "verify": "#939", "answer": "#292"}     # colours; others: grey
LEFT, WIDTH = 130, 780                        # pixels: the lanes' names, the time axis
LANE = 24                                     # pixels: height of an action's lane
TICKS = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 1e9)       # seconds between two of them


class Span(NamedTuple):
    start: float
    end: float
    step: int


def action_spans(records):
    """{action: [Span, …]}: the seconds that each step was about, actions in the order of their first step."""
    lanes = {}
    for record in records:
        if record["record"] != "step":
            continue
        arguments = record["arguments"]
        found = re.match(r"([\d.]+) to ([\d.]+) seconds \(score", record["feedback"])
        if arguments.get("evidence"):                             # of verify and answer
            spans = arguments["evidence"]
        elif found:                                               # of temporal_grounding: its first candidate
            spans = [found.groups()]
        elif "end" in arguments:
            spans = [(arguments["start"], arguments["end"])]
        else:
            spans = []
        for start, end in spans:
            span = Span(float(start), float(end), int(record["step"]))
            lanes.setdefault(record["action"], []).append(span)
    return lanes


def clock_label(seconds, hours):
    minutes, rest = divmod(int(seconds), 60)
    if hours:
        return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}"


def timeline(records):
    """Inline SVG: the spans that each action was about, with links to its steps; the evidence behind."""
    duration = float(records[0]["duration"])
    lanes = action_spans(records)
    bottom = LANE * len(lanes) + 6

    def x_of(seconds):
        return LEFT + WIDTH * seconds / duration

    def extent(start, end):
        width = max(3, x_of(end) - x_of(start))                   # of an hour, a second would be invisible
        return f'x="{x_of(start):.1f}" width="{width:.1f}"'

    parts = []
    for start, end in records[-1].get("evidence", []):
        parts.append(f'<rect {extent(start, end)} y="0" height="{bottom}" fill="#cec"/>')
    for lane, (action, spans) in enumerate(lanes.items()):
        top = LANE * lane
        parts.append(f'<text x="{LEFT - 10}" y="{top + 19}" text-anchor="end">{html.escape(action)}</text>')
        colour = ACTIONS.get(action, "#888")
        for start, end, step in spans:
            bar = f'<rect {extent(start, end)} y="{top + 8}" height="14" fill="{colour}" fill-opacity=".7"/>'
            title = f"[{step}] {exact(start, end)} seconds"
            parts.append(f'<a href="#step{step}"><title>{title}</title>{bar}</a>')
    tick = next(seconds for seconds in TICKS if duration / seconds <= 12)
    for seconds in np.arange(0, duration + 1e-6, tick).tolist():
        x = f"{x_of(seconds):.1f}"
        label = clock_label(seconds, hours=duration >= 3600)
        parts.append(f'<path d="M{x} {bottom}v5" stroke="#333"/>'
                     f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<path d="M{LEFT} {bottom}h{WIDTH}" stroke="#333"/>')
    size = f"0 0 {LEFT + WIDTH + 30} {bottom + 24}"
    return f'<svg viewBox="{size}" font-size="12" font-family="sans-serif">{"".join(parts)}</svg>'


def step_of(record):
    number = int(record["step"]) if "step" in record else None
    kind = record.get("kind", record["record"])
    return Step(number, str(kind), describe_record(record))


def evidence_blocks(video, start, end):
    """Up to eight frames of a cited span."""
    blocks = [Heading(3, f"{listed([(start, end)])} seconds")]
    try:
        seen = iv3.read_video(video, start, end, FPS, 8)
    except UserError as e:                                        # the trace was kept, the video was not
        return [*blocks, Paragraph(f"no frames: {plain(e)}")]
    captions = [f"{t:.1f} s" for t in seen.times]
    pictures = [Picture("frame.png", caption, png(frame)) for caption, frame in zip(captions, seen.frames)]
    return [*blocks, Frames(captions, pictures)]


def trace_blocks(records):
    """A rollout: its question and answer, the timeline, the frames that it cites, its steps."""
    steps = [step_of(record) for record in records]
    name = Path(records[0]["video"]).name
    blocks = [Heading(1, f"A rollout on {plain(name)}"), steps[0], steps[-1], Drawing(timeline(records))]
    for start, end in records[-1].get("evidence", []):
        blocks += evidence_blocks(records[0]["video"], start, end)
    return [*blocks, Heading(3, "steps"), *steps[1:-1]]


def report_trace(path, out):
    need(out.absolute().parent.is_dir(), f"{out}: no such folder to write it to")
    need(not out.is_dir(), f"{out}: is a folder; name a file in it")
    records = read_trace(path)[0]
    try:
        blocks = trace_blocks(records)
        text = page(blocks[0].text, blocks)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(f"{path}: not a trace of this agent ({e})") from e
    out.write_text(text)
    print(f"{out} written")


# ------------------------------------------------------------------------------------------ command

def main():
    parser = argparse.ArgumentParser(
        description="Print a run's result tables and write its report; or write a rollout's trace as a page.")
    add = parser.add_argument
    add("path", metavar="RUN|TRACE", help="a run's directory, or a trace of mcr_agent.py (.jsonl)")
    add("--out", metavar="F", help="of a trace: the page (default: beside it, .html)")
    args = parser.parse_args()
    path = Path(args.path)
    if path.is_file():
        report_trace(path, Path(args.out or path.with_suffix(".html")))
        return
    need(not args.out, "--out: of a trace; a run's page is RUN/report.html")
    report_run(path)


if __name__ == "__main__":
    iv3.run_cli(main)
