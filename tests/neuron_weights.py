"""Weights of a model, neuron by neuron, made of its whole matrices."""

from dataclasses import replace
from typing import Any

import numpy as np

from edgert.format import StoredTensor, declared
from edgert.format.layout import LAYOUT_OF, page_padded, stored_bytes
from edgert.kernels import neuron_packing, packing
from edgert.state import Weights
from tests import kernel_inputs as inputs


def one_by_one(
    dense: Weights, predictors: tuple[int, ...] = (), bias: Any = None, core: float = 0.0
) -> Weights:
    """The same weights, up and down neuron by neuron.

    predictors: ranks of random predictors, whose scores get `bias` [F]. core: as of the spec.
    """
    spec = replace(dense.spec, neurons=True, predictors=predictors, core=core)
    tensors: dict[str, StoredTensor] = {}
    parts: list[Any] = []
    at = 0
    for decl in declared(spec):
        if decl.role == "neurons":
            up, down = (dense.tensors[decl.name.replace("neurons", name)] for name in ("up", "down"))
            clusters = neuron_packing.pack_clusters(up.quant, codes(dense, up), codes(dense, down))
            quant, data = up.quant, clusters.reshape(-1)
        elif decl.role == "rows":
            old = dense.tensors[decl.name]
            quant, data = old.quant, neuron_packing.pack_rows(old.quant, *codes(dense, old)).reshape(-1)
        elif decl.name.endswith("predictor_out_bias"):
            quant, data = "f32", np.asarray(bias, np.float32).view(np.uint8)
        elif ".predictor_" in decl.name:
            quant = "q8"
            values = inputs.whole(decl.name, -127, 127, *decl.shape).astype(np.int8)
            scales = np.full((decl.shape[0], -(-decl.shape[1] // 32)), 2.0**-9, np.float16)
            data = packing.pack(quant, values, scales).reshape(-1)
        else:
            old = dense.tensors[decl.name]
            quant, data = old.quant, dense.data[old.offset : old.offset + old.nbytes]
        assert data.size == stored_bytes(decl.role, quant, decl.shape)
        tensors[decl.name] = StoredTensor(
            decl.name, decl.role, decl.shape, quant, LAYOUT_OF[decl.role], at, data.size, ""
        )
        parts += [data, np.zeros(page_padded(data.size) - data.size, np.uint8)]
        at += page_padded(data.size)
    data = np.concatenate(parts)
    data.flags.writeable = False
    return Weights(spec, data, tensors)


def codes(weights: Weights, tensor: StoredTensor) -> tuple[Any, Any]:
    """The integers [N, K] and the scales [N, groups] of a stored matrix."""
    n, k = tensor.shape
    blocks, groups = -(-n // 16), -(-k // 32)
    data = weights.data[tensor.offset : tensor.offset + tensor.nbytes].reshape(blocks, groups, -1)
    values = packing.unpack_values(tensor.quant, data).transpose(0, 2, 1, 3).reshape(blocks * 16, groups * 32)
    scales = packing.unpack_scales(tensor.quant, data).transpose(0, 2, 1).reshape(blocks * 16, groups)
    return values[:n, :k].astype(np.int8), scales[:n].astype(np.float16)


def without_gates(dense: Weights, kept: Any) -> Weights:
    """The weights with a gate of zeros for neurons that are not `kept`, bool [F], or [L, F]."""
    data = dense.data.copy()
    kept = np.broadcast_to(kept, (dense.spec.layers, dense.spec.ffn_width))
    for tensor in dense.tensors.values():
        if tensor.name.endswith(".gate"):
            values, scales = codes(dense, tensor)
            values[~kept[int(tensor.name.split(".")[1])]] = 0
            packed = packing.pack(tensor.quant, values, scales).reshape(-1)
            data[tensor.offset : tensor.offset + tensor.nbytes] = packed
    data.flags.writeable = False
    return Weights(dense.spec, data, dense.tensors)
