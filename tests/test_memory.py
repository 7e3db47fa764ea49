"""The estimates of extras/memory.py, by hand and against what autograd keeps."""
import json
import sys
from dataclasses import asdict, replace

import memory
import pytest
import torch
from test_iv3 import LATENT, UNTIED, folder, random_model, tokenizer, user, video

import iv3
import m2la
import train
from iv3 import Config, Processor


@pytest.mark.parametrize("name, expected", [
    # 8B, M²LA: query maps 32·128·256, encoder 2048·1920 + 1920, two decoders 896·2048 + 2048 more in each of 36 layers;
    # a token's row in bf16: 36 · 2·8·128 values of GQA, 36 · (896 + 128) of M²LA
    ("qwen3-vl-8b", [(8_767_123_696, 147_456, (80e9 - 2 * 8_767_123_696) // 147_456),
                     (8_767_123_696 + 36 * 8_656_768, 73_728, (80e9 - 2 * 9_078_767_344) // 73_728)]),
    # 4 layers of 4 / 2 heads of 32: query maps 4·32·64, encoder 128·96 + 96, two decoders 32·128 + 128
    ("tiny", [(2_039_040, 1024, (80e9 - 2 * 2_039_040) // 1024),
              (2_039_040 + 4 * (8192 + 12_384 + 2 * 4224), 512, (80e9 - 2 * 2_155_136) // 512)])])
def test_estimate_by_hand(name, expected):
    rows = [line.replace(",", "").split() for line in list(memory.estimate(name, 80))[2:]]
    assert [row[0] for row in rows] == ["gqa", "m2la"]
    assert [(int(row[1]), int(row[3]), int(row[4])) for row in rows] == expected


def test_estimate_of_a_converted_model(tmp_path):
    """Its own ranks, those of the wider modality; weights that do not fit leave no context."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(replace(LATENT, ranks=((24, 16), (16, 16), (20, 20))))))
    lines = list(memory.estimate(str(tmp_path), 1e-6))
    assert lines[3].split()[0] == "m2la" and lines[3].split()[3:] == [str(2 * (24 + 16 + 20 + 3 * 16)), "0"]
    assert lines[2].split()[3] == str(2 * 3 * 2 * 2 * 16)


def kept_by_autograd(model, batch, monkeypatch):
    """Bytes of the tensors that the forward of a training step keeps for its backward, weights and batch left out."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batch.values()) if torch.is_tensor(t)}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor                   # alive, or another would get its address
        return tensor
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda f, x, *a, **k: checkpoint(f, keep(x), *a, **k))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, token, _ = train.answer_forward(model, batch)
        torch.nn.functional.cross_entropy(logits, token)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in known)


@pytest.mark.parametrize("options", [{}, {"freeze": ("vision", "projector")},
                                     {"freeze": ("vision", "projector"), "checkpointing": True}], ids=str)
@pytest.mark.parametrize("attn", ["gqa", "m2la"])
def test_activations_are_estimated_as_autograd_keeps_them(attn, options, tokenizer, folder, monkeypatch):
    cfg = replace(LATENT if attn == "m2la" else UNTIED, layers=4, hidden=64, ranks=((24, 16), (16, 24)) * 2)
    model, processor = random_model(cfg, tokenizer).train(), Processor(tokenizer, cfg)
    if "freeze" in options:
        model.visual.requires_grad_(False)
    model.checkpointing = "checkpointing" in options
    monkeypatch.setattr(m2la, "KEPT", 0)                                     # attention as on a GPU
    sample = processor.encode([user(video("wide.mp4"), video("ramp.mp4"), "What colour is the shape? " * 4),
                               {"role": "assistant", "content": "red circle " * 30}], folder)
    batch = train.collate_packs([train.make_pack([sample], len(sample.grids), model.vision_ids)] * 2)
    T, blocks = len(sample.ids), batch["mask"].blocks
    keys = 1 + sum(head + stop - low for _, stop, head, low in blocks if head) / T
    seen = sum((stop - start) * (head + stop - low) for start, stop, head, low in blocks) / T ** 2
    saved, _ = memory.activation_bytes(cfg, T, 2, keys, seen, int(sample.answer.sum()),
                                       int(sample.grids.prod(1).sum()) / 4 / T, mixed=False, **options)
    assert saved == pytest.approx(kept_by_autograd(model, batch, monkeypatch), rel=0.05)


def test_training_bytes_by_hand():
    """2B: 2,127,532,032 weights; the tower has 305 M of them, four mergers 101 M, matrices outside embeddings and tower
    28 · (2·2048² + 2·2048·1024 + 3·2048·6144)."""
    with torch.device("meta"):
        model = iv3.InternVideo3(Config.preset("qwen3-vl-2b"), (1, 2))
    n, matrices = 2_127_532_032, 28 * (2 * 2048 ** 2 + 2 * 2048 * 1024 + 3 * 2048 * 6144)
    visual = sum(p.numel() for p in model.visual.parameters())
    parts = memory.training_bytes(model, 100)
    assert [parts[k] for k in ("weights", "bf16 copies", "gradients", "optimizer")] == [4 * n, 2 * n, 4 * n, 8 * n]
    parts = memory.training_bytes(model, 100, muon=True, freeze=("vision", "projector"))
    assert (parts["weights"], parts["gradients"]) == (4 * n, 4 * (n - visual))
    assert parts["optimizer"] == 8 * (n - visual) - 4 * matrices
    assert memory.training_bytes(model, 100, freeze=("projector",))["gradients"] == 4 * (
        n - sum(p.numel() for m in (model.visual.merger, model.visual.deepstack_merger_list) for p in m.parameters()))
    for plain, again in ((memory.training_bytes(model, 9000, checkpointing=c) for c in (False, True)),):
        assert again["activations"] < plain["activations"] / 8 and again["working"] > plain["working"]


def test_the_longest_sequence_is_the_last_that_fits():
    how = dict(packs=2, checkpointing=True)
    gqa, m2la = (line.replace(",", "").split() for line in list(memory.estimate("small", 8, seq=64, **how))[2:])
    with torch.device("meta"):
        model = iv3.InternVideo3(Config.preset("small"), (1, 2))
    below, above = (sum(memory.training_bytes(model, int(gqa[-1]) + more, **how).values()) for more in (0, 1))
    assert below <= 8e9 < above and int(m2la[-1]) < int(gqa[-1])
    assert float(gqa[-2]) == round(sum(memory.training_bytes(model, 64, **how).values()) / 1e9, 2)
    assert list(memory.estimate("small", 0.1, seq=64))[2].split()[-1] == "0"


def test_the_command(monkeypatch, capsys):
    """A table for each question, its columns under their titles; what it cannot do is named."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["memory.py", *map(str, args)])
        memory.main()
        return [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = run("tiny", "--memory", 1)
    assert lines[0][:3] == ["tiny", "in", "bf16,"] and [line[0] for line in lines[2:]] == ["gqa", "m2la"]
    lines = run("tiny", "--train", "--seq", 64, "--freeze", "vision,projector", "--muon")
    parts = [float(x) for x in lines[2][1:-2]]
    assert len(parts) == 6 and float(lines[2][-2]) == pytest.approx(sum(parts), abs=0.04)
    assert " ".join(lines[0]).endswith("seq 64, packs 1, muon True, freeze ('vision', 'projector')")
    for args, named in ((("huge",), "huge: neither a preset"), (("tiny", "--memory", 0), "--memory 0: must be"),
                        (("tiny", "--train", "--seq", 0), "--seq 0: must be at least 1"),
                        (("tiny", "--freeze", "text"), "--freeze text: parts are vision, projector")):
        with pytest.raises(iv3.UserError, match=named):
            run(*args)
