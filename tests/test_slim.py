"""If this fails, a checkpoint to hand out is not the one it was made from, or names the machine it was made on."""

import jax
import numpy as np
import pytest

from openpi_ar.checkpoints import store
from openpi_ar.checkpoints.slim import main, slim


def test_slim_keeps_parameters_to_bfloat16_and_drops_the_rest(tiny_checkpoint, tmp_path):
    size = slim(tiny_checkpoint, tmp_path / "small", "bfloat16")
    assert size == sum(f.stat().st_size for f in (tmp_path / "small").rglob("*") if f.is_file())
    cfg, model, tokenizer, _ = store.load_policy_checkpoint(tmp_path / "small")
    want_cfg, want, _, _ = store.load_policy_checkpoint(tiny_checkpoint)
    assert cfg == want_cfg
    assert tokenizer.vocab_size <= cfg.model.vocab_size
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(model), strict=True):
        assert b.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(a.astype("bfloat16"), np.float32), b)
    assert not (tmp_path / "small" / "train_state").exists()
    texts = [f for f in (tmp_path / "small").rglob("*") if f.suffix in (".txt", ".json")]
    assert not any(str(tmp_path) in f.read_text() for f in texts)


def test_an_existing_target_is_left_alone(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit) as exit_info:
        main([str(tiny_checkpoint), str(tmp_path / "there")])
    assert exit_info.value.code == 2
    assert "exists" in capsys.readouterr().err
    assert not list((tmp_path / "there").iterdir())
