"""The boring lines, named so: flags, devices, files that are whole or not there, a way to say no.

Nothing here is about preferences or images. A script's settings are one dataclass: `flags` turns
its fields into --flags and their trailing comments into --help, so that default, type and help have
one source.
"""
import argparse
import dataclasses
import fcntl
import hashlib
import inspect
import json
import os
import platform
import re
import reprlib
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

# Threads that spin while they wait for each other take the core from whatever else runs on the
# machine; threads that sleep at once wake too late, thousands of times a step. So let them spin for
# a part of a millisecond, in which most waits are over, and then sleep (LOG.md). OpenMP's runtime
# reads these variables once, when it is loaded; so every script imports this file first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# A bar: on a terminal alone, which is tqdm's None, and of several processes by the first.
progress = partial(tqdm, disable=os.environ.get("RANK", "0") != "0" or None)


class BadInput(ValueError):
    """Something the user gave cannot be used. The message names file, record and remedy."""


# ---- a script: settings from flags, trouble as one message ---------------------------------------

def main(settings, run):
    """Run a script: parse its flags, call run(settings), end with one message for a BadInput."""
    # A letter that the terminal cannot show is spelled out; it is no reason for a traceback.
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")

    try:
        return run(flags(settings))
    except BadInput as problem:
        message = str(problem)
    except BrokenPipeError:                              # ... | head
        os._exit(0)
    except OSError as problem:                           # a full disk, no permission, ...
        said = problem.strerror or problem
        message = f"{problem.filename or ''}: {said}; nothing that was finished is lost"
    except KeyboardInterrupt:
        message = "interrupted; finished files are whole, the rest can be run again"

    # Of several processes the first speaks, and torchrun ends the others, unless the trouble is
    # theirs alone.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def flags(settings, argv=None):
    """Build the dataclass `settings` from --name value flags; an unknown flag or a wrong type is an
    error."""
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(settings),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comments = trailing_comments(settings)
    for field in dataclasses.fields(settings):
        how = {"type": field.type, "metavar": field.type.__name__}
        if field.type is bool:
            how = {"type": on_or_off, "nargs": "?", "const": True, "metavar": "0|1"}
        elif field.type is tuple:
            how = {"type": str, "nargs": "+", "metavar": "PATH"}
        note = f"{comments[field.name]} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=field.default, help=note, **how)
    return settings(**vars(parser.parse_args(argv)))


def trailing_comments(settings):
    """{name: comment} of every `name: type = value   # comment` in a dataclass and its bases."""
    found = {}
    for kind in reversed(settings.__mro__[:-1]):         # bases first, heirs speak over them
        for line in inspect.getsource(kind).splitlines():
            match = re.match(r"    (\w+):[^#]*#\s*(.*)", line)
            if match:
                found[match[1]] = match[2]
    return found


def on_or_off(text):
    """A switch: --pairs and --pairs 1 are on, --pairs 0 is off."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text}: 0 or 1")
    return text == "1"


# ---- where and how to compute --------------------------------------------------------------------

def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype name. "auto": a GPU if there is one; bf16 on it, fp32 on a CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {device}: {reason}; try --device cpu") from None

    if dtype == "bfloat16" and where.type == "cpu":
        print(
            "note: few CPUs multiply in bfloat16; on others --dtype float32 is many times faster",
            file=sys.stderr,
        )
    return where, dtype_of(dtype, where)


def dtype_of(dtype: str, device: torch.device) -> torch.dtype:
    """What --dtype names on that device."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def hardware():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    chip = platform.processor()
    if platform.system() == "Linux":                     # where that is empty
        found = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
        chip = found[1] if found else chip
    return f"{chip}, {os.cpu_count()} cores"


def describe_run(settings, **more):
    """What a run's config.json holds: all that tells this run from another."""
    git = subprocess.run(                                # by a shell, which forgives a missing git
        "git describe --always --dirty",
        shell=True,
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": dataclasses.asdict(settings) if settings else {},
        "commit": git.stdout.strip() or "unknown",
        "hardware": hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **more,
    }


# ---- what others wrote ---------------------------------------------------------------------------

LARGEST = 2 ** 63        # what arithmetic takes; JSON may hold thousands of digits, inf and NaN
KINDS = {
    "anything": lambda x: True,
    "a text": lambda x: isinstance(x, str),
    "a list": lambda x: isinstance(x, list),
    "an object": lambda x: isinstance(x, dict),
    "true or false": lambda x: isinstance(x, bool),
    "a number": lambda x: type(x) in (int, float) and abs(x) < LARGEST,
    "a positive number": lambda x: type(x) in (int, float) and 0 < x < LARGEST,
    "a whole number": lambda x: type(x) is int and abs(x) < LARGEST,
    "a positive whole number": lambda x: type(x) is int and 0 < x < LARGEST,
    "a name or number": lambda x: type(x) in (int, str),
    "a number or null": lambda x: x is None or KINDS["a number"](x),
    "a list of texts": lambda x: isinstance(x, list) and every("a text", x),
    "a list of numbers": lambda x: isinstance(x, list) and every("a number", x),
    "two numbers": lambda x: isinstance(x, list) and len(x) == 2 and every("a number", x),
    "whole numbers by name": lambda x: isinstance(x, dict) and every("a whole number", x.values()),
}


def every(kind, values):
    return all(map(KINDS[kind], values))


def field(row: dict, name: str, kind: str, where, *default):
    """row[name], which must be of a kind of KINDS; where it is missing or null, the default if one
    is given. Raises BadInput, which says where, the field and what stands there instead."""
    value = row.get(name) if isinstance(row, dict) else None
    if value is None and default:
        return default[0]
    if not KINDS[kind](value):
        absent = not isinstance(row, dict) or name not in row
        found = "missing" if absent else shown(reprlib.repr(value)).replace("None", "null")
        raise BadInput(f"{where}: {name} is {found}, but must be {kind}")
    return value


def read_json(path: Path, remedy: str = "") -> dict:
    """A JSON object. Raises BadInput naming the file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}{remedy}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON ({error}){remedy}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} must hold an object, and holds {reprlib.repr(found)}{remedy}")
    return found


def shown(text: str, most: int = 60) -> str:
    """What somebody else wrote, for a message: on one line, escaped, cut to `most` letters."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most + 1])
    return text if len(text) <= most else f"{text[:most]}..."


# ---- files ---------------------------------------------------------------------------------------

LOCKS = {}               # folder -> its open lock file, held until this process ends


def lock(folder: Path):
    """Make a run's folder, and have it for this process alone: another one that asks for it, before
    this one ends, gets a BadInput. A killed process holds nothing."""
    folder = Path(folder).resolve()
    if folder in LOCKS:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    hold(file, folder)
    LOCKS[folder] = file


def hold(file, name):
    """Lock an open file until it is closed. Raises BadInput, with this name, where another has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BadInput(
            f"{name} is being written by another process; wait for it, or choose another --out"
        ) from None


def write_whole(path: Path, text: str | Iterable[str]):
    """Text, or pieces of it -> a file that appears complete or not at all: written aside, flushed
    to disk, renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with open(aside, "w", encoding="utf8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, document):
    write_whole(path, json.dumps(document, indent=1) + "\n")


def write_jsonl(path: Path, rows):
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    with open(path, encoding="utf8") as file:
        return [json.loads(line) for line in file if line.strip()]


def sha(*parts: bytes | str) -> str:
    """16 hex digits that name these parts, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))      # ("ab", "c") is not ("a", "bc")
        digest.update(data)
    return digest.hexdigest()[:16]
