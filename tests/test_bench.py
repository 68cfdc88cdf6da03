"""What speed.py counts and prints; it is run in small, so that it can be run at all. Speed itself is not tested.

    python -m pytest tests/test_bench.py -q          with SLOW=1 and TRL installed a step against it, too
"""
import json
import os
import platform
import sys

import pytest
import torch

import speed as bench
import checkpoint
import memory as plan
import formats as records
from common import BadInput, read_jsonl
from conftest import ROOT
from data import Pixels, Tokens, Tree, make_pack, make_tree
from kernels.attention import dense_mask


def test_the_work_of_attention_is_what_the_mask_lets_see():
    pack = make_pack([Tree("", [5] * 7, [[5] * 4, [5] * 6]), Tree("", [5] * 3, [[5] * 2])])
    assert plan.attention_work(pack.mask, 64) == int(dense_mask(pack.mask).sum()) * 64 * 2 * 7


def test_the_work_of_a_step_is_what_torch_counts(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode
    model = checkpoint.load(bench.write_checkpoint(tmp_path, "tiny"))
    tokens, pixels = Tokens(tmp_path / "model", model.config), Pixels(model.config)
    (record,), _ = records.read(bench.write_records(tmp_path, 1), image_size=56)
    pack = pixels.pack([make_tree(tokens, record, [a["text"] for a in record["answers"]])])
    with FlopCounterMode(display=False) as counter:
        hidden = model(pack.ids, pack.positions, pack.mask, pack.pixels)
        (hidden[pack.rows] @ model.head.T).logsumexp(-1).sum().backward()
    # torch counts attention's dense problems whole and its own recomputation; all else is the same
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in flops.items() if op in ("aten.mm", "aten.addmm", "aten.bmm"))
    mine = plan.step_work(model.config, pack) - model.config.text.num_hidden_layers * plan.attention_work(
        pack.mask, model.config.text.hidden_size)
    v = model.config.vision
    mine -= v.depth * 4 * (v.patches + 1) ** 2 * v.hidden_size
    assert mine == pytest.approx(products, rel=0.02)


def test_a_bench_adds_its_rows_in_the_place_of_its_older_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.SIZES, "small", bench.SIZES["tiny"])
    out = tmp_path / "bench.jsonl"
    (tmp_path / "bench.jsonl").write_text(json.dumps({"bench": "kernels", "name": "old"}) + "\n" + json.dumps({"bench": "dpo", "name": "kept"}) + "\n")
    bench.run(bench.Settings(what="kernels", out=str(out), rounds=1, warmup=0, pairs=1, threads=torch.get_num_threads()))
    rows = read_jsonl(out)
    assert rows[0]["name"] == "kept" and len(rows) >= 8 and all(row["ms"] > 0 and row["hardware"] for row in rows[1:])
    assert all(row["gflop_per_s"] > 0 and row["gb_per_s"] > 0 and row["peak_mib"] >= 0 for row in rows[1:])
    said = capsys.readouterr().out
    assert all(f"{row['name']:42}{row['ms']:10,.1f} ms" in said for row in rows[1:])


def test_weights_are_drawn_where_their_generator_is(tmp_path, monkeypatch):
    """A GPU refuses a CPU's generator; "meta" plays the GPU, and does what a GPU can."""
    monkeypatch.setattr(bench, "device_and_dtype", lambda *a: (torch.device("meta"), torch.bfloat16))
    monkeypatch.setattr(bench, "make_pack", lambda *a: torch.empty(0))                  # what follows is not asked here
    monkeypatch.setattr(bench, "in_turn", lambda *a: sys.exit("built"))
    real = torch.nn.init.normal_

    def normal(p, *a, generator=None):
        assert generator is None or generator.device == p.device
        return real(p, *a, generator=generator)
    monkeypatch.setattr(torch.nn.init, "normal_", normal)
    with pytest.raises(SystemExit, match="built"):
        bench.bench_growth(bench.Settings(size="tiny"), tmp_path)


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux forgets a peak")
def test_the_memory_of_a_call_is_what_it_had_at_once():
    memory = lambda mib: bench.memory_of(lambda: torch.ones(mib << 18).sum())["peak_mib"]
    assert memory(256) > 200 and 100 < memory(128) < 160 and memory(1) < 30, "a peak of before does not count"


@pytest.mark.parametrize("flags", [{"what": "speed"}, {"size": "70b"}, {"rounds": 0}])
def test_the_door(flags):
    with pytest.raises(BadInput, match="--what: dpo"):
        bench.run(bench.Settings(**flags))


def lives(pipe, folder, s):
    for _ in bench.batches(pipe, [0], 1, {}):
        pass


def dies(pipe, folder, s, loaded: bool):
    next(bench.batches(pipe, [0], 1, {})) if loaded else None
    raise SystemExit("out of memory")


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="four processes that import all; SLOW=1 runs it")
@pytest.mark.parametrize("loaded", [False, True])
def test_a_contestant_that_dies_is_named_and_not_waited_for(tmp_path, loaded):
    s = bench.Settings(rounds=1, warmup=0)
    with pytest.raises(BadInput, match="second ended before its step did"):
        bench.alternate({"first": (lives,), "second": (dies, loaded)}, tmp_path, s)


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="a dozen seconds; SLOW=1 runs it")
@pytest.mark.parametrize("rank", [0, 4])
def test_one_step_of_both_in_turn(tmp_path, rank):
    """The real thing in small: two processes, one step each, ours and TRL's, on the same records."""
    pytest.importorskip("trl"), pytest.importorskip("peft")
    s = bench.Settings(size="tiny", rounds=1, warmup=0, pairs=2, threads=1, lora=rank)
    bench.write_checkpoint(tmp_path, "tiny")
    bench.write_records(tmp_path, 4)
    rows = bench.alternate({"remedy": (bench.ours, "float32"), "TRL": (bench.theirs, "float32", False)}, tmp_path, s)
    assert all(row["ms"] > 0 and row["peak_mib"] > 100 for row in rows.values())
    assert rows["TRL"]["tokens"] > 1.2 * rows["remedy"]["tokens"], "TRL computes prompt and picture twice, and padding"


def test_the_readmes_speed_table_is_drawn_from_results():
    readme = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    for line in bench.table(read_jsonl(ROOT / "results" / "bench.jsonl")).splitlines():
        assert line.strip() in readme, f"not in README.md: {line}"
