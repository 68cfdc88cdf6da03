"""Talk to a checkpoint about pictures, in a terminal; or to two at once.

An evaluation is a number; a conversation shows what it is a number of. Turns go through the very function that training and
benchmarks get their tokens from (data.make_tree), so what you see here is what they saw.

    python chat.py                                               the shipped LLaVA-mini; /draw gives it a picture of its world
    python chat.py --ckpt toy/llava --vs runs/dpo/model                before and after, side by side
    python chat.py --ckpt llava-1.5-7b-hf --image photo.jpg --temperature 0.7

    /image PATH    attach a picture to the next question (again for more)
    /draw          a picture of the miniature's world, and a question about it
    /reset         begin anew                                                  /quit

Previous: reproduce.py.  Next: speed.py (how fast).
"""
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import checkpoint
from toy import tasks
from common import BadInput, device_and_dtype, main
from data import Pixels, Tokens, make_tree, target_scores
from model import stream
from formats import check
from vision import load_image


@dataclass
class Settings:
    """Talk to a checkpoint, or to two."""
    ckpt: str = "toy/llava"            # checkpoint folder
    vs: str = ""                 # a second one, asked the same
    image: str = ""              # a picture for the first question
    target: str = ""             # five scores to ask a SteerLM model for; empty: what its folder says
    temperature: float = 0.0     # 0: the likeliest token always
    top_p: float = 1.0           # sample from the most likely tokens of this mass
    max_new: int = 512           # longest answer in tokens
    seed: int = 0                # of the sampling
    crop: bool = False           # centre-crop pictures instead of padding them, for a model that was trained so
    device: str = "auto"         # cpu, cuda, ...
    dtype: str = "auto"          # float32, bfloat16; auto: float32 on the CPU


class Speaker:
    """One checkpoint and its side of the conversation."""

    def __init__(self, name: str, s: Settings):
        folder = checkpoint.resolve(name)
        self.name, self.s, self.messages, self.images = name, s, [], []
        self.model = checkpoint.load(folder, *device_and_dtype(s.device, s.dtype))
        self.tokens, self.pixels = Tokens(folder, self.model.config), Pixels(self.model.config, s.crop)
        if s.target and not self.tokens.steer:
            raise BadInput(f"{name} was not trained to be asked for scores; steerlm.py does that")
        if self.tokens.steer:
            self.tokens.steer["target"] |= target_scores(s.target) if s.target else {}
            print(f"{name}: every question asks for {', '.join(f'{k} {v}' for k, v in self.tokens.steer['target'].items())}")

    def say(self, question: str, images: list[str]) -> None:
        """Print the answer as it comes, and remember both. Raises BadInput; then nothing is remembered."""
        s, limit = self.s, self.model.config.text.max_position_embeddings
        if images and not self.tokens.patches:
            print(f"({self.name} sees no pictures, and is asked without)")
            images, question = [], question.replace("<image>", "")
        text = question if "<image>" in question else "<image>\n" * len(images) + question
        record = {"id": self.name, "root": "/", "images": self.images + images,
                  "messages": self.messages + [{"role": "user", "content": text}]}
        check(record)
        tree = make_tree(self.tokens, record, [])
        room = min(s.max_new, limit - len(tree.prompt))
        if room < 1:
            raise BadInput(f"{self.name}: {len(tree.prompt)} tokens so far, and it was built for {limit}; /reset")
        strange = tree.prompt.count(self.tokens.tokenizer.token_to_id("<unk>"))
        if strange:
            print(f"({self.name} does not know {strange} of these words)")
        ids, said = [], ""
        for token in stream(self.model, [tree.prompt], [self.pixels(tree.images)], max_new=room, temperature=s.temperature,
                            top_p=s.top_p, seeds=[[s.seed + len(self.messages)]], eos=self.tokens.eos):
            ids += token.tolist()
            now = self.tokens.decode([i for i in ids if i != self.tokens.eos])
            if not now.endswith("\ufffd"):                                   # half a character: wait for the rest
                print(now[len(said):], end="", flush=True)
                said = now
        print("" if ids[-1:] == [self.tokens.eos] else f" ... (cut after {room} tokens)")
        self.messages, self.images = record["messages"] + [{"role": "assistant", "content": said}], record["images"]


def attach(path: str, size: int) -> str:
    """A picture's path from the root of the disk, opened once. Raises BadInput."""
    path = Path(path.strip()).expanduser().resolve()
    load_image(path, small=size)
    return str(path.relative_to("/"))


def run(s: Settings) -> None:
    if s.max_new < 1 or not 0 <= s.temperature < math.inf or not 0 < s.top_p <= 1 or abs(s.seed) >= 1 << 62:
        raise BadInput("--max_new must be at least 1, --temperature not negative, --top_p above 0 and at most 1, "
                       "--seed below 2^62")
    speakers = [Speaker(name, s) for name in (s.ckpt, s.vs) if name]
    size = max(speaker.pixels.size for speaker in speakers)
    images, drawn = [attach(s.image, size)] if s.image else [], 0
    print("a question and return; /image PATH, /draw, /reset, /quit")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        try:
            match word:
                case "":
                    pass
                case "/quit":
                    return
                case "/image":
                    images.append(attach(rest, size))
                case "/draw":
                    record = tasks.draw(tasks.items("attribute", drawn + 1)[drawn:], Path(tempfile.mkdtemp()))[0]
                    path, drawn = Path(record["root"]) / record["images"][0], drawn + 1
                    images.append(attach(str(path), size))
                    print(f"{path}: {tasks.written(tasks.scene_of(record))[8:]}\ntry: {record['truth']['turns'][0]['question']}")
                case "/reset":
                    images = []
                    for speaker in speakers:
                        speaker.messages, speaker.images = [], []
                case _ if word.startswith("/"):
                    raise BadInput(f"{word}: choose /image, /draw, /reset or /quit")
                case _:
                    asked, images = images, []
                    for speaker in speakers:
                        print(f"{speaker.name}: " if len(speakers) > 1 else "", end="", flush=True)
                        speaker.say(line, asked)
        except BadInput as problem:
            print(problem)


if __name__ == "__main__":
    main(Settings, run)
