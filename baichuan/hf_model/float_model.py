"""The model in float32 without transformers: what a finished engine is compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from baichuan.config import ModelConfig
from baichuan.hf_model.loading import read_all, read_weights, with_weights
from baichuan.hf_model.network import Network
from baichuan.weights.source import Checkpoint


class FloatModel(Network, nn.Module):
    """The network alone."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.build(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits after each token of sequences without padding.

        input_ids: [batch, length] int64 -> [batch, length, vocab_size] float32
        """
        return self.lm_head(self.states(self.model.embed_tokens(input_ids))[-1])


def load_float_model(
    folder: Path, model_version: str | None, device: torch.device, adapters: tuple[Path, ...] = ()
) -> FloatModel:
    """The checkpoint in `folder`, read and refused as by loading.read_weights."""
    model, weights = read_weights(folder, model_version, "float32", device, adapters)
    return with_weights(lambda: FloatModel(model), weights)


def float_model_of(model: ModelConfig, checkpoint: Checkpoint) -> FloatModel:
    """The model with the checkpoint's weights, by the hub's names, on the device that it reads them to."""
    return with_weights(lambda: FloatModel(model), read_all(checkpoint, torch.float32))
