"""How fast, how much memory, against whom: every number here alternates with its opponent's in one run.

A speed claim is a ratio measured in one run, one step here, one step there; of dpo each contestant in a process of its own, so
that peak memory is its own. Medians, warm-up rounds dropped.

    dpo       one DPO step of LLaVA against TRL's DPOTrainer on the same checkpoint, records and threads: as TRL is by default
              (activation checkpointing) and without it, the fastest it accepts (it refuses cached references and padding-free
              packs for images). Vision frozen for all.
    sample    4 answers to each image question against transformers.generate
    kernels   attention over packed trees against a dense mask (FlexAttention: forward, where there is a compiler), log-probs
              against all logits
    growth    what a step costs as answers get longer, more, and the model larger

    pip install transformers==5.23.0 trl==1.16.0
    python speed.py                        all of it, on two threads; rows are added to results/bench.jsonl
    python speed.py --what dpo --size 7b   on a GPU: the shapes of LLaVA-1.5-7B, random weights; all trained wants 118 GB by our
                                           plan, --lora 128 (pip install peft==0.21.2; give it another --out) 67 or 23
Previous: chat.py.
"""
import ctypes
import multiprocessing
import os
import platform
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

import checkpoint
import dpo
from toy import figures
import kernels
import lora
import formats as records
from common import DTYPES, BadInput, describe_run, device_and_dtype, main, multiplies_bf16, write_jsonl
from data import Pixels, Tokens, Tree, answer_logps, make_pack, make_tree, pack_size, template
from kernels.attention import attention_spec, dense_mask
from kernels.logprob import logps_spec
from model import Config, Llava, TextConfig, generate
from memory import attention_work, step_work
from toy.build import SPECIAL, initialise, write_tokenizer
from vision import VisionConfig


@dataclass
class Settings:
    """Measure steps, sampling and kernels against their opponents."""
    what: str = "dpo,sample,kernels,growth"    # which of them, comma-separated
    out: str = "results/bench.jsonl"           # rows are added to this file
    size: str = "small"            # of the model: small (39 million parameters), 7b, 13b
    rounds: int = 5                # measured rounds, each contestant once a round
    warmup: int = 1                # rounds before them that do not count
    pairs: int = 4                 # a step
    lora: int = 0                  # dpo: rank of adapters for every contestant; 0: all weights are trained
    threads: int = 2               # for every contestant
    device: str = "auto"           # cpu, cuda, ...


# ---- what is measured on ----------------------------------------------------------------------------------------

SIZES = {   # (Llama: layers, width, feed-forward, heads, vocabulary; ViT: layers, width, heads, pixels)
    "tiny": ((2, 64, 128, 2, 8000), (2, 64, 2, 56)), "half": ((4, 512, 1408, 8, 8000), (6, 256, 4, 336)),
    "small": ((8, 512, 1408, 8, 8000), (6, 256, 4, 336)), "double": ((8, 768, 2048, 12, 8000), (6, 256, 4, 336)),
    "7b": ((32, 4096, 11008, 32, 32064), (24, 1024, 16, 336)), "13b": ((40, 5120, 13824, 40, 32064), (24, 1024, 16, 336))}


def config_of(size: str) -> Config:
    (layers, width, inner, heads, words), (depth, features, eyes, pixels) = SIZES[size]
    text = TextConfig(words, width, inner, layers, heads, heads, width // heads, 1e-5, 4096)
    return Config(text, VisionConfig(features, 4 * features, depth, eyes, pixels, 14), image_token=4)


def write_checkpoint(folder: Path, size: str) -> Path:
    """A random LLaVA with made-up words, in the layout that everybody reads."""
    config = config_of(size)
    model = Llava(config)
    initialise(model, 0, 0.02)
    write_tokenizer(folder, [f"w{k}" for k in range(config.text.vocab_size - len(SPECIAL))])
    return checkpoint.save(model, folder / "model", folder)


def write_records(folder: Path, count: int) -> Path:
    """Questions about pictures of noise, answers of made-up words, the first preferred to the second."""
    rng = random.Random(0)
    say = lambda n: " ".join(f"w{rng.randrange(7000)}" for _ in range(n))
    rows = []
    (folder / "images").mkdir(exist_ok=True)
    for k in range(count):
        noise = np.random.default_rng(k).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(folder / "images" / f"{k}.jpg")
        rows.append({"id": str(k), "images": [f"images/{k}.jpg"],
                     "messages": [{"role": "user", "content": "<image>\n" + say(20)}], "pair": [0, 1],
                     "answers": [{"text": say(rng.randint(30, 90))} for _ in range(2)]})
    write_jsonl(folder / "records.jsonl", rows)
    return folder / "records.jsonl"


# ---- how much work it is ------------------------------------------------------------------------------------------

def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a plain n x n matrix product: what everything else is held against."""
    n = 2048 if device.type == "cpu" else 8192                           # a GPU does 2048 in the time of a launch and a wait
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    row = in_turn({"": lambda: a @ b}, 3, 10)[""]
    return 2 * n ** 3 / min(row["all_ms"]) * 1000


# ---- contestants: each waits at `gate` between its steps, in a process of its own -----------------------------------

def peak_mib() -> float:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)    # bytes or KiB
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else host) / 2**20


def wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gate(pipe, **said) -> None:
    """Report the step that is over, wait for the word to go on."""
    wait_for_gpu()
    pipe.send(said | {"peak_mib": peak_mib()})
    try:
        if not pipe.recv():
            os._exit(0)
    except EOFError:                                                     # the other side is gone
        os._exit(0)


def batches(pipe, items: list, size: int, said: dict):
    """Pass over `items` for ever, stopping at the gate before each batch. The gate opens first after everything is loaded."""
    k = 0
    while True:
        gate(pipe, **said)
        yield from (items[(k + i) % len(items)] for i in range(size))
        k += size


def ours(pipe, folder: Path, s: Settings, dtype: str) -> None:
    """dpo.train itself; its reference is computed before, as in every run of dpo.py."""
    torch.set_num_threads(s.threads)
    device, kind = device_and_dtype(s.device, dtype)
    model = checkpoint.load(folder / "model", device, kind)
    tokens, pixels = Tokens(folder / "model", model.config), Pixels(model.config)
    items, _ = records.read(folder / "records.jsonl")
    trees = [make_tree(tokens, r, [a["text"] for a in r["answers"]]) for r in items]
    pairs = list(dpo.make_pairs(items, trees, dpo.reference_logps(model, trees, pixels, 8192), 2, 0))
    work = sum(step_work(model.config, pixels.pack([tree])) for tree in trees) / len(trees) * s.pairs
    said = {"tokens": statistics.mean(t.tokens for t in trees)} | ({} if s.lora else {"gflop": work / 1e9})
    if s.lora:
        lora.attach(model, s.lora, 2 * s.lora, 0)
    dpo.shuffled = lambda pairs, seed: batches(pipe, pairs, s.pairs, said)
    sys.stdout = open(os.devnull, "w")
    dpo.train(model, pairs, pixels, dpo.Settings(batch=s.pairs, lr=5e-7, pack=pack_size(0, device)), 10**6, folder)


def theirs(pipe, folder: Path, s: Settings, dtype: str, checkpointing: bool) -> None:
    """TRL's DPOTrainer on the same prompts, answers and pictures, in order."""
    torch.set_num_threads(s.threads)
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer
    transformers.utils.logging.set_verbosity_error()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=DTYPES[dtype])
    model.model.vision_tower.requires_grad_(False)
    processor = transformers.AutoProcessor.from_pretrained(folder / "model")
    rows = common.read_jsonl(folder / "records.jsonl")
    data = datasets.Dataset.from_list([
        {"prompt": "<s> " + template(r["messages"]), "images": [str(folder / name) for name in r["images"]]}
        | {which: f" {answer['text']} </s>" for which, answer in zip(("chosen", "rejected"), r["answers"])} for r in rows])
    data = data.cast_column("images", datasets.Sequence(datasets.Image()))
    said = {}

    class Gate(transformers.TrainerCallback):
        def on_train_begin(self, *args, **more):
            gate(pipe)

        def on_step_end(self, *args, **more):
            gate(pipe, **said)

    class Trainer(DPOTrainer):
        def compute_loss(self, model, inputs, *args, **more):
            said["tokens"] = inputs["input_ids"].numel() / s.pairs
            return super().compute_loss(model, inputs, *args, **more)

    settings = DPOConfig(output_dir=str(folder / "trl"), per_device_train_batch_size=s.pairs, learning_rate=5e-7, max_steps=10**6,
                         gradient_checkpointing=checkpointing, report_to=[], logging_strategy="no", save_strategy="no",
                         bf16=False, use_cpu=not torch.cuda.is_available(), disable_tqdm=True, max_length=None)
    adapters = {}
    if s.lora:                                                           # where lora.attach has them, the projector beside
        import peft
        names = "|".join(name for part in lora.TARGETS.values() for name in part)
        adapters["peft_config"] = peft.LoraConfig(r=s.lora, lora_alpha=2 * s.lora, modules_to_save=["multi_modal_projector"],
                                                  target_modules=rf".*language_model.*\.({names})")
    Trainer(model=model, args=settings, train_dataset=data, processing_class=processor, callbacks=[Gate()], **adapters).train()


def alternate(contestants: dict, folder: Path, s: Settings) -> dict[str, dict]:
    """{name: {"ms": median, "all_ms": [...], "peak_mib", ...}} of (worker, its last arguments) each, one step in turn."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    rows = {name: {"all_ms": []} for name in contestants}
    try:
        for name, (worker, *how) in contestants.items():
            pipes[name], there = context.Pipe()
            processes.append(context.Process(target=worker, args=(there, folder, s, *how), daemon=True))
            processes[-1].start()
            there.close()                                                # it alone holds that end: where it dies, we hear so
            pipes[name].recv()                                           # loaded
        for k in tqdm(range(s.warmup + s.rounds), desc="rounds", disable=None):
            for name, pipe in pipes.items():
                began = time.perf_counter()
                pipe.send(True)
                rows[name] |= pipe.recv()
                if k >= s.warmup:
                    rows[name]["all_ms"].append(round(1000 * (time.perf_counter() - began), 1))
    except (EOFError, ConnectionError):                                  # out of memory, say
        raise BadInput(f"{name} ended before its step did; what it said last stands above") from None
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(False)
        process.join()                                                   # its memory is free
    return {name: row | {"ms": statistics.median(row["all_ms"])} for name, row in rows.items()}


TRL = {"TRL, as it is": True, "TRL, no checkpointing": False}


def bench_dpo(s: Settings, folder: Path) -> list[dict]:
    write_checkpoint(folder, s.size)
    write_records(folder, 6 * s.pairs)
    device, _ = device_and_dtype(s.device, "float32")
    first = "float32" if device.type == "cpu" else "bfloat16"
    contestants = {"remedy": (ours, first)} | {name: (theirs, first, again) for name, again in TRL.items()}
    if device.type == "cpu" and multiplies_bf16(device):
        contestants["remedy in bfloat16"] = ours, "bfloat16"
    rounds = [contestants] if s.size == "small" else [{name: one} for name, one in contestants.items()]    # two may not fit
    rows = {name: row for these in rounds for name, row in alternate(these, folder, s).items()}
    rate = matmul_rate(device, DTYPES[first])
    return [{"bench": "dpo", "name": name, "pairs": s.pairs, "lora": s.lora, "pairs_per_s": 1000 * s.pairs / row["ms"], **row}
            | ({"of_matmul_rate": 1000 * row["gflop"] * 1e9 / row["ms"] / rate} if "gflop" in row else {})
            for name, row in rows.items()]


# ---- sampling, kernels, growth: one process, in turn ------------------------------------------------------------------

def in_turn(calls: dict, warmup: int, rounds: int) -> dict[str, dict]:
    """{name: {"ms": median, "all_ms"}} of functions, called alternately."""
    rows = {name: [] for name in calls}
    for k in range(warmup + rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            wait_for_gpu()
            if k >= warmup:
                rows[name].append(round(1000 * (time.perf_counter() - began), 3))
    return {name: {"ms": statistics.median(ms), "all_ms": ms} for name, ms in rows.items()}


def memory_of(call) -> dict:
    """What a call needs beyond what stood there before it; nothing where the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)                                 # what is free is given back,
        Path("/proc/self/clear_refs").write_text("5")                    # and the peak is what is there now
    else:
        return {}
    before = peak_mib()
    call()
    wait_for_gpu()
    return {"peak_mib": peak_mib() - before}


def bench_sample(s: Settings, folder: Path, count: int = 4, n: int = 4, words: int = 64) -> list[dict]:
    """n sampled answers of `words` tokens to each of `count` image questions."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    device, dtype = device_and_dtype(s.device, "auto")
    write_checkpoint(folder, s.size)
    items, _ = records.read(write_records(folder, count))
    mine = checkpoint.load(folder / "model", device, dtype)
    tokens, pixels = Tokens(folder / "model", mine.config), Pixels(mine.config)
    trees = [make_tree(tokens, r, []) for r in items]
    pictures = [pixels(t.images) for t in trees]
    other = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=dtype).to(device)
    ids = torch.tensor([t.prompt for t in trees], device=device)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.cat(pictures).to(device, dtype)}
    how = {"do_sample": True, "num_return_sequences": n, "max_new_tokens": words, "min_new_tokens": words, "pad_token_id": 3}
    never = tokens.tokenizer.get_vocab_size()                            # no word: all answers reach their full length
    ours = lambda: generate(mine, [t.prompt for t in trees], pictures, n=n, max_new=words, temperature=1.0, eos=never)
    rows = in_turn({"remedy": ours, "transformers.generate": lambda: other.generate(**asked, **how)}, s.warmup, s.rounds)
    return [{"bench": "sample", "name": name, "questions": count, "n": n, "tokens": words,
             "tokens_per_s": 1000 * count * n * words / row["ms"], **row} for name, row in rows.items()]


def bench_kernels(s: Settings, folder: Path) -> list[dict]:
    """Forward and backward at one pack's size."""
    device, dtype = device_and_dtype(s.device, "auto")
    config = config_of(s.size).text
    H, D, V = config.num_attention_heads, config.head_dim, config.vocab_size
    tree = Tree("", [5] * 640, [[5] * 128, [5] * 128])
    pack = make_pack([tree] * s.pairs).to(device)
    mask, T = pack.mask, len(pack.ids)
    q, k, v = (torch.randn(T, H, D, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    hidden, weight = (torch.randn(x, config.hidden_size, device=device, dtype=dtype, requires_grad=True) for x in (T, V))
    dense = dense_mask(mask)
    both = lambda out, inputs: torch.autograd.grad(out.float().sum(), inputs)
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]                 # (1, H, T, D)
    still = [x.detach() for x in batch]
    seen = lambda b, h, i, j: (mask.lo[i] <= j) & (j < mask.hi[i]) | (mask.own[i] <= j) & (j <= i)
    blocks, flex = create_block_mask(seen, None, None, T, T, device), torch.compile(flex_attention)
    compiler = torch.cuda.is_available() or shutil.which("g++") or shutil.which("clang++")
    forward = {"attention forward, FlexAttention": lambda: flex(*still, block_mask=blocks)} if compiler else {}
    formula = lambda: (hidden @ weight.T).float().log_softmax(-1)[pack.rows].gather(1, pack.targets[:, None])
    calls = {
        "attention, remedy": lambda: both(kernels.attention(q, k, v, pack.mask), (q, k, v)),
        "attention, torch SDPA with a dense mask": lambda: both(F.scaled_dot_product_attention(*batch, dense), (q, k, v)),
        "attention, its formula": lambda: both(attention_spec(q, k, v, pack.mask), (q, k, v)),
        "attention forward, remedy": torch.no_grad()(lambda: kernels.attention(q, k, v, pack.mask)), **forward,
        "log-probs, remedy": lambda: both(kernels.logps(hidden, weight, pack.rows, pack.targets), (hidden, weight)),
        "log-probs, all logits of the scored rows": lambda: both(
            logps_spec(hidden, weight, pack.rows, pack.targets), (hidden, weight)),
        "log-probs, all logits of all rows": lambda: both(formula(), (hidden, weight))}
    rows, rate, work = in_turn(calls, s.warmup, s.rounds), matmul_rate(device, dtype), attention_work(pack.mask, H * D)
    kinds = {"attention": (work, 12 * q.nbytes), "attention forward": (work * 2 // 7, 4 * q.nbytes),    # operations, bytes moved
             "log-probs": (6 * len(pack.rows) * V * config.hidden_size, 3 * weight.nbytes + 3 * hidden.nbytes)}    # at least
    out = []
    for name, row in rows.items():
        flop, moved = (1000 * x / row["ms"] for x in kinds[name.split(",")[0]])
        out.append({"bench": "kernels", "name": name, "tokens": T, "scored": len(pack.rows), "heads": H, "head_dim": D,
                    "vocabulary": V, "dtype": str(dtype), "gflop_per_s": flop / 1e9, "of_matmul_rate": flop / rate,
                    "gb_per_s": moved / 1e9, **row, **memory_of(calls[name])})
    return out


def bench_growth(s: Settings, folder: Path) -> list[dict]:
    """Log-probs forward and backward of one record: answers twice as long, twice as many, the model half and double."""
    (device, dtype), rows = device_and_dtype(s.device, "auto"), []
    for size, n, length in (("small", 2, 64), ("small", 2, 128), ("small", 2, 256), ("small", 4, 64), ("small", 8, 64),
                            ("half", 2, 64), ("double", 2, 64)):
        initialise(model := Llava(config_of(size if s.size == "small" else s.size)), 0, 0.02)    # where its generator is,
        model.to(device, dtype)                                          # on the CPU
        tree = Tree("", [5] * 60 + [4] * 576, [[5] * length] * n)
        pack = make_pack([tree], torch.randn(1, 3, 336, 336)).to(device)
        parameters = [p for name, p in model.named_parameters() if not name.startswith("vision_tower.")]
        row = in_turn({"": lambda: torch.autograd.grad(answer_logps(model, pack).sum(), parameters)}, s.warmup, s.rounds)[""]
        rows.append({"bench": "growth", "name": f"{size}, {n} answers of {length}", "tokens": len(pack.ids),
                     "parameters": sum(p.numel() for p in model.parameters()), **row})
    return rows


# ---- the script ---------------------------------------------------------------------------------------------------

BENCHES = {"dpo": bench_dpo, "sample": bench_sample, "kernels": bench_kernels, "growth": bench_growth}


def table(rows: list[dict]) -> str:
    """One line per row; the ratio is to the first row of its kind: below 1 is slower."""
    out, first = [], {}
    for row in rows:
        kind = row["bench"], row["name"].split(",")[0] if row["bench"] == "kernels" else ""
        base = first.setdefault(kind, row)["ms"]
        more = [f"{row[key]:,.{digits}f} {unit}" for key, digits, unit in (
            ("pairs_per_s", 2, "pairs/s"), ("tokens_per_s", 0, "tokens/s"), ("tokens", 0, "tokens"), ("peak_mib", 0, "MiB peak"),
            ("gb_per_s", 1, "GB/s"), ("gflop_per_s", 0, "GFLOP/s"), ("of_matmul_rate", 2, "of the matmul rate")) if key in row]
        out.append(f"{row['bench']:8} {row['name']:42}{row['ms']:10,.1f} ms  x{row['ms'] / base:5.2f}   {'  '.join(more)}")
    return "\n".join(out)


def run(s: Settings) -> None:
    if not {*s.what.split(",")} <= {*BENCHES} or s.size not in SIZES or min(s.rounds, s.pairs, s.threads) < 1:
        raise BadInput(f"--what: {', '.join(BENCHES)}; --size: {', '.join(SIZES)}; --rounds, --pairs and --threads at least 1")
    torch.set_num_threads(s.threads)
    about = describe_run(s, date=time.strftime("%Y-%m-%d"))
    for what in s.what.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows = BENCHES[what](s, Path(folder))
        print(table(rows))
        kept = common.read_jsonl(s.out) if Path(s.out).exists() else []
        rows = [row for row in kept if row["bench"] != what] + [about | row for row in rows]
        write_jsonl(s.out, rows)
    if {"dpo", "growth"} <= {row["bench"] for row in rows}:
        print(f"rows: {s.out}   figure: {figures.save(figures.speed(rows), Path(s.out).parent / 'figures' / 'speed.png')}")


if __name__ == "__main__":
    main(Settings, run)
