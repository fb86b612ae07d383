"""Messages into one prompt, by the chat template that came with a model.

A template is a program from a stranger. It runs in Jinja's immutable sandbox, with the names that transformers gives it, and under a meter:
every loop turn, call, filter, operator and piece of output is counted, every text made is measured before or as it is made, and a clock is
read. So its steps, its memory and its time are bounded, and all its failures are a `UserError` of one line.

What no meter inside the process can stop is one operation of the interpreter that is already running: compiling the template (up to 256 KiB
of it) and one text operation on up to 4 Mi characters. Both end by themselves; a server that must not wait even for them renders in a
process that it can kill.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, cast

from jinja2 import Environment, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from hasten.base.errors import UserError, one_line

MAX_TEMPLATE_BYTES = 256 * 1024
MAX_OUTPUT_BYTES = 4 * 1024 * 1024
MAX_VALUE = 4 * 1024 * 1024
"""Largest text or list, in characters (of a list, all the way down), that a template may make."""
ITEM = 8
"""Characters that one item of a list or mapping counts for."""
MAX_MADE = 64 * 1024 * 1024
"""Characters that a template may make in all."""
MAX_STEPS = 1_000_000
MAX_SECONDS = 3.0
MAX_DEPTH = 64
"""Deepest nesting of lists and mappings."""
MAX_BITS = 4096
"""Longest whole number."""

PLAIN_TEMPLATE = (
    "{% if tools %}system: These are tools: {{ tools | tojson }}. To call one, write "
    '<tool_call>{"name": NAME, "arguments": {…}}</tool_call>.\n{% endif %}'
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message.get('tool_calls', []) %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For models without a template: a line ``role: content`` for each message, calls of tools as Hermes writes them."""

# Keys of the meter's own filters: no template can spell them.
_TURNS, _CONCAT, _MADE = "loop turns", "concat ~", "made here"
_SIZED = frozenset({"batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice"}) | {
    "to_bytes", "tojson", "truncate", "wordwrap", "zfill"
}  # fmt: skip
"""Filters and methods whose arguments say how much they make."""


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The prompt's text for ``messages``, each a mapping of text to text, usually ``role`` and ``content``; ``tool_calls`` alone may be
    a list of what JSON has. ``tools`` are what the model may call, in OpenAI's shape.

    ``template`` is Jinja source, at most 256 KiB; None takes `PLAIN_TEMPLATE`. It sees ``messages``, ``add_generation_prompt``,
    ``special_tokens`` by name (``bos_token``, ``eos_token``, …), ``tools``, ``documents`` (None), and transformers' ``raise_exception``,
    ``strftime_now`` and ``tojson``. The result is at most 4 MiB. Raises `UserError` for whatever fails, be it the template's own
    ``raise_exception``. The text of messages is inserted as it is: keep special tokens in it from being read as such when tokenizing, if
    their writer is not trusted.
    """
    source = PLAIN_TEMPLATE if template is None else template
    if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
        raise UserError(f"chat template has {len(source)} characters: at most {MAX_TEMPLATE_BYTES} bytes are read; use a shorter template")
    plain = [_plain(index, message) for index, message in enumerate(messages)]
    names: dict[str, Any] = {str(name): str(value) for name, value in special_tokens.items()}
    names |= {"messages": plain, "add_generation_prompt": add_generation_prompt, "documents": None}
    names["tools"] = _data(list(tools), "tools") if tools else None
    try:
        return _render(source, names)
    except Exception as error:  # a template can raise anything, MemoryError and RecursionError among it
        reason = " ".join(str(error).split()) or type(error).__name__
        place = f" at line {line}" if isinstance(line := getattr(error, "lineno", None), int) else ""
        kind = "" if isinstance(error, TemplateError) else f" ({type(error).__name__})"
        raise UserError(
            f"chat template failed{place}: {reason[:300]}{kind}; change the messages to what the template accepts, or give another template"
        ) from error


def _data(value: object, name: str) -> Any:
    """A copy of what JSON can say, so that a template reaches no other object."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name} is not what JSON has: {one_line(str(error))}") from None


def _plain(index: int, message: object) -> dict[str, Any]:
    """A copy of one message that holds nothing but text and data, so that a template reaches no other object."""
    if not isinstance(message, Mapping):
        raise UserError(f"messages[{index}] is a {type(message).__name__}: give a mapping with 'role' and 'content'")
    called = {}
    if (calls := message.get("tool_calls")) is not None:
        called = {"tool_calls": _data(calls, f"messages[{index}]['tool_calls']")}
        message = {name: value for name, value in message.items() if name != "tool_calls"}
    for name, value in message.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise UserError(f"messages[{index}][{one_line(name, 40)}] is a {type(value).__name__}: names and values of a message are text")
    return {str(name): str(value) for name, value in message.items()} | called


def _render(source: str, names: Mapping[str, Any]) -> str:
    environment = _Environment(_Meter())
    tree = _Metered().visit(environment.parse(source))
    pieces, size = [], 0
    for piece in environment.from_string(tree).generate(names):
        size += len(piece.encode("utf-8", "surrogatepass"))
        if size > MAX_OUTPUT_BYTES:
            raise _TooMuchError(f"its output passes {MAX_OUTPUT_BYTES} bytes")
        pieces.append(piece)
    return "".join(pieces)


class _TooMuchError(TemplateError):
    """A template asked for more than the meter grants."""


class _Meter:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self._steps = 0
        self._made = 0
        self._deadline = time.thread_time() + MAX_SECONDS  # processor time, so that a busy machine fails no honest template

    def step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _TooMuchError(f"it takes more than {MAX_STEPS} steps")
        if time.thread_time() > self._deadline:
            raise _TooMuchError(f"it runs longer than {MAX_SECONDS:g} seconds")

    def turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def expect(self, size: int) -> None:
        """Refuse to make a value of ``size`` characters."""
        if size > MAX_VALUE or self._made + size > MAX_MADE:
            raise _TooMuchError(f"it makes text or lists of more than {MAX_VALUE} characters at once, or {MAX_MADE} in all")

    def made(self, value: Any) -> Any:
        """Charge for a value that was just made; a list is walked, so that what is printed or compared later has a bounded size too."""
        if isinstance(value, str | bytes | list | tuple | dict):
            self.expect(_extent(value)[0])
            self._made += len(value) * (1 if isinstance(value, str | bytes) else ITEM)
        return value


class _Metered(NodeTransformer):
    """Rewrites a parsed template so that loops, ``~``, slices, literal lists and literal text pass through the meter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _TURNS)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _filtered(self.generic_visit(node), _MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _filtered(self.generic_visit(node), _MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _MADE) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # a constant passes through ``finalize``; literal text would not


def _filtered(value: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", value), name, [], [], None, None, lineno=value.lineno)


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}`` marks text for training; here it is only a scope."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with every way of making something large measured."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, meter: _Meter) -> None:
        @pass_context  # a context keeps Jinja from folding literal text into the program, unmeasured
        def finalize(_context: Context, value: Any) -> Any:
            meter.step()
            return meter.made(value if isinstance(value, str) else _text(value))

        # Folding constants takes time that grows with the cube of how deep an expression nests, before anything is measured.
        super().__init__(optimized=False, trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=finalize)
        self._meter = meter
        self.filters["tojson"] = _tojson
        self.filters = {name: self._measured(name, function) for name, function in self.filters.items()}
        self.filters |= {_TURNS: meter.turns, _CONCAT: self._concat, _MADE: meter.made}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace}
        del self.globals["lipsum"]  # makes text without end, and no prompt wants it

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template comes here; ``loop(items)`` of a recursive loop too."""
        self._meter.step()
        if isinstance(function, LoopContext) and args:
            args = (self._meter.turns(args[0]), *args[1:])
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int):
            self._expect(method.__name__, [owner, *args, *kwargs.values()])
        return self._meter.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._meter.step()
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            self._meter.expect(len(left) + _extent(right)[0] * (left.count("%") + 1))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_BITS:
                raise _TooMuchError(f"it makes a number of more than {MAX_BITS} bits")
        elif operator == "*":
            self._expect_product(left, right)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self._meter.expect(len(left) + len(right))
        return self._meter.made(super().call_binop(context, operator, left, right))

    def _measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts as a step and whose result is measured; ``wraps`` carries Jinja's marks over."""

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self._meter.step()
            args = tuple(list(self._meter.turns(value)) if name == "join" and isinstance(value, Iterator) else value for value in args)
            marked = 1 if isinstance(args[0], Context | nodes.EvalContext | Environment) else 0  # what Jinja passes by itself
            self._expect(name, [*args[marked:], *kwargs.values()])
            return self._meter.made(function(*args, **kwargs))

        return measured

    def _concat(self, values: list[Any]) -> str:
        """The ``~`` operator."""
        self._meter.step()
        texts = [_text(value) for value in values]
        self._meter.expect(sum(map(len, texts)))
        return str(self._meter.made("".join(texts)))

    def _expect_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > MAX_BITS:
                raise _TooMuchError(f"it makes a number of more than {MAX_BITS} bits")
            return
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
                self._meter.expect(len(sequence) * max(times, 0))

    def _expect(self, name: str, given: list[Any]) -> None:
        """Measure beforehand the filter or method ``name`` of ``given[0]``, if its result can be far longer than what it is given."""
        subject, rest = given[0], given[1:]
        if name in _SIZED:
            numbers = max((value for value in rest if isinstance(value, int)), default=0)
            texts = sum(_extent(value)[0] for value in rest if not isinstance(value, int))
            size, items, depth = _extent(subject)
            lines = subject.count("\n") + subject.count("\t") + 1 if isinstance(subject, str) else items * depth
            self._meter.expect((numbers + texts) * lines if name in {"indent", "tojson", "expandtabs"} else numbers + texts * size)
        elif name == "translate":
            raise _TooMuchError("it calls translate, whose result has no bound; use replace")
        elif name == "replace" and len(rest) > 1:
            # Named arguments may come in either order.
            text, one, other = _text(subject), _text(rest[0]), _text(rest[1])
            self._meter.expect(len(text) + max(text.count(one) * len(other), text.count(other) * len(one)))
        elif name == "join":
            # Which of the values is the separator differs between filter and method: any of the texts may be.
            separator = max((len(value) for value in given if isinstance(value, str)), default=0)
            reached = [value for value in given if isinstance(value, str | list | tuple | dict)]
            self._meter.expect(sum(_extent(value)[0] + len(value) * separator for value in reached))
        elif name in {"format", "format_map"}:
            text = _text(subject)
            _check_format(text)
            self._meter.expect(len(text) + _extent(rest)[0] * (text.count("%") + text.count("{") + 1))


class _Namespace(Namespace):
    """Jinja's ``namespace``, which prints as its name (namespaces within namespaces would print without end) and hides no names."""

    def __init__(*args: Any, **names: Any) -> None:
        own, given = args[0], dict(*args[1:], **names)
        for name in given:
            _check_name(name)
        Namespace.__init__(own, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace holds no name that begins with an underscore, such as {one_line(name, 40)}")


def _text(value: Any) -> str:
    """``str(value)``; a list is measured first, since lists of one list many times are short to write and long to print."""
    _extent(value)
    return str(value)


def _extent(value: Any) -> tuple[int, int, int]:
    """Characters (an item counting as `ITEM`) and items in a value all the way down, and how deep it nests; repeats count again."""
    size, items, deepest, waiting = 0, 0, 1, [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, list | tuple | dict):
            items += len(item)
            size += ITEM * len(item)
            if size <= MAX_VALUE:
                waiting += [(inner, depth + 1) for inner in (item.items() if isinstance(item, dict) else item)]
        if size > MAX_VALUE or deepest > MAX_DEPTH:
            raise _TooMuchError(f"it makes text or lists of more than {MAX_VALUE} characters, or more than {MAX_DEPTH} deep")
    return size, items, deepest


def _check_format(text: str) -> None:
    """Refuse field widths that are huge or taken from the arguments, in both of Python's format languages."""
    if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}:]*:[^{}]*\{", text):
        raise _TooMuchError("it formats with a number of five digits or more, or with a width taken from an argument")


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as prompts want it: unlike Jinja's own filter, nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
