"""Text to token ids and back: SentencePiece, read from the checkpoint's tokenizer.model without remote code."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, set_min_log_level

from baichuan.errors import CheckpointError, ConfigError
from baichuan.util.files import read_at_most, stand_in

MODEL_NAME = "tokenizer.model"
MAX_MODEL_BYTES = 64 << 20  # the largest released tokenizer.model has 2 MB
REPLACEMENT = "\ufffd"  # what SentencePiece writes for each byte that is not part of a UTF-8 character
# Pieces that stand for no text; the model's other user-defined pieces, HTML tags, digits and punctuation, are text.
CONTROL_PIECE = re.compile(r"<(SEP|CLS|reserved_\d+)>")
ROLE_PIECE = re.compile(r"<[^<>\s]+>")  # a checkpoint may give its roles other names


def is_id(value: Any) -> bool:
    """Whether it is an integer, NumPy's included, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_ids(ids: Iterable[int], vocab_size: int, name: str = "the input") -> None:
    """Raise ConfigError unless every id is an integer that has a row in an embedding of `vocab_size` rows."""
    for token in ids:
        if type(token) is not int and not is_id(token):  # the first is quick
            raise ConfigError(f"{name} holds {token!r:.60}, which is no token id; give integers")
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"{name} holds the id {token}, which is not in 0 to {vocab_size - 1}; "
                "take it out (a <pad> that a tokenizer adds at the end has no embedding)"
            )


class Tokenizer:
    """A checkpoint's tokenizer.  v1 writes a space before the text and v2 does not: the model file says which.

    path: the checkpoint's folder, or its tokenizer.model.  Raises CheckpointError where that cannot be read.
    """

    def __init__(self, path: str | Path):
        model, pieces = _load(Path(path))
        self._model = model
        self.vocab_size = len(pieces)
        self.adds_space = model.encode("a", out_type=str)[0].startswith("▁")  # v1: True, v2: False
        self.special_ids = frozenset(i for i in (model.unk_id(), model.bos_id(), model.eos_id()) if i >= 0)
        self._control_ids = frozenset(i for i, piece in enumerate(pieces) if CONTROL_PIECE.fullmatch(piece))
        self._special_pieces = {pieces[i]: i for i in self.special_ids}
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, self._special_pieces))})")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, as the released tokenizer gives them.

        A literal <unk>, <s> or </s> becomes its id and the text between them is encoded piece by piece; a literal
        <reserved_106> becomes its id too.  No bos is put in front.  For text of a chat's user, see encode_literal.
        """
        _check_unicode(text)
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            ids += [self._special_pieces[part]] if part in self._special_pieces else self._model.encode(part)
        return ids

    def encode_literal(self, text: str, role_ids: Collection[int] = ()) -> list[int]:
        """Ids of `text` in which every character is text: no control id, no special id, none of `role_ids`.

        A control token's name is spelled by ordinary pieces, so that decode gives the same text.
        """
        _check_unicode(text)
        control = self._control_ids.union(role_ids)
        return [
            out for token in self._model.encode(text) for out in (self._spell(token) if token in control else [token])
        ]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`, with or without <unk>, <s> and </s>.  Raises ConfigError for an id out of range.

        As in the released tokenizer, a special token that does not open the text and follows an ordinary one puts
        a space before the ordinary text that it ends: <s>, a, b, </s> gives "<s> ab</s>".
        """
        ids = list(ids)
        check_ids(ids, self.vocab_size, "the text to decode")
        if skip_special:
            return self._model.decode([token for token in ids if token not in self.special_ids])
        text, run = "", []
        for index, token in enumerate(ids):
            if token not in self.special_ids:
                run.append(token)
                continue
            space = " " if index and ids[index - 1] not in self.special_ids else ""
            text += space + self._model.decode(run) + self._model.id_to_piece(token)
            run = []
        return text + self._model.decode(run)

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self._model, self.special_ids)

    def check_role_id(self, role_id: int) -> None:
        """Raise CheckpointError unless `role_id` is a token that no other text contains: a chat's role."""
        if not 0 <= role_id < self.vocab_size:
            raise CheckpointError(
                f"the chat role id {role_id} is not in 0 to {self.vocab_size - 1}; "
                "correct user_token_id and assistant_token_id in generation_config.json"
            )
        piece = self._model.id_to_piece(role_id)
        named = ROLE_PIECE.fullmatch(piece) and self._model.encode(piece * 2)[-2:] == [role_id, role_id]
        if not named and not self._model.is_control(role_id):
            raise CheckpointError(
                f"the chat role id {role_id} is {piece!r}, which is ordinary text in this tokenizer; use a chat "
                "checkpoint's tokenizer.model, or name the role ids in generation_config.json"
            )

    def _spell(self, control_id: int) -> list[int]:
        """A control piece's name as ordinary pieces: its first character, then the rest."""
        piece = self._model.id_to_piece(control_id)
        spelled: list[int] = []
        for text in (piece[0], piece[1:]):
            # Behind a control piece the text gets no leading space, and neither merges with the other.
            ids = self._model.encode(piece + text)
            spelled += ids[ids.index(control_id) + 1 :]
        return spelled


class TextStream:
    """Text of one sequence as its ids come.  The pieces joined are decode(ids); none ends inside a character.

    decode is that of Tokenizer with skip_special=True.
    """

    def __init__(self, model: SentencePieceProcessor, special_ids: Collection[int]):
        self._model = model
        self._special_ids = special_ids
        self._window: list[int] = []  # the newest id whose text has been returned completely, and all ids after it
        self._shown = 0  # characters of the window's text that have been returned

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character lacks bytes."""
        check_ids([token], self._model.vocab_size(), "the text to decode")
        if token in self._special_ids:
            return ""
        self._window.append(token)
        text = self._model.decode(self._window)
        # The last one to three bytes may begin a character; until it is whole, each decodes to a REPLACEMENT.
        trailing = len(text) - len(text.rstrip(REPLACEMENT))
        held = min(trailing, 3) if self._model.is_byte(token) else 0
        end = max(self._shown, len(text) - held)
        piece = text[self._shown : end]
        self._shown = end
        if not held:
            self._window = [token]
            self._shown = len(self._model.decode(self._window))
        return piece

    def finish(self) -> str:
        """The rest of the text, after the last id."""
        piece = self._model.decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return piece


set_min_log_level(2)  # errors alone: the library prints its warnings of odd pieces past our log


def _load(path: Path) -> tuple[SentencePieceProcessor, list[str]]:
    """The SentencePiece model in the file, or in the folder's tokenizer.model, and its pieces by id."""
    try:
        file = path / MODEL_NAME if path.is_dir() else path
        if not file.is_file():
            raise CheckpointError(f"there is no tokenizer at {file}; give the folder that holds {MODEL_NAME}")
        if left := stand_in(file):
            raise CheckpointError(f"{file} {left}")
        content = read_at_most(file, MAX_MODEL_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); copy the checkpoint's {MODEL_NAME} again"
        ) from None
    try:
        model = SentencePieceProcessor(model_proto=content)
        pieces = model.id_to_piece(list(range(model.vocab_size()))) if content else []
    except (RuntimeError, ValueError):  # ValueError: a piece that is not UTF-8
        pieces = []
    if not pieces:
        raise CheckpointError(
            f"{file} is not a SentencePiece model ({len(content)} bytes); copy the checkpoint's {MODEL_NAME} again"
        )
    return model, pieces


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the text is not valid UTF-8 at character {error.start}; give it as UTF-8") from None
