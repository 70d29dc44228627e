"""The commands that carry weights to PyTorch and back."""

import argparse
from pathlib import Path

from tenrec_jax.interop.export import bring_back, export
from tenrec_jax.interop.original_scorer import DEFAULT_TEMPERATURE, import_original

EXPORT_EXAMPLES = """examples:
  tenrec-jax export --recommender runs/quickstart/recommender --out exported
  python -m torch_mlu_backend verify exported --device cpu                      compares PyTorch's outputs with JAX's
"""
IMPORT_EXAMPLES = """examples:
  tenrec-jax import --exported exported --out recommender2
  tenrec-jax recommend --recommender recommender2 --user 1
"""
ORIGINAL_EXAMPLES = """examples:
  tenrec-jax import-original ranker.pt --out original
  tenrec-jax import-original two_tower.safetensors --temperature 0.05 --out original2
  tenrec-jax score --recommender original --user 5 --history 12,7,99 --candidates 3,4,5
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `export`, `import` and `import-original` to the command line."""
    exporting = commands.add_parser(
        "export",
        help="write a recommender for torch_mlu_backend, which needs PyTorch alone",
        epilog=EXPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    exporting.add_argument("--recommender", type=Path, required=True, help="folder that launch.py wrote")
    exporting.add_argument("--out", type=Path, required=True, help="new folder to write")
    exporting.set_defaults(run=_export)

    importing = commands.add_parser(
        "import",
        help="make a recommender of an exported folder, trained further or not",
        epilog=IMPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importing.add_argument("--exported", type=Path, required=True, help="folder that export or torch_mlu_backend wrote")
    importing.add_argument("--out", type=Path, required=True, help="new folder to write")
    importing.set_defaults(run=_import)

    original = commands.add_parser(
        "import-original",
        help="read a checkpoint of the original system's ranker or two-tower",
        epilog=ORIGINAL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    original.add_argument("checkpoint", type=Path, metavar="CKPT", help="state dict: .pt, .safetensors or .npz")
    original.add_argument("--out", type=Path, required=True, help="new folder to write")
    original.add_argument(
        "--temperature",
        type=float,
        default=DEFAULT_TEMPERATURE,
        help="of a two-tower, whose checkpoint does not hold it (default: %(default)s)",
    )
    original.set_defaults(run=_import_original)


def _export(options: argparse.Namespace) -> None:
    loaded = export(options.recommender, options.out)
    print(f"{options.out}: version {loaded.version}; check it with python -m torch_mlu_backend verify {options.out}")


def _import(options: argparse.Namespace) -> None:
    print(f"{options.out}: version {bring_back(options.exported, options.out).version}")


def _import_original(options: argparse.Namespace) -> None:
    kind = import_original(options.checkpoint, options.out, temperature=options.temperature)
    print(f"{options.out}: {kind.replace('_', ' ')}; tenrec-jax score and python -m torch_mlu_backend score read it")
