"""The two hot spots behind three functions. Callers never ask about hardware: if it ever is to be decided, it is here.

    attention(q, k, v, mask)                 packed trees of text, or bidirectional patches
    decode(q, prompt, own, lengths)          one new token per answer, against cached keys and values
    logps(hidden, weight, rows, targets)     log p(target) of the scored rows only

Each file holds the formula, the plain-torch specification and the implementation, which is plain torch too so far.

Previous: kernels/fused_head.py.  Next: vision.py (pixels to vectors).
"""
from kernels.attention import Mask, attention, decode
from kernels.logprob import logps

__all__ = ["Mask", "attention", "decode", "logps"]
