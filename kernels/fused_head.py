"""The same log-probs on a GPU: the head's matrix product with the softmax folded into its last step.

The problem. logprob.py already keeps logits to a chunk, in plain torch: a matrix product writes them, three passes read
them. On a GPU those passes are most of the time, and fp32 logits want fp32 products, an order of magnitude slower than
16-bit ones.

The trick. A 16-bit product accumulates in fp32 anyway, in registers, tile by tile. So the tile is reduced where it is:

    forward    tile (BM rows, BV words) of h w'  ->  its largest score and its sum of exponentials, two numbers per row and tile;
               a few numbers per row are left, and  lse = log sum over tiles  is a line of torch
    backward   the same tile again, now  g (onehot(target) - exp(s - lse))  is written in 16 bits to a chunk (c, V), from
               which two library products make d hidden and d weight (none for a frozen head)

No locks, no atomics: every number is written once. The target's own logit is a gather and a dot product, apart from the
tiles. A prompt's last row is scored once for every answer; its gradients are added by index_put_, which on a GPU sorts first
and adds in that order, where index_add_ would add in whatever order they come.

References: Cut Cross-Entropy (arXiv:2411.09009), which filters and locks; here neither, for preference losses need
exact sums. Previous: kernels/logprob.py. Next: kernels/flash_decode.py (one token at a time).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash import ACC, LOG2E, chip

BLOCKS = {                        # rows, words, depth, warps, stages; as in flash.py: compiled, never run on a GPU yet
    "sm_80": (128, 128, 32, 4, 4),
    "sm_90": (128, 256, 64, 8, 3),
    "sm_100": (128, 256, 64, 8, 3),
    "gfx942": (128, 128, 32, 4, 2),
    "wide": (64, 64, 16, 8, 2),
}
CHUNK = 2048                      # rows whose gradient (c, V) is held at once


@triton.jit
def tile(H, W, ROWS, row, word, N, V, sh, sw, D: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
         ACC: tl.constexpr):
    """Scores (BM, BV) of scored rows `row` and words `word`, in nats."""
    at = tl.load(ROWS + row, mask=row < N, other=0).to(tl.int64)
    acc = tl.zeros([BM, BV], ACC)
    for k in range(0, D, BK):
        depth = k + tl.arange(0, BK)
        h = tl.load(H + at[:, None] * sh + depth[None, :], mask=(row[:, None] < N) & (depth[None, :] < D), other=0.0)
        w = tl.load(W + word.to(tl.int64)[:, None] * sw + depth[None, :], mask=(word[:, None] < V) & (depth[None, :] < D),
                    other=0.0)
        acc = tl.dot(h, tl.trans(w), acc, input_precision="ieee", out_dtype=ACC)
    return acc


@triton.jit
def place(N, V, BM: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr):
    """Which tile this program owns; GROUP row tiles go over the same words together, so that these are read from cache."""
    rows, words = tl.cdiv(N, BM), tl.cdiv(V, BV)
    pid = tl.program_id(0)
    first = pid // (GROUP * words) * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + pid % (GROUP * words) % size, pid % (GROUP * words) // size


@triton.jit(do_not_specialize=["N"])
def partial_sums(H, W, ROWS, BIG, SUM, N, V, sh, sw, scale, D: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
                 ACC: tl.constexpr):
    i, j = place(N, V, BM, BV, 8)
    row, word = i * BM + tl.arange(0, BM), j * BV + tl.arange(0, BV)
    s = tile(H, W, ROWS, row, word, N, V, sh, sw, D, BM, BV, BK, ACC) * scale
    s = tl.where(word[None, :] < V, s, float("-inf"))
    big = tl.max(s, 1)
    tl.store(BIG + j.to(tl.int64) * N + row, big, mask=row < N)
    tl.store(SUM + j.to(tl.int64) * N + row, tl.sum(tl.math.exp2(s - big[:, None]), 1), mask=row < N)


@triton.jit(do_not_specialize=["N"])
def gradients(H, W, ROWS, TARGETS, LSE, G, OUT, N, V, sh, sw, scale, D: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
              BK: tl.constexpr, ACC: tl.constexpr):
    i, j = place(N, V, BM, BV, 8)
    row, word = i * BM + tl.arange(0, BM), j * BV + tl.arange(0, BV)
    real = row < N
    s = tile(H, W, ROWS, row, word, N, V, sh, sw, D, BM, BV, BK, ACC) * scale
    lse, g = tl.load(LSE + row, mask=real, other=0.0), tl.load(G + row, mask=real, other=0.0)
    target = tl.load(TARGETS + row, mask=real, other=-1)
    d = g[:, None] * (tl.where(word[None, :] == target[:, None], 1.0, 0.0) - tl.math.exp2(s - lse[:, None]))
    at = OUT + row.to(tl.int64)[:, None] * V + word[None, :]
    tl.store(at, d.to(OUT.dtype.element_ty), mask=real[:, None] & (word[None, :] < V))


class FusedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rows, targets):
        hidden, weight = hidden.contiguous(), weight.contiguous()
        (N,), (V, D), (BM, BV, BK, warps, stages) = rows.shape, weight.shape, BLOCKS[chip(hidden)]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        big, total = (torch.empty(triton.cdiv(V, BV), N, dtype=wide, device=hidden.device) for _ in range(2))
        if N:
            partial_sums[(triton.cdiv(N, BM) * triton.cdiv(V, BV),)](
                hidden, weight, rows, big, total, N, V, D, D, LOG2E, D, BM, BV, BK, ACC[wide], num_warps=warps, num_stages=stages)
        top = big.amax(0) if N else big.new_zeros(0)
        lse = top + (total * (big - top).exp2()).sum(0).log2()                # base 2, (N,)
        ctx.save_for_backward(hidden, weight, rows, targets, lse)
        return (hidden[rows].to(wide) * weight[targets].to(wide)).sum(-1) - lse / LOG2E

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, rows, targets, lse = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        (V, D), (BM, BV, BK, warps, stages) = weight.shape, BLOCKS[chip(hidden)]
        d_hidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=hidden.device) if need_weight else None
        for start in range(0, len(rows), CHUNK):
            c = slice(start, min(start + CHUNK, len(rows)))
            n = c.stop - c.start
            d = torch.empty(n, V, dtype=hidden.dtype, device=hidden.device)
            gradients[(triton.cdiv(n, BM) * triton.cdiv(V, BV),)](
                hidden, weight, rows[c], targets[c], lse[c], grad[c].contiguous(), d, n, V, D, D, LOG2E, D, BM, BV, BK,
                ACC[lse.dtype], num_warps=warps, num_stages=stages)
            if need_hidden:
                d_hidden.index_put_((rows[c],), (d @ weight).to(lse.dtype), accumulate=True)
            if need_weight:
                d_weight += d.T @ hidden[rows[c]]
        return (d_hidden.to(hidden.dtype) if need_hidden else None,
                d_weight.to(weight.dtype) if need_weight else None, None, None)


def logps(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """As logprob.logps: hidden (T, D), weight (V, D), rows and targets (N,) -> (N,) fp32."""
    return FusedLogps.apply(hidden, weight, rows, targets)
