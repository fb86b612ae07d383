"""The memory planner: its figures against what is then allocated, and what it refuses."""

import pytest

from hasten import LLM, SamplingParams, load
from hasten.backends.cpu import CpuBackend
from hasten.backends.reference import ReferenceBackend
from hasten.base.errors import ConfigError, UserError
from hasten.cli.options import parse_bytes
from hasten.engine import share_memory
from hasten.engine.batching import Continuous
from hasten.engine.memory import Load, plan_memory
from hasten.engine.plan import Settings
from hasten.families import phi3
from hasten.program import Formats
from tests.cli import main
from tests.families.oracles import make_checkpoint

MODEL = load("code-8m")
EXPERTS = {
    "model_type": "mixtral", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "sliding_window": None,
}  # fmt: skip


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4", "int4-g32"])
@pytest.mark.parametrize("name", ["code-8m", "experts"])
def test_weights_are_what_is_packed(weights, name, tmp_path):
    model = MODEL
    if name == "experts":
        if weights == "int4-g32":
            pytest.skip("the experts' packed bytes are counted per step")
        make_checkpoint(EXPERTS, tmp_path)
        model = load(tmp_path)
    backend, formats = CpuBackend(), Formats(weights)
    program = backend.program(model, 256, formats)
    planned = backend.weight_bytes(program)
    packed = backend.session(model, 256, formats).compiled.weight_bytes
    if name == "experts":  # of which a step reads half
        assert packed < planned < 2.5 * packed
        return
    table = 2 * MODEL.spec.vocab * MODEL.spec.width
    assert planned - table == pytest.approx(packed, rel=0.06)


@pytest.mark.parametrize("context", [64, 2048])
@pytest.mark.parametrize("name", ["code-8m", "experts"])
def test_the_arena_is_what_is_then_laid_out(name, context, tmp_path):
    model = MODEL
    if name == "experts":
        make_checkpoint({**EXPERTS, "max_position_embeddings": 2048}, tmp_path)
        model = load(tmp_path)
    llm = LLM(model, backend="cpu", context=context, max_sequences=8, cache_bytes=1)
    values = llm.engine().session.compiled.arena_bytes
    assert llm.memory_plan().arena == values + 4 * model.spec.vocab * (2 * 8 + 64)
    live = ReferenceBackend().arena_bytes(ReferenceBackend().program(model, context), min(512, context))
    assert 0.5 * values < live < 2 * values  # another way to reckon


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_cache_fits_into_what_was_planned(backend):
    llm = LLM(MODEL, backend=backend, context=512, memory=80_000_000, swap_bytes=3_000_000)
    plan = llm.memory_plan()
    assert plan.total <= 80_000_000
    assert plan.total > 79_000_000 or plan.cache == 64 * 512 * plan.cache // plan.cache_tokens
    engine = llm.engine()
    taken = sum(group.pages * group.page_bytes for group in engine.cache.groups)
    assert taken <= plan.cache
    assert taken > 0.95 * plan.cache
    outside = sum(places.pages * group.page_bytes for places, group in zip(engine.cache.places, engine.cache.groups))
    assert 0.9 * 3_000_000 < outside <= 3_000_000
    assert llm.generate(["def"], SamplingParams(max_tokens=3))[0].error is None
    assert "weights " in str(plan)
    assert f"together {plan.total:,} bytes" in str(plan)


@pytest.mark.parametrize("cache", ["int8", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_cache_of_bytes_holds_nearly_twice_as_many_sequences(head_dim, cache, tmp_path):
    make_checkpoint(EXPERTS | {"hidden_size": 4 * head_dim}, tmp_path)
    model, context = load(tmp_path), 256
    bare = LLM(model, backend="cpu", context=context).memory_plan()
    memory = bare.weights + bare.arena + 32 * bare.cache * context // bare.cache_tokens
    held = {}
    for form in ("bf16", cache):
        engine = LLM(model, backend="cpu", context=context, memory=memory, formats=Formats(cache=form)).engine()
        (group,) = engine.cache.groups
        assert group.pages * group.page_bytes <= memory - bare.weights - bare.arena
        held[form] = group.pages * engine.cache.page // context
    assert held["bf16"] in {31, 32}  # a page may be short of one
    assert held[cache] >= 1.9 * held["bf16"]


def test_what_is_not_enough_is_refused_with_what_would_be():
    with pytest.raises(UserError, match=r"20,000,000 bytes of memory are not enough.*give at least [\d,]+, or a smaller") as caught:
        LLM(MODEL, backend="cpu", memory=20_000_000)
    least = int(str(caught.value).partition("give at least ")[2].partition(", or")[0].replace(",", ""))
    with pytest.raises(UserError):
        LLM(MODEL, backend="cpu", memory=least - 1)
    llm = LLM(MODEL, backend="cpu", memory=least)
    (done,) = llm.generate([[5] * 2000], SamplingParams(max_tokens=48, ignore_eos=True))
    assert len(done.token_ids) == 48
    assert llm.memory_plan().cache_tokens == 2048


def test_more_memory_than_64_long_sequences_need_is_not_taken():
    program = CpuBackend().program(MODEL, 64)
    load = Load("m", program, weights=0, values=0, rows=4, page=16)
    (plan,) = plan_memory([load], memory=1 << 40, free=1 << 40)
    assert plan.cache_tokens == 64 * 64
    assert plan_memory([load], memory=None, free=0)[0].cache_tokens == 64


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pages_that_no_context_fills_are_counted_whole(backend):
    llm = LLM(MODEL, backend=backend, context=100)
    (load,) = llm.loads()
    least = sum((load.weights, load.arena, load.sequence))
    bounded = LLM(MODEL, backend=backend, context=100, memory=least)
    groups = bounded.engine().cache.groups
    assert [group.pages for group in groups] == [7] * len(groups)
    assert sum(group.pages * group.page_bytes for group in groups) == load.sequence == bounded.memory_plan().cache


def test_prompts_are_scored_by_so_many_rows_a_step_as_were_planned():
    """Else a step's logits would take what no planner has counted: a row of them may be a megabyte."""
    prompts = [list(range(5 + seed, 155 + seed)) for seed in range(3)]
    asked = [SamplingParams(max_tokens=3, prompt_logprobs=2, ignore_eos=True)] * 3
    whole = LLM(MODEL, backend="cpu", context=256, scheduling=Settings(512, Continuous(4), scored_tokens=512))
    few = LLM(MODEL, backend="cpu", context=256, scheduling=Settings(512, Continuous(4), scored_tokens=20))
    most = []
    for llm in (whole, few):
        run, rows = llm.engine().session.run, []
        llm.engine().session.run = lambda batch, pages, run=run, rows=rows: rows.append(len(batch.rows)) or run(batch, pages)
        most.append(rows)
    beside = SamplingParams(max_tokens=30, ignore_eos=True)
    assert whole.generate([*prompts, [3]], [*asked, beside]) == few.generate([*prompts, [3]], [*asked, beside])
    assert max(most[0]) > 400
    assert 20 <= max(most[1]) <= 20 + 4
    vocab = MODEL.spec.vocab
    assert whole.memory_plan().arena - few.memory_plan().arena == (256 - 20) * 4 * vocab
    with pytest.raises(ConfigError, match="scored_tokens is 0"):
        Settings(scored_tokens=0)


# --- several models in one memory


def test_a_model_of_two_programs_has_both_in_its_memory(tmp_path):
    config = next(config for config in phi3.FAMILY.examples if "original_max_position_embeddings" in config)
    make_checkpoint(config, tmp_path)
    llm = LLM(load(tmp_path), backend="cpu", memory=2_000_000)
    short, long = llm.preparer.contexts
    plan, each = llm.memory_plan(), [llm.memory_plan(context) for context in (short, long)]
    assert plan.total == each[0].total + each[1].total <= 2_000_000
    llm.generate([[1, 2, 3], list(range(1, short + 9))], SamplingParams(max_tokens=2))
    taken = sum(group.pages * group.page_bytes for context in (short, long) for group in llm.engine(context).cache.groups)
    assert 0.9 * plan.cache < taken <= plan.cache


@pytest.fixture
def small(tmp_path):
    make_checkpoint(EXPERTS, tmp_path)
    return load(tmp_path)


def pair(small, **settings):
    return LLM(MODEL, backend="cpu", context=512, **settings), LLM(small, backend="cpu", context=200, max_sequences=4, swap_bytes=9000)


def test_two_models_answer_in_one_process_in_the_memory_they_share(small):
    prompts = [list(range(begin, begin + 30)) for begin in (5, 40, 99)]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    expected = [[one.token_ids for one in llm.generate(prompts, params)] for llm in pair(small)]
    llms = pair(small)
    plans = share_memory(llms, 40_000_000)
    assert sum(plan.total for plan in plans) <= 40_000_000
    assert sum(plan.total for plan in plans) > 39_999_990
    assert [llm.memory_plan() for llm in llms] == list(plans)
    taken = [sum(group.pages * group.page_bytes for group in llm.engine().cache.groups) for llm in llms]
    for llm, plan, pages in zip(llms, plans, taken):
        assert 0.95 * plan.cache < pages <= plan.cache
        assert llm.loads()[0].sequence < plan.cache
    sequences = [plan.cache / llm.loads()[0].sequence for llm, plan in zip(llms, plans)]
    assert sequences[0] == pytest.approx(sequences[1], rel=1e-4)
    streams, made = [llm.stream(prompts, params) for llm in llms], [[[], [], []], [[], [], []]]
    for chunks in zip(*streams, strict=True):
        for its, chunk in zip(made, chunks):
            its[chunk.index] += chunk.token_ids
    assert [[tuple(one) for one in its] for its in made] == expected


def test_two_models_that_do_not_fit_together_are_refused_with_what_would_do(small):
    said = r"weights of code-8m take .*; weights of .* take .* swapped pages 9,000; give at least [\d,]+, or a smaller"
    with pytest.raises(UserError, match=said) as caught:
        share_memory(pair(small), 22_000_000)
    least = int(str(caught.value).partition("give at least ")[2].partition(", or")[0].replace(",", ""))
    with pytest.raises(UserError):
        share_memory(pair(small), least - 1)
    llms = pair(small)
    plans = share_memory(llms, least)
    assert sum(plan.total for plan in plans) == least
    assert [plan.cache_tokens for plan in plans] == [512, 200]
    assert [llm.generate([[5] * 150], SamplingParams(max_tokens=4))[0].error for llm in llms] == [None, None]
    with pytest.raises(ConfigError, match="code-8m has its cache already"):
        share_memory(llms, 2 * least)
    with pytest.raises(ConfigError, match="code-8m has a bound of its own"):
        share_memory(pair(small, memory=60_000_000), 2 * least)


@pytest.mark.parametrize(
    ("text", "number"), [("5", 5), ("8GB", 8 * 10**9), ("1.5 MiB", 3 << 19), ("2kb", 2000), ("7B", 7), (None, None)]
)  # fmt: skip
def test_bytes_as_people_write_them(text, number):
    assert parse_bytes("memory", text) == number


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 tons", "1e9", "nan", "9" * 40, "8GB "[::-1]])
def test_bytes_that_are_none(text):
    with pytest.raises(ConfigError, match="memory is .*accepted: a number of bytes"):
        parse_bytes("memory", text)


def test_the_command_says_what_it_will_take(monkeypatch, capsys):
    arguments = ["generate", "code-8m", "--token-ids", "1,2", "-n", "2", "--backend", "cpu"]
    outcome = main(monkeypatch, capsys, *arguments, "--memory", "60MB", "--max-model-len", "512")
    assert outcome.code == 0
    assert "memory: weights 20," in outcome.err
    outcome = main(monkeypatch, capsys, *arguments, "--memory", "20MB")
    assert outcome.code == 2
    assert "give at least" in outcome.err
    outcome = main(monkeypatch, capsys, *arguments, "--max-model-len", "9999")
    assert outcome.code == 2
    assert "9999 is out of range" in outcome.err
