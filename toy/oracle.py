"""The judge who cannot be wrong: what a sentence claims, whether it is true, and what that is
worth.

A record of tasks.py carries its questions with a full answer ("the circle is red .") and a bare one
("red"). Judging is then three small steps:

    claims     the words with content, in order: [circle, red]; all other words are grammar
    truth      1 if the claims hold the bare answer and stay within the full one; repeating the
               question earns nothing; lists and descriptions are told in part (F1)
    form       claims masked, lists folded: the expected sentence, the bare word, or neither?

Five attributes, 0 to 4 as HelpSteer (arXiv:2311.09528) has them, follow from truth and form.
Nothing depends on who answers, and wrong but wordy never beats right but terse (only a description
is marked by degrees). The scorers of the miniature's benchmarks use the same two quantities.
"""
import json
import re
from collections import Counter

from common import BadInput
from toy.english import plain
from toy.world import CATEGORY, CONTENT, HOMES

# ---- truth and form ------------------------------------------------------------------------------

def claims(text):
    """The words that can be true or false, in order: "the circle is red ." -> [circle, red]."""
    return [word for word in text.split() if word in CONTENT]


def skeleton(text):
    """`text` with its claims masked and its lists folded: what is left is form."""
    words = ["_" if w in CONTENT else "~" if w in HOMES else w for w in text.split()]
    text = re.sub(r"_( (, |and )?_)+", "_", " ".join(words))
    return re.sub(r"a _ at _( (,|and) a _ at _)+", "a _ at _", text)


def form(turn, text):
    """"full" or "bare" as the question expects them, else "other"."""
    shape = skeleton(text)
    if shape == skeleton(turn["full"]):
        return "full"
    return "bare" if shape == skeleton(turn["bare"]) else "other"


def within(short, long):
    """Is `short` a subsequence of `long`?"""
    rest = iter(long)                                   # `in` goes on behind what it has found
    return all(word in rest for word in short)


def f1(got, want):
    got, want = Counter(got), Counter(want)
    return 2 * (got & want).total() / max(1, got.total() + want.total())


def facts(text) -> Counter:
    """What a description says: one fact per attribute, tied to the shape that carries it."""
    bare = re.sub(r"i see |\ba |, |and |\.", "", text)
    found = Counter()
    for size, color, shape, place in re.findall(r"(\S+) (\S+) (\S+)(?: at (\S+))?", bare):
        found.update((shape, value) for value in (size, color, shape, place) if value)
    return found


def truth_share(turn, text) -> float:
    """How much of the truth is told, 0 to 1; 1 only if nothing is missing and nothing invented."""
    got = claims(text)
    full = claims(turn["full"])
    bare = claims(turn["bare"])
    if turn["kind"] == "describe":
        return f1(facts(text), facts(turn["full"]))

    # a list of the model's own choice: the right number of different members, beginning where asked
    if "members" in turn:
        members = CATEGORY[turn["members"]]
        good = [word for word in dict.fromkeys(got) if word in members]
        if len(good) == len(got) == turn["n"] and good[0] == bare[0]:
            return 1.
        return min(.6, f1(good, bare))

    if "set" in turn:
        return f1(got, bare)
    if within(bare, got) and within(got, full):
        return 1.
    question = Counter(full) - Counter(bare)            # repeating it earns nothing
    return min(.6, f1(Counter(got) - question, bare))


def in_our_words(record, text):
    """An answer without spaces around it; one in English as the miniature would have said it."""
    return plain(text) if record["truth"].get("english") else text.strip()


# ---- the five attributes -------------------------------------------------------------------------

def judge(record: dict, text: str) -> tuple[dict, str]:
    """Five attributes, 0 to 4 as in HelpSteer, and a sentence why; exact, and blind to who answers.

    A full correct sentence gets helpfulness + correctness + coherence = 12, the bare correct word
    9, a well-formed wrong sentence 5, a wrong word 3, gibberish at most 2."""
    asked = record["truth"]["turns"][-1]
    text = in_our_words(record, text)
    share = truth_share(asked, text)
    shape = form(asked, text)
    words = len(text.split())

    correct = 4
    if share < 1:
        correct = min(3 if asked["kind"] == "describe" else 2, round(4 * share))

    if correct >= 3:
        helpful = {"full": correct, "other": 3, "bare": 2}[shape]
    else:
        helpful = max(1, correct) if shape == "full" else 0

    other = 2 if text.endswith(".") else min(words, 1)
    scores = {
        "helpfulness": helpful,
        "correctness": correct,
        "coherence": {"full": 4, "bare": 3, "other": other}[shape],
        "complexity": min(4, len(claims(text))),
        "verbosity": sum(words > bound for bound in (1, 4, 8, 16)),
    }
    return scores, f"{shape} form, {share:.0%} of the truth; the answer is: {asked['full']}"


def exact_reply(record: dict, order: list[int], golden: bool) -> str:
    """What the oracle says about a record's answers, in the words of a judge: the JSON of
    judge/rubric.py.

    The answer at place p (A, B, ...) is record["answers"][order[p]]."""
    if "truth" not in record:
        raise BadInput(f"record {record['id']}: --judge oracle knows the truth about the "
                       "miniature's records only")

    candidates = []
    for place, k in enumerate(order):
        scores, comment = judge(record, record["answers"][k]["text"])
        candidates.append({"id": chr(ord("A") + place), "comment": comment, **scores})

    reply = {"candidates": candidates}
    if golden:
        reply = {"golden_answer": record["truth"]["turns"][-1]["full"], **reply}
    return json.dumps(reply)


# ---- benchmarks ----------------------------------------------------------------------------------

def content(turn, text):
    """Right or wrong, blind to length and style; a description is right by degrees."""
    share = truth_share(turn, text)
    return share if turn["kind"] == "describe" else float(share == 1)


def mark(turn, text):
    """MT-mini: 1 to 10 for one turn, half of it for content, half for saying it in a sentence."""
    right, shape = content(turn, text), form(turn, text)
    return 1 + 9 * right * (.5 + .3 * (shape == "full") + .2 * (shape != "other"))


def score_text(record: dict, answers: list[str]) -> dict:
    """The mean of both turns' marks. `core` is the content alone."""
    turns = record["truth"]["turns"]
    asked = list(zip(turns, answers))
    return {
        "text": sum(mark(turn, text) for turn, text in asked) / 2,
        "core": sum(content(turn, text) for turn, text in asked) / 2,
        "terse": sum(form(turn, text) == "bare" for turn, text in asked) / 2,
        "words": sum(len(text.split()) for _, text in asked) / 2,
    }


def score(bench: str, record: dict, text: str) -> float:
    """One item of "exist", "attribute", "describe" or "choice": 0 to 1.

    "exist" takes the word or the very sentence and nothing else; the mean over it is its balanced
    accuracy, for half of its items are true."""
    asked = record["truth"]["turns"][-1]
    text = in_our_words(record, text)
    if bench == "exist":
        return float(text in (asked["full"], asked["bare"]))
    return content(asked, text)
