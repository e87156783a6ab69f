"""The transformers model equals the original code, with and without cache, padding and beams."""

from __future__ import annotations

import ast
import copy
from dataclasses import replace
from pathlib import Path

import goldens
import pytest
import torch
from goldens import FLOAT32_TOLERANCE, LENGTHS, both_goldens
from hf_models import SMALL, ids, logits, model, small
from torch.nn import functional as F
from transformers import DynamicCache

from baichuan.config import PRESETS, VERSIONS
from baichuan.engine.self_check import float_logits
from baichuan.hf_model import config as hf_config
from baichuan.hf_model import float_model, network
from baichuan.hf_model import modeling as hf
from baichuan.hf_model.float_model import load_float_model
from baichuan.hf_model.modeling import BaichuanConfig, BaichuanForCausalLM

GREEDY = dict(max_new_tokens=24, eos_token_id=None, do_sample=False, repetition_penalty=1.0)


@pytest.mark.parametrize("length", LENGTHS)
@both_goldens
def test_logits_equal_the_original(version, length):
    expected = goldens.golden(version)[f"logits_{length}"]
    assert (logits(model(version), ids(version, length))[0] - expected).abs().max() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
@both_goldens
def test_logits_without_transformers_equal_the_original(version, length):
    alone = load_float_model(goldens.checkpoint(version), version, torch.device("cpu"))
    found = float_logits(alone, ids(version, length)[0].tolist())
    assert (found - goldens.golden(version)[f"logits_{length}"]).abs().max() <= FLOAT32_TOLERANCE


@both_goldens
def test_hidden_states_equal_the_original(version):
    with torch.no_grad():
        states = model(version)(ids(version, 7), output_hidden_states=True).hidden_states
    assert (torch.cat(states) - goldens.golden(version)["hidden_7"]).abs().max() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
@both_goldens
def test_generate_equals_the_original(version, length):
    found = model(version).generate(ids(version, length), **GREEDY, output_logits=True, return_dict_in_generate=True)
    golden = goldens.golden(version)
    assert found.sequences[0, length:].tolist() == golden[f"gen_{length}"].tolist()
    assert (torch.cat(found.logits) - golden[f"gen_logits_{length}"]).abs().max() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    "version, dtype, worst, mean",
    # float16 rounds to 5e-4 and bfloat16 to 4e-3 of a value; logits have a standard deviation of 3
    [("v1_7b", "float16", 0.07, 0.007), ("v2_13b", "bfloat16", 0.5, 0.07)],
)
def test_low_precision_stays_close(version, dtype, worst, mean):
    expected = goldens.golden(version)["logits_128"]
    error = (logits(model(version, dtype), ids(version, 128))[0].float() - expected).abs()
    assert error.max() <= worst and error.mean() <= mean


@both_goldens
def test_left_padding_changes_nothing(version):
    prompts = [ids(version, length)[0] for length in (7, 33, 128)]
    batch = torch.stack([F.pad(prompt, (128 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones(len(prompt)), (128 - len(prompt), 0)) for prompt in prompts]).long()
    masked, unmasked = logits(model(version), batch, attention_mask=mask), logits(model(version), batch)
    for row, prompt in enumerate(prompts):
        expected = goldens.golden(version)[f"logits_{len(prompt)}"]
        assert (masked[row, -len(prompt) :] - expected).abs().max() <= FLOAT32_TOLERANCE
    # without the mask the padding is read as text
    assert (unmasked[0, -7:] - goldens.golden(version)["logits_7"]).abs().max() > 0.1
    found = model(version).generate(batch, attention_mask=mask, **GREEDY)
    for row, prompt in enumerate(prompts):
        assert found[row, 128:].tolist() == goldens.golden(version)[f"gen_{len(prompt)}"].tolist()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # since transformers 5.24, and before
@pytest.mark.parametrize("padding", [0, 5])
@both_goldens
def test_chunks_with_a_cache_equal_one_pass(version, padding, name):
    tokens = F.pad(ids(version, 33), (padding, 0))
    mask = F.pad(torch.ones(1, 33), (padding, 0)).long()
    found, cache = [], None
    for start, stop in ((0, 20), (20, 21), (21, 33 + padding)):
        with torch.no_grad():
            output = model(version)(tokens[:, start:stop], attention_mask=mask[:, :stop], **{name: cache})
        found.append(output.logits)
        cache = output[1]
    expected = goldens.golden(version)["logits_33"]
    assert (torch.cat(found, 1)[0, padding:] - expected).abs().max() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_beams=3, do_sample=False, length_penalty=0.8),
        dict(do_sample=True, top_k=20, top_p=0.9, temperature=0.7),
        dict(do_sample=False, cache_implementation="static"),
    ],
    ids=["beams", "sampling", "static cache"],
)
@both_goldens
def test_the_cache_changes_no_decision(version, settings):
    """generate() without a cache runs the whole text through the model at each step."""
    batch = torch.cat([F.pad(ids(version, 7), (26, 0)), ids(version, 33)])
    mask = torch.cat([F.pad(torch.ones(1, 7), (26, 0)), torch.ones(1, 33)]).long()
    common = dict(attention_mask=mask, max_new_tokens=12, eos_token_id=None, repetition_penalty=1.0)
    torch.manual_seed(0)
    cached = model(version).generate(batch, **common, **settings)
    torch.manual_seed(0)
    settings = {name: value for name, value in settings.items() if name != "cache_implementation"}
    assert cached.tolist() == model(version).generate(batch, **common, **settings, use_cache=False).tolist()


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # versions before 5.24 know no other name
@both_goldens
def test_generate_goes_on_from_a_cache(version):
    """The ids and their mask are complete, and the model is given those that the cache lacks."""
    start = model(version).generate(ids(version, 33), **GREEDY | dict(max_new_tokens=9), return_dict_in_generate=True)
    again = model(version).generate(
        start.sequences,
        attention_mask=torch.ones_like(start.sequences),
        past_key_values=start.past_key_values,
        **GREEDY | dict(max_new_tokens=15),
    )
    assert again[0, 33:].tolist() == goldens.golden(version)["gen_33"].tolist()


def test_a_cache_has_one_name():
    with pytest.raises(ValueError, match="two names of one input"):
        small("v1_7b")(torch.arange(5)[None], cache=DynamicCache(), past_key_values=DynamicCache())


def test_the_goldens_notice_a_wrong_position_or_head():
    v1 = model("v1_7b")
    with torch.no_grad():
        shifted = v1(ids("v1_7b", 33), position_ids=torch.arange(33)[None] * 2).logits[0]
    assert (shifted - goldens.golden("v1_7b")["logits_33"]).abs().max() > 0.1
    v2 = copy.deepcopy(model("v2_13b"))
    v2.lm_head.forward = lambda x: F.linear(x, v2.lm_head.weight)  # not normalised
    expected = goldens.golden("v2_13b")["logits_33"].argmax(-1)
    assert (logits(v2, ids("v2_13b", 33))[0].argmax(-1) == expected).float().mean() < 0.3


@pytest.mark.parametrize("heads", [5, 8, 10, 20, 32, 40])
def test_alibi_bias_equals_the_original_up_to_the_shift(heads):
    config = replace(PRESETS["v2_13b"], **(SMALL | dict(num_heads=heads, hidden_size=4 * heads)))
    tiny = BaichuanForCausalLM(BaichuanConfig.of(config))
    embedded = torch.zeros(1, 16, 4 * heads)
    _, mask, _ = tiny._attention_inputs(embedded, None, None, None)
    expected = goldens.alibi()[f"mask16_{heads}"]
    expected = expected - expected.diagonal(dim1=1, dim2=2)[..., None]  # relative to the query's own position
    torch.testing.assert_close(mask[0], expected, rtol=1e-6, atol=1e-6)  # one rounding to float32


def test_alibi_bias_is_exact_at_long_distance_in_bfloat16():
    config = replace(PRESETS["v2_13b"], dtype="bfloat16", **(SMALL | dict(num_heads=40, hidden_size=80)))
    tiny = BaichuanForCausalLM(BaichuanConfig.of(config)).bfloat16()
    cache = DynamicCache()
    cache.update(*torch.zeros(2, 1, 40, 4095, 2, dtype=torch.bfloat16), 0)
    _, mask, _ = tiny._attention_inputs(torch.zeros(1, 1, 80, dtype=torch.bfloat16), None, None, cache)
    expected = goldens.alibi()["slopes_40"].double() * -4095.0
    torch.testing.assert_close(mask[0, :, 0, 0].double(), expected, rtol=1e-6, atol=0)
    assert (expected.bfloat16().double() - expected).abs().max() > 1  # what rounding to the dtype would lose


@pytest.mark.parametrize("version", VERSIONS)
def test_training_lowers_the_loss(version):
    tiny = small(version).train()
    tokens = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :4] = -100
    output = tiny(tokens, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss = tiny(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in tiny.parameters())
    assert loss < 0.7 * output.loss


def test_the_normalised_head_follows_the_weight():
    tiny, tokens = small("v2_7b"), torch.arange(5)[None]
    before = logits(tiny, tokens)
    with torch.no_grad():
        tiny.lm_head.weight[3] *= -2.0
    after = logits(tiny, tokens)
    torch.testing.assert_close(after[..., 3], -before[..., 3])  # turned around, and still of length 1
    torch.testing.assert_close(tiny(tokens).logits.detach(), after)  # the path that gradients take


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 3\), not \(1, 5\)"):
        small("v1_7b")(torch.arange(5)[None], attention_mask=torch.ones(1, 3))


def test_nothing_that_it_judges_is_imported():
    judged = ("baichuan.model.ops", "baichuan.model.decoder", "baichuan.records", "baichuan.executors")
    for module in (hf, hf_config, network, float_model):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not node.module.startswith(judged), node.module


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float16", 0.01), ("bfloat16", 0.08)])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_gpu_computes_what_the_cpu_does(version, dtype, tolerance):
    """Left-padded prompts and one cached step; tolerances in standard deviations, 20 roundings of the dtype."""
    tiny = small(version)
    tokens = torch.randint(101, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 40).tril(20).flip(1).long()  # 21, 22 and 23 ids
    expected = logits(tiny, tokens, attention_mask=mask)
    on_gpu = copy.deepcopy(tiny).to("cuda", getattr(torch, dtype))
    with torch.no_grad():
        first = on_gpu(tokens[:, :39].cuda(), attention_mask=mask[:, :39].cuda())
        last = on_gpu(tokens[:, 39:].cuda(), attention_mask=mask.cuda(), cache=first[1])
    found = torch.cat((first.logits, last.logits), 1).float().cpu()
    assert found.isfinite().all()
    assert (found - expected)[mask.bool()].abs().max() <= tolerance * expected.std()
