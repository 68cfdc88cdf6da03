"""The same log-probs on a GPU: the head's matrix product with the softmax folded into its end.

The problem. logprob.py keeps logits to a chunk, in plain torch: a matrix product writes them, three
passes read them. On a GPU those passes are most of the time, and fp32 logits want fp32 products, an
order of magnitude slower than 16-bit ones.

The trick. A 16-bit product accumulates in fp32 anyway, in registers, tile by tile. So a tile is
reduced where it is computed:

    forward    tile (BM rows, BV words) of h w'  ->  log sum exp of its scores, one number per row
               a few numbers per row are left, whose log sum exp is a line of torch
    backward   the same tile again, now  g (onehot(target) - exp(s - lse))  is written in 16 bits

The backward goes through the vocabulary WORDS at a time. For these words the gradient of all scored
rows is (N, WORDS); one library product makes their whole share of d weight, so a 16-bit head needs
no fp32 copy of itself, and another adds to d hidden (N, D), which is fp32.

No locks, no atomics: every number is written once. The target's own logit is a gather and a dot
product, apart from the tiles. A prompt's last row is scored once for every answer; its gradients
are added by index_put_, which on a GPU sorts first and adds in that order, where index_add_ would
add in whatever order they come.

References: Cut Cross-Entropy (arXiv:2411.09009), which filters and locks; here neither, for
preference losses need exact sums.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash import LOG2E, chip, product

# Rows, words, depth, warps, stages. sm_90's are the fastest of 14 on an H200; as in flash.py the others
# were chosen by what the compiler says.
BLOCKS = {
    "sm_80": (128, 128, 32, 4, 4),
    "sm_90": (128, 256, 64, 8, 3),
    "sm_100": (128, 256, 64, 8, 3),
    "gfx942": (128, 128, 32, 4, 2),
    "wide": (64, 64, 16, 8, 2),
}
WORDS = 8192                      # of the vocabulary, whose gradient (N, WORDS) is held at once


# ---- the kernels ---------------------------------------------------------------------------------

@triton.jit
def place(N, V, BM: tl.constexpr, BV: tl.constexpr):
    """The rows and words of this program's tile. Eight row tiles go over the same words together, so
    that these are read from cache."""
    tall = tl.cdiv(N, BM)
    wide = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    first = pid // (8 * wide) * 8
    size = tl.minimum(tall - first, 8)
    i = first + pid % (8 * wide) % size
    j = pid % (8 * wide) // size
    return i * BM + tl.arange(0, BM), j * BV + tl.arange(0, BV), j


@triton.jit
def scores(H, W, row, word, N, V,
           D: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """h w' of some rows and words (BM, BV), in base 2; -inf for words there are not."""
    s = tl.zeros([BM, BV], tl.float32)
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        h = tl.load(H + row.to(tl.int64)[:, None] * D + d[None, :],
                    mask=(row[:, None] < N) & (d[None, :] < D), other=0.0)
        w = tl.load(W + word.to(tl.int64)[:, None] * D + d[None, :],
                    mask=(word[:, None] < V) & (d[None, :] < D), other=0.0)
        s = product(h, tl.trans(w), s)
    return tl.where(word[None, :] < V, s * LOG2E, float("-inf"))


@triton.jit(do_not_specialize=["N"])
def partial_sums(H, W, LSE, N, V,
                 D: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """LSE (tiles of words, N): log sum exp of each row's scores in one tile, in nats."""
    row, word, j = place(N, V, BM, BV)
    s = scores(H, W, row, word, N, V, D, BM, BV, BK)
    big = tl.max(s, 1)
    lse = big + tl.math.log2(tl.sum(tl.math.exp2(s - big[:, None]), 1))
    tl.store(LSE + j.to(tl.int64) * N + row, lse / LOG2E, mask=row < N)


@triton.jit(do_not_specialize=["N", "first"])
def gradients(H, W, TARGETS, LSE, GRAD, OUT, N, V, first,
              D: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """Of the scores of words first, first + 1, ..., first + V - 1."""
    row, word, _ = place(N, V, BM, BV)
    s = scores(H, W, row, word, N, V, D, BM, BV, BK)
    real = row < N
    target = tl.load(TARGETS + row, mask=real, other=-1) - first
    lse = tl.load(LSE + row, mask=real, other=0.0)
    grad = tl.load(GRAD + row, mask=real, other=0.0)

    hit = tl.where(word[None, :] == target[:, None], 1.0, 0.0)
    d = grad[:, None] * (hit - tl.math.exp2(s - lse[:, None] * LOG2E))
    at = OUT + row.to(tl.int64)[:, None] * V + word[None, :]
    tl.store(at, d.to(OUT.dtype.element_ty), mask=real[:, None] & (word[None, :] < V))


# ---- the function --------------------------------------------------------------------------------

class FusedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rows, targets):
        weight, scored = weight.contiguous(), hidden[rows]               # (V, D), (N, D)
        (N, D), V = scored.shape, len(weight)
        BM, BV, BK, warps, stages = BLOCKS[chip(weight)]

        lse = torch.empty(triton.cdiv(V, BV), N, device=weight.device)
        if N:
            grid = triton.cdiv(N, BM) * triton.cdiv(V, BV)
            partial_sums[grid,](scored, weight, lse, N, V, D, BM, BV, BK,
                                num_warps=warps, num_stages=stages)
        lse = lse.logsumexp(0)                                           # (tiles, N) -> (N,)

        ctx.save_for_backward(hidden, weight, rows, targets, lse)
        return (scored.float() * weight[targets].float()).sum(-1) - lse

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, rows, targets, lse = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        scored, grad = hidden[rows], grad.contiguous()
        N, D = scored.shape
        BM, BV, BK, warps, stages = BLOCKS[chip(weight)]

        d_scored = torch.zeros(N, D, device=hidden.device)
        d_weight = torch.zeros_like(weight) if need_weight else None
        for first in range(0, len(weight), WORDS) if N else ():
            words = weight[first:first + WORDS]
            V = len(words)
            d = torch.empty(N, V, dtype=hidden.dtype, device=hidden.device)
            grid = triton.cdiv(N, BM) * triton.cdiv(V, BV)
            gradients[grid,](scored, words, targets, lse, grad, d, N, V, first, D, BM, BV, BK,
                             num_warps=warps, num_stages=stages)
            if need_hidden:
                d_scored += d @ words
            if need_weight:
                d_weight[first:first + V] = d.T @ scored

        d_hidden = None
        if need_hidden:
            d_hidden = torch.zeros(hidden.shape, device=hidden.device)
            d_hidden = d_hidden.index_put_((rows,), d_scored, accumulate=True).to(hidden.dtype)
        return d_hidden, d_weight, None, None


def logps(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """As logprob.logps: hidden (T, D), weight (V, D), rows and targets (N,) -> (N,) fp32."""
    return FusedLogps.apply(hidden, weight, rows, targets)
