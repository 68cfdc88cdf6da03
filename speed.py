"""How fast, how much memory, against whom.

    dpo       one DPO step of LLaVA against TRL's DPOTrainer, same checkpoint, records and threads: as
              TRL is by default (activation checkpointing), and without it, the fastest it accepts. It
              refuses cached references and padding-free packs for images. Vision is frozen for all.
    sample    4 answers to each image question, against transformers.generate
    kernels   attention over packed trees and log-probs, forward and backward, the obvious ways beside

A claim is a ratio within one run. The contestants of dpo and sample are processes of their own,
started in the environment that speed.py was started in (opponents.py says why). They take one step
in turn, and who is not at it is stopped by a signal: the cores belong to the one that is timed.
Medians; warm-up rounds do not count. Machines have good and bad hours, so every run is kept, and
the table says lowest and highest.

    pip install transformers==5.23.0 trl==1.16.0 peft==0.21.2
    python speed.py                  all of it, on two threads; rows are added to results/bench.jsonl
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
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

import checkpoint
import dpo
import formats
import kernels
import lora
from common import HERE, BadInput, describe_run, device_and_dtype, main, write_jsonl
from data import VICUNA, Pack, Pixels, Tokens, Tree, make_pack, make_tree
from generate import generate
from kernels import Mask
from kernels.attention import dense_mask
from kernels.logprob import logps_spec
from model import Config, Llava, TextConfig
from opponents import open_gate
from toy.build import SPECIAL, write_tokenizer
from train import Run
from vision import VisionConfig


@dataclass
class Settings:
    """Measure steps, sampling and kernels against their opponents."""
    what: str = "dpo,sample,kernels"           # which of them, comma-separated
    out: str = "results/bench.jsonl"           # rows are added to this file
    size: str = "small"            # of the model: tiny, small (39 million parameters), 7b
    rounds: int = 5                # measured rounds, each contestant once a round
    warmup: int = 1                # rounds before them that do not count
    pairs: int = 4                 # a step
    lora: int = 0                  # dpo: rank of adapters for every contestant; 0: all is trained
    threads: int = 2               # for every contestant
    device: str = "auto"           # cpu, cuda, ...


# ---- what is measured on -------------------------------------------------------------------------

SIZES = {    # Llama: layers, width, feed-forward, heads, vocabulary | ViT: layers, width, heads, pixels
    "tiny": (2, 64, 128, 2, 8000, 2, 64, 2, 56),
    "small": (8, 512, 1408, 8, 8000, 6, 256, 4, 336),
    "7b": (32, 4096, 11008, 32, 32064, 24, 1024, 16, 336),
}


def config_of(size: str) -> Config:
    layers, width, inner, heads, words, depth, features, eyes, pixels = SIZES[size]
    text = TextConfig(words, width, inner, layers, heads, heads, width // heads, 1e-5, 4096)
    vision = VisionConfig(features, 4 * features, depth, eyes, pixels, 14)
    return Config(text, vision, image_token=SPECIAL.index("<image>"))


def write_checkpoint(folder: Path, size: str, device: torch.device, dtype: torch.dtype) -> Path:
    """A random LLaVA with made-up words, in the layout that everybody reads."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Llava(config_of(size)).to(dtype)
    model.dtype = dtype
    words = model.config.text.vocab_size - len(SPECIAL)
    write_tokenizer(folder, [f"w{k}" for k in range(words)])
    return checkpoint.save(model, folder / "model", folder)


def made_up(rng: random.Random, words: int) -> str:
    return " ".join(f"w{rng.randrange(7000)}" for _ in range(words))


def write_records(folder: Path, count: int) -> list[dict]:
    """Questions about pictures of noise, with two answers: records.jsonl, and trl.json for TRL."""
    rng = random.Random(0)
    (folder / "images").mkdir()
    records, for_trl = [], []
    for k in range(count):
        name = f"images/{k}.jpg"
        noise = np.random.default_rng(k).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(folder / name)
        messages = [{"role": "user", "content": "<image>\n" + made_up(rng, 20)}]
        chosen = made_up(rng, rng.randint(30, 90))
        rejected = made_up(rng, rng.randint(30, 90))
        answers = [{"text": chosen}, {"text": rejected}]
        records.append({"id": str(k), "images": [name], "messages": messages, "answers": answers})
        for_trl.append({
            "images": [str(folder / name)],
            "prompt": "<s> " + VICUNA.prompt(messages),
            "chosen": f" {chosen} </s>",
            "rejected": f" {rejected} </s>",
        })
    write_jsonl(folder / "records.jsonl", records)
    (folder / "trl.json").write_text(json.dumps(for_trl))
    usable, _ = formats.read(folder / "records.jsonl")
    return usable


# ---- how much work it is -------------------------------------------------------------------------

def attention_work(mask: Mask, width: int) -> int:
    """Operations of one layer's attention for what tokens see: 2 products forward, 5 backward."""
    at = torch.arange(len(mask.own), device=mask.own.device)
    seen = mask.hi - mask.lo + at - mask.own + 1
    return int(seen.sum()) * width * 2 * 7


def step_work(config: Config, pack: Pack) -> int:
    """Operations of a DPO step on one pack that no method gets around: the language model forward and
    backward on every token, the head on the scored ones, the frozen tower forward once per image."""
    t, v = config.text, config.vision
    heads = (t.num_attention_heads + t.num_key_value_heads) * t.head_dim
    block = t.hidden_size * (2 * heads + 3 * t.intermediate_size)            # weights of one layer
    attention = attention_work(pack.mask, t.num_attention_heads * t.head_dim)
    text = t.num_hidden_layers * (6 * block * len(pack.ids) + attention)

    # Of tokens that predict nothing, the last layer computes keys and values only.
    beyond = t.hidden_size * (t.num_attention_heads * t.head_dim + 3 * t.intermediate_size)
    text -= 6 * beyond * (len(pack.ids) - len(pack.read))

    head = 6 * len(pack.rows) * t.vocab_size * t.hidden_size
    patches, width = v.patches + 1, v.hidden_size
    tower = v.depth * patches * (8 * width**2 + 4 * width * v.intermediate_size + 4 * patches * width)
    project = 6 * v.patches * t.hidden_size * (width + t.hidden_size)
    return text + head + len(pack.pixels) * (tower + project)


# ---- contestants in processes of their own -------------------------------------------------------

def contestant(text: str):
    """Ours, as those of opponents.py: the process stops at its gate before every step."""
    job = json.loads(text)
    gate, folder = open_gate(), Path(job["folder"])
    torch.set_num_threads(job["threads"])
    device, dtype = device_and_dtype(job["device"], job["dtype"])
    model = checkpoint.load(folder / "model", device, dtype)
    if job["what"] == "dpo":
        our_steps(gate, folder, job, model)
    else:
        our_answers(gate, folder, job, model)


def our_steps(gate: Callable, folder: Path, job: dict, model: Llava):
    """dpo.train itself; its reference is computed before, as in every run of dpo.py."""
    tokens, pixels = Tokens(folder / "model", model.config), Pixels(model.config)
    records, _ = formats.read(folder / "records.jsonl")
    trees = []
    for record in records:
        trees.append(make_tree(tokens, record, [answer["text"] for answer in record["answers"]]))
    reference = dpo.reference_logps(model, trees, pixels, 8192)
    pairs = dpo.make_pairs(trees, [(0, 1)] * len(trees), reference)

    said = {"tokens": statistics.mean(pair.tokens for pair in pairs)}
    if job["lora"]:
        lora.attach(model, job["lora"], 2 * job["lora"], 0)
    else:
        work = statistics.mean(step_work(model.config, pixels.pack([pair])) for pair in pairs)
        said["gflop"] = work * job["pairs"] / 1e9

    settings = dpo.Settings(batch=job["pairs"], lr=5e-7)
    run = Run(model, settings, pixels.pack, steps=10**6)
    update = run.update

    def update_and_wait(**amounts) -> dict:
        row = update(**amounts)
        gate(**said)
        return row

    run.update = update_and_wait
    gate()
    dpo.train(run, pairs, settings)


def our_answers(gate: Callable, folder: Path, job: dict, model: Llava):
    asked = torch.load(folder / "prompts.pt")
    prompts, pixels = asked["ids"].tolist(), list(asked["pixels"].split(1))
    never = (model.config.text.vocab_size,)                              # all reach their full length
    while True:
        gate()
        generate(model, prompts, pixels, n=job["n"], max_new=job["words"], temperature=1.0, ends=never)


OURS = ["-c", "import speed, sys; speed.contestant(sys.argv[1])"]
THEIRS = ["opponents.py"]


class Process:
    """A contestant. It is stopped but for its own steps."""

    def __init__(self, name: str, job: dict):
        program = OURS if name == "remedy" else THEIRS
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, *program, json.dumps(job)], cwd=HERE, env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:                                                     # out of memory, say
            raise BadInput(f"{self.name} ended before its step did; its last words stand above")
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)                       # it has stopped
        return json.loads(line)

    def step(self) -> dict:
        self.process.send_signal(signal.SIGCONT)
        began = time.perf_counter()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        said = self.hear()
        return said | {"ms": 1000 * (time.perf_counter() - began)}

    def end(self):
        self.process.kill()
        self.process.wait()                                              # its memory is free


def alternate(jobs: dict[str, dict], s: Settings) -> list[dict]:
    """One step each in turn -> a row for each: what it said last, its steps and their median."""
    running = []
    steps = {name: [] for name in jobs}
    try:
        for name, job in jobs.items():
            running.append(Process(name, job))
            running[-1].hear()                                           # all is loaded
        for _ in tqdm(range(s.warmup + s.rounds), desc="rounds", disable=None):
            for process in running:
                steps[process.name].append(process.step())
    finally:
        for process in running:
            process.end()

    rows = []
    for name, said in steps.items():
        times = [round(one["ms"], 1) for one in said[s.warmup:]]
        rows.append({"name": name, **said[-1], "ms": statistics.median(times), "all_ms": times})
    return rows


def job_of(what: str, s: Settings, folder: Path, dtype: torch.dtype) -> dict:
    name = str(dtype).removeprefix("torch.")
    return asdict(s) | {"what": what, "folder": str(folder), "dtype": name}


def bench_dpo(s: Settings, folder: Path) -> list[dict]:
    device, dtype = device_and_dtype(s.device, "auto")
    write_checkpoint(folder, s.size, device, dtype)
    write_records(folder, 6 * s.pairs)
    job = job_of("dpo", s, folder, dtype) | {"targets": rf".*language_model.*{lora.TARGETS}"}
    jobs = {
        "remedy": job,
        "TRL, as it is": job | {"checkpointing": True},
        "TRL, no checkpointing": job | {"checkpointing": False},
    }

    # Large models may not fit side by side. Then one after the other; who does not fit is left out.
    rows = []
    if s.size == "7b":
        for name in jobs:
            try:
                rows += alternate({name: jobs[name]}, s)
            except BadInput as problem:
                print(problem)
    else:
        rows = alternate(jobs, s)

    rate = matmul_rate(device, dtype)
    for row in rows:
        row |= {"pairs": s.pairs, "lora": s.lora, "pairs_per_s": 1000 * s.pairs / row["ms"]}
        if "gflop" in row:
            row["of_matmul_rate"] = 1000 * row["gflop"] * 1e9 / row["ms"] / rate
    return rows


def bench_sample(s: Settings, folder: Path, count: int = 4, n: int = 4, words: int = 64) -> list[dict]:
    """n sampled answers of `words` tokens to each of `count` image questions."""
    device, dtype = device_and_dtype(s.device, "auto")
    model, config = write_checkpoint(folder, s.size, device, dtype), config_of(s.size)
    tokens, pixels = Tokens(model, config), Pixels(config)
    trees = [make_tree(tokens, record, []) for record in write_records(folder, count)]
    pictures = pixels([path for tree in trees for path in tree.images])
    ids = torch.tensor([tree.ids() for tree in trees])
    torch.save({"ids": ids, "pixels": pictures}, folder / "prompts.pt")

    job = job_of("sample", s, folder, dtype) | {"n": n, "words": words}
    rows = alternate({"remedy": job, "transformers.generate": job}, s)
    for row in rows:
        row |= {"questions": count, "n": n, "tokens": words}
        row["tokens_per_s"] = 1000 * count * n * words / row["ms"]
    return rows


# ---- kernels: one process, in turn ---------------------------------------------------------------

def in_turn(calls: dict[str, Callable], warmup: int, rounds: int) -> dict[str, float]:
    """Medians in ms of functions called alternately; on a GPU each many times, between its events."""
    if torch.cuda.is_available():
        from triton.testing import do_bench
        return {name: do_bench(call, return_mode="median") for name, call in calls.items()}

    times = {name: [] for name in calls}
    for _ in range(warmup + rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(ms[warmup:]) for name, ms in times.items()}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a plain matrix product: what everything else is held against."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / in_turn({"": lambda: a @ b}, 3, 10)[""] * 1000


def compare(what: str, ways: dict[str, Callable], inputs: list[Tensor], s: Settings,
            work: int) -> list[dict]:
    """A row for each way to compute the same, forward and backward, of `work` operations."""
    calls = {name: lambda way=way: forward_backward(way, inputs) for name, way in ways.items()}
    rate = matmul_rate(inputs[0].device, inputs[0].dtype)
    rows = []
    for name, ms in in_turn(calls, s.warmup, s.rounds).items():
        row = {"name": f"{what}, {name}", "dtype": str(inputs[0].dtype), "ms": ms}
        row["of_matmul_rate"] = work / ms * 1000 / rate
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            calls[name]()
            row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows.append(row)
    return rows


def forward_backward(way: Callable, inputs: list[Tensor]):
    out = way(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def bench_kernels(s: Settings, folder: Path) -> list[dict]:
    """Attention and log-probs of one pack, in the sizes of the model."""
    device, dtype = device_and_dtype(s.device, "auto")
    config = config_of(s.size).text
    tree = Tree("", [5] * 640, [[5] * 128, [5] * 128])
    pack = make_pack([tree] * s.pairs).to(device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    T, H, D = len(pack.ids), config.num_attention_heads, config.head_dim
    qkv = [draw(T, H, D), draw(T, H, D), draw(T, H, D)]
    work = attention_work(pack.mask, H * D)
    rows = compare("attention", ways_to_attend(pack.mask), qkv, s, work)

    V, width = config.vocab_size, config.hidden_size
    hidden, head = draw(T, width), draw(V, width)
    head.data *= 2 * width**-0.5                                         # logits of spread 2
    work = 6 * len(pack.rows) * V * width
    rows += compare("log-probs", ways_to_score(pack), [hidden, head], s, work)
    about = {"tokens": T, "heads": H, "head_dim": D, "scored": len(pack.rows), "vocabulary": V}
    return [row | about for row in rows]


def ways_to_attend(mask: Mask) -> dict[str, Callable]:
    dense = dense_mask(mask)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))           # (T, H, D) -> (1, H, T, D)
        return F.scaled_dot_product_attention(q, k, v, dense)

    ways = {
        "remedy": lambda q, k, v: kernels.attention(q, k, v, mask),
        "torch SDPA with a dense mask": sdpa,
    }
    if torch.cuda.is_available():                                        # elsewhere it has no backward
        def seen(batch, head, i, j):
            return (mask.lo[i] <= j) & (j < mask.hi[i]) | (mask.own[i] <= j) & (j <= i)

        blocks = create_block_mask(seen, None, None, len(dense), len(dense), dense.device)
        compiled = torch.compile(flex_attention)

        def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return compiled(q, k, v, block_mask=blocks)

        ways["FlexAttention"] = flex
    return ways


def ways_to_score(pack: Pack) -> dict[str, Callable]:
    rows, targets = pack.rows, pack.targets

    def all_rows(hidden: Tensor, head: Tensor) -> Tensor:
        logits = (hidden @ head.T).float()
        return logits.log_softmax(-1)[rows].gather(1, targets[:, None])

    return {
        "remedy": lambda hidden, head: kernels.logps(hidden, head, rows, targets),
        "all logits of the scored rows": lambda hidden, head: logps_spec(hidden, head, rows, targets),
        "all logits of all rows": all_rows,
    }


# ---- the script ----------------------------------------------------------------------------------

BENCHES = {"dpo": bench_dpo, "sample": bench_sample, "kernels": bench_kernels}
UNITS = {    # of a row's figures: name, digits
    "pairs_per_s": ("pairs/s", 2),
    "tokens_per_s": ("tokens/s", 0),
    "peak_mib": ("MiB", 0),
    "of_matmul_rate": ("of the matmul rate", 2),
}


def table(rows: list[dict]) -> str:
    """A line per contestant: lowest to highest of its runs. `x` is its time over that of the first of
    its kind in the same run."""
    first, lines = {}, {}
    for row in rows:
        kind = row["bench"], row["name"].split(",")[0] if row["bench"] == "kernels" else ""
        base = first.setdefault((row["run"], *kind), row)
        row = row | {"x": row["ms"] / base["ms"]}
        lines.setdefault((row["bench"], row["name"]), []).append(row)

    text = []
    for (bench, name), runs in lines.items():
        ms = span(runs, "ms", 0 if runs[0]["ms"] >= 100 else 2)
        line = f"{bench:8} {name:42}{ms:>14} ms  x {span(runs, 'x', 2):11}"
        for key, (unit, digits) in UNITS.items():
            if key in runs[0]:
                line += f"  {span(runs, key, digits)} {unit}"
        text.append(line)
    return "\n".join(text)


def span(runs: list[dict], key: str, digits: int) -> str:
    values = [row[key] for row in runs]
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return low if low == high else f"{low}-{high}"


def run(s: Settings):
    wanted = s.what.split(",")
    if not {*wanted} <= {*BENCHES} or s.size not in SIZES or min(s.rounds, s.pairs, s.threads) < 1:
        raise BadInput(
            f"--what: {', '.join(BENCHES)}; --size: {', '.join(SIZES)}; "
            "--rounds, --pairs and --threads at least 1"
        )
    torch.set_num_threads(s.threads)
    about = describe_run(s, run=time.strftime("%Y-%m-%d %H:%M:%S"))
    kept = common.read_jsonl(s.out) if Path(s.out).exists() else []
    for what in wanted:
        with tempfile.TemporaryDirectory() as folder:
            rows = [about | {"bench": what} | row for row in BENCHES[what](s, Path(folder))]
        print(table(rows), flush=True)
        kept += rows
        write_jsonl(s.out, kept)
    print(f"rows: {s.out}")


if __name__ == "__main__":
    main(Settings, run)
