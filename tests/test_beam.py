"""Beam search against transformers' on the golden checkpoints, and against trying everything."""

from dataclasses import replace
from itertools import product

import golden_sessions
import goldens
import pytest
import torch
from golden_sessions import GREEDY

from baichuan.config import SamplingConfig
from baichuan.generation.beam import BeamSearch
from baichuan.hf_model.modeling import load_hf_model

BEAMS = replace(GREEDY, num_beams=4, temperature=1.0, eos_id=2)


@pytest.mark.parametrize("version", goldens.VERSIONS_WITH_GOLDENS)
@pytest.mark.parametrize(("length_penalty", "penalty"), [(1.0, 1.0), (0.3, 1.0), (1.0, 1.2)])
def test_equals_transformers(version, length_penalty, penalty):
    prompts = [goldens.golden(version)[f"ids_{length}"] for length in (7, 33)]
    config = replace(BEAMS, length_penalty=length_penalty, repetition_penalty=penalty)
    session = golden_sessions.session(version)
    ours = [result.ids for result in session.generate([p.tolist() for p in prompts], config, 12)]
    assert ours == [session.generate([p.tolist()], config, 12)[0].ids for p in prompts]
    if penalty == 1.0:  # transformers penalises log probabilities, we penalise logits as in sampling
        peer = load_hf_model(goldens.checkpoint(version), version)
        settings = dict(num_beams=4, max_new_tokens=12, do_sample=False, length_penalty=length_penalty)
        for prompt, ids in zip(prompts, ours, strict=True):
            mask = torch.ones_like(prompt)[None]
            found = peer.generate(prompt[None], attention_mask=mask, eos_token_id=2, pad_token_id=0, **settings)[0]
            assert ids == [token for token in found[len(prompt) :].tolist() if token not in (0, 2)]


def test_wide_beams_find_the_best_of_all_continuations():
    vocab, steps, end = 4, 4, 0
    table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(3)).double()  # next logits by last token
    log_p = table.log_softmax(-1)

    def score(ids):
        return sum(log_p[a, b].item() for a, b in zip((1, *ids), ids, strict=False))

    every = [ids for n in range(1, steps + 1) for ids in product(range(vocab), repeat=n)]
    complete = [ids for ids in every if end not in ids[:-1] and (ids[-1] == end or len(ids) == steps)]
    best, second = sorted({round(score(ids) / len(ids), 6) for ids in complete})[:-3:-1]
    config = SamplingConfig(num_beams=64, top_k=1, temperature=1.0, repetition_penalty=1.0, eos_id=end)
    search = BeamSearch(config, [[1]], steps, keep_logits=False)
    last = [1]
    while (choice := search.choose(table[last].float())) is not None:
        last = choice.tokens.tolist()
    found = search.best()[0]
    ids = (*found.ids, end) if found.finish_reason == "stop" else tuple(found.ids)
    assert ids in complete
    assert found.score == pytest.approx(best, abs=1e-5) == pytest.approx(score(ids) / len(ids), abs=1e-5)
    assert found.score > second + 1e-4


def test_kept_logits_belong_to_the_chosen_path():
    session = golden_sessions.session("v1_7b")
    prompt = goldens.golden("v1_7b")["ids_7"].tolist()
    result = session.generate([prompt], BEAMS, 6, keep_logits=True)[0]
    assert result.logits.shape == (6, 1000)
    again = session.score([prompt + result.ids])[0][len(prompt) - 1 : -1]
    torch.testing.assert_close(result.logits, again, rtol=0, atol=goldens.FLOAT32_TOLERANCE)


def search_of(table: torch.Tensor, config: SamplingConfig, keep_logits: bool) -> list:
    """A search whose next logits follow from the last token alone, over two prompts."""
    search = BeamSearch(config, [[1, 2], [5]], 8, keep_logits)
    last = torch.tensor([2, 5], device=table.device)
    while (choice := search.choose(table[last])) is not None:
        last = choice.tokens
    return search.results()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_waits_once_per_prompt_and_step_on_a_gpu():
    """PyTorch warns of whatever waits: two searches' choices in each of eight steps, and nothing else."""
    config = replace(BEAMS, repetition_penalty=1.3)
    table = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)) * 3
    table[:, config.eos_id] = -100.0  # no beam ends early
    expected = search_of(table, config, keep_logits=True)
    on_gpu = table.cuda()
    found = search_of(on_gpu, config, keep_logits=True)
    assert [each.ids for each in found] == [each.ids for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.logits, theirs.logits)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            search_of(on_gpu, config, keep_logits=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(each.message) for each in waits) <= 2 * 8 + 1  # and the first tokens, by the test
