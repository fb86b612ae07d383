"""Embedder: transformers' hidden states, averaged, on every backend; alone as in a batch; on the pages of an engine that is busy."""

import numpy as np
import pytest
import torch
import transformers

from hasten import LLM, SamplingParams
from hasten.engine.embedder import STEP_TOKENS, Embedder

CONFIGS = {
    "llama": transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=False,
    ),
    "gpt2": transformers.GPT2Config(vocab_size=280, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request, tmp_path_factory):
    """transformers' model and where it is saved."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp(request.param)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    model.save_pretrained(path)
    return model, path


def embedded(embedder: Embedder, prompts) -> list[np.ndarray]:
    numbers, found = [embedder.submit(prompt) for prompt in prompts], {}
    while embedder.busy:
        for one in embedder.step():
            assert one.error is None
            found[one.number] = one.vector
    return [found[number] for number in numbers]


def prompts_of(seed: int, lengths) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 280, length).tolist() for length in lengths]


@pytest.mark.parametrize(("backend", "tolerance"), [("reference", 1e-5), ("cpu", 2e-2)])
def test_the_mean_of_transformers_hidden_states(backend, tolerance, theirs):
    model, path = theirs
    llm = LLM(path, backend=backend, max_sequences=4)
    prompts = prompts_of(1, (1, 17, STEP_TOKENS, STEP_TOKENS + 77, 5))
    for prompt, found in zip(prompts, embedded(Embedder(llm.engine(), llm.model.spec.width), prompts)):
        with torch.inference_mode():
            hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        wanted = hidden.double().mean(0).numpy()
        assert found.dtype == np.float32
        assert np.abs(found - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


def test_alone_in_a_batch_and_beside_requests_it_is_the_same():
    llm = LLM("code-8m", max_sequences=4)
    engine, prompts = llm.engine(), [[token % 256 for token in prompt] for prompt in prompts_of(2, (3, 200, 1, 61, 130))]
    embedder = Embedder(engine, llm.model.spec.width)
    together = embedded(embedder, prompts)
    for prompt, wanted in zip(prompts, together):
        assert np.array_equal(embedded(embedder, [prompt])[0], wanted)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    (plain,) = llm.generate(["def f("], params)
    prepared = llm.prepare("def f(", params)
    answer, found, beside = prepared.answer(), {}, 0
    prepared.submit(engine)
    numbers = [embedder.submit(prompt) for prompt in prompts]
    while engine.busy or embedder.busy:
        beside += engine.busy and embedder.busy
        for chunk in engine.step() if engine.busy else ():
            answer.take(chunk)
        found.update((one.number, one.vector) for one in embedder.step())
    assert beside > 2
    assert all(np.array_equal(found[number], wanted) for number, wanted in zip(numbers, together))
    assert answer.completions()[0].token_ids == plain.token_ids
    assert all(pool.available == pool.pages for pool in engine.cache.pools)


def test_where_pages_are_short_requests_go_first_and_what_never_fits_says_so():
    whole = LLM("code-8m", max_sequences=1)
    page = sum(group.page_bytes for group in whole.engine().cache.groups)
    llm = LLM("code-8m", max_sequences=1, context=160, cache_bytes=10 * page, prefixes=False)
    engine = llm.engine()
    embedder = Embedder(engine, llm.model.spec.width)
    prompt, long = [7] * 100, [7] * 200
    (wanted,) = embedded(embedder, [prompt])
    prepared = llm.prepare([5, 6], SamplingParams(max_tokens=150, ignore_eos=True))
    answer = prepared.answer()
    prepared.submit(engine)
    for _ in range(80):
        for chunk in engine.step():
            answer.take(chunk)
    number, waited, found = embedder.submit(prompt), 0, {}
    while embedder.busy or engine.busy:
        for chunk in engine.step() if engine.busy else ():
            answer.take(chunk)
        found.update((one.number, one.vector) for one in embedder.step())
        waited += engine.busy and embedder.busy
    assert waited > 10
    assert answer.done
    assert np.array_equal(found[number], wanted)
    embedder.submit(long)
    ended = [one for _ in range(5) for one in embedder.step()]
    assert [one.vector for one in ended] == [None]
    assert "pages" in ended[0].error
    assert all(pool.available == pool.pages for pool in engine.cache.pools)


def test_what_is_aborted_gives_its_pages_back():
    llm = LLM("code-8m", max_sequences=2)
    embedder = Embedder(llm.engine(), llm.model.spec.width)
    numbers = [embedder.submit([3] * 300) for _ in range(3)]
    embedder.step()
    for number in numbers:
        embedder.abort(number)
    embedder.abort(99)
    assert not embedder.busy
    assert embedder.step() == []
    assert all(pool.available == pool.pages for pool in llm.engine().cache.pools)
