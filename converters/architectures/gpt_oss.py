"""gpt-oss (transformers' modeling_gpt_oss.py): sinks, windows in every other layer, experts with biases.

Published in MXFP4, where gate and up of an expert are the even and the odd rows of one matrix [2F, D]; as
transformers stores it otherwise, all matrices of the experts are transposed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from edgert.config import ModelSpec
from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Experts, Variant
from edgert.converters.architectures.windows import layer_kinds, typed_windows, window_size
from edgert.converters.hf_config import HfConfig
from edgert.converters.mxfp4 import Mxfp4Tensor
from edgert.converters.safetensors_source import SourceTensor

NAMES: Final = {
    "sinks": "self_attn.sinks",
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
    "experts_gate_bias": "mlp.experts.gate_proj_bias",
    "experts_up_bias": "mlp.experts.up_proj_bias",
    "experts_down_bias": "mlp.experts.down_proj_bias",
}
YARN: Final[dict[str, Any]] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What transformers takes where a config says nothing of it."""


def variant(config: HfConfig) -> Variant:
    """What a gpt_oss config says beyond the fields of the family."""
    config.child("quantization_config").refuse_unless("quant_method", "mxfp4")
    config.refuse_unless("hidden_act", "silu")
    config.refuse_unless("mlp_bias")
    bias = config.flag("attention_bias", True)
    kinds = layer_kinds(config, 2)
    scaled = config.has("rope_scaling") or config.has("rope_parameters")
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        head_dim=64,
        windows=typed_windows(config, kinds, window_size(config) if "sliding_attention" in kinds else 0),
        experts=Experts(
            count=config.integer("num_local_experts", 128),
            active=config.integer("num_experts_per_tok", 4),
            width=config.integer("intermediate_size"),
            normalized=True,
        ),
        fields={
            "sinks": True,
            "expert_biases": True,
            "swiglu_alpha": config.number("swiglu_alpha", 1.702),
            "swiglu_limit": config.number("swiglu_limit", 7.0),
        },
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 150000.0} | ({} if scaled else {"rope_scaling": YARN}),
        layout=Layout(names=NAMES, expanded=expanded),
        understood=frozenset(("quantization_config", "num_local_experts")),
    )


def expanded(tensors: Mapping[str, SourceTensor], spec: ModelSpec) -> Mapping[str, SourceTensor]:
    """The tensors with each matrix of an expert, and the biases of each kind, by themselves."""
    return dict(_expanded(tensors, spec))


def _expanded(tensors: Mapping[str, SourceTensor], spec: ModelSpec) -> Iterator[tuple[str, SourceTensor]]:
    for name, tensor in tensors.items():
        before, inside, part = name.partition("experts.")
        kind, blocks, _ = part.partition("_blocks")
        if part.endswith("_scales") and name.removesuffix("_scales") + "_blocks" in tensors:
            continue
        if part == "gate_up_proj_bias" and tensor.shape == (spec.experts, 2 * spec.expert_width):
            count = 2 * spec.experts * spec.expert_width
            both = replace(tensor, shape=(count,))
            yield f"{before}experts.gate_proj_bias", both.pick(np.arange(0, count, 2))
            yield f"{before}experts.up_proj_bias", both.pick(np.arange(1, count, 2))
        elif part == "down_proj_bias" and tensor.shape == (spec.experts, spec.width):
            yield name, replace(tensor, shape=(spec.experts * spec.width,))
        elif inside:
            scales = tensors.get(f"{before}experts.{kind}_scales")
            packed = Mxfp4Tensor.of(tensor, scales) if blocks and scales else None
            yield from _experts(name, before, kind, packed or tensor, spec)
        else:
            yield name, tensor


def _experts(
    name: str, before: str, kind: str, tensor: SourceTensor, spec: ModelSpec
) -> Iterator[tuple[str, SourceTensor]]:
    """The matrices of each expert in a stack of them."""
    width, inner = spec.width, spec.expert_width
    rows, columns = (2 * inner, width) if kind == "gate_up_proj" else (width, inner)
    turned = not isinstance(tensor, Mxfp4Tensor)
    shape = (spec.experts, columns, rows) if turned else (spec.experts, rows, columns)
    if kind not in ("gate_up_proj", "down_proj") or tensor.shape != shape or not tensor.readable:
        yield name, tensor
        return
    for expert in range(spec.experts):
        own = tensor.part(expert * shape[1], *shape[1:])
        matrix = own.transpose() if turned else own
        parts = {"down": matrix}
        if kind == "gate_up_proj":
            parts = {"gate": matrix.pick(np.arange(0, rows, 2)), "up": matrix.pick(np.arange(1, rows, 2))}
        for part, found in parts.items():
            yield f"{before}experts.{expert}.{part}_proj.weight", found
