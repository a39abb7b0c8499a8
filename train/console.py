"""The output of a running job: metrics.jsonl, a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Console:
    """Writes metric lines to `path` and shows progress, in rows trained on, on stderr."""

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
        """Shows the progress after a step, and logs `line` if there is one."""
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
        """Prints lines above the progress bar."""
        with contextlib.suppress(OSError):  # a reader of stderr that has gone must not cost the run
            self._bar.write(text, file=sys.stderr)

    def sync(self) -> None:
        """Syncs the log to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._bar.close()
        self._file.close()


class SilentConsole:
    """A Console that does nothing, for all processes but the first."""

    lines = 0

    def step(self, done_rows: int, line: dict[str, Any] | None) -> None: ...

    def say(self, text: str) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


def _open_after(path: Path, lines: int) -> Any:
    """Opens the file for appending, truncated after its first `lines` lines.

    The file is truncated in place, so that these lines exist at every moment, for another process and
    after a kill.
    """
    kept = path.read_bytes().splitlines(keepends=True)[:lines] if path.is_file() else []
    file = path.open("a", encoding="utf-8")
    file.truncate(sum(map(len, kept)))
    if kept and not kept[-1].endswith(b"\n"):
        file.write("\n")
    return file
