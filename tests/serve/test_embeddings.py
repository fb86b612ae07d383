"""/v1/embeddings through OpenAI's own client: what an Embedder in this process makes of the same texts, whatever else runs."""

import asyncio

import httpx
import numpy as np
import openai
import pytest

from hasten.engine.embedder import Embedder

TEXTS = ["import os\n", "class A:\n    pass\n", "é" * 100, "x"]


@pytest.fixture(scope="module")
def vectors(llm):
    embedder, found = Embedder(llm.engine(), llm.model.spec.width), {}
    numbers = [embedder.submit(llm.encode(text)) for text in TEXTS]
    while embedder.busy:
        found.update((one.number, one.vector) for one in embedder.step())
    return np.array([found[number] for number in numbers])


def test_alone_in_a_batch_and_beside_streams_they_are_the_same(vectors, client, llm, server):
    base = client.embeddings.create(model="code-8m", input=TEXTS)  # the client asks for base64
    assert np.array_equal(np.array([one.embedding for one in base.data], np.float32), vectors)
    assert [one.index for one in base.data] == [0, 1, 2, 3]
    assert base.usage.prompt_tokens == base.usage.total_tokens == sum(len(llm.encode(text)) for text in TEXTS)
    ids = client.embeddings.create(model="code-8m", input=[llm.encode(text) for text in TEXTS], encoding_format="float")
    assert np.array_equal(np.array([one.embedding for one in ids.data], np.float32), vectors)

    async def busy() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as both:

            async def stream() -> str:
                asked = {"model": "code-8m", "prompt": "def f(", "max_tokens": 500, "temperature": 0, "extra_body": {"ignore_eos": True}}
                return "".join([chunk.choices[0].text async for chunk in await both.completions.create(**asked, stream=True)])

            streams = [asyncio.create_task(stream()) for _ in range(3)]
            for text, vector in [*zip(TEXTS, vectors)] * 3:
                found = (await both.embeddings.create(model="code-8m", input=text)).data[0].embedding
                assert np.array_equal(np.array(found, np.float32), vector)
            assert any(not one.done() for one in streams)  # they ran beside
            return await asyncio.gather(*streams)

    plain = client.completions.create(model="code-8m", prompt="def f(", max_tokens=500, temperature=0, extra_body={"ignore_eos": True})
    assert set(asyncio.run(busy())) == {plain.choices[0].text}


@pytest.mark.row("disconnects", "at every point")
def test_who_goes_away_leaves_nothing_behind(server, client):
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/embeddings", json={"input": ["def f(x):\n" * 60] * 250}, timeout=0.2)
    assert client.embeddings.create(model="code-8m", input="x").data[0].embedding


WRONG = {
    "input": [None, 1, [], [[]], [1.5], [-1], [10**6], ["x", 1], ["x"] * 257, list(range(500_000)), "x" * 100_000],
    "encoding_format": ["hex", 1], "dimensions": [1, 0, "x", 256], "model": ["other", 1], "user": [1], "what": [1], "timeout_s": [0, "1"],
}  # fmt: skip


@pytest.mark.row("numbers and lists", "boundary table")
def test_every_field_is_bounded_and_named(server):
    with httpx.Client(base_url=server.url, timeout=30) as http:
        for field, values in WRONG.items():
            for value in values:
                answer = http.post("/v1/embeddings", json={"input": "x", field: value})
                assert 400 <= answer.status_code < 500, (field, str(value)[:60], answer.text)
                told = answer.json()["error"]
                assert (told["param"] or "").startswith(field), (field, str(value)[:60], told)
        assert http.post("/v1/embeddings", json={"input": "x"}).status_code == 200
