"""The checks of step 10."""

import importlib.util
import json
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch

from learn.checks.models import HEAD, TARGETS, adapted_tiny_roberta, tiny_roberta
from learn.oracle import CheckError, expect_value
from lora import AdapterError, load_adapter

KEYS = {
    "encoder.query.lora_A": "base_model.model.encoder.query.lora_A.weight",
    "encoder.query.lora_B": "base_model.model.encoder.query.lora_B.weight",
    "classifier.dense.weight": "base_model.model.classifier.dense.weight",
    "classifier.dense.bias": "base_model.model.classifier.dense.bias",
}


def check_keys(step: ModuleType) -> None:
    """peft_key puts "base_model.model." before every name, and ".weight" after lora_A and lora_B alone."""
    for name, wanted in KEYS.items():
        mistakes = {
            "The prefix is missing: PEFT wraps the model twice, and saves the names with both wrappers.": (
                wanted.removeprefix("base_model.model.")
            ),
            "In PEFT, lora_A is a module, so its tensor ends in .weight.": wanted.removesuffix(".weight"),
            'The adapter\'s name "default" is in PEFT\'s memory, but not in its files.': wanted.replace(
                ".weight", ".default.weight"
            ),
            "Only lora_A and lora_B get the suffix; the head's names end as they are.": f"{wanted}.weight",
        }  # fmt: skip
        expect_value(f"peft_key({name!r})", step.peft_key(name), wanted, mistakes)


def _save(step: ModuleType, folder: Path) -> Any:
    model = adapted_tiny_roberta(seed=1)
    state = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.endswith((".lora_A", ".lora_B")) or name.startswith(f"{HEAD}.")
    }
    step.save_peft(state, folder, base="tiny", r=4, lora_alpha=8, target_modules=TARGETS, head=HEAD)
    found = {path.name for path in folder.iterdir()}
    wanted = {"adapter_config.json", "adapter_model.safetensors"}
    if found != wanted:
        raise CheckError("the files of save_peft", expected=f"{sorted(wanted)}", got=f"{sorted(found)}")
    return model


def check_config(step: ModuleType) -> None:
    """The config has the fields that PEFT needs, with lora_alpha itself and not the scaling."""
    with tempfile.TemporaryDirectory() as folder:
        _save(step, Path(folder))
        fields = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    wanted: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "tiny", "r": 4,
        "lora_alpha": 8,
        "target_modules": list(TARGETS), "modules_to_save": [HEAD],
    }  # fmt: skip
    for name, value in wanted.items():
        mistakes: dict[str, object] = (
            {"This is lora_alpha / r. PEFT divides by r itself.": 2} if name == "lora_alpha" else {}
        )
        if name == "modules_to_save":
            mistakes = {"The head is not named, so PEFT would keep a new one, with random weights.": None}
        expect_value(f"{name} in adapter_config.json", fields.get(name), value, mistakes)


def check_library(step: ModuleType) -> None:
    """The library loads the folder into a fresh base model, and the outputs are the same, bit for bit."""
    ids = torch.arange(5, 35).reshape(3, 10)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = _save(step, Path(folder))
        loaded = tiny_roberta(seed=0)
        try:
            load_adapter(loaded, folder)
        except AdapterError as error:
            keys = list(safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors"))
            raise CheckError(
                "load_adapter of the library, on your folder",
                expected="a loaded adapter",
                got=f"{error}",
                why=f"the first keys of your file: {keys[:2]}",
            ) from error
        difference = (loaded(ids).logits - model(ids).logits).abs().max()
        if difference:
            raise CheckError(
                "the logits of the loaded model",
                expected="those of the saved one",
                got=f"other values, by up to {difference:.3g}",
            )


def check_peft(step: ModuleType) -> str:
    """PEFT loads the folder too, where it is installed, with outputs that are the same up to rounding."""
    if importlib.util.find_spec("peft") is None:
        return "PEFT is not installed here, so this is not checked. `make learn-peft` checks it."
    import peft

    ids = torch.arange(5, 35).reshape(3, 10)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wanted = _save(step, Path(folder))(ids).logits
        theirs = peft.PeftModel.from_pretrained(tiny_roberta(seed=0), folder).eval()(ids).logits
        difference = float((theirs - wanted).abs().max() / wanted.abs().max())
        if difference > 1e-5:  # float32: the same products in another order, through two layers
            raise CheckError(
                "the logits in PEFT",
                expected="those of the saved model",
                got=f"other values, by {difference:.2%} of the largest",
            )
    return f"peft {peft.__version__}: the largest difference is {difference:.1e} of the largest logit."


CHECKS = (check_keys, check_config, check_library, check_peft)
