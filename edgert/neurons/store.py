"""Single neurons from flash: the memory they are in, and the threads that read them.

What is asked for and what gives way is decided in compiled code (kernels/neuron_reads.py): a read of some
kilobytes takes less time than Python needs to think about it. Here are its lists, its threads, and whatever
compiled code could not read: that is read once more by the `Source`, which knows what went wrong.
"""

import mmap
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.config import QUANTS, ModelSpec
from edgert.errors import EdgertError, ModelFileError
from edgert.flash import FileSource, Reading, Source, Streaming
from edgert.flash.memory import large_pages
from edgert.flash.reading import Span, read_all, read_span
from edgert.flash.streamed import Parts
from edgert.format import StoredTensor
from edgert.format.layout import PAGE, page_padded, round_up
from edgert.format.tensors import neurons_name
from edgert.kernels import files
from edgert.kernels import neuron_reads as words
from edgert.kernels.jit import JIT
from edgert.kernels.neuron_packing import CLUSTER, NeuronShape
from edgert.state import Neurons

READERS = 16
"""Reads in flight: 16 give nine tenths of what 64 do (50 against 57 thousand reads of 8 KiB a second)."""
HALF_LIFE = 16
"""Forwards after which a use counts half. 32 and 64 keep 1 and 2% less of what fires, 8 no more."""
_WAY = Reading(4, 1 << 20)
"""Of reading whole layers: the first of `flash.reading.CANDIDATES`."""


@dataclass(frozen=True, slots=True)
class Reads:
    """How neurons are put together to reads; for comparisons."""

    gap: int = 16 << 10
    """Bytes between two neurons that are read with them: what a flash gives in the time that one more read
    takes (1 GB/s and 57,000 reads a second here)."""
    longest: int = 64 << 10
    """Bytes of one run: with more of them, fewer readers share the work."""
    piece: int = 1 << 20
    """Bytes of one read."""


DEFAULT_READS = Reads()


class NeuronStore:
    """Streams the neurons of one open model. Made before the program that uses it, closed after it.

    tensors: those of the file. slots: neurons in memory, at least those of a layer.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, StoredTensor],
        source: Source,
        slots: int,
        streaming: Streaming,
        reads: Reads = DEFAULT_READS,
    ) -> None:
        self.spec, self.source, self.streaming, self._reads = spec, source, streaming, reads
        self._tensors = [tensors[neurons_name(n)] for n in range(spec.first_layer, spec.last_layer)]
        self._sizes = [NeuronShape.of(tensor.quant, spec.width) for tensor in self._tensors]
        self._slots, self._slot = slots, max(sizes.up + sizes.down for sizes in self._sizes)
        # One thread alone where the JIT is off: its operations are not atomic then.
        self.readers = (streaming.readers or READERS) if JIT else 1
        # The arena: a whole layer; the scales of down of all layers; the slots. Resident only as it fills.
        scales = _scales_bytes(spec, self._sizes[0])
        first_scales = max(page_padded(tensor.nbytes) for tensor in self._tensors)
        self._first_slot = first_scales + len(self._tensors) * scales
        self._memory = large_pages(page_padded(self._first_slot + slots * self._slot))
        self._pool: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)
        self.arena = self._pool.view()
        self.arena.flags.writeable = False  # for the program, as a mapped file is
        self.layers = [
            Neurons(
                QUANTS.index(tensor.quant),
                first_scales + number * scales,
                0,
                number * spec.ffn_width,
                tensor.offset,
                tensor.nbytes,
            )
            for number, tensor in enumerate(self._tensors)
        ]
        self._own_bytes = max(reads.longest, self._slot) + 2 * PAGE
        self._own = mmap.mmap(-1, self.readers * round_up(self._own_bytes, PAGE))
        self.table, self.control = self._lists()
        self._step = 0
        self._error: EdgertError | None = None
        self._routes: NDArray[np.int64] = np.zeros(1, np.int64)
        self._threads: list[threading.Thread] = []
        self._heard, self._bell = os.pipe()
        os.set_blocking(self._bell, False)  # a full pipe is rung enough
        self._set(words.HEARD, self._heard)
        self._set(words.BELL, self._bell)
        try:
            self._read_scales()
            self.pinned = self._pin(int(streaming.pinned * slots)) if streaming.pinned else 0
        except BaseException:
            self._close_pipe()
            raise

    def _lists(self) -> tuple[NDArray[np.int64], int]:
        """The table of kernels/neuron_reads.py, and where its control words are."""
        reads, width = self._reads, self.spec.ffn_width
        neurons, runs = len(self._tensors) * width, max(width, -(-self._first_slot // reads.piece))
        at = neurons + words.CONTROL_WORDS
        starts = {}
        lists = ((words.COUNTS, neurons), (words.OWNERS, self._slots), (words.STAMPS, self._slots))
        for word, size in (*lists, (words.JOBS, width * words.JOB), (words.RUNS, runs * words.RUN)):
            starts[word], at = at, at + size
        table: NDArray[np.int64] = np.zeros(at, np.int64)
        table[:neurons] = words.ABSENT
        table[starts[words.OWNERS] : starts[words.OWNERS] + self._slots] = words.ABSENT
        control = table[neurons:]
        for word, value in (
            *starts.items(),
            (words.MOST_RUNS, runs),
            (words.DESCRIPTOR, self._descriptor()),
            (words.READERS, min(self.readers, files.MOST_RINGS)),
            (words.ALONE, not self.streaming.overlap),
            (words.GAP, reads.gap),
            (words.LONGEST, reads.longest),
            (words.PIECE, reads.piece),
            (words.ALIGN, self.source.unit if isinstance(self.source, FileSource) else PAGE),
            (words.FIRST_SLOT, self._first_slot),
            (words.SLOT, self._slot),
            (words.SLOTS, self._slots),
        ):
            control[word] = value
        return table, neurons

    def _descriptor(self) -> int:
        """Of what compiled code can read from, below 0 where it is no file."""
        return self.source.descriptor if isinstance(self.source, FileSource) else -1

    def _read_scales(self) -> None:
        """The scales of down, which every forward needs: from the start of each cluster."""
        for layer, tensor, sizes in zip(self.layers, self._tensors, self._sizes, strict=True):
            starts = range(tensor.offset, tensor.offset + tensor.nbytes, sizes.cluster)
            spans, at = [], 0
            for start in starts:
                first = start // PAGE * PAGE
                wanted = start + sizes.scales - first
                view = memoryview(self._memory)[at : at + page_padded(wanted)]
                spans.append(Span(f"the scales of {tensor.name}", first, view, wanted))
                at += len(view)
            read_all(self.source, spans, Reading(self.readers, _WAY.piece))
            for number, (span, start) in enumerate(zip(spans, starts, strict=True)):
                into = layer.at + number * sizes.scales
                held = np.frombuffer(span.into, np.uint8)[start - span.offset :]
                self._pool[into : into + sizes.scales] = held[: sizes.scales]

    def _pin(self, wanted: int) -> int:
        """Read the first clusters of every layer for good, at most `wanted` neurons; how many that are."""
        room = min(wanted, self._slots - self.spec.ffn_width) // len(self.layers)
        clusters = min(room, self.spec.ffn_width) // CLUSTER
        if clusters == 0:
            return 0
        slot, owners = 0, int(self.table[self.control + words.OWNERS])
        for layer, tensor, sizes in zip(self.layers, self._tensors, self._sizes, strict=True):
            nbytes, bundle = clusters * sizes.cluster, sizes.up + sizes.down
            view = memoryview(self._memory)[: page_padded(nbytes)]
            read_all(self.source, [Span(tensor.name, tensor.offset, view, nbytes)], _WAY)
            held = self._pool[:nbytes].reshape(clusters, sizes.cluster)[:, sizes.scales :]
            for n, values in enumerate(held.reshape(-1, bundle)):
                at = self._first_slot + slot * self._slot
                self._pool[at : at + bundle] = values
                self.table[layer.word + n], self.table[owners + slot] = at, layer.word + n
                slot += 1
        self._set(words.PINNED, slot)
        self._set(words.HAND, slot)
        return slot

    # ---- what the forward path calls ---------------------------------------------------------

    def attach_run(self, routes: NDArray[np.int64]) -> None:
        """Where the run lists the neurons that fire; reading starts."""
        self._routes = routes
        self._set(words.CLOSING, 1)
        self._serve(0)  # compiled by one thread, before many need it
        self._set(words.CLOSING, 0)
        self._threads = [
            threading.Thread(target=self._serve, args=(n,), daemon=True, name=f"edgert-neurons-{n}")
            for n in range(self.readers)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, rows: int, most: int) -> int:
        """See flash.Store: nothing is predicted here."""
        while not self._through:  # reads of a forward that failed
            time.sleep(1e-4)
        self._error = None
        self._set(words.FAILED, 0)
        self._step += 1
        if self._step % HALF_LIFE == 0:
            start = self._word(words.COUNTS)
            self.table[start : start + self.control] >>= 1
        return 0

    def end(self, rows: int, seconds: float) -> None:
        """See flash.Store."""
        if self._error is not None:
            raise self._error

    @property
    def _through(self) -> bool:
        return self._word(words.DONE) == self._word(words.POSTED)

    @property
    def arrived(self) -> bool:
        """See flash.Store."""
        return self._error is not None or self._through

    def wait(self) -> None:
        """See flash.Store; the program waits by itself."""

    def totals(self) -> dict[str, float]:
        """See flash.Store."""
        return {
            "hits": self._word(words.HITS),
            "misses": self._word(words.MISSES),
            "bytes_read": self._word(words.BYTES),
            "reads": self._word(words.READS),
            "io_wait_s": self._word(words.WAITED) * 1e-9,
        }

    def report(self, before: Mapping[str, float]) -> dict[str, Any]:
        """See flash.Store."""
        since = {name: value - before[name] for name, value in self.totals().items()}
        return {
            "neuron_hits": since.pop("hits"),
            "neuron_misses": since.pop("misses"),
            **since,
            "neuron_slots": self._slots,
            "neurons_pinned": self.pinned,
            "readers": self.readers,
        }

    def close(self) -> None:
        """See flash.Store."""
        if self._word(words.CLOSING):
            return
        self._set(words.CLOSING, 1)
        with suppress(BlockingIOError):
            os.write(self._bell, bytes(8 * self.readers))
        for thread in self._threads:
            thread.join()
        self._close_pipe()
        self.source.close()

    def _close_pipe(self) -> None:
        os.close(self._heard)
        os.close(self._bell)

    def _word(self, word: int) -> int:
        return int(self.table[self.control + word])

    def _set(self, word: int, value: int) -> None:
        self.table[self.control + word] = value

    # ---- the reading threads -----------------------------------------------------------------

    def _serve(self, reader: int) -> None:
        start = reader * round_up(self._own_bytes, PAGE)
        view = memoryview(self._own)[start : start + self._own_bytes // PAGE * PAGE]
        own = np.frombuffer(view, np.uint8)
        given = self.control, self.table, self._pool, own
        while (number := int(words.serve(*given, self._routes))) >= 0:
            try:
                read_span(self.source, self._span(number, view))
            except Exception as error:  # a defect of ours must not leave the program waiting for ever
                text = f"streaming failed ({type(error).__name__}: {error})"
                self._error = error if isinstance(error, EdgertError) else ModelFileError(text)
                words.give_up(number, self.control, self.table)
            else:
                self._set(words.DESCRIPTOR, self._descriptor())  # another one, where O_DIRECT was refused
                words.deliver(number, *given, self._routes)

    def _span(self, number: int, own: memoryview) -> Span:
        """What a run reads, by its name for people, and where to."""
        at = self._word(words.RUNS) + number % self._word(words.MOST_RUNS) * words.RUN
        run = self.table[at : at + words.RUN].tolist()
        into, span = run[words.INTO], run[words.SPAN]
        view = own[:span] if into < 0 else memoryview(self._memory)[into : into + span]
        return Span(self._name(run), run[words.OFFSET], view, run[words.WANTED])

    def _name(self, run: list[int]) -> str:
        jobs, count = self._word(words.JOBS) + run[words.FIRST] * words.JOB, run[words.COUNT]
        if count == 0:
            return next(t.name for t in reversed(self._tensors) if t.offset <= run[words.OFFSET])
        tensor = self._tensors[self._word(words.WORD) // self.spec.ffn_width]
        first, last = (int(self.table[jobs + i * words.JOB]) for i in (0, count - 1))
        which = f"neuron {first}" if count == 1 else f"neurons {first} to {last}"
        return f"{which} of {tensor.name}"


def warm_up() -> None:
    """Compile what the readers run."""
    table: NDArray[np.int64] = np.zeros(words.CONTROL_WORDS, np.int64)
    table[[words.CLOSING, words.MOST_RUNS]] = 1
    own: NDArray[np.uint8] = np.zeros(1, np.uint8)
    words.serve(0, table, own, own, table)
    words.deliver(0, 0, table, own, own, table)
    words.give_up(0, 0, table)


def _scales_bytes(spec: ModelSpec, sizes: NeuronShape) -> int:
    """Bytes of the scales of down of a layer."""
    return -(-spec.ffn_width // CLUSTER) * sizes.scales


def neuron_parts(spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> Parts:
    """What streaming the neurons of a model takes."""
    held = [t for t in tensors.values() if t.role == "neurons"]
    sizes = [NeuronShape.of(tensor.quant, spec.width) for tensor in held]
    slot, largest = max(s.up + s.down for s in sizes), max(page_padded(t.nbytes) for t in held)
    count = len(held) * spec.ffn_width
    lists = 8 * (2 * count + (words.JOB + words.RUN) * spec.ffn_width)
    return Parts(
        name="neurons",
        count=count,
        nbytes=sum(page_padded(t.nbytes) for t in held),
        slot=slot + 8 * 2,  # and who owns it, and when it was used
        fewest=spec.ffn_width,  # so that whatever a layer needs has room
        beside=largest + len(held) * _scales_bytes(spec, sizes[0]) + lists + READERS * (96 << 10),
    )
