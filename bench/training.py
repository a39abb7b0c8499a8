"""Training runs for benchmarks: each in its own process, run once, and resumed if it was stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.config import load_recipe
from train.runs import CONFIG, SUMMARY, RunError, run_recipe

# Recipe fields for a quick run. precision: bf16 is slow on a CPU without instructions for it.
QUICK = {"epochs": 1, "max_length_tokens": 16, "max_train_examples": 64, "precision": "auto"}


class DivergedError(RunError):
    """A run that stopped because its loss or a gradient is not finite."""


def finish_run(
    recipe: str, settings: Mapping[str, Any], folder: Path, threads: int | None = None
) -> dict[str, Any]:
    """The summary of the run of `recipe` with these settings in `folder`. Runs it if it is not finished.

    threads: the number of CPU threads of the run; None leaves the choice to torch.

    Raises RunError with the run's error message if it fails, DivergedError if that is because the loss is not
    finite, and RunError if the folder has a run of other settings.
    """
    expected = load_recipe(recipe, settings)[1].with_absolute_paths()
    if (folder / CONFIG).is_file() and run_recipe(folder).with_absolute_paths() != expected:
        raise RunError(f"{folder}: it holds a run of other settings; remove it to run it again")
    if not (folder / SUMMARY).is_file():
        command = [sys.executable, "-m", "train", "--recipe", recipe, "--output", str(folder)]
        for key, value in settings.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        if (folder / CONFIG).is_file():
            command.append("--resume")
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            line = (done.stderr.strip().splitlines() or [""])[-1]
            diverged = "loss" in line and "is not finite" in line
            if not line.startswith("error:"):  # killed, for instance: the last line is about something else
                line = f"exit code {done.returncode} {line}".rstrip()
            raise (DivergedError if diverged else RunError)(f"{folder}: {line}")
    return dict(json.loads((folder / SUMMARY).read_text()))
