"""Chat templates: rendered as transformers renders them, hostile ones refused, found in each file that may hold one."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from tokenizer_chats import MIXTRAL, system, user
from tokenizer_files import CHATML, DEMO_TEMPLATE, LLAMA, spm_model, write_folder

from qmix.errors import ModelFileError, UsageError
from qmix.tokenizer import load
from qmix.tokenizer.sandbox import Template

# ---- templates: rendering

def template(source: str) -> Template:
    return Template(source, Path("chat_template.jinja"), now=lambda: datetime(2024, 7, 1))


SOURCES = [
    DEMO_TEMPLATE, CHATML, LLAMA, MIXTRAL,
    "{%- for m in messages %}\n  {%- if loop.first %}\nfirst{% endif %}\n{{ m['content'] | tojson }}\n"
    "{%- endfor %}\n",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 1 %}{% break %}{% endif %}{{ m.content.split('a')[-1] | upper }}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% if tools is not none %}x{% endif %}{{ strftime_now('%Y') | length }}"
    "{{ messages | tojson(indent=2) }}",
    "{% macro show(m) %}[{{ m.role }}] {{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
]


@pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))
def test_rendering_is_that_of_transformers(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": "caf\u00e9 <b>'x'</b>\n"},
                {"role": "assistant", "content": " ok "}, {"role": "user", "content": "Bye"}]
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = utils.render_jinja_template([messages], chat_template=source, add_generation_prompt=True,
                                                 **named)
    assert template(source).render(messages, named, prompt=True) == expected


def test_the_clock_is_given() -> None:
    assert template("{{ strftime_now('%d %b %Y') }}").render([], {}, prompt=True) == "01 Jul 2024"


def test_a_template_may_refuse_a_conversation(tmp_path: Path) -> None:
    tokenizer = load(write_folder(tmp_path, spm_model(), chat_template=LLAMA))
    with pytest.raises(UsageError, match="refuses this conversation: Conversation roles must") as caught:
        tokenizer.encode_chat([user("a"), user("b")])
    assert caught.value.exit_code == 2


def test_a_system_prompt_is_never_left_out_in_silence(tmp_path: Path) -> None:
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = load(write_folder(tmp_path, spm_model(), chat_template=silent))
    with pytest.raises(UsageError, match="leaves out the system message"):
        tokenizer.encode_chat([system("Be kind."), user("fox")])


@pytest.mark.parametrize(("source", "message"), [
    ("{{ messages[9].content.x }}", "fails: UndefinedError"),
    ("{{ ''.__class__.__mro__ }}", "fails: SecurityError"),
    ("{{ messages.__class__.__base__ }}", "fails: SecurityError"),
    ("{{ raise_exception.__globals__['sys'] }}", "fails: SecurityError"),
    ("{% set x = messages.append(1) %}", "fails: SecurityError"),
    ("{% include '/etc/passwd' %}", "fails: TypeError"),
    ("{{ lipsum(1) }}", "fails: UndefinedError"),
    ("{{ open('/etc/passwd') }}", "fails: UndefinedError"),
    ("{{ dict.__init__.__globals__ }}", "fails: SecurityError"),
    ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "fails: ValueError"),
    ("{{ range(10**9) | list }}", "fails: OverflowError"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2000000"),
    ("{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
     "more than 2000000 steps"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails: RecursionError"),
    ("{{ 'a' * 999999999999 }}", "longer than"),
    ("{{ [0] * 999999999999 }}", "longer than"),
    ("{{ 10 ** 10 ** 10 }}", "large power"),
    ("{{ '%999999999d' % 1 }}", "great width"),
    ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
     "longer than"),
    ("{% set x = 'a' * 4000000 %}{% for i in range(99) %}{{ x }}{% endfor %}", "wrote more than"),
])
def test_hostile_templates_end_in_an_error_that_names_the_file(source: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        template(source).render([{"role": "user", "content": "x"}], {}, prompt=True)
    assert "chat_template.jinja" in caught.value.message


BIG = "{% set x = 'ab' * 2000000 %}"
ROWS = "{% set ns = namespace(x=[]) %}{% for i in range(3000) %}"
GREEDY = [  # each would take gigabytes, or hours
    "{{ 'x'.center(10**10) }}", "{{ 'x'.ljust(9999999999) }}", "{{ 'x'.rjust(9999999999) }}",
    "{{ 'x'.zfill(9999999999) }}", "{{ '\t'.expandtabs(9999999999) }}", "{{ 'x' | center(9999999999) }}",
    "{{ 'a\nb' | indent(9999999999) }}", "{{ 'a' | indent(9999999999, first=true) }}",
    BIG + "{{ x.replace('a', x) }}", BIG + "{{ x | replace('a', x) }}", BIG + "{{ x.replace('', x) }}",
    BIG + "{{ x.join(range(9999) | map('string')) }}", BIG + "{{ range(9999) | join(x) }}",
    BIG + "{{ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x ~ x }}",
    BIG + "{{ '{0}{0}'.format([x, x, x, x] * 99) }}", BIG + "{{ ('{0}' * 9999).format(x) }}",
    BIG + "{{ ('%(a)s' * 9999) % {'a': x} }}", BIG + "{{ ('%s' * 99) | format(*([x] * 99)) }}",
    BIG + "{{ x.translate({97: x}) }}", BIG + "{{ [x] * 9999 }}", BIG + "{{ ([x] * 9999) | string }}",
    BIG + "{{ ([x] * 9999) | tojson }}", BIG + "{{ ([x] * 9999) | join }}", BIG + "{{ {1: [x] * 9999} ~ '' }}",
    "{{ '{:>9999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 9999999999) }}", "{{ '%*d' | format(9999999999, 1) }}",
    "{{ '{0:{a}}'.format_map({'0': 1, 'a': '9999999999'}) }}", "{{ '%.9999999999f' % 1 }}",
    "{{ ('%9999d' * 9999) % ((1,) * 9999) }}",
    "{{ '%00000000030000000d' % 1 }}", "{{ '{:00000000030000000d}'.format(1) }}",
    "{% set s = 'a' * 4000000 %}{{ s.rfind('ab' ~ s[2000000:]) }}",
    "{{ [1, [2]] | tojson(indent=9999999999) }}", "{{ {'a': 1} | tojson(separators=('x' * 999999, 'y')) }}",
    "{{ 'a'.encode() * 9999999999 }}", "{{ (1).to_bytes(9999999999, 'big') }}",
    "{{ [1] | batch(9999999999, 'x') | list }}", "{{ [1] | slice(9999999999) | list }}",
    "{{ 1.5 | round(999999999, 'ceil') }}", "{{ 'x' * 4194304 * 2 }}", "{{ ('a ' * 2000000).split() | length }}",
    "{{ [[0] * 99999] * 9999 | sum(start=[]) }}", "{{ messages[0].content | wordwrap(1, wrapstring='x' * 9999999) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x | tojson }}",
    "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x == ns.x | list }}{{ ns.x in [1] }}",
    "{% set ns = namespace(x=()) %}{% for i in range(99999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
    BIG + ROWS + "{% set ns.x = ns.x + [x ~ i] %}{% endfor %}",
    BIG + ROWS + "{% set ns.x = [ns.x, x[1:]] %}{% endfor %}",
    BIG + ROWS + "{% set ns.x = [ns.x, x | upper] %}{% endfor %}",
    BIG + ROWS + "{% set ns.x = [ns.x, x.title()] %}{% endfor %}",
    BIG + ROWS + "{% set y %}{{ x }}{% endset %}{% set ns.x = [ns.x, y] %}{% endfor %}",
    BIG + ROWS + "{% set y = x | e %}{% set ns.x = [ns.x, y] %}{% endfor %}",
    BIG + "{% macro m() %}{{ x }}{{ x }}{{ x }}{% endmacro %}" + ROWS + "{% set ns.x = [ns.x, m()] %}{% endfor %}",
    BIG + ROWS + "{% set ns.x = [ns.x, range(99999) | list] %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% if x.find('aa') > 0 %}{% endif %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% if 'aa' in x %}{% endif %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% if x == x ~ '' %}{% endif %}{% endfor %}",
    BIG + "{{ range(99999) | map('string') | select('in', x) | list }}",
    BIG + "{{ [x] * 99999 == [x ~ ''] * 99999 }}", BIG + "{{ ([x] * 99999).count(x ~ '') }}",
    BIG + "{{ range(99999) | map('replace', '0', x) | join }}", BIG + "{{ x | striptags }}", BIG + "{{ x | urlize }}",
    "{{ raise_exception('x' * 4194304 ~ 'y') }}",
]


@pytest.mark.parametrize("source", [
    "{% for m in messages %}{{ (messages | length - 1) - loop.index0 }}{{ messages | last is mapping }}"
    "{{ m.get('role') }}{{ m.items() | list | count }}{{ messages is defined }}{{ (messages | first).content[:1] }}"
    "{% endfor %}",
    "{% set rest = messages[1:] %}{% for m in rest %}{{ loop.index0 == messages | length - 2 }}{{ m.content }}"
    "{% endfor %}",
])
def test_a_long_conversation_is_no_great_work(source: str) -> None:
    """What looks at a list alone costs the list and not all texts in it: published templates do so for each message."""
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "a word " * 300} for i in range(2000)]
    assert template(source).render(messages, {}, True)


@pytest.mark.parametrize("source", GREEDY)
def test_no_template_takes_much_memory_or_time(source: str) -> None:
    """Each is refused, and before it took what it asks for: see tests/fuzz for the same under the system's limits."""
    with pytest.raises((ModelFileError, UsageError)) as caught:
        template(source).render([{"role": "user", "content": "x" * 99999}], {}, prompt=True)
    assert len(caught.value.message) < 5000


@pytest.mark.parametrize("source", [
    "{{ 'x'.center(9) }}{{ 'a\tb'.expandtabs(4) }}{{ 'b' | center(5) }}{{ 'a\nb' | indent(2, first=true) }}",
    "{{ '%5d|%-3s|%%' % (3, 'a') }}{{ '%s and %s' | format('a', 'b') }}{{ '{:>5}{a}'.format(1, a='z') }}",
    "{{ '{:{}}'.format('x', 5) }}{{ 'a,b'.split(',') }}{{ 'aXb'.replace('X', 'yy') }}{{ 'ab'.translate({97: 'zz'}) }}",
    "{{ [3, 1, 2] | sort }}{{ [1, 1] | unique | list }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2] | sum }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ {'a': (1, 2)} }}{{ {('a', 1): 2}[('a', 1)] }}",
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 1 - 2 }}{{ 3 / 2 }}{{ 1 < 2 < 3 }}{{ 'a' not in 'b' }}{{ 2.5 | round(1) }}",
    "{{ messages[0].content[1:3] }}{{ 'abc'[::-1] }}{{ (1, 2)[0] }}{% for a, b in [(1, 2)] %}{{ a + b }}{% endfor %}",
    "{% set a, b = 1, 2 %}{{ [a, b] }}{{ messages[0] | tojson(indent=4) }}{{ 'a b' | title }}{{ 'x y' | wordcount }}",
])
def test_what_is_charged_is_not_changed(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": "a <b> c"}]
    (expected,), _ = utils.render_jinja_template([messages], chat_template=source)
    assert template(source).render(messages, {}, prompt=False) == expected


def test_a_template_too_long_or_broken_is_refused_at_load() -> None:
    with pytest.raises(ModelFileError, match="characters, want at most"):
        template("x" * (2**20 + 1))
    with pytest.raises(ModelFileError, match="line 2 is broken"):
        template("\n{% if %}")


def test_rendering_leaves_a_debuggers_trace_in_place() -> None:
    import sys

    def trace(*_: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        template("x").render([], {}, prompt=True)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


# ---- where a template comes from

@pytest.mark.parametrize(("name", "content"), [
    ("chat_template.jinja", "file:{{ messages[0].content }}"),
    ("chat_template.json", json.dumps({"chat_template": "file:{{ messages[0].content }}"})),
])
def test_templates_in_files_of_their_own(name: str, content: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, spm_model())
    (folder / name).write_text(content)
    tokenizer = load(folder)
    assert tokenizer.decode(tokenizer.encode_chat([user("fox")])) == "file:fox"


def test_the_folder_of_templates_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, spm_model(), chat_template="config {{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ messages[0].content }}")
    assert load(folder).decode(load(folder).encode_chat([user("fox")])) == "config fox"
    (folder / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert load(folder).decode(load(folder).encode_chat([user("fox")])) == "file fox"
    (folder / "additional_chat_templates" / "default.jinja").write_text("folder {{ messages[0].content }}")
    assert load(folder).decode(load(folder).encode_chat([user("fox")])) == "folder fox"


def test_templates_of_which_none_is_for_chat_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, spm_model())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    with pytest.raises(ModelFileError, match=r"got the names \['rag'\], want 'default'"):
        load(folder)


def test_templates_by_name_in_an_object(tmp_path: Path) -> None:
    choices = {"tool_use": "no", "default": "yes {{ messages[0].content }}"}
    tokenizer = load(write_folder(tmp_path, spm_model(), chat_template=choices))
    assert tokenizer.decode(tokenizer.encode_chat([user("fox")])) == "yes fox"


def test_a_list_of_templates_uses_the_default_one(tmp_path: Path) -> None:
    choices = [{"name": "tool_use", "template": "no"},
               {"name": "default", "template": "yes {{ messages[0].content }}"}]
    tokenizer = load(write_folder(tmp_path, spm_model(), chat_template=choices))
    assert tokenizer.decode(tokenizer.encode_chat([user("fox")])) == "yes fox"


def test_the_jinja_file_wins_as_in_transformers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, spm_model(), chat_template="config {{ messages[0].content }}")
    (folder / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    tokenizer = load(folder)
    assert tokenizer.decode(tokenizer.encode_chat([user("fox")])) == "file fox"
