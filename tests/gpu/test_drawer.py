"""An engine on the device's own draws: the tokens of its own sampler, the next step begun before they are known, few rows fetched."""

import numpy as np
import pytest
import torch

from hasten.backends.cuda import drawer as drawing_there
from hasten.backends.cuda import session as playing
from hasten.backends.cuda.backend import INTERPRETED, CudaBackend
from hasten.backends.cuda.drawer import DeviceDrawer, DeviceDrawn, DeviceLogits
from hasten.backends.cuda.kernels.history import History
from hasten.backends.cuda.kernels.sampling import feed
from hasten.backends.cuda.session import CudaSession
from hasten.checkpoint import load
from hasten.engine.batching import Continuous
from hasten.engine.engine import Engine
from hasten.engine.plan import Settings
from hasten.engine.request import Request
from hasten.engine.sampler import Sampler
from hasten.engine.sampling import SamplingParams
from hasten.families import all_families
from hasten.program import Batch, HostLogits, Wanted, first_pages
from tests.families.oracles import make_checkpoint

WARM = {"temperature": 1.0}


@pytest.fixture(scope="module")
def backend():
    return CudaBackend() if torch.cuda.is_available() else CudaBackend(INTERPRETED)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for name in ("llama", "mamba"):
        config = next(family.examples[0] for family in all_families() if family.name == name)
        directory = tmp_path_factory.mktemp(name)
        make_checkpoint(config, directory)
        made[name] = load(directory)
    return made


class HostDrawn:
    """The same session, of which the engine draws."""

    drawer = None

    def __init__(self, session):
        self.program, self.page, self.pages, self.threads, self.carry_out = (
            session.program, session.page, session.pages, session.threads, session.carry_out
        )  # fmt: skip
        self._session = session

    def run(self, batch, pages):
        return HostLogits(self._session.run(batch, pages).numpy())


@pytest.fixture
def events(monkeypatch):
    """What was begun, drawn and waited for, in order: ("run", tokens that were due), ("draw", rows), ("known", rows), ("fetch", rows)."""
    found = []

    def told(owner, name, what):
        plainly = getattr(owner, name)

        def tells(*arguments, **settings):
            found.append(what(*arguments))
            return plainly(*arguments, **settings)

        monkeypatch.setattr(owner, name, tells)

    told(CudaSession, "run", lambda session, batch, pages: ("run", int((batch.tokens < 0).sum())))
    told(drawing_there, "sample", lambda logits, *rest: ("draw", len(logits)))
    told(DeviceDrawn, "tokens", lambda drawn: ("known", len(drawn._there)))
    told(DeviceLogits, "numpy", lambda logits, rows=None: ("fetch", logits.shape[0] if rows is None else len(rows)))
    return found


def run_through(session, asked, prompts, ends=()):
    """What each request put out, why it ended, and the log-probabilities that were told of it."""
    engine = Engine(session, Settings(24, Continuous(6)))
    outputs = [
        [
            Request(
                index, prompt, params, limit=64, end_ids=frozenset(ends), detokenizer=None, program_context=64, choice=choice, seed=index
            )
            for choice in range(params.choices)
        ]
        for index, (prompt, params) in enumerate(zip(prompts, asked))
    ]  # fmt: skip
    for each in outputs:
        engine.submit(each, key="all")
    chunks = []
    while engine.busy:
        chunks += engine.step()
    assert [pool.available for pool in engine.cache.pools] == [pool.pages for pool in engine.cache.pools]
    told = [(chunk.index, chunk.choice, chunk.logprobs, chunk.prompt_logprobs) for chunk in chunks]
    logprobs = [each for each in sorted(told, key=lambda one: one[:2]) if each[2] or each[3]]
    return [(one.output, one.finish_reason) for each in outputs for one in each], logprobs, [chunk.error for chunk in chunks if chunk.error]


PLAIN = [
    {"max_tokens": 5}, {"max_tokens": 6, **WARM, "min_tokens": 3},
    {"max_tokens": 6, **WARM, "frequency_penalty": 1.5, "repetition_penalty": 1.3},
    {"max_tokens": 5, **WARM, "top_k": 30, "top_p": 0.9, "logit_bias": {3: 5.0, 8: 9.0}, "presence_penalty": 2.0},
]  # fmt: skip
LEFT = [{"max_tokens": 3, **WARM, "logprobs": 2}, {"max_tokens": 3, "prompt_logprobs": 1}, {"max_tokens": 3, **WARM, "n": 2}]


@pytest.mark.parametrize(("name", "asked", "every"), [("llama", PLAIN, 4), ("llama", [*PLAIN[1:2], *LEFT], 9), ("mamba", PLAIN[:2], 3)])
def test_tokens_are_the_engines(name, asked, every, models, backend, events):
    model, rng = models[name], np.random.default_rng(5)
    vocab = model.spec.vocab
    prompts = [rng.integers(0, vocab, int(count)).tolist() for count in rng.integers(2, 6, len(asked))]
    params, ends = [SamplingParams(**each) for each in asked], range(0, vocab, every)
    session = backend.session(model, 64)
    expected = run_through(HostDrawn(session), params, prompts, ends)
    assert not any(what in {"draw", "known"} for what, _ in events)
    events.clear()
    found = run_through(session, params, prompts, ends)
    assert found == expected
    assert not found[2]
    assert any(reason == "stop" for _, reason in found[0])  # one step after what it drew was fed
    runs = [at for at, (what, _) in enumerate(events) if what == "run"]
    waits = [at for at, (what, _) in enumerate(events) if what == "known"]
    begun_before = sum(any(what == "run" for what, _ in events[at - 2 : at]) for at in waits)  # a step, and its draw
    fed, fetched = sum(due for what, due in events if what == "run"), [rows for what, rows in events if what == "fetch"]
    if asked is PLAIN or name == "mamba":
        assert fed >= 2 * len(asked)
        assert sum(rows for what, rows in events if what == "draw") == fed + len(asked)
        assert not fetched
        assert begun_before >= len(runs) - 2
    else:
        scored = len(prompts[2]) - 1
        assert sum(fetched) == 3 + scored, fetched  # of the output with log-probabilities, and of the prompt


def test_draws_that_fail_are_tried_alone(models, backend, monkeypatch):
    asked, prompts = [SamplingParams(**{**each, "max_tokens": 4}) for each in PLAIN[1:4]], [[5, 9, 9], [7] * 5, [1, 2]]
    session, plainly, failed = backend.session(models["llama"], 64), drawing_there.sample, []
    expected = run_through(HostDrawn(session), asked, prompts)

    def failing(*arguments, **settings):
        plainly(*arguments, **settings)
        if len(failed) < 2 and len(arguments[0]) == 3:
            failed.append(len(arguments[0]))
            raise torch.cuda.OutOfMemoryError("injected")

    monkeypatch.setattr(drawing_there, "sample", failing)
    assert run_through(session, asked, prompts) == expected
    assert failed == [3, 3]


# --- the drawer by itself


def host_tokens(logits, requests):
    return [draw.token for draw in Sampler().draw(logits, requests)]


def test_histories_are_kept_while_tokens_are_not_known(device):
    """Four draws of one output, of which the host is told no token; others come beside it, for whom there was no room."""
    vocab, rng = 50, np.random.default_rng(2)
    logits = [(rng.normal(size=(5, vocab)) * 2).astype(np.float32) for _ in range(4)]
    for rows in logits:
        rows[0] = 1 + np.arange(vocab) / 10  # what was drawn before is not the likeliest again
    one, *others = (penalised(i) for i in range(5))
    drawer, drawn = DeviceDrawer(drawer_device(device)), []
    for step, rows in enumerate(logits):
        wanted = [wanted_of(one, step), *(wanted_of(other, 0) for other in (others if step == 2 else ()))]
        drawn.append(drawer.draw(DeviceLogits(torch.from_numpy(rows).to(device)), range(len(wanted)), wanted))
        assert not drawn[-1].left
    for step, rows in enumerate(logits):
        some = [one, *(others if step == 2 else ())]
        tokens = host_tokens(rows[: len(some)], some)
        assert drawn[step].tokens() == tokens
        one.take(tokens[0])
    assert one.output == [49, 48, 47, 46]
    assert len(drawer._history.words) == 8
    unknown = drawer.draw(DeviceLogits(torch.from_numpy(logits[0]).to(device)), [0], [wanted_of(others[0], 2)])
    assert "slot" in unknown.left[0]
    assert unknown.tokens() == [-1]


def penalised(index):
    params = SamplingParams(frequency_penalty=2.0, repetition_penalty=1.5, logit_bias={4: 3.0})
    return Request(index, [index] * 4, params, limit=99, end_ids=frozenset(), detokenizer=None, program_context=99, seed=index)


def test_histories_begin_anew_where_a_draw_failed_halfway(device, monkeypatch):
    """It may have noted its tokens."""
    one, drawer, plainly = penalised(3), DeviceDrawer(drawer_device(device)), drawing_there.sample
    logits = DeviceLogits(torch.randn(1, 50, generator=torch.Generator().manual_seed(1)).to(device))

    def failing(*arguments, **settings):
        plainly(*arguments, **settings)
        raise torch.cuda.OutOfMemoryError("injected")

    with monkeypatch.context() as patched:
        patched.setattr(drawing_there, "sample", failing)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            drawer.draw(logits, [0], [wanted_of(one, 0)])
    assert (drawer._history.words & 0xFFFFF).sum() == 1
    tokens = drawer.draw(logits, [0], [wanted_of(one, 0)]).tokens()
    anew = History.of(1, 50, device)
    anew.begin(0, one.prompt, tokens, one.params.logit_bias)
    assert torch.equal(drawer._history.words, anew.words)


def wanted_of(request, due):
    params = request.params
    return Wanted(
        key=request.key, seed=request.seed, position=len(request.prompt) + len(request.output) + due, temperature=params.temperature,
        frequency_penalty=params.frequency_penalty, repetition_penalty=params.repetition_penalty, bias=params.logit_bias,
        prompt=request.prompt, output=request.output,
    )  # fmt: skip


def drawer_device(device):
    return CudaBackend().on if device.type == "cuda" else INTERPRETED


def test_rows_may_be_drawn_from_in_any_order_and_again(device):
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    logits, drawer = DeviceLogits(values.to(device)), DeviceDrawer(drawer_device(device))
    for rows in ([3, 1, 1, 4], [1, 2], [0, 1, 2, 3, 4]):
        drawn = drawer.draw(logits, rows, [Wanted(seed=row, position=9) for row in rows])
        assert drawn.tokens() == values[rows].argmax(dim=1).tolist()
        assert drawer.drawn.tolist() == drawn.tokens()
        assert np.array_equal(logits.numpy(rows), values[rows].numpy())
    elsewhere = drawer.draw(HostLogits(values.numpy()), [0, 1], [Wanted(seed=1, position=9)] * 2)
    assert (elsewhere.tokens(), sorted(elsewhere.left)) == ([-1, -1], [0, 1])
    assert drawer.draw(logits, [], []).tokens() == []


def test_tokens_are_fed_on_the_device(device):
    tokens = torch.tensor([7, -1, -2, 0, -4, -3, -9, -2] + [-1] * 200 + [-3], dtype=torch.int32, device=device)
    feed(tokens, torch.tensor([50, -1, 70], dtype=torch.int32, device=device))
    assert tokens.tolist() == [7, -1, 50, 0, 70, -1, -9, 50] + [-1] * 200 + [-1]


def test_a_step_takes_what_was_drawn(models, backend, monkeypatch):
    """In one piece and in several, whose rows share memory; a token that nobody draws is refused."""
    session, ids = backend.session(models["llama"], 64), [5, 17, 3, 40, 8, 2]
    batch = Batch.of([ids, ids[:4]])
    pages = first_pages(session.program, batch, session.page, session.pages)
    whole = session.run(batch, pages).numpy()
    drawn = session.drawer.draw(session.run(batch, pages), [1, 5], [Wanted(seed=1, position=9)] * 2)
    named = Batch(batch.tokens.copy(), batch.positions, batch.offsets, batch.rows)
    named.tokens[[0, 3]] = -3, -2
    batch.tokens[[0, 3]] = drawn.tokens()[::-1]
    told = session.run(batch, pages).numpy()
    assert not np.array_equal(told, whole)
    assert np.array_equal(session.run(named, pages).numpy(), told)
    monkeypatch.setattr(playing, "STEP_TOKENS", 4)
    assert np.array_equal(session.run(named, pages).numpy(), told)
    named.tokens[0] = -4
    with pytest.raises(playing.ConfigError, match="token id -4 is outside"):
        session.run(named, pages)
