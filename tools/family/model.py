"""The family in torch: a lean decoder whose weights carry their Hugging Face names.

transformers' own modules compute the same (`train.py export` compares them) and train at half the speed on a
CPU. One class serves the dense models (Llama layout) and the mixture of experts (Mixtral layout).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

BOS, EOS = 1, 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Model dimensions; the standard letters are in the comments."""

    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # K
    ffn: int  # F, of one expert where there are experts
    experts: int = 0  # 0: dense
    active: int = 0  # experts per token
    act: str = "silu"
    vocab: int = 4096  # V
    head_dim: int = 32  # d
    context: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-5

    def hf_config(self) -> dict[str, object]:
        """The ``config.json`` from which transformers builds the same model."""
        common = {
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "head_dim": self.head_dim,
            "hidden_act": self.act,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.context,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "vocab_size": self.vocab,
        }
        if self.experts:
            return common | {
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "num_experts_per_tok": self.active,
                "num_local_experts": self.experts,
                "sliding_window": None,
            }
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "mlp_bias": False,
            "model_type": "llama",
            "rope_scaling": None,
        }


TARGET = Shape(width=192, layers=8, heads=6, kv_heads=3, ffn=704)
DRAFT = Shape(width=64, layers=3, heads=2, kv_heads=1, ffn=160)
MOE = Shape(width=96, layers=4, heads=3, kv_heads=3, ffn=64, experts=16, active=2)


class Norm(nn.Module):
    """RMSNorm with a gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """The torch protocol."""
        return functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and shared key heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, size = shape, shape.head_dim
        self.q_proj = nn.Linear(shape.width, shape.heads * size, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(shape.heads * size, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The torch protocol."""

        def heads(y: Tensor) -> Tensor:  # B T H*d -> B H T d
            return y.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

        def turned(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return (y * cos + torch.cat([-b, a], -1) * sin).to(y.dtype)

        q, k, v = turned(heads(self.q_proj(x))), turned(heads(self.k_proj(x))), heads(self.v_proj(x))
        shared = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Dense(nn.Module):
    """The gated feed-forward network; `gated` keeps act(gate), which the sparsity push looks at."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.act = {"silu": functional.silu, "relu": functional.relu}[shape.act]
        self.gate_proj = nn.Linear(shape.width, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The torch protocol."""
        gated = self.act(self.gate_proj(x))
        return self.down_proj(gated * self.up_proj(x)), gated


class Experts(nn.Module):
    """Mixtral's block. Every expert computes every token, and those not chosen weigh zero.

    At this size that is faster than sorting tokens, and the gradients are the same.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.width, shape.experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(shape.experts * shape.ffn, shape.width))
        self.w3 = nn.Parameter(torch.empty(shape.experts * shape.ffn, shape.width))
        self.w2 = nn.Parameter(torch.empty(shape.width, shape.experts * shape.ffn))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and Switch's balance loss (arXiv:2101.03961, equation 4): 1 when even."""
        scores = functional.softmax(self.gate(x).float(), -1)  # B T E
        top, chosen = scores.topk(self.shape.active, -1)
        share = top / top.sum(-1, keepdim=True)
        weights = torch.zeros_like(scores).scatter(-1, chosen, share)
        used = (weights > 0).float().mean((0, 1)) / self.shape.active
        balance = (used * scores.mean((0, 1))).sum() * self.shape.experts
        inner = functional.silu(functional.linear(x, self.w1)) * functional.linear(x, self.w3)
        inner = inner.unflatten(-1, (self.shape.experts, -1)) * weights[..., None].to(inner.dtype)
        return functional.linear(inner.flatten(-2), self.w2), balance


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.width, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.width, shape.eps)
        self.mlp = Experts(shape) if shape.experts else Dense(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The torch protocol."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y, watched = self.mlp(self.post_attention_layernorm(x))
        return x + y, watched


class Decoder(nn.Module):
    """The model; `watched` of its forward is act(gate) of each layer, or the balance loss of each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width, shape.eps)
        frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.context), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Unit-gain matrices; those that write to the residual stream are damped by the number of
        writers, so that depth does not grow its variance."""
        for name, w in self.named_parameters():
            if w.ndim == 1:
                continue
            if "embed" in name:
                w.normal_(std=0.05)
                continue
            inputs = self.shape.ffn if name.endswith(".w2") else w.shape[1]
            writers = (
                2 * self.shape.layers if name.endswith(("o_proj.weight", "down_proj.weight", ".w2")) else 1
            )
            w.normal_(std=(inputs * writers) ** -0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B T V) after each of ids (B T), and what each layer watched."""
        x, watched = self.embed_tokens(ids), []
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x, seen = layer(x, cos, sin)
            watched.append(seen)
        return functional.linear(self.norm(x), self.embed_tokens.weight), watched

    def hf_weights(self) -> dict[str, Tensor]:
        """The weights under the names and shapes that transformers loads."""
        result = {}
        for name, w in self.named_parameters():
            full = f"model.{name}".replace(".mlp.", ".block_sparse_moe." if self.shape.experts else ".mlp.")
            kind = full.rpartition(".")[2]
            if kind not in ("w1", "w2", "w3"):
                result[full] = w
                continue
            parts = (
                w.unflatten(1, (self.shape.experts, -1)).unbind(1)
                if kind == "w2"
                else w.chunk(self.shape.experts)
            )
            for expert, part in enumerate(parts):
                result[full.replace(f".{kind}", f".experts.{expert}.{kind}.weight")] = part
        return {name: w.detach().contiguous() for name, w in result.items()}
