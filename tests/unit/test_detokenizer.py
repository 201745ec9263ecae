"""Tokens become text as soon as their characters are whole, and no sooner."""

import random

from common.text.detokenizer import Detokenizer

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BROKEN = "\ufffd"
TEXTS = [
    "plain words, and  spaces \n\n and tabs\t.",
    "héllo wörld — ñandú",
    "日本語と中文字與한국어",
    "العربية हिन्दी עברית",
    "😀👨‍👩‍👧‍👦🏳️‍🌈 flags 🇫🇷",
    f"the model itself may say {BROKEN}, you know",
]


def byte_level() -> Tokenizer:
    """Every token a few bytes, so that characters are cut everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(["hello world", "日本語"] * 9, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As in Llama 2 and Gemma: words with a mark for the space, and single bytes for what is in no word."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "▁a": 257, "b": 258, "c": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add([token_id]) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_text(text: str) -> None:
    tokenizer = byte_level()
    assert "".join(pieces(tokenizer, tokenizer.encode(text).ids)) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if BROKEN not in text])
def test_no_piece_is_broken(text: str) -> None:
    tokenizer = byte_level()
    assert BROKEN not in "".join(pieces(tokenizer, tokenizer.encode(text).ids))


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = byte_level()
    ids = [byte_id for byte in "é😀".encode() for byte_id in [tokenizer.token_to_id(byte_symbol(byte))]]
    assert pieces(tokenizer, ids) == ["", "é", "", "", "", "😀", ""]


def test_bytes_that_are_no_character_wait_for_three_tokens_at_most() -> None:
    tokenizer = byte_level()
    lone = tokenizer.token_to_id(byte_symbol(0x80))
    assert pieces(tokenizer, [lone] * 6) == ["", "", "", BROKEN, BROKEN, BROKEN, BROKEN * 3]


def test_an_answer_cut_in_a_character_says_so_at_the_end() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.token_to_id(byte_symbol(byte)) for byte in "中".encode()[:2]]
    assert pieces(tokenizer, ids) == ["", "", BROKEN]


def test_any_tokens_decode_as_they_do_at_once() -> None:
    tokenizer = byte_level()
    chance = random.Random(1)
    for _ in range(300):
        ids = [chance.randrange(tokenizer.get_vocab_size()) for _ in range(chance.randrange(1, 60))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_however_the_tokens_are_cut_into_pieces() -> None:
    tokenizer = byte_level()
    chance = random.Random(2)
    for text in TEXTS * 20:
        ids = tokenizer.encode(text).ids
        detokenizer, made = Detokenizer(tokenizer), ""
        while ids:
            count = chance.randrange(1, 9)
            piece, ids = detokenizer.add(ids[:count]), ids[count:]
            assert BROKEN in text or BROKEN not in piece
            made += piece
        assert made + detokenizer.flush() == text


def test_special_tokens_are_silent() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("hello").ids
    end = tokenizer.token_to_id("<end>")
    assert "".join(pieces(tokenizer, [end, *ids, end])) == "hello"


def test_spaces_and_bytes_of_a_fallback_tokenizer() -> None:
    tokenizer = byte_fallback()
    ids = [257, 258, 257, *"中文😀".encode(), 259, 256, 258]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == "ab a中文😀c b"
    assert BROKEN not in "".join(pieces(tokenizer, ids))


def byte_symbol(byte: int) -> str:
    """The letter that stands for a byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))
