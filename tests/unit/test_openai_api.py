"""What a client may send, and what it is told about what it may not."""

from typing import Any

from common.errors import InvalidRequest
from common.openai_request import ANY, ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

import pytest

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
GO_ON = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Well"}]}
TEXT = {"model": "m", "prompt": "once"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL_F = {"type": "function", "function": {"name": "f"}}
CALL_G = {"type": "function", "function": {"name": "g"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.decode({**HELLO, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.decode({**TEXT, **fields})


class TestChat:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"messages": [{"role": role, "content": "x"} for role in ("system", "developer", "user", "tool")]},
            {"messages": [{"role": "function", "name": "f", "content": "x"}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"a": 1}}]}]},
            {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}]},
            {"messages": [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "x"}]},
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
            {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "no JSON"}}]},
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1", "name": "f", "more": [1]}]},
            {"max_tokens": 1, "temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "seed": -1},
            {"max_tokens": 0},
            {"max_completion_tokens": 0},
            {"max_tokens": 5, "max_completion_tokens": 5},
            {"top_p": 0, "temperature": 0},
            {"n": 1},
            {"n": 128},
            {"stop": "x"},
            {"stop": ["a", "b", "c", "d"]},
            {"stop_token_ids": [1, 2], "min_tokens": 3, "skip_special_tokens": False},
            {"stop": None, "max_tokens": None, "temperature": None},
            {"stream": None, "ignore_eos": None, "stream_options": None},
            {"stream": True, "stream_options": {"include_usage": None}},
            {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
            {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.1, "ignore_eos": True},
            {"logit_bias": {"5": -100, "6": 1.5}},
            {"logprobs": False},
            {"logprobs": True},
            {"logprobs": True, "top_logprobs": 20},
            {"tools": []},
            {"tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": False},
            {"tools": [TOOL], "tool_choice": "auto"},
            {"tools": [TOOL], "tool_choice": "required"},
            {"tools": [TOOL], "tool_choice": CALL_F},
            {"tool_choice": "auto"},
            {"functions": [{"name": "f"}], "function_call": {"name": "f"}},
            {"functions": [{"name": "f"}], "function_call": "none"},
            {"response_format": {"type": "text"}},
            {"response_format": {"type": "json_object"}},
            {"response_format": NAMED_SCHEMA},
            {"structured_outputs": {"choice": ["a", "b"]}},
            {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"},
            {**GO_ON, "continue_final_message": True, "add_generation_prompt": False},
            {"user": "u", "prompt_cache_key": "k", "metadata": {}, "store": True, "service_tier": "auto"},
            {"verbosity": "low", "prediction": {}, "modalities": ["text"], "safety_identifier": "s"},
            {"audio": None, "web_search_options": None, "prompt_logprobs": None, "store": None},
            {"use_beam_search": False, "include_stop_str_in_output": False},
        ],
    )
    def test_accepted_and_passed_on_as_it_came(self, fields: dict[str, Any]) -> None:
        request = chat(**fields)
        assert request.ignored == []
        assert ChatCompletionRequest.decode(request.encode()) == request

    @pytest.mark.parametrize(
        ("fields", "param", "says"),
        [
            ({"model": 5}, "model", "valid string"),
            ({"model": None}, "model", "required"),
            ({"messages": []}, "messages", "at least 1"),
            ({"messages": "x"}, "messages", "valid list"),
            ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'user'"),
            ({"messages": [{"role": "user"}]}, "messages[0]", "needs content"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
            ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]", "valid dict"),
            (
                {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
                "messages[0].content[0]",
                "no field text",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                "messages[0].content[0]",
                "content of type image_url is not supported: send text only",
            ),
            ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls", "valid list"),
            ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls[0]", "valid dict"),
            (
                {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
                "messages[0].tool_calls[0].function",
                "required",
            ),
            ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 5}]}, "messages[0].tool_call_id", "string"),
            ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
            ({"max_tokens": "5"}, "max_tokens", "valid integer"),
            ({"max_tokens": True}, "max_tokens", "valid integer"),
            ({"max_tokens": 1, "max_completion_tokens": 2}, None, "different things"),
            ({"max_tokens": 5, "max_completion_tokens": 0}, None, "different things"),
            ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
            ({"temperature": float("nan")}, "temperature", "finite"),
            ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
            ({"top_p": 0}, None, "top_p must be greater than 0, unless temperature is 0"),
            ({"top_p": 0, "temperature": 1}, None, "top_p must be greater than 0"),
            ({"top_k": -2}, "top_k", "greater than or equal to -1"),
            ({"min_p": 2}, "min_p", "less than or equal to 1"),
            ({"seed": 2**63}, "seed", "less than or equal"),
            ({"n": 0}, "n", "greater than or equal to 1"),
            ({"n": 129}, "n", "less than or equal to 128"),
            ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
            ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
            ({"logit_bias": {"5": 101}}, "logit_bias", "a number from -100 to 100"),
            ({"logit_bias": {"five": 1}}, "logit_bias", "it needs token ids"),
            ({"logprobs": 1}, "logprobs", "valid boolean"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
            ({"top_logprobs": 2}, None, "top_logprobs is only allowed when logprobs is true"),
            ({"stop": ["a"] * 5}, "stop", "at most 4"),
            ({"stop": ""}, "stop", "empty"),
            ({"stop": [5]}, "stop[0]", "valid string"),
            ({"stream": "yes"}, "stream", "valid boolean"),
            ({"stream_options": {"include_usage": True}}, None, "only allowed when stream"),
            ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
            ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
            ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name", "match pattern"),
            ({"tool_choice": "maybe"}, "tool_choice", "'required'"),
            ({"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
            ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
            ({"response_format": {"type": "json_schema"}}, "response_format", "go together"),
            ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
            ({"guided_json": "{"}, None, "the schema is not valid JSON"),
            ({"guided_json": 5}, "guided_json", "valid"),
            ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "valid"),
            ({"guided_json": "[]"}, None, "the schema must be a JSON object"),
            ({"continue_final_message": True}, None, "needs an assistant message at the end"),
            (
                {**GO_ON, "continue_final_message": True, "add_generation_prompt": True},
                None,
                "no add_generation_prompt",
            ),
        ],
    )
    def test_refused_with_the_field_and_the_reason(self, fields: dict[str, Any], param: str | None, says: str) -> None:
        with pytest.raises(InvalidRequest) as refusal:
            chat(**fields)
        assert refusal.value.param == param
        assert says in refusal.value.message

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"audio": {"voice": "x"}}, "audio"),
            ({"modalities": ["text", "audio"]}, "modalities[1]"),
            ({"web_search_options": {}}, "web_search_options"),
            ({"prompt_logprobs": 1}, "prompt_logprobs"),
            ({"use_beam_search": True}, "use_beam_search"),
            ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ],
    )
    def test_what_would_change_the_answer_and_is_not_to_be_had_is_refused(
        self, fields: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(InvalidRequest, match=r"is not supported by this pipeline$") as refusal:
            chat(**fields)
        assert refusal.value.param == param

    @pytest.mark.parametrize(
        ("fields", "ignored"),
        [
            ({"max_token": 5}, ["max_token"]),
            ({"a[b]": 5, "[": 5, "str": 5}, ["a[b]", "[", "str"]),
            ({"max_token": None}, []),
            ({"stream": True, "stream_options": {"xyz": 1}}, ["stream_options.xyz"]),
            ({"response_format": {**NAMED_SCHEMA, "x": 1}}, ["response_format.x"]),
            ({"messages": [{"role": "user", "content": "x", "mood": "bad"}], "tools": [{**TOOL, "x": 1}]}, []),
        ],
    )
    def test_what_nobody_knows_is_ignored_and_named(self, fields: dict[str, Any], ignored: list[str]) -> None:
        """But of messages and tools the chat template may know more."""
        assert chat(**fields).ignored == ignored

    @pytest.mark.parametrize("body", [[], None, 5, "x"])
    def test_body_must_be_an_object(self, body: Any) -> None:
        with pytest.raises(InvalidRequest, match="must be a JSON object"):
            ChatCompletionRequest.decode(body)

    def test_missing_field_has_its_code(self) -> None:
        with pytest.raises(InvalidRequest) as refusal:
            ChatCompletionRequest.decode({"messages": HELLO["messages"]})
        assert (refusal.value.param, refusal.value.code) == ("model", "missing_required_parameter")

    def test_parts_are_joined(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
        assert chat(messages=[{"role": "assistant", "content": parts}]).messages[0].text == "ab"

    @pytest.mark.parametrize(
        ("fields", "limit"),
        [
            ({}, None),
            ({"max_tokens": 5}, 5),
            ({"max_completion_tokens": 6}, 6),
            ({"max_completion_tokens": 0}, 0),
            ({"max_tokens": 0}, 0),
        ],
    )
    def test_the_limit_has_two_names(self, fields: dict[str, Any], limit: int | None) -> None:
        assert chat(**fields).token_limit == limit

    @pytest.mark.parametrize(
        ("fields", "wanted"),
        [
            ({}, None),
            ({"logprobs": False}, None),
            ({"logprobs": True}, 0),
            ({"logprobs": True, "top_logprobs": 3}, 3),
        ],
    )
    def test_the_wanted_logprobs(self, fields: dict[str, Any], wanted: int | None) -> None:
        assert chat(**fields).wanted_logprobs == wanted

    def test_a_template_gets_parts_as_one_text_and_arguments_as_an_object(self) -> None:
        """As vLLM and SGLang hand them over, and as templates are written."""
        calls = [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}},
            {"id": "3", "type": "function", "function": {"name": "h", "arguments": "no JSON"}},
        ]
        said = {"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": calls, "mood": "good"}
        form = chat(messages=[said]).messages[0].template_form
        assert (form["content"], form["mood"]) == ("a", "good")
        assert [call["function"]["arguments"] for call in form["tool_calls"]] == [{"a": 1}, {}, "no JSON"]
        assert form.keys() == {"role", "content", "tool_calls", "mood"}

    def test_a_template_gets_its_variables(self) -> None:
        fields = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
        assert chat(**fields).template_variables == {"reasoning_effort": "low", "enable_thinking": False}
        assert chat().template_variables == {}


class TestTools:
    @pytest.mark.parametrize(
        ("fields", "must_call", "callable_functions"),
        [
            ({}, None, []),
            ({"tools": [TOOL]}, None, ["f"]),
            ({"tools": [TOOL], "tool_choice": "auto"}, None, ["f"]),
            ({"tools": [TOOL], "tool_choice": "none"}, None, []),
            ({"tools": [TOOL], "tool_choice": "required"}, ANY, ["f"]),
            ({"tools": [TOOL], "tool_choice": CALL_F}, "f", ["f"]),
            ({"functions": [{"name": "f"}]}, None, ["f"]),
            ({"functions": [{"name": "f"}], "function_call": "none"}, None, []),
            ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "f", ["f"]),
        ],
    )
    def test_what_may_and_what_must_be_called(
        self, fields: dict[str, Any], must_call: str | None, callable_functions: list[str]
    ) -> None:
        request = chat(**fields)
        assert request.must_call == must_call
        assert [function.name for function in request.callable_functions] == callable_functions
        assert [tool.function.name for tool in request.template_tools] == callable_functions

    def test_a_tool_may_have_any_name(self) -> None:
        tools = [TOOL, {"function": {"name": "required"}}]
        request = chat(tools=tools, tool_choice={"function": {"name": "required"}})
        assert request.must_call == "required" != ANY

    @pytest.mark.parametrize(
        "fields",
        [
            {"tool_choice": "required"},
            {"tools": [], "tool_choice": "required"},
            {"tool_choice": CALL_F},
            {"tools": [TOOL], "tool_choice": CALL_G},
            {"functions": [{"name": "f"}], "function_call": {"name": "g"}},
        ],
    )
    def test_a_call_of_a_tool_that_is_not_there_cannot_be_wanted(self, fields: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequest, match="no such tool is among the tools"):
            chat(**fields)


class TestConstraint:
    @pytest.mark.parametrize(
        ("fields", "constraint"),
        [
            ({}, None),
            ({"response_format": {"type": "text"}}, None),
            ({"structured_outputs": {}}, None),
            ({"structured_outputs": {"json_object": False}}, None),
            ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
            ({"response_format": NAMED_SCHEMA}, {"json": SCHEMA}),
            ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, {"json": {}}),
            ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
            ({"structured_outputs": {"json": '{"type": "object"}'}}, {"json": {"type": "object"}}),
            ({"structured_outputs": {"json_object": True}}, {"json": {"type": "object"}}),
            ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
            ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
            ({"structured_outputs": {"grammar": "root ::= [a]"}}, {"grammar": "root ::= [a]"}),
            ({"guided_json": SCHEMA}, {"json": SCHEMA}),
            ({"guided_json": '{"type": "object"}'}, {"json": {"type": "object"}}),
            ({"guided_regex": "a+"}, {"regex": "a+"}),
            ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
            ({"guided_grammar": "root ::= [a]"}, {"grammar": "root ::= [a]"}),
            ({"json_schema": '{"type": "object"}'}, {"json": {"type": "object"}}),
            ({"regex": "a+"}, {"regex": "a+"}),
            ({"ebnf": "root ::= [a]"}, {"grammar": "root ::= [a]"}),
        ],
    )
    def test_there_are_many_ways_to_say_it(self, fields: dict[str, Any], constraint: dict[str, Any] | None) -> None:
        for request in (chat(**fields), completion(**fields)):
            assert request.constraint == constraint
            assert type(request).decode(request.encode()).constraint == constraint

    @pytest.mark.parametrize(
        "fields",
        [
            {"response_format": {"type": "json_object"}, "regex": "a"},
            {"guided_json": SCHEMA, "json_schema": "{}"},
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            {"guided_choice": ["a"], "ebnf": "root ::= [a]"},
        ],
    )
    def test_an_answer_has_one_form_only(self, fields: dict[str, Any]) -> None:
        for decode in (chat, completion):
            with pytest.raises(InvalidRequest, match="one form only"):
                decode(**fields)


class TestCompletion:
    @pytest.mark.parametrize(
        ("prompt", "prompts"),
        [
            ("once", ["once"]),
            (["once", "twice"], ["once", "twice"]),
            ([1, 2], [[1, 2]]),
            ([[1, 2], [3]], [[1, 2], [3]]),
        ],
    )
    def test_a_prompt_has_four_forms(self, prompt: Any, prompts: Any) -> None:
        request = completion(prompt=prompt)
        assert request.prompts == prompts
        assert CompletionRequest.decode(request.encode()) == request

    @pytest.mark.parametrize("prompt", [5, True, [1, "x"], ["x", 1], ["x", [1]], [1.5], [True], {}])
    def test_and_no_other(self, prompt: Any) -> None:
        with pytest.raises(InvalidRequest) as refusal:
            completion(prompt=prompt)
        assert str(refusal.value.param).startswith("prompt")

    def test_there_must_be_one(self) -> None:
        with pytest.raises(InvalidRequest, match="prompt must not be empty"):
            completion(prompt=[])
        with pytest.raises(InvalidRequest, match="required") as refusal:
            CompletionRequest.decode({"model": "m"})
        assert (refusal.value.param, refusal.value.code) == ("prompt", "missing_required_parameter")

    @pytest.mark.parametrize(
        "fields",
        [
            {"echo": True, "max_tokens": 0},
            {"logprobs": 0},
            {"logprobs": 20},
            {"n": 2, "best_of": 3},
            {"best_of": 128},
            {"n": 2, "best_of": 2, "stream": True},
            {"suffix": None},
            {"suffix": ""},
            {"stop": ["a", "b"], "seed": 1, "user": "u", "logit_bias": {"1": 1}},
        ],
    )
    def test_accepted(self, fields: dict[str, Any]) -> None:
        assert completion(**fields).ignored == []

    @pytest.mark.parametrize(
        ("fields", "param", "says"),
        [
            ({"echo": True, "logprobs": 0}, None, "echo with logprobs is not supported"),
            ({"echo": True, "logprobs": 2}, None, "echo with logprobs is not supported"),
            ({"logprobs": True}, "logprobs", "valid integer"),
            ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
            ({"n": 3, "best_of": 2}, None, "best_of must not be less than n"),
            ({"best_of": 129}, "best_of", "less than or equal to 128"),
            ({"best_of": 2, "stream": True}, None, "best_of cannot be streamed"),
            ({"suffix": "x"}, "suffix", "is not supported by this pipeline"),
            ({"prompt_logprobs": 1}, "prompt_logprobs", "is not supported by this pipeline"),
        ],
    )
    def test_refused_with_the_field_and_the_reason(self, fields: dict[str, Any], param: str | None, says: str) -> None:
        with pytest.raises(InvalidRequest) as refusal:
            completion(**fields)
        assert refusal.value.param == param
        assert says in refusal.value.message

    def test_what_only_chats_have_is_ignored(self) -> None:
        assert completion(tools=[TOOL], max_completion_tokens=5).ignored == ["tools", "max_completion_tokens"]

    def test_it_is_short_unless_something_else_is_said(self) -> None:
        limits = [completion(**fields).token_limit for fields in ({}, {"max_tokens": 0}, {"max_tokens": 99})]
        assert limits == [16, 0, 99]

    @pytest.mark.parametrize(("fields", "wanted"), [({}, None), ({"logprobs": 0}, 0), ({"logprobs": 3}, 3)])
    def test_the_wanted_logprobs(self, fields: dict[str, Any], wanted: int | None) -> None:
        assert completion(**fields).wanted_logprobs == wanted


class TestTokens:
    @pytest.mark.parametrize("fields", [{"prompt": "x"}, {"prompt": ""}, {"messages": HELLO["messages"]}])
    def test_text_or_a_conversation_can_be_tokenized(self, fields: dict[str, Any]) -> None:
        request = TokenizeRequest.decode(fields)
        assert TokenizeRequest.decode(request.encode()) == request

    @pytest.mark.parametrize("fields", [{}, {"prompt": "x", "messages": HELLO["messages"]}])
    def test_but_not_both_and_not_nothing(self, fields: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequest, match="send either prompt or messages"):
            TokenizeRequest.decode(fields)

    @pytest.mark.parametrize("tokens", [[-1], [2**31], ["x"], "x"])
    def test_what_can_be_no_token_has_no_text(self, tokens: Any) -> None:
        with pytest.raises(InvalidRequest, match="tokens"):
            DetokenizeRequest.decode({"tokens": tokens})
