"""python -m bench: measures what LoRA costs and saves. Prints tables, and JSON as the last line."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench import (
    adapters,
    anatomy,
    base,
    growth,
    inference,
    memory,
    merging,
    original,
    peers,
    recipes,
    results_folder,
    throughput,
    variants,
)
from lora.storage import write_atomically
from train.command import CommandParser, print_error, run_command
from train.data import DataError, load_news
from train.hardware import device_name, keep_freed_memory, resolve_device

# Each has run(quick) -> dict and table(result) -> str, and figures(result, folder) if it draws.
PARTS: dict[str, Any] = {
    "throughput": throughput,
    "memory": memory,
    "inference": inference,
    "growth": growth,
    "merging": merging,
    "peers": peers,
    "base": base,
    "original": original,
    "variants": variants,
    "recipes": recipes,
    "anatomy": anatomy,
    "adapters": adapters,
}
DEFAULT_ALLOCATION = ("original",)  # measured with malloc's defaults, as the original's users have it
WITH_DATA = ("original", "variants", "recipes", "base")  # whose run() also takes AG News
REUSING_RUNS = ("variants", "recipes", "base", "anatomy")  # which repeat no finished training run
WITH_BASELINES = ("merging", "peers", "adapters", "base")  # which leave out baselines that are not installed
ALL = ("throughput", "memory", "inference", "growth")  # the parts of "all": minutes, without baselines
_ROOT = Path(__file__).parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 1 results that could not be saved, 2 an error that the message explains."""
    parser = CommandParser(
        "bench", "Measures what LoRA costs and saves. Prints tables, and JSON as the last line."
    )
    parser.add_argument(
        "part", nargs="?", default="all", choices=["all", *PARTS], help="all: " + ", ".join(ALL)
    )
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument(
        "--save", action="store_true", help="save JSON and figures in bench/results; not of a quick run"
    )
    parser.add_argument(
        "--data",
        metavar="D",
        help=f"AG News for {', '.join(WITH_DATA)}: a folder of CSV files, or a dataset on the hub",
    )
    options = parser.parse_args(arguments)
    if options.data is not None:
        if options.part not in WITH_DATA:
            parser.error(f"--data goes with {', '.join(WITH_DATA)}, not with {options.part}")
        if options.data.partition(":")[0] == "bbc":
            parser.error("--data: bbc is measured without it")
        try:
            load_news(options.data, validation_fraction=0.05, seed=0)  # an error now, not after an hour
        except DataError as error:
            return print_error(f"--data: {error}")
        if Path(options.data).is_dir():
            options.data = str(Path(options.data).resolve())
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    folder = results_folder(resolve_device("auto"))
    lost = _would_lose(folder / f"{options.part}.json", options.data)
    if options.save and not options.quick and lost:
        path = folder / f"{options.part}.json"
        print(
            f"{options.part}: this run is not saved: {path} has results with {lost}, which it does not"
            " measure (give --data, or install the packages)",
            file=sys.stderr,
        )
        options.save = False
    if options.part not in DEFAULT_ALLOCATION:
        keep_freed_memory()
    names = ALL if options.part == "all" else (options.part,)
    environment = _environment()
    results = {}
    failed = False
    for number, name in enumerate(names, 1):
        if len(names) > 1:
            print(f"part {number} of {len(names)}: {name}", file=sys.stderr)
        started = time.perf_counter()
        part = PARTS[name]
        result = {"part": name, "quick": options.quick, **environment, **_run(part, options)}
        if options.data is not None:
            result["given_data"] = Path(options.data).name
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        print(f"{name}\n\n{part.table(result)}\n" if len(names) > 1 else part.table(result))
        if options.save and options.quick:
            print(f"{name}: a quick run is not saved", file=sys.stderr)
        elif options.save:
            try:
                _save(part, result, folder)
            except OSError as error:
                print(f"error: not saved: {error}", file=sys.stderr)
                failed = True
        results[name] = result
    print(json.dumps({"part": "all", **results} if options.part == "all" else results[options.part]))
    return int(failed)


def _run(part: Any, options: argparse.Namespace) -> dict[str, Any]:
    result = part.run(options.quick, options.data) if options.part in WITH_DATA else part.run(options.quick)
    return dict(result)


def _would_lose(path: Path, data: str | None) -> str:
    """The data or packages that the saved results have and a run without them would lose, or ""."""
    if not path.is_file():
        return ""
    try:
        saved = json.loads(path.read_text())
    except ValueError:  # a damaged file has nothing to lose
        return ""
    lost = [saved["given_data"]] if saved.get("given_data") and data is None else []
    if saved["part"] in WITH_BASELINES:
        lost += saved["versions"].keys() - _environment()["versions"].keys()
    return ", ".join(lost)


def _save(part: Any, result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{result['part']}.json", (json.dumps(result, indent=1) + "\n").encode())
    if hasattr(part, "figures"):
        part.figures(result, folder)


def _environment() -> dict[str, Any]:
    """What a result depends on: the commit, the machine, and the versions of packages."""
    versions = {}
    for package in ("torch", "transformers", "peft", "loralib", "bitsandbytes"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        **_checkout(),
        "device": device_name(resolve_device("auto")),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _checkout() -> dict[str, Any]:
    """The commit, and whether the tree was clean; both None outside a Git checkout.

    Saved results and the pages made from them do not count as changes, so that several parts can be
    measured one after another.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ".", ":!bench/results", ":!*.md")
        return {"commit": git("rev-parse", "HEAD"), "clean_tree": not changes}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "clean_tree": None}


if __name__ == "__main__":
    sys.exit(main())
