"""Results side by side: the layout of the paper's Table 4, its own rows below ours, a radar and bars.

Numbers of two judges, or of two versions of one, are on two scales, and the judges of 2023 are gone. So the table names the
judge of every row and says when they differ, and the paper's rows stand apart: compare differences within a block, never a
number with one of the other. How long the answers are stands beside what was judged, since judges like length.

    python evaluate.py --compare runs/evaluate/llava runs/evaluate/dpo --out runs/compare

Previous: vision_benchmarks.py.  Next: evaluate.py (the harness).
"""
import math
from pathlib import Path

import matplotlib

import miniature
from harness import load, shown
from common import BadInput, write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = {   # title, format, the end of its scale
    "mm_vet": ("MM-Vet", "5.1f", 100), "llava_bench": ("LLaVA-Bench", "5.1f", 120), "pope": ("POPE", "5.3f", 1),
    "mmbench": ("MMBench", "5.1f", 100), "mt_bench": ("MT-Bench", "5.2f", 10), "alpaca_eval": ("AlpacaEval", "5.1f", 100)}
SCALE = {"mmbench": 100}             # the paper prints it in %
PAPER = {   # Table 4 of arXiv:2402.10884, 13B: MT-Bench (1 to 10), AlpacaEval (%), MM-Vet, LLaVA-Bench, POPE (F1), MMBench (%)
    "Vicuna-1.5": (6.57, 81.4), "LLaVA-1.5": (5.99, 79.3, 36.3, 73.1, 0.859, 67.4),
    "LLaVA-RLHF": (6.18, 81.0, 37.2, 76.8, 0.869, 60.1), "Standard SFT": (5.01, 50.2, 36.5, 63.7, 0.850, 65.4),
    "Rejection sampling": (6.22, 74.9, 38.0, 70.6, 0.883, 67.6), "SteerLM": (5.70, 68.8, 35.2, 67.0, 0.878, 65.1),
    "DPO": (6.73, 86.4, 41.2, 79.1, 0.870, 66.8)}
ORDER = ("mt_bench", "alpaca_eval", "mm_vet", "llava_bench", "pope", "mmbench")          # of the figures in PAPER


def headline(result: dict) -> dict | None:
    """The official figure, on the scale of the paper's table."""
    if not result["scores"]:
        return None
    first, k = next(iter(result["scores"].values())), SCALE.get(result["bench"], 1)
    return {key: value and value * k if key != "n" else value for key, value in first.items()}


def judged_by(result: dict) -> str:
    """Who judged, and as which version where that is known."""
    if not result.get("judge"):
        return "-"
    return result["judge"] + (f" ({', '.join(result['versions'])})" if result["versions"] else "")


def table(models: dict[str, list[dict]]) -> str:
    """Official figures ± 95 %, and the mean length of judged answers; "!" where less than all was scored."""
    width, cells = max(map(len, [*models, *PAPER])), {name: {r["bench"]: r for r in results} for name, results in models.items()}
    have = {bench for row in cells.values() for bench in row}
    columns = {bench: about for bench, about in COLUMNS.items() if bench in have}
    lines = [" " * width + "".join(f"{title:>20}" for title, *_ in columns.values()) + "   judge"]
    for name, row in cells.items():
        line, judges = f"{name:<{width}}", {}
        for bench, (_, form, _) in columns.items():
            figure, found = (headline(row[bench]), row[bench]) if bench in row else (None, {})
            cell = shown(figure, form) + "!" * (found["coverage"] < 1) if figure else "-"
            if figure and found.get("judge"):
                cell += f" ({found['length']:.0f})" if found["length"] else ""
                judges[judged_by(found)] = True
            line += f"{cell:>20}"
        lines.append(f"{line}   {'; '.join(judges) or '-'}")
    lines.append("in brackets: mean characters of an answer, for judges like length")
    lines += ["", "The paper, 13B models, judged by GPT-4 of 2023 (another scale: compare differences, not numbers)"]
    for name, values in PAPER.items():
        paper = dict(zip(ORDER, values))
        lines.append(f"{name:<{width}}" + "".join(
            f"{f'{paper[bench]:{form}}' if bench in paper else '-':>20}" for bench, (_, form, _) in columns.items()))
    judges = {(r["bench"], r["judge"], *r["versions"]) for results in models.values() for r in results if r.get("judge")}
    mixed = sorted({bench for bench, *rest in judges if sum(bench == other[0] for other in judges) > 1})
    if mixed:
        lines.append(f"judged by different judges: {', '.join(mixed)}; these columns cannot be compared down")
    if any(r["coverage"] < 1 for results in models.values() for r in results):
        lines.append("! not everything was answered or judged; the coverage stands in each results.json")
    return "\n".join(lines)


def radar(models: dict[str, list[dict]]):
    """MT-Bench by category, 0 to 10; None where no model has it."""
    rows = {name: r["categories"] for name, results in models.items() for r in results
            if r["bench"] == "mt_bench" and len(r.get("categories", {})) > 2}
    if not rows:
        return None
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    angles = [2 * math.pi * k / len(kinds) for k in range(len(kinds))]
    figure, axis = plt.subplots(figsize=(6.5, 5.5), subplot_kw={"polar": True})
    for name, row in rows.items():
        values = [row[kind]["mean"] if kind in row else math.nan for kind in kinds]
        axis.plot(angles + angles[:1], values + values[:1], marker="o", markersize=3, label=name)
    axis.set(xticks=angles, xticklabels=kinds, ylim=(0, 10))
    axis.set_title("MT-Bench by category", pad=20)
    axis.tick_params(axis="x", pad=16)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.3), frameon=False, ncols=2)
    return figure


def bars(models: dict[str, list[dict]]):
    """One panel per benchmark, one bar per model, 95 % intervals; None where nothing was scored."""
    found = {bench: {name: e for name, results in models.items() for r in results
                     if r["bench"] == bench and (e := headline(r)) and e["mean"] is not None} for bench in COLUMNS}
    found = {bench: rows for bench, rows in found.items() if rows}
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(1.5 + 2.1 * len(found), 3.6), squeeze=False)
    colors = {name: f"C{k}" for k, name in enumerate(models)}
    for axis, (bench, rows) in zip(axes[0], found.items()):
        axis.bar([list(models).index(name) for name in rows], [e["mean"] for e in rows.values()], capsize=3,
                 yerr=[e["ci"] or 0 for e in rows.values()], color=[colors[name] for name in rows])
        top = max(COLUMNS[bench][2], *(1.05 * (e["mean"] + (e["ci"] or 0)) for e in rows.values()))
        axis.set(title=COLUMNS[bench][0], xticks=[], xlim=(-0.6, len(models) - 0.4), ylim=(0, top))
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(handles, colors, loc="lower center", ncols=min(4, len(colors)), frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


def run(folders: list, out: Path) -> None:
    """Print the table of some result folders and draw the figures into `out`. Raises BadInput where there is nothing."""
    models, minis = {}, {}
    for folder in map(Path, folders):
        found = [p for p in (folder / "results.json", folder / "scores.json") if p.is_file()]
        if not found:
            raise BadInput(f"--compare {folder}: holds neither results.json nor scores.json; evaluate.py writes them")
        said = load(found[0])
        if found[0].name == "scores.json":                               # the miniature's, with several models in it
            minis |= {f"{folder.name}: {name}" if name in minis else name: row for name, row in said["scores"].items()}
        else:
            models[folder.name if folder.name not in models else str(folder)] = said["results"]
    text = "\n\n".join(([table(models)] if models else []) + ([miniature.table(minis)] if minis else []))
    write_whole(out / "table.txt", text + "\n")
    print(text)
    drawn = {name: figure for name, figure in (("radar", radar(models)), ("bars", bars(models))) if figure}
    for name, figure in drawn.items():
        figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
    print(f"table: {out}/table.txt" + "".join(f"   {name}: {out}/{name}.png" for name in drawn))
