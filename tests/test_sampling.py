"""The next token against transformers' logits processors and plain distributions."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baichuan.config import SamplingConfig
from baichuan.generation.sampling import Sampler, draw, numbered_seeds, penalise
from baichuan.text.settings import SAMPLING_DEFAULTS

VOCAB = 50


@pytest.fixture
def logits():
    return torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def test_the_penalty_is_transformers(logits):
    history = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(4, VOCAB, dtype=torch.bool).scatter_(1, history, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(history, logits.clone())
    torch.testing.assert_close(penalise(logits, seen, 1.3), expected, rtol=0, atol=0)
    assert not torch.equal(penalise(logits, ~seen, 1.3), expected)


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(5, 0.85, 0.3), (0, 0.5, 1.0), (7, 0, 1.5), (0, 1, 0.7)])
def test_tokens_are_drawn_from_transformers_distribution(logits, top_k, top_p, temperature):
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if 0 < top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)
    count = 4001
    draws = (torch.arange(count) + 0.5) / count  # evenly spread: frequencies are exact to one draw at each border
    for row in range(4):
        nucleus = top_p if 0 < top_p < 1 else 2.0
        tokens = draw(logits[row].expand(count, -1) / temperature, top_k, nucleus, draws)
        frequencies = tokens.bincount(minlength=VOCAB) / count
        assert (frequencies - expected[row]).abs().max() <= 2 / count
    wrong = draw(logits[0].expand(count, -1), 3, 2.0, draws).bincount(minlength=VOCAB) / count
    assert (wrong - expected[0]).abs().max() > 0.01


def test_the_extremes_of_a_draw_stay_inside(logits):
    for value in (0.0, 1 - 2**-24):
        tokens = draw(logits, 5, 0.85, torch.full((4,), value))
        assert all(token in row.topk(5).indices for token, row in zip(tokens, logits, strict=True))


def sample(config, prompts, logits, steps=30):
    """config: one for all, or one a prompt"""
    configs = config if isinstance(config, list) else numbered_seeds(config, len(prompts))
    sampler = Sampler.of(configs, prompts, VOCAB, steps, "cpu")
    return torch.stack([sampler(logits) for _ in range(steps)], 1)


def test_draws_depend_on_the_seed_and_the_row_alone(logits):
    config = replace(SAMPLING_DEFAULTS["v1_13b"], random_seed=7, temperature=2.0)
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    together = sample(config, prompts, logits)
    assert torch.equal(together, sample(config, prompts, logits))
    assert torch.equal(together[:2], sample(config, prompts[:2], logits[:2]))
    assert not torch.equal(together, sample(replace(config, random_seed=8), prompts, logits))


def test_sequences_of_different_settings_draw_as_if_alone(logits):
    greedy = SamplingConfig(top_k=1, repetition_penalty=1.5)
    hot = SamplingConfig(top_k=0, top_p=0.0, temperature=3.0, repetition_penalty=1.0, random_seed=5)
    configs = [hot, greedy, replace(hot, random_seed=6), replace(hot, temperature=0.5)]
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    together = sample(configs, prompts, logits)
    for row in range(4):
        alone = sample([configs[row]], [prompts[row]], logits[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)
    assert len(set(map(tuple, together.tolist()))) == 4


def test_greedy_takes_the_likeliest_and_the_penalty_sees_what_was_made(logits):
    greedy = SamplingConfig(top_k=1, repetition_penalty=1.0)
    assert torch.equal(sample(greedy, [[0]] * 4, logits, 2), logits.argmax(-1)[:, None].expand(-1, 2))
    penalised = sample(replace(greedy, repetition_penalty=50.0), [[0]] * 4, logits, 5)
    assert all(len(set(row.tolist())) == 5 for row in penalised)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", SAMPLING_DEFAULTS.values(), ids=SAMPLING_DEFAULTS)
def test_the_host_waits_for_no_draw_on_a_gpu(logits, config):
    """A GPU that the host waits for has nothing to do afterwards.  PyTorch raises at whatever waits."""
    sampler = Sampler.of([config] * 4, [[1, 2], [3], [4, 5, 6], [7]], VOCAB, 9, "cuda")
    logits = logits.cuda()
    sampler(logits)  # compiles, and sends the settings to the GPU
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            tokens = sampler(logits)
        with pytest.raises(RuntimeError, match="synchronizing"):
            tokens.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")
