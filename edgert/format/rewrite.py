"""A file once more, with other metadata: what is learned about a model after it was converted."""

import os
from collections.abc import Mapping
from pathlib import Path

from edgert.errors import ChecksumError
from edgert.format.layout import QUANTIZED
from edgert.format.reader import ErtFile
from edgert.format.tensors import TOKENIZER, declared
from edgert.format.writer import ErtWriter


def copy_tensors(file: ErtFile, writer: ErtWriter, names: list[str]) -> None:
    """Copy stored tensors as they are; ChecksumError for one that is not what was written."""
    for name in names:
        writer.write(name, file.raw(name))
        if writer.tensors[name].sha256 != file.tensors[name].sha256:
            raise ChecksumError(
                f"{file.path}: found other bytes than were written in {name}, expected their SHA-256; "
                "copy the file again or convert the model again"
            )


def rewrite(file: ErtFile, out: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write `out`, which may be the file itself, with these metadata over its own."""
    quants = {t.name: t.quant for t in file.tensors.values() if t.role in QUANTIZED}
    merged = {**file.metadata, **metadata}
    with ErtWriter(Path(out), file.spec, quants, file.tokenizer_json(), merged) as writer:
        copy_tensors(file, writer, [decl.name for decl in declared(file.spec) if decl.name != TOKENIZER])
        writer.finish()
