"""The model is asked in the form in which it learned."""

import itertools
from random import Random

import train
from make_corpus import Texts, conversations

import pytest
from transformers import AutoTokenizer


def test_what_is_learned_is_what_the_chat_template_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "NOISE", 0.0)
    monkeypatch.setattr(train, "CUT_SHARE", 0.0)
    tokenizer = AutoTokenizer.from_pretrained(train.FOLDER)
    for messages in itertools.islice(conversations(Texts(), seed=0), 200):
        ids, counts = train.encode(tokenizer, messages, Random(0))
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
        assert len(counts) == len(ids)


def test_questions_are_lower_case_to_the_model() -> None:
    tokenizer = AutoTokenizer.from_pretrained(train.FOLDER)
    asked = [[{"role": "user", "content": text}] for text in ("WHAT IS THE KV Cache?", "what is the kv cache?")]
    loud, quiet = (tokenizer.apply_chat_template(messages, tokenize=False) for messages in asked)
    assert loud == quiet
