"""How a model talks, whatever it says: three figures that stand beside every text benchmark.

    words        mean words of an answer
    looping      share of answers that end in a phrase said four times over: the end of a model that
                 no longer knows how to stop
    scene talk   share of answers that speak of the miniature's world ("the red star", "I see a big
                 circle") where the question does not: what visual tuning puts into every mouth

Defined before the first run that they describe, so that nobody chose them for what they show.
"""
import re

from benchmarks.harness import mean
from toy.world import COLORS, SHAPES, SIZES

LONGEST = 30    # words of a phrase that may be said again
LOOKS = "|".join((*SIZES, *COLORS))
THINGS = "|".join(SHAPES)
SCENE = re.compile(
    rf"\b(({LOOKS}) ({THINGS})|({'|'.join(SIZES)}) ({'|'.join(COLORS)})|({THINGS}) is ({LOOKS}|at)|"
    r"i see (a|an|one|two|three|four))\b"
)


def loops(text: str) -> bool:
    """Whether the last words repeat with some period, four periods long."""
    whole = text.split()
    for words in (whole, whole[:-1]):                    # the very last word may be cut off
        for period in range(1, LONGEST + 1):
            end = words[-3 * period:]
            if len(words) >= 4 * period and end == words[-4 * period:-period]:
                return True
    return False


def scene_talk(question: str, text: str) -> bool:
    return bool(SCENE.search(text.lower())) and not SCENE.search(question.lower())


def style(items) -> dict:
    """{"words", "looping", "scene talk"} of answered items (harness.Item), with intervals."""
    words = []
    looping = []
    talk = []
    ids = []
    for item in items:
        for question, text in zip(item.questions, item.texts):
            words.append(len(text.split()))
            looping.append(loops(text))
            talk.append(scene_talk(question, text))
            ids.append(item.id)                          # turns of one conversation move together
    return {
        "words": mean(words, ids),
        "looping": mean(looping, ids),
        "scene talk": mean(talk, ids),
    }
