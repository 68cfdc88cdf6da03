"""The paper's experiment in miniature: one set of judged answers, four ways to use it, one table.

    text model -> sees -> answers image questions -> is judged -> { SFT, rejection sampling, SteerLM, DPO }

The question (arXiv:2402.10884, Table 4): visual tuning cost the language model text ability; which
use of the same judged *image* answers gives it back, and what does vision pay? Around it, as in the
paper: how much data, how many wrong labels, one model's preferences given to another, a picture put
before text questions; and what the paper left open: beta against learning rate, sums against means
of log-probs.

--today asks what a reader asks since: newer losses, sampling from the policy as it is, and remedies
that cost nothing or little: weights averaged with the text model's, text replayed. And does the picture
matter, or do any pairs restore the style? Each of its runs has the paper's methods beside it, the
columns of toy/moved.py, and DPO's settings as they were chosen for DPO. The policy gradient makes
one pass, which has as many judged answers as the others' three; a second round has twice as many.

How it is kept honest. Learning rates were searched on a development seed and development items,
three per method, no method more (LOG.md, results/search.jsonl), and chosen by the judge's opinion
of image answers; reported seeds are others. Each of the paper's methods has the same three passes
over what it can use of the same records; how many steps that makes stands in the table. "SFT" has
two rows, for the answer to "which golden answers?" decides its rank: the datasets' own short ones,
or full ones. Text ability is shown with its length-blind part (core). Whatever comes out is printed.

Every run is a folder that appears when it is done; the same command goes on where it was stopped.

    python reproduce.py                            one seed on the shipped miniature, some minutes
    python reproduce.py --seeds 5 --from_scratch   every stage anew per seed, about an hour
    python reproduce.py --today --seeds 5 --first 30 --from_scratch --out runs/today
    python reproduce.py --smol --seeds 3 --data_dir DATA --out runs/smol3     hours; docs/smol.md

--smol asks the same of a language model that somebody else trained (smol.py), whose text has
benchmarks of its own, and adds what costs nothing: averaging its weights with the base model's.
"""
import multiprocessing
import os
import random
import statistics
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import common  # first: it tells OpenMP how to wait
import torch

import checkpoint
import dpo
import grpo
import rejection
import sft
import smol
import steerlm
import story
from benchmarks.compare import paper
from benchmarks.harness import aligned, mean, slug
from common import (
    HERE, BadInput, describe_run, lock, main, progress, read_json, read_jsonl, write_json,
    write_jsonl, write_whole,
)
from data import Tokens, choose_pair
from toy import build, figures, items, moved
from toy.tasks import text_conversation, text_prompts


@dataclass
class Settings:
    """The whole experiment in miniature."""
    out: str = "runs/reproduce"    # one folder per seed, rows.jsonl, tables.txt, figures
    seeds: int = 1                 # how many
    first: int = 10                # the first of them; 0 to 2 were used while this was made
    from_scratch: bool = False     # build every seed's models anew, not only align the shipped one
    today: bool = False            # newer losses, policy gradient and free remedies instead
    workers: int = 2               # runs at once, one thread each
    smol: bool = False             # a real small language model instead of the miniature's
    data_dir: str = ""             # with --smol: official files of ifeval and likelihood
    dtype: str = "auto"            # with --smol: of training and sampling
    split: str = "test"            # with --smol: test; or dev, other scenes and prompts, to choose on


# ---- the runs: name, method, what is changed -----------------------------------------------------

METHODS = {"sft": sft, "rejection": rejection, "steerlm": steerlm, "dpo": dpo, "grpo": grpo}
LR = {"sft": 5e-5, "rejection": 1e-4, "steerlm": 1e-4, "dpo": 5e-5, "grpo": 1e-4}

# SteerLM's scores in words that the miniature knows.
FORM = "\nanswer with {helpfulness} , {correctness} , {coherence} , {complexity} , {verbosity} ."
RUNS = {
    "SFT, short answers": ("sft", {"records": "short"}),
    "SFT, full answers": ("sft", {}),
    "Rejection sampling": ("rejection", {}),
    "SteerLM": ("steerlm", {"form": FORM, "grades": "no one two three four"}),
    "DPO": ("dpo", {}),
}
for percent in (25, 50, 75):
    RUNS[f"DPO, {percent}% of the data"] = ("dpo", {"records": f"share {percent / 100}"})
for percent in (25, 50, 75):
    RUNS[f"DPO, {percent}% of labels flipped"] = ("dpo", {"records": f"flip {percent / 100}"})
for beta, lr in ((0.03, 5e-5), (0.3, 5e-5), (0.03, 2e-4), (0.1, 2e-4), (0.3, 2e-4)):
    RUNS[f"DPO, beta {beta}, lr {lr}"] = ("dpo", {"beta": beta, "lr": lr})
RUNS["DPO, mean log-probs"] = ("dpo", {"average": True, "beta": 0.5})

# "of" DPO: begins with the model that DPO made, and waits for it.
TODAY_RUNS = {
    "DPO, ipo": ("dpo", {"loss": "ipo"}),
    "DPO, hinge": ("dpo", {"loss": "hinge"}),
    "DPO, 25% of labels flipped": ("dpo", {"records": "flip 0.25"}),
    "the same, robust 0.25": ("dpo", {"records": "flip 0.25", "loss": "robust", "smoothing": 0.25}),
    "DPO, nll 1": ("dpo", {"nll": 1.0, "pairs_only": True}),
    "DPO, tail 0.5": ("dpo", {"tail": 0.5, "pairs_only": True}),
    "DPO, pictures swapped": ("dpo", {"records": "swap"}),
    "DPO, text pairs alone": ("dpo", {"records": "text"}),
    "DPO, a second round": ("dpo", {"of": "DPO", "records": "again"}),
    "Policy gradient": ("grpo", {"judge": "oracle", "epochs": 1}),
    "SFT, full answers, 5% text": ("sft", {"share": 0.05}),
    "SFT, full answers, 33% text": ("sft", {"share": 0.33}),
}
for share in (0.25, 0.5, 0.75):
    TODAY_RUNS[f"LLaVA-mini + {share} Vicuna-mini"] = ("mix", {"alpha": share})
for share in (0.25, 0.5, 0.75):
    TODAY_RUNS[f"DPO + {share} Vicuna-mini"] = ("mix", {"of": "DPO", "alpha": share})
REPLAYED = "LLaVA-mini, 33% text in tuning"
SMOL_RUNS = {
    "SFT, full answers": ("sft", {"lr": 1e-4}),
    "Rejection sampling": ("rejection", {"lr": 1e-4}),
    "SteerLM": ("steerlm", {"lr": 1e-4}),
    "DPO": ("dpo", {"lr": 2e-5, "pairs_only": True}),
}
SMOL_FIRST = ("SmolLM2", "LLaVA-Smol", "half and half")
NARROWER = {"DPO of a narrower model": ("dpo", {}), "LLaVA-mini, narrower": None}


@dataclass
class Job:
    """One line of a table: train `ckpt` as `how` says, or take it as it is, and measure."""
    folder: Path
    name: str
    how: tuple | None        # a method, and what is changed
    ckpt: Path
    start: Path              # the model that visual tuning left
    seed: int
    settings: Settings


def change(records, how, seed):
    """The records as a run wants them.

    "short" golden answers, a "share 0.25" of them, "flip 0.25" of the pairs' labels, or "swap": each
    with the next one's picture, in a seeded circle, so that nobody keeps their own."""
    kind, _, amount = how.partition(" ")
    if kind == "swap":
        circle = random.Random(f"swap/{seed}").sample(records, len(records))
        others = zip(circle, circle[1:] + circle[:1])
        images = {record["id"]: other["images"] for record, other in others}
        return [record | {"images": images[record["id"]]} for record in records]

    changed = []
    for record in records:
        if kind == "short":
            changed.append(record | {"golden": record["truth"]["turns"][-1]["bare"]})
            continue

        picked = zlib.crc32(f"{kind} {record['id']}".encode()) % 1000 < 1000 * float(amount)
        if kind == "share" and picked:
            changed.append(record)
        if kind == "flip":
            pair = choose_pair(record, seed=seed)
            changed.append(record | {"pair": pair[::-1]} if pair and picked else record)
    return changed


# ---- one seed: build, sample, then train and measure ---------------------------------------------

def make(folder, seed, width, replay=0.0):
    """Both models from nothing -> `folder`/llava and `folder`/vicuna."""
    if not folder.exists():
        build.run(build.Settings(out=str(folder), seed=seed, width=width, replay=replay))


def data_of(job, how):
    """The records that a run learns from, as they are or changed; sampled first where they are its
    own."""
    seed_folder = job.folder.parent
    own = seed_folder / how
    if how == "again":                                   # a thousand new questions
        story.sample(job.ckpt, own, 1000, job.seed + 1000, "cpu")
        return own / "records.jsonl"
    if how == "text":
        write_jsonl(own / "prompts.jsonl", text_prompts(1000, job.seed))
        story.answer(job.ckpt, own / "prompts.jsonl", own, job.seed, "cpu")
        return own / "records.jsonl"

    data = seed_folder / "data" / "records.jsonl"
    if how:
        changed = change(read_jsonl(data), how, job.seed)
        data = data.with_name(f"records-{job.folder.name}.jsonl")            # beside the pictures
        write_jsonl(data, changed)
    return data


def train(job):
    """One of the runs -> `folder`/model, beside what its script leaves there."""
    method, changes = job.how
    result = job.folder / ("adapter" if "lora" in changes else "model")
    if result.exists():
        return result
    if method == "mix":
        return checkpoint.mix(job.ckpt, job.start.with_name("vicuna"), changes["alpha"], result)

    changes = {"lr": LR[method]} | changes
    changes.pop("of", "")
    data = str(data_of(job, changes.pop("records", "")))
    if "share" in changes:                               # as much as five hundred text conversations
        replay = job.folder.parent / f"replay-{job.folder.name}.jsonl"
        rng = random.Random(f"replay/{job.seed}")
        write_jsonl(replay, [text_conversation(rng) | {"id": f"text-{k}"} for k in range(500)])
        data = (data, str(replay))

    script = METHODS[method]
    script.run(script.Settings(
        ckpt=str(job.ckpt), data=data, out=str(job.folder), seed=job.seed, batch=16,
        device="cpu", resume=True, **changes))
    return result


def measure(folder, name, start):
    """Every miniature benchmark -> {name: scores}.

    A SteerLM model is asked for all fours, for few words, and for nothing: three rows."""
    model = checkpoint.load(folder)
    tokens = Tokens(folder, model.config)
    asked = {name: tokens}
    if tokens.steer:
        terse = tokens.steer["target"] | {"verbosity": 0}
        asked[f"{name}, verbosity 0"] = tokens.asking(terse)
        asked[f"{name}, not asked for scores"] = tokens.asking(None)

    rows = {}
    with TemporaryDirectory() as pictures:
        for each, asking in asked.items():
            scores, said = items.measure(model, asking, pictures, each)
            rows[each] = scores
            scores |= moved.measure(model, asking, said, start, pictures, each)
            if model.config.vision:
                texts = [row["answers"][0] for row in said if not row["id"].startswith("text")]
                scores["image words"] = mean([len(text.split()) for text in texts])
                scores["behind a picture"] = items.behind_a_picture(model, asking, pictures, each)
    return rows


def outcome(job):
    """Train as the job says, or take the checkpoint as it is, and measure it -> rows of results,
    kept in the run's folder."""
    folder, s = job.folder, job.settings
    if (folder / "row.jsonl").exists():
        return read_jsonl(folder / "row.jsonl")

    torch.set_num_threads(1)
    began = time.perf_counter()
    model = job.ckpt
    steps = 0
    lr = 0.0
    with (open(f"{folder}.log", "a") as log, redirect_stdout(log), redirect_stderr(log)):
        try:
            if job.how:
                model = train(job)
                if (folder / "config.json").exists():    # a mixture took no steps
                    config = read_json(folder / "config.json")
                    steps, lr = config["steps"], config["settings"]["lr"]
            if s.smol:
                scores = {job.name: smol.measure(model, job.name, s.split, s.data_dir)}
            else:
                scores = measure(model, job.name, job.start)
        except Exception as problem:
            raise BadInput(f"{job.name}: {problem}; see {folder}.log") from problem

    seconds = round(time.perf_counter() - began)         # training and measuring
    about = describe_run(None, seed=job.seed, steps=steps, lr=lr, seconds=seconds)
    rows = [about | {"name": each, "scores": found} for each, found in scores.items()]
    write_jsonl(folder / "row.jsonl", rows)
    return rows


# ---- tables --------------------------------------------------------------------------------------

COLUMNS = ("text", "core", "behind a picture", "words", "exist", "attribute", "describe", "choice",
           "judged", "image words")
FIRST = ("Vicuna-mini", "LLaVA-mini", "SFT, short answers", "SFT, full answers", "Rejection sampling",
         "SteerLM", "SteerLM, verbosity 0", "SteerLM, not asked for scores", "DPO")
TODAY_COLUMNS = ("text", "core", "equal length", "words", "exist", "attribute", "describe",
                 "choice", "judged", "kl", "kl a token")
REAL_COLUMNS = ("ifeval", "short", "long", "nll", "words", "looping", "scene talk", "exist",
                "attribute", "describe", "choice", "judged")


def table(rows, names, columns=COLUMNS):
    """One line per run: its steps, and every column's mean ± standard deviation over seeds."""
    cells = {}
    for name in names:
        mine = [row for row in rows if row["name"] == name]
        if mine:
            steps = max(row["steps"] for row in mine)
            cells[name] = [str(steps or "-")] + [cell(mine, column) for column in columns]
    titles = [column.replace("behind a picture", "pictured") for column in columns]
    return aligned(cells, ["steps", *titles])


def cell(rows, column):
    values = [row["scores"][column]["mean"] for row in rows if column in row["scores"]]
    if not values or None in values:
        return "-"
    spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else " " * 6
    return f"{statistics.mean(values):.2f}{spread}"


def title(rows):
    seeds = sorted({str(row["seed"]) for row in rows})
    return f"The miniature, test items, mean ± standard deviation over seeds {', '.join(seeds)}"


def report(rows):
    """All tables, and the paper's figures beside ours, told apart."""
    others = [name for name in (*RUNS, *NARROWER) if name not in FIRST]
    return "\n".join([
        title(rows),
        table(rows, FIRST),
        "\nThe paper, 13B models, judged by GPT-4 (another scale: compare signs, not sizes)",
        paper(["mt_bench", "alpaca_eval", "mm_vet", "llava_bench", "pope", "mmbench"], 13),
        "\nWhat DPO does with less, with wrong labels, and otherwise set",
        table(rows, ["DPO", *others]),
    ])


def today(rows):
    return f"{title(rows)}\n{table(rows, [*FIRST, REPLAYED, *TODAY_RUNS], TODAY_COLUMNS)}"


def end_with_parent():
    """A worker's first call: it ends with the process that it works for, even one killed by -9."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- the script ----------------------------------------------------------------------------------

def smol_jobs(s, folder, seed):
    """Make a LLaVA of the real language model, sample and judge -> what is to be trained and
    measured of this seed."""
    torch.set_num_threads(s.workers)                     # the others wait for what is made here
    made = folder / "smol"
    smol.run(smol.Settings(out=str(made), seed=seed, dtype=s.dtype))
    data = folder / "data"
    if not (data / "records.jsonl").exists():
        smol.sample(made / "llava", data, 600, seed, "cpu", s.dtype)
    half = folder / "half"
    if not half.exists():
        checkpoint.mix(made / "llava", made / "lm", 0.5, half)

    models = zip(SMOL_FIRST, (made / "lm", made / "llava", half))
    runs = [(name, None, ckpt) for name, ckpt in models]
    if seed != s.first:                                  # of SmolLM2 itself nothing is drawn
        runs = runs[1:]
    for name, (method, changes) in SMOL_RUNS.items():
        changes = changes | {"lora": 8, "dtype": s.dtype}
        runs.append((name, (method, changes), made / "llava"))
    return jobs_of(runs, made / "llava", s, folder, seed)


def toy_jobs(s, folder, seed):
    """The same for the miniature."""
    toy = HERE / "toy"
    if s.from_scratch:
        toy = folder / "toy"
        make(toy, seed, 128, replay=0.33 if s.today else 0.0)
    if not (folder / "data" / "records.jsonl").exists():
        story.sample(toy / "llava", folder / "data", 1000, seed, "cpu")

    dpo_ckpt = folder / slug("DPO") / "model"
    runs = [("Vicuna-mini", None, toy / "vicuna"), ("LLaVA-mini", None, toy / "llava")]
    if s.today and s.from_scratch:
        runs.append((REPLAYED, None, toy / "replayed"))
    methods = RUNS
    if s.today:
        methods = {name: RUNS[name] for name in FIRST if name in RUNS} | TODAY_RUNS
    for name, how in methods.items():
        begins = dpo_ckpt if "of" in how[1] else toy / "llava"
        runs.append((name, how, begins))
    jobs = jobs_of(runs, toy / "llava", s, folder, seed)
    if s.from_scratch and not s.today and seed == s.first:                   # it has a second size
        narrow = folder / "narrow"
        make(narrow, seed, 96)
        runs = [(name, how, narrow / "llava") for name, how in NARROWER.items()]
        jobs += jobs_of(runs, narrow / "llava", s, folder, seed)
    return jobs


def jobs_of(runs, start, s, folder, seed):
    """[(name, how, ckpt)] -> jobs, each with a folder of its own."""
    return [Job(folder / slug(name), name, how, ckpt, start, seed, s) for name, how, ckpt in runs]


def same_experiment(s, out):
    """A folder's rows are of one experiment: what was measured otherwise is not counted in."""
    path = out / "experiment.json"
    mine = {name: getattr(s, name) for name in ("from_scratch", "smol", "split", "dtype")}
    if path.exists() and read_json(path) != mine:
        raise BadInput(f"{out} holds runs of another experiment ({path}); choose another --out")
    write_json(path, mine)


def run(s: Settings):
    if s.seeds < 1 or s.workers < 1 or s.split not in ("dev", "test"):
        raise BadInput("--seeds and --workers must be at least 1, --split test or dev")
    if s.smol and not s.data_dir:
        raise BadInput("--smol needs --data_dir: official files of ifeval and likelihood; see "
                       "docs/smol.md")
    torch.set_num_threads(1)
    out = Path(s.out)
    lock(out)
    same_experiment(s, out)
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for seed in range(s.first, s.first + s.seeds):
        folder = out / f"seed-{seed}"
        jobs = smol_jobs(s, folder, seed) if s.smol else toy_jobs(s, folder, seed)
        late = [job for job in jobs if job.how and job.ckpt != job.start]    # they wait for DPO's model
        waves = ([job for job in jobs if job not in late], late)
        bar = progress(total=len(jobs), desc=f"seed {seed}", unit="run")
        with ProcessPoolExecutor(s.workers, spawn, end_with_parent) as pool:
            for wave in waves:
                for found in pool.map(outcome, wave):
                    rows += found
                    bar.update()
        bar.close()

    write_jsonl(out / "rows.jsonl", rows)
    if s.smol:
        text = table(rows, [*SMOL_FIRST, *SMOL_RUNS], REAL_COLUMNS)
        drawn = {"smol": figures.real(rows)}
    else:
        text = today(rows) if s.today else report(rows)
        drawn = figures.of_miniature(rows)
    figures.save(drawn, out / "figures")
    write_whole(out / "tables.txt", text + "\n")
    print(text)


if __name__ == "__main__":
    main(Settings, run)
