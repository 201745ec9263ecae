"""Answers with transformers alone: what the pipeline's greedy answers must equal, and its logprobs.

Reads JSON from standard input, a list of
    [messages, max_tokens]         for the greedy answer
    [prompt ids, answer ids]       for the logprob of each token of an answer, and the likeliest in its place
and writes the list of results.
"""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LIKELIEST = 3


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)

    def answer(messages: Any, max_tokens: int) -> str:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, do_sample=False, max_new_tokens=max_tokens)
        text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    @torch.no_grad()
    def logprobs(prompt: list[int], tokens: list[int]) -> dict[str, Any]:
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        all_of_them = torch.log_softmax(logits, dim=-1)
        top = torch.topk(all_of_them, LIKELIEST)
        return {
            "logprobs": [float(all_of_them[place, token]) for place, token in enumerate(tokens)],
            "top_ids": top.indices.tolist(),
            "top_logprobs": top.values.tolist(),
        }

    asked = json.load(sys.stdin)
    json.dump([answer(*pair) if isinstance(pair[1], int) else logprobs(*pair) for pair in asked], sys.stdout)


if __name__ == "__main__":
    main()
