"""Which model this is: its folder or name on the hub, and the identity by which requests and workers are matched."""

import argparse
import hashlib
import os
from pathlib import Path

from common.errors import StartupError
from common.messages import ModelIdentity

DEFAULT_MODEL = Path(__file__).parent.parent / "models" / "pipeline-chat"
BLOCK_SIZE = 16  # tokens in a KV block, unless the programs are told otherwise


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name the model. Processor and engines of one model need the same ones."""
    parser.add_argument(
        "--model", help="folder of the model, or its name on the Hugging Face hub; default: models/pipeline-chat"
    )
    parser.add_argument("--model-name", help="what clients call it; default: the folder's name, or the name on the hub")
    parser.add_argument("--block-size", type=_positive, default=BLOCK_SIZE, help="tokens in a KV block")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def resolve_model(model: str | None) -> str:
    """The folder of `model`, or its name on the Hugging Face hub. None stands for the model of this repository.

    Raises StartupError with what to do if it is not there.
    """
    if model is None and not DEFAULT_MODEL.is_dir():
        raise StartupError("no model: name one with --model, a folder or a name on the hub like Qwen/Qwen3-0.6B")
    if model is None:
        return str(DEFAULT_MODEL)
    if os.path.isdir(model):
        return os.path.abspath(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise StartupError(f"no model at {model!r}: --model takes a folder, or a name on the hub like Qwen/Qwen3-0.6B")
    try:
        _file(model, "config.json")
    except (OSError, ValueError) as error:
        raise StartupError(f"{model!r} cannot be had from the hub: {str(error).splitlines()[0]}") from error
    return model


def identify(resolved: str, *, name: str | None = None, block_size: int = BLOCK_SIZE) -> ModelIdentity:
    """The identity of a model that `resolve_model` found. name: what clients call it, if not by its folder or hub."""
    return ModelIdentity(
        name=name or served_name(resolved), tokenizer=tokenizer_fingerprint(resolved), block_size=block_size
    )


def served_name(resolved: str) -> str:
    """What clients call a model that `resolve_model` found, unless they are told otherwise."""
    return os.path.basename(resolved) if os.path.isabs(resolved) else resolved


def tokenizer_fingerprint(resolved: str) -> str | None:
    """A short hash of the model's tokenizer.json: equal for equal tokenizers. None if the model has no such file, or it
    cannot be had now."""
    try:
        return hashlib.sha256(_file(resolved, "tokenizer.json").read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _file(resolved: str, name: str) -> Path:
    """A file of a model, downloaded if need be. Raises OSError if it cannot be had, ValueError for an invalid name."""
    if os.path.isdir(resolved):
        return Path(resolved, name)
    from huggingface_hub import hf_hub_download  # imported here, because most models are in a folder

    return Path(hf_hub_download(resolved, name))
