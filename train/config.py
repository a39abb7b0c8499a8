"""A recipe: all settings of a run, read from TOML and validated."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from lora import LoraConfig, quantised
from lora.errors import UserError
from model import HEAD
from train.bbc import is_bbc

RECIPES = Path(__file__).parent / "recipes"
METHODS = ("lora", "full", "head")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_ALIASES = {  # names of other projects, such as PEFT and transformers, for fields of a recipe
    "alpha": "lora_alpha",
    "base_model": "model",
    "base_model_name_or_path": "model",
    "batch": "batch_size",
    "bf16": "precision",
    "bs": "batch_size",
    "dataset": "data",
    "dropout": "lora_dropout",
    "dtype": "precision",
    "early_stopping_patience": "early_stopping_epochs",
    "fp16": "precision",
    "gradient_accumulation_steps": "accumulation_steps",
    "label_smoothing_factor": "label_smoothing",
    "logging_steps": "log_every_steps",
    "lora_r": "r",
    "lora_rank": "r",
    "lr": "learning_rate",
    "max_grad_norm": "max_gradient_norm",
    "max_len": "max_length_tokens",
    "max_length": "max_length_tokens",
    "max_seq_length": "max_length_tokens",
    "max_train_samples": "max_train_examples",
    "model_name_or_path": "model",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "rank": "r",
    "save_steps": "checkpoint_every_steps",
    "targets": "target_modules",
    "warmup_ratio": "warmup_fraction",
    "warmup_steps": "warmup_fraction",
    "wd": "weight_decay",
}


class RecipeError(UserError, ValueError):
    """A recipe that cannot be run. The message names the field."""


@dataclass(frozen=True)
class Recipe:
    """The settings of a run. Raises RecipeError if a field has the wrong type or is out of range."""

    model: str = "minilm"
    data: str = "bbc"
    method: str = "lora"  # lora | full (every weight) | head (only the classification head)
    seed: int = 0

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    base_dropout: float = 0.1  # RoBERTa's own, hidden and attention
    target_modules: tuple[str, ...] | str = ("query", "value")
    use_rslora: bool = False
    layer: str = ""  # FILE.py:Class, a layer class of your own (lora/check_layer.py tests one)
    use_dora: bool = False  # these choose a variant, at most one (lora/variants/README.md)
    use_lora_fa: bool = False
    init_lora_weights: bool | str = True  # true | "pissa" | "milora" | "eva"
    peft_type: str = "LORA"  # LORA | VERA
    loraplus_lr_ratio: float = 1.0  # learning rate of every lora_B / learning_rate (LoRA+); 1: the same

    epochs: int = 3
    batch_size: int = 32  # rows per forward pass, over all processes
    accumulation_steps: int = 1  # batches per optimizer step
    learning_rate: float = 1e-3
    weight_decay: float = 0.01  # of matrices; none for biases and layer norms
    warmup_fraction: float = 0.1  # of all steps, linear; followed by a cosine decay to zero
    label_smoothing: float = 0.1
    max_gradient_norm: float = 1.0  # 0: no clipping
    max_length_tokens: int = 128

    base_precision: str = "fp32"  # fp32 | bf16 | int8 | nf4: how frozen weights are stored (lora/quantised)
    gradient_checkpointing: bool = False  # save only each layer's input and compute the rest twice
    precision: str = "auto"  # auto | fp32 | bf16 | fp16
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    deterministic: bool = False  # bitwise reproducible on CUDA too, slower; the CPU always is
    validation_fraction: float = 0.1  # of the training rows; bbc has a fixed validation part
    early_stopping_epochs: int = 0  # epochs without a lower validation loss before stopping; 0: never
    checkpoint_every_steps: int = 200
    log_every_steps: int = 10  # and the first step
    telemetry: bool = True  # also log size, rank and gradients of each adapted layer
    max_train_examples: int = 0  # 0: all

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
        _one_of("method", self.method, METHODS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("base_precision", self.base_precision, quantised.PRECISIONS)
        if self.method == "full" and self.base_precision != "fp32":
            raise RecipeError(
                f"base_precision: {self.base_precision!r} is for a frozen base; full trains all of it"
            )
        for name in ("model", "data"):
            if not getattr(self, name):
                raise RecipeError(f"{name}: empty")
        for name in (
            "epochs",
            "batch_size",
            "accumulation_steps",
            "checkpoint_every_steps",
            "log_every_steps",
        ):
            _in_range(name, getattr(self, name), 1, math.inf)
        for name in ("early_stopping_epochs", "max_train_examples", "weight_decay", "max_gradient_norm"):
            _in_range(name, getattr(self, name), 0, math.inf)
        for name in ("base_dropout", "warmup_fraction", "label_smoothing"):
            _in_range(name, getattr(self, name), 0, 1, below=True)
        _in_range("seed", self.seed, 0, 2**32, below=True)
        _in_range("learning_rate", self.learning_rate, 0, math.inf, above=True)
        _in_range("loraplus_lr_ratio", self.loraplus_lr_ratio, 1, math.inf)
        _in_range("validation_fraction", self.validation_fraction, 0, 1, above=True, below=True)
        _in_range("max_length_tokens", self.max_length_tokens, 3, math.inf)  # start, one token, end
        if not re.fullmatch("auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", self.device):
            raise RecipeError(f"device: {self.device!r} is not auto, cpu, cuda or cuda:N")
        try:
            self.lora_config()
        except (TypeError, ValueError) as error:
            raise RecipeError(str(error)) from error

    def lora_config(self) -> LoraConfig:
        """The config of the adapter that this recipe trains."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            modules_to_save=HEAD,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            use_lora_fa=self.use_lora_fa,
            init_lora_weights=self.init_lora_weights,
            peft_type=self.peft_type,
        )

    def changed(self, fields: Mapping[str, Any], flag: str = "") -> Recipe:
        """The recipe with other values of these fields.

        Raises RecipeError, whose message starts with `flag`, the part of the command line that gave them.
        """
        try:
            return make_recipe({**dataclasses.asdict(self), **fields})
        except RecipeError as error:
            raise RecipeError(f"{flag}{error}") from error

    def with_absolute_paths(self) -> Recipe:
        """The recipe with absolute paths of a layer's file, and of model and data if they are folders."""
        # Embedded names are not folders, even where a folder has this name.
        embedded = {"model": self.model == "minilm", "data": is_bbc(self.data)}
        names = {field: getattr(self, field) for field, known in embedded.items() if not known}
        paths = {field: str(Path(name).resolve()) for field, name in names.items() if Path(name).is_dir()}
        file, _, layer = self.layer.rpartition(":")
        if file:
            paths["layer"] = f"{Path(file).resolve()}:{layer}"
        return self.changed(paths)

    def to_toml(self) -> str:
        """All fields of the recipe in TOML."""
        return tomli_w.dumps(dataclasses.asdict(self))


def load_recipe(name: str, changes: Mapping[str, Any] | None = None) -> tuple[str, Recipe]:
    """The short name and the fields of the recipe called `name`, or of the TOML file `name`.

    changes: fields that override the file's. Raises RecipeError if the recipe is unknown, the file is not
    TOML, a field is misspelt or a value is invalid.
    """
    known = sorted(file.stem for file in RECIPES.glob("*.toml"))
    path = RECIPES / f"{name}.toml" if name in known else Path(name)
    if not path.stem.isprintable():  # a run records it in its config.toml
        raise RecipeError(f"recipe {name!r}: its name has characters that cannot be printed; rename it")
    try:
        named = name in known or path.suffix == ".toml" or path.is_file()
        fields = tomllib.loads(path.read_text(encoding="utf-8-sig")) if named else None
    except OSError as error:
        raise RecipeError(f"{reprlib.repr(name)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error
    if fields is None:
        raise RecipeError(f"there is no recipe {name!r}; {nearest(name, known)}")
    try:
        recipe = make_recipe(fields)
    except RecipeError as error:
        raise RecipeError(f"{path.name}: {error}") from error
    return path.stem, recipe.changed(changes or {})


def parse_recipe(text: str) -> Recipe:
    """The recipe that `to_toml` wrote, also in an earlier version, which had fewer fields. ValueError."""
    fields = tomllib.loads(text)
    fields.pop("compile", None)  # an option of version 0.1.0
    return make_recipe(fields)


def make_recipe(fields: Mapping[str, Any]) -> Recipe:
    """A Recipe from a mapping. Raises RecipeError, which suggests the nearest name for a misspelt field."""
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in fields:
        if name not in known:
            meant = field_meant(name)
            hint = f"did you mean {meant!r}?" if meant else nearest(name, known)
            raise RecipeError(f"{reprlib.repr(name)}: there is no such field; {hint}")
    return Recipe(**fields)


def field_meant(name: str) -> str:
    """The field of a recipe that has this name here or in other projects, or "" if there is none."""
    known = {field.name: field.name for field in dataclasses.fields(Recipe)} | _ALIASES
    return known.get(name.lower().replace("-", "_"), "")


def parse_setting(setting: str) -> tuple[str, Any]:
    """Parses `key=value` from the command line. A value that is not TOML is text.

    True and False are read as true and false. Comma-separated target_modules are a list, so that
    `target_modules=query,value` needs no quotes. Raises RecipeError.
    """
    key, separator, text = setting.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {setting}: not of the form key=value, without spaces around =")
    if text.strip() in ("True", "False"):  # Python's
        text = text.lower()
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        value = text.strip()
        if key.strip() == "target_modules" and value != "all-linear":
            value = [name.strip() for name in text.split(",")]
    return key.strip(), value


def _typed(field: dataclasses.Field[Any], value: Any) -> Any:
    kind, shown = str(field.type), reprlib.repr(value)
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 10**15:
            raise RecipeError(f"{field.name}: {shown} is not a whole number of at most 15 digits")
    elif kind == "float":
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise RecipeError(f"{field.name}: {shown} is not a number of a usable size")
        return float(value)
    elif kind == "bool":
        if not isinstance(value, bool):
            raise RecipeError(f"{field.name}: {shown} is not true or false")
    elif kind == "bool | str" and isinstance(value, bool):
        return value
    elif kind in ("str", "bool | str"):
        if not isinstance(value, str) or not is_unicode(value):
            raise RecipeError(f"{field.name}: {shown} is not text in UTF-8")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    elif not isinstance(value, str):
        raise RecipeError(f"{field.name}: {shown} is not a list of names or a regular expression")
    return value


def is_unicode(text: str) -> bool:
    """Whether the text can be written: an argument that is not UTF-8 becomes surrogates, which cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name}: {value!r}: {nearest(value, allowed)}")


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint at the name in `known` that was meant, or at all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"


def _in_range(
    name: str, value: float, low: float, high: float, *, above: bool = False, below: bool = False
) -> None:
    if value < low or value > high or (above and value == low) or (below and value == high):
        lower = f"above {low}" if above else f"at least {low}"
        upper = "" if math.isinf(high) else f" and below {high}" if below else f" and at most {high}"
        raise RecipeError(f"{name}: {value} is not {lower}{upper}")
