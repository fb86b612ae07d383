"""One server for all tests that only ask it."""

import openai
import pytest

from hasten import LLM
from tests.serve.server import serving


@pytest.fixture(scope="session")
def server():
    with serving("code-8m", "--max-sequences", "8", "--max-waiting", "256") as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def llm():
    return LLM("code-8m", max_sequences=8)
