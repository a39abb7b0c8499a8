"""The models that the checks use: small ones, and real ones by their shapes alone."""

from __future__ import annotations

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from lora import LoraConfig, inject
from model.minilm import minilm_config

HEAD = "classifier"
TARGETS = ("query", "value")


def tiny_roberta(seed: int = 0) -> RobertaForSequenceClassification:
    """A RobertaForSequenceClassification of two layers, 32 wide, 3 classes, in eval mode."""
    config = RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=34, type_vocab_size=1, pad_token_id=1, initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RobertaForSequenceClassification(config).eval()


def adapted_tiny_roberta(seed: int = 0) -> RobertaForSequenceClassification:
    """tiny_roberta with the library's adapter on query and value. `seed` draws A, B and the head."""
    model = tiny_roberta()
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=(HEAD,)), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B") or name.startswith(f"{HEAD}."):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def minilm_shapes() -> RobertaForSequenceClassification:
    """MiniLM without memory: its module tree and shapes alone."""
    with torch.device("meta"):
        return RobertaForSequenceClassification(minilm_config())


def roberta_base_shapes() -> RobertaForSequenceClassification:
    """roberta-base with the library's adapter, rank 8 on query and value: shapes alone, without memory."""
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=4)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
        inject(model, LoraConfig(r=8, target_modules=TARGETS, modules_to_save=(HEAD,)))
    return model
