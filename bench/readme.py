"""python -m bench.readme: writes the measured parts of README.md from the JSON in bench/results.

In README.md a text stands between two markers, each alone on its line:

    <!-- bench:NAME -->
    <!-- /bench -->

NAME is the JSON's path in bench/results without its ending: throughput, or cuda/throughput.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import accuracy, anatomy, growth, inference, memory, original, peers, recipes, throughput
from bench.tables import prose

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
_BLOCK = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def main() -> int:
    """Rewrites README.md and says what has no results yet."""
    text = README.read_text(encoding="utf-8")
    for name in names(text):
        if not (RESULTS / f"{name}.json").is_file():
            print(f"{name}: no results yet", file=sys.stderr)
    README.write_text(rewritten(text, RESULTS), encoding="utf-8")
    return 0


def names(text: str) -> list[str]:
    """The results that the text shows."""
    return [match[2] for match in _BLOCK.finditer(text)]


def rewritten(text: str, results: Path) -> str:
    """The text with everything between markers made anew from the JSON files in `results`."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_measured(block[2], results)}\n{block[3]}", text)


def _measured(name: str, results: Path) -> str:
    path = results / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet: there is no `bench/results/{name}.json`."
    part = name.rpartition("/")[2]
    if part not in TEXTS:
        return f"The figures are in [`bench/results/{name}.json`](bench/results/{name}.json)."
    return TEXTS[part](json.loads(path.read_text(encoding="utf-8")))


def _merging(result: dict[str, Any]) -> str:
    """The drift of both implementations in a sentence."""
    rows = {(row["implementation"], row["dtype"]): row for row in result["rows"]}
    ours = max(row["changed_after_all"] for (name, _), row in rows.items() if name == "ours")
    words = f"{ours:.1%}" if ours else "none"
    if ("peft", "float32") not in rows:
        return f"After {result['cycles']:,} cycles on MiniLM {words} of the adapted weights are others here."
    single, half = rows["peft", "float32"], rows["peft", "bfloat16"]
    largest = f"{half['largest_change']:.1e}".replace("e-0", "e-")
    return prose(
        f"Under PEFT {result['versions']['peft']}, after one cycle on MiniLM"
        f" {single['changed_after_one']:.1%} of the adapted weights in float32 and"
        f" {half['changed_after_one']:.1%} of those in bfloat16 are others; after {result['cycles']:,} cycles"
        f" {single['changed_after_all']:.1%} and {half['changed_after_all']:.1%}, the latter by up to"
        f" {largest}; and here {words}, in any dtype"
        " (`make bench-merging`, [`bench/results/merging.json`](bench/results/merging.json))."
    )


TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "throughput": throughput.table,
    "memory": memory.table,
    "inference": inference.table,
    "growth": growth.table,
    "merging": _merging,
    "peers": peers.table,
    "original": original.table,
    "accuracy": accuracy.table,
    "recipes": recipes.table,
    "anatomy": anatomy.table,
}

if __name__ == "__main__":
    sys.exit(main())
