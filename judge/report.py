"""A look at scores and pairs before anything is trained on them.

How many records give a pair (data.choose_pair); how the scores are spread, for a judge that says 4 to everything says
nothing; how the attributes go together (the paper's Fig. 3: whoever finds an answer helpful finds it correct); whether
chosen answers are simply the longer ones; and whether the place at which an answer was shown decides: places are shuffled,
so every place should hold the best answer equally often.

    python annotate.py --data runs/annotate/records.jsonl --pairs --board board.html
"""
import json
import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import GAP, choose_pair
from judge.rubric import RUBRIC, conversation, letter
from judge.wire import jpeg
from vision import image_path

SHOWN = 300     # records on a board; a page with thousands of pictures opens nowhere
SMALL = 320     # pixels on the longest side of a picture there


# ---- numbers ----------------------------------------------------------------------------------------------------

def statistics(records: list[dict], gap: int = GAP, seed: int = 0) -> dict:
    """Yield, spread, correlations, lengths and the judge's position bias, as plain numbers."""
    qualities = []          # of each scored record: S of its scored answers
    grades = []             # of each scored answer: its grades, in the order of RUBRIC.attributes
    words = []              # of each pair: [words of the chosen answer, of the rejected one]
    for record in records:
        answers = record["answers"]
        scored = [answer for answer in answers if answer.get("scores")]
        if scored:
            qualities.append([RUBRIC.quality(answer) for answer in scored])
        for answer in scored:
            grades.append([answer["scores"][name] for name in RUBRIC.attributes])
        pair = choose_pair(record, gap, seed)
        if pair:
            words.append([len(answers[k]["text"].split()) for k in pair])

    grades = np.array(grades, int).reshape(-1, len(RUBRIC.attributes))                   # (answers, attributes)
    words = np.array(words, int).reshape(-1, 2)                                          # (pairs, 2)
    longer = words[:, 0] - words[:, 1]
    return {
        "records": len(records),
        "scored": len(qualities),
        "pairs": len(words),
        "gap": gap,
        "tied_best": sum(S.count(max(S)) > 1 for S in qualities),
        "all_equal": sum(len(set(S)) == 1 for S in qualities),
        "scores": {
            name: np.bincount(column, minlength=RUBRIC.highest + 1).tolist()
            for name, column in zip(RUBRIC.attributes, grades.T)
        },
        "correlations": correlations(grades),
        "words_chosen": mean(words[:, 0]),
        "words_rejected": mean(words[:, 1]),
        "chosen_longer": mean(longer > 0),
        "chosen_shorter": mean(longer < 0),
        "places": places(records),
    }


def mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def correlations(grades: np.ndarray) -> list[list]:
    """(answers, attributes) -> (attributes, attributes); None for an attribute that never varies."""
    centred = grades - grades.mean(0) if len(grades) else grades
    length = np.sqrt((centred ** 2).sum(0))
    with np.errstate(invalid="ignore"):
        table = centred.T @ centred / np.outer(length, length)
    return [[None if math.isnan(x) else round(float(x), 3) for x in row] for row in table]


def places(records: list[dict]) -> list[dict]:
    """For every place A, B, ... at which answers were shown: mean S there, how often the best one stood there (ties shared),
    and how often it would without bias; `ci` is the 95 % half-width of that share."""
    shown = defaultdict(list)                                    # place -> [(S, share of the best, share without bias)]
    for record in records:
        answers = record["answers"]
        order = (record.get("judge") or {}).get("order", [])
        row = [RUBRIC.quality(answers[k]) for k in order if answers[k].get("scores")]
        if len(row) == len(answers):
            for place, S in enumerate(row):
                best = (S == max(row)) / row.count(max(row))
                shown[place].append((S, best, 1 / len(row)))

    found = []
    for place, rows in sorted(shown.items()):
        S, best, fair = np.mean(rows, axis=0).tolist()
        ci = 1.96 * math.sqrt(fair * (1 - fair) / len(rows))
        found.append({"place": letter(place), "n": len(rows), "S": S, "best": best, "fair": fair, "ci": ci})
    return found


def show(x: dict) -> str:
    """The statistics as a page of text."""
    if not x["scored"] and not x["pairs"]:
        return f"no scores in {x['records']} records"
    lines = [
        f"pairs: {x['pairs']} of {x['records']} records ({x['pairs'] / x['records']:.0%}) by S gap >= {x['gap']}; "
        f"{x['records'] - x['scored']} not scored, {x['all_equal']} with all answers equal, "
        f"{x['tied_best']} with a tie at the top"
    ]
    if x["pairs"]:
        lines.append(f"length: chosen {x['words_chosen']:.1f} words, rejected {x['words_rejected']:.1f}; chosen is longer "
                     f"in {x['chosen_longer']:.0%} of the pairs, shorter in {x['chosen_shorter']:.0%}")
    if x["scored"]:
        grades = "".join(f"{grade:>7}" for grade in range(RUBRIC.highest + 1))
        names = "".join(f"{name[:6]:>8}" for name in RUBRIC.attributes)
        lines.append(f"\nshare of answers{grades}    mean    correlation with{names}")
    for name, row in zip(RUBRIC.attributes, x["correlations"]):
        counts = np.array(x["scores"][name])
        if counts.any():
            shares = "".join(f"{share:7.0%}" for share in counts / counts.sum())
            average = counts @ np.arange(len(counts)) / counts.sum()
            cells = "".join("       -" if c is None else f"{c:8.2f}" for c in row)
            lines.append(f"{name:<16}{shares}{average:8.2f}{'':20}{cells}")
    if x["places"]:
        lines.append("\nposition bias: shown at  mean S  was best  (without bias)")
    for p in x["places"]:
        lines.append(f"{p['place']:>23}{p['S']:8.2f}{p['best']:10.1%}  ({p['fair']:.1%} ± {p['ci']:.1%})")
    return "\n".join(lines)


# ---- for others -------------------------------------------------------------------------------------------------

def to_trl(record: dict, pair: tuple[int, int]) -> dict:
    """TRL's conversational preference format, image markers as content parts."""
    chosen, rejected = (record["answers"][k]["text"] for k in pair)
    return {
        "id": record["id"],
        "prompt": [{"role": m["role"], "content": parts(m["content"])} for m in record["messages"]],
        "chosen": [{"role": "assistant", "content": parts(chosen)}],
        "rejected": [{"role": "assistant", "content": parts(rejected)}],
        "images": record["images"],
    }


def parts(content: str) -> list[dict]:
    """"<image>\\nWhat?" -> [{"type": "image"}, {"type": "text", "text": "What?"}]."""
    found = []
    for k, text in enumerate(content.replace("<image>\n", "<image>").split("<image>")):
        if k:
            found.append({"type": "image"})
        if text:
            found.append({"type": "text", "text": text})
    return found


def board(records: list[dict], root: Path, gap: int = GAP, seed: int = 0, title: str = "records and pairs") -> str:
    """One self-contained page, board.html with the records in it: pictures embedded, nothing fetched. More than SHOWN records
    are sampled (seeded)."""
    shown = range(len(records))
    if len(records) > SHOWN:
        shown = sorted(random.Random(seed).sample(shown, SHOWN))
        title += f" ({SHOWN} of {len(records)}, drawn with seed {seed})"

    rows = []
    for record in (records[k] for k in shown):
        rows.append({
            "id": record["id"],
            "judge": record.get("judge"),
            "pictures": [jpeg(image_path(root, name), SMALL) for name in record["images"]],
            "conversation": conversation(record),
            "answers": record["answers"],
            "golden": record.get("golden"),
            "pair": choose_pair(record, gap, seed),
        })
    content = {"title": title, "attributes": RUBRIC.attributes, "ranked": RUBRIC.ranked, "records": rows}
    safe = json.dumps(content).replace("<", "\\u003c")           # no text can end the script that holds it
    return Path(__file__).with_name("board.html").read_text(encoding="utf8").replace("CONTENT", safe)
