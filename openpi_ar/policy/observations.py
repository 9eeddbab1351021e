"""Observations from the command line: image files, numbers, .npz."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
import zipfile

import numpy as np

from openpi_ar.data.pictures import read_picture
from openpi_ar.errors import UserError
from openpi_ar.textfile import as_text


def given(
    images: Sequence[str] = (),
    state: Sequence[float] | None = None,
    prompt: str | None = None,
    file: Path | None = None,
    *,
    flat: bool = False,
    named: bool = True,
) -> dict[str, Any]:
    """A raw observation of what is given, and no more: "images", "state", "prompt".

    Args:
        images: camera=file for each camera; or, unless `named`, files alone in the model's order, which give a list.
        state: real units; in place of the file's.
        prompt: in place of the file's.
        file: .npz with an image per camera by its name, "state" and "prompt", or of LeRobot's features
            (`observation.state`).
        flat: the file holds what a robot sends under its raw keys (`RobotSpec`); they are left where they are.

    Raises:
        UserError: a file that is missing or is not what it should be.
    """
    raw: dict[str, Any] = {} if file is None else read_npz(file, flat=flat)
    if images:
        found = [read_image(item) for item in images]
        names = [camera for camera, _ in found]
        if "" in names and (named or any(names)):
            raise UserError(f"--images takes camera=file, found {images[names.index('')]!r}; for example front=a.png")
        if twice := [name for i, name in enumerate(names) if name and name in names[:i]]:
            raise UserError(f"--images names camera {twice[0]!r} twice: give each of its own file once")
        raw["images"] = dict(found) if all(names) else [image for _, image in found]
    if state is not None:
        raw["state"] = np.asarray(state, np.float32)
    if prompt is not None:
        raw["prompt"] = prompt
    return raw


def read_image(item: str) -> tuple[str, np.ndarray]:
    """camera=file -> (camera, uint8 [h w 3]); a file alone -> ("", ...). Raises UserError if there is no such image."""
    camera, equals, file = item.partition("=")
    if not equals or Path(item).is_file():
        camera, file = "", item
    elif not camera or not file:
        raise UserError(f"--images takes camera=file, found {item!r}; for example front=a.png")
    return camera, read_picture(Path(file), f"image file {file!r}" + (f" of camera {camera!r}" if camera else ""))


def read_npz(path: Path, *, flat: bool = False) -> dict[str, Any]:
    """An .npz of one observation; all but state and prompt are images, unless `flat`. Raises UserError if the file is
    missing or holds anything but plain arrays."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError:
        raise UserError(f"observation file {str(path)!r} does not exist") from None
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as e:
        raise UserError(f"{str(path)!r} is not an .npz file with plain arrays: {e}") from None
    raw: dict[str, Any] = {}
    if "state" in arrays:
        raw["state"] = arrays.pop("state")
    if "prompt" in arrays:
        raw["prompt"] = as_text(arrays.pop("prompt"), f"{path}: prompt")
    # LeRobot's names of features tell what they are; anything else is an image.
    own = {key: value for key, value in arrays.items() if flat or key.startswith(("observation.", "observation/"))}
    images = {key: value for key, value in arrays.items() if key not in own}
    return {**raw, **own} | ({} if own and not images else {"images": images})
