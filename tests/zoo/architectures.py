"""Tiny models of many architectures, randomly initialised: nothing is downloaded.

Each has hidden sizes of 64 and two layers, so that a check takes seconds. The point is their
spelling: where the weights live, and by which operators they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plain
import torch
from torch import nn

VOCAB, LENGTH, BATCH = 97, 12, 2
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One model of the zoo.

    Attributes:
        name: its key in the table.
        kind: the group it is listed under.
        build: makes the model, with random weights.
        inputs: makes its inputs.
        generates: whether ``generate()`` is checked, too.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    generates: bool = False

    def make(self) -> tuple[nn.Module, Inputs]:
        """A model in eval mode and inputs for it; the same on every call."""
        torch.manual_seed(7)
        return self.build().eval(), self.inputs()


def text() -> Inputs:
    return {"input_ids": torch.randint(3, VOCAB, (BATCH, LENGTH))}


def text_pair() -> Inputs:
    return {**text(), "decoder_input_ids": torch.randint(3, VOCAB, (BATCH, 7))}


def image() -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


def image_and_text() -> Inputs:
    return {**text(), **image()}


def waveform() -> Inputs:
    return {"input_values": torch.randn(BATCH, 800)}


def speech() -> Inputs:
    ids = torch.randint(3, VOCAB, (BATCH, 5))
    return {"input_features": torch.randn(BATCH, 16, 40), "decoder_input_ids": ids}


def _build(model: str, config: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        # The fused kernels of some models are optional packages; without them they are plain torch.
        made = getattr(transformers, config)(**settings)
        built: nn.Module = getattr(transformers, model)(made)
        return built

    return build


COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
GPT2_LIKE = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "tie_word_embeddings": False}
SOUND = {
    **COMMON,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
TEXT_TOWER = {k: v for k, v in COMMON.items() if k not in ("pad_token_id",)}
TWO_TOWERS = {"text_config": TEXT_TOWER, "vision_config": VISION, "projection_dim": 64}

# kind → name → (model, configuration, settings)
_TRANSFORMERS: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "encoder": {
        "bert": ("BertModel", "BertConfig", COMMON),
        "roberta": ("RobertaModel", "RobertaConfig", COMMON),
        "electra": ("ElectraModel", "ElectraConfig", {**COMMON, "embedding_size": 32}),
        "albert": ("AlbertModel", "AlbertConfig", {**COMMON, "embedding_size": 32}),
        "deberta-v2": (
            "DebertaV2Model",
            "DebertaV2Config",
            {**COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ),
        "mpnet": ("MPNetModel", "MPNetConfig", COMMON),
        "distilbert": (
            "DistilBertModel",
            "DistilBertConfig",
            {"vocab_size": VOCAB, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
        ),
        "modernbert": (
            "ModernBertModel",
            "ModernBertConfig",
            {**COMMON, "cls_token_id": 1, "sep_token_id": 2},
        ),
        "roformer": ("RoFormerModel", "RoFormerConfig", COMMON),
        "squeezebert": ("SqueezeBertModel", "SqueezeBertConfig", {**COMMON, "embedding_size": 64}),
        "esm": ("EsmModel", "EsmConfig", {**COMMON, "mask_token_id": 4}),
    },
    "decoder": {
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2_LIKE),
        "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT2_LIKE, "rotary_dim": 8}),
        "gpt-neo": (
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            {**COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        ),
        "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", COMMON),
        "gpt-bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2_LIKE),
        "opt": (
            "OPTForCausalLM",
            "OPTConfig",
            {**COMMON, "ffn_dim": 128, "word_embed_proj_dim": 64},
        ),
        "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
        "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
        "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 16}),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 16}),
        "phi": ("PhiForCausalLM", "PhiConfig", COMMON),
        "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
        "falcon": ("FalconForCausalLM", "FalconConfig", COMMON),
        "bloom": ("BloomForCausalLM", "BloomConfig", {**COMMON, "n_layer": 2, "n_head": 4}),
        "mpt": (
            "MptForCausalLM",
            "MptConfig",
            {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        ),
        "stablelm": ("StableLmForCausalLM", "StableLmConfig", GROUPED),
        "olmo": ("OlmoForCausalLM", "OlmoConfig", GROUPED),
        "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
        "cohere": ("CohereForCausalLM", "CohereConfig", GROUPED),
        "granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED),
        "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    },
    "encoder-decoder": {
        "t5": (
            "T5ForConditionalGeneration",
            "T5Config",
            {
                "vocab_size": VOCAB,
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 128,
                "num_layers": 2,
                "num_heads": 4,
                "decoder_start_token_id": 0,
            },
        ),
        "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
        "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", SEQ2SEQ),
        "marian": ("MarianMTModel", "MarianConfig", SEQ2SEQ),
        "m2m-100": ("M2M100ForConditionalGeneration", "M2M100Config", SEQ2SEQ),
    },
    "mixture of experts": {
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**EXPERTS, "num_local_experts": 4}),
        "qwen2-moe": (
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            {
                **EXPERTS,
                "num_experts": 4,
                "moe_intermediate_size": 64,
                "shared_expert_intermediate_size": 128,
            },
        ),
        "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**EXPERTS, "num_experts": 4}),
        "granite-moe": (
            "GraniteMoeForCausalLM",
            "GraniteMoeConfig",
            {**EXPERTS, "num_local_experts": 4},
        ),
    },
    "state space": {
        "mamba": ("MambaForCausalLM", "MambaConfig", {**COMMON, "state_size": 8}),
        "mamba2": (
            "Mamba2ForCausalLM",
            "Mamba2Config",
            {**COMMON, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
        ),
        "rwkv": ("RwkvModel", "RwkvConfig", {**COMMON, "attention_hidden_size": 64}),
    },
    "vision": {
        "vit": ("ViTModel", "ViTConfig", VISION),
        "deit": ("DeiTModel", "DeiTConfig", VISION),
        "beit": ("BeitModel", "BeitConfig", VISION),
        "dinov2": ("Dinov2Model", "Dinov2Config", VISION),
        "siglip-vision": ("SiglipVisionModel", "SiglipVisionConfig", VISION),
        "swin": (
            "SwinModel",
            "SwinConfig",
            {
                "image_size": 32,
                "patch_size": 4,
                "embed_dim": 32,
                "depths": [1, 1],
                "num_heads": [2, 4],
                "window_size": 4,
            },
        ),
        "convnext": (
            "ConvNextModel",
            "ConvNextConfig",
            {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        ),
        "segformer": (
            "SegformerModel",
            "SegformerConfig",
            {
                "num_encoder_blocks": 2,
                "depths": [1, 1],
                "sr_ratios": [2, 1],
                "hidden_sizes": [32, 64],
                "patch_sizes": [7, 3],
                "strides": [4, 2],
                "num_attention_heads": [2, 4],
                "mlp_ratios": [2, 2],
            },
        ),
    },
    "audio": {
        "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", SOUND),
        "hubert": ("HubertModel", "HubertConfig", SOUND),
        "whisper": (
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            {
                **SEQ2SEQ,
                "num_mel_bins": 16,
                "max_source_positions": 20,
                "max_target_positions": 32,
                "suppress_tokens": None,
                "begin_suppress_tokens": None,
            },
        ),
    },
    "multimodal": {
        "clip": ("CLIPModel", "CLIPConfig", TWO_TOWERS),
        "siglip": ("SiglipModel", "SiglipConfig", TWO_TOWERS),
        "vilt": ("ViltModel", "ViltConfig", {**COMMON, **VISION}),
        "git": ("GitForCausalLM", "GitConfig", {**COMMON, "vision_config": VISION}),
    },
}


def _uncached(inputs: Callable[[], Inputs]) -> Callable[[], Inputs]:
    """Without the cache of keys and values, which ``torch.export`` cannot return."""
    return lambda: {**inputs(), "use_cache": False}


_KIND_INPUTS: dict[str, Callable[[], Inputs]] = {
    "encoder": text,
    "decoder": text,
    "encoder-decoder": text_pair,
    "mixture of experts": text,
    "state space": text,
    "vision": image,
    "audio": waveform,
    "multimodal": image_and_text,
}
_GENERATING = {"decoder", "encoder-decoder", "mixture of experts"}


def _all() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {}
    for kind, models in _TRANSFORMERS.items():
        for name, (model, config, settings) in models.items():
            inputs = speech if name == "whisper" else _KIND_INPUTS[kind]
            generates = kind in _GENERATING or name in ("mamba", "mamba2", "whisper")
            if generates:
                inputs = _uncached(inputs)
            build = _build(model, config, settings)
            found[name] = Architecture(name, kind, build, inputs, generates)
    for name, (build, inputs) in plain.MODELS.items():
        found[name] = Architecture(name, "plain torch", build, inputs)
    return found


ARCHITECTURES: dict[str, Architecture] = _all()
