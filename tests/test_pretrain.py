"""data/toy/pretrain.py at a second size: frames of several vision tokens, as --preset small has them."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest

import iv3

spec = importlib.util.spec_from_file_location("pretrain", Path(__file__).parents[1] / "data" / "toy" / "pretrain.py")
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)


def test_a_second_size(tmp_path, monkeypatch):
    """64 pixels: each of a second's four tokens learns its words; the circuit of one token a second is not laid."""
    monkeypatch.setitem(iv3.PRESETS, "mine", dict(layers=2, vision_layers=1, mlp=128, pos_side=4))
    monkeypatch.setattr(pretrain, "start_lookups", lambda *_: pytest.fail("its heads look three tokens back"))
    flags = f"--preset mine --scale 0.005 --clips 2 --steps 1 --jobs 1 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags.split()])
    pretrain.main()
    vision, *rest = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (vision["stage"], vision["tokens"]) == ("vision", 8 * 40 * 4)                    # clips of 40 s
    assert [row["stage"] for row in rest] == ["near", "base", "teacher"]
    model, _ = iv3.load_model(tmp_path / "teacher")
    assert (model.cfg.layers, model.cfg.attn) == (2, "gqa")
