"""Chat templates: the text is transformers' own, and no template does harm or takes the process with it."""

import resource
import time
from contextlib import suppress

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from hasten.base.errors import UserError
from hasten.engine.chat import MAX_TEMPLATE_BYTES, PLAIN_TEMPLATE, render_chat

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{%- if messages[0]['role'] == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else -%}
    {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA = """\
{{ bos_token }}{% if tools is not none %}tools{% endif %}
{% set system = messages[0]['content'] | trim if messages[0].role == 'system' else '' %}
{% for message in messages if message.role != 'system' %}
    {% if not message['role'] in ['user', 'assistant'] %}
        {{ raise_exception('Only user and assistant, not ' + message['role']) }}
    {% endif %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>{% if not loop.last %}{{ loop.index }}/{{ loop.length }}{% endif %}

{% endfor %}
{{ system }}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

MACROS = """\
{% macro turn(role, content, end=eos_token) %}[{{ role | upper }}]{{ content | replace('\\n', ' ') }}{{ end }}{% endmacro %}
{% set ns = namespace(count=0, seen=[], last={'a': 1}) %}
{% for message in messages %}
  {% set ns.count = ns.count + 1 %}
  {% set ns.seen = ns.seen + [message.role] %}
  {% if message.role == 'system' %}{% continue %}{% endif %}
  {{ turn(message.role, content=message.content) }}
  {% if ns.count > 3 %}{% break %}{% endif %}
{% else %}
nothing
{% endfor %}
{{ ns.count }} {{ ns.seen | join(', ') }} {{ ns.seen[1:] | length }} {{ messages[::-1][0].content[:3] }}
{% for role, group in messages | groupby('role') %}{{ role }}={{ group | map(attribute='content') | list | length }};{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}
{% call(x) wrap() %}{{ x }}{% endcall %}
"""

MACROS = "{% macro wrap() %}<{{ caller('in') }}>{% endmacro %}\n" + MACROS

JSON = """\
{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}
{{ {'k': ['<b>', "'", 'é', 1.5, none, true]} | tojson(separators=(',', ':')) }}
{% endfor %}{{ messages | tojson(sort_keys=true, ensure_ascii=true) }}
{{ '%s-%05d' % ('a', 7) }} {{ '{:>5}{x}'.format('b', x=2) }} {{ 'ab' * 3 }} {{ [1, 2] * 2 }}
{{ 2 ** 10 }} {{ 7 // 2 }} {{ (1, 2) + (3,) }}
{{ 'abc'.split('b') }} {{ 'a'.join(['x', 'y']) }} {{ 'abc'.replace('b', 'ZZ') }}
{{ 'x' | center(9) }} {{ 'a\\nb' | indent(4, true) }} {{ none }} {{ true }}
{{ dict(a=1) }} {{ range(5) | list }} {{ 'a<b' | e }} {{ undefined_name }} {{ undefined_name is defined }} {{ ('x' ~ 1 ~ none) | length }}
{% generation %}  kept {{ 'text' }}{% endgeneration %}
{% set block %}
  inner {{ 'b' }}
{% endset %}
{{- block }}{% filter upper %}shout {{ 'x' }}{% endfilter %}
{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}
{% for a, b in {'p': 1, 'q': 2}.items() %}{{ a }}{{ b }}{{ loop.cycle('-', '+') }}{% endfor %}
"""

TEMPLATES = {"plain": PLAIN_TEMPLATE, "chatml": CHATML, "llama": LLAMA, "macros": MACROS, "json": JSON}
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be <brief> & 'kind'. "}, {"role": "user", "content": "a\nb\n\n"}]
    + [{"role": "assistant", "content": "日本 👍🏽 \u2028"}, {"role": "user", "content": "{{ 7 * 7 }} {% raw %} \\n"}]
    + [{"role": "assistant", "content": ""}, {"role": "user", "content": "x"}],
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS, ids=["one", "many"])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(name, chat, prompt):
    expected, _ = render_jinja_template([chat], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **SPECIAL)
    ours = render_chat(TEMPLATES[name], chat, add_generation_prompt=prompt, special_tokens=SPECIAL)
    assert ours == expected[0]


def render(template, messages=None):
    return render_chat(template, messages or CHATS[0], add_generation_prompt=True, special_tokens=SPECIAL)


def test_no_template_is_the_plain_one():
    assert render(None) == "user: Hi\nassistant:"


def test_the_date_is_todays():
    assert render("{{ strftime_now('%Y-%m-%d') }}") == time.strftime("%Y-%m-%d")


def test_a_template_does_not_change_the_messages_it_is_given():
    messages = [{"role": "user", "content": "a"}]
    for attempt in ["{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}", "{{ dict.update(messages[0], role='x') }}"]:
        with suppress(UserError):
            render(attempt, messages)
        assert messages == [{"role": "user", "content": "a"}]


def test_a_long_message_as_indented_json_is_fine():
    text = "é\n" * 300_000
    assert len(render("{{ messages | tojson(indent=4) }}", [{"role": "user", "content": text}])) > len(text)


@pytest.mark.timed
def test_a_long_ordinary_chat_is_fine():
    chat = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"message {i} " * 50} for i in range(4000)]
    started = time.process_time()
    text = render(CHATML, chat)
    assert "message 3999" in text
    assert time.process_time() - started < 3


FAILURES = {
    "own words": ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
    "syntax": ("{% if %}", "line 1"),
    "unclosed": ("{% for m in messages %}", "endfor"),
    "undefined attribute": ("{{ nothing.at.all }}", "undefined"),
    "type": ("{{ 1 + 'a' }}", "TypeError"),
    "zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "include": ("{% include 'x' %}", "loader"),
    "too large": ("x" * (MAX_TEMPLATE_BYTES + 1), "at most"),
    "filter": ("{{ 1 | nonsense }}", "nonsense"),
    "reserved": ("{{ x | loop turns }}", "expected"),
}

HOSTILE = {
    "class": "{{ ''.__class__.__mro__ }}",
    "class by item": "{{ ''['__class__'].x }}",
    "class by filter": "{{ ('' | attr('__class__')).__mro__[1].__subclasses__() }}",
    "class by map": "{{ [''] | map(attribute='__class__.__mro__') | list | first }}{{ ''.__class__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('true') }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "self": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.x.y }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception).x.y }}{{ 1 // 0 }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}).x.y }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "namespace item": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops in a list": "{% for i in [0] * 100000 %}{% for j in [0] * 100000 %}{% if 1 %}{% endif %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "wide recursive loop": "{% set n = namespace(d=0) %}{% for x in range(9999) recursive %}{% set n.d = n.d + 1 %}"
    "{% if n.d < 300 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "macro recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "caller recursion": "{% macro f() %}{{ caller() }}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{% call f() %}{% endcall %}",
    "multiply": "{{ 'x' * 10**10 }}",
    "multiply twice": "{{ ('x' * 10**4) * 10**6 }}",
    "multiply a list": "{{ [0] * 10**10 }}",
    "multiply from the left": "{{ 10**10 * 'x' }}",
    "add": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "concatenate": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "percent add": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = '%s%s' % (n.s, n.s) %}{% endfor %}",
    "doubling list": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "doubling tuple": "{% set n = namespace(s=1) %}{% for i in range(60) %}{% set n.s = (n.s, n.s) %}{% endfor %}{{ n.s == n.s }}",
    "doubling dict": "{% set n = namespace(s=1) %}{% for i in range(60) %}{% set n.s = {1: n.s, 2: n.s} %}{% endfor %}{{ n.s | tojson }}",
    "doubling call": "{% set n = namespace(s=1) %}{% for i in range(60) %}{% set n.s = dict(a=n.s, b=n.s) %}{% endfor %}{{ n.s | string }}",
    "power": "{{ 2 ** (10**10) }}",
    "power of power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "squares": "{% set n = namespace(s=3) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "center": "{{ 'x' | center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "zfill": "{{ 'x'.zfill(10**10) }}",
    "expandtabs": "{{ ('\t' * 10000).expandtabs(100000) }}",
    "indent": "{{ ('\n' * 100000) | indent(100000) }}",
    "indent by text": "{{ ('\n' * 100000) | indent('y' * 100000) }}",
    "percent width": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent filter": "{{ '%10000000000d' | format(1) }}",
    "format width": "{{ '{:10000000000}'.format(1) }}",
    "format nested width": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format to trip the check": "{{ ('{' + ':' * 4000000).format(1) }}",
    "format many": "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "replace by name": "{{ ('a' * 100000) | replace(new='b' * 100000, old='a') }}",
    "replace method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "join": "{{ ([1] * 100000) | join('b' * 100000) }}",
    "join method": "{{ ('b' * 100000).join(['1'] * 100000) }}",
    "join text": "{{ ('b' * 100000).join('1' * 100000) }}",
    "join big items": "{{ ['b' * 100000] * 100000 }}",
    "join mapped": "{{ range(99999) | map('center', 99999) | join }}",
    "list mapped": "{{ range(99999) | map('center', 99999) | list | length }}",
    "tojson indent": "{{ ([1] * 100000) | tojson(indent=100000) }}",
    "tojson separators": "{{ ([1] * 100000) | tojson(separators=('x' * 100000, ':')) }}",
    "wordwrap": "{{ ('a ' * 100000) | wordwrap(1, wrapstring='b' * 100000) }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "round": "{{ 1.5 | round(10**10) }}{{ 1 // 0 }}",
    "lipsum": "{{ lipsum(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "output": "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "literal output": "{% for i in range(90000) %}" + "x" * 1000 + "{% endfor %}",
    "output kept": "{% set y %}{% for i in range(90000) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "macro output kept": "{% macro f() %}{% for i in range(90000) %}{{ 'x' * 100000 }}{% endfor %}{% endmacro %}{{ f() | length }}",
    "slices": "{% set a = 'x' * 4000000 %}" + "".join(f"{{% set v{i} = a[1:] %}}" for i in range(3000)),
    "slow scans": "{% set a = 'x' * 4000000 %}{% for i in range(99999) %}{{ a.count('yz') }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep lists": "{{ " + "[" * 400 + "]" * 400 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "long sum": "{{ 1" + " + 1" * 50_000 + " }}",
}


@pytest.mark.row("chat templates", "sandbox and caps")
@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_is_one_line(name):
    template, words = FAILURES[name]
    with pytest.raises(UserError, match=words) as caught:
        render(template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.row("chat templates", "sandbox and caps")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_fail_in_bounded_time_and_memory(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        render(HOSTILE[name])
    assert time.process_time() - started < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024, "KiB"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [[None], ["text"], [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text"}]}], [{1: "x"}]],
    ids=str,
)
def test_messages_are_text(messages):
    with pytest.raises(UserError, match=r"messages\[0\]"):
        render(None, messages)


def test_special_tokens_do_not_displace_the_messages():
    assert render_chat(None, CHATS[0], add_generation_prompt=False, special_tokens={"messages": "x", "tools": "y"}) == "user: Hi\n"


def test_a_deep_expression_is_compiled_in_no_time():
    began = time.thread_time()
    with pytest.raises(UserError):
        render_chat("{{" + "+" * 236 + "x }}", [{"role": "user", "content": "Hi"}], add_generation_prompt=True, special_tokens={})
    assert time.thread_time() - began < 1  # it took 3.5 s when Jinja folded its constants
