"""The boring lines, named so: flags, seeds, files that appear whole or not at all, one way to say no.

Nothing here is about preferences or images; the tour of the rest begins with toy/world.py. Every script's settings are one
dataclass; `flags` turns its fields into --flags and its trailing comments into --help, so that default, type and help
have one source.
"""
import argparse
import dataclasses
import errno
import fcntl
import hashlib
import inspect
import json
import math
import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

# Threads that spin while they wait for each other crawl as soon as anything else runs on the machine: let them sleep, but not
# before some microseconds, in which most waits are over (LOG.md).
# OpenMP's runtime and tqdm read these once, when they are loaded, so every script imports this file first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if os.environ.get("RANK", "0") != "0":                                       # of several processes the first alone draws bars
    os.environ["TQDM_DISABLE"] = "1"

import torch

HERE = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BadInput(ValueError):
    """Something the user gave cannot be used. The message names the file, the record's id and the remedy."""


def only(raw: dict, where, remedy: str = "", **known) -> None:
    """What a config file says under these names, if anything, must be the one value that this code computes. Raises BadInput."""
    for name, value in known.items():
        if (raw.get(name) or value) != value:
            raise BadInput(f"{where}: {name} is {raw[name]!r}, and only {value!r} is known here{remedy}")


def main(settings: type, run) -> None:
    """Run a script: parse its flags, call run(settings), print a BadInput as one message, exit with 1."""
    for stream, how in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):       # a letter that a terminal does not know
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=how)
    try:
        return run(flags(settings))
    except BadInput as problem:
        message = str(problem)
    except OSError as problem:                               # a full disk, a folder that may not be written, --out a file
        message = f"{problem.filename or ''}: {problem.strerror or problem}; nothing that was finished is lost"
    except KeyboardInterrupt:
        message = "interrupted; finished files are whole, the rest can be run again"
    if os.environ.get("RANK", "0") != "0":                   # of several processes the first speaks, and torchrun ends the
        time.sleep(3)                                        # others, unless the trouble is theirs alone
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def flags(settings: type, argv: list[str] | None = None):
    """Build the dataclass `settings` from --name value flags; an unknown flag or a wrong type is an error."""
    notes = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", "".join(map(inspect.getsource, settings.__mro__[-2::-1])), re.M))
    parser = argparse.ArgumentParser(description=inspect.getdoc(settings), allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(settings):
        note = f"{notes.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        switch = {"type": on_or_off, "nargs": "?", "const": True, "metavar": "0|1"} if field.type is bool else {}
        switch = {"type": str, "nargs": "+", "metavar": "DIR"} if field.type is tuple else switch
        parser.add_argument(f"--{field.name}", **{"type": field.type, "metavar": field.type.__name__} | switch,
                            default=field.default, help=note)
    return settings(**vars(parser.parse_args(argv)))


def on_or_off(text: str) -> bool:
    """A switch: --pairs and --pairs 1 are on, --pairs 0 is off, anything else a ValueError."""
    return bool(("0", "1").index(text))


# ---- where and how to compute ----------------------------------------------------------------------------

def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """'auto' means the GPU if there is one; fp32 on the CPU, bf16 elsewhere."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: {str(error).splitlines()[0]}; try --device cpu") from None
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if dtype == "bfloat16" and not multiplies_bf16(where):
        print("note: this CPU has no bfloat16 instructions; --dtype float32 is many times faster on it", file=sys.stderr)
    return where, DTYPES[dtype]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products are done in hardware there."""
    return device.type != "cpu" or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def schedule(step: int, steps: int, warmup: float = 0.03, floor: float = 0.0) -> float:
    """Learning-rate factor of step 0, 1, ..., steps-1: linear warm-up over a share of the steps, then cosine."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def masters(parameters: list) -> list:
    """What an optimizer updates: the parameters themselves in fp32, fp32 copies of 16-bit ones. A 16-bit weight of 1 cannot
    be moved by 5e-7, the next number being 0.004 away; its fp32 master can, and carries it over the edge in time. The master
    holds the gradient, too: each backward's is added to it in fp32 as soon as it is known, and let go, weight by weight."""
    def lift(master, p):
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None
    wide = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in parameters]
    for m, p in zip(wide, parameters):
        if m is not p:
            p.register_post_accumulate_grad_hook(partial(lift, m))
    return wide


def adamw(named: dict, lr: float, projector_lr: float = 0.0, weight_decay: float = 0.0, **how) -> torch.optim.AdamW:
    """AdamW for tensors by name: the projector may have a peak rate of its own (0: the others'), vectors do not decay. The
    moments are in place before the first step: what a run needs is taken at once, and can be kept."""
    groups = {}                                                          # (peak rate, decay) -> tensors
    for name, p in named.items():
        peak = projector_lr if projector_lr and name.startswith("multi_modal_projector.") else lr
        groups.setdefault((peak, weight_decay if p.ndim > 1 else 0.0), []).append(p)
    optimizer = torch.optim.AdamW([{"params": group, "peak": peak, "weight_decay": decay}
                                   for (peak, decay), group in groups.items()], lr=lr, fused=True, **how)
    for p in named.values():
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def update(optimizer: torch.optim.Optimizer, masters: list, parameters: list) -> None:
    """One optimizer step on the masters, rounded back into the parameters."""
    optimizer.step()
    with torch.no_grad():
        for m, p in zip(masters, parameters):
            if m is not p:
                p.copy_(m)
    for p in (*masters, *parameters):
        p.grad = None


# ---- files ---------------------------------------------------------------------------------------------------

def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """The file appears complete or not at all: written aside, flushed to disk, renamed. Text, or pieces of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with open(aside, "w", encoding="utf8") as f:
        f.writelines([text] if isinstance(text, str) else text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def each_jsonl(path: Path) -> Iterator[dict]:
    """The rows of a file, one in memory."""
    with open(path, encoding="utf8") as f:
        yield from (json.loads(line) for line in f if line.strip())


def read_jsonl(path: Path) -> list[dict]:
    return list(each_jsonl(path))


class OnDisk(Sequence):
    """A sequence that grows at its end. Its items stand pickled in a nameless file in `folder`, gone with the process; memory
    holds 8 bytes of each. Every look makes the item anew, in any thread. Raises OSError naming `folder` where it is full."""

    def __init__(self, folder: Path, items: Iterable = ()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.folder, self.ends = str(folder), array("Q", [0])
        self.file = tempfile.TemporaryFile(dir=folder)
        for item in items:
            self.append(item)

    def append(self, item) -> None:
        data, at = pickle.dumps(item, pickle.HIGHEST_PROTOCOL), self.ends[-1]
        try:
            if os.pwrite(self.file.fileno(), data, at) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.folder) from None    # the file has no name to speak of
        self.ends.append(at + len(data))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, k: int):
        k = range(len(self))[k]
        return pickle.loads(os.pread(self.file.fileno(), self.ends[k + 1] - self.ends[k], self.ends[k]))


def journal_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(where it ends, row) of every row in a journal; a last line that a kill has torn is left out. Raises BadInput."""
    end = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row, end = json.loads(line), end + len(line)
                row["key"]
            except (ValueError, KeyError, TypeError):
                raise BadInput(f"{path}: line {number} is damaged; remove that line and run again") from None
            yield end, row


class Journal:
    """A file of JSON lines that survives kill -9: a row is on the disk before `append` returns, a torn last line is cut off
    when the file is opened again, one process writes at a time. Rows have a "key"; `journal[key]` is the last row of that
    key, read back from the disk, so that memory holds only where each row stands. Any thread may append.
    """

    def __init__(self, path: Path):
        self.path, self.at, self.size, self.lock = Path(path), {}, 0, threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{self.path} is being written by another process; wait for it, or choose another --out") from None
        for end, row in journal_rows(self.path):
            self.note(row, end)
        os.ftruncate(self.fd, self.size)

    def note(self, row: dict, end: int) -> None:
        if self.seen(row):
            self.at[row["key"]] = self.size
        self.size = end

    def seen(self, row: dict) -> bool:
        """Called once for every row, found or appended: does it stand for its key from now on?"""
        return True

    def append(self, row: dict) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self.lock:
            try:
                if os.write(self.fd, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                os.ftruncate(self.fd, self.size)                         # no half line for the next one to grow onto
                raise
            self.note(row, self.size + len(line))
        os.fsync(self.fd)                                                # side by side: file systems join what waits for the disk

    def __contains__(self, key: str) -> bool:
        return key in self.at

    def __getitem__(self, key: str) -> dict:
        with open(self.path, "rb") as f:
            f.seek(self.at[key])
            return json.loads(f.readline())

    def close(self) -> None:
        os.close(self.fd)


def sha(*parts: bytes | str) -> str:
    return sha_of(parts)


def sha_of(parts: Iterable[bytes | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    chips = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else []
    return f"{(chips or [platform.processor()])[0]}, {os.cpu_count()} cores"


def describe_run(settings, **more) -> dict:
    """What a run's config.json holds: settings, versions, hardware, commit, command, and whatever else tells runs apart."""
    try:
        git = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:                                                      # no git on this machine
        commit = "unknown"
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": dataclasses.asdict(settings) if settings else {},
            "commit": commit, "hardware": hardware(), "python": platform.python_version(),
            "torch": torch.__version__, "threads": torch.get_num_threads(), **more}
