"""A run that is killed at any moment and resumed ends with the same bits, each step written down once.

    python -m pytest tests/test_resume.py -q              a few kill points; with SLOW=1 two for every method
    SLOW=1 KILLS=10 python -m pytest tests/test_resume.py -q -k killed_anywhere          ten for every method: a quarter of an hour

The kills are real: each run is a process of its own, and SIGKILL comes from outside whenever it comes.
"""
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dpo
import parallel
import rejection
import resume
import sft
import steerlm
from common import BadInput
from conftest import ended, process, tiny_checkpoint
from test_dpo import RECORDS, rows_of, write_data

SLOW = bool(os.environ.get("SLOW"))
KILLS = int(os.environ.get("KILLS", 2 if SLOW else 1))
slow = pytest.mark.skipif(not SLOW, reason="SLOW=1 runs it")
METHODS = {"dpo": (dpo, {"lr": 1e-3}), "dpo, lora": (dpo, {"lora": 4, "lr": 1e-2, "projector_lr": 1e-3}),
           "sft, lora": (sft, {"lora": 4, "lr": 1e-2}), "dpo, bfloat16": (dpo, {"dtype": "bfloat16", "lr": 1e-3}), "sft": (sft, {"lr": 1e-3}),
           "steerlm": (steerlm, {"lr": 1e-3}), "rejection": (rejection, {"lr": 1e-3})}
QUICK, STEPS, PAUSE = ("dpo", "dpo, lora", "steerlm"), 8, 0.02


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("resume") / "tiny", "byte")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("resume") / "data", rows=[RECORDS[k % 6] for k in range(12)])


def flags(ckpt, data, out, **changes):
    return dict(ckpt=str(ckpt), data=str(data), out=str(out), device="cpu", steps=STEPS, batch=3, pack=300, save_every=1) | changes


def patched(patch, run, settings):
    """What a process of its own does."""
    patch()
    run(settings)


def log_of(settings) -> Path:
    return Path(settings.out).with_suffix(".log")


def complete(script, settings, patch=dict) -> int:
    with process(partial(patched, patch, script.run, settings), log_of(settings)) as child:
        return ended(child)


def killed_at(script, settings, moment: float) -> bool:
    """SIGKILL a while after the state of step int(moment) -> was the run still at work?"""
    with process(partial(patched, slowly, script.run, settings), log_of(settings)) as child:
        until, step = time.monotonic() + 60, int(moment)
        while child.is_alive() and kept_step(settings) < step and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(moment % 1 * 2 * PAUSE)
        child.kill()
        return ended(child) == -signal.SIGKILL


def kept_step(settings) -> int:
    """0: the loop has begun; -1: not even that."""
    newest = resume.latest(Path(settings.out, "state"))
    return int(newest.name.removeprefix("step-")) if newest else Path(settings.out, "metrics.jsonl").exists() - 1


def slowly():
    """A little time after every step, so that a kill falls between any two things that happen."""
    before = resume.keep

    def keep(*a, **k):
        before(*a, **k)
        time.sleep(PAUSE)
    resume.keep = keep


def result(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for name in ("model", "adapter") for p in sorted((out / name).glob("*.safetensors"))}


def rows(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith("_per_s")} for row in rows_of(out / "metrics.jsonl")]


@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=slow) for m in METHODS])
def test_killed_anywhere_and_resumed_the_weights_are_the_same_bits_and_each_step_has_one_row(ckpt, data, tmp_path, method):
    script, changes = METHODS[method]
    make = lambda name, **more: script.Settings(**flags(ckpt, data, tmp_path / name, **changes | more))
    assert complete(script, make("whole")) == 0, (tmp_path / "whole.log").read_text()
    want = result(tmp_path / "whole")
    assert want and not (tmp_path / "whole" / "state").exists(), "a finished run needs no state"
    rng, done, k = random.Random(method), 0, 0
    while done < KILLS:
        k, out = k + 1, tmp_path / f"killed-{k}"
        first = rng.uniform(0 if done else 1, STEPS - 1)                 # one at least finds a state
        hit = killed_at(script, make(out.name), first)
        if hit and SLOW:
            killed_at(script, make(out.name, resume=True), rng.uniform(first, STEPS))     # and once more
        if not (out / "model").exists() and not (out / "adapter").exists():
            assert complete(script, make(out.name, resume=True)) == 0, out.with_suffix(".log").read_text()
        assert result(out) == want, f"kill {k}, {first:.2f}"
        assert [r["step"] for r in rows(out)] == list(range(1, STEPS + 1)) and rows(out) == rows(tmp_path / "whole")
        done += hit
        assert k < 5 * KILLS, "the kills come too late: the runs are over"


def die_at(name, call):
    """SIGKILL when resume calls the function of this name for the so-manieth time."""
    left, before = [call], getattr(resume, name)

    def counted(*a, **k):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*a, **k)
    setattr(resume, name, counted)


@pytest.mark.parametrize("method", ["dpo", pytest.param("dpo, bfloat16", marks=slow), pytest.param("steerlm", marks=slow)])
def test_a_kill_at_every_stage_of_writing_a_state_loses_nothing(ckpt, data, tmp_path, method):
    """The moments that a random kill seldom meets: before the rename, behind it, in the midst of pruning."""
    script, changes = METHODS[method]
    make = lambda name, **more: script.Settings(**flags(ckpt, data, tmp_path / name, save_every=3, **changes | more))
    assert complete(script, make("whole")) == 0
    states = []
    for k, stage in enumerate([("write_tensors", 2), ("flush_folder", 3), ("flush_folder", 4), ("write_whole", 3)]):
        out = tmp_path / f"killed-{k}"
        assert complete(script, make(f"killed-{k}"), partial(die_at, *stage)) == -signal.SIGKILL
        states.append(resume.latest(out / "state").name)
        assert complete(script, make(f"killed-{k}", resume=True)) == 0, out.with_suffix(".log").read_text()
        assert result(out) == result(tmp_path / "whole") and rows(out) == rows(tmp_path / "whole")
    assert states == ["step-00000003", "step-00000003", "step-00000006", "step-00000003"]


def stop_after(step):
    return partial(sigterm_in, step)


def sigterm_in(step):
    """SIGTERM to this very process in the midst of a step."""
    before, seen = parallel.sum_gradients, [0]

    def sum_gradients(*a):                                               # called once a step
        seen[0] += 1
        if seen[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*a)
    parallel.sum_gradients = sum_gradients


def test_sigterm_finishes_the_step_keeps_the_state_and_exits_with_143(ckpt, data, tmp_path):
    make = lambda name, **more: dpo.Settings(**flags(ckpt, data, tmp_path / name, save_every=0, pack=8192, lr=1e-3) | more)
    assert complete(dpo, make("whole")) == 0
    assert complete(dpo, make("stopped"), stop_after(4)) == 143
    assert [p.name for p in (tmp_path / "stopped" / "state").iterdir()] == ["step-00000004"]
    assert [r["step"] for r in rows(tmp_path / "stopped")] == [1, 2, 3, 4] and not (tmp_path / "stopped" / "model").exists()
    assert complete(dpo, make("stopped", resume=True)) == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole") and rows(tmp_path / "stopped") == rows(tmp_path / "whole")


def test_outside_the_loop_sigterm_ends_the_process_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with resume.sigterm(resume.Kept(Path("x"))) as came:
        os.kill(os.getpid(), signal.SIGTERM)
        assert came.wait(5)
    assert signal.getsignal(signal.SIGTERM) == before
    with resume.sigterm(None):
        assert signal.getsignal(signal.SIGTERM) == before, "who keeps no state is not kept alive"


# ---- what is refused ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stopped(ckpt, data, tmp_path_factory):
    """A DPO run that was stopped after step 3."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert complete(dpo, dpo.Settings(**flags(ckpt, data, out, lr=1e-3, pack=8192)), stop_after(3)) == 143
    return out


def copy_of(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize("changes, named", [
    ({"lr": 2e-3}, "--lr (0.001 then, 0.002 now)"), ({"steps": 9}, "--steps (8 then, 9 now)"), ({"seed": 1}, "--seed (0 then"),
    ({"beta": 0.2}, "--beta"), ({"batch": 4}, "--batch"), ({"pack": 100}, "--pack"), ({"clip": 0.5}, "--clip"), ({"gap": 3}, "--gap")])
def test_a_state_of_other_settings_is_refused_with_the_difference(ckpt, data, stopped, tmp_path, changes, named):
    out = copy_of(stopped, tmp_path)
    before, about = rows(out), (out / "config.json").read_bytes()
    with pytest.raises(BadInput, match="state of another run") as error:
        dpo.run(dpo.Settings(**flags(ckpt, data, out, lr=1e-3, pack=8192, resume=True) | changes))
    assert (out / "config.json").read_bytes() == about, "what is refused is not written down"
    assert named in str(error.value) and rows(out) == before and resume.latest(out / "state").name == "step-00000003"


def test_a_state_of_other_data_scores_or_weights_is_refused(ckpt, data, stopped, tmp_path):
    rescored = [(q, i, [(text, 12 - s) for text, s in a]) for q, i, a in RECORDS]
    others = {"data (": dict(data=str(write_data(tmp_path / "data", rows=[rescored[k % 6] for k in range(12)]))),
              "weights (": dict(ckpt=str(tiny_checkpoint(tmp_path / "other", "byte", seed=1)), reference=str(tmp_path / "r.jsonl"))}
    for named, changes in others.items():
        out = copy_of(stopped, tmp_path / named[:4])
        with pytest.raises(BadInput, match="state of another run") as error:
            dpo.run(dpo.Settings(**flags(ckpt, data, out, lr=1e-3, pack=8192, resume=True) | changes))
        assert named in str(error.value) and "--lr" not in str(error.value)
    talk = dict(steps=4, batch=3, lr=1e-3)
    assert complete(sft, sft.Settings(**flags(ckpt, data, tmp_path / "sft", **talk)), stop_after(1)) == 143
    with pytest.raises(BadInput, match="other data"):
        sft.run(sft.Settings(**flags(ckpt, others["data ("]["data"], tmp_path / "sft", resume=True, **talk)))
    with pytest.raises(BadInput, match="other weights"):
        sft.run(sft.Settings(**flags(others["weights ("]["ckpt"], data, tmp_path / "sft", resume=True, **talk)))


def test_where_files_lie_and_how_often_states_are_kept_does_not_matter(ckpt, data, stopped, tmp_path):
    out, moved = copy_of(stopped, tmp_path), shutil.copytree(data.parent, tmp_path / "moved")
    dpo.run(dpo.Settings(**flags(shutil.copytree(ckpt, tmp_path / "ckpt"), Path(moved) / data.name, out, lr=1e-3, pack=8192,
                                 save_every=50, resume=True)))
    assert (out / "model").exists() and len(rows(out)) == STEPS


def test_a_stopped_run_is_not_written_over_and_a_finished_one_not_resumed(ckpt, data, stopped, tmp_path):
    out = copy_of(stopped, tmp_path)
    with pytest.raises(BadInput, match="stopped after step 3; go on with --resume"):
        dpo.run(dpo.Settings(**flags(ckpt, data, out, lr=1e-3, pack=8192)))
    with pytest.raises(BadInput, match="--resume needs --out"):
        dpo.run(dpo.Settings(**flags(ckpt, data, "", resume=True)))
    dpo.run(dpo.Settings(**flags(ckpt, data, out, lr=1e-3, pack=8192, resume=True)))
    with pytest.raises(BadInput, match="already holds"):
        dpo.run(dpo.Settings(**flags(ckpt, data, out, lr=1e-3, pack=8192, resume=True)))


def test_resume_with_nothing_there_starts_at_step_1(ckpt, data, tmp_path, capsys):
    dpo.run(dpo.Settings(**flags(ckpt, data, tmp_path / "out", lr=1e-3, resume=True, steps=2)))
    assert "nothing to resume" in capsys.readouterr().out and len(rows(tmp_path / "out")) == 2


def test_resuming_moves_neither_reference_nor_contract(ckpt, data, stopped, tmp_path, capsys):
    out = copy_of(stopped, tmp_path)
    before = (out / "reference.jsonl").read_bytes()
    dpo.run(dpo.Settings(**flags(ckpt, data, out, lr=1e-3, pack=8192, resume=True)))
    said = capsys.readouterr().out
    assert (out / "reference.jsonl").read_bytes() == before and "step-0 contract" not in said and "resumed after step 3" in said
    assert rows(out)[3]["loss"] < rows(out)[0]["loss"] - 1e-3, "step 4 goes on from trained weights"


def test_a_damaged_state_is_refused_not_read(ckpt, data, stopped, tmp_path):
    again = lambda out: dpo.run(dpo.Settings(**flags(ckpt, data, out, lr=1e-3, pack=8192, resume=True)))
    out = copy_of(stopped, tmp_path / "a")
    (resume.latest(out / "state") / "state.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        again(out)
    out = copy_of(stopped, tmp_path / "b")
    next(resume.latest(out / "state").glob("*.safetensors")).unlink()
    with pytest.raises(BadInput, match="lacks"):
        again(out)
    out = copy_of(stopped, tmp_path / "c")
    path = out / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(BadInput, match="does not hold the rows of steps 1 to 3"):
        again(out)
    out = copy_of(stopped, tmp_path / "d")
    path = next(resume.latest(out / "state").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="damaged"):
        again(out)


# ---- the disk ----------------------------------------------------------------------------------------------------

def fill_after_two():
    before, calls = resume.save, [0]

    def save(*a):
        calls[0] += 1
        if calls[0] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        return before(*a)
    resume.save = save


def test_a_full_disk_is_one_clear_error_and_leaves_the_last_good_state(ckpt, data, tmp_path):
    """A limit on the size of files, the operating system's own, stands for the disk's end."""
    out = tmp_path / "out"
    make = lambda **more: dpo.Settings(**flags(ckpt, data, out, lr=1e-3, **more))
    assert complete(dpo, dpo.Settings(**flags(ckpt, data, tmp_path / "whole", lr=1e-3))) == 0
    assert complete(dpo, make(), fill_after_two) == 1
    said = out.with_suffix(".log").read_text().splitlines()[-1]
    assert "BadInput: the state after step 3 cannot be written" in said and "that after step 2 is whole; make room" in said
    assert [p.name for p in (out / "state").iterdir()] == ["step-00000002"]
    assert complete(dpo, make(resume=True)) == 0
    assert result(out) == result(tmp_path / "whole")


def test_only_the_last_state_is_kept_and_left_overs_of_a_kill_are_cleared(ckpt, data, tmp_path, monkeypatch):
    seen, out, before = [], tmp_path / "out", resume.save

    def save(*a):
        (out / "state" / "next.part").mkdir(parents=True, exist_ok=True)
        (out / "state" / "next.part" / "process-7-000.safetensors").write_text("left over")
        before(*a)
        seen.append(sorted(p.name for p in (out / "state").rglob("*")))
    monkeypatch.setattr(resume, "save", save)
    dpo.run(dpo.Settings(**flags(ckpt, data, out, lr=1e-3, save_every=3)))
    assert seen == [["process-0-000.safetensors", "state.json", f"step-{k:08d}"] for k in (3, 6)]


def test_a_large_state_is_written_in_several_files(ckpt, data, stopped, tmp_path, monkeypatch):
    out = copy_of(stopped, tmp_path)
    whole = load_file(next(resume.latest(out / "state").glob("*.safetensors")))
    monkeypatch.setattr(resume, "FILE_BYTES", 50_000)
    monkeypatch.setattr(resume, "finish", lambda *a: None)
    dpo.run(dpo.Settings(**flags(ckpt, data, out, lr=1e-3, pack=8192, resume=True)))
    files = sorted(resume.latest(out / "state").glob("*.safetensors"))
    assert len(files) > 3 and {k for f in files for k in load_file(f)} == set(whole)
    assert {k.split("/")[0] for k in whole} == {"weight", "step", "exp_avg", "exp_avg_sq"}


def test_states_of_16_bit_weights_hold_their_fp32_masters(ckpt, data, tmp_path):
    out = tmp_path / "out"
    assert complete(dpo, dpo.Settings(**flags(ckpt, data, out, dtype="bfloat16", lr=1e-5, pack=8192)), stop_after(2)) == 143
    kept = load_file(next(resume.latest(out / "state").glob("*.safetensors")))
    master = kept["weight/language_model.layers.0.mlp.up_proj.weight"]
    assert master.dtype == torch.float32 and not torch.equal(master, master.bfloat16().float())


def test_a_stopped_sft_run_is_not_written_over_either(ckpt, data, tmp_path):
    settings = flags(ckpt, data, tmp_path / "sft", steps=4, batch=3, lr=1e-3)
    assert complete(sft, sft.Settings(**settings), stop_after(2)) == 143
    with pytest.raises(BadInput, match="holds a run that was stopped after step 2; go on with --resume"):
        sft.run(sft.Settings(**settings))


def test_16_bit_weights_resume_to_the_same_bits(ckpt, data, tmp_path):
    make = lambda name, **more: dpo.Settings(**flags(ckpt, data, tmp_path / name, save_every=0, pack=8192, steps=5, lr=1e-3,
                                                     dtype="bfloat16") | more)
    assert complete(dpo, make("whole")) == 0 and complete(dpo, make("stopped"), stop_after(4)) == 143
    assert complete(dpo, make("stopped", resume=True)) == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole") and rows(tmp_path / "stopped") == rows(tmp_path / "whole")


@pytest.mark.parametrize("script", (dpo, sft), ids=("dpo", "sft"))
def test_a_kill_between_adapter_and_merged_model_is_resumed(ckpt, data, tmp_path, script, monkeypatch):
    settings = script.Settings(**flags(ckpt, data, tmp_path / "out", lora=4, lr=1e-2, merge=True))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume.checkpoint, "save", lambda *_: exec("raise KeyboardInterrupt"))
        script.run(settings)
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="already holds"):
        script.run(settings)
    script.run(replace(settings, resume=True))
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file() and not (tmp_path / "out" / "state").exists()
    again = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)
    with pytest.raises(BadInput, match="already holds"):
        script.run(replace(settings, resume=True))
