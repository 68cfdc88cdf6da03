"""The miniature's world in the English that real language models speak.

    what color is the star ?          What color is the star?
    the star is at top-left .         The star is at the top left.
    i see a big orange star at top .  I see a big orange star at the top.

One world, one oracle, one more spelling: `english` writes the miniature's words for a language
model that somebody else trained (smol.py), and `plain` reads its answers for the exact judge
(oracle.py). What `english` spells, `plain` gives back.
"""
import re

from toy.world import PLACES

WAYS = "|".join({way for place in PLACES for way in place.split("-")})       # top, left, ...


def english(text: str) -> str:
    """The miniature's words -> a sentence with capitals, articles and punctuation as people have
    them."""
    text = re.sub(rf"\bat ({WAYS})\b", r"at the \1", text)
    text = re.sub(r"\b(top|bottom)-(left|right)\b", r"\1 \2", text)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    text = re.sub(r" ([.,?:])", r"\1", text)
    text = re.sub(r"\bi see\b", "I see", text)
    return re.sub(r"(^|[.?] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def plain(text: str) -> str:
    """A model's answer in English -> the miniature's words, for the oracle."""
    text = text.lower()
    text = re.sub(r"\b(top|bottom)[ -](left|right)\b", r"\1-\2", text)
    text = re.sub(rf"\bat the (?=({WAYS})\b)", "at ", text)
    text = re.sub(r"\ban (?=[aeiou])", "a ", text)
    text = re.sub(r"([.,?:!])", r" \1", text)
    return " ".join(text.split())


def in_english(record: dict) -> dict:
    """A record of tasks.py with its messages and golden answer in English, and a truth that says
    so."""
    messages = []
    for message in record["messages"]:
        head, marker, words = message["content"].rpartition("<image>\n")
        messages.append(message | {"content": head + marker + english(words)})
    return record | {
        "messages": messages,
        "golden": english(record["golden"]),
        "truth": record["truth"] | {"english": True},
    }
