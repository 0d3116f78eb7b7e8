"""Sums accumulated while the text passes: the input of all solvers, saved so that a fit can be resumed."""

import itertools

import torch

from foreroute.errors import PredictorError
from foreroute.loading.offloaded_model import OffloadedModel
from foreroute.model.blocks import first_decoded
from foreroute.predict.base import RouterSample
from foreroute.predict.build import quasi_hidden, selections
from foreroute.predict.fitted import chosen_experts
from foreroute.prepare.controls import Moment, context_of, expert_counts
from foreroute.prepare.estimator_training import EstimatorSettings, EstimatorTraining
from foreroute.prepare.solvers import DefaultVectorSums, RidgeFit, TokenTableFit


class Sums:
    """Running sums over the MoE layers of one model.

    Memory: per layer (hidden + experts)^2 doubles for the ridge (40 MB at 2048 and 128), and experts x hidden doubles
    for the default vectors (2 MB); once vocabulary x experts doubles for layer 0's table, and the estimator's buffer.
    Qwen3-30B-A3B: 2.2 GB without the estimator's.

    Args:
        model: of `foreroute.load`.
        estimator: settings to train the estimator too; None not to.
        num_tokens: tokens that will be added.
    """

    def __init__(
        self, model: OffloadedModel, estimator: EstimatorSettings | None = None, *, num_tokens: int = 0
    ) -> None:
        self._embed = model.get_input_embeddings()
        # Not the shape of a weight: an embedding in blocks has none.
        vocabulary, embedding_width = self._embed.num_embeddings, self._embed.embedding_dim
        widths = [layer.experts.num_offloaded for layer in model.foreroute.layers]
        hidden = model.config.get_text_config().hidden_size
        self.ridge = [RidgeFit(hidden, here, after) for here, after in itertools.pairwise(widths)]
        self._first = min(first_decoded(model.foreroute.layers), len(widths) - 1)
        self.table = TokenTableFit(vocabulary, embedding_width, hidden, widths[self._first])
        self.outputs = [DefaultVectorSums(width, hidden) for width in widths]
        self.popularity = [torch.zeros(width, dtype=torch.int64) for width in widths]
        self._layers = model.foreroute.layers
        self.estimator: EstimatorTraining | None = None
        if estimator is not None and len(widths) > 1:
            self.estimator = EstimatorTraining(hidden, widths, num_tokens, estimator)
        self._selections = selections(self._layers, model.dtype)

    def on_moment(self, moment: Moment, logits: torch.Tensor | None) -> None:
        """Add the tokens of `moment`, with the gate `logits` [tokens, experts] of its router, if known.

        Raises:
            PredictorError: the model's states are not finite.
        """
        targets = self._selections[moment.layer].targets(logits, moment.now.ids, moment.num_experts)
        if not (torch.isfinite(targets).all() and torch.isfinite(moment.now.hidden).all()):
            raise PredictorError(
                f"MoE layer {moment.layer} computed numbers that are not finite on this text: nothing can be fitted to "
                "them. Try --dtype float32, and check the checkpoint."
            )
        self.popularity[moment.layer] += expert_counts(moment.now.ids, moment.num_experts)
        if moment.before is not None:
            self.ridge[moment.layer - 1].add(moment.before, targets)
            if self.estimator is not None:
                self._show_estimator(moment.layer - 1, moment.before, targets, moment.now.ids)
        elif moment.layer == self._first:
            with torch.no_grad():
                embeddings = self._embed(moment.token_ids)
            self.table.add(moment.token_ids, embeddings, context_of(moment), targets)

    def _show_estimator(self, layer: int, seen: RouterSample, targets: torch.Tensor, ids: torch.Tensor) -> None:
        assert self.estimator is not None
        # The default vectors so far, this pass's outputs of the layer included.
        state = quasi_hidden(self._layers, layer, self.outputs[layer].means())
        following = self._selections[layer + 1]
        if following.reads_logits and following.rule is None:
            distribution = torch.softmax(targets, -1)
        else:
            # Softmax ignores a constant added to all logits, but not corrections: fit the choice itself.
            distribution = chosen_experts(ids, targets.shape[-1])
            distribution = distribution / distribution.sum(-1, keepdim=True).clamp(min=1)
        self.estimator.add(layer, seen.hidden if state is None else state(seen), distribution)

    def on_rows(self, layer: int, expert: int, rows: torch.Tensor) -> None:
        """Add outputs `rows` [tokens, hidden] of one expert of `layer`, before gate weights."""
        self.outputs[layer].add(expert, rows)

    def all_embeddings(self) -> torch.Tensor:
        """The input embeddings of all tokens as the model makes them, [vocabulary, width]."""
        with torch.no_grad():
            return self._embed(torch.arange(self._embed.num_embeddings))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums by name, such as grams [features + 1, features + 1]; not copies, so saved ones can be copied in."""
        named = {"table.sums": self.table.sums, "table.counts": self.table.counts}
        named["table.gram"], named["table.cross"] = self.table.equations.gram, self.table.equations.cross
        for layer, fit in enumerate(self.ridge):
            named[f"ridge.{layer}.gram"], named[f"ridge.{layer}.cross"] = fit.equations.gram, fit.equations.cross
        for layer, sums in enumerate(self.outputs):
            named[f"outputs.{layer}.sums"], named[f"outputs.{layer}.counts"] = sums.sums, sums.counts
            named[f"popularity.{layer}"] = self.popularity[layer]
        if self.estimator is not None:
            named.update({f"estimator.{name}": tensor for name, tensor in self.estimator.tensors().items()})
        return named

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(tensor.nbytes for tensor in self.tensors().values())
