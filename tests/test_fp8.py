"""Models as DeepSeek-V3 and Qwen3-FP8 are published: matrices of 8-bit floats with a scale for each block."""

import json
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgert
from edgert.converters.fp8 import FLOAT8, Fp8Tensor
from edgert.converters.safetensors_source import open_shard
from edgert.errors import ConversionError, UnsupportedError
from tests import kernel_inputs as inputs
from tests import tiny_models
from tests.tiny_configs import CONFIGS

Arrays = dict[str, NDArray[Any]]
LEFT = ("embed_tokens", "lm_head", "mlp.gate.", "norm")
"""What stays in 16 bits or more."""


def number(code: int) -> float:
    """What a byte stands for, by the table of the format."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


def described(*block: int) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }


def halved(name: str, block: tuple[int, int]) -> tuple[Arrays, Arrays]:
    """The tensors of a tiny model in 8-bit floats, and the same numbers in float32."""
    plain: Arrays = dict(tiny_models.weights(CONFIGS[name], 1))
    published: Arrays = dict(plain)
    for key, array in sorted(plain.items()):
        if array.ndim != 2 or any(part in key for part in LEFT):
            continue
        rows, columns = array.shape
        codes = (
            inputs.whole((key, "codes"), 0, 0x57, rows, columns) | inputs.whole(key, 0, 1, rows, columns) << 7
        )
        grid = -(-rows // block[0]), -(-columns // block[1])
        scales = (np.abs(inputs.uniform((key, "scales"), *grid)) + np.float32(0.25)) * np.float32(0.02)
        exact = np.array([number(code) for code in codes.reshape(-1).tolist()], np.float32).reshape(
            rows, columns
        )
        for i in range(rows):
            for j in range(grid[1]):
                exact[i, j * block[1] : (j + 1) * block[1]] *= scales[i // block[0], j]
        plain[key] = exact
        published[key] = codes.astype(np.uint8)
        published[f"{key}_scale_inv"] = scales
    return published, plain


def write_shard(path: Path, tensors: Arrays) -> None:
    """A safetensors file in which bytes are 8-bit floats, which NumPy does not know."""
    header, data = {}, b""
    for key, array in tensors.items():
        dtype = {np.dtype(np.uint8): "F8_E4M3", np.dtype(np.float16): "F16"}.get(array.dtype, "F32")
        raw = array.tobytes()
        header[key] = {
            "dtype": dtype,
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def written(folder: Path, name: str, tensors: Arrays, **options: Any) -> Path:
    tiny_models.write_model(folder, CONFIGS[name] | options, {})
    write_shard(folder / "model.safetensors", tensors)
    return folder


def write_published(folder: Path, name: str = "deepseek_v3_yarn", *block: int) -> Path:
    """The model as it is published."""
    size = (block[0], block[1]) if block else (128, 128)
    return written(folder, name, halved(name, size)[0], quantization_config=described(*size))


def test_every_byte_is_the_number_of_the_format() -> None:
    np.testing.assert_array_equal(FLOAT8, np.array([number(code) for code in range(256)], np.float32))
    assert np.nanmax(FLOAT8) == 448 and FLOAT8[1] == 2.0**-9


@pytest.mark.parametrize("name", ["deepseek_v3_yarn", "qwen3_mqa_odd_sizes", "llama_rope_llama3"])
@pytest.mark.parametrize("block", [(128, 128), (16, 24), (7, 5)])
def test_a_file_is_that_of_the_numbers_in_float32(name: str, block: tuple[int, int], tmp_path: Path) -> None:
    published = write_published(tmp_path / "m", name, *block)
    plain = written(tmp_path / "plain" / "m", name, halved(name, block)[1])
    for quant in ("f32", "q8", "q4"):
        files = [tmp_path / f"{kind}.ert" for kind in ("published", "plain")]
        found = edgert.convert(published, files[0], quant=quant)
        edgert.convert(plain, files[1], quant=quant)
        assert files[0].read_bytes() == files[1].read_bytes()
    assert "F8_E4M3" in {tensor.source_type for tensor in found.tensors}


def test_blocks_may_be_wider_and_higher_than_any_matrix(tmp_path: Path) -> None:
    """Up to 2**20 - 1 of config.json, which must not become memory."""
    name, size = "llama_rope_llama3", ((1 << 20) - 1, (1 << 20) - 1)
    published = write_published(tmp_path / "m", name, *size)
    plain = written(tmp_path / "plain" / "m", name, halved(name, size)[1])
    edgert.convert(plain, tmp_path / "plain.ert", quant="q8")
    tracemalloc.start()
    edgert.convert(published, tmp_path / "m.ert", quant="q8")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    assert (tmp_path / "m.ert").read_bytes() == (tmp_path / "plain.ert").read_bytes()


def test_it_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix comes in slabs of rows, and its scales with them."""
    from edgert.converters.safetensors_source import SourceTensor

    folder, read, most = write_published(tmp_path / "m"), SourceTensor.read, []
    monkeypatch.setattr(SourceTensor, "read", lambda *given: most.append(given[2]) or read(*given))
    monkeypatch.setattr("edgert.converters.pipeline.SLAB_WEIGHTS", 1024)
    edgert.convert(folder, tmp_path / "m.ert", quant="q8")
    assert 1024 <= max(most) <= 8192 and len(most) > 50


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"quant_method": "fbgemm_fp8"}, UnsupportedError, "found quantization_config"),
        ({"weight_block_size": None}, UnsupportedError, "found quantization_config"),
        ({"weight_block_size": [128, 0]}, UnsupportedError, "found quantization_config"),
        ({"fmt": "e5m2"}, UnsupportedError, "found quantization_config"),
        ({"activation_scheme": "static"}, UnsupportedError, "found quantization_config"),
        (
            {"weight_block_size": [64, 16]},
            ConversionError,
            r"_scale_inv' as 'F32' of shape \[1, 1\], expected",
        ),
    ],
)
def test_what_is_not_understood_is_refused(
    changed: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = write_published(tmp_path / "m", "llama_rope_llama3")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(error, match=message):
        edgert.convert(folder, tmp_path / "m.ert")


@pytest.mark.parametrize(
    "damage", ["nan", "infinite scale", "no scales", "one row of scales too few", "scales in 8 bits"]
)
def test_damage_is_found(damage: str, tmp_path: Path) -> None:
    name, key = "llama_rope_llama3", "model.layers.1.mlp.up_proj.weight"
    tensors, _ = halved(name, (16, 24))
    message = "found NaN or infinity"
    if damage == "nan":
        tensors[key][3, 5] = 0x7F
    elif damage == "infinite scale":
        tensors[f"{key}_scale_inv"][1, 1] = np.inf
    else:
        scales, size = (
            tensors.pop(f"{key}_scale_inv"),
            r"of shape \[6, 2\] for blocks of 16 x 24 of \[96, 48\]",
        )
        message = f"found no '{key}_scale_inv', expected one {size}"
        if damage != "no scales":
            small = scales[:-1] if damage == "one row of scales too few" else scales.astype(np.uint8)
            kind = "F32" if damage == "one row of scales too few" else "F8_E4M3"
            tensors[f"{key}_scale_inv"] = small.copy()
            message = rf"'{key}_scale_inv' as '{kind}' of shape \[{len(small)}, 2\], expected .* {size}"
    folder = written(tmp_path / "m", name, tensors, quantization_config=described(16, 24))
    with pytest.raises((ConversionError, UnsupportedError), match=message):
        edgert.convert(folder, tmp_path / "m.ert", quant="q8")
    assert not (tmp_path / "m.ert").exists()


def test_a_matrix_of_too_few_bytes_is_named(tmp_path: Path) -> None:
    tensors = open_shard(write_published(tmp_path / "m", "llama_rope_llama3") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    cut = replace(tensors[name], nbytes=96 * 48 - 1)
    with pytest.raises(ConversionError, match=rf"found 4,607 bytes of '{name}', expected 4,608"):
        Fp8Tensor.of(cut, tensors[f"{name}_scale_inv"], (128, 128))
