"""Which axis of each parameter of PaliGemma is cut: see `sharding.py`. pi0's table is this one and more rows."""

PALIGEMMA: tuple[tuple[str, str], ...] = (
    # Norms, biases and gates: too small to be worth the communication.
    ("*scale", "whole"),
    ("*bias", "whole"),
    # [L in hidden out] and the like: the model's width is what every matrix has and is a multiple of any device count.
    ("*/layers/q/w", "- - cut -"),
    ("*/layers/kv/w", "- - - cut -"),
    ("*/layers/out/w", "- - - cut"),
    ("*/layers/mlp/gate_up", "- - cut -"),
    ("*/layers/mlp/down", "- - cut"),
    ("*lora_a", "whole"),
    ("*lora_b", "whole"),
    ("*embedder/table", "- cut"),
    ("*img/patch_kernel", "- - - cut"),
    ("*img/pos_embedding", "- cut"),
    ("*img/*/attn/[qkv]/w", "- cut - -"),
    ("*img/*/attn/out/w", "- - - cut"),
    ("*img/*/fc[12]/kernel", "- cut -"),
    ("*img/head/kernel", "cut -"),
)
