"""The boundary table × every field × every route: whatever is out of bounds is a 4xx that names the field."""

import time

import httpx
import pytest

from tests.serve.boundaries import Description, cases, edges
from tests.serve.scrape import scrape

CHAT = [{"role": "user", "content": "x"}]
GOOD = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 1},
    "/v1/messages": {"messages": CHAT, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": CHAT},
    "/v1/embeddings": {"input": "x"},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def document(server):
    return httpx.get(f"{server.url}/openapi.json").json()


def told(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return f"{error.get('param') or ''} {error['message']}"


@pytest.mark.row("numbers and lists", "boundary table")
@pytest.mark.row("prompt embeddings", "refused")
@pytest.mark.parametrize("path", GOOD)
def test_what_is_out_of_bounds_is_refused_by_name(path, server, document):
    every = list(cases(document, {path: GOOD[path]}))
    assert len(every) > 12
    wrong = []
    with httpx.Client(base_url=server.url, timeout=30, headers=JSON) as client:
        assert client.post(path, json=GOOD[path]).status_code == 200
        for case in every:
            began = time.monotonic()
            answer = client.post(path, content=case.raw)
            if not 400 <= answer.status_code < 500 or case.top not in told(answer):
                wrong.append((case.place, case.what, answer.status_code, answer.text[:200]))
            assert time.monotonic() - began < 10, (case.place, case.what)
        assert client.post(path, json=GOOD[path]).status_code == 200
    assert not wrong, "\n".join(map(str, wrong))


def test_every_route_that_takes_a_body_is_asked(document):
    description = Description(document)
    assert description.bodies.keys() == GOOD.keys()
    assert sum(1 for _ in cases(document, GOOD)) > 2000
    for path, schema in description.bodies.items():
        assert schema["additionalProperties"] is False, path
        assert schema["properties"].keys() >= GOOD[path].keys()


def test_what_is_at_the_edge_is_answered(server, document):
    asked = list(edges(document, GOOD))
    assert len(asked) > 40
    with httpx.Client(base_url=server.url, timeout=30, headers=JSON) as client:
        for case in asked:
            answer = client.post(case.path, content=case.raw)
            assert answer.status_code == 200, (case, answer.text[:300])


def test_a_field_that_is_new_is_asked_by_itself(document):
    """A number that nobody gave a range, and any other field, deep inside as well."""
    schemas = document["components"]["schemas"]
    planted = {**document, "components": {"schemas": {name: {**one, "properties": {**one["properties"]}} for name, one in schemas.items()}}}
    planted["components"]["schemas"]["Message"]["properties"]["planted"] = {"type": "boolean"}
    asked = [case for case in cases(planted, GOOD) if case.place == "messages.planted"]
    assert {case.path for case in asked} == {"/v1/chat/completions", "/tokenize"}
    planted["components"]["schemas"]["ChatBody"]["properties"]["planted_too"] = {"type": "integer"}
    with pytest.raises(KeyError, match="planted_too"):
        list(cases(planted, {"/v1/chat/completions": GOOD["/v1/chat/completions"]}))


REFUSED = {
    "prompt_embeds": "AAAA", "prompt_embeddings": [[0.0]], "inputs_embeds": [[0.0]], "multi_modal_data": {"image": "x"}, "images": ["x"],
    "image_url": "http://127.0.0.1/", "chat_template": "{{ 7 * 7 }}", "chat_template_kwargs": {"tokenize": True}, "trust_remote_code": True,
    "request_id": "1", "rid": "1", "cache_salt": "x", "guided_regex": "a", "allowed_token_ids": [8192], "bad_words": ["x"],
    "kv_transfer_params": {}, "lora_request": {"path": "/etc"}, "best_of_n": 2, "logits_processors": ["os.system"],
    "vllm_xargs": {"a": 1}, "__class__": "x", "documents": [{"text": "x"}], "mm_processor_kwargs": {}, "use_beam_search": True,
}  # fmt: skip
"""Fields that other servers have, and were broken by."""


@pytest.mark.row("chat templates", "none of the request's")
@pytest.mark.row("prompt embeddings", "refused")
@pytest.mark.row("prefix cache", "no salt")
@pytest.mark.row("request ids and state", "server-made ids")
@pytest.mark.row("foreign token ids", "no lists of allowed ids")
@pytest.mark.parametrize("path", GOOD)
def test_what_other_servers_were_broken_by_is_no_field_here(path, server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for name, value in REFUSED.items():
            answer = client.post(path, json={**GOOD[path], name: value})
            assert answer.status_code == 400, (name, answer.text)
            assert name in told(answer), (name, answer.text)


def test_nothing_is_left_in_the_engine(server):
    found = server.until(lambda: (now := scrape(server.url))["hasten_num_requests_running"] == 0 and now, 10)
    assert found["hasten_num_requests_waiting"] == found["hasten_kv_cache_usage_perc"] == found["hasten_engine_restarts_total"] == 0
