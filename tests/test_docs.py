"""The documentation: its size, links, commands, and the figures and code it shows."""

import importlib.util
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest

from bench.readme import EXCERPTS, PAGES, RESULTS, names, rewritten
from learn.figures import FIGURES
from lora import LoRALinear

ROOT = Path(__file__).parent.parent
COURSE = sorted((ROOT / "learn" / "pages").glob("*.md"))
NOTES = ("train/README.md", "bench/NOTES.md", "learn/README.md")
DOCUMENTS = [*PAGES, *(ROOT / page for page in NOTES), *COURSE]
README, BENCH, VARIANTS = PAGES
RAW = {"cells"}  # results that others are made from
_MARKED = re.compile(r"<!-- bench:\S+ -->.*?<!-- /bench -->", re.DOTALL)

pages = pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 12_288


@pytest.mark.parametrize("page", COURSE, ids=lambda page: page.stem)
def test_a_page_of_the_course_is_short(page):
    assert len(page.read_text().splitlines()) <= 120


def test_the_course_shows_every_figure_it_draws():
    shown = {name for page in COURSE for name in re.findall(r"\(\.\./figures/(\w+)\.png\)", page.read_text())}
    assert shown == set(FIGURES) == {path.stem for path in (ROOT / "learn" / "figures").glob("*.png")}


def test_the_printed_formula_is_the_source_of_forward():
    source = textwrap.dedent(inspect.getsource(LoRALinear.forward))
    assert f"```python\n{source}```\n" in README.read_text()


@pages
def test_links_resolve(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in _anchors(linked.read_text()), target


def _anchors(text):
    """The anchors that GitHub gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pages
def test_the_named_commands_exist(page):
    text = page.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    code = "\n".join(re.findall(r"`+([^`]+)`+", text))
    for target in re.findall(r"(?:^|\s)make ([a-z-]+)", code):
        assert target in targets, target
    for module in re.findall(r"python -m ([\w.]+)", code):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("page", PAGES, ids=["README", "bench", "variants"])
def test_measured_parts_equal_the_results(page):
    text = page.read_text()
    assert rewritten(text, RESULTS) == text, "run `python -m bench.readme`"


def test_every_result_is_shown():
    shown = names(BENCH.read_text())
    assert shown == list(dict.fromkeys(shown))
    found = {str(path.relative_to(RESULTS).with_suffix("")) for path in RESULTS.rglob("*.json")}
    assert found - RAW == set(shown)
    assert {*names(README.read_text()), *names(VARIANTS.read_text())} == set(EXCERPTS)


def test_another_figure_in_the_json_is_another_figure_on_the_page(tmp_path):
    text = BENCH.read_text()
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert rewritten(text, tmp_path) == text
    merging = json.loads((tmp_path / "merging.json").read_text())
    for row in merging["rows"]:
        row["changed_after_all"] *= 2
        if (row["implementation"], row["dtype"]) == ("peft", "float32"):
            doubled = f"{row['changed_after_all']:.1%}"
    (tmp_path / "merging.json").write_text(json.dumps(merging))
    changed = rewritten(text, tmp_path)
    assert changed != text
    assert doubled in changed


def test_missing_results_are_named(tmp_path):
    text = "before\n<!-- bench:throughput -->\nold\n<!-- /bench -->\nafter\n"
    new = rewritten(text, tmp_path)
    assert "Not measured yet" in new
    assert new.startswith("before\n<!-- bench:throughput -->\n")
    assert new.endswith("\n<!-- /bench -->\nafter\n")
    assert rewritten(new, tmp_path) == new


def test_measured_figures_are_between_markers():
    """Prose may state what follows from arithmetic or what others report, not what was measured here."""
    for page in PAGES:
        text = page.read_text()
        prose = _MARKED.sub("", text)
        assert prose != text
        prose = prose.replace("## The original project\n" + _section(prose, "The original project"), "")
        assert not re.findall(r"\d[\d.,]*\s?(?:ms|MiB|MB|times|seconds|GFLOP)\b", prose), page
        percents = re.findall(r"\d[\d.,]*\s?%", prose)
        # how well two runs should agree, and one of 406 articles
        assert percents == (["10%", "0.25%"] if page == BENCH else [])


def _section(text, heading):
    """The text from a heading of level 2 to the next; the original project's own figures are cited in one."""
    return text.partition(f"## {heading}\n")[2].split("\n## ")[0]
