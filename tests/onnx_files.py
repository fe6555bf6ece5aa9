"""Tiny ONNX decoders, in both styles that exporters write, under names that say nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests import tiny_models

Floats = NDArray[np.float32]
LAYER = "model.layers.{}."
# onnxruntime turns whole heads of a multiple of 16 only.
CONFIGS = dict(tiny_models.CONFIGS) | {
    "qwen3_heads_of_32": tiny_models.CONFIGS["qwen3_gqa_tied_head_dim"] | {"head_dim": 32}
}


class Maker:
    """A graph in the making."""

    def __init__(self, kind: str) -> None:
        self.float = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}[kind]
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def name(self) -> str:
        return f"t{(len(self.nodes) * 7919 + len(self.tensors) * 104729) % 1000003}_{len(self.tensors)}"

    def op(self, op: str, *inputs: str, count: int = 1, domain: str = "", **attributes: Any) -> Any:
        made = [f"{self.name()}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(op, inputs, made, domain=domain, **attributes))
        return made[0] if count == 1 else made

    def ms(self, op: str, *inputs: str, count: int = 1, **attributes: Any) -> Any:
        return self.op(op, *inputs, count=count, domain="com.microsoft", **attributes)

    def raw(self, values: NDArray[Any]) -> str:
        name = self.name()
        self.tensors.append(numpy_helper.from_array(np.array(values, order="C"), name))
        return name

    def whole(self, *values: int) -> str:
        return self.raw(np.array(values, np.int64))

    def number(self, values: Any) -> str:
        return self.raw(np.asarray(values, np.float16 if self.float == TensorProto.FLOAT16 else np.float32))


def quantised(weights: Floats, zeros: bool) -> tuple[NDArray[np.uint8], Floats, NDArray[np.uint8] | None]:
    """Blocks of 32 as MatMulNBits has them: packed numbers, scales and zero points."""
    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // 32, 32)
    rng = np.random.default_rng(len(weights))
    middle = rng.integers(6, 11, blocks.shape[:2]) if zeros else np.full(blocks.shape[:2], 8)
    scales = (np.abs(blocks).max(axis=2) / 6).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(blocks / scales[..., None]) + middle[..., None], 0, 15).astype(np.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    flat = np.pad(middle, ((0, 0), (0, middle.shape[1] % 2))).astype(np.uint8)
    return packed, scales, flat[:, 0::2] | flat[:, 1::2] << 4 if zeros else None


class Decoder:
    """Writes a decoder of `tiny_models` as "operators" (onnxruntime-genai) or "spelled" (Optimum).

    "heads": as onnxruntime-genai does where each query head has a key head, with MultiHeadAttention.
    """

    def __init__(self, name: str, style: str, kind: str = "f32", blocks: str = "", window: int = -1) -> None:
        self.config = CONFIGS[name]
        self.weights = tiny_models.weights(self.config, tiny_models.SEED)
        self.style, self.blocks, self.window = style, blocks, window
        self.make = Maker(kind)
        self.heads = self.config["num_attention_heads"]
        self.d = self.config.get("head_dim") or self.config["hidden_size"] // self.heads
        self.kv_heads = self.config["num_key_value_heads"]
        powers = np.arange(0, self.d, 2, dtype=np.float64) / self.d
        theta = self.config["rope_parameters"]["rope_theta"]
        self.frequencies = (theta**-powers).astype(np.float32)

    def linear(self, x: str, name: str) -> str:
        weights, bias = self.weights[name + ".weight"], self.weights.get(name + ".bias")
        return self.product(x, weights, bias)

    def product(self, x: str, weights: Floats, bias: Floats | None = None) -> str:
        make = self.make
        if self.blocks and weights.shape[1] % 32 == 0:
            packed, scales, zeros = quantised(weights, self.blocks == "zeros")
            inputs = [x, make.raw(packed), make.number(scales.reshape(-1))]
            inputs += [] if zeros is None else [make.raw(zeros.reshape(-1))]
            n, k = weights.shape
            made = make.ms("MatMulNBits", *inputs, N=n, K=k, bits=4, block_size=32)
        else:
            made = make.op("MatMul", x, make.number(weights.T))
        return str(made if bias is None else make.op("Add", make.number(bias), made))

    def norm(self, x: str, name: str) -> str:
        make, eps = self.make, self.config["rms_norm_eps"]
        gain = make.number(self.weights[name + ".weight"])
        if self.style == "operators":
            return str(make.op("SimplifiedLayerNormalization", x, gain, epsilon=eps, axis=-1))
        wide = make.op("Cast", x, to=TensorProto.FLOAT)
        mean = make.op("ReduceMean", make.op("Pow", wide, make.raw(np.float32(2))), make.whole(-1))
        root = make.op("Sqrt", make.op("Add", mean, make.raw(np.float32(eps))))
        scaled = make.op("Mul", wide, make.op("Div", make.raw(np.float32(1)), root))
        return str(make.op("Mul", gain, make.op("Cast", scaled, to=make.float)))

    def layer(self, x: str, index: int) -> tuple[str, list[str]]:
        make, here = self.make, LAYER.format(index)
        h = self.norm(x, here + "input_layernorm")
        styles = {"operators": self.one_operator, "heads": self.many_heads, "spelled": self.spelled}
        attend = styles[self.style]
        attended, present = attend(h, here + "self_attn.", index)
        out = self.linear(attended, here + "self_attn.o_proj")
        gain = here + "post_attention_layernorm"
        if self.style == "operators":
            h, _, _, x = make.ms(
                "SkipSimplifiedLayerNormalization",
                x,
                out,
                make.number(self.weights[gain + ".weight"]),
                count=4,
                epsilon=self.config["rms_norm_eps"],
            )
        else:
            x = make.op("Add", out, x)
            h = self.norm(x, gain)
        gate, up = self.linear(h, here + "mlp.gate_proj"), self.linear(h, here + "mlp.up_proj")
        active = make.op("Mul", gate, make.op("Sigmoid", gate))
        down = self.linear(make.op("Mul", active, up), here + "mlp.down_proj")
        return str(make.op("Add", x, down)), present

    def head_norm(self, x: str, name: str, heads: int) -> str:
        if name + ".weight" not in self.weights:
            return x
        split = self.make.op("Reshape", x, self.make.whole(0, 0, heads, self.d))
        return str(self.make.op("Reshape", self.norm(split, name), self.make.whole(0, 0, heads * self.d)))

    def one_operator(self, h: str, here: str, index: int) -> tuple[str, list[str]]:
        make = self.make
        if here + "q_norm.weight" in self.weights:
            q = self.head_norm(self.linear(h, here + "q_proj"), here + "q_norm", self.heads)
            k = self.head_norm(self.linear(h, here + "k_proj"), here + "k_norm", self.kv_heads)
            inputs = [q, k, self.linear(h, here + "v_proj")]
        else:
            parts = [here + f"{part}_proj" for part in "qkv"]
            fused = np.concatenate([self.weights[p + ".weight"] for p in parts])
            biases = [self.weights[p + ".bias"] for p in parts if p + ".bias" in self.weights]
            inputs = [self.product(h, fused, np.concatenate(biases) if biases else None), "", ""]
        made = make.ms(
            "GroupQueryAttention",
            *inputs,
            f"past{2 * index}",
            f"past{2 * index + 1}",
            "lengths",
            "total",
            self.cos,
            self.sin,
            count=3,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            do_rotary=1,
            local_window_size=self.window,
        )
        return made[0], made[1:]

    def many_heads(self, h: str, here: str, index: int) -> tuple[str, list[str]]:
        make = self.make
        q, k, v = (self.linear(h, here + f"{part}_proj") for part in "qkv")
        q, k = (make.ms("RotaryEmbedding", x, "positions", self.cos, self.sin) for x in (q, k))
        past = f"past{2 * index}", f"past{2 * index + 1}"
        made = make.ms("MultiHeadAttention", q, k, v, "", "", self.mask, *past, count=3, num_heads=self.heads)
        return made[0], made[1:]

    def spelled(self, h: str, here: str, index: int) -> tuple[str, list[str]]:
        make, d = self.make, self.d
        rows = {}
        for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            x = make.op("Reshape", self.linear(h, here + f"{part}_proj"), make.whole(0, 0, heads, d))
            if here + f"{part}_norm.weight" in self.weights:
                x = self.norm(x, here + f"{part}_norm")
            x = make.op("Transpose", x, perm=[0, 2, 1, 3])
            if part != "v":
                ends = [make.whole(n) for n in (0, d // 2, 1 << 40)]
                lower = make.op("Slice", x, ends[0], ends[1], make.whole(3))
                upper = make.op("Slice", x, ends[1], ends[2], make.whole(3))
                swapped = make.op("Concat", make.op("Neg", upper), lower, axis=-1)
                turned = make.op("Mul", swapped, self.sin)
                x = make.op("Add", make.op("Mul", x, self.cos), turned)
            rows[part] = x
        present, wide = [], []
        for i, part in enumerate("kv"):
            x = make.op("Concat", f"past{2 * index + i}", rows[part], axis=2)
            present.append(x)
            x = make.op("Unsqueeze", x, make.whole(2))
            x = make.op("Expand", x, make.whole(1, 1, self.heads // self.kv_heads, 1, 1))
            wide.append(make.op("Reshape", x, make.whole(1, self.heads, -1, d)))
        keys = make.op("Transpose", wide[0], perm=[0, 1, 3, 2])
        scores = make.op("Div", make.op("MatMul", rows["q"], keys), make.number(d**0.5))
        weights = make.op("Softmax", make.op("Add", scores, self.mask), axis=-1)
        out = make.op("Transpose", make.op("MatMul", weights, wide[1]), perm=[0, 2, 1, 3])
        return str(make.op("Reshape", out, make.whole(0, 0, self.heads * d))), present

    def begin(self) -> None:
        make = self.make
        if self.style == "operators":
            angles = np.arange(self.config["max_position_embeddings"])[:, None] * self.frequencies[None]
            self.cos, self.sin = make.number(np.cos(angles)), make.number(np.sin(angles))
            count = make.op("ReduceSum", "mask", make.whole(1), keepdims=0)
            less = make.op("Sub", count, make.whole(1))
            self.nodes_named("Cast", less, "lengths", to=TensorProto.INT32)
            total = make.op("Gather", make.op("Shape", "mask"), make.raw(np.array(1, np.int64)))
            self.nodes_named("Cast", total, "total", to=TensorProto.INT32)
            return
        self.see()
        if self.style == "heads":
            angles = np.arange(self.config["max_position_embeddings"])[:, None] * self.frequencies[None]
            self.cos, self.sin = make.number(np.cos(angles)), make.number(np.sin(angles))
            return
        p = make.op("Cast", make.op("Unsqueeze", "positions", make.whole(1, 3)), to=TensorProto.FLOAT)
        half = make.op("Mul", p, make.raw(self.frequencies.reshape(1, 1, 1, -1)))
        angles = make.op("Concat", half, half, axis=-1)
        self.cos = make.op("Cast", make.op("Cos", angles), to=make.float)
        self.sin = make.op("Cast", make.op("Sin", angles), to=make.float)

    def see(self) -> None:
        """What hides the keys behind a row."""
        make = self.make
        one, none = make.raw(np.array(1, np.int64)), make.raw(np.array(0, np.int64))
        length = make.op("Gather", make.op("Shape", "mask"), one)
        keys = make.op("Range", none, length, one)
        queries = make.op("Unsqueeze", "positions", make.whole(1, 3))
        seen = make.op("LessOrEqual", keys, queries)
        self.mask = make.op("Where", seen, make.number(0), make.number(-1e4))

    def nodes_named(self, op: str, value: str, name: str, **attributes: Any) -> None:
        self.make.nodes.append(helper.make_node(op, [value], [name], **attributes))

    def model(self) -> Any:
        make = self.make
        self.begin()
        embedding = self.weights["model.embed_tokens.weight"]
        x = make.op("Gather", make.number(embedding), "ids")
        presents: list[str] = []
        for index in range(self.config["num_hidden_layers"]):
            x, present = self.layer(x, index)
            presents += present
        x = self.norm(x, "model.norm")
        logits = self.product(x, self.weights.get("lm_head.weight", embedding))
        given = [("ids", TensorProto.INT64, ["b", "s"]), ("mask", TensorProto.INT64, ["b", "t"])]
        if self.style != "operators":
            given.append(("positions", TensorProto.INT64, ["b", "s"]))
        cache = ["b", self.kv_heads, "p", self.d]
        given += [(f"past{i}", make.float, cache) for i in range(len(presents))]
        made = [(name, make.float, ["b", self.kv_heads, "t", self.d]) for name in presents]
        made.append((logits, make.float, ["b", "s", len(embedding)]))
        graph = helper.make_graph(
            make.nodes,
            "g",
            [helper.make_tensor_value_info(*value) for value in given],
            [helper.make_tensor_value_info(*value) for value in made],
            make.tensors,
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def write(folder: Path, model: Any, config: dict[str, Any], external: bool = False) -> Path:
    """The model with a tokenizer and a config that says only what the graph cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {key: config[key] for key in ("eos_token_id", "bos_token_id", "max_position_embeddings")}
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "tokenizer.json").write_text(tiny_models.tokenizer().to_str(), encoding="utf-8")
    place = {"save_as_external_data": external, "location": "weights.bin", "size_threshold": 1024}
    onnx.save_model(model, str(folder / "model.onnx"), **(place if external else {}))
    return folder / "model.onnx"


def written(folder: Path, name: str, style: str, external: bool = False, **options: Any) -> Path:
    """A model of `tiny_models` as an ONNX file."""
    decoder = Decoder(name, style, **options)
    return write(folder, decoder.model(), decoder.config, external)


def merge(path: Path) -> None:
    """The model in a file as both branches of an If, which share its weights, as Optimum merges two."""
    model = onnx.load(path)
    graph, outputs = model.graph, list(model.graph.output)
    branches = [helper.make_graph(list(graph.node), name, [], outputs) for name in ("then", "else")]
    named = [onnx.ValueInfoProto() for _ in outputs]
    for value, output in zip(named, outputs, strict=True):
        value.CopyFrom(output)
        value.name = f"merged.{output.name}"
    chosen = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    node = helper.make_node(
        "If",
        ["use_cache_branch"],
        [value.name for value in named],
        then_branch=branches[0],
        else_branch=branches[1],
    )
    whole = helper.make_graph([node], "m", [*graph.input, chosen], named, list(graph.initializer))
    opsets = list(model.opset_import)
    onnx.save_model(helper.make_model(whole, opset_imports=opsets, ir_version=9), path)
