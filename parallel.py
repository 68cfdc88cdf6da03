"""Many processes, one result: the same losses and weights, whatever their number.

    torchrun --nproc_per_node 8 -- dpo.py --ckpt llava-1.5-13b-hf --data prefs.jsonl --out runs/dpo

The problem. A batch is the sum of its packs' gradients, so N processes may each take some packs and
add up. Three things commonly go wrong: each process averages over its own part (the loss then
depends on how the batch was cut), one has no part left while the others wait for it, and a weight
that only some of them used has a gradient only there.

The trick. (1) A batch is drawn as if there were one process, and every loss is divided by the size
of the *global* batch before backward, so gradients are summed, never averaged. (2) All take the
same number of packs (train.packs); who has none left computes one again and counts it with weight
0. (3) The projector, which a pack without pictures does not use, gets zeros.

    full fine-tuning   FSDP2's fully_shard (arXiv:2304.11277): each process keeps 1/N of every
                       trained weight, its gradient and its moments, in fp32. A block's weights are
                       brought together, in the precision that the model computes in, just before it
                       runs, and let go behind it. Embedding, projector, norm and head are one group
    LoRA               what trains is small: every process has all of it, and gradients are summed
                       once per step

Every process loads the weights and computes its share of the reference before anything is cut; then
memory falls to 1/N. gloo connects CPUs, NCCL GPUs. Process 0 alone prints and writes.
"""
import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: str):
    """Meet the other processes, if there are any -> the device that is this one's."""
    if world() == 1:
        return device
    if device == "cuda" or device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        patience = datetime.timedelta(hours=12)          # one reads data while others wait
        dist.init_process_group(backend, timeout=patience)
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def gather(mine):
    """What every process has, in their order."""
    if world() == 1:
        return [mine]
    found = [None] * world()
    dist.all_gather_object(found, mine)
    return found


def from_first(make):
    """make() is called in process 0; all get what it returned."""
    return gather(make() if rank() == 0 else None)[0]


# ---- full fine-tuning: shards --------------------------------------------------------------------

def shard(model):
    """Keep 1/N of every trained weight here, in fp32. The frozen tower stays whole: it is small.

    A block is raised to fp32 just before it is cut: no process ever holds all weights in fp32.
    """
    mesh = init_device_mesh(model.device.type, (world(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if model.dtype == torch.float32 else model.dtype,
        reduce_dtype=torch.float32,                      # 16-bit gradients are summed in fp32
        cast_forward_inputs=False,                       # angles stay fp32
    )
    for block in model.language_model.layers:
        fully_shard(block.float(), mesh=mesh, mp_policy=policy)
    frozen = set()
    for p in model.parameters():
        if not p.requires_grad:
            frozen.add(p)
        elif p.dtype != torch.float32:
            p.data = p.data.float()
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=policy,
        ignored_params=frozen,
        reshard_after_forward=False,
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)       # a sum: the loss was divided already
            module.set_force_sum_reduction_for_comms(True)                   # gloo knows no other


def sharded(model):
    return isinstance(model, FSDPModule)


def whole(x) -> Tensor:
    """All of a weight that is kept in shards. Every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x) -> Tensor:
    """This process's part of it."""
    return x.to_local() if isinstance(x, DTensor) else x


# ---- gradients -----------------------------------------------------------------------------------

def backward(model, loss):
    """loss.backward(). All processes bring gradients for the same weights: of a pack without
    pictures the projector's are zeros."""
    if model.config.vision:
        for p in model.multi_modal_projector.parameters():
            loss = loss + 0 * p.sum()
    loss.backward()


def sum_gradients(model, trained: list[Tensor]):
    """After the last backward of a batch: what the processes found is added up."""
    if world() > 1 and not sharded(model):               # shards are summed already
        for p in trained:
            dist.all_reduce(p.grad)
