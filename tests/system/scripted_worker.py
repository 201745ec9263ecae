"""A worker of Dynamo's protocol that says what a test tells it, and like Dynamo's own announces nothing of itself.

Its script stands in the prompt, in hexadecimal between two marks, which no chat template changes: a list of turns, one
for each answer of the conversation. A turn has the text to say, how many tokens to say at once, and how to end:
    stop, length    the finish_reason
    error           a failure, in the worker's words
    silence         the stream ends, and nobody knows why
    cancelled       in the middle, as a worker that is being stopped, unless this one goes on for one that did so
Where the text is null it says, in hexadecimal too, what it was asked: the request, and its prompt as text.
"""

import argparse
import json
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

from common.messages import GENERATE
from common.service import parser, run

from dynamo.runtime import Context, DistributedRuntime, dynamo_worker
from tokenizers import Tokenizer

BEGIN = "<|im_start|>assistant\n"  # of an answer, in the prompt
ENDS: dict[str, Any] = {"error": {"error": "the script says so"}, "cancelled": "stop"}


def script(*turns: dict[str, Any]) -> str:
    """What to write into a message."""
    return f"script:{json.dumps(turns).encode().hex()};"


def turn(text: str | None, *, each: int = 1, end: str = "stop") -> dict[str, Any]:
    return {"text": text, "each": each, "end": end}


class ScriptedWorker:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def generate(self, request: dict[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        prompt: str = self._tokenizer.decode(request.pop("token_ids"), skip_special_tokens=False)
        said = prompt.rpartition(BEGIN)[2]  # by the template, or by the worker before this one
        *_, written = re.finditer("script:([0-9a-f]+);", prompt)
        now = json.loads(bytes.fromhex(written[1]))[prompt.count(BEGIN, written.end()) - 1]
        asked = json.dumps({"prompt": prompt, "request": request}).encode().hex()
        text = asked if now["text"] is None else now["text"]
        tokens: list[int] = self._tokenizer.encode(text.removeprefix(said), add_special_tokens=False).ids
        for begin in range(0, len(tokens), now["each"]):
            if now["end"] == "cancelled" and not said and begin > len(tokens) // 2:
                yield {"token_ids": [], "finish_reason": "cancelled"}
                return
            yield self._output(tokens[begin : begin + now["each"]], request["output_options"].get("logprobs"))
        if now["end"] != "silence":
            yield {"token_ids": [], "finish_reason": ENDS.get(now["end"], now["end"])}

    def _output(self, tokens: list[int], logprobs: int | None) -> dict[str, Any]:
        """The likelihoods are made up, and a token is its own likeliest."""
        if logprobs is None:
            return {"token_ids": tokens}
        tops = [[{"token_id": token + rank, "logprob": -0.5 - rank} for rank in range(logprobs)] for token in tokens]
        return {"token_ids": tokens, "log_probs": [-0.5] * len(tokens), "top_logprobs": tops}


@dynamo_worker()
async def main(runtime: DistributedRuntime, args: argparse.Namespace) -> None:
    worker = ScriptedWorker(Tokenizer.from_file(f"{args.model}/tokenizer.json"))
    await runtime.endpoint(GENERATE.path).serve_endpoint(worker.generate)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--model")
    sys.exit(run(main, options.parse_args()))
