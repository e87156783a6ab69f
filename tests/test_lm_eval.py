"""lm-evaluation-harness over an engine: small tasks of local files, against the transformers model's logits."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import goldens
import pytest
import scripts
import torch
import yaml
from named_skips import NO_LM_EVAL

from baichuan import LLM
from baichuan.api.ranks import Ranks
from baichuan.errors import ConfigError
from baichuan.hf_model.modeling import load_hf_model
from baichuan.parallel.comm import run_ranks

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason=NO_LM_EVAL)
VERSION = "v1_7b"
ROWS = [
    {"text": "Rivers rose in the north", "choices": [" today", " for many days", "."], "answer": 1},
    {"text": "The council met on Monday", "choices": [" and", " in the town"], "answer": 0},
    {"text": "登鹳雀楼", "choices": ["王之涣", "李白"], "answer": 0},
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text * 20}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "until": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "test", **data, **task}))
    return folder


def evaluate(llm: LLM, folder, names) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from baichuan.api.lm_eval import BaichuanLM

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(
        BaichuanLM(llm=llm), tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=True
    )


def log_probs(ids: list[int]) -> torch.Tensor:
    """Log-probabilities of ids[1:] by the transformers model."""
    model = load_hf_model(goldens.checkpoint(VERSION), VERSION)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_three_kinds_of_tasks(engine, tasks, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    llm = LLM(engine)
    found = evaluate(llm, tasks, TASKS)
    encode, right = llm.tokenizer.encode, 0
    for row, sample in zip(ROWS, found["samples"]["choice"], strict=True):
        context = encode(row["text"])
        expected = []
        for choice in row["choices"]:
            whole = encode(row["text"] + choice)
            expected.append(log_probs(whole)[len(context) - 1 :].sum().item())
        assert [each[0][0] for each in sample["resps"]] == pytest.approx(expected, abs=1e-2)
        right += max(range(len(expected)), key=expected.__getitem__) == row["answer"]
    assert found["results"]["choice"]["acc,none"] == pytest.approx(right / len(ROWS))
    for row, sample in zip(ROWS, found["samples"]["whole"], strict=True):
        ids = encode(row["text"] * 20)
        assert len(ids) > 127 or row is not ROWS[0], "one text at least takes several windows"
        if len(ids) < 127:  # one window, behind the end id
            assert sample["resps"][0][0] == pytest.approx(log_probs([2, *ids]).sum().item(), abs=0.2)
        assert math.isfinite(sample["resps"][0][0]) and sample["resps"][0][0] < 0
    for row, sample in zip(ROWS, found["samples"]["until"], strict=True):
        greedy = replace(llm.sampling, top_k=1, top_p=0.0, temperature=1.0, repetition_penalty=1.0)
        assert sample["resps"][0][0] == llm.generate(row["text"], greedy, 6)[0].text


def test_a_window_s_tokens_are_counted_once(engine):
    """The rolling likelihood of a long text is that of its windows, by the transformers model."""
    from lm_eval.api.instance import Instance

    from baichuan.api.lm_eval import BaichuanLM

    llm = LLM(engine)
    text = ROWS[0]["text"] * 20
    ids = llm.tokenizer.encode(text)
    size = llm.engine.build.max_input_len - 1
    assert len(ids) > size
    expected, start = log_probs([2, *ids[:size]]).sum().item(), size
    while start < len(ids):
        end = min(start + size, len(ids))
        window = ids[max(0, end - size - 1) : end]
        expected += log_probs(window)[-(end - start) :].sum().item()
        start = end
    [found] = BaichuanLM(llm=llm).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert found == pytest.approx(expected, abs=0.5), "of about 1000 nats"
    assert abs(found) > 100


@pytest.fixture(scope="module")
def model(engine):
    from baichuan.api.lm_eval import BaichuanLM

    return BaichuanLM(llm=LLM(engine))


def until(model, *settings: dict) -> list[str]:
    from lm_eval.api.instance import Instance

    return model.generate_until([Instance("generate_until", {}, (ROWS[0]["text"], each), 0) for each in settings])


def test_stop_texts(model):
    [whole] = until(model, {"max_gen_toks": 24})
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    for given in (["never so", stop], stop):
        assert until(model, {"max_gen_toks": 24, "until": given}) == [whole[: whole.index(stop)]] != [whole]
    with pytest.raises(ConfigError, match="a continuation has 128 tokens"):
        model._loglikelihood_tokens([(("", ""), [1], [5] * 128)])


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 3}, {}),  # as in transformers
        ({"temperature": None, "do_sample": None, "max_gen_toks": None, "max_new_tokens": 6, "until": None}, {}),
        ({"num_beams": 2, "length_penalty": 2.0}, {"num_beams": 2, "length_penalty": 2.0}),
        ({"num_beams": 2, "temperature": 0.0}, {"num_beams": 2}),
        ({"repetition_penalty": 0.1}, {"repetition_penalty": 0.1}),
        ({"temperature": 0.8}, {"top_k": 0, "temperature": 0.8}),
        ({"do_sample": True}, {"top_k": 0}),
        ({"do_sample": True, "top_k": 7, "top_p": 0.5}, {"top_k": 7, "top_p": 0.5}),
    ],
)
def test_settings_are_those_of_the_engine(model, given, config):
    plain = replace(model.llm.sampling, top_k=1, top_p=0.0, temperature=1.0, repetition_penalty=1.0)
    [made] = model.llm.generate(ROWS[0]["text"], replace(plain, **config), 6)
    assert until(model, {"max_gen_toks": 6, **given}) == [made.text]
    assert not config or until(model, {"max_gen_toks": 6}) != [made.text], "negative control"


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_a_length_beyond_the_engines_is_cut_and_said_once(engine, name, caplog):
    from baichuan.api.lm_eval import BaichuanLM

    model = BaichuanLM(llm=LLM(engine))
    [made] = model.llm.generate([ROWS[0]["text"]], model._settings({})[0], 24)
    assert until(model, {name: 24}) == [made.text] != until(model, {name: 3})
    caplog.clear()
    assert until(model, {name: 1000}, {name: 1000, "until": []}, {name: 3})[:2] == [made.text] * 2
    [said] = caplog.messages
    expected = (
        f"{name} 1000 is more than the engine's max_output_len 24, where texts are cut; build with --max_output_len"
    )
    assert said == f"{expected} 1000"
    [short] = until(model, {"max_gen_toks": 3, "max_new_tokens": 24})
    assert [short] == until(model, {"max_gen_toks": 3})


def test_a_context_that_is_too_long_is_said_once(engine, caplog):
    from lm_eval.api.instance import Instance

    from baichuan.api.lm_eval import BaichuanLM

    model = BaichuanLM(llm=LLM(engine))
    long = ROWS[0]["text"] * 40
    requests = [Instance("generate_until", {}, (long, {"max_gen_toks": 2}), 0)] * 2
    [made, again] = model.generate_until(requests)
    ids = model.llm.tokenizer.encode(long)
    assert len(ids) > 128
    assert made == again == model.llm.generate(ids[-128:], model._settings({"max_gen_toks": 2})[0], 2)[0].text
    [said] = caplog.messages
    assert said.startswith(
        "some contexts are longer than the engine's max_input_len 128 and lose their beginning; build"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beams": 3}, "generation_kwargs has beams, which is not known; use do_sample, .*, until$"),
        ({"max_length": 3}, "generation_kwargs has max_length, which is not known"),
        (
            {"num_beams": 3},
            "^num_beams 3 exceeds the engine's max_beam_width 2; .* build with a larger --max_beam_width",
        ),
        ({"num_beams": 2, "do_sample": True}, "^num_beams 2 is a search and do_sample draws tokens"),
        ({"num_beams": 2, "temperature": 0.5}, "^num_beams 2 is a search and do_sample draws tokens"),
        ({"temperature": "x"}, "^temperature 'x' is no number; use 0.0 to 100.0"),
        ({"do_sample": "x"}, "^do_sample 'x' is not known; use one of True, False"),
        ({"do_sample": True, "top_k": "x"}, "^top_k 'x' is no integer"),
        ({"max_gen_toks": "x"}, "^max_gen_toks 'x' is no integer; give a number of tokens"),
        ({"max_gen_toks": 0}, "^max_gen_toks 0 is out of the engine's range"),
        ({"until": 5}, "^stop_texts 5 is no text and no list of texts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(model, given, message, monkeypatch):
    monkeypatch.setattr(model.llm, "generate", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(ConfigError, match=message) as error:
        until(model, {"max_gen_toks": 2}, given)
    assert "\n" not in str(error.value)


class Loader(yaml.SafeLoader):
    """Reads task files, whose functions it does not need."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: suffix)


def generation_kwargs(values):
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        if name == "generation_kwargs":
            yield value or {}
        elif isinstance(value, (dict, list)):
            yield from generation_kwargs(value)


def test_every_published_task_s_settings_are_known(model, monkeypatch):
    """Those of lm_eval's own task files, by an engine that has the beams that one of them asks for."""
    import lm_eval

    build = replace(model.llm.engine.build, max_beam_width=10)
    monkeypatch.setattr(model.llm, "engine", replace(model.llm.engine, build=build))
    named = [path for path in Path(lm_eval.__file__).parent.glob("tasks/**/*") if "yaml" in path.name]
    paths = [path for path in named if path.suffix not in (".py", ".pyc", ".sh")]
    texts = [text for path in paths if "generation_kwargs" in (text := path.read_text("utf-8"))]
    found = [each for text in texts for each in generation_kwargs(yaml.load(text, Loader))]
    assert len(found) > 300 and {"until", "max_new_tokens", "num_beams", "top_p"} <= set().union(*found)
    for each in found:
        model._settings(each)


def test_two_ranks(tmp_path, tasks, engine):
    folder = scripts.built(tmp_path / "engine", VERSION, 2)

    def on_rank(comm):
        llm = LLM(folder, device="cpu", ranks=Ranks(comm))
        return llm.lead(lambda: evaluate(llm, tasks, ["choice"])["samples"]["choice"])

    found = run_ranks(2, on_rank)[0]
    alone = evaluate(LLM(engine), tasks, ["choice"])["samples"]["choice"]
    for ours, theirs in zip(found, alone, strict=True):
        assert [each[0][0] for each in ours["resps"]] == pytest.approx(
            [each[0][0] for each in theirs["resps"]], abs=1e-2
        )


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_the_command_of_the_page(engine, tasks, tmp_path, right):
    program = [sys.executable, "-m", "baichuan.api.lm_eval", "run", "--model", "baichuan", "--tasks", "choice"]
    folder = engine if right else tmp_path
    more = ["--model_args", f"engine_dir={folder}", "--device", "cpu", "--include_path", str(tasks)]
    done = subprocess.run(
        [*program, *more], cwd=scripts.ROOT, capture_output=True, text=True, timeout=200, env=scripts.ENVIRONMENT
    )
    assert done.returncode == (0 if right else 2), done.stderr[-2000:]
    assert "|choice|" in done.stdout.replace(" ", "") if right else len(scripts.sentences(done.stderr)) == 1
