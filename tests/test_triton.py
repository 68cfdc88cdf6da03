"""The Triton kernels against fp64 and against plain torch: in Triton's interpreter, and on a GPU where there is one.

    python -m pytest tests/test_triton.py -q                               with SLOW=1 every pack in every precision
    TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python tests/test_triton.py
    python tests/test_triton.py                                            on a GPU

A process of its own: the choice is made when a kernel is defined. Most checks compare errors: the oracle is the formula in fp64,
and in any precision a kernel may err at most twice as much as plain torch does.
"""
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALVES = torch.float16, torch.bfloat16
WHOLE = not INTERPRETED or bool(os.environ.get("SLOW"))                  # the interpreter is slow: its quick run takes turns
FLOOR = 1e-6                                                             # of a typical number's size
PACKS = {                                                                # (prompt, answers) or an image's length
    "ragged": [(70, [30, 5, 80]), (3, [1]), (9, []), (130, [40, 50])],
    "answers of one token": [(1, [1, 1, 1]), (64, [1, 64, 1]), (1, [])],
    "answers that are only their end": [(65, [0, 0]), (20, [0, 9]), (63, [5, 0, 70, 0])],
    "a block that holds several answers": [(20, [10, 7, 8, 9, 70]), (70, [80, 3, 20])],
    "images": [50, 1, 64, 130, 50],
    "text and images": [(64, [64, 33]), 65, (129, [2, 2]), 17, (2, [70])],
}


def run(interpret: str):
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": interpret, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def test_the_kernels_are_right_in_the_interpreter():
    import pytest
    pytest.importorskip("triton")
    run("1")


def test_the_kernels_are_right_on_a_gpu():
    import pytest
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    run("0")


# ---- the interpreter's bf16 ----------------------------------------------------------------------------------------

def teach_bf16():
    """The interpreter keeps bf16 as uint16, multiplies the bits as integers and rounds towards zero; both are put right."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = Builder.cast_impl, Builder.create_dot

    def rounded(self, x, to):
        if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:                        # to nearest, ties to even
            bits = np.ascontiguousarray(x.data).view(np.uint32).astype(np.uint64)
            return Handle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16)
        return cast(self, x, to)

    def product(self, a, b, *rest):
        return dot(self, *(cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    Builder.cast_impl, Builder.create_dot = rounded, product
    Builder.create_fp_to_fp = lambda self, x, to, mode: rounded(self, x, to)


def patch_once():
    """The interpreter replaces Triton's namespace at every call of a helper: a third of its time. Once per launch will do."""
    import triton.language as tl
    from triton.runtime import interpreter
    patch = interpreter._patch_lang

    def whole(kernel):
        scope = patch(kernel)
        scope._changes += patch(tl.standard.zeros.fn)._changes
        return scope

    interpreter._patch_lang = whole
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **how: self.rewrite()(*args, **how)


# ---- packs ---------------------------------------------------------------------------------------------------------

def mask_of(parts):
    from kernels.attention import Mask
    lo, hi, own = [], [], []
    for part in parts:
        s = len(own)
        prompt, answers = (part, []) if isinstance(part, int) else part
        image = isinstance(part, int)
        lo += [s if image else 0] * prompt
        hi += [s + prompt if image else 0] * prompt
        own += [s] * prompt
        for length in answers:
            own += [len(own)] * length
            lo += [s] * length
            hi += [s + prompt] * length
    return Mask(*map(torch.tensor, (lo, hi, own))).to(DEVICE)


def fuzz(seed):
    r = random.Random(seed)
    answers = lambda: [r.choice([0, 1, r.randint(2, 70)]) for _ in range(r.randint(0, 4))]
    return [r.choice([r.randint(1, 140), (r.randint(1, 140), answers())]) for _ in range(r.randint(1, 3))]


def size(part):
    return part if isinstance(part, int) else part[0] + sum(part[1])


def turn(k, *choices):
    """All of them, or in the interpreter's quick run the k-th, round and round."""
    return choices if WHOLE else [choices[k % len(choices)]]


def draw(*shape, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64).to(DEVICE)


def qkv(T, H, G, D):
    return draw(T, H, D), draw(T, G, D), draw(T, G, D)


# ---- comparing errors ----------------------------------------------------------------------------------------------

def with_grads(function, inputs, cotangent, dtype):
    """[output, gradients] of a function run in one precision."""
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(cotangent.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def within(what, dtype, ours, plain, exact):
    """Each of our results errs at most twice as much as plain torch's, up to a floor."""
    error = lambda a, b: ((a.double() - b).norm() / (b.norm() + 1e-2 * b.numel() ** 0.5)).item()
    errors = [(error(a, c), error(b, c)) for a, b, c in zip(ours, plain, exact, strict=True)]
    print(f"{what:50} {str(dtype):15}", *(f"{a:.1e}/{b:.1e}" for a, b in errors), flush=True)
    assert all(a.isfinite().all() for a in ours) and all(a.dtype == b.dtype for a, b in zip(ours, plain)), what
    assert all(a <= 2 * b + FLOOR for a, b in errors), what


def compare(what, ours, plain, spec, inputs, dtypes):
    for dtype in dtypes:
        inputs = [x.to(dtype).double() for x in inputs]
        exact = with_grads(spec, inputs, cotangent := torch.randn_like(spec(*inputs)), torch.float64)
        within(what, dtype, *(with_grads(f, inputs, cotangent, dtype) for f in (ours, plain)), exact)


def same_bits(what, a, b):
    print(what, flush=True)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), what


# ---- attention -----------------------------------------------------------------------------------------------------

def compare_attention(what, parts, H, G, D, dtypes):
    from kernels import flash
    from kernels.attention import attention, attention_spec
    mask = mask_of(parts)
    ours, plain, spec = (lambda *x, f=f: f(*x, mask) for f in (flash.attention, attention, attention_spec))
    compare(f"{what}, {H}/{G} heads of {D}", ours, plain, spec, qkv(len(mask.own), H, G, D), dtypes)


def check_attention():
    heads = [(1, 1, 64), (2, 1, 128), (2, 2, 32), (1, 1, 96), (3, 1, 64), (2, 1, 40)]
    for k, ((what, parts), shape) in enumerate(zip(PACKS.items(), heads, strict=True)):
        compare_attention(what, parts, *shape, turn(k, torch.float32, *HALVES))
    for seed in range(12 if WHOLE else 4):
        compare_attention(f"fuzz {seed}", fuzz(seed), 1, 1, (64, 128)[seed % 2], [(torch.float32, *HALVES)[seed % 3]])


def check_every_table():
    """The interpreter runs any chip's blocks; a GPU has its own."""
    from kernels import flash
    if INTERPRETED:
        ours = flash.chip
        for k, chip in enumerate(("sm_80", "sm_100", "gfx942", "wide")):
            flash.chip = lambda x: chip
            for D in turn(k // 2, 64, 128):
                compare_attention(f"blocks of {chip}", [(70, [30, 70]), 70], 1, 1, D, [torch.float16])
        flash.chip = ours


def check_large_scores():
    """Scores in the hundreds: exponentials stay in range, a row's largest score may come in any block."""
    from kernels import flash
    from kernels.attention import attention, attention_spec
    mask = mask_of(PACKS["a block that holds several answers"])
    q, k, v = qkv(len(mask.own), 1, 1, 64)
    ours, plain, spec = (lambda *x, f=f: f(*x, mask) for f in (flash.attention, attention, attention_spec))
    compare("scores in the hundreds", ours, plain, spec, (40 * q, 2 * k, v), turn(0, *HALVES))


def check_bits():
    """The same bits twice, alone or among others, and in whatever order trees are packed; gradients too."""
    from kernels import flash
    parts = [(70, [30, 5]), (33, [9, 8, 60]), 40]
    data = [[*qkv(size(part), 2, 1, 64), draw(size(part), 2, 64)] for part in parts]

    def results(order, dtype):
        """Output and gradients of each part, packed in this order."""
        x = [torch.cat([data[k][i] for k in order]) for i in range(4)]
        out = with_grads(lambda *qkv: flash.attention(*qkv, mask_of([parts[k] for k in order])), x[:3], x[3], dtype)
        cut = [torch.split(y, [size(parts[k]) for k in order]) for y in out]
        return {k: [y[i] for y in cut] for i, k in enumerate(order)}

    for dtype in turn(1, torch.float32, torch.bfloat16):
        first = results([0, 1, 2], dtype)
        for what, order in (("twice", [0, 1, 2]), ("permuted", [2, 1, 0]), ("alone", [1])):
            for k, found in results(order, dtype).items():
                same_bits(f"the same bits {what}: part {k}, {dtype}", found, first[k])


# ---- log-probs -----------------------------------------------------------------------------------------------------

def scored(T=50, D=80, V=300, N=140):
    rows, targets = torch.randint(0, T, (N,)), torch.randint(0, V, (N,))
    rows[:20] = 7                                                        # a prompt's last row, behind which 20 answers begin
    targets[0], targets[1] = V - 1, 0
    return draw(T, D), draw(V, D, scale=0.25), rows.to(DEVICE), targets.to(DEVICE)


def check_logps():
    from kernels import fused_head
    from kernels.logprob import logps, logps_spec
    for T, D, V, N in ((50, 80, 300, 140), (150, 64, 1000, 130), (30, 64, 17, 1)):
        h, w, rows, targets = scored(T, D, V, max(N, 20))
        rows, targets = rows[-N:], targets[-N:]
        ours, plain, spec = (lambda h, w, f=f: f(h, w, rows, targets) for f in (fused_head.logps, logps, logps_spec))
        dtypes = (torch.float32, *HALVES) if N > 100 else [torch.float32]     # of few roundings nothing is typical
        compare(f"log-probs, {N} of {T} rows, {V} words", ours, plain, spec, (h, w), dtypes)
    words, fused_head.WORDS = fused_head.WORDS, 112                       # 300 words: two whole pieces and a part
    h, w, rows, targets = scored()
    ours, plain, spec = (lambda h, w, f=f: f(h, w, rows, targets) for f in (fused_head.logps, logps, logps_spec))
    compare("log-probs in pieces", ours, plain, spec, (h, w), [torch.float32])
    large = [f(100 * h.to(t), w.to(t)) for f, t in ((ours, torch.float32), (plain, torch.float32), (spec, torch.float64))]
    within("large logits", torch.float32, *([x] for x in large))
    fused_head.WORDS = words
    g = draw(len(rows))
    both = [with_grads(ours, (h, w), g, torch.bfloat16) for _ in range(2)]
    same_bits("log-probs twice, 20 answers behind one row", *both)
    empty = with_grads(lambda h, w: fused_head.logps(h, w, rows[:0], targets[:0]), (h, w), g[:0], torch.float32)
    assert empty[0].shape == (0,) and not empty[1].any() and not empty[2].any(), "nothing scored"


def check_frozen():
    """What needs no gradient gets none and costs no product; the other's stays what it was."""
    from kernels import fused_head
    h, w, rows, targets = scored()
    g = draw(len(rows)).float()
    full = with_grads(lambda h, w: fused_head.logps(h, w, rows, targets), (h, w), g, torch.float32)
    for k in (0, 1):
        x = [h.float(), w.float()]
        x[k].requires_grad_()
        out = fused_head.logps(*x, rows, targets)
        with FlopCounterMode(display=False) as work:
            out.backward(g)
        assert x[1 - k].grad is None and torch.equal(x[k].grad, full[1 + k]), "frozen"
        assert work.get_total_flops() == 2 * len(rows) * w.numel(), "one product"
    print("frozen head, frozen body")


# ---- decoding ------------------------------------------------------------------------------------------------------

def decode_spec(q, prompt, own, prompt_len, own_len):
    R, n, H, D = q.shape
    out = torch.empty_like(q)
    for r, i, h in ((r, i, h) for r in range(R) for i in range(n) for h in range(H)):
        g = h // (H // prompt[0].shape[1])
        k, v = (torch.cat([p[r, g, :prompt_len[r]], o[r, g, i, :own_len]]) for p, o in zip(prompt, own))
        out[r, i, h] = (k @ q[r, i, h] * D ** -0.5).softmax(0) @ v
    return out


def check_decode():
    from kernels import flash_decode
    from kernels.attention import decode
    shapes = (([5], 1, 2, 2, 32, 1), ([256, 1, 257, 30], 4, 2, 1, 64, 7), ([33, 70], 1, 4, 2, 96, 64), ([64, 300], 4, 1, 1, 128, 257),
              ([20, 9], 4, 32, 1, 16, 65))
    for k, (lengths, n, H, G, D, own_len) in enumerate(shapes):
        R, P, A = len(lengths), max(lengths), own_len + 3
        q, prompt_len = draw(R, n, H, D), torch.tensor(lengths, device=DEVICE)
        prompt, own = [draw(R, P, G, D).transpose(1, 2) for _ in "kv"], [draw(R, G, n, A, D) for _ in "kv"]
        for x, y in zip(prompt, own):                                    # what is not filled must not be read
            x[torch.arange(P, device=DEVICE)[None, None, :].expand(R, G, P) >= prompt_len[:, None, None]] = 1e4
            y[:, :, :, own_len:] = 1e4
        for dtype in turn(k, torch.float32, *HALVES):
            have = q.to(dtype), [x.to(dtype) for x in prompt], [x.to(dtype) for x in own]
            wide = have[0].double(), *([x.double() for x in y] for y in have[1:])
            ours, plain = (f(*have, prompt_len, own_len) for f in (flash_decode.decode, decode))
            exact = decode_spec(*wide, lengths, own_len)
            within(f"decode {lengths} x {n}, own {own_len}, {H}/{G} heads of {D}", dtype, [ours], [plain], [exact])


def main():
    torch.manual_seed(0)
    if INTERPRETED:
        teach_bf16()
        patch_once()
        from kernels import flash, flash_decode, fused_head
        for module in (flash, flash_decode, fused_head):
            module.chip = lambda x: "sm_90"                              # in fp32 too: production's blocks
    for check in (check_attention, check_every_table, check_large_scores, check_bits, check_logps,
                  check_frozen, check_decode):
        check()


if __name__ == "__main__":
    main()
