"""One new token per answer on a GPU: the cache is read once, by enough programs to keep the chip busy.

The problem. A decoding step multiplies one query per head with every key it may see: nothing is read twice, so the step
takes as long as the cache takes to come out of memory. One program per answer and head would leave most of the chip idle,
and would read a prompt n times that n answers share.

The trick (Flash-Decoding, Dao et al. 2023; for shared prompts arXiv:2402.05099). All queries that look at the same keys
are the rows of one small matrix, padded to the 16 that tensor cores want:

    the prompt's keys    rows = n answers x H/G heads      read once per record, not once per answer
    an answer's own      rows = H/G heads

and the keys are cut into spans of SPAN, one program each. A program leaves the softmax over its span and that span's
weight,

    o = sum_j p_j v_j     p = softmax(s)     lse = log2 sum_j exp2(s_j)

and softmax over all keys is a mean of the spans', weighted by exp2(lse): three lines of torch. A span behind the end of a
ragged prompt weighs nothing.

Previous: kernels/fused_head.py.  Next: kernels/__init__.py (what callers import).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash import ACC, LOG2E, chip

SPAN = 256                        # keys per program
BLOCKS = {"sm_80": (64, 4, 3), "sm_90": (64, 4, 3), "sm_100": (64, 4, 3), "gfx942": (64, 4, 2), "wide": (16, 4, 1)}
#                                   keys at a time, warps, stages; as in flash.py: compiled, never run on a GPU yet


@triton.jit(do_not_specialize=["M", "L"])
def partial(Q, K, V, O, LSE, LENGTHS, M, L, sk, rk, sv, rv, scale, SHARE: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):
    """M queries of one problem against one span of its keys. SHARE problems in a row have the same length; without a table, L."""
    problem, row, split = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(2)
    length = L if LENGTHS is None else tl.load(LENGTHS + problem // SHARE).to(tl.int32)
    start, d = split * SPAN, tl.arange(0, BD)
    end = tl.minimum(start + SPAN, length)
    at = problem * M + row                                               # all problems' rows lie one after another
    q = tl.load(Q + at[:, None] * D + d[None, :], mask=(row[:, None] < M) & (d[None, :] < D), other=0.0)
    acc, l, big = tl.zeros([BM, BD], ACC), tl.zeros([BM], ACC), tl.full([BM], float("-inf"), ACC)
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        real = (n[:, None] < end) & (d[None, :] < D)
        k = tl.load(K + problem * sk + n.to(tl.int64)[:, None] * rk + d[None, :], mask=real, other=0.0)
        v = tl.load(V + problem * sv + n.to(tl.int64)[:, None] * rv + d[None, :], mask=real, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * scale      # (BM, BN)
        s = tl.where((n < end)[None, :], s, float("-inf"))
        new = tl.maximum(big, tl.max(s, 1))                              # finite: a block's first key is always seen
        p, shrink = tl.math.exp2(s - new[:, None]), tl.math.exp2(big - new)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
        l, big = l * shrink + tl.sum(p, 1), new
    to = split.to(tl.int64) * tl.num_programs(0) * M + at
    tl.store(LSE + to, big + tl.math.log2(l), mask=row < M)              # -inf where the span is empty
    o = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(O + to[:, None] * D + d[None, :], o, mask=(row[:, None] < M) & (d[None, :] < D))


def look(q: Tensor, keys: tuple[Tensor, Tensor], o: Tensor, lse: Tensor, lengths: Tensor | None, share: int) -> None:
    """Queries (problems, M, D) at keys (problems, L, D): fills o (splits, problems * M, D) and lse (splits, problems * M)."""
    (k, v), (problems, M, D) = (x if x.stride(-1) == 1 else x.contiguous() for x in keys), q.shape
    BN, warps, stages = BLOCKS[chip(q)]
    BM = min(64, max(16, triton.next_power_of_2(M)))
    partial[(problems, triton.cdiv(M, BM), len(o))](
        q, k, v, o, lse, lengths, M, k.shape[1], *k.stride()[:2], *v.stride()[:2], D ** -0.5 * LOG2E, share, D, SPAN, BM, BN,
        max(16, triton.next_power_of_2(D)), ACC[o.dtype], num_warps=warps, num_stages=stages)


def decode(q: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], prompt_len: Tensor, own_len: int) -> Tensor:
    """As attention.decode: q (R, n, H, D), prompt (R, G, P, D) x 2, own (R, G, n, A, D) x 2 -> (R, n, H, D)."""
    (R, n, H, D), (G, P) = q.shape, prompt[0].shape[1:3]
    q = q.view(R, n, G, H // G, D).transpose(1, 2).contiguous()                       # (R, G, n, H/G, D)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    spans, more = triton.cdiv(P, SPAN), triton.cdiv(own_len, SPAN)
    o, lse = (torch.empty(spans + more, R * n * H, *last, dtype=wide, device=q.device) for last in ((D,), ()))
    look(q.view(R * G, -1, D), tuple(x.flatten(0, 1) for x in prompt), o[:spans], lse[:spans], prompt_len, G)
    look(q.view(R * G * n, -1, D), tuple(x[:, :, :, :own_len].flatten(0, 2) for x in own), o[spans:], lse[spans:], None, 1)
    weight = (lse / LOG2E).softmax(0)                                                 # (spans, R*n*H)
    out = (o * weight[..., None]).sum(0).to(q.dtype)
    return out.view(R, G, n, H // G, D).transpose(1, 2).reshape(R, n, H, D)
