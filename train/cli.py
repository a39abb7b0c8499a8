"""The command `python -m train`: its flags, errors and exit codes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from lora.errors import UserError
from train.command import print_error, python, run_command
from train.config import RECIPES, load_recipe, parse_setting
from train.distributed import env_rank
from train.hardware import keep_freed_memory
from train.job import run_job
from train.runs import CONFIG, recipe_name, run_recipe
from train.signals import InterruptedRunError
from train.summary import summary_text


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains, 130 or 143 stopped by a signal."""
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Trains LoRA, the head or the whole model on labelled news.",
        epilog=f"Recipes: {recipes}. Every field of a recipe can be --set; train/config.py lists them.",
    )
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help="a recipe's name or a TOML file (default: quickstart)"
    )
    parser.add_argument(
        "--model", metavar="M", help="minilm, a folder, a RoBERTa on the hub, or random:minilm"
    )
    parser.add_argument(
        "--data", metavar="D", help="bbc, ag_news, a dataset on the hub, or a folder of CSV files"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in the folder, by default with its own recipe"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set a field of the recipe"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _train(options))


def _train(options: argparse.Namespace) -> int:
    changes: dict[str, Any] = dict(parse_setting(setting) for setting in options.set)
    changes |= {key: value for key in ("model", "data") if (value := getattr(options, key)) is not None}
    own = options.resume and options.recipe is None and not changes and options.output is not None
    if own and (options.output / CONFIG).is_file():
        recipe, name = run_recipe(options.output), recipe_name(options.output)
    else:
        name, recipe = load_recipe(options.recipe or "quickstart", changes)
    keep_freed_memory()
    folder = options.output or Path("runs") / name
    try:
        result = run_job(name, recipe, folder, options.resume)
    except InterruptedRunError as stop:
        if env_rank() == 0:
            words = [word for word in sys.argv[1:] if word != "--resume"]
            command = shlex.join([python(), "-m", "train", *words, "--resume"])
            print(f"\nstopped by {stop} after a checkpoint; continue with\n  {command}", file=sys.stderr)
        return 128 + stop.signal
    except RuntimeError as error:
        if isinstance(error, UserError) or os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        return print_error(f"lost the connection to the other processes: {str(error).splitlines()[0]}")
    if env_rank() == 0:
        if result.was_finished:
            print(f"{folder}: the run is finished; there is nothing to resume", file=sys.stderr)
        print(summary_text(result.summary, folder))
    return 0
