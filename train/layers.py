"""Loads the layer class that a recipe names: layer = "FILE.py:Class"."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

from lora import MergeableLinear
from lora.errors import first_line
from train.config import RecipeError


def load_layer(spec: str) -> type[MergeableLinear] | None:
    """The class that `spec` names, or None if it is empty. Runs the file.

    Raises RecipeError if the file cannot be run, or has no such subclass of MergeableLinear.
    """
    if not spec:
        return None
    path, name = _parts(spec)
    module_name = f"layer_{layer_digest(spec)[:16]}"
    if module_name not in sys.modules:
        loader = importlib.util.spec_from_file_location(module_name, path)
        if loader is None or loader.loader is None:
            raise RecipeError(f"layer: {path} is not a Python file")
        module = sys.modules[module_name] = importlib.util.module_from_spec(loader)  # dataclasses look there
        try:
            loader.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[module_name]
            if not isinstance(error, Exception):
                raise
            raise RecipeError(f"layer: {path}: {type(error).__name__}: {first_line(error)}") from error
    found = getattr(sys.modules[module_name], name, None)
    if not (isinstance(found, type) and issubclass(found, MergeableLinear)):
        known = [
            key
            for key, value in vars(sys.modules[module_name]).items()
            if isinstance(value, type)
            and issubclass(value, MergeableLinear)
            and value.__module__ == module_name
        ]
        raise RecipeError(
            f"layer: {path} has no subclass of MergeableLinear called {name!r}; it has {known or 'none'}"
        )
    return found


def layer_digest(spec: str) -> str:
    """The SHA-256 of the file that `spec` names; "" for LoRALinear. Raises RecipeError."""
    if not spec:
        return ""
    path, _ = _parts(spec)
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RecipeError(f"layer: {path}: {error.strerror}") from error


def _parts(spec: str) -> tuple[Path, str]:
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise RecipeError(f"layer: {spec!r} is not of the form FILE.py:Class")
    return Path(path), name
