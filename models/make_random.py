"""Makes a tiny Llama with random weights, and a tokenizer and chat template that are real.

    python models/make_random.py [FOLDER]

It answers nonsense, at the speed and through the code of a real model, and needs no download. The tokenizer is a
byte-level BPE trained on the text of this repository; the chat template is ChatML.
"""

import argparse
import os
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "models" / "random-llama"
VOCABULARY = 2048
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\\n{{ message['content'] }}<|im_end|>\\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(REPOSITORY.glob("*.py")) + sorted(REPOSITORY.glob("common/*.py"))
    tokenizer.train_from_iterator((source.read_text() for source in sources), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(eos_token_id: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=eos_token_id,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.2,  # ten times the usual, so that the most likely token is so by far
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=eos_token_id, pad_token_id=0)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder: Path = parser.parse_args().folder
    transformers.logging.disable_progress_bar()
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(unfinished)
    make_model(tokenizer.convert_tokens_to_ids("<|im_end|>")).save_pretrained(unfinished)
    unfinished.rename(folder)
    print(f"made {folder}")


if __name__ == "__main__":
    main()
