"""The experiment's rows, drawn: what was lost, what came back, and what the training looked like.

    forgetting.png    text ability against vision ability: tuning goes one way, each method another
    dynamics.png      DPO step by step (drawn by train.py): both log-probs fall, their gap rises
    curves.png        text ability against the share of the data, and of wrong labels
    attributes.png    how the judge's five attributes go together (the paper's Fig. 3)
    board.png         the first questions of a seeded draw, answered before and after: unpicked
    speed.png         what speed.py measured

Nothing is computed here but means; every function takes rows and returns a figure. What needs no more
than the rows can be drawn again:

    python -m toy.figures        results/reproduce.jsonl -> forgetting.png, curves.png
"""
import random
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common import main, read_jsonl
from judge.report import statistics
from judge.rubric import RUBRIC
from toy import items, tasks
from vision import load_image

RED, BLUE, GREEN, ORANGE = "#d62728", "#1f77b4", "#2a9d8f", "#c77700"
PURPLE, GREY, DARK = "#8e44ad", "#777777", "#333333"

# Where a method's name stands, in points from its dot, so that none covers another.
METHODS = {
    "LLaVA-mini": (DARK, (10, -5), "left"),
    "SFT, short answers": (ORANGE, (10, -10), "left"),
    "SFT, full answers": (BLUE, (10, -4), "left"),
    "Rejection sampling": (GREEN, (2, 19), "right"),
    "SteerLM, not asked for scores": (PURPLE, (-12, -14), "right"),
    "DPO": (RED, (10, -4), "left"),
}


def values(rows: list[dict], name: str, column: str) -> np.ndarray:
    """One number per seed."""
    found = [row["scores"] for row in rows if row["name"] == name]
    return np.array([scores[column]["mean"] for scores in found if column in scores])


def forgetting(rows: list[dict]):
    """Text (1 to 10) up, the judge's opinion of image answers (0 to 12) to the right."""
    figure, axis = plt.subplots(figsize=(7, 5))
    start = [values(rows, "LLaVA-mini", column).mean() for column in ("judged", "text")]
    for name, (color, offset, side) in METHODS.items():
        x, y = values(rows, name, "judged"), values(rows, name, "text")
        if not len(x):
            continue
        end = x.mean(), y.mean()
        axis.scatter(x, y, s=14, color=color, alpha=0.35, linewidths=0)
        axis.scatter(*end, s=60, color=color, zorder=3)
        axis.annotate(name.replace(", not", ",\nnot"), end, xytext=offset,
                      textcoords="offset points", color=color, ha=side)
        if name != "LLaVA-mini":
            arrow = {"arrowstyle": "->", "color": color, "alpha": 0.6, "shrinkB": 4}
            axis.annotate("", end, start, arrowprops=arrow)

    # The text model sees nothing: a level, not a point.
    level = values(rows, "Vicuna-mini", "text").mean()
    axis.axhline(level, color=GREY, linestyle=":", linewidth=1.2)
    axis.annotate("Vicuna-mini: no vision", (0.02, level), color=GREY, va="bottom",
                  xycoords=("axes fraction", "data"))
    steered = values(rows, "SteerLM", "text")
    if len(steered):
        note = f"off the page: SteerLM asked for all fours, text {steered.mean():.1f}"
        axis.text(0.98, 0.03, note, ha="right", color=PURPLE, transform=axis.transAxes)

    seeds = len(values(rows, "LLaVA-mini", "text"))
    axis.set(xlabel="image answers, the judge's S (0 to 12)", ylabel="text ability, MT-mini (1 to 10)",
             title=f"What each method makes of the same judged answers ({seeds} seeds)")
    axis.margins(x=0.34, y=0.15)
    return figure


def curves(rows: list[dict]):
    data = {0: "LLaVA-mini", 25: "DPO, 25% of the data", 50: "DPO, 50% of the data",
            75: "DPO, 75% of the data", 100: "DPO"}
    flips = {0: "DPO", 25: "DPO, 25% of labels flipped", 50: "DPO, 50% of labels flipped",
             75: "DPO, 75% of labels flipped"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, names, what in zip(axes, (data, flips), ("% of the data", "% of labels flipped")):
        for column, color, scale in (("text", RED, "1 to 10"), ("judged", BLUE, "0 to 12")):
            found = {share: values(rows, name, column) for share, name in names.items()}
            for share, dots in found.items():
                axis.scatter([share] * len(dots), dots, s=10, color=color, alpha=0.35, linewidths=0)
            means = [dots.mean() if len(dots) else np.nan for dots in found.values()]
            axis.plot(list(found), means, color=color, marker="o", label=f"{column} ({scale})")
        axis.set(xlabel=what, xticks=list(names))
        axis.legend(frameon=False)
    return figure


def attributes(records: list[dict]):
    figure, axis = plt.subplots(figsize=(5, 4.2))
    table = np.array(statistics(records)["correlations"], float)         # None becomes nan
    axis.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r")
    for (i, j), value in np.ndenumerate(table):
        ink = "white" if abs(value) > 0.6 else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink)
    axis.set_title("attributes of the same answers, Pearson")
    axis.set_xticks(range(len(table)), RUBRIC.attributes, rotation=30, ha="right")
    axis.set_yticks(range(len(table)), RUBRIC.attributes)
    return figure


def board(pictures: Path, runs: dict[str, Path], n: int = 6):
    """The first n of a seeded draw of test questions, and what each run's model says."""
    asked = {}
    for bench in ("exist", "attribute", "describe"):
        for record in tasks.items(bench, items.ITEMS[bench], "test"):
            asked[record["id"]] = record
    said = {}
    for model, run in runs.items():
        said[model] = {row["id"]: row["answers"][-1] for row in read_jsonl(run / "answers.jsonl")}

    figure, axes = plt.subplots(n, 2, figsize=(9, 1.5 * n), width_ratios=(1, 5))
    for (left, right), name in zip(axes, random.Random(0).sample(sorted(asked), n)):
        record = asked[name]
        lines = [record["messages"][-1]["content"].replace("<image>\n", ""),
                 f"  truth: {record['golden']}"]
        lines += [f"  {model}: {answers[name]}" for model, answers in said.items()]
        left.imshow(load_image(pictures / record["images"][0]))
        right.text(0, 0.5, "\n".join(lines), va="center", wrap=True)
        left.axis("off")
        right.axis("off")
    return figure


def speed(rows: list[dict]):
    """A step's time and memory against the opponent's, and how a step's time grows (rows of
    speed.py)."""
    figure, (time, memory, growth) = plt.subplots(1, 3, figsize=(11, 3.4))
    steps = [row for row in rows if row["bench"] == "dpo"]
    names = [row["name"].replace(", ", ",\n") for row in steps]
    colors = [RED if "remedy" in name else GREY for name in names]
    for axis, key, unit in ((time, "pairs_per_s", "pairs a second"),
                            (memory, "peak_mib", "peak memory, MiB")):
        heights = [row[key] for row in steps]
        bars = axis.bar(names, heights, color=colors, width=0.6)
        axis.bar_label(bars, [f"{x:.3g}" if x < 100 else f"{x:,.0f}" for x in heights])
        axis.set(title=f"DPO step: {unit}")
        axis.tick_params(axis="x", labelsize=8)

    grown = [row for row in rows if row["bench"] == "growth"]
    times = [row["ms"] / grown[0]["ms"] for row in grown]
    growth.barh([row["name"] for row in grown], times, color=BLUE)
    growth.invert_yaxis()
    growth.set(title="one record's step, first = 1")
    for axis in (time, memory, growth):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw(rows: list[dict], folder: Path, out: Path) -> None:
    """All of them into `out`: from the rows of all seeds, and the folder of one."""
    said = {"LLaVA-mini": folder / "LLaVA-mini", "SFT": folder / "SFT-full-answers",
            "DPO": folder / "DPO"}
    records = read_jsonl(folder / "data" / "records.jsonl")
    paths = [
        save(forgetting(rows), out / "forgetting.png"),
        save(curves(rows), out / "curves.png"),
        save(attributes(records), out / "attributes.png"),
        save(board(folder / "data", said), out / "board.png"),
        Path(copyfile(folder / "DPO" / "metrics.png", out / "dynamics.png")),
    ]
    print(f"figures: {', '.join(map(str, paths))}")


@dataclass
class Settings:
    """Draw again what needs no more than the rows of an experiment."""
    rows: str = "results/reproduce.jsonl"    # what reproduce.py wrote
    out: str = "results/figures"             # folder of the figures


def run(s: Settings) -> None:
    rows, out = read_jsonl(s.rows), Path(s.out)
    print(f"figures: {save(forgetting(rows), out / 'forgetting.png')}, {save(curves(rows), out / 'curves.png')}")


if __name__ == "__main__":
    main(Settings, run)
