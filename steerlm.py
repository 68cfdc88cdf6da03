"""The second rival: learn every answer, good and bad, under its own scores; then ask for all fours.

SteerLM (arXiv:2310.05344), as the paper uses it. The scores are written into the question, in one
fixed form,

    USER: <image>\\nWhat is odd here?\\nAnswer with helpfulness 2, correctness 4, ..., verbosity 1.
    ASSISTANT: An owl.</s>

and the loss is next-token loss on the answer only: the model learns p(answer | question, scores).
Nothing is thrown away, not even the worst answer, and any mixture can be asked for afterwards:
brief and correct, say.

The trap. Training and use must agree to the byte, or the scores are just odd words in a prompt. So
one function writes them (data.write_scores), and the form lies in the model's folder (steer.json):
that checkpoint's template says what is appended to a question, all fours unless --target says
otherwise. Scores are never in the loss: they stand in the user's turn.

    python steerlm.py --ckpt llava-1.5-7b-hf --data runs/annotate/records.jsonl --out runs/steerlm
"""
from dataclasses import dataclass

import sft
import checkpoint
from common import BadInput, main
from data import LEVELS, Tokens, check_form, make_tree, scored_answers, target_scores, write_scores
from judge.rubric import RUBRIC

FORM = "\nAnswer with " + ", ".join(f"{name} {{{name}}}" for name in RUBRIC.attributes) + "."


@dataclass
class Settings(sft.Settings):
    """Supervised fine-tuning on every scored answer, its scores written into the question."""
    out: str = "runs/steerlm"    # run folder
    form: str = FORM             # appended to the question; {helpfulness} and so on become grades
    grades: str = "0 1 2 3 4"    # the words for them, lowest first
    target: str = "4 4 4 4 4"    # scores to ask for afterwards, in the order of the default --form


def steer_form(s: Settings):
    """What steer.json holds: {"text", "grades", "target"}."""
    form = {"text": s.form, "grades": s.grades.split(), "target": target_scores(s.target)}
    check_form(form, "--form and --grades")
    return form


def check_words(tokens, form):
    """The wish for every grade must look different to the model, too: words that its tokenizer does
    not know all look alike."""
    seen = set()
    for level in LEVELS:
        wish = write_scores(form, dict.fromkeys(RUBRIC.attributes, level))
        tokens.check(wish, "--form")
        seen.add(tuple(tokens.encode(wish)))
    if len(seen) != len(LEVELS):
        raise BadInput(
            f"--form {form['text']!r} with --grades {' '.join(form['grades'])} does not tell the "
            f"scores apart to {tokens.source}; choose other words, name attributes in braces"
        )


def trees_under_scores(tokens, form, record, longest):
    """One tree per scored answer, the question of each asking for that answer's own scores."""
    trees = []
    for k, _ in scored_answers(record):
        answer = record["answers"][k]
        asking = tokens.asking(answer["scores"], form)
        trees.append(make_tree(asking, record, [answer["text"]], max_length=longest))
    if not trees:
        raise BadInput("has no whole answer with scores")
    return trees


def run(s: Settings):
    form = steer_form(s)
    if not s.dry_run:
        folder = checkpoint.resolve(s.ckpt)
        config, _ = checkpoint.read_config(folder)
        check_words(Tokens(folder, config, s.template), form)

    def trees_of(tokens, record, longest):
        return trees_under_scores(tokens, form, record, longest)             # whatever --ckpt has

    sft.fit(s, trees_of, {"steer.json": form})


if __name__ == "__main__":
    main(Settings, run)
