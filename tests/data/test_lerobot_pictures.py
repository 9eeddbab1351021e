"""Broken if this fails: a frame of a dataset is another one, lies on its side, or has lost its depth."""

import io

import av
import numpy as np
from PIL import Image
import pytest

from openpi_ar.data.lerobot.meta import read_meta
from openpi_ar.data.lerobot.video import read_frames
from openpi_ar.errors import UserError
from tests.lerobot_fixtures import (
    CAMERAS,
    broken,
    edit_column,
    edit_json,
    source,
)

TOP = f"observation.images.{CAMERAS[0]}"


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("mpeg4", "mp4", {"g": "9", "bf": "2"}),
        ("mpeg4", "mkv", {"g": "100", "bf": "2"}),
        ("mpeg2video", "mp4", {"g": "15", "bf": "2"}),
        ("libx264", "mp4", {"bf": "3", "x264-params": "open-gop=1:keyint=10"}),
    ],
)
def test_every_frame_of_a_video_with_b_frames_is_reached_alone(tmp_path, codec, suffix, options):
    """Also in the middle of a file, where an episode begins that others share."""
    path = broken(tmp_path, "v30_video")
    edit_json(
        path / "meta/info.json",
        lambda info: info.update(video_path=f"{{video_key}}{{chunk_index}}{{file_index}}.{suffix}"),
    )
    meta = read_meta(path)
    span = meta.episodes[2].videos[TOP]
    with av.open(str(span.path), "w") as file:
        stream = file.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for i in range(60):
            image = np.full((64, 64, 3), 20 + 3 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        file.mux(stream.encode(None))
    stamps = np.arange(22) / 10
    for i in range(22):
        frame = next(read_frames(meta, meta.episodes[2], TOP, stamps, [i]))
        assert abs(float(frame.mean()) - (20 + 3 * (38 + i))) < 1.5, i


def test_pictures_are_upright_and_of_eight_bits(tmp_path):
    path = broken(tmp_path, "v21_images")
    image = np.zeros((64, 48, 3), np.uint8)
    image[:8] = 255

    def stored(picture: Image.Image, **options: object) -> dict:
        out = io.BytesIO()
        picture.save(out, **options)
        return {"bytes": out.getvalue(), "path": None}

    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    pictures = [
        stored(Image.fromarray(image), format="PNG"),
        stored(Image.fromarray(np.rot90(image).copy()), format="PNG", exif=turned),
        stored(Image.fromarray(image[..., 0]), format="PNG"),
        stored(Image.fromarray(image[..., 0].astype(np.uint16) * 257), format="PNG"),
        stored(Image.fromarray(image).convert("CMYK"), format="JPEG"),
    ]
    file = path / "data/chunk-000/episode_000000.parquet"
    edit_column(file, TOP, lambda column: column.__setitem__(slice(0, 5), pictures))
    data = source(path)
    for i in range(3):
        np.testing.assert_array_equal(data[i]["images"]["base_0_rgb"], image)
    for i, mode in ((3, "I;16"), (4, "CMYK")):
        with pytest.raises(UserError, match=f"frame {i} has pixels of mode {mode}, expected 8 bits"):
            data[i]
