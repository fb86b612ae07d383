"""The engine: outputs that hang on nothing but the request, failures that stay with it, and what a step costs beside computing."""

import numpy as np
import pytest

from benchmarks import engine_step
from hasten import LLM, SamplingParams, load
from hasten.backends.cpu import CpuBackend
from hasten.engine.batching import Continuous
from hasten.engine.engine import Engine
from hasten.engine.plan import NeverFitsError, Settings
from hasten.engine.request import Request
from hasten.program import Batch, HostLogits
from tests.families.oracles import make_checkpoint

MODEL = load("code-8m")
SHARED = np.random.default_rng(1).integers(0, MODEL.spec.vocab, 80).tolist()
HYBRID = {
    "model_type": "mamba2", "vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "conv_kernel": 4, "expand": 2,
    "n_groups": 1, "num_heads": 4, "head_dim": 16, "chunk_size": 8, "tie_word_embeddings": False, "time_step_limit": (0.0, 100.0),
}  # fmt: skip


def page_bytes(model, pages):
    return pages * 16 * sum(group.bytes_per_token() for group in CpuBackend().session(model, 64).program.states)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_recurrent_states_are_found_again(backend, tmp_path):
    """The reference promises no bits: the logits that follow a restored snapshot are near. Natively tokens are as without one."""
    make_checkpoint(HYBRID, tmp_path)
    model = load(tmp_path)
    llm = LLM(model, backend=backend, context=256, scheduling=Settings(40, Continuous(4)))
    prompts = [[*range(64), *tail] for tail in ([70, 71, 72], [80, 81], [90])]
    done = [llm.generate([prompt], SamplingParams(max_tokens=8))[0].token_ids for prompt in prompts]
    assert llm.engine(256).counters.hit_tokens == 2 * 64
    if backend == "cpu":
        without = LLM(model, backend=backend, context=256, prefixes=False)
        assert [one.token_ids for one in without.generate(prompts, SamplingParams(max_tokens=8))] == done
        return
    for prompt, tokens in zip(prompts, done):
        rows = model.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        best = rows.max(axis=-1)
        assert (best - rows[np.arange(len(tokens)), list(tokens)] <= 1e-4 * np.abs(rows).max()).all()


def test_streams_may_be_read_by_turns():
    llm = LLM(MODEL, backend="cpu", max_sequences=8)
    prompts = ["def", "import json", "class A:", "return"]
    expected = [one.token_ids for one in llm.generate(prompts, SamplingParams(max_tokens=9))]
    streams = [llm.stream([prompt], SamplingParams(max_tokens=9)) for prompt in prompts]
    taken = [[], [], [], []]
    for _ in range(9):
        for place, stream in enumerate(streams):
            chunk = next(stream)
            assert chunk.index == 0
            taken[place] += chunk.token_ids
    assert [tuple(one) for one in taken] == expected
    abandoned = llm.stream(prompts)
    next(abandoned)
    assert llm.engine().busy
    abandoned.close()
    assert not llm.engine().busy


# --- several outputs of one prompt


def request(index, prompt, params, choice=0, seed=5):
    return Request(
        index, prompt, params, limit=256, end_ids=frozenset(), detokenizer=None, program_context=256, choice=choice, seed=seed
    )  # fmt: skip


def finish(engine):
    chunks = []
    while engine.busy:
        chunks += engine.step()
    return chunks


@pytest.mark.parametrize("step_tokens", [16, 512])
def test_outputs_of_one_prompt_share_it(step_tokens):
    params = SamplingParams(max_tokens=20, temperature=1.0)
    prompt = SHARED[:37]

    def engine():
        return Engine(CpuBackend().session(MODEL, 256), Settings(step_tokens, Continuous(8)), prefixes=False)

    alone = []
    for choice in range(4):
        single = engine()
        one = request(0, prompt, params, choice)
        single.submit([one])
        finish(single)
        alone.append(one.output)
    assert len({tuple(output) for output in alone}) == 4
    together = engine()
    outputs = [request(0, prompt, params, choice) for choice in range(4)]
    together.submit(outputs)
    together.submit([request(1, prompt[:9], params)])
    before = together.cache.pools[0].free
    while not outputs[0].output:
        together.step()
    assert before - together.cache.pools[0].free <= 3 + 1 + 1  # 37 tokens once, and the other request
    chunks = finish(together)
    assert [output.output for output in outputs] == alone
    assert {(chunk.index, chunk.choice) for chunk in chunks if chunk.finish_reason} == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)}
    assert together.counters.forks == 3
    assert together.counters.computed_tokens == 37 + 4 * 19 + 9 + 19


# --- one request's failure is its own


class Faulty:
    """A session that fails on every batch that holds the token ``poison``, as ``fails`` says."""

    def __init__(self, session, poison, fails):
        self._session, self._poison, self._fails, self.failures = session, poison, fails, 0
        self.program, self.page, self.pages, self.threads = session.program, session.page, session.pages, session.threads
        self.carry_out, self.drawer = session.carry_out, session.drawer

    def run(self, batch: Batch, pages):
        bad = np.flatnonzero(batch.tokens == self._poison)
        if len(bad):
            self.failures += 1
            if self._fails == "raises" or (self._fails == "fetch alone" and len(batch.offsets) > 2):
                raise RuntimeError("the poison token came")
        logits = self._session.run(batch, pages).numpy()
        owners = np.searchsorted(batch.offsets, bad, side="right") - 1
        spoilt = np.isin(np.searchsorted(batch.offsets, batch.rows, side="right") - 1, owners)
        if self._fails.startswith("fetch"):
            return Unfetched(logits, spoilt)
        logits[spoilt] = np.nan
        return HostLogits(logits)


class Unfetched:
    """Logits of which some rows do not come over."""

    def __init__(self, values, spoilt):
        self._values, self._spoilt, self.shape = values, spoilt, values.shape

    def numpy(self, rows=None):
        rows = range(len(self._values)) if rows is None else list(rows)
        if self._spoilt[rows].any():
            raise MemoryError("no room for the poison token's rows")
        return self._values[rows]


@pytest.mark.parametrize("scored", [None, 0], ids=["drawn", "scored"])
@pytest.mark.parametrize("fails", ["raises", "NaN", "fetch", "fetch alone"])
def test_a_failure_is_its_own_requests(fails, scored):
    """Whether the step raises, its rows are wrong, or they do not come over, of a step of several or of one."""
    poison = 4321
    prompts = [SHARED[:n] for n in (3, 20, 41, 9, 30)]
    params = SamplingParams(max_tokens=12, prompt_logprobs=scored)

    def outputs(session, spoilt):
        engine = Engine(session, Settings(32, Continuous(4)))
        requests = [request(i, [*prompt, poison, 7] if i in spoilt else prompt, params) for i, prompt in enumerate(prompts)]
        for one in requests:
            engine.submit([one], key="all")
        chunks = finish(engine)
        assert [sum(chunk.finish_reason is not None for chunk in chunks if chunk.index == i) for i in range(5)] == [1] * 5
        pools = engine.cache.pools
        assert [pool.available for pool in pools] == [pool.pages for pool in pools]
        return requests, {chunk.index: chunk.error for chunk in chunks if chunk.error}

    def session():
        return CpuBackend().session(MODEL, 256)

    clean, none = outputs(session(), ())
    assert not none
    faulty = Faulty(session(), poison, fails)
    spoilt, errors = outputs(faulty, (1, 4))
    assert faulty.failures > 1
    assert errors.keys() == {1, 4}
    assert all(("NaN" if fails == "NaN" else "poison") in error for error in errors.values())
    assert [one.finish_reason for one in spoilt] == ["length", "error", "length", "length", "error"]
    for index in (0, 2, 3):
        assert spoilt[index].output == clean[index].output


def test_what_never_fits_fails_alone():
    llm = LLM(MODEL, backend="cpu", context=256, cache_bytes=1)  # room for one sequence of 256 tokens
    engine = llm.engine()
    with pytest.raises(NeverFitsError, match="need 30 pages of kv0, and the cache has 16"):
        engine.submit([request(0, SHARED[:40], SamplingParams(max_tokens=200)), request(0, SHARED[:40], SamplingParams(max_tokens=60), 1)])
    assert not engine.busy
    assert llm.generate(["def"], SamplingParams(max_tokens=3))[0].error is None


# --- what a step costs beside computing


@pytest.mark.timed
def test_what_preemption_costs_is_measured():
    """From steps and moves that happen anyway: a page moves in less time than its tokens are computed in, and is swapped."""
    llm = LLM(
        MODEL, backend="cpu", context=256, scheduling=Settings(128, Continuous(12), output_share=0.0), cache_bytes=page_bytes(MODEL, 20),
        swap_bytes=page_bytes(MODEL, 400),
    )  # fmt: skip
    guess = llm.engine()._pace.costs
    llm.generate([[index + 1] * 90 for index in range(6)], SamplingParams(max_tokens=40, ignore_eos=True))
    costs, page = llm.engine()._pace.costs, page_bytes(MODEL, 1)
    assert llm.engine().counters.swapped > 0
    assert costs.token_s != guess.token_s
    assert costs.byte_s != guess.byte_s
    assert 1e-7 < costs.byte_s * page < 16 * costs.token_s < 1


def test_plan_commit_and_detokenize_of_64_sequences_take_a_millisecond():
    """On a machine where 64 times decoding 20 tokens takes 0.22 ms, as on the quiet one where 0.82 to 0.99 ms were measured. Both are timed
    by turns, and their ratio counts, with a third on top: beside another test it sways by as much."""
    found = engine_step.measure()
    print(f"plan + commit + detokenize, 64 sequences: {found['step_ms']:.2f} ms, {found['over_decodings']:.2f} × 64 decodings")
    assert found["over_decodings"] <= 4 / 3 * 1e-3 / 0.22e-3, found
