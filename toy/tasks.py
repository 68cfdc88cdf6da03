"""What is made of the world: text tasks, training conversations, preference prompts, benchmark items.

Text tasks need no picture: adding, opposites, counting, a story, and reading look-ups about a scene told in words. Each
has two turns, the second leaning on the first ("now backwards ."), as in MT-Bench; they are what visual tuning may
cost. Ten kinds of visual question use the very wording of a text task with one argument to be looked up, which is what
ties the two abilities together.

Everything here is a record in the format of formats.py plus "truth": the scene and the turns that the judge needs.
A first question (or its scene) belongs to train, dev or test by a checksum of its text, so no scene and no first
question of a benchmark was ever trained on; settings are chosen on dev, results reported on test.

Previous: toy/world.py.  Next: toy/oracle.py (the judge).
"""
import os
import random
from itertools import count
from pathlib import Path

from toy.world import (ANIMALS, CATEGORY, COLORS, CONTENT, FRUIT_OF, HOME, HOMES, KNOWLEDGE, LOOKUPS, NUMBERS, OPPOSITE, SHAPES,
                   Scene, Thing, add, ask, ask_exist, join, numbers, random_scene, render, say_times, sentence, split_of, turn)

# ---- text tasks: two turns each; the second leans on the first ("now backwards ."), as in MT-Bench -----------

TEXT_TASKS = KNOWLEDGE + ("scene", "read")


def text_task(rng: random.Random, task: str, split: str, most: int = 4) -> tuple[list[dict], Scene | None]:
    """Turns of one task whose first question (or whose scene) belongs to `split`."""
    while True:
        if task in ("scene", "read"):
            scene = random_scene(rng, split, most=most)
            scene = tuple(rng.sample(scene, len(scene)))    # told in no particular order
            kinds = "describe" if task == "scene" else rng.choice(LOOKUPS + KNOWLEDGE), rng.choice(LOOKUPS)
            turns = [ask(rng, scene, k) for k in kinds]
            turns[0]["question"] = f"{written(scene)} {turns[0]['question']}"
            return turns, scene
        turns = TASK_MAKERS[task](rng)
        if split_of(turns[0]["question"]) == split:
            return turns, None


def written(scene: Scene) -> str:
    """The scene in words: "scene : top big-red-circle , left small-blue-star ."."""
    return "scene : " + " , ".join(f"{t.place} {t.size}-{t.color}-{t.shape}" for t in scene) + " ."


def make_either(rng):
    (c1, f1), (c2, f2) = rng.sample(list(FRUIT_OF.items()), 2)
    lead = rng.choice(("is", "tell me , is", "would you say , is"))
    one, two = rng.sample([c1, rng.choice([c for c in COLORS if c != c1])], 2)
    return [turn("either", f"{lead} the {f1} {one} or {two} ?", f"the {f1} is {c1} .", c1),
            turn("either", f"and the {f2} ?", f"the {f2} is {c2} .", c2)]


def make_compare(rng):
    small, large = (ANIMALS[k] for k in sorted(rng.sample(range(len(ANIMALS)), 2)))
    one, two = rng.sample([small, large], 2)
    lead = rng.choice(("which", "what", "tell me which"))
    return [turn("compare", f"{lead} is larger , the {one} or the {two} ?",
                 f"the {large} is larger than the {small} .", f"the {large}"),
            turn("compare", "and which is smaller ?", f"the {small} is smaller than the {large} .", f"the {small}")]


def make_opposite(rng):
    a, b = rng.sample(list(OPPOSITE), 2)
    lead = rng.choice(("what is", "tell me", "do you know", "give me", "say"))
    return [turn("opposite", f"{lead} the opposite of {a} ?", f"the opposite of {a} is {OPPOSITE[a]} .", OPPOSITE[a]),
            turn("opposite", f"and of {b} ?", f"the opposite of {b} is {OPPOSITE[b]} .", OPPOSITE[b])]


def make_fruit(rng):
    (c1, f1), (c2, f2) = rng.sample(list(FRUIT_OF.items()), 2)
    lead = rng.choice(("which fruit is", "what fruit is", "tell me which fruit is", "name a fruit that is",
                       "do you know a fruit that is", "give me a fruit that is"))
    return [turn("fruit", f"{lead} {c1} ?", f"the {f1} is {c1} .", f"the {f1}"),
            turn("fruit", f"and which one is {c2} ?", f"the {f2} is {c2} .", f"the {f2}")]


def make_repeat(rng):
    word = rng.choice((*COLORS, *SHAPES, *FRUIT_OF.values(), *ANIMALS))
    n, m = rng.sample((2, 3, 4), 2)
    lead = rng.choice(("repeat", "say", "write"))
    return [say_times(f"{lead} {word} {NUMBERS[n - 1]} times .", word, n),
            say_times(f"now {NUMBERS[m - 1]} times .", word, m)]


def make_add(rng):
    a, b, c = rng.randint(1, 5), *rng.sample(range(1, 6), 2)
    lead = rng.choice(("what is", "how much is", "tell me", "do you know", "give me"))
    return [add(f"{lead} {NUMBERS[a - 1]} plus {NUMBERS[b - 1]} ?", a, b), add(f"and plus {NUMBERS[c - 1]} ?", a, c)]


def make_list(rng):
    category = rng.choice(list(CATEGORY))
    words, (n, m), lead = CATEGORY[category], rng.sample((2, 3, 4), 2), rng.choice(("list", "name", "tell me"))
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
    (a, b), animal = rng.sample(list(OPPOSITE), 2), rng.choice(ANIMALS)
    lead = rng.choice(("write a sentence about", "tell me a story about", "write a line about"))
    return [sentence(f"{lead} a {a} {animal} .", a, animal, HOME[animal]),
            sentence(f"now make it {b} .", b, animal, HOME[animal])]


TASK_MAKERS = {"either": make_either, "compare": make_compare, "opposite": make_opposite, "fruit": make_fruit,
               "repeat": make_repeat, "add": make_add, "list": make_list, "count": make_count, "sentence": make_sentence}


# ---- records (the format of formats.py, plus "truth", the scene and the turns the judge will need) -----------

def conversation(name: str, turns: list[dict], brief: bool, scene: Scene | None = None,
                 image: str | None = None, seed: int = 0) -> dict:
    """One record: questions and answers in turn, the last answer as `golden`."""
    answers = [t["bare" if brief else "full"] for t in turns]
    messages = []
    for t, answer in zip(turns, answers):
        messages += [{"role": "user", "content": t["question"]}, {"role": "assistant", "content": answer}]
    if image is not None:
        messages[0]["content"] = "<image>\n" + messages[0]["content"]
    return {"id": name, "images": [image] if image else [], "messages": messages[:-1], "golden": answers[-1],
            "truth": {"scene": scene, "seed": seed, "turns": turns}}


def text_conversation(rng: random.Random, most: int = 4) -> dict:
    """A text-only training conversation: two tasks, or a written scene of at most `most` things and more questions about it.

    Every fifth is answered briefly all through: people do that, and it gives the language model the
    terse mode that short visual answers will later make louder."""
    terse = rng.random() < .2
    if rng.random() < .6:
        turns, scene = text_task(rng, rng.choice(("scene", "read")), "train", most)
        turns += [ask(rng, scene, rng.choice(LOOKUPS + ("choice",) + ("exist",) * 2 + ("each",) * 5)) for _ in range(5)]
        return conversation("text", turns, terse, scene)
    turns = [t for _ in range(2) for t in text_task(rng, rng.choice(KNOWLEDGE), "train")[0]]
    return conversation("text", turns, terse)


def preference_prompts(n: int, seed: int) -> list[dict]:
    """`n` single image questions from the training split, to be answered by sampling and judged."""
    rng, records = random.Random(f"preference {seed}"), []
    for i in range(n):
        scene, name, look = random_scene(rng), f"preference-{seed}-{i:05d}", rng.randrange(2**31)
        kind = rng.choice(rng.choice((LOOKUPS, KNOWLEDGE, ("describe",) + LOOKUPS)))
        records.append(conversation(name, [ask(rng, scene, kind)], False, scene, f"images/{name}.png", look))
    return records


# ---- benchmark items: fixed, held out; design choices are made on "dev", results reported on "test" ----------

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
            record = conversation(name, [asked], False, scene, f"images/{name}.png", seed=10**6 + i)
        if (key := str((record["messages"], scene))) not in seen:
            seen.add(key)
            records.append(record)


def scene_of(record: dict) -> Scene:
    return tuple(Thing(*t) for t in record["truth"]["scene"])


def draw(items: list[dict], folder: Path) -> list[dict]:
    """Write the pictures that records speak of into `folder`; give the records their place and empty answers."""
    for record in items:
        record |= {"root": str(folder), "answers": []}
        for name in record["images"]:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(f".{os.getpid()}.part")             # several processes may draw the same picture
            render(scene_of(record), record["truth"]["seed"]).save(aside, format="PNG")
            os.replace(aside, path)
    return items


def vocabulary() -> list[str]:
    """Every word that can occur, sorted; grammar is collected from a fixed draw, content is listed."""
    rng, words = random.Random(0), set(CONTENT | HOMES)
    kinds = LOOKUPS + KNOWLEDGE + ("each", "choice", "describe")
    for _ in range(2000):
        scene = random_scene(rng)
        for r in (text_conversation(rng), conversation("", [ask(rng, scene, k) for k in kinds], False)):
            words.update(" ".join([m["content"] for m in r["messages"]] + [r["golden"]]).split())
    return sorted(words)
