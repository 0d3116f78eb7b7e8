"""The metadata of one GGUF file by llama.cpp's names, and the settings that every architecture says alike."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreroute.checkpoint.gguf_file import GgufIndex
from foreroute.checkpoint.source_files import SourceFile
from foreroute.errors import CorruptCheckpointError, UnsupportedModelError

# Kinds of a router's scores, by their number in the metadata.
SOFTMAX, SIGMOID = 1, 2
# By the metadata's name: transformers' names of it, of which a family has one.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "feed_forward_length": ("intermediate_size",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": (
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    "moe_latent_size": ("moe_latent_size",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
    "expert_shared_count": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "attention.sliding_window": ("sliding_window",),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "attention.value_length_mla": ("v_head_dim",),
    "attention.indexer.head_count": ("index_n_heads",),
    "attention.indexer.key_length": ("index_head_dim",),
    "attention.indexer.top_k": ("index_topk",),
    "shortconv.l_cache": ("conv_L_cache",),
}
# The same for those that change numbers without a shape that shows it; with the value that an absent one has, and None
# where that is the family's own.
SCALES: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "leading_dense_block_count": (("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    "expert_weights_scale": (("routed_scaling_factor", "route_scale"), 1.0),
    "expert_weights_norm": (("norm_topk_prob", "route_norm"), False),
    "expert_group_count": (("n_group",), 1),
    "expert_group_used_count": (("topk_group",), 1),
    "attention.scale": (("attention_multiplier",), None),
    "embedding_scale": (("embedding_multiplier",), 1.0),
    "residual_scale": (("residual_multiplier",), 1.0),
    "logit_scale": (("logits_scaling",), 1.0),
    "attn_logit_softcapping": ((), None),
    "router_logit_softcapping": ((), None),
    "final_logit_softcapping": (("final_logit_softcapping",), None),
    "attention.shared_kv_layers": (("num_kv_shared_layers",), 0),
    "attention.clamp_kqv": (("clip_qkv",), None),
    "attention.max_alibi_bias": ((), None),
    "attention.causal": ((), True),
    "attention.output_scale": ((), None),
    "attention.temperature_scale": ((), None),
    "expert_group_scale": ((), 1.0),
    "interleave_moe_layer_step": (("moe_layer_interval",), 1),
    "n_deepstack_layers": ((), 0),
}
# Read elsewhere in this folder, or without effect on numbers.
_OTHERS = frozenset({
    "block_count", "nextn_predict_layers", "vocab_size", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.key_length_mla", "expert_gating_func", "attention.sliding_window_pattern",
    "attention.recurrent_layers", "full_attention_interval", "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size",
    "ssm.time_step_rank", "ssm.group_count", "tensor_data_layout", "pooling_type", "use_parallel_residual",
    "attention.layer_norm_epsilon", "attention.key_length_swa", "attention.value_length_swa",
    "attention.value_scale", "attention.indexer.types",
})  # fmt: skip


@dataclass(frozen=True)
class GgufMetadata:
    """The metadata that the architecture prefixes, and which tensors there are."""

    index: GgufIndex

    @property
    def said(self) -> dict[str, Any]:
        """By name without the architecture."""
        prefix = f"{self.index.architecture}."
        return {n.removeprefix(prefix): value for n, value in self.index.settings.items() if n.startswith(prefix)}

    def get(self, name: str, default: Any = None) -> Any:
        """What the metadata say of `name`."""
        return self.index.settings.get(f"{self.index.architecture}.{name}", default)

    def must(self, name: str) -> Any:
        """The same.

        Raises:
            CorruptCheckpointError: nothing is said.
        """
        full = f"{self.index.architecture}.{name}"
        if full not in self.index.settings:
            raise CorruptCheckpointError(
                f"{self.index.folder} does not say {full}. Its converter is too old, or not llama.cpp's."
            )
        return self.index.settings[full]

    def has(self, tensor: str) -> bool:
        """Whether some layer has the tensor `tensor`, a name without its block."""
        return any(name.partition(".")[2].partition(".")[2] == tensor for name in self.index.tensors)

    def floats(self, tensor: str) -> list[float]:
        """The numbers of a small tensor [numbers] of F32.

        Raises:
            CorruptCheckpointError: it has another type. ReadError: it cannot be read.
        """
        entry, kind = self.index.tensors[tensor], self.index.kinds[tensor]
        if kind != "F32":
            raise CorruptCheckpointError(f"{self.index.folder}: {tensor} is {kind} in place of F32. Download it again.")
        content = bytearray(entry.nbytes)
        with SourceFile(entry.path, self.index.files.get(entry.path)) as file:
            file.read_into(entry.offset, memoryview(content))
        return [*struct.unpack(f"<{entry.nbytes // 4}f", content)]

    @property
    def num_layers(self) -> int:
        """Layers, without those of multi-token prediction."""
        return int(self.must("block_count")) - int(self.get("nextn_predict_layers", 0))

    def by_layer(self, name: str, default: Any = None) -> list[Any]:
        """What is said of each layer, once for all of them or one by one."""
        found = self.get(name, default)
        return (found if isinstance(found, list) else [found] * self.num_layers)[: self.num_layers]

    def refused(self, name: str, why: str = "which is not read") -> UnsupportedModelError:
        """An error about what is said of `name`."""
        return UnsupportedModelError(
            f"{self.index.folder}: {self.index.architecture}.{name} is {self.get(name)!r:.60}, {why}. Take the model's "
            "safetensors."
        )

    def check_known(self) -> None:
        """Check that everything that is said is read, or without effect.

        Raises:
            UnsupportedModelError: something is neither.
        """
        for name in self.said:
            if not (name in SETTINGS or name in SCALES or name in _OTHERS or name.startswith("rope.")):
                raise self.refused(name, "a setting that is not known here")
