"""Results side by side: the paper's Table 4, with its own rows below ours.

Numbers of two judges, or of two versions of one, are on two scales, and the judges of 2023 are
gone. So the table names the judge of every row and says when they differ, and the paper's rows
stand apart: compare differences within a block, never a number with one of the other. How long the
answers are stands beside what was judged, since judges like length.

    python evaluate.py --compare runs/evaluate/llava runs/evaluate/dpo --out runs/compare
"""
from collections import defaultdict
from pathlib import Path

from benchmarks.harness import aligned, load, shown
from common import write_whole

COLUMNS = {
    "mm_vet": "MM-Vet",
    "llava_bench": "LLaVA-Bench",
    "pope": "POPE",
    "mmbench": "MMBench",
    "mt_bench": "MT-Bench",
    "alpaca_eval": "AlpacaEval",
}
PAPER = {     # Table 4 of arXiv:2402.10884, 13B
    "Vicuna-1.5":         ("-",    "-",    "-",     "-",    "6.57", "81.4"),
    "LLaVA-1.5":          ("36.3", "73.1", "0.859", "67.4", "5.99", "79.3"),
    "LLaVA-RLHF":         ("37.2", "76.8", "0.869", "60.1", "6.18", "81.0"),
    "Standard SFT":       ("36.5", "63.7", "0.850", "65.4", "5.01", "50.2"),
    "Rejection sampling": ("38.0", "70.6", "0.883", "67.6", "6.22", "74.9"),
    "SteerLM":            ("35.2", "67.0", "0.878", "65.1", "5.70", "68.8"),
    "DPO":                ("41.2", "79.1", "0.870", "66.8", "6.73", "86.4"),
}


def titles(benches):
    """As the paper calls them; others by their own name."""
    return [COLUMNS.get(name, name) for name in benches]


def paper(benches: list[str], width: int, names: int = 0) -> str:
    """The paper's rows, of these benchmarks."""
    rows = {}
    for method, values in PAPER.items():
        cells = dict(zip(COLUMNS, values))
        rows[method] = [cells.get(name, "-") for name in benches]
    return aligned(rows, titles(benches), width, names)


def judged_by(result):
    """Who judged, and as which version where that is known."""
    judge = result.get("judge") or "-"
    versions = result.get("versions")
    return f"{judge} ({', '.join(versions)})" if versions else judge


def cell(bench, result):
    """The official figure, which stands first, ± 95 %; "!" where not all was scored; the length of
    judged answers."""
    if not result or not result["scores"]:
        return "-"
    text = shown([*result["scores"].values()][0], bench.FORM, bench.SCALE)
    if text == "-":
        return text
    if result["coverage"] < 1:
        text += "!"
    if result.get("judge") and result["length"]:
        text += f" ({result['length']:.0f})"
    return text


def table(benches, models):
    """A line per model, the paper's below; models: {name: {bench: result}}."""
    columns = [name for name in benches if any(name in found for found in models.values())]
    rows = {}
    judges = defaultdict(set)                          # of each column
    for model, found in models.items():
        mine = {}                                      # of this row: a set that keeps its order
        for name, result in found.items():
            if result.get("judge"):
                mine[judged_by(result)] = True
                judges[name].add(judged_by(result))
        rows[model] = [cell(benches[name], found.get(name)) for name in columns]
        rows[model].append("; ".join(mine) or "-")

    names = max(map(len, [*models, *PAPER]))
    lines = [
        aligned(rows, [*titles(columns), "judge"], 20, names),
        "in brackets: mean characters of an answer, for judges like length; "
        "!: not everything was answered or judged",
        "",
        "The paper, 13B models, judged by GPT-4 of 2023 "
        "(another scale: compare differences, not numbers)",
        paper(columns, 20, names),
    ]
    mixed = [name for name in columns if len(judges[name]) > 1]
    if mixed:
        lines.append(f"judged by different judges: {', '.join(mixed)}; "
                     "these columns cannot be compared down")
    return "\n".join(lines)


def run(benches, folders, out):
    """Print the table of some result folders, and write it to table.txt in `out`."""
    models = {}
    for folder in map(Path, folders):
        name = str(folder) if folder.name in models else folder.name
        results = load(folder / "results.json")["results"]
        models[name] = {result["bench"]: result for result in results}
    text = table(benches, models)
    write_whole(out / "table.txt", text + "\n")
    print(f"{text}\ntable: {out}/table.txt")
