"""What is drafted."""

import pytest
import torch

from foreroute.drafting.drafters import ModelDrafter, PromptLookup
from foreroute.model.draft_model import DraftModel


def test_what_followed_before_is_looked_up() -> None:
    lookup = PromptLookup()
    text = [1, 2, 3, 4, 5, 9, 2, 3]
    assert list(lookup.draft(text, 2, 0.0)) == [4, 5]
    assert list(lookup.draft([*text, 4], 4, 0.0)) == [5, 9, 2, 3]
    assert list(lookup.draft([*text, 7], 4, 0.0)) == []


def test_the_longest_end_that_recurs_decides() -> None:
    lookup = PromptLookup()
    assert list(lookup.draft([7, 2, 3, 5, 8, 2, 3, 6, 7, 2, 3], 1, 0.0)) == [5]


def test_a_text_that_repeats_is_continued_beyond_itself() -> None:
    assert list(PromptLookup().draft([1, 2, 1, 2, 1, 2], 5, 0.0)) == [1, 2, 1, 2, 1]


def test_another_text_is_looked_up_in_itself() -> None:
    lookup = PromptLookup()
    assert list(lookup.draft([1, 2, 3, 1, 2], 1, 0.0)) == [3]
    assert list(lookup.draft([4, 1, 2], 1, 0.0)) == []


def small(window: int | None = None) -> DraftModel:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=40, sliding_window=window, initializer_range=0.3,
    )  # fmt: skip
    return DraftModel(MistralForCausalLM(config).eval(), None, 0, 40)  # type: ignore[arg-type]


def likeliest(draft: DraftModel, ids: list[int], count: int) -> list[int]:
    """As the model chooses them in passes over the whole text."""
    text = list(ids)
    for _ in range(count):
        with torch.no_grad():
            text.append(int(draft.model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(ids) :]


@pytest.mark.parametrize("window", [None, 6])
def test_a_model_drafts_its_likeliest_tokens_of_any_text(window: int | None) -> None:
    """After a text that goes on, one that goes on otherwise, and another one; also where tokens left a window."""
    draft = small(window)
    drafter = ModelDrafter(draft, 64)
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for ids in (text, [*text, 20], [*text, 20, 21, 22, 23], [*text, 30], [5, 6, 7], text):
        assert list(drafter.draft(ids, 4, 0.0)) == likeliest(draft, ids, 4)


def test_a_draft_ends_where_it_is_not_likely_and_at_the_drafts_context() -> None:
    drafter = ModelDrafter(small(), 64)
    assert list(drafter.draft([1, 2, 3], 5, 0.999)) == []
    assert len(list(drafter.draft([1] * 38, 5, 0.0))) == 2
    assert list(drafter.draft([1] * 41, 5, 0.0)) == []


def test_tokens_that_the_model_does_not_have_are_not_drafted() -> None:
    assert all(token < 3 for token in ModelDrafter(small(), 3).draft([1, 2], 6, 0.0))


def test_a_small_llama_has_a_lean_forward_and_drafts_the_same() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, initializer_range=0.3,
    )  # fmt: skip
    draft = DraftModel(LlamaForCausalLM(config).eval(), None, 0, 400)  # type: ignore[arg-type]
    drafter = ModelDrafter(draft, 64)
    assert drafter._lean is not None
    text = [at % 60 for at in range(270)]
    for ids in (text[:9], [*text[:9], 20], text, [*text[:200], 30, 31], [5, 6, 7]):
        assert list(drafter.draft(ids, 4, 0.0)) == likeliest(draft, ids, 4)


def test_a_llama_of_another_form_is_left_to_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, attention_bias=True, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.bias)
    assert ModelDrafter(DraftModel(model, None, 0, None), 64)._lean is None  # type: ignore[arg-type]


def test_a_pass_that_breaks_off_leaves_nothing_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a pass: some layers hold its tokens then, and others do not."""
    draft = small()
    drafter = ModelDrafter(draft, 64)
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert list(drafter.draft(text, 2, 0.0)) == likeliest(draft, text, 2)
    last = draft.model.model.layers[1]  # type: ignore[index, union-attr]
    own = last.forward

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    longer = [*text, 20, 21]
    monkeypatch.setattr(last, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(drafter.draft(longer, 2, 0.0))
    monkeypatch.setattr(last, "forward", own)
    for ids in (longer, [5, 6, 7], text):
        assert list(drafter.draft(ids, 4, 0.0)) == likeliest(draft, ids, 4)


def test_texts_share_a_lean_models_weights_and_nothing_else() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=400, initializer_range=0.3,
    )  # fmt: skip
    draft = DraftModel(LlamaForCausalLM(config).eval(), None, 0, 400)  # type: ignore[arg-type]
    first, second = ModelDrafter(draft, 64), ModelDrafter(draft, 64)
    assert first._lean is not None
    assert second._lean is not None
    assert first._lean._layers is second._lean._layers
    for ids in ([1, 2, 3, 4], [1, 2, 3, 4, 9]):
        assert list(first.draft(ids, 4, 0.0)) == likeliest(draft, ids, 4)
        other = [50, *ids]
        assert list(second.draft(other, 4, 0.0)) == likeliest(draft, other, 4)
