"""A zoo of tiny decoders: one architecture of transformers each, built and run in a fraction of a second.

One generic shrinker sets what a configuration has of the common names; `PECULIAR` holds what an architecture needs
besides. Weights are drawn with a standard deviation of 0.1, so that attention is far from uniform, and everything that
a model initialises to a neutral value and that bears on attention (biases, learned sinks) is drawn as well: a proof on
weights that do nothing could not fail. Norms are drawn for the same reason: keys normalised by a plain norm are all of
one length, and a policy that goes by length would choose by rounding errors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

VOCABULARY = 96
PAD = 0
WINDOW = 8
"""Sliding windows and chunks are shorter than every prompt of the proofs, so that dropping one shows."""

TWELVE = (
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "smollm3",
    "cohere2",
    "llama4_text",
    "deepseek_v3",
    "falcon_h1",
)

OTHERS = tuple(
    """
    afmoe apertus arcee aria_text axk1 bailing_hybrid bamba bart beam bert biogpt bitnet cohere cohere2_moe ctrl cwm
    deepseek_v2 diffllama dots1 electra ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma3n_text
    gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt_bigcode gpt_neox granite granite_swa
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe
    hy_v3 hyperclovax jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 longcat_flash mellum
    mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mixtral modernbert-decoder
    nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next roberta seed_oss solar_open stablelm starcoder2 vaultgemma
    xlm-roberta youtu zamba zamba2 zaya
    """.split()
)
"""Decoders that route through the attention interface in transformers 5.23; earlier versions know fewer."""

UNROUTED = tuple(
    """
    bloom codegen falcon falcon_mamba gpt_neo gpt_neox_japanese gptj mamba mamba2 mpt openai-gpt rwkv xglm
    """.split()
)
"""Models that accept an attention name and never call the function behind it."""

REFUSED: dict[str, str] = {
    "axk2": "caches in",  # keys of an indexer, beside its own
    "deepseek_v32": "caches in",
    "deepseek_v4": "caches in",  # compressed keys
    "doge": "(?i)mask",  # computes on the drawn mask
    "glm_moe_dsa": "caches in",
    "hy_v4": "caches in",
    "inkling2_text": "position_bias",
    "inkling_text": "position_bias",
    "moshi": "window",  # its window exists only as transformers' sliding cache layer, not in its mask
}
"""Models that reach the attention interface and need more than it says: what the refusal must name."""

REFUSED_PLANS = {("deepseek_v3", "duoattention"): "latent"}
"""One latent serves all heads of a layer, so heads cannot keep different entries."""

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "initializer_std": 0.1,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    # windows and chunks
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    # recurrent layers of hybrids
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

SLIDE, FULL, CHUNK, LINEAR = "sliding_attention", "full_attention", "chunked_attention", "linear_attention"
LOCAL_GLOBAL = {"layer_types": [SLIDE, FULL, SLIDE]}
HYBRID = {"layer_types": [LINEAR, FULL, LINEAR]}
LATENT = {"num_key_value_heads": 4}
"""Latent attention expands its keys to every query head."""

PECULIAR: dict[str, dict[str, Any]] = {
    # the twelve
    "gemma2": {**LOCAL_GLOBAL, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5, "initializer_range": 0.3},
    "gemma3_text": {**LOCAL_GLOBAL, "query_pre_attn_scalar": 5},
    "gpt_oss": LOCAL_GLOBAL,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "cohere2": {**LOCAL_GLOBAL, "initializer_range": 0.2, "logit_scale": 1.0},
    "llama4_text": {
        "layer_types": [CHUNK, FULL, CHUNK],
        "no_rope_layers": [1, 0, 1],
        "moe_layers": [1],
        "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1,
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "num_hidden_layers": 2},
    # local and global layers
    "afmoe": LOCAL_GLOBAL,
    "beam": LOCAL_GLOBAL,
    "cohere2_moe": LOCAL_GLOBAL,
    "cwm": LOCAL_GLOBAL,
    "exaone4": LOCAL_GLOBAL,
    "exaone_moe": LOCAL_GLOBAL,
    "gemma3n_text": {
        **LOCAL_GLOBAL,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        **LOCAL_GLOBAL,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    # its own rounding, float32 against float64, is about 1e-5 of the largest logit at three layers
    "gemma4_unified_text": {"layer_types": [SLIDE, FULL], "num_hidden_layers": 2},
    "granite_swa": LOCAL_GLOBAL,
    "granitemoe_swa": LOCAL_GLOBAL,
    "laguna": {**LOCAL_GLOBAL, "num_attention_heads_per_layer": [4, 4, 4]},
    "mellum": LOCAL_GLOBAL,
    "mimo_v2_flash": LOCAL_GLOBAL,
    "ministral": {**LOCAL_GLOBAL, "head_dim": 8},
    "modernbert-decoder": {**LOCAL_GLOBAL, "local_attention": 2 * WINDOW},
    "olmo3": LOCAL_GLOBAL,
    "vaultgemma": {**LOCAL_GLOBAL, "attn_logit_softcapping": 2.0},
    # latent attention
    "bailing_hybrid": {**HYBRID, "linear_num_heads": 4, "linear_head_dim": 8},
    "kimi_linear": {**HYBRID, "linear_num_heads": 4, "linear_head_dim": 8},
    "longcat_flash": {
        "head_dim": 4,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 2,
    },
    # hybrids with recurrent layers
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", FULL, "conv"]},
    "lfm2_moe": {"layer_types": ["conv", FULL, "conv"]},
    "lfm3": {"layer_types": ["conv", FULL, SLIDE]},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "olmo_hybrid": HYBRID,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": HYBRID,
    "recurrent_gemma": {"attention_window_size": WINDOW, "lru_width": 32},
    "zamba": {
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "num_query_groups": 4,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
        "adapter_rank": 4,
    },
    # others
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "electra": {"is_decoder": True},
    "xlm-roberta": {"is_decoder": True},
    "bart": {"decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32},
    "hrm_text": {"num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    # what transformers cannot route
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": WINDOW},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
}


def known(names: tuple[str, ...] = TWELVE + OTHERS) -> list[str]:
    """Those of `names` that the installed transformers has."""
    return [name for name in names if name in CONFIG_MAPPING]


def config_of(name: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of one architecture (a `model_type` of transformers)."""
    cls = CONFIG_MAPPING[name]
    default = cls()
    common = dict(COMMON)
    if getattr(default, "kv_lora_rank", None) is not None:
        common |= LATENT
        del common["head_dim"]
    names = {getattr(default, "attribute_map", {}).get(key, key): value for key, value in common.items()}
    held = vars(default)
    settings = {k: v for k, v in names.items() if k in held and (held[k] is not None or k.endswith("_token_id"))}
    return cls(**{**settings, **PECULIAR.get(name, {}), **overrides})


def build(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The tiny model of one architecture, in eval mode, fp32, with eager attention."""
    config = config_of(name, **overrides)
    torch.manual_seed(seed)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith(("bias", "sinks")):
                nn.init.normal_(weight, std=0.5 if path.endswith("sinks") else 0.1)
            elif weight.ndim == 1 and "norm" in path:  # or normalised keys would all be of one length
                weight.add_(torch.randn_like(weight), alpha=0.3)
    return model.eval()
