"""log p(token) without the [tokens, vocab] matrix.

The problem. A language model's head turns each hidden state h into V logits, and the loss reads one
number per scored token: its log-probability,

    logp = w[target] . h  -  log sum_v exp(w[v] . h).

For eight LLaVA preference pairs the full matrix of fp32 logits is 1.6 GB, its softmax the same
again and its gradient once more; and 71 % of the rows are image tokens that nobody scores.

The trick. (1) Only scored rows are computed: `rows` names the hidden state that predicts each
target. The last prompt row predicts the first token of *every* answer, so it may be named n times.
(2) Rows go through in chunks; of each chunk only one number per row survives, the target's. (3)
Backward recomputes the chunk (a single one was kept) and turns it into its own gradient,

    d logp / d logits = onehot(target) - softmax(logits),

so peak memory is a chunk or two in either direction (and, for a 16-bit head, one fp32 copy of it).
Logits, their sum and the result are fp32 whatever the model's dtype: summed over a 128-token
answer, bf16 logits would move the log-prob by half a nat.

References: Cut Cross-Entropy (arXiv:2411.09009), Liger Kernel (arXiv:2410.10989).
"""
import torch
from torch import Tensor

# fp32 logits held at once: most packs' fit, and none is computed twice. With a large vocabulary that
# would be few rows, and a product of few rows is slow.
CHUNK_BYTES = 64 << 20
CHUNK_ROWS = 512


# ---- the specification ---------------------------------------------------------------------------

def logps_spec(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """`logps` as its formula says it, with all logits in memory. fp64 in, fp64 out, for oracles."""
    logits = hidden[rows] @ weight.T                                     # (N, V)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]      # (N,)


# ---- chunked forward and backward ----------------------------------------------------------------

def rows_at_once(vocab: int) -> int:
    """Rows of a chunk: what fits CHUNK_BYTES, and at least CHUNK_ROWS."""
    return max(CHUNK_ROWS, CHUNK_BYTES // (4 * vocab))


def chunks(n: int, vocab: int) -> list[slice]:
    """Cut n rows into chunks; no rows are one chunk of none."""
    size = rows_at_once(vocab)
    return [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size)]


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where the caller already is (gradcheck)."""
    return x if x.dtype == torch.float64 else x.float()


class ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rows, targets):
        w = wide(weight)
        parts = chunks(len(rows), len(w))
        out = w.new_empty(len(rows))
        for c in parts:
            logps = (wide(hidden[rows[c]]) @ w.T).log_softmax(-1)        # (c, V)
            out[c] = logps.gather(1, targets[c, None])[:, 0]

        kept = logps if len(parts) == 1 else None
        ctx.save_for_backward(hidden, weight, rows, targets, kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, rows, targets, kept = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        w = wide(weight)
        d_hidden, d_weight = None, None
        if need_hidden:
            d_hidden = torch.zeros_like(hidden, dtype=w.dtype)

        for c in chunks(len(rows), len(w)):
            h = wide(hidden[rows[c]])                                    # (c, D)
            logps = (h @ w.T).log_softmax(-1) if kept is None else kept

            # grad * (onehot(target) - softmax). Not logps.exp(): it crawls where it ends below 1e-38.
            d_logits = logps.softmax(-1).mul_(-grad[c, None])            # (c, V)
            d_logits.scatter_add_(1, targets[c, None], grad[c, None].to(d_logits.dtype))

            if need_hidden:
                d_hidden.index_add_(0, rows[c], d_logits @ w)            # a prompt's last row repeats
            if need_weight and d_weight is None:
                d_weight = d_logits.T @ h                                # (V, D)
            elif need_weight:
                d_weight.addmm_(d_logits.T, h)

        if need_hidden:
            d_hidden = d_hidden.to(hidden.dtype)
        if need_weight:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None


def logps(hidden: Tensor, weight: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """log p(targets[i]) in nats, from hidden state rows[i]. Differentiable in hidden and weight.

    hidden   (T, D)   final hidden states of a pack
    weight   (V, D)   the head, in hidden's dtype; no gradient is computed for a frozen one
    rows     (N,)     int64, which hidden state predicts target i; rows may repeat
    targets  (N,)     int64 token ids
    returns  (N,)     fp32
    """
    return ChunkedLogps.apply(hidden, weight, rows, targets)
