"""MM-Vet (arXiv:2308.02490): 218 questions about pictures, each needing some of six abilities,
graded 0.0 to 1.0 by a judge that sees the right answer, not the picture.

The official tool re-asks, and after the fifth reply that is no number writes 0.0, so `total` counts
it as wrong; `parsed` leaves such replies out.

Its prompt stands only in its code (the string `prompt` of mm-vet_evaluator): save it as
mm_vet/prompt.txt, or another wording is used, and named in the result.
"""
import re

from benchmarks.harness import Item, Prompt, load, mean, readable, stored
from common import BadInput, field, shown

FORM = "5.1f"
SCALE = 1
FOLDER = "mm_vet"
SOURCE = "github.com/yuweihao/MM-Vet (mm-vet.zip)"
ANSWERS = "{model}.json"
JUDGMENTS = "{model}_{judge}-grade-1runs.json"
JUDGED = {"content": "a list", "score": "a list of numbers"}

OURS = """You grade an answer to a question about a picture that you cannot see, against what is \
known to be right. In the right answer, <AND> joins parts that are all needed, and <OR> parts of \
which any one will do. Say how much of it the given answer has: 0.0 for nothing, 1.0 for \
everything, tenths in between for a part. Wording does not matter; what goes beyond the right \
answer does no harm unless it contradicts it. Reply with that number alone.

Question | Right answer | Given answer | Grade"""


def items(folder):
    root = f"{folder.path}/images"
    fields = {"question": "a text", "answer": "a text", "imagename": "a text",
              "capability": "a list of texts"}
    return [Item(name, ["<image>\n" + row["question"]], row, [row["imagename"]], root)
            for name, row in stored(folder.find("mm-vet.json"), **fields).items()]


def answer_rows(items, model):
    return {item.id: item.texts[0] for item in items}


def read_answers(path, items):
    found = load(path)
    if not isinstance(found, dict):
        raise BadInput(f"{path}: must be one object, with an answer under each question's name")
    return {name: [field(found, name, "a text", path)] for name in found}


def prompts(folder, items, model):
    head, wording = folder.text("prompt.txt", OURS)
    found = []
    for item in items:
        truth = item.row["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        row = " | ".join([item.row["question"], truth, item.texts[0], ""])
        found.append(Prompt(item.id, f"{head}\n{row}", wording=wording))
    return found


def read(text):
    """The number, 0 to 1, that a reply begins with: all that the official tool sees, since it cuts
    replies off after three tokens."""
    found = re.match(r"[^\w.-]*(\d+(?:\.\d+)?|\.\d+)(?![\d.]*\d|/)", text)
    if not found or float(found[1]) > 1:
        raise ValueError("does not begin with a number from 0 to 1")
    return float(found[1])


def judge_rows(prompts, replies, judge):
    """Where there is no grade there is no entry, and the official tool asks again."""
    return {name: {"model": [judge], "content": [text], "score": [read(text)]}
            for name, text in replies.items()}


def score(items, rows):
    needed = {item.id: item.row["capability"] for item in items}
    unknown = sorted(rows.keys() - needed)
    if unknown:
        raise BadInput(f"grades of {shown(unknown[0])}, which is no question of mm-vet.json")
    graded, parsed = [], []                            # (question, grade), of each run
    for name, row in rows.items():
        for text, grade in zip(row["content"], row["score"]):
            graded.append((name, grade))
            if readable(read, str(text)) is not None:
                parsed.append((name, grade))

    abilities = {}                                     # each over the questions that need it
    for ability in sorted(set().union(*needed.values())):
        mine = [(name, grade) for name, grade in graded if ability in needed[name]]
        abilities[ability] = average(mine)
    return {
        "scores": {"total": average(graded), "parsed": average(parsed)},
        "categories": abilities,
        "ok": len({name for name, _ in parsed}),
        "total": len(items),
    }


def average(pairs):
    """100 times the mean grade; the runs of one question move together."""
    return mean([100 * grade for _, grade in pairs], [name for name, _ in pairs])
