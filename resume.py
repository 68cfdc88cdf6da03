"""A run that was stopped goes on as if it had not been: the same weights, to the last bit.

The problem. A process is killed at any moment: by a scheduler, a full disk, a power cut. What a step depends on is the trained
weights (in fp32: an optimizer's masters), Adam's two moments and its step count, and which records come next.

The trick is to have nothing else. The order of the records and the learning rate are functions of seed and step, there is no
dropout, and 16-bit weights are their masters rounded. So the state is three tensors per trained weight and one number:

    state/step-00000100/   state.json: the step, and what this run is      process-0-000.safetensors, ...: the tensors
    state/next.part/       what was being written when the power went

A state appears whole or not at all (written aside, flushed to disk, renamed), and only then are older ones removed. What
the run is, its settings, weights and data, is kept with it and compared: a state is never continued under another run's flags.
Each process of several writes its own shard; there must be as many of them again.

    python dpo.py --ckpt llava-1.5-7b-hf --data prefs.jsonl --out runs/dpo --save_every 50
    python dpo.py --ckpt llava-1.5-7b-hf --data prefs.jsonl --out runs/dpo --save_every 50 --resume

With nothing there, --resume starts from the beginning, so that a scheduler may always give it. SIGTERM keeps the state at the
next step's end and exits with 143.

Previous: memory.py.  Next: sft.py (the first loss).
"""
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, TextIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import checkpoint
import lora
import parallel
from checkpoint import write_tensors
from common import BadInput, describe_run, write_whole
from model import Llava

FILE_BYTES = 1 << 30                                     # of tensors held on the host at once while they are written
WITHOUT_INFLUENCE = {"ckpt", "data", "image_root", "out", "reference", "device", "resume", "save_every", "merge",
                     "dry_run", "checkpointing"}


@dataclass
class Kept:
    """Where a run's state is kept."""
    out: Path                    # the run's folder
    about: dict | None = None    # what it must agree with; None: nothing is kept
    every: int = 0               # steps between two states; 0: only at SIGTERM
    resume: bool = False         # go on with what is there


def about(settings: dict, **more) -> dict:
    """What a state must agree with: every setting that the weights depend on (files by their content, in `more`)."""
    return {f"--{key}": value for key, value in settings.items() if key not in WITHOUT_INFLUENCE} | more


def latest(folder: Path) -> Path | None:
    return max(folder.glob("step-" + 8 * "[0-9]"), default=None)


def digest(model: Llava) -> str:
    """Names the weights a model holds, by their content."""
    found = hashlib.sha256(repr(model.config).encode())                  # a rope_theta counts as a weight
    for name, p in model.named_parameters():
        found.update(name.encode())
        found.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def check_folder(out: Path, resume: bool) -> None:
    """A run that was stopped is neither written over nor gone on with by accident."""
    found = latest(out / "state")
    if found and not resume:
        raise BadInput(f"{out} holds a run that was stopped after step {int(found.name[5:])}; go on with --resume, or choose "
                       "another --out")


def describe(out: Path, s, **more) -> None:
    """Write `out`/config.json as the run begins; where one goes on it stays, also if that one is then refused."""
    if parallel.rank() == 0 and not (s.resume and latest(out / "state")):
        write_whole(out / "config.json", json.dumps(describe_run(s, **more), indent=1) + "\n")


def is_finished(out: Path, s) -> bool:
    """Does what a run leaves stand in `out`? Of --merge's two an adapter alone does not, where there is a state to go on from."""
    return (out / "model").exists() or (out / "adapter").exists() and not (s.merge and s.resume and latest(out / "state"))


def flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


# ---- out and in -----------------------------------------------------------------------------------------------

def tensors_of(masters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything an update reads and writes, this process's part."""
    for name, master in masters.items():
        yield f"weight/{name}", parallel.local(master.detach())
        for key, value in optimizer.state[master].items():
            yield f"{key}/{name}", parallel.local(value)


def save(out: Path, step: int, about: dict, masters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Keep the state after `step` steps in out/state, then forget older ones. Every process calls it."""
    folder, target, rank = out / "state", out / "state" / f"step-{step:08d}", parallel.rank()
    aside, shards = folder / "next.part", any(parallel.local(m) is not m for m in masters.values())
    try:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        parallel.gather(None)                                                    # the folder is there
        if rank == 0 or shards:
            for number, part in enumerate(checkpoint.in_files(tensors_of(masters, optimizer), FILE_BYTES)):
                write_tensors(part, aside / f"process-{rank}-{number:03d}.safetensors")
        parallel.gather(None)                                                    # everybody's part is on the disk
        if rank == 0:
            write_whole(aside / "state.json", json.dumps({"step": step, "about": about}, indent=1) + "\n")
            flush_folder(aside)
            os.replace(aside, target)
            flush_folder(folder)
            for old in folder.glob("step-*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        kept = latest(folder)
        raise BadInput(f"the state after step {step} cannot be written to {folder} ({error}); "
                       + (f"that after step {int(kept.name[5:])} is whole" if kept else "there is no earlier one")
                       + "; make room, then go on with --resume") from None


def finish(model: Llava, out: Path, source: Path, s, more: dict[str, dict] | None = None) -> Path:
    """Write what a run leaves, `out`/model, or `out`/adapter where adapters were trained (with s.merge `out`/model, too), then
    forget its state. Every process calls it."""
    trained, result = lora.adapters(model), out / "model"
    if trained and parallel.rank() == 0:
        result = out / "adapter"
        with checkpoint.whole_folder(result) as aside:
            found, config = lora.to_peft(model, str(source.resolve()))
            write_tensors(found, aside / "adapter_model.safetensors")
            processor = checkpoint.processor_json(model.config, s.crop)
            checkpoint.write_documents({"adapter_config.json": config} | processor | (more or {}), aside, source)
    if trained and s.merge:
        lora.merge(model)
    if not trained or s.merge:
        result = checkpoint.save(model, out / "model", source, s.crop, more)
    if parallel.rank() == 0:
        shutil.rmtree(out / "state", ignore_errors=True)
    return result


@torch.no_grad()
def restore(kept: Kept, masters: dict[str, Tensor], parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Bring weights, masters and moments to where the kept state left them -> the number of steps done; 0 where there is none."""
    if not kept.resume:
        return 0
    folder, now = latest(kept.out / "state"), kept.about
    if folder is None:
        print(f"nothing to resume in {kept.out}: starting at step 1")
        return 0
    try:
        note = json.loads((folder / "state.json").read_text())
        step, then = note["step"], note["about"]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder} is damaged ({error!r}); remove it") from None
    changed = [f"{key} ({then.get(key)} then, {now.get(key)} now)" for key in {**then, **now} if then.get(key) != now.get(key)]
    if changed:
        raise BadInput(f"{folder} is the state of another run: other {', '.join(changed)}; give the flags and files of that run, "
                       "or choose another --out")
    sharded = any(parallel.local(m) is not m for m in masters.values())
    found, places = set(), dict(tensors_of(masters, optimizer))
    for path in sorted(folder.glob(f"process-{parallel.rank() if sharded else 0}-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as f:
                for key in f.keys():
                    places[key].copy_(f.get_tensor(key))
                    found.add(key)
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:      # torn, gone, another name, another shape
            raise BadInput(f"{path} is damaged ({error}); remove {folder}") from None
    if found != set(places):
        raise BadInput(f"{folder} lacks {min(set(places) - found)} and {len(set(places) - found) - 1} more; remove it")
    for master, p in zip(masters.values(), parameters):
        if p is not master:
            p.copy_(master)
    print(f"resumed after step {step}: {folder}")
    return step


# ---- around the loop ---------------------------------------------------------------------------------------------

def metrics_file(kept: Kept | None, done: int) -> TextIO:
    """Open for the rows after step `done`; rows that a killed process wrote beyond it are cut off, so each step has one."""
    if parallel.rank() or not kept:
        return open(os.devnull, "w")
    path = kept.out / "metrics.jsonl"
    if done:
        lines = path.read_text(encoding="utf8").splitlines(keepends=True)[:done] if path.exists() else []
        if [json.loads(line)["step"] for line in lines] != list(range(1, done + 1)):
            raise BadInput(f"{path} does not hold the rows of steps 1 to {done}; put it back, or remove {path.parent}/state")
        write_whole(path, lines)
    return open(path, "a" if done else "w", encoding="utf8")


@contextmanager
def sigterm(kept: Kept | None) -> Iterator[threading.Event]:
    """Inside, SIGTERM only sets the event: a step in progress is finished."""
    came = threading.Event()
    if not kept or threading.current_thread() is not threading.main_thread():    # only there are signals heard
        yield came
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def keep(kept: Kept | None, step: int, steps: int, came: threading.Event, masters: dict[str, Tensor],
         optimizer: torch.optim.Optimizer, metrics: TextIO) -> None:
    """At the end of each step: is it time to keep the state, or to stop? After the last one there is the model itself."""
    if not kept or step == steps:
        return
    stop = any(parallel.gather(came.is_set()))
    if kept.about and (stop or kept.every and step % kept.every == 0):
        if parallel.rank() == 0:
            os.fsync(metrics.fileno())                                           # the state counts on these rows
        save(kept.out, step, kept.about, masters, optimizer)
    if stop:
        print(f"stopped by SIGTERM after step {step} of {steps}; go on with --resume")
        sys.exit(143)
