"""Results side by side: the paper's Table 4 with its own rows below ours, a radar and bars.

Numbers of two judges, or of two versions of one, are on two scales, and the judges of 2023 are
gone. So the table names the judge of every row and says when they differ, and the paper's rows
stand apart: compare differences within a block, never a number with one of the other. How long the
answers are stands beside what was judged, since judges like length.

    python evaluate.py --compare runs/evaluate/llava runs/evaluate/dpo --out runs/compare
"""
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.harness import aligned, load, shown
from common import BadInput, write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER_COLUMNS = ("mm_vet", "llava_bench", "pope", "mmbench", "mt_bench", "alpaca_eval")
PAPER = {     # Table 4 of arXiv:2402.10884, 13B
    "": ("MM-Vet", "LLaVA-Bench", "POPE", "MMBench", "MT-Bench", "AlpacaEval"),
    "Vicuna-1.5":         ("-",    "-",    "-",     "-",    "6.57", "81.4"),
    "LLaVA-1.5":          ("36.3", "73.1", "0.859", "67.4", "5.99", "79.3"),
    "LLaVA-RLHF":         ("37.2", "76.8", "0.869", "60.1", "6.18", "81.0"),
    "Standard SFT":       ("36.5", "63.7", "0.850", "65.4", "5.01", "50.2"),
    "Rejection sampling": ("38.0", "70.6", "0.883", "67.6", "6.22", "74.9"),
    "SteerLM":            ("35.2", "67.0", "0.878", "65.1", "5.70", "68.8"),
    "DPO":                ("41.2", "79.1", "0.870", "66.8", "6.73", "86.4"),
}


def paper(benches: list[str], width: int, names: int = 0) -> str:
    """The paper's rows, of these benchmarks."""
    rows = {}
    for method, values in PAPER.items():
        cells = dict(zip(PAPER_COLUMNS, values))
        rows[method] = [cells.get(name, "-") for name in benches]
    head = rows.pop("")
    return aligned(rows, head, width, names)


def judged_by(result: dict) -> str:
    """Who judged, and as which version where that is known."""
    if not result.get("judge"):
        return "-"
    versions = ", ".join(result["versions"])
    return f"{result['judge']} ({versions})" if versions else result["judge"]


def headline(result: dict | None) -> dict:
    """The official figure, which stands first."""
    nothing = {"mean": None, "ci": None}
    return next(iter(result["scores"].values()), nothing) if result else nothing


def cell(bench, result: dict | None) -> str:
    """The official figure ± 95 %, "!" where not all was scored, the length of judged answers."""
    text = shown(headline(result), bench.FORM, bench.SCALE)
    if text == "-":
        return text
    if result["coverage"] < 1:
        text += "!"
    if result.get("judge") and result["length"]:
        text += f" ({result['length']:.0f})"
    return text


def table(benches: dict, models: dict[str, dict[str, dict]]) -> str:
    """A line per model, the paper's below; models: {name: {bench: result}}."""
    columns = [name for name in benches if any(name in found for found in models.values())]
    rows, mixed = {}, []
    for model, found in models.items():
        judges = {judged_by(result): None for result in found.values() if result.get("judge")}
        rows[model] = [cell(benches[name], found.get(name)) for name in columns]
        rows[model].append("; ".join(judges) or "-")
    for name in columns:
        judges = {judged_by(found[name]) for found in models.values() if name in found}
        if len(judges - {"-"}) > 1:
            mixed.append(name)

    head = [benches[name].TITLE for name in columns]
    names = max(map(len, [*models, *PAPER]))
    lines = [
        aligned(rows, [*head, "judge"], 20, names),
        "in brackets: mean characters of an answer, for judges like length",
        "",
        "The paper, 13B models, judged by GPT-4 of 2023 "
        "(another scale: compare differences, not numbers)",
        paper(columns, 20, names),
    ]
    if mixed:
        lines.append(f"judged by different judges: {', '.join(mixed)}; "
                     "these columns cannot be compared down")
    if any(result["coverage"] < 1 for found in models.values() for result in found.values()):
        lines.append("! not everything was answered or judged; "
                     "the coverage stands in each results.json")
    return "\n".join(lines)


def radar(models: dict[str, dict[str, dict]]):
    """MT-Bench by category, 0 to 10; None where no model has it."""
    rows = {model: found["mt_bench"]["categories"] for model, found in models.items()
            if found.get("mt_bench", {}).get("categories")}
    if not rows:
        return None
    kinds = [*next(iter(rows.values()))]
    angles = np.linspace(0, 2 * np.pi, len(kinds) + 1)
    figure, axis = plt.subplots(figsize=(6.5, 5.5), subplot_kw={"polar": True})
    for model, row in rows.items():
        values = [row[kind]["mean"] for kind in kinds]
        axis.plot(angles, [*values, values[0]], marker="o", markersize=3, label=model)
    axis.set(xticks=angles[:-1], xticklabels=kinds, ylim=(0, 10))
    axis.set_title("MT-Bench by category", pad=20)
    axis.tick_params(axis="x", pad=16)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.3), frameon=False, ncols=2)
    return figure


def bars(benches: dict, models: dict[str, dict[str, dict]]):
    """One panel per benchmark, one bar per model, 95 % intervals; None where nothing was scored."""
    panels = {}
    for name in benches:
        figures = [headline(found.get(name)) for found in models.values()]
        if any(one["mean"] is not None for one in figures):
            panels[name] = figures
    if not panels:
        return None
    size = 1.5 + 2.1 * len(panels), 3.6                # inches
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    colors = [f"C{k}" for k in range(len(models))]
    for axis, (name, figures) in zip(axes[0], panels.items()):
        means = [benches[name].SCALE * (one["mean"] or 0) for one in figures]
        spreads = [benches[name].SCALE * (one["ci"] or 0) for one in figures]
        drawn = axis.bar(colors, means, yerr=spreads, color=colors, capsize=3)
        axis.set(title=benches[name].TITLE, xticks=[])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(drawn, models, loc="lower center", ncols=min(4, len(models)), frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


def run(benches: dict, folders: list, out: Path) -> None:
    """Print the table of some result folders and draw the figures into `out`."""
    models = {}
    for folder in map(Path, folders):
        if not (folder / "results.json").is_file():
            raise BadInput(f"--compare {folder}: holds no results.json; evaluate.py writes one")
        name = str(folder) if folder.name in models else folder.name
        results = load(folder / "results.json")["results"]
        models[name] = {result["bench"]: result for result in results}
    text = table(benches, models)
    write_whole(out / "table.txt", text + "\n")
    said = f"table: {out}/table.txt"
    for name, figure in {"radar": radar(models), "bars": bars(benches, models)}.items():
        if figure:
            figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
            plt.close(figure)
            said += f"   {name}: {out}/{name}.png"
    print(f"{text}\n{said}")
