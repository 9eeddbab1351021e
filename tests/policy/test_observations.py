"""Broken if this fails: a file on the command line is taken for another observation than it holds."""

from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from openpi_ar.errors import UserError
from openpi_ar.policy import observations
from openpi_ar.textfile import as_text


def npz(folder: Path, **arrays: object) -> Path:
    path = folder / "frame.npz"
    np.savez(path, front=np.zeros((4, 4, 3), np.uint8), state=np.zeros(4), **arrays)  # pyright: ignore[reportArgumentType]
    return path


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "prompt",
    [
        np.array("öffne es"),
        np.array("öffne es".encode()),
        np.array(["öffne es"]),
        np.array([["öffne es".encode()]]),
    ],
)
def test_a_prompt_may_be_bytes_or_an_array_of_one_text(tmp_path, prompt, flat):
    got = observations.read_npz(npz(tmp_path, prompt=prompt), flat=flat)["prompt"]
    assert type(got) is str and got == "öffne es"


@pytest.mark.parametrize(
    "prompt", [np.array(["a", "b"]), np.array(3), np.array([]), np.array(b"\xff"), np.zeros((2, 2))]
)
def test_a_prompt_that_is_no_text_is_refused_and_shown(tmp_path, prompt):
    with pytest.raises(UserError, match="frame.npz: prompt is .*array.*, expected a text"):
        observations.read_npz(npz(tmp_path, prompt=prompt))


def test_texts_are_taken_as_they_are():
    for value in ("x", b"x", np.str_("x"), np.bytes_(b"x"), ["x"], (b"x",)):
        assert as_text(value, "it") == "x" and type(as_text(value, "it")) is str
    for value in (None, 1, ["x", "y"], [], {"x": 1}, [1]):
        with pytest.raises(UserError, match="it is .*, expected a text"):
            as_text(value, "it")


def test_pictures_of_more_than_eight_bits_are_refused_not_clipped(tmp_path):
    for mode in ("L", "RGB", "P"):
        Image.new(mode, (4, 4)).save(tmp_path / "a.png")
        assert observations.read_image(f"front={tmp_path / 'a.png'}")[1].shape == (4, 4, 3)
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png' of camera 'front' has pixels of mode I;16, expected 8 bits"):
        observations.read_image(f"front={tmp_path / 'a.png'}")


def test_a_camera_twice_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    pair = [f"{name}={tmp_path / 'a.png'}" for name in ("front", "wrist")]
    assert list(observations.given(pair)["images"]) == ["front", "wrist"]
    with pytest.raises(UserError, match="names camera 'front' twice"):
        observations.given([*pair, pair[0]])
