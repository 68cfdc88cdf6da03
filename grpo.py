"""Policy gradient: sample answers from the model as it is, have them judged, make the better likelier.

The problem. Preference pairs are sampled once. After some steps the model says other things, which
nobody has judged. Policy gradients sample anew for every step; the gradient of the expected score is

    E[ advantage * grad log p(answer | question) ],     advantage = S - mean of S over the n answers

(REINFORCE): the n answers to a question are each other's baseline (GRPO, arXiv:2402.03300; RLOO,
arXiv:2402.14740). It is sft.py's weighted likelihood, with weights that may be negative.

The trick is what is *not* here. One update per sample: GRPO's ratio is 1, and there is nothing to
clip. No KL term, so no reference. --spread divides by the spread of the n scores, as GRPO does; a
question on which all nearly agree then counts as much as any other (arXiv:2503.20783). An answer
that the budget cut off, or that the judge gave no score, is in nobody's mean and teaches nothing.

The judge is the miniature's own, or one over HTTP, through annotate.py's journal: a killed run asks
nothing twice, and ends with the bits of one that was never stopped.

    python -m toy.tasks --out runs/prompts
    python grpo.py --ckpt toy/llava --data runs/prompts/prompts.jsonl --judge oracle --batch 16 \\
        --lr 1e-4 --epochs 1 --out runs/grpo
"""
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import torch

import annotate
import checkpoint
import parallel
import train as training
from common import BadInput, main
from data import make_tree, usable
from generate import check_room, sample_answers
from judge.client import JudgeSettings, door
from judge.rubric import RUBRIC
from model import answer_logps


@dataclass
class Settings(training.Settings, JudgeSettings):
    """Group-relative policy gradient on sampled, judged answers."""
    out: str = "runs/grpo"       # run folder
    judge: str = ""              # gemini:MODEL, openai:MODEL, or oracle (the miniature)
    n: int = 4                   # answers to each question
    temperature: float = 1.0     # of the sampling; 1 is what the gradient means
    max_new: int = 48            # longest answer in tokens
    spread: bool = False         # divide advantages by the spread of the n scores, as GRPO does
    golden = False               # no flag: the judge gives no answer of its own


def advantages(scores, spread=False):
    """(R, n) scores, NaN where there is none -> (R, n), by how much each is above its siblings' mean
    (in their deviations with `spread`); 0 for NaN."""
    above = scores - scores.nanmean(1, keepdim=True)
    if spread:
        deviation = above.square().nanmean(1, keepdim=True).sqrt()
        above = above / (deviation + 1e-4)
    return above.nan_to_num(0.0)


def train(run, prompts, records, tokens, pixels, s):
    for step, batch in run.steps(training.shuffled(prompts, s.seed)):
        said = sample_answers(
            run.model, tokens, pixels, batch,
            n=s.n, temperature=s.temperature, max_new=s.max_new, seed=s.seed * run.total + step,
        )
        answered = [records[tree.id] | {"answers": found} for tree, found in zip(batch, said)]
        scores = judged(s, answered)                                         # (R, n)
        trees = []
        gains = {}
        for record, gain in zip(answered, advantages(scores, s.spread)):
            texts = [answer["text"] for answer in record["answers"]]
            trees.append(make_tree(tokens, record, texts))
            gains[record["id"]] = gain

        for part in run.packs(trees):
            logps = answer_logps(run.model, part.pack)                       # (R n,)
            gain = torch.cat([gains[tree.id] for tree in part.items]).to(logps.device)
            loss = -gain * logps
            run.backward(loss.sum() / scores.numel())
            run.record(loss=loss, logp=logps)
        row = run.update(score=scores.nanmean().item(), answers=scores.numel())
        print(f"{row['step']:6d}  score {row['score']:5.2f}  logp {row['logp']:7.2f}  "
              f"grad {row['grad_norm']:6.2f}")


def judged(s, records):
    """(R, n) S of every answer; NaN for one that was cut off, or that the judge did not score."""
    scores = torch.full((len(records), s.n), torch.nan)
    for k, record in enumerate(annotate.scored(s, records, Path(s.out))):
        for place, answer in enumerate(record["answers"]):
            if answer.get("scores") and usable(answer):
                scores[k, place] = RUBRIC.quality(answer)
    if scores.isnan().all():
        raise BadInput(f"--judge {s.judge} scored none of {len(records)} questions' answers")
    return scores


def run(s: Settings):
    if s.n < 2 or s.max_new < 1 or not s.judge:
        raise BadInput("--judge says who gives the scores; --n must be at least 2, --max_new 1")
    if s.judge != "oracle":
        door(s)
    records = {}

    def prompt_tree(tokens, record, longest):
        tree = make_tree(tokens, record, [])
        check_room(tree.length + s.max_new, longest)
        records[record["id"]] = record
        return [tree]

    s, device, dtype = training.door(s, full_lr=5e-7, adapter_lr=5e-5)
    if parallel.world() > 1:
        raise BadInput("grpo.py samples and judges in one process; start it without torchrun")
    found = training.read(s, prompt_tree)
    longest = array("i", [found.tokens.ends[0]]) * s.max_new                 # for the memory plan
    prompts = [replace(tree, answers=[longest] * s.n) for tree in found.trees]
    model = checkpoint.load(s.ckpt, device, dtype)
    steps = training.announce(s, model, prompts)
    calls = steps * min(s.batch, len(prompts))
    print(f"judge: {s.judge}, {calls} calls, {s.n} answers in each")
    depends = training.fingerprint(model, found)
    with training.begin(s, model, prompts, found.pixels.pack, steps, depends) as run:
        train(run, prompts, records, found.tokens, found.pixels, s)
    print(f"model: {training.finish(run, found.tokens)}")


if __name__ == "__main__":
    main(Settings, run)
