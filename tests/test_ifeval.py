"""IFEval's 25 kinds of instruction: by hand, against a published implementation, and as a benchmark.

    pip install langdetect nltk immutabledict datasets && pip install --no-deps if-verifiable
    python -m pytest tests/test_ifeval.py -q
"""
import importlib.util
import json
import random
import re
import sys

import pytest

import evaluate
from benchmarks import ifeval
from benchmarks.harness import Folder
from common import BadInput

ORACLE = all(importlib.util.find_spec(name) for name in ("if_verifiable", "nltk", "langdetect", "immutabledict", "datasets"))
LANGUAGES = {"The cat sat on the mat and slept all day long.": "en", "THE CAT SAT ON THE MAT.": "en", "Die Katze schläft heute den ganzen Tag.": "de"}


@pytest.fixture
def languages(monkeypatch):
    """langdetect, where it is not installed: it knows three sentences."""
    monkeypatch.setattr(ifeval, "language_of", lambda text: LANGUAGES.get(text, "en" if text.isascii() else "de"))


# ---- by hand: kind, arguments, what follows it, what does not ------------------------------------------------------

TABLE = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A Dog and a CAT.", "A dog."),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "at least"}, "ab, AB", "ab"),
    ("keywords:frequency", {"keyword": "ab", "frequency": 2, "relation": "less than"}, "ab", "ab ab"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "A Cat!"),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "at least"}, "Aha", "a"),
    ("language:response_language", {"language": "de"}, "Die Katze schläft heute den ganzen Tag.", "The cat sat on the mat and slept all day long."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "One 1.5 only."),
    ("length_constraints:number_sentences", {"num_sentences": 4, "relation": "at least"}, "1. One\n2. Two\n3. Three", "J. R. R. Tolkien wrote. Much."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb", "a *** *** b"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "three words now"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"}, "a\n\n\"well, b", "a\n\nb"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [town]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. more", "Bye. PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "p.p.s more", "P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "I say: My answer is no.", "no"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\na\nSECTION 2\nb", "SECTION a"),
    ("detectable_format:json_format", {}, "```json\n{\"a\": 1}\n```", "{a: 1}"),
    ("detectable_format:title", {}, "<<song>>\nla", "<< >>\nla"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, " say it. It.", "It."),
    ("startend:end_checker", {"end_phrase": "the end."}, "So, \"The End.\"", "The end. Or not."),
    ("startend:quotation", {}, " \"a\"\n", "\"a"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG thing", "A thing"),
    ("change_case:english_capital", {}, "THE CAT SAT ON THE MAT.", "The cat."),
    ("change_case:english_lowercase", {}, "a cat sat.", "A cat sat."),
    ("punctuation:no_comma", {}, "a and b", "a, b"),
]


@pytest.mark.parametrize("kind, arguments, good, bad", TABLE)
def test_an_instruction_is_followed_or_it_is_not(languages, kind, arguments, good, bad):
    assert ifeval.followed((kind, arguments), [good])
    assert not ifeval.followed((kind, arguments), [bad])
    assert not ifeval.followed((kind, arguments), [" \n"]), "an empty answer follows nothing"


def test_all_25_kinds_are_in_the_table():
    assert {kind for kind, *_ in TABLE} == ifeval.CHECKS.keys() and len(ifeval.CHECKS) == 25


def test_loosely_an_answer_may_lose_its_first_line_its_last_and_its_asterisks():
    assert ifeval.followed(("startend:quotation", {}), ifeval.variants("Sure:\n\"a\""))
    assert ifeval.followed(("startend:quotation", {}), ifeval.variants("Sure:\n\"a\"\nBye."))
    assert ifeval.followed(("startend:quotation", {}), ifeval.variants("**\"a\"**"))
    assert not ifeval.followed(("startend:quotation", {}), ifeval.variants("Sure:\n\nNow:\n\"a\""))


def test_what_two_sentences_can_satisfy_is_short():
    assert not ifeval.is_long("punctuation:no_comma", {})
    assert not ifeval.is_long("length_constraints:number_words", {"num_words": 300, "relation": "less than"})
    assert ifeval.is_long("length_constraints:number_words", {"num_words": 300, "relation": "at least"})
    assert not ifeval.is_long("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"})
    assert ifeval.is_long("combination:repeat_prompt", {"prompt_to_repeat": "Hi."})


# ---- against a published implementation ----------------------------------------------------------------------------

PIECES = ["The cat sat on the mat.", "Is it so? Yes!", "HELLO there, WORLD", "* a bullet", "- another", "*bold* words", "**very** bold", "***", "******", "[name]",
          "[a] and [b]", "<<title>>", "<< >>", "P.S. more", "p. p. s. even more", "P.P.S last", "SECTION 1", "Section 2", "\"quoted\"", "\"", "My answer is maybe.",
          "{\"a\": [1, 2]}", "```json\n{\"a\": 1}\n```", "", "\n", "the end.", "Die Katze schläft heute den ganzen Tag.", "naïve, aaa", "all in lower case here",
          "ALL IN CAPITALS HERE", "one two three four five six", "'word' first", "Q&A by R&D", "My answer is yes.", "say it again", "It's 3.5, no?", "ready", "End", "1. One step.\n2. Another."]
DRAWS = {
    "keywords": lambda r: r.sample(["cat", "world", "bold", "it", "three"], 2),
    "keyword": lambda r: r.choice(["cat", "a", "bold"]),
    "forbidden_words": lambda r: r.sample(["cat", "four", "bold", "is"], 2),
    "relation": lambda r: r.choice(["less than", "at least"]),
    "letter": lambda r: r.choice("aet"),
    "language": lambda r: r.choice(["en", "de"]),
    "first_word": lambda r: r.choice(["the", "word", "is"]),
    "postscript_marker": lambda r: r.choice(["P.S.", "P.P.S"]),
    "section_spliter": lambda r: r.choice(["SECTION", "Section"]),
    "prompt_to_repeat": lambda r: r.choice(["say it again", "The cat", "\"quoted\""]),
    "end_phrase": lambda r: r.choice(["the end.", "ready", "cat sat on the mat."]),
}
MOST = {"num_words": 30, "num_sentences": 6, "let_frequency": 12, "frequency": 4, "capital_frequency": 6}


def drawn(rng, name):
    for suffix, draw in DRAWS.items():
        if name == suffix or name.endswith("relation") and suffix == "relation":
            return draw(rng)
    return rng.randint(1, MOST.get(name, 3))


def response(rng):
    joints = rng.choice([["\n"], [" "], ["\n\n"], ["\n", " ", "\n\n"]])
    text = ""
    for _ in range(rng.randint(1, 7)):
        text += rng.choice(PIECES) + rng.choice(joints)
    if rng.random() < 0.1:
        text = rng.choice([str.upper, str.lower])(text)
    return text if rng.random() < 0.3 else text.strip()


@pytest.mark.skipif(not ORACLE, reason="pip install langdetect nltk immutabledict datasets; pip install --no-deps if-verifiable")
def test_every_check_is_the_published_one_on_2000_responses(monkeypatch):
    """nltk's trained splitter cannot be had without a download: its untrained one takes its place, and words are cut without sentences first."""
    import langdetect
    import nltk
    from if_verifiable.ifeval import instructions_util
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    langdetect.DetectorFactory.seed = 0
    splitter = nltk.tokenize.punkt.PunktSentenceTokenizer()
    monkeypatch.setattr(instructions_util, "_get_sentence_tokenizer", lambda: splitter)
    monkeypatch.setattr(instructions_util.nltk, "word_tokenize", nltk.tokenize.NLTKWordTokenizer().tokenize)

    names = {kind: set(arguments) for kind, arguments, *_ in TABLE}
    rng = random.Random(0)
    seen = {kind: set() for kind in names}
    kinds = list(names)
    for k in range(2000):
        text = response(rng)
        for kind in {kinds[k % 25], kinds[(7 * k + 3) % 25]} if k % 20 else kinds:
            arguments = {name: drawn(rng, name) for name in sorted(names[kind])}
            if kind.endswith("first_word"):
                arguments["nth_paragraph"] = min(arguments["nth_paragraph"], arguments["num_paragraphs"])
            checker = INSTRUCTION_DICT[kind](kind)
            checker.build_description(**arguments)
            for variant in ifeval.variants(text):
                if variant.strip():
                    theirs = bool(checker.check_following(variant))
                    assert bool(ifeval.CHECKS[kind](variant, **arguments)) == theirs, (kind, arguments, variant)
                    seen[kind].add(theirs)
    assert all(values == {True, False} for values in seen.values()), seen


# ---- as a benchmark ------------------------------------------------------------------------------------------------

ROWS = [
    {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"key": 2, "prompt": "Two words, no commas.", "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
     "kwargs": [{"keyword": None}, {"num_words": 40, "relation": "at least"}]},
]


def data(tmp_path, rows):
    folder = tmp_path / "data/ifeval"
    folder.mkdir(parents=True)
    (folder / "input_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "data")


def test_responses_in_the_official_form_are_scored(tmp_path, capsys):
    said = [{"prompt": "No commas.", "response": "None here."}, {"prompt": "Two words, no commas.", "response": "None"}]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    evaluate.run(evaluate.Settings(bench="ifeval", answers=str(tmp_path / "answers.jsonl"), data_dir=data(tmp_path, ROWS), out=str(tmp_path / "out"), json=True))
    [result] = json.loads(capsys.readouterr().out)["answers"]
    found = {name: figure["mean"] for name, figure in result["scores"].items()}
    assert found["prompt"] == 1 / 2 and found["instruction"] == 2 / 3 and found["strict"] == pytest.approx(7 / 12)
    assert found["short"] == 1 and found["long"] == 0
    items = ifeval.items(Folder(tmp_path / "data/ifeval", "", tmp_path))
    answered = ifeval.read_answers(tmp_path / "answers.jsonl", items)
    assert answered == {1: ["None here."], 2: ["None"]}


@pytest.mark.parametrize("change, why", [
    ({"kwargs": []}, "prompt 1: kwargs and instruction_id_list are empty or not of one length"),
    ({"kwargs": [], "instruction_id_list": []}, "prompt 1: kwargs and instruction_id_list are empty or not of one length"),
    ({"instruction_id_list": ["punctuation:no_dots"]}, "punctuation:no_dots is no instruction of IFEval"),
    ({"kwargs": [{"num_words": 3}]}, "prompt 1: punctuation:no_comma does not take {'num_words': 3}"),
    ({"kwargs": ["x"]}, "prompt 1: the arguments of punctuation:no_comma are no object"),
    ({"prompt": None}, "row 1: prompt is null"),
    ({"key": 2}, "two prompts have the key 2"),
    *[({"instruction_id_list": [kind], "kwargs": [arguments]}, f"prompt 1: {kind} does not take {arguments}") for kind, arguments in [
        ("keywords:existence", {"keywords": ["a", "("]}),
        ("keywords:existence", {"keywords": ["b", "("]}),
        ("keywords:existence", {"keywords": ["a", 3]}),
        ("keywords:forbidden_words", {"forbidden_words": "cat"}),
        ("keywords:forbidden_words", {"forbidden_words": ["a", "("]}),
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at most"}),
        ("keywords:frequency", {"keyword": "a", "frequency": 2}),
        ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 0}),
        ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": -3, "first_word": "a"}),
        ("startend:end_checker", {"end_phrase": 7}),
    ]],
])
def test_a_file_that_is_not_ifeval_s_is_named(tmp_path, change, why):
    with pytest.raises(BadInput, match=re.escape(why)):
        evaluate.run(evaluate.Settings(bench="ifeval", answers="x", data_dir=data(tmp_path, [ROWS[0] | change, ROWS[1]]), out=str(tmp_path / "out")))


@pytest.mark.parametrize("kind, arguments", [("language:response_language", {"language": "de"}), ("change_case:english_capital", {})])
def test_without_langdetect_one_message_says_what_to_install(tmp_path, monkeypatch, kind, arguments):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    row = ROWS[0] | {"instruction_id_list": [kind], "kwargs": [arguments]}
    with pytest.raises(BadInput, match="^ifeval: .*pip install langdetect"):
        evaluate.run(evaluate.Settings(bench="ifeval", answers="x", data_dir=data(tmp_path, [row]), out=str(tmp_path / "out")))
