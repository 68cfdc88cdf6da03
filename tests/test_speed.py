"""The contestants of speed.py meet on equal terms, and every run is kept. Speed itself is not tested.

    python -m pytest tests/test_speed.py -q          with SLOW=1 and TRL installed a step against it, too
"""
import ast
import json
import os
import subprocess
import sys

import pytest
import torch

import speed
from common import BadInput, read_jsonl
from conftest import ROOT
from model import Config, TextConfig
from vision import VisionConfig


@pytest.fixture
def tiny(monkeypatch):
    """A size that takes no time."""
    sizes = TextConfig(8000, 64, 128, 2, 2, 2, 32), VisionConfig(64, 256, 2, 2, 56, 14)
    monkeypatch.setitem(speed.SIZES, "tiny", Config(*sizes, speed.IMAGE))


# ---- equal terms ---------------------------------------------------------------------------------

def test_an_opponent_imports_nothing_of_ours():
    """common tells OpenMP how to wait: that is ours, and must not reach a process that is not."""
    ours = {file.stem for file in ROOT.glob("*.py")} | {"kernels", "judge", "toy", "benchmarks"}
    for node in ast.walk(ast.parse((ROOT / "opponents.py").read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not ours & {name.split(".")[0] for name in names}


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="asks Linux how many threads there are")
def test_their_environment_is_the_users_and_preparing_a_pack_starts_no_threads(tmp_path):
    """train.packs prepares them in a thread of its own. A second team there would be more threads than cores, and
    OpenMP would let nobody wait awake any more: a step then sleeps thousands of times (LOG.md, 2026-11-26)."""
    speed.write_pairs(tmp_path, 1)
    code = f"""import os, torch
from concurrent.futures import ThreadPoolExecutor
from speed import ENVIRONMENT, SIZES
from data import Pixels, Tree
print("OMP_WAIT_POLICY" in os.environ, "OMP_WAIT_POLICY" in ENVIRONMENT)
torch.set_num_threads(2)
torch.ones(1 << 20).sum()
tree = Tree("", [4] + [5] * 20, [[5] * 9, [5] * 9], [{str(tmp_path / "0.jpg")!r}], image=4, patches=576)
with ThreadPoolExecutor(1) as pool:
    pool.submit(int).result()
    before = len(os.listdir("/proc/self/task"))
    pool.submit(Pixels(SIZES["small"]).pack, [tree]).result()
    print(len(os.listdir("/proc/self/task")) - before)"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_WAIT", "GOMP"))}
    done = subprocess.run([sys.executable, "-c", code], env=clean, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "0"], done.stdout + done.stderr


FAKE = """import json, os, sys, types
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=bool))     # loads at once
sys.path.insert(0, os.getcwd())
from opponents import open_gate
gate, job = open_gate(), json.loads(sys.argv[1])
print("a library's chatter is no word of ours")
for step in range(9):
    if step == job["dies"]:
        sys.exit(1)
    pids = [pid for pid in open(job["pids"]).read().split() if int(pid) != os.getpid()]
    states = [open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] for pid in pids]
    gate(others=states, environment=os.environ.get("WHOSE"))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The job of a contestant that says what state the others are in, and whose environment it has."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "pids").write_text("")
    monkeypatch.setattr(speed, "ENVIRONMENT", os.environ | {"WHOSE": "the user's"})
    monkeypatch.setattr(speed, "THEIRS", [str(tmp_path / "fake.py")])
    return {"pids": str(tmp_path / "pids"), "dies": -1}


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="asks Linux who is stopped")
def test_who_is_not_at_it_is_stopped(fake, tmp_path, monkeypatch):
    made = []
    real = speed.start

    def start(name, job):
        made.append(real(name, job))
        (tmp_path / "pids").write_text(" ".join(str(process.pid) for process in made))
        return made[-1]

    monkeypatch.setattr(speed, "start", start)
    rows = speed.in_turn({"a": fake, "b": fake, "c": fake}, 3)
    assert [row["name"] for row in rows] == ["a", "b", "c"] and all(len(row["all_ms"]) == 3 for row in rows)
    assert [row["others"] for row in rows] == 3 * [["T", "T"]]
    assert [row["environment"] for row in rows] == 3 * ["the user's"]
    assert all(process.poll() is not None for process in made), "their memory is free"


@pytest.mark.parametrize("step", [0, 1])
def test_a_contestant_that_dies_is_named_and_not_waited_for(fake, step):
    with pytest.raises(BadInput, match="second ended before its step did"):
        speed.in_turn({"first": fake, "second": fake | {"dies": step}}, 2)


# ---- the script ----------------------------------------------------------------------------------

def test_every_run_is_kept_and_the_table_says_lowest_and_highest(tiny, tmp_path, capsys):
    s = speed.Settings(what="kernels", size="tiny", out=str(tmp_path / "bench.jsonl"), rounds=1)
    (tmp_path / "bench.jsonl").write_text(json.dumps({"bench": "dpo", "name": "of another run"}) + "\n")
    speed.run(s)
    before, *rows = read_jsonl(s.out)
    assert before == {"bench": "dpo", "name": "of another run"}
    ways = 5 if torch.cuda.is_available() else 4             # FlexAttention wants a GPU
    assert len(rows) == ways and all(row["ms"] > 0 and row["hardware"] for row in rows)
    assert "attention, remedy" in capsys.readouterr().out

    rows = [{"run": run, "bench": "dpo", "name": name, "ms": ms, "pairs_per_s": 4000 / ms}
            for run, ours, theirs in ((1, 100, 400), (2, 200, 700))
            for name, ms in (("remedy", ours), ("TRL", theirs))]
    ours, theirs = speed.table(rows).splitlines()
    assert "100-200 ms  x 1.00 " in ours and "20.00-40.00 pairs/s" in ours
    assert "400-700 ms  x 3.50-4.00 " in theirs, "a ratio is taken within a run"


@pytest.mark.parametrize("flags", [{"what": "sped"}, {"size": "70b"}, {"rounds": 0}])
def test_the_door(flags):
    with pytest.raises(BadInput, match="--what: dpo"):
        speed.run(speed.Settings(**flags))


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="half a minute; SLOW=1 runs it")
@pytest.mark.parametrize("what, rank", [("dpo", 0), ("dpo", 4), ("sample", 0)])
def test_one_step_of_all_in_turn(tiny, tmp_path, what, rank):
    """The real thing in small: ours and TRL's, or transformers', on the same records."""
    pytest.importorskip("trl"), pytest.importorskip("peft")
    s = speed.Settings(size="tiny", rounds=1, lora=rank)
    rows = {row["name"]: row for row in speed.BENCHES[what](s, tmp_path)}
    assert all(row["ms"] > 0 and row["peak_mib"] > 100 for row in rows.values())
    if what == "dpo":
        theirs = rows["TRL, no checkpointing"]["tokens"]
        assert theirs > 1.2 * rows["remedy"]["tokens"], "TRL computes prompt and picture twice, and padding"


@pytest.mark.parametrize("name", ["bench", "gpu"])
def test_the_tables_of_docs_speed_are_drawn_from_results(name):
    page = [line.strip() for line in (ROOT / "docs" / "speed.md").read_text().splitlines()]
    for line in speed.table(read_jsonl(ROOT / "results" / f"{name}.jsonl")).splitlines():
        assert line.strip() in page, f"not in docs/speed.md: {line}"
