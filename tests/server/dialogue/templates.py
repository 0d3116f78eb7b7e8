"""Chat templates that read messages as those of well-known models do, each cut down to what it reads."""

# Content as text, calls' arguments as an object; the model opens <think> itself. Qwen3 and Hermes.
HERMES = """
{%- if tools %}{{- '<|system|>' + (messages[0].content if messages[0].role == 'system' else '') + '<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '</tools>: <tool_call>{"name": <function-name>, "arguments": <args-json-object>}</tool_call>' }}
{%- elif messages[0].role == 'system' %}{{- '<|system|>' + messages[0].content }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|user|>' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<|assistant|>' }}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' }}{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
{{- '</tool_call>' }}
{%- endfor %}
{%- elif message.role == 'tool' %}{{- '<|user|><tool_response>' + message.content + '</tool_response>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{%- endif %}{%- endif %}"""

# As Qwen3-Coder and Qwen3.5: arguments by |items, reasoning that the prompt opens.
QWEN3_CODER = """
{%- for tool in tools or [] %}{{- '<function><name>' ~ tool.function.name ~ '</name></function>' }}{%- endfor %}
{%- if tools %}{{- '<tool_call><function=example><parameter=name>' }}{%- endif %}
{%- for message in messages %}{{- '<|' + message.role + '|>' + message.content }}
{%- for call in message.tool_calls or [] %}{{- '<tool_call><function=' + call.function.name + '>' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>' ~ value ~ '</parameter>' }}{%- endfor %}
{{- '</function></tool_call>' }}{%- endfor %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{%- endif %}"""

# Arguments are put into text as they are; of a message that only calls, content must be none. DeepSeek-R1's first.
DEEPSEEK = """
{%- for tool in tools or [] %}{{- tool.function.name }}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.content is none %}{{- '<｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}
{{- call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{%- endfor %}{{- '<｜tool▁calls▁end｜>' }}
{%- elif message.role == 'tool' %}{{- '<｜tool▁outputs▁begin｜>' + message.content }}
{%- else %}{{- '<|' + message.role + '|>' + message.content }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

# Ids of nine letters; content in parts for the system alone, text or parts for others. Mistral.
MISTRAL = """
{%- if messages[0].role == 'system' %}{{- '[SYSTEM_PROMPT]' + messages[0].content[0].text }}{%- endif %}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined %}
{%- for call in message.tool_calls %}{%- if call.id | length != 9 %}{{- raise_exception('ids of 9') }}{%- endif %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}{%- endfor %}
{%- elif message.role == 'assistant' %}{{- message.content }}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{- raise_exception('ids of 9') }}{%- endif %}
{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}"""

# Of a message's calls it shows the first; reasoning is called thinking, and not beside content. gpt-oss.
HARMONY = """
{%- macro text(message) %}{{- message.content }}{%- endmacro %}
{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}
{{- '<|start|>system<|message|>Reasoning: ' + reasoning_effort + '<|end|>' }}
{%- for tool in tools or [] %}{{- '// ' + tool.function.description + ' type ' + tool.function.name }}{%- endfor %}
{%- set last = namespace(name='') %}
{%- for message in messages %}
{%- if message.role == 'assistant' and 'tool_calls' in message %}
{%- if message.content and message.thinking %}
{{- raise_exception('Cannot pass both content and thinking in an assistant message with tool calls!') }}
{%- elif message.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}
{%- set call = message.tool_calls[0].function %}{%- set last.name = call.name %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson }}{{- '<|call|>' }}
{%- elif message.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + text(message) + '<|end|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start|>functions.' + last.name + '<|message|>' + (message.content | tojson) + '<|end|>' }}
{%- else %}{{- '<|start|>' + message.role + '<|message|>' + text(message) + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# Content in parts alone, in three ways of walking over them.
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
FIRST_PART = "{% for m in messages %}<|{{ m.role }}|>{{ m.content[0].text }}{% endfor %}"
MAPPED = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | map(attribute='text') | join }}{% endfor %}"
EITHER = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
