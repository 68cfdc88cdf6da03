"""What speed.py counts, and that its contestants meet on equal terms. Speed itself is not tested.

    python -m pytest tests/test_speed.py -q          with SLOW=1 and TRL installed a step against it, too
"""
import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import speed
from common import BadInput, read_jsonl
from conftest import ROOT
from data import Pixels, Tokens, Tree, make_pack, make_tree
from kernels.attention import dense_mask

CPU = torch.device("cpu")


# ---- the work ------------------------------------------------------------------------------------

def test_the_work_of_attention_is_what_the_mask_lets_see():
    pack = make_pack([Tree("", [5] * 7, [[5] * 4, [5] * 6]), Tree("", [5] * 3, [[5] * 2])])
    assert speed.attention_work(pack.mask, 64) == int(dense_mask(pack.mask).sum()) * 64 * 2 * 7


def test_the_work_of_a_step_is_what_torch_counts(tmp_path):
    folder = speed.write_checkpoint(tmp_path, "tiny", CPU, torch.float32)
    model = checkpoint.load(folder)
    tokens, pixels = Tokens(folder, model.config), Pixels(model.config)
    (record,) = speed.write_records(tmp_path, 1)
    pack = pixels.pack([make_tree(tokens, record, [a["text"] for a in record["answers"]])])
    with FlopCounterMode(display=False) as counter:
        hidden = model(pack.ids, pack.positions, pack.mask, pack.pixels, pack.read)
        (hidden[pack.place] @ model.head.T).logsumexp(-1).sum().backward()

    # torch counts attention's dense problems whole and its own recomputation; all else is the same.
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in flops.items() if op in ("aten.mm", "aten.addmm", "aten.bmm"))
    text, vision = model.config.text, model.config.vision
    attention = text.num_hidden_layers * speed.attention_work(pack.mask, text.hidden_size)
    tower = vision.depth * 4 * (vision.patches + 1) ** 2 * vision.hidden_size
    assert speed.step_work(model.config, pack) - attention - tower == pytest.approx(products, rel=0.02)


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
    """train.prefetched prepares packs in a thread of its own. A second team there would be more threads than cores, and
    OpenMP would let nobody wait awake any more: a step then sleeps thousands of times (LOG.md, 2026-11-26)."""
    speed.write_records(tmp_path, 1)
    code = f"""import os, torch
from concurrent.futures import ThreadPoolExecutor
from speed import ENVIRONMENT, config_of
from data import Pixels, Tree
print("OMP_WAIT_POLICY" in os.environ, "OMP_WAIT_POLICY" in ENVIRONMENT)
torch.set_num_threads(2)
torch.ones(1 << 20).sum()
tree = Tree("", [4] + [5] * 20, [[5] * 9, [5] * 9], [{str(tmp_path / "images/0.jpg")!r}], image=4, patches=576)
with ThreadPoolExecutor(1) as pool:
    pool.submit(int).result()
    before = len(os.listdir("/proc/self/task"))
    pool.submit(Pixels(config_of("small")).pack, [tree]).result()
    print(len(os.listdir("/proc/self/task")) - before)"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_WAIT", "GOMP"))}
    done = subprocess.run([sys.executable, "-c", code], env=clean, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "0"], done.stdout + done.stderr


FAKE = """import json, os, sys
job = json.loads(sys.argv[1])
word = lambda **said: print(json.dumps(said), flush=True)
if job.get("dies") == "loading":
    sys.exit(1)
word()
for line in sys.stdin:
    if job.get("dies"):
        sys.exit(1)
    others = [open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] for pid in open(job["pids"]).read().split()
              if int(pid) != os.getpid()]
    word(others=others)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(speed, "THEIRS", [str(tmp_path / "fake.py")])
    return speed.Settings(rounds=2, warmup=1)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="asks Linux who is stopped")
def test_who_is_not_at_it_is_stopped(fakes, tmp_path, monkeypatch):
    pids, made = tmp_path / "pids", []
    real = subprocess.Popen

    def popen(*args, **how):
        made.append(real(*args, **how))
        pids.write_text(" ".join(str(process.pid) for process in made))
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    job = {"pids": str(pids)}
    rows = speed.alternate({"a": job, "b": job, "c": job}, fakes)
    assert [row["name"] for row in rows] == ["a", "b", "c"] and all(len(row["all_ms"]) == 2 for row in rows)
    assert [row["others"] for row in rows] == 3 * [["T", "T"]]
    assert all(process.poll() is not None for process in made), "their memory is free"


@pytest.mark.parametrize("when", ["loading", "stepping"])
def test_a_contestant_that_dies_is_named_and_not_waited_for(fakes, tmp_path, when):
    (tmp_path / "pids").write_text("")
    job = {"pids": str(tmp_path / "pids")}
    with pytest.raises(BadInput, match="second ended before its step did"):
        speed.alternate({"first": job, "second": job | {"dies": when}}, fakes)


# ---- the script ----------------------------------------------------------------------------------

def test_every_run_is_kept_and_the_table_says_lowest_and_highest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "matmul_rate", lambda device, dtype: 1e9)
    s = speed.Settings(what="kernels", size="tiny", out=str(tmp_path / "bench.jsonl"), rounds=1, warmup=0, pairs=1,
                       threads=torch.get_num_threads())
    (tmp_path / "bench.jsonl").write_text(json.dumps({"bench": "dpo", "name": "of another run"}) + "\n")
    speed.run(s)
    before, *rows = read_jsonl(s.out)
    assert before == {"bench": "dpo", "name": "of another run"}
    assert len(rows) == 5 and all(row["ms"] > 0 and row["of_matmul_rate"] > 0 and row["hardware"] for row in rows)
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
def test_one_step_of_all_in_turn(tmp_path, what, rank):
    """The real thing in small: ours and TRL's, or transformers', on the same records."""
    pytest.importorskip("trl"), pytest.importorskip("peft")
    s = speed.Settings(size="tiny", rounds=1, warmup=0, pairs=2, threads=1, lora=rank)
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
