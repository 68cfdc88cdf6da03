"""IFEval (arXiv:2311.07911): 541 prompts with 834 instructions of 25 kinds that a program can check,
"no commas", "at least 300 words", "end with these words". No judge.

Officially an instruction is followed *strictly* where its check passes, and *loosely* where it
passes for the answer with or without its first line, its last line, and its asterisks. A prompt
counts where all its instructions are followed. Google prints the share of prompts and the share of
instructions apart; `strict` is the mean of the two, as model cards print it.

IFEval rewards brevity: who answers everything with one sentence rarely uses a comma and stays below
300 words. So the instructions are split, by kind and number, before anybody answers: `short`, what
two sentences can mostly satisfy (559 of them), and `long`, what they mostly cannot (275). It is a
rule of thumb. A model that lost its words gains in the first and loses in the second.

Sentences and capital words are counted by regular expressions here, officially by nltk's trained
splitter: they differ behind abbreviations, at ellipses and in contractions.
"""
import json
import re
from collections import defaultdict

from benchmarks.harness import Item, ratios, stored
from common import KINDS, BadInput, shown

FORM = "5.1f"
SCALE = 100
FOLDER = "ifeval"
SOURCE = "github.com/google-research/google-research, instruction_following_eval/data"
ANSWERS = "{model}.jsonl"
JUDGMENTS = ""


# What ends a sentence, with the quotes and brackets that close there. An initial does not, nor does
# a number before a small letter.
INSIDE = r"(?<!\s[^\W\d_]\.)(?<!^[^\W\d_]\.)(?!(?<=\d\.)\s+[a-z])"
SENTENCE_END = re.compile(INSIDE + r"""(?<=[.?!])["')\]}]*(?:\s+["')\]}]*(?!\S)\s*|\s+|(?=\*))""")


# ---- the 25 kinds --------------------------------------------------------------------------------
# Each takes the answer, and the instruction's arguments by their official names.

def holds(count, relation, wanted):
    """Officially "less than" or "at least"."""
    return count < wanted if relation == "less than" else count >= wanted


def times(pattern, text):
    return len(re.findall(pattern, text, re.IGNORECASE))


def has_keywords(text, keywords):                        # lists: each is tried, also at the door
    return all([times(word, text) for word in keywords])


def keyword_frequency(text, keyword, frequency, relation):
    return holds(times(keyword, text), relation, frequency)


def no_forbidden_words(text, forbidden_words):
    return not any([times(rf"\b{word}\b", text) for word in forbidden_words])


def letter_frequency(text, letter, let_frequency, let_relation):
    return holds(text.lower().count(letter.lower()), let_relation, let_frequency)


def language_of(text):
    """The code that langdetect gives it; None where it finds nothing to go by."""
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError:
        raise BadInput("ifeval: answers in other languages are recognised by langdetect: "
                       "pip install langdetect") from None
    DetectorFactory.seed = 0                             # it draws, and would not say the same twice
    try:
        return detect(text)
    except LangDetectException:
        return None


def response_language(text, language):
    return language_of(text) in (language, None)


def all_capital(text):
    return language_of(text) in ("en", None) and text.isupper()


def all_lowercase(text):
    return language_of(text) in ("en", None) and text.islower()


def number_sentences(text, num_sentences, relation):
    sentences = [sentence for sentence in SENTENCE_END.split(text) if sentence.strip()]
    return holds(len(sentences), relation, num_sentences)


def number_words(text, num_words, relation):
    return holds(times(r"\w+", text), relation, num_words)


def number_paragraphs(text, num_paragraphs):
    """*** stands between them. An empty one counts for nothing at either end, and spoils the rest."""
    paragraphs = re.split(r"\s?\*\*\*\s?", text)
    filled = [bool(paragraph.strip()) for paragraph in paragraphs]
    return all(filled[1:-1]) and sum(filled) == num_paragraphs


def paragraph_begins(text, num_paragraphs, nth_paragraph, first_word):
    """A blank line stands between paragraphs here."""
    paragraphs = text.split("\n\n")
    filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if filled != num_paragraphs or nth_paragraph > filled:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    if not words:
        return False
    word = words[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(text, num_placeholders):
    return times(r"\[.*?\]", text) >= num_placeholders


def postscript(text, postscript_marker):
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = known.get(postscript_marker, postscript_marker.lower())
    return bool(re.search(pattern, text.lower()))


def number_bullet_lists(text, num_bullets):
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars + dashes) == num_bullets


def constrained_response(text):
    options = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return any(option in text for option in options)


def highlighted_sections(text, num_highlights):
    """*so* or **so**; officially both patterns are counted, wherever they hold something."""
    found = re.findall(r"\*[^\n\*]*\*", text) + re.findall(r"\*\*[^\n\*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in found) >= num_highlights


def multiple_sections(text, section_spliter, num_sections):
    heads = re.findall(rf"\s?{section_spliter}\s?\d+\s?", text)
    return len(heads) >= num_sections


def json_format(text):
    text = re.sub(r"^```(json|Json|JSON)?|```$", "", text.strip())
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(text):
    found = re.findall(r"<<[^\n]+>>", text)
    return any(name.lstrip("<").rstrip(">").strip() for name in found)


def two_responses(text):
    responses = [response.strip() for response in text.split("******")]
    filled = list(filter(None, responses))
    return all(responses[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def repeat_prompt(text, prompt_to_repeat):
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text, end_phrase):
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text):
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_words(text, capital_frequency, capital_relation):
    words = re.findall(r"'?\w+(?:[-./]\w+)*", text)
    return holds(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def no_comma(text):
    return "," not in text


CHECKS = {
    "keywords:existence": has_keywords,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": no_forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": paragraph_begins,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": all_capital,
    "change_case:english_lowercase": all_lowercase,
    "punctuation:no_comma": no_comma,
}

# What two sentences, some thirty words on a line, have at most of what an instruction asks for at
# least. Two responses, and a prompt said again, are always more.
SHORT = {
    "num_sentences": 2,
    "num_words": 30,
    "num_paragraphs": 1,
    "num_bullets": 1,
    "num_sections": 1,
    "num_highlights": 2,
    "num_placeholders": 2,
    "frequency": 2,
    "let_frequency": 10,
    "capital_frequency": 5,
}
ALWAYS_LONG = ("combination:two_responses", "combination:repeat_prompt")


def is_long(kind, arguments):
    """Whether two sentences cannot satisfy an instruction."""
    if "less than" in arguments.values():
        return False
    asked = [name for name in SHORT if name in arguments]
    return kind in ALWAYS_LONG or any(arguments[name] > SHORT[name] for name in asked)


# ---- files ---------------------------------------------------------------------------------------

def items(folder):
    path = folder.find("input_data.jsonl")
    rows = stored(path, key="a name or number", prompt="a text", instruction_id_list="a list of texts",
                  kwargs="a list")
    keys = set()
    for row in rows:
        if row["key"] in keys:
            raise BadInput(f"{path}: two prompts have the key {shown(str(row['key']))}")
        keys.add(row["key"])
        row["instructions"] = list(instructions(row, f"{path}: prompt {shown(str(row['key']))}"))
    return [Item(row["key"], [row["prompt"]], row, max_new=1280) for row in rows]


def instructions(row, where):
    """(kind, arguments) of each; on the hub all arguments stand in each row, most of them null."""
    kinds = row["instruction_id_list"]
    if not kinds or len(row["kwargs"]) != len(kinds):
        raise BadInput(f"{where}: kwargs and instruction_id_list are empty or not of one length")
    for kind, given in zip(kinds, row["kwargs"]):
        if kind not in CHECKS:
            raise BadInput(f"{where}: {shown(kind)} is no instruction of IFEval")
        if not isinstance(given, dict):
            raise BadInput(f"{where}: the arguments of {kind} are no object")
        arguments = {name: value for name, value in given.items() if value is not None}
        try:
            if not all(fits(name, value) for name, value in arguments.items()):
                raise TypeError
            CHECKS[kind]("a", **arguments)               # it takes these, and patterns are such
        except (TypeError, re.error):
            raise BadInput(f"{where}: {kind} does not take {shown(repr(arguments), 200)}") from None
        yield kind, arguments


def fits(name, value):
    """Whether an argument of this name can have such a value."""
    if name.startswith(("num_", "nth_")) or name.endswith("frequency"):
        return KINDS["a positive whole number"](value)
    if name.endswith("relation"):
        return value in ("less than", "at least")
    if name in ("keywords", "forbidden_words"):
        return KINDS["a list of texts"](value)
    return KINDS["a text"](value)


def answer_rows(items, model):
    """The official file of responses."""
    return [{"prompt": item.row["prompt"], "response": item.texts[0]} for item in items]


def read_answers(path, items):
    said = {row["prompt"]: row["response"] for row in stored(path, prompt="a text", response="a text")}
    return {item.id: [said[item.row["prompt"]]] for item in items if item.row["prompt"] in said}


# ---- scores --------------------------------------------------------------------------------------

def variants(text):
    """The answer as it is, less its first line, its last line, both; each with and without *."""
    lines = text.split("\n")
    cut = [text] + ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return cut + [part.replace("*", "") for part in cut]


def followed(instruction, texts):
    """Whether one of these texts, and no empty one, does as it is told."""
    kind, arguments = instruction
    return any(text.strip() and CHECKS[kind](text, **arguments) for text in texts)


SCORES = ("prompt", "instruction", "prompt loose", "instruction loose", "short", "long")


def score(items, rows=None):
    answered = [item for item in items if item.texts]
    parts = defaultdict(list)                            # name -> (followed?, 1, which prompt)
    for item in answered:
        instructions = item.row["instructions"]
        texts = variants(item.texts[0])
        strict = [followed(instruction, texts[:1]) for instruction in instructions]
        loose = [followed(instruction, texts) for instruction in instructions]
        parts["prompt"].append((all(strict), 1, item.id))
        parts["prompt loose"].append((all(loose), 1, item.id))
        for (kind, arguments), value, easier in zip(instructions, strict, loose):
            parts["instruction loose"].append((easier, 1, item.id))
            length = "long" if is_long(kind, arguments) else "short"
            for name in ("instruction", length, kind):
                parts[name].append((value, 1, item.id))

    def share(*names):
        return ratios([tuple(zip(*parts[name])) for name in names if parts[name]])

    return {
        "scores": {"strict": share("prompt", "instruction")} | {name: share(name) for name in SCORES},
        "categories": {kind: share(kind) for kind in sorted(CHECKS) if kind in parts},
        "ok": len(answered),
        "total": len(items),
    }
