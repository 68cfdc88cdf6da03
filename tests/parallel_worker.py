"""What tests/test_parallel.py starts: its runs in one, two and three processes, forked from one that has only imported torch.

    python tests/parallel_worker.py cases.json log.txt          {number of processes: [case, ...]}; their words go to the log
"""
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from conftest import meet

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
    """One process's part: the runs one after the other."""
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


if __name__ == "__main__":
    cases, log = sys.argv[1:]
    sys.exit(not all(meet(int(world), partial(run, mine), log) for world, mine in json.loads(Path(cases).read_text()).items()))
