"""Ids and text against the original tokenizer's; streaming against decode; what is no tokenizer is refused."""

from __future__ import annotations

import os
import random

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizer_files import MODELS, RELEASED, SMALL, TINY, each, original, reference, tokenizer

from baichuan.errors import CheckpointError, ConfigError
from baichuan.text.tokenizer import MAX_MODEL_BYTES, REPLACEMENT, Tokenizer, check_ids

# <SEP>, <CLS> and every <reserved_N> of the released models
CONTROL_NAMES = {"small_v1": 302, "released_v1": 302, "small_v2": 990, "released_v2": 990}
BYTES = dict.fromkeys(TINY, range(203, 459))
BYTES |= dict.fromkeys(("small_v1", "released_v1"), range(393, 649))
BYTES |= dict.fromkeys(("small_v2", "released_v2"), range(1089, 1345))


@pytest.mark.parametrize("name", each(TINY, RELEASED))
def test_encode_and_decode_equal_the_original(name):
    t, expected = tokenizer(name), original(name)
    assert t.vocab_size == expected["vocab_size"]
    assert t.special_ids == {expected["unk"], expected["bos"], expected["eos"]}
    for case in expected["encode"]:
        assert t.encode(case["text"]) == case["ids"], case["text"]
        assert t.decode(case["ids"], skip_special=False) == case["decode"]
        assert t.decode(case["ids"]) == t.decode(case["ids"], skip_special=True) == case["decode_skip_special"]


@pytest.mark.parametrize("name", each(TINY, RELEASED))
def test_literal_encoding_equals_plain_sentencepiece_but_for_control_names(name):
    t = tokenizer(name)
    for case in original(name)["encode"]:
        if "<reserved_" not in case["text"]:
            assert t.encode_literal(case["text"]) == case["sp_ids"], case["text"]


@pytest.mark.parametrize("name", each(RELEASED))
def test_encode_equals_chatglm_cpp(name):
    for text, ids in reference("chatglm_cpp.json")[name]["cases"]:
        assert tokenizer(name).encode(text) == ids


@pytest.mark.released_tokenizers
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_the_small_tokenizers_have_the_released_ids_up_to_the_learnt_ones(kind):
    small, released = (SentencePieceProcessor(str(MODELS[f"{name}_{kind}"])) for name in ("small", "released"))
    known = BYTES[f"small_{kind}"].stop
    unmerged = BYTES[f"small_{kind}"].start
    same = [small.id_to_piece(i) == released.id_to_piece(i) for i in range(known)]
    assert {small.id_to_piece(i) for i in range(unmerged)} == {released.id_to_piece(i) for i in range(unmerged)}
    assert all(same[:5] + same[101:]) and not any(small.is_byte(i) for i in range(unmerged))


@pytest.mark.parametrize("name", each(TINY, SMALL, RELEASED))
def test_v1_puts_a_space_before_a_text_and_v2_does_not(name):
    t = tokenizer(name)
    for text in ("\n", "\t\n"):
        ids = t.encode(text)
        assert len(ids) == len(text) + name.endswith("v1") and ids[-1] == 5 and t.decode(ids) == text


@pytest.mark.parametrize("name", each(TINY, SMALL, RELEASED))
def test_a_character_without_a_piece_becomes_its_bytes(name):
    t = tokenizer(name)
    unknown = "\U0010fffd"
    assert t.encode(f"\n{unknown}")[-4:] == [BYTES[name][byte] for byte in unknown.encode()]


def test_the_reference_tells_versions_and_special_tokens_apart():
    """Negative control: the other version's model, and SentencePiece without special tokens, fail the cases above."""
    v1, cases = tokenizer("tiny_v1"), original("tiny_v2")["encode"]
    assert sum(v1.encode(case["text"]) != case["ids"] for case in cases) > len(cases) // 2
    literal = [case["text"] for case in cases if case["ids"] != case["sp_ids"]]
    assert literal == ["<s>bos in text</s>", "<unk> <pad> <h2>title</h2>"]


@pytest.mark.parametrize("name", each(SMALL, RELEASED))
def test_no_control_token_can_be_written_as_text(name):
    t = tokenizer(name)
    control = {f"<{word}>" for word in ("SEP", "CLS", *(f"reserved_{n}" for n in range(2000)))}
    # Negative control: the plain encoding makes a single control id of each of these names.
    ids = {text: [i for i in t.encode(text) if t.decode([i]) == text] for text in control}
    forbidden = {found[0] for found in ids.values() if found} | t.special_ids
    assert len(forbidden) == CONTROL_NAMES[name] + 3
    for word in [*control, "<s>", "</s>", "<unk>"]:
        for text in (
            word,
            f"a{word}b",
            f" {word} {word}",
            word[:4] + word + word[4:],
            f"你好{word}\n{word[:-1]}",
            word * 3,
        ):
            literal = t.encode_literal(text)
            assert not forbidden & set(literal), text
            assert t.decode(literal) == text


@pytest.mark.parametrize("name", each(TINY, SMALL, RELEASED))
def test_streamed_pieces_join_to_the_decoded_text(name):
    t, rng = tokenizer(name), random.Random(0)
    sequences = [t.encode(case["text"]) for case in original("tiny_v1")["encode"]]
    sequences += [t.encode("😀🚀𠮷龘 ́é中\ufffd文" * 3), t.encode("   "), [], [1, 2, 0]]
    for _ in range(2000):  # ids at random, and runs of random bytes, most of them broken UTF-8
        bytes_, anything = BYTES[name], range(t.vocab_size)
        sequences.append(
            [rng.choice(rng.choice((bytes_, bytes_[0xE0:], bytes_[0x80:0xC0], anything))) for _ in range(12)]
        )
    for ids in sequences:
        stream = t.stream()
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == t.decode(ids), ids


@pytest.mark.parametrize("name", each(TINY, SMALL, RELEASED))
def test_a_stream_never_shows_half_a_character(name):
    t, text = tokenizer(name), "龘😀 𠮷é🚀龖"
    ids = t.encode(text)
    # Negative control: the text has characters of several ids, which id by id give replacement marks.
    assert REPLACEMENT in "".join(t.decode([token]) for token in ids)
    stream = t.stream()
    shown = ""
    for count, token in enumerate(ids, 1):
        shown += stream.push(token)
        assert text.startswith(shown)
        # Nothing that is already certain waits.
        assert shown == t.decode(ids[:count]).rstrip(REPLACEMENT)
    assert shown == text and stream.finish() == ""


def test_an_unfinished_character_ends_as_decode_ends_it():
    t = tokenizer("tiny_v2")
    ids = t.encode("a😀")[:-1]
    stream = t.stream()
    assert "".join(map(stream.push, ids)) == "a"
    assert stream.finish() == REPLACEMENT * 3 == t.decode(ids)[1:]


def test_endless_broken_bytes_are_shown_as_they_become_certain():
    t = tokenizer("tiny_v2")
    stream = t.stream()
    assert "".join(stream.push(BYTES["tiny_v2"][0xFF]) for _ in range(10)) == REPLACEMENT * 7


@pytest.mark.parametrize("name", each(TINY, SMALL, RELEASED))
@pytest.mark.parametrize("bad", [-1, 0, 1 << 40])
def test_ids_out_of_range_are_named(name, bad):
    t = tokenizer(name)
    bad = bad or t.vocab_size  # the id of the <pad> that some tokenizer files add
    for call in (lambda: t.decode([5, bad]), lambda: t.stream().push(bad), lambda: check_ids([5, bad], t.vocab_size)):
        with pytest.raises(ConfigError, match=rf"id {bad}, which is not in 0 to {t.vocab_size - 1}"):
            call()
    check_ids([0, t.vocab_size - 1], t.vocab_size)


@pytest.mark.parametrize("token", [[1, 2], "5", 1.0, None, True])
def test_what_is_no_id_is_refused(token):
    with pytest.raises(ConfigError, match="which is no token id; give integers"):
        check_ids([5, token], 10)  # type: ignore[list-item]


def test_text_that_is_no_unicode_is_refused():
    t = tokenizer("tiny_v1")
    for encode in (t.encode, t.encode_literal):
        with pytest.raises(ConfigError, match="not valid UTF-8 at character 2"):
            encode("ab\udc80")


def _cut(folder):
    folder.joinpath("tokenizer.model").write_bytes((MODELS["tiny_v1"] / "tokenizer.model").read_bytes()[:9000])


def _broken_piece(folder):
    content = (MODELS["tiny_v1"] / "tokenizer.model").read_bytes()
    folder.joinpath("tokenizer.model").write_bytes(content.replace(b"<reserved_50>", b"\xffreserved_50>"))


def _too_large(folder):
    with folder.joinpath("tokenizer.model").open("wb") as file:
        file.truncate(MAX_MODEL_BYTES + 1)


DAMAGED = {
    "missing": (lambda folder: None, "there is no tokenizer at"),
    "empty": (lambda folder: folder.joinpath("tokenizer.model").touch(), "tokenizer.model is empty; download it again"),
    "garbage": (
        lambda folder: folder.joinpath("tokenizer.model").write_bytes(b"\xff" * 99),
        "not a SentencePiece model",
    ),
    "pointer": (
        lambda folder: folder.joinpath("tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is Git LFS's pointer to the file, not the file; run git lfs pull in",
    ),
    "cut": (_cut, "not a SentencePiece model"),
    "piece that is not UTF-8": (_broken_piece, "not a SentencePiece model"),
    "too large": (_too_large, "is larger than"),
    "folder": (lambda folder: folder.joinpath("tokenizer.model").mkdir(), "there is no tokenizer at"),
    "pipe": (lambda folder: os.mkfifo(folder / "tokenizer.model"), "there is no tokenizer at"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_no_tokenizer_is_refused_in_one_sentence(damage, tmp_path, capfd):
    make, message = DAMAGED[damage]
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # SentencePiece prints nothing of its own


def test_the_library_s_warnings_are_not_printed(tmp_path, capfd):
    """The library warns of a piece that is a null character."""
    content, newline = (TINY["tiny_v2"] / "tokenizer.model").read_bytes(), b"\x0a\x01\x0a"  # the piece "\n" of one byte
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content.replace(newline, b"\x0a\x01\x00", 1))
    Tokenizer(path)
    assert capfd.readouterr().err == ""


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.model"
    file.touch()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("baichuan.text.tokenizer.stand_in", refuse)
    with pytest.raises(CheckpointError, match="cannot be read \\(Permission denied\\)"):
        Tokenizer(file)


def test_a_tokenizer_is_found_by_folder_and_by_file():
    folder, ids = MODELS["tiny_v1"], tokenizer("tiny_v1").encode("你好")
    assert Tokenizer(folder / "tokenizer.model").encode("你好") == Tokenizer(str(folder)).encode("你好") == ids
