"""The openai client against `cuvee serve`, unchanged.

    python benches/peers/serve_openai.py CUVEE MODEL_DIR [--adapter NAME=DIR ...]

Completions, chats (where the model has a template), streams, log-probabilities, lists of prompts, errors, and a soup where
there is an adapter. Exits with 1 where anything is not as the client expects. Needs openai (3.54 was used).
"""
import argparse
import importlib.metadata

import openai
from serving import server

parser = argparse.ArgumentParser()
parser.add_argument("cuvee")
parser.add_argument("model")
parser.add_argument("--adapter", action="append", default=[])
a = parser.parse_args()

with server(a.cuvee, a.model, "--name", "base", *[word for adapter in a.adapter for word in ("--adapter", adapter)]) as (_, address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    names = [model.id for model in client.models.list()]
    print("openai", importlib.metadata.version("openai"), "models", names)
    asked = {"model": "base", "prompt": "The film was", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    text = whole.choices[0].text
    assert text and whole.usage.completion_tokens <= 12 and whole.choices[0].finish_reason in ("stop", "length"), whole
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == text
    assert parts[-1].usage == whole.usage
    told = client.completions.create(**asked, logprobs=3, echo=True).choices[0]
    assert told.text == "The film was" + text and told.logprobs.token_logprobs[0] is None
    assert len(told.logprobs.tokens) == len(told.logprobs.top_logprobs) == whole.usage.total_tokens
    several = client.completions.create(**asked | {"prompt": ["The film was", "I"]}, n=2)
    assert [choice.text for choice in several.choices[:2]] == [text, text] and len(several.choices) == 4
    seeded = [client.completions.create(**asked | {"temperature": 1}, seed=7).choices[0].text for _ in range(2)]
    assert seeded[0] == seeded[1]
    print("completions:", repr(text))
    for change, kind in [({"model": "gpt-4"}, openai.NotFoundError), ({"temperature": -1}, openai.BadRequestError), ({"max_tokens": 10**6}, openai.BadRequestError)]:
        try:
            client.completions.create(**asked | change)
            raise SystemExit(f"{change} was accepted")
        except kind as error:
            assert error.body["message"] and error.body["type"] == "invalid_request_error", error.body
    for name in names[1:]:
        soup = client.completions.create(**asked, extra_body={"soup": {name: 0.05}})
        assert soup.model_extra["cuvee"]["adapters"][0]["name"] == name
        print("soup", name, 0.05, repr(soup.choices[0].text))
    messages = [{"role": "user", "content": "Name a colour."}]
    try:
        chat = client.chat.completions.create(model="base", messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2)
        said = chat.choices[0].message.content
        assert chat.choices[0].message.role == "assistant" and len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
        stream = client.chat.completions.create(model="base", messages=messages, max_completion_tokens=12, temperature=0, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in stream) == said
        print("chat:", repr(said))
    except openai.BadRequestError as error:
        assert "no chat template" in error.body["message"], error.body
        print("chat: the model has no template, and that is said")
print("all as expected")
