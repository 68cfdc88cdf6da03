"""The repository tells the truth about itself: arrows, reading order, flags, sizes, signposts.

    python -m pytest tests/test_repo.py -q
"""
import ast
import importlib
import json
import re
import sys
from dataclasses import fields
from functools import cache
from graphlib import TopologicalSorter

import pytest

from conftest import ROOT

FILES = sorted(f for folder in (".", "kernels", "judge", "benchmarks", "toy") for f in (ROOT / folder).glob("*.py"))
NAMES = [str(f.relative_to(ROOT)) for f in FILES]
README = (ROOT / "README.md").read_text(encoding="utf8") if (ROOT / "README.md").is_file() else ""
TOUR = [a for a, b in re.findall(r"^\|.*?\[`(\S+?\.py)`\]\((\S+?\.py)\)", README, re.M) if a == b]
OPPONENTS = {"transformers", "trl", "datasets", "peft"}                          # only speed.py runs against them


@cache
def imports(name: str) -> frozenset[str]:
    """Our files that a file imports anywhere in it, functions included. `import kernels` is kernels/__init__.py."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = {m.replace(".", "/") + end for m in modules for end in (".py", "/__init__.py")}
    return frozenset(paths & set(NAMES)) - {name}


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf8"))) or ""


# ---- arrows and reading order ----------------------------------------------------------------------------------

def test_our_imports_form_a_dag():
    order = [*TopologicalSorter({name: imports(name) for name in NAMES}).static_order()]         # raises CycleError
    assert set(order) == set(NAMES) and "data.py" in imports("dpo.py"), "the arrows are seen at all"


def test_kernels_import_nothing_of_ours():
    for name in NAMES:
        if name.startswith("kernels/"):
            assert all(other.startswith("kernels/") for other in imports(name)), name


def test_the_tour_lists_every_file_once():
    assert sorted(TOUR) == NAMES


# ---- words -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_every_file_opens_with_a_docstring(name):
    assert len(docstring(name).splitlines()[0]) > 20, f"{name} does not say what it is"


def commands() -> list[tuple[str, str, list[str]]]:
    """(where, script, flags) of every `python x.py --flag ...` in README and in the docstrings."""
    texts = {"README.md": README} | {name: docstring(name) for name in NAMES}
    return [(where, script, re.findall(r"(?<!\S)--(\w+)", rest)) for where, text in texts.items()
            for script, rest in re.findall(r"\bpython3? ((?:[\w-]+/)*\w+\.py)((?:[^\n`&#]|\\\n)*)", text)]


def flags_of(name: str) -> set[str]:
    """The flags of a script: the fields of its Settings, and of its Story where it has one. Kernels have none, and may need triton."""
    if name.startswith("kernels/"):
        return set()
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    return {f.name for kind in ("Settings", "Story") if hasattr(module, kind) for f in fields(getattr(module, kind))}


def test_every_command_shown_names_a_script_and_real_flags():
    found = commands()
    for where, script, flags in found:
        assert script in NAMES, f"{where} runs {script}, which does not exist"
        unknown = set(flags) - flags_of(script)
        assert not unknown, f"{where}: {script} has no --{', --'.join(unknown)}"
    assert {"ckpt", "data", "out"} <= {flag for _, script, flags in found if script == "dpo.py" for flag in flags}


def test_flags_that_messages_and_comments_speak_of_exist():
    """"set --image_root", "lower --lr": advice must be takeable."""
    known = set().union(*map(flags_of, NAMES)) | {"nproc_per_node"}      # which is torchrun's
    for name in set(NAMES) - {"common.py"}:                              # which speaks of flags as such, and of git's
        spoken = set(re.findall(r"(?<![\w-])--([a-z]\w*)", (ROOT / name).read_text(encoding="utf8")))
        assert spoken <= known, f"{name} speaks of --{', --'.join(spoken - known)}"


def test_links_in_the_readme_lead_somewhere():
    links = [x for x in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in x]
    assert links and not [x for x in links if not (ROOT / x).exists()]


# ---- requirements ----------------------------------------------------------------------------------------------

def requirements() -> list[str]:
    return [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.split("#")[0].strip()]


def test_torch_and_triton_are_pinned_and_triton_only_where_it_exists():
    assert "torch==2.13.0" in requirements()
    assert 'triton==3.7.1; platform_system == "Linux"' in requirements()


def test_requirements_are_what_the_code_imports():
    """And nothing that only tests compare with: transformers, trl and peft stay out of our files."""
    known = {"pillow": "PIL"}
    required = {known.get(n, n) for n in (re.split(r"[=<>;\s]", line)[0] for line in requirements())}
    imported = set()
    for name in NAMES:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf8"))):
            for module in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                           [node.module] if isinstance(node, ast.ImportFrom) else []):
                imported.add(module.split(".")[0])
    ours = {name.split("/")[0].removesuffix(".py") for name in NAMES}
    assert imported - set(sys.stdlib_module_names) - ours - OPPONENTS <= required
    for name in set(NAMES) - {"speed.py"}:
        assert not re.search(rf"^\s*(import|from) ({'|'.join(OPPONENTS)})\b", (ROOT / name).read_text(encoding="utf8"), re.M), name


def test_the_readmes_table_is_drawn_from_results():
    """The story's table in the README is miniature.table of what the command wrote, first line of results/story.jsonl."""
    from toy import items as miniature
    with open(ROOT / "results" / "story.jsonl", encoding="utf8") as f:
        rows = json.loads(f.readline())["scores"]
    readme = [line.strip() for line in README.splitlines()]
    for line in miniature.table(rows).splitlines():
        assert line.strip() in readme, f"not in README.md: {line}"


def test_the_readmes_look_at_the_pairs_is_drawn_from_results():
    """Lines of `python annotate.py` in the README are pairs.show of the pairs.json that it wrote."""
    from judge import report as pairs
    said = pairs.show(json.loads((ROOT / "results" / "pairs.json").read_text())["pairs"])
    shown = [line.strip() for line in README.split("`--pairs` prints")[1].split("With several GPUs")[0].splitlines() if line.startswith("    ")]
    assert len(shown) >= 6 and all(line in ("...", *map(str.strip, said.splitlines())) for line in shown)
