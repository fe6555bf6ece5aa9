"""What may differ between valid files is read; whatever else stands in one ends in an error of ours."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import ChecksumError, ModelFileError, VersionError
from edgert.format import ErtFile
from edgert.format.layout import PAGE
from edgert.format.validate import read_contents
from edgert.format.verify import check, verify
from tests.damaged_files import METADATA, NORM, SPEC, Draft, Q, valid_bytes


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return valid_bytes(tmp_path_factory.mktemp("valid"))


def test_an_undamaged_draft_opens(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "same.ert"
    path.write_bytes(Draft(valid).pack())
    with ErtFile.open(path) as file:
        assert file.spec == SPEC
        assert file.exits[1].above(0.5) == (8 / 12, 1.0)
        assert file.exits[1].above(0) == (1.0, 9 / 12)
        assert file.exits[1].above(0.95) == (0.0, 0.0)


def test_tensors_may_lie_in_any_order(valid: bytes, tmp_path: Path) -> None:
    draft = Draft(valid)
    first, second = draft.entries["output_norm"], draft.entries["layers.0.ffn_norm"]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    path = tmp_path / "swapped.ert"
    path.write_bytes(draft.pack())
    ErtFile.open(path).close()


def test_unknown_metadata_is_kept(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "more.ert"
    path.write_bytes(Draft(valid).metadata_with("author", "näm\u2028e"))
    with ErtFile.open(path) as file:
        assert file.metadata == METADATA | {"author": "näm\u2028e"}


@pytest.mark.parametrize("version", ["2", "0", "1.0", "", "x" * 100000])
def test_another_version_is_refused_with_both_numbers(version: str, valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "future.ert"
    draft = Draft(valid)
    draft.metadata["format_version"] = version
    draft.entries["new"] = {"dtype": "F16"}  # a future format may break today's rules
    path.write_bytes(draft.pack())
    with pytest.raises(VersionError) as caught:
        ErtFile.open(path)
    assert repr(version)[:8] in str(caught.value)
    assert "'1'" in str(caught.value)


def survives(blob: bytes) -> None:
    """Either a valid file or an error of ours; anything else is a bug."""
    try:
        contents = read_contents(blob, Path("fuzz.ert"))
    except ModelFileError:
        return
    for tensor in contents.tensors.values():
        assert tensor.offset > 0
        assert tensor.offset + tensor.nbytes <= len(blob)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_bytes_in_the_header_never_crash(valid: bytes, data: st.DataObject) -> None:
    blob = bytearray(valid)
    used = 8 + len(blob[8 : 8 + int.from_bytes(blob[:8], "little")].rstrip())
    places = st.tuples(st.integers(0, used - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, min_size=1, max_size=4)):
        blob[place] = value
    survives(bytes(blob))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data(), JSON)
def test_random_values_in_the_header_never_crash(valid: bytes, data: st.DataObject, value: object) -> None:
    draft = Draft(valid)
    parts = (draft.entries, draft.table, draft.spec, draft.metadata, draft.entries[Q], draft.table[Q])
    part = data.draw(st.sampled_from(parts))
    part[data.draw(st.sampled_from(sorted(part)))] = value
    survives(draft.pack())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_files_never_crash(blob: bytes, framed: bool) -> None:
    survives(len(blob).to_bytes(8, "little") + blob if framed else blob)


def test_one_flipped_bit_is_found_by_its_checksum(valid: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flipped.ert"
    path.write_bytes(valid)
    check(path)
    with ErtFile.open(path) as file:
        places = [file.tensors[Q].offset, file.tensors[NORM].offset + PAGE - 1]  # data, padding
    blob = bytearray(valid)
    for place in places:
        blob[place] ^= 1
    path.write_bytes(blob)
    with ErtFile.open(path) as file:
        assert [name for name, good in verify(file) if not good] == [Q, NORM]
    with pytest.raises(ChecksumError, match=rf"{Q} \(2 of 26 tensors damaged\)"):
        check(path)
