"""The whole story on the miniature, in a minute or two: sample, judge, align, compare.

    1  before     Vicuna-mini, and LLaVA-mini, which visual instruction tuning made of it: what each can do
    2  annotate   LLaVA-mini answers image questions four times each, an exact judge scores the answers
    3  align      direct preference optimization on the pairs that follow
    4  after      the same benchmarks again, on held-out items

    python story.py

Previous: dpo.py.  Next: toy/figures.py (how an experiment looks).
"""
import json
import time
from dataclasses import dataclass, replace

import common  # first: it tells OpenMP how to wait
import annotate
import checkpoint
import dpo
from toy import items as miniature
from common import BadInput, describe_run, device_and_dtype, main, write_whole
from data import Tokens


@dataclass
class Settings(dpo.Settings):
    """The whole story on the miniature: sample, judge, align, compare."""
    batch: int = 16              # pairs per optimizer step
    lr: float = 1e-4             # peak learning rate of a model this small (best judged on dev items, LOG.md)
    holdout: float = 0.1         # share of the pairs kept out of training, to measure preference accuracy on
    prompts: int = 1000          # image questions to sample answers for


def run(s: Settings) -> None:
    if s.dry_run:
        return dpo.run(s)
    if s.ckpt != "toy/llava" or s.data:
        raise BadInput("the story is the miniature's; your own model and data are for dpo.py, with the same flags")
    out = dpo.run_folder(s)
    out.mkdir(parents=True, exist_ok=True)
    device, dtype = device_and_dtype(s.device, s.dtype)
    toy, began = checkpoint.resolve("toy/llava"), time.perf_counter()
    print("1. before: Vicuna-mini (text only) and LLaVA-mini (the same model after visual instruction tuning)")
    rows = {name: miniature.score_checkpoint(folder, name, out, device, dtype)[0]
            for name, folder in (("Vicuna-mini", toy.parent / "vicuna"), ("LLaVA-mini", toy))}
    print(miniature.table(rows))

    sampling = annotate.Story(out=str(out), prompts=s.prompts, seed=s.seed, device=s.device, dtype=s.dtype)
    print(f"\n2. LLaVA-mini answers {s.prompts} image questions {sampling.n} times each; the exact judge scores them")
    annotate.annotate(annotate.miniature(sampling))

    print("\n3. direct preference optimization")
    aligned = dpo.align(replace(s, data=str(out / "records.jsonl")), out)
    if s.steps == 0:
        return
    rows["LLaVA-mini + DPO"] = miniature.measure(aligned, Tokens(toy, aligned.config), out, "aligned")[0]
    seconds = round(time.perf_counter() - began, 1)
    write_whole(out / "scores.json", json.dumps(describe_run(s, seconds=seconds, scores=rows)) + "\n")
    print(f"\n4. after, on held-out items (seed {s.seed}; the columns are explained in toy/items.py)")
    print(miniature.table(rows))
    print(f"\nscores: {out}/scores.json   next: the same on records of your own, "
          f"python dpo.py --ckpt toy/llava --data {out}/records.jsonl --batch 16 --lr 1e-4")


if __name__ == "__main__":
    main(Settings, run)
