"""Reading videos beside torchcodec, decord and PyAV, as transformers calls them: time and memory.

    python extras/bench_video.py --minutes 10                       some minutes for each reader
    python extras/bench_video.py --minutes 10 --folder videos --readers ours,torchcodec --json F.json

Peers take part where they are installed: transformers with torchcodec, decord or av; to patches where its
Qwen3-VL video processor can be imported (it needs torchvision). The videos are made here: a minute of moving
noise with a cut every seven seconds is encoded by x264, and its packets are repeated.

Each measurement has a process of its own, and the readers take turns: `cpu` and `wall` are seconds, the least of
--repeats; `mb` is what the process needed more at its peak than before. `of` is our time over the peer's: below 1
we are faster. `equal`: the same frames, bit for bit.
"""
import argparse
import importlib.util
import multiprocessing
import resource
import sys
import tempfile
import time
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np

import iv3
import mcr_agent
from eval import table, write_json
from iv3 import need

FPS = 30                                     # of the videos that are made
PEERS = ("torchcodec", "decord", "pyav")     # as transformers names them
CUT = 7                                      # seconds between two cuts


class Task(NamedTuple):
    """What is read of which video. `look`: settings of iv3.read_video; None: find the scenes."""
    name: str
    video: Path
    end: float                               # seconds
    look: dict | None


# ------------------------------------------------------------------------------------------------- the videos

def make_part(path, height, seconds):
    """A film of `seconds`: a texture that drifts, of another brightness and colour after each cut."""
    rng = np.random.default_rng(0)
    width = height * 16 // 9 // 16 * 16
    texture = rng.integers(0, 64, (height + 64, width + 64), dtype=np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "30"})
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        for i in range(round(seconds * FPS)):
            if i % (CUT * FPS) == 0:
                light, u, v = rng.integers(16, 176, 3, dtype=np.uint8)
            y, x = rng.integers(0, 2, 2) + i % 60                # it drifts and trembles
            planes = np.empty((height * 3 // 2, width), np.uint8)
            planes[:height] = light + texture[y:y + height, x:x + width]
            planes[height:height * 5 // 4] = u
            planes[height * 5 // 4:] = v
            out.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        out.mux(stream.encode())


def repeat_part(part, path, times):
    """The packets of a film, one time after another."""
    with av.open(str(path), "w") as out:
        copy = None
        for k in range(times):
            with av.open(str(part)) as source:
                stream = source.streams.video[0]
                copy = copy or out.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.size > 0:
                        packet.pts += k * stream.duration
                        packet.dts += k * stream.duration
                        packet.stream = copy
                        out.mux(packet)


def make_video(folder, height, minutes):
    """A film of so many minutes, kept in the folder. → its path"""
    path = folder / f"{height}p-{minutes:g}min.mp4"
    if not path.is_file():
        seconds = min(60, minutes * 60)
        part = folder / f"{height}p-{seconds:g}s.mp4"
        make_part(part, height, seconds)
        repeat_part(part, folder / "part.mp4", round(minutes * 60 / seconds))
        (folder / "part.mp4").rename(path)
    return path


def make_tasks(folder, args):
    large = make_video(folder, args.height, args.minutes)
    minute = make_video(folder, args.height, min(1, args.minutes))
    small = make_video(folder, args.height // 2, args.small_minutes)
    end = iv3.probe(large)
    at = end * 5 / 6                                             # 500 s of ten minutes
    hour = iv3.probe(small)
    return [
        Task("a minute, 64 frames", minute, iv3.probe(minute), {"max_frames": 64}),
        Task(f"10 s at {at:.0f} s", large, min(at + 10, end), {"start": at}),
        Task(f"{args.minutes:g} min, 64 frames", large, end, {"max_frames": 64}),
        Task(f"{args.minutes:g} min, 768 frames", large, end, {"max_frames": 768}),
        Task(f"first look at {args.small_minutes:g} min", small, hour, {"max_frames": 24, "pairs": True}),
        Task(f"scenes of {args.scene_minutes:g} min", small, min(hour, args.scene_minutes * 60), None)]


# ------------------------------------------------------------------------------------------------ the readers

def read_ours(task):
    return iv3.read_video(task.video, end=task.end, deadline=1e9, **task.look).frames


def read_as_transformers(peer, task):
    """→ frames, (F,H,W,3) uint8: those that are on the screen at the same times."""
    from transformers.video_utils import VIDEO_DECODERS
    look = dict(task.look)
    wanted = iv3.sample_times(look.pop("start", 0.0), task.end, 2.0, **look)
    numbers = np.floor((wanted + iv3.TICK) * FPS).astype(int)
    frames, _ = VIDEO_DECODERS[peer](str(task.video), lambda metadata, **_: numbers)
    if peer == "torchcodec":
        frames = frames.permute(0, 2, 3, 1)
    return np.asarray(frames)


def to_patches(reader, frames):
    """As the model takes them: bytes here, normalised floats in transformers."""
    if reader == "ours":
        return iv3.patchify(frames, iv3.Config.preset("qwen3-vl-2b"))
    return qwen_processor()([frames], do_sample_frames=False, return_tensors="pt")


@lru_cache
def qwen_processor():
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    return Qwen3VLVideoProcessor()


def do_task(task, reader, patches):
    """→ frames, or None where scenes are found"""
    if task.look is None:
        mcr_agent.find_scenes(task.video, 0.0, task.end)
        return None
    if reader == "ours":
        frames = read_ours(task)
    else:
        frames = read_as_transformers(reader, task)
    if patches:
        to_patches(reader, frames)
    return frames


def installed(readers):
    found = []
    for reader in readers:
        module = {"pyav": "av"}.get(reader, reader)
        needed = [] if reader == "ours" else ["transformers", module]
        if all(importlib.util.find_spec(name) for name in needed):
            found.append(reader)
    return found


# ------------------------------------------------------------------------------------------------ the measuring

class Cost(NamedTuple):
    """What a measurement says."""
    cpu: float                               # seconds
    wall: float
    mb: float                                # at the peak, more than before
    sum: int | None                          # of the frames: equal ones have equal sums


def peak_mb():
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(pipe, task, reader, patches):
    """In a process of its own: send the Cost, or None where the reader cannot do it."""
    try:
        if reader != "ours":                 # importing is not reading
            import transformers.video_utils  # noqa: F401
            if patches:
                qwen_processor()
        before = peak_mb()
        wall = time.perf_counter()
        cpu = time.process_time()
        frames = do_task(task, reader, patches)
        cpu = time.process_time() - cpu
        wall = time.perf_counter() - wall
        mb = peak_mb() - before
        pipe.send(Cost(cpu, wall, mb, None if frames is None else zlib.crc32(np.ascontiguousarray(frames))))
    except (ImportError, RuntimeError, OSError) as error:
        print(f"{reader}: {' '.join(str(error).split())[:150]}", file=sys.stderr)
        pipe.send(None)


def in_a_process(*what):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=measure, args=(there, *what))
    process.start()
    there.close()
    try:
        cost = here.recv()
    except EOFError:
        cost = None                          # killed, for lack of memory as a rule
    process.join()
    return cost


def bench_task(task, readers, patches, repeats):
    """→ a row of the result: figures of each reader that did the task."""
    costs = {}
    for _ in range(repeats):
        for reader in readers:               # in turns: what else the machine does hits all of them
            cost = in_a_process(task, reader, patches)
            if cost:
                costs.setdefault(reader, []).append(cost)
    name = task.name + (", to patches" if patches else "")
    row = {"name": name}
    for reader, several in costs.items():
        row[f"{reader}_cpu"] = min(cost.cpu for cost in several)
        row[f"{reader}_wall"] = min(cost.wall for cost in several)
        row[f"{reader}_mb"] = min(cost.mb for cost in several)
        if reader != "ours":
            row[f"{reader}_equal"] = several[0].sum == costs["ours"][0].sum
            row[f"of_{reader}_cpu"] = row["ours_cpu"] / row[f"{reader}_cpu"]
            row[f"of_{reader}_wall"] = row["ours_wall"] / row[f"{reader}_wall"]
    return row


def print_rows(rows, readers):
    header = ["", "cpu s", "wall s", "MB"]
    for reader in readers[1:]:
        header += [f"of {reader}: cpu", "wall", "its MB", "equal"]
    lines = []
    for row in rows:
        keys = ["ours_cpu", "ours_wall", "ours_mb"]
        for reader in readers[1:]:
            keys += [f"of_{reader}_cpu", f"of_{reader}_wall", f"{reader}_mb", f"{reader}_equal"]
        line = [row["name"]]
        for key in keys:
            value = row.get(key, "")
            if key.endswith("_mb") and value != "":
                value = round(value)
            elif isinstance(value, float):
                value = f"{value:.2f}"
            line.append(value)
        lines.append(line)
    print(table(header, lines))


def bench_video(args):
    wanted = args.readers.split(",")
    unknown = set(wanted) - {"ours", *PEERS}
    need(not unknown, f"--readers {args.readers}: takes ours, {', '.join(PEERS)}")
    readers = ["ours", *installed([reader for reader in wanted if reader != "ours"])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for task in make_tasks(folder, args):
            if task.look is None:
                rows.append(bench_task(task, ["ours"], False, args.repeats))
                continue
            for patches in (False, True):
                rows.append(bench_task(task, readers, patches, args.repeats))
    print_rows(rows, readers)
    env = {"av": av.__version__, "height": args.height, "repeats": args.repeats, "readers": readers,
           "measures": "seconds of CPU and wall clock, least of the repeats; MB at the peak; of_X: ours over X"}
    return {"env": env, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description="Time and memory of reading videos, beside other readers.")
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="of the large video (default 10)")
    add("--height", type=int, default=720, help="of the large video; the small one has half (default 720)")
    add("--small-minutes", type=float, default=60, help="of the small video, for the first look (default 60)")
    add("--scene-minutes", type=float, default=10, help="of the small video whose scenes are found (default 10)")
    add("--readers", default=",".join(["ours", *PEERS]), help="comma-separated (default all that are installed)")
    add("--repeats", type=int, default=2, help="measurements of each kind (default 2)")
    add("--folder", metavar="DIR", help="keep the videos here (default: a temporary folder)")
    add("--json", metavar="F", help="also write the result to this file")
    args = parser.parse_args()
    iv3.check_flags(args, {1: "repeats", 64: "height"})
    need(min(args.minutes, args.small_minutes, args.scene_minutes) > 0, "minutes must be positive")
    write_json(args.json, lambda: bench_video(args))


if __name__ == "__main__":
    iv3.run_cli(main)
