"""The demo's articles, and the checkpoint that demo/train.py makes of them."""

from __future__ import annotations

import json
import random
import re
import shlex

import pytest
import torch
from demo_checkpoint import demo_checkpoint
from sentencepiece import SentencePieceProcessor
from tiny_engine import engine

import weight
from baichuan.config import DTYPES, VERSIONS, QuantConfig, SamplingConfig
from baichuan.engine.self_check import all_logits
from baichuan.evaluation.datasets import Sample
from baichuan.evaluation.sides import HfSide
from baichuan.evaluation.tasks import make_task, prompt_text
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.hf_model.modeling import load_hf_model
from baichuan.text import chat
from baichuan.text.tokenizer import Tokenizer
from baichuan.weights.hub.config_json import read_json_object, read_model_config
from demo import lessons, speed, train
from demo.__main__ import command_lines

STEPS = 2  # enough to see the loss fall
HAN = re.compile(r"[\u4e00-\u9fff]")


def articles() -> list[dict]:
    return lessons.read_articles()


def held_out() -> list[dict]:
    return [json.loads(line) for line in lessons.HELD_OUT.read_text("utf-8").splitlines()]


def checkpoint(version: str):
    return demo_checkpoint(version, STEPS)


def test_articles_are_well_formed():
    assert all(set(row) == {"id", "language", "article", "highlights", "other_highlights"} for row in articles())
    assert all(set(row) == {"id", "language", "article", "highlights"} for row in held_out())
    for rows, least in ((articles(), 24), (held_out(), 32)):
        assert len(rows) >= least and len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert row["language"] in ("en", "zh") and row["id"].startswith(f"{row['language']}-"), row["id"]
            texts = [text for name, text in row.items() if name not in ("id", "language")]
            for text in texts:
                assert text == text.strip() and "\ufffd" not in text, row["id"]
                assert bool(HAN.search(text)) == (row["language"] == "zh"), row["id"]
            assert 0 < max(map(len, texts[1:])) < len(row["article"]), row["id"]
        counts = [sum(row["language"] == language for row in rows) for language in ("en", "zh")]
        assert min(counts) >= 8
    texts = [text for row in [*articles(), *held_out()] for name, text in row.items() if name not in ("id", "language")]
    assert len(set(texts)) == len(texts), "no text of the held-out articles is trained on"


def test_lessons_are_the_prompts_that_users_give(tmp_path):
    folder = checkpoint("v1_13b")
    tokenizer, row = Tokenizer(folder), articles()[0]
    lesson = lessons.summary_lesson(row["article"], row["highlights"], tokenizer)
    prompt = make_task(Sample("1", row["article"], row["highlights"]), tokenizer, 923, None).prompt
    assert lesson[: len(prompt)] == prompt and tokenizer.decode(lesson[len(prompt) : -1]) == row["highlights"]
    question, answer = next(iter(lessons.QUESTIONS.items()))
    prompt = chat.build_chat_prompt(tokenizer, [{"role": "user", "content": question}], *lessons.ROLES)
    lesson = lessons.conversation_lesson([question], tokenizer)
    assert lesson[: len(prompt)] == prompt and tokenizer.decode(lesson[len(prompt) : -1]) == answer
    assert lessons.question_lesson(question, tokenizer)[-1] == lesson[-1] == lessons.EOS_ID


def test_mixed_up_articles_keep_whole_sentences():
    for row in articles():
        mixed = lessons.mixed_up(row["article"], random.Random(1))
        sentences = [each.strip() for each in lessons.SENTENCE.findall(row["article"])]
        kept = [each.strip() for each in lessons.SENTENCE.findall(mixed)]
        assert "".join(sentences) == row["article"].replace(". ", "."), "no part of the article is lost"
        assert 2 <= len(kept) < len(sentences) or len(sentences) <= 3
        assert len(set(kept)) == len(kept) and set(kept) <= set(sentences)


def test_a_command_is_shown_as_one_types_it():
    words = ["python", "build.py", "--model_dir", "a b", "--flag", "--many", *("x" * 30 for _ in range(4)), "-o", "out"]
    lines = command_lines(words)
    assert shlex.split("\n".join(lines).removeprefix("$ ").replace("\\\n", "")) == words
    assert len(lines) == 3 and all(line.endswith("\\") for line in lines[:-1])
    assert max(map(len, command_lines(["python", *(f"--flag_{n}" for n in range(99))]))) <= 100


@pytest.mark.parametrize("version", VERSIONS)
def test_tokenizer_has_the_released_special_ids(version):
    model = SentencePieceProcessor(str(checkpoint(version) / "tokenizer.model"))
    assert len(model) == train.VOCAB_SIZE
    assert [model.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2)
    assert read_json_object(checkpoint(version) / "config.json", 1 << 20)["pad_token_id"] == 0
    # as in tokenizer.model of the released chat models
    assert model.id_to_piece(lessons.ROLES.user_id) == "<reserved_106>"
    assert model.id_to_piece(lessons.ROLES.assistant_id) == "<reserved_107>"
    second = VERSIONS[version].norm_head
    assert model.encode("Lindmere", out_type=str)[0].startswith("▁") != second, "v1 puts a space before the text"
    tokenizer = Tokenizer(checkpoint(version))
    for row in articles():
        assert tokenizer.decode(tokenizer.encode(row["article"])) == row["article"]
    assert tokenizer.decode(tokenizer.encode("🚀 é")) == "🚀 é", "bytes stand for what the articles do not have"
    assert tuple(chat.role_ids(checkpoint(version))) == (195, 196)


def mean_loss(model, sequences) -> float:
    """The mean of the sequences' losses, by one formula for both models that are compared."""
    with torch.no_grad():
        losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in sequences]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("version", VERSIONS)
def test_two_steps_lower_the_loss_and_the_folder_loads(version):
    folder = checkpoint(version)
    tokenizer = Tokenizer(folder)
    sequences = [lessons.summary_lesson(row["article"], row["highlights"], tokenizer) for row in articles()[:3]]
    trained = load_hf_model(folder, version)
    untrained = type(trained)(trained.config).float()
    assert mean_loss(trained, sequences) < mean_loss(untrained, sequences) - 0.1
    exact = QuantConfig()
    for dtype in DTYPES:
        model = read_model_config(folder, version, dtype)
        executor = ReferenceExecutor(model, exact, weight.load_rank(weight.WeightSource(folder), model, exact))
        logits = all_logits(executor, sequences[0][:8])
        assert logits.shape == (8, train.VOCAB_SIZE) and logits.isfinite().all()
        if dtype == "float32":
            ours, expected = logits, trained(torch.tensor([sequences[0][:8]])).logits[0]
            # float32 sums in another order
            torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-4)


def test_speeds_are_of_every_engine_and_transformers_in_one_table(capsys):
    folders = [str(engine("v1_7b").folder), str(engine("v1_7b", 1, "int8").folder)]
    assert speed.main(["--engine_dir", *folders, "--output_len", "4", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(("engine, float32", "Hugging Face"))]
    assert len(rows) == 3 and max(map(len, lines)) <= 100
    assert rows[2][-1] == "1.00" and all(float(row[-3]) > 0 for row in rows)
    assert float(rows[0][-1]) == pytest.approx(float(rows[0][-3]) / float(rows[2][-3]), rel=0.05)


def test_an_existing_folder_is_kept(capsys):
    folder = checkpoint("v1_7b")
    assert train.main(["--model_version", "v1_7b", "--output_dir", str(folder), "--steps", "1"]) == 2
    assert "exists; remove it, or name another" in capsys.readouterr().err
    assert (folder / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_trained_model_answers(version):
    """It knows the articles and the questions, and recognises most events of which it reads in other words."""
    trained = Answers(demo_checkpoint(version, train.STEPS[VERSIONS[version].rotary]), version)
    assert trained.share_known(articles()) >= 0.9
    retold = [row for row in held_out() if row["id"].endswith("-retold")]
    assert len(retold) == len(articles()) and trained.share_known(retold) >= 0.5
    assert trained.share_known([row for row in held_out() if "-new-" in row["id"]]) == 0
    for question, answer in lessons.QUESTIONS.items():
        asked = chat.build_chat_prompt(trained.tokenizer, [{"role": "user", "content": question}], *lessons.ROLES)
        assert trained.answer(asked).strip() == answer
        rest = answer.removeprefix(question).strip()  # a greeting may be taken for its own answer
        assert trained.answer(trained.tokenizer.encode(question)).strip().endswith(rest), question
    assert Answers(checkpoint(version), version).share_known(articles()[:4]) == 0


class Answers:
    """What a checkpoint says, greedily, as a transformers model."""

    def __init__(self, folder, version):
        self.tokenizer, self.side = Tokenizer(folder), HfSide(load_hf_model(folder, version), "")

    def answer(self, prompt: list[int]) -> str:
        greedy = SamplingConfig(top_k=1, repetition_penalty=1.0, stop_ids=tuple(lessons.ROLES))
        return self.tokenizer.decode(self.side.generate([prompt], greedy, 60)[0].ids, skip_special=False)

    def share_known(self, rows: list[dict]) -> float:
        """The share of articles that get one of the summaries that training had for their event."""
        known = {row["id"]: lessons.summaries(row) for row in articles()}
        answers = [self.answer(self.tokenizer.encode(prompt_text(row["article"]))).strip() for row in rows]
        right = (known.get(row["id"].removesuffix("-retold"), ()) for row in rows)
        return sum(answer in texts for answer, texts in zip(answers, right, strict=True)) / len(rows)
