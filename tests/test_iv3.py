"""Every part of iv3.py against independent oracles; test_parity.py compares the model with transformers'."""
import copy
import json
import os
import random
import struct
import sys
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

import iv3
from iv3 import Config, MediaError, Processor, Tokenizer, UserError, generate, load_rows, read_video, target_size

PIECES = ["user\n", "assistant\n", "What colour", " is the", " shape", "?", "red", "red circle", " seconds", "answer"]
CONFIG = Config(vocab=300, hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, mlp=64, mrope_sections=(4, 2, 2),
                vision_hidden=32, vision_layers=3, vision_heads=2, vision_mlp=48, pos_side=3, deepstack=(0, 2))
UNTIED = replace(CONFIG, tied=False)                           # a random tied model only repeats its last token
LATENT = replace(UNTIED, attn="m2la", rope_width=16, ranks=((24, 16), (16, 24), (20, 20)))


def random_model(cfg, tokenizer, seed=0):
    """Every weight random, norms and biases too: a term that is left out shows."""
    model, g = iv3.build_model(cfg, tokenizer), torch.Generator().manual_seed(seed)
    model.init_weights(g)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.data = centre + 0.3 * torch.randn(p.shape, generator=g)
    return model.eval()


def write_video(path, frames, fps=4, times=None, codec="libx264", more=(), **options):
    """frames: arrays (H,W,3) or grey levels of 32×32 frames; times: presentation times of a variable rate; `more`:
    options of the codec, `options`: of the container."""
    frames = [np.full((32, 32, 3), f, np.uint8) if np.isscalar(f) else f for f in frames]
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=fps, options=dict(more) or {"crf": "8", "g": "8"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def write_image(path, pixels):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "rgb24"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path


def noise(n, height, width, seed=0):
    """Smooth random frames (what a codec keeps)."""
    small = np.random.default_rng(seed).integers(0, 256, (n, height // 8, width // 8, 3), dtype=np.uint8)
    return small.repeat(8, 1).repeat(8, 2)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(PIECES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ramp.mp4: 10 s at 4 fps, frame i is grey 10 + 5i; wide.mp4 64×128; square.mp4 64×64; picture.png 96×64."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "ramp.mp4", [10 + 5 * i for i in range(40)])
    write_video(folder / "wide.mp4", noise(6, 64, 128), fps=2)
    write_video(folder / "square.mp4", noise(4, 64, 64, 1), fps=2)
    write_image(folder / "picture.png", noise(1, 96, 64, 2)[0])
    return folder


def level(video):
    """Number of the ramp's frame that each frame shows."""
    return np.round((video.frames.mean((1, 2, 3)) - 10) / 5).astype(int).tolist()


def user(*content):
    items = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": items}


def video(name, **options):
    return {"type": "video", "video": name, **options}


# ------------------------------------------------------------------------------------------------------- configuration

@pytest.mark.parametrize("name, expected", [("qwen3-vl-2b", 2_127_532_032), ("qwen3-vl-4b", 4_437_815_808),
                                            ("qwen3-vl-8b", 8_767_123_696)])
def test_presets_have_the_sizes_of_the_published_checkpoints(name, expected):
    with torch.device("meta"):
        model = iv3.InternVideo3(Config.preset(name), (1, 2))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("changes, named", [
    ({"attn": "mla"}, "attn='mla'"), ({"mrope_sections": (6, 5, 4)}, "mrope_sections"), ({"kv_heads": 3}, "kv_heads=3"),
    ({"deepstack": (0, 2)}, "deepstack"), ({"deepstack": (0,) * 5}, "deepstack"),
    ({"attn": "m2la", "rope_width": 8}, "ranks"), ({"attn": "m2la", "ranks": ((8, 8),) * 4}, "rope_width")])
def test_a_bad_config_names_the_field(changes, named):
    with pytest.raises(UserError, match=named):
        Config(**changes)


def test_config_files_and_presets(tmp_path):
    with pytest.raises(UserError, match="'huge' does not exist.*tiny, small"):
        Config.preset("huge")
    path = tmp_path / "config.json"
    for text, named in (('{"hidden": 64, "hiden": 1}', "'hiden'"), ("{", "not JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=named) as error:
            Config.load(path)
        assert str(path) in str(error.value)


# -------------------------------------------------------------------------------------------------------- sizes, pixels

@pytest.mark.parametrize("n, height, width, expected", [
    (120, 360, 640, (320, 608)),             # the note's example: 60 s of 640×360 → 60·10·19 = 11,400 tokens
    (2, 64, 96, (64, 96)),                   # nothing to do
    (2, 50, 90, (64, 96)),                   # to the nearest multiple: 1.56 → 2, 2.81 → 3
    (2, 80, 112, (64, 128)),                 # halves go to even: 2.5 → 2, 3.5 → 4
    (2, 20, 20, (64, 64)),                   # 2·32·32 = 2048 < 4096: β = √(4096/800) = 2.26 → 45.3 → 64
    (768, 1080, 1920, (128, 224)),           # β = √(768·1080·1920/25165824) = 7.95 → 135.8, 241.4 → floor
    (2, 10, 1000, (32, 992))])
def test_target_size_by_hand(n, height, width, expected):
    assert target_size(n, height, width, 32, 4096, 25_165_824) == expected


def test_aspect_ratio_limit():
    with pytest.raises(MediaError, match="3000×10"):
        target_size(2, 10, 3000, 32, 4096, 25_165_824)


@pytest.mark.parametrize("side, expected", [((32, 32), (256, 256)), ((200, 320), (224, 352)), ((300, 400), (288, 384)),
                                            ((256, 256), (256, 256))])
def test_images_have_their_own_size_limits(side, expected):
    """65,536 px at least: 200×320 is 192×320 = 61,440 px rounded, so β = √(65536/64000) and both sides go up."""
    cfg = Config.preset("qwen3-vl-2b")
    patches, grid = iv3.patchify(np.zeros((1, *side, 3), np.uint8), cfg, image=True)
    assert (grid[0] * 16, grid[1] * 16) == expected and len(patches) == grid[0] * grid[1]


def test_patch_order_and_layout():
    """Pixel (frame, y, x) of channel c: patches go by time, 2×2 block, place in it; a vector by c, t, y, x."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    patches, grid = iv3.patchify(frames, Config())
    assert grid == (4, 6) and patches.shape == (2 * 4 * 6, 3 * 2 * 256) and patches.dtype == torch.uint8
    order = [(t, 2 * H + a, 2 * W + b)
             for t in range(2) for H in range(2) for W in range(3) for a in range(2) for b in range(2)]
    rng = np.random.default_rng(1)
    for _ in range(200):
        i, c, f, y, x = (int(rng.integers(k)) for k in (48, 3, 2, 16, 16))
        t, row, column = order[i]
        assert patches[i, ((c * 2 + f) * 16 + y) * 16 + x] == frames[2 * t + f, 16 * row + y, 16 * column + x, c]


def test_an_odd_number_of_frames_repeats_the_last():
    frames = noise(3, 32, 32)
    assert torch.equal(iv3.patchify(frames, Config())[0], iv3.patchify(frames[[0, 1, 2, 2]], Config())[0])


def test_resizing_keeps_flat_colours_flat():
    patches, grid = iv3.patchify(np.full((2, 50, 40, 3), (10, 200, 90), np.uint8), Config())
    assert grid == (4, 2)
    assert (patches.view(8, 3, -1) == torch.tensor([10, 200, 90])[:, None]).all()


def test_the_position_table_is_interpolated_in_the_order_of_the_patches(tokenizer):
    """From 3×3 to 4×6, corners kept: by hand, row and column of the table for each patch of the tower's order."""
    tower = random_model(CONFIG, tokenizer).visual
    table = tower.pos_embed.weight.detach().view(3, 3, -1)
    expected = []
    for y, x in [(2 * H + a, 2 * W + b) for H in range(2) for W in range(3) for a in range(2) for b in range(2)]:
        (r, down), (c, right) = divmod(y * 2 / 3, 1), divmod(x * 2 / 5, 1)
        r, c, below, beside = int(r), int(c), min(int(r) + 1, 2), min(int(c) + 1, 2)
        expected.append((1 - down) * ((1 - right) * table[r, c] + right * table[r, beside])
                        + down * ((1 - right) * table[below, c] + right * table[below, beside]))
    torch.testing.assert_close(tower.position_embedding(4, 6).detach(), torch.stack(expected))


@torch.no_grad()
def test_the_vision_tower_takes_long_videos_in_parts_of_bounded_memory(tokenizer, monkeypatch):
    tower, sizes = random_model(CONFIG, tokenizer).visual, []
    grids = torch.tensor([[2, 4]] * 5 + [[4, 4]] * 3)
    patches = torch.randint(0, 256, (int(grids.prod(1).sum()), 6 * CONFIG.patch ** 2), dtype=torch.uint8)
    whole = tower(patches, grids)
    encode = tower.encode_grid
    monkeypatch.setattr(tower, "encode_grid", lambda part, *run: sizes.append(len(part)) or encode(part, *run))
    monkeypatch.setattr(iv3, "VISION_CHUNK", 17)
    for part, same in zip(tower(patches, grids), whole):
        torch.testing.assert_close(part, same)
    assert sizes == [16, 16, 8, 16, 16, 16]


# ---------------------------------------------------------------------------------------------------------- video files

def test_read_video_gives_frames_with_their_times(folder):
    v = read_video(folder / "ramp.mp4")
    assert v.frames.shape == (20, 32, 32, 3) and v.frames.dtype == np.uint8
    assert v.times.tolist() == [i / 2 for i in range(20)] and level(v) == list(range(0, 40, 2))


@pytest.mark.parametrize("options, times", [
    (dict(start=3, end=5), [3, 3.5, 4, 4.5]), (dict(start=3.2, end=4, fps=4), [3, 3.25, 3.5, 3.75]),
    (dict(start=9, end=99, fps=1), [9]), (dict(start=-5, end=1), [0, 0.5]), (dict(fps=0.25), [0, 4, 8]),
    (dict(fps=8, end=1), [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]), (dict(max_frames=3), [0, 4.75, 9.5]),
    (dict(max_frames=1), [0]), (dict(max_frames=4, pairs=True), [2, 2.5, 7, 7.5]),
    (dict(max_frames=4, pairs=True, start=4, end=6), [4, 4.5, 5, 5.5]),
    (dict(max_frames=20, pairs=True, fps=1), list(range(10)))])
def test_read_video_windows_rates_and_limits(folder, options, times):
    """The frame on screen at each wanted time; `pairs` keeps two frames of one temporal patch 1/fps apart."""
    v = read_video(folder / "ramp.mp4", **options)
    assert v.times.tolist() == times and level(v) == [round(4 * t) for t in times]


def test_variable_frame_rate(tmp_path):
    """Real presentation times, not index / average rate."""
    v = read_video(write_video(tmp_path / "v.mp4", [10 + 5 * i for i in range(6)], times=[0, 0.1, 0.5, 2, 2.2, 3]))
    assert v.times.tolist() == pytest.approx([0, 0.5, 0.5, 0.5, 2, 2.2]) and level(v) == [0, 2, 2, 2, 3, 4]


def test_times_count_from_the_start_of_the_file(tmp_path):
    """An MPEG transport stream begins at some clock value; subtitles and players call that moment 0."""
    path = write_video(tmp_path / "a.ts", [10 + 5 * i for i in range(40)])
    with av.open(str(path)) as file:
        assert file.start_time > 0
    assert level(read_video(path)) == list(range(0, 40, 2))
    v = read_video(path, start=8, end=10)
    assert v.times.tolist() == pytest.approx([8, 8.5, 9, 9.5]) and level(v) == [32, 34, 36, 38]


def test_rotated_video_is_shown_upright(tmp_path):
    """A phone held upright writes lying pictures and a matrix in the track header: x → down, y → left."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = (250, 0, 0)                                             # left half red, right half black
    path = write_video(tmp_path / "r.mp4", [pixels] * 4)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 16                           # version 0: flags, times, ids; layer …
    assert struct.unpack(">9i", data[matrix:matrix + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    data[matrix:matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frame = read_video(path).frames[0]
    assert frame.shape == (64, 32, 3) and frame[:28, :, 0].min() > 200 and frame[36:, :, 0].max() < 50


def test_frames_know_how_long_they_are_shown(tmp_path):
    path = write_video(tmp_path / "v.mp4", [10, 60, 110], times=[0, 0.1, 0.5])
    shown = list(iv3.shown_frames(path, 0))
    assert [s.since for s in shown] == pytest.approx([0, 0.1, 0.5])
    assert [s.until for s in shown] == pytest.approx([0.1, 0.5, float("inf")])
    assert [round(s.frame.to_ndarray(format="gray").mean() / 50) for s in shown] == [0, 1, 2]


B_FRAMES = {"g": "12", "bf": "4", "b-pyramid": "normal"}
OPEN = {**B_FRAMES, "x264-params": "open-gop=1"}               # groups whose first frames need the group before
ODD = {
    "closed.mp4": dict(more=B_FRAMES), "open.mp4": dict(more=OPEN), "open.ts": dict(more=OPEN),
    "index.mkv": dict(more=B_FRAMES), "no_times.avi": dict(codec="mpeg4", more={"g": "12"}),
    "uneven.mkv": dict(more=B_FRAMES, times=np.cumsum([0.02, 0.04, 0.3, 0.1] * 18)),
    "one_group.mp4": dict(more={"g": "999"}), "all_keys.mp4": dict(more={"g": "1"}),
    "refresh.mp4": dict(more={"g": "12", "x264-params": "intra-refresh=1"}),
    "fields.ts": dict(more={**B_FRAMES, "x264-params": "tff=1"}),
    "mpeg2.mpg": dict(codec="mpeg2video", fps=25, more={"g": "12", "bf": "2"}),
    "mpeg4.mkv": dict(codec="mpeg4", more={"g": "12", "bf": "2"}),
    "hevc.mp4": dict(codec="libx265", more={"x265-params": "keyint=12:open-gop=1:log-level=none"}),
    "hidden.webm": dict(codec="libvpx-vp9", more={"g": "12", "lag-in-frames": "8", "cpu-used": "8"})}


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """Files in which the frame on the screen is not easily found without decoding everything."""
    folder = tmp_path_factory.mktemp("odd")
    for name, how in ODD.items():
        how = {"fps": 12, **how}
        write_video(folder / name, noise(6 * how["fps"], 64, 64), **how)
    data = (folder / "index.mkv").read_bytes()
    (folder / "no_index.mkv").write_bytes(data[:data.rindex(b"\x1c\x53\xbb\x6b")])
    data = bytearray((folder / "open.ts").read_bytes())
    data[len(data) // 2:len(data) // 2 + 40] = bytes(40)
    (folder / "damaged.ts").write_bytes(data)
    return folder


LOOKS = [dict(), dict(fps=12), dict(fps=0.7), dict(max_frames=3), dict(max_frames=4, pairs=True),
         dict(start=2.05, fps=5), dict(start=3, end=3.4, fps=24), dict(start=1.9, max_frames=4, pairs=True),
         dict(start=4.4, end=5, max_frames=1)]


def whole_read(path, look):
    """read_video's frames and times as they were defined: decode all, and see what is on the screen at each time."""
    start, end = look.get("start", 0.0), min(look.get("end", 1e9), iv3.probe(path))
    wanted = iv3.sample_times(start, end, look.get("fps", 2.0), look.get("max_frames"), look.get("pairs", False))
    with av.open(str(path)) as file:
        decoded = [(frame.time - file.start_time / av.time_base, frame) for frame in file.decode(video=0)]
    frames, times = [], []
    for t in wanted:
        until = [now for now, _ in decoded[1:]] + [float("inf")]
        k = next(k for k, following in enumerate(until) if t + iv3.TICK < following)
        times.append(decoded[k][0])
        frames.append(iv3.upright(decoded[k][1], iv3.VideoReformatter()))
    return np.stack(frames), times


@pytest.mark.parametrize("name", [*ODD, "no_index.mkv", "damaged.ts"])
def test_sparse_reads_equal_decoding_everything(name, odd_folder):
    path = odd_folder / name
    for look in LOOKS:
        frames, times = whole_read(path, look)
        video = read_video(path, **look)
        assert video.times.tolist() == times and np.array_equal(video.frames, frames), look


def test_what_nobody_looks_at_is_not_decoded(odd_folder, monkeypatch):
    """Six groups of twelve frames or more: those are decoded that are looked at, and without their idle B-frames."""
    decoded = []
    real = iv3.decode_frames

    def spy(*arguments):
        for now, frame in real(*arguments):
            decoded.append(now)
            yield now, frame
    monkeypatch.setattr(iv3, "decode_frames", spy)
    for name, look, most in (("mpeg4.mkv", dict(end=0.4, max_frames=1), 2), ("mpeg4.mkv", dict(max_frames=2), 20),
                             ("one_group.mp4", dict(max_frames=2), 72), ("closed.mp4", dict(fps=1), 45)):
        read_video(odd_folder / name, **look)
        assert 0 < len(decoded) <= most, (name, look, len(decoded))
        decoded.clear()


def test_a_file_that_cannot_be_read_sparsely_is_decoded(odd_folder, tmp_path, monkeypatch):
    """An intra refresh has key frames without a picture of their own; a file with lying times has a wrong order."""
    asked = []
    real = iv3.decode_frames

    def spy(path, start, wanted=None):
        asked.append(wanted is not None)
        return real(path, start, wanted)
    monkeypatch.setattr(iv3, "decode_frames", spy)
    read_video(odd_folder / "refresh.mp4", fps=0.3)
    assert asked == [True, False]
    read_video(odd_folder / "closed.mp4", fps=0.3)
    assert asked == [True, False, True]


def test_long_groups_are_not_held_in_memory(odd_folder, monkeypatch):
    path = odd_folder / "one_group.mp4"
    whole = read_video(path, max_frames=2)
    monkeypatch.setattr(iv3, "MOST_HELD", 7)
    with iv3.open_media(path) as opened:
        assert max(len(group.packets) for group in iv3.packet_groups(opened)) <= 8
    assert np.array_equal(read_video(path, max_frames=2).frames, whole.frames)


def test_one_frame_video(tmp_path, tokenizer):
    path = write_video(tmp_path / "one.mp4", [100])
    assert read_video(path).times.tolist() == [0]
    sample = Processor(tokenizer, CONFIG).encode([user(video(str(path)), "?")])
    assert sample.grids.tolist() == [[2, 2]] and sample.frames == 1 and "<0.0 seconds>" in tokenizer.decode(sample.ids)


def broken_files(folder):
    frames = noise(40, 64, 64)
    whole = write_video(folder / "whole.mp4", frames, movflags="faststart").read_bytes()
    matroska = write_video(folder / "whole.mkv", frames).read_bytes()
    middle, n = bytearray(whole), len(whole)
    middle[n // 2:n // 2 + n // 4] = np.random.default_rng(0).integers(0, 256, n // 4, dtype=np.uint8).tobytes()
    return {"empty.mp4": b"", "text.mp4": b"no video\n" * 50, "header.mp4": whole[:200], "half.mp4": whole[:n // 2],
            "half.mkv": matroska[:len(matroska) // 2], "noise.mp4": bytes(middle)}


def test_broken_videos_are_media_errors_that_name_the_file(tmp_path):
    """A cut-off Matroska file still decodes: without a check its last frame would stand for all that is missing."""
    for name, data in broken_files(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=name):
            read_video(tmp_path / name)
    for path, named in ((tmp_path / "absent.mp4", "no such file"), (tmp_path, "no such file")):
        with pytest.raises(MediaError, match=named):
            read_video(path)
    with pytest.raises(MediaError, match="whole.mp4.*20.*10.0 s"):
        read_video(tmp_path / "whole.mp4", start=20, end=30)
    with pytest.raises(MediaError, match="deadline"):
        read_video(tmp_path / "whole.mp4", deadline=0.0)


def test_a_file_without_pictures(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        out.mux(stream.encode(sound))
    with pytest.raises(MediaError, match="sound.wav: has no video stream"):
        read_video(tmp_path / "sound.wav")


# ---------------------------------------------------------------------------------------------- tokenizer and template

def test_tokenizer_round_trip_of_any_text():
    rng = random.Random(0)
    tokenizer = Tokenizer(["ab", "abc", "c", "é", "日本", "\n\n", "<|im", "\x00\x01"])
    alphabet = [*"abcé日本\n\x00\x01😀\u2028 ", "<|im", "_end|>", "<|im_end|>", "<think>"]
    for _ in range(300):
        text = ""
        for _ in range(rng.randrange(30)):
            anything = chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
            text += rng.choice(alphabet) if rng.random() < 0.7 else anything
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"           # half a surrogate pair is no character


def test_tokenizer_takes_the_longest_piece_and_keeps_specials_whole(tmp_path):
    tokenizer = Tokenizer(["ab", "abcd", "bc", "<|im_end", "x"])
    tokenizer.save(tmp_path)
    for t in (tokenizer, Tokenizer.load(tmp_path)):
        tokens = [t.tokens[i].decode() for i in t.encode("abcabcdbcx<|im_end|><|im_end")]
        assert tokens == ["ab", "c", "abcd", "bc", "x", "<|im_end|>", "<|im_end"]
    assert [tokenizer.token_id(s) for s in iv3.SPECIALS] == list(range(13)) and len(tokenizer) == 13 + 256 + 5
    assert tokenizer.encode("x") == [13 + ord("x")]                          # one id for one text
    with pytest.raises(UserError, match="vocab.json"):
        Tokenizer.load(tmp_path / "absent")


TOOL_TURNS = [
    {"role": "system", "content": "You look."},
    user(video("ramp.mp4", end=2), "What colour?"),
    {"role": "assistant", "content": "<think>fine-grained: look.</think>\n<tool_call>\n{}\n</tool_call>"},
    {"role": "tool", "content": [video("ramp.mp4", start=5, end=6), {"type": "text", "text": "5 to 6 seconds."}]},
    {"role": "assistant", "content": "red"}]
WRITTEN = ["<think>fine-grained: look.</think>\n<tool_call>\n{}\n</tool_call><|im_end|>", "red<|im_end|>"]
# frames at 0, .5, 1, 1.5 → patches at .25 and 1.25 s (half to even in .1f); the 32×32 picture is one token
PROMPT = ("<|im_start|>system\nYou look.<|im_end|>\n"
          "<|im_start|>user\n<0.2 seconds><|vision_start|><|video_pad|><|vision_end|>"
          "<1.2 seconds><|vision_start|><|video_pad|><|vision_end|>What colour?<|im_end|>\n"
          "<|im_start|>assistant\n" + WRITTEN[0] + "\n"
          "<|im_start|>user\n<tool_response>\n<5.2 seconds><|vision_start|><|video_pad|><|vision_end|>"
          "5 to 6 seconds.\n</tool_response><|im_end|>\n"
          "<|im_start|>assistant\n" + WRITTEN[1] + "\n")


def test_chat_template(tokenizer, folder):
    sample = Processor(tokenizer, CONFIG).encode(TOOL_TURNS, folder)
    assert tokenizer.decode(sample.ids) == PROMPT
    assert tokenizer.decode(sample.ids[sample.answer]) == "".join(WRITTEN)
    assert sample.frames == 6 and sample.grids.tolist() == [[2, 2]] * 3 and len(sample.patches) == 12
    opened = Processor(tokenizer, CONFIG).encode(TOOL_TURNS[:2], folder, generation=True)
    assert tokenizer.decode(opened.ids).endswith("What colour?<|im_end|>\n<|im_start|>assistant\n")
    assert not opened.answer.any() and PROMPT.startswith(tokenizer.decode(opened.ids))


def test_tools_in_a_row_answer_in_one_turn(tokenizer):
    turns = [{"role": role, "content": c} for c, role in zip("abcd", ("tool", "tool", "user", "tool"))]
    sample = Processor(tokenizer, CONFIG).encode(turns, generation=True)
    assert tokenizer.decode(sample.ids) == (
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>user\n<tool_response>\nd\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n")


def test_image_template(tokenizer, folder):
    sample = Processor(tokenizer, CONFIG).encode([user({"type": "image", "image": "picture.png"}, "red")], folder)
    assert tokenizer.decode(sample.ids) == ("<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 6 +
                                            "<|vision_end|>red<|im_end|>\n")
    assert sample.grids.tolist() == [[6, 4]]


def test_positions_by_hand(folder):
    """Two patches of 2×2 tokens, as in Qwen3-VL: t stands still in a patch, h and w count, then on from max(h, w)."""
    tokenizer = Tokenizer(["user\n<0.2 seconds>", "<1.2 seconds>"])
    sample = Processor(tokenizer, CONFIG).encode([user(video("square.mp4"))], folder)
    t, h, w = sample.positions.tolist()
    assert t == [0, 1, 2, 3, 3, 3, 3, 5, 6, 7, 8, 8, 8, 8, 10, 11, 12]
    assert h == [0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 8, 9, 9, 10, 11, 12]
    assert w == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 9, 8, 9, 10, 11, 12] and sample.next_position == 13
    sample = Processor(tokenizer, CONFIG).encode([user(video("wide.mp4", end=1))], folder)        # one patch of 2×4
    assert sample.positions[:, 3:12].tolist() == [[3, 3, 3, 3, 3, 3, 3, 3, 7], [3, 3, 3, 3, 4, 4, 4, 4, 7],
                                                  [3, 4, 5, 6, 3, 4, 5, 6, 7]]


def test_continuing_a_context_equals_encoding_it_at_once(tokenizer, folder):
    processor = Processor(tokenizer, CONFIG)
    whole, offset, parts = processor.encode(TOOL_TURNS, folder), 0, []
    for message in TOOL_TURNS:
        parts.append(processor.encode([message], folder, offset=offset))
        offset = parts[-1].next_position
    for name, dim in (("ids", 0), ("positions", 1), ("patches", 0), ("grids", 0), ("answer", 0)):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts], dim), getattr(whole, name)), name
    assert offset == whole.next_position and sum(p.frames for p in parts) == whole.frames


def test_placeholders_in_a_text_are_refused(tokenizer):
    with pytest.raises(UserError, match="video_pad"):
        Processor(tokenizer, CONFIG).encode([user("What is <|video_pad|>?")])


@pytest.mark.parametrize("name, limits, tokens", [
    ("square.mp4", [1, 4], 4), ("square.mp4", [1, 3], 1), ("square.mp4", [5, 16], 9), ("wide.mp4", [1, 8], 8),
    ("wide.mp4", [9, 99], 15)])
def test_frame_tokens_limit_each_patch(tokenizer, folder, name, limits, tokens):
    """64×64 pixels are 4 tokens, 64×128 are 8; sides are rounded down to fit and up to reach (so 9 become 15)."""
    item = video(name, end=3, fps=2, frame_tokens=limits)
    processor = Processor(tokenizer, CONFIG)
    sample = processor.encode([user(item)], folder)
    assert processor.encode([user({**item, "frame_tokens": [1, 1]})], folder).grids.max() == 2       # not cached
    assert set((sample.grids.prod(1) // 4).tolist()) == {tokens}
    small = Processor(tokenizer, Config(**{**CONFIG.__dict__, "max_volume": 2048})).encode([user(item)], folder)
    assert torch.equal(small.grids, sample.grids)                              # whatever the limit of the whole video


def test_a_setting_that_cannot_be_applied_is_named(tokenizer, folder):
    for item, named in ((video("ramp.mp4", max_pixels=9), "ramp.mp4: cannot apply 'max_pixels' to the video"),
                        (video("ramp.mp4", frame_tokens=[0, 4]), "ramp.mp4: 'frame_tokens' of the video is"),
                        ({"type": "image", "image": "picture.png", "frame_tokens": [1, 4]}, "to the image")):
        with pytest.raises(UserError, match=named):
            Processor(tokenizer, CONFIG).encode([user(item)], folder)


def test_the_pixel_cache_keeps_within_its_size(tokenizer, folder):
    processor = Processor(tokenizer, CONFIG, cache_bytes=3 * 4 * 1536)
    first = processor.encode([user(video("ramp.mp4", end=2))], folder)
    for start in (2, 4, 6):
        processor.encode([user(video("ramp.mp4", start=start, end=start + 2))], folder)
        assert processor.cached == sum(v[0].numel() for v in processor.cache.values()) <= 3 * 4 * 1536
    assert torch.equal(processor.encode([user(video("ramp.mp4", end=2))], folder).patches, first.patches)


# ------------------------------------------------------------------------------------------------------------ data rows

GOOD = {"id": "a", "task": "mcq", "kind": "colour", "options": ["red", "blue"], "answer": "B",
        "messages": [user(video("v.mp4", start=1, end=2, fps=1, max_frames=8, pairs=True), "q"),
                     {"role": "assistant", "content": "blue (B)"}]}
LAST = GOOD["messages"][-1]


def test_load_rows_reads_what_is_right(tmp_path):
    rows = [GOOD, {**GOOD, "id": "line\u2028separator"}, {**GOOD, "task": "grounding", "answer": [0, 2.5]},
            {**GOOD, "answer": ""}]                                            # no option is right
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8")
    assert load_rows(path) == rows


@pytest.mark.parametrize("row, named", [
    ([1], "must be an object"), ({**GOOD, "id": 3}, "'id'"), ({**GOOD, "task": "quiz"}, "'task'"),
    ({**GOOD, "messages": "hi"}, "'messages'"), ({**GOOD, "groups": ["a"]}, "'groups'"),
    ({**GOOD, "messages": []}, "'messages'"), ({**GOOD, "messages": GOOD["messages"][:1]}, "assistant's answer"),
    ({**GOOD, "messages": [{"role": "bot", "content": "x"}, LAST]}, r"messages\[0\].*role"),
    ({**GOOD, "messages": [{"role": "user"}, LAST]}, r"messages\[0\]"),
    ({**GOOD, "messages": [user({"type": "sound", "sound": "x"}), LAST]}, r"messages\[0\]"),
    ({**GOOD, "messages": [user({"type": "video"}), LAST]}, r"messages\[0\]"),
    ({**GOOD, "messages": [user(video("v.mp4", start="1")), LAST]}, r"messages\[0\].*'start'.*'1'"),
    ({**GOOD, "messages": [user(video("v.mp4", fps=0)), LAST]}, "'fps'"),
    ({**GOOD, "messages": [user(video("v.mp4", max_frames=2.5)), LAST]}, "'max_frames'"),
    ({**GOOD, "messages": [user(video("v.mp4", frame_tokens=[9, 4])), LAST]}, "'frame_tokens'"),
    ({**GOOD, "messages": [user(video("v.mp4", frame_tokens=256)), LAST]}, "'frame_tokens'"),
    ({**GOOD, "messages": [user(video("v.mp4", total_pixels=9)), LAST]}, r"messages\[0\].*cannot apply 'total_pixels'"),
    ({**GOOD, "messages": [user({"type": "image", "image": "a.png", "fps": 1}), LAST]}, "cannot apply 'fps'"),
    ({**GOOD, "messages": [GOOD["messages"][0], {"role": "assistant", "content": []}]}, r"messages\[1\].*string"),
    ({**GOOD, "options": ["red"]}, "'options'"), ({**GOOD, "options": [1, 2]}, "'options'"),
    ({**GOOD, "answer": "C"}, "'answer'.*'C'"),
    ({**GOOD, "answer": "blue"}, "'answer'"), ({**GOOD, "answer": None}, "'answer'"),
    ({**GOOD, "task": "grounding"}, "'answer'"), ({**GOOD, "task": "grounding", "answer": [3, 2]}, "'answer'"),
    ({**GOOD, "task": "grounding", "answer": [1, float("inf")]}, "'answer'")])
def test_a_broken_row_is_named_by_line_and_field(row, named, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"d\.jsonl:3: .*{named}"):
        load_rows(path)


def test_a_fork_adds_a_task_by_one_entry(tmp_path, monkeypatch):
    def counting_rules(row):
        yield isinstance(row.get("answer"), int), "field 'answer' must be a number"
    row, path = {**GOOD, "task": "counting"}, tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "answer": 3}))
    with pytest.raises(UserError, match="'task' is 'counting': use one of text, caption, mcq, grounding, mcr$"):
        load_rows(path)
    monkeypatch.setitem(iv3.TASK_RULES, "counting", counting_rules)
    with pytest.raises(UserError, match=r"d\.jsonl:1: field 'answer' must be a number"):
        load_rows(path)
    path.write_text(json.dumps({**row, "answer": 3}))
    assert load_rows(path)[0]["answer"] == 3


def test_what_a_row_shows():
    """Its media in reading order, its file, its question; videos changed in a copy, other items and texts not."""
    picture = {"type": "image", "image": "a.png"}
    row = {**GOOD, "messages": [{"role": "system", "content": "Look."}, user("q", picture, video("v.mp4", fps=4)),
                                LAST, {"role": "tool", "content": [video("w.mp4", max_frames=2)]}, LAST]}
    assert iv3.media_items(row) == [picture, video("v.mp4", fps=4), video("w.mp4", max_frames=2)]
    assert iv3.first_media(row) == picture and iv3.clip_of(row) == "a.png" and iv3.user_turn(row) is row["messages"][1]
    text = {**GOOD, "id": "t", "messages": [LAST]}
    assert iv3.media_items(text) == [] and iv3.first_media(text) is None and iv3.clip_of(text) == "t"
    with pytest.raises(UserError, match="row 't': has no message of a user"):
        iv3.user_turn(text)
    before = copy.deepcopy(row)
    assert iv3.framed([row]) == [row] == [before]
    once, = iv3.framed([row], fps=1, max_frames=3)
    assert iv3.media_items(once) == [picture, {**video("v.mp4", fps=4, max_frames=3), "pairs": True},
                                     video("w.mp4", fps=1, max_frames=2)]
    assert [m["content"] for m in once["messages"]][::2] == ["Look.", LAST["content"], LAST["content"]]
    assert once["messages"][1]["content"][0] == {"type": "text", "text": "q"} and row == before


def test_files_that_hold_no_rows(tmp_path):
    path = tmp_path / "d.jsonl"
    broken = ((b"\n \n", "no rows"), (b"{\"id\": ", "jsonl:1: not JSON"), (b"\xff\xfe\x00", "jsonl:1: not JSON"))
    for data, named in broken:
        path.write_bytes(data)
        with pytest.raises(UserError, match=named):
            load_rows(path)
    with pytest.raises(UserError, match="absent.jsonl: no such"):
        load_rows(tmp_path / "absent.jsonl")


# ----------------------------------------------------------------------------------------------------------- generation

@pytest.fixture(scope="module", params=[UNTIED, LATENT], ids=["gqa", "m2la"])
def model(request, tokenizer):
    return random_model(request.param, tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer, folder):
    """Ragged: text alone, a video of three patches, an image and a video."""
    contents = (["What colour is the shape?"], [video("wide.mp4"), "What colour?"],
                [{"type": "image", "image": "picture.png"}, "and", video("ramp.mp4", end=1), "?"])
    processor = Processor(tokenizer, CONFIG)
    return [processor.encode([user(*c)], folder, generation=True) for c in contents]


@torch.no_grad()
def test_hidden_states_of_wanted_tokens_alone(model, tokenizer, folder):
    """Those of all tokens at the same places; also where the last layer gets a DeepStack feature."""
    processor = Processor(tokenizer, CONFIG)
    samples = [processor.encode([user(video("wide.mp4"), "What?" * n)], folder) for n in (1, 4)]
    batch = iv3.collate(samples, 0)
    wanted = torch.rand(batch["ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    wanted[:, -1] = True
    shallow = random_model(replace(model.cfg, layers=1, deepstack=(0,), ranks=model.cfg.ranks[:1]), tokenizer)
    for each in (model, shallow):
        torch.testing.assert_close(each(**batch, wanted=wanted), each(**batch)[wanted])


def test_answer_logits_are_those_of_the_token_before(model, tokenizer, folder):
    """Of a batch with padding and of each conversation alone, by indices written out; under autocast in fp32."""
    processor = Processor(tokenizer, CONFIG)
    samples = [processor.encode([user(video("wide.mp4"), "What?"), {"role": "assistant", "content": "red " * n},
                                 user("And?"), {"role": "assistant", "content": "blue"}], folder) for n in (1, 4)]
    batch = iv3.collate(samples, 0)
    answers = torch.nn.utils.rnn.pad_sequence([s.answer for s in samples], batch_first=True)
    with torch.no_grad():
        hidden = model(**batch)
        expected = []
        for b, sample in enumerate(samples):
            at = [t for t in range(len(sample.ids)) if sample.answer[t]]
            expected.append(torch.stack([model.logits(hidden[b, t - 1]) for t in at]))
            alone = iv3.answer_logits(model, hidden[b], sample.answer)       # hidden is longer: the padding
            torch.testing.assert_close(alone, expected[-1])
        torch.testing.assert_close(iv3.answer_logits(model, hidden, answers), torch.cat(expected))
        with torch.autocast("cpu", torch.bfloat16):
            got = iv3.answer_logits(model, hidden.bfloat16(), answers)
        torch.testing.assert_close(got, iv3.answer_logits(model, hidden.bfloat16().float(), answers))
        half = copy.deepcopy(model).bfloat16()                               # weights as on a GPU
        assert iv3.answer_logits(half, hidden.bfloat16(), answers).dtype == got.dtype == torch.float32


@torch.no_grad()
def slow_greedy(model, prompt, steps):
    """Greedy decoding as written on paper: the whole sequence anew for every token. → ids, their log-probabilities"""
    ids, positions, logps = prompt.ids, prompt.positions, []
    for i in range(steps):
        logits = model.logits(model(ids[None], positions[:, None], prompt.patches, prompt.grids)[0, -1])
        logits[list(model.vision_ids)] = -torch.inf
        logps.append(float(logits.log_softmax(-1).max()))
        ids = torch.cat([ids, logits.argmax()[None]])
        positions = torch.cat([positions, torch.full((3, 1), prompt.next_position + i)], 1)
    return ids[len(prompt.ids):].tolist(), logps


def test_batched_generation_equals_one_by_one_without_a_cache(model, prompts):
    outs = generate(model, prompts, stop=-1, max_new=12)
    for out, prompt in zip(outs, prompts, strict=True):
        ids, logps = slow_greedy(model, prompt, 12)
        assert out.ids == ids
        torch.testing.assert_close(torch.tensor(out.logprobs), torch.tensor(logps), atol=1e-4, rtol=1e-4)
    assert len({tuple(out.ids) for out in outs}) == 3                        # the prompts matter


def test_neighbours_about_one_video_share_its_prefill_and_nothing_else(model, tokenizer, folder):
    """Also: the same prompt twice, the same question about other pixels, a view of another window of as many tokens."""
    def turns(name, question, start=None):
        view = [] if start is None else [{"role": "assistant", "content": "look"},
                                         {"role": "tool", "content": [video("ramp.mp4", start=start, end=start + 1)]}]
        return [user(video(name), question), *view]
    write_video(folder / "other.mp4", noise(6, 64, 128, 9), fps=2)
    processor = Processor(tokenizer, CONFIG)
    prompts = [processor.encode(turns(*t), folder, generation=True) for t in (
        ("wide.mp4", "What?"), ("wide.mp4", "What colour is the shape?"), ("wide.mp4", "What colour is the shape?"),
        ("other.mp4", "What?"), ("wide.mp4", "What?", 1), ("wide.mp4", "What?", 2), ("wide.mp4", "Which?"))]
    groups = iv3.group_prompts(prompts, model.vision_ids)
    assert [len(g) for g, _ in groups] == [3, 1, 1, 1, 1]
    for out, prompt in zip(generate(model, prompts, stop=-1, max_new=6), prompts, strict=True):
        assert out.ids == slow_greedy(model, prompt, 6)[0]


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 1, 2, 1]])              # most end early: they leave the batch
def test_a_sequence_ends_at_the_stop_token_and_the_others_go_on(model, prompts, order):
    free = [out.ids for out in generate(model, prompts, stop=-1, max_new=10)]
    stop = free[1][2]
    ended = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert len(ended[1]) <= 3 < max(map(len, ended))
    outs = generate(model, [prompts[i] for i in order], stop=stop, max_new=10)
    assert [out.ids for out in outs] == [ended[i] for i in order]


def test_samples_depend_only_on_the_generator(model, prompts):
    def sample(seed, samples=3):
        generator = torch.Generator().manual_seed(seed)
        outs = generate(model, prompts[:2], -1, 6, temperature=1.0, samples=samples, generator=generator)
        return [(o.ids, o.logprobs) for o in outs]
    first = sample(0)
    assert len(first) == 6 and sample(0) == first and sample(1) != first
    assert len({tuple(ids) for ids, _ in first}) > 3                         # samples of one prompt differ
    greedy = [o.ids for o in generate(model, prompts[:2], -1, 6, samples=2)]
    assert greedy[0] == greedy[1] == generate(model, prompts[:1], -1, 6)[0].ids and greedy[2] == greedy[3] != greedy[0]


def test_sampled_log_probabilities_are_the_models(model, prompts):
    """At temperature 0.7: log softmax(logits / 0.7) at the sampled tokens, from one forward over the whole answer."""
    out = generate(model, prompts[1:2], -1, 5, temperature=0.7, generator=torch.Generator().manual_seed(0))[0]
    prompt = prompts[1]
    ids = torch.cat([prompt.ids, torch.tensor(out.ids)])
    positions = torch.cat([prompt.positions, (prompt.next_position + torch.arange(5)).expand(3, 5)], 1)
    with torch.no_grad():
        hidden = model(ids[None], positions[:, None], prompt.patches, prompt.grids)
        logits = model.logits(hidden[0, len(prompt.ids) - 1:-1])
    logits[:, list(model.vision_ids)] = -torch.inf
    expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(out.ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(out.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20000, 3)
    token, logp = iv3.sample_token(logits, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.bincount(token) / 20000, torch.tensor([0.5, 0.3, 0.2]), atol=0.012, rtol=0)
    assert torch.allclose(logp.exp(), torch.tensor([0.5, 0.3, 0.2])[token])


def test_a_placeholder_is_never_written(tokenizer, prompts):
    """It would be read as a vision token without pixels, and overflow the cache's vision segment."""
    model = random_model(UNTIED, tokenizer)
    pad = tokenizer.token_id("<|video_pad|>")
    model.lm_head.weight.data[pad] *= 50
    outs = generate(model, prompts, -1, 8, temperature=5.0, samples=4, generator=torch.Generator().manual_seed(0))
    assert not {pad, tokenizer.token_id("<|image_pad|>")} & {i for o in outs for i in o.ids}


# ---------------------------------------------------------------------------------------------------------- checkpoints

@torch.no_grad()
def logits_of(model, prompt):
    return model.logits(model(prompt.ids[None], prompt.positions[:, None], prompt.patches, prompt.grids))


def test_save_and_load_give_the_same_logits(model, prompts, tokenizer, tmp_path, monkeypatch):
    iv3.save_model(tmp_path, model, tokenizer)
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)              # its import, of a second, would fail
    loaded, processor = iv3.load_model(tmp_path)
    assert loaded.cfg == model.cfg and processor.tokenizer.tokens == tokenizer.tokens and not loaded.training
    assert torch.equal(logits_of(loaded, prompts[2]), logits_of(model, prompts[2]))
    assert not list(tmp_path.glob("*.tmp"))


def test_half_precision_weights_are_half_as_large_and_nearly_equal(model, prompts, tokenizer, tmp_path):
    iv3.save_model(tmp_path / "full", model, tokenizer)
    iv3.save_model(tmp_path / "half", copy.deepcopy(model).half(), tokenizer)
    sizes = [(tmp_path / kind / "weights.pt").stat().st_size for kind in ("half", "full")]
    assert sizes[0] < 0.65 * sizes[1]
    loaded, _ = iv3.load_model(tmp_path / "half")
    assert loaded.language_model.norm.weight.dtype == torch.float32
    torch.testing.assert_close(logits_of(loaded, prompts[1]), logits_of(model, prompts[1]), atol=0.05, rtol=0.02)


def test_damaged_checkpoints_are_named(tokenizer, tmp_path):
    model = random_model(CONFIG, tokenizer)
    iv3.save_model(tmp_path, model, tokenizer)
    state, path = model.state_dict(), tmp_path / "weights.pt"
    name = "language_model.layers.1.self_attn.k_proj.weight"
    for change, named in (({**state, name: torch.zeros(8, 48)}, rf"{name} is \(8, 48\), the config needs \(32, 48\)"),
                          ({k: v for k, v in state.items() if k != name}, f"{name} is absent"),
                          ({**state, "extra": torch.zeros(3)}, r"extra is \(3,\), the config needs absent")):
        torch.save(change, path)
        with pytest.raises(UserError, match=named):
            iv3.load_model(tmp_path)
    whole = path.read_bytes()
    for data in (whole[:len(whole) // 2], b"", b"not weights"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="weights.pt: cannot be read"):
            iv3.load_model(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="has no weights, neither weights.pt nor"):
        iv3.load_model(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        iv3.load_model(tmp_path)
    with pytest.raises(UserError, match="no model here"):
        iv3.load_model(tmp_path / "absent")


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def killed(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        iv3.write_atomic(path, killed)
    assert path.read_text() == "old"


def test_find_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="runs/: no model found"):
        iv3.find_model()
    for number, (run, stage) in enumerate((("old", "opd"), ("new", "base"), ("new", "sft_short"), ("new", "rl"))):
        directory = tmp_path / "runs" / run / stage
        directory.mkdir(parents=True)
        if stage != "rl":                                                    # rl is still being trained
            (directory / "config.json").write_text("{}")
        os.utime(tmp_path / "runs" / run, (number, number))
    assert iv3.find_model().parts[-2:] == ("new", "sft_short")
    assert iv3.find_model("runs/old").parts[-2:] == ("old", "opd")
    assert iv3.find_model("runs/new/base").parts[-2:] == ("new", "base")
    with pytest.raises(UserError, match="runs/other"):
        iv3.find_model("runs/other")
    monkeypatch.setattr(iv3, "STAGE_ORDER", [*iv3.STAGE_ORDER, "dpo"])     # a fork's stage comes after the others
    (tmp_path / "runs/new/dpo").mkdir()
    (tmp_path / "runs/new/dpo/config.json").write_text("{}")
    assert iv3.find_model("runs/new").parts[-1] == "dpo"
