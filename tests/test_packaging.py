"""If this fails, an installed wheel lacks a file, or drops more into site-packages than the one package `openpi_ar`."""

from pathlib import Path
import subprocess
import zipfile

ROOT = Path(__file__).parents[1]


def test_the_wheel_installs_the_whole_of_openpi_ar_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    listed = subprocess.run(["git", "ls-files", "openpi_ar"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.partition("/")[0] for name in names} == {"openpi_ar"}
    assert set(listed.stdout.split()) <= names  # code, tokenizer and the shipped checkpoint
