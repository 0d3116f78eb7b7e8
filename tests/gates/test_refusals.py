"""What a model without its expert weights must not do in silence, and what it still does."""

import copy
import io
import pickle
import warnings

import pytest
import torch

from foreroute.errors import RefusedError
from tests.support.runs import ONE_PROMPT, assert_same_bits, generate

REFUSED = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "push_to_hub": lambda model, _: model.push_to_hub("someone/something"),
    "half": lambda model, _: model.half(),
    "float": lambda model, _: model.float(),
    "double": lambda model, _: model.double(),
    "bfloat16": lambda model, _: model.bfloat16(),
    "type": lambda model, _: model.type(torch.float64),
    "cuda": lambda model, _: model.cuda(),
    "compile": lambda model, _: model.compile(),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "copy": lambda model, _: copy.copy(model),
    "pickle": lambda model, _: pickle.dumps(model),
    "torch.save": lambda model, _: torch.save(model, io.BytesIO()),
    "to another dtype": lambda model, _: model.to(torch.float64),
    "to another dtype by name": lambda model, _: model.to(dtype=torch.float16),
    "to another device": lambda model, _: model.to("meta"),
    "to another model's": lambda model, _: model.to(torch.zeros(1, dtype=torch.float64)),
    "to_empty": lambda model, _: model.to_empty(device="cpu"),
    "share_memory": lambda model, _: model.share_memory(),
    "train": lambda model, _: model.train(),
}

OWN_MESSAGE = {"save_pretrained", "push_to_hub", "half", "float", "double", "bfloat16", "cuda", "compile", "deepcopy"}


@pytest.fixture(scope="module")
def model(checkpoints):
    import foreroute

    model = foreroute.load(checkpoints.get("olmoe"), "25%")
    yield model
    model.foreroute.close()


@pytest.mark.parametrize("what", REFUSED)
def test_refused(model, what, tmp_path):
    with pytest.raises(RefusedError) as caught:
        REFUSED[what](model, tmp_path / "saved")
    assert "expert" in str(caught.value)
    if what in OWN_MESSAGE:
        assert what in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_it_works_after_all_those_refusals(model, references, checkpoints):
    for what, act in REFUSED.items():
        with pytest.raises(RefusedError):
            act(model, what)
    assert_same_bits(generate(model), references.output(checkpoints.get("olmoe")))


def test_torch_compile_is_refused_when_called(model):
    import torch._dynamo

    compiled = torch.compile(model, backend="eager")
    part = torch.compile(next(m for m in model.modules() if "Experts" in type(m).__name__), backend="eager")
    ids = torch.zeros(2, 2, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on what it cannot trace
        with pytest.raises(RefusedError, match="compile"):
            compiled(ONE_PROMPT.ids)
        with pytest.raises(RefusedError, match="compile"):
            part(torch.zeros(2, 64), ids, torch.zeros(2, 2))
    torch._dynamo.reset()


def test_to_where_it_is_changes_nothing(model):
    for same in (("cpu",), (torch.float32,), ("cpu", torch.float32), (torch.device("cpu"),)):
        assert model.to(*same) is model
    assert model.cpu() is model
    assert model.eval() is model
    assert model.train(False) is model


def test_what_is_in_it_can_be_looked_at(model, references, checkpoints):
    """Its parameters are those of the resident model, experts left out."""
    resident = references.model(checkpoints.get("olmoe"))
    theirs = resident.state_dict()
    ours = model.state_dict()
    assert set(theirs) - set(ours) == {name for name in theirs if ".experts." in name}
    assert set(ours) <= set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert {name for name, _ in model.named_parameters()} == set(ours)
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in ours.values())
    assert model.num_parameters() == resident.num_parameters(), "experts are counted too"
    assert "OlmoeExperts" in repr(model)
    assert type(model).__name__ == "OlmoeForCausalLM"


def test_gradients(model, references, checkpoints):
    """There are none: by the time they were computed, a slot would hold another expert."""
    reference = references.model(checkpoints.get("olmoe"))
    for ids in (ONE_PROMPT.ids, ONE_PROMPT.ids[:, :1]):
        ours = model(ids, labels=ids)
        assert torch.equal(ours.logits, reference(ids).logits)
        with pytest.raises(RuntimeError, match="does not require grad"):
            ours.loss.backward()
        states = model.model(ids).last_hidden_state
        assert not states.requires_grad
        # A layer alone is transformers' own code.
        with pytest.raises(RefusedError, match="no_grad"):
            model.model.layers[0].mlp(states.requires_grad_())


def test_closed_is_closed(checkpoints, load):
    model = load(checkpoints.get("olmoe"))
    model.foreroute.close()
    model.foreroute.close()
    with pytest.raises(RefusedError, match="load the model again"):
        generate(model)
