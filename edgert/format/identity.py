"""Which model a file belongs to: what an edge half and a cloud half must agree on."""

import hashlib
import json
from dataclasses import replace
from typing import Final

from edgert.format.reader import ErtFile
from edgert.format.tensors import TOKENIZER, declared

MODEL_KEY: Final = "model"
"""Metadata of a half: the identity of the whole model it was cut from."""


def identity(file: ErtFile) -> str:
    """SHA-256, in hexadecimal, of the whole model's spec and of its tensors' own checksums.

    Exit heads and the tokenizer do not count: they change nothing of what the layers compute. A half
    gives what was written into it when it was cut; nothing of the other half is needed to compare them.
    """
    if file.spec.part:
        return file.metadata.get(MODEL_KEY, "")
    spec = replace(file.spec, exits=())
    rows = [json.dumps(spec.to_json(), sort_keys=True)]
    for decl in declared(spec):
        tensor = file.tensors[decl.name]
        rows.append(f"{tensor.name} {tensor.quant} {tensor.sha256}")
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def tokenizer_identity(file: ErtFile) -> str:
    """Names what the file means by a token id: SHA-256 of its tokenizer.json; empty where it has none."""
    return f"tokenizer {file.tensors[TOKENIZER].sha256}" if TOKENIZER in file.tensors else ""
