"""From a training checkpoint to an ordinary Hugging Face folder: bf16 safetensors, config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from models.experts import routers_of
from models.families import Recipe
from models.loop import allocate, attach, build, restore
from models.seq2seq import training
from models.seq2seq.rows import with_sentinels
from models.tokenizer import load_tokenizer


def load_trained(recipe: Recipe, checkpoint: Path) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """The model of a checkpoint in fp32, and the training history that led to it."""
    shared = allocate(recipe, num_ranks=1)
    _, history = restore(checkpoint, shared)
    model = build(recipe)
    attach(model, shared, rank=0)
    return model, history


def export(recipe: Recipe, checkpoint: Path, work: Path, folder: Path) -> list[dict[str, float]]:
    """Write `folder` so that transformers loads it by itself; returns the training history for the card."""
    model, history = load_trained(recipe, checkpoint)
    biases = [router.e_score_correction_bias for router in routers_of(model) if recipe.bias_rate]
    model = model.to(torch.bfloat16)
    for router, bias in zip(routers_of(model), biases, strict=False):
        router.e_score_correction_bias = bias.float()  # as in DeepSeek-V3's own checkpoints
    model = training.published(model) if model.config.is_encoder_decoder else model
    model.config._experts_implementation = None
    model.config._attn_implementation = None
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        do_sample=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # written readable by the owner alone
    tokenizer = (with_sentinels if model.config.is_encoder_decoder else load_tokenizer)(work)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return history


def untrained(recipe: Recipe) -> PreTrainedModel:
    """The model before its first step, to compare routers with."""
    model = build(recipe)
    return training.published(model) if model.config.is_encoder_decoder else model
