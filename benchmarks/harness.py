"""What every benchmark needs: questions, answers that survive a kill, intervals, files.

A benchmark is one file in this folder, of constants and plain functions that evaluate.py calls:

    FORM, SCALE                 how a figure is printed, and times what
    FOLDER, SOURCE              where its official files lie under --data_dir, and who has them
    ANSWERS, JUDGMENTS          names of the files it writes; without a judge the second is ""
    items(folder)                           its questions, from the official files
    answer_rows(items, model)               answers in the benchmark's own format,
    read_answers(path, items)               and back: {item id: texts}
    JUDGED                                  what kind each field of a judgment is (common.KINDS)
    prompts(folder, items, model)           what the judge reads: the official templates, filled
    read(text)                              a judge's reply; ValueError where it cannot be used
    judge_rows(prompts, replies, judge)     judgments in the benchmark's own format
    score(items, rows)                      {"scores", "ok", "total"} of such rows; the official
                                            figure first, a repaired one beside it. May add
                                            "categories", as its official tool prints them, and
                                            "unknown", how many answers are none of the choices

Answering. A model reads the very prompt that training uses (data.make_tree), and in a second turn
its *own* first answer. An answer depends on its prompt, its settings and its own seed, not on what
else was in the batch, and it is on the disk before the next is asked for. What cannot be answered
(a missing picture, a prompt too long) has a reason instead of an answer; it never becomes an empty
string that a scorer would call wrong.

Intervals. Every figure is a ratio of sums, or a mean of a few: a mean score is sum(x) / sum(1), F1
is sum(2 TP) / sum(2 TP + FP + FN), LLaVA-Bench is sum(100 model) / sum(reference). So one formula
gives all the 95 % intervals. Item i moves R = sum(a) / sum(b) by (a_i - R b_i) / sum(b). Items that
share something (two turns of one question, six questions about one picture) move together, so their
parts are added first, in each group g of G:

    var(R) = G / (G - 1) * sum_g ( sum_{i in g} (a_i - R b_i) / sum(b) )^2

the linearised cluster variance of survey statistics, which arXiv:2411.00640 recommends for
benchmarks. For b = 1 and groups of one it is the plain standard error.
"""
import json
import re
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

import common
from common import BadInput, progress, sha, write_json, write_jsonl
from data import make_tree
from generate import check_room, sample_answers
from judge.client import continuation
from vision import decode_image, image_path, read_image


@dataclass
class Item:
    """One question of one or more turns, and what was answered."""
    id: str | int
    questions: list[str]                               # the user's turns; <image> for a picture
    row: dict = field(default_factory=dict)            # as the benchmark's own file has it
    images: list[str] = field(default_factory=list)
    root: str = "."                                    # the folder that image names start from
    temperature: float = 0.0
    max_new: int = 1024
    texts: list[str] = field(default_factory=list)     # an answer to each turn, or nothing
    finishes: list[str] = field(default_factory=list)  # "stop", or "length" where it was cut off
    failed: str = ""                                   # why there is none

    def answer_id(self, model: str) -> str:
        return sha(model, str(self.id), *self.texts)


@dataclass
class Prompt:
    """What a judge reads about one answer; without a text it is not asked."""
    id: str | int
    text: str
    system: str = ""
    row: dict = field(default_factory=dict)            # the judgment, so far as it is known
    wording: str = ""                                  # whose words these are, if there is a doubt


# ---- numbers ------------------------------------------------------------------------------------

def ratios(parts: list[tuple]) -> dict:
    """The mean over parts of sum(a) / sum(b), where a part is (a, b, groups), three of one length.

    Returns {"mean", "ci", "n"}: mean ± ci is the 95 % interval. The mean is None where a sum(b) is
    0, the ci where there is only one group.
    """
    if not parts or not all(np.sum(b) for _, b, _ in parts):
        return {"mean": None, "ci": None, "n": 0}
    total, n = 0.0, 0
    moved = defaultdict(float)                         # group -> by how much it moves the mean
    for a, b, groups in parts:
        a, b = np.asarray(a, float), np.asarray(b, float)
        ratio = a.sum() / b.sum()
        total += ratio / len(parts)
        n += len(a)
        for group, x in zip(groups, (a - ratio * b) / b.sum() / len(parts)):
            moved[group] += x
    G, ci = len(moved), None
    if G > 1:
        variance = G / (G - 1) * sum(x * x for x in moved.values())
        ci = float(1.96 * variance ** 0.5)
    return {"mean": float(total), "ci": ci, "n": n}


def mean(values: list[float], groups: list | None = None) -> dict:
    """The mean and its interval; without groups the values have nothing in common."""
    ones = np.ones(len(values))
    return ratios([(values, ones, range(len(values)) if groups is None else groups)])


def shown(figure: dict, form: str, scale: float = 1) -> str:
    """"7.52 ±0.28"; "-" for what could not be computed."""
    if figure["mean"] is None:
        return "-"
    text = f"{scale * figure['mean']:{form}}"
    if figure["ci"] is not None:
        text += f" ±{scale * figure['ci']:{form}}".replace("± ", "±")
    return text


def aligned(rows: dict[str, list[str]], head: list[str], width: int = 13, names: int = 0) -> str:
    """A table: names on the left, `names` wide or as wide as the longest, cells on the right."""
    names = names or max(map(len, rows))
    lines = []
    for name, cells in {"": head, **rows}.items():
        lines.append(f"{name:<{names}}" + "".join(f" {cell:>{width - 1}}" for cell in cells))
    return "\n".join(lines)


# ---- answering ----------------------------------------------------------------------------------

class Memory(dict):
    """A journal in memory alone, for what nobody resumes."""
    def append(self, row):
        self[row["key"]] = row


def in_turns(items, ask):
    """The items with an answer to every turn, or with the reason why there is none: ask(items) gives
    (item, {"text", "finish"} or the reason) for each that is asked its next turn."""
    items = [replace(item, texts=[], finishes=[]) for item in items]
    for turn in range(max((len(item.questions) for item in items), default=0)):
        todo = [item for item in items if not item.failed and turn < len(item.questions)]
        for item, found in ask(todo):
            if isinstance(found, str):
                item.texts = []
                item.finishes = []
                item.failed = found
            else:
                item.texts.append(found["text"])
                item.finishes.append(found["finish"])
    return items


def answer(items, model, tokens, pixels, *, batch=16, seed=0, journal=None, about="",
           desc="answering"):
    """The items with an answer to every turn, or with the reason why there is none.

    model     a function that gives the model.Llava; called when an answer is missing
    tokens    its data.Tokens
    pixels    its data.Pixels
    journal   a journal.Journal that knows earlier answers and keeps new ones
    about     names what answers depend on beside their prompt and settings: weights, precision
    """
    journal = Memory() if journal is None else journal

    @cache
    def hash_of(path):
        data = read_image(Path(path))
        decode_image(data, path, pixels.size)          # a broken one is found before it is shown
        return sha(data)

    def ready(item):
        """(key, item, tree) of what is asked next; the key names all that the answer depends on."""
        tree = make_tree(tokens, conversation(item), [])
        check_room(tree.length + item.max_new, tokens.room)
        settings = f"{seed} {item.temperature} {item.max_new}"
        pictures = [hash_of(path) for path in tree.images]
        return sha(about, tree.id, str(tree.prompt), settings, *pictures), item, tree

    def sample(part):
        """Journal the answers to a batch. It is asked whole, so that rounding does not depend on
        where a run was stopped."""
        _, alike, _ = part[0]
        trees = [tree for _, _, tree in part]
        rows = sample_answers(model(), tokens, pixels, trees, n=1, max_new=alike.max_new,
                              temperature=alike.temperature, seed=seed)
        for (key, _, tree), (found,) in zip(part, rows):
            if key not in journal:
                journal.append({"key": key, "id": tree.id, "answer": found})

    def ask(asked):
        todo = []
        for item in asked:
            try:
                todo.append(ready(item))
            except BadInput as problem:
                yield item, str(problem)
        for part in progress(batches(todo, batch), desc=desc, unit="batch", leave=False):
            if any(key not in journal for key, _, _ in part):
                sample(part)
            for key, item, _ in part:
                yield item, journal[key]["answer"]

    return in_turns(items, ask)


def answer_from_server(items, client):
    """The same from a server's model (judge/client.py), every call journalled there."""
    def ask(asked):
        todo = []
        for item in asked:
            try:
                todo.append((item, server_question(item, client.s.judge)))
            except BadInput as problem:                # a missing picture
                yield item, str(problem)
        client.ask(question for _, question in todo)
        for item, question in todo:
            yield item, client.replies.answer(question)

    return in_turns(items, ask)


def server_question(item, judge):
    how = {"temperature": item.temperature, "max_tokens": item.max_new}
    pictures = [read_image(image_path(item.root, name)) for name in item.images]
    return continuation(judge, conversation(item), sha(*pictures), how)


def batches(todo, size):
    """At most `size` each, all of one temperature and budget; shortest prompts first, for a cache
    has room for the longest of its batch."""
    alike = defaultdict(list)
    for key, item, tree in sorted(todo, key=lambda entry: entry[2].length):
        alike[item.temperature, item.max_new].append((key, item, tree))
    return [same[at:at + size] for same in alike.values() for at in range(0, len(same), size)]


def conversation(item):
    """The record that is asked next, after the model's own answers so far."""
    turn = len(item.texts)
    messages = []
    for question, text in zip(item.questions, [*item.texts, ""]):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": text})
    messages.pop()                                     # the last has no answer yet
    name = f"{item.id} turn {turn + 1}" if turn else str(item.id)
    return {"id": name, "messages": messages, "images": item.images, "root": item.root}


# ---- files --------------------------------------------------------------------------------------

class Official(dict):
    """What an official file says; what it lacks is said, too."""
    def __init__(self, file, values):
        super().__init__(values)
        self.file = file

    def __missing__(self, key):
        raise BadInput(f"{self.file}: has no {key!r}; is it the benchmark's own file, and of the "
                       "same version as the others?")


@dataclass
class Folder:
    """The official files of one benchmark."""
    path: Path
    source: str                                        # where they come from
    unpacked: Path                                     # for pictures that stand in a table

    def every(self, name):
        """All files of this name (a pattern), at any depth. Raises BadInput where there is none."""
        found = sorted(self.path.rglob(name))
        if not found:
            raise BadInput(f"--data_dir: {self.path}/ holds no {name}; it comes from {self.source} "
                           "(docs/benchmarks.md)")
        return found

    def find(self, name):
        """The only file of this name. Raises BadInput."""
        first, *others = self.every(name)
        if others:
            raise BadInput(f"--data_dir: {self.path}/ holds {len(others) + 1} {name}; keep one")
        return first

    def load(self, name):
        return load(self.find(name))

    def by(self, field, name):
        """The rows of a file by one of their fields."""
        path = self.find(name)
        rows = stored(path, **{field: "a name or number"})
        return Official(path, {row[field]: row for row in rows})

    def text(self, name, ours):
        """A text that the user took here from official code, or ours -> (the text, whose it is)."""
        path = self.path / name
        if path.is_file():
            return path.read_text(encoding="utf8").rstrip("\n"), f"official, from {name}"
        return ours, f"our own wording; there is no {name}"


def load(path: Path):
    """A JSON file, or the rows of JSON lines, whatever its name says. Raises BadInput."""
    parse = partial(json.loads, object_hook=partial(Official, path))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix != ".jsonl":
            with suppress(ValueError):
                return parse(text)
        return [parse(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read as JSON or as lines of it ({error})") from None


def stored(path: Path, **kinds):
    """The same, every row an object, in a list or by name, with fields of these kinds."""
    found = load(path)
    if not found or not isinstance(found, (list, dict)):
        raise BadInput(f"{path}: holds no rows")
    named = found.items() if isinstance(found, dict) else enumerate(found, 1)
    for name, row in named:
        for key, kind in kinds.items():
            common.field(row, key, kind, f"{path}: row {common.shown(str(name))}")
    return found


def dump(path, rows):
    """.jsonl gets JSON lines, anything else one JSON value."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    else:
        write_json(path, rows)


def slug(name: str) -> str:
    """A file name for a checkpoint or a judge."""
    return re.sub(r"[^\w.]+", "-", name.strip("./")) or "model"


# ---- what several benchmarks share --------------------------------------------------------------

def readable(read, text):
    """read(text), or None where it raises ValueError."""
    try:
        return read(text)
    except ValueError:
        return None


def llava_rows(items, model):
    """LLaVA's answer files."""
    rows = []
    for item in items:
        rows.append({
            "question_id": item.id,
            "prompt": item.row["text"],
            "text": item.texts[0],
            "answer_id": item.answer_id(model),
            "model_id": model,
            "metadata": {"finish": item.finishes[0]},
        })
    return rows


def llava_answers(path, items=None):
    rows = stored(path, question_id="a name or number", text="a text")
    return {row["question_id"]: [row["text"]] for row in rows}
