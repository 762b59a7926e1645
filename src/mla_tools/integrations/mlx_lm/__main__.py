"""A command of mlx-lm with `enable()`: python -m mla_tools.integrations.mlx_lm generate ..."""

import sys

from mla_tools.isolation import trusted_path

# Before any other import: it would find what lies in the working directory.
sys.path[:] = trusted_path()

from importlib import import_module  # noqa: E402

from mla_tools.integrations.mlx_lm import enable  # noqa: E402


def main() -> None:
    """Run the command of mlx-lm that the arguments of this process name."""
    with enable():
        import_module("mlx_lm.cli").main()


if __name__ == "__main__":
    main()
