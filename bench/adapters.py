"""Many adapters on one base: the time to switch, memory per adapter, and batches whose rows belong to many.

python -m bench.adapters MODEL PRECISION COUNT...: the memory with that many adapters, in its own process.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bench import plotting
from bench.baselines import installed
from bench.memory import in_own_process
from bench.peak import resident_bytes
from bench.steps import (
    CLASSES,
    CONFIG,
    in_turn,
    milliseconds,
    random_batch,
    randomise,
    ratio,
    time_in_turn,
    time_once,
)
from bench.tables import bullets, prose
from lora import LoraConfig, eject, inject, merge, unmerge
from lora.adapted import product_layers
from lora.adapters import Adapters
from model import load_base, speed_up
from train.hardware import autocast, keep_freed_memory, resolve_device, resolve_precision
from train.tables import markdown, quantity

ROWS = 64
CONTENDERS = {
    "merged": "one merged model for all rows",
    "exact": "mixed batch, exact",
    "fast": "mixed batch, fast mode",
    "ready": "a merged model for each adapter",
    "switch": "switch to each adapter",
    "merge": "merge and unmerge each adapter",
    "peft": "PEFT, adapter_names",
}
OPERATIONS = {"switch": "switch by name", "load": "load from a folder", "merge": "merge and unmerge"}
HEADLESS = replace(CONFIG, modules_to_save=())  # PEFT has no mixed batches with RoBERTa's head


@dataclass(frozen=True)
class Setting:
    """Mixed batches to compare. counts, skewed: numbers of adapters, assigned in turn and by Zipf's law."""

    precision: str  # "auto": the machine's
    length: int  # tokens a row: articles of AG News have 54, headlines about 12
    counts: tuple[int, ...]
    skewed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Range:
    """What a run measures."""

    model: str = "random:roberta-base"
    settings: tuple[Setting, ...] = (
        Setting("auto", 12, (1, 4, 16, 64), (64,)),
        Setting("auto", 54, (1, 4, 16, 64), (64,)),
        Setting("fp32", 12, (16,)),
        Setting("fp32", 54, (16,)),
    )
    rounds: int = 5
    held: tuple[int, ...] = (1, 10, 100)  # adapters in memory
    switches: int = 400
    operations: int = 21  # rounds of loading and of merging


QUICK = Range("random:minilm", (Setting("auto", 12, (1, 4), (4,)),), 2, (1, 2), 8, 2)


def run(quick: bool) -> dict[str, Any]:
    """Times of switching, bytes by number of adapters, and times of mixed batches.

    PEFT is left out, with a message, if it is not installed.
    """
    over = QUICK if quick else Range()
    device = resolve_device("auto")
    precision = resolve_precision("auto", device)
    if "peft" not in installed():
        print("adapters: peft is not installed, so it is left out", file=sys.stderr)
    print(f"adapters: {over.model}, switching", file=sys.stderr)
    switching = _switching(over, precision, device)
    print(f"adapters: {over.model}, memory", file=sys.stderr)
    memory = in_own_process("bench.adapters", over.model, precision, *map(str, over.held))
    return {
        "seed": 0, "model": over.model, "precision": precision, "rows": ROWS, "rounds": over.rounds,
        "switching_milliseconds": switching, **memory, "mixed": _mixed(over, device),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """One table each of switching, of memory, and of articles per second by setting; then the ratios."""
    kinds = {"here": "here", "peft": "PEFT"}
    times = result["switching_milliseconds"]
    kinds = {kind: words for kind, words in kinds.items() if kind in times["switch"]}
    operations = [["milliseconds: median, 95th percentile", *kinds.values()]]
    for key, words in OPERATIONS.items():
        cells = [times[key][kind] for kind in kinds]
        operations.append([words, *(f"{quantity(t['median'])}, {quantity(t['p95'])}" for t in cells)])
    memory = [["adapters", "bytes of their tensors", "growth of all tensors", "growth of the process"]]
    first = result["memory"][0]
    for each in result["memory"]:
        grown = [f"{_growth(first, each, key):.3f}" if each != first else "" for key in _GROWING]
        memory.append([f"{each['adapters']}", f"{each['adapter_bytes']:,}", *grown])
    parts = [
        prose(
            f"{result['model']}, r = 8 on query and value; {result['device']}. Switching and memory:"
            f" {result['precision']}, adapters with a head. The growth of memory since the first adapter is"
            " relative to the bytes of the further adapters' tensors. Articles per second: medians of"
            f" {result['rounds']} interleaved rounds, quartiles in brackets."
        ),
        markdown(operations),
        markdown(memory),
    ]
    for setting in _by_setting(result["mixed"]):
        row = setting[0]
        columns = [
            f"{row['adapters']}, skewed: {row['used']} used" if row["skewed"] else str(row["adapters"])
            for row in setting
        ]
        lines = [[f"articles per second, {_name(row)}; adapters", *columns]]
        for key, words in CONTENDERS.items():
            if key in row["milliseconds"]:
                lines.append([words, *(_rate(row, key) for row in setting)])
        parts.append(markdown(lines))
    return "\n\n".join([*parts, bullets(_sentences(result))])


def figures(result: dict[str, Any], folder: Path) -> None:
    """adapters.png: articles per second against the number of adapters, a line for each contender."""
    settings = [rows for rows in _by_setting(result["mixed"]) if rows[0]["adapters"] < rows[-1]["adapters"]]
    figure, axes = plotting.panels(1, len(settings), 5.6, 3.4)
    colors = dict(zip(CONTENDERS, plotting.COLORS, strict=True))
    for setting, axis in zip(settings, axes[0], strict=True):
        for key, words in CONTENDERS.items():
            rows = [row for row in setting if key in row["milliseconds"]]
            for skewed, style in ((False, "o-"), (True, "x:")):
                points = [row for row in rows if row["skewed"] == skewed]
                axis.plot(
                    [row["adapters"] for row in points],
                    [1e3 * result["rows"] / row["milliseconds"][key]["median"] for row in points],
                    style, color=colors[key], markersize=4, label=None if skewed else words,
                )  # fmt: skip
        counts = sorted({row["adapters"] for row in setting})
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, counts)
        axis.set_ylim(bottom=0)
        axis.set(xlabel="adapters in the batch", ylabel="articles per second", title=_name(setting[0]))
    plotting.save(figure, folder / "adapters.png")


# --- switching --------------------------------------------------------------------------------------


def _switching(over: Range, precision: str, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each operation, here and in PEFT. The adapters have a head."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = _adapters(over.model, 2, CONFIG, precision, device)
        _save(adapters, folder, "SEQ_CLS")

        def merge_and_unmerge() -> None:
            merge(adapters.model)
            unmerge(adapters.model)

        def load() -> None:
            adapters.load("new", f"{folder}/0")

        operations = {"here": _operations(adapters.use, load, adapters.remove, merge_and_unmerge, device)}
        if "peft" in installed():
            theirs = _with_peft(over.model, 2, folder, device)
            operations["peft"] = _operations(
                theirs.set_adapter,
                lambda: theirs.load_adapter(f"{folder}/0", adapter_name="new"),
                theirs.delete_adapter,
                lambda: (theirs.merge_adapter(), theirs.unmerge_adapter()),
                device,
            )
        found = {}
        for key in OPERATIONS:
            rounds = over.switches if key == "switch" else over.operations
            seconds = in_turn({kind: tasks[key] for kind, tasks in operations.items()}, rounds)
            found[key] = {kind: _percentiles(each) for kind, each in seconds.items()}
    return found


def _operations(
    use: Callable[[str], object],
    load: Callable[[], object],
    remove: Callable[[str], object],
    merge_and_unmerge: Callable[[], object],
    device: torch.device,
) -> dict[str, Callable[[], float]]:
    """The seconds of each of OPERATIONS with the adapters "0" and "1". load: one more, named "new"."""
    names = ["0", "1"]

    def switch() -> float:
        names.reverse()
        return time_once(lambda: use(names[0]), device)

    def load_and_remove() -> float:
        seconds = time_once(load, device)
        remove("new")
        return seconds

    return {"switch": switch, "load": load_and_remove, "merge": lambda: time_once(merge_and_unmerge, device)}


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1]
    return {**milliseconds(seconds), "p95": round(1e3 * p95, 3)}


# --- memory -----------------------------------------------------------------------------------------

_GROWING = ("tensor_bytes", "resident_bytes")


def main(arguments: Sequence[str]) -> int:
    """Prints `held` as JSON."""
    model_name, precision, *counts = arguments
    keep_freed_memory()
    print(json.dumps(held(model_name, precision, [int(count) for count in counts])))
    return 0


def held(model_name: str, precision: str, counts: Sequence[int]) -> dict[str, Any]:
    """For each number of adapters, the bytes of their tensors, of all tensors, and of the process.

    Each adapter has computed once, because speed_up then keeps copies of frozen weights.
    """
    device = resolve_device("auto")
    adapters = _adapters(model_name, 0, CONFIG, precision, device)
    batch = random_batch(1, 8, device)[0]
    rows = []
    for count in counts:
        for number in range(len(adapters.names), count):
            _add(adapters, number, CONFIG)
            adapters.use(str(number))
            _logits(adapters.model, batch, precision)
        adapters.use(None)
        gc.collect()
        rows.append(
            {
                "adapters": count,
                "adapter_bytes": sum(_adapter_bytes(adapters, name) for name in adapters.names),
                "tensor_bytes": _tensor_bytes(),
                "resident_bytes": resident_bytes(device),
            }
        )
    return {"memory": rows}


def _adapter_bytes(adapters: Adapters, name: str) -> int:
    adapter = adapters[name]
    tensors = [tensor for layer in adapter.layers.values() for tensor in layer.adapter_state().values()]
    tensors += [parameter for module in adapter.saved.values() for parameter in module.parameters()]
    return sum(tensor.nbytes for tensor in tensors)


def _tensor_bytes() -> int:
    """The memory of all tensors of the process, each storage once. Tensors of other classes have none."""
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, Parameter)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def _growth(first: dict[str, int], later: dict[str, int], key: str) -> float:
    """The growth of memory per byte of the further adapters' tensors."""
    return (later[key] - first[key]) / (later["adapter_bytes"] - first["adapter_bytes"])


# --- mixed batches ----------------------------------------------------------------------------------


def _mixed(over: Range, device: torch.device) -> list[dict[str, Any]]:
    """One row per setting, number of adapters and assignment. The adapters have no head."""
    count = max(max(setting.counts) for setting in over.settings)
    adapters = _adapters(over.model, count, HEADLESS, "fp32", device)
    with tempfile.TemporaryDirectory() as folder:
        theirs = None
        if "peft" in installed():
            _save(adapters, folder, None)
            theirs = _with_peft(over.model, count, folder, device)
    merged = load_base(over.model, num_labels=CLASSES)[0].to(device)
    inject(merged, HEADLESS)
    randomise({name: layer.lora_B for name, layer in product_layers(merged).items()})
    eject(merged, merge=True)
    merged.requires_grad_(False).eval()
    rows: list[dict[str, Any]] = []
    for setting in over.settings:
        precision = resolve_precision(setting.precision, device)
        if any((row["precision"], row["length"]) == (precision, setting.length) for row in rows):
            continue  # "auto" is fp32 on this machine
        print(f"adapters: {over.model}, {ROWS}x{setting.length} {precision}", file=sys.stderr)
        speed_up(adapters.model, precision)
        speed_up(merged, precision)
        batch = random_batch(ROWS, setting.length, device)[0]
        assignments = [(each, False) for each in setting.counts] + [(each, True) for each in setting.skewed]
        for count, skewed in assignments:
            names = [str(number) for number in assigned(ROWS, count, skewed)]
            tasks = _tasks(adapters, merged, theirs, names, batch, precision)
            seconds = time_in_turn(tasks, over.rounds, device, warm_up=int(count == setting.counts[0]))
            rows.append(
                {
                    "precision": precision,
                    "length": setting.length,
                    "adapters": count,
                    "skewed": skewed,
                    "used": len(set(names)),
                    "milliseconds": {kind: milliseconds(each) for kind, each in seconds.items()},
                }
            )
    return rows


def assigned(rows: int, count: int, skewed: bool) -> list[int]:
    """The adapter of each row: in turn; or skewed, drawn with probabilities proportional to 1, 1/2, 1/3..."""
    if not skewed:
        return [row % count for row in range(rows)]
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, count + 1)
    drawn: list[int] = torch.multinomial(weights, rows, replacement=True, generator=generator).tolist()
    return drawn


def _tasks(
    adapters: Adapters, merged: Any, theirs: Any, names: list[str], batch: Tensor, precision: str
) -> dict[str, Callable[[], object]]:
    """What each contender does to compute a batch, row i with adapter names[i]."""
    model = adapters.model
    own = {name: batch[[row for row, each in enumerate(names) if each == name]] for name in set(names)}

    def mixed(exact: bool) -> None:
        with adapters.rows(names, exact):
            _logits(model, batch, precision)

    def ready() -> None:
        for rows in own.values():
            _logits(merged, rows, precision)

    def switch() -> None:
        for name, rows in own.items():
            adapters.use(name)
            _logits(model, rows, precision)
        adapters.use(None)

    def merge_each() -> None:
        for name, rows in own.items():
            adapters.use(name)
            merge(model)
            _logits(model, rows, precision)
            unmerge(model)
        adapters.use(None)

    tasks: dict[str, Callable[[], object]] = {
        "merged": lambda: _logits(merged, batch, precision),
        "exact": lambda: mixed(True),
        "fast": lambda: mixed(False),
        "ready": ready,
        "switch": switch,
        "merge": merge_each,
    }
    if theirs is not None:
        tasks["peft"] = lambda: _logits(theirs, batch, precision, adapter_names=names)
    return tasks


@torch.no_grad()
def _logits(model: Any, batch: Tensor, precision: str, **settings: Any) -> Tensor:
    with autocast(batch.device, precision):
        logits: Tensor = model(input_ids=batch, **settings).logits
    return logits


def _sentences(result: dict[str, Any]) -> list[str]:
    """The ratios of the exact mode to the others, by setting."""
    sentences = []
    for row in result["mixed"]:
        if row["skewed"] or row["adapters"] == 1:
            continue
        times = row["milliseconds"]
        over = {kind: f"{ratio(each, times['exact']):.2f}" for kind, each in times.items()}
        than_peft = f", and {over['peft']} times PEFT's" if "peft" in over else ""
        sentences.append(
            f"{_name(row)}, {row['adapters']} adapters: the exact mode has {over['merged']} of the"
            f" throughput of one merged model{than_peft}. It is {over['ready']} times as fast as merged"
            f" models one after another, {over['switch']} times as fast as switching, and"
            f" {over['merge']} times as fast as merging."
        )
    return sentences


def _by_setting(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each precision and length, which follow each other."""
    return [list(found) for _, found in itertools.groupby(rows, _name)]


def _name(row: dict[str, Any]) -> str:
    return f"{row['precision']}, {row['length']} tokens a row"


def _rate(row: dict[str, Any], kind: str) -> str:
    """Articles per second: the median, and the quartiles in brackets."""
    times = row["milliseconds"][kind]
    median, low, high = (quantity(1e3 * ROWS / times[key]) for key in ("median", "high", "low"))
    return f"{median} ({low}-{high})"


# --- the models -------------------------------------------------------------------------------------


def _adapters(
    model_name: str, count: int, config: LoraConfig, precision: str, device: torch.device
) -> Adapters:
    """A base model with adapters "0", "1", ... of the size that training reaches, none of them active."""
    model: Any = load_base(model_name, num_labels=CLASSES)[0].to(device).eval()
    speed_up(model, precision)
    adapters = Adapters(model)
    for number in range(count):
        _add(adapters, number, config)
    return adapters


def _add(adapters: Adapters, number: int, config: LoraConfig) -> None:
    adapters.add(str(number), config, seed=number)
    layers = adapters[str(number)].layers
    randomise({name: layer.adapter_state()["lora_B"] for name, layer in layers.items()}, number)


def _save(adapters: Adapters, folder: str, task_type: str | None) -> None:
    for name in adapters.names:
        adapters.save(name, f"{folder}/{name}", base="base", task_type=task_type)


def _with_peft(model_name: str, count: int, folder: str, device: torch.device) -> Any:
    """The base model in PEFT's wrapper with the adapters in folder/0, folder/1, ..."""
    import peft

    model: Any = load_base(model_name, num_labels=CLASSES)[0].to(device)
    wrapped = peft.PeftModel.from_pretrained(model, f"{folder}/0", adapter_name="0")
    for number in range(1, count):
        wrapped.load_adapter(f"{folder}/{number}", adapter_name=str(number))
    return wrapped.eval()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
