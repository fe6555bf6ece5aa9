"""A small valid file, its parts to change one by one, and what puts it together again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgert.config import ModelSpec
from edgert.format import ErtWriter, declared
from edgert.format.layout import PAGE, QUANTIZED

SPEC = ModelSpec("llama", 2, 8, 2, 1, 4, 16, 20, 64, 1e-5, eos_ids=(2,), exits=(1,))
CALIBRATION = {
    "temperature": 1.25,
    "confidence": [0, 0.5, 0.9],
    "tokens": [4, 0, 8],
    "agreed": [1, 0, 8],
}
METADATA = {"source": "test", "exits": json.dumps({"1": CALIBRATION})}
EXPERTS = ModelSpec(
    *("mixtral", 2, 8, 2, 1, 4, 16, 20, 64, 1e-5),
    experts=3,
    active_experts=2,
    expert_width=9,
    dense_layers=(1,),
    exits=(1,),
)
PREDICTED = ModelSpec(
    *("llama", 2, 8, 2, 1, 4, 16, 20, 64, 1e-5, "relu"), exits=(1,), neurons=True, predictors=(32, 0)
)
WORTH = {"perplexity": [5, 6], "recall": [0.9, 0], "predicted": [0.2, 0], "firing": [0.1, 0]}
Q, NORM = "layers.0.q", "output_norm"  # a matrix and a vector to damage


def valid_bytes(folder: Path, spec: ModelSpec = SPEC) -> bytes:
    path = folder / "valid.ert"
    quants = {decl.name: "q4" for decl in declared(spec) if decl.role in QUANTIZED}
    said = METADATA | ({"predictors": json.dumps(WORTH)} if spec.predictors else {})
    with ErtWriter(path, spec, quants, b'{"a":1}', said) as writer:
        for name, tensor in writer.tensors.items():
            if tensor.role != "bytes":
                writer.write(
                    name, bytes(range(1, 101)) * (tensor.nbytes // 100) + b"\7" * (tensor.nbytes % 100)
                )
        writer.finish()
    return path.read_bytes()


class Draft:
    """A file taken apart, to be damaged and put together without a check."""

    def __init__(self, blob: bytes) -> None:
        end = 8 + int.from_bytes(blob[:8], "little")
        self.entries: dict[str, Any] = json.loads(blob[8:end])
        self.metadata: dict[str, Any] = self.entries.pop("__metadata__")
        self.table: dict[str, Any] = json.loads(self.metadata["tensors"])
        self.spec: dict[str, Any] = json.loads(self.metadata["spec"])
        self.data = blob[end:]

    def header(self) -> str:
        own = {"spec": json.dumps(self.spec), "tensors": json.dumps(self.table)}
        return json.dumps({"__metadata__": {**self.metadata, **own}, **self.entries})

    def pack(self, header: str | bytes | None = None) -> bytes:
        text = self.header() if header is None else header
        raw = text.encode() if isinstance(text, str) else text
        length = -(-(8 + len(raw)) // PAGE) * PAGE - 8
        return length.to_bytes(8, "little") + raw.ljust(length) + self.data

    def metadata_with(self, key: str, text: str) -> bytes:
        """Packed with one metadata string replaced by text that need not be JSON."""
        return self.pack(json.dumps({"__metadata__": {**self.metadata, key: text}, **self.entries}))

    def move(self, name: str, begin: int) -> None:
        length = self.entries[name]["shape"][0]
        self.entries[name]["data_offsets"] = [begin, begin + length]


Damage = Callable[[Draft], bytes | None]


def edit(where: str, name: str, key: str, value: object) -> Damage:
    """Set a field of one tensor in the `table` or the header's `entries`."""

    def damage(draft: Draft) -> None:
        getattr(draft, where)[name][key] = value

    return damage


def spec(**values: object) -> Damage:
    return lambda draft: draft.spec.update(values)


def drop(where: str, name: str) -> Damage:
    def damage(draft: Draft) -> None:
        del getattr(draft, where)[name]

    return damage


def text(change: Callable[[str], str | bytes]) -> Damage:
    """Change the text of the header."""
    return lambda draft: draft.pack(change(draft.header()))


def metadata(key: str, value: str) -> Damage:
    return lambda draft: draft.metadata_with(key, value)


def exits(**values: object) -> Damage:
    return metadata("exits", json.dumps(values))


def calibration(**values: object) -> Damage:
    return exits(**{"1": CALIBRATION | values})


def firing(**values: object) -> Damage:
    """Counts of neurons that fire, in a model of as many layers as SPEC."""
    sound: dict[str, object] = {
        "share": 0.5,
        "thresholds": [0.1] * SPEC.layers,
        "zeros": [0.5] * SPEC.layers,
        "firing": [[0, 0.1, 0.2, 0.3, 1]] * SPEC.layers,
    }
    return metadata("sparsity", json.dumps(sound | values))


def inputs(**values: object) -> Damage:
    """Thresholds for inputs, in a model of as many layers as SPEC."""
    sound: dict[str, object] = {
        "share": 0.4,
        "thresholds": [[0.1, 0, 0.2, 1]] * SPEC.layers,
        "zeros": [[0.5] * 4] * SPEC.layers,
    }
    return metadata("inputs", json.dumps(sound | values))


def worth(**values: object) -> Damage:
    """What predictors are worth, in a model of as many layers as PREDICTED."""
    return metadata("predictors", json.dumps(WORTH | values))


def with_length(length: int) -> Damage:
    return lambda draft: length.to_bytes(8, "little") + draft.pack()[8:]


def off_page_header(draft: Draft) -> bytes:
    raw = draft.header().encode()
    return len(raw).to_bytes(8, "little") + raw + draft.data


def stranger(where: str, like: str) -> Damage:
    return lambda draft: getattr(draft, where).update(stranger=getattr(draft, where)[like])


def shift_all(draft: Draft) -> None:
    for name in draft.entries:
        draft.move(name, draft.entries[name]["data_offsets"][0] + PAGE)


def hole(draft: Draft) -> None:
    last = max(draft.entries, key=lambda name: draft.entries[name]["data_offsets"][0])
    draft.move(last, draft.entries[last]["data_offsets"][0] + PAGE)


def overlap(draft: Draft) -> None:
    draft.move("layers.1.q", draft.entries[Q]["data_offsets"][0])


def extra_page(draft: Draft) -> None:
    begin, end = draft.entries[Q]["data_offsets"]
    draft.entries[Q].update(shape=[end - begin + PAGE], data_offsets=[begin, end + PAGE])
