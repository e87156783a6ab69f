"""The evaluation's two sides: an engine and transformers write the same tokens, and both are the original's."""

from __future__ import annotations

from functools import cache

import goldens
import pytest
import torch
from evaluations import GREEDY, rouge
from goldens import both_goldens
from tiny_engine import SAMPLES, engine

from baichuan.api.llm import LLM
from baichuan.api.ranks import Ranks
from baichuan.config import SamplingConfig
from baichuan.engine.folder import Engine
from baichuan.errors import ConfigError, UnsupportedError
from baichuan.evaluation.request import Request
from baichuan.evaluation.scoring import agreement_of, negative_log_likelihood
from baichuan.evaluation.sides import EngineSide, HfSide, check_hf_sampling
from baichuan.evaluation.summary import Evaluation
from baichuan.evaluation.tasks import make_task
from baichuan.evaluation.wording import decoding
from baichuan.hf_model.modeling import load_hf_model
from baichuan.parallel.comm import run_ranks
from baichuan.text.tokenizer import Tokenizer

NEVER = 999  # the goldens were made without an end id; their prompts and answers do not contain this one
NEW_TOKENS = 24


@cache
def hf_side(version: str) -> HfSide:
    return HfSide(load_hf_model(goldens.checkpoint(version), version), "the golden checkpoint")


def compare(built: Engine, version: str, request: Request, samples=SAMPLES) -> Evaluation:
    """Rank 0's evaluation of the engine, its ranks as threads, against the transformers model."""
    tokenizer = Tokenizer(goldens.checkpoint(version))
    tasks = [make_task(sample, tokenizer, request.max_input_length, built.build.max_input_len) for sample in samples]

    def run(comm) -> Evaluation | None:
        llm = LLM(built.folder, ranks=Ranks(comm))

        def evaluate() -> Evaluation:
            evaluation = Evaluation(
                [EngineSide(llm), hf_side(version)], tasks, request, tokenizer, rouge(), scoring=True, reference="hf"
            )
            evaluation.warm_up()
            for batch in evaluation.batches():
                evaluation.run(batch)
            return evaluation

        return llm.lead(evaluate)

    return run_ranks(built.build.world_size, run)[0]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 8])
@both_goldens
def test_a_float32_engine_and_transformers_write_the_same_tokens(version, batch_size, tp_size):
    evaluation = compare(engine(version, tp_size), version, Request(GREEDY, batch_size, 20, NEW_TOKENS, 200, True))
    agreement = evaluation.figures("engine").agreement
    assert len(evaluation.samples) == agreement.identical_summaries == len(SAMPLES)
    assert agreement.mean_identical_prefix > 15 and agreement.same_first_choice == 1.0
    assert 0 <= agreement.mean_kl < 1e-7  # half the variance of logits' differences, which are 4e-5 at most on a CPU
    first, second = (evaluation.figures(key) for key in ("engine", "hf"))
    assert first.perplexity == pytest.approx(second.perplexity, rel=1e-5)
    assert first.rouge == second.rouge and first.new_tokens == second.new_tokens


def test_an_int4_engine_is_told_apart():
    evaluation = compare(engine("v2_13b", 1, "int4"), "v2_13b", Request(GREEDY, 8, 20, NEW_TOKENS, 200, True))
    agreement = evaluation.figures("engine").agreement
    assert agreement.identical_summaries < len(SAMPLES) and agreement.mean_identical_prefix < NEW_TOKENS - 1
    assert agreement.mean_kl > 1e-4 and agreement.same_first_choice < 1


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(top_k=1, repetition_penalty=1.3),
        SamplingConfig(top_k=5, temperature=0.8, random_seed=3),
        SamplingConfig(top_k=1, repetition_penalty=1.0, num_beams=4, temperature=1.0),
        SamplingConfig(top_k=1, repetition_penalty=1.0, num_beams=3, temperature=0.7, length_penalty=0.5),
    ],
    ids=decoding,
)
def test_every_way_of_decoding_is_the_same_on_both_sides(sampling):
    """Batches of prompts of different lengths: padding must not be seen by the penalty."""
    request = Request(sampling, 8, 20, NEW_TOKENS, 200)
    evaluation = compare(engine("v1_7b"), "v1_7b", request)
    assert evaluation.figures("engine").agreement.identical_summaries == len(SAMPLES)
    greedy = [
        hf_side("v1_7b").generate([sample.task.prompt], GREEDY, NEW_TOKENS)[0].ids for sample in evaluation.samples
    ]
    assert greedy != [sample.summaries["hf"].ids for sample in evaluation.samples]


@both_goldens
def test_the_transformers_side_in_one_padded_batch_equals_the_original(version):
    golden = goldens.golden(version)
    prompts = [golden[f"ids_{length}"].tolist() for length in goldens.LENGTHS]
    results = hf_side(version).generate(prompts, SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=NEVER), 24)
    assert [result.ids for result in results] == [golden[f"gen_{length}"].tolist() for length in goldens.LENGTHS]
    assert {result.finish_reason for result in results} == {"length"}
    expected = golden["logits_33"]
    assert (hf_side(version).score(prompts[2]) - expected).abs().max() <= goldens.FLOAT32_TOLERANCE


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both_goldens
def test_the_transformers_side_on_a_gpu(version):
    golden, side = (
        goldens.golden(version),
        HfSide(load_hf_model(goldens.checkpoint(version), version, device="cuda"), ""),
    )
    prompts = [golden[f"ids_{length}"].tolist() for length in goldens.LENGTHS]
    results = side.generate(prompts, SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=NEVER), 24)
    assert [result.ids for result in results] == [golden[f"gen_{length}"].tolist() for length in goldens.LENGTHS]
    logits = side.score(prompts[3])
    assert logits.is_cuda and side.facts["device"] == torch.cuda.get_device_name()
    assert negative_log_likelihood(logits[:-1], prompts[3][1:]) > 0
    assert agreement_of(hf_side(version).score(prompts[3]), logits).kl < 1e-7  # computed on two devices


def test_stop_ids_end_both_sides_alike():
    golden = goldens.golden("v1_7b")
    prompts = [golden[f"ids_{length}"].tolist() for length in goldens.LENGTHS]
    stop = golden["gen_33"].tolist()[5]
    config = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=NEVER, stop_ids=(stop,))
    side = EngineSide(LLM(engine("v1_7b").folder))
    ours, theirs = (each.generate(prompts, config, 24) for each in (side, hf_side("v1_7b")))
    assert [(each.ids, each.finish_reason) for each in ours] == [(each.ids, each.finish_reason) for each in theirs]
    assert theirs[2].ids == golden["gen_33"].tolist()[:5] and theirs[2].finish_reason == "stop"


def test_a_checkpoints_own_generation_settings_do_not_slip_in():
    from transformers import GenerationConfig

    model = load_hf_model(goldens.checkpoint("v1_7b"), "v1_7b")
    model.generation_config = GenerationConfig(repetition_penalty=2.0, no_repeat_ngram_size=1, eos_token_id=[5, 6, 7])
    prompt = goldens.golden("v1_7b")["ids_7"].tolist()
    own = model.generate(torch.tensor([prompt]), max_new_tokens=24)[0, 7:].tolist()
    config = SamplingConfig(top_k=1, repetition_penalty=1.0, eos_id=NEVER)
    ours = HfSide(model, "x").generate([prompt], config, 24)[0].ids
    assert ours == goldens.golden("v1_7b")["gen_7"].tolist() != own


def test_beams_with_a_penalty_are_refused_on_the_transformers_side():
    config = SamplingConfig(top_k=1, num_beams=2, repetition_penalty=1.1)
    with pytest.raises(ConfigError, match="repetition_penalty 1.1 with num_beams 2"):
        check_hf_sampling(config)


def test_a_full_gpu_is_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    side = HfSide(load_hf_model(goldens.checkpoint("v1_7b"), "v1_7b"), "x")
    monkeypatch.setattr(side.model, "forward", fail)
    for call in (lambda: side.generate([[5]], GREEDY, 2), lambda: side.score([5])):
        with pytest.raises(UnsupportedError, match="--hf_device cpu"):
            call()
