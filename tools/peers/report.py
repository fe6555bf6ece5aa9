"""From Results to the page docs/benchmarks.md and the bars of its plot."""

from collections.abc import Iterator, Sequence

from .results import LLAMA_CPP, ORT_GENAI, OURS, Group, Model, Results, Spread, Timing, quotients, spread
from .targets import TARGETS, Target

PEERS = (LLAMA_CPP, ORT_GENAI)
NOTES = f"""\
- Each runtime works in a process of its own. In every round each test is done by one runtime after the
  other, so a machine that drifts or is shared does the same to all; a ratio is the median of the rounds'
  own ratios, with the least and the most in brackets. One more round before these is not counted.
- `pp512` is a prompt of 512 tokens, `tg64` 64 tokens one by one, `@d4096` behind 4096 others. What is
  timed is the forward with the logits of the last token, as in llama-bench: no sampler, no text;
  {ORT_GENAI} chooses greedily, its interface has no way around it. *With sampling* is each
  runtime's own greedy choice.
- A forward of several rows computes the logits of each, behind 128 tokens.
- Caches of keys and values hold float16, except that {ORT_GENAI} on CPUs keeps float32.
- All matrices have groups of 32 four-bit weights, embedding and output included. edgert and Q4_0 keep a
  float16 scale for each (4.5 bits per weight), {ORT_GENAI} a float32 one (5 bits).
- edgert maps its file; llama.cpp rearranges Q4_0 into memory of its own while loading, as does
  {ORT_GENAI}.
- Agreement is the least correlation of edgert's and {LLAMA_CPP}'s logits over some prompts, both having
  rounded the same weights. Random weights differ between the runtimes: only their number counts.
- Bandwidth: bytes of all matrices (a tied embedding counts once, as the output matrix) per token of
  generation, over the bytes per second of `edgert probe`'s reader over 512 MiB in the same rounds.
"""


def render(results: Results, plot: str | None) -> str:
    """The whole page; `plot` is the picture's address from it."""
    origin = f"Made on {results.date} by `{results.command}`, {results.rounds} rounds."
    parts = [
        "# Benchmarks",
        f"{origin} Do not edit: run it again, or with `--from-json` to render anew.",
        "## Targets",
        _targets(results),
        *([f"![edgert's speed over that of its peers]({plot})"] if plot else []),
        *(part for group in results.groups for part in _group(group)),
        "## Machine",
        _table(("", ""), [(name, str(value)) for name, value in results.machine.items()]),
        "## Versions",
        _table(("", ""), list(results.versions.items())),
        "## Models",
        _models(results.models),
        "## How it is measured",
        NOTES.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def bars(results: Results) -> dict[str, dict[str, Spread]]:
    """For the plot: ratios by test, then by peer."""
    found: dict[str, dict[str, Spread]] = {}
    for group in results.groups:
        for timing in group.timings:
            ratios = {peer: ratio for peer in PEERS if (ratio := _ratio(timing, peer))}
            if ratios and not timing.key.startswith("rows"):
                found[f"{group.model} {timing.label}, {_threads(group.threads)}"] = ratios
    return found


def _targets(results: Results) -> str:
    rows = []
    for target in TARGETS:
        found = target.measured(results)
        if found is not None:
            value = _spread(found, "{:.2f}")
            rows.append((target.label, str(target.threads), _bound(target), value, _verdict(target, found)))
    if not rows:
        return "None of them was measured in this run."
    return _table(("figure", "threads", "target", "measured", "met"), rows)


def _bound(target: Target) -> str:
    against = f" x {LLAMA_CPP}" if target.under[0] == LLAMA_CPP else ""
    return f"{'<=' if target.at_most else '>='} {target.bound:g}{against}"


def _verdict(target: Target, found: Spread) -> str:
    by = abs(found.median / target.bound - 1)
    return f"yes, by {by:.0%}" if target.met(found.median) else f"**no, missed by {by:.0%}**"


def _group(group: Group) -> Iterator[str]:
    """Heading and tables of one group."""
    yield f"## {group.model}, {_threads(group.threads)}"
    speeds = [t for t in group.timings if t.tokens and not t.key.startswith("rows")]
    peers = [peer for peer in PEERS if any(peer in timing.seconds for timing in speeds)]
    yield "Tokens per second, and edgert's speed over the peer's:"
    yield _table(
        ("test", OURS, *peers, *(f"over {peer}" for peer in peers)),
        [
            (
                timing.label,
                *(_tokens_per_second(timing, name) for name in (OURS, *peers)),
                *(_spread(_ratio(timing, peer), "{:.2f}") for peer in peers),
            )
            for timing in speeds
        ],
    )
    rows = [t for t in group.timings if t.key.startswith("rows")]
    if rows:
        yield "A forward of several rows, in milliseconds, and over a forward of the first line's:"
        yield _table(("rows", OURS, "ratio", LLAMA_CPP, "ratio"), [_rows_line(t, rows[0]) for t in rows])
    generation, stream = group.timing("tg"), group.timing("stream")
    if generation and stream:
        yield _bandwidth(generation, stream)
    idle = ", ".join(f"{name} {share:.3f}" for name, share in group.idle_cpu.items())
    yield f"Cores used by a process that has nothing to do: {idle}."


def _rows_line(timing: Timing, first: Timing) -> tuple[str, ...]:
    cells = [str(timing.tokens)]
    for name in (OURS, LLAMA_CPP):
        if name not in timing.seconds:
            cells += ["", ""]
            continue
        cells.append(_spread(spread([s * 1000 for s in timing.seconds[name]]), "{:.2f}"))
        cells.append(f"{quotients(first.rates(name, 'runs'), timing.rates(name, 'runs')).median:.2f}")
    return tuple(cells)


def _bandwidth(generation: Timing, stream: Timing) -> str:
    ours, whole = generation.rates(OURS, "bytes"), stream.rates(OURS, "bytes")
    gigabytes = [_spread(spread([rate / 1e9 for rate in rates]), "{:.1f}") for rates in (ours, whole)]
    return (
        f"Generation reads {gigabytes[0]} GB/s of weights, the streaming reader {gigabytes[1]} GB/s: "
        f"a fraction of {_spread(quotients(ours, whole), '{:.2f}')}."
    )


def _models(models: Sequence[Model]) -> str:
    names = (OURS, *PEERS)
    head = ("model", "weights", "parameters in matrices", *(f"MB for {n}" for n in names), "agreement")
    return _table(
        head,
        [
            (
                model.name,
                model.weights,
                f"{model.parameters / 1e6:.2f} M",
                *(_megabytes(model, name) for name in names),
                f"{model.agreement:.3f}" if model.agreement else "",
            )
            for model in models
        ],
    )


def _megabytes(model: Model, runtime: str) -> str:
    if runtime not in model.weight_bytes:
        return ""
    size = model.weight_bytes[runtime]
    return f"{size / 1e6:.1f} ({size * 8 / model.parameters:.2f} bits per weight)"


def _ratio(timing: Timing, peer: str) -> Spread | None:
    if peer not in timing.seconds or not timing.tokens:
        return None
    return quotients(timing.rates(OURS, "tokens"), timing.rates(peer, "tokens"))


def _tokens_per_second(timing: Timing, runtime: str) -> str:
    if runtime not in timing.seconds:
        return ""
    return _spread(spread(timing.rates(runtime, "tokens")), "{:.1f}")


def _spread(values: Spread | None, pattern: str) -> str:
    """`median (least-most)`; nothing for None."""
    if values is None:
        return ""
    median, least, most = (pattern.format(value) for value in values)
    return f"{median} ({least}-{most})"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
