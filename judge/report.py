"""A look at scores and pairs before anything is trained on them.

How many records give a pair (data.choose_pair); how the scores are spread, for a judge that says 4
to everything says nothing; how the attributes go together (the paper's Fig. 3: whoever finds an
answer helpful finds it correct); whether chosen answers are simply the longer ones; and whether
the place at which an answer was shown decides: places are shuffled, so every place should hold the
best answer equally often.

    python annotate.py --data runs/annotate/records.jsonl --pairs --board runs/annotate/board.html
"""
import json
import math
import random
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from common import shown
from data import GAP, choose_pair
from judge.rubric import RUBRIC, conversation, letter
from judge.wire import jpeg, parts

SHOWN = 300     # records on a board; a page with thousands of pictures opens nowhere
SMALL = 320     # pixels on the longest side of a picture there


# ---- numbers ------------------------------------------------------------------------------------

def statistics(records: list[dict], gap: int = GAP, seed: int = 0) -> dict:
    """Yield, spread, correlations, lengths and the judge's position bias, as plain numbers."""
    qualities = []          # of each scored record: S of its scored answers
    grades = []             # of each scored answer: its grades, in the order of RUBRIC.attributes
    words = []              # of each pair: [words of the chosen answer, of the rejected one]
    for record in records:
        scored = [answer for answer in record["answers"] if answer.get("scores")]
        if scored:
            qualities.append([RUBRIC.quality(answer) for answer in scored])
        for answer in scored:
            grades.append([answer["scores"][name] for name in RUBRIC.attributes])
        pair = choose_pair(record, gap, seed)
        if pair:
            words.append([len(record["answers"][k]["text"].split()) for k in pair])

    grades = np.array(grades, int).reshape(-1, len(RUBRIC.attributes))   # (answers, attributes)
    chosen, rejected = np.array(words, int).reshape(-1, 2).T             # (pairs,) each
    counts = [np.bincount(column, minlength=RUBRIC.highest + 1).tolist() for column in grades.T]
    return {
        "records": len(records),
        "scored": len(qualities),
        "pairs": len(words),
        "gap": gap,
        "tied_best": sum(S.count(max(S)) > 1 for S in qualities),
        "all_equal": sum(len(set(S)) == 1 for S in qualities),
        "scores": dict(zip(RUBRIC.attributes, counts)),
        "correlations": correlations(grades),
        "words_chosen": mean(chosen),
        "words_rejected": mean(rejected),
        "chosen_longer": mean(chosen > rejected),
        "chosen_shorter": mean(chosen < rejected),
        "places": places(records),
        "versions": Counter((record.get("judge") or {}).get("version") for record in records),
    }


def mean(values) -> float | None:
    return float(values.mean()) if len(values) else None


def correlations(grades) -> list[list]:
    """(answers, attributes) -> (attributes, attributes); None where an attribute never varies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # it divides by the spread, which then is 0
        table = np.corrcoef(grades, rowvar=False).round(3)
    return [[None if math.isnan(x) else x for x in row] for row in table.tolist()]


def places(records: list[dict]) -> list[dict]:
    """For every place A, B, ... at which answers were shown: mean S there, how often the best one
    stood there (ties shared), and how often it would without bias; `ci` is the 95 % half-width of
    that share."""
    ranked = defaultdict(list)               # place -> [(S, share of the best, share without bias)]
    for record in records:
        answers = record["answers"]
        order = (record.get("judge") or {}).get("order", [])
        row = [RUBRIC.quality(answers[k]) for k in order if answers[k].get("scores")]
        if len(row) == len(answers):
            for place, S in enumerate(row):
                best = (S == max(row)) / row.count(max(row))
                ranked[place].append((S, best, 1 / len(row)))

    found = []
    for place, rows in sorted(ranked.items()):
        S, best, fair = np.mean(rows, axis=0).tolist()
        ci = 1.96 * math.sqrt(fair * (1 - fair) / len(rows))
        name = letter(place)
        found.append({"place": name, "n": len(rows), "S": S, "best": best, "fair": fair, "ci": ci})
    return found


def show(x: dict) -> str:
    """The statistics as a page of text."""
    if not x["scored"] and not x["pairs"]:
        return f"no scores in {x['records']} records"
    share = x["pairs"] / x["records"]
    unscored = x["records"] - x["scored"]
    lines = [
        f"pairs: {x['pairs']} of {x['records']} records ({share:.0%}) by S gap >= {x['gap']}; "
        f"{unscored} not scored, {x['all_equal']} with all answers equal, "
        f"{x['tied_best']} with a tie at the top"
    ]
    if x["pairs"]:
        lines.append(
            f"length: chosen {x['words_chosen']:.1f} words, rejected {x['words_rejected']:.1f}; "
            f"chosen is longer in {x['chosen_longer']:.0%} of the pairs, "
            f"shorter in {x['chosen_shorter']:.0%}"
        )
    if x["scored"]:
        lines.append(show_grades(x))
    versions = {name: n for name, n in x["versions"].items() if name}
    if len(versions) > 1:
        counts = [f"{n} by {shown(name)}" for name, n in versions.items()]
        lines.append(f"\nnot one judge but several: {', '.join(counts)}")
    if x["places"]:
        lines.append("\nposition bias: shown at  mean S  was best  (without bias)")
    for p in x["places"]:
        bias = f"{p['best']:10.1%}  ({p['fair']:.1%} ± {p['ci']:.1%})"
        lines.append(f"{p['place']:>23}{p['S']:8.2f}{bias}")
    return "\n".join(lines)


def show_grades(x) -> str:
    """A line for each attribute: how often each grade was given, their mean, the correlations."""
    grades = np.arange(RUBRIC.highest + 1)
    names = "".join(f"{name[:6]:>8}" for name in RUBRIC.attributes)
    head = "".join(f"{grade:>7}" for grade in grades)
    lines = [f"\nshare of answers{head}    mean    correlation with{names}"]
    for name, row in zip(RUBRIC.attributes, x["correlations"]):
        shares = np.array(x["scores"][name]) / sum(x["scores"][name])
        cells = "".join(f"{share:7.0%}" for share in shares) + f"{shares @ grades:8.2f}{'':20}"
        cells += "".join(f"{'-':>8}" if c is None else f"{c:8.2f}" for c in row)
        lines.append(f"{name:<16}{cells}")
    return "\n".join(lines)


# ---- for others ---------------------------------------------------------------------------------

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


def board(records: list[dict], root: Path, gap: int = GAP, seed: int = 0) -> str:
    """One self-contained page, board.html with the records in it: pictures embedded, nothing
    fetched. More than SHOWN records are sampled (seeded)."""
    title = "records and pairs"
    picked = range(len(records))
    if len(records) > SHOWN:
        picked = sorted(random.Random(seed).sample(picked, SHOWN))
        title += f" ({SHOWN} of {len(records)}, drawn with seed {seed})"
    rows = []
    for record in (records[k] for k in picked):
        rows.append(record | {
            "conversation": conversation(record),
            "pair": choose_pair(record, gap, seed),
            "pictures": [jpeg(Path(root, name), SMALL) for name in record["images"]],
        })

    rubric = {"attributes": RUBRIC.attributes, "ranked": RUBRIC.ranked}
    content = json.dumps({"title": title, "records": rows} | rubric)
    safe = content.replace("<", "\\u003c")               # no text can end the script it is in
    page = Path(__file__).with_name("board.html").read_text(encoding="utf8")
    return page.replace("CONTENT", safe)
