"""The stages from a Hugging Face checkpoint, by the commands a user types: written by transformers in bf16, random
weights, a few rows of the user's own; conversion by the model's own sizes, four stages, question, agent, save_hf."""
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from test_iv3 import noise, user, video, write_video
from test_parity import CLOSE, random_checkpoint, theirs_of

import iv3
import mcr_agent
import train
from iv3 import UserError


@pytest.fixture
def command(monkeypatch, capsys):
    """command(module, "--flag", …) → what it prints"""
    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out
    return call


def rows(pattern):
    """Questions about 8 clips of one vision token each; the k-th has the k-th answer of the pattern."""
    for k in range(24):
        question = user(video(f"{k % 8}.mp4"), f"What colour is the shape?{' ' * (k // 8)}")
        letter = pattern[k % len(pattern)]
        yield dict(id=str(k), task="mcq", options=["red", "blue"], answer=letter,
                   messages=[question, {"role": "assistant", "content": letter}])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """qwen/: a checkpoint as they are published, in bf16; teacher/: it has learned to answer B, not A."""
    folder = tmp_path_factory.mktemp("hf")
    theirs_of(random_checkpoint(folder / "qwen", tied=True))[0].bfloat16().save_pretrained(folder / "qwen")
    for k in range(8):
        write_video(folder / f"{k}.mp4", noise(2, 32, 32, k), fps=2)
    for name, pattern in (("mostly_a", "AAB"), ("mostly_b", "BBA")):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(pattern)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--stage", "sft", "--attn", "gqa", "--init", str(folder / "qwen"),
                                    "--data", str(folder / "mostly_b.jsonl"), "--out", str(folder / "teacher"),
                                    *"--steps 12 --packs 3 --jobs 1".split()])
        train.main()
    return folder


@pytest.mark.filterwarnings("ignore:layer")                                  # few tokens, random weights
@pytest.mark.parametrize("attn", ["m2la", "gqa", "released"])
def test_four_stages(attn, command, world, tmp_path):
    out = tmp_path / "run"

    def stage(name, *flags):
        return command(train, "--stage", name, "--attn", attn, "--data", world / "mostly_a.jsonl", "--out", out,
                       "--packs", 3, "--jobs", 1, *flags)
    cpt = ("cpt", "--init", world / "qwen", "--steps", 2, "--max-damage", 9, "--freeze", "vision,projector")
    text = stage(*cpt)
    before, after = (float(x) for x in text.rpartition("held-out loss ")[2].removesuffix(" nats\n").split(" → "))
    assert after < before and ("convert: " in text) == (attn != "gqa")
    source, model = (iv3.load_model(d)[0] for d in (world / "qwen", out / "cpt"))
    for name, tensor in source.state_dict().items():
        if name.startswith("visual") or "q_norm" in name and attn == "m2la":
            assert torch.equal(tensor, model.state_dict()[name]) == name.startswith("visual")
    if attn != "gqa":                        # 2·2·16 values a token and layer → a key of 16 and 16 latent ones
        ranks = model.cfg.ranks
        assert model.cfg.rope_width == 16 and 45 <= int(re.search(r"convert: (\d+)% of the cache", text)[1]) <= 50
        assert (ranks == ((16, 16),) * 3) == (attn == "released") and {r % 4 for pair in ranks for r in pair} == {0}
        assert "convert: " not in stage(*cpt)                                # it is not converted again, unless …
    if attn == "released":
        with pytest.raises(UserError, match="more than --max-damage -9"):    # for another share it is
            stage(*cpt[:5], "--max-damage", -9, "--cache-share", 0.38)
        return check_export(attn, *iv3.load_model(out / "cpt"), tmp_path / "hf", world)
    stage("sft", "--steps", 24)
    stage("sft", "--phase", "long", "--steps", 2)
    assert "rl: kept " in stage("rl", "--steps", 2)
    assert "prompts where the teacher is better" in stage("opd", "--steps", 2, "--teacher", world / "teacher/sft_short")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [(x["stage"], x["step"]) for x in lines[-4:]] == [("rl", 0), ("rl", 1), ("opd", 0), ("opd", 1)]
    assert lines[-3]["reward"] > 0 and lines[-1]["loss"] > 0
    ask = (world / "1.mp4", "What colour is the shape?", "--model", out)
    assert command(iv3, *ask, "--max-new", 3).strip()
    said = command(mcr_agent, *ask, "--options", "red", "blue", "--calls", 2, "--turn", 12, "--tools-prompt")
    assert "budget exhausted: calls" in said or "verdict" in said
    check_export(attn, *iv3.load_model(out / "opd"), tmp_path / "hf", world)


@torch.no_grad()
def check_export(attn, model, processor, directory, world):
    """transformers reads the GQA model; the released layout is read back by us; ours of M²LA has no place in theirs."""
    if attn == "m2la":
        with pytest.raises(UserError, match="fold"):
            iv3.hugging_face().save_hf(directory, model, processor.tokenizer)
        return
    iv3.hugging_face().save_hf(directory, model, processor.tokenizer)
    sample = processor.encode([user("What colour?")])
    again = theirs_of(directory)[0] if attn == "gqa" else iv3.load_model(directory)[0]
    expected = model.logits(model(sample.ids[None], sample.positions[:, None]))
    if attn == "gqa":
        got = again(input_ids=sample.ids[None]).logits
    else:
        config = json.loads((directory / "config.json").read_text())["text_config"]
        assert config["kv_lora_rank"] == 16 and config["qk_rope_head_dim"] == 16
        got = again.logits(again(sample.ids[None], sample.positions[:, None]))
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:layer")
@pytest.mark.parametrize("flags, named", [
    (["--data", "one.jsonl"], "give --val"), (["--data", "one.jsonl", "--val", "none.jsonl"], "none.jsonl: no such"),
    (["--data", "mostly_a.jsonl", "--cache-share", "0.1"], "--cache-share 0.1: no latent is left"),
    (["--data", "mostly_a.jsonl", "--cache-share", "50"], "--cache-share 50")])
def test_what_stops_a_conversion(flags, named, command, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    (world / "one.jsonl").write_text(json.dumps(next(rows("A"))) + "\n")
    with pytest.raises(UserError, match=named):
        command(train, "--stage", "cpt", "--init", "qwen", "--out", tmp_path, "--jobs", 1, *flags)
    assert not (tmp_path / "convert" / "config.json").exists()


def test_a_large_model_gets_the_papers_rates():
    flags = {*train.OVERRIDES, "data", "without", "quick"} - {"steps"}
    args = SimpleNamespace(**dict.fromkeys(flags), steps=5)
    small, large = (train.recipe_of("sft_short", args, n) for n in (2e6, 2e9))
    assert (small.tokens, train.recipe_of("rl", args, 6.5e7).tokens) == (1536, 16_384)          # tiny, small
    assert (large.lr, large.muon, large.steps) == (3e-5, 0, 5) and small.muon > 0
    args.lr = 1e-3
    assert train.recipe_of("rl", args, 2e9).lr == 1e-3


def test_a_teacher_whose_head_has_other_rows_is_refused(command, world, tmp_path):
    """The same tokenizer, other padding of the embedding: no KL between 340 and 344 logits."""
    model, processor = iv3.load_model(world / "teacher" / "sft_short")
    model.cfg.vocab, table = 344, model.language_model.embed_tokens
    table.weight = torch.nn.Parameter(torch.cat([table.weight, table.weight[:4]]))
    iv3.save_model(tmp_path / "wide", model, processor.tokenizer)
    with pytest.raises(UserError, match="wide: its vocabulary differs"):
        command(train, "--stage", "opd", "--attn", "gqa", "--init", world / "teacher", "--teacher", tmp_path / "wide",
                "--data", world / "mostly_a.jsonl", "--out", tmp_path, "--jobs", 1)
