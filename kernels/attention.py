"""Attention over packed trees: many prompts, each with n answers, in one row without padding.

The problem. A preference record is a prompt (for LLaVA-1.5: 576 image tokens and a question) with n
answers. Computing each (prompt, answer) pair as its own padded sequence repeats the prompt n times
and computes padding besides. We lay everything out in one row of T tokens instead:

    row     [ prompt A | answer A1 | answer A2 | prompt B | answer B1 | ... ]

and say per token, with three integers, what it may see:

    token i sees token j   <=>   lo[i] <= j < hi[i]   or   own[i] <= j <= i

    token of             lo, hi               own
    a prompt             empty (0, 0)         where the prompt starts      causal text
    an answer            its prompt's range   where this answer starts     the prefix, then itself
    an image's patches   the image's range    where the image starts       bidirectional (the ViT)

    softmax(q k' / sqrt(D) restricted to that) v.

The trick. Written as a T x T matrix that mask is almost all zeros, so we never write it. The three
vectors are cut once per pack into *calls*, each a small dense problem that one library call solves:

    trunk     prompt and first answer, which together are plain causal text    (no mask tensor)
    branches  the other answers' queries against their whole tree              (one tree's mask)
    full      an image                                                         (no mask tensor)

Problems of similar size are padded to one shape and run as a batch, so that a thousand short trees
cost a few calls, not a thousand. All layers of a model share the plan.

References: FlashAttention (arXiv:2205.14135), FlashMask (arXiv:2410.01359) for column-range masks.
"""
import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

PAD_WASTE = 1.5  # a batch of problems may compute this many times the scores it needs


# ---- the specification: slow, obvious, used by the tests -----------------------------------------

def sees(lo: Tensor, hi: Tensor, own: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The rule: does token i, with its three integers, see token j? Shapes broadcast."""
    return ((lo <= j) & (j < hi)) | ((own <= j) & (j <= i))


def dense_mask(mask: "Mask") -> Tensor:
    """The T x T boolean matrix that `mask` stands for: [i, j] is true where i sees j."""
    at = torch.arange(len(mask.own), device=mask.own.device)
    return sees(mask.lo[:, None], mask.hi[:, None], mask.own[:, None], at[:, None], at[None, :])


def attention_spec(q: Tensor, k: Tensor, v: Tensor, mask: "Mask") -> Tensor:
    """`attention` as its formula says it, with the T x T matrix in memory. In any dtype."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)                                    # (T, G, D) -> (T, H, D)
    v = v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5    # (H, T, T)
    probs = scores.masked_fill(~dense_mask(mask), -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", probs, v)


# ---- the mask, and what a row consists of --------------------------------------------------------

@dataclass
class Mask:
    """What each of T packed tokens may see: int64 vectors (T,), the rule is in the file's head."""
    lo: Tensor
    hi: Tensor
    own: Tensor
    source: "Mask | None" = None         # the mask this one is a copy of, elsewhere
    kept: dict = field(default_factory=dict)    # what flash.py derives from it

    @classmethod
    def full(cls, count: int, length: int, device=None) -> "Mask":
        """`count` images of `length` tokens, one after another; within an image all see all."""
        rows = torch.arange(count * length, device=device)
        start = rows // length * length
        mask = cls(start, start + length, start)

        # Nothing to find out: one call on the row as it lies.
        images = Rows(rows.view(count, length), slice(0, count * length))
        mask.plan = [Call(images, images)], None
        mask.trees = [], [(k * length, (k + 1) * length) for k in range(count)]
        return mask

    def to(self, device) -> "Mask":
        """The same mask elsewhere. It is cut here, on the CPU, so that no GPU is waited for."""
        lo, hi, own = (x.to(device, non_blocking=True) for x in (self.lo, self.hi, self.own))
        moved = Mask(lo, hi, own, source=self)
        moved.trees = self.trees
        return moved

    @cached_property
    def bounds(self) -> Tensor:
        """lo, hi and own of every token, int32 (3, T)."""
        return torch.stack([self.lo, self.hi, self.own]).int()

    @cached_property
    def trees(self) -> tuple[list, list]:
        """Trees [start, prompt's end, answer's end, ...] and images (start, end), in tokens."""
        return segments(self)

    @cached_property
    def plan(self) -> tuple[list["Call"], Tensor | None]:
        """(calls, order): concatenate the calls' outputs, take rows `order` (T,): the pack. Where
        order is None they come as they should."""
        if self.source is None:
            return make_plan(self)
        calls, order = self.source.plan
        device = self.own.device
        return [call.to(device) for call in calls], None if order is None else order.to(device)


def segments(mask: Mask) -> tuple[list, list]:
    """Trees [start, prompt's end, answer's end, ...] and images (start, end) of a row.

    Raises ValueError where the vectors do not describe prompt, answer, answer, ... in that order.
    """
    tokens = list(zip(mask.own.tolist(), mask.lo.tolist(), mask.hi.tolist()))
    starts = [i for i in range(len(tokens)) if i == 0 or tokens[i] != tokens[i - 1]]
    trees, images = [], []
    for start, end in zip(starts, starts[1:] + [len(tokens)]):
        own, lo, hi = tokens[start]
        if own != start:
            raise ValueError(f"mask: segment at token {start} says it starts at {own}")

        if lo == hi:                                                     # a prompt opens a tree
            trees.append([start, end])
        elif (lo, hi) == (start, end):                                   # an image
            images.append((start, end))
        elif trees and [lo, hi] == trees[-1][:2] and start == trees[-1][-1]:
            trees[-1].append(end)                                        # an answer joins the tree
        else:
            raise ValueError(f"mask: tokens {start}..{end} see [{lo}, {hi}), "
                             "which is no prompt standing before them")
    return trees, images


# ---- the plan: which dense problems a row is -----------------------------------------------------

@dataclass
class Rows:
    """Which rows of the pack S problems of one shape consist of; padding repeats a problem's last."""
    at: Tensor                           # (S, L)
    span: slice | None                   # the same as a range, where they lie one after another

    def take(self, x: Tensor) -> Tensor:
        """(T, heads, D) -> (S, heads, L, D). A range is a view: no copy, and none back."""
        x = x.index_select(0, self.at.flatten()) if self.span is None else x[self.span]
        return x.view(*self.at.shape, *x.shape[1:]).transpose(1, 2)


@dataclass
class Call:
    """S problems of one shape, solved at once."""
    queries: Rows                        # (S, Lq)
    keys: Rows                           # (S, Lk)
    causal: bool = False
    visible: Tensor | None = None        # (S, 1, Lq, Lk); None where all is seen, or causal says it

    def to(self, device) -> "Call":
        queries = replace(self.queries, at=self.queries.at.to(device))
        keys = replace(self.keys, at=self.keys.at.to(device))
        visible = None if self.visible is None else self.visible.to(device)
        return Call(queries, keys, self.causal, visible)


def make_plan(mask: Mask) -> tuple[list[Call], Tensor | None]:
    """Cut the row into trunks, branches and images; batch those of similar size (Mask.plan)."""
    T, device = len(mask.own), mask.own.device
    trees, images = mask.trees

    # Problems are (first query, first key, end).
    full = [(start, start, end) for start, end in images]
    trunks, branches = [], []
    for start, prompt_end, *ends in trees:
        trunks.append((start, start, ends[0] if ends else prompt_end))
        if len(ends) > 1:
            branches.append((ends[0], start, ends[-1]))

    calls = []
    computed = []
    real = []
    kinds = ("full", full, 1.0), ("causal", trunks, PAD_WASTE), ("masked", branches, PAD_WASTE)
    for kind, problems, waste in kinds:
        for batch in by_size(problems, waste):
            queries, q_real = rows([(q, end) for q, _, end in batch], device)
            keys, k_real = rows([(k, end) for _, k, end in batch], device)
            call = Call(queries, keys, causal=kind == "causal")
            if kind == "masked":
                i, j = queries.at[:, :, None], keys.at[:, None, :]       # (S, Lq, 1), (S, 1, Lk)
                seen = sees(mask.lo[i], mask.hi[i], mask.own[i], i, j) & k_real[:, None]
                call.visible = seen[:, None]                             # (S, 1, Lq, Lk)
            calls.append(call)
            computed.append(queries.at.flatten())
            real.append(q_real.flatten())

    # The calls' outputs come in the order `computed`, padding among them: where is each token?
    computed, real = torch.cat(computed), torch.cat(real)
    if torch.equal(computed, torch.arange(T, device=device)):
        return calls, None
    order = torch.empty(T, dtype=torch.long, device=device)
    order[computed[real]] = real.nonzero()[:, 0]
    return calls, order


def by_size(problems: list[tuple], waste: float) -> list[list]:
    """Batch problems of similar shape: padded to one, at most `waste` times the scores needed."""
    batches = []
    needed = 0
    longest = 0, 0
    for first_query, first_key, end in sorted(problems, key=lambda p: (p[2] - p[1], p[2] - p[0])):
        queries, keys = end - first_query, end - first_key
        shape = max(longest[0], queries), max(longest[1], keys)
        padded = shape[0] * shape[1] * (len(batches[-1]) + 1) if batches else math.inf
        if padded > waste * (needed + queries * keys):
            batches.append([])
            needed, shape = 0, (queries, keys)
        batches[-1].append((first_query, first_key, end))
        needed, longest = needed + queries * keys, shape
    return batches


def rows(spans: list[tuple[int, int]], device) -> tuple[Rows, Tensor]:
    """Ranges (start, end) -> their rows, padded to the longest, and which are real (S, L)."""
    start, end = torch.tensor(spans, device=device).T[:, :, None]        # (S, 1) each
    at = start + torch.arange(int((end - start).max()), device=device)   # (S, L)
    real = at < end

    first, count = spans[0][0], at.numel()
    together = torch.equal(at.flatten(), torch.arange(first, first + count, device=device))
    span = slice(first, first + count) if together and real.all() else None
    return Rows(torch.minimum(at, end - 1), span), real


# ---- the functions -------------------------------------------------------------------------------

def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k' / sqrt(D)) v under `mask`. Differentiable in q, k, v; no T x T tensor is built.

    q     (T, H, D)   queries of T packed tokens, H heads
    k, v  (T, G, D)   keys and values, H a multiple of G (head h reads h // (H / G))
    returns (T, H, D) in q's dtype.
    """
    calls, order = mask.plan
    grouped = q.shape[1] != k.shape[1]
    out = []
    for call in calls:
        o = F.scaled_dot_product_attention(
            call.queries.take(q), call.keys.take(k), call.keys.take(v),
            attn_mask=call.visible, is_causal=call.causal, enable_gqa=grouped,
        )                                                                # (S, H, Lq, D)
        out.append(o.transpose(1, 2).reshape(-1, *q.shape[1:]))          # (S * Lq, H, D)

    out = out[0] if len(out) == 1 else torch.cat(out)
    return out if order is None else out.index_select(0, order)


def decode(q: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor],
           prompt_len: Tensor, own_len: int) -> Tensor:
    """One new token for each of R x n answers; an answer sees its record's prompt and its own past.

    q           (R, n, H, D)         the new tokens' queries
    prompt      (R, G, P, D) x 2     keys and values of the prompts, once per record
    own         (R, G, n, A, D) x 2  the answers' own, the new token's among them
    prompt_len  (R,)                 how much of P is filled
    own_len                          how much of A is filled
    returns     (R, n, H, D)
    """
    R, n, H, D = q.shape
    G, P = prompt[0].shape[1:3]
    prompt_k, prompt_v = prompt
    own_k, own_v = own[0][:, :, :, :own_len], own[1][:, :, :, :own_len]
    q = q.view(R, n, G, H // G, D).transpose(1, 2) * D ** -0.5           # (R, G, n, H/G, D)

    # The queries of all n answers meet the prompt in one product.
    to_prompt = (q.flatten(2, 3) @ prompt_k.mT).view(R, G, n, H // G, P).float()
    unseen = torch.arange(P, device=q.device) >= prompt_len[:, None]     # (R, P)
    to_prompt = to_prompt.masked_fill(unseen[:, None, None, None], -torch.inf)
    to_own = (q @ own_k.mT).float()                                      # (R, G, n, H/G, own_len)

    probs = torch.cat([to_prompt, to_own], -1).softmax(-1).to(q.dtype)
    of_prompt, of_own = probs.split([P, own_len], -1)
    out = (of_prompt.flatten(2, 3) @ prompt_v).view(R, G, n, H // G, D) + of_own @ own_v
    return out.transpose(1, 2).reshape(R, n, H, D)                       # heads last again
