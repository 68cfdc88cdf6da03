"""The experiment's rows, drawn: what was lost, what came back, and what the training looked like.

    forgetting.png    text ability against vision ability: tuning goes one way, each method another; every seed a dot
    dynamics.png      DPO step by step: margin and accuracy, log-probs of chosen and rejected (both fall; the gap is what rises)
    curves.png        text ability against the share of the data, and against the share of wrong labels
    attributes.png    how the judge's five attributes go together (the paper's Fig. 3)
    board.png         the first questions of a seeded draw, answered before and after: unpicked
    speed.png         what speed.py measured (drawn by speed.py)

Nothing is computed here but means. reproduce.py draws at its end, and again with `python reproduce.py --only tables`.

Previous: story.py.  Next: reproduce.py (what there is to draw).
"""
import random
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from toy import items as miniature
from common import read_jsonl
from judge.report import statistics
from formats import ATTRIBUTES
from toy.tasks import items
from vision import load_image

COLORS = {"Vicuna-mini": "#777777", "LLaVA-mini": "#333333", "SFT, short answers": "#c77700", "SFT, full answers": "#1f77b4",
          "Rejection sampling": "#2a9d8f", "SteerLM, not asked for scores": "#8e44ad", "DPO": "#d62728"}
PLACE = {"LLaVA-mini": (10, -5, "left"), "SteerLM, not asked for scores": (-8, -4, "right"),
         "SFT, short answers": (0, -16, "center"), "DPO": (0, -16, "center")}     # where names stand that others would cover


def values(rows: list[dict], name: str, column: str) -> np.ndarray:
    """One number per seed."""
    return np.array([row["scores"][column]["mean"] for row in rows if row["name"] == name and column in row["scores"]])


def forgetting(rows: list[dict]):
    """Text (1 to 10) up, the judge's opinion of image answers (0 to 12) to the right."""
    figure, axis = plt.subplots(figsize=(7, 5))
    start = [values(rows, "LLaVA-mini", column).mean() for column in ("judged", "text")]
    for name, color in COLORS.items():
        x, y = values(rows, name, "judged"), values(rows, name, "text")
        if not len(y):
            continue
        if not len(x):                                                   # the text model sees nothing: a level, not a point
            axis.axhline(y.mean(), color=color, linestyle=":", linewidth=1.2)
            axis.annotate(f"{name}: no vision", (0.02, y.mean()), xycoords=("axes fraction", "data"), va="bottom", color=color)
            continue
        axis.scatter(x, y, s=14, color=color, alpha=0.35, linewidths=0)
        axis.scatter(x.mean(), y.mean(), s=60, color=color, zorder=3)
        dx, dy, side = PLACE.get(name, (0, 7, "center"))
        axis.annotate(name, (x.mean(), y.mean()), xytext=(dx, dy), textcoords="offset points", color=color, ha=side)
        if name != "LLaVA-mini":
            style = {"arrowstyle": "->", "color": color, "alpha": 0.6, "shrinkB": 4}
            axis.annotate("", (x.mean(), y.mean()), start, arrowprops=style)
    axis.set(xlabel="image answers, the judge's S (0 to 12)", ylabel="text ability, MT-mini (1 to 10)",
             title=f"What each method makes of the same judged answers ({len(values(rows, 'LLaVA-mini', 'text'))} seeds)")
    if len(off := values(rows, "SteerLM", "text")):
        axis.text(0.98, 0.03, f"off the page: SteerLM asked for all fours, text {off.mean():.1f}", ha="right", color="#8e44ad",
                  transform=axis.transAxes)
    axis.margins(0.15)
    return figure


def dynamics(metrics: list[dict]):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    steps = [m["step"] for m in metrics]
    for axis, name, color in ((left, "loss", "#333333"), (left, "margin", "#d62728"), (left, "accuracy", "#1f77b4"),
                              (right, "logp_chosen", "#2a9d8f"), (right, "logp_rejected", "#c77700")):
        axis.plot(steps, [m[name] for m in metrics], color=color, label=name.replace("logp_", ""))
    left.axhline(np.log(2), color="#999999", linestyle=":", linewidth=1)
    left.text(1.01, np.log(2), "ln 2", transform=left.get_yaxis_transform(), va="center", color="#777777")
    left.set_ylim(top=1.3)                                               # room for the legend
    for axis, title in ((left, "loss, margin (beta x nats), accuracy"), (right, "log-probability of the answers, nats")):
        axis.set(xlabel="step", title=title)
        axis.legend(frameon=False, ncols=3)
    return figure


def curves(rows: list[dict]):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    shares = {what: {k: f"DPO, {k}% {what}" for k in (25, 50, 75)} for what in ("of the data", "of labels flipped")}
    shares["of the data"] = {0: "LLaVA-mini", **shares["of the data"], 100: "DPO"}
    shares["of labels flipped"] = {0: "DPO", **shares["of labels flipped"]}
    for axis, (what, names) in zip(axes, shares.items()):
        for column, color, scale in (("text", "#d62728", "1 to 10"), ("judged", "#1f77b4", "0 to 12")):
            found = {share: v for share, name in names.items() if len(v := values(rows, name, column))}
            axis.plot(list(found), [v.mean() for v in found.values()], color=color, marker="o", label=f"{column} ({scale})")
            for share, v in found.items():
                axis.scatter([share] * len(v), v, s=10, color=color, alpha=0.35, linewidths=0)
        axis.set(xlabel=f"% {what}", xticks=list(names))
        axis.legend(frameon=False)
    return figure


def attributes(numbers: dict):
    figure, axis = plt.subplots(figsize=(5, 4.2))
    table = np.array(numbers["correlations"], float)                     # None becomes nan
    axis.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r")
    for i, j in np.ndindex(5, 5):
        axis.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", color="white" if abs(table[i, j]) > 0.6 else "black")
    axis.set_title("attributes of the same answers, Pearson")
    axis.set_xticks(range(5), ATTRIBUTES, rotation=30, ha="right")
    axis.set_yticks(range(5), ATTRIBUTES)
    return figure


def board(folder: Path, runs: dict[str, str], n: int = 6):
    """The first n of a seeded draw of image questions, and what each model says."""
    said = {name: {r["id"]: r["answers"][-1] for r in read_jsonl(folder / run / "answers.jsonl")} for name, run in runs.items()}
    asked = {r["id"]: r for bench in ("exist", "attribute", "describe") for r in items(bench, miniature.ITEMS[bench], "test")}
    picked = random.Random(0).sample(sorted(asked), n)
    figure, axes = plt.subplots(n, 2, figsize=(9, 1.5 * n), width_ratios=(1, 5))
    for (left, right), name in zip(axes, picked):
        record = asked[name]
        left.imshow(load_image(folder / "data" / record["images"][0]))
        lines = [record["messages"][-1]["content"].replace("<image>\n", ""), f"  truth: {record['golden']}"]
        lines += [f"  {model}: {answers[name]}" for model, answers in said.items()]
        right.text(0, 0.5, "\n".join(lines), va="center", wrap=True)
        left.axis("off")
        right.axis("off")
    return figure


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def speed(rows: list[dict]):
    """What speed.py measured: a step's time and memory against the opponent's, and how a step's time grows."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    steps = [r for r in rows if r["bench"] == "dpo"]
    for axis, key, unit in ((axes[0], "pairs_per_s", "pairs a second"), (axes[1], "peak_mib", "peak memory, MiB")):
        names = [r["name"].replace(", ", ",\n") for r in steps]
        colors = ["#d62728" if "remedy" in name else "#999999" for name in names]
        bars = axis.bar(names, [r[key] for r in steps], color=colors, width=0.6)
        axis.bar_label(bars, [f"{r[key]:.3g}" if r[key] < 100 else f"{r[key]:,.0f}" for r in steps])
        axis.set(title=f"DPO step: {unit}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    grown = [r for r in rows if r["bench"] == "growth"]
    axes[2].barh([r["name"] for r in grown][::-1], [r["ms"] / grown[0]["ms"] for r in grown][::-1], color="#1f77b4")
    axes[2].set(title="one record's step, first = 1")
    axes[2].spines[["top", "right"]].set_visible(False)
    return figure


def draw(rows: list[dict], folder: Path, out: Path) -> None:
    """All of them, into `out`: from the rows of all seeds, and the folder of one."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = {"forgetting": forgetting(rows), "curves": curves(rows),
             "attributes": attributes(statistics(read_jsonl(folder / "data" / "records.jsonl")))}
    if (folder / "DPO").exists():                                        # reproduce.py --methods may have left it out
        drawn["dynamics"] = dynamics(read_jsonl(folder / "DPO" / "metrics.jsonl"))
    runs = {"LLaVA-mini": "LLaVA-mini", "SFT": "SFT-full-answers", "DPO": "DPO"}
    drawn["board"] = board(folder, {name: run for name, run in runs.items() if (folder / run).exists()})
    for name, figure in drawn.items():
        save(figure, out / f"{name}.png")
    print(f"figures: {', '.join(f'{out}/{name}.png' for name in drawn)}")
