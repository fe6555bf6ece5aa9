"""What is written is what is read, by us and by safetensors; and nothing is ever half written."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from edgert.config import ACTIVATIONS, ModelSpec
from edgert.format import ErtFile, ErtWriter, ExitCalibration, declared
from edgert.format.layout import LARGE_PAGE, allowed_quants, page_padded, stored_bytes
from edgert.format.verify import check
from edgert.format.writer import Disk

TINY = ModelSpec("llama", 1, 2, 1, 1, 2, 1, 1, 1, 1e-5, tied_embeddings=True)
TINY_QUANTS = {decl.name: "q4" for decl in declared(TINY) if decl.role == "matrix"}


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    small, flag = st.integers(1, 40), st.booleans()
    layers, kv_heads, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(small)
    return ModelSpec(
        architecture=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
        layers=layers,
        width=draw(small),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 9)),
        ffn_width=draw(small),
        vocab=vocab,
        context=draw(small),
        norm_eps=draw(st.floats(0, 1)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        tied_embeddings=draw(flag),
        qkv_bias=draw(flag),
        output_bias=draw(flag),
        ffn_bias=draw(flag),
        qk_norm=draw(flag),
        windows=draw(st.just(()) | st.tuples(*[small] * layers)),
        bos_id=draw(st.none() | st.integers(0, vocab - 1)),
        eos_ids=tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=3))),
        exits=tuple(layer for layer in range(1, layers) if draw(flag)),
    )


@settings(max_examples=40, deadline=None)
@given(st.data(), specs(), st.none() | st.binary(min_size=1, max_size=5000), st.integers(0, 2**32 - 1))
def test_a_written_file_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    spec: ModelSpec,
    tokenizer: bytes | None,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "m.ert"
    matrices = [decl for decl in declared(spec) if decl.role == "matrix"]
    quants = {d.name: data.draw(st.sampled_from(allowed_quants(d.role, d.shape))) for d in matrices}
    random = np.random.default_rng(seed)
    calibration = ExitCalibration(0.5, (0.0, 0.9), (7, 2), (3, 2))
    exits = {"exits": json.dumps({layer: calibration.to_json() for layer in spec.exits})}
    metadata = {"chat_template": "{{ ä }}"} | (exits if spec.exits else {})
    with ErtWriter(path, spec, quants, tokenizer, metadata) as writer:
        contents = {n: random.bytes(t.nbytes) for n, t in writer.tensors.items() if t.role != "bytes"}
        for name in random.permutation(list(contents)):
            writer.write(str(name), contents[name])
        writer.finish({"errors": "{}"})
    with ErtFile.open(path) as file:
        assert file.spec == spec
        assert file.tokenizer_json() == tokenizer
        assert file.metadata == metadata | {"errors": "{}"}
        assert file.exits == dict.fromkeys(spec.exits, calibration)
        assert {name: file.raw(name).tobytes() for name in contents} == contents
        assert {d.name: file.tensors[d.name].quant for d in matrices} == quants
        assert file.size == writer.size == path.stat().st_size
        assert file.tensors == writer.tensors
        assert list(file.tensors) == [d.name for d in declared(spec, len(tokenizer or b""))]
    check(path)
    with safe_open(path, "numpy") as peer:
        assert set(peer.keys()) == set(file.tensors)
        for name, blob in contents.items():
            stored = peer.get_tensor(name).tobytes()
            assert stored == blob + bytes(page_padded(len(blob)) - len(blob))


# fmt: off
GOLDEN_HEADER = (
    rb'{"__metadata__":{"format":"edgert","format_version":"1",'
    rb'"spec":"{\"architecture\":\"llama\",\"layers\":1,\"width\":2,\"heads\":1,'
    rb'\"kv_heads\":1,\"head_dim\":2,\"ffn_width\":1,\"vocab\":1,\"context\":1,'
    rb'\"norm_eps\":1e-05,\"activation\":\"silu\",'
    rb'\"tied_embeddings\":true,\"qkv_bias\":false,\"output_bias\":false,'
    rb'\"ffn_bias\":false,\"qk_norm\":false,\"windows\":[],'
    rb'\"rope_theta\":10000.0,\"rope_scaling\":\"default\",\"rope_magnitude\":1.0,\"bos_id\":null,\"eos_ids\":[]}",'
    rb'"tensors":"{'
    rb'\"tokenizer.json\":{\"shape\":[2],\"quant\":\"u8\",\"layout\":\"flat\",'
    rb'\"bytes\":2,\"sha256\":\"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a\"},'
    rb'\"token_embedding\":{\"shape\":[1,2],\"quant\":\"q4\",\"layout\":\"rows16\",'
    rb'\"bytes\":288,\"sha256\":\"c3be2af8b2e98345a8cea9cf6862d443bd323fe273f4103d667529c6842a1cb8\"},'
    rb'\"rope_frequencies\":{\"shape\":[1],\"quant\":\"f32\",\"layout\":\"flat\",'
    rb'\"bytes\":4,\"sha256\":\"27ecd0a598e76f8a2fd264d427df0a119903e8eae384e478902541756f089dd1\"},'
    rb'\"layers.0.attention_norm\":{\"shape\":[2],\"quant\":\"f32\",\"layout\":\"flat\",'
    rb'\"bytes\":8,\"sha256\":\"04abc8821a06e5a30937967d11ad10221cb5ac3b5273e434f1284ee87129a061\"},'
    rb'\"layers.0.q\":{\"shape\":[2,2],\"quant\":\"q4\",\"layout\":\"rows16\",'
    rb'\"bytes\":288,\"sha256\":\"c3be2af8b2e98345a8cea9cf6862d443bd323fe273f4103d667529c6842a1cb8\"},'
    rb'\"layers.0.k\":{\"shape\":[2,2],\"quant\":\"q4\",\"layout\":\"rows16\",'
    rb'\"bytes\":288,\"sha256\":\"c3be2af8b2e98345a8cea9cf6862d443bd323fe273f4103d667529c6842a1cb8\"},'
    rb'\"layers.0.v\":{\"shape\":[2,2],\"quant\":\"q4\",\"layout\":\"rows16\",'
    rb'\"bytes\":288,\"sha256\":\"c3be2af8b2e98345a8cea9cf6862d443bd323fe273f4103d667529c6842a1cb8\"},'
    rb'\"layers.0.o\":{\"shape\":[2,2],\"quant\":\"q4\",\"layout\":\"rows16\",'
    rb'\"bytes\":288,\"sha256\":\"c3be2af8b2e98345a8cea9cf6862d443bd323fe273f4103d667529c6842a1cb8\"},'
    rb'\"layers.0.ffn_norm\":{\"shape\":[2],\"quant\":\"f32\",\"layout\":\"flat\",'
    rb'\"bytes\":8,\"sha256\":\"04abc8821a06e5a30937967d11ad10221cb5ac3b5273e434f1284ee87129a061\"},'
    rb'\"layers.0.gate\":{\"shape\":[1,2],\"quant\":\"q4\",\"layout\":\"rows16\",'
    rb'\"bytes\":288,\"sha256\":\"c3be2af8b2e98345a8cea9cf6862d443bd323fe273f4103d667529c6842a1cb8\"},'
    rb'\"layers.0.up\":{\"shape\":[1,2],\"quant\":\"q4\",\"layout\":\"rows16\",'
    rb'\"bytes\":288,\"sha256\":\"c3be2af8b2e98345a8cea9cf6862d443bd323fe273f4103d667529c6842a1cb8\"},'
    rb'\"layers.0.down\":{\"shape\":[2,1],\"quant\":\"q4\",\"layout\":\"rows16\",'
    rb'\"bytes\":288,\"sha256\":\"c3be2af8b2e98345a8cea9cf6862d443bd323fe273f4103d667529c6842a1cb8\"},'
    rb'\"output_norm\":{\"shape\":[2],\"quant\":\"f32\",\"layout\":\"flat\",'
    rb'\"bytes\":8,\"sha256\":\"04abc8821a06e5a30937967d11ad10221cb5ac3b5273e434f1284ee87129a061\"}}",'
    rb'"source":"golden"},'
    rb'"tokenizer.json":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]},'
    rb'"token_embedding":{"dtype":"U8","shape":[4096],"data_offsets":[4096,8192]},'
    rb'"rope_frequencies":{"dtype":"U8","shape":[4096],"data_offsets":[8192,12288]},'
    rb'"layers.0.attention_norm":{"dtype":"U8","shape":[4096],"data_offsets":[12288,16384]},'
    rb'"layers.0.q":{"dtype":"U8","shape":[4096],"data_offsets":[16384,20480]},'
    rb'"layers.0.k":{"dtype":"U8","shape":[4096],"data_offsets":[20480,24576]},'
    rb'"layers.0.v":{"dtype":"U8","shape":[4096],"data_offsets":[24576,28672]},'
    rb'"layers.0.o":{"dtype":"U8","shape":[4096],"data_offsets":[28672,32768]},'
    rb'"layers.0.ffn_norm":{"dtype":"U8","shape":[4096],"data_offsets":[32768,36864]},'
    rb'"layers.0.gate":{"dtype":"U8","shape":[4096],"data_offsets":[36864,40960]},'
    rb'"layers.0.up":{"dtype":"U8","shape":[4096],"data_offsets":[40960,45056]},'
    rb'"layers.0.down":{"dtype":"U8","shape":[4096],"data_offsets":[45056,49152]},'
    rb'"output_norm":{"dtype":"U8","shape":[4096],"data_offsets":[49152,53248]}}'
)
# fmt: on
GOLDEN_LENGTH = b"\xf8\x2f\0\0\0\0\0\0"  # 12280: three pages less the eight bytes themselves
GOLDEN_MATRIX, GOLDEN_NORM = b"\1" * 288, b"\1" * 8
GOLDEN_STORED = [b"{}", GOLDEN_MATRIX, b"\1" * 4, GOLDEN_NORM, *[GOLDEN_MATRIX] * 4]
GOLDEN_STORED += [GOLDEN_NORM, *[GOLDEN_MATRIX] * 3, GOLDEN_NORM]
GOLDEN_DATA = b"".join(stored.ljust(4096, b"\0") for stored in GOLDEN_STORED)
GOLDEN = GOLDEN_LENGTH + GOLDEN_HEADER.ljust(12280) + GOLDEN_DATA


def write_tiny(path: Path, disk: Disk | None = None, **metadata: str) -> None:
    with ErtWriter(path, TINY, TINY_QUANTS, b"{}", {"source": "golden"}, disk) as writer:
        for name, tensor in writer.tensors.items():
            if tensor.role != "bytes":
                writer.write(name, b"\1" * tensor.nbytes)
        writer.finish(metadata)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_writer_writes_the_golden_bytes(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.ert")
    assert (tmp_path / "tiny.ert").read_bytes() == GOLDEN
    assert files(tmp_path) == ["tiny.ert"]


def test_the_golden_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "golden.ert"
    path.write_bytes(GOLDEN)
    check(path)
    with ErtFile.open(path) as file:
        assert file.spec == TINY
        assert file.tokenizer_json() == b"{}"
        assert file.metadata == {"source": "golden"}
        assert len(file.tensors) == 13
        tensor = file.tensors["layers.0.down"]
        assert (tensor.role, tensor.shape, tensor.quant, tensor.layout) == ("matrix", (2, 1), "q4", "rows16")
        assert (tensor.offset, tensor.nbytes) == (12288 + 45056, 288)


def test_stored_bytes_count_whole_tiles() -> None:
    assert stored_bytes("matrix", "q4", (16, 32)) == 288
    assert stored_bytes("matrix", "q8", (16, 32)) == 544
    assert stored_bytes("matrix", "f16", (16, 32)) == 1024
    assert stored_bytes("matrix", "f32", (16, 32)) == 2048
    assert stored_bytes("matrix", "q4", (17, 172)) == 2 * 6 * 288
    assert stored_bytes("vector", "f32", (5,)) == 20
    assert stored_bytes("bytes", "u8", (5,)) == 5


def test_the_spec_decides_which_tensors_there_are() -> None:
    def names(**flags: Any) -> set[str]:
        return {d.name.removeprefix("layers.0.") for d in declared(replace(TINY, **flags))}

    plain = names()
    assert names(tied_embeddings=False) - plain == {"output"}
    assert names(qkv_bias=True) - plain == {"q_bias", "k_bias", "v_bias"}
    assert names(output_bias=True) - plain == {"o_bias"}
    assert names(ffn_bias=True) - plain == {"gate_bias", "up_bias", "down_bias"}
    assert names(qk_norm=True) - plain == {"q_norm", "k_norm"}


def test_shapes_follow_the_spec() -> None:
    spec = ModelSpec(
        "x", 1, 10, 6, 2, 4, 7, 9, 5, 1e-5, qkv_bias=True, output_bias=True, ffn_bias=True, qk_norm=True
    )
    assert {d.name.removeprefix("layers.0."): d.shape for d in declared(spec, 3)} == {
        "tokenizer.json": (3,),
        "token_embedding": (9, 10),
        "rope_frequencies": (2,),
        "attention_norm": (10,),
        "q": (24, 10),
        "q_bias": (24,),
        "k": (8, 10),
        "k_bias": (8,),
        "v": (8, 10),
        "v_bias": (8,),
        "q_norm": (4,),
        "k_norm": (4,),
        "o": (10, 24),
        "o_bias": (10,),
        "ffn_norm": (10,),
        "gate": (7, 10),
        "gate_bias": (7,),
        "up": (7, 10),
        "up_bias": (7,),
        "down": (10, 7),
        "down_bias": (10,),
        "output_norm": (10,),
        "output": (9, 10),
    }


def test_the_data_is_read_only_and_outlives_the_file(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.ert")
    with ErtFile.open(tmp_path / "tiny.ert") as file:
        view = file.raw("layers.0.q")
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0
    assert view.tobytes() == b"\1" * 288
    assert file.data.size == 0
    file.close()


def test_a_file_may_have_no_tokenizer(tmp_path: Path) -> None:
    with ErtWriter(tmp_path / "m.ert", TINY, TINY_QUANTS) as writer:
        for name, tensor in writer.tensors.items():
            writer.write(name, bytes(tensor.nbytes))
        writer.finish()
    with ErtFile.open(tmp_path / "m.ert") as file:
        assert file.tokenizer_json() is None
        assert "tokenizer.json" not in file.tensors


def test_arrays_and_chunks_are_written_in_c_order(tmp_path: Path) -> None:
    values = np.arange(144, dtype=np.float16).reshape(12, 12)
    with ErtWriter(tmp_path / "m.ert", TINY, TINY_QUANTS) as writer:
        for name, tensor in writer.tensors.items():
            if name == "layers.0.q":
                writer.write(name, values.T)  # not contiguous
            elif name == "layers.0.k":
                writer.write(name, (rows for rows in (values[:5], values[5:5], values[5:])))
            else:
                writer.write(name, bytearray(tensor.nbytes))
        writer.finish()
    check(tmp_path / "m.ert")
    with ErtFile.open(tmp_path / "m.ert") as file:
        assert file.raw("layers.0.q").tobytes() == values.T.tobytes()
        assert file.raw("layers.0.k").tobytes() == values.tobytes()


def test_late_metadata_fits_the_reserved_room(tmp_path: Path) -> None:
    errors = json.dumps(dict.fromkeys(TINY_QUANTS, 0.0123456789012345))
    write_tiny(tmp_path / "m.ert", errors=errors, calibration="0" * 64)
    with ErtFile.open(tmp_path / "m.ert") as file:
        assert file.metadata["errors"] == errors
        assert file.size == len(GOLDEN)


def test_large_tensors_are_written_in_steps_that_end_at_large_pages(tmp_path: Path) -> None:
    """What was just written stays in the system's memory, and so in pages as large as the steps."""
    steps: list[tuple[int, int]] = []

    class Recorded(io.FileIO):
        def write(self, data: Any) -> int:
            steps.append((self.tell(), len(data)))
            return super().write(data)

    class Recording(Disk):
        def create(self, path: Path) -> BinaryIO:
            return io.BufferedWriter(Recorded(path, "xb"), LARGE_PAGE)

    spec = replace(TINY, vocab=1 << 17)
    with ErtWriter(tmp_path / "m.ert", spec, dict.fromkeys(TINY_QUANTS, "f32"), disk=Recording()) as writer:
        for name, tensor in writer.tensors.items():
            pieces = range(0, tensor.nbytes, 999_999)
            writer.write(name, (bytes(min(999_999, tensor.nbytes - at)) for at in pieces))
        writer.finish()
    assert all(at // LARGE_PAGE == (at + length - 1) // LARGE_PAGE for at, length in steps)
    assert sum(length == LARGE_PAGE for _, length in steps) >= writer.size // LARGE_PAGE - 2 > 4
