"""A newcomer's path: the commands of the README and of docs/, run as they are written, one after the other.

    SLOW=1 python -m pytest tests/test_readme.py -q         some minutes; without SLOW it only looks at them

Only what works on what is shipped is run: no real checkpoint, judge or question file. The forks of docs/forking.md are
test_docs.py's.
"""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from urllib.request import urlopen

import pytest

from conftest import ROOT

PAGES = ("docs/experiment.md", "docs/annotate.md", "docs/walkthrough.md", "README.md")
WANTING = r"llava-1\.5|vicuna-7b|\bMODEL\b|\bDATA\b|\bDIR\b|(?<!/)\bprompts\.jsonl|localhost"     # what a newcomer has not
LONG = r"^python (reproduce\.py|speed\.py|-m toy\.build)"                                          # what takes many minutes


def commands() -> list[str]:
    """Each once, in order, without its remark."""
    found = []
    for page in PAGES:
        lines = re.findall(r"^    (?:pip install \S+ \S+ && )?(python .*)", (ROOT / page).read_text(encoding="utf8"), re.M)
        found += [re.split(r"\s{3,}", line.strip())[0] for line in lines]
    return [line for line in dict.fromkeys(found) if not re.search(WANTING, line) and not re.search(LONG, line)]


def test_the_pages_show_commands_that_need_nothing():
    shown = commands()
    assert "python story.py" in shown and "python -m toy.tasks --out runs/prompts" in shown
    for script in ("annotate.py", "sft.py", "rejection.py", "steerlm.py", "dpo.py", "evaluate.py", "chat.py"):
        assert any(line.startswith(f"python {script} ") for line in shown), script


def look_at_the_page(words, folder):
    """It says where it is, is there, and ends with Ctrl+C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs are started deaf to it
    server = subprocess.Popen([words[0], "-u", *words[1:]], cwd=folder, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    said = server.stdout.readline()
    with urlopen(re.search(r"http://\S+", said)[0]) as page:
        assert b"New conversation" in page.read()
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="some minutes; SLOW=1 runs it")
def test_the_commands_run_as_written(tmp_path):
    for path in (*ROOT.glob("*.py"), *map(ROOT.joinpath, ("benchmarks", "docs", "judge", "kernels", "toy"))):
        (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    for line in commands():
        words = [sys.executable, *shlex.split(line)[1:]]
        if "--web" in words:
            look_at_the_page(words, tmp_path)
            continue
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, input="/draw\n/quit\n")
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "runs/annotate/board.html").exists() and (tmp_path / "runs/aligned/model/model.safetensors").exists()
