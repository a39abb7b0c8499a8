"""Training runs that a bench needs: each in a process of its own, run once, gone on with if it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.config import Recipe, load_recipe
from train.runs import CONFIG, SUMMARY, RunError, run_recipe

QUICK = {"epochs": 1, "max_length_tokens": 16, "max_train_examples": 64}  # a recipe's fields, to see it run


def finish_run(
    recipe: str, settings: Mapping[str, Any], folder: Path, threads: int | None = None
) -> dict[str, Any]:
    """The summary of the run in `folder`: of `recipe` with those fields set. Runs it if there is none yet.

    threads: of the run on the CPU; None leaves it to torch.

    Raises RunError with the run's own message where it fails, or if other settings were run there.
    """
    wanted = load_recipe(recipe, settings)[1]
    if (folder / CONFIG).is_file() and _resolved(run_recipe(folder)) != _resolved(wanted):
        raise RunError(f"{folder}: a run of other settings; remove it, and it is run anew")
    if not (folder / SUMMARY).is_file():
        command = [sys.executable, "-m", "train", "--recipe", recipe, "--output", str(folder)]
        for key, value in settings.items():
            command += ["--set", f"{key}={json.dumps(value)}"]
        if (folder / CONFIG).is_file():
            command.append("--resume")
        surroundings = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RunError(f"{folder}: {said[-1]}")
    return dict(json.loads((folder / SUMMARY).read_text()))


def _resolved(recipe: Recipe) -> Recipe:
    """The recipe with its data's folder, where it is one, called by its whole path."""
    return replace(recipe, data=str(Path(recipe.data).resolve())) if Path(recipe.data).is_dir() else recipe
