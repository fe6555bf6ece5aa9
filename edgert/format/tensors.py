"""The tensor table: every tensor a model has, by name, shape and role.

This one table drives the writer, the reader and the weights of the engine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from edgert.config import LOCAL_ROPE, ModelSpec
from edgert.format.layout import Role

TOKENIZER: Final = "tokenizer.json"
POSITIONS: Final = "position_embedding"


@dataclass(frozen=True, slots=True)
class TensorDecl:
    """A tensor that a model of some spec has."""

    name: str
    shape: tuple[int, ...]  # logical, before any padding
    role: Role


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file."""

    name: str
    role: Role
    shape: tuple[int, ...]  # logical, before any padding
    quant: str  # f32, f16, q8 or q4 (a router's and a vector's: f32); u8 for bytes
    layout: str  # of `layout.LAYOUT_OF`: rows16 for a matrix, flat for what is not one
    offset: int  # from the start of the file, a multiple of PAGE
    nbytes: int  # without the zeros up to the next page
    sha256: str  # of those nbytes, in lowercase hexadecimal


def declared(spec: ModelSpec, tokenizer_bytes: int = 0) -> tuple[TensorDecl, ...]:
    """The tensors of a model in their order of use; a tokenizer of 0 bytes is none."""
    return tuple(iter_declared(spec, tokenizer_bytes))


def iter_declared(spec: ModelSpec, tokenizer_bytes: int = 0) -> Iterator[TensorDecl]:
    """`declared`, lazily: a hostile spec may claim 2**31 layers, so readers stop at the first absent one."""
    if tokenizer_bytes:
        yield TensorDecl(TOKENIZER, (tokenizer_bytes,), "bytes")
    exits, ends = set(spec.held_exits), spec.last_layer == spec.layers
    speaks = ends or bool(exits)  # has logits to give
    if spec.first_layer == 0 or (speaks and spec.tied_embeddings):
        yield _matrix("token_embedding", spec.vocab, spec.width)
    if spec.first_layer == 0 and spec.learned_positions:
        yield _matrix(POSITIONS, spec.context, spec.width)
    for rope in spec.ropes_used:
        yield _vector(rope_name(rope), spec.rotated // 2)
    if spec.alibi:
        yield _vector("alibi_slopes", spec.heads)
    head = tuple(_exit(spec))
    for index in range(spec.first_layer, spec.last_layer):
        for decl in (*_attention(spec), *_feed_forward(spec, index)):
            yield TensorDecl(f"layers.{index}.{decl.name}", decl.shape, decl.role)
        for expert in range(spec.experts if spec.has_experts(index) else 0):
            yield TensorDecl(expert_name(index, expert), (3, spec.expert_width, spec.width), "expert")
        for decl in head if index + 1 in exits else ():
            yield TensorDecl(f"exits.{index + 1}.{decl.name}", decl.shape, decl.role)
    if ends:
        yield from _norm(spec, "output_norm")
    if speaks and not spec.tied_embeddings:
        yield _matrix("output", spec.vocab, spec.width)


def rope_name(rope: int) -> str:
    """The tensor that holds the frequencies of GLOBAL_ROPE or LOCAL_ROPE."""
    return "local_rope_frequencies" if rope == LOCAL_ROPE else "rope_frequencies"


def expert_name(layer: int, expert: int) -> str:
    """The tensor that holds the gate, up and down of one expert."""
    return f"layers.{layer}.experts.{expert}"


def stand_in_name(layer: int, expert: int) -> str:
    """A smaller copy of an expert, of another file of the same model."""
    return f"{expert_name(layer, expert)}.stand_in"


def neurons_name(layer: int) -> str:
    """The tensor that holds the up and down of a layer, neuron by neuron."""
    return f"layers.{layer}.neurons"


INPUTS: Final = {"attention": ("q", "k", "v"), "o": ("o",), "ffn": ("gate", "up"), "down": ("down",)}
"""The matrices of a layer by what they meet: those that meet the same have the same outlier columns."""


def input_of(matrix: str) -> str | None:
    """Which of INPUTS a matrix of a layer meets, by its full name; None for any other tensor."""
    layers, _, kind = matrix.rpartition(".")
    if not layers.startswith("layers."):
        return None
    return next((name for name, kinds in INPUTS.items() if kind in kinds), None)


def matrices_in(decl: TensorDecl | StoredTensor) -> tuple[tuple[str, int, int], ...]:
    """Name, rows and columns of the matrices that a tensor holds, in the order of its bytes."""
    if decl.role == "expert":
        _, ffn, width = decl.shape
        sizes = (("gate", ffn, width), ("up", ffn, width), ("down", width, ffn))
        return tuple((f"{decl.name}.{name}", rows, columns) for name, rows, columns in sizes)
    if decl.role == "neurons":
        _, ffn, width = decl.shape
        layer = decl.name.removesuffix(".neurons")
        return ((f"{layer}.up", ffn, width), (f"{layer}.down", width, ffn))
    if decl.role in ("matrix", "rows", "router"):
        rows, columns = decl.shape
        return ((decl.name, rows, columns),)
    return ()


def _attention(spec: ModelSpec) -> Iterator[TensorDecl]:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if spec.block != "post":
        yield from _norm(spec, "attention_norm")
    if spec.sinks:
        yield _vector("sinks", spec.heads)
    if spec.latent:
        yield from _latent_attention(spec)
        return
    yield from _columns(spec, "attention")
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield _matrix(name, rows, spec.width)
        yield from _outliers(spec, name, rows)
        if spec.qkv_bias:
            yield _vector(f"{name}_bias", rows)
    if spec.qk_norm:
        yield _vector("q_norm", spec.head_dim)
        yield _vector("k_norm", spec.head_dim)
    if spec.joint_qk_norm:
        yield _vector("q_norm", queries)
        yield _vector("k_norm", keys)
    yield from _columns(spec, "o")
    yield _matrix("o", spec.width, queries)
    yield from _outliers(spec, "o", spec.width)
    if spec.output_bias:
        yield _vector("o_bias", spec.width)
    if spec.block in ("post", "around"):
        yield from _norm(spec, "attention_post_norm")


def _latent_attention(spec: ModelSpec) -> Iterator[TensorDecl]:
    """See model/latent.py."""
    source, heads = spec.width, spec.heads
    if spec.query_latent:
        source = spec.query_latent
        yield from _biased(spec, "q_down", source, spec.width)
        yield _vector("q_down_norm", source)
    yield _matrix("q_plain", heads * spec.plain_dim, source)
    yield _matrix("q_rope", heads * spec.rotary, source)
    yield from _biased(spec, "kv_down", spec.latent, spec.width)
    yield _vector("kv_down_norm", spec.latent)
    yield from _biased(spec, "k_rope", spec.rotary, spec.width)
    yield _matrix("k_up", heads * spec.latent, spec.plain_dim)
    yield _matrix("v_up", heads * spec.value_dim, spec.latent)
    yield from _biased(spec, "o", spec.width, heads * spec.value_dim)


def _biased(spec: ModelSpec, name: str, rows: int, columns: int) -> Iterator[TensorDecl]:
    """A matrix of latent attention that has a bias where the output has one."""
    yield _matrix(name, rows, columns)
    if spec.output_bias:
        yield _vector(f"{name}_bias", rows)


def _feed_forward(spec: ModelSpec, layer: int) -> Iterator[TensorDecl]:
    width, ffn, prefix = spec.width, spec.ffn_width, ""
    if spec.block != "post" and not spec.shared_norm:
        yield from _norm(spec, "ffn_norm")
    if spec.has_experts(layer):
        yield TensorDecl("router", (spec.experts, width), "router")
        if spec.sigmoid_routing:
            yield _vector("choice_bias", spec.experts)
        if spec.expert_biases:
            yield _vector("router_bias", spec.experts)
            for part, size in (("gate", spec.expert_width), ("up", spec.expert_width), ("down", width)):
                yield _vector(f"experts_{part}_bias", spec.experts * size)
        if not spec.shared_width:
            return
        if not spec.open_shared:
            yield TensorDecl("shared_router", (1, width), "router")
        ffn, prefix = spec.shared_width, "shared_"
    if spec.neurons:
        rank = spec.predictor(layer)
        yield TensorDecl("gate", (ffn, width), "rows" if spec.gate_rows(layer) else "matrix")
        if rank:
            yield _matrix("predictor_in", rank, width)
            yield _matrix("predictor_out", ffn, rank)
            yield _vector("predictor_out_bias", ffn)
        yield TensorDecl("neurons", (2, ffn, width), "neurons")
        return
    matrices = (("gate", ffn, width), ("up", ffn, width), ("down", width, ffn))
    yield from _columns(spec, "ffn")
    for name, rows, columns in matrices[spec.plain_ffn :]:
        if name == "down":
            yield from _columns(spec, "down")
        yield _matrix(f"{prefix}{name}", rows, columns)
        yield from _outliers(spec, name, rows)
        if spec.ffn_bias:
            yield _vector(f"{name}_bias", rows)
    if spec.block in ("post", "around"):
        yield from _norm(spec, "ffn_post_norm")


def _columns(spec: ModelSpec, name: str) -> Iterator[TensorDecl]:
    """Which columns of the matrices that meet an input are stored apart."""
    if spec.outliers:
        yield _vector(f"{name}_columns", spec.outliers)


def _outliers(spec: ModelSpec, name: str, rows: int) -> Iterator[TensorDecl]:
    """These columns of one matrix, side by side; in the matrix itself they are zero."""
    if spec.outliers:
        yield _matrix(f"{name}_outliers", rows, spec.outliers)


def _exit(spec: ModelSpec) -> Iterator[TensorDecl]:
    """A head after some layer; it uses the model's own output matrix (see Builder.exit_head)."""
    yield _vector("norm", spec.width)
    yield _matrix("matrix", spec.width, spec.width)
    yield _vector("output_norm", spec.width)


def _norm(spec: ModelSpec, name: str) -> Iterator[TensorDecl]:
    yield _vector(name, spec.width)
    if spec.norm_bias:
        yield _vector(f"{name}_bias", spec.width)


def _matrix(name: str, rows: int, columns: int) -> TensorDecl:
    return TensorDecl(name, (rows, columns), "matrix")


def _vector(name: str, length: int) -> TensorDecl:
    return TensorDecl(name, (length,), "vector")
