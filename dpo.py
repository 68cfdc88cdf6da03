"""The remedy: make the better answer likelier than the worse one, measured from where you started.

The problem. For a question x a judge preferred answer y_w to y_l. Reinforcement learning would fit
a reward to such pairs and then climb it, tied to the starting policy by a KL term. DPO
(arXiv:2305.18290) observes that the best policy under a reward r is known in closed form, so r can
be written by the policy itself,

    r(x, y) = beta * (log p(y|x) - log p_ref(y|x)),

and the likelihood of the judge's choice becomes a loss on the policy alone (Eq. 7):

    loss = -log sigmoid( r(x, y_w) - r(x, y_l) ).

The difference is the *margin*. Log-probs are sums over an answer's tokens and its </s> (not means),
beta is 0.1, p_ref is the policy as it was before the first step: the paper's choices
(arXiv:2402.10884).

The trick. The reference is one number per answer, so it is computed once, by the very code that
trains, and no second model is kept. It is stored in reference.jsonl with a fingerprint of weights,
data, template, image processing and dtype; a stale file is refused. The contract, checked at the
first step of every run: at step 0 policy and reference agree, so every margin is 0 (and DPO's loss
ln 2 = 0.693147). A run that starts anywhere else is not computing what it says. And both answers
hang off one prompt in one packed row (data.py), so that image and question are computed once per
pair.

Reading the curves. `margin` should rise and `loss` fall. Both logp_chosen and logp_rejected may
fall: the loss sees only their difference. accuracy is the share of pairs with positive margin.
Watch length_chosen against length_rejected: a judge that likes long answers teaches length.

    python dpo.py --ckpt llava-1.5-7b-hf --data prefs.jsonl --out runs/dpo
"""
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import torch
import torch.nn.functional as F

import checkpoint
import parallel
import train as training
from common import BadInput, main, progress, read_jsonl, write_json, write_jsonl
from data import GAP, choose_pair, make_tree
from model import Llava, summed, token_logps


@dataclass
class Settings(training.Settings):
    """Direct preference optimization of a LLaVA policy (or of a text-only Llama)."""
    out: str = "runs/dpo"        # run folder
    lr: float = 0.0              # peak learning rate; 0: 5e-7 (RLAIF-V), adapters 5e-5 (the paper)
    loss: str = "sigmoid"        # sigmoid (DPO), ipo, hinge or robust: see LOSSES
    beta: float = 0.1            # how strongly the policy is tied to its start (the paper's 0.1)
    smoothing: float = 0.0       # robust: the share of labels that are taken to be wrong, below 0.5
    nll: float = 0.0             # RPO: so much of the chosen answer's own loss per token is added
    tail: float = 1.0            # LD-DPO: what tokens beyond the shorter answer's length count
    average: bool = False        # mean log-probs per token instead of sums (the paper: sums)
    gap: int = GAP               # smallest difference in S of chosen and rejected (the paper's 2)
    holdout: float = 0.0         # share of the pairs kept out of training, to measure accuracy on
    pairs_only: bool = False     # reference log-probs of the pairs' answers alone, not of all n
    reference: str = ""          # reference log-probs file; empty: <out>/reference.jsonl


# ---- the losses ----------------------------------------------------------------------------------
# (B, 2) log-probs of chosen and rejected in nats, now and under the reference -> (B,) losses, (B,)
# margins.

def margins(logps, reference, beta):
    """By how much the policy's reward prefers the chosen answer, (B,)."""
    rewards = beta * (logps - reference)
    return rewards[:, 0] - rewards[:, 1]


def sigmoid(logps, reference, s):
    """DPO, Eq. 7 of arXiv:2305.18290: the likelihood of the judge's choice."""
    margin = margins(logps, reference, s.beta)
    return -F.logsigmoid(margin), margin


def ipo(logps, reference, s):
    """arXiv:2310.12036, Eq. 17: the log-ratio is drawn to 1 / (2 beta), and pulled back beyond it:
    no pair runs away. On sums, as the paper has it; per token (TRL's way) with --average."""
    margin = margins(logps, reference, s.beta)
    return (margin / s.beta - 1 / (2 * s.beta)).square(), margin


def hinge(logps, reference, s):
    """arXiv:2305.10425 (SLiC), arXiv:2309.06657: a pair whose margin is 1 teaches nothing more."""
    margin = margins(logps, reference, s.beta)
    return F.relu(1 - margin), margin


def robust(logps, reference, s):
    """arXiv:2403.00409: unbiased where a share `smoothing` of the labels is wrong."""
    margin = margins(logps, reference, s.beta)
    right = -F.logsigmoid(margin)
    wrong = -F.logsigmoid(-margin)
    return ((1 - s.smoothing) * right - s.smoothing * wrong) / (1 - 2 * s.smoothing), margin


LOSSES = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge, "robust": robust}


# Two terms that go with any of them. `--nll w` adds w * -log p(chosen) / its tokens: the chosen
# answer itself shall not become rarer (RPO, arXiv:2404.19733). `--tail a` is about sums:

def counted(logps, pack, tail):
    """(N,) log-probs of a pack's tokens, its answers two and two a pair -> what they count: those
    beyond the shorter answer's length `tail` times (LD-DPO, arXiv:2409.06411), so that an answer
    cannot win by going on."""
    if tail == 1:
        return logps
    lengths = torch.bincount(pack.owner, minlength=pack.answers)             # (2 B,)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(logps), device=logps.device) - starts[pack.owner]
    shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)               # (2 B,)
    return torch.where(place < shorter[pack.owner], logps, tail * logps)


# ---- the loop ------------------------------------------------------------------------------------

UNDECIDED = 1e-4    # a margin this small is rounding: neither right nor wrong


def train(run, pairs, s):
    """`pairs` are trees of two answers, chosen and rejected, with their reference."""
    for step, batch in run.steps(training.shuffled(pairs, s.seed)):
        for part in run.packs(batch):
            tokens = token_logps(run.model, part.pack)                       # (N,)
            sums = summed(counted(tokens, part.pack, s.tail), part.pack).view(-1, 2)     # (B, 2)
            logps, reference, lengths = beside_reference(sums, part.items, s)
            loss, margin = LOSSES[s.loss](logps, reference, s)
            if s.nll:
                chosen = summed(tokens, part.pack)[::2]                      # with its whole tail
                loss = loss - s.nll * chosen / lengths[:, 0]
            run.backward(loss.sum() / len(batch))        # the mean over the batch, however packed
            rewards = s.beta * (logps - reference)       # whose difference the margin is
            run.record(
                loss=loss, margin=margin, accuracy=margin > UNDECIDED,
                reward_chosen=rewards[:, 0], reward_rejected=rewards[:, 1],
                logp_chosen=logps[:, 0], logp_rejected=logps[:, 1],
                length_chosen=lengths[:, 0], length_rejected=lengths[:, 1],
            )
        if step == 0:
            check_contract(run.columns(), s, run.model.dtype)
        if step == run.first:
            print(HEADER)
        print(line(run.update(pairs=len(batch))))


def beside_reference(logps, pairs, s):
    """(B, 2) of chosen and rejected each: log-probs now, under the reference; lengths in tokens."""
    reference = logps.new_tensor([pair.reference for pair in pairs])
    lengths = logps.new_tensor([[len(answer) for answer in pair.answers] for pair in pairs])
    if s.average:
        return logps / lengths, reference / lengths, lengths
    return logps, reference, lengths


HEADER = (
    "  step      loss   margin  acc.   reward c / r       logp c / r     length c / r"
    "    grad        lr  pairs/s"
)


def line(row):
    return (
        f"{row['step']:6d}  {row['loss']:.6f}  {row['margin']:+.4f}  {row['accuracy']:.2f}  "
        f"{row['reward_chosen']:+.3f} {row['reward_rejected']:+.3f}  "
        f"{row['logp_chosen']:8.2f} {row['logp_rejected']:8.2f}  "
        f"{row['length_chosen']:6.1f} {row['length_rejected']:6.1f}  "
        f"{row['grad_norm']:7.2f}  {row['lr']:.2e}  {row['pairs_per_s']:6.1f}"
    )


def check_contract(columns, s, dtype):
    """At step 0 the policy is the reference, so every margin is 0. Raises BadInput where it is not.

    Packs differ in shape from the reference pass, so sums of log-probs may differ in their last
    digits: by less than 0.01 nats in fp32. Where the model rounds to 16 bits some hundredths of a
    nat a token are rounding, by chance up or down: the worst pair of a batch is allowed 4 nats,
    their mean 1. beta scales both.
    """
    most, mean = (1e-2, 1e-2) if dtype == torch.float32 else (4.0, 1.0)
    margin = columns["margin"]
    worst = margin.abs().max().item()
    nothing = torch.zeros(1, 2)
    start = LOSSES[s.loss](nothing, nothing, s)[0].item()                    # DPO's is ln 2
    verdict = (
        f"loss {columns['loss'].mean().item():.6f} ({start:.6f} for no margin), "
        f"largest |margin| {worst:.1e} (allowed {s.beta * most:g})"
    )
    if not (worst < s.beta * most and abs(margin.mean().item()) < s.beta * mean):
        raise BadInput(
            f"step-0 contract broken: {verdict}; policy and reference do not see the same tokens "
            "or weights"
        )
    print(f"step-0 contract holds: {verdict}")


def preference(model, pairs, pixels, s) -> dict:
    """Mean margin and accuracy on pairs that are not trained on; an undecided one counts half."""
    logps = torch.tensor(reference_logps(model, pairs, pixels, s))           # (B, 2)
    logps, reference, _ = beside_reference(logps, pairs, s)
    found = margins(logps, reference, s.beta)
    right = (found > UNDECIDED).float() + 0.5 * (found.abs() <= UNDECIDED)
    return {
        "pairs": len(pairs),
        "margin": round(found.mean().item(), 6) + 0.0,   # never -0.0
        "accuracy": right.mean().item(),
    }


# ---- the reference -------------------------------------------------------------------------------

@torch.no_grad()
def reference_logps(model, trees, pixels, s):
    """log p of every answer under the model as it stands, a list for each tree."""
    world = parallel.world()
    bar = progress(total=len(trees), desc="reference", leave=False)
    mine = []
    for part in training.packs(trees, s.pack, pixels.pack, model.device):
        tokens = token_logps(model, part.pack)
        sums = summed(counted(tokens, part.pack, s.tail), part.pack).cpu()
        counts = [len(tree.answers) for tree in part.items]
        for tree, logps in zip(part.items, sums.split(counts)):
            if not logps.isfinite().all():
                raise BadInput(
                    f"record {tree.id}: its reference log-prob is {logps.tolist()}; use --dtype "
                    "float32"
                )
            mine.append(logps.tolist())
        bar.update(world * len(part.items))
    bar.close()

    # Process r has trees r, r + world, r + 2 world, ...: put them in order again.
    shares = parallel.gather(mine)
    return [shares[k % world][k // world] for k in range(len(trees))]


def cached_reference(model, found, path, s, depends):
    """reference.jsonl: computed and written where there is none, refused where it is another's."""
    note = path.with_suffix(".fingerprint.json")
    if parallel.from_first(path.exists):
        logps = stored_reference(path, note, found.trees, depends)
        print(f"reference: {len(logps)} records read from {path}")
        return logps

    logps = reference_logps(model, found.trees, found.pixels, s)
    if parallel.rank() == 0:
        rows = []
        for tree, numbers in zip(found.trees, logps):
            tokens = [len(answer) for answer in tree.answers]
            rows.append({"id": tree.id, "logps": numbers, "tokens": tokens})
        write_json(note, depends)                        # rows never stand without it
        write_jsonl(path, rows)
    print(f"reference: {len(logps)} records -> {path}")
    return logps


def stored_reference(path, note, trees, depends):
    """The log-probs in `path`. Raises BadInput where they are not those of `trees`."""
    try:
        changed = training.differences(json.loads(note.read_text()), depends)
        rows = read_jsonl(path)
        held = [(row["id"], len(row["logps"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} or its {note.name} is damaged or not ours ({error}); remove both, or choose "
            "another --reference"
        ) from None
    if changed or held != [(tree.id, len(tree.answers)) for tree in trees]:
        raise BadInput(
            f"{path} is stale: it was computed with other {changed or 'records'}; remove it or "
            "choose another --out"
        )
    return [row["logps"] for row in rows]


# ---- the script ----------------------------------------------------------------------------------

def is_held_out(record_id, share):
    """By a checksum of the record's id: whatever the order, the seed and the other records are."""
    return zlib.crc32(record_id.encode()) % 1000 < 1000 * share


def make_pairs(trees, choices, reference):
    """The trees that have a pair (a choice is two indices, or None), with its reference."""
    pairs = []
    for tree, choice, logps in zip(trees, choices, reference):
        if choice:
            answers = [tree.answers[k] for k in choice]
            pairs.append(replace(tree, answers=answers, reference=[logps[k] for k in choice]))
    return pairs


def check_flags(s: Settings):
    if s.gap < 1 or s.beta <= 0 or s.holdout >= 1 or s.smoothing >= 0.5:
        raise BadInput(
            "--gap must be at least 1, --beta above 0, --holdout below 1, --smoothing below 0.5"
        )
    if s.loss not in LOSSES:
        raise BadInput(f"--loss {s.loss}: choose one of {', '.join(LOSSES)}")
    if s.smoothing and s.loss != "robust":
        raise BadInput("--smoothing belongs to --loss robust")
    if s.tail > 1 or s.tail < 1 and not s.pairs_only:
        raise BadInput("--tail: from 0 to 1, and with --pairs_only, for it is about two answers")


def align(s: Settings) -> Llava:
    """--data and --ckpt -> the aligned model, in memory and in --out."""
    check_flags(s)
    s, device, dtype = training.door(s, full_lr=5e-7, adapter_lr=5e-5)
    out = Path(s.out)

    # Of every usable record a tree with all its answers, and which two of them make a pair: then
    # another --gap needs no new reference. The data comes first: reading weights takes longer.
    choices = []

    def all_answers(tokens, record, longest):
        if not record["answers"]:
            raise BadInput("has no answers")
        texts = [answer["text"] for answer in record["answers"]]
        choice = choose_pair(record, s.gap, s.seed)
        if s.pairs_only:
            if not choice:
                return []
            texts = [texts[k] for k in choice]
            choice = (0, 1)
        tree = make_tree(tokens, record, texts, max_length=longest)
        choices.append(choice)
        return [tree]

    found = training.read(s, all_answers)
    paired = [tree.id for tree, choice in zip(found.trees, choices) if choice]
    if s.steps != 0 and all(is_held_out(name, s.holdout) for name in paired):
        raise BadInput(
            f"{s.data}: no usable pair among {found.records} records; a pair needs two different "
            f"answers whose scores S differ by at least --gap {s.gap}, or chosen and rejected "
            f"given in the data, and --holdout {s.holdout} must leave one"
        )

    # The reference, by the very model that is then trained.
    model = checkpoint.load(s.ckpt, device, dtype)
    depends = training.fingerprint(model, found)
    if s.pairs_only:
        depends["answers"] = f"chosen and rejected alone, --tail {s.tail:g}"
    path = Path(s.reference or out / "reference.jsonl")
    logps = cached_reference(model, found, path, s, depends)
    pairs, held_out = [], []
    for pair in make_pairs(found.trees, choices, logps):
        if is_held_out(pair.id, s.holdout):
            held_out.append(pair)
        else:
            pairs.append(pair)
    found.trees.clear()                                  # answers outside pairs are not needed now

    without = found.records - len(pairs) - len(held_out)
    print(
        f"pairs: {len(pairs)} to train on, {len(held_out)} held out, {without} records without "
        f"one; beta {s.beta}"
    )
    steps = training.announce(s, model, pairs, pairs=len(pairs))
    if steps == 0:
        return model

    before = preference(model, held_out, found.pixels, s) if held_out else None
    depends |= {"data": training.trees_digest(pairs)}
    with training.begin(s, model, pairs, found.pixels.pack, steps, depends) as run:
        train(run, pairs, s)
    if held_out:
        report_held_out(before, preference(model, held_out, found.pixels, s), out)
    print(f"model: {training.finish(run, found.tokens)}   metrics: {out}/metrics.jsonl")
    return model


def report_held_out(before, after, out):
    if parallel.rank() == 0:
        write_json(out / "heldout.json", {"before": before, "after": after})
    print(
        f"held-out pairs: margin {before['margin']:+.3f} -> {after['margin']:+.3f}, "
        f"accuracy {before['accuracy']:.2f} -> {after['accuracy']:.2f} ({after['pairs']} pairs)"
    )


def run(s: Settings):
    align(s)


if __name__ == "__main__":
    main(Settings, run)
