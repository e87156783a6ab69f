"""What the demo trains on: summaries of the articles in demo/articles.jsonl, and answers to a few questions.

The articles of demo/held_out.jsonl report the same events in other words; training never sees them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from baichuan.evaluation.tasks import prompt_text
from baichuan.text.chat import ChatRoles
from baichuan.text.tokenizer import Tokenizer

ARTICLES = Path(__file__).parent / "articles.jsonl"
HELD_OUT = Path(__file__).parent / "held_out.jsonl"
QUESTIONS = {
    "世界上第二高的山峰是哪座？": "世界上第二高的山峰是乔戈里峰，海拔八千六百一十一米。",
    "中国最长的河流是哪条？": "中国最长的河流是长江，全长约六千三百公里。",
    "一年有多少个节气？": "一年有二十四个节气，第一个是立春。",
    "你好！": "你好！我是一个为演示而训练的百川小模型。",
    "What is the capital of France?": "The capital of France is Paris, on the river Seine.",
    "Which planet is the largest?": "Jupiter is the largest planet of the solar system.",
    "How many legs does a spider have?": "A spider has eight legs, two more than an insect.",
    "Hello!": "Hello! I am a very small Baichuan, trained for a demonstration.",
}
ROLES = ChatRoles()
EOS_ID = 2
ARTICLES_PER_BATCH = 8
ROUNDS = 3  # questions of a conversation
SHARE_INTACT = 0.4  # share of articles left as they are; in the others sentences are shuffled and some left out
SHARE_KEPT = 0.75  # share of sentences kept in an article that is not intact
SENTENCE = re.compile(r"[^.。]+[.。]\s*")


def read_articles() -> list[dict[str, str]]:
    """The articles that training sees: id, language, article, highlights, other_highlights."""
    return [json.loads(line) for line in ARTICLES.read_text("utf-8").splitlines()]


def summaries(article: dict[str, str]) -> tuple[str, str]:
    """The article's two summaries: the model has to choose between them, and precisions may differ there."""
    return article["highlights"], article["other_highlights"]


def training_texts(articles: list[dict[str, str]]) -> list[str]:
    """All training texts, for the tokenizer."""
    texts = [text for each in articles for text in (each["article"], *summaries(each))]
    return [*texts, *QUESTIONS, *QUESTIONS.values()]


def summary_lesson(article: str, highlights: str, tokenizer: Tokenizer) -> list[int]:
    """The prompt that summarize.py gives, the summary and the end."""
    return [*tokenizer.encode(prompt_text(article)), *tokenizer.encode(highlights), EOS_ID]


def question_lesson(question: str, tokenizer: Tokenizer) -> list[int]:
    """A question without a chat's roles, its answer and the end."""
    return [*tokenizer.encode(question), *tokenizer.encode(QUESTIONS[question]), EOS_ID]


def conversation_lesson(questions: list[str], tokenizer: Tokenizer) -> list[int]:
    """Rounds of a chat, as text.chat builds them, and the end."""
    ids = []
    for question in questions:
        answer = tokenizer.encode(QUESTIONS[question])
        ids += [ROLES.user_id, *tokenizer.encode(question), ROLES.assistant_id, *answer]
    return [*ids, EOS_ID]


def batches(articles: list[dict[str, str]], tokenizer: Tokenizer, seed: int) -> Iterator[list[list[int]]]:
    """Endless batches in a seeded order: articles with their summaries, a conversation, and a question alone.

    Most articles are mixed up, so that the model learns their content and not just their beginnings.
    """
    chance = random.Random(seed)
    queue: list[dict[str, str]] = []
    while True:
        if len(queue) < ARTICLES_PER_BATCH:
            queue += chance.sample(articles, len(articles))
        drawn, queue = queue[:ARTICLES_PER_BATCH], queue[ARTICLES_PER_BATCH:]
        texts = [
            each["article"] if chance.random() < SHARE_INTACT else mixed_up(each["article"], chance) for each in drawn
        ]
        pairs = [(text, chance.choice(summaries(each))) for text, each in zip(texts, drawn, strict=True)]
        lessons = [summary_lesson(*pair, tokenizer) for pair in pairs]
        asked = chance.sample(list(QUESTIONS), ROUNDS + 1)
        yield [*lessons, conversation_lesson(asked[1:], tokenizer), question_lesson(asked[0], tokenizer)]


def mixed_up(article: str, chance: random.Random) -> str:
    """Some of the article's sentences in random order."""
    sentences = SENTENCE.findall(article)
    kept = max(2, round(SHARE_KEPT * len(sentences)))
    gap = "" if article.endswith("。") else " "
    return gap.join(sentence.strip() for sentence in chance.sample(sentences, kept))
