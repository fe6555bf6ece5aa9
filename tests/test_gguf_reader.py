"""GGUF files built by hand: what is read from good ones, and the one line that each damage gives."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgert.converters.gguf.reader import open_gguf
from edgert.errors import ConversionError, EdgertError, NotAModelError, UnsupportedError

U8, I8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def array(key: str, kind: int, count: int, items: bytes) -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + items)


@dataclass
class Entry:
    name: str = "a"
    shape: tuple[int, ...] = (4, 8)  # rows first
    kind: int = 0
    offset: int = 0
    dimensions: int | None = None

    def header(self) -> bytes:
        count = len(self.shape) if self.dimensions is None else self.dimensions
        sizes = struct.pack(f"<{len(self.shape)}Q", *reversed(self.shape))
        return text(self.name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class Draft:
    """A file, in pieces that a test may replace."""

    start: bytes = b"GGUF" + struct.pack("<I", 3)
    pairs: list[bytes] = field(default_factory=lambda: [number("x.y", 7)])
    entries: list[Entry] = field(default_factory=lambda: [Entry()])
    pair_count: int | None = None
    tensor_count: int | None = None
    data: bytes = np.arange(32, dtype="<f4").tobytes()
    alignment: int = 32
    cut: int | None = None  # the length of the file

    def write(self, path: Path) -> Path:
        tensors = len(self.entries) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        header = self.start + struct.pack("<QQ", tensors, pairs) + b"".join(self.pairs)
        header += b"".join(entry.header() for entry in self.entries)
        header += bytes(-len(header) % self.alignment)
        path.write_bytes((header + self.data)[: self.cut])
        return path


def test_reads_metadata_and_tensors(tmp_path: Path) -> None:
    draft = Draft(
        pairs=[
            number("n", 7),
            pair("s", STRING, text("é")),
            pair("f", F32, struct.pack("<f", 0.5)),
            pair("b", BOOL, b"\1"),
            pair("big", U64, struct.pack("<Q", 2**63)),
            array("texts", STRING, 2, text("a") + text("")),
            array("numbers", I8, 3, struct.pack("<3b", -1, 0, 1)),
            array("flags", BOOL, 2, b"\1\0"),
            array("none", STRING, 0, b""),
        ]
    )
    file = open_gguf(draft.write(tmp_path / "m.gguf"))
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
    assert plain == {
        "n": 7,
        "s": "é",
        "f": 0.5,
        "b": True,
        "big": 2**63,
        "texts": ["a", ""],
        "numbers": [-1, 0, 1],
        "flags": [True, False],
        "none": [],
    }
    assert type(plain["n"]) is int and type(plain["b"]) is bool
    tensor = file.tensors["a"]
    assert tensor.shape == (4, 8)
    np.testing.assert_array_equal(tensor.vector(), np.arange(32))
    raw = tensor.rows(1, 2)
    np.testing.assert_array_equal(raw.view("<f4"), np.arange(8, 24).reshape(2, 8))


def test_version_2_is_read_alike(tmp_path: Path) -> None:
    path = Draft(start=b"GGUF" + struct.pack("<I", 2)).write(tmp_path / "m.gguf")
    assert open_gguf(path).metadata["x.y"] == 7


def test_alignment_and_order_of_the_file(tmp_path: Path) -> None:
    draft = Draft(
        pairs=[number("general.alignment", 128)],
        entries=[Entry("late", offset=128), Entry("early", offset=0)],
        data=np.zeros(32, "<f4").tobytes() + np.ones(32, "<f4").tobytes(),
        alignment=128,
    )
    tensors = open_gguf(draft.write(tmp_path / "m.gguf")).tensors
    assert tensors["early"].vector().sum() == 0
    assert tensors["late"].vector().sum() == 32


HOSTILE: dict[str, tuple[Draft, str]] = {
    "cut in a count": (Draft(cut=12), "found 12 bytes, expected 16 or more, for the number of tensors"),
    "cut behind the counts": (Draft(cut=24), "found 1 tensors in 8 bytes"),
    "more tensors than bytes": (Draft(tensor_count=2**60), "1,152,921,504,606,846,976 tensors in"),
    "more keys than bytes": (Draft(pair_count=2**63), "9,223,372,036,854,775,808 keys in"),
    "one key too many": (Draft(pair_count=2), "expected"),
    "a key longer than allowed": (
        Draft(pairs=[number("k" * 65536, 1)]),
        "a key of 65,536 bytes, expected at most",
    ),
    "a key longer than the file": (Draft(pairs=[struct.pack("<Q", 60000)]), "60,0.. or more, for a key"),
    "a key twice": (Draft(pairs=[number("k", 1), number("k", 2)]), "key 'k' twice"),
    "a key that is not text": (Draft(pairs=[text(b"\xff\xfe") + struct.pack("<II", 4, 0)]), "not UTF-8"),
    "a string that is not text": (Draft(pairs=[pair("k", STRING, text(b"\xc3\x28"))]), "not UTF-8"),
    "a text in an array that is not text": (
        Draft(pairs=[array("k", STRING, 2, text("a") + text(b"\x80"))]),
        "not UTF-8",
    ),
    "a string longer than the file": (
        Draft(pairs=[pair("k", STRING, struct.pack("<Q", 2**40))]),
        "'k' of 1,099,511,627,776 bytes",
    ),
    "an unknown type of value": (Draft(pairs=[pair("k", 13, bytes(8))]), "'k' of type 13"),
    "an array of an unknown type": (Draft(pairs=[array("k", 99, 1, bytes(8))]), "'k' of type 99"),
    "an array of arrays": (Draft(pairs=[array("k", ARRAY, 1, bytes(12))]), "an array of arrays"),
    "an array longer than the file": (Draft(pairs=[array("k", U8, 2**50, b"")]), "items of 'k' in"),
    "wide items longer than the file": (Draft(pairs=[array("k", U64, 100, b"")]), "or more, for 'k'"),
    "strings more than the file": (Draft(pairs=[array("k", STRING, 2**61, b"")]), "strings of 'k' in"),
    "a string of an array beyond the file": (
        Draft(pairs=[array("k", STRING, 1, struct.pack("<Q", 2**62))]),
        "or more, for 'k'",
    ),
    "a truth value of 2": (Draft(pairs=[pair("k", BOOL, b"\2")]), "'k' of 2, expected true or false"),
    "an alignment of 0": (Draft(pairs=[number("general.alignment", 0)]), "general.alignment 0"),
    "an alignment of 24": (Draft(pairs=[number("general.alignment", 24)]), "general.alignment 24"),
    "an alignment that is text": (
        Draft(pairs=[pair("general.alignment", STRING, text("32"))]),
        "general.alignment '32'",
    ),
    "an alignment larger than the file": (
        Draft(pairs=[pair("general.alignment", U64, struct.pack("<Q", 2**62))]),
        "or more, for 'a'",
    ),
    "a name longer than allowed": (Draft(entries=[Entry("n" * 65)]), "the name of a tensor of 65 bytes"),
    "a tensor twice": (Draft(entries=[Entry(), Entry(offset=128)], data=bytes(256)), "tensor 'a' twice"),
    "no dimensions": (Draft(entries=[Entry(dimensions=0)]), "'a' of 0 dimensions"),
    "five dimensions": (Draft(entries=[Entry(shape=(1, 1, 1, 1, 1))]), "'a' of 5 dimensions"),
    "four billion dimensions": (Draft(entries=[Entry(dimensions=2**32 - 1)]), "4294967295 dimensions"),
    "a dimension of 0": (Draft(entries=[Entry(shape=(0, 8))]), "'a' of shape"),
    "a dimension beyond the file": (Draft(entries=[Entry(shape=(2**62, 2**62))]), "or more, for 'a'"),
    "rows that fill no block": (Draft(entries=[Entry(shape=(4, 33), kind=2)]), "shape .4, 33. in Q4_0"),
    "an offset off the grid": (Draft(entries=[Entry(offset=8)], data=bytes(256)), "at byte"),
    "an offset beyond the file": (Draft(entries=[Entry(offset=2**63)]), "or more, for 'a'"),
    "tensors over each other": (
        Draft(entries=[Entry("a"), Entry("b", offset=64)], data=bytes(256)),
        "'b' at byte .*, expected a multiple of 32 behind",
    ),
    "data cut short": (Draft(data=bytes(127)), "or more, for 'a'"),
    "no data": (Draft(data=b""), "or more, for 'a'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damage_is_one_line(name: str, tmp_path: Path) -> None:
    draft, expected = HOSTILE[name]
    with pytest.raises(ConversionError, match=expected) as caught:
        open_gguf(draft.write(tmp_path / "m.gguf"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'm.gguf'}: found ")


@pytest.mark.parametrize(
    ("start", "kind", "expected"),
    [
        (b"", NotAModelError, "starts with b''"),
        (b"GGML\3\0\0\0", NotAModelError, "starts with b'GGML'"),
        (b"GGUF\0\0\0\3", UnsupportedError, "big-endian GGUF version 3"),
        (b"GGUF\1\0\0\0", UnsupportedError, "GGUF version 1"),
        (b"GGUF\4\0\0\0", UnsupportedError, "GGUF version 4"),
        (b"GGUF\3\0", ConversionError, "expected"),
        (b"version https://git-lfs.github.com/spec/v1", ConversionError, "Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_readable_gguf(
    start: bytes, kind: type[EdgertError], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(start)
    with pytest.raises(kind, match=expected):
        open_gguf(path)


def test_an_unknown_tensor_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'a' of tensor type 31"):
        open_gguf(Draft(entries=[Entry(kind=31)]).write(tmp_path / "m.gguf"))


def test_every_cut_of_a_file_is_an_error(tmp_path: Path) -> None:
    whole = Draft().write(tmp_path / "whole.gguf").stat().st_size
    for cut in range(whole):
        with pytest.raises(EdgertError):
            open_gguf(Draft(cut=cut).write(tmp_path / "m.gguf"))


def test_more_strings_than_any_vocabulary_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.converters.gguf.cursor.MAX_STRINGS", 3)
    pairs = [array("k", STRING, 2, text("") * 2), array("l", STRING, 2, text("") * 2)]
    with pytest.raises(ConversionError, match="found 4 strings, expected at most 3"):
        open_gguf(Draft(pairs=pairs).write(tmp_path / "m.gguf"))


def test_a_header_longer_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.converters.gguf.cursor.MAX_HEADER_BYTES", 1000)
    draft = Draft(pairs=[array("k", U8, 1000, bytes(1000))])
    with pytest.raises(ConversionError, match="a header of more than 1,000 bytes"):
        open_gguf(draft.write(tmp_path / "m.gguf"))


def part(no: int, count: int, name: str, total: int = 2) -> Draft:
    """One part of a model of two tensors."""
    keys = [number("split.no", no), number("split.count", count), number("split.tensors.count", total)]
    own = [number("only.first", 5)] if no == 0 else []
    return Draft(pairs=[*keys, *own], entries=[Entry(name)])


def write_parts(folder: Path, *drafts: Draft) -> list[Path]:
    count = len(drafts)
    return [d.write(folder / f"m-{i + 1:05}-of-{count:05}.gguf") for i, d in enumerate(drafts)]


def test_parts_are_read_as_one_given_any(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, part(0, 2, "a"), part(1, 2, "b"))
    for path in paths:
        file = open_gguf(path)
        assert file.metadata["only.first"] == 5
        assert {name: t.path for name, t in file.tensors.items()} == dict(zip("ab", paths, strict=True))


SPLITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a part that is missing": (
        lambda folder: write_parts(folder, part(0, 2, "a"), part(1, 2, "b"))[1].unlink(),
        "m-00002-of-00002.gguf: found no such file",
    ),
    "a part of another split": (
        lambda folder: write_parts(folder, part(0, 2, "a"), part(1, 3, "b")),
        "found part 2 of 3, expected part 2 of 2",
    ),
    "a part twice": (
        lambda folder: write_parts(folder, part(0, 2, "a"), part(0, 2, "b")),
        "found part 1 of 2, expected part 2 of 2",
    ),
    "a tensor in two parts": (
        lambda folder: write_parts(folder, part(0, 2, "a"), part(1, 2, "a")),
        "tensor a a second time",
    ),
    "tensors that are in no part": (
        lambda folder: write_parts(folder, part(0, 2, "a", 3), part(1, 2, "b")),
        "found 2 tensors in all parts, expected 3",
    ),
    "a name that is not a part's": (
        lambda folder: part(0, 2, "a").write(folder / "m-00001-of-00002.gguf").rename(folder / "m.gguf"),
        "found part 1 of 2 under this name",
    ),
    "a name of another part": (
        lambda folder: write_parts(folder, part(1, 2, "a"), part(0, 2, "b")),
        "found part 2 of 2 under this name",
    ),
    "a negative count": (
        lambda folder: Draft(pairs=[pair("split.count", 5, struct.pack("<i", -1))]).write(folder / "m.gguf"),
        "split.count -1",
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_that_do_not_belong_together(name: str, tmp_path: Path) -> None:
    make, expected = SPLITS[name]
    make(tmp_path)
    first = tmp_path / "m-00001-of-00002.gguf"
    with pytest.raises(ConversionError, match=expected):
        open_gguf(first if first.exists() else tmp_path / "m.gguf")


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {i} é" for i in range(1000)])
    writer.add_tensor("t", np.arange(96, dtype=np.float32).reshape(2, 48))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file = open_gguf(path)
    assert file.metadata["tokenizer.ggml.tokens"] == [f"token {i} é" for i in range(1000)]
    np.testing.assert_array_equal(file.tensors["t"].vector(), np.arange(96))


def test_a_vocabulary_longer_than_the_first_read(tmp_path: Path) -> None:
    count = 150_000
    tokens = b"".join(text(f"token{i}") for i in range(count))
    path = Draft(pairs=[array("tokens", STRING, count, tokens)]).write(tmp_path / "m.gguf")
    assert open_gguf(path).metadata["tokens"] == [f"token{i}" for i in range(count)]
