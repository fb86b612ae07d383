"""LLM on the bundled model: against transformers' own generation, and against itself alone."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import transformers

from hasten import LLM, SamplingParams, load
from hasten.base.errors import ConfigError, TokenizerError, UnsupportedError
from hasten.checkpoint import bundled_directory
from hasten.program import HostLogits

PROMPTS = [
    "import json\nfrom pathlib import Path\n\n\ndef read_config(path):\n    ",
    "class Stack:\n    def __init__(self):\n",
    "def",
    "# größer café 漢字\nx = ",
    "for i in range(10):\n    print(",
]


@pytest.fixture(scope="module")
def llm():
    return LLM("code-8m", max_sequences=3)


@pytest.fixture(scope="module")
def wide():
    return LLM("code-8m", max_sequences=16)


@pytest.fixture(scope="module")
def oracle():
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(bundled_directory("code-8m"), dtype=torch.float32).eval()


def bare(model):
    """The same model without its tokenizer."""
    return dataclasses.replace(model, tokenizer=None, tokenizer_error="no tokenizer here; give token ids")


# --- greedy


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_transformers(llm, oracle, prompt):
    (done,) = llm.generate(prompt, SamplingParams(max_tokens=40))
    ids = torch.tensor([done.prompt_token_ids])
    expected = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)[0, ids.shape[1] :].tolist()
    assert list(done.token_ids) == expected
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled_directory("code-8m"))
    assert list(done.prompt_token_ids) == tokenizer(prompt)["input_ids"]
    assert prompt + done.text == tokenizer.decode([*done.prompt_token_ids, *done.token_ids], skip_special_tokens=True)


def test_greedy_takes_the_likeliest_of_the_models_logits(llm):
    (done,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12))
    rows = llm.model.logits([*done.prompt_token_ids, *done.token_ids])
    first = len(done.prompt_token_ids) - 1
    assert rows[first:-1].argmax(axis=-1).tolist() == list(done.token_ids)


# --- batches


def test_a_ragged_batch_equals_each_alone(llm):
    prompts = [*PROMPTS, [5, 6, 7], "return", "x"]
    each = [SamplingParams(max_tokens=count) for count in (5, 12, 1, 9, 16, 2, 7, 3)]
    together = llm.generate(prompts, each)  # eight, of which three run at once, ending at different times
    assert [len(done.token_ids) for done in together] == [5, 12, 1, 9, 16, 2, 7, 3]
    for prompt, params, done in zip(prompts, each, together):
        assert llm.generate([prompt], params) == [done]


def test_chunks_say_whose_they_are_and_end_once(llm):
    params = SamplingParams(max_tokens=6)
    chunks = list(llm.stream(PROMPTS, params))
    done = llm.generate(PROMPTS, params)
    for index, completion in enumerate(done):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in mine) == completion.text
        assert tuple(itertools.chain(*(chunk.token_ids for chunk in mine))) == completion.token_ids
        assert [chunk.finish_reason for chunk in mine] == [None] * 5 + ["length"]
    assert all("\ufffd" not in chunk.text for chunk in chunks)


def test_a_place_is_taken_as_soon_as_it_is_free(llm):
    order = [chunk.index for chunk in llm.stream(PROMPTS, [SamplingParams(max_tokens=n) for n in (1, 4, 4, 1, 1)])]
    assert order == [0, 1, 2, 1, 2, 3, 1, 2, 4, 1, 2]


def test_no_prompts_no_completions(llm):
    assert llm.generate([]) == []


def test_an_abandoned_stream_leaves_nothing_behind(llm):
    next(llm.stream(PROMPTS))
    before = llm.generate(PROMPTS[0], SamplingParams(max_tokens=4))
    assert before == llm.generate(PROMPTS[0], SamplingParams(max_tokens=4))


# --- sampling

SEEDED = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.95, seed=11)


def test_a_seed_repeats(llm):
    first, second = llm.generate(PROMPTS[0], SEEDED), llm.generate(PROMPTS[0], SEEDED)
    assert first == second
    assert first != llm.generate(PROMPTS[0], dataclasses.replace(SEEDED, seed=12))


def test_a_seeded_request_does_not_depend_on_its_batch(llm, wide):
    (alone,) = llm.generate(PROMPTS[0], SEEDED)
    mates = [SamplingParams(max_tokens=n, temperature=1.0, seed=n) for n in (3, 15, 8, 10)]
    for engine, place in [(llm, 0), (llm, 4), (wide, 2)]:
        prompts, params = [*PROMPTS[1:]], [*mates]
        prompts.insert(place, PROMPTS[0])
        params.insert(place, SEEDED)
        assert engine.generate(prompts, params)[place] == alone


def test_without_a_seed_draws_differ(llm):
    params = SamplingParams(max_tokens=20, temperature=1.0)
    assert len({done.token_ids for done in llm.generate([PROMPTS[0]] * 4, params)}) > 1


def test_penalties_change_the_output(llm):
    def words(**fields):
        (done,) = llm.generate("x = [1, 1, 1, 1, 1,", SamplingParams(max_tokens=30, **fields))
        return done.token_ids

    plain = words()
    assert words(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0) == plain
    for fields in ({"repetition_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert words(**fields) != plain
        assert len(set(words(**fields))) > len(set(plain)), fields


# --- what a request may ask besides


def test_choices_differ_and_repeat(llm):
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=4, n=5)
    done = llm.generate([PROMPTS[0], PROMPTS[2]], [params, SEEDED])
    assert [one.choice for one in done] == [0, 1, 2, 3, 4, 0]
    assert len({one.token_ids for one in done[:5]}) == 5
    assert llm.generate(PROMPTS[0], params) == done[:5]
    assert llm.generate(PROMPTS[0], dataclasses.replace(params, n=1)) == done[:1]  # the first draws as it would alone
    (fresh, other) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12, temperature=1.0, n=2))
    assert fresh.token_ids != other.token_ids
    chunks = list(llm.stream(PROMPTS[0], params))
    for one in done[:5]:
        assert "".join(chunk.text for chunk in chunks if chunk.choice == one.choice) == one.text
    assert sum(chunk.finish_reason is not None for chunk in chunks) == 5


def test_best_of_returns_the_likeliest_per_token(llm):
    params = SamplingParams(max_tokens=8, temperature=1.3, seed=4, n=6, logprobs=0)
    every = llm.generate(PROMPTS[0], params)
    worth = [np.mean([entry.logprob for entry in one.logprobs]) for one in every]
    best = [every[index].token_ids for index in np.argsort(-np.array(worth))[:2]]
    params = dataclasses.replace(params, n=2, best_of=6, logprobs=None)
    done = llm.generate(PROMPTS[0], params)
    assert [one.token_ids for one in done] == best
    assert [one.choice for one in done] == [0, 1]
    assert done[0].logprobs is None
    chunks = list(llm.stream([PROMPTS[1], PROMPTS[0]], [SEEDED, params]))
    assert [chunk.token_ids for chunk in chunks if chunk.index == 1] == best


def test_log_probabilities_are_torchs(oracle):
    engine = LLM("code-8m", backend="reference")
    params = SamplingParams(max_tokens=6, temperature=0.8, seed=1, top_k=40, logprobs=3, prompt_logprobs=2, n=2, logit_bias={70: 2.0})
    done = engine.generate([*PROMPTS[:2], "x"], [params, dataclasses.replace(params, logprobs=None), SamplingParams(max_tokens=3)])
    for one in done[:4]:
        ids = [*one.prompt_token_ids, *one.token_ids]
        with torch.no_grad():
            rows = torch.log_softmax(oracle(torch.tensor([ids])).logits[0].double(), -1).numpy()
        begin = len(one.prompt_token_ids)
        for entries, first, top in ((one.prompt_logprobs, 1, 2), (one.logprobs or (), begin, 3)):
            for place, entry in enumerate(entries, first):
                assert entry.token == ids[place]
                np.testing.assert_allclose(entry.logprob, rows[place - 1, ids[place]], atol=2e-4)
                assert [token for token, _ in entry.top] == np.argsort(-rows[place - 1], kind="stable")[:top].tolist()
                np.testing.assert_allclose([value for _, value in entry.top], np.sort(rows[place - 1])[::-1][:top], atol=2e-4)
        assert len(one.prompt_logprobs) == begin - 1
    assert [one.logprobs is None for one in done] == [False, False, True, True, True]
    assert len(done[0].logprobs) == 6
    assert done[4].prompt_logprobs is None


def test_log_probabilities_do_not_depend_on_the_batch(llm):
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=1, logprobs=2, prompt_logprobs=1)
    together = llm.generate(PROMPTS, params)
    for prompt, one in zip(PROMPTS, together):
        assert llm.generate(prompt, params) == [one]


def test_logit_bias_forbids_and_forces(llm):
    (free,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=10))
    ban = dict.fromkeys(free.token_ids, -100)
    (other,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=10, logit_bias=ban))
    assert not set(other.token_ids) & set(ban)
    (forced,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=4, temperature=1.0, logit_bias={77: 100}))
    assert forced.token_ids == (77,) * 4
    for bad in ({"logit_bias": {8192: 1}}, {"stop_token_ids": [8192]}):
        with pytest.raises(ConfigError, match="holds 8192: this model's token ids go from 0 to 8191"):
            llm.generate(PROMPTS[0], SamplingParams(**bad))


def test_echo_begins_with_the_prompt(llm):
    for prompt in PROMPTS:
        (plain,) = llm.generate(prompt, SamplingParams(max_tokens=6))
        (echoed,) = llm.generate(prompt, SamplingParams(max_tokens=6, echo=True, stop="import json"))
        assert echoed.text == prompt + plain.text  # a stop string in the prompt ends nothing
        assert echoed.token_ids == plain.token_ids


@pytest.mark.row("one fault for all", "the offender alone")
def test_a_row_that_overflows_fails_its_request_alone(llm, monkeypatch):
    (good, expected) = llm.generate([PROMPTS[0], PROMPTS[1]], SamplingParams(max_tokens=5))
    session = llm.engine().session
    plain = session.run
    steps = []

    def run(batch, pages):
        logits = plain(batch, pages).numpy().copy()
        steps.append(len(logits))
        if len(steps) == 3:
            logits[0, 7] = np.nan
        return HostLogits(logits)

    monkeypatch.setattr(session, "run", run, raising=False)
    bad, fine = llm.generate([PROMPTS[0], PROMPTS[1]], SamplingParams(max_tokens=5))
    assert len(steps) == 5
    assert (bad.finish_reason, bad.token_ids) == ("error", good.token_ids[:2])
    assert "NaN, first at id 7" in bad.error
    assert fine == expected


# --- ends


def test_stop_strings_are_never_emitted(llm):
    (free,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=60))
    checked = 0
    for begin, length in itertools.product(range(1, min(60, len(free.text) - 8), 5), (1, 3, 8)):
        stop = free.text[begin : begin + length]
        cut = free.text.index(stop)
        params = SamplingParams(max_tokens=60, stop=stop)
        pieces = [chunk.text for chunk in llm.stream(PROMPTS[0], params)]
        (done,) = llm.generate(PROMPTS[0], params)
        assert "".join(pieces) == done.text == free.text[:cut], stop
        assert done.finish_reason == "stop"
        assert done.token_ids == free.token_ids[: len(done.token_ids)]
        checked += 1
    assert checked >= 15


def test_a_stop_string_across_tokens(llm):
    (free,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30))
    texts = [chunk.text for chunk in llm.stream(PROMPTS[0], SamplingParams(max_tokens=30))]
    seam = next(i for i in range(3, 28) if len(texts[i]) > 1 and len(texts[i + 1]) > 1)
    stop = texts[seam][-1] + texts[seam + 1][0]
    (done,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30, stop=["never there", stop]))
    assert done.text == free.text[: free.text.index(stop)]
    assert done.finish_reason == "stop"


def test_the_part_of_a_stop_string_that_stays_a_part_is_text(llm):
    (free,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=10))
    (done,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=10, stop=free.text[-2:] + "never"))
    assert done == free


def test_stop_token_ids(llm):
    (free,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30))
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    (done,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=30, stop_token_ids=[stop, 8191]))
    assert done.token_ids == free.token_ids[: first + 1]
    assert done.finish_reason == "stop"
    assert free.text.startswith(done.text)
    # what stands for an end has no text
    assert done.text == llm.generate(PROMPTS[0], SamplingParams(max_tokens=max(first, 1)))[0].text[: len(done.text)]
    assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=30, stop_token_ids=[stop], ignore_eos=True))[0] == done


def test_end_of_text_ends_unless_ignored(llm):
    # A model whose end of text is a token that comes soon: the same path, without waiting for a text to end.
    (free,) = llm.generate(PROMPTS[1], SamplingParams(max_tokens=20))
    end = free.token_ids[4]
    ends = LLM(dataclasses.replace(llm.model, generation={"eos_token_id": [end, 0]}))
    first = free.token_ids.index(end)
    (done,) = ends.generate(PROMPTS[1], SamplingParams(max_tokens=20))
    assert (done.token_ids, done.finish_reason) == (free.token_ids[: first + 1], "stop")
    (ignoring,) = ends.generate(PROMPTS[1], SamplingParams(max_tokens=20, ignore_eos=True))
    assert (ignoring.token_ids, ignoring.finish_reason) == (free.token_ids, "length")
    (late,) = ends.generate(PROMPTS[1], SamplingParams(max_tokens=20, min_tokens=first + 3))
    assert late.token_ids[:first] == free.token_ids[:first]
    assert len(late.token_ids) >= first + 3
    assert end not in late.token_ids[: first + 3]


def test_min_tokens_hold_stop_strings_off(llm):
    (free,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=40))
    chunks = [chunk.text for chunk in llm.stream(PROMPTS[0], SamplingParams(max_tokens=40))]
    assert "".join(chunks) == free.text
    ends = list(itertools.accumulate(map(len, chunks)))
    begun_early = 0
    for least in (1, 5, 20, 40):
        for begin, length in itertools.product(range(0, ends[25], 3), (1, 2, 5)):
            stop = free.text[begin : begin + length]
            # the first stop string that is complete in the text of a later token, as vLLM has it
            found = (at for at in range(len(free.text)) if free.text.startswith(stop, at) and at + length > ends[least - 1])
            cut = next(found, None) if least < 40 else None
            params = SamplingParams(max_tokens=40, min_tokens=least, stop=stop)
            (done,) = llm.generate(PROMPTS[0], params)
            assert done.text == free.text[:cut], (least, stop)
            assert done.finish_reason == ("length" if cut is None else "stop")
            assert len(done.token_ids) == (40 if cut is None else next(n for n, end in enumerate(ends, 1) if end >= cut + length))
            begun_early += cut is not None and cut < ends[least - 1]
    assert begun_early


def test_the_context_ends_a_text():
    short = LLM("code-8m", context=16)
    prompt = [7] * 12
    (done,) = short.generate(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    assert (len(done.token_ids), done.finish_reason) == (4, "length")
    (last,) = short.generate([7] * 15, SamplingParams(ignore_eos=True))
    assert (len(last.token_ids), last.finish_reason) == (1, "length")
    with pytest.raises(ConfigError, match=r"prompt 1 has 16 tokens.*context of 16 at most 15"):
        short.generate([[7], [7] * 16])


# --- prompts


def test_an_empty_prompt_is_the_start_of_a_document(llm):
    (done,) = llm.generate("", SamplingParams(max_tokens=5))
    assert done.prompt_token_ids == (0,)
    assert done == llm.generate([0], SamplingParams(max_tokens=5))[0]


def test_token_ids_of_any_kind(llm):
    ids = llm.encode(PROMPTS[0])
    params = SamplingParams(max_tokens=5)
    expected = llm.generate(PROMPTS[0], params)
    for prompts in (ids, tuple(ids), np.array(ids), [ids], [np.array(ids, np.int16)], [tuple(ids)]):
        assert llm.generate(prompts, params) == expected


def test_without_tokenizer_there_are_ids_and_no_text(llm):
    mute = LLM(bare(llm.model))
    params = SamplingParams(max_tokens=5)
    (done,), (spoken,) = mute.generate([5, 6], params), llm.generate([5, 6], params)
    assert (done.token_ids, done.finish_reason) == (spoken.token_ids, spoken.finish_reason)
    assert done.text == ""
    assert spoken.text
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        mute.generate("text")
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        mute.generate([5, 6], SamplingParams(stop="x"))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[8192]], "8192 is outside the vocabulary; accepted are 0 to 8191"),
        ([[-1]], "between 0 and"),
        ([[]], "non-empty"),
        ([[1.5]], "whole numbers"),
        ([[True, False]], "whole numbers"),
        ([[[1]]], "flat"),
        ([[10**30]], "whole numbers"),
        ([5, "text"], "prompt 5 is neither text nor a list of token ids"),
        ([None], "prompt None is neither"),
        ([["a"]], "whole numbers"),
        ([b"bytes"], "whole numbers"),
    ],
    ids=str,
)
def test_prompts_that_are_none(llm, prompts, message):
    with pytest.raises(ConfigError, match=message):
        llm.generate(prompts)


def test_one_bad_prompt_stops_all_before_any_runs(llm):
    with pytest.raises(ConfigError, match="prompt 2"):
        next(llm.stream(["a", "b", [9999]]))


def test_params_must_match_prompts(llm):
    with pytest.raises(ConfigError, match="2 SamplingParams for 3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 4096}, "context 4096 is out of range; .*2 to 2048"),
        ({"context": 1}, "context 1 is"),
        ({"max_sequences": 0}, "max_sequences is 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        LLM("code-8m", **options)


def test_unknown_backend():
    with pytest.raises(UnsupportedError, match="'abacus'.*reference"):
        LLM("code-8m", backend="abacus")


def test_model_may_be_given_as_path_or_model():
    directory, params = bundled_directory("code-8m"), SamplingParams(max_tokens=3)
    expected = LLM("code-8m").generate("def f(", params)
    assert LLM(directory).generate("def f(", params) == expected
    assert LLM(str(directory)).generate("def f(", params) == expected
    assert LLM(load(directory)).generate("def f(", params) == expected
