"""Which axis of each parameter of pi0 and pi0.5 is cut: see `sharding.py`."""

from openpi_ar.training.sharding_paligemma import PALIGEMMA

PI0: tuple[tuple[str, str], ...] = (
    *PALIGEMMA,
    ("*/layers/*/modulation/kernel", "- cut -"),
    ("*/norm/modulation/kernel", "cut -"),
    ("*action_in/kernel", "- cut"),
    ("*action_out/kernel", "cut -"),
    ("*state_in/kernel", "- cut"),
    ("*_mlp_in/kernel", "cut -"),
    ("*_mlp_out/kernel", "cut -"),
)
