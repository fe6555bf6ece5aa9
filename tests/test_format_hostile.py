"""One damaged file per rule of docs/format.md; the error must name exactly that rule."""

import json
from pathlib import Path

import pytest

from edgert.errors import FormatError
from edgert.format import ErtFile
from edgert.format.header import MAX_HEADER
from edgert.format.layout import PAGE
from edgert.format.rules import Rule
from tests.damaged_files import (
    CALIBRATION,
    EXPERTS,
    NORM,
    PREDICTED,
    SPEC,
    WORTH,
    Damage,
    Draft,
    Q,
    calibration,
    drop,
    edit,
    exits,
    extra_page,
    firing,
    hole,
    inputs,
    metadata,
    off_page_header,
    overlap,
    shift_all,
    spec,
    stranger,
    text,
    valid_bytes,
    with_length,
    worth,
)


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return valid_bytes(tmp_path_factory.mktemp("valid"))


@pytest.fixture(scope="session")
def valid_experts(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return valid_bytes(tmp_path_factory.mktemp("valid-experts"), EXPERTS)


CASES: list[tuple[Rule, str, Damage]] = [
    (Rule.FILE_SIZE, "seven-bytes", lambda draft: draft.pack()[:7]),
    (Rule.HEADER_LENGTH, "cut-inside-the-header", lambda draft: draft.pack()[:1000]),
    (Rule.HEADER_LENGTH, "zero", with_length(0)),
    (Rule.HEADER_LENGTH, "over-the-limit", with_length(MAX_HEADER + 1)),
    (Rule.HEADER_LENGTH, "all-ones", with_length(2**64 - 1)),
    (
        Rule.HEADER_UTF8,
        "stray-byte",
        text(lambda t: t.replace("llama", "ll\0ma").encode().replace(b"\0", b"\xff")),
    ),
    (Rule.HEADER_UTF8, "encoded-surrogate", text(lambda t: t.encode().replace(b"llama", b"\xed\xa0\x80"))),
    (Rule.HEADER_FRAME, "leading-space", text(lambda t: " " + t)),
    (Rule.HEADER_FRAME, "trailing-newline", text(lambda t: t + "\n")),
    (Rule.HEADER_FRAME, "array", text(lambda t: "[" + t + "]")),
    (Rule.JSON_DEPTH, "bomb", text(lambda t: t[:-1] + ',"x":' + "[" * 100000 + "]" * 100000 + "}")),
    (Rule.JSON_DEPTH, "unclosed", text(lambda t: t[:-1] + ',"x":' + '{"\\\\":' * 9 + "}")),
    (Rule.JSON_DEPTH, "in-the-table", metadata("tensors", '{"x":' + "[" * 9 + "]" * 9 + "}")),
    (Rule.JSON_DEPTH, "in-the-spec", metadata("spec", '{"x":' + "[" * 9 + "]" * 9 + "}")),
    (Rule.JSON_SYNTAX, "comma", text(lambda t: t[:-1] + ",}")),
    (Rule.JSON_SYNTAX, "two-objects", text(lambda t: t + "{}")),
    (Rule.JSON_SYNTAX, "control-character", text(lambda t: t.replace("llama", "ll\nma"))),
    (Rule.JSON_SYNTAX, "table-is-a-list", metadata("tensors", "[]")),
    (Rule.JSON_SYNTAX, "spec-is-empty", metadata("spec", "")),
    (Rule.JSON_DUPLICATE, "tensor", text(lambda t: t[:-1] + ',"output":1}')),
    (Rule.JSON_DUPLICATE, "escaped-alike", text(lambda t: t[:-1] + ',"outpu\\u0074":1}')),
    (Rule.JSON_DUPLICATE, "inside-an-entry", text(lambda t: t.replace('"dtype"', '"dtype":"U8","dtype"'))),
    (Rule.JSON_DUPLICATE, "in-the-spec", metadata("spec", '{"layers":1,"layers":2}')),
    (Rule.JSON_NUMBER, "nan", spec(norm_eps=float("nan"))),
    (Rule.JSON_NUMBER, "infinity", spec(rope_theta=float("inf"))),
    (Rule.JSON_NUMBER, "overflows", metadata("spec", '{"norm_eps":1e999}')),
    (Rule.JSON_NUMBER, "long-integer", metadata("spec", '{"layers":' + "9" * 100000 + "}")),
    (Rule.METADATA_STRINGS, "number", lambda draft: draft.metadata.update(source=1)),
    (Rule.METADATA_STRINGS, "not-an-object", text(lambda t: '{"__metadata__":[]}')),
    (Rule.METADATA_STRINGS, "lone-surrogate", metadata("chat_template", "\ud800")),
    (Rule.METADATA_KEYS, "no-version", drop("metadata", "format_version")),
    (Rule.METADATA_KEYS, "no-table", text(lambda t: t.replace('"tensors": ', '"tensorz": '))),
    (Rule.METADATA_KEYS, "no-spec", text(lambda t: t.replace('"spec": ', '"spek": '))),
    (Rule.HEADER_PAGE, "unpadded", off_page_header),
    (Rule.SPEC, "outliers-beyond-the-width", spec(outliers=32)),
    (Rule.SPEC, "outliers-of-no-whole-group", spec(outliers=5)),
    (Rule.SPEC, "outliers-as-text", spec(outliers="32")),
    (Rule.SPEC, "missing-field", drop("spec", "layers")),
    (Rule.SPEC, "unknown-field", spec(expertise=4)),
    (Rule.SPEC, "negative", spec(layers=-1)),
    (Rule.SPEC, "boolean-count", spec(heads=True)),
    (Rule.SPEC, "architecture-is-a-list", spec(architecture=[])),
    (Rule.SPEC, "ids-are-a-string", spec(eos_ids="12")),
    (Rule.SPEC, "id-outside-the-vocabulary", spec(bos_id=20)),
    (Rule.SPEC, "exit-after-the-last-layer", spec(exits=[1, 2])),
    (Rule.SPEC, "exit-before-the-first-layer", spec(exits=[0])),
    (Rule.SPEC, "exit-twice", spec(exits=[1, 1])),
    (Rule.SPEC, "exits-are-a-string", spec(exits="1")),
    (Rule.TABLE_ENTRY, "null", lambda draft: draft.table.update({Q: None})),
    (Rule.TABLE_ENTRY, "field-absent", lambda draft: draft.table[Q].pop("sha256")),
    (Rule.TABLE_ENTRY, "field-unknown", edit("table", Q, "zero_point", 8)),
    (Rule.TABLE_ENTRY, "tokenizer-is-a-list", lambda draft: draft.table.update({"tokenizer.json": []})),
    (Rule.TENSOR_MISSING, "in-the-table", drop("table", Q)),
    (Rule.TENSOR_MISSING, "in-the-header", drop("entries", Q)),
    (Rule.TENSOR_MISSING, "two-billion-layers", spec(layers=2**31 - 1)),
    (Rule.TENSOR_MISSING, "spec-wants-biases", spec(ffn_bias=True)),
    (Rule.TENSOR_UNKNOWN, "in-the-table", stranger("table", Q)),
    (Rule.TENSOR_UNKNOWN, "in-the-header", stranger("entries", Q)),
    (Rule.TENSOR_UNKNOWN, "spec-ties-the-output", spec(tied_embeddings=True)),
    (Rule.TABLE_SHAPE, "transposed", edit("table", Q, "shape", [8, 9])),
    (Rule.TABLE_SHAPE, "floats", edit("table", Q, "shape", [8.0, 8.0])),
    (Rule.TABLE_SHAPE, "number", edit("table", Q, "shape", 8)),
    (Rule.TABLE_SHAPE, "empty-tokenizer", edit("table", "tokenizer.json", "shape", [0])),
    (Rule.TABLE_SHAPE, "spec-of-another-size", spec(width=9)),
    (Rule.TABLE_QUANT, "unknown", edit("table", Q, "quant", "q5")),
    (Rule.TABLE_QUANT, "list", edit("table", Q, "quant", [])),
    (Rule.TABLE_QUANT, "quantised-vector", edit("table", NORM, "quant", "q8")),
    (Rule.TABLE_LAYOUT, "unknown", edit("table", Q, "layout", "rows32")),
    (Rule.TABLE_LAYOUT, "flat-matrix", edit("table", Q, "layout", "flat")),
    (Rule.TABLE_BYTES, "one-less", edit("table", Q, "bytes", 287)),
    (Rule.TABLE_BYTES, "float", edit("table", Q, "bytes", 288.0)),
    (Rule.TABLE_BYTES, "other-quantisation", edit("table", Q, "quant", "f32")),
    (Rule.TABLE_SHA256, "uppercase", edit("table", Q, "sha256", "A" * 64)),
    (Rule.TABLE_SHA256, "short", edit("table", Q, "sha256", "a" * 63)),
    (Rule.TABLE_SHA256, "trailing-newline", edit("table", Q, "sha256", "a" * 64 + "\n")),
    (Rule.HEADER_ENTRY, "list", lambda draft: draft.entries.update({Q: []})),
    (Rule.HEADER_ENTRY, "field-unknown", edit("entries", Q, "strides", [1])),
    (Rule.DTYPE, "i8", edit("entries", Q, "dtype", "I8")),
    (Rule.DTYPE, "null", edit("entries", Q, "dtype", None)),
    (Rule.OFFSETS, "float", edit("entries", Q, "data_offsets", [0.0, 4096.0])),
    (Rule.OFFSETS, "boolean", edit("entries", Q, "data_offsets", [False, 4096])),
    (Rule.OFFSETS, "negative", edit("entries", Q, "data_offsets", [-4096, 0])),
    (Rule.OFFSETS, "backwards", edit("entries", Q, "data_offsets", [8192, 4096])),
    (Rule.OFFSETS, "three", edit("entries", Q, "data_offsets", [0, 4096, 8192])),
    (Rule.STORED_SHAPE, "other-length", edit("entries", Q, "shape", [4095])),
    (Rule.STORED_SHAPE, "two-axes", edit("entries", Q, "shape", [1, 4096])),
    (Rule.STORED_SHAPE, "float", edit("entries", Q, "shape", [4096.0])),
    (Rule.TENSOR_PAGE, "off-by-one", lambda draft: draft.move(Q, 4097)),
    (Rule.STORED_LENGTH, "page-too-many", extra_page),
    (Rule.DATA_START, "page-late", shift_all),
    (Rule.DATA_HOLE, "before-the-last", hole),
    (Rule.DATA_OVERLAP, "same-place", overlap),
    (Rule.DATA_END, "cut", lambda draft: draft.pack()[:-1]),
    (Rule.DATA_END, "bytes-behind", lambda draft: draft.pack() + bytes(PAGE)),
    (Rule.EXITS, "absent", drop("metadata", "exits")),
    (Rule.EXITS, "of-another-layer", exits(**{"2": CALIBRATION})),
    (Rule.EXITS, "list", exits(**{"1": []})),
    (Rule.EXITS, "field-absent", exits(**{"1": {"temperature": 1.0}})),
    (Rule.EXITS, "cold", calibration(temperature=0)),
    (Rule.EXITS, "temperature-is-true", calibration(temperature=True)),
    (Rule.EXITS, "no-buckets", calibration(confidence=[], tokens=[], agreed=[])),
    (Rule.EXITS, "descending", calibration(confidence=[0, 0.9, 0.5])),
    (Rule.EXITS, "not-from-zero", calibration(confidence=[0.1, 0.5, 0.9])),
    (Rule.EXITS, "surer-than-sure", calibration(confidence=[0, 0.5, 1])),
    (Rule.EXITS, "text", calibration(confidence="012")),
    (Rule.EXITS, "a-bucket-short", calibration(tokens=[5, 5])),
    (Rule.EXITS, "half-a-token", calibration(agreed=[1, 2.5, 3])),
    (Rule.EXITS, "more-agreed-than-there-were", calibration(agreed=[1, 2, 9])),
    (Rule.EXITS, "negative", calibration(agreed=[-1, 2, 3])),
    (Rule.EXITS, "no-tokens", calibration(tokens=[0, 0, 0], agreed=[0, 0, 0])),
    (Rule.SPARSITY, "stranger", firing(more=1)),
    (Rule.SPARSITY, "nothing-fires", firing(share=1)),
    (Rule.SPARSITY, "share-is-true", firing(share=True)),
    (Rule.SPARSITY, "a-layer-short", firing(thresholds=[0.1] * (SPEC.layers - 1))),
    (Rule.SPARSITY, "negative-threshold", firing(thresholds=[-0.1] * SPEC.layers)),
    (Rule.SPARSITY, "more-zeros-than-all", firing(zeros=[1.5] * SPEC.layers)),
    (Rule.SPARSITY, "a-quantile-short", firing(firing=[[0, 0.1, 0.2, 1]] * SPEC.layers)),
    (Rule.INPUTS, "stranger", inputs(more=1)),
    (Rule.INPUTS, "all-zeros", inputs(share=1)),
    (Rule.INPUTS, "share-is-true", inputs(share=True)),
    (Rule.INPUTS, "a-layer-short", inputs(thresholds=[[0.1] * 4] * (SPEC.layers - 1))),
    (Rule.INPUTS, "a-place-short", inputs(thresholds=[[0.1] * 3] * SPEC.layers)),
    (Rule.INPUTS, "negative-threshold", inputs(thresholds=[[-0.1] * 4] * SPEC.layers)),
    (Rule.INPUTS, "more-zeros-than-all", inputs(zeros=[[1.5] * 4] * SPEC.layers)),
    (Rule.PREDICTORS, "of-none", metadata("predictors", json.dumps(WORTH))),
    (Rule.SPEC, "of-no-neurons", spec(predictors=[32, 0])),
    (Rule.SPEC, "ranks-are-a-number", spec(predictors=32)),
]


@pytest.mark.parametrize(
    ("rule", "damage"),
    [pytest.param(rule, damage, id=f"{rule.name}-{label}") for rule, label, damage in CASES],
)
def test_a_damaged_file_breaks_exactly(rule: Rule, damage: Damage, valid: bytes, tmp_path: Path) -> None:
    draft = Draft(valid)
    blob = damage(draft)
    path = tmp_path / "damaged.ert"
    path.write_bytes(blob if isinstance(blob, bytes) else draft.pack())
    with pytest.raises(FormatError) as caught:
        ErtFile.open(path)
    assert caught.value.rule == rule.value
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 600 + len(str(path))


EXPERT, ROUTER = "layers.0.experts.1", "layers.0.router"
EXPERT_CASES: list[tuple[Rule, str, Damage]] = [
    (Rule.SPEC, "more-active-than-there-are", spec(active_experts=4)),
    (Rule.SPEC, "none-active", spec(active_experts=0)),
    (Rule.SPEC, "no-width", spec(expert_width=0)),
    (Rule.SPEC, "negative-shared-width", spec(shared_width=-1)),
    (Rule.SPEC, "a-flag-is-a-number", spec(normalized_routing=1)),
    (Rule.SPEC, "dense-layers-is-a-number", spec(dense_layers=1)),
    (Rule.SPEC, "dense-layer-beyond-the-last", spec(dense_layers=[2])),
    (Rule.SPEC, "dense-layers-in-disorder", spec(dense_layers=[1, 0])),
    (Rule.SPEC, "no-experts-but-their-width", spec(experts=0)),
    (Rule.SPEC, "two-norms-of-q", spec(qk_norm=True, joint_qk_norm=True)),
    (Rule.TABLE_SHAPE, "two-billion-experts", spec(experts=2**31 - 1)),
    (Rule.TABLE_SHAPE, "expert-of-two-matrices", edit("table", EXPERT, "shape", [2, 9, 8])),
    (Rule.TABLE_SHAPE, "wider-experts", spec(expert_width=17)),
    (Rule.TENSOR_MISSING, "an-expert", drop("table", EXPERT)),
    (Rule.TENSOR_MISSING, "a-shared-expert", spec(shared_width=9)),
    (Rule.TENSOR_UNKNOWN, "a-fourth-expert", stranger("table", EXPERT)),
    (Rule.TABLE_QUANT, "a-rounded-router", edit("table", ROUTER, "quant", "q8")),
    (Rule.TABLE_QUANT, "expert", edit("table", EXPERT, "quant", "q5")),
    (Rule.TABLE_LAYOUT, "expert-as-a-matrix", edit("table", EXPERT, "layout", "rows16")),
    (Rule.TABLE_BYTES, "expert", edit("table", EXPERT, "bytes", 288)),
    (Rule.TENSOR_PAGE, "expert", lambda draft: draft.move(EXPERT, 4097)),
]


@pytest.mark.parametrize(
    ("rule", "damage"), [(r, d) for r, _, d in EXPERT_CASES], ids=[i for _, i, _ in EXPERT_CASES]
)
def test_a_damaged_file_with_experts_breaks_exactly(
    rule: Rule, damage: Damage, valid_experts: bytes, tmp_path: Path
) -> None:
    draft = Draft(valid_experts)
    blob = damage(draft)
    path = tmp_path / "m.ert"
    path.write_bytes(draft.pack() if blob is None else blob)
    with pytest.raises(FormatError) as caught:
        ErtFile.open(path)
    assert caught.value.rule == rule.value


@pytest.mark.parametrize(
    ("rule", "damage"),
    [
        pytest.param(rule, damage, id=label)
        for rule, label, damage in (
            (Rule.PREDICTORS, "stranger", worth(more=1)),
            (Rule.PREDICTORS, "perplexity-below-one", worth(perplexity=[0.5, 6])),
            (Rule.PREDICTORS, "a-layer-short", worth(recall=[0.9])),
            (Rule.PREDICTORS, "more-than-all", worth(predicted=[1.5, 0])),
            (Rule.PREDICTORS, "no-worth", metadata("predictors", "{}")),
            (Rule.TABLE_LAYOUT, "no-rank", spec(predictors=[])),
            (Rule.TABLE_LAYOUT, "more-ranks", spec(predictors=[32, 32])),
            (Rule.TABLE_SHAPE, "another-rank", spec(predictors=[64, 0])),
            (Rule.SPEC, "odd-rank", spec(predictors=[33, 0])),
            (Rule.SPEC, "negative-rank", spec(predictors=[-32, 32])),
            (Rule.SPEC, "huge-rank", spec(predictors=[1 << 30, 0])),
            (Rule.SPEC, "a-rank-short", spec(predictors=[32])),
            (Rule.TABLE_LAYOUT, "as-whole-matrix", edit("table", "layers.0.gate", "layout", "rows16")),
            (Rule.TABLE_QUANT, "as-float", edit("table", "layers.0.gate", "quant", "f16")),
        )
    ],
)
def test_a_damaged_file_with_predictors_breaks_exactly(rule: Rule, damage: Damage, tmp_path: Path) -> None:
    draft = Draft(valid_bytes(tmp_path, PREDICTED))
    blob = damage(draft)
    (tmp_path / "damaged.ert").write_bytes(blob if isinstance(blob, bytes) else draft.pack())
    with pytest.raises(FormatError) as caught:
        ErtFile.open(tmp_path / "damaged.ert")
    assert caught.value.rule == rule.value


def test_a_file_with_predictors_opens(tmp_path: Path) -> None:
    (tmp_path / "sound.ert").write_bytes(valid_bytes(tmp_path, PREDICTED))
    with ErtFile.open(tmp_path / "sound.ert") as file:
        assert file.spec.predictors == (32, 0)
        assert file.tensors["layers.1.gate"].layout == "rows16"


def test_a_file_with_experts_opens_and_each_is_one_span(valid_experts: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.ert"
    path.write_bytes(Draft(valid_experts).pack())
    with ErtFile.open(path) as file:
        found = [file.tensors[f"layers.0.experts.{e}"] for e in range(3)]
    # gate and up [9, 8] are one record each, so is down [8, 9].
    assert [(t.shape, t.layout, t.nbytes, t.offset % PAGE) for t in found] == [
        ((3, 9, 8), "gated16", 864, 0)
    ] * 3
    assert "layers.1.experts.0" not in file.tensors


def test_every_rule_has_a_damaged_file() -> None:
    assert {rule for rule, _, _ in CASES} == set(Rule) - {Rule.OUTLIERS}  # that is in test_outliers.py


def test_every_rule_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
    documented = [line.split("**")[1] for line in page.splitlines() if line.startswith("- **F")]
    assert documented == [rule.value for rule in Rule]
