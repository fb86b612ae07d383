"""No exception of one request reaches the loop that all share, and nothing of it the requests beside."""

import itertools
import shutil

import numpy as np
import pytest
import torch
import transformers

from hasten import LLM, SamplingParams
from hasten.base.errors import UserError
from hasten.checkpoint import bundled_directory
from hasten.engine import BeamSearch, Grammar
from hasten.engine.answer import Answer
from hasten.engine.constraint import Constraints
from hasten.engine.embedder import Embedder
from hasten.engine.engine import Engine
from hasten.engine.prepare import Prepared, Preparer
from hasten.engine.request import Request
from hasten.engine.scheduler import Scheduler
from hasten.serve.messages import Embed, Submit
from hasten.serve.vectors import Vectors
from hasten.serve.work import Work
from tests.serve.test_work import nothing_is_held, outputs, run

VICTIM, BESIDE = [11, 12, 13], [[5, 6, 7], list(range(40, 80))]
PARAMS = {
    "plain": SamplingParams(max_tokens=6, ignore_eos=True),
    "ranked": SamplingParams(max_tokens=4, temperature=1.0, seed=3, n=2, best_of=12),
    "searched": SamplingParams(max_tokens=4, n=2, beam=BeamSearch(width=3)),
    "grammatical": SamplingParams(max_tokens=6, grammar=Grammar.regex("[a-c]{4}"), temperature=1.0, seed=1),
    "scored": SamplingParams(max_tokens=3, logprobs=1, prompt_logprobs=0),
}
PLANTS = [
    (Preparer, "prepare"), (Preparer, "prompt_ids"), (Prepared, "answer"), (Prepared, "submit"), (Engine, "submit"), (Scheduler, "submit"),
    (Answer, "take"), (Request, "take"), (Constraints, "start"),
]  # fmt: skip
FAULTS = [RuntimeError("planted"), UserError("planted"), MemoryError("planted"), RecursionError("planted"), KeyError("planted")]


@pytest.fixture(scope="module")
def llm():
    return LLM("code-8m", max_sequences=8)


def plant(monkeypatch, owner, name, calls, error) -> list[int]:
    """``owner.name`` raises at each of ``calls``, counted from the first; how often it did."""
    real, count, raised = getattr(owner, name), itertools.count(), []

    def planted(*arguments, **named):
        if next(count) in calls:
            raised.append(1)
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, planted)
    return raised


@pytest.mark.row("one fault for all", "never reaches the loop")
@pytest.mark.parametrize("kind", PARAMS)
def test_no_exception_of_a_request_reaches_the_loop(kind, llm, monkeypatch):
    params, fired = SamplingParams(max_tokens=8, ignore_eos=True), set()
    wanted = llm.generate(BESIDE, params)
    for place, (owner, name) in enumerate([*PLANTS, *PLANTS]):
        error = FAULTS[place % len(FAULTS)]
        work = Work(llm)
        pieces = [piece for id, prompt in enumerate(BESIDE) for piece in work.submit(Submit(id, prompt, params, ""))]
        while len(outputs(pieces)) < len(BESIDE):
            pieces += work.step()
        with monkeypatch.context() as patch:
            raised = plant(patch, owner, name, {place // len(PLANTS)}, error)
            pieces += work.submit(Submit(9, VICTIM, PARAMS[kind], ""))
            pieces += run(work)
        assert nothing_is_held(work), (name, error)
        found, failed = outputs_or_errors(pieces), set()
        for piece in pieces:
            if piece.error is not None:
                assert "planted" in piece.error or isinstance(error, RecursionError), (name, piece)
                failed.add(piece.id)
        assert len(failed) <= 1, (name, error)  # whose call it was
        if raised:
            fired.add(name)
            assert failed, (name, error)
        for id, one in enumerate(wanted):
            if id not in failed:
                assert found[id, 0] == (one.text, one.token_ids, "length"), (name, error)
        again = work.submit(Submit(10, BESIDE[0], params, "")) + run(work)
        assert outputs(again)[10, 0][1] == wanted[0].token_ids
    assert fired >= {"prepare", "prompt_ids", "answer", "submit", "take"}


def outputs_or_errors(pieces) -> dict:
    """By request and choice, up to the end or to an error."""
    found: dict = {}
    for piece in pieces:
        text, ids, reason = found.get((piece.id, piece.choice), ("", (), None))
        assert reason is None  # nothing comes after the end
        found[piece.id, piece.choice] = text + piece.text, ids + piece.token_ids, piece.finish_reason
    return found


@pytest.mark.row("one fault for all", "never reaches the loop")
def test_nor_one_of_texts_to_embed(llm, monkeypatch):
    for owner, name, error in itertools.product((Preparer,), ("prompt_ids",), FAULTS):
        vectors = Vectors(llm)
        assert vectors.take(Embed(1, BESIDE)) == []
        with monkeypatch.context() as patch:
            assert plant(patch, owner, name, {1}, error) == []
            (told,) = vectors.take(Embed(2, [VICTIM, VICTIM]))
        assert told.id == 2
        assert "planted" in told.error
        found = []
        while vectors.busy:
            found += vectors.step()
        assert [(one.id, one.place, one.error) for one in found] == [(1, 0, None), (1, 1, None)]
    session = llm.engine().session
    vectors = Vectors(llm)
    with monkeypatch.context() as patch:
        raised = plant(patch, session, "hidden", {0, 1}, RuntimeError("planted"))
        assert vectors.take(Embed(3, [VICTIM])) == []
        assert vectors.take(Embed(4, [BESIDE[0]])) == []
        found = []
        while vectors.busy:
            found += vectors.step()
        assert len(raised) == 2
    assert [(one.id, one.error is None) for one in sorted(found, key=lambda one: one.id)] == [(3, False), (4, True)]
    assert Embedder(llm.engine(), 1).busy is False


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model whose logits are wider than its tokenizer knows tokens: 8,200 over 8,192."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8200, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("padded")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_directory("code-8m") / name, path / name)
    return LLM(path, max_sequences=8)


@pytest.mark.row("foreign token ids", "at the tokenizer's length and the logits' width")
@pytest.mark.row("request ids and state", "canaries beside")
def test_ids_at_the_edge_of_the_vocabulary_change_nothing_beside_them(padded):
    canary = Submit(0, [5, 6, 7], SamplingParams(max_tokens=150, temperature=1.0, seed=5, ignore_eos=True, logprobs=2), "")
    (wanted,) = padded.generate([canary.prompt], canary.params)
    work, pieces, refused, answered = Work(padded), [], 0, 0
    pieces += work.submit(canary)
    number = itertools.count(1)
    for token in (8191, 8192, 8199, 8200, 8201, 16384, 2**31 - 1):
        for asked in (
            {"prompt": [token, 1]}, {"params": {"stop_token_ids": [token]}}, {"params": {"logit_bias": {token: 100.0}}},
            {"params": {"logit_bias": {token: 100.0}, "repetition_penalty": 2.0, "presence_penalty": 2.0, "logprobs": 3}},
        ):  # fmt: skip
            params = SamplingParams(max_tokens=3, **asked.get("params", {}))
            told = work.submit(Submit(id := next(number), asked.get("prompt", [1]), params, ""))
            for _ in range(3):
                told += work.step()
            pieces += told
            errors = [piece.error for piece in told if piece.id == id and piece.error is not None]
            assert bool(errors) is (token >= 8200), (token, asked, errors)
            refused, answered = refused + bool(errors), answered + (not errors)
    pieces += run(work)
    assert (refused, answered) == (16, 12)
    found = outputs([piece for piece in pieces if piece.error is None])
    assert found[0, 0] == (wanted.text, wanted.token_ids, "length", wanted.logprobs)
    assert nothing_is_held(work)
    vectors = Vectors(padded)
    for token in (8199, 8200):
        told = vectors.take(Embed(token, [[token]]))
        assert bool(told) is (token >= 8200)
    while vectors.busy:
        assert all(np.isfinite(np.frombuffer(one.data, "<f4")).all() for one in vectors.step())
