"""What is left on the disk: the whole file, the old one, or nothing."""

import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from edgert.errors import ConversionError
from edgert.format import ErtWriter
from edgert.format.layout import PAGE, allowed_quants
from edgert.format.writer import Disk
from tests.test_format_roundtrip import GOLDEN, TINY, TINY_QUANTS, files, write_tiny


class FullFile(io.FileIO):
    """A file on a disk with room for `room` bytes."""

    room = 0

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


class FullDisk(Disk):
    def __init__(self, room: int) -> None:
        self.room = room

    def create(self, path: Path) -> BinaryIO:
        file = FullFile(path, "xb")
        file.room = self.room
        return io.BufferedWriter(file)


@pytest.mark.parametrize("room", [0, 3 * PAGE, len(GOLDEN) - 1])
def test_a_disk_that_fills_up_leaves_the_old_file(room: int, tmp_path: Path) -> None:
    target = tmp_path / "m.ert"
    target.write_bytes(b"old")
    with pytest.raises(ConversionError, match=r"disk full .* room for 65,536 bytes") as caught:
        write_tiny(target, FullDisk(room))
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == ["m.ert"]
    assert target.read_bytes() == b"old"


def test_too_small_a_disk_is_refused_before_writing(tmp_path: Path) -> None:
    class SmallDisk(Disk):
        def free(self, folder: Path) -> int:
            assert folder == tmp_path
            return 65535

    with pytest.raises(ConversionError, match="found 65,535 bytes free on its disk, expected 65,536"):
        write_tiny(tmp_path / "m.ert", SmallDisk())
    assert files(tmp_path) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_an_interrupted_write_leaves_nothing(failure: type[BaseException], tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"\1"
        raise failure

    with pytest.raises(failure), ErtWriter(tmp_path / "m.ert", TINY, TINY_QUANTS) as writer:
        writer.write("token_embedding", chunks())
    assert files(tmp_path) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with ErtWriter(tmp_path / "m.ert", TINY, TINY_QUANTS) as writer:
        writer.write("token_embedding", bytes(288))
        assert len(files(tmp_path)) == 1
        assert not (tmp_path / "m.ert").exists()
    assert files(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_by_the_next_of_its_name(tmp_path: Path) -> None:
    code = """
    import os, signal, sys
    from edgert.format import ErtWriter
    from tests.test_format_roundtrip import TINY, TINY_QUANTS
    with ErtWriter(sys.argv[1], TINY, TINY_QUANTS) as writer:
        writer.write("token_embedding", bytes(288))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    target = tmp_path / "m[1].ert"
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", textwrap.dedent(code), target]
    died = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    (left,) = files(tmp_path)
    assert died.returncode == -signal.SIGKILL and left.endswith(".part")
    others = [".m[1].ert.short.part", ".m[1].ert.download.part", ".n.ert.01234567.part", left[:-5] + ".tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"another's")
    with ErtWriter(target, TINY, TINY_QUANTS) as still_at_work:
        still_at_work.write("token_embedding", bytes(288))
        (held,) = set(files(tmp_path)) - set(others)
        assert held != left
        write_tiny(target)
        assert sorted(files(tmp_path)) == sorted([*others, held, target.name])


class MeetingDisk(Disk):
    """Another writer comes by each of the first `times` new files before it is locked."""

    def __init__(self, meet: Callable[[Path], None], times: int = 1) -> None:
        self.meet, self.times = meet, times

    def create(self, path: Path) -> BinaryIO:
        file = super().create(path)
        if self.times:
            self.times -= 1
            self.meet(path)
        return file


def come_by(folder: Path) -> None:
    """Another writer to m.ert starts, and removes what it takes for leftovers; then it gives up."""
    with ErtWriter(folder / "m.ert", TINY, TINY_QUANTS):
        pass


def test_a_new_file_that_another_writer_removes_before_the_lock_is_made_again(tmp_path: Path) -> None:
    disk = MeetingDisk(lambda _: come_by(tmp_path), times=3)
    write_tiny(tmp_path / "m.ert", disk)
    assert disk.times == 0 and files(tmp_path) == ["m.ert"]
    assert (tmp_path / "m.ert").read_bytes() == GOLDEN


def test_a_new_file_that_another_writer_locks_in_passing_is_made_again(tmp_path: Path) -> None:
    locks = []

    def lock(path: Path) -> None:
        locks.append(path.open("rb"))
        fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)

    with ErtWriter(tmp_path / "m.ert", TINY, TINY_QUANTS, disk=MeetingDisk(lock, times=2)):
        for file in locks:
            file.close()
        held = files(tmp_path)
        come_by(tmp_path)
        assert files(tmp_path) == held and len(held) == 1
    assert files(tmp_path) == []


def test_writers_that_never_leave_a_new_file_alone_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="taken by other writers of this name"):
        write_tiny(tmp_path / "m.ert", MeetingDisk(Path.unlink, times=1000))
    assert files(tmp_path) == []


def test_a_finished_file_is_held_until_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, names = Path.replace, []

    def slowly(path: Path, target: Path) -> Path:
        come_by(tmp_path)
        names.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", slowly)
    write_tiny(tmp_path / "m.ert")
    assert len(names) == 1 and files(tmp_path) == ["m.ert"]
    assert (tmp_path / "m.ert").read_bytes() == GOLDEN


def test_without_locks_files_are_written_and_leftovers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(code: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    left = tmp_path / ".m.ert.01234567.part"
    left.write_bytes(b"perhaps at work")
    fail(errno.ENOLCK)
    write_tiny(tmp_path / "m.ert")
    assert files(tmp_path) == [left.name, "m.ert"]
    fail(errno.EIO)
    with pytest.raises(ConversionError, match="cannot be written"):
        write_tiny(tmp_path / "m.ert")
    assert files(tmp_path) == [left.name, "m.ert"]


def test_an_existing_file_is_replaced_with_usual_rights(tmp_path: Path) -> None:
    target = tmp_path / "m.ert"
    target.write_bytes(b"old")
    usual = target.stat().st_mode
    write_tiny(target)
    assert target.read_bytes() == GOLDEN
    assert target.stat().st_mode == usual


@pytest.mark.parametrize("count", [0, 287, 289])
def test_a_tensor_of_the_wrong_length_is_refused(count: int, tmp_path: Path) -> None:
    with (
        pytest.raises(ConversionError, match="bytes for token_embedding, expected 288"),
        ErtWriter(tmp_path / "m.ert", TINY, TINY_QUANTS) as writer,
    ):
        writer.write("token_embedding", [b"\1"] * count)
    assert files(tmp_path) == []


def test_unknown_twice_written_and_unwritten_tensors_are_refused(tmp_path: Path) -> None:
    with ErtWriter(tmp_path / "m.ert", TINY, TINY_QUANTS) as writer:
        with pytest.raises(ConversionError, match="not a tensor of this model"):
            writer.write("output", b"")
        writer.write("token_embedding", bytes(288))
        with pytest.raises(ConversionError, match="already written"):
            writer.write("token_embedding", bytes(288))
        with pytest.raises(ConversionError, match="no data for 11 tensors, first rope_frequencies"):
            writer.finish()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"quants": {}}, "no quantisation for layers.0.down"),
        ({"quants": {**TINY_QUANTS, "output_norm": "q4"}}, "a quantisation for output_norm"),
        ({"quants": {**TINY_QUANTS, "layers.0.q": "q5"}}, "'q5' for layers.0.q"),
        ({"metadata": {"spec": "{}"}}, "the format's own"),
        ({"metadata": {"source": "\ud800"}}, "not Unicode"),
        ({"metadata": {"source": 1}}, "not Unicode"),
        ({"metadata": {"source": "x" * (16 << 20)}}, "give less metadata"),
        ({"tokenizer_json": b""}, "empty tokenizer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=said):
        ErtWriter(tmp_path / "m.ert", **{"spec": TINY, "quants": TINY_QUANTS, **changed})
    assert files(tmp_path) == []


def test_paths_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="found a folder"):
        write_tiny(tmp_path)
    with pytest.raises(ConversionError, match="found a folder"):
        write_tiny(Path())
    with pytest.raises(ConversionError, match="cannot be written"):
        write_tiny(tmp_path / "absent" / "m.ert")
    with pytest.raises(ConversionError, match="not entered"):
        ErtWriter(tmp_path / "m.ert", TINY, TINY_QUANTS).write("token_embedding", bytes(288))
    assert files(tmp_path) == []


def test_metadata_beyond_the_reserved_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="give it when the writer is made"):
        write_tiny(tmp_path / "m.ert", errors="x" * 10000)
    assert files(tmp_path) == []


def test_a_type_with_a_minimum_is_refused_where_rows_end_inside_a_group(tmp_path: Path) -> None:
    """There the padding could not be zeros."""
    assert "q4m" in allowed_quants("matrix", (5, 64)) and "q4m" not in allowed_quants("matrix", (64, 70))
    assert "q4m" in allowed_quants("expert", (3, 32, 64)) and "q4m" not in allowed_quants(
        "expert", (3, 40, 64)
    )
    assert allowed_quants("router", (4, 64)) == ("f32",)
    quants = {**TINY_QUANTS, "layers.0.q": "q4m"}
    with pytest.raises(ConversionError, match=r"found quantisation 'q4m' for layers\.0\.q"):
        ErtWriter(tmp_path / "m.ert", TINY, quants)
