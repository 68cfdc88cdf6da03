"""POPE (arXiv:2305.10355): is there such a thing in the picture? 8,910 questions, half of whose
answers are no, in three splits whose negatives get harder.

Officially, `F1` is the mean over the splits of the F1 of "yes", where an answer is no if its first
sentence has the word No, not or no, and yes otherwise, "", "NO" and "I cannot tell" included.
`words` knows yes, no and neither.

The official tool pairs answers with labels by their order, which is wrong for one of the two label
files in circulation; here picture and question decide.
"""
import re
from pathlib import Path

import numpy as np

from benchmarks.harness import Item, Official, ratios, stored
from benchmarks.harness import llava_rows as answer_rows
from common import BadInput, field, shown

FORM = "5.3f"
SCALE = 1
FOLDER = "pope"
SOURCE = "github.com/RUCAIBox/POPE (output/coco)"
ANSWERS = "{model}.jsonl"
JUDGMENTS = ""

SPLITS = ("adversarial", "popular", "random")
LABELLED = {"text": "a text", "label": "a text", "image": "a text"}
SUFFIX = "\nAnswer the question using a single word or phrase."


def items(folder):
    """The questions of LLaVA's file, if there is one, or of POPE's own, which have the labels."""
    known = Official(folder.path, {})
    for split in SPLITS:
        for path in folder.every(f"coco_pope_{split}.json"):
            for place, row in enumerate(stored(path, **LABELLED), 1):
                row["category"] = split
                row["place"] = place
                row["label"] = row["label"].lower()
                if row["label"] not in ("yes", "no"):
                    raise BadInput(f"{path}: row {place}: label {shown(row['label'])} is neither "
                                   "yes nor no")
                known[key(row)] = row
    if any(folder.path.rglob("llava_pope_test.jsonl")):
        rows = stored(folder.find("llava_pope_test.jsonl"), question_id="a name or number",
                      text="a text", category="a text", image="a text")
    else:
        rows = [row | {"question_id": number, "text": row["text"] + SUFFIX}
                for number, row in enumerate(known.values(), 1)]
    found, root = [], f"{folder.path}/val2014"
    for row in rows:
        row |= {name: known[key(row)][name] for name in ("label", "place")}
        found.append(Item(row["question_id"], ["<image>\n" + row["text"]], row, [row["image"]],
                          root, max_new=128))
    return found


def read_answers(paths, items):
    """LLaVA's file; or three, each named after its split, where rows stand in the labels' order: so
    POPE's own {question, answer} must come, which name no picture."""
    files = paths.split(",")
    found = {}
    for path in files:
        rows = stored(path)
        rows = [rows] if isinstance(rows, dict) else rows                # a .json of one line
        own = isinstance(rows[0], dict) and "answer" in rows[0]
        split = next((split for split in SPLITS if split in Path(path).name), None)
        by_place = own or len(files) > 1
        if by_place and not split:
            raise BadInput(f"--answers {path}: answers to one split need its name, one of "
                           f"{', '.join(SPLITS)}, in the file's; all three, comma-separated")
        asked = {item.id: item for item in items}
        if by_place:
            asked = {item.row["place"]: item for item in items if item.row["category"] == split}
        for number, row in enumerate(rows, 1):
            where = f"{path}: row {number}"
            text = field(row, "answer" if own else "text", "a text", where)
            prompt = field(row, "question" if own else "prompt", "a text", where, "")
            place = number
            if not own:
                place = field(row, "question_id", "a name or number", where)
            item = asked.get(place)
            if item and " " in prompt:
                check_prompt(prompt, item, where)
            if item:
                found[item.id] = [text]
    return found


def check_prompt(prompt, item, where):
    """Answers to other questions, or in another order, are not scored."""
    said = prompt.replace("<image>", "").strip().split("\n")[0].replace("imange", "image")
    _, _, question = key(item.row)
    if said != question:
        raise BadInput(f"{where} answers {shown(said)!r}, but question {item.id} is "
                       f"{shown(question)!r}")


def key(row):
    question = row["text"].split("\n")[0].replace("imange", "image")       # misspelt in older files
    return row["category"], row["image"], question


def official(text):
    """LLaVA's eval_pope.py."""
    said = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(said) else "yes"


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
