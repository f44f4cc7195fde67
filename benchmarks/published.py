"""config.json of published models, with the keys that they have, and how many parameters they are known to have."""

from __future__ import annotations

from typing import Any

COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False,
          "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True}
MIXTRAL = {**COMMON, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1,
           "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
           "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
           "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
           "router_aux_loss_coef": 0.02, "sliding_window": None, "vocab_size": 32000}
MISTRAL = {**COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1,
           "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
           "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
           "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000}
QWEN3 = {**COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
         "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
         "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
         "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
         "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
         "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e6,
         "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936}
CODER = {**QWEN3, "hidden_size": 6144, "intermediate_size": 8192, "max_position_embeddings": 262144,
         "max_window_layers": 62, "moe_intermediate_size": 2560, "num_attention_heads": 96, "num_experts": 160,
         "num_hidden_layers": 62, "num_key_value_heads": 8, "rope_theta": 1e7, "qkv_bias": False,
         "shared_expert_intermediate_size": 0, "use_qk_norm": True}
OLMOE = {**COMMON, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False,
         "clip_qkv": None, "eos_token_id": 50279, "hidden_size": 2048, "intermediate_size": 1024,
         "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
         "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False,
         "pad_token_id": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
         "router_aux_loss_coef": 0.01, "vocab_size": 50304}
GPT_OSS = {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
           "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
           "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
           "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
           "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
           "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
           "rms_norm_eps": 1e-5, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                                                  "original_max_position_embeddings": 4096, "rope_type": "yarn",
                                                  "truncate": False},
           "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
           "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True,
           "vocab_size": 201088}
AIR = {**COMMON, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
       "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128, "hidden_size": 4096,
       "intermediate_size": 10944, "max_position_embeddings": 131072, "moe_intermediate_size": 1408, "n_group": 1,
       "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
       "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
       "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_scaling": None,
       "rope_theta": 1000000, "routed_scaling_factor": 1.0, "topk_group": 1, "use_qk_norm": False,
       "vocab_size": 151552}
GLM = {**AIR, "first_k_dense_replace": 3, "hidden_size": 5120, "intermediate_size": 12288,
       "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_hidden_layers": 92, "routed_scaling_factor": 2.5,
       "use_qk_norm": True}
MIXTRAL_8X22B = {**MIXTRAL, "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
                 "num_attention_heads": 48, "num_hidden_layers": 56, "router_jitter_noise": 0.0, "vocab_size": 32768}
MISTRAL_3 = {**MISTRAL, "sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768}
GPT_OSS_120B = {**GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128,
                "layer_types": ["sliding_attention", "full_attention"] * 18}
NEXT = {**COMMON, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "attention_bias": False,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4,
        "head_dim": 256, "hidden_size": 2048, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
        "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "use_sliding_window": False,
        "vocab_size": 151936}
QWEN35 = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "image_token_id": 248056,
    "video_token_id": 248057, "vision_start_token_id": 248053, "vision_end_token_id": 248054,
    "tie_word_embeddings": False, "vision_config": {"model_type": "qwen3_5_moe", "depth": 27, "hidden_size": 1152},
    "text_config": {
        "model_type": "qwen3_5_moe_text", "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
        "dtype": "bfloat16", "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
        "mlp_only_layers": [], "moe_intermediate_size": 512, "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False, "num_attention_heads": 16, "num_experts": 256,
        "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "use_cache": True,
        "vocab_size": 248320, "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
            "rope_theta": 10000000, "rope_type": "default"}}}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA_4 = {"architectures": ["Gemma4ForConditionalGeneration"], "audio_config": None, "boa_token_id": 256000,
           "boi_token_id": 255999, "dtype": "bfloat16", "eoa_token_id": 258883, "eoa_token_index": 258883,
           "eoi_token_id": 258882, "eos_token_id": [1, 106], "image_token_id": 258880, "audio_token_id": 258881,
           "initializer_range": 0.02, "model_type": "gemma4", "text_config": {
               "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": True, "bos_token_id": 2,
               "dtype": "bfloat16", "enable_moe_block": True, "eos_token_id": 1, "final_logit_softcapping": 30.0,
               "global_head_dim": 512, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2816,
               "hidden_size_per_layer_input": 0, "initializer_range": 0.02, "intermediate_size": 2112,
               "layer_types": [*[SLIDING] * 5, FULL] * 5, "max_position_embeddings": 262144,
               "model_type": "gemma4_text", "moe_intermediate_size": 704, "num_attention_heads": 16,
               "num_experts": 128, "num_global_key_value_heads": 2, "num_hidden_layers": 30, "num_key_value_heads": 8,
               "num_kv_shared_layers": 0, "pad_token_id": 0, "rms_norm_eps": 1e-6, "rope_parameters": {
                   FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
                   SLIDING: {"rope_theta": 1e4, "rope_type": "default"}},
               "sliding_window": 1024, "tie_word_embeddings": True, "top_k_experts": 8,
               "use_bidirectional_attention": "vision", "use_cache": True, "use_double_wide_mlp": False,
               "vocab_size": 262144, "vocab_size_per_layer_input": 262144},
           "tie_word_embeddings": True, "transformers_version": "5.5.0", "video_token_id": 258884,
           "vision_config": {"model_type": "gemma4_vision"}, "vision_soft_tokens_per_image": 280}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Mixtral 8x7B": (MIXTRAL, 46_702_792_704),
    "Mixtral 8x22B v0.3": (MIXTRAL_8X22B, 140_630_071_296),
    "Mistral 7B v0.1": (MISTRAL, 7_241_732_096),
    "Mistral 7B v0.3": (MISTRAL_3, 7_248_023_552),
    "Qwen3 30B-A3B": (QWEN3, 30_532_122_624),
    "Qwen3-Coder 480B-A35B": (CODER, 480_154_875_392),
    "OLMoE 1B-7B": (OLMOE, 6_919_161_856),
    "gpt-oss 20b": (GPT_OSS, 20_914_757_184),
    "gpt-oss 120b": (GPT_OSS_120B, 116_829_156_672),
    "GLM-4.5-Air": (AIR, 106_852_251_264),
    "GLM-4.5": (GLM, 352_797_829_024),
    "Qwen3-Next 80B-A3B": (NEXT, 79_674_391_296),
    "Qwen3.5, 3.6 35B-A3B": (QWEN35, 34_660_610_688),
    "Gemma 4 26B-A4B": (GEMMA_4, 25_233_141_790),  # without its towers
}
