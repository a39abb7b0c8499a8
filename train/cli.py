"""The command `python -m train`: its flags, errors and exit codes."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lora.errors import UserError, first_line
from train.command import CommandParser, print_error, run_command
from train.config import RECIPES, Recipe, RecipeError, field_meant, load_recipe, nearest, parse_setting
from train.data import DATA_HELP
from train.distributed import env_rank
from train.hardware import keep_freed_memory
from train.job import run_job
from train.runs import CONFIG, recipe_name, resume_command, run_recipe
from train.signals import InterruptedRunError
from train.summary import summary_text


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains, 130 or 143 stopped by a signal."""
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    parser = CommandParser(
        "train",
        "Trains LoRA, the head or the whole model on labelled texts.",
        f"Recipes: {recipes}. Every field of a recipe can be --set; train/config.py lists them.",
    )
    parser.add_argument(
        "--recipe", metavar="NAME|FILE", help="a recipe's name or a TOML file (default: quickstart)"
    )
    parser.add_argument(
        "--model", metavar="M", help="minilm, a folder, a RoBERTa on the hub, or random:minilm"
    )
    parser.add_argument("--data", metavar="D", help=DATA_HELP)
    parser.add_argument(
        "--layer", metavar="FILE.py:Class", help="a layer class of your own in place of LoRALinear"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in the folder, by default with its own recipe"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set a field of the recipe"
    )
    options, unknown = parser.parse_known_args(arguments)
    return run_command(lambda: _train(options, unknown))


def _train(options: argparse.Namespace, unknown: Sequence[str]) -> int:
    settings = dict(parse_setting(setting) for setting in options.set)
    if unknown:
        raise RecipeError(_explain(unknown))
    flags = {key: getattr(options, key) for key in ("model", "data", "layer")}
    flags = {key: value for key, value in flags.items() if value is not None}
    own = options.output or Path("runs") / "quickstart"
    if options.resume and options.recipe is None and (own / CONFIG).is_file():
        recipe, name, folder = run_recipe(own), recipe_name(own), own
    else:
        name, recipe = load_recipe(options.recipe or "quickstart")
        folder = options.output or Path("runs") / name
    recipe = recipe.changed(settings, "--set ").changed(flags, "--")
    keep_freed_memory()
    try:
        result = run_job(name, recipe, folder, options.resume)
    except InterruptedRunError as stop:
        if env_rank() == 0:
            everywhere = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
            where = ", on each machine with its own --node-rank," if everywhere else ""
            print(
                f"\nstopped by {stop} after a checkpoint; continue{where} with\n  {resume_command(folder)}",
                file=sys.stderr,
            )
        return 128 + stop.signal
    except RuntimeError as error:
        if isinstance(error, UserError) or os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        traceback.print_exc()  # also of an error of this process, which then loses its connection
        return print_error(f"this process or its connection to the others failed: {first_line(error)}")
    if env_rank() == 0:
        if result.was_finished:
            print(f"{folder}: the run is finished; there is nothing to resume", file=sys.stderr)
        print(summary_text(result.summary, folder))
    return 0


def _explain(unknown: Sequence[str]) -> str:
    """What to write instead of arguments that are not flags of this command."""
    flag, _, value = unknown[0].partition("=")
    if not flag.startswith("-"):
        instead = f"--set {shlex.quote(unknown[0])}" if value else "--recipe for a recipe, --set for a field"
        return f"{unknown[0]}: not a flag; use {instead}"
    values = itertools.takewhile(lambda word: not word.startswith("-"), unknown[1:])
    value = value or ",".join(values)
    if field := field_meant(flag.lstrip("-")):
        value = value or ("true" if isinstance(getattr(Recipe(), field), bool) else "VALUE")
        instead = (
            f"--{field} {shlex.quote(value)}"
            if field in ("model", "data")
            else f"--set {shlex.quote(f'{field}={value}')}"
        )
        return f"{flag}: there is no such flag; use {instead}"
    known = ("--recipe", "--model", "--data", "--layer", "--output", "--resume", "--set", "--help")
    return f"{flag}: there is no such flag; {nearest(flag, known)}"
