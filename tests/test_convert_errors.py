"""Every way a conversion fails: one line that says what to do, and nothing left on the disk."""

import errno
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgert.config import QUANTS
from edgert.converters import convert, pipeline
from edgert.converters.architectures import describe, source_name
from edgert.converters.hf_config import HfConfig
from edgert.errors import ConversionError, EdgertError, NotAModelError, OptionError, UnsupportedError
from edgert.format import declared

Tensors = dict[str, NDArray[Any]]

CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 100,
}


def tensors_of(config: dict[str, Any]) -> Tensors:
    spec = describe(HfConfig(config, "config.json"), HfConfig({}, "generation_config.json")).spec
    decls = [decl for decl in declared(spec) if decl.name != "rope_frequencies"]
    return {source_name(decl.name): np.ones(decl.shape, np.float32) for decl in decls}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file(tensors_of(CONFIG), folder / "model.safetensors")
    return folder


def shards(second: str, present: bool = True, absent: str = "") -> Callable[[Path], None]:
    """Cut the folder's weights into two files; an index may name a tensor that is in neither."""

    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        tensors = tensors_of(CONFIG)
        names = list(tensors)
        save_file({name: tensors[name] for name in names[:5]}, folder / "a.safetensors")
        if present:
            save_file({name: tensors[name] for name in names[5:]}, folder / second)
        places = {name: "a.safetensors" if name in names[:5] else second for name in names}
        if absent:
            places[absent] = "a.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return apply


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | changes))

    return apply


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))

    return apply


def with_tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = tensors_of(CONFIG)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bad_weight(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = value

    return change


def as_integers(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((72, 48), np.int8)


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :]


WEIGHTS = "model.safetensors"
FAILURES: dict[str, tuple[Callable[[Path], Any], type[EdgertError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), NotAModelError, "found no config.json"),
    "no model_type": (edit("config.json", model_type=None), NotAModelError, "found no model_type"),
    "unknown architecture": (
        edit("config.json", model_type="gemma3n"),
        UnsupportedError,
        "found model_type 'gemma3n', expected one of llama, mistral, ministral, qwen2, qwen3",
    ),
    "cut config": (rewrite("config.json", lambda d: d[:40]), ConversionError, "found damaged JSON"),
    "config of another kind": (
        rewrite("config.json", lambda _: b"[]"),
        ConversionError,
        "expected a JSON object",
    ),
    "deep config": (rewrite("config.json", lambda _: b"[" * 200_000), ConversionError, "found damaged JSON"),
    "a field of another type": (
        edit("config.json", hidden_size="48"),
        ConversionError,
        "found hidden_size '48'",
    ),
    "a field that is missing": (
        edit("config.json", hidden_size=None),
        ConversionError,
        "found no hidden_size",
    ),
    "contradicting fields": (
        edit("config.json", num_key_value_heads=3),
        ConversionError,
        "not a multiple of",
    ),
    "an id outside": (edit("config.json", eos_token_id=100), ConversionError, "expected ids below vocab 100"),
    "a quantised checkpoint": (
        edit("config.json", quantization_config={"quant_method": "gptq"}),
        UnsupportedError,
        "found quantization_config",
    ),
    "other shapes": (
        edit("config.json", intermediate_size=80),
        ConversionError,
        r"of shape \[72, 48\], expected \[80, 48\]",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), NotAModelError, "found neither model.safetensors nor"),
    "pickles": (pickles_only, UnsupportedError, "found PyTorch pickles"),
    "an empty file": (rewrite(WEIGHTS, lambda _: b""), ConversionError, "found 0 bytes"),
    "a cut header": (
        rewrite(WEIGHTS, lambda d: d[:100]),
        ConversionError,
        "expected a whole safetensors file",
    ),
    "cut data": (rewrite(WEIGHTS, lambda d: d[:-1]), ConversionError, "the file is truncated, download"),
    "trailing bytes": (
        rewrite(WEIGHTS, lambda d: d + b"\0"),
        ConversionError,
        "the file is damaged, download",
    ),
    "a flipped length": (rewrite(WEIGHTS, flip(7)), ConversionError, "expected a whole safetensors file"),
    "a flipped bracket": (rewrite(WEIGHTS, flip(8)), ConversionError, "found a damaged header"),
    "a Git LFS pointer": (
        rewrite(WEIGHTS, lambda _: b"version https://git-lfs.github.com/spec/v1\n"),
        ConversionError,
        "run git lfs pull",
    ),
    "a tensor missing": (
        with_tensors(lambda t: t.pop("model.norm.weight")),
        ConversionError,
        "found no tensor model.norm.weight",
    ),
    "a tensor too many": (
        with_tensors(lambda t: t.update({"score.weight": np.ones((2, 48), np.float32)})),
        UnsupportedError,
        "found 1 tensors that llama does not have, first 'score.weight'",
    ),
    "integers": (
        with_tensors(as_integers),
        UnsupportedError,
        "found .* as 'I8', expected F32, F16, BF16",
    ),
    "NaN": (with_tensors(bad_weight(np.nan)), ConversionError, "layers.1.v: found NaN or infinity"),
    "a huge weight": (
        with_tensors(bad_weight(1e30)),
        ConversionError,
        r"layers.1.v: found a weight of 1e\+30",
    ),
    "a shard missing": (
        shards("b.safetensors", present=False),
        ConversionError,
        "found 1 of 2 shards, 'b.safetensors' is missing",
    ),
    "a shard elsewhere": (
        shards("../b.safetensors", present=False),
        ConversionError,
        "found shard '../b.safetensors', expected the plain name",
    ),
    "an index of another version": (
        shards("b.safetensors", absent="model.extra"),
        ConversionError,
        "found no 'model.extra' in a.safetensors",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        ConversionError,
        "AutoTokenizer.from_pretrained",
    ),
    "a cut tokenizer": (
        rewrite("tokenizer.json", lambda d: d[:9]),
        ConversionError,
        "tokenizer.json: found damaged",
    ),
    "a template of other bytes": (
        rewrite("chat_template.jinja", lambda _: b"\xff"),
        ConversionError,
        "found bytes that are not UTF-8",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_folder_that_cannot_be_converted_says_so_in_one_line(
    name: str, folder: Path, tmp_path: Path
) -> None:
    damage, kind, message = FAILURES[name]
    damage(folder)
    out = tmp_path / "m.ert"
    out.write_bytes(b"an older file")
    with pytest.raises(kind, match=message) as caught:
        convert(folder, out)
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == b"an older file"
    assert {path.name for path in tmp_path.iterdir()} == {"m.ert", "tiny-llama"}  # nothing left behind


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nothing", NotAModelError, "found no such file or folder"),
        ("model.gguf", ConversionError, "found 4 bytes, expected 8 or more"),
        ("sha256-of-some-model", ConversionError, "found 4 bytes, expected 8 or more"),
        ("model.safetensors", NotAModelError, "pass the folder that holds it"),
        ("notes.txt", NotAModelError, "found a file, expected a Hugging Face folder"),
    ],
)
def test_a_source_of_another_kind_is_refused(
    name: str, kind: type[EdgertError], message: str, tmp_path: Path
) -> None:
    if name != "nothing":
        content = b"GGUF" if name in ("model.gguf", "sha256-of-some-model") else b"text"
        (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        convert(tmp_path / name, tmp_path / "m.ert")


def test_an_unknown_quantisation_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"quant is 'q5'; expected one of {', '.join(QUANTS)}"):
        convert(folder, tmp_path / "m.ert", "q5")  # type: ignore[arg-type]


def test_a_folder_to_write_to_that_does_not_exist_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"found no folder .*absent to write to"):
        convert(folder, tmp_path / "absent" / "m.ert")


@pytest.mark.parametrize("room", [0, 5000, 60_000])
def test_a_full_disk_leaves_nothing_behind(
    room: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr("edgert.format.writer.Disk.create", lambda _, path: Full(path, "xb"))
    with pytest.raises(ConversionError, match="disk full"):
        convert(folder, tmp_path / "m.ert")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-llama"}


def test_a_writer_that_fails_while_slabs_are_rounded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those handed over are rounded to their end, no others are begun, and no thread or file is left."""
    encode, at_work, failed = pipeline._encode, threading.Semaphore(0), threading.Event()
    rounded: list[int] = []

    def slowly(*given: Any) -> Any:
        rounded.append(len(rounded))
        if len(rounded) > 1:
            at_work.release()
            assert failed.wait(60)
        return encode(*given)

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            assert at_work.acquire(timeout=60) and at_work.acquire(timeout=60)
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgert.format.writer.Disk.create", lambda _, path: Full(path, "xb"))
    monkeypatch.setattr(pipeline, "_encode", slowly)
    monkeypatch.setattr(pipeline, "_threads", lambda: 2)
    monkeypatch.setattr(pipeline, "SLAB_WEIGHTS", 1)  # 16 rows, of 100
    before = set(threading.enumerate())
    with pytest.raises(ConversionError, match="disk full"):
        convert(folder, tmp_path / "m.ert")
    assert failed.is_set() and 3 <= len(rounded) <= 4
    assert set(threading.enumerate()) <= before
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-llama"}
