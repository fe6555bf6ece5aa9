"""Hidden rows as bytes: what each wire keeps of them."""

import numpy as np
import pytest

from edgert.errors import LinkError
from edgert.handoff.states import decode, encode, row_bytes


def test_states_survive_the_wire_as_well_as_it_promises() -> None:
    rows = np.random.default_rng(1).standard_normal((5, 70)).astype(np.float32)
    rows[1] *= 1e4
    rows[2, 3] = 900.0  # an outlier spoils its group of 32, and no other
    rows[3] = 0
    for wire, error in (("f32", 0.0), ("f16", 2.0**-11), ("int8", 0.5 / 127 + 2.0**-11)):
        data = encode(wire, rows)  # type: ignore[arg-type]
        assert len(data) == 5 * row_bytes(wire, 70)  # type: ignore[arg-type]
        found = decode(wire, data, 5, 70)  # type: ignore[arg-type]
        for start in (0, 32, 64):
            group = slice(start, start + 32)
            largest = np.abs(rows[:, group]).max(axis=1, keepdims=True)
            assert (np.abs(found[:, group] - rows[:, group]) <= error * largest + 1e-7).all()
        with pytest.raises(LinkError, match="bytes of hidden values"):
            decode(wire, data[:-1], 5, 70)  # type: ignore[arg-type]
    assert np.isfinite(decode("f16", encode("f16", np.full((1, 4), 1e9, np.float32)), 1, 4)).all()
