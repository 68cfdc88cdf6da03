"""Did it help, and what did it cost: the miniature's benchmarks, judged exactly.

A model is asked held-out questions and decodes greedily; every scorer is a pure function of record and answer
(oracle.py). Text and vision stand side by side, because the finding is about the trade between them:

    text        MT-mini: two turns without an image, the second asked after the model's *own* first answer; 1 to 10
    core        the same answers' content alone, blind to length and style: forgetting, without the style leak
    terse       share of text answers that are a bare word: the style leak, without the forgetting
    exist       POPE-mini: "is there a red one ?", half of them no; balanced accuracy
    attribute   color, size, shape or place of one thing among several; accuracy
    describe    facts told, F1;   choice  the right letter of three; accuracy
    judged      the judge's S = helpfulness + correctness + coherence on image questions, 0 to 12

    python evaluate.py --ckpt runs/dpo/model        (default: the shipped Vicuna-mini and LLaVA-mini)

Previous: steerlm.py.  Next: dpo.py (the remedy).
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import checkpoint
import oracle
import tasks
from annotate import sample
from common import BadInput, describe_run, device_and_dtype, main, write_jsonl, write_whole
from data import Pixels, Tokens, target_scores
from model import Llava
from records import quality

ITEMS = {"text": 165, "exist": 200, "attribute": 200, "describe": 100, "choice": 100}    # fixed, seeded, held out
MAX_NEW = 48                                                                             # words; the longest truth has 36


@dataclass
class Settings:
    """Score checkpoints on the miniature's benchmarks."""
    ckpt: str = "toy/vicuna,toy"   # checkpoint folders, comma-separated
    out: str = "runs/evaluate"     # answers and scores go here
    device: str = "auto"           # cpu, cuda, ...
    dtype: str = "auto"            # float32, bfloat16; auto: float32 on the CPU
    split: str = "test"            # which held-out items: test, or dev for choosing settings
    target: str = ""               # five scores to ask a SteerLM model for, such as "4 4 4 4 0"; empty: what its folder says


# ---- asking ---------------------------------------------------------------------------------------------------

def ask(model: Llava, tokens: Tokens, pixels: Pixels, items: list[dict], desc: str) -> list[str]:
    """The greedy answer to each record."""
    rows = sample(model, tokens, pixels, items, n=1, temperature=0.0, max_new=MAX_NEW, batch=64, desc=desc)
    return [row[0]["text"] for row in rows]


def ask_two_turns(model: Llava, tokens: Tokens, pixels: Pixels, items: list[dict], desc: str) -> list[list[str]]:
    """Both answers of each two-turn record; the second turn's prompt holds the model's own first answer."""
    firsts = ask(model, tokens, pixels, [r | {"messages": r["messages"][:1]} for r in items], desc)
    seconds = ask(model, tokens, pixels, [
        r | {"messages": [r["messages"][0], {"role": "assistant", "content": first}, r["messages"][2]]}
        for r, first in zip(items, firsts)], desc)
    return [list(pair) for pair in zip(firsts, seconds)]


# ---- scores ---------------------------------------------------------------------------------------------------

def mean(values: list[float]) -> dict:
    """{"mean", "ci" (95 %, normal approximation), "n"}."""
    n = len(values)
    m = sum(values) / n
    sd = math.sqrt(sum((v - m) ** 2 for v in values) / max(1, n - 1))
    return {"mean": m, "ci": 1.96 * sd / math.sqrt(n), "n": n}


def miniature(model: Llava, tokens: Tokens, folder: Path, name: str, split: str = "test") -> tuple[dict, list[dict]]:
    """All benchmarks of one model -> (scores by column, every answer with its record's id). Pictures go to `folder`."""
    pixels, scores, answers = Pixels(model.config), {}, []
    items = tasks.draw(tasks.items("text", ITEMS["text"], split), folder)
    pairs = ask_two_turns(model, tokens, pixels, items, f"{name}: text")
    marks = [oracle.score_text(r, pair) for r, pair in zip(items, pairs)]
    for column, key in (("text", "score"), ("core", "core"), ("terse", "terse"), ("words", "words")):
        scores[column] = mean([m[key] for m in marks])
    answers += [{"id": r["id"], "answers": pair} for r, pair in zip(items, pairs)]
    if not model.config.vision:
        return scores, answers
    judged = []
    for bench in ("exist", "attribute", "describe", "choice"):
        items = tasks.draw(tasks.items(bench, ITEMS[bench], split), folder)
        texts = ask(model, tokens, pixels, items, f"{name}: {bench}")
        scores[bench] = mean([oracle.score(bench, r, text) for r, text in zip(items, texts)])
        judged += [quality({"scores": oracle.judge(r, text)[0]}) for r, text in zip(items, texts)]
        answers += [{"id": r["id"], "answers": [text]} for r, text in zip(items, texts)]
    scores["judged"] = mean(judged)
    return scores, answers


def behind_a_picture(model: Llava, tokens: Tokens, folder: Path, name: str, split: str = "test") -> dict:
    """The text score with a random held-out picture before the first question: does the mere presence of an image hurt? The
    picture has nothing to do with the question (the paper's test, with an image that the model does see)."""
    items = tasks.draw(tasks.items("text", ITEMS["text"], split), folder)
    pictures = tasks.draw(tasks.items("exist", len(items), split, seed=1), folder / "unrelated")
    for record, other in zip(items, pictures):
        first, *rest = record["messages"]
        record |= {"images": other["images"], "root": other["root"],
                   "messages": [first | {"content": "<image>\n" + first["content"]}, *rest]}
    pairs = ask_two_turns(model, tokens, Pixels(model.config), items, f"{name}: behind a picture")
    return mean([oracle.score_text(r, pair)["score"] for r, pair in zip(items, pairs)])


COLUMNS = {"text": "5.2f", "core": "5.3f", "terse": "5.2f", "words": "5.1f", "exist": "5.3f", "attribute": "5.3f",
           "describe": "5.3f", "choice": "5.3f", "judged": "5.2f"}


def table(rows: dict[str, dict]) -> str:
    """Aligned: one row per model, "mean ±95 % interval" per column, "-" where a text-only model has no score."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{c:>13}" for c in COLUMNS)]
    for name, scores in rows.items():
        cells = [f"{scores[c]['mean']:{f}} ±{scores[c]['ci']:{f}}".replace("± ", "±") if c in scores else "-"
                 for c, f in COLUMNS.items()]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def score_checkpoint(folder: Path, name: str, pictures: Path, device, dtype, split: str = "test",
                     target: str = "") -> tuple[dict, list]:
    model = checkpoint.load(folder, device, dtype)
    tokens = Tokens(folder, model.config)
    if tokens.steer:
        tokens.steer["target"] |= target_scores(target) if target else {}
        print(f"{name}: every question asks for {', '.join(f'{name} {k}' for name, k in tokens.steer['target'].items())}")
    return miniature(model, tokens, pictures, name, split)


# ---- the script -----------------------------------------------------------------------------------------------

def run(s: Settings) -> None:
    out, rows = Path(s.out), {}
    if s.split not in ("dev", "test"):
        raise BadInput(f"--split {s.split}: dev or test")
    if s.target:
        target_scores(s.target)                                          # at the door, not after the first checkpoint
    device, dtype = device_and_dtype(s.device, s.dtype)
    for ckpt in s.ckpt.split(","):
        folder = checkpoint.resolve(ckpt)
        rows[ckpt], answers = score_checkpoint(folder, ckpt, out, device, dtype, s.split, s.target)
        write_jsonl(out / f"answers-{ckpt.strip('/').replace('/', '-')}.jsonl", answers)
    write_whole(out / "scores.json", json.dumps(describe_run(s, scores=rows), indent=1) + "\n")
    print(table(rows))
    print(f"answers and scores: {out}")


if __name__ == "__main__":
    main(Settings, run)
