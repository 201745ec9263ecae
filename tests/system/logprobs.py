"""Likelihoods by transformers alone: what the pipeline's logprobs must equal.

Reads JSON [[prompt ids, answer ids], ...] from standard input, and writes for each answer the logprobs of its tokens
and the two likeliest token ids at each place.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    results = []
    for prompt, answer in json.load(sys.stdin):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = [float(logprobs[place, token]) for place, token in enumerate(answer)]
        results.append([chosen, torch.topk(logprobs, 2).indices.tolist()])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
