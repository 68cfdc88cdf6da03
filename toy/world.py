"""A world small enough to know the truth: draw it, and ask about it.

Real alignment data has one soft spot: nobody knows whether the judge is right. Here somebody does.
A scene is a 3 x 3 board with one to four things on it; every thing has a size, a color, a shape and
a place, and no two things of a scene share a shape or a color, so "the circle" is never ambiguous.
The renderer jitters position, radius, shade and background, so seeing is real, but one cell is one
16 x 16 patch: what an image token has to hold is one thing, or nothing.

The language has about two hundred words. A question, its full answer ("the circle is red .") and
its bare answer ("red") are made together, as one `turn`; that is all that the exact judge
(oracle.py) needs. A scene told in words names a thing in one hyphenated word ("top-left
big-red-circle") and takes the very questions that a picture takes, so a text model can learn to
look things up before it sees.

Everybody draws from `random.Random` in a fixed order: the same seed, the same world. The split into
train, dev and test is a checksum of the scene or of the question.
"""
import math
import random
import re
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# ---- words ---------------------------------------------------------------------------------------

SIZES = ("big", "small")
COLORS = {
    "red": (214, 45, 40),
    "orange": (242, 140, 30),
    "yellow": (238, 218, 50),
    "green": (50, 160, 70),
    "blue": (45, 90, 215),
    "purple": (140, 60, 170),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top-left", "top", "top-right",
          "left", "center", "right",
          "bottom-left", "bottom", "bottom-right")
VALUES = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES, "place": PLACES}

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FRUIT_OF = {
    "red": "cherry", "orange": "mango", "yellow": "banana",
    "green": "lime", "blue": "blueberry", "purple": "plum",
}
HOME = {
    "ant": "garden", "mouse": "house", "cat": "house", "dog": "park",
    "sheep": "park", "horse": "garden", "elephant": "forest", "whale": "sea",
}
ANIMALS = tuple(HOME)                                   # the smallest first
LETTERS = ("(a)", "(b)", "(c)")
CATEGORY = {
    "colors": tuple(COLORS),
    "shapes": SHAPES,
    "fruits": tuple(FRUIT_OF.values()),
    "animals": ANIMALS,
}

OPPOSITE = {
    "big": "small", "small": "big",
    "hot": "cold", "cold": "hot",
    "fast": "slow", "slow": "fast",
    "old": "new", "new": "old",
    "wet": "dry", "dry": "wet",
    "happy": "sad", "sad": "happy",
    "light": "dark", "dark": "light",
    "loud": "quiet", "quiet": "loud",
}

# A written thing is one word that carries all but its place, as in a picture it is one patch.
COMPOUNDS = tuple(f"{size}-{color}-{shape}"
                  for size in SIZES for color in COLORS for shape in SHAPES)

# The words that can be true or false; all others are grammar. Where a story happens is free.
CONTENT = frozenset((*SIZES, *COLORS, *SHAPES, *PLACES, *NUMBERS, *FRUIT_OF.values(), *ANIMALS,
                     *OPPOSITE, *LETTERS, *COMPOUNDS, "yes", "no", "larger", "smaller"))
HOMES = frozenset((*HOME.values(), "picture"))


def number(n):
    return NUMBERS[n - 1]


def join(words):
    """("a", "b", "c") -> "a , b and c"."""
    *others, last = words
    return " , ".join(others) + " and " + last if others else last


# ---- scenes --------------------------------------------------------------------------------------

class Thing(NamedTuple):
    size: str
    color: str
    shape: str
    place: str


Scene = tuple[Thing, ...]               # one to four things, in reading order where it is drawn


def split_of(key: str):
    """"train", "dev" or "test" (1/8 each for the last two), decided by the text itself."""
    return {0: "dev", 6: "test"}.get(zlib.crc32(key.encode()) % 8, "train")


def caption(scene):
    """Everything there is to say: size, color, shape and place of each thing, in order."""
    things = join(f"a {t.size} {t.color} {t.shape} at {t.place}" for t in scene)
    return f"i see {things} ."


def random_scene(rng, split="train", least=1, most=4) -> Scene:
    """Draw until the scene belongs to `split`; shapes, colors and places are distinct."""
    while True:
        n = rng.randint(least, most)
        places = sorted(rng.sample(PLACES, n), key=PLACES.index)
        colors = rng.sample(list(COLORS), n)
        shapes = rng.sample(SHAPES, n)
        sizes = [rng.choice(SIZES) for _ in range(n)]
        scene = tuple(map(Thing, sizes, colors, shapes, places))
        if split_of(caption(scene)) == split:
            return scene


def edited(rng, scene):
    """The same scene with one attribute of one thing changed: a hard negative (build.py)."""
    things = list(scene)
    i = rng.randrange(len(scene))
    field = rng.choice(Thing._fields)

    # Two things may be of one size; everything else is taken where another thing has it.
    taken = [getattr(t, field) for t in scene]
    if field == "size":
        taken = [scene[i].size]
    free = [value for value in VALUES[field] if value not in taken]

    things[i] = things[i]._replace(**{field: rng.choice(free)})
    return tuple(sorted(things, key=lambda t: PLACES.index(t.place)))


def render(scene: Scene, seed: int) -> Image.Image:
    """A 48 x 48 RGB picture, drawn at four times that size.

    `seed` moves position, radius, shade, background and noise."""
    rng = random.Random(seed)
    cell = 64                                           # of the large drawing; 16 pixels in the end
    background = tuple(rng.randint(205, 235) for _ in range(3))
    board = Image.new("RGB", (3 * cell, 3 * cell), background)
    pen = ImageDraw.Draw(board)

    for t in scene:
        row, column = divmod(PLACES.index(t.place), 3)
        radius = cell * (rng.uniform(.40, .46) if t.size == "big" else rng.uniform(.29, .33))
        slack = .3 * (.48 * cell - radius)              # a thing never leaves its cell
        x = (column + .5) * cell + rng.uniform(-slack, slack)
        y = (row + .5) * cell + rng.uniform(-slack, slack)
        shade = rng.uniform(.85, 1.12)
        ink = tuple(min(255, int(v * shade + rng.uniform(-8, 8))) for v in COLORS[t.color])
        draw_shape(pen, t.shape, x, y, radius, ink)

    pixels = np.asarray(board.resize((48, 48), Image.Resampling.BOX), dtype=np.float32)
    noise = np.random.default_rng(seed).normal(0, 4, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def draw_shape(pen, shape, x, y, r, ink):
    """A shape of radius r, its center at (x, y)."""
    def box(a, b):
        return x - a, y - b, x + a, y + b

    if shape == "circle":
        pen.ellipse(box(r, r), fill=ink)
    elif shape == "square":
        pen.rectangle(box(.85 * r, .85 * r), fill=ink)
    elif shape == "cross":
        pen.rectangle(box(r, .3 * r), fill=ink)
        pen.rectangle(box(.3 * r, r), fill=ink)
    else:
        # a triangle has three corners, a star five outer and five inner ones
        radii = (r, r, r) if shape == "triangle" else (r, .4 * r) * 5
        corners = []
        for i, q in enumerate(radii):
            angle = i * (2 * math.pi / len(radii))
            corners.append((x + q * math.sin(angle), y - q * math.cos(angle)))
        pen.polygon(corners, fill=ink)


# ---- turns: a question with its full and its bare answer -----------------------------------------
#
# The sentences below answer questions about pictures and questions without any (tasks.py). This
# shared wording is what ties the two abilities together.

def turn(kind, question, answer, **rule):
    """`answer` is the full one, the bare one in brackets: "the circle is [red] .".

    `rule` is what the judge must know beside the answers, for lists whose order is free."""
    before, bare, after = re.split(r"[][]", answer)
    full = before + bare + after
    return {"kind": kind, "question": question, "full": full, "bare": bare, **rule}


def two_colors(rng, right):
    """The right color and a wrong one, in any order."""
    wrong = rng.choice([color for color in COLORS if color != right])
    return rng.sample([right, wrong], 2)


def either(question, noun, color):
    return turn("either", question, f"the {noun} is [{color}] .")


def larger(question, large, small):
    return turn("compare", question, f"[the {large}] is larger than the {small} .")


def opposite(question, word):
    return turn("opposite", question, f"the opposite of {word} is [{OPPOSITE[word]}] .")


def fruit(question, color):
    return turn("fruit", question, f"[the {FRUIT_OF[color]}] is {color} .")


def repeated(question, word, times):
    words = " ".join([word] * times)
    return turn("repeat", question, f"here it is : [{words}] .")


def plus(question, a, b):
    return turn("add", question, f"{number(a)} plus {number(b)} is [{number(a + b)}] .")


def listed(question, category, words, **rule):
    return turn("list", question, f"the {category} are [{join(words)}] .", **rule)


def counted(question, numbers):
    return turn("count", question, f"the numbers are [{join(map(number, numbers))}] .")


def sentence(question, adjective, noun):
    home = HOME.get(noun, "picture")
    return turn("sentence", question, f"once there was [a {adjective} {noun}] in the {home} .")


# ---- questions about a scene, seen or written ----------------------------------------------------

LOOKUPS = ("color", "size", "where", "shape", "exist", "number")
KNOWLEDGE = ("either", "compare", "opposite", "fruit", "repeat", "add", "list", "count", "sentence")


def ask(rng: random.Random, scene: Scene, kind: str):
    """One question of LOOKUPS, of KNOWLEDGE, or "describe", "each" or "choice"."""
    thing = rng.choice(scene)
    size, color, shape, place = thing

    if kind in ("color", "size"):
        value = getattr(thing, kind)
        return turn(kind, f"what {kind} is the {shape} ?", f"the {shape} is [{value}] .")
    if kind == "where":
        return turn(kind, f"where is the {shape} ?", f"the {shape} is at [{place}] .")
    if kind == "shape":
        return turn(kind, f"what shape is the {color} one ?", f"the {color} one is a [{shape}] .")
    if kind == "exist":
        return ask_exist(rng, scene, rng.random() < .5)
    if kind == "number":
        noun = "objects" if len(scene) > 1 else "object"
        return turn(kind, "how many objects are there ?", f"i see [{number(len(scene))}] {noun} .")
    if kind == "describe":
        bare = join(f"{t.size} {t.color} {t.shape}" for t in scene)
        return turn(kind, "describe the scene .", f"[{caption(scene)}]") | {"bare": bare}
    if kind == "each":
        return ask_each(rng, scene)
    if kind == "choice":
        return ask_choice(rng, thing)
    return ask_knowledge(rng, scene, kind)


def ask_exist(rng, scene, truth):
    """"is there a circle ?" or "is there a red one ?": object presence, as in POPE."""
    field = rng.choice(("shape", "color"))
    there = [getattr(t, field) for t in scene]
    absent = [value for value in VALUES[field] if value not in there]
    word = rng.choice(there if truth else absent)
    thing = word if field == "shape" else f"{word} one"

    question = f"is there a {thing} ?"
    if truth:
        return turn("exist", question, f"[yes] , there is a {thing} .")
    return turn("exist", question, f"[no] , there is no {thing} .")


def ask_each(rng, scene):
    """"name the color of the star and circle ." -> "star blue and circle red ."; in any order.

    This is how the miniature learns to look things up: right after the word "star" the next word is
    a property of the star, so one attention head that finds the star is enough, and the longer
    questions build on it. Without such answers the same model guesses among the things of the scene
    for many thousand conversations (see LOG.md)."""
    things = rng.sample(scene, len(scene))
    value = rng.choice(("color", "size", "place", "place", "shape"))
    key = "color" if value == "shape" else "shape"

    keys = [getattr(t, key) for t in things]
    values = [getattr(t, value) for t in things]
    named = join(keys) + (" one" if key == "color" else "")
    answer = join(f"{k} {v}" for k, v in zip(keys, values))
    bare = {"bare": join(values)}
    return turn("each", f"name the {value} of the {named} .", f"[{answer}] .") | bare


def ask_choice(rng, thing):
    """Three colors under letters, the right one among them."""
    options = rng.sample(list(COLORS), 3)
    if thing.color not in options:
        options[rng.randrange(3)] = thing.color
    right = LETTERS[options.index(thing.color)]

    offer = " ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options))
    question = f"what color is the {thing.shape} ? {offer} . answer with the letter ."
    return turn("choice", question, f"the answer is [{right}] .")


def ask_knowledge(rng, scene, kind):
    """A text task's own wording with one argument to be looked up.

    Where all things are of one size, "compare" becomes "opposite"."""
    size, color, shape, _ = rng.choice(scene)

    if kind == "compare":
        big = [t.shape for t in scene if t.size == "big"]
        small = [t.shape for t in scene if t.size == "small"]
        if big and small:
            pair = [rng.choice(big), rng.choice(small)]
            one, two = rng.sample(pair, 2)
            return larger(f"which is larger , the {one} or the {two} ?", *pair)
        kind = "opposite"

    if kind == "either":
        one, two = two_colors(rng, color)
        return either(f"is the {shape} {one} or {two} ?", shape, color)
    if kind == "opposite":
        return opposite(f"what is the opposite of the size of the {shape} ?", size)
    if kind == "fruit":
        return fruit(f"which fruit has the color of the {shape} ?", color)
    if kind == "list":
        return listed("list the colors .", "colors", (t.color for t in scene), set=True)
    if kind == "repeat":
        times = rng.choice((2, 3, 4))
        question = f"repeat the color of the {shape} {number(times)} times ."
        return repeated(question, color, times)
    if kind == "add":
        k = rng.randint(1, 5)
        return plus(f"what is the number of objects plus {number(k)} ?", len(scene), k)
    if kind == "count":
        return counted("count from one to the number of objects .", range(1, len(scene) + 1))
    return sentence(f"write a sentence about the {shape} .", size, shape)
