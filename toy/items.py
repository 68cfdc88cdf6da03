"""The miniature's benchmarks, judged exactly: what a model can do in a world whose truth is known.

A model is asked held-out questions and decodes greedily; every scorer is a pure function of record
and answer (oracle.py). Text and vision stand side by side, because the finding is about the trade
between them:

    text        MT-mini: two turns without an image, the second asked after the model's *own* first
                answer; 1 to 10
    core        the same answers' content alone, blind to length and style: forgetting without the leak
    terse       share of text answers that are a bare word: the style leak without the forgetting
    words       their length
    exist       POPE-mini: "is there a red one ?", half of them no; balanced accuracy
    attribute   color, size, shape or place of one thing among several; accuracy
    describe    facts told, F1
    choice      the right letter of three; accuracy
    judged      the judge's S = helpfulness + correctness + coherence on image questions, 0 to 12

They run with no judge and no download, which is what `python evaluate.py` does unless told
otherwise.
"""
from benchmarks.harness import Item, aligned, answer, mean, shown
from common import BadInput
from data import Pixels
from judge.rubric import RUBRIC
from toy import oracle, tasks
from toy.english import in_english

ITEMS = {"text": 165, "exist": 200, "attribute": 200, "describe": 100, "choice": 100}
MAX_NEW = 48                                            # words; the longest truth has 36
COLUMNS = {
    "text": "5.2f",
    "core": "5.3f",
    "terse": "5.2f",
    "words": "5.1f",
    "exist": "5.3f",
    "attribute": "5.3f",
    "describe": "5.3f",
    "choice": "5.3f",
    "judged": "5.2f",
}


def measure(model, tokens, folder, name, split="test", english=False) -> tuple[dict, list[dict]]:
    """All benchmarks of one model -> (scores by column, every answer with its record's id).

    The pictures go to `folder`; `name` stands on the progress bars. In English only pictures are
    asked about: a real language model's text has benchmarks of its own."""
    scores = {}
    answers = []
    judged = []
    benches = list(ITEMS) if model.config.vision else ["text"]
    if english:
        benches.remove("text")
    for bench in benches:
        records = tasks.draw(tasks.items(bench, ITEMS[bench], split), folder)
        if english:
            records = [in_english(record) for record in records]
        said = ask(model, tokens, records, f"{name}: {bench}")
        for record, texts in zip(records, said):
            answers.append({"id": record["id"], "answers": texts})

        if bench == "text":
            marks = [oracle.score_text(record, texts) for record, texts in zip(records, said)]
            for column in marks[0]:
                scores[column] = mean([mark[column] for mark in marks])
            continue
        right = []
        for record, [text] in zip(records, said):
            right.append(oracle.score(bench, record, text))
            grades, _ = oracle.judge(record, text)
            judged.append(RUBRIC.quality({"scores": grades}))
        scores[bench] = mean(right)

    if judged:
        scores["judged"] = mean(judged)
    return scores, answers


def behind_a_picture(model, tokens, folder, name):
    """The text score with a random held-out picture before the first question.

    Does the mere presence of an image hurt? The picture has nothing to do with the question (the
    paper's test, with an image that the model does see)."""
    texts = tasks.items("text", ITEMS["text"], "test")
    pictures = tasks.draw(tasks.items("exist", len(texts), "test", seed=1), f"{folder}/unrelated")
    for text, picture in zip(texts, pictures):
        first = text["messages"][0]
        first["content"] = "<image>\n" + first["content"]
        text["images"] = picture["images"]
        text["root"] = picture["root"]

    said = ask(model, tokens, texts, f"{name}: behind a picture")
    return mean([oracle.score_text(record, pair)["text"] for record, pair in zip(texts, said)])


def ask(model, tokens, records, desc):
    """The greedy answers to each record's questions, the second turn's prompt with the model's own
    first answer in it. Raises BadInput where one could not be answered: all of them are ours."""
    asked = []
    for record in records:
        questions = [m["content"] for m in record["messages"] if m["role"] == "user"]
        item = Item(record["id"], questions, images=record["images"], root=record["root"],
                    max_new=MAX_NEW)
        asked.append(item)

    answered = answer(asked, lambda: model, tokens, Pixels(model.config), batch=64, desc=desc)
    failed = [item.failed for item in answered if item.failed]
    if failed:
        raise BadInput(f"{desc}: {failed}")
    return [item.texts for item in answered]


def table(rows, columns=COLUMNS):
    """{model: scores} -> one row per model, "mean ±95 % interval" per column, "-" where a text
    model has none."""
    cells = {name: [] for name in rows}
    for name, scores in rows.items():
        for column, form in columns.items():
            cells[name].append(shown(scores[column], form) if column in scores else "-")
    return aligned(cells, list(columns))
