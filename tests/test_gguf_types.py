"""GGUF's tensor types: decoded bit for bit as the gguf package does, and kept without loss where ours can."""

import struct

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.converters.gguf.types import TYPES, WEIGHT_TYPES
from edgert.converters.pipeline import encode, pack_codes
from edgert.converters.quantize import Codes
from edgert.errors import ConversionError
from edgert.kernels.packing import unpack

NUMBERS = {kind.name: number for number, kind in TYPES.items()}
# The gguf package has no decoder of Q1_0, and none of F64.
WITH_ORACLE = [name for name in WEIGHT_TYPES if name not in ("Q1_0", "F64")]
WRITTEN = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def floats(name: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    weights = TYPES[NUMBERS[name]].weights(raw)
    return weights.floats() if isinstance(weights, Codes) else weights


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_sizes_are_those_of_the_format(name: str) -> None:
    kind = TYPES[NUMBERS[name]]
    assert (kind.block, kind.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert NUMBERS[name] == gguf.GGMLQuantizationType[name]


def test_every_type_the_package_can_decode_is_here() -> None:
    theirs = {kind.name for kind in gguf.quants._type_traits} | {"F32", "F16"}
    assert theirs <= set(WEIGHT_TYPES)


@pytest.mark.parametrize("name", WITH_ORACLE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the package, at infinite scales
def test_any_bytes_decode_to_the_same_bits(name: str) -> None:
    kind = TYPES[NUMBERS[name]]
    raw = np.random.default_rng(7).integers(0, 256, (24, 2 * 256 // kind.block * kind.nbytes), np.uint8)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).astype(np.float32)
    found = floats(name, raw)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (24, 512)
    np.testing.assert_array_equal(found, expected)  # a NaN equals a NaN here


@pytest.mark.parametrize("name", WRITTEN)
def test_weights_the_package_wrote_come_back(name: str) -> None:
    weights = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
    found = floats(name, np.ascontiguousarray(raw).view(np.uint8))
    error = np.sqrt(np.mean((found - weights) ** 2))
    assert error < {"TQ1_0": 2, "TQ2_0": 2, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.01}.get(name, 0.15)


def test_q4_0_by_hand() -> None:
    block = struct.pack("<e", 0.5) + bytes([0x8F] * 8 + [0x70] * 8)
    expected = [3.5] * 8 + [-4.0] * 8 + [0.0] * 8 + [-0.5] * 8
    np.testing.assert_array_equal(floats("Q4_0", np.frombuffer(block, np.uint8)[None]), [expected])


def test_q1_0_by_hand() -> None:
    block = struct.pack("<e", 0.25) + bytes([0b00000101] + [0] * 14 + [0x80])
    expected = np.full(128, -0.25)
    expected[[0, 2, 127]] = 0.25
    np.testing.assert_array_equal(floats("Q1_0", np.frombuffer(block, np.uint8)[None]), [expected])


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("Q4_0", "q4"),
        ("Q8_0", "q8"),
        ("Q4_0", "q8"),
        ("Q4_1", "q4m"),
        ("Q5_0", "q8"),
        ("TQ1_0", "q4"),
        ("TQ2_0", "q4"),
        ("Q1_0", "q4"),
        ("IQ4_NL", "q8"),
    ],
)
def test_what_ours_can_hold_is_kept_without_loss(name: str, ours: str) -> None:
    kind = TYPES[NUMBERS[name]]
    random = np.random.default_rng(3)
    raw = random.integers(0, 256, (40, 512 // kind.block, kind.nbytes), np.uint8)
    place = 0 if name[0] == "Q" or name.startswith("IQ") else kind.nbytes - 2
    scales = random.standard_normal(raw.shape[:2]).astype(np.float16)  # any sign, all finite
    raw[..., place : place + 2] = scales.view(np.uint8).reshape(*raw.shape[:2], 2)
    if name == "Q4_1":
        raw[..., 2:4] = raw[::-1, :, :2]
    if name == "Q8_0":
        raw[raw == 128] = 127  # -128 is not what any writer makes; see below
    codes = kind.weights(raw.reshape(40, -1))
    assert isinstance(codes, Codes)
    assert codes.fit(ours)
    kept = unpack(ours, pack_codes(codes, ours).reshape(-1), 40, 512)
    np.testing.assert_array_equal(kept, codes.floats())


def test_q4_k_keeps_its_integers_and_all_but_a_rounding_of_its_scales() -> None:
    kind = TYPES[NUMBERS["Q4_K"]]
    random = np.random.default_rng(3)
    raw = random.integers(0, 256, (40, 2, kind.nbytes), np.uint8)
    raw[..., :4] = random.uniform(0.001, 0.1, (40, 2, 2)).astype(np.float16).view(np.uint8)
    codes = kind.weights(raw.reshape(40, -1))
    assert isinstance(codes, Codes)
    near = codes.nearest("q4m")
    assert near is not None and not codes.fit("q4m") and codes.nearest("q8") is None
    np.testing.assert_array_equal(near.values, codes.values)
    exact = codes.floats()
    kept = unpack("q4m", pack_codes(near, "q4m").reshape(-1), 40, 512)
    np.testing.assert_array_equal(kept, near.floats())
    # 2**-11 of a scale times 15, and of a minimum.
    largest = np.repeat(np.abs(codes.scales) * 15 + np.abs(codes.minimums), 32, axis=1)  # type: ignore[arg-type]
    assert np.all(np.abs(kept - exact) <= largest * 2.0**-11)


@pytest.mark.parametrize(
    ("value", "scale", "quant", "fits"),
    [
        (-8, 1.0, "q4", True),
        (7, 1.0, "q4", True),
        (8, 1.0, "q4", False),
        (-9, 1.0, "q4", False),
        (-127, 1.0, "q8", True),
        (-128, 1.0, "q8", False),
        (1, 1.0, "f16", False),
        (1, 65504.0, "q4", True),
        (1, 65536.0, "q4", False),
        (1, 2.0**-24, "q4", True),
        (1, 2.0**-25, "q4", False),
        (1, 1 + 2.0**-11, "q4", False),
        (1, np.inf, "q4", False),
        (1, np.nan, "q4", False),
    ],
)
def test_what_fits_ours(value: int, scale: float, quant: str, fits: bool) -> None:
    values = np.zeros((2, 64), np.int8)
    values[1, 40] = value
    scales = np.ones((2, 2), np.float32)
    scales[1, 1] = scale
    assert Codes(values, scales).fit(quant) is fits


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "IQ2_XS", "F16"])
def test_a_damaged_scale_is_refused_when_it_is_stored(name: str) -> None:
    kind = TYPES[NUMBERS[name]]
    raw = np.zeros((16, 256 // kind.block, kind.nbytes), np.uint8)
    raw[3, 0, :2] = np.array([np.inf], "<f2").view(np.uint8)
    with pytest.raises(ConversionError, match="q: found NaN or infinity"):
        encode(floats(name, raw.reshape(16, -1)), "q8", "q")
