"""A run that is killed at any moment and resumed ends with the same bits, each step written down once.

    python -m pytest tests/test_resume.py -q             with SLOW=1 every method, killed twice
    SLOW=1 KILLS=10 python -m pytest tests/test_resume.py -q -k killed_anywhere

The kills are real: such a run is a process of its own, and SIGKILL comes from outside whenever it comes.
"""
import importlib
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import dpo
import parallel
import rejection
import sft
import steerlm
import train
from common import BadInput
from conftest import RECORDS, ended, process, rows_of, tiny_checkpoint, write_data
from train import latest_state

SLOW = bool(os.environ.get("SLOW"))
KILLS = int(os.environ.get("KILLS", 2 if SLOW else 1))
STEPS = 6
PAUSE = 0.02    # seconds
METHODS = {
    "dpo": (dpo, {}),
    "sft, lora": (sft, {"lora": 4, "lr": 1e-2}),
    "dpo, lora": (dpo, {"lora": 4, "lr": 1e-2, "projector_lr": 1e-3}),
    "sft": (sft, {}),
    "steerlm": (steerlm, {}),
    "rejection": (rejection, {}),
}
QUICK = ("dpo", "sft, lora")

pytestmark = pytest.mark.usefixtures("one_thread")       # as in the processes of their own


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("resume") / "tiny", "byte")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("resume") / "data", rows=2 * RECORDS)


@pytest.fixture
def make(ckpt, data):
    """make(folder, script, ...) -> the script's settings for a run in that folder."""
    def settings(out, script=dpo, **changes):
        given = {"ckpt": str(ckpt), "data": str(data), "out": str(out), "device": "cpu", "steps": STEPS, "batch": 3,
                 "pack": 300, "lr": 1e-3, "save_every": 1}
        return script.Settings(**given | changes)
    return settings


def weights(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("*/*.safetensors"))}


def rows(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if not k.endswith("_per_s")} for row in rows_of(out / "metrics.jsonl")]


def same(out: Path, whole: Path) -> bool:
    assert weights(whole) and not (whole / "state").exists(), "a finished run needs no state"
    return weights(out) == weights(whole) and rows(out) == rows(whole)


def kept_step(out: Path) -> int:
    """0: the loop has begun; -1: not even that."""
    newest = latest_state(out)
    return int(newest.name.removeprefix("step-")) if newest else (out / "metrics.jsonl").exists() - 1


# ---- SIGKILL -------------------------------------------------------------------------------------

def slowly(run, settings):
    """A little time after every step, so that a kill falls between any two things that happen."""
    keep = train.Run.keep

    def keep_and_wait(run):
        keep(run)
        time.sleep(PAUSE)
    train.Run.keep = keep_and_wait
    run(settings)


def killed_at(run, settings, moment: float) -> bool:
    """SIGKILL a while after the state of step int(moment) -> was the run still at work?"""
    out = Path(settings.out)
    with process(partial(slowly, run, settings), out.with_suffix(".log")) as child:
        until = time.monotonic() + 60
        while child.is_alive() and kept_step(out) < int(moment) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(moment % 1 * 2 * PAUSE)
        child.kill()
        return ended(child) == -signal.SIGKILL


@pytest.mark.parametrize("method", METHODS if SLOW else QUICK)
def test_killed_anywhere_and_resumed_a_run_ends_with_the_same_bits(make, tmp_path, method):
    script, changes = METHODS[method]
    script.run(make(tmp_path / "whole", script, **changes))
    rng, done, tries = random.Random(method), 0, 0
    while done < KILLS:
        tries += 1
        out = tmp_path / f"killed-{tries}"
        moment = rng.uniform(1, STEPS - 1)
        hit = killed_at(script.run, make(out, script, **changes), moment)
        if hit and SLOW:                                 # and once more
            killed_at(script.run, make(out, script, resume=True, **changes), rng.uniform(moment, STEPS))
        if not weights(out):
            script.run(make(out, script, resume=True, **changes))
        assert same(out, tmp_path / "whole"), f"try {tries}, killed at {moment:.2f}"
        done += hit
        assert tries < 5 * KILLS, "the kills come too late: the runs are over"


def die_at(module, name, call, settings):
    """A run in which SIGKILL comes when this function is called for the so-manieth time."""
    where = importlib.import_module(module)
    left, real = [call], getattr(where, name)

    def counted(*a, **k):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    setattr(where, name, counted)
    dpo.run(settings)


def test_a_kill_at_every_stage_of_writing_a_state_loses_nothing(make, tmp_path):
    """The moments that a random kill seldom meets, one after the other in one run of 16-bit weights:
    before the tensors, before the rename, behind it, in the midst of pruning."""
    about = {"dtype": "bfloat16", "save_every": 2, "steps": 8}
    dpo.run(make(tmp_path / "whole", **about))
    out = tmp_path / "killed"
    kept = []
    for stage in (("torch", "save", 2), ("train", "flush_folder", 1), ("train", "flush_folder", 2),
                  ("shutil", "rmtree", 3)):
        run = partial(die_at, *stage, make(out, resume=True, **about))
        with process(run, out.with_suffix(".log")) as child:
            assert ended(child) == -signal.SIGKILL, out.with_suffix(".log").read_text()
        kept.append(kept_step(out))
    assert kept == [2, 2, 4, 6]

    state = torch.load(latest_state(out) / "process-0.pt")["tensors"]
    weight = state["weight/language_model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    dpo.run(make(out, resume=True, **about))
    assert same(out, tmp_path / "whole")


# ---- SIGTERM -------------------------------------------------------------------------------------

def stop_in_step(monkeypatch, step, run, settings):
    """SIGTERM to this very process in the midst of a step."""
    calls, real = [], parallel.sum_gradients

    def sum_gradients(*a):                               # called once a step
        calls.append(a)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*a)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody listens to SIGTERM"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(parallel, "sum_gradients", sum_gradients)
        run(settings)
    signal.signal(signal.SIGTERM, before)
    assert end.value.code == 143


@pytest.fixture(scope="module")
def stopped(ckpt, data, tmp_path_factory):
    """The folders of a DPO run that was stopped after step 3, and of one that was not."""
    folder = tmp_path_factory.mktemp("stopped")
    torch.set_num_threads(1)
    given = {"ckpt": str(ckpt), "data": str(data), "device": "cpu", "steps": STEPS, "batch": 3, "lr": 1e-3, "pack": 300,
             "save_every": 0}
    dpo.run(dpo.Settings(out=str(folder / "whole"), **given))
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_in_step(monkeypatch, 3, dpo.run, dpo.Settings(out=str(folder / "stopped"), **given))
    return folder / "stopped", folder / "whole"


@pytest.fixture
def again(stopped, make, tmp_path):
    """again(...) goes on with a copy of the stopped run, in again.out."""
    out = Path(shutil.copytree(stopped[0], tmp_path / "run"))

    def go_on(**changes):
        dpo.run(make(out, **{"resume": True, "save_every": 0} | changes))
    go_on.out = out
    return go_on


def test_sigterm_finishes_the_step_and_the_run_goes_on_from_there(ckpt, data, stopped, again, tmp_path, capsys):
    """It does not matter where the files lie, and how often states are kept."""
    first, whole = stopped
    assert [path.name for path in (first / "state").iterdir()] == ["step-00000003"]
    assert [row["step"] for row in rows(first)] == [1, 2, 3] and not weights(first)

    moved = Path(shutil.copytree(data.parent, tmp_path / "moved"))
    again(ckpt=str(shutil.copytree(ckpt, tmp_path / "ckpt")), data=str(moved / data.name), save_every=50)
    assert same(again.out, whole)
    assert (again.out / "reference.jsonl").read_bytes() == (first / "reference.jsonl").read_bytes()
    said = capsys.readouterr().out
    assert "resumed after step 3" in said and "step-0 contract" not in said


def test_outside_the_loop_sigterm_is_left_alone(make, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    sft.run(make(tmp_path / "main", sft, steps=1))
    assert signal.getsignal(signal.SIGTERM) == before


# ---- what is refused -----------------------------------------------------------------------------

def test_a_state_of_other_settings_is_refused_with_the_differences(again):
    before, about = rows(again.out), (again.out / "config.json").read_bytes()
    with pytest.raises(BadInput, match="state of another run") as error:
        again(lr=2e-3, steps=9, seed=1, beta=0.2, batch=4, pack=100, clip=0.5, gap=3)
    for named in ("--lr (0.001 then, 0.002 now)", "--steps (6 then, 9 now)", "--seed (0 then", "--beta", "--batch", "--pack",
                  "--clip", "--gap"):
        assert named in str(error.value)
    assert (again.out / "config.json").read_bytes() == about, "what is refused is not written down"
    assert rows(again.out) == before and kept_step(again.out) == 3


def test_a_state_of_other_data_or_weights_is_refused(again, make, tmp_path, monkeypatch):
    rescored = [(question, images, [(text, 12 - s) for text, s in answers]) for question, images, answers in RECORDS]
    data = str(write_data(tmp_path / "data", rows=2 * rescored))
    ckpt = str(tiny_checkpoint(tmp_path / "other", "byte", seed=1))
    talk = tmp_path / "sft"
    stop_in_step(monkeypatch, 1, sft.run, make(talk, sft))
    for changes, named in (({"data": data}, "other data ("), ({"ckpt": ckpt}, "other weights (")):
        with pytest.raises(BadInput, match="state of another run") as error:
            again(reference=str(tmp_path / f"{named[6:9]}.jsonl"), **changes)
        assert named in str(error.value) and "--lr" not in str(error.value)
        with pytest.raises(BadInput, match="state of another run") as error:
            sft.run(make(talk, sft, resume=True, **changes))
        assert named in str(error.value)
    with pytest.raises(BadInput, match="holds a run that was stopped after step 1; go on with --resume"):
        sft.run(make(talk, sft))


def test_a_stopped_run_is_not_written_over_and_a_finished_one_not_resumed(again, make, stopped):
    with pytest.raises(BadInput, match="stopped after step 3; go on with --resume"):
        again(resume=False)
    with pytest.raises(SystemExit) as ended:
        dpo.run(make(stopped[1], resume=True))
    assert ended.value.code == 0


def test_resume_with_nothing_there_starts_at_step_1(make, tmp_path, capsys):
    dpo.run(make(tmp_path / "out", resume=True, steps=1))
    assert "nothing to resume" in capsys.readouterr().out and len(rows(tmp_path / "out")) == 1


def rename_one(path):
    state = torch.load(path)
    tensors = state["tensors"]
    tensors["weight/of_another_model"] = tensors.pop(next(iter(tensors)))
    torch.save(state, path)


DAMAGE = {
    "no tensors": ("state/*/process-0.pt", lambda path: path.unlink(), "damaged"),
    "torn tensors": ("state/*/process-0.pt", lambda path: path.write_bytes(path.read_bytes()[:-9999]), "damaged"),
    "other tensors": ("state/*/process-0.pt", rename_one, "damaged"),
    "lost metrics": ("metrics.jsonl", lambda path: path.write_text(path.read_text().partition("\n")[0] + "\n"),
                     "does not hold the rows of steps 1 to 3"),
    "torn metrics": ("metrics.jsonl", lambda path: path.write_text(path.read_text()[:-9]),
                     "does not hold the rows of steps 1 to 3"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_refused_by_name(again, kind):
    pattern, damage, message = DAMAGE[kind]
    [path] = again.out.glob(pattern)
    damage(path)
    with pytest.raises(BadInput, match=message) as error:
        again()
    assert str(again.out) in str(error.value)


# ---- the disk ------------------------------------------------------------------------------------

def test_a_disk_that_is_full_at_the_end_loses_no_training(make, tmp_path):
    """The model has no room, its state still has (a limit on the size of files stands for the disk's end)."""
    out, unlimited, save = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE), train.checkpoint.save

    def save_on_a_full_disk(*how):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, unlimited[1]))
        try:
            return save(*how)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadInput) as error:
        patch.setattr(train.checkpoint, "save", save_on_a_full_disk)
        dpo.run(make(out, save_every=0))
    assert "out/model cannot be written" in str(error.value) and "make room, then give --resume" in str(error.value)
    assert not (out / "model").exists() and len(list((out / "state").glob("step-*"))) == 1
    dpo.run(make(out, save_every=0, resume=True))
    dpo.run(make(tmp_path / "whole"))
    assert same(out, tmp_path / "whole")


def test_a_full_disk_is_one_clear_error_and_leaves_the_last_good_state(make, tmp_path, monkeypatch):
    """A limit on the size of files, the operating system's own, stands for the disk's end."""
    out, calls, save = tmp_path / "out", [], train.Run.save
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(run):
        calls.append(run.done)
        if run.done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))
        try:
            save(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with monkeypatch.context() as patch, pytest.raises(BadInput) as error:
        patch.setattr(train.Run, "save", save_on_a_full_disk)
        dpo.run(make(out))
    assert calls == [1, 2, 3]
    assert "the state after step 3 cannot be written" in str(error.value)
    assert "any earlier one is whole; make room" in str(error.value)
    assert [path.name for path in (out / "state").iterdir()] == ["step-00000002"]
    dpo.run(make(out, resume=True))
    dpo.run(make(tmp_path / "whole"))
    assert same(out, tmp_path / "whole")
