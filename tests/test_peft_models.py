"""Adapters of other architectures go through PEFT and back, and transformers' Trainer resumes one."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import randomise_adapter, tiny_roberta

from lora import LoraConfig, check, eject, inject, load_adapter, merged, save_adapter

peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
SEQ2SEQ = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4,
    "dropout_rate": 0.0,
}  # fmt: skip
SMALL = {**SIZES, "embedding_size": 16}
# Class, configuration, targets. The dropout of T5 and others is a number in their config, not a module.
MODELS = {
    "bert": (transformers.BertForSequenceClassification, SIZES, ("query", "value")),
    "roberta": (transformers.RobertaForSequenceClassification, SIZES, "all-linear"),
    "albert": (
        transformers.AlbertForSequenceClassification,
        {**SIZES, "embedding_size": 16},
        ("query", "value"),
    ),
    "electra": (transformers.ElectraForSequenceClassification, SMALL, "all-linear"),
    "deberta-v2": (transformers.DebertaV2ForSequenceClassification, SIZES, "all-linear"),
    "gpt2": (transformers.GPT2LMHeadModel, GPT, ("c_attn", "c_proj", "c_fc")),
    "gptj": (transformers.GPTJForCausalLM, {**GPT, "rotary_dim": 4}, "all-linear"),
    "gpt-neox": (transformers.GPTNeoXForCausalLM, SIZES, "all-linear"),
    "llama": (transformers.LlamaForCausalLM, GROUPED, "all-linear"),
    "mistral": (transformers.MistralForCausalLM, GROUPED, "all-linear"),
    "qwen2": (transformers.Qwen2ForCausalLM, GROUPED, ("q_proj", "v_proj")),
    "gemma": (transformers.GemmaForCausalLM, {**GROUPED, "head_dim": 8}, "all-linear"),
    "opt": (
        transformers.OPTForCausalLM,
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        "all-linear",
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        },
        "all-linear",
    ),
    "bart": (transformers.BartForConditionalGeneration, {**SEQ2SEQ, "dropout": 0.0}, "all-linear"),
    "xlnet": (
        transformers.XLNetForSequenceClassification,
        {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "all-linear",
    ),
    "vit": (
        transformers.ViTForImageClassification,
        {**SIZES, "image_size": 32, "patch_size": 16},
        "all-linear",
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_adapter_travels_to_peft_and_back(name, tmp_path):
    kind, sizes, targets = MODELS[name]
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(3, 99, (2, 12))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if name == "vit" else {"input_ids": ids}
    if name in ("t5", "bart"):
        inputs["decoder_input_ids"] = ids[:, :5]
    base = model(**inputs).logits
    head = [key for key in ("classifier", "logits_proj") if hasattr(model, key)]
    inject(model, LoraConfig(r=4, target_modules=targets, modules_to_save=head))
    assert torch.equal(model(**inputs).logits, base)
    randomise_adapter(model)
    ours = model(**inputs).logits

    def close(logits):
        """To 5e-6 of the largest logit: float32, the same products in another order."""
        return float((logits - ours).abs().max()) <= 5e-6 * float(ours.abs().max())

    assert not close(base)
    assert close(model.train()(**inputs).logits)
    with merged(model.eval()):
        assert close(model(**inputs).logits)
    assert check(model, inputs)
    save_adapter(model, tmp_path / "ours", base="tiny")
    eject(model)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert close(theirs(**inputs).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    assert torch.equal(model(**inputs).logits, ours)


def test_the_documented_trainer_saves_and_resumes_the_adapter_alone(tmp_path, input_ids):
    page = (Path(__file__).parent.parent / "train" / "README.md").read_text()
    source = re.search(r"```python\n(from transformers import Trainer\n.*?)```", page, re.DOTALL)[1]
    names: dict = {}
    exec(source, names)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(input_ids, (0, 1, 2), strict=True)] * 4

    def train(folder, resume=None):
        model = tiny_roberta(initializer_range=0.05)
        inject(model, LoraConfig(r=4, modules_to_save=("classifier",)))
        arguments = transformers.TrainingArguments(
            folder, max_steps=4, save_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, seed=0,
            use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        names["AdapterTrainer"](model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        save_adapter(model, folder / "final", base="tiny")
        return (folder / "final" / "adapter_model.safetensors").read_bytes()

    whole = train(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert train(tmp_path / "resumed", resume=str(checkpoint)) == whole
