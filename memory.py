"""What a step will need, before anything is loaded; and the largest pack first, so that "out of memory" comes at once.

The problem. A run that ends in "out of memory" after two hours, at the longest record, tells nobody which flag to turn. The model
is fixed, so memory is arithmetic. Of W weights, t of them trained, e bytes each, on N processes:

    weights       e W                    full fine-tuning on N: e t / N, and the blocks and the head that are whole just now
    masters       4 t                    only where e = 2: a 16-bit weight cannot take small steps (common.masters)
    gradients     4 t                    fp32, added up over packs
    optimizer     8 t                    Adam's two moments
    activations   what backward will ask for, of one pack of T tokens: per block 2 norms' inputs, results and outputs, queries,
                  keys, values, what attention gathered, and 4 vectors of the MLP's width
    head          a chunk of logits and the head's gradient

LoRA has a small t. With `--checkpointing on` only each block's input is kept, and the block is computed a second time in backward
(arXiv:1604.06174): a third more time, a small part of the memory. `auto` turns it on where the plan does not fit without.

    python dpo.py --ckpt llava-1.5-7b-hf --dry_run          from config.json alone, no weights needed; for one GPU and for eight

Then `begin` runs the largest pack forward and backward before the first step, with optimizer and gradients in place: it changes
no weight and no order. The plan counts tensors; the process itself and what the allocator keeps for later come on top. The
operations of a step, which speed.py asks for, are counted here, too.

Previous: data.py.  Next: resume.py (a run that was stopped goes on).
"""
import heapq
import math
import os
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Callable, Iterator

import torch

import parallel
from common import DTYPES, BadInput
from data import Pack, Tree, pack_size, split
from kernels import Mask, logprob
from model import Config, Llava, token_logps

PICTURED = 700           # tokens of a pair with a picture, where there is no data to ask
ROOM = 0.9               # the share of free memory that a plan may fill; the allocator wants some for itself
BLOCKS_AT_ONCE = 2       # of a sharded model: the one that runs, and the next
ROWS = ("weights", "masters", "gradients", "optimizer", "activations", "head")


def sizes(config: Config, rank: int) -> dict[str, int]:
    """How many weights: in all, trained, in one block, in the rest of what is trained, and in the head."""
    with torch.device("meta"):
        model = Llava(config)
    every = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for name, p in model.named_parameters() if name.startswith("vision_tower."))
    block = sum(p.numel() for p in model.language_model.layers[0].parameters())
    layers = len(model.language_model.layers)
    rest = every - frozen - layers * block
    adapters = layers * rank * sum(m.in_features + m.out_features for m in model.language_model.layers[0].modules()
                                   if isinstance(m, torch.nn.Linear))
    projector = sum(p.numel() for name, p in model.named_parameters() if name.startswith("multi_modal_projector."))
    return {"all": every + adapters, "trained": adapters + projector if rank else every - frozen, "block": block, "rest": rest,
            "head": model.head.numel()}


def activations(config: Config, tokens: int, scored: int, looked: tuple[int, int], images: int, e: int, rank: int,
                again: bool) -> list[tuple[int, int]]:
    """(bytes that backward will still ask for, those of gradients on their way through a block) when backward stands at the last
    block, which went on with scored rows only, and at the one before it. `looked`: how many rows of queries and of keys attention
    keeps per layer (the CPU copies what a branch sees)."""
    t, wide = config.text, 4 if e == 2 else 0                                    # 16 bits: a norm keeps an fp32 copy of its input
    D, I, Q, G = t.hidden_size, t.intermediate_size, t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    norm = D * (2 * e + (wide or e))                                             # of a row: input, normed, scaled
    mlp = norm + 4 * I * e + 3 * rank * e                                        # gate, its silu, up, their product; x A
    attention = tokens * (norm + 4 * rank * e) + e * (2 * looked[0] * Q + 2 * looked[1] * G + tokens * Q)    # q and output, k
    block, last = attention + tokens * mlp, attention + scored * mlp             # and v, the output in order
    seen = e * images * config.vision.patches * (config.vision.hidden_size + 2 * D) if images else 0
    seen += 8 * tokens * t.head_dim                                              # cosines and sines
    before, moving = (t.num_hidden_layers - 1) * (tokens * D * e if again else block), e * (2 * I + 2 * D)
    return [(seen + before + last + scored * norm + tokens * D * e * again, scored * moving),
            (seen + before + block * again, tokens * moving)]


def needs(config: Config, tokens: int, *, scored: int, images: int, looked: tuple[int, int] | None, dtype: torch.dtype, rank: int,
          world: int, packs: int, gpu: bool, again: bool) -> dict[str, int]:
    """Bytes of each row of the plan, for one process, at the worst moment of a step of `packs` packs."""
    n, e = sizes(config, rank), torch.finfo(dtype).bits // 8
    cut = 1 if rank else world                                                   # adapters: every process has all
    trained, D, V = n["trained"], config.text.hidden_size, config.text.vocab_size
    moments = activations(config, tokens, scored, looked or (tokens, tokens if gpu else 2 * tokens), images, e, rank, again)
    head = 2 * min(logprob.CHUNK_BYTES, 4 * scored * V) + 4 * V * D * (not rank) + 4 * V * D * (e == 2 and not gpu)
    found = {"weights": e * (n["all"] - trained + trained // cut), "masters": 4 * trained // cut * (e == 2),
             "gradients": 4 * trained // cut, "optimizer": 8 * trained // cut,
             "activations": max(kept + max(0, moving - head) for kept, moving in moments), "head": head}    # which is done then
    if cut > 1:
        found["weights"] += e * (BLOCKS_AT_ONCE * n["block"] + n["rest"])
        found["gradients"] += (e + 4) * max(n["block"], n["rest"])               # whole, and summed in fp32, before they are cut
    if packs == 1:                                                               # gradients come as activations go
        found["gradients"] = max(0, found["gradients"] - found["activations"])
    return found


def free_bytes(device: torch.device) -> int:
    """What this process may have there: what it has, and what nobody has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        said = [open(path, encoding="utf8").read() for path in ("/proc/meminfo", "/proc/self/status")]
        lines = [line.split() for text in said for line in text.splitlines()]
        return sum(int(line[1]) * 1024 for line in lines if line[0] in ("MemAvailable:", "RssAnon:"))
    except OSError:                                                              # macOS
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def attention_work(mask: Mask, width: int) -> int:
    """Operations of one layer's attention over trees, forward and backward, for what tokens really see: 2 products, then 5."""
    seen = mask.hi - mask.lo + torch.arange(len(mask.own), device=mask.own.device) - mask.own + 1
    return int(seen.sum()) * width * 2 * 7


def step_work(config: Config, pack: Pack) -> int:
    """Operations of a DPO step on one pack that no method gets around: the language model forward and backward on every token,
    the head on the scored ones, the frozen tower forward once per image."""
    t, v, images = config.text, config.vision, len(pack.pixels)
    heads = 2 * t.num_attention_heads + 2 * t.num_key_value_heads
    block = t.hidden_size * (heads * t.head_dim + 3 * t.intermediate_size)
    unread = (t.hidden_size * t.num_attention_heads * t.head_dim + 3 * t.hidden_size * t.intermediate_size) * (
        len(pack.ids) - len(pack.read))                                  # the last block, where nobody reads its result
    text = t.num_hidden_layers * (6 * block * len(pack.ids) + attention_work(pack.mask, t.hidden_size)) - 6 * unread
    tower = v.depth * (v.patches + 1) * (8 * v.hidden_size ** 2 + 4 * v.hidden_size * v.intermediate_size
                                         + 4 * (v.patches + 1) * v.hidden_size)
    project = 6 * v.patches * t.hidden_size * (v.hidden_size + t.hidden_size)
    return text + 6 * len(pack.rows) * t.vocab_size * t.hidden_size + images * (tower + project)


# ---- said before the first step --------------------------------------------------------------------------------------

def table(config: Config, s, dtype: torch.dtype, device: torch.device, world: int, free: int, tokens: int,
          **about) -> tuple[str, dict]:
    """The plan with and without checkpointing, as text and as totals {False: bytes, True: bytes}."""
    plans = {again: needs(config, tokens, dtype=dtype, rank=s.lora, world=world, gpu=device.type != "cpu", again=again, **about)
             for again in (False, True)}
    totals, n, gib = {again: sum(p.values()) for again, p in plans.items()}, sizes(config, s.lora), 2 ** 30
    lines = [f"memory plan, GiB for each of {world} process{'es' * (world > 1)}: {n['all'] / 1e9:.3g} billion weights, "
             f"{n['trained'] / 1e9:.3g} trained, {str(dtype).removeprefix('torch.')}, packs of {tokens:,} tokens",
             f"  {'':12}{'plain':>10}{'--checkpointing on':>22}"]
    lines += [f"  {row:12}{plans[False][row] / gib:10.2f}{plans[True][row] / gib:22.2f}" for row in ROWS]
    lines += [f"  {'in all':12}{totals[False] / gib:10.2f}{totals[True] / gib:22.2f}"]
    return "\n".join(lines + [f"  {'free':12}{free / gib:10.2f}   {device}"] * (free > 0)), totals


def choose(model: Llava, s, pack: Pack, packs: int) -> bool:
    """Print the plan for the largest pack of the data; is activation checkpointing on?"""
    world, device, dtype = parallel.world(), model.head.device, model.dtype
    free = free_bytes(device) // (world if device.type == "cpu" else 1)
    calls = pack.mask.plan[0] if device.type == "cpu" else []
    looked = (sum(c.q_rows.numel() for c in calls), sum(c.k_rows.numel() for c in calls)) if calls else None
    said, totals = table(model.config, s, dtype, device, world, free, len(pack.ids), scored=len(pack.rows), looked=looked,
                         packs=packs, images=0 if pack.pixels is None else len(pack.pixels))
    again = s.checkpointing
    print(said + f"\n  checkpointing is {'on' if again else 'off'}"
          + "; even so it may not fit: lower --pack, train adapters (--lora), or start more processes" * (totals[again] > free))
    return again


def dry_run(config: Config, s) -> None:
    """The plan without data or weights; for a GPU, unless --device cpu says otherwise."""
    try:
        device = torch.device("cuda" if s.device == "auto" else s.device)
    except RuntimeError as error:
        raise BadInput(f"--device {s.device}: {str(error).splitlines()[0]}") from None
    if s.dtype not in ("auto", *DTYPES):
        raise BadInput(f"--dtype {s.dtype}: choose one of {', '.join(DTYPES)}")
    dtype = DTYPES.get(s.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    tokens, there = pack_size(s.pack, device), device.type == "cpu" or torch.cuda.is_available()
    for world in sorted({parallel.world(), 1 if s.lora else 8}):
        said, _ = table(config, s, dtype, device, world, free_bytes(device) if there else 0, tokens, scored=tokens // 3, packs=2,
                        images=tokens // PICTURED if config.vision else 0, looked=None)
        print(said)


# ---- and tried -------------------------------------------------------------------------------------------------------

def begin(model: Llava, s, trees: Iterable[Tree], make_pack: Callable[[list[Tree]], Pack]) -> None:
    """Say the plan of a run over `trees`, set checkpointing, and compute the largest pack, forward and backward, with all else in
    place: twice, since a second one meets the first one's gradients. It counts nothing, so no weight and no moment changes."""
    parts = list(split(heapq.nlargest(s.batch, trees, key=lambda t: t.tokens), s.pack))
    pack = make_pack(parts[0])
    model.language_model.checkpointing = choose(model, s, pack, len(parts))
    for _ in parts[:2]:
        parallel.backward(model, 0 * token_logps(model, pack.to(model.head.device)).sum())
    for p in model.parameters():
        p.grad = None


@contextmanager
def room(s) -> Iterator[None]:
    """Inside, memory that is not there is a message that says which flag to turn."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise BadInput(f"out of memory with packs of {s.pack} tokens; lower --pack"
                       + ", set --checkpointing" * (not s.checkpointing)
                       + ", train adapters (--lora 128)" * (not s.lora) + ", or start more processes (parallel.py)") from None
