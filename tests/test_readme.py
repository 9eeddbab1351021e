"""If this fails, README promises what does not work: a command ends in an error, or the example prints something
else."""

import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
from PIL import Image
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BLOCKS = re.findall(r"```\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
TRAINING = [command for command in COMMANDS if "checkpoints/" in command or "--exp-name" in command]
QUICK = [command for command in COMMANDS if command.endswith(("--ckpt tabletop", "--help"))]
OTHERS = [command for command in COMMANDS if command not in (*TRAINING, *QUICK)]

# What README tells the reader to add for a quick trial, and what makes the other long commands small: flags are added
# to a command that holds the text on the left.
(TRIAL,) = re.findall(r"For a quick trial of a training command add `(.*?)`", README)
SMALLER = {
    "--config pi05_subtask_tabletop": f"{TRIAL} --data.path 'world://tabletop?episodes=3'",
    "--resume": "--num-steps 3",
    "--dry-run": "--text.tokenizer embedded",  # PaliGemma's would be downloaded
    "--rollout": "--rollout 1",
    "pytest": "--collect-only",  # all tests, this one among them
}
# What stands for something of the reader's.
PLACES = {"DATASET": "tests/golden/lerobot/v30_video", "CHECKPOINT": "tests/golden/pi05/params"}
ARM = """
name: arm
cameras: {observation.images.base_0_rgb: base_0_rgb}
state: ["observation.state[0:7]"]
actions: ["action[0:7]"]
delta_mask: [6, -1]
"""


def as_run(command: str) -> str:
    """The command for this test's interpreter, small, and on data that is there."""
    parts = [part for part in command.split(" && ") if part != "pip install uv"]
    for i, part in enumerate(parts):
        flags = [flags for text, flags in SMALLER.items() if text in part and "--help" not in part]
        part = re.sub(r"^uv run (python )?(?=\S+\.py|-m)", f"{sys.executable} ", part)
        part = part.replace("uv run pytest", f"{sys.executable} -m pytest")
        for name, path in PLACES.items():
            part = re.sub(rf"\b{name}\b", path, part)
        parts[i] = " ".join([part, *flags])
    return " && ".join(parts)


def run(command: str, folder: Path) -> str:
    """What the command prints, run in the folder. Fails if it ends in an error."""
    done = subprocess.run(as_run(command), shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{as_run(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory):
    """A copy of this checkout, beside nothing, with the files that README's commands name."""
    folder = tmp_path_factory.mktemp("checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name)
    (folder / "arm.yaml").write_text(ARM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENPI_AR_CACHE", str(folder / "cache"))
        yield folder


@pytest.mark.parametrize("command", [*QUICK, *(pytest.param(command, marks=pytest.mark.slow) for command in OTHERS)])
def test_command_without_training(command, checkout):
    run(command, checkout)


@pytest.mark.slow
def test_training_commands_one_after_the_other(checkout):
    assert len(TRAINING) >= 4
    for command in TRAINING:
        run(command, checkout)
    assert (checkout / "checkpoints/pi05_subtask_tabletop/mine/3").is_dir()  # resumed at step 2
    assert (checkout / "rollout.mp4").stat().st_size > 0 and (checkout / "result.json").stat().st_size > 0


def test_a_command_that_fails_is_seen(checkout):
    """Negative control: a wrong flag and a file that is not there."""
    for command in ("uv run infer.py --ckpt tabletop --rolout 3", "uv run python no_such_script.py"):
        with pytest.raises(AssertionError, match=r"Unrecognized options|No such file"):
            run(command, checkout)


def test_the_example_prints_what_it_says_from_an_installed_wheel(wheel, tmp_path):
    """In an empty directory: nothing of the checkout is on the path before what the wheel installs."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = f"{EXAMPLE}\nimport openpi_ar; print(openpi_ar.__file__)"
    env = {**os.environ, "PYTHONPATH": str(site), "OPENPI_AR_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], cwd=empty, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = re.findall(r"print\(.*\)  # (.*)", EXAMPLE)
    assert len(expected) == 2
    assert done.stdout.splitlines() == [*expected, str(site / "openpi_ar" / "__init__.py")]
