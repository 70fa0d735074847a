"""Small random models of every family: one row each."""

from builders import VOCAB, build_model

COMMON = dict(
    hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=VOCAB, rope_theta=10_000.0,
    max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True,
    decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip
LINEAR = dict(
    num_hidden_layers=4, full_attention_interval=2, head_dim=32, linear_num_value_heads=4,
    linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_conv_kernel_dim=4, partial_rotary_factor=0.5, shared_expert_intermediate_size=32,
    attention_bias=False,
)  # fmt: skip
PLAIN_ROPE = dict(type="default", rope_theta=10_000.0, partial_rotary_factor=0.25)
SCALED = dict(rope_type="llama3", factor=4.0, original_max_position_embeddings=64)

# name -> model_type and what its config has besides.
FAMILIES = {
    "qwen3": ("qwen3", dict(head_dim=32)),
    "qwen3_moe": ("qwen3_moe", dict(head_dim=32, **EXPERTS)),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", dict(rope_scaling=SCALED)),
    "llama-untied": ("llama", dict(tie_word_embeddings=False, attention_bias=True, head_dim=32)),
    "mistral": ("mistral", dict(num_key_value_heads=1)),
    "qwen3_next": ("qwen3_next", {**EXPERTS, **LINEAR}),
    "qwen3_5": ("qwen3_5", {**LINEAR, "rope_parameters": PLAIN_ROPE}),
    "qwen3_5_moe": ("qwen3_5_moe", {**EXPERTS, **LINEAR, "rope_parameters": PLAIN_ROPE}),
}


def family_model(name, seed=0, **changes):
    """Build a random model of a family, in eval mode."""
    model_type, own = FAMILIES[name]
    return build_model({"model_type": model_type, **COMMON, **own, **changes}, seed=seed)
