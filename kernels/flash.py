"""The same attention on a GPU: one pass over the keys, no score ever in memory, no atomics.

The problem. The scores of one head are a T x T matrix. Written to memory and read back, softmax(q k') v is bound by that
traffic, not by arithmetic; and of a packed row most of it is never looked at.

The trick, forward (FlashAttention, arXiv:2205.14135). One program owns BM queries. It walks over the keys in blocks of
BN and keeps, per query, the largest score so far, the sum of exponentials and the weighted sum of values; when a new
block brings a larger score, what was summed shrinks by exp(old - new):

            keys ->  [ block 0 | block 1 | ... ]          m' = max(m, max s)        a = exp(m - m')
    q (BM, D)   ---->  s = q k' in registers               l' = l a + sum exp(s - m')
                                                           o' = o a + exp(s - m') v     at the end o / l,  lse = m + log l

Which blocks? `tiles` says it per program, from the trees themselves: a range that all BM queries see in full, and a
range that ends at the diagonal. Blocks seen in full are walked without a mask; only the ragged rest asks the rule of
attention.py, element by element.

Backward (arXiv:2307.08691, section 3) needs p = exp(s - lse) again and delta = sum(do * o) per query:

    dv = p' do        ds = p * (do v' - delta)        dk = ds' q        dq = ds k

One kernel owns keys and walks over queries (dk, dv), another owns queries and walks over keys (dq). Each output is
written once, by one program, in a fixed order: two runs give the same bits, and so does a tree whether it is alone in
the row or packed among others.

fp32 are: scores, softmax, all accumulators, lse and delta; exponentials are base 2, the factor log2 e being part of the
scale.

Previous: kernels/attention.py.  Next: kernels/logprob.py (what the hidden states are for).
"""
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import Mask

LOG2E, ACC = 1.4426950408889634, {torch.float32: tl.float32, torch.float64: tl.float64}
# (BM, BN, warps, stages) per chip and head dimension: forward | dk and dv | dq. Chosen by what the compiler says: tensor cores
# are used, no loop spills (results/aot.jsonl). Never timed: none of this has run on a GPU yet.
BLOCKS = {
    ("sm_80", 64): ((64, 64, 4, 3), (32, 64, 4, 2), (64, 32, 4, 2)),
    ("sm_80", 128): ((64, 32, 4, 3), (32, 64, 8, 2), (64, 64, 8, 2)),
    ("sm_90", 64): ((128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
    ("sm_90", 128): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
    ("sm_100", 64): ((128, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    ("sm_100", 128): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    ("gfx942", 64): ((128, 64, 4, 1), (32, 64, 4, 1), (64, 64, 4, 1)),
    ("gfx942", 128): ((128, 64, 4, 1), (32, 64, 4, 1), (64, 64, 4, 1)),
    ("wide", 64): ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    ("wide", 128): ((32, 16, 4, 1), (16, 16, 4, 1), (32, 16, 4, 1)),
}


@cache
def architecture(device: torch.device) -> str:
    """Which table a device reads: its own, or that of the nearest older chip. The interpreter takes Hopper's."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def chip(x: Tensor) -> str:
    """The row of the block tables for a tensor: 4-byte numbers take twice the shared memory, whatever the chip."""
    return architecture(x.device) if x.element_size() == 2 else "wide"


# ---- which keys a block of queries needs, which queries a block of keys -----------------------------------------

def tiles(mask: Mask, BM: int, BN: int) -> tuple[Tensor, Tensor]:
    """Work for the two kinds of programs, int32, longest first.

    queries (n, 6): q0 q1 | a0 a1: keys that all rows q0..q1 see | b0 bf: keys b0..q1 that some see, all of them up to bf
    keys    (n, 6): n0 n1 | m0 m1: the rows that see any of these keys | f0 f1: the rows among them that see all
    """
    key = ("tiles", BM, BN)
    if key not in mask.__dict__:
        trees, images = mask.trees
        queries = [(q, min(q + BM, e), s, e, min(q + BM, e), 0) for s, e in images for q in range(s, e, BM)]
        queries += [t for tree in trees for t in query_tiles(tree, BM)]
        keys = [(n, min(n + BN, e), s, e, s, e) for s, e in images for n in range(s, e, BN)]
        keys += [t for tree in trees for t in key_tiles(tree, BN)]
        queries.sort(key=lambda t: t[2] - t[3] + t[4] - t[1])            # longest first: no program starts late and runs long
        keys.sort(key=lambda t: t[2] - t[3])
        mask.__dict__[key] = tuple(torch.tensor(x, dtype=torch.int32).to(mask.own.device, non_blocking=True)
                                   for x in (queries, keys))
    return mask.__dict__[key]


def query_tiles(tree: list[int], BM: int) -> list[tuple]:
    """Cut a tree [start, prompt's end, answer's end, ...] into blocks of rows; a block may hold several answers."""
    (s, pe, *ends), out = tree, []
    trunk = ends[0] if ends else pe                                      # the first answer simply continues the prompt
    for q0 in range(s, tree[-1], BM):
        q1 = min(q0 + BM, tree[-1])
        own = [s] * (q0 < trunk) + [a for a, b in zip(ends, ends[1:]) if a < q1 and b > q0]     # where the rows' segments start
        if own[0] == s:                                                  # causal text; where later answers join, up to the prompt
            out.append((q0, q1, s, s, s, q0 + 1 if len(own) == 1 else min(pe, q0 + 1)))
        else:
            out.append((q0, q1, s, pe, own[0], q0 + 1 if len(own) == 1 else own[0]))
    return out


def key_tiles(tree: list[int], BN: int) -> list[tuple]:
    """Cut a tree into blocks of keys. All rows behind a key of the prompt see it, of an answer's keys only the answer's own."""
    (s, pe, *ends), e, out = tree, tree[-1], []
    for n0 in range(s, e, BN):
        n1 = min(n0 + BN, e)
        last = [e] * (n0 < pe) + [b for a, b in zip([pe, *ends], ends) if a < n1 and b > n0]
        out.append((n0, n1, n0, max(last), n1 - 1, min(last)))
    return out


# ---- pieces ---------------------------------------------------------------------------------------------------

@triton.jit
def load(X, rows, head, limit, stride, D: tl.constexpr):
    """Rows of one head of a (T, H, D) tensor, zero from `limit` on."""
    at = X + rows.to(tl.int64)[:, None] * stride + (head * D + tl.arange(0, D))[None, :]
    return tl.load(at, mask=rows[:, None] < limit, other=0.0)


@triton.jit
def store(X, x, rows, head, limit, stride, D: tl.constexpr):
    at = X + rows.to(tl.int64)[:, None] * stride + (head * D + tl.arange(0, D))[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=rows[:, None] < limit)


@triton.jit
def three(LO, HI, OWN, rows, limit):
    """What rows may see, as int32."""
    real = rows < limit
    lo, hi = tl.load(LO + rows, mask=real, other=0), tl.load(HI + rows, mask=real, other=0)
    return lo.to(tl.int32), hi.to(tl.int32), tl.load(OWN + rows, mask=real, other=0).to(tl.int32)


@triton.jit
def sees(m, n, lo, hi, own):
    """The rule of attention.py; m and its three integers are columns where n is a row, or the other way round."""
    return ((lo <= n) & (n < hi)) | ((own <= n) & (n <= m))


@triton.jit
def blocks_of(t, BN: tl.constexpr):
    """How many key blocks of a query tile are free of masks, and how many are ragged, in ranges A and B."""
    a0, a1, b0, bf, q1 = tl.load(t + 2), tl.load(t + 3), tl.load(t + 4), tl.load(t + 5), tl.load(t + 1)
    free_a, free_b = (a1 - a0) // BN, tl.maximum(bf - b0, 0) // BN
    return a0, a1, b0, free_a, free_b, tl.cdiv(a1 - a0, BN) - free_a, tl.cdiv(q1 - b0, BN) - free_b


# ---- forward --------------------------------------------------------------------------------------------------

@triton.jit
def forward_block(acc, l, big, q, K, V, n0, limit, m, lo, hi, own, head, T, sk, sv, scale,
                  BN: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):
    n = n0 + tl.arange(0, BN)
    k = load(K, n, head, T, sk, D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * scale          # (BM, BN)
    if MASKED:
        seen = sees(m[:, None], n[None, :], lo[:, None], hi[:, None], own[:, None]) & (n < limit)[None, :]
        s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(big, tl.max(s, 1))                                  # finite: all rows see the first key that is walked to
    p, shrink = tl.math.exp2(s - new[:, None]), tl.math.exp2(big - new)
    v = load(V, n, head, T, sv, D)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
    return acc, l * shrink + tl.sum(p, 1), new


@triton.jit(do_not_specialize=["T"])
def forward(Q, K, V, O, LSE, TILES, LO, HI, OWN, T, sq, sk, sv, so, scale, GROUP: tl.constexpr, D: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    head, t = tl.program_id(0), TILES + tl.program_id(1) * 6
    q0, q1 = tl.load(t), tl.load(t + 1)
    a0, a1, b0, free_a, free_b, rest_a, rest_b = blocks_of(t, BN)
    m = q0 + tl.arange(0, BM)
    q = load(Q, m, head, q1, sq, D)
    lo, hi, own = three(LO, HI, OWN, m, q1)
    acc, l, big = tl.zeros([BM, D], ACC), tl.zeros([BM], ACC), tl.full([BM], float("-inf"), ACC)
    for i in range(0, free_a + free_b):
        n0 = tl.where(i < free_a, a0 + i * BN, b0 + (i - free_a) * BN)
        acc, l, big = forward_block(acc, l, big, q, K, V, n0, T, m, lo, hi, own, head // GROUP, T, sk, sv, scale,
                                    BN, D, False, ACC)
    for i in range(0, rest_a + rest_b):
        n0 = tl.where(i < rest_a, a0 + free_a * BN, b0 + (free_b + i - rest_a) * BN)
        limit = tl.where(i < rest_a, a1, q1)
        acc, l, big = forward_block(acc, l, big, q, K, V, n0, limit, m, lo, hi, own, head // GROUP, T, sk, sv, scale,
                                    BN, D, True, ACC)
    tl.store(LSE + head.to(tl.int64) * T + m, big + tl.math.log2(l), mask=m < q1)
    store(O, acc / l[:, None], m, head, q1, so, D)


# ---- backward -------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["T"])
def row_sums(O, DO, DELTA, T, so, sd, D: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr):
    """delta = sum over D of do * o."""
    head, m = tl.program_id(0), tl.program_id(1) * BM + tl.arange(0, BM)
    o, do = load(O, m, head, T, so, D).to(ACC), load(DO, m, head, T, sd, D).to(ACC)
    tl.store(DELTA + head.to(tl.int64) * T + m, tl.sum(o * do, 1), mask=m < T)


@triton.jit
def keys_block(dk, dv, k, v, Q, DO, LSE, DELTA, LO, HI, OWN, m0, m1, n, head, T, sq, sd, scale,
               BM: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):
    m = m0 + tl.arange(0, BM)
    real = m < m1
    q, do = load(Q, m, head, m1, sq, D), load(DO, m, head, m1, sd, D)
    stat = head.to(tl.int64) * T + m                                     # rows past the end, without q and do, add nothing
    lse, delta = tl.load(LSE + stat, mask=real, other=0.0), tl.load(DELTA + stat, mask=real, other=0.0)
    p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=ACC) * scale - lse[None, :])     # (BN, BM)
    if MASKED:
        lo, hi, own = three(LO, HI, OWN, m, m1)
        p = tl.where(sees(m[None, :], n[:, None], lo[None, :], hi[None, :], own[None, :]), p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee", out_dtype=ACC)
    dp = tl.dot(v, tl.trans(do), input_precision="ieee", out_dtype=ACC)
    dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision="ieee", out_dtype=ACC)
    return dk, dv


@triton.jit(do_not_specialize=["T"])
def keys_backward(Q, K, V, DO, LSE, DELTA, DK, DV, TILES, LO, HI, OWN, T, sq, sk, sv, sd, sg, scale, root,
                  GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """dk and dv of BN keys of one key head, over all query heads that read it."""
    kv, t = tl.program_id(0), TILES + tl.program_id(1) * 6
    n0, n1, m0, m1, f0, f1 = tl.load(t), tl.load(t + 1), tl.load(t + 2), tl.load(t + 3), tl.load(t + 4), tl.load(t + 5)
    n = n0 + tl.arange(0, BN)
    k, v = load(K, n, kv, n1, sk, D), load(V, n, kv, n1, sv, D)
    dk, dv = tl.zeros([BN, D], ACC), tl.zeros([BN, D], ACC)
    count = tl.cdiv(m1 - m0, BM)
    first = tl.minimum(tl.cdiv(f0 - m0, BM), count)                      # blocks before it touch the diagonal,
    past = tl.where(f1 == m1, count, tl.maximum((f1 - m0) // BM, first))     # from it on some rows belong to other answers
    ragged, free = first + count - past, past - first
    for j in range(0, GROUP * ragged):                                   # all heads in one loop: dk and dv stay where they are
        at = m0 + tl.where(j % ragged < first, j % ragged, past + j % ragged - first) * BM
        dk, dv = keys_block(dk, dv, k, v, Q, DO, LSE, DELTA, LO, HI, OWN, at, m1, n, kv * GROUP + j // ragged, T, sq, sd, scale,
                            BM, D, True, ACC)
    for j in range(0, GROUP * free):
        at = m0 + (first + j % free) * BM
        dk, dv = keys_block(dk, dv, k, v, Q, DO, LSE, DELTA, LO, HI, OWN, at, m1, n, kv * GROUP + j // free, T, sq, sd, scale,
                            BM, D, False, ACC)
    store(DK, dk * root, n, kv, n1, sg, D)
    store(DV, dv, n, kv, n1, sg, D)


@triton.jit
def queries_block(dq, q, do, lse, delta, K, V, n0, limit, m, lo, hi, own, head, T, sk, sv, scale,
                  BN: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr):
    n = n0 + tl.arange(0, BN)
    k, v = load(K, n, head, T, sk, D), load(V, n, head, T, sv, D)
    p = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * scale - lse[:, None])     # (BM, BN)
    if MASKED:
        p = tl.where((n < limit)[None, :] & sees(m[:, None], n[None, :], lo[:, None], hi[:, None], own[:, None]), p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee", out_dtype=ACC) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee", out_dtype=ACC)


@triton.jit(do_not_specialize=["T"])
def queries_backward(Q, K, V, DO, LSE, DELTA, DQ, TILES, LO, HI, OWN, T, sq, sk, sv, sd, sg, scale, root,
                     GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """dq of BM queries; the same walk as forward."""
    head, t = tl.program_id(0), TILES + tl.program_id(1) * 6
    q0, q1 = tl.load(t), tl.load(t + 1)
    a0, a1, b0, free_a, free_b, rest_a, rest_b = blocks_of(t, BN)
    m = q0 + tl.arange(0, BM)
    q, do = load(Q, m, head, q1, sq, D), load(DO, m, head, q1, sd, D)
    lo, hi, own = three(LO, HI, OWN, m, q1)
    lse = tl.load(LSE + head.to(tl.int64) * T + m, mask=m < q1, other=0.0)
    delta = tl.load(DELTA + head.to(tl.int64) * T + m, mask=m < q1, other=0.0)
    dq = tl.zeros([BM, D], ACC)
    for i in range(0, free_a + free_b):
        n0 = tl.where(i < free_a, a0 + i * BN, b0 + (i - free_a) * BN)
        dq = queries_block(dq, q, do, lse, delta, K, V, n0, T, m, lo, hi, own, head // GROUP, T, sk, sv, scale, BN, D, False, ACC)
    for i in range(0, rest_a + rest_b):
        n0 = tl.where(i < rest_a, a0 + free_a * BN, b0 + (free_b + i - rest_a) * BN)
        limit = tl.where(i < rest_a, a1, q1)
        dq = queries_block(dq, q, do, lse, delta, K, V, n0, limit, m, lo, hi, own, head // GROUP, T, sk, sv, scale,
                           BN, D, True, ACC)
    store(DQ, dq * root, m, head, q1, sg, D)


# ---- the function -----------------------------------------------------------------------------------------------

class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        q, k, v = (x if x.stride(-1) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k, v))
        T, H, D = q.shape
        (BM, BN, warps, stages), _, _ = BLOCKS[chip(q), D]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32              # fp64 only to check the kernels with
        o, lse = torch.empty(T, H, D, dtype=q.dtype, device=q.device), torch.empty(H, T, dtype=wide, device=q.device)
        queries, _ = tiles(mask, BM, BN)
        forward[(H, len(queries))](q, k, v, o, lse, queries, mask.lo, mask.hi, mask.own, T, *(x.stride(0) for x in (q, k, v, o)),
                                   scale * LOG2E, H // k.shape[1], D, BM, BN, ACC[wide], num_warps=warps, num_stages=stages)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mask, ctx.scale = mask, scale
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        do, mask, scale, (T, H, D), G = do.contiguous(), ctx.mask, ctx.scale, q.shape, k.shape[1]
        acc, group = ACC[lse.dtype], H // G
        delta, (dq, dk, dv) = torch.empty_like(lse), (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        row_sums[(H, triton.cdiv(T, 64))](o, do, delta, T, o.stride(0), do.stride(0), D, 64, acc)
        strides = [x.stride(0) for x in (q, k, v, do)]
        _, (BM, BN, warps, stages), _ = BLOCKS[chip(q), D]
        _, keys = tiles(mask, BM, BN)
        keys_backward[(G, len(keys))](q, k, v, do, lse, delta, dk, dv, keys, mask.lo, mask.hi, mask.own, T, *strides,
                                      dk.stride(0), scale * LOG2E, scale, group, D, BM, BN, acc, num_warps=warps,
                                      num_stages=stages)
        _, _, (BM, BN, warps, stages) = BLOCKS[chip(q), D]
        queries, _ = tiles(mask, BM, BN)
        queries_backward[(H, len(queries))](q, k, v, do, lse, delta, dq, queries, mask.lo, mask.hi, mask.own, T, *strides,
                                            dq.stride(0), scale * LOG2E, scale, group, D, BM, BN, acc, num_warps=warps,
                                            num_stages=stages)
        return dq, dk, dv, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """As attention.attention: q (T, H, D), k and v (T, G, D) -> (T, H, D). Head dimensions other than 64 and 128 are padded
    with zeros to the next of them. Raises ValueError beyond 128."""
    D = q.shape[-1]
    if D > 128:
        raise ValueError(f"head dimension {D}: at most 128")
    room = (64 if D <= 64 else 128) - D
    if room:
        q, k, v = (F.pad(x, (0, room)) for x in (q, k, v))
    return FlashAttention.apply(q, k, v, mask, D ** -0.5)[..., :D]
