"""Every lowering computes the same bits: on each, the same hashes, and they are written down here.

Other lowerings run in processes of their own, because the target is chosen at the start of one.
On a board the hashes come from `python -m pytest tests/test_lowerings.py`, and must be these.
"""

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest

from edgert.config import ACTIVATIONS, EngineConfig, ModelSpec
from edgert.kernels import (
    activation,
    attention,
    embedding,
    jit,
    kv,
    matmul,
    neuron_packing,
    neurons,
    packing,
    quantize,
    rmsnorm,
    rope,
    rounding,
    routing,
    row_sums,
    softmax,
    target,
    topk,
)
from edgert.kernels.reference.matmul import SMALL
from edgert.kernels.reference.softmax import LOWEST
from edgert.model.forward import Forward
from tests import kernel_inputs as inputs
from tests import (
    test_blocks,
    test_kernel_activation,
    test_kernel_matmul,
    test_kernel_neurons,
    test_kernel_rounding,
    test_kernel_routing,
    test_kernel_rows,
)

GOLDEN = {
    "matmul f32": "992e212db5550405",
    "matmul f16": "d71876c0743379b8",
    "matmul q8": "62778c3d0195f2cc",
    "matmul q4": "12af656dfefd4c7f",
    "matmul q4m": "ff333d784b40b9b8",
    "matmul q4s": "29d5b1b9580109aa",
    "matmul q3": "4ad1f97d0f5c613c",
    "matmul q2": "b17db7be5431a1f0",
    "rmsnorm": "9c95b9e87ba005f0",
    "quantize": "7cae9c04165244dc",
    "rounding": "19d9c7bb355b3cec",
    "embed": "68bdd6d574250ec0",
    "embed few bits": "4ae331df234926d9",
    "halves": "e9feb77aa0b1f5e5",
    "rope": "cae3ffca1e239212",
    "gate": "0e18c4724aa56711",
    "softmax": "2a2695b0a07e59f2",
    "topk": "7de2f652ce8876cc",
    "routing": "07d77e003a95eb16",
    "attention f16": "7d69eae0c41142ea",
    "attention q8": "90192d1fe26b0ee4",
    "attention q4": "3149872647eab93d",
    "neurons q8": "0a25bc59c603d8f4",
    "neurons q4": "28ba91e2bb328dd8",
    "decode f16": "e832ddafb4b22c37",
    "decode q8": "26fa14c59c6ab0a4",
    "decode q4": "e9a0f91b6d16a59b",
    "decode experts": "e9849aec51a407d1",
    "activation": "43e25a2aea94b4e4",
    "attention alibi": "1a13c016d89cf13b",
    "attention capped": "248b461c4ad333b8",
    "decode blocks": "569f124588d5ff85",
    "row_sums": "9b652e8e6e055b49",
    "sinks": "792af7a264335d99",
    "clamped gate": "7e45c301c70df7ab",
    "routing groups": "af11a82bccb39f70",
    "attention sinks": "20eb646231fb8f92",
    "attention other values": "623aea436bc64ba6",
    "decode routed": "ec25540045d676c0",
}
"""The first 16 hexadecimal digits of the SHA-256 of each part's results."""

PROGRAM = ("decode f16", "decode q8", "decode q4", "decode experts", "decode blocks", "decode routed")
"""The parts that need the whole program compiled."""

# ---- what is hashed --------------------------------------------------------------------------


def products(quant: str) -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        for rows in (1, 3, 15):
            case = test_kernel_matmul.case_of(quant, seed, flavour, 3, 2, rows)
            test_kernel_matmul.product(matmul, quant)(*case)
            yield case[-3]


def norms() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        for width in (7, 64, 200):
            case = test_kernel_rows.norm_case(seed, flavour, width, 3, 1e-5)
            rmsnorm.rmsnorm(*case)
            yield case[6]


def quantised() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        case = test_kernel_rows.quantize_case(seed, flavour, 9, 3, 2)
        quantize.quantize(*case)
        yield from case[3:6]


def rounded() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        for quant in ("q8", "q4m", "q4", "q4s", "q3", "q2"):
            case = test_kernel_rounding.rows_case(quant, seed, flavour, 21, 70)
            rounding.round_rows(*case)
            yield from case[6:]
            case = test_kernel_rounding.compensated_case(quant, seed, flavour, 20, 2)
            rounding.round_group(*case)
            yield from case[2:]


def embeddings(quants: tuple[str, ...]) -> Iterator[Any]:
    for quant in quants:
        for token in range(0, 32, 5):
            case = test_kernel_rows.embed_case(quant, token, "mixed", 2, 2, token)
            embedding.embed(*case)
            yield case[-2]


def halves() -> Iterator[Any]:
    """Every finite float16 read, and every tie between two of them written."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.resize(every[np.isfinite(every)], 16 * 32 * 124)
    y = np.zeros(124 * 32, np.float32)
    for token in range(16):
        embedding.embed(1, finite.view(np.uint8), 0, 124, token, y, 0)
        yield y
    exact = np.sort(finite[finite >= 0].astype(np.float32))
    ties = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    x = np.concatenate([ties, -np.nextafter(ties, np.float32(1)), np.zeros(2, np.float32)])
    d = x.size // 4 * 2
    cache = np.zeros(16 * (d + d + 16) * 2, np.uint8)
    kv.store_f16(cache, 0, 16, 0, d, d, x, 0, x.size - d)
    yield cache


def ropes() -> Iterator[Any]:
    frequencies = (np.abs(inputs.uniform("rope", 2000)) + np.float32(2.0**-20)).view(np.uint8)
    for position in (0, 1, 999, 131072):
        table = np.zeros(4000, np.float32)
        rope.rope_table(position, frequencies, 0, 2000, np.float32(1.25), table, 0)
        x = inputs.uniform(position, 4000)
        rope.rotate(x, 0, 2000, table, 0)
        yield table
        yield x


def gates() -> Iterator[Any]:
    for name in ("silu", "relu", "relu2", "gelu_tanh"):
        for seed, flavour in enumerate(inputs.FLAVOURS):
            case = test_kernel_activation.gate_case(name, seed, flavour, 9, 1, 2)
            activation.gate(*case)
            yield case[1]


def activations() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        for name in ACTIVATIONS:
            kind, x, at, *_ = test_kernel_activation.gate_case(name, seed, flavour, 9, 1, 2)
            neurons.activate(kind, np.float32(0), x, at, 9 * 16)
            yield x
        case = test_kernel_activation.cap_case(seed, flavour, 9, 1, 30.0)
        activation.soft_cap(*case)
        yield case[0]


def sums() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        for width in (7, 64, 200):
            case = test_kernel_rows.center_case(seed, flavour, width, 3)
            row_sums.center(*case)
            row_sums.add(*case)
            yield case[3]


def softmaxes() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        for first, last in ((0, 100), (5, 6), (17, 90)):
            s = inputs.floats(seed, flavour, 128)
            yield np.float32(softmax.softmax(s, 4, first, last, LOWEST)).reshape(1)
            yield s


def sinks() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        for sink in (-20.0, 0.5, 60.0):
            s = inputs.floats(seed, flavour, 128)
            yield np.float32(softmax.softmax(s, 4, 17, 90, np.float32(sink))).reshape(1)
            yield s


def clamped_gates() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        case = test_kernel_activation.clamped_case(seed, flavour, 9, 1, 2, 7.0)
        activation.clamped_gate(*case)
        yield case[0]


def largest() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        index = np.zeros(20, np.int64)
        topk.topk(inputs.floats(seed, flavour, 300), 2, 290, 20, index)
        yield index


def routings() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        case = test_kernel_routing.route_case(seed, flavour, 23, 5, seed % 2 == 0, 3)
        routing.route(*case)
        yield case[9]
        yield case[11]
        case = test_kernel_routing.combine_case(seed, flavour, 48, 4, 7, 2)
        routing.combine(*case)
        yield case[0]


def group_routings() -> Iterator[Any]:
    for seed, flavour in enumerate(inputs.FLAVOURS):
        scores = test_kernel_routing.affinity_case(seed, flavour, 24, 3)
        routing.affinities(*scores)
        yield scores[0]
        routing.keep_groups(scores[5], scores[6], 24, 6, 2, 2)
        yield scores[5]


def attentions(kind: int, cap: float = 0.0, slopes: int = -1, sink: int = -1, less: int = 0) -> Iterator[Any]:
    capacity = 96
    path = np.arange(40, 72, 2, dtype=np.int64)
    w = inputs.uniform("slopes", 4).view(np.uint8)
    for seed, (flavour, d) in enumerate([("plain", 24), ("outlier", 64), ("mixed", 2), ("sparse", 6)]):
        dv = max(2, d - less)
        cache = np.zeros(kv.region_bytes(kind, capacity, d, dv), np.uint8)
        store = (kv.store_f16, kv.store_q8, kv.store_q4)[kind]
        for slot in range(capacity):
            x = inputs.floats((seed, slot), flavour, 2 * d, large=100)
            store(cache, 0, capacity, slot, d, dv, x, 0, d)
        kv.move(kind, cache, 0, capacity, d, dv, 90, 3)
        yield cache
        for first, last, base in ((0, 90, 90), (0, 1, 1), (21, 60, 60), (0, 47, 40), (43, 50, 40)):
            heads = {90: 4, 60: 2}.get(last, 1)
            wide, groups = int(attention.width(kind, dv)), heads * -(-d // 32)
            s = np.zeros(heads * (capacity + int(attention.width(kind, d)) + 1) + 4, np.float32)
            queries = np.zeros(groups * 32, np.int8), np.zeros(groups, np.float32), np.zeros(groups, np.int32)
            q = inputs.floats((seed, "q"), flavour, heads * d, large=100)
            scale, y_at = np.float32(d**-0.5), heads * capacity
            place = (cache, 0, capacity, d, dv, q, 0, scale, first, last, base, path, 0, s, 0, y_at)
            attention.attention(kind, heads, *place, *queries, 0, np.float32(cap), w, slopes, sink)
            yield s[y_at : y_at + heads * wide]


def neuron_sums(quant: str) -> Iterator[Any]:
    """Sums over single neurons, and their bytes in the order of whole matrices."""
    for seed, (count, width) in enumerate(((70, 40), (33, 544), (100, 1056))):
        case = test_kernel_neurons.Case(quant, seed, count, width)
        sizes = neuron_packing.NeuronShape.of(quant, width)
        up, down = (
            test_kernel_neurons.up_arguments(case),
            test_kernel_neurons.down_arguments(case, 0, sizes.slices),
        )
        neurons.add_up(*up)
        yield up[16][up[18] :]
        neurons.add_down(*down)
        yield down[13][down[15] :]
        size = packing.RECORD_BYTES[quant]
        out = np.zeros((sizes.spans * 16 + 8 * case.inner) * size, np.uint8)
        at = test_kernel_neurons.W_AT
        bundle = sizes.scales, sizes.up + sizes.down
        neurons.block_of_up(case.number, case.w, at, *bundle, case.groups, 1, out, 0)
        neurons.slice_of_down(
            case.number, case.w, at, case.groups, case.inner, 0, out, sizes.spans * 16 * size
        )
        yield out


def decoded(kv_type: Any) -> Iterator[Any]:
    """Greedy tokens and their logits, of a model with matrices of every precision."""
    spec = ModelSpec("qwen3", 2, 72, 6, 2, 20, 100, 90, 64, 1e-5, "silu", True, True, qk_norm=True)
    yield from _greedy(spec, kv_type)


def decoded_experts() -> Iterator[Any]:
    """The same of a model with experts of every precision."""
    spec = ModelSpec(
        *("qwen2_moe", 3, 72, 6, 2, 20, 100, 90, 64, 1e-5),
        experts=9,
        active_experts=3,
        expert_width=40,
        shared_width=33,
        dense_layers=(1,),
    )
    yield from _greedy(spec, "f16")


def decoded_blocks() -> Iterator[Any]:
    """The same of models with other norms, positions and feed-forwards than Llama's."""
    sizes: Any = (2, 72, 6, 2, 20, 100, 90, 64, 1e-5)
    around: dict[str, Any] = {"ropes": (1, 0), "windows": (9, 0), "attention_cap": 5.0, "logit_cap": 3.0}
    plain: dict[str, Any] = {"layer_norm": True, "norm_bias": True, "plain_ffn": True, "ropes": (2, 2)}
    for spec in (
        ModelSpec("gemma2", *sizes, "gelu_tanh", block="around", **around),
        ModelSpec("olmo2", *sizes, block="post", joint_qk_norm=True),
        ModelSpec("gpt_neox", *sizes, "gelu", block="parallel", layer_norm=True, rotary=6),
        ModelSpec("llama", *sizes, "gelu", learned_positions=True, alibi=True, **plain),
    ):
        yield from _greedy(spec, "f16")


def decoded_routed() -> Iterator[Any]:
    """The same of models with sinks and biased experts, and with latent attention."""
    yield from _greedy(test_blocks.SPECS["sinks"], "f16")
    yield from _greedy(test_blocks.SPECS["latent"], "q4")


def _greedy(spec: ModelSpec, kv_type: Any) -> Iterator[Any]:
    turns = ("q4", "q8", "f16", "f32")
    weights = inputs.tiny_weights(spec, lambda name: turns[sum(name.encode()) % 4], "lowerings")
    model = Forward(weights, EngineConfig(1, 64, 16, kv_type))
    try:
        logits = model.run([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], outputs=[10])[0].copy()
        for _ in range(8):
            yield logits
            logits = model.run([int(np.argmax(logits))], outputs=[0])[0].copy()
    finally:
        model.close()


PARTS: dict[str, Callable[[], Iterator[Any]]] = {
    **{f"matmul {quant}": lambda quant=quant: products(quant) for quant in inputs.QUANTS},  # type: ignore[misc]
    "rmsnorm": norms,
    "quantize": quantised,
    "rounding": rounded,
    "embed": lambda: embeddings(("f32", "f16", "q8", "q4")),
    "embed few bits": lambda: embeddings(SMALL),
    "halves": halves,
    "rope": ropes,
    "gate": gates,
    "softmax": softmaxes,
    "topk": largest,
    "routing": routings,
    "attention f16": lambda: attentions(0),
    "attention q8": lambda: attentions(1),
    "attention q4": lambda: attentions(2),
    **{f"neurons {quant}": lambda quant=quant: neuron_sums(quant) for quant in neuron_packing.QUANTS},  # type: ignore[misc]
    "activation": activations,
    "row_sums": sums,
    "attention capped": lambda: attentions(0, 5.0),
    "attention alibi": lambda: attentions(0, 0.0, 0),
    "decode f16": lambda: decoded("f16"),
    "decode q8": lambda: decoded("q8"),
    "decode q4": lambda: decoded("q4"),
    "decode experts": decoded_experts,
    "decode blocks": decoded_blocks,
    "sinks": sinks,
    "clamped gate": clamped_gates,
    "routing groups": group_routings,
    "attention sinks": lambda: attentions(1, 0.0, -1, 0),
    "attention other values": lambda: [*attentions(0, less=8), *attentions(2, less=8)],
    "decode routed": decoded_routed,
}


def digests(parts: list[str]) -> dict[str, str]:
    """A short hash of the results of each part."""
    return {
        name: hashlib.sha256(b"".join(a.tobytes() for a in PARTS[name]())).hexdigest()[:16] for name in parts
    }


INSTRUCTIONS = {
    "vpdpbusd zmm": r"\bvpdpbusd\b[^\n]*zmm",
    "vpdpbusd ymm": r"\bvpdpbusd\b[^\n]*ymm",
    "vex vpdpbusd": r"\{vex\}\s*vpdpbusd\b",
    "vpmaddubsw": r"\bvpmaddubsw\b",
    "fused": r"\bvfn?m(add|sub)",
    "zmm": r"\bzmm",
    "ymm": r"\bymm",
    "half": r"\bvcvtph2ps\b",
    "call fmaf": r"\bfmaf\b",
}


def instructions(kernel: Any) -> dict[str, int]:
    """How often each of INSTRUCTIONS is in a kernel that this process compiled."""
    text = "\n".join(kernel.inspect_asm().values())
    return {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}


def compile_products() -> dict[str, Any]:
    """The quantised products compiled afresh: what comes from a cache has no assembler text."""
    i64, u8, i8, i32, f32 = numba.int64, numba.uint8, numba.int8, numba.int32, numba.float32
    arguments = (u8[::1], *(i64,) * 5, i8[::1], f32[::1], i32[::1], i64, f32[::1], *(i64,) * 4)
    kernels = {}
    for quant in ("q4", "q8"):
        function = getattr(matmul, f"matmul_{quant}").py_func
        kernels[quant] = numba.njit(nogil=True, error_model="numpy")(function)
        kernels[quant].compile(arguments)
    return kernels


def main(cache: str, parts: str) -> None:
    """What a sub-process does: print the lowering, the hashes of `parts` and the instructions.

    Parts "none" is for a target that is not this machine: compiled, not run.
    """
    jit.use_cache_root(Path(cache))
    result: dict[str, Any] = {"lowering": target.lowering().name, "jit": jit.JIT}
    if parts == "none":
        kernels = compile_products()
    else:
        result["digests"] = digests(json.loads(parts))
        names = ("f32", "f16", "q8", "q4", "small")
        kernels = {name: getattr(matmul, f"matmul_{name}") for name in names}
        kernels |= {"attention": attention.attention, "rmsnorm": rmsnorm.rmsnorm}
    if jit.JIT:
        result["instructions"] = {name: instructions(kernel) for name, kernel in kernels.items()}
    print(json.dumps(result))


# ---- the processes ---------------------------------------------------------------------------

X86 = platform.machine() == "x86_64"
HOST = {name for name, present in llvm.get_host_cpu_features().items() if present}
ALL = list(PARTS)
KERNELS = [name for name in PARTS if name not in PROGRAM]

_HASWELL = "+avx,+avx2,+fma,+f16c,+sse4.2,+popcnt,+bmi,+bmi2"
TARGETS: dict[str, tuple[str, dict[str, str]]] = {
    "twins": (json.dumps(ALL), {"NUMBA_DISABLE_JIT": "1"}),
}
if X86:
    TARGETS["generic"] = (
        json.dumps(KERNELS),
        {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"},
    )
    TARGETS["avxvnni"] = (
        "none",
        {"NUMBA_CPU_NAME": "alderlake", "NUMBA_CPU_FEATURES": f"{_HASWELL},+avxvnni"},
    )
if X86 and {"avx2", "fma", "f16c"} <= HOST:
    TARGETS["avx2"] = (
        json.dumps(KERNELS),
        {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": _HASWELL},
    )


def in_a_process(name: str, cache: Path, parts: str) -> Any:
    """What a process for one of TARGETS printed."""
    clean: dict[str, str | None] = dict.fromkeys(
        ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT")
    )
    code = "from tests.test_lowerings import main; main(*sys.argv[1:])"
    out, _ = inputs.run_python(code, str(cache), parts, **(clean | TARGETS[name][1]))
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each target printed, two processes at a time."""
    cache = tmp_path_factory.mktemp("lowerings")
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(in_a_process, name, cache, TARGETS[name][0]) for name in TARGETS}
        return {name: process.result() for name, process in running.items()}


def needs(name: str) -> None:
    if name not in TARGETS:
        pytest.skip(f"this machine cannot run the lowering {name}")


def test_the_host_computes_the_golden_bits() -> None:
    """In this process: the host's own lowering, or the twins where the JIT is off."""
    assert digests(ALL) == GOLDEN


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["twins", "avx2", "generic"])
def test_other_lowerings_compute_the_golden_bits(name: str, processes: dict[str, Any]) -> None:
    needs(name)
    found = processes[name]
    assert found["jit"] == (name != "twins")
    if found["jit"]:
        assert found["lowering"] == name
    assert found["digests"] == {part: GOLDEN[part] for part in found["digests"]}


@pytest.mark.compiled
@pytest.mark.slow
def test_the_whole_program_under_avx2_decodes_the_golden_tokens(avx2_cache: Path) -> None:
    needs("avx2")
    found = in_a_process("avx2", avx2_cache, json.dumps(PROGRAM))
    assert found["lowering"] == "avx2"
    assert found["digests"] == {part: GOLDEN[part] for part in PROGRAM}


@pytest.mark.compiled
def test_avx512vnni_is_used_where_the_host_has_it() -> None:
    if target.lowering().name != "avx512vnni":
        pytest.skip("the host has no avx512vnni")
    for kernel in compile_products().values():
        found = instructions(kernel)
        assert found["vpdpbusd zmm"] >= 8 * (1 + 2 + 4 + 8)
        assert found["vpmaddubsw"] == 0
        assert found["half"] > 0


@pytest.mark.compiled
def test_avx2_code_keeps_to_avx2(processes: dict[str, Any]) -> None:
    needs("avx2")
    found = processes["avx2"]["instructions"]
    for kernel in found.values():
        assert kernel["zmm"] == kernel["vpdpbusd ymm"] == 0
        assert kernel["call fmaf"] == 0
        assert kernel["fused"] > 0
        assert kernel["ymm"] > 0
    for quant in ("q4", "q8"):
        assert found[quant]["vpmaddubsw"] >= 2 * 8 * (1 + 2 + 4 + 8)


@pytest.mark.compiled
def test_avxvnni_code_is_vex_encoded(processes: dict[str, Any]) -> None:
    needs("avxvnni")
    assert processes["avxvnni"]["lowering"] == "avxvnni"
    for quant in ("q4", "q8"):
        found = processes["avxvnni"]["instructions"][quant]
        assert found["vex vpdpbusd"] >= 2 * 8 * (1 + 2 + 4 + 8)
        assert found["zmm"] == 0


@pytest.mark.compiled
def test_generic_code_uses_no_vector_extension(processes: dict[str, Any]) -> None:
    needs("generic")
    for kernel in processes["generic"]["instructions"].values():
        assert kernel["ymm"] == kernel["zmm"] == kernel["fused"] == kernel["half"] == 0
