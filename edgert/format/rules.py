"""The rules of docs/format.md, and the error for breaking one."""

import reprlib
from enum import Enum

from edgert.errors import FormatError


class Rule(Enum):
    """A rule whose violation is a FormatError; the value is its name in docs/format.md."""

    FILE_SIZE = "F01 file size"
    HEADER_LENGTH = "F02 header length"
    HEADER_UTF8 = "F03 header text"
    HEADER_FRAME = "F04 header frame"
    JSON_DEPTH = "F05 nesting"
    JSON_SYNTAX = "F06 JSON syntax"
    JSON_DUPLICATE = "F07 duplicate key"
    JSON_NUMBER = "F08 number"
    METADATA_STRINGS = "F09 metadata strings"
    METADATA_KEYS = "F10 metadata keys"
    HEADER_PAGE = "F11 header page"
    SPEC = "F12 spec"
    TABLE_ENTRY = "F13 table entry"
    TENSOR_MISSING = "F14 missing tensor"
    TENSOR_UNKNOWN = "F15 unknown tensor"
    TABLE_SHAPE = "F16 tensor shape"
    TABLE_QUANT = "F17 quantisation"
    TABLE_LAYOUT = "F18 layout"
    TABLE_BYTES = "F19 tensor bytes"
    TABLE_SHA256 = "F20 checksum text"
    HEADER_ENTRY = "F21 header entry"
    DTYPE = "F22 dtype"
    OFFSETS = "F23 offsets"
    STORED_SHAPE = "F24 stored shape"
    TENSOR_PAGE = "F25 tensor page"
    STORED_LENGTH = "F26 stored length"
    DATA_START = "F27 first tensor"
    DATA_HOLE = "F28 hole"
    DATA_OVERLAP = "F29 overlap"
    DATA_END = "F30 end of file"
    EXITS = "F31 exits"
    SPARSITY = "F32 sparsity"
    PREDICTORS = "F33 predictors"
    OUTLIERS = "F34 outlier columns"
    INPUTS = "F35 inputs"


def broken(rule: Rule, found: str, expected: str) -> FormatError:
    """The error for a file that breaks `rule`."""
    return FormatError(
        rule.value,
        f"breaks rule {rule.value}: found {found}, expected {expected}; "
        "the file is damaged or was not written by edgert: copy it again or convert the model again",
    )


def shown(value: object) -> str:
    """A value from a file in at most about a hundred printable characters."""
    return reprlib.repr(value)[:120]
