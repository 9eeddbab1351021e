"""Image files as uint8 RGB: what others recorded, and what a command line names."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from openpi_ar.errors import UserError

_EIGHT_BIT = ("RGB", "RGBA", "L", "LA", "P", "1")
"""Pillow's modes that become RGB without loss of anything but transparency; 16-bit depth, for one, would be clipped."""


def read_picture(source: Path | io.BytesIO, where: str) -> np.ndarray:
    """The image, upright, uint8 [h w 3]. Raises UserError, saying where, if it is none or has no pixels of 8 bits."""
    try:
        with Image.open(source) as image:
            if image.mode in _EIGHT_BIT:
                # As LeRobot reads them: upright.
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            mode = image.mode
    except FileNotFoundError as e:
        raise UserError(f"{where} does not exist") from e
    except Exception as e:  # Pillow's decoders raise nearly anything on damaged bytes
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{where} is not a readable image: {reason}") from e
    raise UserError(f"{where} has pixels of mode {mode}, expected 8 bits: {', '.join(_EIGHT_BIT)}")
