"""The course: our solutions pass, the templates fail readably, and the checks name known mistakes."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from learn import course
from learn.checks import step11
from learn.cli import main
from learn.runner import check_step, run

STEPS = [*range(1, course.LAST + 1), course.BONUS]


@dataclass(frozen=True)
class Mistake:
    """A wrong implementation: our solution of a step with some parts replaced.

    changes: pairs of a part and what takes its place. named: a regular expression for the check's message,
    which names the mistake.
    """

    step: int
    name: str
    changes: list[tuple[str, str]]
    named: str

    def source(self) -> str:
        text = course.solution(self.step)
        for right, wrong in self.changes:
            assert text.count(right) == 1, right
            text = text.replace(right, wrong)
        return text


def read_mistakes(path: Path) -> list[Mistake]:
    found = []
    for block in path.read_text().split("\n== ")[1:]:
        title, *lines = block.splitlines()
        step, _, name = title.partition(": ")
        parts = [
            (mark, "\n".join(line[2:] for line in group))
            for mark, group in itertools.groupby(filter(None, lines), key=lambda line: line[0])
        ]
        texts = [text for mark, text in parts if mark in "-+"]
        found.append(Mistake(int(step), name, list(zip(texts[::2], texts[1::2], strict=True)), parts[-1][1]))
    return found


MISTAKES = read_mistakes(Path(__file__).parent / "learn_mistakes.txt")


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A folder with our solution of every step."""
    folder = tmp_path_factory.mktemp("work")
    for step in STEPS:
        (folder / course.file_name(step)).write_text(course.solution(step))
    return folder


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Training has a test of its own, on tiny data."""
    checks = tuple(check for check in step11.CHECKS if check is not step11.check_training)
    monkeypatch.setattr(step11, "CHECKS", checks)


@pytest.mark.parametrize("step", STEPS)
def test_our_solution_passes_and_needs_no_later_step(step, solved, tmp_path):
    """No earlier check can see a mistake of a later step, because it passes without the later files."""
    for number in range(1, step + 1):
        (tmp_path / course.file_name(number)).write_text((solved / course.file_name(number)).read_text())
    result = check_step(tmp_path, step)
    assert result.done, result.message
    assert all(sentence.endswith(".") for sentence, _ in result.passed)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"step {mistake.step}: {mistake.name}")
def test_the_check_of_its_step_names_a_mistake(mistake, solved, tmp_path):
    for path in solved.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / course.file_name(mistake.step)).write_text(mistake.source())
    result = check_step(tmp_path, mistake.step)
    assert not result.done
    assert re.search(mistake.named, result.message), result.message
    assert "expected" in result.message
    assert "Traceback" not in result.message
