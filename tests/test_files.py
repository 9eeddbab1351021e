"""Broken if this fails: a place that cannot be written is said after the work, without its name, or in a stack trace."""

import errno
import json
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

import infer
from openpi_ar import files
from openpi_ar.data.__main__ import main as data_main
from openpi_ar.doctor.__main__ import main as doctor_main
from openpi_ar.errors import UserError
from openpi_ar.worlds.tabletop.__main__ import main as tabletop_main
from openpi_ar.worlds.tabletop.train_tokenizer import main as tokenizer_main
import train

GOLDEN = Path(__file__).parent / "golden"
NOWHERE = Path("/proc/nowhere")
"""Nobody can write there, root neither."""


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (infer.main, "--ckpt tabletop --json {}.json"),
        (infer.main, "--ckpt tabletop --plot {}.png"),
        (infer.main, "--ckpt tabletop --rollout 2 --video {}.mp4"),
        (data_main, f"stats {GOLDEN / 'lerobot/v21_images'} --out {{}}"),
        (doctor_main, f"verify tabletop {GOLDEN / 'pi05'} --json {{}}.json"),
        (tabletop_main, "record {}/demos --episodes 2"),
        (tabletop_main, "pretrain {}/tower"),
        (tabletop_main, "rollout --json {}.json"),
        (tabletop_main, "rollout --video {}.gif"),
        (tokenizer_main, "--out {}.model"),
        (train.main, "--config debug --dry-run --plot {}.png"),
        (train.main, "--config debug --checkpoint-dir {}"),
        (train.main, "--config debug --exp-name unwritable --data.cache-dir {}"),
    ],
)
def test_a_command_says_it_before_the_work(main, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openpi_ar.data.lerobot.write.LeRobotWriter.add", lambda *a, **k: pytest.fail("it worked"))
    monkeypatch.setattr("openpi_ar.policy.Policy.from_checkpoint", lambda *a, **k: pytest.fail("it worked"))
    monkeypatch.setattr(train, "compiled_step", lambda *a: pytest.fail("it worked"))
    with pytest.raises(SystemExit) as e:
        main(line.format(NOWHERE).split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    assert str(NOWHERE) in err and "cannot be written" in err
    assert any(advice in err for advice in ("name another", "choose another --checkpoint-dir", "set OPENPI_AR_CACHE"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_with_what_is_free(tmp_path):
    with pytest.raises(UserError, match=r"deep/er cannot be written: .* are needed \(.* GB free\): choose another"):
        files.check_directory(tmp_path / "deep/er", "choose another", need=10**18)
    files.check_directory(tmp_path / "deep/er", "choose another", need=10**3)
    with pytest.raises(
        UserError, match=r"/dev/full cannot be written: No space .*GB free\): name another file with --json"
    ):
        files.write_json(Path("/dev/full"), {})
    with (
        pytest.raises(UserError, match=r"new cannot be written: .*; name another directory"),
        files.atomic_directory(tmp_path / "new"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_check_changes_nothing(tmp_path):
    (tmp_path / "there.json").write_text("old")
    files.check_file(tmp_path / "there.json", "--json")
    files.check_file(tmp_path / "new.json", "--json")
    files.check_file(None, "--json")
    with pytest.raises(UserError, match="--plot must end in .png, .pdf or .svg"):
        files.check_file(tmp_path / "a.jpg", "--plot", *files.FIGURES)
    with pytest.raises(UserError, match="--json: the folder .*no' does not exist"):
        files.check_file(tmp_path / "no/new.json", "--json")
    with pytest.raises(UserError, match="Is a directory"):
        files.check_file(tmp_path, "--json")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("there.json", "old")]
    files.write_json(tmp_path / "new.json", {"a": np.arange(2)})
    assert json.loads((tmp_path / "new.json").read_text()) == {"a": [0, 1]}


@pytest.mark.parametrize("home", [str(NOWHERE), ""])
def test_a_user_without_a_home_can_still_compile(home):
    script = (
        "from openpi_ar.compilation import keep_compiled_programs as k; import jax; k(); print(jax.jit(lambda: 7)())"
    )
    env = (
        {"JAX_PLATFORMS": "cpu", "HOME": home}
        if home
        else {"JAX_PLATFORMS": "cpu", "OPENPI_AR_CACHE": "~nobody-at-all/x"}
    )
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    note, result = done.stdout.splitlines()
    assert result == "7" and note.startswith("note: compiled programs are not kept") and "OPENPI_AR_CACHE" in note
