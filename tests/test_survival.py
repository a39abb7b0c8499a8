"""Runs that are killed, starved, locked out and shared, in processes of their own.

`make soak` is the long form.
"""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import content

from train.checkpoint import list_checkpoints
from train.config import Recipe
from train.console import _open_after

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recipe_file(hub_folder, csv_folder, tmp_path_factory):
    recipe = Recipe(
        model=str(hub_folder), data=str(csv_folder), epochs=40, batch_size=4, learning_rate=3e-3,
        max_length_tokens=16, validation_fraction=0.25, precision="fp32", device="cpu", base_dropout=0.02,
        log_every_steps=3, checkpoint_every_steps=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(recipe.to_toml())
    return path, recipe


@pytest.fixture(scope="module")
def undisturbed(recipe_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    returned, _, err = finish(start(recipe_file, folder))
    assert returned == 0, err
    return content(folder)


def start(recipe_file, folder, *flags, processes=0, **options):
    launcher = [sys.executable, "-m"]
    if processes:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*launcher, "train", "--recipe", str(recipe_file[0]), "--output", str(folder), *flags]
    # one thread, as torchrun sets it: sums in the same order, and processes that do not fight over cores
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for_checkpoint(folder, process, number=1):
    deadline = time.monotonic() + 120
    while len(list_checkpoints(folder / "checkpoint")) < number:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(recipe_file, undisturbed, tmp_path, number, code):
    process = start(recipe_file, tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(number)
    returned, _, err = finish(process)
    assert returned == code
    assert "--resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    returned, _, err = finish(start(recipe_file, tmp_path / "run", "--resume"))
    assert returned == 0, err
    assert content(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("seconds", [1, 3])
def test_a_signal_before_training_is_one_message(recipe_file, tmp_path, number, code, seconds):
    process = start(recipe_file, tmp_path / "run")
    time.sleep(seconds)  # within the imports, whatever the machine's speed; or else the data
    process.send_signal(number)
    returned, _, err = finish(process)
    assert returned == code
    assert "stopped" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGINT, signal.SIGINT]])
def test_a_kill_and_a_second_ctrl_c_lose_nothing(recipe_file, undisturbed, tmp_path, signals):
    process = start(recipe_file, tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", process, 2)
    for number in signals:
        process.send_signal(number)
    returned, _, err = finish(process)
    assert returned in (-signals[-1], 130)  # 130 where the step ended between the two
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "summary.json").exists()
    returned, _, err = finish(start(recipe_file, tmp_path / "run", "--resume"))
    assert returned == 0, err
    assert content(tmp_path / "run") == undisturbed


def test_a_second_run_into_the_same_folder_is_refused(recipe_file, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        returned, _, err = finish(start(recipe_file, folder))
    assert returned == 2
    assert "another run is writing to it" in err


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_resumes(recipe_file, undisturbed, tmp_path):
    """A limit on file size stands for the disk: the first write beyond it fails, a checkpoint's."""
    folder = tmp_path / "run"
    process = start(recipe_file, folder)
    wait_for_checkpoint(folder, process)
    process.kill()
    finish(process)
    size = list_checkpoints(folder / "checkpoint")[-1].stat().st_size

    def starve() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    returned, _, err = finish(start(recipe_file, folder, "--resume", preexec_fn=starve))
    assert returned == 2
    assert "File too large" in err
    assert "Traceback" not in err
    returned, _, err = finish(start(recipe_file, folder, "--resume"))
    assert returned == 0, err
    assert content(folder) == undisturbed


def still(recipe_file, tmp_path, **changes):
    """The recipe without any dropout, and longer in steps than in epochs."""
    import dataclasses

    fields = {"base_dropout": 0.0, "lora_dropout": 0.0, "epochs": 8, "log_every_steps": 1, **changes}
    recipe = dataclasses.replace(recipe_file[1], **fields)
    path = tmp_path / "still.toml"
    path.write_text(recipe.to_toml())
    return path, recipe


def test_two_processes_are_the_same_run(recipe_file, tmp_path):
    """56 steps, no dropout: every logged loss to float32 rounding. Batches of 4 = 2 + 2, 3 = 2 + 1."""
    recipe = still(recipe_file, tmp_path)
    returned, _, err = finish(start(recipe, tmp_path / "one"))
    assert returned == 0, err
    returned, _, err = finish(start(recipe, tmp_path / "two", processes=2))
    assert returned == 0, err
    assert "2 processes" in err
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 56
    for first, second in zip(one, two, strict=True):
        for key, value in first.items():
            # float32 sums in another order, carried through 56 steps; a norm is a sum of squares besides
            tolerance = 1e-4 if "norm" in key else 1e-5
            assert second[key] == pytest.approx(value, rel=tolerance), (first["step"], key)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["test_confusion_matrix"] == summaries[1]["test_confusion_matrix"]
    assert summaries[0]["train_examples"] == summaries[1]["train_examples"] == 8 * 27


def test_a_run_stopped_on_two_processes_goes_on_on_one(recipe_file, tmp_path):
    recipe = still(recipe_file, tmp_path, epochs=30)
    process = start(recipe, tmp_path / "run", processes=2)
    wait_for_checkpoint(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    returned, _, err = finish(process)
    assert returned != 0
    assert "after a checkpoint" in err
    assert f"torchrun --standalone --nproc-per-node 2 -m train --resume --output {tmp_path / 'run'}\n" in err
    returned, _, err = finish(start(recipe, tmp_path / "run", "--resume"))
    assert returned == 0, err
    returned, _, err = finish(start(recipe, tmp_path / "whole"))
    assert returned == 0, err
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # float32 sums in another order, 210 steps


def test_a_rank_that_dies_takes_the_others_with_it_and_the_run_resumes(recipe_file, tmp_path):
    recipe = still(recipe_file, tmp_path, epochs=400)
    process = start(recipe, tmp_path / "run", processes=2)
    wait_for_checkpoint(tmp_path / "run", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    started = time.monotonic()
    returned, _, _ = finish(process)
    assert returned != 0
    assert time.monotonic() - started < 60
    before = list_checkpoints(tmp_path / "run" / "checkpoint")[-1]
    process = start(recipe, tmp_path / "run", "--resume")
    while list_checkpoints(tmp_path / "run" / "checkpoint")[-1] == before:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    returned, _, err = finish(process)
    assert returned == 143, err
    assert "resuming after step" in err


def test_a_logs_kept_lines_are_there_at_every_moment_of_being_cut(tmp_path):
    """Another process reads them just then, and a kill may come just then."""
    path = tmp_path / "metrics.jsonl"
    kept = b"{}\n" * 5000
    path.write_bytes(kept)
    done = threading.Event()

    def cut() -> None:
        for _ in range(300):
            with _open_after(path, 5000) as file:
                file.write("{}\n" * 100)
        done.set()

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        while not done.is_set():
            assert path.read_bytes().startswith(kept)
    finally:
        thread.join()
    assert path.read_bytes() == kept + b"{}\n" * 100
