"""The course: its pages, the reader's files, and our solutions.

A file in solutions/ marks what the reader writes:

    # [step 1: multiply the two factors]
    return lora_B @ lora_A
    # [end]

The reader's file has `raise NotImplementedError("step 1: multiply the two factors")` there.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

from lora.errors import UserError
from lora.storage import write_atomically

HERE = Path(__file__).parent
WORK = HERE / "work"  # ignored by git, so that the reader's work survives a pull
LAST = 12
BONUS = 13  # checked only when asked for
_TASK = re.compile(r"^( *)# \[(step \d+: .*)\]\n((?:.*\n)*?)\1# \[end\]\n", re.MULTILINE)
_HINT = re.compile(r"<details>\s*<summary>.*?</summary>\s*(.*?)\s*</details>", re.DOTALL)


class CourseError(UserError, ValueError):
    """A step that does not exist."""


def page(step: int) -> Path:
    """The page of a step. Raises CourseError if there is no such step."""
    for path in (HERE / "pages").glob(f"{step:02}_*.md"):
        return path
    raise CourseError(f"there is no step {step}; the steps are 1 to {LAST}, and {BONUS} is the bonus")


def title(step: int) -> str:
    """The heading of a step's page."""
    return page(step).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def hint(step: int) -> str:
    """The text of a step's page that is folded away."""
    return "\n\n".join(_HINT.findall(page(step).read_text(encoding="utf-8")))


def file_name(step: int) -> str:
    """The name of the reader's file of a step."""
    return f"step{step:02}.py"


def solution(step: int) -> str:
    """Our solution, as it would stand in the reader's file."""
    return _TASK.sub(r"\3", _source(step))


def template(step: int) -> str:
    """The reader's file at the start."""
    return _TASK.sub(r'\1raise NotImplementedError("\2")\n', _source(step))


def _source(step: int) -> str:
    page(step)
    text = (HERE / "solutions" / file_name(step)).read_text(encoding="utf-8")
    return text.replace("learn.solutions.", "learn.work.")


def create_files(folder: Path) -> list[Path]:
    """Creates those of the reader's files that do not exist yet, and returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    created = []
    for step in range(1, BONUS + 1):
        path = folder / file_name(step)
        if not path.exists():
            write_atomically(path, template(step).encode())
            created.append(path)
    return created


def reset(folder: Path, step: int) -> Path | None:
    """Replaces the reader's file of a step by the template.

    Returns where the file is kept, beside those of earlier calls; None if there was none but the template.
    """
    path = folder / file_name(step)
    text = template(step).encode()
    if not path.exists() or path.read_bytes() == text:
        write_atomically(path, text)
        return None
    kept = path.with_suffix(".before-reset")
    while kept.exists():
        kept = kept.with_name(f"{kept.name}~")
    path.replace(kept)
    write_atomically(path, text)
    return kept


def load(folder: Path, step: int) -> ModuleType:
    """Imports the reader's file of a step afresh, as learn.work.stepNN, with the earlier steps it imports.

    `folder` stands for learn.work, so that tests can have one of their own.
    """
    for name in [name for name in sys.modules if f"{name}.".startswith("learn.work.")]:
        del sys.modules[name]
    package = ModuleType("learn.work")
    package.__path__ = [str(folder)]
    sys.modules["learn.work"] = package
    importlib.invalidate_caches()
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # a cache is valid for a second, in which the file may be saved again
    try:
        return importlib.import_module(f"learn.work.step{step:02}")
    finally:
        sys.dont_write_bytecode = before


def folder_of(module: ModuleType) -> Path:
    """The folder that a module returned by `load` is in."""
    return Path(str(module.__file__)).parent


def shown(path: Path) -> str:
    """The path as a user would type it: relative if it is in the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
