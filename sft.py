"""Weighted likelihood: next-token loss on answers. Instruction tuning, and the first baseline.

    loss = - sum log p(token | what stands before it) / number of scored tokens

over the whole batch, where scored tokens are those of the answers and their </s>. It is a mean per
token, not a mean of means, so a batch means the same however it is cut into packs. What the loss is
*not* taken over: the system's sentence, the user's words, the image.

The finding this repository is about starts here. Tuned on short visual answers, a language model
gets worse at language; tuned on a judge's golden answers it gets some of it back, and is the
baseline that dpo.py must beat.

What is trained: the language model and the projector, as in LLaVA's second stage; the vision tower
is frozen. A record's `golden` answer is the target; without one the chosen answer of its pair, or
its best-scored one. In a conversation of several turns the earlier assistant turns are targets,
too. The miniature's own stages (toy/build.py) run through `train` below.

The old remedy against forgetting is replay: mix what shall not be forgotten into what is learned.
`--data A B --share 0.33` adds so much of B to all of A that a third of the conversations are B's
(of the tokens it may be more: the loss counts those).

    python sft.py --ckpt llava-1.5-7b-hf --data llava_instruct.json --out runs/sft
"""
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter

import common  # first: it tells OpenMP how to wait

import checkpoint
import train as training
from common import BadInput, main, progress, sha
from data import make_tree, scored_answers, usable
from model import token_logps
from train import Run


@dataclass
class Settings(training.Settings):
    """Supervised fine-tuning on golden answers."""
    data: tuple = ()             # a file (see formats.py), or two: what to learn, and what to replay
    share: float = 0.0           # share of the conversations that are of the second file
    out: str = "runs/sft"        # run folder
    lr: float = 0.0              # peak learning rate; 0: 2e-5 (LLaVA), adapters 4e-4 (the paper)


# ---- the loop ------------------------------------------------------------------------------------

def train(run: Run, order, name="sft"):
    """Train whatever of run.model requires a gradient, in place. `order` gives trees for ever, or
    at least for all steps."""
    bar = progress(run.steps(order), desc=name, initial=run.done, total=run.total)
    for _, batch in bar:
        scored = sum(scored_tokens(tree) for tree in batch)
        for part in run.packs(batch):
            logps = token_logps(run.model, part.pack)    # (N,)
            run.backward(-logps.sum() / scored)
            run.record(loss=-logps)
        row = run.update(tokens=sum(tree.tokens for tree in batch))
        bar.set_postfix_str(f"loss {row['loss']:.4f}")


def scored_tokens(tree):
    answers = sum(len(answer) for answer in tree.answers)
    return answers + sum(b - a for a, b in tree.history)


# ---- what to learn -------------------------------------------------------------------------------

def target(record: dict) -> str:
    """The answer to learn: golden, else a given pair's chosen one, else the best, else the only."""
    if record.get("golden"):
        return record["golden"]
    answers = record["answers"]
    if record.get("pair"):
        return answers[record["pair"][0]]["text"]
    scored = scored_answers(record)
    if scored:
        best, _ = max(scored, key=itemgetter(1))
        return answers[best]["text"]
    if len(answers) == 1 and usable(answers[0]):
        return answers[0]["text"]
    raise BadInput("has no golden answer and no scored ones")


def golden_tree(tokens, record, longest):
    return [make_tree(tokens, record, [target(record)], history=True, max_length=longest)]


def mixed(first, second, share, seed):
    """All of `first`, and so much of `second` that it is `share` of the whole: drawn with a seed,
    nothing twice before everything was drawn once."""
    count = round(share / (1 - share) * len(first))
    return first + list(islice(training.shuffled(second, seed), count))


# ---- the script ----------------------------------------------------------------------------------

def fit(s: Settings, trees_of, documents=None):
    """--data and --ckpt -> the tuned model in --out. trees_of(tokens, record, longest) gives what
    to learn from a record; `documents` are JSON files that go with the model."""
    files = [s.data] if isinstance(s.data, str) else list(s.data)
    if len(files) > 2 or (len(files) == 2) != (0 < s.share < 1):
        raise BadInput("--data A B and --share go together: how much of the whole, between 0 and 1, "
                       "is B's")
    s = replace(s, data=files[0] if files else "")
    s, device, dtype = training.door(s, full_lr=2e-5, adapter_lr=4e-4)
    found = training.read(s, trees_of)                   # the data first: weights take longer
    for path in files[1:]:
        replayed = training.read(replace(s, data=path, out=f"{s.out}/replay"), trees_of)
        trees = mixed(found.trees, replayed.trees, s.share, s.seed)
        more = trees[len(found.trees):]
        tokens = sum(map(scored_tokens, more)) / sum(map(scored_tokens, trees))
        print(f"replay: {len(more)} of {len(trees)} conversations, {tokens:.0%} of the scored tokens, "
              f"are from {path}")
        found = replace(found, trees=trees, pictures=sha(found.pictures, replayed.pictures))
    model = checkpoint.load(s.ckpt, device, dtype)
    print(f"{found.records} records, {len(found.trees)} answers to learn")
    steps = training.announce(s, model, found.trees)
    depends = training.fingerprint(model, found)
    with training.begin(s, model, found.trees, found.pixels.pack, steps, depends) as run:
        train(run, training.shuffled(found.trees, s.seed))
    print(f"model: {training.finish(run, found.tokens, documents)}")


def run(s: Settings):
    fit(s, golden_tree)


if __name__ == "__main__":
    main(Settings, run)
