"""An independent statement of the weight map: Hugging Face tensors to the parameters of one rank, by plain slicing.

Written apart from `mimo_jobs.weights` and `mimo_jobs.families` on purpose: it is the oracle that they are tested
against. It is linear in the weights, so it maps gradients too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mimo_jobs.layout import LANGUAGE
from mimo_jobs.modeling.build import IMAGES, BuiltModel

_LANGUAGE = "model.language_model."
_VISION = "model.visual."


def reference_parameters(built: BuiltModel, hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter of this rank's ``built.language`` / ``built.vision`` to its value; names start with the component."""
    found = {}
    if built.language is not None:
        found |= {f"{LANGUAGE}.{name}": value for name, value in _language(built, hf).items()}
    if built.vision is not None:
        found |= {f"{IMAGES}.{name}": value for name, value in _vision(built, hf).items()}
    return found


def live_parameters(built: BuiltModel) -> dict[str, torch.nn.Parameter]:
    """The parameters under the same names."""
    found = {}
    for component, module in ((LANGUAGE, built.language), (IMAGES, built.vision)):
        if module is not None:
            found |= {f"{component}.{name}": parameter for name, parameter in module.named_parameters()}
    return found


def load_reference(built: BuiltModel, hf: Mapping[str, Tensor]) -> None:
    """Fill the model from a Hugging Face state dict; every parameter and nothing else must be named."""
    wanted, live = reference_parameters(built, hf), live_parameters(built)
    assert wanted.keys() == live.keys(), wanted.keys() ^ live.keys()
    with torch.no_grad():
        for name, value in wanted.items():
            assert live[name].shape == value.shape, (name, live[name].shape, value.shape)
            live[name].copy_(value)


class _Cut:
    """The shard of one tensor rank."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.size, 0)[self.rank]

    def columns(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.size, 1)[self.rank]

    def sections(self, *tensors: Tensor) -> Tensor:
        """Each tensor cut, then put one below the other."""
        return torch.cat([self.rows(t) for t in tensors])

    def vocabulary(self, tensor: Tensor) -> Tensor:
        """Rows after padding with zeros to a multiple of the group."""
        missing = -len(tensor) % self.size
        return self.rows(torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]))


def _language(built: BuiltModel, hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    model, groups, text = built.language, built.groups[LANGUAGE], built.hf.text_config
    assert model is not None
    cut, tied = _Cut(groups.tp.rank(), groups.tp.size()), built.hf.tie_word_embeddings
    found = {}
    embedding = hf[_LANGUAGE + "embed_tokens.weight"]
    if model.pre_process:
        found["embedding.word_embeddings.weight"] = cut.vocabulary(embedding)
    if model.post_process:
        found["decoder.final_layernorm.weight"] = hf[_LANGUAGE + "norm.weight"]
        if not (tied and model.pre_process):
            found["output_layer.weight"] = cut.vocabulary(embedding if tied else hf["lm_head.weight"])
    first = model.decoder.layers[0].layer_number - 1
    for local in range(len(model.decoder.layers)):
        number = first + local
        source = {n.removeprefix(p): t for n, t in hf.items() if n.startswith(p := f"{_LANGUAGE}layers.{number}.")}
        mixer = _full_attention if text.layer_types[number] == "full_attention" else _gated_delta_net
        mapped = {
            "input_layernorm.weight": source["input_layernorm.weight"],
            "pre_mlp_layernorm.weight": source["post_attention_layernorm.weight"],
            "mlp.linear_fc1.weight": cut.sections(source["mlp.gate_proj.weight"], source["mlp.up_proj.weight"]),
            "mlp.linear_fc2.weight": cut.columns(source["mlp.down_proj.weight"]),
        } | mixer(text, source, cut)
        found |= {f"decoder.layers.{local}.{name}": value for name, value in mapped.items()}
    return found


def _full_attention(text, source: Mapping[str, Tensor], cut: _Cut) -> dict[str, Tensor]:
    groups, head_dim, hidden = text.num_key_value_heads, text.head_dim, text.hidden_size
    # HF's q_proj holds [query, gate] a head; Megatron holds [queries, gates, key, value] a key-value group.
    queries, gates = source["self_attn.q_proj.weight"].view(groups, -1, 2, head_dim, hidden).unbind(2)
    keys = source["self_attn.k_proj.weight"].view(groups, head_dim, hidden)
    values = source["self_attn.v_proj.weight"].view(groups, head_dim, hidden)
    fused = torch.cat([queries.flatten(1, 2), gates.flatten(1, 2), keys, values], 1).flatten(0, 1)
    return {
        "self_attention.linear_qkv.weight": cut.rows(fused),
        "self_attention.linear_proj.weight": cut.columns(source["self_attn.o_proj.weight"]),
        "self_attention.q_layernorm.weight": source["self_attn.q_norm.weight"],
        "self_attention.k_layernorm.weight": source["self_attn.k_norm.weight"],
    }


def _gated_delta_net(text, source: Mapping[str, Tensor], cut: _Cut) -> dict[str, Tensor]:
    keys = text.linear_key_head_dim * text.linear_num_key_heads
    values = text.linear_value_head_dim * text.linear_num_value_heads
    qkv = source["linear_attn.in_proj_qkv.weight"].split([keys, keys, values])
    rest = (source[f"linear_attn.in_proj_{name}.weight"] for name in ("z", "b", "a"))
    return {
        "self_attention.in_proj.weight": cut.sections(*qkv, *rest),
        "self_attention.conv1d.weight": cut.sections(*source["linear_attn.conv1d.weight"].split([keys, keys, values])),
        "self_attention.A_log": cut.rows(source["linear_attn.A_log"]),
        "self_attention.dt_bias": cut.rows(source["linear_attn.dt_bias"]),
        "self_attention.out_norm.weight": source["linear_attn.norm.weight"],
        "self_attention.out_proj.weight": cut.columns(source["linear_attn.out_proj.weight"]),
    }


def _vision(built: BuiltModel, hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    groups, vision = built.groups[IMAGES], built.hf.vision_config
    cut = _Cut(groups.tp.rank(), groups.tp.size())
    found = {
        "patch_embed.weight": hf[_VISION + "patch_embed.proj.weight"].flatten(1),
        "patch_embed.bias": hf[_VISION + "patch_embed.proj.bias"],
        "pos_embed.weight": hf[_VISION + "pos_embed.weight"],
        "merger.linear_fc2.weight": cut.columns(hf[_VISION + "merger.linear_fc2.weight"]),
        "merger.linear_fc2.bias": hf[_VISION + "merger.linear_fc2.bias"],
    }
    for kind in ("weight", "bias"):
        found[f"merger.norm.{kind}"] = hf[f"{_VISION}merger.norm.{kind}"]
        found[f"merger.linear_fc1.{kind}"] = cut.rows(hf[f"{_VISION}merger.linear_fc1.{kind}"])
    for number in range(vision.depth):
        source, target = f"{_VISION}blocks.{number}.", f"decoder.layers.{number}."
        for kind in ("weight", "bias"):
            found[f"{target}input_layernorm.{kind}"] = hf[f"{source}norm1.{kind}"]
            found[f"{target}pre_mlp_layernorm.{kind}"] = hf[f"{source}norm2.{kind}"]
            # HF holds [all queries, all keys, all values]; Megatron [query, key, value] a head.
            fused = hf[f"{source}attn.qkv.{kind}"]
            by_head = fused.unflatten(0, (3, vision.num_heads, -1)).transpose(0, 1).flatten(0, 2)
            found[f"{target}self_attention.linear_qkv.{kind}"] = cut.rows(by_head)
            found[f"{target}mlp.linear_fc1.{kind}"] = cut.rows(hf[f"{source}mlp.linear_fc1.{kind}"])
        for ours, theirs in (("self_attention.linear_proj", "attn.proj"), ("mlp.linear_fc2", "mlp.linear_fc2")):
            found[f"{target}{ours}.weight"] = cut.columns(hf[f"{source}{theirs}.weight"])
            found[f"{target}{ours}.bias"] = hf[f"{source}{theirs}.bias"]
    return found
