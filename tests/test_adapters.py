"""Many adapters on one base: rows of a mixed batch, switching, errors, sums; and a state machine.

The reference is always the same thing done with one adapter alone.
"""

import copy
import dataclasses
import os
import random

import pytest
import torch
from conftest import copy_bytes, tiny_roberta
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_any_model import gpt2
from test_machine import fresh_net
from torch import nn

from lora import (
    AdapterError,
    Adapters,
    LoraConfig,
    combine,
    count_parameters,
    disabled,
    eject,
    inject,
    load_adapter,
    merge,
    merged,
    save_adapter,
    unmerge,
)
from lora.adapted import lora_layers
from lora.fast import fuse
from lora.files import CONFIG_FILE, TENSOR_FILE
from model import speed_up
from train.hardware import autocast

HEAD = ("classifier",)
CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=8, modules_to_save=HEAD),
    "wide": LoraConfig(r=2, target_modules=("query", "key", "dense"), modules_to_save=HEAD),
    "dora": LoraConfig(r=8, use_dora=True, modules_to_save=HEAD),
    "vera": LoraConfig(r=16, peft_type="VERA", modules_to_save=HEAD),
    "pissa": LoraConfig(r=3, target_modules=("value", "output.dense"), init_lora_weights="pissa"),
}
CPU = torch.device("cpu")


def randomise(layers, seed):
    """Sets every trained tensor to random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(layers):
            for key, tensor in layers[name].adapter_state().items():
                if key in layers[name].trained_tensors:
                    tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))


def five_classes():
    return copy.deepcopy(tiny_roberta(num_labels=5, seed=3).classifier).eval()


def five_adapters(model):
    adapters = Adapters(model)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        adapters.add(name, config, seed, {"classifier": five_classes()} if name == "wide" else None)
        randomise(adapters[name].layers, seed)
    return adapters


@torch.no_grad()
def logits(model, batch, precision="fp32"):
    with autocast(CPU, precision):
        return model(**batch).logits


@pytest.fixture
def batch(input_ids):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 14, (8, 1), generator=generator)
    return {
        "input_ids": torch.randint(3, 300, (8, 13), generator=generator),
        "attention_mask": (torch.arange(13) < lengths).long(),
    }


@pytest.fixture
def adapters(model):
    return five_adapters(model)


def base_bytes(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


# --- mixed batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_row_equals_the_batch_computed_with_its_adapter_alone(tmp_path, batch, precision, fast):
    """The references are separate models, each with one adapter from a folder."""
    model = tiny_roberta()
    before = base_bytes(model)
    adapters = five_adapters(model)
    alone = {}
    for name in (None, *CONFIGS):
        single = tiny_roberta()
        if name is not None:
            adapters.save(name, tmp_path / name, base="tiny")
            single.classifier = five_classes() if name == "wide" else single.classifier
            load_adapter(single, tmp_path / name)
        for each in (single, model):
            if fast:
                speed_up(each, precision)
        alone[name] = logits(single.eval(), batch, precision)
    draw = random.Random(0)
    for _ in range(int(os.environ.get("ROWS", "40"))):
        names = [draw.choice((None, *CONFIGS)) for _ in range(8)]
        with adapters.rows(names):
            mixed = logits(model, batch, precision)
        for row, name in enumerate(names):
            classes = alone[name].shape[1]
            assert torch.equal(mixed[row, :classes], alone[name][row]), (names, row)
            assert (mixed[row, classes:] == -torch.inf).all()
    assert same(before, base_bytes(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@torch.no_grad()
def test_rows_are_exact_with_any_scaling_and_layout_in_16_bits(dtype, transposed):
    """1/√7 and 3/7 are not numbers of 16 bits; x of another layout is what attention's outputs have."""
    model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    adapters = Adapters(model)
    configs = {"a": LoraConfig(r=7, use_rslora=True), "b": LoraConfig(r=7, lora_alpha=3)}
    for name, config in configs.items():
        adapters.add(name, dataclasses.replace(config, target_modules=("0",)), seed=len(name))
    for name in configs:
        randomise(adapters[name].layers, 1)
        adapters[name].layers["0"].to(dtype)
    fuse(model.eval())
    x = torch.randn(16, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.transpose(0, 1) if transposed else x.transpose(0, 1).contiguous()
    names = ["a", "b", "a", None]
    with adapters.rows(names):
        mixed = model(x)
    for row, name in enumerate(names):
        adapters.use(name)
        assert torch.equal(mixed[row], model(x)[row]), row


@pytest.mark.parametrize("fast", [False, True])
def test_the_fast_mode_equals_the_exact_one_to_rounding(model, adapters, batch, fast):
    if fast:
        speed_up(model, "fp32")
    names = ["plain", None, "vera", "pissa", "plain", "dora", "wide", "pissa"]
    with adapters.rows(names):
        exact = logits(model, batch)
    with adapters.rows(names, exact=False):
        quick = logits(model, batch)
    finite = exact.isfinite()
    assert torch.equal(finite, quick.isfinite())
    # Two layers of float32 products of up to 64 numbers: some ulps of the largest logit
    assert (exact - quick)[finite].abs().max() < 1e-5 * exact[finite].abs().max()
    with adapters.rows(["plain"] * 8, exact=False):
        assert torch.equal(logits(model, batch)[0], exact[0, :3])  # one adapter for all rows is not mixed


def test_a_row_of_a_mixed_batch_depends_on_no_other_row(model, adapters, batch):
    with adapters.rows(["dora", "plain", None, "vera", "wide", "pissa", "plain", None]):
        first = logits(model, batch)
    others = {key: value.clone() for key, value in batch.items()}
    others["input_ids"][1:] = 7
    with adapters.rows(["dora", *[None] * 6, "wide"]):
        assert torch.equal(logits(model, others)[0], first[0])


def test_a_conv1d_and_a_shared_module_can_be_mixed():
    model = gpt2()
    model.transformer.h[1].mlp.c_fc = model.transformer.h[0].mlp.c_fc
    adapters = Adapters(model)
    tokens = {"input_ids": torch.arange(40).view(4, 10)}
    alone = {None: logits(model, tokens)}
    for seed, name in enumerate("ab"):
        adapters.add(name, LoraConfig(r=2 + seed, target_modules=("c_attn", "c_fc")), seed)
        randomise(adapters[name].layers, seed)
        adapters.use(name)
        alone[name] = logits(model, tokens)
    names = ["b", "a", None, "b"]
    with adapters.rows(names):
        mixed = logits(model, tokens)
    assert all(torch.equal(mixed[row], alone[name][row]) for row, name in enumerate(names))
    assert not torch.equal(alone["a"], alone["b"])


def test_hooks_of_a_layer_run_once_in_a_mixed_batch(model, adapters, batch):
    seen = []
    layer = model.roberta.encoder.layer[0].attention.self.query
    layer.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    with adapters.rows(["plain", "dora", *[None] * 6]):
        logits(model, batch)
    assert seen == ["MixedModule"]


# --- switching ------------------------------------------------------------------------------------


def test_the_active_adapter_is_what_inject_makes_of_the_model(model, batch, tmp_path):
    adapters = five_adapters(model)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        single = tiny_roberta()
        single.classifier = five_classes() if name == "wide" else single.classifier
        inject(single, config, seed)
        randomise(lora_layers(single), seed)
        adapters.use(name)
        assert (adapters.active, model.lora_config) == (name, config)
        assert same(base_bytes(model), base_bytes(single))
        assert torch.equal(logits(model, batch), logits(single, batch))
        assert str(count_parameters(model)) == str(count_parameters(single))
        adapters.save(name, tmp_path / "named", base="tiny")
        save_adapter(single, tmp_path / "alone", base="tiny")
        for file in (CONFIG_FILE, TENSOR_FILE):
            assert (tmp_path / "named" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    adapters.use(None)
    assert not hasattr(model, "lora_config")
    assert torch.equal(logits(model, batch), logits(tiny_roberta(), batch))


def trained_steps(model, batch, fast):
    """Five steps of AdamW with dropout, from one state of the random generator."""
    if fast:
        speed_up(model, "bf16")
    torch.manual_seed(7)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        with autocast(CPU, "bf16"):
            loss = model(**batch, labels=torch.arange(8) % 3).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("fast", [False, True])
def test_training_one_of_six_is_training_it_alone_and_leaves_the_others(model, batch, tmp_path, fast):
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, modules_to_save=HEAD)
    single = tiny_roberta()
    inject(single, config, seed=9)
    trained_steps(single, batch, fast)
    save_adapter(single, tmp_path / "alone", base="tiny")

    before = base_bytes(model)
    adapters = five_adapters(model)
    adapters.add("new", config, seed=9)
    adapters.use("new")
    others = {name: copy.deepcopy([*adapters[name].layers.values()]) for name in CONFIGS}
    trained_steps(model, batch, fast)
    adapters.save("new", tmp_path / "named", base="tiny")
    assert (tmp_path / "named" / TENSOR_FILE).read_bytes() == (tmp_path / "alone" / TENSOR_FILE).read_bytes()
    for name, layers in others.items():
        for layer, old in zip(adapters[name].layers.values(), layers, strict=True):
            assert same(layer.adapter_state(), old.adapter_state())
    adapters.use(None)
    assert same(before, base_bytes(model))


def test_modes_speed_ups_and_dtypes_reach_an_adapter_that_was_not_active(model, adapters, batch):
    adapters.use("plain")
    speed_up(model, "bf16")
    model.train()
    adapters.use("dora")
    assert all(module.training for module in model.modules())
    assert type(next(iter(adapters["dora"].layers.values()))).__name__ == "FastDoRALinear"
    model.eval()
    adapters.use(None)
    assert not any(module.training for module in model.modules())
    logits(model, batch, "bf16")
    copies = copy_bytes(model)
    for name in CONFIGS:  # each has the base's copies of frozen weights, not copies of its own
        adapters.use(name)
        logits(model, batch, "bf16")
    adapters.use("plain")
    shared = {
        (copied.data_ptr(), copied.nbytes)
        for name in CONFIGS
        for layer in adapters[name].layers.values()
        for copied in layer.copies
    }
    assert 0 < sum(size for _, size in shared) <= copies
    model.bfloat16()
    for name in CONFIGS:  # of which "wide" has a head of its own
        adapters.use(name)
        assert logits(model, batch).dtype == torch.bfloat16


def test_hooks_that_guard_an_adapter_are_there_while_it_is_and_do_not_pile_up(model, adapters):
    def count():
        return sum(len(m._load_state_dict_pre_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    bare = count()
    adapters.use("plain")
    guarded = count()
    assert guarded > bare == 0
    for _ in range(3):
        adapters.add("more", CONFIGS["plain"])
        adapters.use("more")
        assert count() == guarded
        adapters.remove("more")
        assert count() == bare
    adapters.use("plain")
    merge(model)
    with pytest.raises(RuntimeError, match="load_state_dict into a merged layer"):
        model.load_state_dict(tiny_roberta().state_dict(), strict=False)


# --- files ----------------------------------------------------------------------------------------


def test_folders_with_heads_of_other_sizes_load_beside_each_other(tmp_path, batch):
    source = five_adapters(tiny_roberta())
    outputs = {}
    for name in CONFIGS:
        source.save(name, tmp_path / name, base="tiny", metadata={"n": name})
        source.use(name)
        outputs[name] = logits(source.model, batch)
    model = tiny_roberta()
    adapters = Adapters(model)
    for name in CONFIGS:
        assert adapters.load(name, tmp_path / name).metadata == {"n": name}
    for name, expected in outputs.items():
        adapters.use(name)
        assert torch.equal(logits(model, batch), expected)
    assert adapters.names == tuple(CONFIGS)
    assert repr(adapters).splitlines()[-1] == "* pissa: r=3, 6 layers"


def test_a_folder_with_a_head_loads_beside_an_active_adapter_of_that_head(tmp_path, batch):
    source = Adapters(tiny_roberta())
    source.add("plain", CONFIGS["plain"], seed=3)
    source.save("plain", tmp_path, base="tiny")
    adapters = Adapters(tiny_roberta())
    adapters.add("inside", LoraConfig(r=2, target_modules=("classifier.dense",)))
    adapters.use("inside")
    adapters.load("plain", tmp_path)
    for model in (source, adapters):
        model.use("plain")
    assert torch.equal(logits(adapters.model, batch), logits(source.model, batch))


def test_an_adapter_of_another_base_is_refused(tmp_path, adapters):
    other = tiny_roberta(seed=5)
    inject(other, CONFIGS["plain"])
    save_adapter(other, tmp_path, base="other")
    with pytest.raises(AdapterError, match="trained on 'other' with other weights than this model's"):
        adapters.load("other", tmp_path)


# --- errors ---------------------------------------------------------------------------------------

ERRORS = [
    (lambda a: a.use("nobody"), ValueError, "no adapter is called 'nobody'; there are plain, wide, dora"),
    (lambda a: a.remove("nobody"), ValueError, "no adapter is called 'nobody'"),
    (lambda a: a.save("nobody", "x", base="tiny"), ValueError, "no adapter is called 'nobody'"),
    (lambda a: a.rows(["plain", "nobody"]).__enter__(), ValueError, "no adapter is called 'nobody'"),
    (lambda a: a.rows([]).__enter__(), ValueError, "give one for each row"),
    (lambda a: a.add("dora", CONFIGS["plain"]), ValueError, "called 'dora' already; remove it first"),
    (lambda a: a.add("", CONFIGS["plain"]), ValueError, "not a non-empty string"),
    (lambda a: a.add("new", LoraConfig(target_modules=("nix",))), ValueError, "'nix' matches no module"),
    (lambda a: a.add("new", LoraConfig(r=99)), ValueError, "r: 99 is more than 32"),
    (
        lambda a: a.add("new", CONFIGS["plain"], modules={"pooler": nn.Linear(2, 2)}),
        ValueError,
        "pooler is not in modules_to_save, which has classifier",
    ),
    (lambda a: a.load("new", "no/such/folder"), FileNotFoundError, "there is no adapter_model"),
    (lambda a: Adapters(a.model), RuntimeError, "has an adapter already; eject it first"),
    (lambda a: combine(a, "new", {}), ValueError, "weights: empty"),
    (lambda a: combine(a, "new", {"plain": float("nan")}), ValueError, "'plain' is nan, which is not finite"),
    (lambda a: combine(a, "new", {"plain": 1.0}, rank=0), ValueError, "rank: 0 is not at least 1"),
    (lambda a: combine(a, "dora", {"plain": 1.0}), ValueError, "called 'dora' already"),
    (lambda a: combine(a, "new", {"plain": 1, "dora": 1}), RuntimeError, "'dora' cannot be added up"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS, ids=[error[2][:30] for error in ERRORS])
def test_an_error_names_the_problem_and_changes_nothing(model, adapters, batch, wrong, kind, message):
    adapters.use("wide")
    before, expected, modules = base_bytes(model), logits(model, batch), [*model.modules()]
    with pytest.raises(kind, match=message):
        wrong(adapters)
    assert (adapters.names, adapters.active) == (tuple(CONFIGS), "wide")
    assert [*model.modules()] == modules
    assert same(before, base_bytes(model))
    assert torch.equal(logits(model, batch), expected)


OPERATIONS = {
    "use": lambda a: a.use("dora"),
    "base": lambda a: a.use(None),
    "add": lambda a: a.add("new", CONFIGS["plain"]),
    "remove": lambda a: a.remove("dora"),
    "rows": lambda a: a.rows(["plain"] * 8).__enter__(),
    "combine": lambda a: combine(a, "new", {"plain": 1.0}),
}


@pytest.mark.parametrize("wrong", OPERATIONS.values(), ids=OPERATIONS)
def test_nothing_switches_while_merged_disabled_mixed_or_changed_by_others(model, adapters, batch, wrong):
    adapters.use("plain")
    before = base_bytes(model)
    with merged(model), pytest.raises(RuntimeError, match="'plain' is merged; unmerge first"):
        wrong(adapters)
    with disabled(model), pytest.raises(RuntimeError, match="'plain' is disabled; leave the context first"):
        wrong(adapters)
    with adapters.rows(["plain", "dora"] * 4), pytest.raises(RuntimeError, match=r"inside rows\(\)"):
        wrong(adapters)
    assert (adapters.active, adapters.names) == ("plain", tuple(CONFIGS))
    assert same(before, base_bytes(model))
    eject(model)
    with pytest.raises(RuntimeError, match="changed by others, such as eject"):
        wrong(adapters)


def test_a_mixed_batch_is_for_inference_and_has_as_many_rows_as_names(model, adapters, batch):
    model.train()
    with pytest.raises(RuntimeError, match=r"in training mode; call eval\(\) first"):
        adapters.rows(["plain"] * 8).__enter__()
    model.eval()
    with adapters.rows(["plain", "dora"] * 4):
        with pytest.raises(RuntimeError, match=r"in training mode; call eval\(\) first"):
            model.train()(**batch)
        model.eval()
        with pytest.raises(ValueError, match="was given 8 names, and this batch has 3 rows"):
            model(batch["input_ids"][:3])
        with pytest.raises(RuntimeError, match="the model has no adapter"):
            merge(model)
    assert adapters.active is None


# --- sums -----------------------------------------------------------------------------------------


def deltas(adapters, weights):
    found = {}
    for name, weight in weights.items():
        for key, layer in adapters[name].layers.items():
            found[key] = found.get(key, 0) + weight * layer.delta_weight()
    return found


def test_a_sum_is_plain_lora_within_one_rounding_of_each_factor(model, adapters, tmp_path):
    weights = {"plain": 0.7, "pissa": -1.3, "wide": 0.1}
    assert set(combine(adapters, "sum", weights).values()) == {0.0}
    expected = deltas(adapters, weights)
    layers = adapters["sum"].layers
    assert layers.keys() == expected.keys()
    for key, layer in layers.items():
        bound = torch.zeros_like(expected[key])
        for name, weight in weights.items():
            if key in adapters[name].layers:
                each = adapters[name].layers[key]
                tensors = [tensor.detach().double().abs() for tensor in each.adapter_state().values()]
                for A, B in zip(tensors[::2], tensors[1::2], strict=True):  # of PiSSA, also A₀ and B₀
                    bound += abs(weight) * each.scaling * (B @ A)
        # The bound of `combine`, and the float64 roundings of this test's own sums
        assert ((layer.delta_weight() - expected[key]).abs() <= bound * (2**-24 + 2**-46)).all()
    ranks = {key: layer.r for key, layer in layers.items()}
    assert ranks["roberta.encoder.layer.0.attention.self.query"] == 4 + 2
    assert ranks["roberta.encoder.layer.0.attention.self.value"] == 4 + 2 * 3
    head = adapters["sum"].saved["classifier"]
    assert same(head.state_dict(), adapters["plain"].saved["classifier"].state_dict())
    adapters.save("sum", tmp_path, base="tiny")
    single = tiny_roberta()
    load_adapter(single, tmp_path)
    for key, layer in lora_layers(single).items():
        assert type(layer).__name__ == "LoRALinear"
        assert torch.equal(layer.delta_weight(), layers[key].delta_weight())


def test_a_cut_sum_is_the_best_of_its_rank_and_states_what_it_loses(adapters):
    weights = {"plain": 1.0, "pissa": 0.5}
    lost = combine(adapters, "cut", weights, rank=2)
    for key, M in deltas(adapters, weights).items():
        S = torch.linalg.svdvals(M)
        found = (adapters["cut"].layers[key].delta_weight() - M).norm()
        assert adapters["cut"].layers[key].r == 2
        # The factors are rounded to float32; what is lost is computed before that.
        assert float(found / M.norm()) == pytest.approx(lost[key], rel=1e-5)
        assert lost[key] == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-12)


def test_a_layer_of_a_head_that_another_adapter_replaces_is_not_added_up(adapters):
    adapters.add("inner", LoraConfig(target_modules=("classifier.dense",)))
    with pytest.raises(
        ValueError, match="classifier.dense is adapted, and classifier is replaced by that of"
    ):
        combine(adapters, "new", {"plain": 1, "inner": 1})


def test_the_opposite_of_an_adapter_undoes_it(model, adapters, batch):
    combine(adapters, "opposite", {"plain": -1.0})
    combine(adapters, "nothing", {"plain": 1.0, "opposite": 1.0})
    adapters.use("nothing")
    with disabled(model):
        base = logits(model, batch)
    # ΔW is a sum of float32 products that cancel, not an exact zero
    assert (logits(model, batch) - base).abs().max() < 1e-5 * base.abs().max()
    adapters.use("opposite")
    assert (logits(model, batch) - base).abs().max() > 1e-2 * base.abs().max()


# --- random programs ------------------------------------------------------------------------------

NAMES = st.sampled_from("abc")
KINDS = (
    LoraConfig(r=2, lora_alpha=3, modules_to_save=("head",)),
    LoraConfig(r=1, target_modules=("query", "head")),
    LoraConfig(r=2, target_modules=("value",), use_dora=True, modules_to_save=("head",)),
    LoraConfig(r=3, peft_type="VERA"),
)
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class AdaptersMachine(RuleBasedStateMachine):
    """Random programs on `Adapters`. Beside each adapter stands a model of its own with the same history."""

    def __init__(self):
        super().__init__()
        self.model = fresh_net()
        self.adapters = Adapters(self.model)
        self.single = {}  # by name, a model with this adapter alone
        self.active = None
        self.merged = False

    @rule(name=NAMES, kind=st.integers(0, len(KINDS) - 1), seed=st.integers(0, 9))
    def add(self, name, kind, seed):
        if self.refused(name in self.single, lambda: self.adapters.add(name, KINDS[kind], seed)):
            return
        self.single[name] = fresh_net()
        inject(self.single[name], KINDS[kind], seed)
        for layers in (self.adapters[name].layers, lora_layers(self.single[name])):
            randomise(layers, seed)

    @rule(name=st.one_of(NAMES, st.none()))
    def use(self, name):
        unknown = name is not None and name not in self.single
        if not self.refused(unknown, lambda: self.adapters.use(name)):
            self.active = name

    @rule(name=NAMES)
    def remove(self, name):
        if not self.refused(name not in self.single, lambda: self.adapters.remove(name)):
            del self.single[name]
            self.active = None if self.active == name else self.active

    @rule(name=NAMES, other=NAMES, weight=st.sampled_from([-1.0, 0.5]))
    def combine(self, name, other, weight):
        impossible = other not in self.single or name in self.single
        impossible = impossible or not all(map(plain, self.adapters[other].layers.values()))
        if not self.refused(impossible, lambda: combine(self.adapters, name, {other: weight})):
            self.adapters.remove(name)

    @precondition(lambda self: self.active is not None)
    @rule()
    def merge_or_unmerge(self):
        for model in (self.model, self.single[self.active]):
            (unmerge if self.merged else merge)(model)
        self.merged = not self.merged

    @precondition(lambda self: self.active is not None and not self.merged)
    @rule()
    def train_step(self):
        for model in (self.model, self.single[self.active]):
            model.train()
            trained = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(model(X).square().sum(), trained)
            with torch.no_grad():
                for p, grad in zip(trained, gradients, strict=True):
                    p.sub_(0.05 * grad.clamp(-1, 1))
            model.eval()

    @rule(names=st.lists(st.one_of(NAMES, st.none()), min_size=4, max_size=4))
    def mix(self, names):
        unknown = any(name is not None and name not in self.single for name in names)

        def run():
            with self.adapters.rows(names), torch.no_grad():
                mixed = self.model(X)
            for row, name in enumerate(names):
                assert torch.equal(mixed[row], self.output(name)[row])

        self.refused(unknown, run)

    @invariant()
    def everything_is_as_if_each_adapter_were_alone(self):
        assert self.adapters.names == tuple(self.single)
        assert self.adapters.active == self.active
        with torch.no_grad():
            assert torch.equal(self.model(X), self.output(self.active))
        for name, single in self.single.items():
            for key, layer in lora_layers(single).items():
                assert same(layer.adapter_state(), self.adapters[name].layers[key].adapter_state())
        if not self.merged:
            now = self.model.block["query"].weight, self.model.block["value"].weight
            assert all(
                torch.equal(w, layer.weight) for w, layer in zip(now, fresh_net().block.values(), strict=True)
            )

    def refused(self, wrong, operation):
        """Whether the operation must fail. If so, runs it, and it must raise; otherwise runs it."""
        if wrong or self.merged:
            with pytest.raises((ValueError, RuntimeError)):
                operation()
            return True
        operation()
        return False

    @torch.no_grad()
    def output(self, name):
        return (fresh_net() if name is None else self.single[name])(X)


def plain(layer):
    return type(layer).__name__ == "LoRALinear"


TestAdaptersMachine = AdaptersMachine.TestCase
TestAdaptersMachine.settings = settings(
    max_examples=int(os.environ.get("MACHINE_EXAMPLES", "40")),
    stateful_step_count=25,
    deadline=None,  # a shared machine stalls now and then
    suppress_health_check=list(HealthCheck),
)
