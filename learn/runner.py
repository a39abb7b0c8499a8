"""Runs the checks of each step on the reader's files, and prints what it found."""

from __future__ import annotations

import hashlib
import importlib
import json
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from learn.course import BONUS, HERE, LAST, file_name, hint, load, page, shown, title
from learn.oracle import CheckError
from lora.storage import write_atomically

Check = Callable[[ModuleType], str | None]
_STATE = ".state.json"
_WIDTH = 100


@dataclass(frozen=True)
class Result:
    """A step's result. passed: the sentences of the checks that passed, with what they measured.

    failed: the sentence of the check that failed, if any, and its message. done: whether all passed.
    missing: whether the reader has not written the code yet.
    """

    passed: list[tuple[str, str | None]] = field(default_factory=list)
    failed: str = ""
    message: str = ""
    missing: bool = False

    @property
    def done(self) -> bool:
        return not self.failed


def check_step(folder: Path, step: int) -> Result:
    """Runs the checks of a step, up to the first that fails. The random state is the same afterwards."""
    passed: list[tuple[str, str | None]] = []
    try:
        module = load(folder, step)
    except Exception as error:  # whatever the reader's file raises
        return Result(passed, f"{file_name(step)} can be imported.", _explain(error, folder))
    for check in importlib.import_module(f"learn.checks.step{step:02}").CHECKS:
        sentence = " ".join((check.__doc__ or check.__name__).split("\n\n")[0].split())
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                note = check(module)
        except Exception as error:
            return Result(passed, sentence, _explain(error, folder), _is_task(error))
        passed.append((sentence, note))
    return Result(passed)


def run(folder: Path, steps: Iterable[int], say: Callable[[str], Any] = print) -> bool:
    """Checks the steps in order, and stops at the first that is not done. Returns whether all are done.

    A step of several is not checked again while the files that it depends on are the same.
    """
    steps = list(steps)
    state = _read_state(folder)
    for step in steps:
        key = _digest(folder, step)
        if len(steps) > 1 and state["passed"].get(str(step)) == key:
            continue
        say(f"{title(step)}   ({shown(page(step))})")
        started = time.perf_counter()
        result = check_step(folder, step)
        for sentence, note in result.passed:
            say(_wrapped("  ok    ", sentence))
            if note:
                say(_wrapped("        ", note))
        if result.done:
            state["passed"][str(step)] = key
            state["failures"].pop(str(step), None)
            say(f"  done in {time.perf_counter() - started:.1f} s\n")
            _write_state(folder, state)
            continue
        state["passed"].pop(str(step), None)
        failures = state["failures"].get(str(step), 0) + (not result.missing)
        state["failures"][str(step)] = failures
        _write_state(folder, state)
        say(_wrapped("  TODO  " if result.missing else "  FAIL  ", result.failed))
        say(textwrap.indent(result.message, " " * 8))
        if failures >= 2:
            say(_wrapped("  hint  ", hint(step)))
        say(f"\n{_progress(state)} Your file: {shown(folder / file_name(step))}")
        return False
    say(_progress(state))
    if state["passed"].keys() >= {str(step) for step in range(1, LAST + 1)}:
        say(f"All steps are done. The bonus is `make learn STEP={BONUS}`, with {shown(page(BONUS))}.")
    return True


def _explain(error: Exception, folder: Path) -> str:
    """A CheckError's message; of any other exception also the reader's lines that it passed through."""
    if isinstance(error, CheckError):
        return str(error)
    lines = [str(error) if _is_task(error) else f"{type(error).__name__}: {error}"]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append(f"  {shown(Path(error.filename))}:{error.lineno}: {(error.text or '').strip()}")
    frames = [
        each for each in traceback.extract_tb(error.__traceback__) if Path(each.filename).parent == folder
    ]
    for frame in frames[-3:]:  # of an endless recursion the last three are enough
        lines.append(f"  {shown(Path(frame.filename))}:{frame.lineno} in {frame.name}: {frame.line}")
    return "\n".join(lines)


def _is_task(error: Exception) -> bool:
    """Whether the error is the placeholder of a template: the reader has not written the code yet."""
    return isinstance(error, NotImplementedError) and str(error).startswith("step ")


def _progress(state: dict[str, Any]) -> str:
    done = sum(str(step) in state["passed"] for step in range(1, LAST + 1))
    bar = "".join("#" if str(step) in state["passed"] else "." for step in range(1, LAST + 1))
    return f"[{bar}] {done} of {LAST} steps done."


def _digest(folder: Path, step: int) -> str:
    """Of all that the result of a step depends on: the reader's files and the checks up to it."""
    sha = hashlib.sha256()
    files = [folder / file_name(number) for number in range(1, step + 1)]
    checks = [HERE / "checks" / f"step{number:02}.py" for number in range(1, step + 1)]
    shared = [HERE / "oracle.py", *(HERE / "checks" / f"{name}.py" for name in ("models", "reference"))]
    for path in [*files, *checks, *shared]:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _read_state(folder: Path) -> dict[str, Any]:
    """Which steps passed, with their digests, and how often each failed since it last passed."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return {"passed": dict(state["passed"]), "failures": dict(state["failures"])}
    except (OSError, ValueError, KeyError, TypeError):  # new, or damaged: the checks run again
        return {"passed": {}, "failures": {}}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    write_atomically(folder / _STATE, (json.dumps(state) + "\n").encode())


def _wrapped(start: str, text: str) -> str:
    """The text in lines below each other, after `start`. Indented paragraphs are code, and kept."""
    lines = []
    for paragraph in text.split("\n\n"):
        code = paragraph.startswith("    ")
        lines += ["", *(paragraph.split("\n") if code else textwrap.wrap(paragraph, _WIDTH - len(start)))]
    return start + ("\n" + " " * len(start)).join(lines[1:])
