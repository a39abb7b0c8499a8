"""python -m bench: what LoRA costs and saves. A table to read, and JSON on the last line of stdout."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench import merging, peers
from train.hardware import device_name, resolve_device

PARTS = {"merging": merging, "peers": peers}
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Runs one part, prints its table and its JSON, and keeps the JSON in bench/results."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--quick", action="store_true", help="less of everything: to see that it runs")
    parser.add_argument("--save", action="store_true", help="keep the JSON in bench/results/PART.json")
    options = parser.parse_args(arguments)
    part = PARTS[options.part]
    result = {"part": options.part, "quick": options.quick, **_surroundings(), **part.run(options.quick)}
    print(part.table(result))
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.part}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def _surroundings() -> dict[str, Any]:
    versions = {}
    for package in ("torch", "transformers", "peft"):
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
