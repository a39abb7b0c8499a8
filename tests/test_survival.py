"""Runs that are killed, starved, locked out and shared, in processes of their own.

`make soak` is the long form, also with ranks that are killed.
"""

import dataclasses
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
import torch
from conftest import content

from train.checkpoint import _same, list_checkpoints
from train.config import Recipe
from train.console import _open_after
from train.job import run_job
from train.runs import RunError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recipe_file(hub_folder, csv_folder, tmp_path_factory):
    recipe = Recipe(
        model=str(hub_folder), data=str(csv_folder), epochs=20, batch_size=4, learning_rate=3e-3,
        max_length_tokens=16, validation_fraction=0.25, precision="fp32", device="cpu", base_dropout=0.02,
        log_every_steps=3, checkpoint_every_steps=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(recipe.to_toml())
    return path, recipe


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


def wait_for_checkpoint(folder, process, after=0):
    """Until there is a checkpoint of a later step than `after`."""
    deadline = time.monotonic() + 120
    while last_checkpoint(folder) <= after:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last_checkpoint(folder):
    return max((int(path.stem) for path in list_checkpoints(folder / "checkpoint")), default=0)


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def test_signals_a_full_disk_and_a_kill_lose_nothing(recipe_file, tmp_path):
    """All of it happens to one run, which ends in the bits of a run that nothing happened to.

    A limit on file size stands for the full disk: the first write beyond it fails, a checkpoint's.
    """
    folder = tmp_path / "run"
    process = start(recipe_file, folder)
    wait_for_checkpoint(folder, process)
    process.send_signal(signal.SIGTERM)
    returned, _, err = finish(process)
    assert returned == 143
    assert "--resume" in err.splitlines()[-1]
    assert "Traceback" not in err

    size = list_checkpoints(folder / "checkpoint")[-1].stat().st_size

    def starve() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    returned, _, err = finish(start(recipe_file, folder, "--resume", preexec_fn=starve))
    assert returned == 2
    assert "File too large" in err
    assert "Traceback" not in err

    process = start(recipe_file, folder, "--resume")
    wait_for_checkpoint(folder, process, last_checkpoint(folder))
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    returned, _, err = finish(process)
    assert returned in (-signal.SIGINT, 130)  # 130 where the step ended between the two
    assert "Traceback" not in err

    process = start(recipe_file, folder, "--resume")
    wait_for_checkpoint(folder, process, last_checkpoint(folder))
    process.kill()
    finish(process)
    assert not (folder / "summary.json").exists()
    returned, _, err = finish(start(recipe_file, folder, "--resume"))
    assert returned == 0, err

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_job("tiny", recipe_file[1], tmp_path / "undisturbed")
    finally:
        torch.set_num_threads(threads)
    assert content(folder) == content(tmp_path / "undisturbed")


@pytest.mark.parametrize(("number", "code", "seconds"), [(signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 1)])
def test_a_signal_before_training_is_one_message(recipe_file, tmp_path, number, code, seconds):
    process = start(recipe_file, tmp_path / "run")
    time.sleep(seconds)  # within the imports, whatever the machine's speed; or else the data
    process.send_signal(number)
    returned, _, err = finish(process)
    assert returned == code
    assert "stopped" in err
    assert "Traceback" not in err


def test_a_second_run_into_the_same_folder_is_refused(recipe_file, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another run is writing to it"):
            run_job("tiny", recipe_file[1], folder)


def test_a_run_stopped_and_resumed_on_two_processes_is_the_run_on_one(recipe_file, tmp_path):
    """56 steps without dropout: every logged loss to float32 rounding. Batches of 4 = 2 + 2, 3 = 2 + 1."""
    recipe = dataclasses.replace(
        recipe_file[1], base_dropout=0.0, lora_dropout=0.0, epochs=8, log_every_steps=1,
        use_dora=True, base_precision="nf4",  # which contain what plain LoRA on float32 does
    )  # fmt: skip
    path = tmp_path / "still.toml"
    path.write_text(recipe.to_toml())
    one, two = tmp_path / "one", tmp_path / "two"
    process = start((path, recipe), two, processes=2)
    wait_for_checkpoint(two, process)
    process.send_signal(signal.SIGTERM)
    returned, _, err = finish(process)
    assert returned != 0
    assert "after a checkpoint" in err
    assert f"torchrun --standalone --nproc-per-node 2 -m train --resume --output {two}\n" in err
    returned, _, err = finish(start((path, recipe), two, "--resume", processes=2))
    assert returned == 0, err
    assert "2 processes" in err
    run_job("still", recipe, one)
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert len(logs[0]) == len(logs[1]) == 56
    for first, second in zip(*logs, strict=True):
        for key, value in first.items():
            # float32 sums in another order, carried through 56 steps; a norm is a sum of squares besides
            tolerance = 1e-4 if "norm" in key else 1e-5
            assert second[key] == pytest.approx(value, rel=tolerance), (first["step"], key)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert summaries[0]["test_confusion_matrix"] == summaries[1]["test_confusion_matrix"]
    assert summaries[0]["train_examples"] == summaries[1]["train_examples"] == 8 * 27


def test_a_checkpoint_of_a_recipe_with_fewer_fields_is_of_the_same_recipe():
    recipe = Recipe(r=4)
    before = "".join(line for line in recipe.to_toml().splitlines(keepends=True) if "use_dora" not in line)
    assert _same("recipe", before, recipe.to_toml())
    assert not _same("recipe", before, Recipe(r=4, use_dora=True).to_toml())
    assert not _same("recipe", "r = 'x'", recipe.to_toml())
    assert not _same("data", before, recipe.to_toml())


def test_a_readers_copies_are_no_checkpoints(tmp_path):
    for name in ("00000200", "00000400", "00000200-keep", "00000200_keep", "best"):
        (tmp_path / f"{name}.safetensors").touch()
    assert [path.stem for path in list_checkpoints(tmp_path)] == ["00000200", "00000400"]


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
