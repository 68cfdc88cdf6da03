"""What tests/test_parallel.py starts: runs in one, two and three processes, each born as torchrun would, but torch is imported once.

    python tests/parallel_worker.py cases.json          [[number of processes, [case, ...]], ...]
"""
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch._dynamo                       # the first model would have every process import it

torch.set_num_threads(1)

import dpo
import parallel
import sft
import steerlm

SCRIPTS = {"dpo": dpo, "sft": sft, "steerlm": steerlm}


def stop_process_1_in_step_2():
    """SIGTERM reaches one process only, in the midst of a step."""
    real, calls = parallel.sum_gradients, [0]

    def stop(*a):
        calls[0] += 1
        if calls[0] == 2 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*a)
    parallel.sum_gradients = stop
    return lambda: setattr(parallel, "sum_gradients", real)


def run(cases: list[dict]) -> None:
    """One process's part: the runs one after the other, each one's exit code beside its result."""
    for case in cases:
        undo = stop_process_1_in_step_2() if case.get("stop") else lambda: None
        code, script = 0, SCRIPTS[case["script"]]
        try:
            script.run(script.Settings(**case["settings"]))
        except SystemExit as end:
            code = end.code
        undo()
        Path(case["settings"]["out"], f"exit-{parallel.rank()}").write_text(str(code))
    if parallel.world() > 1:
        torch.distributed.destroy_process_group()


def meet(world: int, cases: list[dict]) -> bool:
    """Fork so many processes, with torchrun's variables, and wait -> did all end well? One that fails takes the others with it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    left = set()
    for rank in range(world):
        if pid := os.fork():
            left.add(pid)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            run(cases)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    well = True
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and well:
            well = False
            for other in left:
                os.kill(other, signal.SIGKILL)
    return well


if __name__ == "__main__":
    sys.exit(not all(meet(world, cases) for world, cases in json.loads(Path(sys.argv[1]).read_text())))
