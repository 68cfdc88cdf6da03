"""MMBench (arXiv:2307.06281): 1,176 questions about pictures, answered with a letter of up to four.

Each stands in the table in every rotation of its options, rows index + k 1,000,000. Officially
(`circular`), a question counts only if it is answered rightly in all of them; `vanilla` counts the
unrotated rows. Letters are found as in VLMEvalKit, by rule; what shows none is wrong, not guessed.
"""
import base64
import csv
import re
from collections import defaultdict

from benchmarks.harness import Item, Official, llava_answers as read_answers, llava_rows, mean
from common import BadInput, shown

FORM = "5.1f"
SCALE = 100
FOLDER = "mmbench"
SOURCE = "github.com/open-compass/MMBench"
ANSWERS = "{model}.jsonl"
JUDGMENTS = ""

SUFFIX = "Answer with the option's letter from the given choices directly."
MILLION = 1_000_000


def items(folder):
    if not any(folder.path.rglob("*.tsv")) and any(folder.path.rglob("*.xlsx")):
        raise BadInput(f"--data_dir: {folder.path}/ holds an .xlsx, and its pictures and rotations "
                       f"stand in the .tsv only; take that from {SOURCE}")
    path = folder.find("*.tsv")
    csv.field_size_limit(1 << 27)
    with open(path, encoding="utf8", newline="") as f:
        rows = [Official(path, row) for row in csv.DictReader(f, delimiter="\t")]
    cells = {row["index"]: row.get("image") or "" for row in rows}
    found = []
    for row in rows:
        if not (row["index"] or "").isdecimal():
            raise BadInput(f"{path}: index {shown(str(row['index']))} is no number")
        number, row["options"] = int(row["index"]), options(row)
        hint = "" if absent(row["hint"]) else row["hint"] + "\n"
        if row.get("answer") not in row["options"]:
            raise BadInput(f"{path}: row {number} has no answer among its options; the test split "
                           "has none at all, take the dev split")
        listed = "".join(f"\n{letter}. {text}" for letter, text in row["options"].items())
        row["text"] = f"{hint}{row['question']}{listed}\n{SUFFIX}"

        name = f"{number % MILLION}.jpg"
        cell = cells[row["index"]]                     # a picture, or the row that has it
        unpack(cells.get(cell, cell), folder.unpacked / name)
        found.append(Item(number, ["<image>\n" + row["text"]], row, [name], str(folder.unpacked)))
    return found


def unpack(cell, path):
    """Write the picture that stands in a cell, once."""
    if cell and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.part")    # a kill leaves no half of it
        aside.write_bytes(base64.b64decode(cell))
        aside.replace(path)


def options(row):
    """Letter -> text, up to the first that is absent."""
    found = {}
    for letter in "ABCD":
        if absent(row[letter]):
            break
        found[letter] = row[letter]
    return found


def absent(cell):
    """LLaVA reads the table with pandas, which calls an empty cell nan."""
    return cell is None or cell.strip().lower() in ("", "nan", "none")


def answer_rows(items, model):
    rows = llava_rows(items, model)
    for row, item in zip(rows, items):
        texts = item.row["options"]
        row |= {"round_id": 0, "options": [*texts.values()], "option_char": [*texts]}
    return rows


def letter(text, texts):
    """The option {letter: text} that an answer names, by VLMEvalKit's rules; None where it is none,
    or several."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    named = [name for name in texts if name in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if found := re.search(r"answer is \*\*([A-D])\*\*", text):
        return found[1] if found[1] in texts else None
    if len(text) > 2 * sum(map(len, texts.values())):
        return None
    told = [name for name, option in texts.items() if option.lower() in text.lower()]
    return told[0] if len(told) == 1 else None


def score(items, rows=None):
    letters, vanilla = [], []
    rotations = defaultdict(list)          # question -> was each answered rightly? None: not at all
    for item in items:
        right = None
        if item.texts:
            letters.append(letter(item.texts[0], item.row["options"]))
            right = float(letters[-1] == item.row["answer"])
            if item.id < MILLION:
                vanilla.append(right)
        rotations[item.id % MILLION].append(right)
    circular = [min(rights) for rights in rotations.values() if None not in rights]
    return {
        "scores": {"circular": mean(circular), "vanilla": mean(vanilla)},
        "ok": len(letters),
        "total": len(items),
        "unknown": letters.count(None),
    }
