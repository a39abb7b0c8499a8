"""python -m train.combine: adds up adapters, each with a weight, as one adapter's folder."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora import combine
from train.command import CommandParser, run_command
from train.runs import RunError, refuse_used
from train.trained import adapter_size, load_adapters, read_trained_adapter


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 success, 2 an error that the message explains."""
    parser = CommandParser(
        "train.combine",
        "Writes one plain LoRA adapter whose ΔW is the weighted sum of those of the RUNs. Its head, classes "
        "and length in tokens are the first RUN's.",
        "One RUN alone is scaled: RUN:-1 is the opposite adapter.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN:WEIGHT",
        help="a run's folder, or an adapter's folder from here or from PEFT, and a number, also below 0",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new adapter's folder")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="cut each layer's rank, which is the sum of all ranks, to R"
    )
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: combine_runs(_weights(options.runs), options.output, options.rank))


def _weights(words: Sequence[str]) -> dict[str, float]:
    """The weight of each RUN in RUN:WEIGHT. Raises RunError."""
    weights: dict[str, float] = {}
    for word in words:
        run, _, number = word.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            run = ""
        if not run:
            raise RunError(f"{word}: not of the form RUN:WEIGHT with a number, such as runs/quickstart:0.5")
        if Path(run).resolve() in map(Path.resolve, map(Path, weights)):
            raise RunError(f"{word}: {run} is given twice; add up its weights")
        weights[run] = weight
    return weights


def combine_runs(weights: Mapping[str, float], folder: Path, rank: int | None = None) -> None:
    """Writes the sum of the adapters of runs, with their weights, to `folder`, which must be empty or new.

    Raises RunError, OSError, and what loading raises.
    """
    refuse_used(folder)
    read = {run: read_trained_adapter(Path(run)) for run in weights}
    run, first = next(iter(read.items()))
    adapters, _ = load_adapters(read)
    name = str(folder)
    try:
        lost = combine(adapters, name, weights, rank)
        note = {key: value for key, value in first.note.items() if key != "layer"}  # it is plain LoRA
        try:
            adapters.save(name, folder, str(first.content.base), "SEQ_CLS", note)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # it was empty or new
            raise
    except (RuntimeError, ValueError) as error:  # ΔW of a DoRA, a weight or a sum that is not finite
        raise RunError(str(error)) from error
    for other, adapter in read.items():
        if adapter.labels != first.labels:
            print(
                f"note: {other} has other classes, {', '.join(adapter.labels)}; the new adapter has those of "
                f"{run}",
                file=sys.stderr,
            )
    ranks = sorted({adapters[name].config.for_layer(layer)["r"] for layer in lost})
    print(
        f"{folder}: rank {', '.join(map(str, ranks))} on {len(lost)} layers, "
        f"{adapter_size(folder) / 1e6:.2f} MB, classes {', '.join(first.labels)}"
    )
    if rank is not None:
        most = max(lost, key=lambda layer: lost[layer])
        print(
            f"lost by the cut to rank {rank}, as a share of the norm of ΔW: {lost[most]:.1%} in {most}, the "
            f"most, and {statistics.median(lost.values()):.1%} in the median layer"
        )


if __name__ == "__main__":
    sys.exit(main())
