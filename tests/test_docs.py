"""If this fails, the map of the code lacks a file, a link leads nowhere, or a page states a figure that was not
measured."""

from pathlib import Path
import re
import sys

import pytest

from benchmarks import results

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))


def test_every_source_file_is_on_the_map_and_every_file_on_the_map_exists():
    index = (ROOT / "docs/index.md").read_text()
    table = index[index.index("## File map") :]
    folder, listed = "", set()
    for line in table.splitlines():
        if heading := re.match(r"\| \*\*`(.+)/`\*\*", line):
            folder = heading[1] + "/"
        elif line.startswith("| `"):
            names = re.findall(r"`([\w/]+\.py)`", line.split("|")[1])
            listed |= {name if "/" in name or not folder else folder + name for name in names}
    sources = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "configs/*.py", "benchmarks/**/*.py", "openpi_ar/**/*.py")
        for path in ROOT.glob(pattern)
        if path.read_text().strip() and path.name != "__init__.py"
    }
    assert listed - {"configs/__init__.py"} == sources


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target, _, section in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", page.read_text()):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}"
            if section:
                titles = re.findall(r"(?m)^#+ (.*)", there.read_text())
                assert section in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, section


@pytest.mark.parametrize("page", results.pages(), ids=lambda page: page.name)
def test_paths_and_modules_that_a_page_names_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:openpi_ar|configs|benchmarks|tests|docs)/[\w/.]+?)/?`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for module in re.findall(r"python -m ((?:openpi_ar|benchmarks)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name} runs {module}"


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs/index.md").read_text()
    for page in PAGES[1:]:
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "index.md" or f"({name})" in index, f"docs/index.md does not link to {name}"


@pytest.mark.parametrize("page", results.pages(), ids=lambda page: page.name)
def test_every_figure_is_the_measured_one(page):
    assert not list(results.differences(page.read_text(), results.load()))


def test_a_figure_that_was_not_measured_is_found():
    """Negative control: a figure that the entry contradicts, one without an entry, and an entry that is not there."""
    entries = {"a": {"values": {"success": 0.987, "s": 66.0, "x": 3.14159e-5}}}
    right = "does 99 %<!--a:success--> in **1.1 minutes**<!--a:s-->, off by 3.1e-5<!--a:x-->; `--x 7 ms` is code"
    assert not list(results.differences(right, entries))
    assert results.quoted(right.replace("99", "71").replace("3.1", "9.9"), entries) == right
    (wrong,) = results.differences(right.replace("99 %", "71 %"), entries)
    assert "a:success is 99, the page says 71" in wrong
    (bare,) = results.differences("does 71 % of them", entries)
    assert "'71 %' quotes no result" in bare
    with pytest.raises(results.UserError, match="no 'failure'"):
        list(results.differences("0 %<!--a:failure-->", entries))


def test_a_command_is_recorded_with_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FILE", tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"other": {}}')
    write = "import json, sys; json.dump({'a': {'b': 0.5, 'c': [1]}, 'ok': True, 'd': 2}, open(sys.argv[1], 'w'))"
    results.Record("key", (sys.executable, "-c", write, "{json}"), machine="a machine", keep=("a/*",)).run()
    entries = results.load()
    values = entries["key"]["values"]
    assert set(entries) == {"key", "other"} and set(values) == {"a/b", "seconds", "cpu_seconds"}
    assert values["a/b"] == 0.5 and values["seconds"] > 0
    assert entries["key"]["command"].endswith("{json}") and entries["key"]["machine"] == "a machine"
    with pytest.raises(results.UserError, match="exit status 3"):
        results.Record("key", (sys.executable, "-c", "raise SystemExit(3)")).run()
    assert results.load() == entries
