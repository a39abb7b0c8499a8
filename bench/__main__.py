"""python -m bench: what LoRA costs and saves. A table to read, and JSON on the last line of stdout."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench import accuracy, anatomy, growth, inference, memory, merging, original, peers, recipes, throughput
from bench.readme import RESULTS
from lora.files import write_atomically
from train.data import DataError, load_news
from train.hardware import device_name, keep_freed_memory, resolve_device
from train.runs import RunError

# Each has run(quick) -> dict and table(result) -> str; figures(result, folder) where it draws.
PARTS: dict[str, Any] = {
    "throughput": throughput,
    "memory": memory,
    "inference": inference,
    "growth": growth,
    "merging": merging,
    "peers": peers,
    "original": original,
    "accuracy": accuracy,
    "recipes": recipes,
    "anatomy": anatomy,
}
AS_IT_COMES = ("original",)  # memory allocation as the original's users have it
WITH_DATA = ("original", "accuracy", "recipes")  # whose run takes AG News as well
WITH_RIVALS = ("merging", "peers")  # which leave out what is not installed
ALL = ("throughput", "memory", "inference", "growth")  # what "all" runs: minutes, and no peer needed


def main(arguments: list[str] | None = None) -> int:
    """Runs one part or all, prints tables and then JSON; --save keeps JSON and figures in bench/results."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "part", nargs="?", default="all", choices=["all", *PARTS], help="all: " + ", ".join(ALL)
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: to see that it runs")
    parser.add_argument(
        "--save", action="store_true", help="keep JSON and figures; those of a quick run are not"
    )
    parser.add_argument(
        "--data",
        metavar="D",
        help="AG News for original, accuracy, recipes: a folder of CSVs, or a hub's data set",
    )
    options = parser.parse_args(arguments)
    if options.data is not None:
        if options.part not in WITH_DATA:
            parser.error(f"--data goes with {', '.join(WITH_DATA)}, not with {options.part}")
        try:
            load_news(options.data, validation_fraction=0.05, seed=0)  # an error now, not after an hour
        except DataError as error:
            parser.error(f"--data: {error}")
        if Path(options.data).is_dir():
            options.data = str(Path(options.data).resolve())
    folder = results_folder(resolve_device("auto"))
    lost = _would_lose(folder / f"{options.part}.json", options.data)
    if options.save and not options.quick and lost:
        print(f"{options.part}: not kept, for {folder / options.part}.json has {lost} too", file=sys.stderr)
        options.save = False
    if options.part not in AS_IT_COMES:
        keep_freed_memory()
    names = ALL if options.part == "all" else (options.part,)
    results = {}
    failed = False
    for number, name in enumerate(names, 1):
        print(f"part {number} of {len(names)}: {name}", file=sys.stderr)
        started = time.perf_counter()
        part = PARTS[name]
        try:
            result = {"part": name, "quick": options.quick, **_surroundings(), **_run(part, options)}
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if options.data is not None:
            result["given_data"] = Path(options.data).name
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        print(f"{name}\n\n{part.table(result)}\n" if len(names) > 1 else part.table(result))
        if options.save and options.quick:
            print(f"{name}: a quick run is not kept", file=sys.stderr)
        elif options.save:
            try:
                _save(part, result, folder)
            except OSError as error:
                print(f"error: not kept: {error}", file=sys.stderr)
                failed = True
        results[name] = result
    whole = {"part": "all", **results} if options.part == "all" else results[options.part]
    print(json.dumps(whole))
    return int(failed)


def _run(part: Any, options: argparse.Namespace) -> dict[str, Any]:
    found = part.run(options.quick, options.data) if options.part in WITH_DATA else part.run(options.quick)
    return dict(found)


def _would_lose(path: Path, data: str | None) -> str:
    """What the results there have and a run without that data or those packages has not; else empty."""
    if not path.is_file():
        return ""
    try:
        kept = json.loads(path.read_text())
    except ValueError:  # damaged: nothing to lose
        return ""
    lost = [kept["given_data"]] if kept.get("given_data") and data is None else []
    if kept["part"] in WITH_RIVALS:
        lost += kept["versions"].keys() - _surroundings()["versions"].keys()
    return ", ".join(lost)


def results_folder(device: torch.device) -> Path:
    """Where results of this kind of device lie: bench/results for the CPU, bench/results/cuda for CUDA."""
    return RESULTS if device.type == "cpu" else RESULTS / device.type


def _save(part: Any, result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{result['part']}.json", (json.dumps(result, indent=1) + "\n").encode())
    if hasattr(part, "figures"):
        part.figures(result, folder)


def _surroundings() -> dict[str, Any]:
    versions = {}
    for package in ("torch", "transformers", "peft", "loralib"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": device_name(resolve_device("auto")),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
    }


if __name__ == "__main__":
    sys.exit(main())
