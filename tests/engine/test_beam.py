"""Beam search: the same sequences as transformers' own, on random models whose texts end early and late."""

import itertools

import numpy as np
import pytest
import torch
import transformers

from hasten import LLM, SamplingParams
from hasten.base.errors import ConfigError
from hasten.engine.beam import BeamSearcher
from hasten.engine.grammar import Grammar
from hasten.engine.sampling import BeamSearch

VOCAB = 48


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny random Llama, sharpened so that beams differ in more than rounding."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, eos_token_id=[5, 9], bos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.ndim == 2 else 1)
    path = tmp_path_factory.mktemp("beams")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["reference", "cpu"])
def engine(request, directory):
    return LLM(directory, backend=request.param)


@pytest.fixture(scope="module")
def oracle(directory):
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def theirs(oracle, prompt, search, count, **settings):
    ids = torch.tensor([prompt])
    made = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=search.width, num_return_sequences=count,
        length_penalty=search.length_penalty, early_stopping=search.early_stopping, return_dict_in_generate=True, output_scores=True,
        pad_token_id=0, **settings,
    )  # fmt: skip
    outputs = []
    for sequence in made.sequences[:, len(prompt) :].tolist():
        end = next((place for place, token in enumerate(sequence) if token in {5, 9}), len(sequence) - 1)
        outputs.append(tuple(sequence[: end + 1]))
    return outputs, made.sequences_scores.tolist()


SEARCHES = [
    BeamSearch(width=width, length_penalty=penalty, early_stopping=early)
    for width, penalty, early in itertools.product([2, 3, 5], [0.0, 1.0, -0.7, 2.5], [False, True, "never"])
]


def test_the_same_sequences_as_transformers_on_the_reference(directory, oracle):
    engine = LLM(directory, backend="reference")
    rng = np.random.default_rng(0)
    ended = lasted = 0
    for search in SEARCHES:
        for _ in range(3):
            prompt = rng.integers(10, VOCAB, size=rng.integers(1, 9)).tolist()
            most, count = int(rng.integers(1, 20)), int(rng.integers(1, search.width + 1))
            expected, _ = theirs(oracle, prompt, search, count, max_new_tokens=most)
            done = engine.generate([prompt], SamplingParams(max_tokens=most, beam=search, n=count))
            assert [one.token_ids for one in done] == expected, (search, prompt, most)
            assert [one.choice for one in done] == list(range(count))
            for one in done:
                assert one.finish_reason == ("stop" if one.token_ids[-1] in {5, 9} else "length")
            ended += sum(one.finish_reason == "stop" and len(one.token_ids) < most for one in done)
            lasted += sum(one.finish_reason == "length" for one in done)
    assert ended > 20
    assert lasted > 20


def test_bias_and_fewest_tokens_as_transformers_has_them(directory, oracle):
    engine = LLM(directory, backend="reference")
    for seed, search in enumerate([BeamSearch(width=3), BeamSearch(width=4, length_penalty=0.0)]):
        prompt = np.random.default_rng(seed).integers(10, VOCAB, size=5).tolist()
        bias = {12: -3.0, 20: 2.5, 9: 1.5}
        expected, _ = theirs(
            oracle,
            prompt,
            search,
            2,
            max_new_tokens=15,
            min_new_tokens=6,
            sequence_bias=[[[token], value] for token, value in bias.items()],
        )
        done = engine.generate([prompt], SamplingParams(max_tokens=15, min_tokens=6, beam=search, n=2, logit_bias=bias))
        assert [one.token_ids for one in done] == expected
        assert min(len(one.token_ids) for one in done) > 6


def test_the_native_backend_finds_likely_sequences_too(engine, oracle):
    """bf16 may rank near ties otherwise, so what is compared is what the outputs are worth."""
    search = BeamSearch(width=4)
    for seed in range(4):
        prompt = np.random.default_rng(seed).integers(10, VOCAB, size=6).tolist()
        _, scores = theirs(oracle, prompt, search, 1, max_new_tokens=12)
        (done,) = engine.generate([prompt], SamplingParams(max_tokens=12, beam=search))
        with torch.no_grad():
            rows = torch.log_softmax(oracle(torch.tensor([prompt + list(done.token_ids)])).logits[0, len(prompt) - 1 : -1], -1)
        worth = rows[torch.arange(len(done.token_ids)), torch.tensor(done.token_ids)].sum().item() / len(done.token_ids)
        assert worth >= scores[0] - 0.15
        assert done == engine.generate([[11], prompt], SamplingParams(max_tokens=12, beam=search))[1]


def test_one_beam_is_greedy(engine):
    prompts = [[11, 12, 13], [30]]
    greedy = engine.generate(prompts, SamplingParams(max_tokens=9))
    searched = engine.generate(prompts, SamplingParams(max_tokens=9, beam=BeamSearch(width=1)))
    assert [one.token_ids for one in greedy] == [one.token_ids for one in searched]


def test_enough_beams_find_the_best_sequence_of_all():
    """Against every sequence there is: width as large as the tree, a Markov chain for a model."""
    rng = np.random.default_rng(1)
    table = np.log(rng.dirichlet(np.ones(4), size=5)).astype(np.float32)  # row: last token, 4 for the start
    end, most = 0, 4
    every = []
    for length in range(1, most + 1):
        for tokens in itertools.product(range(4), repeat=length):
            if end in tokens[:-1] or (tokens[-1] != end and length < most):
                continue
            every.append((sum(table[a, b] for a, b in itertools.pairwise((4, *tokens))), tokens))
    every.sort(reverse=True)
    searcher = BeamSearcher(BeamSearch(width=64, length_penalty=0.0, early_stopping="never"), max_tokens=most, end_ids={end})
    while not searcher.done:
        parents = searcher.advance(np.stack([table[beam.tokens[-1] if beam.tokens else 4] for beam in searcher.beams]))
        assert len(parents) == len(searcher.beams)
    found = searcher.best(10)
    assert [one.tokens for one in found] == [tokens for _, tokens in every[:10]]
    np.testing.assert_allclose([one.score for one in found], [score for score, _ in every[:10]], rtol=1e-5)
    assert all(one.ended == (one.tokens[-1] == end) for one in found)


def test_what_may_not_come_does_not():
    searcher = BeamSearcher(BeamSearch(width=2), max_tokens=3, end_ids={0})
    row = np.full((1, 6), -np.inf, np.float32)
    row[0, 3] = -1.0
    assert searcher.advance(row) == [0]
    assert [beam.tokens for beam in searcher.beams] == [(3,)]
    row[0, 3], row[0, 0] = -np.inf, -2.0
    assert searcher.advance(row) == []
    assert searcher.done
    assert [(one.tokens, one.score, one.ended) for one in searcher.best(2)] == [((3, 0), -1.5, True)]
    nothing = BeamSearcher(BeamSearch(width=2), max_tokens=3, end_ids={0})
    for bad in (np.full((1, 6), -np.inf, np.float32), np.full((1, 6), np.nan, np.float32), np.zeros((2, 6), np.float32)):
        with pytest.raises(ValueError):
            nothing.advance(bad)


def test_beams_follow_a_grammar():
    engine = LLM("code-8m")
    params = SamplingParams(max_tokens=30, beam=BeamSearch(width=4), n=3, grammar=Grammar.regex("(red|green|blue)-[0-9]{3}"))
    done = engine.generate("colour = ", params)
    assert len({one.text for one in done}) == 3
    for one in done:
        assert one.finish_reason == "stop"
        colour, _, number = one.text.partition("-")
        assert colour in {"red", "green", "blue"}
        assert number.isdecimal()
        assert len(number) == 3


def test_what_beam_search_does_not_take_is_refused():
    for field, value in {"temperature": 0.5, "best_of": 3, "stop": "x", "logprobs": 0, "repetition_penalty": 1.1, "top_k": 4}.items():
        with pytest.raises(ConfigError, match=f"^{field} is .* with beam search"):
            SamplingParams(beam=BeamSearch(width=3), **{field: value})
    with pytest.raises(ConfigError, match="^n is 4 with a beam width of 3"):
        SamplingParams(beam=BeamSearch(width=3), n=4)
    for bad in ({"width": 0}, {"width": 65}, {"width": 2, "length_penalty": float("nan")}, {"width": 2, "early_stopping": "soon"}):
        with pytest.raises(ConfigError, match=r"^(beam width|length_penalty|early_stopping) is "):
            BeamSearch(**bad)
