"""Every production kernel, compiled for GPUs that are not there, and what the binaries say about themselves.

    SLOW=1 python -m pytest tests/test_aot.py -q       sm_80, sm_90 (fp32 too), sm_100, gfx942: minutes, seconds when compiled before
    python tests/test_aot.py --write                   all of them, into results/aot.jsonl

Triton's wheel brings the assemblers, so a CPU can see what a GPU would run. The functions that callers use are run on tensors
without memory, and each launch is compiled instead: types, alignments, blocks and warps are production's, nothing is said twice.
Asked of each binary: tensor-core instructions where there is a product, loads ahead of their use, no register put aside to
memory in a loop that multiplies and 256 bytes at most elsewhere, no atomics, shared memory that fits the chip. What only running
can tell is not asked: speed, races. A process of its own, for the interpreter's choice is made when a kernel is defined.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "aot.jsonl"
CHIPS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}        # KiB per program; sm_80's table serves 89 and 120 too
SPILL = 256                                                              # bytes stored and loaded, outside of loops that multiply
HEADS = {64: [(16, 16)], 128: [(32, 32), (32, 8)]}                       # head dimension -> (heads, key heads)
PRODUCTS = {"bfloat16": r"\b(?:HMMA|HGMMA|UTC\w*MMA|v_mfma\w*)\b", "float32": r"\bFFMA\b"}      # fp32 takes no tensor cores
ATOMIC = r"\b(?:REDG?|ATOMG?|(?:global|flat|buffer)_atomic\w*)\b"       # on global memory; ATOMS allots tensor memory
LOCAL = r"\b(?:LDL|STL)\b[.\w]*|scratch_(?:load|store)_dword\w*"
AHEAD = r"\b(?:LDGSTS|UTMALDG)\b"


# ---- compiling what production launches ------------------------------------------------------------------------

def compiled(chip: str, kind: str) -> list[dict]:
    """A row for each launch of attention, decode and logps, in numbers of one kind."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    from kernels import flash, flash_decode, fused_head
    from kernels.attention import Mask
    driver.set_active(SimpleNamespace(get_current_device=lambda: chip, get_current_stream=lambda device: 0,
                                      get_current_target=lambda: GPUTarget(*CHIPS[chip])))
    flash.architecture = lambda device: chip
    rows, real = [], jit.JITFunction.run

    def run(self, *args, grid, warmup, **how):
        built = real(self, *args, grid=grid, warmup=True, **how)         # compiled, not launched
        named = dict(zip(self.arg_names, args))
        block = [named[x] for x in ("BM", "BN", "BV", "BK") if x in named]
        rows.append({"kernel": self.__name__, "chip": chip, "dtype": kind, "D": named["D"], "group": named["H"] // named["G"] if "G" in named else 1,
                     "block": block, "warps": built.metadata.num_warps, "stages": built.metadata.num_stages,
                     **listed(built, chip, kind), "triton": triton.__version__})

    def empty(*shape):
        return torch.empty(*shape, dtype=getattr(torch, kind), device="meta", requires_grad=True)

    jit.JITFunction.run = run
    own = torch.zeros(900, dtype=torch.long)
    mask, at = Mask(own, own, own).to("meta"), own.to("meta")
    for D, heads in HEADS.items():
        for H, G in heads:
            flash.attention(empty(900, H, D), empty(900, G, D), empty(900, G, D), mask).sum().backward()
        with torch.no_grad():
            flash_decode.decode(empty(3, 4, H, D), (empty(3, G, 700, D),) * 2, (empty(3, G, 4, 64, D),) * 2, at[:3], 33)
    fused_head.logps(empty(900, 4096), empty(32064, 4096), at, at).sum().backward()
    jit.JITFunction.run = real
    return rows


def listed(built, chip: str, kind: str) -> dict:
    """Registers, shared memory and the counts behind the checks, from the binary's own listing."""
    if chip.startswith("sm_"):
        from triton import knobs
        with tempfile.TemporaryDirectory() as folder:
            (binary := Path(folder, "kernel.cubin")).write_bytes(built.asm["cubin"])
            said = lambda tool, flag: subprocess.run([tool.path, flag, binary], capture_output=True, text=True, check=True).stdout
            usage, listing = said(knobs.nvidia.cuobjdump, "--dump-resource-usage"), said(knobs.nvidia.nvdisasm, "-c")
        registers = re.search(r"REG:(\d+)", usage)
    else:
        listing = built.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", listing)
    hot = [loop for loop in loops(listing) if re.search(PRODUCTS[kind], loop)]
    count = lambda pattern: len(re.findall(pattern, listing))
    return {"regs": int(registers.group(1)), "spill_bytes": spilled(listing), "smem": built.metadata.shared, "loops": len(hot),
            "loop_spill_bytes": sum(map(spilled, hot)), "products": count(PRODUCTS[kind]), "ahead": count(AHEAD),
            "atomics": count(ATOMIC)}


def loops(listing: str) -> list[str]:
    """The innermost loops: from a label to a branch back to it, without such a pair inside."""
    lines = listing.splitlines()
    labels = {m.group(1): k for k, line in enumerate(lines) if (m := re.match(r"\s*(\.L\w+):", line))}
    spans = [(labels[to], k) for k, line in enumerate(lines) for to in re.findall(r"\b(?:BRA|s_c?branch).*?(\.L\w+)", line)
             if labels.get(to, k) < k]
    return ["\n".join(lines[a:b]) for a, b in spans if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in spans)]


def spilled(listing: str) -> int:
    """Bytes per thread that local stores and loads move; an instruction names its width, 4 bytes if it does not."""
    widths = {"128": 16, "x4": 16, "x3": 12, "64": 8, "x2": 8}
    return sum(next((n for mark, n in widths.items() if mark in op), 4) for op in re.findall(LOCAL, listing))


# ---- the checks ------------------------------------------------------------------------------------------------

def wrong(row: dict) -> list[str]:
    """What a binary must not be."""
    half, product = row["dtype"] == "bfloat16", row["kernel"] != "row_sums"
    faults = {"atomics": row["atomics"], "shared memory": row["smem"] > SHARED[row["chip"]] * 1024,
              "spills": row["spill_bytes"] > SPILL, "spills in a loop": row["loop_spill_bytes"],
              "no tensor cores": half and product and not row["products"], "no loop found": product and not row["loops"],
              "no load ahead": half and product and row["chip"] != "gfx942" and not row["ahead"]}
    return [name for name, fault in faults.items() if fault]


def in_a_process(*jobs: str) -> list[dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, *jobs], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


ALL = [f"{chip}:bfloat16" for chip in CHIPS] + ["sm_90:float32"]


@pytest.fixture(scope="module")
def rows_of():
    """job -> its rows; two are compiled at once."""
    pytest.importorskip("triton")
    with ThreadPoolExecutor(2) as pool:
        futures = {job: pool.submit(in_a_process, job) for job in ALL}
        yield lambda job: futures[job].result()


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="minutes; SLOW=1 runs it")
@pytest.mark.parametrize("job", ALL)
def test_what_production_launches_compiles_well_and_as_recorded(job, rows_of):
    rows = rows_of(job)
    assert {row["kernel"] for row in rows} == {"forward", "row_sums", "keys_backward", "queries_backward", "partial", "partial_sums", "gradients"}
    for row in rows:
        print(row)
        assert not wrong(row), f"{row}: {', '.join(wrong(row))}"
    recorded = [row for row in map(json.loads, RESULTS.read_text().splitlines()) if f"{row['chip']}:{row['dtype']}" == job]
    assert rows == [{k: v for k, v in row.items() if k != "date"} for row in recorded], "python tests/test_aot.py --write"


def test_a_spill_is_found_and_known_to_be_in_a_loop():
    nvidia = [".L_x_1:", "STL.64 [R1], R2", ".L_x_2:", "HMMA R4, R8 ;", "@P0 BRA `(.L_x_2) ;", "LDL R3, [R1]", "BRA `(.L_x_1) ;"]
    listing = "\n".join([*nvidia, ".LBB0_3:", "v_mfma_f32_32x32x8_bf16", "scratch_load_dwordx4 v[0:3]", "s_cbranch_scc1 .LBB0_3"])
    inner, amd = loops(listing)
    assert "HMMA" in inner and spilled(inner) == 0 and spilled(amd) == 16 and spilled(listing) == 8 + 4 + 16


def main(jobs: list[str]):
    sys.path.insert(0, str(ROOT))
    write = jobs == ["--write"]
    lines = [json.dumps(row | ({"date": time.strftime("%Y-%m-%d")} if write else {})) + "\n"
             for job in (ALL if write else jobs) for row in compiled(*job.split(":"))]
    RESULTS.write_text("".join(lines)) if write else print("".join(lines), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
