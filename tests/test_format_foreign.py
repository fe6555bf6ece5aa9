"""What is not an .ert file is called what it is, with the command that helps."""

import os
import stat
from pathlib import Path

import pytest

from edgert.errors import NotAModelError
from edgert.format import ErtFile

TENSOR = b'"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + b"\0"


FOREIGN = {
    "empty": (b"", "an empty file"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(64), "edgert convert"),
    "pytorch": (b"PK\3\4" + bytes(64), "PyTorch checkpoint"),
    "pickle": (b"\x80\x02}q\0." + bytes(64), "pickle"),
    "text": (b"Once upon a time there was", "not a safetensors header"),
    "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "safetensors": (safetensors(b"{" + TENSOR), "without edgert's metadata"),
    "pytorch-safetensors": (safetensors(b'{"__metadata__":{"format":"pt"},' + TENSOR), "edgert convert"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named(kind: str, tmp_path: Path) -> None:
    blob, said = FOREIGN[kind]
    path = tmp_path / "model"
    path.write_bytes(blob)
    with pytest.raises(NotAModelError, match=said) as caught:
        ErtFile.open(path)
    assert "\n" not in str(caught.value)


def test_an_onnx_file_is_to_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x05")
    with pytest.raises(NotAModelError, match=r"edgert convert .*model\.onnx"):
        ErtFile.open(path)


def test_paths_that_are_no_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotAModelError, match="no such file"):
        ErtFile.open(tmp_path / "absent.ert")
    with pytest.raises(NotAModelError, match="name the file in it"):
        ErtFile.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotAModelError, match="edgert convert"):
        ErtFile.open(tmp_path)
    with pytest.raises(NotAModelError, match="no path"):
        ErtFile.open("null\0byte")
    with pytest.raises(NotAModelError, match="check the path"):
        ErtFile.open("n" * 5000)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAModelError, match="neither a file nor a folder"):
        ErtFile.open(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.ert"
    path.write_bytes(b"secret")
    path.chmod(stat.S_IWUSR)
    with pytest.raises(NotAModelError, match="rights"):
        ErtFile.open(path)
