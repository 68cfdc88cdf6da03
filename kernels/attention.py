"""Attention over packed trees: many prompts, each with n answers, in one row without padding.

The problem. A preference record is a prompt (for LLaVA-1.5: 576 image tokens and a question) with n
answers. Computing each (prompt, answer) pair as its own padded sequence repeats the prompt n times and
computes padding besides. We lay everything out in one row of T tokens instead:

    row     [ prompt A | answer A1 | answer A2 | prompt B | answer B1 | ... ]

and say per token, with three integers, what it may see:

    token i sees token j   <=>   lo[i] <= j < hi[i]   or   own[i] <= j <= i

    token of             lo, hi               own
    a prompt             empty (0, 0)         where the prompt starts      causal text
    an answer            its prompt's range   where this answer starts     the shared prefix, then itself
    an image's patches   the image's range    where the image starts       bidirectional (the ViT)

    softmax(q k' / sqrt(D) restricted to that) v.

The trick. Written as a T x T matrix that mask is almost all zeros, so we never write it. The three
vectors are cut once per pack into *calls*, each a small dense problem that one library call solves:

    trunk     prompt and first answer, which together are plain causal text       (no mask tensor)
    branches  the other answers' queries against their whole tree                 (Lq x Lk mask of one tree)
    full      an image                                                            (no mask tensor)

Calls of similar size are padded to one shape and run as a batch, so that a thousand short trees cost a
few calls, not a thousand. All layers of a model share the plan.

References: FlashAttention (arXiv:2205.14135), FlashMask (arXiv:2410.01359) for column-range masks.
Previous: toy/oracle.py.  Next: kernels/flash.py (the same on a GPU).
"""
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

PAD_WASTE = 1.5  # a batch of problems may compute this many times the scores it needs


# ---- the specification: slow, obvious, used by the tests ------------------------------------------------

def dense_mask(mask: "Mask") -> Tensor:
    """The T x T boolean matrix that `mask` stands for: [i, j] is true where token i sees token j."""
    i = torch.arange(len(mask.own), device=mask.own.device)[:, None]
    j = i.T
    lo, hi, own = (x[:, None] for x in (mask.lo, mask.hi, mask.own))
    return ((lo <= j) & (j < hi)) | ((own <= j) & (j <= i))


def attention_spec(q: Tensor, k: Tensor, v: Tensor, mask: "Mask") -> Tensor:
    """`attention` as its formula says it, with the T x T matrix in memory. Any dtype, fp64 for oracles."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)      # (T, G, D) -> (T, H, D)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5        # (H, T, T)
    probs = scores.masked_fill(~dense_mask(mask), -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", probs, v)


# ---- the plan: which dense problems a packed row consists of --------------------------------------------

@dataclass
class Call:
    """S problems of one shape. `q_rows` (S, Lq) and `k_rows` (S, Lk) are rows of the pack; padding repeats a
    problem's last row. `visible` (S, 1, Lq, Lk) is None where `causal` or seeing everything says it all;
    `whole` is true where the rows are the pack as it lies, so that no copy is needed."""
    q_rows: Tensor
    k_rows: Tensor
    causal: bool = False
    visible: Tensor | None = None
    whole: bool = False


@dataclass
class Mask:
    """What each of T packed tokens may see: int64 vectors (T,), the rule is in the file's head."""
    lo: Tensor
    hi: Tensor
    own: Tensor
    source: "Mask | None" = None         # the mask this one is a copy of, elsewhere

    @classmethod
    def full(cls, count: int, length: int, device=None) -> "Mask":
        """`count` images of `length` tokens each, one after another; within an image all see all."""
        rows = torch.arange(count * length, device=device)
        start = rows // length * length
        mask = cls(start, start + length, start)
        rows = rows.view(count, length)
        mask.plan = [Call(rows, rows, whole=True)], rows                     # nothing to find out
        mask.trees = [], [(k * length, (k + 1) * length) for k in range(count)]
        return mask

    def to(self, device) -> "Mask":
        """The same mask elsewhere. What is cut from it is cut here, on the CPU, when first asked for: no GPU is waited for."""
        moved = Mask(*(x.to(device, non_blocking=True) for x in (self.lo, self.hi, self.own)), source=self)
        moved.trees = self.trees
        return moved

    @cached_property
    def trees(self) -> tuple[list, list]:
        """Trees [start, prompt's end, answer's end, ...] and images (start, end), in tokens."""
        return segments(self)

    @cached_property
    def plan(self) -> tuple[list[Call], Tensor]:
        """(calls, order): concatenate the calls' flattened outputs, take rows `order` (T,), and the pack is whole."""
        if self.source is None:
            return make_plan(self)
        (calls, order), device = self.source.plan, self.own.device
        return [replace(c, q_rows=c.q_rows.to(device), k_rows=c.k_rows.to(device),
                        visible=None if c.visible is None else c.visible.to(device)) for c in calls], order.to(device)


def make_plan(mask: Mask) -> tuple[list[Call], Tensor]:
    """Cut the row into trunks, branches and images; batch those of similar size. Derived once per pack.

    Raises ValueError where the three vectors do not describe trees laid out as prompt, answer, answer, ...
    """
    device, T = mask.own.device, len(mask.own)
    trees, images = mask.trees
    trunks = [(tree[0], tree[0], tree[2] if len(tree) > 2 else tree[1]) for tree in trees]   # (first query, first key, end)
    branches = [(tree[2], tree[0], tree[-1]) for tree in trees if len(tree) > 3]
    full = [(start, start, end) for start, end in images]
    calls, flat, real = [], [], []

    def add(q_spans, k_spans, causal=False, masked=False):
        q_rows, q_real = rows(q_spans, device)                                           # (S, Lq)
        k_rows, k_real = rows(k_spans, device)                                           # (S, Lk)
        visible = None
        if masked:
            i, j = q_rows[:, :, None], k_rows[:, None, :]                                # (S, Lq, 1), (S, 1, Lk)
            lo, hi, own = (x[i] for x in (mask.lo, mask.hi, mask.own))
            visible = ((lo <= j) & (j < hi)) | ((own <= j) & (j <= i))
            visible = (visible & k_real[:, None])[:, None]                               # (S, 1, Lq, Lk)
        whole = q_rows.numel() == T and torch.equal(q_rows.flatten(), torch.arange(T, device=device))
        calls.append(Call(q_rows, k_rows, causal, visible, whole and not masked))
        flat.append(q_rows.flatten())
        real.append(q_real.flatten())

    for kind, same in (("full", full), ("causal", trunks), ("masked", branches)):
        for batch in by_size(same, waste=1.0 if kind == "full" else PAD_WASTE):
            q_spans, k_spans = [(q0, end) for q0, _, end in batch], [(k0, end) for _, k0, end in batch]
            add(q_spans, k_spans, causal=kind == "causal", masked=kind == "masked")

    flat, real = torch.cat(flat), torch.cat(real)
    order = torch.empty(T, dtype=torch.long, device=device)
    order[flat[real]] = real.nonzero()[:, 0]
    return calls, order


def segments(mask: Mask) -> tuple[list, list]:
    """Trees [start, prompt's end, answer's end, ...] and images (start, end) of a row."""
    lo, hi, own = (x.tolist() for x in (mask.lo, mask.hi, mask.own))
    T = len(own)
    key = list(zip(own, lo, hi))
    starts = [t for t in range(T) if t == 0 or key[t] != key[t - 1]]
    trees, full = [], []
    for start, end in zip(starts, starts[1:] + [T]):
        if own[start] != start:
            raise ValueError(f"mask: segment at token {start} says it starts at {own[start]}")
        if lo[start] == hi[start]:                                   # a prompt opens a tree
            trees.append([start, end])
        elif (lo[start], hi[start]) == (start, end):                 # an image, or a ViT's picture
            full.append((start, end))
        elif trees and (lo[start], hi[start]) == tuple(trees[-1][:2]) and start == trees[-1][-1]:
            trees[-1].append(end)                                    # an answer joins the tree
        else:
            raise ValueError(f"mask: tokens {start}..{end} see [{lo[start]}, {hi[start]}), "
                             "which is no prompt standing before them")
    return trees, full


def by_size(spans: list, waste: float) -> list[list]:
    """Group problems of similar shape: a batch, padded to one shape, is at most `waste` times the scores it needs."""
    batches, needed, largest = [], 0, (0, 0)
    for q0, k0, end in sorted(spans, key=lambda s: (s[2] - s[1], s[2] - s[0])):
        q, k = end - q0, end - k0
        shape = max(largest[0], q), max(largest[1], k)
        if batches and shape[0] * shape[1] * (len(batches[-1]) + 1) <= waste * (needed + q * k):
            batches[-1].append((q0, k0, end))
            needed, largest = needed + q * k, shape
        else:
            batches.append([(q0, k0, end)])
            needed, largest = q * k, (q, k)
    return batches


def rows(spans: list[tuple], device) -> tuple[Tensor, Tensor]:
    """(start, end) token ranges -> (S, L) row numbers, padded by repeating the last, and which of them are real."""
    start, end = (torch.tensor(x, device=device)[:, None] for x in zip(*spans))
    at = start + torch.arange(int((end - start).max()), device=device)                   # (S, L)
    return torch.minimum(at, end - 1), at < end


# ---- the functions ------------------------------------------------------------------------------------------

def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k' / sqrt(D)) v under `mask`. Differentiable in q, k, v; no T x T tensor is built.

    q     (T, H, D)   queries of T packed tokens, H heads
    k, v  (T, G, D)   keys and values, H a multiple of G (grouped-query attention: head h reads h // (H/G))
    returns (T, H, D) in q's dtype.
    """
    calls, order = mask.plan
    out = []
    for call in calls:
        S, Lq = call.q_rows.shape
        qc = take(q, call.q_rows, call.whole)                                            # (S, H, Lq, D)
        kc, vc = (take(x, call.k_rows, call.whole) for x in (k, v))                      # (S, G, Lk, D)
        o = F.scaled_dot_product_attention(qc, kc, vc, attn_mask=call.visible, is_causal=call.causal,
                                           enable_gqa=q.shape[1] != k.shape[1])
        out.append(o.transpose(1, 2).reshape(S * Lq, *q.shape[1:]))                      # (S*Lq, H, D)
    return out[0] if calls[0].whole else torch.cat(out).index_select(0, order)


def take(x: Tensor, at: Tensor, whole: bool) -> Tensor:
    """Rows `at` (S, L) of x (T, heads, D) as (S, heads, L, D); a view where they are the whole pack as it lies."""
    x = x if whole else x.index_select(0, at.flatten())
    return x.view(*at.shape, *x.shape[1:]).transpose(1, 2)


def decode(q: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor],
           prompt_len: Tensor, own_len: int) -> Tensor:
    """One new token for each of R x n answers; an answer sees its record's prompt and its own past.

    q        (R, n, H, D)         the new tokens' queries
    prompt   (R, G, P, D) x 2     keys and values of the prompts, stored once per record, ragged: prompt_len (R,)
    own      (R, G, n, A, D) x 2  the answers' own, the first own_len of A are filled (the new token's last)
    returns  (R, n, H, D)
    """
    R, n, H, D = q.shape
    (pk, pv), (ok, ov) = prompt, (x[:, :, :, :own_len] for x in own)
    G, P = pk.shape[1:3]
    q = q.view(R, n, G, H // G, D).transpose(1, 2) * D ** -0.5                        # (R, G, n, H/G, D)
    to_prompt = (q.flatten(2, 3) @ pk.mT).view(R, G, n, H // G, P).float()
    unseen = torch.arange(P, device=q.device) >= prompt_len[:, None]                  # (R, P)
    to_prompt = to_prompt.masked_fill(unseen[:, None, None, None], -torch.inf)
    scores = torch.cat([to_prompt, (q @ ok.mT).float()], -1)                          # (R, G, n, H/G, P + A)
    probs = scores.softmax(-1).to(q.dtype)
    out = (probs[..., :P].flatten(2, 3) @ pv).view(R, G, n, H // G, D) + probs[..., P:] @ ov
    return out.transpose(1, 2).reshape(R, n, H, D)
