"""What an answer looks like that must call a tool, in each format of answers that has calls between tags or brackets:
grammars in llguidance's dialect of Lark (start: the whole answer). Arguments follow the tool's JSON schema.

A rule is made for each tool. `%json {...}` is JSON of a schema; each has its own root, so that references within it
("#/$defs/Place") mean what they meant in the tool's parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Tools = Sequence[Mapping[str, Any]]
TEXT = ("string", ["string"])  # types of an argument that can be nothing but text


def json_grammar(tools: Tools, parallel: bool) -> str:
    """{"name": ..., "arguments": ...} between tags."""
    return _calls([f'{_text("<tool_call>" + chr(10))} {_json_call(tool)} {_text(chr(10) + "</tool_call>")}'
                   for tool in tools], parallel)


def xml_grammar(tools: Tools, parallel: bool) -> str:
    """<function=...> with each argument between tags of its own."""
    def argument(name: str, schema: Mapping[str, Any]) -> str:
        if schema.get("type") in TEXT and "enum" not in schema:
            return f'{_text(f"<parameter={name}>" + chr(10))} xml_text'
        return (f'{_text(f"<parameter={name}>" + chr(10))} {_value(schema)} '
                f'{_text(chr(10) + "</parameter>" + chr(10))}')

    calls = [f'{_text(f"<tool_call>{chr(10)}<function={_name(tool)}>" + chr(10))} {_arguments(tool, argument)} '
             f'{_text("</function>" + chr(10) + "</tool_call>")}' for tool in tools]
    return _calls(calls, parallel) + 'xml_text[suffix="\\n</parameter>\\n"]: /(?s:.*)/\n'


def glm_grammar(tools: Tools, parallel: bool) -> str:
    """The name, then <arg_key> and <arg_value> of each argument."""
    def argument(name: str, schema: Mapping[str, Any]) -> str:
        head = _text(f"<arg_key>{name}</arg_key>{chr(10)}<arg_value>")
        if schema.get("type") in TEXT and "enum" not in schema:
            return f"{head} glm_text"
        return f'{head} {_value(schema)} {_text("</arg_value>" + chr(10))}'

    calls = [f'{_text(f"<tool_call>{_name(tool)}" + chr(10))} {_arguments(tool, argument)} {_text("</tool_call>")}'
             for tool in tools]
    return _calls(calls, parallel) + 'glm_text[suffix="</arg_value>\\n"]: /(?s:.*)/\n'


def mistral_grammar(marker: int, tools: Tools, parallel: bool) -> str:
    """A list of calls behind the control token of that id."""
    rules = "".join(f"call_{n}: {_json_call(tool)}\n" for n, tool in enumerate(tools))
    one = " | ".join(f"call_{n}" for n in range(len(tools)))
    more = ' (", " one)*' if parallel else ""
    return f'start: <[{marker}]> "[" one{more} "]"\none: {one}\n{rules}'


def _calls(calls: Sequence[str], parallel: bool) -> str:
    """calls: the body of a rule for each tool."""
    more = ' ("\\n" one)*' if parallel else ""
    rules = "".join(f"call_{n}: {call}\n" for n, call in enumerate(calls))
    return f"start: one{more}\none: {' | '.join(f'call_{n}' for n in range(len(calls)))}\n{rules}"


def _json_call(tool: Mapping[str, Any]) -> str:
    head = '{"name": ' + json.dumps(_name(tool)) + ', "arguments": '
    return f"{_text(head)} %json {json.dumps(_parameters(tool))} {_text('}')}"


def _arguments(tool: Mapping[str, Any], argument: Any) -> str:
    """Those that are required, the others where the model gives them, all in the schema's order."""
    parameters = _parameters(tool)
    required, properties = parameters.get("required"), parameters.get("properties")
    required = required if isinstance(required, list) else []
    schemas = {name: schema if isinstance(schema, Mapping) else {}  # true: any JSON
               for name, schema in properties.items()} if isinstance(properties, Mapping) else {}
    return " ".join(argument(name, schema) if name in required else f"({argument(name, schema)})?"
                    for name, schema in schemas.items())


def _value(schema: Mapping[str, Any]) -> str:
    """JSON of an argument's schema; a text that is one of a few stands without quotes."""
    choices = schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices):
        return "(" + " | ".join(map(_text, choices)) + ")"
    return f"%json {json.dumps(schema)}"


def _text(text: str) -> str:
    """A literal."""
    return json.dumps(text, ensure_ascii=False)


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool["function"]["name"])


def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    found = tool["function"].get("parameters")
    return found if isinstance(found, Mapping) else {"type": "object"}
