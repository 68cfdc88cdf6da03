"""The judge who cannot be wrong: what a sentence claims, whether it is true, and what that is worth.

A record of toy/tasks.py carries its questions with a full answer ("the circle is red .") and a bare one ("red").
Judging is then three small steps:

    claims     the words with content, in order: [circle, red]; all other words are grammar
    truth      1 if the claims hold the bare answer and stay within the full one; repeating the question earns
               nothing; lists and descriptions are told in part (F1), and are right only if nothing is missing
    form       claims masked, lists folded: is what remains the expected sentence, the bare word, or neither?

Five attributes, 0 to 4 as HelpSteer (arXiv:2311.09528) has them, follow from truth and form; nothing depends on
who answers, and wrong but wordy never beats right but terse (only a description is marked by degrees). The scorers of
the miniature benchmarks use the same two quantities.

    python -m toy.oracle           # its opinion of a few answers

Previous: toy/tasks.py.  Next: kernels/attention.py (what a token may see).
"""
import json
import re
from collections import Counter

from common import BadInput
from toy.tasks import items
from toy.world import CATEGORY, CONTENT, HOMES

# ---- truth and form --------------------------------------------------------------------------------

def claims(text: str) -> list[str]:
    """The words of `text` that can be true or false, in order: "the circle is red ." -> [circle, red]."""
    return [w for w in text.split() if w in CONTENT]


def skeleton(text: str) -> str:
    """`text` with its claims masked and its lists folded: what is left is form."""
    text = " ".join("_" if w in CONTENT else "~" if w in HOMES else w for w in text.split())
    text = re.sub(r"_( (, |and )?_)+", "_", text)
    return re.sub(r"a _ at _( (,|and) a _ at _)+", "a _ at _", text)


def form(turn: dict, text: str) -> str:
    """"full" or "bare" as the question expects them, else "other"."""
    if skeleton(text) == skeleton(turn["full"]):
        return "full"
    return "bare" if skeleton(text) == skeleton(turn["bare"]) else "other"


def within(short: list, long: list) -> bool:
    """Is `short` a subsequence of `long`?"""
    rest = iter(long)
    return all(w in rest for w in short)


def f1(got: Counter, want: Counter) -> float:
    return 2 * (got & want).total() / max(1, got.total() + want.total())


def facts(text: str) -> Counter:
    """What a description says: one fact per attribute, tied to the shape that carries it."""
    found = re.findall(r"(\S+) (\S+) (\S+)(?: at (\S+))?", re.sub(r"i see |\ba |, |and |\.", "", text))
    return Counter((t[2], v) for t in found for v in t if v)


def truth_share(turn: dict, text: str) -> float:
    """How much of the truth is told, 0 to 1; exactly 1 only for nothing missing and nothing invented."""
    got, full, bare = claims(text), claims(turn["full"]), claims(turn["bare"])
    if turn["kind"] == "describe":
        return f1(facts(text), facts(turn["full"]))
    if "members" in turn:                               # a list of the model's own choice
        good = [w for w in dict.fromkeys(got) if w in CATEGORY[turn["members"]]]
        if len(good) == len(got) == turn["n"] and good[0] == bare[0]:
            return 1.
        return min(.6, f1(Counter(good), Counter(bare)))
    if "set" in turn:
        return f1(Counter(got), Counter(bare))
    if within(bare, got) and within(got, full):
        return 1.
    subject = Counter(full) - Counter(bare)             # repeating the question earns nothing
    return min(.6, f1(Counter(got) - subject, Counter(bare)))


# ---- the five attributes ---------------------------------------------------------------------------

def judge(record: dict, text: str) -> tuple[dict, str]:
    """Five attributes, 0 to 4 as in HelpSteer, and a sentence why; exact, and blind to who answers.

    A full correct sentence gets helpfulness + correctness + coherence = 12, the bare correct word 9, a
    well-formed wrong sentence 5, a wrong word 3, gibberish at most 2."""
    asked, text = record["truth"]["turns"][-1], text.strip()
    share, shape, n = truth_share(asked, text), form(asked, text), len(text.split())
    correct = 4 if share == 1 else min(3 if asked["kind"] == "describe" else 2, round(4 * share))
    if correct >= 3:
        helpful = {"full": correct, "other": 3, "bare": 2}[shape]
    else:
        helpful = max(1, correct) if shape == "full" else 0
    coherent = {"full": 4, "bare": 3, "other": 2 if n and text.endswith(".") else min(n, 1)}[shape]
    scores = {"helpfulness": helpful, "correctness": correct, "coherence": coherent,
              "complexity": min(4, len(claims(text))), "verbosity": sum(n > b for b in (1, 4, 8, 16))}
    return scores, f"{shape} form, {share:.0%} of the truth; the answer is: {asked['full']}"


def exact_reply(record: dict, order: list[int], golden: bool) -> str:
    """What the oracle says about a record's answers, in the words of a judge: the JSON that rubric.py asks for.

    The answer at place p (A, B, ...) is record["answers"][order[p]]. Raises BadInput where the record is not of this world."""
    if "truth" not in record:
        raise BadInput(f"record {record['id']}: --judge oracle knows the truth about the miniature's records only")

    candidates = []
    for place, k in enumerate(order):
        scores, comment = judge(record, record["answers"][k]["text"])
        candidates.append({"id": chr(ord("A") + place), "comment": comment, **scores})

    reply = {"candidates": candidates}
    if golden:
        reply = {"golden_answer": record["truth"]["turns"][-1]["full"], **reply}
    return json.dumps(reply)


# ---- benchmarks ------------------------------------------------------------------------------------

def content(turn: dict, text: str) -> float:
    """Right or wrong, blind to length and style; a description is right by degrees."""
    share = truth_share(turn, text)
    return share if turn["kind"] == "describe" else float(share == 1)


def score_text(record: dict, answers: list[str]) -> dict:
    """MT-mini: 1 to 10 per turn. `core` is the content alone."""
    turns = record["truth"]["turns"]
    shapes, cores = [form(t, a) for t, a in zip(turns, answers)], [content(t, a) for t, a in zip(turns, answers)]
    marks = [1 + 9 * c * (.5 + .3 * (s == "full") + .2 * (s != "other")) for c, s in zip(cores, shapes)]
    return {"score": sum(marks) / 2, "core": sum(cores) / 2, "terse": shapes.count("bare") / 2,
            "words": sum(len(a.split()) for a in answers) / 2}


def score(bench: str, record: dict, text: str) -> float:
    """One item of "exist", "attribute", "describe" or "choice": 0 to 1. "exist" takes the word or the very sentence and nothing
    else; the mean over it is its balanced accuracy, for half of its items are true."""
    asked = record["truth"]["turns"][-1]
    return float(text.strip() in (asked["full"], asked["bare"])) if bench == "exist" else content(asked, text)


if __name__ == "__main__":
    for name in ("text", "exist", "attribute", "describe", "choice"):
        sample = items(name, 1)[0]
        print(f"[{name}]", " | ".join(t["question"] for t in sample["truth"]["turns"]))
        asked = sample["truth"]["turns"][-1]
        for answer in (asked["full"], asked["bare"], "the star is green .", "star star the"):
            print("   ", answer, "->", *judge(sample, answer))
