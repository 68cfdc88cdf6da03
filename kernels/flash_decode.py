"""One new token per answer on a GPU: the cache is read once, by programs enough for the whole chip.

The problem. A decoding step multiplies one query per head with every key it may see: nothing is
read twice, so the step takes as long as the cache takes to come out of memory. One program per
answer and head would leave most of the chip idle, and would read a prompt n times that n answers
share.

The trick (Flash-Decoding, Dao et al. 2023; for shared prompts arXiv:2402.05099). All queries that
look at the same keys are the rows of one small matrix, padded to the 16 that tensor cores want:

    the prompt's keys    rows = n answers x H/G heads      read once per record, not once per answer
    an answer's own      rows = H/G heads

The keys are cut into spans of SPAN, one program each. A program leaves the softmax over its span
and that span's weight,

    o = sum_j p_j v_j     p = softmax(s)     lse = log sum_j exp(s_j)

and softmax over all keys is a mean of the spans', weighted by exp(lse): two lines of torch. A span
behind the end of a ragged prompt weighs nothing.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash import LOG2E, chip, product

SPAN = 512                        # keys per program
# Keys at a time, warps, stages. sm_90's are the fastest on an H200; nobody has timed the others.
BLOCKS = {
    "sm_80": (64, 4, 3),
    "sm_90": (64, 4, 2),
    "sm_100": (64, 4, 3),
    "gfx942": (64, 4, 2),
    "wide": (16, 4, 1),
}


@triton.jit(do_not_specialize=["M", "ROOM", "full"])
def partial(Q, K, V, O, LSE, LENGTHS, M, ROOM, full, scale, SHARE: tl.constexpr, D: tl.constexpr,
            SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """M queries of one problem against one span of its keys, of which ROOM are stored.

    LENGTHS says how many are real, the same for SHARE problems in a row; without it `full` are.
    """
    problem = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    length = full if LENGTHS is None else tl.load(LENGTHS + problem // SHARE).to(tl.int32)
    start = split * SPAN
    end = tl.minimum(start + SPAN, length)

    row = tl.program_id(1) * BM + tl.arange(0, BM)
    at = problem * M + row                           # all problems' rows lie one after another
    d = tl.arange(0, BD)
    real = (row[:, None] < M) & (d[None, :] < D)
    q = tl.load(Q + at[:, None] * D + d[None, :], mask=real, other=0.0)

    o = tl.zeros([BM, BD], tl.float32)
    l = tl.zeros([BM], tl.float32)
    big = tl.full([BM], float("-inf"), tl.float32)
    for first in range(start, end, BN):
        n = first + tl.arange(0, BN)
        there = (problem * ROOM + n)[:, None] * D + d[None, :]
        filled = (n[:, None] < end) & (d[None, :] < D)
        k = tl.load(K + there, mask=filled, other=0.0)
        v = tl.load(V + there, mask=filled, other=0.0)

        s = product(q, tl.trans(k)) * (scale * LOG2E)                        # (BM, BN)
        s = tl.where((n < end)[None, :], s, float("-inf"))
        new = tl.maximum(big, tl.max(s, 1))          # finite: a block's first key is always seen
        p = tl.math.exp2(s - new[:, None])
        shrink = tl.math.exp2(big - new)
        o = product(p.to(v.dtype), v, o * shrink[:, None])
        l = l * shrink + tl.sum(p, 1)
        big = new

    # An empty span weighs nothing: its lse is -inf, its o 0.
    to = split.to(tl.int64) * tl.num_programs(0) * M + at
    lse = (big + tl.math.log2(l)) / LOG2E
    o = o / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(LSE + to, lse, mask=row < M)
    tl.store(O + to[:, None] * D + d[None, :], o, mask=real)


def look(q: Tensor, keys: tuple[Tensor, Tensor], o: Tensor, lse: Tensor, share: int,
         lengths: Tensor | int) -> None:
    """Queries (problems, M, D) at keys and values (..., ROOM, D): fills o (spans, problems * M, D)
    and lse (spans, problems * M)."""
    k, v = keys[0].contiguous(), keys[1].contiguous()
    (problems, M, D), ROOM = q.shape, k.shape[-2]
    BM = min(64, max(16, triton.next_power_of_2(M)))
    BD = max(16, triton.next_power_of_2(D))
    BN, warps, stages = BLOCKS[chip(q)]
    table, full = (None, lengths) if isinstance(lengths, int) else (lengths, 0)
    grid = problems, triton.cdiv(M, BM), len(o)
    partial[grid](q, k, v, o, lse, table, M, ROOM, full, D ** -0.5,
                  share, D, SPAN, BM, BN, BD, num_warps=warps, num_stages=stages)


def decode(q: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor],
           prompt_len: Tensor, own_len: int) -> Tensor:
    """As attention.decode: q (R, n, H, D), prompt (R, G, P, D) x 2, own (R, G, n, A, D) x 2."""
    R, n, H, D = q.shape
    G, P = prompt[0].shape[1:3]
    q = q.view(R, n, G, H // G, D).transpose(1, 2).contiguous()          # (R, G, n, H/G, D)

    # For each span of the prompt and of an answer's own keys: what is gathered there, its weight.
    in_prompt = triton.cdiv(P, SPAN)
    in_own = triton.cdiv(own_len, SPAN)
    o = torch.empty(in_prompt + in_own, R * n * H, D, device=q.device)
    lse = torch.empty(o.shape[:2], device=q.device)
    look(q.view(R * G, -1, D), prompt, o[:in_prompt], lse[:in_prompt], G, prompt_len)
    look(q.view(R * G * n, -1, D), own, o[in_prompt:], lse[in_prompt:], 1, own_len)

    weight = lse.softmax(0)                                              # (spans, R*n*H)
    out = (o * weight[..., None]).sum(0).to(q.dtype)                     # (R*n*H, D)
    return out.view(R, G, n, H // G, D).transpose(1, 2).reshape(R, n, H, D)
