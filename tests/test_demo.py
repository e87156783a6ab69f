"""The demo's articles, and the checkpoint that demo/train.py makes of them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from demo_checkpoint import demo_checkpoint
from sentencepiece import SentencePieceProcessor

import weight
from baichuan.config import DTYPES, VERSIONS, QuantConfig
from baichuan.engine.self_check import all_logits
from baichuan.evaluation.tasks import prompt_text
from baichuan.executors.cpu.reference import ReferenceExecutor
from baichuan.hf_model.modeling import load_hf_model
from baichuan.text import chat
from baichuan.text.tokenizer import Tokenizer
from baichuan.weights.hub.config_json import read_json_object, read_model_config
from demo import train

STEPS = 2  # enough to see the loss fall
LEARNT = 0.9  # share of the summaries that a trained model gives word for word
HAN = re.compile(r"[\u4e00-\u9fff]")


def articles() -> list[dict]:
    return [json.loads(line) for line in train.ARTICLES.read_text("utf-8").splitlines()]


def checkpoint(version: str):
    return demo_checkpoint(version, STEPS)


def test_articles_are_well_formed():
    rows = articles()
    assert len(rows) >= 24 and len({row["id"] for row in rows}) == len(rows)
    assert len({row["article"] for row in rows}) == len({row["highlights"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "language", "article", "highlights"}, row["id"]
        assert row["language"] in ("en", "zh") and row["id"].startswith(f"{row['language']}-"), row["id"]
        for text in (row["article"], row["highlights"]):
            assert text == text.strip() and "\ufffd" not in text, row["id"]
            assert bool(HAN.search(text)) == (row["language"] == "zh"), row["id"]
        assert 0 < len(row["highlights"]) < len(row["article"]), row["id"]
    counts = [sum(row["language"] == language for row in rows) for language in ("en", "zh")]
    assert min(counts) >= 8


@pytest.mark.parametrize("version", VERSIONS)
def test_tokenizer_has_the_released_special_ids(version):
    model = SentencePieceProcessor(str(checkpoint(version) / "tokenizer.model"))
    assert len(model) == train.VOCAB_SIZE
    assert [model.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2)
    assert read_json_object(checkpoint(version) / "config.json", 1 << 20)["pad_token_id"] == 0
    # as in tokenizer.model of the released chat models
    assert model.id_to_piece(train.USER_ID) == "<reserved_106>" and train.USER_ID == 195
    assert model.id_to_piece(train.ASSISTANT_ID) == "<reserved_107>" and train.ASSISTANT_ID == 196
    second = VERSIONS[version].norm_head
    assert model.encode("Lindmere", out_type=str)[0].startswith("▁") != second, "v1 puts a space before the text"
    tokenizer = Tokenizer(checkpoint(version))
    for row in articles():
        assert tokenizer.decode(tokenizer.encode(row["article"])) == row["article"]
    assert tokenizer.decode(tokenizer.encode("🚀 é")) == "🚀 é", "bytes stand for what the articles do not have"
    assert tuple(chat.role_ids(checkpoint(version))) == (195, 196)


def mean_loss(model, sequences) -> float:
    """Of the first sequences, by one formula for both models that are compared."""
    with torch.no_grad():
        losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in sequences[:3]]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("version", VERSIONS)
def test_two_steps_lower_the_loss_and_the_folder_loads(version):
    folder = checkpoint(version)
    sequences = train.training_sequences(articles(), Tokenizer(folder))
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


def test_an_existing_folder_is_kept(capsys):
    folder = checkpoint("v1_7b")
    assert train.main(["--model_version", "v1_7b", "--output_dir", str(folder), "--steps", "1"]) == 2
    assert "exists; remove it, or name another" in capsys.readouterr().err
    assert (folder / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trained_model_knows_the_highlights():
    """Fully trained it answers as the articles do; the untrained one of the tests above does not."""
    assert share_reproduced(demo_checkpoint("v2_7b", 120)) >= LEARNT
    assert share_reproduced(checkpoint("v2_7b")) == 0


def share_reproduced(folder) -> float:
    tokenizer, rows = Tokenizer(folder), articles()
    model = load_hf_model(folder, "v2_7b")
    hits = 0
    for row in rows:
        prompt = tokenizer.encode(prompt_text(row["article"]))
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]), max_new_tokens=90, do_sample=False, eos_token_id=2, pad_token_id=0
            )[0]
        hits += tokenizer.decode(ids[len(prompt) :].tolist()).strip() == row["highlights"]
    return hits / len(rows)
