"""What becomes of a transformers model whose experts belong to the engine: what it may still do, and what not."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from foreroute.checkpoint.layouts import ExpertTable
from foreroute.config import Plan
from foreroute.engine.interfaces import MoeEngine, StepInfo
from foreroute.engine.stats import EngineStats
from foreroute.errors import PromptError, RefusedError
from foreroute.model.blocks import MoeLayer
from foreroute.model.caches import given_cache
from foreroute.model.experts import refuse_compiled
from foreroute.policy import Policy
from foreroute.predict.governor import Governor


class ForerouteHandle:
    """`model.foreroute`: the plan, the counts, and the way to let go.

    Attributes:
        plan: what `load` decided.
        engine: what computes the experts, for those who look inside.
        layers: the MoE layers, as the probe saw them. table: their experts, by key.
        decoder: of answers, where the device pages experts (device/graph_decoder.py); made with the first one.
    """

    def __init__(self, plan: Plan, engine: MoeEngine, layers: list[MoeLayer], table: ExpertTable) -> None:
        self.plan = plan
        self.engine = engine
        self.layers = layers
        self.table = table
        self._announced: StepInfo | None = None
        self.decoder: Any = None

    @contextmanager
    def step(self, info: StepInfo) -> Iterator[None]:
        """The model's next call, inside, is this step; without it what a call computes is guessed from its shape.

        with model.foreroute.step(StepInfo("prefill", 1, ids.shape[1], ids)):
            logits = model(ids, past_key_values=cache).logits
        """
        self._announced = info
        try:
            yield
        finally:
            self._announced = None

    def take_announced(self) -> StepInfo | None:
        """The step that was announced for the call at hand, once."""
        info, self._announced = self._announced, None
        return info

    def stats(self) -> EngineStats:
        """A copy of all counts since the model was loaded; `.minus(earlier)` gives those of a span."""
        return self.engine.snapshot()

    @property
    def governor(self) -> Governor | None:
        """What decides how much is guessed; None where nobody does (see EngineConfig.governor)."""
        return self.engine.governor

    @property
    def policies(self) -> tuple[Policy, ...]:
        """What decoding waits for: one policy for every row, or one per row."""
        return self.engine.policies.policies

    def set_policy(self, *policies: str | Policy) -> None:
        """Decode under these policies from the next step on: one for every row, or one per row of the batch.

        Prompts are always exact.

        Raises:
            PolicyError: not known, or not to be had with this model; nothing has been changed.
        """
        self.engine.policies.set([Policy.parse(one) if isinstance(one, str) else one for one in policies])

    def check_policy(self, policy: Policy) -> None:
        """Whether the policy can be had with this model.

        Raises:
            PolicyError: it cannot; the message says why.
        """
        self.engine.policies.check(policy)

    def close(self) -> None:
        """Stop the readers and free the pool. The model's experts cannot be computed afterwards."""
        for layer in self.layers:
            layer.experts.engine_forward = None
        self.decoder = None
        self.engine.close()


def _refuse(what: str, why: str) -> Any:
    def refused(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise RefusedError(f"{what} is not possible on a model with offloaded experts: {why}")

    refused.__name__ = what
    return refused


_NOT_ALL_HERE = "the expert weights are not in it. Use the original checkpoint, or load it with transformers."
_AS_LOADED = "experts are kept as stored. Choose the dtype when loading: foreroute.load(..., dtype=...)."


class OffloadedModel:
    """Mixin in front of a transformers model class. Defines what would otherwise be silently wrong."""

    foreroute: ForerouteHandle

    save_pretrained = _refuse("save_pretrained", _NOT_ALL_HERE)
    push_to_hub = _refuse("push_to_hub", _NOT_ALL_HERE)
    compile = _refuse("compile", "its experts come and go between kernels.")
    half = _refuse("half", _AS_LOADED)
    float = _refuse("float", _AS_LOADED)
    double = _refuse("double", _AS_LOADED)
    bfloat16 = _refuse("bfloat16", _AS_LOADED)
    cuda = _refuse("cuda", "it stays where it was loaded. Choose when loading: foreroute.load(..., device=...).")
    # All other ways to move or convert a module end here: type, to_empty, share_memory, ...
    _apply = _refuse("moving or converting", _AS_LOADED)
    __deepcopy__ = _refuse("deepcopy", "two models cannot share one pool. Load it again.")
    __reduce_ex__ = _refuse("pickling", "its experts are on disk. Load it again where it is needed.")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Accepted when nothing changes (the device and dtype it has); refused otherwise."""
        parsed: Any = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = parsed[:2]
        own: Any = self
        if device is not None and device.type != own.device.type:
            raise RefusedError(f"The model was loaded for {own.device}; its experts cannot follow it to {device}.")
        if dtype is not None and dtype != own.dtype:
            raise RefusedError(f"The model computes in {own.dtype}; {_AS_LOADED}")
        return self

    def cpu(self) -> Any:
        """Nothing to do: it is there."""
        return self.to("cpu")

    def train(self, mode: bool = True) -> Any:
        """Evaluation mode only: an expert's slot is another expert's by the time gradients would be computed."""
        if mode:
            raise RefusedError("A model with offloaded experts cannot be trained. Train it with transformers itself.")
        own: Any = super()
        return own.train(False)


def make_offloaded(model: nn.Module, handle: ForerouteHandle) -> nn.Module:
    """Turn the model, in place, into an `OffloadedModel` of the same class name, with `foreroute` attached."""
    cls = type(model)
    # The same name and module: transformers' pipelines and lm-eval tell models by their class name. Gradients are left
    # out here and not by freezing parameters: torch's matmul reads their requires_grad, and gives other bits.
    own: dict[str, Any] = {"__module__": cls.__module__, "forward": torch.no_grad()(cls.forward)}
    model.__class__ = type(cls.__name__, (OffloadedModel, cls), own)
    object.__setattr__(model, "foreroute", handle)
    handle_ref = weakref.ref(handle)
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = getattr(embeddings, "num_embeddings", None)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_compiled()
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        handle = handle_ref()
        if handle is not None and tokens is not None:
            cache = given_cache(kwargs)
            if tokens.shape[1] != 1:
                _check_prompt(tokens, cache, context)
                _check_ids(tokens, vocabulary)
            handle.engine.begin_step(handle.take_announced() or _guess_step(tokens, cache))

    model.register_forward_pre_hook(begin, with_kwargs=True)
    weakref.finalize(model, handle.engine.close)
    return model


def _guess_step(tokens: torch.Tensor, cache: Any) -> StepInfo:
    """What a call computes of which nobody said it, by its shape: several positions, or a text's first, are a prompt.

    Args:
        tokens: ids [rows, positions], or embeddings [rows, positions, hidden].
    """
    is_start = cache is None or int(cache.get_seq_length()) == 0
    # Embeddings in place of ids tell nothing about layer 0.
    token_ids = None if tokens.is_floating_point() else tokens
    is_prefill = is_start or tokens.shape[1] > 1
    return StepInfo(
        "prefill" if is_prefill else "decode", tokens.shape[0], tokens.shape[1], token_ids, is_start=is_start
    )


def _check_prompt(tokens: torch.Tensor, cache: Any, context: int | None) -> None:
    """Not before every decoded token: what a model makes of positions past its context is the caller's choice."""
    if 0 in tokens.shape[:2]:
        raise PromptError("The prompt is empty: there is no token to start from.")
    num_positions = tokens.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
    if context is not None and num_positions > context:
        raise PromptError(
            f"The prompt has {num_positions} tokens, the model's context {context} (max_position_embeddings in "
            "config.json). Shorten the prompt."
        )


def _check_ids(tokens: torch.Tensor, vocabulary: int | None) -> None:
    """See that the model has every token of a prompt; the embedding would stop with an index, or the GPU for good."""
    if vocabulary is None or tokens.is_floating_point():
        return
    least, most = (int(bound) for bound in tokens.aminmax())
    if least < 0 or most >= vocabulary:
        raise PromptError(
            f"The prompt has the token {least if least < 0 else most}; the model has 0 to {vocabulary - 1}. The "
            "tokenizer (tokenizer.json) and the weights are of different models."
        )
