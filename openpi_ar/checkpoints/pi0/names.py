"""The name table of pi0 and pi0.5: one row a tensor, our path <-> openpi's (JAX) <-> PyTorch's (openpi and LeRobot).

`openpi/models/gemma.py`, `siglip.py` and `pi0.py` define openpi's side, its `examples/convert_jax_model_to_pytorch.py`
PyTorch's; big_vision's PaliGemma `.npz` is openpi's tree without the second tower, `params/` in place of `PaliGemma/`.

    w m n h  SigLIP width, mlp width, heads, head dim     p  patch     T  patches of an image     C  colours
    D F      first tower: width, mlp width                V  vocabulary
    E G      second tower: width, mlp width               X  action dim    P  state dim
    N K H    heads, key/value heads, head dim, shared by the towers
    R S      LoRA rank of the first and the second tower
    c t      fixed: 2 (keys and values, gate and up, actions and time), 3 (scale, shift, gate)
"""

import re

from openpi_ar.checkpoints.family import Row

FIXED = {"c": 2, "t": 3, "C": 3}

_VIT = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
_PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
_LM = "paligemma_with_expert.paligemma.model.language_model"
_EXPERT = "paligemma_with_expert.gemma_expert.model"

EMBED_TOKENS = f"{_LM}.embed_tokens.weight"
LM_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
"""The same matrix as EMBED_TOKENS: `safetensors` keeps only this name of the two, LeRobot writes both."""
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


def _rows(prefix: tuple[str, str, str], *specs: tuple[str, str, str, tuple[str, ...], str]) -> list[Row]:
    ours, openpi, torch = prefix
    return [
        Row(ours + a, openpi + b, layout, tuple(f"{torch}.{name}" for name in names), to_torch)
        for a, b, layout, names, to_torch in specs
    ]


def _siglip() -> list[Row]:
    block = ("img/blocks/layers/", "PaliGemma/img/Transformer/encoderblock/", f"{_VIT}.encoder.layers.{{}}")
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
        "PaliGemma/img/pos_embedding",
        "T w",
        (f"{_VIT}.embeddings.position_embedding.weight",),
        "T w",
        lead=True,
    )
    return [
        *_rows(
            ("img/patch_", "PaliGemma/img/embedding/", f"{_VIT}.embeddings.patch_embedding"),
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
            ("img/norm/", "PaliGemma/img/Transformer/encoder_norm/", f"{_VIT}.post_layernorm"),
            ("scale", "scale", "w", ("weight",), "w"),
            ("bias", "bias", "w", ("bias",), "w"),
        ),
        *_rows(
            ("img/head/", "PaliGemma/img/head/", _PROJECTOR),
            ("kernel", "kernel", "w D", ("weight",), "D w"),
            ("bias", "bias", "D", ("bias",), "D"),
        ),
    ]


def _tower(ours: str, one: str, torch: str, d: str, f: str, r: str) -> list[Row]:
    """Rows of a tower; `one` is openpi's suffix for the second tower, whose norms have AdaRMS."""

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
            (f"{ours}/blocks/layers/", "PaliGemma/llm/layers/", f"{torch}.layers.{{}}"),
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
        *_rows((f"{ours}/", "PaliGemma/llm/", torch), *norm("norm", "final_norm", "norm")),
    ]


def _linear(ours: str, name: str, layout: str, to_torch: str, bias: str) -> list[Row]:
    return [
        Row(f"{ours}/kernel", f"{name}/kernel", layout, (f"{name}.weight",), to_torch),
        Row(f"{ours}/bias", f"{name}/bias", bias, (f"{name}.bias",), bias),
    ]


ROWS: tuple[Row, ...] = (
    *_siglip(),
    Row("embedder/table", "PaliGemma/llm/embedder/input_embedding", "V D", (EMBED_TOKENS,), "V D"),
    *_tower("vlm", "", _LM, "D", "F", "R"),
    *_tower("expert", "_1", _EXPERT, "E", "G", "S"),
    *_linear("action_in", "action_in_proj", "X E", "E X", "E"),
    *_linear("action_out", "action_out_proj", "E X", "X E", "X"),
    *_linear("time_mlp_in", "time_mlp_in", "E1 E2", "E2 E1", "E"),
    *_linear("time_mlp_out", "time_mlp_out", "E1 E2", "E2 E1", "E"),
    *_linear("state_in", "state_proj", "P E", "E P", "E"),
    *_linear("action_time_mlp_in", "action_time_mlp_in", "(c E1) E2", "E2 (c E1)", "E"),
    *_linear("action_time_mlp_out", "action_time_mlp_out", "E1 E2", "E2 E1", "E"),
)

IGNORED: tuple[tuple[str, str], ...] = (
    (re.escape(EXPERT_HEAD), "the second tower has no vocabulary: random and never used"),
    (r".*\.rotary_emb\.inv_freq", "RoPE's frequencies are computed"),
    (r".*\.embeddings\.position_ids", "a constant 0, 1, 2, ..."),
)

RENAMES: tuple[tuple[str, str], ...] = (
    (r"params/", "PaliGemma/"),  # big_vision's PaliGemma
    (r"model\.(?=action_|time_|state_|paligemma_with_expert\.)", ""),  # LeRobot's policies
    # PaliGemma as the transformers library writes it.
    (r"(model\.)?language_model\.(model\.)?(?=layers|norm|embed_tokens)", f"{_LM}."),
    (r"(model\.)?vision_tower\.vision_model", _VIT),
    (r"(model\.)?multi_modal_projector\.linear", _PROJECTOR),
    (r"(language_model\.)?lm_head\.weight", LM_HEAD),
)
