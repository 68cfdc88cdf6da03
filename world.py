"""A world small enough to know the truth: draw it, ask about it, judge any answer exactly.

Real alignment data has one soft spot: nobody knows whether the judge is right. Here somebody does.
A scene is a 3 x 3 board with one to four things on it; every thing has a size, a color, a shape and a
place, and no two things of a scene share a shape or a color, so "the circle" is never ambiguous. The
renderer jitters position, radius, shade and background, so seeing is real, but one cell is one
16 x 16 patch: what an image token has to hold is one thing, or nothing.

The language has about two hundred words. A question, its full answer ("the circle is red .") and its bare
answer ("red") are made together, and this triple is also all the judge needs: it reads the *claims* of
an answer (the words with content, in order), compares them with the truth, and only then looks at
the form. A written scene names a thing in one hyphenated word ("top-left big-red-circle") and takes
the very questions that an image takes, so a text model can learn to look things up before it sees.

Nothing here knows about models or training methods. Everybody draws from `random.Random`, the split
into train, dev and test is a checksum of the scene or of the prompt, and a record carries its truth
as JSON, so it can be judged after any journey through files.

    python world.py            # one scene per stage, printed, with the judge's opinion of a few answers

Next: toy.py (the four stages that turn this world into two checkpoints).
"""
import math
import random
import re
import zlib
from collections import Counter
from itertools import count
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

# ---------------------------------------------------------------------------------------------------
# words

SIZES = ("big", "small")
COLORS = {"red": (214, 45, 40), "orange": (242, 140, 30), "yellow": (238, 218, 50),
          "green": (50, 160, 70), "blue": (45, 90, 215), "purple": (140, 60, 170)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FRUIT_OF = {"red": "cherry", "orange": "mango", "yellow": "banana", "green": "lime", "blue": "blueberry",
            "purple": "plum"}
ANIMALS = ("ant", "mouse", "cat", "dog", "sheep", "horse", "elephant", "whale")     # by size
OPPOSITE = dict(p for a, b in (("big", "small"), ("hot", "cold"), ("fast", "slow"), ("old", "new"),
                               ("wet", "dry"), ("happy", "sad"), ("light", "dark"), ("loud", "quiet"))
                for p in ((a, b), (b, a)))
CATEGORY = {"colors": tuple(COLORS), "shapes": SHAPES, "fruits": tuple(FRUIT_OF.values()), "animals": ANIMALS}
LETTERS = ("(a)", "(b)", "(c)")
HOME = dict(zip(ANIMALS, ("garden", "house", "house", "park", "park", "garden", "forest", "sea")))
OWNER = {h: h + "'s" for h in SHAPES}                   # "the circle's red ."
# a written thing is two words that carry everything, as in an image it is one patch
COMPOUNDS = ({f"{s}-{c}-{h}": (s, c, h) for s in SIZES for c in COLORS for h in SHAPES}
             | {f"{h}-at-{p}": (h, p) for h in SHAPES for p in PLACES})
# the words that can be true or false; all others are grammar
CONTENT = frozenset((*SIZES, *COLORS, *SHAPES, *PLACES, *NUMBERS, *FRUIT_OF.values(), *ANIMALS, *OPPOSITE,
                     *LETTERS, *COMPOUNDS, *OWNER.values(), "yes", "no", "larger", "smaller"))
HOMES = frozenset((*HOME.values(), "picture"))          # where a made-up story happens is free


def join(words) -> str:
    """("a", "b", "c") -> "a , b and c"."""
    words = list(words)
    return words[0] if len(words) == 1 else " , ".join(words[:-1]) + " and " + words[-1]


# ---------------------------------------------------------------------------------------------------
# scenes

class Thing(NamedTuple):
    size: str
    color: str
    shape: str
    place: str


Scene = tuple[Thing, ...]               # one to four things in reading order


def split_of(key: str) -> str:
    """"train", "dev" or "test" (1/8 each for the last two), decided by the text itself."""
    return {0: "dev", 6: "test"}.get(zlib.crc32(key.encode()) % 8, "train")


def caption(scene: Scene) -> str:
    """Everything there is to say: size, color, shape and place of each thing, in reading order."""
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


def render(scene: Scene, seed: int, cell: int = 16, smooth: int = 4) -> Image.Image:
    """A 3 cell x 3 cell RGB picture; `seed` moves position, radius, shade, background and noise."""
    rng, unit = random.Random(seed), cell * smooth
    board = Image.new("RGB", (3 * unit, 3 * unit), tuple(rng.randint(205, 235) for _ in range(3)))
    pen = ImageDraw.Draw(board)
    for t in scene:
        row, col = divmod(PLACES.index(t.place), 3)
        r = unit * (rng.uniform(.40, .46) if t.size == "big" else rng.uniform(.24, .29))
        slack = unit * .48 - r                          # a thing never leaves its cell
        x = (col + .5) * unit + rng.uniform(-slack, slack)
        y = (row + .5) * unit + rng.uniform(-slack, slack)
        shade = rng.uniform(.85, 1.12)
        ink = tuple(min(255, int(v * shade + rng.uniform(-8, 8))) for v in COLORS[t.color])
        draw_shape(pen, t.shape, x, y, r, ink)
    pixels = np.asarray(board.resize((3 * cell, 3 * cell), Image.Resampling.BOX), dtype=np.float32)
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
        pen.polygon([(x + q * math.sin(i * step), y - q * math.cos(i * step)) for i, q in enumerate(radii)],
                    fill=ink)


# ---------------------------------------------------------------------------------------------------
# questions: every maker returns (question, full answer, bare answer[, extra rule for the judge])

LOOKUPS = ("color", "size", "where", "shape", "exist", "number")
KNOWLEDGE = ("either", "compare", "opposite", "fruit", "repeat", "add", "list", "count", "sentence")


def ask(rng: random.Random, scene: Scene, kind: str) -> dict:
    """One question about a scene, seen or written; kinds that do not fit this scene become "color"."""
    t, n = rng.choice(scene), NUMBERS[len(scene) - 1]
    if kind == "size":
        return turn(kind, f"what is the {OWNER[t.shape]} size ?", f"the {OWNER[t.shape]} {t.size} .", t.size)
    if kind == "where":
        return turn(kind, f"what is the {OWNER[t.shape]} place ?", f"the {OWNER[t.shape]} at {t.place} .", t.place)
    if kind == "shape":
        return turn(kind, f"what shape is the {t.color} one ?", f"it is the {t.color} {t.shape} .", t.shape)
    if kind == "exist":
        return ask_exist(rng, scene, rng.random() < .5)
    if kind == "number":
        noun = "object" if len(scene) == 1 else "objects"
        return turn(kind, "how many objects are there ?", f"i see {n} {noun} .", n)
    if kind == "describe":
        return turn(kind, "describe the scene .", caption(scene),
                    join(f"{t.size} {t.color} {t.shape}" for t in scene))
    if kind == "tell":                                  # many look-ups for few words, in the asker's order
        asked = rng.sample(scene, len(scene))
        return turn(kind, f"tell me about the {join(u.shape for u in asked)} .",
                    " , ".join(f"the {OWNER[u.shape]} {u.size} and {u.color} at {u.place}" for u in asked) + " .",
                    " , ".join(f"{OWNER[u.shape]} {u.size} {u.color} {u.place}" for u in asked))
    if kind == "choice":
        return ask_choice(rng, t)
    if kind in KNOWLEDGE:
        return ask_knowledge(rng, scene, kind)
    return turn("color", f"what is the {OWNER[t.shape]} color ?", f"the {OWNER[t.shape]} {t.color} .", t.color)


def ask_exist(rng: random.Random, scene: Scene, truth: bool) -> dict:
    """"is there a red circle ?"; half of the false pairs recombine a color and a shape that are both there."""
    pairs = {(t.color, t.shape) for t in scene}
    colors, shapes = [t.color for t in scene], [t.shape for t in scene]
    color, shape = rng.choice(sorted(pairs))
    if not truth and rng.random() < .5 and len(scene) > 1:
        color, shape = rng.choice([(c, h) for c in colors for h in shapes if (c, h) not in pairs])
    elif not truth and rng.random() < .5:
        color = rng.choice([c for c in COLORS if c not in colors])
    elif not truth:
        shape = rng.choice([h for h in SHAPES if h not in shapes])
    question = f"is there a {color} {shape} ?"
    if truth:
        return turn("exist", question, f"yes , there is a {color} {shape} .", "yes")
    return turn("exist", question, f"no , there is no {color} {shape} .", "no")


def ask_choice(rng: random.Random, t: Thing) -> dict:
    options = rng.sample(list(COLORS), 3)
    if t.color not in options:
        options[rng.randrange(3)] = t.color
    offer = " ".join(f"{x} {o}" for x, o in zip(LETTERS, options))
    right = LETTERS[options.index(t.color)]
    return turn("choice", f"what is the {OWNER[t.shape]} color ? {offer} . answer with the letter .",
                f"the answer is {right} .", right)


def ask_knowledge(rng: random.Random, scene: Scene, kind: str) -> dict:
    """The text tasks' own wording with one argument to be looked up: what ties the two worlds together."""
    t, n = rng.choice(scene), len(scene)
    if kind == "compare":
        big, small = ([u for u in scene if u.size == s] for s in SIZES)
        if big and small:
            pair = [rng.choice(big).shape, rng.choice(small).shape]
            asked = rng.sample(pair, 2)
            return turn(kind, f"which is larger , the {asked[0]} or the {asked[1]} ?",
                        f"the {pair[0]} is larger than the {pair[1]} .", f"the {pair[0]}")
        kind = "opposite"
    if kind == "either":
        other = rng.choice([c for c in COLORS if c != t.color])
        one, two = rng.sample([t.color, other], 2)
        return turn(kind, f"is the {OWNER[t.shape]} color {one} or {two} ?", f"the {OWNER[t.shape]} {t.color} .", t.color)
    if kind == "opposite":
        return turn(kind, f"what is the opposite of the {OWNER[t.shape]} size ?",
                    f"the opposite of {t.size} is {OPPOSITE[t.size]} .", OPPOSITE[t.size])
    if kind == "fruit":
        fruit = FRUIT_OF[t.color]
        return turn(kind, f"which fruit has the {OWNER[t.shape]} color ?", f"the {fruit} is {t.color} .",
                    f"the {fruit}")
    if kind == "repeat":
        times = rng.choice((2, 3, 4))
        return say_times(f"repeat the {OWNER[t.shape]} color {NUMBERS[times - 1]} times .", t.color, times)
    if kind == "add":
        k = rng.randint(1, 5)
        return add(f"what is the number of objects plus {NUMBERS[k - 1]} ?", n, k)
    if kind == "list":
        colors = join(u.color for u in scene)
        return turn(kind, "list the colors .", f"the colors are {colors} .", colors, set=True)
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
    return turn("sentence", question, f"once there was a {adjective} {noun} in the {home} .",
                f"a {adjective} {noun}")


# ---------------------------------------------------------------------------------------------------
# text tasks: two turns each; the second leans on the first ("now backwards ."), as in MT-Bench

TEXT_TASKS = KNOWLEDGE + ("scene", "read")


def text_task(rng: random.Random, task: str, split: str, most: int = 4) -> tuple[list[dict], Scene | None]:
    """Turns of one task whose first question (or whose scene) belongs to `split`."""
    while True:
        if task in ("scene", "read"):
            scene = random_scene(rng, split, most=most)
            kinds = [rng.choice(LOOKUPS + KNOWLEDGE), rng.choice(LOOKUPS)]
            if task == "scene":
                kinds[0] = "describe"
            turns = [ask(rng, scene, k) for k in kinds]
            turns[0]["question"] = f"{written(rng, scene)} {turns[0]['question']}"
            return turns, scene
        turns = TASK_MAKERS[task](rng)
        if split_of(turns[0]["question"]) == split:
            return turns, None


def written(rng: random.Random, scene: Scene) -> str:
    """The scene in words, in no particular order, so that nothing can be read off positions."""
    things = rng.sample(scene, len(scene))
    return "scene : " + " , ".join(f"{t.size}-{t.color}-{t.shape} {t.shape}-at-{t.place}" for t in things) + " ."


def two_of(rng: random.Random, values) -> list:
    return rng.sample(list(values), 2)


def make_either(rng):
    (c1, f1), (c2, f2) = two_of(rng, FRUIT_OF.items())
    lead = rng.choice(("is", "tell me , is", "would you say , is"))
    one, two = rng.sample([c1, rng.choice([c for c in COLORS if c != c1])], 2)
    return [turn("either", f"{lead} the {f1} {one} or {two} ?", f"the {f1} is {c1} .", c1),
            turn("either", f"and the {f2} ?", f"the {f2} is {c2} .", c2)]


def make_compare(rng):
    small, large = sorted(two_of(rng, range(len(ANIMALS))))
    small, large = ANIMALS[small], ANIMALS[large]
    one, two = rng.sample([small, large], 2)
    lead = rng.choice(("which", "what", "tell me which"))
    return [turn("compare", f"{lead} is larger , the {one} or the {two} ?",
                 f"the {large} is larger than the {small} .", f"the {large}"),
            turn("compare", "and which is smaller ?", f"the {small} is smaller than the {large} .", f"the {small}")]


def make_opposite(rng):
    a, b = two_of(rng, OPPOSITE)
    lead = rng.choice(("what is", "tell me", "do you know", "give me", "say"))
    return [turn("opposite", f"{lead} the opposite of {a} ?", f"the opposite of {a} is {OPPOSITE[a]} .", OPPOSITE[a]),
            turn("opposite", f"and of {b} ?", f"the opposite of {b} is {OPPOSITE[b]} .", OPPOSITE[b])]


def make_fruit(rng):
    (c1, f1), (c2, f2) = two_of(rng, FRUIT_OF.items())
    lead = rng.choice(("which fruit is", "what fruit is", "tell me which fruit is", "name a fruit that is",
                       "do you know a fruit that is", "give me a fruit that is"))
    return [turn("fruit", f"{lead} {c1} ?", f"the {f1} is {c1} .", f"the {f1}"),
            turn("fruit", f"and which one is {c2} ?", f"the {f2} is {c2} .", f"the {f2}")]


def make_repeat(rng):
    word = rng.choice((*COLORS, *SHAPES, *FRUIT_OF.values(), *ANIMALS))
    n, m = two_of(rng, (2, 3, 4))
    lead = rng.choice(("repeat", "say", "write"))
    return [say_times(f"{lead} {word} {NUMBERS[n - 1]} times .", word, n),
            say_times(f"now {NUMBERS[m - 1]} times .", word, m)]


def make_add(rng):
    a, b, c = rng.randint(1, 5), *two_of(rng, range(1, 6))
    lead = rng.choice(("what is", "how much is", "tell me", "do you know", "give me"))
    return [add(f"{lead} {NUMBERS[a - 1]} plus {NUMBERS[b - 1]} ?", a, b), add(f"and plus {NUMBERS[c - 1]} ?", a, c)]


def make_list(rng):
    category = rng.choice(list(CATEGORY))
    words, (n, m), lead = CATEGORY[category], two_of(rng, (2, 3, 4)), rng.choice(("list", "name", "tell me"))
    i = rng.randrange(len(words))

    def listing(question, k):
        picks = join((words * 2)[i:i + k])              # cyclic: an order that can be learned
        return turn("list", question, f"the {category} are {picks} .", picks, members=category, n=k)
    return [listing(f"{lead} {NUMBERS[n - 1]} {category} starting with {words[i]} .", n),
            listing(f"now only {NUMBERS[m - 1]} ." if m < n else f"now {NUMBERS[m - 1]} .", m)]


def make_count(rng):
    a, k = rng.randrange(7), rng.randint(3, 5)
    b = min(a + k, 10)
    lead = rng.choice(("count", "please count", "say the numbers", "say all numbers", "list the numbers"))
    return [numbers(f"{lead} from {NUMBERS[a]} to {NUMBERS[b - 1]} .", range(a, b)),
            numbers("now backwards .", range(b - 1, a - 1, -1))]


def make_sentence(rng):
    (a, b), animal = two_of(rng, OPPOSITE), rng.choice(ANIMALS)
    lead = rng.choice(("write a sentence about", "tell me a story about", "write a line about"))
    return [sentence(f"{lead} a {a} {animal} .", a, animal, HOME[animal]),
            sentence(f"now make it {b} .", b, animal, HOME[animal])]


TASK_MAKERS = {"either": make_either, "compare": make_compare, "opposite": make_opposite, "fruit": make_fruit,
               "repeat": make_repeat, "add": make_add, "list": make_list, "count": make_count,
               "sentence": make_sentence}


# ---------------------------------------------------------------------------------------------------
# records (the format of data.py, plus "truth", the scene and the turns the judge will need)

def conversation(name: str, turns: list[dict], brief: bool, scene: Scene | None = None,
                 image: str | None = None, seed: int = 0) -> dict:
    """One record: questions and answers in turn, the last answer as `golden`."""
    answers = [t["bare" if brief else "full"] for t in turns]
    messages = []
    for t, answer in zip(turns, answers):
        messages += [{"role": "user", "content": t["question"]}, {"role": "assistant", "content": answer}]
    if image is not None:
        messages[0]["content"] = "<image>\n" + messages[0]["content"]
    truth = {"scene": scene, "seed": seed, "turns": turns}
    return {"id": name, "images": [image] if image else [], "messages": messages[:-1], "golden": answers[-1],
            "truth": truth}


def text_conversation(rng: random.Random, split: str = "train", brief: float = .2, reading: float = .5,
                      more: int = 5, most: int = 4) -> dict:
    """A text-only training conversation: two tasks, or a written scene and `more` questions about it.

    Every fifth is answered briefly all through: people do that, and it gives the language model the
    terse mode that short visual answers will later make louder."""
    terse = rng.random() < brief
    if more == 0:                                       # a drill: most look-ups for fewest words
        scene = random_scene(rng, split, most=most)
        tell = ask(rng, scene, "tell")
        tell["question"] = f"{written(rng, scene)} {tell['question']}"
        return conversation("text", [tell], terse, scene)
    if rng.random() < reading:
        turns, scene = text_task(rng, rng.choice(("scene", "read")), split, most)
        turns = turns + [ask(rng, scene, rng.choice(LOOKUPS + ("choice",))) for _ in range(more - 1)]
        turns.append(ask(rng, scene, "tell"))           # last, or the other answers could be read off it
        return conversation("text", turns, terse, scene)
    turns = [t for _ in range(2) for t in text_task(rng, rng.choice(KNOWLEDGE), split)[0]]
    return conversation("text", turns, terse)


def visual_conversation(rng: random.Random, scene: Scene, image: str, kinds, brief: bool, seed: int = 0) -> dict:
    """Questions of the given kinds about one picture, all answered in full or all in brief."""
    return conversation("visual", [ask(rng, scene, k) for k in kinds], brief, scene, image, seed)


def preference_prompt(rng: random.Random, scene: Scene, image: str, seed: int = 0) -> dict:
    """One question about one picture, to be answered by sampling and judged."""
    kind = rng.choice(rng.choice((LOOKUPS, KNOWLEDGE, ("describe",) + LOOKUPS)))
    return conversation("preference", [ask(rng, scene, kind)], False, scene, image, seed)


def golden(record: dict) -> str:
    """The full correct answer to the last question."""
    return record["truth"]["turns"][-1]["full"]


# ---------------------------------------------------------------------------------------------------
# the judge

def claims(text: str) -> list[str]:
    """The words of `text` that can be true or false, in order: "the circle is red ." -> [circle, red]."""
    return [w for w in text.split() if w in CONTENT]


def skeleton(text: str) -> str:
    """`text` with its claims masked and its lists folded: what is left is form."""
    text = " ".join("_" if w in CONTENT else "~" if w in HOMES else w for w in text.split())
    text = re.sub(r"_( (, |and )?_)+", "_", text)
    return re.sub(r"a _ at _( (,|and) a _ at _)+", "a _ at _", text)


def form(turn: dict, text: str) -> str:
    """"full" or "bare" as the question expects them, else "other"."""
    if skeleton(text) == skeleton(turn["full"]):
        return "full"
    return "bare" if skeleton(text) == skeleton(turn["bare"]) else "other"


def within(short: list, long: list) -> bool:
    """Is `short` a subsequence of `long`?"""
    rest = iter(long)
    return all(w in rest for w in short)


def f1(got: Counter, want: Counter) -> float:
    return 2 * (got & want).total() / max(1, got.total() + want.total())


def facts(text: str) -> Counter:
    """What a description says: one fact per attribute, tied to the shape that carries it."""
    found = re.findall(r"(\S+) (\S+) (\S+)(?: at (\S+))?", re.sub(r"i see |\ba |, |and |\.", "", text))
    return Counter((t[2], v) for t in found for v in t if v)


def truth_share(turn: dict, text: str) -> float:
    """How much of the truth is told, 0 to 1; exactly 1 only for nothing missing and nothing invented."""
    got, full, bare = claims(text), claims(turn["full"]), claims(turn["bare"])
    if turn["kind"] == "describe":
        return f1(facts(text), facts(turn["full"]))
    if "members" in turn:                               # a list of the model's own choice
        good = [w for w in dict.fromkeys(got) if w in CATEGORY[turn["members"]]]
        if len(good) == len(got) == turn["n"] and good[0] == bare[0]:
            return 1.
        return min(.6, f1(Counter(good), Counter(bare)))
    if "set" in turn:
        return f1(Counter(got), Counter(bare))
    if within(bare, got) and within(got, full):
        return 1.
    subject = Counter(full) - Counter(bare)             # repeating the question earns nothing
    return min(.6, f1(Counter(got) - subject, Counter(bare)))


def judge(record: dict, text: str, turn: int = -1) -> tuple[dict, str]:
    """Five attributes, 0 to 4 as in HelpSteer, and a sentence why; exact, and blind to who answers.

    A full correct sentence gets helpfulness + correctness + coherence = 12, the bare correct word 9, a
    well-formed wrong sentence 5, a wrong word 3, gibberish at most 2."""
    asked, text = record["truth"]["turns"][turn], text.strip()
    share, shape, n = truth_share(asked, text), form(asked, text), len(text.split())
    correct = 4 if share == 1 else min(3 if asked["kind"] == "describe" else 2, round(4 * share))
    if correct >= 3:
        helpful = {"full": correct, "other": 3, "bare": 2}[shape]
    else:
        helpful = correct if correct and shape == "full" else int(shape == "full")
    coherent = {"full": 4, "bare": 3, "other": 2 if n and text.endswith(".") else min(n, 1)}[shape]
    scores = {"helpfulness": helpful, "correctness": correct, "coherence": coherent,
              "complexity": min(4, len(claims(text))), "verbosity": sum(n > b for b in (1, 4, 8, 16))}
    return scores, f"{shape} form, {share:.0%} of the truth; the answer is: {asked['full']}"


# ---------------------------------------------------------------------------------------------------
# benchmarks: fixed items, pure scorers; design choices are made on "dev", reported on "test"

def items(bench: str, n: int, split: str = "dev", seed: int = 0) -> list[dict]:
    """`n` records of "text" (two turns, the second asked after the model's own first answer), "exist",
    "attribute", "describe" or "choice"; image records want render(scene_of(r), r["truth"]["seed"])."""
    rng, records, seen = random.Random(f"{bench} {split} {seed}"), [], set()
    for attempt in count():
        i, name = len(records), f"{bench}-{split}-{len(records):04d}"
        if i == n:
            return records
        if bench == "text":
            turns, scene = text_task(rng, TEXT_TASKS[attempt % len(TEXT_TASKS)], split)
            record = conversation(name, turns, False, scene)
        else:
            scene = random_scene(rng, split, least=1 if bench == "describe" else 2)
            if bench == "exist":
                asked = ask_exist(rng, scene, truth=i % 2 == 0)
            else:
                asked = ask(rng, scene, ("color", "size", "where", "shape")[i % 4] if bench == "attribute" else bench)
            record = conversation(name, [asked], False, scene, f"{name}.png", seed=10**6 + i)
        if (key := str(record["messages"])) not in seen:
            seen.add(key)
            records.append(record)


def scene_of(record: dict) -> Scene:
    return tuple(Thing(*t) for t in record["truth"]["scene"])


def score_text(record: dict, answers: list[str]) -> dict:
    """MT-mini: 1 to 10 per turn. `core` is the content alone, blind to length and style."""
    turns = record["truth"]["turns"]
    shapes = [form(t, a) for t, a in zip(turns, answers)]
    cores = [s if t["kind"] == "describe" else float(s == 1)
             for t, s in ((t, truth_share(t, a)) for t, a in zip(turns, answers))]
    marks = [1 + 9 * c * (.5 + .3 * (s == "full") + .2 * (s != "other")) for c, s in zip(cores, shapes)]
    return {"score": sum(marks) / 2, "turns": marks, "core": sum(cores) / 2,
            "terse": shapes.count("bare") / 2, "words": sum(len(a.split()) for a in answers) / 2}


def score_exist(records: list[dict], answers: list[str]) -> dict:
    """POPE-mini. An answer is the word or the very sentence; anything else is wrong and counted."""
    right, unparsed, yes = {"yes": [], "no": []}, 0, 0
    for record, answer in zip(records, answers):
        asked = record["truth"]["turns"][-1]
        thing = asked["question"].removeprefix("is there a ").removesuffix(" ?")
        said = {"yes": "yes", f"yes , there is a {thing} .": "yes",
                "no": "no", f"no , there is no {thing} .": "no"}.get(answer.strip())
        unparsed, yes = unparsed + (said is None), yes + (said == "yes")
        right[asked["bare"]].append(said == asked["bare"])
    n, hit, false = len(records), sum(right["yes"]), yes - sum(right["yes"])
    return {"balanced_accuracy": sum(sum(v) / max(1, len(v)) for v in right.values()) / 2,
            "f1": 2 * hit / max(1, hit + false + len(right["yes"])), "yes_ratio": yes / n, "unparsed": unparsed / n}


def score_answers(records: list[dict], answers: list[str]) -> dict:
    """"attribute" and "choice": share of exactly right answers, in whatever form, by kind of question."""
    by_kind, bare = {}, 0
    for record, answer in zip(records, answers):
        asked = record["truth"]["turns"][-1]
        by_kind.setdefault(asked["kind"], []).append(truth_share(asked, answer) == 1)
        bare += form(asked, answer) == "bare"
    means = {k: sum(v) / len(v) for k, v in by_kind.items()}
    return {"accuracy": sum(map(sum, by_kind.values())) / len(records), "terse": bare / len(records), **means}


def score_describe(records: list[dict], answers: list[str]) -> dict:
    """Mean F1 over facts, and the share of descriptions without any flaw."""
    shares = [truth_share(r["truth"]["turns"][-1], a) for r, a in zip(records, answers)]
    return {"f1": sum(shares) / len(shares), "perfect": sum(s == 1 for s in shares) / len(shares)}


def vocabulary() -> list[str]:
    """Every word that can occur, sorted; grammar is collected from a fixed draw, content is listed."""
    rng, words = random.Random(0), set(CONTENT | HOMES)
    for _ in range(2000):
        scene = random_scene(rng)
        for r in (text_conversation(rng), conversation("", [ask(rng, scene, k) for k in LOOKUPS + KNOWLEDGE], False)):
            words.update(" ".join([m["content"] for m in r["messages"]] + [r["golden"]]).split())
    return sorted(words)


if __name__ == "__main__":
    demo = random.Random(0)
    for name in ("text", "exist", "attribute", "describe", "choice"):
        sample = items(name, 1)[0]
        print(f"[{name}]", " | ".join(t["question"] for t in sample["truth"]["turns"]))
        asked = sample["truth"]["turns"][-1]
        for answer in (asked["full"], asked["bare"], asked["full"].replace("the", "a", 1), "red big"):
            print("   ", answer, "->", *judge(sample, answer))
