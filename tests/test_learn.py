"""The course: our solutions pass, the templates fail readably, and the checks name known mistakes."""

import io
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from learn import cli, course
from learn.checks import step11
from learn.oracle import CheckError
from learn.runner import check_step, run
from train.config import Recipe

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


def test_the_known_mistakes_are_many_and_in_every_step():
    assert len({mistake.name for mistake in MISTAKES}) >= 20
    assert {mistake.step for mistake in MISTAKES} == set(STEPS)


def test_untouched_templates_stop_at_the_first_task_of_step_1(tmp_path):
    course.create_files(tmp_path)
    said = []
    assert not run(tmp_path, range(1, course.LAST + 1), said.append)
    text = "\n".join(said)
    assert "TODO" in text
    wanted = r'step01.py:\d+ in delta: raise NotImplementedError\("step 1: multiply the two factors"\)'
    assert re.search(wanted, text)
    assert "[............] 0 of 12 steps done." in text
    assert "Step 2" not in text
    assert "hint" not in text


def test_each_template_asks_for_its_own_step_only(tmp_path):
    course.create_files(tmp_path)
    for step in STEPS:
        text = (tmp_path / course.file_name(step)).read_text()
        compile(text, course.file_name(step), "exec")
        tasks = re.findall(r'raise NotImplementedError\("step (\d+): ', text)
        assert tasks
        assert set(tasks) == {str(step)}
        assert "learn.solutions" not in text
        assert len(text.splitlines()) < len(course.solution(step).splitlines()) + len(tasks)
        assert course.hint(step)


def test_a_failure_shows_the_readers_line_and_the_second_one_a_hint(tmp_path):
    course.create_files(tmp_path)
    path = tmp_path / course.file_name(1)
    path.write_text(course.solution(1).replace("return lora_B @ lora_A", "return lora_A @ lora_B"))
    for attempt in (1, 2):
        said = []
        assert not run(tmp_path, [1], said.append)
        text = "\n".join(said)
        assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in text
        assert re.search(r"step01.py:\d+ in delta: return lora_A @ lora_B", text)
        assert ("hint" in text) == (attempt == 2)
    path.write_text("def delta(:")
    said = []
    assert not run(tmp_path, [1], said.append)
    assert "step01.py:1: def delta(:" in "\n".join(said)


def test_progress_is_kept_until_a_file_changes(tmp_path):
    course.create_files(tmp_path)
    for step in (1, 2):
        (tmp_path / course.file_name(step)).write_text(course.solution(step))

    def titles():
        said = []
        run(tmp_path, range(1, course.LAST + 1), said.append)
        assert "[##..........] 2 of 12 steps done." in said[-1]
        return [line.partition(":")[0] for line in said if line.startswith("Step")]

    assert titles() == ["Step 1", "Step 2", "Step 3"]
    assert titles() == ["Step 3"]
    with (tmp_path / course.file_name(2)).open("a") as file:
        file.write("# a change\n")
    assert titles() == ["Step 2", "Step 3"]


def test_reset_keeps_the_old_file_and_nothing_is_overwritten_otherwise(tmp_path):
    course.create_files(tmp_path)
    path = tmp_path / course.file_name(2)
    path.write_text("mine = 1\n")
    assert course.create_files(tmp_path) == []
    assert path.read_text() == "mine = 1\n"
    kept = course.reset(tmp_path, 2)
    assert kept.read_text() == "mine = 1\n"
    assert path.read_text() == course.template(2)
    assert course.reset(tmp_path, 2) is None
    path.write_text("mine = 2\n")
    assert course.reset(tmp_path, 2).read_text() == "mine = 2\n"
    assert kept.read_text() == "mine = 1\n"


def test_a_solution_is_shown_after_asking_only(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "WORK", tmp_path)
    for answer, shown in (("n\n", False), ("\n", False), ("y\n", True)):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert cli.main(["--solution", "1"]) == 0
        assert ("lora_B @ lora_A" in capsys.readouterr().out) == shown


def test_the_exit_code_says_whether_all_is_done(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "WORK", tmp_path)
    assert cli.main([]) == 1
    assert cli.main(["--step", "99"]) == 2
    assert "the steps are 1 to 12, and 13 is the bonus" in capsys.readouterr().err
    (tmp_path / course.file_name(1)).write_text(course.solution(1))
    assert cli.main(["--step", "1"]) == 0


def test_training_with_the_readers_layer_is_compared_with_the_librarys(
    solved, tiny_recipe, tmp_path, monkeypatch
):
    for path in solved.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    path = tmp_path / course.file_name(11)
    course.load(tmp_path, 11)
    note = step11.compare(path, tiny_recipe, tmp_path)
    assert re.search(r"All \d+ tensors of the adapter and the head are equal, bit for bit", note), note
    result = check_step(tmp_path, 12)  # now there is a run to look into
    assert result.done, result.message
    assert re.search(
        r"Effective rank of ΔW: .* Test accuracy: .*% with rank 8, .* rank 0", result.passed[-1][1]
    )


@pytest.mark.parametrize(("accuracy", "done"), [(0.94, True), (0.8, False)])
def test_other_roundings_are_accepted_and_another_accuracy_is_not(accuracy, done, tmp_path, monkeypatch):
    """A layer that draws other masks, say, ends with other bits, and with nearly the same accuracy."""
    found = {step11.YOURS: accuracy, step11.OURS: 0.95}
    monkeypatch.setattr(
        step11, "run_job", lambda name, *_: SimpleNamespace(summary={"test_accuracy": found[name]})
    )
    monkeypatch.setattr(
        step11,
        "read_adapter",
        lambda folder: SimpleNamespace(tensors={"a": torch.tensor(found[folder.parent.name])}),
    )
    if done:
        assert "0 of 1 tensors are equal" in step11.compare(tmp_path / "step11.py", Recipe(), tmp_path)
    else:
        with pytest.raises(CheckError, match=r"(?s)expected  95.00%.*got       80.00%"):
            step11.compare(tmp_path / "step11.py", Recipe(), tmp_path)


def test_watching_checks_again_after_a_change_until_ctrl_c(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "WORK", tmp_path)
    waits = []

    def sleep(_):
        waits.append(len(waits))
        if waits[-1] == 1:
            (tmp_path / course.file_name(1)).write_text(course.solution(1))
        if waits[-1] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", sleep)
    assert cli.main(["--watch"]) == 0
    out = capsys.readouterr().out
    assert out.count("Waiting for a file to be saved") == 2
    assert "0 of 12 steps done" in out
    assert "1 of 12 steps done" in out
