"""Chat templates that call tools in the ways that real models do, cut to what matters here."""

HERMES = """
{%- if tools %}<|im_start|>system
# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.tool_calls %}
<|im_start|>assistant
{%- if message.content %}{{ '\\n' + message.content }}{% endif %}
{%- for call in message.tool_calls %}{% set function = call.function %}
{{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}<|im_end|>
{% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As of Qwen3: the last answer shows that it was not thought about.
THINKING = HERMES.replace(
    "<|im_start|>assistant\n{%- if message.content %}{{ '\\n' + message.content }}",
    "<|im_start|>assistant\n<think>\n\n</think>\n"
    "{%- if message.content %}{{ '\\n' + message.content }}",
)
# As of Llama 3.1: the call is the whole answer, one at most.
BARE = """
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|im_start|>assistant\\n\\n' }}
{{- '{"name": "' + call.name + '", ' }}{{ '"parameters": ' }}
{{- call.arguments | tojson }}{{ '}' }}{{ '<|im_end|>' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n\\n' }}
{%- if loop.first and tools %}{{ tools | tojson(indent=4) }}{% endif %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"""
# As of Mistral: a special token, a list, and ids of nine letters and digits.
LISTED = """
{{- bos_token }}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == asked[-1] %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last else ']' + eos_token }}
{%- endfor %}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id }}
{{- '"}[/TOOL_RESULTS]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""
# As of DeepSeek: the name outside the JSON, arguments as text, tokens around.
FENCED = """
{%- for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.description }}
{% endfor %}
{%- for message in messages %}
{%- if message.tool_calls %}
{{- '<|im_start|>assistant' }}{{ message.content }}
{%- for call in message.tool_calls %}
{{- '<calls>' if loop.first else '\\n' }}
{{- '<call>function<sep>' + call.function.name + '\\n```json\\n' + call.function.arguments }}
{{- '\\n```</call>' }}
{%- endfor %}{{ '</calls></s>' }}
{%- else %}
{{- '<|im_start|>' + message.role }}{{ message.content + '</s>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""
TEMPLATES = {
    "hermes": HERMES,
    "thinking": THINKING,
    "bare": BARE,
    "listed": LISTED,
    "fenced": FENCED,
}
