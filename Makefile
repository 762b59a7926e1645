# make demo   a tiny FP8 DeepSeek-V3, converted to 4 bits and run
# make demo-v4  the same with a tiny DeepSeek-V4 in its own FP8 and FP4, converted bit for bit
# make test   the tests
# make test-all  the tests with every family in every format and flag; writes docs/matrix.md
# make oracle  all tests of the oracle, and tests/oracle.lock if they pass
# make check  format, lint and types
# Each installs all it needs in .venv; it needs only Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin

# Hundreds of tests start Python: where it keeps no compiled files, each would compile all that it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-v4 test test-all oracle check golden clean

demo: .venv/runtime
	rm -rf demo
	@echo "--- a random DeepSeek-V3 in the layout and the format of the real one"
	$(BIN)/mla-sanitize sample deepseek_v3 demo/source --format fp8
	@echo "--- what a conversion to 4 bits will do"
	$(BIN)/mla-sanitize plan demo/source -q
	@echo "--- do it"
	$(BIN)/mla-sanitize convert demo/source --mlx-path demo/mlx -q
	@echo "--- run it; the weights are random, and so is the text"
	$(BIN)/python -m mlx_lm generate --model demo/mlx --prompt "Hello" --max-tokens 16

demo-v4: .venv/runtime
	rm -rf demo-v4
	@echo "--- a random DeepSeek-V4 in the layout and the formats of the real one"
	$(BIN)/mla-sanitize sample deepseek_v4 demo-v4/source --format deepseek-v4
	@echo "--- what a conversion will do: FP8 and FP4 move to MLX's modes unchanged"
	$(BIN)/mla-sanitize plan demo-v4/source
	@echo "--- do it, and write the MTP layer to a second folder"
	$(BIN)/mla-sanitize convert demo-v4/source --mlx-path demo-v4/mlx --keep-mtp
	@echo "--- run it with the class in mla_tools; the weights are random, and so is the text"
	$(BIN)/python -m mlx_lm generate --model demo-v4/mlx --trust-remote-code --prompt "Hello" --max-tokens 16

test: .venv/test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: oracle
	$(MAKE) test ARGS='--all $(ARGS)'

oracle: .venv/test
	$(BIN)/python -m pytest --all tests/test_reference.py --deselect \
		tests/test_reference.py::test_the_lock_is_that_of_this_oracle
	$(BIN)/python tests/oracle.py

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

golden: .venv/test
	$(BIN)/python tests/test_golden.py --write

clean:
	rm -rf .venv demo demo-v4 build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; say which with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/runtime: .venv/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# One call for both. What the tests import of some 17,000 files is compiled when they do.
.venv/test: .venv/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test]'
	touch .venv/runtime $@
