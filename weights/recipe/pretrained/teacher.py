"""A frozen Qwen2 or Llama model in PyTorch, layer by layer: what indexers and heads learn from.

The residual stream is float32 and what the matrices see bfloat16 (`dtype`): in float16 massive
activations overflow.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class View(NamedTuple):
    """What one attention layer works on.

    Args:
        x (Tensor): normalised hidden state without the norm's weight `[L, dim]`, float32.
        queries (Tensor): rotated `[Hq, L, D]`.
        keys, values (Tensor): rotated keys and values `[Hkv, L, D]`.
        scale (float): factor of the logits.
    """

    x: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float


def rotate(x, positions, theta, dims=None):
    """Apply RoPE in half-split pairs to the first `dims` dims of `[..., L, D]`, in float32."""
    dims = dims or x.shape[-1]
    frequencies = theta ** (-torch.arange(0, dims, 2, device=x.device, dtype=torch.float32) / dims)
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    head, rest = x[..., :dims].float(), x[..., dims:]
    a, b = head.chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


class Teacher:
    """The model of a folder that mlx_lm.load reads.

    Args:
        folder (str): with config.json and model.safetensors.
        device (str), dtype (torch.dtype): where and in what the matrices compute.
        layers (int): keep only the first so many, for a rehearsal. Default: all.
    """

    def __init__(self, folder, device="cuda", dtype=torch.bfloat16, layers=None):
        config = json.loads((Path(folder) / "config.json").read_text())
        if config["model_type"] not in ("qwen2", "llama"):
            raise ValueError(f"[Teacher] no {config['model_type']} here.")
        self.device, self.dtype = torch.device(device), dtype
        self.dim = config["hidden_size"]
        self.n_layers = layers or config["num_hidden_layers"]
        self.n_heads, self.n_kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or self.dim // self.n_heads
        self.theta, self.eps = config["rope_theta"], config["rms_norm_eps"]
        self.w = {}
        for name, value in load_file(str(Path(folder) / "model.safetensors")).items():
            kind = torch.float32 if "norm" in name else dtype
            self.w[name.removeprefix("model.")] = value.to(self.device, kind)

    def embed(self, tokens):
        """Return the first hidden state `[L, dim]`, float32."""
        return F.embedding(tokens, self.w["embed_tokens.weight"]).float()

    def normalise(self, h):
        """Return the state without the norm's weight, float32."""
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)

    def project(self, layer, x, positions):
        """Return queries, keys and values of the unweighted state `x` of a layer."""
        x = (x * self.w[f"layers.{layer}.input_layernorm.weight"]).to(self.dtype)
        shaped = []
        for name, heads in (("q", self.n_heads), ("k", self.n_kv), ("v", self.n_kv)):
            out = self._linear(f"layers.{layer}.self_attn.{name}_proj", x)
            out = out.view(len(x), heads, self.head_dim).transpose(0, 1)
            shaped.append(out if name == "v" else rotate(out, positions, self.theta))
        return shaped

    def finish(self, layer, h, attended):
        """Add attention `[Hq, L, D]` and the MLP to the residual stream."""
        out = attended.transpose(0, 1).reshape(len(h), -1)
        h = h + self._linear(f"layers.{layer}.self_attn.o_proj", out).float()
        x = self.normalise(h) * self.w[f"layers.{layer}.post_attention_layernorm.weight"]
        x, mlp = x.to(self.dtype), f"layers.{layer}.mlp"
        inner = F.silu(self._linear(f"{mlp}.gate_proj", x)) * self._linear(f"{mlp}.up_proj", x)
        return h + self._linear(f"{mlp}.down_proj", inner).float()

    def output_norms(self, layer, values):
        """Return the norm of what each head adds for a value, `[Hq, L]`, of values `[Hkv, L, D]`."""
        w = self.w[f"layers.{layer}.self_attn.o_proj.weight"].float()
        w = w.view(self.dim, self.n_heads, self.head_dim).permute(1, 2, 0)
        gram = (w @ w.transpose(1, 2)).view(self.n_kv, -1, self.head_dim, self.head_dim)
        return ((values[:, None] @ gram) * values[:, None]).sum(-1).clamp_min(0).sqrt().flatten(0, 1)

    def logits(self, h):
        """Return logits `[L, V]` in float32."""
        x = (self.normalise(h) * self.w["norm.weight"]).to(self.dtype)
        return (x @ self.w.get("lm_head.weight", self.w["embed_tokens.weight"]).T).float()

    def views(self, tokens):
        """Run the model densely; yield each layer's view, with the attention's log-sum-exp.

        Args:
            tokens (Tensor): `[L]`.

        Yields:
            tuple: number, View, the log of the sum of the exponentials of each query's logits
            `[Hq, L]`, float32, and the residual stream `[L, dim]`. At the end that is in `self.last`.
        """
        h = self.embed(tokens)
        positions = torch.arange(len(tokens), device=self.device)
        scale = self.head_dim**-0.5
        for layer in range(self.n_layers):
            x = self.normalise(h)
            queries, keys, values = self.project(layer, x, positions)
            attended, lse = attend(queries, keys, values, scale)
            yield layer, View(x, queries, keys, values, scale), lse, h
            h = self.finish(layer, h, attended)
        self.last = h

    def _linear(self, name, x):
        bias = self.w.get(f"{name}.bias")
        return F.linear(x, self.w[f"{name}.weight"], bias)


def attend(queries, keys, values, scale):
    """Causal attention `[Hq, L, D]` and its log-sum-exp `[Hq, L]`."""
    groups = queries.shape[0] // keys.shape[0]
    keys, values = (a.repeat_interleave(groups, dim=0) for a in (keys, values))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if queries.is_cuda:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = kernel(queries[None], keys[None], values[None], 0.0, True, scale=scale)[:2]
    return out[0], lse[0]
