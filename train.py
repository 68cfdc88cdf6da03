"""What every training loop shares: settings, data, packs, gradients, metrics, state.

The loops stand in their own files. `Run` is a handle, not a trainer: it never decides what happens
next. A loop reads

    for step, batch in run.steps(order):          # goes on where a stopped run was
        for part in run.packs(batch):             # as many tokens as fit; this process's share
            loss = ...                            # what the file is about
            run.backward(loss / len(batch))       # the mean over the batch, however it is packed
            run.record(loss=...)
        run.update(pairs=len(batch))              # clip, step, one line of metrics, state

The problem. A process is killed at any moment: by a scheduler, a full disk, a power cut. What a
step depends on is the trained weights, Adam's two moments and step count, and which items come
next.

The trick is to have nothing else. The order of the items and the learning rate are functions of
seed and step, and there is no dropout. So a state is three tensors per trained weight and one
number, and a run that goes on from it ends with the very bits of one that was never stopped (same
machine, same number of processes):

    config.json          settings, versions, hardware, commit
    metrics.jsonl, .png  one line per step, and a picture of them
    rejects.jsonl        what could not be used, and why
    lock                 empty; held while a process writes here, so that two never do
    model/, adapter/     the result in llava-hf's layout, or with --lora in PEFT's
    state/step-00000100/ the step, what this run is, and the tensors

A state appears whole or not at all (written aside, flushed to disk, renamed), and only then are
older ones removed. What the run is, its settings, weights and data, is kept with it and compared: a
state is never continued under other flags.

    python dpo.py --ckpt llava-1.5-7b-hf --data prefs.jsonl --out runs/dpo --save_every 50
    python dpo.py --ckpt llava-1.5-7b-hf --data prefs.jsonl --out runs/dpo --save_every 50 --resume

With nothing there --resume starts from the beginning, so that a scheduler may always give it.
SIGTERM keeps the state at the end of the step and exits with 143.
"""
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import torch

import checkpoint
import formats
import lora
import memory
import parallel
from common import BadInput, describe_run, device_and_dtype, lock, sha, write_json, write_whole
from data import Pack, Pixels, Tokens, Tree, pack_size, split

PROJECTOR_LR = 2e-5      # the paper's and LLaVA's, where adapters train beside the projector


@dataclass
class Settings:
    """What every training script can be told."""
    # what
    ckpt: str = "toy/llava"      # folder (llava-hf, original LLaVA, Llama), or the miniature
    data: str = ""               # records, pairs, conversations, ... (see formats.py)
    image_root: str = ""         # folder the image names start from; empty: the data file's own
    follow_links: bool = False   # images may be links that lead out of that folder
    keep_marker: bool = False    # leave <image> where the data has it; else first in its turn
    out: str = ""                # run folder
    template: str = ""           # vicuna_v1, chatml, llama_3 or mistral; empty: what --ckpt tells
    seed: int = 0                # order of the records, and every other choice

    # how long, and how fast
    steps: int = -1              # optimizer steps; -1: --epochs passes; 0: only dpo.py's reference
    epochs: int = 3              # passes over the data (the paper's 3)
    batch: int = 128             # records per optimizer step (the paper's 128)
    lr: float = 0.0              # peak learning rate; 0: the method's own
    projector_lr: float = 0.0    # the projector's; 0: --lr, with --lora's own rate the paper's 2e-5
    warmup: float = 0.03         # share of the steps with rising learning rate (LLaVA, the paper)
    clip: float = 1.0            # largest gradient norm (LLaVA's default); 0: none
    lora: int = 0                # rank of adapters (the paper's 128); 0: train all weights
    alpha: float = 0.0           # adapters count alpha / rank times; 0: twice the rank (the paper)

    # how it is computed
    device: str = "auto"         # cpu, cuda, ...
    dtype: str = "auto"          # float32, bfloat16; auto: float32 on the CPU
    pack: int = 0                # tokens computed at once; 0: 1024 on the CPU, 8192 on a GPU
    max_length: int = 0          # longest prompt + answer in tokens; 0: what the model has room for
    checkpointing: bool = False  # compute twice and keep less, where the memory plan says so
    dry_run: bool = False        # print the memory plan for --ckpt's config.json, and stop
    save_every: int = 100        # steps between two states for --resume; 0: only at SIGTERM
    resume: bool = False         # go on with the run in --out where it was stopped


# Settings that a resumed run may change: weights and data are compared by what is in them.
WITHOUT_INFLUENCE = {
    "ckpt", "data", "image_root", "follow_links", "out", "reference",
    "device", "resume", "save_every", "dry_run", "checkpointing",
}


# ---- the order of things, and how fast -----------------------------------------------------------

def shuffled(items, seed):
    """Pass over the items again and again, each pass in a seeded order of its own."""
    epoch = 0
    while True:
        order = array("q", range(len(items)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for k in order:
            yield items[k]
        epoch += 1


def schedule(step, steps, warmup=0.03, floor=0.0):
    """Learning-rate factor of steps 0, ..., steps-1: linear over a share `warmup`, then cosine."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(trained, lr, projector_lr, betas, weight_decay):
    """AdamW for tensors by name. The projector may have a peak rate of its own (0: the others')."""
    groups = {}                                          # (peak rate, decay) -> a group
    for name, p in trained.items():
        in_projector = name.startswith("multi_modal_projector.")
        peak = projector_lr if projector_lr and in_projector else lr
        decay = weight_decay if p.ndim > 1 else 0.0      # vectors do not decay
        group = {"params": [], "peak": peak, "weight_decay": decay}
        groups.setdefault((peak, decay), group)["params"].append(p)
    optimizer = torch.optim.AdamW(list(groups.values()), lr=lr, betas=betas, fused=True)

    # The moments are there before the first step: a run takes its memory at once, and can be kept.
    for p in trained.values():
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


# ---- packs ---------------------------------------------------------------------------------------

@dataclass
class Part:
    """What is computed at once: some trees (or pairs), laid out."""
    items: list
    pack: Pack
    counts: bool = True      # False where this process only keeps the others company


def packs(items, budget, pack_of, device):
    """This process's share of a batch, at most `budget` tokens at once.

    Of N processes each takes every N-th item. All must compute equally many packs, for they wait
    for each other: who has fewer than another computes one item again, and does not count it. A
    thread makes the next pack while this one is in use.
    """
    world = parallel.world()
    shares = [list(split(items[r::world], budget)) for r in range(world)]
    mine = shares[parallel.rank()]
    again = [items[:1]] * (max(map(len, shares)) - len(mine))
    todo = mine + again
    if not todo:
        return
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(pack_of, todo[0])
        for k, members in enumerate(todo, 1):
            pack = following.result()
            if k < len(todo):
                following = pool.submit(pack_of, todo[k])
            yield Part(members, pack.to(device), counts=k <= len(mine))


# ---- the handle of a loop ------------------------------------------------------------------------

class Run:
    """A model, its optimizer, and where the run stands.

    pack_of    lays out a list of items (trees, pairs: things with `tokens` and `images`)
    steps      how many there are in all
    rate       rate(step, steps) scales the learning rate
    out        folder of metrics and state; None: neither is kept
    depends    what a state must agree with, beside the settings
    """

    def __init__(
        self,
        model,
        s,
        pack_of,
        *,
        steps,
        rate=None,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        out=None,
        depends=None,
    ):
        # A weight that trains is kept in fp32: in 16 bits it could not take small steps (model.py).
        for p in model.parameters():
            if p.requires_grad and p.dtype != torch.float32:
                p.data = p.data.float()
        self.model = model
        self.settings = s
        self.pack_of = pack_of
        self.total = steps
        self.rate = rate or partial(schedule, warmup=s.warmup)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.trained, s.lr, s.projector_lr, betas, weight_decay)
        self.out = out
        self.depends = depends
        self.done = 0                                    # steps
        self.first = 0                                   # the step at which this process began
        self.stop = threading.Event()                    # SIGTERM came
        self.metrics = open(os.devnull, "w")

        # Of the step at work.
        self.members = []                                # its batch
        self.recorded = defaultdict(list)                # column -> this process's vectors
        self.counts = True                               # does the pack at hand?
        self.began = 0.0

    def steps(self, order):
        """(step, its batch) for every step not done yet; `order` gives the items from step 0 on."""
        size = self.settings.batch
        order = islice(order, self.done * size, None)
        self.first = self.done
        self.model.train()
        for step in range(self.done, self.total):
            self.began = time.perf_counter()
            self.members = list(islice(order, size))
            self.recorded = defaultdict(list)
            yield step, self.members
        self.model.eval()

    def packs(self, batch):
        budget = pack_size(self.settings.pack, self.model.device)
        for part in packs(batch, budget, self.pack_of, self.model.device):
            self.counts = part.counts
            yield part

    def backward(self, loss):
        """Add this pack's gradients; a pack that does not count adds zeros."""
        parallel.backward(self.model, loss if self.counts else 0 * loss)

    def record(self, **columns):
        """Values of this pack's items, for metrics: each name one vector."""
        if self.counts:
            for name, values in columns.items():
                self.recorded[name].append(values.detach().float().cpu())

    def columns(self):
        """What all processes recorded of this batch."""
        mine = {name: torch.cat(vectors) for name, vectors in self.recorded.items()}
        shares = parallel.gather(mine)
        together = {}
        for name in shares[0]:                           # the first process always has an item
            together[name] = torch.cat([share[name] for share in shares if share])
        return together

    def update(self, **amounts):
        """Clip, step, write one line, keep a state when it is time -> the line.

        It has the step, the mean of every recorded column, grad_norm, lr, and each amount of work
        (pairs=16), also per second (pairs_per_s). Raises BadInput for a NaN.
        """
        row = {"step": self.done + 1}
        for name, column in self.columns().items():
            row[name] = column.mean().item()

        trained = list(self.trained.values())
        parallel.sum_gradients(self.model, trained)
        most = self.settings.clip or math.inf
        norm = parallel.whole(torch.nn.utils.clip_grad_norm_(trained, most)).item()
        if not math.isfinite(row["loss"] + norm):
            raise BadInput(
                f"step {row['step']}: loss {row['loss']}, gradient norm {norm}; lower --lr, or use "
                "--dtype float32"
            )

        factor = self.rate(self.done, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

        row |= {"grad_norm": norm, "lr": self.settings.lr * factor}
        seconds = time.perf_counter() - self.began
        for name, amount in amounts.items():
            row |= {name: amount, f"{name}_per_s": amount / seconds}
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        self.keep()
        return row

    # ---- state

    def tensors(self):
        """Everything an update reads and writes, this process's part of it."""
        found = {}
        for name, p in self.trained.items():
            found[f"weight/{name}"] = parallel.local(p.detach())
            for key, value in self.optimizer.state[p].items():
                found[f"{key}/{name}"] = parallel.local(value)
        return found

    def about(self):
        """What a state must agree with."""
        found = {"processes": parallel.world(), **self.depends}
        for name, value in asdict(self.settings).items():
            if name not in WITHOUT_INFLUENCE:
                found[f"--{name}"] = value
        return found

    def keep(self):
        """At the end of a step: is it time to keep the state, or to stop?"""
        if self.out is None or self.done == self.total:  # behind the last step the model is kept
            return
        stop = any(parallel.gather(self.stop.is_set()))
        due = self.settings.save_every and self.done % self.settings.save_every == 0
        if stop or due:
            if parallel.rank() == 0:
                os.fsync(self.metrics.fileno())          # the state counts on these rows
            self.save()
        if stop:
            print(f"stopped by SIGTERM after step {self.done} of {self.total}; go on with --resume")
            sys.exit(143)

    def save(self):
        """Keep the state in out/state, then forget older ones. Every process calls it."""
        folder = self.out / "state"
        aside = folder / "next.part"
        target = folder / f"step-{self.done:08d}"
        rank = parallel.rank()
        try:
            if rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            parallel.gather(None)                        # the folder is there
            if rank == 0 or parallel.sharded(self.model):
                state = {"step": self.done, "about": self.about(), "tensors": self.tensors()}
                with open(aside / f"process-{rank}.pt", "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            parallel.gather(None)                        # everybody's part is on the disk
            if rank == 0:
                flush_folder(aside)
                os.replace(aside, target)
                flush_folder(folder)
                for old in folder.glob("step-*"):
                    if old != target:
                        shutil.rmtree(old, ignore_errors=True)
        except (OSError, RuntimeError) as error:         # a full disk is the latter to torch
            shutil.rmtree(aside, ignore_errors=True)
            raise BadInput(
                f"the state after step {self.done} cannot be written to {folder} ({error}); any "
                "earlier one is whole; make room, then go on with --resume"
            ) from None

    @torch.no_grad()
    def restore(self):
        """Bring weights and moments to where the kept state left them."""
        folder = latest_state(self.out)
        if folder is None:
            print(f"nothing to resume in {self.out}: starting at step 1")
            return
        rank = parallel.rank() if parallel.sharded(self.model) else 0
        path = folder / f"process-{rank}.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            changed = differences(state["about"], self.about())
            if not changed:
                for name, place in self.tensors().items():
                    place.copy_(state["tensors"][name])
        except Exception as error:                       # torn or gone: torch raises many types
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"{path} is damaged ({reason}); remove {folder}") from None
        if changed:
            raise BadInput(
                f"{folder} is the state of another run: other {changed}; give the flags and files "
                "of that run, or choose another --out"
            )
        self.done = state["step"]
        print(f"resumed after step {self.done}: {folder}")


def differences(then, now):
    """What was otherwise then, in words; empty: nothing."""
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return ", ".join(f"{key} ({then.get(key)} then, {now.get(key)} now)" for key in keys)


def latest_state(out):
    return max((out / "state").glob("step-*"), default=None)


def flush_folder(folder):
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


# ---- before the loop -----------------------------------------------------------------------------

def door(s: Settings, full_lr: float, adapter_lr: float):
    """What cannot work is refused before anything is read -> settings with every default filled in,
    torch.device, torch.dtype. The method's own peak learning rates are `full_lr`, `adapter_lr`.

    With --dry_run the program ends here: config.json is all that the memory plan needs."""
    check_numbers(s)
    if s.dry_run:
        config, _ = checkpoint.read_config(checkpoint.resolve(s.ckpt))
        memory.dry_run(config, s)
        sys.exit(0)
    if not s.data:
        raise BadInput("--data is needed: records, preference pairs, conversations; see formats.py")
    out = Path(s.out)
    if (out / "model").exists() or (out / "adapter").exists():
        if s.resume:                                     # a scheduler starts what has ended, too
            print(f"{out} is finished already")
            sys.exit(0)
        raise BadInput(f"{out} already holds a trained model; choose another --out or remove it")
    stopped = latest_state(out)
    if stopped and not s.resume:
        raise BadInput(
            f"{out} holds a run that was stopped after step {int(stopped.name[5:])}; go on with "
            "--resume, or choose another --out"
        )
    if s.alpha and not s.lora:
        raise BadInput("--alpha is about adapters: give --lora, their rank")
    if s.lora and checkpoint.base_folder(checkpoint.resolve(s.ckpt)):
        raise BadInput(
            f"--ckpt {s.ckpt} is an adapter, and PEFT loads none on top of another; merge it "
            f"first: python lora.py --ckpt {s.ckpt} --out MODEL"
        )

    device, dtype = device_and_dtype(parallel.start(s.device), s.dtype)
    s = replace(s, pack=pack_size(s.pack, device))
    if not s.lr and s.lora:
        s = replace(s, lr=adapter_lr, projector_lr=s.projector_lr or PROJECTOR_LR)
    elif not s.lr:
        s = replace(s, lr=full_lr)
    if parallel.rank() == 0:
        lock(out)
    return s, device, dtype


def check_numbers(s):
    for name, value in asdict(s).items():
        least = {"steps": -1, "batch": 1, "epochs": 1}.get(name, 0)
        if not isinstance(value, str) and not least <= value < math.inf:     # nor is it NaN
            raise BadInput(f"--{name} {value}: a number from {least} on")


@dataclass
class Reading:
    """What came out of a data file."""
    tokens: Tokens
    pixels: Pixels
    trees: list[Tree]
    records: int         # usable ones
    pictures: str        # a hash of all pictures' bytes, in order


def read(s: Settings, trees_of) -> Reading:
    """--data -> what is to be learned from each record, by trees_of(tokens, record, longest).

    Where that raises BadInput, the record is listed with its reason, as those refused before are.
    """
    folder = checkpoint.resolve(s.ckpt)
    config, _ = checkpoint.read_config(folder)
    tokens = Tokens(folder, config, s.template)
    pixels = Pixels(config)
    trees = []
    pictures = []
    rejects = []
    unused = Counter()
    how = (s.image_root, pixels.size, s.follow_links, s.keep_marker, Path(s.out))
    for name, record in formats.stream(s.data, *how):
        try:
            if isinstance(record, BadInput):
                raise record
            trees += trees_of(tokens, record, s.max_length or tokens.room)
            pictures.append(record["images_sha"])
            unused.update(formats.unused(record))
        except BadInput as problem:
            rejects.append({"id": name, "reason": str(problem)})

    out = Path(s.out) if parallel.rank() == 0 else None
    formats.report(s.data, len(pictures), rejects, out, unused)
    if not pictures:
        raise BadInput(f"{s.data}: no usable record; see above and {s.out}/rejects.jsonl")
    words = sum(len(tree.prompt) for tree in trees)
    unknown = tokens.tokenizer.token_to_id("<unk>")
    strange = sum(tree.prompt.count(unknown) for tree in trees)
    if strange > 0.1 * words:                            # a forgotten --ckpt
        print(f"  note: {s.ckpt} does not know {strange} of {words} words; is it the right --ckpt?")
    return Reading(tokens, pixels, trees, len(pictures), sha(*pictures))


def trees_digest(trees, pictures=""):
    """Names what would be trained on: every token, in order."""
    digest = hashlib.sha256(pictures.encode())
    for tree in trees:
        names = [Path(path).name for path in tree.images]                    # of any folder
        digest.update(repr(replace(tree, images=names)).encode())
    return digest.hexdigest()[:16]


def fingerprint(model, found):
    """What a run and its reference depend on, by name: a refusal then says what changed. Process 0
    computes it for all."""
    tokens, pixels = found.tokens, found.pixels
    return parallel.from_first(lambda: {
        "weights": checkpoint.digest(model),
        "data": trees_digest(found.trees, found.pictures),
        "template": sha(repr(tokens.template), tokens.source.read_bytes(), str(tokens.bos)),
        "image processing": f"{pixels.size} px, pad",
        "dtype": str(model.dtype),
    })


# ---- around the loop -----------------------------------------------------------------------------

def announce(s, model, items, **more):
    """Say, and write to config.json, what a run over `items` is -> how many steps it has. Where a
    stopped run goes on, its config.json stays."""
    batch = min(s.batch, len(items))
    steps = s.steps
    if steps < 0:
        steps = max(1, s.epochs * len(items) // batch)
    out = Path(s.out)
    if parallel.rank() == 0 and not (s.resume and latest_state(out)):
        about = describe_run(s, steps=steps, **more)
        write_json(out / "config.json", about)
    projector = f", projector {s.projector_lr}" if s.projector_lr and model.config.vision else ""
    print(f"{steps} steps of {batch}, lr {s.lr}{projector}, {model.device} {model.dtype}")
    return steps


@contextmanager
def begin(s, model, items, pack_of, steps, depends):
    """Inside: a Run over `items` in --out, its largest pack tried, its state restored with
    --resume; SIGTERM lets a step finish. Behind it whole weights are in model.dtype again."""
    if s.lora:
        lora.attach(model, s.lora, s.alpha or 2 * s.lora, s.seed)
    elif parallel.world() > 1:
        parallel.shard(model)
    s = replace(s, batch=min(s.batch, len(items)))       # a step takes no item twice
    run = Run(model, s, pack_of, steps=steps, out=Path(s.out), depends=depends)
    if s.resume:
        run.restore()

    before = signal.signal(signal.SIGTERM, lambda *_: run.stop.set())
    try:
        with memory.room(s), open_metrics(run.out, run.done) as run.metrics:
            model.language_model.checkpointing = s.checkpointing
            memory.begin(model, s, items, pack_of)
            yield run
    finally:
        signal.signal(signal.SIGTERM, before)
    if not parallel.sharded(model) and not s.lora:       # adapters are small, and stay as they are
        for p in run.trained.values():
            p.data = p.data.to(model.dtype)


def open_metrics(out, done):
    """Open for the rows after step `done`; what a killed process wrote beyond it is cut off."""
    if parallel.rank():
        return open(os.devnull, "w")
    path = out / "metrics.jsonl"
    text = path.read_text(encoding="utf8") if done and path.exists() else ""
    lines = text.splitlines(keepends=True)[:done]
    if "".join(lines).count("\n") < done:                # gone, or torn
        raise BadInput(
            f"{path} does not hold the rows of steps 1 to {done}; put it back, or remove "
            f"{out}/state"
        )
    write_whole(path, lines)
    return open(path, "a", encoding="utf8")


def finish(run, tokens, documents=None):
    """Write what a run leaves, model/ or adapter/, draw its metrics, forget its state. Every
    process calls it. `documents` {name: JSON} go with the model."""
    s = run.settings
    source = checkpoint.resolve(s.ckpt)
    documents = {"template.json": asdict(replace(tokens.template, ask=""))} | (documents or {})
    result = run.out / ("adapter" if s.lora else "model")
    try:
        if not s.lora:
            checkpoint.save(run.model, result, source, documents)
        elif parallel.rank() == 0:
            lora.save_adapter(run.model, result, source, documents)
    except OSError as error:                             # a full disk: a state may still fit
        kept = "the last state"
        if parallel.world() == 1:                        # others do not know, and would not meet
            run.save()
            kept = "what was trained"
        raise BadInput(
            f"{result} cannot be written ({error}); {kept} is kept in {run.out}/state: make room, "
            "then give --resume"
        ) from None
    if parallel.rank() == 0:
        draw_metrics(run.out)
        shutil.rmtree(run.out / "state", ignore_errors=True)
    return result


def draw_metrics(out):
    """metrics.jsonl -> metrics.png: one small plot per column, chosen and rejected together."""
    from matplotlib.figure import Figure                 # without pyplot, which looks for a screen

    rows = common.read_jsonl(out / "metrics.jsonl")
    if not rows:
        return
    steps = [row["step"] for row in rows]
    plots = defaultdict(list)                            # title -> columns
    for name in list(rows[0])[1:]:                       # all but the step
        plots[name.removesuffix("_chosen").removesuffix("_rejected")].append(name)
    figure = Figure(figsize=(16, 9), layout="constrained")
    for k, (title, names) in enumerate(plots.items(), 1):
        axis = figure.add_subplot(-(-len(plots) // 4), 4, k, title=title)
        for name in names:
            axis.plot(steps, [row[name] for row in rows], label=name)
        axis.legend()
    figure.savefig(out / "metrics.png")
