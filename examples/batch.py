"""Answer several prompts in one batch, and show what sharing experts saved.

python examples/batch.py [MODEL]
"""

import sys

import foreroute

PROMPTS = ["12 + 30", "4735 + 281", "Mon 3 Jul + 2 days", "Fri 1 Dec + 3 days"]

with foreroute.load(sys.argv[1] if len(sys.argv) > 1 else "foreroute-tiny", memory="25%") as model:
    tokenizer = model.foreroute.tokenizer()
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    before = model.foreroute.stats()
    rows = model.generate(**batch, max_new_tokens=96, do_sample=False)
    decode = model.foreroute.stats().minus(before).decode
    for prompt, row in zip(PROMPTS, rows, strict=True):
        answer = tokenizer.decode(row[batch["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{prompt}: {answer.splitlines()[-1] if answer else '(nothing)'}")
    demanded = decode.hits + decode.late_hits + decode.misses
    print(f"{demanded} experts demanded in {decode.steps} steps of {len(PROMPTS)} rows, {decode.misses} misses")
