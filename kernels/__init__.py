"""The two hot spots, behind two functions; the hardware is decided here and nowhere else.

    attention(q, k, v, mask)                 packed trees of text, or bidirectional patches
    decode(q, prompt, own, lengths)          one new token per answer, against cached keys and values
    logps(hidden, weight, rows, targets)     log p(target) of the scored rows only

Each file holds the formula, the plain-torch specification and the implementation. On the CPU, and
wherever no faster kernel exists, the plain-torch implementation runs; callers never ask.
"""
from kernels.attention import Mask, attention, decode
from kernels.logprob import logps

__all__ = ["Mask", "attention", "decode", "logps"]
