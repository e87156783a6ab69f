"""Dummy weights: seeded, the same in any blocks, and a model of them computes something."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from baichuan.config import PRESETS, VERSIONS
from baichuan.hf_model.modeling import BaichuanConfig, BaichuanForCausalLM
from baichuan.weights.dummy import POOL_SIZE, dummy_checkpoint
from baichuan.weights.shard import hub_shapes

SIZES = dict(hidden_size=256, num_layers=6, num_heads=8, intermediate_size=688, vocab_size=1000)
CONFIG = replace(PRESETS["v1_7b"], **SIZES)


def whole(checkpoint, name: str) -> torch.Tensor:
    return checkpoint[name].read(0, checkpoint[name].shape[0])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_released_models_tensors_are_there(version):
    found = dummy_checkpoint(PRESETS[version])
    assert {name: source.shape for name, source in found.items()} == hub_shapes(PRESETS[version])
    assert {source.dtype for source in found.values()} == {torch.float16}


def test_rows_are_the_same_in_any_blocks_and_around_the_pool():
    config = replace(CONFIG, hidden_size=128, vocab_size=300_000)  # the embedding is 2.3 pools long
    source = dummy_checkpoint(config)["model.embed_tokens.weight"]
    rows = source.read(0, 300_000)
    assert rows.shape == (300_000, 128) and rows.numel() > 2 * POOL_SIZE
    for start, stop in ((0, 1), (7, 7), (70_001, 210_000), (131_000, 140_000), (299_999, 300_000)):
        assert source.read(start, stop).equal(rows[start:stop])
    assert rows[: POOL_SIZE // 128 + 1].unique(dim=0).shape[0] == POOL_SIZE // 128 + 1  # no row comes twice in a round


def test_the_seed_and_the_name_decide():
    first, again, other = dummy_checkpoint(CONFIG), dummy_checkpoint(CONFIG), dummy_checkpoint(CONFIG, seed=1)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert whole(first, name).equal(whole(again, name))
    assert not whole(first, name).equal(whole(other, name))
    assert not whole(first, name).equal(whole(first, name.replace("gate", "up")))


def test_a_lower_precision_is_the_rounded_float32():
    single, half = (dummy_checkpoint(replace(CONFIG, dtype=dtype)) for dtype in ("float32", "float16"))
    for name in single:
        assert whole(half, name).equal(whole(single, name).half())


def test_reading_copies_nothing_within_the_pool():
    source = dummy_checkpoint(CONFIG)["model.layers.0.self_attn.o_proj.weight"]
    assert source.read(0, 4).untyped_storage().data_ptr() == source.read(100, 200).untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_are_finite_of_order_one_and_vary(version, dtype):
    config = replace(CONFIG, model_version=version, dtype=dtype)
    checkpoint = dummy_checkpoint(config)
    model = BaichuanForCausalLM(BaichuanConfig.of(config)).to(getattr(torch, dtype)).eval()
    model.load_state_dict({name: whole(checkpoint, name) for name in checkpoint})
    tokens = torch.randint(1000, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    for states in output.hidden_states:
        assert 0.5 < states.float().std() < 3  # from the embedding's 1, each layer adds 1/6 of the variance at most
    logits = output.logits.float()
    assert logits.isfinite().all() and 0.5 < logits.std() < 2
    assert logits.argmax(-1).unique().numel() > 20  # different tokens at 96 positions
    assert logits.std(dim=1).mean() > 0.5  # from position to position
