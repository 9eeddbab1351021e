"""The name table of PaliGemma: one row a tensor, our path <-> big_vision's (JAX) <-> transformers' (PyTorch).

big_vision's `models/vit.py` and `models/ppp/gemma.py` define its side. pi0's table (`checkpoints/pi0/names.py`) is this
one under other prefixes, and the action tower.

    w m n h  SigLIP width, mlp width, heads, head dim     p  patch     T  patches of an image     C  colours
    D F      tower: width, mlp width                      V  vocabulary
    N K H    heads, key/value heads, head dim             R  LoRA rank
    c        fixed: 2 (keys and values, gate and up)
"""

from openpi_ar.checkpoints.family import Row

FIXED = {"c": 2, "C": 3}

_VIT = "vision_tower.vision_model"
_PROJECTOR = "multi_modal_projector.linear"
_LM = "language_model.model"

EMBED_TOKENS = f"{_LM}.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
"""The same matrix as EMBED_TOKENS, where a file has it at all."""


def _rows(prefix: tuple[str, str, str], *specs: tuple[str, str, str, tuple[str, ...], str]) -> list[Row]:
    ours, openpi, torch = prefix
    return [
        Row(ours + a, openpi + b, layout, tuple(f"{torch}.{name}" for name in names), to_torch)
        for a, b, layout, names, to_torch in specs
    ]


def _siglip(jax: str, torch: str, projector: str) -> list[Row]:
    block = ("img/blocks/layers/", f"{jax}/img/Transformer/encoderblock/", f"{torch}.encoder.layers.{{}}")
    attn = "MultiHeadDotProductAttention_0"
    qkv = [
        row
        for x, name in (("q", "query"), ("k", "key"), ("v", "value"))
        for row in (
            (f"attn/{x}/w", f"{attn}/{name}/kernel", "w n h", (f"self_attn.{x}_proj.weight",), "(n h) w"),
            (f"attn/{x}_bias", f"{attn}/{name}/bias", "n h", (f"self_attn.{x}_proj.bias",), "(n h)"),
        )
    ]
    norms = [
        (f"norm{i + 1}/{a}", f"LayerNorm_{i}/{a}", "w", (f"layer_norm{i + 1}.{b}",), "w")
        for i in (0, 1)
        for a, b in (("scale", "weight"), ("bias", "bias"))
    ]
    pos = Row(
        "img/pos_embedding",
        f"{jax}/img/pos_embedding",
        "T w",
        (f"{torch}.embeddings.position_embedding.weight",),
        "T w",
        lead=True,
    )
    return [
        *_rows(
            ("img/patch_", f"{jax}/img/embedding/", f"{torch}.embeddings.patch_embedding"),
            ("kernel", "kernel", "p1 p2 C w", ("weight",), "w C p1 p2"),
            ("bias", "bias", "w", ("bias",), "w"),
        ),
        pos,
        *_rows(
            block,
            *norms,
            *qkv,
            ("attn/out/w", f"{attn}/out/kernel", "n h w", ("self_attn.out_proj.weight",), "w (n h)"),
            ("attn/out_bias", f"{attn}/out/bias", "w", ("self_attn.out_proj.bias",), "w"),
            ("fc1/kernel", "MlpBlock_0/Dense_0/kernel", "w m", ("mlp.fc1.weight",), "m w"),
            ("fc1/bias", "MlpBlock_0/Dense_0/bias", "m", ("mlp.fc1.bias",), "m"),
            ("fc2/kernel", "MlpBlock_0/Dense_1/kernel", "m w", ("mlp.fc2.weight",), "w m"),
            ("fc2/bias", "MlpBlock_0/Dense_1/bias", "w", ("mlp.fc2.bias",), "w"),
        ),
        *_rows(
            ("img/norm/", f"{jax}/img/Transformer/encoder_norm/", f"{torch}.post_layernorm"),
            ("scale", "scale", "w", ("weight",), "w"),
            ("bias", "bias", "w", ("bias",), "w"),
        ),
        *_rows(
            ("img/head/", f"{jax}/img/head/", projector),
            ("kernel", "kernel", "w D", ("weight",), "D w"),
            ("bias", "bias", "D", ("bias",), "D"),
        ),
    ]


def tower(ours: str, jax: str, one: str, torch: str, d: str, f: str, r: str) -> list[Row]:
    """Rows of a tower; `one` is openpi's suffix for the second tower, whose norms have AdaRMS. `d`, `f` and `r` are
    the letters of its width, MLP width and LoRA rank."""

    def norm(ours: str, openpi: str, torch: str) -> list[tuple[str, str, str, tuple[str, ...], str]]:
        ada, dense, bias = f"{ours}/modulation", f"{openpi}{one}/Dense_0", f"(t {d})"
        scale = (f"{ours}/scale", f"{openpi}{one}/scale", d, (f"{torch}.weight",), d)
        modulation = [
            (f"{ada}/kernel", f"{dense}/kernel", f"{d}1 (t {d}2)", (f"{torch}.dense.weight",), f"(t {d}2) {d}1"),
            (f"{ada}/bias", f"{dense}/bias", bias, (f"{torch}.dense.bias",), bias),
        ]
        return [scale, *modulation] if one else [scale]

    attn, mlp = "self_attn", f"mlp{one}"
    return [
        *_rows(
            (f"{ours}/blocks/layers/", f"{jax}/llm/layers/", f"{torch}.layers.{{}}"),
            *norm("attn_norm", "pre_attention_norm", "input_layernorm"),
            *norm("mlp_norm", "pre_ffw_norm", "post_attention_layernorm"),
            ("q/w", f"attn/q_einsum{one}/w", f"N {d} H", (f"{attn}.q_proj.weight",), f"(N H) {d}"),
            (
                "kv/w",
                f"attn/kv_einsum{one}/w",
                f"c K {d} H",
                (f"{attn}.k_proj.weight", f"{attn}.v_proj.weight"),
                f"(K H) {d}",
            ),
            ("out/w", f"attn/attn_vec_einsum{one}/w", f"N H {d}", (f"{attn}.o_proj.weight",), f"{d} (N H)"),
            (
                "mlp/gate_up",
                f"{mlp}/gating_einsum",
                f"c {d} {f}",
                ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
                f"{f} {d}",
            ),
            ("mlp/down", f"{mlp}/linear", f"{f} {d}", ("mlp.down_proj.weight",), f"{d} {f}"),
            # openpi's PyTorch port has no LoRA.
            ("q/lora_a", f"attn/q_einsum{one}/lora_a", f"N {d} {r}", (), ""),
            ("q/lora_b", f"attn/q_einsum{one}/lora_b", f"N {r} H", (), ""),
            ("kv/lora_a", f"attn/kv_einsum{one}/lora_a", f"c K {d} {r}", (), ""),
            ("kv/lora_b", f"attn/kv_einsum{one}/lora_b", f"c K {r} H", (), ""),
            ("out/lora_a", f"attn/attn_vec_einsum{one}/lora_a", f"N H {r}", (), ""),
            ("out/lora_b", f"attn/attn_vec_einsum{one}/lora_b", f"N {r} {d}", (), ""),
            ("mlp/gate_up_lora_a", f"{mlp}/gating_einsum_lora_a", f"c {d} {r}", (), ""),
            ("mlp/gate_up_lora_b", f"{mlp}/gating_einsum_lora_b", f"c {r} {f}", (), ""),
            ("mlp/down_lora_a", f"{mlp}/linear_lora_a", f"{f} {r}", (), ""),
            ("mlp/down_lora_b", f"{mlp}/linear_lora_b", f"{r} {d}", (), ""),
        ),
        *_rows((f"{ours}/", f"{jax}/llm/", torch), *norm("norm", "final_norm", "norm")),
    ]


def vlm_rows(jax: str, vit: str, projector: str, lm: str) -> tuple[Row, ...]:
    """SigLIP, embedding and tower: `jax` is the prefix of big_vision's tree, the others those of PyTorch's modules."""
    return (
        *_siglip(jax, vit, projector),
        Row("embedder/table", f"{jax}/llm/embedder/input_embedding", "V D", (f"{lm}.embed_tokens.weight",), "V D"),
        *tower("vlm", jax, "", lm, "D", "F", "R"),
    )


ROWS = vlm_rows("params", _VIT, _PROJECTOR, _LM)

IGNORED: tuple[tuple[str, str], ...] = (
    (r".*\.rotary_emb\.inv_freq", "RoPE's frequencies are computed"),
    (r".*\.embeddings\.position_ids", "a constant 0, 1, 2, ..."),
)

# Versions of the transformers library differ in where `model.` stands and whether SigLIP is a `vision_model`.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"(model\.)?language_model\.(model\.)?(?=layers|norm|embed_tokens)", f"{_LM}."),
    (r"(model\.)?vision_tower\.(vision_model\.)?", f"{_VIT}."),
    (r"(model\.)?multi_modal_projector\.linear", _PROJECTOR),
    (r"(language_model\.)?lm_head\.weight", LM_HEAD),
)
