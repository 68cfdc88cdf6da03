"""LLaVA-Bench in the wild (arXiv:2304.08485): 60 questions about 24 pictures; a judge that reads a
caption grades GPT-4's answer and the model's from 1 to 10.

Officially, `relative` is 100 mean(model) / mean(reference), rounded on the way. The official parser
splits the reply's first line at single spaces, so that "8, 9" is no pair of numbers, and averages
in [-1, -1] for what it cannot read; `parsed` reads any two numbers from 1 to 10, and no others.

The system message stands only in the official code (eval_gpt_review_bench.py): save it as
llava_bench_wild/system.txt, or another wording is used, and named in the result.
"""
import re
from collections import defaultdict

import numpy as np

from benchmarks.harness import Item, Prompt, mean, ratios, readable, stored
from benchmarks.harness import llava_answers as read_answers, llava_rows as answer_rows

FORM = "5.1f"
SCALE = 1
FOLDER = "llava_bench_wild"
SOURCE = ("huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild; rule.json from "
          "github.com/haotian-liu/LLaVA, llava/eval/table")
ANSWERS = "answers/{model}.jsonl"
JUDGMENTS = "reviews/{model}_{judge}.jsonl"
JUDGED = {
    "question_id": "a name or number",
    "category": "a text",
    "content": "a text",
    "tuple": "two numbers",
}

OURS = "You compare two answers to one question, carefully and without preference for either side."
TEMPLATE = """[Context]
{caption}

[Question]
{question}

[{role} 1]
{reference}

[End of {role} 1]

[{role} 2]
{answer}

[End of {role} 2]

[System]
{rule}

"""


def items(folder):
    root = f"{folder.path}/images"
    rows = stored(folder.find("questions.jsonl"), question_id="a name or number", text="a text",
                  image="a text", category="a text")
    return [Item(row["question_id"], ["<image>\n" + row["text"]], row, [row["image"]], root)
            for row in rows]


def prompts(folder, items, model):
    rules = folder.load("rule.json")
    contexts = folder.by("image", "context.jsonl")
    references = folder.by("question_id", "answers_gpt4.jsonl")
    system, wording = folder.text("system.txt", OURS)
    found = []
    for item in items:
        kind = f"llava_bench_{item.row['category']}"
        reference = references[item.id]
        text = TEMPLATE.format(
            caption=contexts[item.row["image"]]["caption"],
            question=item.row["text"],
            role=rules[kind]["role"],
            reference=reference["text"],
            answer=item.texts[0],
            rule=rules[kind]["prompt"],
        )
        row = {
            "question_id": item.id,
            "answer1_id": reference.get("answer_id"),
            "answer2_id": item.answer_id(model),
            "category": kind,
        }
        found.append(Prompt(item.id, text, system, row, wording))
    return found


def official(text):
    """LLaVA's parser: [-1, -1] where the first line is not two numbers with one space or comma."""
    parts = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        pair = [float(part) for part in parts]
    except ValueError:
        pair = []
    return pair if len(pair) == 2 else [-1, -1]


def read(text):
    """Two grades, 1 to 10, in the first line."""
    line = text.strip().split("\n")[0].strip(" ,")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)[\s,]+(\d+(?:\.\d+)?)\s*", line)
    grades = [float(grade) for grade in found.groups()] if found else [0]
    if not 1 <= min(grades) <= max(grades) <= 10:
        raise ValueError("its first line is not two numbers from 1 to 10")
    return grades


def judge_rows(prompts, replies, judge):
    rows = []
    for number, prompt in enumerate(prompts, 1):
        if text := replies.get(prompt.id):
            rows.append({"id": number} | prompt.row | {"content": text, "tuple": official(text)})
    return rows


def score(items, rows):
    last = {row["question_id"]: row["content"] for row in rows}
    parsed = [readable(read, text) for text in last.values()]
    parsed = [pair for pair in parsed if pair]
    pairs = [row["tuple"] for row in rows]
    kinds = defaultdict(list)
    for row in rows:
        kinds[row["category"].removeprefix("llava_bench_")].append(row["tuple"])
    scores = {
        "relative": as_published(pairs),
        "parsed": relative(parsed),
        "own grade": mean([10 * grade for _, grade in pairs]),
        "reference": mean([10 * grade for grade, _ in pairs]),
    }
    return {
        "scores": scores,
        "categories": {kind: as_published(mine) for kind, mine in kinds.items()},
        "ok": len(parsed),
        "total": len(items) or len(last),
    }


def relative(pairs):
    """100 sum(model) / sum(reference) of (reference, model)."""
    reference, model = np.reshape(pairs, (-1, 2)).T                        # (n,) each
    return ratios([(100 * model, reference, range(len(pairs)))])


def as_published(pairs):
    """The same with the official rounding: means to three digits, their ratio to one."""
    figure = relative(pairs)
    if figure["mean"] is not None:
        reference, model = (round(float(x), 3) for x in np.mean(pairs, 0))
        figure["mean"] = round(model / reference * 100, 1) if reference else None
    return figure
