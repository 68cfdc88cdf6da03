"""The experiment's rows, drawn: what was lost, and what came back.

    forgetting.png    text ability against image answers: tuning goes one way, each method another;
                      and against how far each went
    curves.png        both against the share of the data, and of wrong labels
    smol.png          a real language model: what each method makes of its text and its sight

Nothing is computed here but means; every function takes rows and returns a figure. reproduce.py
draws what its rows have; those of this repository come from results/today.jsonl, reproduce.jsonl
and smol.jsonl:

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

LOOKS = {                      # name -> color, marker: a dot for the thousand image questions alone
    "LLaVA-mini": ("black", "o"),
    "SFT, short answers": ("tab:orange", "o"),
    "SFT, full answers": ("tab:blue", "o"),
    "Rejection sampling": ("tab:green", "o"),
    "SteerLM, not asked for scores": ("tab:purple", "o"),
    "DPO": ("tab:red", "o"),
    "Policy gradient": ("tab:brown", "o"),
    "DPO, pictures swapped": ("tab:red", "x"),
    "DPO, text pairs alone": ("tab:red", "+"),
    "SFT, full answers, 5% text": ("tab:blue", "+"),
    "LLaVA-mini, 33% text in tuning": ("black", "+"),
}
AVERAGED = ("LLaVA-mini", *(f"LLaVA-mini + {share} Vicuna-mini" for share in (0.25, 0.5, 0.75)))
SHARES = (25, 50, 75)            # %
DATA = {0: "LLaVA-mini"} | {k: f"DPO, {k}% of the data" for k in SHARES} | {100: "DPO"}
FLIPS = {0: "DPO"} | {k: f"DPO, {k}% of labels flipped" for k in SHARES}


def values(rows, name, column):
    """One number per seed; none for what a model cannot have."""
    scores = [row["scores"] for row in rows if row["name"] == name]
    return np.array([found[column]["mean"] for found in scores if column in found])


def forgetting(rows):
    """Text (1 to 10) up; to the right the judge's opinion of image answers (0 to 12) and, where the
    rows have it, how far a method went (nats)."""
    columns = {"judged": "image answers, the judge's S (0 to 12)"}
    if any("kl" in row["scores"] for row in rows):
        columns["kl"] = "how far it went: KL from LLaVA-mini, nats an answer"
    figure, axes = plt.subplots(1, len(columns), figsize=(3 + 4.8 * len(columns), 4.6), sharey=True,
                                squeeze=False)
    axes = axes[0]
    for axis, column in zip(axes, columns):
        draw_methods(axis, rows, column)
        # The text model sees nothing: a level, not a point.
        level = values(rows, "Vicuna-mini", "text").mean()
        axis.axhline(level, color="grey", linestyle=":", label="Vicuna-mini: no vision")
        axis.set_xlabel(columns[column])

    steered = values(rows, "SteerLM", "text").mean()
    axes[0].plot([], " ", label=f"SteerLM asked for all fours:\ntext {steered:.1f}, off the page")
    seeds = len(values(rows, "LLaVA-mini", "text"))
    figure.suptitle(f"What each method makes of LLaVA-mini ({seeds} seeds)")
    axes[0].set_ylabel("text ability, MT-mini (1 to 10)")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), frameon=False, bbox_to_anchor=(1, 1),
                    fontsize="small")
    return figure


def draw_methods(axis, rows, column):
    """A small mark for each seed, a large one for their mean, an arrow from where all began; the
    mixtures of both models are one path."""
    start = [values(rows, "LLaVA-mini", name).mean() for name in (column, "text")]
    for name, (color, marker) in LOOKS.items():
        x = values(rows, name, column)
        y = values(rows, name, "text")
        sibling = name == "LLaVA-mini, 33% text in tuning"                   # it began elsewhere
        if not len(x) or sibling and column == "kl":
            continue
        end = x.mean(), y.mean()
        axis.scatter(x, y, s=14, color=color, marker=marker, alpha=0.35)
        axis.scatter(*end, s=60, color=color, marker=marker, label=name)
        if name != "LLaVA-mini" and not sibling:
            axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.6})

    path = [[values(rows, name, c).mean() for c in (column, "text")] for name in AVERAGED
            if len(values(rows, name, column))]
    if len(path) > 1:
        axis.plot(*zip(*path), color="grey", marker=".", linestyle="--",
                  label="LLaVA-mini + 0.25, 0.5, 0.75\nof Vicuna-mini")


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


REAL = {                         # column -> what its panel is about
    "words": "words an answer has",
    "long": "IFEval, what takes more\nthan two sentences",
    "nll": "nats a token of given answers\n(lower is better)",
    "scene talk": "share of text answers that\nspeak of the world's things",
    "judged": "image answers,\nthe judge's S (0 to 12)",
    "exist": "is it in the picture?\nshare answered rightly",
}


def real(rows):
    """One panel per column, one line per model: a small dot for each seed, a large one for their
    mean, and how high the language model itself stood."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = plt.subplots(1, len(REAL), figsize=(15, 0.8 + 0.36 * len(names)), sharey=True)
    for axis, (column, title) in zip(axes, REAL.items()):
        for line, name in enumerate(names):
            dots = values(rows, name, column)
            axis.scatter(dots, [line] * len(dots), s=14, color="tab:blue", alpha=0.4)
            if len(dots):
                axis.scatter(dots.mean(), line, s=60, color="tab:blue")
        for level in values(rows, names[0], column):
            axis.axvline(level, color="grey", linestyle=":")
        axis.set_title(title, fontsize="small")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


def of_miniature(rows):
    """Those figures of the miniature for which there are rows, by name."""
    found = {"forgetting": forgetting(rows)}
    if all(len(values(rows, name, "text")) for name in [*DATA.values(), *FLIPS.values()]):
        found["curves"] = curves(rows)
    return found


def save(found, out):
    """{name: figure} -> out/name.png"""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in found.items():
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=150)
        plt.close(figure)
    print(f"figures: {out}")


@dataclass
class Settings:
    """Draw the experiment's figures from the rows of this repository."""
    out: str = str(HERE / "results/figures")             # folder of the figures


def run(s: Settings):
    today, old, smol = (read_jsonl(HERE / f"results/{name}.jsonl")
                        for name in ("today", "reproduce", "smol"))
    save({"forgetting": forgetting(today), "curves": curves(old), "smol": real(smol)}, Path(s.out))


if __name__ == "__main__":
    main(Settings, run)
