"""Trains the model on conversations of make_corpus.py: 80 minutes on two CPU cores, minutes on a GPU.

    python models/training/train.py [FOLDER]

With --continue, it goes on from the model in FOLDER, for a corpus that has grown: with what you added of your own.

It is a small Llama with a byte-level BPE of its own. What it learns is to answer: of the questions and system messages
only some tokens count, just enough for it to know what they look like. Every conversation is new, so there are no
epochs.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from make_corpus import Message, Texts, conversations, is_computed

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[1] / "pipeline-chat"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 3072
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | lower if message['role'] == 'user' else message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

STEPS = 15_000
WARM_UP = 300  # steps
DECAY = 0.8  # of the steps, in which the learning rate falls
BATCH = 2048  # tokens
LEARNING_RATE = 5e-3
GENTLE_LEARNING_RATE = 1e-3  # to go on without losing what is learned
QUESTION_SHARE = 0.1  # of the tokens of questions that count in the loss
NOISE = 0.05  # of the tokens of some questions are any others, so that understanding hangs on no single word
NOISY_SHARE = 0.5  # of the conversations, of those in which nothing is computed
CUT_SHARE = 0.85  # of the conversations, that end with the beginning of an answer, which is the hard part
CUT = 7  # tokens of that answer
SORTED = 4096  # conversations at a time, so that those of a batch are of one length

Batch = tuple[Tensor, Tensor]  # token ids, and which of them count in the loss


def make_tokenizer(texts: Texts, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which a small number is one token, so that sums and counts are about numbers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = itertools.islice(conversations(texts, seed), 30_000)
    tokenizer.train_from_iterator((message["content"] for messages in sample for message in messages), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, top_p=0.9, **ids)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[Message], chance: Random) -> tuple[list[int], list[bool]]:
    """A conversation's token ids, and which of them count in the loss."""
    ids: list[int] = []
    counts: list[bool] = []
    begin = 0
    computed = any(is_computed(message["content"]) for message in messages if message["role"] == "assistant")
    noise = NOISE if not computed and chance.random() < NOISY_SHARE else 0.0
    for message in messages:
        answered = message["role"] == "assistant"
        for text, share, blurred in (
            (f"<|im_start|>{message['role']}\n", QUESTION_SHARE, 0.0),
            (f"{message['content']}<|im_end|>", 1.0 if answered else QUESTION_SHARE, 0.0 if answered else noise),
            ("\n", QUESTION_SHARE, 0.0),
        ):
            if share == 1.0:
                begin = len(ids)
            tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            ids += blur(tokens, blurred, chance)
            counts += [chance.random() < share for _ in tokens]
    cut = chance.random() < CUT_SHARE and not is_computed(messages[-1]["content"])
    end = begin + CUT if cut else None
    return ids[:end], counts[:end]


def blur(tokens: list[int], share: float, chance: Random) -> list[int]:
    """Tokens of which a share is replaced by any others, the marks of the template excepted."""
    first = len(SPECIAL)
    return [
        chance.randrange(first, VOCABULARY) if token >= first and chance.random() < share else token for token in tokens
    ]


def batches(tokenizer: PreTrainedTokenizerFast, texts: Texts, seed: int) -> Iterator[Batch]:
    """Batches without end."""
    chance = Random(seed)
    stream = conversations(texts, seed)
    while True:
        encoded = sorted((encode(tokenizer, next(stream), chance) for _ in range(SORTED)), key=lambda one: len(one[0]))
        cut: list[Batch] = []
        while encoded:
            count = max(BATCH // len(encoded[-1][0]), 1)
            encoded, rows = encoded[:-count], encoded[-count:]
            cut.append((pad([ids for ids, _ in rows]), pad([counts for _, counts in rows])))
        chance.shuffle(cut)
        yield from cut


def pad(rows: list[Any]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def loss_of(model: LlamaForCausalLM, ids: Tensor, counts: Tensor) -> Tensor:
    # Causal, and padded at the end: no token sees the padding, so no mask is needed.
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    counts = counts[:, 1:]
    return nn.functional.cross_entropy(model.lm_head(hidden[counts]).float(), ids[:, 1:][counts])


def make_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, which learn faster with it than with AdamW. That has the rest."""
    layers = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    rest = [model.model.embed_tokens.weight, *(parameter for parameter in model.parameters() if parameter.ndim == 1)]
    return [
        torch.optim.Muon(layers, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, steps: int) -> float:
    """Up in a line, then level, then for most of the time down in a line, as a share of the highest."""
    return min((step + 1) / WARM_UP, 1.0, (steps - step) / (DECAY * steps))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """In bfloat16, half the size; this model's answers do not notice."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


def train(model: LlamaForCausalLM, source: Iterator[Batch], steps: int, rate: float, folder: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    model.set_attn_implementation("eager")  # the fastest for rows this short
    optimizers = make_optimizers(model, rate)
    schedules = [LambdaLR(optimizer, lambda step: learning_rate(step, steps)) for optimizer in optimizers]
    progress = tqdm(range(1, steps + 1), unit="step")
    for step in progress:
        ids, counts = (tensor.to(device) for tensor in next(source))
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, ids, counts)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if step % 1000 == 0 or step == steps:
            save(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--continue",
        action="store_true",
        dest="go_on",
        help="begin with the model that is there; take another --seed, for other conversations",
    )
    args = parser.parse_args()
    began = time.monotonic()
    transformers.logging.disable_progress_bar()
    texts = Texts()
    if args.go_on:
        tokenizer = AutoTokenizer.from_pretrained(args.folder)
        model = LlamaForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    else:
        tokenizer = make_tokenizer(texts, args.seed)
        tokenizer.save_pretrained(args.folder)
        model = make_model(tokenizer, args.seed)
    print(f"{model.num_parameters() / 1e6:.2f} million parameters")
    rate = GENTLE_LEARNING_RATE if args.go_on else LEARNING_RATE
    train(model, batches(tokenizer, texts, args.seed + 1), args.steps, rate, args.folder)
    minutes, cpu_minutes = (time.monotonic() - began) / 60, time.process_time() / 60
    print(f"trained in {minutes:.0f} minutes ({cpu_minutes:.0f} of CPU); the model is in {args.folder}")


if __name__ == "__main__":
    main()
