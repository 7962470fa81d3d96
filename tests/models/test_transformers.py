"""Hugging Face's architectures, tiny, from configurations: converted, fused, folded, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.models.architectures import walk

#: Sizes by the names that configurations have for them; nothing drops values.
_TINY: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim":
    32, "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "hidden_dim": 48, "d_ff": 48, "n_inner": 48, "num_hidden_layers": 2, "n_layer": 2,
    "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads":
    4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "d_kv": 8, "max_position_embeddings": 64, "n_positions": 64, "image_size":
    32, "patch_size": 8, "embedding_size": 32, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 1, "hidden_dropout_prob":
    0.0, "attention_probs_dropout_prob": 0.0, "dropout": 0.0, "attention_dropout": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "activation_dropout": 0.0,
    "hidden_dropout": 0.0, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "classifier_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "apply_spec_augment": False, "use_cache": False, "drop_path_rate": 0.0,
}  # fmt: skip

#: How many norms of a model type are converted. Those with 0 have a norm that is no formula of
#: ours: without a mean in its layer norm (cohere), quantized (ibert), without statistics
#: (mobilebert), in float32 alone (olmo).
QUICK = {
    "albert": 3, "bart": 12, "beit": 5, "bert": 5, "bloom": 6, "biogpt": 5,
    "blenderbot": 12, "deberta": 5, "deberta-v2": 5, "deit": 5, "distilbert": 5, "dinov2": 5,
    "electra": 5, "ernie": 5, "flaubert": 5, "fnet": 5, "gemma": 5, "gemma2": 9, "gemma3_text":
    13, "glm": 5, "gpt2": 5, "gpt_neox": 5, "granite": 5, "ibert": 0, "layoutlm": 5, "llama": 5,
    "longt5": 12, "mamba": 3, "marian": 10, "mistral": 5, "mobilebert": 0, "mpnet": 5, "mpt": 5,
    "mvp": 12, "nystromformer": 5, "olmo": 0, "olmo2": 9, "opt": 5, "pegasus": 12, "persimmon":
    9, "phi": 3, "phi3": 5, "qwen2": 5, "qwen3": 9, "rembert": 5, "roberta": 5, "roformer": 5,
    "rwkv": 6, "smollm3": 5, "stablelm": 5, "starcoder2": 5,
    "switch_transformers": 12, "t5": 12, "umt5": 12, "vit": 5, "vit_msn": 5, "vitdet": 4, "xlm":
    5, "xlm-roberta": 5, "dpt": 5, "cohere": 0, "exaone4": 9, "ernie4_5": 5, "lfm2": 9, "ctrl":
    5,
}  # fmt: skip
SLOW = {
    "cvt": 68, "focalnet": 29, "glpn": 30, "hiera": 49, "led": 12, "longformer": 5,
    "mobilenet_v1": 27, "mobilenet_v2": 52, "mobilevit": 53, "poolformer": 24, "pvt": 27,
    "pvt_v2": 30, "regnet": 71, "swiftformer": 25, "wav2vec2": 7, "segformer": 16,
    "yolos": 5, "hubert": 7,
    "wavlm": 7,
}  # fmt: skip


def tiny(kind: str) -> torch.nn.Module:
    """A model of that type with random weights; nothing is downloaded."""
    default = transformers.AutoConfig.for_model(kind)
    sizes = {
        name: value
        for name, value in _TINY.items()
        if isinstance(getattr(default, name, None), (int, float))
    }
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model: torch.nn.Module = transformers.AutoModel.from_config(config)
    return model


def inputs(model: Any) -> dict[str, Tensor]:
    """What goes in, by the model's name for it."""
    name = model.main_input_name
    if name == "pixel_values":
        size = model.config.image_size if hasattr(model.config, "image_size") else 64
        size = max(32, size if isinstance(size, int) else size[0])
        return {name: torch.randn(2, 3, size, size, dtype=torch.float64)}
    if name == "input_values":
        return {name: torch.randn(2, 1600, dtype=torch.float64)}
    tokens = torch.arange(2 * 11).view(2, 11) % 60 + 3
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]}
    return {"input_ids": tokens}


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_model_types(kind: str) -> None:
    torch.manual_seed(0)
    model = tiny(kind)
    seen = walk(model, inputs(model))
    assert len(seen.converted.changed) == (QUICK | SLOW)[kind], str(seen.converted)
