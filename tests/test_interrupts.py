"""Ctrl-C at any moment: real signals at random times during every operation that changes a model.

`make soak` runs the long form, 5,000 signals.
"""

import copy
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch
from conftest import randomise_adapter, tiny_roberta
from torch import nn

from lora import LoraConfig, disabled, eject, inject, load_adapter, merge, merged, save_adapter, unmerge
from lora.ablate import enable_only, scaled, truncated
from lora.adapted import has_adapter, lora_layers
from lora.interrupts import uninterrupted
from lora.quantised import Bf16Embedding, quantise
from lora.quantised.tensor import QuantisedTensor

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=("query", "value"), modules_to_save=("classifier",))
IDS = torch.arange(3, 33).reshape(3, 10)
SIGNALS = int(os.environ.get("INTERRUPTS", "110"))


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """Python's own handler of SIGINT, which a process that a shell started with & ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Target:
    """A model in a known state, the operation to interrupt, and what the model may be afterwards."""

    def __init__(self, folder):
        self.base = tiny_roberta()
        self.adapted = copy.deepcopy(self.base)
        inject(self.adapted, CONFIG)
        randomise_adapter(self.adapted)
        self.folder = folder / "adapter"
        save_adapter(self.adapted, self.folder, base="tiny")
        self.logits = {
            name: self._logits(model) for name, model in (("base", self.base), ("adapted", self.adapted))
        }
        with merged(self.adapted):
            self.logits["merged"] = self._logits(self.adapted)
        self.weights = [p.detach().clone() for p in self.base.roberta.parameters()]

    @staticmethod
    @torch.no_grad()
    def _logits(model):
        return model.eval()(IDS).logits

    def start(self, operation):
        fresh = operation in ("inject", "load_adapter", "quantise")
        model = copy.deepcopy(self.base if fresh else self.adapted)
        if operation == "unmerge":
            merge(model)
        return model

    def run(self, operation, model):
        if operation == "inject":
            inject(model, CONFIG)
        elif operation == "quantise":
            quantise(model, "nf4", keep=("classifier",))
        elif operation == "load_adapter":
            load_adapter(model, self.folder)
        elif operation == "save_adapter":
            save_adapter(model, self.folder, base="tiny")
        elif operation in ("merge", "unmerge", "eject"):
            {"merge": merge, "unmerge": unmerge, "eject": eject}[operation](model)
        else:
            contexts = {
                "merged": merged(model),
                "disabled": disabled(model),
                "enable_only": enable_only(model, ()),
                "scaled": scaled(model, 2),
                "truncated": truncated(model, 1),
            }
            with contexts[operation]:
                time.sleep(0.0005)

    def check(self, operation, model):
        """The model is in one of the two states around the operation, and all later operations work."""
        if operation == "quantise":
            base = model.roberta
            kinds = {isinstance(m.weight, QuantisedTensor) for m in base.modules() if type(m) is nn.Linear}
            kinds |= {isinstance(m, Bf16Embedding) for m in base.modules() if isinstance(m, nn.Embedding)}
            assert len(kinds) == 1
            return
        if operation in ("merged", "disabled", "enable_only", "scaled", "truncated", "save_adapter"):
            assert torch.equal(self._logits(model), self.logits["adapted"])
        if has_adapter(model):
            states = {layer.merged for layer in lora_layers(model).values()}
            assert len(states) == 1
            if states == {True}:
                assert torch.equal(self._logits(model), self.logits["merged"])
                unmerge(model)
            expected = self.logits["base" if operation == "inject" else "adapted"]
            assert torch.equal(self._logits(model), expected)
            trainable = {name for name, p in model.named_parameters() if p.requires_grad}
            assert trainable == {name for name, p in self.adapted.named_parameters() if p.requires_grad}
            with merged(model), disabled(model):
                pass
            eject(model)
        if operation != "load_adapter":  # which loads another head
            assert torch.equal(self._logits(model), self.logits["base"])
        for before, after in zip(self.weights, model.roberta.parameters(), strict=True):
            assert torch.equal(before, after)
        load_adapter(model, self.folder)
        assert torch.equal(self._logits(model), self.logits["adapted"])


OPERATIONS = (
    "inject", "load_adapter", "save_adapter", "merge", "unmerge", "eject", "merged", "disabled",
    "enable_only", "scaled", "truncated", "quantise",
)  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_signal_leaves_the_state_before_or_after(operation, tmp_path, monkeypatch):
    # Python ignores an exception in a callback of a weak reference. After any use of torch.compile each
    # module has one.
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda caught: ignored.append(caught.exc_type))
    target = Target(tmp_path)
    random_times = random.Random(operation)
    duration = min(_seconds(target, operation) for _ in range(3))
    interrupted = 0
    for _ in range(max(1, SIGNALS // len(OPERATIONS))):
        model = target.start(operation)
        delay = random_times.uniform(0, 1.2 * duration)
        sender = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        finished = False
        try:
            sender.start()
            target.run(operation, model)
            finished = True
            for _ in range(10_000):  # until the signal comes; another thread may receive it during a sleep
                if ignored:
                    break
                time.sleep(0.001)
            assert ignored == [KeyboardInterrupt], "the signal was lost"
            ignored.clear()
        except KeyboardInterrupt:
            interrupted += not finished
        sender.join()
        assert torch.is_grad_enabled()
        assert torch.empty(0).device.type == "cpu"
        target.check(operation, model)
    assert interrupted or SIGNALS < 1000


def _seconds(target, operation):
    model = target.start(operation)
    started = time.perf_counter()
    target.run(operation, model)
    return time.perf_counter() - started


def test_signals_wait_and_are_handled_on_exit():
    def send():
        signal.raise_signal(signal.SIGINT)

    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
        with uninterrupted():
            send()
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        send()


def test_a_signal_after_one_whose_handler_raises_is_handled_too():
    handled = []
    before = signal.signal(signal.SIGTERM, lambda number, _: handled.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handled == [signal.SIGTERM]
