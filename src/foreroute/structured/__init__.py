"""Structured output: which tokens may come next, so that an answer fits a JSON schema, a regex or a grammar.

    grammar = Grammar.json_schema({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
    mask = GrammarCompiler.of(model, tokenizer).compile(grammar).processor()
    report = generate(model, tokenizer, prompt_ids, logits_processor=[mask])

with `Grammar` of structured/grammar.py and `GrammarCompiler` of structured/compiler.py. It needs llguidance:
pip install 'foreroute[structured]'. (Nothing is imported here: the process that tries a grammar starts without torch.)
"""
