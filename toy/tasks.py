"""What is made of the world: text tasks, training conversations, preference prompts, benchmark
items.

Text tasks need no picture: adding, opposites, counting, a story, and looking things up in a scene
told in words. Each has two turns, the second leaning on the first ("now backwards ."), as in
MT-Bench; they are what visual tuning may cost. Most questions about a picture use the very wording
of a text task with one argument to be looked up, which is what ties the two abilities together.

Everything here is a record as in formats.py plus "truth": the scene and the turns that the judge
needs. A first question (or its scene) belongs to train, dev or test by a checksum of its text, so
no scene and no first question of a benchmark was ever trained on; settings are chosen on dev,
results reported on test.

    python -m toy.tasks --out runs/prompts       # questions to be answered, judged, learned from
"""
import random
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from common import main, write_jsonl
from toy.english import in_english
from toy.world import (ANIMALS, CATEGORY, COLORS, CONTENT, FRUIT_OF, HOMES, KNOWLEDGE,
                       LOOKUPS, OPPOSITE, SHAPES, ask, ask_exist, counted, either,
                       fruit, larger, listed, number, opposite, plus, random_scene, render,
                       repeated, sentence, split_of, turn, two_colors)


@dataclass
class Settings:
    """Write the miniature's questions and their pictures, for annotate.py."""
    out: str = "runs/prompts"    # folder for prompts.jsonl and images/
    prompts: int = 1000          # how many questions
    seed: int = 0                # of the questions
    english: bool = False        # as smol.py's model speaks


# ---- text tasks: two turns each; the second leans on the first -----------------------------------

TEXT_TASKS = KNOWLEDGE + ("scene", "read")


def text_task(rng, task, split, most=4):
    """A task's two turns, and its scene or None; the first question, or the scene, is of `split`."""
    if task in ("scene", "read"):
        return reading_task(rng, task, split, most)
    while True:
        turns = TASK_MAKERS[task](rng)
        if split_of(turns[0]["question"]) == split:
            return turns, None


def reading_task(rng, task, split, most):
    scene = random_scene(rng, split, most=most)
    scene = tuple(rng.sample(scene, len(scene)))        # told in no particular order

    first = "describe" if task == "scene" else rng.choice(LOOKUPS + KNOWLEDGE)
    second = rng.choice(LOOKUPS)
    turns = [ask(rng, scene, first), ask(rng, scene, second)]
    turns[0]["question"] = f"{written(scene)} {turns[0]['question']}"
    return turns, scene


def written(scene):
    """The scene in words: "scene : top big-red-circle , left small-blue-star ."."""
    things = " , ".join(f"{t.place} {t.size}-{t.color}-{t.shape}" for t in scene)
    return f"scene : {things} ."


def make_either(rng):
    (color, noun), (next_color, next_noun) = rng.sample(list(FRUIT_OF.items()), 2)
    lead = rng.choice(("is", "tell me , is", "would you say , is"))
    one, two = two_colors(rng, color)
    return [either(f"{lead} the {noun} {one} or {two} ?", noun, color),
            either(f"and the {next_noun} ?", next_noun, next_color)]


def make_compare(rng):
    small, large = sorted(rng.sample(ANIMALS, 2), key=ANIMALS.index)
    one, two = rng.sample([small, large], 2)
    lead = rng.choice(("which", "what", "tell me which"))
    return [larger(f"{lead} is larger , the {one} or the {two} ?", large, small),
            turn("compare", "and which is smaller ?", f"[the {small}] is smaller than the {large} .")]


def make_opposite(rng):
    word, next_word = rng.sample(list(OPPOSITE), 2)
    lead = rng.choice(("what is", "tell me", "do you know", "give me", "say"))
    return [opposite(f"{lead} the opposite of {word} ?", word),
            opposite(f"and of {next_word} ?", next_word)]


def make_fruit(rng):
    color, next_color = rng.sample(list(FRUIT_OF), 2)
    lead = rng.choice(("which fruit is", "what fruit is", "tell me which fruit is",
                       "name a fruit that is", "do you know a fruit that is",
                       "give me a fruit that is"))
    return [fruit(f"{lead} {color} ?", color),
            fruit(f"and which one is {next_color} ?", next_color)]


def make_repeat(rng):
    word = rng.choice((*COLORS, *SHAPES, *FRUIT_OF.values(), *ANIMALS))
    n, m = rng.sample((2, 3, 4), 2)
    lead = rng.choice(("repeat", "say", "write"))
    return [repeated(f"{lead} {word} {number(n)} times .", word, n),
            repeated(f"now {number(m)} times .", word, m)]


def make_add(rng):
    a = rng.randint(1, 5)
    b, c = rng.sample(range(1, 6), 2)
    lead = rng.choice(("what is", "how much is", "tell me", "do you know", "give me"))
    return [plus(f"{lead} {number(a)} plus {number(b)} ?", a, b),
            plus(f"and plus {number(c)} ?", a, c)]


def make_list(rng):
    category = rng.choice(list(CATEGORY))
    words = CATEGORY[category]
    n, m = rng.sample((2, 3, 4), 2)
    lead = rng.choice(("list", "name", "tell me"))
    start = rng.randrange(len(words))
    words = words[start:] + words[:start]               # cyclic: an order that can be learned

    first = f"{lead} {number(n)} {category} starting with {words[0]} ."
    second = f"now only {number(m)} ." if m < n else f"now {number(m)} ."
    return [listed(first, category, words[:n], members=category, n=n),
            listed(second, category, words[:m], members=category, n=m)]


def make_count(rng):
    first = 1 + rng.randrange(7)
    last = min(first - 1 + rng.randint(3, 5), 10)
    numbers = range(first, last + 1)
    lead = rng.choice(("count", "please count", "say the numbers", "say all numbers",
                       "list the numbers"))
    return [counted(f"{lead} from {number(first)} to {number(last)} .", numbers),
            counted("now backwards .", reversed(numbers))]


def make_sentence(rng):
    word, next_word = rng.sample(list(OPPOSITE), 2)
    animal = rng.choice(ANIMALS)
    lead = rng.choice(("write a sentence about", "tell me a story about", "write a line about"))
    return [sentence(f"{lead} a {word} {animal} .", word, animal),
            sentence(f"now make it {next_word} .", next_word, animal)]


TASK_MAKERS = {
    "either": make_either, "compare": make_compare, "opposite": make_opposite,
    "fruit": make_fruit, "repeat": make_repeat, "add": make_add,
    "list": make_list, "count": make_count, "sentence": make_sentence,
}


# ---- records: as in formats.py, plus "truth", the scene and the turns that the judge will need ---

def conversation(name, turns, brief=False, scene=None, look=None):
    """One record: questions and answers in turn, the last answer as `golden`. `look` is the seed of
    its picture; without one it has none."""
    messages = []
    for t in turns:
        messages.append({"role": "user", "content": t["question"]})
        messages.append({"role": "assistant", "content": t["bare" if brief else "full"]})
    golden = messages.pop()["content"]
    images = []
    if look is not None:
        images = [f"images/{name}.png"]
        messages[0]["content"] = "<image>\n" + messages[0]["content"]

    return {
        "id": name,
        "images": images,
        "messages": messages,
        "golden": golden,
        "truth": {"scene": scene, "seed": look or 0, "turns": turns},
    }


def text_conversation(rng, most=4):
    """A text-only training conversation: two tasks, or a written scene of at most `most` things and
    more questions about it.

    Every fifth is answered briefly all through: people do that, and it gives the language model the
    terse mode that short visual answers will later make louder."""
    brief = rng.random() < .2
    if rng.random() < .6:
        turns, scene = text_task(rng, rng.choice(("scene", "read")), "train", most)
        for _ in range(5):
            kind = rng.choice(LOOKUPS + ("choice",) + ("exist",) * 2 + ("each",) * 5)
            turns.append(ask(rng, scene, kind))
        return conversation("text", turns, brief, scene)

    one, _ = text_task(rng, rng.choice(KNOWLEDGE), "train")
    two, _ = text_task(rng, rng.choice(KNOWLEDGE), "train")
    return conversation("text", one + two, brief)


MIXED = (LOOKUPS, KNOWLEDGE, ("describe", *LOOKUPS))
SEEN = (LOOKUPS, ("describe", *LOOKUPS))                # what smol.py's model was tuned on


def preference_prompts(n: int, seed: int, kinds=MIXED) -> list[dict]:
    """`n` single image questions from the training split, to be answered by sampling and judged."""
    rng = random.Random(f"preference {seed}")
    records = []
    for i in range(n):
        name = f"preference-{seed}-{i:05d}"
        scene = random_scene(rng)
        look = rng.randrange(2**31)
        kind = rng.choice(rng.choice(kinds))
        turns = [ask(rng, scene, kind)]
        records.append(conversation(name, turns, scene=scene, look=look))
    return records


def text_prompts(n: int, seed: int) -> list[dict]:
    """The same without pictures: the first turns of text tasks."""
    rng = random.Random(f"text preference {seed}")
    records = []
    for i in range(n):
        turns, scene = text_task(rng, rng.choice(TEXT_TASKS), "train")
        records.append(conversation(f"text-preference-{seed}-{i:05d}", turns[:1], scene=scene))
    return records


# ---- benchmark items: fixed, held out; choices are made on "dev", results reported on "test" -----

def items(bench: str, n: int, split="dev", seed=0) -> list[dict]:
    """`n` distinct records of "text", "exist", "attribute", "describe" or "choice".

    The second turn of "text" is to be asked after the model's own first answer."""
    rng = random.Random(f"{bench} {split} {seed}")
    tasks = cycle(TEXT_TASKS)
    records = {}                                        # conversation and scene -> record
    while len(records) < n:
        i = len(records)
        name = f"{bench}-{split}-{i:04d}"
        if bench == "text":
            turns, scene = text_task(rng, next(tasks), split)
            record = conversation(name, turns, scene=scene)
        else:
            scene = random_scene(rng, split, least=1 if bench == "describe" else 2)
            if bench == "exist":
                asked = ask_exist(rng, scene, truth=i % 2 == 0)
            elif bench == "attribute":
                asked = ask(rng, scene, ("color", "size", "where", "shape")[i % 4])
            else:
                asked = ask(rng, scene, bench)
            record = conversation(name, [asked], scene=scene, look=10**6 + i)
        records.setdefault(str((record["messages"], scene)), record)
    return list(records.values())


# ---- pictures and files --------------------------------------------------------------------------

def draw(records: list[dict], folder) -> list[dict]:
    """Write the records' pictures into `folder` -> the records, with that root and no answers."""
    for record in records:
        for name in record["images"]:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            render(record["truth"]["scene"], record["truth"]["seed"]).save(path)
    return [record | {"root": str(folder), "answers": []} for record in records]


def write_prompts(n: int, seed: int, folder, english=False) -> Path:
    """`n` questions and their pictures in `folder` -> the path of prompts.jsonl there."""
    records = preference_prompts(n, seed, SEEN if english else MIXED)
    draw(records, folder)
    if english:
        records = [in_english(record) for record in records]
    path = Path(folder, "prompts.jsonl")
    write_jsonl(path, records)
    return path


def vocabulary() -> list[str]:
    """Every word that can occur, sorted: content is listed, grammar collected from a fixed draw."""
    rng = random.Random(0)
    words = set(CONTENT | HOMES)
    for _ in range(2000):
        for t in text_conversation(rng)["truth"]["turns"]:
            words.update(t["question"].split(), t["full"].split())
    return sorted(words)


def run(s: Settings):
    path = write_prompts(s.prompts, s.seed, s.out, s.english)
    print(f"{path}: {s.prompts} questions, the pictures beside it")
    ckpt = "runs/smol/llava" if s.english else "toy/llava"
    print(f"next: python annotate.py --ckpt {ckpt} --data {path} --judge oracle "
          "--temperature 1 --max_new 48 --batch 64 --out runs/annotate")


if __name__ == "__main__":
    main(Settings, run)
