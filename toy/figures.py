"""The experiment's rows, drawn: what was lost, and what came back.

    forgetting.png    text ability against image answers: tuning goes one way, each method another
    curves.png        both against the share of the data, and of wrong labels

Nothing is computed here but means; every function takes rows and returns a figure. reproduce.py
draws its own; those of this repository are drawn from results/reproduce.jsonl:

    python -m toy.figures
"""
from dataclasses import dataclass
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common import HERE, main, read_jsonl

METHODS = {
    "LLaVA-mini": "black",
    "SFT, short answers": "tab:orange",
    "SFT, full answers": "tab:blue",
    "Rejection sampling": "tab:green",
    "SteerLM, not asked for scores": "tab:purple",
    "DPO": "tab:red",
}
DATA = {
    0: "LLaVA-mini",
    25: "DPO, 25% of the data",
    50: "DPO, 50% of the data",
    75: "DPO, 75% of the data",
    100: "DPO",
}
FLIPS = {
    0: "DPO",
    25: "DPO, 25% of labels flipped",
    50: "DPO, 50% of labels flipped",
    75: "DPO, 75% of labels flipped",
}


def values(rows, name, column):
    """One number per seed."""
    return np.array([row["scores"][column]["mean"] for row in rows if row["name"] == name])


def forgetting(rows):
    """Text (1 to 10) up, the judge's opinion of image answers (0 to 12) to the right."""
    figure, axis = plt.subplots(figsize=(8.5, 4.5))
    start = [values(rows, "LLaVA-mini", column).mean() for column in ("judged", "text")]
    for name, color in METHODS.items():
        x = values(rows, name, "judged")
        y = values(rows, name, "text")
        end = x.mean(), y.mean()
        axis.scatter(x, y, s=14, color=color, alpha=0.35)
        axis.scatter(*end, s=60, color=color, label=name)
        if name != "LLaVA-mini":
            axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color})

    # The text model sees nothing: a level, not a point.
    level = values(rows, "Vicuna-mini", "text").mean()
    axis.axhline(level, color="grey", linestyle=":", label="Vicuna-mini: no vision")
    steered = values(rows, "SteerLM", "text").mean()
    axis.plot([], " ", label=f"SteerLM asked for all fours:\ntext {steered:.1f}, off the page")

    axis.set_title(f"What each method makes of the same questions ({len(x)} seeds)")
    axis.set_xlabel("image answers, the judge's S (0 to 12)")
    axis.set_ylabel("text ability, MT-mini (1 to 10)")
    axis.legend(frameon=False, bbox_to_anchor=(1, 1))
    return figure


def curves(rows):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, names, what in zip(axes, (DATA, FLIPS), ("% of the data", "% of labels flipped")):
        for column, color in (("text", "tab:red"), ("judged", "tab:blue")):
            means = []
            for share, name in names.items():
                dots = values(rows, name, column)
                axis.scatter([share] * len(dots), dots, s=10, color=color, alpha=0.35)
                means.append(dots.mean())
            axis.plot(list(names), means, color=color, marker="o", label=column)
        axis.set(xlabel=what, xticks=list(names))
    axes[0].legend(frameon=False)
    return figure


def draw(rows, out):
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("forgetting", forgetting(rows)), ("curves", curves(rows))):
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=150)
        plt.close(figure)
    print(f"figures: {out}")


@dataclass
class Settings:
    """Draw the experiment's figures."""
    rows: str = str(HERE / "results/reproduce.jsonl")    # what reproduce.py wrote
    out: str = str(HERE / "results/figures")             # folder of the figures


if __name__ == "__main__":
    main(Settings, lambda s: draw(read_jsonl(s.rows), Path(s.out)))
