"""The harmony format as a chat template, for a gpt-oss checkpoint without one of its own.

It goes through the same sandbox as every template, so messages are traced and effort, tools and results are handed over
in the same way. It writes what OpenAI's openai-harmony writes: system message with date and effort, developer message
with instructions and tools, reasoning only while a tool's result is awaited.
"""

NAME = "harmony (built in; the checkpoint has no template)"
TEMPLATE = r"""
{%- macro comment(text, indent) -%}{{- indent + "// " + text + "\n" -}}{%- endmacro -%}

{%- macro default(spec) -%}
    {%- if spec.default is defined -%}
        {{- "default: " -}}
        {{- spec.default if spec.enum and spec.default is string else spec.default | tojson -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro fields(spec, indent) -%}
    {%- for name, field in (spec.properties or {}).items() -%}
        {%- if field.title -%}{{- comment(field.title, indent) + indent + "//\n" -}}{%- endif -%}
        {%- if field.description -%}{{- comment(field.description, indent) -}}{%- endif -%}
        {%- if field.examples -%}
            {{- comment("Examples:", indent) -}}
            {%- for example in field.examples if example is string -%}
                {{- comment("- " + example | tojson, indent) -}}
            {%- endfor -%}
        {%- endif -%}
        {{- indent + name + ("" if name in (spec.required or []) else "?") + ":" -}}
        {%- if field.oneOf -%}
            {%- for choice in field.oneOf -%}
                {{- "\n" + indent + " | " + kind(choice, indent + "   ") -}}
                {%- set said = [choice.description or "", default(choice)] | select | join(" ") -%}
                {{- " // " + said if said else "" -}}
            {%- endfor -%}
            {{- "\n" + indent + ",\n" -}}
        {%- else -%}
            {{- " " + kind(field, indent + "    ") + "," -}}
            {{- " // " + default(field) if field.default is defined else "" -}}
            {{- "\n" -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}

{%- macro kind(spec, indent) -%}
    {%- if spec.enum and spec.type == "string" -%}
        {{- '"' + spec.enum | join('" | "') + '"' -}}
    {%- elif spec.type == "array" -%}
        {{- kind(spec["items"], indent) + "[]" if "items" in spec else "Array<any>" -}}
    {%- elif spec.type == "object" -%}
        {%- if spec.description -%}{{- comment(spec.description, indent) -}}{%- endif -%}
        {{- "{\n" + fields(spec, indent) + indent + "}" -}}
    {%- elif spec.type is string -%}
        {{- {"integer": "number"}.get(spec.type, spec.type) -}}
    {%- elif spec.type is defined and spec.type is iterable -%}
        {%- for each in spec.type -%}
            {{- {"integer": "number"}.get(each, each) + ("" if loop.last else " | ") -}}
        {%- endfor -%}
    {%- else -%}
        {{- "any" -}}
    {%- endif -%}
    {{- " | null" if spec.nullable else "" -}}
{%- endmacro -%}

{{- "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n" -}}
{{- "Knowledge cutoff: 2024-06\nCurrent date: " + strftime_now("%Y-%m-%d") + "\n\n" -}}
{{- "Reasoning: " + (reasoning_effort or "medium") + "\n\n" -}}
{{- "# Valid channels: analysis, commentary, final. Channel must be included for every message." -}}
{{- "\nCalls to these tools must go to the commentary channel: 'functions'." if tools else "" -}}
{{- "<|end|>" -}}

{%- set told = messages[0].content if messages[0].role == "system" else "" -%}
{%- set turns = messages[1:] if messages[0].role == "system" else messages -%}
{%- if told or tools -%}
    {{- "<|start|>developer<|message|>" -}}
    {{- "# Instructions\n\n" + told if told else "" -}}
    {%- if tools -%}
        {{- ("\n\n" if told else "") + "# Tools\n\n## functions\n\nnamespace functions {\n\n" -}}
        {%- for tool in tools -%}
            {%- set tool = tool.function or tool -%}
            {%- for line in (tool.description or "").splitlines() -%}{{- comment(line, "") -}}{%- endfor -%}
            {%- if tool.parameters -%}
                {{- "type " + tool.name + " = (_: {\n" + fields(tool.parameters, "") + "}) => any;\n\n" -}}
            {%- else -%}
                {{- "type " + tool.name + " = () => any;\n\n" -}}
            {%- endif -%}
        {%- endfor -%}
        {{- "} // namespace functions" -}}
    {%- endif -%}
    {{- "<|end|>" -}}
{%- endif -%}

{%- set ns = namespace(calls=[], answered=-1, name=none) -%}
{%- for message in turns if message.role == "assistant" -%}
    {%- if not message.tool_calls -%}{%- set ns.answered = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set place = namespace(answer=0) -%}
{%- for message in turns -%}
    {%- if message.role == "assistant" -%}
        {%- if message.tool_calls and message.thinking and place.answer > ns.answered -%}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" -}}
        {%- endif -%}
        {%- if not message.tool_calls -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content -}}
            {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" -}}
        {%- elif message.content -%}
            {{- "<|start|>assistant<|channel|>commentary<|message|>" + message.content + "<|end|>" -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {{- "<|start|>assistant to=functions." + call.function.name -}}
            {{- "<|channel|>commentary <|constrain|>json<|message|>" -}}
            {{- call.function.arguments | tojson(separators=(",", ":")) + "<|call|>" -}}
            {%- set ns.name = call.function.name -%}
        {%- endfor -%}
        {%- set ns.calls = message.tool_calls or [] -%}
        {%- set place.answer = place.answer + 1 -%}
    {%- elif message.role == "tool" -%}
        {%- set owner = namespace(name=ns.name) -%}
        {%- for call in ns.calls if call.id and call.id == message.tool_call_id -%}
            {%- set owner.name = call.function.name -%}
        {%- endfor -%}
        {%- if owner.name is none -%}{{- raise_exception("a tool's result without its call") -}}{%- endif -%}
        {{- "<|start|>functions." + owner.name + " to=assistant<|channel|>commentary<|message|>" -}}
        {{- message.content + "<|end|>" -}}
    {%- elif message.role == "user" -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" -}}
    {%- else -%}
        {{- raise_exception("a system message that is not the first") -}}
    {%- endif -%}
{%- endfor -%}
{{- "<|start|>assistant" if add_generation_prompt else "" -}}
"""
