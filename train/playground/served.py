"""What the playground computes: one base model with the adapters of several runs, and knobs that change them.

The knobs belong to a request, not to the model. A request sets them inside contexts that restore every bit,
also on an exception, while it holds the only lock. Between two requests no adapter is active. Long work
gives up the lock after each batch, so that short requests are answered in between.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora import combine, merge, unmerge
from lora.ablate import enable_only, scaled, truncated
from lora.errors import UserError
from lora.storage import digest
from model import speed_up
from train.batches import batches_by_length
from train.config import Recipe, is_unicode
from train.hardware import autocast, one_thread, resolve_device, resolve_precision
from train.inference import batch_logits
from train.metrics import Scores
from train.playground.runs import ServedRun, make_served_run
from train.runs import RunError, run_recipe
from train.trained import Trained, TrainedAdapter, load_adapters, read_trained_adapter

LONGEST_TEXT = 2**20  # characters
_SAMPLE_BATCH = 4  # small, so that a text does not wait long for the lock
_PIECES = 32  # parts of a text at most whose influence is computed
_SUM = "/sum"  # the name of the weighted sum; no run's folder has a slash in its name
_TOKENIZING = threading.Lock()  # truncation is state of a fast tokenizer


class InputError(UserError, ValueError):
    """An input of the page or of its HTTP API that cannot be used. The message says why."""


@dataclass(frozen=True)
class Knobs:
    """Changes of an adapter: ΔW times `scale`, cut to `rank`, in the layers with the names `layers` alone.

    None: every rank, all layers.
    """

    scale: float = 1.0
    rank: int | None = None
    layers: tuple[str, ...] | None = None


class Served:
    """The runs of a playground, by name, and everything that the page shows of them.

    Every method can be called from several threads at once. Raises InputError for a text, a run or knobs
    that cannot be used, and leaves the model as it was.
    """

    def __init__(self, folders: Sequence[Path]):
        """Loads finished LoRA runs on one base. Raises RunError, and what loading raises."""
        self._lock = threading.Lock()
        self.ended = threading.Event()  # once it is set, long work stops with an InputError
        # Moving a knob changes neither, so they are computed once for each text.
        self._without_knobs = functools.lru_cache(maxsize=64)(self._base_and_adapter)
        adapters: dict[str, TrainedAdapter] = {}
        recipes: dict[str, Recipe] = {}
        for folder in folders:
            name = folder.resolve().name
            if name in adapters:
                raise RunError(f"{folder}: another run is called {name} too; rename one of the folders")
            adapters[name] = read_trained_adapter(folder)
            recipes[name] = run_recipe(folder)
            first = next(iter(recipes))
            same_data = recipes[name].data == recipes[first].data
            if not same_data or adapters[name].labels != adapters[first].labels:
                raise RunError(
                    f"{folder}: its data or classes differ from those of {folders[0]}; only runs on the same "
                    "data can be served together"
                )
        self.adapters, trained = load_adapters(adapters, text=True)
        self.model: Any = self.adapters.model
        self.device = resolve_device("auto")
        self.precision = resolve_precision(recipes[first].precision, self.device)
        speed_up(self.model.to(self.device), self.precision)
        self.runs = {
            name: make_served_run(folder, recipes[name], trained[name], self.adapters[name].layers)
            for name, folder in zip(adapters, folders, strict=True)
        }

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names."""
        return next(iter(self.runs.values())).trained.labels

    def classify(self, name: str, text: str, knobs: Knobs) -> dict[str, Any]:
        """The class probabilities of a text: base (with the trained head), adapter, and with the knobs.

        Also the number of `tokens` that the model read, and of `characters` that they cover.
        """
        run = self._run(name)
        text = self._read(text)
        _, spans = _encoded(run.trained, text)
        with self._lock:
            base, adapter = self._without_knobs(name, text)
            changed = self._classify(run, text, knobs)
        return {
            "labels": list(self.labels), "base": base, "adapter": adapter, "knobs": changed,
            "tokens": len(spans), "characters": max((end for _, end in spans), default=0),
        }  # fmt: skip

    def influence(self, name: str, text: str, knobs: Knobs) -> tuple[list[tuple[int, int, float]], str]:
        """For each piece of a text its start, its end and its influence; and the predicted class.

        The influence is the change of the log-odds of the predicted class when the piece is present, compared
        with the text in which each of its tokens is the mask token (occlusion, Zeiler and Fergus 2014, arXiv
        1311.2901). A piece is a token, or in long texts several neighbouring tokens.
        """
        run = self._run(name)
        text = self._read(text)
        ids, spans = _encoded(run.trained, text)
        mask = run.trained.tokenizer.mask_token_id
        inside = [at for at, (start, end) in enumerate(spans) if end > start]  # without special tokens
        per_piece = -(-len(inside) // _PIECES) or 1
        pieces = [inside[at : at + per_piece] for at in range(0, len(inside), per_piece)]
        rows = torch.tensor([ids]).repeat(len(pieces) + 1, 1)  # the last row is the unchanged text
        for row, piece in enumerate(pieces):
            rows[row, piece] = mask if mask is not None else run.trained.tokenizer.pad_token_id
        scores: list[Tensor] = []
        for start in range(0, len(rows), _SAMPLE_BATCH):
            with self._turn(), self._changed(run, knobs):
                scores.append(self._logits(rows[start : start + _SAMPLE_BATCH], None))
        logits = torch.cat(scores)
        best = int(logits[-1].argmax())
        others = logits[:, [label for label in range(logits.shape[1]) if label != best]]
        odds = logits[:, best] - others.logsumexp(1)
        change = (odds[-1] - odds[:-1]).tolist()
        found = [
            (spans[piece[0]][0], spans[piece[-1]][1], value)
            for piece, value in zip(pieces, change, strict=True)
        ]
        return found, self.labels[best]

    def excitation(self, name: str, text: str) -> tuple[list[str], dict[str, list[float]]]:
        """The tokens of a text, and ‖A·x‖ by layer for each of them: how strongly A responds to its input."""
        run = self._run(name)
        text = self._read(text)
        if run.off:
            raise InputError(run.off)
        norms: dict[str, list[float]] = {}
        with self._lock, self._changed(run, Knobs()), ExitStack() as hooks:
            for layer_name, layer in run.layers.items():
                hook = layer.register_forward_pre_hook(_store_norms(norms, layer_name))
                hooks.callback(hook.remove)
            ids = _token_ids(run.trained, text)
            self._logits(torch.tensor([ids]), None)
            return run.trained.tokenizer.convert_ids_to_tokens(ids), norms

    def score(self, name: str, knobs: Knobs, part: str = "sample") -> Iterator[tuple[int, Scores]]:
        """The scores on the first batches of a part, after each batch, and the number of rows in the part.

        part: "sample" of the validation articles, or "test", which `train.evaluate` scores too.
        """
        run = self._run(name)
        if part not in ("sample", "test"):
            raise InputError(f"part: {part!r} is not sample or test")
        rows = run.sample if part == "sample" else run.test
        size = _SAMPLE_BATCH if part == "sample" else 2 * run.recipe.batch_size  # that of train.evaluate
        pad = run.trained.tokenizer.pad_token_id
        truth, predicted = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        for members in batches_by_length(rows.lengths, size):
            with self._turn(), self._changed(run, knobs):
                logits = batch_logits(self.model, rows, members, pad, self.device, self.precision)
            truth = np.concatenate([truth, rows.labels[members]])
            predicted = np.concatenate([predicted, logits.argmax(1).cpu().numpy()])
            yield len(rows), Scores.of(truth, predicted, len(self.labels))

    def mix(self, text: str, weights: Mapping[str, float]) -> dict[str, Any]:
        """The class probabilities of a text by the `runs`, and by the weighted `sum` of ΔW, in one forward.

        The head of the sum is that of the run with the largest weight. Without weights it is None.
        """
        text = self._read(text)
        if not isinstance(weights, Mapping):
            raise InputError("weights: not a mapping of runs to numbers")
        for name, weight in weights.items():
            if type(weight) not in (int, float) or not -100 <= weight <= 100:
                raise InputError(f"weight of {name!r}: {weight!r} is not a number from -100 to 100")
            if off := self._run(name).off:
                raise InputError(off)
        with self._lock, ExitStack() as undo:
            names = list(self.runs)
            if weights:
                order = sorted(weights, key=lambda name: -weights[name])
                combine(self.adapters, _SUM, {name: weights[name] for name in order})
                undo.callback(self.adapters.remove, _SUM)
                names.append(_SUM)
            ids = [_token_ids(self.runs[order[0] if name == _SUM else name].trained, text) for name in names]
            tokenizer = self.runs[names[0]].trained.tokenizer
            padded = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
            with self.adapters.rows(names):
                logits = self._logits(padded["input_ids"], padded["attention_mask"])
            found = torch.softmax(logits, dim=1).tolist()
        rows = dict(zip(names, found, strict=True))
        return {"sum": rows.pop(_SUM, None), "runs": rows}

    def merge_and_unmerge(self, name: str, text: str) -> dict[str, Any]:
        """Merges an adapter and unmerges it: probabilities, digests of all weights, and seconds."""
        run = self._run(name)
        text = self._read(text)
        with self._lock, self._changed(run, Knobs()):
            found: dict[str, Any] = {"labels": list(self.labels), "digest_before": self._weights_digest()}
            found["unmerged"] = self._probabilities(run.trained, text)
            started = time.perf_counter()
            try:
                merge(self.model)
            except RuntimeError as error:  # a quantised base
                raise InputError(str(error)) from error
            try:
                found["merge_seconds"] = time.perf_counter() - started
                found["merged"] = self._probabilities(run.trained, text)
                found["digest_merged"] = self._weights_digest()
            finally:
                started = time.perf_counter()
                unmerge(self.model)
                found["unmerge_seconds"] = time.perf_counter() - started
            found["digest_after"] = self._weights_digest()
            pairs = zip(found["unmerged"], found["merged"], strict=True)
            found["largest_difference"] = max(abs(p - q) for p, q in pairs)
        return found

    def _check_knobs(self, name: str, knobs: Knobs) -> None:
        """Raises InputError if the knobs cannot be applied to the run's adapter."""
        run = self._run(name)
        if type(knobs.scale) not in (int, float) or not -100 <= knobs.scale <= 100:
            raise InputError(f"scale: {knobs.scale!r} is not a number from -100 to 100")
        if knobs.rank is not None and (type(knobs.rank) is not int or knobs.rank < 0):
            raise InputError(f"rank: {knobs.rank!r} is not a whole number from 0")
        if run.off and (knobs.scale != 1 or knobs.rank is not None):
            raise InputError(run.off)
        if unknown := set(knobs.layers or ()) - run.layers.keys():
            raise InputError(f"layers: {min(unknown)} is not one of {', '.join(run.layers)}")

    def _run(self, name: str) -> ServedRun:
        if not isinstance(name, str) or name not in self.runs:
            raise InputError(f"run: {name!r} is not one of {', '.join(self.runs)}")
        return self.runs[name]

    def _read(self, text: str) -> str:
        """The text, checked, and cut after a word if the part before has more tokens than any run reads."""
        if not isinstance(text, str):
            raise InputError("the text is not a string")
        if not text.strip():
            raise InputError("the text is empty; type one, or choose an example")
        if len(text) > LONGEST_TEXT:
            raise InputError(f"the text has {len(text):,} characters; the limit is {LONGEST_TEXT:,}")
        if not is_unicode(text):
            raise InputError("the text is not Unicode: it has a lone surrogate")
        run = max(self.runs.values(), key=lambda run: run.trained.max_length_tokens)
        start = re.match(r"(.*)\s", text[: 50 * run.trained.max_length_tokens], re.DOTALL)
        enough = start and len(_token_ids(run.trained, start[1])) == run.trained.max_length_tokens
        return start[1] if start and enough else text

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Context of one part of a longer work. The pause after it lets a thread that waits have the lock."""
        if self.ended.is_set():
            raise InputError("the server has ended")
        with self._lock:
            yield
        time.sleep(0.001)

    @contextmanager
    def _changed(self, run: ServedRun, knobs: Knobs) -> Iterator[None]:
        """Context in which the run's adapter is active and changed. The caller holds the lock."""
        self._check_knobs(run.name, knobs)
        try:
            self.adapters.use(run.name)
            with ExitStack() as changes:
                if knobs.rank is not None:
                    with one_thread():
                        changes.enter_context(truncated(self.model, knobs.rank))
                if knobs.scale != 1:
                    changes.enter_context(scaled(self.model, knobs.scale))
                if knobs.layers is not None:
                    changes.enter_context(enable_only(self.model, knobs.layers))
                yield
        finally:
            self.adapters.use(None)

    def _base_and_adapter(self, name: str, text: str) -> tuple[list[float], list[float]]:
        run = self.runs[name]
        return self._classify(run, text, Knobs(layers=())), self._classify(run, text, Knobs())

    def _classify(self, run: ServedRun, text: str, knobs: Knobs) -> list[float]:
        with self._changed(run, knobs):
            return self._probabilities(run.trained, text)

    def _probabilities(self, trained: Trained, text: str) -> list[float]:
        logits = self._logits(torch.tensor([_token_ids(trained, text)]), None)
        found: list[float] = torch.softmax(logits, dim=1)[0].tolist()
        return found

    @torch.inference_mode()
    def _logits(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(rows, classes) float32 on the CPU."""
        mask = None if attention_mask is None else attention_mask.to(self.device)
        with autocast(self.device, self.precision):
            logits: Tensor = self.model(input_ids=input_ids.to(self.device), attention_mask=mask).logits
        return logits.float().cpu()

    def _weights_digest(self) -> str:
        return digest({name: tensor.detach() for name, tensor in self.model.named_parameters()}, {})


def _token_ids(trained: Trained, text: str) -> list[int]:
    return _encoded(trained, text)[0]


def _encoded(trained: Trained, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens that the model reads, and where each begins and ends in the text; (0, 0) if special."""
    with _TOKENIZING:
        encoded = trained.tokenizer(
            text, truncation=True, max_length=trained.max_length_tokens, return_offsets_mapping=True
        )
    return encoded["input_ids"], encoded["offset_mapping"]


def _store_norms(norms: dict[str, list[float]], name: str) -> Any:
    """A hook that stores ‖A·x‖ of a layer's input x (1, tokens, in)."""

    def hook(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        A = layer.factors()[0]
        norms[name] = F.linear(inputs[0].to(A.dtype), A)[0].norm(dim=-1).tolist()

    return hook
