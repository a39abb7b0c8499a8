"""The package: `pip install .` installs `lora` alone, typed, usable from any folder."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the files that it needs, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("lora", "model"):  # a second package, which must not be installed
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", "dist", "."], cwd=source, check=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_lora_and_its_type_marker_alone(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lora").rglob("*.py")}
    assert names == wanted | {"lora/py.typed"}


def test_it_depends_on_torch_and_safetensors_alone(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        fields = HeaderParser().parsestr(file.read(name).decode())
    assert {line.split(">")[0] for line in fields.get_all("Requires-Dist")} == {"torch", "safetensors[torch]"}


def test_it_works_from_an_empty_folder(wheel, tmp_path):
    """Inject, save and load, where nothing of the checkout is on the path."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, lora\n"
        "assert lora.__file__.startswith(sys.argv[1]), lora.__file__\n"
        "from lora import LoraConfig, inject, load_adapter, save_adapter\n"
        "from lora.fast import fuse\n"
        "model, other = (torch.nn.ModuleDict({'query': torch.nn.Linear(4, 4)}) for _ in range(2))\n"
        "other.load_state_dict(model.state_dict())\n"
        "inject(model, LoraConfig(target_modules=('query',), r=2))\n"
        "fuse(model)\n"
        "save_adapter(model, 'adapter', base='tiny')\n"
        "load_adapter(other, 'adapter')\n"
        "assert not {'transformers', 'model', 'train'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-I", "-c", program, str(wheel)], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
