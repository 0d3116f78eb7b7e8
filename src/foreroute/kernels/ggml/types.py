"""ggml's tensor types: their numbers in a file, and how many weights and bytes a block has."""

from dataclasses import dataclass

# Numbers are part of GGUF's format and never reused; names as the gguf package spells them. "F32" is the type of
# activations and biases, "I32" that of ids.
TYPE_NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "I32": 26, "IQ1_M": 29, "BF16": 30, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40,
}  # fmt: skip
F32, I32 = TYPE_NUMBERS["F32"], TYPE_NUMBERS["I32"]
# Those that a matrix may have.
MATRIX_TYPES = tuple(name for name in TYPE_NUMBERS if name != "I32")


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of matrices: `weights` in a row share a block of `nbytes`."""

    name: str
    number: int
    weights: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns`, which are whole blocks."""
        assert columns % self.weights == 0, f"{columns} columns are no whole blocks of {self.name}"
        return columns // self.weights * self.nbytes
