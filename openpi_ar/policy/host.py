"""What the host does around compiled programs: what they compute in, what warms them up, and their times."""

import time
from typing import Any

import jax
import numpy as np

from openpi_ar.model_config import ModelConfig
from openpi_ar.types import Observation, Tokens


def inference_dtype(wanted: str) -> str:
    """`auto` is float32 on CPU, where one-row bfloat16 matmuls are 2 to 13 times slower, and bfloat16 elsewhere."""
    if wanted != "auto":
        return wanted
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def resizes_on_device(wanted: str) -> bool:
    """`auto`: where there is a device besides the CPU. There the resize costs the control loop nothing."""
    return wanted == "device" or (wanted == "auto" and jax.default_backend() != "cpu")


def blank_observation(
    cfg: ModelConfig, batch: int, cameras: int, prompt: int, image_size: tuple[int, int] | None = None
) -> Observation:
    """Black images (None: of the model's size) and a prompt that fills its slots, to compile and warm up with."""
    return Observation(
        images=np.zeros((batch, cameras, *(image_size or cfg.siglip.image_size), 3), np.uint8),
        image_mask=np.ones((batch, cameras), bool),
        prompt=Tokens.of(np.zeros((batch, prompt), np.int32)),
        state=np.zeros((batch, cfg.state_dim), np.float32),
    )


class Stopwatch:
    """Times of consecutive stages in ms, each waited for."""

    def __init__(self):
        self.ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, value: Any) -> Any:
        """Waits for the value of the stage that ends here, and returns it."""
        jax.block_until_ready(value)
        now = time.perf_counter()
        self.ms[name] = milliseconds(now - self._last)
        self._last = now
        return value


def milliseconds(seconds: float) -> float:
    """Rounded to microseconds."""
    return round(1000 * seconds, 3)
