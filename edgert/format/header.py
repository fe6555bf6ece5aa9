"""The header of an .ert file: bytes to checked JSON values, and back.

Nothing here knows what a tensor is; edgert.format.validate gives the values their meaning.
"""

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from edgert.config import ModelSpec
from edgert.format.layout import page_padded
from edgert.format.rules import Rule, broken, shown
from edgert.format.tensors import StoredTensor

FORMAT: Final = "edgert"
FORMAT_VERSION: Final = "1"
RESERVED_KEYS: Final = ("format", "format_version", "spec", "tensors")  # of __metadata__
LENGTH_BYTES: Final = 8  # the little-endian u64 before the JSON

# safetensors allows 100 MB, but JSON grows up to 25 times when parsed and a board may have
# 1 GB. A tensor takes about 300 bytes here and 100 more of slack: room for 40,000 of them.
MAX_HEADER: Final = 16 << 20
# The deepest value of a valid header is a shape: {name: {"shape": [n]}}. More only helps attackers.
MAX_DEPTH: Final = 8
# Every 64-bit offset has at most 19 digits, every shortest-form double at most 25 characters;
# Python would spend quadratic time on longer integers.
MAX_DIGITS: Final = 40

Blob = bytes | mmap.mmap


def read_header(blob: Blob) -> tuple[dict[str, Any], int]:
    """The header's JSON object and the position of the first byte after it (F01 to F08)."""
    if len(blob) < LENGTH_BYTES:
        raise broken(Rule.FILE_SIZE, f"{len(blob)} bytes", f"at least {LENGTH_BYTES}")
    length = int.from_bytes(blob[:LENGTH_BYTES], "little")
    room = min(MAX_HEADER, len(blob) - LENGTH_BYTES)
    if not 2 <= length <= room:
        raise broken(
            Rule.HEADER_LENGTH,
            f"{length} bytes of header in a file of {len(blob)} bytes",
            f"2 to {MAX_HEADER}, all inside the file",
        )
    end = LENGTH_BYTES + length
    raw = blob[LENGTH_BYTES:end]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise broken(Rule.HEADER_UTF8, f"byte {error.start} of it is not UTF-8", "UTF-8") from None
    body = text.rstrip(" ")
    if not (body.startswith("{") and body.endswith("}")):
        found = f"{shown(body[:8])} ... {shown(body[-8:])}"
        raise broken(Rule.HEADER_FRAME, found, "'{' as first byte and only spaces after the last '}'")
    return parse_object(body, "the header"), end


def parse_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object from untrusted text (F05 to F08); keys are unique, numbers finite."""
    depth = _depth(text.encode("utf-8"))
    if depth > MAX_DEPTH:
        raise broken(Rule.JSON_DEPTH, f"{depth} levels of brackets in {what}", f"at most {MAX_DEPTH}")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        raise broken(
            Rule.JSON_SYNTAX, f"{what} broken at character {error.pos} ({error.msg})", "JSON"
        ) from None
    if not isinstance(value, dict):
        raise broken(Rule.JSON_SYNTAX, f"{shown(value)} as {what}", "a JSON object")
    return value


def _depth(text: bytes) -> int:
    """The deepest nesting of brackets outside strings.

    Done before parsing, because the parser recurses. Escaped characters are blanked first, so
    that every quote that is left opens or closes a string; all steps are linear in the text.
    """
    plain = np.frombuffer(text.replace(b"\\\\", b"__").replace(b'\\"', b"__"), np.uint8)
    inside = np.bitwise_xor.accumulate(plain == ord('"'))
    steps = np.zeros(plain.size, np.int8)
    steps[(plain == ord("{")) | (plain == ord("["))] = 1
    steps[(plain == ord("}")) | (plain == ord("]"))] = -1
    steps[inside] = 0
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise broken(Rule.JSON_DUPLICATE, f"{shown(key)} twice in one object", "each key once")
        result[key] = value
    return result


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise broken(Rule.JSON_NUMBER, f"a number of {len(digits)} digits", f"at most {MAX_DIGITS}")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise broken(Rule.JSON_NUMBER, shown(digits), "a finite number in its shortest form")
    return value


def _constant(name: str) -> float:
    raise broken(Rule.JSON_NUMBER, name, "a finite number")


def encode_header(
    spec: ModelSpec, tensors: Iterable[StoredTensor], metadata: Mapping[str, str], data_start: int
) -> bytes:
    """The header's JSON, before the spaces that fill its last page."""
    entries: dict[str, object] = {}
    table: dict[str, object] = {}
    for tensor in tensors:
        begin, padded = tensor.offset - data_start, page_padded(tensor.nbytes)
        entries[tensor.name] = {"dtype": "U8", "shape": [padded], "data_offsets": [begin, begin + padded]}
        table[tensor.name] = {
            "shape": tensor.shape,
            "quant": tensor.quant,
            "layout": tensor.layout,
            "bytes": tensor.nbytes,
            "sha256": tensor.sha256,
        }
    own = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": _dumps(spec.to_json()),
        "tensors": _dumps(table),
    }
    return _dumps({"__metadata__": {**own, **metadata}, **entries}).encode("utf-8")


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
