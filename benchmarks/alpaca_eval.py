"""AlpacaEval 1 (github.com/tatsu-lab/alpaca_eval): 805 instructions; a judge says whether it
prefers the model's answer or text-davinci-003's, in an order drawn per instruction.

Officially, `win rate` is 100 mean(p - 1), where p is 2 if the model won, and a verdict counts only
if it is a bare Python list.

Judges like length. `controlled` asks what the win rate were at equal length, over all verdicts that
can be read, also those in a code fence or in prose. It is a logistic regression with one weight for
the model and one for length:

    P(model wins) = sigmoid(t + f tanh((length - length of the reference) / sd))
    controlled    = 100 sigmoid(t)

arXiv:2404.04475 adds a term for an instruction's difficulty, which takes other models' judgments.
So this is not AlpacaEval 2's length-controlled win rate, whose reference and judge are others, too.
"""
import ast
import random
import re

import numpy as np

from benchmarks.harness import Item, Prompt, mean, readable, stored
from common import sha

FORM = "5.1f"
SCALE = 1
FOLDER = "alpaca_eval"
SOURCE = "huggingface.co/datasets/tatsu-lab/alpaca_eval or github.com/tatsu-lab/alpaca_eval"
ANSWERS = "model_outputs.json"
JUDGMENTS = "annotations.json"
JUDGED = {
    "instruction": "a text",
    "output_1": "a text",
    "output_2": "a text",
    "preference": "a number or null",
}


def items(folder):
    rows = stored(folder.find("alpaca_eval*.json"), instruction="a text", output="a text")
    return [Item(sha(row["instruction"]), [row["instruction"]], row) for row in rows]


def answer_rows(items, model):
    rows = []
    for item in items:
        rows.append({
            "dataset": item.row.get("dataset"),
            "instruction": item.row["instruction"],
            "output": item.texts[0],
            "generator": model,
            "finish": item.finishes[0],
        })
    return rows


def read_answers(path, items):
    rows = stored(path, instruction="a text", output="a text")
    return {sha(row["instruction"]): [row["output"]] for row in rows}


def switched(instruction):
    """Is the model's answer shown first? Drawn as the official annotator draws it, seed 0."""
    generator = random.Random("is_switched_outputs" + instruction + "0")
    return generator.choices([False, True])[0]


def prompts(folder, items, model):
    template = folder.find("alpaca_eval.txt").read_text(encoding="utf8").strip()
    return [prompt(template, item, model) for item in items]


def prompt(template, item, model):
    """Filled as officially: the first {field} that stands there is replaced, one field after
    another, then the ChatML markers split the text into messages. A draw is not asked about."""
    instruction = item.row["instruction"]
    outputs = [item.row["output"], item.texts[0]]
    row = {
        "instruction": instruction,
        "output_1": outputs[0],
        "output_2": outputs[1],
        "generator_1": item.row.get("generator", "reference"),
        "generator_2": model,
        "dataset": item.row.get("dataset"),
    }
    if outputs[0] == outputs[1]:
        return Prompt(item.id, "", row=row)

    if switched(instruction):
        outputs.reverse()
    for name, value in zip(("instruction", "output_1", "output_2"), (instruction, *outputs)):
        template = template.replace("{" + name + "}", value, 1)
    messages = dict(re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", template, re.S))
    return Prompt(item.id, messages["user"].strip(), messages["system"].strip(), row)


def official(text):
    """The rank of model_1, 1 or 2, in a bare Python list."""
    try:
        ranks = {entry["model"]: entry["rank"] for entry in ast.literal_eval(text.strip())}
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        ranks = {}
    if ranks.get("model_1") not in (1, 2):
        raise ValueError("no list that ranks model_1 as 1 or 2")
    return ranks["model_1"]


def read(text):
    """The same from a list in a code fence or in prose."""
    found = re.search(r"\[\s*{.*?}\s*,?\s*\]", text, re.S)
    return official(found[0] if found else text)


def preference(read, text, instruction):
    """1 where the reference is preferred, 2 where the model, None where `read` finds no verdict."""
    rank = readable(read, text or "")
    return 3 - rank if rank and switched(instruction) else rank


def judge_rows(prompts, replies, judge):
    rows = []
    for prompt in prompts:
        text = replies.get(prompt.id)
        prefers = preference(official, text, prompt.row["instruction"]) if prompt.text else 1.5
        rows.append(prompt.row | {
            "annotator": judge,
            "raw_completion": text,
            "preference": prefers,
        })
    return rows


def score(items, rows):
    verdicts = [100 * won(row["preference"]) for row in rows if row["preference"] is not None]
    wins, longer = {}, {}                              # by instruction, where a verdict can be read
    for row in rows:
        instruction, prefers = row["instruction"], row["preference"]
        if prefers is None:
            raw = row.get("raw_completion")
            prefers = preference(read, raw if isinstance(raw, str) else "", instruction)
        if prefers is not None:
            wins[instruction] = won(prefers)
            longer[instruction] = len(row["output_2"]) - len(row["output_1"])
    controlled = at_equal_length([*wins.values()], [*longer.values()])
    return {
        "scores": {"win rate": mean(verdicts), "controlled": controlled},
        "length": mean([len(row["output_2"]) for row in rows])["mean"],
        "ok": len(wins),
        "total": len(items) or len({row["instruction"] for row in rows}),
    }


def won(prefers):
    """1, 0, or 0.5 for a draw, which older files write as 0."""
    return 0.5 if prefers in (0, 1.5) else prefers - 1


def at_equal_length(wins, longer, ridge=0.01):
    """The win rate in % at equal length: the regression above, by Newton's method.

    A little ridge on both weights keeps a model that always wins at a finite place.
    """
    if len(wins) == 0:
        return mean([])
    y, d = np.array(wins, float), np.array(longer, float)
    x = np.stack([np.ones_like(d), np.tanh(d / (d.std() or 1.0))])         # (2, n)
    weights = np.zeros(2)                                                  # t and f
    for _ in range(50):                                                    # some ten are enough
        p = 1 / (1 + np.exp(-weights @ x))
        hessian = x * (p * (1 - p)) @ x.T + ridge * np.eye(2)
        weights += np.linalg.solve(hessian, x @ (y - p) - ridge * weights)
    rate = 1 / (1 + np.exp(-weights[0]))
    spread = np.linalg.inv(hessian)[0, 0] ** 0.5       # of t; by the delta method, of the rate:
    return {"mean": 100 * rate, "ci": 196 * rate * (1 - rate) * spread, "n": len(wins)}
