"""How fast, how much memory, against whom.

    dpo       one step of dpo.py against TRL's DPOTrainer, same checkpoint and records: as TRL is by
              default (activation checkpointing), and without it, the fastest it accepts. It refuses
              cached references and padding-free packs for images. Vision is frozen for all.
    sample    4 answers to each image question, against transformers.generate
    kernels   attention over packed trees and log-probs, forward and backward, the obvious ways beside

A claim is a ratio within one run. The contestants of dpo and sample are processes of their own, in
the environment that speed.py was started in (opponents.py says why). They take one step in turn,
and who is not at it has stopped itself by a signal: the cores belong to the one that is timed.
Medians; the first step loads everything and does not count. Machines have good and bad hours, so
every run is kept, and the table says lowest and highest.

    pip install transformers==5.23.0 trl==1.16.0 peft==0.21.2
    python speed.py                  all of it; rows are added to results/bench.jsonl
    python speed.py --size 7b --lora 128 --out results/gpu.jsonl     LLaVA-1.5-7B's shapes, on a GPU
"""
import os

ENVIRONMENT = dict(os.environ)    # the user's; common, imported next, tells OpenMP how to wait

import json
import random
import signal
import statistics
import subprocess
import sys
import time
import timeit
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import checkpoint
import dpo
import kernels
from common import HERE, BadInput, describe_run, device_and_dtype, main, progress, write_jsonl
from data import VICUNA, Tokens, Tree, make_pack, make_tree
from generate import generate
from kernels import Mask
from kernels.attention import dense_mask, sees
from kernels.logprob import logps_spec
from model import Config, Llava, TextConfig
from opponents import compete
from toy import world
from toy.build import SPECIAL, pixels_of, write_tokenizer
from train import Run
from vision import VisionConfig


@dataclass
class Settings:
    """Measure steps, sampling and kernels against their opponents."""
    what: str = "dpo,sample,kernels"           # which of them, comma-separated
    out: str = "results/bench.jsonl"           # rows are added to this file
    size: str = "small"            # of the model: small (39 million parameters) or 7b
    rounds: int = 5                # steps that count, of each contestant
    lora: int = 0                  # dpo: rank of adapters for every contestant; 0: all is trained
    ckpt: str = ""                 # sample: a LLaVA folder; empty: random weights of --size
    questions: int = 4             # sample: how many are answered, 4 times each


PAIRS = 4                          # a step
QUESTION = "<image>\nDescribe the scene."
IMAGE = SPECIAL.index("<image>")
SIZES = {
    "small": Config(
        TextConfig(8000, 512, 1408, 8, 8, 8, 64),
        VisionConfig(256, 1024, 6, 4, 336, 14),
        IMAGE,
    ),
    "7b": Config(TextConfig(32064), VisionConfig(1024, 4096, 24, 16, 336, 14), IMAGE),
}


# ---- what is measured on -------------------------------------------------------------------------

def write_model(folder: Path, size: str):
    """A random LLaVA with made-up words, in the layout that everybody reads."""
    _, dtype = device_and_dtype("auto", "auto")
    torch.manual_seed(0)
    model = Llava(SIZES[size]).to(dtype)                 # not on a GPU: the contestants fill it
    model.dtype = dtype
    words = model.config.text.vocab_size - len(SPECIAL)
    write_tokenizer(folder, [f"w{k}" for k in range(words)])
    checkpoint.save(model, folder / "model", folder)


def write_pairs(folder: Path, count: int):
    """Questions about pictures of noise, with two answers each: pairs.jsonl, and trl.json."""
    rng = random.Random(0)

    def made_up(words: int) -> str:
        return " ".join(f"w{rng.randrange(7000)}" for _ in range(words))

    ours, theirs = [], []
    for k in range(count):
        picture = folder / f"{k}.jpg"
        Image.effect_noise((640, 480), 50).convert("RGB").save(picture)
        images = [str(picture)]
        question = "<image>\n" + made_up(20)
        chosen = made_up(rng.randint(30, 90))
        rejected = made_up(rng.randint(30, 90))
        ours.append({"images": images, "prompt": question, "chosen": chosen, "rejected": rejected})

        # What dpo.py makes of that, spelled out.
        asked = VICUNA.prompt([{"role": "user", "content": question}])
        theirs.append({
            "images": images,
            "prompt": f"<s> {asked}",
            "chosen": f"{chosen} </s>",
            "rejected": f"{rejected} </s>",
        })
    write_jsonl(folder / "pairs.jsonl", ours)
    (folder / "trl.json").write_text(json.dumps(theirs))


def write_prompts(folder: Path, count: int) -> tuple[int, ...]:
    """A question about so many pictures, as tensors: prompts.pt -> the tokens that end an answer."""
    config, _ = checkpoint.read_config(folder / "model")
    tokens = Tokens(folder / "model", config)
    record = {"id": "", "images": [], "messages": [{"role": "user", "content": QUESTION}]}
    ids = make_tree(tokens, record, []).ids()
    rng = random.Random(0)
    scenes = [(world.random_scene(rng, "test"), k) for k in range(count)]
    pixels = pixels_of(scenes, config.vision.image_size)
    torch.save({"ids": torch.tensor([ids] * count), "pixels": pixels}, folder / "prompts.pt")
    return tokens.ends


# ---- contestants in processes of their own -------------------------------------------------------

def contestant():
    """Ours, as those of opponents.py: it goes through the gate after every step."""
    compete({"dpo": our_steps, "sample": our_answers})


def our_steps(gate: Callable, folder: Path, job: dict):
    """dpo.py itself."""
    update = Run.update

    def update_and_stop(run: Run, **amounts) -> dict:
        row = update(run, **amounts)
        gate(tokens=statistics.mean(pair.tokens for pair in run.members))
        return row

    Run.update = update_and_stop
    dpo.align(dpo.Settings(
        ckpt=str(folder / "model"),
        data=str(folder / "pairs.jsonl"),
        out=str(folder / "run"),
        batch=job["pairs"],
        lora=job["lora"],
        steps=10**6,
        save_every=0,
    ))


def our_answers(gate: Callable, folder: Path, job: dict):
    model = checkpoint.load(folder / "model", *device_and_dtype("auto", "auto"))
    asked = torch.load(folder / "prompts.pt")
    prompts = asked["ids"].tolist()
    pixels = list(asked["pixels"].split(1))
    while True:
        answers = generate(
            model, prompts, pixels, n=job["n"], max_new=job["words"], temperature=1.0,
            ends=job["ends"])
        gate(tokens=sum(len(answer.ids) for found in answers for answer in found))


OURS = ["-c", "import speed; speed.contestant()"]
THEIRS = ["opponents.py"]


def start(name: str, job: dict) -> subprocess.Popen:
    program = OURS if name == "remedy" else THEIRS
    command = [sys.executable, *program, json.dumps(job)]
    return subprocess.Popen(command, cwd=HERE, env=ENVIRONMENT, stdout=subprocess.PIPE)


def hear(name: str, process: subprocess.Popen) -> dict:
    """Wait until its step is over and it has stopped itself -> what it says."""
    line = process.stdout.readline()
    if not line:                                         # out of memory, say
        raise BadInput(f"{name} ended before its step did; its last words stand above")
    os.waitpid(process.pid, os.WUNTRACED)
    return json.loads(line)


def next_step(name: str, process: subprocess.Popen) -> dict:
    began = time.perf_counter()
    process.send_signal(signal.SIGCONT)
    said = hear(name, process)
    return said | {"ms": 1000 * (time.perf_counter() - began)}


def in_turn(jobs: dict[str, dict], rounds: int) -> list[dict]:
    """A step each in turn -> a row for each: what it said last, its steps and their median."""
    steps = {name: [] for name in jobs}
    with ExitStack() as stack:
        running = {}
        for name, job in jobs.items():
            running[name] = stack.enter_context(start(name, job))
            stack.callback(running[name].kill)
            hear(name, running[name])                    # the first step, with all the loading
        for _ in progress(range(rounds), desc="rounds"):
            for name, process in running.items():
                steps[name].append(next_step(name, process))

    rows = []
    for name, said in steps.items():
        times = [round(step["ms"], 1) for step in said]
        rows.append({"name": name, **said[-1], "ms": statistics.median(times), "all_ms": times})
    return rows


def bench_dpo(s: Settings, folder: Path) -> list[dict]:
    write_model(folder, s.size)
    write_pairs(folder, 6 * PAIRS)
    job = {"what": "dpo", "folder": str(folder), "pairs": PAIRS, "lora": s.lora}
    jobs = {
        "remedy": job,
        "TRL, as it is": job | {"checkpointing": True},
        "TRL, no checkpointing": job | {"checkpointing": False},
    }
    groups = [jobs]
    if s.size == "7b":                                   # side by side they fill 120 GiB
        groups = [{name: job} for name, job in jobs.items()]
    rows = []
    for group in groups:
        rows += in_turn(group, s.rounds)
    return [row | {"lora": s.lora, "pairs_per_s": 1000 * PAIRS / row["ms"]} for row in rows]


def bench_sample(s: Settings, folder: Path) -> list[dict]:
    """Sampled answers of at most 64 tokens, 4 to each question."""
    if s.ckpt:
        (folder / "model").symlink_to(checkpoint.resolve(s.ckpt).resolve())
    else:
        write_model(folder, s.size)
    ends = write_prompts(folder, s.questions)
    job = {"what": "sample", "folder": str(folder), "n": 4, "words": 64, "ends": ends}
    rows = in_turn({"remedy": job, "transformers.generate": job}, s.rounds)
    return [row | {"tokens_per_s": 1000 * row["tokens"] / row["ms"]} for row in rows]


# ---- kernels, in this process --------------------------------------------------------------------

def bench_kernels(s: Settings, folder: Path) -> list[dict]:
    """Attention and log-probs of one pack, in the sizes of the model."""
    device, dtype = device_and_dtype("auto", "auto")
    config = SIZES[s.size].text
    tree = Tree("", [5] * 640, [[5] * 128, [5] * 128])
    pack = make_pack([tree] * PAIRS).to(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    T = len(pack.ids)
    width = config.hidden_size
    qkv = [draw(T, config.num_attention_heads, config.head_dim) for _ in range(3)]
    hidden = draw(T, width)
    head = draw(config.vocab_size, width)
    head.data *= 2 * width**-0.5                         # logits of spread 2

    scored = {"rows": pack.rows, "targets": pack.targets}
    ways_to_score = {
        "log-probs, remedy": partial(kernels.logps, **scored),
        "log-probs, all logits of the scored rows": partial(logps_spec, **scored),
    }
    rows = measure(ways_to_attend(pack.mask), qkv, s.rounds)
    return rows + measure(ways_to_score, [hidden, head], s.rounds)


def ways_to_attend(mask: Mask) -> dict[str, Callable]:
    dense = dense_mask(mask)

    def heads_first(attend: Callable, **how) -> Callable:
        def way(*qkv: Tensor) -> Tensor:
            laid_out = [x.transpose(0, 1)[None] for x in qkv]    # (T, H, D) -> (1, H, T, D)
            return attend(*laid_out, **how)
        return way

    ways = {
        "attention, remedy": partial(kernels.attention, mask=mask),
        "attention, torch SDPA with a dense mask": heads_first(
            F.scaled_dot_product_attention, attn_mask=dense),
    }
    if mask.own.is_cuda:                                 # elsewhere FlexAttention has no backward
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(batch, head, i, j):
            return sees(mask.lo[i], mask.hi[i], mask.own[i], i, j)

        blocks = create_block_mask(seen, None, None, *dense.shape)
        flex = torch.compile(flex_attention)
        ways["attention, FlexAttention"] = heads_first(flex, block_mask=blocks)
    return ways


def measure(ways: dict[str, Callable], inputs: list[Tensor], rounds: int) -> list[dict]:
    """A row for each way to compute the same, forward and backward."""
    rows = []
    for name, way in ways.items():
        def call():
            out = way(*inputs)
            torch.autograd.grad(out, inputs, torch.ones_like(out))

        row = {"name": name, "ms": median_ms(call, rounds)}
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows.append(row)
    return rows


def median_ms(call: Callable, rounds: int) -> float:
    if torch.cuda.is_available():                        # many times, between the card's own events
        from triton.testing import do_bench
        return do_bench(call, return_mode="median")
    seconds = timeit.repeat(call, number=1, repeat=1 + rounds)
    return 1000 * statistics.median(seconds[1:])


# ---- the script ----------------------------------------------------------------------------------

BENCHES = {"dpo": bench_dpo, "sample": bench_sample, "kernels": bench_kernels}
UNITS = {    # of a row's figures: name, digits
    "pairs_per_s": ("pairs/s", 2),
    "tokens_per_s": ("tokens/s", 0),
    "peak_mib": ("MiB", 0),
}


def table(rows: list[dict]) -> str:
    """A line per contestant: lowest to highest of its runs. `x` is its time over ours in the same
    run, which stands before it in the file."""
    contestants = defaultdict(list)
    for row in rows:
        if row["name"].endswith("remedy"):
            ours = row["ms"]
        contestants[row["bench"], row["name"]].append(row | {"x": row["ms"] / ours})

    lines = []
    for (bench, name), runs in contestants.items():
        ms = span(runs, "ms", 0 if runs[0]["ms"] >= 100 else 2)
        line = f"{bench:8} {name:42}{ms:>14} ms  x {span(runs, 'x', 2):11}"
        for key, (unit, digits) in UNITS.items():
            if key in runs[0]:
                line += f"  {span(runs, key, digits)} {unit}"
        lines.append(line)
    return "\n".join(lines)


def span(runs: list[dict], key: str, digits: int) -> str:
    values = [row[key] for row in runs]
    low = f"{min(values):,.{digits}f}"
    high = f"{max(values):,.{digits}f}"
    return low if low == high else f"{low}-{high}"


def run(s: Settings):
    wanted = s.what.split(",")
    if not {*wanted} <= {*BENCHES} or s.size not in SIZES or s.rounds < 1:
        raise BadInput(
            f"--what: {', '.join(BENCHES)}; --size: {', '.join(SIZES)}; --rounds: at least 1"
        )
    about = describe_run(s, run=time.strftime("%Y-%m-%d %H:%M:%S"))
    kept = common.read_jsonl(s.out) if Path(s.out).exists() else []
    for what in wanted:
        with TemporaryDirectory() as folder:
            rows = [about | {"bench": what} | row for row in BENCHES[what](s, Path(folder))]
        print(table(rows), flush=True)
        kept += rows
        write_jsonl(s.out, kept)
    print(f"rows: {s.out}")


if __name__ == "__main__":
    main(Settings, run)
