"""GGUF files of architectures that are read as their config.json: the same .ert file as from the folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.config import ModelSpec
from edgert.errors import ConversionError, UnsupportedError
from edgert.format import ErtFile
from edgert.format.verify import check
from edgert.kernels import packing
from tests import gguf_files, gguf_others, tiny_models


def exported(folder: Path, name: str, kind: str = "F32", **options: Any) -> Path:
    config = tiny_models.CONFIGS[name] | gguf_others.CASES[name] | options
    tiny_models.write_model(folder / name, config, tiny_models.weights(config, tiny_models.SEED))
    gguf_files.export(folder / name, folder / "m.gguf", kind)
    return folder / "m.gguf"


@pytest.mark.parametrize("name", gguf_others.CASES)
def test_the_same_weights_and_spec_as_from_the_folder(name: str, tmp_path: Path) -> None:
    """GGUF holds single precision of the numbers that weights are multiplied by."""
    edgert.convert(exported(tmp_path, name), tmp_path / "gguf.ert")
    edgert.convert(tmp_path / name, tmp_path / "folder.ert", quant="f32")
    with ErtFile.open(tmp_path / "gguf.ert") as ours, ErtFile.open(tmp_path / "folder.ert") as expected:
        assert as_single(ours.spec) == as_single(replace(expected.spec, bos_id=1, eos_ids=(2,)))
        for tensor in expected.tensors.values():
            if tensor.name == "tokenizer.json":
                continue
            found, wanted = ours.tensors[tensor.name], tensor
            assert found.shape == wanted.shape
            if found.quant == wanted.quant == "f32":
                a, b = (f.raw(tensor.name).view("<f4") for f in (ours, expected))
                np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7, err_msg=tensor.name)
    check(tmp_path / "gguf.ert")


def as_single(spec: ModelSpec) -> ModelSpec:
    """A spec with its numbers in single precision."""
    names = ("norm_eps", "rope_magnitude", "rope_theta", "attention_cap", "logit_cap")
    return replace(spec, **{name: round(float(np.float32(getattr(spec, name))), 6) for name in names})


@pytest.mark.parametrize(("kind", "quant"), [("Q8_0", "q8"), ("Q4_0", "q4"), ("Q4_1", "q4m")])
@pytest.mark.parametrize("name", ["gemma2_caps", "granite_untied_head_dim"])
def test_quantised_weights_take_a_factor_and_stay_what_they_are(
    name: str, kind: str, quant: str, tmp_path: Path
) -> None:
    """The codes are kept; only scales and minimums change, by less than the rounding of a float16."""
    path = exported(tmp_path, name, kind, hidden_size=64, head_dim=16)
    edgert.convert(path, tmp_path / "gguf.ert")
    edgert.convert(path, tmp_path / "exact.ert", quant="f32")
    with ErtFile.open(tmp_path / "gguf.ert") as ours, ErtFile.open(tmp_path / "exact.ert") as exact:
        for part in ("token_embedding", "layers.0.q", "layers.0.o", "layers.0.down"):
            tensor = ours.tensors[part]
            assert tensor.quant == quant
            found, wanted = (
                packing.unpack(f.tensors[part].quant, f.raw(part), *packing.padded(*tensor.shape))
                for f in (ours, exact)
            )
            largest = float(np.abs(wanted).max())
            np.testing.assert_allclose(found, wanted, rtol=2.0**-10, atol=largest * 2.0**-10)


def test_a_window_that_the_file_does_not_place_is_refused(tmp_path: Path) -> None:
    """llama.cpp calls OLMo 3 olmo2, and which of its layers have the window is not in the file."""
    path = exported(tmp_path, "olmo2_gqa", sliding_window=8)
    with pytest.raises(UnsupportedError, match=r"olmo2: found attention.sliding_window 8, expected none"):
        edgert.convert(path, tmp_path / "m.ert")


def test_what_the_file_cannot_mean_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path, "granite_untied_head_dim")
    data = bytearray(path.read_bytes())
    at = data.index(b"granite.attention.head_count") + len(b"granite.attention.head_count") + 4
    data[at : at + 4] = (3).to_bytes(4, "little")  # kv heads do not divide them
    path.write_bytes(data)
    with pytest.raises((ConversionError, UnsupportedError)):
        edgert.convert(path, tmp_path / "m.ert")


def test_experts_in_mxfp4_are_kept_without_loss(tmp_path: Path) -> None:
    report = edgert.convert(
        exported(tmp_path, "gpt_oss_yarn", "MXFP4", intermediate_size=64), tmp_path / "m.ert"
    )
    experts = [tensor for tensor in report.tensors if ".experts." in tensor.name]
    assert {(t.source_type, t.quant, t.relative_error) for t in experts} == {("MXFP4", "q8", 0.0)}


def test_latents_from_before_they_were_cut_by_head_are_refused(tmp_path: Path) -> None:
    path = exported(tmp_path, "deepseek_v2_lite")
    path.write_bytes(path.read_bytes().replace(b"attention.key_length_mla", b"attention.key_length_xxx"))
    with pytest.raises(UnsupportedError, match=r"found no attention.key_length_mla, expected it"):
        edgert.convert(path, tmp_path / "m.ert")


def test_groups_that_llama_cpp_takes_for_others_are_refused(tmp_path: Path) -> None:
    path = exported(tmp_path, "deepseek_v2_lite", n_group=4, topk_group=2)
    with pytest.raises(UnsupportedError, match=r"deepseek2: found expert_group_count 4 with a softmax"):
        edgert.convert(path, tmp_path / "m.ert")
