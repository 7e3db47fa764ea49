"""The first packs of a training stage, token by token as the model reads them, the tokens of the loss marked.

    python extras/show_samples.py 2 --stage sft --phase long --data mine.jsonl   # other flags: those of train.py

RL and OPD learn from their own answers: here those that the start samples for the data before its filter. No
file is written; for supervised stages the weights are not even read.
"""
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from iv3 import Config, Processor, Tokenizer, UserError, build_model, first_media, load_model, need, run_cli
from train import (CURATED, STAGES, Pack, Trainer, advantages, answer_packs, check, data_of, held_out, parser_of,
                   recipe_of, rewards_of, rollout, start_of)

COLOURS = {"vision": "\033[36m{}\033[0m", "prompt": "\033[2m{}\033[0m", "loss": "\033[1;32m{}\033[0m"}
BRACKETS = {"vision": "{}", "prompt": "{}", "loss": "[[{}]]"}


class Sample(NamedTuple):
    """A pack and what is said about it."""
    media: dict                              # None: text alone
    pack: Pack
    lengths: list                            # tokens of each conversation
    notes: list                              # on each conversation


def show_samples(name, args):
    """Print the first args.show_sample packs of a stage."""
    args.fsdp = False                                      # one process shows
    start = start_of(name, args)
    model, processor = opened(name, start, args.device)
    recipe = recipe_of(name, args, sum(p.numel() for p in model.parameters()))
    if not (args.data_dir / CURATED).is_file():            # the stage makes it when it is run
        recipe = replace(recipe, mix={file: share for file, share in recipe.mix.items() if file != CURATED})
    trainer = Trainer(model, processor, recipe, name, args, start)
    data = data_of(name, recipe, processor, args)
    if STAGES[name].converts:
        held_out(args, data, recipe)                       # is no part of it

    marks = BRACKETS
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        marks = COLOURS
    print(f"{name}: {marks['loss'].format('in the loss')} {marks['prompt'].format('prompt')} "
          f"{marks['vision'].format('<n vision>')}")
    shown = 0
    for media, pack, lengths, notes in samples_of(trainer, data):
        title = plain(media[media["type"]]) if media else "text alone"
        print(f"\n=== {title}: {len(lengths)} conversations, {len(pack.ids)} tokens "
              f"({sum(lengths)} if not packed), {int(pack.answer.sum())} in the loss")
        print_pack(pack, processor.tokenizer, model.vision_ids, marks, notes)
        shown += 1
        if shown == args.show_sample:
            return
    raise UserError(f"{name}: only {shown} readable samples; {next(iter(data.skipped), '')}")


def opened(name, start, device):
    """The start's model and processor; a model without weights where it has nothing to say."""
    if STAGES[name].on_policy:
        return load_model(start, device)
    processor = Processor(Tokenizer.load(start), Config.load(start / "config.json"))
    with torch.device("meta"):
        return build_model(processor.cfg, processor.tokenizer), processor


def samples_of(trainer, data):
    """The packs of the stage as it meets them → Sample each."""
    recipe = trainer.recipe
    for step in range(recipe.steps):
        for drawn in data.step(step, recipe.packs, recipe.branches):
            conversations = data.encode(drawn.rows, drawn.root)
            if not conversations:
                continue
            if STAGES[trainer.stage].on_policy:
                yield sampled(trainer, data, drawn, step)
            else:
                yield supervised(trainer, data, drawn, conversations)


def supervised(trainer, data, drawn, conversations):
    """A pack of rows as they are."""
    pack = data.pack(drawn.rows, conversations, drawn.root)
    power = {"mean": 0, "square": 0.5}[trainer.recipe.reduction]
    notes = []
    for row, weight in zip(drawn.rows, weights_of(pack, power)):
        notes.append(f"{plain(row['id'])}: weight {weight:.3f} a token")
    lengths = [len(conversation.ids) for conversation in conversations]
    return Sample(first_media(drawn.rows[0]), pack, lengths, notes)


def sampled(trainer, data, drawn, step):
    """A pack of the rows with answers of the model's own; in RL with their rewards and advantages."""
    recipe = trainer.recipe
    size = recipe.group if trainer.stage == "rl" else 1
    groups = rollout(trainer, data, [drawn], size, step, recipe.temperature)
    pack, = answer_packs(data, groups)
    rewards = torch.tensor(rewards_of(trainer.tokenizer, groups, recipe.format))
    advantage = advantages(rewards, size)
    lengths = []
    notes = []
    for i, weight in enumerate(weights_of(pack, 1)):       # every answer counts the same
        group = groups[i // size]
        lengths.append(len(group.prompt.ids) + len(group.answers[i % size].ids))
        note = f"{plain(group.row['id'])}: weight {weight:.3f} a token"
        if trainer.stage == "rl":
            note += f", reward {rewards[i]:.2f}, advantage {advantage[i]:+.2f}"
        notes.append(note)
    return Sample(first_media(drawn.rows[0]), pack, lengths, notes)


def weights_of(pack, power):
    """What a token of each conversation weighs: 1 / (its answer's tokens)^power."""
    lengths = torch.bincount(pack.sample[pack.answer])
    return [length ** -power for length in lengths.tolist()]


def plain(text):
    """Text of a data file, or of a model, for a terminal: nothing in it commands the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_pack(pack, tokenizer, vision_ids, marks, notes):
    """One pack as the tree that it is: what is shared, then each branch, indented under what it continues."""
    vision = torch.isin(pack.ids, torch.tensor(vision_ids))
    kinds = np.where(pack.answer, "loss", np.where(vision, "vision", "prompt"))
    for branch in pack.branch.unique().tolist():
        at = (pack.branch == branch).nonzero()[:, 0].tolist()
        depth = 0                                          # of the prefix; of a question; of an answer to one
        if branch > 0:
            depth = 2 if pack.parent[at[0]] > 0 else 1
        conversation = int(pack.sample[at[0]])
        what = "shared" if conversation < 0 else f"{conversation + 1}. {notes[conversation]}"
        bar = "│  " * depth
        fork = "├─ " if depth else ""
        print(f"{bar[3:]}{fork}{what}; {len(at)} tokens, {int(pack.answer[at].sum())} in the loss")
        text = ""
        for kind, run in itertools.groupby(at, kinds.__getitem__):
            ids = pack.ids[list(run)].tolist()
            words = f"<{len(ids)} vision>" if kind == "vision" else plain(tokenizer.decode(ids))
            lines = [marks[kind].format(line) if line else "" for line in words.split("\n")]
            text += "\n".join(lines)
        for line in text.split("\n"):
            print(bar + line)


def main():
    parser = parser_of("Print packed samples of a training stage.")
    parser.add_argument("show_sample", type=int, metavar="N", help="how many samples")
    args = parser.parse_args()
    stage = check(args)
    need(stage, "give --stage cpt, sft, rl or opd")
    need(args.show_sample >= 1, f"{args.show_sample}: must be at least 1")
    show_samples(stage, args)


if __name__ == "__main__":
    run_cli(main)
