"""The second rival: learn every answer, good and bad, under its own scores; then ask for all fours.

SteerLM (arXiv:2310.05344), as the paper uses it. The scores are written into the question, in one fixed form,

    USER: <image>\\nWhat is odd here?\\nAnswer with helpfulness 2, correctness 4, ..., verbosity 1. ASSISTANT: An owl.</s>

and the loss is next-token loss on the answer only: the model learns p(answer | question, scores). Nothing is thrown away, not
even the worst answer, and any mixture can be asked for afterwards: brief and correct, say.

The trap. Training and use must agree to the byte, or the scores are just odd words in a prompt. So there is one function that
writes them (data.steered), the form lies in the model's folder (steer.json), and whoever makes a prompt for that model, be it
evaluation, sampling or DPO, gets the question with the target scores appended, all fours unless --target says otherwise. Scores
are never in the loss: they stand in the user's turn.

    python steerlm.py --ckpt llava-1.5-7b-hf --data runs/annotate/records.jsonl --out runs/steerlm

Previous: rejection.py.  Next: benchmarks/harness.py (did it help).
"""
from dataclasses import dataclass

import checkpoint
import sft
from common import BadInput, main
from data import Tokens, Tree, make_tree, steered, target_scores
from formats import ATTRIBUTES

FORM = "\nAnswer with " + ", ".join(f"{name} {{{name}}}" for name in ATTRIBUTES) + "."


@dataclass
class Settings(sft.Settings):
    """Supervised fine-tuning on every scored answer, its scores written into the question."""
    out: str = "runs/steerlm"    # run folder
    form: str = FORM             # what is appended to the question; {helpfulness} and so on become grades
    grades: str = "0 1 2 3 4"    # the words for them, lowest first
    target: str = "4 4 4 4 4"    # scores to ask for afterwards: helpfulness, correctness, coherence, complexity, verbosity


def steer_form(s: Settings) -> dict:
    """What steer.json holds: {"text", "grades", "target"}. Raises BadInput where the flags make none."""
    grades = s.grades.split()
    if len(grades) != 5 or len(set(grades)) != 5:
        raise BadInput(f"--grades {s.grades}: five different words, lowest first")
    form = {"text": s.form, "grades": grades, "target": target_scores(s.target)}
    try:
        shown = {grades[k]: steered([{"content": ""}], form, dict.fromkeys(ATTRIBUTES, k)) for k in range(5)}
    except (KeyError, IndexError, ValueError) as problem:
        raise BadInput(f"--form {s.form!r}: cannot be filled in ({problem}); name attributes in braces") from None
    if len({str(messages) for messages in shown.values()}) != 5:
        raise BadInput(f"--form {s.form!r}: does not say the scores; name attributes in braces, such as {{helpfulness}}")
    return form


def trees_under_scores(tokens: Tokens, record: dict, form: dict, limit: int) -> list[Tree]:
    """One tree per scored answer, the question of each asking for that answer's own scores."""
    scored = [a for a in record["answers"] if a.get("scores") and a.get("finish") != "length"]
    if not scored:
        raise BadInput("has no whole answer with scores")
    asked = [record | {"messages": steered(record["messages"], form, a["scores"])} for a in scored]
    return [make_tree(tokens, r, [a["text"]], max_length=limit) for r, a in zip(asked, scored)]


def check_words(tokens: Tokens, form: dict) -> None:
    """Every grade must look different to the model, too: words that its tokenizer does not know all look alike."""
    asked = {str(tokens.encode(steered([{"content": ""}], form, dict.fromkeys(ATTRIBUTES, k))[0]["content"])) for k in range(5)}
    if len(asked) != 5:
        raise BadInput(f"{tokens.source} does not tell the grades {' '.join(form['grades'])} apart; choose other --grades")


def run(s: Settings) -> None:
    form, folder = steer_form(s), checkpoint.resolve(s.ckpt)
    if not s.dry_run:
        check_words(Tokens(folder, checkpoint.read_config(folder)[0]), form)

    def trees_of(tokens: Tokens, record: dict, limit: int) -> list[Tree]:
        tokens.steer = None                                              # a model that was steered before is asked anew
        return trees_under_scores(tokens, record, form, limit)
    sft.fit(s, trees_of, {"steer.json": form})


if __name__ == "__main__":
    main(Settings, run)
