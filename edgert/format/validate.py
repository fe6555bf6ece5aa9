"""From untrusted bytes to tensors that can be used without a further check (F09 to F35).

Everything is checked before anything is returned: past this point an offset is inside the
file, a length fits its shape and quantisation, and every tensor the spec calls for is there.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgert.config import ModelSpec
from edgert.errors import VersionError
from edgert.format.exits import EXITS_KEY, ExitCalibration, read_exits
from edgert.format.foreign import plain_safetensors
from edgert.format.header import FORMAT, FORMAT_VERSION, RESERVED_KEYS, Blob, parse_object, read_header
from edgert.format.inputs import INPUTS_KEY, InputThresholds, read_inputs
from edgert.format.layout import LAYOUT_OF, PAGE, allowed_quants, page_padded, stored_bytes
from edgert.format.predictors import PREDICTORS_KEY, Predictors, read_predictors
from edgert.format.rules import Rule, broken, shown
from edgert.format.sparsity import SPARSITY_KEY, SparsityCalibration, read_sparsity
from edgert.format.tensors import TOKENIZER, StoredTensor, TensorDecl, iter_declared

_TABLE_KEYS: Final = {"shape", "quant", "layout", "bytes", "sha256"}
_HEADER_KEYS: Final = {"dtype", "shape", "data_offsets"}
_SHA256: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Contents:
    """What the header of a valid file says."""

    spec: ModelSpec
    tensors: dict[str, StoredTensor]  # in order of use
    metadata: dict[str, str]  # without the keys of the format itself
    exits: dict[int, ExitCalibration]  # by the layers before each
    sparsity: SparsityCalibration | None
    predictors: Predictors | None
    inputs: InputThresholds | None


def read_contents(blob: Blob, path: Path) -> Contents:
    """Read and check a whole file's header; `path` is only for the advice in messages.

    Raises FormatError, VersionError or NotAModelError.
    """
    entries, data_start = read_header(blob)
    metadata = _metadata(entries.pop("__metadata__", None), path)
    if data_start % PAGE:
        raise broken(Rule.HEADER_PAGE, f"tensors starting at byte {data_start}", f"a multiple of {PAGE}")
    for key in ("spec", "tensors"):
        if key not in metadata:
            raise broken(Rule.METADATA_KEYS, f"no {key!r} in __metadata__", "one")
    spec = _spec(metadata["spec"])
    table = parse_object(metadata["tensors"], "the tensor table")
    tensors = {t.name: t for t in _tensors(spec, table, entries, data_start)}
    _check_names(table, tensors, "the tensor table")
    _check_names(entries, tensors, "the header")
    _check_contiguous(tensors, data_start, len(blob))
    others = {key: text for key, text in metadata.items() if key not in RESERVED_KEYS}
    exits = read_exits(metadata.get(EXITS_KEY), spec.exits)
    sparsity = read_sparsity(metadata.get(SPARSITY_KEY), spec.layers)
    predictors = read_predictors(metadata.get(PREDICTORS_KEY), spec.predictors)
    inputs = read_inputs(metadata.get(INPUTS_KEY), spec)
    return Contents(spec, tensors, others, exits, sparsity, predictors, inputs)


def _metadata(values: object, path: Path) -> dict[str, str]:
    """`__metadata__` of an edgert file of our version."""
    if values is None:
        raise plain_safetensors(path)
    if not isinstance(values, dict):
        raise broken(Rule.METADATA_STRINGS, f"{shown(values)} as __metadata__", "an object")
    for key, text in values.items():
        if not isinstance(text, str):
            raise broken(Rule.METADATA_STRINGS, f"{shown(text)} as metadata {shown(key)}", "a string")
        if not (_is_unicode(key) and _is_unicode(text)):
            raise broken(Rule.METADATA_STRINGS, f"a lone surrogate in metadata {shown(key)}", "Unicode")
    if values.get("format") != FORMAT:
        raise plain_safetensors(path)
    if "format_version" not in values:
        raise broken(Rule.METADATA_KEYS, "no 'format_version' in __metadata__", "one")
    version = values["format_version"]
    if version != FORMAT_VERSION:
        raise VersionError(
            f"found format version {shown(version)}, expected version {FORMAT_VERSION!r}; "
            "use an edgert that reads it, or convert the model again with this one"
        )
    return values


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _spec(text: str) -> ModelSpec:
    values = parse_object(text, "the spec")
    try:
        for name in ("architecture", "rope_scaling"):
            if not isinstance(values.get(name, ""), str):
                raise TypeError(f"{name} is {shown(values[name])}, expected a string")
        for name in ("windows", "eos_ids", "part", "exits", "dense_layers", "ropes", "predictors"):
            if not isinstance(values.get(name, []), list):
                raise TypeError(f"{name} is {shown(values[name])}, expected a list")
        return ModelSpec.from_json(values)
    except (TypeError, ValueError) as error:
        raise broken(Rule.SPEC, str(error)[:200], "the fields of edgert's ModelSpec") from None


def _tensors(
    spec: ModelSpec, table: Mapping[str, Any], entries: Mapping[str, Any], data_start: int
) -> Iterator[StoredTensor]:
    """The tensors the spec calls for, each checked by itself; stops at the first absent one."""
    for decl in iter_declared(spec, _tokenizer_bytes(table)):
        if decl.name not in table:
            raise broken(Rule.TENSOR_MISSING, f"no {decl.name} in the tensor table", "one")
        if decl.name not in entries:
            raise broken(Rule.TENSOR_MISSING, f"no {decl.name} in the header", "one")
        quant, nbytes, sha256 = _table_entry(decl, table[decl.name])
        begin = _header_entry(decl.name, entries[decl.name], nbytes)
        layout = LAYOUT_OF[decl.role]
        offset = data_start + begin
        yield StoredTensor(decl.name, decl.role, decl.shape, quant, layout, offset, nbytes, sha256)


def _tokenizer_bytes(table: Mapping[str, Any]) -> int:
    """The length of the only tensor whose shape the spec does not give; 0 when it is absent."""
    if TOKENIZER not in table:
        return 0
    shape = _fields(TOKENIZER, table[TOKENIZER], _TABLE_KEYS, Rule.TABLE_ENTRY)["shape"]
    if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and shape[0] > 0):
        raise broken(Rule.TABLE_SHAPE, f"{TOKENIZER} of shape {shown(shape)}", "its positive length")
    return shape[0]


def _fields(name: str, entry: object, keys: set[str], rule: Rule) -> dict[str, Any]:
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise broken(rule, f"{shown(entry)} for {name}", f"an object with the keys {sorted(keys)}")
    return entry


def _table_entry(decl: TensorDecl, entry: object) -> tuple[str, int, str]:
    """Quantisation, bytes and SHA-256 from the tensor table (F13, F16 to F20)."""
    values = _fields(decl.name, entry, _TABLE_KEYS, Rule.TABLE_ENTRY)
    shape, quant, layout = values["shape"], values["quant"], values["layout"]
    nbytes, sha256 = values["bytes"], values["sha256"]
    if not _is_ints(shape) or tuple(shape) != decl.shape:
        raise broken(Rule.TABLE_SHAPE, f"{decl.name} of shape {shown(shape)}", str(list(decl.shape)))
    allowed = allowed_quants(decl.role, decl.shape)
    if quant not in allowed:
        expected = " or ".join(allowed)
        raise broken(Rule.TABLE_QUANT, f"{decl.name} of quantisation {shown(quant)}", expected)
    if layout != LAYOUT_OF[decl.role]:
        raise broken(Rule.TABLE_LAYOUT, f"{decl.name} of layout {shown(layout)}", LAYOUT_OF[decl.role])
    expected_bytes = stored_bytes(decl.role, quant, decl.shape)
    if type(nbytes) is not int or nbytes != expected_bytes:
        raise broken(Rule.TABLE_BYTES, f"{decl.name} of {shown(nbytes)} bytes", str(expected_bytes))
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise broken(Rule.TABLE_SHA256, f"{shown(sha256)} for {decl.name}", "64 lowercase hex digits")
    return quant, nbytes, sha256


def _header_entry(name: str, entry: object, nbytes: int) -> int:
    """Where the tensor begins in the data, from safetensors' own entry (F21 to F26)."""
    values = _fields(name, entry, _HEADER_KEYS, Rule.HEADER_ENTRY)
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if dtype != "U8":
        raise broken(Rule.DTYPE, f"{shown(dtype)} for {name}", "U8")
    if not _is_ints(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        raise broken(Rule.OFFSETS, f"{shown(offsets)} for {name}", "two integers, 0 <= begin <= end")
    begin, end = offsets
    if not _is_ints(shape) or shape != [end - begin]:
        raise broken(Rule.STORED_SHAPE, f"{shown(shape)} for {name}", f"[{end - begin}]")
    if begin % PAGE:
        raise broken(Rule.TENSOR_PAGE, f"{name} at byte {begin} of the data", f"a multiple of {PAGE}")
    if end - begin != page_padded(nbytes):
        raise broken(Rule.STORED_LENGTH, f"{end - begin} bytes for {name}", str(page_padded(nbytes)))
    return int(begin)


def _is_ints(values: object) -> bool:
    """Whether this is a JSON list of integers; JSON's true is an int to Python."""
    return isinstance(values, list) and all(type(value) is int for value in values)


def _check_names(found: Mapping[str, Any], tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Every declared tensor was found before, so only strangers can be left."""
    if len(found) > len(tensors):
        stranger = next(name for name in found if name not in tensors)
        raise broken(Rule.TENSOR_UNKNOWN, f"{shown(stranger)} in {where}", "only tensors of the spec")


def _check_contiguous(tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    """Tensors cover the data exactly once (F27 to F30); lengths are those of the spec by now."""
    expected = data_start
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        found = f"{tensor.name} at byte {tensor.offset}"
        if tensor.offset > expected:
            rule = Rule.DATA_START if expected == data_start else Rule.DATA_HOLE
            raise broken(rule, found, f"byte {expected}")
        if tensor.offset < expected:
            raise broken(Rule.DATA_OVERLAP, found, f"byte {expected}, where the one before it ends")
        expected += page_padded(tensor.nbytes)
    if expected != size:
        raise broken(Rule.DATA_END, f"a file of {size} bytes", f"{expected}, the end of the last tensor")
