"""The cache of machine code: what it depends on, whom it trusts, and that it is never in the way."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgert.kernels import jit, target
from tests import kernel_inputs as inputs

SOURCES = Path(jit.__file__).parent

# One small kernel at two signatures is compiled or loaded; the answer is 5, 4 whatever happens.
TOPK = """
import json, os
from pathlib import Path
import numpy as np
from edgert.kernels import jit, topk
root, before = sys.argv[1], sys.argv[2]
if root:
    jit.use_cache_root(Path(root))
exec(before)
index = np.zeros(2, np.int64)
topk.topk(np.array([0, 3, 1, 2, 8, 9, 4], np.float32), 0, 7, 2, index)
hits, misses = topk.topk.stats.cache_hits, topk.topk.stats.cache_misses
print(json.dumps({
    "index": index.tolist(), "hits": sum(hits.values()), "misses": sum(misses.values()),
    "report": jit.cache_report(),
}))
"""
# Only an ordinary user can be refused by a folder; imports come before, as root may own the sources.
DROP_RIGHTS = """
import numba
numba.njit(lambda: 0)()
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
"""


def topk(root: Path | str, before: str = "", **environment: str | None) -> tuple[dict[str, Any], str]:
    """Run the kernel in a fresh process: (what it says, its warnings). The result must be right."""
    out, err = inputs.run_python(TOPK, str(root), before, **environment)
    found = json.loads(out)
    assert found["index"] == [5, 4]
    return found, err


# ---- the key ---------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels' sources that the key is computed of."""
    folder = tmp_path / "copy"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(jit, "__file__", str(folder / "jit.py"))
    return folder


def test_the_key_does_not_depend_on_where_the_sources_lie(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = jit.cache_key()
    monkeypatch.undo()
    assert found == jit.cache_key()


def test_the_key_changes_with_every_source(copied: Path) -> None:
    keys = {jit.cache_key()}
    sources = sorted(copied.rglob("*.py"))
    assert len(sources) > 20
    for source in sources:
        with source.open("a") as file:
            file.write("# one more line\n")
        keys.add(jit.cache_key())
    (copied / "new.py").write_text("")
    keys.add(jit.cache_key())
    (copied / "new.py").unlink()
    (copied / "topk.py").unlink()
    keys.add(jit.cache_key())
    assert len(keys) == len(sources) + 3


def test_the_key_changes_with_the_machine_and_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {jit.cache_key()}
    for module, name, value in (
        (jit.numba, "__version__", "0.0.1"),
        (jit.llvmlite, "__version__", "0.0.1"),
        (jit.platform, "python_version", lambda: "3.99.0"),
        (jit.platform, "machine", lambda: "pdp11"),
        (target, "cpu_name", lambda: "cortex-a76"),
        (target, "features_text", lambda: "dotprod"),
        (jit.config, "BOUNDSCHECK", 1),
    ):
        monkeypatch.setattr(module, name, value)
        keys.add(jit.cache_key())
    assert len(keys) == 8


# ---- whom it trusts --------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(jit, "_root", tmp_path / "cache")
    return tmp_path / "cache"


def test_the_folder_is_made_for_its_owner_alone(root: Path) -> None:
    folder = jit.cache_folder()
    assert folder == root / f"jit-{jit.cache_key()}"
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0
    assert jit.cache_report() == str(folder)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_others_can_write_is_refused(root: Path, mode: int) -> None:
    folder = jit.cache_folder()
    assert folder is not None
    folder.chmod(mode)
    assert jit.cache_folder() is None
    assert "can be written by other users; run: chmod go-w" in jit.cache_report()
    folder.chmod(0o755)
    assert jit.cache_folder() == folder


def test_a_folder_of_another_user_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = jit.cache_folder()
    assert folder is not None
    owner = folder.stat().st_uid
    if owner == 0:
        os.chown(folder, 54321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert jit.cache_folder() is None
    assert "belongs to user" in jit.cache_report()


def test_a_root_that_is_a_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(jit, "_root", tmp_path / "file")
    assert jit.cache_folder() is None
    assert "every start compiles anew" in jit.cache_report()


def test_no_home_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(jit, "_root", None)
    monkeypatch.delenv("EDGERT_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert jit.cache_folder() is None
    assert "there is no home folder" in jit.cache_report()


# ---- never in the way ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache root in which a first process left what it compiled."""
    cache = tmp_path_factory.mktemp("jit") / "cache"
    found, warnings = topk(cache)
    assert (found["hits"], found["misses"]) == (0, 1)
    assert warnings == ""
    return cache


@pytest.mark.compiled
def test_the_environment_names_the_root_to_the_library_too(compiled_once: Path) -> None:
    found, warnings = topk("", EDGERT_CACHE_DIR=str(compiled_once))
    assert (found["hits"], found["misses"], warnings) == (1, 0, "")
    assert Path(found["report"]).parent == compiled_once


@pytest.mark.compiled
def test_a_second_process_compiles_nothing(compiled_once: Path) -> None:
    found, warnings = topk(compiled_once)
    assert (found["hits"], found["misses"]) == (1, 0)
    assert warnings == ""
    assert Path(found["report"]).parent == compiled_once


def plus_one(x: int) -> int:
    """A small function to compile."""
    return x + 1


def hits_of_a_new_dispatcher() -> int:
    """Compile or load `plus_one` as a new process would; its result must be right."""
    dispatcher = jit.jit(plus_one)
    assert dispatcher(41) == 42
    return sum(dispatcher.stats.cache_hits.values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that holds `plus_one`."""
    monkeypatch.setattr(jit, "_folder", (tmp_path,))
    assert [hits_of_a_new_dispatcher() for _ in range(2)] == [0, 1]
    return tmp_path


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "truncated code": (".nbc", _truncate),
    "garbage for code": (".nbc", lambda path: path.write_bytes(b"\x93garbage" * 50)),
    "no code": (".nbc", lambda path: path.write_bytes(b"")),
    "truncated index": (".nbi", _truncate),
    "garbage for an index": (".nbi", lambda path: path.write_bytes(b"garbage")),
    "no index": (".nbi", lambda path: path.write_bytes(b"")),
}


@pytest.mark.compiled
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_compiled_anew_and_repaired(
    damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    suffix, spoil = DAMAGE[damage]
    (found,) = folder.glob(f"*{suffix}")
    spoil(found)
    assert hits_of_a_new_dispatcher() == 0
    assert "compiling plus_one anew: its cache entry is damaged" in caplog.text
    caplog.clear()
    assert hits_of_a_new_dispatcher() == 1
    assert caplog.text == ""


@pytest.mark.compiled
def test_a_lost_code_file_is_compiled_anew(folder: Path) -> None:
    (found,) = folder.glob("*.nbc")
    found.unlink()
    assert [hits_of_a_new_dispatcher() for _ in range(2)] == [0, 1]


@pytest.mark.compiled
def test_a_folder_that_vanished_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "gone").write_text("")
    monkeypatch.setattr(jit, "_folder", (tmp_path / "gone" / "folder",))  # nothing can be written there
    assert hits_of_a_new_dispatcher() == 0
    assert "the compiled plus_one is not kept" in caplog.text


@pytest.mark.compiled
def test_processes_may_compile_at_the_same_time(tmp_path: Path) -> None:
    running = [inputs.start_python(TOPK, str(tmp_path), "") for _ in range(2)]
    for process in running:
        out, err = inputs.finish(process)
        assert json.loads(out)["index"] == [5, 4]
        assert err == ""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="edgert-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.compiled
def test_a_read_only_root_costs_a_warning(open_folder: Path) -> None:
    (open_folder / "cache").mkdir(mode=0o555)
    found, warnings = topk(open_folder / "cache", DROP_RIGHTS)
    assert found["hits"] == 0
    assert "compiled kernels are not kept" in warnings
    assert "Permission denied" in found["report"]


@pytest.mark.compiled
def test_a_read_only_cache_is_still_read(compiled_once: Path, open_folder: Path) -> None:
    """A folder prepared by an administrator."""
    cache = shutil.copytree(compiled_once, open_folder / "cache")
    for path in (*cache.rglob("*"), cache):
        path.chmod(0o555)
    found, warnings = topk(cache, DROP_RIGHTS)
    assert (found["hits"], warnings) == (1, "")


@pytest.mark.compiled
def test_without_a_home_kernels_are_compiled_and_it_is_said() -> None:
    nobody = """
import pwd
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
"""
    found, warnings = topk("", nobody, HOME=None, EDGERT_CACHE_DIR=None)
    assert found["hits"] == 0
    assert "there is no home folder" in found["report"]
    assert "compiled kernels are not kept" in warnings


@pytest.mark.compiled
def test_with_the_jit_off_there_is_no_cache(tmp_path: Path) -> None:
    counters = "hits, misses = topk.topk.stats.cache_hits, topk.topk.stats.cache_misses"
    code = TOPK.replace(counters, "hits = misses = {}")
    code = code.replace('"report": jit.cache_report(),', "")
    out, err = inputs.run_python(code, str(tmp_path), "", NUMBA_DISABLE_JIT="1")
    assert json.loads(out)["index"] == [5, 4]
    assert err == ""
    assert list(tmp_path.iterdir()) == []
