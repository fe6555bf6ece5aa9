"""What a model is and how it is run: frozen dataclasses, no behaviour beyond validation.

Letters used for shapes throughout: T tokens (rows), D model width, H query heads,
K key/value heads, d head size, F feed-forward width, E experts, V vocabulary, L layers, G groups of 32.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from edgert.errors import OptionError

Quant = Literal["f32", "f16", "q8", "q4m", "q4", "q4s", "q3", "q2"]
QUANTS: tuple[Quant, ...] = ("f32", "f16", "q8", "q4m", "q4", "q4s", "q3", "q2")
"""The most precise first."""
KvType = Literal["f16", "q8", "q4"]
KV_TYPES: tuple[KvType, ...] = ("f16", "q8", "q4")
Activation = Literal["silu", "relu", "relu2", "gelu_tanh", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "relu", "relu2", "gelu_tanh", "gelu")
Block = Literal["pre", "post", "around", "parallel"]
BLOCKS: tuple[Block, ...] = ("pre", "post", "around", "parallel")
"""Where a layer has its norms: before attention and feed-forward, behind each, both, or before both at
once, which then run side by side. Each has its file in edgert/model/."""
GLOBAL_ROPE, LOCAL_ROPE, NO_ROPE = range(3)
"""Which rotary frequencies a layer takes, for ModelSpec.ropes."""


QKV, OUT, UP, DOWN = range(4)
"""Places where a layer's products meet their inputs: q, k and v; o; gate and up; down."""
LEFT_OUT = 1e30
"""As the threshold of down's inputs: all of them are zero, so that the feed-forward need not be computed."""
MOST_RANK = 1 << 14
"""Of a predictor: far more than one that is worth its reading has."""

_OF_EXPERTS = (
    *("experts", "active_experts", "expert_width"),
    *("shared_width", "open_shared", "normalized_routing", "sigmoid_routing", "dense_layers"),
    *("routing_groups", "active_groups", "expert_biases", "swiglu_alpha", "swiglu_limit"),
)
_OF_LATENTS = ("latent", "query_latent", "plain_dim", "value_dim")
_OF_BLOCKS = (
    *("joint_qk_norm", "block", "shared_norm", "layer_norm", "norm_bias", "plain_ffn", "rotary", "ropes"),
    *("learned_positions", "alibi", "attention_cap", "logit_cap"),
)
_SPECIAL = (
    *("part", "exits", "neurons", "predictors", "core", "sinks", "outliers"),
    *(*_OF_EXPERTS, *_OF_BLOCKS, *_OF_LATENTS),
)
"""Fields of ModelSpec that most files leave out, so that an older edgert still reads those."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about a decoder that is not a weight. Stored as JSON in the file."""

    architecture: str  # the Hugging Face model_type: "llama", "mistral", ...
    layers: int  # L
    width: int  # D
    heads: int  # H
    kv_heads: int  # K, divides H
    head_dim: int  # d, even; not always D / H
    ffn_width: int  # F
    vocab: int  # V
    context: int  # positions the model was made for
    norm_eps: float
    activation: Activation = "silu"
    tied_embeddings: bool = False  # the output matrix is the token embedding
    qkv_bias: bool = False
    output_bias: bool = False  # a bias on the attention output projection
    ffn_bias: bool = False  # biases on gate, up and down
    qk_norm: bool = False  # RMSNorm over each head of q and k before RoPE
    windows: tuple[int, ...] = ()  # per layer: keys visible, 0 for all; () for all zeros
    rope_theta: float = 10000.0  # informative: the frequencies themselves are a tensor
    rope_scaling: str = "default"  # informative
    rope_magnitude: float = 1.0  # multiplies cos and sin (YaRN's attention factor)
    joint_qk_norm: bool = False  # RMSNorm over all heads of q, and of k, together before RoPE
    experts: int = 0  # E, in every layer but the dense ones; 0: no layer has experts
    active_experts: int = 0  # experts per token
    expert_width: int = 0  # F of one expert
    shared_width: int = 0  # F of the expert that every token takes, behind a sigmoid; 0: there is none
    open_shared: bool = False  # that expert is added as it is, without a sigmoid
    normalized_routing: bool = False  # the weights of a token's experts are divided by their sum
    sigmoid_routing: bool = False  # scores are sigmoids, chosen by their sum with a bias; else a softmax
    routing_groups: int = 0  # equal parts of the experts; 0: none
    active_groups: int = 0  # of them, in which a token's experts are
    expert_biases: bool = False  # on the router and on the three matrices of every expert
    swiglu_alpha: float = 0.0  # of experts whose gate is clamped (kernels/activation.py, clamped_gate)
    swiglu_limit: float = 0.0  # of these; 0: they have act(gate) * up
    dense_layers: tuple[int, ...] = ()  # of a model with experts: layers with a feed-forward instead
    neurons: bool = False  # up and down lie neuron by neuron, so that only those that fire are read
    predictors: tuple[int, ...] = ()  # of neurons: per layer the rank of what foretells them; 0, (): none
    core: float = 0.0  # of neurons: the share that a prompt leaves to what follows it; 0: all
    outliers: int = 0  # columns of every matrix of a layer that are stored apart, more precisely
    block: Block = "pre"  # where the norms of a layer are
    shared_norm: bool = False  # of a parallel block: one norm for attention and feed-forward
    layer_norm: bool = False  # LayerNorm instead of RMSNorm, but not in q and k
    norm_bias: bool = False  # biases on all norms but those of q and k
    plain_ffn: bool = False  # down(act(up(x))), without a gate
    rotary: int = 0  # dimensions of each head that are rotated, even; 0 for all
    ropes: tuple[int, ...] = ()  # per layer: GLOBAL_ROPE, LOCAL_ROPE or NO_ROPE; () for all GLOBAL_ROPE
    learned_positions: bool = False  # a vector for each of `context` positions is added to the embedding
    alibi: bool = False  # scores lose a slope of their head times the distance
    sinks: bool = False  # each head has a score more, of a key that nobody holds
    # Keys and values of all heads are made of one latent, [latent], which is what the cache holds beside one
    # rotated key for all; head_dim is rotary + latent, kv_heads 1 (model/latent.py). 0: they are not.
    latent: int = 0
    query_latent: int = 0  # queries are made of one, too, of this width; 0: of the layer's input
    plain_dim: int = 0  # dimensions of a head that are not rotated, before they meet the latent
    value_dim: int = 0  # dimensions of a head's output
    attention_cap: float = 0.0  # scores become cap tanh(score / cap); 0: they do not
    logit_cap: float = 0.0  # the same of the logits
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    part: tuple[int, ...] = ()  # of a split model: the layers [first, last) this file holds; () for all
    exits: tuple[int, ...] = ()  # layers after which an exit head sits, ascending: (3, 5) of 8

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; those for special files only where they say something."""
        usual = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if k not in _SPECIAL or v != usual[k]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelSpec":
        """The inverse of `to_json`; raises TypeError or ValueError on anything unexpected."""
        known = {f.name for f in fields(cls)}
        extra = set(values) - known
        if extra:
            raise ValueError(f"unknown fields {sorted(extra)}")
        given = dict(values)
        for name in ("windows", "eos_ids", "part", "exits", "dense_layers", "ropes", "predictors"):
            if name in given:
                given[name] = tuple(given[name])
        return cls(**given)

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "head_dim", "ffn_width", "vocab", "context"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 1 << 31:
                raise ValueError(f"{name} is {value!r}, expected a positive whole number")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads is {self.heads}, not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, expected one of {ACTIVATIONS}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.layers} layers")
        if any(type(w) is not int or w < 0 for w in self.windows):
            raise ValueError(f"windows is {self.windows!r}, expected whole numbers >= 0")
        if self.part and not (
            len(self.part) == 2
            and all(type(end) is int for end in self.part)
            and 0 <= self.part[0] < self.part[1] <= self.layers
        ):
            raise ValueError(f"part is {self.part!r}, expected the first layer and the end of a range")
        if any(type(k) is not int or not 0 < k < self.layers for k in self.exits):
            raise ValueError(f"exits is {self.exits!r}, expected whole numbers from 1 to {self.layers - 1}")
        if list(self.exits) != sorted(set(self.exits)):
            raise ValueError(f"exits is {self.exits!r}, expected ascending numbers")
        numbers = ("norm_eps", "rope_theta", "rope_magnitude", "attention_cap", "logit_cap")
        for name in (*numbers, "swiglu_alpha", "swiglu_limit"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1e38:
                raise ValueError(f"{name} is {value!r}, expected a number >= 0")
        flags = ("tied_embeddings", "qkv_bias", "output_bias", "ffn_bias", "shared_norm", "layer_norm")
        more = ("norm_bias", "plain_ffn", "learned_positions", "alibi", "neurons", "sinks", "open_shared")
        routing = ("normalized_routing", "sigmoid_routing", "expert_biases")
        for name in (*flags, *more, *routing, "qk_norm", "joint_qk_norm"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected true or false")
        if self.qk_norm and self.joint_qk_norm:
            raise ValueError("qk_norm and joint_qk_norm are both true, expected at most one")
        self._check_block()
        self._check_latents()
        self._check_experts()
        if self.neurons and (self.ffn_bias or self.experts or self.plain_ffn or self.block != "pre"):
            raise ValueError("neurons is true in a model with ffn_bias or another block, expected false")
        self._check_predictors()
        self._check_outliers()
        ids = self.eos_ids if self.bos_id is None else (*self.eos_ids, self.bos_id)
        if any(type(i) is not int or not 0 <= i < self.vocab for i in ids):
            raise ValueError(f"bos_id and eos_ids are {ids}, expected ids below vocab {self.vocab}")

    def _check_predictors(self) -> None:
        ranks = self.predictors
        if ranks and not self.neurons:
            raise ValueError(f"predictors is {ranks!r} in a model without neurons, expected none")
        if ranks and (len(ranks) != self.layers or not any(ranks)):
            raise ValueError(f"predictors is {ranks!r} for {self.layers} layers, expected a rank for each")
        if any(type(r) is not int or not 0 <= r <= MOST_RANK or r % 32 for r in ranks):
            raise ValueError(f"predictors is {ranks!r}, expected multiples of 32 up to {MOST_RANK}")
        if type(self.core) not in (int, float) or not 0 <= self.core < 1:
            raise ValueError(f"core is {self.core!r}, expected a share from 0 and below 1")
        if self.core and (ranks or not self.neurons):
            raise ValueError(f"core is {self.core} with predictors or without neurons, expected 0")

    def predictor(self, layer: int) -> int:
        """The rank of a layer's predictor; 0 where it has none."""
        return self.predictors[layer] if self.predictors else 0

    def gate_rows(self, layer: int) -> bool:
        """Whether the gate of a layer is stored row by row, as not all of it may be read."""
        return self.core > 0 or self.predictor(layer) > 0

    @property
    def first_layer(self) -> int:
        """The first layer that this file holds: 0, or where the cloud half of a split model starts."""
        return self.part[0] if self.part else 0

    @property
    def last_layer(self) -> int:
        """The layer behind the last that this file holds: L, or where the edge half ends."""
        return self.part[1] if self.part else self.layers

    @property
    def held_exits(self) -> tuple[int, ...]:
        """The exits whose heads this file holds: those of its layers."""
        return tuple(k for k in self.exits if self.first_layer < k <= self.last_layer)

    @property
    def rotated(self) -> int:
        """Dimensions of a head that a layer with rope rotates."""
        return self.rotary or self.head_dim

    def rope(self, layer: int) -> int:
        """GLOBAL_ROPE, LOCAL_ROPE or NO_ROPE."""
        return self.ropes[layer] if self.ropes else GLOBAL_ROPE

    @property
    def ropes_used(self) -> tuple[int, ...]:
        """Which of GLOBAL_ROPE and LOCAL_ROPE some layer takes."""
        return tuple(rope for rope in (GLOBAL_ROPE, LOCAL_ROPE) if rope in (self.ropes or (GLOBAL_ROPE,)))

    def _check_block(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(f"block is {self.block!r}, expected one of {BLOCKS}")
        if self.shared_norm and self.block != "parallel":
            raise ValueError(f"shared_norm is true in a {self.block} block, expected a parallel one")
        if type(self.rotary) is not int or not 0 <= self.rotary <= self.head_dim or self.rotary % 2:
            raise ValueError(f"rotary is {self.rotary!r}, expected an even number up to {self.head_dim}")
        if self.ropes and len(self.ropes) != self.layers:
            raise ValueError(f"ropes has {len(self.ropes)} entries for {self.layers} layers")
        if any(type(rope) is not int or not GLOBAL_ROPE <= rope <= NO_ROPE for rope in self.ropes):
            raise ValueError(f"ropes is {self.ropes!r}, expected {GLOBAL_ROPE} to {NO_ROPE}")
        if self.exits and (self.layer_norm or self.logit_cap):
            raise ValueError("exits in a model with LayerNorm or capped logits, expected none")

    def _check_latents(self) -> None:
        for name in _OF_LATENTS:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 1 << 31:
                raise ValueError(f"{name} is {value!r}, expected a whole number >= 0")
        if not self.latent:
            if self.query_latent or self.plain_dim or self.value_dim:
                raise ValueError(f"latent is 0, expected a number above 0, or none of {_OF_LATENTS}")
            return
        # Parts of matrices and of quantised rows are taken by head: whole blocks of 16, whole groups of 32.
        for name, unit in (("latent", 32), ("plain_dim", 32), ("value_dim", 16), ("rotary", 16)):
            value = getattr(self, name)
            if not value or value % unit:
                raise ValueError(f"{name} is {value}, expected a multiple of {unit} in a model with a latent")
        if self.kv_heads != 1 or self.head_dim != self.rotary + self.latent:
            raise ValueError(
                f"kv_heads is {self.kv_heads} and head_dim {self.head_dim} in a model with a latent, "
                f"expected 1 and {self.rotary + self.latent}"
            )
        if self.qkv_bias or self.qk_norm or self.joint_qk_norm or self.alibi:
            raise ValueError("a model with a latent has qkv_bias, norms of q and k or alibi, expected none")

    def _check_outliers(self) -> None:
        most = min(self.width, self.heads * self.head_dim, self.ffn_width)
        if type(self.outliers) is not int or self.outliers % 32 or not 0 <= self.outliers <= most:
            raise ValueError(f"outliers is {self.outliers!r}, expected a multiple of 32 up to {most}")
        if self.outliers and (self.neurons or self.experts or self.latent or self.block != "pre"):
            raise ValueError("outliers in a model with neurons, experts or another block, expected none")

    def _check_experts(self) -> None:
        whole = ("experts", "active_experts", "expert_width", "shared_width")
        for name in (*whole, "routing_groups", "active_groups"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 1 << 31:
                raise ValueError(f"{name} is {value!r}, expected a whole number >= 0")
        if not self.experts:
            if any(getattr(self, name) for name in _OF_EXPERTS):
                raise ValueError(f"experts is 0, expected a number above 0, or none of {_OF_EXPERTS}")
            return
        if not 0 < self.active_experts <= self.experts:
            raise ValueError(f"active_experts is {self.active_experts}, expected 1 to {self.experts}")
        if not self.expert_width:
            raise ValueError("expert_width is 0, expected a positive whole number")
        if bool(self.swiglu_alpha) != bool(self.swiglu_limit):
            raise ValueError("one of swiglu_alpha and swiglu_limit is 0, expected both or neither")
        if self.swiglu_limit and (self.shared_width or self.dense_layers or self.activation != "silu"):
            raise ValueError("a clamped gate in a model with other feed-forwards than experts, expected none")
        if self.open_shared and not self.shared_width:
            raise ValueError("open_shared is true without a shared_width, expected one")
        self._check_groups()
        if self.ffn_bias:
            raise ValueError("ffn_bias is true in a model with experts, expected false")
        if self.plain_ffn or self.block != "pre":
            raise ValueError("experts in a block without gates or with other norms, expected neither")
        layers = self.dense_layers
        if any(type(i) is not int or not 0 <= i < self.layers for i in layers) or sorted(set(layers)) != [
            *layers
        ]:
            raise ValueError(f"dense_layers is {layers!r}, expected layers in ascending order")

    def _check_groups(self) -> None:
        groups, active = self.routing_groups, self.active_groups
        if not groups:
            if active:
                raise ValueError(f"active_groups is {active} without routing_groups, expected 0")
            return
        size = self.experts // groups
        if self.experts % groups or not 0 < active <= groups or size <= self.sigmoid_routing:
            raise ValueError(
                f"{active} of {groups} groups of {self.experts} experts, expected some of equal parts"
            )
        if active * size < self.active_experts:
            raise ValueError(
                f"active_experts is {self.active_experts}, but {active} groups hold {active * size} experts"
            )

    @property
    def value_width(self) -> int:
        """Dimensions of what the cache holds as a value."""
        return self.latent or self.head_dim

    @property
    def has_dense_layers(self) -> bool:
        """Whether any layer has a feed-forward that every token takes alone."""
        return not self.experts or len(self.dense_layers) > 0

    def has_experts(self, layer: int) -> bool:
        """Whether this layer routes its tokens to experts."""
        return self.experts > 0 and layer not in self.dense_layers

    def window(self, layer: int) -> int:
        """Keys visible in this layer, counting the token itself; 0 for all."""
        return self.windows[layer] if self.windows else 0


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Which precision each kind of tensor is stored in. Vectors are always f32."""

    matrices: Quant = "q4"
    embedding: Quant = "q4"  # also the output matrix when the two are tied
    each: Mapping[str, Quant] = field(default_factory=dict)  # of single tensors by name, before the two above


@dataclass(frozen=True, slots=True)
class Tiling:
    """How matrix products are cut. It changes the speed and no bit of a result."""

    most: int = 8  # rows of the largest tile: 1, 2, 4 or 8
    ahead: int = 64  # (block, group) records prefetched ahead by a tile of 4 or more rows
    unit_bytes: int = 1 << 16  # weights in one unit of work: 2 us at 30 GB/s, far above the cost of
    # taking a unit and far below a layer's time, so that threads finish together

    def unit_blocks(self, block_bytes: int) -> int:
        """Blocks of 16 rows in one unit."""
        return max(1, self.unit_bytes // block_bytes)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is executed on one machine."""

    threads: int
    context: int  # positions the KV cache holds
    chunk: int  # rows of one prefill pass
    kv: KvType = "f16"
    sequences: int = 1  # how many the KV cache holds, each of `context` positions
    tiling: Tiling = Tiling()
    thresholds: tuple[float, ...] = ()  # per layer: activations below it are zero; () for none
    inputs: tuple[tuple[float, ...], ...] = ()  # per layer and place: inputs below it are zero; () for none
    # Gates of neurons that the file's predictors take for silent, or that are not in the core, are not read.
    predict: bool = False
    exact: bool = False  # thresholds, predictors and cores are for drafts alone
    slots: int = 0  # experts, or neurons, held in memory while the others stay in the file; 0: all, mapped


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Names and defaults follow the field (vLLM, llama.cpp)."""

    max_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int | None = None  # None: from the operating system
    stop: tuple[str, ...] = field(default=())
    logprobs: int = 0  # how many top log-probabilities to report per token

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens >= 0, ">= 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number >= 0"),
            ("top_k", self.top_k >= 0, ">= 0 (0: off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "> 0 (1: off)"),
            ("presence_penalty", -100 <= self.presence_penalty <= 100, "between -100 and 100"),
            ("logprobs", 0 <= self.logprobs <= 100, "between 0 and 100"),
        )
        for name, good, expected in checks:
            if not good:
                raise OptionError(f"{name} is {getattr(self, name)!r}; expected {expected}")
        if any(not s for s in self.stop):
            raise OptionError("stop holds an empty string; expected texts of at least one character")
