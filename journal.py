"""A file that survives kill -9: what was paid for once, in hours or money, is never paid for again.

The problem. Sampling and judging take hours, and every reply of a judge costs money. A program that
writes its results at the end loses them all at the first power cut.

The trick. One line of JSON per result, on the disk before the next is asked for, named by a key: a
hash of everything that it depends on. A program that is started again looks for the key first. A
last line that a kill has torn is cut off.
"""
import json
import os
import threading
from pathlib import Path

from common import BadInput, field, hold


def journal_rows(path: Path, fields: dict):
    """(where it ends, row) of every row in a journal, but a last line that a kill has torn. A row
    has a key, and `fields` of these kinds (common.KINDS)."""
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                for name, kind in {"key": "a text", **fields}.items():
                    field(row, name, kind, "")
            except (ValueError, RecursionError):         # BadInput is one of them
                raise BadInput(
                    f"{path}: line {number} is damaged; remove that line and run again"
                ) from None
            end += len(line)
            yield end, row


class Journal:
    """A file of JSON lines: a row is on the disk before `append` returns, a torn last line is cut
    off when the file is opened again. One process writes at a time; any thread of it may append.

    Rows have a "key"; `journal[key]` is the last row of that key. It is read back from the disk:
    memory holds only where each row begins. `fields` are what else a row must have, and of which
    kind (common.KINDS).
    """

    def __init__(self, path: Path, **fields):
        self.path = Path(path)
        self.begins = {}                                 # key -> where its row begins
        self.size = 0
        self.lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            hold(self.fd, self.path)
            for end, row in journal_rows(self.path, fields):
                self.note(row, end)
        except BaseException:
            self.close()
            raise
        os.ftruncate(self.fd, self.size)

    def note(self, row, end):
        if self.seen(row):
            self.begins[row["key"]] = self.size
        self.size = end

    def seen(self, row):
        """Called once for every row, found or appended: does it stand for its key from now on?"""
        return True

    def append(self, row: dict):
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self.lock:
            try:
                if os.write(self.fd, line) < len(line):
                    raise OSError(f"{self.path}: the disk is full")
            except OSError:
                os.ftruncate(self.fd, self.size)         # no half line for the next to grow onto
                raise
            self.note(row, self.size + len(line))
        os.fsync(self.fd)                                # unlocked: several may wait for one flush

    def __contains__(self, key):
        return key in self.begins

    def __getitem__(self, key):
        with open(self.path, "rb") as file:
            file.seek(self.begins[key])
            return json.loads(file.readline())

    def close(self):
        os.close(self.fd)
