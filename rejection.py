"""The first rival: keep the best of n sampled answers, and tune on it as if a teacher wrote it.

    best = argmax over the n answers of S,      S = helpfulness + correctness + coherence

Also called best-of-n or rejection sampling (arXiv:2402.10884 after LLaMA-2's). It sees the same
scores as DPO and throws most of them away: that the best answer was better, never by how much nor
than what. And where all n answers are poor, it learns the least poor one; `--least` sets a bar (the
paper's file names speak of perfect scores: 12).

Ties are drawn with a seed of the record's own; answers that the token budget cut off do not count;
a record whose judge gave no scores is skipped, counted and listed.

    python rejection.py --ckpt llava-1.5-7b-hf --data runs/annotate/records.jsonl
"""
import random
from dataclasses import dataclass

import sft
from common import BadInput, main
from data import make_tree, scored_answers


@dataclass
class Settings(sft.Settings):
    """Supervised fine-tuning on the best of each record's scored answers."""
    out: str = "runs/rejection"  # run folder
    least: int = 0               # smallest S of an answer worth learning; 12: only perfect ones


def best(record, least=0, seed=0):
    """The index of the answer with the largest S; ties are drawn."""
    scored = scored_answers(record)
    if not scored:
        raise BadInput("has no whole answer with scores")
    top = max(quality for _, quality in scored)
    if top < least:
        raise BadInput(f"its best answer has S = {top}, less than --least {least}")
    tied = [k for k, quality in scored if quality == top]
    return random.Random(f"{seed}/{record['id']}").choice(tied)


def run(s: Settings):
    def best_tree(tokens, record, longest):
        answer = record["answers"][best(record, s.least, s.seed)]
        return [make_tree(tokens, record, [answer["text"]], max_length=longest)]

    sft.fit(s, best_tree)


if __name__ == "__main__":
    main(Settings, run)
