"""Every production kernel, compiled for GPUs that are not there, and what the binaries say about themselves.

    python -m pytest tests/test_aot.py -q              sm_90
    SLOW=1 python -m pytest tests/test_aot.py -q       sm_80, sm_90, sm_100, gfx942
    python tests/test_aot.py --write                   all of them, into results/aot.jsonl

The wheel of Triton brings the assemblers, so a CPU can see what a GPU would run. The functions that callers use are run on tensors
without memory and each launch is compiled instead: shapes, alignments, blocks and warps are those of production, nothing is said
twice. Asked of each binary: tensor-core instructions where there is a product, loads ahead of their use, no register put
aside to memory in a loop that multiplies (and 64 bytes at most elsewhere), no atomics, shared memory that fits the chip. What only
running can tell is not asked: speed, races. A process of its own, for the interpreter's choice is made when a kernel is defined.
"""
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
CHIPS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}        # KiB per program; sm_80's table serves 86, 89 and 120 too
SPILL = 64                                                               # bytes, outside of the loops that multiply
KERNELS = {"forward", "row_sums", "keys_backward", "queries_backward", "partial_sums", "gradients", "partial"}
MMA = r"\b(HMMA|HGMMA|UTC\w*MMA|v_mfma\w*)\b"
ATOMIC = r"\b(REDG?|ATOMG?|(?:global|flat|buffer)_atomic\w*)\b"            # on global memory; ATOMS allots tensor memory
LOCAL = r"\b(?:(?:LDL|STL)(?:\.LU)?(?:\.(\d+))?\b|scratch_(?:load|store)_dword(?:x(\d))?)"
AHEAD = r"\b(LDGSTS|UTMALDG)\b"


# ---- compiling what production launches ------------------------------------------------------------------------

def compiled(name: str, dtype, shapes) -> list[dict]:
    """What each launch of attention, decode and logps would run on a chip, for heads of `shapes` [(D, H, G), ...]."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    from kernels import flash, flash_decode, fused_head
    from kernels.attention import Mask
    driver.set_active(SimpleNamespace(get_current_device=lambda: name, get_current_stream=lambda device: 0,
                                      get_current_target=lambda: GPUTarget(*CHIPS[name])))
    flash.architecture = lambda device: name
    rows, real = [], jit.JITFunction.run

    def run(self, *args, grid, warmup, **how):
        built = real(self, *args, grid=grid, warmup=True, **how)
        names = dict(zip(self.arg_names, args))
        block = [names[x] for x in ("BM", "BN", "BV", "BK") if x in names] + [how.get("num_warps", 4), how.get("num_stages")]
        rows.append({"kernel": self.__name__, "chip": name, "dtype": str(dtype).removeprefix("torch."), "D": names.get("D"),
                     "group": names.get("GROUP"), "block": block, **look(built, name)})

    jit.JITFunction.run = run
    try:
        own = torch.zeros(900, dtype=torch.long)
        mask = Mask(own, own, own).to("meta")
        empty = lambda *shape: torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)
        for D, H, G in shapes:
            flash.attention(empty(900, H, D), empty(900, G, D), empty(900, G, D), mask).sum().backward()
            with torch.no_grad():
                flash_decode.decode(empty(3, 4, H, D), (empty(3, G, 700, D),) * 2, (empty(3, G, 4, 64, D),) * 2,
                                    torch.empty(3, dtype=torch.long, device="meta"), 33)
        at = torch.empty(300, dtype=torch.long, device="meta")
        fused_head.logps(empty(900, 4096), empty(32064, 4096), at, at).sum().backward()
    finally:
        jit.JITFunction.run = real
    return rows


def look(built, chip: str) -> dict:
    """Registers, spilled bytes, shared memory and the counts behind the checks, from the binary's own listing."""
    if chip.startswith("sm_"):
        from triton import knobs
        with tempfile.TemporaryDirectory() as folder:
            (binary := Path(folder, "k.cubin")).write_bytes(built.asm["cubin"])
            said = [subprocess.run([tool.path, flag, binary], capture_output=True, text=True, check=True).stdout
                    for tool, flag in ((knobs.nvidia.cuobjdump, "--dump-resource-usage"), (knobs.nvidia.nvdisasm, "-c"))]
        registers, listing = re.search(r"REG:(\d+)", said[0]), said[1]
    else:
        listing = built.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", listing)
    lines = listing.splitlines()
    hot = [loop for loop in loops(lines) if any(re.search(MMA, line) for line in loop)]
    size = lambda lines: sum(4 * int(a or b or 32) // (32 if a or not b else 1) for line in lines for a, b in re.findall(LOCAL, line))
    return {"regs": int(registers.group(1)), "spill_bytes": size(lines), "smem": built.metadata.shared,
            "mma": len(re.findall(MMA, listing)), "atomics": len(re.findall(ATOMIC, listing)),
            "hot_spill": sum(map(size, hot)), "hot_loops": len(hot), "ahead": len(re.findall(AHEAD, listing))}


def loops(lines: list[str]) -> list[list[str]]:
    """The innermost loops of a listing: from a label to a branch back to it, with no such pair inside."""
    labels = {m.group(1): k for k, line in enumerate(lines) if (m := re.match(r"\s*(\.L\w+):", line))}
    spans = [(labels[to], k) for k, line in enumerate(lines) for to in re.findall(r"(?:BRA\S*|s_c?branch\w*).*?(\.L\w+)", line)
             if labels.get(to, k) < k]
    return [lines[a:b] for a, b in spans if not any((a <= c and d <= b) and (c, d) != (a, b) for c, d in spans)]
