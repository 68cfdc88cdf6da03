"""What tests/test_parallel.py starts under torchrun: some runs, one after the other, in the same processes.

    torchrun --nproc_per_node 2 tests/parallel_worker.py cases.json
"""
import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

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


if __name__ == "__main__":
    for case in json.loads(Path(sys.argv[1]).read_text()):
        undo = stop_process_1_in_step_2() if case.get("stop") else lambda: None
        code, script = 0, SCRIPTS[case["script"]]
        try:
            script.run(script.Settings(**case["settings"]))
        except SystemExit as end:
            code = end.code
        undo()
        Path(case["settings"]["out"], f"exit-{parallel.rank()}").write_text(str(code))
    torch.distributed.destroy_process_group()
