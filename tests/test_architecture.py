"""The layout: imports go one way, and the textbook is short and knows nothing of what makes it faster."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("lora", "model", "train", "bench", "learn")
WORK = ROOT / "learn" / "work"  # a reader's own files
FILES = [
    path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py")) if WORK not in path.parents
]
FAST = ROOT / "lora" / "fast"


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """The dotted names of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def closure(*starts: Path) -> set[Path]:
    """The files of the repository that these files import, directly or not, and the files themselves."""
    found: set[Path] = set()
    waiting = list(starts)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = [name.replace(".", "/") for name in imports(path)]
            modules = [ROOT / f"{name}{end}" for name in names for end in (".py", "/__init__.py")]
            waiting += [module for module in modules if module.is_file()]
    return found


TEXTBOOK = sorted(closure(ROOT / "lora" / "linear.py", ROOT / "lora" / "inject.py"))


def test_imports_go_one_way():
    for path in FILES:
        floor = FLOORS.index(relative(path).split("/")[0])
        assert not packages(path) & set(FLOORS[floor + 1 :]), path
        if FLOORS[floor] == "learn":
            assert "bench" not in packages(path), path


def test_lora_needs_torch_and_safetensors_alone():
    for path in sorted((ROOT / "lora").rglob("*.py")):
        assert packages(path) <= {"lora", "torch", "safetensors", *sys.stdlib_module_names}, path


def test_nothing_is_pickled_and_peft_stays_outside():
    for path in FILES:
        assert not packages(path) & {"pickle", "dill", "joblib"}, path
        if relative(path).split("/")[0] not in (
            "bench",
            "learn",
        ):  # learn asks PEFT to read the reader's file
            assert "peft" not in packages(path), path
        nodes = ast.walk(ast.parse(path.read_text()))
        read = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        assert not {"torch.save", "torch.load"} & read, path


@pytest.mark.parametrize("path", sorted((ROOT / "lora").glob("*.py")), ids=relative)
def test_the_reference_never_imports_what_makes_it_faster_or_varies_it(path):
    found = {name for name in imports(path) if name.startswith(("lora.fast", "lora.variants"))}
    # The package itself registers the variants, and uses none.
    assert found == ({"lora.variants"} if path.name == "__init__.py" else set())


def test_the_textbook_is_short():
    """Whoever reads how LoRA works from linear.py and inject.py reads at most this much."""
    assert len(TEXTBOOK) <= 8
    assert sum(len(path.read_text().splitlines()) for path in TEXTBOOK) <= 750
    assert not any(FAST in path.parents for path in TEXTBOOK)


@pytest.mark.parametrize("path", sorted((ROOT / "lora").glob("*.py")), ids=relative)
def test_no_code_outside_their_files_knows_a_variant(path):
    """Fields are declared in config.py and named in PEFT's format; nothing reads one by its name."""
    fields = {"use_dora", "use_lora_fa", "init_lora_weights", "projection_prng_key", "d_initial"}
    read = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not read & fields
    assert not re.findall(r"DoRA|PiSSA|MiLoRA|VeRALinear|EVA", path.read_text())


@pytest.mark.parametrize("path", TEXTBOOK, ids=relative)
def test_the_textbook_knows_nothing_of_autocast_copies_fusion_or_tracing(path):
    words = (
        r"autocast|compute_dtype|compute_weights|\bfused\b|\bfuse\b|torch\.compile|compiler|functorch|_traced"
    )
    assert not re.findall(words, path.read_text())
