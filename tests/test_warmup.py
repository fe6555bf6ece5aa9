"""What `edgert warmup` keeps with the device: the tiling it found, and machine code handed on."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgert import code_cache, tiling, warmup
from edgert.config import EngineConfig, ModelSpec, Tiling
from edgert.errors import DeviceError
from edgert.kernels import jit
from edgert.model.forward import Forward
from edgert.model.shapes import random_weights
from edgert.planner import plan
from tests import kernel_inputs as inputs

SMALL = ModelSpec("llama", 1, 64, 2, 2, 32, 96, 32, 32, 1e-5, tied_embeddings=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This machine's cache folder under a root of its own; what is compiled is not looked for there."""
    monkeypatch.setattr(jit, "_root", tmp_path / "root")
    monkeypatch.setattr(jit, "JIT", True)
    folder = jit.cache_folder()
    assert folder is not None
    yield folder


# ---- tiling ----------------------------------------------------------------------------------


def test_what_is_kept_is_what_later_runs_use(cache: Path) -> None:
    assert tiling.kept() is None
    assert plan(SMALL, 1000).tiling == Tiling()
    found = Tiling(4, 16, 1 << 17)
    tiling.keep(found)
    assert tiling.kept() == found
    assert plan(SMALL, 1000).tiling == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}}",
        '{"most": 3, "ahead": 64, "unit_bytes": 65536}',
        '{"most": 8, "far": 1}',
        '{"most": "8"}',
    ],
)
def test_a_damaged_file_is_named_and_not_used(
    cache: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "tiling.json").write_text(text)
    assert tiling.kept() is None
    assert "tiling.json is not used" in caplog.text


@pytest.mark.compiled
def test_the_search_gives_one_of_its_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "_UNSURE", 1e9)
    found = warmup.search(1, SMALL, rounds=1)
    assert found is not None
    assert found.most in tiling.MOST
    assert found.ahead in tiling.AHEAD
    assert found.unit_bytes in tiling.UNIT_BYTES


@pytest.mark.compiled
def test_a_busy_machine_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "_UNSURE", -1.0)
    assert warmup.search(1, SMALL, rounds=1) is None


def test_the_tiling_changes_no_bit() -> None:
    weights, logits = random_weights(SMALL, "q4"), []
    for chosen in (Tiling(), Tiling(2, 0, 1 << 14), Tiling(4, 128, 1 << 18)):
        model = Forward(weights, EngineConfig(1, 32, 16, tiling=chosen))
        logits.append(model.run(range(11), outputs=range(11)).copy())
        model.close()
    inputs.same(logits[1], logits[0])
    inputs.same(logits[2], logits[0])


# ---- machine code handed on ------------------------------------------------------------------


def fill(folder: Path) -> dict[str, bytes]:
    files = {"execute.enter-1.py311.nbi": b"index", "execute.enter-1.py311.1.nbc": b"code" * 999}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    tiling.keep(Tiling(4, 16, 1 << 17))
    return files


def test_exported_code_is_imported_whole(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, path = fill(cache), tmp_path / "code.tar"
    code_cache.export_to(path)
    monkeypatch.setattr(jit, "_root", tmp_path / "other")
    assert code_cache.import_from(path) == 3
    folder = jit.cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path / "other"
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert tiling.kept() == Tiling(4, 16, 1 << 17)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]  # no scratch is left


def write(path: Path, name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size, member.type, member.linkname = len(data), kind, "/etc/passwd"
        archive.addfile(member, io.BytesIO(data))
    return path


def test_hostile_and_foreign_files_are_refused_and_change_nothing(cache: Path, tmp_path: Path) -> None:
    before, own, path = fill(cache), cache.name, tmp_path / "code.tar"
    for name, kind, message in (
        ("jit-000000000000000000000000/a", tarfile.REGTYPE, "for another CPU or for other versions"),
        (f"{own}/../../evil", tarfile.REGTYPE, "expected plain files"),
        (f"{own}/.hidden", tarfile.REGTYPE, "expected plain files"),
        (f"{own}/link", tarfile.SYMTYPE, "expected plain files"),
        (f"{own}/folder", tarfile.DIRTYPE, "expected plain files"),
        ("/absolute", tarfile.REGTYPE, "for another CPU"),
    ):
        with pytest.raises(DeviceError, match=message):
            code_cache.import_from(write(path, name, kind=kind))
    write(path, f"{own}/new")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DeviceError, match="damaged"):
        code_cache.import_from(path)
    path.write_bytes(b"not an archive")
    with pytest.raises(DeviceError, match="damaged"):
        code_cache.import_from(path)
    with pytest.raises(DeviceError, match="cannot be read"):
        code_cache.import_from(tmp_path / "absent")
    assert {file.name for file in cache.iterdir()} == {*before, "tiling.json"}


def test_a_file_that_others_can_write_is_not_imported(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "code.tar", f"{cache.name}/new")
    path.chmod(0o666)
    with pytest.raises(DeviceError, match="can be written by other users"):
        code_cache.import_from(path)
    assert not (cache / "new").exists()


def test_only_code_that_nothing_used_for_long_is_removed(cache: Path) -> None:
    old, recent = cache.parent / "jit-old", cache.parent / "jit-recent"
    for folder in (old, recent, cache):
        folder.mkdir(exist_ok=True)
        (folder / "file").write_text("x")
    other = cache.parent / "something"
    other.mkdir()
    for folder in (old, other, cache):
        os.utime(folder, (0, 0))
    assert code_cache.prune() == 1
    assert not old.exists()
    assert recent.exists()
    assert other.exists()
    assert (cache / "file").exists()
