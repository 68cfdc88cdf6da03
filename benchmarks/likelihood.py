"""How likely a model finds answers that others gave: the mean negative log-likelihood per token, in
nats, of the golden answers of a file of records. No judge, and no sampling.

    nll = - sum over answers of log p(answer | question) / number of their tokens

Lower is better; exp(nll) is the perplexity. It tells what a model still *knows* of a text's way to
go on, where generated answers tell what it does first. It has a leak: who has learned to be brief
finds short answers likely, so it stands beside other figures, never alone. Models with different
tokenizers cannot be compared.

Any .json or .jsonl file that formats.py reads will do, if its records have golden answers:
AlpacaEval's `alpaca_eval.json`, for one.
"""
from dataclasses import replace

import torch

import formats
from benchmarks.harness import Item, ratios
from common import BadInput, progress
from data import make_tree, pack_size, split
from model import answer_logps

FORM = "6.3f"
SCALE = 1
FOLDER = "likelihood"
SOURCE = "a file of records with golden answers, such as AlpacaEval's alpaca_eval.json"
ANSWERS = "{model}.jsonl"
JUDGMENTS = ""


def items(folder):
    found = []
    for path in folder.every("*.json*"):
        records, rejects = formats.read(path)
        if rejects:
            raise BadInput(f"{path}: {rejects[0]['id']}: {rejects[0]['reason']}")
        for record in records:
            if not record.get("golden"):
                raise BadInput(f"{path}: {record['id']} has no golden answer")
            question = record["messages"][-1]["content"]
            name = f"{path.relative_to(folder.path)}/{record['id']}"         # two files may share ids
            found.append(Item(name, [question], record, record["images"], record["root"]))
    return found


@torch.no_grad()
def measure(model, tokens, pixels, items):
    """The items with their golden answers as texts, and in their rows the log-prob and the number
    of tokens; or with the reason why there is none."""
    items = [replace(item, texts=[]) for item in items]
    asked, trees = [], []
    for item in items:
        try:
            trees.append(make_tree(tokens, item.row, [item.row["golden"]], max_length=tokens.room))
            asked.append(item)
        except BadInput as problem:
            item.failed = str(problem)

    for item, (logp, length) in zip(asked, given_logps(model, pixels, trees, "likelihood")):
        item.row = item.row | {"logp": logp, "tokens": length}
        item.texts = [item.row["golden"]]
    return items


def given_logps(model, pixels, trees, desc):
    """(log p of its one answer, that answer's tokens) of each tree, in order."""
    bar = progress(total=len(trees), desc=desc, leave=False)
    for part in split(trees, pack_size(0, model.device)):
        pack = pixels.pack(part).to(model.device)
        for tree, logp in zip(part, answer_logps(model, pack).tolist()):
            yield logp, len(tree.answers[0])
            bar.update()
    bar.close()


def answer_rows(items, model):
    return [{"id": item.id, "logp": item.row["logp"], "tokens": item.row["tokens"]} for item in items]


def read_answers(path, items):
    raise BadInput("--answers: likelihood asks a model itself, nobody's answers; give --ckpt")


def score(items, rows=None):
    measured = [item for item in items if item.texts]
    lost = [-item.row["logp"] for item in measured]
    tokens = [item.row["tokens"] for item in measured]
    ids = [item.id for item in measured]
    return {
        "scores": {"nll": ratios([(lost, tokens, ids)])},
        "ok": len(measured),
        "total": len(items),
    }
