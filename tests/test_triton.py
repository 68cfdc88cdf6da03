"""The Triton kernels in Triton's interpreter, against fp64. A process of its own: the choice is made when a kernel is defined.

    python -m pytest tests/test_triton.py -q
    TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 python tests/test_triton.py

bf16 is left out here: the interpreter multiplies its bits as integers.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREES = {                                                                # (prompt, answers) or an image's length
    "several answers, a lone prompt, an image": [(70, [30, 5, 80]), (3, [1]), 50, (9, []), (130, [40, 50])],
    "answers of one token": [(1, [1, 1, 1]), (64, [1, 64, 1])],
    "a block that holds four answers": [(20, [10, 7, 8, 9, 70])],
}


def test_the_kernels_agree_with_fp64_in_the_interpreter():
    import pytest
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def main():
    sys.path.insert(0, str(ROOT))
    import torch

    from kernels import flash, fused_head
    from kernels.attention import Mask, attention_spec
    from kernels.logprob import logps_spec

    def mask_of(parts):
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
        return Mask(*map(torch.tensor, (lo, hi, own)))

    def compare(what, spec, ours, inputs, dtype, allowed):
        inputs = [x.to(dtype).double() for x in inputs]
        want = [x.clone().requires_grad_() for x in inputs]
        out = spec(*want)
        grad = torch.randn(out.shape, dtype=torch.float64)
        out.backward(grad)
        have = [x.to(dtype).requires_grad_() for x in inputs]
        got = ours(*have)
        got.backward(grad.to(got.dtype))
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in ((got, out), *((a.grad, b.grad) for a, b in zip(have, want)))]
        print(f"{what:60} {str(dtype):15}", *(f"{e:.1e}" for e in errors))
        assert max(errors) < allowed, what
        return got

    torch.manual_seed(0)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    for (name, parts), (H, G, D) in zip(TREES.items(), ((2, 1, 64), (4, 2, 128), (1, 1, 96))):
        mask = mask_of(parts)
        T = len(mask.own)
        inputs = random(T, H, D), random(T, G, D), random(T, G, D)
        for dtype, allowed in ((torch.float32, 3e-6), (torch.float16, 3e-3), (torch.float64, 1e-12)):
            compare(name, lambda *x: attention_spec(*x, mask), lambda *x: flash.attention(*x, mask), inputs, dtype, allowed)
    alone, packed = mask_of([(70, [30, 5])]), mask_of([(33, [9, 8]), (70, [30, 5])])
    q = random(155, 1, 64).float()
    assert torch.equal(flash.attention(q, q, q, packed)[50:], flash.attention(*[q[50:]] * 3, alone)), "alone or packed: the same bits"

    rows, targets = torch.randint(0, 50, (140,)), torch.randint(0, 300, (140,))
    for dtype, allowed in ((torch.float32, 3e-6), (torch.float16, 3e-3), (torch.float64, 1e-12)):
        compare("log-probs, rows shared by answers", lambda h, w: logps_spec(h, w, rows, targets),
                lambda h, w: fused_head.logps(h, w, rows, targets), (random(50, 48), random(300, 48) / 4), dtype, allowed)


if __name__ == "__main__":
    main()
