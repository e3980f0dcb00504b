"""stub to be written"""

from typing import NamedTuple

import torch

import grpo
import model


class Gap(NamedTuple):
    """Between the sampler's log-probabilities and the update's, before any update."""

    mean: float  # |difference|, nats
    outside: float  # share of the sampled tokens outside the clip range


def enlarge_keys(backbone: model.Backbone, seed: int = 0) -> None:
    """Keys and queries as large as those of published weights, where random ones are near 1."""
    generator = torch.Generator().manual_seed(seed)
    for layer in backbone.net.model.language_model.layers:
        attention = layer.self_attn
        pairs = [(attention.q_proj.bias, 3.5), (attention.k_proj.bias, 80.0)]
        for bias, std in pairs:
            if bias is not None:
                bias.data.copy_(std * torch.randn(bias.shape, generator=generator))
        if attention.k_proj.bias is None:
            attention.k_norm.weight.data.fill_(8.0)


def sampler_gap(backbone, rows, n, new_tokens):
    cfg = grpo.Config()
    out = model.generate(backbone, rows, n, new_tokens, seed=3, stop=[])
    with torch.no_grad():
        logp = grpo.completion_logp(backbone, rows, out["ids"], out["mask"])
    d = logp - out["logp"]
    r = d.exp()
    return Gap(
        d.abs().mean().item(),
        ((r < 1 - cfg.clip_low) | (r > 1 + cfg.clip_high)).float().mean().item(),
    )
