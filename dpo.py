"""The remedy: raise the log-probability of the better answer over the worse one, measured from where you started.

The problem. For a question x a judge preferred answer y_w to y_l. Reinforcement learning would fit a reward to
such pairs and then climb it, tied to the starting policy by a KL term. DPO (arXiv:2305.18290) observes that
the best policy under a reward r is known in closed form, so r can be written by the policy itself,

    r(x, y) = beta * (log p(y|x) - log p_ref(y|x)),

and the likelihood of the judge's choice becomes a loss on the policy alone (Eq. 7):

    loss = -log sigmoid( beta * [ (log p(y_w) - log p_ref(y_w)) - (log p(y_l) - log p_ref(y_l)) ] ).

Log-probs are sums over an answer's tokens and its </s> (not means), beta is 0.1, p_ref is the policy as it was
before the first step: the paper's choices (arXiv:2402.10884).

The trick. The reference is two numbers per pair, so it is computed once, by the very code that trains, and no
second model is kept. It is stored in reference.jsonl with a fingerprint of weights, data, template, image
processing and dtype; a stale file is refused. The contract, checked at the first step of every run: at step 0
policy and reference agree, so every margin is 0 and the loss ln 2 = 0.693147. A run that starts anywhere else
is not computing what it says. And both answers hang off one prompt in one packed row (data.py), so that image
and question are computed once per pair.

Reading the curves. `margin` should rise and `loss` fall below ln 2. Both logp_chosen and logp_rejected may fall:
the loss sees only their difference. accuracy is the share of pairs with positive margin. Watch length_chosen against
length_rejected: a judge that likes long answers teaches length.

    python dpo.py --ckpt llava-1.5-7b-hf --data prefs.jsonl --out runs/dpo

Previous: evaluate.py.  Next: story.py (all of it on the miniature).
"""
import json
import math
import time
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Iterator

import common  # first: it tells OpenMP how to wait
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import lora
import parallel
import memory as plan
import resume
from common import (BadInput, OnDisk, adamw, device_and_dtype, each_jsonl, main, masters, schedule, set_rate, sha,
                    sha_of, update, write_jsonl, write_whole)
from data import (Features, Pack, Pixels, Tokens, Tree, ahead, answer_logps, make_tree, pack_size, read_trees, share, split,
                  template, trees_digest)
from model import Llava
from judge.report import GAP, choose_pair
from sft import shuffled


@dataclass
class Settings:
    """Direct preference optimization of a LLaVA policy (or of a text-only Llama)."""
    ckpt: str = "toy/llava"            # checkpoint folder (llava-hf, original LLaVA, Llama), or the shipped miniature
    data: str = ""               # scored records or preference pairs (see formats.py)
    image_root: str = ""         # folder the image names start from; empty: the data file's own
    out: str = ""                # run folder; empty: runs/dpo, or the next free runs/dpo-2, runs/dpo-3, ...
    seed: int = 0                # order of the pairs, and which worse answer is the rejected one
    device: str = "auto"         # cpu, cuda, ...
    dtype: str = "auto"          # float32, bfloat16; auto: float32 on the CPU
    steps: int = -1              # optimizer steps; -1: --epochs passes; 0: stop after the reference
    epochs: int = 3              # passes over the pairs (the paper's 3)
    batch: int = 128             # pairs per optimizer step (the paper's 128)
    lr: float = 0.0              # peak learning rate; 0: 5e-7 for full fine-tuning (RLAIF-V's), 5e-5 for adapters (the paper's)
    average: bool = False        # mean log-probs per token instead of sums (the paper: sums)
    beta: float = 0.1            # how strongly the policy is tied to its start (the paper's 0.1)
    gap: int = GAP               # smallest score difference between chosen and rejected (the paper's 2)
    warmup: float = 0.03         # share of the steps with rising learning rate (the paper's 3 %)
    clip: float = 1.0            # largest gradient norm (the paper states none)
    holdout: float = 0.0         # share of the pairs kept out of training, to measure preference accuracy on
    reference: str = ""          # reference log-probs file; empty: <out>/reference.jsonl
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


# ---- the loss -------------------------------------------------------------------------------------------------

def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
             beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7 of arXiv:2305.18290. All inputs are (B,) sums of log-probs in nats.

    returns the loss of every pair (B,), and the rewards beta * (logp - ref) of chosen and rejected (B,), (B,).
    At step 0 policy and reference agree, and the loss is ln 2 whatever beta is; d loss / d margin is -1/2 there.
    """
    reward_chosen, reward_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(reward_chosen - reward_rejected), reward_chosen.detach(), reward_rejected.detach()


# ---- pairs ----------------------------------------------------------------------------------------------------

@dataclass
class Pair:
    tree: Tree                        # the prompt and two answers: chosen, rejected
    reference: tuple[float, float]    # their log-probs under the policy as it was before training

    @property
    def tokens(self) -> int:
        return self.tree.tokens


def make_pairs(items: Iterable[dict], trees: Iterable[Tree], reference: Iterable[list[float]], gap: int,
               seed: int) -> Iterator[Pair]:
    """The records that have a pair by the paper's rule (pairs.choose_pair), with what the reference says of it."""
    for record, tree, ref in zip(items, trees, reference):
        if chosen := choose_pair(record, gap, seed):
            better, worse = chosen
            yield Pair(replace(tree, answers=[tree.answers[better], tree.answers[worse]]), (ref[better], ref[worse]))


def is_held_out(record_id: str, share: float) -> bool:
    """By a checksum of the record's id, so that it does not depend on order, seed or the other records."""
    return zlib.crc32(record_id.encode()) % 1000 < 1000 * share


# ---- the reference --------------------------------------------------------------------------------------------

def fingerprint(model: Llava, tokens: Tokens, items: Iterable[dict], pixels: Pixels) -> dict[str, str]:
    """What the reference log-probs depend on, one hash each, so that a refusal can say what changed."""
    data = (json.dumps([r["id"], r["messages"], [a["text"] for a in r["answers"]], r["images_sha"]]) for r in items)
    probe = [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
    return {"weights": resume.digest(model), "data": sha_of(data),
            "template": sha(template(probe), tokens.source.read_bytes(), str(tokens.bos), str(tokens.steer)),
            "image processing": f"{pixels.size} px, {'crop' if pixels.crop else 'pad'}",
            "dtype": str(model.head.dtype)}


@torch.no_grad()
def reference_logps(model: Llava, trees: Sequence[Tree], pixels: Pixels, budget: int) -> Iterator[list[float]]:
    """log p of every answer under the model as it stands, a list for each tree; each process computes every N-th pack."""
    device, rank, world, found = model.head.device, parallel.rank(), parallel.world(), []
    bar = tqdm(total=len(trees), desc="reference", unit="rec", disable=None, leave=False)
    for part, packed in ahead(pixels.pack, islice(split(trees, budget), rank, None, world)):
        sums = answer_logps(model, packed.to(device)).tolist()
        for tree, x in zip((tree for tree in part for _ in tree.answers), sums):
            if not math.isfinite(x):
                raise BadInput(f"record {tree.id}: its reference log-prob is {x}; use --dtype float32")
        found.append(array("d", sums))
        bar.update(world * len(part))
    shares = parallel.gather(found)
    every = (x for k in range(sum(map(len, shares))) for x in shares[k % world][k // world])
    return ([next(every) for _ in tree.answers] for tree in trees)


def cached_reference(model: Llava, trees: Sequence[Tree], pixels: Pixels, path: Path, budget: int,
                     now: dict[str, str]) -> Iterator[list[float]]:
    """Compute and write `path` where there is none, refuse it where its fingerprint is not `now` -> its rows, read one by one."""
    note, there = path.with_suffix(".fingerprint.json"), parallel.from_first(path.exists)
    about = ((t.id, [len(a) for a in t.answers], len(t.answers)) for t in trees)
    if there:
        if not note.exists():
            raise BadInput(f"{path} has no {note.name} beside it that says what it was computed with; remove it or choose "
                           "another --reference")
        try:
            then = json.loads(note.read_text())
            changed = [f"{key} ({then.get(key)} then, {now[key]} now)" for key in now if then.get(key) != now[key]]
            held = ((row["id"], row["tokens"], len(row["logps"])) for row in each_jsonl(path))
            same = bool(changed) or all(a == b for a, b in zip_longest(held, about))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path} or its fingerprint is damaged ({error}); remove both") from None
        if changed:
            raise BadInput(f"{path} is stale: it was computed with other {', '.join(changed)}; remove it or choose "
                           "another --out")
        if not same:
            raise BadInput(f"{path} does not hold the records of the data, in their order; remove it")
        print(f"reference: {len(trees)} records read from {path}")
    else:
        began = time.perf_counter()
        logps = reference_logps(model, trees, pixels, budget)
        if parallel.rank() == 0:
            write_whole(note, json.dumps(now, indent=1) + "\n")              # first: a file without it is refused
            write_jsonl(path, ({"id": id, "logps": row, "tokens": tokens} for (id, tokens, _), row in zip(about, logps)))
        parallel.gather(None)                                                # now all can read it
        print(f"reference: {len(trees)} records, {sum(len(t.answers) for t in trees)} answers, "
              f"{time.perf_counter() - began:.1f} s -> {path}")
    return (row["logps"] for row in each_jsonl(path))


# ---- the loop -------------------------------------------------------------------------------------------------

AT_ONCE = 1024      # held-out pairs in memory
UNDECIDED = 1e-4    # a margin this small is rounding: neither right nor wrong
COLUMNS = ("step", "loss", "margin", "accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected",
           "length_chosen", "length_rejected", "grad_norm", "lr", "pairs_per_s")
HEADER = "  step      loss   margin  acc.   reward c / r       logp c / r     length c / r    grad        lr  pairs/s"


def line(m: dict) -> str:
    return (f"{m['step']:6d}  {m['loss']:.6f}  {m['margin']:+.4f}  {m['accuracy']:.2f}  {m['reward_chosen']:+.3f} "
            f"{m['reward_rejected']:+.3f}  {m['logp_chosen']:8.2f} {m['logp_rejected']:8.2f}  {m['length_chosen']:6.1f} "
            f"{m['length_rejected']:6.1f}  {m['grad_norm']:7.2f}  {m['lr']:.2e}  {m['pairs_per_s']:6.1f}")


def check_contract(loss: float, margins: Tensor, beta: float, dtype: torch.dtype) -> None:
    """At step 0 the policy is the reference. Packs differ in shape from the reference pass, so sums of log-probs may differ
    in their last digits: by less than 0.01 nats in fp32. Where the model rounds to 16 bits, some hundredths of a nat a token are
    rounding, by chance up or down: the loss, a mean, is allowed 1 nat, the worst margin of the batch 4. beta scales both."""
    mean, most = (1e-2, 1e-2) if dtype == torch.float32 else (1.0, 4.0)
    worst, allowed = margins.abs().max().item(), beta * most
    start = dpo_loss(*torch.zeros(4, 1), beta)[0].item()                 # ln 2; another loss starts elsewhere
    verdict = f"loss {loss:.6f} ({start:.6f} for no margin), largest |margin| {worst:.1e} (allowed {allowed:g})"
    if not (abs(loss - start) < beta * mean and worst < allowed):
        raise BadInput(f"step-0 contract broken: {verdict}; policy and reference do not see the same tokens or weights")
    print(f"step-0 contract holds: {verdict}")


def pair_logps(model: Llava, pairs: list[Pair], pack: Pack, average: bool) -> tuple[Tensor, Tensor]:
    """(2, B) log-probs of chosen and rejected under the policy now, and under the reference; sums, or means per token."""
    device = model.head.device
    policy = answer_logps(model, pack.to(device)).view(-1, 2).T
    reference = torch.tensor([p.reference for p in pairs], device=device).T
    lengths = torch.tensor([[len(a) if average else 1 for a in p.tree.answers] for p in pairs], device=device).T
    return policy / lengths, reference / lengths


def in_packs(pairs: list[Pair], pixels: Pixels, budget: int) -> Iterator[tuple[list[Pair], Pack, bool]]:
    """The pairs of each of this process's packs, the pack, and whether it counts (data.share)."""
    for (part, counts), packed in ahead(lambda x: pixels.pack([p.tree for p in x[0]]), share(pairs, budget)):
        yield part, packed, counts


def train(model: Llava, pairs: Sequence[Pair], pixels: Pixels, s: Settings, steps: int, out: Path,
          about: dict | None = None) -> None:
    """`steps` optimizer steps on batches of pairs, in place; one line per step to `out`/metrics.jsonl and the screen. `about`
    says what `out`/state must agree with; without it none is kept."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    wide = masters(parameters)
    state = dict(zip(names, wide))
    optimizer = adamw(state, s.lr, s.projector_lr)
    kept = resume.Kept(out, about, s.save_every, s.resume)
    done = resume.restore(kept, state, parameters, optimizer)
    batch = min(s.batch, len(pairs))
    order = islice(shuffled(pairs, s.seed), done * batch, None)
    model.train()
    with resume.metrics_file(kept, done) as metrics, resume.sigterm(kept) as stop, plan.room(s):
        plan.begin(model, wide, s, (p.tree for p in pairs), pixels.pack)
        if done:
            print(HEADER)
        for step in range(done, steps):
            began, rate = time.perf_counter(), schedule(step, steps, s.warmup)
            set_rate(optimizer, rate)
            members, seen = [next(order) for _ in range(batch)], []
            for part, packed, counts in in_packs(members, pixels, s.pack):
                policy, ref = pair_logps(model, part, packed, s.average)
                losses, reward_chosen, reward_rejected = dpo_loss(*policy, *ref, s.beta)
                parallel.backward(model, counts * losses.sum() / batch)  # the mean over the batch, however it is packed
                seen += [torch.stack([losses.detach(), reward_chosen, reward_rejected, *policy.detach()])] * counts
            parallel.sum_gradients(model, wide, any(p.tree.images for p in members))
            norm = parallel.whole(torch.nn.utils.clip_grad_norm_(wide, s.clip or math.inf)).item()
            seen = parallel.gather(torch.cat(seen or [torch.empty(5, 0)], 1).cpu())
            losses, reward_chosen, reward_rejected, logp_chosen, logp_rejected = torch.cat(seen, 1)
            margins, lengths = reward_chosen - reward_rejected, [[len(a) for a in p.tree.answers] for p in members]
            loss = losses.mean().item()
            if not math.isfinite(loss + norm):
                raise BadInput(f"step {step + 1}: loss {loss}, gradient norm {norm}; lower --lr, or use --dtype float32")
            if step == 0:
                check_contract(loss, margins, s.beta, model.head.dtype)
                print(HEADER)
            update(optimizer, wide, parameters)
            values = (step + 1, loss, margins.mean().item(), (margins > UNDECIDED).float().mean().item(),
                      reward_chosen.mean().item(), reward_rejected.mean().item(), logp_chosen.mean().item(),
                      logp_rejected.mean().item(), *(sum(x) / batch for x in zip(*lengths)), norm, s.lr * rate,
                      batch / (time.perf_counter() - began))
            row = dict(zip(COLUMNS, values))
            metrics.write(json.dumps(row) + "\n")
            metrics.flush()
            print(line(row))
            resume.keep(kept, step + 1, steps, stop, state, optimizer, metrics)
    model.eval()


@torch.no_grad()
def preference(model: Llava, pairs: Sequence[Pair], pixels: Pixels, s: Settings) -> dict:
    """Mean margin and accuracy on pairs that were not trained on; an undecided pair (margin 0) counts one half."""
    margins, left = [], iter(pairs)
    while some := list(islice(left, AT_ONCE)):
        for part, packed, counts in in_packs(some, pixels, s.pack):
            policy, ref = pair_logps(model, part, packed, s.average)
            margins += (s.beta * ((policy - ref)[0] - (policy - ref)[1])).tolist() * counts
    margins = [m for part in parallel.gather(margins) for m in part]
    right = sum(1.0 if m > UNDECIDED else 0.5 if m >= -UNDECIDED else 0.0 for m in margins)
    return {"pairs": len(pairs), "margin": round(sum(margins) / len(pairs), 6) + 0.0, "accuracy": right / len(pairs)}


# ---- the script -----------------------------------------------------------------------------------------------

def all_answers(tokens: Tokens, record: dict, limit: int) -> list[Tree]:
    if not record["answers"]:
        raise BadInput("has no answers")
    return [make_tree(tokens, record, [a["text"] for a in record["answers"]], max_length=limit)]


def align(s: Settings, out: Path) -> Llava:
    """--data and --ckpt -> the aligned model, in memory and in `out`/model."""
    plan.check_flags(s)
    if s.gap < 1 or not (0 < s.beta < math.inf and 0 <= s.holdout < 1):
        raise BadInput("--gap must be at least 1, --beta positive and finite, --holdout from 0 to below 1")
    device, dtype = device_and_dtype(parallel.start(s.device), s.dtype)
    s = lora.rates(replace(s, pack=pack_size(s.pack, device)), full=5e-7, adapters=5e-5)
    resume.check_folder(out, s.resume)
    folder = checkpoint.resolve(s.ckpt)
    lora.check_flags(s, checkpoint.base_folder(folder) is not None)
    tokens, pixels, items, trees = read_trees(s, folder, out, all_answers)       # before the weights: reading those takes longer
    if s.steps != 0 and not any(choose_pair(r, s.gap, s.seed) and not is_held_out(r["id"], s.holdout) for r in items):
        raise BadInput(f"{s.data}: no usable pair among {len(items)} records; a pair needs two different answers whose "
                       f"scores S differ by at least --gap {s.gap}, or chosen and rejected given in the data"
                       + f"; and not all may be held out by --holdout {s.holdout}" * (s.holdout > 0))
    model = checkpoint.load(folder, device, dtype)
    pixels = Features(model, s.features, s.crop) if s.features and model.config.vision else pixels
    now = parallel.from_first(lambda: fingerprint(model, tokens, items, pixels))
    reference = cached_reference(model, trees, pixels, Path(s.reference or out / "reference.jsonl"), s.pack, now)
    pairs, held_out = OnDisk(out), OnDisk(out)
    for p in make_pairs(items, trees, reference, s.gap, s.seed):
        (held_out if is_held_out(p.tree.id, s.holdout) else pairs).append(p)
    steps = s.steps if s.steps >= 0 else max(1, s.epochs * len(pairs) // min(s.batch, len(pairs)))
    resume.describe(out, s, steps=steps, pairs=len(pairs))
    print(f"pairs: {len(pairs)} to train on, {len(held_out)} held out, {len(items) - len(pairs) - len(held_out)} records "
          f"without one; {steps} steps of {min(s.batch, len(pairs))}, beta {s.beta}, lr {s.lr}"
          + f", projector {s.projector_lr}" * (s.projector_lr > 0 and model.config.vision is not None) + f", {device} {dtype}")
    if steps == 0:
        return model
    del items, trees                                                     # what is no part of a pair is not needed any more
    before = preference(model, held_out, pixels, s) if held_out else None
    if s.lora:                                                           # behind the reference: B = 0, but A is new
        lora.attach(model, s.lora, s.alpha or 2 * s.lora, s.seed)
    else:
        parallel.shard(model)
    taught = trees_digest(p.tree for p in pairs)
    for p in pairs:
        taught.update(array("f", p.reference).tobytes())
    about = resume.about(asdict(s), **now | {"data": taught.hexdigest()[:16]}, processes=parallel.world())
    train(model, pairs, pixels, s, steps, out, about)
    after = preference(model, held_out, pixels, s) if held_out else None
    if held_out and parallel.rank() == 0:
        write_whole(out / "heldout.json", json.dumps({"before": before, "after": after}, indent=1) + "\n")
        print(f"held-out pairs: margin {before['margin']:+.3f} -> {after['margin']:+.3f}, "
              f"accuracy {before['accuracy']:.2f} -> {after['accuracy']:.2f} ({len(held_out)} pairs)")
    print(f"model: {resume.finish(model, out, folder, s)}   metrics: {out}/metrics.jsonl")
    return model


def run_folder(s: Settings) -> Path:
    """--out, or the next free runs/dpo; a finished run is never written over."""
    if s.resume and not s.out:
        raise BadInput("--resume needs --out, the folder of the run to go on with")
    if s.out:
        if resume.is_finished(Path(s.out), s):
            raise BadInput(f"{s.out} already holds an aligned model; choose another --out (its reference can be used "
                           f"again: --reference {s.out}/reference.jsonl)")
        return Path(s.out)
    names = ["runs/dpo"] + [f"runs/dpo-{k}" for k in range(2, 10000)]
    return next(Path(name) for name in names if not Path(name).exists() or not any(Path(name).iterdir()))


def run(s: Settings) -> None:
    if s.dry_run:
        return plan.dry_run(checkpoint.read_config(checkpoint.resolve(s.ckpt))[0], s)
    if not s.data:
        raise BadInput("--data is needed: scored records or preference pairs, see formats.py; without any, python story.py")
    out = run_folder(s)
    out.mkdir(parents=True, exist_ok=True)
    align(s, out)


if __name__ == "__main__":
    main(Settings, run)
