"""Chat templates: published formats, the budget, and what a hostile template can do (nothing)."""

from datetime import datetime

import pytest

from edgert.chat import MAX_SOURCE, MAX_VALUE, render_chat
from edgert.errors import TemplateError

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>' ~ (call.function.arguments | tojson) ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{{- ns.last }}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must\nalternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
USER = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Grüß dich"},
    {"role": "assistant", "content": "Hello"},
]


def render(template: str | None, messages: object = USER, **rest: object) -> str:
    return render_chat(template, messages, **rest)  # type: ignore[arg-type]


def test_llama3() -> None:
    assert render(LLAMA3, TALK, bos_token="<|begin_of_text|>") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGrüß dich<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chatml_with_and_without_generation_prompt() -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n"
    assert render(CHATML, add_generation_prompt=False) == prompt
    assert render(CHATML) == prompt + "<|im_start|>assistant\n"


def test_tools_are_json_and_not_html() -> None:
    tools = [{"name": "größe", "parameters": {"a": ["<", "'"]}}]
    calls = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
    }
    assert render(QWEN_TOOLS, [*USER, calls], tools=tools) == (
        '<|im_start|>system\n# Tools\n<tools>\n{"name": "größe", "parameters": {"a": ["<", "\'"]}}\n'
        "</tools><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"x": 1}</tool_call><|im_end|>\n0'
    )


def test_mistral_alternation_is_refused_in_one_line() -> None:
    assert render(MISTRAL, bos_token="<s>") == "<s>[INST] Hi [/INST]"
    with pytest.raises(TemplateError, match=r"refuses these messages: Conversation roles must alternate"):
        render(MISTRAL, TALK)


def test_blocks_are_trimmed_as_transformers_does() -> None:
    assert render(
        "{% if true %}\n  {% for m in messages %}\n{{ m.role }}\n  {% endfor %}\n{% endif %}\n."
    ) == ("user\n.")


def test_language_features_templates_rely_on() -> None:
    template = (
        "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}"
        "{% macro twice(t) %}{{ t }}{{ t }}{% endmacro %}{{ twice('ab') }}"
        "{% for i in range(9) if i is odd %}{% if i == 5 %}{% continue %}{% endif %}"
        "{{ i }}{{ ',' if not loop.last }}{{ loop.length }}{% endfor %}"
        "{% for t in tree recursive %}{{ t.n }}{{ loop(t.kids) }}{% endfor %}"
        "{{ {'a': 1} | items | list }}{{ ['b', 'a'] | sort | join('-') }}"
        "{{ messages | map(attribute='role') | join(d=',') }}{{ 'x' * 3 }}{{ absent }}{{ 7 % 4 }}"
        "{{ 'a-b'.replace('-', '+').join(['1', '2']) }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | count }}"
        "{% for a, b in {'k': 'v'}.items() %}{{ a ~ b }}{% endfor %}{{ dict(a=2).a }}{{ enable_thinking }}"
    )
    tree = [{"n": 1, "kids": [{"n": 2, "kids": []}]}, {"n": 3, "kids": []}]
    assert render(template, tree=tree, enable_thinking=False) == (
        "1abab1,43,47412" + "3" + "[('a', 1)]a-buserxxx3" + "1a+b2" + "1" + "kv2False"
    )


def test_the_clock_is_the_callers() -> None:
    moment = datetime(2024, 7, 26)
    assert render("{{ strftime_now('%d %b %Y') }}", now=lambda: moment) == "26 Jul 2024"


@pytest.mark.parametrize("template", [None, ""])
def test_absent_template_says_what_to_do(template: str | None) -> None:
    with pytest.raises(TemplateError, match=r"no chat template; use plain generation"):
        render(template)


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "messages is a list"),
        ("Hi", "messages is 'Hi'"),
        (None, "messages is None"),
        (["Hi"], "message 0 is 'Hi'"),
        ([{"content": "Hi"}], "message 0 has the role None"),
        ([*USER, {"role": "", "content": "Hi"}], "message 1 has the role ''"),
        ([{"role": "user"}], "message 0 has the content None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 has the content a list"),
    ],
)
def test_malformed_messages_are_named(messages: object, found: str) -> None:
    with pytest.raises(TemplateError, match=found):
        render(CHATML, messages)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("a\n{% for %}", "broken at line 2"),
        ("{{ messages | nosuch }}", "broken at line 1: No filter named 'nosuch'"),
        ("{{ messages.x.y }}", "fails: UndefinedError"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "the chat template"),
        ("x" * (MAX_SOURCE + 1), "expected at most"),
    ],
)
def test_broken_templates(template: str, found: str) -> None:
    with pytest.raises(TemplateError, match=found) as caught:
        render(template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


GROW = "{% set ns = namespace(x=%s) %}{% for i in range(60) %}{% set ns.x = %s %}{% endfor %}"
NESTED = "{% for a in r %}{% for b in r %}{% for c in r %}%s{% endfor %}{% endfor %}{% endfor %}"


def grow(start: str, step: str, use: str = "") -> str:
    return GROW.replace("%s", start, 1).replace("%s", step, 1) + use


def nested(body: str) -> str:
    return "{% set r = range(9999) %}" + NESTED.replace("%s", body)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ dict.update(messages[0], a=1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__closure__ }}{{ strftime_now.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list | first | string }}{{ ''['__class__'].mro() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ ''['format'] }}{{ '%999999999d' % 1 }}",
        "{{ 'x'.center(999999999) }}",
        "{{ (1).to_bytes(999999999, 'big') }}",
        "{{ 'x' | center(999999999) }}",
        "{{ 'x\ny' | indent(999999999) }}",
        "{{ lipsum(n=99999) }}",
        "{{ [1] | tojson(indent=999999999) }}",
        "{{ strftime_now('%999999999Y') }}",
        "{% import 'os' as os %}",
        "{% include '/etc/passwd' %}",
        "{% extends 'x' %}",
    ],
)
def test_what_a_template_must_not_reach(template: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        nested(""),
        nested("{{ a }}"),
        nested("{{ 'x' * 4000000 }}"),
        "{% macro m() %}" + nested("{{ 'x' * 4000000 }}") + "{% endmacro %}{{ m() | length }}",
        "{% for i in range(9) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% for i in range(9) recursive %}{{ loop(iterable=range(99999)) if i < 1 }}{% endfor %}" * 40,
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{% for i in range(99999) if false %}{% endfor %}" * 300,
        "{{ range(99999) | map('string') | select('in', range(99999) | map('string')) | list }}" * 9,
        "{% for i in range(99999) %}{{ range(99999) | max }}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 2 ** 99999999999 }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 10 ** 12 * [1] }}",
        "{{ 'x' * 4000000 + 'x' * 4000000 }}",
        "{{ ('x' * 9999).replace('x', 'x' * 9999) }}",
        "{{ ('x' * 9999) | replace('x', 'x' * 9999) }}",
        "{{ ('x' * 99999).join('x' * 99999) }}",
        "{{ range(99999) | join('x' * 99999) }}",
        "{{ range(99999) | map('string') | join('x' * 99999) }}",
        "{{ ([none] * 9999) | map('default', 'x' * 9999, true) | list | string }}",
        grow("'x'", "ns.x + ns.x"),
        grow("'x'", "ns.x ~ ns.x"),
        grow("'x'", "[ns.x, ns.x] | join"),
        grow("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
        grow("[1]", "(ns.x, ns.x)", "{{ ns.x == (ns.x,) }}"),
        grow("[1]", "{'a': ns.x, 'b': ns.x}", "{{ ns.x | tojson }}"),
        grow("[1]", "dict(a=ns.x, b=ns.x)", "{{ ns.x }}"),
        grow("[1]", "ns.x + ns.x"),
        grow("9", "ns.x * ns.x"),
        "{% set ns = namespace(x='x') %}"
        + "{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}" * 40,
        grow("[]", "ns.x + [('x' * 4000000)[1:]]"),
    ],
)
def test_hanging_and_swelling_templates_are_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgert.chat.MAX_SECONDS", 0.4)  # the same rule, sooner
    with pytest.raises(TemplateError) as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_a_namespace_does_not_print_its_contents() -> None:
    assert render(grow("'x'", "namespace(a=ns.x, b=ns.x)", "{{ ns.x }}")) == "<Namespace>"


def test_the_largest_prompt_and_one_more() -> None:
    long = [{"role": "user", "content": "x" * MAX_VALUE}]
    assert len(render("{{ messages[0].content }}", long)) == MAX_VALUE
    with pytest.raises(TemplateError, match="over its budget"):
        render("{{ messages[0].content }}!", long)


def test_a_long_conversation_fits_the_budget() -> None:
    talk = [{"role": ("user", "assistant")[i % 2], "content": "word " * 100} for i in range(1000)]
    assert len(render(QWEN_TOOLS, talk)) > 500_000
