"""Tool calls in what a model writes."""

import json
import logging
import uuid
from collections.abc import Sequence
from typing import Any

from common.errors import InvalidRequest
from common.openai_api import FunctionDelta, ToolCallDelta
from common.openai_request import ANY, ChatCompletionRequest, Function
from common.text.sglang_parsers import FORCED_CALLS, TOOL_CALLS, module

log = logging.getLogger(__name__)


class ToolCalls:
    """Finds the calls in one answer as its text comes: what is part of none goes on as text.

    SGLang's parsers find them on the way. What they hold back when the text ends, and what they drop because it only
    looked like a call, comes at the end, when the whole text is parsed once more.
    """

    def __init__(self, functions: Sequence[Function], parser: str | None, *, parallel: bool = True) -> None:
        """parser: SGLang's name for how the model writes calls; None if a grammar has forced it to write JSON;
        parallel: whether more calls than one go on."""
        self._tools = _sglang_tools(functions)
        self._name = parser
        self._parallel = parallel
        self._stream = self._parser()
        self._text = ""
        self._given = ""  # of the text, as text
        self._sent: list[str] = []  # of the arguments of each call, what has gone out

    @property
    def found(self) -> bool:
        """Whether a call has gone out."""
        return bool(self._sent)

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """The text, and what is new of calls, that `text` decides: the text of one token, or a little more. After the
        last, nothing is held back."""
        self._text += text
        plain, deltas = "", list[ToolCallDelta]()
        more = text != ""
        while more:  # it may say the name of a call first, and its arguments when asked again
            normal, items = self._parse(text)
            deltas += [self._delta(item.tool_index, item.name, _arguments(item.parameters)) for item in items]
            # Around a call, parsers give out what belongs to it, and they drop text that looks like one. So from where
            # theirs is not the model's text, and from the first call, it waits for the end.
            if not self._sent and self._text.startswith(self._given + normal):
                self._given += normal
                plain += normal
            text, more = "", bool(normal or items)
        if last:
            rest, held_back = self._rest()
            plain, deltas = plain + rest, deltas + held_back
        return plain, deltas if self._parallel else [delta for delta in deltas if delta.index == 0]

    def _rest(self) -> tuple[str, list[ToolCallDelta]]:
        """What was held back."""
        normal, calls = self._whole()
        if not calls:
            normal = "" if self._sent else self._text
        deltas = []
        for index, (name, arguments) in enumerate(calls):
            sent = self._sent[index] if index < len(self._sent) else None
            if sent is None:
                deltas.append(self._delta(index, name, arguments))
            elif arguments.startswith(sent) and arguments != sent:
                deltas.append(self._delta(index, None, arguments[len(sent) :]))
        rest = normal[len(self._given) :] if normal.startswith(self._given) else ""
        return rest, deltas

    def _parse(self, text: str) -> tuple[str, list[Any]]:
        result = self._stream.parse_streaming_increment(text, self._tools)
        return result.normal_text or "", [item for item in result.calls if item.name or item.parameters]

    def _whole(self) -> tuple[str, list[tuple[str, str]]]:
        """The text of the whole answer, and the name and the arguments of each call in it."""
        try:
            if self._name:
                result = self._parser().detect_and_parse(self._text, self._tools)
                return result.normal_text, [(item.name, _arguments(item.parameters)) for item in result.calls]
            written = json.loads(self._text)
            calls = written if isinstance(written, list) else [written]
            return "", [(call["name"], json.dumps(call["parameters"], ensure_ascii=False)) for call in calls]
        except Exception as error:  # a parser can fail in any way at an answer that was cut off
            log.debug("no whole tool calls: %r", error)
            return "", []

    def _delta(self, index: int, name: str | None, arguments: str) -> ToolCallDelta:
        if name is None or index < len(self._sent):
            self._sent[index] += arguments
            return ToolCallDelta(index=index, function=FunctionDelta(arguments=arguments))
        self._sent.append(arguments)
        return _begin(index, name, arguments)

    def _parser(self) -> Any:
        if not self._name:
            return module(FORCED_CALLS).JsonArrayParser()
        return module(TOOL_CALLS).FunctionCallParser(self._tools, self._name).detector


def _arguments(written: str) -> str:
    """Arguments as clients expect them: a function without any has an empty object of them."""
    return "{}" if written == "null" else written


class NamedCall:
    """The call of a function that must be called: a grammar has forced the whole answer to be its arguments."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.found = False

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """As in ToolCalls."""
        if not text:
            return "", []
        if self.found:
            return "", [ToolCallDelta(index=0, function=FunctionDelta(arguments=text))]
        self.found = True
        return "", [_begin(0, self._name, text)]


def _begin(index: int, name: str, arguments: str) -> ToolCallDelta:
    function = FunctionDelta(name=name, arguments=arguments)
    return ToolCallDelta(index=index, id=f"call_{uuid.uuid4().hex[:24]}", type="function", function=function)


def together(deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
    """The same with what follows in a call added to what came before."""
    joined: list[ToolCallDelta] = []
    for delta in deltas:
        if joined and joined[-1].index == delta.index:
            function = joined[-1].function
            function.arguments = (function.arguments or "") + (delta.function.arguments or "")
        else:
            joined.append(delta)
    return joined


def tool_calls_of(request: ChatCompletionRequest, parser: str | None) -> ToolCalls | NamedCall | None:
    """What finds the calls in an answer to `request`; None if there can be none.

    parser: SGLang's name for how the model writes calls by its own choice, if it can.
    """
    parallel = request.parallel_tool_calls is not False
    if request.must_call == ANY:
        return ToolCalls(request.known_functions, None, parallel=parallel)
    if request.must_call:
        return NamedCall(request.must_call)
    if parser and request.callable_functions and not request.constraint:
        return ToolCalls(request.callable_functions, parser, parallel=parallel)
    return None


def constraint_of(request: ChatCompletionRequest, parser: str | None) -> dict[str, Any] | None:
    """The form that an answer to `request` must have, as Dynamo's workers take it; None if it is free.

    Calls that must be made are JSON. Those that may be made are as the model writes them, with arguments that are valid
    if a tool is strict. Raises InvalidRequest if the tools' schemas do not go together.
    """
    parallel = request.parallel_tool_calls is not False
    functions = request.callable_functions
    try:
        if request.must_call == ANY:
            schema_of = module("sglang.srt.function_call.utils").get_json_schema_constraint
            return {"json": schema_of(_sglang_tools(functions), "required", parallel_tool_calls=parallel)}
        if request.must_call:
            named = next(function for function in functions if function.name == request.must_call)
            return {"json": named.parameters or {"type": "object", "additionalProperties": False}}
        if request.constraint or not parser or not any(function.strict for function in functions):
            return request.constraint
        made = module(TOOL_CALLS).FunctionCallParser(_sglang_tools(functions), parser)
        kind, form = made.get_structure_constraint("auto", parallel)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"tools: {error}", param="tools") from error
    return {"structural_tag": form.model_dump()} if kind == "structural_tag" else {"json": form}


def _sglang_tools(functions: Sequence[Function]) -> list[Any]:
    tool: Any = module(TOOL_CALLS).Tool
    return [tool(type="function", function=function.model_dump(exclude_none=True)) for function in functions]
