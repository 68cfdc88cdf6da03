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

Previous: toy/figures.py.  Next: chat.py (see for yourself).
"""
import contextlib
import json
import multiprocessing
import statistics
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common  # first: it tells OpenMP how to wait
import torch
from tqdm import tqdm

import annotate
import checkpoint
from benchmarks import compare
import dpo
from toy import figures
from toy import items as miniature
import rejection
import sft
import steerlm
from toy import build as toy
from common import BadInput, describe_run, main, read_jsonl, write_jsonl, write_whole
from data import Tokens
from benchmarks.harness import aligned, mean, slug
from judge.report import choose_pair


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

DEVICE = "cpu"                                             # also where there is a GPU: what is built and measured is fp32, there
STEER = {"form": "\nanswer with {helpfulness} , {correctness} , {coherence} , {complexity} , {verbosity} .",
         "grades": "no one two three four"}                # in words that the miniature knows
LR = {"sft": 5e-5, "rejection": 1e-4, "steerlm": 1e-4, "dpo": 5e-5}     # best judged of SEARCH each (LOG.md)
NARROWER = "DPO of a narrower model"                       # on the wider one's answers; its models are built for it
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
    NARROWER: ("dpo", {}),
}
MAIN = list(RUNS)[:5]
SEARCH = {f"{name}, lr {lr:g}": (RUNS[name][0], RUNS[name][1] | {"lr": lr}) for name in MAIN for lr in (5e-5, 1e-4, 2e-4)}
STEERED = {"": {"helpfulness": 4}, ", verbosity 0": {"verbosity": 0}, ", not asked for scores": None}   # how SteerLM is measured
METHODS = {"sft": sft, "rejection": rejection, "steerlm": steerlm, "dpo": dpo}


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


def train(out: Path, how: tuple[str, dict], ckpt: Path, records: Path, seed: int) -> None:
    """One run of RUNS: `out`/model and what its script leaves there."""
    method, changes = how[0], dict(how[1])
    if wanted := changes.pop("records", ""):
        rows = change(read_jsonl(records), wanted, seed)
        records = records.with_name(f"records-{out.name}.jsonl")             # beside the pictures
        write_jsonl(records, rows)
    METHODS[method].run(METHODS[method].Settings(
        ckpt=str(ckpt), data=str(records), out=str(out), seed=seed, batch=16, resume=True, device=DEVICE,
        **{"lr": LR[method]} | changes | (STEER if method == "steerlm" else {})))


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
        one["image words"] = mean([len(text.split()) for text in texts]) if texts else None
        if model.config.vision:
            one["behind a picture"] = miniature.behind_a_picture(model, tokens, pictures, name, split)
        scores[name + asked] = {key: value for key, value in one.items() if value}
        said = said or answers
    return scores, said


class Job(NamedTuple):
    """Work for a process and thread of its own: work(*args) makes a file, which appears when all of it is done."""
    file: Path
    work: Callable
    args: tuple


def build(folder: Path, seed: int) -> None:
    toy.run(toy.Settings(out=str(folder.parent), seed=seed, width=96 if folder.parent.name == "narrow" else 128))


def sample(folder: Path, ckpt: Path, seed: int) -> None:
    annotate.annotate(annotate.miniature(annotate.Story(out=str(folder), ckpt=str(ckpt), seed=seed, device=DEVICE)))


def outcome(folder: Path, name: str, how: tuple[str, dict] | None, ckpt: Path, seed: int, split: str) -> None:
    """Train as RUNS says, or take `ckpt` as it is; measure it, and write down what came out."""
    began, data, model, steps, lr = time.perf_counter(), folder.parent / "data", ckpt, 0, 0.0
    if how:
        model = folder / "model"
        if not model.exists():
            train(folder, how, ckpt, data / "records.jsonl", seed)
        config = json.loads((folder / "config.json").read_text())
        steps, lr = config["steps"], config["settings"]["lr"]
    scores, answers = measure(model, name, data, split)
    write_jsonl(folder / "answers.jsonl", answers)
    about = describe_run(None, seed=seed, steps=steps, lr=lr, seconds=round(time.perf_counter() - began, 1))
    write_jsonl(folder / "row.jsonl", [about | {"name": each, "scores": found} for each, found in scores.items()])


def task(job: Job) -> None:
    """What it prints goes to a log beside its folder."""
    torch.set_num_threads(1)
    folder = job.file.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
        job.work(*job.args)


def work(jobs: list[Job], workers: int, title: str) -> None:
    """Do what is not done yet, `workers` at once. Raises BadInput naming the log of what failed."""
    jobs = [job for job in jobs if not job.file.exists()]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(task, job): job for job in jobs}
        for future in tqdm(as_completed(futures), total=len(jobs), desc=title, unit="run", disable=None):
            if future.exception():
                pool.shutdown(cancel_futures=True)
                raise BadInput(f"{title}: {future.exception()}; see {futures[future].file.parent}.log")


# ---- tables -----------------------------------------------------------------------------------------------------

COLUMNS = ("text", "core", "behind a picture", "words", "exist", "attribute", "describe", "choice", "judged", "image words")
SHORT = {"behind a picture": "pictured"}


def cell(values: list[float]) -> str:
    """Mean ± standard deviation over seeds, which one seed has none of."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else " " * 6)


def table(rows: list[dict], names: list[str], columns: tuple = COLUMNS) -> str:
    """One line per run: steps, then every column over seeds."""
    cells = {}
    for name in names:
        mine = [row for row in rows if row["name"] == name]
        cells[name] = [str(max((row["steps"] for row in mine), default=0) or "-")]
        cells[name] += [cell([row["scores"][c]["mean"] for row in mine if c in row["scores"]]) for c in columns]
    return aligned(cells, ["steps", *(SHORT.get(c, c) for c in columns)])


def report(rows: list[dict]) -> str:
    """All tables, and the paper's figures beside ours, told apart."""
    seeds = sorted({row["seed"] for row in rows})
    have = list(dict.fromkeys(row["name"] for row in rows))
    order = ("Vicuna-mini", "LLaVA-mini", *MAIN[:3], *(f"SteerLM{how}" for how in STEERED), "DPO")
    main_rows = [name for name in order if name in have]
    over = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    out = [f"The miniature: {over} ({', '.join(map(str, seeds))}), test items", table(rows, main_rows),
           "", "The paper, 13B models, judged by GPT-4 (another scale: compare signs, not sizes)",
           compare.paper(["mt_bench", "alpaca_eval", "mm_vet", "llava_bench", "pope", "mmbench"], 13)]
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
    out, shipped, split = Path(s.out), checkpoint.resolve("toy/llava"), "dev" if s.search else "test"
    runs = SEARCH if s.search else {name: RUNS[name] for name in names}
    jobs = {"build": [], "annotate": [], "train": []}
    for seed in [0] if s.search else range(s.first, s.first + s.seeds):
        folder = out / f"{'search' if s.search else 'seed'}-{seed}"
        ckpt = folder / "toy" / "llava" if s.from_scratch else shipped
        starts = {"Vicuna-mini": ckpt.parent / "vicuna", "LLaVA-mini": ckpt} | {name: ckpt for name in runs if name != NARROWER}
        if NARROWER in runs and s.from_scratch and seed == s.first:          # one seed has a second size
            starts |= {"LLaVA-mini, narrower": folder / "narrow" / "llava", NARROWER: folder / "narrow" / "llava"}
        built = dict.fromkeys(start for start in starts.values() if start.name != "vicuna")
        jobs["build"] += [Job(start / "config.json", build, (start, seed)) for start in built]     # the shipped one stands
        jobs["annotate"].append(Job(folder / "data" / "records.jsonl", sample, (folder / "data", ckpt, seed)))
        for name, start in starts.items():
            own = folder / slug(name)
            jobs["train"].append(Job(own / "row.jsonl", outcome, (own, name, runs.get(name), start, seed, split)))
    for stage, listed in jobs.items():
        if s.only in ("", stage):
            work(listed, s.workers, stage)
    if s.only not in ("", "tables"):
        return
    rows = [row for job in jobs["train"] if job.file.exists() for row in read_jsonl(job.file)]
    write_jsonl(out / ("search.jsonl" if s.search else "rows.jsonl"), rows)
    text = table(rows, list(dict.fromkeys(row["name"] for row in rows))) if s.search else report(rows)
    write_whole(out / ("search.txt" if s.search else "tables.txt"), text + "\n")
    print(text)
    if not s.search:
        figures.draw(rows, out / f"seed-{s.first}", out / "figures")


if __name__ == "__main__":
    main(Settings, run)
