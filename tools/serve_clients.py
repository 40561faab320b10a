#!/usr/bin/env python3
"""Runs the official `openai` and `anthropic` clients against `anser serve`.

    pip install openai anthropic
    tools/serve_clients.py target/release/anser [--model M]
"""

import json
import os
import subprocess
import sys

import anthropic
import openai

KEY = "a-key-for-this-test"


def check(what, condition, shown=""):
    if not condition:
        sys.exit(f"FAILED: {what} {shown}")
    print(f"ok: {what}")


def refused(kind, call):
    try:
        call()
    except kind as e:
        return e
    return None


def models_and_completions(client):
    model = client.models.list().data[0].id
    check("the model's name", client.models.retrieve(model).id == model)
    whole = client.completions.create(model=model, prompt="He took her by the", max_tokens=12, temperature=0, logprobs=2)
    choice = whole.choices[0]
    check("completion", whole.usage.completion_tokens == 12 and "".join(choice.logprobs.tokens) == choice.text, choice)
    stream = client.completions.create(model=model, prompt="He took her by the", max_tokens=12, temperature=0, stream=True)
    check("completion in pieces", "".join(c.choices[0].text for c in stream) == choice.text)
    return model


def chat(client, model):
    ask = dict(model=model, messages=[{"role": "user", "content": "Who are you?"}], max_tokens=16, temperature=0)
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2, n=2, seed=1)
    text = whole.choices[0].message.content
    check("chat", len(whole.choices) == 2 and whole.choices[1].message.content == text)
    check("its log probabilities", len(whole.choices[0].logprobs.content[0].top_logprobs) == 2)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    check("chat in pieces", "".join(pieces) == text and len(pieces) > 2, pieces)
    check("usage at the end", chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens)
    check("a prompt that was read is not read again", chunks[-1].usage.prompt_tokens_details.cached_tokens > 0)
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    made = client.chat.completions.create(**{**ask, "max_tokens": 60}, response_format=form)
    check("an answer of a JSON schema", isinstance(json.loads(made.choices[0].message.content)["yes"], bool))
    kept = client.chat.completions.create(**ask, extra_body={"save_as": "talk"})
    more = {**ask, "messages": [{"role": "user", "content": "Why?"}]}
    again = [client.chat.completions.create(**more, extra_body={"state": "talk"}).choices[0].message.content for _ in "ab"]
    check("a conversation that goes on from a state", again[0] == again[1] and kept.choices[0].message.content == text)


WEATHER = {
    "type": "object",
    "properties": {"place": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["place", "days"],
    "additionalProperties": False,
}


def right(name, arguments):
    return name == "weather" and set(arguments) == {"place", "days"} and 1 <= arguments["days"] <= 9


def tools(client, model):
    function = {"name": "weather", "description": "Of a place", "parameters": WEATHER, "strict": True}
    said = [{"role": "user", "content": "Will it rain in Rome?"}]
    ask = dict(model=model, messages=said, max_tokens=200, temperature=0, tools=[{"type": "function", "function": function}])
    named = {"type": "function", "function": {"name": "weather"}}
    whole = client.chat.completions.create(**ask, tool_choice=named).choices[0]
    call = whole.message.tool_calls[0]
    check("a call", whole.finish_reason == "tool_calls" and right(call.function.name, json.loads(call.function.arguments)), whole)
    with client.chat.completions.stream(**ask, tool_choice=named) as stream:
        kinds = {event.type for event in stream}
        last = stream.get_final_completion().choices[0]
    same = last.message.tool_calls[0].function.arguments == call.function.arguments
    check("a call in pieces", same and "tool_calls.function.arguments.delta" in kinds and last.finish_reason == "tool_calls", kinds)
    output = {"role": "tool", "tool_call_id": call.id, "content": "Sun"}
    more = [*said, whole.message.model_dump(exclude_none=True), output]
    after = client.chat.completions.create(**{**ask, "messages": more}, tool_choice="none").choices[0]
    check("what came of it", after.message.content is not None and after.message.tool_calls is None, after)


def responses(client, model):
    ask = dict(model=model, input="Who are you?", max_output_tokens=100, temperature=0, extra_body={"stop": ["."]})
    whole = client.responses.create(**ask, instructions="Be brief.")
    check("a response", whole.output_text and whole.usage.output_tokens > 0 and whole.status == "completed", whole)
    with client.responses.stream(**ask, instructions="Be brief.") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        last = stream.get_final_response()
    check("a response in pieces", text == whole.output_text == last.output_text, last)
    kept = client.responses.retrieve(whole.id)
    check("a stored response", kept.output_text == whole.output_text)
    after = client.responses.create(**{**ask, "input": "Why?"}, previous_response_id=whole.id)
    check("what goes on from it", after.usage.input_tokens_details.cached_tokens >= whole.usage.input_tokens, after.usage)
    client.responses.delete(whole.id)
    check("a deleted response", refused(openai.NotFoundError, lambda: client.responses.retrieve(whole.id)) is not None)
    thoughtful = client.responses.create(**{**ask, "max_output_tokens": 16}, reasoning={"effort": "medium"})
    check("thoughts", thoughtful.output[0].type == "reasoning", thoughtful)
    weather = {"type": "function", "name": "weather", "description": "Of a place", "parameters": WEATHER, "strict": True}
    ask = dict(model=model, input="Will it rain in Rome?", max_output_tokens=200, temperature=0, tools=[weather])
    whole = client.responses.create(**ask, tool_choice="required", parallel_tool_calls=False)
    call = whole.output[0]
    check("a function's call", whole.status == "completed" and right(call.name, json.loads(call.arguments)), whole)
    with client.responses.stream(**ask, tool_choice="required", parallel_tool_calls=False) as stream:
        pieces = "".join(event.delta for event in stream if event.type == "response.function_call_arguments.delta")
        last = stream.get_final_response()
    check("the same in pieces", pieces == last.output[0].arguments == call.arguments, last)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sun"}
    after = client.responses.create(**{**ask, "input": [output]}, previous_response_id=whole.id, tool_choice="none")
    check("what came of it", after.output[-1].type == "message", after)
    said = [{"role": "user", "content": "Will it rain in Rome?"}, call, output]
    after = client.responses.create(**{**ask, "input": said}, tool_choice="none")
    check("the same without what is stored", after.output[-1].type == "message", after)


def embeddings(client, model):
    vectors = client.embeddings.create(model=model, input=["a cat", "a dog"]).data
    plain = client.embeddings.create(model=model, input="a dog", encoding_format="float").data[0].embedding
    same = max(abs(a - b) for a, b in zip(vectors[1].embedding, plain))
    check("embeddings, in base64 and as numbers", len(vectors) == 2 and same < 1e-6)


def errors(client, base, model):
    bad = refused(openai.BadRequestError, lambda: client.completions.create(model=model, prompt="a", temperature=9))
    check("a bad field", bad is not None and bad.param == "temperature", bad)
    check("no such model", refused(openai.NotFoundError, lambda: client.completions.create(model="gpt", prompt="a")) is not None)
    stranger = openai.OpenAI(base_url=base + "/v1", api_key="someone-else", max_retries=0)
    check("a wrong key", refused(openai.AuthenticationError, stranger.models.list) is not None)


def messages(base, model):
    client = anthropic.Anthropic(base_url=base, api_key=KEY, max_retries=0)
    ask = dict(model=model, messages=[{"role": "user", "content": "Who are you?"}], max_tokens=16, extra_body={"temperature": 0})
    whole = client.messages.create(**ask, system="Be brief.")
    check("Anthropic's messages", whole.content[-1].type == "text" and whole.usage.output_tokens > 0, whole)
    with client.messages.stream(**ask, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    check("the same in pieces", text == whole.content[-1].text and last.stop_reason == whole.stop_reason, last)
    bad = refused(anthropic.BadRequestError, lambda: client.messages.create(model=model, messages=[], max_tokens=5))
    check("its errors", bad is not None and bad.body["type"] == "error", bad)


def blocks(base, model):
    client = anthropic.Anthropic(base_url=base, api_key=KEY, max_retries=0)
    said = [{"role": "user", "content": "Will it rain in Rome?"}]
    weather = {"name": "weather", "description": "Of a place", "input_schema": WEATHER}
    choice = {"type": "tool", "name": "weather"}
    ask = dict(model=model, messages=said, max_tokens=200, tools=[weather], extra_body={"temperature": 0})
    whole = client.messages.create(**ask, tool_choice=choice)
    call = whole.content[-1]
    check("Anthropic's call", whole.stop_reason == "tool_use" and right(call.name, call.input), whole)
    with client.messages.stream(**ask, tool_choice=choice) as stream:
        last = stream.get_final_message()
    check("the same in pieces", last.content[-1].input == call.input and last.stop_reason == "tool_use", last)
    output = {"type": "tool_result", "tool_use_id": call.id, "content": "Sun"}
    more = [*said, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [output]}]
    after = client.messages.create(**{**ask, "messages": more}, tool_choice={"type": "none"})
    check("what came of it", after.content[-1].type == "text", after)


def main():
    command = [sys.argv[1], "serve", "--port", "0", "--json", *sys.argv[2:]]
    env = {**os.environ, "ANSER_API_KEYS": KEY}
    server = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        base = "http://" + json.loads(server.stdout.readline())["address"]
        client = openai.OpenAI(base_url=base + "/v1", api_key=KEY, max_retries=0)
        model = models_and_completions(client)
        chat(client, model)
        tools(client, model)
        responses(client, model)
        embeddings(client, model)
        errors(client, base, model)
        messages(base, model)
        blocks(base, model)
    finally:
        server.terminate()
    check("the server ends", server.wait(timeout=20) == 0)


if __name__ == "__main__":
    main()
