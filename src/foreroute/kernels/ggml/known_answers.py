"""Known answers: what a type's blocks mean here and in the gguf package, before a model is computed with them.

Also a program, which library.py runs before it opens libraries that are not the pinned package's: should they end the
process, it is that one. Exit code 0: the libraries in the folder that it is given can be used. REFUSED: the reason is
on standard error.
"""

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from foreroute.kernels.ggml.graph import Graph, Runner, place
from foreroute.kernels.ggml.interleaved import Interleaver
from foreroute.kernels.ggml.library import REFUSED, GgmlError, Library
from foreroute.kernels.ggml.types import F32, BlockType

_ROWS, _COLUMNS = 8, 512
# Activations are rounded to 8 bits inside a product: some 1 % of its size. Another format is off by more than all.
_MOST_ERROR = 0.05
# Random blocks per block that is used; bounds of their largest numbers.
_CANDIDATES = 16
_LEAST, _MOST = 0.01, 100.0
_PLAIN = {"F32": np.float32, "F16": np.float16}


def check_types(library: Library, names: Sequence[str]) -> None:
    """Compare dequantised blocks and a product with the gguf package's numbers, for each type that ggml knows.

    Raises:
        GgmlError: a type whose numbers differ; named.
    """
    for name in names:
        if name in library.types:
            _check(library, name)


@lru_cache(maxsize=64)
def _check(library: Library, name: str) -> None:
    kind = library.types[name]
    blocks = _comparable_blocks(kind)
    theirs = None if blocks is None else _reference(kind, blocks)
    if blocks is None or theirs is None:
        return
    theirs = theirs.reshape(_ROWS, _COLUMNS)
    ours = np.empty_like(theirs)
    if name == "F32":
        ours[:] = blocks.view(np.float32)
    else:
        library.traits(name).to_float(blocks.ctypes.data, ours.ctypes.data, ours.size)
    if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
        raise GgmlError(f"ggml {library.version} makes other numbers of {name} than the gguf package does.")
    x = np.random.default_rng(1).standard_normal(_COLUMNS, dtype=np.float32)
    product, expected = _product(library, kind, blocks, x), theirs @ x
    if not np.linalg.norm(product - expected) <= _MOST_ERROR * np.linalg.norm(expected):
        raise GgmlError(f"ggml {library.version} gives wrong products of {name}.")
    side_by_side = Interleaver(library, kind, _COLUMNS)
    if side_by_side.is_possible:
        product = _product(library, kind, side_by_side.convert(blocks), x, side_by_side)
        if not np.linalg.norm(product - expected) <= _MOST_ERROR * np.linalg.norm(expected):
            raise GgmlError(f"ggml {library.version} gives wrong products of {name} with rows side by side.")


def _comparable_blocks(kind: BlockType) -> np.ndarray | None:
    """A matrix [rows, bytes of a row] of any bytes, without blocks whose numbers are too large or too small to compare.

    None where the gguf package has no numbers of this type. Nothing is quantised: for some types that takes seconds.
    """
    count = _ROWS * _COLUMNS // kind.weights
    random = np.random.default_rng(0).integers(0, 256, (_CANDIDATES * count, kind.nbytes), dtype=np.uint8)
    numbers = _reference(kind, random)
    if numbers is None:
        return None
    largest = np.abs(numbers.reshape(len(random), -1)).max(axis=1)  # NaN, where one of them is
    usable = random[(largest > _LEAST) & (largest < _MOST)]
    return np.resize(usable, (count, kind.nbytes)).reshape(_ROWS, -1)


def _reference(kind: BlockType, blocks: np.ndarray) -> np.ndarray | None:
    """The gguf package's numbers; None where it is not installed or does not know the type."""
    try:
        import gguf
    except ImportError:
        return None
    number = getattr(gguf.GGMLQuantizationType, kind.name, None)
    if number is None:
        return None
    if kind.name in _PLAIN:
        return blocks.view(_PLAIN[kind.name]).astype(np.float32)
    try:
        with np.errstate(all="ignore"):
            return np.asarray(gguf.quants.dequantize(blocks, number), dtype=np.float32)
    except NotImplementedError:
        return None


@lru_cache(maxsize=2)
def _runner(library: Library) -> Runner:
    return Runner(library, 1)


def _product(
    library: Library, kind: BlockType, blocks: np.ndarray, x: np.ndarray, form: Interleaver | None = None
) -> np.ndarray:
    graph = Graph(_runner(library), 4)
    weights, row = graph.tensor(kind.number, (_COLUMNS, _ROWS)), graph.tensor(F32, (_COLUMNS, 1))
    if form is not None:
        form.mark(weights)
    product = np.zeros(_ROWS, dtype=np.float32)
    out = graph.library.ggml_mul_mat(graph.context, weights, row)
    for tensor, array in ((weights, blocks), (row, x), (out, product)):
        place(tensor, array.ctypes.data)
    graph.finish(out)
    graph.run()
    return product


def main(arguments: Sequence[str]) -> int:
    """Try out the libraries in the folder `arguments`[0]."""
    try:
        library = Library(Path(arguments[0]))
        check_types(library, sorted(library.types.keys() - {"I32"}))
    except GgmlError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
