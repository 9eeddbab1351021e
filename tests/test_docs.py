"""If this fails, the map of the code no longer shows what is there."""

from pathlib import Path
import re

ROOT = Path(__file__).parents[1]


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
        for pattern in ("*.py", "configs/*.py", "benchmarks/*.py", "openpi_ar/**/*.py")
        for path in ROOT.glob(pattern)
        if path.read_text().strip() and path.name != "__init__.py"
    }
    assert listed - {"configs/__init__.py"} == sources


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
