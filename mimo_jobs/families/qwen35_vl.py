"""Qwen3.5-VL (dense): hybrid Gated DeltaNet + gated attention language model, ViT with a patch merger.

Read beside transformers/models/qwen3_5/modeling_qwen3_5.py. HF names on the right, checkpoint keys on the left; key
names and cuts are those of megatron-core's GPTModel, SelfAttention, GatedDeltaNet and MLP sharded state dicts.
"""

import copy
from collections.abc import Mapping

from mimo_jobs.errors import UserError
from mimo_jobs.families.spec import BoundRule, Cut, Dims, Family, Hf, Pieces, Rule, Stored, WeightMap, bind, consecutive

COLUMNS, GATED_ROWS, ROWS, VOCAB = Cut.COLUMNS, Cut.GATED_ROWS, Cut.ROWS, Cut.VOCAB
LANGUAGE_PREFIX = "language_model."
IMAGES_PREFIX = "modality_submodules.images.encoders.vision."


def gated_qkv(d: Dims) -> Pieces:
    """HF: q_proj holds [query, gate] per head, then k_proj, v_proj. Megatron: per KV group [queries, gates, key, value]
    (SelfAttention.get_query_key_value_tensors with attention_output_gate)."""
    head, per_group = d["head_dim"], d["heads"] // d["kv_heads"]
    key, value = d["q_and_gate"], d["q_and_gate"] + d["kv"]
    pieces: Pieces = []
    for group in range(d["kv_heads"]):
        members = range(group * per_group, (group + 1) * per_group)
        pieces += [(2 * head * h, head) for h in members]
        pieces += [(2 * head * h + head, head) for h in members]
        pieces += [(key + head * group, head), (value + head * group, head)]
    return pieces


def vision_qkv(d: Dims) -> Pieces:
    """HF: [Q of all heads, K, V]. Megatron: per head [q, k, v] (SelfAttention with as many KV groups as heads)."""
    head = d["v_hidden"] // d["v_heads"]
    return [(part * d["v_hidden"] + h * head, head) for h in range(d["v_heads"]) for part in range(3)]


_T = "model.language_model."
_L = _T + "layers.{i}."

EMBEDDING = [
    consecutive(
        Stored("embedding.word_embeddings.weight", ("vocab", "hidden"), VOCAB),
        Hf(_T + "embed_tokens.weight", ("vocab", "hidden")),
    )
]
FINAL_NORM = [consecutive(Stored("decoder.final_layernorm.weight", ("hidden",)), Hf(_T + "norm.weight", ("hidden",)))]
HEAD = [
    consecutive(Stored("output_layer.weight", ("vocab", "hidden"), VOCAB), Hf("lm_head.weight", ("vocab", "hidden")))
]

_M = "decoder.layers.{i}."
LAYER = [
    consecutive(Stored(_M + "input_layernorm.weight", ("hidden",)), Hf(_L + "input_layernorm.weight", ("hidden",))),
    consecutive(
        Stored(_M + "pre_mlp_layernorm.weight", ("hidden",)), Hf(_L + "post_attention_layernorm.weight", ("hidden",))
    ),
    consecutive(
        Stored(_M + "mlp.linear_fc1.weight", ("two_ffn", "hidden"), GATED_ROWS),
        [Hf(_L + "mlp.gate_proj.weight", ("ffn", "hidden")), Hf(_L + "mlp.up_proj.weight", ("ffn", "hidden"))],
    ),
    consecutive(
        Stored(_M + "mlp.linear_fc2.weight", ("hidden", "ffn"), COLUMNS),
        Hf(_L + "mlp.down_proj.weight", ("hidden", "ffn")),
    ),
]

_A = _M + "self_attention."
FULL_ATTENTION = [
    Rule(
        (Stored(_A + "linear_qkv.weight", ("qkv", "hidden"), ROWS),),
        (
            Hf(_L + "self_attn.q_proj.weight", ("q_and_gate", "hidden")),
            Hf(_L + "self_attn.k_proj.weight", ("kv", "hidden")),
            Hf(_L + "self_attn.v_proj.weight", ("kv", "hidden")),
        ),
        gated_qkv,
    ),
    consecutive(
        Stored(_A + "linear_proj.weight", ("hidden", "q"), COLUMNS), Hf(_L + "self_attn.o_proj.weight", ("hidden", "q"))
    ),
    consecutive(Stored(_A + "q_layernorm.weight", ("head_dim",)), Hf(_L + "self_attn.q_norm.weight", ("head_dim",))),
    consecutive(Stored(_A + "k_layernorm.weight", ("head_dim",)), Hf(_L + "self_attn.k_norm.weight", ("head_dim",))),
]

LINEAR_ATTENTION = [
    consecutive(
        [
            Stored(_A + "in_proj.weight.query", ("gdn_key", "hidden"), ROWS),
            Stored(_A + "in_proj.weight.key", ("gdn_key", "hidden"), ROWS),
            Stored(_A + "in_proj.weight.value", ("gdn_value", "hidden"), ROWS),
        ],
        Hf(_L + "linear_attn.in_proj_qkv.weight", ("gdn_qkv", "hidden")),
    ),
    consecutive(
        Stored(_A + "in_proj.weight.z", ("gdn_value", "hidden"), ROWS),
        Hf(_L + "linear_attn.in_proj_z.weight", ("gdn_value", "hidden")),
    ),
    consecutive(
        Stored(_A + "in_proj.weight.beta", ("gdn_value_heads", "hidden"), ROWS),
        Hf(_L + "linear_attn.in_proj_b.weight", ("gdn_value_heads", "hidden")),
    ),
    consecutive(
        Stored(_A + "in_proj.weight.alpha", ("gdn_value_heads", "hidden"), ROWS),
        Hf(_L + "linear_attn.in_proj_a.weight", ("gdn_value_heads", "hidden")),
    ),
    consecutive(
        [
            Stored(_A + "conv1d.weight.query", ("gdn_key", 1, "gdn_conv"), ROWS),
            Stored(_A + "conv1d.weight.key", ("gdn_key", 1, "gdn_conv"), ROWS),
            Stored(_A + "conv1d.weight.value", ("gdn_value", 1, "gdn_conv"), ROWS),
        ],
        Hf(_L + "linear_attn.conv1d.weight", ("gdn_qkv", 1, "gdn_conv")),
    ),
    consecutive(Stored(_A + "A_log", ("gdn_value_heads",), ROWS), Hf(_L + "linear_attn.A_log", ("gdn_value_heads",))),
    consecutive(
        Stored(_A + "dt_bias", ("gdn_value_heads",), ROWS), Hf(_L + "linear_attn.dt_bias", ("gdn_value_heads",))
    ),
    consecutive(
        Stored(_A + "out_norm.weight", ("gdn_value_dim",)), Hf(_L + "linear_attn.norm.weight", ("gdn_value_dim",))
    ),
    consecutive(
        Stored(_A + "out_proj.weight", ("hidden", "gdn_value"), COLUMNS),
        Hf(_L + "linear_attn.out_proj.weight", ("hidden", "gdn_value")),
    ),
]

_V = "model.visual."
PATCHES = [
    consecutive(
        Stored("patch_embed.weight", ("v_hidden", "v_patch")),
        Hf(_V + "patch_embed.proj.weight", ("v_hidden", "v_channels", "v_time", "v_side", "v_side")),
    ),
    consecutive(Stored("patch_embed.bias", ("v_hidden",)), Hf(_V + "patch_embed.proj.bias", ("v_hidden",))),
    consecutive(
        Stored("pos_embed.weight", ("v_positions", "v_hidden")),
        Hf(_V + "pos_embed.weight", ("v_positions", "v_hidden")),
    ),
]

_B = _V + "blocks.{i}."
VISION_BLOCK = [
    *(
        consecutive(Stored(f"{_M}{m}.{wb}", ("v_hidden",)), Hf(f"{_B}{h}.{wb}", ("v_hidden",)))
        for m, h in (("input_layernorm", "norm1"), ("pre_mlp_layernorm", "norm2"))
        for wb in ("weight", "bias")
    ),
    Rule(
        (Stored(_A + "linear_qkv.weight", ("v_qkv", "v_hidden"), ROWS),),
        (Hf(_B + "attn.qkv.weight", ("v_qkv", "v_hidden")),),
        vision_qkv,
    ),
    Rule((Stored(_A + "linear_qkv.bias", ("v_qkv",), ROWS),), (Hf(_B + "attn.qkv.bias", ("v_qkv",)),), vision_qkv),
    consecutive(
        Stored(_A + "linear_proj.weight", ("v_hidden", "v_hidden"), COLUMNS),
        Hf(_B + "attn.proj.weight", ("v_hidden", "v_hidden")),
    ),
    consecutive(Stored(_A + "linear_proj.bias", ("v_hidden",)), Hf(_B + "attn.proj.bias", ("v_hidden",))),
    consecutive(
        Stored(_M + "mlp.linear_fc1.weight", ("v_ffn", "v_hidden"), ROWS),
        Hf(_B + "mlp.linear_fc1.weight", ("v_ffn", "v_hidden")),
    ),
    consecutive(Stored(_M + "mlp.linear_fc1.bias", ("v_ffn",), ROWS), Hf(_B + "mlp.linear_fc1.bias", ("v_ffn",))),
    consecutive(
        Stored(_M + "mlp.linear_fc2.weight", ("v_hidden", "v_ffn"), COLUMNS),
        Hf(_B + "mlp.linear_fc2.weight", ("v_hidden", "v_ffn")),
    ),
    consecutive(Stored(_M + "mlp.linear_fc2.bias", ("v_hidden",)), Hf(_B + "mlp.linear_fc2.bias", ("v_hidden",))),
]

MERGER = [
    consecutive(Stored("merger.norm.weight", ("v_hidden",)), Hf(_V + "merger.norm.weight", ("v_hidden",))),
    consecutive(Stored("merger.norm.bias", ("v_hidden",)), Hf(_V + "merger.norm.bias", ("v_hidden",))),
    consecutive(Stored("merger.linear_fc1.weight", ("v_merged", "v_merged"), ROWS), Hf(_V + "merger.linear_fc1.weight", ("v_merged", "v_merged"))),
    consecutive(Stored("merger.linear_fc1.bias", ("v_merged",), ROWS), Hf(_V + "merger.linear_fc1.bias", ("v_merged",))),
    consecutive(Stored("merger.linear_fc2.weight", ("v_out", "v_merged"), COLUMNS), Hf(_V + "merger.linear_fc2.weight", ("v_out", "v_merged"))),
    consecutive(Stored("merger.linear_fc2.bias", ("v_out",)), Hf(_V + "merger.linear_fc2.bias", ("v_out",))),
]  # fmt: skip


def dims(config: Mapping) -> dict[str, int]:
    """Every dimension that the rules name, from an HF config.json.

    Raises:
        UserError: a field is missing, is not a positive integer, or contradicts another.
    """
    text, vision = _section(config, "text_config"), _section(config, "vision_config")

    def number(section: Mapping, where: str, field: str, default: int) -> int:
        value = section.get(field, default)
        most = _MOST.get(field, 1 << 31)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UserError(f"config.json: {where}.{field}={value!r}: expected an integer from 1 to {most}")
        return value

    t = {short: number(text, "text_config", *field) for short, field in _TEXT_FIELDS.items()}
    v = {short: number(vision, "vision_config", *field) for short, field in _VISION_FIELDS.items()}
    for what, value, by, divisor in (
        ("text_config.num_attention_heads", t["heads"], "num_key_value_heads", t["kv_heads"]),
        ("text_config.linear_num_value_heads", t["gdn_value_heads"], "linear_num_key_heads", t["gdn_key_heads"]),
        ("vision_config.hidden_size", v["v_hidden"], "num_heads", v["v_heads"]),
    ):
        if value % divisor:
            raise UserError(f"config.json: {what}={value} is not a multiple of {by}={divisor}")
    if v["v_out"] != t["hidden"]:
        raise UserError(
            f"config.json: vision_config.out_hidden_size={v['v_out']} differs from text_config.hidden_size={t['hidden']}"
        )
    q, gdn_key, gdn_value = (
        t["heads"] * t["head_dim"],
        t["gdn_key_heads"] * t["gdn_key_dim"],
        t["gdn_value_heads"] * t["gdn_value_dim"],
    )
    kv = t["kv_heads"] * t["head_dim"]
    return t | v | {
        "two_ffn": 2 * t["ffn"], "q": q, "q_and_gate": 2 * q, "kv": kv, "qkv": 2 * q + 2 * kv,
        "gdn_key": gdn_key, "gdn_value": gdn_value, "gdn_qkv": 2 * gdn_key + gdn_value,
        "v_qkv": 3 * v["v_hidden"], "v_patch": v["v_channels"] * v["v_time"] * v["v_side"] ** 2,
        "v_merged": v["v_hidden"] * v["v_merge"] ** 2,
    }  # fmt: skip


# dim -> (field, default). The defaults are Qwen3_5TextConfig's and Qwen3_5VisionConfig's: save_pretrained leaves out equal ones.
_TEXT_FIELDS = {
    "vocab": ("vocab_size", 248320), "hidden": ("hidden_size", 4096), "ffn": ("intermediate_size", 12288),
    "layers": ("num_hidden_layers", 32), "heads": ("num_attention_heads", 16), "kv_heads": ("num_key_value_heads", 4),
    "head_dim": ("head_dim", 256), "gdn_key_heads": ("linear_num_key_heads", 16),
    "gdn_value_heads": ("linear_num_value_heads", 32), "gdn_key_dim": ("linear_key_head_dim", 128),
    "gdn_value_dim": ("linear_value_head_dim", 128), "gdn_conv": ("linear_conv_kernel_dim", 4),
}  # fmt: skip
_VISION_FIELDS = {
    "v_depth": ("depth", 27), "v_hidden": ("hidden_size", 1152), "v_ffn": ("intermediate_size", 4304),
    "v_heads": ("num_heads", 16), "v_channels": ("in_channels", 3), "v_time": ("temporal_patch_size", 2),
    "v_side": ("patch_size", 16), "v_merge": ("spatial_merge_size", 2), "v_out": ("out_hidden_size", 3584),
    "v_positions": ("num_position_embeddings", 2304),
}  # fmt: skip


# Far beyond any model: a damaged number must not become a plan of a billion rows.
_MOST: dict[str, int] = {
    "num_hidden_layers": 4096, "depth": 4096, "num_attention_heads": 16384, "num_key_value_heads": 16384,
    "linear_num_key_heads": 16384, "linear_num_value_heads": 16384, "num_heads": 16384,
}  # fmt: skip


def _section(config: Mapping, name: str) -> Mapping:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise UserError(f"config.json: {name} is missing; a Qwen3.5-VL config has text_config and vision_config")
    return section


def layer_types(text: Mapping) -> list[str]:
    """``linear_attention`` or ``full_attention`` per layer (Qwen3_5TextConfig.__post_init__ fills it the same way)."""
    layers = text.get("num_hidden_layers", _TEXT_FIELDS["layers"][1])
    every = text.get("full_attention_interval", 4)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise UserError(f"config.json: text_config.full_attention_interval={every!r}: expected a positive integer")
    types = text.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)
    ]
    known = ("full_attention", "linear_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        found = f"{len(types)} entries" if isinstance(types, list) else repr(types)
        raise UserError(
            f"config.json: text_config.layer_types is {found}; expected num_hidden_layers={layers} of {', '.join(known)}"
        )
    return list(types)


def weight_map(config: Mapping) -> WeightMap:
    """The weight map of one dense Qwen3.5-VL model; raises `UserError` for what is not supported."""
    d, text = dims(config), config["text_config"]
    if text.get("attention_bias"):
        raise UserError("config.json: text_config.attention_bias=true is not supported (no published Qwen3.5 has it)")
    if text.get("attn_output_gate") is False:
        raise UserError("config.json: text_config.attn_output_gate=false is not supported (q_proj holds no gate)")
    if config["vision_config"].get("deepstack_visual_indexes"):
        raise UserError("config.json: vision_config.deepstack_visual_indexes is set; Qwen3.5 has no deepstack")
    tied = config.get("tie_word_embeddings", False)  # transformers reads the top level only, whatever text_config says
    if not isinstance(tied, bool):
        raise UserError(f"config.json: tie_word_embeddings={tied!r}: expected true or false")
    rules: list[BoundRule] = []
    language = {"dims": d, "component": "language", "prefix": LANGUAGE_PREFIX}
    rules += bind(EMBEDDING, stage="first", **language)
    kinds = {"full_attention": FULL_ATTENTION, "linear_attention": LINEAR_ATTENTION}
    for i, kind in enumerate(layer_types(text)):
        rules += bind([*LAYER, *kinds[kind]], stage=i, i=i, **language)
    rules += bind(FINAL_NORM if tied else [*FINAL_NORM, *HEAD], stage="last", **language)
    images = {"dims": d, "component": "images", "stage": "first", "prefix": IMAGES_PREFIX}
    rules += bind(PATCHES, **images)
    for i in range(d["v_depth"]):
        rules += bind(VISION_BLOCK, i=i, **images)
    rules += bind(MERGER, **images)
    return WeightMap(
        rules=tuple(rules),
        aliases={"lm_head.weight": _T + "embed_tokens.weight"} if tied else {},
        passed_through=("mtp.",),
        num_layers=d["layers"],
        divisors={
            "language": (
                ("num_attention_heads", d["heads"]),
                ("linear_num_key_heads", d["gdn_key_heads"]), ("linear_num_value_heads", d["gdn_value_heads"]),
                ("intermediate_size", d["ffn"]),
            ),
            "images": (
                ("num_heads", d["v_heads"]), ("intermediate_size", d["v_ffn"]),
                ("merged hidden size", d["v_merged"]),
            ),
        },
        groups={"language": ("num_key_value_heads", d["kv_heads"])},
    )  # fmt: skip


def without_mtp(config: Mapping) -> dict:
    """The config of the same model without its multi-token-prediction layers."""
    config = copy.deepcopy(dict(config))
    for section in (config, config.get("text_config", {})):
        for field in ("mtp_num_hidden_layers", "num_nextn_predict_layers"):
            if field in section:
                section[field] = 0
    return config


FAMILY = Family(
    model_type="qwen3_5",
    weight_map=weight_map,
    rules_version=1,
    drop_passed_through=without_mtp,
)
