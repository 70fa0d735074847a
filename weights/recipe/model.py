"""Qwen3 in PyTorch, for training: one block is two compiled pieces around the attention."""

import torch
import torch.nn as nn
import torch.nn.functional as nnf
from torch.nn.attention import SDPBackend, sdpa_kernel

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 4096,
    "rope_theta": 100000.0,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "float16",
}


def norm(x, weight):
    return nnf.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), 1e-6)


def linear(x, weight):
    return nnf.linear(x, weight.to(x.dtype))


def rotate(x, cos, sin):
    """Apply RoPE to [N, heads, head_dim] in float32; half-split pairs."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# Pure functions of tensors: one compiled graph of each serves all layers.
def before_attention(x, cos, sin, weight, wq, wk, wv, q_norm, k_norm):
    n, hd = x.shape[0], q_norm.shape[0]
    x = norm(x, weight)
    q = norm(linear(x, wq).view(n, -1, hd), q_norm)
    k = norm(linear(x, wk).view(n, -1, hd), k_norm)
    return rotate(q, cos, sin), rotate(k, cos, sin), linear(x, wv).view(n, -1, hd)


def after_attention(x, attended, wo, weight, w_gate, w_up, w_down):
    x = x + linear(attended, wo)
    y = norm(x, weight)
    return x + linear(nnf.silu(linear(y, w_gate)) * linear(y, w_up), w_down)


def token_losses(x, weight, embedding, targets):
    logits = linear(norm(x, weight), embedding).float()
    return nnf.cross_entropy(logits, targets, reduction="none")


class Block(nn.Module):
    """One decoder layer; parameters carry the names of the HF checkpoint."""

    def __init__(self, c):
        super().__init__()
        d, h, kv, hd, f = (c[k] for k in (
            "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"))  # fmt: skip

        def matrix(rows, cols, zero=False):
            return nn.Parameter(torch.zeros(rows, cols) if zero else torch.randn(rows, cols) * 0.6 * cols**-0.5)

        self.q_proj, self.k_proj, self.v_proj = matrix(h * hd, d), matrix(kv * hd, d), matrix(kv * hd, d)
        self.o_proj = matrix(d, h * hd, zero=True)
        self.gate_proj, self.up_proj, self.down_proj = matrix(f, d), matrix(f, d), matrix(d, f, zero=True)
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(hd)), nn.Parameter(torch.ones(hd))
        self.input_layernorm = nn.Parameter(torch.ones(d))
        self.post_attention_layernorm = nn.Parameter(torch.ones(d))


def attend(q, k, v, length):
    """Causal attention within rows of `length`; q, k, v are [N, heads, head_dim]."""
    q, k, v = (t.view(-1, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    # On a Hopper card cuDNN's attention is 1.6 times as fast as PyTorch's own at 9216 tokens.
    fast = SDPBackend.CUDNN_ATTENTION if length > 2048 else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(fast if q.is_cuda else SDPBackend.MATH):
        out = nnf.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])


class Model(nn.Module):
    """Tokens are flat, [N]: N is constant, so that one compiled graph serves every row length."""

    def __init__(self, c=CONFIG, compiled=True):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Parameter(torch.randn(c["vocab_size"], c["hidden_size"]) * 0.02)
        self.norm = nn.Parameter(torch.ones(c["hidden_size"]))
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        wrap = torch.compile(dynamic=False) if compiled else (lambda f: f)
        self.before, self.after, self.head = wrap(before_attention), wrap(after_attention), wrap(token_losses)
        self.dtype = torch.bfloat16

    def hidden(self, tokens, length):
        x = nnf.embedding(tokens, self.embed_tokens).to(self.dtype)
        half = self.c["head_dim"] // 2
        steps = torch.arange(half, device=tokens.device, dtype=torch.float32)
        position = torch.arange(length, device=tokens.device, dtype=torch.float32)
        angle = position[:, None] * self.c["rope_theta"] ** (-steps / half)[None]
        rows = tokens.shape[0] // length
        cos, sin = (t.repeat(rows, 1)[:, None] for t in (angle.cos(), angle.sin()))
        for a in self.layers:
            q, k, v = self.before(x, cos, sin, a.input_layernorm, a.q_proj, a.k_proj, a.v_proj, a.q_norm, a.k_norm)
            x = self.after(
                x, attend(q, k, v, length), a.o_proj, a.post_attention_layernorm, a.gate_proj, a.up_proj, a.down_proj
            )
        return x

    def forward(self, tokens, targets, length):
        """Return the loss of each token, [N] float32."""
        return self.head(self.hidden(tokens, length), self.norm, self.embed_tokens, targets)

    def predict(self, tokens, length):
        """Return the likeliest next token at each place, [N]."""
        with torch.no_grad():
            x = norm(self.hidden(tokens, length), self.norm)
            return torch.cat([linear(part, self.embed_tokens).argmax(-1) for part in x.split(16384)])


def hf_name(name):
    """Translate a parameter's name to that of the HF checkpoint."""
    if name.startswith("layers."):
        head, index, rest = name.split(".", 2)
        group = "self_attn." if rest.startswith(("q_", "k_", "v_", "o_")) else "mlp." if "_proj" in rest else ""
        return f"model.layers.{index}.{group}{rest}.weight"
    return f"model.{name}.weight"
