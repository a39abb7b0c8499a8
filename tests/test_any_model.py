"""Adapters in models that are not this project's: what torch and transformers do around a Linear."""

import dataclasses
import pickle

import pytest
import torch
import torch.nn.utils.parametrizations
import transformers
from conftest import randomise_adapter, tiny_roberta
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from lora import (
    AdapterError,
    LoraConfig,
    LoRALinear,
    check,
    count_parameters,
    eject,
    inject,
    load_adapter,
    merge,
    merged,
    read_adapter,
    save_adapter,
    unmerge,
)
from lora.adapted import lora_layers
from lora.fingerprint import config_fields
from lora.targets import HOOKS, weights_read_by

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WAVLM = {
    **SIZES, "intermediate_size": 48, "conv_dim": (16,), "conv_kernel": (10,), "conv_stride": (5,),
    "num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_kernel_of_torchs_encoder_does_not_bypass_an_adapter(padded):
    """It reads linear1.weight in eval mode, and on padded batches packs the rows into a nested tensor."""
    model, x = encoder(), torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([5, 3, 4])[:, None] <= torch.arange(5) if padded else None
    with torch.no_grad():
        base = model(x, src_key_padding_mask=padding)
        inject(model, LoraConfig(target_modules=("linear1", "linear2")))
        randomise_adapter(model)
        out = model.eval()(x, src_key_padding_mask=padding)
        with merged(model):
            in_one = model(x, src_key_padding_mask=padding)
        model.train()
        slow = model(x, src_key_padding_mask=padding)
        kept = slice(None) if padding is None else ~padding
        # float32 roundings of values of order 1, against what the adapter adds
        for other in (out, in_one):
            assert (other - slow)[kept].abs().max() < 1e-5 < 1e-2 < (slow - base)[kept].abs().max()
        assert check(model, x)
        eject(model)
        assert not any(hook in HOOKS for m in model.modules() for hook in m._forward_pre_hooks.values())
        assert torch.equal(model.eval()(x, src_key_padding_mask=padding), base)


REFUSED = [
    (encoder, ("out_proj",), "out_proj, which is a NonDynamicallyQuantizableLinear"),
    (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))),
        ("0",),
        "0, which is a Parametrized",
    ),
    (
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4))),
        "all-linear",
        "0 is a Parametrized",
    ),
    (
        lambda: transformers.WavLMModel(transformers.WavLMConfig(**WAVLM)),
        ("q_proj",),
        "attention.q_proj, but WavLMAttention reads q_proj.weight without calling",
    ),
    (
        lambda: transformers.FalconModel(transformers.FalconConfig(**SIZES)),
        "all-linear",
        "query_key_value is a FalconLinear",
    ),
]


@pytest.mark.parametrize(("make", "targets", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_a_layer_that_is_not_called_as_a_linear_is_refused_by_name(make, targets, message):
    model = make()
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(TypeError, match=message):
        inject(model, LoraConfig(target_modules=targets))
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == before


class Reads(nn.Module):
    """Methods that read the weights of children, or only their properties."""

    def forward(self, x):
        dtype = self.kind.weight.dtype
        if isinstance(self.checked.weight, torch.Tensor) and self.none.weight is not None:
            x = x.to(dtype) if self.shape.weight.shape[0] else x
        return [nn.functional.linear(x, self.read.weight) for _ in range(2)]

    def helper(self, x):
        return x @ self.product.weight.T

    def _init_weights(self):
        nn.init.zeros_(self.initialised.weight)


def test_which_weights_a_class_reads_is_found_in_its_code():
    assert weights_read_by(Reads) == {"read", "product"}
    assert weights_read_by(transformers.models.roberta.modeling_roberta.RobertaSelfAttention) == set()


def test_all_linear_adapts_what_computes_a_linear_except_the_output(input_ids):
    model = tiny_roberta()
    config = LoraConfig(target_modules="all-linear", modules_to_save=("classifier",))
    inject(model, config)
    names = list(lora_layers(model))
    assert len(names) == 2 * 6
    assert not any("classifier" in name for name in names)
    assert model.lora_config.target_modules == tuple(names)
    model = tiny_roberta()
    inject(model, dataclasses.replace(config, target_modules=("all-linear",)))
    assert model.lora_config.target_modules == tuple(names)
    language_model = gpt2()
    inject(language_model, LoraConfig(target_modules="all-linear"))
    assert len(lora_layers(language_model)) == 2 * 4
    assert type(language_model.lm_head) is nn.Linear


def test_gpt2s_conv1d_is_adapted_merged_saved_and_given_back(input_ids, tmp_path):
    model = gpt2()
    base_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        base = model(input_ids).logits
        inject(model, LoraConfig(r=4, target_modules=("c_attn", "c_proj")))
        assert torch.equal(model(input_ids).logits, base)
        randomise_adapter(model)
        out = model(input_ids).logits
        assert check(model, input_ids)
        save_adapter(model, tmp_path, base="gpt2")
        merge(model)
        # float32 roundings of logits of order 1, against what the adapter adds
        assert (model(input_ids).logits - out).abs().max() < 1e-5 < 1e-2 < (out - base).abs().max()
        assert torch.equal(model.state_dict()["transformer.h.0.attn.c_attn.weight"],
                           base_state["transformer.h.0.attn.c_attn.weight"])  # fmt: skip
        unmerge(model)
        assert torch.equal(model(input_ids).logits, out)
        assert '"fan_in_fan_out": true' in (tmp_path / "adapter_config.json").read_text()
        other = pickle.loads(pickle.dumps(model))  # the class of its layers has no importable name
        assert torch.equal(other(input_ids).logits, out)
        assert not any("drop" in key for key in config_fields(model))  # training may choose it freely
        eject(model)
        assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all(torch.equal(tensor, base_state[name]) for name, tensor in model.state_dict().items())
        load_adapter(model, tmp_path)
        assert torch.equal(model(input_ids).logits, out)
        eject(other, merge=True)
        assert (other(input_ids).logits - out).abs().max() < 1e-5


def test_a_tied_weight_is_refused_when_merged_and_named(input_ids):
    model = gpt2()
    inject(model, LoraConfig(target_modules=("lm_head",)))
    for action in (merge, lambda model: eject(model, merge=True, dtype=torch.float32)):
        with pytest.raises(RuntimeError, match="wte.weight and lm_head.weight share"):
            action(model)


def test_a_tied_weight_is_trained_in_all_its_places_or_refused(input_ids, tmp_path):
    model = gpt2()
    with pytest.raises(
        ValueError, match="lm_head shares a parameter with transformer.wte.weight, which would"
    ):
        inject(model, LoraConfig(r=2, target_modules=("c_attn",), modules_to_save=("lm_head",)))
    inject(model, LoraConfig(r=2, target_modules=("c_attn",), modules_to_save=("lm_head", "wte")))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    save_adapter(model, tmp_path / "tied", base="gpt2")
    loaded = gpt2()
    load_adapter(loaded, tmp_path / "tied")
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight / 2)  # as PEFT trains it, which unties them
    save_adapter(model, tmp_path / "untied", base="gpt2")
    with pytest.raises(AdapterError, match="differ, and are one tensor in this model; untie them"):
        load_adapter(gpt2(), tmp_path / "untied")


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def compile_all(model):
    return torch.compile(model)


def compile_parts(model):
    model.classifier = torch.compile(model.classifier, backend="eager")
    model.roberta.encoder.layer[0] = torch.compile(model.roberta.encoder.layer[0], backend="eager")
    model.roberta.encoder.layer[1] = checkpoint_wrapper(model.roberta.encoder.layer[1])
    return model


def fully_shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.roberta.encoder.layer:
        shard(layer, mesh=mesh)
    return shard(model, mesh=mesh)


WRAPPERS = [compile_all, compile_parts, DistributedDataParallel, fully_shard]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_a_wrapped_models_adapter_has_the_names_of_the_unwrapped_one(
    wrap, config, input_ids, tmp_path, process_group
):
    model = tiny_roberta()
    inject(model, config)
    randomise_adapter(model)
    save_adapter(model, tmp_path / "plain", base="tiny")
    counts = count_parameters(model)
    with torch.no_grad():
        out = model(input_ids).logits
        wrapped = wrap(model)
        save_adapter(wrapped, tmp_path / "wrapped", base="tiny")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
        assert count_parameters(wrapped) == counts
        if wrap is fully_shard:
            with pytest.raises(RuntimeError, match="is sharded by FSDP"):
                merge(wrapped)
            with pytest.raises(TypeError, match="query, whose weight is sharded"):
                inject(wrap(tiny_roberta()), config)
            return
        merge(wrapped)
        assert all(layer.merged for layer in lora_layers(model).values())
        unmerge(wrapped)
        eject(wrapped)
        assert not any(isinstance(module, LoRALinear) for module in wrapped.modules())
        load_adapter(wrapped, tmp_path / "plain")
        assert torch.equal(model(input_ids).logits, out)
    if wrap is DistributedDataParallel:
        with pytest.raises(RuntimeError, match="wrap the model again"):
            wrapped.train()(input_ids)
    eject(wrapped)
    inject(wrapped, config)
    tensors = read_adapter(tmp_path / "plain").tensors
    assert {f"{name}.lora_A" for name in lora_layers(wrapped)} == {n for n in tensors if n.endswith("lora_A")}


def test_a_change_of_scaling_while_merged_is_noticed(model, config, input_ids):
    inject(model, config)
    merge(model)
    next(iter(lora_layers(model).values())).scaling *= 2
    with pytest.raises(RuntimeError, match="scaling or lora_A or lora_B changed while merged"):
        model(input_ids)


def test_a_name_that_peft_would_match_with_others_is_refused():
    """PEFT compares the ends of names as text, so its file would need pre_classifier too."""
    config = transformers.DistilBertConfig(vocab_size=99, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
    model = transformers.DistilBertForSequenceClassification(config)
    with pytest.raises(ValueError, match="'classifier' matches pre_classifier too"):
        inject(model, LoraConfig(target_modules=("q_lin",), modules_to_save=("classifier",)))
    inject(model, LoraConfig(target_modules=("q_lin",), modules_to_save=("classifier", "pre_classifier")))
