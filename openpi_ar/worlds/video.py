"""Episodes as video: cameras side by side, the prompt and the generated subtask underneath."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
import dataclasses
from pathlib import Path
import textwrap

import av
from av.container import OutputContainer
from av.video.stream import VideoStream
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openpi_ar import files

SUFFIXES = (".mp4", ".gif")

_PANEL = 256
_FONT = 15
_LINES = 3
"""Two for the prompt, one for the subtask."""


def draw_frame(images: Mapping[str, np.ndarray], prompt: str, text: str, *, right: bool | None = None) -> np.ndarray:
    """One frame, uint8 [h w 3] with even sides.

    Args:
        images: uint8 [h w 3] by camera name, enlarged to 256 pixels of height and put side by side.
        prompt: the task, on up to two lines.
        text: the generated subtask, on one line.
        right: colours it: True green, False red, None white.
    """
    sizes = [(round(image.shape[1] * _PANEL / image.shape[0]), _PANEL) for image in images.values()]
    nearest = Image.Resampling.NEAREST
    panels = [Image.fromarray(x).resize(size, nearest) for x, size in zip(images.values(), sizes, strict=True)]
    width = sum(p.width for p in panels)
    font = ImageFont.load_default(size=_FONT)
    line = _FONT + 6
    frame = Image.new("RGB", (width + width % 2, _PANEL + line * _LINES + (line * _LINES) % 2), (20, 20, 24))
    x = 0
    for panel in panels:
        frame.paste(panel, (x, 0))
        x += panel.width
    draw = ImageDraw.Draw(frame)
    letters = max(10, int(width / font.getlength("n")))
    lines = [*textwrap.wrap(prompt, letters)[:2], "", ""][:2]
    for i, words in enumerate(lines):
        draw.text((4, _PANEL + 2 + i * line), words, font=font, fill=(190, 190, 200))
    color = {None: (255, 255, 255), True: (120, 230, 120), False: (255, 120, 110)}[right]
    draw.text((4, _PANEL + 2 + 2 * line), f"subtask: {text}"[:letters], font=font, fill=color)
    return np.asarray(frame)


@dataclasses.dataclass(frozen=True)
class Shot:
    """One control step: images by camera name, the generated subtask, and whether it is right (None: not judged)."""

    images: Mapping[str, np.ndarray]
    text: str
    right: bool | None


class VideoWriter:
    """Writes frames of one size to an .mp4 (H.264) or .gif file, `fps` a second. A context manager.

    Raises UserError for another extension, or a place that cannot be written.
    """

    def __init__(self, path: str | Path, fps: int):
        self.path, self.fps = Path(path), fps
        files.check_file(self.path, "--video", *SUFFIXES)
        self._open: tuple[OutputContainer, VideoStream] | None = None
        self._gif: list[Image.Image] = []

    def add_episode(self, prompt: str, shots: Sequence[Shot]) -> None:
        """Append an episode, each step drawn with the prompt and the subtask."""
        for shot in shots:
            frame = draw_frame(shot.images, prompt, shot.text, right=shot.right)
            if self.path.suffix.lower() == ".gif":
                # One palette per frame costs little and keeps the blocks' colours.
                self._gif.append(Image.fromarray(frame).quantize(64))
            else:
                with self._writing():
                    self._encode(frame)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        """Finishes the file; without frames there is none."""
        with self._writing():
            if self._open is not None:
                container, stream = self._open
                container.mux(stream.encode())
                container.close()
            if self._gif:
                first, *rest = self._gif
                first.save(self.path, save_all=True, append_images=rest, duration=1000 // self.fps, loop=0)

    def _writing(self) -> AbstractContextManager[None]:
        return files.writing(self.path, "name another file with --video")

    def _encode(self, frame: np.ndarray) -> None:
        if self._open is None:
            container = av.open(str(self.path), "w")
            stream = container.add_stream("libx264", rate=self.fps)
            stream.height, stream.width = frame.shape[:2]
            stream.pix_fmt = "yuv420p"
            self._open = container, stream
        container, stream = self._open
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
