"""What a step will need, before anything is loaded; and the largest pack first.

The problem. A run that ends in "out of memory" after two hours, at the longest record, tells nobody
which flag to turn.

The trick. The model is fixed, so memory is arithmetic. Of t trained and f frozen weights, e bytes
for each number that the model computes with (--dtype), on N processes:

    weights       4 t / N + e f    trained ones in fp32: 16 bits cannot hold a small step
    copies        e t              16 bits only: a product keeps its weight in 16 bits for backward
    gradients     4 t / N          fp32, added up over packs
    optimizer     8 t / N          Adam's two moments
    activations                    what backward will ask for, of one pack
    head                           a chunk of logits, and the head's gradient

Full fine-tuning is cut into N shards, and its copies are the blocks that are whole just now;
adapters are whole in every process. With --checkpointing a block keeps its input alone, and is
computed a second time in backward (arXiv:1604.06174): a third more time, a small part of
activations and copies. The plan has a column for either way, and says which one to take.

    python dpo.py --ckpt llava-1.5-7b-hf --dry_run      from config.json alone; for 1 GPU and for 8

`begin` then runs the largest pack forward and backward ahead of the first step; it changes no
weight and no order. The plan counts tensors: the process itself, and what an allocator keeps for
later, come on top.
"""
import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

import lora
import parallel
from common import BadInput, dtype_of
from data import Pack, pack_size, split
from kernels import logprob
from model import Config, Llava, token_logps

UNITS = {"GiB": 2 ** 30, "MiB": 2 ** 20}
PICTURED = 700           # tokens of a pair with a picture, where there is no data to ask
ROOM = 0.9               # the share of free memory that a plan may fill: an allocator keeps some
BLOCKS_AT_ONCE = 2       # of a sharded model: the one that runs, and the next
REMEDY = ("lower --pack, set --checkpointing, train adapters (--lora 128), or start more processes "
          "(parallel.py)")


@dataclass(frozen=True)
class Load:
    """What a pack asks for."""
    tokens: int
    scored: int          # of them, those whose hidden states predict something
    images: int


# ---- the arithmetic ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Weights:
    """How many weights there are."""
    trained: int
    frozen: int
    block: int           # trained ones of one block
    rest: int            # trained ones outside of the blocks


def trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def count(config: Config, rank: int) -> Weights:
    """The weights of a model of this config; rank: that of its adapters, 0 for full fine-tuning."""
    with torch.device("meta"):                           # shapes without numbers
        model = Llava(config)
        if rank:
            lora.attach(model, rank, 2 * rank, seed=0)
        elif config.vision:
            model.vision_tower.requires_grad_(False)
    blocks = model.language_model.layers
    total = sum(p.numel() for p in model.parameters())
    learning = trained(model)
    block = trained(blocks[0])
    return Weights(learning, total - learning, block, learning - len(blocks) * block)


def activations(config: Config, load: Load, e: int, rank: int, gpu: bool,
                checkpointing: bool) -> tuple[int, int]:
    """Bytes that wait for backward when the loss is known, and bytes that come when a block is
    computed again: the head is done by then."""
    t = config.text
    D, I = t.hidden_size, t.intermediate_size
    Q, G = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim

    # A norm keeps its input in fp32, the scaled one, and for its own weight the normed.
    norm = (4 + e + (0 if rank else e)) * D
    # Queries, keys, values, and twice what was gathered; a CPU copies what keys a branch sees.
    attention = norm + e * (3 * Q + (2 if gpu else 4) * G + 4 * rank)
    # The gate, its silu, up, their product.
    mlp = norm + e * (4 * I + 3 * rank)
    block = attention + mlp
    before = t.num_hidden_layers - 1                                 # blocks ahead of the last one

    kept = load.tokens * 8 * t.head_dim                              # cosines and sines
    if load.images:
        kept += load.images * config.vision.patches * e * (config.vision.hidden_size + 2 * D)
    if checkpointing:
        moving = e * (2 * I + 2 * D)                                 # gradients on their way
        return kept + load.tokens * before * e * D, load.tokens * (block + moving)
    # The last block goes on with the scored tokens alone.
    last = load.tokens * attention + load.scored * (mlp + norm)
    return kept + load.tokens * before * block + last, 0


def needs(config: Config, load: Load, dtype: torch.dtype, rank: int = 0, world: int = 1,
          gpu: bool = True, checkpointing: bool = False) -> dict[str, int]:
    """Bytes of each row of the plan, for one process, at the worst moment of a step."""
    e = dtype.itemsize
    n = count(config, rank)
    sharded = world > 1 and not rank
    share = n.trained // world if sharded else n.trained

    copies, waiting = 0, 0
    if sharded:
        copies = e * (BLOCKS_AT_ONCE * n.block + n.rest)
        waiting = e * n.rest                             # whole gradients, cut at backward's end
    elif e < 4:
        blocks = 1 if checkpointing else config.text.num_hidden_layers
        copies = e * (blocks * n.block + n.rest)

    weight = 4 * config.text.vocab_size * config.text.hidden_size
    rows = min(logprob.rows_at_once(config.text.vocab_size), load.scored)
    head = 2 * 4 * rows * config.text.vocab_size
    if not rank:
        head += weight                                   # its gradient
    if e < 4 and not gpu:
        head += weight                                   # a CPU multiplies with an fp32 copy

    kept, again = activations(config, load, e, rank, gpu, checkpointing)
    return {
        "weights": 4 * share + e * n.frozen,
        "copies": copies,
        "gradients": 4 * share + waiting,
        "optimizer": 8 * share,
        "activations": kept + max(0, again - head),
        "head": head,
    }


# ---- said ahead of the first step ----------------------------------------------------------------

def free_bytes(device: torch.device) -> int:
    """What this process may have on that GPU: what it has, and what is free; 0: there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def plan(config: Config, s, load: Load, device: torch.device, dtype: torch.dtype,
         world: int) -> str:
    """The plan as text; and where there is a GPU, what is free on it, and which flag to set."""
    n = count(config, s.lora)
    about = {"rank": s.lora, "world": world, "gpu": device.type == "cuda"}
    plain = needs(config, load, dtype, **about)
    again = needs(config, load, dtype, checkpointing=True, **about)
    plain["in all"] = sum(plain.values())
    again["in all"] = sum(again.values())

    unit = "GiB" if plain["in all"] >= UNITS["GiB"] else "MiB"
    bytes_each = UNITS[unit]
    text = (f"memory plan, {unit} for each of {world} process{'es' if world > 1 else ''}: "
            f"{(n.trained + n.frozen) / 1e9:.3g} billion weights, {n.trained / 1e9:.3g} trained, "
            f"{str(dtype).removeprefix('torch.')}, packs of {load.tokens:,} tokens\n"
            f"  {'':12}{'plain':>10}{'--checkpointing':>18}")
    for row in plain:
        text += f"\n  {row:12}{plain[row] / bytes_each:10.2f}{again[row] / bytes_each:18.2f}"
    free = free_bytes(device)
    if not free:
        return text

    needed = again if s.checkpointing else plain
    if needed["in all"] <= ROOM * free:
        advice = "fits"
    elif again["in all"] <= ROOM * free:
        advice = "does not fit plainly; set --checkpointing"
    else:
        advice = f"may not fit: {REMEDY}"
    return f"{text}\n  {'free':12}{free / bytes_each:10.2f}   {device}: {advice}"


def dry_run(config: Config, s) -> None:
    """Print the plan without data or weights; for a GPU, unless --device cpu says otherwise."""
    device = torch.device("cpu" if s.device == "cpu" else "cuda")
    dtype = dtype_of(s.dtype, device)
    tokens = pack_size(s.pack, device)
    load = Load(tokens, tokens // 3, tokens // PICTURED if config.vision else 0)
    for world in sorted({parallel.world(), 1 if s.lora else 8}):
        print(plan(config, s, load, device, dtype, world))


# ---- and tried -----------------------------------------------------------------------------------

def begin(model: Llava, s, items: Sequence, make_pack: Callable[[list], Pack]) -> None:
    """Print the plan for the largest pack of a run over `items` (they have .tokens), and compute
    that pack forward and backward with all else in place: twice where a batch has two packs, since
    the second one meets the first one's gradients. The loss is 0 times the log-probs, and no
    gradient is left, so that no weight and no moment changes."""
    packs = list(split(heapq.nlargest(s.batch, items, key=lambda item: item.tokens), s.pack))
    pack = make_pack(packs[0])
    load = Load(len(pack.ids), len(pack.read), 0 if pack.pixels is None else len(pack.pixels))
    print(plan(model.config, s, load, model.device, model.dtype, parallel.world()))

    for _ in packs[:2]:
        loss = 0 * token_logps(model, pack.to(model.device)).sum()
        parallel.backward(model, loss)
    model.zero_grad(set_to_none=True)


@contextmanager
def room(s) -> Iterator[None]:
    """Inside, memory that is not there is a message that says which flag to turn."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise BadInput(f"out of memory with packs of {s.pack} tokens; {REMEDY}") from None
