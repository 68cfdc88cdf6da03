"""The miniature's benchmarks, judged exactly: what a model can do in a world whose truth is known.

A model is asked held-out questions and decodes greedily; every scorer is a pure function of record and answer
(toy/oracle.py). Text and vision stand side by side, because the finding is about the trade between them:

    text        MT-mini: two turns without an image, the second asked after the model's *own* first answer; 1 to 10
    core        the same answers' content alone, blind to length and style: forgetting, without the style leak
    terse       share of text answers that are a bare word: the style leak, without the forgetting
    exist       POPE-mini: "is there a red one ?", half of them no; balanced accuracy
    attribute   color, size, shape or place of one thing among several; accuracy
    describe    facts told, F1;   choice  the right letter of three; accuracy
    judged      the judge's S = helpfulness + correctness + coherence on image questions, 0 to 12

They run with no judge and no download, which is what `python evaluate.py` does unless told otherwise.

Previous: benchmarks/harness.py.  Next: benchmarks/text.py (the published ones).
"""
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import checkpoint
from toy import oracle
from toy import tasks
from benchmarks.harness import Item, aligned, answer, mean, shown, steer
from common import BadInput
from data import Pixels, Tokens
from model import Llava
from formats import quality

ITEMS = {"text": 165, "exist": 200, "attribute": 200, "describe": 100, "choice": 100}    # fixed, seeded, held out
MAX_NEW = 48                                                                             # words; the longest truth has 36


# ---- asking ---------------------------------------------------------------------------------------------------

def ask(model: Llava, tokens: Tokens, items: list[dict], desc: str) -> list[list[str]]:
    """The greedy answers to each record's questions, the second turn's prompt with the model's own first answer in it.
    Raises BadInput where one could not be answered: all of them are ours."""
    asked = [Item(r["id"], [m["content"] for m in r["messages"] if m["role"] == "user"], r, r["images"], r["root"],
                  max_new=MAX_NEW) for r in items]
    said, failed = answer(asked, lambda: model, tokens, Pixels(model.config), batch=64, desc=desc)
    if failed:
        raise BadInput("; ".join(f"{name}: {reason}" for name, reason in list(failed.items())[:3]))
    return [[a["text"] for a in said[r["id"]]] for r in items]


# ---- scores ---------------------------------------------------------------------------------------------------

def measure(model: Llava, tokens: Tokens, folder: Path, name: str, split: str = "test") -> tuple[dict, list[dict]]:
    """All benchmarks of one model -> (scores by column, every answer with its record's id). Pictures go to `folder`."""
    scores, answers, judged = {}, [], []
    for bench in ITEMS if model.config.vision else ["text"]:
        items = tasks.draw(tasks.items(bench, ITEMS[bench], split), folder)
        said = ask(model, tokens, items, f"{name}: {bench}")
        answers += [{"id": r["id"], "answers": texts} for r, texts in zip(items, said)]
        if bench == "text":
            marks = [oracle.score_text(r, texts) for r, texts in zip(items, said)]
            for column, key in (("text", "score"), ("core", "core"), ("terse", "terse"), ("words", "words")):
                scores[column] = mean([m[key] for m in marks])
        else:
            scores[bench] = mean([oracle.score(bench, r, text) for r, (text,) in zip(items, said)])
            judged += [quality({"scores": oracle.judge(r, text)[0]}) for r, (text,) in zip(items, said)]
    return scores | ({"judged": mean(judged)} if judged else {}), answers


def behind_a_picture(model: Llava, tokens: Tokens, folder: Path, name: str, split: str = "test") -> dict:
    """The text score with a random held-out picture before the first question: does the mere presence of an image hurt? The
    picture has nothing to do with the question (the paper's test, with an image that the model does see)."""
    items = tasks.draw(tasks.items("text", ITEMS["text"], split), folder)
    pictures = tasks.draw(tasks.items("exist", len(items), split, seed=1), folder / "unrelated")
    for record, other in zip(items, pictures):
        first, *rest = record["messages"]
        record |= {"images": other["images"], "root": other["root"],
                   "messages": [first | {"content": "<image>\n" + first["content"]}, *rest]}
    pairs = ask(model, tokens, items, f"{name}: behind a picture")
    return mean([oracle.score_text(r, pair)["score"] for r, pair in zip(items, pairs)])


COLUMNS = {"text": "5.2f", "core": "5.3f", "terse": "5.2f", "words": "5.1f", "exist": "5.3f", "attribute": "5.3f",
           "describe": "5.3f", "choice": "5.3f", "judged": "5.2f"}


def table(rows: dict[str, dict]) -> str:
    """Aligned: one row per model, "mean ±95 % interval" per column, "-" where a text-only model has no score."""
    cells = lambda scores: [shown(scores[column], form) if column in scores else "-" for column, form in COLUMNS.items()]
    return aligned({name: cells(scores) for name, scores in rows.items()}, list(COLUMNS))


def score_checkpoint(folder: Path, name: str, pictures: Path, device, dtype, split: str = "test",
                     target: str = "") -> tuple[dict, list]:
    model = checkpoint.load(folder, device, dtype)
    tokens = Tokens(folder, model.config)
    steer(tokens, name, target)
    return measure(model, tokens, pictures, name, split)
