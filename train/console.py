"""What a run says while it goes: metrics.jsonl, a progress bar on a terminal, quiet lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Console:
    """Writes metric lines to `path` and shows progress on stderr, in rows trained on."""

    def __init__(self, path: Path, total_rows: int, done_rows: int, keep_lines: int):
        self._file = _open_after(path, keep_lines)
        self.lines = keep_lines
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_rows,
            initial=done_rows,
            unit=" rows",
            disable=not self._terminal,
            dynamic_ncols=True,
            smoothing=0.05,
            leave=False,
        )

    def step(self, done_rows: int, line: dict[str, Any] | None) -> None:
        """After a step; `line` is what is logged of it, if anything."""
        self._bar.update(done_rows - self._bar.n if self._terminal else 0)
        if line is None:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.lines += 1
        if line.get("loss") is not None:
            self._bar.set_postfix_str(f"loss {line['loss']:.3f}")
        if "val_accuracy" in line:
            loss = f"loss {line['loss']:.4f}  " if line.get("loss") is not None else ""
            accuracy = f"val accuracy {line['val_accuracy']:.4f}  val loss {line['val_loss']:.4f}"
            self.say(f"epoch {line['epoch']:.0f}  step {line['step']}  {loss}{accuracy}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def sync(self) -> None:
        """Makes sure that every line so far is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._bar.close()
        self._file.close()


class SilentConsole:
    """A Console for the processes that have nothing to say."""

    lines = 0

    def step(self, done_rows: int, line: dict[str, Any] | None) -> None: ...

    def say(self, text: str) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _open_after(path: Path, lines: int) -> Any:
    """The file, cut after its first `lines` lines, to append to.

    Cut where it lies: those lines are there at every moment, for another process and for a kill.
    """
    kept = path.read_bytes().splitlines(keepends=True)[:lines] if path.is_file() else []
    file = path.open("a", encoding="utf-8")
    file.truncate(sum(map(len, kept)))
    return file
