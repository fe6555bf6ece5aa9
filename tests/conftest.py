"""Skips the tests that need the JIT where it is off; the models and the command many tests use."""

import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numba
import pytest
from hypothesis import settings

import edgert
from edgert.cli import main
from tests import tiny_models

# The same examples in every run: a check that fails must fail for a change, not by the draw.
settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")


if importlib.util.find_spec("grpc") is None or importlib.util.find_spec("cryptography") is None:
    collect_ignore_glob = ["test_handoff*.py"]  # they need the extra `cloud`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not numba.config.DISABLE_JIT:
        return
    skip = pytest.mark.skip(reason="needs the JIT, and NUMBA_DISABLE_JIT=1")
    for item in items:
        if "compiled" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def handoff_files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with exits, whole and cut in two: `tests.handoff_models.Files`."""
    from tests.handoff_models import write_files  # needs the extra `cloud`

    return write_files(tmp_path_factory.mktemp("handoff"))


@pytest.fixture(scope="session")
def avx2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels compiled for AVX2 by several tests, each of which runs processes for it."""
    return tmp_path_factory.mktemp("avx2")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as a Hugging Face folder: 96 tokens of one character, a context of 64, no BOS."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-folder"
    tiny_models.write_folder(folder, "llama_head_dim")
    return folder


@pytest.fixture(scope="session")
def tiny_file(tiny_folder: Path) -> Path:
    """The same model as an .ert file, converted without loss."""
    path = tiny_folder.parent / "tiny.ert"
    edgert.convert(tiny_folder, path, quant="f32")
    return path


@pytest.fixture
def tiny(tiny_file: Path) -> Iterator[edgert.Model]:
    """The same model, loaded."""
    with edgert.load(tiny_file, threads=1) as model:
        yield model


class Outcome(NamedTuple):
    """What a command line did."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `edgert` with these arguments in this process."""

    def run(*arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["edgert", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert isinstance(exit_info.value.code, int)
        return Outcome(exit_info.value.code, *capsys.readouterr())

    return run
