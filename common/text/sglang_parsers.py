"""SGLang's parsers of what models write, without the rest of SGLang.

`import sglang` loads torch and triton: ten seconds and hundreds of megabytes. The parsers need neither. So the packages
are entered without running their `__init__`: half a second and 25 MB, and only once a parser is asked for.
"""

import functools
import importlib
import importlib.util
import re
import sys
import types
from typing import Any, NamedTuple

from common.errors import StartupError

AUTO, NONE = "auto", "none"
# Its modules with parsers of tool calls, of those that a grammar has forced, and so are JSON, and of reasoning.
TOOL_CALLS = "sglang.srt.function_call.function_call_parser"
FORCED_CALLS = "sglang.srt.function_call.json_array_parser"
REASONING = "sglang.srt.parser.reasoning_parser"
# What stands in the templates of models that SGLang's detection does not know, and how these write tool calls.
_MARKS = {"[TOOL_CALLS]": "mistral", "<|python_tag|>": "llama3", "<tool_call>": "qwen25"}


class ParserNames(NamedTuple):
    """What SGLang calls the parsers of a model; None for what it needs none for."""

    tool_calls: str | None
    reasoning: str | None


def choose(tool_calls: str, reasons: str, tokenizer: Any) -> ParserNames:
    """The parsers by the names that were given, where "auto" is what SGLang sees in the model's chat template.

    tokenizer: of transformers. Raises StartupError for a name that SGLang does not know.
    """
    template = str(tokenizer.chat_template)
    detection: Any = None
    if AUTO in (tool_calls, reasons) and re.search("tool|think|reason", template):
        detection = module("sglang.srt.parser.template_detection")
    always, config = detection.detect_reasoning_pattern(template) if detection else (False, None)
    if tool_calls == AUTO:
        marked = next((parser for mark, parser in _MARKS.items() if mark in template), NONE)
        tool_calls = (detection and detection.detect_tool_call_parser(template, tokenizer, config, always)) or marked
    if reasons == AUTO:
        reasons = (detection and detection.detect_reasoning_parser(template, tokenizer, config, always)) or NONE
    if tool_calls != NONE:
        _check(tool_calls, module(TOOL_CALLS).FunctionCallParser.ToolCallParserEnum, "--tool-call-parser")
    if reasons != NONE:
        _check(reasons, module(REASONING).ReasoningParser.DetectorMap, "--reasoning-parser")
    return ParserNames(None if tool_calls == NONE else tool_calls, None if reasons == NONE else reasons)


def _check(name: str, known: dict[str, Any], option: str) -> None:
    if name not in known:
        raise StartupError(f"{option} {name}: SGLang has no such parser; it has {', '.join(sorted(known))}")


@functools.cache
def module(name: str) -> Any:
    """A module of SGLang, by its name. Raises StartupError if that is not installed."""
    if "sglang" not in sys.modules:
        _enter("sglang")
        xgrammar = _enter("xgrammar")
        xgrammar.StructuralTag = importlib.import_module("xgrammar.structural_tag").StructuralTag
        tags = importlib.import_module("xgrammar.builtin_structural_tag")
        xgrammar.get_model_structural_tag = tags.get_model_structural_tag
        # Of use to SGLang's server only, and what loads torch.
        overrides: Any = types.ModuleType("sglang.srt.arg_groups.overrides")
        overrides.declare_resolution = overrides.resolving_view = None
        sys.modules[overrides.__name__] = overrides
    return importlib.import_module(name)


def _enter(name: str) -> Any:
    """Make the modules of a package known, without those that its `__init__` imports."""
    spec = importlib.util.find_spec(name)
    if not spec or not spec.submodule_search_locations:
        raise StartupError(f"{name} is not installed; its parsers are needed for tools and reasoning")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    return package
