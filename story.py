"""The whole story on the miniature, in a minute or two: sample, judge, align, compare.

    1  before     Vicuna-mini, and LLaVA-mini, which visual instruction tuning made of it
    2  annotate   LLaVA-mini answers image questions four times each, an exact judge scores the answers
    3  align      direct preference optimization on the pairs that follow
    4  after      the same benchmarks again, on held-out items

    python story.py
"""
import time
from dataclasses import dataclass, replace
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import annotate
import checkpoint
import dpo
from common import BadInput, describe_run, device_and_dtype, main, write_json
from data import Tokens
from toy import items
from toy.tasks import write_prompts


@dataclass
class Settings(dpo.Settings):
    """The whole story on the miniature: sample, judge, align, compare."""
    out: str = "runs/story"      # run folder
    batch: int = 16              # pairs per optimizer step
    lr: float = 1e-4             # peak learning rate of a model this small (LOG.md)
    holdout: float = 0.1         # share of the pairs to measure preference accuracy on
    prompts: int = 1000          # image questions to sample answers for


def sample(ckpt, out, prompts: int, seed: int, device="auto", dtype="auto"):
    """Questions about pictures, four answers to each, judged -> `out`/records.jsonl."""
    answer(ckpt, write_prompts(prompts, seed, out), out, seed, device, dtype)


def answer(ckpt, asked, out, seed: int, device="auto", dtype="auto", max_new=48, batch=64):
    """Those of a file of questions -> `out`/records.jsonl."""
    annotate.annotate(annotate.Settings(
        ckpt=str(ckpt), data=str(asked), out=str(out), judge="oracle", seed=seed,
        temperature=1.0, max_new=max_new, batch=batch, device=device, dtype=dtype))


def run(s: Settings):
    if s.ckpt != "toy/llava" or s.data or s.dry_run:
        raise BadInput("the story is the miniature's; your own model and data are for dpo.py")
    out, began = Path(s.out), time.perf_counter()
    if (out / "model").exists():
        raise BadInput(f"{out} already holds a trained model; choose another --out or remove it")
    device, dtype = device_and_dtype(s.device, s.dtype)

    print("1. before: Vicuna-mini (text only) and LLaVA-mini (the same model after visual "
          "instruction tuning)")
    rows = {}
    for name, ckpt in (("Vicuna-mini", "toy/vicuna"), ("LLaVA-mini", "toy/llava")):
        folder = checkpoint.resolve(ckpt)
        model = checkpoint.load(folder, device, dtype)
        tokens = Tokens(folder, model.config)
        rows[name], _ = items.measure(model, tokens, out, name)
    print(items.table(rows))

    print(f"\n2. LLaVA-mini answers {s.prompts} image questions 4 times each; "
          "the exact judge scores them")
    sample(s.ckpt, s.out, s.prompts, s.seed, s.device, s.dtype)

    print("\n3. direct preference optimization")
    aligned = dpo.align(replace(s, data=f"{out}/records.jsonl"))

    rows["LLaVA-mini + DPO"], _ = items.measure(aligned, tokens, out, "aligned")
    seconds = round(time.perf_counter() - began, 1)
    write_json(out / "scores.json", describe_run(s, seconds=seconds, scores=rows))
    print(f"\n4. after, on held-out items (seed {s.seed}; the columns are explained in toy/items.py)")
    print(items.table(rows))
    print(f"\nscores: {out}/scores.json   next: step three again, at another rate: "
          f"python dpo.py --data {out}/records.jsonl --batch 16 --lr 5e-5 --out runs/again")


if __name__ == "__main__":
    main(Settings, run)
