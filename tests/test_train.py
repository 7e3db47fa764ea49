"""The trainer: packing changes no loss, losses equal their formulas, a killed run goes on bit for bit."""
import importlib.util
import json
import math
import sys
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import iv3
import train
from iv3 import Config, Encoded, Processor, Tokenizer, UserError
from m2la import Blocks
from train import Data, Drawn, Group, Job, Recipe, Stage, Trainer

SCRIPT = Path(__file__).parents[1] / "data" / "toy" / "prepare.py"


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy world at its smallest."""
    spec = importlib.util.spec_from_file_location("toy_prepare_for_train", SCRIPT)
    prepare = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    out = tmp_path_factory.mktemp("toy_train")
    prepare.prepare(out, scale=0.02)
    return out


def random_model(cfg, tokenizer, seed=0):
    model = iv3.build_model(cfg, tokenizer)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="module")
def tokenizer(toy):
    return Tokenizer(json.loads((toy / "vocab.json").read_text()))


@pytest.fixture(scope="module")
def tiny(tokenizer):
    """The tiny preset, GQA."""
    return Config.preset("tiny", vocab=len(tokenizer))


@pytest.fixture(scope="module", params=["gqa", "m2la"])
def model(request, tiny, tokenizer):
    latent = dict(attn="m2la", rope_width=32, ranks=((40, 32),) * tiny.layers) if request.param == "m2la" else {}
    return random_model(replace(tiny, **latent), tokenizer).eval()


@pytest.fixture(scope="module")
def processor(tiny, tokenizer):
    return Processor(tokenizer, tiny)


def data_of(toy, processor, mix, seed=0, stage="test"):
    return Data(toy, mix if isinstance(mix, dict) else {mix: 1.0}, processor, seed, stage)


# ----------------------------------------------------------------------------------------- packing: a tree is no change

def views(rows):
    """Rollouts whose tool turns show videos of their own."""
    return [r for r in rows if any(m["role"] == "tool" and not isinstance(m["content"], str) for m in r["messages"])]


def groups_of(toy, processor, kind):
    """Two packs' worth of rows: [(rows, root), …], the packs of different length."""
    name, pick = {"text": ("cpt_text.jsonl", list), "image": ("cpt_image.jsonl", list),
                  "video": ("sft_short.jsonl", list), "rollouts": ("sft_agent.jsonl", views)}[kind]
    source, = data_of(toy, processor, name).sources
    picked = [(pick(g)[:n], source.root) for g, n in zip([g for g in source.clips if pick(g)], (5, 3, 4))]
    if kind == "text":
        picked = [(source.clips[0][:3], source.root), (source.clips[0][3:5], source.root)]
    assert all(rows for rows, _ in picked) and len(picked) > 1
    return picked


@torch.no_grad()
def alone(model, sample):
    """Logits that predict the answer tokens of one conversation, and those tokens; nothing packed."""
    hidden = model(sample.ids[None], sample.positions[:, None], sample.patches, sample.grids)
    at = sample.answer.nonzero()[:, 0]
    return model.logits(hidden[0, at - 1]), sample.ids[at]


@pytest.mark.parametrize("block", [5, 256])
@pytest.mark.parametrize("kind", ["text", "image", "video", "rollouts"])
@torch.no_grad()
def test_packed_loss_equals_that_of_separate_samples(kind, block, model, toy, processor, monkeypatch):
    """Also with attention blocks that begin in the middle of branches."""
    monkeypatch.setattr(train, "BLOCK", block)
    data = data_of(toy, processor, "sft_short.jsonl")
    packs, separate = [], []
    for rows, root in groups_of(toy, processor, kind):
        samples = data.encode(rows, root)
        packs.append(data.pack(rows, samples, root))
        separate += [alone(model, s) for s in samples]
    batch = train.collate_packs(packs)
    logits, token, sample = train.answer_forward(model, batch)
    assert torch.equal(torch.bincount(sample), torch.tensor([len(ids) for _, ids in separate]))
    for i, (expected, ids) in enumerate(separate):
        assert torch.equal(token[sample == i], ids)
        torch.testing.assert_close(logits[sample == i], expected, atol=1e-4, rtol=1e-4)
    expected = F.cross_entropy(torch.cat([x for x, _ in separate]), torch.cat([ids for _, ids in separate]))
    torch.testing.assert_close(F.cross_entropy(logits, token), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [7, 256])
def test_answers_to_one_question_share_it(block, model, toy, processor, monkeypatch):
    """Three answers to each of two questions about a video, in two such packs: logits as of separate samples."""
    monkeypatch.setattr(train, "BLOCK", block)
    data, packs, separate = data_of(toy, processor, "sft_short.jsonl"), [], []
    for k, (rows, root) in enumerate(groups_of(toy, processor, "video")[:2]):
        prompts = data.encode([{**r, "messages": r["messages"][:-1]} for r in rows[:2]], root, generation=True)
        samples = [train.complete(p, [40 + k + i, 50, 60][:1 + i]) for p in prompts for i in range(3)]
        packs.append(data.pack(rows[:2], samples, root, group=3))
        assert packs[-1].count == 6 and len(packs[-1].ids) < len(data.pack(rows[:2], samples, root).ids)
        separate += [alone(model, s) for s in samples]
    logits, token, sample = train.answer_forward(model, train.collate_packs(packs))
    for i, (expected, ids) in enumerate(separate):
        assert torch.equal(token[sample == i], ids)
        torch.testing.assert_close(logits[sample == i], expected, atol=1e-4, rtol=1e-4)


def test_a_video_shared_by_a_pack_is_held_once(toy, processor):
    (rows, root), *_ = groups_of(toy, processor, "video")
    data = data_of(toy, processor, "sft_short.jsonl")
    samples = data.encode(rows, root)
    pack = data.pack(rows, samples, root)
    assert len(rows) == 5 and torch.equal(pack.patches, samples[0].patches)
    assert len(pack.ids) < sum(len(s.ids) for s in samples) / 2


@torch.no_grad()
def test_branches_do_not_see_each_other(model, toy, processor):
    """Other tokens and other pixels in the second conversation leave the first and the third as they are."""
    (rows, root), = groups_of(toy, processor, "rollouts")[:1]
    data = data_of(toy, processor, "sft_long.jsonl")
    rows = (rows * 3)[:3]
    pack = data.pack(rows, data.encode(rows, root), root)
    own = torch.isin(pack.ids, torch.tensor(model.vision_ids)) & (pack.branch == 2)
    first = int((torch.isin(pack.ids, torch.tensor(model.vision_ids)) & (pack.branch < 2)).sum()) * 4     # its patches
    changed = replace(pack, ids=pack.ids.clone(), patches=pack.patches.clone())
    changed.ids[(pack.branch == 2) & pack.answer] = 70
    changed.patches[first:first + 4 * int(own.sum())] += 77
    before, after = (train.answer_forward(model, train.collate_packs([p])) for p in (pack, changed))
    for i in range(3):
        same = torch.allclose(before[0][before[2] == i], after[0][after[2] == i], atol=1e-5)
        assert same == (i != 1), f"conversation {i}"


@torch.no_grad()
def test_conversations_that_differ_before_their_video_can_share_a_pack(model, toy, processor):
    """A system prompt before one of them: nothing is shared then, and the loss is still that of separate samples."""
    (rows, root), *_ = groups_of(toy, processor, "video")
    rows = [rows[0], {**rows[1], "messages": [{"role": "system", "content": "You look."}, *rows[1]["messages"]]}]
    data = data_of(toy, processor, "sft_short.jsonl")
    samples = data.encode(rows, root)
    logits, token, sample = train.answer_forward(model, train.collate_packs([data.pack(rows, samples, root)]))
    for i, s in enumerate(samples):
        torch.testing.assert_close(logits[sample == i], alone(model, s)[0], atol=1e-4, rtol=1e-4)


def encoded(length, prefix=4, seed=0):
    """A text conversation of `length` tokens, of which the first `prefix` are the same in all."""
    own = torch.randint(30, 200, (length - prefix,), generator=torch.Generator().manual_seed(seed))
    patches, grids = torch.zeros(0, 1536, dtype=torch.uint8), torch.zeros(0, 2, dtype=torch.long)
    return Encoded(torch.cat([torch.arange(20, 20 + prefix), own]), torch.arange(length).expand(3, -1), patches, grids,
                   torch.arange(length) >= length - 2)


def test_micro_batches_hold_every_pack_once_within_the_limit():
    packs = [train.make_pack([encoded(n, seed=n)], 0, (1, 2)) for n in (50, 9, 30, 31, 12, 200, 33)]
    batches = train.micro_batches(packs, 100)
    assert all(b["ids"].numel() <= 100 or len(b["ids"]) == 1 for b in batches) and len(batches) < 7
    lengths = sorted(int(n) for b in batches for n in b["valid"].sum(1))
    assert lengths == [9, 12, 30, 31, 33, 50, 200]
    for b in batches:
        assert b["sample"].max(1).values.tolist() == list(range(len(b["ids"])))
        assert not b["answer"][~b["valid"]].any() and (b["sample"][~b["valid"]] == -1).all()


def test_the_answer_after_a_sampled_continuation_is_marked():
    prompt = encoded(6)
    done = train.complete(replace(prompt, answer=torch.zeros(6, dtype=torch.bool)), [7, 8, 9])
    assert done.ids.tolist() == prompt.ids.tolist() + [7, 8, 9] and done.answer.tolist() == [False] * 6 + [True] * 3
    assert done.positions[:, 6:].tolist() == [[6, 7, 8]] * 3


# ------------------------------------------------------------------------------------------------------ losses by hand

def test_square_root_weighting_by_hand():
    sample = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    assert train.sft_weights(sample, "mean").tolist() == [1] * 7
    torch.testing.assert_close(train.sft_weights(sample, "square"), torch.tensor([0.5] * 4 + [1] + [0.5 ** 0.5] * 2))


def test_sequence_mean_and_advantages_by_hand():
    mean = train.sequence_mean(torch.tensor([1.0, 3, 10]), torch.tensor([0, 0, 2]), 3)
    assert mean.tolist() == [2, 0, 10]
    got = train.advantages(torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5, 1, 0, 0, 0]), 4)
    s = math.sqrt(3) / 4 + 1e-4                                              # std of one 1 and three 0
    a = 0.5 / 0.5001
    expected = [a, -a, -a, a, 0, 0, 0, 0, 0.75 / s, -0.25 / s, -0.25 / s, -0.25 / s]
    torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("shift, advantage, value, cut", [
    (0.1, 1.0, -1.2, True),                  # s = e^.2 = 1.221 is above 1.2: clipped, no gradient
    (0.1, -1.0, None, False),                # the same ratio of a bad answer is not: it must come down
    (-0.3, -1.0, 0.9, True),                 # s = e^-.6 = 0.549 is below 0.9: avoided enough
    (-0.3, 1.0, None, False)])
def test_gspo_clips_either_side(shift, advantage, value, cut):
    """One answer of two tokens, whose log-ratios average 2·shift. Range [1 − 0.1, 1 + 0.2]; no KL term."""
    old = torch.tensor([-1.0, -2.0])
    logp = (old + torch.tensor([3 * shift, shift])).requires_grad_()
    loss, _, share = train.gspo_loss(logp, old, old, torch.tensor([0, 0]), torch.tensor([advantage]), (0.1, 0.2), 0.0)
    ratio = math.exp(2 * shift)
    assert loss.item() == pytest.approx(-ratio * advantage if value is None else value, rel=1e-5)
    assert share.item() == cut
    loss.backward()
    slope = 0 if cut else -ratio * advantage / 2                             # ds/dlogp_t = s / |y|
    assert logp.grad.tolist() == pytest.approx([slope] * 2, rel=1e-5)


def test_gspo_by_hand():
    """Two answers, of 2 tokens and of 1, inside the clip range, with the KL term."""
    logp, old = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.1, -1.95, -0.5])
    ref = torch.tensor([-1.0, -1.5, -0.7])
    sample, advantage = torch.tensor([0, 0, 1]), torch.tensor([2.0, -1.0])
    loss, k3, share = train.gspo_loss(logp, old, ref, sample, advantage, (0.2, 0.2), 0.03)
    s = math.exp((0.1 - 0.05) / 2)
    d = [0, math.exp(0.5) - 0.5 - 1, math.exp(-0.2) + 0.2 - 1]
    expected_k3 = ((d[0] + d[1]) / 2 + d[2]) / 2
    assert k3.item() == pytest.approx(expected_k3, rel=1e-5) and share.item() == 0
    assert loss.item() == pytest.approx(-(2 * s - 1) / 2 + 0.03 * expected_k3, rel=1e-5)


def test_the_kl_estimate_is_never_negative_and_zero_at_equality():
    g = torch.Generator().manual_seed(0)
    logp, ref = -3 * torch.rand(2, 500, generator=g)
    one = torch.zeros(1, dtype=torch.long), torch.ones(1), (0.1, 0.1), 1.0
    for p, q in zip(logp.split(1), ref.split(1)):
        assert train.gspo_loss(p, p, q, *one)[1] > 0 and train.gspo_loss(p, p, p, *one)[1] == 0


def test_reverse_kl_is_torchs():
    student, teacher = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0)) * 3
    pi, pi_t = (torch.distributions.Categorical(logits=x) for x in (student, teacher))
    reverse, forward = torch.distributions.kl_divergence(pi, pi_t), torch.distributions.kl_divergence(pi_t, pi)
    torch.testing.assert_close(train.reverse_kl(student, teacher), reverse, atol=1e-5, rtol=1e-5)
    assert train.reverse_kl(student, student + 5).abs().max() < 1e-6         # logits are known up to a constant
    assert (reverse - forward).abs().max() > 0.1                             # the test can tell them apart


def test_the_sampled_form_has_the_full_forms_gradient_on_average():
    """By enumeration: the gradients of all tokens that π may sample, each weighted by its probability."""
    logits, teacher = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0)).mul(2)
    student = logits.clone().requires_grad_()
    full, = torch.autograd.grad(train.reverse_kl(student, teacher).sum(), student)
    values = [train.sampled_kl(student, teacher, torch.tensor([v])).sum() for v in range(6)]
    grads = torch.stack([torch.autograd.grad(value, student)[0] for value in values])
    share = logits.softmax(-1)
    torch.testing.assert_close((share.T[:, :, None] * grads).sum(0), full, atol=1e-6, rtol=1e-5)
    mean = (share[0] * torch.stack(values).detach()).sum()
    torch.testing.assert_close(mean, train.reverse_kl(logits, teacher)[0], atol=1e-6, rtol=1e-5)
    assert full.abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------- data

MIX = {"sft_short.jsonl": 0.7, "sft_long.jsonl": 0.3}


def draw(data, step, packs=6, branches=4):
    return [([r["id"] for r in rows], str(root)) for rows, root in data.step(step, packs, branches)]


def test_a_step_is_a_pure_function_of_seed_stage_and_number(toy, processor):
    one, other = data_of(toy, processor, MIX), data_of(toy, processor, MIX)
    forward, backward = [draw(one, n) for n in range(8)], [draw(other, n) for n in reversed(range(8))]
    assert forward == backward[::-1] and len({str(x) for x in forward}) == 8
    for other in (dict(seed=1), dict(stage="other")):
        assert draw(data_of(toy, processor, MIX, **other), 0) != forward[0]


def test_packs_are_rows_about_one_video_in_the_shares_of_the_mix(toy, processor):
    data, shares = data_of(toy, processor, MIX), []
    for step in range(40):
        for rows, _ in data.step(step, 6, 4):
            assert 1 <= len(rows) <= 4 and len({json.dumps(train.first_media(r)) for r in rows}) == 1
            assert len({r["id"] for r in rows}) == len(rows)
            shares.append(rows[0]["id"].startswith("sft_short"))
    assert np.mean(shares) == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_step_evenly(processes, monkeypatch):
    """Together they have every pack once; the largest load is no more than one pack above the smallest."""
    packs, parts = [Drawn([{"messages": "x" * n}], ".") for n in (900, 10, 5) * 4], []
    assert train.own_part(packs) == packs
    monkeypatch.setattr(train, "world", lambda: processes)
    for number in range(processes):
        monkeypatch.setattr(train, "rank", lambda number=number: number)
        parts.append(train.own_part(packs))
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, packs))
    loads = [sum(len(row["messages"]) for rows, _ in part for row in rows) for part in parts]
    assert max(loads) - min(loads) <= 900 and (processes == 3 or max(loads) - min(loads) < 30)     # not by strides


def test_max_frames_caps_each_video_of_the_stage(toy, processor):
    few, fast, whole = (train.Data(toy, MIX, processor, 0, "sft_long", 1, *how) for how in ((None, 8), (4.0,), ()))
    (row, *_), root = max(few.step(0, 6, 1), key=lambda drawn: drawn[0][0]["duration"])
    rows = [row, *(next(r for source in data.sources for rows in source.clips for r in rows if r["id"] == row["id"])
                   for data in (fast, whole))]
    seconds = int(row["duration"])
    assert [processor.encode(r["messages"], root).frames for r in rows] == [8, 4 * seconds, 2 * seconds]


def texts_and_pictures(toy, folder, order, texts=20, pictures=20):
    """d.jsonl: rows with and without media, in the order of a key (number of the row) -> place."""
    lines = [(toy / f"cpt_{kind}.jsonl").read_text().splitlines() for kind in ("text", "image")]
    rows = [json.loads(some[i % len(some)]) for some, count in zip(lines, (texts, pictures)) for i in range(count)]
    for row in rows[texts:]:
        media = train.first_media(row)
        media["image"] = str(toy / media["image"])
    lines = [json.dumps({**rows[i], "id": str(i)}) + "\n" for i in sorted(range(len(rows)), key=order)]
    (folder / "d.jsonl").write_text("".join(lines))


def test_rows_without_media_count_by_eights_wherever_they_stand(toy, processor, tmp_path):
    sizes = []
    for order in (lambda i: i, lambda i: -i, lambda i: i % 20):
        texts_and_pictures(toy, tmp_path, order)
        data = data_of(tmp_path, processor, "d.jsonl")
        source, = data.sources
        sizes.append(sorted(len(rows) for rows in source.clips if not train.first_media(rows[0])))
    assert sizes == [[4, 8, 8]] * 3
    drawn = [rows for n in range(40) for rows, _ in data.step(n, 4, 8)]
    assert {bool(train.first_media(row)) for rows in drawn for row in rows} == {True, False}
    seen = [{row["id"] for row in rows} for rows in drawn if not train.first_media(rows[0])]
    assert {len(ids) for ids in seen} == {8} and len(set().union(*seen)) == 20     # any of them together
    texts_and_pictures(toy, tmp_path, lambda i: i, texts=60, pictures=0)
    data = data_of(tmp_path, processor, "d.jsonl")
    assert 16 <= sum(len(rows) for rows, _ in train.pool_of(data, 16, 0)) < 24
    (held, _), = data.hold_out()
    assert len(held) in (4, 8) and len(held) + sum(map(len, data.sources[0].clips)) == 60


def test_a_held_out_video_is_not_trained_on_in_parts_either(toy, processor, tmp_path):
    """Each clip is asked about whole and from its third second on."""
    rows = [json.loads(line) for line in (toy / "cpt_video.jsonl").open()][:30]
    cut = json.loads(json.dumps(rows))
    for row in cut:
        row["id"] += "-cut"
        train.first_media(row)["start"] = 3.0
    lines = [json.dumps(row) + "\n" for row in rows + cut]
    (tmp_path / "d.jsonl").write_text("".join(lines))
    data = data_of(tmp_path, processor, "d.jsonl")
    (held, _), = data.hold_out(0.3)
    kept = [row for rows in data.sources[0].clips for row in rows]
    clips = [{train.first_media(row)["video"] for row in some} for some in (held, kept)]
    assert clips[0] and clips[1] and not clips[0] & clips[1] and len(held) + len(kept) == 60


def test_a_file_of_the_current_folder_is_not_taken_for_the_recipes(toy, processor, tmp_path, monkeypatch):
    (tmp_path / "rl.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert data_of(toy, processor, "rl.jsonl").sources


def test_without_leaves_files_out_of_the_mix():
    args = SimpleNamespace(**dict.fromkeys(train.OVERRIDES), data=None, quick=False, without=["sft_long.jsonl"])
    left = train.recipe_of("sft_long", args, 10 ** 6).mix
    args.lr = 1e-4
    slow, whole = train.recipe_of("sft_long", args, 10 ** 6), train.STAGES["sft_long"].recipe
    assert slow.lr == 1e-4 and slow.lr_min / slow.lr == pytest.approx(whole.lr_min / whole.lr)
    large = train.recipe_of("sft_long", args, 2 * 10 ** 9)
    assert (large.tokens, large.fps, large.max_frames) == (train.SMALL["tokens"], 4.0, 2048)
    assert left == {name: share for name, share in whole.mix.items() if name != "sft_long.jsonl"}
    with pytest.raises(UserError, match="--without sft_long.jsonl: cpt has cpt_text.jsonl, cpt_image.jsonl"):
        train.recipe_of("cpt", args, 10 ** 6)


def test_unreadable_videos_are_skipped_and_counted(tiny, tokenizer, toy, processor, tmp_path):
    rows = [json.loads(line) for line in (toy / "sft_short.jsonl").open()]
    rows = [r for r in rows if r["id"].endswith(("-00", "-01"))][:24]        # of twelve videos
    for row in rows:                                                         # absolute paths: the file lives elsewhere
        train.first_media(row)["video"] = str(toy / train.first_media(row)["video"])
    bad = json.loads(json.dumps(rows[0]))
    train.first_media(bad)["video"] = "broken.mp4"
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, *[bad] * 3]))
    data = data_of(tmp_path, processor, "d.jsonl")
    recipe = Recipe({}, steps=1, lr=1.0, packs=4, branches=2)
    drawn = sum(train.first_media(r[0])["video"] == "broken.mp4" for n in range(6) for r, _ in data.step(n, 4, 2))
    sizes = [sum(len(b["ids"]) for b in data.batches(n, recipe)) for n in range(6)]
    assert 0 < drawn < 24 and sum(sizes) == 24 - drawn
    assert sum(data.skipped.values()) == drawn and "broken.mp4" in next(iter(data.skipped))
    trainer = trainer_of(tmp_path, tiny, tokenizer, steps=6, branches=2, args=arguments(tmp_path, workers=2))
    (other := data_of(tmp_path, processor, "d.jsonl")).skipped["before"] = 1
    train.train_supervised(trainer, other)                                   # worker processes count for this one
    assert other.skipped == data.skipped + type(data.skipped)(before=1)
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps(bad) + "\n")
    with pytest.raises(UserError, match="no readable video in step 0: .*broken.mp4"):
        train.train_supervised(trainer_of(tmp_path / "2", tiny, tokenizer, args=arguments(tmp_path / "2", workers=1)),
                               data_of(tmp_path, processor, "only.jsonl"))
    with pytest.raises(UserError, match="broken.mp4"):
        data_of(tmp_path, processor, "only.jsonl").batches(0, recipe)


# ------------------------------------------------------------------------------------------------------------- the loop

def arguments(out, **changes):
    flags = dict(out=out, seed=0, device="cpu", freeze=[], save_every=-1, workers=0, eval_every=0, checkpointing=False,
                 fsdp=False, teacher=None, teacher_device=None, data_dir=out, attn="gqa",
                 **dict.fromkeys(train.OVERRIDES))
    return SimpleNamespace(**{**flags, **changes})


def trainer_of(out, tiny, tokenizer, stage="sft_short", args=None, **changes):
    small = dict(steps=6, lr=1e-3, packs=4, branches=1, group=4, updates=2, pool=17)
    recipe = Recipe({}, **{**small, **changes})
    model = random_model(tiny, tokenizer)
    return Trainer(model, Processor(tokenizer, tiny), recipe, stage, args or arguments(out))


@torch.no_grad()
def mean_loss(trainer, batches):
    return float(sum(loss_of(batch) * share for batch, loss_of, share in train.supervised_jobs(trainer, batches)))


@pytest.mark.parametrize("reduction", ["mean", "square"])
def test_accumulated_gradients_are_those_of_one_batch(reduction, tiny, tokenizer, processor, toy, tmp_path):
    trainer = trainer_of(tmp_path, tiny, tokenizer, reduction=reduction)
    data = data_of(toy, processor, MIX)
    drawn = [(rows, data.encode(rows, root), root) for rows, root in data.step(0, 4, 3)]
    packs = [data.pack(*d) for d in drawn]
    results = []
    for limit in (10 ** 6, 1):
        jobs = train.supervised_jobs(trainer, train.micro_batches(packs, limit))
        loss = sum(loss_of(batch) * weight for batch, loss_of, weight in jobs)
        loss.backward()
        results.append((len(jobs), loss.item(), torch.cat([p.grad.flatten() for p in trainer.parameters])))
        trainer.model.zero_grad()
    assert [n for n, *_ in results] == [1, 4] and results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2], atol=1e-5, rtol=1e-3)


def test_training_lowers_the_loss_and_leaves_frozen_parts(tiny, tokenizer, processor, toy, tmp_path):
    trainer = trainer_of(tmp_path, tiny, tokenizer, freeze=("vision",), warmup=0.0)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    batches = data_of(toy, processor, "sft_short.jsonl").batches(0, trainer.recipe)
    losses = [trainer.update(train.supervised_jobs(trainer, batches)) for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    frozen = {k for k in before if k.startswith(("visual.blocks", "visual.patch_embed", "visual.pos_embed"))}
    assert not moved & frozen and {"visual.merger.linear_fc1.weight", "language_model.embed_tokens.weight"} <= moved


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_steps_by_a_nearly_orthogonal_matrix_and_agrees_with_torchs(shape):
    torch.manual_seed(0)
    start, grads = torch.randn(shape), torch.randn(3, *shape)
    p, q = (torch.nn.Parameter(start.clone()) for _ in range(2))
    own, theirs = train.Muon([p], 0.1, 0.0), getattr(torch.optim, "Muon", None)
    theirs = theirs and theirs([q], 0.1, weight_decay=0.0)
    for grad in grads:
        before, p.grad, q.grad = p.detach().clone(), grad, grad
        own.step()
        step = (before - p.detach()) / 0.1 / max(1, shape[0] / shape[1]) ** 0.5
        sizes = torch.linalg.svdvals(step)
        assert sizes.min() > 0.5 and sizes.max() < 1.3                       # that is what its polynomial promises
        if theirs:
            theirs.step()
            assert (p - q).norm() < 0.05 * (p - before).norm() * len(grads)  # torch computes in bf16


def test_bf16_leaves_log_probs_weights_and_optimizer_in_fp32(tiny, tokenizer, processor, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    trainer = trainer_of(tmp_path, tiny, tokenizer, muon=0.01)
    batch, = data_of(toy, processor, "cpt_text.jsonl").batches(0, replace(trainer.recipe, packs=1))
    with torch.no_grad(), train.autocast("cpu"):
        hidden = trainer.model(*(batch[k] for k in ("ids", "positions", "patches", "grids")), mask=batch["mask"])
        logp, _ = train.token_logp(trainer.model, batch)
        logits, token, _ = train.answer_forward(trainer.model, batch)
        kl = train.reverse_kl(logits, logits.flip(-1))
        assert trainer.model.logits(hidden).dtype == torch.bfloat16          # autocast is on
    table = trainer.model.language_model.embed_tokens.weight.double()
    exact = (hidden[:, :-1][batch["answer"][:, 1:]].double() @ table.T).log_softmax(-1)
    torch.testing.assert_close(logp.double(), exact.gather(1, token[:, None])[:, 0], atol=1e-5, rtol=0)
    expected = (exact.exp() * (exact - exact.flip(-1))).sum(-1)
    torch.testing.assert_close(kl.double(), expected, atol=1e-5, rtol=1e-5)
    assert math.isfinite(trainer.update(train.supervised_jobs(trainer, [batch])))
    state = [v for o in trainer.optimizers for held in o.state.values() for v in held.values()]
    assert len(state) > 10 and {t.dtype for t in [*trainer.parameters, *state]} == {torch.float32}


def test_the_learning_rate_warms_up_and_follows_a_cosine(tiny, tokenizer, tmp_path):
    trainer = trainer_of(tmp_path, tiny, tokenizer, warmup=1 / 3, lr_min=1e-4)
    rates = [trainer.lr(step) for step in range(7)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-4 + 9e-4 * (1 + math.cos(math.pi / 4)) / 2, 5.5e-4,
                                   1e-4 + 9e-4 * (1 - math.cos(math.pi / 4)) / 2, 1e-4])


def run(stage, out, tiny, processor, toy, teacher=None, args=None, **changes):
    lr = 1e-4 if stage == "rl" else 1e-3                      # at 1e-3 a random policy soon has one answer for all
    args = args or arguments(out, teacher=teacher)
    trainer = trainer_of(out, tiny, processor.tokenizer, stage, args, lr=lr, packs=3, **changes)
    data = data_of(toy, processor, {"cpt_video.jsonl": 1.0} if stage == "cpt" else {"rl.jsonl": 1.0}, stage=stage)
    train.STAGES[stage].train(trainer, data)
    return trainer


@pytest.fixture
def stub_reward(monkeypatch):
    """An untrained model's answers are all wrong; rewards that vary let the filters keep something."""
    def reward(text, row):
        return zlib.crc32(f"{text}{row['id']}".encode()) % 64 / 100
    monkeypatch.setattr(train.evaluation, "reward", reward)
    monkeypatch.setattr(train.evaluation, "correct", reward)


@pytest.mark.parametrize("stage", ["cpt", "rl", "opd"])
def test_a_killed_run_goes_on_bit_for_bit(stage, tiny, tokenizer, processor, toy, tmp_path, monkeypatch, stub_reward,
                                          capsys):
    """Killed after step 3 began (in rl between two updates), the last checkpoint at step 2."""
    teacher = random_model(tiny, tokenizer, seed=1)
    teacher.language_model.norm.weight.data.neg_()            # an untrained model repeats its last token; not this one
    iv3.save_model(tmp_path / "teacher", teacher, tokenizer)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(stage, whole, tiny, processor, toy, tmp_path / "teacher", steps=5)
    assert not (whole / stage / "state.pt").exists()
    save, update, calls = train.save_state, Trainer.update, []

    def save_once(trainer, progress):
        if progress.step == 2:
            save(trainer, progress)

    def dies(self, jobs):
        calls.append(len(self.metrics.read_text().splitlines()) if self.metrics.exists() else 0)
        if calls[-1] >= 3 and calls.count(calls[-1]) == (2 if stage == "rl" else 1):
            raise KeyboardInterrupt
        return update(self, jobs)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", dies)
        patch.setattr(train, "save_state", save_once)
        with pytest.raises(KeyboardInterrupt):
            run(stage, killed, tiny, processor, toy, tmp_path / "teacher", steps=5)
    assert not (killed / stage / "config.json").exists()                     # an unfinished stage is no checkpoint
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == calls[-1]
    run(stage, killed, tiny, processor, toy, tmp_path / "teacher", steps=5)
    assert f"{stage}: resuming at step 2 of 5" in capsys.readouterr().out
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [json.loads(x)["step"] for x in (whole / "metrics.jsonl").open()] == list(range(5))
    first, second = (torch.load(out / stage / "weights.pt") for out in (whole, killed))
    start = random_model(tiny, tokenizer).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], start[k]) for k in first)


def test_the_best_is_kept_beside_the_last_also_over_a_restart(tiny, tokenizer, processor, toy, tmp_path, monkeypatch):
    """Held-out losses 5 4 6 3.5 nan 9: the best is that of step 3, with the weights it had."""
    values, weights = iter([5, 4, 6, 3.5, math.nan, 9]), []

    def step_of(step):
        if step == 4 and len(weights) == 4:
            raise KeyboardInterrupt
        with torch.no_grad():
            trainer.model.language_model.norm.weight.add_(1)
        weights.append(trainer.model.language_model.norm.weight.clone())
        return {"loss": 1.0, "tokens": 1}
    monkeypatch.setattr(train.evaluation, "held_out_loss", lambda *args, **options: (next(values), None))
    args = arguments(tmp_path, eval_every=1, val=None, data_dir=toy)
    for broken in (True, False):
        trainer = trainer_of(tmp_path, tiny, tokenizer, args=args)
        with pytest.raises(KeyboardInterrupt) if broken else nullcontext():
            trainer.fit(step_of)
        weights += [None] * broken                                           # the second time it goes on
    best, _ = iv3.load_model(tmp_path / "sft_short" / "best")
    last, _ = iv3.load_model(tmp_path / "sft_short")
    assert torch.equal(best.language_model.norm.weight, weights[3])
    assert torch.equal(last.language_model.norm.weight, weights[3] + 2)
    record = json.loads((tmp_path / "sft_short" / "best" / "stage.json").read_text())
    assert record == {"stage": "sft_short", "step": 3, "val_loss": 3.5}
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()]
    assert [x["val_loss"] for x in lines][:4] == [5, 4, 6, 3.5] and len(lines) == 6


def test_the_best_of_rl_is_chosen_by_the_reward_on_held_out_rows(tiny, processor, toy, tmp_path, stub_reward):
    lines = [line for line in (toy / "test_short.jsonl").open() if '"grounding"' in line or '"mcq"' in line]
    (toy / "few.jsonl").write_text("".join(lines[:12]))
    args = arguments(tmp_path, eval_every=2, val=toy / "few.jsonl", data_dir=toy)
    run("rl", tmp_path, tiny, processor, toy, args=args)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()]
    rewards = {x["step"]: x["val_reward"] for x in lines if "val_reward" in x}
    record = json.loads((tmp_path / "rl" / "best" / "stage.json").read_text())
    assert list(rewards) == [1, 3, 5] and record["val_reward"] == max(rewards.values()) == rewards[record["step"]]
    model, _ = iv3.load_model(tmp_path / "rl" / "best")
    rows = iv3.load_rows(args.val)
    texts = train.evaluation.answer_rows(model, processor, rows, toy, max_new=24)
    scores = [train.evaluation.reward(text, row) for text, row in zip(texts, rows)]
    assert np.mean(scores) == pytest.approx(record["val_reward"]) and len(set(scores)) > 1
    args.val = toy / "val.jsonl"
    with pytest.raises(UserError, match="val.jsonl: has no rows of mcq or grounding"):
        trainer_of(tmp_path, tiny, processor.tokenizer, "rl", args)


@pytest.mark.parametrize("kind", ["gqa", "m2la"])
def test_recomputed_activations_change_no_gradient(kind, tiny, tokenizer, processor, toy, tmp_path):
    latent = dict(attn="m2la", rope_width=32, ranks=((40, 32),) * tiny.layers) if kind == "m2la" else {}
    batches, grads, kept = data_of(toy, processor, "sft_short.jsonl").batches(0, Recipe({}, 1, 1.0, packs=2)), [], []
    for checkpointing in (False, True):
        args, bytes_kept = arguments(tmp_path, checkpointing=checkpointing), {}
        trainer = trainer_of(tmp_path, replace(tiny, **latent), tokenizer, args=args)
        trainer.model.train()

        def keep(t, held=bytes_kept):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        (batch, loss_of, _), = train.supervised_jobs(trainer, batches)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = loss_of(batch)
        loss.backward()
        grads.append([p.grad for p in trainer.parameters])
        kept.append(sum(bytes_kept.values()))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert kept[1] < 0.5 * kept[0], kept


@pytest.mark.parametrize("kind", ["gqa", "m2la"])
def test_the_operations_of_a_step_are_those_that_torch_counts(kind, tiny, tokenizer, processor, toy):
    """A batch of one sample; torch counts a forward pass and all of a mask."""
    latent = dict(attn="m2la", rope_width=32, ranks=((40, 32),) * tiny.layers) if kind == "m2la" else {}
    model = random_model(replace(tiny, **latent), tokenizer)
    batch, = data_of(toy, processor, "cpt_video.jsonl").batches(0, Recipe({}, 1, 1.0, packs=1, branches=1))
    square = torch.ones_like(batch["mask"].mask)
    batch["mask"] = Blocks(square, [(0, square.shape[-1], 0, 0)])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train.answer_forward(model, batch)
    assert train.train_flops(model, batch) == pytest.approx(3 * counter.get_total_flops(), rel=0.001)


@torch.no_grad()
def test_generation_under_bf16_is_close_to_fp32(model, processor, toy):
    """As RL and OPD sample on a GPU: fp32 weights, autocast, prompts and new tokens against the cache."""
    data = data_of(toy, processor, "sft_short.jsonl")
    (rows, root), = data.step(0, 1, 4)
    prompts = data.encode([{**row, "messages": row["messages"][:-1]} for row in rows], root, generation=True)
    token = torch.tensor([[7]] * len(prompts))
    position = torch.tensor([p.next_position for p in prompts]).expand(3, -1)[..., None]

    def hidden():
        cache, last = iv3.prefill(model, prompts, 4)
        return cache, torch.stack([last, model(token, position, cache=cache)[:, 0]])
    _, exact = hidden()
    with torch.autocast("cpu", torch.bfloat16):
        cache, close = hidden()
        assert len(iv3.generate(model, prompts, 0, 3, 1.0, 2, torch.Generator().manual_seed(0))) == 2 * len(prompts)
    assert {t.dtype for t in cache.view(0)} == {torch.bfloat16}
    assert 0 < (close - exact).norm() < 0.05 * exact.norm()


def text_process(number, out, tiny, processor, toy):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=number, world_size=2)
    text_run(out, tiny, processor, toy)
    dist.destroy_process_group()


def text_run(out, tiny, processor, toy):
    trainer = trainer_of(out, tiny, processor.tokenizer, steps=2, packs=2, muon=0.01)
    train.train_supervised(trainer, data_of(toy, processor, {"sft_short.jsonl": (1, 0), "cpt_text.jsonl": (0, 1)}))


def test_a_step_without_pictures_leaves_the_vision_tower_also_of_two_processes(tiny, processor, toy, tmp_path):
    """No process has a gradient of it: no decay, no momentum, as of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    text_run(one, tiny, processor, toy)
    torch.multiprocessing.start_processes(text_process, (two, tiny, processor, toy), 2, start_method="fork")
    first, second = (iv3.load_model(out / "sft_short")[0].state_dict() for out in (one, two))
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-4, rtol=1e-3, msg=name)


def fsdp_process(number, out, tiny, processor, toy):
    """One of two processes: three of five steps, then a new start from the saved state."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=number, world_size=2)
    update, calls = Trainer.update, []

    def dies(self, jobs):
        calls.append(len(jobs))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(self, jobs)
    Trainer.update = dies
    args = arguments(out, fsdp=True, checkpointing=True)
    with pytest.raises(KeyboardInterrupt):
        sharded_run(out, tiny, processor, toy, args)
    trainer = sharded_run(out, tiny, processor, toy, args)
    state = [v for o in trainer.optimizers for held in o.state.values() for v in held.values() if v.dim()]
    for tensors in (trainer.parameters, state):
        assert sum(t.to_local().numel() for t in tensors) < 0.52 * sum(t.numel() for t in tensors)
    unlike = train.gather(calls)
    assert any(a != b for a, b in zip(*unlike)), f"both had equally many batches: {unlike}"
    dist.destroy_process_group()


def sharded_run(out, tiny, processor, toy, args):
    trainer = trainer_of(out, tiny, processor.tokenizer, args=args, muon=0.01, steps=5, packs=6, branches=2, tokens=300)
    mix = {"cpt_text.jsonl": 0.5, "cpt_image.jsonl": 0.2, "sft_short.jsonl": 0.3}
    train.train_supervised(trainer, data_of(toy, processor, mix))
    return trainer


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 has no FSDP2 on a CPU")
def test_two_processes_that_share_the_weights_do_what_one_does(tiny, processor, toy, tmp_path):
    """FSDP: losses as of one process, also after a restart; an ordinary checkpoint."""
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    sharded_run(one, tiny, processor, toy, arguments(one))
    torch.multiprocessing.start_processes(fsdp_process, (two, tiny, processor, toy), 2, start_method="fork")
    lines = [[json.loads(x) for x in (out / "metrics.jsonl").open()] for out in (one, two)]
    losses, norms = ([[line[name] for line in run] for run in lines] for name in ("loss", "grad_norm"))
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][4] < losses[0][0]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and min(norms[0]) > 0
    first, second = (iv3.load_model(out / "sft_short")[0].state_dict() for out in (one, two))
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-3, rtol=1e-2, msg=name)


def test_a_stage_trained_again_forgets_its_scores_and_those_after_it_are_stale(tiny, tokenizer, tmp_path, capsys):
    args = arguments(tmp_path)

    def fit(stage, before):
        model = random_model(tiny, tokenizer)
        Trainer(model, Processor(tokenizer, tiny), Recipe({}, 1, 1.0), stage, args, tmp_path / before).fit(
            lambda step: {"loss": 1.0, "tokens": 1})
    fit("sft_long", "sft_short")
    fit("rl", "sft_long")
    assert train.finished("sft_long", args) and train.finished("rl", args) and not train.finished("opd", args)
    (tmp_path / "sft_long" / "scores.json").write_text("{}")
    (tmp_path / "sft_long" / "best").mkdir()
    args.seed = 1
    fit("sft_long", "sft_short")
    assert sorted(p.name for p in (tmp_path / "sft_long").iterdir()) == ["config.json", "stage.json", "vocab.json",
                                                                         "weights.pt"]
    assert train.finished("sft_long", args) and not train.finished("rl", args)
    for change, said in ({"attn": "m2la"}, "with --attn gqa"), ({"steps": 3}, "with --steps 1"):
        with pytest.raises(UserError, match=f"sft_long: was trained {said}; use that or another --out"):
            train.finished("sft_long", SimpleNamespace(**vars(args) | change))
    assert "rl: was trained before sft_long was trained again; once more" in capsys.readouterr().out


def test_a_base_that_was_replaced_is_converted_again(tiny, tokenizer, tmp_path):
    args = SimpleNamespace(out=tmp_path, init=None, attn="m2la", cache_share=0.5, seed=0, data=None, quick=False,
                           max_frames=None, packs=None)
    iv3.save_model(tmp_path / "base", random_model(tiny, tokenizer), tokenizer)
    (tmp_path / "convert").mkdir()
    record = {"cache_ratio": 0.5, **train.converted_as(tmp_path / "base", args)}
    (tmp_path / "convert" / "stage.json").write_text(json.dumps(record))
    assert train.start_of("cpt", args) == tmp_path / "convert"
    args.data = [tmp_path / "mine.jsonl"]
    assert train.start_of("cpt", args) == tmp_path / "base"
    args.data, args.packs = None, 4                          # other packs to calibrate on
    assert train.start_of("cpt", args) == tmp_path / "base"
    args.packs = None
    assert train.start_of("cpt", args) == tmp_path / "convert"
    iv3.save_model(tmp_path / "base", random_model(tiny, tokenizer, seed=1), tokenizer)
    assert train.start_of("cpt", args) == tmp_path / "base"


def test_rows_that_share_an_id_are_refused_by_a_filter(tiny, processor, toy, tmp_path, stub_reward):
    lines = (toy / "rl.jsonl").read_text().splitlines()[:4]
    rows = [{**json.loads(line), "id": "same"} for line in lines]
    for row in rows:
        train.first_media(row)["video"] = str(toy / train.first_media(row)["video"])
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="rl: its data has 4 rows with the id 'same'"):
        train.train_rl(trainer_of(tmp_path, tiny, processor.tokenizer, "rl"),
                       data_of(tmp_path, processor, "d.jsonl", stage="rl"))


def test_other_settings_do_not_resume_a_run(tiny, tokenizer, toy, tmp_path):
    trainer = trainer_of(tmp_path, tiny, tokenizer)
    trainer.directory.mkdir()
    train.save_state(trainer, train.Progress(2, 100, 0))
    with pytest.raises(UserError, match="state.pt: was written with other settings"):
        trainer_of(tmp_path, tiny, tokenizer, packs=3).fit(lambda step: None)


def test_a_loss_that_is_not_finite_stops_the_stage(tiny, tokenizer, tmp_path):
    with pytest.raises(UserError, match="sft_short: the loss is nan at step 0"):
        trainer_of(tmp_path, tiny, tokenizer).fit(lambda step: {"loss": math.nan, "tokens": 1})
    assert not (tmp_path / "sft_short" / "config.json").exists()


def test_rl_counts_groups_without_spread(tiny, processor, toy, tmp_path, monkeypatch):
    """All rewards equal: no advantage, no gradient, weights stay."""
    for name in ("reward", "correct"):
        monkeypatch.setattr(train.evaluation, name, lambda text, row: 0.5)
    monkeypatch.setattr(train.evaluation, "well_formed", lambda text, row: 1.0)
    trainer = run("rl", tmp_path, tiny, processor, toy)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()]
    assert all(x["zero_spread"] > 0 and x["loss"] == 0 and x["spread"] == 0 for x in lines)
    start = random_model(tiny, processor.tokenizer).state_dict()
    assert all(torch.equal(v, start[k]) for k, v in trainer.model.state_dict().items())


def test_a_filter_that_keeps_nothing_says_so(tiny, processor, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train.evaluation, "correct", lambda text, row: 0.0)
    with pytest.raises(UserError, match="rl: the data filter kept none of"):
        run("rl", tmp_path, tiny, processor, toy)


def test_a_filter_passes_over_what_cannot_be_read_and_files_without_rows(tiny, processor, toy, tmp_path, monkeypatch,
                                                                          stub_reward):
    good = train.load_rows(toy / "rl.jsonl")
    lost = [{**json.loads(json.dumps(row)), "id": f"lost-{i}"} for i, row in enumerate(good[:8])]
    for i, row in enumerate(lost):
        train.first_media(row)["video"] = f"absent{i}.mp4"
    (tmp_path / "lost.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lost))
    data = data_of(toy, processor, {str(tmp_path / "lost.jsonl"): 0.9, "rl.jsonl": 0.1}, stage="rl")
    monkeypatch.setattr(train, "pool_of", lambda data, *_: [  # eight together that have no video
        Drawn(rows, source.root) for source in data.sources for rows in source.clips])
    trainer = trainer_of(tmp_path, tiny, processor.tokenizer, "rl", packs=3, steps=1, lr=1e-4)
    train.train_rl(trainer, data)
    kept = json.loads((tmp_path / "rl" / "kept.json").read_text())
    assert 0 < len(kept["keep"]) <= kept["looked_at"] == len(good) and sum(data.skipped.values()) >= 8
    assert [source.root for source in data.sources] == [toy]


def test_a_teacher_of_another_vocabulary_is_refused(tiny, tokenizer, processor, toy, tmp_path):
    other = Tokenizer(tokenizer.pieces[1:])
    iv3.save_model(tmp_path / "teacher", random_model(replace(tiny, vocab=len(other)), other), other)
    with pytest.raises(UserError, match="--teacher .*vocabulary"):
        run("opd", tmp_path, tiny, processor, toy, tmp_path / "teacher")


def test_opd_replays_sft_data_beside(tiny, processor, toy, tmp_path, monkeypatch):
    """The teacher is the student itself, so OPD has nothing to teach: what is learned comes from the replay."""
    monkeypatch.setattr(train, "keep_rows", lambda trainer, data, rule: None)
    iv3.save_model(tmp_path / "teacher", random_model(tiny, processor.tokenizer), processor.tokenizer)
    replay, losses = data_of(toy, processor, "cpt_text.jsonl"), []
    for old in ({}, {"cpt_text.jsonl": 2}):
        out = tmp_path / str(len(old))
        args = arguments(out, teacher=tmp_path / "teacher", data_dir=toy)
        trainer = trainer_of(out, tiny, processor.tokenizer, "opd", args, packs=2, replay=old)
        before = mean_loss(trainer, replay.batches(9, replace(trainer.recipe, packs=4)))
        train.train_opd(trainer, data_of(toy, processor, "opd.jsonl", stage="opd"))
        losses.append(before - mean_loss(trainer, replay.batches(9, replace(trainer.recipe, packs=4))))
    assert losses[1] > 1 and losses[1] > 3 * abs(losses[0]), losses          # without: AdamW enlarges rounding noise


def test_rl_raises_the_reward(tiny, tokenizer, processor, toy, tmp_path, monkeypatch):
    """A reward that any policy can learn: the share of even tokens. The whole loop has to be right to raise it."""
    def reward(text, row):
        ids = tokenizer.encode(text)
        return sum(i % 2 == 0 for i in ids) / max(1, len(ids))
    monkeypatch.setattr(train.evaluation, "reward", reward)
    monkeypatch.setattr(train.evaluation, "correct", reward)
    trainer = trainer_of(tmp_path, tiny, tokenizer, "rl", steps=8, clip=(0.2, 0.2), kl=0.0, pool=12, warmup=0.0,
                         format=0.0)
    data = data_of(toy, processor, "rl.jsonl", stage="rl")
    for source in data.sources:
        source.clips = [[{**row, "task": "mcq"} for row in rows] for rows in source.clips]
    train.train_rl(trainer, data)
    rewards = [json.loads(x)["reward"] for x in (tmp_path / "metrics.jsonl").open()]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.05


def test_a_well_formed_answer_earns_the_bonus(tokenizer):
    rows = [{"task": "mcq", "options": ["red", "blue"], "answer": "A"}, {"task": "grounding", "answer": [1.0, 3.0]}]
    texts = ["red", "blue", "green", "From 1.0 to 2.0 seconds.", "From 2.0 to 1.0 seconds.", "no idea"]
    groups = [Group(row, None, None, [said(text) for text in three])
              for row, three in zip(rows, (texts[:3], texts[3:]))]
    assert train.rewards_of(tokenizer, groups) == [1, 0, 0, 0.5, 0, 0]
    assert train.rewards_of(tokenizer, groups, 0.1) == [1.1, 0.1, 0, 0.6, 0, 0]


def said(text):
    """A generation that reads so."""
    return SimpleNamespace(text=lambda tokenizer: text, ids=[0])


# ---------------------------------------------------------------------------------------------------- what forks change

def test_a_prompt_within_reach():
    """§4: IoU in [0.1, 0.7]; multiple choice both right and wrong."""
    span, letter = {"task": "grounding"}, {"task": "mcq"}
    assert [train.within_reach(span, scores) for scores in ([0.1] * 4, [0, 0, 0, 0.3], [0.6, 0.8], [0.9, 0.6])] == [
        True, False, True, False]
    assert [train.within_reach(letter, scores) for scores in ([0] * 4, [1] * 4, [1, 0, 0, 0], [1, 1, 1, 0])] == [
        False, False, True, True]


@pytest.mark.parametrize("stage", ["rl", "opd"])
def test_a_reward_with_a_penalty_changes_no_verdict_of_the_filters(stage, tiny, processor, toy, tmp_path, monkeypatch):
    """All answers right, the policy's long ones punished: nothing is to be learned, though their mean reward is between
    0 and 1 and the teacher's greater. Half of them wrong: kept."""
    evaluation = train.evaluation
    data = data_of(toy, processor, "rl.jsonl", stage=stage)
    data.keep(lambda row: row["task"] == "mcq")
    trainer = trainer_of(tmp_path, tiny, processor.tokenizer, stage)
    monkeypatch.setattr(evaluation, "correct", lambda text, row: float(text != "wrong"))
    monkeypatch.setattr(evaluation, "reward", lambda text, row: evaluation.correct(text, row) - 0.3 * (len(text) > 5))
    teacher, answers = object(), {}

    def rollout(trainer, data, drawn, samples, number, temperature, model=None):
        return [Group(row, root, None, [said(text) for text in answers[model][:samples]])
                for rows, root in drawn for row in rows]
    monkeypatch.setattr(train, "rollout", rollout)

    def kept():
        found = train.rl_filter(trainer, data) if stage == "rl" else train.opd_filter(trainer, data, teacher)
        assert found["looked_at"] > 10
        return len(found["keep"])
    answers |= {None: ["right, long"] * 4, teacher: ["right"] * 4}
    assert kept() == 0
    answers |= {None: ["wrong", "right"] * 2}
    assert kept() > 10


def test_the_flags_of_rl_reach_the_recipe(monkeypatch):
    args = train.parser_of("").parse_args("--stage rl --group 4 --clip 0.1 0.2 --kl 0 --temperature 0.7 --updates 3 "
                                          "--format 0.2 --pool 99 --kl-form sampled".split())
    assert train.check(args) == "rl"
    recipe = train.recipe_of("rl", args, 10 ** 6)
    assert (recipe.group, recipe.clip, recipe.kl, recipe.temperature) == (4, (0.1, 0.2), 0.0, 0.7)
    assert (recipe.updates, recipe.format, recipe.pool, recipe.kl_form) == (3, 0.2, 99, "sampled")
    assert train.recipe_of("rl", train.parser_of("").parse_args([]), 10 ** 6) == train.STAGES["rl"].recipe


@pytest.mark.parametrize("flags, said", [
    ("--group 1", "--group 1: must be at least 2"), ("--updates 0", "--updates 0"), ("--pool 0", "--pool 0"),
    ("--kl -1", "--kl -1.0"), ("--format -1", "--format -1.0"),
    ("--temperature 0", "--temperature 0.0: must be above 0"),
    ("--clip 1 2", "--clip 1.0 2.0: must be above 0"), ("--clip 0.1 0", "--clip 0.1 0.0")])
def test_flags_that_make_no_sense(flags, said):
    with pytest.raises(UserError, match=said.replace("(", "[(]")):
        train.check(train.parser_of("").parse_args(["--stage", "rl", *flags.split()]))


def test_a_preset_decides_the_side_of_the_frames(monkeypatch):
    monkeypatch.setitem(iv3.PRESETS, "mine", dict(pos_side=4))
    monkeypatch.setitem(iv3.PRESETS, "odd", dict(pos_side=3))
    assert [train.frame_side(name) for name in ("tiny", "small", "mine")] == [32, 224, 64]
    assert train.parser_of("").parse_args(["--preset", "mine"]).preset == "mine"
    with pytest.raises(UserError, match="--preset odd: .* frames of 48 pixels .* draws 32, 64"):
        train.frame_side("odd")


@pytest.mark.parametrize("given, drawn", [(None, 32), (3, 3)])
def test_packs_hold_in_the_conversion_too(given, drawn, tiny, tokenizer, processor, toy, monkeypatch):
    asked = []

    class Enough(Exception):
        pass

    def batches(step, recipe):
        asked.append(recipe.packs)
        raise Enough
    data = data_of(toy, processor, "cpt_video.jsonl")
    data.batches = batches
    args = SimpleNamespace(attn="m2la", cache_share=0.5, packs=given, device="cpu")
    with pytest.raises(Enough):
        train.convert(random_model(tiny, tokenizer), data, args)
    assert asked == [drawn]


# A stage as a fork adds one: direct preference optimization (Rafailov et al., 2023), right options against wrong ones.

def dpo_step(trainer, data, reference, step):
    """L = − mean log σ( β [ (log π − log π_ref)(right) − (log π − log π_ref)(wrong) ] )"""
    packs = []
    for rows, root in data.step(step, trainer.recipe.packs, trainer.recipe.branches):
        prompts = data.encode([{**row, "messages": row["messages"][:-1]} for row in rows], root, generation=True)
        groups = []
        for row, prompt in zip(rows, prompts):
            right = ord(row["answer"]) - 65
            pair = row["options"][right], row["options"][right - 1]
            answers = [SimpleNamespace(ids=trainer.tokenizer.encode(f"{text}<|im_end|>")) for text in pair]
            groups.append(Group(row, root, prompt, answers))
        packs += train.answer_packs(data, groups)
    batches = train.micro_batches(packs, trainer.recipe.tokens)
    margins = []

    def loss_of(batch):
        logp, sample = train.token_logp(trainer.model, batch)
        with torch.no_grad():
            ref, _ = train.token_logp(reference, batch)
        ratio = torch.zeros(train.count_of(batch)).index_add(0, sample, logp - ref).view(-1, 2)
        margin = ratio[:, 0] - ratio[:, 1]
        margins.append(float(margin.detach().mean()))
        return -F.logsigmoid(0.1 * margin).mean()
    total = sum(train.count_of(batch) for batch in batches)
    jobs = [Job(batch, loss_of, train.count_of(batch) / total) for batch in batches]
    return {"loss": trainer.update(jobs), "tokens": train.tokens_of(batches), "margin": float(np.mean(margins))}


def train_dpo(trainer, data):
    data.keep(lambda row: row["task"] == "mcq")
    reference = random_model(trainer.model.cfg, trainer.tokenizer)
    reference.load_state_dict(trainer.model.state_dict())
    trainer.fit(lambda step: dpo_step(trainer, data, reference, step))


def test_a_stage_of_a_fork_is_one_entry(tiny, tokenizer, toy, tmp_path, monkeypatch, capsys):
    """It is trained by --stage, starts from the stage before it, its flags are checked, and the next stage finds it."""
    recipe = Recipe({"rl.jsonl": 1.0}, steps=9, lr=1e-3, packs=2)
    monkeypatch.setitem(train.STAGES, "dpo", Stage(after="sft_long", recipe=recipe, train=train_dpo))
    monkeypatch.setitem(train.STAGES, "more", Stage(after="dpo", recipe=recipe, train=train.train_supervised))
    iv3.save_model(tmp_path / "sft_long", random_model(tiny, tokenizer), tokenizer)

    def command(*flags):
        monkeypatch.setattr(sys, "argv", ["mine.py", "--out", str(tmp_path), "--data-dir", str(toy), "--attn", "gqa",
                                          "--jobs", "1", "--device", "cpu", *flags])
        train.main()
    with pytest.raises(UserError, match="has no finished 'dpo' for 'more'"):
        command("--stage", "more")
    command("--stage", "dpo", "--steps", "3", "--packs", "1")
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()]
    assert [(x["stage"], x["step"]) for x in lines] == [("dpo", 0), ("dpo", 1), ("dpo", 2)]
    assert lines[0]["margin"] == 0 and lines[0]["loss"] == pytest.approx(math.log(2)) and lines[2]["margin"] != 0
    assert json.loads((tmp_path / "dpo" / "stage.json").read_text())["inherits"] == str(tmp_path / "sft_long")
    command("--stage", "more", "--steps", "1")
    assert f"more: starts from {tmp_path / 'dpo'} (gqa" in capsys.readouterr().out
    assert iv3.find_model(tmp_path / "dpo") == tmp_path / "dpo" and train.CHAIN == ("cpt", "sft_short", "sft_long",
                                                                                     "rl", "opd")


# ---- the whole recipe -----------------------------------------------------------------------------------------------

def parsed(*flags):
    args = train.parser_of("").parse_args(list(map(str, flags)))
    train.check(args)
    return args


def test_quick_is_the_same_chain_with_less_of_everything(monkeypatch):
    args = parsed("--quick")
    assert (str(args.out), args.scale) == ("runs/quick", train.QUICK_SCALE) and set(train.QUICK) == set(train.CHAIN)
    for stage in train.CHAIN:
        whole, quick = train.STAGES[stage].recipe, train.recipe_of(stage, args, 10 ** 6)
        assert quick.mix.keys() == whole.mix.keys() and quick.steps * quick.packs < whole.steps * whole.packs
        assert train.recipe_of(stage, parsed("--quick", "--steps", 3), 10 ** 6).steps == 3       # flags come after it
    quick, whole = train.expected_seconds(args), train.expected_seconds(parsed())
    assert quick.keys() == whole.keys() and quick.total() < whole.total() / 3
    with pytest.raises(UserError, match="--quick: is of --preset tiny"):
        parsed("--quick", "--preset", "small")


def test_the_time_that_is_left_is_told_in_proportion(tmp_path, monkeypatch, capsys):
    """A clock that is set by hand. Parts are expected to take 60 to 300 s; this machine is twice as slow."""
    monkeypatch.setattr(train, "expected_seconds", lambda args: {"data": 60, "cpt": 120, "rl": 300, "agent": 120})
    args, time = SimpleNamespace(out=tmp_path), [0.0]

    def part(clock, name, seconds, begun=False):
        with clock.part(name, begun):
            time[0] += seconds
        said = capsys.readouterr().out.strip()
        assert said.startswith(f"{name}: done, ")
        return said.removeprefix(f"{name}: done, ")
    clock = train.Clock(args, lambda: time[0])
    assert part(clock, "data", 120) == "2.0 minutes in this run, about 18 more"
    with pytest.raises(KeyboardInterrupt), clock.part("cpt", False):
        time[0] += 100
        raise KeyboardInterrupt
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "scores.json").write_text("{}")                    # what a finished part leaves

    clock = train.Clock(args, lambda: time[0])                              # the same command again
    assert part(clock, "data", 1, begun=True) == "0.0 minutes in this run, about 18 more"
    assert part(clock, "cpt", 30, begun=True) == "0.5 minutes in this run, about 14 more"       # no word on the pace
    assert part(clock, "rl", 300) == "5.5 minutes in this run, about 2 more"                    # 420 s for 360
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"data": 120, "rl": 300}
    monkeypatch.setattr(train, "expected_seconds", lambda args: {})         # of another size nothing is known
    assert part(train.Clock(args, lambda: time[0]), "data", 60) == "1.0 minutes in this run"


def test_what_a_stage_changes_is_told_item_by_item(toy):
    """By hand: of each multiple-choice item .25 more; where they end, spans, a half more on one clip of two."""
    args = SimpleNamespace(data_dir=toy, seed=0)
    before, after = {}, {}
    for length in ("short", "long"):
        rows = [row for row in iv3.load_rows(toy / f"test_{length}.jsonl") if row["task"] in ("mcq", "grounding")]
        clip = iv3.clip_of(rows[0])
        before[length] = {"items": {row["id"]: 0.25 for row in rows}}
        after[length] = {"items": {row["id"]: 0.5 if row["task"] == "mcq" else 0.25 + 0.5 * (iv3.clip_of(row) == clip)
                                   for row in rows}}
    block = train.change_of(before, after, args)
    asked = sum(row["task"] == "mcq" for row in iv3.load_rows(toy / "test_long.jsonl"))
    assert block["long"]["mcq"] == 0.25 and block["long"]["mcq_ci"] == [0.25, 0.25] and block["long"]["mcq_n"] == asked
    assert block["short"]["miou"] == 0.25 and block["short"]["miou_ci"] == [0.0, 0.5]            # two clips
    rows = iv3.load_rows(toy / "val.jsonl")
    nats = np.full((len(rows), 2), [3.0, 2.0])
    loss = train.change_of({"loss": 1.5, "nats": nats.tolist()}, {"loss": 1.0, "nats": (nats - [1, 0]).tolist()}, args)
    assert loss == {"loss": -0.5, "loss_n": len(rows), "loss_ci": [-0.5, -0.5]}
