"""Next-token loss on answers: instruction tuning, and the first baseline.

    loss = - sum log p(token | what stands before it) / number of scored tokens,      scored = answers and their </s>

over the whole batch: a mean per token, not a mean of means, so a batch means the same however it is cut into
packs. What the loss is *not* taken over: the system sentence, the user's words, the image.

The finding this repository is about starts here. Tuned on short visual answers, a language model gets worse at
language; tuned on a judge's golden answers it gets some of it back, and is the baseline that dpo.py must beat.

    python sft.py --ckpt llava-1.5-7b-hf --data llava_instruct.json --out runs/sft

What is trained: the language model and the projector, as in LLaVA's second stage; the vision tower is frozen.
A record's `golden` answer is the target; without one the chosen answer of its pair, or its best-scored one. In
a multi-turn conversation the earlier assistant turns are targets too. The miniature's own stages (toy/build.py) run
through `train` below.

Previous: resume.py.  Next: toy/build.py (the miniature, trained by this loop).
"""
import json
import math
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator

import common  # first: it tells OpenMP how to wait
import torch
from tqdm import tqdm

import checkpoint
import lora
import parallel
import memory as plan
import formats as records
import resume
from common import BadInput, adamw, device_and_dtype, main, masters, schedule, set_rate, sha_of, update
from data import Features, Pack, Tokens, Tree, ahead, make_tree, pack_size, read_trees, share, token_logps, trees_digest
from model import Llava


@dataclass
class Settings:
    """Supervised fine-tuning on golden answers."""
    ckpt: str = "toy/llava"            # checkpoint folder (llava-hf, original LLaVA, Llama), or the shipped miniature
    data: str = ""               # records, LLaVA conversations, ... (see formats.py)
    image_root: str = ""         # folder the image names start from; empty: the data file's own
    out: str = "runs/sft"        # run folder
    seed: int = 0                # order of the records
    device: str = "auto"         # cpu, cuda, ...
    dtype: str = "auto"          # float32, bfloat16; auto: float32 on the CPU
    steps: int = -1              # optimizer steps; -1: --epochs passes
    epochs: int = 3              # passes over the data (the paper's 3)
    batch: int = 128             # records per optimizer step (the paper's 128)
    lr: float = 0.0              # peak learning rate; 0: 2e-5 for full fine-tuning (LLaVA-1.5's), 4e-4 for adapters (the paper's)
    warmup: float = 0.03         # share of the steps with rising learning rate (LLaVA, the paper)
    clip: float = 1.0            # largest gradient norm (LLaVA's default)
    pack: int = 0                # tokens computed at once, gradients accumulate over packs; 0: 1024 on the CPU, 8192 on a GPU
    max_length: int = 0          # longest prompt + answer in tokens; 0: what the model was built for
    crop: bool = False           # centre-crop images instead of padding them to a square
    features: str = ""           # folder to keep the frozen vision tower's output in, between epochs and runs; empty: nowhere
    lora: int = 0                # rank of adapters to train instead of the language model (the paper's 128); 0: all of it
    alpha: float = 0.0           # adapters count alpha / rank times (the paper's 256); 0: twice the rank
    projector_lr: float = 0.0    # peak learning rate of the projector; 0: --lr, or where that is 0 for adapters, the paper's 2e-5
    merge: bool = False          # adapters: also write model/, with them added to the weights
    checkpointing: str = "auto"  # on: keep less for backward and compute it again (memory.py); auto: where memory asks for it; off
    dry_run: bool = False        # print the memory plan for --ckpt's config.json, no weights or data needed, and stop
    save_every: int = 100        # steps between two states that --resume can go on from; 0: only where SIGTERM stops the run
    resume: bool = False         # go on with the run in --out where it was stopped


def shuffled(items: Sequence, seed: int) -> Iterator:
    """Pass over the items again and again, each pass in a seeded order of its own."""
    epoch = 0
    while True:
        order = array("q", range(len(items)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        yield from (items[i] for i in order)
        epoch += 1


def scored_tokens(trees: list[Tree]) -> int:
    return sum(len(a) for t in trees for a in t.answers) + sum(b - a for t in trees for a, b in t.history)


def train(model: Llava, order: Iterator[Tree], make_pack: Callable[[list[Tree]], Pack], *, steps: int, batch: int,
          lr: float, projector_lr: float = 0.0, rate: Callable[[int, int], float] = schedule, clip: float = 1.0,
          betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0, pack: int = 0,
          name: str = "sft", log: Callable[[dict], None] = lambda row: None, kept: resume.Kept | None = None,
          before: Callable[[list], None] = lambda masters: None) -> None:
    """Train whatever of `model` requires a gradient, in place, on the next steps x batch trees of `order`.

    make_pack(trees) loads their images and lays them out; rate(step, steps) scales lr; weight decay spares vectors.
    log(row) receives one dict per step: step, loss (nats per scored token), grad_norm, lr, tokens (computed),
    tokens_per_s. `kept` says where rows and states are kept; before(masters) is called ahead of the first step. Raises BadInput
    where the loss is not finite.
    """
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    device = model.head.device
    wide = masters(parameters)
    state = dict(zip(names, wide))
    optimizer = adamw(state, lr, projector_lr, weight_decay, betas=betas)
    done = resume.restore(kept, state, parameters, optimizer) if kept else 0
    order = islice(order, done * batch, None)
    model.train()
    before(wide)
    with resume.metrics_file(kept, done) as metrics, resume.sigterm(kept) as stop:
        bar = tqdm(range(done, steps), desc=name, unit="step", disable=None, initial=done, total=steps)
        for step in bar:
            began = time.perf_counter()
            now = rate(step, steps)
            set_rate(optimizer, now)
            members = list(islice(order, batch))
            total, loss = scored_tokens(members), 0.0
            for (_, counts), packed in ahead(lambda x: make_pack(x[0]), share(members, pack_size(pack, device))):
                part_loss = -counts * token_logps(model, packed.to(device)).sum() / total
                parallel.backward(model, part_loss)
                loss += part_loss.item()
            loss = sum(parallel.gather(loss))
            parallel.sum_gradients(model, wide, any(t.images for t in members))
            norm = parallel.whole(torch.nn.utils.clip_grad_norm_(wide, clip or math.inf)).item()
            if not math.isfinite(loss + norm):
                raise BadInput(f"step {step + 1}: loss {loss}, gradient norm {norm}; lower --lr, or use --dtype float32")
            update(optimizer, wide, parameters)
            tokens = sum(t.tokens for t in members)
            row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr * now, "tokens": tokens,
                   "tokens_per_s": tokens / (time.perf_counter() - began)}
            log(row)
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            bar.set_postfix_str(f"loss {loss:.4f}")
            resume.keep(kept, step + 1, steps, stop, state, optimizer, metrics)
    model.eval()


# ---- the script -----------------------------------------------------------------------------------------------

def target(record: dict) -> str:
    """The answer to learn: golden, else the chosen one of a given pair, else the best-scored one, else the only one."""
    if record.get("golden"):
        return record["golden"]
    answers = record["answers"]
    if record.get("pair"):
        return answers[record["pair"][0]]["text"]
    whole = [a for a in answers if a.get("finish") != "length"]              # an answer cut off must not teach to stop there
    scored = [a for a in whole if a.get("scores")]
    if scored:
        return max(scored, key=records.quality)["text"]
    if len(answers) == len(whole) == 1:
        return answers[0]["text"]
    raise BadInput("has no golden answer and no scored ones")


def fit(s: Settings, trees_of: Callable[[Tokens, dict, int], list[Tree]], more: dict | None = None) -> None:
    """--data and --ckpt -> the tuned model in `out`/model. trees_of(tokens, record, longest) gives what to learn from a record;
    `more` are JSON files that go with the model."""
    out = Path(s.out)
    if s.dry_run:
        return plan.dry_run(checkpoint.read_config(checkpoint.resolve(s.ckpt))[0], s)
    plan.check_flags(s)
    if not s.data:
        raise BadInput("--data is needed: records or LLaVA conversations, see formats.py")
    if resume.is_finished(out, s):
        raise BadInput(f"{out} already holds a trained model; choose another --out or remove it")
    resume.check_folder(out, s.resume)
    device, dtype = device_and_dtype(parallel.start(s.device), s.dtype)
    s = lora.rates(replace(s, pack=pack_size(s.pack, device)), full=2e-5, adapters=4e-4)
    folder = checkpoint.resolve(s.ckpt)
    lora.check_flags(s, checkpoint.base_folder(folder) is not None)
    _, pixels, items, trees = read_trees(s, folder, out, trees_of)       # the data first: reading weights takes longer
    model, batch = checkpoint.load(folder, device, dtype), min(s.batch, len(trees))
    pixels = Features(model, s.features, s.crop) if s.features and model.config.vision else pixels
    steps = s.steps if s.steps >= 0 else s.epochs * len(trees) // batch
    resume.describe(out, s, steps=steps)
    print(f"{len(items)} records, {len(trees)} answers to learn, {steps} steps of {batch}, lr {s.lr}"
          + f", projector {s.projector_lr}" * (s.projector_lr > 0 and model.config.vision is not None) + f", {device} {dtype}")
    weights, pictures = parallel.from_first(lambda: resume.digest(model)), sha_of(r["images_sha"] for r in items)
    about = resume.about(asdict(s), weights=weights, data=[trees_digest(trees).hexdigest()[:16], pictures],
                         processes=parallel.world())
    del items                                                            # what is no part of a tree is not needed any more
    if s.lora:
        lora.attach(model, s.lora, s.alpha or 2 * s.lora, s.seed)
    else:
        parallel.shard(model)
    with plan.room(s):
        train(model, shuffled(trees, s.seed), pixels.pack, steps=steps, batch=batch, lr=s.lr, projector_lr=s.projector_lr,
              clip=s.clip, pack=s.pack, rate=lambda step, steps: schedule(step, steps, s.warmup),
              kept=resume.Kept(out, about, s.save_every, s.resume),
              before=lambda masters: plan.begin(model, masters, s, trees, pixels.pack))
    print(f"model: {resume.finish(model, out, folder, s, more)}")


def run(s: Settings) -> None:
    fit(s, lambda tokens, record, limit: [make_tree(tokens, record, [target(record)], history=True, max_length=limit)])


if __name__ == "__main__":
    main(Settings, run)
