"""Where preferences come from: sample n answers to each question, have them scored, choose a pair.

The recipe (arXiv:2402.10884). The model answers each image question n = 4 times at temperature > 0. A judge that
sees image, question and all four gives each five integers from 0 to 4 (HelpSteer's attributes). With

    S = helpfulness + correctness + coherence          (complexity and verbosity are recorded, not used)

a question is kept where max S - min S >= 2; chosen is the best answer, rejected a random one among those with
S <= max S - 2. The model is thus taught by its own answers: nothing it could not already say is asked of it.

Here: sampling (any checkpoint) and the paper's rule. Judges over HTTP come with judge.py; the miniature has an
exact one in oracle.py.

    answers = sample(model, tokens, pixels, records, n=4, temperature=1.0)

Previous: toy.py.  Next: evaluate.py (did it help).
"""
import random

from tqdm import tqdm

from common import sha
from data import Pixels, Tokens, make_tree
from model import Llava, generate
from records import quality

GAP = 2     # smallest difference in S between chosen and rejected (the paper's rule)


def answer_seed(seed: int, record_id: str, k: int) -> int:
    """The k-th answer's own seed: the same whatever stands before or beside it in the file."""
    return int(sha(str(seed), record_id, str(k))[:15], 16)


def sample(model: Llava, tokens: Tokens, pixels: Pixels, items: list[dict], *, n: int = 4, temperature: float = 1.0,
           top_p: float = 1.0, max_new: int = 1024, seed: int = 0, batch: int = 16, desc: str = "sampling") -> list[list[dict]]:
    """n answers {"text", "finish"} to each record. finish is "stop", or "length" where max_new cut the answer off."""
    out = []
    bar = tqdm(total=len(items), desc=desc, unit="rec", disable=None, leave=False)
    for start in range(0, len(items), batch):
        part = items[start:start + batch]
        trees = [make_tree(tokens, record, []) for record in part]
        seeds = [[answer_seed(seed, record["id"], k) for k in range(n)] for record in part]
        answers = generate(model, [t.prompt for t in trees], [pixels(t.images) for t in trees], n=n, max_new=max_new,
                           temperature=temperature, top_p=top_p, seeds=seeds, eos=tokens.eos)
        out += [[{"text": tokens.decode(a.ids), "finish": a.finish} for a in row] for row in answers]
        bar.update(len(part))
    bar.close()
    return out


def choose_pair(record: dict, gap: int = GAP, seed: int = 0) -> tuple[int, int] | None:
    """(chosen, rejected) as indices into the record's answers, by the paper's rule; None where there is no pair.

    A pair given in the data stands. Ties for the best go to the first; the rejected one is drawn with a seed of its
    own per record, so that neither order nor other records matter. Answers of equal text are never paired, nor is one
    that the token budget cut off (finish "length"): its end is not the model's, and must not be taught as one.
    """
    if record.get("pair"):
        return tuple(record["pair"])
    scored = [(k, quality(a)) for k, a in enumerate(record["answers"])
              if a.get("scores") and a.get("finish") != "length"]
    if not scored:
        return None
    best, top = max(scored, key=lambda ks: ks[1])
    text = record["answers"][best]["text"].strip()
    worse = [k for k, s in scored if s <= top - gap and record["answers"][k]["text"].strip() != text]
    return (best, random.Random(f"{seed}/{record['id']}").choice(worse)) if worse else None
