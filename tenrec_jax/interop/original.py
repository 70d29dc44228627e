"""State dicts of the original PyTorch system: read safely, checked completely, and run as modules of ours.

The table below is the whole correspondence of names. It also says every entry's shape in letters, so that the sizes are
read from the weights by majority and an entry that does not fit the others is named.
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  the error alone: torch raises it for a refused file
from tokenize import TokenError
from typing import Any, Literal, NamedTuple, TypeVar
from warnings import catch_warnings, filterwarnings
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tenrec_jax.errors import UserError
from tenrec_jax.interop.original_models import JointEncoder, JointPaperAttention, OriginalRanker, OriginalTwoTower
from tenrec_jax.models.blocks import ACTIVATIONS, EncoderConfig
from tenrec_jax.models.features import Vocabulary

Weights = Mapping[str, Any]  # name -> array of any kind that NumPy can read
ModuleT = TypeVar("ModuleT", bound=nnx.Module)
# Of the headers of arrays in an npz, which are Python literals, and of sizes that lie.
_HEADER_ERRORS = (TokenError, SyntaxError, RecursionError, MemoryError, OverflowError, NotImplementedError)


class Leaf(NamedTuple):
    """A parameter of a layer: its name there and here, and whether it is transposed on the way."""

    torch: str
    flax: str
    transpose: bool = False


LINEAR = (Leaf("weight", "kernel", transpose=True), Leaf("bias", "bias"))
LAYER_NORM = (Leaf("weight", "scale"), Leaf("bias", "bias"))
EMBEDDING = (Leaf("weight", "embedding"),)
POSITIONS = (Leaf("pe", "pe"),)


class Row(NamedTuple):
    """A layer: the original's name, its weight's shape there (a bias has the first size alone), ours, its parameters.

    Sizes: D width, F hidden of the encoder, M hidden of the item tower, H heads, A actions, P positions, and table rows
    U users, I items, G genders, Y ages, K categories, L action embeddings; "2D" is twice D and "3" is three. `{layer}`
    is a block, stacked on the leading axis here. A layer that the original does not use has None for our name.
    """

    torch: str
    sizes: str
    flax: str | None
    leaves: tuple[Leaf, ...]


PAPER_ATTENTION = (
    Row("query", "D D", "attention.query", LINEAR),
    Row("query_att", "H D", "attention.query_att", LINEAR),
    Row("key", "D D", "attention.key", LINEAR),
    Row("key_att", "H D", "attention.key_att", LINEAR),
    Row("transform", "D D", "attention.transform", LINEAR),
)
ENCODER = (
    Row("layers.{layer}.norm1", "D", "encoder.blocks.norm1", LAYER_NORM),
    Row("layers.{layer}.attention.query", "D D", "encoder.blocks.attention.query", LINEAR),
    Row("layers.{layer}.attention.key", "D D", "encoder.blocks.attention.key", LINEAR),
    Row("layers.{layer}.attention.value", "D D", "encoder.blocks.attention.value", LINEAR),
    Row("layers.{layer}.attention.query_weight", "H D", "encoder.blocks.attention.query_weight", LINEAR),
    Row("layers.{layer}.attention.key_weight", "H D", "encoder.blocks.attention.key_weight", LINEAR),
    Row("layers.{layer}.attention.out_proj", "D D", "encoder.blocks.attention.out_proj", LINEAR),
    Row("layers.{layer}.norm2", "D", "encoder.blocks.norm2", LAYER_NORM),
    Row("layers.{layer}.ffn.0", "F D", "encoder.blocks.ffn.up", LINEAR),
    Row("layers.{layer}.ffn.3", "D F", "encoder.blocks.ffn.down", LINEAR),
    Row("final_norm", "D", "encoder.final_norm", LAYER_NORM),
)
RANKER = (
    Row("user_embedding", "U D", "user_embedding", EMBEDDING),
    Row("item_embedding", "I D", "item_embedding", EMBEDDING),
    Row("action_embedding", "L D", None, EMBEDDING),
    Row("gender_embedding", "G D", "gender_embedding", EMBEDDING),
    Row("age_embedding", "Y D", "age_embedding", EMBEDDING),
    Row("category_embedding", "K D", "category_embedding", EMBEDDING),
    Row("segment_embedding.embedding", "3 D", "segment_embedding", EMBEDDING),
    Row("pos_encoding", "1 P D", "pos_encoding", POSITIONS),
    *(row._replace(torch=f"encoder.{row.torch}") for row in ENCODER),
    Row("output_norm", "D", "output_norm", LAYER_NORM),
    Row("unembedding", "A D", "unembedding", LINEAR),
)
TWO_TOWER = (
    Row("user_tower.user_embedding", "U D", "user_tower.user_embedding", EMBEDDING),
    Row("user_tower.gender_embedding", "G D", "user_tower.gender_embedding", EMBEDDING),
    Row("user_tower.age_embedding", "Y D", "user_tower.age_embedding", EMBEDDING),
    Row("user_tower.item_embedding", "I D", "user_tower.item_embedding", EMBEDDING),
    Row("user_tower.action_projection", "D A", "user_tower.action_projection", LINEAR),
    Row("user_tower.pos_encoding", "1 P 2D", "user_tower.pos_encoding", POSITIONS),
    *(
        Row(f"user_tower.transformer.{torch}", sizes.replace("D", "2D"), f"user_tower.{flax}", leaves)
        for torch, sizes, flax, leaves in ENCODER
    ),
    Row("user_tower.output_projection", "D 2D", "user_tower.output_projection", LINEAR),
    Row("item_tower.item_embedding", "I D", "item_tower.item_embedding", EMBEDDING),
    Row("item_tower.category_embedding", "K D", "item_tower.category_embedding", EMBEDDING),
    Row("item_tower.mlp.0", "M D", "item_tower.up", LINEAR),
    Row("item_tower.mlp.3", "D M", "item_tower.down", LINEAR),
    Row("output_norm", "D", "output_norm", LAYER_NORM),
    Row("unembedding", "A D", "unembedding", LINEAR),
)


class Entry(NamedTuple):
    """One array of the state dict: name, sizes in letters, path here (None where unused), and how it is placed."""

    name: str
    sizes: tuple[str, ...]
    path: tuple[str, ...] | None
    transpose: bool
    stacked: bool


class Parameters(NamedTuple):
    """Checked weights: the sizes by letter, "layers" among them, and the arrays by path in our module."""

    sizes: dict[str, int]
    arrays: dict[tuple[str, ...], np.ndarray]


def load_encoder(weights: Weights, *, num_heads: int, activation: Literal["gelu", "relu"]) -> JointEncoder:
    """The original's encoder, called with x [B, T, D] and padding_mask [B, T] (True is padding) or None.

    Raises:
        UserError: names every missing, surplus, misshapen or non-finite entry of `weights`, or a wrong option.
    """
    if activation not in ACTIVATIONS:
        raise UserError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    sizes, arrays = _read("encoder", ENCODER, weights, num_heads)
    config = _config(sizes, sizes["D"], activation)
    return _with_parameters(lambda: JointEncoder(config, rngs=nnx.Rngs(0)), arrays)


def load_paper_attention(weights: Weights, *, num_heads: int) -> JointPaperAttention:
    """The published attention, called like the encoder. Raises `UserError` as `load_encoder` does."""
    sizes, arrays = _read("paper attention", PAPER_ATTENTION, weights, num_heads)
    return _with_parameters(lambda: JointPaperAttention(sizes["D"], num_heads, rngs=nnx.Rngs(0)), arrays)


def load_ranker(weights: Weights, *, num_heads: int) -> OriginalRanker:
    """The original's ranker; see `OriginalRanker` for its call. Raises `UserError` as `load_encoder` does."""
    sizes, arrays = _read("ranker", RANKER, weights, num_heads)
    config, vocabulary = _config(sizes, sizes["D"], "gelu"), _vocabulary(sizes)
    return _with_parameters(lambda: OriginalRanker(config, vocabulary, sizes["P"], rngs=nnx.Rngs(0)), arrays)


def load_two_tower(weights: Weights, *, num_heads: int, temperature: float) -> OriginalTwoTower:
    """The original's retrieval model; see `OriginalTwoTower` for its call. Raises as `load_encoder` does."""
    if not (isfinite(temperature) and temperature > 0):
        raise UserError(f"temperature is {temperature}, expected a positive number")
    sizes, arrays = _read("two-tower model", TWO_TOWER, weights, num_heads)
    config, vocabulary = _config(sizes, 2 * sizes["D"], "relu"), _vocabulary(sizes)

    def build() -> OriginalTwoTower:
        return OriginalTwoTower(config, vocabulary, sizes["P"], sizes["M"], temperature, rngs=nnx.Rngs(0))

    return _with_parameters(build, arrays)


def _config(sizes: Mapping[str, int], width: int, activation: Literal["gelu", "relu"]) -> EncoderConfig:
    return EncoderConfig(sizes["layers"], width, sizes["H"], sizes["F"], activation)


def _vocabulary(sizes: Mapping[str, int]) -> Vocabulary:
    return Vocabulary(sizes["U"], sizes["I"], sizes["G"], sizes["Y"], sizes["K"], sizes["A"])


def _with_parameters(build: Callable[[], ModuleT], arrays: Mapping[tuple[str, ...], np.ndarray]) -> ModuleT:
    """The module with its parameters taken from `arrays`; nothing is initialised first."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    flat = [
        (path, variable.replace(jnp.asarray(arrays[tuple(map(str, path))])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _read(what: str, rows: Sequence[Row], weights: Weights, num_heads: int) -> Parameters:
    """Check `weights` against a table and bring them into our layout."""
    if num_heads < 1:
        raise UserError(f"num_heads is {num_heads}, expected at least 1")
    layers = _count_layers(rows, weights)
    entries = tuple(_entries(rows, layers))
    names = {entry.name for entry in entries}
    problems = [f"missing: {entry.name}" for entry in entries if entry.name not in weights]
    problems += [f"surplus: {name}" for name in weights if name not in names]
    arrays = {name: np.asarray(weights[name]) for name in weights if name in names}
    sizes = {"H": num_heads, "layers": layers}
    problems += _settle_sizes(entries, arrays, sizes)
    problems += _entry_problems(entries, arrays, sizes)
    width = _extent(next(row.sizes for row in rows if row.torch.endswith("query")).split()[0], sizes)
    if isinstance(width, int) and width % num_heads:
        problems.append(f"the width {width} is no multiple of num_heads = {num_heads}")
    if problems:
        raise UserError(f"the weights do not fit the original's {what}:\n  " + "\n  ".join(problems))
    return Parameters(sizes, _placed(entries, arrays))


def _count_layers(rows: Sequence[Row], weights: Iterable[str]) -> int:
    """How many blocks the names speak of; at least one, so that an encoder without blocks is reported as incomplete."""
    prefixes = {row.torch.partition("{layer}")[0] for row in rows if "{layer}" in row.torch}
    pattern = re.compile(f"(?:{'|'.join(map(re.escape, prefixes))})(0|[1-9][0-9]*)\\.")
    return max(1, len({match[1] for name in weights if prefixes and (match := pattern.match(name))}))


def _entries(rows: Sequence[Row], layers: int) -> Iterable[Entry]:
    for torch, sizes, flax, leaves in rows:
        stacked = "{layer}" in torch
        for leaf in leaves:
            letters = tuple(sizes.split())[: 1 if leaf.torch == "bias" else None]
            path = None if flax is None else (*flax.split("."), leaf.flax)
            for layer in range(layers if stacked else 1):
                name = f"{torch}.{leaf.torch}".replace("{layer}", str(layer))
                yield Entry(name, letters, path, leaf.transpose, stacked)


def _extent(size: str, sizes: Mapping[str, int]) -> int | str:
    """The extent that "D", "2D" or "3" stands for, or the text itself while its letter is not settled."""
    if size.isdigit():
        return int(size)
    return int(size[:-1] or 1) * sizes[size[-1]] if size[-1] in sizes else size


def _settle_sizes(entries: Iterable[Entry], arrays: Mapping[str, np.ndarray], sizes: dict[str, int]) -> list[str]:
    """Add to `sizes` what most entries say of each letter. Returns the letters on which they are divided."""
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    voters: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for entry in entries:
        shape = arrays[entry.name].shape if entry.name in arrays else ()
        if len(shape) != len(entry.sizes):
            continue
        for size, extent in zip(entry.sizes, shape, strict=True):
            letter, factor = size[-1], int(size[:-1] or 1)
            if not size.isdigit() and letter not in sizes and extent % factor == 0:
                votes[letter][extent // factor] += 1
                voters[letter, extent // factor].append(entry.name)
    problems = []
    for letter, counted in votes.items():
        (extent, most), *others = counted.most_common()
        if others and others[0][1] == most:
            sides = (f"{value} in {', '.join(dict.fromkeys(voters[letter, value]))}" for value in counted)
            problems.append(f"misshapen: size {letter} is {' but '.join(sides)}")
        else:
            sizes[letter] = extent
    return problems


def _entry_problems(
    entries: Iterable[Entry], arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> Iterable[str]:
    for name, letters, *_ in entries:
        if name not in arrays:
            continue
        array = arrays[name]
        shape = tuple(_extent(letter, sizes) for letter in letters)
        unlike = any(isinstance(want, int) and want != have for want, have in zip(shape, array.shape, strict=False))
        if len(array.shape) != len(shape) or unlike or array.size == 0:
            yield f"misshapen: {name} has shape {array.shape}, expected [{', '.join(letters)}] = {shape}"
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            yield f"not a float array: {name} is {array.dtype}"
        elif not np.isfinite(array.astype(np.float64)).all():
            yield f"not finite: {name}"


def _placed(entries: Iterable[Entry], arrays: Mapping[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
    layers_of: defaultdict[tuple[str, ...], list[np.ndarray]] = defaultdict(list)
    placed = {}
    for name, _, path, transpose, stacked in entries:
        if path is None:
            continue
        array = arrays[name].astype(np.float32)
        array = array.T if transpose else array
        if stacked:
            layers_of[path].append(array)
        else:
            placed[path] = array
    return placed | {path: np.stack(layers) for path, layers in layers_of.items()}


def load_state(path: str | Path) -> dict[str, np.ndarray]:
    """Read a state dict without running code from the file.

    Args:
        path: `.safetensors`; `.npz`, whose arrays may stand under "weights/" beside others; or a legacy `.pt`, `.pth`
            or `.ckpt`, through `torch.load(weights_only=True)`, where the state dict may be the value of
            "model_state_dict", "state_dict" or "model".

    Returns:
        Arrays by name, without the "module." that distributed training puts before all names.

    Raises:
        UserError: the file is absent, damaged, of another kind, or holds objects; or PyTorch is missing or too old.
    """
    path = Path(path)
    readers = {
        ".safetensors": _read_safetensors,
        ".npz": _read_npz,
        **dict.fromkeys((".pt", ".pth", ".ckpt"), _read_torch),
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: not a state dict by its name; expected {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    state = readers[path.suffix](path)
    if not state:
        raise UserError(f"{path}: holds no arrays")
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): array for name, array in state.items()}
    return state


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = [name for name in archive.files if name.startswith("weights/")] or archive.files
            return {name.removeprefix("weights/"): archive[name] for name in names}
    except (ValueError, EOFError, BadZipFile, zlib.error, AttributeError, TypeError, *_HEADER_ERRORS) as error:
        raise UserError(f"{path}: not a readable npz of plain arrays: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: reading it needs PyTorch; install tenrec_jax[torch]") from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        # CVE-2025-32434: before 2.6 a file could run code in spite of weights_only.
        raise UserError(f"{path}: reading it safely needs PyTorch 2.6 or newer, {torch.__version__} is installed")
    try:
        with catch_warnings():
            # Only remarks on the file's format; a file that cannot be read raises.
            filterwarnings("ignore", message="Detected pickle protocol")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        advice = "save its state dict alone as .safetensors where you trust it"
        raise UserError(f"{path}: refused, it holds more than tensors and plain containers; {advice}") from error
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path}: not a readable PyTorch file: {error}") from error
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a state dict")
    return {str(name): _from_torch(path, str(name), value) for name, value in state.items()}


def _from_torch(path: Path, name: str, value: object) -> np.ndarray:
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        raise UserError(f"{path}: entry {name} is a {type(value).__name__}, expected a dense tensor")
    return (value.float() if value.is_floating_point() else value).detach().numpy()
