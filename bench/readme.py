"""python -m bench.readme: writes the measured parts of the PAGES from bench/results.

A measured part is between two markers, each on its own line:

    <!-- bench:NAME -->
    <!-- /bench -->

NAME is one of EXCERPTS, or the path of a JSON file in bench/results without its suffix: throughput, or
cuda/throughput.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from bench import RESULTS, variants
from bench.__main__ import PARTS, REUSING_RUNS
from bench.merging import changed
from bench.paired import FULL, LORA, accuracy
from bench.steps import held_bytes
from bench.tables import prose
from train.tables import markdown, mebibytes, quantity, size

_BENCH = Path(__file__).parent
_ROOT = _BENCH.parent
PAGES = (_ROOT / "README.md", _BENCH / "README.md", _ROOT / "lora" / "variants" / "README.md")
_BLOCK = re.compile(r"(<!-- bench:(\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def main() -> int:
    """Rewrites the pages, and prints which results are missing."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in names(text):
            if name not in EXCERPTS and not (RESULTS / f"{name}.json").is_file():
                print(f"{name}: no results yet", file=sys.stderr)
        page.write_text(rewritten(text, RESULTS), encoding="utf-8")
    return 0


def names(text: str) -> list[str]:
    """The names of the measured parts of a page."""
    return [match[2] for match in _BLOCK.finditer(text)]


def rewritten(text: str, results: Path) -> str:
    """The text of a page with every measured part replaced by what the JSON files in `results` say."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_measured(block[2], results)}\n{block[3]}", text)


def _measured(name: str, results: Path) -> str:
    if name in EXCERPTS:
        return EXCERPTS[name](results)
    if not (results / f"{name}.json").is_file():
        return f"Not measured yet: there is no `bench/results/{name}.json`."
    result = _read(results, name)
    return "\n\n".join([PARTS[name.rpartition("/")[2]].table(result), _source(name, result)])


def _read(results: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    return result


def _source(name: str, result: dict[str, Any]) -> str:
    """A line that names the JSON file and the commit that was measured.

    Training runs that were finished before are not of that commit.
    """
    link = f"[`{name}.json`](results/{name}.json)"
    if not result.get("commit"):
        return f"Source: {link}."
    changed = "" if result["clean_tree"] else " with uncommitted changes"
    reused = "; training runs may be of earlier commits" if name in REUSING_RUNS else ""
    return f"Source: {link}, measured at commit `{result['commit'][:12]}`{changed}{reused}."


def summary(results: Path) -> str:
    """The table of README.md: the cost of LoRA and of full fine-tuning in five rows."""
    steps, held, scores, drift = (
        _read(results, name) for name in ("throughput", "memory", "variants", "merging")
    )
    row = next(row for row in steps["models"] if row["model"] == "random:roberta-base")
    modes = [row["modes"][kind] for kind in ("full", "lora")]
    times = [mode["milliseconds"]["step"]["median"] for mode in modes]
    bytes_held = [
        held_bytes(
            next(r for r in held["rows"] if (r["model"], r["mode"]) == (row["model"], kind))["components"]
        )
        for kind in ("full", "lora")
    ]
    news = scores["sets"][-1]
    over = f"each in one of {news['parts']} folds" if news["folds"] else f"mean of {news['parts']} seeds"

    def line(label: str, values: list[str], ratio: float) -> list[str]:
        return [label, *values, f"{ratio:.3g}"]

    trainable = [mode["parameters"]["trainable"] for mode in modes]
    saved = [mode["checkpoint_bytes"] for mode in modes]
    accuracies = [accuracy(next(r for r in news["rows"] if r["name"] == name)) for name in (FULL, LORA)]
    return "\n\n".join(
        [
            markdown(
                [
                    ["", "full fine-tuning", "LoRA", "LoRA / full"],
                    line("trainable parameters", [f"{n:,}" for n in trainable], trainable[1] / trainable[0]),
                    line("saved file", [size(n) for n in saved], saved[1] / saved[0]),
                    line("training step, ms", [quantity(ms) for ms in times], times[1] / times[0]),
                    line(
                        "memory held by a step, MiB",
                        [mebibytes(n) for n in bytes_held],
                        bytes_held[1] / bytes_held[0],
                    ),
                    ["test accuracy, %", *accuracies, ""],
                ]
            ),
            prose(
                f"The first four rows are roberta-base at {row['rows']} x {row['length']} tokens in"
                f" {steps['precision']} on {steps['device']}, r = 8 on query and value. The last is MiniLM on"
                f" {news['test_articles']:,} test articles of {news['data']}, {over}, after"
                f" {news['epochs']} epochs, with the 95% interval over articles. After"
                f" {drift['cycles']:,} cycles of merging and unmerging, {changed(drift)} of the adapted"
                " weights differ."
            ),
        ]
    )


def variants_in_short(results: Path) -> str:
    """The table of lora/variants/README.md: what each variant costs and brings."""
    return variants.short_table(_read(results, "variants"))


EXCERPTS = {"summary": summary, "variants-in-short": variants_in_short}

if __name__ == "__main__":
    sys.exit(main())
