"""The paper's experiment in miniature: one set of judged answers, four ways to use it, one table.

    text model -> sees -> answers image questions -> is judged -> { SFT, rejection sampling, SteerLM, DPO } -> is measured

The question (arXiv:2402.10884, Table 4): visual tuning cost the language model text ability; which use of the same judged *image*
answers gives it back, and what does vision pay? Around it, as in the paper: how much data, how many wrong labels, one model's
preferences given to another, a picture put before text questions; and what the paper left open: beta against learning rate, sums
against means of log-probs, length.

How it is kept honest. Learning rates were searched on a development seed and development items, three per method, no method
more (`--search`), and chosen by the judge's opinion of image answers; reported seeds are others. Every method has the same
three passes over what it can use of the same records; the steps that makes stand in the table. "SFT" has two rows, for the
answer to "which golden answers?" decides its rank: the datasets' own short ones, or full ones. Text ability is shown with its
length-blind part (core). Whatever comes out is printed.

Every run is a folder that appears when it is done; the same command goes on where it was stopped.

    python reproduce.py                                     one seed on the shipped miniature, some minutes on two cores
    python reproduce.py --seeds 5 --from_scratch            every stage anew per seed, about an hour
    python reproduce.py --search                            the search for learning rates

Previous: figures.py.  Next: chat.py (see for yourself).
"""
import contextlib
import json
import math
import multiprocessing
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common  # first: it tells OpenMP how to wait
import torch
from tqdm import tqdm

import annotate
import checkpoint
import compare
import dpo
import figures
import harness
import miniature
import rejection
import sft
import steerlm
import toy
from common import BadInput, describe_run, main, read_jsonl, write_jsonl, write_whole
from data import Tokens
from pairs import choose_pair


@dataclass
class Settings:
    """The whole experiment in miniature."""
    out: str = "runs/reproduce"    # one folder per seed, rows.jsonl, tables.txt, figures
    seeds: int = 1                 # how many
    first: int = 10                # the first of them; 0 to 2 were used while this was made
    from_scratch: bool = False     # build every seed's models anew; else all seeds start from the shipped miniature
    only: str = ""                 # build, annotate, train or tables: that stage alone
    methods: str = ""              # names of RUNS with semicolons between them; empty: all
    search: bool = False           # three learning rates per method on development items, instead of the experiment
    workers: int = 2               # runs at once, one thread each


# ---- the runs ---------------------------------------------------------------------------------------------------

STEER = {"form": "\nanswer with {helpfulness} , {correctness} , {coherence} , {complexity} , {verbosity} .",
         "grades": "no one two three four"}                # in words that the miniature knows
RATES = (5e-5, 1e-4, 2e-4)
LR = {"sft": 5e-5, "rejection": 1e-4, "steerlm": 1e-4, "dpo": 5e-5}     # best judged of RATES each, by the search (LOG.md)
RUNS = {                                                   # name: method, what is changed
    "SFT, short answers": ("sft", {"records": "short"}),
    "SFT, full answers": ("sft", {}),
    "Rejection sampling": ("rejection", {}),
    "SteerLM": ("steerlm", {}),
    "DPO": ("dpo", {}),
    **{f"DPO, {share:.0%} of the data": ("dpo", {"records": f"share {share}"}) for share in (0.25, 0.5, 0.75)},
    **{f"DPO, {share:.0%} of labels flipped": ("dpo", {"records": f"flip {share}"}) for share in (0.25, 0.5, 0.75)},
    **{f"DPO, beta {beta}, lr {lr}": ("dpo", {"beta": beta, "lr": lr}) for lr in (5e-5, 2e-4) for beta in (0.03, 0.1, 0.3)
       if (beta, lr) != (0.1, 5e-5)},
    "DPO, mean log-probs": ("dpo", {"average": True, "beta": 0.5}),
    "DPO of a narrower model": ("dpo", {}),                # on the wider one's answers; its models are built for it
}
MAIN = list(RUNS)[:5]
STEERED = {"": {"helpfulness": 4}, ", verbosity 0": {"verbosity": 0}, ", not asked for scores": None}   # how SteerLM is measured
SETTINGS = {"sft": sft.Settings, "rejection": rejection.Settings, "steerlm": steerlm.Settings, "dpo": dpo.Settings}


def change(items: list[dict], how: str, seed: int) -> list[dict]:
    """The records as a run wants them: "short" golden answers, "share 0.25" of them, "flip 0.25" of the pairs' labels."""
    kind, _, amount = how.partition(" ")
    picked = lambda r: zlib.crc32(f"{kind} {r['id']}".encode()) % 1000 < 1000 * float(amount)
    if kind == "short":
        return [r | {"golden": r["truth"]["turns"][-1]["bare"]} for r in items]
    if kind == "share":
        return [r for r in items if picked(r)]
    pairs = [(r, choose_pair(r, seed=seed)) for r in items]
    return [r | {"pair": pair[::-1]} if pair and picked(r) else r for r, pair in pairs]


def train(out: Path, name: str, ckpt: Path, records: Path, seed: int, lr: float) -> None:
    """One run of RUNS: `out`/model and what its script leaves there."""
    method, changes = RUNS[name]
    changes = dict(changes)
    if how := changes.pop("records", ""):
        rows = change(read_jsonl(records), how, seed)
        records = records.with_name(f"records-{out.name}.jsonl")             # beside the pictures
        write_jsonl(records, rows)
    settings = SETTINGS[method](ckpt=str(ckpt), data=str(records), out=str(out), seed=seed, batch=16, resume=True,
                                **{"lr": lr or LR[method]} | changes | (STEER if method == "steerlm" else {}))
    if method == "dpo":
        dpo.align(settings, out)
    else:
        {"sft": sft, "rejection": rejection, "steerlm": steerlm}[method].run(settings)


def measure(folder: Path, name: str, pictures: Path, split: str) -> tuple[dict[str, dict], list[dict]]:
    """Every miniature benchmark, text questions with a random picture before them, and the length of image answers. A SteerLM
    model is asked for all fours, for few words, and for nothing."""
    model = checkpoint.load(folder)
    tokens, scores, said = Tokens(folder, model.config), {}, []
    steer = tokens.steer
    for asked, target in STEERED.items() if steer else {"": None}.items():
        tokens.steer = steer and target and steer | {"target": steer["target"] | target}
        one, answers = miniature.measure(model, tokens, pictures, name, split)
        texts = [row["answers"][0] for row in answers if not row["id"].startswith("text")]
        one["image words"] = harness.mean([len(text.split()) for text in texts]) if texts else None
        if model.config.vision:
            one["behind a picture"] = miniature.behind_a_picture(model, tokens, pictures, name, split)
        scores[name + asked] = {key: value for key, value in one.items() if value}
        said = said or answers
    return scores, said


class Job(NamedTuple):
    kind: str                   # build, annotate, measure or train
    folder: Path                # where it leaves what it makes
    name: str                   # of a run or a model; "" for build and annotate
    ckpt: Path                  # what it starts from
    seed: int
    split: str                  # test, or dev for the search
    lr: float = 0.0             # 0: the method's own


def task(job: Job) -> None:
    """One unfinished piece of work, in a process and thread of its own; what it prints goes to its log."""
    kind, folder, name, ckpt, seed, split, lr = job
    torch.set_num_threads(1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (open(folder.with_name(folder.name + ".log"), "a") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log)):
        began = time.perf_counter()
        if kind == "build":
            toy.run(toy.Settings(out=str(folder), seed=seed, width=96 if folder.name == "narrow" else 128))
            return
        if kind == "annotate":
            annotate.annotate(annotate.miniature(annotate.Story(out=str(folder), ckpt=str(ckpt), seed=seed)))
            return
        data, steps = folder.parent / "data", 0
        if kind == "train":
            if not (folder / "model").exists():
                train(folder, name, ckpt, data / "records.jsonl", seed, lr)
            config = json.loads((folder / "config.json").read_text())
            steps, lr = config["steps"], config["settings"]["lr"]
        scores, answers = measure(folder / "model" if kind == "train" else ckpt, name, data, split)
        write_jsonl(folder / "answers.jsonl", answers)
        about = describe_run(None, seed=seed, steps=steps, lr=lr, seconds=round(time.perf_counter() - began, 1))
        write_jsonl(folder / "row.jsonl", [about | {"name": each, "scores": row} for each, row in scores.items()])


def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in name.strip().lower())


def work(jobs: list[Job], workers: int, title: str) -> None:
    """Do what is not done yet, `workers` at once. Raises BadInput naming the log of what failed."""
    done = {"build": "config.json", "annotate": "records.jsonl"}
    jobs = [job for job in jobs if not (job.folder / done.get(job.kind, "row.jsonl")).exists()]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(task, job): job for job in jobs}
        for future in tqdm(as_completed(futures), total=len(jobs), desc=title, unit="run", disable=None):
            if future.exception():
                job = futures[future]
                pool.shutdown(cancel_futures=True)
                raise BadInput(f"{job.name or title}: {future.exception()}; see {job.folder}.log")


# ---- tables -----------------------------------------------------------------------------------------------------

COLUMNS = ("text", "core", "behind a picture", "words", "exist", "attribute", "describe", "choice", "judged", "image words")
SHORT = {"behind a picture": "pictured"}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (0 for one, which `cell` does not show)."""
    m = sum(values) / len(values)
    return m, math.sqrt(sum((v - m) ** 2 for v in values) / max(1, len(values) - 1))


def cell(values: list[float]) -> str:
    m, sd = spread(values) if values else (0, 0)
    return "-" if not values else f"{m:.2f} ±{sd:.2f}" if len(values) > 1 else f"{m:.2f}      "


def table(rows: list[dict], names: list[str], columns: tuple = COLUMNS) -> str:
    """One line per run: steps, then mean ± sd over seeds of every column; one seed has no ±."""
    width, out = max(map(len, names)), []
    out.append(" " * width + "  steps" + "".join(f"{SHORT.get(c, c):>13}" for c in columns))
    for name in names:
        mine = [row for row in rows if row["name"] == name]
        line = f"{name:<{width}}{max((row['steps'] for row in mine), default=0) or '-':>7}"
        for column in columns:
            values = [row["scores"][column]["mean"] for row in mine if column in row["scores"]]
            line += f"{cell(values):>13}"
        out.append(line.rstrip())
    return "\n".join(out)


def report(rows: list[dict]) -> str:
    """All tables, and the paper's figures beside ours, told apart."""
    seeds = sorted({row["seed"] for row in rows})
    have = list(dict.fromkeys(row["name"] for row in rows))
    order = ("Vicuna-mini", "LLaVA-mini", *MAIN[:3], *(f"SteerLM{how}" for how in STEERED), "DPO")
    main_rows = [name for name in order if name in have]
    over = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    out = [f"The miniature: {over} ({', '.join(map(str, seeds))}), test items",
           table(rows, main_rows), "", "The paper, 13B models, judged by GPT-4 (another scale: compare signs, not sizes)",
           f"{'':22}{'MT-Bench':>10}{'AlpacaEval':>12}{'MM-Vet':>8}{'LLaVA-Bench':>13}{'POPE':>7}{'MMBench':>9}"]
    for name, values in compare.PAPER.items():
        cells = [*map(str, values), *["-"] * (6 - len(values))]
        out.append(f"{name:22}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (10, 12, 8, 13, 7, 9))))
    others = [name for name in (*RUNS, "LLaVA-mini, narrower") if name in have and name not in MAIN]
    if others:
        out += ["", "What DPO does with less, with wrong labels, and otherwise set", table(rows, ["DPO", *others])]
    return "\n".join(out)


# ---- the script -------------------------------------------------------------------------------------------------

def run(s: Settings) -> None:
    names = [n.strip() for n in s.methods.split(";") if n.strip()] or list(RUNS)
    unknown = [n for n in names if n not in RUNS]
    if unknown or s.seeds < 1 or s.workers < 1 or s.only not in ("", "build", "annotate", "train", "tables"):
        raise BadInput(f"--methods {s.methods}: choose among {'; '.join(RUNS)}" if unknown else
                       "--seeds and --workers must be at least 1, --only build, annotate, train or tables")
    out, shipped = Path(s.out), checkpoint.resolve("toy")
    seeds = [0] if s.search else range(s.first, s.first + s.seeds)
    split, stages = "dev" if s.search else "test", [s.only] if s.only else ["build", "annotate", "train", "tables"]
    builds, samples, runs = [], [], []
    for seed in seeds:
        folder = out / f"{'search' if s.search else 'seed'}-{seed}"
        ckpt = folder / "toy" if s.from_scratch else shipped
        narrow = folder / "narrow" if s.from_scratch and seed == s.first else None     # one seed has a second size
        builds += [Job("build", path, "", path, seed, split) for path in (ckpt, narrow) if s.from_scratch and path]
        samples.append(Job("annotate", folder / "data", "", ckpt, seed, split))
        runs += [Job("measure", folder / slug(name), name, path, seed, split)
                 for name, path in (("Vicuna-mini", ckpt / "vicuna"), ("LLaVA-mini", ckpt), ("LLaVA-mini, narrower", narrow))
                 if path]
        rates = RATES if s.search else (0.0,)
        for name in MAIN if s.search else names:
            path = narrow if name.endswith("narrower model") else ckpt
            runs += [Job("train", folder / slug(f"{name} {lr or ''}"), name, path, seed, split, lr) for lr in rates if path]
    for stage, jobs in (("build", builds), ("annotate", samples), ("train", runs)):
        if stage in stages:
            work(jobs, s.workers, stage)
    if "tables" not in stages:
        return
    rows = [row for job in runs if (job.folder / "row.jsonl").exists() for row in read_jsonl(job.folder / "row.jsonl")]
    if s.search:
        rows = [row | {"name": f"{row['name']}, lr {row['lr']:g}" if row["lr"] else row["name"]} for row in rows]
    write_jsonl(out / ("search.jsonl" if s.search else "rows.jsonl"), rows)
    text = table(rows, list(dict.fromkeys(row["name"] for row in rows))) if s.search else report(rows)
    write_whole(out / ("search.txt" if s.search else "tables.txt"), text + "\n")
    print(text)
    if not s.search:
        figures.run(figures.Settings(rows=str(out / "rows.jsonl"), runs=str(out / f"seed-{s.first}"), out=str(out / "figures")))


if __name__ == "__main__":
    main(Settings, run)
