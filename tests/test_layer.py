"""A layer class of the user's own, trained by `python -m train --layer FILE.py:Class`."""

import dataclasses
import json
import shutil
import textwrap

import pytest
from conftest import content

from lora import AdapterError, load_adapter
from model import load_base
from train.cli import main
from train.config import Recipe, RecipeError
from train.evaluate import evaluate
from train.job import run_job
from train.layers import load_layer
from train.runs import RunError
from train.trained import load_trained

SOURCE = '''
    from __future__ import annotations
    from dataclasses import dataclass
    import torch
    from lora import LoRALinear

    @dataclass
    class Settings:
        factor: int = 2

    class Doubled(LoRALinear):
        """ΔW is twice as large."""

        def __init__(self, linear, **settings):
            super().__init__(linear, **settings)
            self.scaling *= Settings().factor

    class Same(LoRALinear):
        pass

    class Dotted(LoRALinear):
        adapter_tensors = (*LoRALinear.adapter_tensors, "gate.weight")
        trained_tensors = (*LoRALinear.trained_tensors, "gate.weight")

        def __init__(self, linear, **settings):
            super().__init__(linear, **settings)
            self.gate = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.ones_(self.gate.weight)

        def forward(self, x):
            if self.merged or not self.enabled:
                return super().forward(x)
            plain = torch.nn.functional.linear(x, self.weight, self.bias)
            return plain + self.gate.weight * (super().forward(x) - plain)

        def delta_weight(self):
            return self.gate.weight.double() * super().delta_weight()

    class NoLayer:
        pass
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my layers" / "mine.py"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(SOURCE))
    return path


def test_a_layer_of_your_own_is_trained_saved_and_evaluated(file, tiny_recipe, tmp_path, capsys):
    recipe = dataclasses.replace(tiny_recipe, epochs=1)
    run_job("same", dataclasses.replace(recipe, layer=f"{file}:Same"), tmp_path / "same")
    run_job("dotted", dataclasses.replace(recipe, layer=f"{file}:Dotted"), tmp_path / "dotted")
    run_job("doubled", dataclasses.replace(recipe, layer=f"{file}:Doubled"), tmp_path / "doubled")
    assert "ΔW = 4·B·A, and lora_alpha / r is 2" in capsys.readouterr().err
    same, doubled = (content(tmp_path / name)[0] for name in ("same", "doubled"))
    assert same["metrics.jsonl"] != doubled["metrics.jsonl"]

    accuracy = json.loads((tmp_path / "doubled" / "summary.json").read_text())["test_accuracy"]
    assert evaluate(tmp_path / "doubled", None)["scores"].accuracy == accuracy
    query = load_trained(tmp_path / "doubled").model.roberta.encoder.layer[0].attention.self.query
    assert type(query).__name__ == "Doubled"
    # The adapter's folder alone does not say how its tensors are used, so it is refused, here and in Python.
    with pytest.raises(RunError, match="layer class of its own"):
        load_trained(tmp_path / "doubled" / "adapter")
    model, _ = load_base(recipe.model, num_labels=3)
    with pytest.raises(AdapterError, match="trained with the class Doubled; pass it as layer="):
        load_adapter(model, tmp_path / "doubled" / "adapter")
    load_adapter(model, tmp_path / "doubled" / "adapter", layer=load_layer(f"{file}:Doubled"))

    shutil.rmtree(tmp_path / "same" / "adapter")
    (tmp_path / "same" / "summary.json").unlink()
    file.write_text(file.read_text() + "\n# another version\n")
    with pytest.raises(RunError, match="its file has changed"):
        load_trained(tmp_path / "doubled")
    assert main(["--resume", "--output", str(tmp_path / "same")]) == 2
    assert "the layer class differs" in capsys.readouterr().err


def test_a_recipe_holds_the_absolute_path_of_its_layer(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert Recipe(layer="mine.py:Same").with_absolute_paths().layer == f"{file}:Same"
    assert Recipe(layer="mine.py").with_absolute_paths().layer == "mine.py"


def test_a_layer_without_lora_is_an_error(file, tiny_recipe, tmp_path):
    for settings in ({"layer": f"{file}:Same"}, {"use_dora": True}):
        recipe = dataclasses.replace(tiny_recipe, method="head", **settings)
        with pytest.raises(RecipeError, match="method: 'head' trains no LoRA layer"):
            run_job("head", recipe, tmp_path / "head")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py", "not of the form FILE.py:Class"),
        ("{file}:", "not of the form FILE.py:Class"),
        ("none.py:Mine", "none.py: No such file"),
        (
            "{file}:Missing",
            r"no subclass of MergeableLinear called 'Missing'; it has \['Doubled', 'Same', 'Dotted'\]",
        ),
        ("{file}:NoLayer", "no subclass of MergeableLinear called 'NoLayer'"),
        ("{broken}:Mine", "SyntaxError: "),
    ],
)
def test_a_layer_that_cannot_be_used_is_an_error(file, spec, message):
    broken = file.with_name("broken.py")
    broken.write_text("class Mine(\n")
    with pytest.raises(RecipeError, match=message):
        load_layer(spec.format(file=file, broken=broken))
