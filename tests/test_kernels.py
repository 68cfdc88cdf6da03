"""The two hot spots against their formulas: attention over packed trees, and log-probs without the logits.

    python -m pytest tests/test_kernels.py -q

The oracle is the specification with the whole matrix in memory, in fp64. In bf16 no fixed tolerance says much,
so the rule is relative: the error may be at most twice that of the plain dense bf16 computation.
"""
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
import kernels.logprob as logprob_file
from conftest import ROOT
from kernels import Mask, attention, decode, logps
from kernels.attention import attention_spec, dense_mask
from kernels.logprob import logps_spec

attention_file = kernels.plain             # kernels.attention is the function


# ---- packs -----------------------------------------------------------------------------------------------------

def pack(segments: list) -> Mask:
    """[(prompt length, [answer lengths]) or an image's length, ...] -> the pack's mask. Empty answers have no tokens."""
    lo, hi, own = [], [], []
    for segment in segments:
        start = len(own)
        prompt, answers = segment if isinstance(segment, tuple) else (segment, [])
        tree = isinstance(segment, tuple)
        lo += [0 if tree else start] * prompt
        hi += [0 if tree else start + prompt] * prompt
        own += [start] * prompt
        for length in answers:
            lo += [start] * length
            hi += [start + prompt] * length
            own += [len(own)] * length
    return Mask(*(torch.tensor(x) for x in (lo, hi, own)))


def fuzz(seed: int) -> list:
    r = random.Random(seed)
    return [r.randint(1, 12) if r.random() < 0.25 else (r.randint(1, 14), [r.randint(0, 9) for _ in range(r.randint(0, 4))])
            for _ in range(r.randint(1, 7))]


PACKS = {
    "one prompt": [(7, [])],
    "length-1 prompts": [(1, []), (1, [1, 1]), (1, [3])],
    "empty answers": [(4, [0, 0]), (3, [0, 2]), (5, [2, 0, 3, 0])],
    "1 to 4 answers, ragged": [(5, [3]), (9, [1, 6]), (3, [4, 2, 2]), (6, [2, 5, 1, 7])],
    "equal trees": [(4, [3, 3])] * 5,
    "images": [6, 6, 6],
    "images of different size": [5, 1, 9, 5],
    "mixed": [(5, [3, 2]), 6, (7, []), (3, [1, 4, 2, 2]), 6, 4, (9, [5]), (6, [3, 3, 1])],
    **{f"fuzz {seed}": fuzz(seed) for seed in range(12)},
}
HEADS = {"as many kv heads": (3, 3), "grouped": (4, 2), "one kv head": (4, 1)}


def qkv(T: int, heads=(4, 2), K: int = 8, dtype=torch.float64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    H, G = heads
    return [torch.randn(T, n, K, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n in (H, G, G)]


def with_grads(function, tensors, *more):
    """[output, gradient of each tensor] under one fixed random cotangent."""
    out = function(*tensors, *more)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, cotangent)]


def worst(ours, oracle) -> float:
    """The largest error relative to the size of what it is an error of, over output and gradients."""
    return max(((a.double() - b.double()).norm() / (b.double().norm() + 1e-30)).item() for a, b in zip(ours, oracle))


# ---- attention ---------------------------------------------------------------------------------------------------

def test_the_mask_says_what_the_head_of_the_file_says():
    seen = dense_mask(pack([(2, [2, 1]), 2])).int().tolist()
    assert seen == [[1, 0, 0, 0, 0, 0, 0],       # prompt: causal
                    [1, 1, 0, 0, 0, 0, 0],
                    [1, 1, 1, 0, 0, 0, 0],       # answer 1: the prompt and itself, causal
                    [1, 1, 1, 1, 0, 0, 0],
                    [1, 1, 0, 0, 1, 0, 0],       # answer 2: the prompt and itself, not answer 1
                    [0, 0, 0, 0, 0, 1, 1],       # image: both ways
                    [0, 0, 0, 0, 0, 1, 1]]


def test_the_specification_is_softmax_over_what_is_seen():
    """One head of width 1, by hand: token 1 of a prompt mixes two values by softmax of two products."""
    q, k, v = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in ([0.3, 2.0], [1.0, -0.5], [10.0, 20.0]))
    weight = torch.tensor([2.0 * 1.0, 2.0 * -0.5], dtype=torch.float64).softmax(0)
    out = attention_spec(q, k, v, pack([(2, [])]))[:, 0, 0]
    torch.testing.assert_close(out, torch.stack([v[0, 0, 0], weight[0] * 10 + weight[1] * 20]))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_attention_and_all_its_gradients_equal_the_formula(heads):
    for name, segments in PACKS.items():
        mask = pack(segments)
        tensors = qkv(len(mask.own), heads)
        oracle = with_grads(attention_spec, tensors, mask)
        assert worst(with_grads(attention, tensors, mask), oracle) < 1e-12, name
        narrow = [x.detach().float().requires_grad_() for x in tensors]
        assert worst(with_grads(attention, narrow, mask), oracle) < 3e-6, name


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_bf16_attention_errs_at_most_twice_as_much_as_dense_bf16(heads):
    mask = pack([(40, [17, 9, 30]), 33, (21, [5, 5])])
    half = qkv(len(mask.own), heads, K=32, dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in half]
    oracle, plain = (with_grads(attention_spec, x, mask) for x in (wide, half))
    ours = with_grads(attention, half, mask)
    assert ours[0].dtype == torch.bfloat16
    for a, b, exact in zip(ours, plain, oracle):
        assert worst([a], [exact]) <= 2 * worst([b], [exact])


def test_gradcheck_of_attention():
    mask = pack([(3, [2, 1, 2]), 3, (1, [1])])
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask), qkv(len(mask.own), (2, 1), K=3))


def test_every_token_is_computed_exactly_once():
    for name, segments in PACKS.items():
        mask = pack(segments)
        calls, order = mask.plan
        rows = torch.cat([call.queries.at.flatten() for call in calls])
        rows = rows if order is None else rows[order]
        assert torch.equal(rows, torch.arange(len(mask.own))), name


def test_an_invisible_token_changes_nothing():
    """Perturb key and value of one token: the rows that do not see it stay as they were, the others move."""
    mask = pack(PACKS["mixed"])
    q, k, v = (x.detach() for x in qkv(len(mask.own), dtype=torch.float32))
    before, sees = attention(q, k, v, mask), dense_mask(mask)
    for j in range(len(mask.own)):
        other_k, other_v = k.clone(), v.clone()
        other_k[j] += 3
        other_v[j] -= 5
        moved = (attention(q, other_k, other_v, mask) - before).abs().amax((1, 2))
        assert (moved[~sees[:, j]] <= 1e-6).all()
        assert (moved[sees[:, j]] > 1e-5).all()


def test_a_tree_is_computed_the_same_whatever_is_packed_around_it():
    tree, others = (9, [4, 6]), [(8, [3]), 5, (2, [1, 1, 1])]
    q, k, v = (x.detach() for x in qkv(19, dtype=torch.float32))
    alone = attention(q, k, v, pack([tree]))
    for at in range(len(others) + 1):
        mask = pack(others[:at] + [tree] + others[at:])
        start = sum(s if isinstance(s, int) else s[0] + sum(s[1]) for s in others[:at])
        Q, K, V = (x.detach() for x in qkv(len(mask.own), dtype=torch.float32, seed=5))
        for whole, part in ((Q, q), (K, k), (V, v)):
            whole[start:start + 19] = part
        torch.testing.assert_close(attention(Q, K, V, mask)[start:start + 19], alone, atol=1e-6, rtol=0)


def test_no_mask_is_larger_than_one_tree_and_text_needs_none():
    """64 trees: T x T would be 4096 trees' worth. Prompts, first answers and images need no mask tensor at all."""
    tree, T = (20, [7, 5]), 64 * 32
    calls, _ = pack([tree] * 64).plan
    visible = [call.visible for call in calls if call.visible is not None]
    assert max(x[0].numel() for x in visible) <= 32 * 32
    assert sum(x.numel() for x in visible) <= 64 * 5 * 32 < T * T / 100
    for segments in ([(20, [7])] * 64, [20] * 64, [(9, []), (30, [4]), 12]):
        assert all(call.visible is None for call in pack(segments).plan[0])


def test_short_trees_share_calls_and_padding_is_bounded():
    r = random.Random(0)
    mask = pack([(r.randint(20, 60), [r.randint(3, 9)]) for _ in range(200)])
    calls, _ = mask.plan
    assert len(calls) <= 8
    assert sum(call.queries.at.numel() for call in calls) <= 1.25 * len(mask.own)


def test_a_pack_of_equal_images_or_one_prompt_is_read_in_place():
    for segments in ([6, 6, 6], [(7, [2])], [(5, [2])] * 3):
        (call,), order = pack(segments).plan
        assert call.queries.span == call.keys.span == slice(0, len(pack(segments).own)) and order is None
    (trunk, branch), order = pack([(5, [2, 3])]).plan                    # one tree: nothing is copied
    assert order is None and (trunk.keys.span, branch.queries.span, branch.keys.span) == (slice(0, 7), slice(7, 10), slice(0, 10))
    padded = pack([(5, [2]), (4, [2])]).plan[0][0]
    assert padded.queries.span is None


def test_full_lays_out_equal_images():
    mask, same = Mask.full(3, 4), pack([4, 4, 4])
    for ours, by_hand in zip((mask.lo, mask.hi, mask.own), (same.lo, same.hi, same.own)):
        assert torch.equal(ours, by_hand)


@pytest.mark.parametrize("lo, hi, own", [
    ([0, 0, 0], [0, 0, 0], [0, 0, 1]),                   # a segment that says it starts before it does
    ([0, 0, 1], [0, 0, 2], [0, 0, 2]),                   # an answer that sees half its prompt
    ([0, 0, 0], [0, 0, 3], [0, 0, 2]),                   # an answer that sees more than its prompt
    ([0, 0, 0, 0, 0], [0, 0, 0, 0, 2], [0, 0, 2, 2, 4]),  # an answer behind another tree
    ([0, 0, 2, 2, 0], [0, 0, 4, 4, 2], [0, 0, 2, 2, 4]),  # an answer parted from its prompt by an image
    ([1, 1, 0], [3, 3, 0], [0, 0, 2]),                   # an answer before any prompt
])
def test_a_mask_that_is_no_tree_is_refused(lo, hi, own):
    mask = Mask(*(torch.tensor(x) for x in (lo, hi, own)))
    with pytest.raises(ValueError, match="mask: "):
        mask.plan


# ---- decode ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompts, n, past, heads", [
    ([5], 1, 1, (3, 3)), ([5, 1, 8], 1, 4, (4, 1)), ([3, 7], 3, 6, (4, 2)), ([4, 4], 2, 1, (4, 2))])
def test_decode_is_the_last_row_of_each_answer(prompts, n, past, heads):
    """Ragged prompts with n answers of equal length: a cached step equals the formula on the whole pack.

    What lies beyond the filled part of the cache is noise on purpose: it must not be read.
    """
    mask = pack([(P, [past] * n) for P in prompts])
    H, G = heads
    q, k, v = (x.detach() for x in qkv(len(mask.own), heads))
    expected, room = attention_spec(q, k, v, mask), 3
    R, P = len(prompts), max(prompts)
    noise = lambda *shape: 100 * torch.randn(*shape, G, 8, dtype=torch.float64)
    cached, own = [noise(R, P) for _ in "kv"], [noise(R, n, past + room) for _ in "kv"]
    last, start = torch.empty(R, n, dtype=torch.long), 0
    for r, length in enumerate(prompts):
        for c, o, x in zip(cached, own, (k, v)):
            c[r, :length] = x[start:start + length]
            o[r, :, :past] = x[start + length:start + length + n * past].view(n, past, G, 8)
        last[r] = start + length + torch.arange(1, n + 1) * past - 1
        start += length + n * past
    cached, own = [x.transpose(1, 2) for x in cached], [x.permute(0, 3, 1, 2, 4) for x in own]     # heads first
    out = decode(q[last], tuple(cached), tuple(own), torch.tensor(prompts), past)
    torch.testing.assert_close(out, expected[last], atol=1e-6, rtol=1e-6)      # softmax runs in fp32


# ---- dispatch ----------------------------------------------------------------------------------------------------

def test_without_a_gpu_triton_is_not_needed():
    """A process in which importing triton fails: import and all three functions."""
    code = """import sys; sys.modules["triton"] = None
import torch, kernels
x, at = torch.ones(3, 1, 4), torch.zeros(3, dtype=torch.long)
kernels.attention(x, x, x, kernels.Mask(at, at, at).to("cpu"))
kernels.decode(x[None], (x[None, :1],) * 2, (x[None, :1, None],) * 2, at[:1] + 1, 1)
kernels.logps(x[:, 0], x[:, 0], at, at)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_tensors_on_a_gpu_go_to_triton_unless_heads_are_wide(monkeypatch):
    on_gpu = lambda *shape, dtype=torch.float16: SimpleNamespace(is_cuda=True, shape=shape, dtype=dtype, get_device=lambda: -1)
    for name, function in (("flash", "attention"), ("flash_decode", "decode"), ("fused_head", "logps")):
        fake = SimpleNamespace(**{function: lambda *args, said=name: said})
        monkeypatch.setitem(sys.modules, f"kernels.{name}", fake)
        monkeypatch.setattr(kernels, name, fake, raising=False)
    monkeypatch.setattr(kernels.plain, "attention", lambda *args: "plain")
    monkeypatch.setattr(kernels.plain, "decode", lambda *args: "plain")
    assert [kernels.attention(on_gpu(9, 2, D), 0, 0, 0) for D in (128, 129)] == ["flash", "plain"]
    assert [kernels.decode(on_gpu(1, 9, 2, D), 0, 0, 0, 0) for D in (128, 129)] == ["flash_decode", "plain"]
    assert kernels.logps(on_gpu(9, 4096), 0, 0, 0) == "fused_head"
    assert kernels.attention(on_gpu(9, 2, 64, dtype=torch.float64), 0, 0, 0) == "plain"


def test_a_mask_elsewhere_is_cut_here_and_only_when_asked(monkeypatch):
    """To a device without memory: anything read back from there would fail."""
    mask = pack(PACKS["mixed"])
    monkeypatch.setattr(attention_file, "make_plan", lambda mask, cut=attention_file.make_plan: made.append(mask) or cut(mask))
    made = []
    moved = mask.to("meta")
    assert moved.trees == mask.trees and moved.own.is_meta and not made
    calls, order = moved.plan
    assert made == [mask] and order.is_meta and all(call.queries.at.is_meta for call in calls) and len(calls) == len(mask.plan[0])


# ---- log-probs -----------------------------------------------------------------------------------------------------

def scored(T=11, D=6, V=29, N=17, dtype=torch.float64, seed=0, scale=1.0):
    """Hidden states, head, and N scored rows of which some repeat: the last prompt row predicts several tokens."""
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(T, D, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    rows = torch.randint(0, T, (N,), generator=g)
    rows[:4] = 3
    return hidden, weight, rows, torch.randint(0, V, (N,), generator=g)


@pytest.mark.parametrize("chunk_rows", [1, 5, 17])
def test_logps_equal_the_formula_whatever_the_chunk(monkeypatch, chunk_rows):
    monkeypatch.setattr(logprob_file, "CHUNK_ROWS", 1)
    monkeypatch.setattr(logprob_file, "CHUNK_BYTES", 4 * 29 * chunk_rows)
    hidden, weight, rows, targets = scored()
    oracle = with_grads(lambda h, w: logps_spec(h, w, rows, targets), [hidden, weight])
    assert worst(with_grads(lambda h, w: logps(h, w, rows, targets), [hidden, weight]), oracle) < 1e-12
    narrow = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    assert worst(with_grads(lambda h, w: logps(h, w, rows, targets), narrow), oracle) < 3e-6


def test_the_logits_in_memory_never_exceed_a_chunk(monkeypatch):
    """Forward and backward, seen through every operation: no tensor is as large as the [N, V] matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(logprob_file, "CHUNK_ROWS", 1)
    monkeypatch.setattr(logprob_file, "CHUNK_BYTES", 4 * 101 * 4)
    hidden, weight, rows, targets = scored(T=90, D=4, V=101, N=80, dtype=torch.float32)
    with Largest() as seen:
        logps(hidden, weight, rows, targets).sum().backward()
    assert seen.numel <= max(4 * 101, weight.numel(), hidden.numel())


def test_logps_is_the_negative_cross_entropy_of_a_row():
    hidden, weight, rows, targets = scored(dtype=torch.float32)
    nll = torch.nn.functional.cross_entropy(hidden[rows] @ weight.T, targets, reduction="none")
    torch.testing.assert_close(logps(hidden, weight, rows, targets), -nll)


def test_gradcheck_of_logps(monkeypatch):
    monkeypatch.setattr(logprob_file, "CHUNK_ROWS", 1)
    monkeypatch.setattr(logprob_file, "CHUNK_BYTES", 4 * 29 * 4)
    hidden, weight, rows, targets = scored()
    assert torch.autograd.gradcheck(lambda h, w: logps(h, w, rows, targets), (hidden, weight))


def test_bf16_gives_fp32_logps_and_errs_at_most_twice_as_much_as_plain_bf16():
    hidden, weight, rows, targets = scored(T=64, D=64, V=500, N=200, dtype=torch.bfloat16, scale=0.5)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    run = lambda function, tensors: with_grads(lambda h, w: function(h, w, rows, targets), tensors)
    oracle, plain, ours = run(logps_spec, wide), run(logps_spec, [hidden, weight]), run(logps, [hidden, weight])
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    for a, b, exact in zip(ours, plain, oracle):
        assert worst([a], [exact]) <= 2 * worst([b], [exact])
    # the sum over 200 tokens is nearer to the truth than a single bf16 log-prob is
    assert abs(ours[0].double().sum() - oracle[0].sum()) < 0.01 < (plain[0].double() - oracle[0]).abs().max()


def test_large_logits_neither_overflow_nor_lose_the_target():
    hidden, weight, rows, targets = scored(dtype=torch.float32, scale=200.0)
    out = logps(hidden, weight, rows, targets)
    exact = logps_spec(hidden.double(), weight.double(), rows, targets)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-3)
    assert torch.autograd.grad(out.sum(), hidden)[0].isfinite().all()


@pytest.mark.parametrize("at_once, train_hidden, train_weight", [
    (17, True, True), (17, True, False), (17, False, True), (5, True, False)])
def test_a_frozen_side_gets_no_gradient_and_no_work(monkeypatch, train_hidden, train_weight, at_once):
    hidden, weight, rows, targets = scored(dtype=torch.float32)
    monkeypatch.setattr(logprob_file, "CHUNK_ROWS", 1)
    monkeypatch.setattr(logprob_file, "CHUNK_BYTES", 4 * len(weight) * at_once)
    full = with_grads(lambda h, w: logps(h, w, rows, targets), [hidden, weight])[1:]
    hidden.requires_grad_(train_hidden)
    weight.requires_grad_(train_weight)
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    out = logps(hidden, weight, rows, targets)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).float()
    add = lambda total, a, b, **how: 2 * a[0] * a[1] * b[1]              # torch's counter knows addmm, not addmm_
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: add}) as work:
        got = torch.autograd.grad(out, wanted, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(got, [f for f, on in zip(full, (train_hidden, train_weight)) if on]))
    products = len(wanted) + (at_once < len(rows))                       # several chunks of logits are computed again, one is kept
    assert work.get_total_flops() == products * 2 * len(rows) * weight.numel()


def test_nothing_scored_is_no_error():
    hidden, weight, rows, targets = scored(dtype=torch.float32)
    out = logps(hidden, weight, rows[:0], targets[:0])
    assert out.shape == (0,)
    assert torch.equal(torch.autograd.grad(out.sum(), hidden)[0], torch.zeros_like(hidden))
