"""Latent attention: deepseek_v2, deepseek_v3 (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Of a token only its latent c [R] and one rotated key k_r [r] for all heads are kept; head h has the key
[k_r, Uk_h c] and the value Uv_h c. A score is q_r . k_r + q_n . Uk_h c = q_r . k_r + (Uk_h^T q_n) . c, and a
weighted sum of values is Uv_h applied to one of latents. So every head meets the same key [k_r, c] and value
c: attention is that of one key/value head with wide heads (section 2.1.2), in prefill as in decoding, whose
bits are then the same. The scale of the scores is in the weights.
"""

from dataclasses import replace

from edgert.model.builder import Builder
from edgert.model.compression import columns
from edgert.state import Rows


def heads(b: Builder, index: int, x: Rows) -> Rows:
    """The outputs of all heads, side by side, for the input x."""
    name, spec, own = f"layers.{index}", b.spec, b.compression
    if spec.query_latent:
        b.linear(f"{name}.q_down", x, own.query, last=False)
    b.linear(f"{name}.kv_down", x, own.latent, last=False)
    b.linear(f"{name}.k_rope", x, b.k, last=True)
    b.latent_norm(f"{name}.kv_down_norm", own.latent, b.v, spec.latent)
    b.latent_norm(f"{name}.kv_down_norm", own.latent, replace(b.k, at=b.k.at + spec.rotary), spec.latent)
    if spec.query_latent:
        x = b.latent_norm(f"{name}.q_down_norm", own.query, own.query, spec.query_latent)
    _queries(b, name, x)
    b.heads(index)
    return _values(b, name, b.attend(index))


def _queries(b: Builder, name: str, x: Rows) -> None:
    """q[h] = [q_r, Uk_h^T q_n]."""
    spec, own = b.spec, b.compression
    whole = replace(own.plain[0], quantized=-1)
    rotated = [replace(b.q, at=b.q.at + h * spec.head_dim) for h in range(spec.heads)]
    b.linear(f"{name}.q_plain", x, whole, last=False)
    b.linear_by_head(f"{name}.q_rope", [x] * spec.heads, rotated)
    for h, plain in enumerate(own.plain):
        b.quantize(plain, last=h + 1 == spec.heads)
    b.linear_by_head(f"{name}.k_up", own.plain, [replace(q, at=q.at + spec.rotary) for q in rotated])


def _values(b: Builder, name: str, mixed: Rows) -> Rows:
    """Uv_h of each head's sum of latents."""
    spec, own = b.spec, b.compression
    sums = columns(mixed, b.config.chunk, spec.heads, spec.latent)
    for h, latents in enumerate(sums):
        b.quantize(latents, last=h + 1 == spec.heads)
    outputs = [replace(own.values, at=own.values.at + h * spec.value_dim) for h in range(spec.heads)]
    b.linear_by_head(f"{name}.v_up", sums, outputs)
    return b.quantize(own.values)
