"""The house: imports go one way, lora <- model <- train <- bench, and lora could be copied out."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("lora", "model", "train", "bench")
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    floor = FLOORS.index(path.relative_to(ROOT).parts[0])
    assert not imported(path) & set(FLOORS[floor + 1 :])


@pytest.mark.parametrize("path", sorted((ROOT / "lora").rglob("*.py")), ids=lambda path: path.name)
def test_lora_needs_torch_and_safetensors_alone(path):
    assert imported(path) <= {"lora", "torch", "safetensors", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled_and_peft_stays_outside(path):
    assert not imported(path) & {"pickle", "dill", "joblib"}
    if path.relative_to(ROOT).parts[0] != "bench":
        assert "peft" not in imported(path)
    assert not {"torch.save", "torch.load"} & {
        ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    }
