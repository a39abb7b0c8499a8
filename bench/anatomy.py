"""What the quickstart's adapter learned, in a few numbers. Reads the runs that `bench recipes` trains."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.recipes import RUNS
from bench.tables import bullets
from train.anatomy.study import FACTS, FOLDER, study
from train.command import shell_command
from train.runs import RunError

_RUN, _OTHER_SEED = RUNS / "quickstart", RUNS / "seed1"


def run(quick: bool) -> dict[str, Any]:
    """The extremes over the layers of anatomy.json, without scores if quick. Takes minutes.

    Raises RunError if the runs do not exist.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder_of_run = _RUN
        if quick and _RUN.is_dir():  # a copy, because a quick analysis must not replace a complete one
            ignored = shutil.ignore_patterns("checkpoint", FOLDER)
            folder_of_run = Path(shutil.copytree(_RUN, Path(folder) / _RUN.name, ignore=ignored))
        try:
            page = study(folder_of_run, [_OTHER_SEED], matrix_only=quick, report=_report)
        except RunError as error:
            command = shell_command("bench", "recipes")
            raise RunError(f"{error}; `{command}` trains the runs that this part needs") from error
        facts = json.loads(page.with_name(FACTS).read_text(encoding="utf-8"))
    layers = facts["layers"].values()
    similarity = facts["similarity"][0]["layers"].values()
    experiments = facts["experiments"] or {}
    return {
        "seed": facts["run"]["seed"],
        "precision": facts["run"]["precision"],
        "r": facts["run"]["r"],
        "delta_over_weight": _extremes(layer["delta_over_weight"] for layer in layers),
        "rank_90": _extremes(layer["rank_90"] for layer in layers),
        "amplification": _extremes(layer["amplification"] for layer in layers),
        "intruders": sum(layer["intruders"] for layer in layers),
        "singular_vectors": sum(len(layer["nearest_cosines"]) for layer in layers),
        "first_direction_in_another_seeds": _extremes(layer["phi"][0][-1] for layer in similarity),
        "by_chance": next(iter(similarity))["random"][0][-1],
        "truncated": experiments.get("truncated", []),
        "without_block": experiments.get("without_block", {}),
        "scaled": experiments.get("scaled", []),
    }


def table(result: dict[str, Any]) -> str:
    """The findings as a list."""
    r, (low, high) = result["r"], result["delta_over_weight"]
    fewest, most = result["rank_90"]
    weakest, strongest = result["amplification"]
    shared = result["first_direction_in_another_seeds"]
    lines = [
        f"‖ΔW‖ is {low:.0%} to {high:.0%} of ‖W‖, and {fewest} to {most} of its {r} directions hold 90% of"
        " its energy.",
        f"The share of A's strongest direction that lies in the span of another seed's A is {shared[0]:.2f}"
        f" to {shared[1]:.2f}; for random directions it is {result['by_chance']:.2f}.",
        f"ΔW amplifies directions that are weak in W: its amplification factor is {weakest:.1f} to"
        f" {strongest:.1f}.",
        f"{result['intruders']} of the {result['singular_vectors']} strongest singular vectors of the tuned"
        " weights are intruder dimensions ([arXiv 2410.21228](https://arxiv.org/abs/2410.21228)): their"
        " cosine with every pretrained singular vector is below 0.5.",
    ]
    if result["truncated"]:
        scores = {row["rank"]: row["accuracy"] for row in result["truncated"]}
        least = min(row["accuracy"] for row in result["without_block"].values())
        lines.insert(
            1,
            f"Test accuracy with ΔW truncated to rank 1 is {scores[1]:.4f}, to rank 2 {scores[2]:.4f}, to"
            f" rank 3 {scores[3]:.4f}, with the whole ΔW {scores[r]:.4f}, and without ΔW {scores[0]:.4f}."
            f" Without the adapter of any one block it is at least {least:.4f}.",
        )
    return bullets(lines)


def _extremes(values: Any) -> list[float]:
    found = list(values)
    return [min(found), max(found)]


def _report(message: str) -> None:
    print(message, file=sys.stderr)
