"""A benchmark question and its answer: turns, a journal, and numbers with intervals.

Every benchmark here, the published ones and the miniature's, is a list of `Item`s. A model answers them through the very
prompt function that training uses (data.make_tree), and the second turn's prompt holds its *own* first answer. An answer
depends on its prompt, its settings and its own seed, not on what else was in the batch, and it is on the disk before the
next is asked for: kill the program, run the same command, and it goes on.

What cannot be answered (a picture that is missing, a prompt too long) has a reason instead of an answer. It never becomes an
empty string that a scorer would call wrong.

Numbers. Every figure of every benchmark is a ratio of sums, or a mean of a few: a mean score is sum(x) / sum(1), F1 is
sum(2 TP) / sum(2 TP + FP + FN), LLaVA-Bench is sum(100 model) / sum(reference). So one formula gives all the 95 % intervals.
With R = sum(a) / sum(b), each item moves R by (a_i - R b_i) / sum(b); items that share something (two turns of one question,
six questions about one picture) move together, so their parts are added first, per group g of G:

    var(R) = G / (G - 1) * sum_g ( sum_{i in g} (a_i - R b_i) / sum(b) )^2

the linearised cluster variance of survey statistics (arXiv:2411.00640 recommends it for benchmarks). For b = 1 and groups of
one it is the plain standard error.

Previous: steerlm.py.  Next: toy/items.py (benchmarks whose truth is known).
"""
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import formats as records
from annotate import check_room, sample_batch
from common import BadInput, Journal, sha, write_jsonl, write_whole
from data import Pixels, Tokens, make_tree, target_scores
from model import Llava

PICTURES = (".jpg", ".jpeg", ".png")


@dataclass
class Item:
    """One question of one or more turns."""
    id: str
    questions: list[str]                               # the user's turns; <image> where a picture stands
    row: dict = field(default_factory=dict)            # as the benchmark's own file has it
    images: list[str] = field(default_factory=list)
    root: str = "."                                    # folder the image names start from
    temperature: float = 0.0
    max_new: int = 1024


@dataclass
class Prompt:
    """What a judge reads about one answer."""
    id: str
    text: str
    system: str = ""
    row: dict = field(default_factory=dict)            # what the benchmark's judgment file says about it


# ---- numbers --------------------------------------------------------------------------------------------------

UNKNOWN = {"mean": None, "ci": None, "n": 0}


def ratios(parts: list[tuple]) -> dict:
    """The mean over parts of sum(a) / sum(b) -> {"mean", "ci" (95 %), "n"}. A part is (a, b, groups), three sequences of one
    length; b may be None for ones, groups None for items that have nothing in common. No ci from a single group."""
    moved, total, n = defaultdict(float), 0.0, 0
    for part, (a, b, groups) in enumerate(parts):
        a = np.asarray(a, float)
        b = np.ones_like(a) if b is None else np.asarray(b, float)
        if not b.sum():
            return UNKNOWN | {"n": n}
        r = a.sum() / b.sum()
        total, n = total + r / len(parts), n + len(a)
        for k, x in enumerate((a - r * b) / b.sum() / len(parts)):
            moved[groups[k] if groups is not None else (part, k)] += x
    if not parts:
        return UNKNOWN
    G = len(moved)
    ci = 1.96 * (G / (G - 1) * sum(x * x for x in moved.values())) ** 0.5 if G > 1 else None
    return {"mean": float(total), "ci": ci and float(ci), "n": n}


def mean(values: list[float], groups: list | None = None) -> dict:
    return ratios([(values, None, groups)])


def shown(e: dict, form: str) -> str:
    """"7.52 ±0.28"; "-" for what could not be computed."""
    if e["mean"] is None:
        return "-"
    return f"{e['mean']:{form}}" + ("" if e["ci"] is None else f" ±{e['ci']:{form}}".replace("± ", "±"))


def aligned(rows: dict[str, list[str]], head: list[str], width: int = 13, names: int = 0) -> str:
    """A table: names on the left, `names` wide or as wide as the longest, cells on the right."""
    names = names or max(map(len, rows))
    return "\n".join(f"{name:<{names}}" + "".join(f" {cell:>{width - 1}}" for cell in cells)
                     for name, cells in {"": head, **rows}.items())


# ---- answering ------------------------------------------------------------------------------------------------

class Memory(dict):
    """A journal that is forgotten."""
    def append(self, row: dict) -> None:
        self[row["key"]] = row


def answer(items: list[Item], model: Callable[[], Llava], tokens: Tokens, pixels: Pixels, *, batch: int = 16, seed: int = 0,
           forget: bool = False, journal: Journal | None = None, about: str = "",
           desc: str = "answering") -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Answer every turn of every item -> ({id: [{"text", "finish"} per turn]}, {id: why it could not be answered}).

    model     gives the model; called when an answer is missing
    forget    leave the own first answer out of the second turn's prompt, as the authors' harness did
    about     names everything else that answers depend on: weights, precision, cropping
    """
    said, failed, journal = {item.id: [] for item in items}, {}, Memory() if journal is None else journal
    hash_of = cache(lambda root, names: records.check_images({"images": names}, Path(root), pixels.size))

    def ready(item: Item) -> tuple[str, Item, dict]:
        """The answer's key in the journal, and what the model is to continue."""
        record = conversation(item, [a["text"] for a in said[item.id]], forget)
        check_room(len(make_tree(tokens, record, []).prompt) + item.max_new, tokens.room)
        key = sha(about, record["id"], json.dumps(record["messages"]), hash_of(item.root, tuple(item.images)),
                  f"{seed} {item.temperature} {item.max_new} {pixels.crop}")
        return key, item, record

    def ask(part: list[tuple[str, Item, dict]]) -> None:
        alike = part[0][1]
        rows = sample_batch(model(), tokens, pixels, [record for *_, record in part], n=1, temperature=alike.temperature,
                            max_new=alike.max_new, seed=seed)
        for (key, item, _), (found,) in zip(part, rows):
            if key not in journal:
                journal.append({"key": key, "id": item.id, "turn": len(said[item.id]), "answer": found})

    bar = tqdm(total=sum(len(i.questions) for i in items), desc=desc, unit="answer", disable=None, leave=False)
    for turn in range(max((len(i.questions) for i in items), default=0)):
        todo = []
        for item in (i for i in items if len(said[i.id]) == turn < len(i.questions)):
            try:
                todo.append(ready(item))
            except BadInput as problem:
                failed[item.id] = str(problem)
        for part in batches(todo, batch):
            if any(key not in journal for key, *_ in part):              # a batch is whole: its rounding stays the same
                ask(part)
            for key, item, _ in part:
                said[item.id].append(journal[key]["answer"])
            bar.update(len(part))
    bar.close()
    return {name: turns for name, turns in said.items() if name not in failed}, failed


def batches(todo: list[tuple[str, Item, dict]], size: int) -> list[list]:
    """At most `size` each, all of one temperature and length, the order kept among those."""
    alike = defaultdict(list)
    for entry in todo:
        alike[entry[1].temperature, entry[1].max_new].append(entry)
    return [same[at:at + size] for same in alike.values() for at in range(0, len(same), size)]


def conversation(item: Item, own: list[str], forget: bool = False) -> dict:
    """The record that is asked next, after the model's `own` answers so far. Raises BadInput where one of those would be
    read as a control token."""
    messages, turn = [], len(own)
    for question, text in zip(item.questions, own):
        records.clean(text, "the model's own earlier answer")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    messages.append({"role": "user", "content": item.questions[turn]})
    if forget and own:                                 # what came out of it there: "USER: q1 ASSISTANT:USER: q2 ASSISTANT:"
        messages = [{"role": "user", "content": " ASSISTANT:USER: ".join(item.questions[:turn + 1])}]
    return {"id": f"{item.id} turn {turn + 1}" if turn else item.id, "messages": messages, "images": item.images,
            "root": item.root}


def with_pictures(items: list[Item], where: str, seed: int) -> None:
    """Put a picture of the folder `where`, drawn by seed and id, before each first question; "literal" puts the bare text
    <image> there instead, as the authors' harness did (give `literal` the tokenizer, too). Raises BadInput."""
    names = [] if where == "literal" else sorted(p.name for p in Path(where).glob("*") if p.suffix.lower() in PICTURES)
    if not names and where != "literal":
        raise BadInput(f"--picture {where}: a folder with {', '.join(PICTURES)} files, or the word literal")
    for item in items:
        item.questions = ["<image>\n" + item.questions[0], *item.questions[1:]]
        if names:
            item.images, item.root = [random.Random(f"{seed} {item.id}").choice(names)], where


def literal(tokens: Tokens) -> Tokens:
    """The same, but <image> is seven characters of text to it. Raises BadInput where it cannot spell them."""
    raw, plain = json.loads(tokens.tokenizer.to_str()), copy(tokens)
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<image>"]
    plain.image, plain.tokenizer = None, Tokenizer.from_str(json.dumps(raw))
    if tokens.image in plain.encode("<image>\nx"):
        raise BadInput("--picture literal: this tokenizer has no other way to write <image> than as a picture")
    return plain


def steer(tokens: Tokens, name: str, target: str) -> None:
    """A model that was trained to be asked for scores is asked for `target`, or for what its folder says; it is said which."""
    if tokens.steer:
        tokens.steer["target"] |= target_scores(target) if target else {}
        asked = ", ".join(f"{attribute} {k}" for attribute, k in tokens.steer["target"].items())
        print(f"{name}: every question asks for {asked}", file=sys.stderr)


# ---- files ----------------------------------------------------------------------------------------------------

def find(data: str, folder: str, name: str, source: str) -> Path:
    """The one file of this name (a pattern) under data/folder. Raises BadInput saying where to get it."""
    found = sorted((Path(data) / folder).rglob(name))
    if len(found) != 1:
        raise BadInput(f"--data_dir {data}: {folder}/ must hold one {name}, not {len(found)}" + (
            f" ({', '.join(str(p.relative_to(data)) for p in found[:4])})" if found else f"; get it from {source}"))
    return found[0]


def load(path: Path, *need: str):
    """A JSON file, or JSON lines whatever its name; `need` are fields that every row must have. Raises BadInput."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', '') or error})") from None
    try:
        rows = json.loads(text)
        rows = [rows] if isinstance(rows, dict) and need else rows       # JSON lines, of which there is one
    except ValueError:
        try:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise BadInput(f"{path}: neither JSON nor JSON lines ({error}); download it again") from None
    for k, row in enumerate(rows if need else []):
        missing = [name for name in need if not isinstance(row, dict) or name not in row]
        if missing:
            raise BadInput(f"{path}: row {k + 1} has no {', '.join(missing)}; is it a file of this benchmark?")
    return rows


def dump(path: Path, rows) -> None:
    """.jsonl gets JSON lines, anything else one JSON value."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        write_whole(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def slug(name: str) -> str:
    """A file name for a checkpoint or a judge."""
    return re.sub(r"[^\w.]+", "-", name.strip("./")) or "model"
