"""Random sequences of everything one does with an adapter, against a reference of plain matrices.

The reference keeps W, the adapter and the head of a small model as plain tensors and computes what the model
must compute, for LoRA and its variants. Hypothesis draws the sequences and, on a failure, shrinks them.
`make test-long` runs 2,000.
"""

import copy
import dataclasses
import os
import tempfile
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from lora import (
    LoraConfig,
    LoRALinear,
    disabled,
    eject,
    inject,
    load_adapter,
    merge,
    merged,
    save_adapter,
    unmerge,
)

NAMES = ("block.query", "block.value")
CONFIG = LoraConfig(r=2, lora_alpha=3, target_modules=("query", "value"), modules_to_save=("head",))
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"query": nn.Linear(6, 6), "value": nn.Linear(6, 6, bias=False)})
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.block["query"](x)) + self.block["value"](x))


def fresh_net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net().eval()


class AdapterMachine(RuleBasedStateMachine):
    """The model under test, and what it must be: plain tensors and a few flags."""

    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.model = fresh_net()
        self.W = {name: self.model.get_submodule(name).weight.detach().clone() for name in NAMES}
        self.adapter: dict[str, dict[str, torch.Tensor]] = {}  # by layer and tensor
        self.injected = self.merged = False
        self.off = 0  # how many disabled() are open
        self.stack = ExitStack()
        self.base_is_original = True

    def teardown(self) -> None:
        self.stack.close()

    # --- what one can do --------------------------------------------------------------------------

    @rule(seed=st.integers(0, 3))
    def inject(self, seed: int) -> None:
        if self.injected:
            with pytest.raises(RuntimeError, match="adapter already"):
                inject(self.model, self.config, seed)
            return
        inject(self.model, self.config, seed)
        self.injected = True
        self.read_adapter()

    @precondition(lambda self: self.injected)
    @rule(seed=st.integers(0, 9))
    def train_step(self, seed: int) -> None:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).to(self.model.head.weight.dtype)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        self.model.train()
        try:
            if self.merged and not self.off:
                with pytest.raises(RuntimeError, match="while merged"):
                    self.model(x).float().square().sum().backward()
                assert all(torch.equal(p, old) for p, old in zip(trained, before, strict=True))
                return
            self.model(x).float().square().sum().backward()
            with torch.no_grad():
                for p in trained:
                    if p.grad is not None:
                        p.sub_(0.05 * p.grad.clamp(-1, 1))
        finally:
            self.model.zero_grad()
            self.model.eval()
        self.read_adapter()

    @rule()
    def merge(self) -> None:
        if not self.injected or self.merged or self.off:
            with pytest.raises(RuntimeError):
                merge(self.model)
        else:
            merge(self.model)
            self.merged = True

    @rule()
    def unmerge(self) -> None:
        if not self.injected or not self.merged or self.off:
            with pytest.raises(RuntimeError):
                unmerge(self.model)
        else:
            unmerge(self.model)
            self.merged = False

    @rule(fold=st.booleans())
    def eject(self, fold: bool) -> None:
        if not self.injected or self.merged or self.off:
            with pytest.raises(RuntimeError):
                eject(self.model, merge=fold)
            return
        if fold:
            self.W = {name: self.folded(name) for name in NAMES}
            self.base_is_original = False
        eject(self.model, merge=fold)
        self.injected = False
        self.adapter = {}
        assert set(self.model.state_dict()) == set(Net().state_dict())
        assert all(type(self.model.get_submodule(name)) is nn.Linear for name in NAMES)

    @precondition(lambda self: self.injected and not self.off)
    @rule()
    def switch_off(self) -> None:
        self.stack.enter_context(disabled(self.model))
        self.off += 1

    @precondition(lambda self: self.off)
    @rule(fail=st.booleans())
    def switch_on(self, fail: bool) -> None:
        try:
            with self.stack:
                if fail:
                    raise KeyError
        except KeyError:
            pass
        self.stack = ExitStack()
        self.off = 0

    @precondition(lambda self: self.injected and not self.off)
    @rule()
    def merged_for_a_while(self) -> None:
        with merged(self.model):
            assert all(layer.merged for layer in self.layers())
            self.check_output(merged_now=True)

    @rule()
    def copy(self) -> None:
        if not self.off:  # an open context belongs to the model that it was opened on
            self.model = copy.deepcopy(self.model)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def move(self, dtype: torch.dtype) -> None:
        if self.off:
            return
        self.model.to(dtype)
        self.W = {name: weight.to(dtype) for name, weight in self.W.items()}
        self.base_is_original = False
        self.read_adapter()

    @precondition(lambda self: self.injected)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.model, folder, base="net")
            other = fresh_net().to(self.model.head.weight.dtype)
            with torch.no_grad():
                for name in NAMES:
                    other.get_submodule(name).weight.copy_(self.W[name])
                if other.block["query"].bias is not None:
                    other.block["query"].bias.copy_(self.model.block["query"].bias)
            load_adapter(other, folder)
        if not self.off:
            self.model = other.eval()
            self.merged = False
            self.read_adapter()

    @precondition(lambda self: self.injected)
    @rule()
    def state_dict_round_trip(self) -> None:
        state = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        for name in NAMES:
            assert torch.equal(state[f"{name}.weight"], self.W[name])
        if self.merged and not self.off:
            with pytest.raises(RuntimeError, match="merged layer"):
                self.model.load_state_dict(state)
        else:
            self.model.load_state_dict(state)

    # --- what must hold, always -------------------------------------------------------------------

    @invariant()
    def weights_are_the_references(self) -> None:
        for name in NAMES:
            layer = self.model.get_submodule(name)
            folded = self.injected and self.merged and not self.off
            wanted = self.folded(name) if folded else self.W[name]
            assert torch.equal(layer.weight, wanted)
            if isinstance(layer, LoRALinear):
                assert layer.merged == folded
                assert torch.equal(layer.base_weight, self.W[name])
                for key, tensor in self.adapter[name].items():
                    assert torch.equal(getattr(layer, key), tensor)

    @invariant()
    def outputs_are_the_references(self) -> None:
        self.check_output(merged_now=self.injected and self.merged and not self.off)

    def check_output(self, merged_now: bool) -> None:
        head = self.model.head
        x = X.to(head.weight.dtype)
        with torch.no_grad():
            got = self.model(x)
            exact = {}
            for name in NAMES:
                weight = self.folded(name).double() if merged_now else self.W[name].double()
                if self.injected and not self.off and not merged_now:
                    weight = self.adapted(name)
                exact[name] = x.double() @ weight.T
            hidden = (
                torch.tanh(exact["block.query"] + self.model.block["query"].bias.double())
                + exact["block.value"]
            )
            wanted = hidden @ head.weight.double().T + head.bias.double()
        # Some thirty roundings of values that stay below about 10 (steps are clamped)
        unit = torch.finfo(head.weight.dtype).eps
        assert (got.double() - wanted).abs().max() <= 32 * unit * (10 + wanted.abs().max())

    # --- the reference ----------------------------------------------------------------------------

    def layers(self) -> list[LoRALinear]:
        return [self.model.get_submodule(name) for name in NAMES]

    def read_adapter(self) -> None:
        if self.injected:
            self.adapter = {
                name: {key: getattr(layer, key).detach().clone() for key in layer.adapter_tensors}
                for name, layer in zip(NAMES, self.layers(), strict=True)
            }

    def adapted(self, name: str) -> torch.Tensor:
        """The weight with the adapter, float64."""
        tensors = {key: tensor.double() for key, tensor in self.adapter[name].items()}
        return self.formula(self.W[name].double(), **tensors)

    def formula(self, W, lora_A, lora_B) -> torch.Tensor:
        return W + 1.5 * (lora_B @ lora_A)

    def folded(self, name: str) -> torch.Tensor:
        return self.adapted(name).to(self.W[name].dtype)


class DoRAMachine(AdapterMachine):
    config = dataclasses.replace(CONFIG, use_dora=True)

    def adapted(self, name: str) -> torch.Tensor:
        """Where m is the norm as the layer computes it, g is 1 exactly, in the merged weight too."""
        layer, tensors = self.model.get_submodule(name), self.adapter[name]
        weight = self.W[name].double() + 1.5 * (tensors["lora_B"].double() @ tensors["lora_A"].double())
        m = tensors["lora_magnitude_vector"]
        exact = m.double() / weight.norm(dim=1)
        g = torch.where(m == layer.row_norms(), 1, exact)
        assert (g.isclose(exact, rtol=8 * torch.finfo(m.dtype).eps) | (g != 1)).all()
        return g[:, None] * weight


class PiSSAMachine(AdapterMachine):
    config = dataclasses.replace(CONFIG, init_lora_weights="pissa")

    def formula(self, W, lora_A, lora_B, start_A, start_B) -> torch.Tensor:
        return W + 1.5 * ((lora_B - start_B) @ lora_A + start_B @ (lora_A - start_A))


class VeRAMachine(AdapterMachine):
    config = dataclasses.replace(CONFIG, peft_type="VERA")

    def formula(self, W, vera_lambda_b, vera_lambda_d) -> torch.Tensor:
        pair = self.model.block["query"].projection
        A, B = pair.vera_A.double(), pair.vera_B.double()
        return W + vera_lambda_b[:, None] * (B @ (vera_lambda_d[:, None] * A))


EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "100"))
# The variants share the guards with LoRA, and only the formulas are their own.
MACHINES = {AdapterMachine: 100, DoRAMachine: 12, PiSSAMachine: 12, VeRAMachine: 12}
for machine, percent in MACHINES.items():
    machine.TestCase.settings = settings(
        max_examples=EXAMPLES * percent // 100,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
TestAdapterMachine = AdapterMachine.TestCase
TestDoRAMachine = DoRAMachine.TestCase
TestPiSSAMachine = PiSSAMachine.TestCase
TestVeRAMachine = VeRAMachine.TestCase
