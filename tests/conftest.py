"""What several tests share: a tiny RoBERTa, a hub-layout folder with a tokenizer, a few rows of news."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub; the stub hub's test runs in its own process

from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification
from transformers.utils import logging

from lora import LoraConfig
from lora.fast import FastLinear
from train.config import Recipe

logging.disable_progress_bar()

NEWS = {
    "sport": ["the striker scored twice", "a late goal won the cup", "the team lost the final match"],
    "money": ["shares fell as rates rose", "the bank cut its forecast", "profits grew in the quarter"],
    "tech": ["a new phone was launched", "the software update failed", "chips power the new computer"],
}


def copy_bytes(model: torch.nn.Module) -> int:
    """The memory of all copies of frozen weights that exist now, in bytes."""
    return sum(copy.nbytes for m in model.modules() if isinstance(m, FastLinear) for copy in m.copies)


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Runs draw no figures, which would take a fifth of the time of all tests, where none is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.job.draw_all", lambda *_: None)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem != "test_survival")


def tiny_roberta(
    num_labels: int = 3, seed: int = 0, vocab_size: int = 300, initializer_range: float = 0.3
) -> RobertaForSequenceClassification:
    """Two layers, 32 wide: small enough to train in milliseconds."""
    config = RobertaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=1,
        initializer_range=initializer_range,  # 0.3: random features that tell texts apart
        num_labels=num_labels,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RobertaForSequenceClassification(config).eval()


@pytest.fixture
def model() -> RobertaForSequenceClassification:
    return tiny_roberta()


@pytest.fixture
def config() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=("query", "value"), modules_to_save=("classifier",))


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.arange(3, 33).reshape(3, 10)


def randomise_adapter(model: torch.nn.Module, seed: int = 1) -> None:
    """Sets every lora_B to random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa in the hub's layout: random encoder weights, no head, and a small byte-level BPE."""
    return write_hub_folder(tmp_path_factory.mktemp("hub") / "tiny-roberta")


def write_hub_folder(folder: Path) -> Path:
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [text for texts in NEWS.values() for text in texts]
    bpe.train_from_iterator(texts, vocab_size=300, min_frequency=1, special_tokens=special)
    tiny_roberta(vocab_size=max(300, bpe.get_vocab_size())).roberta.save_pretrained(folder)
    bpe.save_model(str(folder))
    return folder


@pytest.fixture(scope="session")
def csv_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """News that can be learnt: three classes of 12 training and 3 test rows, header `text,label`."""
    return write_csv_folder(tmp_path_factory.mktemp("news"))


def write_csv_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for split, copies in (("train", 4), ("test", 1)):
        rows = [
            f"{text} {number},{label}"
            for number in range(copies)
            for label, texts in NEWS.items()
            for text in texts
        ]
        (folder / f"{split}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def ag_news_folder() -> Path:
    """The real AG News, where AG_NEWS_DIR says it is."""
    if not os.environ.get("AG_NEWS_DIR"):
        pytest.skip("AG_NEWS_DIR is not set")
    return Path(os.environ["AG_NEWS_DIR"])


class StopsAtOnce:
    """Stands for train.job.deferred_signals: Ctrl-C during the first step."""

    def __init__(self, *_: object):
        pass

    def __enter__(self) -> list[int]:
        return [2]

    def __exit__(self, *_: object) -> None:
        pass


def content(folder: Path) -> tuple[dict[str, bytes], dict[str, object]]:
    """What two runs that are the same run must share, bit for bit."""
    summary = json.loads((folder / "summary.json").read_text())
    timeless = {
        k: v for k, v in summary.items() if not k.endswith(("_seconds", "_per_second", "memory_bytes"))
    }
    files = [*sorted((folder / "adapter").iterdir()), folder / "metrics.jsonl", folder / "config.toml"]
    return {path.name: path.read_bytes() for path in files}, timeless


@pytest.fixture(scope="session")
def tiny_recipe(hub_folder, csv_folder):
    """Trains the tiny model on the few rows in seconds."""
    return Recipe(
        model=str(hub_folder), data=str(csv_folder), batch_size=4, learning_rate=1e-2, max_length_tokens=16,
        validation_fraction=0.25, precision="fp32", device="cpu",
    )  # fmt: skip
