"""From a conversation to the prompt a model was trained on, through its chat template.

A chat template is a program (Jinja2) that arrives inside a model file, so it is run like one
from a stranger: in Jinja's immutable sandbox, which keeps it away from Python, and on a budget,
which keeps it from hanging or filling the memory. `_Budgeted` holds the rules of the budget.

The environment is that of transformers' `apply_chat_template` (trim_blocks, lstrip_blocks, loop
controls, the generation tag, `tojson`, `raise_exception`, `strftime_now`), less the filters and
methods whose output can be far larger than their input and that no template needs.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edgert.errors import TemplateError

MAX_SOURCE = 1 << 17  # characters of a template; the longest published ones have about 30 thousand
MAX_VALUE = 1 << 22  # characters of a prompt, or of anything made on the way: a million tokens
MAX_WORK = 1 << 26  # characters made in all; at ELEMENT each, a million loop steps
ELEMENT = 64  # what a loop step, a call or a list element costs: about its bytes of memory
MAX_SECONDS = 1.5  # of this thread's processor time
MAX_INT_BITS = 10_000  # of a number; printing larger ones is quadratic

_FILTERS = """
abs capitalize count d default dictsort e escape first float forceescape groupby indent int items join
last length list lower map max min reject rejectattr replace reverse safe select selectattr sort string
title trim unique upper urlencode wordcount
"""
_METHODS = """
capitalize casefold copy count endswith find get index isalnum isalpha isdecimal isdigit islower isnumeric
isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind
rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper values
"""
_ALLOWED_METHODS = frozenset(_METHODS.split())


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: Callable[[], datetime] = datetime.now,
    **variables: Any,
) -> str:
    """The prompt of a conversation.

    Args:
        template: Jinja2 source, as `chat_template` of a tokenizer_config.json.
        messages: {"role": ..., "content": ...}, oldest first; content may be None beside tool_calls.
        bos_token, eos_token: texts of these special tokens; many templates write them.
        add_generation_prompt: end with the start of the model's answer.
        tools: JSON schemas of functions the model may call.
        now: the clock behind the template's `strftime_now`.
        variables: anything else the template reads, like `enable_thinking`.

    Raises TemplateError when the template is absent, broken, hostile or refuses the messages,
    and when the messages are malformed.
    """
    if not template:
        raise TemplateError(
            "the model has no chat template; use plain generation (`edgert run`) or supply a template"
        )
    if len(template) > MAX_SOURCE:
        raise TemplateError(
            f"the chat template has {len(template)} characters, expected at most {MAX_SOURCE}"
        )
    given = {
        "messages": _checked(messages),
        "tools": None if tools is None else [dict(tool) for tool in tools],
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        environment = _Budgeted(now)
        compiled = jinja2.Template.from_code(environment, _compiled(template), environment.make_globals(None))
        return compiled.render(variables | given)
    except Exception as error:  # a template is a program: it can fail in any way
        raise TemplateError(_explained(error)) from error


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain dicts; raises TemplateError naming the first malformed one."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise TemplateError(f"messages is {_brief(messages)}, expected a list of role and content")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TemplateError(f"message {place} is {_brief(message)}, expected a role and a content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise TemplateError(f"message {place} has the role {_brief(role)}, expected 'user' or the like")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise TemplateError(f"message {place} has the content {_brief(content)}, expected text")
    return [dict(message) for message in messages]


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class _Exceeded(jinja2.TemplateError):
    """The template went over its budget."""


def _explained(error: Exception) -> str:
    """What went wrong and what to do, in one line."""
    text = _brief_text(str(error))
    if isinstance(error, _Refusal):
        return f"the chat template refuses these messages: {text}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        what = f"is broken at line {error.lineno}: {text}"
    elif isinstance(error, SecurityError):
        what = f"does something it must not: {text}"
    elif isinstance(error, _Exceeded):
        what = f"goes over its budget: {text}"
    else:
        what = f"fails: {type(error).__name__}: {text}"
    return f"the chat template {what}; supply another template or use plain generation (`edgert run`)"


def _brief(value: object) -> str:
    return _brief_text(
        repr(value) if isinstance(value, (str, int, type(None))) else f"a {type(value).__name__}"
    )


def _brief_text(text: str) -> str:
    return " ".join(text[:300].split())


@lru_cache(maxsize=8)  # a conversation renders its template once per turn
def _compiled(template: str) -> CodeType:
    return _Budgeted(datetime.now).compile(template)


class _Budgeted(ImmutableSandboxedEnvironment):
    """A sandbox with a budget; one lives for one rendering.

    Time: every loop step, call, filter and operator that could be slow passes through `spend`,
    which watches the processor time, and none of them can take long by itself.

    Memory: `spend` also counts what is made. No value is larger than MAX_VALUE, counting a
    value as often as it would be printed: a short list that holds itself a thousand times over
    is as dangerous as a long one. `admit` checks what has been made. Where one step could make
    something enormous from small parts, `room` checks before.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, LoopControlExtension],
            finalize=self._printed,
        )
        self._work = MAX_WORK
        self._deadline = time.thread_time() + MAX_SECONDS
        self.filters = {name: self._budgeted(name, FILTERS[name]) for name in _FILTERS.split()}
        self.filters["tojson"] = self._budgeted("tojson", _tojson)
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _clock(now),
        }

    def spend(self, work: int) -> None:
        """Take from the budget; raises _Exceeded when it is used up."""
        self._work -= work
        if self._work < 0:
            raise _Exceeded(f"it makes more than {MAX_WORK} characters on the way")
        if time.thread_time() > self._deadline:
            raise _Exceeded(f"it takes more than {MAX_SECONDS} seconds")

    def room(self, size: int) -> None:
        """Raise _Exceeded when a value of this size is too large to make."""
        if size > MAX_VALUE:
            raise _Exceeded(f"it makes a text or list of more than {MAX_VALUE} characters")

    def admit(self, value: Any) -> Any:
        """The value, paid for and not too large when everything inside it is counted."""
        if isinstance(value, str):
            self.room(len(value))
            self.spend(ELEMENT + len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(ELEMENT * (1 + len(value)))
            self.room(self._weight(value))
        else:
            self.spend(ELEMENT)
        return value

    def _weight(self, value: Any) -> int:
        """Characters and elements in a nested value, counted until they are too many."""
        total, stack = 0, [value]
        while stack and total <= MAX_VALUE:
            item = stack.pop()
            total += ELEMENT
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, dict):
                stack += item.keys()
                stack += item.values()
            elif isinstance(item, (list, tuple)):
                stack += item
        return total

    def metered(self, iterable: Iterable[Any]) -> Iterator[Any]:
        """The same items, each paid for; around every loop and lazy filter."""
        for item in iterable:
            self.spend(ELEMENT)
            yield item

    def keep(self, value: Any) -> Any:
        """The value itself: a call, and so admitted; around list literals and slices."""
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """The joined text; Jinja ends every block, macro and rendering with it."""
        parts, size = [], 0
        for piece in pieces:
            size += len(piece)
            self.room(size)
            parts.append(piece)
        return "".join(parts)

    def joined(self, *values: Any) -> str:
        """The operator ~."""
        return self.concat(map(str, values))

    def _printed(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        text: str = self.admit(str(value))
        return text

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """The sandbox's rule, and of built-in values only the methods listed above."""
        builtin = isinstance(obj, (str, bytes, int, float, complex, list, tuple, dict, range))
        if builtin and callable(value) and attr not in _ALLOWED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse at once: the sandbox's own answer is silent when it is only printed."""
        raise SecurityError(f"access to {attribute!r} of a value of type {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        """No str.format: a width inside a format string makes text of any length."""
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not available in chat templates")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call a template makes."""
        self, name, owner = __self, getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        self.spend(ELEMENT)
        if isinstance(__obj, LoopContext):  # a recursive loop descends
            args = tuple(self.metered(arg) for arg in args)
            kwargs = {key: self.metered(arg) for key, arg in kwargs.items()}
        elif isinstance(owner, str) and name in _METHOD_SIZES:
            args = self._listed(args)
            self.room(_METHOD_SIZES[name](owner, *args, **kwargs))
        return self.admit(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The intercepted operators: sizes are checked before they multiply."""
        if operator == "%" and isinstance(left, (str, bytes)):
            raise SecurityError("formatting with % is not available in chat templates")
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
            if bits.get(operator, 0) > MAX_INT_BITS:
                raise _Exceeded(f"it makes a number of more than {MAX_INT_BITS} bits")
        elif operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(repeated, (str, bytes, list, tuple)) and isinstance(times, int):
                    self.room(len(repeated) * times)
        return self.admit(super().call_binop(context, operator, left, right))

    def _listed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with lazy ones made into lists, whose size can be known."""
        return tuple(self.admit(list(arg)) if isinstance(arg, Iterator) else arg for arg in args)

    def _budgeted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is paid for."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # after Jinja's own argument

        @wraps(function)  # and with it the mark that asks for Jinja's argument
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self.spend(ELEMENT)
            if name in _FILTER_SIZES:
                args = self._listed(args)
                self.room(_FILTER_SIZES[name](*args[first:], **kwargs))
            result = function(*args, **kwargs)
            return self.metered(result) if isinstance(result, Iterator) else self.admit(result)

        return filtered


class _Metering(NodeTransformer):
    """Sends what Jinja compiles to plain Python, past every hook of the sandbox, through the budget."""

    def _through(self, method: str, *args: nodes.Node) -> nodes.Expr:
        return nodes.Call(
            nodes.EnvironmentAttribute(method), list(args), [], None, None, lineno=args[0].lineno
        )

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        """Every loop: its items are counted."""
        self.generic_visit(node)
        node.iter = self._through("metered", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        """The operator ~."""
        self.generic_visit(node)
        return self._through("joined", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        """Slices, which copy."""
        self.generic_visit(node)
        return self._through("keep", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Expr:  # noqa: N802
        """Literals, which may hold one large value many times; not targets of assignment."""
        self.generic_visit(node)
        return self._through("keep", node) if getattr(node, "ctx", "load") == "load" else node

    visit_Tuple = visit_Dict = visit_List  # noqa: N815


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks the model's words for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own as in transformers."""
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Namespace(Namespace):
    """A namespace that does not print its contents: they may hold one large value many times."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _replace_size(text: Any, old: str, new: str, count: Any = None) -> int:
    return len(str(text)) + str(text).count(str(old)) * len(str(new))


def _join_size(value: Any, d: Any = "", attribute: Any = None) -> int:
    return len(value) * len(str(d))


def _indent_size(text: Any, width: Any = 4, first: Any = False, blank: Any = False) -> int:
    return (1 + len(str(text).splitlines())) * (width if isinstance(width, int) else len(width))


# How many characters the result of these can have beyond those of the admitted arguments.
# Parameters are named as those of Jinja's filters, which templates may pass by name.
_FILTER_SIZES: dict[str, Callable[..., int]] = {
    "replace": _replace_size,
    "join": _join_size,
    "indent": _indent_size,
}
_METHOD_SIZES: dict[str, Callable[..., int]] = {
    "replace": _replace_size,
    "join": lambda separator, items: _join_size(items, separator),
}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: not escaped for HTML, as Jinja's own filter does."""
    if (indent or 0) > 16 or any(len(separator) > 16 for separator in separators or ()):
        raise _Exceeded("tojson is asked for an indent or separator of more than 16 characters")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """The type itself would bring dict.update, which changes its argument."""
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    raise _Refusal(str(message))


def _clock(now: Callable[[], datetime]) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        if len(form) > 100 or re.search(r"\d{3}", form):  # the C library obeys widths: %999999999Y
            raise _Exceeded(f"strftime_now is given the format {_brief(form)}")
        return now().strftime(form)

    return strftime_now
