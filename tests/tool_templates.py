"""Chat templates with tools, after the public formats: what Qwen, Llama 3, Hermes and DeepSeek were trained to read.

Written for these tests; the makers' own are longer. Where llama.cpp's collection of them has been unpacked (it lies in
llama-cpp-python's source; `.ci/run` does it), the tests read those as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

QWEN = r"""
{%- if tools %}
<|im_start|>system
{{ messages[0].content + '\n\n' if messages[0].role == 'system' else '' }}# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}
<|im_start|>assistant
{{ message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

LLAMA3 = r"""
{{- bos_token }}<|start_header_id|>system<|end_header_id|>

{% if tools %}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}
{% endif %}<|eot_id|>
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call a turn') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' }}
{%- elif message.role in ('tool', 'ipython') %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

HERMES = r"""
{{- bos_token }}<|im_start|>system
{%- for tool in tools or [] %}
{%- set f = tool.function %}
{{ {"name": f.name, "description": f.description, "parameters": f.parameters} | tojson }}
{%- endfor %}<|im_end|>
{% for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls is defined %}
<|im_start|>assistant
{% for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{% endfor %}<|im_end|>
{% elif message.role == 'tool' %}
<|im_start|>tool
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

DEEPSEEK = r"""
{{- bos_token }}{% for tool in tools or [] %}{{ tool.function | tojson }}
{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}
{%- elif message.role == 'assistant' and message.content is none %}
{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}
{{- ('' if loop.first else '\n') + '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name }}
{{- '\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜tool▁calls▁end｜>' + eos_token }}
{%- elif message.role == 'tool' %}
{{- '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message.content }}
{{- '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}
{%- else %}{{ '<｜Assistant｜>' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜>' }}{% endif %}"""

DEEPSEEK31 = (
    DEEPSEEK.replace("+ call.type + '<｜tool▁sep｜>' + call.function.name", "+ call.function.name + '<｜tool▁sep｜>'")
    .replace("{{- '\\n```json\\n' + call.function.arguments + '\\n```<", "{{- call.function.arguments + '<")
    .replace("('' if loop.first else '\\n') + ", "")
)

OWN_WAY = QWEN.replace('{"name": "\' + call.function.name', "<function=' + call.function.name")

TEMPLATES = {  # template -> the format that its model was trained on
    "Qwen": (QWEN, "hermes"),
    "Llama 3": (LLAMA3, "llama3"),
    "Hermes": (HERMES, "hermes"),
    "DeepSeek": (DEEPSEEK, "deepseek"),
    "DeepSeek 3.1": (DEEPSEEK31, "deepseek3.1"),
    "a way of its own": (OWN_WAY, "prompted"),
}

FOLDER = Path(sys.prefix) / "share" / "chat-templates"
REAL = {  # the makers' own, by their names in llama.cpp's collection
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "ibm-granite-granite-4.0": "hermes",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "prompted",  # trained on no tools
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "prompted",
    "deepseek-ai-DeepSeek-V3.1": "prompted",  # writes earlier calls down, but tells of no tools
    "GLM-4.6": "prompted",  # <tool_call> with XML inside
    "Qwen3-Coder": "prompted",
    "MiniMax-M3": "prompted",
}
