"""The two hot spots behind three functions. Callers never ask about hardware: it is decided here.

    attention(q, k, v, mask)                       packed trees of text, or bidirectional patches
    decode(q, prompt, own, prompt_len, own_len)    one new token per answer, against cached keys
    logps(hidden, weight, rows, targets)           log p(target) of the scored rows only

attention.py and logprob.py hold the formulas and plain torch, which runs anywhere. Tensors on a GPU
(torch calls AMD's "cuda" too) go to flash.py, flash_decode.py and fused_head.py; fp64 and heads
wider than 128 stay with plain torch. Triton is imported with the first such tensor: elsewhere it
need not exist. It launches on the current GPU, so the tensor's is made that.
"""
import torch
from torch import Tensor

from kernels import attention as plain, logprob
from kernels.attention import Mask

__all__ = ["Mask", "attention", "decode", "logps"]


def for_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q (T, H, D), k and v (T, G, D) -> (T, H, D)."""
    if for_triton(q) and q.shape[-1] <= 128:
        from kernels import flash
        with torch.cuda.device_of(q):
            return flash.attention(q, k, v, mask)
    return plain.attention(q, k, v, mask)


def decode(q: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor],
           prompt_len: Tensor, own_len: int) -> Tensor:
    """q (R, n, H, D), prompt (R, G, P, D) x 2, own (R, G, n, A, D) x 2 -> (R, n, H, D)."""
    if for_triton(q) and q.shape[-1] <= 128:
        from kernels import flash_decode
        with torch.cuda.device_of(q):
            return flash_decode.decode(q, prompt, own, prompt_len, own_len)
    return plain.decode(q, prompt, own, prompt_len, own_len)


def logps(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """hidden (T, D), weight (V, D) in the same dtype, rows and targets (N,) -> (N,) fp32."""
    if for_triton(hidden):
        from kernels import fused_head
        with torch.cuda.device_of(hidden):
            return fused_head.logps(hidden, weight, rows, targets)
    return logprob.logps(hidden, weight, rows, targets)
