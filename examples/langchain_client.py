"""Ask a running server through LangChain, streamed and by a typed answer: pip install langchain-openai.

foreroute serve foreroute-tiny &
python examples/langchain_client.py [URL]
"""

import sys

from langchain_openai import ChatOpenAI
from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
name = OpenAI(base_url=url, api_key="none").models.list().data[0].id
llm = ChatOpenAI(base_url=url, api_key="none", model=name, temperature=0, max_tokens=96)
for piece in llm.stream("Mon 3 Jul + 2 days"):
    print(piece.content, end="", flush=True)
print()
print(llm.invoke("12 + 30").text.split()[-1])
