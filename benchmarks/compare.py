"""Results side by side: the layout of the paper's Table 4, its own rows below ours, a radar and bars.

Numbers of two judges, or of two versions of one, are on two scales, and the judges of 2023 are gone. So the table names the
judge of every row and says when they differ, and the paper's rows stand apart: compare differences within a block, never a
number with one of the other. How long the answers are stands beside what was judged, since judges like length.

    python evaluate.py --compare runs/evaluate/llava runs/evaluate/dpo --out runs/compare

Previous: benchmarks/pictures.py.  Next: evaluate.py (the harness).
"""
import math
from collections import Counter
from pathlib import Path

import matplotlib

from benchmarks.harness import aligned, load, shown
from common import BadInput, write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = {   # title, format, the end of its scale, and what our figure is multiplied with to be on it
    "mm_vet": ("MM-Vet", "5.1f", 100, 1), "llava_bench": ("LLaVA-Bench", "5.1f", 120, 1), "pope": ("POPE", "5.3f", 1, 1),
    "mmbench": ("MMBench", "5.1f", 100, 100), "mt_bench": ("MT-Bench", "5.2f", 10, 1),
    "alpaca_eval": ("AlpacaEval", "5.1f", 100, 1)}
PAPER = {     # Table 4 of arXiv:2402.10884, 13B, in the order of COLUMNS
    "Vicuna-1.5": (None, None, None, None, 6.57, 81.4), "LLaVA-1.5": (36.3, 73.1, 0.859, 67.4, 5.99, 79.3),
    "LLaVA-RLHF": (37.2, 76.8, 0.869, 60.1, 6.18, 81.0), "Standard SFT": (36.5, 63.7, 0.850, 65.4, 5.01, 50.2),
    "Rejection sampling": (38.0, 70.6, 0.883, 67.6, 6.22, 74.9), "SteerLM": (35.2, 67.0, 0.878, 65.1, 5.70, 68.8),
    "DPO": (41.2, 79.1, 0.870, 66.8, 6.73, 86.4)}


def paper(benches: list[str], width: int, names: int = 0) -> str:
    """The paper's rows, of these benchmarks."""
    rows = {name: dict(zip(COLUMNS, values)) for name, values in PAPER.items()}
    return aligned({name: ["-" if row[bench] is None else f"{row[bench]:{COLUMNS[bench][1]}}" for bench in benches]
                    for name, row in rows.items()}, [COLUMNS[bench][0] for bench in benches], width, names)


def headline(result: dict) -> dict | None:
    """The official figure, on the scale of the paper's table."""
    if not result["scores"]:
        return None
    first, factor = next(iter(result["scores"].values())), COLUMNS[result["bench"]][3]
    return first | {key: first[key] and first[key] * factor for key in ("mean", "ci")}


def judged_by(result: dict) -> str:
    """Who judged, and as which version where that is known."""
    if not result.get("judge"):
        return "-"
    return result["judge"] + (f" ({', '.join(result['versions'])})" if result["versions"] else "")


def cell(result: dict | None) -> str:
    """The official figure ± 95 %, "!" where less than all was scored, the mean length of answers where they were judged."""
    figure = headline(result) if result else None
    if not figure:
        return "-"
    length = f" ({result['length']:.0f})" if result.get("judge") and result["length"] else ""
    return shown(figure, COLUMNS[result["bench"]][1]) + "!" * (result["coverage"] < 1) + length


def table(models: dict[str, list[dict]]) -> str:
    """A line per model, the paper's below."""
    found = {name: {r["bench"]: r for r in results} for name, results in models.items()}
    benches = [bench for bench in COLUMNS if any(bench in row for row in found.values())]
    rows, every = {}, [r for results in models.values() for r in results]
    for name, row in found.items():
        judges = dict.fromkeys(judged_by(r) for r in row.values() if r.get("judge"))
        rows[name] = [*(cell(row.get(bench)) for bench in benches), "; ".join(judges) or "-"]
    names = max(map(len, [*models, *PAPER]))
    lines = [aligned(rows, [*(COLUMNS[bench][0] for bench in benches), "judge"], 20, names),
             "in brackets: mean characters of an answer, for judges like length",
             "", "The paper, 13B models, judged by GPT-4 of 2023 (another scale: compare differences, not numbers)",
             paper(benches, 20, names)]
    judges = Counter(bench for bench, _ in {(r["bench"], judged_by(r)) for r in every if r.get("judge")})
    mixed = sorted(bench for bench, n in judges.items() if n > 1)
    if mixed:
        lines.append(f"judged by different judges: {', '.join(mixed)}; these columns cannot be compared down")
    if any(r["coverage"] < 1 for r in every):
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
    scored = {r["bench"] for results in models.values() for r in results if r["scores"]}
    benches = [bench for bench in COLUMNS if bench in scored]
    if not benches:
        return None
    figure, axes = plt.subplots(1, len(benches), figsize=(1.5 + 2.1 * len(benches), 3.6), squeeze=False)
    for axis, bench in zip(axes[0], benches):
        for k, results in enumerate(models.values()):
            for figures in (headline(r) for r in results if r["bench"] == bench and r["scores"]):
                axis.bar(k, figures["mean"] or 0, yerr=figures["ci"] or 0, color=f"C{k}", capsize=3)
        axis.set(title=COLUMNS[bench][0], xticks=[], xlim=(-0.6, len(models) - 0.4))
        axis.set_ylim(0, max(COLUMNS[bench][2], axis.get_ylim()[1]))
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{k}") for k in range(len(models))]
    figure.legend(handles, models, loc="lower center", ncols=min(4, len(models)), frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


def run(folders: list, out: Path) -> None:
    """Print the table of some result folders and draw the figures into `out`. Raises BadInput where there is nothing."""
    models = {}
    for folder in map(Path, folders):
        if not (folder / "results.json").is_file():
            raise BadInput(f"--compare {folder}: holds no results.json; evaluate.py writes one")
        models[folder.name if folder.name not in models else str(folder)] = load(folder / "results.json")["results"]
    text = table(models)
    write_whole(out / "table.txt", text + "\n")
    print(text)
    drawn = {name: figure for name, figure in (("radar", radar(models)), ("bars", bars(models))) if figure}
    for name, figure in drawn.items():
        figure.savefig(out / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
    print(f"table: {out}/table.txt" + "".join(f"   {name}: {out}/{name}.png" for name in drawn))
