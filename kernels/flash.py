"""The same attention on a GPU: one pass over the keys, no score ever in memory, no atomics.

The problem. The scores of one head are a T x T matrix. Written to memory and read back, softmax(q
k') v is bound by that traffic, not by arithmetic; and of a packed row most of the matrix is never
looked at.

The trick, forward (FlashAttention, arXiv:2205.14135). One program owns BM queries. It walks over
the keys in blocks of BN and keeps, per query, the largest score so far, the sum of exponentials and
the weighted sum of values. When a new block brings a larger score, what was summed shrinks by
exp(old - new):

    for each block:   s = q k'        m' = max(m, max s)        a = exp(m - m')
                                      l' = l a + sum exp(s - m')
                                      o' = o a + exp(s - m') v
    at the end:       o / l   and   lse = m + log l

Which blocks? `tiles` reads it off the trees and writes it down for each program, as two walks:
first over the blocks that all its queries see whole, which need no mask; then over the ragged rest,
where the rule of attention.py is asked element by element.

Backward (arXiv:2307.08691, section 3) computes p = exp(s - lse) once more, with delta = sum(do * o)
per query:

    dv = p' do        ds = p * (do v' - delta)        dk = ds' q        dq = ds k

One kernel owns queries and walks over keys (dq), another owns keys and walks over queries (dk, dv).
Every output is written once, by one program, in a fixed order: two runs give the same bits, and so
does a tree whether it is alone in the row or packed among others.

Scores, softmax, sums, lse and delta are fp32. Exponentials are base 2, a GPU's own: scores are
multiplied by log2 e. Each call is timed against its opponents by `python speed.py --what kernels`.
"""
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import Mask

# Queries and keys at a time, warps, stages: forward | dk and dv | dq, per chip and head width. sm_90's
# are the fastest of many on an H200 (LOG.md, 2026-11-26). The others were chosen by what the compiler
# says of them: tensor cores are used, no loop spills (results/aot.jsonl); nobody has timed them.
BLOCKS = {
    ("sm_80", 64): ((64, 64, 4, 3), (32, 64, 4, 2), (64, 32, 4, 2)),
    ("sm_80", 128): ((64, 32, 4, 3), (32, 64, 8, 2), (64, 64, 8, 2)),
    ("sm_90", 64): ((128, 64, 8, 3), (32, 64, 4, 2), (64, 64, 4, 3)),
    ("sm_90", 128): ((128, 32, 4, 3), (32, 64, 4, 3), (64, 32, 4, 3)),
    ("sm_100", 64): ((128, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    ("sm_100", 128): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
    ("gfx942", 64): ((128, 64, 4, 1), (32, 64, 4, 1), (64, 64, 4, 1)),
    ("gfx942", 128): ((128, 64, 4, 1), (32, 64, 4, 1), (64, 64, 4, 1)),
    ("wide", 64): ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    ("wide", 128): ((32, 16, 8, 1), (16, 16, 4, 1), (32, 16, 8, 1)),
}
LOG2E = tl.constexpr(1.4426950408889634)


@cache
def architecture(device: torch.device) -> str:
    """Whose blocks a device uses: its own, or the nearest older chip's. An interpreter: Hopper's."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def chip(x: Tensor) -> str:
    """The row of the tables for a tensor. On any chip 4-byte numbers want blocks of their own."""
    return architecture(x.device) if x.element_size() == 2 else "wide"


# ---- what each program does, said once per pack --------------------------------------------------

def tiles(mask: Mask, BM: int, BN: int) -> tuple[Tensor, Tensor]:
    """Work for programs that own BM queries, and for those that own BN keys: int32 (programs, 11).

    A row:  first, end   what the program owns
            limit        where the blocks before the gap end; for keys, where all end
            2 walks      without a mask | ragged:  start, blocks before the gap, gap, blocks in all
    """
    key = "tiles", BM, BN
    if key not in mask.kept:
        trees, images = mask.trees
        queries, keys = [], []
        for image in images:
            queries += image_tiles(image, BM, BN)
            keys += image_tiles(image, BN, BM)
        for tree in trees:
            queries += query_tiles(tree, BM, BN)
            keys += key_tiles(tree, BM, BN)

        # Most blocks first, so that no long program starts late.
        tables = []
        for rows in (queries, keys):
            rows.sort(key=lambda row: row[6] + row[10], reverse=True)
            table = torch.tensor(rows, dtype=torch.int32)
            tables.append(table.to(mask.own.device, non_blocking=True))
        mask.kept[key] = tables
    return mask.kept[key]


def walk(a: int, blocks_a: int, b: int, blocks_b: int, size: int) -> tuple[int, ...]:
    """Blocks from a on, then blocks from b on: start, blocks before the gap, gap, blocks in all."""
    return a, blocks_a, b - (a + blocks_a * size), blocks_a + blocks_b


def image_tiles(image: tuple[int, int], own: int, other: int) -> list[tuple]:
    """All tokens of an image see all: whole blocks need no mask, the last one may be ragged."""
    start, end = image
    whole, rest = divmod(end - start, other)
    free = walk(start, whole, end, 0, other)
    ragged = walk(start + whole * other, int(rest > 0), end, 0, other)
    return [(first, min(first + own, end), end, *free, *ragged) for first in range(start, end, own)]


def query_tiles(tree: list[int], BM: int, BN: int) -> list[tuple]:
    """Cut a tree [start, prompt's end, answer's end, ...] into blocks of queries.

    What these see is range A, of which all see all, and range B, which ends at the diagonal. A block
    may hold several answers.
    """
    start, prompt_end, *ends = tree
    trunk_end = ends[0] if ends else prompt_end              # the first answer continues the prompt
    later = list(zip(ends, ends[1:]))                        # the others: (start, end)
    found = []
    for first in range(start, tree[-1], BM):
        end = min(first + BM, tree[-1])
        branches = [a for a, b in later if a < end and b > first]
        if first < trunk_end:
            # Causal text: all see the keys up to the first query, later answers only the prompt's.
            a, a_end, b = start, start, start
            all_see = min(prompt_end, first + 1) if branches else first + 1
        else:
            # Later answers: all see the prompt; one alone also what precedes its first query here.
            a, a_end, b = start, prompt_end, branches[0]
            all_see = first + 1 if len(branches) == 1 else b

        free_a, rest_a = divmod(a_end - a, BN)
        free_b = max(all_see - b, 0) // BN
        rest_b = triton.cdiv(end - b, BN) - free_b
        found.append((first, end, a_end, *walk(a, free_a, b, free_b, BN),
                      *walk(a + free_a * BN, int(rest_a > 0), b + free_b * BN, rest_b, BN)))
    return found


def key_tiles(tree: list[int], BM: int, BN: int) -> list[tuple]:
    """Cut a tree into blocks of keys: the prompt's are seen by all behind, an answer's by its own."""
    start, prompt_end, *ends = tree
    found = []
    for first in range(start, tree[-1], BN):
        end = min(first + BN, tree[-1])
        seen_to = [b for a, b in zip([prompt_end, *ends], ends) if a < end and b > first]
        if first < prompt_end:
            seen_to.append(tree[-1])

        # Rows first..last see some of the keys; those from end - 1 to min(seen_to) see all.
        last = max(seen_to)
        count = triton.cdiv(last - first, BM)
        before = min(triton.cdiv(end - 1 - first, BM), count)            # they touch the diagonal
        behind = count if min(seen_to) == last else max((min(seen_to) - first) // BM, before)
        found.append((first, end, last, *walk(first + before * BM, behind - before, last, 0, BM),
                      *walk(first, before, first + behind * BM, count - behind, BM)))
    return found


# ---- pieces of the kernels -----------------------------------------------------------------------
# Tensors are contiguous: q, o, do, dq (T, H, D), k, v, dk, dv (T, G, D), lse and delta (H, T).

@triton.jit
def load(X, rows, end, head, heads: tl.constexpr, D: tl.constexpr):
    """Rows of one head of (T, heads, D), zero from `end` on."""
    at = (rows.to(tl.int64)[:, None] * heads + head) * D + tl.arange(0, D)[None, :]
    return tl.load(X + at, mask=rows[:, None] < end, other=0.0)


@triton.jit
def store(X, x, rows, end, head, heads: tl.constexpr, D: tl.constexpr):
    at = (rows.to(tl.int64)[:, None] * heads + head) * D + tl.arange(0, D)[None, :]
    tl.store(X + at, x.to(X.dtype.element_ty), mask=rows[:, None] < end)


@triton.jit
def product(a, b, c=None):
    """a b, or c + a b: fp32 sums, and fp32 factors unrounded."""
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def bounds_of(BOUNDS, rows, end, T):
    """lo, hi and own of some rows."""
    real = rows < end
    lo = tl.load(BOUNDS + rows, mask=real, other=0)
    hi = tl.load(BOUNDS + T + rows, mask=real, other=0)
    own = tl.load(BOUNDS + 2 * T + rows, mask=real, other=0)
    return lo, hi, own


@triton.jit
def sees(m, n, lo, hi, own):
    """The rule of attention.py: does query m, with its three integers, see key n?"""
    return ((lo <= n) & (n < hi)) | ((own <= n) & (n <= m))


@triton.jit
def steps(tile, ragged):
    """One of a tile's two walks: start, blocks before the gap, gap, blocks in all."""
    at = tile + 3 + 4 * ragged
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


# ---- the kernels; `ragged` is known when they are compiled, so the first walk has no mask --------

@triton.jit(do_not_specialize=["T"])
def forward(Q, K, V, O, LSE, TILES, BOUNDS, T, scale,
            H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """o and lse of BM queries of one head."""
    head = tl.program_id(0)
    group = head // (H // G)
    tile = TILES + 11 * tl.program_id(1)
    first, end, limit = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    m = first + tl.arange(0, BM)
    q = load(Q, m, end, head, H, D)
    lo, hi, own = bounds_of(BOUNDS, m, end, T)

    o = tl.zeros([BM, D], tl.float32)
    l = tl.zeros([BM], tl.float32)
    big = tl.full([BM], float("-inf"), tl.float32)
    for ragged in tl.static_range(2):
        start, before, gap, count = steps(tile, ragged)
        for i in range(count):
            n = start + i * BN + tl.where(i < before, 0, gap) + tl.arange(0, BN)
            k = load(K, n, T, group, G, D)
            s = product(q, tl.trans(k)) * (scale * LOG2E)                    # (BM, BN)
            if ragged:
                seen = sees(m[:, None], n[None, :], lo[:, None], hi[:, None], own[:, None])
                real = n < tl.where(i < before, limit, end)
                s = tl.where(seen & real[None, :], s, float("-inf"))

            new = tl.maximum(big, tl.max(s, 1))      # finite: all rows see the first key walked to
            p = tl.math.exp2(s - new[:, None])
            shrink = tl.math.exp2(big - new)
            v = load(V, n, T, group, G, D)
            o = product(p.to(v.dtype), v, o * shrink[:, None])
            l = l * shrink + tl.sum(p, 1)
            big = new

    tl.store(LSE + head.to(tl.int64) * T + m, big + tl.math.log2(l), mask=m < end)
    store(O, o / l[:, None], m, end, head, H, D)


@triton.jit(do_not_specialize=["T"])
def row_sums(O, DO, DELTA, T, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    """delta = sum over D of do * o."""
    head = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    o = load(O, m, T, head, H, D).to(tl.float32)
    do = load(DO, m, T, head, H, D).to(tl.float32)
    tl.store(DELTA + head.to(tl.int64) * T + m, tl.sum(o * do, 1), mask=m < T)


@triton.jit(do_not_specialize=["T"])
def queries_backward(Q, K, V, DO, LSE, DELTA, DQ, TILES, BOUNDS, T, scale,
                     H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr):
    """dq of BM queries of one head: the same walk as forward."""
    head = tl.program_id(0)
    group = head // (H // G)
    tile = TILES + 11 * tl.program_id(1)
    first, end, limit = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    m = first + tl.arange(0, BM)
    q = load(Q, m, end, head, H, D)
    do = load(DO, m, end, head, H, D)
    lo, hi, own = bounds_of(BOUNDS, m, end, T)

    stat = head.to(tl.int64) * T + m
    lse = tl.load(LSE + stat, mask=m < end, other=0.0)
    delta = tl.load(DELTA + stat, mask=m < end, other=0.0)

    dq = tl.zeros([BM, D], tl.float32)
    for ragged in tl.static_range(2):
        start, before, gap, count = steps(tile, ragged)
        for i in range(count):
            n = start + i * BN + tl.where(i < before, 0, gap) + tl.arange(0, BN)
            k = load(K, n, T, group, G, D)
            v = load(V, n, T, group, G, D)
            s = product(q, tl.trans(k)) * (scale * LOG2E)                    # (BM, BN)
            p = tl.math.exp2(s - lse[:, None])
            if ragged:
                seen = sees(m[:, None], n[None, :], lo[:, None], hi[:, None], own[:, None])
                real = n < tl.where(i < before, limit, end)
                p = tl.where(seen & real[None, :], p, 0.0)
            ds = p * (product(do, tl.trans(v)) - delta[:, None])
            dq = product(ds.to(k.dtype), k, dq)

    store(DQ, dq * scale, m, end, head, H, D)


@triton.jit(do_not_specialize=["T"])
def keys_backward(Q, K, V, DO, LSE, DELTA, DK, DV, TILES, BOUNDS, T, scale,
                  H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr):
    """dk and dv of BN keys of one key head, over all query heads that read it."""
    group = tl.program_id(0)
    tile = TILES + 11 * tl.program_id(1)
    first, end, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    n = first + tl.arange(0, BN)
    k = load(K, n, end, group, G, D)
    v = load(V, n, end, group, G, D)

    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for ragged in tl.static_range(2):
        start, before, gap, count = steps(tile, ragged)
        for j in range(H // G * count):              # all heads in one loop, dk and dv in registers
            head = group * (H // G) + j // count
            i = j % count
            m = start + i * BM + tl.where(i < before, 0, gap) + tl.arange(0, BM)

            # From row `last` on q and do are 0, so that nothing is added.
            q = load(Q, m, last, head, H, D)
            do = load(DO, m, last, head, H, D)
            stat = head.to(tl.int64) * T + m
            lse = tl.load(LSE + stat, mask=m < last, other=0.0)
            delta = tl.load(DELTA + stat, mask=m < last, other=0.0)

            s = product(k, tl.trans(q)) * (scale * LOG2E)                    # (BN, BM)
            p = tl.math.exp2(s - lse[None, :])
            if ragged:
                lo, hi, own = bounds_of(BOUNDS, m, last, T)
                seen = sees(m[None, :], n[:, None], lo[None, :], hi[None, :], own[None, :])
                p = tl.where(seen, p, 0.0)
            dv = product(p.to(do.dtype), do, dv)
            ds = p * (product(v, tl.trans(do)) - delta[None, :])
            dk = product(ds.to(q.dtype), q, dk)

    store(DK, dk * scale, n, end, group, G, D)
    store(DV, dv, n, end, group, G, D)


# ---- the function --------------------------------------------------------------------------------

class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        (T, H, D), G = q.shape, k.shape[1]
        o, lse = torch.empty_like(q), torch.empty(H, T, device=q.device)

        BM, BN, warps, stages = BLOCKS[chip(q), D][0]
        queries, _ = tiles(mask, BM, BN)
        forward[H, len(queries)](q, k, v, o, lse, queries, mask.bounds, T, scale,
                                 H, G, D, BM, BN, num_warps=warps, num_stages=stages)

        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mask, ctx.scale = mask, scale
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        do = do.contiguous()
        mask, scale = ctx.mask, ctx.scale
        (T, H, D), G = q.shape, k.shape[1]
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        row_sums[H, triton.cdiv(T, 64)](o, do, delta, T, H, D, 64)

        _, for_keys, for_queries = BLOCKS[chip(q), D]
        BM, BN, warps, stages = for_queries
        queries, _ = tiles(mask, BM, BN)
        queries_backward[H, len(queries)](q, k, v, do, lse, delta, dq, queries, mask.bounds, T, scale,
                                          H, G, D, BM, BN, num_warps=warps, num_stages=stages)

        BM, BN, warps, stages = for_keys
        _, keys = tiles(mask, BM, BN)
        keys_backward[G, len(keys)](q, k, v, do, lse, delta, dk, dv, keys, mask.bounds, T, scale,
                                    H, G, D, BM, BN, num_warps=warps, num_stages=stages)
        return dq, dk, dv, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """As attention.attention: q (T, H, D), k and v (T, G, D) -> (T, H, D).

    Heads of other widths than 64 and 128 are padded with zeros. Raises ValueError beyond 128.
    """
    D = q.shape[-1]
    if D > 128:
        raise ValueError(f"head dimension {D}: at most 128")
    room = (64 if D <= 64 else 128) - D
    if room:
        q, k, v = (F.pad(x, (0, room)) for x in (q, k, v))
    return FlashAttention.apply(q, k, v, mask, D ** -0.5)[..., :D]
