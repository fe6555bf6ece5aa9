"""gpt-oss as it is published: the matrices of its experts in MXFP4."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import edgert
from edgert.errors import ConversionError, UnsupportedError
from tests import kernel_inputs as inputs
from tests import tiny_models
from tests.tiny_configs import CONFIGS

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the eight patterns of E2M1 without a sign (OCP Microscaling Formats 1.0, table 5)."""
CONFIG: dict[str, Any] = CONFIGS["gpt_oss_yarn"] | {"intermediate_size": 64}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
Arrays = dict[str, NDArray[Any]]


def decoded(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[.., N, G, 16] and [.., N, G] to [.., N, 32 G], one number at a time."""
    rows = []
    for block, scale in zip(blocks.reshape(-1, 16), scales.reshape(-1), strict=True):
        nibbles = [half for byte in block.tolist() for half in (byte & 15, byte >> 4)]
        rows.append([(-1) ** (n >> 3) * VALUES[n & 7] * 2.0 ** (int(scale) - 127) for n in nibbles])
    return np.array(rows, np.float32).reshape(*blocks.shape[:-2], -1)


def packed() -> tuple[Arrays, Arrays]:
    """The tensors of the model in MXFP4, and the same numbers as transformers stores them."""
    plain: Arrays = dict(tiny_models.weights(CONFIG, 1))
    published: Arrays = dict(plain)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        count, columns, rows = plain[name].shape
        blocks = inputs.raw(name, plain[name].size // 2).reshape(count, rows, columns // 32, 16)
        # Small powers of two, and one that is the least float16 has.
        scales = inputs.whole((name, "scales"), 122, 124, count, rows, columns // 32).astype(np.uint8)
        scales[0, 0] = 104
        plain[name] = np.ascontiguousarray(decoded(blocks, scales).swapaxes(1, 2))
        del published[name]
        published |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return published, plain


def written(folder: Path, tensors: Arrays, **options: Any) -> Path:
    tiny_models.write_model(folder, CONFIG | options, {})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_published(folder: Path) -> Path:
    """The model as it is published."""
    return written(folder, packed()[0], quantization_config=MXFP4)


def logits(path: Path) -> NDArray[np.float32]:
    with edgert.load(path, threads=1) as model:
        return model.logits(tiny_models.tokens(20))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("mxfp4")
    return write_published(base / "published"), written(base / "plain", packed()[1])


def test_published_weights_are_what_their_bits_say(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files = [tmp_path / "published.ert", tmp_path / "plain.ert"]
    for folder, file in zip(folders, files, strict=True):
        edgert.convert(folder, file, quant="f32")
    np.testing.assert_array_equal(logits(files[0]), logits(files[1]))


def test_q8_holds_them_without_loss_and_q4_says_what_it_lost(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    exact = edgert.convert(folders[0], tmp_path / "q8.ert", quant="q8")
    experts = [tensor for tensor in exact.tensors if ".experts." in tensor.name]
    assert len(experts) == 3 * 6
    assert {(tensor.source_type, tensor.relative_error) for tensor in experts} == {("MXFP4", 0.0)}
    rounded = edgert.convert(folders[0], tmp_path / "q4.ert", quant="q4")
    errors = [tensor.relative_error for tensor in rounded.tensors if ".experts." in tensor.name]
    assert all(0.01 < error < 0.15 for error in errors)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cut": 1}, "found no tensor model.layers.0.mlp.experts.0.gate_proj.weight"),
        ({"scale": 255}, "found NaN or infinity"),
    ],
)
def test_damaged_blocks_are_refused(changed: dict[str, int], message: str, tmp_path: Path) -> None:
    tensors, _ = packed()
    name = "model.layers.0.mlp.experts.gate_up_proj_scales"
    if "cut" in changed:
        tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])
    else:
        tensors[name][3, 5, 1] = changed["scale"]
    folder = written(tmp_path / "damaged", tensors, quantization_config=MXFP4)
    with pytest.raises(ConversionError, match=message):
        edgert.convert(folder, tmp_path / "m.ert", quant="q8")


def test_another_quantisation_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folders[0] / name)
    with pytest.raises(UnsupportedError, match="found quant_method 'gptq'"):
        edgert.convert(tmp_path, tmp_path / "m.ert")
