"""The weight map of Qwen3.5-VL: laws that hold for every rule of every size, and the published 27B's keys."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.families import family_of, qwen35_vl
from mimo_jobs.families.spec import Cut
from mimo_jobs.layout import ComponentLayout as C
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.weights import plan
from mimo_jobs.weights.rules import segments, stored_rows

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/qwen35_27b.json").read_text())
# layers, hidden, ffn, heads, kv heads, GDN value heads, tied, vision depth, hidden, ffn, heads: published sizes
PUBLISHED = {
    "0.8B": (24, 1024, 3584, 8, 2, 16, True, 12, 768, 3072, 12),
    "4B": (32, 2560, 9216, 16, 4, 32, True, 24, 1024, 4096, 16),
    "9B": (32, 4096, 12288, 16, 4, 32, False, 27, 1152, 4304, 16),
    "27B": (64, 5120, 17408, 24, 4, 48, False, 27, 1152, 4304, 16),
}


@dataclass(frozen=True)
class Header:
    dtype: str
    shape: tuple[int, ...]


def config_of(layers, hidden, ffn, heads, kv, values, tied, v_depth, v_hidden, v_ffn, v_heads):
    text = {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": kv, "linear_num_value_heads": values, "linear_num_key_heads": 16, "head_dim": 256,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320, "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    vision = {
        "depth": v_depth, "hidden_size": v_hidden, "intermediate_size": v_ffn, "num_heads": v_heads,
        "out_hidden_size": hidden, "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
    }  # fmt: skip
    return {"model_type": "qwen3_5", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


def test_every_published_27b_key_matches_exactly_one_rule_or_is_passed_through():
    weight_map = qwen35_vl.weight_map(GOLDEN["config"])
    assert len(GOLDEN["tensors"]) == 1199
    owners = Counter(t.name for rule in weight_map.rules for t in rule.hf)
    shapes = {t.name: list(t.shape) for rule in weight_map.rules for t in rule.hf}
    passed = [n for n in GOLDEN["tensors"] if n.startswith(weight_map.passed_through)]
    assert len(passed) == 15 and set(owners.values()) == {1}
    assert shapes == {n: s for n, s in GOLDEN["tensors"].items() if n not in passed}
    matched = plan.match(weight_map, {n: Header("BF16", tuple(s)) for n, s in GOLDEN["tensors"].items()}, "27B")
    assert matched.passed_through == passed and not matched.aliases


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("tp", [1, 2])
def test_every_rule_is_a_permutation_of_rows(size, tp):
    """join(split(x)) is x: HF rows to boxes of every TP rank and back, on row numbers."""
    weight_map = qwen35_vl.weight_map(config_of(*PUBLISHED[size]))
    layout = ParallelLayout(language=C(tp=tp), images=C(tp=tp)).resolve()
    all_segments = [segments(r) for r in weight_map.rules]
    seen = [
        {h: np.zeros((t.rows, t.row_elements if t.row_elements < 8 else 8), int) for h, t in enumerate(r.hf)}
        for r in weight_map.rules
    ]
    for box in plan.boxes(weight_map, layout):
        rule = weight_map.rules[box.rule]
        tensor = rule.stored[box.stored]
        columns = seen[box.rule][0].shape[1]
        first = box.column * columns // tensor.row_elements
        stop = (box.column + box.columns) * columns // tensor.row_elements
        for run in stored_rows(all_segments[box.rule], box.stored, box.row, box.row + box.rows):
            seen[box.rule][run.hf][run.hf_row : run.hf_row + run.count, first:stop] += 1
    for rule, arrays in zip(weight_map.rules, seen, strict=True):
        for h, array in arrays.items():
            assert (array == 1).all(), rule.hf[h].name


def test_gated_qkv_order_is_queries_gates_key_value_per_group():
    d = {"head_dim": 2, "heads": 4, "kv_heads": 2, "q_and_gate": 16, "kv": 4}
    rows = [r for start, n in qwen35_vl.gated_qkv(d) for r in range(start, start + n)]
    q, gate = [[4 * h, 4 * h + 1] for h in range(4)], [[4 * h + 2, 4 * h + 3] for h in range(4)]
    k, v = [[16, 17], [18, 19]], [[20, 21], [22, 23]]
    expected = [*q[:2], *gate[:2], k[0], v[0], *q[2:], *gate[2:], k[1], v[1]]
    assert rows == [row for head in expected for row in head]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("size", PUBLISHED)
def test_boxes_cover_every_checkpoint_tensor_once(size, tp):
    if PUBLISHED[size][4] % tp or PUBLISHED[size][10] % tp:
        return
    weight_map = qwen35_vl.weight_map(config_of(*PUBLISHED[size]))
    layout = ParallelLayout(language=C(tp=tp, pp=3, dp=2), images=C(tp=tp, rank_offset=6 * tp)).resolve()
    plan.check_layout(weight_map, layout)
    area, stages = Counter(), {}
    for box in plan.boxes(weight_map, layout):
        area[box.rule, box.stored] += box.rows * box.columns
        rule = weight_map.rules[box.rule]
        assert set(box.holders) <= set(layout.components[rule.component].ranks)
        if rule.component == "language":
            found = {layout.components["language"].coordinates(r)["pp"] for r in box.holders}
            assert len(found) == 1
            stages.setdefault(rule.stage, set()).update(found)
    for (rule, stored), covered in area.items():
        assert covered == math.prod(weight_map.rules[rule].stored[stored].shape)
    assert stages["first"] == {0} and stages["last"] == {2}


def test_export_shares_hand_every_row_to_one_holder():
    weight_map = qwen35_vl.weight_map(config_of(*PUBLISHED["9B"]))
    headers = {t.name: Header("BF16", t.shape) for r in weight_map.rules for t in r.hf}
    matched = plan.match(weight_map, headers, "9B")
    layout = ParallelLayout(language=C(tp=4), images=C(tp=4, rank_offset=4)).resolve()
    rows, load = Counter(), Counter()
    for share in plan.export_shares(matched, layout):
        tensor = weight_map.rules[share.rule].stored[share.stored]
        rows[share.rule, share.stored] += share.rows
        load[share.rank] += share.rows * tensor.row_elements
        assert share.rank in layout.components[weight_map.rules[share.rule].component].ranks
    assert all(n == weight_map.rules[r].stored[s].rows for (r, s), n in rows.items())
    language = [load[r] for r in range(4)]
    assert max(language) < 1.02 * min(language)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (lambda h: h.update({"model.language_model.layers.0.mlp.gate_projj.weight": Header("BF16", (1,))}),
         ["no rule", "gate_projj"]),
        (lambda h: h.update({"lm_head.weight": Header("BF16", (3, 4))}), ["lm_head.weight", "[3, 4]", "[248320, 5120]"]),
        (lambda h: h.update({"lm_head.weight": Header("I64", h["lm_head.weight"].shape)}), ["lm_head.weight", "I64"]),
        (lambda h: h.update({"model.language_model.layers.0.mlp.up_proj.weight": Header("F64", (17408, 5120))}),
         ["up_proj", "none holds exactly"]),
    ],
)  # fmt: skip
def test_keys_that_do_not_match_are_named(change, said):
    headers = {n: Header("BF16", tuple(s)) for n, s in GOLDEN["tensors"].items()}
    change(headers)
    with pytest.raises(UserError) as error:
        plan.match(qwen35_vl.weight_map(GOLDEN["config"]), headers, "DIR")
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("language", "images", "said"),
    [
        (C(tp=3), C(), "layout.language.tp=3 does not divide linear_num_key_heads=16"),
        (C(tp=16), C(), "layout.language.tp=16 does not divide num_attention_heads=24"),
        (C(), C(tp=3), "layout.images.tp=3 does not divide num_heads=16"),
        (C(pp=65), C(), "layout.language.pp=65 exceeds"),
    ],
)
def test_layouts_a_model_does_not_allow_are_named(language, images, said):
    with pytest.raises(UsageError, match=said.replace(".", r"\.")):
        plan.check_layout(
            qwen35_vl.weight_map(GOLDEN["config"]), ParallelLayout(language=language, images=images).resolve()
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(model_type="qwen3_55"), "did you mean 'qwen3_5'"),
        (lambda c: c["text_config"].update(hidden_size="big"), "text_config.hidden_size='big'"),
        (lambda c: c["text_config"].update(num_key_value_heads=5), "num_attention_heads=24"),
        (lambda c: c["vision_config"].update(out_hidden_size=7), "out_hidden_size=7"),
        (lambda c: c["vision_config"].update(deepstack_visual_indexes=[1]), "deepstack"),
        (lambda c: c["text_config"].update(layer_types=["full_attention"]), "layer_types"),
        (lambda c: c["text_config"].update(layer_types=[[]] * 64), "layer_types"),
        (lambda c: c["text_config"].update(layer_types=None, full_attention_interval=0), "full_attention_interval=0"),
        (lambda c: c["text_config"].update(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
        (lambda c: c.update(tie_word_embeddings="false"), "tie_word_embeddings='false'"),
        (lambda c: c.update(model_type=["qwen3_5"]), "model_type=['qwen3_5'] is not supported"),
        (lambda c: c.pop("vision_config"), "vision_config is missing"),
    ],
)
def test_configs_that_are_not_supported_name_the_field(change, said):
    config = json.loads(json.dumps(GOLDEN["config"]))
    change(config)
    with pytest.raises(UserError) as error:
        family_of(config).weight_map(config)
    assert said in str(error.value)


def test_more_tensor_ranks_than_kv_heads_are_allowed_when_they_share_evenly():
    """The published 0.8B has 2 KV heads; TP 4 gives every rank half a group's rows, as megatron-core does."""
    weight_map = qwen35_vl.weight_map(config_of(*PUBLISHED["0.8B"]))
    layout = ParallelLayout(language=C(tp=4), images=C(tp=4)).resolve()
    plan.check_layout(weight_map, layout)
    area = Counter()
    for box in plan.boxes(weight_map, layout):
        area[box.rule, box.stored] += box.rows * box.columns
    assert all(n == math.prod(weight_map.rules[r].stored[s].shape) for (r, s), n in area.items())
    config = json.loads(json.dumps(GOLDEN["config"]))
    config["text_config"].update(num_key_value_heads=6, linear_num_key_heads=24)
    with pytest.raises(UsageError, match=r"layout\.language\.tp=4 does not divide num_key_value_heads=6"):
        plan.check_layout(qwen35_vl.weight_map(config), ParallelLayout(language=C(tp=4), images=C(tp=1)).resolve())


def test_tied_models_have_no_head_rule_but_an_alias():
    weight_map = qwen35_vl.weight_map(config_of(*PUBLISHED["0.8B"]))
    assert not [t for r in weight_map.rules for t in r.hf if t.name == "lm_head.weight"]
    assert weight_map.aliases == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    assert {t.cut for r in weight_map.rules for t in r.stored if "word_embeddings" in t.name} == {Cut.VOCAB}


def test_dropping_mtp_zeroes_the_config_fields():
    config = qwen35_vl.without_mtp(GOLDEN["config"])
    assert GOLDEN["config"]["text_config"]["mtp_num_hidden_layers"] == 1
    assert config["text_config"]["mtp_num_hidden_layers"] == 0
