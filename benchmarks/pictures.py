"""Four benchmarks with pictures: MM-Vet, LLaVA-Bench in the wild, POPE, MMBench.

The same functions per class as in benchmarks/text.py. What the official tool would say stands first, a repaired figure beside it.

MM-Vet (arXiv:2308.02490): 218 questions, each needing some of six abilities; a judge that sees the right answer, not the picture,
gives 0.0 to 1.0. The official tool re-asks, and after the fifth reply that is no number writes 0.0; `parsed` leaves such
replies out. Its prompt stands in its code only (the string `prompt` of mm-vet_evaluator): save it as mm_vet/prompt.txt, or
another wording is used, and named in the result.

LLaVA-Bench (arXiv:2304.08485): 60 questions about 24 pictures; a judge that reads a caption grades GPT-4's answer and the
model's from 1 to 10; the figure is 100 mean(model) / mean(reference). The system message stands in the official code only: save
it as system.txt beside rule.json, or ours is used, and named. The official parser splits at single spaces, so that "8, 9" is no
pair of numbers, and averages in [-1, -1] for what it cannot read; `parsed` reads any two numbers from 1 to 10, and no others.

POPE (arXiv:2305.10355): is there such a thing in the picture? Half of the answers are no, the negatives harder in each of three
splits; the mean F1 of "yes". To the official parser an answer is no where its first sentence has the word No, not or no, and
yes otherwise, "", "NO" and "I cannot tell" included; `words` knows yes, no and neither. The official tool pairs answers with
labels by their order, which is wrong for one of the two label files in circulation; here picture and question decide.

MMBench (arXiv:2307.06281): one letter out of up to four; a question counts only if it is answered rightly in every rotation of
its options, rows index + k 1,000,000. Letters are found as in VLMEvalKit, by rule; what shows none is wrong, never guessed.
`vanilla` counts the unrotated rows.

Previous: benchmarks/text.py.  Next: benchmarks/compare.py (results side by side).
"""
import base64
import csv
import re
from collections import defaultdict
from itertools import takewhile
from pathlib import Path

import numpy as np

from benchmarks.harness import Item, Prompt, find, load, mean, ratios
from common import BadInput, sha
from benchmarks.text import complete, readable


def llava_rows(items: list[Item], answers: dict, model: str) -> list[dict]:
    """LLaVA's answer format, which three of the four share."""
    return [{"question_id": i.row["question_id"], "prompt": i.row["text"], "text": text, "answer_id": sha(model, i.id, text),
             "model_id": model, "metadata": {"finish": answers[i.id][0]["finish"]}} for i, (text,) in complete(items, answers)]


def llava_answers(path) -> dict:
    return {str(r["question_id"]): [{"text": r["text"], "finish": (r.get("metadata") or {}).get("finish")}]
            for r in load(path, "question_id", "text")}


def saved(path: Path, ours: str) -> tuple[str, str]:
    """A text that the user saved from official code, or ours, and what to call it."""
    if path.is_file():
        return path.read_text(encoding="utf8").rstrip("\n"), f"official, from {path.name}"
    return ours, f"our own wording; there is no {path.name}"


class MMVet:
    vision, judged, form = True, True, "5.1f"
    files, row = ("{model}.json", "{model}_{judge}-grade-1runs.json"), ()
    OURS = """You grade an answer to a question about a picture that you cannot see, against what is known to be right. In the \
right answer, <AND> joins parts that are all needed, and <OR> parts of which any one will do. Say how much of it the given \
answer has: 0.0 for nothing, 1.0 for everything, tenths in between for a part. Wording does not matter; what goes beyond the \
right answer does no harm unless it contradicts it. Reply with that number alone.

Question | Right answer | Given answer | Grade"""

    def items(data: str) -> list[Item]:
        rows = load(find(data, "mm_vet", "mm-vet.json", "github.com/yuweihao/MM-Vet (mm-vet.zip)"))
        root = f"{data}/mm_vet/images"
        return [Item(name, ["<image>\n" + r["question"]], r, [r["imagename"]], root) for name, r in rows.items()]

    def answer_rows(items: list[Item], answers: dict, model: str) -> dict:
        return {i.id: text for i, (text,) in complete(items, answers)}

    def read_answers(path) -> dict:
        return {name: [{"text": text, "finish": None}] for name, text in load(path).items()}

    def prompts(data: str, items: list[Item], answers: dict) -> list[Prompt]:
        head, wording = saved(Path(data) / "mm_vet" / "prompt.txt", MMVet.OURS)
        truth = lambda item: item.row["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return [Prompt(i.id, head + "\n" + " | ".join([i.row["question"], truth(i), text, ""]), "", {"wording": wording})
                for i, (text,) in complete(items, answers)]

    def read(text: str) -> float:
        """The number a reply begins with. The official tool cuts replies off after three tokens, so it sees nothing else."""
        found = re.match(r"[^\w.-]*(\d+(?:\.\d+)?|\.\d+)(?![\d.]*\d|/)", text)
        if not found or float(found[1]) > 1:
            raise ValueError("does not begin with a number from 0 to 1")
        return float(found[1])

    def judge_rows(items, answers, prompts, replies: dict, model: str, judge: str) -> dict:
        """Where there is no grade there is no entry, and the official tool asks again."""
        return {p.id: {"model": [judge], "content": [replies[p.id]], "score": [MMVet.read(replies[p.id])]}
                for p in prompts if p.id in replies}

    def score(items: list[Item], answers: dict, rows: dict) -> dict:
        unknown = sorted(set(rows) - {i.id for i in items})
        if unknown:
            raise BadInput(f"grades of {unknown[0]}, which is no question of mm-vet.json")
        skills = {i.id: sorted(i.row["capability"]) for i in items}
        runs = range(max((len(r["score"]) for r in rows.values()), default=0))
        stored = [{name: r["score"][k] for name, r in rows.items() if k < len(r["score"])} for k in runs]
        parsed = [{name: grade for name in stored[k]
                   if (grade := readable(MMVet.read, str(rows[name].get("content", stored[k])[k]))) is not None} for k in runs]

        def over(grades: list[dict], wanted=lambda skills: True) -> dict:
            """Per run, then over runs, as officially; the runs of one question are one group."""
            names = [[name for name in run if wanted(skills[name])] for run in grades]
            return ratios([([100 * run[name] for name in part], None, part) for run, part in zip(grades, names) if part])

        abilities, mixtures = sorted({x for s in skills.values() for x in s}), sorted({"_".join(s) for s in skills.values()})
        return {"scores": {"total": over(stored), "parsed": over(parsed)},
                "categories": {x: over(stored, lambda s: x in s) for x in abilities}
                | {x: over(stored, lambda s: "_".join(s) == x) for x in mixtures if "_" in x},
                "runs": len(runs), "ok": len(set().union(*parsed)), "total": len(items)}


class LLaVABench:
    vision, judged, form = True, True, "5.1f"
    files, row = ("answers/{model}.jsonl", "reviews/{model}_{judge}.jsonl"), ("question_id", "category", "tuple")
    OURS = "You compare two answers to one question, carefully and without preference for either side."

    def items(data: str) -> list[Item]:
        rows = load(LLaVABench.file(data, "questions.jsonl"), "question_id", "image", "text", "category")
        root = f"{data}/llava_bench_wild/images"
        return [Item(str(r["question_id"]), ["<image>\n" + r["text"]], r, [r["image"]], root) for r in rows]

    def file(data: str, name: str) -> Path:
        return find(data, "llava_bench_wild", name, "huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild")

    answer_rows, read_answers = llava_rows, llava_answers

    def prompts(data: str, items: list[Item], answers: dict) -> list[Prompt]:
        rules = load(find(data, "llava_bench_wild", "rule.json", "github.com/haotian-liu/LLaVA, llava/eval/table"))
        captions = {r["image"]: r["caption"] for r in load(LLaVABench.file(data, "context.jsonl"), "image", "caption")}
        reference = {r["question_id"]: r for r in load(LLaVABench.file(data, "answers_gpt4.jsonl"), "question_id", "text")}
        (system, wording), out = saved(Path(data) / "llava_bench_wild" / "system.txt", LLaVABench.OURS), []
        for item, (text,) in complete(items, answers):
            row, kind = item.row, f"llava_bench_{item.row['category']}"
            caption, rule, first = captions[row["image"]], rules[kind], reference[row["question_id"]]
            caption, role = "\n".join(caption) if isinstance(caption, list) else caption, rule["role"]
            out.append(Prompt(item.id, f"[Context]\n{caption}\n\n[Question]\n{row['text']}\n\n"
                              f"[{role} 1]\n{first['text']}\n\n[End of {role} 1]\n\n[{role} 2]\n{text}\n\n[End of {role} 2]\n\n"
                              f"[System]\n{rule['prompt']}\n\n", system,
                              {"question_id": row["question_id"], "category": kind, "answer1_id": first.get("answer_id"),
                               "wording": wording}))
        return out

    def official(text: str) -> list[float]:
        """LLaVA's parser: [-1, -1] where the first line is not two numbers with one space or comma between them."""
        parts = text.split("\n")[0].replace(",", " ").split(" ")
        try:
            return [float(x) for x in parts] if len(parts) == 2 else [-1, -1]
        except ValueError:
            return [-1, -1]

    def read(text: str) -> list[float]:
        parts = text.strip().split("\n")[0].replace(",", " ").split()
        grades = [float(x) for x in parts] if len(parts) == 2 and all(re.fullmatch(r"\d+(\.\d+)?", x) for x in parts) else []
        if not grades or not all(1 <= g <= 10 for g in grades):
            raise ValueError("its first line is not two numbers from 1 to 10")
        return grades

    def judge_rows(items, answers, prompts, replies: dict, model: str, judge: str) -> list[dict]:
        return [{"id": k + 1, "question_id": p.row["question_id"], "answer1_id": p.row["answer1_id"],
                 "answer2_id": sha(model, p.id, answers[p.id][0]["text"]), "category": p.row["category"],
                 "content": replies[p.id], "tuple": LLaVABench.official(replies[p.id])}
                for k, p in enumerate(prompts) if p.id in replies]

    def score(items: list[Item], answers: dict, rows: list[dict]) -> dict:
        said = {r["question_id"]: r.get("content", "{} {}".format(*r["tuple"])) for r in rows}
        parsed = [pair for text in said.values() if (pair := readable(LLaVABench.read, text))]
        pairs, kinds = [r["tuple"] for r in rows], list(dict.fromkeys(r["category"] for r in rows))
        of_kind = lambda kind: [r["tuple"] for r in rows if r["category"] == kind]
        return {"scores": {"relative": as_published(pairs), "parsed": relative(parsed),
                           "own grade": mean([10 * b for _, b in pairs]), "reference": mean([10 * a for a, _ in pairs])},
                "categories": {kind.removeprefix("llava_bench_"): as_published(of_kind(kind)) for kind in kinds},
                "ok": len(parsed), "total": len(items) or len(said)}


def relative(pairs: list) -> dict:
    """100 sum(model) / sum(reference) of (reference, model)."""
    return ratios([([100 * b for _, b in pairs], [a for a, _ in pairs], None)])


def as_published(pairs: list) -> dict:
    """The same with the official rounding: means to three digits, their ratio to one."""
    out = relative(pairs)
    if out["mean"] is not None:
        first, second = (round(float(x), 3) for x in np.asarray(pairs, float).mean(0))
        out["mean"] = round(second / first * 100, 1) if first else None
    return out


class POPE:
    vision, judged, form = True, False, "5.3f"
    files = ("{model}.jsonl",)
    SPLITS = ("adversarial", "popular", "random")
    SUFFIX = "\nAnswer the question using a single word or phrase."
    SOURCE = "github.com/RUCAIBox/POPE (output/coco)"

    def items(data: str) -> list[Item]:
        """LLaVA's question file where there is one; its labels, and otherwise the questions, from POPE's own files."""
        folder, known = Path(data) / "pope", {}
        for split in POPE.SPLITS:
            name = f"coco_pope_{split}.json"
            for path in sorted(folder.rglob(name)) or [find(data, "pope", name, POPE.SOURCE)]:
                for r in load(path, "image", "text", "label"):
                    if known.setdefault(POPE.key(split, r), r | {"category": split})["label"] != r["label"]:
                        raise BadInput(f"{path}: {r['image']} {r['text']!r} is labelled otherwise in another file; keep one")
        listed = sorted(folder.rglob("llava_pope_test.jsonl"))
        rows = load(listed[0], "question_id", "image", "text", "category") if listed else [
            r | {"question_id": k, "text": r["text"] + POPE.SUFFIX} for k, r in enumerate(known.values(), 1)]
        for r in rows:
            r["label"] = known[POPE.key(r["category"], r)]["label"]
        return [Item(str(r["question_id"]), ["<image>\n" + r["text"]], r, [r["image"]], str(folder / "val2014"), max_new=128)
                for r in rows]

    def key(split: str, r: dict) -> tuple:
        return split, r["image"], r["text"].split("\n")[0].replace("imange", "image")      # misspelt in the older files

    answer_rows, read_answers = llava_rows, llava_answers

    def official(text: str) -> str:
        """LLaVA's eval_pope.py."""
        words = text.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"} & set(words) else "yes"

    def words(text: str) -> str:
        """yes, no or unknown."""
        said = re.findall(r"[a-z]+(?:['’]t)?", re.split(r"[.!?\n]", text.strip().lower())[0])
        if said[:1] and said[0] in ("yes", "yeah", "yep", "no", "nope"):
            return "yes" if said[0][0] == "y" else "no"
        if {"cannot", "can't", "can’t", "unsure", "unclear", "sure", "maybe", "possibly"} & set(said):
            return "unknown"
        if {"no", "not", "none", "nothing"} & set(said) or any(word[-2:] in ("'t", "’t") for word in said):
            return "no"
        return "yes" if "yes" in said or re.match(r"there (is|are)\b", " ".join(said)) else "unknown"

    def score(items: list[Item], answers: dict, rows=None) -> dict:
        good = complete(items, answers)
        official, words, categories = [], [], {}
        for split in dict.fromkeys(i.row["category"] for i, _ in good):
            mine = [(i, text) for i, (text,) in good if i.row["category"] == split]
            images, true = [i.images[0] for i, _ in mine], np.array([i.row["label"] == "yes" for i, _ in mine], int)
            yes, tolerant = (np.array([how(text) == "yes" for _, text in mine], int) for how in (POPE.official, POPE.words))
            official.append((2 * true * yes, true + yes, images))        # F1 = 2 TP / (2 TP + FP + FN)
            words.append((2 * true * tolerant, true + tolerant, images))
            categories |= {f"{split} {name}": ratios([(a, b, images)]) for name, a, b in (
                ("F1", *official[-1][:2]), ("accuracy", true == yes, None), ("precision", true * yes, yes),
                ("recall", true * yes, true), ("yes", yes, None))}
        return {"scores": {"F1": ratios(official), "words": ratios(words)}, "categories": categories,
                "ok": len(good), "total": len(items), "unknown": sum(POPE.words(text) == "unknown" for _, (text,) in good)}


class MMBench:
    vision, judged, form = True, False, "5.3f"
    files = ("{model}.jsonl",)
    SUFFIX = "Answer with the option's letter from the given choices directly."
    MILLION = 1_000_000

    def items(data: str) -> list[Item]:
        path = find(data, "mmbench", "*.tsv", "github.com/open-compass/MMBench")
        csv.field_size_limit(1 << 27)
        with open(path, encoding="utf8", newline="") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
        if not rows or not {"index", "question", "A", "B", "answer"} <= set(rows[0]):
            raise BadInput(f"{path}: not a table of MMBench, which has index, question, A, B, ..., answer, image")
        for r in rows:
            r["question_id"], r["options"] = int(r["index"]), MMBench.options(r)
            hint = "" if absent(r.get("hint")) else r["hint"] + "\n"
            listed = "".join(f"\n{letter}. {text}" for letter, text in r["options"].items())
            r["text"] = f"{hint}{r['question']}{listed}"
        return [Item(r["index"], [f"<image>\n{r['text']}\n{MMBench.SUFFIX}"], r, [f"{r['question_id'] % MMBench.MILLION}.jpg"],
                     str(path.with_name("images"))) for r in rows]

    def unpack(items: list[Item], folder: Path) -> None:
        """Write the pictures that stand in the table into `folder`; a short cell names the row that holds the picture. Without
        such a column they are taken to lie in mmbench/images."""
        cells = {i.row["index"]: i.row.get("image") or "" for i in items}
        for item in items:
            cell = cells[item.row["index"]]
            cell = cells.get(cell, "") if 0 < len(cell) < 64 else cell
            if cell:
                item.root = str(folder)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / item.images[0]).write_bytes(base64.b64decode(cell))

    def options(row: dict) -> dict[str, str]:
        """Up to the first that is absent."""
        return {letter: row[letter] for letter in takewhile(lambda letter: not absent(row.get(letter)), "ABCD")}

    def answer_rows(items: list[Item], answers: dict, model: str) -> list[dict]:
        return [r | {"round_id": 0, "prompt": r["prompt"] + "\n" + MMBench.SUFFIX, "options": list(i.row["options"].values()),
                     "option_char": list(i.row["options"])}
                for r, (i, _) in zip(llava_rows(items, answers, model), complete(items, answers))]

    read_answers = llava_answers

    def letter(text: str, options: dict[str, str]) -> str | None:
        """The option an answer names, by VLMEvalKit's rules; None where it names none, or several."""
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
        named = [x for x in options if x in words]
        if len(named) == 1 and words.index(named[0]) > len(words) - 5:
            return named[0]
        if found := re.search(r"(?:correct )?answer is \*\*([A-D])\*\*", text):
            return found[1] if found[1] in options else None
        if len(text) > 2 * sum(map(len, options.values())):
            return None
        told = [x for x, option in options.items() if option.lower() in text.lower()]
        return told[0] if len(told) == 1 else None

    def score(items: list[Item], answers: dict, rows=None) -> dict:
        chosen = {i.id: MMBench.letter(text, i.row["options"]) for i, (text,) in complete(items, answers)}
        right = {i.row["question_id"]: chosen[i.id] == i.row["answer"] for i in items if i.id in chosen}
        rotations = defaultdict(list)
        for item in items:
            rotations[item.row["question_id"] % MMBench.MILLION].append(item.row["question_id"])
        whole = [numbers for numbers in rotations.values() if all(number in right for number in numbers)]
        return {"scores": {"circular": mean([float(all(right[number] for number in numbers)) for numbers in whole]),
                           "vanilla": mean([float(right[number]) for number in rotations if number in right])},
                "ok": len(chosen), "total": len(items), "unknown": sum(letter is None for letter in chosen.values())}


def absent(cell: str | None) -> bool:
    """An option or hint that is not there; pandas, which LLaVA reads these files with, calls an empty cell nan."""
    return cell is None or cell.strip().lower() in ("", "nan", "none")


VISION = {"mm_vet": MMVet, "llava_bench": LLaVABench, "pope": POPE, "mmbench": MMBench}
