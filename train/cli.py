"""The command `python -m train`: its flags, its errors, its exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from lora import AdapterError
from model import ModelError
from model.minilm import DataPackageMissingError
from train.checkpoint import CheckpointError
from train.config import RECIPES, RecipeError, load_recipe, parse_setting
from train.data import DataError
from train.distributed import env_rank
from train.hardware import keep_freed_memory
from train.job import InterruptedRunError, run_job
from train.loop import TrainingError
from train.report import summary_text
from train.runs import RunError


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 an error that the message explains, 130 or 143 stopped by a signal."""
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Trains LoRA, a head or the whole model on labelled news.",
        epilog=f"Recipes: {recipes}. Every field of a recipe can be --set; train/config.py lists them.",
    )
    parser.add_argument(
        "--recipe", default="quickstart", metavar="NAME|FILE", help="a recipe's name or a TOML file"
    )
    parser.add_argument(
        "--model", metavar="M", help="minilm, a folder, a RoBERTa of the hub, or random:minilm"
    )
    parser.add_argument(
        "--data", metavar="D", help="bbc, ag_news, a data set of the hub, or a folder of CSVs"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set a field of the recipe"
    )
    options = parser.parse_args(arguments)

    try:
        changes: dict[str, Any] = dict(parse_setting(setting) for setting in options.set)
        changes |= {key: value for key in ("model", "data") if (value := getattr(options, key)) is not None}
        name, recipe = load_recipe(options.recipe, changes)
    except RecipeError as error:
        return _fail(str(error))
    keep_freed_memory()
    folder = options.output or Path("runs") / name

    try:
        result = run_job(name, recipe, folder, options.resume)
    except InterruptedRunError as stop:
        if env_rank() == 0:
            command = _resume_command()
            print(f"\nstopped by {stop} after a checkpoint; go on with\n  {command}", file=sys.stderr)
        return 128 + stop.signal
    except (
        AdapterError, CheckpointError, DataError, DataPackageMissingError, ModelError, RecipeError, RunError,
        TrainingError, OSError,
    ) as error:  # fmt: skip
        return _fail(str(error))
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise  # a bug of ours
        return _fail(f"lost touch with the other processes: {str(error).splitlines()[0]}")
    if env_rank() == 0:
        if result.was_finished:
            print(f"{folder}: the run is finished; nothing to resume", file=sys.stderr)
        print(summary_text(result.summary, folder))
    return 0


def _resume_command() -> str:
    words = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join(["python", "-m", "train", *words, "--resume"])


def _fail(message: str) -> int:
    where = f" on rank {env_rank()}" if "RANK" in os.environ else ""
    print(f"error{where}: {message}", file=sys.stderr)
    return 2
