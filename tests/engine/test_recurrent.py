"""Models with recurrent state on the native backend: whatever the engine does with their states, a request has the tokens it has alone."""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from hasten import LLM, SamplingParams
from hasten.backends.cpu import CpuBackend
from hasten.backends.reference import ReferenceBackend
from hasten.base.errors import UserError
from hasten.engine.batching import ByPriority, Continuous
from hasten.engine.plan import Costs, Counters, Settings
from hasten.formats.weights import Weight, Weights
from hasten.model import Model
from hasten.program import Batch, KvGroup, RecurrentGroup, lower
from hasten.program.pages import page_counts, sequence_bytes
from hasten.spec import (
    Attention,
    Block,
    Embedding,
    GatedDeltaNet,
    GatedMLP,
    Head,
    LinearAttention,
    Mamba,
    Mamba2,
    PreNorm,
    RMSNorm,
    Rotary,
    Spec,
)
from tests.cuts import assert_the_same_bits_however_cut

VOCAB, CONTEXT, COUNT = 211, 192, 24
NORM = RMSNorm(eps=1e-6)
ROPE = Rotary(base=10000.0, dims=12)
MIXERS = (
    Mamba(inner=75, state=12, conv=4, dt_rank=5),
    Attention(heads=6, kv_heads=2, head_dim=20, value_dim=20, scale=20**-0.5, position=ROPE),
    Mamba2(heads=6, head_dim=20, state=12, groups=2, conv=3, norm=NORM),
    GatedDeltaNet(key_heads=2, value_heads=4, key_dim=12, value_dim=20, conv=4, norm=NORM),
    LinearAttention(heads=6, kv_heads=2, head_dim=20, value_dim=20, position=ROPE),
)


def model_of(*mixers) -> Model:
    """A block of each, with bf16 weights large enough that a token depends on what came before."""
    dense = GatedMLP(hidden=80, activation="silu")
    blocks = tuple(Block(mixer=mixer, feed_forward=dense, wiring=PreNorm(mixer=NORM, feed_forward=NORM)) for mixer in mixers)
    spec = Spec(vocab=VOCAB, width=72, context=CONTEXT, embedding=Embedding(), blocks=blocks, norm=NORM, head=Head(tied=False))
    rng, weights = np.random.default_rng(17), {}
    for name, shape in lower(spec).params.items():
        spread, centre = (0.1, 1.0) if name.endswith("norm.weight") else (2 * shape[-1] ** -0.5, 0.0)
        array = (rng.standard_normal(shape) * spread + centre).astype(ml_dtypes.bfloat16)
        weights[name] = Weight(array.shape, array.dtype, lambda array=array: array)
    return Model(name=" + ".join(type(mixer).__name__ for mixer in mixers), spec=spec, weights=Weights(weights))


HYBRID, STATES_ALONE = model_of(*MIXERS), model_of(MIXERS[2], MIXERS[0])


def prompts():
    """Of 20 to 130 tokens; every other one begins with the same 80 and has fewer than a page besides."""
    rng = np.random.default_rng(3)
    shared = rng.integers(0, VOCAB, 80).tolist()
    lengths = [int(rng.integers(3, 15) if index % 2 else rng.integers(20, 130)) for index in range(COUNT)]
    own = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
    return [[*shared, *tail] if index % 2 else tail for index, tail in enumerate(own)]


def params():
    """Greedy and seeded by turns."""
    return [
        SamplingParams(max_tokens=15 + index * 7 % 44, temperature=index % 3 / 2, seed=index, top_p=0.9, ignore_eos=True)
        for index in range(COUNT)
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Way:
    settings: Settings | None
    fired: Callable[[Counters], bool]
    sequences: float | None = None
    swaps: bool = False
    prefixes: bool = True
    waves: int = 1


SCARCE = Settings(64, Continuous(12), output_share=0.0)
WAYS = {
    "batches": Way(None, lambda c: c.shared_steps > 0.8 * c.steps),
    "small chunks": Way(Settings(7, Continuous(5)), lambda c: c.steps > 4 * COUNT),
    "no prefixes": Way(None, lambda c: c.hit_tokens == 0, prefixes=False),
    "snapshots": Way(Settings(160, Continuous(3)), lambda c: c.hit_tokens >= 80 * COUNT // 4),
    "preemption": Way(SCARCE, lambda c: c.recomputed > 1 and not c.swapped, sequences=3.0),
    "swaps": Way(dataclasses.replace(SCARCE, costs=Costs(1.0, 0.0)), lambda c: c.swapped > 1, sequences=3.0, swaps=True),
    "priorities": Way(
        Settings(64, Continuous(4), order=ByPriority(1e6), costs=Costs(1.0, 0.0)), lambda c: c.swapped > 1, swaps=True, waves=3
    ),
}
"""What the engine is told, whole sequences that it has room for, and whether that made happen what it should."""


@pytest.fixture(scope="module")
def expected():
    """What each prompt has alone, by the model's name."""
    found = {}
    for model in (HYBRID, STATES_ALONE):
        llm = LLM(model, backend="cpu", context=CONTEXT, max_sequences=1, prefixes=False)
        found[model.name] = [llm.generate([prompt], each)[0].token_ids for prompt, each in zip(prompts(), params())]
        assert len({*found[model.name]}) == COUNT
    return found


GROWING = {"preemption", "swaps"}  # states alone do not grow, so pages are never short once they are there


@pytest.mark.row("nondeterminism", "the same tokens however played")
@pytest.mark.parametrize(
    ("way", "model"),
    [*(pytest.param(way, HYBRID, id=f"{way}-hybrid") for way in WAYS)]
    + [pytest.param(way, STATES_ALONE, id=f"{way}-states-alone") for way in WAYS if way not in GROWING],
)
def test_the_same_tokens_however_they_are_played(way, model, expected):
    asked = WAYS[way]
    each = sequence_bytes(CpuBackend().program(model, CONTEXT), 16)
    llm = LLM(
        model, backend="cpu", context=CONTEXT, scheduling=asked.settings, prefixes=asked.prefixes,
        cache_bytes=None if asked.sequences is None else int(asked.sequences * each), swap_bytes=64 * each if asked.swaps else 0,
    )  # fmt: skip
    done, streams = {}, []
    for wave in range(asked.waves):
        indices = list(range(COUNT))[wave :: asked.waves]
        stream = llm.answered([llm.prepare(prompts()[index], params()[index], priority=wave) for index in indices])
        place, (first,) = next(stream)
        done[indices[place]] = first
        streams.append((indices, stream))
    for indices, stream in streams:
        done.update((indices[place], one) for place, (one,) in stream)
    for index, tokens in enumerate(expected[model.name]):
        assert done[index].error is None
        assert done[index].token_ids == tokens, f"{way}: prompt {index}"
    counters = llm.engine().counters
    assert asked.fired(counters), f"never happened: {way} ({counters})"
    assert [pool.available for pool in llm.engine().cache.pools] == [pool.pages for pool in llm.engine().cache.pools]


def test_outputs_of_one_prompt_fork_its_state():
    llm = LLM(HYBRID, backend="cpu", context=CONTEXT)
    several = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=4, ignore_eos=True)
    made = llm.generate([prompts()[0]], several)
    assert llm.engine().counters.forks == 2
    alone = LLM(HYBRID, backend="cpu", context=CONTEXT, max_sequences=3, prefixes=False, scheduling=Settings(5, Continuous(3)))
    assert [one.token_ids for one in alone.generate([prompts()[0]], several)] == [one.token_ids for one in made]
    assert len({one.token_ids for one in made}) == 3


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if not isinstance(mixer, Attention)], ids=lambda mixer: type(mixer).__name__)
def test_the_same_bits_however_the_batch_is_cut(mixer):
    sessions = [CpuBackend(threads=threads).session(model_of(mixer, mixer), CONTEXT) for threads in (1, 2)]
    assert_the_same_bits_however_cut(sessions, np.random.default_rng(2).integers(0, VOCAB, 150).tolist())


def test_a_session_has_the_pages_that_were_planned():
    """A page of recurrent state has a sequence's bytes of it; a cache of so many bytes has so many."""
    program = CpuBackend().program(HYBRID, CONTEXT)
    session = CpuBackend().session(HYBRID, CONTEXT, cache_bytes=5 * sequence_bytes(program, 16))
    assert session.pages == page_counts(program, 16, 5 * sequence_bytes(program, 16))
    kinds = 0
    for group, pool in zip(program.states, session.compiled.pools, strict=True):
        if isinstance(group, RecurrentGroup):
            assert (pool.page_bytes, pool.pages) == (group.bytes_per_sequence(), 10)
            kinds += 1
    assert kinds == 7, "a scan of each mixer, and convolutions of three widths"
    assert sum(pool.page_bytes * pool.pages for pool in session.compiled.pools) <= 5 * sequence_bytes(program, 16)


def test_several_sequences_are_scored_at_once_each_in_a_page_of_states():
    each = sequence_bytes(CpuBackend().program(HYBRID, CONTEXT), 16)
    session = CpuBackend().session(HYBRID, CONTEXT, cache_bytes=2 * each)  # four states of each kind
    sequences = [prompt[:20] for prompt in prompts()[:4]]
    together = session.score(Batch.of(sequences))
    assert np.array_equal(together, np.concatenate([session.score(Batch.of([one])) for one in sequences]))
    with pytest.raises(UserError, match="5 pages are more than the cache's 4; score fewer"):
        session.score(Batch.of([*sequences, [1]]))


def test_hidden_states_are_the_references_and_leave_the_same_state():
    ids = prompts()[0][:30]
    batch, rest = Batch.of([ids]), Batch.of([[5, 6, 7]], [len(ids)])
    session, reference = CpuBackend().session(HYBRID, CONTEXT), ReferenceBackend().session(HYBRID, CONTEXT)
    pages = [[[0, 1, 2] if isinstance(group, KvGroup) else [4] for group in session.program.states]]
    whole = session.run(Batch.of([[*ids, 5, 6, 7]]), pages).numpy()
    found, expected = session.hidden(batch, pages), reference.hidden(batch, pages)
    assert np.abs(found - expected).mean() <= 0.1 * np.abs(expected).mean()  # products are in bf16
    assert np.array_equal(session.run(rest, pages).numpy(), whole[len(ids) :])


def test_the_native_backend_is_chosen():
    llm = LLM(HYBRID, context=CONTEXT)
    assert (llm.backend, llm.notice) == ("cpu", "")
