"""The two small tokenizers, from the demo's articles: python tests/data/tokenizers/make.py FOLDER

Their ids up to the bytes are those of the released ones: special ids, markup, digits and punctuation that are never
merged, reserved names, bytes.  The rest is learnt.  v1 puts a space before each text, v2 does not.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import sentencepiece

ARTICLES = Path(__file__).resolve().parents[3] / "demo/articles.jsonl"
TAGS = ["h1", "h2", "h3", "h4", "h5", "p", "br", "b", "strong", "img", "li", "table", "tbody", "tr", "td"]
MARKUP = [form.format(tag) for tag in TAGS for form in ("<{}>", "<{}/>", "</{}>")]
COMMON = [
    "\n",
    "\t",
    *MARKUP,
    *"０１２３４５６７８９，。！？、：￥.!?《》【】『』",
    "```",
    "<!--",
    "-->",
    "---",
    "<!DOCTYPE>",
]
UNMERGED = {
    "v1": [*COMMON, *"0123456789"],
    "v2": [*COMMON, *"+-=；．＝＜＞－＋％‼㊣／｜", "...", "。。。", "。。。。。。"],
}
RESERVED = {"v1": range(300), "v2": range(12, 1000)}  # numbers N of <reserved_N>: 195 and 196 are the roles of a chat
LEARNT = 800


def train(kind: str, texts: list[str]) -> bytes:
    names = ["<SEP>", "<CLS>", *UNMERGED[kind], *(f"<reserved_{n}>" for n in RESERVED[kind])]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=3 + len(names) + 256 + LEARNT,
        byte_fallback=True,
        add_dummy_prefix=kind == "v1",
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=names,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(folder: Path) -> None:
    articles = [json.loads(line) for line in ARTICLES.read_text("utf-8").splitlines()]
    texts = [article[part] for article in articles for part in ("article", "highlights")]
    for kind in UNMERGED:
        (folder / f"small_{kind}.model").write_bytes(train(kind, texts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
