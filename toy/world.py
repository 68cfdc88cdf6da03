"""A world small enough to know the truth: draw it, and ask about it.

Real alignment data has one soft spot: nobody knows whether the judge is right. Here somebody does.
A scene is a 3 x 3 board with one to four things on it; every thing has a size, a color, a shape and a
place, and no two things of a scene share a shape or a color, so "the circle" is never ambiguous. The
renderer jitters position, radius, shade and background, so seeing is real, but one cell is one
16 x 16 patch: what an image token has to hold is one thing, or nothing.

The language has about two hundred words. A question, its full answer ("the circle is red .") and its bare
answer ("red") are made together; that triple is all that the exact judge (toy/oracle.py) needs. A written scene names
a thing in one hyphenated word ("top-left big-red-circle") and takes the very questions that an image takes, so a
text model can learn to look things up before it sees.

Nothing here knows about models or training methods. Everybody draws from `random.Random`, the split
into train, dev and test is a checksum of the scene or of the prompt, and a record carries its truth
as JSON, so it can be judged after any journey through files.

Previous: common.py.  Next: toy/tasks.py (what is made of these questions).
"""
import math
import random
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# ---- words ---------------------------------------------------------------------------------------------------

SIZES = ("big", "small")
COLORS = {"red": (214, 45, 40), "orange": (242, 140, 30), "yellow": (238, 218, 50),
          "green": (50, 160, 70), "blue": (45, 90, 215), "purple": (140, 60, 170)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FRUIT_OF = {"red": "cherry", "orange": "mango", "yellow": "banana", "green": "lime", "blue": "blueberry", "purple": "plum"}
ANIMALS = ("ant", "mouse", "cat", "dog", "sheep", "horse", "elephant", "whale")     # by size
OPPOSITE = dict(p for a, b in (("big", "small"), ("hot", "cold"), ("fast", "slow"), ("old", "new"),
                               ("wet", "dry"), ("happy", "sad"), ("light", "dark"), ("loud", "quiet"))
                for p in ((a, b), (b, a)))
CATEGORY = {"colors": tuple(COLORS), "shapes": SHAPES, "fruits": tuple(FRUIT_OF.values()), "animals": ANIMALS}
LETTERS = ("(a)", "(b)", "(c)")
HOME = dict(zip(ANIMALS, ("garden", "house", "house", "park", "park", "garden", "forest", "sea")))
# a written thing is one word that carries everything but its place, as in an image it is one patch
COMPOUNDS = tuple(f"{s}-{c}-{h}" for s in SIZES for c in COLORS for h in SHAPES)
# the words that can be true or false; all others are grammar
CONTENT = frozenset((*SIZES, *COLORS, *SHAPES, *PLACES, *NUMBERS, *FRUIT_OF.values(), *ANIMALS, *OPPOSITE,
                     *LETTERS, *COMPOUNDS, "yes", "no", "larger", "smaller"))
HOMES = frozenset((*HOME.values(), "picture"))          # where a made-up story happens is free


def join(words) -> str:
    """("a", "b", "c") -> "a , b and c"."""
    words = list(words)
    return words[0] if len(words) == 1 else " , ".join(words[:-1]) + " and " + words[-1]


# ---- scenes --------------------------------------------------------------------------------------------------

class Thing(NamedTuple):
    size: str
    color: str
    shape: str
    place: str


Scene = tuple[Thing, ...]               # one to four things, in reading order where it is drawn


def split_of(key: str) -> str:
    """"train", "dev" or "test" (1/8 each for the last two), decided by the text itself."""
    return {0: "dev", 6: "test"}.get(zlib.crc32(key.encode()) % 8, "train")


def caption(scene: Scene) -> str:
    """Everything there is to say: size, color, shape and place of each thing, in the scene's order."""
    return "i see " + join(f"a {t.size} {t.color} {t.shape} at {t.place}" for t in scene) + " ."


def is_held_out(scene: Scene) -> bool:
    return split_of(caption(scene)) != "train"


def random_scene(rng: random.Random, split: str = "train", least: int = 1, most: int = 4) -> Scene:
    """Draw until the scene belongs to `split`; shapes, colors and places are distinct."""
    while True:
        n = rng.randint(least, most)
        places = sorted(rng.sample(range(9), n))
        scene = tuple(Thing(rng.choice(SIZES), c, h, PLACES[p]) for c, h, p in
                      zip(rng.sample(list(COLORS), n), rng.sample(SHAPES, n), places))
        if split_of(caption(scene)) == split:
            return scene


def edited(rng: random.Random, scene: Scene) -> Scene:
    """The same scene with one attribute of one thing changed: a hard negative for contrastive training."""
    things, i = list(scene), rng.randrange(len(scene))
    field = rng.choice(Thing._fields)
    taken = {getattr(t, field) for t in scene} if field != "size" else {scene[i].size}
    values = {"size": SIZES, "color": tuple(COLORS), "shape": SHAPES, "place": PLACES}[field]
    things[i] = things[i]._replace(**{field: rng.choice([v for v in values if v not in taken])})
    return tuple(sorted(things, key=lambda t: PLACES.index(t.place)))


def render(scene: Scene, seed: int) -> Image.Image:
    """A 48 x 48 RGB picture, drawn at four times that size; `seed` moves position, radius, shade, background and noise."""
    rng, unit = random.Random(seed), 64
    board = Image.new("RGB", (3 * unit, 3 * unit), tuple(rng.randint(205, 235) for _ in range(3)))
    pen = ImageDraw.Draw(board)
    for t in scene:
        row, col = divmod(PLACES.index(t.place), 3)
        r = unit * (rng.uniform(.40, .46) if t.size == "big" else rng.uniform(.29, .33))
        slack = .3 * (unit * .48 - r)                   # a thing never leaves its cell
        x = (col + .5) * unit + rng.uniform(-slack, slack)
        y = (row + .5) * unit + rng.uniform(-slack, slack)
        shade = rng.uniform(.85, 1.12)
        ink = tuple(min(255, int(v * shade + rng.uniform(-8, 8))) for v in COLORS[t.color])
        draw_shape(pen, t.shape, x, y, r, ink)
    pixels = np.asarray(board.resize((48, 48), Image.Resampling.BOX), dtype=np.float32)
    noise = np.random.default_rng(seed).normal(0, 4, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, ink: tuple) -> None:
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif shape == "square":
        pen.rectangle((x - .85 * r, y - .85 * r, x + .85 * r, y + .85 * r), fill=ink)
    elif shape == "cross":
        pen.rectangle((x - r, y - .3 * r, x + r, y + .3 * r), fill=ink)
        pen.rectangle((x - .3 * r, y - r, x + .3 * r, y + r), fill=ink)
    else:                                               # triangle: 3 corners; star: 5 outer and 5 inner ones
        radii = (r, r, r) if shape == "triangle" else (r, .4 * r) * 5
        step = 2 * math.pi / len(radii)
        pen.polygon([(x + q * math.sin(i * step), y - q * math.cos(i * step)) for i, q in enumerate(radii)], fill=ink)


# ---- questions: every maker returns (question, full answer, bare answer[, extra rule for the judge]) ---------

LOOKUPS = ("color", "size", "where", "shape", "exist", "number")
KNOWLEDGE = ("either", "compare", "opposite", "fruit", "repeat", "add", "list", "count", "sentence")


def ask(rng: random.Random, scene: Scene, kind: str) -> dict:
    """One question about a scene, seen or written."""
    t, n = rng.choice(scene), NUMBERS[len(scene) - 1]
    fixed = {"color": (f"what color is the {t.shape} ?", f"the {t.shape} is {t.color} .", t.color),
             "size": (f"what size is the {t.shape} ?", f"the {t.shape} is {t.size} .", t.size),
             "where": (f"where is the {t.shape} ?", f"the {t.shape} is at {t.place} .", t.place),
             "shape": (f"what shape is the {t.color} one ?", f"the {t.color} one is a {t.shape} .", t.shape),
             "number": ("how many objects are there ?", f"i see {n} object{'s' * (len(scene) > 1)} .", n),
             "describe": ("describe the scene .", caption(scene), join(f"{u.size} {u.color} {u.shape}" for u in scene))}
    if kind in fixed:
        return turn(kind, *fixed[kind])
    if kind == "exist":
        return ask_exist(rng, scene, rng.random() < .5)
    if kind == "each":
        return ask_each(rng, scene)
    return ask_choice(rng, t) if kind == "choice" else ask_knowledge(rng, scene, kind)


def ask_each(rng: random.Random, scene: Scene) -> dict:
    """"name the color of the star and circle ." -> "star blue and circle red ."; in any order the asker likes.

    This is how the miniature learns to look things up: right after the word "star" the next word is a property of the
    star, so one attention head that finds the star is enough, and the longer questions build on it. Without such
    answers the same model guesses among the things of the scene for many thousand conversations (see LOG.md)."""
    things = rng.sample(scene, len(scene))
    key, value = rng.choice((("shape", "color"), ("shape", "size"), ("shape", "place"), ("shape", "place"), ("color", "shape")))
    named = join(getattr(t, key) for t in things) + (" one" if key == "color" else "")
    return turn("each", f"name the {value} of the {named} .",
                join(f"{getattr(t, key)} {getattr(t, value)}" for t in things) + " .",
                join(getattr(t, value) for t in things))


def ask_exist(rng: random.Random, scene: Scene, truth: bool) -> dict:
    """"is there a circle ?" or "is there a red one ?": object presence, as in POPE."""
    field, values = rng.choice((("shape", SHAPES), ("color", tuple(COLORS))))
    there = [getattr(t, field) for t in scene]
    word = rng.choice(there if truth else [v for v in values if v not in there])
    thing = word if field == "shape" else f"{word} one"
    full, bare = (f"yes , there is a {thing} .", "yes") if truth else (f"no , there is no {thing} .", "no")
    return turn("exist", f"is there a {thing} ?", full, bare)


def ask_choice(rng: random.Random, t: Thing) -> dict:
    options = rng.sample(list(COLORS), 3)
    if t.color not in options:
        options[rng.randrange(3)] = t.color
    offer = " ".join(f"{x} {o}" for x, o in zip(LETTERS, options))
    right = LETTERS[options.index(t.color)]
    return turn("choice", f"what color is the {t.shape} ? {offer} . answer with the letter .",
                f"the answer is {right} .", right)


def ask_knowledge(rng: random.Random, scene: Scene, kind: str) -> dict:
    """The text tasks' own wording with one argument to be looked up: what ties the two worlds together. Where all things are of
    one size, "compare" becomes "opposite"."""
    t, n = rng.choice(scene), len(scene)
    if kind == "compare":
        big, small = ([u for u in scene if u.size == s] for s in SIZES)
        if big and small:
            pair = [rng.choice(big).shape, rng.choice(small).shape]
            one, two = rng.sample(pair, 2)
            return turn(kind, f"which is larger , the {one} or the {two} ?",
                        f"the {pair[0]} is larger than the {pair[1]} .", f"the {pair[0]}")
        kind = "opposite"
    if kind == "either":
        one, two = rng.sample([t.color, rng.choice([c for c in COLORS if c != t.color])], 2)
        return turn(kind, f"is the {t.shape} {one} or {two} ?", f"the {t.shape} is {t.color} .", t.color)
    opposite, fruit, colors = OPPOSITE[t.size], FRUIT_OF[t.color], join(u.color for u in scene)
    if kind == "opposite":
        return turn(kind, f"what is the opposite of the size of the {t.shape} ?",
                    f"the opposite of {t.size} is {opposite} .", opposite)
    if kind == "fruit":
        return turn(kind, f"which fruit has the color of the {t.shape} ?", f"the {fruit} is {t.color} .", f"the {fruit}")
    if kind == "list":
        return turn(kind, "list the colors .", f"the colors are {colors} .", colors, set=True)
    if kind == "repeat":
        times = rng.choice((2, 3, 4))
        return say_times(f"repeat the color of the {t.shape} {NUMBERS[times - 1]} times .", t.color, times)
    if kind == "add":
        k = rng.randint(1, 5)
        return add(f"what is the number of objects plus {NUMBERS[k - 1]} ?", n, k)
    if kind == "count":
        return numbers("count from one to the number of objects .", range(n))
    return sentence(f"write a sentence about the {t.shape} .", t.size, t.shape, "picture")


def turn(kind: str, question: str, full: str, bare: str, **rule) -> dict:
    return {"kind": kind, "question": question, "full": full, "bare": bare, **rule}


def say_times(question: str, word: str, times: int) -> dict:
    bare = " ".join([word] * times)
    return turn("repeat", question, f"here it is : {bare} .", bare)


def add(question: str, a: int, b: int) -> dict:
    total = NUMBERS[a + b - 1]
    return turn("add", question, f"{NUMBERS[a - 1]} plus {NUMBERS[b - 1]} is {total} .", total)


def numbers(question: str, indices) -> dict:
    words = join(NUMBERS[i] for i in indices)
    return turn("count", question, f"the numbers are {words} .", words)


def sentence(question: str, adjective: str, noun: str, home: str) -> dict:
    return turn("sentence", question, f"once there was a {adjective} {noun} in the {home} .", f"a {adjective} {noun}")
