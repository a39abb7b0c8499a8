"""What the quickstart's adapter learnt, in a few numbers: of the runs that `bench recipes` leaves."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.recipes import RUNS
from bench.tables import bullets
from train.anatomy.report import FACTS, FOLDER, study
from train.runs import RunError

_RUN, _OTHER_SEED = RUNS / "quickstart", RUNS / "seed1"


def run(quick: bool) -> dict[str, Any]:
    """The extremes over the layers of anatomy.json; without the scores if quick. Minutes.

    Raises SystemExit if the runs are not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        looked_at = _RUN
        if quick and _RUN.is_dir():  # a copy, for a quick look must not replace the run's whole anatomy
            kept = shutil.ignore_patterns("checkpoint", FOLDER)
            looked_at = Path(shutil.copytree(_RUN, Path(folder) / _RUN.name, ignore=kept))
        try:
            page = study(looked_at, [_OTHER_SEED], matrix_only=quick, say=_say)
        except RunError as error:
            raise SystemExit(
                f"anatomy: {error}; `python -m bench recipes` trains what is looked at"
            ) from error
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
    """The findings in words."""
    r, (low, high) = result["r"], result["delta_over_weight"]
    fewest, most = result["rank_90"]
    weakest, strongest = result["amplification"]
    shared = result["first_direction_in_another_seeds"]
    lines = [
        f"ΔW is {low:.0%} to {high:.0%} of W's length, and {fewest} to {most} of its {r} directions hold 90%"
        " of its energy.",
        f"Of the strongest direction of A, {shared[0]:.2f} to {shared[1]:.2f} (a share of its squared length)"
        f" lies in what another seed's A spans; by chance {result['by_chance']:.2f} would.",
        f"ΔW amplifies directions in which W has little: {weakest:.1f} to {strongest:.1f} times what"
        " is there.",
        f"{result['intruders']} of the tuned weights' {result['singular_vectors']} strongest singular vectors"
        " are intruder dimensions, in the words of [arXiv 2410.21228](https://arxiv.org/abs/2410.21228):"
        " their cosine with each pretrained one is below 0.5.",
    ]
    if result["truncated"]:
        scores = {row["rank"]: row["accuracy"] for row in result["truncated"]}
        least = min(row["accuracy"] for row in result["without_block"].values())
        lines.insert(
            1,
            f"Cut to rank 1 after training it scores {scores[1]:.4f}, to rank 2 {scores[2]:.4f}, to rank 3"
            f" {scores[3]:.4f}, whole {scores[r]:.4f}; without it the trained head is left with"
            f" {scores[0]:.4f}. Without any one block's part of it accuracy stays at {least:.4f} or above.",
        )
    return bullets(lines)


def _extremes(values: Any) -> list[float]:
    found = list(values)
    return [min(found), max(found)]


def _say(words: str) -> None:
    print(words, file=sys.stderr)
