"""A newcomer's path: the commands of the README, run as they are written, one after the other.

    SLOW=1 python -m pytest tests/test_readme.py -q         some minutes; without SLOW it skips itself

Only the commands on the miniature are run: those for real checkpoints need one.
"""
import os
import re
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf8")


def commands(section: str) -> list[str]:
    """The `python x.py ...` lines of a section that work on what is shipped, without their remarks."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    found = [re.split(r"\s{3,}", line.strip())[0] for line in text.splitlines() if line.startswith("    python ")]
    return [line for line in found if "llava-1.5" not in line and "prompts.jsonl" not in line and "reproduce.py" not in line]


def test_the_readme_shows_commands_that_need_nothing():
    assert commands("Preferences of your own")[0] == "python annotate.py" and len(commands("The rivals, and the whole experiment")) == 6


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="some minutes; SLOW=1 runs it")
def test_the_commands_on_the_miniature_run_as_written(tmp_path):
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    for line in commands("Preferences of your own") + commands("The rivals, and the whole experiment"):
        done = subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, capture_output=True, text=True,
                              input="/draw\n/quit\n")
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "board.html").exists() and (tmp_path / "runs" / "aligned" / "model" / "model.safetensors").exists()
