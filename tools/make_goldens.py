"""Write `tests/goldens`: the logits of transformers for the tiny models of `tests/tiny_models.py`.

Run `python tools/make_goldens.py` where torch and transformers are installed, with the names of some models
or for all of them. Every model is checked before its logits are stored:

* transformers loads exactly the tensors that were written, value for value;
* its float32 logits agree with its float64 logits, so the goldens are not rounding noise;
* keys and values rounded to float16 stay within the tolerance of the tests;
* every option shows: without it, the stored logits differ by far more than that tolerance.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS.parent))

from tests import tiny_models  # noqa: E402
from tests.tiny_configs import CONFIGS, Config  # noqa: E402
from tests.tiny_models import SEED, Tensors  # noqa: E402

GOLDENS = TESTS / "goldens"
TOKENS = tiny_models.tokens(48)
# The first tokens, those around the ends of the windows (8, 10, 12, 16), and the last.
POSITIONS = [0, 1, 7, 8, 10, 12, 16, 20, 31, 47]

FLOAT64_TOLERANCE = 2e-5  # a fiftieth of the tests' 1e-3
FLOAT16_CACHE_TOLERANCE = 8e-4  # leaves 2e-4 of the tests' 1e-3 for everything else
LEAST_EFFECT = 1e-2  # ten times the tolerance of the tests: no option can be absent unnoticed

NEUTRAL: Config = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "rope_interleave": True,
    "routed_scaling_factor": 1.0,
    "scale_attn_weights": True,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
"""Options that are usually something else, and the values under which they change nothing."""

Variant = tuple[str, Config, Tensors]


def main() -> None:
    """Check every model and write its goldens and their index."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    GOLDENS.mkdir(exist_ok=True)
    names = sys.argv[1:] or list(CONFIGS)
    old = json.loads((GOLDENS / "index.json").read_text(encoding="utf-8"))
    kept = {name: digest for name, digest in old["weights_sha256"].items() if sys.argv[1:]}
    digests: dict[str, str] = {}
    for name in names:
        config = CONFIGS[name]
        tensors = tiny_models.weights(config, SEED)
        model = load_checked(name, tensors)
        expected = logits(model)
        noise = check_precision(name, model, expected)
        effects = check_effects(name, config, tensors, expected)
        weakest = min(effects, key=lambda effect: effect[1])
        np.save(GOLDENS / f"{name}.npy", expected)
        digests[name] = tiny_models.digest(tensors)
        print(
            f"{name:28} sd {expected.std():.2f}, float64 {noise[0]:.0e}, float16 cache {noise[1]:.0e}, "
            f"weakest: {weakest[0]} {weakest[1]:.3f}"
        )
    index = {
        "made_by": "tools/make_goldens.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seed": SEED,
        "tokens": TOKENS,
        "positions": POSITIONS,
        "weights_sha256": {name: digest for name, digest in (kept | digests).items() if name in CONFIGS},
    }
    for path in GOLDENS.glob("*.npy"):
        if path.stem not in CONFIGS:
            path.unlink()
    (GOLDENS / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in GOLDENS.iterdir())
    print(f"{len(digests)} models anew, {size:,} bytes in {GOLDENS.name}/")


def load_checked(name: str, tensors: Tensors) -> PreTrainedModel:
    """The model as transformers reads it from its folder, every weight accounted for."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.write_folder(Path(folder), name)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=tiny_models.attention_of(CONFIGS[name]),
            experts_implementation="eager",
            output_loading_info=True,
        )
    problems = {kind: found for kind, found in report.items() if found}
    expect(not problems, f"{name}: transformers reports {problems}")
    buffers = {name: values for name, values in model.named_buffers() if name in tensors}
    parameters = as_stored(dict(model.named_parameters()) | buffers, tensors)
    expect(parameters.keys() == tensors.keys(), f"{name}: the models differ in {parameters.keys() ^ tensors}")
    for tensor, values in tensors.items():
        same = np.array_equal(parameters[tensor], values)
        expect(same, f"{name}: transformers changed the values of {tensor}")
    return model


def as_stored(parameters: dict[str, torch.Tensor], tensors: Tensors) -> Tensors:
    """A model's parameters under the names of the checkpoint; transformers holds experts fused."""
    found: Tensors = {}
    for name, parameter in parameters.items():
        values = parameter.detach().numpy()
        if name in tensors:
            found[name] = values
            continue
        if name == "lm_head.weight" and "embed_out.weight" in tensors:  # of GPT-NeoX, in transformers 5
            found["embed_out.weight"] = values
            continue
        layer, _, part = name.partition(".mlp." if ".mlp." in name else ".block_sparse_moe.")
        if f"{layer}.block_sparse_moe.input_linear.weight" in tensors and part:
            granite = {
                "router.weight": "router.layer.weight",
                "experts.gate_up_proj": "input_linear.weight",
                "experts.down_proj": "output_linear.weight",
            }
            found[f"{layer}.block_sparse_moe.{granite[part]}"] = values
        elif part.startswith("experts."):
            mixtral = f"{layer}.block_sparse_moe.gate.weight" in tensors
            block = "block_sparse_moe" if mixtral else "mlp"
            gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            for expert, matrix in enumerate(values):
                own = f"{layer}.{block}.experts.{expert}"
                if part == "experts.down_proj":
                    found[f"{own}.{down}.weight"] = matrix
                else:
                    found[f"{own}.{gate}.weight"], found[f"{own}.{up}.weight"] = np.split(matrix, 2)
        else:
            mixtral = part and f"{layer}.block_sparse_moe.{part}" in tensors
            found[f"{layer}.block_sparse_moe.{part}" if mixtral else name] = values
    return found


def logits(model: PreTrainedModel) -> NDArray[np.float32]:
    """Logits at the stored positions."""
    with torch.no_grad():
        rows = model(torch.tensor([TOKENS])).logits[0]
    return np.ascontiguousarray(rows[POSITIONS].float().numpy())


def check_precision(name: str, model: PreTrainedModel, expected: NDArray[np.float32]) -> tuple[float, float]:
    """How far float64 arithmetic, and a float16 cache, lie from the expected logits."""

    class HalfCache(DynamicCache):
        def update(
            self, keys: torch.Tensor, values: torch.Tensor, *rest: object, **named: object
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return super().update(keys.half().float(), values.half().float(), *rest, **named)

    with torch.no_grad():
        half = model(torch.tensor([TOKENS]), past_key_values=HalfCache(config=model.config)).logits[0]
    cache_error = difference(half[POSITIONS].numpy(), expected)
    float64_error = difference(logits(model.double()), expected)
    expect(float64_error < FLOAT64_TOLERANCE, f"{name}: float64 differs by {float64_error}")
    expect(cache_error < FLOAT16_CACHE_TOLERANCE, f"{name}: a float16 cache differs by {cache_error}")
    return float64_error, cache_error


def check_effects(
    name: str, config: Config, tensors: Tensors, expected: NDArray[np.float32]
) -> Iterator[tuple[str, float]]:
    """Every option of the model with the change in logits where it is left out."""
    for what, changed, values in (*without_tensors(config, tensors), *without_options(config, tensors)):
        with tempfile.TemporaryDirectory() as folder:
            tiny_models.write_model(Path(folder), changed, values)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=tiny_models.attention_of(config),
                experts_implementation="eager",
            )
        effect = difference(logits(model), expected)
        expect(effect > LEAST_EFFECT, f"{name}: without {what} logits change by only {effect}")
        yield what, effect


def without_tensors(config: Config, tensors: Tensors) -> Iterator[Variant]:
    """The model without one kind of bias, or with the gains of one kind of norm all 1, or regrouped."""
    for kind in sorted({name.split(".", 3)[-1] if ".layers." in name else name for name in tensors}):
        if kind.endswith("k_proj.bias") and config["model_type"] == "opt":
            continue  # without rope it adds the same to all scores of a query
        if kind.endswith((".bias", "_bias")):
            plain: Callable[[NDArray[np.float32]], NDArray[np.float32]] = np.zeros_like
        elif kind.endswith("sinks"):  # far below every score
            plain = partial(np.full_like, fill_value=-1e4)
        elif tiny_models.is_gain(kind):
            plain = np.zeros_like if config["model_type"].startswith("gemma") else np.ones_like
        else:
            continue
        changed = {name: plain(values) if name.endswith(kind) else values for name, values in tensors.items()}
        yield kind, config, changed
    separate = any("q_proj" in name for name in tensors)
    if separate and 1 < config.get("num_key_value_heads", 0) < config["num_attention_heads"]:
        yield "grouping", config, regrouped(config, tensors)


def regrouped(config: Config, tensors: Tensors) -> Tensors:
    """Query heads in another order, their outputs put back: only the key head each one meets differs.

    Of 4 heads and 2 key heads, an engine that pairs 0101 instead of 0011 computes just this.
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    order = np.arange(heads).reshape(groups, -1).T.ravel()
    changed = dict(tensors)
    for name, values in tensors.items():
        if "q_proj" in name:
            changed[name] = values.reshape(heads, -1)[order].reshape(values.shape)
        elif name.endswith("o_proj.weight"):
            by_head = values.reshape(len(values), heads, -1)
            changed[name] = np.ascontiguousarray(by_head[:, order].reshape(values.shape))
    return changed


def without_options(config: Config, tensors: Tensors) -> Iterator[Variant]:
    """The model with one option of its configuration taken out or set to what it usually is."""
    for what, options in option_changes(config):
        yield what, config | options, tensors


def option_changes(config: Config) -> Iterator[tuple[str, Config]]:
    """What to change in the configuration, and which option that takes out."""
    for key in ("hidden_act", "hidden_activation", "activation_function", "activation"):
        if config.get(key, "silu") != "silu":
            yield key, {key: "silu"}
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if config.get(key, 0) > 1e-4:
            yield key, {key: 1e-5}
    for key, neutral in NEUTRAL.items():
        if config.get(key, neutral) != neutral:
            yield key, {key: neutral}
    if not all(config.get("no_rope_layers", ())):
        yield "no_rope_layers", {"no_rope_layers": [1] * config["num_hidden_layers"]}
    if "query_pre_attn_scalar" in config:
        yield "query_pre_attn_scalar", {"query_pre_attn_scalar": config["head_dim"]}
    yield from window_changes(config)
    yield from rope_changes(config)
    yield from expert_changes(config)


def window_changes(config: Config) -> Iterator[tuple[str, Config]]:
    """A window of one key more or fewer; none; the same in every layer."""
    window = config.get("sliding_window")
    if window is None:
        return
    if config.get("use_sliding_window") is False:
        every_layer = ["sliding_attention"] * config["num_hidden_layers"]
        yield "the window turned off", {"use_sliding_window": True, "layer_types": every_layer}
        return
    yield "the exact window, one more", {"sliding_window": window + 1}
    yield "the exact window, one less", {"sliding_window": window - 1}
    layers = config["num_hidden_layers"]
    if "layer_types" not in config and "sliding_window_pattern" in config:
        yield "the pattern of windows", {"sliding_window_pattern": config["sliding_window_pattern"] + 1}
    elif "layer_types" not in config:
        yield "the window", {"sliding_window": None}
    else:
        for kind in ("full_attention", "sliding_attention"):
            yield f"layer types, all {kind}", {"layer_types": [kind] * layers}


def expert_changes(config: Config) -> Iterator[tuple[str, Config]]:
    """One expert per token fewer or more; weights normalised or not; every multiplier 1."""
    if "num_experts_per_tok" in config:
        active = config["num_experts_per_tok"]
        yield "experts per token", {"num_experts_per_tok": active - 1 or 2}
    if config.get("n_group", 1) > 1:
        groups = config["n_group"]
        yield "groups of experts", {"topk_group": groups}
        yield "one group fewer", {"topk_group": config["topk_group"] - 1, "num_experts_per_tok": 2}
    if "norm_topk_prob" in config:
        yield "norm_topk_prob", {"norm_topk_prob": not config["norm_topk_prob"]}
    for name in ("attention", "embedding", "residual"):
        if f"{name}_multiplier" in config:
            yield f"{name}_multiplier", {f"{name}_multiplier": 1.0}
    if "logits_scaling" in config:
        yield "logits_scaling", {"logits_scaling": 1.0}


def rope_changes(config: Config) -> Iterator[tuple[str, Config]]:
    """Another base, no scaling, and no value for each parameter of the scaling that has a default."""
    if "rope_local_base_freq" in config:  # Gemma 3's first configurations
        yield "rope_local_base_freq", {"rope_local_base_freq": config["rope_theta"]}
        yield "linear scaling", {"rope_scaling": None}
        return
    if not config.get("rope_parameters") and "rope_scaling" not in config:
        return
    rope = config.get("rope_parameters") or config["rope_scaling"] | {"rope_theta": config["rope_theta"]}
    if "full_attention" in rope:
        swapped = dict(zip(rope, reversed(rope.values()), strict=True))
        yield "the bases of rope", {"rope_parameters": swapped}
        return
    if rope.get("partial_rotary_factor", 1) != 1:
        whole = {key: rope[key] for key in ("rope_theta",)} | {"rope_type": "default"}
        yield "partial_rotary_factor", {"rope_parameters": whole | {"partial_rotary_factor": 1.0}}
    plain = {"rope_theta": rope["rope_theta"], "rope_type": "default"}
    old_keys = {"rope_scaling": None}
    if rope["rope_theta"] != 10000.0:
        yield "rope_theta", {"rope_parameters": rope | {"rope_theta": 10000.0}, **old_keys}
    kind = rope.get("rope_type", rope.get("type"))
    # Dynamic scaling changes nothing within the context, and a context is all an engine offers.
    if kind not in ("default", "dynamic"):
        yield f"{kind} scaling", {"rope_parameters": plain, **old_keys}
    for parameter in ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"):
        if parameter in rope:
            fewer = {key: value for key, value in rope.items() if key != parameter}
            yield parameter, {"rope_parameters": fewer, **old_keys}


def difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The largest absolute difference."""
    return float(np.abs(a - b).max())


def expect(condition: bool, message: str) -> None:
    """Stop with the message unless the condition holds."""
    if not condition:
        raise SystemExit(f"make_goldens: {message}")


if __name__ == "__main__":
    main()
