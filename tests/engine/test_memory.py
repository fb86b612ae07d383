"""The memory planner: its figures against what is then allocated, and what it refuses."""

import pytest

from hasten import LLM, SamplingParams, load
from hasten.backends.cpu import CpuBackend
from hasten.base.errors import ConfigError, UserError
from hasten.cli.options import parse_bytes
from hasten.engine.memory import plan_memory
from hasten.engine.plan import Settings
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
    program, settings = CpuBackend().program(MODEL, 64), Settings()
    plan = plan_memory(program, 0, slots=4, step_tokens=settings.step_tokens, memory=1 << 40, free=1 << 40)
    assert plan.cache_tokens == 64 * 64
    assert plan_memory(program, 0, slots=4, step_tokens=512, memory=None, free=0).cache_tokens == 64


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
