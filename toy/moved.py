"""What a method moved: how far the model went, and whether its text is better or only longer.

Two questions that a table of scores leaves open.

How far did it go? The divergence from where it started, on answers that the model itself now gives
to held-out questions,

    KL = mean of log p(y | x) - log p_start(y | x),      y sampled from p at temperature 1

in nats, per answer and per token. Some say that what a new task makes a model forget goes with how
far it moves on that task, whatever the method (arXiv:2509.04259). KL can be taken in either
direction; this one counts what the model now says, and not what it has stopped to say.

Is it better, or longer? Full sentences are longer than bare words, and judges like length. The
length-controlled win rate is what AlpacaEval's leaderboard does about that (arXiv:2404.04475): each
answer is compared with the start's answer to the same question, and a regression

    P(win) = sigmoid(theta + phi * tanh(longer / std of longer)),      longer in words

puts what length explains into phi. sigmoid(theta) is the win rate at equal length. (Its third term,
how hard a question is, needs many models.) Matched lengths would need no formula, but would keep
only the questions on which a method changed little. Where hardly any answer is as long as the
start's, equal length is outside what was seen, and no figure is given.
"""
import numpy as np
import torch

import checkpoint
from benchmarks.alpaca_eval import at_equal_length
from benchmarks.harness import mean, ratios
from benchmarks.likelihood import given_logps
from data import Pixels, Tokens, make_tree, usable
from generate import sample_answers
from toy import items, oracle, tasks

ASKED = 50           # held-out questions about pictures, of each kind
ANSWERS = 4          # sampled to each of them


# ---- how far -------------------------------------------------------------------------------------

@torch.no_grad()
def divergence(model, tokens, start, start_tokens, records):
    """{"kl": nats an answer, "kl a token"}, from sampled answers to each record. Those that were cut
    off do not count: what they would have said is not known."""
    pixels = Pixels(model.config)
    prompts = [make_tree(tokens, record, []) for record in records]
    said = sample_answers(model, tokens, pixels, prompts, n=ANSWERS, max_new=items.MAX_NEW)
    whole = []
    for record, answers in zip(records, said):
        whole += [(record, answer["text"]) for answer in answers if usable(answer)]

    now = logps_of(model, tokens, pixels, whole)
    before = logps_of(start, start_tokens, pixels, whole)                    # as the start is asked
    moved = [a - b for (a, _), (b, _) in zip(now, before)]
    lengths = [length for _, length in now]
    questions = [record["id"] for record, _ in whole]
    return {"kl": mean(moved, questions), "kl a token": ratios([(moved, lengths, questions)])}


def logps_of(model, tokens, pixels, answered):
    """[(log p of its answer, how many tokens that has)] of each (record, text)."""
    trees = [make_tree(tokens, record, [text]) for record, text in answered]
    return list(given_logps(model, pixels, trees, "divergence"))


# ---- better, or longer ---------------------------------------------------------------------------

RIDGE = 1e-4         # on phi, for each answer: finite also where the longer one always wins
SAME = 0.05          # least share of answers within a word of the start's length


def win_rate(wins, longer):
    """wins (N,): 1, 0.5 or 0 against the start; longer (N,) in words -> the win rate at equal
    length."""
    ridge = RIDGE * np.array([1e-3, 1.0]) * len(wins)    # on theta only against winning everything
    return at_equal_length(wins, longer, ridge)["mean"] / 100


def controlled(records, said, start_said):
    """The win rate over the start's answers at equal length, both turns of every text record; its
    mean is None where too few are of equal length. Its spread over seeds is the interval."""
    wins, longer = [], []
    for record, mine, theirs in zip(records, said, start_said):
        for turn, a, b in zip(record["truth"]["turns"], mine, theirs):
            lead = oracle.mark(turn, a) - oracle.mark(turn, b)
            wins.append(0.5 + 0.5 * np.sign(lead))
            longer.append(len(a.split()) - len(b.split()))
    near = np.mean(np.abs(longer) <= 1)
    rate = win_rate(wins, longer) if near >= SAME else None
    return {"mean": rate, "ci": None, "n": len(wins)}


# ---- both, for one model -------------------------------------------------------------------------

def measure(model, tokens, said, start, folder, name):
    """{"equal length", "kl", "kl a token"} of a model against the one in the folder `start`; `said`
    is what items.measure saw it answer. A text model has no KL: nobody can show it a picture."""
    before = checkpoint.load(start)
    start_tokens = Tokens(start, before.config)
    texts = tasks.draw(tasks.items("text", items.ITEMS["text"], "test"), folder)
    mine = [row["answers"] for row in said if row["id"].startswith("text")]
    theirs = items.ask(before, start_tokens, texts, f"{name}: the start's text")
    scores = {"equal length": controlled(texts, mine, theirs)}
    if model.config.vision:
        benches = [bench for bench in items.ITEMS if bench != "text"]
        records = [record for bench in benches for record in tasks.items(bench, ASKED, "test")]
        scores |= divergence(model, tokens, before, start_tokens, tasks.draw(records, folder))
    return scores
