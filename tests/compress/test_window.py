"""Windows in chosen layers: nothing changes where they are as long as the text, the cache's pages go back behind them, planner and
inspect say so, and families' configs say them where they can."""

import dataclasses

import numpy as np
import pytest

from hasten.backends.cpu import CpuBackend
from hasten.base.errors import ConfigError, UnsupportedError
from hasten.checkpoint import load_directory, save
from hasten.checkpoint.save import unread_elsewhere
from hasten.cli.inspect import describe
from hasten.compress.recipe import recipe_of
from hasten.compress.walk import Run
from hasten.engine.stepper import Stepper
from hasten.families import all_families
from hasten.model import Source
from hasten.program import Batch, lower, page_counts
from hasten.program.pages import STEP, sequence_bytes
from hasten.spec import Causal, SlidingWindow
from tests.compress.models import random_weights, small

FAMILIES = {family.name: family for family in all_families()}
PAGE = 16


def convert(model, **settings):
    (step,) = recipe_of([{"window": settings}])
    assert not step.needs_text
    step.transform.check(model, step.settings)
    return step.transform.apply(model, step.settings, None, Run("unused", 1))


def of_family(name, index=0, **more):
    config = {**FAMILIES[name].examples[index], **more}
    return dataclasses.replace(random_weights(FAMILIES[name].spec(config)), source=Source(name, config))


def ids_of(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, model.spec.vocab, count).tolist()


def test_a_window_as_long_as_the_text_changes_nothing_and_a_shorter_one_does():
    model = small()
    ids = ids_of(model, 40)
    plain = model.logits(ids)
    assert np.array_equal(convert(model, size=40).logits(ids), plain)
    made = convert(model, size=16, layers=[1]).logits(ids)
    assert np.array_equal(made[:16], plain[:16])
    assert np.abs(made[16:] - plain[16:]).max() > 1e-3
    assert np.array_equal(convert(model, size=40).logits(ids, backend="cpu"), model.logits(ids, backend="cpu"))


def test_only_the_spec_changes_and_only_in_chosen_layers():
    model = small()
    made = convert(model, size=9, layers=[1])
    assert [block.mixer.visible for block in made.spec.blocks] == [Causal(), SlidingWindow(size=9)]
    assert all(made.weights[name] is model.weights[name] for name in model.weights)
    assert made.provenance[-1].settings == {"size": 9, "layers": [1]}


def test_pages_behind_the_window_go_back():
    model = convert(small(), size=20, layers=[1])
    session = CpuBackend().session(model, 192)
    stepper = Stepper(session)
    ids, state = ids_of(model, 180), stepper.start(1)
    most = {group.name: 0 for group in stepper.cache.groups}
    for begin in range(0, 180, 12):
        stepper.step(Batch.of([ids[begin : begin + 12]], [begin], rows="last"), state)
        for index, group in enumerate(stepper.cache.groups):
            most[group.name] = max(most[group.name], group.pages - stepper.cache.pools[index].available)
    windowed = {group.name for group in session.program.states if group.visible == SlidingWindow(size=20)}
    assert len(windowed) == 1
    for name, count in most.items():
        assert count <= (20 + 12 - 2) // PAGE + 2 if name in windowed else count == -(-180 // PAGE)


def test_the_planner_counts_what_is_kept():
    spec = dataclasses.replace(small()).spec
    import msgspec

    model = random_weights(msgspec.structs.replace(spec, context=4096))
    made = convert(model, size=64, layers=[1])
    each = sequence_bytes(lower(model.spec), PAGE) // 2  # of one of two layers
    held = (64 + STEP - 2) // PAGE + 2
    assert sequence_bytes(lower(made.spec), PAGE) == each + each * held // (4096 // PAGE)
    assert made.provenance[-1].evidence["cache_bytes_per_sequence"] == [each, (each + each * held // (4096 // PAGE)) // 2]  # in bf16
    memory = 40 * sequence_bytes(lower(model.spec), PAGE)
    assert set(page_counts(lower(model.spec), PAGE, memory).values()) == {40 * 256}
    program = lower(made.spec)
    counts = {group.visible: page_counts(program, PAGE, memory)[group.name] for group in program.states}
    assert counts[Causal()] == 64 * 256  # more sequences than 40 in as many bytes, at most 64
    assert counts[SlidingWindow(size=64)] == 64 * held
    few = page_counts(program, PAGE, 1)
    assert set(few.values()) == {256}  # what scores a whole sequence gives no page back


def test_inspect_says_what_grows_and_what_does_not():
    model = small()
    facts = describe(convert(model, size=20, layers=[1]), lower(convert(model, size=20, layers=[1]).spec, cache="bfloat16"))
    assert facts["cache_bytes_per_token"] == 2 * 40 * 2
    assert facts["cache_windows"] == [{"tokens": 20, "bytes_per_token": 2 * 40 * 2}]
    assert describe(model, lower(model.spec, cache="bfloat16"))["cache_windows"] == []


@pytest.mark.parametrize(
    ("name", "more", "layers", "family"),
    [
        ("llama", {}, None, "mistral"),
        ("mistral", {"sliding_window": None}, None, "mistral"),
        ("qwen2", {"num_hidden_layers": 3}, [0, 2], "qwen2"),
        ("qwen3", {"num_hidden_layers": 3}, [1], "qwen3"),
    ],
)
def test_configs_that_can_say_it_do_and_transformers_agrees(name, more, layers, family, tmp_path):
    import torch
    import transformers

    model = of_family(name, **more)
    made = convert(model, size=5, layers=layers)
    assert made.source.family == family
    assert unread_elsewhere(made) == ""
    save(made, tmp_path / "out")
    again = load_directory(tmp_path / "out", "again")
    assert again.spec == made.spec
    ids = ids_of(model, 23)
    assert np.array_equal(again.logits(ids), made.logits(ids))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(expected - made.logits(ids)).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(model.logits(ids) - made.logits(ids)).max() > 1e-3 * np.abs(expected).max()


def test_what_no_config_says_is_in_hastens_own_layout(tmp_path):
    made = convert(of_family("llama"), size=5, layers=[1])
    assert "llama does not describe" in unread_elsewhere(made)
    save(made, tmp_path / "out")
    assert load_directory(tmp_path / "out", "again").spec == made.spec


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"size": 0}, "size is 0; .* accepts 1 to 191"),
        ({"size": 192}, "less than its context"),
        ({"size": 8, "layers": [7]}, "layers: 7 is none of"),
        ({"size": 8, "layers": [-1]}, "layers: -1 is none of"),
        ({"size": "8"}, "settings are size, layers"),
    ],
)
def test_what_cannot_work_is_refused_first(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        convert(small(), **settings)


def test_windows_only_become_smaller():
    once = convert(small(), size=30)
    assert convert(once, size=20).spec.blocks[0].mixer.visible == SlidingWindow(size=20)
    with pytest.raises(ConfigError, match="sees 30 tokens already"):
        convert(once, size=30)
    relative = FAMILIES["transformer_xl"]
    with pytest.raises(UnsupportedError, match="memory of segments"):
        convert(random_weights(relative.spec(relative.examples[0])), size=3)
