"""make bench: every part runs, prints JSON last, and its numbers are consistent."""

import copy
import io
import json
import weakref
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_roberta

from bench import adapters, base, grid, growth, inference, memory, peak, peers
from bench.__main__ import ALL, PARTS, main
from bench.steps import (
    MODES,
    PHASES,
    BenchModel,
    held_bytes,
    in_turn,
    make_model,
    matrix_products,
    memory_bytes,
    milliseconds,
)
from lora.errors import UserError
from lora.modules import train_only
from model import HEAD, speed_up
from train.runs import RunError
from train.tables import markdown

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def quick():
    """The output of `python -m bench --quick`. Memory, but of one model, is measured in this process."""
    in_own_process = memory.in_own_process

    def peak_here(module, kind, *arguments):
        if kind == "head":
            return in_own_process(module, kind, *arguments)
        printed = io.StringIO()
        with redirect_stdout(printed):
            assert peak.main([kind, *arguments]) == 0
        return json.loads(printed.getvalue())

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(memory, "in_own_process", peak_here)
        assert main(["--quick"]) == 0
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="session")
def results(quick):
    return json.loads(quick.stdout.splitlines()[-1])


def test_json_is_the_last_line_and_progress_is_on_stderr(quick, results):
    assert set(ALL) < set(results)
    for name in ALL:
        assert f"{name}\n\n" in quick.stdout
        assert f": {name}\n" in quick.stderr
    assert not (ROOT / "bench" / "results" / "all.json").exists()


@pytest.mark.parametrize("name", ALL)
def test_a_result_records_commit_machine_and_versions(results, name):
    result = results[name]
    assert result["part"] == name
    assert result["quick"] is True
    assert {"device", "threads", "seed", "precision", "versions"} <= set(result)
    assert {"python", "torch", "transformers"} <= set(result["versions"])
    assert {"commit", "clean_tree"} <= set(result)


@pytest.mark.parametrize("name", ALL)
def test_the_table_and_the_figures_are_made_from_the_json_alone(quick, results, name, tmp_path):
    assert PARTS[name].table(results[name]) in quick.stdout
    PARTS[name].figures(results[name], tmp_path)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_are_as_large_as_the_trained_parameters(results):
    for row in results["throughput"]["models"]:
        for kind, mode in row["modes"].items():
            count = mode["parameters"]
            assert count["lora"] + count["head"] + count["base"] == count["trainable"]
            assert count["trainable"] + count["frozen"] == count["total"]
            # float32; safetensors' header and the adapter's config add some kilobytes
            assert 0 < mode["checkpoint_bytes"] - 4 * count["trainable"] < 20_000, kind
        assert row["modes"]["full"]["parameters"]["frozen"] == 0
        assert row["modes"]["lora"]["parameters"]["head"] == row["modes"]["head"]["parameters"]["trainable"]


def test_phases_and_ratios_are_those_of_the_steps(results):
    result = copy.deepcopy(results["throughput"])
    for row in result["models"]:
        for mode in row["modes"].values():
            times = mode["milliseconds"]
            assert all(times[phase]["median"] > 0 for phase in PHASES)
            assert max(times[phase]["low"] for phase in PHASES) <= times["step"]["high"]
    (row,) = result["models"]
    for kind, median in (("full", 100.0), ("lora", 40.0)):
        row["modes"][kind]["milliseconds"]["step"]["median"] = median
    text = PARTS["throughput"].table({"device": "a CPU", **result})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    cells = {name: values for name, *values in lines}
    assert cells["step / full fine-tuning's"][:2] == ["1.00", "0.40"]
    assert list(map(float, cells["examples per second"][:2])) == [10 * row["rows"], 25 * row["rows"]]


def test_memory_components_are_those_of_the_parameters(results):
    rows = {row["mode"]: row for row in results["memory"]["rows"]}
    assert list(rows) == list(MODES)
    full, lora, head = (rows[kind]["components"] for kind in ("full", "lora", "head"))
    assert lora["weights"] == head["weights"] + 4 * 73_728  # MiniLM's own adapter, r = 8, float32
    # AdamW keeps two numbers per trained parameter, and a step count per tensor
    for parts in (full, lora, head):
        assert 0 < parts["optimizer"] - 2 * parts["gradients"] < 1000
    assert full["gradients"] == full["weights"] > 50 * lora["gradients"]


def test_memory_components_of_a_tiny_model_equal_arithmetic():
    model = tiny_roberta()
    train_only(model, HEAD)
    speed_up(model, "bf16")
    head = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_linears = 2 * (4 * (32 * 32 + 32) + 32 * 64 + 64 + 64 * 32 + 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = torch.arange(3, 33).reshape(5, 6)
    labels = torch.tensor([0, 1, 2, 0, 1])
    parts = memory_bytes(BenchModel("head", model.train(), optimizer, ids, labels, CPU, "bf16"))
    assert parts["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert parts["gradients"] == 4 * head
    assert parts["optimizer"] == 8 * head + 4 * len(list(model.classifier.parameters()))
    # 2 bytes per element: the copies of speed_up, and autocast's cast of the head weight that backward uses
    assert (parts["weight_copies"], parts["weight_casts"]) == (2 * frozen_linears, 2 * 3 * 32)


def test_inference_compares_three_states_of_one_model(results):
    result = results["inference"]
    for batch in result["batches"]:
        assert set(batch["milliseconds"]) == set(inference.STATES)
    assert set(result["operation_milliseconds"]) == set(inference.OPERATIONS)


def test_growth_covers_its_range_and_names_the_first_point_at_which_lora_is_no_faster(results):
    points = results["growth"]["points"]
    ranks = [point["r"] for point in points if point["targets"] == "all linear"]
    assert ranks == list(growth.QUICK.ranks)
    assert growth.Range().ranks[0] == 1
    assert growth.Range().ranks[-1] == 256
    assert [length for _, length in growth.Range().lengths][:: len(growth.Range().lengths) - 1] == [32, 512]
    faster = copy.deepcopy(results["growth"])
    for point in faster["points"]:
        point["milliseconds"]["median"] = 10.0 if point["mode"] == "full" else 9.0
    slow = next(point for point in faster["points"] if (point["targets"], point["r"]) == ("all linear", 64))
    slow["milliseconds"]["median"] = 12.0
    text = PARTS["growth"].table({"device": "a CPU", **faster})
    assert text.count("LoRA's step is faster at every measured point") == 3
    assert "By rank, on all linear: LoRA's step takes 1.20 times as long" in text
    assert f"at r = 64 ({slow['trainable']:,} trainable)" in text
    grown = [p["trainable"] for p in points if p["targets"] == "query, value" and p["sweep"] == "rank"]
    assert grown[1] - grown[0] == 63 * 6 * 2 * (384 + 384)  # ranks 1 and 64


def test_a_quick_run_is_not_saved(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bench.RESULTS", tmp_path)
    part = type("Part", (), {"run": lambda quick: {"x": 1}, "table": lambda result: "table"})
    monkeypatch.setitem(PARTS, "growth", part)
    assert main(["growth", "--quick", "--save"]) == 0
    assert not list(tmp_path.iterdir())
    assert main(["growth", "--save"]) == 0
    (saved,) = tmp_path.rglob("*.json")
    assert json.loads(saved.read_text()) == json.loads(capsys.readouterr().out.splitlines()[-1])


def test_results_of_given_data_are_not_lost_to_a_run_without_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bench.RESULTS", tmp_path)
    monkeypatch.setattr("bench.__main__.load_news", lambda *_, **__: None)
    part = type("Part", (), {"run": lambda quick, data: {"x": data}, "table": lambda result: "table"})
    monkeypatch.setitem(PARTS, "recipes", part)
    assert main(["recipes", "--save"]) == 0
    assert main(["recipes", "--save", "--data", "some_news"]) == 0
    assert main(["recipes", "--save"]) == 0
    out, err = capsys.readouterr()
    assert "recipes.json has results with some_news" in err
    assert json.loads(out.splitlines()[-1])["x"] is None  # printed nevertheless
    assert json.loads((tmp_path / "recipes.json").read_text())["x"] == "some_news"


def test_results_of_a_baseline_are_not_lost_to_a_run_without_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bench.RESULTS", tmp_path)
    part = type("Part", (), {"run": lambda quick: {}, "table": lambda result: "table"})
    monkeypatch.setitem(PARTS, "merging", part)
    kept = json.dumps({"part": "merging", "versions": {"torch": "1", "python": "3", "no-such-baseline": "2"}})
    (tmp_path / "merging.json").write_text(kept)
    assert main(["merging", "--save"]) == 0
    assert "merging.json has results with no-such-baseline" in capsys.readouterr().err
    assert (tmp_path / "merging.json").read_text() == kept
    (tmp_path / "merging.json").write_text("damaged")
    assert main(["merging", "--save"]) == 0
    assert json.loads((tmp_path / "merging.json").read_text())["part"] == "merging"


def test_results_that_cannot_be_saved_are_printed_and_an_error(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr("bench.RESULTS", tmp_path / "file" / "results")
    monkeypatch.setitem(PARTS, "growth", type("Part", (), {"run": lambda _: {"x": 1}, "table": lambda _: ""}))
    assert main(["growth", "--save"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["x"] == 1
    assert "error: not saved" in err


def test_a_run_of_other_settings_is_an_error_without_traceback(monkeypatch, capsys):
    def run(quick):
        raise RunError("runs/here: a run of other settings")

    monkeypatch.setitem(PARTS, "growth", type("Part", (), {"run": run}))
    assert main(["growth"]) == 2
    assert "error: runs/here: a run of other settings" in capsys.readouterr().err


def test_missing_data_is_an_error_before_anything_runs(capsys):
    assert main(["recipes", "--data", "./no/such"]) == 2
    assert "./no/such: there is no such folder" in capsys.readouterr().err


def test_held_bytes_count_the_larger_of_gradients_and_saved_tensors():
    parts = {"weights": 100, "weight_copies": 10, "optimizer": 4, "gradients": 2}
    kept = {"activations": 30, "weight_casts": 20}
    assert held_bytes(parts | kept) == 164
    assert held_bytes(parts | kept | {"gradients": 70}) == 184


# --- interleaved steps -----------------------------------------------------------------------------


def test_rounds_are_interleaved_and_warm_up_is_excluded():
    calls = []
    tasks = {name: lambda name=name: calls.append(name) or len(calls) for name in "AB"}
    results = in_turn(tasks, rounds=2, warm_up=1)
    assert calls == ["A", "B"] * 3
    assert results == {"A": [3, 5], "B": [4, 6]}


def test_milliseconds_are_the_median_the_quartiles_and_the_minimum():
    seconds = [0.005, 0.001, 0.002, 0.004, 0.003]
    assert milliseconds(seconds) == {"median": 3, "low": 2, "high": 4, "least": 1}


def test_measuring_saved_tensors_frees_the_graph():
    model = make_model("lora", "random:minilm", 2, 8, "fp32", CPU)
    memory_bytes(model)
    kept = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.clone()
            kept.append(weakref.ref(y))
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, grad):
            return grad

    forward = model.forward
    model.forward = lambda: Watched.apply(forward())
    memory_bytes(model)
    assert kept
    assert not any(reference() is not None for reference in kept)


def test_flops_of_the_products_equal_arithmetic():
    model = tiny_roberta()
    rows, length, width, inner = 3, 10, 32, 64
    square, feed_forward, attention = 2 * width * width, 2 * 2 * width * inner, 2 * 2 * length * width
    key_value = 2 * rows * length * square
    first = rows * length * (4 * square + feed_forward + attention)
    last = key_value + rows * (2 * square + feed_forward + attention)  # for the first token alone
    # the first layer's projections need no gradient of their input, nor do its keys
    unneeded = 3 * rows * length * square + rows * length * attention // 2
    expected = {
        "head": first + last,
        "lora": 2 * (first + last) + rows * (length + 1) * attention - unneeded,
        "full": 3 * (first + last),
    }
    for kind, flops in expected.items():
        products = matrix_products(model, rows, length, torch.float32, CPU, kind)
        assert products.flops == flops
        products()


@pytest.mark.parametrize("kind", MODES)
def test_a_step_trains_the_parameters_of_its_mode_only(kind):
    model = make_model(kind, "random:minilm", 2, 8, "fp32", CPU)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    assert len(model.step()) == len(PHASES)
    changed = {name for name, p in model.module.named_parameters() if not torch.equal(p, before[name])}
    expected = {
        "full": set(before),
        "lora": {name for name in before if name.endswith("lora_B") or name.startswith("classifier")},
        "head": {name for name in before if name.startswith("classifier")},
    }[kind]
    if kind == "lora":  # lora_B is zero at first, so lora_A has no gradient; weight decay changes it
        changed = {name for name in changed if not name.endswith("lora_A")}
    assert changed == expected


def test_a_table_is_markdown_and_lines_up():
    lines = markdown([["", "one"], ["a", "1"], ["long", "1,000"]]).splitlines()
    assert lines == ["|      |   one |", "| ---- | ----: |", "| a    |     1 |", "| long | 1,000 |"]
    assert len({len(line) for line in lines}) == 1


# --- the baselines --------------------------------------------------------------------------------------


def test_a_baseline_that_is_not_installed_is_left_out_by_name(monkeypatch, capsys):
    monkeypatch.setattr(peers, "installed", list)
    result = peers.run(quick=True)
    assert {"peft is not installed, so it is left out", "loralib is not installed, so it is left out"} <= {
        line.removeprefix("peers: ") for line in capsys.readouterr().err.splitlines()
    }
    for row in result["rows"]:
        assert set(row["memory_bytes"]) == set(row["milliseconds"]) - {"products"} == {"lora", "full"}
        row["milliseconds"]["lora"]["median"], row["milliseconds"]["full"]["median"] = 50.0, 70.0
    saved = {name: row["activations"] for name, row in result["variants"]["models"].items()}
    everywhere = saved["LoRA-FA on all linear, here"] / saved["LoRA on all linear, here"]
    assert everywhere < saved["LoRA-FA, here"] / saved["LoRA, here"] < 1
    text = peers.table({"device": "a CPU", **result})
    assert "1.40" in text
    assert "PEFT" not in text


def test_many_adapters_are_compared_without_peft_where_it_is_not_installed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(adapters, "installed", list)
    monkeypatch.setattr(adapters, "ROWS", 8)
    monkeypatch.setattr(adapters, "in_own_process", lambda *_: adapters.held("random:minilm", "bf16", (1, 2)))
    result = adapters.run(quick=True)
    assert "peft is not installed, so it is left out" in capsys.readouterr().err
    assert set(result["switching_milliseconds"]) == set(adapters.OPERATIONS)
    for row in result["mixed"]:
        assert set(row["milliseconds"]) == set(adapters.CONTENDERS) - {"peft"}
        row["milliseconds"]["merged"]["median"], row["milliseconds"]["exact"]["median"] = 30.0, 40.0
    first, second = result["memory"]
    assert first["adapter_bytes"] == 4 * (73_728 + 149_380)  # MiniLM's adapter and head, float32
    # Neither a copy of a weight nor any other tensor comes with an adapter
    assert second["tensor_bytes"] - first["tensor_bytes"] == first["adapter_bytes"]
    text = adapters.table({"device": "a CPU", **result})
    assert "PEFT" not in text
    assert "the exact mode has 0.75 of the" in text
    assert f"4, skewed: {result['mixed'][-1]['used']} used" in text
    adapters.figures(result, tmp_path)
    assert (tmp_path / "adapters.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_assigned_in_turn_or_by_zipfs_law():
    assert adapters.assigned(6, 4, skewed=False) == [0, 1, 2, 3, 0, 1]
    drawn = adapters.assigned(60_000, 3, skewed=True)
    # 6/11, 3/11, 2/11; the standard deviation of a share is 0.002
    assert [drawn.count(number) / len(drawn) for number in range(3)] == pytest.approx(
        [6 / 11, 3 / 11, 2 / 11], abs=0.01
    )


def test_the_original_needs_its_own_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="peft is not installed.*make bench-original"):
        PARTS["original"].run(quick=True)


def test_data_is_refused_for_parts_that_read_none(capsys):
    with pytest.raises(SystemExit):
        main(["memory", "--data", "somewhere"])
    assert "--data goes with original, variants, recipes, base, not with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["base", "--data", "bbc"])
    assert "--data: bbc is measured without it" in capsys.readouterr().err


# --- the storage of the base ------------------------------------------------------------------------------


def test_every_storage_of_the_base_is_compared_at_the_rate_of_fp32(monkeypatch, tmp_path):
    trained = []

    def train(cell):
        trained.append(cell)
        bits = "1" * (90 if cell.method.fields.get("base_precision") == "nf4" else 95)
        result = {"val_loss": (cell.quarter + 12) ** 2, "correct": f"{int('1' + bits.ljust(100, '0'), 2):x}"}
        numbers = dict.fromkeys(grid.KEPT, 0) | {"train_articles": 1, "device": "a CPU", "precision": "bf16"}
        return {**numbers, **result}

    def peak(kind, *_):
        parts = dict.fromkeys(memory.COMPONENTS, 1) | {"weights": 10 * (3 + len(kind))}
        return {"components": parts, "peak_bytes": 3, "bare_bytes": 1, "peak_of": "steps"}

    monkeypatch.setattr(grid.Cell, "run", train)
    monkeypatch.setattr(grid, "RUNS", tmp_path)
    monkeypatch.setattr(grid, "_digest", str)
    monkeypatch.setattr(grid, "write_folds", lambda: None)
    monkeypatch.setattr(base, "in_own_process", peak)
    monkeypatch.setattr("bench.baselines.find_spec", lambda package: package == "peft")  # not bitsandbytes
    broken = {"peft": lambda *_: 1 / 0}
    monkeypatch.setattr("bench.steps.BASELINES", broken)
    accuracy = base._accuracy
    monkeypatch.setattr(base, "_accuracy", lambda _, quick: accuracy("some_news", quick))
    monkeypatch.setattr(base, "TEXTS", 2)
    result = base.run(quick=True)
    rows = result["sets"][0]["rows"]
    assert [row["name"] for row in rows] == ["LoRA r=8", "bf16", "int8", "nf4"]
    assert len({row["learning_rate"] for row in rows}) == 1
    differences = [row["against"].get("LoRA r=8", {}).get("difference") for row in rows]
    assert differences == [None, 0, 0, pytest.approx(-0.05)]
    cells = len(trained)
    accuracy("some_news", quick=True)
    assert len(trained) == cells  # nothing is trained twice
    errors = result["errors"]["storages"]
    for key in ("weight", "layer", "encoder"):
        assert errors["bf16"][key] < errors["int8"][key] < errors["nf4"][key]
    shape = result["shapes"][0]
    assert set(shape["kinds"]) == {"fp32", "bf16", "int8", "nf4"}
    text = base.table({"device": "a CPU", **result})
    assert "does not run: ZeroDivisionError: division by zero" in text
    assert "bitsandbytes" not in text
    assert "nf4 -5.00 (" in " ".join(text.split())
    base.figures(result, tmp_path)
    assert (tmp_path / "base.png").read_bytes().startswith(b"\x89PNG")
