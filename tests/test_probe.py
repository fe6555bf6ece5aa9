"""The probe measures what it says; how much is a matter of the machine."""

import pytest

from edgert.devices import probe


@pytest.mark.compiled
def test_a_probe_has_a_figure_for_every_thread_and_row() -> None:
    found = probe.probe(2)
    assert found.cores == 2
    assert len(found.stream_gb_s) == len(found.q4_gop_s) == 2
    assert min(*found.stream_gb_s, *found.q4_gop_s) > 0
    assert found.rows[0] == 1
    assert found.row_cost[0] == 1


def test_a_reader_counts_only_what_it_reads() -> None:
    reader = probe.StreamReader(3, size=10_000)
    assert reader.nbytes == 3 * 3072
    assert reader.seconds() > 0
