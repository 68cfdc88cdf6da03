"""POPE (arXiv:2305.10355): is there such a thing in the picture? 8,910 questions, half of whose
answers are no, in three splits whose negatives get harder.

Officially, `F1` is the mean over the splits of the F1 of "yes", where an answer is no if its first
sentence has the word No, not or no, and yes otherwise, "", "NO" and "I cannot tell" included.
`words` knows yes, no and neither.

The official tool pairs answers with labels by their order, which is wrong for one of the two label
files in circulation; here picture and question decide.
"""
import re

import numpy as np

from benchmarks.harness import Item, Official, load, ratios
from benchmarks.harness import llava_answers as read_answers, llava_rows as answer_rows

FORM = "5.3f"
SCALE = 1
FOLDER = "pope"
SOURCE = "github.com/RUCAIBox/POPE (output/coco)"
ANSWERS = "{model}.jsonl"
JUDGMENTS = ""

SUFFIX = "\nAnswer the question using a single word or phrase."


def items(folder):
    """The questions of LLaVA's file, if there is one, or of POPE's own, which have the labels."""
    known = Official(folder.path, {})
    for split in ("adversarial", "popular", "random"):
        for path in folder.every(f"coco_pope_{split}.json"):
            for row in load(path):
                row["category"] = split
                known[key(row)] = row
    if any(folder.path.rglob("llava_pope_test.jsonl")):
        rows = folder.load("llava_pope_test.jsonl")
    else:
        rows = [row | {"question_id": number, "text": row["text"] + SUFFIX}
                for number, row in enumerate(known.values(), 1)]
    found, root = [], f"{folder.path}/val2014"
    for row in rows:
        row["label"] = known[key(row)]["label"]
        found.append(Item(row["question_id"], ["<image>\n" + row["text"]], row, [row["image"]],
                          root, max_new=128))
    return found


def key(row):
    question = row["text"].split("\n")[0].replace("imange", "image")       # misspelt in older files
    return row["category"], row["image"], question


def official(text):
    """LLaVA's eval_pope.py."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def words(text):
    """yes, no or unknown, by the words of the first sentence."""
    sentence = re.split(r"[.!?\n]", text.strip().lower().replace("’", "'"))[0]
    said = " ".join(re.findall(r"[a-z]+(?:'t)?", sentence))
    if first := re.match(r"(yes|yeah|yep|no|nope)\b", said):
        return "yes" if first[1].startswith("y") else "no"
    if re.search(r"\b(cannot|can't|unsure|unclear|sure|maybe|possibly)\b", said):
        return "unknown"
    if re.search(r"\b(no|not|none|nothing)\b|'t\b", said):
        return "no"
    return "yes" if re.search(r"\byes\b|^there (is|are)\b", said) else "unknown"


def score(items, rows=None):
    answered = [item for item in items if item.texts]
    officially, repaired = [], []
    categories = {}
    for split in dict.fromkeys(item.row["category"] for item in answered):
        mine = [item for item in answered if item.row["category"] == split]
        images = [item.images[0] for item in mine]
        true = np.array([item.row["label"] == "yes" for item in mine], int)
        yes = np.array([official(item.texts[0]) == "yes" for item in mine], int)
        told = np.array([words(item.texts[0]) == "yes" for item in mine], int)
        ones = np.ones_like(true)
        shares = {
            "F1": (2 * true * yes, true + yes),                            # 2 TP / (2 TP + FP + FN)
            "accuracy": (true == yes, ones),
            "precision": (true * yes, yes),
            "recall": (true * yes, true),
            "yes": (yes, ones),
        }
        for name, (a, b) in shares.items():
            categories[f"{split} {name}"] = ratios([(a, b, images)])
        officially.append((*shares["F1"], images))
        repaired.append((2 * true * told, true + told, images))
    return {
        "scores": {"F1": ratios(officially), "words": ratios(repaired)},
        "categories": categories,
        "ok": len(answered),
        "total": len(items),
        "unknown": sum(words(item.texts[0]) == "unknown" for item in answered),
    }
