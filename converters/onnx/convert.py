"""An ONNX model to an .ert file."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.config import GLOBAL_ROPE, QUANTS, ModelSpec, Quant, QuantSpec
from edgert.converters.hf_config import shown
from edgert.converters.onnx.beside import Beside
from edgert.converters.onnx.decoder import Found, Layer, find_decoder, same
from edgert.converters.onnx.graph import open_graph
from edgert.converters.onnx.linear import Linear, Matrix
from edgert.converters.pipeline import Calibration, quant_spec, quants_of, write_model
from edgert.converters.quantize import Codes
from edgert.converters.report import ConversionReport, Progress
from edgert.errors import ConversionError, UnsupportedError
from edgert.format.tensors import declared, iter_declared, matrices_in, rope_name

Floats = NDArray[np.float32]
ROPE = rope_name(GLOBAL_ROPE)


class OnnxWeights:
    """The weights that a graph computes with, under edgert's names: a WeightSource."""

    def __init__(self, matrices: Mapping[str, Matrix], vectors: Mapping[str, Floats]) -> None:
        self.matrices = matrices
        self.vectors = vectors

    def rows(self, name: str, slab_rows: int) -> Iterator[Floats | Codes]:
        """A matrix in slabs of rows."""
        return self.matrices[name].rows(slab_rows)

    def vector(self, name: str) -> Floats:
        """A norm, a bias, or the rotary frequencies."""
        return self.vectors[name]

    def stored_as(self, name: str) -> str:
        """ONNX's name of a type, like FLOAT16, or bits and block, like int4x32."""
        if name in self.matrices:
            return self.matrices[name].stored_as
        return "" if name == ROPE else "FLOAT"


def convert_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quant: Quant | QuantSpec | None = None,
    *,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    dry_run: bool = False,
) -> ConversionReport:
    """Convert an ONNX decoder, whose tokenizer.json lies beside it, to an .ert file.

    Without `quant` a matrix keeps its type where ours holds it, blocks of four bits bit for bit; with zero
    points they become q8, which holds them too. Raises as `edgert.converters.convert`.
    """
    path = Path(path)
    graph = open_graph(path)
    found = find_decoder(graph)
    beside = Beside.of(path)
    tokenizer = beside.tokenizer_json()
    spec = _spec(path, found, beside)
    weights = _weights(spec, found)
    _check(path, spec, weights)
    quants = _kept(spec, weights.matrices) if quant is None else quants_of(spec, quant_spec(quant))
    return write_model(
        Path(out), spec, weights, quants, tokenizer, beside.metadata(path), progress, calibration, dry_run
    )


def _spec(path: Path, found: Found, beside: Beside) -> ModelSpec:
    first = found.layers[0]
    attention, turn = first.attention, first.attention.turn
    _check_alike(path, found)
    size = attention.q.matrix.count // attention.heads
    context = beside.context(turn.positions)
    gains = None if attention.q_norm is None else len(attention.q_norm.gain)
    qkv_bias = any(p.bias is not None for at in found.layers for p in _qkv(at))
    windows = tuple(layer.attention.window or 0 for layer in found.layers)
    if any(layer.attention.window is None for layer in found.layers):
        windows = beside.windows(len(found.layers))
    windows = tuple(window if window < context else 0 for window in windows)
    try:
        return ModelSpec(
            architecture=_architecture(gains is not None, qkv_bias and first.o.bias is None, any(windows)),
            layers=len(found.layers),
            width=found.embedding.columns,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=size,
            ffn_width=first.gate.matrix.count,
            vocab=found.output.count,
            context=context,
            norm_eps=found.output_norm.eps,
            activation=first.activation,
            tied_embeddings=same(found.embedding, found.output),
            qkv_bias=qkv_bias,
            output_bias=any(layer.o.bias is not None for layer in found.layers),
            ffn_bias=any(p.bias is not None for at in found.layers for p in (at.gate, at.up, at.down)),
            qk_norm=gains == size,
            joint_qk_norm=False,
            windows=windows if any(windows) else (),
            rope_theta=_theta(turn.frequencies),
            rope_scaling="default" if _is_plain(turn.frequencies) else "frequencies of the graph",
            rope_magnitude=turn.magnitude,
            bos_id=beside.bos_id(),
            eos_ids=beside.eos_ids(),
        )
    except ValueError as error:
        raise ConversionError(f"{path}: {error}; download the model's files again") from None


def _qkv(layer: Layer) -> tuple[Linear, ...]:
    return layer.attention.q, layer.attention.k, layer.attention.v


def _architecture(normed: bool, biased: bool, windowed: bool) -> str:
    """The model_type that computes so; several do, and the graph does not say which it was."""
    if normed:
        return "qwen3"
    return "qwen2" if biased else "mistral" if windowed else "llama"


def _theta(frequencies: Floats) -> float:
    """The base whose second power of 1/d is the second frequency; exact for plain frequencies."""
    if len(frequencies) < 2 or not 0 < frequencies[1] < 1:
        return 10000.0
    with np.errstate(all="ignore"):  # a damaged table may hold anything
        return float(f"{np.float64(frequencies[1]) ** -len(frequencies):.5g}")


def _is_plain(frequencies: Floats) -> bool:
    powers = np.arange(len(frequencies)) / len(frequencies)
    with np.errstate(all="ignore"):
        return bool(np.allclose(frequencies, _theta(frequencies) ** -powers, rtol=1e-3))


def _check_alike(path: Path, found: Found) -> None:
    """One spec holds for all layers: the same eps, activation, turn and norms in each."""
    first = found.layers[0]
    for index, layer in enumerate(found.layers):
        norms = [layer.attention_norm, layer.ffn_norm, layer.attention.q_norm, layer.attention.k_norm]
        eps = {norm.eps for norm in norms if norm is not None} | {found.output_norm.eps}
        normed = [a.attention.q_norm is None for a in (layer, first)]
        normed += [a.attention.k_norm is None for a in (layer, first)]
        size = layer.attention.q.matrix.count // layer.attention.heads
        gains = [len(n.gain) for n in (layer.attention.q_norm, layer.attention.k_norm) if n is not None]
        problem = (
            f"epsilons {sorted(eps)}" if max(eps) > min(eps) * 1.001
            else f"activation {layer.activation}" if layer.activation != first.activation
            else "another rotary embedding" if not layer.attention.turn.equals(first.attention.turn)
            else "a norm of q or k alone" if len(set(normed)) != 1
            else f"gains of {gains} for heads of {size} values" if any(g != size for g in gains)
            else ""
        )  # fmt: skip
        if problem:
            raise UnsupportedError(
                f"{path}: found {problem} in layer {index}, expected the same in all layers, and norms of "
                "q and k by head; convert the model it was exported from"
            )


def _weights(spec: ModelSpec, found: Found) -> OnnxWeights:
    """Everything by its name in the file; a bias that the graph leaves out where others are is zero."""
    matrices = {"token_embedding": found.embedding}
    if not spec.tied_embeddings:
        matrices["output"] = found.output
    turn = found.layers[0].attention.turn
    vectors = {ROPE: turn.frequencies, "output_norm": found.output_norm.gain}
    for index, layer in enumerate(found.layers):
        at, here = layer.attention, f"layers.{index}."
        vectors[f"{here}attention_norm"] = layer.attention_norm.gain
        vectors[f"{here}ffn_norm"] = layer.ffn_norm.gain
        for name, norm in (("q_norm", at.q_norm), ("k_norm", at.k_norm)):
            if norm is not None:
                vectors[here + name] = norm.gain
        products = {"q": at.q, "k": at.k, "v": at.v, "o": layer.o}
        products |= {"gate": layer.gate, "up": layer.up, "down": layer.down}
        for name, product in products.items():
            matrices[here + name] = product.matrix
            bias = product.bias
            vectors[f"{here}{name}_bias"] = (
                np.zeros(product.matrix.count, np.float32) if bias is None else bias
            )
    return OnnxWeights(matrices, vectors)


def _check(path: Path, spec: ModelSpec, weights: OnnxWeights) -> None:
    """Every tensor of the spec is there, in its shape."""
    for decl in iter_declared(spec):
        for name, rows, columns in matrices_in(decl):
            matrix = weights.matrices[name]
            if (matrix.count, matrix.columns) != (rows, columns):
                raise _wrong(path, matrix.tensor.name, [matrix.count, matrix.columns], [rows, columns])
        vector = None if matrices_in(decl) else weights.vectors.get(decl.name)
        if vector is not None and vector.shape != decl.shape:
            raise _wrong(path, decl.name, list(vector.shape), list(decl.shape))


def _wrong(path: Path, name: str, found: list[int], expected: list[int]) -> ConversionError:
    return ConversionError(
        f"{path}: found {shown(name)} of shape {found}, expected {expected} as elsewhere in the graph; "
        "export the model again"
    )


def _kept(spec: ModelSpec, matrices: Mapping[str, Matrix]) -> dict[str, Quant]:
    kept: dict[str, Quant] = {}
    for decl in declared(spec):
        kinds = {matrices[name].kept_as for name, _, _ in matrices_in(decl)}
        if kinds and decl.role in ("matrix", "expert"):
            kept[decl.name] = next(quant for quant in QUANTS if quant in kinds)
    return kept
